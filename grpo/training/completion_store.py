"""Completions of evaluations on disk, so that none is sampled twice: after a kill, or by the next arm of a sweep."""

import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import grpo
from grpo.config.schema import Config, known_keys
from grpo.model.lora import is_adapter_output
from grpo.runs.environment import environment
from grpo.runs.files import disk_errors_are_warnings
from grpo.runs.locations import outputs

logger = logging.getLogger(__name__)
PACKAGE = Path(grpo.__file__).parent
UNRELATED = ("_name_or_path", "transformers_version")  # settings of a model that change no number
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
        found: dict[tuple[str, int], Ids] = {}
        if not self.file.exists():
            return found
        try:
            lines = self.file.read_bytes().splitlines()
        except OSError as error:
            logger.warning("completions of earlier evaluations are not used: %s", error)
            return found
        for line in lines:
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


def store_for(model: PreTrainedModel, config: Config, sampling: Mapping[str, Any]) -> CompletionStore | None:
    """The store for completions of a model with these sampling parameters, computed as the config says.

    Its name is a digest of everything that the completions of a prompt depend on: the model's weights, settings and
    code, sampling, the seed if the temperature is not 0, the rollout engine, the settings of the computation, the
    processor, the libraries and the code of this suite. None for an engine of the user, whose code may change.
    """
    if not config.rollout["_target_"].startswith("grpo."):
        return None
    hardware = config.hardware
    engine = {name: value for name, value in config.rollout.items() if name not in known_keys("rollout")}
    settings = {name: value for name, value in model.config.to_dict().items() if name not in UNRELATED}
    parameters = dict(model.named_parameters())
    # A new adapter is drawn from the seed and changes nothing, so that the model is the one without it.
    has_adapter = any(bool(each.any()) for name, each in parameters.items() if is_adapter_output(name))
    facts = {
        "model": [type(model).__name__, settings, config.model.attn_implementation],
        "adapter": [config.model.lora.rank, config.model.lora.alpha] if config.model.lora and has_adapter else None,
        "peft": version("peft") if has_adapter else None,
        "sampling": dict(sampling),
        "seed": config.seed if sampling["temperature"] > 0 else None,
        "engine": engine,
        "compute": [hardware.threads, hardware.rollout_tokens, hardware.compiled_decoding],
        "deterministic": config.deterministic,
        "environment": [model.device.type, environment(model.device)],
        "code": _code_digest(type(model)),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, parameter in parameters.items():
        if ".lora_" in name and not has_adapter:
            continue
        shown = [name.replace(".base_layer", ""), list(parameter.shape), str(parameter.dtype)]
        digest.update(json.dumps(shown).encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return CompletionStore(outputs() / "evaluations" / f"{digest.hexdigest()[:32]}.jsonl")


def _code_digest(model_class: type) -> str:
    """A digest of this suite's code, and of a model's own code from the hub."""
    files = sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.[ch]")])
    own = inspect.getsourcefile(model_class)
    if not model_class.__module__.startswith("transformers.") and own is not None:
        files.append(Path(own))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def prompt_digests(prompts: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """A digest of the tokens of each prompt; prompts, mask: (P, L), left-padded."""
    rows = zip(prompts.cpu(), mask.cpu().bool(), strict=True)
    return [hashlib.sha256(ids[chosen].numpy().tobytes()).hexdigest()[:16] for ids, chosen in rows]


def chunks(places: Sequence[int], size: int) -> Iterator[list[int]]:
    """Consecutive parts of at most `size` places."""
    for start in range(0, len(places), size):
        yield list(places[start : start + size])
