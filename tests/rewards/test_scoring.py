import asyncio
import contextlib
import functools
import hashlib
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch

from grpo.rewards.scoring import RewardComponent, RewardError, score
from grpo.runs.stop_signals import Exit
from tests.launches import launch

REPLIES = [[{"role": "assistant", "content": text}] for text in ("a", "bb")]


def run(*components, **columns):
    return score(list(components), ["p", "p"], REPLIES, columns)


def test_components_are_scored_separately_and_summed_by_weight():
    rewards = run(
        RewardComponent("correctness", lambda completions, **_: [2.0, 0.0]),
        RewardComponent("format", lambda completions, **_: [0.2, 0.8], weight=0.5),
    )
    assert rewards.components["correctness"].tolist() == [2.0, 0.0]
    assert rewards.components["format"].tolist() == [0.2, 0.8]
    assert rewards.total.tolist() == [2.1, 0.4]


def test_none_means_missing_and_adds_nothing():
    rewards = run(
        RewardComponent("a", lambda completions: [None, 1.0]), RewardComponent("b", lambda completions: [0.5, 0.5])
    )
    assert math.isnan(rewards.components["a"][0])
    assert rewards.total.tolist() == [0.5, 1.5]


def test_a_function_gets_the_columns_in_its_signature():
    def by_answer(completions, answer):
        return [float(c[0]["content"] == a) for c, a in zip(completions, answer, strict=True)]

    rewards = run(RewardComponent("c", by_answer), answer=["a", "x"], other=[1, 2])
    assert rewards.total.tolist() == [1.0, 0.0]


def test_a_column_named_completions_does_not_replace_the_models_completions():
    rewards = run(RewardComponent("c", lambda completions, **_: [float(len(completions))] * 2), completions=["x"] * 9)
    assert rewards.total.tolist() == [2.0, 2.0]


def test_a_function_that_changes_its_arguments_does_not_affect_other_functions():
    def spoils(prompts, completions, answer, steps, **_):
        prompts[0][0]["content"] = completions[0][0]["content"] = answer[0] = steps[0]["a"][0] = "spoilt"
        del prompts[1:], completions[1:], answer[1:], steps[1:]
        return [0.0, 0.0]

    def prompts():
        return [[{"role": "user", "content": "p"}]] * 2

    def columns():
        return {"answer": ["x", "y"], "steps": [{"a": ["1"]}, {"a": ("2", ["3"])}]}

    def sees(**arguments):
        assert arguments == {"prompts": prompts(), "completions": replies(), **columns()}
        return [1.0, 1.0]

    def replies():
        return [[{"role": "assistant", "content": text}] for text in ("a", "bb")]

    given = prompts(), replies(), columns()
    rewards = score([RewardComponent("spoils", spoils), RewardComponent("sees", sees)], *given)
    assert rewards.total.tolist() == [1.0, 1.0]
    assert given == (prompts(), replies(), columns())


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda completions: 1 / 0, "raised ZeroDivisionError"),
        (lambda completions: None, "returned NoneType"),
        (lambda completions: [1.0], "returned 1 values for 2 completions"),
        (lambda completions: [1.0, math.nan], "returned nan"),
        (lambda completions: [1.0, math.inf], "returned inf"),
        (lambda completions: [1.0, "x"], "returned 'x'"),
        (lambda completions: [1.0, "2"], "returned '2'"),
        (lambda completions: "11", "returned str for 2 completions"),
        (lambda completions: {1.0: 0, 2.0: 0}, "returned dict for 2 completions"),
        (lambda completions: np.ones((2, 1)), r"returned \[1.0\]"),
        (lambda completions: [1.0, 10**5000], "returned int"),
        (lambda completions: torch.tensor(1.0), "returned float for 2 completions"),
    ],
)
def test_a_function_that_raises_or_returns_invalid_values_is_named_with_the_reason(function, reason):
    with pytest.raises(RewardError, match=f"'mine' {reason}"):
        run(RewardComponent("mine", function))


