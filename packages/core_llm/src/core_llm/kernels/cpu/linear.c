/* Products of a few rows of activations with a large weight matrix: what decoding spends its time on.
 *
 * Axes: T rows of x, N outputs, K inputs. x [T, K] and y [T, N] are fp32 or bf16, weights are [N, K] row by row.
 * Every weight byte is read from memory once for all T rows: the speed limit is that of reading memory.
 */
#include "common.h"
#ifdef _OPENMP
#include <omp.h>
#endif

/* A thread reads STREAMS far-apart sequences of rows side by side, each without a gap: enough requests under way
 * to fill the memory bus, and every load of x serves as many weights. AHEAD is the distance of the prefetch in
 * bytes. Measured best of 1, 2, 4 streams and 0, 512, 2048 bytes. */
enum { STREAMS = 4, AHEAD = 512 };

/* bf16 values are the upper halves of fp32: a shift gives the even elements of a vector, a mask the odd ones.
 * x is stored to match: per 16 elements first the 8 even ones, then the 8 odd ones. */
static float *even_odd(const void *x, int bf16, int64_t n) {
    float *out = aligned_floats(n);
    if (!out) return NULL;
    for (int64_t i = 0; i < n; i += 16)
        if (bf16) load16(x, 1, i, (vf *)(out + i), (vf *)(out + i + 8));
        else
            for (int j = 0; j < 8; j++) {
                out[i + j] = ((const float *)x)[i + 2 * j];
                out[i + 8 + j] = ((const float *)x)[i + 2 * j + 1];
            }
    return out;
}

/* Outputs n0..n1 of this thread, as STREAMS equal parts: step i works on row i of each part. */
typedef struct {
    int64_t first, last, step;
} part;

static part my_part(int64_t n) {
#ifdef _OPENMP
    int64_t threads = omp_get_num_threads(), id = omp_get_thread_num();
#else
    int64_t threads = 1, id = 0;
#endif
    part p = {n * id / threads, n * (id + 1) / threads, 0};
    p.step = (p.last - p.first + STREAMS - 1) / STREAMS;
    return p;
}

/* A part that does not divide evenly computes its last row more than once. */
static inline int64_t row_of(part p, int64_t i, int stream) {
    int64_t row = p.first + stream * p.step + i;
    return row < p.last ? row : p.last - 1;
}

static inline __attribute__((always_inline)) void
rows_bf16(const uint16_t *const w[STREAMS], const float *x, int64_t K, const int t, float out[STREAMS][2]) {
    vf acc[STREAMS][2] = {0}, more[STREAMS][2] = {0};
    for (int64_t k = 0; k < K; k += 32)
        for (int r = 0; r < STREAMS; r++) {
            __builtin_prefetch(w[r] + k + AHEAD / 2);
            vu low = *(const vu_unaligned *)(w[r] + k), high = *(const vu_unaligned *)(w[r] + k + 16);
            for (int i = 0; i < t; i++) {
                const vf *v = (const vf *)(x + i * K + k);
                acc[r][i] += (vf)(low << 16) * v[0];
                more[r][i] += (vf)(low & 0xffff0000u) * v[1];
                acc[r][i] += (vf)(high << 16) * v[2];
                more[r][i] += (vf)(high & 0xffff0000u) * v[3];
            }
        }
    for (int r = 0; r < STREAMS; r++)
        for (int i = 0; i < t; i++) out[r][i] = sum8(acc[r][i] + more[r][i]);
}

/* y = x w^T; K a multiple of 32. Returns 1 when memory is short. */
int linear_bf16(const void *x, int x_bf16, const uint16_t *w, void *y, int64_t T, int64_t N, int64_t K) {
    float *prepared = even_odd(x, x_bf16, T * K);
    if (!prepared) return 1;
#pragma omp parallel
    {
        part p = my_part(N);
        for (int64_t i = 0; i < p.step; i++) {
            const uint16_t *row[STREAMS];
            for (int r = 0; r < STREAMS; r++) row[r] = w + row_of(p, i, r) * K;
            for (int64_t t = 0; t < T; t += 2) { /* after the first two, the rows come from the cache */
                float out[STREAMS][2];
                int two = T - t > 1;
                if (two) rows_bf16(row, prepared + t * K, K, 2, out);
                else rows_bf16(row, prepared + t * K, K, 1, out);
                for (int r = 0; r < STREAMS; r++)
                    for (int j = 0; j <= two; j++) store(y, x_bf16, (t + j) * N + row_of(p, i, r), out[r][j]);
            }
        }
    }
    free(prepared);
    return 0;
}

