"""What a run folder says: its metrics as data frames, its charts and its summary."""

from grpo.analysis.load import load_runs

__all__ = ["load_runs"]
