"""Everything that is to be measured on a card, in phases that fit into a short lease; each prints its results at once.

python tests/benchmarks/cuda.py [--budget 780] [--out DIR] [--phases NAME,NAME] [--data DIR]

A phase is started only if its limit fits into what is left of the budget, in seconds. The phases, in this order:

  environment  the card, the driver and the versions
  tests        pytest -m gpu
  exact        a deterministic run that is killed and resumed, against one that is not
  preset       three steps of the preset for the card, with random weights of the size of Qwen2.5-1.5B, beside its plan
  decode       sampling at the preset's shape, with and without CUDA graphs, beside generate()
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
import time
from collections.abc import Callable
from pathlib import Path

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


def python(*command: object, limit: float) -> str:
    """Run Python with these arguments and return its output, which is also shown. Raises RuntimeError if it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=limit
    )
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def settings(args: argparse.Namespace) -> list[str]:
    """Model, data and preset of the phases that measure speed."""
    if args.dry_run:
        return ["experiment=quickstart", "grpo.batch_size=2", "grpo.num_generations=4", "grpo.max_completion_length=16"]
    data = [f"data.path={args.data}", "data.max_prompt_length=1000"] if args.data else ["data=arithmetic"]
    return [RANDOM, "hardware=a100_80gb", *data]


def show_environment(args: argparse.Namespace, limit: float) -> str:
    code = "import torch, transformers; print(torch.__version__, transformers.__version__, torch.cuda.is_available())"
    card = "" if args.dry_run else subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=True).stdout
    return card + python("-c", code, limit=limit)


def run_tests(args: argparse.Namespace, limit: float) -> str:
    if args.dry_run:
        return python("-m", "pytest", "--collect-only", "-q", "-m", "gpu", "tests/rollout", limit=limit)
    return python("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests", limit=limit)


def check_exactness(args: argparse.Namespace, limit: float) -> str:
    """Compare the weights, optimizer states, samples and metrics of a killed and resumed run with an unbroken one."""
    sys.path[:0] = [str(ROOT), str(HERE)]
    from same_bytes import contents

    shape = ["grpo.num_steps=6", "grpo.mu=2", "checkpoint.every=2", "samples.every=1", "deterministic=true"]
    launch = ["launch.py", "experiment=quickstart", "hardware=" + ("cpu" if args.dry_run else "auto"), *shape]
    with tempfile.TemporaryDirectory() as folder:
        python(*launch, *UNTRACKED, f"run_dir={folder}/whole", limit=limit)
        command = [sys.executable, *launch, *UNTRACKED, f"run_dir={folder}/killed"]
        metrics = Path(folder, "killed", "metrics", "metrics.jsonl")
        with open(os.devnull, "w") as quiet:
            process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=quiet, stderr=quiet)
        ends = time.monotonic() + limit
        while not metrics.exists() or len(metrics.read_text().splitlines()) < KILL_AFTER:
            if process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError("the run that was to be killed ended before")
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        python("launch.py", "resume=true", f"run_dir={folder}/killed", limit=limit)
        whole, resumed = (contents(Path(folder, name)) for name in ("whole", "killed"))
    different = sorted(key for key in whole.keys() | resumed.keys() if whole.get(key) != resumed.get(key))
    return f"{len(whole)} files and rows; " + (f"DIFFERENT: {', '.join(different)}" if different else "all equal")


def run_preset(args: argparse.Namespace, limit: float) -> str:
    steps = ["grpo.num_steps=3", "checkpoint.every=0", "preflight=false", *UNTRACKED]
    length = [] if args.dry_run else ["rollout.min_new_tokens=512"]
    with tempfile.TemporaryDirectory() as folder:
        planned = python("launch.py", *settings(args), *steps, "plan=true", limit=limit)
        python("launch.py", *settings(args), *steps, *length, f"run_dir={folder}/run", limit=limit)
        rows = Path(folder, "run", "metrics", "metrics.jsonl").read_text().splitlines()
    measured = [
        {key: value for key, value in json.loads(row).items() if key.startswith(("step", "timing", "perf"))}
        for row in rows
    ]
    return "\n".join([planned, *(json.dumps(row) for row in measured)])


def measure_decoding(args: argparse.Namespace, limit: float) -> str:
    model, shape = ("tiny", "2x4x16") if args.dry_run else ("qwen2_5_1_5b_random", "8x16x512")
    command = [HERE / "rollout.py", model, "--shape", shape, "--dtype", "bfloat16", "--rounds", "1"]
    return "".join(python(*command, *more, limit=limit) for more in ([], ["--cuda-graphs"]))


def measure_head(args: argparse.Namespace, limit: float) -> str:
    return python(__file__, "--head", *(["--dry-run"] if args.dry_run else []), limit=limit)


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
        lm_head.LOGITS_PER_CHUNK_ON_CUDA = 2**power
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


def compare_with_trl(args: argparse.Namespace, limit: float) -> str:
    own = settings(args)
    if args.dry_run:
        return python(HERE / "vs_trl.py", "--shape", "2x4x16", "--rounds", 1, "--steps", 1, *own[:1], limit=limit)
    shape = ["--shape", "8x16x512", "--hardware", "a100_80gb", "--rounds", 1, "--steps", 2]
    return python(HERE / "vs_trl.py", *shape, *own, limit=limit)


PHASES: dict[str, tuple[float, Callable[[argparse.Namespace, float], str]]] = {
    "environment": (30, show_environment),
    "tests": (90, run_tests),
    "exact": (90, check_exactness),
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
    failed = False
    for name in args.phases.split(",") if args.phases else PHASES:
        limit, phase = PHASES[name]
        left = args.budget - (time.monotonic() - started)
        if limit > left:
            print(f"== {name}: left out, since {left:.0f} s are left", flush=True)
            continue
        before = time.monotonic()
        try:
            text = phase(args, limit)
        except (RuntimeError, subprocess.SubprocessError, OSError) as error:
            text = f"FAILED: {error}"
            failed = True
        (args.out / f"{name}.txt").write_text(text)
        print(f"== {name}, {time.monotonic() - before:.0f} s\n{text}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
