"""Running out of memory: recognised on every device, and answered by working on fewer rows at a time."""

import gc
import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class TokenBudget:
    """How many tokens go through the model at once in one part of a step; halved for good where memory runs out.

    part: its name in messages. tokens: as configured.
    """

    def __init__(self, part: str, tokens: int) -> None:
        self._part = part
        self._configured = tokens
        self.tokens = tokens  # the number in use

    def run(self, work: Callable[[int], Result], least: int, most: int) -> Result:
        """`work(tokens)`, again with half the tokens whenever it runs out of memory.

        least, most: tokens of the longest row by itself, and of all the work. Work must leave nothing behind that a
        second try would add to. Raises RuntimeError where a single row is too much.
        """
        while True:
            try:
                return work(self.tokens)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._halve(error, least, most)
            # Outside of the handler, since the exception holds on to the tensors of its frames.
            _free()

    def _halve(self, error: BaseException, least: int, most: int) -> None:
        used = min(self.tokens, most)
        if used <= least:
            raise RuntimeError(
                f"out of memory in the {self._part} with one completion at a time; lower grpo.max_completion_length, "
                "or choose a smaller model or a lower model.dtype"
            ) from error
        self.tokens = used // 2
        logger.warning(
            "out of memory in the %s with %d tokens at a time; trying %d from here on", self._part, used, self.tokens
        )

    def state_dict(self) -> dict[str, int]:
        """What was halved, and from which configured number; empty where nothing was."""
        return {} if self.tokens == self._configured else {"from": self._configured, "to": self.tokens}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue with the reduced number, if there is one and no other is configured now."""
        is_reduced = bool(state) and state["from"] == self._configured
        self.tokens = state["to"] if is_reduced else self._configured


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the machine, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # Raised as plain RuntimeErrors by the allocators of CPU and MPS, and by NVIDIA's libraries, which allocate by
    # themselves; cuBLAS cannot even be initialized where no memory is left for it.
    said = str(error).lower().replace("_", " ")
    return any(sign in said for sign in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "alloc failed", "cublas status not initialized")


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
