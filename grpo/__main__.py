"""Commands on runs and models: `python -m grpo <command> [key=value ...]`."""

import importlib
import os
import pkgutil
import sys

import grpo.commands
from grpo.config.errors import ConfigError
from grpo.launch.process import run_command
from grpo.runs.stop_signals import Exit, exits_are_failures


def commands() -> dict[str, str]:
    """All commands, each with the first line of its module's docstring."""
    names = sorted(module.name for module in pkgutil.iter_modules(grpo.commands.__path__) if module.name[0] != "_")
    return {name: (importlib.import_module(f"grpo.commands.{name}").__doc__ or "").splitlines()[0] for name in names}


def main(arguments: list[str] | None = None) -> int:
    """Run the command in `arguments`, or list the commands if there is none. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["train"]:  # a Hydra command line, with options such as -m and --cfg
        from grpo.commands import train

        return train.main(arguments[1:])
    name = arguments[0] if arguments else "--help"
    return run_command(lambda: _run(name, arguments[1:]))


def _run(name: str, overrides: list[str]) -> None:
    if name in ("-h", "--help"):
        print("python -m grpo <command> [key=value ...]\n")
        for command, summary in commands().items():
            print(f"  {command:10} {summary}")
        print("\nArguments can be any key or group of the config; to train: python -m grpo train --help")
        return
    if name not in commands():
        raise ConfigError(f"there is no command '{name}'; choose one of {', '.join(commands())}")
    module = importlib.import_module(f"grpo.commands.{name}")
    if any(argument in ("-h", "--help") for argument in overrides):
        print(module.__doc__)
        return
    with exits_are_failures(Exit, KeyboardInterrupt):
        module.main(overrides)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    sys.exit(main())
