"""launch.py as a user sees it: quick answers, the folder of a finished run, sweeps, own rewards, and bad commands."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config
from wandb.util import get_core_path

from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.config.errors import ConfigError
from grpo.config.migrations import load_frozen
from grpo.launch.freeze import freeze
from grpo.rewards.scoring import score
from grpo.runs.console import evaluation_table, live_numbers
from grpo.training.experiment import build_experiment
from tests.launches import SETTINGS

ROOT = Path(__file__).resolve().parents[2]


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(run):
    return read_lines(run / "metrics" / "metrics.jsonl")


def status(run):
    return json.loads((run / "status.json").read_text())


def folders_below(path):
    return sorted(str(each.relative_to(path)) for each in path.rglob("*") if each.is_dir())


# Quick answers.


@pytest.fixture(scope="module")
def import_seconds():
    """Seconds in which this machine imports what training needs."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import grpo.training.train"], cwd=ROOT, check=True)
    return time.monotonic() - started


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["--cfg", "job"], 0), (["learning_rate=1e-5"], 2), (["seed=x"], 2), (["-m", "--cfg", "job"], 2)],
)
def test_help_the_config_and_config_errors_are_printed_before_training_could_be_imported(
    cold, tmp_path, import_seconds, arguments, code
):
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        assert cold(*arguments, cwd=tmp_path).returncode == code
        seconds.append(time.monotonic() - started)
        if seconds[-1] < import_seconds:
            break
    assert min(seconds) < import_seconds
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["grpo.num_generations=1"]])
def test_torch_is_not_imported_before_training(tmp_path, arguments):
    code = """
        import sys
        root, sys.argv[1:] = sys.argv[1], sys.argv[2:]
        sys.path.insert(0, root)
        import launch
        try:
            launch.main(sys.argv[1:])
        except SystemExit:
            pass
        slow = {"torch", "transformers", "datasets", "pandas", "matplotlib", "wandb"} & set(sys.modules)
        print("imported:", *sorted(slow))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(ROOT), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1].split() == ["imported:"], result.stderr


def test_importing_the_package_changes_no_global_state_of_the_process():
    code = """
        import json, os, sys, threading
        def state():
            return [dict(os.environ), sys.path[:], threading.active_count()]
        before = state()
        import grpo
        print(json.dumps([before, state()]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    before, after = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    assert after == before


def test_cfg_job_prints_the_whole_config(launch, tmp_path):
    printed = yaml.safe_load(launch("--cfg", "job", "grpo.beta=0.5", cwd=tmp_path).stdout)
    assert printed["grpo"]["beta"] == 0.5
    assert printed["grpo"]["batch_size"] == "${hardware.batch_size}"
    assert {"model", "data", "reward", "objective", "optimizer", "tracking", "eval", "checkpoint"} <= set(printed)


# A finished run.


def test_a_finished_run_prints_its_folder_and_the_next_commands(finished_launch):
    process, run = finished_launch
    path = f"outputs/quickstart/{run.name}"
    assert f"run folder {path}\n" in process.stdout
    for command in ("plot", "evaluate", "chat"):  # from any directory
        assert f"python -m grpo {command} run_dir={run}\n" in process.stdout
    assert "accuracy" in process.stdout
    assert "Traceback" not in process.stderr
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", run.name)


def test_a_finished_run_folder_has_all_expected_files(finished_run):
    files = {str(path.relative_to(finished_run)) for path in finished_run.rglob("*") if path.is_file()}
    wanted = {"config.yaml", "status.json", "launch.log", "summary.json", "metrics/metrics.jsonl"}
    wanted |= {".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml"}
    wanted |= {"samples/step_000001.jsonl", "samples/step_000002.jsonl"}
    wanted |= {"eval/before.json", "eval/step_000001.json", "eval/step_000002.json", "eval/after.json"}
    wanted |= {f"checkpoints/step_000002/{name}" for name in ("model.safetensors", "optimizer.safetensors")}
    wanted |= {f"checkpoints/step_000002/{name}" for name in ("trainer_state.json", "manifest.json")}
    wanted |= {"checkpoints/best/model.safetensors"}
    wanted |= {f"final_model/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert wanted <= files
    assert any(name.startswith("plots/") and name.endswith(".png") for name in files)
    assert not [name for name in files if name.endswith((".tmp", ".pt", ".bin", ".pkl"))]
    assert [path.name for path in (finished_run / "checkpoints").glob("step_*")] == ["step_000002"]


def test_the_status_of_a_finished_run(finished_run):
    rows = metrics(finished_run)
    assert status(finished_run).pop("seconds") > sum(row["step_time"] for row in rows)
    assert {key: value for key, value in status(finished_run).items() if key != "seconds"} == {
        "state": "finished",
        "error": None,
        "iteration": 1,
        "step": 2,
        "total_steps": 2,
        "best_reward": max(row["reward"] for row in rows),
        "saved_step": 2,
    }


def test_the_frozen_config_equals_the_config_composed_from_the_recorded_overrides(finished_run):
    frozen = typed(load_frozen(finished_run / "config.yaml"))
    overrides = yaml.safe_load((finished_run / ".hydra" / "overrides.yaml").read_text())
    assert frozen == freeze(compose_config(overrides))  # the config with the hardware settings that were open
    assert (frozen.grpo.batch_size, frozen.grpo.num_generations, frozen.optimizer["lr"]) == (2, 4, 0.001)
    assert "${" not in (finished_run / "config.yaml").read_text()


def test_metrics_rows_have_all_expected_names(finished_run):
    names = "step iteration loss reward reward_std reward_group_std frac_reward_zero_std"
    names += " kl entropy grad_norm learning_rate num_tokens"
    names += " rewards/correctness/mean rewards/correctness/std rewards/format/mean rewards/format/std"
    names += " completions/mean_length completions/min_length completions/max_length completions/clipped_ratio"
    names += " clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean step_time digest/completions"
    names += " timing_s/rollout timing_s/reward timing_s/reference timing_s/update timing_s/checkpoint"
    names += " perf/tokens_per_s perf/peak_memory_gb"
    rows = metrics(finished_run)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert set(names.split()) <= set(row)
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, int | float))
        assert row["step_time"] >= sum(row[f"timing_s/{part}"] for part in ("rollout", "reward", "reference", "update"))


def test_the_first_step_is_on_policy_and_has_a_kl_of_zero(finished_run):
    first = metrics(finished_run)[0]
    assert first["kl"] == 0.0
    assert first["clip_ratio/region_mean"] == 0.0
    assert abs(first["loss"]) < 1e-6  # the advantages of a group sum to 0


@pytest.mark.parametrize("step", [1, 2])
def test_the_samples_of_a_step_agree_with_its_metrics(finished_run, step):
    row = metrics(finished_run)[step - 1]
    samples = read_lines(finished_run / "samples" / f"step_{step:06d}.jsonl")
    names = "step problem_id prompt completion answer rewards/correctness rewards/format reward advantage length"
    assert len(samples) == 8
    assert all(set(names.split()) <= set(sample) for sample in samples)
    assert {sample["step"] for sample in samples} == {step}

    def mean(name):
        return sum(sample[name] for sample in samples) / 8

    assert mean("rewards/correctness") == pytest.approx(row["rewards/correctness/mean"], abs=1e-6)
    assert mean("rewards/format") == pytest.approx(row["rewards/format/mean"], abs=1e-6)
    assert mean("reward") == pytest.approx(row["reward"], abs=1e-6)
    assert mean("length") == row["completions/mean_length"]
    assert min(sample["length"] for sample in samples) == row["completions/min_length"]
    assert max(sample["length"] for sample in samples) == row["completions/max_length"]
    for sample in samples:
        assert sample["reward"] == pytest.approx(sample["rewards/correctness"] + sample["rewards/format"], abs=1e-6)
        assert sample["rewards/correctness"] in (0.0, 1.5, 2.0)
        a, b = sample["problem_id"].split("+")
        assert sample["answer"] == str(int(a) + int(b))
        assert a in sample["prompt"]
    for group in (samples[:4], samples[4:]):
        assert len({sample["problem_id"] for sample in group}) == 1
        assert sum(sample["advantage"] for sample in group) == pytest.approx(0, abs=1e-4)
        by_reward = sorted(group, key=lambda sample: sample["reward"])
        assert [sample["advantage"] for sample in by_reward] == sorted(sample["advantage"] for sample in group)


def test_num_tokens_is_the_sum_of_prompt_and_completion_lengths(finished_run):
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "final_model")
    seen = 0
    for row in metrics(finished_run):
        for sample in read_lines(finished_run / "samples" / f"step_{row['step']:06d}.jsonl"):
            prompt = [{"role": "user", "content": sample["prompt"]}]
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
            seen += len(ids) + sample["length"]
        assert row["num_tokens"] == seen


