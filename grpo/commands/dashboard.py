"""Save a view of the project in Weights & Biases: panels for rewards, lengths, loss, speed and completions.

python -m grpo dashboard run_dir=outputs/...             the project and reward components of a run
python -m grpo dashboard sweep_dir=outputs/sweeps/...    one curve per arm of a sweep, the mean over its seeds
python -m grpo dashboard project=grpo entity=NAME        by name
It needs `pip install -e ".[dashboard]"` and `wandb login`. Without an account: wandb leet RUN_DIR/wandb/offline-run-...
"""

import unicodedata
from dataclasses import dataclass
from typing import Any

from grpo.analysis.load import read_config
from grpo.commands._common import existing_run, own_arguments
from grpo.config.errors import ConfigError
from grpo.config.overrides import Overrides
from grpo.config.values import flatten
from grpo.metric_table import REWARD, of_components
from grpo.runs.files import check_contents
from grpo.runs.halving_state import SEED
from grpo.runs.sweep_folder import SweepFolder
from grpo.runs.tracking import project_of


@dataclass(frozen=True)
class View:
    """The contents of a view."""

    project: str
    components: list[str]  # names of the reward components
    group: str | None = None  # W&B group of the runs that are shown; None: all runs
    keys: tuple[str, ...] = ()  # config keys that define the arms of a sweep


def main(arguments: list[str]) -> None:
    """Save the view and print its address."""
    own, overrides = own_arguments(arguments, ["run_dir", "sweep_dir", "project", "entity"])
    if overrides or not own.keys() & {"run_dir", "sweep_dir", "project"} or {"run_dir", "sweep_dir"} <= own.keys():
        raise ConfigError("dashboard takes one of run_dir=, sweep_dir= and project=, and entity=")
    view = view_of(own)
    try:
        import wandb
        import wandb_workspaces  # noqa: F401
    except ImportError as error:
        raise ConfigError("dashboard needs: pip install -e '.[dashboard]'") from error
    entity = own.get("entity") or _entity(wandb)
    print(workspace(view, entity).save().url)


def view_of(own: dict[str, str]) -> View:
    """The view for the command's own arguments. Raises ConfigError if they name no run or sweep."""
    if "sweep_dir" in own:
        sweep = SweepFolder(own["sweep_dir"].rstrip("/"))
        check_contents(sweep.path)
        if not sweep.record():
            raise ConfigError(f"sweep_dir={sweep.path} is not the folder of a sweep: it has no sweep.json")
        configs = {job["job"]: read_config(sweep.path / job["folder"]) for job in sweep.jobs() if job["folder"]}
        configs = {job: config for job, config in configs.items() if config}
        config = next(iter(configs.values()), {})
        group = config["tracking"]["group"] if config else None
        return _of_config(config, own, group=group, keys=_arm_keys(sweep, configs))
    if "run_dir" in own:
        return _of_config(read_config(existing_run(own["run_dir"]).path), own)
    return View(own["project"], ["correctness", "format"])


def _arm_keys(sweep: SweepFolder, configs: dict[int, dict[str, Any]]) -> tuple[str, ...]:
    """The config keys that distinguish the arms: each swept key, or for a swept group a key that changes with it.

    W&B stores the values of a run's config, but not the group files that they came from.
    """
    flat = {job: {key: str(value) for key, value in flatten(config).items()} for job, config in configs.items()}
    given = {job["job"]: Overrides(job["overrides"]).texts for job in sweep.jobs()}

    def follows(leaf: str, key: str) -> bool:
        pairs = {(given[job].get(key), config.get(leaf)) for job, config in flat.items()}
        return len(pairs) == len({value for value, _ in pairs}) == len({value for _, value in pairs}) > 1

    keys = []
    for key in sweep.swept:
        names = sorted(name for config in flat.values() for name in config if not name.startswith("tracking."))
        if key != SEED:
            keys.append(key if key in names else next((name for name in names if follows(name, key)), key))
    return tuple(keys)


def _of_config(config: dict[str, Any], own: dict[str, str], **arms: Any) -> View:
    if not config:
        raise ConfigError(f"{own} contains no run that has started")
    project = own.get("project") or project_of(config["tracking"]["project"])
    return View(project, list(config["reward"]["components"]), **arms)


def _entity(wandb: Any) -> str:
    try:
        entity = wandb.Api(timeout=20).default_entity
    except Exception as error:  # of various types: not logged in, no network
        raise ConfigError(
            f"not logged in to W&B ({type(error).__name__}); run wandb login, or give entity=NAME"
        ) from error
    if not entity:
        raise ConfigError("your W&B account has no default entity; give entity=NAME")
    return entity


def panels(view: View) -> dict[str, dict[str, list[str]]]:
    """Section -> title of a panel -> names of its metrics, as in metrics.jsonl."""
    sections: dict[str, dict[str, list[str]]] = {}
    for metric in of_components(view.components):
        if metric.section:
            sections.setdefault(metric.section, {}).setdefault(metric.panel, []).append(metric.name)
    sections[REWARD]["Validation and test accuracy"] = ["validation/accuracy", "test/accuracy"]
    return sections


def workspace(view: View, entity: str) -> Any:
    """The view as a `wandb_workspaces` Workspace, not saved yet; creating it needs no server."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    arms: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"} if view.keys else {}
    sections = [
        ws.Section(
            name=section,
            is_open=True,
            panels=[wr.LinePlot(title=title, x="step", y=[*metrics], **arms) for title, metrics in plots.items()],
        )
        for section, plots in panels(view).items()
    ]
    table = wr.WeavePanelSummaryTable(table_name="completions")
    sections.append(ws.Section(name="Completions", is_open=True, panels=[table]))
    runs = ws.RunsetSettings(
        filters=[ws.Metric("Group") == view.group] if view.group else [],
        groupby=[ws.Config(key) for key in view.keys],
    )
    # W&B refuses symbols, such as $, in the name of a view.
    group = "".join("_" if unicodedata.category(char)[0] in "SC" else char for char in view.group or "")
    name = f"GRPO sweep {group}" if group else "GRPO"
    return ws.Workspace(
        entity=entity,
        project=view.project,
        name=name,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="step"),
        runset_settings=runs,
    )
