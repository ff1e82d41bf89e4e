"""The Hydra application behind a launch: parse its flags, set its config search path, and compose configs.

Only this module imports from `hydra._internal`. It requires Hydra 1.3.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.conf import HydraConf
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from grpo.config.errors import ConfigError
from grpo.config.paths import CONF_DIR

CONFIG_NAME = "config"
TASK_NAME = "launch"


def check_version() -> None:
    """Raise ConfigError if the installed Hydra is not version 1.3."""
    if not hydra.__version__.startswith("1.3."):
        raise ConfigError(
            f"this needs Hydra 1.3, and {hydra.__version__} is installed: pip install 'hydra-core>=1.3,<1.4'"
        )


def read_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line with Hydra's own parser; overrides may come before and after the flags."""
    check_version()
    flags = get_args_parser().parse_intermixed_args(list(arguments))
    if flags.experimental_rerun is not None:
        raise ConfigError(
            "--experimental-rerun: continue a run with resume=true run_dir=..., or give its command again"
        )
    if flags.run and flags.multirun:
        raise ConfigError("give one of --run and --multirun")
    if (flags.package or flags.resolve) and not (flags.cfg or flags.help):
        raise ConfigError("--package and --resolve say what --cfg shows: add --cfg job")
    return flags


def only_shows(flags: argparse.Namespace) -> bool:
    """Whether the command line asks only for Hydra's help, the config or shell completion, not for a launch."""
    asked = (flags.help, flags.hydra_help, flags.cfg, flags.info, flags.shell_completion)
    return any(each not in (None, False) for each in asked)


def show(arguments: Sequence[str], task: Callable[[DictConfig], Any]) -> int:
    """Let Hydra process a command line for which `only_shows` is true. Returns the exit code.

    Raises ConfigError for --cfg or --info of a sweep.
    """
    flags = read_flags(arguments)
    if flags.multirun and (flags.cfg or flags.info):
        raise ConfigError("-m: --cfg and --info show the config of one run; leave -m out")
    # Hydra reads sys.argv. It uses the last --config-path, and resolves a relative one against the task's module.
    sys.argv[1:] = arguments if flags.config_path is None else [*arguments, "--config-path", _config_path(flags)]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=CONFIG_NAME)(task)()
    except SystemExit as end:  # after --help
        return int(end.code or 0)
    return 0


def _config_path(flags: argparse.Namespace) -> str:
    """The folder of the config. A relative --config-path is relative to the folder that contains conf/."""
    return str(CONF_DIR if flags.config_path is None else CONF_DIR.parent / flags.config_path)


class Application:
    """Hydra with the config search path of `hydra.main`, from --config-dir, --config-path and --config-name."""

    def __init__(self, flags: argparse.Namespace) -> None:
        hydra.version.setbase("1.3")
        self.config_name = flags.config_name or CONFIG_NAME
        search_path = create_config_search_path(_config_path(flags))
        if flags.config_dir is not None:
            added = os.path.abspath(flags.config_dir)
            if not os.path.isdir(added):
                raise ConfigError(f"--config-dir={flags.config_dir}: there is no such folder")
            search_path.prepend("command-line", f"file://{added}", SearchPathQuery(provider="schema"))
        GlobalHydra.instance().clear()
        self._hydra = Hydra.create_main_hydra2(TASK_NAME, search_path)

    def compose(self, overrides: Sequence[str], multirun: bool) -> tuple[DictConfig, bool]:
        """Compose the config with these overrides. Also return whether it is a sweep, by -m or by hydra.mode.

        Raises Hydra's exceptions, including the one for several values of a key outside a sweep.
        """
        cfg = self._hydra.compose_config(
            self.config_name, list(overrides), RunMode.MULTIRUN, validate_sweep_overrides=False
        )
        HydraConfig.instance().set_config(cfg)  # for ${hydra:...} in the config
        if multirun and cfg.hydra.mode == RunMode.RUN:
            raise ConfigError("hydra.mode=RUN and --multirun: leave one of them out")
        multirun = multirun or cfg.hydra.mode == RunMode.MULTIRUN
        mode = RunMode.MULTIRUN if multirun else RunMode.RUN
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        ConfigLoaderImpl.validate_sweep_overrides_legal(parsed, run_mode=mode, from_shell=True)
        return cfg, multirun

    def start(self, task: Callable[[DictConfig], Any], overrides: Sequence[str], multirun: bool) -> None:
        """Let Hydra run the task, once or for each job of a sweep. Raises the exceptions of Hydra and of the task."""
        run = self._hydra.multirun if multirun else self._hydra.run
        mode = RunMode.MULTIRUN if multirun else RunMode.RUN
        run(self.config_name, task, [*overrides, f"hydra.mode={mode.name}"])


def without_hydra(cfg: DictConfig) -> DictConfig:
    """A composed config without its `hydra` part."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def compose_again(hydra_cfg: HydraConf, overrides: Sequence[str]) -> DictConfig:
    """Compose the config of the current launch again, with other overrides of the experiment.

    hydra_cfg: the `hydra` part of the launch's config, which has the config's name and the overrides of Hydra's keys.
    The search path is that of the Hydra instance in this process.
    """
    return without_hydra(compose_job(hydra_cfg, overrides))


def compose_job(hydra_cfg: HydraConf, overrides: Sequence[str]) -> DictConfig:
    """Like `compose_again`, with the `hydra` part."""
    own: Any = OmegaConf.to_container(hydra_cfg.overrides.hydra, resolve=False)  # a list of strings
    loader = GlobalHydra.instance().config_loader()
    return loader.load_configuration(hydra_cfg.job.config_name, [*own, *overrides], run_mode=RunMode.RUN)


def config_flags(hydra_cfg: HydraConf) -> list[str]:
    """The flags --config-path, --config-dir and --config-name with which a launch finds its config."""
    flags = []
    for source in hydra_cfg.runtime.config_sources:
        if source.provider == "command-line":
            flags += ["--config-dir", source.path]
        elif source.provider == "main" and source.path != str(CONF_DIR):
            flags += ["--config-path", source.path]
    name = hydra_cfg.job.config_name or CONFIG_NAME
    return [*flags, *(["--config-name", name] if name != CONFIG_NAME else [])]


def has_plugin(target: str) -> bool:
    """Whether the Hydra launcher or sweeper with this `_target_` is installed."""
    return target in Plugins.instance().class_name_to_class


def split_into_jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job of a sweep over all combinations of the values, in Hydra's order."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    hydra_app = GlobalHydra.instance()
    # For overrides such as tracking=glob(*), the loader provides the choices of the group.
    loader = hydra_app.config_loader() if hydra_app.is_initialized() else None
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
    batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [job for batch in batches for job in batch]
