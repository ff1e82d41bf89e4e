"""The interface of rollout engines, which sample completions. `rollout._target_` selects one."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo.batch import Completions, Prompts


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
    cuda_graphs: bool  # decode with CUDA graphs, if the engine can


class RolloutEngine(Protocol):
    """Samples completions. Built as `_target_(policy=..., tokenizer=..., compute=..., **settings)`.

    policy: the transformers model that computes in training. compute: a `Compute`. settings: the other keys of the
    config group rollout, except temperature and min_new_tokens, which are passed to `generate`. An engine whose results
    depend on a state also has `state_dict()`, which returns JSON values, and `load_state_dict()`; the state is saved
    with every checkpoint.
    """

    def generate(self, prompts: Prompts, sampling: Sampling, *, group_size: int, keys: Tensor) -> Completions:
        """Sample `group_size` completions of each of P prompts, in the order of the prompts.

        keys: (P * group_size, 2) int32, one 64-bit seed for each completion (`grpo.counter_rng`). The same keys give
        the same completions, up to rounding, independent of the other rows. Greedy decoding ignores them.
        """

    def sync(self, policy: Any) -> None:
        """Update the engine to the policy's weights. Called before `generate` if they may have changed."""

    def release(self) -> None:
        """Release memory that the update may need. Called after a step's completions are sampled."""

    def close(self) -> None:
        """End processes and release all memory."""
