"""Download the model and the data of a config to the local cache, so that later runs need no network.

python -m grpo download                                  the default: Qwen2.5-1.5B-Instruct and GSM8K
python -m grpo download model=qwen2_5_0_5b_instruct      any other config; HF_HOME says where the cache is

The sizes are printed first. Files that are complete are not downloaded again, and a file whose connection breaks is
continued; if the command is stopped, the file that it was downloading starts again. With HF_HUB_OFFLINE=1 nothing is
downloaded: the command says what is missing.
"""

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from grpo.commands._common import own_arguments
from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.config.errors import ConfigError
from grpo.config.hub import why_offline
from grpo.config.schema import Config
from grpo.data.mixture import bind_data, paths_of

# Without the copies of the weights in other formats.
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def main(arguments: list[str]) -> None:
    """Download the model and the data, and print where they are."""
    own, overrides = own_arguments(arguments, ["run_dir"])
    if own:
        raise ConfigError("download takes a config, not a run folder: remove run_dir")
    config = typed(compose_config(overrides))
    from grpo.model.loading import EMBEDDED_MODELS, RANDOM_MODELS, prepare_hub

    name = config.model.name
    prepare_hub(name, *paths_of(config.data))
    if name in EMBEDDED_MODELS | RANDOM_MODELS or Path(name).is_dir():
        print(f"model: {name} is already on this machine")
    else:
        print(f"model: {_model(name)}", flush=True)
    _data(config)


def _model(name: str) -> str:
    """Download a model; the folder of the cache that contains it."""
    from huggingface_hub import HfApi, snapshot_download

    from grpo.model.loading import model_not_found

    local = why_offline() is not None
    patterns = MODEL_FILES
    with suppress(Exception):  # the cache may have everything
        files = HfApi().model_info(name, files_metadata=True).siblings or []
        if not any(file.rfilename.endswith(".safetensors") for file in files):
            patterns = [*MODEL_FILES, "*.bin"]
        print(f"model {name}: {_size(files, patterns)}", flush=True)
    try:
        folder = snapshot_download(name, allow_patterns=patterns, local_files_only=local)
        _check_weights(Path(folder))
    except Exception as error:  # the hub, the network and the cache each have their own exceptions
        raise model_not_found(name, error) from error
    return folder


def _check_weights(folder: Path) -> None:
    """Raise OSError if weights are missing, as in the cache after a download that was stopped."""
    for kind in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{kind}.index.json"
        if (folder / kind).exists():
            return
        if index.exists():
            shards = sorted({*json.loads(index.read_text())["weight_map"].values()})
            missing = [name for name in shards if not (folder / name).exists()]
            if missing:
                raise FileNotFoundError(f"{missing[0]} is missing, one of {len(shards)} files of weights")
            return
    raise FileNotFoundError("the files of the weights are missing")


def _size(files: Iterable[Any], patterns: Sequence[str]) -> str:
    """The number and size of the files that match a pattern, of those that the hub lists."""
    needed = [file for file in files if any(fnmatch(file.rfilename, pattern) for pattern in patterns)]
    size = sum(file.size or 0 for file in needed)
    shown = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
    return f"{shown} in {len(needed)} files"


def _data(config: Config) -> None:
    """Load the problems, which downloads them if they are on the hub, and print their numbers."""
    from huggingface_hub import HfApi

    from grpo.data.splits import with_validation

    for path in map(str, filter(None, paths_of(config.data))):
        if not Path(path).exists() and why_offline() is None:
            with suppress(Exception):  # as for the model
                files = HfApi().dataset_info(path, files_metadata=True).siblings or []
                print(f"data {path}: at most {_size(files, ['*'])}", flush=True)
    problems = bind_data(config.data)()
    problems = with_validation(problems, config.data["validation_share"])
    print(
        f"data: {len(problems.train)} problems to train on, {len(problems.validation)} to validate, "
        f"{len(problems.test)} to test"
    )
