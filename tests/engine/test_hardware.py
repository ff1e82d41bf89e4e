import pytest
import torch
import yaml
from omegaconf import OmegaConf

from grpo.compose import compose_config
from grpo.config import CONF_DIR, ConfigError
from grpo.engine import hardware
from grpo.engine.hardware import cpu_multiplies_bfloat16, preset, resolve_hardware, use_hardware


@pytest.mark.parametrize(
    ("gigabytes", "name"),
    [
        (85.1, "a100_80gb"),
        (79.6, "a100_80gb"),
        (42.4, "a100_40gb"),
        (25.3, "rtx_24gb"),
        (15.8, "t4_16gb"),
        (8, "t4_16gb"),
    ],
)
def test_a_card_gets_the_preset_of_its_memory(monkeypatch, gigabytes, name):
    card = type("Card", (), {"total_memory": int(gigabytes * 1e9)})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert preset("cuda") == name
    assert (CONF_DIR / "hardware" / f"{name}.yaml").exists()


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="needs a bare processor")
def test_auto_takes_the_cpu_preset_where_there_is_no_gpu_and_keys_set_by_hand_stay():
    cfg = compose_config(["hardware.rollout_tokens=7", "grpo.batch_size=3"])
    resolve_hardware(cfg)
    expected = yaml.safe_load((CONF_DIR / "hardware" / "cpu.yaml").read_text()) | {"rollout_tokens": 7}
    expected |= {"threads": hardware.THREADS}
    expected |= {"compute_dtype": "bfloat16" if cpu_multiplies_bfloat16() else None}
    assert OmegaConf.to_container(cfg.hardware) == expected
    assert (cfg.grpo.batch_size, cfg.grpo.num_generations) == (3, expected["num_generations"])


@pytest.mark.parametrize("able", [True, False])
def test_auto_takes_bfloat16_where_the_processor_multiplies_it_unless_told_otherwise(monkeypatch, able):
    monkeypatch.setattr(hardware, "cpu_multiplies_bfloat16", lambda: able)
    monkeypatch.setattr(hardware, "find_device", lambda: "cpu")
    for overrides, expected in (
        ([], "bfloat16" if able else None),
        (["hardware.compute_dtype=float32"], "float32"),
        (["hardware=cpu"], None),
    ):
        cfg = compose_config(overrides)
        resolve_hardware(cfg)
        assert cfg.hardware.compute_dtype == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["hardware=a100_80gb"], "hardware.device=cuda: torch sees no CUDA device here; use hardware=auto"),
        (["model.device_map=cuda:1"], "model.device_map=cuda:1: torch sees no CUDA device here; use model.device_map"),
    ],
)
def test_a_device_that_is_not_there_is_said_of_the_key_that_asks_for_it(overrides, said):
    with pytest.raises(ConfigError) as refused:
        resolve_hardware(compose_config(overrides))
    assert str(refused.value).startswith(said)


def test_threads_left_open_are_those_that_torch_found_whatever_an_earlier_job_set(tmp_path):
    from grpo.config import typed

    try:
        for wanted, threads in (("1", 1), ("null", hardware.THREADS)):
            cfg = compose_config(["experiment=quickstart", f"hardware.threads={wanted}"])
            resolve_hardware(cfg)
            use_hardware(typed(cfg))
            assert torch.get_num_threads() == cfg.hardware.threads == threads
    finally:
        torch.set_num_threads(hardware.THREADS)


def test_determinism_is_set_and_taken_back():
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
