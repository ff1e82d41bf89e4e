import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from grpo.analysis.charts import COLORS, write_charts
from grpo.analysis.theme import TEXT, new_figure, style

PNGS = ["loss.png", "reward.png", "output_length.png", "loss_vs_reward.png", "training_progress.png"]


def write_run(run_dir: Path, rows: list[dict]) -> Path:
    (run_dir / "metrics").mkdir(parents=True)
    (run_dir / "metrics/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def rows(steps: int, **constant) -> list[dict]:
    """Metrics rows of a run that learns; `constant` replaces or adds values in every row."""
    learned = []
    for step in range(1, steps + 1):
        correctness, format = 2.0 * step / steps, 0.8 * step / steps
        row = {"step": step, "iteration": 1, "loss": 0.01 * (-1) ** step, "reward": correctness + format}
        row |= {"rewards/correctness/mean": correctness, "rewards/format/mean": format}
        row |= {"completions/mean_length": 100.0, "completions/min_length": 50, "completions/max_length": 200}
        row |= {"completions/clipped_ratio": 0.1, "kl": 0.02, "entropy": 0.5, "grad_norm": 1.0}
        learned.append(row | constant)
    return learned


def write_evaluation(run_dir: Path, name: str, **record) -> None:
    (run_dir / "eval").mkdir(exist_ok=True)
    (run_dir / f"eval/{name}.json").write_text(json.dumps(record))


def has_color(path: Path, color: str) -> np.ndarray:
    """Which pixels of an image have this colour, up to rounding."""
    return np.abs(imread(path)[:, :, :3] - to_rgb(color)).max(axis=2) < 0.02


def share_of(path: Path, color: str) -> float:
    return float(has_color(path, color).mean())


def test_all_charts_and_the_summary_are_written_and_not_empty(tmp_path):
    run_dir = write_run(tmp_path / "run", rows(40))
    write_evaluation(run_dir, "before", step=0, n=50, accuracy=0.25, reward=1.0)
    write_evaluation(run_dir, "after", step=40, n=50, accuracy=0.75, reward=2.0)
    paths = write_charts(str(run_dir))
    assert paths == [*(run_dir / "plots" / name for name in PNGS), run_dir / "summary.json"]
    shapes = {path.name: imread(path).shape[:2] for path in paths[:5]}
    # At 120 pixels per inch: single panels of 9 x 5.4 inches, and nine panels of 5.6 x 3.5 inches in five rows.
    assert shapes["loss.png"] == shapes["reward.png"] == shapes["loss_vs_reward.png"] == (648, 1080)
    assert shapes["output_length.png"] == (840, 1080)
    assert shapes["training_progress.png"] == (2100, 1344)
    assert all(np.mean(imread(path)[:, :, :3] < 0.9) > 0.01 for path in paths[:5])
    for name in ("reward", "correctness", "format"):
        assert share_of(paths[1], COLORS[name]) > 0.0005
    assert json.loads(paths[5].read_text())["eval"]["after"]["accuracy"] == 0.75


def test_only_metrics_and_evaluations_of_the_run_itself_are_drawn(tmp_path):
    absent = dict.fromkeys(["kl", "entropy", "grad_norm", "completions/clipped_ratio"])
    own = [
        {key: value for key, value in row.items() if not key.startswith("rewards/")} | {"rewards/brevity $/mean": 0.4}
        for row in rows(3, **absent)
    ]
    run_dir = write_run(tmp_path / "run", own)
    write_evaluation(run_dir, "other_data", step=900, n=5, accuracy=1.0, reward=2.8)
    paths = write_charts(run_dir)
    assert share_of(paths[1], "#cc79a7") > 0.0005  # a component with another name
    assert share_of(paths[1], COLORS["correctness"]) == share_of(paths[1], COLORS["format"]) == 0
    assert imread(paths[4]).shape[:2] == (840, 1344)  # the four panels that every run has
    write_evaluation(run_dir, "before", step=0, n=0, accuracy=0.25, reward=None)
    assert imread(write_charts(run_dir)[4]).shape[:2] == (1260, 1344)  # five with held-out accuracy, in three rows


def test_a_reward_that_equals_one_of_its_components_is_seen_beside_it(tmp_path):
    own = [row | {"rewards/correctness/mean": 0.0, "reward": row["rewards/format/mean"]} for row in rows(40)]
    paths = write_charts(write_run(tmp_path / "run", own))
    # In the left half there is no legend; the curve of the format lies on that of the reward.
    left = {name: has_color(paths[1], COLORS[name])[:, :500].sum() for name in ("reward", "format")}
    assert left["reward"] > 200
    assert left["format"] > 200


def test_small_numbers_on_an_axis_have_no_exponent(tmp_path):
    figure = new_figure()
    axes = figure.subplots()
    axes.plot([0, 1], [0, 3e-5])
    style(axes, "Loss")
    assert [label.get_text() for label in axes.get_yticklabels()][2:4] == ["0.000005", "0.00001"]


def test_a_long_name_of_a_component_stays_within_the_picture(tmp_path):
    own = [row | {"rewards/number_of_different_words/mean": 0.4} for row in rows(3)]
    paths = write_charts(write_run(tmp_path / "run", own))
    assert (imread(paths[1])[:, -8:, :3] == 1).all()  # nothing reaches the right edge


@pytest.mark.parametrize("steps", [1, 2])
def test_charts_of_short_runs_are_written_to_the_given_folder_only(tmp_path, steps):
    paths = write_charts(write_run(tmp_path / "run", rows(steps)), tmp_path / "new/folder")
    assert [path.parent for path in paths] == [tmp_path / "new/folder"] * 6
    assert share_of(paths[0], COLORS["loss"]) > 0.00002  # at least the marker of a step
    assert not (tmp_path / "run/plots").exists()
    assert not (tmp_path / "run/summary.json").exists()


@pytest.mark.slow
def test_a_run_of_ten_thousand_steps_is_drawn(tmp_path):
    paths = write_charts(write_run(tmp_path / "run", rows(10_000)))
    assert share_of(paths[1], COLORS["reward"]) > 0.0005


def test_null_and_infinite_values_still_give_every_chart_with_name_and_limit(tmp_path):
    nothing = [dict.fromkeys(row) | {"step": row["step"], "iteration": 1} for row in rows(12)]
    nothing[3]["grad_norm"] = float("inf")
    run_dir = write_run(tmp_path / "run", nothing)
    (run_dir / "config.yaml").write_text("name: gsm8k\ngrpo: {max_completion_length: 512}\nother: ${absent}\n")
    plain, configured = write_charts(write_run(tmp_path / "plain/run", nothing)), write_charts(run_dir)
    for before, after in zip(plain[:5], configured[:5], strict=True):
        assert has_color(after, TEXT)[:45].sum() > 1.5 * has_color(before, TEXT)[:45].sum()  # the experiment's name
    # The dashed line at the limit is a row of pixels of which about half are dark.
    dark = [(imread(path)[:, :, :3].mean(axis=2) < 0.8).mean(axis=1).max() for path in (plain[2], configured[2])]
    assert dark[0] < 0.3
    assert dark[1] > 0.4


def test_a_run_without_a_completed_step_is_refused_and_no_file_is_written(tmp_path):
    (tmp_path / "config.yaml").write_text("name: x\n")
    with pytest.raises(ValueError, match="no completed step") as error:
        write_charts(tmp_path)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder"):
        write_charts(tmp_path)
