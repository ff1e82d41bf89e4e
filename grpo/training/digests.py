"""What a run depends on beside its config, as digests in digests.json: problems, prompts, tokenizer and base weights.

A resumed run would silently become another experiment if one of them had changed. All problems and the whole vocabulary
are included, but only some of the prompts, and of the weights the names and shapes of all tensors and some of their
values, so that it is fast; a change of a few single weights may remain unnoticed.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from grpo.config.errors import ConfigError
from grpo.config.reading import read_file
from grpo.config.schema import Config, on_resume
from grpo.data.problems import Problem
from grpo.data.prompts import render, template_arguments
from grpo.runs.checkpoint import file_digest
from grpo.runs.folder import RunFolder
from grpo.training.experiment import Experiment, compute_dtype

logger = logging.getLogger(__name__)
PROMPTS = 256  # prompts in the digest, evenly spaced: what they consist of has a digest of its own
VALUES = 4096  # values of each tensor in the digest of the weights, evenly spaced
# Each digest with what it stands for, and with the groups of the config that decide it.
NAMES = {
    "config": ("its config.yaml", ()),
    "problems": ("the problems of data", ("data",)),
    "prompts": ("the rendered prompts", ("data", "model")),
    "tokenizer": ("the tokenizer or its chat template", ("model", "tuning")),
    "weights": ("the weights of the starting model", ("model", "tuning")),
    "adapter": ("the adapter model.lora.init_from", ("model", "tuning")),
}


def digests_of(experiment: Experiment, folder: RunFolder, policy: nn.Module | None) -> dict[str, str]:
    """The digests of a run. policy: the starting model; without it there is no digest of the weights."""
    config = experiment.config
    splits = experiment.problems
    problems = [*splits.train, *splits.validation, *splits.test]
    arguments = template_arguments(config.data)
    shown = problems[:: -(-len(problems) // PROMPTS) or 1]
    tokenizer = experiment.tokenizer
    found = {
        "config": config_digest(folder),
        "problems": _digest(_json(_fields(problem)) for problem in problems),
        "prompts": _digest(render(tokenizer, each, arguments).encode() for each in experiment.conversations(shown)),
        "tokenizer": tokenizer_digest(tokenizer),
    }
    if policy is not None:
        found["weights"] = weights_digest(policy, config)
    if config.model.lora is not None and config.model.lora.init_from is not None:
        found["adapter"] = file_digest(Path(config.model.lora.init_from, "adapter_model.safetensors"))
    return found


def _fields(problem: Problem) -> dict[str, Any]:
    """Everything of a problem that a run sees."""
    fields = {name: getattr(problem, name) for name in ("id", "question", "answer", "columns")}
    return fields | ({"turns": problem.turns} if problem.turns else {})


def config_digest(folder: RunFolder) -> str:
    """The digest of a run's config.yaml."""
    return _digest([read_file(folder.config_file)])


def check_digests(folder: RunFolder, found: Mapping[str, str], changed: Collection[str], accept: bool) -> list[str]:
    """Compare digests with those of the run, and return the names of those that differ.

    changed: the keys and groups that the command line sets; what they decide is not compared. accept: whether to log
    differences instead of raising ConfigError. A run of an earlier version has no digests, and nothing is compared.
    """
    differing = [
        name
        for name, before in folder.digests().items()
        if name in found and not _is_equal(before, found[name]) and not _decided_by(changed, name)
    ]
    if not differing:
        return []
    what = " and ".join(NAMES[name][0] for name in differing)
    text = f"{folder.path}: {what} changed since the run was started"
    if not accept:
        raise ConfigError(f"{text}; restore {'it' if len(differing) == 1 else 'them'}, or add accept_changes=true")
    logger.warning("%s (accept_changes=true)", text)
    return differing


def kept_by_fork(digests: Mapping[str, str], changed: Collection[str]) -> dict[str, str]:
    """The digests of a run that also hold for a fork of it, in which these keys and groups are changed."""
    if "experiment" in changed:  # which can change everything
        return {}
    return {
        name: digest
        for name, digest in digests.items()
        if name in NAMES and name != "config" and not _decided_by(changed, name)
    }


def _decided_by(changed: Collection[str], name: str) -> bool:
    """Whether one of the changed keys and groups can decide what a digest stands for."""
    keys = [key.replace("/", ".") for key in changed]
    if name == "prompts" and "reward" in keys:  # whose file may set the system prompt
        return True
    # Keys that a resumed run may change, such as model.device_map, decide none.
    groups = {key.partition(".")[0] for key in keys if on_resume(key) not in ("free", "rounding")}
    return not groups.isdisjoint(NAMES[name][1])


def _is_equal(before: str, now: str) -> bool:
    """Whether two digests are equal. Those of weights that are rounded in different ways cannot be compared."""
    return before == now or before.rpartition(":")[0] != now.rpartition(":")[0]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The digest of a tokenizer's vocabulary, special tokens and chat template."""
    special = {name: getattr(tokenizer, name, None) for name in ("eos_token_id", "bos_token_id", "chat_template")}
    return _digest([_json(special), *(_json(pair) for pair in sorted(tokenizer.get_vocab().items()))])


def weights_digest(model: nn.Module, config: Config) -> str:
    """The digest of a starting model's weights, without those of an adapter.

    With an adapter they are rounded to the compute dtype, in which training loads them, unless the model has fewer
    bits.
    """
    dtype = compute_dtype(config) if config.model.lora is not None else getattr(torch, config.model.dtype)
    own = next(model.parameters()).dtype
    if torch.promote_types(own, dtype) != own:
        dtype = own
    return f"{str(dtype).removeprefix('torch.')}:{_digest(_values(model, dtype))}"


def _values(model: nn.Module, dtype: torch.dtype) -> Iterable[bytes]:
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # drawn from the seed, or in the digest `adapter`
            continue
        yield _json([name.replace(".base_layer", ""), list(parameter.shape)])
        yield _sample(parameter.detach().reshape(-1), dtype)


def _sample(values: Tensor, dtype: torch.dtype) -> bytes:
    """The bytes of at most VALUES of the values, evenly spaced, always with the last one."""
    step = -(-len(values) // VALUES) or 1
    chosen = torch.cat([values[::step], values[-1:]])
    return chosen.to(dtype).cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()
