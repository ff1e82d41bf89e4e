"""The objectives and TRL's GRPOTrainer compared on random tokens and old and reference log-probabilities."""

import itertools

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from grpo.algorithm.objective import Counts, LossInputs, Objective, choose
from grpo.batch import Prompts
from grpo.config.checks import typed
from grpo.config.command_line import override
from grpo.config.compose import compose_config
from grpo.model.logps import completion_logps
from grpo.tiny import MODEL_DIR
from grpo.training.experiment import build_objective
from tests.tiny_model import plain_completions

BETA, EPSILON, TEMPERATURE = 0.04, 0.1, 0.7


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    args = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        beta=BETA,
        epsilon=EPSILON,
        temperature=TEMPERATURE,
        loss_type="grpo",
        use_bias_correction_kl=False,  # DeepSeek-V3.2's factor on the KL term, which Algorithm 1 does not have
        num_generations=2,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "1"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(MODEL_DIR),
    )


def random_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    prompt_mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    prompts = Prompts(torch.randint(5, 200, (2, 5), generator=generator) * prompt_mask, prompt_mask)
    mask = (torch.arange(6) < torch.tensor([6, 2, 4, 1])[:, None]).long()
    completions = plain_completions(
        torch.randint(5, 200, (4, 6), generator=generator) * mask, torch.tensor([0, 0, 1, 1]), mask
    )
    noise = [0.3 * torch.randn(4, 6, generator=generator) for _ in range(2)]
    return prompts, completions, noise, torch.randn(4, generator=generator)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("on_policy", [True, False])
def test_loss_and_gradient_equal_those_of_trl(trl_trainer, seed, on_policy):
    model = trl_trainer.model.eval()  # in evaluation mode TRL does not divide by the accumulation steps
    prompts, completions, (old_noise, ref_noise), advantages = random_batch(seed)
    logps = completion_logps(model, prompts, completions, TEMPERATURE).logps
    old = None if on_policy else logps.detach() + old_noise
    ref = logps.detach() + ref_noise

    mask = completions.completion_mask
    counts = Counts(rows=4, tokens=int(mask.sum()), groups=2, max_length=6)
    numbers = {"beta": BETA, "epsilon_low": EPSILON, "epsilon_high": EPSILON}
    objective = Objective(ratio="token", surrogate="clip", reduction="row", kl="k3", **numbers)
    inputs = LossInputs(logps, mask, advantages, completions.group, old_logps=old, ref_logps=ref)
    ours = objective(inputs, counts)
    our_gradient = gradients(model, ours.loss)

    inputs = {
        "prompt_ids": prompts.ids[completions.group],
        "prompt_mask": prompts.mask[completions.group],
        "completion_ids": completions.ids,
        "completion_mask": completions.completion_mask,
        "advantages": advantages,
        "ref_per_token_logps": ref,
        "num_items_in_batch": completions.completion_mask.sum(),
    }
    if old is not None:
        inputs["old_per_token_logps"] = old
    theirs = trl_trainer._compute_loss(model, inputs)
    their_gradient = gradients(model, theirs)

    # Log-probabilities near -20 have rounding errors of 1e-6 each, which remain in the sum.
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-5, atol=1e-5)
    assert (our_gradient - their_gradient).norm() / their_gradient.norm() < 1e-5


# The named objectives that TRL has: its loss_type.
OBJECTIVES = {
    name: name if name != "gspo" else "grpo"
    for name in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "gspo")
}
LOW, HIGH, CAP = 0.2, 0.28, 1.4
ROWS, TOKENS, LONGEST = 8, 6, 9


def random_tensors():
    """Eight completions in two groups; the sixth has no tokens that count, and the rewards of group 1 are equal."""
    generator = torch.Generator().manual_seed(0)
    logps = -2 * torch.rand(ROWS, TOKENS, generator=generator)
    old, ref = (logps + 0.5 * torch.randn(ROWS, TOKENS, generator=generator) for _ in range(2))
    mask = (torch.arange(TOKENS) < torch.tensor([6, 2, 4, 1, 5, 0, 3, 6])[:, None]).long()
    advantages = torch.randn(ROWS, generator=generator)
    advantages[4:] = 0.0
    advantages[5] = 1.0  # without tokens it must have no influence
    return logps, old, ref, mask, advantages


