"""Problems of JSON Lines, CSV and Parquet files by the names of their columns."""

import json
from decimal import Decimal

import pandas as pd
import pytest

from grpo.config.errors import ConfigError
from grpo.data.problems import load_jsonl
from grpo.data.prompts import messages
from grpo.data.tables import load_table
from tests.launches import SHORT, launch
from tests.launches import rows as rows_of

ROWS = [
    {"problem": "1 + 1?", "result": "2", "level": "Level 1"},
    {"problem": "Half of 3,\nas a decimal?", "result": "1.50", "level": "Level 2"},
]
WRITERS = {
    "jsonl": lambda frame, file: frame.to_json(file, orient="records", lines=True),
    "csv": lambda frame, file: frame.to_csv(file, index=False),
    "parquet": lambda frame, file: frame.to_parquet(file),
}


def write(folder, ending="csv", rows=ROWS, splits=("train", "test")):
    for split in splits:
        WRITERS[ending](pd.DataFrame(rows), folder / f"{split}.{ending}")
    return str(folder)


@pytest.mark.parametrize("ending", WRITERS)
def test_each_format_gives_the_same_problems(tmp_path, ending):
    problems = load_table(write(tmp_path, ending), question="problem", answer="result")
    assert [(each.question, each.answer, each.columns) for each in problems.train] == [
        ("1 + 1?", "2", {"level": "Level 1"}),
        ("Half of 3,\nas a decimal?", "1.50", {"level": "Level 2"}),
    ]
    assert len(problems.test) == 2
    assert problems.validation == []


def test_a_split_can_have_another_name_and_validation_problems_are_optional(tmp_path):
    path = write(tmp_path, splits=("train", "dev", "held_out"))
    splits = {"test": "held_out", "validation": "dev"}
    problems = load_table(path, question="problem", answer="result", splits=splits)
    assert [len(each) for each in (problems.train, problems.test, problems.validation)] == [2, 2, 2]


def test_a_data_set_without_a_test_split_is_tested_on_its_validation_split(tmp_path):
    path = write(tmp_path, splits=("train", "validation"))
    problems = load_table(path, question="problem", answer="result", splits={"test": "validation"})
    assert (len(problems.test), problems.validation) == (2, [])


def test_decimals_and_long_values_are_read(tmp_path):
    long = "x" * 200_000
    for split in ("train", "test"):
        pd.DataFrame({"question": [long], "answer": [Decimal("1.50")]}).to_parquet(tmp_path / f"{split}.parquet")
    (problem,) = load_table(str(tmp_path)).train
    assert (problem.question, problem.answer) == (long, "1.50")
    for split in ("train", "test"):
        (tmp_path / f"{split}.parquet").unlink()
        (tmp_path / f"{split}.csv").write_text(f"question,answer\n{long},1.50\n")
    (problem,) = load_table(str(tmp_path)).train
    assert (problem.question, problem.answer) == (long, "1.50")


def test_the_answer_can_be_in_the_box_of_a_solution(tmp_path):
    solution = r"So $\boxed{\frac{1}{2}}$."
    path = write(tmp_path, "jsonl", [{"problem": "?", "solution": solution, "answer": "left out"}])
    (problem,) = load_table(path, question="problem", answer="solution", boxed=True).train
    assert (problem.answer, problem.columns) == (r"\frac{1}{2}", {"solution": solution})
    path = write(tmp_path, "jsonl", [{"problem": "?", "solution": r"Hence our answer is $\boxed 2$."}])
    assert load_table(path, question="problem", answer="solution", boxed=True).train[0].answer == "2"


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And doubled?"},
]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_question_can_be_a_chat(tmp_path, ending):
    path = write(tmp_path, ending, [{"prompt": CHAT, "answer": "4"}])
    (problem,) = load_table(path, question="prompt").train
    assert problem.question == "And doubled?"
    data = {"system_prompt": "Not this one.", "examples": [{"question": "0?", "completion": "0"}]}
    shown = messages(problem.question, data, problem.turns)
    assert [(each["role"], each["content"]) for each in shown] == [
        ("system", "Be brief."),
        ("user", "0?"),
        ("assistant", "0"),
        ("user", "What is 1 + 1?"),
        ("assistant", "2"),
        ("user", "And doubled?"),
    ]
    without_system = messages(problem.question, data, problem.turns[1:])
    assert without_system[0] == {"role": "system", "content": "Not this one."}


