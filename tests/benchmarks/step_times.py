"""Compare the time of a step of several settings.

python tests/benchmarks/step_times.py [--rounds 3] [--steps 20] ARM ARM ...

An arm is a text with overrides, such as "experiment=quickstart grpo.train_on=4". With @DIR as its first word it uses
the launch.py of another checkout. The arms run in turns, each time in a new process, without the first two steps.
Printed are medians in seconds, and the time of a step as a share of that of the first arm in the same round.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PARTS = ("step_time", "timing_s/rollout", "timing_s/reward", "timing_s/reference", "timing_s/update")
OFF = ["eval.before=false", "eval.after=false", "preflight=false", "checkpoint.every=0", "tracking=disabled"]


def medians(arm: str, steps: int) -> dict[str, float]:
    words = shlex.split(arm)
    code = Path(words.pop(0)[1:]).resolve() if words[0].startswith("@") else ROOT
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(code / "launch.py"), *words, *OFF, f"grpo.num_steps={steps}"]
        environment = os.environ | {"PYTHONPATH": str(code)}
        subprocess.run([*command, f"run_dir={folder}/run"], check=True, stdout=subprocess.DEVNULL, env=environment)
        lines = Path(folder, "run", "metrics", "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][2:]
    return {part: statistics.median(row[part] for row in rows) for part in PARTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("arms", nargs="+")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in args.arms}
    for _ in range(args.rounds):
        for arm, results in found.items():
            results.append(medians(arm, args.steps))
    first = found[args.arms[0]]
    for arm, results in found.items():
        parts = {part: statistics.median(each[part] for each in results) for part in PARTS}
        shares = [one["step_time"] / base["step_time"] for one, base in zip(results, first, strict=True)]
        text = ", ".join(f"{part.rpartition('/')[2]} {seconds:.3f}" for part, seconds in parts.items())
        print(f"{arm}\n    {text}; a share of {statistics.median(shares):.2f}", flush=True)


if __name__ == "__main__":
    main()
