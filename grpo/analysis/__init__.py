"""Analysis of run and sweep folders: metrics as data frames, charts, summaries and reports."""

from grpo.analysis.load import load_runs

__all__ = ["load_runs"]
