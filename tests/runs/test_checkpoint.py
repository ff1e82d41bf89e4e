"""Checkpoints: bitwise round trips, damage of every kind, interrupted saves, and which ones are kept."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile
from contextlib import closing

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import grpo.algorithm.optimizer
from grpo.config.errors import ConfigError, FileError
from grpo.config.schema import CheckpointConfig, ModelConfig
from grpo.rollout.load_check import load_checked_model
from grpo.runs.checkpoint import (
    StoredTensors,
    TrainerState,
    find_damage,
    latest_checkpoint,
    load_state,
    load_weights,
    read_checkpoint,
    reference_of,
    step_folder,
    step_folders,
    weights_of,
)
from grpo.runs.checkpoint_writer import TRIES, CheckpointWriter, retain
from grpo.runs.optimizer_state import check_optimizer, flatten_optimizer, load_optimizer

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
    return {name: tensor.detach().reshape(-1).view(torch.uint8).tolist() for name, tensor in tensors.items()}


def settings(keep_last=100, keep_every=0, overlap=False):
    return CheckpointConfig(every=1, keep_last=keep_last, keep_every=keep_every, keep_best=True, overlap=overlap)


def saved(model, optimizer, reference, state):
    """The contents that a trainer passes to the writer of checkpoints."""
    return {
        "model": weights_of(model),
        "optimizer": flatten_optimizer(optimizer),
        "reference": None if reference is None else weights_of(reference),
        "trainer": state,
    }


def save_checkpoint(folder, model, optimizer, reference, state):
    """Save a checkpoint as a new run does; returns its folder."""
    with closing(CheckpointWriter(folder, settings(), TrainerState())) as saver:
        saver.save(saved(model, optimizer, reference, state))
    return step_folder(folder, state.step)


def save_best(folder, model, state):
    CheckpointWriter(folder, settings(), TrainerState()).save_best({"model": weights_of(model), "trainer": state})


def stored(folder, name="model"):
    return StoredTensors(folder / f"{name}.safetensors")


def save_steps(folder, *steps):
    """Save checkpoints of a small model after these steps; returns the model and its optimizer."""
    model = small_model()
    optimizer = adamw(model)
    for step in steps:
        train_a_step(model, optimizer, seed=step)
        save_checkpoint(folder, model, optimizer, None, TrainerState(step=step, iteration=1))
    return model, optimizer


def test_weights_and_optimizer_of_a_language_model_are_restored_bitwise(tmp_path):
    config = ModelConfig("tiny", "sdpa", "float32", "auto", False)
    model = load_checked_model(config, torch.device("cpu"))
    optimizer = adamw(model)
    for seed in (1, 2):
        train_a_step(model, optimizer, seed)
    state = TrainerState(step=2, iteration=1, num_tokens=77, best_reward=1.5)
    checkpoint = save_checkpoint(tmp_path, model, optimizer, None, state)

    fresh = load_checked_model(config, torch.device("cpu"))
    fresh_optimizer = adamw(fresh)
    assert not torch.equal(fresh.model.norm.weight, model.model.norm.weight)
    load_weights(stored(checkpoint), fresh)
    load_optimizer(stored(checkpoint, "optimizer"), fresh_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    assert load_state(checkpoint) == state

    for one in (model, fresh):
        train_a_step(one, optimizer if one is model else fresh_optimizer, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        for name, value in optimizer.state[ours].items():
            assert torch.equal(value, fresh_optimizer.state[theirs][name])
            assert value.dtype == fresh_optimizer.state[theirs][name].dtype


def test_special_float_values_are_restored_bit_for_bit(tmp_path):
    model = small_model()
    with torch.no_grad():
        model.weight.view(torch.int32).copy_(torch.tensor([[1, -2147483648, 0x7F800000], [-1, 0x7FC00001, 12345]]))
    checkpoint = save_checkpoint(tmp_path, model, adamw(model), None, TrainerState(step=1))
    fresh = nn.Linear(3, 2)
    load_weights(stored(checkpoint), fresh)
    assert bits(weights_of(fresh)) == bits(weights_of(model))


def test_low_precision_weights_keep_their_dtype(tmp_path):
    model = small_model().to(torch.bfloat16)
    checkpoint = save_checkpoint(tmp_path, model, adamw(model), None, TrainerState(step=1))
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert file.get_tensor("weight").dtype == torch.bfloat16


def test_the_reference_is_stored_once_per_iteration_and_deleted_with_the_last_checkpoint_that_needs_it(tmp_path):
    model, reference = small_model(), nn.Linear(3, 2)
    optimizer = adamw(model)
    saver = CheckpointWriter(tmp_path, settings(keep_last=2), TrainerState())
    saver.save(saved(model, optimizer, None, TrainerState(step=1, iteration=1)))
    saver.save(saved(model, optimizer, reference, TrainerState(step=2, iteration=2)))
    assert sorted(path.name for path in step_folder(tmp_path, 1).iterdir()) == sorted(FILES)
    assert sorted(path.name for path in step_folder(tmp_path, 2).iterdir()) == sorted(FILES)
    assert reference_of(step_folder(tmp_path, 1)) is None
    reference_folder = reference_of(step_folder(tmp_path, 2))
    assert reference_folder.name == "reference_000002"
    written = (reference_folder / "model.safetensors").stat()
    saver.save(saved(model, optimizer, reference, TrainerState(step=3, iteration=2)))
    assert (reference_folder / "model.safetensors").stat() == written
    assert reference_of(step_folder(tmp_path, 3)) == reference_folder
    fresh = nn.Linear(3, 2)
    load_weights(stored(reference_folder), fresh)
    assert bits(weights_of(fresh)) == bits(weights_of(reference))

    saver.save(saved(model, optimizer, reference, TrainerState(step=4, iteration=3)))
    assert reference_folder.exists()  # step 3 needs it
    saver.save(saved(model, optimizer, reference, TrainerState(step=5, iteration=3)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reference_000003", "step_000004", "step_000005"]


def test_a_checkpoint_with_a_damaged_reference_counts_as_damaged(tmp_path):
    model = small_model()
    checkpoint = save_checkpoint(tmp_path, model, adamw(model), model, TrainerState(step=2, iteration=2))
    assert find_damage(checkpoint) is None
    flip_a_bit(tmp_path / "reference_000002" / "model.safetensors")
    assert find_damage(checkpoint) == "its reference reference_000002: model.safetensors does not match its checksum"


def test_a_resumed_run_does_not_write_its_reference_again(tmp_path):
    model = small_model()
    save_checkpoint(tmp_path, model, adamw(model), model, TrainerState(step=2, iteration=2))
    written = (tmp_path / "reference_000002" / "model.safetensors").stat()
    saver = CheckpointWriter(tmp_path, settings(), TrainerState(step=2, iteration=2))
    saver.save(saved(model, adamw(model), model, TrainerState(step=3, iteration=2)))
    assert (tmp_path / "reference_000002" / "model.safetensors").stat() == written
    assert find_damage(step_folder(tmp_path, 3)) is None


def test_the_state_of_sgd_is_restored_too(tmp_path):
    for momentum in (0.0, 0.9):
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        train_a_step(model, optimizer, seed=1)
        folder = tmp_path / str(momentum)
        checkpoint = save_checkpoint(folder, model, optimizer, None, TrainerState(step=1))
        fresh = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        load_optimizer(stored(checkpoint, "optimizer"), fresh)
        assert bits(flatten_optimizer(fresh)) == bits(flatten_optimizer(optimizer))
        assert bool(flatten_optimizer(fresh)) == (momentum > 0)


class WithNumbers(torch.optim.Optimizer):
    """An optimizer with plain numbers in its groups and its state, like Prodigy and schedule-free optimizers."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "d": 1e-6, "k": 0, "kept": True})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["k"] += 1
            group["d"] *= 1.1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["sum"] = state.get("sum", 0.0) + 0.1
                state["count"] = state.get("count", 0) + 1
                parameter.add_(parameter.grad, alpha=-group["lr"] * group["d"] * state["sum"])


