/* One token of each row through a model of the Llama family, on a processor.

   The plain form of the same computation is FastDecoder in llama_decoder.py. There, each layer of a token is about
   twenty operations, each of which passes over its input and waits for all threads. Here a token is one call. Large
   weights are read where the model keeps them, in float32 or bfloat16; everything else is computed in float32.

   Every number is computed by one thread, in an order that depends on neither the number of threads nor the other rows.
   So a row's results are the same bits no matter how many threads there are and which rows are decoded beside it.

   compiled_decoder.py has the same structures. Tensors are contiguous, with shapes (rows, columns) as in the comments.
   Columns that are multiplied are multiples of LANES. */

#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "vectors.h"

#define OUTPUTS 4 /* of a block of products */
#define PANEL 16  /* outputs whose small weights are stored together; also the unit in which threads share outputs */

/* The rows of a block of products, and of one with small weights, such that all sums of a block stay in registers. */
#if LANES == 16
#define ROWS 4
#define PANEL_ROWS 16
#elif LANES == 8
#define ROWS 2
#define PANEL_ROWS 6
#else
#define ROWS 4
#define PANEL_ROWS 4
#endif

/* y = weight x + bias, and up (down x) with a LoRA adapter. */
struct linear {
    const void *weight; /* (outputs, inputs), or small ones: (outputs / PANEL, inputs, PANEL) float32 */
    const float *bias;  /* (outputs), or NULL */
    const float *down;  /* (rank, inputs), or NULL */
    const float *up;    /* (outputs, rank) */
    int64_t outputs, inputs, rank;
    int64_t small;
};

struct layer {
    struct linear query, key, value, output, gate, up, down;
    const float *input_norm, *middle_norm;    /* (hidden) */
    const float *query_norm, *key_norm;       /* (size), or NULL */
    const float *prompt_keys, *prompt_values; /* (prompts, key heads, prompt width, size) */
    float *keys, *values;                     /* (all rows, key heads, most tokens, size) */
};

struct model {
    const struct layer *layers;
    struct linear head;
    const float *norm; /* (hidden) */
    int64_t layer_count, hidden, inner, heads, key_heads, size;
    int64_t prompt_width, most_tokens;
    float epsilon, scale; /* of the norms; of the scores of attention */
    int32_t narrow;       /* whether weights are bfloat16 */
    int32_t threads;
};

/* The rows that are decoded, and working memory. */
struct step {
    const int64_t *slot;          /* (rows), the row's place in `keys` and `values` */
    const int64_t *prompt;        /* (rows), the number of the row's prompt */
    const int64_t *prompt_length; /* (rows), tokens of this prompt */
    const float *cosine, *sine;   /* (rows, size), of the rotary positions */
    float *x;                     /* (rows, hidden), the token's embedding; overwritten */
    float *normed;                /* (rows, hidden) */
    float *heads;                 /* (rows, heads + 2 key heads, size) */
    float *attended;              /* (rows, heads * size) */
    float *gate, *up;             /* (rows, inner) */
    float *low_rank;              /* (rows, most_rank), three times */
    float *scores;                /* (threads, queries of a key head, `score_width`) */
    float *logits;                /* (rows, vocabulary), the result */
    int64_t rows, most_rank;
    int64_t position;             /* the number of tokens of each row before this one, without its prompt */
};

/* ---- Threads ---- */

struct thread {
    int number, count;
};

/* Wait for all threads: OpenMP's waiting threads spin for a moment and then sleep, see grpo/launch/process.py. */
static void join(void) {
#pragma omp barrier
}

/* The first of `count` items for a thread, in multiples of `unit`; the first of the next thread is its end. */
static int64_t share(int64_t count, int64_t unit, int number, int threads) {
    return number == threads ? count : count / unit * number / threads * unit;
}

/* ---- Products ---- */

INLINE vector load(const void *from, int64_t index, int narrow) {
    if (!narrow)
        return *(const vector *)((const float *)from + index);
    /* A bfloat16 is the upper half of a float32. */
    narrow_bits x = *(const narrow_bits *)((const uint16_t *)from + index);
    return (vector)(__builtin_convertvector(x, bits) << 16);
}

