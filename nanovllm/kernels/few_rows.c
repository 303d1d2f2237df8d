/* All layers of a decoder for a step of few tokens, in one call: what the caller's own steps would cost is gone.
 *
 * The formula is models/decoder.py's, operation by operation, from the same functions. Names: N tokens, E hidden size,
 * F intermediate size, Q = (H + 2 G) * D.
 */
#include "kernels.h"

typedef struct {
    const elem *input_norm, *post_norm; /* [E] */
    grouped_args qkv, out, gate_up, down;
} layer_weights;

typedef struct {
    const layer_weights *layers;
    int64_t num_layers, hidden;
    const elem *final_norm; /* [E] */
    grouped_args head;
    float eps;
} decoder_weights;

typedef struct {
    step_args *step;
    team *team;
    int64_t layer_stride;               /* elements from one layer's keys to the next's */
    elem *x, *delta, *normed;           /* [N, E]; x comes as the embedded tokens */
    elem *qkv, *attended;               /* [N, Q], [N, H * D] */
    elem *gate_up, *inner;              /* [N, 2 F], [N, F] */
    void *logits;                       /* [N, vocab] elem or float, as the head has it */
} few_rows_args;

static void multiply(const grouped_args *weight, const elem *x, void *y, const step_args *step) {
    grouped_args a = *weight;
    a.x = x, a.y = y, a.rows = step->num_tokens;
    grouped_linear(&a, step->parallel, (int)step->threads);
}

/* logits = head(norm(all layers(x))); the step's KV is in the pool after it. `delta` comes as zeros. */
void few_rows(const decoder_weights *m, const few_rows_args *a) {
    step_args *step = a->step;
    int64_t rows = step->num_tokens;
    parallel_fn before = step->parallel, parallel = team_parallel;
    int threads = (int)step->threads;
    elem *kv = step->kv;
    team_call(a->team);
    step->parallel = parallel;
    step->qkv = a->qkv, step->out = a->attended;
    for (int64_t l = 0; l < m->num_layers; l++, step->kv += a->layer_stride) {
        const layer_weights *w = m->layers + l;
        add_norm(a->x, a->delta, w->input_norm, a->normed, rows, m->hidden, m->eps, parallel, threads);
        multiply(&w->qkv, a->normed, a->qkv, step);
        attend_layer(step);
        multiply(&w->out, a->attended, a->delta, step);
        add_norm(a->x, a->delta, w->post_norm, a->normed, rows, m->hidden, m->eps, parallel, threads);
        multiply(&w->gate_up, a->normed, a->gate_up, step);
        silu_mul(a->gate_up, a->inner, rows, w->down.in, parallel, threads);
        multiply(&w->down, a->inner, a->delta, step);
    }
    add_norm(a->x, a->delta, m->final_norm, a->normed, rows, m->hidden, m->eps, parallel, threads);
    multiply(&m->head, a->normed, a->logits, step);
    team_dismiss(a->team);
    step->kv = kv, step->parallel = before;
}
