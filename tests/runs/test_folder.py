"""The run folder: files written atomically or only once, links, damaged files, and which folder a launch uses."""

import json
import os
import subprocess
import sys
import textwrap
import threading
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
import yaml

from grpo.commands._common import run_folder_of
from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.config.errors import ConfigError
from grpo.config.migrations import VERSION
from grpo.config.overrides import Overrides
from grpo.config.values import to_dict
from grpo.launch.decide import known_folder, reserved, run_name
from grpo.runs.checkpoint import load_state, reference_of
from grpo.runs.choice import check_empty, check_parent, choose_run
from grpo.runs.files import check_contents, restore_replaced, write_atomic
from grpo.runs.folder import RunFolder
from grpo.runs.halving_state import HalvingState
from grpo.runs.locations import job_folder_name, newest_unfinished, outputs, release, remove_empty, reserve, run_folders
from grpo.runs.lock import locked
from grpo.runs.sweep_folder import SweepFolder
from tests.launches import ROOT

ROWS = [{"step": step, "loss": 1 / step} for step in (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def config():
    return typed(compose_config(["experiment=quickstart"]))


@pytest.fixture
def folder(tmp_path):
    """A run folder with metrics of four steps."""
    run = RunFolder(tmp_path)
    run.truncate_metrics(0)
    for row in ROWS:
        run.append_metrics(row)
    return run


def make_run(path, state, started_at):
    """Create a run folder in this state, whose config was written at this time (seconds)."""
    (path / ".hydra").mkdir(parents=True)
    (path / ".hydra" / "config.yaml").write_text("a: 1\n")
    (path / "config.yaml").write_text("a: 1\n")
    os.utime(path / "config.yaml", (started_at, started_at))
    RunFolder(path).update_status(state=state)
    return path


def test_the_links_of_a_folder_are_checked_while_a_run_writes_into_it(tmp_path):
    """A folder in which other processes create and delete temporary files."""
    stop = threading.Event()

    def write():
        while not stop.is_set():
            write_atomic(tmp_path / "status.json", "{}")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(500):
            check_contents(tmp_path)
    finally:
        stop.set()
        writer.join()


def test_the_config_is_written_once_and_reads_back_equal(tmp_path, config):
    run = RunFolder(tmp_path)
    assert not run.started()
    run.write_config(config)
    written = run.config_file.read_bytes()
    assert run.started()
    assert yaml.safe_load(written) == {"version": VERSION, **to_dict(config)}
    assert typed(run.frozen_config()) == config
    with pytest.raises(FileExistsError, match="written once"):
        run.write_config(config)
    assert run.config_file.read_bytes() == written


def test_update_status_changes_only_the_given_keys(tmp_path):
    run = RunFolder(tmp_path)
    assert run.status() == {}
    assert not run.finished()
    run.update_status(state="running", step=3, error=None)
    run.update_status(step=4)
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "running", "step": 4, "error": None}
    run.update_status(state="finished")
    assert run.finished()


def test_a_file_that_cannot_be_written_completely_leaves_the_old_one(tmp_path):
    file = tmp_path / "status.json"
    write_atomic(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(file, "new \ud800")
    assert file.read_text() == "old"
    write_atomic(file, "new")
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_metrics_are_read_in_order(folder):
    assert folder.metrics() == ROWS
    assert folder.metrics(up_to_step=2) == ROWS[:2]


@pytest.mark.parametrize("torn", ['{"step": 5, "lo', '{"step": 5, "loss": 0.2}', "\0\0\0"])
def test_an_incomplete_last_line_is_dropped_and_the_next_row_starts_a_new_line(folder, torn):
    with folder.metrics_file.open("a") as file:
        file.write(torn)
    assert folder.metrics() == ROWS
    assert folder.truncate_metrics(4) == ROWS
    folder.append_metrics({"step": 5, "loss": 0.2})
    lines = folder.metrics_file.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_rows_after_the_step_of_the_checkpoint_are_removed(folder):
    assert folder.truncate_metrics(2) == ROWS[:2]
    assert folder.metrics_file.read_text() == "".join(json.dumps(row) + "\n" for row in ROWS[:2])
    assert folder.truncate_metrics(0) == []
    assert folder.metrics_file.read_text() == ""


def test_samples_and_evaluations_are_written_to_separate_files(tmp_path):
    run = RunFolder(tmp_path)
    run.write_samples(10, [{"step": 10, "completion": "π"}, {"step": 10, "completion": "a\nb"}])
    lines = (tmp_path / "samples" / "step_000010.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["completion"] for line in lines] == ["π", "a\nb"]
    assert run.evaluation("before") is None
    run.write_evaluation("before", {"accuracy": 0.5})
    assert run.evaluation("before") == {"accuracy": 0.5, "split": "test"}  # as earlier versions wrote it
    assert (tmp_path / "eval" / "before.json").exists()


def test_an_evaluation_can_be_read_next_to_a_broken_one(tmp_path):
    run = RunFolder(tmp_path)
    run.write_evaluation("after", {"accuracy": 0.5, "step": 7})
    (tmp_path / "eval" / "evaluate_by_hand.json").write_text("{")
    assert run.evaluation("after") == {"accuracy": 0.5, "step": 7, "split": "test"}
    assert run.accuracy_at(7) == 0.5
    assert run.accuracy_at(6) is None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.replace(b'"step": 2', b'"step\xff: 2'), "line 2: not valid JSON"),
        (lambda text: text.replace(b'"step": 2', b'"stop": 2'), "line 2: not a metrics row"),
        (lambda text: text.partition(b"\n")[2], "does not have one row for each of the 4 steps"),
        (lambda text: text + text, "does not have one row for each of the 4 steps"),
        (lambda text: text[:-9], "does not have one row for each of the 4 steps"),
    ],
)
def test_damaged_metrics_are_refused_and_left_unchanged(folder, damage, said):
    damaged = damage(folder.metrics_file.read_bytes())
    folder.metrics_file.write_bytes(damaged)
    with pytest.raises(ConfigError, match=rf"metrics\.jsonl,? {said}"):
        folder.truncate_metrics(4)
    assert folder.metrics_file.read_bytes() == damaged


