"""`checkpoint=` of the commands, and commands on a run folder that cannot be written to."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.launches import ROOT, SETTINGS, grpo, launch


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    """A folder with the run `run`, interrupted after step 6 of 8, and `straight`; best/ is not the last checkpoint."""
    cwd = tmp_path_factory.mktemp("checkpoints")
    settings = [*SETTINGS, "eval.every=2", "eval.max_problems=4", "checkpoint.keep_last=2", "run_dir=run"]
    assert launch(*settings, "until_step=6", cwd=cwd).returncode == 0
    return cwd


def result(cwd, *arguments):
    """Evaluate; return what was printed, and the new file in eval/, which is removed."""
    done = grpo("evaluate", "run_dir=run", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    (file,) = (cwd / "run").glob("eval/evaluate_*.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return done.stdout, content


def evaluation(cwd, step):
    return json.loads((cwd / "run" / "eval" / f"step_{step:06d}.json").read_text(encoding="utf-8"))


def test_evaluate_takes_the_named_checkpoint_and_says_which(cwd):
    best = json.loads((cwd / "run/checkpoints/best/trainer_state.json").read_text(encoding="utf-8"))["step"]
    cases = [([], "step_000006", 6), (["checkpoint=4"], "step_000004", 4), (["checkpoint=best"], "best", best)]
    for arguments, folder, step in cases:
        said, content = result(cwd, "split=validation", *arguments)
        name = f"tiny with the weights of run/checkpoints/{folder}"
        assert f"model: {name}\n" in said
        assert (content["model"], content["step"]) == (name, step)
        assert content["problems"] == evaluation(cwd, step)["problems"]
    assert evaluation(cwd, 4)["problems"] != evaluation(cwd, 6)["problems"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["checkpoint=2"], "checkpoint=2: run keeps no checkpoint of that step, but of: 4, 6, best"),
        (["checkpoint=last"], "checkpoint=last: give best or a step; run keeps checkpoints of: 4, 6, best"),
        (["checkpoint=4", "model.name=tiny"], "checkpoint=4 is for the model of a run: give run_dir=..., and no model"),
    ],
)
def test_a_checkpoint_that_does_not_exist_is_refused_with_those_that_do(cwd, arguments, said):
    done = grpo("evaluate", "run_dir=run", *arguments, cwd=cwd)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_a_damaged_checkpoint_is_refused(cwd, tmp_path):
    shutil.copytree(cwd / "run", tmp_path / "run")
    (tmp_path / "run/checkpoints/best/model.safetensors").write_bytes(b"")
    done = grpo("chat", "run_dir=run", "checkpoint=best", "prompt=1+1", cwd=tmp_path)
    assert done.returncode == 2
    assert "checkpoint=best: run/checkpoints/best is damaged (model.safetensors is not" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_merge_writes_the_model_of_a_checkpoint(tmp_path, tuning):
    settings = [*SETTINGS, f"tuning={tuning}", "optimizer.lr=0.001", "eval.every=2", "eval.max_problems=4"]
    assert launch(*settings, "until_step=4", "checkpoint.keep_last=2", "run_dir=run", cwd=tmp_path).returncode == 0
    done = grpo("merge", "run_dir=run", "checkpoint=2", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "run/merged_model\n"), done.stderr
    _, content = result(tmp_path, "model.name=run/merged_model")
    assert content["problems"] == evaluation(tmp_path, 2)["problems"] != evaluation(tmp_path, 4)["problems"]


@pytest.fixture
def read_only(cwd, tmp_path):
    """A folder with the run, which is on a read-only mount."""
    run = shutil.copytree(cwd / "run", tmp_path / "run")
    for options in (["--bind", str(run), str(run)], ["-o", "remount,ro,bind", str(run)]):
        if subprocess.run(["mount", *options]).returncode != 0:
            pytest.skip("mounting is not allowed here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(run)], check=True)


def test_a_run_folder_that_cannot_be_written_to_is_read_and_the_rest_is_refused_in_one_line(read_only):
    cannot = "[Errno 30] Read-only file system"
    cases = [
        (["evaluate", "run_dir=run"], 0, f"each problem's outcome could not be written: {cannot}"),
        (["chat", "run_dir=run", "prompt=1+1?"], 0, ""),
        (["plot", "run_dir=run"], 2, f"the charts could not be written ({cannot}"),
        (["plot", "run_dir=run", "output_dir=plots"], 0, "plots/summary.json"),
        (["report", "run_dir=run"], 2, f"the report could not be written ({cannot}"),
        (["report", "run_dir=run", "output_dir=report"], 0, "report/report.html"),
        (["merge", "run_dir=run", "checkpoint=4"], 2, "run/merged_model cannot be created (Read-only file system)"),
        (["merge", "run_dir=run", "checkpoint=4", "output_dir=merged"], 0, "merged"),
        (["verify", "run_dir=run"], 0, "equal: steps 5 to 6"),
        (["train", "resume=true", "run_dir=run"], 2, "run cannot be written to (Read-only file system)"),
        (["train", "experiment=quickstart", "run_dir=run/new"], 2, "run/new cannot be created (Read-only file system)"),
        (["train", "fork=true", "run_dir=run", "fork_step=4", "until_step=5"], 0, "forked from run at step 4"),
    ]
    for arguments, code, said in cases:
        done = grpo(*arguments, cwd=read_only)
        assert done.returncode == code, (arguments, done.stderr)
        assert said in done.stdout + done.stderr, (arguments, done.stdout, done.stderr)
        assert "Traceback" not in done.stdout + done.stderr
        assert code == 0 or len(done.stderr.splitlines()) == 1, done.stderr
    assert (read_only / "report" / "training_progress.png").exists()


@pytest.mark.slow
def test_another_user_can_evaluate_a_run_but_not_write_to_it(cwd, tmp_path_factory):
    if shutil.which("setpriv") is None or subprocess.run(["id", "-u"], capture_output=True).stdout != b"0\n":
        pytest.skip("only root can become another user")
    folder = tmp_path_factory.mktemp("shared")
    for each in (folder, *list(folder.parents)[:-2]):
        each.chmod(0o755)
    shutil.copytree(cwd / "run", folder / "run")
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable]
    for arguments, code, said in (
        (["-m", "grpo", "evaluate", "run_dir=run"], 0, "could not be written: [Errno 13] Permission denied"),
        ([ROOT / "launch.py", "resume=true", "run_dir=run"], 2, "run cannot be written to (Permission denied)"),
    ):
        command = [*as_nobody, *map(str, arguments)]
        environment = {"PYTHONPATH": str(ROOT), "HOME": "/nonexistent", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if "Permission denied" in done.stderr and "No module named" in done.stderr + done.stdout:
            pytest.skip("the other user cannot read the Python environment")
        assert done.returncode == code, done.stderr
        assert said in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
