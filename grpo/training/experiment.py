"""From a config to the parts of a run. Everything that can be checked is checked before any weight is loaded."""

import functools
import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.algorithm.loss import LossOutput
from grpo.batch import Completions, Prompts, tokenize_prompts
from grpo.config.checks import Sizes, complete_sizes, kl_weight
from grpo.config.errors import ConfigError, first_line
from grpo.config.instantiate import bind, bind_reward, check_reward_form
from grpo.config.schema import Config
from grpo.data.problems import Problem, Problems
from grpo.data.prompts import Messages, messages, prompt_lengths, render
from grpo.model.hardware import use_hardware
from grpo.model.loading import architecture, check_model, copy_in_dtype, load_model, load_tokenizer, stop_token_ids
from grpo.model.lora import add_adapter, check_adapter, save_adapter, switch_adapter
from grpo.model.oom import Cut
from grpo.rewards.scoring import Component, Rewards, end_process, score
from grpo.rollout.llama_decoder import is_lean
from grpo.rollout.mps_check import check_decoding, check_device
from grpo.rollout.native import Sampling, rollout

logger = logging.getLogger(__name__)

DATA_KEYS = (
    "system_prompt",
    "examples",
    "max_prompt_length",
)  # the data group's keys that are not its loader's arguments


@dataclass(frozen=True)
class Setup:
    """What a run works with, but for the weights."""

    config: Config
    sizes: Sizes
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    problems: Problems
    prompt_lengths: list[int]  # tokens of each training problem's prompt
    components: list[Component]
    accuracy: Component  # 1.0 or 0.0 a completion
    objective: Callable[..., LossOutput]
    optimizer: Callable[..., torch.optim.Optimizer]

    def conversations(self, problems: Sequence[Problem]) -> list[Messages]:
        return [messages(problem.question, self.config.data) for problem in problems]

    def prompt_batch(self, conversations: Sequence[Messages]) -> Prompts:
        return tokenize_prompts(self.tokenizer, [render(self.tokenizer, c) for c in conversations], self.device)

    def load_policy(self) -> PreTrainedModel:
        """The model to train. What LoRA leaves as it is needs no more digits than the arithmetic has."""
        model = self.config.model
        compute = str(compute_dtype(self.config)).removeprefix("torch.")
        policy = load_model(model if model.lora is None else replace(model, dtype=compute), self.device)
        if model.lora is not None:
            add_adapter(policy, model.lora, getattr(torch, model.dtype), self.config.seed)
        if self.device.type == "mps":
            check_decoding(policy)
        return policy

    def reference(self, policy: PreTrainedModel) -> PreTrainedModel:
        """The starting model, frozen. With LoRA it shares the policy's weights, and its adapter is off or a copy."""
        reference = copy_in_dtype(policy, compute_dtype(self.config))
        lora = self.config.model.lora
        if lora is not None and lora.init_from is None:
            switch_adapter(reference, on=False)
        return reference

    def save_policy(self, policy: PreTrainedModel) -> Callable[[Path], object]:
        """What writes the trained model, or with LoRA its adapter, into a folder."""
        return policy.save_pretrained if self.config.model.lora is None else functools.partial(save_adapter, policy)

    def sampling(self, model: PreTrainedModel, **changes: Any) -> Sampling:
        """How the training samples, with these fields changed."""
        settings = {
            "max_new_tokens": self.sizes.max_completion_length,
            "temperature": self.config.rollout.temperature,
            "stop_ids": tuple(stop_token_ids(model, self.tokenizer)),
            "pad_id": self.tokenizer.pad_token_id,
            "min_new_tokens": self.config.rollout.min_new_tokens,
        }
        return Sampling(**settings | changes)

    def for_sampling(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model as it computes in training: itself, or a copy in the dtype of the arithmetic."""
        dtype = compute_dtype(self.config)
        return model if model.dtype == dtype else copy_in_dtype(model, dtype)

    def complete(
        self, model: PreTrainedModel, prompts: Prompts, sampling: Sampling, cut: Cut, *, group_size: int, step: int
    ) -> Completions:
        """`group_size` completions of each prompt, with as many tokens at once as memory has room for."""

        def sample(token_budget: int) -> Completions:
            return rollout(
                model,
                prompts,
                group_size,
                sampling,
                seed=self.config.seed,
                step=step,
                token_budget=token_budget,
                cuda_graphs=bool(self.config.hardware.cuda_graphs),
            )

        lengths, longest = prompts.mask.sum(dim=1), sampling.max_new_tokens
        times_read = 1 if is_lean(model) else group_size
        most = int(lengths.sum()) * times_read + len(lengths) * group_size * longest
        return cut.run("rollout", sample, int(lengths.max()) + longest, most)

    def cut(self, reduced: dict[str, dict[str, int]] | None = None) -> Cut:
        """How the work is cut, with what earlier lacks of memory reduced."""
        reading = self.sizes.micro_batch_tokens
        return Cut({"rollout": self.sizes.rollout_tokens, "reference": reading, "update": reading}, reduced)


@dataclass(frozen=True)
class Scored:
    """B completions as text, with what they earned."""

    texts: list[str]
    rewards: Rewards
    columns: dict[str, list]  # the problems' columns, one entry a completion
    prompts: list[Messages]  # one a completion
    messages: list[Messages]  # the completions as assistant messages
    lengths: Tensor  # (B,) int64, tokens including the end of sequence


def compute_dtype(config: Config) -> torch.dtype:
    """What the arithmetic is done in; weights and their updates keep model.dtype."""
    return getattr(torch, config.hardware.compute_dtype or config.model.dtype)


def prepare(
    config: Config, with_problems: bool = True, use: bool = True, on_hang: Callable[[str], None] = end_process
) -> Setup:
    """Find and check every part: functions, data, model, tokenizer, prompt lengths. Raises ConfigError.

    with_problems: false where there is nothing to train on or to evaluate. use: false where nothing will be computed
    on the config's device, which may not be here. on_hang: how to end the process where a reward function cannot be
    ended.
    """
    sizes = complete_sizes(config)
    component = functools.partial(
        Component,
        timeout_s=config.reward.timeout_s,
        skip_errors=config.reward.on_error == "skip",
        on_hang=on_hang,
    )
    components = [
        component(name, _reward_function(f"reward.components.{name}", node), float(node.get("weight", 1.0)))
        for name, node in config.reward.components.items()
    ]
    accuracy = component("accuracy", _reward_function("eval.accuracy", config.eval.accuracy))
    objective, optimizer = bind_objective(config), bind("optimizer", config.optimizer)
    _check_optimizer(optimizer)
    problems = bind("data", config.data, without=DATA_KEYS)() if with_problems else Problems([], [])
    check_model(config.model)
    if config.model.lora is not None:
        check_adapter(config.model.lora)
    tokenizer = load_tokenizer(config.model)
    lengths = prompt_lengths(tokenizer, problems.train + problems.test, config.data) if with_problems else []
    if with_problems:
        _check_window(config, sizes, lengths[: len(problems.train)], lengths[len(problems.train) :])
    device = use_hardware(config) if use else torch.device("cpu")
    if device.type == "mps":
        check_device(device)
    lengths = lengths[: len(problems.train)]
    return Setup(config, sizes, device, tokenizer, problems, lengths, components, accuracy, objective, optimizer)


def bind_objective(config: Config) -> Callable[..., LossOutput]:
    """The objective, with grpo.beta and grpo.epsilon for its own where those are null."""
    own = {"beta": kl_weight(config), "epsilon": config.grpo.epsilon}
    node = {key: own[key] if value is None and key in own else value for key, value in config.objective.items()}
    return bind("objective", node)


def _reward_function(key: str, node: Mapping[str, Any]) -> Callable[..., list[float | None]]:
    """A reward function in TRL's form; of a class, one object built with the node's settings. Raises ConfigError."""
    build = bind(key, node, without=("weight",))
    if not inspect.isclass(build.func):
        return bind_reward(key, node)
    try:
        scorer = build()
    except Exception as error:
        raise ConfigError(f"{key}: {node['_target_']}() raised {type(error).__name__}: {first_line(error)}") from error
    check_reward_form(key, scorer, f"{node['_target_']}: the objects of a class must be callable, in")
    return scorer


def _check_window(config: Config, sizes: Sizes, train: list[int], test: list[int]) -> None:
    """Compare the longest prompts, in tokens, and their completions with the positions that the model declares.

    Raises ConfigError where it has no more: learned positions end there. Rotary positions (RoPE) go further, as
    transformers' generate() lets them, with answers that may be poor: a warning.
    """
    text = architecture(config.model.name, config.model.trust_remote_code).get_text_config(decoder=True)
    window, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None)
    if window is None:
        return
    if rope and rope.get("original_max_position_embeddings"):  # YaRN's models declare the window before it
        window = max(window, int(rope["original_max_position_embeddings"] * rope.get("factor", 1)))
    test, evaluated = test[: config.eval.max_problems], config.eval.max_completion_length
    cases = [("grpo.max_completion_length", sizes.max_completion_length, train if evaluated else train + test)]
    if evaluated:
        cases.append(("eval.max_completion_length", evaluated, test))
    for key, completion, lengths in cases:
        prompt = max(lengths, default=0)
        if prompt + completion <= window:
            continue
        fix = f"lower it to {window - prompt}" if prompt < window else "shorten the prompts"
        said = (
            f"{key}={completion}: with the longest prompt ({prompt} tokens) that is {prompt + completion} tokens, and "
            f"model.name={config.model.name} is for {window}; {fix}, or choose another model"
        )
        if not rope:
            raise ConfigError(said)
        logger.warning("%s (its positions can be extended, but its answers may become poor)", said)


def _check_optimizer(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    try:
        optimizer([("weight", torch.nn.Parameter(torch.zeros(2, 2)))])
    except AttributeError as error:
        raise ConfigError(f"optimizer: it must take pairs of name and parameter, and fails with: {error}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        fix = f"; leave it out with ~optimizer.{unknown[1]}" if unknown else ""
        raise ConfigError(f"optimizer: {error}{fix}") from error


def score_completions(setup: Setup, problems: Sequence[Problem], completions: Completions) -> Scored:
    """Decode completions, `completions.group` naming the problem of each, and score them with every component."""
    lengths = completions.lengths.cpu()
    ids = completions.ids.cpu()
    texts = setup.tokenizer.batch_decode(
        [row[:length] for row, length in zip(ids, lengths.tolist(), strict=True)], skip_special_tokens=True
    )
    of_row = [problems[group] for group in completions.group.tolist()]
    prompts = setup.conversations(of_row)
    replies = [[{"role": "assistant", "content": text}] for text in texts]
    names = {name for problem in of_row for name in problem.columns}
    columns = {name: [problem.columns.get(name) for problem in of_row] for name in sorted(names)}
    for name in ("id", "question", "answer"):
        columns[name] = [getattr(problem, name) for problem in of_row]
    columns |= completions.columns
    columns["completion_ids"] = [row[:length].tolist() for row, length in zip(ids, lengths.tolist(), strict=True)]
    return Scored(texts, score(setup.components, prompts, replies, columns), columns, prompts, replies, lengths)
