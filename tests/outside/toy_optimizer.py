"""An optimizer: AdamW that writes down which functions of the suite called it."""

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
