import pytest
import torch

from grpo.model import loading as model_module
from grpo.model.loading import copy_in_dtype, load_model, load_tokenizer, refresh, stop_token_ids, working_copy
from grpo.tiny import MODEL_DIR
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
