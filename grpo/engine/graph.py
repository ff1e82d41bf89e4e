"""Operations recorded once and started together: a token's thousand small ones take longer to start than to run."""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def recorded(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """What computes `step()` again, into the tensor that it returned first: on CUDA a graph, elsewhere step itself.

    step: reads and writes tensors that stay where they are, has no shape or number that changes, and does the same
    when it is run again. What cannot be recorded (it waits for the device) is run as it is, with a warning.
    """
    if device.type != "cuda":
        return step
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step()  # what is prepared at the first use of an operation cannot be recorded
    torch.cuda.current_stream(device).wait_stream(stream)
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a checkpoint may be copied meanwhile
            result = step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _warn(str(error).splitlines()[0])
        return step

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@functools.cache
def _warn(reason: str) -> None:
    logger.warning("decoding without CUDA graphs, which is slower: %s", reason)
