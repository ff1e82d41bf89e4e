"""Download the model and the data of a config to the local cache, so that later runs need no network.

python -m grpo download                                  the default: Qwen2.5-1.5B-Instruct and GSM8K
python -m grpo download model=qwen2_5_0_5b_instruct      any other config; HF_HOME says where the cache is
"""

from pathlib import Path

from grpo.commands._common import own_arguments
from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.config.errors import ConfigError
from grpo.config.schema import known_keys


def main(arguments: list[str]) -> None:
    """Download the model and the data, and print where they are."""
    own, overrides = own_arguments(arguments, ["run_dir"])
    if own:
        raise ConfigError("download takes a config, not a run folder: remove run_dir")
    config = typed(compose_config(overrides))
    from grpo.config.instantiate import bind
    from grpo.model.loading import EMBEDDED_MODELS, RANDOM_MODELS, model_not_found

    if config.model.name in EMBEDDED_MODELS | RANDOM_MODELS or Path(config.model.name).is_dir():
        print(f"model: {config.model.name} is already downloaded")
    else:
        from huggingface_hub import snapshot_download

        try:
            print(f"model: {snapshot_download(config.model.name, allow_patterns=MODEL_FILES)}")
        except Exception as error:  # the hub, the network and the cache each have their own exceptions
            raise model_not_found(config.model.name, error) from error
    problems = bind("data", config.data, without=known_keys("data"))()
    print(f"data: {len(problems.train)} problems to train on, {len(problems.test)} held out")


# Without the copies of the weights in other formats.
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
