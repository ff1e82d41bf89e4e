"""Generated problems of reasoning-gym, and their scorers."""

import inspect
import os
import re
import subprocess
import sys

import pytest
from reasoning_gym.factory import DATASETS

from grpo.config.errors import ConfigError
from grpo.data.reasoning_gym import UNUSABLE, load
from grpo.rewards.reasoning_gym import NO_REFERENCE, RUN_CODE, accuracy, score
from tests.launches import ROOT, SHORT, launch, rows

SOME = ["chain_sum", "basic_arithmetic", "gcd", "propositional_logic", "prime_factorization", "letter_counting"]
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
        right = [0.0 if each.answer == NO_REFERENCE else 2.0 for each in problems]
        balanced = all(each.answer.count("{") == each.answer.count("}") for each in problems)
        if "answer" in form or balanced:
            assert scored(problems, texts) == right


@pytest.mark.parametrize("task", SOME)
def test_right_answers_get_the_full_score_and_others_nothing(task):
    check_task(task)


SLOW_TO_GENERATE = {"futoshiki", "zebra_puzzles"}


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(set(DATASETS) - set(UNUSABLE) - RUN_CODE - SLOW_TO_GENERATE))
def test_right_answers_of_every_task_get_the_full_score_and_others_nothing(task):
    check_task(task)


@pytest.mark.parametrize("task", sorted(RUN_CODE))
def test_a_task_whose_scorer_runs_code_is_not_used(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="its scorer runs answers or problems as Python code"):
        load(task=task, train_size=1, test_size=0)
    code = "[__import__('pathlib').Path('made').touch()]"
    with pytest.raises(ValueError, match="so it is not used"):
        score([""], [f"<answer>{code}</answer>"], ["?"], [code], [{"source_dataset": task, "problem": code}])
    assert not (tmp_path / "made").exists()


def test_the_list_of_tasks_that_run_code_is_complete():
    """By the source of the installed package."""
    runs_code = re.compile(r"(?<![\w.])(?:eval|exec|sympify)\(|parse_expr\(|sp(?:ympy)?\.S\(")
    for task, (dataset, _) in DATASETS.items():
        source = inspect.getsource(dataset.score_answer) + inspect.getsource(inspect.getmodule(dataset))
        own_parser = "def parse_expr(" in source  # of propositional_logic, which evaluates nothing
        only_generates = task in {"basic_arithmetic", "gsm_symbolic"}
        if runs_code.search(source) and not own_parser and not only_generates:
            assert task in RUN_CODE


def test_modules_of_the_current_directory_are_not_imported(tmp_path, monkeypatch):
    (tmp_path / "pickle.py").write_text("import pathlib\npathlib.Path('made').touch()\n")
    monkeypatch.chdir(tmp_path)
    assert load(task="gcd", train_size=1, test_size=0).train
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
