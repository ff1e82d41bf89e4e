"""Loading causal language models, and the log-probabilities of completions under them."""

import functools
import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache
from transformers.utils import logging as transformers_logging

from grpo.config import ConfigError, ModelConfig, first_line
from grpo.tiny import MODEL_DIR as TINY_MODEL_DIR

EMBEDDED_MODELS = {"tiny": TINY_MODEL_DIR}
LOGITS_PER_CHUNK = 2**24  # 64 MB of float32 logits exist at a time, whatever the batch and the vocabulary


@dataclass(frozen=True)
class PromptBatch:
    """P prompts, padded on the left to the longest."""

    ids: Tensor  # (P, L) int64
    mask: Tensor  # (P, L) int64, 1 where a token is


@dataclass(frozen=True)
class CompletionBatch:
    """B = P * G completions, padded on the right; row b answers prompt b // G."""

    ids: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) int64, 1 through the first end-of-sequence token, inclusive


@dataclass(frozen=True)
class TokenLogps:
    """What the policy thinks of B completions' tokens, at the sampling temperature; 0 outside the mask."""

    logps: Tensor  # (B, T) float32, log-probability of each token
    entropy: Tensor  # (B, T) float32, entropy in nats of the distribution that it was drawn from; no gradient


def model_source(name: str) -> str:
    """Where transformers finds a model: the folder of an embedded one, else the hub name or folder as it is."""
    return str(EMBEDDED_MODELS.get(name, name))


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token. Raises ConfigError where the model cannot be found or reached."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_source(config.name), trust_remote_code=config.trust_remote_code, padding_side="left"
        )
    except (OSError, ValueError) as error:
        raise model_not_found(config.name, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_model(config: ModelConfig) -> None:
    """Raise ConfigError unless the model's own config can be read, which takes no weights."""
    try:
        AutoConfig.from_pretrained(model_source(config.name), trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise model_not_found(config.name, error) from error


def load_model(config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """The model on `device`, in evaluation mode (GRPO's ratios need the same network to sample and to train)."""
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_source(config.name),
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConfigError(f"model.name={config.name} could not be loaded: {first_line(error)}") from error
    model.to(device).eval()
    _check_head(model)
    return model


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's own and those of the model's generation config."""
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    return sorted({token for token in [tokenizer.eos_token_id, *stops] if token is not None})


def tokenize_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str], device: torch.device) -> PromptBatch:
    """Rendered prompts as one left-padded batch. Special tokens are part of the text, none are added."""
    encoded = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    return PromptBatch(encoded.input_ids.to(device), encoded.attention_mask.to(device))


def positions(mask: Tensor) -> Tensor:
    """Position of each token (rows, L), counted from the row's first real token."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def prefill(model: PreTrainedModel, prompts: PromptBatch) -> tuple[Tensor, DynamicCache]:
    """Read P prompts once. Returns the last token's hidden state (P, H) and the keys and values (P rows).

    With gradient enabled the cache carries it, so a whole group can share its prompt's forward pass in training.
    """
    cache = DynamicCache(config=model.config)
    hidden = extend(model, cache, prompts.ids, prompts.mask, positions(prompts.mask))
    return hidden[:, -1], cache


def extend(model: PreTrainedModel, cache: DynamicCache, ids: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
    """Read more tokens. Returns their hidden states (rows, L, H) and adds their keys and values to the cache.

    ids, position_ids: (rows, L); mask: (rows, length of the cache + L).
    """
    decoder = model.get_decoder()
    cached = {_cache_argument(type(decoder)): cache}
    output = decoder(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=True, **cached)
    return output.last_hidden_state


@functools.cache
def _cache_argument(decoder: type[nn.Module]) -> str:
    """transformers renamed it in 5.24; a model that comes with its own code may have the older name in any version."""
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


def select_cache_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep, repeat or reorder the cache's rows in place; rows (N,) int64 may name a row more than once.

    `index_select` and not indexing, because its gradient adds up repeated rows in a fixed order.
    """
    for layer in cache.layers:
        layer.keys = layer.keys.index_select(0, rows)
        layer.values = layer.values.index_select(0, rows)


def completion_logps(
    model: PreTrainedModel,
    prompts: PromptBatch,
    completions: CompletionBatch,
    prompt_of_row: Tensor,
    temperature: float,
) -> TokenLogps:
    """Log-probabilities of B completions' tokens, each prompt read once for all of its completions.

    prompt_of_row: (B,) int64, the row of `prompts` that each completion answers. With gradient enabled the
    logps carry it, through the shared prompt as well. `completion_logps_unshared` is the plain form of the same.
    """
    last_hidden, cache = prefill(model, prompts)
    select_cache_rows(cache, prompt_of_row)
    prompt_mask = prompts.mask.index_select(0, prompt_of_row)
    mask = torch.cat([prompt_mask, completions.mask[:, :-1]], dim=1)
    hidden = last_hidden.index_select(0, prompt_of_row)[:, None]
    if completions.ids.shape[1] > 1:
        new_positions = positions(mask)[:, prompt_mask.shape[1] :]
        hidden = torch.cat([hidden, extend(model, cache, completions.ids[:, :-1], mask, new_positions)], dim=1)
    return head_logps(model.get_output_embeddings(), hidden, completions, temperature)


def completion_logps_unshared(
    model: PreTrainedModel,
    prompts: PromptBatch,
    completions: CompletionBatch,
    prompt_of_row: Tensor,
    temperature: float,
) -> TokenLogps:
    """What `completion_logps` computes, written plainly: prompt and completion in one row, all logits at once."""
    ids = torch.cat([prompts.ids[prompt_of_row], completions.ids], dim=1)
    mask = torch.cat([prompts.mask[prompt_of_row], completions.mask], dim=1)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    logps = torch.log_softmax(logits[:, prompts.ids.shape[1] - 1 : -1].float() / temperature, dim=-1)
    token_logps = logps.gather(2, completions.ids[:, :, None]).squeeze(2)
    entropy = -(logps.exp() * logps).sum(dim=2).detach()
    return TokenLogps(token_logps * completions.mask, entropy * completions.mask)


def head_logps(head: nn.Module, hidden: Tensor, completions: CompletionBatch, temperature: float) -> TokenLogps:
    """From hidden states (B, T, H) to the tokens' log-probabilities, a chunk of active tokens at a time.

    The head runs again in the backward pass, so (B, T, vocabulary) logits never exist.
    """
    active = completions.mask.flatten().nonzero().squeeze(1)
    hidden = hidden.flatten(0, 1).index_select(0, active)
    targets = completions.ids.flatten().index_select(0, active)
    chunk = max(1, LOGITS_PER_CHUNK // head.weight.shape[0])
    parts = [
        checkpoint(_chunk_logps, head, h, t, temperature, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    logps, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    empty = torch.zeros(completions.mask.numel(), dtype=torch.float32, device=hidden.device)
    shape = completions.mask.shape
    return TokenLogps(
        empty.index_copy(0, active, logps).view(shape), empty.index_copy(0, active, entropy.detach()).view(shape)
    )


def _chunk_logps(head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logps = torch.log_softmax(head(hidden).float() / temperature, dim=-1)
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(dim=-1)
    return logps.gather(1, targets[:, None]).squeeze(1), entropy


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """The engine applies the output head itself; refuse an architecture that does more between it and the logits."""
    ids = torch.arange(1, 5, device=model.device)[None]
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    if not torch.allclose(model.get_output_embeddings()(hidden), model(ids, use_cache=False).logits, atol=1e-4):
        raise ConfigError(
            f"{type(model).__name__} changes its logits after the output head (scaling or soft-capping), "
            "which this engine does not reproduce; choose another model.name"
        )


def model_not_found(name: str, cause: Exception) -> ConfigError:
    """The error to raise where neither a folder nor the hub has the model."""
    if Path(name).is_dir():
        return ConfigError(
            f"model.name={name} is not a folder that transformers can load a model from: {first_line(cause)}"
        )
    return ConfigError(
        f"model.name={name} is neither a local folder nor a model that the hub gave (wrong name, no access, or no "
        "network?); give a folder with model.name=DIR, or fetch it once with: python -m grpo download model.name=..."
    )
