import json
from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel

from grpo.config.errors import ConfigError
from grpo.config.schema import LoraSettings
from grpo.model.loading import copy_in_dtype, refresh
from grpo.model.logps import completion_logps
from grpo.model.lora import add_adapter, check_adapter, save_adapter, switch_adapter
from grpo.model.packed import checkpoint_layers
from grpo.rollout.engine import Sampling
from grpo.rollout.llama_decoder import supports_fast_decoding
from grpo.rollout.load_check import load_checked_model
from grpo.rollout.native import CachedDecoder, FastDecoder, completion_mask, rollout
from tests.oracles import completion_logps_unshared
from tests.tiny_model import plain_completions, tiny_config

CPU = torch.device("cpu")
SETTINGS = LoraSettings(rank=4, alpha=8, target_modules="all-linear", init_from=None)


def adapted(settings=SETTINGS, seed=1, trained=True, dtype="float32"):
    """The embedded model with an adapter; with `trained` its weights are random, as after some training."""
    model = load_checked_model(tiny_config(dtype=dtype), CPU)
    add_adapter(model, settings, torch.float32, seed)
    if trained:
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_a_new_adapter_does_not_change_the_model_and_depends_only_on_the_seed(plain_model, prompts):
    state = torch.random.get_rng_state()
    model, again, other = (adapted(seed=seed, trained=False) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(model(prompts.ids).logits, load_checked_model(tiny_config(), CPU)(prompts.ids).logits)
    assert {name.split(".")[-2] for name in trained(model)} == {"default"}
    assert all("lora_" in name for name in trained(model))
    for name, parameter in trained(model).items():
        assert torch.equal(parameter, trained(again)[name])
        assert "lora_B" in name or not torch.equal(parameter, trained(other)[name])


def test_the_initial_adapter_does_not_depend_on_the_dtype_of_the_model():
    narrow, wide = trained(adapted(trained=False, dtype="bfloat16")), trained(adapted(trained=False))
    assert all(torch.equal(parameter, wide[name]) for name, parameter in narrow.items())


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_an_adapter_for_one_of_two_tied_weights_is_refused(module):
    with pytest.raises(ConfigError, match="are one weight"):
        adapted(replace(SETTINGS, target_modules=["q_proj", module]), trained=False)


def test_the_adapter_stays_in_float32_on_bfloat16_weights():
    model = adapted(dtype="bfloat16")
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in trained(copy_in_dtype(model, torch.bfloat16)).values()} == {torch.float32}


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "v_proj"], ["k_proj", "down_proj"]])
def test_decoding_with_an_adapter_equals_that_of_transformers(tokenizer, prompts, modules):
    model = adapted(replace(SETTINGS, target_modules=modules))
    assert supports_fast_decoding(model)
    greedy = Sampling(24, 0.0, (tokenizer.eos_token_id,), tokenizer.pad_token_id)
    ours = rollout(model, prompts, greedy, group_size=1, keys=torch.zeros(3, 2, dtype=torch.int32), token_budget=10**6)
    theirs = model.generate(prompts.ids, attention_mask=prompts.mask, max_new_tokens=24, do_sample=False)
    theirs = theirs[:, prompts.ids.shape[1] :]
    width = max(ours.ids.shape[1], theirs.shape[1])
    pad = [torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (ours.ids, ours.attention_mask, theirs)]
    assert torch.equal(pad[0] * pad[1], pad[2] * completion_mask(pad[2], greedy.stop_ids))


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-4), ("bfloat16", 0.1)])
@torch.no_grad()
def test_the_fast_decoder_applies_the_adapter_as_the_plain_one_does(prompts, dtype, rounding):
    model, rows = adapted(dtype=dtype), torch.tensor([0, 0, 1, 2])
    off = copy_in_dtype(model, model.dtype)
    switch_adapter(off, on=False)
    fast, plain, without = (
        kind(of, prompts, rows, 8) for kind, of in ((FastDecoder, model), (CachedDecoder, model), (FastDecoder, off))
    )
    for token in (7, 11):
        for decoder in (fast, plain, without):
            decoder.read(torch.full((4,), token))
        assert (fast.logits - plain.logits).abs().max() < rounding * plain.logits.abs().max()
        assert (fast.logits - without.logits).abs().max() > 2 * rounding * plain.logits.abs().max()


