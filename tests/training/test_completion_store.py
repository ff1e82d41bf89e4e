"""Which completions of an evaluation can be used again."""

import shutil
from dataclasses import replace

import pytest
import torch

from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.model.loading import load_model
from grpo.model.lora import add_adapter
from grpo.training import completion_store
from grpo.training.completion_store import CompletionStore, store_for

SAMPLING = {"temperature": 0.0, "max_new_tokens": 8, "samples": 1}


@pytest.fixture
def config():
    return typed(compose_config(["experiment=quickstart", "hardware.rollout_tokens=100"]))


def loaded(config, lora=None):
    model = load_model(config.model, torch.device("cpu"))
    if lora is not None:
        add_adapter(model, lora, torch.float32, seed=0)
    return model


def test_the_store_is_the_same_where_the_completions_are(config):
    store = store_for(loaded(config), config, SAMPLING)
    assert store_for(loaded(config), config, SAMPLING) == store
    assert store_for(loaded(config), replace(config, seed=7, name="other"), SAMPLING) == store  # greedy decoding
    hot_in_training = {**config.rollout, "temperature": 0.5, "min_new_tokens": 3}
    assert store_for(loaded(config), replace(config, rollout=hot_in_training), SAMPLING) == store
    lora = typed(compose_config(["experiment=quickstart", "tuning=lora"])).model.lora
    with_adapter = [loaded(config, lora), loaded(config, lora)]
    with torch.no_grad():
        for name, parameter in with_adapter[1].named_parameters():
            if ".lora_A." in name:
                parameter.add_(1.0)  # as another seed would draw it; B is 0
    stores = {
        store_for(each, replace(config, model=replace(config.model, lora=lora)), SAMPLING) for each in with_adapter
    }
    assert stores == {store}  # the adapter changes nothing yet


def test_the_store_is_another_one_where_the_completions_may_differ(config):
    model = loaded(config)
    hot = {**SAMPLING, "temperature": 1.0}
    found = [
        store_for(model, config, SAMPLING),
        store_for(model, config, hot),
        store_for(model, replace(config, seed=7), hot),
        store_for(model, config, {**SAMPLING, "max_new_tokens": 9}),
        store_for(model, config, {**SAMPLING, "samples": 2}),
        store_for(model, replace(config, model=replace(config.model, attn_implementation="eager")), SAMPLING),
        store_for(model, replace(config, hardware=replace(config.hardware, rollout_tokens=99)), SAMPLING),
        store_for(model, replace(config, rollout={**config.rollout, "setting": 1}), SAMPLING),
    ]
    changed = loaded(config)
    with torch.no_grad():
        changed.model.norm.weight[3] += 0.001
    found.append(store_for(changed, config, SAMPLING))
    changed = loaded(config)
    changed.config.rope_parameters = {**changed.config.rope_parameters, "rope_theta": 5.0}
    found.append(store_for(changed, config, SAMPLING))
    lora = typed(compose_config(["experiment=quickstart", "tuning=lora"])).model.lora
    adapted = loaded(config, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.add_(0.01)
    for alpha in (lora.alpha, 2 * lora.alpha):
        own = replace(config, model=replace(config.model, lora=replace(lora, alpha=alpha)))
        found.append(store_for(adapted, own, SAMPLING))
    assert len({store.file.name for store in found}) == len(found)


def test_another_version_of_the_code_that_samples_has_another_store(config, tmp_path, monkeypatch):
    package = shutil.copytree(completion_store.PACKAGE, tmp_path / "grpo", ignore=shutil.ignore_patterns("*.json"))
    model = loaded(config)
    before = store_for(model, config, SAMPLING)
    monkeypatch.setattr(completion_store, "PACKAGE", package)
    assert store_for(model, config, SAMPLING) == before
    with (package / "rollout" / "native.py").open("a") as file:
        file.write("# changed\n")
    assert store_for(model, config, SAMPLING) != before


def test_the_completions_of_an_engine_of_the_user_are_not_stored(config):
    own = replace(config, rollout={**config.rollout, "_target_": "my_engine.Engine"})
    assert store_for(loaded(config), own, SAMPLING) is None


def test_a_line_that_was_torn_or_damaged_is_skipped(tmp_path):
    store = CompletionStore(tmp_path / "a" / "b.jsonl")
    assert store.read() == {}
    store.append({("p", 0): [[1, 2], [3]]})
    with store.file.open("ab") as file:
        file.write(b'{"prompt": "torn')
    store.append({("p", 1): [[4]]})
    with store.file.open("ab") as file:
        file.write(b'[]\n{"prompt": "q", "slot": 0, "completions": ["x"]}\n\xff\n')
    assert store.read() == {("p", 0): [[1, 2], [3]], ("p", 1): [[4]]}


def test_a_store_that_cannot_be_read_or_written_only_warns(tmp_path, caplog):
    (tmp_path / "folder").mkdir()
    store = CompletionStore(tmp_path / "folder")
    store.append({("p", 0): [[1]]})
    assert store.read() == {}
    assert len(caplog.records) == 2
