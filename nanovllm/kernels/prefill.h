/* Attention of many queries of one sequence: tiles of queries against tiles of keys, the softmax on the way
 * (FlashAttention, arXiv 2205.14135; the running maximum and sum of arXiv 1805.02867).
 *
 * One item of work is one KV head and a tile of tokens, with all query heads that share it: their keys and values are
 * copied out of their blocks once, TILE positions at a time, into words in the order in which `product` reads them.
 * Tiles of keys lie at fixed positions and a row counts what it sees only: its sums depend on nothing else, not on how
 * the prompt was cut into chunks, not on other rows.
 */
#include "words.h"

#define TILE 64      /* keys at a time */
#define BAND 6       /* rows that go through a product together, so that its sums stay in registers */
#define MAX_ROWS 192 /* of a tile: tokens times query heads that share a KV head */
#define LOWEST -1e30f

#define SIDE (LANES == 16 ? 4 : 2) /* vectors beside each other in a product: its sums fill 32 registers, or 16 */
#define ACROSS (SIDE * LANES)

/* to[r] = to[r] * factors[r] + the sum over k of a[r][k] * b[k], for ACROSS columns; nothing was in `to` without factors.
 * Rows of a lie `stride` words apart, rows of b and of `to` `across` words. */
INLINE void product(float *to, int64_t to_across, const float *factors, const word *a, int64_t stride, const word *b,
                    int64_t across, int64_t steps) {
    vec sums[BAND][SIDE], parts[SIDE];
    for (int r = 0; r < BAND; r++)
        for (int i = 0; i < SIDE; i++) {
            sums[r][i] = every(0);
            if (factors) memcpy(&sums[r][i], to + r * to_across + i * LANES, sizeof(vec)), sums[r][i] *= factors[r];
        }
    for (int64_t k = 0; k < steps; k++) {
        for (int i = 0; i < SIDE; i++) memcpy(&parts[i], b + k * across + i * LANES, sizeof(vec));
        for (int r = 0; r < BAND; r++)
            for (int i = 0; i < SIDE; i++) sums[r][i] = multiply_add(sums[r][i], a[r * stride + k], parts[i]);
    }
    for (int r = 0; r < BAND; r++)
        for (int i = 0; i < SIDE; i++) memcpy(to + r * to_across + i * LANES, &sums[r][i], sizeof(vec));
}

typedef struct { /* one item of work; `deep` words of a query or key, `wide` numbers of a value and its padding */
    vec weight[MAX_ROWS]; /* lane by lane; here, so that what is behind it is aligned too */
    word queries[MAX_ROWS * MAX_D], keys[MAX_D * TILE], values[TILE * (MAX_D + ACROSS)];
    float out[MAX_ROWS * (MAX_D + ACROSS)], top[MAX_ROWS];
    const step_args *step;
    int64_t heads, deep, wide, rows, position;
} tile;

static void to_words(const elem *from, word *to, int64_t count) { /* count elements, side by side */
#if PER_WORD == 2
    memcpy(to, from, count * sizeof(elem));
#else
    for (int64_t i = 0; i < count; i += LANES) {
        vec x = load(from + i);
        memcpy(to + i, &x, sizeof x);
    }
#endif
}

/* Keys as [word of a key][position], values as [PER_WORD positions][dimension]; zeros behind the last of `count`. */
static void copy_tile(tile *t, const elem **keys, int64_t count) {
    int64_t dim = t->step->dim, side = t->step->kv_heads * t->step->block_size * dim;
    for (int64_t i = 0; i < TILE; i++) {
        word key[MAX_D];
        if (i < count) to_words(keys[i], key, dim);
        else memset(key, 0, t->deep * sizeof(word));
        for (int64_t k = 0; k < t->deep; k++) t->keys[k * TILE + i] = key[k];
    }
    for (int64_t i = 0; i < TILE; i += PER_WORD)
        for (int64_t d = 0; d < dim; d += LANES) {
            uvec x = {0};
#if PER_WORD == 2
            hvec even = {0}, odd = {0};
            if (i < count) memcpy(&even, keys[i] + side + d, sizeof even);
            if (i + 1 < count) memcpy(&odd, keys[i + 1] + side + d, sizeof odd);
            x = __builtin_convertvector(even, uvec) | __builtin_convertvector(odd, uvec) << 16;
#else
            if (i < count) x = (uvec)load(keys[i] + side + d);
#endif
            memcpy(t->values + i / PER_WORD * t->wide + d, &x, sizeof x);
        }
}

/* 2^x for x <= 0, and 0 below 2^-126: a polynomial (Cephes exp2f, 2e-7 relative). What is no number stays none. */
INLINE vec power_of_two(vec x) {
    x = larger(every(-127.0f), x);
    vec shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f), p = every(1.535336188e-4f);
    p = p * r + 1.339887440e-3f;
    p = p * r + 9.618437357e-3f;
    p = p * r + 5.550332471e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472028e-1f;
    p = p * r + 1.0f;
    return p * (vec)(((uvec)shifted << 23) + 0x3f800000);
}

