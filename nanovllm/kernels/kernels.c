/* The hand-written CPU kernels: residual + RMSNorm, SiLU * up, rotation + KV write, paged attention.
 *
 * Every sum has a fixed order that depends on its own row or sequence only, never on threads or neighbours.
 *
 * Names as in interface.py: N tokens, S sequences, H query heads, G KV heads, R = H / G, D head size.
 * The pool is [blocks, layers, 2, G, block_size, D]; `kv` points at layer l's keys in block 0.
 */
#include "kernels.h"
#include "words.h"

#define CHUNK 256   /* keys that one unit of attention looks at; part of the result's order of sums */
#define MAX_R 16    /* query heads that share a KV head */
#define MAX_D 256

/* -- rows: norm and SiLU ----------------------------------------------------------------------------------- */

#define ROWS 8 /* rows of one item of work */
typedef struct {
    elem *x, *out;
    const elem *delta, *weight;
    int64_t rows, width;
    float eps;
} rows_args;

static void norm_rows(const job *j, int64_t item) {
    const rows_args *a = j->args;
    int64_t width = a->width, stop = (item + 1) * ROWS < a->rows ? (item + 1) * ROWS : a->rows;
    for (int64_t row = item * ROWS; row < stop; row++) {
        elem *x = a->x + row * width, *out = a->out + row * width;
        vec squares = {0};
        for (int64_t i = 0; i < width; i += LANES) {
            if (a->delta) store_at(x, load_at(x, i, width) + load_at(a->delta + row * width, i, width), i, width);
            vec v = load_at(x, i, width); /* as rounded: what the next layer will see */
            squares += v * v;
        }
        float scale = 1.0f / __builtin_sqrtf(sum(squares) / (float)width + a->eps);
        for (int64_t i = 0; i < width; i += LANES)
            store_at(out, load_at(x, i, width) * scale * load_at(a->weight, i, width), i, width);
    }
}

/* x += delta (where there is one); out = x / rms(x) * weight. x, delta, out [rows, width]. */
void add_norm(elem *x, const elem *delta, const elem *weight, elem *out, int64_t rows, int64_t width, float eps,
              parallel_fn parallel, int threads) {
    rows_args a = {x, out, delta, weight, rows, width, eps};
    for_each(norm_rows, &a, (rows + ROWS - 1) / ROWS, parallel, threads);
}

static void silu_rows(const job *j, int64_t item) {
    const rows_args *a = j->args;
    int64_t width = a->width, stop = (item + 1) * ROWS < a->rows ? (item + 1) * ROWS : a->rows;
    for (int64_t row = item * ROWS; row < stop; row++) {
        const elem *gate = a->delta + row * 2 * width, *up = gate + width;
        for (int64_t i = 0; i < width; i += LANES) {
            vec g = load_at(gate, i, width);
            store_at(a->out + row * width, g / (1.0f + exponential(-g)) * load_at(up, i, width), i, width);
        }
    }
}

/* out [rows, width] = silu(gate) * up for gate_up [rows, 2 * width]. */
void silu_mul(const elem *gate_up, elem *out, int64_t rows, int64_t width, parallel_fn parallel, int threads) {
    rows_args a = {0, out, gate_up, 0, rows, width, 0};
    for_each(silu_rows, &a, (rows + ROWS - 1) / ROWS, parallel, threads);
}

/* -- attention --------------------------------------------------------------------------------------------- */

static void rotate(const elem *from, elem *to, const elem *cos, const elem *sin, int64_t half) {
    for (int64_t i = 0; i < half; i += LANES) {
        vec a = load_at(from, i, half), b = load_at(from + half, i, half);
        vec c = load_at(cos, i, half), s = load_at(sin, i, half);
        store_at(to, a * c - b * s, i, half);
        store_at(to + half, b * c + a * s, i, half);
    }
}

static void rotate_and_store_token(const step_args *a, int64_t token) {
    int64_t dim = a->dim, half = dim / 2, side = a->kv_heads * a->block_size * dim;
    elem *q = a->qkv + token * (a->heads + 2 * a->kv_heads) * dim, *k = q + a->heads * dim, *v = k + a->kv_heads * dim;
    elem *slot = a->kv + a->slot_blocks[token] * a->block_stride + a->slot_offsets[token] * dim;
    const elem *cos = a->cos + token * half, *sin = a->sin + token * half;
    for (int64_t h = 0; a->cos && h < a->heads; h++) rotate(q + h * dim, q + h * dim, cos, sin, half);
    for (int64_t g = 0; g < a->kv_heads; g++) {
        if (a->cos) rotate(k + g * dim, k + g * dim, cos, sin, half);
        copy(k + g * dim, slot + g * a->block_size * dim, dim);
        copy(v + g * dim, slot + g * a->block_size * dim + side, dim);
    }
}

static void rotate_and_store(const job *j, int64_t item) {
    const step_args *a = j->args;
    int64_t stop = least((item + 1) * ROWS, a->num_tokens);
    for (int64_t token = item * ROWS; token < stop; token++) rotate_and_store_token(a, token);
}

/* Addresses of the keys first..first+count of sequence s, KV head g, wherever their blocks lie. */
static void find_keys(const step_args *a, int64_t s, int64_t g, int64_t first, int64_t count, const elem **keys) {
    const int64_t *table = a->tables + s * a->max_blocks;
    const elem *head = a->kv + g * a->block_size * a->dim;
    for (int64_t i = 0; i < count;) {
        int64_t block = (first + i) / a->block_size, offset = (first + i) % a->block_size;
        const elem *key = head + table[block] * a->block_stride + offset * a->dim;
        for (; offset < a->block_size && i < count; offset++, i++, key += a->dim) keys[i] = key;
    }
}

#include "decode.h"

/* The chunks of one head, in order: each counts by its weight at the common largest score. */
static void merge_head(const step_args *a, int64_t s, int64_t h) {
    int64_t dim = a->dim, stride = a->heads * (dim + 2), first = a->first_units[s], stop = a->first_units[s + 1];
    const float *part = a->partial + h * (dim + 2);
    elem *out = a->out + (a->decode_rows[s] * a->heads + h) * dim;
    float most = part[first * stride + dim + 1], weight = 0;
    vec totals[MAX_D / LANES], x;
    for (int64_t i = 0; i < dim / LANES; i++) totals[i] = every(0);
    for (int64_t u = first; u < stop; u++)
        if (part[u * stride + dim + 1] > most) most = part[u * stride + dim + 1];
    for (int64_t u = first; u < stop; u++) {
        float share = exponential(every(part[u * stride + dim + 1] - most))[0];
        weight += part[u * stride + dim] * share;
        for (int64_t i = 0; i < dim / LANES; i++) {
            memcpy(&x, part + u * stride + i * LANES, sizeof x);
            totals[i] += x * share;
        }
    }
    for (int64_t i = 0; i < dim / LANES; i++) store(out + i * LANES, totals[i] / weight);
}

static void merge(const job *j, int64_t s) {
    const step_args *a = j->args;
    for (int64_t h = 0; h < a->heads; h++) merge_head(a, s, h);
}

#include "prefill.h"

/* Rotate, store all tokens' KV, then attend. */
void attend_layer(const step_args *a) {
    parallel_fn few = a->num_tokens >= 8 ? a->parallel : 0;
    for_each(rotate_and_store, a, (a->num_tokens + ROWS - 1) / ROWS, few, (int)a->threads);
    for_each(attend_tile, a, a->num_tiles * a->kv_heads, a->parallel, (int)a->threads);
    attend(a);
    for_each(merge, a, a->num_decodes, few, (int)a->threads);
}
