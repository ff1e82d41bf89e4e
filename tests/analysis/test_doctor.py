"""Tests of each rule with metrics for which it must report, and with similar metrics for which it must not."""

import random
import re
from collections import Counter

import pytest
from omegaconf import OmegaConf

from grpo.analysis.doctor import RULES, Doctor, dtype_of, find_problems
from grpo.config.compose import compose_config
from grpo.training import preflight
from tests.analysis.simulation import simulated_run
from tests.launches import ROOT, launch, rows
from tests.sweeps.test_sweep import QUICK

RANGES = {"correctness": (0.0, 2.0), "format": (0.0, 0.8)}


def doctor_says(rows, evaluations=(), ranges=RANGES, dtype="float32"):
    return find_problems(rows, evaluations, ranges, dtype)


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
        "sampling/logp_difference/mean": 1e-6,
        "learning_rate": 1e-5,
        "weights_changed": 0.9,
        "perf/peak_memory_gb": 4.0,
        "completions/max_length": 100.0,
        "completions/mean_length": 80.0,
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


def chance(probability):
    """1 with this probability, else 0."""
    luck = random.Random(3)
    return lambda step: float(luck.random() < probability)


def one_of(*values):
    luck = random.Random(4)
    return lambda step: luck.choice(values)


def evaluation(step, accuracy, n=400):
    return {"split": "validation", "step": step, "accuracy": accuracy, "n": n}


