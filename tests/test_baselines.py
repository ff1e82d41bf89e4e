"""The speed of this machine against the stored ratios of its kind of processor (slow), and how they are compared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.baselines import MEASURES, processor, worse
from tests.benchmarks.baselines import STORED as FILE

FOLDERS = ("GRPO_BENCHMARK_MODEL", "GRPO_BENCHMARK_DATA")  # with SmolLM2-135M, and with GSM8K as JSON Lines
NAME = "rollout 2x4x64"
STORED = {"times_as_fast_as_generate": 2.0, "times_reading_the_weights": 2.5}


@pytest.mark.parametrize(
    ("found", "names"),
    [
        ({"times_as_fast_as_generate": 1.8, "times_reading_the_weights": 2.8}, []),  # within the tolerance
        ({"times_as_fast_as_generate": 9.0, "times_reading_the_weights": 1.0}, []),
        ({"times_as_fast_as_generate": 1.5, "times_reading_the_weights": 2.5}, ["times_as_fast_as_generate"]),
        ({"times_as_fast_as_generate": 2.0, "times_reading_the_weights": 3.2}, ["times_reading_the_weights"]),
    ],
)
def test_a_ratio_that_is_worse_by_more_than_the_tolerance_is_named(found, names):
    texts = worse(NAME, found, STORED)
    assert len(texts) == len(names)
    for text, name in zip(texts, names, strict=True):
        assert text == f"{NAME}: {name} {found[name]:.2f}, before {STORED[name]:.2f}"


def test_without_stored_ratios_nothing_is_worse():
    assert worse(NAME, STORED, {}) == []


@pytest.mark.slow
@pytest.mark.skipif(not set(FOLDERS) <= os.environ.keys(), reason=f"needs the folders {' and '.join(FOLDERS)}")
def test_no_ratio_is_worse_than_the_stored_one():
    stored = json.loads(FILE.read_text()).get(processor())
    if stored is None:
        pytest.skip(f"nothing is stored for {processor()}")
    names = {name: set(measure.larger_is_better) for name, measure in MEASURES.items()}
    assert {name: set(ratios) for name, ratios in stored.items()} == names
    script = Path(__file__).parent / "benchmarks" / "baselines.py"
    folders = [os.environ[name] for name in FOLDERS]
    done = subprocess.run([sys.executable, script, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("times_as_fast") == len(MEASURES)