/* Largest score so far of one row, which sees the tile's keys from `from` up to `to`; what it does not see is hidden. */
INLINE float find_top(float *scores, float top, int64_t from, int64_t to) {
    static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    ivec lanes;
    memcpy(&lanes, numbers, sizeof lanes);
    vec x, most = every(top);
    for (int i = 0; i < TILE; i += LANES) {
        memcpy(&x, scores + i, sizeof x);
        if (from > 0 || to < TILE) {
            x = choose((lanes + i >= (int32_t)from) & (lanes + i < (int32_t)to), x, every(2 * LOWEST));
            memcpy(scores + i, &x, sizeof x);
        }
        most = larger(x, most);
    }
    return largest(most);
}

/* Scores of one row to weights in words; returns their sum, lane by lane. */
INLINE vec weigh(const float *scores, float top, float scale, word *weights) {
    vec x, total = {0};
    for (int i = 0; i < TILE; i += LANES) {
        memcpy(&x, scores + i, sizeof x);
        x = power_of_two(x * scale - top * scale);
        total += x;
#if PER_WORD == 2
        __m256bh half = _mm512_cvtneps_pbh((__m512)x);
        memcpy(weights + i / PER_WORD, &half, sizeof half);
#else
        memcpy(weights + i, &x, sizeof x);
#endif
    }
    return total;
}

/* BAND rows against one tile of keys, whose first position is `first`. */
INLINE void attend_band(tile *t, int64_t band, int64_t first) {
    float scores[BAND][TILE], factors[LANES] = {0}, scale = t->step->scale * 1.44269504f; /* e^x = 2^(x / ln 2) */
    word weights[BAND][TILE / PER_WORD];
    int64_t row = band * BAND, window = t->step->window, to = 0;
    for (int64_t c = 0; c < TILE; c += ACROSS)
        product(scores[0] + c, TILE, 0, t->queries + row * t->deep, t->deep, t->keys + c, TILE, t->deep);
    for (int r = 0; r < BAND; r++) {
        to = t->position + (row + r) / t->heads + 1 - first;
        float top = find_top(scores[r], t->top[row + r], window ? to - window : 0, to);
        factors[r] = t->top[row + r] - top;
        t->top[row + r] = top;
    }
    vec x;
    memcpy(&x, factors, sizeof x);
    x = power_of_two(x * scale);
    memcpy(factors, &x, sizeof x);
    for (int r = 0; r < BAND; r++) {
        vec total = weigh(scores[r], t->top[row + r], scale, weights[r]);
        t->weight[row + r] = t->weight[row + r] * factors[r] + total;
    }
    int64_t steps = (least(to, TILE) + PER_WORD - 1) / PER_WORD;
    for (int64_t c = 0; c < t->step->dim; c += ACROSS)
        product(t->out + row * t->wide + c, t->wide, factors, weights[0], TILE / PER_WORD, t->values + c, t->wide, steps);
}

static void start_tile(tile *t, const step_args *a, int64_t i, int64_t g) {
    t->step = a, t->heads = a->heads / a->kv_heads, t->deep = a->dim / PER_WORD;
    t->wide = (a->dim + ACROSS - 1) / ACROSS * ACROSS;
    t->rows = (a->tile_counts[i] * t->heads + BAND - 1) / BAND * BAND; /* those behind the last are nobody's */
    t->position = a->tile_positions[i];
    for (int64_t row = 0; row < t->rows; row++) {
        int64_t token = least(row / t->heads, a->tile_counts[i] - 1), head = g * t->heads + row % t->heads;
        int64_t place = (a->tile_rows[i] + token) * (a->heads + 2 * a->kv_heads) + head;
        to_words(a->qkv + place * a->dim, t->queries + row * t->deep, a->dim);
        t->top[row] = LOWEST;
        t->weight[row] = every(0);
    }
    memset(t->out, 0, t->rows * t->wide * sizeof(float));
    memset(t->values, 0, sizeof t->values);
}

static void attend_tile(const job *j, int64_t item) {
    const step_args *a = j->args;
    int64_t i = item / a->kv_heads, g = item % a->kv_heads, count = a->tile_counts[i];
    tile t;
    start_tile(&t, a, i, g);
    int64_t stop = t.position + count, first = a->window ? t.position + 1 - a->window : 0;
    for (first = first > 0 ? first / TILE * TILE : 0; first < stop; first += TILE) {
        const elem *keys[TILE];
        int64_t found = least(TILE, stop - first);
        find_keys(a, a->tile_seqs[i], g, first, found, keys);
        copy_tile(&t, keys, found);
        for (int64_t band = 0; band < t.rows / BAND; band++)
            if (t.position + (band * BAND + BAND - 1) / t.heads >= first) attend_band(&t, band, first);
    }
    for (int64_t row = 0; row < count * t.heads; row++) {
        elem *out = a->out + ((a->tile_rows[i] + row / t.heads) * a->heads + g * t.heads + row % t.heads) * a->dim;
        float weight = sum(t.weight[row]);
        for (int64_t d = 0; d < a->dim; d += LANES) {
            vec x;
            memcpy(&x, t.out + row * t.wide + d, sizeof x);
            store(out + d, x / weight);
        }
    }
}
