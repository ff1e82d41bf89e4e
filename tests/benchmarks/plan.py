"""Compare plan=true with measured runs: peak memory and seconds per step, for three shapes.

python tests/benchmarks/plan.py [OVERRIDE ...]

The overrides choose model and data; default: the embedded ones. Each run is a launch of two steps in which no
completion ends early, as the plan assumes; its first step is not timed.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPES = [
    ["grpo.batch_size=2", "grpo.num_generations=4", "grpo.max_completion_length=64"],
    [
        "grpo.batch_size=2",
        "grpo.num_generations=8",
        "grpo.max_completion_length=128",
        "hardware.compute_dtype=bfloat16",
    ],
    [
        "grpo.batch_size=2",
        "grpo.num_generations=16",
        "grpo.max_completion_length=64",
        "grpo.beta=0",
        "hardware.micro_batch_tokens=2048",
    ],
]
PLANNED = """
import json, sys
from grpo.config.compose import compose_config
from grpo.planning.plan import plan, resolved
counted = plan(resolved(compose_config(sys.argv[1:])))
print(json.dumps([counted.peak / 1e9, counted.seconds]))
"""


def main() -> None:
    given = sys.argv[1:] or ["experiment=quickstart"]
    print(f"{'planned GB':>10} {'measured':>9} {'ratio':>6} {'planned s':>10} {'measured':>9}")
    for shape in SHAPES:
        settings = [*given, "hardware=cpu", "grpo.num_steps=2", *shape]
        done = subprocess.run([sys.executable, "-c", PLANNED, *settings], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        memory, seconds = json.loads(done.stdout.splitlines()[-1])
        longest = shape[2].split("=")[1]
        settings += [f"rollout.min_new_tokens={longest}", "tracking=disabled", "eval.before=false", "eval.after=false"]
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                str(ROOT / "launch.py"),
                *settings,
                "checkpoint.every=0",
                f"run_dir={folder}/run",
            ]
            subprocess.run(command, stdout=sys.stderr, check=True)
            row = json.loads(Path(folder, "run/metrics/metrics.jsonl").read_text().splitlines()[-1])
        peak, step = row["perf/peak_memory_gb"], row["step_time"]
        print(f"{memory:>10.2f} {peak:>9.2f} {memory / peak:>6.2f} {seconds:>10.2f} {step:>9.2f}  {' '.join(shape)}")


if __name__ == "__main__":
    main()
