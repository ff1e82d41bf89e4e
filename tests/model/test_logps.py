import pytest
import torch
from torch import nn

from grpo.model import lm_head as head
from grpo.model.lm_head import HeadLogps
from grpo.model.logps import completion_logps, head_logps
from grpo.model.packed import checkpoint_layers
from grpo.rollout.load_check import load_checked_model
from tests.oracles import completion_logps_unshared
from tests.tiny_model import plain_completions, tiny_config

GROUP = torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.fixture
def completions():
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(9) < torch.tensor([9, 4, 1, 7, 9, 2])[:, None]).long()
    return plain_completions(torch.randint(5, 250, (6, 9), generator=generator), GROUP, mask)


def gradient(model, value):
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_sharing_the_prompt_changes_neither_log_probabilities_nor_their_gradient(model, prompts, completions):
    weights = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    shared = completion_logps(model, prompts, completions, 0.7)
    plain = completion_logps_unshared(model, prompts, completions, 0.7)
    torch.testing.assert_close(shared.logps, plain.logps, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(shared.entropy, plain.entropy, rtol=1e-5, atol=2e-5)
    ours, theirs = (gradient(model, (x.logps * weights).sum()) for x in (shared, plain))
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_log_probabilities_are_zero_outside_the_mask(model, prompts, completions):
    result = completion_logps(model, prompts, completions, 1.0)
    outside = completions.attention_mask == 0
    assert (result.logps[outside] == 0).all()
    assert (result.entropy[outside] == 0).all()
    assert (result.logps[~outside] < 0).all()


def test_the_size_of_the_logit_chunks_does_not_change_the_results(model, prompts, completions, monkeypatch):
    whole = completion_logps(model, prompts, completions, 1.0)
    monkeypatch.setattr(head, "LOGITS_PER_CHUNK", 3 * model.config.vocab_size)
    chunked = completion_logps(model, prompts, completions, 1.0)
    torch.testing.assert_close(chunked.logps, whole.logps, rtol=1e-6, atol=1e-6)
    ours, theirs = (gradient(model, x.logps.sum()) for x in (chunked, whole))
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_log_probabilities_of_one_token_completions_equal_those_without_sharing(model, prompts):
    one = plain_completions(torch.tensor([[7]] * 6), GROUP)
    shared = completion_logps(model, prompts, one, 1.0)
    plain = completion_logps_unshared(model, prompts, one, 1.0)
    torch.testing.assert_close(shared.logps, plain.logps, rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_the_gradient_of_the_plain_pass(plain_model, fast_model, prompts, completions):
    """Each is compared by name, since one norm over all of them could hide an error in a small one."""
    weights = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    for model, function in ((fast_model, completion_logps), (plain_model, completion_logps_unshared)):
        model.zero_grad()
        (function(model, prompts, completions, 1.3).logps * weights).sum().backward()
    for (name, ours), theirs in zip(fast_model.named_parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3 * theirs.grad.abs().max(), msg=name)


def test_activation_checkpointing_changes_no_bit(prompts, completions):
    """The backward pass computes each layer a second time, also for the shared prompts."""
    gradients = []
    for twice in (False, True):
        model = load_checked_model(tiny_config(), torch.device("cpu"))
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(1))
        if twice:
            checkpoint_layers(model)
        result = completion_logps(model, prompts, completions, 0.7)
        gradients.append((result.logps.detach(), gradient(model, result.logps.sum())))
        assert len(calls) == 1 + twice
    for once, again in zip(*gradients, strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
def test_the_head_gives_the_values_and_gradients_of_log_softmax(monkeypatch, entropy_weight):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 5, generator=generator), torch.randn(11, 5, generator=generator)
    targets, factors = torch.tensor([0, 10, 3, 3, 5, 9, 1]), torch.randn(7, generator=generator)
    monkeypatch.setattr(head, "LOGITS_PER_CHUNK", 3 * 11)  # chunks of 3, 3 and 1 tokens
    results = []
    for plain in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if plain:
            distribution = torch.log_softmax(h @ w.T / 0.7, dim=1)
            logps = distribution.gather(1, targets[:, None])[:, 0]
            entropy = -(distribution.exp() * distribution).sum(dim=1)
        else:
            logps, entropy = HeadLogps.apply(h, w, targets, 0.7, "gradient" if entropy_weight else "value")
            assert entropy.requires_grad == bool(entropy_weight)
        (logps * factors + entropy_weight * factors.flip(0) * entropy).sum().backward()
        results.append((logps.detach(), entropy.detach(), h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_the_error_of_the_heads_gradient_is_about_that_of_one_rounding(monkeypatch):
    monkeypatch.setattr(head, "LOGITS_PER_CHUNK", 8 * 64)  # 8 of 4000 tokens at a time
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4000, 16, generator=generator) + 0.5, torch.randn(64, 16, generator=generator) / 4
    targets, factors = torch.randint(64, (4000,), generator=generator), torch.randn(4000, generator=generator)
    h, w = (each.bfloat16().requires_grad_() for each in (hidden, weight))
    (HeadLogps.apply(h, w, targets, 1.0, "none")[0] * factors).sum().backward()
    exact_h, exact_w = (each.detach().double().requires_grad_() for each in (h, w))
    logps = torch.log_softmax(exact_h @ exact_w.T, dim=1).gather(1, targets[:, None])[:, 0]
    (logps * factors).sum().backward()
    for ours, exact in ((h.grad, exact_h.grad), (w.grad, exact_w.grad)):
        assert (ours - exact).norm() < 0.005 * exact.norm()  # rounding alone is 0.0016


def test_a_head_with_a_bias_gives_the_values_and_gradients_of_log_softmax():
    torch.manual_seed(0)
    layer, hidden, targets = nn.Linear(5, 11), torch.randn(4, 5), torch.tensor([0, 10, 3, 3])
    ours = sum(head_logps(layer, hidden, targets, 0.7, "gradient"))  # log-probability and entropy
    distribution = torch.log_softmax(layer(hidden) / 0.7, dim=1)
    plain = distribution.gather(1, targets[:, None])[:, 0] - (distribution.exp() * distribution).sum(dim=1)
    torch.testing.assert_close(ours, plain)
    assert not torch.autograd.grad(head_logps(layer, hidden, targets, 0.7)[0].sum(), layer.weight)[0].isnan().any()
    gradients = [torch.autograd.grad((x * x).sum(), list(layer.parameters())) for x in (ours, plain)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
