"""Checks of Apple's GPU (MPS) before a run uses it, since torch has computed wrong numbers there in the past.

Known problems are avoided: transformers' growing cache (`FastDecoder` allocates keys and values in advance), float64,
and grouped heads in torch's attention.
"""

import torch
from torch import Tensor

from grpo.batch import Completions, Prompts
from grpo.config.errors import ConfigError
from grpo.config.schema import ModelConfig
from grpo.model.logps import completion_logps
from grpo.rollout.engine import Sampling
from grpo.rollout.load_check import load_checked_model
from grpo.rollout.native import rollout
from grpo.tiny import MODEL_NAME

EMBEDDED = ModelConfig(MODEL_NAME, "sdpa", "float32", "auto", False)
ROUNDING = 1e-3  # largest allowed norm of a difference, relative to the norm of the CPU's result


def check_device(device: torch.device) -> None:
    """Compare completions, log-probabilities and gradients of the embedded model on `device` with those on the CPU.

    Raises ConfigError if they differ by more than rounding.
    """
    names = ("completions", "log-probabilities", "gradient")
    for name, here, there in zip(names, _compute_all(device), _compute_all(torch.device("cpu")), strict=True):
        difference = (here - there).norm() / there.norm() if here.shape == there.shape else torch.tensor(torch.inf)
        if not difference <= ROUNDING:  # `not <=` instead of `>`, so that NaN fails too
            raise ConfigError(
                f"the {name} of the embedded model on {device} differ from the processor's by {difference:.2g} of "
                f"their size: torch {torch.__version__} computes wrong numbers here; update it, or use hardware=cpu"
            )


def _compute_all(device: torch.device) -> tuple[Tensor, ...]:
    """Greedy completions, their log-probabilities and the gradient of these, computed on `device`, as CPU tensors."""
    model = load_checked_model(EMBEDDED, torch.device("cpu"))
    model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides that this is a method
    ids = torch.arange(5, 29, device=device).view(2, 12)
    mask = (torch.arange(12, device=device) >= torch.tensor([[0], [3]], device=device)).long()
    prompts = Prompts(ids, mask)
    greedy = Sampling(16, 0.0, (model.config.eos_token_id,), 0)
    keys = torch.zeros(4, 2, dtype=torch.int32)  # greedy decoding ignores them
    completions = rollout(model, prompts, greedy, group_size=2, keys=keys, token_budget=10**6)
    one = torch.ones_like(completions.ids[:, :8])
    shortened = Completions(completions.ids[:, :8], one, one, completions.group)
    logps = completion_logps(model, prompts, shortened, 1.0).logps
    gradients = torch.autograd.grad(logps.sum(), list(model.parameters()))
    gradient = torch.cat([each.flatten() for each in gradients])
    return tuple(x.detach().float().cpu() for x in (completions.ids * completions.attention_mask, logps, gradient))
