"""A surrogate for the objective: the ratio times the advantage, without a clip."""


def unclipped(ratio, logps, advantages, numbers):
    return -ratio * advantages, {"toy/ratio_above_1": ratio > 1}
