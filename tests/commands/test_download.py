"""`python -m grpo download` from a hub, and everything after it without one."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from grpo.data import arithmetic
from grpo.model.loading import EMBEDDED_MODELS
from tests.launches import ROOT
from tests.local_hub import Hub, serve

pytestmark = pytest.mark.slow  # each command is a process of its own, since the hub's address is read when it starts
CONFIG = ["experiment=quickstart", "data=gsm8k", "data.system_prompt=null"]
NAMES = ["model.name=test/tiny", "data.path=test/sums"]
RUN = ["grpo.num_steps=1", "grpo.batch_size=2", "grpo.num_generations=2", "eval.max_problems=8", "tracking=disabled"]
CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
---
"""


@pytest.fixture
def hub(tmp_path):
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(EMBEDDED_MODELS["tiny"], model)
    (model / "pytorch_model.bin").write_bytes(b"a copy of the weights in another format")
    (data / "main").mkdir(parents=True)
    (data / "README.md").write_text(CARD)
    for split in ("train", "test"):
        rows = pd.DataFrame(arithmetic.problems(split)).head(200)
        rows.to_parquet(data / "main" / f"{split}-00000-of-00001.parquet")
    with serve(Hub({"test/tiny": model}, {"test/sums": data})) as served:
        yield served


@pytest.fixture
def begin(hub, tmp_path):
    """A function that starts `python ...` with the hub and an empty cache."""

    def start(*arguments, **extra):
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        environment |= {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "cache"),
            "PYTHONPATH": str(ROOT),
            **extra,
        }
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_model_and_data_are_downloaded_and_then_everything_runs_without_the_hub(hub, begin):
    code, out, err = finish(begin("-m", "grpo", "download", *CONFIG, *NAMES))
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "model test/tiny: 0.50 MB in 6 files"  # before anything is downloaded
    assert lines[1].startswith("model: ")
    assert lines[2].startswith("data test/sums: at most 0.01 MB in 3 files")
    assert lines[3] == "data: 189 problems to train on, 11 to validate, 200 to test"
    assert not any("pytorch_model.bin" in path for _, path, _ in hub.requests)
    for step, (arguments, extra) in enumerate(
        (
            (["-m", "grpo", "download"], {"HF_HUB_OFFLINE": "1"}),
            ([str(ROOT / "launch.py"), *RUN, "run_dir=offline"], {"HF_HUB_OFFLINE": "1"}),
            (["-m", "grpo", "evaluate", "eval.max_problems=4"], {"HF_HUB_OFFLINE": "1"}),
        )
    ):
        asked = len(hub.requests)
        code, out, err = finish(begin(*arguments, *CONFIG, *NAMES, **extra))
        assert code == 0, (step, err)
        assert len(hub.requests) == asked
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    code, out, err = finish(begin(str(ROOT / "launch.py"), *RUN, "run_dir=unreachable", *CONFIG, *NAMES, **unreachable))
    assert code == 0, err
    assert (out + err).count("no connection to http://127.0.0.1:9") == 1


def large_weights(file):
    """Make a file of weights larger than what the client writes at once; its content."""
    content = os.urandom(1000) * 30_000
    file.write_bytes(content)
    return content


def stopped_download(hub, begin, tmp_path):
    """A download whose connection stands still in the middle of a large file."""
    hub.stall_at = 25_000_000  # the client writes 10 MiB at a time
    process = begin("-m", "grpo", "download", *CONFIG, "model.name=test/tiny", "data=arithmetic")
    deadline = time.monotonic() + 60
    while sum(each.stat().st_size for each in (tmp_path / "cache").rglob("*.incomplete")) < 20_000_000:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_a_download_continues_where_its_connection_broke(hub, begin, tmp_path):
    content = large_weights(tmp_path / "model" / "model.safetensors")
    process = stopped_download(hub, begin, tmp_path)
    hub.stall_at = None  # ends the connection
    code, _, err = finish(process)
    assert code == 0, err
    asked = [asked for method, path, asked in hub.requests if "model.safetensors" in path and method == "GET"]
    assert len(asked) == 2
    assert asked[0] is None
    assert asked[1] == f"bytes={2 * 10 * 1024**2}-"
    assert next((tmp_path / "cache").rglob("model.safetensors")).read_bytes() == content


def test_a_download_that_was_killed_keeps_the_files_that_were_complete(hub, begin, tmp_path):
    content = large_weights(tmp_path / "model" / "model.safetensors")
    process = stopped_download(hub, begin, tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, _, err = finish(
        begin("-m", "grpo", "download", *CONFIG, "model.name=test/tiny", "data=arithmetic", HF_HUB_OFFLINE="1")
    )
    assert code == 2
    assert "model.name=test/tiny is neither a local folder nor complete in the cache" in err
    assert "HF_HUB_OFFLINE is set: " in err
    hub.stall_at = None
    hub.requests.clear()
    code, _, err = finish(begin("-m", "grpo", "download", *CONFIG, "model.name=test/tiny", "data=arithmetic"))
    assert code == 0, err
    got = {path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path}
    assert got == {"model.safetensors"}
    assert next((tmp_path / "cache").rglob("model.safetensors")).read_bytes() == content


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.name=test/tiny"], "model.name=test/tiny is neither a local folder nor complete in the cache"),
        (
            ["data.path=test/sums"],
            "data.path=test/sums is neither a local folder nor in the cache, and HF_HUB_OFFLINE is set",
        ),
        (["model.name=test/nothing"], "model.name=test/nothing is neither a local folder nor complete in the cache"),
    ],
)
def test_without_the_hub_it_says_what_is_missing(begin, names, said):
    code, _, err = finish(begin("-m", "grpo", "download", *CONFIG, *names, HF_HUB_OFFLINE="1"))
    assert code == 2
    assert said in err
    assert "Traceback" not in err


def test_a_name_that_the_hub_does_not_have_is_one_line(begin):
    for name in ("model.name=test/nothing", "data.path=test/nothing"):
        code, _, err = finish(begin("-m", "grpo", "download", *CONFIG, name))
        assert code == 2
        assert err.strip().splitlines()[-1].startswith(f"error: {name}")
