"""`grpo chat`: text while it is generated, history, comparison with the model before training, and use in a pipe."""

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.commands._common import find_model, load_model_under_test
from grpo.commands.chat import TextStream, answer
from grpo.data import arithmetic
from tests.launches import ROOT, grpo

TINY = ["experiment=quickstart", "hardware.threads=1"]
QUESTION = "What is 27 + 35?"


@pytest.fixture(scope="module")
def loaded():
    return load_model_under_test(find_model(TINY), with_problems=False)


def test_the_text_is_shown_while_it_is_generated(loaded):
    whole = answer(loaded, QUESTION, turn=1)
    parts = []
    assert answer(loaded, QUESTION, turn=1, on_text=parts.append) == whole
    assert "".join(parts) == whole + "\n"
    assert len(parts) > 10


def test_a_character_of_several_tokens_is_shown_at_once(loaded):
    """The embedded model has a token for each byte of such a character."""
    text = "a\u00e9\u20acb"
    ids = loaded.experiment.tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == 7
    parts = []
    stream = TextStream(lambda row: loaded.experiment.decode([row], ())[0], parts.append)
    for token in ids:
        stream.add([token])
    assert parts == ["a", "\u00e9", "\u20ac", "b"]
    stream.end(text)
    assert "".join(parts) == f"{text}\n"


def test_history_keeps_the_turns_until_a_new_conversation_begins(loaded):
    history = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}]
    assert answer(loaded, QUESTION, 1, history) != answer(loaded, QUESTION, 1)


def test_a_pipe_gets_only_the_answers(tmp_path):
    lines = f"{QUESTION}\n{QUESTION}\nWhat is 10 + 11?\n"
    command = [sys.executable, "-m", "grpo", "chat", *TINY]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    single = grpo("chat", *TINY, f"prompt={QUESTION}", cwd=tmp_path).stdout
    assert done.stdout.startswith(single * 2)
    assert "each line is a new problem" in done.stderr
    other = subprocess.run(
        [*command, "history=true"], input=f"{QUESTION}\n{QUESTION}\n/new\n{QUESTION}\n", capture_output=True, text=True,
        cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert other.stdout.startswith(single)
    assert other.stdout.endswith(single)
    assert other.stdout != single * 3


def test_compare_shows_the_model_before_training_beside_it(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    done = grpo("chat", f"run_dir={run}", "compare=true", f"prompt={QUESTION}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tiny (0 steps)" in done.stdout
    assert "(2 steps)" in done.stdout
    for arguments, said in (
        (["compare=true", *TINY], "compare=true shows a run's model beside the untrained one"),
        (["history=yes", *TINY], "history=yes: must be true or false"),
    ):
        refused = grpo("chat", *arguments, f"prompt={QUESTION}", cwd=tmp_path)
        assert refused.returncode == 2
        assert said in refused.stderr.splitlines()[-1]


def test_plain_transformers_gives_the_same_text_as_chat(finished_run):
    folder = finished_run / "final_model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    loaded = load_model_under_test(find_model([f"run_dir={finished_run}"]), with_problems=False)
    sampling = replace(loaded.sampling, temperature=0.0, min_new_tokens=0)
    loaded = loaded._replace(sampling=sampling)
    for problem in arithmetic.problems("test")[:10]:
        conversation = [{"role": "user", "content": problem["question"]}]
        inputs = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt")
        ids = inputs["input_ids"] if not torch.is_tensor(inputs) else inputs
        out = model.generate(ids, do_sample=False, max_new_tokens=sampling.max_new_tokens)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer(loaded, problem["question"], turn=1) == text
