"""Tests of loading problems from JSON lines, GSM8K's format and the embedded sums, and of errors for bad lines."""

import json
import subprocess
import sys

import pytest

from grpo.config.errors import ConfigError
from grpo.data import arithmetic
from grpo.data.problems import Problem, Problems, load_arithmetic, load_gsm8k, load_jsonl

GOOD = '{"question": "1 + 1?", "answer": "2"}\n'


@pytest.fixture
def folder(tmp_path):
    """A function that writes train.jsonl and test.jsonl and returns their folder."""

    def write(train=GOOD, test=GOOD):
        (tmp_path / "train.jsonl").write_text(train, encoding="utf-8")
        (tmp_path / "test.jsonl").write_text(test, encoding="utf-8")
        return str(tmp_path)

    return write


@pytest.mark.parametrize("ending", ["", "\nDone.", "\r\nThe answer is 19.", "\n\n20"])
def test_lines_after_the_answer_of_a_solution_are_not_part_of_it(folder, ending):
    (problem,) = load_jsonl(folder(train=json.dumps({"question": "9 + 9?", "answer": f"9 + 9\n#### 18{ending}"}))).train
    assert problem.answer == "18"
    assert problem.columns["solution"] == f"9 + 9\n#### 18{ending}"


def test_a_line_becomes_a_problem_with_its_other_columns(folder):
    row = {"id": 7, "question": " How many? ", "answer": 12, "level": "hard", "tags": ["a"]}
    problems = load_jsonl(folder(train=json.dumps(row) + "\n"))
    assert problems.train == [Problem("7", "How many?", "12", {"level": "hard", "tags": ["a"]})]
    assert problems.test == [Problem("test-1", "1 + 1?", "2", {})]


def test_problems_without_an_id_are_named_by_split_and_line_and_empty_lines_are_skipped(folder):
    problems = load_jsonl(folder(train=GOOD + "\n" + GOOD + "   \n" + GOOD))
    assert [problem.id for problem in problems.train] == ["train-1", "train-3", "train-5"]


def test_the_final_answer_of_a_gsm8k_solution_is_extracted_and_the_solution_kept_as_a_column(folder):
    solution = "She sells 48/2 = <<48/2=24>>24 clips in May.\n#### 1,072"
    (problem,) = load_jsonl(folder(train=json.dumps({"question": "?", "answer": solution}))).train
    assert problem.answer == "1072"
    assert problem.columns == {"solution": solution}


