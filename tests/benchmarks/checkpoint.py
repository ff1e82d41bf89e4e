"""Measure the cost of saving checkpoints: without checkpoint.overlap ("in the way") and with it ("beside training").

python tests/benchmarks/checkpoint.py [MODEL]      a hub name or local folder; default: the embedded model

`paused` is the time in seconds that `save` takes, and `written` the time until everything is on disk. `lost` is how
much later a fixed number of forward and backward passes ends if a checkpoint is saved before them; they take longer
than the writing.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from grpo.config.schema import CheckpointConfig
from grpo.model.loading import model_source
from grpo.runs.checkpoint import TrainerState, weights_of
from grpo.runs.checkpoint_writer import CheckpointWriter
from grpo.runs.optimizer_state import flatten_optimizer

ROUNDS = 3


def work(model: torch.nn.Module, passes: int) -> float:
    """The time in seconds of `passes` forward and backward passes."""
    ids = torch.arange(64).repeat(4, 1) + 5
    started = time.perf_counter()
    for _ in range(passes):
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()
    return time.perf_counter() - started


def saved(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    """The state that a trainer passes to the checkpoint writer."""
    state = TrainerState(step=step, iteration=1)
    return {"model": weights_of(model), "optimizer": flatten_optimizer(optimizer), "reference": None, "trainer": state}


def main(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_source(name), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    work(model, 1)
    optimizer.step()  # creates its state
    size = 3 * sum(parameter.numel() * 4 for parameter in model.parameters()) / 1e9
    passes = max(3, int((0.2 + 4 * size) / work(model, 1)))
    print(f"{name}: {size:.3f} GB a checkpoint, {torch.get_num_threads()} threads, medians of {ROUNDS}")
    print(f"{'':>16} {'paused s':>9} {'written s':>10} {'lost s':>7}")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        savers = {
            text: CheckpointWriter(Path(folder) / text, CheckpointConfig(1, 1, 0, True, overlap), TrainerState())
            for text, overlap in (("in the way", False), ("beside training", True))
        }
        results: dict[str, list[tuple[float, ...]]] = {text: [] for text in savers}
        for step in range(1, 2 * ROUNDS, 2):
            alone = work(model, passes)
            for text, saver in savers.items():
                started = time.perf_counter()
                saver.save(saved(model, optimizer, step))
                paused = time.perf_counter() - started
                saver.close()
                written = time.perf_counter() - started
                started = time.perf_counter()
                saver.save(saved(model, optimizer, step + 1))
                work(model, passes)
                results[text].append((paused, written, time.perf_counter() - started - alone))
                saver.close()
        for text, rounds in results.items():
            paused, written, lost = (statistics.median(values) for values in zip(*rounds, strict=True))
            print(f"{text:>16} {paused:>9.3f} {written:>10.3f} {lost:>7.2f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "tiny")
