"""The embedded model, which answers `grpo.data.arithmetic` half right, and the recipe that makes it."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
