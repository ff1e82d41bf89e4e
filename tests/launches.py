"""Helpers that start, stop and break small real runs and compare them."""

import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from grpo.__main__ import main as grpo_main
from tests import inject

ROOT = Path(__file__).resolve().parent.parent
# Two outer iterations of four steps with two updates each: the reference changes, and old and new policy differ. Nine
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
SHORT = [*SETTINGS, "grpo.num_iterations=1", "grpo.mu=1"]
STEPS = 8
NOT_COMPARED = ("step_time", "timing_s/", "perf/")


NO_FAULT = ("none", "0", "none")

# Each launch is a separate process, but forked from one that has already imported torch, which takes five seconds.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        "grpo.commands.train",
        "grpo.training.train",
        "grpo.analysis.run_report",
        "grpo.analysis.sweep_report",
        "transformers.models.qwen2.modeling_qwen2",
        "matplotlib.backends.backend_agg",
        "scipy.stats",
    ]
)


class OptimizerWithoutNames(torch.optim.SGD):
    """An optimizer that does not accept parameters with their names."""

    def __init__(self, params, **settings):
        super().__init__([each for each in params if each.requires_grad], **settings)


class Launch:
    """A launch in a background process; its output is in two files next to its working directory."""

    def __init__(self, *arguments, cwd, fault=NO_FAULT, main=inject.main, **environment):
        self._files = [Path(tempfile.mkstemp(dir=cwd.parent, suffix=suffix)[1]) for suffix in (".out", ".err")]
        arguments = [*fault, *map(str, arguments)] if main is inject.main else [str(each) for each in arguments]
        self._process = processes.Process(target=_run, args=(main, arguments, cwd, self._files, environment))
        self._process.start()

    def send_signal(self, number):
        os.kill(self._process.pid, number)

    def kill(self):
        self._process.kill()

    def wait(self, timeout=120):
        """Wait until the launch ends, set returncode, stdout and stderr, and return self."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"the launch still ran after {timeout} s: {self._files[1].read_text()}")
        self.returncode = self._process.exitcode
        self.stdout, self.stderr = (file.read_text() for file in self._files)
        return self


def _run(main, arguments, cwd, files, environment):
    os.chdir(cwd)
    os.environ.update(environment)
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    sys.exit(main(arguments))


def launch(*arguments, cwd, timeout=120, **options):
    """Start a launch and wait until it ends."""
    return Launch(*arguments, cwd=cwd, **options).wait(timeout)


def resume(run_dir, *arguments, **options):
    """Resume a run and wait for its end."""
    return launch("resume=true", f"run_dir={run_dir}", *arguments, cwd=run_dir.parent, **options)


def grpo(*arguments, cwd):
    """Run `python -m grpo ...` and wait until it ends."""
    return Launch(*arguments, cwd=cwd, main=grpo_main).wait()


def start(run_dir, *arguments, **options):
    """Start a launch of SETTINGS in a background process."""
    return Launch(*SETTINGS, f"run_dir={run_dir}", *arguments, cwd=run_dir.parent, **options)


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
    """The SHA-256 of every file that must be equal: the last checkpoint, the final model, the samples."""
    files = [*run_dir.glob(f"checkpoints/step_{STEPS:06d}/*.safetensors"), *run_dir.glob("final_model/*.safetensors")]
    files += run_dir.glob("samples/*.jsonl")
    assert len(files) == 2 + 1 + STEPS
    return {str(file.relative_to(run_dir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def assert_same_run(run_dir, straight):
    """Assert that every metric, completion and weight is bitwise equal, and that no step is missing or repeated."""
    assert [row["step"] for row in rows(run_dir)] == list(range(1, STEPS + 1))
    assert rows(run_dir) == rows(straight)
    assert digests(run_dir) == digests(straight)
    assert status(run_dir)["state"] == "finished"
