import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from grpo.analysis import load_runs
from grpo.analysis.load import load_evaluations, load_metrics
from grpo.runs.folder import RunFolder


def write_run(run_dir: Path, rows: list[dict], tail: bytes = b"") -> Path:
    (run_dir / "metrics").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run_dir / "metrics/metrics.jsonl").write_bytes(text.encode() + tail)
    return run_dir


def write_evaluation(run_dir: Path, name: str, **record) -> None:
    (run_dir / "eval").mkdir(exist_ok=True)
    (run_dir / f"eval/{name}.json").write_text(json.dumps(record))


def rows(*losses: float) -> list[dict]:
    return [{"step": i, "iteration": 1, "loss": loss} for i, loss in enumerate(losses, start=1)]


def test_one_run_has_a_row_for_each_step_and_the_name_of_its_folder(tmp_path):
    runs = load_runs(write_run(tmp_path / "2026-01-01_00-00-00", rows(0.5, 0.25)))
    assert list(runs.columns) == ["run", "step", "iteration", "loss"]
    assert runs["run"].tolist() == ["2026-01-01_00-00-00"] * 2
    assert runs["step"].tolist() == [1, 2]
    assert runs["loss"].tolist() == [0.5, 0.25]


def test_the_current_folder_as_a_run_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(write_run(tmp_path / "here", rows(0.5)))
    assert load_runs(".")["run"].tolist() == ["here"]


def test_runs_at_any_depth_are_found_and_sorted_by_name(tmp_path):
    write_run(tmp_path / "sweeps/s/1_beta0.04", rows(3.0))
    write_run(tmp_path / "sweeps/s/0_beta0.01", [{**rows(2.0)[0], "kl": 0.5}])
    write_run(tmp_path / "a", rows(1.0))
    (tmp_path / "no_run").mkdir()
    runs = load_runs(tmp_path)
    assert runs["run"].tolist() == ["a", "sweeps/s/0_beta0.01", "sweeps/s/1_beta0.04"]
    assert runs["loss"].tolist() == [1.0, 2.0, 3.0]
    # A metric that only one run has is missing from the others.
    assert runs["kl"].isna().tolist() == [True, False, True]


def test_a_folder_without_runs_or_a_missing_folder_is_an_error_of_one_line(tmp_path):
    with pytest.raises(FileNotFoundError) as nothing_below:
        load_runs(tmp_path)
    assert str(tmp_path) in str(nothing_below.value)
    assert "metrics.jsonl" in str(nothing_below.value)
    assert "\n" not in str(nothing_below.value)
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent"):
        load_runs(tmp_path / "absent")


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b'{"step": 3, "note": "\xc3', b"\0\0\0\0", b'{"step": 3}'])
def test_an_incomplete_last_line_is_ignored(tmp_path, tail):
    assert load_runs(write_run(tmp_path / "run", rows(0.5, 0.25), tail))["step"].tolist() == [1, 2]


def test_a_run_whose_only_line_is_incomplete_has_no_rows(tmp_path):
    runs = load_runs(write_run(tmp_path / "run", [], b'{"step'))
    assert len(runs) == 0
    assert "run" in runs


BROKEN = [b'{"step": 3, "lo\n', b"[1]\n", b"[" * 99999 + b"\n", b"\xff\n", b'{"loss": 1.0}\n', b"\n"]


@pytest.mark.parametrize("line", BROKEN)
def test_an_invalid_line_elsewhere_is_an_error_with_file_and_line(tmp_path, line):
    run_dir = write_run(tmp_path / "run", rows(0.5, 0.25), line + b'{"step": 4}\n')
    for read in (load_runs, load_metrics, lambda folder: RunFolder(folder).metrics()):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3: not "):
            read(run_dir)


def test_null_values_are_read_as_missing_numbers(tmp_path):
    written = [{"step": 1, "kl": None, "entropy": None}, {"step": 2, "kl": None, "entropy": 0.5}]
    metrics = load_metrics(write_run(tmp_path / "run", written))
    assert metrics["kl"].dtype == float
    assert metrics["kl"].isna().all()
    assert math.isnan(metrics["kl"].mean())
    assert metrics["entropy"].mean() == 0.5


def test_a_run_without_a_completed_step_is_read_and_a_folder_that_is_not_a_run_is_refused(tmp_path):
    (tmp_path / "status.json").write_text("{}")
    assert len(load_metrics(tmp_path)) == 0
    (tmp_path / "status.json").unlink()
    with pytest.raises(FileNotFoundError, match="no run folder"):
        load_metrics(tmp_path)


def test_evaluations_are_ordered_from_before_to_after(tmp_path):
    write_evaluation(
        tmp_path, "after", step=100, n=4, accuracy=0.75, reward=2.0, rewards={"format": 0.5}, problems=[{}]
    )
    write_evaluation(tmp_path, "step_000100", step=100, n=4, accuracy=0.5, reward=1.5, rewards={"format": 0.25})
    write_evaluation(tmp_path, "step_000050", step=50, n=4, accuracy=0.25, reward=1.0, rewards={})
    write_evaluation(tmp_path, "before", step=0, n=4, accuracy=0.0, reward=0.5, **{"completions/mean_length": 9.5})
    evaluations = load_evaluations(tmp_path)
    assert evaluations["name"].tolist() == ["before", "step_000050", "step_000100", "after"]
    assert evaluations["step"].tolist() == [0, 50, 100, 100]
    assert evaluations["accuracy"].tolist() == [0.0, 0.25, 0.5, 0.75]
    assert evaluations["rewards/format"].tolist()[2:] == [0.25, 0.5]
    assert evaluations["completions/mean_length"][0] == 9.5
    assert not {"problems", "rewards"} & set(evaluations.columns)


def test_without_evaluations_the_frame_is_empty_and_an_invalid_file_is_named_in_the_error(tmp_path):
    evaluations = load_evaluations(tmp_path)
    assert isinstance(evaluations, pd.DataFrame)
    assert len(evaluations) == 0
    assert "accuracy" in evaluations
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/before.json").write_text('{"step"')
    with pytest.raises(ValueError, match=r"before\.json"):
        load_evaluations(tmp_path)


def test_importing_the_analysis_imports_neither_torch_nor_matplotlib():
    code = "import sys, grpo.analysis, grpo.analysis.summary; print({'torch', 'matplotlib'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