def test_a_launch_is_recorded_after_an_incomplete_line(tmp_path):
    run = RunFolder(tmp_path)
    run.record_launch({"from_step": 0})
    with (tmp_path / "launches.jsonl").open("a") as file:
        file.write('{"from_st')
    run.record_launch({"from_step": 4})
    assert run.launches() == [{"from_step": 0}, {"from_step": 4}]


# Links, which a folder from someone else may contain.


@pytest.mark.parametrize("name", ["status.json.tmp", "checkpoints", "eval/before.json", "x/y/z", "gone"])
def test_a_link_to_outside_the_run_folder_is_refused_with_its_name(tmp_path, name):
    run = RunFolder(make_run(tmp_path / "run", "interrupted", 100))
    (tmp_path / "elsewhere").mkdir()
    link = run.path / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / ("gone" if name == "gone" else "elsewhere"))
    said = rf"^{link} is a link to {link.readlink()}, outside of {run.path}; replace it by a copy of that, or delete it"
    for resume in (True, "auto"):
        with pytest.raises(ConfigError, match=said):
            choose_run(run, resume, Overrides([]))
    with pytest.raises(ConfigError, match=said):
        check_parent(str(run.path))
    with pytest.raises(ConfigError, match=said):
        run_folder_of([f"run_dir={run.path}"])


