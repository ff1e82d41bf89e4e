"""One process at a time in a run folder, on one machine and between machines."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from grpo.config.errors import ConfigError
from grpo.runs.lock import in_use, locked

HOLD = "import sys; from pathlib import Path; from grpo.runs.lock import locked\nwith locked(Path(sys.argv[1]), 0.1):\n"
HOLD += "    print('held', flush=True)\n    sys.stdin.read()"


@pytest.fixture
def hold(tmp_path):
    """Start a process that holds the folder."""
    holders = []

    def start():
        command = [sys.executable, "-c", HOLD, str(tmp_path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        holders.append(subprocess.Popen(command, **pipes))
        assert holders[-1].stdout.readline() == "held\n"
        return holders[-1]

    yield start
    for holder in holders:
        holder.kill()
        holder.communicate()


def line(folder):
    return json.loads((folder / ".lock").read_text() or "{}")


def test_a_folder_locked_by_another_process_is_refused_until_that_process_is_killed(tmp_path, hold):
    holder = hold()
    with pytest.raises(ConfigError, match="in use by another process"), locked(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=10)
    started = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - started < 5  # on the same machine there is no waiting


def test_a_process_id_of_another_container_is_not_looked_up_in_this_one(tmp_path):
    with locked(tmp_path):
        ours = line(tmp_path)
        assert in_use(tmp_path)
    assert not in_use(tmp_path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    lines = {
        "ours": ours,
        "ours, dead": ours | {"pid": dead.pid},
        "theirs": ours | {"pid": dead.pid, "pid_namespace": "pid:[1]"},
        "of an earlier version": {key: value for key, value in ours.items() if key != "pid_namespace"},
        "nonsense": [],
        "no process": ours | {"pid": 10**30},
    }
    found = {}
    for name, each in lines.items():
        (tmp_path / ".lock").write_text(json.dumps(each))
        found[name] = in_use(tmp_path)
    alive = {"ours", "theirs", "of an earlier version"}
    assert found == {name: name in alive for name in lines}
    (tmp_path / ".lock").write_text(json.dumps(ours | {"pid_namespace": "pid:[1]"}))
    os.utime(tmp_path / ".lock", (1, 1))
    assert not in_use(tmp_path)  # although a process with this number runs here


def test_a_paused_process_keeps_its_lock(tmp_path, hold):
    holder = hold()
    holder.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    with pytest.raises(ConfigError, match="in use by another process"), locked(tmp_path, 0.1):
        pass


def test_the_lock_is_released_after_the_block_and_after_an_error_in_it(tmp_path):
    with pytest.raises(RuntimeError, match="in the block"), locked(tmp_path):
        raise RuntimeError("in the block")
    with locked(tmp_path), pytest.raises(ConfigError, match="in use"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == ""


def test_the_holder_updates_its_line_in_the_lock_file(tmp_path):
    with locked(tmp_path, 0.05):
        first = line(tmp_path)
        deadline = time.monotonic() + 10
        while line(tmp_path).get("beat", 0) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert {key: value for key, value in first.items() if key != "beat"}.items() <= line(tmp_path).items()


def other_machine(folder, beat):
    holder = {"machine": "another", "host": "node7", "pid": 12, "token": "theirs", "beat": beat}
    (folder / ".lock").write_text(json.dumps(holder))


def test_a_process_that_died_on_another_machine_holds_no_lock(tmp_path, capsys):
    other_machine(tmp_path, 5)
    with locked(tmp_path, 0.1):
        assert line(tmp_path)["token"] != "theirs"
    assert "waiting 0 s to see whether the process on node7 is alive" in capsys.readouterr().out


def test_a_process_that_runs_on_another_machine_holds_its_lock(tmp_path):
    stop = threading.Event()

    def renew():
        beat = 0
        while not stop.wait(0.1):
            beat += 1
            other_machine(tmp_path, beat)

    other_machine(tmp_path, 0)
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(ConfigError, match=r"in use on node7 \(process 12\)"), locked(tmp_path, 0.4):
            pass
    finally:
        stop.set()
        thread.join()
    assert line(tmp_path)["token"] == "theirs"


def test_without_file_system_locks_the_line_in_the_lock_file_decides_on_one_machine_too(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path, 0.1):
        with pytest.raises(ConfigError, match="is in use on "), locked(tmp_path, 0.4):
            pass
        assert line(tmp_path)["token"]
    with locked(tmp_path, 0.1):
        pass
    assert "cannot be detected" in caplog.text


def test_a_full_disk_neither_damages_the_line_in_the_lock_file_nor_ends_the_run(tmp_path, monkeypatch):
    with locked(tmp_path, 0.05):

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        monkeypatch.setattr(os, "ftruncate", full)
        time.sleep(0.3)
        assert line(tmp_path)["pid"] == os.getpid()


def test_a_process_ends_at_once_if_another_machine_takes_over_its_folder(tmp_path, hold):
    holder = hold()
    other_machine(tmp_path, 0)
    assert holder.wait(timeout=10) == 1
    assert "was taken over by node7 (process 12); stopping" in holder.stdout.read()


def test_locking_a_file_that_its_holder_has_just_removed_is_refused(tmp_path, monkeypatch):
    # The holder removes the file after this process has opened it and before it locks it.
    def lock_after_removal(file, flags):
        (tmp_path / ".lock").unlink()

    monkeypatch.setattr(fcntl, "flock", lock_after_removal)
    with (
        pytest.raises(ConfigError, match="released by another launch a moment ago; run the command again"),
        locked(tmp_path),
    ):
        pass
    assert not (tmp_path / ".lock").exists()
