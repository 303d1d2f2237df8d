/* Words: what one lane multiplies at a time, two bfloat16 where the processor has an instruction for it, or a float. */
#pragma once
#include "vectors.h"

typedef uint32_t __attribute__((may_alias)) word;
#if defined(BFLOAT16) && defined(__AVX512BF16__)
#define PER_WORD 2
INLINE vec multiply_add_each(vec sum, uvec a, uvec b) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

INLINE vec multiply_add(vec sum, word a, vec b) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)((uvec){0} + a), (__m512bh)b);
}
#else
#define PER_WORD 1
INLINE vec multiply_add_each(vec sum, uvec a, uvec b) { return sum + (vec)a * (vec)b; }

INLINE vec multiply_add(vec sum, word a, vec b) {
    float x;
    memcpy(&x, &a, sizeof x);
    return sum + x * b;
}
#endif

/* The words of up to LANES * PER_WORD elements of `from`, of which `left` are there; zeros behind them. */
INLINE uvec words_at(const elem *from, int64_t left) {
#if PER_WORD == 2
    uvec x = {0};
    memcpy(&x, from, left >= 2 * LANES ? sizeof x : left * sizeof(elem));
    return x;
#else
    (void)left;
    return (uvec)load(from);
#endif
}
