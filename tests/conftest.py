"""Real launches of the suite, and the finished run that many tests read."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.model import linear
from tests.launches import SETTINGS
from tests.launches import launch as warm_launch
from tests.tiny_model import compiled_model, fast_model, model, plain_model, prompts, tokenizer  # noqa: F401  fixtures

ROOT = Path(__file__).resolve().parent.parent
os.environ["GRPO_OUTPUTS"] = "outputs"  # below the working directory of each launch

# Two steps of the embedded model with 2 problems x 4 completions, which take seconds. One thread, so that they do not
# take much longer on a busy machine.
SMALL_RUN = (
    "experiment=quickstart",
    "grpo.num_steps=2",
    "grpo.batch_size=2",
    "grpo.num_generations=4",
    "eval.max_problems=8",
    "hardware.threads=1",
    "samples.every=1",
    "tracking=disabled",
)


@pytest.fixture(autouse=True)
def root_logger():
    """Remove the console handlers that a test added to the root logger: their stream may be closed with the test."""
    before = logging.root.handlers[:]
    yield
    for handler in logging.root.handlers[:]:
        if type(handler) is logging.StreamHandler and handler not in before:
            logging.root.removeHandler(handler)


@pytest.fixture(scope="module")
def onednn_for_small_weights():
    """Multiply with oneDNN whatever the size of the weights, as with the weights of large models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "LEAST_ELEMENTS", 0)
        yield


def cold_launch(*arguments, cwd):
    """Run `python launch.py` as a user does, in a new interpreter."""
    command = [sys.executable, str(ROOT / "launch.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def cold():
    """Run launch.py in a fresh interpreter: `cold("experiment=quickstart", cwd=tmp_path)`."""
    return cold_launch


@pytest.fixture(scope="session")
def launch():
    """Like `cold`, forked from a process that has imported torch: `launch("experiment=quickstart", cwd=tmp_path)`."""
    return warm_launch


@pytest.fixture(scope="session")
def small_run():
    """Arguments of a training run that takes seconds."""
    return SMALL_RUN


@pytest.fixture(scope="session")
def finished_launch(tmp_path_factory):
    """A small run with an evaluation after each step: the finished process and its run folder. Tests only read it.

    It learns fast enough for its answers to change within two steps.
    """
    cwd = tmp_path_factory.mktemp("finished")
    process = cold_launch(*SMALL_RUN, "optimizer.lr=0.001", "eval.every=1", cwd=cwd)
    assert process.returncode == 0, process.stderr
    (folder,) = cwd.glob("outputs/quickstart/*")
    return process, folder


@pytest.fixture(scope="session")
def finished_run(finished_launch):
    """The run folder of `finished_launch`."""
    return finished_launch[1]


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """A run of `tests.launches.SETTINGS` that is never stopped. Tests only read it."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    result = warm_launch(*SETTINGS, f"run_dir={run_dir}", cwd=run_dir.parent)
    assert result.returncode == 0, result.stderr
    return run_dir