def test_rewards_written_for_trl_work_unchanged():
    from trl.rewards import get_soft_overlong_punishment, think_format_reward

    replies = [[{"role": "assistant", "content": "<think>\nx\n</think>\n18"}], [{"role": "assistant", "content": "18"}]]
    components = [
        RewardComponent("think", think_format_reward),
        RewardComponent("overlong", get_soft_overlong_punishment(10, 5)),
    ]
    rewards = score(components, ["p", "p"], replies, {"completion_ids": [[1] * 4, [1] * 12], "answer": ["18", "18"]})
    assert rewards.components["think"].tolist() == [1.0, 0.0]
    assert rewards.components["overlong"].tolist() == [0.0, -1.0]


def test_an_array_a_tensor_and_other_iterables_are_results():
    components = [
        RewardComponent("numpy", lambda completions: np.array([1.0, 2.0], dtype=np.float32)),
        RewardComponent("torch", lambda completions: torch.tensor([1, 2])),
        RewardComponent("tuple", lambda completions: (np.float64(1.0), torch.tensor(2.0))),
        RewardComponent("generator", lambda completions: (float(len(c[0]["content"])) for c in completions)),
        RewardComponent("pandas", lambda completions: pd.Series([1.0, 2.0])),
        RewardComponent("bool", lambda completions: [True, 2]),
    ]
    for values in run(*components).components.values():
        assert values.tolist() == [1.0, 2.0]


def test_async_functions_and_objects_are_awaited():
    async def lengths(completions, **columns):
        await asyncio.sleep(0.01)
        return [float(len(completion[0]["content"])) for completion in completions]

    class Lengths:
        async def __call__(self, completions):
            return await lengths(completions)

    async def hangs(completions):
        await asyncio.sleep(60)

    rewards = run(RewardComponent("a", lengths), RewardComponent("b", Lengths(), timeout_s=30))
    assert rewards.total.tolist() == [2.0, 4.0]
    with pytest.raises(RewardError, match="took longer"):
        run(RewardComponent("slow", hangs, timeout_s=0.2))


def test_a_column_does_not_replace_a_setting_of_the_config():
    def scored(completions, exact=2.0, level=None, **columns):
        assert "exact" not in columns
        return [exact + level[0]] * len(completions)

    set_in_config = functools.partial(scored, exact=3.0)
    rewards = run(RewardComponent("c", set_in_config), exact=["x", "y"], level=[1, 1])
    assert rewards.total.tolist() == [4.0, 4.0]


def leaves_by_exit(completions):
    sys.exit(0)


def fails_in_a_library(completions):
    return json.loads("{")


@pytest.mark.parametrize("function", [leaves_by_exit, fails_in_a_library])
def test_an_error_names_the_line_of_the_users_code(function):
    _, first_line = inspect.getsourcelines(function)
    with pytest.raises(RewardError) as failed:
        run(RewardComponent("mine", function))
    assert str(failed.value).endswith(f" ({__file__}, line {first_line + 1})")
    assert f"'mine' raised {'SystemExit: 0' if function is leaves_by_exit else 'JSONDecodeError'}" in str(failed.value)


def test_an_exit_can_be_skipped_like_any_error():
    rewards = run(RewardComponent("mine", leaves_by_exit, skip_errors=True))
    assert rewards.total.isnan().all()


def test_an_exit_that_a_stop_signal_requested_is_passed_on():
    def stopped(completions):
        raise Exit(143)

    with pytest.raises(Exit):
        run(RewardComponent("mine", stopped, skip_errors=True))


def test_the_working_directory_is_restored(tmp_path, monkeypatch):
    before = os.getcwd()

    def moves(completions):
        os.chdir(tmp_path)
        if completions[0][0]["content"] == "fails":
            raise ValueError
        return [1.0] * len(completions)

    run(RewardComponent("c", moves))
    assert os.getcwd() == before
    with pytest.raises(RewardError):
        score([RewardComponent("c", moves)], ["p"], [[{"content": "fails"}]], {})
    assert os.getcwd() == before


def test_nothing_to_score_gives_nothing():
    empty = score([RewardComponent("c", lambda completions: [])], [], [], {})
    assert empty.total.shape == (0,)
    none = score([], ["p"], REPLIES[:1], {})
    assert none.total.isnan().tolist() == [True]


# Time limits.


def hangs_in_python(completions, **_):
    while True:
        pass


def hangs_asleep(completions, **_):
    time.sleep(60)


def hangs_in_a_regular_expression(completions, **_):
    re.match(r"(a+)+$", "a" * 40 + "b")


