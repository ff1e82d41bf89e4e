"""Weights & Biases tracking that cannot stop training and delays it only for a limited time.

A run folder is one W&B run, whose ID is in the file wandb_run_id, however often and in whichever mode it is resumed.
Each offline launch writes the whole history, so that it is enough to upload the newest of its folders.

Every call into wandb runs in a separate thread with a time limit. After the first call that raises or times out, a
warning is logged and tracking ends; metrics.jsonl and samples/ contain all data in any case. At the end of the `with`
block, wandb is shut down in this process, so that the jobs of a sweep are separate runs.
"""

import hashlib
import importlib
import logging
import os
import queue
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from grpo.config.errors import FileError
from grpo.config.reading import read_file
from grpo.runs.files import write_atomic

logger = logging.getLogger(__name__)

LOG_SECONDS = 20.0  # for logging one row; wandb only queues it, usually in about a millisecond
FINISH_SECONDS = 30.0  # for uploading the remaining data at the end
TEARDOWN_SECONDS = 5.0  # for wandb's background process to end
MAX_TABLE_ROWS = 64
DEFAULT_PROJECT = "grpo"  # if neither the config nor W&B's own settings name one
# Maximum lengths, in characters, that the server accepts. Offline runs with longer ones cannot be uploaded.
MAX_LENGTHS = {"name": 128, "group": 128, "job_type": 64, "tags": 64}