/* y[i][j] (+)= x[i] . weight[j] (+ bias[j]) for `rows` x `outputs`, which are constants here. */
INLINE void block(const float *x, const void *weight, const float *bias, float *y, int64_t inputs, int64_t x_stride,
                  int64_t y_stride, int add, int narrow, int rows, int outputs) {
    vector sums[ROWS * OUTPUTS];
    UNROLL for (int i = 0; i < rows * outputs; i++) sums[i] = (vector){0};
    for (int64_t k = 0; k < inputs; k += LANES) {
        vector w[OUTPUTS];
        UNROLL for (int j = 0; j < outputs; j++) {
            w[j] = load(weight, j * inputs + k, narrow);
            /* The weights of the next block, since most of a token's time is spent on reading them from memory. Into
               the second-level cache (2): the first one holds x. */
            __builtin_prefetch((const char *)weight + ((j + outputs) * inputs + k) * (narrow ? 2 : 4), 0, 2);
        }
        UNROLL for (int i = 0; i < rows; i++) {
            vector of_row = load(x, i * x_stride + k, 0);
            UNROLL for (int j = 0; j < outputs; j++) sums[i * outputs + j] += of_row * w[j];
        }
    }
    UNROLL for (int i = 0; i < rows; i++) {
        float *to = y + i * y_stride;
        if (outputs == OUTPUTS) {
            four found = sum_four(sums + OUTPUTS * i);
            if (bias)
                found += *(const unaligned_four *)bias;
            if (add)
                found += *(unaligned_four *)to;
            *(unaligned_four *)to = found;
        } else
            *to = (bias ? *bias : 0.0f) + sum(sums[i]) + (add ? *to : 0.0f);
    }
}

/* Outputs `begin` to `end` of y (+)= x weight^T (+ bias). */
INLINE void products(const float *x, const void *weight, const float *bias, float *y, int64_t rows, int64_t inputs,
                     int64_t x_stride, int64_t y_stride, int64_t begin, int64_t end, int add, int narrow) {
#define BLOCK(r, o)                                                                                                    \
    block(x + i * x_stride, (const char *)weight + j * inputs * (narrow ? 2 : 4), bias ? bias + j : NULL,              \
          y + i * y_stride + j, inputs, x_stride, y_stride, add, narrow, r, o)
    int64_t i, j;
    for (j = begin; j + OUTPUTS <= end; j += OUTPUTS) {
        for (i = 0; i + ROWS <= rows; i += ROWS) BLOCK(ROWS, OUTPUTS);
        for (; i + 2 <= rows; i += 2) BLOCK(2, OUTPUTS);
        for (; i < rows; i++) BLOCK(1, OUTPUTS);
    }
    for (; j < end; j++)
        for (i = 0; i < rows; i++) BLOCK(1, 1);
#undef BLOCK
}

/* y[i][0 .. PANEL] (+)= x[i] . weight (+ bias) for a panel of small weights and `rows`, which is a constant here. These
   weights are in a cache, and for few inputs it would take longer to add up the lanes of `block` than to multiply. */
INLINE void panel_block(const float *x, const float *weight, const float *bias, float *y, int64_t inputs,
                        int64_t y_stride, int add, int rows) {
    vector sums[PANEL_ROWS * PANEL / LANES];
    UNROLL for (int i = 0; i < rows * PANEL / LANES; i++) sums[i] = (vector){0};
    for (int64_t k = 0; k < inputs; k++)
        UNROLL for (int j = 0; j < PANEL / LANES; j++) {
            vector w = load(weight, k * PANEL + j * LANES, 0);
            UNROLL for (int i = 0; i < rows; i++) sums[i * PANEL / LANES + j] += x[i * inputs + k] * w;
        }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < PANEL / LANES; j++) {
            vector *to = (vector *)(y + i * y_stride + j * LANES);
            vector found = sums[i * PANEL / LANES + j];
            if (bias)
                found += load(bias, j * LANES, 0);
            if (add)
                found += *to;
            *to = found;
        }
}

/* `products` for small weights. */
static void small_products(const float *x, const float *weight, const float *bias, float *y, int64_t rows,
                           int64_t inputs, int64_t y_stride, int64_t begin, int64_t end, int add) {
    for (int64_t j = begin; j < end; j += PANEL) {
        const float *of_panel = bias ? bias + j : NULL;
        int64_t i = 0;
#define BLOCK(r)                                                                                                       \
    panel_block(x + i * inputs, weight + j * inputs, of_panel, y + i * y_stride + j, inputs, y_stride, add, r)
        for (; i + PANEL_ROWS <= rows; i += PANEL_ROWS) BLOCK(PANEL_ROWS);
        for (; i < rows; i++) BLOCK(1);
#undef BLOCK
    }
}