def test_links_within_a_run_folder_and_to_it_are_accepted(tmp_path):
    run = make_run(tmp_path / "run", "interrupted", 100)
    (run / "latest").symlink_to("config.yaml")
    (run / "loop").symlink_to("loop")
    (run / "wandb").mkdir()
    (run / "wandb" / "debug.log").symlink_to("/var/log/of-wandb.log")
    job = make_run(tmp_path / "sweep" / "0_seed_1", "interrupted", 100)
    (job / "wandb").mkdir()
    (job / "wandb" / "debug.log").symlink_to("/var/log/of-wandb.log")
    check_contents(tmp_path / "sweep")
    (tmp_path / "sweep" / "1_seed_2").symlink_to("/var/log")
    with pytest.raises(ConfigError, match="1_seed_2 is a link to /var/log"):
        check_contents(tmp_path / "sweep")
    (tmp_path / "alias").symlink_to(run)
    check_contents(run)
    check_contents(tmp_path / "alias")


WRITERS = {
    "status.json": lambda run: run.update_status(step=1),
    "changes.yaml": lambda run: run.record_changes({"a": 1}),
    "launches.jsonl": lambda run: run.record_launch({"a": 1}),
    "metrics/metrics.jsonl": lambda run: run.append_metrics({"step": 1}),
    "samples/step_000001.jsonl": lambda run: run.write_samples(1, [{}]),
    "skipped/step_000001.safetensors": lambda run: run.write_skipped(1, {"a": torch.ones(1)}, [{}]),
    "skipped/step_000001.jsonl": lambda run: run.write_skipped(1, {"a": torch.ones(1)}, [{}]),
    "preflight.json": lambda run: run.write_preflight({}),
    "eval/before.json": lambda run: run.write_evaluation("before", {}),
    "final_model": lambda run: run.save_final_model(lambda folder: (folder.mkdir(), (folder / "a").write_text("new"))),
    ".lock": lambda run: locked(run.path).__enter__(),
}


@pytest.mark.parametrize("ending", ["", ".tmp"])
@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_written_through_a_link(tmp_path, name, ending):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "a").write_text("{}")
    run = RunFolder(tmp_path / "run")
    link = run.path / f"{name}{ending}"
    link.parent.mkdir(parents=True)
    link.symlink_to(victim if name == "final_model" else victim / "a")
    with suppress(OSError):  # appending is refused, a new file replaces the link
        WRITERS[name](run)
    assert {file.name: file.read_text() for file in victim.iterdir()} == {"a": "{}"}


