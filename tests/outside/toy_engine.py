"""A rollout engine that samples nothing: it returns completions that were prepared beforehand."""

import torch

from grpo.batch import Completions

TEXTS = ["<answer>\n1\n</answer>\n", "no answer"]


class Prepared:
    def __init__(self, policy, tokenizer, compute):
        self.device = compute.device
        self.rows = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in TEXTS]
        self.calls = 0

    def generate(self, prompts, sampling, *, group_size, keys):
        self.calls += 1
        count = len(prompts.ids) * group_size
        rows = [self.rows[number % 2] for number in range(count)]
        width = max(len(row) for row in rows)
        ids = torch.tensor([row + [sampling.pad_id] * (width - len(row)) for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = (torch.arange(width, device=self.device) < lengths[:, None]).long()
        group = torch.arange(len(prompts.ids), device=self.device).repeat_interleave(group_size)
        return Completions(ids, mask, mask, group, columns={"call": [self.calls] * count})

    def sync(self, policy):
        pass

    def release(self):
        pass

    def close(self):
        pass

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]
