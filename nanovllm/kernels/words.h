/* Words: what one lane multiplies at a time, two bfloat16 where the processor has an instruction for it, or a float. */
#pragma once
#include "vectors.h"

typedef uint32_t __attribute__((may_alias)) word;
#if defined(BFLOAT16) && defined(__AVX512BF16__)
#define PER_WORD 2
INLINE vec multiply_add(vec sum, word a, vec b) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)((uvec){0} + a), (__m512bh)b);
}
#else
#define PER_WORD 1
INLINE vec multiply_add(vec sum, word a, vec b) {
    float x;
    memcpy(&x, &a, sizeof x);
    return sum + x * b;
}
#endif
