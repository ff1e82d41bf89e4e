"""Tests of a run's report, written for a real run and opened in a real browser."""

import json
import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from markupsafe import escape
from matplotlib.image import imread

from grpo.analysis.charts import SHEET, write_charts
from grpo.analysis.model_card import model_card
from grpo.analysis.page import mean_advantage, readable
from grpo.analysis.run_report import content, write_run_report
from grpo.analysis.summary import difference_text
from grpo.runs.files import read_lines
from grpo.runs.folder import RunFolder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of a finished run, for tests that change it."""
    return RunFolder(shutil.copytree(finished_run, tmp_path / "run"))


def test_a_finished_run_has_a_report_that_needs_no_other_file(finished_run):
    text = (finished_run / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|@import|url\(""", text)
    for heading in ("Findings", "Before and after", "Charts", "Summary", "Config"):
        assert f"<h2>{heading}</h2>" in text
    (picture,) = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,', text)
    charts = picture.split(", ")
    assert charts[:4] == ["Reward", "Loss", "Output length", "Loss and reward of each step"]
    assert "Accuracy" in charts
    assert len(set(charts)) == len(charts)
    assert "<h1>quickstart" in text
    assert "_target_: grpo.algorithm.objective.Objective" in text


def test_the_report_and_the_end_of_the_run_show_the_difference_of_the_accuracies(finished_launch):
    process, folder = finished_launch
    difference = json.loads((folder / "summary.json").read_text())["accuracy_difference"]
    text = difference_text(difference)
    assert "paired over 8 problems" in text
    assert f"accuracy {text}" in process.stdout.splitlines()
    before, after = (RunFolder(folder).evaluation(name)["accuracy"] for name in ("before", "after"))
    assert difference["mean"] == pytest.approx(after - before)
    said = f"Test accuracy: {before:.1%} before training, {after:.1%} after training; {text}."
    assert f'<p class="headline">{escape(said)}</p>' in (folder / "report.html").read_text()


def test_the_report_says_why_answers_are_wrong_and_shows_problems_through_the_steps(finished_run):
    text = (finished_run / "report.html").read_text()
    after = RunFolder(finished_run).evaluation("after")["problems"]
    wrong = [row for row in after if not row["correct"]]
    counts = content(finished_run, finished_run / "plots" / SHEET)["wrong"]["counts"]
    assert sum(number for kind, number in counts["after"].items() if kind) == len(wrong) > 0
    assert "<h2>Why answers are wrong</h2>" in text
    (part,) = re.findall(r"<h2>One problem through the steps</h2>(.*?)<h2>", text, re.DOTALL)
    assert part.count("<details>") == 5
    assert part.count('<p class="muted">step 1 · ') == part.count('<p class="muted">step 2 · ') == 5


def test_the_model_card_has_the_data_the_evaluations_and_a_command_that_trains_the_model_again(finished_run, tmp_path):
    text = (finished_run / "final_model" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",  # no base_model, since the embedded model is not on the hub
        "tags": ["grpo", "reinforcement-learning"],
    }
    run = RunFolder(finished_run)
    for split, name in (("test", "before"), ("validation", "step_000002"), ("test", "after")):
        each = run.evaluation(name)
        low, high = each["accuracy_interval"]
        when = "before" if name == "before" else "after"
        row = f"| {split}, {when} training | {each['accuracy']:.1%} | {low:.1%} to {high:.1%} | {each['n']} |"
        assert row in body, name
    assert "`grpo.rewards.math_xml.correctness`, weight 1" in body
    (command,) = re.findall(r"```bash\n(.*)\n```", body)
    again = shlex.split(command)
    assert again[:2] == ["python", "launch.py"]
    assert again[2:] == run.launches()[0]["overrides"]  # none of them concerns one launch


def test_the_command_of_the_model_card_concerns_no_machine(run):
    given = ["experiment=quickstart", "data.path='/home/me/my sums'", "grpo.mu=1", "model.name=Qwen/Qwen2.5-0.5B"]
    given += ["hydra/launcher=ray", "hydra.sweep.dir=/home/me/out", "run_dir=/home/me/run"]
    given += [
        "hydra.searchpath=[file:///home/me/conf]",
        "+reward.components.x={_target_: a.b, file: /home/me/keys}",
    ]
    given += ["data.system_prompt='/no_think </answer>'"]
    launch = {**run.launches()[0], "overrides": given, "flags": ["--config-dir", "/home/me/my conf"]}
    (run.path / "launches.jsonl").write_text(json.dumps(launch) + "\n")
    (run.path / "changes.yaml").write_text("grpo.mu: 2\nmodel.lora.init_from: ~/adapter\n")
    text = model_card(run)
    assert "Folders are named without their path.\n" in text
    (command,) = re.findall(r"```bash\n(.*)\n```", text)
    assert shlex.split(command)[2:] == [
        "--config-dir",
        "my conf",
        "hydra.searchpath=[conf]",
        "experiment=quickstart",
        "data.path='my sums'",
        "model.name=Qwen/Qwen2.5-0.5B",
        "+reward.components.x={_target_: a.b, file: keys}",
        "data.system_prompt='/no_think </answer>'",
        "grpo.mu=2",
        "model.lora.init_from='adapter'",
    ]


def test_the_model_card_of_a_fork_has_no_command(run):
    config = run.config_file.read_text()
    lineage = {"run_dir": "/home/me/parent", "step": 1, "num_problems": 3, "weights_sha256": "0", "parent": None}
    run.config_file.write_text(config.replace("parent: null", f"parent: {json.dumps(lineage)}"))
    text = model_card(run)
    assert "no command repeats all of its training" in text
    assert "```bash" not in text
    assert "/home/me" not in text


