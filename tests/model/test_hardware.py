import shutil

import pytest
import torch
import yaml

from grpo.config.compose import compose_config
from grpo.config.errors import ConfigError
from grpo.config.overrides import Overrides
from grpo.config.paths import CONF_DIR
from grpo.launch import preset
from grpo.launch.preset import hardware_found, preset_overrides
from grpo.model import hardware
from grpo.model.hardware import device_of, resolve_hardware, use_hardware
from grpo.planning.plan import _available, resolved
from grpo.runs.environment import environment


@pytest.fixture
def card(monkeypatch):
    """A function that makes torch report two CUDA cards with `gigabytes` of memory, or `second` for the second card."""

    def pretend(gigabytes, second=None, bfloat16=True):
        def properties(device):
            number = torch.device(device).index or 0
            memory = second if number == 1 and second is not None else gigabytes
            numbers = {"total_memory": int(memory * 1e9), "major": 8 if bfloat16 else 7}
            return type("Card", (), {**numbers, "name": "NVIDIA Something" + number * " Else"})

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties(device).name)

    return pretend


def found(*overrides):
    return hardware_found(compose_config(overrides), Overrides(overrides), compose_config)


@pytest.mark.parametrize(
    ("gigabytes", "bfloat16", "expected"),
    [
        (85.1, True, ["hardware=a100_80gb"]),
        (79.6, True, ["hardware=a100_80gb"]),
        (42.4, True, ["hardware=a100_40gb"]),
        (51.0, False, ["hardware=a100_40gb", "hardware.compute_dtype=float16"]),
        (25.3, True, ["hardware=rtx_24gb"]),
        (34.1, False, ["hardware=t4_16gb"]),
        (15.8, False, ["hardware=t4_16gb"]),
        (8, True, ["hardware=t4_16gb"]),
    ],
)
def test_a_card_gets_the_preset_for_its_memory_with_a_dtype_that_it_supports(card, gigabytes, bfloat16, expected):
    card(gigabytes, bfloat16=bfloat16)
    assert preset_overrides("cuda") == expected
    cfg = found()
    assert cfg.hardware.compute_dtype == ("bfloat16" if bfloat16 and gigabytes > 20 else "float16")


def test_a_card_requested_by_its_number_decides_preset_and_memory(card):
    card(8, 85.1)
    cfg = found("model.device_map=cuda:1")
    assert cfg.hardware.rollout_tokens == compose_config(["hardware=a100_80gb"]).hardware.rollout_tokens
    config = resolved(cfg)
    assert device_of(config) == torch.device("cuda:1")
    assert _available(config) == 85.1e9
    assert environment(device_of(config))["gpu"] == "NVIDIA Something Else"


def test_auto_is_composed_as_the_preset_found_and_keeps_the_users_overrides(card):
    card(25.3)
    chosen = found("hardware.rollout_tokens=7", "grpo.batch_size=3")
    no_card = [f"hardware.card.{key}=null" for key in chosen.hardware.card]
    expected = compose_config(["hardware=rtx_24gb", "hardware.rollout_tokens=7", "grpo.batch_size=3", *no_card])
    assert chosen == expected
    assert (chosen.model.dtype, chosen.optimizer._target_.rpartition(".")[2]) == ("bfloat16", "StochasticAdamW")
    assert found("hardware=auto", "tuning=full").model.dtype == "float32"
    assert found("hardware=cpu").hardware.device == "cpu"
    assert found("hardware=cpu", "hardware.device=auto") == found()


def test_auto_keeps_what_an_experiment_sets(card, monkeypatch, tmp_path):
    shutil.copytree(CONF_DIR, tmp_path / "conf")
    mine = {"compute_dtype": "float32", "rollout_tokens": 333, "card": {"tflops": 5}}
    file = tmp_path / "conf" / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\n" + yaml.safe_dump({"hardware": mine}))
    monkeypatch.setattr("grpo.config.compose.CONF_DIR", tmp_path / "conf")
    card(85)
    cfg = found("experiment=mine")
    assert (cfg.hardware.compute_dtype, cfg.hardware.rollout_tokens, cfg.hardware.card.tflops) == ("float32", 333, 5)
    assert (cfg.hardware.device, cfg.hardware.card.memory_gb) == ("cuda", None)


@pytest.mark.parametrize("able", [True, False])
def test_auto_uses_bfloat16_if_the_processor_multiplies_it_unless_overridden(monkeypatch, able):
    monkeypatch.setattr(preset, "cpu_supports_bfloat16", lambda: able)
    monkeypatch.setattr(preset, "find_device", lambda: "cpu")
    for overrides, expected in (
        ([], "bfloat16" if able else None),
        (["hardware.compute_dtype=float32"], "float32"),
        (["hardware=cpu"], None),
    ):
        cfg = found(*overrides)
        resolve_hardware(cfg)
        assert (cfg.hardware.compute_dtype, cfg.hardware.threads) == (expected, hardware.THREADS)


@pytest.mark.parametrize(
    ("overrides", "gigabytes", "said"),
    [
        (["hardware=a100_80gb"], 25.3, "for a card of 80 GB, and NVIDIA Something has 25.3 GB: use hardware=auto, or"),
        (["hardware=rtx_24gb"], 25.3, "hardware.compute_dtype=bfloat16: NVIDIA Something has no bfloat16; use"),
        (["hardware=t4_16gb", "tuning=full_bf16", "hardware.compute_dtype=null"], 16, "model.dtype=bfloat16: NVIDIA"),
    ],
)
def test_a_card_that_does_not_meet_the_preset_is_refused_with_a_suggested_fix(card, overrides, gigabytes, said):
    card(gigabytes, bfloat16=False)
    with pytest.raises(ConfigError) as refused:
        resolve_hardware(compose_config(overrides))
    assert said in str(refused.value)
    resolve_hardware(compose_config(["hardware=t4_16gb"]))
    resolve_hardware(compose_config([*overrides, "hardware.card.memory_gb=16", "hardware.compute_dtype=float16"]))


def test_a_card_number_that_does_not_exist_is_refused(card):
    card(85)
    for way in (found, lambda *overrides: resolve_hardware(compose_config(overrides))):
        with pytest.raises(ConfigError, match=r"device_map=cuda:9: torch sees 2 CUDA devices here"):
            way("model.device_map=cuda:9")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["hardware=a100_80gb"], "hardware.device=cuda: torch sees no CUDA device here; use hardware=auto"),
        (["model.device_map=cuda:1"], "model.device_map=cuda:1: torch sees no CUDA device here; use model.device_map"),
        (["model.device_map=foo"], "model.device_map=foo: must be one device"),
    ],
)
def test_a_missing_device_is_refused_with_the_key_that_requests_it(overrides, said):
    for way in (found, lambda *overrides: resolve_hardware(compose_config(overrides))):
        with pytest.raises(ConfigError) as refused:
            way(*overrides)
            resolve_hardware(found(*overrides))
        assert str(refused.value).startswith(said)


def test_threads_null_means_torchs_default_whatever_an_earlier_job_has_set(tmp_path):
    from grpo.config.checks import typed

    try:
        for wanted, threads in (("1", 1), ("null", hardware.THREADS)):
            cfg = compose_config(["experiment=quickstart", f"hardware.threads={wanted}"])
            resolve_hardware(cfg)
            use_hardware(typed(cfg))
            assert torch.get_num_threads() == cfg.hardware.threads == threads
    finally:
        torch.set_num_threads(hardware.THREADS)


def test_determinism_can_be_turned_on_and_off_again():
    try:
        hardware._use_deterministic_algorithms(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        hardware._use_deterministic_algorithms(False)
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