def test_plain_numbers_that_an_optimizer_keeps_are_restored_exactly(tmp_path):
    model = small_model()
    optimizer = WithNumbers(model.parameters())
    for seed in (1, 2, 3):
        train_a_step(model, optimizer, seed)
    assert sorted(flatten_optimizer(optimizer)) == ["0.count", "0.sum", "1.count", "1.sum", "group.0.d", "group.0.k"]
    checkpoint = save_checkpoint(tmp_path, model, optimizer, None, TrainerState(step=1))
    check_optimizer(read_checkpoint(checkpoint), WithNumbers(model.parameters(), lr=0.7))
    fresh = WithNumbers(model.parameters(), lr=0.7)
    load_optimizer(stored(checkpoint, "optimizer"), fresh)
    expected = optimizer.state_dict()
    expected["param_groups"][0]["lr"] = 0.7  # a setting, which comes from the config
    assert fresh.state_dict() == expected
    assert all(type(value) in (int, float) for state in fresh.state.values() for value in state.values())


@pytest.mark.parametrize("name", ["AdamW", "SGD", "NAdam", "Adafactor", "MuonWithAdamW", "StochasticAdamW"])
def test_optimizer_settings_are_not_saved_as_state_and_the_checkpoint_fits_its_optimizer(tmp_path, name):
    make = getattr(torch.optim, name, None) or getattr(grpo.algorithm.optimizer, name)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
    optimizer = make(list(model.named_parameters()), lr=0.1)
    train_a_step(model, optimizer, seed=1)
    assert not any(key.startswith("group") for key in flatten_optimizer(optimizer))
    checkpoint = save_checkpoint(tmp_path, model, optimizer, None, TrainerState(step=1))
    check_optimizer(read_checkpoint(checkpoint), make(list(model.named_parameters()), lr=0.1))


