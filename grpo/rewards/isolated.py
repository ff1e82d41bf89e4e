"""Runs reward functions in another process, so that nothing that they do can disturb the run.

A function that hangs in C, crashes, exits, prints, or changes the working directory, signal handlers or global random
state affects only that process, which is killed and started again. It does not import torch, unless a function does.
"""

import codecs
import functools
import inspect
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe
from typing import IO, Any

from grpo.config.errors import ConfigError
from grpo.config.schema import Config
from grpo.rewards.functions import RewardError
from grpo.rewards.time_limit import RunningTime, TimeLimitExceeded

logger = logging.getLogger(__name__)

_START = """
import sys
sys.path[:] = sys.argv[3:]
from grpo.rewards.reward_process import main
main(int(sys.argv[1]), int(sys.argv[2]))
"""
_LOOK_SECONDS = 0.5  # between looks whether the process still runs
_EXIT_SECONDS = 2.0  # for the process to exit by itself, so that its exit handlers run


def isolated_functions(config: Config) -> dict[str, Mapping[str, Any]]:
    """The configs of the reward functions and graders that run in the reward process, by their place in the config.

    These are by default the ones outside the suite. Code of `__main__`, as of a notebook, exists only in its process.
    """
    nodes = {f"reward.components.{name}": node for name, node in config.reward.components.items()}
    nodes |= {"eval.accuracy": config.eval.accuracy}
    nodes |= {f"eval.graders.{name}": node for name, node in config.eval.graders.items()}

    def is_isolated(node: Mapping[str, Any]) -> bool:
        of_node = node.get("isolate")
        if of_node is not None:
            return bool(of_node)
        return config.reward.isolate and not str(node.get("_target_")).startswith(("grpo.", "__main__."))

    return {key: node for key, node in nodes.items() if is_isolated(node)}


