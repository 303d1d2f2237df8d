/* The next token of each row of logits: the likeliest, or one drawn from what temperature and filters leave.
 *
 * The meaning is engine/sampler.py's, whose torch operations this replaces: min-p, then top-k, then top-p, then the token
 * at which the running sum of what is left passes the noise. A row is one thread's work and depends on nothing else.
 */
#include "kernels.h"

#define SPAN 64 /* tokens whose weights are summed before the drawn one is looked for among them */

INLINE vec padded_at(const float *p, int64_t left, float behind) { /* LANES floats, `behind` where there are none */
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
        vec part = padded_at(x + i, n - i, -__builtin_inff());
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

/* x becomes how far it lies below the top: 0 for the likeliest only, infinity for what is forbidden. */
static void to_distances(float *x, int64_t n, float top) {
    for (int64_t i = 0; i < n; i++) x[i] = top - x[i];
}

/* Distances up to `reach` become e^(-distance / temperature), larger ones 0. */
static void to_weights(float *x, int64_t n, float reach, float temperature) {
    for (int64_t i = 0; i < n; i += LANES) {
        vec distance = padded_at(x + i, n - i, 0), power = distance / -temperature;
        store_floats_at(x, choose((distance <= reach) & (power > -87.0f), exponential(power), every(0)), i, n);
    }
}

/* How many of n are less than `bound`: more for a larger one. */
INLINE float count_below(const float *x, int64_t n, float bound) {
    vec total = every(0);
    for (int64_t i = 0; i < n; i += LANES) total += choose(padded_at(x + i, n - i, bound) < bound, every(1), every(0));
    return sum(total);
}

/* The sum of those of n that are `bound` or more: less for a larger one, whatever is rounded. */
INLINE float sum_from(const float *x, int64_t n, float bound) {
    vec total = every(0);
    for (int64_t i = 0; i < n; i += LANES) {
        vec part = padded_at(x + i, n - i, -1);
        total += choose(part >= bound, part, every(0));
    }
    return sum(total);
}

INLINE float number_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The k-th smallest of n, bit by bit: floats from 0 on are ordered as their bits. */
static float find_smallest(const float *x, int64_t n, int64_t k) {
    uint32_t found = 0;
    for (uint32_t bit = 1u << 30; bit; bit >>= 1)
        if (number_of(found | bit) <= __builtin_inff() && count_below(x, n, number_of(found | bit)) < (float)k) found |= bit;
    return number_of(found);
}

/* The largest bound for which the weights from it on sum up to `wanted` or more. */
static float find_bound(const float *weights, int64_t n, float wanted) {
    uint32_t found = 0;
    for (uint32_t bit = 1u << 29; bit; bit >>= 1)
        if (number_of(found | bit) <= 1 && sum_from(weights, n, number_of(found | bit)) >= wanted) found |= bit;
    return number_of(found);
}

static void drop_below(float *weights, int64_t n, float bound) {
    for (int64_t i = 0; i < n; i++) weights[i] = weights[i] >= bound ? weights[i] : 0;
}

/* The token at which the running sum passes `noise` of the whole: first the span it lies in, then the token in the span. */
static int64_t draw(const float *weights, int64_t n, double noise) {
    int64_t spans = (n + SPAN - 1) / SPAN, last = 0;
    float sums[spans];
    double total = 0, before = 0;
    for (int64_t s = 0; s < spans; s++) {
        sums[s] = sum_from(weights + s * SPAN, least(SPAN, n - s * SPAN), 0);
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
    const float *temperature; /* [rows]; 0: the likeliest */
    const float *reach;       /* [rows]: how far below the top min-p looks */
    const float *top_p;       /* [rows] */
    const int64_t *top_k;     /* [rows]; 0: off */
    const double *noise;      /* [rows], from 0 up to 1 */
    int64_t *tokens;          /* [rows]; -1 where there is no finite largest logit */
} choice_args;

static void choose_row(const job *j, int64_t row) {
    const choice_args *a = j->args;
    float *x = a->logits + row * a->vocab, top = find_largest(x, a->vocab), reach = a->reach[row];
    int64_t n = a->vocab, k = a->top_k[row], first = top - top == 0 ? find_first(x, n, top) : -1;
    a->tokens[row] = first;
    if (first < 0 || a->temperature[row] == 0) return;
    to_distances(x, n, top);
    if (k > 0 && k < n) {
        float farthest = find_smallest(x, n, k);
        reach = farthest < reach ? farthest : reach;
    }
    to_weights(x, n, reach, a->temperature[row]);
    if (a->top_p[row] < 1) drop_below(x, n, find_bound(x, n, a->top_p[row] * sum_from(x, n, 0)));
    a->tokens[row] = draw(x, n, a->noise[row]);
}

/* The tokens of all rows. */
void choose_tokens(const choice_args *a, team *team, int threads) {
    if (a->rows > 1) team_call(team);
    for_each(choose_row, a, a->rows, team_parallel, threads);
    if (a->rows > 1) team_dismiss(team);
}
