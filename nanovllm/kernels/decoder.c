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

static void multiply(const linear *weight, const elem *x, void *y, int64_t rows, const step_args *step) {
    if (weight->groups.codes && rows <= FEW) {
        grouped_args a = weight->groups;
        a.x = x, a.y = y, a.rows = rows;
        grouped_linear(&a, step->parallel, (int)step->threads);
    } else {
        panel_args a = weight->panels;
        a.x = x, a.y = y, a.rows = rows;
        panel_linear(&a, step->parallel, (int)step->threads);
    }
}

static void run_layer(const layer_weights *w, const decoder_weights *m, const decoder_args *a) {
    const step_args *step = a->step;
    int64_t rows = step->num_tokens;
    int threads = (int)step->threads;
    add_norm(a->x, a->delta, w->input_norm, a->normed, rows, m->hidden, m->eps, step->parallel, threads);
    multiply(&w->qkv, a->normed, a->qkv, rows, step);
    attend_layer(step);
    multiply(&w->out, a->attended, a->delta, rows, step);
    add_norm(a->x, a->delta, w->post_norm, a->normed, rows, m->hidden, m->eps, step->parallel, threads);
    multiply(&w->gate_up, a->normed, a->gate_up, rows, step);
    silu_mul(a->gate_up, a->inner, rows, w->down.panels.in, step->parallel, threads);
    multiply(&w->down, a->inner, a->delta, rows, step);
}

static void keep_rows(elem *x, int64_t width, const int64_t *kept, int64_t count) {
    for (int64_t i = 0; i < count; i++) memmove(x + i * width, x + kept[i] * width, width * sizeof(elem));
}

/* logits = head(norm(all layers(x)[last])); the step's KV is in the pool after it. `delta` comes as zeros. */
void run_decoder(const decoder_weights *m, const decoder_args *a) {
    step_args *step = a->step;
    parallel_fn before = step->parallel;
    elem *kv = step->kv;
    team_call(a->team);
    step->parallel = team_parallel;
    step->qkv = a->qkv, step->out = a->attended;
    for (int64_t l = 0; l < m->num_layers; l++, step->kv += a->layer_stride) run_layer(m->layers + l, m, a);
    keep_rows(a->x, m->hidden, a->last, a->num_last);
    keep_rows(a->delta, m->hidden, a->last, a->num_last);
    add_norm(a->x, a->delta, m->final_norm, a->normed, a->num_last, m->hidden, m->eps, team_parallel, (int)step->threads);
    if (a->num_last) multiply(&m->head, a->normed, a->logits, a->num_last, step);
    team_dismiss(a->team);
    step->kv = kv, step->parallel = before;
}
