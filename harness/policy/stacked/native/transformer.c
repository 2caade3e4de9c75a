/* Decoder layers of one cell on one thread in float32: forward, and the gradients of its weights. See `engine.py`.

   Tokens form trees: each has a parent, the token before it in its sequence, and attends to its ancestors and itself.
   So a prefix that sequences share is computed once, nothing is padded, and no result depends on other sequences.
   Matrices are row by row; weights are [in, out]. Widths are multiples of sixteen. */

#include "products.h"
#include "tree_attention.h"

/* out [rows, columns] = x [rows, inner] · weight [inner, columns], added to what is there where beta is not 0. */
static void linear(int64_t rows, int columns, int inner, const float *x, const float *weight, float beta, float *out)
{
    product(rows, columns, inner, (view_t){x, inner, 1}, weight, beta, out);
}

/* d_x [rows, inner] and d_weight [inner, columns] from grad [rows, columns]; `turned` has room for the weight. */
static void linear_backward(int64_t rows, int columns, int inner, const float *grad, const float *x, const float *weight,
                            float *turned, float *d_x, float *d_weight, float *d_bias)
{
    transpose(weight, inner, columns, turned);
    product(rows, inner, columns, (view_t){grad, columns, 1}, turned, 0.0f, d_x);
    product(inner, columns, rows, (view_t){x, 1, inner}, grad, 0.0f, d_weight);
    bias_backward(grad, rows, columns, d_bias, turned);
}

/* Numbers that `saved_t` takes for a layer; `attended` is the sum over tokens of the tokens that each attends to. */
int64_t layer_numbers(const model_t *m, int64_t count, int64_t attended)
{
    int64_t per_token = 4 * m->hidden + m->heads * m->head_dim + 3 * m->intermediate, one = (count + 15) & ~(int64_t)15;
    return (count * per_token + 2 * one + attended * m->heads + 16 + 15) & ~(int64_t)15;
}

static saved_t layer_memory(const model_t *m, int64_t count, float *at)
{
    int64_t D = count * m->hidden, I = count * m->intermediate, one = (count + 15) & ~(int64_t)15;
    saved_t s;
    s.x1 = at, s.h1 = s.x1 + D, s.attn = s.h1 + D, s.x2 = s.attn + count * m->heads * m->head_dim;
    s.h2 = s.x2 + D, s.gate_up = s.h2 + D, s.act = s.gate_up + 2 * I;
    s.inverse1 = s.act + I, s.inverse2 = s.inverse1 + one, s.probs = s.inverse2 + one;
    return s;
}

/* The same from some row on; `row` and `output` count tokens and outputs, `probs` numbers. */
static saved_t advanced(const model_t *m, saved_t s, int64_t row, int64_t output, int64_t probs)
{
    s.x1 += row * m->hidden, s.h1 += row * m->hidden, s.inverse1 += row;
    s.attn += output * m->heads * m->head_dim, s.x2 += output * m->hidden, s.inverse2 += output, s.h2 += output * m->hidden;
    s.gate_up += output * 2 * m->intermediate, s.act += output * m->intermediate, s.probs += probs;
    return s;
}

/* Room for a number per token of the longest sequence, and the vectors that go beyond it. */
static int64_t sequence_room(const model_t *m) { return ((int64_t)m->context + 31) & ~(int64_t)15; }

/* Integers that a pass over so many tokens needs as scratch: a sequence's rows, weights of its attention, and walks. */
int64_t integers(const model_t *m, int64_t count) { return 2 * sequence_room(m) + walk_numbers(count); }

/* A pass over new tokens: their queries, keys and values, and the final, normalised states of the outputs. */
void forward(const model_t *m, const weights_t *w, const tokens_t *t, const memory_t *memory, int32_t *chain)
{
    float *scores = (float *)chain + sequence_room(m);
    walk_t all, some, *walk = NULL;
    if (t->start == 0) {
        walks(t, t->outputs, t->num_outputs, chain + 2 * sequence_room(m), &all, &some);
        walk = &all;
    }
    int D = m->hidden, A = m->heads * m->head_dim, I = m->intermediate, W = qkv_width(m), keep = (int)memory->keep;
    int64_t row = keep ? t->start : 0, output = keep ? memory->outputs : 0;
    float *last_x = memory->last_x + output * D, *last_inverse = memory->last_inverse + output;
    float *x = layer_memory(m, memory->capacity, memory->saved).x1 + row * D;
    for (int64_t i = 0; i < t->count; i++) memcpy(x + i * D, w->embedding + t->tokens[i] * D, sizeof(float) * D);
    for (int l = 0; l < m->layers; l++) {
        const layer_t *p = &w->layer[l];
        int last = l == m->layers - 1;
        const int64_t *chosen = last ? t->outputs : NULL;
        int64_t rows = last ? t->num_outputs : t->count, attended = last ? memory->attended_outputs : memory->attended;
        saved_t s = layer_memory(m, memory->capacity, memory->saved + l * memory->saved_stride);
        s = advanced(m, s, row, last ? output : row, keep ? attended * m->heads : 0);
        float *qkv = memory->qkv + l * memory->qkv_stride, *own = qkv + t->start * W;
        rms_forward(s.x1, p->input_norm, t->count, D, m->eps, s.inverse1, s.h1);
        linear(t->count, W, D, s.h1, p->qkv, 0.0f, own);
        add_bias(own, p->qkv_bias, t->count, W);
        rotate(m, own, t->positions, t->count, 1.0f);
        attention(m, t, chosen, rows, walk && last ? &some : walk, qkv, s.attn, s.probs, keep, chain, scores);
        if (last) gather(s.x1, chosen, rows, D, s.x2);
        else memcpy(s.x2, s.x1, sizeof(float) * rows * D);
        linear(rows, D, A, s.attn, p->out, 1.0f, s.x2);
        add_bias(s.x2, p->out_bias, rows, D);
        rms_forward(s.x2, p->mlp_norm, rows, D, m->eps, s.inverse2, s.h2);
        linear(rows, 2 * I, D, s.h2, p->gate_up, 0.0f, s.gate_up);
        add_bias(s.gate_up, p->gate_up_bias, rows, 2 * I);
        swiglu(s.gate_up, rows, I, s.act);
        x = last ? last_x : layer_memory(m, memory->capacity, memory->saved + (l + 1) * memory->saved_stride).x1 + row * D;
        memcpy(x, s.x2, sizeof(float) * rows * D);
        linear(rows, D, I, s.act, p->down, 1.0f, x);
        add_bias(x, p->down_bias, rows, D);
    }
    rms_forward(last_x, w->norm, t->num_outputs, D, m->eps, last_inverse, memory->hidden + output * D);
}

