"""Models with unusual tokenizers and chat templates: copies of the embedded model with other files."""

import json
import shutil

import pytest
import torch

from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.config.errors import ConfigError
from grpo.data.prompts import turn_tokens
from grpo.tiny import MODEL_DIR
from grpo.training.evaluation import evaluate
from grpo.training.experiment import build_experiment
from tests.launches import SHORT, grpo, launch
from tests.tiny_model import plain_completions

TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
QUESTION = "prompt=What is 27 + 35?"
TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
)
THINKING = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"


@pytest.fixture
def model(tmp_path):
    """A function that copies the embedded model with another template or tokenizer; returns the folder."""

    def copy(template=None, **changes):
        folder = shutil.copytree(MODEL_DIR, tmp_path / "model", dirs_exist_ok=True)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        for name, values in changes.items():
            file = folder / f"{name}.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | values))
        return folder

    return copy


@pytest.fixture
def without_template(model):
    """A base model: no chat template, and a tokenizer that adds a token before and one after each text."""
    folder = model(tokenizer_config={"bos_token": "<|im_start|>", "tokenizer_class": "PreTrainedTokenizerFast"})
    (folder / "chat_template.jinja").unlink()
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    single = [{"SpecialToken": {"id": t, "type_id": 0}} for t in ("<|im_start|>", "<|im_end|>")]
    single.insert(1, {"Sequence": {"id": "A", "type_id": 0}})
    pair = [*single[:2], {"Sequence": {"id": "B", "type_id": 1}}, single[2]]
    ids = {each["content"]: each["id"] for each in values["added_tokens"]}
    tokens = {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in ("<|im_start|>", "<|im_end|>")}
    post = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
    file.write_text(json.dumps(values | {"post_processor": post}))
    return folder


@pytest.fixture
def build():
    """A function that builds the experiment of SHORT with overrides."""
    threads = torch.get_num_threads()
    yield lambda *overrides: build_experiment(typed(compose_config([*SHORT, *overrides])))
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def evaluated(experiment):
    policy = experiment.load_policy()
    return evaluate(experiment.build_engine(policy), experiment.sampling(policy), experiment, step=0)


def test_without_a_chat_template_the_tokenizers_special_tokens_are_added(without_template, build):
    experiment = build(f"model.name={without_template}")
    tokenizer = experiment.tokenizer
    prompts = experiment.prompts(experiment.conversations(experiment.problems.train))
    for problem, ids, mask, length in zip(
        experiment.problems.train, prompts.ids, prompts.mask, experiment.prompt_lengths, strict=True
    ):
        row = ids[mask.bool()].tolist()
        text = tokenizer(f"{problem.question}\n\n", add_special_tokens=False).input_ids
        assert row == [tokenizer.bos_token_id, *text]  # not the token for the end, which the completion writes
        assert length == len(row)


def test_with_a_chat_template_no_special_token_is_added(build):
    experiment = build()
    prompts = experiment.prompts(experiment.conversations(experiment.problems.train[:1]))
    text = experiment.tokenizer.decode(prompts.ids[0])
    question = experiment.problems.train[0].question
    assert text == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def test_tags_that_are_special_tokens_are_scored(model, build):
    folder = model(tokenizer_config={"extra_special_tokens": ["<|im_start|>", *TAGS]})
    experiment = build(f"model.name={folder}")
    assert set(TAGS) <= set(experiment.tokenizer.all_special_tokens)
    ours, theirs = evaluated(experiment), evaluated(build())
    assert ours == theirs
    assert theirs["rewards"]["format"] > 0
    assert "<|im_end|>" not in ours["problems"][0]["completion"]


def test_only_tokens_that_format_a_conversation_are_left_out_of_the_text(model, build):
    folder = model(tokenizer_config={"extra_special_tokens": ["<|im_start|>", *TAGS]})
    experiment = build(f"model.name={folder}")
    text = "<reasoning>1</reasoning><answer>5</answer>"
    ids = experiment.tokenizer.encode(f"<|im_start|>{text}<|endoftext|><|im_end|>")
    assert len(ids) == 4 + 3 + 2
    (found,) = experiment.texts(plain_completions(torch.tensor([ids]), torch.tensor([0])), stop_ids=[ids[-1]])
    assert found == text


def test_completions_end_where_the_template_closes_a_turn(model, build):
    """As with a base model, whose only end-of-sequence token is another one."""
    end = {"eos_token_id": 0}
    folder = model(tokenizer_config={"eos_token": "<|endoftext|>"}, config=end, generation_config=end)
    experiment = build(f"model.name={folder}")
    assert experiment.tokenizer.eos_token == "<|endoftext|>"
    assert evaluated(experiment) == evaluated(build())


