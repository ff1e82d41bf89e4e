"""Our graders beside those of other projects; needs the extra `judges`."""

import json
import os
import subprocess
import sys

import pytest

from grpo.data.problems import load_arithmetic
from tests.launches import ROOT

pytest.importorskip("lm_eval")
pytest.importorskip("math_verify")
pytestmark = pytest.mark.slow


def test_the_table_of_the_docs():
    from tests.rewards.judges import table

    assert table() in (ROOT / "docs" / "grading.md").read_text("utf-8"), "python -m tests.rewards.judges"


def test_lm_eval_and_this_suite_get_the_same_texts_and_grades_from_a_trained_model(finished_run, tmp_path):
    problems = load_arithmetic()
    for split in ("train", "test"):
        rows = [{"question": each.question, "answer": f"#### {each.answer}"} for each in getattr(problems, split)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "tests.benchmarks.vs_lm_eval", str(finished_run / "final_model"), str(tmp_path)]
    done = subprocess.run(
        [*command, "--problems=200", "--shots=0", "--tokens=40"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "of 200 problems: 200 with the same prompt, 200 with the same text, 200 with the same grade" in done.stdout
