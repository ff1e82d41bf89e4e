"""Out-of-memory errors: recognised on every device, and handled by processing fewer rows at a time."""

import gc
import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class TokenBudget:
    """Number of tokens that one part of a step processes at once; halved permanently when memory runs out.

    part: the name of the part in messages. tokens: the configured number.
    """

    def __init__(self, part: str, tokens: int) -> None:
        self._part = part
        self._configured = tokens
        self.tokens = tokens  # the number in use

    def run(self, work: Callable[[int], Result], least: int, most: int) -> Result:
        """Return `work(tokens)`; retry it with half the tokens whenever it runs out of memory.

        least: tokens of the longest row; most: tokens of all rows. A failed `work` must leave no partial results that
        a retry would add to. Raises RuntimeError if a single row needs too much memory.
        """
        while True:
            try:
                return work(self.tokens)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._halve(error, least, most)
            # After the handler, since the exception keeps the tensors of its frames alive.
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
            "out of memory in the %s with %d tokens at a time; trying %d from now on", self._part, used, self.tokens
        )

    def state_dict(self) -> dict[str, int]:
        """The configured and the reduced number of tokens; empty if the number was not reduced."""
        return {} if self.tokens == self._configured else {"from": self._configured, "to": self.tokens}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the reduced number, unless the configured number has changed. Raises ValueError for another state."""
        if state and not all(type(state[name]) is int and state[name] > 0 for name in ("from", "to")):
            raise ValueError(f"from and to must be numbers of tokens, not {dict(state)}")
        is_reduced = bool(state) and state["from"] == self._configured
        self.tokens = state["to"] if is_reduced else self._configured


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device or the machine is out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The allocators of CPU and MPS raise plain RuntimeErrors, and so do NVIDIA's libraries, which allocate memory
    # themselves; cuBLAS fails to initialize if no memory is left for it.
    message = str(error).lower().replace("_", " ")
    return any(sign in message for sign in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "alloc failed", "cublas status not initialized")


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
