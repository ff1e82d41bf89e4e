"""The overrides of a command line, parsed with Hydra's parser. No other module parses overrides."""

from collections.abc import Container, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString

from grpo.config.values import escape


class Overrides:
    """A list of overrides in order, each with its key and the text of its value.

    Keys have no prefix and no value: `grpo.beta` for `++grpo.beta=0`, `~grpo.beta` and `grpo.beta=0,1`;
    `hydra/launcher` for `hydra/launcher=basic`. Raises HydraException for an override that Hydra's parser rejects.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = list(lines)

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    @cached_property
    def parsed(self) -> list[Override]:
        """Each override as the object that Hydra's parser returns."""
        return OverridesParser.create().parse_overrides(self.lines)

    @cached_property
    def keys(self) -> list[str]:
        """The key of each override, in order, with repetitions."""
        return [each.key_or_group for each in self.parsed]

    @property
    def dotted_keys(self) -> list[str]:
        """The keys, where each group is written as a path in the config: `hydra.launcher` for `hydra/launcher`."""
        return [key.replace("/", ".") for key in self.keys]

    @property
    def swept(self) -> list[str]:
        """The keys with several values, without repetitions."""
        return list(dict.fromkeys(key for key, each in self._pairs() if each.is_sweep_override()))

    @property
    def last_by_key(self) -> dict[str, str]:
        """The last override of each key, which is the one that takes effect."""
        return dict(zip(self.keys, self.lines, strict=True))

    @property
    def texts(self) -> dict[str, str]:
        """The last value of each key as text, as it was typed."""
        return {key: text_of(line) for key, line in self.last_by_key.items()}

    def value(self, key: str) -> Any:
        """The last value given to a key; None if there is none."""
        given = [each for name, each in self._pairs() if name == key]
        return given[-1].value() if given else None

    def names(self, *keys: str) -> bool:
        """Whether an override sets one of these keys or groups, or a key below one of them."""
        return any(name == key or name.startswith(f"{key}.") for name in self.keys for key in keys)

    def select(self, keys: Container[str]) -> "Overrides":
        """The overrides of these keys."""
        return Overrides([line for key, line in zip(self.keys, self.lines, strict=True) if key in keys])

    def without(self, keys: Container[str]) -> "Overrides":
        """The overrides of all other keys."""
        return Overrides([line for key, line in zip(self.keys, self.lines, strict=True) if key not in keys])

    @property
    def of_hydra(self) -> "Overrides":
        """The overrides of Hydra's own settings."""
        return Overrides([line for line, each in self._lines() if each.is_hydra_override()])

    @property
    def of_experiment(self) -> "Overrides":
        """All overrides except those of Hydra's own settings."""
        return Overrides([line for line, each in self._lines() if not each.is_hydra_override()])

    def expand(self, points: Sequence[Sequence[str]]) -> "Overrides":
        """Replace the values of each swept key by the list of the values that it has in these points, in their order.

        In this way a range or shuffle is evaluated only once.
        """
        values: dict[str, dict[str, None]] = {}
        for point in points:
            for key, line in zip(Overrides(point).keys, point, strict=True):
                values.setdefault(key, {})[text_of(line)] = None
        return self.with_texts({key: ",".join(texts) for key, texts in values.items() if len(texts) > 1})

    def with_texts(self, texts: Mapping[str, str]) -> "Overrides":
        """Replace the values of the keys in `texts`, given as they would be typed."""
        lines = zip(self.keys, self.lines, strict=True)
        return Overrides([f"{line.partition('=')[0]}={texts[key]}" if key in texts else line for key, line in lines])

    def continued_by(self, new: "Overrides") -> "Overrides":
        """These overrides in their order with the values of `new`, followed by those whose keys only `new` has.

        The order matters, since it determines the numbers of a sweep's jobs, and since a later override can replace an
        earlier one. If `new` chooses another option of a group, overrides of keys below that group are dropped.
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
    """Quote text as the value of an override, so that Hydra takes all its characters literally."""
    return QuotedString(escape(text), Quote.single).with_quotes()
