/* A linear for few rows whose weights stay as a quantised file has them: small whole numbers in groups of 32.
 *
 *     w[o][i] = code[o][i] * scale[o][i / 32] + offset[o][i / 32]
 *
 * What a step must read is a third (4 bits) or two thirds (8 bits) of what bfloat16 takes; nothing is rounded to it.
 * 32 bytes are a run: the codes of 32 inputs, or with 4 bits of 64, input 32 + i in the upper half of byte i.
 */
#include "kernels.h"

#define GROUP 32
#define MAX_IN 32768 /* inputs at most: what is prepared of x lies on the stack */
#define OUTPUTS 16   /* a number of outputs is a multiple of it */
#define PIECES 2     /* items of work for each thread: long ones, which memory reads twice as fast as many short ones */
#define RUN 32       /* bytes: as the weights lie, whatever a register holds */

typedef struct {
    const grouped_args *of;
    const float *x, *x_sums; /* as `prepare` leaves them */
    int64_t outputs;         /* of one item */
} grouped_work;

INLINE vec floats_at(const float *p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
}

#if defined(BFLOAT16) && defined(__AVX512BF16__)

/* Codes below 256 and halves of them are exact in bfloat16, which the processor multiplies in pairs: the dots of codes
 * and x, group by group, times the scales; and the offsets times the sums of x's groups. */
static const uint16_t LOW[32] = {0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
                                 0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
                                 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
#define TIMES_16 0x0200 /* four more in the exponent */

static int64_t num_sums(int64_t in) { return (in / GROUP + LANES - 1) / LANES * LANES; }

static void prepare(const grouped_args *a, float *x, float *x_sums) {
    (void)x;
    int64_t width = num_sums(a->in);
    memset(x_sums, 0, a->rows * width * sizeof(float));
    for (int64_t r = 0; r < a->rows; r++)
        for (int64_t g = 0; g < a->in / GROUP; g++) {
            const elem *at = a->x + r * a->in + g * GROUP;
            x_sums[r * width + g] = sum(load(at) + load(at + LANES));
        }
}

INLINE __m512bh codes_as_numbers(__m512i bytes) { /* the lower half of each; the table's copy ignores bit 4 */
    return (__m512bh)_mm512_permutexvar_epi16(bytes, _mm512_loadu_si512(LOW));
}

INLINE __m512bh upper_halves(__m512i bytes) { return codes_as_numbers(_mm512_srli_epi16(bytes, 4)); }

INLINE __m512bh upper_times_16(__m512i bytes) {
    __m512i numbers = (__m512i)upper_halves(bytes);
    __mmask32 some = _mm512_test_epi16_mask(numbers, numbers);
    return (__m512bh)_mm512_mask_add_epi16(numbers, some, numbers, _mm512_set1_epi16(TIMES_16));
}

/* What one output sums up for each row, in sixteen parts. */
INLINE void products(const grouped_work *w, int64_t output, vec *total, const int rows, const int bits) {
    const grouped_args *a = w->of;
    int64_t in = a->in, groups = in / GROUP, width = num_sums(in);
    const uint8_t *codes = a->codes + output * in * bits / 8;
    const float *scales = a->scales + output * groups, *offsets = a->offsets + output * groups;
    for (int r = 0; r < rows; r++) total[r] = every(0);
    for (int64_t g = 0; g < groups; g += LANES) {
        __mmask16 there = groups - g >= LANES ? 0xffff : (1u << (groups - g)) - 1;
        vec some = (vec)_mm512_maskz_loadu_ps(there, offsets + g);
        for (int r = 0; r < rows; r++) total[r] += some * floats_at(w->x_sums + r * width + g);
    }
    for (int64_t k = 0; k < in; k += RUN * 8 / bits, codes += RUN) {
        __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
        __m512bh low = codes_as_numbers(bytes), high = bits == 4 ? upper_halves(bytes) : upper_times_16(bytes);
        for (int r = 0; r < rows; r++) {
            const elem *x = a->x + r * in + k;
            __m512bh first = (__m512bh)_mm512_loadu_si512(x);
            __m512 dots = _mm512_dpbf16_ps(_mm512_setzero_ps(), low, first);
            if (bits == 8) dots = _mm512_dpbf16_ps(dots, high, first);
            total[r] += (vec)dots * scales[k / GROUP];
            if (bits == 4) {
                dots = _mm512_dpbf16_ps(_mm512_setzero_ps(), high, (__m512bh)_mm512_loadu_si512(x + GROUP));
                total[r] += (vec)dots * scales[k / GROUP + 1];
            }
        }
    }
}
#else

/* Each weight is restored in registers. Words of two bytes are widened to a vector, part after part of their bits; x is
 * put into the order in which the codes come then. */
#define WORDS (RUN / 2)

static int64_t num_sums(int64_t in) {
    (void)in;
    return 0;
}

static void prepare(const grouped_args *a, float *x, float *x_sums) {
    (void)x_sums;
    int64_t parts = 16 / a->bits;
    for (int64_t i = 0; i < a->rows * a->in; i++) {
        int64_t word = i % WORDS, part = i / WORDS % parts, run = i / (WORDS * parts) * (WORDS * parts);
        int64_t input = a->bits == 4 ? part % 2 * GROUP + 2 * word + part / 2 : 2 * word + part;
        elem whole[LANES] = {a->x[run + input]};
        x[i] = load(whole)[0];
    }
}

INLINE uvec codes_at(const uint8_t *p) {
    hvec h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, uvec);
}

