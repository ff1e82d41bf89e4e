"""Check before a sweep on this machine starts that its jobs find their device, data and model here."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from grpo.config.hub import use_cache_if_hub_is_unreachable
from grpo.config.overrides import Overrides
from grpo.config.schema import Config
from grpo.data.mixture import bind_data, paths_of
from grpo.tiny import MODEL_NAME as EMBEDDED_MODEL


def check_machine(configs: Sequence[Config], unknown: Overrides) -> None:
    """Raise ConfigError if a run with one of these configs would be refused here. Loads the problems, but no weights.

    unknown: overrides of keys that have other values in the jobs. Forks are not checked, since they use what their
    parents use. The memory of a CUDA card is checked only by the job, since asking for it initializes CUDA, and a
    process that has done so can no longer choose among the cards.
    """
    configs = [config for config in configs if not config.fork]
    for config in _different(configs, lambda config: (config.hardware.device, config.model.device_map)):
        if {config.hardware.device, config.model.device_map} - {"cpu", "auto"}:
            from grpo.model.hardware import requested_device  # imports torch

            requested_device(config)
    for config in [] if unknown.names("data") else _different(configs, lambda config: config.data):
        use_cache_if_hub_is_unreachable(*paths_of(config.data))
        bind_data(config.data)()
    for config in [] if unknown.names("model") else _different(configs, lambda config: config.model):
        if config.model.name != EMBEDDED_MODEL:
            from grpo.model.loading import check_model, prepare_hub  # imports transformers

            prepare_hub(config.model.name)
            check_model(config.model)


def _different(configs: Iterable[Config], part: Callable[[Config], Any]) -> list[Config]:
    """One config for each value of a part of them."""
    return list({repr(part(config)): config for config in configs}.values())