CHANGES = {
    "shape": lambda entries: entries | {"0.exp_avg": torch.zeros(2, 2)},
    "type": lambda entries: entries | {"1.exp_avg_sq": torch.zeros(2, dtype=torch.uint8)},
    "name": lambda entries: {key.replace("0.exp_avg", "0.average"): value for key, value in entries.items()},
    "number": lambda entries: entries | {"2.step": torch.tensor(1.0)},
    "no number": lambda entries: entries | {"x": torch.tensor(1.0)},
    "group": lambda entries: entries | {"group.0.params": torch.tensor(1.0)},
    "empty": lambda entries: {},
}


@pytest.mark.parametrize("change", CHANGES)
def test_optimizer_state_that_does_not_fit_is_refused_before_it_is_loaded(tmp_path, change):
    model = small_model()
    optimizer = adamw(model)
    train_a_step(model, optimizer, seed=1)
    checkpoint = save_checkpoint(tmp_path, model, optimizer, None, TrainerState(step=1))
    save_file(CHANGES[change](flatten_optimizer(optimizer)), checkpoint / "optimizer.safetensors")
    with pytest.raises(ConfigError, match=r"optimizer\.safetensors is not the state of this optimizer and model: "):
        check_optimizer(read_checkpoint(checkpoint), adamw(small_model()))


def test_a_run_whose_steps_were_all_skipped_has_an_empty_optimizer_state_that_can_be_loaded(tmp_path):
    model = small_model()
    checkpoint = save_checkpoint(tmp_path, model, adamw(model), None, TrainerState(step=2, skipped_in_a_row=2))
    check_optimizer(read_checkpoint(checkpoint), adamw(small_model()))
    fresh = adamw(model)
    load_optimizer(stored(checkpoint, "optimizer"), fresh)
    assert len(fresh.state) == 0


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    with_bias, without = nn.Linear(3, 2), nn.Linear(3, 2, bias=False)
    for step, ours, theirs in ((1, with_bias, without), (2, without, with_bias)):
        checkpoint = save_checkpoint(tmp_path, ours, adamw(ours), None, TrainerState(step=step))
        with pytest.raises(FileError, match=r"does not fit the model(, which has no|: it lacks) bias"):
            load_weights(stored(checkpoint), theirs)


def test_a_checkpoint_contains_no_pickle(tmp_path):
    save_steps(tmp_path, 1)
    save_best(tmp_path, small_model(), TrainerState(step=1))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 7
    for file in files:
        assert not zipfile.is_zipfile(file)  # the format of torch.save
        assert b"__reduce__" not in file.read_bytes()
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                assert list(tensors.keys())
        else:
            assert isinstance(json.loads(file.read_text()), dict)