def test_the_final_model_loads_with_transformers_and_has_the_last_checkpoints_weights(finished_run):
    model = AutoModelForCausalLM.from_pretrained(finished_run / "final_model")
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "final_model")
    saved = load_file(finished_run / "checkpoints" / "step_000002" / "model.safetensors")
    weights = dict(model.named_parameters())
    assert set(saved) == set(weights)
    assert all(torch.equal(saved[name], weights[name]) for name in saved)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 27 + 35?"}], tokenize=False, add_generation_prompt=True
    )
    assert "What is 27 + 35?" in text
    out = model.generate(**tokenizer(text, return_tensors="pt", add_special_tokens=False), max_new_tokens=3)
    assert out.shape[1] > 3


def test_the_summary_holds_the_held_out_accuracy_before_and_after(finished_run):
    summary = json.loads((finished_run / "summary.json").read_text())
    for name in ("before", "after"):
        result = json.loads((finished_run / "eval" / f"{name}.json").read_text())
        right = sum(problem["correct"] for problem in result["problems"])
        assert result["n"] == len(result["problems"]) == 8
        assert result["accuracy"] == right / 8
        assert summary["eval"][name]["accuracy"] == right / 8
        assert summary["eval"][name]["n"] == 8
    assert summary["state"] == "finished"