def test_a_chat_is_possible_in_json_lines_too(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"question": CHAT, "answer": "4"}) + "\n")
    (problem,) = load_jsonl(str(tmp_path)).train
    assert problem.turns == tuple(CHAT[:3])


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        (CHAT[:3], "'question' must end with a message of the user"),
        ([], "'question' must end with a message of the user"),
        ([{"role": "tool", "content": "x"}], "'question' has a message 1 without a role of system, user, assistant"),
        ([CHAT[1] | {"content": " "}], "'question, message 1, content' is missing or empty"),
        (["1 + 1?"], "'question' has a message 1 without a role"),
    ],
)
def test_a_malformed_chat_is_refused_with_its_line(tmp_path, chat, reason):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"question": chat, "answer": "4"}) + "\n")
    with pytest.raises(ConfigError, match=f"train.jsonl, line 1: {reason}"):
        load_jsonl(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "settings", "reason"),
    [
        (
            "question,answer\n1?,1\n",
            {"question": "problem"},
            "line 2: there is no column 'problem' .data.question",
        ),
        ('question,answer\n"1\n?",1\n2?,\n', {}, "line 4: 'answer' is missing or empty"),
        ("question,answer\n1?,1,2\n", {}, "line 2: the header has another number of columns"),
        ("question,answer\n1?\n", {}, "line 2: the header has another number of columns"),
        ('question,answer\n"1?,1\n', {}, "line 2: not CSV"),
        ("", {}, "train.csv holds no problem"),
        ("question,answer\n1?,1\n", {"boxed": True}, r"line 2: 'answer' has no .boxed"),
        ("question,answer,n\n1?,1,a\n2?,1,a\n", {"id": "n"}, "line 3: the id 'a' was used before"),
        ("question,answer\n1?,1\n", {"question": "answer"}, "must be different columns, not answer, answer"),
        ("question,answer,answer\n1?,1,2\n", {}, "line 1: the column 'answer' occurs twice"),
        ("question,answer\n1?,1\n", {"splits": {"test": "train"}}, "each split must have a name of its own"),
        ("question,answer\n1?,1\n", {"boxed": "no"}, "data.boxed=no: must be true or false"),
        ("question,answer\n1?,1\n", {"question": ["a"]}, r"data.question=\['a'\]: must be the name of a column"),
        ("question,answer\n1?,1\n", {"splits": {"dev": "x"}}, "data.splits.dev: the splits are train, test, valid"),
        ("question,answer\n1?,1\n", {"splits": {"test": "x"}}, "there is no x.jsonl, x.csv or x.parquet in it"),
    ],
)
def test_a_malformed_table_is_refused_with_file_line_and_reason(tmp_path, text, settings, reason):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        load_table(str(tmp_path), **settings)


def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path):
    write(tmp_path, splits=("test",))
    (tmp_path / "train.parquet").write_text("question,answer")
    with pytest.raises(ConfigError, match=r"train\.parquet is not a Parquet file"):
        load_table(str(tmp_path), question="problem", answer="result")
    (tmp_path / "train.parquet").unlink()
    (tmp_path / "train.csv").write_bytes("problem,result\nWieviel ist 1 \xf7 1?,1\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"train\.csv is not encoded as UTF-8"):
        load_table(str(tmp_path), question="problem", answer="result")
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"has train.jsonl and train.csv; remove one of them"):
        load_table(str(tmp_path), question="problem", answer="result")


def test_a_run_on_a_table_of_chats(tmp_path):
    chat = [CHAT[1], CHAT[2], {"role": "user", "content": "What is 12 + 13?"}]
    rows = [{"prompt": chat, "answer": "25"}] * 4
    write(tmp_path, "parquet", rows)
    table = ["data=table", "data.path=.", "data.question=prompt", "data.system_prompt=null", "data.validation_share=0"]
    (tmp_path / "mine.py").write_text(
        "def turns(prompts, **columns):\n    return [float(len(each)) for each in prompts]\n"
    )
    turns = "+reward.components.turns={_target_: mine.turns}"
    done = launch(*SHORT, *table, turns, "grpo.num_steps=1", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert rows_of(tmp_path / "run")[0]["rewards/turns/mean"] == 3.0


def test_a_column_with_the_name_of_an_argument_of_rewards_is_refused(tmp_path):
    write(tmp_path, "jsonl", [{"question": "1 + 1?", "answer": "2", "completions": "none"}])
    refused = launch(*SHORT, "data=table", "data.path=.", "run_dir=run", cwd=tmp_path)
    assert refused.returncode == 2
    said = "error: data: the column 'completions' has the name of an argument that reward functions get from the run"
    assert refused.stderr.splitlines()[-1].startswith(said)
    assert not (tmp_path / "run").exists()
