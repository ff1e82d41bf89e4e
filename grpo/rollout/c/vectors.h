/* Vectors of float32, and the functions of them that decode.c and sample.c need. */

#ifndef GRPO_VECTORS_H
#define GRPO_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* The number of floats in a vector. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float half_vector __attribute__((vector_size(2 * LANES)));
typedef float four __attribute__((vector_size(16)));
typedef float unaligned_four __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t narrow_bits __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (four_bits){__VA_ARGS__})
typedef int32_t four_bits __attribute__((vector_size(16)));
#endif

/* The sum of the vector's quarters, halves or x itself, which has four floats. */
INLINE four fold(vector x) {
#if LANES == 16
    union { vector whole; half_vector halves[2]; } a = {x};
    union { half_vector whole; four halves[2]; } b = {a.halves[0] + a.halves[1]};
    return b.halves[0] + b.halves[1];
#elif LANES == 8
    union { vector whole; four halves[2]; } a = {x};
    return a.halves[0] + a.halves[1];
#else
    return x;
#endif
}

INLINE float sum(vector x) {
    four a = fold(x);
    return (a[0] + a[2]) + (a[1] + a[3]);
}

/* The sums of four vectors, in the same order as `sum`. */
INLINE four sum_four(const vector *x) {
    four a = fold(x[0]), b = fold(x[1]), c = fold(x[2]), d = fold(x[3]);
    four ab = SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7);
    four cd = SHUFFLE(c, d, 0, 1, 4, 5) + SHUFFLE(c, d, 2, 3, 6, 7);
    return SHUFFLE(ab, cd, 0, 2, 4, 6) + SHUFFLE(ab, cd, 1, 3, 5, 7);
}

INLINE vector choose(bits condition, vector yes, vector no) {
    return (vector)((condition & (bits)yes) | (~condition & (bits)no));
}

/* The largest of some numbers; NaN is ignored. */
static float largest(const float *x, int64_t count) {
    float found = -INFINITY;
    int64_t k = 0;
    vector most = {0};
    most -= INFINITY;
    for (; k + LANES <= count; k += LANES) {
        vector next = *(const vector *)(x + k);
        most = choose((bits)(next > most), next, most);
    }
    for (int lane = 0; lane < LANES; lane++) found = most[lane] > found ? most[lane] : found;
    for (; k < count; k++) found = x[k] > found ? x[k] : found;
    return found;
}

/* The sum of some numbers. */
static float total(const float *x, int64_t count) {
    vector sums = {0};
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) sums += *(const vector *)(x + k);
    float found = sum(sums);
    for (; k < count; k++) found += x[k];
    return found;
}

/* e^x up to rounding; at least e^-87 and at most e^88. NaN stays NaN. Not for single numbers, since the compiler would
   compute what follows for the limits as well, and with numbers as small as these that takes very long. */
INLINE vector exponential(vector x) {
    vector least = {0}, most = {0};
    least -= 87.0f;
    most += 88.0f;
    x = choose((bits)(x < least), least, x);
    x = choose((bits)(x > most), most, x);
    vector n = (x * 1.44269504f + 0x1.8p23f) - 0x1.8p23f; /* rounded to an integer; x = n log 2 + r */
    vector r = x - n * 0.693145752f - n * 1.42860677e-6f;
    vector p = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    bits two_to_n = (bits)(__builtin_convertvector(n, integers) + 127) << 23;
    return p * (vector)two_to_n;
}

/* log x up to rounding, for positive normal x; not for infinity and NaN. */
INLINE float logarithm(float x) {
    int32_t whole, exponent;
    memcpy(&whole, &x, 4);
    exponent = (whole - 0x3F3504F3) >> 23; /* x = 2^exponent m, sqrt(1/2) < m < sqrt(2) */
    whole -= exponent << 23;
    float m;
    memcpy(&m, &whole, 4);
    float s = (m - 1.0f) / (m + 1.0f); /* log m = 2 (s + s^3 / 3 + s^5 / 5 + ...) */
    float square = s * s;
    float p = 1.0f / 9.0f;
    p = p * square + 1.0f / 7.0f;
    p = p * square + 1.0f / 5.0f;
    p = p * square + 1.0f / 3.0f;
    p = p * square;
    return exponent * 0.693145752f + (2.0f * s + (2.0f * s * p + exponent * 1.42860677e-6f));
}

#endif
