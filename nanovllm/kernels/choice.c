/* The next token of each row of logits: the likeliest, or one drawn from what temperature and filters leave.
 *
 * The meaning is engine/sampler.py's, whose torch operations this replaces: min-p, then top-k, then top-p, then the token
 * at which the running sum of what is left passes the noise. A row is one thread's work and depends on nothing else.
 */
#include "kernels.h"

#define SPAN 64 /* tokens whose weights are summed before the drawn one is looked for among them */

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE vec floats_at(const float *p, int64_t left, float behind) { /* LANES floats, `behind` where there are none */
    vec x = every(behind);
    if (left >= LANES) memcpy(&x, p, sizeof x);
    else memcpy(&x, p, left * sizeof(float));
    return x;
}

/* The largest of n; no number where one of them is none. */
static float find_largest(const float *x, int64_t n) {
    vec most = every(-__builtin_inff());
    ivec is_bad = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        vec part = floats_at(x + i, n - i, -__builtin_inff());
        most = larger(part, most);
        is_bad |= part != part;
    }
    for (int i = 0; i < LANES; i++)
        if (is_bad[i]) return __builtin_nanf("");
    return largest(most);
}

static int64_t find_first(const float *x, int64_t n, float wanted) {
    for (int64_t i = 0; i < n; i++)
        if (x[i] == wanted) return i;
    return -1;
}

/* x becomes e^((x - top) / temperature): 1 for the likeliest, 0 for what is `least_weight` times less likely or forbidden. */
static void to_weights(float *x, int64_t n, float top, float temperature, float least_weight) {
    for (int64_t i = 0; i < n; i += LANES) {
        vec part = (floats_at(x + i, n - i, -__builtin_inff()) - top) / temperature, weight = exponential(part);
        weight = choose((part > -87.0f) & (weight >= least_weight), weight, every(0));
        store_floats_at(x, weight, i, n);
    }
}

/* How many weights are `floor` or more, or their sum: both fall as it rises, whatever is rounded. */
INLINE float above(const float *weights, int64_t n, float floor, const int is_count) {
    vec total = every(0);
    for (int64_t i = 0; i < n; i += LANES) {
        vec part = floats_at(weights + i, n - i, -1);
        total += choose(part >= floor, is_count ? every(1) : part, every(0));
    }
    return sum(total);
}

/* The largest floor that leaves `wanted` or more: bit by bit, since floats from 0 to 1 are ordered as their bits. */
INLINE float find_floor(const float *weights, int64_t n, float wanted, const int is_count) {
    uint32_t found = 0;
    for (uint32_t bit = 1u << 29; bit; bit >>= 1) {
        uint32_t tried = found | bit;
        float floor;
        memcpy(&floor, &tried, sizeof floor);
        if (floor <= 1 && above(weights, n, floor, is_count) >= wanted) found = tried;
    }
    float floor;
    memcpy(&floor, &found, sizeof floor);
    return floor;
}

static void drop_below(float *weights, int64_t n, float floor) {
    for (int64_t i = 0; i < n; i++) weights[i] = weights[i] >= floor ? weights[i] : 0;
}

/* The token at which the running sum passes `noise` of the whole: first the span it lies in, then the token in the span. */
static int64_t draw(const float *weights, int64_t n, double noise) {
    int64_t spans = (n + SPAN - 1) / SPAN, last = 0;
    float sums[spans];
    double total = 0, before = 0;
    for (int64_t s = 0; s < spans; s++) {
        sums[s] = above(weights + s * SPAN, least(SPAN, n - s * SPAN), 0, 0);
        total += sums[s];
    }
    int64_t s = 0;
    for (double target = noise * total; s < spans - 1 && before + sums[s] <= target; s++) before += sums[s];
    while (s > 0 && sums[s] == 0) before -= sums[--s]; /* behind the last weight, where rounding led */
    for (int64_t i = s * SPAN; i < least((s + 1) * SPAN, n); i++) {
        if (weights[i] == 0) continue;
        last = i;
        if ((before += weights[i]) > noise * total) break;
    }
    return last;
}

typedef struct {
    float *logits; /* [rows, vocab], used up */
    int64_t rows, vocab;
    const float *temperature, *min_p, *top_p; /* [rows]; temperature 0: the likeliest */
    const int64_t *top_k;                     /* [rows]; 0: off */
    const double *noise;                      /* [rows], from 0 up to 1 */
    int64_t *tokens;                          /* [rows]; -1 where there is no finite largest logit */
} choice_args;

static void choose_row(const job *j, int64_t row) {
    const choice_args *a = j->args;
    float *x = a->logits + row * a->vocab, top = find_largest(x, a->vocab), floor = 0;
    int64_t n = a->vocab, first = top - top == 0 ? find_first(x, n, top) : -1;
    a->tokens[row] = first;
    if (first < 0 || a->temperature[row] == 0) return;
    to_weights(x, n, top, a->temperature[row], a->min_p[row]);
    if (a->top_k[row] > 0 && a->top_k[row] < n) floor = find_floor(x, n, (float)a->top_k[row], 1);
    if (floor > 0) drop_below(x, n, floor);
    if (a->top_p[row] < 1) drop_below(x, n, find_floor(x, n, a->top_p[row] * above(x, n, 0, 0), 0));
    a->tokens[row] = draw(x, n, a->noise[row]);
}

/* The tokens of all rows. */
void choose_tokens(const choice_args *a, team *team, int threads) {
    team_call(team);
    for_each(choose_row, a, a->rows, team_parallel, threads);
    team_dismiss(team);
}
