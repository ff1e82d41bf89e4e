"""The check of a loaded model: the suite's numbers must be those of a plain forward pass of each row by itself.

Sampling, and the training pass with its gradient, are tried with the fastest implementation first
(`grpo/model/implementation.py`), on a few tokens, with prompts of different lengths, beyond every window that the
model's config declares. The first implementation that agrees is used. A model for which none agrees is refused.
docs/models.md has the results for many architectures.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.batch import Completions, Prompts
from grpo.config.errors import ConfigError, first_line
from grpo.config.schema import ModelConfig
from grpo.counter_rng import row_keys
from grpo.model.hardware import free_memory
from grpo.model.implementation import SAMPLING, TRAINING, Implementation, implementation_of, set_implementation
from grpo.model.loading import copy_in_dtype, load_model
from grpo.model.logps import completion_logps
from grpo.model.lora import is_adapter_output
from grpo.model.oom import out_of_memory
from grpo.model.packed import attention_windows, may_pack
from grpo.rollout.compiled_decoder import supports_compiled_decoding
from grpo.rollout.engine import Sampling
from grpo.rollout.head_check import Disagreement, scale_and_cap
from grpo.rollout.llama_decoder import supports_fast_decoding
from grpo.rollout.native import build_decoder, rows_decoded_together, sample_tokens

logger = logging.getLogger(__name__)

NEW_TOKENS = 3  # of each completion
MANY_ROWS = 7  # of each completion: 21 rows are more than the largest block in grpo/rollout/c/decode.c
PROMPT_TOKENS = 12  # of the longest prompt, if there is no window
UNKNOWN_LENGTH = 8192  # longer windows are not checked if it is not known how long the sequences will be
# Logits are compared after scaling them such that the largest one is this. Trained models have such logits; random
# weights give small ones, whose errors are small too.
LARGEST_LOGIT = 30.0
# How often an implementation may differ by as much as rounding the input embeddings once. Of about 150 architectures,
# correct implementations differed by at most 1.5 times as much, and wrong ones by at least 86 times.
TOLERANCE = 10.0
CHOICE_TOLERANCE = 1e-4  # of a log-probability, computed in float32 from the same logits
GRADIENT_TOLERANCE = 0.01  # of the gradient's norm; correct implementations differed by at most 4e-4
ADAPTER_NOISE = 0.1  # standard deviation; with it an adapter changes a layer about as much as the layer's own weights


@dataclass(frozen=True)
class Expected:
    """What plain forward passes give for B completions of P prompts."""

    prompts: Prompts
    completions: Completions
    temperature: float
    logits: Tensor  # (B, T, V) float32, divided by the temperature
    parameters: list[nn.Parameter]
    gradients: list[Tensor]  # of the sum of all log-probabilities, for each of the parameters
    rounding: float  # the largest difference of a logit after rounding the input embeddings once


def load_checked_model(config: ModelConfig, device: torch.device, max_length: int | None = None) -> PreTrainedModel:
    """Load a model and choose its implementation. max_length: see `choose_implementation`. Raises ConfigError."""
    model = load_model(config, device)
    choose_implementation(model, max_length)
    return model


def choose_implementation(
    model: PreTrainedModel,
    max_length: int | None = None,
    compute_dtype: torch.dtype | None = None,
    compiled_decoding: bool = False,
) -> dict[str, float]:
    """Choose the fastest implementations that give the model's numbers, and record them on the model.

    max_length: the largest number of tokens of a prompt with its completion; None if it is not known. compute_dtype:
    that of forward and backward passes; None: the model's. compiled_decoding: whether sampling may use
    `CompiledDecoder`. Returns for `sampling` and `training` the largest difference of a logit or log-probability, where
    the largest logit is `LARGEST_LOGIT`. Raises ConfigError if no implementation gives the model's numbers.
    """
    if isinstance(_attempt(model, model.get_decoder), nn.Linear):
        raise _refused(model, "its get_decoder() returns the output head instead of the layers below it")
    longest = max_length or UNKNOWN_LENGTH
    dtype = compute_dtype or model.dtype
    with (
        torch.enable_grad(),
        _active_adapter(model),
        _probed_parameters(model) as parameters,
        _float32_weights(model),
    ):
        compiled = compiled_decoding and model.device.type == "cpu" and supports_compiled_decoding(model, dtype)
        differences = _choose(model, parameters, longest, compiled)
    if dtype != torch.float32:  # some architectures fail only in other dtypes
        used = model if model.dtype == dtype else copy_in_dtype(model, dtype)
        with torch.enable_grad(), _probed_parameters(used):
            _attempt(model, lambda: _use_once(used, longest))
        del used
    if model.device.type == "cuda":  # the check may need more memory than the run, whose peak is recorded
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
    return differences


def _choose(model: PreTrainedModel, parameters: list[nn.Parameter], longest: int, compiled: bool) -> dict[str, float]:
    prompts, completions = _rows(model, longest)
    scale, cap = _attempt(model, lambda: scale_and_cap(model, prompts.ids[:1, :PROMPT_TOKENS]))
    expected = _attempt(model, lambda: _plain_passes(model, prompts, completions, parameters))
    packs = may_pack(model, longest)
    fast = packs and supports_fast_decoding(model)
    skipped = {"packed": not packs, "fast": not fast, "compiled": not (fast and compiled)}
    plain = Implementation("plain", "plain", scale, cap)
    sampling, sampling_difference = _first_that_agrees(
        model,
        {name: replace(plain, sampling=name) for name in SAMPLING if not skipped.get(name)},
        lambda: _compare_sampling(model, expected),
    )
    training, training_difference = _first_that_agrees(
        model,
        {name: replace(plain, training=name) for name in TRAINING if not skipped.get(name)},
        lambda: _compare_training(model, expected),
    )
    set_implementation(model, replace(plain, training=training, sampling=sampling))
    return {"sampling": sampling_difference, "training": training_difference}


def _first_that_agrees(
    model: PreTrainedModel, candidates: dict[str, Implementation], compare: Callable[[], float]
) -> tuple[str, float]:
    reasons = []
    for name, candidate in candidates.items():
        set_implementation(model, candidate)
        try:
            return name, compare()
        except Exception as error:
            if out_of_memory(error):
                raise
            reasons.append(f"{name}: {_described(error)}")
            logger.debug("%s: %s", type(model).__name__, reasons[-1])
    raise _refused(model, f"results differ from those of a plain forward pass ({'; '.join(reasons)})")


def _attempt(model: PreTrainedModel, function: Callable[[], Any]) -> Any:
    """Call a function; every error in the model's code becomes a ConfigError, except for running out of memory."""
    try:
        return function()
    except Exception as error:
        if out_of_memory(error):
            raise
        raise _refused(model, _described(error)) from error


