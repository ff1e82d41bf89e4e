"""Evaluate accuracy and rewards of a model on the held-out problems, with greedy decoding.

python -m grpo evaluate run_dir=outputs/...              the run's trained model; the result goes to its eval/ too
python -m grpo evaluate run_dir=outputs/... checkpoint=C the weights of a checkpoint: best, or one of its steps
python -m grpo evaluate run_dir=outputs/... model.name=M another model on the run's problems, such as the untrained one
python -m grpo evaluate model.name=M [data=...]          any hub name or local folder; eval.max_problems=null takes all
"""

from contextlib import closing
from datetime import datetime

from rich.console import Console

from grpo.commands._common import find_model, load_model_under_test
from grpo.runs.console import closing_table


def main(arguments: list[str]) -> None:
    """Evaluate the model and print a table."""
    subject = find_model(arguments)
    experiment, engine, sampling = load_model_under_test(subject)
    from grpo.training.evaluation import evaluate  # imports torch

    with closing(engine):
        result = {"model": subject.model, **evaluate(engine, sampling, experiment, subject.step)}
    console = Console()
    console.print(f"model: {subject.model}", highlight=False, soft_wrap=True)
    console.print(closing_table({"now": result}))
    if subject.folder is not None:
        try:
            file = subject.folder.write_evaluation(f"evaluate_{datetime.now():%Y-%m-%d_%H-%M-%S}", result)
        except OSError as error:  # for example in the folder of another user
            console.print(f"each problem's outcome could not be written: {error}", highlight=False, soft_wrap=True)
            return
        console.print(f"each problem's outcome: {file}", highlight=False, soft_wrap=True)