# Damage.


def truncate(file):
    os.truncate(file, file.stat().st_size - 1)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, os.remove], ids=["truncated", "bit-flipped", "missing"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, caplog, damage, name):
    save_steps(tmp_path, 1, 2)
    assert latest_checkpoint(tmp_path).name == "step_000002"
    damage(tmp_path / "step_000002" / name)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path).name == "step_000001"
    (record,) = caplog.records
    assert "step_000002 is damaged" in record.getMessage()
    assert (tmp_path / "step_000002").is_dir()


@pytest.mark.parametrize(
    "content",
    [
        "null",
        "[]",
        "{}",
        '{"files": []}',
        "\0",
        '{"files": {}}',
        "[" * 99999,
        '{"files": {"model.safetensors": 3, "optimizer.safetensors": 3, "trainer_state.json": 3}}',
    ],
)
def test_a_checkpoint_with_an_unusable_manifest_counts_as_damaged(tmp_path, content):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "step_000002" / "manifest.json").write_text(content)
    assert latest_checkpoint(tmp_path).name == "step_000001"


@pytest.mark.parametrize("name", ["../step_000002/model.safetensors", "/dev/zero", "pipe", "."])
def test_a_manifest_may_name_only_plain_files_of_its_own_folder(tmp_path, name):
    save_steps(tmp_path, 1, 2)
    os.mkfifo(tmp_path / "step_000001" / "pipe")
    manifest = json.loads((tmp_path / "step_000001" / "manifest.json").read_text())
    manifest["files"][name] = {"size": 0, "sha256": "0"}
    (tmp_path / "step_000001" / "manifest.json").write_text(json.dumps(manifest))
    assert find_damage(tmp_path / "step_000001") == f"{name} is not a file in it"


@pytest.mark.parametrize("reference", ["step_000001", "../elsewhere", "/", 3, ["x"]])
def test_a_manifest_may_name_only_a_reference_folder_next_to_it(tmp_path, reference):
    save_steps(tmp_path, 1)
    manifest = json.loads((tmp_path / "step_000001" / "manifest.json").read_text())
    (tmp_path / "step_000001" / "manifest.json").write_text(json.dumps(manifest | {"reference": reference}))
    assert find_damage(tmp_path / "step_000001") == f"{reference} is not a reference"


def test_checkpoints_are_ordered_by_step_beyond_a_million(tmp_path):
    save_steps(tmp_path, 999_999, 1_000_000)
    assert [path.name for path in step_folders(tmp_path)] == ["step_999999", "step_1000000"]
    assert latest_checkpoint(tmp_path).name == "step_1000000"
    retain(tmp_path / "step_1000000", settings(keep_last=1))
    assert [path.name for path in step_folders(tmp_path)] == ["step_1000000"]


