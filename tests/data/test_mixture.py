"""A mixture of data sets in a real run, and what is refused."""

import json

import pytest

from grpo.data.mixture import mix
from grpo.data.problems import Problem, Problems
from tests.launches import SHORT, assert_same_run, launch, resume, rows

MIXTURE = """
defaults:
  - jsonl
  - jsonl@parts.plain
  - table@parts.hard
  - arithmetic@parts.sums
  - _self_
_target_: grpo.data.mixture.mix
path: null
name: null
parts:
  plain: {path: PLAIN, weight: 1}
  hard: {path: HARD, question: problem, answer: result, weight: 3}
  sums: {weight: 0}
system_prompt: null
validation_share: 0
"""


@pytest.fixture
def arguments(tmp_path):
    """Arguments of a launch with a mixture of two folders with 8 problems each, and sums that are only evaluated."""
    for name, keys in (("plain", ("question", "answer")), ("hard", ("problem", "result"))):
        folder = tmp_path / name
        folder.mkdir()
        rows_of = [dict(zip(keys, (f"What is {n} + 1?", str(n + 1)), strict=True)) for n in range(10, 18)]
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of))
    (tmp_path / "mine" / "data").mkdir(parents=True)
    text = MIXTURE.replace("PLAIN", str(tmp_path / "plain")).replace("HARD", str(tmp_path / "hard"))
    (tmp_path / "mine" / "data" / "mixed.yaml").write_text(text)
    short = [each for each in SHORT if not each.startswith("data")]
    return ["--config-dir", str(tmp_path / "mine"), *short, "data=mixed", "eval.max_problems=40"]


def parts_of(run_dir):
    samples = [json.loads(line) for file in run_dir.glob("samples/*.jsonl") for line in file.read_text().splitlines()]
    return [sample["problem_id"].partition("/")[0] for sample in samples]


def test_training_draws_with_the_weights_and_the_accuracy_is_listed_by_part(arguments, tmp_path):
    more = ["grpo.num_steps=20", "grpo.batch_size=4", "samples.every=1", "eval.after=true", "eval.by=[part]"]
    done = launch(*arguments, *more, "grpo.num_generations=2", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    parts = parts_of(tmp_path / "run")
    assert set(parts) == {"plain", "hard"}
    # 80 groups: three standard deviations are 0.15.
    assert parts.count("hard") / len(parts) == pytest.approx(0.75, abs=0.15)
    after = json.loads((tmp_path / "run" / "eval" / "after.json").read_text())
    assert set(after["by"]["part"]) == {"plain", "hard", "sums"}


def test_a_mixture_with_a_curriculum_continues_bit_for_bit(arguments, tmp_path):
    more = ["grpo.num_steps=8", "checkpoint.every=2", "sampling.curriculum=0.9", "samples.every=1"]
    assert launch(*arguments, *more, "run_dir=whole", cwd=tmp_path).returncode == 0
    fault = ("grpo.training.groups.group_keys", "6", "kill")
    assert launch(*arguments, *more, "run_dir=run", cwd=tmp_path, fault=fault).returncode == -9
    again = resume(tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    without = launch(*arguments, *more, "sampling.curriculum=0", "run_dir=without", cwd=tmp_path)
    assert without.returncode == 0
    assert rows(tmp_path / "without")[0] == rows(tmp_path / "whole")[0]
    assert rows(tmp_path / "without") != rows(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "data.parts.hard.weight=0",
            "data.parts: the weights of plain, hard, sums sum to 0; give the parts to",
        ),
        ("data.parts.hard.weight=-1", "data.parts.hard.weight=-1: must be 0 or more"),
        ("data.parts.hard.weight=many", "data.parts.hard.weight=many: must be a number"),
        ("data.parts.hard.question=question", "there is no column 'question' (data.question); it has problem, result"),
        ("~data.parts.hard._target_", "data.parts.hard needs a _target_: add a file of data to the defaults of your"),
    ],
)
def test_a_mixture_that_cannot_be_drawn_from_is_refused(arguments, tmp_path, change, said):
    more = ["data.parts.plain.weight=0"] if "weight=0" in change else []
    refused = launch(*arguments, change, *more, "run_dir=run", cwd=tmp_path)
    assert refused.returncode == 2
    assert said in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_the_weight_of_a_part_is_shared_by_its_problems():
    parts = {
        "a": Problems([Problem("1", "?", "1"), Problem("2", "?", "1")], [Problem("1", "t", "1")]),
        "b": Problems([Problem("1", "?", "1", {"level": 3})], []),
        "c": Problems([Problem("1", "?", "1")], [Problem("1", "u", "1")]),
    }
    mixed = mix(parts, {"a": 1.0, "b": 3.0, "c": 0.0})
    assert [(each.id, each.weight, each.columns) for each in mixed.train] == [
        ("a/1", 0.5, {"part": "a"}),
        ("a/2", 0.5, {"part": "a"}),
        ("b/1", 3.0, {"level": 3, "part": "b"}),
    ]
    assert [each.id for each in mixed.test] == ["a/1", "c/1"]
