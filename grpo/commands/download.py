"""Download the model and the data of a config to the local cache, so that later runs need no network.

python -m grpo download                                  the default: Qwen2.5-1.5B-Instruct and GSM8K
python -m grpo download model=qwen2_5_0_5b_instruct      any other config; HF_HOME says where the cache is

The sizes are printed first. A download that was interrupted continues where it stopped. With HF_HUB_OFFLINE=1 nothing
is downloaded: the command says what is missing.
"""

from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from grpo.commands._common import own_arguments
from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.config.errors import ConfigError
from grpo.config.schema import Config, known_keys

# Without the copies of the weights in other formats.
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def main(arguments: list[str]) -> None:
    """Download the model and the data, and print where they are."""
    own, overrides = own_arguments(arguments, ["run_dir"])
    if own:
        raise ConfigError("download takes a config, not a run folder: remove run_dir")
    config = typed(compose_config(overrides))
    from grpo.model.loading import EMBEDDED_MODELS, RANDOM_MODELS

    name = config.model.name
    if name in EMBEDDED_MODELS | RANDOM_MODELS or Path(name).is_dir():
        print(f"model: {name} is already on this machine")
    else:
        print(f"model: {_model(name)}", flush=True)
    _data(config)


def _model(name: str) -> str:
    """Download a model; the folder of the cache that contains it."""
    from huggingface_hub import HfApi, constants, snapshot_download

    from grpo.model.loading import model_not_found

    if constants.HF_HUB_OFFLINE:
        try:
            return snapshot_download(name, allow_patterns=MODEL_FILES, local_files_only=True)
        except Exception as error:  # the cache has exceptions of its own
            raise ConfigError(
                f"model.name={name} is not in the cache {constants.HF_HUB_CACHE}, or only a part of it, and "
                "HF_HUB_OFFLINE is set: run the same command once without it, with a network"
            ) from error
    with suppress(Exception):  # without a network the cache may still have everything
        print(f"model {name}: {_size(HfApi().model_info(name, files_metadata=True).siblings)}", flush=True)
    try:
        return snapshot_download(name, allow_patterns=MODEL_FILES)
    except Exception as error:  # the hub, the network and the cache each have their own exceptions
        raise model_not_found(name, error) from error


def _size(files: Iterable[Any] | None) -> str:
    """The number and size of a model's files that are needed, as the hub lists them."""
    needed = [file for file in files or () if any(fnmatch(file.rfilename, pattern) for pattern in MODEL_FILES)]
    return f"{sum(file.size or 0 for file in needed) / 1e9:.2f} GB in {len(needed)} files"


def _data(config: Config) -> None:
    """Load the problems, which downloads them if they are on the hub, and print their numbers."""
    from grpo.config.instantiate import bind
    from grpo.data.problems import with_validation

    problems = bind("data", config.data, without=known_keys("data"))()
    problems = with_validation(problems, config.data["validation_share"])
    print(
        f"data: {len(problems.train)} problems to train on, {len(problems.validation)} to validate, "
        f"{len(problems.test)} to test"
    )
