/* Attention of one query of a sequence, its blocks read in place: units of CHUNK keys, merged afterwards.
 *
 * A pair is one unit and one KV head with the query heads that share it, so that a key is read once for all. One item of
 * work is a run of pairs: while the values of one are summed, the keys of the next come from memory. No prefetcher of
 * the processor follows blocks that lie apart, so all that is read is asked for here.
 */
#define RUNS 4   /* items for each thread */
#define AHEAD 48 /* keys between the one that is read and the one that is asked for */

typedef struct { /* one pair under way; `count` of its keys are seen, and `next_count` of the pair after it */
    const elem *keys[CHUNK], *next[CHUNK];
    float scores[MAX_R][CHUNK];
    word weights[MAX_R][CHUNK / PER_WORD];
    int64_t count, next_count, side; /* elements from a key to its value */
} pair;

/* scores[h][t] = scale * q[h] . key[t]; those behind the last are hidden. */
INLINE void score_keys(pair *u, const elem *q, float scale, const int heads, const int dim) {
    const int step = PER_WORD * LANES, vecs = (dim + step - 1) / step;
    uvec queries[MAX_R][MAX_D / LANES];
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < vecs; i++) queries[h][i] = words_at(q + h * dim + i * step, dim - i * step);
    for (int64_t t = 0; t < u->count; t += LANES) {
        vec dots[MAX_R][LANES];
        for (int64_t at = 0; at < LANES; at++) {
            const elem *key = u->keys[least(t + at, u->count - 1)]; /* behind the last: computed again, not counted */
            const elem *ahead = u->keys[least(t + at + AHEAD, u->count - 1)];
            for (int64_t i = 0; i < dim; i += 64 / sizeof(elem)) {
                __builtin_prefetch(ahead + i, 0, 1);
                __builtin_prefetch(key + u->side + i, 0, 1);
            }
            for (int h = 0; h < heads; h++) dots[h][at] = every(0);
            for (int i = 0; i < vecs; i++) {
                uvec part = words_at(key + i * step, dim - i * step);
                for (int h = 0; h < heads; h++) dots[h][at] = multiply_add_each(dots[h][at], queries[h][i], part);
            }
        }
        for (int h = 0; h < heads; h++) {
            vec dot = sums_of(dots[h]) * scale;
            memcpy(u->scores[h] + t, &dot, sizeof dot);
            for (int64_t hidden = u->count - t; hidden < LANES; hidden++) u->scores[h][t + hidden] = -__builtin_inff();
        }
    }
}

/* Scores of one head to weights e^(score - largest), in words; their sum and the largest go to `facts`. */
INLINE void weigh_keys(pair *u, int h, float *facts) {
    vec x, top = every(-__builtin_inff()), total = every(0);
    for (int64_t t = 0; t < u->count; t += LANES) {
        memcpy(&x, u->scores[h] + t, sizeof x);
        top = larger(x, top);
    }
    float most = largest(top);
    for (int64_t t = 0; t < u->count; t += LANES) {
        memcpy(&x, u->scores[h] + t, sizeof x);
        x = exponential(x - most);
        total += x;
#if PER_WORD == 2
        __m256bh half = _mm512_cvtneps_pbh((__m512)x);
        memcpy(u->weights[h] + t / PER_WORD, &half, sizeof half);
#else
        memcpy(u->weights[h] + t, &x, sizeof x);
#endif
    }
    facts[0] = sum(total), facts[1] = most;
}

