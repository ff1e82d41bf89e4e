import pytest
import torch

from grpo.algorithm import optimizer as module
from grpo.algorithm.optimizer import MuonWithAdamW, StochasticAdamW, exempt_vectors, round_stochastically
from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.counter_rng import random_bits
from grpo.training.experiment import build_experiment

CPU = torch.device("cpu")


def train(optimizer_of, start, grads):
    parameter = torch.nn.Parameter(start.clone())
    optimizer = optimizer_of([parameter])
    for grad in grads:
        parameter.grad = grad.to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


def test_stochastic_adamw_on_float32_equals_adamw():
    settings = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 5, generator=generator)
    grads = torch.randn(20, 7, 5, generator=generator)
    ours = train(lambda p: StochasticAdamW(p, **settings), start, grads)
    theirs = train(lambda p: torch.optim.AdamW(p, **settings), start, grads)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, start, atol=1e-2)


def test_steps_too_small_for_bfloat16_add_up_with_stochastic_rounding_and_are_lost_without_it():
    start, steps, lr = torch.ones(20_000, dtype=torch.bfloat16), 200, 1e-5
    grads = torch.ones(steps, 20_000)
    nearest = train(lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.0), start, grads)
    assert torch.equal(nearest, start)
    stochastic = train(lambda p: StochasticAdamW(p, lr=lr), start, grads)
    moved = (start - stochastic).float().mean().item()
    # The spacing of bfloat16 just below 1 is 2**-8, so the number of moves is binomial with a known mean.
    deviation = (steps * lr * 2**-8 / 20_000) ** 0.5
    assert moved == pytest.approx(steps * lr, abs=4 * deviation)


def test_the_average_of_a_constant_gradient_in_bfloat16_becomes_that_gradient():
    """Rounded to the nearest, an average with beta 0.9 stops several percent below it."""
    parameter = torch.nn.Parameter(torch.zeros(20_000, dtype=torch.bfloat16))
    optimizer = StochasticAdamW([parameter], lr=1e-5, betas=(0.9, 0.99))
    for _ in range(300):
        parameter.grad = torch.full_like(parameter, 0.7)
        optimizer.step()
    mean = optimizer.state[parameter]["exp_avg"].float().mean().item()
    assert mean == pytest.approx(float(torch.tensor(0.7).bfloat16()), rel=1e-3)


def test_stochastic_rounding_goes_to_a_neighbouring_value_and_keeps_the_mean():
    x = torch.tensor([1.001, -1.001, 3.3e-5, 2.0, 0.0]).repeat(40_000, 1)
    rounded = round_stochastically(x.clone(), random_bits((1, 2), 0, x.numel(), CPU).view_as(x))
    assert torch.equal(rounded, rounded.bfloat16().float())
    below = (x.view(torch.int32) & -0x10000).view(torch.float32)  # towards zero
    above = torch.where(below == x, x, (below.view(torch.int32) + 0x10000).view(torch.float32))
    assert ((rounded == below) | (rounded == above)).all()
    spacing = (above - below).abs()[0]
    assert torch.all((rounded.mean(dim=0) - x[0]).abs() <= 4 * 0.5 * spacing / 200)
    assert torch.equal(rounded[:, 3:], x[:, 3:])


def test_the_rounding_depends_only_on_seed_step_and_element(monkeypatch):
    start, grads = torch.rand(300).bfloat16(), torch.rand(5, 300)

    def run(seed):
        return train(lambda p: StochasticAdamW(p, lr=1e-4, seed=seed), start, grads)

    expected, state = run(1), torch.random.get_rng_state()
    assert torch.equal(run(1), expected)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(run(2), expected)
    monkeypatch.setattr(module, "CHUNK", 64)
    assert torch.equal(run(1), expected)


