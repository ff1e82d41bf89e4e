"""Operations on CUDA recorded once and started together: a thousand small ones take longer to start than to run."""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def recorded(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor] | None:
    """A CUDA graph that computes `step()` again, into the tensor that it returned first; None where there can be none.

    step: reads and writes tensors that stay where they are, has no shape or number that changes, and does the same
    when it is run again. One that waits for the device cannot be recorded: that is found out in a run before, since a
    recording that fails leaves torch's allocator in disorder.
    """
    stream = _stream(device)
    current = torch.cuda.current_stream(device)
    with torch.cuda.device(device):
        stream.wait_stream(current)
        watch = torch.cuda.get_sync_debug_mode()
        try:
            with torch.cuda.stream(stream):
                torch.cuda.set_sync_debug_mode("error")
                step()  # also since what is prepared at the first use of an operation cannot be recorded
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _warn(str(error).splitlines()[0])
            return None
        finally:
            torch.cuda.set_sync_debug_mode(watch)
            current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = step()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # which torch does not where ending the recording fails, too
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            raise

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one, since cuBLAS holds its working memory for each


@functools.cache
def _warn(reason: str) -> None:
    logger.warning("decoding without CUDA graphs, which is slower: %s", reason)
