"""Run folders from someone else: they run no code, read no secret, write nowhere else, and block no reader.

Each attack changes a real run folder, and each command reads one. The plain run takes a sample of the table of attacks
and commands, `pytest -m slow tests/test_untrusted.py` a larger one, and `python -m tests.test_untrusted` all of it,
which it writes to docs/untrusted.md.
"""

import functools
import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from grpo.__main__ import main as grpo_main
from grpo.analysis import audit
from grpo.analysis.doctor import find_problems
from grpo.analysis.load import read_config
from grpo.analysis.page import render
from grpo.analysis.run_report import content
from grpo.analysis.summary import summarize
from grpo.config.checks import typed
from grpo.config.errors import ConfigError, FileError
from grpo.config.overrides import Overrides
from grpo.metric_table import component_ranges
from grpo.runs.checkpoint import latest_checkpoint, load_state
from grpo.runs.choice import check_empty
from grpo.runs.folder import RunFolder
from grpo.runs.sweep_folder import SweepFolder
from tests import inject
from tests.launches import ROOT, Launch

OLD = Path(__file__).resolve().parent / "config" / "old_runs" / "version_1"
SECRET = "d0-n0t-te11"
TIMEOUT = 120  # seconds; a command that is blocked never ends

# Commands, each with the run folder that it reads (as `run`) and its arguments.

SMALL = ["grpo.num_steps=1", "grpo.batch_size=2", "grpo.num_generations=2", "grpo.max_completion_length=8"]
SMALL += ["eval.before=false", "eval.after=false", "preflight=false", "tracking.mode=disabled", "hardware.threads=1"]
QUICK = ["experiment=quickstart", *SMALL]
LORA = ["tuning=lora", "model.lora.rank=2", "model.lora.alpha=32", "model.lora.init_from=run/final_model"]
SWEEP = [*QUICK, "-m", "seed=3,4", "resume=true", "sweep_dir=run"]


@dataclass(frozen=True)
class Command:
    kind: str  # the folder in old_runs; `sweep`: a sweep folder with two runs
    arguments: list[str]
    main: Callable = grpo_main


COMMANDS = {
    "resume": Command("full_interrupted", ["resume=true", "run_dir=run"], inject.main),
    "fork": Command("full_finished", ["fork=true", "run_dir=run", "grpo.num_steps=5"], inject.main),
    "evaluate": Command("full_finished", ["evaluate", "run_dir=run", "eval.max_problems=2"]),
    "evaluate a checkpoint": Command("full_interrupted", ["evaluate", "run_dir=run", "eval.max_problems=2"]),
    "evaluate an adapter": Command("lora_finished", ["evaluate", "run_dir=run", "eval.max_problems=2"]),
    "chat": Command("full_interrupted", ["chat", "run_dir=run", "prompt=1 + 1"]),
    "verify": Command("full_interrupted", ["verify", "run_dir=run"]),
    "merge": Command("lora_finished", ["merge", "run_dir=run"]),
    "replay": Command("full_finished", ["replay", "run_dir=run"]),
    "plot": Command("full_finished", ["plot", "run_dir=run"]),
    "report": Command("full_finished", ["report", "run_dir=run"]),
    "dashboard": Command("full_finished", ["dashboard", "run_dir=run", "entity=me"]),
    "train its model": Command("full_finished", [*QUICK, "model.name=run/final_model"], inject.main),
    "train its adapter": Command("lora_finished", [*QUICK, *LORA], inject.main),
    "resume a sweep": Command("sweep", SWEEP, inject.main),
    "report a sweep": Command("sweep", ["report", "sweep_dir=run"]),
    "dashboard of a sweep": Command("sweep", ["dashboard", "sweep_dir=run", "entity=me"]),
}
RUN = (
    "resume",
    "evaluate",
    "evaluate a checkpoint",
    "evaluate an adapter",
    "chat",
    "verify",
    "merge",
    "fork",
    "replay",
)
DISPLAY = ("plot", "report", "dashboard")
ON_SWEEP = tuple(name for name in COMMANDS if "sweep" in name)
ON_RUN = (*RUN, *DISPLAY)

