"""The process in which isolated reward functions run (`grpo.rewards.isolated`). It imports no torch of its own."""

import ctypes
import functools
import inspect
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from grpo.config.errors import ConfigError
from grpo.config.instantiate import bind_reward, find_function
from grpo.rewards.functions import RewardError, call

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def main(descriptor: int, parent: int) -> None:
    """The reward process: answer requests until the connection is closed. parent: the process that started this one."""
    _end_with(parent)
    os.set_inheritable(descriptor, False)
    functions: dict[str, Callable[..., Any]] = {}
    with Connection(descriptor) as connection:
        while True:
            try:
                request = connection.recv_bytes()
            except EOFError:
                return
            connection.send_bytes(pickle.dumps(_answer(functions, request)))


def _end_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, even if it hangs in C then; only on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _answer(functions: dict[str, Callable[..., Any]], request: bytes) -> tuple:
    try:
        kind, key, *rest = pickle.loads(request)
    except Exception as error:  # an object of a class that is defined in the __main__ of the run
        message = f"the arguments of a reward function cannot be read in its process ({type(error).__name__}: {error})"
        return "failed", f"{message}; set reward.isolate=false", traceback.format_exc()
    if kind == "find":
        return _find(key, *rest)
    if kind == "bind":
        return _bind(functions, key, *rest)
    name, arguments, count = rest
    try:
        return "values", call(name, functions[key], arguments, count)
    except RewardError as error:
        return "failed", str(error), traceback.format_exc()
    except BaseException as error:  # such as a KeyboardInterrupt of the function's own
        message = f"reward component '{name}' raised {type(error).__name__}: {error}"
        return "failed", message, traceback.format_exc()


def _find(key: str, path: object) -> tuple:
    try:
        find_function(key, path)
    except ConfigError as error:
        return "refused", str(error)
    return ("found",)


def _bind(functions: dict[str, Callable[..., Any]], key: str, node: Mapping[str, Any]) -> tuple:
    try:
        function = functions[key] = bind_reward(key, node)
    except ConfigError as error:
        return "refused", str(error)
    parameters = inspect.signature(function).parameters.values()
    described = [(each.name, each.kind, each.default is not each.empty) for each in parameters]
    if isinstance(function, functools.partial):
        return "bound", described, function.keywords, False
    return "bound", described, {}, True
