/* Attention of one query of a sequence, its blocks read in place: units of CHUNK keys, merged afterwards.
 *
 * One item of work is one unit and one KV head with the query heads that share it, so that a key is read once for all.
 */

typedef struct { /* one unit under way; `count` of its keys are seen */
    const elem *keys[CHUNK];
    float scores[MAX_R][CHUNK];
    word weights[MAX_R][CHUNK / PER_WORD];
    int64_t count, side; /* elements from a key to its value */
} unit;

/* scores[h][t] = scale * q[h] . key[t]; those behind the last are hidden. */
INLINE void score_keys(unit *u, const elem *q, float scale, const int heads, const int dim) {
    const int step = PER_WORD * LANES, vecs = (dim + step - 1) / step;
    uvec queries[MAX_R][MAX_D / LANES];
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < vecs; i++) queries[h][i] = words_at(q + h * dim + i * step, dim - i * step);
    for (int64_t t = 0; t < u->count; t += LANES) {
        vec dots[MAX_R][LANES];
        for (int64_t at = 0; at < LANES; at++) {
            const elem *key = u->keys[least(t + at, u->count - 1)]; /* behind the last: computed again, not counted */
            const elem *ahead = u->keys[least(t + at + LANES, u->count - 1)]; /* blocks lie apart: no prefetcher follows */
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
INLINE void weigh_keys(unit *u, int h, float *facts) {
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
INLINE void sum_values(const unit *u, int64_t from, float *to, int64_t stride, const int heads, const int vecs) {
    vec sums[MAX_R][MAX_D / LANES + 1];
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < vecs + vecs % PER_WORD; i++) sums[h][i] = every(0);
    for (int64_t t = 0; t < u->count; t += PER_WORD) {
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

/* One sequence's R query heads against one KV head's keys of one chunk. `heads` and `dim` are constants where it
 * matters, so that sums stay in registers: the compiler makes a copy of this function for each such pair. */
INLINE void attend_unit(const step_args *a, int64_t item, int64_t g, const int heads, const int dim) {
    unit u;
    int64_t s = a->unit_seqs[item], context = a->contexts[s], width = a->heads + 2 * a->kv_heads;
    int64_t from = a->window && context > a->window ? context - a->window : 0;
    int64_t chunk = (from / CHUNK + item - a->first_units[s]) * CHUNK, first = from > chunk ? from : chunk;
    float *out = a->partial + (item * a->kv_heads + g) * heads * (dim + 2);
    u.count = least(chunk + CHUNK, context) - first;
    u.side = a->kv_heads * a->block_size * dim;
    find_keys(a, a->decodes[s], g, first, u.count, u.keys);
    score_keys(&u, a->qkv + (a->decode_rows[s] * width + g * heads) * dim, a->scale, heads, dim);
    for (int h = 0; h < heads; h++) weigh_keys(&u, h, out + h * (dim + 2) + dim);
    const int side = dim < 64 ? dim : 64; /* of a value at a time: as many sums as there are registers */
    for (int64_t i = 0; i < dim; i += side) {
        if (dim - i >= side) sum_values(&u, i, out, dim + 2, heads, side / LANES);
        else sum_values(&u, i, out, dim + 2, heads, (int)((dim - i) / LANES));
    }
}
