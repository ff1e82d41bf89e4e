import re
import subprocess
import sys

import pytest

from grpo.config.errors import ConfigError
from grpo.data.arithmetic import PHRASINGS, SPLITS, problems
from grpo.data.problems import load_arithmetic


def operands(problem):
    return tuple(int(operand) for operand in problem["id"].split("+"))


def test_the_splits_have_the_promised_sizes_and_contain_every_two_digit_addition_once():
    sizes = {split: len(problems(split)) for split in SPLITS}
    assert sizes["test"] >= 400
    assert sizes["train"] >= 1500
    ids = [problem["id"] for split in SPLITS for problem in problems(split)]
    assert len(ids) == len(set(ids)) == 90 * 90


def test_a_pair_of_numbers_in_either_order_is_in_one_split_only():
    pairs = [{frozenset(operands(problem)) for problem in problems(split)} for split in SPLITS]
    assert sum(len(split) for split in pairs) == len(set.union(*pairs)) == 90 * 91 // 2


@pytest.mark.parametrize("split", SPLITS)
def test_question_and_answer_match_the_operands(split):
    for problem in problems(split):
        a, b = operands(problem)
        assert problem.keys() == {"id", "question", "answer"}
        assert [int(number) for number in re.findall(r"\d+", problem["question"])] == [a, b]
        assert problem["answer"] == str(a + b)


@pytest.mark.parametrize("split", SPLITS)
def test_the_first_problems_are_a_representative_sample(split):
    first = problems(split)[:200]
    used = {
        phrasing
        for phrasing in PHRASINGS
        for p in first
        if phrasing.format(a=p["id"][:2], b=p["id"][3:]) == p["question"]
    }
    assert used == set(PHRASINGS)
    carries = sum(a % 10 + b % 10 >= 10 for a, b in map(operands, first))
    assert 60 <= carries <= 120  # 45 % of all additions carry


def test_another_process_gets_the_same_problems_without_importing_torch():
    code = (
        "import sys; from grpo.data.arithmetic import problems; "
        "print([problem['question'] for problem in problems('test')], 'torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == f"{[problem['question'] for problem in problems('test')]} False"


def test_the_problems_do_not_change_between_versions():
    # The embedded model was trained on "demonstrations": other splits would leak test problems into its training.
    assert [problem["id"] for problem in problems("test")[:3]] == ["46+47", "18+81", "36+98"]
    assert [problem["question"] for problem in problems("train")[:1]] == ["Tom ran 70 km, then 94 km. How far in all?"]


def test_an_unknown_split_is_refused_with_a_list_of_the_known_ones():
    with pytest.raises(ValueError, match=r"'dev'.*demonstrations, train, test"):
        problems("dev")


@pytest.mark.parametrize("digits", [1, 3, 8])
def test_more_digits_are_more_difficult_and_the_splits_stay_apart(digits):
    loaded = load_arithmetic(digits=digits)
    families = [{each.family for each in split} for split in (loaded.train, loaded.test)]
    assert not families[0] & families[1]
    for each in loaded.train[:50] + loaded.test[:50]:
        a, b = each.id.split("+")
        assert len(a) == len(b) == digits
        assert int(each.answer) == int(a) + int(b)
    sizes = {1: (14, 3), 3: (2000, 500), 8: (2000, 500)}
    assert (len(loaded.train), len(loaded.test)) == sizes[digits]
    assert load_arithmetic(digits=digits) == loaded


@pytest.mark.parametrize("digits", [0, 19, 2.0, True, "2"])
def test_a_number_of_digits_that_is_none_is_refused(digits):
    with pytest.raises(ConfigError, match=f"data.digits={digits}: must be an integer from 1 to 18"):
        load_arithmetic(digits=digits)
