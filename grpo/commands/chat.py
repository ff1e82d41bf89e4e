"""Chat with a model: each question is answered like a training problem.

python -m grpo chat run_dir=outputs/...                  the run's trained model
python -m grpo chat run_dir=outputs/... checkpoint=C     the weights of a checkpoint: best, or one of its steps
python -m grpo chat model.name=M [data=...]              any hub name or local folder
prompt="What is 27 + 35?" answers this question and exits; rollout.temperature=0.7 samples, the default is greedy
"""

import sys
from contextlib import closing
from dataclasses import replace
from typing import Any

from rich.console import Console

from grpo.commands._common import find_model, load_model_under_test, own_arguments
from grpo.config.overrides import Overrides


def main(arguments: list[str]) -> None:
    """Answer one prompt, or each line of the input until an empty line or the end of the input."""
    own, overrides = own_arguments(arguments, ["prompt"])
    subject = find_model(overrides)
    experiment, engine, sampling = load_model_under_test(subject, with_problems=False)
    sampling = replace(sampling, min_new_tokens=0)
    if not Overrides(overrides).names("rollout.temperature"):
        sampling = replace(sampling, temperature=0.0)
    with closing(engine):
        if "prompt" in own:
            print(answer(experiment, engine, sampling, own["prompt"], turn=1))
            return
        Console().print(f"{subject.model}: each line is a new problem; an empty line exits", highlight=False)
        turn = 0
        while line := _read_line():
            turn += 1
            print(answer(experiment, engine, sampling, line, turn))


def answer(experiment: Any, engine: Any, sampling: Any, question: str, turn: int) -> str:
    """The model's completion of one question, which is formatted like a training problem."""
    import numpy as np

    from grpo.counter_rng import group_keys
    from grpo.data.prompts import messages
    from grpo.rollout.engine import sample_completions

    prompts = experiment.prompts([messages(question, experiment.config.data)])
    keys = group_keys(experiment.config.seed, turn, np.arange(1), group_size=1)
    completions = sample_completions(engine, prompts, sampling, group_size=1, keys=keys)
    return experiment.texts(completions, sampling.stop_ids)[0]


def _read_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
