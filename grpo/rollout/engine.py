"""The interface of rollout engines, which sample completions. `rollout._target_` selects one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo.batch import Completions, Prompts

OnTokens = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters."""

    max_new_tokens: int
    temperature: float  # 0: greedy decoding, which needs no noise
    stop_ids: tuple[int, ...]  # tokens that end a completion
    pad_id: int
    min_new_tokens: int = 0  # no stop token is sampled before this many tokens


@dataclass(frozen=True)
class Compute:
    """The resources that an engine may use."""

    device: torch.device
    tokens: int  # maximum tokens in the key-value cache; changes results only by rounding


class RolloutEngine(Protocol):
    """Samples completions. Built as `_target_(policy=..., tokenizer=..., compute=..., **settings)`.

    policy: the transformers model that computes in training. compute: a `Compute`. settings: the other keys of the
    config group rollout, except temperature and min_new_tokens, which are passed to `generate`. An engine whose results
    depend on a state also has `state_dict()`, which returns JSON values, and `load_state_dict()`; the state is saved
    with every checkpoint.
    """

    def generate(
        self, prompts: Prompts, sampling: Sampling, *, group_size: int, keys: Tensor, on_tokens: OnTokens | None = None
    ) -> Completions:
        """Sample `group_size` completions of each of P prompts, all of the first prompt first.

        keys: (P * group_size, 2) int32, one 64-bit seed for each completion (`grpo.counter_rng`). The same keys give
        the same completions, up to rounding, independent of the other rows. Greedy decoding ignores them.

        on_tokens: called during decoding with completions' numbers and their next tokens, (n,) each. It is given only
        for `grpo chat`, which without this parameter shows a whole completion at once.
        """

    def sync(self, policy: Any) -> None:
        """Update the engine to the policy's weights. Called before `generate` if they have changed."""

    def release(self) -> None:
        """Release memory that the update may need. Called after a step's completions are sampled."""

    def close(self) -> None:
        """End processes and release all memory."""


def sample_completions(
    engine: RolloutEngine, prompts: Prompts, sampling: Sampling, *, group_size: int, keys: Tensor, **streaming: OnTokens
) -> Completions:
    """Sample with an engine and check the result. Raises RuntimeError if it is not as `RolloutEngine` describes it."""
    completions = engine.generate(prompts, sampling, group_size=group_size, keys=keys, **streaming)
    rows = len(prompts.ids) * group_size
    width = completions.ids.shape[-1]
    group = torch.arange(len(prompts.ids)).repeat_interleave(group_size)  # (B,)
    problems = [
        f"{name} has the shape {tuple(value.shape)}; it must be ({rows}, {width})"
        for name in ("ids", "attention_mask", "completion_mask", "sampling_logps")
        if (value := getattr(completions, name)) is not None and value.shape != (rows, width)
    ]
    if not torch.equal(completions.group.cpu(), group):
        problems.append(f"group must be (0, 0, ..., 1, 1, ...), each number {group_size} times")
    if problems:
        raise RuntimeError(f"{type(engine).__name__}.generate() returned wrong completions: {problems[0]}")
    return completions
