"""Loading causal language models and their tokenizers."""

import copy
import functools
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import import_utils
from transformers.utils import logging as transformers_logging

from grpo.architectures import ARCHITECTURES_DIR
from grpo.config.command_line import arguments_in_shell, override, path_override
from grpo.config.errors import ConfigError, first_line
from grpo.config.hub import is_hub_name, use_cache_if_hub_is_unreachable, why_offline
from grpo.config.schema import ModelConfig
from grpo.data.prompts import turn_tokens
from grpo.model.gated_mlp import keep_fewer_activations
from grpo.model.linear import use_onednn
from grpo.model.lora import adapter_config
from grpo.runs.files import check_files
from grpo.tiny import MODEL_DIR as TINY_MODEL_DIR
from grpo.tiny import MODEL_NAME as TINY_MODEL_NAME

logger = logging.getLogger(__name__)

EMBEDDED_MODELS = {TINY_MODEL_NAME: TINY_MODEL_DIR}
RANDOM_MODELS = {"qwen2_5_1_5b_random": ARCHITECTURES_DIR / "qwen2_5_1_5b.json"}  # with the tiny model's tokenizer


def model_source(name: str) -> str:
    """What transformers loads a model from: the folder of an embedded model, otherwise `name` unchanged."""
    return str(EMBEDDED_MODELS.get(name, name))


def prepare_hub(model: str, *data: object) -> None:
    """Before a model and data sets are loaded: use the cache alone if they need the hub and it cannot be reached.

    data: paths, as in data.path.
    """
    use_cache_if_hub_is_unreachable(None if model in RANDOM_MODELS else model_source(model), *data)


def architecture(name: str, trust_remote_code: bool) -> PretrainedConfig:
    """The transformers config of a model. Raises OSError or ValueError if it cannot be loaded."""
    if name in RANDOM_MODELS:
        return AutoConfig.for_model(**json.loads(RANDOM_MODELS[name].read_text(encoding="utf-8")))
    return AutoConfig.from_pretrained(model_source(name), trust_remote_code=trust_remote_code)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token. Raises ConfigError if the model cannot be found or reached."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            TINY_MODEL_DIR if config.name in RANDOM_MODELS else model_source(config.name),
            trust_remote_code=config.trust_remote_code,
            padding_side="left",
        )
    except Exception as error:  # of various types, if a file is damaged
        raise model_not_found(config.name, error) from error
    _set_padding(tokenizer, config)
    return tokenizer


