"""Run a command as the main program of this process: set the environment, report errors, return the exit code."""

import logging
import os
import sys
import traceback
from collections.abc import Callable

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from grpo.config.errors import ConfigError
from grpo.config.explain import explain
from grpo.runs.console import ignoring_console_errors

# Of GNU's OpenMP: the value that it uses itself if there are more threads than cores; otherwise it is 300,000.
SPIN_COUNT = "1000"


def run_command(command: Callable[[], int | None]) -> int:
    """Set up this process, run a command, and return the exit code from `report_errors`."""
    # Without a network, messages about retries would hide the error. Read when huggingface_hub is imported.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # Operations that Apple's GPU does not support run on the CPU instead of failing. Read when torch is imported.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    # submitit's default, USR2, would end a job of a sweep before it has saved. Read when submitit is imported.
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    _shorten_spinning()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported by peft; warns about kernels not used here
    # So that a user's reward functions can be imported from the working directory. Last in the path, so that no file
    # there can replace a module of a library.
    sys.path.append(os.getcwd())
    with ignoring_console_errors():
        return report_errors(command)


def _shorten_spinning() -> None:
    """Let threads that wait for others spin only briefly before they sleep. Read when torch loads OpenMP.

    GNU's OpenMP spins for milliseconds, which saves up to a quarter of the time of a step on an idle machine. If
    another program runs, the threads that spin keep the cores from those that they wait for, and a step takes several
    times as long (docs/measured.md). KMP_BLOCKTIME, in milliseconds, is for the OpenMP of LLVM and Intel.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
        os.environ["KMP_BLOCKTIME"] = "1"


def report_errors(command: Callable[[], int | None]) -> int:
    """Run a command and print its errors in one line.

    Returns the command's result (None: 0), or 2 for invalid input, 130 for Ctrl-C and 1 for any other failure.
    """
    try:
        return command() or 0
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the run handles signals itself
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if "Config group override must be" in str(error):  # Hydra's ValueError for `data=null`
            print("error: a config group cannot be null; choose one of its files", file=sys.stderr)
            return 2
        if "Unexpected type for root: NoneType" in str(error):  # OmegaConf's AssertionError for a key below null
            print(
                "error: a key below one that is null cannot be set; for model.lora.* add tuning=lora", file=sys.stderr
            )
            return 2
        if not getattr(error, "logged", False):  # a failure within a run is already in its launch.log
            traceback.print_exc()
        print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