def test_a_manual_copy_does_not_count_as_a_checkpoint_and_is_not_deleted(tmp_path):
    save_steps(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000001_mine")
    retain(tmp_path / "step_000002", settings(keep_last=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001_mine", "step_000002"]
    assert latest_checkpoint(tmp_path).name == "step_000002"


def test_if_no_checkpoint_is_intact_an_error_says_so_and_nothing_is_deleted(tmp_path):
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        truncate(tmp_path / f"step_{step:06d}" / "model.safetensors")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(FileError, match=r"none of the 2 checkpoints in .* is intact; nothing was deleted"):
        latest_checkpoint(tmp_path)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_without_any_checkpoint_latest_checkpoint_returns_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "not there") is None


def test_find_damage_returns_none_or_names_the_damaged_file(tmp_path):
    save_steps(tmp_path, 1)
    checkpoint = tmp_path / "step_000001"
    assert find_damage(checkpoint) is None
    flip_a_bit(checkpoint / "optimizer.safetensors")
    assert find_damage(checkpoint) == "optimizer.safetensors does not match its checksum"


# Interrupted saves.


def test_leftovers_of_an_interrupted_save_are_never_loaded_and_are_deleted_by_the_next_save(tmp_path):
    model, optimizer = save_steps(tmp_path, 1)
    for name in ("step_000002.tmp", "best.tmp"):
        shutil.copytree(tmp_path / "step_000001", tmp_path / name)
    assert [path.name for path in step_folders(tmp_path)] == ["step_000001"]
    assert latest_checkpoint(tmp_path).name == "step_000001"
    save_checkpoint(tmp_path, model, optimizer, None, TrainerState(step=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000003"]


def test_files_of_the_user_in_the_folder_are_kept_and_do_not_block_a_save(tmp_path):
    (tmp_path / "notes.tmp").write_text("mine")
    (tmp_path / "step_000001.old").mkdir()
    (tmp_path / "step_1.tmp").mkdir()
    (tmp_path / "reference_of_mine").mkdir()
    (tmp_path / "step_000001.tmp").write_text("a file where the folder will be")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "best.tmp").symlink_to("elsewhere")
    save_steps(tmp_path, 1)
    left = ["elsewhere", "notes.tmp", "reference_of_mine", "step_000001", "step_000001.old", "step_1.tmp"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_a_left_over_that_cannot_be_deleted_does_not_block_a_save(tmp_path, caplog):
    busy = tmp_path / "step_000001.tmp"
    busy.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(busy)]).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        save_steps(tmp_path, 1, 2)
    finally:
        subprocess.run(["umount", str(busy)], check=True)
    assert [path.name for path in step_folders(tmp_path)] == ["step_000001", "step_000002"]
    assert "step_000001.tmp is left over from an earlier save and could not be removed" in caplog.text
    assert "could not write" not in caplog.text


@pytest.mark.parametrize("overlap", [False, True], ids=["in the way", "beside training"])
def test_an_unexpected_error_of_a_write_is_a_failed_write(tmp_path, caplog, overlap):
    """For example of CUDA, or of a library. It must not replace the error of a run, nor prevent the next save."""
    model = small_model()
    saver = CheckpointWriter(tmp_path, settings(overlap=overlap), TrainerState())
    broken = saved(model, adamw(model), None, TrainerState(step=1))
    broken["model"] = {"weight": torch.ones(2).to_sparse()}  # safetensors raises ValueError
    saver.save(broken)
    saver.close()
    assert "could not write the checkpoint of step 1" in caplog.text
    saver.save(saved(model, adamw(model), None, TrainerState(step=2)))
    saver.close()
    assert saver.saved_step == 2
    for step in range(3, 3 + TRIES):
        saver.check()
        saver.save(broken | {"trainer": TrainerState(step=step)})
    saver.close()
    with pytest.raises(RuntimeError, match=r"the last 5 checkpoints could not be written to .* \(.*sparse.*\); make"):
        saver.check()
    assert [path.name for path in step_folders(tmp_path)] == ["step_000002"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_files_of_a_checkpoint_have_the_mode_of_other_new_files(tmp_path, umask):
    former = os.umask(umask)
    try:
        save_steps(tmp_path, 1)
    finally:
        os.umask(former)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "step_000001").iterdir()}
    assert modes == dict.fromkeys(FILES, 0o666 & ~umask)


def test_a_run_that_cannot_save_fails_after_several_tries(tmp_path):
    model = small_model()
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    saver = CheckpointWriter(tmp_path / "checkpoints", settings(), TrainerState())
    for step in range(1, TRIES + 1):
        saver.check()
        saver.save(saved(model, adamw(model), None, TrainerState(step=step)))
    with pytest.raises(RuntimeError, match=r"the last 5 checkpoints could not be written to .*make room there"):
        saver.check()
    (tmp_path / "checkpoints").unlink()
    saver.save(saved(model, adamw(model), None, TrainerState(step=9)))
    saver.check()


def test_saving_a_step_again_replaces_its_damaged_checkpoint(tmp_path):
    model, optimizer = save_steps(tmp_path, 1, 2)
    truncate(tmp_path / "step_000002" / "model.safetensors")
    save_checkpoint(tmp_path, model, optimizer, None, TrainerState(step=2))
    assert latest_checkpoint(tmp_path).name == "step_000002"


@pytest.mark.parametrize(
    "overlap", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["in the way", "beside training"]
)
def test_a_save_killed_at_any_file_operation_leaves_the_previous_or_the_new_checkpoint(tmp_path, overlap):
    # Each child exits at its n-th event on files in the folder: opening, renaming, deleting, creating a folder.
    code = """
        import os, sys
        from pathlib import Path
        import torch
        from grpo.config.schema import CheckpointConfig
        from grpo.runs.checkpoint import TrainerState, weights_of
        from grpo.runs.optimizer_state import flatten_optimizer
        from grpo.runs.checkpoint_writer import CheckpointWriter
        folder, overlap = Path(sys.argv[1]), sys.argv[2] == "True"
        settings = CheckpointConfig(every=1, keep_last=1, keep_every=0, keep_best=True, overlap=overlap)
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        events = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
        for n in range(1, 81):
            child = os.fork()
            if child == 0:
                count = 0
                def die_at_the_nth(event, arguments):
                    global count
                    if event in events and (str(folder) in str(arguments[0]) or event in ("os.remove", "os.rmdir")):
                        count += 1
                        if count == n:
                            os._exit(9)
                sys.addaudithook(die_at_the_nth)
                saver = CheckpointWriter(folder / str(n), settings, TrainerState(step=1, iteration=1))
                saver.save({
                    "model": weights_of(model),
                    "optimizer": flatten_optimizer(optimizer),
                    "reference": weights_of(model),
                    "trainer": TrainerState(step=2, iteration=2),
                })
                saver.close()
                os._exit(0)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
                break
        print(n)
    """
    save_steps(tmp_path / "first", 1)
    for n in range(1, 81):
        shutil.copytree(tmp_path / "first", tmp_path / "kills" / str(n))
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "kills"), str(overlap)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    complete = int(process.stdout)  # the first n above the number of operations: this child was not killed
    assert 15 < complete < 80
    newest = [latest_checkpoint(tmp_path / "kills" / str(n)).name for n in range(1, complete + 1)]
    assert newest[-1] == "step_000002"
    assert newest[0] == "step_000001"
    assert newest == sorted(newest)  # the old one up to some operation, then the new one
    for n in range(1, complete + 1):  # the next save gives the same folder, whatever was left
        folder = tmp_path / "kills" / str(n)
        model = small_model()
        saver = CheckpointWriter(folder, settings(keep_last=1), load_state(latest_checkpoint(folder)))
        saver.save(saved(model, adamw(model), model, TrainerState(step=3, iteration=2)))
        assert sorted(path.name for path in folder.iterdir()) == ["reference_000002", "step_000003"]
        assert find_damage(step_folder(folder, 3)) is None


