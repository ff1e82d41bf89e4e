"""Does training help real weights? Tasks that SmolLM2-135M-Instruct can begin to solve, as data sets.

python tests/benchmarks/real_result.py FOLDER

writes FOLDER/<task>/{train,test}.jsonl: chain_sum, gcd and lcm of reasoning-gym (pip install reasoning-gym). No pair of
numbers is in both splits. The plan and the commands of the runs are in tests/benchmarks/NOTES.md, "A real result".
"""

import argparse
import json
import re
from pathlib import Path

SETTINGS = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 90},
    "lcm": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 40},
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for task in SETTINGS:
        train, test = of_reasoning_gym(task)
        folder = arguments.folder / task
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in (("train", train), ("test", test)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder}: {len(train)} problems to train on, {len(test)} to test")


if __name__ == "__main__":
    main()
