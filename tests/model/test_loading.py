import json

import pytest
import torch
from transformers import AutoTokenizer

from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.config.errors import ConfigError
from grpo.model import loading as model_module
from grpo.model.loading import (
    check_model,
    copy_in_dtype,
    load_model,
    load_tokenizer,
    refresh,
    stop_token_ids,
    working_copy,
)
from grpo.tiny import MODEL_DIR
from grpo.training.experiment import build_experiment
from tests.architectures import random_model, tiny_architecture
from tests.tiny_model import tiny_config


def test_the_embedded_model_is_loaded_by_its_name():
    config = tiny_config()
    model = load_model(config, torch.device("cpu"))
    tokenizer = load_tokenizer(config)
    assert tokenizer.padding_side == "left"
    assert not model.training
    assert tokenizer.eos_token_id in stop_token_ids(model, tokenizer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_with_random_weights_equals_the_one_loaded_from_its_saved_weights(tmp_path, monkeypatch, dtype):
    """Its buffers are equal too: positions rounded to bfloat16 would change the outputs."""
    (tmp_path / "small.json").write_text((MODEL_DIR / "config.json").read_text())
    monkeypatch.setattr(model_module, "RANDOM_MODELS", {"small_random": tmp_path / "small.json"})
    state = torch.random.get_rng_state()
    model, again = (load_model(tiny_config(name="small_random", dtype=dtype), torch.device("cpu")) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    model.save_pretrained(tmp_path)
    loaded = load_model(tiny_config(name=str(tmp_path), dtype=dtype), torch.device("cpu"))
    ids = torch.arange(5, 305)[None]
    for other in (again, loaded):
        assert other.dtype == model.dtype == getattr(torch, dtype)
        assert torch.equal(model(ids).logits, other(ids).logits)


def test_a_working_copy_passes_its_gradient_to_the_master_and_is_refreshed_from_it(prompts):
    master = load_model(tiny_config(), torch.device("cpu"))
    work = working_copy(master, torch.bfloat16)
    ids = prompts.ids[:1, -12:]
    for repetition in (1, 2):
        work(ids, labels=ids).loss.backward()
        assert all(parameter.grad is None for parameter in work.parameters())
        if repetition == 1:
            once = [parameter.grad.clone() for parameter in master.parameters()]
    assert all(parameter.grad.dtype == torch.float32 for parameter in master.parameters())
    for parameter, grad in zip(master.parameters(), once, strict=True):
        assert torch.equal(parameter.grad, 2 * grad)
    exact = load_model(tiny_config(), torch.device("cpu"))
    exact(ids, labels=ids).loss.backward()
    ours, theirs = (torch.cat([p.flatten() for p in grads]) for grads in (once, [p.grad for p in exact.parameters()]))
    assert (ours - theirs).norm() / theirs.norm() < 0.05

    torch.optim.SGD(master.parameters(), lr=1e-2).step()
    refresh(work, master)
    for parameter, original in zip(work.parameters(), master.parameters(), strict=True):
        assert torch.equal(parameter, original.bfloat16())


def test_a_copy_shares_no_memory_keeps_tied_weights_tied_and_its_buffers_in_float32():
    model = load_model(tiny_config(), torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16):
        other = copy_in_dtype(model, dtype)
        assert {p.dtype for p in other.parameters()} == {dtype}
        assert all(p.requires_grad for p in other.parameters())  # trainable, so saved with a checkpoint
        assert len(list(other.parameters())) == len(list(model.parameters()))
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in model.parameters()}
        assert other.model.rotary_emb.inv_freq.dtype == torch.float32  # rounding would make positions inexact


@pytest.fixture
def folder(tmp_path):
    """A random model with the embedded model's tokenizer, and a function that changes keys of one of its files."""

    def change(name, **changes):
        file = tmp_path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    random_model("gpt2", bos_token_id=0).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path)
    return tmp_path, change


def test_a_padding_token_that_the_model_lacks_is_replaced_by_one_that_ends_completions(folder):
    (path, _) = folder
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"pad_token": "<|new|>"})
    tokenizer.save_pretrained(path)
    assert tokenizer.pad_token_id >= 336
    assert load_tokenizer(tiny_config(name=str(path))).pad_token_id == tokenizer.eos_token_id


def test_without_end_of_sequence_and_padding_tokens_the_models_config_is_used(folder):
    (path, change) = folder
    (path / "chat_template.jinja").unlink()  # it closes turns with a token, which would end completions
    change("tokenizer_config.json", eos_token=None, pad_token=None)
    change("config.json", eos_token_id=[5, 6])
    config = tiny_config(name=str(path))
    assert load_tokenizer(config).pad_token_id == 5
    change("config.json", eos_token_id=4000)  # outside the vocabulary
    change("generation_config.json", eos_token_id=7)
    assert load_tokenizer(config).pad_token_id == 7
    change("generation_config.json", eos_token_id=None)
    with pytest.raises(ConfigError, match="no token of its 336 ends a completion; set eos_token"):
        load_tokenizer(config)


def test_end_of_sequence_tokens_that_the_model_lacks_are_ignored(folder):
    (path, change) = folder
    change("generation_config.json", eos_token_id=[1, 4000])
    config = tiny_config(name=str(path))
    assert stop_token_ids(load_model(config, torch.device("cpu")), load_tokenizer(config)) == [1]


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_if_the_prompts_have_them(folder):
    (path, _) = folder
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["plus"])
    tokenizer.save_pretrained(path)
    settings = ["experiment=quickstart", f"model.name={path}", "hardware=cpu"]
    build_experiment(typed(compose_config(settings)))  # no prompt has the new token
    with pytest.raises(ConfigError, match=r"token 336 \(plus\) of the prompts is not one of the 336"):
        build_experiment(typed(compose_config([*settings, "data.system_prompt=plus"])))


def test_an_encoder_decoder_is_refused_by_its_config(tmp_path):
    tiny_architecture("bart", is_encoder_decoder=True).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is an encoder-decoder \(bart\)"):
        check_model(tiny_config(name=str(tmp_path)))
