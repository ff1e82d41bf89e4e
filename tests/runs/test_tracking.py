"""Tracking with real W&B offline runs, read back with `wandb leet inspect`; no network, no mock of our own code."""

import http.server
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import wandb
from wandb.util import get_core_path

import grpo.runs.tracking as module
from grpo.runs.tracking import shorten, tracking

API_KEY = "0123456789" * 4
ROWS = [{"step": s, "iteration": 1, "loss": 1 / s, "kl": None, "digest/completions": f"d{s}"} for s in range(1, 6)]
SHOWN = [{key: value for key, value in row.items() if value is not None} for row in ROWS]


@pytest.fixture(autouse=True)
def clean_machine(tmp_path, monkeypatch):
    """A user who is not logged in, in an empty working directory."""
    for key in [key for key in os.environ if key.startswith(("WANDB_", "XDG_", "NETRC"))]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "outputs" / "demo" / "2026-01-01_00-00-00"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def init_arguments(monkeypatch):
    """The arguments of each call of wandb.init. Online runs are opened offline, since there is no server here."""
    calls = []
    init = wandb.init

    def offline_init(**kwargs):
        calls.append(kwargs)
        return init(**{k: v for k, v in kwargs.items() if k not in ("id", "resume", "mode")}, mode="offline")

    monkeypatch.setattr(wandb, "init", offline_init)
    return calls


def config(mode="offline", **changes):
    t = {"mode": mode, "project": "p", "entity": None, "group": "g", "job_type": "train", "tags": ["a", "b"]}
    t |= {"init_timeout": 20.0, "completions_every": 50, **changes}
    return {"name": "demo", "seed": 1, "grpo": {"beta": 0.04, "batch_size": None}, "tracking": t}


def folders(run_dir):
    return sorted((run_dir / "wandb").glob("*run-*"), key=lambda p: p.stat().st_mtime)


def records(folder):
    """The records in the file of a run, as `wandb leet inspect` shows them, without starting the wandb command."""
    (file,) = folder.glob("run-*.wandb")
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", file, folder.parent]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
    return [json.loads(line) for line in lines]


def history(read):
    """The history rows without wandb's own keys."""
    items = [record["history"]["item"] for record in read if record["type"] == "history"]
    return [{key: value for key, value in item.items() if not key.startswith("_")} for item in items]


def exit_codes(read):
    return [record["exit"].get("exit_code", 0) for record in read if record["type"] == "exit"]


def messages(caplog):
    return [r.getMessage() for r in caplog.records if r.name == module.__name__ and r.levelno >= logging.WARNING]


def run_python(code, run_dir, mode, *arguments, **env):
    """Exit code, stdout and stderr of a script that gets a config, a run folder and more arguments."""
    # Into files, since a stopped wandb process would keep pipes open.
    with open("stdout", "w+") as stdout, open("stderr", "w+") as stderr:
        command = [sys.executable, "-c", code, json.dumps(config(mode)), str(run_dir), *arguments]
        done = subprocess.run(command, env=os.environ | env, stdout=stdout, stderr=stderr, timeout=40)
    return done.returncode, Path("stdout").read_text(), Path("stderr").read_text()


def test_an_offline_run_writes_every_row_inside_the_run_folder_and_prints_nothing(run_dir, capfd):
    stdout, hooks = sys.stdout, (sys.exit, sys.excepthook)
    with tracking(config(), run_dir, resumed=False) as tracker:
        for row in ROWS:
            tracker.log(row)
        assert sys.stdout is stdout
        tracker.set_summary({"best_reward": 1.5})
    (folder,) = folders(run_dir)
    read = records(folder)
    assert history(read) == SHOWN
    assert exit_codes(read) == [0]
    run = next(record["run"] for record in read if record["type"] == "run")
    sent = {k: v for k, v in run["config"]["update"].items() if k != "_wandb"}
    assert sent == config()
    assert (run["display_name"], run["project"]) == ("demo/2026-01-01_00-00-00", "p")
    assert (run["run_group"], run["job_type"], run["tags"]) == ("g", "train", ["a", "b"])
    assert any(record.get("summary", {}).get("update", {}).get("best_reward") == 1.5 for record in read)
    (metric,) = [record["metric"] for record in read if record["type"] == "metric"]
    assert (metric["glob_name"], metric["step_metric"]) == ("*", "step")
    assert tracker.how_to_look == [f"look at the run: wandb leet {folder}", f"upload it: wandb sync {folder}"]
    command = [sys.executable, "-m", "wandb", "leet", "inspect", str(folder), "--summary", "--json"]
    shown = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=30).stdout)
    assert (shown["state"], shown["step"]) == ("finished", 5)
    assert capfd.readouterr() == ("", "")
    assert (sys.exit, sys.excepthook) == hooks
    assert list(Path.cwd().iterdir()) == []
    assert {p.name for p in run_dir.iterdir()} == {"wandb", "wandb_run_id"}
    assert list((run_dir / "wandb").iterdir()) == [folder]


