"""The loader of the config group `data`, which may join several data sets, from which training draws with weights."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from grpo.config.instantiate import bind
from grpo.config.schema import known_keys
from grpo.data.problems import SPLITS, Problem, Problems
from grpo.data.splits import with_validation


def mix(parts: Mapping[str, Problems], weights: Mapping[str, float]) -> Problems:
    """Join data sets. parts, weights: the problems and the weight of each part by its name.

    A training problem of a part with weight w and n training problems, without those to validate on, has the weight
    w / n; a part with the weight 0 is only evaluated. Each problem has the name of its part in front of its id, and in
    the column `part`.
    """
    joined: dict[str, list[Problem]] = {split: [] for split in SPLITS}
    for name, problems in parts.items():
        weight = weights[name] / max(1, len(problems.train))
        for split in SPLITS:
            joined[split] += [
                replace(each, id=f"{name}/{each.id}", columns={**each.columns, "part": name}, weight=weight, part=name)
                for each in getattr(problems, split)
            ]
    joined["train"] = [each for each in joined["train"] if each.weight > 0]
    return Problems(**joined)


def bind_data(data: Mapping[str, Any]) -> Callable[[], Problems]:
    """The function that loads the problems. Raises ConfigError if a loader does not take its settings."""
    without = known_keys("data")
    if data.get("parts") is None:
        return bind("data", data, without)
    loaders = {name: bind(f"data.parts.{name}", part, (*without, "weight")) for name, part in data["parts"].items()}
    weights = {name: float(part.get("weight", 1.0)) for name, part in data["parts"].items()}
    share = data["validation_share"]
    return lambda: mix({name: with_validation(load(), share) for name, load in loaders.items()}, weights)


def paths_of(data: Mapping[str, Any]) -> list[object]:
    """data.path and those of the parts of a mixture."""
    return [data.get("path"), *(part.get("path") for part in (data.get("parts") or {}).values())]
