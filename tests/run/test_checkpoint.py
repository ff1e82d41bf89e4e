"""Checkpoints: bitwise round trips, damage of every kind, interrupted saves, and what is kept."""

import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch
from safetensors import safe_open
from torch import nn

from grpo.config import ModelConfig
from grpo.engine.model import load_model
from grpo.run.checkpoint import (
    TrainerState,
    broken,
    digest,
    keep_last,
    latest_checkpoint,
    load_optimizer,
    load_state,
    load_weights,
    save_best,
    save_checkpoint,
    step_folders,
    weights_of,
)

FILES = ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "manifest.json"]


def small_model():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.99))


def train_a_step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def bits(tensors):
    return {name: tensor.detach().contiguous().view(torch.uint8).tolist() for name, tensor in tensors.items()}


def save_steps(folder, *steps):
    """Checkpoints of a small model after these steps."""
    model = small_model()
    optimizer = adamw(model)
    for step in steps:
        train_a_step(model, optimizer, seed=step)
        save_checkpoint(folder, model, optimizer, None, TrainerState(step=step, iteration=1))
    return model, optimizer


def test_weights_and_optimizer_of_a_language_model_come_back_bitwise(tmp_path):
    config = ModelConfig("tiny", "sdpa", "float32", "auto", False)
    model = load_model(config, torch.device("cpu"))
    optimizer = adamw(model)
    for seed in (1, 2):
        train_a_step(model, optimizer, seed)
    state = TrainerState(step=2, iteration=1, num_tokens=77, best_reward=1.5)
    checkpoint = save_checkpoint(tmp_path, model, optimizer, None, state)

    fresh = load_model(config, torch.device("cpu"))
    fresh_optimizer = adamw(fresh)
    assert digest(weights_of(fresh)) != digest(weights_of(model))
    load_weights(checkpoint, fresh)
    load_optimizer(checkpoint, fresh_optimizer)
    assert digest(weights_of(fresh)) == digest(weights_of(model)) == load_state(checkpoint).weights_digest
    assert load_state(checkpoint) == state

    for one in (model, fresh):
        train_a_step(one, optimizer if one is model else fresh_optimizer, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        for name, value in optimizer.state[ours].items():
            assert torch.equal(value, fresh_optimizer.state[theirs][name])
            assert value.dtype == fresh_optimizer.state[theirs][name].dtype


def test_special_values_survive_bit_for_bit(tmp_path):
    model = small_model()
    with torch.no_grad():
        model.weight.view(torch.int32).copy_(torch.tensor([[1, -2147483648, 0x7F800000], [-1, 0x7FC00001, 12345]]))
    checkpoint = save_checkpoint(tmp_path, model, adamw(model), None, TrainerState(step=1))
    fresh = nn.Linear(3, 2)
    load_weights(checkpoint, fresh)
    assert bits(weights_of(fresh)) == bits(weights_of(model))


def test_low_precision_weights_keep_their_dtype(tmp_path):
    model = small_model().to(torch.bfloat16)
    checkpoint = save_checkpoint(tmp_path, model, adamw(model), None, TrainerState(step=1))
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert file.get_tensor("weight").dtype == torch.bfloat16


def test_the_reference_is_saved_only_where_it_is_given(tmp_path):
    model, reference = small_model(), nn.Linear(3, 2)
    without = save_checkpoint(tmp_path, model, adamw(model), None, TrainerState(step=1))
    with_it = save_checkpoint(tmp_path, model, adamw(model), reference, TrainerState(step=2))
    assert sorted(path.name for path in without.iterdir()) == sorted(FILES)
    fresh = nn.Linear(3, 2)
    load_weights(with_it, fresh, "reference")
    assert bits(weights_of(fresh)) == bits(weights_of(reference))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    with_bias, without = nn.Linear(3, 2), nn.Linear(3, 2, bias=False)
    for step, ours, theirs in ((1, with_bias, without), (2, without, with_bias)):
        checkpoint = save_checkpoint(tmp_path, ours, adamw(ours), None, TrainerState(step=step))
        with pytest.raises(RuntimeError, match=r"does not fit the model: .*bias"):
            load_weights(checkpoint, theirs)


def test_a_checkpoint_holds_no_pickle(tmp_path):
    save_steps(tmp_path, 1)
    save_best(tmp_path, small_model(), TrainerState(step=1))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 7
    for file in files:
        assert not zipfile.is_zipfile(file)  # what torch.save makes
        assert b"__reduce__" not in file.read_bytes()
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                assert list(tensors.keys())
        else:
            assert isinstance(json.loads(file.read_text()), dict)


def test_the_digest_tells_names_types_shapes_and_values_apart_but_not_order():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    assert digest({"a": a, "b": b}) == digest({"b": b, "a": a})
    others = [{"a": b, "b": a}, {"a": a, "c": b}, {"a": a.view(2, 1), "b": b}, {"a": a.view(torch.int32), "b": b}]
    others += [{"a": torch.tensor([1.0, -2.0]), "b": b}, {"a": a}, {"a": a, "b": b.squeeze()}]
    assert len({digest(each) for each in [{"a": a, "b": b}, *others]}) == 1 + len(others)


# Damage.


def truncate(file):
    os.truncate(file, file.stat().st_size - 1)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, os.remove], ids=["truncated", "bit-flipped", "missing"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, damage, name):
    save_steps(tmp_path, 1, 2)
    assert latest_checkpoint(tmp_path).name == "step_000002"
    damage(tmp_path / "step_000002" / name)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path).name == "step_000001"
    (record,) = caplog.records
    assert "step_000002 is damaged" in record.getMessage()
    assert (tmp_path / "step_000002").is_dir()


