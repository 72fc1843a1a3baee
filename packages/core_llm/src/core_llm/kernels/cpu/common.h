/* What the CPU kernels share: vectors of 8, bf16, aligned memory. Needs gcc or clang (vector extensions). */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

enum { GROUP = 64 }; /* inputs that share one scale, in quantised weights and in rounded activations */

typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint32_t vu __attribute__((vector_size(32)));
typedef uint32_t vu_unaligned __attribute__((vector_size(32), aligned(2)));
typedef uint16_t halves __attribute__((vector_size(16), aligned(2)));
typedef int16_t shorts __attribute__((vector_size(16)));
typedef float vf_unaligned __attribute__((vector_size(32), aligned(4)));

static inline float from_bf16(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

/* Round to nearest, ties to even; a NaN stays one. */
static inline uint16_t to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(u >> 16 | 64);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

static inline float load(const void *x, int bf16, int64_t i) {
    return bf16 ? from_bf16(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

static inline void store(void *y, int bf16, int64_t i, float value) {
    if (bf16) ((uint16_t *)y)[i] = to_bf16(value);
    else ((float *)y)[i] = value;
}

static inline float sum8(vf x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

static inline float *aligned_floats(int64_t n) {
    return aligned_alloc(64, (size_t)(n * 4 + 63) / 64 * 64);
}

/* 16 elements as two vectors: of bf16 the even and the odd ones, of fp32 the first and the second half. */
static inline void load16(const void *x, int bf16, int64_t at, vf *a, vf *b) {
    if (bf16) {
        vu u = *(const vu_unaligned *)((const uint16_t *)x + at);
        *a = (vf)(u << 16);
        *b = (vf)(u & 0xffff0000u);
    } else {
        *a = *(const vf_unaligned *)((const float *)x + at);
        *b = *(const vf_unaligned *)((const float *)x + at + 8);
    }
}

/* 8 elements in their order */
static inline vf load8(const void *x, int bf16, int64_t at) {
    if (!bf16) return *(const vf_unaligned *)((const float *)x + at);
    halves h = *(const halves *)((const uint16_t *)x + at);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}

/* e^x for x <= 0 to 2e-7 relative: 2^n by the exponent's bits, 2^f by its Taylor series to the sixth term. */
static inline vf exponential(vf x) {
    vf y = x * 1.44269504f, low = {-126, -126, -126, -126, -126, -126, -126, -126};
    vi below = y < low;
    y = (vf)(((vi)y & ~below) | ((vi)low & below));
    vi n = __builtin_convertvector(y - 0.5f, vi); /* y <= 0: towards zero of y - 1/2 is the nearest integer */
    vf f = (y - __builtin_convertvector(n, vf)) * 0.693147181f;
    vf p = 1 + f * (1 + f * (0.5f + f * (1.0f / 6 + f * (1.0f / 24 + f * (1.0f / 120 + f * (1.0f / 720))))));
    return (vf)((vi)(p * (vf)((n + 127) << 23)) & ~below);
}

/* The inverse of load16. */
static inline void store16(void *y, int bf16, int64_t at, vf a, vf b) {
    if (bf16) {
        vu even = (vu)a, odd = (vu)b;
        even += 0x7fff + (even >> 16 & 1); /* to nearest, ties to even */
        odd += 0x7fff + (odd >> 16 & 1);
        *(vu_unaligned *)((uint16_t *)y + at) = even >> 16 | (odd & 0xffff0000u);
    } else {
        *(vf_unaligned *)((float *)y + at) = a;
        *(vf_unaligned *)((float *)y + at + 8) = b;
    }
}

static inline vf rounded_to_bf16(vf x) {
    vu u = (vu)x;
    return (vf)((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u);
}

#ifdef __AVX2__
/* acc + pairwise sums of products of 16-bit integers */
static inline __m256i multiply_add(__m256i acc, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpwssd_epi32(acc, a, b);
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
#endif
}
#endif