def _set_padding(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Use a token that ends completions for padding, if the tokenizer has none or one that the model lacks.

    Padding is masked, but its ID is looked up in the embeddings. Raises ConfigError if no token ends a completion.
    """
    built = architecture(config.name, config.trust_remote_code)
    vocabulary = vocabulary_size(built)
    of_config = getattr(built.get_text_config(decoder=True), "eos_token_id", None)
    ends = [tokenizer.eos_token_id, turn_tokens(tokenizer).closing]
    ends += of_config if isinstance(of_config, list) else [of_config]
    ends = [token for token in ends if token is not None and token < vocabulary] or _generation_ends(config, vocabulary)
    if not ends:
        raise ConfigError(
            f"model.name={config.name}: no token of its {vocabulary} ends a completion; set eos_token in its "
            "tokenizer_config.json, or eos_token_id in its generation_config.json"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocabulary:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])


def _generation_ends(config: ModelConfig, vocabulary: int) -> list[int]:
    """The end-of-sequence tokens in the model's generation_config.json, if it has one."""
    try:
        found = GenerationConfig.from_pretrained(model_source(config.name)).eos_token_id
    except OSError:
        return []
    tokens = found if isinstance(found, list) else [found]
    return [token for token in tokens if token is not None and token < vocabulary]


def vocabulary_size(built: PretrainedConfig) -> int:
    """The number of tokens that a model has embeddings for, according to its config."""
    return getattr(built.get_text_config(decoder=True), "vocab_size", None) or sys.maxsize


def check_model(config: ModelConfig) -> None:
    """Raise ConfigError if the model's config or attention cannot be used. Loads no weights."""
    folder = Path(config.name)
    check_files(folder)
    adapter = adapter_config(folder)
    if adapter is not None and (folder / "config.json").exists():
        raise ConfigError(
            f"model.name={config.name} holds a model and an adapter, which transformers would load as well; move "
            "adapter_config.json away, or merge the two with peft"
        )
    if adapter is not None:
        keys = {"model.name": "base_model_name_or_path", "model.lora.rank": "r", "model.lora.alpha": "lora_alpha"}
        settings = [override(key, adapter.get(name)) for key, name in keys.items()]
        raise ConfigError(
            f"model.name={config.name} is a LoRA adapter, which needs its base model; without run_dir, set "
            f"{arguments_in_shell('tuning=lora', path_override('model.lora.init_from', folder), *settings)}"
        )
    try:
        found = architecture(config.name, config.trust_remote_code)
    except Exception as error:  # of various types, if config.json is damaged
        raise model_not_found(config.name, error) from error
    if found.is_encoder_decoder:
        raise ConfigError(
            f"model.name={config.name} is an encoder-decoder ({found.model_type}), whose decoder is not trained to be "
            "used alone; choose a causal language model"
        )
    available = {
        "flash_attention_2": import_utils.is_flash_attn_2_available,
        "flash_attention_3": import_utils.is_flash_attn_3_available,
    }.get(config.attn_implementation)
    if available is not None and not available():
        raise ConfigError(
            f"model.attn_implementation={config.attn_implementation}: its package is not installed, or there is no "
            "CUDA device for it; use model.attn_implementation=sdpa, torch's own"
        )


def load_model(config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """Load the model in evaluation mode (GRPO's ratios need the same network for sampling and for training).

    Before it is used, `grpo.rollout.load_check.choose_implementation` must check it. Raises ConfigError.
    """
    transformers_logging.disable_progress_bar()
    settings = {
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": config.attn_implementation,
        "trust_remote_code": config.trust_remote_code,
    }
    with explained(config):
        if config.name in RANDOM_MODELS:
            # The same weights each time and on every device, since a run starts from them.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                drawn = settings | {"dtype": torch.float32}
                model = AutoModelForCausalLM.from_config(architecture(config.name, False), **drawn)
            model.config.dtype = settings["dtype"]
            for parameter in model.parameters():  # not buffers, as in from_pretrained
                parameter.data = parameter.data.to(settings["dtype"])
        else:
            model = AutoModelForCausalLM.from_pretrained(model_source(config.name), **settings)
    model.to(device).eval()
    use_onednn(model)
    keep_fewer_activations(model)
    return model


@contextmanager
def explained(config: ModelConfig) -> Iterator[None]:
    """Raise a ConfigError, with the fix, for what transformers raises if it cannot build a model."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # of various types, if a file is damaged
        if "attn_implementation" in str(error) and config.attn_implementation == "sdpa":
            raise ConfigError(
                f"model.name={config.name} does not support torch's attention: add model.attn_implementation=eager"
            ) from error
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"model.name={config.name} could not be loaded: {reason}") from error


def copy_in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy whose trained parameters have this dtype, or keep their own dtype if the model has this one already.

    Parameters that require no gradient never change, so they are shared. Buffers keep their dtype.
    """

    def copied(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        if not parameter.requires_grad:
            return parameter
        narrowed = parameter.dtype if model.dtype == dtype else dtype
        return torch.nn.Parameter(parameter.detach().to(narrowed, copy=True))

    # The memo gives deepcopy the new parameters, so that it does not copy the old ones first.
    return copy.deepcopy(model, {id(parameter): copied(parameter) for parameter in model.parameters()})


def working_copy(master: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy that computes in a narrower dtype and passes each gradient to the master, in the master's dtype.

    An update of 1e-6 would be rounded away in bfloat16, so the optimizer updates the master; `refresh` then updates the
    copy.
    """
    work = copy_in_dtype(master, dtype)
    for parameter, original in zip(work.parameters(), master.parameters(), strict=True):
        if original.requires_grad:
            parameter.register_post_accumulate_grad_hook(functools.partial(_pass_gradient_to_master, original))
    return work


def _pass_gradient_to_master(original: torch.nn.Parameter, parameter: torch.nn.Parameter) -> None:
    assert parameter.grad is not None  # torch calls the hook after it has accumulated one
    grad = parameter.grad.to(original.dtype)
    parameter.grad = None
    original.grad = grad if original.grad is None else original.grad.add_(grad)


@torch.no_grad()
def refresh(model: PreTrainedModel, master: PreTrainedModel) -> None:
    """Update a copy to the master's current parameters, rounded to the copy's dtype."""
    for parameter, original in zip(model.parameters(), master.parameters(), strict=True):
        if parameter is not original:
            parameter.copy_(original)


def stop_token_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template_arguments: Mapping[str, Any] = MappingProxyType({}),
) -> list[int]:
    """All tokens that end a completion.

    They are the tokenizer's end-of-sequence token, those of the generation config, and the token with which the chat
    template closes an assistant's turn: that of a base model may be none of the others.
    """
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    closing = turn_tokens(tokenizer, template_arguments).closing
    vocabulary = vocabulary_size(model.config)
    found = [token for token in [tokenizer.eos_token_id, *stops, closing] if token is not None]
    return sorted({token for token in found if token < vocabulary})


def save_model(model: PreTrainedModel, stop_ids: Sequence[int], folder: str | Path) -> None:
    """Write a model, with a generation config that ends a completion where training did.

    Without it generate() would continue after the answer of a base model that was trained with a chat template.
    """
    model.save_pretrained(folder)
    known = model.generation_config.eos_token_id
    if {*stop_ids} != {*(known if isinstance(known, list) else [known])}:
        generation = copy.deepcopy(model.generation_config)
        generation.eos_token_id = sorted(stop_ids)
        generation.save_pretrained(folder)


def model_not_found(name: str, cause: Exception) -> ConfigError:
    """The error to raise if the model is found neither in a folder nor on the hub."""
    if Path(name).is_dir():
        return ConfigError(
            f"model.name={name} is not a folder that transformers can load a model from: {first_line(cause)}"
        )
    if is_hub_name(name) and (reason := why_offline()) is not None:
        return ConfigError(
            f"model.name={name} is neither a local folder nor complete in the cache, and {reason}: "
            f"{first_line(cause).rstrip('.')}; give a folder with model.name=DIR, or run once with a network: "
            f"python -m grpo download model.name={name}"
        )
    return ConfigError(
        f"model.name={name} is neither a local folder nor a model that the hub gave (wrong name, no access, or no "
        "network?); give a folder with model.name=DIR, or fetch it once with: python -m grpo download model.name=..."
    )
