/* What the hand-written kernels are made of: numbers many at a time, in registers and in memory; threads.
 *
 * Built once per element type: -DBFLOAT16 reads and writes bfloat16, else float. All arithmetic is float32.
 * Instruction sets are named where it pays only: `vec` is a register of floats, and the compiler does the rest.
 */
#pragma once
#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8 /* compilers make little of a vector that the processor has no register for */
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* -- numbers ----------------------------------------------------------------------------------------------- */

#ifdef BFLOAT16 /* the upper half of a float */
typedef uint16_t elem;

INLINE vec load(const elem *p) {
    hvec h;
    memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
}

INLINE void store(elem *p, vec x) { /* to the nearest, ties to even; what is no number stays none */
#if defined(__AVX512BF16__)
    __m256bh h = _mm512_cvtneps_pbh((__m512)x); /* below 2^-126: zero */
#else
    uvec bits = (uvec)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uvec nan = (uvec)(x != x);
    hvec h = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), hvec);
#endif
    memcpy(p, &h, sizeof h);
}
#else
typedef float elem;

INLINE vec load(const elem *p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE void store(elem *p, vec x) { memcpy(p, &x, sizeof x); }
#endif

INLINE void copy(const elem *from, elem *to, int64_t count) { /* a multiple of LANES */
    for (int64_t i = 0; i < count; i += LANES) memcpy(to + i, from + i, LANES * sizeof(elem));
}

INLINE vec load_part(const elem *p, int64_t n) { /* n < LANES elements, zeros behind */
    elem full[LANES] = {0};
    memcpy(full, p, n * sizeof(elem));
    return load(full);
}

INLINE void store_part(elem *p, vec x, int64_t n) {
    elem full[LANES];
    store(full, x);
    memcpy(p, full, n * sizeof(elem));
}

INLINE vec load_at(const elem *p, int64_t i, int64_t n) {
    return n - i >= LANES ? load(p + i) : load_part(p + i, n - i);
}

INLINE void store_at(elem *p, vec x, int64_t i, int64_t n) {
    if (n - i >= LANES) store(p + i, x);
    else store_part(p + i, x, n - i);
}

INLINE void store_floats_at(float *p, vec x, int64_t i, int64_t n) {
    memcpy(p + i, &x, (n - i >= LANES ? LANES : n - i) * sizeof(float));
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE vec every(float x) { return x - (vec){0}; }

INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

INLINE float sum(vec x) { /* halves onto halves */
    float a[LANES];
    memcpy(a, &x, sizeof a);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) a[i] += a[i + width];
    return a[0];
}

/* Lane i of the result is the sum of x[i]: the same order of sums as `sum`, for LANES at once. x is used up. */
INLINE vec sums_of(vec x[LANES]) {
#if LANES == 16
    for (int i = 0; i < 8; i++)
        x[i] = SHUFFLE(x[i], x[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               SHUFFLE(x[i], x[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        x[i] = SHUFFLE(x[i], x[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               SHUFFLE(x[i], x[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        x[i] = SHUFFLE(x[i], x[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               SHUFFLE(x[i], x[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return SHUFFLE(x[0], x[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           SHUFFLE(x[0], x[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#else
    for (int i = 0; i < 4; i++)
        x[i] = SHUFFLE(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    for (int i = 0; i < 2; i++)
        x[i] = SHUFFLE(x[i], x[i + 2], 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(x[i], x[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLE(x[0], x[1], 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(x[0], x[1], 1, 9, 3, 11, 5, 13, 7, 15);
#endif
}

#ifdef __AVX512F__
#define PICK(NAME, SIGN, X, Y) (vec)_mm512_##NAME##_ps((__m512)(X), (__m512)(Y))
#elif defined(__AVX__)
#define PICK(NAME, SIGN, X, Y) (vec)_mm256_##NAME##_ps((__m256)(X), (__m256)(Y))
#else
#define PICK(NAME, SIGN, X, Y) choose((X) SIGN (Y), X, Y)
#endif
INLINE vec larger(vec x, vec y) { return PICK(max, >, x, y); } /* y where one is no number */
INLINE vec smaller(vec x, vec y) { return PICK(min, <, x, y); }

INLINE float largest(vec x) { /* halves against halves */
#if LANES == 16
    x = larger(x, SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15));
    x = larger(x, SHUFFLE(x, x, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7));
    x = larger(x, SHUFFLE(x, x, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3));
#else
    x = larger(x, SHUFFLE(x, x, 4, 5, 6, 7, 4, 5, 6, 7));
    x = larger(x, SHUFFLE(x, x, 2, 3, 2, 3, 2, 3, 2, 3));
#endif
    return x[0] > x[1] ? x[0] : x[1];
}

/* e^x between e^-87 and e^88: 2^n * e^r with |r| <= ln 2 / 2, a polynomial for e^r (Cephes expf, 2e-7 relative).
 * Adding 1.5 * 2^23 rounds to n and leaves it in the lowest bits. What is no number stays none. */
INLINE vec exponential(vec x) {
    x = smaller(every(88.0f), larger(every(-87.0f), x));
    vec shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f, p = every(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)(((uvec)shifted << 23) + 0x3f800000);
}

/* -- threads ----------------------------------------------------------------------------------------------- */

/* GOMP_parallel of the OpenMP library that torch already runs: one pool of threads for both. NULL: one thread. */
typedef void (*parallel_fn)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
typedef struct job {
    void (*work)(const struct job *, int64_t item);
    int64_t next, items;
    const void *args;
    int threads;
} job;

static void take_items(void *data) { /* each thread takes the next item until none is left */
    job *j = data;
    for (int64_t i; (i = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < j->items;) j->work(j, i);
}

static void for_each(void (*work)(const job *, int64_t), const void *args, int64_t items, parallel_fn parallel,
                     int threads) {
    job j = {work, 0, items, args, parallel ? threads : 1};
    if (parallel && threads > 1 && items > 1) parallel(take_items, &j, threads, 0);
    else take_items(&j);
}
