"""Tests of each rule with metrics for which it must report, and with similar metrics for which it must not."""

import random

import pytest

from grpo.analysis.doctor import RULES, Doctor, find_problems
from tests.launches import launch, rows
from tests.sweeps.test_sweep import QUICK

RANGES = {"correctness": (0.0, 2.0), "format": (0.0, 0.8)}


def doctor_says(rows, evaluations=(), ranges=RANGES):
    return find_problems(rows, evaluations, ranges)


def course(steps=60, **metrics):
    """Rows of a healthy run with some metrics replaced, each by a value or by a function of the step."""
    luck = random.Random(0)
    healthy = {
        "frac_reward_zero_std": 0.2,
        "completions/clipped_ratio": 0.02,
        "rewards/format/mean": lambda step: min(0.78, 0.4 + 0.02 * step),
        "rewards/correctness/mean": lambda step: 0.6 + 0.01 * step + luck.uniform(-0.05, 0.05),
        "reward": lambda step: 1.0 + 0.02 * step,
        "kl": lambda step: 0.001 * step,
        "entropy": lambda step: 0.5 - 0.004 * step,
        "grad_norm": lambda step: luck.uniform(0.1, 0.3),
        "loss": 0.0,
    }
    return [
        {"step": step} | {k.replace("__", "/"): v(step) if callable(v) else v for k, v in (healthy | metrics).items()}
        for step in range(1, steps + 1)
    ]


def flat(around):
    luck = random.Random(1)
    return lambda step: around + luck.uniform(-0.05, 0.05)


def noisy(course_of, deviation=0.1):
    luck = random.Random(2)
    return lambda step: course_of(step) + luck.gauss(0, deviation)


def evaluation(step, accuracy, n=400):
    return {"step": step, "accuracy": accuracy, "n": n}


# For each rule: rows for which it reports, the step at which (None: any), and similar rows for which it does not.
CASES = {
    "equal_groups": (
        course(frac_reward_zero_std=lambda step: 1.0 if step > 20 else 0.5),
        30,
        [
            course(frac_reward_zero_std=lambda step: 0.9),
            course(frac_reward_zero_std=1.0, **{"rewards/correctness/mean": 1.98}),
            course(steps=9, frac_reward_zero_std=1.0),
        ],
    ),
    "truncated_completions": (
        course(**{"completions/clipped_ratio": lambda step: 0.8 if step > 10 else 0.1}),
        16,  # the mean of 6 steps at 0.8 and 4 at 0.1 is 0.52, that of 5 and 5 is 0.45
        [course(**{"completions/clipped_ratio": 0.45})],
    ),
    "reward_falls": (
        course(80, reward=noisy(lambda step: 1.0 + 0.03 * step if step < 40 else 2.2 - 0.04 * (step - 40))),
        None,
        [
            course(80, reward=noisy(lambda step: 1.0 + 0.03 * min(step, 40))),
            course(400, reward=noisy(lambda step: 1.0, 0.3)),
            course(80, reward_group_std=2.0, reward=lambda step: -5.0 if step < 40 else -5.3),  # small for this spread
            course(80, reward=noisy(lambda step: 1.0 + 0.03 * step if step < 40 else 2.2 - 0.005 * (step - 40))),
        ],
    ),
    "format_without_correctness": (
        course(140, **{"rewards/format/mean": 0.79, "rewards/correctness/mean": flat(0.2)}),
        120,
        [
            course(200, **{"rewards/format/mean": 0.5, "rewards/correctness/mean": flat(0.2)}),
            course(200, **{"rewards/format/mean": 0.79}),
            course(200, **{"rewards/format/mean": 0.79, "rewards/correctness/mean": flat(1.2)}),
            course(500, **{"rewards/format/mean": 0.79, "rewards/correctness/mean": noisy(lambda s: 0.1 + 0.0008 * s)}),
            course(  # the reward fell, which another rule reports
                200,
                reward=noisy(lambda step: 2.0 if step < 60 else 1.0),
                **{"rewards/format/mean": 0.79, "rewards/correctness/mean": noisy(lambda s: 1.5 if s < 60 else 0.1)},
            ),
        ],
    ),
    "kl_runaway": (
        course(kl=lambda step: 0.01 * 1.12**step),
        None,
        [
            course(kl=lambda step: 0.008 * step),
            course(kl=lambda step: 0.001 * 1.12 ** min(step, 40)),
            course(kl=lambda step: 5.0 if step == 50 else 0.01),
        ],
    ),
    "entropy_collapse": (
        course(entropy=lambda step: 0.5 * 0.9**step, frac_reward_zero_std=0.7),
        None,
        [
            course(entropy=lambda step: 0.5 * 0.9**step),
            course(entropy=lambda step: 0.5 * 0.97**step, frac_reward_zero_std=0.7),
            course(
                entropy=lambda step: 0.5 * 0.9**step, frac_reward_zero_std=0.9, **{"rewards/correctness/mean": 1.95}
            ),
        ],
    ),
    "gradient_spikes": (
        course(grad_norm=lambda step: 9.0 if step in (30, 35, 40) else 0.2),
        40,
        [
            course(grad_norm=lambda step: 9.0 if step in (30, 35) else 0.2),
            course(grad_norm=lambda step: 0.02 * step),
            course(grad_norm=lambda step: 0.0 if step % 3 else 0.2),  # two of three steps without a signal
            course(grad_norm=lambda step: 0.002 if step % 3 else 0.2),
        ],
    ),
    "skipped_updates": (
        course(loss=lambda step: None if step in (12, 20) else 0.0),
        20,
        [course(loss=lambda step: None if step == 12 else 0.0), course(loss=lambda s: None if s in (5, 40) else 0.0)],
    ),
}


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_reports_once_where_it_should_and_not_for_similar_metrics(rule):
    ill, step, well = CASES[rule]
    (found,) = [finding for finding in doctor_says(ill) if finding.rule == rule]
    assert step is None or found.step == step
    assert any(key in found.text for key in ("grpo.", "optimizer.", "reward.", "data."))  # the setting to change
    for each in well:
        assert rule not in [finding.rule for finding in doctor_says(each)]


