"""`grpo chat`: text while it is generated, history, comparison with the model before training, and use in a pipe."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

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
    lines = f"{QUESTION}\n\n{QUESTION}\nWhat is 10 + 11?\n"  # an empty line is no question
    command = [sys.executable, "-m", "grpo", "chat", *TINY]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    single = grpo("chat", *TINY, f"prompt={QUESTION}", cwd=tmp_path).stdout
    assert done.stdout.startswith(single * 2)
    assert len(done.stdout) > len(single * 2)
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


def greedy_chat(run, questions):
    """The answers of `grpo chat` to questions, and its number of new tokens."""
    loaded = load_model_under_test(find_model([f"run_dir={run}"]), with_problems=False)
    sampling = replace(loaded.sampling, temperature=0.0, min_new_tokens=0)
    loaded = loaded._replace(sampling=sampling)
    return [answer(loaded, question, turn=1) for question in questions], sampling.max_new_tokens


def test_plain_transformers_gives_the_same_text_as_chat(finished_run):
    folder = finished_run / "final_model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    questions = [problem["question"] for problem in arithmetic.problems("test")[:10]]
    texts, most = greedy_chat(finished_run, questions)
    for question, expected in zip(questions, texts, strict=True):
        conversation = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt")
        ids = inputs["input_ids"] if not torch.is_tensor(inputs) else inputs
        out = model.generate(ids, do_sample=False, max_new_tokens=most)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == expected


VLLM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, most, questions = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    llm = LLM(folder, dtype="float32", max_model_len=512, enforce_eager=True)
    asked = [[{"role": "user", "content": question}] for question in questions]
    found = llm.chat(asked, SamplingParams(temperature=0, max_tokens=most), use_tqdm=False)
    with open("texts.json", "w") as file:
        json.dump([each.outputs[0].text for each in found], file)
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_gives_the_same_text_as_chat(finished_run, tmp_path):
    questions = [problem["question"] for problem in arithmetic.problems("test")[:50]]
    texts, most = greedy_chat(finished_run, questions)
    (tmp_path / "ask.py").write_text(VLLM)
    arguments = [finished_run / "final_model", str(most), json.dumps(questions)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}  # GB
    done = subprocess.run(
        [sys.executable, "ask.py", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "texts.json").read_text()) == texts
