"""LoRA (Hu et al., arXiv 2106.09685) through peft: weights stay as they are, and small products are added to theirs.

What is trained is the adapter alone; it has a dtype of its own, `model.dtype`, while the weights below it are held in
that of the arithmetic. Nothing else in the engine asks which of the two a model is: what is trained is what takes a
gradient.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from grpo.config.errors import ConfigError, first_line
from grpo.config.schema import LoraSettings

PLAIN = {"use_dora": False, "use_rslora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}}


def add_adapter(model: PreTrainedModel, settings: LoraSettings, dtype: torch.dtype, seed: int) -> None:
    """Give a model an adapter in this dtype and let nothing else take a gradient.

    It begins as `settings.init_from` has it, else as one that adds nothing, drawn from the seed. Raises ConfigError
    where it does not fit the model.
    """
    from peft import LoraConfig, inject_adapter_in_model  # here, since it takes a second to import

    modules = settings.target_modules
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft only divides it by the rank
        target_modules=modules,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )
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
        for layer in adapted_layers(model):  # again, since peft drew in the dtype of the weights, which may be narrower
            layer.reset_lora_parameters("default", init_lora_weights=True)
    if settings.init_from is not None:
        _begin_with(model, settings.init_from)


def check_adapter(settings: LoraSettings) -> None:
    """Raise ConfigError where `settings.init_from` is no adapter of these settings, before any weight is loaded."""
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
    special = [f"{key}={stored[key]}" for key, plain in PLAIN.items() if (stored.get(key) or plain) != plain]
    if special:
        raise ConfigError(
            f"model.lora.init_from={settings.init_from} is a variant of LoRA that is not trained here: "
            f"{', '.join(special)}; merge it into its model with peft and start from that"
        )
    if (stored["r"], stored["lora_alpha"]) != (settings.rank, settings.alpha):
        raise ConfigError(
            f"model.lora.init_from={settings.init_from} has another size; set model.lora.rank={stored['r']} "
            f"model.lora.alpha={stored['lora_alpha']}"
        )


def adapter_config(folder: str | Path) -> dict[str, Any] | None:
    """What peft keeps beside an adapter's weights; None where the folder is not that of an adapter."""
    file = Path(folder) / "adapter_config.json"
    return json.loads(file.read_text()) if file.exists() else None


def _begin_with(model: PreTrainedModel, folder: str) -> None:
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    found: Any = set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))
    lacking = [key for key in found.missing_keys if "lora_" in key]
    if lacking or found.unexpected_keys:
        raise ConfigError(
            f"model.lora.init_from={folder} adapts other layers; set model.lora.target_modules to "
            f"[{','.join(_modules_in(folder))}], and model.name to the model that it was trained on"
        )


def _modules_in(folder: str) -> list[str]:
    """The last parts of the names of the layers that an adapter's file is for."""
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as stored:
        return sorted({key.split(".lora_")[0].rpartition(".")[2] for key in stored.keys()})  # noqa: SIM118


def _check_tied(model: PreTrainedModel) -> None:
    """Raise ConfigError where a weight that the model uses twice is adapted in one place: merging would change both."""
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
    """The factors (rank, inputs) and (outputs, rank) whose product is added to a linear layer's weights, if any is."""
    if not hasattr(layer, "lora_A") or layer.disable_adapters:
        return None
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]


def switch_adapter(model: PreTrainedModel, on: bool) -> None:
    """Let a model's adapter count, or be as if it was not there. Nothing for a model without one."""
    for layer in adapted_layers(model):
        layer.enable_adapters(on)


def save_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Write the adapter alone, as peft and transformers load it on top of its model."""
    from peft import get_peft_model_state_dict

    Path(folder).mkdir(parents=True, exist_ok=True)
    settings: Any = model.peft_config["default"]  # peft's dataclass
    replace(settings, inference_mode=True).save_pretrained(folder)
    # The names are those within the wrapper that peft would have around the model.
    weights = {f"base_model.model.{k}": v.contiguous() for k, v in get_peft_model_state_dict(model).items()}
    save_file(weights, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
