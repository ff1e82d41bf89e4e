"""GRPO (Group Relative Policy Optimization) from scratch, as a Hydra experiment suite."""

import os

# oneDNN, and torch before it, keep what they prepared for each shape of a product, working memory included, and batches
# of text have ever new shapes: by default for the last 1024 of them. Read when the first product is made.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "32")