def test_a_resumed_offline_run_has_the_whole_history_in_one_folder(run_dir):
    with tracking(config(), run_dir, resumed=False) as tracker:
        for row in ROWS[:3]:
            tracker.log(row)
    with tracking(config(), run_dir, resumed=True, rows=ROWS[:2]) as tracker:
        for row in ROWS[2:]:
            tracker.log(row)
    _, second = folders(run_dir)
    assert history(records(second)) == SHOWN
    assert run_ids(run_dir) == {(run_dir / "wandb_run_id").read_text().strip()}  # one W&B run


def run_ids(run_dir):
    """The IDs in the files that wandb wrote."""
    read = [record for folder in folders(run_dir) for record in records(folder)]
    return {record["run"]["run_id"] for record in read if record["type"] == "run"}


@pytest.mark.parametrize("variable", ["WANDB_RUN_ID", "WANDB_RESUME"])
def test_each_folder_has_its_own_id_whatever_the_environment_says(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, {"WANDB_RUN_ID": "fixed", "WANDB_RESUME": "auto"}[variable])
    ids = set()
    for job in ("0_a", "1_b"):
        (tmp_path / job).mkdir()
        for resumed in (False, True):
            with tracking(config(), tmp_path / job, resumed=resumed) as tracker:
                tracker.log(ROWS[0])
        (own,) = run_ids(tmp_path / job)
        ids.add(own)
    assert len(ids) == 2 and "fixed" not in ids


def run_record(run_dir, **settings):
    """What an offline run with these settings of the config tells the server about itself."""
    with tracking(config(**settings), run_dir, resumed=False):
        pass
    return next(record["run"] for record in records(folders(run_dir)[-1]) if record["type"] == "run")


NULL = {"project": None, "entity": None, "group": None, "tags": []}


def test_what_the_config_leaves_open_is_taken_from_the_settings_of_wandb(run_dir, monkeypatch, tmp_path):
    assert run_record(run_dir, **NULL)["project"] == "grpo"
    (Path.cwd() / "wandb").mkdir()
    (Path.cwd() / "wandb" / "settings").write_text("[default]\nproject = of-wandb-init\nentity = team\n")
    run = run_record(run_dir, **NULL)
    assert (run["project"], run["entity"]) == ("of-wandb-init", "team")
    own = {
        "PROJECT": "p2",
        "ENTITY": "e2",
        "RUN_GROUP": "g2",
        "TAGS": "t1,t2",
        "NAME": "n2",
        "DIR": str(tmp_path / "w"),
    }
    (tmp_path / "w").mkdir()
    for name, value in own.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    with tracking(config(**NULL), run_dir, resumed=False):
        pass
    (folder,) = (tmp_path / "w" / "wandb").glob("offline-run-*")
    run = next(record["run"] for record in records(folder) if record["type"] == "run")
    assert [run[key] for key in ("project", "entity", "run_group", "tags", "display_name")] == [
        "p2", "e2", "g2", ["t1", "t2"], "n2",
    ]  # fmt: skip


def test_the_config_has_precedence_over_the_environment(run_dir, monkeypatch):
    for name in ("PROJECT", "ENTITY", "RUN_GROUP", "TAGS", "NAME", "JOB_TYPE"):
        monkeypatch.setenv(f"WANDB_{name}", "other")
    run = run_record(run_dir, name="mine", entity="e")
    assert [run[key] for key in ("project", "entity", "run_group", "tags", "display_name", "job_type")] == [
        "p", "e", "g", ["a", "b"], "mine", "train",
    ]  # fmt: skip


