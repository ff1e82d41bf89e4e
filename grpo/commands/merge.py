"""Merge a run's LoRA adapter into its base model, for programs that cannot load adapters.

python -m grpo merge run_dir=outputs/...                 into its merged_model/
python -m grpo merge run_dir=outputs/... output_dir=DIR model.dtype=bfloat16
Small changes of a weight are lost in bfloat16; in float32, the default, the model is the trained one to rounding.
"""

from pathlib import Path

from grpo.commands._common import find_model, own_arguments
from grpo.config.errors import ConfigError
from grpo.runs.files import commit_folder


def main(arguments: list[str]) -> None:
    """Merge and print where the model is."""
    own, rest = own_arguments(arguments, ["output_dir"])
    subject = find_model([*rest, "hardware.device=cpu", "model.device_map=cpu"])  # whatever device the run used
    model = subject.config.model
    if model.lora is None or model.lora.init_from is None or subject.weights is not None:
        what = "has no adapter" if model.lora is None else "has no final_model/ with its adapter yet"
        raise ConfigError(f"nothing to merge: {subject.folder.path if subject.folder else model.name} {what}")
    if "output_dir" in own:
        target = Path(own["output_dir"])
    elif subject.folder is not None:
        target = subject.folder.path / "merged_model"
    else:
        raise ConfigError("merge needs output_dir=DIR where no run folder is named")
    import torch
    from peft import PeftModel

    from grpo.model.loading import check_model, load_model, load_tokenizer
    from grpo.model.lora import adapter_errors, check_adapter, peft_settings

    check_model(model)
    check_adapter(model.lora)
    if target.exists():
        raise ConfigError(f"{target} exists already; remove it, or give another output_dir=DIR")
    temporary = target.with_name(f"{target.name}.tmp")
    if temporary.exists():
        raise ConfigError(f"{temporary} exists; it is left over from an interrupted merge: remove it")
    base = load_model(model, torch.device("cpu"))
    # With our settings, since those in the adapter's folder can name modules that peft imports.
    settings = peft_settings(model.lora, base)
    with adapter_errors(model.lora.init_from):
        merged = PeftModel.from_pretrained(base, model.lora.init_from, config=settings).merge_and_unload()
    temporary.mkdir(parents=True)
    merged.save_pretrained(temporary)
    load_tokenizer(model).save_pretrained(temporary)
    commit_folder(temporary, target)
    print(target)