/* This thread's outputs of a linear layer. low_rank: working memory for its adapter. */
static void apply(const struct model *model, const struct linear *linear, const float *x, int64_t rows, float *y,
                  int64_t y_stride, int add, float *low_rank, const struct thread *thread) {
    int64_t begin = share(linear->outputs, PANEL, thread->number, thread->count);
    int64_t end = share(linear->outputs, PANEL, thread->number + 1, thread->count);
    int64_t inputs = linear->inputs, rank = linear->rank;
    if (linear->small)
        small_products(x, linear->weight, linear->bias, y, rows, inputs, y_stride, begin, end, add);
    else if (model->narrow) /* twice, so that it is a constant in the loops */
        products(x, linear->weight, linear->bias, y, rows, inputs, inputs, y_stride, begin, end, add, 1);
    else
        products(x, linear->weight, linear->bias, y, rows, inputs, inputs, y_stride, begin, end, add, 0);
    if (!linear->down)
        return;
    int64_t first = share(rank, PANEL, thread->number, thread->count);
    int64_t last = share(rank, PANEL, thread->number + 1, thread->count);
    products(x, linear->down, NULL, low_rank, rows, inputs, inputs, rank, first, last, 0, 0);
    join();
    products(low_rank, linear->up, NULL, y, rows, rank, rank, y_stride, begin, end, 1, 0);
}

/* ---- Norms ---- */

/* RMSNorm of one row, which may be overwritten. */
static void norm(const float *x, const float *weight, float *y, int64_t size, float epsilon) {
    vector squares = {0};
    for (int64_t k = 0; k < size; k += LANES) {
        vector part = load(x, k, 0);
        squares += part * part;
    }
    float scale = 1.0f / sqrtf(sum(squares) / size + epsilon);
    for (int64_t k = 0; k < size; k++)
        y[k] = x[k] * scale * weight[k];
}

/* The norms of this thread's rows. */
static void norm_rows(const struct model *model, const struct step *step, const float *weight,
                      const struct thread *thread) {
    int64_t hidden = model->hidden;
    int64_t end = share(step->rows, 1, thread->number + 1, thread->count);
    for (int64_t row = share(step->rows, 1, thread->number, thread->count); row < end; row++)
        norm(step->x + row * hidden, weight, step->normed + row * hidden, hidden, model->epsilon);
}

/* ---- Attention ---- */

/* Rotate the pairs (x[k], x[k + size / 2]) of a head by the angles of its position. */
static void rotate(float *restrict x, const float *restrict cosine, const float *restrict sine, int64_t size) {
    int64_t half = size / 2;
    for (int64_t k = 0; k < half; k++) {
        float first = x[k], second = x[k + half];
        x[k] = first * cosine[k] - second * sine[k];
        x[k + half] = second * cosine[k + half] + first * sine[k + half];
    }
}

/* y[0 .. vectors] += weights[t] values[t], t = 0 .. count. */
INLINE void add_values(const float *weights, const float *values, int64_t count, int64_t stride, float *y,
                       int vectors) {
    vector sums[4];
    UNROLL for (int j = 0; j < vectors; j++) sums[j] = load(y, j * LANES, 0);
    for (int64_t t = 0; t < count; t++)
        UNROLL for (int j = 0; j < vectors; j++) sums[j] += weights[t] * load(values, t * stride + j * LANES, 0);
    UNROLL for (int j = 0; j < vectors; j++) *(vector *)(y + j * LANES) = sums[j];
}

static void weighted_values(const float *weights, const float *values, int64_t count, int64_t stride, float *y,
                            int64_t size) {
    int64_t k = 0;
    for (; k + 4 * LANES <= size; k += 4 * LANES) add_values(weights, values + k, count, stride, y + k, 4);
    for (; k < size; k += LANES) add_values(weights, values + k, count, stride, y + k, 1);
}

/* Numbers in `scores` for a query. */
static int64_t score_width(const struct model *model) {
    return (model->prompt_width + model->most_tokens + PANEL - 1) / PANEL * PANEL;
}

/* scores -> e^(scale (score - largest)); returns the sum. There is space for a multiple of LANES. */
static float softmax(float *scores, int64_t count, float scale) {
    float most = largest(scores, count);
    for (int64_t t = count; t % LANES; t++) scores[t] = most;
    for (int64_t t = 0; t < count; t += LANES)
        *(vector *)(scores + t) = exponential((load(scores, t, 0) - most) * scale);
    return total(scores, count);
}