def test_a_folder_replacement_killed_at_any_time_leaves_the_old_or_the_new_folder(tmp_path):
    # Each child exits at its n-th event that touches files.
    code = """
        import os, sys
        from pathlib import Path
        from grpo.runs.files import commit_folder
        for n in range(1, 99):
            child = os.fork()
            if child == 0:
                count = 0
                def die_at_the_nth(event, arguments):
                    global count
                    if event in ("open", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
                        count += 1
                        if count == n:
                            os._exit(9)
                sys.addaudithook(die_at_the_nth)
                commit_folder(Path(sys.argv[1], str(n), "new"), Path(sys.argv[1], str(n), "best"))
                os._exit(0)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
                break
        print(n)
    """
    for n in range(1, 99):
        for name in ("new", "best"):
            (tmp_path / str(n) / name).mkdir(parents=True)
            (tmp_path / str(n) / name / "a").write_text(name)
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    complete = int(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert 5 < complete < 99
    found = []
    for n in range(1, complete + 1):
        restore_replaced(tmp_path / str(n) / "best")
        found.append((tmp_path / str(n) / "best" / "a").read_text())
        assert not (tmp_path / str(n) / ".best.replaced").exists()
    assert sorted(set(found)) == ["best", "new"]
    assert found == sorted(found)  # the old one up to some operation, then the new one


# Small files that are damaged or come from someone else.

READERS = {
    "config.yaml": lambda run: run.frozen_config(),
    "changes.yaml": lambda run: run.frozen_config(),
    "status.json": lambda run: run.finished(),
    "launches.jsonl": lambda run: run.saved_step(),
    "metrics/metrics.jsonl": lambda run: run.metrics(),
    "eval/after.json": lambda run: run.accuracy_at(1),
    "checkpoints/step_000001/trainer_state.json": lambda run: load_state(run.checkpoints / "step_000001"),
    "checkpoints/step_000001/manifest.json": lambda run: reference_of(run.checkpoints / "step_000001"),
    "sweep.json": lambda run: SweepFolder(run.path).record(),
    "halving.json": lambda run: HalvingState.read(run.path),
}
TORN = [b"{\n", b"[1, {}\n", b"\xff\n", b"3\n", b"null\n", b"[" * 99999 + b"\n"]
FOREIGN = {
    "config.yaml": ["", "- a\n", "a: 2026-01-01\n", "? [a]\n: b\n"],
    "changes.yaml": ["", "1: 2\n"],
    "status.json": ["", "[]", '{"state": 3}', '{"step": "1"}', '{"seconds": null}'],
    "metrics/metrics.jsonl": ['{"step": "1"}\n', '{"step": true}\n', "{}\n"],
    "eval/after.json": ["", '{"step": "1"}', '{"accuracy": "high"}', '{"problems": 3}'],
    "checkpoints/step_000001/trainer_state.json": ["", '{"step": "1"}', '{"steps": 1}', '{"reduced": []}'],
    "checkpoints/step_000001/manifest.json": ["", '{"reference": 3}'],
    "sweep.json": ["", '{"state": "running"}', '{"overrides": "a=1", "state": "running"}'],
    "halving.json": [
        "",
        "{}",
        '{"total_steps": "9", "arms": [], "eta": 3, "budget_hours": null}',
        '{"total_steps": 9, "arms": [[0], [0]], "eta": 3, "budget_hours": null}',
        '{"total_steps": 9, "arms": [[0]], "eta": 3, "budget_hours": null, "entered": [1]}',
        '{"total_steps": 9, "arms": [[0]], "eta": 3, "budget_hours": null, "rungs": '
        '[{"steps": 1, "scores": {}, "kept": [-1], "spent_hours": 0.0}]}',
    ],
}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_or_foreign_file_is_reported_by_name_in_one_line(tmp_path, config, name):
    run = RunFolder(make_run(tmp_path, "interrupted", 100))
    run.config_file.unlink()
    run.write_config(config)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    for content in [*TORN, *(text.encode() for text in FOREIGN.get(name, []))]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError) as refused:
            READERS[name](run)
        assert str(refused.value).startswith(str(tmp_path / name)), content
        assert "\n" not in str(refused.value)


# Which folder a launch uses.


def test_the_newest_unfinished_run_is_the_one_started_last_that_has_not_finished(tmp_path):
    assert newest_unfinished(tmp_path) is None
    make_run(tmp_path / "a" / "2", "interrupted", 200)
    make_run(tmp_path / "b" / "1", "failed", 300)
    make_run(tmp_path / "a" / "3", "finished", 400)
    make_run(tmp_path / "sweeps" / "s" / "0_x", "running", 100)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.yaml").write_text("not: a run\n")
    assert newest_unfinished(tmp_path).path == tmp_path / "b" / "1"
    assert newest_unfinished(tmp_path / "a").path == tmp_path / "a" / "2"
    assert newest_unfinished(tmp_path / "sweeps").path == tmp_path / "sweeps" / "s" / "0_x"
    assert [run.path.name for run in run_folders(tmp_path)] == ["0_x", "2", "1", "3"]


def test_newest_unfinished_skips_runs_that_cannot_be_resumed(tmp_path):
    wanted = make_run(tmp_path / "x" / "killed", "running", 100)
    RunFolder(make_run(tmp_path / "x" / "unreadable", "running", 200)).path.joinpath("status.json").write_text("{")
    make_run(tmp_path / "sweep" / "0_a", "interrupted", 300)
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    running = make_run(tmp_path / "x" / "running", "running", 400)
    with locked(running):
        assert newest_unfinished(tmp_path).path == wanted
    assert newest_unfinished(tmp_path).path == running
    line = {"machine": "as it was before a restart", "host": "here", "pid": 1, "token": "t", "beat": 7}
    (running / ".lock").write_text(json.dumps(line))
    assert newest_unfinished(tmp_path).path == wanted
    os.utime(running / ".lock", (1, 1))
    assert newest_unfinished(tmp_path).path == running


