"""Check whether this checkout and another one compute the same bytes.

    python tests/benchmarks/same_bytes.py OTHER_CHECKOUT [--smollm2 DIR --gsm8k DIR] [--keep DIR]

Runs the same commands with both, using the Python interpreter of this script, and compares the SHA-256 of every file
of weights, optimizer state or samples, and every metrics row except for times and memory. --keep: a folder that keeps
the other checkout's runs, so that a second call does not repeat them. Exits with 1 if anything differs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from grpo.config.migrations import metrics_row

ROOT = Path(__file__).resolve().parents[2]
NOT_COMPARED = ("step_time", "timing_s/", "perf/")
# Not in rows of earlier checkouts; in versions 0 and 1 another number had the first name.
NEW = ("reward_std", "weights_changed")
EVERYWHERE = ["seed=1", "tracking=disabled"]


def cases(smollm2: str | None, gsm8k: str | None) -> dict[str, list[str]]:
    """The arguments of each case by its name; the cases of SmolLM2 only if its folder is given."""
    quickstart = ["experiment=quickstart"]
    found = {
        "quickstart": quickstart,
        "lora": [*quickstart, "tuning=lora", "optimizer.lr=2e-3", "grpo.num_steps=6", "checkpoint.every=3"],
        "two iterations": [
            *quickstart, "grpo.num_iterations=2", "grpo.num_steps=3", "grpo.mu=2", "grpo.batch_size=4",
            "grpo.lr_schedule=cosine", "grpo.warmup_steps=2", "eval.every=3", "eval.max_problems=40",
        ],
    }  # fmt: skip
    if smollm2 is not None:
        common = [
            "experiment=smollm2_gsm8k", f"model.name={smollm2}", f"data.path={gsm8k}", "grpo.num_steps=3",
            "grpo.beta=0.04", "grpo.num_generations=4", "grpo.max_completion_length=64", "hardware.threads=2",
            "eval.before=false", "eval.after=false", "preflight=false", "samples.every=1",
        ]  # fmt: skip
        found |= {f"smollm2 mu={mu}": [*common, f"grpo.mu={mu}"] for mu in (1, 2)}
    return found


def run(checkout: Path, arguments: list[str], folder: Path) -> None:
    """Launch a run of a checkout in `folder`. Raises RuntimeError with its output if it fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(checkout / "launch.py"), *arguments, *EVERYWHERE, f"run_dir={folder}"]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{checkout} failed: {done.stdout}{done.stderr}")


def contents(folder: Path) -> dict[str, str]:
    """The contents that must be equal, by name: a digest of each file of tensors or samples, and each metrics row."""
    files = [*folder.glob("checkpoints/*/*.safetensors"), *folder.glob("final_model/*.safetensors")]
    files += folder.glob("samples/*.jsonl")
    found = {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    for line in (folder / "metrics" / "metrics.jsonl").read_text().splitlines():
        row = metrics_row(json.loads(line))  # with the names of this version
        kept = {key: value for key, value in row.items() if not key.startswith((*NOT_COMPARED, *NEW))}
        found[f"metrics row {row['step']}"] = json.dumps(kept, sort_keys=True)
    return found


def main() -> int:
    """Compare the chosen cases, print a line for each, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--smollm2")
    parser.add_argument("--gsm8k")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--only", help="the names of the cases to run, separated by commas")
    given = parser.parse_args()
    every = cases(given.smollm2, given.gsm8k)
    chosen = list(every) if given.only is None else given.only.split(",")
    if unknown := [name for name in chosen if name not in every]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(every)} (smollm2 with --smollm2)")
    differing = 0
    with tempfile.TemporaryDirectory() as temporary:
        for name in chosen:
            arguments = every[name]
            place = name.replace(" ", "_").replace("=", "_")
            before = (given.keep or Path(temporary, "other")).resolve() / place
            if not (before / "final_model").exists():
                run(given.other.resolve(), arguments, before)
            now = Path(temporary, "here", place)
            run(ROOT, arguments, now)
            one = contents(before)
            other = contents(now)
            # Later versions sample more steps.
            compared = {key for key in one.keys() | other.keys() if key in one or not key.startswith("samples/")}
            different = sorted(key for key in compared if one.get(key) != other.get(key))
            differing += bool(different)
            verdict = f"DIFFERENT: {', '.join(different[:5])}" if different else "equal"
            rows = sum(key.startswith("metrics") for key in one)
            print(
                f"{name}: {verdict} ({rows} metrics rows, {len(one) - rows} files of tensors and samples)", flush=True
            )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
