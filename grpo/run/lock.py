"""One process at a time in a run folder, also where several machines share the disk."""

import fcntl
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from grpo.config import ConfigError

logger = logging.getLogger(__name__)
RENEW_S = 10.0


@contextmanager
def locked(folder: Path, renew_s: float = RENEW_S) -> Iterator[None]:
    """Hold a folder for this process; raises ConfigError where another live process holds it.

    On one machine the system's lock of `.lock` decides, which goes with its process however that dies. Other machines
    may not see that lock, or see it still after its machine died; so the holder also renews a line in the file every
    `renew_s` seconds. A line of another machine that is not renewed for 2.5 times as long belongs to a dead process.
    No clocks are compared.
    """
    with (folder / ".lock").open("a+") as file:
        holder = _read(file)
        foreign = bool(holder) and holder.get("machine") != _machine()
        if not _lock(file) and not foreign:
            raise ConfigError(f"{folder} is in use by another process; wait for it, or choose another run_dir")
        if foreign and _is_renewed(file, holder, 2.5 * renew_s):
            raise ConfigError(
                f"{folder} is in use on {holder.get('host')} (process {holder.get('pid')}); wait for it, or choose "
                "another run_dir"
            )
        stop, token = threading.Event(), uuid.uuid4().hex
        _write(file, token, 0)
        thread = threading.Thread(target=_renew, args=(file, folder, token, stop, renew_s), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            file.truncate(0)


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks: the renewed line alone must do
        logger.info("no lock on %s: %s", file.name, error)
    return True


def _is_renewed(file: TextIO, holder: dict, seconds: float) -> bool:
    """Watch whether a line changes within so many seconds."""
    print(f"waiting {seconds:.0f} s to see whether the process on {holder.get('host')} is alive", flush=True)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(1.0, seconds / 10))
        if _read(file) != holder:
            return True
    return False


def _renew(file: TextIO, folder: Path, token: str, stop: threading.Event, seconds: float) -> None:
    beat = 0
    while not stop.wait(seconds):
        holder = _read(file)
        if holder and holder.get("token") != token:
            # This process stood still for so long that another machine took it for dead and went on.
            print(
                f"{folder} was taken over by {holder.get('host')} (process {holder.get('pid')}); stopping", flush=True
            )
            os._exit(1)
        beat += 1
        with suppress(OSError):  # a full disk must not end the run
            _write(file, token, beat)


def _read(file: TextIO) -> dict:
    try:
        return json.loads(Path(file.name).read_text() or "{}")
    except (OSError, ValueError):  # between truncating and writing
        return {}


def _write(file: TextIO, token: str, beat: int) -> None:
    holder = {"machine": _machine(), "host": platform.node(), "pid": os.getpid(), "token": token, "beat": beat}
    file.seek(0)
    file.truncate(0)
    file.write(json.dumps(holder))
    file.flush()
    os.fsync(file.fileno())


def _machine() -> str:
    """The same within one boot of one machine only: names of hosts need not be unique."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else f"{uuid.getnode():x}"
