import copy
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.config.schema import LoraSettings
from grpo.model.gated_mlp import keep_fewer_activations
from grpo.model.linear import use_onednn
from grpo.model.lora import add_adapter

IDS = torch.arange(5, 45).view(2, 20)


@pytest.fixture(params=["llama", "mistral", "qwen2", "qwen3"])
def plain(request):
    settings = {"vocab_size": 100, "hidden_size": 128, "intermediate_size": 576, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **settings, **heads)).eval()


def passes(model):
    """The logits, the gradients by name, and the bytes that were kept for the backward pass."""
    kept = {}
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(IDS).logits
    logits.logsumexp(dim=-1).sum().backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return logits, gradients, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def check(plain, ours, onednn):
    if onednn:
        use_onednn(plain)
        use_onednn(ours)
    (logits, gradients, memory), (our_logits, our_gradients, our_memory) = passes(plain), passes(ours)
    tolerance = {"rtol": 0, "atol": 0} if onednn else {}
    torch.testing.assert_close(our_logits, logits, **tolerance)
    torch.testing.assert_close(our_gradients, gradients, **tolerance)
    return memory - our_memory


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_numbers_with_fewer_activations_and_with_onednn_the_same_bits(plain, onednn, dtype):
    plain.to(dtype)
    ours = copy.deepcopy(plain)
    keep_fewer_activations(ours)
    fewer = check(plain, copy.deepcopy(ours), onednn)
    assert fewer >= 2 * 2 * 576 * IDS.numel() * dtype.itemsize  # two numbers of each layer, inner feature and token


def test_frozen_weights_get_no_gradient(plain):
    ours = copy.deepcopy(plain)
    keep_fewer_activations(ours)
    for model in (plain, ours):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("input_layernorm" in name)
    assert check(plain, ours, True) > 0


@pytest.mark.parametrize("module", ["down_proj", "up_proj"])
def test_an_adapter_has_the_same_gradient(plain, module):
    ours = copy.deepcopy(plain)
    keep_fewer_activations(ours)
    for model in (plain, ours):
        add_adapter(model, LoraSettings(4, 4, [module], None), torch.float32, 1)
    check(plain, ours, True)


def test_a_model_can_be_pickled(plain):
    """As to send it to another process; there the class is made again."""
    keep_fewer_activations(plain)
    kinds = {type(module).__name__ for module in plain.modules()}
    stored = pickle.dumps(plain)
    code = "import pickle, sys; print(sorted({type(m).__name__ for m in pickle.load(sys.stdin.buffer).modules()}))"
    done = subprocess.run([sys.executable, "-c", code], input=stored, capture_output=True)
    assert done.stdout.decode().strip() == str(sorted(kinds)), done.stderr.decode()


def test_another_activation_is_left_alone():
    config = AutoConfig.for_model("llama", vocab_size=100, hidden_size=32, intermediate_size=48, hidden_act="gelu")
    config.num_hidden_layers = 1
    model = AutoModelForCausalLM.from_config(config)
    before = [type(module) for module in model.modules()]
    keep_fewer_activations(model)
    assert [type(module) for module in model.modules()] == before
