import copy
import functools
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo.algorithm.objective import CHOICES, LossOutput, Objective
from grpo.batch import Prompts
from grpo.model.linear import use_onednn
from grpo.model.packed import supports_packing
from grpo.rollout.load_check import choose_implementation
from grpo.tiny import MODEL_DIR
from grpo.training.metrics import update_metrics
from grpo.training.update import (
    Batch,
    accumulate_gradient,
    all_logps,
    apply_gradient,
    compute_loss,
    learning_rate,
)
from tests.launches import processes
from tests.oracles import completion_logps_unshared
from tests.tiny_model import plain_completions

pytestmark = pytest.mark.usefixtures("onednn_for_small_weights")


@pytest.fixture(scope="module", params=["padded", "packed"])
def model(request):
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    if request.param == "packed":
        use_onednn(model)
        choose_implementation(model)
        assert supports_packing(model)
    return model


@pytest.fixture(scope="module")
def batch():
    """Two prompts with four completions each, of very different lengths, with off-policy old log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    prompt_mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    mask = (torch.arange(12) < torch.tensor([12, 1, 7, 3, 2, 5, 11, 4])[:, None]).long()
    return Batch(
        Prompts(torch.randint(5, 250, (2, 5), generator=generator), prompt_mask),
        plain_completions(torch.randint(5, 250, (8, 12), generator=generator), torch.arange(8) // 4, mask),
        advantages=torch.randn(8, generator=generator),
        ref_logps=-8 + torch.randn(8, 12, generator=generator),
        old_logps=-8 + torch.randn(8, 12, generator=generator),
    )


WHOLE = 1000  # a budget of more tokens than the batch has


CHOSEN = {"ratio": "token", "surrogate": "clip", "reduction": "row", "kl": "k3"}
CHOSEN |= {"beta": 0.04, "epsilon_low": 0.1, "epsilon_high": 0.1}


def grpo(beta=0.04):
    """The default objective."""
    return Objective(**{**CHOSEN, "beta": beta})


def accumulate(model, batch, token_budget, beta=0.04, objective=None, whole=None):
    """The result of `accumulate_gradient` for a batch, or for a part of `whole`, and the gradient as one vector."""
    model.zero_grad()
    counts = (whole or batch).counts(max_length=12)
    objective = objective or grpo(beta)
    found = accumulate_gradient(model, objective, batch, counts, temperature=1.0, token_budget=token_budget)
    return found, torch.cat([p.grad.flatten() for p in model.parameters()])


def gradient_of(model, batch, token_budget, beta=0.04):
    """The metrics of the loss, and its gradient as one vector; the gradient is also left in the model."""
    found, gradient = accumulate(model, batch, token_budget, beta)
    return found.means(), gradient


@pytest.mark.parametrize("token_budget", [1, 10, 17, 25, 40])
def test_splitting_the_batch_does_not_change_the_gradient(model, batch, token_budget):
    whole_metrics, whole = gradient_of(model, batch, WHOLE)
    metrics, gradient = gradient_of(model, batch, token_budget)
    assert (gradient - whole).norm() / whole.norm() < 1e-5
    assert metrics == pytest.approx(whole_metrics, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("taught", "passes"), [((4, 8), [False, True]), ((0, 4), [True, False]), ((0, 0), [False, True])]
)
def test_without_kl_a_group_of_equal_rewards_needs_no_backward_pass_and_changes_no_result(model, batch, taught, passes):
    advantages = torch.zeros(8)
    advantages[slice(*taught)] = batch.advantages[slice(*taught)]
    batch = replace(batch, advantages=advantages, ref_logps=None)
    budget = 30 if supports_packing(model) else 50  # one micro-batch for each group
    parts = batch.micro_batches(budget, supports_packing(model))
    assert [sorted(rows.tolist()) for rows in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    model.zero_grad()
    entropy = 0.0
    expected_logps = torch.zeros(batch.completions.ids.shape)
    for rows in parts:
        inputs, output = compute_loss(model, grpo(beta=0), batch.select(rows), batch.counts(12), 1.0, True)
        expected_logps[rows, : inputs.logps.shape[1]] = inputs.logps.detach()
        entropy += float((inputs.entropy * inputs.mask).sum())
        output.loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])

    has_graph = []

    def objective(inputs, counts):
        has_graph.append(not inputs.logps.is_leaf)
        return grpo(beta=0)(inputs, counts)

    found, gradient = accumulate(model, batch, budget, objective=objective)
    assert has_graph == passes
    assert torch.equal(found.logps, expected_logps)  # a second update on the batch uses them as old_logps
    assert torch.equal(gradient, expected)
    assert found.metrics["entropy"] == (pytest.approx(entropy), batch.completions.lengths.sum())


@pytest.mark.parametrize("choices", [{"reduction": name} for name in CHOICES["reduction"]] + [{"entropy_weight": 0.1}])
def test_no_reduction_and_no_entropy_bonus_depends_on_the_split(model, batch, choices):
    objective = Objective(**{**CHOSEN, "beta": 0.0, **choices})
    without_kl = replace(batch, ref_logps=None, advantages=batch.advantages * (torch.arange(8) < 4))
    whole, expected = accumulate(model, without_kl, WHOLE, objective=objective)
    parts, gradient = accumulate(model, without_kl, 20, objective=objective)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-4, abs=1e-5)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_the_gradient_of_the_entropy_bonus_is_that_of_the_mean_entropy(model, batch):
    objective = Objective(**{**CHOSEN, "beta": 0.0, "entropy_weight": 2.0})
    no_advantage = replace(batch, ref_logps=None, advantages=torch.zeros(8))
    _, ours = accumulate(model, no_advantage, WHOLE, objective=objective)
    mask = batch.completions.completion_mask
    model.zero_grad()
    entropy = completion_logps_unshared(model, batch.prompts, batch.completions, 1.0).entropy
    (-2.0 * (entropy * mask).sum() / mask.sum()).backward()
    theirs = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_an_objective_that_does_not_depend_on_advantages_gets_its_gradient(model, batch):
    batch = replace(batch, advantages=torch.zeros(8), ref_logps=None)

    def objective(inputs, counts):
        return LossOutput((inputs.logps * inputs.mask).sum() / counts.tokens, {})

    _, whole = accumulate(model, batch, WHOLE, objective=objective)
    _, split = accumulate(model, batch, 30, objective=objective)
    assert whole.norm() > 0
    assert (split - whole).norm() / whole.norm() < 1e-5


def test_an_objective_without_a_gradient_for_some_rows_is_not_an_error(model, batch):
    def objective(inputs, counts):
        if inputs.advantages.any():
            return grpo(beta=0)(inputs, counts)
        return LossOutput(torch.zeros(()), {})

    first = batch.advantages.clone()
    first[4:] = 0.0
    batch = replace(batch, advantages=first, ref_logps=None)
    budget = 30 if supports_packing(model) else 50  # one micro-batch for each group
    _, gradient = accumulate(model, batch, budget, objective=objective)
    _, expected = accumulate(model, batch, budget, beta=0)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (None, "the objective returned NoneType; it must return a LossOutput"),
        (
            LossOutput(torch.zeros(()), {"loss": (torch.ones(()), torch.ones(()))}),
            "metric 'loss' is one of the suite's",
        ),
        (
            LossOutput(torch.zeros(()), {"step": (torch.ones(()), torch.ones(()))}),
            "metric 'step' is one of the suite's",
        ),
        (
            LossOutput(torch.zeros(()), {"rewards/mine": (torch.ones(()), torch.ones(()))}),
            "metric 'rewards/mine' is one of the suite's",
        ),
    ],
)
def test_a_wrong_return_value_of_an_objective_is_named_in_the_error(model, batch, output, said):
    with pytest.raises(RuntimeError, match=said):
        accumulate(model, batch, WHOLE, objective=lambda inputs, counts: output)


def test_a_metric_that_only_some_updates_have_is_averaged_over_those_updates():
    assert update_metrics([{"loss": 1.0, "first": 3.0}, {"loss": 2.0, "later": math.inf}]) == {
        "loss": 1.5,
        "first": 3.0,
        "later": None,
    }


def test_micro_batches_group_completions_of_similar_length_and_repeat_no_prompt_needlessly(batch):
    lengths = batch.completions.lengths
    parts = [part.tolist() for part in batch.micro_batches(28, shared=True)]
    assert [lengths[part].tolist() for part in parts] == [[12, 7, 3, 1], [11, 5, 4, 2]]
    assert batch.micro_batches(WHOLE, shared=True)[0].tolist() == [0, 2, 3, 1, 6, 5, 7, 4]
    assert sorted(int(row) for part in batch.micro_batches(15, shared=True) for row in part) == list(range(8))
    assert batch.token_range(shared=True) == (16, 45 + 8)
    for shared in (True, False):  # a budget of `most` tokens, but not of one less, fits the whole batch
        _, most = batch.token_range(shared)
        assert [len(batch.micro_batches(budget, shared)) for budget in (most, most - 1)] == [1, 2]


def accumulate_rows(batch, start, stop, file):
    """The work of one of several processes: gradient and metrics of its rows, divided by the whole batch's counts."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    found, gradient = accumulate(model, batch.select(torch.arange(start, stop)), 20, whole=batch)
    torch.save({"gradient": gradient, "loss": found.loss, "metrics": found.metrics}, file)


