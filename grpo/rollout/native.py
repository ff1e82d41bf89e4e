"""The suite's own rollout engine: a prompt is processed once for its whole group, finished rows leave the batch."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.batch import Completions, Prompts, positions, split_rows
from grpo.config.errors import ConfigError
from grpo.counter_rng import noise_from, token_keys
from grpo.model.implementation import LLAMA_FAMILY, implementation_of
from grpo.model.kv_cache import cache_argument, extend, new_cache, prefill, select_cache_rows
from grpo.model.lm_head import output_head
from grpo.model.oom import TokenBudget
from grpo.rollout import compiled_decoder
from grpo.rollout.compiled_decoder import CompiledDecoder
from grpo.rollout.engine import Compute, OnTokens, Sampling
from grpo.rollout.llama_decoder import FastDecoder

# (N, limit): every N tokens, finished rows are dropped if the share of running rows is below the limit. On a CPU the
# time grows with the number of rows; on a GPU it hardly does, and each check synchronises.
ON_CPU = (1, 1.0)
ELSEWHERE = (16, 0.75)


class NativeEngine:
    """A `RolloutEngine` that samples with the policy itself, and with noise from a counter."""

    def __init__(self, policy: PreTrainedModel, tokenizer: Any, compute: Compute) -> None:
        """Raises ConfigError on an Apple GPU if decoding would be wrong there."""
        if compute.device.type == "mps":
            check_decoding(policy)
        self._policy = policy
        self._budget = TokenBudget("rollout", compute.tokens)

    def generate(
        self, prompts: Prompts, sampling: Sampling, *, group_size: int, keys: Tensor, on_tokens: OnTokens | None = None
    ) -> Completions:
        """See `RolloutEngine`; as many rows at once as the token budget allows, fewer after running out of memory."""

        def sample(token_budget: int) -> Completions:
            return rollout(
                self._policy,
                prompts,
                sampling,
                group_size=group_size,
                keys=keys,
                token_budget=token_budget,
                on_tokens=on_tokens,
            )

        lengths = prompts.mask.sum(dim=1)
        times_read = 1 if implementation_of(self._policy).samples_packed else group_size
        least = int(lengths.max()) + sampling.max_new_tokens
        most = int(lengths.sum()) * times_read + len(lengths) * group_size * sampling.max_new_tokens
        return self._budget.run(sample, least, most)

    def sync(self, policy: PreTrainedModel) -> None:
        """Sample from this policy; its weights are not copied."""
        self._policy = policy

    def release(self) -> None:
        """Nothing is held between two calls."""

    def close(self) -> None:
        """Nothing is held between two calls."""

    def state_dict(self) -> dict[str, int]:
        """The state of the token budget, which running out of memory reduces."""
        return self._budget.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the state of the token budget."""
        self._budget.load_state_dict(state)


def check_decoding(model: PreTrainedModel) -> None:
    """Raise ConfigError if sampling from the model would need transformers' growing cache."""
    if not implementation_of(model).samples_packed:
        families = ", ".join(sorted(LLAMA_FAMILY))
        raise ConfigError(
            f"{type(model).__name__} with model.attn_implementation={model.config._attn_implementation} needs "
            f"transformers' cache for sampling, which gives NaN on Apple's GPU; use hardware=cpu, or one of "
            f"{families} with model.attn_implementation=sdpa"
        )


@torch.no_grad()
def rollout(
    model: PreTrainedModel,
    prompts: Prompts,
    sampling: Sampling,
    *,
    group_size: int,
    keys: Tensor,
    token_budget: int,
    on_tokens: OnTokens | None = None,
) -> Completions:
    """Sample `group_size` completions for each of P prompts -> B = P * group_size rows.

    keys: (B, 2) int32. The noise of every token is a function of its row's key, its index and the vocabulary index, so
    a completion depends on which rows are decoded together only through the rounding of the model itself.
    token_budget: maximum tokens in the key-value cache. on_tokens: see `RolloutEngine.generate`.
    """
    device = prompts.ids.device
    keys = keys.to(device)
    group = torch.arange(len(prompts.ids), device=device).repeat_interleave(group_size)  # (B,)
    ids = torch.full((len(group), sampling.max_new_tokens), sampling.pad_id, device=device)
    logps = torch.zeros(ids.shape, device=device)
    longest = 0
    rows = torch.arange(len(group), device=device)
    for part in rows_decoded_together(model, prompts, group, rows, sampling.max_new_tokens, token_budget):
        start = functools.partial(build_decoder, model, prompts, group[part], sampling.max_new_tokens)
        part_ids, part_logps = _decode(start, keys[part], sampling, part, on_tokens)
        width = part_ids.shape[1]
        ids[part, :width] = part_ids
        logps[part, :width] = part_logps
        longest = max(longest, width)
    ids = ids[:, :longest]
    logps = logps[:, :longest]
    mask = completion_mask(ids, sampling.stop_ids)
    return Completions(ids, mask, mask, group, logps * mask)