def test_newest_unfinished_is_none_if_every_run_has_finished(tmp_path):
    make_run(tmp_path / "a", "finished", 100)
    assert newest_unfinished(tmp_path) is None


def wanted(*overrides, name="quickstart"):
    """The folder that a launch with these overrides would use, with NOW in place of its start time."""
    composed = compose_config(["experiment=quickstart", *overrides, f"name={name}"])
    known = known_folder(composed)
    return str(known.path) if known else f"outputs/{run_name(composed, Overrides(overrides))}/NOW"


def test_a_launch_uses_the_given_folder_or_the_newest_unfinished_one_or_a_new_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert wanted("run_dir=here") == "here"
    assert wanted(f"run_dir={tmp_path}/there") == "there"
    assert wanted() == "outputs/quickstart/NOW"
    assert wanted("resume=auto") == "outputs/quickstart/NOW"
    with pytest.raises(ConfigError, match=r"resume=true: no unfinished run below outputs/; name one with run_dir="):
        wanted("resume=true")

    make_run(tmp_path / "outputs" / "quickstart" / "1", "interrupted", 100)
    make_run(tmp_path / "outputs" / "other" / "1", "interrupted", 200)
    assert wanted() == "outputs/quickstart/NOW"
    assert wanted("resume=true") == "outputs/other/1"
    assert wanted("resume=auto") == "outputs/quickstart/1"
    assert wanted("resume=true", "run_dir=here") == "here"