def test_the_gradients_and_metrics_of_two_processes_add_up_to_those_of_the_batch(model, batch, tmp_path):
    whole, gradient = accumulate(model, batch, WHOLE)
    files = [tmp_path / "0", tmp_path / "1"]
    halves = [
        processes.Process(target=accumulate_rows, args=(batch, start, stop, file))
        for (start, stop), file in zip(((0, 3), (3, 8)), files, strict=True)
    ]
    for half in halves:
        half.start()
    for half in halves:
        half.join(60)
        assert half.exitcode == 0
    first, second = (torch.load(file, weights_only=True) for file in files)
    assert first["gradient"].norm() > 0.01 * gradient.norm()
    assert (first["gradient"] + second["gradient"] - gradient).norm() / gradient.norm() < 1e-5
    assert first["loss"] + second["loss"] == pytest.approx(whole.loss, rel=1e-5)
    assert {"kl", "entropy", "clip_ratio/region_mean"} < whole.metrics.keys()
    for name, (total, weight) in whole.metrics.items():
        assert first["metrics"][name][0] + second["metrics"][name][0] == pytest.approx(total, rel=1e-4, abs=1e-6), name
        assert first["metrics"][name][1] + second["metrics"][name][1] == weight, name


def test_an_update_makes_good_completions_likelier_and_bad_ones_less_likely(model, batch):
    on_policy = Batch(batch.prompts, batch.completions, torch.tensor([1.0, -1.0] * 4))
    model_after = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model_after.parameters(), lr=1e-3)
    metrics, _ = gradient_of(model_after, on_policy, WHOLE, beta=0.0)
    norm, made = apply_gradient(model_after, optimizer, metrics["loss"], max_grad_norm=1e9)
    assert made
    assert norm > 0
    assert all(p.grad is None for p in model_after.parameters())
    change = all_logps(model_after, on_policy, 1.0, WHOLE) - all_logps(model, on_policy, 1.0, WHOLE)
    lengths = batch.completions.lengths
    change = (change.sum(dim=1) / lengths * on_policy.advantages).mean()
    assert change > 0


