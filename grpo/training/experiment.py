"""The parts of a run, built from its config. Everything that can be checked is checked before any weight is loaded."""

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

from grpo.algorithm.objective import ObjectiveFunction, choose
from grpo.algorithm.optimizer import exempt_vectors
from grpo.batch import Completions, Prompts, tokenize_prompts
from grpo.config.checks import Sizes, complete_sizes
from grpo.config.errors import ConfigError
from grpo.config.instantiate import bind, bind_reward, build, check_call, find_function
from grpo.config.migrations import NATIVE_ENGINE
from grpo.config.objective_checks import kl_weight
from grpo.config.schema import Config, known_keys
from grpo.data.mixture import bind_data, paths_of
from grpo.data.problems import Problem, Problems
from grpo.data.prompts import (
    Messages,
    check_template_arguments,
    messages,
    render,
    template_arguments,
    turn_tokens,
)
from grpo.data.splits import check_columns, with_validation
from grpo.model.hardware import use_hardware
from grpo.model.loading import (
    architecture,
    check_model,
    copy_in_dtype,
    load_model,
    load_tokenizer,
    prepare_hub,
    save_model,
    stop_token_ids,
    vocabulary_size,
)
from grpo.model.lora import add_adapter, check_adapter, save_adapter, switch_adapter
from grpo.rewards.isolated import RewardProcess, isolated_functions
from grpo.rewards.scoring import RewardComponent, accepted, settings_of
from grpo.rewards.time_limit import end_process
from grpo.rollout.engine import Compute, RolloutEngine, Sampling
from grpo.rollout.load_check import choose_implementation
from grpo.rollout.mps_check import check_device
from grpo.training.prompt_lengths import PromptLengths, prompt_lengths

logger = logging.getLogger(__name__)
PROBLEM_FIELDS = ("id", "question", "answer")  # fields of a problem that are passed to reward functions
RUN_ARGUMENTS = ("completion_ids", "trainer_state", "prompts", "completions")  # beside them and the columns


