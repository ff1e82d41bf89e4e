"""A new objective: REINFORCE over the tokens of the batch, without ratio, clip or KL."""

from grpo.algorithm.objective import LossOutput


def reinforce(inputs, counts, scale=1.0):
    weighted = inputs.logps * inputs.advantages[:, None] * inputs.mask
    mean_logp = (inputs.logps.detach() * inputs.mask).sum(), inputs.mask.sum()
    return LossOutput(-scale * weighted.sum() / counts.tokens, {"toy/mean_logp": mean_logp})