def test_labels_that_are_longer_than_the_server_accepts_are_shortened_and_stay_different(run_dir):
    long = "x" * 200
    run = run_record(run_dir, name=long, group=long, job_type=long, tags=[f"{long}1", f"{long}2", "", "short"])
    assert (len(run["display_name"]), len(run["run_group"]), len(run["job_type"])) == (128, 128, 64)
    assert [len(tag) for tag in run["tags"]] == [64, 64, 5]
    assert shorten("y" * 128, 128) == "y" * 128
    assert len({shorten(f"{long}{number}", 128) for number in range(3)}) == 3


def test_two_runs_in_one_process_are_separate(tmp_path):
    for job in ("0_a", "1_b"):
        (tmp_path / job).mkdir()
        with tracking(config(), tmp_path / job, resumed=False) as tracker:
            tracker.log({"step": 1, "job": job})
    read = [records(*folders(tmp_path / job)) for job in ("0_a", "1_b")]
    assert [history(r) for r in read] == [[{"step": 1, "job": "0_a"}], [{"step": 1, "job": "1_b"}]]
    assert wandb.run is None


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("boom"), 1), (KeyboardInterrupt(), 130), (SystemExit(143), 143), (SystemExit(0), 1)]
)
def test_an_exception_marks_the_run_as_failed_and_propagates(run_dir, error, code):
    with pytest.raises(type(error)) as caught, tracking(config(), run_dir, resumed=False) as tracker:
        tracker.log(ROWS[0])
        raise error
    assert caught.value is error
    read = records(*folders(run_dir))
    assert exit_codes(read) == [code]
    assert history(read) == SHOWN[:1]


def test_evaluations_are_logged_in_the_row_of_their_step_and_late_ones_are_kept(run_dir):
    with tracking(config(), run_dir, resumed=False) as tracker:
        tracker.log_evaluation("before", 0, {"test/accuracy": 0.1, "test/n": 8})
        for row in ROWS[:2]:
            tracker.log(row)
        tracker.log_evaluation("during", 2, {"test/accuracy": 0.2, "test/n": 8})
        tracker.log(ROWS[2])
        tracker.log_evaluation("after", 2, {"test/accuracy": 0.3, "test/n": 8})
    read = records(*folders(run_dir))
    assert history(read) == [
        {"step": 0, "test/accuracy": 0.1, "test/n": 8},
        SHOWN[0],
        SHOWN[1] | {"test/accuracy": 0.2, "test/n": 8},
        SHOWN[2] | {"test/accuracy": 0.3, "test/n": 8},
    ]
    summary = {}
    for record in read:
        summary |= record.get("summary", {}).get("update", {})
    assert [summary[f"eval/{name}/accuracy"] for name in ("before", "during", "after")] == [0.1, 0.2, 0.3]


def test_completions_are_one_table_of_at_most_64_rows(run_dir):
    rows = [{"step": 2, "prompt": "p", "completion": f"c{i}", "answer": i if i % 2 else "x"} for i in range(70)]
    rows[0]["advantage"] = -0.5
    with tracking(config(), run_dir, resumed=False) as tracker:
        tracker.log(ROWS[0])
        tracker.log(ROWS[1])
        tracker.log_completions(2, rows)
        tracker.log_completions(3, rows[:1])
    (folder,) = folders(run_dir)
    _, second, third = history(records(folder))
    assert second["step"] == 2 and second["loss"] == 0.5 and third["step"] == 3
    assert (second["completions.nrows"], third["completions.nrows"]) == (64, 1)
    table = json.loads((folder / "files" / second["completions.path"]).read_text())
    assert table["columns"] == ["step", "prompt", "completion", "answer", "advantage"]
    assert table["data"][:2] == [[2, "p", "c0", "x", -0.5], [2, "p", "c1", 1, None]]


def test_disabled_imports_no_wandb(run_dir):
    code = """
import json, sys
from pathlib import Path
from grpo.runs.tracking import tracking
with tracking(json.loads(sys.argv[1]), Path(sys.argv[2]), resumed=False, rows=[{"step": 1}]) as tracker:
    tracker.log({"step": 2})
    tracker.log_completions(2, [{"step": 2}])
    tracker.log_evaluation("before", 2, {"test/accuracy": 1.0})
    tracker.set_summary({"a": 1})
    assert tracker.how_to_look == []
assert "wandb" not in sys.modules
"""
    for mode in ("disabled", "auto"):
        assert run_python(code, run_dir, mode, WANDB_MODE="disabled") == (0, "", "")
    assert list(run_dir.iterdir()) == []


