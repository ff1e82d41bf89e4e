"""Generated problems of reasoning-gym, and their scorers."""

import os
import subprocess
import sys

import pytest
from reasoning_gym.factory import DATASETS

from grpo.config.errors import ConfigError
from grpo.data.reasoning_gym import UNUSABLE, load
from grpo.rewards.reasoning_gym import NO_REFERENCE, accuracy, is_harmless, score
from tests.launches import ROOT, SHORT, launch, rows

SOME = ["chain_sum", "countdown", "gcd", "propositional_logic", "prime_factorization", "letter_counting"]
NO_ANSWERS = ["", "nonsense 12x", "<answer></answer>", "0 1 2 3 4 5 6 7 8 9 10 True False"]


def scored(problems, texts, **settings):
    columns = {
        "question": [each.question for each in problems],
        "answer": [each.answer for each in problems],
        "metadata": [each.columns["metadata"] for each in problems],
    }
    return score([""] * len(texts), texts, **columns, **settings)


def check_task(task):
    problems = load(task=task, train_size=4, test_size=2).train
    for text in NO_ANSWERS:
        for form in ("{}", "<answer>{}</answer>"):
            assert scored(problems, [form.format(text)] * 4) == [0.0] * 4
    for form in ("<answer>{}</answer>", r"\boxed{{{}}}"):
        texts = [form.format(each.answer) for each in problems]
        # A few references of intermediate_integration are the integral itself, as which any answer could be written.
        unpaid = [each.answer == NO_REFERENCE or "Integral(" in each.answer for each in problems]
        right = [0.0 if each else 2.0 for each in unpaid]
        balanced = all(each.answer.count("{") == each.answer.count("}") for each in problems)
        if "answer" in form or balanced:
            assert scored(problems, texts) == right


@pytest.mark.parametrize("task", SOME)
def test_right_answers_get_the_full_score_and_others_nothing(task):
    check_task(task)


SLOW_TO_GENERATE = {"futoshiki", "zebra_puzzles"}


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(set(DATASETS) - set(UNUSABLE) - SLOW_TO_GENERATE))
def test_right_answers_of_every_task_get_the_full_score_and_others_nothing(task):
    check_task(task)


RUNS_CODE = [
    "__import__('os').system('id')", "eval('1')", "().__class__", "open ('x')", "(lambda: 1)()", "a.b(1)",
    "''.join(['a'])", "[print][0](1)", 'f"{1}"(2)', "x(1)", "eval\\\n(1)", "(eval # +\n(1))", "eval\n(1)", "x.sin(1)",
    "\uff3f\uff3fimport\uff3f\uff3f('os')", "\uff45val(1)", "ev\u200bal(1)", "{}(1)", "not.x(1)", "x2(1)",
]  # fmt: skip


@pytest.mark.parametrize("answer", RUNS_CODE)
def test_an_answer_that_could_call_code_is_not_passed_on(answer):
    assert not is_harmless(answer)


@pytest.mark.parametrize(
    "answer",
    ["[1, 2]", "3*(4+5)", "sin(x) + C", "not (A or B)", "sqrt (2)", "[(1, 2)]", "3.5(2)", "#A B#", r"\frac{1}{2}"],
)
def test_an_ordinary_answer_is_passed_on(answer):
    assert is_harmless(answer)


@pytest.mark.parametrize("task", ["number_sorting", "spiral_matrix", "countdown", "string_insertion"])
def test_the_answer_of_a_completion_runs_no_code(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problems = load(task=task, train_size=2, test_size=0).train
    for code in ("open('made', 'w')", "__import__('pathlib').Path('made').touch()", "[open('made', 'w')]"):
        assert scored(problems, [f"<answer>{code}</answer>"] * 2) == [0.0, 0.0]
    assert not (tmp_path / "made").exists()


def test_a_lower_score_pays_only_with_partial():
    (problem,) = load(task="gcd", train_size=1, test_size=0).train
    texts = [f"<answer>{problem.answer} or 123456789</answer>"]
    assert scored([problem], texts) == [0.0]
    assert 0 < scored([problem], texts, partial=True)[0] < 2.0


def test_a_problem_without_metadata_has_no_value():
    (problem,) = load(task="gcd", train_size=1, test_size=0).train
    for metadata in (None, {}, {"level": 1}):
        assert accuracy([""], ["<answer>1</answer>"], [problem.question], ["1"], [metadata]) == [None]


def test_the_problems_are_always_the_same_and_the_splits_have_none_in_common():
    one, again, other = (load(task="gcd", train_size=300, test_size=100, task_seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one != other
    questions = [each.question for each in one.train + one.test]
    assert len(set(questions)) == 400


@pytest.mark.parametrize("task", ["isomorphic_strings", "ransom_note"])
def test_the_problems_do_not_depend_on_the_seed_of_hashes(task):
    """These tasks choose from sets, whose order differs between processes."""
    code = f"from grpo.data.reasoning_gym import load; print(load(task={task!r}, train_size=5, test_size=0).train)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env=environment | {"PYTHONHASHSEED": seed}, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
    assert task.encode() in found.pop()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task": "no_such_task"}, "data.task=no_such_task: .*no_such_task"),
        ({"task": "gcd", "settings": {"digits": 3}}, "data.task=gcd with .*digits"),
        ({"task": "gcd", "settings": {"max_value": -1}}, "data.task=gcd with .*max_value must be"),
        ({"task": "composite"}, "it needs a list of other tasks"),
        ({"task": "game_of_life_halting"}, "its scorer counts any text as the answer True"),
        ({"task": "gcd", "path": "x"}, "data.path=x: data=reasoning_gym generates"),
        ({"task": "gcd", "train_size": 0}, "data.train_size=0: must be an integer of 1 or more"),
        ({"task": "gcd", "train_size": "many"}, "data.train_size=many: must be an integer of 1 or more"),
        ({"task": "gcd", "task_seed": None}, "data.task_seed=None: must be an integer of 0 or more"),
        ({"task": "gcd", "settings": ["a"]}, "data.settings=.*: must be arguments of the task by name"),
        ({"task": "chain_sum", "settings": {"max_terms": 3.5}}, "data.task=chain_sum with "),
        ({"task": "gcd", "settings": {"max_value": 3}}, r"data.task=gcd: only \d+ of 60 questions are different"),
    ],
)
def test_a_task_that_cannot_be_generated_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        load(**{"train_size": 20, "test_size": 10, **settings})


def test_a_run_on_generated_problems(tmp_path):
    task = ["data=reasoning_gym", "data.task=chain_sum", "reward=reasoning_gym", "data.train_size=20"]
    settings = [
        "data.path=null",
        "data.system_prompt=null",
        "+data.settings={max_terms: 2, max_digits: 1}",
        "data.test_size=4",
    ]
    done = launch(*SHORT, *task, *settings, "grpo.num_steps=1", "eval.after=true", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "run")[0]["rewards/correctness/mean"] is not None