def test_the_model_card_names_a_hub_model_and_no_folder_of_this_machine(run):
    config = run.config_file.read_text()
    changed = re.sub(r"(?m)^  name: tiny$", "  name: Qwen/Qwen2.5-0.5B-Instruct", config)
    changed = re.sub(r"(?m)^  path: null$", "  path: /home/me/my|sums", changed)
    changed = re.sub(r"(?m)^  system_prompt: null$", "  system_prompt: 'Write ```'", changed)
    assert len(set(changed.splitlines()) - set(config.splitlines())) == 3
    run.config_file.write_text(changed)
    text = model_card(run)
    assert "base_model: Qwen/Qwen2.5-0.5B-Instruct" in text
    assert "/home/me" not in text
    assert "| data | `my&#124;sums`" in text
    assert text.endswith("\n````\nWrite ```\n````\n")


def test_the_report_contains_the_findings_before_training(run):
    found = {"completions": 128, "prompts": 8, "frac_reward_zero_std": 0.0, "completions/clipped_ratio": 0.94}
    found |= {"components": {"format": {"mean": 0.1, "nonzero": 0.2, "missing": 0.0}}}
    found |= {"prompt_lengths": {"min": 3, "median": 4, "max": 9}, "warnings": ["94% of the completions are truncated"]}
    run.write_preflight(found)
    text = write_run_report(run.path).read_text()
    assert "Before training: 94% of the completions are truncated" in text
    assert "No problems found" not in text
    assert "format mean 0.1, nonzero in 20%" in text


def test_numbers_are_written_without_an_exponent():
    values = (1.249e-05, 2e-4, 0.0, -7.45e-9, 1234567.0, 2.8, -0.5, None, float("nan"))
    assert [readable(value) for value in values] == [
        "0.0000125", "0.0002", "0", "0", "1,234,567", "2.8", "-0.5", "-", "-",
    ]  # fmt: skip


def test_the_report_shows_completions_as_escaped_text_with_their_rewards(run):
    row = {"step": 1, "problem_id": "p", "prompt": "1+1?", "completion": "<answer>2</answer>", "answer": "2"}
    row |= {"rewards/correctness": 2.0, "rewards/format": 0.4, "reward": 2.4, "advantage": 0.5, "length": 7}
    run.write_samples(1, [row, row | {"completion": "<script>alert(1)</script>", "reward": 0.0, "advantage": -0.5}])
    text = write_run_report(run.path).read_text()
    assert "&lt;answer&gt;2&lt;/answer&gt;" in text and "<script>" not in text
    assert "advantage +0.50" in text
    assert list(content(run.path, run.path / "plots" / SHEET)["tables"]) == [
        "Values of correctness, share of completions",
        "Values of format, share of completions",
        "Right by the answer block or the last number, share of completions",
        "Signs of gaming",
    ]


def test_the_config_in_the_report_contains_the_changes_of_later_launches(run):
    run.record_changes({"grpo.num_steps": 777, "tracking.name": "${oc.env:HOME}"})
    config = yaml.safe_load(content(run.path, run.path / "plots" / SHEET)["config"])
    assert config["grpo"]["num_steps"] == 777
    assert config["tracking"]["name"] == "${oc.env:HOME}"


def test_the_steps_shown_of_a_long_run_are_spread_from_the_first_to_the_last(run):
    (sample, *_) = read_lines(run.path / "samples" / "step_000001.jsonl")
    for step in range(1, 1001):
        run.write_samples(step, [sample | {"step": step}])
    write_charts(run.path)
    chosen = list(content(run.path, run.path / "plots" / SHEET)["steps"])
    assert (len(chosen), chosen[0], chosen[-1]) == (12, 1, 1000)


def test_a_report_of_a_folder_without_a_run_or_without_a_completed_step_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_run_report(tmp_path)
    (tmp_path / "config.yaml").write_text("name: x\n")
    with pytest.raises(ValueError, match="has no completed step"):
        write_run_report(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_the_report_without_a_network(finished_run, tmp_path):
    picture = tmp_path / "page.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,3000"]
    address = (finished_run / "report.html").resolve().as_uri()
    dumped = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=120)
    assert "Held-out accuracy" in dumped.stdout
    subprocess.run([*command, f"--screenshot={picture}", address], capture_output=True, timeout=120, check=True)
    pixels = imread(picture)
    assert pixels.shape[:2] == (3000, 1100)
    assert (pixels[:, :, :3].min(axis=2) < 0.5).mean() > 0.01  # the page shows text


def test_a_component_without_any_value_is_omitted(run):
    row = {"step": 1, "problem_id": "p", "prompt": "1+1?", "completion": "2", "answer": "2", "advantage": 0.5}
    row |= {"rewards/correctness": 2.0, "rewards/none": None, "rewards/some": None, "reward": 2.4, "length": 7}
    run.write_samples(1, [row, row | {"rewards/some": 1.0}])
    text = write_run_report(run.path).read_text()
    assert "Values of some" in text and "Values of none" not in text
    assert "nan" not in text.split("<h2>Completions")[1].split("<h2>Config")[0]


def test_an_advantage_for_each_token_is_shown_by_its_mean():
    assert [mean_advantage(value) for value in (0.5, [1.0, -2.0], [], None)] == ["+0.50", "-0.50", "-", "-"]
