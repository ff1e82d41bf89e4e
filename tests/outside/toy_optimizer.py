"""An optimizer: AdamW that writes the names of the suite's functions that called it to a file."""

import traceback
from pathlib import Path

import torch

import grpo

PACKAGE = str(Path(grpo.__file__).parent)


class Traced(torch.optim.AdamW):
    def step(self, closure=None):
        names = [frame.name for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
        Path("callers.txt").write_text("\n".join(names[names.index("train") :]))
        return super().step(closure)