def rows_decoded_together(
    model: PreTrainedModel,
    prompts: Prompts,
    prompt_of_row: Tensor,
    rows: Tensor,
    max_new_tokens: int = 0,
    token_budget: int = 2**62,
) -> list[Tensor]:
    """Split rows (n,) into parts of at most `token_budget` tokens; if prompts cannot be padded, also by their length.

    prompt_of_row: (B,), of all rows, ordered by prompt.
    """
    lengths = prompts.mask.sum(dim=1)
    chosen = implementation_of(model)
    parts = split_rows(lengths, prompt_of_row[rows], max_new_tokens, token_budget, chosen.samples_packed)
    parts = [rows[part] for part in parts]
    if chosen.sampling != "plain":
        return parts
    by_row = lengths[prompt_of_row]  # (B,)
    return [part[by_row[part] == length] for part in parts for length in by_row[part].unique()]


def build_decoder(model: PreTrainedModel, prompts: Prompts, prompt_of_row: Tensor, max_tokens: int) -> "Decoder":
    """The decoder that was chosen for the model, for R rows with prompts `prompt_of_row` (R,)."""
    used, place = prompts.take(prompt_of_row)
    return DECODERS[implementation_of(model).sampling](model, used, place, max_tokens)


def completion_mask(ids: Tensor, stop_ids: tuple[int, ...]) -> Tensor:
    """1 through the first end-of-sequence token, inclusive; all ones if there is none. (B, T) -> (B, T) int64."""
    stop = torch.isin(ids, torch.tensor(stop_ids, device=ids.device)).long()
    return (stop.cumsum(dim=1) - stop == 0).long()


def _decode(
    start: Callable[[], "Decoder"], keys: Tensor, sampling: Sampling, numbers: Tensor, on_tokens: OnTokens | None
) -> tuple[Tensor, Tensor]:
    """Decode some rows together. Returns token ids, padded after each end, and log-probabilities, (rows, T) each.

    numbers: (rows,), those of the rows, for on_tokens.
    """
    rows = len(keys)
    device = keys.device
    stop_ids = torch.tensor(sampling.stop_ids, device=device)
    ids = torch.full((rows, sampling.max_new_tokens), sampling.pad_id, device=device)
    logps = torch.zeros(ids.shape, device=device)
    running = torch.arange(rows, device=device)  # the rows of `ids` that are still decoded
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    noise_keys = token_keys(keys, sampling.max_new_tokens)  # (max new tokens, rows, 2)
    decoder = start()
    compiled = isinstance(decoder, CompiledDecoder)
    look_every, compact_below = ON_CPU if device.type == "cpu" else ELSEWHERE
    for t in range(sampling.max_new_tokens):
        logits = decoder.logits.float()
        tokens, logps[running, t] = sample_tokens(logits, noise_keys[t, running], t, sampling, stop_ids, compiled)
        tokens = torch.where(ended, sampling.pad_id, tokens)
        ids[running, t] = tokens
        if on_tokens is not None:
            on_tokens(numbers[running[~ended]], tokens[~ended])
        ended = ended | torch.isin(tokens, stop_ids)
        if t + 1 == sampling.max_new_tokens:
            break
        if (t + 1) % look_every == 0:
            alive = (~ended).nonzero().squeeze(1)
            if len(alive) == 0:
                return ids[:, : t + 1], logps[:, : t + 1]
            if len(alive) < compact_below * len(ended):
                decoder.keep(alive)
                running = running[alive]
                ended = ended[alive]
                tokens = tokens[alive]
        decoder.read(tokens)
    return ids, logps


