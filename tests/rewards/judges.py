"""How Math-Verify and the extractors of lm-eval grade the texts that test our graders; needs the extra `judges`.

`python -m tests.rewards.judges` prints the table of docs/grading.md.
"""

import logging
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters.extraction import RegexFilter
from math_verify import parse, verify

from grpo.rewards.lenient import lenient
from tests.rewards.renderings import ANSWERS, TEMPLATES, hard_cases, render, rewarded

Judge = Callable[[str, str], bool]  # (answer, reference) -> whether it is right


def by_tag(text: str, reference: str) -> bool:
    return rewarded(text, reference)


def by_last_number(text: str, reference: str) -> bool:
    return lenient([], [text], [reference]) == [1.0]


def by_math_verify(text: str, reference: str) -> bool:
    return bool(verify(_reference(reference), parse(text)))


@lru_cache
def _reference(text: str) -> list[Any]:
    return parse(text)


def by_lm_eval(name: str) -> Judge:
    """The extractor of lm-eval's own task gsm8k with this name. For strict-match the text follows `#### `."""
    task = yaml.safe_load((files("lm_eval") / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    (entry,) = (each for each in task["filter_list"] if each["name"] == name)
    options = {key: value for key, value in entry["filter"][0].items() if key != "function"}
    extract = RegexFilter(**options)
    (metric,) = task["metric_list"]
    settings = {key: metric[key] for key in ("regexes_to_ignore", "ignore_case", "ignore_punctuation")}

    def judge(text: str, reference: str) -> bool:
        written = f"#### {text}" if name == "strict-match" else text
        ((found,),) = extract.apply([[written]], [{}])
        return bool(exact_match_hf_evaluate([found], [reference], **settings)["exact_match"])

    return judge


JUDGES: dict[str, Judge] = {
    "tagged": by_tag,
    "lenient": by_last_number,
    "Math-Verify": by_math_verify,
    "lm-eval strict-match": by_lm_eval("strict-match"),
    "lm-eval flexible-extract": by_lm_eval("flexible-extract"),
}


def table() -> str:
    """The share of right answers that each judge accepts, by rendering, and of wrong ones."""
    rows = []
    for name in TEMPLATES:
        answers = [(render(name, answer, index), str(answer)) for index, answer in enumerate(ANSWERS)]
        rows.append([name, *(_share(judge, answers) for judge in JUDGES.values())])
    totals = [sum(column) / len(rows) for column in list(zip(*rows, strict=True))[1:]]
    rows.append(["all", *totals])
    for file, title in (("states_18.txt", "other ways to state 18"), ("not_18.txt", "**texts that do not state 18**")):
        cases = [(text, "18") for text in hard_cases(file)]
        rows.append([f"{title}, {len(cases):,}", *(_share(judge, cases) for judge in JUDGES.values())])
    head = [f"| accepted | {' | '.join(JUDGES)} |", f"|---|{'---|' * len(JUDGES)}"]
    body = [f"| {name} | {' | '.join(f'{share:.1%}' for share in shares)} |" for name, *shares in rows]
    return "\n".join(head + body)


def _share(judge: Judge, answers: list[tuple[str, str]]) -> float:
    return sum(judge(*each) for each in answers) / len(answers)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # Math-Verify warns of each text that it cannot read
    print(table())
