"""How the log-probabilities of a model are computed. `grpo/rollout/load_check.py` chooses it when a model is loaded."""

from dataclasses import dataclass
from typing import Any

# From the fastest, which few architectures support, to the one that every causal model supports.
TRAINING = ("packed", "cached", "plain")
SAMPLING = ("compiled", "fast", "cached", "plain")
# Their layers are: norm, attention with rotary positions, norm, gated MLP. Biases and norms of heads are optional.
# The names of their classes in transformers without the ending (Llama + Model, MLP), and of the modules.
LLAMA_FAMILY = {"Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3"}


def module_of_family(name: str) -> str:
    """The module of transformers with the classes of a name in LLAMA_FAMILY."""
    return f"transformers.models.{LLAMA_FAMILY[name]}.modeling_{LLAMA_FAMILY[name]}"


@dataclass(frozen=True)
class Implementation:
    """The implementations that give the numbers of a plain forward pass for a model.

    Training: `packed` computes all sequences in one row without padding, `cached` reads the prompt of a group once
    through transformers' cache, `plain` reads it once per completion. Sampling: `compiled` is `CompiledDecoder`, `fast`
    is `FastDecoder`, `cached` reads the prompt of a group once and pads the prompts, `plain` reads it once per
    completion and pads nothing.
    """

    training: str = "cached"
    sampling: str = "cached"
    logit_scale: float = 1.0  # the model multiplies the output head's logits by this
    logit_cap: float | None = None  # its soft cap of the logits; None: no cap

    @property
    def samples_packed(self) -> bool:
        """Whether sampling reads the prompts in one row without padding, each once for its group."""
        return self.sampling in ("compiled", "fast")


def implementation_of(model: Any) -> Implementation:
    """The implementation that was chosen for a model."""
    return getattr(model, "grpo_implementation", Implementation())


def set_implementation(model: Any, chosen: Implementation) -> None:
    """Choose the implementation for a model, and for copies of it that are made later."""
    model.grpo_implementation = chosen
