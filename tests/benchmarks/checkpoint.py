"""What saving costs: seconds that training stands still and seconds of writing, in its way and beside it.

python tests/benchmarks/checkpoint.py [MODEL]      a hub name or local folder; default: the embedded model

Between saves the model is trained on forward and backward passes, so that writing beside training has to share the
machine with them; the last column is how much longer those passes take meanwhile.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from grpo.config import CheckpointConfig
from grpo.engine.model import model_source
from grpo.run.checkpoint import TrainerState
from grpo.run.saver import Saver

ROUNDS = 3


def work(model: torch.nn.Module, seconds: float) -> float:
    """Passes a second over at least so many seconds."""
    ids = torch.arange(64).repeat(4, 1) + 5
    started, passes = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        model(input_ids=ids, labels=ids).loss.backward()
        passes += 1
    return passes / (time.perf_counter() - started)


def measure(saver: Saver, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> tuple[float, float]:
    """Seconds paused, and seconds until all is on the disk."""
    started = time.perf_counter()
    saver.save(model, optimizer, None, TrainerState(step=step, iteration=1))
    paused = time.perf_counter() - started
    saver.close()
    return paused, time.perf_counter() - started


def main(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_source(name), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    work(model, 0.1)
    optimizer.step()  # makes its state
    size = 3 * sum(parameter.numel() * 4 for parameter in model.parameters()) / 1e9
    print(f"{name}: {size:.3f} GB a checkpoint, {torch.get_num_threads()} threads, medians of {ROUNDS}")
    print(f"{'':>16} {'paused s':>9} {'written after s':>16} {'passes slower by':>17}")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        savers = {
            text: Saver(Path(folder) / text, CheckpointConfig(1, 1, 0, True, overlap), TrainerState())
            for text, overlap in (("in the way", False), ("beside training", True))
        }
        results: dict[str, list[tuple[float, float]]] = {text: [] for text in savers}
        slower = []
        for step in range(1, ROUNDS + 1):
            for text, saver in savers.items():
                results[text].append(measure(saver, model, optimizer, step))
            written = results["beside training"][-1][1]
            alone = work(model, max(0.5, written))
            savers["beside training"].save(model, optimizer, None, TrainerState(step=100 + step, iteration=1))
            slower.append(alone / work(model, max(0.05, 0.8 * written)) - 1)
            savers["beside training"].close()
        for text, pairs in results.items():
            paused, written = (statistics.median(values) for values in zip(*pairs, strict=True))
            share = f"{statistics.median(slower):.0%}" if text == "beside training" else "-"
            print(f"{text:>16} {paused:>9.3f} {written:>16.3f} {share:>17}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "tiny")
