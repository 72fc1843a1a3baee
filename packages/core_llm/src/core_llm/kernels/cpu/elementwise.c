/* The small steps between the large products, each in one call: as single torch operations they cost more in
 * calling than in computing when there is one row. Values are rounded where torch's operations would round.
 *
 * Axes: T rows, C model width, H heads, D head dim. C, n and D / 2 are multiples of 16.
 */
#include "common.h"

/* y = x / sqrt(mean(x^2) + eps), rounded to x's type, times the weight (arXiv 1910.07467). */
void rms_norm(const void *x, const void *weight, void *y, int64_t T, int64_t C, float eps, int bf16) {
    for (int64_t at = 0; at < T * C; at += C) {
        vf total = {0}, a, b, c, d;
        for (int64_t i = 0; i < C; i += 16) {
            load16(x, bf16, at + i, &a, &b);
            total += a * a + b * b;
        }
        float inverse = 1 / sqrtf(sum8(total) / (float)C + eps);
        for (int64_t i = 0; i < C; i += 16) {
            load16(x, bf16, at + i, &a, &b);
            load16(weight, bf16, i, &c, &d);
            a *= inverse, b *= inverse;
            if (bf16) a = rounded_to_bf16(a), b = rounded_to_bf16(b);
            store16(y, bf16, at + i, a * c, b * d);
        }
    }
}

/* x / (1 + e^-x), from e^-|x|, which cannot overflow */
static inline vf silu(vf x) {
    vi negative = x < 0;
    vf e = exponential((vf)((vu)x | 0x80000000u));
    vf top = (vf)(((vi)(x * e) & negative) | ((vi)x & ~negative));
    return top / (1 + e);
}

/* y = silu(gate) * up over n elements */
void silu_times(const void *gate, const void *up, void *y, int64_t n, int bf16) {
    for (int64_t i = 0; i < n; i += 16) {
        vf a, b, c, d;
        load16(gate, bf16, i, &a, &b);
        load16(up, bf16, i, &c, &d);
        a = silu(a), b = silu(b);
        if (bf16) a = rounded_to_bf16(a), b = rounded_to_bf16(b);
        store16(y, bf16, i, a * c, b * d);
    }
}

/* y = x [T, H, D] turned by the angles of its row; half-split rotary layout. The second half of cosines and sines
 * [T, D] repeats the first. */
void rotate(const void *x, const void *cosines, const void *sines, void *y, int64_t T, int64_t H, int64_t D,
            int bf16) {
    for (int64_t row = 0; row < T * H; row++)
        for (int64_t d = 0; d < D / 2; d += 16) {
            int64_t low = row * D + d, high = low + D / 2, angle = row / H * D + d;
            vf a, b, c, e, cos_a, cos_b, sin_a, sin_b;
            load16(x, bf16, low, &a, &b);
            load16(x, bf16, high, &c, &e);
            load16(cosines, bf16, angle, &cos_a, &cos_b);
            load16(sines, bf16, angle, &sin_a, &sin_b);
            store16(y, bf16, low, a * cos_a - c * sin_a, b * cos_b - e * sin_b);
            store16(y, bf16, high, c * cos_a + a * sin_a, e * cos_b + b * sin_b);
        }
}
