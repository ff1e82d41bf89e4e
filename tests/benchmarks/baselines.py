"""Measure ratios that hold on any machine of a kind of processor, and compare them with the stored ones.

python tests/benchmarks/baselines.py MODEL DATA [--store] [--only "NAME;NAME"]

MODEL: a folder with SmolLM2-135M. DATA: a folder with GSM8K's train.jsonl and test.jsonl. The ratios are in
baselines.json by kind of processor; --store writes those that were measured. Exits with 1 if a ratio is worse than the
stored one by more than TOLERANCE, which is about what the same code varies by on a shared machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
STORED = HERE / "baselines.json"
TOLERANCE = 0.2


@dataclass(frozen=True)
class Measure:
    """Some ratios that one benchmark measures."""

    command: Callable[[str, str], list[str]]  # of the model and the data
    larger_is_better: dict[str, bool]  # by the name of a ratio in the benchmark's JSON


def step(*shape: str) -> Measure:
    """A step beside TRL's, of this shape."""
    ratios = {"times_as_fast_as_trl": True, "times_the_floor": False, "memory_of_trl": False}
    own = ["data.examples=[]", "data.system_prompt=null", "rollout.temperature=1.0", "experiment=smollm2_gsm8k"]
    return Measure(
        lambda model, data: ["vs_trl.py", *shape, "--rounds", "3", *own, f"model.name={model}", f"data.path={data}"],
        ratios,
    )


MEASURES = {
    "step 2x4x64": step("--shape", "2x4x64"),
    "step 2x8x128, a third by 40": step("--shape", "2x8x128", "--third-by", "40", "--steps", "1"),
    "rollout 2x4x64": Measure(
        lambda model, _: ["rollout.py", model, "--shape", "2x4x64", "--rounds", "3"],
        {"times_as_fast_as_generate": True, "times_reading_the_weights": False},
    ),
}


def processor() -> str:
    """The kind of this processor: its maker and the widest instructions that torch can use."""
    text = Path("/proc/cpuinfo").read_text()
    maker = "Intel" if "GenuineIntel" in text else "AMD" if "AuthenticAMD" in text else "other"
    if torch.cpu._is_amx_tile_supported():
        return f"{maker}, AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return f"{maker}, AVX-512 with bfloat16"
    return f"{maker}, AVX-512" if torch.cpu._is_avx512_supported() else f"{maker}, no AVX-512"


def measured(name: str, model: str, data: str) -> dict[str, float]:
    """The ratios of a measure by their names."""
    script, *arguments = MEASURES[name].command(model, data)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, str(HERE / script), *arguments, "--json", str(result)]
        subprocess.run(command, stdout=sys.stderr, check=True)
        found = json.loads(result.read_text())
    return {ratio: round(found[ratio], 3) for ratio in MEASURES[name].larger_is_better}


def worse(name: str, found: dict[str, float], stored: dict[str, float]) -> list[str]:
    """The ratios of a measure that are worse than the stored ones by more than TOLERANCE."""
    texts = []
    for ratio, larger_is_better in MEASURES[name].larger_is_better.items():
        before = stored.get(ratio)
        if before is None:
            continue
        change = found[ratio] / before if larger_is_better else before / found[ratio]
        if change < 1 - TOLERANCE:
            texts.append(f"{name}: {ratio} {found[ratio]:.2f}, before {before:.2f}")
    return texts


def main() -> int:
    """Measure, print and compare. Returns 1 if something is worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--only", help="names of measures, separated by semicolons")
    args = parser.parse_args()
    kind = processor()
    stored = json.loads(STORED.read_text())
    before = stored.setdefault(kind, {})
    found_worse = []
    print(f"{kind}, {torch.get_num_threads()} threads")
    for name in args.only.split(";") if args.only else MEASURES:
        found = measured(name, args.model, args.data)
        print(f"{name}: {', '.join(f'{ratio} {value:.2f}' for ratio, value in found.items())}", flush=True)
        found_worse += worse(name, found, before.get(name, {}))
        before[name] = found
    if args.store:
        STORED.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
    print("\n".join(["worse:", *found_worse]) if found_worse else "nothing is worse than the stored ratios")
    return int(bool(found_worse))


if __name__ == "__main__":
    sys.exit(main())
