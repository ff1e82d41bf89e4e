"""Simple implementations of functions of the engine, to test it against."""

import torch
from transformers import PreTrainedModel

from grpo.batch import Completions, Prompts, positions
from grpo.model.logps import TokenLogps


def completion_logps_unshared(
    model: PreTrainedModel,
    prompts: Prompts,
    completions: Completions,
    temperature: float,
) -> TokenLogps:
    """A simple `completion_logps`: prompt and completion in one row, all logits at once."""
    ids = torch.cat([prompts.ids[completions.group], completions.ids], dim=1)
    mask = torch.cat([prompts.mask[completions.group], completions.attention_mask], dim=1)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    logps = torch.log_softmax(logits[:, prompts.ids.shape[1] - 1 : -1].float() / temperature, dim=-1)
    token_logps = logps.gather(2, completions.ids[:, :, None]).squeeze(2)
    entropy = -(logps.exp() * logps).sum(dim=2)
    return TokenLogps(token_logps * completions.attention_mask, entropy * completions.attention_mask)