/* Attention of one row for the queries that share key head `head`. */
static void attend(const struct model *model, const struct step *step, const struct layer *layer, int64_t row,
                   int64_t head, float *scores) {
    int64_t size = model->size, key_heads = model->key_heads;
    int64_t group = model->heads / key_heads;
    float *heads = step->heads + row * (model->heads + 2 * key_heads) * size;
    float *queries = heads + head * group * size;
    float *key = heads + (model->heads + head) * size;
    const float *value = heads + (model->heads + key_heads + head) * size;
    const float *cosine = step->cosine + row * size, *sine = step->sine + row * size;
    int64_t cache = (step->slot[row] * key_heads + head) * model->most_tokens * size;
    float *own_keys = layer->keys + cache, *own_values = layer->values + cache;
    int64_t prompt = (step->prompt[row] * key_heads + head) * model->prompt_width * size;
    int64_t of_prompt = step->prompt_length[row], own = step->position + 1;
    int64_t width = score_width(model);

    if (layer->key_norm) {
        norm(key, layer->key_norm, key, size, model->epsilon);
        for (int64_t i = 0; i < group; i++)
            norm(queries + i * size, layer->query_norm, queries + i * size, size, model->epsilon);
    }
    rotate(key, cosine, sine, size);
    for (int64_t i = 0; i < group; i++) rotate(queries + i * size, cosine, sine, size);
    memcpy(own_keys + step->position * size, key, size * sizeof(float));
    memcpy(own_values + step->position * size, value, size * sizeof(float));

    products(queries, layer->prompt_keys + prompt, NULL, scores, group, size, size, width, 0, of_prompt, 0, 0);
    products(queries, own_keys, NULL, scores + of_prompt, group, size, size, width, 0, own, 0, 0);
    for (int64_t i = 0; i < group; i++) {
        float *of_query = scores + i * width;
        float *y = step->attended + (row * model->heads + head * group + i) * size;
        float of_all = softmax(of_query, of_prompt + own, model->scale);
        memset(y, 0, size * sizeof(float));
        weighted_values(of_query, layer->prompt_values + prompt, of_prompt, size, y, size);
        weighted_values(of_query + of_prompt, own_values, own, size, y, size);
        for (int64_t k = 0; k < size; k++) y[k] /= of_all;
    }
}

/* ---- A token ---- */

/* gate -> silu(gate) up */
static void multiply_silu(float *restrict gate, const float *restrict up, int64_t count) {
    for (int64_t k = 0; k < count; k += LANES) {
        vector x = load(gate, k, 0);
        *(vector *)(gate + k) = x / (exponential(-x) + 1.0f) * load(up, k, 0);
    }
}

static void decode_layer(const struct model *model, const struct step *step, const struct layer *layer,
                         const struct thread *thread) {
    int64_t rows = step->rows, size = model->size, inner = model->inner;
    int64_t of_queries = model->heads * size, of_keys = model->key_heads * size;
    int64_t stride = of_queries + 2 * of_keys;
    int64_t most = step->most_rank * rows;
    float *queries = step->heads, *keys = queries + of_queries, *values = keys + of_keys;

    norm_rows(model, step, layer->input_norm, thread);
    join();
    apply(model, &layer->query, step->normed, rows, queries, stride, 0, step->low_rank, thread);
    apply(model, &layer->key, step->normed, rows, keys, stride, 0, step->low_rank + most, thread);
    apply(model, &layer->value, step->normed, rows, values, stride, 0, step->low_rank + 2 * most, thread);
    join();

    /* All rows of a prompt one after the other, so that its keys and values stay in the cache of a processor. */
    int64_t width = score_width(model);
    float *scores = step->scores + thread->number * (model->heads / model->key_heads) * width;
    int64_t items = rows * model->key_heads;
    int64_t end = share(items, 1, thread->number + 1, thread->count);
    for (int64_t item = share(items, 1, thread->number, thread->count); item < end; item++)
        attend(model, step, layer, item % rows, item / rows, scores);
    join();
    apply(model, &layer->output, step->attended, rows, step->x, model->hidden, 1, step->low_rank, thread);
    join();

    norm_rows(model, step, layer->middle_norm, thread);
    join();
    apply(model, &layer->gate, step->normed, rows, step->gate, inner, 0, step->low_rank, thread);
    apply(model, &layer->up, step->normed, rows, step->up, inner, 0, step->low_rank + most, thread);
    int64_t first = share(inner, PANEL, thread->number, thread->count); /* the same columns as in `apply` */
    int64_t last = share(inner, PANEL, thread->number + 1, thread->count);
    for (int64_t row = 0; row < rows; row++)
        multiply_silu(step->gate + row * inner + first, step->up + row * inner + first, last - first);
    join();
    apply(model, &layer->down, step->gate, rows, step->x, model->hidden, 1, step->low_rank, thread);
    join();
}

/* Compute the logits after one more token of each row. */
void decode(const struct model *model, const struct step *step) {
#pragma omp parallel num_threads(model->threads)
    {
        struct thread thread = {omp_get_thread_num(), omp_get_num_threads()};
        for (int64_t i = 0; i < model->layer_count; i++) decode_layer(model, step, &model->layers[i], &thread);
        norm_rows(model, step, model->norm, &thread);
        join();
        apply(model, &model->head, step->normed, step->rows, step->logits, model->head.outputs, 0, step->low_rank,
              &thread);
    }
}
