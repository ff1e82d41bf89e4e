"""The number of threads of single operations on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# With fewer multiplications, an operation takes less time on one thread than other threads take to wake up. Measured
# with GOMP_SPINCOUNT=1000, which a launch sets.
LEAST_MULTIPLICATIONS = 2**23


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Compute with this many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_for(multiplications: int, most: int) -> int:
    """The number of threads for an operation, 1 or `most`, by the number of its multiplications."""
    return most if multiplications >= LEAST_MULTIPLICATIONS else 1
