"""Runs in locales other than UTF-8, with text that they cannot show."""

import json
import os
import subprocess
import sys

import pytest

from tests.launches import ROOT, SHORT, status

LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin-1 console": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1", "PYTHONCOERCECLOCALE": "0"},
}
REWARD = '''
"""Scores completions \N{EURO SIGN}."""

import logging


def says(completions, question, **columns):
    logging.warning("says: %s", question[0])
    print("says:", question[0])
    return [0.0] * len(completions)
'''


def run(arguments, cwd, environment):
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOCALES)
def test_a_run_with_text_outside_the_locale_is_resumed_and_read(tmp_path, name):
    data = tmp_path / "data"
    data.mkdir()
    for part in ("train", "test"):
        lines = (ROOT / "tests" / "sums" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        problems = [json.loads(line) for line in lines]
        for problem in problems:
            problem["question"] = f"\N{EURO SIGN} \N{SNOWMAN} {problem['question']}"
        text = "".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems)
        (data / f"{part}.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "says.py").write_text(REWARD, encoding="utf-8")
    launch = ROOT / "launch.py"
    settings = [*SHORT, f"data.path={data}", "tracking=offline", "grpo.num_steps=3", "eval.after=true"]
    settings += ["+reward.components.says={_target_: says.says}", "run_dir=run", "eval.max_problems=4"]
    commands = [
        [launch, *settings, "until_step=2"],
        [launch, *settings, "resume=true"],
        ["-m", "grpo", "report", "run_dir=run"],
        ["-m", "grpo", "evaluate", "run_dir=run", "+reward.components.says._target_=says.says"],
        ["-m", "grpo", "chat", "run_dir=run", "prompt=1+1?", "+reward.components.says._target_=says.says"],
    ]
    for command in commands:
        done = run(command, tmp_path, LOCALES[name])
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr + done.stdout
        assert b"Logging error" not in done.stderr + done.stdout
    assert status(tmp_path / "run")["state"] == "finished"
    for file in ("launch.log", "samples/step_000002.jsonl", "report.html", "eval/after.json"):
        assert "\N{SNOWMAN}" in (tmp_path / "run" / file).read_text(encoding="utf-8")
