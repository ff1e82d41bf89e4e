"""CUDA graphs: many small operations, which take longer to launch than to run, recorded and launched as one."""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def capture_graph(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor] | None:
    """A function that replays `step()` as a CUDA graph, into the same output tensor; None if it cannot be recorded.

    step: reads and writes tensors at fixed addresses, has no shape or Python number that changes, and can be repeated.
    A step that waits for the device cannot be recorded. A run before the recording detects this, since a recording that
    fails leaves torch's allocator in an inconsistent state.
    """
    stream = _stream(device)
    current = torch.cuda.current_stream(device)
    with torch.cuda.device(device):
        stream.wait_stream(current)
        watch = torch.cuda.get_sync_debug_mode()
        try:
            with torch.cuda.stream(stream):
                torch.cuda.set_sync_debug_mode("error")
                step()  # also a warm-up: the setup at an operation's first use cannot be recorded
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
            torch.cuda.set_stream(current)  # torch does not restore it if ending the recording fails, too
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            raise

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # only one, since cuBLAS keeps working memory for each


@functools.cache
def _warn(reason: str) -> None:
    logger.warning("decoding without CUDA graphs, which is slower: %s", reason)
