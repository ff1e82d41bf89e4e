"""Thirty ways in which people and models write a whole number as an answer, several phrasings each.

`python -m tests.rewards.renderings` prints the table of docs/grading.md: the share of the answers of GSM8K's test
problems that are rewarded in each of them.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from grpo.rewards.math_xml import accuracy
from grpo.rewards.words import spell

ANSWERS = [int(line) for line in Path(__file__).with_name("gsm8k_test_answers.txt").read_text().split()]


def sign(n: int) -> str:
    return "-" if n < 0 else ""


def grouped(n: int, separator: str) -> str:
    return f"{n:,}".replace(",", separator)


def scientific(n: int, times: str, power: str = "") -> str:
    digits = str(abs(n))
    mantissa = f"{digits[0]}.{digits[1:] or '0'}"
    exponent = str(len(digits) - 1)
    return f"{sign(n)}{mantissa}{times}{power.format(exponent) if power else exponent}"


def in_words(n: int, *, with_and: bool = False) -> str:
    """For example one hundred (and) twenty-five; a negative number is written in digits."""
    if n < 0:
        return str(n)
    words = spell(n)
    text = " ".join(words)
    for tens in ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"):
        for unit in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"):
            text = text.replace(f"{tens} {unit}", f"{tens}-{unit}")
    if with_and:
        head, hundred, tail = text.rpartition(" hundred ")
        text = f"{head} hundred and {tail}" if hundred and "thousand" not in tail else text
    return text


def parts(n: int) -> tuple[int, int]:
    """Two whole numbers with the sum n."""
    return n - n // 3, n // 3


# A list of phrasings for each name. {n}: the number, {c}: with commas, {s}: its sign, {m}: without the sign and with
# commas, {a} and {b}: two numbers with the sum n, {d}: twice the number, {w}: in words.
TEMPLATES: dict[str, list[str]] = {
    "a unit": [
        "{n} dollars",
        "{n} blueberry muffins per day",
        "{n} years old",
        "{c} inches of ribbon",
        "{n} more than Bob",
        "{n} eggs left.",
        "{n} hours a day",
        "{n} dozen",
        "{n} pairs of shoes",
    ],
    "a short unit": ["{n} kg", "{n}kg", "{n}cm", "{n} ft", "{n} mph", "{n}h", "{n} lbs.", "{n} ml", "{n} min", "{n}°C"],
    "powers and quotients of units": [
        "{n} cm^2",
        "{n} m²",
        "{n} square feet",
        "{n} sq. ft.",
        r"{n} \text{{ cm}}^2",
        r"{n}\,\mathrm{{cm}}^{{3}}",
        "{n} miles/hour",
        "{n} m/s^2",
        "{s}${m}/day",
    ],
    "a currency sign before": ["{s}${m}", "${n}", "{s}$ {m}", "{s}£{m}", "{s}€{m}.00", "{s}₹{m}", "{s}${m} per week"],
    "a currency sign after": ["{n}$", "{n} $", "{n} €", "{c}€", "{n}¢", "{c} £"],
    "a currency code": [
        "USD {n}",
        "{c} USD",
        "{s}US${m}",
        "USD{n}",
        "{s}${m} USD",
        "EUR {c}",
        "{s}A${m}",
        "{s}C${m}",
        "Rs. {n}",
        "{n} CAD",
    ],
    "LaTeX currency": [r"\${n}", r"{s}\${m}", r"$\${n}$", r"\$ {n}.00", r"\({s}\${m}\)", r"\text{{USD }}{n}"],
    "commas between digit groups": ["{c}", "{c} people", "{c}.00", "The total is {c}.", "**{c}**"],
    "LaTeX between digit groups": ["{{,}}", r"\,", r"\ ", r"\;", r",\!"],
    "no-break spaces between digit groups": ["\u00a0", "\u202f", "\u2009"],
    "trailing zeros and points": ["{n}.0", "{n}.00", "{n}.", "{c}.0 miles", "{s}${m}.00", "{n}.000"],
    "scientific notation": ["e", "E+", " \xd7 10^", r" \times 10^", " x 10^", r" \cdot 10^", "*10^"],
    "signs": ["{n}", "{t}", "{plus}{n}", "{t} degrees", "x = {t}", "({n})"],
    "per cent": ["{n}%", "{n} %", r"{n}\%", "{n} percent", "{n}% of the eggs", "{n} percentage points", r"${n}\%$"],
    "fractions": [
        "{d}/2",
        "{n}/1",
        r"\frac{{{d}}}{{2}}",
        r"\dfrac{{{d}}}{{2}}",
        r"\tfrac{{{d}}}{{2}}",
        r"\frac {{{d}}} {{2}}",
        r"$\frac{{{d}}}2$",
        r"{{{d} \over 2}}",
        "{d} / 2",
    ],
    "English words": ["{w}", "{w} dollars", "The answer is {w}.", "{and}", "{and} eggs"],
    "Markdown and HTML emphasis": [
        "**{n}**",
        "*{n}*",
        "__{n}__",
        "_{n}_",
        "***{n}***",
        "`{n}`",
        "**_{n}_**",
        "**{n}** dollars",
        "**Answer:** `{n}`",
        "The answer is **{s}${m}**.",
        "<b>{n}</b>",
        "<strong>{n}</strong>",
        "<em>{n} eggs</em>",
    ],
    "a box": [
        r"\boxed{{{n}}}",
        r"$\boxed{{{n}}}$",
        r"\boxed{{\${n}}}",
        r"\boxed{{{n} \text{{ dollars}}}}",
        r"\fbox{{{n}}}",
        r"\boxed{{\textbf{{{n}}}}}",
        r"The final answer is $\boxed{{{n}}}$.",
        r"\boxed{{x = {n}}}",
    ],
    "LaTeX math and text": [
        "${n}$",
        "$${n}$$",
        r"\({n}\)",
        r"\[{n}\]",
        r"\text{{{n}}}",
        r"{n}\text{{ dollars}}",
        r"\mathbf{{{n}}}",
        r"{n}\ \text{{miles per hour}}",
        r"$x = {n}$",
        r"\text{{Total: }} {n}",
        r"{{\bf {n}}}",
    ],
    "quotation marks and brackets": ['"{n}"', "'{n}'", "“{n}”", "({n})", "[{n}]", "«{n}»", "[[{n}]]", "{n}."],
    "a sentence with the answer": [
        "The answer is {n}",
        "The answer is {n}.",
        "So, the answer is {n}.",
        "Therefore, the total is {s}${m}.",
        "Thus the final answer is {n} eggs.",
        "Hence, we get {n}",
        "{n} is the answer.",
        "It equals {n}",
        "That comes to {n}",
    ],
    "a sentence about the question": [
        "Janet makes {s}${m} every day at the farmers' market.",
        "She has {n} eggs left.",
        "It takes {n} hours.",
        "It will cost Tom {s}${m}",
        "There are {n} apples and oranges in the basket.",
        "He sold a total of {n} clips in April and May.",
        "They need {n} more buses.",
        "Her profit is {s}${m}.",
        "He picked up {n} cans",
    ],
    "a label": [
        "Answer: {n}",
        "Answer:{n}",
        "Final Answer: {s}${m}",
        "Total = {n}",
        "#### {n}",
        "## {n}",
        "Number of eggs: {n}",
        "Result: {n} eggs",
        "→ {n}",
        "The answer is: {n}",
        "x: {n}",
    ],
    "a name and an equals sign": [
        "x = {n}",
        "x={n}",
        "= {n}",
        "3 days = {n}",
        "Total cost = {s}${m}",
        "Total for 3 days = {n}",
        "Profit = revenue - cost = {n}",
        "Let x = {n}",
    ],
    "a calculation": [
        "{a} + {b} = {n}",
        "{a}+{b}={n}",
        "{d} / 2 = {n}",
        "{d} ÷ 2 = {n}",
        "2 \xd7 {n} - {n} = {n}",
        "{n} x 1 = {n}",
        "({a} + {b}) * 1 = {n}",
        "x = {a} + {b} = {n}",
        "{d} * 50% = {n}",
        "{d} divided by 2 equals {n}",
        "{a} + {b} = {n}. {n} * 1 = {n}",
    ],
    "a calculation with units": [
        "{n} eggs * $1 per egg = {s}${m}",
        "{a} eggs + {b} eggs = {n} eggs",
        "${a} (purchase) + ${b} (repairs) = ${n} total",
        "{n} hours \xd7 1 mile/hour = {n} miles",
        "She has {a} + {b} = {n} eggs",
        "Total: {a} apples + {b} pears = {n} pieces of fruit",
        "{d} cups / 2 = {n} cups.",
        "50% of {d} eggs = {n} eggs",
    ],
    "a calculation in LaTeX": [
        r"{n} \times 1 = {n}",
        r"${n} \times 1 = {n}$",
        r"{n} \cdot 1 = {n}",
        r"{d} \div 2 = {n}",
        r"\frac{{{d}}}{{2}} = {n}",
        r"\frac{{{n} \times 4}}{{4}} = {n}",
        r"\({a} + {b} = {n}\)",
        r"\frac12 \times {d} = {n}",
        r"\${a} + \${b} = \${n}",
    ],
    "working steps": [
        "{a} + 0 = {a}. {a} + {b} = {n}",
        "{a} + 0 = {a} eggs.\n{a} + {b} = {n} eggs.",
        "{a} + {b} = {d} / 2 = {n}",
        "{d} / 1 = {d}; {d} / 2 = {n}",
    ],
    "the same value twice": [
        "{n} ({n})",
        "{w} ({n})",
        "{n} ({w})",
        "{s}${m} ({n} dollars)",
        "The total is {n}. The answer is {n}.",
        "{n} eggs\n#### {n}",
        "{n} = {n}",
        "{n} ({a} + {b})",
        "{n}, i.e. {n} eggs",
        "{n} because {a} + {b} = {n}",
    ],
    "a remark in brackets": [
        "{n} (after tax)",
        "{n} eggs (in total)",
        "{s}${m} (per day)",
        "{n} egg(s)",
        "The total (in dollars) is {n}",
        "{n} ({a} + {b} = {n})",
        "{n} (since {a} + {b} = {n})",
    ],
}


def _scientific(n: int, template: str) -> str:
    return scientific(n, template, "{{{}}}" if "\\" in template else "")


OWN_FORM: dict[str, Callable[[int, str], str]] = {
    "LaTeX between digit groups": lambda n, separator: grouped(n, separator.replace("{{,}}", "{,}")),
    "no-break spaces between digit groups": grouped,
    "scientific notation": _scientific,
}


def render(name: str, n: int, phrasing: int) -> str:
    """The number in the phrasing of a rendering with this index; they repeat after the last one."""
    templates = TEMPLATES[name]
    template = templates[phrasing % len(templates)]
    if name in OWN_FORM:
        return OWN_FORM[name](n, template)
    a, b = parts(n)
    t = str(n).replace("-", "\u2212")
    plus = "" if n < 0 else "+"
    words = {"w": in_words(n), "and": in_words(n, with_and=True)}
    return template.format(n=n, c=f"{n:,}", s=sign(n), m=f"{abs(n):,}", a=a, b=b, d=2 * n, t=t, plus=plus, **words)


def rewarded(text: str, reference: str) -> bool:
    return accuracy([""], [f"<answer>{text}</answer>"], [reference]) == [1.0]


def refused(name: str) -> Iterator[str]:
    """The renderings of GSM8K's test answers that are not rewarded."""
    for index, answer in enumerate(ANSWERS):
        text = render(name, answer, index)
        if not rewarded(text, str(answer)):
            yield text