/* Numbers that `backward` needs as scratch. */
int64_t backward_numbers(const model_t *m, int64_t count)
{
    int64_t width = m->hidden > m->heads * m->head_dim ? m->hidden : m->heads * m->head_dim;
    int64_t widest = 2 * m->intermediate > qkv_width(m) ? 2 * m->intermediate : qkv_width(m);
    int64_t per_token = 2 * m->hidden + m->heads * m->head_dim + 3 * m->intermediate + qkv_width(m);
    return count * per_token + width * widest + sequence_room(m);
}

/* Gradients `g` of a cell's weights from those of the states that passes with `keep` gave, of all tokens from the first
   on; `embedding` is added to. */
void backward(const model_t *m, const weights_t *w, const tokens_t *t, const memory_t *memory, int32_t *chain,
              const float *d_hidden, float *scratch, weights_t *g)
{
    int D = m->hidden, A = m->heads * m->head_dim, I = m->intermediate, W = qkv_width(m);
    int64_t rows = t->num_outputs;
    float *grad = scratch, *d_h = grad + t->count * D, *d_attn = d_h + t->count * D, *d_act = d_attn + t->count * A;
    float *d_gate_up = d_act + t->count * I, *d_qkv = d_gate_up + 2 * t->count * I, *d_scores = d_qkv + t->count * W;
    float *turned = d_scores + sequence_room(m);
    walk_t all, some;
    walks(t, t->outputs, t->num_outputs, chain + 2 * sequence_room(m), &all, &some);
    memset(grad, 0, sizeof(float) * rows * D);
    rms_backward(d_hidden, memory->last_x, memory->last_inverse, w->norm, rows, D, grad, g->norm, turned);
    for (int l = m->layers - 1; l >= 0; l--) {
        const layer_t *p = &w->layer[l], *d = &g->layer[l];
        const float *qkv = memory->qkv + l * memory->qkv_stride;
        saved_t s = layer_memory(m, memory->capacity, memory->saved + l * memory->saved_stride);
        const int64_t *chosen = l == m->layers - 1 ? t->outputs : NULL;
        linear_backward(rows, D, I, grad, s.act, p->down, turned, d_act, d->down, d->down_bias);
        swiglu_backward(s.gate_up, d_act, rows, I, d_gate_up);
        linear_backward(rows, 2 * I, D, d_gate_up, s.h2, p->gate_up, turned, d_h, d->gate_up, d->gate_up_bias);
        rms_backward(d_h, s.x2, s.inverse2, p->mlp_norm, rows, D, grad, d->mlp_norm, turned);
        linear_backward(rows, D, A, grad, s.attn, p->out, turned, d_attn, d->out, d->out_bias);
        memset(d_qkv, 0, sizeof(float) * t->count * W);
        attention_backward(m, t, chosen, rows, chosen ? &some : &all, qkv, s.probs, d_attn, d_qkv, chain, d_scores);
        rotate(m, d_qkv, t->positions, t->count, -1.0f);
        linear_backward(t->count, W, D, d_qkv, s.h1, p->qkv, turned, d_h, d->qkv, d->qkv_bias);
        if (chosen) {
            spread(grad, chosen, rows, t->count, D);
            rows = t->count;
        }
        rms_backward(d_h, s.x1, s.inverse1, p->input_norm, rows, D, grad, d->input_norm, turned);
    }
    for (int64_t i = 0; i < t->count; i++)
        for (int k = 0; k < D; k += 16)
            *(v16 *)(g->embedding + t->tokens[i] * D + k) += *(const v16 *)(grad + i * D + k);
}
