"""Chat with a model, whose prompts have the form of the training problems.

python -m grpo chat run_dir=outputs/...                  the run's trained model
python -m grpo chat run_dir=outputs/... checkpoint=C     the weights of a checkpoint: best, or one of its steps
python -m grpo chat model.name=M [data=...]              any hub name or local folder

prompt="What is 27 + 35?" answers this question and exits. history=true keeps the earlier turns of the conversation.
compare=true answers with the untrained model, too. rollout.temperature=0.7 samples; the default is greedy decoding. In
a pipe, each line of the input is a question, and only the answers are written to the output.
"""

import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo.commands._common import LoadedModel, ModelUnderTest, find_model, load_model_under_test, own_arguments
from grpo.config.errors import ConfigError
from grpo.config.overrides import Overrides

if TYPE_CHECKING:  # they import torch
    from grpo.data.prompts import Messages

START_OVER = "/new"


def main(arguments: list[str]) -> None:
    """Answer one prompt, or each line of the input until an empty line or the end of the input."""
    own, overrides = own_arguments(arguments, ["prompt", "history", "compare"])
    keeps_history = _is_true(own, "history")
    subject = find_model(overrides)
    subjects = [_untrained(subject), subject] if _is_true(own, "compare") else [subject]
    greedy = not Overrides(overrides).names("rollout.temperature")
    with ExitStack() as stack:
        models = [_load(each, greedy) for each in subjects]
        for each in models:
            stack.enter_context(closing(each.engine))
        if "prompt" in own:
            _answer(subjects, models, own["prompt"], [[] for _ in models], turn=1)
            return
        _say_hello(subject, keeps_history)
        histories: list[Messages] = [[] for _ in models]
        turn = 0
        while (line := _read_line()) is not None:
            if line == START_OVER:
                histories = [[] for _ in models]
                continue
            turn += 1
            answers = _answer(subjects, models, line, histories, turn)
            if keeps_history:
                for history, answer in zip(histories, answers, strict=True):
                    history += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


def _is_true(own: dict[str, str], name: str) -> bool:
    value = own.get(name, "false").lower()
    if value not in ("true", "false"):
        raise ConfigError(f"{name}={own[name]}: must be true or false")
    return value == "true"


def _untrained(subject: ModelUnderTest) -> ModelUnderTest:
    """The untrained model of the subject's run."""
    if subject.folder is None:
        raise ConfigError("compare=true shows a run's model beside the untrained one: give run_dir=...")
    frozen = subject.folder.frozen_config().model
    lora = subject.config.model.lora
    if lora is not None:  # an adapter that training started from is part of the untrained model
        started_from = frozen.lora.init_from if frozen.get("lora") else None
        lora = replace(lora, init_from=started_from) if started_from else None
    model = replace(subject.config.model, name=frozen.name, lora=lora)
    changed = tuple(key for key in subject.changed if key != "model.name")
    return replace(subject, config=replace(subject.config, model=model), weights=None, step=0, changed=changed)


def _load(subject: ModelUnderTest, greedy: bool) -> LoadedModel:
    loaded = load_model_under_test(subject, with_problems=False)
    sampling = replace(loaded.sampling, min_new_tokens=0)
    return loaded._replace(sampling=replace(sampling, temperature=0.0) if greedy else sampling)


def _say_hello(subject: ModelUnderTest, keeps_history: bool) -> None:
    new = f"{START_OVER} starts a new conversation" if keeps_history else "each line is a new problem"
    leave = "; an empty line exits" if sys.stdin.isatty() else ""
    Console(stderr=not sys.stdin.isatty(), markup=False).print(f"{subject.model}: {new}{leave}", highlight=False)


def _answer(
    subjects: list[ModelUnderTest], models: list[LoadedModel], question: str, histories: "list[Messages]", turn: int
) -> list[str]:
    """Print the answers of the models: of one while it is generated, of two side by side."""
    if len(models) == 1:
        return [answer(models[0], question, turn, histories[0], on_text=_write)]
    answers = [answer(each, question, turn, history) for each, history in zip(models, histories, strict=True)]
    table = Table(show_lines=True)
    for each in subjects:
        table.add_column(Text(f"{each.model} ({each.step} steps)"))
    table.add_row(*map(Text, answers))  # as it is, without rich's markup
    Console().print(table)
    return answers


def _write(text: str) -> None:
    print(text, end="", flush=True)


def answer(
    model: LoadedModel,
    question: str,
    turn: int,
    history: "Messages | None" = None,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The model's completion of a question, which is formatted like a training problem.

    turn: its number, on which the noise of sampling depends. history: earlier turns, user and assistant in turn.
    on_text: called with each part of the text as it is generated, at the end with a line break.
    """
    import numpy as np

    from grpo.counter_rng import group_keys
    from grpo.data.prompts import messages
    from grpo.rollout.engine import sample_completions

    experiment = model.experiment
    *before, last = messages(question, experiment.config.data)
    prompts = experiment.prompts([[*before, *(history or []), last]])
    keys = group_keys(experiment.config.seed, turn, np.arange(1), group_size=1)
    shown = TextStream(lambda ids: experiment.decode([ids], model.sampling.stop_ids)[0], on_text or (lambda text: None))
    streams = on_text is not None and "on_tokens" in inspect.signature(model.engine.generate).parameters
    extra = {"on_tokens": lambda rows, tokens: shown.add(tokens.tolist())} if streams else {}
    completions = sample_completions(model.engine, prompts, model.sampling, group_size=1, keys=keys, **extra)
    (text,) = experiment.texts(completions, model.sampling.stop_ids)
    shown.end(text)
    return text


class TextStream:
    """Passes on the text of tokens as they arrive."""

    def __init__(self, decode: Callable[[list[int]], str], on_text: Callable[[str], None]) -> None:
        self._decode = decode
        self._on_text = on_text
        self._ids: list[int] = []
        self._shown = ""

    def add(self, ids: list[int]) -> None:
        """Add tokens. A character whose bytes are not complete yet is held back."""
        self._ids += ids
        text = self._decode(self._ids)
        if not text.endswith("\ufffd"):
            self._pass_on(text)

    def end(self, text: str) -> None:
        """Pass on what is left of the whole text, and a line break."""
        self._pass_on(text)
        self._on_text("\n")

    def _pass_on(self, text: str) -> None:
        self._on_text(text[len(self._shown) :])
        self._shown = text


def _read_line() -> str | None:
    """The next line that is not empty. None at the end of the input, and on a terminal after an empty line."""
    line = ""
    while not line:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return None
        if sys.stdin.isatty():
            return line or None
    return line
