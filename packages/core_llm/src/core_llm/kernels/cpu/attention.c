/* Attention of one new query per row over its cached keys and values.
 *
 * Axes: B batch, H query heads, G key/value heads, R = H / G, S keys, D head dim (a multiple of 16, at most 256).
 * Each key and value is read from memory once for all R query heads of its group. The keys are walked in blocks
 * that stay in the first-level cache, with the running maximum and sum of the online softmax (arXiv 1805.02867).
 */
#include "common.h"
#ifdef _OPENMP
#include <omp.h>
#endif

enum { KEYS = 64, HEADS = 4, MAX_D = 256, MIN_SPLIT = 256 };

typedef struct {
    const void *q, *k, *v; /* q and out [B, H, D]; k and v [B, G, S, D] with strides in elements */
    void *out;
    const int64_t *last; /* [B]: index of the last visible key, or NULL: all S */
    int64_t q_b, q_h, k_b, k_g, k_s, v_b, v_g, v_s;
    int64_t B, H, G, S, D;
    int bf16;
    float scale;
} attention;

/* scores[r][j] of `heads` queries with keys j of a block */
static inline __attribute__((always_inline)) void
score(const attention *a, const float *q, const void *k, int64_t at, int n, const int heads, float (*scores)[KEYS]) {
    for (int j = 0; j < n; j++) {
        vf acc[HEADS][2] = {0};
        for (int64_t d = 0; d < a->D; d += 16) {
            vf x, y;
            load16(k, a->bf16, at + j * a->k_s + d, &x, &y);
            for (int r = 0; r < heads; r++) {
                acc[r][0] += x * *(const vf *)(q + r * a->D + d);
                acc[r][1] += y * *(const vf *)(q + r * a->D + d + 8);
            }
        }
        for (int r = 0; r < heads; r++) scores[r][j] = sum8(acc[r][0] + acc[r][1]);
    }
}

/* acc[r] += weights[r] times the values of a block */
static inline __attribute__((always_inline)) void
gather(const attention *a, float *acc, const void *v, int64_t at, int n, const int heads, float (*weights)[KEYS]) {
    for (int64_t d = 0; d < a->D; d += 16) {
        vf sum[HEADS][2];
        for (int r = 0; r < heads; r++) {
            sum[r][0] = *(vf *)(acc + r * a->D + d);
            sum[r][1] = *(vf *)(acc + r * a->D + d + 8);
        }
        for (int j = 0; j < n; j++) {
            vf x, y;
            load16(v, a->bf16, at + j * a->v_s + d, &x, &y);
            for (int r = 0; r < heads; r++) {
                sum[r][0] += weights[r][j] * x;
                sum[r][1] += weights[r][j] * y;
            }
        }
        for (int r = 0; r < heads; r++) {
            *(vf *)(acc + r * a->D + d) = sum[r][0];
            *(vf *)(acc + r * a->D + d + 8) = sum[r][1];
        }
    }
}

/* One block of keys for `heads` query heads: new maximum, rescaled sums, weights, values. */
static inline __attribute__((always_inline)) void
block_of_heads(const attention *a, const float *q, float *acc, float *top, float *sum, int64_t k_at, int64_t v_at,
               int n, const int heads) {
    float scores[HEADS][KEYS] __attribute__((aligned(64)));
    score(a, q, a->k, k_at, n, heads, scores);
    for (int r = 0; r < heads; r++) {
        float high = top[r];
        for (int j = n; j < KEYS; j++) scores[r][j] = -INFINITY;
        for (int j = 0; j < n; j++) high = scores[r][j] > high ? scores[r][j] : high;
        float shrink = expf(top[r] - high); /* 0 for the first block: its maximum was -inf */
        vf total = {0};
        for (int j = 0; j < KEYS; j += 8) {
            vf e = exponential(*(vf *)(scores[r] + j) - high);
            *(vf *)(scores[r] + j) = e;
            total += e;
        }
        sum[r] = sum[r] * shrink + sum8(total);
        top[r] = high;
        if (shrink != 1)
            for (int64_t d = 0; d < a->D; d += 8) *(vf *)(acc + r * a->D + d) *= shrink;
    }
    gather(a, acc, a->v, v_at, n, heads, scores);
}

/* Queries in the order of load16, times the scale. */
static void prepare_queries(const attention *a, int64_t b, int64_t g, float *q) {
    int64_t R = a->H / a->G;
    for (int64_t r = 0; r < R; r++)
        for (int64_t d = 0; d < a->D; d += 16)
            for (int j = 0; j < 16; j++) {
                int64_t from = a->bf16 ? (j < 8 ? 2 * j : 2 * (j - 8) + 1) : j;
                q[r * a->D + d + j] = a->scale * load(a->q, a->bf16, b * a->q_b + (g * R + r) * a->q_h + d + from);
            }
}