@dataclass(frozen=True)
class Experiment:
    """The parts of a run according to its config, except for the weights."""

    config: Config
    sizes: Sizes
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    problems: Problems
    all_lengths: PromptLengths  # of the training problems, then of those that are evaluated
    max_length: int | None  # maximum tokens of a prompt with its completion; None without problems
    components: list[RewardComponent]
    accuracy: RewardComponent  # 1.0 or 0.0 for each completion
    graders: list[RewardComponent]  # the same, reported beside the accuracy
    advantage: Callable[[Tensor, Tensor, Tensor], Tensor]  # its arguments: grpo.algorithm.objective.ARGUMENTS
    objective: ObjectiveFunction
    optimizer: Callable[..., torch.optim.Optimizer]
    engine: Callable[..., RolloutEngine]

    @functools.cached_property
    def column_names(self) -> list[str]:
        """`Problems.column_names`, computed once."""
        return self.problems.column_names

    @property
    def prompt_lengths(self) -> list[int]:
        """The number of tokens of each training problem's prompt."""
        return self.all_lengths.tokens[: len(self.problems.train)]

    def conversations(self, problems: Sequence[Problem]) -> list[Messages]:
        """The chat messages of each problem."""
        return [messages(problem.question, self.config.data, problem.turns) for problem in problems]

    def prompts(self, conversations: Sequence[Messages]) -> Prompts:
        """The conversations as one batch of tokens."""
        arguments = template_arguments(self.config.data)
        texts = [render(self.tokenizer, conversation, arguments) for conversation in conversations]
        return tokenize_prompts(self.tokenizer, texts, self.device)

    def texts(self, completions: Completions, stop_ids: Sequence[int]) -> list[str]:
        """The B completions as text, without stop tokens, those of the chat template, and those for bos, pad and so on.

        Other special tokens are kept, since they may be the tags that are rewarded.
        """
        rows = zip(completions.ids.tolist(), completions.lengths.tolist(), strict=True)
        return self.decode([ids[:length] for ids, length in rows], stop_ids)

    def decode(self, rows: Sequence[Sequence[int]], stop_ids: Sequence[int]) -> list[str]:
        """Rows of token ids as text, without the tokens that `texts` leaves out."""
        tokenizer = self.tokenizer
        of_template = turn_tokens(tokenizer, template_arguments(self.config.data)).special
        named = (getattr(tokenizer, f"{name}_id") for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES)
        left_out = {*stop_ids, *of_template, *named}
        return tokenizer.batch_decode([[id for id in ids if id not in left_out] for ids in rows])

    def load_policy(self) -> PreTrainedModel:
        """Load the model to train. With LoRA the frozen weights need no higher precision than the compute dtype."""
        model = self.config.model
        compute = str(compute_dtype(self.config)).removeprefix("torch.")
        stored = model if model.lora is None else replace(model, dtype=compute)
        policy = load_model(stored, self.device)
        if model.lora is not None:
            add_adapter(policy, model.lora, getattr(torch, model.dtype), self.config.seed)
        compiled = bool(self.config.hardware.compiled_decoding)
        choose_implementation(policy, self.max_length, compute_dtype(self.config), compiled)
        return policy

    def reference(self, policy: PreTrainedModel) -> PreTrainedModel:
        """The starting policy, frozen. With LoRA only its adapter is copied, or off; the other weights are shared."""
        reference = copy_in_dtype(policy, compute_dtype(self.config))
        lora = self.config.model.lora
        if lora is not None and lora.init_from is None:
            switch_adapter(reference, on=False)
        return reference

    def save_policy(self, policy: PreTrainedModel) -> Callable[[Path], object]:
        """The function that writes the trained model, or with LoRA its adapter, into a folder."""
        if self.config.model.lora is not None:
            return functools.partial(save_adapter, policy)
        return functools.partial(save_model, policy, self.sampling(policy).stop_ids)

    def sampling(self, model: PreTrainedModel, **changes: Any) -> Sampling:
        """The sampling parameters of training, with these fields changed."""
        settings = {
            "max_new_tokens": self.sizes.max_completion_length,
            "temperature": self.config.rollout["temperature"],
            "stop_ids": tuple(stop_token_ids(model, self.tokenizer, template_arguments(self.config.data))),
            "pad_id": self.tokenizer.pad_token_id,
            "min_new_tokens": self.config.rollout["min_new_tokens"],
        }
        return Sampling(**settings | changes)

    def in_compute_dtype(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model in the compute dtype, as in training: the model itself or a copy."""
        dtype = compute_dtype(self.config)
        return model if model.dtype == dtype else copy_in_dtype(model, dtype)

    def build_optimizer(self, policy: PreTrainedModel) -> torch.optim.Optimizer:
        """Build the optimizer of a model's trained parameters."""
        trained = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
        optimizer = self.optimizer(trained)
        if not self.config.grpo.decay_biases_and_norms:
            exempt_vectors(optimizer)
        return optimizer

    def build_engine(self, policy: PreTrainedModel) -> RolloutEngine:
        """Build the rollout engine that samples from a model."""
        compute = Compute(self.device, self.sizes.rollout_tokens)
        return self.engine(policy=policy, tokenizer=self.tokenizer, compute=compute)


def compute_dtype(config: Config) -> torch.dtype:
    """The dtype of forward and backward passes; trained weights and their updates keep model.dtype."""
    return getattr(torch, config.hardware.compute_dtype or config.model.dtype)


def build_experiment(
    config: Config,
    with_problems: bool = True,
    use: bool = True,
    on_hang: Callable[[str], None] = end_process,
    status_file: Path | None = None,
) -> Experiment:
    """Find and check every part: functions, data, model, tokenizer, prompt lengths. Raises ConfigError.

    with_problems: False if no problems are needed, neither for training nor for evaluation. use: False if nothing will
    be computed on the config's device, which may not exist here. on_hang: ends the process if a reward function cannot
    be interrupted. status_file: status.json of the run, for the error if the process has to be killed for that.
    """
    sizes = complete_sizes(config)
    prepare_hub(config.model.name, *(paths_of(config.data) if with_problems else ()))
    components, accuracy, graders = bind_rewards(config, on_hang, status_file)
    advantage = choose("advantage", config.objective["advantage"])
    objective = build_objective(config)
    optimizer = bind("optimizer", config.optimizer)
    _check_optimizer(optimizer)
    engine = bind_engine(config.rollout)
    load_problems = bind_data(config.data)
    problems = Problems([], [])
    if with_problems:
        problems = with_validation(load_problems(), config.data["validation_share"])
        check_columns(problems, config.eval.by)
    check_model(config.model)
    if config.model.lora is not None:
        check_adapter(config.model.lora)
    tokenizer = load_tokenizer(config.model)
    _check_template(tokenizer, config.data)
    known = vocabulary_size(architecture(config.model.name, config.model.trust_remote_code))
    lengths = PromptLengths([])
    max_length = config.data["max_prompt_length"] + sizes.max_completion_length
    if with_problems:
        held_out = problems.validation[: config.eval.max_problems] + problems.test[: config.eval.max_problems]
        lengths = prompt_lengths(tokenizer, problems.train + held_out, config.data, known)
        max_length = _check_window(config, sizes, lengths.tokens, len(problems.train))
    device = use_hardware(config) if use else torch.device("cpu")
    if device.type == "mps":
        check_device(device)
    experiment = Experiment(
        config=config,
        sizes=sizes,
        device=device,
        tokenizer=tokenizer,
        problems=problems,
        all_lengths=lengths,
        max_length=max_length,
        components=components,
        accuracy=accuracy,
        graders=graders,
        advantage=advantage,
        objective=objective,
        optimizer=optimizer,
        engine=engine,
    )
    if with_problems:
        _check_arguments(experiment)
    return experiment


def bind_rewards(
    config: Config, on_hang: Callable[[str], None] = end_process, status_file: Path | None = None
) -> tuple[list[RewardComponent], RewardComponent, list[RewardComponent]]:
    """The reward components, and the accuracy and the graders of the evaluation."""
    component = functools.partial(
        RewardComponent,
        timeout_s=config.reward.timeout_s,
        skip_errors=config.reward.on_error == "skip",
        on_hang=on_hang,
        status_file=status_file,
    )
    isolated = isolated_functions(config)
    process = RewardProcess()

    def function(key: str, node: Mapping[str, Any]) -> Callable[..., Any]:
        return process.bind(key, node) if key in isolated else bind_reward(key, node)

    components = [
        component(name, function(f"reward.components.{name}", node), float(node.get("weight", 1.0)))
        for name, node in config.reward.components.items()
    ]
    graders = [component(name, function(f"eval.graders.{name}", node)) for name, node in config.eval.graders.items()]
    return components, component("accuracy", function("eval.accuracy", config.eval.accuracy)), graders


def _check_arguments(experiment: Experiment) -> None:
    """Raise ConfigError if a reward function needs an argument that it will not get; warn if it will not get a column.

    An engine other than the suite's may add columns, so that the arguments are not known here.
    """
    for name in experiment.column_names:
        if name in RUN_ARGUMENTS:
            has = "has the name of an argument that reward functions get from the run"
            raise ConfigError(f"data: the column '{name}' {has}; rename it")
    names = [*experiment.column_names, *PROBLEM_FIELDS, *RUN_ARGUMENTS]
    keys = {f"reward.components.{each.name}": each for each in experiment.components}
    keys |= {"eval.accuracy": experiment.accuracy}
    keys |= {f"eval.graders.{each.name}": each for each in experiment.graders}
    for key, component in keys.items():
        given = accepted(component.function, names)
        if experiment.config.rollout["_target_"] == NATIVE_ENGINE:
            form = f"it gets only {', '.join(names)}"
            check_call(key, component.function, form, **dict.fromkeys(given, ""))
        for name in settings_of(component.function).keys() & set(names):
            logger.warning("%s.%s is a setting, so the function does not get the data's column of this name", key, name)


def bind_engine(rollout: Mapping[str, Any]) -> Callable[..., RolloutEngine]:
    """The function that builds the rollout engine. Raises ConfigError if it does not have the required form."""
    engine = bind("rollout", rollout, without=known_keys("rollout"))
    form = "it must be a class of the form RolloutEngine, built with policy, tokenizer and compute"
    check_call(f"rollout._target_={rollout['_target_']}", engine, form, policy="", tokenizer="", compute="")
    return engine


def build_objective(config: Config) -> ObjectiveFunction:
    """The objective; its numbers that are null are taken from grpo.beta and grpo.epsilon. Raises ConfigError.

    A user-defined function gets its own settings, and those of the suite's objective that it has parameters for.
    """
    followed = {"beta": kl_weight(config), "epsilon_low": config.grpo.epsilon, "epsilon_high": config.grpo.epsilon}
    node = {name: followed.get(name) if value is None else value for name, value in config.objective.items()}
    key = f"objective._target_={node.get('_target_')}"
    function = find_function("objective._target_", node.get("_target_"))
    try:
        taken = inspect.signature(function).parameters.keys()
    except ValueError as error:  # a builtin
        raise ConfigError(f"{key}: {error}") from error
    objective = build("objective", node, without=tuple(set(known_keys("objective")) - taken))
    form = "it must have the form f(inputs: LossInputs, counts: Counts, **numbers) -> LossOutput"
    check_call(key, objective, form, "inputs", "counts")
    return objective


def _check_window(config: Config, sizes: Sizes, lengths: list[int], num_train: int) -> int:
    """Check that the longest prompts, in tokens, and their completions fit into the positions that the model declares.

    lengths: of the prompts to train on, `num_train`, then of those to evaluate. Returns the maximum tokens of a prompt
    with its completion. Raises ConfigError for learned positions, which end there, and for rotary positions (RoPE)
    whose frequencies change there for all tokens. Other rotary positions can go further, which transformers' generate()
    allows, but the answers may be poor: only a warning is logged.
    """
    text = architecture(config.model.name, config.model.trust_remote_code).get_text_config(decoder=True)
    window = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None)
    train, held_out = lengths[:num_train], lengths[num_train:]
    evaluated = config.eval.max_completion_length
    cases = [("grpo.max_completion_length", sizes.max_completion_length, train if evaluated else train + held_out)]
    if evaluated:
        cases.append(("eval.max_completion_length", evaluated, held_out))
    longest = max(completion + max(lengths, default=0) for _, completion, lengths in cases)
    if window is None:
        return longest
    rescaled = _rescaled_from(rope or {}, window)
    if rope and rope.get("original_max_position_embeddings"):  # YaRN models declare the window before its extension
        window = max(window, int(rope["original_max_position_embeddings"] * rope.get("factor", 1)))
    for key, completion, lengths in cases:
        prompt = max(lengths, default=0)
        if rescaled is not None and prompt + completion > rescaled:
            raise ConfigError(
                f"{key}={completion}: with the longest prompt ({prompt} tokens) that is {prompt + completion} tokens, "
                f"and beyond {rescaled} model.name={config.model.name} changes the positions of all tokens, so "
                "that log-probabilities would depend on the rest of the batch; stay below, or choose another model"
            )
        if prompt + completion <= window:
            continue
        fix = f"lower it to {window - prompt}" if prompt < window else "shorten the prompts"
        message = (
            f"{key}={completion}: with the longest prompt ({prompt} tokens) that is {prompt + completion} tokens, and "
            f"model.name={config.model.name} is for {window}; {fix}, or choose another model"
        )
        if not rope:
            raise ConfigError(message)
        logger.warning("%s (its positions can be extended, but its answers may become poor)", message)
    return longest


