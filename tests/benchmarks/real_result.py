"""Does training help real weights? Tasks that SmolLM2-135M-Instruct can begin to solve, and the table of the results.

python tests/benchmarks/real_result.py data FOLDER

writes FOLDER/<task>/{train,test}.jsonl: chain_sum and gcd of reasoning-gym (pip install reasoning-gym). No pair of
numbers is in both splits.

python tests/benchmarks/real_result.py report RUN_FOLDER ... [--curve FILE.png]

prints a table of the runs: lenient and tagged accuracy on the test problems before and after training, and the mean
differences. The plan is in tests/benchmarks/NOTES.md ("A real result"), the commands of the runs in docs/measured.md.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from grpo.analysis.effects import paired_difference
from grpo.analysis.load import correct_by_problem, load_metrics
from grpo.analysis.summary import accuracy_difference, difference_text
from grpo.analysis.theme import PALETTE, legend, new_figure, style
from grpo.rewards.lenient import final_answer
from grpo.runs.folder import RunFolder

SETTINGS = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 90},
}
TRAIN = 2000
TEST = 300


def of_reasoning_gym(task: str) -> tuple[list[dict], list[dict]]:
    """At most 2,000 training and 300 test problems of a task; the same numbers in another order are one problem."""
    import reasoning_gym

    data = reasoning_gym.create_dataset(task, size=4 * (TRAIN + TEST), seed=1, **SETTINGS[task])
    rows = {}
    for entry in data:
        numbers = tuple(sorted(re.findall(r"\d+", entry["question"])))
        rows[numbers] = {"question": entry["question"], "answer": entry["answer"]}
    found = list(rows.values())[: TRAIN + TEST]
    return found[TEST:], found[:TEST]


def write_data(folder: Path) -> None:
    for task in SETTINGS:
        train, test = of_reasoning_gym(task)
        of_task = folder / task
        of_task.mkdir(parents=True, exist_ok=True)
        for split, rows in (("train", train), ("test", test)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (of_task / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{of_task}: {len(train)} problems to train on, {len(test)} to test")


def by(grader: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    """An evaluation whose problems are right where a grader says so."""
    problems = [{**row, "correct": bool(row["graded"][grader])} for row in evaluation["problems"]]
    return {**evaluation, "problems": problems}


def report(folders: list[Path]) -> None:
    differences = {"lenient": [], "tagged": []}
    print(
        "| run | step | lenient before | after | difference | tagged before | after | well formed | commonest answer |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for folder in folders:
        run = RunFolder(folder)
        before, after = run.evaluation("before"), run.evaluation("after")
        if before is None or after is None:
            raise SystemExit(f"{folder} is not evaluated before and after training")
        difference = accuracy_difference(by("lenient", before), by("lenient", after))
        assert difference is not None  # the problems are the same
        for name, each in differences.items():
            each.append(correct_by_problem(by(name, after)) - correct_by_problem(by(name, before)))
        shares = [
            f"{each['graded'][name]['accuracy']:.1%}" for name in ("lenient", "tagged") for each in (before, after)
        ]
        formed = " to ".join(f"{each['graded']['well_formed']['accuracy']:.0%}" for each in (before, after))
        answers = Counter(str(final_answer(row["completion"])) for row in after["problems"])
        answer, count = answers.most_common(1)[0]
        cells = [str(folder), str(after["step"]), *shares[:2], difference_text(difference), *shares[2:], formed]
        print(f"| {' | '.join(cells)} | {answer}: {count / after['n']:.0%} |")
    print()
    for name, each in differences.items():
        table = pd.DataFrame(each)  # a row for each run, a column for each problem
        estimate = paired_difference(table)
        assert estimate.interval is not None
        low, high = (f"{100 * bound:+.1f}" for bound in estimate.interval)
        gains = table.mean(axis=1)
        spread = f"; standard deviation over runs {100 * gains.std():.1f}" if len(gains) > 1 else ""
        print(
            f"mean difference in {name} accuracy {100 * estimate.mean:+.1f} points, 95 % interval over problems and "
            f"seeds {low} to {high}{spread}"
        )


def report_training(folders: list[Path]) -> None:
    """Of each run the format reward of the first ten steps, groups with equal rewards, entropy, and seconds."""
    print(
        "\n| run | format reward, steps 1 to 10 | groups with equal rewards | entropy, first and last ten | seconds |"
    )
    print("|---|---|---|---|---|")
    for folder in folders:
        metrics = load_metrics(folder)
        first, last = metrics.head(10), metrics.tail(10)
        entropy = f"{first['entropy'].mean():.3f}, {last['entropy'].mean():.3f}"
        formed = f"{first['rewards/format/mean'].mean():.2f}"
        equal = f"{metrics['frac_reward_zero_std'].mean():.0%}"
        seconds = f"{RunFolder(folder).status()['seconds']:.0f}"
        print(f"| {' | '.join([str(folder), formed, equal, entropy, seconds])} |")


def draw(folders: list[Path], file: Path) -> None:
    """The share of right completions in training and the accuracy on the validation problems, by step."""
    figure = new_figure(width=10, height=4)
    sampled, validation = figure.subplots(1, 2, sharey=True)
    style(sampled, "Right completions in training, mean of ten steps", percent=True)
    style(validation, "Validation problems, greedy: lenient (solid), tagged (dotted)", percent=True)
    for folder, colour in zip(folders, PALETTE, strict=False):
        correct = load_metrics(folder)["rewards/correctness/mean"] / 2  # the reward of a right answer is 2
        means = correct.groupby(correct.index // 10).mean()
        sampled.plot([10 * place + 5.5 for place in means.index], means, color=colour, label=folder.name)
        found = [each for each in RunFolder(folder).choosing_evaluations() if each["split"] == "validation"]
        for grader, line in (("lenient", "-"), ("tagged", ":")):
            shares = [each["graded"][grader]["accuracy"] for each in found]
            validation.plot([each["step"] for each in found], shares, line, color=colour, marker="o", markersize=4)
    sampled.set_ylim(0, 0.5)
    legend(sampled, title="seed", beside=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("data").add_argument("folder", type=Path)
    reported = actions.add_parser("report")
    reported.add_argument("runs", type=Path, nargs="+")
    reported.add_argument("--curve", type=Path, help="a picture of the runs' curves")
    arguments = parser.parse_args()
    if arguments.action == "data":
        write_data(arguments.folder)
    else:
        report(arguments.runs)
        report_training(arguments.runs)
        if arguments.curve is not None:
            draw(arguments.runs, arguments.curve)


if __name__ == "__main__":
    main()
