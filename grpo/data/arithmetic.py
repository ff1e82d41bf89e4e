"""The embedded data set: two-digit additions as short questions, generated and always the same."""

import hashlib
import itertools

SPLITS = ("demonstrations", "train", "test")
PHRASINGS = (
    "What is {a} + {b}?",
    "How much is {a} + {b}?",
    "Compute {a} + {b}.",
    "{a} + {b} = ?",
    "Ann has {a} apples and buys {b} more. How many now?",
    "Tom ran {a} km, then {b} km. How far in all?",
)


MOST = {"demonstrations": 6000, "train": 2000, "test": 500}  # problems of a split, of more than two digits


def problems(split: str, digits: int = 2) -> list[dict]:
    """The problems of one split, each {"id": "37+48", "question": str, "answer": "85"}, in a fixed shuffled order.

    The embedded model was trained on "demonstrations" (about 5,600 problems); "train" (about 2,000) is for
    reinforcement learning and "test" (about 500) for evaluation. 37+48 and 48+37 are two problems of the same split.
    digits: of both numbers; all pairs of one or two digits are used, and of more digits as many as with two. Raises
    ValueError for any other split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    if digits > 2:
        return [_problem(a, b) for a, b in _some_pairs(split, digits)]
    numbers = range(10 ** (digits - 1), 10**digits)
    pairs = [(a, b) for a in numbers for b in numbers if _split_of(a, b) == split]
    # Shuffled, so that the first n problems of a split are a representative sample of it.
    pairs.sort(key=lambda pair: _stable_hash(f"order {pair}"))
    return [_problem(a, b) for a, b in pairs]


def _some_pairs(split: str, digits: int) -> list[tuple[int, int]]:
    """Different pairs of numbers of a split, evenly distributed."""
    least = 10 ** (digits - 1)
    pairs: dict[tuple[int, int], None] = {}
    for number in itertools.count():
        a, b = (least + _stable_hash(f"{digits} digits {number} {which}") % (9 * least) for which in "ab")
        if _split_of(a, b) == split:
            pairs[a, b] = None
            if len(pairs) == MOST[split]:
                return list(pairs)
    raise AssertionError  # the loop does not end otherwise


def _split_of(a: int, b: int) -> str:
    """The split of a + b, the same as that of b + a, so that training never shows the sum of a test problem."""
    sixteenth = _stable_hash(f"split {min(a, b)} {max(a, b)}") % 16
    if sixteenth == 0:
        return "test"
    return "train" if sixteenth <= 4 else "demonstrations"


def _problem(a: int, b: int) -> dict:
    phrasing = PHRASINGS[_stable_hash(f"phrasing {a} {b}") % len(PHRASINGS)]
    return {"id": f"{a}+{b}", "question": phrasing.format(a=a, b=b), "answer": str(a + b)}


def _stable_hash(text: str) -> int:
    """A hash that is equal in every process and on every machine, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
