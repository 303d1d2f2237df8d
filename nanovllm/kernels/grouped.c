/* A linear for few rows whose weights stay as a quantised file has them: small whole numbers in groups of 32.
 *
 *     w[o][i] = code[o][i] * scale[o][i / 32] + offset[o][i / 32]
 *
 * Each weight is restored in registers, exactly; a row of x costs two operations for sixteen weights, restoring them
 * five. What a step must read is a third (4 bits) or two thirds (8 bits) of what bfloat16 takes.
 * A word of 16 bits has `16 / bits` codes: word l of a run of sixteen words has those of the inputs l, l + 16, ...
 */
#include "kernels.h"

#define GROUP 32
#define FEW 4         /* rows at most */
#define MAX_IN 32768  /* inputs at most: x lies on the stack as floats */
#define OUTPUTS 16    /* of one item of work */
#define RUN 16        /* words: as the weights lie, whatever a register holds */

typedef struct {
    const grouped_args *of;
    const float *x;
} grouped_work;

INLINE vec floats_at(const float *p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE uvec words_at(const uint16_t *p) {
    hvec h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, uvec);
}

/* LANES outputs of `rows` rows. `rows` and `bits` are constants wherever this is called. */
INLINE void outputs(const grouped_work *w, int64_t first, const int rows, const int bits) {
    const grouped_args *a = w->of;
    const int per_word = 16 / bits;
    int64_t in = a->in, groups = in / GROUP;
    vec sums[FEW][LANES];
    for (int i = 0; i < LANES; i++) {
        const uint16_t *codes = a->codes + (first + i) * (in / per_word);
        const float *scales = a->scales + (first + i) * groups, *offsets = a->offsets + (first + i) * groups;
        vec sum[FEW];
        for (int r = 0; r < rows; r++) sum[r] = every(0);
        for (int64_t k = 0; k < in / per_word; k += LANES) {
            uvec words = words_at(codes + k);
            for (int j = 0; j < per_word; j++) {
                int64_t at = k / RUN * RUN * per_word + j * RUN + k % RUN;
                uvec code = (words >> (bits * j)) & ((1u << bits) - 1);
                vec weight = __builtin_convertvector((ivec)code, vec) * scales[at / GROUP] + offsets[at / GROUP];
                for (int r = 0; r < rows; r++) sum[r] += weight * floats_at(w->x + r * in + at);
            }
        }
        for (int r = 0; r < rows; r++) sums[r][i] = sum[r];
    }
    for (int r = 0; r < rows; r++) {
        vec y = sums_of(sums[r]);
        store(a->y + r * a->out + first, a->bias ? y + load(a->bias + first) : y);
    }
}

static void outputs_of(const job *j, int64_t item) {
    const grouped_work *w = j->args;
    int rows = (int)w->of->rows, bits = (int)w->of->bits;
#define CASE(R, B) \
    if (rows == R && bits == B) \
        for (int64_t o = 0; o < OUTPUTS; o += LANES) outputs(w, item * OUTPUTS + o, R, B);
    CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 4) CASE(1, 8) CASE(2, 8) CASE(3, 8) CASE(4, 8)
}

/* y = x w^T + bias for 1 to FEW rows; `in` a multiple of 64 and at most MAX_IN, `out` one of OUTPUTS; bits 4 or 8. */
void grouped_linear(const grouped_args *a, parallel_fn parallel, int threads) {
    float x[a->rows * a->in];
    for (int64_t i = 0; i < a->rows * a->in; i += LANES) {
        vec v = load(a->x + i);
        memcpy(x + i, &v, sizeof v);
    }
    grouped_work w = {a, x};
    for_each(outputs_of, &w, a->out / OUTPUTS, parallel, threads);
}
