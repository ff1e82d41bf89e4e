"""Where Hydra looks for the launcher and the sweeper of this project, which are in grpo/sweeps.

Hydra imports this file in every Hydra program of the environment, so at the top it imports Hydra alone.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper


class LocalLauncher(Launcher):
    """`hydra/launcher=local`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, **context: Any) -> None:
        from grpo.sweeps import launcher

        self.launcher = launcher.LocalLauncher(**self.settings)
        self.launcher.setup(**context)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        return self.launcher.launch(job_overrides, initial_job_idx)


class HalvingSweeper(Sweeper):
    """`hydra/sweeper=halving`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, **context: Any) -> None:
        from grpo.sweeps import halving_sweeper

        self.sweeper = halving_sweeper.HalvingSweeper(**self.settings)
        self.sweeper.setup(**context)

    def sweep(self, arguments: list[str]) -> Any:
        return self.sweeper.sweep(arguments)
