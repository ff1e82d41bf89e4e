"""The default rewards, shuffled among the completions: a control in which nothing can be learnt."""

import random

from grpo.rewards import math_xml


def correctness(prompts, completions, **columns):
    return _shuffled(math_xml.correctness(prompts, completions, **columns), completions)


def tag_format(prompts, completions, **columns):
    return _shuffled(math_xml.tag_format(prompts, completions, **columns), completions)


def _shuffled(rewards, completions):
    # Seeded by the batch, so that both components are shuffled alike and a run can be repeated.
    random.Random(str(completions)).shuffle(rewards)
    return rewards
