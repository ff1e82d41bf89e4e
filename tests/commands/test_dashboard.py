"""The W&B view, built offline: every panel shows a metric that runs log."""

import json

import pytest

from grpo.__main__ import main
from grpo.commands.dashboard import View, panels, view_of, workspace
from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.config.overrides import Overrides
from grpo.runs.folder import RunFolder
from grpo.runs.sweep_folder import SweepFolder
from tests.launches import launch
from tests.sweeps.test_sweep import QUICK

pytest.importorskip("wandb_workspaces")


def test_every_panel_shows_a_metric_that_a_run_logs(finished_run):
    row = json.loads((finished_run / "metrics" / "metrics.jsonl").read_text().splitlines()[0])
    shown = {
        metric
        for plots in panels(view_of({"run_dir": str(finished_run)})).values()
        for m in plots.values()
        for metric in m
    }
    assert shown - row.keys() <= {
        "validation/accuracy",
        "test/accuracy",
        "kl",
        "cispo_clip_ratio",
    }  # logged with evaluations, with beta > 0, and with objective=cispo
    assert {"reward", "rewards/correctness/mean", "rewards/format/mean", "completions/mean_length", "loss"} <= shown


@pytest.mark.slow
def test_the_view_of_a_sweep_shows_only_its_group_and_puts_the_seeds_of_an_arm_together(tmp_path, monkeypatch):
    small = [*QUICK, "grpo.num_steps=1", "hydra/launcher=basic", "grpo.beta=0,0.04", "seed=1,2"]
    assert launch("-m", *small, "sweep_dir=mine", cwd=tmp_path).returncode == 0
    view = view_of({"sweep_dir": str(tmp_path / "mine")})
    assert view == View("grpo", ["correctness", "format"], "mine", ("grpo.beta",))
    spec = json.loads(workspace(view, "someone")._to_model().spec.model_dump_json(by_alias=True))
    text = json.dumps(spec)
    for metric in ("rewards/format/mean", "perf/tokens_per_s", "completions/clipped_ratio", "grad_norm", "completions"):
        assert metric in text, metric
    (runs,) = spec["section"]["runSets"]
    assert '"mine"' in json.dumps(runs["filters"])
    assert "grpo.value.beta" in json.dumps(runs["grouping"])  # as W&B addresses a key of the config
    assert "seed" not in json.dumps(runs["grouping"])
    config = SweepFolder(tmp_path / "mine").jobs()[0]
    assert config["overrides"] == ["grpo.beta=0", "seed=1"]


def test_arms_of_a_swept_config_group_are_distinguished_by_a_key_that_it_sets(tmp_path):
    overrides = ["tuning=lora,full", "seed=1,2"]
    points = [[f"tuning={tuning}", f"seed={seed}"] for tuning in ("lora", "full") for seed in (1, 2)]
    sweep = SweepFolder(tmp_path / "sweep")
    sweep.begin(Overrides(overrides), ["tuning", "seed"], points)
    for number, point in enumerate(points):
        folder = RunFolder(sweep.path / f"{number}_job")
        folder.path.mkdir()
        config = compose_config(["experiment=quickstart", "tracking.group=ablation", *point])
        folder.write_config(typed(config))
    view = view_of({"sweep_dir": str(sweep.path)})
    assert view.group == "ablation"
    (key,) = view.keys
    assert key.startswith("model.lora")


def test_a_group_with_symbols_that_w_and_b_refuses_has_a_view():
    view = View("grpo", ["correctness"], "${a} \N{ROCKET} lr=1 \u00fcber", ())
    assert workspace(view, "someone").name == "GRPO sweep _{a} _ lr_1 \u00fcber"


def test_arguments_that_name_nothing_to_show_are_refused(tmp_path, capsys):
    for arguments, said in (
        ([], "dashboard takes one of"),
        (["run_dir=a", "sweep_dir=b"], "dashboard takes one of"),
        ([f"sweep_dir={tmp_path}"], "is not the folder of a sweep"),
        ([f"run_dir={tmp_path}"], "is not a run folder"),
    ):
        assert main(["dashboard", *arguments]) == 2
        assert said in capsys.readouterr().err
