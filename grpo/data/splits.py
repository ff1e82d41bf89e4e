"""The splits of a data set: problems to train on, to choose by (validation), and for the result (test)."""

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from grpo.config.errors import ConfigError
from grpo.config.schema import Config, known_keys
from grpo.data.problems import Problems

logger = logging.getLogger(__name__)


def with_validation(problems: Problems, share: float) -> Problems:
    """Move a share of the training problems, about that many, to the validation problems.

    A problem is chosen by a hash of its family, or else of its question, so it does not depend on other problems, on a
    seed or on the config, and equal questions stay in one split.
    A data set with validation problems of its own stays as it is. With a share of 0 there are none. Raises ConfigError
    if no training problem is left.
    """
    if share == 0:
        return replace(problems, validation=[])
    if problems.validation:
        return problems
    chosen = [_uniform(problem.family or problem.question) < share for problem in problems.train]
    train = [problem for problem, is_chosen in zip(problems.train, chosen, strict=True) if not is_chosen]
    validation = [problem for problem, is_chosen in zip(problems.train, chosen, strict=True) if is_chosen]
    if not train:
        count = len(validation)
        raise ConfigError(
            f"data.validation_share={share} leaves none of {count} training problems to train on; lower it"
        )
    return Problems(train, problems.test, validation)


def is_same_data(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two values of the config's group data name the same data set, even if they name it differently.

    A folder is the same data for the loaders of `grpo.data.problems`. For another loader all of its settings count.
    """
    first, second = (each.get("path") for each in (one, other))
    of_suite = all(each["_target_"].startswith("grpo.data.problems.") for each in (one, other))
    if of_suite and first and second and os.path.exists(first) and os.path.exists(second):
        return os.path.samefile(first, second)
    return _settings(one) == _settings(other)


def check_columns(problems: Problems, columns: Sequence[str]) -> None:
    """Raise ConfigError if an evaluated problem has none of the columns of eval.by."""
    known = {name for problem in problems.test + problems.validation for name in problem.columns}
    for column in columns:
        if column not in known:
            has = f"it has {', '.join(sorted(known))}" if known else "it has none besides question and answer"
            raise ConfigError(f"eval.by: the data has no column {column}; {has}")


def check_splits(problems: Problems, config: Config) -> None:
    """Raise ConfigError if a split that is evaluated in training has no problems."""
    chooses_by_test = config.eval.every and not problems.validation
    if not problems.test and (config.eval.before or config.eval.after or chooses_by_test):
        raise ConfigError(
            "data has no test problems: set eval.before=false eval.after=false eval.every=0, or add a test.jsonl"
        )
    share = config.data["validation_share"]
    if config.eval.every and share > 0 and not problems.validation:
        count = len(problems.train)
        raise ConfigError(
            f"eval.every={config.eval.every} needs validation problems, and data.validation_share={share} gives none "
            f"of {count} training problems; raise it, or set eval.every=0"
        )
    if config.eval.after and share > 0 and not problems.validation:
        logger.warning(
            "data.validation_share=%s gives no validation problems of %d training problems, so a sweep would choose by "
            "the test problems; raise it",
            share,
            len(problems.train),
        )


def _settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """The loader and its settings."""
    of_loader = {key: value for key, value in data.items() if key not in known_keys("data")}
    return of_loader | ({"parts": data["parts"]} if data.get("parts") else {})


def _uniform(name: str) -> float:
    """A number in [0, 1) that depends only on the name, evenly distributed over names."""
    return int.from_bytes(hashlib.sha256(f"validation {name}".encode()).digest()[:6], "big") / 2**48
