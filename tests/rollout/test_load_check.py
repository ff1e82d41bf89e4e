"""The check of loaded models: what it chooses, and what it refuses, for tiny random models of many architectures.

The whole table is slow. It is the one in docs/models.md: python -m tests.rollout.test_load_check
"""

import logging
import re
import tempfile
from copy import deepcopy

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.config.errors import ConfigError
from grpo.config.schema import LoraSettings
from grpo.model.implementation import implementation_of
from grpo.model.linear import use_onednn
from grpo.model.loading import load_model
from grpo.model.lora import adapted_layers, add_adapter, check_adapter, save_adapter
from grpo.model.packed import NAME
from grpo.rollout.load_check import LARGEST_LOGIT, choose_implementation
from grpo.tiny import MODEL_DIR
from grpo.training.experiment import build_experiment
from tests.architectures import kinds, random_model, tiny_architecture
from tests.launches import ROOT
from tests.tiny_model import tiny_config

pytestmark = pytest.mark.usefixtures("onednn_for_small_weights")

DOCUMENT = ROOT / "docs" / "models.md"
CPU = torch.device("cpu")
LONGEST = 300  # tokens; the windows of the tiny models are 16
SAMPLE = {  # the implementations that are chosen: training, sampling
    "llama": ("packed", "fast"),
    "gpt2": ("packed", "cached"),
    "qwen3_moe": ("packed", "cached"),
    "gemma3_text": ("cached", "cached"),  # a sliding window
    "qwen3_5_text": ("plain", "cached"),  # linear attention, whose cached states have no gradient
    "lfm2": ("cached", "cached"),  # convolutions, which would mix the sequences of a packed row
    "mamba": ("plain", "plain"),  # only states
}
HEADER = """# Models

Every model is checked when it is loaded, with its adapter if it has one: sampling, log-probabilities and their
gradient are compared with plain forward passes of transformers, one row at a time, in float32 (if there is memory
for that) and beyond every attention window that the sequences of the run can pass (`grpo/rollout/load_check.py`).
The fastest implementation that agrees is used. If none agrees, the model is refused in one line. A difference is
accepted up to 10 times the change that rounding the input embeddings once makes.

The table is the result for tiny models with random weights, of every architecture that transformers {version} offers
for causal language models and that can be built small from its config: {works} work and {refused} are refused. It is
written by `python -m tests.rollout.test_load_check`.

- **Training**: `packed` computes all sequences in one row without padding, and a prompt once for its group; `cached`
  computes a prompt once for its group, through transformers' cache; `plain` computes it once per completion.
- **Sampling**: `fast` is the decoder for the Llama family, which is also implemented in C for processors;
  `cached` computes a prompt once for its group and pads the prompts; `plain` pads nothing, and decodes prompts of
  different lengths one after the other.
- **Difference**: the largest difference of a logit, relative to the largest logit, in millionths.
- **LoRA**: whether an adapter with `tuning=lora` passes the same check, and is the same after saving and loading.

| architecture | training | sampling | difference | LoRA |
|---|---|---|---|---|
"""


def loaded(kind, **changes):
    model = random_model(kind, **changes)
    use_onednn(model)
    return model


def has_working_adapter(model):
    """Whether an adapter of all linear layers passes the check, and is the same after saving and loading."""
    adapted = deepcopy(model)
    settings = LoraSettings(rank=4, alpha=4, target_modules="all-linear", init_from=None)
    add_adapter(adapted, settings, torch.float32, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    choose_implementation(adapted, LONGEST)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapted, folder)
        settings.init_from = folder
        check_adapter(settings)
        again = deepcopy(model)
        add_adapter(again, settings, torch.float32, seed=1)
    ids = torch.arange(40, 60)[None]
    return torch.equal(adapted(ids).logits, again(ids).logits)


@pytest.mark.parametrize("kind", SAMPLE)
def test_the_fastest_implementation_that_gives_the_models_numbers_is_chosen(kind):
    model = loaded(kind)
    choose_implementation(model, LONGEST)
    assert (implementation_of(model).training, implementation_of(model).sampling) == SAMPLE[kind]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["qwen3_moe", "mamba"])
