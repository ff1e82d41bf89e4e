"""Small real runs to be stopped, broken and compared, and how to compare them."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Two outer iterations of four steps with two updates each: the reference moves, and old and new policy differ. Nine
# problems, so that an epoch ends after steps 3 and 6.
SETTINGS = [
    "experiment=quickstart",
    "data=jsonl",
    f"data.path={ROOT / 'tests' / 'sums'}",
    "data.system_prompt=null",
    "grpo.num_iterations=2",
    "grpo.num_steps=4",
    "grpo.mu=2",
    "grpo.batch_size=3",
    "grpo.num_generations=4",
    "grpo.lr_schedule=linear",
    "grpo.warmup_steps=2",
    "checkpoint.every=2",
    "samples.every=1",
    "eval.before=false",
    "eval.after=false",
    "tracking=disabled",
]
STEPS = 8
NOT_COMPARED = ("step_time", "timing_s/", "perf/")


def command(*arguments, fault=("none", "0", "none")):
    """The command line of a launch; with a fault (place, count, what) as tests/inject.py takes it."""
    return [sys.executable, str(ROOT / "tests" / "inject.py"), *fault, *map(str, arguments)]


def launch(*arguments, cwd, fault=("none", "0", "none"), timeout=180, **environment):
    """A launch that is waited for, its output captured."""
    options = {"capture_output": True, "text": True, "timeout": timeout, "env": os.environ | environment}
    return subprocess.run(command(*arguments, fault=fault), cwd=cwd, **options)


def start(run_dir, *arguments):
    """A launch of SETTINGS that goes on by itself."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command(*SETTINGS, f"run_dir={run_dir}", *arguments), cwd=run_dir.parent, **pipes)


def status(run_dir):
    return json.loads((run_dir / "status.json").read_text())


def rows(run_dir):
    """The metrics rows without times and memory."""
    file = run_dir / "metrics" / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(NOT_COMPARED)} for line in lines]


def wait_for_step(run_dir, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        file = run_dir / "metrics" / "metrics.jsonl"
        if file.exists() and file.read_text().count("\n") >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


def digests(run_dir):
    """Of every file that must come out the same: the last checkpoint, its reference, the final model, the samples."""
    files = [*run_dir.glob(f"checkpoints/step_{STEPS:06d}/*.safetensors"), *run_dir.glob("final_model/*.safetensors")]
    files += [*run_dir.glob("checkpoints/reference_000002/*.safetensors"), *run_dir.glob("samples/*.jsonl")]
    assert len(files) == 2 + 1 + 1 + STEPS
    return {str(file.relative_to(run_dir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def assert_same_run(run_dir, straight):
    """Bitwise: every metric, completion and weight, none missing and none twice."""
    assert [row["step"] for row in rows(run_dir)] == list(range(1, STEPS + 1))
    assert rows(run_dir) == rows(straight)
    assert digests(run_dir) == digests(straight)
    assert status(run_dir)["state"] == "finished"