def test_two_equal_parameters_are_rounded_differently():
    parameters = [torch.nn.Parameter(torch.full((500,), 0.7).bfloat16()) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    StochasticAdamW(parameters, lr=1e-4).step()
    assert not torch.equal(*parameters)


def test_muon_updates_the_matrices_of_the_layers_and_adamw_the_rest():
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (10, 4), "layers.0.q_proj.weight": (6, 4), "norm.weight": (4,)}
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    grads = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def step(of, names):
        parameters = {name: torch.nn.Parameter(start[name].clone()) for name in names}
        for name, parameter in parameters.items():
            parameter.grad = grads[name].clone()
        optimizer = of(parameters)
        for group in optimizer.param_groups:  # as the trainer's schedule does
            group["lr"] = 0.02
        for _ in range(3):
            optimizer.step()
        return {name: parameter.detach() for name, parameter in parameters.items()}

    settings = {"lr": 0.5, "weight_decay": 0.1}
    ours = step(lambda p: MuonWithAdamW(p.items(), **settings), shapes)
    matrices = {"layers.0.q_proj.weight"}
    muon = step(lambda p: torch.optim.Muon(p.values(), adjust_lr_fn="match_rms_adamw", **settings), matrices)
    adamw = step(lambda p: torch.optim.AdamW(p.values(), **settings), shapes.keys() - matrices)
    for name, expected in (muon | adamw).items():
        assert torch.allclose(ours[name], expected, atol=1e-6), name
        assert not torch.allclose(ours[name], start[name], atol=1e-3)


@pytest.mark.parametrize("shape", [(4, 4), (4,)])
def test_muon_with_adamw_works_if_all_parameters_are_of_one_kind(shape):
    parameter = torch.nn.Parameter(torch.ones(shape))
    optimizer = MuonWithAdamW([("weight", parameter)], lr=0.1)
    parameter.grad = torch.ones(shape)
    optimizer.step()
    assert not torch.equal(parameter, torch.ones(shape))


def decayed(build):
    """The weights of a small network after one step with gradients of 0, and their weights before."""
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    torch.nn.init.ones_(network[0].bias)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = build(list(network.named_parameters()))
    exempt_vectors(optimizer)
    exempt_vectors(optimizer)  # changes nothing more
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in network.parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.5  # as the trainer sets it
    optimizer.step()
    return before, list(network.parameters()), optimizer


@pytest.mark.parametrize("kind", [torch.optim.AdamW, StochasticAdamW, MuonWithAdamW])
def test_weight_decay_shrinks_matrices_but_not_biases_and_norms(kind):
    before, after, optimizer = decayed(lambda named: kind(named, lr=0.1, weight_decay=0.1))
    for former, now in zip(before, after, strict=True):
        torch.testing.assert_close(now.detach(), former * (0.95 if former.dim() == 2 else 1.0))
    if kind is not MuonWithAdamW:  # which has an order of its own
        order = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(one is other for one, other in zip(order, after, strict=True))


@pytest.mark.parametrize("both", [True, False])
def test_a_run_can_decay_biases_and_norms_as_earlier_versions_did(both):
    settings = ["experiment=quickstart", "optimizer.weight_decay=0.1", f"grpo.decay_biases_and_norms={both}"]
    experiment = build_experiment(typed(compose_config(settings)))
    policy = experiment.load_policy()
    decay = {
        parameter.dim() < 2: group["weight_decay"]
        for group in experiment.build_optimizer(policy).param_groups
        for parameter in group["params"]
    }
    assert decay == {False: 0.1, True: 0.1 if both else 0.0}


def test_without_weight_decay_and_for_optimizers_of_other_packages_the_groups_stay_as_they_are():
    class Foreign(torch.optim.SGD):
        pass

    for build in (
        lambda named: torch.optim.AdamW(named, lr=0.1, weight_decay=0.0),
        lambda n: Foreign(n, weight_decay=1),
    ):
        _, after, optimizer = decayed(build)
        assert len(optimizer.param_groups) == 1
        assert len(optimizer.param_groups[0]["params"]) == len(after)
