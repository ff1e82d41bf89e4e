"""The Hydra plugins of this project: the launcher and the sweeper that grpo/sweeps implements.

Hydra imports this file in every Hydra program of the environment, so the imports at the top are those of Hydra only.
The constructors list every setting, since Hydra rejects a setting that the constructor does not have.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig


class LocalLauncher(Launcher):
    """The launcher of `hydra/launcher=local`; see `grpo.sweeps.launcher.LocalLauncher`."""

    def __init__(self, jobs_at_once: int | None = None) -> None:
        self.jobs_at_once = jobs_at_once

    def setup(self, **context: Any) -> None:
        """Create the launcher that does the work."""
        from grpo.sweeps import launcher

        self.launcher = launcher.LocalLauncher(self.jobs_at_once)
        self.launcher.setup(**context)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs."""
        return self.launcher.launch(job_overrides, initial_job_idx)


class HalvingSweeper(Sweeper):
    """The sweeper of `hydra/sweeper=halving`; see `grpo.sweeps.halving_sweeper.HalvingSweeper`."""

    def __init__(self, eta: int, budget_hours: float | None, params: DictConfig | None = None) -> None:
        self.eta = eta
        self.budget_hours = budget_hours
        self.params = params

    def setup(self, **context: Any) -> None:
        """Create the sweeper that does the work."""
        from grpo.sweeps import halving_sweeper

        self.sweeper = halving_sweeper.HalvingSweeper(self.eta, self.budget_hours, self.params)
        self.sweeper.setup(**context)

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep."""
        return self.sweeper.sweep(arguments)
