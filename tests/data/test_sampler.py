"""Problems drawn with weights and by a curriculum."""

import math
from dataclasses import replace

import numpy as np
import pytest

from grpo.config.errors import ConfigError
from grpo.data.problems import Problem
from grpo.data.sampler import PromptSampler, pass_weight


def problems(*weights):
    return [Problem(str(number), f"{number}?", "1", weight=weight) for number, weight in enumerate(weights)]


def drawn(sampler, steps, count):
    return [[problem.id for problem in sampler.take(step, count).problems] for step in steps]


def test_equal_weights_are_no_weights():
    steps = range(1, 30)
    assert drawn(PromptSampler(problems(*[0.1] * 20), 3), steps, 4) == drawn(
        PromptSampler(problems(*[1] * 20), 3), steps, 4
    )


def test_problems_are_drawn_in_proportion_to_their_weights():
    """The first one of each step; 4,000 draws, so that three standard deviations are at most 0.024."""
    weights = np.array([1, 2, 3, 4])
    first = [ids[0] for ids in drawn(PromptSampler(problems(*weights), 1), range(1, 4001), 2)]
    shares = [first.count(str(number)) / len(first) for number in range(4)]
    assert shares == pytest.approx(weights / 10, abs=0.024)


def test_a_step_draws_a_problem_once_and_never_one_with_weight_0():
    sampler = PromptSampler(problems(1, 5, 0, 1, 9, 0), 1)
    for ids in drawn(sampler, range(1, 200), 4):
        assert sorted(ids) == ["0", "1", "3", "4"]
    assert [len(set(ids)) for ids in drawn(sampler, range(1, 50), 6)] == [4] * 49  # more than there are: again


def test_a_step_depends_on_nothing_but_seed_and_number():
    make = lambda seed: PromptSampler(problems(*range(1, 30)), seed)  # noqa: E731
    forward = drawn(make(1), range(1, 20), 5)
    assert drawn(make(1), range(19, 0, -1), 5)[::-1] == forward
    assert drawn(make(2), range(1, 20), 5) != forward


def test_replacements_are_problems_that_the_step_has_not_used():
    sampler = PromptSampler(problems(*range(1, 30)), 1)
    used = sampler.take(3, 8).problems
    instead = sampler.take_instead(3, 8, [2, 5], 1, used)
    assert instead.slots.tolist() == [2, 5]
    assert not {each.id for each in instead.problems} & {each.id for each in used}


def mixture(**sizes):
    """Parts with the given numbers of problems and equal weights."""
    return [
        Problem(f"{part}/{number}", f"{part} {number}?", "1", weight=1 / size, part=part)
        for part, size in sizes.items()
        for number in range(size)
    ]


@pytest.mark.parametrize("curriculum", [0.0, 0.9])
def test_a_part_of_a_mixture_is_drawn_as_often_as_its_weight_says_however_small_it_is(curriculum):
    """500 steps of 16 problems, half of each part: three standard deviations are 0.017."""
    sampler = PromptSampler(mixture(small=3, large=1000), 1, curriculum=curriculum)
    steps = drawn(sampler, range(1, 501), 16)
    small = [sum(id.startswith("small/") for id in ids) for ids in steps]
    assert sum(small) / 8000 == pytest.approx(0.5, abs=0.017)
    assert np.var(small) == pytest.approx(4, abs=0.8)  # that of 16 independent draws
    for ids in steps:
        of_small = [id for id in ids if id.startswith("small/")]
        of_large = [id for id in ids if id.startswith("large/")]
        assert max(map(of_small.count, of_small), default=0) <= -(-len(of_small) // 3)
        assert len(set(of_large)) == len(of_large)


def test_replacements_in_a_mixture_are_of_the_same_part():
    sampler = PromptSampler(mixture(small=9, large=1000), 1)
    for step in range(1, 50):
        before = sampler.take(step, 8).problems
        instead = sampler.take_instead(step, 8, [0, 5, 7], 1, before).problems
        assert [each.part for each in instead] == [before[slot].part for slot in (0, 5, 7)]
        assert not {each.id for each in instead} & {each.id for each in before}


def test_the_weight_by_pass_rate_in_numbers():
    """c = 0.9: unseen p = 1/2; always right once p = 3/4, 16 times p = 33/34; half right p = 1/2."""
    assert pass_weight(0.9, 0.0, 0) == 1.0
    assert pass_weight(0.9, 1.0, 1) == pytest.approx(0.1 + 0.9 * 4 * 0.75 * 0.25)
    assert pass_weight(0.9, 16.0, 16) == pytest.approx(0.1 + 0.9 * 4 * (16.5 / 17) * (0.5 / 17))
    assert pass_weight(0.9, 8.0, 16) == 1.0
    assert pass_weight(0.9, 0.0, 16) == pytest.approx(pass_weight(0.9, 16.0, 16))
    assert pass_weight(0.0, 16.0, 16) == 1.0


def test_solved_problems_become_rarer_and_the_state_restores_it():
    of = problems(*[1] * 40)
    sampler = PromptSampler(of, 1, curriculum=0.9)
    for _ in range(10):
        sampler.observe(of[:20], [1.0] * 20)
        sampler.observe(of[20:], [0.5] * 20)
    sampler.observe(of[:1], [math.nan])
    taken = [int(name) for ids in drawn(sampler, range(1, 400), 4) for name in ids]
    solved = sum(name < 20 for name in taken) / len(taken)
    weight = pass_weight(0.9, 10.0, 10)
    assert solved == pytest.approx(weight / (1 + weight), abs=0.04)
    restored = PromptSampler(of, 1, curriculum=0.9)
    restored.load_state_dict(sampler.state_dict())
    assert drawn(restored, range(400, 500), 4) == drawn(sampler, range(400, 500), 4)
    assert next(iter(sampler.state_dict().values())) == [10.0, 10]
    other = PromptSampler([replace(each, question="another") for each in of], 1, curriculum=0.9)
    other.load_state_dict(sampler.state_dict())  # the ids are equal, the problems are not
    assert drawn(other, range(400, 500), 4) == drawn(PromptSampler(of, 1, curriculum=0.9), range(400, 500), 4)


@pytest.mark.parametrize("weights", [(0, 0), (1, -1), (1, math.nan), (1, math.inf)])
def test_weights_that_are_no_probabilities_are_refused(weights):
    with pytest.raises(ConfigError, match="must be 0 or more, and not all 0"):
        PromptSampler(problems(*weights), 1)