INLINE void products(const grouped_work *w, int64_t output, vec *total, const int rows, const int bits) {
    const grouped_args *a = w->of;
    const int parts = 16 / bits;
    int64_t in = a->in, groups = in / GROUP;
    const uint8_t *codes = a->codes + output * in * bits / 8;
    const float *scales = a->scales + output * groups, *offsets = a->offsets + output * groups;
    for (int r = 0; r < rows; r++) total[r] = every(0);
    for (int64_t k = 0; k < in; k += WORDS * parts, codes += RUN)
        for (int lane = 0; lane < WORDS; lane += LANES) {
            uvec words = codes_at(codes + 2 * lane);
            for (int j = 0; j < parts; j++) {
                uvec code = (words >> (bits * j)) & ((1u << bits) - 1);
                int64_t group = k / GROUP + (bits == 4 ? j % 2 : 0);
                vec weight = __builtin_convertvector((ivec)code, vec) * scales[group] + offsets[group];
                for (int r = 0; r < rows; r++) total[r] += weight * floats_at(w->x + r * in + k + j * WORDS + lane);
            }
        }
}
#endif

/* LANES outputs of `rows` rows. `rows` and `bits` are constants wherever this is called. */
INLINE void outputs(const grouped_work *w, int64_t first, const int rows, const int bits) {
    const grouped_args *a = w->of;
    vec parts[FEW][LANES];
    for (int i = 0; i < LANES; i++) {
        vec total[FEW];
        products(w, first + i, total, rows, bits);
        for (int r = 0; r < rows; r++) parts[r][i] = total[r];
    }
    for (int r = 0; r < rows; r++) {
        vec y = sums_of(parts[r]);
        if (a->bias) y += load(a->bias + first);
        int64_t at = r * a->out + first;
        if (a->is_float) memcpy((float *)a->y + at, &y, sizeof y);
        else store((elem *)a->y + at, y);
    }
}

static void outputs_of(const job *j, int64_t item) {
    const grouped_work *w = j->args;
    int rows = (int)w->of->rows, bits = (int)w->of->bits;
    int64_t stop = (item + 1) * w->outputs < w->of->out ? (item + 1) * w->outputs : w->of->out;
#define CASE(R, B) \
    if (rows == R && bits == B) \
        for (int64_t o = item * w->outputs; o < stop; o += LANES) outputs(w, o, R, B);
    CASE(1, 4) CASE(2, 4) CASE(1, 8) CASE(2, 8)
}

/* y = x w^T + bias for 1 to FEW rows; `in` a multiple of 64 and at most MAX_IN, `out` one of OUTPUTS; bits 4 or 8. */
void grouped_linear(const grouped_args *a, parallel_fn parallel, int threads) {
    float x[a->rows * a->in], x_sums[a->rows * num_sums(a->in) + 1];
    prepare(a, x, x_sums);
    int64_t share = (a->out / OUTPUTS + PIECES * threads - 1) / (PIECES * threads) * OUTPUTS;
    grouped_work w = {a, x, x_sums, share};
    for_each(outputs_of, &w, (a->out + share - 1) / share, parallel, threads);
}
