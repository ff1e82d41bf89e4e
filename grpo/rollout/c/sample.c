/* Choose the next token of each row. The plain form is `sample_tokens` in native.py, with the noise of
   counter_rng.py. */

#include <stdint.h>

#include "vectors.h"

#define CHUNK 512 /* tokens whose values stay in the fastest cache */

struct sample {
    const float *logits; /* (rows, vocabulary) */
    const int32_t *keys; /* (rows, 2), of the noise, from `token_keys` */
    const int64_t *stops; /* (stop_count), tokens that end a completion */
    int64_t *tokens;      /* (rows), the result */
    float *logps;         /* (rows), the log-probabilities of these tokens; 0 for greedy decoding */
    int64_t rows, vocabulary, stop_count;
    float temperature;  /* 0: greedy decoding, without noise */
    int32_t no_stops;   /* whether to leave out the tokens that end a completion */
    int32_t threads;
};

/* `noise_from` in counter_rng.py, which has the explanations. */
INLINE float gumbel_noise(uint32_t token, uint32_t first, uint32_t second) {
    uint32_t x = token * 0x9E3779B9u ^ first;
    x = (x ^ x >> 16) * 0x7FEB352Du + second;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    x ^= x >> 16;
    float u = ((float)(int32_t)(x & 0x7FFFFFFFu) + 0.5f) * 0x1p-31f;
    u = u > 1.0f - 0x1p-24f ? 1.0f - 0x1p-24f : u;
    float rest = 1.0f - u; /* log(1 - u) = log rest + what was rounded away in rest */
    return -logarithm(-(logarithm(rest) + (1.0f - rest - u) / rest));
}

static void sample_row(const struct sample *sample, int64_t row) {
    const float *logits = sample->logits + row * sample->vocabulary;
    uint32_t first = (uint32_t)sample->keys[2 * row], second = (uint32_t)sample->keys[2 * row + 1];
    int greedy = sample->temperature == 0.0f;
    float temperature = greedy ? 1.0f : sample->temperature;
    float most = largest(logits, sample->vocabulary) / temperature;
    float best = -INFINITY, sum_of_all = 0.0f;
    int64_t token = 0;
    float values[CHUNK], powers[CHUNK];

    for (int64_t start = 0; start < sample->vocabulary; start += CHUNK) {
        int64_t left = sample->vocabulary - start, count = left < CHUNK ? left : CHUNK;
        for (int64_t k = 0; k < count; k++) values[k] = logits[start + k] / temperature;
        for (int64_t k = count; k % LANES; k++) values[k] = most;
        if (!greedy) {
            for (int64_t k = 0; k < count; k += LANES)
                *(vector *)(powers + k) = exponential(*(vector *)(values + k) - most);
            sum_of_all += total(powers, count);
            for (int64_t k = 0; k < count; k++) values[k] += gumbel_noise((uint32_t)(start + k), first, second);
        }
        if (sample->no_stops)
            for (int64_t i = 0; i < sample->stop_count; i++)
                if (sample->stops[i] >= start && sample->stops[i] < start + count)
                    values[sample->stops[i] - start] = -INFINITY;
        float found = largest(values, count);
        if (found > best) { /* the first of equal values */
            best = found;
            for (token = start; values[token - start] != best;) token++;
        }
    }
    sample->tokens[row] = token;
    if (greedy)
        sample->logps[row] = 0.0f;
    else if (isfinite(sum_of_all))
        sample->logps[row] = logits[token] / temperature - (most + logarithm(sum_of_all));
    else
        sample->logps[row] = NAN;
}

void sample(const struct sample *sample) {
#pragma omp parallel for num_threads(sample->threads) schedule(static)
    for (int64_t row = 0; row < sample->rows; row++) sample_row(sample, row);
}
