"""LoRA (Hu et al., arXiv 2106.09685) through peft: low-rank products are added to the weights, which stay frozen.

Only the adapter is trained. Its dtype is `model.dtype`; the frozen weights have the compute dtype. Other code rarely
distinguishes models with and without an adapter: the trained parameters are those that require a gradient.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from grpo.config.errors import ConfigError, first_line
from grpo.config.schema import LoraSettings
from grpo.runs.files import read_json

# The types of the values that are read from adapter_config.json.
ADAPTER = {"peft_type": str, "r": int, "lora_alpha": float, "base_model_name_or_path": str | None}
PLAIN = {"use_dora": False, "use_rslora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}}
PATTERNS = ("rank_pattern", "alpha_pattern")  # peft itself sets them for the fused weights of experts
# peft refuses to adapt these layers of these architectures, whose kernels use the weights directly.
NOT_ADAPTED = ("out_proj", "conv1d")
MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")


def add_adapter(model: PreTrainedModel, settings: LoraSettings, dtype: torch.dtype, seed: int) -> None:
    """Add an adapter with this dtype to a model and freeze all other parameters.

    The adapter is loaded from `settings.init_from`, or drawn from the seed such that it adds nothing at first. Raises
    ConfigError if it does not fit the model.
    """
    from peft import inject_adapter_in_model  # imported here because it takes a second

    modules = settings.target_modules
    config = peft_settings(settings, model)
    with torch.random.fork_rng(devices=[]):
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            raise ConfigError(f"model.lora.target_modules={modules}: {first_line(error)}") from error
        _check_tied(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        torch.manual_seed(seed)
        # Drawn again, since peft draws in the dtype of the weights, which may be narrower.
        for layer in adapted_layers(model):
            layer.reset_lora_parameters("default", init_lora_weights=True)
    _check_names(model)
    if settings.init_from is not None:
        _begin_with(model, settings.init_from)


def peft_settings(settings: LoraSettings, model: PreTrainedModel) -> Any:
    """The settings of an adapter as peft's LoraConfig."""
    from peft import LoraConfig  # imported here because it takes a second

    modules = settings.target_modules
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft only divides it by the rank
        target_modules=modules,
        exclude_modules=list(NOT_ADAPTED) if modules == "all-linear" and model.config.model_type in MAMBA else None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )


