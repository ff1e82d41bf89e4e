"""Simulated runs: a policy that solves a problem with some probability, trained with GRPO, as a row for each step.

The gradient is exact for this policy, so rewards, groups without a signal, gradient norms, entropy and KL belong
together as in a real run, and a run of 300 steps takes a few hundredths of a second.
"""

import numpy as np

TOKENS = 20  # of a completion
SKILLS = 6  # parameters that decide whether an answer is right


def simulated_run(
    seed, steps=300, prompts=4, group=8, rate=0.05, hardness=1.5, spread=1.5, beta=0.0, truncated=0.02, format_logit=0.0
):
    """Rows and evaluations of a run that learns, with the values of 2 for a right answer and 0.8 for the format.

    prompts, group: sizes of a step's batch. rate: the learning rate of the normalized gradient. hardness, spread: mean
    and deviation of the problems' difficulty, in logits. beta: weight of the KL penalty. truncated: the share of
    completions that are truncated. format_logit: of the format being right at the start.
    """
    luck = np.random.default_rng(seed)
    held_out = _problems(luck, 200, hardness, spread)
    policy = np.zeros(SKILLS + 1)  # the last one decides the format
    policy[SKILLS] = format_logit
    scale = 0.0
    rows = []
    evaluations = [_evaluation(0, policy, held_out)]
    for step in range(1, steps + 1):
        features, difficulty = _problems(luck, prompts, hardness, spread)
        right = _sigmoid(features @ policy[:SKILLS] - difficulty)  # (P,)
        form = _sigmoid(policy[SKILLS])
        correct = luck.random((prompts, group)) < right[:, None]
        formed = luck.random((prompts, group)) < form
        rewards = 2.0 * correct + 0.8 * formed  # (P, G)
        deviation = rewards.std(axis=1, ddof=1, keepdims=True)
        advantages = (rewards - rewards.mean(axis=1, keepdims=True)) / (deviation + 1e-4)
        of_problem = (advantages * (correct - right[:, None])).mean(axis=1)  # (P,)
        gradient = np.append(of_problem @ features / prompts, (advantages * (formed - form)).mean())
        gradient = gradient - 0.02 * beta * policy
        norm = float(np.linalg.norm(gradient))
        scale = 0.9 * scale + 0.1 * norm
        policy = policy + rate * gradient / max(scale, 1e-3)
        start = _sigmoid(-difficulty)
        rows.append(
            {
                "step": step,
                "iteration": 1,
                "loss": 0.0,
                "reward": rewards.mean(),
                "reward_std": rewards.std(),
                "reward_group_std": deviation.mean(),
                "frac_reward_zero_std": (deviation == 0).mean(),
                "rewards/correctness/mean": 2.0 * correct.mean(),
                "rewards/format/mean": 0.8 * formed.mean(),
                "completions/clipped_ratio": luck.binomial(prompts * group, truncated) / (prompts * group),
                "grad_norm": norm,
                "entropy": (_entropy(right).mean() + _entropy(form)) / TOKENS,
                "kl": (_divergence(right, start).mean() + _divergence(form, _sigmoid(format_logit))) / TOKENS,
                "learning_rate": rate,
                "weights_changed": 1.0,
                "perf/peak_memory_gb": 4.0 + 0.2 * (1 - 1 / step),
                "completions/max_length": float(luck.integers(50, 100)),
                "completions/mean_length": float(luck.integers(30, 50)),
                "sampling/logp_difference/mean": luck.lognormal(np.log(1e-6), 0.5),
            }
        )
        if step % 50 == 0:
            evaluations.append(_evaluation(step, policy, held_out))
    return rows, evaluations


def _problems(luck, count, hardness, spread):
    features = np.column_stack([np.ones(count), luck.normal(0, 0.5, (count, SKILLS - 1))])
    return features, luck.normal(hardness, spread, count)


def _evaluation(step, policy, problems):
    features, difficulty = problems
    return {
        "split": "validation",
        "step": step,
        "accuracy": float((features @ policy[:SKILLS] > difficulty).mean()),
        "n": len(difficulty),
    }


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _entropy(p):
    p = np.clip(p, 1e-9, 1 - 1e-9)
    return -(p * np.log(p) + (1 - p) * np.log(1 - p))


def _divergence(p, q):
    p = np.clip(p, 1e-9, 1 - 1e-9)
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
