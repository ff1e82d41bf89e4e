"""What a rollout engine is: the part that samples completions, named by `rollout._target_`."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo.batch import Completions, Prompts


@dataclass(frozen=True)
class Sampling:
    """How to draw completions."""

    max_new_tokens: int
    temperature: float  # 0: greedy decoding, which needs no noise
    stop_ids: tuple[int, ...]  # tokens that end a completion
    pad_id: int
    min_new_tokens: int = 0  # no stop token is drawn before this many tokens


@dataclass(frozen=True)
class Compute:
    """What an engine may use."""

    device: torch.device
    tokens: int  # whose keys and values may be held at once; never changes the result beyond rounding
    cuda_graphs: bool  # record the operations of a token on CUDA, where the engine can


class RolloutEngine(Protocol):
    """Samples completions. Built as `_target_(policy=..., tokenizer=..., compute=..., **settings)`.

    policy: the transformers model that computes in training. compute: a `Compute`. settings: the other keys of the
    config group rollout, but for temperature and min_new_tokens, which `generate` gets. An engine with a state that
    its results depend on has `state_dict()`, of JSON values, and `load_state_dict()` as well; it is saved with every
    checkpoint.
    """

    def generate(self, prompts: Prompts, sampling: Sampling, *, group_size: int, keys: Tensor) -> Completions:
        """`group_size` completions of each of P prompts, in the order of the prompts.

        keys: (P * group_size, 2) int32, one 64-bit seed for each completion (`grpo.counter_rng`). The same keys give
        the same completions, up to rounding, whatever else is sampled beside them. Greedy decoding ignores them.
        """

    def sync(self, policy: Any) -> None:
        """Take over the policy's weights. Called before `generate` where they may have changed."""

    def release(self) -> None:
        """Give back memory that the update may need. Called after a step's completions are complete."""

    def close(self) -> None:
        """End processes and give back all memory."""
