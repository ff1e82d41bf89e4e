import json
import logging

import pytest

from grpo.config.errors import ConfigError
from grpo.config.schema import ModelConfig
from grpo.data.problems import Problem
from grpo.data.prompts import messages, render
from grpo.model.loading import load_tokenizer
from grpo.training import prompt_lengths as module
from grpo.training.prompt_lengths import LEAST_PROMPTS, prompt_lengths
from tests.launches import launch

DATA = {"system_prompt": "Add.", "examples": [], "max_prompt_length": 100, "template_arguments": None}
PROBLEMS = [Problem(str(number), f"{number} + 1?", str(number + 1)) for number in range(LEAST_PROMPTS)]


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("GRPO_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


@pytest.fixture
def tokenizer():
    return load_tokenizer(ModelConfig("tiny", "sdpa", "float32", "auto", False))


@pytest.fixture
def counted(monkeypatch):
    """The number of prompts of each time that prompts were rendered and tokenized."""
    counts = []
    original = module.count_tokens

    def count_tokens(tokenizer, problems, *others):
        counts.append(len(problems))
        return original(tokenizer, problems, *others)

    monkeypatch.setattr(module, "count_tokens", count_tokens)
    return counts


def lengths(tokenizer, problems=PROBLEMS, vocabulary=336, **changes):
    return prompt_lengths(tokenizer, problems, DATA | changes, vocabulary)


def test_lengths_are_kept_for_the_next_launch_once_they_are_saved(tokenizer, outputs, counted):
    first = lengths(tokenizer)
    expected = [
        len(tokenizer.encode(render(tokenizer, messages(each.question, DATA)), add_special_tokens=False))
        for each in PROBLEMS
    ]
    assert first.tokens == expected
    assert not outputs.exists()  # a launch that is refused leaves nothing
    assert lengths(tokenizer).tokens == expected
    first.save()
    assert counted == [LEAST_PROMPTS] * 2
    again = lengths(tokenizer)
    again.save()
    assert again.tokens == expected
    assert counted == [LEAST_PROMPTS] * 2
    assert [file.name for file in outputs.rglob("*.json")] == [first.file.name]


@pytest.mark.parametrize(
    "changes",
    [
        {"system_prompt": "Sum."},
        {"system_prompt": None},
        {"examples": [{"question": "1 + 1?", "completion": "2"}]},
        {"problems": [Problem("x", "2 + 2?", "4"), *PROBLEMS[1:]]},
        {"problems": PROBLEMS[::-1]},
        {"problems": [Problem("0", "0 + 1?", "1", turns=({"role": "user", "content": "Hi"},)), *PROBLEMS[1:]]},
        {"vocabulary": 400},
        {"template_arguments": {"chat_template": "{{ messages[-1].content }}"}},
        {"template_arguments": {"tools": [{1: "a", "b": "c"}]}},
    ],
)
def test_other_prompts_are_counted_anew(tokenizer, counted, changes):
    lengths(tokenizer).save()
    lengths(tokenizer, **changes).save()
    assert counted == [LEAST_PROMPTS] * 2
    lengths(tokenizer, **changes)
    assert counted == [LEAST_PROMPTS] * 2


def test_another_tokenizer_or_chat_template_counts_anew(tokenizer, outputs, counted):
    lengths(tokenizer, vocabulary=400).save()
    tokenizer.chat_template += " "
    lengths(tokenizer, vocabulary=400).save()
    tokenizer.add_tokens(["1?"])
    lengths(tokenizer, vocabulary=400).save()
    tokenizer.bos_token = "="
    lengths(tokenizer, vocabulary=400).save()
    tokenizer.split_special_tokens = True
    lengths(tokenizer, vocabulary=400).save()
    assert counted == [LEAST_PROMPTS] * 5
    assert len(list(outputs.rglob("*.json"))) == 5


def test_kept_lengths_are_checked_against_the_limit(tokenizer, counted):
    kept = lengths(tokenizer)
    kept.save()
    with pytest.raises(ConfigError, match=f"longer than data.max_prompt_length={max(kept.tokens) - 1}"):
        lengths(tokenizer, max_prompt_length=max(kept.tokens) - 1)
    assert counted == [LEAST_PROMPTS]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1, 2",
        b"[1, 2]",
        b"{}",
        b"\xff",
        b"[" * 99999,
        json.dumps(["1"] * 2000).encode(),
        json.dumps([0] * 2000).encode(),
    ],
)
def test_a_damaged_file_is_not_used_and_replaced(tokenizer, counted, content):
    kept = lengths(tokenizer)
    kept.save()
    kept.file.write_bytes(content)
    again = lengths(tokenizer)
    assert again.tokens == kept.tokens
    again.save()
    assert lengths(tokenizer).tokens == kept.tokens
    assert counted == [LEAST_PROMPTS] * 2


def test_few_prompts_and_those_with_a_date_are_not_kept(tokenizer, outputs):
    lengths(tokenizer, PROBLEMS[:-1]).save()
    dated = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    lengths(tokenizer, template_arguments={"chat_template": dated}).save()
    tokenizer.chat_template = dated
    lengths(tokenizer).save()
    assert not outputs.exists()


def test_a_folder_that_cannot_be_written_is_a_warning(tokenizer, outputs, caplog):
    outputs.write_text("a file")
    with caplog.at_level(logging.WARNING):
        lengths(tokenizer).save()
    assert "the lengths of the prompts could not be written" in caplog.text


def test_a_launch_keeps_the_lengths_and_a_plan_or_a_refused_launch_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("GRPO_OUTPUTS", "outputs")
    (tmp_path / "sums").mkdir()
    rows = [json.dumps({"question": each.question, "answer": each.answer}) + "\n" for each in PROBLEMS]
    (tmp_path / "sums" / "train.jsonl").write_text("".join(rows))
    (tmp_path / "sums" / "test.jsonl").write_text("".join(rows[:5]))
    data = ["experiment=quickstart", "data=jsonl", "data.path=sums", "data.validation_share=0", "tracking=disabled"]
    small = ["grpo.num_steps=1", "grpo.batch_size=1", "grpo.num_generations=2", "grpo.max_completion_length=4"]
    short = ["eval.before=false", "eval.after=false", "preflight=false", "run_dir=run"]
    assert launch(*data, *small, "data.max_prompt_length=2", cwd=tmp_path).returncode == 2
    assert launch(*data, *small, "plan=true", cwd=tmp_path).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sums"]
    assert launch(*data, *small, *short, cwd=tmp_path).returncode == 0
    (file,) = (tmp_path / "outputs" / "prompt_lengths").iterdir()
    assert len(json.loads(file.read_text())) == LEAST_PROMPTS + 5
