"""Compare the time of a training step with settings of OpenMP, alone and beside other programs.

python tests/benchmarks/threads.py [--rounds 2] [OVERRIDE ...]

The overrides choose the experiment; default: 12 steps of the quickstart. The settings are run in turn, in each round,
first alone and then beside one process that keeps a core busy. Printed are the medians of all steps but the first two.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from grpo.launch.process import SPIN_COUNT

ROOT = Path(__file__).resolve().parent.parent.parent
QUICKSTART = ["experiment=quickstart", "grpo.num_steps=12"]
SHORT = ["eval.before=false", "eval.after=false", "preflight=false", "tracking=disabled"]
CORES = len(os.sched_getaffinity(0))
SPINS = ("300000", "30000", "10000", SPIN_COUNT, "200")  # the first is the default of GNU's OpenMP
SETTINGS: dict[str, tuple[int, dict[str, str]]] = {"1 thread": (1, {})}
SETTINGS |= {f"all, spin {spin}": (CORES, {"GOMP_SPINCOUNT": spin}) for spin in SPINS}
SETTINGS["all, passive"] = (CORES, {"OMP_WAIT_POLICY": "PASSIVE"})


def step_times(overrides: Sequence[str], threads: int, variables: Mapping[str, str]) -> list[float]:
    """The seconds of each step of one run, without the first two."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "launch.py", *SHORT, *overrides]
        command += [f"hardware.threads={threads}", f"run_dir={folder}/run"]
        subprocess.run(command, env=os.environ | variables, check=True, stdout=subprocess.DEVNULL)
        rows = Path(folder, "run", "metrics", "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["step_time"] for row in rows[2:]]


def main() -> None:
    """Run all settings and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("overrides", nargs="*", default=QUICKSTART)
    arguments = parser.parse_args()
    seconds: dict[tuple[str, str], list[float]] = {}
    for place in ("alone", "beside one"):
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if place != "alone" else None
        try:
            for _ in range(arguments.rounds):
                for name, (threads, variables) in SETTINGS.items():
                    seconds.setdefault((place, name), []).extend(step_times(arguments.overrides, threads, variables))
        finally:
            if other is not None:
                other.kill()
                other.wait()
    print(f"{CORES} cores, seconds per step, median (and largest)")
    print(f"{'':<24}{'alone':>16}{'beside one':>16}")
    for name in SETTINGS:
        columns = [seconds[place, name] for place in ("alone", "beside one")]
        print(f"{name:<24}" + "".join(f"{statistics.median(each):>8.3f} ({max(each):.2f})" for each in columns))


if __name__ == "__main__":
    main()
