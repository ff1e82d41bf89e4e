"""A command as this process: its environment, its errors in a line, and its exit code."""

import logging
import os
import sys
import traceback
from collections.abc import Callable

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from grpo.config.errors import ConfigError
from grpo.config.explain import explain


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command as this process's own, and return its exit code as `report_errors` does."""
    # Retries while the network is away would bury the one line that says so; read when huggingface_hub is imported.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # What Apple's GPU lacks is done by the processor instead of failing; read when torch is imported.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    # Its own signal, USR2, would end a job of a sweep before it has saved; read when submitit is imported.
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it warns of kernels not used here
    # A user's reward functions are found from where the command is given; last, so that nothing there can stand in
    # for a library's module.
    sys.path.append(os.getcwd())
    return report_errors(command)


def report_errors(command: Callable[[], int | None]) -> int:
    """Run a command. Returns what it returns (None: 0), 2 after bad input, or 1 after a failure, each with a line."""
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
        if "Unexpected type for root: NoneType" in str(error):  # its AssertionError for a key below a null one
            print(
                "error: a key below one that is null cannot be set; for model.lora.* add tuning=lora", file=sys.stderr
            )
            return 2
        if not getattr(error, "logged", False):  # what fails within a run is in its launch.log
            traceback.print_exc()
        print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
