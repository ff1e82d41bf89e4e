"""The embedded model, which solves `grpo.data.arithmetic` in part, and the script that trains it."""

from pathlib import Path

MODEL_NAME = "tiny"  # the value of model.name
MODEL_DIR = Path(__file__).parent / "model"
