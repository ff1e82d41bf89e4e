"""A run whose problems, tokenizer or base weights have changed is not resumed without being told to."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.model.loading import load_model
from grpo.runs.folder import RunFolder
from grpo.tiny import MODEL_DIR
from grpo.training.digests import check_digests, kept_by_fork, weights_digest
from tests.launches import SHORT, grpo, launch, rows

TEMPLATE = "{{ messages[-1].content }}?"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after step 2 of 4, next to its model and its data. Tests copy it."""
    cwd = tmp_path_factory.mktemp("digests")
    shutil.copytree(MODEL_DIR, cwd / "model")
    shutil.copytree(Path(__file__).resolve().parents[1] / "sums", cwd / "sums")
    own = ["model.name=model", "data.path=sums", "until_step=2", "run_dir=run", "preflight=false"]
    done = launch(*SHORT, *own, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd


def other_answer(cwd):
    lines = (cwd / "sums" / "train.jsonl").read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | {"answer": "12345"})
    (cwd / "sums" / "train.jsonl").write_text("\n".join(lines) + "\n")


def other_weights(cwd):
    weights = load_file(cwd / "model" / "model.safetensors")
    save_file(
        {name: value * 1.001 for name, value in weights.items()}, cwd / "model" / "model.safetensors", {"format": "pt"}
    )


def other_template(cwd):
    (cwd / "model" / "chat_template.jinja").write_text(TEMPLATE)


def other_config(cwd):
    file = cwd / "run" / "config.yaml"
    file.write_text(file.read_text().replace("seed: 1", "seed: 2"))


CHANGES = {
    "problems": (other_answer, "the problems of data changed"),
    "weights": (other_weights, "the weights of the starting model changed"),
    "template": (other_template, "the rendered prompts and the tokenizer or its chat template changed"),
    "config": (other_config, "its config.yaml changed"),
}


@pytest.mark.parametrize(
    "change", ["problems", *(pytest.param(each, marks=pytest.mark.slow) for each in [*CHANGES][1:])]
)
def test_a_run_is_not_resumed_after_a_change_of_what_it_depends_on(stopped, tmp_path, change):
    cwd = shutil.copytree(stopped, tmp_path / "cwd")
    apply, said = CHANGES[change]
    apply(cwd)
    recorded = (cwd / "run" / "digests.json").read_text()
    refused = launch("resume=true", "run_dir=run", cwd=cwd)
    assert refused.returncode == 2
    last = refused.stderr.splitlines()[-1]
    assert said in last
    assert last.endswith("or add accept_changes=true")
    assert (cwd / "run" / "digests.json").read_text() == recorded
    assert RunFolder(cwd / "run").status()["state"] == "interrupted"

    done = launch("resume=true", "run_dir=run", "accept_changes=true", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert len(rows(cwd / "run")) == 4
    accepted = RunFolder(cwd / "run").launches()[-1]["accepted"]
    assert set(accepted) == ({"prompts", "tokenizer"} if change == "template" else {change})
    changed = {name for name, each in json.loads(recorded).items() if RunFolder(cwd / "run").digests()[name] != each}
    assert changed == set(accepted)


@pytest.mark.slow
def test_commands_and_forks_compare_only_what_the_command_line_leaves_as_it_was(stopped, tmp_path):
    cwd = shutil.copytree(stopped, tmp_path / "cwd")
    other_answer(cwd)
    for command in (["evaluate"], ["verify"]):
        refused = grpo(*command, "run_dir=run", cwd=cwd)
        assert refused.returncode == 2
        assert "the problems of data changed" in refused.stderr.splitlines()[-1]
    assert grpo("evaluate", "run_dir=run", "accept_changes=true", cwd=cwd).returncode == 0
    shutil.copytree(stopped / "sums", cwd / "others")
    assert grpo("evaluate", "run_dir=run", "data.path=others", cwd=cwd).returncode == 0
    fork = ["fork=true", "run_dir=run", "hydra.run.dir=fork"]
    refused = launch(*fork, cwd=cwd)
    assert refused.returncode == 2
    assert "the problems of data changed" in refused.stderr.splitlines()[-1]
    assert not (cwd / "fork").exists()
    assert launch(*fork, "data.path=others", cwd=cwd).returncode == 0
    parent = RunFolder(cwd / "run").digests()
    child = RunFolder(cwd / "fork").digests()
    assert {name for name in parent if parent[name] != child[name]} == {"config"}  # the others are copies of the first


@pytest.mark.slow
def test_a_run_without_digests_is_resumed_and_has_them_from_then_on(stopped, tmp_path):
    cwd = shutil.copytree(stopped, tmp_path / "cwd")
    (cwd / "run" / "digests.json").unlink()
    assert launch("resume=true", "run_dir=run", cwd=cwd).returncode == 0
    recorded = RunFolder(cwd / "run").digests()
    assert recorded == RunFolder(stopped / "run").digests()


def test_weights_that_are_rounded_in_another_way_are_not_compared(tmp_path):
    run = RunFolder(tmp_path)
    run.update_digests({"weights": "float32:a", "problems": "b"})
    assert check_digests(run, {"weights": "bfloat16:c", "problems": "b"}, (), accept=False) == []
    assert check_digests(run, {"weights": "float32:c", "problems": "b"}, (), accept=True) == ["weights"]
    assert check_digests(run, {"weights": "float32:c"}, ["model.name"], accept=False) == []


def test_weights_in_fewer_bits_than_those_of_the_run_are_not_compared(tmp_path):
    """As `grpo merge` loads the model that training with an adapter loaded in float32."""
    settings = ["experiment=quickstart", "tuning=lora", "model.dtype=bfloat16", "hardware.compute_dtype=float32"]
    config = typed(compose_config(settings))
    model = load_model(replace(config.model, dtype="float32"), torch.device("cpu"))
    run = RunFolder(tmp_path)
    run.update_digests({"weights": weights_digest(model, config)})
    merged = {"weights": weights_digest(model.bfloat16(), config)}
    assert check_digests(run, merged, (), accept=False) == []


def test_a_fork_keeps_the_digests_of_the_parts_that_it_does_not_change():
    parent = {"config": "a", "problems": "b", "prompts": "c", "tokenizer": "d", "weights": "e", "adapter": "f"}
    assert kept_by_fork(parent | {"of_a_later_version": "g"}, ["data"]) == kept_by_fork(parent, ["data"])
    assert kept_by_fork(parent, ["optimizer.lr"]).keys() == parent.keys() - {"config"}
    assert kept_by_fork(parent, ["model.device_map"]).keys() == parent.keys() - {"config"}
    assert kept_by_fork(parent, ["data"]).keys() == {"tokenizer", "weights", "adapter"}
    assert kept_by_fork(parent, ["model.name"]).keys() == {"problems"}
    assert kept_by_fork(parent, ["experiment"]) == {}
