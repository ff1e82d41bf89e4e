"""Commands that are printed: pasted into a shell, they give Hydra and the commands the values that were meant."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from grpo.config.command_line import arguments_in_shell, override, path_argument, path_override
from grpo.config.compose import compose_config
from grpo.config.errors import ConfigError
from grpo.config.paths import CONF_DIR, LAUNCH
from grpo.config.trust import check_trusted
from grpo.model.loading import check_model
from grpo.runs.choice import choose_run
from grpo.runs.console import next_commands, resume_command
from grpo.runs.folder import RunFolder
from tests.launches import ROOT, grpo, launch
from tests.tiny_model import tiny_config

NAMES = ["a-b_c.1", "a b", " a ", "it's", 'say "hi"', "a,b", "a=b", "$HOME", "${seed}", r"\${x}", "{a: 1}", "[1]"]
NAMES += ["(c)", "x\\", r"\n", "é", "日本語", "two\nlines", "tab\there", "-x", "--cfg", "~a", "+a", "a;b", "a|b", "a&b"]
NAMES += ["*", "?", "!x", "#x", "`x`", "$(x)", "<x>", "1e3", "null", "true", "a:b", "a@b", "'", '"', "\\'", "%s", "a^b"]
NAMES += ["inf", "0x1f", "1_000"]
VALUES = [
    None,
    True,
    False,
    3,
    -2,
    0.5,
    1e-7,
    "",
    "null",
    "1",
    "a b",
    ["x, y", 1, None],
    {"a": "b: c", "d": [1.5, "}"]},
]


def parsed(line):
    """The key and the value of an override, by Hydra's parser, after a shell has read it."""
    (argument,) = shlex.split(line)
    (one,) = OverridesParser.create().parse_overrides([argument])
    return one.key_or_group, one.value()


@pytest.mark.parametrize("name", NAMES)
def test_every_printed_command_names_the_same_folder_again(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    absolute = str(tmp_path / "outputs" / name)
    run = Path("outputs") / name
    assert compose_config(shlex.split(arguments_in_shell(path_override("run_dir", run)))).run_dir == absolute
    *command, resume, line, own = shlex.split(resume_command(run, {"reward.components.x._target_": f"mine.{name}"}))
    assert (command, resume) == (["python", str(ROOT / "launch.py")], "resume=true")
    assert compose_config([line]).run_dir == absolute
    assert compose_config([own]).reward.components.x._target_ == f"mine.{name}"
    # `python -m grpo` takes its run_dir literally.
    words = shlex.split(next_commands(run, {}, None).partition("\n  plot ")[2])
    assert [word for word in words if word.startswith("run_dir=")] == [f"run_dir={absolute}"] * 3


@pytest.mark.parametrize("value", [*VALUES, *NAMES])
def test_an_override_has_exactly_the_given_value(value):
    line = arguments_in_shell(override("+data.mine", value))
    assert compose_config(shlex.split(line)).data.mine == value
    assert parsed(line)[0] == "data.mine"


def test_plain_text_is_printed_without_quotes():
    assert arguments_in_shell(path_override("run_dir", "/outputs/a-b_c.1/2026-01-01_10-00-00")) == (
        "run_dir=/outputs/a-b_c.1/2026-01-01_10-00-00"
    )
    assert path_argument("run_dir", "/outputs/it's") == "run_dir=/outputs/it's"
    assert ["python", str(CONF_DIR.parent / "launch.py")] == LAUNCH


@pytest.mark.parametrize("target", ["mine.f; touch pasted", "$(touch pasted)", "`touch pasted`", "a b", "x' y", "a,b"])
def test_the_argument_that_allows_a_function_of_a_folder_runs_nothing_in_a_shell(target, tmp_path):
    composed = compose_config([])
    frozen = composed.copy()
    frozen.reward.components.correctness._target_ = target
    with pytest.raises(ConfigError) as refused:
        check_trusted(frozen, composed, "folder")
    advice = str(refused.value).split("if you trust it, add: ")[1]
    (argument,) = shlex.split(advice)
    assert compose_config([argument]).reward.components.correctness._target_ == target
    subprocess.run(f"true {advice}", shell=True, check=True, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_errors_that_name_a_folder_give_arguments_that_can_be_pasted(tmp_path, finished_run):
    run = RunFolder(shutil.copytree(finished_run, tmp_path / "a run, mine", symlinks=True))
    with pytest.raises(ConfigError) as refused:
        choose_run(run, False, [])
    advice = re.search(r"resume=true (.*), or choose", str(refused.value))[1]
    assert compose_config(shlex.split(advice)).run_dir == str(run.path)
    adapter = tmp_path / "an adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "/a b/$x", "r": 8, "lora_alpha": 16}')
    with pytest.raises(ConfigError) as refused:
        check_model(tiny_config(name=str(adapter)))
    lora = compose_config(shlex.split(str(refused.value).partition(", set ")[2])).model
    assert (lora.name, lora.lora.init_from, lora.lora.rank, lora.lora.alpha) == ("/a b/$x", str(adapter), 8, 16)


@pytest.mark.slow
def test_printed_commands_work_in_another_directory(tmp_path, small_run):
    there = tmp_path / "it's, 1 {x} $HOME"
    elsewhere = tmp_path / "elsewhere"
    there.mkdir()
    elsewhere.mkdir()
    done = launch(*small_run, "run_dir=a b", cwd=there)
    assert done.returncode == 0, done.stderr
    commands = dict(re.findall(r"^  (plot|evaluate|resume) +(\S.*)$", done.stdout, re.MULTILINE))
    assert set(commands) == {"plot", "evaluate", "resume"}
    for name in ("plot", "evaluate"):
        again = grpo(*shlex.split(commands[name])[3:], cwd=elsewhere)
        assert again.returncode == 0, again.stderr
    resumed = launch(*shlex.split(commands["resume"])[2:-1], "grpo.num_steps=3", cwd=elsewhere)
    assert resumed.returncode == 0, resumed.stderr
    assert list(elsewhere.iterdir()) == []
