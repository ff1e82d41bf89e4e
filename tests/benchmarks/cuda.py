"""Everything that is to be measured on a card, in phases that fit into a short lease; each prints its results at once.

python tests/benchmarks/cuda.py [--budget 780] [--out DIR] [--phases NAME,NAME] [--data DIR]

A phase is started only if its limit fits into what is left of the budget, in seconds. The phases, in this order:

  environment  the card, the driver and the versions
  tests        pytest -m gpu
  exact        a deterministic run that is killed and resumed, against one that is not
  preset       three steps of the preset for the card, with random weights of the size of Qwen2.5-1.5B, beside its plan
  decode       sampling at the preset's shape, beside generate()
  head         the output head, forward and backward, by the size of its chunks
  trl          a step beside TRL's trainer

--data: a folder with GSM8K's train.jsonl and test.jsonl; without it the generated sums are used. With --dry-run the
phases run on a CPU at tiny sizes, to test this script.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = ROOT / "tests" / "benchmarks"
RANDOM = "model=qwen2_5_1_5b_random"
UNTRACKED = ["tracking=disabled", "eval.before=false", "eval.after=false"]
KILL_AFTER = 3  # steps of the exact phase


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=780)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "cuda_results")))
    parser.add_argument("--phases", help="separated by commas; default: all")
    parser.add_argument("--data")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--head", action="store_true", help=argparse.SUPPRESS)  # the head phase in a process of its own
    return parser.parse_args()


class Phase:
    """Runs the commands of a phase, which must end by its deadline; their output is printed and kept in a file."""

    def __init__(self, name: str, limit: float, out: Path) -> None:
        self._ends = time.monotonic() + limit
        self._file = (out / f"{name}.txt").open("w")

    def left(self) -> float:
        """Seconds until the deadline. Raises TimeoutError after it."""
        left = self._ends - time.monotonic()
        if left <= 0:
            raise TimeoutError("the phase has reached its limit")
        return left

    def say(self, text: str) -> None:
        """Print a text and write it to the file."""
        print(text, flush=True)
        self._file.write(f"{text}\n")
        self._file.flush()

    def start(self, *command: object, **how: Any) -> subprocess.Popen[str]:
        """Start a command in a process group of its own."""
        return subprocess.Popen(
            [*map(str, command)], cwd=ROOT, env=environment(), text=True, start_new_session=True, **how
        )

    def run(self, *command: object, quiet: bool = False) -> None:
        """Run a command. Raises RuntimeError if it fails, and TimeoutError at the deadline, at which it is killed."""
        with tempfile.TemporaryFile("w+") as errors:
            process = self.start(*command, stdout=subprocess.PIPE, stderr=errors)
            timer = threading.Timer(self.left(), kill, [process])
            timer.start()
            try:
                for line in process.stdout or ():
                    if not quiet:
                        self.say(line.rstrip())
                code = process.wait()
            finally:
                timer.cancel()
                kill(process)  # what it has left running
            self.left()
            if code != 0:
                errors.seek(0)
                raise RuntimeError(f"exit code {code}: {errors.read()[-2000:]}")

    def python(self, *command: object, quiet: bool = False) -> None:
        """Run Python with these arguments, as `run` does."""
        self.run(sys.executable, *command, quiet=quiet)


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def settings(args: argparse.Namespace) -> list[str]:
    """Model, data and preset of the phases that measure speed."""
    if args.dry_run:
        return ["experiment=quickstart", "grpo.batch_size=2", "grpo.num_generations=4", "grpo.max_completion_length=16"]
    data = [f"data.path={args.data}", "data.max_prompt_length=1000"] if args.data else ["data=arithmetic"]
    return [RANDOM, "hardware=a100_80gb", *data]


def show_environment(args: argparse.Namespace, phase: Phase) -> None:
    if not args.dry_run:
        phase.run("nvidia-smi")
    code = "import torch, transformers; print(torch.__version__, transformers.__version__, torch.cuda.is_available())"
    phase.python("-c", code)


def run_tests(args: argparse.Namespace, phase: Phase) -> None:
    more = ["--collect-only", "tests/rollout"] if args.dry_run else ["-p", "no:cacheprovider", "tests"]
    phase.python("-m", "pytest", "-q", "-m", "gpu", *more)


def check_exactness(args: argparse.Namespace, phase: Phase) -> None:
    """Compare the weights, optimizer states, samples and metrics of a killed and resumed run with an unbroken one."""
    sys.path[:0] = [str(ROOT), str(HERE)]
    from same_bytes import contents

    shape = ["grpo.num_steps=6", "grpo.mu=2", "checkpoint.every=2", "samples.every=1", "deterministic=true"]
    launch = ["launch.py", "experiment=quickstart", "hardware=" + ("cpu" if args.dry_run else "auto"), *shape]
    with tempfile.TemporaryDirectory() as folder:
        phase.python(*launch, *UNTRACKED, f"run_dir={folder}/whole", quiet=True)
        metrics = Path(folder, "killed", "metrics", "metrics.jsonl")
        with open(os.devnull, "w") as nowhere:
            command = [sys.executable, *launch, *UNTRACKED, f"run_dir={folder}/killed"]
            process = phase.start(*command, stdout=nowhere, stderr=nowhere)
        try:
            while not metrics.exists() or len(metrics.read_text().splitlines()) < KILL_AFTER:
                phase.left()
                if process.poll() is not None:
                    raise RuntimeError("the run that was to be killed ended before")
                time.sleep(0.01)
        finally:
            kill(process)
        if process.wait() != -signal.SIGKILL:
            raise RuntimeError("the run that was to be killed ended before")
        phase.python("launch.py", "resume=true", f"run_dir={folder}/killed", quiet=True)
        whole, resumed = (contents(Path(folder, name)) for name in ("whole", "killed"))
    different = sorted(key for key in whole.keys() | resumed.keys() if whole.get(key) != resumed.get(key))
    if different:
        raise RuntimeError(f"different after the resume: {', '.join(different)}")
    phase.say(f"{len(whole)} files and rows are equal")


def run_preset(args: argparse.Namespace, phase: Phase) -> None:
    steps = ["grpo.num_steps=3", "checkpoint.every=0", "preflight=false", *UNTRACKED]
    length = [] if args.dry_run else ["rollout.min_new_tokens=512"]
    with tempfile.TemporaryDirectory() as folder:
        phase.python("launch.py", *settings(args), *steps, "plan=true")
        phase.python("launch.py", *settings(args), *steps, *length, f"run_dir={folder}/run", quiet=True)
        rows = Path(folder, "run", "metrics", "metrics.jsonl").read_text().splitlines()
    for row in rows:
        shown = {key: value for key, value in json.loads(row).items() if key.startswith(("step", "timing", "perf"))}
        phase.say(json.dumps(shown))


def measure_decoding(args: argparse.Namespace, phase: Phase) -> None:
    model, shape = ("tiny", "2x4x16") if args.dry_run else ("qwen2_5_1_5b_random", "8x16x512")
    phase.python(HERE / "rollout.py", model, "--shape", shape, "--dtype", "bfloat16", "--rounds", "1")


def measure_head(args: argparse.Namespace, phase: Phase) -> None:
    phase.python(__file__, "--head", *(["--dry-run"] if args.dry_run else []))


def head(args: argparse.Namespace) -> None:
    """Print the time and the memory of the output head by the number of logits in a chunk."""
    import torch

    from grpo.model import lm_head

    device = "cpu" if args.dry_run else "cuda"
    tokens, hidden_size, vocabulary = (64, 32, 512) if args.dry_run else (8 * 512, 1536, 151_936)
    hidden = torch.randn(tokens, hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), device=device)
    for power in (22, 23, 24, 25, 26, 27, 28):
        lm_head.LOGITS_PER_CHUNK = lm_head.LOGITS_PER_CHUNK_ON_CUDA = 2**power
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(4):
            started = time.perf_counter()
            logps, _ = lm_head.HeadLogps.apply(hidden, weight, targets, 1.0, "value")
            logps.sum().backward()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
        print(f"{tokens} tokens, 2^{power} logits in a chunk: {min(seconds) * 1e3:.1f} ms, peak {peak:.2f} GB")


def compare_with_trl(args: argparse.Namespace, phase: Phase) -> None:
    shape = ["--shape", "2x4x16", "--steps", 1] if args.dry_run else ["--shape", "8x16x512", "--steps", 2]
    hardware = "cpu" if args.dry_run else "a100_80gb"
    own = ["experiment=quickstart"] if args.dry_run else settings(args)
    phase.python(HERE / "vs_trl.py", *shape, "--hardware", hardware, "--rounds", 1, *own)


PHASES: dict[str, tuple[float, Callable[[argparse.Namespace, Phase], None]]] = {
    "environment": (30, show_environment),
    "tests": (90, run_tests),
    "exact": (110, check_exactness),
    "preset": (150, run_preset),
    "decode": (150, measure_decoding),
    "head": (40, measure_head),
    "trl": (200, compare_with_trl),
}


def main() -> int:
    """Run the phases that fit into the budget. Returns 1 if one of them failed."""
    args = arguments()
    if args.head:
        head(args)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    failed = []
    for name in args.phases.split(",") if args.phases else PHASES:
        limit, measure = PHASES[name]
        left = args.budget - (time.monotonic() - started)
        print(f"== {name}", flush=True)
        if limit > left:
            print(f"left out, since {left:.0f} s are left", flush=True)
            continue
        before = time.monotonic()
        phase = Phase(name, limit, args.out)
        try:
            measure(args, phase)
        except Exception as error:  # the next phases must still run
            phase.say(f"FAILED: {type(error).__name__}: {error}")
            failed.append(name)
        phase.say(f"({time.monotonic() - before:.0f} s)")
    print(f"failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