def hangs_and_catches_errors(completions, **_):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(60)


def hangs_and_catches_everything(completions, **_):
    for _ in completions:
        with contextlib.suppress(BaseException):  # as a bare `except:` would
            time.sleep(60)
    return [0.0] * len(completions)


def hangs_after_it_used_the_timer_itself(completions, **_):
    former = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(1)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)
    time.sleep(60)


@pytest.mark.parametrize(
    "function",
    [
        hangs_in_python,
        hangs_asleep,
        hangs_in_a_regular_expression,
        hangs_and_catches_errors,
        hangs_and_catches_everything,
        hangs_after_it_used_the_timer_itself,
    ],
)
def test_a_function_that_hangs_is_interrupted_and_named(function):
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"reward component 'slow' took longer than 0\.2 s"):
        run(RewardComponent("slow", function, timeout_s=0.2))
    assert time.monotonic() - started < 5
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def hangs_in_c(completions, **_):
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)


def catches_everything_for_ever(completions, **_):
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)


def runs_briefly(completions, **_):
    for _ in range(10):
        time.sleep(0.02)
    return [1.0] * len(completions)


def score_in_a_process(arguments):
    function, *seconds = arguments
    for each in seconds:  # for which the process is stopped
        subprocess.Popen(["sh", "-c", f"sleep 0.1; kill -STOP {os.getpid()}; sleep {each}; kill -CONT {os.getpid()}"])
    print(run(RewardComponent("slow", globals()[function], timeout_s=0.5)).total.tolist())


def holds_the_interpreter_lock(completions, **_):
    return [sum(range(10**12))] * len(completions)


def holds_it_briefly(completions, **_):
    return [float(sum(range(5 * 10**6)) > 0)] * len(completions)


@pytest.mark.parametrize(
    ("function", "code"),
    [("hangs_in_c", 1), ("catches_everything_for_ever", 1), ("holds_the_interpreter_lock", -signal.SIGKILL)],
)
def test_if_a_function_cannot_be_interrupted_its_process_is_ended(tmp_path, function, code):
    ended = launch(function, main=score_in_a_process, cwd=tmp_path, timeout=20)
    assert ended.returncode == code
    message = "failed: RewardError: reward component 'slow' took longer than 0.5 s, and could not be ended\n"
    assert ended.stderr == message


@pytest.mark.parametrize("function", ["runs_briefly", "holds_it_briefly"])
def test_time_in_which_the_process_is_stopped_does_not_count(tmp_path, function):
    done = launch(function, "3.5", main=score_in_a_process, cwd=tmp_path, timeout=20)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[1.0, 1.0]\n"


def test_the_time_limit_also_holds_in_a_thread():
    with ThreadPoolExecutor() as pool, pytest.raises(RewardError, match="took longer"):
        pool.submit(run, RewardComponent("slow", lambda completions: time.sleep(0.3), timeout_s=0.1)).result()


def test_a_function_within_its_time_limit_is_not_interrupted():
    rewards = run(RewardComponent("c", lambda completions, **_: [1.0] * len(completions), timeout_s=30))
    assert rewards.total.tolist() == [1.0, 1.0]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_skipped_errors_give_missing_values_and_warnings(caplog):
    def raises(completions, **_):
        raise KeyError("x")

    rewards = run(
        RewardComponent("good", lambda completions, **_: [1.0, 2.0], weight=2.0),
        RewardComponent("raises", raises, skip_errors=True),
        RewardComponent("short", lambda completions, **_: [5.0], skip_errors=True),
        RewardComponent("one", lambda completions, **_: [float("nan"), 3.0], skip_errors=True),
        RewardComponent("slow", hangs_asleep, timeout_s=0.1, skip_errors=True),
    )
    assert rewards.total.tolist() == [2.0, 7.0]
    assert len(caplog.records) == 4
    for name in ("raises", "short", "slow"):
        assert rewards.components[name].isnan().all()
    assert rewards.components["one"].isnan().tolist() == [True, False]
    assert re.search(
        r"reward component 'raises' raised KeyError: 'x' \(.*, line \d+\); skipped for 2 comp", caplog.text
    )
    assert "reward component 'one' returned nan; it must be a finite number or None; skipped for 1 comp" in caplog.text
