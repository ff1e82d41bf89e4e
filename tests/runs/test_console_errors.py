"""Output to a console that goes away, or that cannot show every character, never ends a program."""

import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress

import pytest

from tests.launches import ROOT, SHORT, rows, status

PRINTS = """
    import logging, sys, time
    from rich.console import Console
    from grpo.runs.console import ignoring_console_errors

    with ignoring_console_errors():
        logging.basicConfig(stream=sys.stdout)
        print("first", flush=True)
        time.sleep(0.5)
        for _ in range(3):
            print("text" * 5000, flush=True)
            print("text", file=sys.stderr)
            Console().print("[bold]text[/bold]")
            logging.warning("text")
        print("not flushed")
    open("finished", "w", encoding="utf-8").close()
"""


def python(text, cwd, *shell, **options):
    """Start a Python program with its standard streams redirected in a shell."""
    command = [sys.executable, "-c", textwrap.dedent(text)]
    if shell:
        command = ["sh", "-c", f'exec "$@" {" ".join(shell)}', "sh", *command]
    return subprocess.Popen(command, cwd=cwd, **options, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize(
    "shell", [">&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full", ">/dev/full 2>&1"], ids=lambda shell: shell
)
def test_a_program_whose_output_is_closed_or_full_ends_well(tmp_path, shell):
    assert python(PRINTS, tmp_path, shell, stderr=subprocess.DEVNULL).wait() == 0
    assert (tmp_path / "finished").read_bytes() == b""  # nothing was printed into a file that the program opened


def test_a_program_whose_reader_has_ended_ends_well(tmp_path):
    process = python(PRINTS, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    process.stderr.close()
    assert process.wait() == 0
    assert (tmp_path / "finished").exists()


def test_a_program_whose_terminal_was_closed_ends_well(tmp_path):
    ours, terminal = pty.openpty()
    process = python(PRINTS, tmp_path, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    assert os.read(ours, 5) == b"first"
    os.close(ours)
    assert process.wait() == 0
    assert (tmp_path / "finished").exists()


def test_a_console_that_takes_text_slowly_gets_all_of_it(tmp_path):
    """Another program may have set a shared terminal or pipe to non-blocking."""
    prints = """
        import os
        from grpo.runs.console import ignoring_console_errors
        os.set_blocking(1, False)
        with ignoring_console_errors():
            print("x" * 1_000_000)
    """
    process = python(prints, tmp_path, stdout=subprocess.PIPE)
    assert len(process.stdout.read()) == 1_000_001
    assert process.wait() == 0


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_characters_that_the_console_lacks_are_printed_as_escapes(tmp_path, encoding):
    prints = """
        import sys
        from grpo.runs.console import ignoring_console_errors
        with ignoring_console_errors():
            print("\\u20ac 1")
            print("\\udc80", file=sys.stderr)
    """
    command = [sys.executable, "-c", textwrap.dedent(prints)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert done.stdout == ("€ 1\n".encode() if encoding == "utf-8" else b"\\u20ac 1\n")
    assert done.stderr == b"\\udc80\n"


def test_streams_without_a_file_are_kept(capsys):
    from grpo.runs.console import ignoring_console_errors

    with ignoring_console_errors():
        print("seen")
    assert capsys.readouterr().out == "seen\n"


@pytest.mark.slow
def test_a_run_whose_reader_ends_after_one_line_is_completed(tmp_path):
    command = [sys.executable, str(ROOT / "launch.py"), *SHORT, "grpo.num_steps=2", "run_dir=run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout.readline() == b"run folder run\n"
    process.stdout.close()
    assert process.wait() == 0
    assert status(tmp_path / "run")["state"] == "finished"
    assert len(rows(tmp_path / "run")) == 2


@pytest.mark.slow
def test_a_sweep_whose_terminal_is_closed_saves_its_job(tmp_path):
    ours, terminal = pty.openpty()
    command = [sys.executable, str(ROOT / "launch.py"), "-m", *SHORT, "grpo.num_steps=400", "seed=1,2", "sweep_dir=s"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
    )
    os.close(terminal)
    os.set_blocking(ours, False)
    while not any(map(rows, tmp_path.glob("s/0_*"))):
        with suppress(BlockingIOError):
            os.read(ours, 4096)
        time.sleep(0.05)
    os.close(ours)
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(120) == 129
    (job,) = tmp_path.glob("s/0_*")
    state = status(job)
    assert (state["state"], state["saved_step"]) == ("interrupted", state["step"])