class Tracker:
    """Logs to one W&B run. Without a run, or after the first failure, every method does nothing.

    `how_to_look` has lines of text about where to view the run. No method raises an exception from wandb.
    """

    def __init__(self, run: Any = None):
        """`run` is an open wandb run, or None for no tracking."""
        self.how_to_look: list[str] = []
        self._run = run
        self._usable = self._takes_tables = run is not None  # until something fails
        self._responds = True  # until a call times out
        self._open_step = 0  # the first step that W&B still accepts; it drops data for earlier ones
        if run is not None:
            self._open_step = run.starting_step
            folder = shlex.quote(str(run.sync_dir))
            self._upload_line = f"upload it: wandb sync {folder}"
            look = f"look at the run: {f'wandb leet {folder}' if run.offline else run.url}"
            self.how_to_look = [look, self._upload_line] if run.offline else [look]

    def log(self, row: Mapping[str, Any]) -> None:
        """Log one step's metrics. `row` holds "step"; values that are None are omitted."""
        step = row["step"]
        self._open_step = max(step, self._open_step)
        values = {key: value for key, value in row.items() if value is not None}
        self._do("logging", lambda: self._run.log(values, step=step))

    def log_completions(self, step: int, rows: list[dict]) -> None:
        """Log the first 64 completions of a step as the table "completions"; the keys of `rows` are its columns."""
        rows = rows[:MAX_TABLE_ROWS]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[row.get(column) for column in columns] for row in rows]
        self._open_step = step = max(step, self._open_step)

        def log_table() -> None:
            # A column may hold numbers in one row and text in the next (answers), which a typed table rejects.
            table = importlib.import_module("wandb").Table(columns=columns, data=data, allow_mixed_types=True)
            self._run.log({"step": step, "completions": table}, step=step)

        # Online, wandb sends a request to the server before it accepts a table, whereas it only queues metrics. So a
        # temporary loss of the network must end only the logging of tables.
        _, error = _attempt(LOG_SECONDS, log_table) if self._usable and self._takes_tables else (None, None)
        if error is not None:
            logger.warning("W&B: logging completions failed (%s). No more tables are sent.", _one_line(error))
            self._takes_tables = False

    def log_evaluation(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """Log an evaluation after `step` steps, with `values` such as {"test/accuracy": 0.7, "test/reward": 1.9}.

        The values are logged to the history, in the row of that step, and to the summary as eval/<name>/accuracy, ...,
        for comparing runs. If W&B has already closed the step (after a crash it may be ahead of the checkpoint), it
        would drop the values, so they are logged at the first step that is open.
        """
        self.log({**values, "step": max(step, self._open_step)})
        self.set_summary({f"eval/{name}/{key.partition('/')[2]}": value for key, value in values.items()})

    def alert(self, title: str, text: str) -> None:
        """Send an alert, which W&B forwards by mail or chat according to the user's settings there."""
        self._do("an alert", lambda: self._run.alert(title=title, text=text, level="WARN"))

    def set_summary(self, values: Mapping[str, Any]) -> None:
        """Set values in the summary of the run."""
        self._do("writing the summary", lambda: self._run.summary.update(dict(values)))

    def replay(self, rows: Iterable[Mapping[str, Any]], evaluations: Mapping[str, Mapping[str, Any]]) -> None:
        """Log the data of earlier launches that the W&B run does not have: all of it if the W&B run is new.

        evaluations: values by name, as for `log_evaluation`, each with its "step".
        """
        first = self._open_step
        of_step: dict[int, list[str]] = {}
        for name, values in evaluations.items():
            of_step.setdefault(values["step"], []).append(name)
        by_step = {row["step"]: row for row in rows}
        for step in sorted(by_step.keys() | of_step.keys()):
            if step >= first:
                if step in by_step:
                    self.log(by_step[step])
                for name in of_step.get(step, []):
                    self.log_evaluation(name, step, {k: v for k, v in evaluations[name].items() if k != "step"})

    def close(self, exit_code: int) -> None:
        """Finish the run, marked as failed if `exit_code` is not 0, and shut down wandb in this process."""
        if self._run is None:
            return
        if self._responds:
            self._note("finishing", _attempt(FINISH_SECONDS, lambda: self._run.finish(exit_code))[1])
        self._usable = False
        _teardown(exit_code, TEARDOWN_SECONDS)

    def _do(self, doing: str, call: Callable[[], Any]) -> None:
        if self._usable:
            self._note(doing, _attempt(LOG_SECONDS, call)[1])

    def _note(self, doing: str, error: BaseException | None) -> None:
        if error is not None and self._usable:
            text = "W&B: %s failed (%s). Nothing more is tracked; what W&B has is on disk, %s"
            logger.warning(text, doing, _one_line(error), self._upload_line)
            self.how_to_look = list(dict.fromkeys([*self.how_to_look, self._upload_line]))
            self._usable, self._responds = False, not isinstance(error, TimeoutError)


@contextmanager
def tracking(
    cfg: Mapping[str, Any],
    run_dir: Path,
    *,
    resumed: bool,
    rows: Iterable[Mapping[str, Any]] = (),
    evaluations: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Iterator[Tracker]:
    """Track one training run with the settings in `cfg["tracking"]`. wandb writes its files to `run_dir`/wandb.

    `cfg` is the resolved config as plain dicts, and is sent to W&B. mode=auto is online for a user who is logged in,
    else offline; if an online run cannot start, the run continues offline. `rows` and `evaluations` (by name) are those
    of earlier launches. Opening takes at most `init_timeout` seconds. An exception inside the block marks the run as
    failed and propagates.
    """
    hooks = sys.exit, sys.excepthook
    tracker = _open(cfg, Path(run_dir).absolute(), resumed)
    exit_code = 0
    try:
        tracker.replay(rows, evaluations)
        yield tracker
    except BaseException as error:
        exit_code = _exit_code(error)
        raise
    finally:
        tracker.close(exit_code)
        # wandb wraps both whenever it starts its background process, and never restores them.
        sys.exit, sys.excepthook = hooks


def _open(cfg: Mapping[str, Any], run_dir: Path, resumed: bool) -> Tracker:
    mode, seconds = cfg["tracking"]["mode"], cfg["tracking"]["init_timeout"]
    if mode == "disabled" or (mode == "auto" and os.environ.get("WANDB_MODE") == "disabled"):
        return Tracker()
    # Otherwise wandb sends usage statistics, also from offline runs, and delays the exit by 20 s on a bad network.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    deadline = time.monotonic() + seconds
    try:
        identity = _identity(run_dir, resumed)
    except (OSError, FileError) as damage:
        logger.warning("W&B: no run (%s). Nothing is tracked.", _one_line(damage))
        return Tracker()
    if mode != "offline":
        reserve = min(10.0, seconds / 2)  # so that an online start that hangs leaves time to start offline
        tracker, error = _open_online(cfg, run_dir, seconds - reserve, identity)
        if tracker is not None:
            return tracker
        if error is not None:
            logger.warning("W&B: no online run (%s). Continuing offline.", _one_line(error))
            _teardown(1, reserve / 2)
        elif mode == "online":
            logger.warning("W&B: not logged in, or switched off by WANDB_MODE. Continuing offline; see `wandb login`.")
    start = partial(_init, cfg, run_dir, "offline", seconds, **identity)
    tracker, error = _attempt(deadline - time.monotonic(), lambda: Tracker(start()))
    if error is not None:
        logger.warning("W&B: no run (%s). Nothing is tracked.", _one_line(error))
        _teardown(1, 0.1)
    return tracker or Tracker()


def _identity(run_dir: Path, resumed: bool) -> dict[str, str]:
    """The ID of the W&B run of this folder, a new one for a new run, and how wandb uses it."""
    id_file = run_dir / "wandb_run_id"
    known = read_file(id_file, most=1000).decode(errors="replace").strip() if resumed and id_file.exists() else ""
    run_id = known or uuid.uuid4().hex[:12]
    write_atomic(id_file, run_id + "\n")  # before the run exists, so that a crash cannot lose its ID
    # A run that was offline so far is not on the server yet: allow creates it there. A new run never continues another.
    return {"id": run_id, "resume": "allow" if known else "never"}


def _open_online(cfg: Mapping[str, Any], run_dir: Path, seconds: float, identity: Mapping[str, str]) -> tuple:
    """The online run of this folder, new or resumed, and the error; both None if no user is logged in."""

    def start() -> Tracker | None:
        if not _silent_wandb().login(prompt=False, verify=False):
            return None
        return Tracker(_init(cfg, run_dir, "online", seconds, **identity))

    return _attempt(seconds, start)


def _silent_wandb() -> Any:
    """Import wandb without output or a prompt for a key on the terminal; `login` then needs no network."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    return wandb


def _init(cfg: Mapping[str, Any], run_dir: Path, mode: str, seconds: float, **identity: str) -> Any:
    """A new wandb run. Raises what wandb raises."""
    wandb = _silent_wandb()
    settings = wandb.Settings(
        console="off",
        symlink=False,
        use_dot_wandb=False,
        init_timeout=0.9 * seconds,  # so that wandb stops by itself before `_attempt` times out
        finish_timeout=0.9 * FINISH_SECONDS,
        finish_timeout_raises=True,
    )
    run = wandb.init(
        **_labels(cfg, run_dir),
        project=project_of(cfg["tracking"]["project"]),
        entity=cfg["tracking"]["entity"],
        config=dict(cfg),
        dir=None if "WANDB_DIR" in os.environ else str(run_dir),
        mode=mode,
        reinit="create_new",  # never a run that other code in this process left open
        settings=settings,
        **identity,
    )
    run.define_metric("*", step_metric="step")
    return run


def project_of(project: str | None) -> str:
    """The project of a config. null: that of WANDB_PROJECT or `wandb init`, or else DEFAULT_PROJECT."""
    return project or _silent_wandb().setup().settings.project or DEFAULT_PROJECT


def _labels(cfg: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """Name, group, job type and tags as the server accepts them; None: W&B's own setting, such as WANDB_RUN_GROUP."""
    settings = cfg["tracking"]
    name = settings.get("name") or os.environ.get("WANDB_NAME") or f"{cfg['name']}/{run_dir.name}"
    labels = {"name": name, "group": settings["group"], "job_type": settings["job_type"]}
    shortened = {key: text and shorten(text, MAX_LENGTHS[key]) for key, text in labels.items()}
    tags = dict.fromkeys(shorten(tag, MAX_LENGTHS["tags"]) for tag in settings["tags"] if tag)
    return {**shortened, "tags": list(tags) or None}


def shorten(text: str, length: int) -> str:
    """The text if it has at most `length` characters, else its start and a hash, so that different texts differ."""
    return text if len(text) <= length else f"{text[: length - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _teardown(exit_code: int, seconds: float) -> None:
    """End wandb's background process and clear its state, waiting at most `seconds` for it."""
    _attempt(seconds, lambda: importlib.import_module("wandb").teardown(exit_code))


def _attempt(seconds: float, call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """Run `call` in a thread. Returns its result and its error, one of which is None.

    After `seconds`, the error is TimeoutError, and the thread is abandoned.
    """
    outcome: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((call(), None))
        except BaseException as error:  # also SystemExit, which wandb raises if its process fails
            outcome.put((None, error))

    threading.Thread(target=work, name="wandb-call", daemon=True).start()
    try:
        return outcome.get(timeout=max(0.0, seconds))
    except queue.Empty:
        return None, TimeoutError(f"no answer within {seconds:.0f} s")


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code != 0:
        return error.code
    return 130 if isinstance(error, KeyboardInterrupt) else 1