# Writes that fail.


def test_a_save_without_enough_disk_space_is_refused_before_it_starts(tmp_path, caplog, monkeypatch):
    model, optimizer = save_steps(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50))
    save_checkpoint(tmp_path, model, optimizer, None, TrainerState(step=2))
    assert "could not write the checkpoint of step 2 (it takes 1.04e-07 GB and 5e-08 GB are free" in caplog.text
    assert "training continues, the one before it is kept" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


@pytest.mark.parametrize("overlap", [False, True], ids=["in the way", "beside training"])
def test_a_failed_write_leaves_the_previous_checkpoint_and_the_next_save_succeeds(tmp_path, caplog, overlap):
    # The system refuses to write files above a size limit, as it does on a full disk.
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(100_000))

    model = Large()
    optimizer = adamw(model)
    saver = CheckpointWriter(tmp_path, settings(keep_last=1, overlap=overlap), TrainerState())
    saver.save(saved(model, optimizer, None, TrainerState(step=1, iteration=1)))
    saver.close()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        saver.save(saved(model, optimizer, None, TrainerState(step=2, iteration=1)))
        saver.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "could not write the checkpoint of step 2" in caplog.text
    assert "File too large" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert find_damage(step_folder(tmp_path, 1)) is None
    saver.save(saved(model, optimizer, None, TrainerState(step=2, iteration=1)))
    saver.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]


def test_a_checkpoint_folder_that_cannot_be_written_to_gives_a_warning(tmp_path, caplog):
    model = small_model()
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    save_checkpoint(tmp_path / "checkpoints", model, adamw(model), None, TrainerState(step=1))
    assert "could not write the checkpoint of step 1" in caplog.text


