"""Ends the process that started this script if a call in it holds the interpreter lock for too long.

Python code of that process, in any thread, cannot do so, since the call keeps it from running. The process writes a
line of JSON at the start of a call (`limit`: seconds, `error`, and `status`: a status.json or null), `beat` as long as
its other threads run, and `end`. This script only imports from the standard library, so that it starts quickly.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

TICK_S = 0.25


def main() -> None:
    """Read lines until the process ends, or end it."""
    process = int(sys.argv[1])  # it may have ended before this line
    call: dict[str, Any] | None = None
    silent_s = 0.0
    while os.getppid() == process:
        started = time.monotonic()
        if select.select([0], [], [], TICK_S)[0]:
            lines = os.read(0, 1 << 16).splitlines()
            if not lines:
                return
            silent_s = 0.0
            last = [line for line in lines if line != b"beat"][-1:]
            call = call if not last else None if last == [b"end"] else json.loads(last[0])
        elif call is not None and not is_stopped(process):
            silent_s += min(time.monotonic() - started, 2 * TICK_S)  # not the time for which this process was stopped
            if silent_s > call["limit"]:
                os.kill(process, signal.SIGKILL)
                report(call)
                return


def is_stopped(process: int) -> bool:
    """Whether a process is stopped (SIGSTOP, Ctrl-Z)."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except OSError:  # not on Linux
        command = ["ps", "-o", "state=", "-p", str(process)]
        state = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return state[:1] in ("T", "t")


def report(call: dict[str, Any]) -> None:
    """Print why the process was ended, and write it to its status.json."""
    print(f"failed: {call['error']}", file=sys.stderr, flush=True)
    if call["status"] is None:
        return
    with open(call["status"], encoding="utf-8") as file:
        status = json.load(file)
    temporary = f"{call['status']}.watchdog"
    with suppress(FileNotFoundError):
        os.unlink(temporary)  # left over; never written through, since it may be a link
    with open(temporary, "x", encoding="utf-8") as file:
        file.write(json.dumps(status | {"state": "failed", "error": call["error"]}, indent=2) + "\n")
    os.replace(temporary, call["status"])


if __name__ == "__main__":
    main()