def test_the_best_weights_are_those_of_the_first_step_with_the_best_accuracy(finished_run):
    accuracies = {}
    for step in (1, 2):
        result = json.loads((finished_run / "eval" / f"step_{step:06d}.json").read_text())
        accuracies[step] = result["accuracy"]
    best = json.loads((finished_run / "checkpoints" / "best" / "trainer_state.json").read_text())
    assert best["best_accuracy"] == max(accuracies.values())
    assert best["step"] == min(step for step in accuracies if accuracies[step] == max(accuracies.values()))


# Run folders that a launch refuses.


def test_a_folder_that_holds_a_run_is_refused_and_left_unchanged(launch, finished_run, small_run):
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    result = launch(*small_run, f"run_dir={finished_run}", cwd=finished_run.parent)
    assert result.returncode == 2
    assert f"{finished_run.name} already contains a run; resume it: resume=true" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


def test_resume_true_on_a_finished_run_is_refused_and_resume_auto_exits_with_0(launch, finished_run, small_run):
    refused = launch("resume=true", f"run_dir={finished_run}", cwd=finished_run.parent)
    assert refused.returncode == 2
    assert "has finished already" in refused.stderr
    again = launch(*small_run, "resume=auto", f"run_dir={finished_run}", cwd=finished_run.parent)
    assert again.returncode == 0
    assert "has finished already: nothing to do" in again.stdout
    assert status(finished_run)["state"] == "finished"


