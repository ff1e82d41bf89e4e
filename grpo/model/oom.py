"""Running out of memory: recognised on every device, and answered by working on fewer rows at a time."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Cut:
    """How many tokens go through the model at once in each part of a step; halved for good where memory runs out.

    parts: the budgets as set, such as {"rollout": 65536, "reference": 8192, "update": 8192}.
    reduced: what was halved so far, as `TrainerState.reduced` keeps it; it holds only while the size set is the same.
    """

    def __init__(self, parts: dict[str, int], reduced: dict[str, dict[str, int]] | None = None) -> None:
        self._set, self._reduced = parts, {} if reduced is None else reduced

    def tokens(self, part: str) -> int:
        """The size in use."""
        reduced = self._reduced.get(part)
        return reduced["to"] if reduced and reduced["from"] == self._set[part] else self._set[part]

    def run(self, part: str, work: Callable[[int], Result], least: int, most: int) -> Result:
        """`work(tokens)`, again with half the tokens whenever it runs out of memory.

        least, most: tokens of the longest row by itself, and of all the work. Work must leave nothing behind that a
        second try would add to. Raises RuntimeError where a single row is too much.
        """
        while True:
            try:
                return work(self.tokens(part))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._halve(part, error, least, most)
            # Outside of the handler, since the exception holds on to the tensors of its frames.
            _free()

    def _halve(self, part: str, error: BaseException, least: int, most: int) -> None:
        used = min(self.tokens(part), most)
        half = used // 2
        if used <= least:
            raise RuntimeError(
                f"out of memory in the {part} with one completion at a time; lower grpo.max_completion_length, or "
                "choose a smaller model or a lower model.dtype"
            ) from error
        self._reduced[part] = {"from": self._set[part], "to": half}
        logger.warning("out of memory in the %s with %d tokens at a time; trying %d from here on", part, used, half)


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