def _rescaled_from(rope: Mapping[str, Any], window: int) -> int | None:
    """The number of tokens beyond which rotary frequencies depend on the length of the sequence; None if they do not.

    rope: `rope_parameters` of a config, for all layers or by the type of layer. window: `max_position_embeddings`.
    """
    limits = []
    for each in [value for value in rope.values() if isinstance(value, Mapping)] or [rope]:
        kind = each.get("rope_type", "")
        if "dynamic" in kind:
            limits.append(window)
        elif kind == "longrope":
            limits.append(each["original_max_position_embeddings"])
    return min(limits, default=None)


def _check_template(tokenizer: PreTrainedTokenizerBase, data: Mapping[str, Any]) -> None:
    """Check the chat template with the system prompt, examples and arguments of the config. Raises ConfigError.

    Logs a warning if completions may not end with the turn.
    """
    arguments = template_arguments(data)
    check_template_arguments(tokenizer, arguments)
    render(tokenizer, messages("question", data), arguments)
    turn = turn_tokens(tokenizer, arguments)
    if turn.closing_text and turn.closing is None:
        logger.warning(
            "the model's chat template closes an answer with %r, which does not begin with a special token: "
            "completions end only at %s, and are truncated if the model does not write it",
            turn.closing_text[:40],
            tokenizer.eos_token,
        )


def _check_optimizer(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    try:
        optimizer([("weight", torch.nn.Parameter(torch.zeros(2, 2)))])
    except AttributeError as error:
        raise ConfigError(f"optimizer: it must take pairs of name and parameter, and fails with: {error}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        fix = f"; leave it out with ~optimizer.{unknown[1]}" if unknown else ""
        raise ConfigError(f"optimizer: {error}{fix}") from error
