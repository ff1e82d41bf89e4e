"""sampling.refill: groups without a signal are replaced by groups of other problems."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from grpo.batch import Completions, Prompts
from grpo.counter_rng import group_keys
from grpo.data.problems import Problem
from grpo.data.sampler import PromptSampler
from grpo.rewards.scoring import Rewards
from grpo.training.groups import Groups
from grpo.training.scored_completions import ScoredCompletions
from tests.launches import SHORT, launch, resume, rows

PAD = 9


def groups(ids, prompts, rewards, name):
    """Groups of two completions; 0 pads prompts (on the left) and completions."""
    ids, prompts = torch.tensor(ids), torch.tensor(prompts)
    mask = (ids != 0).long()
    count = len(ids)
    scored = ScoredCompletions(
        texts=[f"{name}{row}" for row in range(count)],
        rewards=Rewards(
            {"r": torch.tensor(rewards, dtype=torch.float64)}, torch.ones(1), torch.tensor(rewards, dtype=torch.float64)
        ),
        columns={"level": [f"level {name}{row}" for row in range(count)]},
        trainer_state=SimpleNamespace(),
        prompts=[[{"role": "user", "content": name}]] * count,
        messages=[[{"role": "assistant", "content": f"{name}{row}"}] for row in range(count)],
        lengths=mask.sum(dim=1),
    )
    completions = Completions(ids, mask, mask, torch.arange(count) // 2, sampling_logps=-ids.float())
    problems = [Problem(f"{name}{place}", "?", "1") for place in range(len(prompts))]
    return Groups(problems, np.arange(len(prompts)), Prompts(prompts, (prompts != 0).long()), completions, scored)


def test_replaced_groups_bring_everything_of_theirs_along():
    first = groups([[1, 2], [3, 0], [4, 5], [6, 0]], [[0, 1, 2], [3, 4, 5]], [1.0, 1.0, 0.0, 1.0], "a")
    other = groups([[7, 7, 7], [8, 0, 0]], [[6]], [0.0, 2.0], "b")
    assert first.with_signal(torch.tensor([0.0, 0.0, -1.0, 1.0])) == [False, True]
    found = first.replaced([0], other, PAD)
    assert [problem.id for problem in found.problems] == ["b0", "a1"]
    assert found.slots.tolist() == [0, 1]
    assert found.completions.ids.tolist() == [[7, 7, 7], [8, 0, 0], [4, 5, PAD], [6, 0, PAD]]
    assert found.completions.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]]
    assert found.completions.sampling_logps[0].tolist() == [-7.0, -7.0, -7.0]
    assert found.completions.group.tolist() == [0, 0, 1, 1]
    assert found.prompts.ids.tolist() == [[PAD, PAD, 6], [3, 4, 5]]
    assert found.prompts.mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert found.scored.texts == ["b0", "b1", "a2", "a3"]
    assert found.scored.rewards.total.tolist() == [0.0, 2.0, 0.0, 1.0]
    assert found.scored.columns["level"] == ["level b0", "level b1", "level a2", "level a3"]
    assert [prompt[0]["content"] for prompt in found.scored.prompts] == ["b", "b", "a", "a"]
    assert found.scored.lengths.tolist() == [3, 1, 2, 1]
    assert (first.num_tokens, found.num_tokens) == (6 + 2 * 2 + 2 * 3, 7 + 2 * 1 + 2 * 3)
    narrow = first.replaced([0, 1], groups([[7], [8], [8], [7]], [[1], [2]], [0.0] * 4, "c"), PAD)
    assert narrow.completions.ids.tolist() == [[7], [8], [8], [7]]
    assert narrow.prompts.ids.tolist() == [[1], [2]]


def test_other_problems_are_new_to_the_step_and_the_same_each_time():
    problems = [Problem(str(place), "?", "1") for place in range(20)]
    sampler = PromptSampler(problems, seed=1)
    taken = sampler.take(3, 4).problems
    instead = sampler.take_instead(3, 4, [1, 3], 1, taken)
    assert instead.slots.tolist() == [1, 3]
    assert not {each.id for each in instead.problems} & {each.id for each in taken}
    assert PromptSampler(problems, seed=1).take_instead(3, 4, [1, 3], 1, taken).problems == instead.problems
    second = sampler.take_instead(3, 4, [1, 3], 2, [*taken, *instead.problems]).problems
    assert len({each.id for each in [*taken, *instead.problems, *second]}) == 8
    assert sampler.take(4, 4).problems == PromptSampler(problems, seed=1).take(4, 4).problems
    everything = sampler.take_instead(3, 4, [0, 1], 1, problems)
    assert len(everything.problems) == 2


def test_each_attempt_has_its_own_noise():
    slots = np.array([0, 5])
    keys = [group_keys(1, 3, slots, 2, attempt) for attempt in range(3)]
    assert torch.equal(keys[0], group_keys(1, 3, slots, 2))
    assert len({tuple(row) for each in keys for row in each.tolist()}) == 12


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run in which groups are replaced."""
    cwd = tmp_path_factory.mktemp("refill")
    done = launch(*OWN, "run_dir=run", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "run"


OWN = [*SHORT, "sampling.refill=2", "grpo.num_generations=2", "samples.every=1", "checkpoint.every=1"]
OWN += ["reward.components.format.weight=0", "grpo.batch_size=6"]


def test_replaced_groups_are_counted_and_trained_on(straight):
    found = rows(straight)
    assert sum(row["sampling/refilled_groups"] for row in found) > 0
    plain = [*OWN, "sampling.refill=0", "run_dir=plain", "grpo.num_steps=1"]
    assert launch(*plain, cwd=straight.parent).returncode == 0
    before, after = (
        {row["problem_id"] for row in map(json.loads, (run / "samples" / "step_000001.jsonl").read_text().splitlines())}
        for run in (straight.parent / "plain", straight)
    )
    equal = rows(straight.parent / "plain")[0]["frac_reward_zero_std"]
    assert (before != after) == (equal > 0)
    assert found[0]["frac_reward_zero_std"] <= equal


def test_a_run_with_replaced_groups_is_resumed_bit_for_bit_and_does_not_depend_on_the_split(straight):
    cwd = straight.parent
    assert launch(*OWN, "run_dir=stopped", "until_step=1", cwd=cwd).returncode == 0
    assert resume(cwd / "stopped").returncode == 0
    assert rows(cwd / "stopped") == rows(straight)
    last = sorted(straight.glob("checkpoints/step_*"))[-1].name
    ours, theirs = (run / "checkpoints" / last / "model.safetensors" for run in (cwd / "stopped", straight))
    assert ours.read_bytes() == theirs.read_bytes()
    split = ["hardware.rollout_tokens=150", "hardware.micro_batch_tokens=200", "grpo.num_steps=1"]
    assert launch(*OWN, *split, "run_dir=split", cwd=cwd).returncode == 0
    assert rows(cwd / "split")[0]["digest/completions"] == rows(straight)[0]["digest/completions"]