def test_a_save_during_training_writes_the_state_from_when_the_save_began(tmp_path):
    model = small_model()
    optimizer = adamw(model)
    train_a_step(model, optimizer, seed=1)
    saver = CheckpointWriter(tmp_path, settings(overlap=True), TrainerState())
    state = TrainerState(step=1, iteration=1)
    expected = bits(weights_of(model)), bits(flatten_optimizer(optimizer))
    saver.save(saved(model, optimizer, None, state))
    train_a_step(model, optimizer, seed=2)
    state.step = 2
    saver.close()
    fresh = nn.Linear(3, 2)
    fresh_optimizer = adamw(fresh)
    load_weights(stored(step_folder(tmp_path, 1)), fresh)
    load_optimizer(stored(step_folder(tmp_path, 1), "optimizer"), fresh_optimizer)
    assert (bits(weights_of(fresh)), bits(flatten_optimizer(fresh_optimizer))) == expected
    assert load_state(step_folder(tmp_path, 1)).step == 1


# Which checkpoints are kept.


def test_the_last_checkpoints_and_the_best_one_are_kept(tmp_path):
    model, _ = save_steps(tmp_path, 1, 2, 30, 100)
    save_best(tmp_path, model, TrainerState(step=2))
    retain(tmp_path / "step_000100", settings(keep_last=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step_000030", "step_000100"]
    retain(tmp_path / "step_000100", settings(keep_last=5))
    assert len(list(tmp_path.iterdir())) == 3


def test_keep_every_keeps_the_checkpoints_of_its_multiples(tmp_path):
    save_steps(tmp_path, 10, 20, 25, 30, 40, 45)
    retain(tmp_path / "step_000045", settings(keep_last=1, keep_every=20))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000020", "step_000040", "step_000045"]


def test_the_last_intact_checkpoint_is_kept_if_a_later_one_is_damaged(tmp_path):
    save_steps(tmp_path, 50, 60, 100)
    truncate(tmp_path / "step_000100" / "model.safetensors")
    retain(tmp_path / "step_000060", settings(keep_last=1))  # written by a run resumed from step 50
    assert not (tmp_path / "step_000050").exists()
    assert latest_checkpoint(tmp_path).name == "step_000060"


def test_the_best_checkpoint_is_replaced_completely(tmp_path):
    model, optimizer = small_model(), adamw(small_model())
    save_best(tmp_path, model, TrainerState(step=1, best_accuracy=0.25))
    with torch.no_grad():
        model.weight.fill_(7.0)
    save_best(tmp_path, model, TrainerState(step=5, best_accuracy=0.5))
    fresh = nn.Linear(3, 2)
    load_weights(stored(tmp_path / "best"), fresh)
    assert fresh.weight.tolist() == [[7.0] * 3] * 2
    assert load_state(tmp_path / "best").best_accuracy == 0.5
    assert find_damage(tmp_path / "best") is None
    save_checkpoint(tmp_path, model, optimizer, None, TrainerState(step=6))
    assert (tmp_path / "best").is_dir()


def test_the_best_weights_are_restored_after_a_kill_during_their_replacement(tmp_path):
    save_best(tmp_path, small_model(), TrainerState(step=1))
    (tmp_path / "best").rename(tmp_path / ".best.replaced")
    (tmp_path / "best.tmp").mkdir()
    CheckpointWriter(tmp_path, settings(), TrainerState(step=1))
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert find_damage(tmp_path / "best") is None


def test_a_checkpoint_that_cannot_be_deleted_gives_a_warning(tmp_path, caplog):
    save_steps(tmp_path, 1, 2, 3)
    (tmp_path / "step_000001").rename(tmp_path / "elsewhere")
    (tmp_path / "step_000001").symlink_to(tmp_path / "elsewhere")  # rmtree refuses links
    retain(tmp_path / "step_000003", settings(keep_last=1))
    assert "could not delete the old checkpoint" in caplog.text
    assert not (tmp_path / "step_000002").exists()
    assert latest_checkpoint(tmp_path).name == "step_000003"