def test_auto_goes_online_only_with_a_login(run_dir, init_arguments, monkeypatch, capfd):
    def modes():
        with tracking(config("auto"), run_dir, resumed=False):
            pass
        return init_arguments[-1]["mode"]

    assert modes() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    assert modes() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert modes() == "offline"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY")
    assert modes() == "offline"
    netrc = Path.home() / ".netrc"
    netrc.write_text(f"machine {wandb.Settings().base_url.split('//')[1]}\n  login user\n  password {API_KEY}\n")
    netrc.chmod(0o600)
    assert modes() == "online"
    assert capfd.readouterr() == ("", "")


def test_online_without_login_warns_and_continues_offline(run_dir, caplog):
    with tracking(config("online"), run_dir, resumed=False) as tracker:
        tracker.log(ROWS[0])
    (warning,) = messages(caplog)
    assert "not logged in" in warning
    assert history(records(*folders(run_dir))) == SHOWN[:1]


def test_a_new_online_run_never_takes_over_another_one_and_is_resumed_by_its_id(run_dir, init_arguments, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    id_file = run_dir / "wandb_run_id"
    seen = []
    init = wandb.init

    def look_at_id_file(**kwargs):
        seen.append(id_file.read_text().strip())
        return init(**kwargs)

    monkeypatch.setattr(wandb, "init", look_at_id_file)
    for resumed in (False, True):
        with tracking(config("online", entity="e"), run_dir, resumed=resumed):
            pass
    id_file.unlink()
    with tracking(config("online"), run_dir, resumed=True):
        pass
    assert [call["resume"] for call in init_arguments] == ["never", "allow", "never"]
    first, again, fresh = seen
    assert [call["id"] for call in init_arguments] == [first, again, fresh]
    assert first == again != fresh
    expected = {"project": "p", "entity": "e", "group": "g", "job_type": "train", "tags": ["a", "b"]}
    expected |= {"name": "demo/2026-01-01_00-00-00", "dir": str(run_dir), "mode": "online"}
    assert {key: init_arguments[0][key] for key in expected} == expected
    settings = init_arguments[0]["settings"]
    assert settings.console == "off" and not settings.symlink and settings.finish_timeout > 0


def test_with_an_unreachable_server_the_data_is_kept_offline_in_bounded_time(run_dir, caplog, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    begin = time.monotonic()
    with tracking(config("auto", init_timeout=8.0), run_dir, resumed=False) as tracker:
        assert time.monotonic() - begin < 8.5
        tracker.log(ROWS[0])
    (warning,) = messages(caplog)
    assert "Continuing offline" in warning
    assert history(records(folders(run_dir)[-1])) == SHOWN[:1]
    assert run_ids(run_dir) == {(run_dir / "wandb_run_id").read_text().strip()}  # for a later launch that is online
    assert capfd.readouterr() == ("", "")


def test_a_failed_online_resume_keeps_the_id_and_writes_all_rows_offline(run_dir, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    (run_dir / "wandb_run_id").write_text("abc123\n")
    init = wandb.init

    def no_such_run(**kwargs):
        if kwargs["mode"] == "online":
            raise wandb.errors.UsageError("run abc123\ndoes not exist")
        return init(**kwargs)

    monkeypatch.setattr(wandb, "init", no_such_run)
    with tracking(config("online"), run_dir, resumed=True, rows=ROWS[:4]) as tracker:
        tracker.log(ROWS[4])
    assert messages(caplog) == ["W&B: no online run (UsageError: run abc123 does not exist). Continuing offline."]
    assert history(records(*folders(run_dir))) == SHOWN
    assert (run_dir / "wandb_run_id").read_text() == "abc123\n"


@pytest.mark.parametrize("mode", ["offline", "online"])
@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_init_that_fails_never_stops_training(run_dir, caplog, monkeypatch, mode, fault):
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    never = threading.Event()

    def bad_init(**kwargs):
        if fault == "hangs":
            never.wait(60)
        raise SystemExit(1)

    monkeypatch.setattr(wandb, "init", bad_init)
    begin, steps = time.monotonic(), 0
    with tracking(config(mode, init_timeout=2.0), run_dir, resumed=False, rows=ROWS) as tracker:
        for row in ROWS:
            tracker.log(row)
            steps += 1
    assert steps == 5 and time.monotonic() - begin < 4
    assert tracker.how_to_look == []
    assert len(messages(caplog)) == (1 if mode == "offline" else 2)


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_log_that_fails_gives_one_warning(run_dir, caplog, monkeypatch, fault):
    monkeypatch.setattr(module, "LOG_SECONDS", 0.5)
    never = threading.Event()
    log = wandb.Run.log

    def bad_log(self, data, step):
        if step < 3:
            return log(self, data, step=step)
        if fault == "hangs":
            never.wait(60)
        raise OSError("broken pipe")

    monkeypatch.setattr(wandb.Run, "log", bad_log)
    begin = time.monotonic()
    with tracking(config(), run_dir, resumed=False) as tracker:
        for row in ROWS:
            tracker.log(row)
        tracker.log_evaluation("after", 5, {"test/accuracy": 1.0})
    assert time.monotonic() - begin < 8
    (warning,) = messages(caplog)
    assert "logging failed" in warning and "wandb sync" in warning
    read = records(*folders(run_dir))
    assert history(read) == SHOWN[:2]
    assert exit_codes(read) == [0]


def test_table_that_fails_loses_only_the_tables(run_dir, caplog, monkeypatch):
    """Online, wandb contacts the server before it accepts a table. Without a network this raises; metrics do not."""

    def bad_table(**kwargs):
        raise wandb.errors.AuthenticationError("no network")

    monkeypatch.setattr(wandb, "Table", bad_table)
    with tracking(config(), run_dir, resumed=False) as tracker:
        for row in ROWS:
            tracker.log(row)
            tracker.log_completions(row["step"], [{"completion": "c"}])
    (warning,) = messages(caplog)
    assert "AuthenticationError: no network" in warning
    assert history(records(*folders(run_dir))) == SHOWN


@pytest.mark.skipif(sys.platform != "linux", reason="finds wandb's process in /proc")
@pytest.mark.parametrize(
    ("fault", "steps", "failed"), [("SIGSTOP", 2000, "logging"), ("SIGSTOP", 0, "finishing"), ("SIGKILL", 2000, "")]
)
def test_wandb_process_that_stops_or_dies_delays_neither_training_nor_exit(run_dir, fault, steps, failed):
    code = """
import json, os, signal, sys
from contextlib import suppress
from pathlib import Path
import grpo.runs.tracking as module
module.FINISH_SECONDS = module.TEARDOWN_SECONDS = module.LOG_SECONDS = 1.0
with module.tracking(json.loads(sys.argv[1]), Path(sys.argv[2]), resumed=False) as tracker:
    tracker.log({"step": 1})
    found = []
    for file in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):  # a process that has ended meanwhile
            status = file.read_text()
            if "Name:\\twandb-core\\n" in status and f"PPid:\\t{os.getpid()}\\n" in status:
                found.append(int(file.parent.name))
    (core,) = found
    print(core, flush=True)
    os.kill(core, getattr(signal, sys.argv[3]))
    for step in range(2, 2 + int(sys.argv[4])):
        tracker.log({"step": step, "text": "x" * 1000})
print("trained")
"""
    begin = time.monotonic()
    exit_code, stdout, stderr = run_python(code, run_dir, "offline", fault, str(steps))
    seconds = time.monotonic() - begin
    core = stdout.split()[0] if stdout else ""
    if fault == "SIGSTOP" and core:
        os.kill(int(core), signal.SIGKILL)
    assert (exit_code, stdout) == (0, f"{core}\ntrained\n"), stderr
    assert seconds < 20
    assert len(stderr.splitlines()) == 1 and f"W&B: {failed}" in stderr


def test_offline_run_contacts_no_server(run_dir):
    requests = []

    class Server(http.server.BaseHTTPRequestHandler):
        def handle(self):
            requests.append(self.client_address)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """
import json, sys
from pathlib import Path
from grpo.runs.tracking import tracking
with tracking(json.loads(sys.argv[1]), Path(sys.argv[2]), resumed=False) as tracker:
    tracker.log({"step": 1})
"""
    url = f"http://127.0.0.1:{server.server_port}"
    assert run_python(code, run_dir, "offline", WANDB_BASE_URL=url) == (0, "", "")
    server.shutdown()
    assert requests == []
