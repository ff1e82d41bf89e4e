"""Tests of a sweep's report with generated sweep folders; tests/sweeps/test_sweep.py launches real sweeps."""

import itertools
import json
import re
import shlex
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml

from grpo.analysis.sweep import SweepAnalysis
from grpo.analysis.sweep_report import headline, warnings, write_sweep_report
from grpo.config.compose import compose_config
from grpo.config.overrides import Overrides
from grpo.runs.folder import RunFolder
from grpo.runs.sweep_folder import SweepFolder, short
from tests.launches import ROOT

LAUNCH = str(ROOT / "launch.py")


def make_sweep(folder, swept, right, accuracy=True, states=None, fixed=("experiment=quickstart",), grid=True):
    """A sweep folder over `swept` (key -> values); `right(values)` tells for each problem whether a job solves it."""
    points = [
        [f"{key}={value}" for key, value in zip(swept, values, strict=True)]
        for values in itertools.product(*swept.values())
    ]
    overrides = [*fixed, *(f"{key}={','.join(values)}" for key, values in swept.items())]
    SweepFolder(folder).begin(Overrides(overrides), list(swept), points if grid else None)
    for number, point in enumerate(points):
        state = (states or {}).get(number, "finished")
        values = dict(each.split("=") for each in point)
        run = RunFolder(folder / f"{number}_job")
        if state != "pending":
            run.path.mkdir(parents=True)
            (run.path / "config.yaml").write_text(yaml.safe_dump({"name": "made", "seed": int(values.get("seed", 7))}))
            run.record_launch({"overrides": [*fixed, *point]})
            error = "ValueError: as it was" if state == "failed" else None
            run.update_status(state=state, step=20, total_steps=20, error=error)
            outcome = right(values)
            reward = float(np.mean(outcome)) + 1
            run.write_metrics(
                {"step": step, "iteration": 1, "reward": reward * step / 20, "rewards/format/mean": 0.5, "kl": 0.01}
                | {"completions/mean_length": 20.0, "num_tokens": 100 * step, "step_time": 0.5}
                for step in range(1, 21)
            )
            problems = [{"problem_id": f"p{i}", "correct": bool(each)} for i, each in enumerate(outcome)]
            if accuracy:
                run.write_evaluation(
                    "after", {"step": 20, "n": len(problems), "accuracy": float(np.mean(outcome)), "problems": problems}
                )
    SweepFolder(folder).update("finished")
    return folder


def drawn(shares):
    """A `right` for 200 problems: an arm solves `shares(values)` of them, with the same random numbers for all arms."""

    def right(values):
        luck = np.random.default_rng(int(values.get("seed", 1))).uniform(size=200)
        return luck < shares(values)

    return right


KEYS = {"grpo.beta": ["0", "0.04"], "optimizer.lr": ["1e-6", "5e-6"], "seed": ["1", "2", "3"]}


@pytest.fixture
def better_rate(tmp_path):
    """A sweep in which the learning rate has an effect and beta has none."""
    return make_sweep(tmp_path / "sweep", KEYS, drawn(lambda values: 0.8 if values["optimizer.lr"] == "5e-6" else 0.5))


def test_the_effect_of_a_key_is_the_mean_over_pairs_of_jobs_that_differ_only_in_it(better_rate):
    sweep = SweepAnalysis(better_rate)
    by_key = {effect.key: effect for effect in sweep.effects()}
    assert list(by_key) == ["grpo.beta", "optimizer.lr"]
    accuracy = sweep.jobs["accuracy"].astype(float)
    rates = accuracy.groupby(sweep.jobs["optimizer.lr"]).mean()
    assert by_key["optimizer.lr"].difference.mean == pytest.approx(rates["5e-6"] - rates["1e-6"])
    assert (by_key["optimizer.lr"].pairs, by_key["optimizer.lr"].verdict) == (6, "higher")
    assert (by_key["grpo.beta"].difference.mean, by_key["grpo.beta"].verdict) == (0, "no difference shown")
    assert by_key["optimizer.lr"].difference.seeds == 3  # two pairs with the same seed count as one seed
    assert [effect.verdict for effect in sweep.effects(in_reward=True)] == ["no difference shown", "higher"]


