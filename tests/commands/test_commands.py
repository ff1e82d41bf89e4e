"""The commands of `python -m grpo`, on one finished run."""

import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from grpo.__main__ import commands, main
from grpo.commands._common import find_model
from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.config.overrides import Overrides
from grpo.config.values import flatten, to_dict
from grpo.data import arithmetic
from grpo.data.problems import load_arithmetic
from grpo.data.splits import with_validation
from grpo.launch.fork import fork
from grpo.launch.resume import resumed_config
from grpo.runs.folder import RunFolder


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run a command in an empty working directory: (exit code, stdout, stderr). Torch's settings are restored."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    left = [file.relative_to(cwd) for file in cwd.rglob("*") if file.is_file()]
    assert all(file.parts[:2] == ("outputs", "evaluations") for file in left)  # no Hydra folder


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of the finished run, which a test may change."""
    return shutil.copytree(finished_run, tmp_path / "run")


def newest_evaluation(folder):
    (file,) = folder.glob("eval/evaluate_*.json")
    return json.loads(file.read_text())


def evaluation(folder, name):
    return json.loads((folder / "eval" / f"{name}.json").read_text())


def test_without_a_command_all_commands_are_listed_with_what_they_do(tmp_path):
    arguments = [sys.executable, "-m", "grpo"]
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    listed = {line.split()[0]: line for line in result.stdout.splitlines() if line.startswith("  ")}
    assert {"evaluate", "chat", "plot", "download"} <= set(listed)
    assert all(len(line.split()) > 3 for line in listed.values())
    assert list(tmp_path.iterdir()) == []


def test_every_command_has_a_help_text(command):
    for name in commands():
        code, out, _ = command(name, "--help")
        assert code == 0
        assert f"python -m grpo {name}" in out


def test_an_unknown_command_is_answered_with_the_list_of_commands(command):
    code, _, err = command("evalute", "run_dir=outputs/x")
    assert code == 2
    assert err == f"error: there is no command 'evalute'; choose one of {', '.join(commands())}\n"


@pytest.mark.parametrize("name", ["evaluate", "chat", "plot"])
def test_a_folder_that_is_not_a_run_is_refused(command, tmp_path, name):
    code, _, err = command(name, f"run_dir={tmp_path}")
    assert code == 2
    assert err == f"error: run_dir={tmp_path} is not a run folder (it has no config.yaml)\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "learning_rate=1"], "here it is called optimizer.lr"),
        (["chat", "model=gpt"], "there is no model=gpt; choose one of"),
        (["evaluate", "experiment=quickstart", "model.name=/no/such/model"], "model.name=/no/such/model is neither"),
        (["evaluate", "experiment=quickstart", "data=jsonl"], "data=jsonl needs data.path=DIR"),
        (["plot"], "plot needs a run folder: python -m grpo plot run_dir=outputs/..."),
        (["plot", "run_dir=x", "grpo.beta=0"], "plot takes run_dir= and output_dir=, not grpo.beta=0"),
        (["download", "run_dir=x"], "remove run_dir"),
        (["download", "experiment=quickstart", "data=jsonl", "data.path=/no/such"], "there is no train.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_command_exits_with_2_and_a_short_message(command, arguments, said):
    code, out, err = command(*arguments)
    assert code == 2
    assert "Traceback" not in out + err
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") <= 2


def test_evaluate_reproduces_the_accuracy_of_the_trained_model(command, run):
    code, out, _ = command("evaluate", f"run_dir={run}")
    assert code == 0
    again, after = newest_evaluation(run), evaluation(run, "after")
    assert (again.pop("model"), again.pop("set")) == (str(run / "final_model"), "problems")
    assert again == after
    assert f"{after['accuracy']:.1%}" in out
    assert str(run / "eval") in out


def test_evaluate_with_the_initial_model_gives_the_accuracy_before_training(command, run):
    code, out, _ = command("evaluate", f"run_dir={run}", "model.name=tiny")
    assert code == 0
    again, before = newest_evaluation(run), evaluation(run, "before")
    assert (again.pop("model"), again.pop("set")) == ("tiny", "problems")
    assert again == before
    assert f"{before['accuracy']:.1%}" in out


def test_evaluate_changes_only_what_the_command_line_names(command, run):
    assert command("evaluate", f"run_dir={run}", "eval.max_problems=3")[0] == 0
    again, after = newest_evaluation(run), evaluation(run, "after")
    assert again["n"] == 3
    first_three = {row["id"] for row in arithmetic.problems("test")[:3]}
    assert {problem["problem_id"] for problem in again["problems"]} == first_three
    of_all = {problem["problem_id"]: problem["completion"] for problem in after["problems"]}
    assert all(problem["completion"] == of_all[problem["problem_id"]] for problem in again["problems"])
    assert (run / "config.yaml").read_text().count("max_problems: 8") == 1


def test_evaluate_uses_the_last_checkpoint_of_a_run_that_has_no_final_model(command, run):
    shutil.rmtree(run / "final_model")
    assert command("evaluate", f"run_dir={run}")[0] == 0
    again = newest_evaluation(run)
    assert again["step"] == 2
    assert again["problems"] == evaluation(run, "after")["problems"] != evaluation(run, "before")["problems"]


def test_evaluate_refuses_a_run_that_has_no_trained_model_yet(command, run):
    shutil.rmtree(run / "final_model")
    shutil.rmtree(run / "checkpoints")
    code, _, err = command("evaluate", f"run_dir={run}")
    assert code == 2
    assert "holds no trained model yet; for the untrained one add model.name=" in err


def test_evaluate_works_without_a_run_and_leaves_no_file(command):
    code, out, _ = command(
        "evaluate", "model=tiny", "data=arithmetic", "hardware=cpu", "hardware.threads=1", "eval.max_problems=4"
    )
    assert code == 0
    assert "model: tiny" in out
    assert "model (n=4)" in out


@pytest.mark.parametrize("name", ["evaluate", "chat"])
def test_a_command_refuses_to_run_a_function_that_only_the_run_folder_names(command, run, tmp_path, name):
    proof = tmp_path / "proof"
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["objective"]["_target_"] = "subprocess.check_output"
    config["objective"]["args"] = ["touch", str(proof)]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    code, _, err = command(name, f"run_dir={run}", *(["prompt=hello"] if name == "chat" else []))
    assert code == 2
    assert "asks to run subprocess.check_output (objective._target_)" in err
    assert not proof.exists()


SECRET = "${oc.env:SECRET}"
TEXTS = ("name", "data.system_prompt", "tracking.name", "tracking.group", "tracking.project", "tracking.entity")


@pytest.mark.parametrize("reader", ["evaluate", "resume", "fork"])
def test_values_of_a_run_folder_are_not_interpolated(run, tmp_path, monkeypatch, reader):
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.chdir(tmp_path)
    frozen = yaml.safe_load((run / "config.yaml").read_text())
    for key in TEXTS:
        group, _, name = f".{key}".rpartition(".")
        (frozen[group[1:]] if group[1:] else frozen)[name] = SECRET
    frozen["tracking"]["tags"] = ["a", SECRET]
    (run / "config.yaml").write_text(yaml.safe_dump(frozen))
    overrides = Overrides(["grpo.num_steps=4", "tracking.project='\\${project}'"])
    composed = compose_config(overrides.lines)
    if reader == "evaluate":
        config = find_model([f"run_dir={run}", *overrides]).config
    elif reader == "resume":
        config, changes = resumed_config(RunFolder(run), composed, overrides)
        assert changes == {"grpo.num_steps": 4, "tracking.project": "${project}"}
    else:
        composed = compose_config(["fork=true", f"run_dir={run}", "accept_changes=true", *overrides])
        config = fork(RunFolder(tmp_path / "forked"), composed, overrides)
        config = typed(RunFolder(tmp_path / "forked").frozen_config())
    found = flatten(to_dict(config))
    expected = dict.fromkeys(TEXTS, SECRET) | {"tracking.project": "${project}"}
    if reader == "fork":
        expected["tracking.name"] = None  # a fork is a separate run in W&B
    assert {key: found[key] for key in TEXTS} == expected
    assert found["tracking.tags"] == ["a", SECRET]


def test_a_run_folder_cannot_keep_tracking_on_that_the_command_line_switches_off(run):
    frozen = yaml.safe_load((run / "config.yaml").read_text())
    frozen["tracking"] |= {"mode": "online", "entity": "someone_else"}
    (run / "config.yaml").write_text(yaml.safe_dump(frozen))
    overrides = Overrides(["tracking=disabled"])
    assert "tracking=disabled" in RunFolder(run).first_overrides()  # which config.yaml contradicts
    config, changes = resumed_config(RunFolder(run), compose_config(overrides.lines), overrides)
    assert (config.tracking.mode, config.tracking.entity) == ("disabled", None)
    assert changes == {"tracking.mode": "disabled", "tracking.entity": None}


def test_chat_answers_a_prompt_as_the_evaluation_did(command, run):
    problem = evaluation(run, "after")["problems"][0]
    code, out, _ = command("chat", f"run_dir={run}", f"prompt={question(problem)}")
    assert code == 0
    assert out == problem["completion"] + "\n"


def test_chat_answers_each_line_of_its_input(command, run, monkeypatch):
    problems = evaluation(run, "after")["problems"][:3]
    lines = [question(problem) for problem in problems]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n".join(lines) + "\n"))  # empty lines are no problems
    code, out, err = command("chat", f"run_dir={run}")
    assert code == 0
    assert out == "".join(problem["completion"] + "\n" for problem in problems)
    assert "each line is a new problem" in err


def question(problem):
    return next(row["question"] for row in arithmetic.problems("test") if row["id"] == problem["problem_id"])


def test_a_prompt_may_contain_any_character(command):
    tiny = ["model=tiny", "data=arithmetic", "hardware=cpu", "hardware.threads=1", "grpo.max_completion_length=4"]
    code, _, err = command("chat", *tiny, 'prompt=a = {b}, "c" ${d} [e] \\f')
    assert (code, err) == (0, "")


def test_chat_samples_if_a_temperature_is_given(command, run):
    prompt = f"prompt={question(evaluation(run, 'after')['problems'][0])}"
    answers = [command("chat", f"run_dir={run}", "rollout.temperature=5", f"seed={seed}", prompt) for seed in (1, 1, 2)]
    assert [code for code, _, _ in answers] == [0, 0, 0]
    assert answers[0] == answers[1] != answers[2]


def test_plot_writes_to_output_dir_and_leaves_the_run_unchanged(command, run, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    charts = tmp_path / "charts"
    code, out, _ = command("plot", f"run_dir={run}", f"output_dir={charts}")
    assert code == 0
    printed = out.split()
    assert printed
    assert all(name.startswith(str(charts)) for name in printed)
    drawn = {path.name for path in charts.rglob("*.png")}
    assert drawn == {path.name for path in (run / "plots").glob("*.png")}
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_plot_recreates_deleted_charts_and_a_deleted_summary(command, run):
    shutil.rmtree(run / "plots")
    (run / "summary.json").unlink()
    assert command("plot", f"run_dir={run}")[0] == 0
    assert list((run / "plots").glob("*.png"))
    assert json.loads((run / "summary.json").read_text())["steps"] == 2


def test_plot_of_a_broken_metrics_file_names_the_line(command, run):
    file = run / "metrics" / "metrics.jsonl"
    file.write_text("{broken\n" + file.read_text())
    code, _, err = command("plot", f"run_dir={run}")
    assert code == 2
    assert "metrics.jsonl, line 1" in err


def test_download_has_nothing_to_download_for_the_embedded_model_and_data(command):
    code, out, _ = command("download", "experiment=quickstart")
    assert code == 0
    validation = len(with_validation(load_arithmetic(), 0.1).validation)
    train, test = len(arithmetic.problems("train")), len(arithmetic.problems("test"))
    assert out == (
        "model: tiny is already on this machine\n"
        f"data: {train - validation} problems to train on, {validation} to validate, {test} to test\n"
    )


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory, small_run, launch):
    """A finished run with LoRA that learned something. Tests only read it."""
    cwd = tmp_path_factory.mktemp("adapter")
    settings = [*small_run, "tuning=lora", "optimizer.lr=0.01", "checkpoint.every=1", "run_dir=run"]
    result = launch(*settings, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return cwd / "run"


def test_a_lora_run_is_evaluated_with_and_without_its_adapter(command, adapter_run, tmp_path):
    run = shutil.copytree(adapter_run, tmp_path / "run")
    before, after = evaluation(run, "before"), evaluation(run, "after")
    assert before["problems"] != after["problems"]
    for extra, expected in (([], after), (["model.name=tiny"], before)):
        code, _, err = command("evaluate", f"run_dir={run}", *extra)
        assert code == 0, err
        assert newest_evaluation(run)["problems"] == expected["problems"]
        shutil.rmtree(run / "eval")
    shutil.rmtree(run / "final_model")  # as in an interrupted run: the last checkpoint is used
    code, _, err = command("evaluate", f"run_dir={run}")
    assert code == 0, err
    assert newest_evaluation(run)["problems"] == after["problems"]


def test_merge_writes_one_model_from_a_lora_run(command, adapter_run, tmp_path):
    run = shutil.copytree(adapter_run, tmp_path / "run")
    code, out, err = command("merge", f"run_dir={run}")
    assert (code, out) == (0, f"{run / 'merged_model'}\n"), err
    code, _, err = command("evaluate", f"run_dir={run}", f"model.name={run / 'merged_model'}")
    assert code == 0, err
    assert newest_evaluation(run)["problems"] == evaluation(run, "after")["problems"]
    code, _, err = command("merge", f"run_dir={run}")
    assert (code, "exists already" in err) == (2, True)
    shutil.rmtree(run / "final_model")
    code, _, err = command("merge", f"run_dir={run}", f"output_dir={tmp_path / 'other'}")
    assert (code, "has no final_model/ with its adapter yet" in err) == (2, True)


def test_merge_does_not_use_the_initial_adapter_of_a_run(command, launch, small_run, adapter_run, tmp_path):
    adapter = adapter_run / "final_model"
    settings = [*small_run, "tuning=lora", f"model.lora.init_from={adapter}", "checkpoint.every=1", "run_dir=run"]
    stopped = launch(*settings, cwd=tmp_path, fault=("grpo.training.trainer.apply_gradient", "2", "kill"))
    assert stopped.returncode == -9
    code, _, err = command("merge", f"run_dir={tmp_path / 'run'}")
    assert (code, "has no final_model/ with its adapter yet" in err) == (2, True)
    code, _, err = command("merge", "model=tiny", "tuning=lora", f"model.lora.init_from={adapter}")
    assert (code, err) == (2, "error: merge needs output_dir=DIR where no run folder is named\n")
    code, _, err = command("merge", "model=tiny", "tuning=lora", "model.lora.init_from=nowhere", "output_dir=out")
    assert (code, "is not the folder of an adapter" in err) == (2, True)


def test_a_run_from_another_device_can_be_merged(command, adapter_run, tmp_path):
    run = shutil.copytree(adapter_run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["hardware"]["device"], config["model"]["device_map"] = "cuda", "cuda:1"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    code, _, err = command("merge", f"run_dir={run}")
    assert (code, "its config.yaml changed since the run was started" in err) == (2, True)
    assert not (run / "merged_model").exists()
    code, out, err = command("merge", f"run_dir={run}", "accept_changes=true")
    assert (code, out) == (0, f"{run / 'merged_model'}\n"), err


def test_merge_is_refused_without_an_adapter(command, finished_run):
    code, _, err = command("merge", f"run_dir={finished_run}")
    assert (code, err) == (2, f"error: nothing to merge: {finished_run} has no adapter\n")


def test_an_adapter_given_as_a_model_is_answered_with_overrides_that_work(command, adapter_run, tmp_path):
    data = ["data=arithmetic", "data.system_prompt=null", "eval.max_problems=8", "hardware=cpu"]
    code, _, err = command("evaluate", f"model.name={adapter_run / 'final_model'}", *data)
    assert code == 2
    fix = err.strip().partition(", set ")[2].split()
    assert "tuning=lora" in fix
    code, out, err = command("evaluate", *fix, *data, "grpo.max_completion_length=40")
    assert code == 0, err
    assert f"{evaluation(adapter_run, 'after')['accuracy']:.1%}" in out