def test_only_the_adapter_gets_gradients_and_they_equal_those_of_the_plain_pass(prompts):
    model = adapted()
    completions = plain_completions(torch.randint(5, 200, (6, 9)), torch.arange(6) // 2)
    grads = []
    for logps in (completion_logps, completion_logps_unshared):
        logps(model, prompts, completions, 0.9).logps.sum().backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        grads.append(torch.cat([p.grad.flatten() for p in trained(model).values()]))
        model.zero_grad()
    assert (grads[0] - grads[1]).norm() < 1e-4 * grads[1].norm()
    assert grads[1].norm() > 0


def test_activation_checkpointing_gives_the_adapter_the_same_gradient(prompts):
    """The input of the first layer requires no gradient then."""
    completions = plain_completions(torch.randint(5, 200, (6, 9)), torch.arange(6) // 2)
    grads = []
    for twice in (False, True):
        model = adapted()
        if twice:
            checkpoint_layers(model)
        completion_logps(model, prompts, completions, 0.9).logps.sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in trained(model).values()]))
    assert torch.equal(*grads)


def test_a_reference_shares_the_frozen_weights_and_has_a_separate_adapter(prompts):
    policy, base = adapted(), load_checked_model(tiny_config(), CPU)
    reference = copy_in_dtype(policy, torch.float32)
    shared = {p.data_ptr() for p in policy.parameters() if not p.requires_grad}
    assert shared == {p.data_ptr() for p in reference.parameters() if not p.requires_grad}
    assert not {p.data_ptr() for p in trained(policy).values()} & {p.data_ptr() for p in trained(reference).values()}

    switch_adapter(reference, on=False)
    assert torch.equal(reference(prompts.ids).logits, base(prompts.ids).logits)
    with torch.no_grad():
        for parameter in trained(policy).values():
            parameter.add_(0.01)
    switch_adapter(reference, on=True)
    assert not torch.equal(reference(prompts.ids).logits, policy(prompts.ids).logits)
    refresh(reference, policy)
    assert torch.equal(reference(prompts.ids).logits, policy(prompts.ids).logits)


def test_init_from_loads_an_adapter_without_rounding_it(tmp_path):
    model = adapted(dtype="bfloat16")
    save_adapter(model, tmp_path)
    again = trained(adapted(replace(SETTINGS, init_from=str(tmp_path)), seed=9, trained=False, dtype="bfloat16"))
    assert all(torch.equal(parameter, again[name]) for name, parameter in trained(model).items())


def test_a_saved_adapter_can_be_loaded_by_peft_and_with_init_from(tmp_path, prompts):
    model = adapted()
    save_adapter(model, tmp_path)
    expected = model(prompts.ids, attention_mask=prompts.mask).logits
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    base = load_checked_model(tiny_config(), CPU)
    merged = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    again = adapted(replace(SETTINGS, init_from=str(tmp_path)), seed=9, trained=False)
    for other in (loaded, merged):
        assert torch.allclose(other(prompts.ids, attention_mask=prompts.mask).logits, expected, atol=1e-4)
    assert torch.equal(again(prompts.ids, attention_mask=prompts.mask).logits, expected)


def test_unusable_adapter_settings_are_refused_with_a_suggested_fix(tmp_path):
    save_adapter(adapted(replace(SETTINGS, target_modules=["q_proj", "v_proj"])), tmp_path)
    settings = replace(SETTINGS, init_from=str(tmp_path))
    check_adapter(settings)
    with pytest.raises(ConfigError, match=r"set model.lora.target_modules to \[q_proj,v_proj\]"):
        adapted(settings, trained=False)
    with pytest.raises(ConfigError, match=r"set model.lora.rank=4 model.lora.alpha=8"):
        check_adapter(replace(settings, rank=16))
    with pytest.raises(ConfigError, match="is not the folder of an adapter"):
        check_adapter(replace(settings, init_from=str(tmp_path / "nowhere")))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    with pytest.raises(ConfigError, match="not trained here: use_dora=True"):
        check_adapter(settings)
    file.write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(ConfigError, match="is not LoRA but IA3"):
        check_adapter(settings)
    with pytest.raises(ConfigError, match=r"model\.lora\.target_modules="):
        adapted(replace(SETTINGS, target_modules=["no_such_layer"]), trained=False)
