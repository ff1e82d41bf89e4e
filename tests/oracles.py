"""What the engine computes, written plainly, to test it against."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.batch import CompletionBatch, PromptBatch, positions
from grpo.model.logps import TokenLogps


def completion_logps_unshared(
    model: PreTrainedModel,
    prompts: PromptBatch,
    completions: CompletionBatch,
    prompt_of_row: Tensor,
    temperature: float,
) -> TokenLogps:
    """What `completion_logps` computes, written plainly: prompt and completion in one row, all logits at once."""
    ids = torch.cat([prompts.ids[prompt_of_row], completions.ids], dim=1)
    mask = torch.cat([prompts.mask[prompt_of_row], completions.mask], dim=1)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    logps = torch.log_softmax(logits[:, prompts.ids.shape[1] - 1 : -1].float() / temperature, dim=-1)
    token_logps = logps.gather(2, completions.ids[:, :, None]).squeeze(2)
    entropy = -(logps.exp() * logps).sum(dim=2).detach()
    return TokenLogps(token_logps * completions.mask, entropy * completions.mask)
