"""Lets conf/hydra/launcher/ray.yaml and its neighbours stand for the configs that the plugins bring under these names.

Hydra would validate a file against what a plugin registered under its name, and warns of it or refuses it.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin

from grpo.config import CONF_DIR


class OwnConfigs(SearchPathPlugin):
    """Called once all plugins are known and nothing is composed yet."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        registered = ConfigStore.instance().repo["hydra"]
        for file in CONF_DIR.glob("hydra/*/*.yaml"):
            registered[file.parent.name].pop(file.name, None)