def test_a_problem_without_a_grade_is_not_compared(tmp_path):
    right = {"0": [True, False, True, True], "0.1": [False, False, True, True]}
    folder = make_sweep(tmp_path / "s", {"grpo.beta": ["0", "0.1"]}, lambda values: right[values["grpo.beta"]])
    file = folder / "0_job" / "eval" / "after.json"
    made = json.loads(file.read_text())
    made["problems"][0]["correct"] = None
    file.write_text(json.dumps(made | {"n": 3, "accuracy": 2 / 3}))
    sweep = SweepAnalysis(folder)
    (effect,) = sweep.effects()
    assert (effect.difference.mean, effect.difference.problems) == (0.0, 3)
    assert [arm.outcome.mean for arm in sweep.arms] == [2 / 3, 0.5]


def test_arms_are_chosen_by_validation_problems_and_the_best_is_reported_on_test_problems(tmp_path):
    """On the test problems the other arm is better, which must not matter."""
    folder = make_sweep(tmp_path / "s", RATES, lambda values: np.arange(100) < {"1e-6": 90}.get(values[RATE], 40))
    for job in SweepFolder(folder).jobs():
        right = np.arange(50) < {"optimizer.lr=5e-6": 35}.get(job["overrides"][0], 20)
        problems = [{"problem_id": f"v{i}", "correct": bool(each)} for i, each in enumerate(right)]
        record = {"split": "validation", "step": 20, "n": 50, "accuracy": float(right.mean()), "problems": problems}
        RunFolder(folder / job["folder"]).write_evaluation("step_000020", record)
    SweepFolder(folder).update("finished")
    sweep = SweepAnalysis(folder)
    assert sweep.label(sweep.arms[0]) == "optimizer.lr=5e-6"
    assert sweep.test_accuracy.mean == pytest.approx(0.4)
    text = headline(sweep)
    score = "70.0% validation accuracy, 95 % interval 56.2% to 80.9%; on the test problems 40.0% (30.9% to 49.8%)"
    assert text.startswith(f"Best: optimizer.lr=5e-6 with {score}.")
    assert [*sweep.jobs["accuracy"]] == [0.4, 0.7, 0.4]
    assert [*sweep.jobs["test_accuracy"]] == [0.9, 0.4, 0.4]
    assert [job["accuracy"] for job in SweepFolder(folder).jobs()] == [0.4, 0.7, 0.4]


def test_the_headline_names_the_best_arm_and_those_not_shown_to_be_worse(better_rate):
    text = headline(SweepAnalysis(better_rate))
    assert text.startswith("Best: grpo.beta=0 optimizer.lr=5e-6 with ")
    assert "test accuracy, 95 % interval" in text
    assert "Not shown to be better than 1 of the 3 other arms (grpo.beta=0.04 optimizer.lr=5e-6)." in text
    (chosen,) = warnings(SweepAnalysis(better_rate))
    assert "The score of the best of 4 arms is too high on average" in chosen


RATE = "optimizer.lr"
RATES = {RATE: ["1e-6", "5e-6", "1e-5"]}


@pytest.mark.parametrize(
    ("swept", "solved", "said"),
    [
        (RATES, (0, 0, 0), "No arm solved a test problem, so none can be called best."),
        (
            RATES,
            (40, 40, 40),
            "All 3 arms have the same result, 40.0% test accuracy, so none can be called best.",
        ),
        (
            {"seed": ["1", "2", "3"]},
            (40, 40, 40),
            "40.0% test accuracy, 95 % interval 30.2% to 49.8%, over 3 seeds.",
        ),
    ],
)
def test_no_arm_is_called_best_that_is_not_better_than_another(tmp_path, swept, solved, said):
    (key,) = swept
    counts = dict(zip(swept[key], solved, strict=True))
    folder = make_sweep(tmp_path / "sweep", swept, lambda values: np.arange(100) < counts[values[key]])
    assert headline(SweepAnalysis(folder)) == said


