"""plan=true: the memory, disk space and time that the run, or each job of the sweep, needs."""

from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from grpo.config.errors import ConfigError
from grpo.config.hydra_app import compose_again, compose_job, without_hydra
from grpo.config.overrides import Overrides
from grpo.config.schema import Config
from grpo.runs.halving_state import HalvingState, arms_of, choose_ladder, seconds
from grpo.sweeps.opening import check_equal_steps, is_halving, points_of, with_params


def print_plan(
    composed: DictConfig, overrides: Overrides, is_sweep: bool, check: Callable[[DictConfig, Overrides], Config]
) -> bool:
    """Print the plan of a launch, and return whether all of its runs fit into memory. Raises ConfigError.

    composed: its config, including the `hydra` part.
    """
    from grpo.launch.preset import found_overrides, hardware_found  # imports torch
    from grpo.planning.plan import print_plans

    if composed.resume or composed.fork:
        raise ConfigError("plan=true is for a new run: leave resume and fork out")

    def compose(lines: Sequence[str]) -> DictConfig:
        return compose_again(composed.hydra, lines)

    points = sweep_points(overrides, composed.hydra.sweeper) if is_sweep else [("the run", overrides.of_experiment)]
    configs = []
    checked = []
    for name, point in points:
        job = compose_job(composed.hydra, point.lines) if is_sweep else composed
        config = without_hydra(job)
        checked.append(check(config, point))
        preset = f"hardware={job.hydra.runtime.choices.hardware}"
        if config.hardware.device == "auto":
            preset += f", here {' '.join(found_overrides(config))}"
        configs.append((name, preset, hardware_found(config, point, compose)))
    check_equal_steps(checked, composed.hydra.sweeper)
    fits = print_plans(configs)
    if is_sweep and is_halving(composed.hydra.sweeper):
        print(halving_summary(composed, [point.lines for _, point in points]))
    return fits


def sweep_points(overrides: Overrides, sweeper: DictConfig) -> list[tuple[str, Overrides]]:
    """The name and the overrides of each job of a grid sweep. Raises ConfigError for other sweepers."""
    task = with_params(overrides.of_experiment, sweeper)
    points = points_of(task, sweeper)
    if points is None:
        raise ConfigError("plan=true knows the points of a grid only: add hydra/sweeper=basic")
    jobs = [Overrides(point) for point in points]
    return [(" ".join(job.select(task.swept)) or "the run", job) for job in jobs]


def halving_summary(config: DictConfig, points: Sequence[Sequence[str]]) -> str:
    """The cost of successive halving, as text: its budget, or its rungs and its share of the steps of a full sweep."""
    arms = arms_of(points)
    if config.sweep.budget_hours is not None:
        return f"hydra/sweeper=halving: {config.sweep.budget_hours:g} hours of jobs at most"
    total = config.grpo.num_iterations * config.grpo.num_steps
    rungs = choose_ladder(HalvingState(total, [[0]] * len(arms), config.sweep.eta, None))
    steps = ", ".join(f"{left} arms to step {step}" for step, left in rungs)
    share = seconds(rungs, 1, 1.0, 0.0) / (len(arms) * total)
    return f"hydra/sweeper=halving: {steps}, {share:.0%} of the steps of all"
