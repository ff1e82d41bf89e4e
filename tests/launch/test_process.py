"""The environment that a command sets for the libraries that it loads."""

import os
import re
import subprocess
import sys

import pytest

from grpo.launch.process import SPIN_COUNT
from tests.conftest import ROOT

# What OpenMP itself reports when torch loads it.
SHOW = """
import os
from grpo.launch.process import run_command

for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
    os.environ.pop(name, None)
os.environ.update({!r})

def load():
    import torch

run_command(load)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the OpenMP of GNU")
def test_waiting_threads_spin_only_briefly_unless_the_user_sets_it():
    shown = []
    for own in ({}, {"GOMP_SPINCOUNT": "77"}, {"OMP_WAIT_POLICY": "PASSIVE"}):
        environment = os.environ | {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", SHOW.format(own)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
        shown += re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    assert shown == [SPIN_COUNT, "77", "0"]


def test_importing_the_package_changes_no_environment_variable():
    script = "import os; before = dict(os.environ); import grpo.launch.process; print(dict(os.environ) == before)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n"
