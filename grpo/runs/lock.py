"""A lock that allows one process at a time in a run folder, also if several machines share the disk."""

import errno
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
from typing import BinaryIO

from grpo.config.errors import ConfigError
from grpo.config.reading import read_file
from grpo.runs.files import flush_to_disk

logger = logging.getLogger(__name__)
RENEW_S = 10.0
LINE = 512  # bytes


@contextmanager
def locked(folder: Path, renew_s: float = RENEW_S) -> Iterator[Path]:
    """Lock a folder for this process, and yield it. Raises ConfigError if another live process holds the lock.

    Within one machine, the system's file lock on `.lock` decides; the system releases it when the process ends in any
    way. Other machines may not see this lock, or may see it even after the locking machine has crashed. So the holder
    also renews a line in the file every `renew_s` seconds. If the line of another machine is not renewed for 2.5 times
    as long, its process is considered dead. No clocks are compared. If the file system has no locks, only the line
    decides.
    """
    with _open(folder) as file:
        holder = _read(folder)
        taken = _lock(file)
        if not _is_still_there(file, folder / ".lock"):
            raise ConfigError(f"{folder} was released by another launch a moment ago; run the command again")
        unsure = bool(holder) and (taken is None or holder.get("machine") != _machine())
        if taken and not unsure:
            raise ConfigError(f"{folder} is in use by another process; wait for it, or choose another folder")
        if unsure and _is_renewed(folder, holder, 2.5 * renew_s):
            raise ConfigError(
                f"{folder} is in use on {holder.get('host')} (process {holder.get('pid')}); wait for it, or choose "
                "another folder"
            )
        stop = threading.Event()
        token = uuid.uuid4().hex
        _write(file, token, 0)
        thread = threading.Thread(target=_renew, args=(file, folder.absolute(), token, stop, renew_s), daemon=True)
        thread.start()
        try:
            yield folder
        finally:
            stop.set()
            thread.join()
            with suppress(OSError):
                os.ftruncate(file.fileno(), 0)


def _open(folder: Path) -> BinaryIO:
    path = folder / ".lock"
    try:
        return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b", buffering=0)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise ConfigError(f"{folder} cannot be written to ({error.strerror}), so no run can train in it") from error


def _is_still_there(file: BinaryIO, path: Path) -> bool:
    """Whether the open file still exists at `path`: a refused launch may have removed it in the meantime."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def in_use(folder: Path) -> bool:
    """Whether the process that holds the folder is alive, as far as this can be seen without taking the lock.

    The process IDs of another machine, of this one before it was restarted, and of another container mean nothing
    here. Such a process is assumed to be alive if its line was renewed within the last minute.
    """
    holder = _read(folder)
    if holder.get("machine") != _machine() or holder.get("pid_namespace", _pid_namespace()) != _pid_namespace():
        return bool(holder) and time.time() - (folder / ".lock").stat().st_mtime < 6 * RENEW_S
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):  # OverflowError: no process can have this ID
        return False
    except PermissionError:
        pass
    return True


def left_by_us(folder: Path) -> bool:
    """Whether a launch held this folder and was killed: if it ends in any other way, it empties its `.lock`."""
    return "token" in _read(folder)


def _lock(file: BinaryIO) -> bool | None:
    """Try to lock the file. Returns whether another process has the lock; None if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        logger.warning(
            "file locking does not work for %s (%s): simultaneous launches in this folder cannot be detected",
            file.name,
            error,
        )
        return None
    return False


def _is_renewed(folder: Path, holder: dict, seconds: float) -> bool:
    """Wait to see whether the line of the holder changes within `seconds` seconds."""
    print(f"waiting {seconds:.0f} s to see whether the process on {holder.get('host')} is alive", flush=True)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(1.0, seconds / 10))
        if _read(folder) != holder:
            return True
    return False


def _renew(file: BinaryIO, folder: Path, token: str, stop: threading.Event, seconds: float) -> None:
    beat = 0
    while not stop.wait(seconds):
        holder = _read(folder)
        if holder and holder.get("token") != token:
            # This process was suspended for so long that another machine considered it dead and took over.
            print(
                f"{folder} was taken over by {holder.get('host')} (process {holder.get('pid')}); stopping", flush=True
            )
            os._exit(1)
        beat += 1
        with suppress(OSError):  # a full disk must not end the run
            _write(file, token, beat)


def _read(folder: Path) -> dict:
    try:
        holder = json.loads(read_file(folder / ".lock", most=8 * LINE).strip() or b"{}")
    except (OSError, ValueError, RecursionError):  # for example, while it is being written
        return {}
    return holder if isinstance(holder, dict) and type(holder.get("pid")) is int and holder["pid"] > 0 else {}


def _write(file: BinaryIO, token: str, beat: int) -> None:
    holder = {"machine": _machine(), "host": platform.node(), "pid": os.getpid(), "token": token, "beat": beat}
    holder["pid_namespace"] = _pid_namespace()
    # Overwrite the line with one of the same length, so that a full disk cannot leave half a line.
    os.pwrite(file.fileno(), json.dumps(holder).ljust(LINE).encode(), 0)
    flush_to_disk(file.fileno())


def _pid_namespace() -> str | None:
    """The namespace in which process IDs are unique; each container has its own. None if it is unknown."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # not on Linux
        return None


def _machine() -> str:
    """An ID of this machine since its last boot, if available. Host names are not used, as they may not be unique."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text(encoding="utf-8").strip() if boot.exists() else f"{uuid.getnode():x}"