def loss_and_gradient(loss_of_rows, accumulation):
    """The sum of the losses of the parts of the batch, and its gradient for the log-probabilities."""
    logps = random_tensors()[0].requires_grad_()
    losses = [loss_of_rows(logps[rows], rows) for rows in torch.arange(ROWS).chunk(accumulation)]
    sum(losses).backward()
    return sum(losses).detach(), logps.grad


def ours(name, level, beta, delta, correction, rows=ROWS):
    """The loss of a named objective of conf/ with other numbers; rows: see `Counts`."""
    numbers = {"ratio": level, "beta": beta, "epsilon_low": LOW, "epsilon_high": HIGH, "delta": delta, "cap": CAP}
    settings = {f"objective.{key}": value for key, value in {**numbers, "kl_correction": correction}.items()}
    objective = build_objective(
        typed(compose_config([f"objective={name}", *(override(key, value) for key, value in settings.items())]))
    )
    _, old, ref, mask, advantages = random_tensors()
    counts = Counts(rows=rows, tokens=int(mask.sum()), groups=2, max_length=LONGEST)

    def loss(logps, rows):
        inputs = LossInputs(logps, mask[rows], advantages[rows], rows // 4, old_logps=old[rows], ref_logps=ref[rows])
        return objective(inputs, counts).loss

    return loss


def theirs(trainer, loss_type, level, beta, delta, correction, accumulation):
    trainer.loss_type = loss_type
    trainer.importance_sampling_level = level
    trainer.beta = beta
    trainer.epsilon_low = LOW
    trainer.epsilon_high = CAP if loss_type == "cispo" else HIGH
    trainer.max_completion_length = LONGEST
    trainer.args.delta = delta
    trainer.args.use_bias_correction_kl = correction
    trainer.args.steps_per_generation = trainer.current_gradient_accumulation_steps = accumulation
    trainer.model.train()
    _, old, ref, mask, advantages = random_tensors()

    def loss(logps, rows):
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, torch.zeros_like(logps), None)
        ids = torch.zeros(len(rows), TOKENS, dtype=torch.long)
        return trainer._compute_loss(
            trainer.model,
            {
                "prompt_ids": ids,
                "prompt_mask": ids,
                "completion_ids": ids,
                "completion_mask": mask[rows],
                "advantages": advantages[rows],
                "old_per_token_logps": old[rows],
                "ref_per_token_logps": ref[rows],
                "num_items_in_batch": mask.sum(),
            },
        )

    return loss


CASES = [*itertools.product(("token", "sequence"), (0.0, 0.04), (None, 1.5), (False, True), (1, 4))]


@pytest.fixture
def trainer(trl_trainer):
    """The trainer, which computes no log-probabilities of its own. Its settings are restored after the test."""
    own, args, was_training = {**vars(trl_trainer)}, {**vars(trl_trainer.args)}, trl_trainer.model.training
    yield trl_trainer
    for target, before in ((trl_trainer, own), (trl_trainer.args, args)):
        vars(target).clear()
        vars(target).update(before)
    trl_trainer.model.train(was_training)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_of_trl_has_the_same_loss_and_gradient(trainer, name):
    loss_type = OBJECTIVES[name]
    for level, beta, delta, correction, accumulation in CASES:
        expected = loss_and_gradient(
            theirs(trainer, loss_type, level, beta, delta, correction, accumulation), accumulation
        )
        found = loss_and_gradient(ours(name, level, beta, delta, correction), accumulation)
        case = (level, beta, delta, correction, accumulation)
        if name == "bnpo" and accumulation > 1:
            # TRL divides by the tokens of each micro-batch, so its gradient depends on the split. Ours does not.
            assert not torch.allclose(found[1], expected[1], atol=1e-3), case
            assert torch.allclose(found[1], loss_and_gradient(ours(name, *case[:-1]), 1)[1], atol=1e-6), case
            continue
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda text, case=case: f"{case}: {text}")


