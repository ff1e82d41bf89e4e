"""Tests of the splits: which problems are kept out of training, and when two data sets are one."""

from pathlib import Path

import pytest

from grpo.config.errors import ConfigError
from grpo.data.problems import Problem, Problems, load_arithmetic, load_jsonl
from grpo.data.splits import is_same_data, with_validation


@pytest.fixture
def folder(tmp_path):
    """A folder with one problem to train on and one to test."""
    path = tmp_path / "data"
    path.mkdir()
    for split in ("train", "test"):
        (path / f"{split}.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n', encoding="utf-8")
    return path


def test_validation_problems_are_chosen_by_their_question_alone():
    problems = Problems([Problem(f"p{i}", f"{i} + 1?", str(i + 1)) for i in range(4000)], [])
    split = with_validation(problems, 0.05)
    assert len(split.validation) == pytest.approx(200, abs=45)  # three standard deviations
    assert sorted(each.id for each in split.train + split.validation) == sorted(each.id for each in problems.train)
    chosen = {each.id for each in split.validation}
    some = with_validation(Problems(problems.train[::3], []), 0.05)
    assert {each.id for each in some.validation} == {each.id for each in problems.train[::3]} & chosen
    assert chosen < {each.id for each in with_validation(problems, 0.1).validation}
    assert with_validation(problems, 0.0) == problems
    twice = [Problem(f"again {each.id}", each.question, each.answer) for each in problems.train]
    both = with_validation(Problems(problems.train + twice, []), 0.05)
    assert not {each.question for each in both.train} & {each.question for each in both.validation}


def test_a_sum_and_its_reverse_are_in_the_same_split():
    split = with_validation(load_arithmetic(), 0.1)
    pairs = [{frozenset(each.id.split("+")) for each in some} for some in (split.train, split.validation, split.test)]
    assert not pairs[0] & pairs[1]
    assert not pairs[1] & pairs[2]
    assert len(split.validation) > 100


def test_a_data_set_can_have_validation_problems_of_its_own(folder):
    path = str(folder)
    Path(path, "validation.jsonl").write_text('{"question": "c?", "answer": "3"}', encoding="utf-8")
    loaded = with_validation(load_jsonl(path), 0.9)
    assert [each.question for each in loaded.train] == ["1 + 1?"]
    assert [each.question for each in loaded.validation] == ["c?"]
    assert with_validation(load_jsonl(path), 0.0).validation == []  # as runs of earlier versions


def test_a_share_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(ConfigError, match="leaves none of 1 training problems to train on; lower it"):
        with_validation(Problems([Problem("a", "1?", "1")], []), 1.0)


def test_a_data_set_is_the_same_however_it_is_named(folder, monkeypatch):
    path = str(folder)
    monkeypatch.chdir(folder.parent)
    (folder.parent / "link").symlink_to(path)
    gsm8k = {"_target_": "grpo.data.problems.load_gsm8k", "path": path, "name": "main"}
    jsonl = {"_target_": "grpo.data.problems.load_jsonl", "name": None}
    for name in (path, Path(path).name, f"{path}/.", str(folder.parent / "link")):
        assert is_same_data(gsm8k, jsonl | {"path": name})
    assert not is_same_data(gsm8k, jsonl | {"path": str(folder.parent)})
    on_hub = gsm8k | {"path": "openai/gsm8k"}
    assert is_same_data(on_hub, {**on_hub})
    assert not is_same_data(on_hub, on_hub | {"name": "socratic"})
    sums = {"_target_": "grpo.data.problems.load_arithmetic", "path": None, "name": None}
    assert is_same_data(sums, {**sums})
    assert not is_same_data(sums, gsm8k)
    assert is_same_data(sums, sums | {"parts": None})
    mixture = sums | {"_target_": "grpo.data.mixture.mix", "parts": {"a": gsm8k}}
    assert not is_same_data(mixture, mixture | {"parts": {"a": jsonl}})
    table = {"_target_": "grpo.data.tables.load_table", "path": str(folder), "name": None, "answer": "x"}
    assert is_same_data(table, {**table})
    assert not is_same_data(table, table | {"answer": "y"})
