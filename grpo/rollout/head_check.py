"""How a model changes the logits of its output head, measured when it is loaded."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.model.lm_head import soft_cap

HEAD_TOLERANCE = 1e-3  # of the largest logit


class Disagreement(Exception):
    """An implementation does not give the expected numbers."""


@torch.no_grad()
def scale_and_cap(model: PreTrainedModel, ids: Tensor) -> tuple[float, float | None]:
    """How the model changes the logits of its output head: `Implementation.logit_scale` and `Implementation.logit_cap`.

    A soft cap changes only large logits, so the hidden states are scaled until the largest logit is 1000. Raises
    Disagreement if the logits are changed in another way.
    """
    cap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    rounding = max(HEAD_TOLERANCE, 4 * torch.finfo(model.dtype).eps)
    head = model.get_output_embeddings()
    if head is None:
        raise Disagreement("it has no output head")
    output = model.get_decoder()(input_ids=ids, use_cache=False)
    hidden = output.last_hidden_state
    largest_of_head = float(head(hidden).abs().max())
    scale: float | None = None
    for largest in (1.0, 1000.0):
        output.last_hidden_state = hidden * (largest / largest_of_head)
        of_head = head(output.last_hidden_state)[0].cpu().double()  # (T, V); Apple's GPU has no float64
        found = _logits_from(model, ids, output)
        if cap is not None:
            of_head = soft_cap(of_head, cap)
        if scale is None:
            scale = float((found * of_head).sum() / of_head.square().sum())
        if not bool((found - scale * of_head).abs().max() <= rounding * found.abs().max()):
            raise Disagreement("it changes the logits of its output head in an unknown way")
    assert scale is not None
    scale = 1.0 if abs(scale - 1) < rounding else scale
    if cap is not None and scale != 1.0:
        raise Disagreement("it scales the logits of its output head, and caps them")
    return scale, cap


def _logits_from(model: PreTrainedModel, ids: Tensor, output: Any) -> Tensor:
    """The logits (T, V) float64 that the model computes if its decoder returns `output`."""
    used = False

    def decoder_output(*args: Any, **kwargs: Any) -> Any:
        nonlocal used
        used = True
        return output

    decoder = model.get_decoder()
    decoder.forward = decoder_output  # of this instance; deleted below
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0].cpu().double()
    finally:
        del decoder.forward
    if not used:
        raise Disagreement("its logits do not come from its decoder")
    return logits