def check_isolated(functions: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ConfigError if one of these functions cannot be imported; this process does not import them."""
    _check_importable(tuple((f"{key}._target_", str(node.get("_target_"))) for key, node in functions.items()))


@functools.cache  # the points of a sweep have the same functions
def _check_importable(targets: tuple[tuple[str, str], ...]) -> None:
    process = RewardProcess()
    for key, path in targets:
        process.check_importable(key, path)
    process.close()


class IsolatedFunction:
    """A reward function in a reward process. Its signature is that of the function, without annotations."""

    def __init__(self, process: "RewardProcess", key: str, signature: inspect.Signature, settings: Mapping[str, Any]):
        """key: the place of the function in the config. settings: the keys there that it is called with."""
        self.settings = settings
        self.__signature__ = signature
        self._process = process
        self._key = key

    def __call__(self, **arguments: Any) -> list[float | str]:
        """As `call`, without a time limit."""
        return self.call(self._key, arguments, len(arguments["completions"]))

    def call(
        self, name: str, arguments: Mapping[str, Any], count: int, timeout_s: float | None = None
    ) -> list[float | str]:
        """Call the function in the process: `grpo.rewards.functions.call`.

        Raises RewardError also if the process ends. After `timeout_s`, it is killed, and TimeLimitExceeded is raised.
        """
        return self._process.call(self._key, name, arguments, count, timeout_s)


class RewardProcess:
    """One process for all isolated functions of an experiment, started when it is first needed, and again if it ended.

    It ends with this object.
    """

    def __init__(self) -> None:
        self._bound: dict[str, Mapping[str, Any]] = {}  # the place of each function in the config -> its config
        self._objects: list[str] = []  # the places of the functions that are objects, and so may have a state
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._end: Callable[[], Any] = _nothing

    def check_importable(self, key: str, path: object) -> None:
        """Import a function in the process: `grpo.config.instantiate.find_function`. Raises ConfigError."""
        self._ask_config(key, path, ("find", key, path))

    def bind(self, key: str, node: Mapping[str, Any]) -> IsolatedFunction:
        """Build the function of a config in the process: `grpo.config.instantiate.bind_reward`. Raises ConfigError."""
        parameters, settings, is_object = self._ask_config(f"{key}._target_", node["_target_"], ("bind", key, node))
        self._bound[key] = node
        if is_object:
            self._objects.append(key)
        return IsolatedFunction(self, key, inspect.Signature([_parameter(*each) for each in parameters]), settings)

    def call(
        self, key: str, name: str, arguments: Mapping[str, Any], count: int, timeout_s: float | None
    ) -> list[float | str]:
        """Call the function that was bound as `key`; see `IsolatedFunction.call`."""
        try:
            kind, *answer = self._ask(("call", key, name, dict(arguments), count), timeout_s)
        except EOFError as error:
            raise RewardError(f"reward component '{name}' {error}") from None
        except pickle.PicklingError as error:
            raise RewardError(f"reward component '{name}': {error}; or set reward.isolate=false") from error
        if kind == "failed":
            message, trace = answer
            failure = RewardError(message)
            failure.add_note(trace)
            raise failure
        return answer[0]

    def close(self) -> None:
        """End the process; a later call starts it again."""
        self._end()

    def _ask_config(self, key: str, path: object, request: tuple) -> list:
        try:
            kind, *answer = self._ask(request)
        except EOFError as error:
            raise ConfigError(f"{key}={path}: the import {error}") from None
        if kind == "refused":
            raise ConfigError(answer[0])
        return answer

    def _ask(self, request: tuple, timeout_s: float | None = None) -> tuple:
        """The answer to a request. Raises EOFError with how the process ended, TimeLimitExceeded, or PicklingError."""
        data = _pickled(request)
        self._ensure_running()
        process = self._process
        connection = self._connection
        assert process is not None
        assert connection is not None
        try:
            with _killed_after(process, timeout_s):
                connection.send_bytes(data)
                return pickle.loads(_answer_of(process, connection))
        except (EOFError, OSError):
            how = _how_ended(process)
            self._kill()
            raise EOFError(f"ended its process ({how})") from None
        except BaseException:  # also an interrupt: the next request must not read the answer of this one
            self._kill()
            raise

    def _kill(self) -> None:
        if self._process is not None:
            _kill(self._process)
        self._end()

    def _ensure_running(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        restarts = self._process is not None
        self._end()
        self._start()
        if not restarts:
            return
        lost = f"; {', '.join(self._objects)} begins without its state" if self._objects else ""
        logger.warning("the process of the reward functions was started again%s", lost)
        for key, node in self._bound.items():
            kind, *answer = self._ask(("bind", key, node))
            if kind == "refused":
                self._kill()  # so that the next call tries again, instead of finding only some of the functions
                raise RewardError(answer[0])

    def _start(self) -> None:
        ours, theirs = Pipe()
        # With one seed for the hashes of strings, the order of a set is the same in a resumed run.
        environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-c", _START, str(theirs.fileno()), str(os.getpid()), *sys.path]
        started: queue.SimpleQueue[subprocess.Popen[bytes] | OSError] = queue.SimpleQueue()

        def start_and_show() -> None:
            try:
                process = subprocess.Popen(
                    command,
                    pass_fds=(theirs.fileno(),),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that it gets no signals of the terminal
                )
            except OSError as error:
                started.put(error)
                return
            started.put(process)
            assert process.stdout is not None  # because of PIPE
            _show(process.stdout)

        # The kernel ends the process with the thread that started it (`reward_process`), so this thread lives as long.
        reader = threading.Thread(target=start_and_show, name="reward output", daemon=True)
        reader.start()
        process = started.get()
        theirs.close()
        if isinstance(process, OSError):
            raise process
        self._process = process
        self._connection = ours
        self._end = weakref.finalize(self, _end, process, ours, reader, os.getpid())


def _nothing() -> None:
    return None


def _end(process: subprocess.Popen[bytes], connection: Connection, reader: threading.Thread, owner: int) -> None:
    """End a reward process; if it has to be killed, with those in its session. owner: the process it belongs to."""
    if os.getpid() != owner:  # a fork of the run exits
        return
    connection.close()
    deadline = time.monotonic() + _EXIT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    _kill(process)
    process.wait()
    reader.join(timeout=_EXIT_SECONDS)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and those in its session, unless it has ended: then its number may be that of another one."""
    if process.poll() is None:
        with suppress(ProcessLookupError, PermissionError):  # it ended meanwhile
            os.killpg(process.pid, signal.SIGKILL)


def _answer_of(process: subprocess.Popen[bytes], connection: Connection) -> bytes:
    """The answer of the process. Raises EOFError also if it has ended while a fork of it keeps the connection open."""
    while not connection.poll(_LOOK_SECONDS):
        if process.poll() is not None and not connection.poll(0):
            raise EOFError
    return connection.recv_bytes()


def _show(stream: IO[bytes]) -> None:
    """Print what the process prints, through this process, so that progress bars and notebooks handle it."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while block := os.read(stream.fileno(), 1 << 16):
        with suppress(OSError, ValueError):  # nobody reads it
            print(decoder.decode(block), end="", flush=True)


@contextmanager
def _killed_after(process: subprocess.Popen[bytes], seconds: float | None) -> Iterator[None]:
    """Kill the process if the block takes longer; raises TimeLimitExceeded then. None: no limit.

    The time for which this process is stopped (Ctrl-Z) does not count.
    """
    if seconds is None:
        yield
        return
    tick_s = min(0.5, seconds / 10)
    clock = RunningTime(tick_s)
    over = threading.Event()
    late = threading.Event()

    def watch() -> None:
        while not over.wait(tick_s):
            if clock.tick() > seconds:
                late.set()
                _kill(process)
                return

    thread = threading.Thread(target=watch, name="reward time limit", daemon=True)
    thread.start()
    try:
        yield
    except (EOFError, OSError):
        if not late.is_set():
            raise
    finally:
        over.set()
        thread.join()
    if late.is_set():
        process.wait()
        raise TimeLimitExceeded


def _how_ended(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(timeout=_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        return "it closed its connection"
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):  # a real-time signal has no name
        return signal.Signals(-code).name
    return f"signal {-code}"


def _pickled(request: tuple) -> bytes:
    """The request as bytes. Raises PicklingError, which names the argument that cannot be sent."""
    try:
        return pickle.dumps(request)
    except Exception as error:  # each type raises its own
        arguments = request[3] if request[0] == "call" else {}
        for name, value in arguments.items():
            try:
                pickle.dumps(value)
            except Exception:
                text = f"'{name}' cannot be sent to another process ({type(error).__name__}: {error})"
                raise pickle.PicklingError(f"{text}; leave it out of the function's arguments") from None
        raise


def _parameter(name: str, kind: Any, is_optional: bool) -> inspect.Parameter:
    return inspect.Parameter(name, kind, default=None if is_optional else inspect.Parameter.empty)