def hard_cases(name: str) -> Iterator[str]:
    """The texts of a file beside this one, one per line; <U+000A> stands for a character that is not visible."""
    for line in Path(__file__).with_name(name).read_text("utf-8").splitlines():
        if not line.startswith("----"):
            yield re.sub(r"<U\+([0-9A-F]{4})>", lambda match: chr(int(match[1], 16)), line)


def _visible(text: str) -> str:
    """The text with white space other than the ordinary space as escape sequences."""
    return re.sub(r"[^\S ]", lambda match: ascii(match[0])[1:-1], text)


def table() -> str:
    """The table of docs/grading.md."""
    lines = ["| rendering | examples | rewarded |", "|---|---|---|"]
    total = 0
    for name, templates in TEMPLATES.items():
        texts = dict.fromkeys(
            render(name, -1234 if name == "signs" else 1234, phrasing) for phrasing in range(min(3, len(templates)))
        )
        examples = ", ".join(f"`` {_visible(text)} ``" for text in texts)
        count = len(ANSWERS) - len(list(refused(name)))
        total += count
        lines.append(f"| {name} | {examples} | {count / len(ANSWERS):.2%} |")
    cases = len(ANSWERS) * len(TEMPLATES)
    lines.append(f"| all {cases:,} | | {total / cases:.2%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