/* to[h] = the sum over t of weight[h][t] * value[t], for `vecs` vectors of a value from dimension `from` on. */
INLINE void sum_values(const pair *u, int64_t from, float *to, int64_t stride, const int heads, const int vecs) {
    vec sums[MAX_R][MAX_D / LANES + 1];
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < vecs + vecs % PER_WORD; i++) sums[h][i] = every(0);
    for (int64_t t = 0; t < u->count; t += PER_WORD) {
        for (int64_t n = t; n < t + PER_WORD && n < u->next_count; n++)
            for (int64_t d = 0; d < vecs * LANES; d += 64 / sizeof(elem)) __builtin_prefetch(u->next[n] + from + d, 0, 2);
        const elem *value = u->keys[t] + u->side + from;
#if PER_WORD == 2 /* an odd last one counts with one whose weight is e^-infinity */
        const elem *next = u->keys[least(t + 1, u->count - 1)] + u->side + from;
        for (int i = 0; i < vecs; i += 2) {
            int64_t left = (vecs - i) * LANES;
            __m512i a = (__m512i)words_at(value + i * LANES, left), b = (__m512i)words_at(next + i * LANES, left);
            uvec low = (uvec)_mm512_unpacklo_epi16(a, b), high = (uvec)_mm512_unpackhi_epi16(a, b);
            for (int h = 0; h < heads; h++) {
                sums[h][i] = multiply_add(sums[h][i], u->weights[h][t / 2], (vec)low);
                sums[h][i + 1] = multiply_add(sums[h][i + 1], u->weights[h][t / 2], (vec)high);
            }
        }
#else
        for (int i = 0; i < vecs; i++) {
            vec part = load(value + i * LANES);
            for (int h = 0; h < heads; h++) sums[h][i] = multiply_add(sums[h][i], u->weights[h][t], part);
        }
#endif
    }
    for (int h = 0; h < heads; h++)
        for (int64_t d = 0; d < vecs * LANES; d++) {
#if PER_WORD == 2 /* unpacked: of eight dimensions four lie in one vector and four in the next */
            to[h * stride + from + d] = sums[h][d / (2 * LANES) * 2 + d / 4 % 2][d % (2 * LANES) / 8 * 4 + d % 4];
#else
            to[h * stride + from + d] = sums[h][d / LANES][d % LANES];
#endif
        }
}

/* The addresses of a pair's keys go to `keys`; returns how many there are. */
static int64_t find_pair(const step_args *a, int64_t number, const elem **keys) {
    int64_t item = number / a->kv_heads, s = a->unit_seqs[item], context = a->contexts[s];
    int64_t from = a->window && context > a->window ? context - a->window : 0;
    int64_t chunk = (from / CHUNK + item - a->first_units[s]) * CHUNK, first = from > chunk ? from : chunk;
    int64_t count = least(chunk + CHUNK, context) - first;
    find_keys(a, a->decodes[s], number % a->kv_heads, first, count, keys);
    return count;
}

/* One sequence's R query heads against one KV head's keys of one chunk. `heads` and `dim` are constants where it
 * matters, so that sums stay in registers: the compiler makes a copy of this function for each such pair. */
INLINE void attend_pair(const step_args *a, pair *u, int64_t number, const int heads, const int dim) {
    int64_t row = a->decode_rows[a->unit_seqs[number / a->kv_heads]], width = a->heads + 2 * a->kv_heads;
    float *out = a->partial + number * heads * (dim + 2);
    score_keys(u, a->qkv + (row * width + number % a->kv_heads * heads) * dim, a->scale, heads, dim);
    for (int h = 0; h < heads; h++) weigh_keys(u, h, out + h * (dim + 2) + dim);
    const int side = dim < 64 ? dim : 64; /* of a value at a time: as many sums as there are registers */
    for (int64_t i = 0; i < dim; i += side) {
        if (dim - i >= side) sum_values(u, i, out, dim + 2, heads, side / LANES);
        else sum_values(u, i, out, dim + 2, heads, (int)((dim - i) / LANES));
    }
}

static void attend_number(const step_args *a, pair *u, int64_t number) {
    int heads = (int)(a->heads / a->kv_heads);
#define CASE(H, D) \
    if (heads == H && a->dim == D) return attend_pair(a, u, number, H, D);
    CASE(1, 64) CASE(2, 64) CASE(3, 64) CASE(4, 64) CASE(7, 64) CASE(2, 128) CASE(3, 128) CASE(4, 128)
#undef CASE
    attend_pair(a, u, number, heads, (int)a->dim);
}

static int64_t run_length(const step_args *a) {
    int64_t length = a->num_units * a->kv_heads / (a->threads * RUNS);
    return length > 1 ? length : 1;
}

static void attend_run(const job *j, int64_t item) {
    const step_args *a = j->args;
    int64_t length = run_length(a), stop = least((item + 1) * length, a->num_units * a->kv_heads);
    pair u;
    u.side = a->kv_heads * a->block_size * a->dim;
    u.next_count = find_pair(a, item * length, u.next);
    for (int64_t number = item * length; number < stop; number++) {
        u.count = u.next_count;
        memcpy(u.keys, u.next, (size_t)u.count * sizeof *u.keys);
        u.next_count = number + 1 < stop ? find_pair(a, number + 1, u.next) : 0;
        attend_number(a, &u, number);
    }
}

/* All sequences of one query: a result of each unit and head in `partial`. */
static void attend(const step_args *a) {
    int64_t length = run_length(a), pairs = a->num_units * a->kv_heads;
    for_each(attend_run, a, (pairs + length - 1) / length, a->parallel, (int)a->threads);
}
