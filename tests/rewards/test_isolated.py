"""Reward functions in another process: real functions that hang, crash and change global state."""

import contextlib
import functools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo.config.errors import ConfigError
from grpo.rewards.isolated import RewardProcess, isolated_functions
from grpo.rewards.scoring import RewardComponent, RewardError, score
from tests.launches import SHORT, launch, rows, status
from tests.rewards import unruly

REPLIES = [[{"role": "assistant", "content": text}] for text in ("a", "bb")]


def node(name, **settings):
    return {"_target_": f"tests.rewards.unruly.{name}", **settings}


def isolated(*names, process=None):
    process = process or RewardProcess()
    return [RewardComponent(name, process.bind(name, node(name))) for name in names]


def run(components, **columns):
    return score(components, ["p", "p"], REPLIES, columns)


def test_the_values_are_those_of_the_function_in_this_process():
    process = RewardProcess()
    components = isolated("lengths", "later", process=process)
    components.append(RewardComponent("scaled", process.bind("scaled", node("scaled", factor=2.0, offset=0.5))))
    functions = [unruly.lengths, unruly.later, functools.partial(unruly.scaled, factor=2.0, offset=0.5)]
    here = [RewardComponent(each.name, function) for each, function in zip(components, functions, strict=True)]
    columns = {"answer": ["1", "2"], "other": [3, 4], "factor": ["x", "x"]}  # a setting is not replaced
    rewards = run(components, **columns)
    assert rewards.components["lengths"].tolist() == [1.0, 2.0]
    assert rewards.components["scaled"].tolist() == [2.5, 4.5]
    assert rewards.total.tolist() == run(here, **columns).total.tolist() == [3.5, 9.5]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("invalid", "reward component 'invalid' returned 'one'; it must be a finite number or None"),
        ("raises", r"reward component 'raises' raised ValueError: as asked \(.*unruly.py, line \d+\)"),
    ],
)
def test_errors_are_those_of_the_function_in_this_process(name, reason):
    for components in (isolated(name), [RewardComponent(name, getattr(unruly, name))]):
        with pytest.raises(RewardError) as caught:
            run(components)
        assert re.fullmatch(reason, str(caught.value))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hangs_in_c", "took longer than 0.3 s"),
        ("holds_the_interpreter_lock", "took longer than 0.3 s"),
        ("catches_everything", "took longer than 0.3 s"),
        ("leaves", "raised SystemExit: 3"),
        ("leaves_at_once", r"ended its process \(exit code 3\)"),
        ("crashes", r"ended its process \(SIGSEGV\)"),
        ("kills_itself", r"ended its process \(SIGTERM\)"),
        ("closes_everything", r"ended its process \(it closed its connection\)"),
        ("forks_and_dies", r"ended its process \(SIGKILL\)"),
        pytest.param(
            "ends_with_an_unnamed_signal",
            r"ended its process \(signal 40\)",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="macOS has no real-time signals"),
        ),
    ],
)
def test_a_function_that_hangs_or_crashes_is_named_and_the_next_call_works(name, reason):
    bad, good = isolated(name, "lengths")
    started = time.monotonic()
    with pytest.raises(RewardError, match=f"^reward component '{name}' {reason}"):
        run([RewardComponent(name, bad.function, timeout_s=0.3 if "took" in reason else 60)])
    assert time.monotonic() - started < 10
    assert run([good]).total.tolist() == [1.0, 2.0]


def test_global_state_of_this_process_does_not_change():
    before = random.getstate(), os.getcwd(), signal.getsignal(signal.SIGINT)
    run(isolated("disturbs"))
    assert (random.getstate(), os.getcwd(), signal.getsignal(signal.SIGINT)) == before
    assert "DISTURBED" not in os.environ


def test_the_process_imports_no_torch_even_for_the_progress_of_training():
    state = SimpleNamespace(global_step=7)
    assert score(isolated("progress"), ["p", "p"], REPLIES, {}, state).total.tolist() == [0.0, 7.0]


def test_what_a_function_prints_is_shown_by_this_process(capsys):
    process = RewardProcess()
    run(isolated("prints", process=process))
    process.close()
    assert sorted(capsys.readouterr().out.splitlines()) == ["an error", "from a reward"]


