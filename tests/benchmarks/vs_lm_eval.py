"""Score a model with EleutherAI's lm-eval, by its own task gsm8k, and with this suite, item by item.

python -m tests.benchmarks.vs_lm_eval MODEL DATA [--problems 100] [--shots 3] [--tokens 256]

MODEL is a folder or hub name, DATA a folder with train.jsonl and test.jsonl in the form of GSM8K. Both programs get the
same prompt strings (the first training problems, solved, as earlier turns), decode greedily and read the last number:
lm-eval by flexible-extract, this suite by `lenient`. It prints both accuracies, how often prompts, texts and grades
agree, and every problem with another text or another grade, with the grade that each judge gives to each text.
Needs the extra `judges`.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from lm_eval.models.huggingface import HFLM

from grpo.commands._common import find_model, load_model_under_test
from grpo.data.problems import Problem
from grpo.data.prompts import messages, render
from grpo.rewards.lenient import lenient
from grpo.training.evaluation import evaluate
from tests.rewards.judges import by_lm_eval as extractor

MOST_SHOWN = 20


@dataclass(frozen=True)
class Answer:
    prompt: str
    text: str
    grade: bool  # by the judge of the program that generated the text


def problems_of(folder: Path, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def question_of(problem: dict[str, str]) -> str:
    """The question as lm-eval's task asks it."""
    return f"Question: {problem['question']}\nAnswer:"


def answers_of_lm_eval(arguments: argparse.Namespace) -> tuple[list[Answer], dict[str, float], list[str]]:
    """The answers by lm-eval, its accuracies by extractor, and the texts at which it ends an answer."""
    task: dict[str, Any] = yaml.safe_load((files("lm_eval") / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    splits = {split: str(arguments.data / f"{split}.jsonl") for split in ("train", "test")}
    task |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": splits}}
    task |= {"num_fewshot": arguments.shots, "fewshot_config": {"sampler": "first_n"}}
    task["generation_kwargs"]["max_gen_toks"] = arguments.tokens
    model = HFLM(pretrained=arguments.model, dtype="float32", batch_size=arguments.batch, device="cpu")
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[task],
        limit=arguments.problems,
        apply_chat_template=model.tokenizer.chat_template is not None,
        fewshot_as_multiturn=True,
        bootstrap_iters=0,
    )
    samples = [each for each in found["samples"]["gsm8k"] if each["filter"] == "flexible-extract"]
    samples.sort(key=lambda each: each["doc_id"])
    answers = [Answer(each["arguments"][0][0], each["resps"][0][0], bool(each["exact_match"])) for each in samples]
    scores = {key: value for key, value in found["results"]["gsm8k"].items() if key.startswith("exact_match,")}
    return answers, scores, task["generation_kwargs"]["until"]


def answers_of_grpo(arguments: argparse.Namespace, until: list[str]) -> tuple[list[Answer], dict[str, float]]:
    """The answers by this suite, and its accuracies by grader."""
    shots = problems_of(arguments.data, "train")[: arguments.shots]
    examples = [{"question": question_of(shot), "completion": shot["answer"]} for shot in shots]
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "test"):
            rows = [{**each, "question": question_of(each)} for each in problems_of(arguments.data, split)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (Path(folder) / f"{split}.jsonl").write_text(text, encoding="utf-8")
        subject = find_model(
            [
                f"model.name={arguments.model}",
                "data=jsonl",
                f"data.path={folder}",
                "data.system_prompt=null",
                "data.max_prompt_length=4096",
                "hardware=cpu",
                "tuning=full",
                "hardware.compute_dtype=float32",
                f"eval.max_problems={arguments.problems}",
                f"eval.max_completion_length={arguments.tokens}",
                *arguments.overrides,
            ]
        )
        config = replace(subject.config, data={**subject.config.data, "examples": examples})
        experiment, engine, sampling, _ = load_model_under_test(replace(subject, config=config))
        result = evaluate(engine, sampling, experiment, 0)
        engine.close()
    answers = []
    for row, problem in zip(result["problems"], experiment.problems.test, strict=False):
        text = row["completion"]
        for end in until:
            text = text.partition(end)[0]
        answers.append(Answer(prompt_of(experiment, problem), text, ours(text, problem.answer)))
    return answers, {name: graded["accuracy"] for name, graded in result["graded"].items()}


def prompt_of(experiment: Any, problem: Problem) -> str:
    data = experiment.config.data
    return render(experiment.tokenizer, messages(problem.question, data), data["template_arguments"])


def ours(text: str, reference: str) -> bool:
    return lenient([], [text], [reference]) == [1.0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--shots", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16, help="of lm-eval")
    parser.add_argument("overrides", nargs="*", help="of this suite's config")
    arguments = parser.parse_args()
    theirs, their_scores, until = answers_of_lm_eval(arguments)
    own, own_scores = answers_of_grpo(arguments, until)
    flexible = extractor("flexible-extract")
    problems = problems_of(arguments.data, "test")[: arguments.problems]
    references = [each["answer"].rpartition("####")[2].strip().replace(",", "") for each in problems]
    print("lm-eval:", ", ".join(f"{name.partition(',')[2]} {value:.1%}" for name, value in their_scores.items()))
    print("grpo:   ", ", ".join(f"{name} {value:.1%}" for name, value in own_scores.items()))
    n = len(own)
    pairs = list(zip(theirs, own, references, strict=True))
    print(f"of {n} problems: {sum(a.prompt == b.prompt for a, b, _ in pairs)} with the same prompt,", end=" ")
    print(f"{sum(a.text == b.text for a, b, _ in pairs)} with the same text,", end=" ")
    print(f"{sum(a.grade == b.grade for a, b, _ in pairs)} with the same grade")
    different = [(i, a, b, ref) for i, (a, b, ref) in enumerate(pairs, 1) if a.text != b.text or a.grade != b.grade]
    for number, a, b, reference in different[:MOST_SHOWN]:
        print(f"\nproblem {number}, reference {reference}")
        for name, each in (("lm-eval", a), ("grpo", b)):
            grades = f"flexible-extract {flexible(each.text, reference)}, lenient {ours(each.text, reference)}"
            print(f"  text of {name}: {grades}\n    {each.text!r}")
    if len(different) > MOST_SHOWN:
        print(f"\nand {len(different) - MOST_SHOWN} more")


if __name__ == "__main__":
    main()