def test_a_folder_refused_for_an_untrusted_function_is_left_unchanged(launch, finished_run, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    config["objective"]["_target_"] = "their_code.loss"
    (theirs / "config.yaml").write_text(yaml.safe_dump(config))
    (theirs / "status.json").write_text('{"state": "interrupted", "step": 0}')
    before = (theirs / "config.yaml").read_text()
    result = launch("resume=true", "run_dir=theirs", cwd=tmp_path)
    assert result.returncode == 2
    assert "theirs asks to run their_code.loss (objective._target_)" in result.stderr
    assert (theirs / "config.yaml").read_text() == before
    assert status(theirs)["state"] == "interrupted"


# Bad commands.


@pytest.fixture
def bad_inputs(tmp_path):
    """A folder with a bad data set and an empty folder, as the working directory of a launch."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    (tmp_path / "data" / "train.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\nnot JSON\n')
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["kl_coef=0.1"], "here it is called grpo.beta"),
        (["+grpo.kl_coef=0.1"], "here it is called grpo.beta"),
        (["grpo.beta=${nope}"], "nope"),
        (["grpo.num_generations=1"], "must be 2 or more"),
        (["hardware=a100"], "Did you mean hardware=a100_80gb?"),
        (["resume=true"], "name one with run_dir=..., or start without resume"),
        (["resume=true", "run_dir=empty"], "empty is empty; start a run there without resume=true"),
        (["resume=true", "run_dir=data"], "data is not a run folder"),
        (["resume=true", "run_dir=nowhere"], "there is no folder nowhere; leave run_dir out"),
        (["experiment=quickstart", "data=jsonl", "data.path=data"], "data/train.jsonl, line 2: not JSON"),
        (
            ["experiment=quickstart", "model.name=empty", "run_dir=mine"],
            "empty is not a folder that transformers can load a model from",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_command_exits_with_2_says_how_to_fix_it_and_creates_no_folder(launch, bad_inputs, arguments, fix):
    result = launch(*arguments, cwd=bad_inputs)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert fix in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stdout + result.stderr
    assert "Warning" not in result.stderr
    assert [name for name in folders_below(bad_inputs) if name != "outputs"] == ["data", "empty"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.name=/no/such/model"], "model.name=/no/such/model is neither a local folder nor a model that the hub"),
        (["data=jsonl", "data.path=/no/such/data"], "data.path=/no/such/data: there is no train.jsonl"),
        (["data=jsonl"], "data=jsonl needs data.path=DIR"),
        (["data.max_prompt_length=3"], "prompts are longer than data.max_prompt_length=3 tokens"),
        (["model.attn_implementation=flash_attention_2"], "use model.attn_implementation=sdpa, torch's own"),
        (["tuning=lora", "model.lora.init_from=/nowhere"], "model.lora.init_from=/nowhere is not the folder of an"),
        (["objective._target_=os.system"], "objective._target_=os.system: Hydra refuses"),
        (["reward.components.format._target_=nope.f"], "reward.components.format._target_=nope.f: No module named"),
        (["eval.accuracy._target_=grpo.nope"], "eval.accuracy._target_=grpo.nope: "),
        (["+optimizer.momentum=0.9"], "optimizer: "),
        (["+data.shuffle=true"], "data: "),
        (["data.path=/no/such/data"], "data=arithmetic generates its own problems; for a folder add data=jsonl"),
        (["data=gsm8k", "data.path=null"], "data.path=null: give a data set's hub name, or a folder"),
        (["data.examples=[1]"], "data.examples must be a list of {question: text, completion: text}"),
        (["data.examples=[{question: x}]"], "data.examples must be a list of {question: text, completion: text}"),
        (["data.system_prompt=5"], "data.system_prompt=5: must be text"),
        (["optimizer.betas=[2,3]"], "optimizer: Invalid beta parameter"),
        (["optimizer._target_=tests.launches.OptimizerWithoutNames"], "optimizer: it must take pairs of name and"),
        (["reward.components.format.weight=nan"], "reward.components.format.weight=nan: must be a number"),
        (["objective.beta=-0.5"], "objective.beta=-0.5: must be 0 or more"),
        (["objective.epsilon_low=-1"], "objective.epsilon_low=-1.0: must lie between 0 and 1"),
        (["grpo.batch_size=null"], "grpo.batch_size=null: must be a number"),
        (["seed=-1"], "seed=-1: must lie between"),
        (["reward.timeout_s=0"], "reward.timeout_s=0.0: must be above 0"),
        (["reward.on_error=ignore"], "reward.on_error=ignore: must be one of fail, skip"),
        (["reward.components.format._target_=tests.empty_failure.f"], "AssertionError; it must be the dotted path"),
    ],
)
def test_a_bad_value_is_refused_before_any_weights_are_loaded(overrides, said):
    with pytest.raises(ConfigError) as refused:
        build_experiment(typed(compose_config(["experiment=quickstart", *overrides])))
    assert said in str(refused.value)
    assert str(refused.value).count("\n") <= 1


class Counting:
    """A reward that is built once and called for every batch."""

    def __init__(self, start):
        self.calls = start

    def __call__(self, completions, **columns):
        self.calls += 1
        return [float(self.calls)] * len(completions)


class NotCallable:
    pass


def test_a_reward_class_is_built_once_and_called_for_each_batch():
    own = "+reward.components.own={_target_: tests.launch.test_launch.Counting, start: 40, weight: 2}"
    setup = build_experiment(typed(compose_config(["experiment=quickstart", own])))
    component = next(each for each in setup.components if each.name == "own")
    for call in (41.0, 42.0):
        assert score([component], ["p"], ["c"], {"answer": ["1"]}).components["own"].tolist() == [call]
    for node, said in (
        (
            "{_target_: tests.launch.test_launch.NotCallable}",
            "own._target_=tests.launch.test_launch.NotCallable: .*or be a class whose objects have it",
        ),
        (
            "{_target_: tests.launch.test_launch.Counting}",
            r"own: tests.launch.test_launch.Counting\(\) raised TypeError: .*'start'",
        ),
        ("{_target_: tests.launch.test_launch.Counting, end: 1}", "own: Counting.* unexpected keyword argument 'end'"),
    ):
        with pytest.raises(ConfigError, match=said):
            build_experiment(typed(compose_config(["experiment=quickstart", f"+reward.components.own={node}"])))


def test_an_incomplete_model_folder_is_refused(tmp_path):
    whole = ROOT / "grpo" / "tiny" / "model"
    for broken in ("no_tokenizer", "cut"):
        shutil.copytree(whole, tmp_path / broken)
    for file in (tmp_path / "no_tokenizer").glob("tokenizer*"):
        file.unlink()
    os.truncate(tmp_path / "cut" / "model.safetensors", 1000)
    for broken, said in (("no_tokenizer", "without its tokenizer"), ("cut", "could not be loaded")):
        with pytest.raises(ConfigError, match=said):
            overrides = ["experiment=quickstart", f"model.name={tmp_path / broken}", "hardware.threads=1"]
            build_experiment(typed(compose_config(overrides))).load_policy()


def test_a_chat_template_that_rejects_system_messages_is_refused_with_the_fix(tmp_path):
    shutil.copytree(ROOT / "grpo" / "tiny" / "model", tmp_path / "model")
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}hello"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    overrides = ["experiment=quickstart", f"model.name={tmp_path / 'model'}", "data.system_prompt=Be brief."]
    with pytest.raises(
        ConfigError, match=r"\(no system role\); if it takes no system message, set data\.system_prompt"
    ):
        build_experiment(typed(compose_config(overrides)))


def test_more_tokens_than_a_model_has_positions_for_are_refused_with_the_length_that_fits(tmp_path, caplog):
    folder = tmp_path / "learned"
    shutil.copytree(ROOT / "grpo" / "tiny" / "model", folder)
    GPT2Config(n_positions=64, n_embd=8, n_layer=1, n_head=1).save_pretrained(folder)
    experiment = ["experiment=quickstart", "hardware.threads=1"]
    for key in ("grpo.max_completion_length", "eval.max_completion_length"):
        others = [f"{name}_completion_length=1" for name in ("grpo.max", "eval.max") if not key.startswith(name)]
        command = [*experiment, f"model.name={folder}", *others]
        with pytest.raises(ConfigError, match=rf"{key}=60: with the longest prompt .* is for 64; lower it") as refused:
            build_experiment(typed(compose_config([*command, f"{key}=60"])))
        fits = int(re.search(r"lower it to (\d+)", str(refused.value))[1])
        build_experiment(typed(compose_config([*command, f"{key}={fits}"])))
        with pytest.raises(ConfigError, match=f"lower it to {fits}"):
            build_experiment(typed(compose_config([*command, f"{key}={fits + 1}"])))
    assert caplog.text == ""
    # The embedded model has rotary positions: exceeding their number gives only a warning.
    build_experiment(typed(compose_config([*experiment, "grpo.max_completion_length=512"])))
    assert "is for 512; lower it to " in caplog.text


# Resuming with other hardware, and with changes that do not work.


@pytest.fixture
def stopped_run(launch, small_run, tmp_path):
    """A finished run of one step, to be resumed with `grpo.num_steps=2`."""
    assert launch(*small_run, "run_dir=run", "grpo.num_steps=1", "checkpoint.every=1", cwd=tmp_path).returncode == 0
    return tmp_path / "run"


def test_a_change_that_does_not_work_leaves_the_run_unchanged(launch, stopped_run):
    more = ["resume=true", f"run_dir={stopped_run}", "grpo.num_steps=2"]
    refused = launch(*more, "hardware=rtx_24gb", cwd=stopped_run.parent)
    assert refused.returncode == 2
    assert "torch sees no CUDA device here" in refused.stderr
    assert not (stopped_run / "changes.yaml").exists()
    moved = launch(*more, "hardware=auto", cwd=stopped_run.parent)
    assert moved.returncode == 0, moved.stderr
    assert "equal up to rounding, not bit for bit" in moved.stderr + moved.stdout
    changes = yaml.safe_load((stopped_run / "changes.yaml").read_text())
    assert changes["hardware.rollout_tokens"] == 16384  # the value of the preset
    assert not set(changes) & {"hardware.batch_size", "grpo.batch_size", "hardware.device"}
    again = launch(*more, cwd=stopped_run.parent)
    assert again.returncode == 2
    assert "has finished already" in again.stderr


# Weights & Biases.


def test_a_tracked_launch_logs_every_row_the_evaluations_and_completions(launch, small_run, tmp_path):
    settings = ["tracking=offline", "tracking.completions_every=1", "eval.every=1", "run_dir=run"]
    result = launch(*small_run, *settings, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    (folder,) = (run / "wandb").glob("offline-run-*")
    assert f"look at the run: wandb leet {folder}" in result.stdout
    assert_tracked(run, folder)


@pytest.mark.slow
def test_after_several_kills_the_tracked_history_equals_the_metrics(launch, tmp_path):
    settings = [*SETTINGS, "tracking=offline", "eval.every=3", "eval.before=true", "eval.max_problems=2", "run_dir=run"]
    for call in ("3", "2", "4"):
        fault = ("grpo.training.recorder.Recorder.step", call, "kill")
        assert launch(*settings, "resume=auto", cwd=tmp_path, fault=fault).returncode == -9
    assert launch(*settings, "resume=auto", cwd=tmp_path).returncode == 0
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    assert len(folders) == 4
    assert_tracked(tmp_path / "run", folders[-1])


def assert_tracked(run, folder):
    """Assert that the wandb file of a run has every metrics row, with each evaluation in the row of its step."""
    (file,) = folder.glob("run-*.wandb")
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", file, folder.parent]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    history = {
        record["history"]["item"]["step"]: record["history"]["item"] for record in records if "history" in record
    }
    steps = [record["history"]["item"]["step"] for record in records if "history" in record]
    assert steps == sorted(set(steps))
    for row in metrics(run):
        tracked = history[row["step"]]
        for key, value in row.items():
            assert tracked.get(key) == value, (row["step"], key)
    made = {path.stem: json.loads(path.read_text()) for path in (run / "eval").glob("*.json")}
    assert len(made) >= 3
    for name, evaluation in made.items():
        assert history[evaluation["step"]][f"{evaluation['split']}/accuracy"] == evaluation["accuracy"], name


# Sweeps.


def test_a_sweep_has_a_folder_for_each_job_and_all_jobs_see_the_same_problems_and_noise(launch, small_run, tmp_path):
    sweep = ["hydra/launcher=basic", "eval.max_problems=2", "grpo.beta=0,0.04", "sweep_dir=sweep"]
    result = launch("-m", *small_run, *sweep, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    jobs = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert [job.name.split("_")[0] for job in jobs] == ["0", "1"]
    assert not [job.name for job in jobs if set(job.name) & set("=,/ ")]
    assert [load_frozen(job / "config.yaml").grpo.beta for job in jobs] == [0.0, 0.04]
    assert [status(job)["state"] for job in jobs] == ["finished", "finished"]
    without, with_penalty = (metrics(job) for job in jobs)
    assert without[0]["digest/completions"] == with_penalty[0]["digest/completions"]
    assert without[0].get("kl") is None
    assert with_penalty[1]["kl"] > 0


# What the console shows.

ROW = {
    "step": 1,
    "reward": 0.8,
    "rewards/format/mean": 0.8,
    "completions/mean_length": 20.0,
    "loss": 0.0,
    "step_time": 1,
}


def test_a_component_that_scored_no_completion_of_a_step_is_shown_as_missing():
    shown = live_numbers(ROW | {"rewards/judge/mean": None})
    assert "format 0.80" in shown
    assert re.search(r"judge \D", shown)


def test_a_component_that_scored_no_held_out_problem_is_shown_as_missing():
    result = {"n": 8, "accuracy": 0.5, "reward": 0.8, "completions/mean_length": 20.0}
    console = Console(file=io.StringIO(), width=80)
    console.print(evaluation_table("", {"after": result | {"rewards": {"format": 0.8, "judge": None}}}))
    forked = {"before": result | {"rewards": {"format": 0.8}}, "after": result | {"rewards": {"brief": 0.5}}}
    console.print(evaluation_table("", forked))  # a fork with other reward components
    line = next(line for line in console.file.getvalue().splitlines() if "judge" in line)
    assert not re.search(r"\d", line)


@pytest.mark.parametrize("none_at_all", [False, True])
def test_a_problem_that_the_evaluator_could_not_grade_counts_as_missing_and_not_as_wrong(launch, tmp_path, none_at_all):
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(MY_REWARDS))
    settings = ["experiment=quickstart", "grpo.num_steps=1", "eval.max_problems=8", "eval.every=1", "preflight=false"]
    settings += [
        "tracking=disabled",
        "eval.accuracy._target_=my_rewards.half_graded",
        f"+eval.accuracy.none={none_at_all}",
    ]
    run = launch(*settings, "run_dir=run", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "run" / "eval" / "after.json").read_text())
    graded = [] if none_at_all else [True] * 4
    assert sorted(map(str, (problem["correct"] for problem in result["problems"]))) == sorted(
        map(str, [*graded, *[None] * (8 - len(graded))])
    )
    assert (result["n"], result["accuracy"]) == ((0, None) if none_at_all else (4, 1.0))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["eval"]["after"]
    assert (summary["n"], summary["accuracy"]) == (result["n"], result["accuracy"])
    assert (tmp_path / "run" / "report.html").exists()


# Rewards of the user.

MY_REWARDS = """
    from pathlib import Path


    def half_graded(completions, none, **columns):
        half = 0 if none else len(completions) // 2
        return [1.0] * half + [None] * (len(completions) - half)


    def brief(completions, **columns):
        return [-len(completion[0]["content"]) / 10 for completion in completions]


    def digits(prompts, completions, answer):
        return [float(prompt[-1]["content"].count("1")) + len(a) for prompt, a in zip(prompts, answer, strict=True)]


    def needs_a_file(completions, **columns):
        Path("the_judge.txt").read_text()
        return [0.25 for _ in completions]
"""


@pytest.fixture
def my_rewards(tmp_path):
    """A working directory that holds my_rewards.py."""
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(MY_REWARDS))
    return tmp_path


def test_reward_functions_of_the_user_and_of_trl_are_scored_under_their_names(launch, small_run, my_rewards):
    result = launch(
        *small_run,
        "+reward.components.brief={_target_: my_rewards.brief, weight: 0.5}",
        "+reward.components.digits={_target_: my_rewards.digits, weight: 0.0}",
        "+reward.components.think={_target_: trl.rewards.think_format_reward, weight: 3}",
        "grpo.num_steps=1",
        "eval.before=false",
        "run_dir=run",
        cwd=my_rewards,
    )
    assert result.returncode == 0, result.stderr
    allowing = (
        "++reward.components.brief._target_=my_rewards.brief ++reward.components.digits._target_=my_rewards.digits"
    )
    assert f"python -m grpo evaluate run_dir={my_rewards / 'run'} {allowing}" in result.stdout
    command = [*allowing.split(), "++reward.components.think._target_=trl.rewards.think_format_reward"]
    again = subprocess.run(
        [sys.executable, "-m", "grpo", "evaluate", "run_dir=run", *command],
        cwd=my_rewards,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    run = my_rewards / "run"
    samples = read_lines(run / "samples" / "step_000001.jsonl")
    for sample in samples:
        assert sample["rewards/brief"] == pytest.approx(-len(sample["completion"]) / 10)
        assert sample["rewards/digits"] == sample["prompt"].count("1") + len(sample["answer"])
        assert sample["rewards/think"] == 0.0  # the embedded model writes <reasoning>, not <think>
        total = sample["rewards/correctness"] + sample["rewards/format"] + 0.5 * sample["rewards/brief"]
        assert sample["reward"] == pytest.approx(total, abs=1e-5)
    (row,) = metrics(run)
    assert row["rewards/brief/mean"] == pytest.approx(sum(sample["rewards/brief"] for sample in samples) / 8, abs=1e-5)
    assert row["rewards/think/mean"] == 0.0
    assert set(json.loads((run / "eval" / "after.json").read_text())["rewards"]) == {
        "correctness",
        "format",
        "brief",
        "digits",
        "think",
    }


def test_a_reward_function_that_raises_ends_the_run_and_the_same_command_resumes_it(launch, small_run, my_rewards):
    command = [*small_run, "+reward.components.judge={_target_: my_rewards.needs_a_file}", "eval.before=false"]
    failed = launch(*command, "resume=auto", cwd=my_rewards)
    assert failed.returncode == 1
    last_line = failed.stderr.splitlines()[-1]
    assert last_line.startswith("failed: RewardError: reward component 'judge' raised FileNotFoundError")
    assert "Traceback" not in failed.stdout + failed.stderr
    (run,) = (my_rewards / "outputs" / "quickstart").iterdir()
    assert status(run)["state"] == "failed"
    assert "reward component 'judge' raised FileNotFoundError" in status(run)["error"]
    assert "Traceback" in (run / "launch.log").read_text()
    assert "the_judge.txt" in (run / "launch.log").read_text()
    config = (run / "config.yaml").read_bytes()

    (my_rewards / "the_judge.txt").write_text("here")
    again = launch(*command, "resume=auto", cwd=my_rewards)
    assert again.returncode == 0, again.stderr
    assert [path.name for path in (my_rewards / "outputs" / "quickstart").iterdir()] == [run.name]
    assert status(run)["state"] == "finished"
    assert status(run)["error"] is None
    assert [row["step"] for row in metrics(run)] == [1, 2]
    assert (run / "config.yaml").read_bytes() == config
    assert [row["rewards/judge/mean"] for row in metrics(run)] == [0.25, 0.25]


def test_resuming_a_run_killed_before_its_first_step_still_refuses_a_changed_setting(
    launch, small_run, finished_run, tmp_path
):
    # What a kill leaves while the model is loading: config and status, no metrics.
    run = tmp_path / "run"
    shutil.copytree(finished_run / ".hydra", run / ".hydra")
    shutil.copy(finished_run / "config.yaml", run)
    (run / "status.json").write_text('{"state": "running", "error": null}')
    refused = launch("resume=true", "run_dir=run", "optimizer.lr=0.5", cwd=tmp_path)
    assert refused.returncode == 2
    assert "-> 0.5" in refused.stderr
    assert (run / "config.yaml").read_bytes() == (finished_run / "config.yaml").read_bytes()
