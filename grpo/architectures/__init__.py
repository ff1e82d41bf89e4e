"""Architectures without weights, which are drawn at random where a benchmark needs a true shape and no hub."""

from pathlib import Path

ARCHITECTURES_DIR = Path(__file__).parent