def _described(error: Exception) -> str:
    return (
        str(error) if isinstance(error, Disagreement) else f"it fails with {type(error).__name__}: {first_line(error)}"
    )


def _refused(model: PreTrainedModel, reason: str) -> ConfigError:
    return ConfigError(f"{type(model).__name__} is not supported: {reason}; choose another model.name")


@contextmanager
def _active_adapter(model: PreTrainedModel) -> Iterator[None]:
    """The model with noise in the B matrices of its adapter within the block.

    They are 0 at first, so the adapter would change nothing, and an implementation that ignores it would agree.
    """
    matrices = [parameter for name, parameter in model.named_parameters() if is_adapter_output(name)]
    former = [matrix.detach().clone() for matrix in matrices]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for matrix in matrices:
            matrix.copy_(ADAPTER_NOISE * torch.randn(matrix.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for matrix, values in zip(matrices, former, strict=True):
                matrix.copy_(values)


@contextmanager
def _probed_parameters(model: PreTrainedModel) -> Iterator[list[nn.Parameter]]:
    """The parameters whose gradient is compared, which alone require one within the block.

    They are the vectors, such as the weights of norms, and the adapter: small, and in every layer. A model without any
    has its input embeddings compared.
    """
    former = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    probed = [
        parameter
        for name, parameter in model.get_decoder().named_parameters()
        if (parameter.dim() == 1 or ".lora_" in name) and parameter.is_floating_point()
    ]
    probed = probed or [model.get_input_embeddings().weight]
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in probed:
            parameter.requires_grad_(True)
        yield probed
    finally:
        for parameter, required in former:
            parameter.requires_grad_(required)


@contextmanager
def _float32_weights(model: PreTrainedModel) -> Iterator[None]:
    """The model with weights in float32 within the block, if there is memory for that.

    In narrower dtypes rounding could hide a wrong implementation. Converting back gives the same bits.
    """
    narrow = [p for p in model.parameters() if p.is_floating_point() and p.itemsize < 4]
    if 1.5 * 4 * sum(p.numel() for p in narrow) > free_memory(model.device):
        logger.warning("there is not enough memory to check the model in float32; it is checked in %s", model.dtype)
        narrow = []
    dtypes = [p.dtype for p in narrow]
    try:
        for parameter in narrow:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in zip(narrow, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)


def _rows(model: PreTrainedModel, longest: int) -> tuple[Prompts, Completions]:
    """Two prompts of different lengths with three completions, of ids from the middle of the vocabulary.

    The first prompt passes every window, and the second passes it while its completion is read.
    """
    config = model.config.get_text_config(decoder=True)
    windows = [window for window in attention_windows(config) if window < longest]
    length = max([PROMPT_TOKENS, *(window + 1 for window in windows)])
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None:
        length = max(4, min(length, limit - NEW_TOKENS))
    device = model.device
    vocabulary = _vocabulary(model)
    draws = torch.arange(2 * length + 3 * NEW_TOKENS, device=device) * 7919 % max(1, vocabulary // 2)
    ids = draws + vocabulary // 4
    mask = torch.ones(2, length, dtype=torch.long, device=device)
    mask[1, :2] = 0
    new = ids[2 * length :].view(3, NEW_TOKENS)
    counted = torch.ones_like(new)
    group = torch.tensor([0, 0, 1], device=device)
    return Prompts(ids[: 2 * length].view(2, length) * mask, mask), Completions(new, counted, counted, group)


def _vocabulary(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()  # has a weight, (V, H)
    return embeddings.weight.shape[0]


def _plain_passes(
    model: PreTrainedModel, prompts: Prompts, completions: Completions, parameters: list[nn.Parameter]
) -> Expected:
    """Run each row by itself, without padding."""
    # Beyond a window there are many tokens, whose logits would take much memory.
    accepts = "logits_to_keep" in inspect.signature(model.forward).parameters
    last_logits = {"logits_to_keep": NEW_TOKENS} if accepts else {}

    def logits_of(row: int) -> Tensor:  # (T, V) float32
        prompt = completions.group[row]
        ids = torch.cat([prompts.ids[prompt][prompts.mask[prompt].bool()], completions.ids[row, :-1]])
        return model(input_ids=ids[None], use_cache=False, **last_logits).logits[0, -NEW_TOKENS:].float().clone()

    logits = torch.stack([logits_of(row) for row in range(len(completions.ids))])  # (B, T, V)
    if not bool(logits.isfinite().all()):
        raise Disagreement("its logits are not finite")
    temperature = float(logits.detach().abs().max()) / LARGEST_LOGIT or 1.0
    logps = (logits / temperature).log_softmax(dim=-1).gather(2, completions.ids[:, :, None])
    gradients = torch.autograd.grad(logps.sum(), parameters, allow_unused=True)
    used = [(parameter, grad) for parameter, grad in zip(parameters, gradients, strict=True) if grad is not None]
    logits = logits.detach()
    with torch.no_grad(), _rounded_embeddings(model):
        rounding = float((logits_of(0) - logits[0]).abs().max()) / temperature
    return Expected(
        prompts=prompts,
        completions=completions,
        temperature=temperature,
        logits=logits / temperature,
        parameters=[parameter for parameter, _ in used],
        gradients=[grad for _, grad in used],
        rounding=rounding,
    )


@contextmanager
def _rounded_embeddings(model: PreTrainedModel) -> Iterator[None]:
    """Change the input embeddings by as much as rounding in their dtype does."""

    def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.device)
        return (output.float() * (1 + noise * torch.finfo(output.dtype).eps / 2)).to(output.dtype)

    hook = model.get_input_embeddings().register_forward_hook(change)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _compare_sampling(model: PreTrainedModel, expected: Expected) -> float:
    """Decode the expected tokens; the first row leaves the batch after a token. Returns the largest difference."""
    completions = expected.completions
    differences = []
    # Of two prompts, with a group and as in evaluation, for which transformers' code may take another way. The C code
    # multiplies many rows in another way than a few.
    many = [row for row in range(3) for _ in range(MANY_ROWS)]
    tried = {"compiled": [many, [0, 1, 2]], "fast": [[0, 1, 2]]}
    for rows in tried.get(implementation_of(model).sampling, [[0, 1, 2], [0, 2]]):
        chosen = torch.tensor(rows, device=model.device)
        for part in rows_decoded_together(model, expected.prompts, completions.group, chosen):
            decoder = build_decoder(model, expected.prompts, completions.group[part], NEW_TOKENS)
            for t in range(NEW_TOKENS):
                logits = decoder.logits.float() / expected.temperature
                differences.append(float((logits - expected.logits[part, t]).abs().max()))
                if t == 0 and len(part) > 1:
                    part = part[1:]
                    decoder.keep(torch.arange(1, len(part) + 1, device=model.device))
                if t + 1 < NEW_TOKENS:
                    decoder.read(completions.ids[part, t])
    if implementation_of(model).sampling == "compiled":
        _compare_compiled_choice(expected.logits[0] / LARGEST_LOGIT)  # at most 1, so that the noise decides
    return _checked(max(differences), TOLERANCE * expected.rounding, "logits")


def _compare_compiled_choice(logits: Tensor) -> None:
    """Choose a token from each row of logits (rows, V) by the C code and by torch. Raises Disagreement."""
    keys = row_keys(0, 0, np.arange(len(logits)), np.arange(len(logits)))
    for temperature in (0.0, 1.0):
        sampling = Sampling(1, temperature, (0,), 0)
        (compiled, logps), (plain, plain_logps) = (
            sample_tokens(logits, keys, 0, sampling, torch.zeros(1, dtype=torch.long), by_c) for by_c in (True, False)
        )
        if not torch.equal(compiled, plain):
            raise Disagreement(f"the C code chooses the tokens {compiled.tolist()} instead of {plain.tolist()}")
        _checked(float((logps - plain_logps).abs().max()), CHOICE_TOLERANCE, "log-probabilities of chosen tokens")


def _compare_training(model: PreTrainedModel, expected: Expected) -> float:
    """Compute the log-probabilities and the gradient of their sum. Returns the largest difference of the former."""
    ids = expected.completions.ids
    logps = completion_logps(model, expected.prompts, expected.completions, expected.temperature).logps
    plain = expected.logits.log_softmax(dim=-1).gather(2, ids[:, :, None]).squeeze(2)
    difference = float((logps.detach() - plain).abs().max())
    _checked(difference, TOLERANCE * expected.rounding, "log-probabilities")
    gradients = torch.autograd.grad(logps.sum(), expected.parameters, allow_unused=True)
    distance = torch.stack(
        [
            (plain if ours is None else ours - plain).float().norm()
            for ours, plain in zip(gradients, expected.gradients, strict=True)
        ]
    )
    size = torch.stack([gradient.float().norm() for gradient in expected.gradients]).norm()
    _checked(float(distance.norm() / size), max(GRADIENT_TOLERANCE, 32 * torch.finfo(model.dtype).eps), "gradient")
    return difference


def _checked(difference: float, allowed: float, what: str) -> float:
    if not difference <= allowed:  # `not <=` instead of `>`, so that NaN fails too
        raise Disagreement(f"{what} differ by {difference:.2g}, more than rounding explains ({allowed:.2g})")
    return difference


def _use_once(model: PreTrainedModel, longest: int) -> None:
    """Decode and compute log-probabilities with their gradient in the model's own dtype."""
    prompts, completions = _rows(model, longest)
    with torch.no_grad():
        for part in rows_decoded_together(model, prompts, completions.group, torch.arange(3, device=model.device)):
            decoder = build_decoder(model, prompts, completions.group[part], NEW_TOKENS)
            decoder.read(completions.ids[part, 0])
    logps = completion_logps(model, prompts, completions, 1.0).logps
    logps.sum().backward(inputs=[p for p in model.parameters() if p.requires_grad])
    model.zero_grad(set_to_none=True)
    if not bool(logps.isfinite().all()):
        raise Disagreement(f"its log-probabilities are not finite in {model.dtype}")
