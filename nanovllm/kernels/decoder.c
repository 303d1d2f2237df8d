/* All layers of a decoder as one call: what the caller's own steps would cost is gone.
 *
 * The formula is models/decoder.py's, operation by operation, from the same functions. Names: N tokens, M of them whose
 * successor is wanted, E hidden size, F intermediate size, Q = (H + 2 G) * D.
 */
#include "kernels.h"

typedef struct {
    grouped_args groups; /* of the same weight, for few rows; without codes where it is in panels only */
    panel_args panels;
} linear;

typedef struct {
    const elem *input_norm, *post_norm; /* [E] */
    linear qkv, out, gate_up, down;
} layer_weights;

typedef struct {
    const layer_weights *layers;
    int64_t num_layers, hidden;
    const elem *final_norm; /* [E] */
    linear head;
    float eps;
} decoder_weights;

typedef struct {
    step_args *step;
    team *team;
    int64_t layer_stride;               /* elements from one layer's keys to the next's */
    const int64_t *last;                /* [M] rows, rising */
    int64_t num_last;
    elem *x, *delta, *normed;           /* [N, E]; x comes as the embedded tokens */
    elem *qkv, *attended;               /* [N, Q], [N, H * D] */
    elem *gate_up, *inner;              /* [N, 2 F], [N, F] */
    void *logits;                       /* [M, vocab] elem or float, as the head has it */
} decoder_args;

/* -- what each row goes through by itself ------------------------------------------------------------------- */

#define BLOCK 96 /* rows at most that one thread takes from one attention to the next, so that its cache holds them */
#define LAST_BLOCK 32 /* rows at least, but in the last one: less of them reads the weights for too little */
#define MANY 64 /* rows for each thread from which on they do; fewer share the reading of the weights instead */

typedef struct { /* `count` rows from `first` on, between the attentions of layers `layer` - 1 and `layer` */
    const decoder_weights *model;
    const decoder_args *args;
    int64_t layer, first, count;
    parallel_fn parallel;
    int threads, are_few; /* decided by all rows of the step, or at its end by all that are wanted; not by a block of them */
} rows;

static rows all_rows(const decoder_weights *m, const decoder_args *a, int64_t layer, int64_t count) {
    return (rows){m, a, layer, 0, count, a->step->parallel, (int)a->step->threads, count <= FEW};
}

static void multiply(const rows *r, const linear *weight, const elem *x, void *y) {
    if (weight->groups.codes && r->are_few) {
        grouped_args a = weight->groups;
        a.x = x, a.y = y, a.rows = r->count;
        grouped_linear(&a, r->parallel, r->threads);
    } else {
        panel_args a = weight->panels;
        a.x = x, a.y = y, a.rows = r->count;
        panel_linear(&a, r->parallel, r->threads);
    }
}

/* x += delta; returns its norm. */
static const elem *add_delta(const rows *r, const elem *weight) {
    const decoder_args *a = r->args;
    int64_t width = r->model->hidden, at = r->first * width;
    add_norm(a->x + at, a->delta + at, weight, a->normed + at, r->count, width, r->model->eps, r->parallel, r->threads);
    return a->normed + at;
}

static void end_layer(const rows *r, const layer_weights *w) {
    const decoder_args *a = r->args;
    int64_t width = w->down.panels.in;
    elem *delta = a->delta + r->first * r->model->hidden;
    elem *gate_up = a->gate_up + r->first * 2 * width, *inner = a->inner + r->first * width;
    multiply(r, &w->out, a->attended + r->first * w->out.panels.in, delta);
    multiply(r, &w->gate_up, add_delta(r, w->post_norm), gate_up);
    silu_mul(gate_up, inner, r->count, width, r->parallel, r->threads);
    multiply(r, &w->down, inner, delta);
}

static void start_layer(const rows *r, const layer_weights *w) {
    multiply(r, &w->qkv, add_delta(r, w->input_norm), r->args->qkv + r->first * w->qkv.panels.out);
}

static void pass(const rows *r) {
    const layer_weights *w = r->model->layers + r->layer;
    if (r->layer) end_layer(r, w - 1);
    start_layer(r, w);
}

/* The first row of block `item`: whole bands of rows, fewer of them towards the end, so that threads end together. */
static int64_t block_start(const rows *all, int64_t item) {
    int64_t start = 0;
    for (int64_t size; item > 0 && start < all->count; item--, start += size) {
        size = (all->count - start) / (2 * all->threads) / 8 * 8;
        size = size > BLOCK ? BLOCK : size < LAST_BLOCK ? LAST_BLOCK : size;
    }
    return start < all->count ? start : all->count;
}

static void pass_block(const job *j, int64_t item) { /* there are more items than blocks */
    const rows *all = j->args;
    rows block = *all;
    block.first = block_start(all, item), block.count = block_start(all, item + 1) - block.first;
    block.parallel = 0, block.threads = 1;
    if (block.count) pass(&block);
}

static void pass_all(const decoder_weights *m, const decoder_args *a, int64_t layer) {
    rows all = all_rows(m, a, layer, a->step->num_tokens);
    if (all.count < MANY * all.threads) pass(&all);
    else for_each(pass_block, &all, all.count / LAST_BLOCK + 1, all.parallel, all.threads);
}

/* -- the whole ----------------------------------------------------------------------------------------------- */

static void keep_rows(elem *x, int64_t width, const int64_t *kept, int64_t count) {
    for (int64_t i = 0; i < count; i++) memmove(x + i * width, x + kept[i] * width, width * sizeof(elem));
}

/* What comes after the last attention, of the rows whose successor is wanted only. */
static void finish(const decoder_weights *m, const decoder_args *a) {
    const layer_weights *w = m->layers + m->num_layers - 1;
    rows kept = all_rows(m, a, m->num_layers, a->num_last);
    if (!kept.count) return;
    keep_rows(a->x, m->hidden, a->last, kept.count);
    keep_rows(a->attended, w->out.panels.in, a->last, kept.count);
    end_layer(&kept, w);
    multiply(&kept, &m->head, add_delta(&kept, m->final_norm), a->logits);
}

/* logits = head(norm(all layers(x)[last])); the step's KV is in the pool after it. `delta` comes as zeros. */
void run_decoder(const decoder_weights *m, const decoder_args *a) {
    step_args *step = a->step;
    parallel_fn before = step->parallel;
    elem *kv = step->kv;
    team_call(a->team);
    step->parallel = team_parallel;
    step->qkv = a->qkv, step->out = a->attended;
    for (int64_t l = 0; l < m->num_layers; l++, step->kv += a->layer_stride) {
        pass_all(m, a, l);
        attend_layer(step);
    }
    finish(m, a);
    team_dismiss(a->team);
    step->kv = kv, step->parallel = before;
}