def test_rewards_that_are_all_equal_have_no_best(tmp_path):
    folder = make_sweep(tmp_path / "sweep", RATES, lambda values: np.zeros(10), accuracy=False)
    said = "All 3 arms have the same result, a mean reward of 0.975, so none can be called best."
    assert headline(SweepAnalysis(folder)) == said


def test_a_job_in_the_table_links_to_its_report_by_a_relative_path(better_rate):
    (better_rate / "0_job" / "report.html").write_text("report")
    write_sweep_report(better_rate)
    links = re.findall(r'<a href="([^"]+)">(\d+)</a>', (better_rate / "report.html").read_text())
    assert links == [("0_job/report.html", "0")]
    elsewhere = better_rate.parent / "elsewhere"
    write_sweep_report(better_rate, elsewhere)
    links = re.findall(r'<a href="([^"]+)">0</a>', (elsewhere / "report.html").read_text())
    assert (elsewhere / links[0]).read_text() == "report"


def test_the_table_of_the_jobs_gives_accuracies_in_percent(better_rate):
    write_sweep_report(better_rate)
    row = re.findall(r"<tr><td>0</td>.*</tr>", (better_rate / "report.html").read_text())[0]
    accuracy = SweepAnalysis(better_rate).jobs.loc[0, "accuracy"]
    assert f"<td>{accuracy:.1%}</td>" in row


def test_the_commands_reproduce_the_best_arm_and_confirm_it_with_unused_seeds(better_rate):
    commands = {name: shlex.split(line) for name, line in SweepAnalysis(better_rate).commands().items()}
    arm = ["experiment=quickstart", "grpo.beta=0", "optimizer.lr=5e-6"]
    assert commands["reproduce"] == ["python", LAUNCH, "-m", *arm, "seed=1,2,3"]
    assert commands["confirm"] == ["python", LAUNCH, "-m", *arm, "seed=4,5,6"]
    assert compose_config([*arm, "seed=4"]).optimizer.lr == 5e-6


def test_a_seed_that_is_not_swept_is_not_used_to_confirm(tmp_path):
    fixed = ["experiment=quickstart", "seed=7"]
    folder = make_sweep(tmp_path / "s", {"grpo.beta": ["0", "0.1"]}, drawn(lambda _: 0.5), fixed=fixed)
    commands = SweepAnalysis(folder).commands()
    assert commands["reproduce"] == f"python {LAUNCH} experiment=quickstart grpo.beta=0 seed=7"
    assert commands["confirm"] == f"python {LAUNCH} -m experiment=quickstart grpo.beta=0 seed=8,9,10"


def test_a_swept_config_group_defines_arms_too(tmp_path):
    keys = {"reward": ["math_xml", "mine"], "seed": ["1", "2", "3"]}
    sweep = SweepAnalysis(
        make_sweep(tmp_path / "s", keys, drawn(lambda values: 0.9 if values["reward"] == "mine" else 0.3))
    )
    assert [sweep.label(arm) for arm in sweep.arms] == ["reward=mine", "reward=math_xml"]


def test_only_seeds_of_finished_jobs_count(tmp_path):
    folder = make_sweep(tmp_path / "s", {"seed": ["1", "2"]}, drawn(lambda _: 0.5), states={1: "failed"})
    assert any(each.startswith("With one seed the intervals") for each in warnings(SweepAnalysis(folder)))


def test_a_sweep_with_unknown_points_that_never_started_has_a_report(tmp_path):
    SweepFolder(tmp_path / "s").begin(Overrides(["optimizer.lr=interval(0,1)"]), ["optimizer.lr"], None)
    _, answer = write_sweep_report(tmp_path / "s")
    assert answer.startswith("No job has finished")


