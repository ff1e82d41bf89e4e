"""The overrides of a command line, read as Hydra reads them. Nothing else here understands `key=value`."""

import re
import shlex
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString

from grpo.config.values import escape


class Overrides:
    """A list of overrides in their order, each with its key and the text of its value.

    Keys are without what stands around them: `grpo.beta` of `++grpo.beta=0`, `~grpo.beta` and `grpo.beta=0,1`;
    `hydra/launcher` of `hydra/launcher=basic`. Raises HydraException for what Hydra's parser refuses.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = list(lines)

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    @cached_property
    def parsed(self) -> list[Override]:
        """Each override as Hydra's parser gives it."""
        return OverridesParser.create().parse_overrides(self.lines)

    @cached_property
    def keys(self) -> list[str]:
        """The key of each override, in order, with repetitions."""
        return [each.key_or_group for each in self.parsed]

    @property
    def dotted_keys(self) -> list[str]:
        """The same with the groups as the parts of the config that they fill: `hydra.launcher`."""
        return [key.replace("/", ".") for key in self.keys]

    @property
    def swept(self) -> list[str]:
        """The keys that are given several values, each once."""
        return list(dict.fromkeys(key for key, each in self._pairs() if each.is_sweep_override()))

    @property
    def last_by_key(self) -> dict[str, str]:
        """Of each key its last override, which is the one that counts."""
        return dict(zip(self.keys, self.lines, strict=True))

    @property
    def texts(self) -> dict[str, str]:
        """Of each key the text of its last value, as it was typed."""
        return {key: text_of(line) for key, line in self.last_by_key.items()}

    def value(self, key: str) -> Any:
        """The last value given to a key, None where there is none."""
        given = [each for name, each in self._pairs() if name == key]
        return given[-1].value() if given else None

    def names(self, *keys: str) -> bool:
        """Whether one of these keys or groups, or a key below one of them, is named."""
        return any(name == key or name.startswith(f"{key}.") for name in self.keys for key in keys)

    def select(self, keys: Container[str]) -> "Overrides":
        """Those of these keys."""
        return Overrides([line for key, line in zip(self.keys, self.lines, strict=True) if key in keys])

    def without(self, keys: Container[str]) -> "Overrides":
        """Those of other keys than these."""
        return Overrides([line for key, line in zip(self.keys, self.lines, strict=True) if key not in keys])

    @property
    def of_hydra(self) -> "Overrides":
        """Those of Hydra's own settings."""
        return Overrides([line for line, each in self._lines() if each.is_hydra_override()])

    @property
    def of_experiment(self) -> "Overrides":
        """All others."""
        return Overrides([line for line, each in self._lines() if not each.is_hydra_override()])

    def expand(self, points: Sequence[Sequence[str]]) -> "Overrides":
        """The same with each swept key as a plain list of the values that it has in these points, in their order.

        A range or a shuffle is so given its values once.
        """
        values: dict[str, dict[str, None]] = {}
        for point in points:
            for key, line in zip(Overrides(point).keys, point, strict=True):
                values.setdefault(key, {})[text_of(line)] = None
        return self.with_texts({key: ",".join(texts) for key, texts in values.items() if len(texts) > 1})

    def with_texts(self, texts: Mapping[str, str]) -> "Overrides":
        """The same with other values of these keys, as they would be typed."""
        lines = zip(self.keys, self.lines, strict=True)
        return Overrides([f"{line.partition('=')[0]}={texts[key]}" if key in texts else line for key, line in lines])

    def continued_by(self, new: "Overrides") -> "Overrides":
        """These in their order with the values of `new`, and then what only `new` names.

        The order numbers the jobs of a sweep, and says what an override changes that comes after another. Another
        choice of a group discards what these say of keys below it.
        """
        latest = new.last_by_key
        regrouped = tuple(f"{key}." for key, line in latest.items() if line not in self.lines)
        kept = [
            latest.get(key, line)
            for key, line in zip(self.keys, self.lines, strict=True)
            if key in latest or not key.startswith(regrouped)
        ]
        known = set(Overrides(kept).keys)
        return Overrides([*kept, *new.without(known)])

    def _lines(self) -> Iterator[tuple[str, Override]]:
        return zip(self.lines, self.parsed, strict=True)

    def _pairs(self) -> Iterator[tuple[str, Override]]:
        return zip(self.keys, self.parsed, strict=True)


def text_of(line: str) -> str:
    """The value of one override as it was typed."""
    return line.partition("=")[2]


def quoted(text: str) -> str:
    """Text as the value of an override, taken literally whatever characters are in it."""
    return QuotedString(escape(text), Quote.single).with_quotes()


def typed_in_shell(key: str, text: object) -> str:
    """An override as it is typed in a shell, its value taken literally by that and by Hydra; plain where it can be."""
    plain = f"{key}={text}"
    if not re.fullmatch(r"[A-Za-z0-9_./-]+", str(text)) or Overrides([plain]).value(key.lstrip("+")) != str(text):
        plain = f"{key}={quoted(str(text))}"  # also of what Hydra would read as a number, true or null
    return shlex.quote(plain)