@pytest.mark.parametrize("content", ["null", "[]", "{}", '{"files": []}', "\0"])
def test_a_manifest_that_says_nothing_is_damage(tmp_path, content):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "step_000002" / "manifest.json").write_text(content)
    assert latest_checkpoint(tmp_path).name == "step_000001"


def test_where_none_is_intact_that_is_said_and_nothing_is_deleted(tmp_path):
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        truncate(tmp_path / f"step_{step:06d}" / "model.safetensors")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(RuntimeError, match=r"none of the 2 checkpoints in .* is intact; nothing was deleted"):
        latest_checkpoint(tmp_path)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_without_any_checkpoint_there_is_none_and_no_error(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "not there") is None


def test_an_intact_checkpoint_has_nothing_wrong_and_the_reason_names_the_file(tmp_path):
    save_steps(tmp_path, 1)
    checkpoint = tmp_path / "step_000001"
    assert broken(checkpoint) is None
    flip_a_bit(checkpoint / "optimizer.safetensors")
    assert broken(checkpoint) == "optimizer.safetensors does not match its checksum"


# Interrupted saves.


def test_a_left_over_of_an_interrupted_save_is_never_chosen_and_goes_with_the_next_save(tmp_path):
    model, optimizer = save_steps(tmp_path, 1)
    for name in ("step_000002.tmp", "best.tmp"):
        shutil.copytree(tmp_path / "step_000001", tmp_path / name)
    assert [path.name for path in step_folders(tmp_path)] == ["step_000001"]
    assert latest_checkpoint(tmp_path).name == "step_000001"
    save_checkpoint(tmp_path, model, optimizer, None, TrainerState(step=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000003"]


def test_a_step_that_is_saved_again_replaces_the_damaged_one(tmp_path):
    model, optimizer = save_steps(tmp_path, 1, 2)
    truncate(tmp_path / "step_000002" / "model.safetensors")
    save_checkpoint(tmp_path, model, optimizer, None, TrainerState(step=2))
    assert latest_checkpoint(tmp_path).name == "step_000002"


def test_a_save_killed_at_any_file_operation_leaves_the_one_before_or_the_new_one(tmp_path):
    # Each child dies at its n-th event that touches files in the folder: opening, renaming, making a folder.
    code = """
        import os, sys
        from pathlib import Path
        import torch
        from grpo.run.checkpoint import TrainerState, save_checkpoint
        folder = Path(sys.argv[1])
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        for n in range(1, 41):
            child = os.fork()
            if child == 0:
                count = 0
                def die_at_the_nth(event, arguments):
                    global count
                    if event in ("open", "os.rename", "os.mkdir") and str(folder) in str(arguments[0]):
                        count += 1
                        if count == n:
                            os._exit(9)
                sys.addaudithook(die_at_the_nth)
                save_checkpoint(folder / str(n), model, optimizer, None, TrainerState(step=2))
                os._exit(0)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
                break
        print(n)
    """
    save_steps(tmp_path / "first", 1)
    for n in range(1, 41):
        shutil.copytree(tmp_path / "first", tmp_path / "kills" / str(n))
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "kills")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    complete = int(process.stdout)  # the first n beyond the operations of a save: that child was not killed
    assert 5 < complete < 40
    newest = [latest_checkpoint(tmp_path / "kills" / str(n)).name for n in range(1, complete + 1)]
    assert newest[-1] == "step_000002"
    assert newest[0] == "step_000001"
    assert set(newest) == {"step_000001", "step_000002"}


# What is kept.


def test_the_last_checkpoints_and_the_best_one_are_kept(tmp_path):
    model, _ = save_steps(tmp_path, 1, 2, 30, 100)
    save_best(tmp_path, model, TrainerState(step=2))
    keep_last(tmp_path / "step_000100", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step_000030", "step_000100"]
    keep_last(tmp_path / "step_000100", 5)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_last_intact_checkpoint_is_kept_where_a_later_one_is_damaged(tmp_path):
    save_steps(tmp_path, 50, 60, 100)
    truncate(tmp_path / "step_000100" / "model.safetensors")
    keep_last(tmp_path / "step_000060", 1)  # written by a run that went on from step 50
    assert not (tmp_path / "step_000050").exists()
    assert latest_checkpoint(tmp_path).name == "step_000060"


def test_best_is_replaced_whole(tmp_path):
    model, optimizer = small_model(), adamw(small_model())
    save_best(tmp_path, model, TrainerState(step=1, best_accuracy=0.25))
    with torch.no_grad():
        model.weight.fill_(7.0)
    save_best(tmp_path, model, TrainerState(step=5, best_accuracy=0.5))
    fresh = nn.Linear(3, 2)
    load_weights(tmp_path / "best", fresh)
    assert fresh.weight.tolist() == [[7.0] * 3] * 2
    assert load_state(tmp_path / "best").best_accuracy == 0.5
    assert broken(tmp_path / "best") is None
    save_checkpoint(tmp_path, model, optimizer, None, TrainerState(step=6))
    assert (tmp_path / "best").is_dir()


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, caplog):
    save_steps(tmp_path, 1, 2, 3)
    (tmp_path / "step_000001").rename(tmp_path / "elsewhere")
    (tmp_path / "step_000001").symlink_to(tmp_path / "elsewhere")  # rmtree refuses links
    keep_last(tmp_path / "step_000003", 1)
    assert "could not delete the old checkpoint" in caplog.text
    assert not (tmp_path / "step_000002").exists()
    assert latest_checkpoint(tmp_path).name == "step_000003"