def test_an_adapter_of_experts_or_of_a_recurrent_model_works_and_can_be_loaded_again(kind):
    model = loaded(kind)
    choose_implementation(model, LONGEST)
    assert has_working_adapter(model)


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("bert", "changes the logits of its output head in an unknown way"),
        ("deepseek_v32", "results differ from those of a plain forward pass"),  # beyond its sparse index
        ("xlnet", "results differ from those of a plain forward pass"),
    ],
)
def test_a_model_whose_numbers_are_not_reproduced_is_refused_in_one_line(kind, reason):
    model = loaded(kind)
    with pytest.raises(ConfigError, match=reason) as refused:
        choose_implementation(model, LONGEST)
    assert "\n" not in str(refused.value)
    assert "choose another model.name" in str(refused.value)


def test_a_window_counts_only_if_the_sequences_can_pass_it():
    """Sparse attention and sliding windows are full attention for shorter sequences."""
    for longest, path in ((16, "packed"), (17, "cached")):
        model = loaded("mistral")
        choose_implementation(model, longest)
        assert implementation_of(model).training == path
    choose_implementation(loaded("deepseek_v32"), max_length=16)
    with pytest.raises(ConfigError):
        choose_implementation(loaded("deepseek_v32"), max_length=17)


def test_a_window_in_a_nested_config_is_found():
    """The config of multimodal models holds that of their text model."""
    from transformers import AutoConfig

    config = AutoConfig.for_model("gemma3", text_config=random_model("gemma3_text").config.to_dict())
    config.vision_config.update({"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    config.vision_config.update({"image_size": 28, "patch_size": 14, "intermediate_size": 16})
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not hasattr(model.config, "sliding_window")
    choose_implementation(model, LONGEST)
    assert implementation_of(model).training == "cached"


def test_a_class_with_the_name_of_a_known_one_is_not_taken_for_it():
    """Remote code may define its own LlamaModel; this one has other positions."""
    model = LlamaForCausalLM(LlamaConfig(**loaded("llama").config.to_dict())).eval()

    class LlamaModel(modeling_llama.LlamaModel):
        pass

    model.model.__class__ = LlamaModel
    choose_implementation(model, LONGEST)
    assert implementation_of(model).sampling == "cached"


def test_a_soft_cap_and_a_factor_of_the_logits_are_reproduced():
    """With small weights a soft cap changes nothing that could be seen in the logits themselves."""
    capped = loaded("gemma2", final_logit_softcapping=5.0)
    choose_implementation(capped, LONGEST)
    assert implementation_of(capped).logit_cap == 5.0
    scaled = loaded("cohere", logit_scale=0.25)
    choose_implementation(scaled, LONGEST)
    assert implementation_of(scaled).logit_scale == pytest.approx(0.25, rel=1e-5)
    undeclared = loaded("gemma2", final_logit_softcapping=5.0)
    undeclared.config.final_logit_softcapping = None  # as in an architecture that names it otherwise
    forward = undeclared.forward

    def capped_forward(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 5.0 * torch.tanh(output.logits / 5.0)
        return output

    undeclared.forward = capped_forward
    assert (
        undeclared(torch.arange(30, 50)[None]).logits - forward(torch.arange(30, 50)[None]).logits
    ).abs().max() < 0.1
    with pytest.raises(ConfigError, match="changes the logits of its output head"):
        choose_implementation(undeclared, LONGEST)


def test_attention_with_a_soft_cap_is_not_packed_however_small_its_scores_are():
    tokens = torch.zeros(1, 2, 5, 8)
    for name in ("softcap", "s_aux"):
        with pytest.raises(TypeError, match=f"do not support attention with {name}"):
            ALL_ATTENTION_FUNCTIONS[NAME](None, tokens, tokens, tokens, None, scaling=1.0, packing=None, **{name: 50.0})


def test_a_model_in_bfloat16_is_checked_in_float32_and_keeps_its_bits(caplog):
    model = loaded("qwen3_5_text").to(torch.bfloat16)
    before = [parameter.clone() for parameter in model.parameters()]
    choose_implementation(model, LONGEST)
    assert implementation_of(model).training == "plain"  # rounding to bfloat16 would hide that packed rows are wrong
    for parameter, former in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, former)
        assert parameter.dtype == torch.bfloat16
    model = loaded("mamba").to(torch.bfloat16)
    with pytest.raises(ConfigError, match="it fails with RuntimeError"):  # transformers' own code does, on a CPU
        choose_implementation(model, LONGEST)


def test_a_layer_that_changes_the_result_of_a_linear_layer_in_place_can_be_trained():
    """OLMo clips queries, keys and values."""
    model = loaded("olmo", clip_qkv=0.05)
    choose_implementation(model, LONGEST)
    assert implementation_of(model).training == "packed"


def test_a_model_without_torchs_attention_is_refused_with_the_setting_that_works(tmp_path):
    random_model("bloom").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"add model\.attn_implementation=eager$"):
        load_model(tiny_config(name=str(tmp_path)), CPU)
    model = load_model(tiny_config(name=str(tmp_path), attn_implementation="eager"), CPU)
    choose_implementation(model, LONGEST)


@pytest.mark.parametrize(
    ("kind", "said"), [("phimoe", "is not supported: it fails"), ("laguna", "peft could not load an adapter")]
)
def test_an_adapter_that_cannot_be_trained_or_loaded_again_is_refused_before_training(tmp_path, kind, said):
    random_model(kind).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path)
    settings = ["experiment=quickstart", "tuning=lora", "hardware=cpu", f"model.name={tmp_path}"]
    experiment = build_experiment(typed(compose_config(settings)))
    with pytest.raises(ConfigError, match=said):
        experiment.load_policy()