def test_answers_that_are_not_ascii_are_read_as_utf8(folder):
    (problem,) = load_jsonl(folder(train='{"question": "π auf zwei Stellen?", "answer": "3,14 ≈ π"}')).train
    assert problem.answer == "3,14 ≈ π"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": "2 + 2?", "answer": "4"', "not JSON"),
        ("question: 2 + 2?", "not JSON"),
        ('{"question": "2 + 2?"}', "'answer' is missing or empty"),
        ('{"question": "2 + 2?", "answer": null}', "'answer' is missing or empty"),
        ('{"question": "2 + 2?", "answer": "  "}', "'answer' is missing or empty"),
        ('{"question": "2 + 2?", "answer": ["4"]}', "'answer' must be text or a number, not [\"4\"]"),
        ('{"question": {"text": "2 + 2?"}, "answer": "4"}', "'question' must be text or a number, not {\"text\""),
        ('{"question": "2 + 2?", "answer": true}', "'answer' must be text or a number, not true"),
        ('{"question": "2 + 2?", "answer": NaN}', "'answer' is nan; it must be text or a finite number"),
        ('{"question": "2 + 2?", "answer": -Infinity}', "'answer' is -inf; it must be"),
        ('{"question": "2 + 2?", "answer": 1e999}', "'answer' is inf; it must be"),
        ('{"question": "2 + 2?", "answer": %s}' % ("4" * 5000), "not JSON (Exceeds the limit"),
        (
            '{"question": "2 \\ud83d 2?", "answer": "4"}',
            "'question' is not valid Unicode (surrogates not allowed: '\\ud83d')",
        ),
        ('{"question": "2 + 2?", "answer": "4 \\udc00"}', "'answer' is not valid Unicode"),
        ('{"id": "\\udc00", "question": "2 + 2?", "answer": "4"}', "'id' is not valid Unicode"),
        ('{"id": " ", "question": "2 + 2?", "answer": "4"}', "'id' is missing or empty"),
        ('{"id": false, "question": "2 + 2?", "answer": "4"}', "'id' must be text or a number, not false"),
        ('{"id": [1], "question": "2 + 2?", "answer": "4"}', "'id' must be text or a number, not [1]"),
        ('{"question": "2 + 2?", "answer": "4", "answer": "5"}', "not JSON (the key 'answer' occurs twice)"),
        ('{"question": "2 + 2?", "answer": "4", "a": {"b": 1, "b": 2}}', "not JSON (the key 'b' occurs twice)"),
        ("[" * 100000, "not JSON"),
        ('{"question": "", "answer": "4"}', "'question' is missing or empty"),
        ('{"answer": "4"}', "'question' is missing or empty"),
        ('["2 + 2?", "4"]', "must be an object such as"),
        ('"2 + 2?"', "must be an object such as"),
        ('{"id": "train-1", "question": "2 + 2?", "answer": "4"}', "the id 'train-1' was used before"),
        ('{"question": "2 + 2?", "answer": "four #### "}', "####"),
    ],
)
def test_a_bad_line_is_refused_with_file_line_and_reason(folder, line, reason):
    path = folder(train=GOOD + "\n" + line + "\n" + GOOD)
    with pytest.raises(ConfigError) as refused:
        load_jsonl(path)
    assert str(refused.value).startswith(f"{path}/train.jsonl, line 3: ")
    assert reason in str(refused.value)


def test_the_held_out_problems_are_checked_too(folder):
    with pytest.raises(ConfigError, match=r"test\.jsonl, line 1: 'answer' is missing"):
        load_jsonl(folder(test='{"question": "2 + 2?"}\n'))


def test_bytes_that_are_not_utf8_are_refused_with_the_name_of_the_file(folder, tmp_path):
    path = folder()
    (tmp_path / "train.jsonl").write_bytes(GOOD.encode() + b'{"question": "\xff?", "answer": "4"}\n')
    with pytest.raises(ConfigError, match=r"train\.jsonl"):
        load_jsonl(path)


