"""GRPO (Group Relative Policy Optimization) from scratch, as a Hydra experiment suite."""
