"""Checks of the objective's choices and numbers, and notes about those that have no effect."""

from typing import Any

from grpo.config.errors import ConfigError
from grpo.config.overrides import Overrides
from grpo.config.schema import OBJECTIVE, Config

NO_RATIO = "with grpo.mu=1 the ratio is 1 at every update"


def kl_weight(config: Config) -> float:
    """The weight of the KL penalty: objective.beta, or grpo.beta if that is null. 0 needs no reference model."""
    own = config.objective["beta"]
    return config.grpo.beta if own is None else own


def check_objective(config: Config) -> None:
    """Raise ConfigError for numbers or rewards that do not fit the choices of the objective."""
    _check_delta(config)
    if config.objective["advantage"] == "mean":
        _check_not_negative(config.reward.components)


def _check_delta(config: Config) -> None:
    objective = config.objective
    if objective["_target_"] != OBJECTIVE or objective["delta"] is None or objective["surrogate"] != "clip":
        return
    own = objective["epsilon_high"]
    highest = 1 + (config.grpo.epsilon if own is None else own)
    if objective["delta"] <= highest:
        raise ConfigError(
            f"objective.delta={objective['delta']:g}: must be above {highest:g}, the upper clip limit, since it would "
            "replace that for positive advantages"
        )


def _check_not_negative(components: dict[str, Any]) -> None:
    """Raise ConfigError unless the total reward is known to be 0 or more."""
    for name, component in components.items():
        weight = component.get("weight", 1.0)
        ends = component.get("range")
        if ends is None and weight != 0:
            raise ConfigError(
                f"objective.advantage=mean needs reward.components.{name}.range: its lowest and highest value, such as "
                "[0, 1], since it divides by the mean reward of a group"
            )
        if weight != 0 and min(weight * end for end in ends) < 0:
            raise ConfigError(
                f"objective.advantage=mean divides by the mean reward of a group, which must not be negative, but "
                f"reward.components.{name} can be; choose another advantage, or shift the reward"
            )


def check_unused_overrides(config: Config, overrides: Overrides) -> None:
    """Raise ConfigError if the command line sets a grpo.* number that the objective replaces by its own."""
    for name, followed in (("beta", "beta"), ("epsilon_low", "epsilon"), ("epsilon_high", "epsilon")):
        own = config.objective[name]
        if own is not None and own != getattr(config.grpo, followed) and overrides.names(f"grpo.{followed}"):
            raise ConfigError(
                f"grpo.{followed}: the objective has its own, objective.{name}={own:g}; set that one, or "
                f"objective.{name}=null to follow grpo.{followed}"
            )


def unused_overrides(config: Config, overrides: Overrides) -> list[str]:
    """A note for each number or choice of the objective on the command line that has no effect."""
    notes = [f"{key} has no effect: {why}" for key, why in _without_effect(config).items() if key in overrides.keys]
    ratio, surrogate = config.objective["ratio"], config.objective["surrogate"]
    is_named = "objective" in overrides.keys and (ratio, surrogate) != ("token", "clip")
    if is_named and not _ratio_matters(config):
        notes.append(f"objective.ratio={ratio} and objective.surrogate={surrogate} have no effect: {NO_RATIO}")
    return notes


def _without_effect(config: Config) -> dict[str, str]:
    """The keys of the suite's objective that have no effect, with the reason."""
    objective = config.objective
    if objective["_target_"] != OBJECTIVE:
        return {}
    surrogate = objective["surrogate"]
    numbers = {
        "clip": ["grpo.epsilon", "objective.epsilon_low", "objective.epsilon_high", "objective.delta"],
        "cispo": ["objective.cap"],
        "sapo": ["objective.tau_positive", "objective.tau_negative"],
    }
    found: dict[str, str] = {}
    if not _ratio_matters(config):
        found |= dict.fromkeys(("objective.ratio", "objective.surrogate"), NO_RATIO)
    for name, keys in numbers.items() if surrogate in numbers else ():
        if config.grpo.mu == 1 and "." not in str(objective["ratio"]):
            found |= dict.fromkeys(keys, NO_RATIO)
        elif name != surrogate:
            found |= dict.fromkeys(keys, f"it is a number of objective.surrogate={name}, and this is {surrogate}")
    if objective["sampling_correction"] is None:
        found["objective.sampling_cap"] = "objective.sampling_correction is null"
    if kl_weight(config) == 0:
        found |= dict.fromkeys(["objective.kl", "objective.kl_correction"], "there is no KL penalty, since beta is 0")
    return found


def _ratio_matters(config: Config) -> bool:
    """Whether the choices of the ratio and the surrogate change a gradient; those of the user may always do."""
    objective = config.objective
    own = "." in str(objective["ratio"]) or "." in str(objective["surrogate"]) or "." in str(objective["advantage"])
    return (
        objective["_target_"] != OBJECTIVE
        or config.grpo.mu > 1
        or own
        or (kl_weight(config) > 0 and objective["kl_correction"])
        or str(objective["sampling_correction"]).startswith("token")  # weights that differ within a sequence
    )
