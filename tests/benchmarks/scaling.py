"""Measure how time and memory of the parts of a step grow with the group, the tokens, the prompt and the vocabulary.

python tests/benchmarks/scaling.py [--hidden 256] [--layers 8]

Uses a Llama with random weights and 2 prompts, in float32 on a CPU. `sample` and `update` are seconds: medians
of several rounds through all shapes, so that a slow moment of the machine does not affect one shape only. `linear` is
the time divided by that of the previous shape and by the growth of the work: 1.00 is linear. `memory` is what an update
needs in addition to the weights and their gradients, measured in a separate process for each shape, with micro-batches
of the same token budget. `activations` is `memory` without the gradient of the head or of the embedding, of which one
at a time is allocated a second time before it is added.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from grpo.algorithm.objective import Objective
from grpo.batch import Completions, Prompts
from grpo.counter_rng import group_keys
from grpo.model.hardware import peak_memory_gb
from grpo.model.linear import use_onednn
from grpo.model.packed import supports_packing
from grpo.rollout.engine import Sampling
from grpo.rollout.load_check import choose_implementation
from grpo.rollout.native import rollout
from grpo.training.update import Batch, accumulate_gradient

BASE = {"group": 8, "tokens": 64, "prompt": 64, "vocabulary": 8192}
SERIES = {"group": (16, 32, 64), "tokens": (64, 128, 256), "prompt": (64, 128, 256), "vocabulary": (32768, 151936)}
BUDGET = 1024  # tokens in a micro-batch
ROUNDS = 3
NUMBERS = {"beta": 0.0, "epsilon_low": 0.1, "epsilon_high": 0.1}
OBJECTIVE = Objective(ratio="token", surrogate="clip", reduction="row", kl="k3", **NUMBERS)


class Shape:
    """A model and a batch of one shape."""

    def __init__(self, args: argparse.Namespace, group: int, tokens: int, prompt: int, vocabulary: int) -> None:
        torch.manual_seed(0)
        self.model = self.make_model(args, vocabulary)
        self.set_batch(group, tokens, prompt, vocabulary)

    def make_model(self, args: argparse.Namespace, vocabulary: int) -> PreTrainedModel:
        config = AutoConfig.for_model(
            "llama",
            vocab_size=vocabulary,
            hidden_size=args.hidden,
            intermediate_size=4 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64,
            num_key_value_heads=max(1, args.hidden // 128),
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        use_onednn(model)
        choose_implementation(model)
        assert supports_packing(model)
        return model

    def set_batch(self, group: int, tokens: int, prompt: int, vocabulary: int) -> None:
        self.group, self.tokens, rows = group, tokens, 2 * group
        ids = torch.randint(5, vocabulary, (2, prompt))
        self.prompts = Prompts(ids, torch.ones_like(ids))
        completions = torch.randint(5, vocabulary, (rows, tokens))
        mask = torch.ones_like(completions)
        group = torch.arange(2).repeat_interleave(self.group)
        self.batch = Batch(self.prompts, Completions(completions, mask, mask, group), torch.randn(rows))

    def sample(self) -> None:
        sampling = Sampling(self.tokens, 1.0, (2,), 0, min_new_tokens=self.tokens)
        keys = group_keys(1, 1, np.arange(2), self.group)
        rollout(self.model, self.prompts, sampling, group_size=self.group, keys=keys, token_budget=2**40)

    def update(self) -> None:
        self.model.zero_grad(set_to_none=False)
        counts = self.batch.counts(max_length=self.tokens)
        accumulate_gradient(self.model, OBJECTIVE, self.batch, counts, temperature=1.0, token_budget=BUDGET)


def update_memory(args: argparse.Namespace, values: dict[str, int]) -> float:
    """GB that an update needs in addition to the weights and their gradients; must be called once per process."""
    shape = Shape(args, **values | {"group": 2, "tokens": 4, "prompt": 4})
    shape.update()  # loads everything that is loaded at the first use, and allocates the gradients
    shape.set_batch(**values)
    before = peak_memory_gb(torch.device("cpu"))
    shape.update()
    return peak_memory_gb(torch.device("cpu")) - before


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(update_memory(args, json.loads(args.memory_of)))
        return
    print(f"hidden {args.hidden}, {args.layers} layers, {torch.get_num_threads()} threads, {BASE} but for one of them")
    times = f"{'sample s':>9} {'linear':>7} {'update s':>9} {'linear':>7}"
    print(f"{'':>10} {'':>7} {times} {'memory GB':>10} {'activations GB':>15}")
    for name, sizes in SERIES.items():
        shapes = [Shape(args, **BASE | {name: size}) for size in sizes]
        times = {part: [[] for _ in shapes] for part in ("sample", "update")}
        for _ in range(ROUNDS + 1):
            for number, shape in enumerate(shapes):
                for part, results in times.items():
                    started = time.perf_counter()
                    getattr(shape, part)()
                    results[number].append(time.perf_counter() - started)
        medians = {part: [statistics.median(each[1:]) for each in results] for part, results in times.items()}
        for number, size in enumerate(sizes):
            columns = []
            for part in medians:
                seconds = medians[part][number]
                grown = seconds / medians[part][number - 1] / (size / sizes[number - 1]) if number else None
                columns.append(f"{seconds:>9.2f} {'' if grown is None else f'{grown:.2f}':>7}")
            shape = json.dumps(BASE | {name: size})
            command = [sys.executable, __file__, "--hidden", str(args.hidden), "--layers", str(args.layers)]
            done = subprocess.run([*command, "--memory-of", shape], capture_output=True, text=True, check=True)
            memory, gradients = float(done.stdout), 4 * args.hidden * (BASE | {name: size})["vocabulary"] / 1e9
            print(f"{name:>10} {size:>7} {' '.join(columns)} {memory:>10.3f} {memory - gradients:>15.3f}", flush=True)


if __name__ == "__main__":
    main()