/* Keys first..last-1 of group g in row b: acc [R, D] unnormalised, maxima and sums [R]. */
static void attend_part(const attention *a, const float *q, int64_t b, int64_t g, int64_t first, int64_t last,
                        float *acc, float *top, float *sum) {
    int64_t R = a->H / a->G;
    memset(acc, 0, (size_t)(R * a->D) * 4);
    for (int64_t r = 0; r < R; r++) top[r] = -INFINITY, sum[r] = 0;
    for (int64_t s = first; s < last; s += KEYS) {
        int n = last - s < KEYS ? (int)(last - s) : KEYS;
        int64_t k_at = b * a->k_b + g * a->k_g + s * a->k_s, v_at = b * a->v_b + g * a->v_g + s * a->v_s;
        int64_t r = 0;
        for (; r + HEADS <= R; r += HEADS)
            block_of_heads(a, q + r * a->D, acc + r * a->D, top + r, sum + r, k_at, v_at, n, HEADS);
        for (; r < R; r++) block_of_heads(a, q + r * a->D, acc + r * a->D, top + r, sum + r, k_at, v_at, n, 1);
    }
}

/* Add up the parts of one group and write its R outputs. */
static void merge(const attention *a, int64_t b, int64_t g, int64_t splits, const float *acc, const float *top,
                  const float *sum) {
    int64_t R = a->H / a->G;
    for (int64_t r = 0; r < R; r++) {
        float high = -INFINITY, total = 0, weight[64];
        for (int64_t i = 0; i < splits; i++) high = fmaxf(high, top[i * R + r]);
        for (int64_t i = 0; i < splits; i++) {
            weight[i] = sum[i * R + r] > 0 ? expf(top[i * R + r] - high) : 0;
            total += weight[i] * sum[i * R + r];
        }
        for (int64_t d = 0; d < a->D; d++) {
            float value = 0;
            for (int64_t i = 0; i < splits; i++) value += weight[i] * acc[(i * R + r) * a->D + d];
            int64_t j = d % 16, to = a->bf16 ? (j < 8 ? 2 * j : 2 * (j - 8) + 1) : j;
            /* a query that sees no key has the sum 0 and gives zeros */
            store(a->out, a->bf16, (b * a->H + g * R + r) * a->D + d - j + to, total > 0 ? value / total : 0);
        }
    }
}

/* strides: q_b, q_h, k_b, k_g, k_s, v_b, v_g, v_s. Returns 1 when memory is short. */
int attend_decode(const void *q, const void *k, const void *v, void *out, const int64_t *last, const int64_t *strides,
                  int64_t B, int64_t H, int64_t G, int64_t S, int64_t D, int bf16) {
    const int64_t *x = strides;
    attention a = {q, k, v, out, last, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], B, H, G, S, D, bf16,
                   1 / sqrtf((float)D)};
    int64_t R = H / G, threads = 1, splits = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    while (B * G * splits % threads && B * G * splits < 4 * threads && splits < 64 && S / (splits + 1) >= MIN_SPLIT)
        splits++;
    int64_t size = 2 * R * D + 2 * R; /* per part: queries, sums of values, maxima, sums of weights */
    size = (size + 15) / 16 * 16;
    float *memory = aligned_floats(B * G * splits * size);
    if (!memory) return 1;
#pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < B * G * splits; task++) {
        int64_t b = task / (G * splits), g = task / splits % G, i = task % splits;
        int64_t visible = last ? (last[b] + 1 < S ? last[b] + 1 : S) : S;
        float *mine = memory + task * size;
        prepare_queries(&a, b, g, mine);
        attend_part(&a, mine, b, g, visible * i / splits, visible * (i + 1) / splits, mine + R * D,
                    mine + 2 * R * D, mine + 2 * R * D + R);
    }
    /* Gather the parts' results side by side; few numbers, one thread. */
    for (int64_t bg = 0; bg < B * G; bg++) {
        float *first = memory + bg * splits * size, *acc = first + R * D;
        float *top = first + 2 * R * D, *sum = top + R;
        if (splits == 1) {
            merge(&a, bg / G, bg % G, 1, acc, top, sum);
            continue;
        }
        float *all = aligned_floats(splits * (R * D + 2 * R));
        if (!all) {
            free(memory);
            return 1;
        }
        for (int64_t i = 0; i < splits; i++) {
            const float *from = first + i * size;
            memcpy(all + i * R * D, from + R * D, (size_t)(R * D) * 4);
            memcpy(all + splits * R * D + i * R, from + 2 * R * D, (size_t)R * 4);
            memcpy(all + splits * (R * D + R) + i * R, from + 2 * R * D + R, (size_t)R * 4);
        }
        merge(&a, bg / G, bg % G, splits, all, all + splits * R * D, all + splits * (R * D + R));
        free(all);
    }
    free(memory);
    return 0;
}
