/* One block of the model over one new token per row, in a single call: the steps are those of core_llm.layers, with
 * bf16 activations rounded where torch's operations would round them. Between the products of a small step's few
 * microseconds, returning to the interpreter costs more than the step: its code has been pushed out of the cache by
 * the weights.
 *
 * Axes: B rows, C model width, F feed-forward width, H query heads, G key/value heads, D head dim, S capacity.
 */
#include "common.h"

enum { BF16, INT8, INT4 };

typedef struct {
    int64_t kind, n, k;
    const void *weight, *scale;
} matrix;

typedef struct {
    int64_t B, C, F, H, G, S, D;
    int64_t k_b, k_g, k_s, v_b, v_g, v_s; /* strides of the cache in elements */
    double eps;
    const void *x, *cosines, *sines, *attention_norm, *ffn_norm;
    void *y, *keys, *values;
    const int64_t *lengths; /* [B]: where the new token is written, and the last key that it sees */
    matrix q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj;
} block;

int linear_bf16(const void *, int, const uint16_t *, void *, int64_t, int64_t, int64_t);
int linear_int8(const void *, int, const int8_t *, const float *, void *, int64_t, int64_t, int64_t);
int linear_int4(const void *, int, const uint8_t *, const uint16_t *, void *, int64_t, int64_t, int64_t);
int attend_decode(const void *, const void *, const void *, void *, const int64_t *, const int64_t *, int64_t, int64_t,
                  int64_t, int64_t, int64_t, int);
void rms_norm(const void *, const void *, void *, int64_t, int64_t, float, int);
void silu_times(const void *, const void *, void *, int64_t, int);
void rotate(const void *, const void *, const void *, void *, int64_t, int64_t, int64_t, int);

static int product(const matrix *m, const uint16_t *x, uint16_t *y, int64_t rows) {
    switch (m->kind) {
    case BF16: return linear_bf16(x, 1, m->weight, y, rows, m->n, m->k);
    case INT8: return linear_int8(x, 1, m->weight, m->scale, y, rows, m->n, m->k);
    default: return linear_int4(x, 1, m->weight, m->scale, y, rows, m->n, m->k);
    }
}

/* y = a + b over n elements */
static void add(const void *a, const void *b, void *y, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        vf p, q, r, s;
        load16(a, 1, i, &p, &q);
        load16(b, 1, i, &r, &s);
        store16(y, 1, i, p + r, q + s);
    }
}

/* Put [B, G, D] behind each row's filled part. A finished row may run past its room: nobody reads what it writes. */
static void append(const block *b, const uint16_t *x, uint16_t *cache, int64_t stride_b, int64_t stride_g,
                   int64_t stride_s) {
    for (int64_t row = 0; row < b->B; row++) {
        int64_t slot = b->lengths[row] < b->S ? b->lengths[row] : b->S - 1;
        for (int64_t g = 0; g < b->G; g++)
            memcpy(cache + row * stride_b + g * stride_g + slot * stride_s, x + (row * b->G + g) * b->D,
                   (size_t)b->D * 2);
    }
}

/* q, k, v and what is made of them live side by side in `space`. */
static int attention_half(const block *b, const uint16_t *normed, uint16_t *space, uint16_t *out) {
    int64_t wide = b->B * b->H * b->D, narrow = b->B * b->G * b->D;
    uint16_t *raw = space, *q = raw + wide, *k = q + wide, *v = k + narrow, *mixed = v + narrow;
    if (product(&b->q_proj, normed, raw, b->B)) return 1;
    rotate(raw, b->cosines, b->sines, q, b->B, b->H, b->D, 1);
    if (product(&b->k_proj, normed, raw, b->B) || product(&b->v_proj, normed, v, b->B)) return 1;
    rotate(raw, b->cosines, b->sines, k, b->B, b->G, b->D, 1);
    append(b, k, b->keys, b->k_b, b->k_g, b->k_s);
    append(b, v, b->values, b->v_b, b->v_g, b->v_s);
    int64_t strides[8] = {b->H * b->D, b->D, b->k_b, b->k_g, b->k_s, b->v_b, b->v_g, b->v_s};
    if (attend_decode(q, b->keys, b->values, mixed, b->lengths, strides, b->B, b->H, b->G, b->S, b->D, 1)) return 1;
    return product(&b->o_proj, mixed, out, b->B);
}

/* Returns 1 when memory is short. */
int decode_block(const block *b) {
    int64_t stream = b->B * b->C, ffn = b->B * b->F;
    int64_t mixing = b->B * (3 * b->H + 2 * b->G) * b->D;
    uint16_t *normed = (uint16_t *)aligned_floats((2 * stream + (mixing > 2 * ffn ? mixing : 2 * ffn)) / 2 + 16);
    if (!normed) return 1;
    uint16_t *out = normed + stream, *space = out + stream;
    rms_norm(b->x, b->attention_norm, normed, b->B, b->C, (float)b->eps, 1);
    int failed = attention_half(b, normed, space, out);
    add(b->x, out, b->y, stream);
    rms_norm(b->y, b->ffn_norm, normed, b->B, b->C, (float)b->eps, 1);
    failed = failed || product(&b->gate_proj, normed, space, b->B) || product(&b->up_proj, normed, space + ffn, b->B);
    silu_times(space, space + ffn, space, ffn, 1);
    failed = failed || product(&b->down_proj, space, out, b->B);
    add(b->y, out, b->y, stream);
    free(normed);
    return failed;
}