def test_an_object_keeps_its_state_until_the_process_has_to_be_started_again(caplog):
    counts, crash = isolated("Counts", "leaves_at_once")
    assert [run([counts]).total.tolist()[0] for _ in range(3)] == [1.0, 2.0, 3.0]
    with pytest.raises(RewardError):
        run([crash])
    assert run([counts]).total.tolist()[0] == 1.0
    said = "the process of the reward functions was started again; Counts begins without its state"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_a_function_that_cannot_be_built_again_leaves_the_others_working(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, later, crash = isolated("lengths", "FailsLater", "leaves_at_once")
    (tmp_path / "spent").touch()
    with pytest.raises(RewardError, match="ended its process"):
        run([crash])
    for _ in range(2):
        with pytest.raises(RewardError, match=r"FailsLater\(\) raised OSError: the port is taken"):
            run([good])
    (tmp_path / "spent").unlink()
    assert run([good]).total.tolist() == [1.0, 2.0]
    assert run([later]).total.tolist() == [1.0, 1.0]


def test_a_process_that_was_started_in_a_thread_outlives_it():
    components = []
    thread = threading.Thread(target=lambda: components.extend(isolated("Counts")))
    thread.start()
    thread.join()
    assert [run(components).total.tolist()[0] for _ in range(2)] == [1.0, 2.0]


def test_a_fork_of_the_run_that_exits_does_not_end_the_process(tmp_path):
    code = """
import os, sys
from tests.rewards.test_isolated import *
counts, = isolated("Counts")
run([counts])
if os.fork() == 0:
    sys.exit()
os.wait()
print(run([counts]).total.tolist())
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[2.0, 2.0]\n", done.stderr


def test_an_argument_that_cannot_be_sent_is_named(tmp_path):
    with (tmp_path / "file").open("w") as file:
        message = "reward component 'lengths': 'handle' cannot be sent to another process .*reward.isolate=false"
        with pytest.raises(RewardError, match=message):
            run(isolated("lengths"), handle=[file, file])


def test_a_function_that_does_not_exist_is_refused_with_its_place_in_the_config():
    with pytest.raises(ConfigError, match=r"reward.components.x._target_=nowhere.f: .*nowhere"):
        RewardProcess().bind("reward.components.x", {"_target_": "nowhere.f"})


def test_a_module_that_ends_the_process_is_refused(tmp_path, monkeypatch):
    (tmp_path / "ends.py").write_text("import os\n\nos._exit(5)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"^r._target_=ends.f: the import ended its process \(exit code 5\)$"):
        RewardProcess().bind("r", {"_target_": "ends.f"})


def test_only_functions_outside_the_suite_are_isolated_unless_the_config_says_otherwise():
    def config(isolate, **components):
        evaluation = SimpleNamespace(accuracy={"_target_": "grpo.rewards.math_xml.accuracy"}, graders={})
        return SimpleNamespace(reward=SimpleNamespace(components=components, isolate=isolate), eval=evaluation)

    components = {
        "suite": {"_target_": "grpo.rewards.math_xml.correctness"},
        "asked": {"_target_": "grpo.rewards.math_xml.correctness", "isolate": True},
        "own": {"_target_": "mine.f"},
        "gpu": {"_target_": "mine.g", "isolate": False},
        "notebook": {"_target_": "__main__.f"},
    }
    chosen = isolated_functions(config(True, **components))
    assert list(chosen) == ["reward.components.asked", "reward.components.own"]
    assert list(isolated_functions(config(False, **components))) == ["reward.components.asked"]


HANGING = "from tests.rewards.test_isolated import *; run(isolated('says_its_process_and_hangs'))"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the process, which only Linux does")
def test_the_process_ends_with_this_one_even_if_it_hangs(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    hanging = subprocess.Popen([sys.executable, "-c", HANGING], cwd=tmp_path, env=environment)
    pid = waited(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    hanging.kill()
    hanging.wait()
    assert waited(lambda: not alive(int(pid)))


def waited(condition):
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


MINE = """
import hashlib


def hangs_in_c(completions, **columns):
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_a_run_continues_without_a_component_that_hangs_in_c(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    mine = "+reward.components.mine={_target_: mine.hangs_in_c, weight: 1.0}"
    limits = ["reward.timeout_s=0.3", "reward.on_error=skip"]
    done = launch(*SHORT, "grpo.num_steps=2", mine, *limits, "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert status(tmp_path / "run")["state"] == "finished"
    assert [row["rewards/mine/mean"] for row in rows(tmp_path / "run")] == [None, None]
    assert "reward component 'mine' took longer than 0.3 s; skipped for" in done.stdout + done.stderr


def test_a_run_whose_component_hangs_in_c_fails_with_its_name(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    mine = "+reward.components.mine={_target_: mine.hangs_in_c, weight: 1.0}"
    failed = launch(*SHORT, mine, "reward.timeout_s=0.3", "run_dir=run", cwd=tmp_path)
    assert failed.returncode == 1
    reason = "RewardError: reward component 'mine' took longer than 0.3 s"
    assert failed.stderr.splitlines()[-1].startswith(f"failed: {reason}")
    assert status(tmp_path / "run")["error"] == reason
