"""Does training help real weights? Three tasks that SmolLM2-135M-Instruct can begin to solve, as data sets.

python tests/benchmarks/real_result.py FOLDER [--gsm8k DIR]

writes FOLDER/<task>/{train,test}.jsonl: chain_sum and gcd of reasoning-gym (pip install reasoning-gym), and with
--gsm8k the problems of GSM8K whose solution has one or two calculations. No test question is a training question. The
plan and the commands of the runs are in tests/benchmarks/NOTES.md, "A real result".
"""

import argparse
import json
import re
from pathlib import Path

SETTINGS = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 90},
}
TRAIN = 2000
TEST = 400


def of_reasoning_gym(task: str) -> tuple[list[dict], list[dict]]:
    """Training and test problems of a task, which have no question in common."""
    import reasoning_gym

    data = reasoning_gym.create_dataset(task, size=4 * (TRAIN + TEST), seed=1, **SETTINGS[task])
    rows = {}
    for entry in data:  # the same numbers in another order are the same problem
        numbers = tuple(sorted(re.findall(r"\d+", entry["question"]))) if task == "gcd" else entry["question"]
        rows[numbers] = {"question": entry["question"], "answer": entry["answer"]}
    found = list(rows.values())[: TRAIN + TEST]
    return found[TEST:], found[:TEST]


def of_gsm8k(folder: Path) -> tuple[list[dict], list[dict]]:
    """The problems with one or two calculations, which the solutions mark with <<...>>."""
    splits = []
    for split in ("train", "test"):
        lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) | {"id": f"{split}-{number}"} for number, line in enumerate(lines, start=1)]
        splits.append([row for row in rows if 1 <= row["answer"].count("<<") <= 2])
    return splits[0], splits[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gsm8k", type=Path)
    arguments = parser.parse_args()
    tasks = {task: of_reasoning_gym(task) for task in SETTINGS}
    if arguments.gsm8k:
        tasks["gsm8k_short"] = of_gsm8k(arguments.gsm8k)
    for task, (train, test) in tasks.items():
        folder = arguments.folder / task
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in (("train", train), ("test", test)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder}: {len(train)} problems to train on, {len(test)} to test")


if __name__ == "__main__":
    main()
