"""`grpo evaluate`: several samples, several sets, baselines, stored completions, and bad input."""

import json
import shutil

import pytest
import yaml

from grpo.analysis.accuracy import majority_share
from grpo.rewards.lenient import final_answer
from grpo.training.evaluation import _any_answer, _tagged_answer
from tests.launches import SHORT, grpo, launch, resume

APPEND = "grpo.training.completion_store.CompletionStore.append"
SMALL = ["experiment=quickstart", "eval.max_problems=12", "hardware.threads=1"]


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    """A folder with a finished run `run`, evaluated before and after, and every step on the validation problems."""
    cwd = tmp_path_factory.mktemp("evaluate")
    settings = [*SHORT, "eval.before=true", "eval.after=true", "eval.every=2", "run_dir=run"]
    done = launch(*settings, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd


def evaluated(cwd, *arguments):
    """Evaluate the run; return what was printed, and the new files in eval/ by name, which are removed."""
    done = grpo("evaluate", "run_dir=run", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    found = {}
    for file in sorted((cwd / "run").glob("eval/evaluate_*.json")):
        found[file.stem] = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
    return done.stdout, found


def read(cwd, name):
    return json.loads((cwd / "run" / "eval" / f"{name}.json").read_text(encoding="utf-8"))


def test_training_chooses_by_validation_problems_and_reports_test_problems(cwd):
    splits = {name: read(cwd, name)["split"] for name in ("before", "step_000002", "step_000004", "after")}
    assert splits == {"before": "test", "step_000002": "validation", "step_000004": "validation", "after": "test"}
    ids = {name: {row["problem_id"] for row in read(cwd, name)["problems"]} for name in splits}
    assert ids["before"] == ids["after"] == {"46+47", "18+81", "36+98", "54+77"}
    assert ids["step_000002"] == {"52+19", "28+35", "61+27"}


def test_an_evaluation_of_a_run_is_that_of_its_training(cwd):
    _, found = evaluated(cwd)
    (result,) = found.values()
    after = read(cwd, "after")
    for key in ("split", "step", "n", "accuracy", "graded", "reward", "problems"):
        assert result[key] == after[key], key
    _, found = evaluated(cwd, "split=validation")
    (result,) = found.values()
    assert result["problems"] == read(cwd, "step_000004")["problems"]


def test_several_samples_give_pass_at_k_and_a_majority(cwd):
    said, found = evaluated(cwd, "eval.samples=3", "eval.temperature=1")
    (result,) = found.values()
    rows = result["problems"]
    assert len(rows) == 12
    assert [row["sample"] for row in rows[:4]] == [0, 1, 2, 0]
    right = [[row["correct"] for row in rows if row["problem_id"] == name] for name in ("46+47", "18+81")]
    assert all(len(each) == 3 for each in right)
    assert list(result["pass@k"]) == ["1", "2", "3"]
    assert result["pass@k"]["1"]["share"] == pytest.approx(result["accuracy"])
    by_problem = {row["problem_id"]: False for row in rows}
    for row in rows:
        by_problem[row["problem_id"]] |= row["correct"]
    assert result["pass@k"]["3"]["share"] == pytest.approx(sum(by_problem.values()) / 4)
    assert "pass@3" in said
    assert "maj@3" in said


def test_the_samples_do_not_depend_on_how_many_are_computed_at_once(tmp_path):
    texts = []
    for tokens in (120, 100_000):
        more = ["eval.samples=2", "eval.temperature=1", f"hardware.rollout_tokens={tokens}", "grpo.batch_size=1"]
        run = ["grpo.num_generations=2", "grpo.num_steps=1", "eval.before=true", "tracking=disabled"]
        folder = f"run_dir={tmp_path / str(tokens)}"
        assert launch(*SMALL, *more, *run, "preflight=false", folder, cwd=tmp_path).returncode == 0
        rows = json.loads((tmp_path / str(tokens) / "eval" / "before.json").read_text())["problems"]
        texts.append([row["completion"] for row in rows])
    assert texts[0] == texts[1]


def test_a_baseline_is_compared_problem_by_problem(cwd):
    said, found = evaluated(cwd, "baseline=run/eval/before.json")
    (result,) = found.values()
    by_file = result["baseline"]
    before = {row["problem_id"]: row["correct"] for row in read(cwd, "before")["problems"]}
    after = {row["problem_id"]: row["correct"] for row in result["problems"]}
    assert by_file["gained"] == sum(after[name] and not before[name] for name in after)
    assert by_file["lost"] == sum(before[name] and not after[name] for name in after)
    assert by_file["mean"] == pytest.approx(result["accuracy"] - read(cwd, "before")["accuracy"])
    assert f"({by_file['gained']} gained, {by_file['lost']} lost; McNemar's p = " in said
    _, found = evaluated(cwd, "baseline=tiny")
    (result,) = found.values()
    assert {**result["baseline"], "name": ""} == {**by_file, "name": ""}


def test_a_baseline_on_some_of_the_problems_is_compared_on_these(cwd, tmp_path):
    before = read(cwd, "before")
    other = [{**row, "problem_id": f"x{number}"} for number, row in enumerate(before["problems"])]
    few = {**before, "problems": before["problems"][:1]}
    (tmp_path / "few.json").write_text(json.dumps(few))
    _, found = evaluated(cwd, f"baseline={tmp_path}/few.json")
    (result,) = found.values()
    assert result["baseline"]["n"] == 1
    (tmp_path / "other.json").write_text(json.dumps({**before, "problems": before["problems"][:1] + other[1:]}))
    refused = grpo("evaluate", "run_dir=run", f"baseline={tmp_path}/other.json", cwd=cwd)
    assert refused.returncode == 2
    assert "other.json has 1 of the 4 problems of this evaluation; evaluate it on the same data" in refused.stderr


def test_several_sets_are_evaluated_with_the_prompts_of_the_run(cwd):
    said, found = evaluated(cwd, "eval.sets=[arithmetic]", "eval.max_problems=5", "eval.by=[]")
    (result,) = found.values()
    assert (result["set"], result["n"]) == ("arithmetic", 5)
    assert "arithmetic, test problems" in said


def test_sets_do_not_need_the_data_of_the_config(tmp_path):
    """The default data is on the hub, which cannot be reached here."""
    own = ["model=tiny", "tuning=full", "hardware=cpu", "eval.max_problems=3", "data=jsonl", "data.path=/no/such"]
    done = grpo("evaluate", *own, "data.system_prompt=null", "eval.sets=[arithmetic]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "(n=3)" in done.stdout


def test_sets_can_be_in_a_folder_of_the_user(cwd, tmp_path):
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "mine.yaml").write_text("defaults:\n  - arithmetic\n")
    search = f"hydra.searchpath=[file://{tmp_path}/conf]"
    _, found = evaluated(cwd, search, "eval.sets=[mine]", "eval.max_problems=3")
    (result,) = found.values()
    assert (result["set"], result["n"]) == ("mine", 3)


def test_square_brackets_in_names_and_values_are_printed_as_they_are(tmp_path):
    for split in ("train", "test"):
        rows = [{"question": f"What is 1{i} + 12?", "answer": "7", "level": "[/INST]"} for i in range(30)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ["experiment=quickstart", "data=jsonl", f"data.path={tmp_path}", "eval.max_problems=3", "eval.by=[level]"]
    own += ["data.system_prompt=null"]
    done = grpo("evaluate", *own, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "level=[/INST]" in done.stdout


def test_the_validation_problems_of_a_run_cannot_be_others(cwd, tmp_path):
    refused = grpo("evaluate", "run_dir=run", "split=validation", "data.validation_share=0.5", cwd=cwd)
    assert refused.returncode == 2
    assert "data.validation_share=0.5: the run was trained with" in refused.stderr


def test_votes_are_what_the_completions_answer():
    block, text = "<answer>17</answer>", "<reasoning>9 * 2</reasoning> The answer is 18."
    assert [_tagged_answer(each) for each in (block, text, "It is 18.")] == [17, None, None]
    assert _tagged_answer("<answer></answer>") is None
    assert _tagged_answer("<answer>a cat</answer>") == "a cat"
    letters = "<reasoning>There are 3 apples.</reasoning><answer>B</answer>"
    assert [_any_answer(each) for each in (letters, "3 apples: \\boxed{B}", "It is 18.")] == ["B", 3, 18]


def test_votes_are_read_as_the_accuracy_reads_answers(cwd):
    several = ["eval.samples=3", "eval.temperature=1"]
    lenient = "++eval.accuracy={_target_: grpo.rewards.lenient.lenient}"
    _, found = evaluated(cwd, *several, lenient)
    (result,) = found.values()
    assert result["grader"] == {"_target_": "grpo.rewards.lenient.lenient"}
    for_one = {}
    for row in result["problems"]:
        for_one.setdefault(row["problem_id"], []).append((final_answer(row["completion"]), row["correct"]))
    texts = [row["completion"] for row in result["problems"]]
    assert [_tagged_answer(text) for text in texts] != [final_answer(text) for text in texts]
    shares = [majority_share(*zip(*each, strict=True)) for each in for_one.values()]
    assert result["maj@k"]["3"]["share"] == pytest.approx(sum(shares) / len(shares))


def test_a_set_with_the_data_of_the_run_keeps_its_validation_problems(cwd, tmp_path):
    _, found = evaluated(cwd, "split=validation")
    (own,) = found.values()
    path = yaml.safe_load((cwd / "run" / "config.yaml").read_text())["data"]["path"]
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "same.yaml").write_text(
        f"defaults:\n  - jsonl\npath: {path}\nvalidation_share: 0.5\n"
    )
    search = f"hydra.searchpath=[file://{tmp_path}/conf]"
    _, found = evaluated(cwd, "split=validation", search, "eval.sets=[same]")
    (as_set,) = found.values()
    assert as_set["problems"] == own["problems"]


def test_completions_are_sampled_once_also_after_a_kill(tmp_path):
    own = [*SMALL, "grpo.num_steps=1", "grpo.batch_size=2", "grpo.num_generations=2", "tracking=disabled"]
    own += ["preflight=false", "hardware.rollout_tokens=100"]  # four completions at once
    assert launch(*own, "run_dir=straight", cwd=tmp_path).returncode == 0
    (store,) = tmp_path.glob("outputs/evaluations/*.jsonl")
    whole = store.read_text()
    store.unlink()
    assert launch(*own, "run_dir=killed", cwd=tmp_path, fault=(APPEND, "2", "kill")).returncode == -9
    kept = store.read_text()
    assert 0 < len(kept.split()) < len(whole.split())
    store.write_text(kept + '{"prompt": "torn')
    assert resume(tmp_path / "killed").returncode == 0
    rows = [json.loads(line) for line in store.read_text().splitlines() if line.endswith("]}")]
    assert [json.dumps(row, separators=(",", ":")) for row in rows] == whole.split()
    straight, killed = (
        json.loads((tmp_path / name / "eval" / "before.json").read_text()) for name in ("straight", "killed")
    )
    assert straight == killed


def test_the_jobs_of_a_sweep_evaluate_the_untrained_model_once(tmp_path):
    own = [*SHORT, "eval.before=true", "grpo.num_steps=1", "hydra/launcher=basic", "sweep_dir=sweep"]
    done = launch("-m", *own, "seed=1,2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (store,) = tmp_path.glob("outputs/evaluations/*.jsonl")
    assert len(store.read_text().split()) == 4  # one line for each test problem
    before = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("sweep/*/eval/before.json"))]
    assert len(before) == 2
    assert before[0] == before[1]


def test_a_run_with_only_its_best_weights_offers_them(cwd, tmp_path):
    run = shutil.copytree(cwd / "run", tmp_path / "run")
    shutil.rmtree(run / "final_model")
    for folder in run.glob("checkpoints/step_*"):
        shutil.rmtree(folder)
    refused = grpo("evaluate", "run_dir=run", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].endswith("for its best weights checkpoint=best")
    assert grpo("evaluate", "run_dir=run", "checkpoint=best", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval.samples=0"], "eval.samples=0: must be 1 or more"),
        (["eval.samples=4"], "eval.temperature=0 gives 4 times the same completion; set eval.temperature=1"),
        (["split=dev"], "split=dev: must be one of test, validation, train"),
        (["split=validation", "data.validation_share=0"], "data has no validation problems to evaluate on"),
        (["baseline=missing.json"], "baseline=missing.json: there is no such file"),
        (["baseline=other.json"], "has none of the 12 problems of this evaluation; evaluate it on the same data"),
        (
            ["baseline=graded.json"],
            "baseline=graded.json has grader={'_target_': 'a.b'}, and this evaluation {",
        ),
        (["baseline=empty.json"], "baseline=empty.json has no rewards; evaluate it again"),
        (["baseline=sampled.json"], "baseline=sampled.json has samples=4, and this evaluation 1"),
        (["baseline=hot.json"], "baseline=hot.json has temperature=1.0, and this evaluation 0"),
        (["baseline=short.json"], "baseline=short.json has max_completion_length=7, and this evaluation 40"),
        (["baseline=run"], "baseline=run: give an evaluation, such as run/eval/after.json, or a model, such as run/"),
        (["baseline="], "baseline=: give an evaluation, such as RUN/eval/after.json"),
        (["eval.sets=[arithmetic,missing]", "hydra.searchpath=[file://conf]"], "data.path=/no/such folder"),
        (["eval.by=[level]"], "eval.by: the data has no column level; it has none besides question and answer"),
        (["eval.sets=[nothing]"], "nothing"),
        (["+eval.graders.x={}"], "eval.graders.x needs a _target_"),
        (["eval.sets=[../x]"], "eval.sets: ../x is not the name of a file in conf/data/"),
        (["+eval.graders.accuracy._target_=a.b"], "eval.graders.accuracy: this name is that of eval.accuracy"),
        (
            ["eval.sets=[arithmetic,mine]", "hydra.searchpath=[file://conf]", "baseline=other.json"],
            "baseline=other.json is of one set, and this evaluation of arithmetic, mine; give a model, or one set",
        ),
    ],
)
def test_an_impossible_evaluation_is_refused_in_one_line(tmp_path, arguments, said):
    problems = [{"problem_id": "a", "answer": "1", "correct": True}]
    record = {"split": "test", "step": 0, "n": 1, "accuracy": 1.0, "reward": 1.0, "problems": problems}
    record |= {"rewards": {}, "completions/mean_length": 1.0, "completions/clipped_ratio": 0.0}
    (tmp_path / "graded.json").write_text(json.dumps({"version": 2, **record, "grader": {"_target_": "a.b"}}))
    (tmp_path / "empty.json").write_text(json.dumps({"version": 2, **record, "rewards": None}))
    conf = tmp_path / "conf" / "data"
    conf.mkdir(parents=True)
    (conf / "mine.yaml").write_text("defaults:\n  - arithmetic\n")
    (conf / "missing.yaml").write_text("defaults:\n  - jsonl\npath: /no/such folder\n")
    (tmp_path / "other.json").write_text(json.dumps({"version": 2, **record}))
    (tmp_path / "sampled.json").write_text(json.dumps({"version": 2, **record, "samples": 4}))
    (tmp_path / "hot.json").write_text(json.dumps({"version": 2, **record, "temperature": 1.0}))
    (tmp_path / "short.json").write_text(json.dumps({"version": 2, **record, "max_completion_length": 7}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("version: 1\n")
    refused = grpo("evaluate", *SMALL, *arguments, cwd=tmp_path)
    assert refused.returncode == 2
    assert not (tmp_path / "outputs").exists()  # nothing was sampled
    assert said in refused.stderr.splitlines()[-1]
