import json
import time

import pandas as pd
import pytest

from grpo.analysis import audit
from grpo.runs.folder import RunFolder

RIGHT = "<reasoning>1+1</reasoning><answer>2</answer>"


def sample(completion, step=10, answer="2", reward=1.0, **more):
    return {"step": step, "problem_id": "p", "prompt": "1+1?", "completion": completion, "answer": answer} | {
        "rewards/correctness": reward,
        "reward": reward,
        "advantage": 0.0,
        "length": len(completion.split()),
        **more,
    }


def test_samples_are_read_in_the_order_of_their_steps_with_answers_as_text(tmp_path):
    (tmp_path / "samples").mkdir()
    for step, answer in ((20, "007"), (10, "1,234")):
        row = json.dumps(sample(RIGHT, step=step, answer=answer))
        (tmp_path / "samples" / f"step_{step:06d}.jsonl").write_text(row + "\n")
    samples = audit.load_samples(tmp_path)
    assert samples[["step", "answer"]].values.tolist() == [[10, "1,234"], [20, "007"]]
    assert audit.components(samples) == ["correctness"]
    assert audit.load_samples(tmp_path / "nowhere").empty


def test_completions_that_are_numbers_stay_text(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step_000010.jsonl").write_text(json.dumps(sample("42", answer="42")) + "\n")
    assert audit.signs_of_gaming(audit.load_samples(tmp_path))[10].tolist()[:3] == [0, 0, 0]


@pytest.mark.parametrize(
    ("completion", "kind"),
    [
        (RIGHT, "both"),
        ("The answer is 2.", "last number only"),
        ("<answer>2</answer> or was it 3", "answer block only"),
        ("<answer>5</answer>", "neither"),
        ("I do not know", "neither"),
        ("1 and 1 make $2.00", "last number only"),
    ],
)
def test_the_answer_block_against_the_last_number(completion, kind):
    table = audit.agreement(pd.DataFrame([sample(completion)]))
    assert table[10].to_dict() == {"both": 0, "answer block only": 0, "last number only": 0, "neither": 0} | {kind: 1}


def test_signs_of_gaming_are_given_as_shares_for_each_step():
    rows = [
        sample(RIGHT),
        sample("<answer>1</answer><answer>2</answer>"),
        sample("<answer>2</answer> and so on", step=20),
        sample("<answer>2</answer><answer> 2 </answer>", step=20),
    ]
    table = audit.signs_of_gaming(pd.DataFrame(rows))
    assert table[10].tolist()[:3] == [0.5, 0.0, 0.5]
    assert table[20].tolist()[:3] == [0.5, 0.5, 0.0]
    assert table.loc["tokens per completion"].tolist() == [1.0, 3.5]


@pytest.mark.parametrize(
    "text", ["<answer>", "</answer>", "<answer>1</answer>", "<reasoning>", "9", "9,", "1/", "1.", "-$", "<answer>2"]
)
def test_the_time_of_the_audit_grows_no_faster_than_the_completions(text):
    """A quadratic time would be 400 times as long for a text that is 20 times as long."""

    def seconds(repeated):
        samples = pd.DataFrame([sample(text * repeated)])
        started = time.process_time()
        audit.agreement(samples)
        audit.signs_of_gaming(samples)
        return time.process_time() - started

    seconds(1)
    assert seconds(100_000) < 100 * max(seconds(5_000), 0.01)


def test_of_many_sampled_steps_a_few_are_read(tmp_path):
    for step in range(1, 101):
        RunFolder(tmp_path).write_samples(step, [sample(RIGHT, step=step)])
    assert audit.load_samples(tmp_path, 5)["step"].tolist() == [1, 26, 51, 75, 100]
    assert len(audit.load_samples(tmp_path)) == 100


def test_the_distribution_is_over_values_or_over_ranges_if_there_are_many_values():
    few = pd.DataFrame([sample(RIGHT, reward=value) for value in (0.0, 0.2 + 0.4, 0.6, 2.0)])
    assert audit.distribution(few, "correctness")[10].to_dict() == {0.0: 0.25, 0.6: 0.5, 2.0: 0.25}
    many = pd.DataFrame([sample(RIGHT, reward=value / 10) for value in range(50)])
    table = audit.distribution(many, "correctness")
    assert (len(table), table[10].sum()) == (6, pytest.approx(1))


def test_extremes_come_from_the_last_step_and_contain_each_text_once():
    rows = [
        sample("early", reward=9.0),
        *(sample(t, step=20, reward=r) for t, r in (("a", 1), ("a", 1), ("b", 3), ("c", 2))),
    ]
    top, bottom = audit.extremes(pd.DataFrame(rows), count=2)
    assert (top["completion"].tolist(), bottom["completion"].tolist()) == (["b", "c"], ["a", "c"])


def test_samples_are_ordered_by_step_beyond_a_million(tmp_path):
    for step in (1_000_000, 999_999):
        RunFolder(tmp_path).write_samples(step, [sample("1") | {"step": step}])
    (tmp_path / "samples" / "step_1 copy.jsonl").write_text("")
    assert audit.load_samples(tmp_path)["step"].tolist() == [999_999, 1_000_000]