EVIL = "# @package _global_\neval: {accuracy: {_target_: payload.run}}\n"
EVIL_DATA = "_target_: payload.run\nmax_prompt_length: 9\n"
PAYLOAD = """
from pathlib import Path

Path("trace").touch()


def run(*arguments, **settings):
    return [0.0] * 99
"""


class Pickled:
    """An object that leaves a trace when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("trace"),)


# Changes of a run folder.


def put(name, content):
    """Write a file."""

    def change(run):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def config(**values):
    """Set keys of config.yaml; `__` in a name stands for a dot."""

    def change(run):
        file = run / "config.yaml"
        frozen = yaml.safe_load(file.read_text())
        for name, value in values.items():
            *groups, last = name.split("__")
            functools.reduce(lambda node, group: node.setdefault(group, {}), groups, frozen)[last] = value
        file.write_text(yaml.safe_dump(frozen))

    return change


def record(file_name, /, **values):
    """Set keys of a JSON file."""

    def change(run):
        file = run / file_name
        file.parent.mkdir(exist_ok=True)
        content = json.loads(file.read_text()) | values if file.exists() else values
        file.write_text(json.dumps(content))

    return change


def recorded(*lines):
    """Add overrides to those of a sweep."""

    def change(sweep):
        overrides = json.loads((sweep / "sweep.json").read_text())["overrides"]
        record("sweep.json", overrides=[*overrides, *lines])(sweep)

    return change


def link(name, target):
    """Replace a file or a folder by a link to a path next to the working directory."""

    def change(run):
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(target if os.path.isabs(target) else run.parents[1] / target)

    return change


def pipe(name):
    """Replace a file by a pipe, whose reader waits for a writer."""

    def change(run):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)

    return change


def tensors(name, change_all):
    """Change the tensors of a file of each checkpoint, and make the manifest fit to it."""

    def change(run):
        for file in run.glob(f"checkpoints/*/{name}.safetensors"):
            found = load_file(file)
            change_all(found)
            save_file({key: value.contiguous() for key, value in found.items()}, file)
            forge_manifest(file.parent)

    return change


def forge_manifest(checkpoint):
    files = {}
    for file in sorted(checkpoint.iterdir()):
        if file.name != "manifest.json" and file.is_file():
            content = file.read_bytes()
            files[file.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps({"files": files, "reference": None}))


def in_checkpoints(name, content):
    """Write a file of each checkpoint, and make the manifest fit to it. content: bytes, or changed values of JSON."""

    def change(run):
        for folder in run.glob("checkpoints/*"):
            file = folder / name
            if not isinstance(content, bytes):
                file.write_text(json.dumps(json.loads(file.read_text()) | content))
            else:
                file.write_bytes(content)
            forge_manifest(folder)

    return change


def both(*changes):
    def change(run):
        for each in changes:
            each(run)

    return change


def each_first(kind):
    """Change the first tensor with more than one value."""

    def change_all(found):
        name = next(name for name, value in found.items() if value.numel() > 1)
        kind(found, name)

    return change_all


def with_auto_map(run):
    """A model whose config and tokenizer name code in their folder."""
    for name, entry in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        file = run / "final_model" / name
        if file.exists():
            code = {"auto_map": {entry: "payload.Model", "AutoConfig": "payload.Config"}}
            file.write_text(json.dumps(json.loads(file.read_text()) | code))
    put("final_model/payload.py", PAYLOAD)(run)


def with_pickles(run):
    """Pickles beside and in place of the weights, under every name that a library may look for."""
    content = pickle.dumps(Pickled())
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        put(f"final_model/{name}", content)(run)
    for name in ("model.safetensors", "adapter_model.safetensors"):
        (run / "final_model" / name).unlink(missing_ok=True)
    for folder in run.glob("checkpoints/*"):
        (folder / "optimizer.pt").write_bytes(content)


# Attacks. `said` is in the error message of the commands in `refused_by`; the other commands must not be harmed.


@dataclass(frozen=True)
class Attack:
    change: Callable[[Path], None]  # of a run folder; of the sweep folder for `of_sweep`
    said: str = ""
    refused_by: tuple[str, ...] = ()
    of_sweep: bool = False


def with_own_set(run):
    """The folder's evil.yaml as a set to evaluate on, by its path from conf/data/."""
    config(eval__sets=[os.path.relpath(run.resolve() / "evil", ROOT / "conf" / "data")])(run)