def test_the_page_needs_no_other_file_and_the_table_has_every_job(better_rate):
    (page, table), answer = write_sweep_report(better_rate)
    text = page.read_text()
    assert not re.findall(r"""src=["'](?!data:)|href=["'][a-z]+:|@import|url\(""", text)
    assert answer.split(".")[0] in text
    for name in ("Reward by step", "Outcome against cost", "Both keys", "What each key changes"):
        assert name in text
    frame = pd.read_csv(table, dtype={"optimizer.lr": str})
    assert (len(frame), frame["state"].unique().tolist()) == (12, ["finished"])
    assert {"accuracy", "accuracy_low", "accuracy_high", "best_accuracy", "mean_reward", "rewards/format"} < set(frame)
    assert {"completions/mean_length", "kl", "num_tokens", "seconds", "grpo.beta", "seed"} < set(frame)
    assert frame["seconds"].tolist() == [10.0] * 12


def test_three_keys_are_drawn_side_by_side(tmp_path):
    keys = {"grpo.beta": ["0", "0.1"], "grpo.mu": ["1", "2"], "optimizer.lr": ["1e-6", "2e-6"]}
    folder = make_sweep(tmp_path / "s", keys, drawn(lambda values: 0.5 if values["grpo.mu"] == "1" else 0.6))
    (page, _), answer = write_sweep_report(folder)
    assert "All keys" in page.read_text()
    assert any("With one seed the" in each for each in warnings(SweepAnalysis(folder)))
    assert "grpo.mu=2" in answer.split(" with ")[0]


def test_points_chosen_by_a_sweeper_are_shown_with_short_numbers_and_reproduced_with_exact_ones(tmp_path):
    keys = {"optimizer.lr": ["1.6193112e-06", "0.000142977"], "grpo.mu": ["1", "2"]}
    shares = drawn(lambda values: 0.9 if values["optimizer.lr"] == "0.000142977" else 0.3)
    folder = make_sweep(tmp_path / "s", keys, shares, grid=False)
    shutil.copytree(folder / "3_job", folder / "3_other")  # a second trial with the same number
    (page, table), answer = write_sweep_report(folder)
    assert answer.startswith("Best: optimizer.lr=0.000143 grpo.mu=1 with")
    text = page.read_text()
    assert "optimizer.lr=0.000142977 grpo.mu=1 seed=7</pre>" in text
    assert "<td>1.619e-06</td>" in text
    assert "All keys" in text and "Both keys" not in text
    assert pd.read_csv(table)["folder"].tolist() == ["0_job", "1_job", "2_job", "3_job", "3_other"]


def test_overrides_keep_their_order_in_the_commands_since_the_last_one_counts(tmp_path):
    keys, fixed = {"reward": ["math_xml", "mine"]}, ("experiment=quickstart", "grpo.beta=0.9")
    folder = make_sweep(tmp_path / "s", keys, drawn(lambda _: 0.5), fixed=fixed)
    record = SweepFolder(folder).record()
    overrides = ["grpo.beta=0.9", "reward=math_xml,mine", "experiment=quickstart", "reward.a=1", "grpo.beta=0.3"]
    (folder / "sweep.json").write_text(json.dumps(record | {"overrides": overrides}))
    in_order = "grpo.beta=0.9 reward=math_xml experiment=quickstart reward.a=1 grpo.beta=0.3"
    assert SweepAnalysis(folder).commands() == {
        "reproduce": f"python {LAUNCH} {in_order} seed=7",
        "confirm": f"python {LAUNCH} -m {in_order} seed=8,9,10",
    }


def test_a_first_value_without_a_finished_job_is_not_the_base_of_comparisons(tmp_path):
    keys = {"optimizer.lr": ["1", "2e-5", "1e-4"], "seed": ["1", "2", "3"]}
    states = dict.fromkeys((0, 1, 2), "failed")
    folder = make_sweep(
        tmp_path / "s", keys, drawn(lambda v: 0.8 if v["optimizer.lr"] == "1e-4" else 0.4), states=states
    )
    (effect,) = SweepAnalysis(folder).effects()
    assert (effect.base, effect.value, effect.pairs, effect.verdict) == ("2e-5", "1e-4", 3, "higher")


