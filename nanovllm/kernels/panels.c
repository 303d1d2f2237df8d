/* A linear whose weight lies in panels: some outputs side by side, word by word of the inputs, as registers read them.
 *
 * BAND rows of x meet one panel at a time, their sums in registers throughout. Each sum goes over the inputs in order, so
 * that a row's result is the same bits whatever stands beside it and however many threads there are.
 * The scheme is the inner kernel of Goto and van de Geijn (ACM TOMS 34-3, 2008) for inputs that need no blocking.
 */
#include "kernels.h"
#include "words.h"

#if LANES == 16 /* BAND * VECS sums and VECS parts of a panel: within 32 registers, or 16 */
#define BAND 8
#define VECS 3
#else
#define BAND 6
#define VECS 2
#endif
#define WIDE (VECS * LANES)
#define LINES (WIDE * sizeof(word) / 64) /* of memory, in one word of a panel's depth */
#define BLOCK 240 /* rows of one item of work, which meet all panels before the next ones: a cache holds them */

/* y[r][o] of one band and one panel; from `ahead` on memory is asked for, `lines` for each word. `rows` and `lines` are
 * constants wherever this is called. */
INLINE void multiply_band(const panel_args *a, int64_t row, int64_t output, const char *ahead, const int lines,
                          const int rows) {
    int64_t deep = a->in / PER_WORD, left = a->out - output;
    const word *weight = (const word *)a->panels + output * deep, *x = (const word *)(a->x + row * a->in);
    vec sums[BAND][VECS], parts[VECS];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < VECS; i++) sums[r][i] = every(0);
    for (int64_t k = 0; k < deep; k++) {
        for (int i = 0; i < lines; i++) __builtin_prefetch(ahead + (k * lines + i) * 64, 0, 2);
        for (int i = 0; i < VECS; i++) memcpy(&parts[i], weight + k * WIDE + i * LANES, sizeof(vec));
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < VECS; i++) sums[r][i] = multiply_add(sums[r][i], x[r * deep + k], parts[i]);
    }
    for (int i = 0; i < VECS && i * LANES < left; i++) {
        vec bias = a->bias ? load_at(a->bias + output, i * LANES, left) : every(0);
        for (int r = 0; r < rows; r++) {
            int64_t at = (row + r) * a->out + output;
            if (a->is_float) store_floats_at((float *)a->y + at, sums[r][i] + bias, i * LANES, left);
            else store_at((elem *)a->y + at, sums[r][i] + bias, i * LANES, left);
        }
    }
}

/* Few rows are done with a panel sooner than memory brings the next one. So they ask for it meanwhile, each band for its
 * part of the LINES, supposing that threads take panels in turn; asking for one that is not there is
 * harmless. A single band only reads, in order, which the processor's prefetchers follow by themselves. */
static void multiply_panel(const job *j, int64_t item) {
    const panel_args *a = j->args;
    int64_t panels = (a->out + WIDE - 1) / WIDE, first = item / panels * BLOCK, output = item % panels * WIDE;
    int64_t stop = first + BLOCK < a->rows ? first + BLOCK : a->rows, deep = a->in / PER_WORD;
    int64_t bands = (stop - first + BAND - 1) / BAND;
    int64_t left = bands > 1 ? LINES : 0, lines = (left + bands - 1) / bands;
    const char *ahead = (const char *)((const word *)a->panels + (output + j->threads * WIDE) * deep);
    for (int64_t row = first; row < stop; row += BAND, ahead += lines * deep * 64, left -= lines) {
        int64_t rows = stop - row < BAND ? stop - row : BAND;
        lines = lines < left ? lines : left;
#define CASE(R, L) \
    if (R <= BAND && rows == R && lines == L) multiply_band(a, row, output, ahead, L, R);
#define CASES(R) CASE(R, 0) CASE(R, 1) CASE(R, 2)
        CASES(1) CASES(2) CASES(3) CASES(4) CASES(5) CASES(6) CASES(7) CASES(8)
    }
}

/* y = x w^T + bias; `in` a multiple of PER_WORD. */
void panel_linear(const panel_args *a, parallel_fn parallel, int threads) {
    int64_t panels = (a->out + WIDE - 1) / WIDE, blocks = (a->rows + BLOCK - 1) / BLOCK;
    for_each(multiply_panel, a, panels * blocks, parallel, threads);
}

/* Outputs of a panel; 0 where elements are no words in this build. */
int64_t panel_width(void) { return PER_WORD * sizeof(elem) == sizeof(word) ? WIDE : 0; }