def test_a_fork_uses_a_new_folder_with_the_name_of_its_parent_or_a_given_name(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    parent = RunFolder(tmp_path / "theirs")
    parent.path.mkdir()
    parent.write_config(replace(config, name="sums"))
    fork = ("fork=true", "run_dir=theirs")
    assert wanted(*fork) == "outputs/sums/NOW"
    assert wanted(*fork, "++name=mine", name="mine") == "outputs/mine/NOW"

    text = parent.config_file.read_text()
    for name in ("/etc/cron.d", "../../mine"):
        parent.config_file.write_text(text.replace("name: sums", f"name: {name}"))
        with pytest.raises(ConfigError, match=f"name={name}: must be the name of a folder below outputs/"):
            wanted(*fork)


def test_runs_are_written_to_the_repository_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRPO_OUTPUTS")
    assert outputs() == ROOT / "outputs"
    monkeypatch.chdir(ROOT)
    assert str(outputs()) == "outputs"


def test_two_launches_in_the_same_second_get_two_folders(tmp_path):
    names = [reserve(tmp_path / "new" / "now", suffix=True)[0].name for _ in range(3)]
    assert names == ["now", "now_2", "now_3"]


def test_a_refused_launch_removes_nothing_of_the_launch_that_holds_the_folder(tmp_path):
    with reserved(tmp_path / "run", suffix=False) as path:
        (path / "launch.log").write_text("of the first")
        with pytest.raises(ConfigError, match="in use by another process"), reserved(path, suffix=False):
            pass
        assert {each.name for each in path.iterdir()} == {".lock", "launch.log"}
    assert not path.exists()


def test_a_launch_that_did_not_start_removes_only_the_folders_that_it_created(tmp_path):
    (tmp_path / "there").mkdir()
    path, created = reserve(tmp_path / "there" / "a" / "b", suffix=True)
    (path / ".hydra").mkdir()
    (path / ".hydra" / "config.yaml").write_text("")
    (path / ".lock").write_text("")
    release(path)
    remove_empty(created)
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_a_folder_that_holds_a_run_is_refused_without_resume(tmp_path):
    run = RunFolder(make_run(tmp_path / "used", "interrupted", 100))
    with pytest.raises(ConfigError) as refused:
        choose_run(run, False, Overrides([]))
    assert str(refused.value).startswith(f"{run.path} already contains a run; resume it: resume=true run_dir=")
    assert choose_run(RunFolder(tmp_path / "new"), False, Overrides([])) == "fresh"
    assert choose_run(RunFolder(tmp_path / "new"), "auto", Overrides([])) == "fresh"
    assert choose_run(run, True, Overrides([])) == "resume"
    assert choose_run(run, "auto", Overrides([])) == "resume"


def test_a_finished_run_is_resumed_only_if_an_override_in_any_notation_asks_for_more_steps(tmp_path):
    run = RunFolder(make_run(tmp_path / "finished", "finished", 100))
    assert choose_run(run, "auto", Overrides(["seed=1"])) == "done"
    for line in ("grpo.num_steps=9", "++grpo.num_steps=9", "+grpo.num_iterations=2"):
        assert choose_run(run, True, Overrides([line])) == "resume"


def test_resume_says_what_is_wrong_with_a_missing_empty_foreign_or_finished_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("")
    make_run(tmp_path / "finished", "finished", 100)
    said = {}
    for name in ("missing", "empty", "foreign", "finished"):
        with pytest.raises(ConfigError) as refused:
            choose_run(RunFolder(tmp_path / name), True, Overrides([]))
        said[name] = str(refused.value).replace(str(tmp_path / name), "FOLDER")
    assert said == {
        "missing": "resume=true: there is no folder FOLDER; leave run_dir out to take the newest unfinished run",
        "empty": "resume=true: FOLDER is empty; start a run there without resume=true",
        "foreign": "resume=true: FOLDER is not a run folder (it has no config.yaml)",
        "finished": "resume=true: FOLDER has finished already; to train it further, add a larger grpo.num_steps",
    }


@pytest.mark.parametrize("name", ["thesis.tex", ".hydra", "launch.log", "status.json", "final_model"])
def test_a_new_run_is_refused_in_a_folder_with_files_of_the_user(tmp_path, name):
    file = tmp_path / name / "mine" if name in (".hydra", "final_model") else tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("the user's")
    with pytest.raises(ConfigError, match=f"is not empty .it holds {name}.; choose a new or an empty folder"):
        check_empty(tmp_path)


def test_an_empty_subfolder_such_as_a_mounted_disk_does_not_count_as_a_file_of_the_user(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    check_empty(tmp_path)


def test_a_new_run_may_use_the_folder_of_a_launch_that_was_killed_before_it_started(tmp_path):
    check_empty(tmp_path)
    for name in ("launch.log", ".lock"):
        (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match="is not empty"):  # unless killed, it would have removed them
        check_empty(tmp_path)
    (tmp_path / ".lock").write_text('{"machine": "m", "pid": 1, "token": "t"}')
    for name in ("launches.jsonl", "launches.jsonl.tmp", "config.yaml.tmp"):  # killed at any of its writes
        (tmp_path / name).write_text("")
    check_empty(tmp_path)


# Names of a sweep's job folders.


def test_a_job_folder_is_named_by_its_overrides_without_special_characters_of_a_shell():
    assert job_folder_name(3, "grpo.beta=0.01,optimizer.lr=1e-05") == "3_grpo.beta_0.01_optimizer.lr_1e-05"
    assert job_folder_name(0, "data.path=/home/me/a b,+x=[1,2]") == "0_data.path_home_me_a_b_+x_1_2"
    assert job_folder_name(0, "") == "0"


def test_a_long_job_name_is_truncated_and_gets_a_hash_that_makes_it_unique():
    long = "grpo.beta=0.04," + ",".join(f"grpo.setting_{n}=1" for n in range(20))
    names = [job_folder_name(0, long), job_folder_name(0, long + ",seed=2"), job_folder_name(1, long)]
    assert [len(name) for name in names] == [80, 80, 80]
    assert len(set(names)) == 3
    assert len({name.rsplit("_", 1)[1] for name in names[:2]}) == 2
    assert all(name.startswith(("0_grpo.beta_0.04", "1_grpo.beta_0.04")) for name in names)
    assert job_folder_name(0, long) == names[0]
