"""Compare the time per token of counter-based noise (Gumbel-max), torch.multinomial, and the model's decode step.

python tests/benchmarks/noise.py [MODEL]      a hub name or local folder; default: the embedded model
"""

import statistics
import sys
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from grpo.counter_rng import gumbel_noise, row_keys
from grpo.model.kv_cache import extend
from grpo.model.loading import model_source

PROMPT_TOKENS, ROUNDS = 80, 15


def read(model: PreTrainedModel, cache: DynamicCache, ids: torch.Tensor) -> torch.Tensor:
    """Append `ids` to the cache, and return the hidden states (rows, H) of their last token."""
    start = cache.get_seq_length()
    mask = torch.ones(len(ids), start + ids.shape[1], dtype=torch.long)
    position_ids = torch.arange(start, start + ids.shape[1]).expand_as(ids)
    return extend(model, cache, ids, mask, position_ids)[:, -1]


@torch.no_grad()
def main(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_source(name), dtype=torch.float32).eval()
    vocab_size = model.config.vocab_size
    print(f"{name}: vocabulary {vocab_size}, {torch.get_num_threads()} threads, milliseconds a token, medians")
    print(f"{'rows':>5} {'decode':>9} {'noise':>9} {'multinomial':>12} {'noise / decode':>15}")
    for rows in (1, 8, 16, 32):
        keys = row_keys(1, 1, np.arange(rows), np.arange(rows))
        cache = DynamicCache(config=model.config)
        read(model, cache, torch.full((rows, PROMPT_TOKENS), 5))
        seconds = {"decode": [], "noise": [], "multinomial": []}
        for token in range(ROUNDS):
            started = time.perf_counter()
            logits = model.get_output_embeddings()(read(model, cache, torch.full((rows, 1), 7)))
            decoded = time.perf_counter()
            (logits + gumbel_noise(keys, token, vocab_size)).argmax(dim=1)
            drawn = time.perf_counter()
            torch.multinomial(logits.softmax(dim=1), 1)
            seconds["decode"].append(decoded - started)
            seconds["noise"].append(drawn - decoded)
            seconds["multinomial"].append(time.perf_counter() - drawn)
        decode, noise, multinomial = (1000 * statistics.median(values) for values in seconds.values())
        print(f"{rows:>5} {decode:>9.2f} {noise:>9.2f} {multinomial:>12.2f} {noise / decode:>15.1%}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "tiny")