class Decoder(Protocol):
    """Decodes R rows, one token at a time."""

    logits: Tensor  # (R, V) of the next token

    def read(self, tokens: Tensor) -> None:
        """Process one more token of each row, (R,), and update `logits`."""

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows, (n,) int64 ascending."""


class CachedDecoder:
    """A decoder for any architecture, with transformers' own cache and left-padded prompts."""

    def __init__(self, model: PreTrainedModel, prompts: Prompts, prompt_of_row: Tensor, max_tokens: int) -> None:
        hidden, self._cache = prefill(model, prompts)
        select_cache_rows(self._cache, prompt_of_row)
        mask = prompts.mask[prompt_of_row]
        self._model = model
        self._length = mask.shape[1]
        self._mask = torch.cat([mask, mask.new_ones(len(mask), max_tokens)], dim=1)
        self._next_position = positions(mask)[:, -1:] + 1  # (R, 1)
        self._head = output_head(model)
        self.logits = self._head(hidden[prompt_of_row])

    def read(self, tokens: Tensor) -> None:
        """See `Decoder`."""
        self._length += 1
        hidden = extend(self._model, self._cache, tokens[:, None], self._mask[:, : self._length], self._next_position)
        self._next_position = self._next_position + 1
        self.logits = self._head(hidden[:, -1])

    def keep(self, rows: Tensor) -> None:
        """See `Decoder`."""
        select_cache_rows(self._cache, rows)
        self._mask = self._mask[rows]
        self._next_position = self._next_position[rows]


class PlainDecoder:
    """A decoder that leaves transformers' cache alone, for architectures with a cache of their own.

    All prompts must have the same length, since there is no padding. Rows that are not kept are decoded to the end.
    """

    def __init__(self, model: PreTrainedModel, prompts: Prompts, prompt_of_row: Tensor, max_tokens: int) -> None:
        assert bool(prompts.mask.all())
        self._decoder = model.get_decoder()
        self._head = output_head(model)
        self._cache = new_cache(model)
        self._rows = torch.arange(len(prompt_of_row), device=prompt_of_row.device)
        self._tokens = prompts.ids[prompt_of_row, -1]  # (R,), the last token of every row, also of those not kept
        self.logits = self._compute(prompts.ids[prompt_of_row])

    def _compute(self, ids: Tensor) -> Tensor:
        output = self._decoder(input_ids=ids, use_cache=True, **{cache_argument(self._decoder): self._cache})
        return self._head(output.last_hidden_state[self._rows, -1])

    def read(self, tokens: Tensor) -> None:
        """See `Decoder`."""
        self._tokens[self._rows] = tokens
        self.logits = self._compute(self._tokens[:, None])

    def keep(self, rows: Tensor) -> None:
        """See `Decoder`."""
        self._rows = self._rows[rows]


DECODERS: dict[str, Callable[..., Decoder]] = {
    "compiled": CompiledDecoder,
    "fast": FastDecoder,
    "cached": CachedDecoder,
    "plain": PlainDecoder,
}


def sample_tokens(
    logits: Tensor, noise_keys: Tensor, t: int, sampling: Sampling, stop_ids: Tensor, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Sample token t from float32 logits (rows, V): greedy, or Gumbel-max with the noise of `noise_keys` (rows, 2).

    compiled: whether to use the C function. Returns the tokens (rows,) and their log-probabilities (rows,) over the
    whole vocabulary, as the training pass computes them; 0 for greedy decoding.
    """
    if compiled:
        return compiled_decoder.sample_tokens(logits, noise_keys, t, sampling, stop_ids)
    if sampling.temperature == 0:
        return _mask_early_stops(logits, t, sampling, stop_ids).argmax(dim=1), logits.new_zeros(len(logits))
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    allowed = _mask_early_stops(logits, t, sampling, stop_ids)
    # The first of equal values, as `argmax` returns, which is slower on a CPU.
    tokens = (allowed + noise_from(noise_keys, logits.shape[1])).max(dim=1).indices
    return tokens, logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(dim=1)


def _mask_early_stops(logits: Tensor, t: int, sampling: Sampling, stop_ids: Tensor) -> Tensor:
    return logits.index_fill(1, stop_ids, -torch.inf) if t < sampling.min_new_tokens else logits