static inline __attribute__((always_inline)) void
rows_f32(const float *const w[STREAMS], const float *x, int64_t K, const int t, float out[STREAMS][2]) {
    vf acc[STREAMS][2] = {0}, more[STREAMS][2] = {0};
    for (int64_t k = 0; k < K; k += 16)
        for (int r = 0; r < STREAMS; r++) {
            __builtin_prefetch(w[r] + k + AHEAD / 4);
            vf low = *(const vf_unaligned *)(w[r] + k), high = *(const vf_unaligned *)(w[r] + k + 8);
            for (int i = 0; i < t; i++) {
                const vf_unaligned *v = (const vf_unaligned *)(x + i * K + k);
                acc[r][i] += low * v[0];
                more[r][i] += high * v[1];
            }
        }
    for (int r = 0; r < STREAMS; r++)
        for (int i = 0; i < t; i++) out[r][i] = sum8(acc[r][i] + more[r][i]);
}

/* y = x w^T, all fp32; K a multiple of 16. */
void linear_f32(const float *x, const float *w, float *y, int64_t T, int64_t N, int64_t K) {
#pragma omp parallel
    {
        part p = my_part(N);
        for (int64_t i = 0; i < p.step; i++) {
            const float *row[STREAMS];
            for (int r = 0; r < STREAMS; r++) row[r] = w + row_of(p, i, r) * K;
            for (int64_t t = 0; t < T; t += 2) {
                float out[STREAMS][2];
                int two = T - t > 1;
                if (two) rows_f32(row, x + t * K, K, 2, out);
                else rows_f32(row, x + t * K, K, 1, out);
                for (int r = 0; r < STREAMS; r++)
                    for (int j = 0; j <= two; j++) y[(t + j) * N + row_of(p, i, r)] = out[r][j];
            }
        }
    }
}

/* Integer weights meet activations of 16 bits with one scale per GROUP: rounding 2^-16 of the group's largest
 * value, finer than the bf16 that they came from, and the products stay exact in 32-bit integers. */
typedef struct {
    int16_t *q;   /* [T, K] */
    float *scale; /* [T, K / GROUP] */
    float *sum;   /* [T, K / GROUP], of the rounded values: what a group's minimum is multiplied with */
} rounded;

static rounded round_x(const void *x, int bf16, int64_t n) {
    rounded out;
    float *memory = aligned_floats(n / 2 + 2 * (n / GROUP));
    out.q = (int16_t *)memory;
    if (!memory) return out;
    out.scale = memory + n / 2;
    out.sum = out.scale + n / GROUP;
    for (int64_t g = 0; g < n / GROUP; g++) {
        vf value[GROUP / 8], high = {0};
        for (int i = 0; i < GROUP / 8; i++) {
            value[i] = load8(x, bf16, g * GROUP + 8 * i);
            vf size = (vf)((vu)value[i] & 0x7fffffffu);
            high = (vf)(((vi)size & (size > high)) | ((vi)high & ~(size > high)));
        }
        float top = 0;
        for (int i = 0; i < 8; i++) top = fmaxf(top, high[i]);
        float inverse = top > 0 ? 32767.0f / top : 0;
        vi sum = {0};
        for (int i = 0; i < GROUP / 8; i++) {
            /* adding 1.5 * 2^23 leaves the nearest whole number in the low bits */
            vi q = (vi)(value[i] * inverse + 12582912.0f) - 0x4b400000;
            *(shorts *)(out.q + g * GROUP + 8 * i) = __builtin_convertvector(q, shorts);
            sum += q;
        }
        out.scale[g] = top / 32767.0f;
        out.sum[g] = sum8(__builtin_convertvector(sum, vf)) * out.scale[g];
    }
    return out;
}

/* Sum of products of GROUP weights with GROUP activations, as 8 partial sums. */
static inline vi dot_int8(const int8_t *w, const int16_t *x) {
#ifdef __AVX2__
    __m256i acc = _mm256_setzero_si256();
    for (int i = 0; i < GROUP; i += 16) {
        __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + i)));
        acc = multiply_add(acc, wide, _mm256_load_si256((const __m256i *)(x + i)));
    }
    return (vi)acc;
#else
    vi acc = {0};
    for (int i = 0; i < GROUP; i++) acc[i % 8] += (int32_t)w[i] * x[i];
    return acc;
#endif
}

/* 64 weights in 32 bytes: as 16 words of 16 bits, nibble j of word i is weight 16 j + i, from 0 to 15. */
static inline vi dot_int4(const uint8_t *w, const int16_t *x) {
#ifdef __AVX2__
    __m256i words = _mm256_loadu_si256((const __m256i *)w), low = _mm256_set1_epi16(15);
    const __m256i *v = (const __m256i *)x;
    __m256i acc = multiply_add(_mm256_setzero_si256(), _mm256_and_si256(words, low), v[0]);
    acc = multiply_add(acc, _mm256_and_si256(_mm256_srli_epi16(words, 4), low), v[1]);
    acc = multiply_add(acc, _mm256_and_si256(_mm256_srli_epi16(words, 8), low), v[2]);
    return (vi)multiply_add(acc, _mm256_srli_epi16(words, 12), v[3]);
#else
    vi acc = {0};
    for (int i = 0; i < 16; i++) {
        int word = w[2 * i] | w[2 * i + 1] << 8;
        for (int j = 0; j < 4; j++) acc[i % 8] += (word >> 4 * j & 15) * x[16 * j + i];
    }
    return acc;
#endif
}

static inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }

/* Weight [n, k] is w[n, k] * scale[n]; K a multiple of GROUP. Returns 1 when memory is short. */
int linear_int8(const void *x, int x_bf16, const int8_t *w, const float *scale, void *y,
                int64_t T, int64_t N, int64_t K) {
    rounded a = round_x(x, x_bf16, T * K);
    if (!a.q) return 1;
    int64_t groups = K / GROUP;
#pragma omp parallel
    {
        part p = my_part(N);
        for (int64_t i = 0; i < p.step; i++) {
            const int8_t *row[STREAMS];
            for (int r = 0; r < STREAMS; r++) row[r] = w + row_of(p, i, r) * K;
            for (int64_t t = 0; t < T; t++) {
                vf acc[STREAMS] = {0};
                for (int64_t g = 0; g < groups; g++)
                    for (int r = 0; r < STREAMS; r++) {
                        __builtin_prefetch(row[r] + g * GROUP + AHEAD);
                        vi dot = dot_int8(row[r] + g * GROUP, a.q + t * K + g * GROUP);
                        acc[r] += to_float(dot) * a.scale[t * groups + g];
                    }
                for (int r = 0; r < STREAMS; r++) {
                    int64_t n = row_of(p, i, r);
                    store(y, x_bf16, t * N + n, sum8(acc[r]) * scale[n]);
                }
            }
        }
    }
    free(a.q);
    return 0;
}

/* For up to 8 groups of a row: scales of weights and activations multiplied; returns minima times sums of x. */
static inline vf eight_scales(const uint32_t *pairs, const float *x_scale, const float *x_sum, int n, float *out) {
    vu pair = {0};
    vf scale = {0}, sum = {0};
    if (n == 8) {
        pair = *(const vu_unaligned *)pairs;
        scale = *(const vf_unaligned *)x_scale;
        sum = *(const vf_unaligned *)x_sum;
    } else
        for (int j = 0; j < n; j++) pair[j] = pairs[j], scale[j] = x_scale[j], sum[j] = x_sum[j];
    *(vf_unaligned *)out = (vf)(pair << 16) * scale;
    return (vf)(pair & 0xffff0000u) * sum;
}

/* Weight = scale * nibble + minimum; per group of a row one bf16 scale and one bf16 minimum, side by side: as one
 * 32-bit word, the minimum is its upper half. Returns 1 when memory is short. */
int linear_int4(const void *x, int x_bf16, const uint8_t *w, const uint16_t *scale_min, void *y,
                int64_t T, int64_t N, int64_t K) {
    rounded a = round_x(x, x_bf16, T * K);
    if (!a.q) return 1;
    int64_t groups = K / GROUP;
#pragma omp parallel
    {
        part p = my_part(N);
        for (int64_t i = 0; i < p.step; i++) {
            const uint8_t *row[STREAMS];
            const uint32_t *pairs[STREAMS];
            for (int r = 0; r < STREAMS; r++) {
                row[r] = w + row_of(p, i, r) * (K / 2);
                pairs[r] = (const uint32_t *)scale_min + row_of(p, i, r) * groups;
            }
            for (int64_t t = 0; t < T; t++) {
                vf acc[STREAMS] = {0}, low[STREAMS] = {0};
                for (int64_t g = 0; g < groups; g += 8) { /* scales of 8 groups at a time */
                    int n = groups - g < 8 ? (int)(groups - g) : 8;
                    float scales[STREAMS][8];
                    for (int r = 0; r < STREAMS; r++)
                        low[r] += eight_scales(pairs[r] + g, a.scale + t * groups + g, a.sum + t * groups + g, n,
                                               scales[r]);
                    for (int j = 0; j < n; j++)
                        for (int r = 0; r < STREAMS; r++) {
                            const uint8_t *at = row[r] + (g + j) * (GROUP / 2);
                            __builtin_prefetch(at + AHEAD);
                            acc[r] += to_float(dot_int4(at, a.q + t * K + (g + j) * GROUP)) * scales[r][j];
                        }
                }
                for (int r = 0; r < STREAMS; r++)
                    store(y, x_bf16, t * N + row_of(p, i, r), sum8(acc[r]) + sum8(low[r]));
            }
        }
    }
    free(a.q);
    return 0;
}