def test_ids_that_are_null_count_as_absent(folder):
    rows = [{"id": None, "question": "1 + 1?", "answer": "2"}, {"id": 0, "question": "1 + 2?", "answer": 3}]
    problems = load_jsonl(folder(train="".join(json.dumps(row) + "\n" for row in [*rows, rows[0]])))
    assert [problem.id for problem in problems.train] == ["train-1", "0", "train-3"]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD.encode() * 2,
        GOOD.encode().replace(b"\n", b"\r\n") * 2 + b"\r\n",
        GOOD.encode() + GOOD.encode().rstrip(),
        '{"question": "1 +\u2028 1?", "answer": "2"}\n'.encode() * 2,
    ],
    ids=["byte order mark", "CRLF", "no newline at the end", "another line separator"],
)
def test_files_of_other_editors_are_read(folder, tmp_path, content):
    path = folder()
    (tmp_path / "train.jsonl").write_bytes(content)
    assert [problem.id for problem in load_jsonl(path).train] == ["train-1", "train-2"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_a_file_in_utf16_is_named(folder, tmp_path, encoding):
    path = folder()
    mark = "" if encoding == "utf-16" else "\ufeff"
    (tmp_path / "train.jsonl").write_bytes((mark + GOOD).encode(encoding))
    with pytest.raises(ConfigError, match=r"train\.jsonl is encoded as UTF-16; save it as UTF-8"):
        load_jsonl(path)


@pytest.mark.parametrize("loader", [load_gsm8k, load_jsonl])
@pytest.mark.parametrize(
    ("name", "reader"), [("sums.csv", "read_csv"), ("a.PARQUET", "read_parquet"), ("x.jsonl", None)]
)
def test_a_single_file_is_answered_with_the_form_and_the_conversion(tmp_path, loader, name, reader):
    file = tmp_path / name
    file.write_text("question,answer\n1 + 1?,2\n")
    with pytest.raises(ConfigError) as refused:
        loader(str(file), None)
    assert f"data.path={file} is a file; it must be a folder with train.jsonl and test.jsonl" in str(refused.value)
    assert (f"pandas.{reader}('{file}')" in str(refused.value)) == (reader is not None)


def test_the_conversion_of_a_table_works_as_it_is_printed(tmp_path):
    (tmp_path / "train.csv").write_text("question,answer,level\n1 + 1?,2,easy\n")
    with pytest.raises(ConfigError, match=r"there is no train\.jsonl in it.*read_csv") as refused:
        load_jsonl(str(tmp_path))
    command = str(refused.value).rpartition("to convert it: ")[2].replace("DIR", str(tmp_path))
    subprocess.run(["sh", "-c", command.replace("python", sys.executable, 1)], check=True)
    (tmp_path / "test.jsonl").write_text(GOOD)
    assert load_jsonl(str(tmp_path)).train == [Problem("train-1", "1 + 1?", "2", {"level": "easy"})]


def test_a_folder_named_like_the_file_is_not_it(folder, tmp_path):
    path = folder()
    (tmp_path / "test.jsonl").unlink()
    (tmp_path / "test.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"there is no test\.jsonl in it"):
        load_jsonl(path)


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_an_empty_file_is_refused(folder, content):
    with pytest.raises(ConfigError, match=r"train\.jsonl holds no problem"):
        load_jsonl(folder(train=content))


def test_a_missing_folder_or_file_is_named_in_the_error(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"data=jsonl needs data\.path=DIR"):
        load_jsonl(None)
    with pytest.raises(ConfigError, match=r"data\.path=/no/such/folder: there is no train\.jsonl"):
        load_jsonl("/no/such/folder")
    path = folder()
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"there is no test\.jsonl in it"):
        load_jsonl(path)


def test_gsm8k_can_be_read_from_a_folder_without_the_hub(folder):
    path = folder(train=json.dumps({"question": "Two and two?", "answer": "2 + 2 = 4\n#### 4"}))
    assert load_gsm8k(path, "main").train == [
        Problem("train-1", "Two and two?", "4", {"solution": "2 + 2 = 4\n#### 4"}),
    ]


def test_a_data_set_that_does_not_exist_is_refused_with_a_suggested_fix():
    with pytest.raises(ConfigError) as refused:
        load_gsm8k("/no/such/data", "main")
    assert str(refused.value).startswith("data.path=/no/such/data is neither a local folder nor ")
    assert "data.path=DIR" in str(refused.value)


def test_the_embedded_sums_are_correct_and_the_splits_share_no_pair_of_numbers():
    problems = load_arithmetic()
    pairs = {}
    for split, some in (("train", problems.train), ("test", problems.test)):
        for problem in some:
            a, b = map(int, problem.id.split("+"))
            assert 10 <= a <= 99
            assert 10 <= b <= 99
            assert problem.answer == str(a + b)
            assert str(a) in problem.question
            assert str(b) in problem.question
            pairs.setdefault(split, set()).add(frozenset((a, b)))
    shown = {frozenset(map(int, row["id"].split("+"))) for row in arithmetic.problems("demonstrations")}
    assert not pairs["test"] & pairs["train"]
    assert not pairs["test"] & shown
    assert not pairs["train"] & shown
    assert len(problems.train) > 1500
    assert len(problems.test) > 400


def test_the_embedded_sums_have_no_other_splits():
    with pytest.raises(ValueError, match="the splits are demonstrations, train, test"):
        arithmetic.problems("validation")


def test_problems_are_the_same_each_time_they_are_loaded():
    assert load_arithmetic() == load_arithmetic()
    assert isinstance(load_arithmetic(), Problems)