def test_logps_of_the_whole_batch_do_not_depend_on_how_it_is_split(model, batch):
    plain = completion_logps_unshared(model, batch.prompts, batch.completions, 0.8).logps
    for size in (1, 20, WHOLE):
        torch.testing.assert_close(all_logps(model, batch, 0.8, size), plain.detach(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_changes_no_weight(model, batch, where):
    broken = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(broken.parameters(), lr=0.1)
    if where == "loss":
        bad = Batch(batch.prompts, batch.completions, torch.tensor([float("nan")] + [1.0] * 7))
        loss = gradient_of(broken, bad, 20, beta=0.0)[0]["loss"]
        assert math.isnan(loss)
    else:
        loss = gradient_of(broken, batch, 20)[0]["loss"]
        next(broken.parameters()).grad[0] = float("inf")
    norm, made = apply_gradient(broken, optimizer, loss, max_grad_norm=1.0)
    assert not made
    assert not math.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(broken.parameters(), model.parameters(), strict=True))
    assert all(p.grad is None for p in broken.parameters())
    assert optimizer.state_dict()["state"] == {}


def test_the_gradient_is_clipped_to_max_grad_norm(model, batch):
    clipped = copy.deepcopy(model)
    _, gradient = gradient_of(clipped, batch, WHOLE)
    optimizer = torch.optim.SGD(clipped.parameters(), lr=1.0)
    norm, _ = apply_gradient(clipped, optimizer, 0.0, max_grad_norm=0.01)
    assert norm == pytest.approx(gradient.norm().item(), rel=1e-5)
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), clipped.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_learning_rate_schedules_at_their_start_and_end():
    assert learning_rate(1.0, "constant", 100, 100, 0) == 1.0
    assert [learning_rate(1.0, "constant", step, 100, 3) for step in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(1.0, "linear", 1, 4, 0) == 1.0
    assert learning_rate(1.0, "linear", 4, 4, 0) == 0.25
    assert learning_rate(1.0, "cosine", 1, 10, 0) == 1.0
    assert learning_rate(2.0, "cosine", 6, 10, 0) == pytest.approx(1.0)
    assert 0 < learning_rate(1.0, "cosine", 10, 10, 0) < 0.1


def test_of_each_group_the_completions_with_the_largest_absolute_advantages_are_trained_on(batch):
    advantages = torch.tensor([0.1, -2.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0])
    pruned = replace(batch, advantages=advantages).pruned(2)
    assert pruned.advantages.tolist() == [-2.0, 1.0, 0.0, 0.0]
    assert torch.equal(pruned.completions.ids, batch.completions.ids[[1, 2, 4, 5], :7])
    assert pruned.completions.group.tolist() == [0, 0, 1, 1]
    assert torch.equal(pruned.ref_logps, batch.ref_logps[[1, 2, 4, 5], :7])
    counts = pruned.counts(12)
    assert (counts.rows, counts.tokens, counts.groups) == (4, 1 + 7 + 2 + 5, 2)


def test_of_advantages_by_token_only_those_that_count_decide(batch):
    advantages = torch.zeros(8, 12)
    advantages[1, 5] = 9.0  # after the end of this completion
    advantages[2, 3] = -1.0
    pruned = replace(batch, advantages=advantages).pruned(1)
    assert torch.equal(pruned.completions.ids[0], batch.completions.ids[2, : pruned.completions.ids.shape[1]])


def test_training_on_all_of_a_group_is_training_without_pruning(model, batch):
    _, whole = accumulate(model, batch, WHOLE)
    _, pruned = accumulate(model, batch.pruned(4), WHOLE)
    assert (whole - pruned).norm() < 1e-5 * whole.norm()


def test_completions_that_are_masked_leave_the_loss_and_its_counts(model, batch):
    masked = torch.tensor([True, False, False, False, False, False, True, False])
    without = batch.without(masked)
    counts = without.counts(12)
    assert (counts.rows, counts.tokens) == (6, 45 - 12 - 11)
    assert without.completions.lengths.tolist() == batch.completions.lengths.tolist()
    rest = batch.select((~masked).nonzero().squeeze(1))
    for objective in (
        grpo(),
        Objective(**{**CHOSEN, "reduction": "token"}),
        Objective(**{**CHOSEN, "reduction": "constant"}),
    ):
        found, gradient = accumulate(model, without, WHOLE, objective=objective)
        expected, of_rest = accumulate(model, rest, WHOLE, objective=objective)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert (gradient - of_rest).norm() < 1e-5 * of_rest.norm()
    _, of_counted = accumulate(model, without.counted(), WHOLE)
    assert len(without.counted().completions.ids) == 6
    assert (of_counted - accumulate(model, without, WHOLE)[1]).norm() < 1e-5 * of_counted.norm()
    assert without.pruned(3).completions.completion_mask.any(dim=1).all()
    everything = batch.without(torch.ones(8, dtype=torch.bool)).counted()
    assert len(everything.completions.ids) == 1
    assert everything.counts(12).rows == 0
    found, gradient = accumulate(model, everything, WHOLE)
    assert found.loss == 0
    assert gradient.abs().max() == 0


def test_a_function_can_ask_for_the_gradient_of_the_entropy(model, batch):
    def objective(inputs, counts, weight):
        assert inputs.entropy.requires_grad
        return LossOutput(-weight * (inputs.entropy * inputs.mask).sum() / counts.tokens, {})

    objective.needs_entropy_gradient = True
    no_advantage = replace(batch, ref_logps=None, advantages=torch.zeros(8))
    _, gradient = accumulate(model, no_advantage, WHOLE, objective=functools.partial(objective, weight=1.0))
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("surrogate", CHOICES["surrogate"])
@pytest.mark.parametrize("advantages", [[0.0, 1.0, 0.0, -0.5, 0.0, 0.0, 0.3, 0.0], [0.0] * 8])
def test_without_kl_the_policy_computes_only_completions_with_an_advantage(model, batch, surrogate, advantages):
    """The counts are those of the whole batch, so loss and gradient are those of computing everything."""
    batch = replace(batch, ref_logps=None, advantages=torch.tensor(advantages))
    objective = Objective(**{**CHOSEN, "beta": 0.0, "surrogate": surrogate})
    found, gradient = accumulate(model, batch, 25, objective=objective)
    objective.needs_advantage = False
    everything, expected = accumulate(model, batch, 25, objective=objective)
    assert torch.allclose(gradient, expected, atol=1e-6)
    assert found.loss == pytest.approx(everything.loss, abs=1e-6)
    with_advantage = batch.advantages != 0
    computed = with_advantage if with_advantage.any() else torch.arange(8) == 0
    assert found.passed.equal(computed)
    assert everything.passed.all()
    assert torch.allclose(found.logps[computed], everything.logps[computed], atol=1e-5)
    assert not found.logps[~computed].any()
    entropy_tokens = found.metrics["entropy"][1]
    assert entropy_tokens == batch.completions.completion_mask[computed].sum()


@pytest.mark.parametrize(
    "settings", [{"beta": 0.04}, {"beta": 0.0, "entropy_weight": 0.1}, {"surrogate": f"{__name__}.pays_everything"}]
)
def test_where_completions_without_an_advantage_have_a_gradient_all_are_computed(model, batch, settings):
    batch = replace(batch, advantages=torch.zeros(8), ref_logps=batch.ref_logps if settings.get("beta") else None)
    objective = Objective(**{**CHOSEN, "beta": 0.0, **settings})
    found, gradient = accumulate(model, batch, 25, objective=objective)
    assert found.passed.all()
    assert gradient.any()


def pays_everything(ratio, logps, advantages, numbers):
    return -ratio * (advantages + 1), {}