def _check_names(model: PreTrainedModel) -> None:
    """Raise ConfigError if peft would not find the layers of the adapter again when it is loaded."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    lacking = _misfits(set_peft_model_state_dict(model, get_peft_model_state_dict(model)))  # sets its own values
    if lacking:
        layer = lacking[0].split(".lora_")[0].rpartition(".")[2]
        raise ConfigError(
            f"model.lora.target_modules: peft could not load an adapter of {layer} of {type(model).__name__} again; "
            "name other layers, such as [q_proj,v_proj]"
        )


def _misfits(found: Any) -> list[str]:
    """The names of an adapter's tensors without a place in the model, and of those of the model that it lacks.

    found: what `peft.set_peft_model_state_dict` returns.
    """
    return [*found.unexpected_keys, *(key for key in found.missing_keys if "lora_" in key)]


def check_adapter(settings: LoraSettings) -> None:
    """Raise ConfigError if `settings.init_from` is not an adapter with these settings. Loads no weights."""
    if settings.init_from is None:
        return
    stored = adapter_config(settings.init_from)
    if stored is not None and stored.get("peft_type") != "LORA":
        raise ConfigError(f"model.lora.init_from={settings.init_from} is not LoRA but {stored.get('peft_type')}")
    if stored is None or not (Path(settings.init_from) / "adapter_model.safetensors").exists():
        raise ConfigError(
            f"model.lora.init_from={settings.init_from} is not the folder of an adapter, which holds "
            "adapter_config.json and adapter_model.safetensors"
        )
    # Whether the patterns of an adapter of experts are those of this model is known once it is loaded.
    checked = {key: plain for key, plain in PLAIN.items() if not (stored.get("target_parameters") and key in PATTERNS)}
    special = [f"{key}={stored[key]}" for key, plain in checked.items() if (stored.get(key) or plain) != plain]
    if special:
        raise _unusual(settings.init_from, special)
    rank = stored.get("r")
    alpha = stored.get("lora_alpha")
    if (rank, alpha) != (settings.rank, settings.alpha):
        raise ConfigError(
            f"model.lora.init_from={settings.init_from} has another size; set model.lora.rank={rank} "
            f"model.lora.alpha={alpha}"
        )


def _unusual(folder: str, settings: list[str]) -> ConfigError:
    return ConfigError(
        f"model.lora.init_from={folder} is a variant of LoRA that is not trained here: {', '.join(settings)}; merge it "
        "into its model with peft and start from that"
    )


def adapter_config(folder: str | Path) -> dict[str, Any] | None:
    """The content of the adapter_config.json in a folder; None if the folder does not contain an adapter."""
    file = Path(folder) / "adapter_config.json"
    return read_json(file, ADAPTER) if file.exists() else None


def _begin_with(model: PreTrainedModel, folder: str) -> None:
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    stored = adapter_config(folder) or {}
    config: Any = model.peft_config["default"]  # peft's dataclass
    special = [
        f"{key}={stored.get(key)}" for key in PATTERNS if (stored.get(key) or {}) != (getattr(config, key) or {})
    ]
    if special:
        raise _unusual(folder, special)
    with adapter_errors(folder):
        lacking = _misfits(set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu")))
    if lacking:
        raise ConfigError(
            f"model.lora.init_from={folder} adapts other layers; set model.lora.target_modules to "
            f"[{','.join(_modules_in(folder))}], and model.name to the model that it was trained on"
        )


@contextmanager
def adapter_errors(folder: str) -> Iterator[None]:
    """Turn the errors of a damaged adapter, or of one for another model, into a ConfigError."""
    try:
        yield
    except (SafetensorError, RuntimeError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"model.lora.init_from={folder} does not fit the model, or is damaged: {reason}") from error


def _modules_in(folder: str) -> list[str]:
    """The names of the layers that a stored adapter adapts, without their parent modules (such as q_proj)."""
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as stored:
        return sorted({key.split(".lora_")[0].rpartition(".")[2] for key in stored.keys()})  # noqa: SIM118


def _check_tied(model: PreTrainedModel) -> None:
    """Raise ConfigError if one of two tied embeddings is adapted: merging would change both."""
    ends = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    weights = {getattr(layer, "base_layer", layer).weight.data_ptr() for layer in ends.values()}
    if len(weights) == 1 and any(hasattr(layer, "base_layer") for layer in ends.values()):
        raise ConfigError(
            "model.lora.target_modules: the input and output embeddings of this model are one weight, which an "
            "adapter of one of them cannot be merged into; leave them out, as all-linear does"
        )


def adapted_layers(model: PreTrainedModel) -> list[Any]:
    """The layers that have an adapter."""
    return [layer for layer in model.modules() if hasattr(layer, "lora_A")]


def low_rank(layer: Any) -> tuple[Tensor, Tensor] | None:
    """The factors (rank, inputs), (outputs, rank) of what LoRA adds to the weights; None without an active adapter."""
    if not hasattr(layer, "lora_A") or layer.disable_adapters:
        return None
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]


def is_adapter_output(name: str) -> bool:
    """Whether a parameter of this name is a B matrix of an adapter; while these are 0 the adapter changes nothing."""
    return bool(re.search(r"\.lora_(embedding_)?B\.", name))


def switch_adapter(model: PreTrainedModel, on: bool) -> None:
    """Enable or disable a model's adapter. Does nothing for a model without one."""
    for layer in adapted_layers(model):
        layer.enable_adapters(on)


def save_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Write only the adapter, in the format that peft and transformers load."""
    from peft import get_peft_model_state_dict

    Path(folder).mkdir(parents=True, exist_ok=True)
    settings: Any = model.peft_config["default"]  # peft's dataclass
    replace(settings, inference_mode=True).save_pretrained(folder)
    # The names are those in peft's model wrapper, which is not used here.
    weights = {f"base_model.model.{k}": v.contiguous() for k, v in get_peft_model_state_dict(model).items()}
    save_file(weights, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