@pytest.mark.parametrize(
    ("template", "closing"),
    [
        (TURNS + "{% endif %}", "<|im_end|>"),
        ("{% for m in messages %}{{ m.content + ' <|endoftext|>' }}{% endfor %}", "<|endoftext|>"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n### ' }}{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{% for m in messages %}{{ '<|im_start|>' + m.content | upper }}{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_the_token_that_closes_a_turn_is_found_by_rendering_one(template, closing, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    found = turn_tokens(tokenizer).closing
    assert found == (None if closing is None else tokenizer.convert_tokens_to_ids(closing))


def test_a_turn_that_no_single_token_closes_is_named(model, build, caplog):
    folder = model("{% for m in messages %}{{ m.content + ' ### ' }}{% endfor %}")
    build(f"model.name={folder}")
    assert "closes an answer with '###', which does not begin with a special token" in caplog.text


def test_template_arguments_are_part_of_every_prompt(model, build):
    folder = model(TURNS + THINKING)
    plain = build(f"model.name={folder}")
    off = build(f"model.name={folder}", "+data.template_arguments.enable_thinking=false")
    ends = [
        each.tokenizer.decode(each.prompts(each.conversations(each.problems.train[:1])).ids[0]) for each in (plain, off)
    ]
    assert ends[1] == ends[0] + "<think></think>"
    added = len(off.tokenizer.encode("<think></think>"))
    assert off.prompt_lengths == [length + added for length in plain.prompt_lengths]


def test_a_run_folder_keeps_its_template_arguments(model, tmp_path):
    folder = model(TURNS + THINKING)
    off = "+data.template_arguments.enable_thinking=false"
    done = launch(*SHORT, f"model.name={folder}", "grpo.num_steps=1", off, "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    on = "data.template_arguments.enable_thinking=true"
    frozen, replaced = (grpo("chat", "run_dir=run", QUESTION, *given, cwd=tmp_path).stdout for given in ([], [on]))
    assert frozen != replaced


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data.template_arguments={enable_thinking: false}"], "write +data.template_arguments.enable_thinking=..."),
        (["+data.template_arguments.enable_thinkin=false"], "the model's chat template has no variable enable_thinkin"),
        (["+data.template_arguments.messages=[]"], "the model's chat template refuses the prompt"),
        (["data.template_arguments=5"], "data.template_arguments must be variables of the chat template by name"),
    ],
)
def test_a_wrong_template_argument_is_refused(tmp_path, arguments, said):
    refused = launch(*SHORT, *arguments, cwd=tmp_path)
    assert refused.returncode == 2
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "evaluate", "chat"])
def test_a_template_that_takes_no_system_message_is_named(model, tmp_path, command):
    folder = model(NO_SYSTEM + TURNS + "{% endif %}")
    given = [*SHORT, f"model.name={folder}", *([QUESTION] if command == "chat" else [])]
    refused = grpo(command, *given, "data.system_prompt=Be brief.", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.endswith(
        "error: the model's chat template refuses the prompt (no system role); if it takes no system message, set "
        "data.system_prompt=null\n"
    )
    assert not (tmp_path / "outputs").exists()


def test_one_of_several_templates_is_chosen_by_name(model, tmp_path, build):
    folder = model(tokenizer_config={"chat_template": [{"name": n, "template": TURNS + THINKING} for n in ("a", "b")]})
    (folder / "chat_template.jinja").unlink()
    chat = ["chat", *SHORT, f"model.name={folder}", QUESTION]
    refused = grpo(*chat, cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.endswith("choose one with +data.template_arguments.chat_template=: a, b\n")
    chosen = "+data.template_arguments.chat_template=a"
    assert grpo(*chat, chosen, cwd=tmp_path).returncode == 0
    trained = launch(*SHORT, f"model.name={folder}", "grpo.num_steps=1", chosen, "run_dir=run", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    with pytest.raises(ConfigError, match=r"chat_template=c: must be one of a, b"):
        build(f"model.name={folder}", "+data.template_arguments.chat_template=c")
    default = [{"name": n, "template": TURNS + THINKING} for n in ("default", "b")]
    model(tokenizer_config={"chat_template": default})
    (folder / "chat_template.jinja").unlink()
    assert build(f"model.name={folder}").prompt_lengths


@pytest.mark.parametrize("given", [["prompt=2 \udcff 3"], [QUESTION, "data.system_prompt='\udcff'"]])
def test_a_prompt_that_is_not_valid_unicode_is_refused(tmp_path, given):
    """Such as bytes on the command line that are not UTF-8."""
    refused = grpo("chat", *SHORT, *given, cwd=tmp_path)
    assert refused.returncode == 2
    assert "message is not valid Unicode" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_the_minimum_length_is_for_training_only(build, tmp_path):
    assert evaluated(build("rollout.min_new_tokens=30")) == evaluated(build())
    said = [grpo("chat", *SHORT, QUESTION, f"rollout.min_new_tokens={least}", cwd=tmp_path).stdout for least in (0, 30)]
    assert said[0] == said[1] != ""