def test_a_difference_shown_with_one_seed_is_reported_for_that_seed_only(tmp_path):
    keys = {"grpo.beta": ["0", "0.1"], "seed": ["1", "2", "3"]}
    right = drawn(lambda values: 0.8 if values["grpo.beta"] == "0" else 0.3)
    folder = make_sweep(tmp_path / "s", keys, right, states={1: "failed", 5: "failed"})
    sweep = SweepAnalysis(folder)  # seed 1 is in both arms, 3 in one and 2 in the other
    assert [difference.seeds for difference in sweep.gap_to_best.values()] == [1]
    assert "With the one seed that they share it is above every other arm; another seed may" in headline(sweep)
    assert any(each.startswith("With one seed the intervals") for each in warnings(sweep))
    assert [effect.verdict for effect in sweep.effects()] == ["lower, with this seed"]
    apart = make_sweep(tmp_path / "t", keys, right, states={1: "failed", 2: "failed", 3: "failed"})
    assert "shares no seed or problem with another arm" in headline(SweepAnalysis(apart))


def test_arms_evaluated_on_different_problems_are_not_compared(tmp_path):
    keys = {"data.path": ["one", "other"], "seed": ["1", "2"]}
    folder = make_sweep(tmp_path / "s", keys, drawn(lambda _: 0.5))
    for number in (2, 3):
        run = RunFolder(folder / f"{number}_job")
        after = run.evaluation("after")
        for problem in after["problems"]:  # as in another file whose lines have the same numbers
            problem["answer"] = "42"
        run.write_evaluation("after", after)
    (page, _), answer = write_sweep_report(folder)
    assert "so it was not compared" in answer
    assert "nan" not in page.read_text().split("<h2>Jobs")[0].split("<body>")[1].replace("finance", "")
    assert any("with the best: 1 arms" in each for each in warnings(SweepAnalysis(folder)))


def test_an_unreadable_file_excludes_only_its_job_and_dollar_signs_in_values_do_no_harm(tmp_path):
    keys = {"data.system_prompt": ["'a $x_1_2$ b'", "'/d/$HOME_x_y$z'"], "seed": ["1", "2"]}
    folder = make_sweep(tmp_path / "s", keys, drawn(lambda _: 0.5))
    for place, content in (
        ("metrics/metrics.jsonl", "{\n{}\n"),
        ("eval/after.json", '{"step": 20}'),
        ("eval/after.json", '{"step": 20, "n": 1, "accuracy": 1.0, "problems": ["a"]}'),
        ("status.json", "{"),
        ("config.yaml", "a: ["),
    ):
        file = folder / "1_job" / place
        before = file.read_text()
        file.write_text(content)
        (page, table), _ = write_sweep_report(folder)
        frame = pd.read_csv(table)
        assert frame["state"].tolist() == ["finished", "unreadable", "finished", "finished"], place
        assert isinstance(frame["error"][1], str)
        assert "Outcome against cost" in page.read_text()
        file.write_text(before)


def test_a_job_without_a_comparable_outcome_is_excluded(tmp_path):
    """A job without a finite reward, and one evaluated on other problems than the other seeds of its arm."""
    keys = {"grpo.beta": ["0", "0.1"], "seed": ["1", "2", "3"]}
    folder = make_sweep(tmp_path / "s", keys, drawn(lambda _: 0.5), accuracy=False)
    run = RunFolder(folder / "1_job")
    run.write_metrics([row | {"reward": None} for row in run.metrics()])
    sweep = SweepAnalysis(folder)
    assert [len(arm.jobs) for arm in sweep.arms] in ([2, 3], [3, 2])
    assert "nan" not in headline(sweep)
    (effect,) = sweep.effects()
    assert effect.pairs == 2

    other = make_sweep(tmp_path / "t", keys, drawn(lambda _: 0.5))
    run = RunFolder(other / "1_job")
    after = run.evaluation("after")
    run.write_evaluation(
        "after",
        after | {"problems": [each | {"problem_id": f"other {each['problem_id']}"} for each in after["problems"]]},
    )
    sweep = SweepAnalysis(other)
    assert "nan" not in headline(sweep)
    assert [difference.seeds for difference in sweep.gap_to_best.values()] == [2]


