"""Write a run's model as one that any program can load: its LoRA adapter is merged into the base model.

python -m grpo merge run_dir=outputs/...                 into its merged_model/
python -m grpo merge run_dir=outputs/... output_dir=DIR model.dtype=bfloat16
python -m grpo merge run_dir=outputs/... checkpoint=C    the weights of a checkpoint: best, or one of its steps
Without an adapter, checkpoint= writes the model with the weights of that checkpoint. Small changes of a weight are lost
in bfloat16; in float32, the default, the model is the trained one to rounding.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from grpo.commands._common import ModelUnderTest, find_model, own_arguments
from grpo.config.errors import ConfigError
from grpo.runs.files import commit_folder, discard


def main(arguments: list[str]) -> None:
    """Merge and print where the model is."""
    own, rest = own_arguments(arguments, ["output_dir"])
    subject = find_model([*rest, "hardware.device=cpu", "model.device_map=cpu"])  # whatever device the run used
    model = subject.config.model
    asked = any(each.startswith("checkpoint=") for each in rest)
    if not asked and (model.lora is None or model.lora.init_from is None or subject.weights is not None):
        what = "has no adapter" if model.lora is None else "has no final_model/ with its adapter yet; give checkpoint="
        raise ConfigError(f"nothing to merge: {subject.folder.path if subject.folder else model.name} {what}")
    if "output_dir" in own:
        target = Path(own["output_dir"])
    elif subject.folder is not None:
        target = subject.folder.path / "merged_model"
    else:
        raise ConfigError("merge needs output_dir=DIR where no run folder is named")
    from grpo.data.prompts import template_arguments
    from grpo.model.loading import check_model, load_tokenizer, prepare_hub, save_model, stop_token_ids

    prepare_hub(model.name)
    check_model(model)
    if target.exists():
        raise ConfigError(f"{target} exists already; remove it, or give another output_dir=DIR")
    temporary = target.with_name(f"{target.name}.tmp")
    if temporary.exists():
        raise ConfigError(f"{temporary} exists; it is left over from an interrupted merge: remove it")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{target} cannot be created ({error.strerror}); give another output_dir=DIR") from error
    try:
        tokenizer = load_tokenizer(model)
        merged = merged_model(subject, tokenizer)
        stops = stop_token_ids(merged, tokenizer, template_arguments(subject.config.data))
        save_model(merged, stops, temporary)
        tokenizer.save_pretrained(temporary)
        if os.path.lexists(target):
            raise ConfigError(f"{target} was created meanwhile; remove it, or give another output_dir=DIR")
        commit_folder(temporary, target)
    except BaseException:
        discard(temporary)
        raise
    print(target)


def merged_model(subject: ModelUnderTest, tokenizer: Any) -> Any:
    """The model with its adapter `model.lora.init_from` or the weights of a checkpoint, as one without an adapter.

    Raises ConfigError if the run's config, the tokenizer or the starting model changed since the run was started.
    """
    import torch
    from peft import PeftModel

    from grpo.model.loading import load_model
    from grpo.model.lora import adapter_errors, add_adapter, check_adapter, peft_settings, save_adapter
    from grpo.runs.checkpoint import StoredTensors, load_weights
    from grpo.training.digests import check_digests, config_digest, tokenizer_digest, weights_digest

    model = subject.config.model
    weights = subject.weights
    cpu = torch.device("cpu")
    if model.lora is not None:
        check_adapter(model.lora)
    loaded = load_model(model, cpu)
    if subject.folder is not None:
        found = {
            "config": config_digest(subject.folder),
            "tokenizer": tokenizer_digest(tokenizer),
            "weights": weights_digest(loaded, subject.config),
        }
        check_digests(subject.folder, found, subject.changed, subject.config.accept_changes)
    if weights is None:
        assert model.lora is not None and model.lora.init_from is not None  # checked by `main`
        # With our settings, since those in the adapter's folder can name modules that peft imports.
        settings = peft_settings(model.lora, loaded)
        with adapter_errors(model.lora.init_from):
            return PeftModel.from_pretrained(loaded, model.lora.init_from, config=settings).merge_and_unload()
    if model.lora is not None:
        add_adapter(loaded, model.lora, getattr(torch, model.dtype), subject.config.seed)
    load_weights(StoredTensors(weights / "model.safetensors"), loaded)
    if model.lora is None:
        return loaded
    with tempfile.TemporaryDirectory() as adapter:
        save_adapter(loaded, adapter)
        del loaded  # before the model is loaded again, without the adapter
        return PeftModel.from_pretrained(load_model(model, cpu), adapter).merge_and_unload()