def test_completions_without_a_counted_token_are_in_the_mean_of_trl_and_not_in_ours(trainer):
    case = ("token", 0.0, None, False)
    expected = loss_and_gradient(theirs(trainer, "grpo", *case, 1), 1)
    counted = int(random_tensors()[3].any(dim=1).sum())
    assert counted == ROWS - 1
    found = loss_and_gradient(ours("grpo", *case, rows=counted), 1)
    torch.testing.assert_close(found, tuple(each * ROWS / counted for each in expected))


ADVANTAGES = {
    "group": ("group", "sum_then_normalize"),
    "batch": ("batch", "sum_then_normalize"),
    "none": ("none", "sum_then_normalize"),
    "normalize_then_sum": ("group", "normalize_then_sum"),
}
GROUPS, SIZE = 3, 4
WEIGHTS = [1.0, 0.5]


def random_rewards():
    """Two components (P, G, C); the rewards of the second group are equal."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 4, (GROUPS, SIZE, 2), generator=generator).double() / 2
    rewards[1] = 1.5
    return rewards


@pytest.fixture(scope="module")
def scoring_trainer(tmp_path_factory):
    """A trainer whose reward functions return `random_rewards`, whatever it samples."""

    def component(number):
        return lambda completions, **_: random_rewards()[..., number].flatten().tolist()

    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32),
        reward_funcs=[component(0), component(1)],
        args=GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("scoring")),
            reward_weights=WEIGHTS,
            num_generations=SIZE,
            per_device_train_batch_size=GROUPS * SIZE,
            max_completion_length=2,
            use_cpu=True,
            bf16=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_list([{"prompt": "1"}] * 12),
        processing_class=AutoTokenizer.from_pretrained(MODEL_DIR),
    )


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_equal_those_that_trl_computes_from_the_same_rewards(scoring_trainer, name):
    scoring_trainer.scale_rewards, scoring_trainer.multi_objective_aggregation = ADVANTAGES[name]
    prompts = [{"prompt": str(group)} for group in range(GROUPS) for _ in range(SIZE)]
    expected = scoring_trainer._generate_and_score_completions(prompts)["advantages"].view(GROUPS, SIZE)
    rewards = random_rewards()
    found = choose("advantage", name)(rewards, torch.tensor(WEIGHTS).double(), torch.ones_like(rewards).bool())
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-4, atol=1e-5)


def parity_table(trainer):
    """For each objective the largest differences from TRL over `CASES`, as Markdown, and the largest of all."""
    largest = 0.0
    lines = ["| objective | `loss_type` of TRL | cases | loss | gradient |", "|---|---|---|---|---|"]
    for name, loss_type in OBJECTIVES.items():
        losses, slopes = [], []
        for *case, accumulation in CASES:
            if name == "bnpo" and accumulation > 1:  # differs on purpose, see above
                continue
            expected = loss_and_gradient(theirs(trainer, loss_type, *case, accumulation), accumulation)
            found = loss_and_gradient(ours(name, *case), accumulation)
            losses.append(abs(float(found[0] - expected[0])) / max(1.0, abs(float(expected[0]))))
            slopes.append(float((found[1] - expected[1]).abs().max() / expected[1].abs().max()))
        lines.append(f"| `{name}` | `{loss_type}` | {len(losses)} | {max(losses):.0e} | {max(slopes):.0e} |")
        largest = max(largest, *losses, *slopes)
    return "\n".join(lines), largest


@pytest.mark.slow
def test_the_table_of_differences(trainer):
    """Printed with `-s`, for docs/objectives.md."""
    table, largest = parity_table(trainer)
    print(f"\nTRL {trl.__version__}, torch {torch.__version__}\n{table}")
    assert largest < 1e-5
