"""The default objective and TRL's GRPOTrainer compared on random tokens and old and reference log-probabilities."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from grpo.algorithm.objective import Counts, LossInputs, Objective
from grpo.batch import Prompts
from grpo.model.logps import completion_logps
from grpo.tiny import MODEL_DIR
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
