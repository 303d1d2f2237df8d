/* Attention of many queries of one sequence: tiles of queries against tiles of keys, the softmax on the way
 * (FlashAttention, arXiv 2205.14135; the running maximum and sum of arXiv 1805.02867).
 *
 * One item of work is one KV head and a tile of tokens, with all query heads that share it: their keys and values are
 * copied out of their blocks once, TILE positions at a time, into words in the order in which `product` reads them.
 * Tiles of keys lie at fixed positions and a row counts what it sees only: its sums depend on nothing else, not on how
 * the prompt was cut into chunks of two tokens and more, not on other rows. (A token alone attends in decode.h.)
 */
#include "words.h"

#define TILE (64 * PER_WORD) /* keys at a time */
#define BAND 6       /* rows that go through a product together, so that its sums stay in registers */
#define MAX_ROWS 384 /* of a tile: tokens times query heads that share a KV head */
#define NUMBERS (MAX_ROWS * 64) /* of all its rows: there are fewer where they are wider, so that it fits any stack */
#define LOWEST -1e30f

#define SIDE (LANES == 16 ? 4 : 2) /* vectors beside each other in a product: its sums fill 32 registers, or 16 */
#define ACROSS (SIDE * LANES)

/* to[r] = to[r] * factors[r] + the sum over k of a[r][k] * b[k], for `side` vectors of columns; nothing was in `to` without
 * factors. Rows of a lie `stride` words apart, rows of b `across` words, rows of `to` `to_across` numbers. */
INLINE void product(float *to, int64_t to_across, const float *factors, const word *a, int64_t stride, const word *b,
                    int64_t across, int64_t steps, const int side) {
    vec sums[BAND][SIDE], parts[SIDE];
    for (int r = 0; r < BAND; r++)
        for (int i = 0; i < side; i++) {
            sums[r][i] = every(0);
            if (factors) memcpy(&sums[r][i], to + r * to_across + i * LANES, sizeof(vec)), sums[r][i] *= factors[r];
        }
    for (int64_t k = 0; k < steps; k++) {
        for (int i = 0; i < side; i++) memcpy(&parts[i], b + k * across + i * LANES, sizeof(vec));
        for (int r = 0; r < BAND; r++)
            for (int i = 0; i < side; i++) sums[r][i] = multiply_add(sums[r][i], a[r * stride + k], parts[i]);
    }
    for (int r = 0; r < BAND; r++)
        for (int i = 0; i < side; i++) memcpy(to + r * to_across + i * LANES, &sums[r][i], sizeof(vec));
}

typedef struct { /* one item of work; `deep` words of a query or key, `wide` numbers of a value and its padding */
    vec weight[MAX_ROWS]; /* lane by lane; here, so that what is behind it is aligned too */
    word queries[NUMBERS], keys[MAX_D * TILE / PER_WORD], values[MAX_D * TILE / PER_WORD];
    float out[NUMBERS], top[MAX_ROWS];
    const step_args *step;
    int64_t heads, deep, wide, rows, position;
} tile;

static void to_words(const elem *from, word *to, int64_t count) { /* count elements, side by side */
#if PER_WORD == 2
    copy(from, (elem *)to, count);
#else
    for (int64_t i = 0; i < count; i += LANES) {
        vec x = load(from + i);
        memcpy(to + i, &x, sizeof x);
    }
#endif
}