def test_falling_accuracy_with_a_rising_reward_is_distinguished_from_noise():
    falling = [evaluation(20, 0.60, 400), evaluation(40, 0.48, 400)]
    (found,) = doctor_says(course(), falling)
    assert (found.rule, found.step) == ("held_out_falls", 40)
    assert "from 60.0% to 48.0%" in found.text
    assert doctor_says(course(), [evaluation(20, 0.60, 400), evaluation(40, 0.56, 400)]) == []  # within its noise
    both = doctor_says(course(reward=lambda step: 3.0 - 0.02 * step), falling)  # reward falls as well
    assert [finding.rule for finding in both] == ["reward_falls"]


def test_a_falling_reward_is_reported_whatever_its_offset():
    for zero in (-10.0, 0.0, 10.0):
        fallen = course(80, reward_group_std=0.5, reward=lambda step, zero=zero: zero + (1.2 if step < 45 else 0.2))
        assert "reward_falls" in [finding.rule for finding in doctor_says(fallen)]


@pytest.mark.parametrize("kl", [lambda step: 0.001 * 1.05**step, lambda step: 0.1 * step])
def test_a_slowly_growing_kl_is_reported_too(kl):
    assert "kl_runaway" in [finding.rule for finding in doctor_says(course(steps=200, kl=kl))]


def test_noise_over_many_evaluations_is_not_reported_as_a_fall():
    """A policy of constant accuracy, evaluated forty times on 200 problems with independent noise."""
    false = 0
    for seed in range(30):
        luck = random.Random(seed)
        made = [evaluation(10 * k, sum(luck.random() < 0.5 for _ in range(200)) / 200, 200) for k in range(1, 41)]
        rows = course(steps=400, reward=lambda step, luck=luck: 1.0 + 0.002 * step + luck.gauss(0, 0.1))
        false += "held_out_falls" in [finding.rule for finding in doctor_says(rows, made)]
    assert false <= 2


def test_after_a_resume_the_doctor_reports_the_same_as_without_one():
    rows, made = course(), [evaluation(0, 0.5, 400), evaluation(20, 0.60, 400), evaluation(40, 0.48, 400)]
    doctor = Doctor(RANGES)
    assert doctor.replay(rows[:30], made[:2]) == []
    doctor.add_evaluation(made[2])
    assert [finding.rule for row in rows[39:] for finding in doctor.check(row)] == ["held_out_falls"]


def test_every_rule_has_a_case():
    assert {rule.__name__ for rule in RULES} == {*CASES, "held_out_falls"}


def test_nothing_is_reported_for_a_healthy_run_whatever_the_names_of_its_rewards():
    assert doctor_says(course(steps=200)) == []
    other = [{k.replace("correctness", "judge"): v for k, v in row.items()} for row in course(steps=200)]
    assert doctor_says(other) == []


def test_whether_a_reward_is_high_depends_on_its_declared_range():
    """With equal rewards near the maximum a run has learned everything; below it, it learns nothing."""
    equal = course(steps=30, frac_reward_zero_std=1.0, **{"rewards/correctness/mean": 1.9})
    assert doctor_says(equal) == []
    higher = RANGES | {"correctness": (0.0, 4.0)}
    assert [finding.rule for finding in doctor_says(equal, ranges=higher)] == ["equal_groups"]


def test_in_a_run_the_doctor_reports_at_once_and_not_again_after_a_resume(tmp_path):
    command = [
        *QUICK,
        "tracking=offline",
        "grpo.max_completion_length=6",
        "run_dir=run",
        "checkpoint.every=1",
        "grpo.num_steps=14",
    ]
    first = launch(*command, "until_step=12", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("doctor: ") == 1
    assert "raise grpo.max_completion_length" in first.stdout
    (record,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    assert b"truncated_completions" in record.read_bytes()  # the alert's title
    assert "stopped after step 12 (until_step); resume with: python launch.py resume=true run_dir=run" in first.stdout
    again = launch("resume=true", "run_dir=run", cwd=tmp_path)
    assert (again.returncode, again.stdout.count("doctor: "), len(rows(tmp_path / "run"))) == (0, 0, 14)