# For each rule: rows for which it reports, the step at which (None: any), and similar rows for which it does not.
CASES = {
    "equal_groups": (
        course(frac_reward_zero_std=lambda step: 1.0 if step > 20 else 0.5),
        30,
        [
            course(frac_reward_zero_std=lambda step: 0.9),
            course(frac_reward_zero_std=1.0, **{"rewards/correctness/mean": 1.98}),
            course(steps=9, frac_reward_zero_std=1.0),
            course(400, frac_reward_zero_std=chance(2 / 3)),
            course(60, frac_reward_zero_std=lambda step: 0.0 if step % 12 == 0 else 1.0)[8:],
        ],
    ),
    "truncated_completions": (
        course(**{"completions/clipped_ratio": lambda step: 0.8 if step > 10 else 0.1}),
        19,  # 9 steps at 0.8 and 1 at 0.1: mean 0.73, less three standard errors of 0.07; 8 and 2: 0.66, less 3 * 0.093
        [
            course(**{"completions/clipped_ratio": 0.45}),
            # A third of the completions, where all four of a step are truncated or none.
            course(400, **{"completions/clipped_ratio": chance(0.3)}),
        ],
    ),
    "reward_falls": (
        course(80, reward=noisy(lambda step: 1.0 + 0.03 * step if step < 40 else 2.2 - 0.04 * (step - 40))),
        None,
        [
            course(80, reward=noisy(lambda step: 1.0 + 0.03 * min(step, 40))),
            course(400, reward=noisy(lambda step: 1.0, 0.3)),
            course(80, reward=0.0),
            course(80, reward=0.8, reward_group_std=0.0),
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
            # Up to a level in 20 steps, and flat or falling from there.
            course(200, kl=noisy(lambda step: 0.6 * min(step / 20, 1.0), 0.04)),
            course(200, kl=lambda step: 0.6 * min(step / 20, 1.0) * 0.997**step),
        ],
    ),
    "entropy_collapse": (
        course(entropy=lambda step: 0.5 * 0.9**step, frac_reward_zero_std=0.7),
        None,
        [
            course(entropy=lambda step: 0.5 * 0.9**step),
            course(entropy=lambda step: 0.5 * 0.97**step, frac_reward_zero_std=0.7),
            # One problem per step, some of which the policy always solves in the same way.
            course(400, frac_reward_zero_std=0.7, entropy=one_of(5e-4, 0.01, 0.3)),
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
            # As in a real run with one problem per step: the policy is nearly always right, and large after a mistake.
            course(400, grad_norm=one_of(0.25, 0.3, 0.4, 0.45, 0.3, 0.35, 0.4, 1.5, 3.0, 7.0)),
            # Nine of ten steps without a signal, where the KL penalty alone has a gradient.
            course(
                400,
                grad_norm=lambda step: 0.002 if step % 10 else 0.2,
                frac_reward_zero_std=lambda step: 1.0 if step % 10 else 0.5,
            ),
        ],
    ),
    "sampling_differs": (
        course(**{"sampling/logp_difference/mean": lambda step: 2e-3 if step > 7 else 1e-5}),
        9,
        [
            course(**{"sampling/logp_difference/mean": 1e-4}),
            course(**{"sampling/logp_difference/mean": lambda step: 0.9 if step == 7 else 1e-5}),
            course(**{"sampling/logp_difference/mean": None}),  # an engine that returns no log-probabilities
        ],
    ),
    "weights_did_not_move": (
        course(weights_changed=lambda step: 0.0 if step > 10 else 0.5),
        15,
        [
            course(weights_changed=lambda step: 0.0 if step % 4 else 1e-4),
            course(weights_changed=0.0, learning_rate=0.0),
            course(weights_changed=0.0, grad_norm=0.0),
            course(weights_changed=0.0, grad_norm=None),
            course(weights_changed=None),  # of an earlier version
        ],
    ),
    "memory_grows": (
        course(200, perf__peak_memory_gb=lambda step: 4 + 0.01 * step),
        101,
        [
            course(400, perf__peak_memory_gb=lambda step: 4 + 0.01 * step, completions__max_length=lambda step: step),
            course(400, perf__peak_memory_gb=lambda step: 8 - 4 / step**0.5),
            course(  # all of them at the limit, and more and more of them long
                400,
                perf__peak_memory_gb=lambda step: 4 + 0.01 * step,
                completions__mean_length=lambda step: 100 + step,
            ),
            course(400, perf__peak_memory_gb=lambda step: 4 + step // 100),
            course(400, perf__peak_memory_gb=lambda step: 4 + 1e-4 * step),
        ],
    ),
    "component_without_values": (
        course(rewards__mine__mean=None),
        10,
        [
            course(rewards__mine__mean=lambda step: 0.0 if step == 3 else None),
            course(rewards__mine__mean=0.0),
            course(9, rewards__mine__mean=None),
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
    keys = ("grpo.", "optimizer.", "data.", "model.", "reward.")
    assert any(key in found.text for key in keys)  # the setting to change
    for each in well:
        assert rule not in [finding.rule for finding in doctor_says(each)]


# A healthy run of each kind learns; each rule may report in at most 1 of 50.
HEALTHY = {
    "quickstart": {"prompts": 16, "group": 16},
    "one problem per step": {"prompts": 1, "group": 4, "steps": 400},
    "with a KL penalty": {"prompts": 2, "group": 8, "beta": 0.04},
    "hard problems": {"hardness": 4.0},
    "easy problems": {"hardness": -1.0, "rate": 0.02},
    "solved always or never": {"spread": 8.0, "rate": 0.02, "format_logit": 7.0, "beta": 0.04},
    "often truncated": {"prompts": 1, "group": 4, "truncated": 0.3},
}


@pytest.mark.parametrize("seeds", [5, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", HEALTHY)
def test_a_rule_rarely_reports_in_a_healthy_run(kind, seeds):
    reported = Counter()
    for seed in range(seeds):
        rows, evaluations = simulated_run(seed, **HEALTHY[kind])
        assert rows[-1]["reward"] > rows[0]["reward"] or kind == "solved always or never"
        reported.update(finding.rule for finding in doctor_says(rows, evaluations))
    assert all(count <= seeds / 50 for count in reported.values()), reported


@pytest.mark.parametrize("seed", range(5))
def test_a_fault_in_the_course_of_a_simulated_run_is_found(seed):
    healthy, evaluations = simulated_run(seed, steps=120, prompts=8, hardness=2.5, rate=0.02)

    def found(**fault):
        """The findings if these metrics change at step 60; fault: a metric and a function of (row, steps since)."""
        ill = [dict(row) for row in healthy]
        for row in ill[60:]:
            row |= {name: change(row, row["step"] - 60) for name, change in fault.items()}
        return [finding.rule for finding in doctor_says(ill, evaluations)]

    assert found() == []
    assert found(frac_reward_zero_std=lambda row, since: 1.0) == ["equal_groups"]
    assert found(grad_norm=lambda row, since: row["grad_norm"] * (50 if since % 4 == 0 else 1)) == ["gradient_spikes"]
    assert found(kl=lambda row, since: 0.02 * 1.15**since) == ["kl_runaway"]
    assert found(reward=lambda row, since: row["reward"] - 0.05 * since) == ["reward_falls"]
    assert found(**{"completions/clipped_ratio": lambda row, since: 0.94}) == ["truncated_completions"]
    assert found(**{"sampling/logp_difference/mean": lambda row, since: 0.01}) == ["sampling_differs"]
    assert found(loss=lambda row, since: None if since % 8 == 0 else 0.0) == ["skipped_updates"]
    low = {"entropy": lambda row, since: 0.02 * row["entropy"], "frac_reward_zero_std": lambda row, since: 0.75}
    assert found(**low) == ["entropy_collapse"]


@pytest.mark.parametrize(
    ("dtype", "difference", "expected"),
    [
        ("float32", 1e-4, []),
        ("float32", 0.01, ["sampling_differs"]),
        ("bfloat16", 0.05, []),
        ("float16", 0.05, []),
        ("bfloat16", 0.3, ["sampling_differs"]),
        (None, 0.05, []),
        (None, 0.9, ["sampling_differs"]),
    ],
)
def test_the_difference_between_sampling_and_training_is_compared_with_the_rounding_of_the_dtype(
    dtype, difference, expected
):
    rows = course(3, **{"sampling/logp_difference/mean": difference})
    assert [finding.rule for finding in doctor_says(rows, dtype=dtype)] == expected


def test_completions_that_became_long_are_distinguished_from_a_limit_that_was_too_low():
    (grown,) = doctor_says(course(**{"completions/clipped_ratio": lambda step: 0.8 if step > 10 else 0.02}))
    assert "2% at the start" in grown.text and "lower optimizer.lr if the reward falls" in grown.text
    (low,) = doctor_says(course(**{"completions/clipped_ratio": 0.8}))
    assert "raise grpo.max_completion_length, or ask for shorter ones in data.system_prompt" in low.text
    assert "optimizer.lr" not in low.text


def test_the_dtype_is_that_of_the_computation():
    config = {"model": {"dtype": "float32"}, "hardware": {"compute_dtype": "bfloat16"}}
    assert dtype_of(config) == "bfloat16"
    assert dtype_of(config | {"hardware": {"compute_dtype": None}}) == "float32"
    assert dtype_of({}) is None


def test_the_advice_names_only_keys_that_exist():
    findings = [finding.text for ill, _, _ in CASES.values() for finding in doctor_says(ill)]
    findings += [finding.text for finding in doctor_says(course(), [evaluation(20, 0.6), evaluation(40, 0.4)])]
    found = {"completions": 8, "components": {"x": {"missing": 0.0, "nonzero": 0.0}}, "frac_reward_zero_std": 1.0}
    findings += preflight.warnings(found | {"completions/clipped_ratio": 1.0, "max_completion_length": 9})
    config = compose_config([])
    keys = set(
        re.findall(
            r"\b(?:grpo|optimizer|rollout|data|model|reward|eval|checkpoint)\.[a-z_.]*[a-z_]", " ".join(findings)
        )
    )
    assert {"grpo.beta", "optimizer.lr", "checkpoint.keep_every", "rollout.temperature"} <= keys
    for key in keys:
        assert OmegaConf.select(config, key, default="absent") != "absent", key


def test_falling_accuracy_with_a_rising_reward_is_distinguished_from_noise():
    falling = [evaluation(20, 0.60, 400), evaluation(40, 0.48, 400)]
    (found,) = doctor_says(course(), falling)
    assert (found.rule, found.step) == ("held_out_falls", 40)
    assert "from 60.0% to 48.0%" in found.text
    assert doctor_says(course(), [evaluation(20, 0.60, 400), evaluation(40, 0.56, 400)]) == []  # within its noise
    both = doctor_says(course(reward=lambda step: 3.0 - 0.02 * step), falling)  # reward falls as well
    assert [finding.rule for finding in both] == ["reward_falls"]


def test_a_fall_from_before_training_or_from_long_ago_is_reported_too():
    fall = [evaluation(0, 0.60, 400), evaluation(60, 0.45, 400)]
    assert [finding.rule for finding in doctor_says(course(60), fall)] == ["held_out_falls"]
    fall = [evaluation(50, 0.60, 400), evaluation(400, 0.45, 400)]
    assert [finding.rule for finding in doctor_says(course(400), fall)] == ["held_out_falls"]


def test_a_falling_reward_is_reported_whatever_its_offset():
    for zero in (-10.0, 0.0, 10.0):
        fallen = course(80, reward_group_std=0.5, reward=lambda step, zero=zero: zero + (1.2 if step < 45 else 0.2))
        assert "reward_falls" in [finding.rule for finding in doctor_says(fallen)]


@pytest.mark.parametrize("kl", [lambda step: 0.001 * 1.05**step, lambda step: 0.1 * step])
def test_a_slowly_growing_kl_is_reported_too(kl):
    assert "kl_runaway" in [finding.rule for finding in doctor_says(course(steps=200, kl=kl))]


@pytest.mark.slow
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
    assert [finding.rule for finding in doctor.add_evaluation(made[2])] == ["held_out_falls"]
    assert [finding.rule for row in rows[39:] for finding in doctor.check(row)] == []


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


@pytest.mark.slow
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
    resume = f"python {ROOT / 'launch.py'} resume=true run_dir={tmp_path / 'run'}"
    assert f"stopped after step 12 (until_step); resume with: {resume}" in first.stdout
    again = launch("resume=true", "run_dir=run", cwd=tmp_path)
    assert (again.returncode, again.stdout.count("doctor: "), len(rows(tmp_path / "run"))) == (0, 0, 14)