/* x[r][c] becomes x[c][r]: the rows' halves are riffled into each other as often as LANES can be halved. */
INLINE void transpose(uvec x[LANES]) {
    uvec y[LANES];
    for (int left = LANES; left > 1; left /= 2) {
        for (int i = 0; i < LANES / 2; i++) {
#if LANES == 16
            y[2 * i] = SHUFFLE(x[i], x[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            y[2 * i + 1] = SHUFFLE(x[i], x[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
            y[2 * i] = SHUFFLE(x[i], x[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
            y[2 * i + 1] = SHUFFLE(x[i], x[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
#endif
        }
        memcpy(x, y, sizeof y);
    }
}

/* LANES words from word k on, of LANES keys from key i on. */
INLINE void copy_keys(tile *t, const elem **keys, int64_t count, int64_t i, int64_t k) {
    uvec x[LANES];
    for (int64_t r = 0; r < LANES; r++) {
        if (i + r < count) x[r] = words_at(keys[i + r] + k * PER_WORD, t->step->dim - k * PER_WORD);
        else x[r] = (uvec){0};
    }
    transpose(x);
    for (int64_t r = 0; r < least(LANES, t->deep - k); r++) memcpy(t->keys + (k + r) * TILE + i, &x[r], sizeof x[r]);
}

/* Keys as [word of a key][position], values as [PER_WORD positions][dimension]; zeros behind the last of `count`. */
static void copy_tile(tile *t, const elem **keys, int64_t count) {
    int64_t dim = t->step->dim, side = t->step->kv_heads * t->step->block_size * dim;
    for (int64_t i = 0; i < TILE; i += LANES)
        for (int64_t k = 0; k < t->deep; k += LANES) copy_keys(t, keys, count, i, k);
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

/* 2^x for x <= 0, and 0 far below 2^-126: a polynomial. What is no number stays none. */
INLINE vec power_of_two(vec x) {
#if PER_WORD == 2 /* 6e-5 relative, where bfloat16 rounds by up to 2e-3 */
    x = larger(every(-200.0f), x);
    vec n = (vec)_mm512_roundscale_ps((__m512)x, 0), r = x - n, p = every(9.618437357e-3f);
    p = p * r + 5.550332471e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472028e-1f;
    p = p * r + 1.0f;
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else /* 2e-7 relative (Cephes exp2f) */
    x = larger(every(-127.0f), x);
    vec shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f), p = every(1.535336188e-4f);
    p = p * r + 1.339887440e-3f;
    p = p * r + 9.618437357e-3f;
    p = p * r + 5.550332471e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472028e-1f;
    p = p * r + 1.0f;
    return p * (vec)(((uvec)shifted << 23) + 0x3f800000);
#endif
}

/* scores[r][t] = q[r] . key[t] of a band whose first row is `row`, for `count` keys, a multiple of LANES. */
INLINE void score_band(const tile *t, int64_t row, float *scores, int64_t count) {
    for (int64_t c = 0; c < count; c += ACROSS) {
        int64_t side = least(ACROSS, count - c) / LANES;
        const word *queries = t->queries + row * t->deep, *keys = t->keys + c;
#define CASE(S) \
    if (S <= SIDE && side == S) product(scores + c, TILE, 0, queries, t->deep, keys, TILE, t->deep, S);
        CASE(1) CASE(2) CASE(3) CASE(4)
#undef CASE
    }
}

/* Largest score so far of one row, which sees those of `count` keys from `from` up to `to`; the others are hidden. */
INLINE float find_top(float *scores, float top, int64_t count, int64_t from, int64_t to) {
    static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    ivec lanes;
    memcpy(&lanes, numbers, sizeof lanes);
    vec x, most = every(top);
    for (int64_t i = 0; i < count; i += LANES) {
        memcpy(&x, scores + i, sizeof x);
        if (from > 0 || to < count) {
            ivec at = lanes + (int32_t)i;
            x = choose((at >= (int32_t)from) & (at < (int32_t)to), x, every(2 * LOWEST));
            memcpy(scores + i, &x, sizeof x);
        }
        most = larger(x, most);
    }
    return largest(most);
}

/* `count` scores of one row to weights in words; returns their sum, lane by lane. */
INLINE vec weigh(const float *scores, int64_t count, float top, float scale, word *weights) {
    vec x, total = {0};
    for (int64_t i = 0; i < count; i += LANES) {
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
    int64_t row = band * BAND, window = t->step->window, before = t->position + 1 - first;
    int64_t seen = least(before + (row + BAND - 1) / t->heads, TILE), count = (seen + LANES - 1) / LANES * LANES;
    score_band(t, row, scores[0], count);
    for (int r = 0; r < BAND; r++) {
        int64_t to = before + (row + r) / t->heads;
        float top = find_top(scores[r], t->top[row + r], count, window ? to - window : 0, to);
        factors[r] = t->top[row + r] - top;
        t->top[row + r] = top;
    }
    vec x;
    memcpy(&x, factors, sizeof x);
    x = power_of_two(x * scale);
    memcpy(factors, &x, sizeof x);
    for (int r = 0; r < BAND; r++) {
        vec total = weigh(scores[r], count, t->top[row + r], scale, weights[r]);
        t->weight[row + r] = t->weight[row + r] * factors[r] + total;
    }
    int64_t steps = (seen + PER_WORD - 1) / PER_WORD;
    for (int64_t c = 0; c < t->step->dim; c += ACROSS) {
        float *out = t->out + row * t->wide + c;
        product(out, t->wide, factors, weights[0], TILE / PER_WORD, t->values + c, t->wide, steps, SIDE);
    }
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
    if (t->wide > a->dim) memset(t->values, 0, sizeof t->values); /* padding is summed, too */
}

static void end_tile(const tile *t, int64_t i, int64_t g) {
    const step_args *a = t->step;
    float shares[LANES];
    for (int64_t row = 0; row < a->tile_counts[i] * t->heads; row++) {
        int64_t token = a->tile_rows[i] + row / t->heads, head = g * t->heads + row % t->heads;
        if (row % LANES == 0) {
            vec parts[LANES], x;
            memcpy(parts, t->weight + row, sizeof parts);
            x = 1.0f / sums_of(parts);
            memcpy(shares, &x, sizeof x);
        }
        for (int64_t d = 0; d < a->dim; d += LANES) {
            vec x;
            memcpy(&x, t->out + row * t->wide + d, sizeof x);
            store(a->out + (token * a->heads + head) * a->dim + d, x * shares[row % LANES]);
        }
    }
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
    end_tile(&t, i, g);
}
