"""Where Hydra looks for the launcher and the sweeper of this project, which are in grpo/sweeps.

Hydra imports this file in every Hydra program of the environment, so at the top it imports Hydra alone. The settings
are named here, since Hydra refuses others where it builds these.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig


class LocalLauncher(Launcher):
    """`hydra/launcher=local`."""

    def __init__(self, jobs_at_once: int | None = None) -> None:
        self.jobs_at_once = jobs_at_once

    def setup(self, **context: Any) -> None:
        """Build the real launcher."""
        from grpo.sweeps import launcher

        self.launcher = launcher.LocalLauncher(self.jobs_at_once)
        self.launcher.setup(**context)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run these jobs."""
        return self.launcher.launch(job_overrides, initial_job_idx)


class HalvingSweeper(Sweeper):
    """`hydra/sweeper=halving`."""

    def __init__(self, eta: int, budget_hours: float | None, params: DictConfig | None = None) -> None:
        self.eta = eta
        self.budget_hours = budget_hours
        self.params = params

    def setup(self, **context: Any) -> None:
        """Build the real sweeper."""
        from grpo.sweeps import halving_sweeper

        self.sweeper = halving_sweeper.HalvingSweeper(self.eta, self.budget_hours, self.params)
        self.sweeper.setup(**context)

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep."""
        return self.sweeper.sweep(arguments)
