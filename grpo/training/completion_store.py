"""Completions of evaluations on disk, so that none is sampled twice: after a kill, or by the next arm of a sweep."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo.config.schema import Config
from grpo.runs.environment import environment
from grpo.runs.files import disk_errors_are_warnings
from grpo.runs.locations import outputs
from grpo.training.digests import weight_parts

Ids = list[list[int]]  # the tokens of a problem's completions


@dataclass(frozen=True)
class CompletionStore:
    """A file with one line of JSON for each problem: the digest of its prompt, its slot, and its completions' tokens.

    Lines are only appended, so several processes may use a file at once, and what one of them was writing when it was
    killed is ignored.
    """

    file: Path

    def read(self) -> dict[tuple[str, int], Ids]:
        """(prompt digest, slot) -> the stored completions."""
        found = {}
        for line in self.file.read_bytes().splitlines() if self.file.exists() else ():
            try:
                row = json.loads(line)
                found[row["prompt"], row["slot"]] = [[int(token) for token in ids] for ids in row["completions"]]
            except (ValueError, KeyError, TypeError):  # torn by a kill
                continue
        return found

    def append(self, rows: Mapping[tuple[str, int], Ids]) -> None:
        """Store completions, if the disk takes them."""
        lines = [
            json.dumps({"prompt": prompt, "slot": slot, "completions": ids}, separators=(",", ":"))
            for (prompt, slot), ids in rows.items()
        ]
        with disk_errors_are_warnings("completions of the evaluation"):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab") as file:  # a line break first, in case the last line is torn
                file.write(("\n" + "\n".join(lines) + "\n").encode())


def store_for(model: nn.Module, config: Config, sampling: Mapping[str, Any]) -> CompletionStore:
    """The store for completions of a model with these sampling parameters, computed as the config says.

    Its name is a digest of everything that the completions of a prompt depend on: weights, sampling, the seed if the
    temperature is not 0, the rollout engine, the settings of the computation, the processor and the libraries.
    """
    hardware = config.hardware
    first = next(model.parameters())
    facts = {
        "sampling": dict(sampling),
        "seed": config.seed if sampling["temperature"] > 0 else None,
        "engine": config.rollout["_target_"],
        "compute": [str(first.dtype), hardware.threads, hardware.rollout_tokens, config.deterministic],
        "environment": environment(first.device),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for part in weight_parts(model):
        digest.update(part)
    return CompletionStore(outputs() / "evaluations" / f"{digest.hexdigest()[:32]}.jsonl")


def prompt_digests(prompts: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """A digest of the tokens of each prompt; prompts, mask: (P, L), left-padded."""
    rows = zip(prompts.cpu(), mask.cpu().bool(), strict=True)
    return [hashlib.sha256(ids[chosen].numpy().tobytes()).hexdigest()[:16] for ids, chosen in rows]


def chunks(places: Sequence[int], size: int) -> Iterator[list[int]]:
    """Consecutive parts of at most `size` places."""
    for start in range(0, len(places), size):
        yield list(places[start : start + size])
