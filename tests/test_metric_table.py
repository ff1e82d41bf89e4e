"""The table of metrics describes everything that runs log, and docs/metrics.md shows this table."""

import json

from grpo.analysis.charts import ACCURACY, LOSS_VS_REWARD, PANELS
from grpo.metric_table import METRICS, component_ranges, markdown, of_components
from tests.launches import ROOT, SETTINGS, launch

OF_SOME_RUNS = {"kl", "loss_scale", "cispo_clip_ratio", "sampling/importance_sampling_ratio/mean"}
OF_SOME_RUNS |= {"sampling/refilled_groups"}


def test_every_column_of_a_run_is_in_the_table_and_has_a_meaning(finished_run):
    known = {metric.name: metric for metric in of_components(["correctness", "format"])}
    columns = set()
    for line in (finished_run / "metrics" / "metrics.jsonl").read_text().splitlines():
        columns |= json.loads(line).keys()
    assert columns <= known.keys()
    assert known.keys() - columns <= OF_SOME_RUNS  # see the next test
    assert all(metric.meaning and metric.taken_over for metric in METRICS)
    assert len(known) == len(of_components(["correctness", "format"]))


def test_the_columns_that_only_some_runs_have_are_in_the_table(tmp_path):
    half = ["hardware.compute_dtype=float16", "grpo.num_steps=1", "grpo.num_iterations=1", "tuning=lora"]
    half += ["objective.surrogate=cispo", "objective.sampling_correction=token_mask", "sampling.refill=1"]
    assert launch(*SETTINGS, *half, "run_dir=run", cwd=tmp_path).returncode == 0
    row = json.loads((tmp_path / "run" / "metrics" / "metrics.jsonl").read_text())
    known = {metric.name for metric in of_components(["correctness", "format"])}
    assert OF_SOME_RUNS <= row.keys() <= known


def test_docs_metrics_md_equals_the_table():
    assert (ROOT / "docs" / "metrics.md").read_text() == markdown(), "python -m grpo.metric_table > docs/metrics.md"


def test_the_reward_has_a_range_only_if_every_component_declares_one():
    first, second = {"range": [0, 2], "weight": 0.5}, {"range": [-1, 1], "weight": -2.0}
    config = {"reward": {"components": {"a": first, "b": second}}}
    assert component_ranges(config) == {"a": (0, 2), "b": (-1, 1), "reward": (-2.0, 3.0)}
    config["reward"]["components"]["c"] = {"weight": 1.0}
    assert component_ranges(config) == {"a": (0, 2), "b": (-1, 1)}
    assert component_ranges({}) == {}


def test_every_chart_of_metrics_is_named_in_the_table():
    of_their_own = {ACCURACY, LOSS_VS_REWARD.title}
    assert {panel.title for panel in PANELS} - of_their_own <= {metric.panel for metric in METRICS}