def test_a_deletion_override_is_kept_unchanged_in_the_commands(tmp_path):
    fixed = ("experiment=quickstart", "~reward.components.format")
    folder = make_sweep(tmp_path / "s", {"grpo.beta": ["0", "0.1"]}, drawn(lambda _: 0.5), fixed=fixed)
    assert "'~reward.components.format' grpo.beta=0" in SweepAnalysis(folder).commands()["reproduce"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [("0.04", "0.04"), ("4.656804637919569e-05", "4.657e-05"), ("1234567890", "1234567890"), ("math_xml_format", None)],
)
def test_only_long_decimal_numbers_are_shortened(value, shown):
    assert short(value) == (shown or value)


def test_jobs_that_did_not_finish_are_listed_with_their_error_and_excluded(tmp_path):
    states = {1: "failed", 4: "interrupted", 7: "pending"}
    folder = make_sweep(tmp_path / "s", KEYS, drawn(lambda values: 0.5), states=states)
    (page, _), _ = write_sweep_report(folder)
    assert "ValueError: as it was" in page.read_text()
    sweep = SweepAnalysis(folder)
    assert sorted(job for arm in sweep.arms for job in arm.jobs) == [j for j in range(12) if j not in states]
    assert {effect.pairs for effect in sweep.effects()} <= {3, 4}
    assert any("did not finish: 3 of 12 jobs" in each for each in warnings(sweep))


def test_without_evaluations_rewards_are_compared_with_a_warning(tmp_path):
    keys = {"grpo.beta": ["0", "0.1"], "seed": ["1", "2", "3"]}
    right = drawn(lambda values: 0.2 if values["grpo.beta"] == "0" else 0.9)
    folder = make_sweep(tmp_path / "s", keys, right, accuracy=False)
    sweep = SweepAnalysis(folder)
    assert not sweep.by_accuracy
    assert [effect.verdict for effect in sweep.effects()] == ["higher"]
    assert any("rewards in training are compared" in each for each in warnings(sweep))
    (page, _), _ = write_sweep_report(folder)
    assert "mean reward of the last tenth" in page.read_text()


def test_a_sweep_without_a_finished_job_has_a_report_too(tmp_path):
    folder = make_sweep(tmp_path / "s", {"seed": ["1", "2"]}, drawn(lambda _: 1), states={0: "failed", 1: "pending"})
    (page, table), answer = write_sweep_report(folder)
    assert answer == "No job has finished, so there is nothing to compare."
    assert "as it was" in page.read_text() and len(table.read_text().splitlines()) == 3


def test_an_arm_that_is_always_right_still_has_an_interval(tmp_path):
    folder = make_sweep(tmp_path / "s", {"seed": ["1", "2", "3"]}, drawn(lambda _: 1.1))
    outcome = SweepAnalysis(folder).arms[0].outcome
    low, high = outcome.interval
    assert (outcome.mean, high) == (1, 1)
    assert 0.97 < low < 0.99  # Wilson's interval for 200 of 200


def test_text_from_a_run_is_escaped_in_the_page(tmp_path):
    folder = make_sweep(tmp_path / "s", {"seed": ["1", "2"]}, drawn(lambda _: 1), states={0: "failed"})
    status = folder / "0_job" / "status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"error": "<script>alert(1)</script>"}))
    (page, _), _ = write_sweep_report(folder)
    assert "<script>" not in page.read_text()


def test_a_folder_that_is_not_a_sweep_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has no sweep\.json"):
        SweepAnalysis(tmp_path)
