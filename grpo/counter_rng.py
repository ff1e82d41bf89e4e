"""Counter-based sampling noise: a pure function of (seed, step, slot, completion, token, vocabulary index).

There is no random state to save, and a row gets the same noise in any batch, process or order.
"""

import numpy as np
import torch
from torch import Tensor

# Multipliers of splitmix64 (Steele et al., "Fast splittable pseudorandom number generators") for 64 bits, and of
# "lowbias32" (Wellons, hash-prospector), a 32-bit mixer with low measured bias, for the part that runs per token.
_MIX64 = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_GOLDEN64 = np.uint64(0x9E3779B97F4A7C15)
_MIX32 = (0x7FEB352D, 0x846CA68B - (1 << 32))  # as signed 32-bit numbers: torch has few unsigned operations
_GOLDEN32 = 0x9E3779B9 - (1 << 32)


def hash64(*counters: int | np.ndarray) -> np.ndarray:
    """Hash integers, or integer arrays of broadcastable shapes, to uint64; the order of the arguments matters."""
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for counter in counters:
            state = state + _GOLDEN64 + np.asarray(counter).astype(np.uint64)
            state = (state ^ (state >> np.uint64(30))) * _MIX64[0]
            state = (state ^ (state >> np.uint64(27))) * _MIX64[1]
            state = state ^ (state >> np.uint64(31))
    return state


def row_keys(seed: int, step: int, slots: np.ndarray, completions: np.ndarray, attempt: int = 0) -> Tensor:
    """Keys (B, 2) int32 of B completions, from their prompt's slot and their index in the group, (B,) each.

    attempt: how many groups were sampled in the same slots of this step before.
    """
    keys = hash64(seed, step, slots, completions, *([attempt] if attempt else []))
    return torch.from_numpy(np.ascontiguousarray(keys).view(np.int32).reshape(-1, 2).copy())


def group_keys(seed: int, step: int, slots: np.ndarray, group_size: int, attempt: int = 0) -> Tensor:
    """Keys (P * group_size, 2) int32 of the completions of P prompts, given the prompts' slots (P,).

    attempt: see `row_keys`.
    """
    return row_keys(seed, step, slots.repeat(group_size), np.tile(np.arange(group_size), len(slots)), attempt)


def gumbel_noise(keys: Tensor, token: int, vocab_size: int) -> Tensor:
    """Standard Gumbel noise (B, vocab_size) float32 for the token at index `token` of each completion.

    keys: (B, 2) int32 from `row_keys`. `argmax(logits / temperature + noise)` is a sample from the softmax (the
    Gumbel-max trick). Rounding changes this sample only if two candidates are nearly tied.
    """
    return noise_from(token_keys(keys, token + 1)[token], vocab_size)


def token_keys(keys: Tensor, tokens: int) -> Tensor:
    """Keys (tokens, B, 2) int32 of the first tokens of B completions, from their keys (B, 2)."""
    token = torch.arange(tokens, dtype=torch.int32, device=keys.device) * _GOLDEN32
    return _mix32(_mix32(keys ^ token[:, None, None]) + keys.flip(1))


def noise_from(token_keys: Tensor, vocab_size: int) -> Tensor:
    """`gumbel_noise` from the keys (B, 2) of one token each, one of `token_keys`."""
    vocab = torch.arange(vocab_size, dtype=torch.int32, device=token_keys.device)
    bits = _mix32((vocab * _GOLDEN32) ^ token_keys[:, :1], token_keys[:, 1:])  # (B, vocab_size)
    return _gumbel(bits & 0x7FFFFFFF)


def _gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel noise from 31 random bits per value, int32; always finite."""
    # Uniform in (0, 1). Small values, which become the large noise that decides, keep full resolution. The largest 64
    # would round to 1, whose noise is -inf: even a token with a probability of almost 1 would lose.
    negative = bits.to(torch.float32).add_(0.5).mul_(-(2.0**-31)).clamp_(min=2.0**-24 - 1)  # -u
    exponential = negative.log1p_().neg_()  # -log(1 - u)
    return exponential.log_().neg_()


def random_bits(counters: tuple[int, ...], start: int, count: int, device: torch.device) -> Tensor:
    """Random bits (count,) int32 for the elements from `start` on of the stream that the counters identify."""
    first, second = hash64(*counters).reshape(1).view(np.int32).tolist()
    index = torch.arange(start, start + count, dtype=torch.int32, device=device)
    return _mix32(index.mul_(_GOLDEN32).bitwise_xor_(first), second)


def _mix32(x: Tensor, second_key: Tensor | int = 0) -> Tensor:
    """lowbias32 in wrapping int32 arithmetic, with a second key added in the middle. Does not change `x`."""
    x = x ^ _shift_right(x, 16)
    x.mul_(_MIX32[0]).add_(second_key)
    x.bitwise_xor_(_shift_right(x, 15)).mul_(_MIX32[1])
    return x.bitwise_xor_(_shift_right(x, 16))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch's >> on signed integers is an arithmetic shift; the mask makes it the logical shift that lowbias32 needs.
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)