def code(said, **values):
    return Attack(config(**values), said, RUN)


INTERPOLATED = "${oc.env:SECRET}"
CALL = "${oc.create:{_target_: payload.run}}"
CONDITIONS = {"_target_": "payload.run"}
SCORER = {"_target_": "grpo.rewards.reasoning_gym.score"}
ATTACKS = {
    # Code.
    "a function": code("asks to run payload.run (objective._target_)", objective___target_="payload.run"),
    "a reward": code("asks to run payload.run", reward__components__x=CONDITIONS),
    "the grader": code("asks to run payload.run (eval.accuracy._target_)", eval__accuracy=CONDITIONS),
    "another grader": code("asks to run payload.run (eval.graders.x._target_)", eval__graders={"x": CONDITIONS}),
    "a data set with a path": Attack(both(put("evil.yaml", EVIL_DATA), with_own_set)),
    "markup in a grader's name": Attack(
        both(
            config(eval__graders={"[/x]": {"_target_": "grpo.rewards.math_xml.strict"}}),
            lambda run: (run / "digests.json").unlink(missing_ok=True),
        )
    ),
    "a nested function": code("asks to run payload.run", optimizer__betas=[{"a": [CONDITIONS]}]),
    "a function of the suite for another key": code(
        "asks to run grpo.algorithm.objective.Objective",
        reward__components__x={"_target_": "grpo.algorithm.objective.Objective"},
    ),
    "a module within a trusted one": code("asks to run", data___target_="grpo.data.problems.json.load"),
    "a loader of a part of a mixture": code(
        "asks to run payload.run (data.parts.x._target_)", data__parts={"x": CONDITIONS}
    ),
    "a loader of another package": code("asks to run", data___target_="grpo.data.reasoning_gym.load", data__task="bf"),
    "a scorer of another package": code(
        "asks to run grpo.rewards.reasoning_gym.score", reward__components__x=SCORER, reward__isolate=False
    ),
    "a function to choose as an advantage": code(
        "asks to run payload.run (objective.advantage)",
        objective={"_target_": "grpo.algorithm.objective.Objective", "advantage": "payload.run"},
    ),
    "a module within torch": code("asks to run", optimizer___target_="torch.optim.adamw.torch.load"),
    "code of a model": code("asks to run code that comes with the model", model__trust_remote_code=True),
    "code of a model in other words": code("asks to run code that comes with", model__trust_remote_code="on"),
    "code of the hub": code("asks to run code of the hub", model__attn_implementation="someone/attention:run"),
    "a target in a setting": Attack(config(data__tags=CALL, optimizer__tags=CALL), "tags", ("evaluate", "resume")),
    "positional arguments": Attack(
        config(optimizer___args_=["payload"], optimizer___partial_=True),
        "settings are passed as they are",
        ("evaluate",),
    ),
    "a target in changes.yaml": Attack(
        put("changes.yaml", "data._target_: payload.run\n"), "asks to run payload.run (data._target_)", RUN
    ),
    "a Python object in config.yaml": Attack(
        put("config.yaml", "a: !!python/object/apply:payload.run []\n"), "config.yaml is not valid YAML", ON_RUN
    ),
    "a Python object in changes.yaml": Attack(
        put("changes.yaml", "a: !!python/name:payload.run\n"), "changes.yaml is not valid YAML", RUN
    ),
    "auto_map": Attack(with_auto_map),
    "pickles": Attack(with_pickles),
    "a chat template": Attack(
        put("final_model/chat_template.jinja", "{{ cycler.__init__.__globals__.os.system('touch trace') }}"),
        "chat template refuses the prompt",
        ("evaluate", "train its model"),
    ),
    "an adapter in a model": Attack(
        both(
            put("final_model/config.json", (OLD / "full_finished" / "final_model" / "config.json").read_bytes()),
            record("final_model/adapter_config.json", peft_type="LORA", r=2, lora_alpha=32, megatron_core="payload"),
        ),
        "holds a model and an adapter",
        ("evaluate", "train its model"),
    ),
    "a module named by an adapter": Attack(
        record(
            "final_model/adapter_config.json",
            megatron_core="payload",
            megatron_config={"a": 1},
            auto_mapping={"parent_library": "payload", "base_model_class": "run"},
            peft_type="LORA",
            r=2,
            lora_alpha=32,
        )
    ),
    "planned jobs": Attack(
        record("sweep.json", planned=[["seed=3", "data._target_=payload.run"], ["seed=4", "data._target_=os.system"]]),
        "has other jobs than its overrides give",
        ("resume a sweep",),
        of_sweep=True,
    ),
    # Secrets.
    "an environment variable": Attack(
        config(tracking__name=INTERPOLATED, tracking__tags=[INTERPOLATED], data__system_prompt=f"a {INTERPOLATED} b")
    ),
    "an environment variable in a name": Attack(config(name=INTERPOLATED), "must not contain ${", ("fork",)),
    "an environment variable in changes.yaml": Attack(put("changes.yaml", f"tracking.group: '{INTERPOLATED}'\n")),
    "an environment variable in a sweep": Attack(
        record("sweep.json", name=INTERPOLATED, state=INTERPOLATED, keys=["seed"]), of_sweep=True
    ),
    "an environment variable in overrides": Attack(
        recorded(f"tracking.name={INTERPOLATED}"),
        "sets tracking.name=",
        ("resume a sweep",),
        of_sweep=True,
    ),
    "an escaped environment variable in overrides": Attack(
        recorded(r"tracking.tags=[$\{oc.env:SECRET\}]"),
        "sets tracking.tags=",
        ("resume a sweep",),
        of_sweep=True,
    ),
    "a config file by its path": Attack(
        both(put("../evil.yaml", EVIL), recorded("tracking=../../../cwd/evil")),
        "sets tracking=",
        ("resume a sweep",),
        of_sweep=True,
    ),
    "a config file with a package, before a harmless choice": Attack(
        both(put("../evil.yaml", EVIL), recorded("+tracking@_global_=../../../cwd/evil", "tracking=disabled")),
        "sets +tracking@_global_=",
        ("resume a sweep",),
        of_sweep=True,
    ),
    "a dict with an environment variable, before a harmless choice": Attack(
        recorded(r"tracking={name:$\{oc.env:SECRET\}}", "tracking=disabled"),
        "sets tracking=",
        ("resume a sweep",),
        of_sweep=True,
    ),
    # Places outside of the folder.
    **{
        f"a link in place of {name}": Attack(link(name, target), "is a link to", ON_RUN)
        for name, target in {
            **dict.fromkeys(("config.yaml", "changes.yaml", "status.json", "status.json.tmp"), "victim/precious.json"),
            **dict.fromkeys(
                ("launches.jsonl", "preflight.json", "summary.json", "digests.json"), "victim/precious.json"
            ),
            **dict.fromkeys(("launch.log", ".lock", ".hydra/config.yaml", "report.html"), "victim/precious.json"),
            **dict.fromkeys(("metrics/metrics.jsonl", "eval/after.json", "plots/loss.png"), "victim/precious.json"),
            **dict.fromkeys(
                ("checkpoints", "checkpoints/best", "final_model", "merged_model", "samples"), "victim/sub"
            ),
            **dict.fromkeys(("skipped", "plots", "eval", "metrics", ".hydra", "wandb"), "victim/sub"),
            **dict.fromkeys((".hydra/resumes", "final_model.tmp", "checkpoints/step_000009.tmp"), "victim/sub"),
            "wandb_run_id": "victim/not there",
        }.items()
    },
    "a link in place of sweep.json": Attack(link("sweep.json", "victim/precious.json"), "is a link to", ON_SWEEP, True),
    "a link in place of sweep.csv": Attack(link("sweep.csv", "victim/precious.json"), "is a link to", ON_SWEEP, True),
    "a link in place of a job": Attack(link("0_seed_3", "victim/sub"), "is a link to", ON_SWEEP, True),
    # Files that block or exhaust their reader.
    **{
        f"a pipe in place of {name}": Attack(pipe(name), "is a pipe", ON_RUN)
        for name in ("config.yaml", "status.json", "launches.jsonl", "metrics/metrics.jsonl", ".lock", "eval/x.json")
    },
    "a pipe in a model": Attack(pipe("final_model/config.json"), "neither a file nor a folder", ("train its model",)),
    "a device": Attack(link("status.json", "/dev/zero"), "is a link to", ON_RUN),
    "a pipe in place of sweep.json": Attack(pipe("sweep.json"), "sweep.json is ", ON_SWEEP, True),
    "expanding aliases": Attack(
        put("config.yaml", "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 30))),
        "config.yaml is not valid YAML: it has an alias",
        ON_RUN,
    ),
    "an alias of itself": Attack(put("config.yaml", "a: &a [*a]\n"), "it has an alias", ON_RUN),
    "a deep config": Attack(put("config.yaml", "a: " + "[" * 60 + "]" * 60), "levels deep", ON_RUN),
    "a large config": Attack(put("config.yaml", f"a: '{'x' * 2**20}'"), "bytes, and at most", ON_RUN),
    "a file of a terabyte": Attack(
        lambda run: os.truncate(run / "status.json", 2**40), "bytes, and at most", ("resume", "evaluate", "report")
    ),
    "a manifest with a device": Attack(
        lambda run: [
            (folder / "manifest.json").write_text(json.dumps({"files": {"/dev/zero": {"size": 0, "sha256": ""}}}))
            for folder in run.glob("checkpoints/*")
        ]
    ),
    "a step of 10**12": Attack(
        in_checkpoints("trainer_state.json", {"step": 10**12}), "trainer_state.json", ("resume", "fork")
    ),
    # Checkpoints that do not fit, with checksums that do.
    **{
        f"{part} with {what}": Attack(tensors(part, each_first(kind)), f"{part}.safetensors", readers)
        for part, readers in {"model": ("resume", "chat"), "optimizer": ("resume",)}.items()
        for what, kind in {
            "a missing tensor": lambda found, name: found.pop(name),
            "another shape": lambda found, name: found.update({name: found[name].flatten()[1:].clone()}),
            "a further dimension": lambda found, name: found.update({name: found[name][None].clone()}),
            "whole numbers": lambda found, name: found.update({name: found[name].int()}),
            "complex numbers": lambda found, name: found.update({name: found[name].to(torch.complex64)}),
            "a further tensor": lambda found, name: found.update({"9999.exp_avg": torch.ones(2)}),
            "another name": lambda found, name: found.update({"x": found.pop(name)}),
        }.items()
    },
    "model without a header": Attack(
        in_checkpoints("model.safetensors", b"\xff" * 64), "model.safetensors is damaged", ("resume", "chat")
    ),
    "optimizer without a header": Attack(
        in_checkpoints("optimizer.safetensors", b""), "optimizer.safetensors is damaged", ("resume",)
    ),
    "an adapter without a header": Attack(
        put("final_model/adapter_model.safetensors", b"\xff" * 64), "init_from", ("evaluate an adapter", "merge")
    ),
    "a state of another kind": Attack(
        in_checkpoints("trainer_state.json", {"parts": {"update": {"from": "x", "to": -1}}}), "'update'", ("resume",)
    ),
}


# The run of one command on one changed folder.


def make_folder(cwd, kind):
    """A run folder, or a sweep folder with two runs, as cwd/run; also what an attack may aim at."""
    (cwd.parent / "victim" / "sub").mkdir(parents=True)
    (cwd.parent / "victim" / "sub" / "precious.txt").write_text("x")
    (cwd.parent / "victim" / "precious.json").write_text("{}\n")
    cwd.mkdir()
    (cwd / "payload.py").write_text(PAYLOAD)
    if kind != "sweep":
        return shutil.copytree(OLD / kind, cwd / "run")
    points = [[*QUICK, "seed=3"], [*QUICK, "seed=4"]]
    SweepFolder(cwd / "run").begin(Overrides([*QUICK, "seed=3,4"]), ["seed"], points)
    shutil.copytree(OLD / "full_finished", cwd / "run" / "0_seed_3")
    shutil.copytree(OLD / "full_finished", cwd / "run" / "1_seed_4")
    return cwd / "run"


def content_of(folder):
    """Every path below a folder with its content, its target or its kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = os.readlink(path)
        elif path.is_file() and path.name != ".lock" and path.stat().st_size < 2**30:
            found[path] = path.read_bytes()
        elif not path.is_file():
            found[path] = path.stat().st_mode
    return found


def attacked(tmp_path, attack, command):
    """Run a command on an attacked folder, and assert that nothing outside of the folder was run or changed.

    Returns the process, and whether the folder is unchanged.
    """
    cwd = tmp_path / "cwd"
    folder = make_folder(cwd, command.kind)
    # A job is at another depth, but its links lead to the same place.
    attack.change(folder if attack.of_sweep or command.kind != "sweep" else folder / "0_seed_3")
    victim = content_of(tmp_path / "victim")
    before = content_of(folder)
    process = Launch(*command.arguments, cwd=cwd, main=command.main, SECRET=SECRET).wait(TIMEOUT)
    assert content_of(tmp_path / "victim") == victim
    assert not (cwd / "trace").exists()
    assert not list(tmp_path.rglob("trace"))
    said = process.stdout + process.stderr
    assert SECRET not in said
    for path, found in content_of(tmp_path).items():
        assert not (isinstance(found, bytes) and SECRET.encode() in found), path
    if "No API key configured" not in said:  # of the dashboard, which has read the folder then
        assert "Traceback" not in said, said[-3000:]
        assert process.returncode in (0, 1, 2), (process.returncode, said[-3000:])
    after = content_of(folder)
    after.pop(folder / "launch.log", None)  # in which a refusal is recorded
    before.pop(folder / "launch.log", None)
    return process, after == before


def commands_for(number, attack):
    """The commands that an attack is tried with: at least four, which differ from attack to attack.

    They are those that refuse it, or four of these, and others if there are fewer.
    """
    if attack.of_sweep:
        return ON_SWEEP
    refused_by, others = (attack.refused_by, [name for name in COMMANDS if name not in attack.refused_by])
    return [*_four_of(refused_by, number), *_four_of(others, number)[: 4 - min(4, len(refused_by))]]


def _four_of(names, number):
    return list(names) if len(names) <= 4 else [names[(number + step) % len(names)] for step in (0, 3, 5, 7)]


PAIRS = [(name, each) for number, name in enumerate(ATTACKS) for each in commands_for(number, ATTACKS[name])]
SAMPLE = [
    ("a function", "evaluate"),
    ("a nested function", "resume"),
    ("a target in changes.yaml", "verify"),
    ("a Python object in config.yaml", "plot"),
    ("an adapter in a model", "train its model"),
    ("an adapter without a header", "evaluate an adapter"),
    ("an environment variable in a name", "fork"),
    ("an environment variable in overrides", "resume a sweep"),
    ("an escaped environment variable in overrides", "resume a sweep"),
    ("a config file with a package, before a harmless choice", "resume a sweep"),
    ("a dict with an environment variable, before a harmless choice", "resume a sweep"),
    ("a link in place of final_model", "merge"),
    ("a link in place of .hydra", "fork"),
    ("a link in place of status.json.tmp", "chat"),
    ("a pipe in place of status.json", "report"),
    ("a pipe in place of sweep.json", "report a sweep"),
    ("expanding aliases", "evaluate a checkpoint"),
    ("optimizer with another shape", "resume"),
]


def check(tmp_path, name, command):
    """Try an attack with a command. Returns the message with which the command refuses the folder, or None."""
    attack = ATTACKS[name]
    process, unchanged = attacked(tmp_path, attack, COMMANDS[command])
    if command in attack.refused_by:
        assert process.returncode == 2, process.stderr[-2000:]
        last = process.stderr.splitlines()[-1]
        assert last.startswith("error: ")
        assert attack.said in last
        assert unchanged or command in DISPLAY  # which may have written some of their files by then
    return process.stderr.splitlines()[-1].removeprefix("error: ") if process.returncode == 2 else None


@pytest.mark.parametrize(("name", "command"), SAMPLE)
def test_a_hostile_run_folder_harms_nobody(tmp_path, name, command):
    check(tmp_path, name, command)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "command"), [pair for pair in PAIRS if pair not in SAMPLE])
def test_a_hostile_run_folder_harms_nobody_with_any_command(tmp_path, name, command):
    check(tmp_path, name, command)


# A new run in a folder that is prepared for it.


@pytest.mark.parametrize("name", ["launch.log", ".hydra"])
def test_a_new_run_is_refused_in_a_folder_with_links_of_an_alleged_earlier_launch(tmp_path, name):
    (tmp_path / "victim").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text('{"machine": "m", "pid": 1, "token": "t"}')
    (tmp_path / "run" / name).symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match="is a link to"):
        check_empty(tmp_path / "run")


# Damaged small files: a value of any other type, at any place, is an error that names the file, or changes nothing.


def read_all(run):
    """Read everything that a run folder holds, as the commands do."""
    folder = RunFolder(run)
    typed(folder.frozen_config())
    folder.saved_step()
    folder.first_overrides()
    folder.outcome()
    folder.digests()
    summarize(run)
    find_problems(folder.metrics(), folder.training_evaluations().values(), component_ranges(read_config(run)))
    samples = audit.load_samples(run)
    audit.agreement(samples)
    audit.signs_of_gaming(samples)
    audit.extremes(samples)
    render("run.html", **content(run, run / "sheet.png"))
    checkpoint = latest_checkpoint(folder.checkpoints)
    load_state(checkpoint)


SMALL_FILES = ["status.json", "launches.jsonl", "preflight.json", "eval/after.json", "metrics/metrics.jsonl"]
SMALL_FILES += ["samples/step_000004.jsonl", "digests.json", "checkpoints/step_000004/trainer_state.json"]
SMALL_FILES += ["checkpoints/step_000004/manifest.json"]
OTHER_VALUES = [None, True, "x", "", -1, 1.5, 10**30, [], {}, [[1]], {"a": 1}, float("nan"), float("inf"), "\ud800"]


def places(node, path=()):
    """The place of every value in a JSON value; of a list only those in its first element."""
    yield path
    for key, child in node.items() if isinstance(node, dict) else enumerate(node[:1]) if isinstance(node, list) else ():
        yield from places(child, (*path, key))


def replaced(node, path, value):
    if not path:
        return value
    copy = dict(node) if isinstance(node, dict) else list(node)
    copy[path[0]] = replaced(node[path[0]], path[1:], value)
    return copy


@pytest.fixture
def finished(tmp_path):
    run = shutil.copytree(OLD / "full_finished", tmp_path / "run")
    RunFolder(run).update_digests({"problems": "a"})
    (run / "sheet.png").write_bytes(b"")  # the picture of the charts, whose drawing takes seconds
    return run


def check_damages(run, name, each):
    """Replace every `each`-th place and value of a file."""
    file = run / name
    intact = file.read_text()
    *others, last = intact.splitlines(keepends=True) if name.endswith(".jsonl") else [intact]
    cases = [(path, value) for path in places(json.loads(last)) for value in OTHER_VALUES]
    for path, value in cases[::each]:
        text = "".join(others) + json.dumps(replaced(json.loads(last), path, value)) + "\n"
        file.write_text(text)
        try:
            read_all(run)
        except FileError as error:
            assert "\n" not in str(error)
            assert file.name in str(error) or "none of the" in str(error), (path, value)
        except Exception as error:
            raise AssertionError(f"{name}: {path} = {value!r}: {error!r}") from error
    file.write_text(intact)


@pytest.mark.parametrize("name", SMALL_FILES)
def test_a_value_of_another_type_is_named_or_changes_nothing(finished, name):
    check_damages(finished, name, each=101)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_FILES)
def test_any_value_of_another_type_is_named_or_changes_nothing(finished, name):
    check_damages(finished, name, each=3)


@pytest.mark.parametrize("name", [*SMALL_FILES, "config.yaml"])
def test_a_torn_file_or_a_folder_in_its_place_is_named(finished, name):
    file = finished / name
    for torn in (b"", b"\0\0\n", b"\xff\xfe\n", b"[]\n", b"3\n", b"{\n", b"[" * 99999 + b"\n", None):
        if torn is None:
            file.unlink()
            file.mkdir()
        else:
            file.write_bytes(torn)
        if torn == b"" and name.endswith(".jsonl"):  # nothing is recorded
            continue
        with pytest.raises(FileError) as refused:
            read_all(finished)
        assert "\n" not in str(refused.value)
        assert file.name in str(refused.value) or "none of the" in str(refused.value)


# The document.

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "untrusted.md"
HEADER = """# Hostile run folders

Each attack changes a real run folder, and every command that can read the folder is tried with it. None runs code of
the folder, prints or stores an environment variable, changes a file elsewhere, ends with a traceback or waits longer
than {timeout} seconds. The message is that of the first command that refuses the folder. The other commands do not read
what was changed, or read it without harm. [Resume and fork](resume_and_fork.md) has the rules.

These are {count} pairs of an attack and a command. Written by `python -m tests.test_untrusted`.

| attack | refused by | message | not refused by |
|---|---|---|---|
"""


def outcome(name, command):
    """The message with which a command refuses an attacked folder, or None."""
    with tempfile.TemporaryDirectory() as folder:
        message = check(Path(folder), name, command)
        return message and message.replace(f"{folder}/", "")


def write_document():
    """Try every attack with every command, and write the table if none of them does harm."""
    os.environ["GRPO_OUTPUTS"] = "outputs"  # below the working directory of each command
    pairs = [(name, each) for name, attack in ATTACKS.items() for each in (ON_SWEEP if attack.of_sweep else COMMANDS)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        futures = {pair: pool.submit(outcome, *pair) for pair in pairs}
    harms = [f"{name}, {each}: {error}" for (name, each), future in futures.items() if (error := future.exception())]
    if harms:
        raise SystemExit("\n".join(harms))
    rows = []
    for name in ATTACKS:
        found = {command: future.result() for (each, command), future in futures.items() if each == name}
        messages = {command: message for command, message in found.items() if message is not None}
        message = next(iter(messages.values()), "").replace("|", "\\|")
        others = [command for command in found if command not in messages]
        rows.append(f"| {name} | {', '.join(messages)} | {message} | {', '.join(others)} |\n")
    DOCUMENT.write_text(HEADER.format(timeout=TIMEOUT, count=len(pairs)) + "".join(rows))


if __name__ == "__main__":
    write_document()
