"""Tests of the progress line on terminals of several widths, and of what a run prints about its evaluations."""

import io
import json
import re

import pytest
from rich.console import Console

from grpo.runs.console import StepDisplay
from tests.launches import SHORT, launch

ROW = {
    "reward": 2.41,
    "rewards/correctness/mean": 1.66,
    "rewards/format/mean": 0.76,
    "completions/mean_length": 23.0,
    "loss": 0.0007,
    "kl": 0.07,
    "step_time": 0.4,
}


def last_line(width, steps):
    """The progress line that a terminal of this width shows after three steps."""
    file = io.StringIO()
    display = StepDisplay(Console(width=width, force_terminal=True, file=file), total_steps=steps, first_step=1)
    with display.displayed():
        for step in (1, 2, 3):
            display.update(ROW | {"step": step})
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n")
    return [line for line in text.splitlines() if line.strip()][-1]


@pytest.mark.parametrize("steps", [60, 12000])
@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_step_and_time_left_are_shown_at_every_width(width, steps):
    line = last_line(width, steps)
    assert len(line) <= width
    assert line.startswith(f"step 3/{steps} ")
    assert re.search(r" (\d+:\d\d:\d\d|-:--:--) reward 2", line)
    assert ("━" in line) == (width >= 80)
    assert ("kl 0.070  0.4 s" in line) == (width == 120)


def test_accuracies_during_training_are_printed(finished_launch):
    process, folder = finished_launch
    for step in (1, 2):
        accuracy = json.loads((folder / f"eval/step_{step:06d}.json").read_text())["accuracy"]
        assert f"after step {step}: {accuracy:.1%} of 8 validation problems correct" in process.stdout.splitlines()


def test_a_better_evaluation_than_the_last_is_named_at_the_end(tmp_path, small_run):
    """The learning rate is so high that the policy unlearns everything in its first step."""
    done = launch(*small_run, "run_dir=run", "eval.every=1", "eval.max_problems=20", "optimizer.lr=0.05", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / f"run/eval/step_00000{step}.json").read_text()) for step in (0, 2)]
    before, last = (result["accuracy"] for result in results)
    assert before > last
    assert f"best validation accuracy: {before:.1%} before training" in done.stdout.splitlines()


def test_a_run_that_is_shorter_than_samples_every_has_the_completions_of_its_first_and_last_step(tmp_path):
    short = [*SHORT, "run_dir=run", "samples.every=10", "eval.before=true", "eval.max_problems=3", "grpo.num_steps=3"]
    done = launch(*short, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = sorted(file.name for file in (tmp_path / "run" / "samples").iterdir())
    assert names == ["step_000001.jsonl", "step_000003.jsonl"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Reward audit</h2>" in page
    assert '<td class="text">correctness</td>' in page.split("<h2>Before and after")[1].split("<h2>Charts")[0]
    none = launch(*short, "run_dir=none", "samples.every=0", "grpo.num_steps=1", cwd=tmp_path)
    assert none.returncode == 0, none.stderr
    assert not (tmp_path / "none" / "samples").exists()
    page = (tmp_path / "none" / "report.html").read_text()
    assert '<td class="text">correctness</td>' in page.split("<h2>Before and after")[1].split("<h2>Charts")[0]
