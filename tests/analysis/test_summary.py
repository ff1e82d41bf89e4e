import json
from pathlib import Path

import pytest

from grpo.analysis.accuracy import wilson_interval
from grpo.analysis.summary import accuracy_difference, difference_text, summarize, write_summary


def write_run(run_dir: Path, rows: list[dict], state: str = "finished") -> Path:
    (run_dir / "metrics").mkdir(parents=True)
    (run_dir / "metrics/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "status.json").write_text(json.dumps({"state": state}))
    return run_dir


def read_strictly(path: Path) -> dict:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize(
    ("accuracy", "n", "low", "high"),
    [
        # With z = 1.959964: the upper end for 0 of 10 is z^2 / (10 + z^2) = 3.841459 / 13.841459.
        (0.0, 10, 0.0, 0.277533),
        (1.0, 10, 0.722467, 1.0),
        # 50 of 100: 0.5 -+ 1.959964 / 1.03841459 * sqrt(0.25 / 100 + 3.841459 / 40000) = 0.5 -+ 0.096168.
        (0.5, 100, 0.403832, 0.596168),
        # 30 of 200: centre (0.15 + 0.0096036) / 1.0192073 = 0.156596,
        # half width 1.959964 / 1.0192073 * sqrt(0.0006375 + 0.0000240091) = 0.049460.
        (0.15, 200, 0.107136, 0.206056),
    ],
)
def test_wilson_interval(accuracy, n, low, high):
    assert wilson_interval(accuracy, n) == pytest.approx([low, high], abs=2e-6)


def test_there_is_no_interval_without_problems_or_without_accuracy():
    assert wilson_interval(0.5, 0) is None
    assert wilson_interval(None, 10) is None


def test_statistics_equal_those_computed_by_hand(tmp_path):
    rewards = [1.0, 3.0, 2.0, 3.0] + [2.0] * 7  # 11 steps: a tenth is rounded up to two
    rows = [
        {"step": i, "iteration": 1 if i < 6 else 2, "reward": reward, "num_tokens": 100 * i, "step_time": 0.5}
        for i, reward in enumerate(rewards, start=1)
    ]
    summary = summarize(write_run(tmp_path / "run", rows, state="interrupted"))
    assert (summary["name"], summary["state"]) == ("run", "interrupted")
    assert (summary["steps"], summary["iterations"]) == (11, 2)
    assert summary["totals"] == {"tokens": 1100, "seconds": 5.5}
    reward = summary["metrics"]["reward"]
    # Sum 23, squares 1 + 9 + 4 + 9 + 28 = 51, variance (51 - 23^2 / 11) / 10.
    assert reward.pop("mean") == pytest.approx(23 / 11)
    assert reward.pop("std") == pytest.approx(((51 - 529 / 11) / 10) ** 0.5)
    assert reward == {
        "count": 11,
        "first": 1.0,
        "last": 2.0,
        "min": 1.0,
        "max": 3.0,
        "mean_first_10pct": 2.0,
        "mean_last_10pct": 2.0,
        "best_step": 2,
    }


def test_the_summary_has_every_numeric_metric_except_the_counters(tmp_path):
    row = {"step": 1, "iteration": 1, "num_tokens": 5, "loss": 0.1, "rewards/brevity/mean": 0.2, "kl": None}
    metrics = summarize(write_run(tmp_path / "run", [row | {"digest/completions": "1e5", "flag": True}]))["metrics"]
    assert list(metrics) == ["loss", "rewards/brevity/mean", "kl"]
    assert metrics["rewards/brevity/mean"]["best_step"] == 1
    assert "best_step" not in metrics["loss"]
    assert metrics["kl"]["count"] == 0
    assert metrics["kl"]["mean"] is None


def test_values_that_are_not_finite_are_omitted_and_the_file_is_strict_json(tmp_path):
    norms = [1.0, float("inf"), 3.0, float("nan")]
    rows = [{"step": i, "grad_norm": norm, "reward": None} for i, norm in enumerate(norms, start=1)]
    run_dir = write_run(tmp_path / "run", rows)
    (run_dir / "eval").mkdir()
    (run_dir / "eval/before.json").write_text('{"step": 0, "n": 8, "accuracy": NaN, "reward": null}')
    path = write_summary(run_dir)
    assert path == run_dir / "summary.json"
    summary = read_strictly(path)
    assert summary == summarize(run_dir)
    norm = summary["metrics"]["grad_norm"]
    assert (norm["count"], norm["first"], norm["last"], norm["mean"], norm["max"]) == (2, 1.0, 3.0, 2.0, 3.0)
    assert summary["metrics"]["reward"]["best_step"] is None
    before = {"accuracy": None, "n": 8, "reward": None, "rewards": {}, "accuracy_interval": None}
    assert summary["eval"] == {"before": before}
    assert summary["totals"] == {"tokens": None, "seconds": None}


def test_a_run_of_one_step_has_no_standard_deviation(tmp_path):
    loss = read_strictly(write_summary(write_run(tmp_path / "run", [{"step": 1, "loss": 0.5}])))["metrics"]["loss"]
    assert loss["std"] is None
    assert loss["mean_first_10pct"] == loss["mean_last_10pct"] == 0.5


def test_the_summary_has_held_out_accuracy_before_and_after_training(tmp_path):
    run_dir = write_run(tmp_path / "run", [{"step": 1}])
    (run_dir / "eval").mkdir()
    for name, accuracy in (("before", 0.0), ("step_000050", 0.4), ("after", 1.0)):
        record = {"step": 1, "n": 10, "accuracy": accuracy, "reward": 1.5, "rewards": {"format": 0.5}}
        (run_dir / f"eval/{name}.json").write_text(json.dumps(record))
    evaluations = read_strictly(write_summary(run_dir, tmp_path / "else/where"))["eval"]
    assert not (run_dir / "summary.json").exists()
    assert list(evaluations) == ["before", "after"]
    assert (evaluations["before"]["accuracy"], evaluations["before"]["n"]) == (0.0, 10)
    assert (evaluations["after"]["accuracy"], evaluations["after"]["n"]) == (1.0, 10)
    assert evaluations["after"]["rewards"] == {"format": 0.5}
    assert evaluations["after"]["accuracy_interval"] == pytest.approx([0.722467, 1.0], abs=1e-6)


def evaluation(*correct):
    """An evaluation in which these problems are right (1), wrong (0) or not graded (None)."""
    graded = [value for value in correct if value is not None]
    problems = [
        {"problem_id": str(i), "answer": "7", "correct": None if value is None else bool(value)}
        for i, value in enumerate(correct)
    ]
    return {"step": 0, "n": len(graded), "accuracy": sum(graded) / len(graded), "problems": problems}


def test_the_difference_of_the_accuracies_is_paired_by_problem(tmp_path):
    """The two intervals, [43.1, 56.9] and [53.1, 66.5], overlap, although 25 problems are gained and 5 are lost."""
    before = evaluation(*[1] * 100, *[0] * 100)
    after = evaluation(*[1] * 95, *[0] * 5, *[1] * 25, *[0] * 75)
    run_dir = write_run(tmp_path / "run", [{"step": 1}])
    (run_dir / "eval").mkdir()
    for name, record in (("before", before), ("after", after)):
        (run_dir / f"eval/{name}.json").write_text(json.dumps(record))
    summary = read_strictly(write_summary(run_dir))
    assert summary["eval"]["before"]["accuracy_interval"][1] > summary["eval"]["after"]["accuracy_interval"][0]
    # The interval has one more problem that is gained and one that is lost: of n = 202, sum 20 and sum of squares 32,
    # so the variance is (32 - 20^2 / 202) / 201 = 0.149352, the standard error sqrt(0.149352 / 202) = 0.027191, and
    # half the interval 1.971837 (t, 201 degrees of freedom) times that, 0.053617.
    difference = summary["accuracy_difference"]
    assert difference == {
        "mean": pytest.approx(0.1),
        "interval": pytest.approx([0.046383, 0.153617], abs=2e-6),
        "n": 200,
        "gained": 25,
        "lost": 5,
        "p": pytest.approx(2 * (1 + 30 + 435 + 4060 + 27405 + 142506) / 2**30),  # at most 5 of 30 in either direction
    }
    text = (
        "+10.0 points, 95 % interval +4.6 to +15.4, paired over 200 problems (25 gained, 5 lost; McNemar's p = 0.00032)"
    )
    assert difference_text(difference) == text


def test_only_problems_graded_both_before_and_after_are_paired():
    before = evaluation(0, 0, None, 1)
    assert accuracy_difference(before, evaluation(1, None, 1, 1)) | {"interval": None} == {
        "mean": 0.5, "interval": None, "n": 2, "gained": 1, "lost": 0, "p": 1.0,
    }  # fmt: skip
    other = evaluation(1, 1, 1, 1)
    for problem in other["problems"]:
        problem["answer"] = "8"  # another problem with the same number
    assert accuracy_difference(before, other) is None
    assert accuracy_difference(None, before) is None


def test_a_difference_within_its_interval_is_called_so():
    equal = accuracy_difference(evaluation(0, 1, 1, 0), evaluation(1, 0, 1, 0))
    assert difference_text(equal).startswith("+0.0 points, 95 % interval -")
    assert "paired over 4 problems (1 gained, 1 lost; " in difference_text(equal)
    assert difference_text(equal).endswith("; no difference shown")
    single = accuracy_difference(evaluation(0), evaluation(1))
    assert single == {"mean": 1.0, "interval": [-1.0, 1.0], "n": 1, "gained": 1, "lost": 0, "p": 1.0}


def test_mcnemars_test_decides_whether_a_difference_is_shown():
    """Its p of 5 gained and none lost is 0.06, although the interval of the difference is above 0."""
    difference = accuracy_difference(evaluation(*[0] * 20), evaluation(*[1] * 5, *[0] * 15))
    assert difference["interval"][0] > 0
    assert difference_text(difference).endswith("p = 0.062); no difference shown")
    assert "no difference" not in difference_text({**difference, "p": 0.04})
    several = accuracy_difference(evaluation(0, 1) | {"samples": 2}, evaluation(1, 1) | {"samples": 2})
    assert several["mean"] == 0.5
    assert "p" not in several  # two samples of a problem are not independent problems


def test_a_run_without_a_completed_step_has_a_summary(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "failed"}')
    summary = read_strictly(write_summary(tmp_path))
    assert (summary["state"], summary["steps"], summary["metrics"], summary["eval"]) == ("failed", 0, {}, {})


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder"):
        write_summary(tmp_path)