def test_an_adapter_is_compared_although_it_changes_nothing_at_first():
    """The fast decoder computes the product of the matrices itself, so it does not know that this layer doubles it."""
    model = load_model(tiny_config(), CPU)
    add_adapter(
        model, LoraSettings(rank=4, alpha=8, target_modules="all-linear", init_from=None), torch.float32, seed=0
    )
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    choose_implementation(model, LONGEST)
    assert implementation_of(model).sampling == "fast"
    layer = adapted_layers(model)[0]

    class Doubled(type(layer)):
        def forward(self, x):
            return 2 * super().forward(x) - self.base_layer(x)

    layer.__class__ = Doubled
    choose_implementation(model, LONGEST)
    assert implementation_of(model).sampling == "cached"
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_model_that_fails_only_in_the_dtype_of_the_computation_is_refused():
    model = loaded("mamba")
    choose_implementation(model, LONGEST)
    with pytest.raises(ConfigError, match="it fails with RuntimeError"):  # transformers' own code does, on a CPU
        choose_implementation(model, LONGEST, torch.bfloat16)


def table():
    """The rows of the table in docs/models.md by architecture, without those that cannot be built small."""
    rows = {}
    for kind in kinds():
        try:
            model = loaded(kind)
        except Exception:  # its config names its sizes in another way
            continue
        if tiny_architecture(kind).is_encoder_decoder:  # `check_model` refuses it
            rows[kind] = f"| {kind} | refused: it is an encoder-decoder | | | |\n"
            continue
        try:
            differences = choose_implementation(model, LONGEST)
        except ConfigError as error:
            reason = str(error).partition(" is not supported: ")[2].removesuffix("; choose another model.name")
            rows[kind] = f"| {kind} | refused: {shortened(reason)} | | | |\n"
            continue
        try:
            lora = "yes" if has_working_adapter(model) else "no: differs after loading"
        except ConfigError as error:
            lora = "no: the check refuses it" if "is not supported" in str(error) else "no: it cannot be loaded again"
        chosen = implementation_of(model)
        millionths = max(differences.values()) / LARGEST_LOGIT * 1e6
        rows[kind] = f"| {kind} | {chosen.training} | {chosen.sampling} | {millionths:.1g} | {lora} |\n"
    return rows


def shortened(reason):
    return re.sub(r"differ by .*", "differ", reason.partition(";")[0])[:120].replace("|", "/")


def document(rows):
    refused = sum("| refused" in row for row in rows.values())
    head = HEADER.format(version=transformers.__version__, works=len(rows) - refused, refused=refused)
    return head + "".join(rows.values())


@pytest.mark.slow
def test_docs_models_md_is_what_the_check_finds_for_every_architecture():
    """The differences are rounding, which varies between machines, so they are not compared."""

    def comparable(row):
        columns = row.split("|")
        return [*columns[:4], *columns[5:]] if "refused" not in row else columns[1]

    rows = table()
    documented = {row.split("|")[1].strip(): row for row in DOCUMENT.read_text().splitlines() if row.startswith("| ")}
    assert len(rows) >= 40
    assert {kind: comparable(row.strip()) for kind, row in rows.items()} == {
        kind: comparable(row) for kind, row in documented.items() if kind != "architecture"
    }


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    DOCUMENT.write_text(document(table()))
