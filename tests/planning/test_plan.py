import re
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.batch import Prompts
from grpo.config.compose import compose_config
from grpo.config.errors import ConfigError
from grpo.config.migrations import load_frozen
from grpo.config.overrides import Overrides
from grpo.config.schema import LoraSettings
from grpo.launch.plan import sweep_points
from grpo.model.logps import completion_logps
from grpo.model.packed import supports_packing
from grpo.planning import estimate as cost
from grpo.planning import plan as planning
from grpo.rollout.load_check import load_checked_model
from grpo.tiny import MODEL_DIR
from tests.architectures import random_model, tiny_architecture
from tests.tiny_model import plain_completions, tiny_config

QUICK = ["experiment=quickstart"]


def plan(*overrides):
    return planning.plan(planning.resolved(compose_config([*QUICK, *overrides])))


def test_the_plan_prints_the_resources_of_a_launch_and_leaves_no_files(launch, tmp_path):
    done = launch(*QUICK, "plan=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("weights", "optimizer", "reference", "gradients", "activations", "keys and values", "peak"):
        assert re.search(rf"{part} +[\d.]+", done.stdout), part
    assert ": fits" in done.stdout
    assert "seconds per step" in done.stdout
    assert (
        "hardware=cpu: model tiny, all weights in float32, computed in float32; per step 16 prompts x 16 completions x "
        "40 tokens, 60 steps"
    ) in done.stdout
    assert re.search(r"start, pre-flight and evaluations [\d.]+ minutes; in all [\d.]+ hours", done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_does_not_fit_ends_with_exit_code_1_and_names_what_would_fit(launch, tmp_path):
    small = ["hardware.card.memory_gb=0.1"]
    done = launch(*QUICK, *small, "plan=true", cwd=tmp_path)
    assert (done.returncode, "of 0.1 GB: does not fit; use tuning=lora" in done.stdout) == (1, True), done.stderr
    sweep = launch("-m", *QUICK, "hardware.card.memory_gb=0.1,64", "plan=true", cwd=tmp_path)
    assert (sweep.returncode, sweep.stdout.count(" no "), sweep.stdout.count(" yes ")) == (1, 1, 1), sweep.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_plan_names_the_preset_that_auto_chooses_and_what_the_hub_would_have_to_give(launch, cold, tmp_path):
    embedded = ["model=tiny", "data=arithmetic", "data.system_prompt=null"]
    done = launch(*embedded, "hardware=auto", "plan=true", cwd=tmp_path)
    assert (done.returncode, "hardware=auto, here hardware=" in done.stdout) == (0, True), done.stderr
    missing = cold("model.name=nobody/nothing", *embedded[1:], "plan=true", cwd=tmp_path)
    *offline, error = missing.stderr.splitlines()
    assert (missing.returncode, missing.stdout) == (2, "")
    assert error.startswith("error: model.name=nobody/nothing is neither a local folder nor ")
    assert all(line.startswith("no connection to https://huggingface.co") for line in offline)
    assert len(offline) <= 1


def test_the_time_of_a_run_includes_its_start_pre_flight_and_evaluations():
    alone = plan("eval.before=false", "eval.after=false", "preflight=false")
    assert alone.rest_seconds == planning.START_S
    assert alone.hours == pytest.approx((alone.seconds * alone.steps + planning.START_S) / 3600)
    own = ["eval.before=false", "preflight=false", "grpo.num_steps=10", "eval.max_problems=50"]
    after = plan(*own).rest_seconds - planning.START_S  # on 50 validation and 50 test problems
    often = plan(*own, "eval.every=2").rest_seconds - planning.START_S  # and on validation problems 4 times in between
    assert often == pytest.approx(3 * after)
    alone = plan(*own, "eval.after=false", "eval.before=true", "eval.every=2").rest_seconds - planning.START_S
    assert alone == pytest.approx(3.5 * after)  # before on both, and on validation problems at steps 2, 4, ..., 10
    none = plan(*own, "data.validation_share=0", "eval.before=true", "eval.every=2").rest_seconds - planning.START_S
    assert none == pytest.approx(3.5 * after)  # all on test problems: before, after, and at steps 2, 4, ..., 10
    samples = plan(*own, "eval.samples=4", "eval.temperature=1").rest_seconds - planning.START_S
    assert after < samples <= 4.001 * after
    assert plan("preflight=true").rest_seconds > plan("preflight=false").rest_seconds


def test_every_point_of_a_sweep_has_a_line_and_no_folder_is_created(launch, tmp_path):
    done = launch("-m", *QUICK, "grpo.beta=0,0.04", "grpo.num_steps=5,10", "plan=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for beta in ("0", "0.04"):
        for steps in (5, 10):
            assert f"grpo.beta={beta} grpo.num_steps={steps}" in " ".join(done.stdout.split())
    assert "disk of all 4 runs" in done.stdout
    assert "time of all 4 runs" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_a_sweep_by_halving_shows_its_share_of_all_steps(launch, tmp_path):
    arms = ["optimizer.lr=1e-5,2e-5,3e-5,4e-5", "seed=1,2", "grpo.num_steps=8", "sweep.eta=2"]
    done = launch("-m", *QUICK, *arms, "hydra/sweeper=halving", "plan=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # per seed 4 arms run 2 steps, 2 run 2 more, 1 runs 4 more: 16 of 32
    assert "4 arms to step 2, 2 arms to step 4, 1 arms to step 8, 50% of the steps of all" in done.stdout


def test_a_sweep_of_an_experiment_of_the_user_is_planned(launch, tmp_path):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text("# @package _global_\ngrpo: {num_steps: 7}\n")
    mine = ["--config-dir", "own", "experiment=mine", "model=tiny", "data=arithmetic", "data.system_prompt=null"]
    done = launch("-m", *mine, "grpo.beta=0,0.04", "plan=true", cwd=tmp_path)
    assert (done.returncode, "disk of all 2 runs" in done.stdout) == (0, True), done.stderr


def test_points_may_be_set_in_the_basic_sweepers_config_and_other_sweepers_are_refused():
    basic = {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "params": {"grpo.beta": "0,0.04"}}
    points = sweep_points(Overrides([*QUICK, "seed=1,2"]), OmegaConf.create(basic))
    pairs = [(beta, seed) for beta in ("0", "0.04") for seed in (1, 2)]
    assert [name for name, _ in points] == [f"grpo.beta={beta} seed={seed}" for beta, seed in pairs]
    assert [job.lines for _, job in points] == [
        [f"grpo.beta={beta}", "experiment=quickstart", f"seed={seed}"] for beta, seed in pairs
    ]
    optuna = OmegaConf.create({"_target_": "hydra_plugins.hydra_optuna_sweeper.OptunaSweeper"})
    with pytest.raises(ConfigError, match="points of a grid only"):
        sweep_points(Overrides(QUICK), optuna)


def test_a_bad_value_is_refused_as_in_a_launch(launch, tmp_path):
    for arguments in ([*QUICK, "grpo.mu=0"], ["-m", *QUICK, "grpo.mu=0,1"]):
        refused = launch(*arguments, "plan=true", cwd=tmp_path)
        assert (refused.returncode, list(tmp_path.iterdir())) == (2, [])
        assert "grpo.mu=0: must be 1 or more" in refused.stderr


def test_an_error_in_the_plan_ends_the_process_and_starts_no_run(launch, tmp_path, monkeypatch):
    """After an error in a callback Hydra would only print a warning and then train."""
    for extra in ([], ["-m", "seed=1,2"]):
        failed = launch(
            *extra, *QUICK, "plan=true", cwd=tmp_path, fault=("grpo.planning.estimate.parameters", "1", "memory")
        )
        assert failed.returncode == 1
        assert failed.stderr.splitlines()[-1].startswith("failed: RuntimeError: ")
        assert list(tmp_path.iterdir()) == []


def test_the_plan_is_refused_with_resume_or_fork(launch, tmp_path, finished_run):
    for key in ("resume", "fork"):
        refused = launch(f"{key}=true", f"run_dir={finished_run}", "plan=true", cwd=tmp_path)
        assert refused.returncode == 2
        assert "plan=true is for a new run" in refused.stderr


def test_a_model_that_needs_padding_is_planned_with_padding(tmp_path):
    sizes = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    for kind, extra in (("falcon", {}), ("mistral", {"sliding_window": 8, "num_key_value_heads": 2})):
        AutoConfig.for_model(kind, **sizes, num_attention_heads=4, **extra).save_pretrained(tmp_path)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(MODEL_DIR / file, tmp_path)
        config = tiny_config(name=str(tmp_path))
        model = cost.meta_model(config, torch.float32, 30)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path)
        assert not supports_packing(model) and not supports_packing(load_checked_model(config, torch.device("cpu"), 30))
        assert cost.activation_bytes(model, 2, 10, 6, 20, 4) > cost.activation_bytes(model, 1, 10, 3, 20, 4) > 0
        padded, packed = (
            planning.micro_batches(cost.Work(2, 4, 50, [10] * 8), 130, shared) for shared in (False, True)
        )
        assert max(map(len, padded)) == 2 < max(map(len, packed))
        with pytest.raises(ConfigError, match="does not support packed sequences"):
            plan(f"model.name={tmp_path}", "hardware.activation_checkpointing=true")


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "qwen3_5_text", "bamba", "gpt2"])
def test_mixtures_of_experts_hybrid_and_other_models_are_planned(tmp_path, kind):
    config = tiny_config(name=str(tmp_path))
    tiny_architecture(kind).save_pretrained(tmp_path)
    model = cost.meta_model(config, torch.float32, 30)
    real = random_model(kind)
    assert sum(cost.parameters(model)) == sum(parameter.numel() for parameter in real.parameters())
    body, head = cost.products(model)
    matrices = (
        sum(p.numel() for p in real.get_decoder().parameters() if p.dim() > 1)
        - real.get_input_embeddings().weight.numel()
    )
    assert 0.2 * matrices < body <= matrices
    assert head == real.get_output_embeddings().weight.numel()
    few, many = (cost.activation_bytes(model, 1, 10, rows, 20, 4) for rows in (3, 6))
    assert 0 < few < many


def test_an_adapter_of_experts_is_planned(tmp_path):
    tiny_architecture("qwen3_moe").save_pretrained(tmp_path)
    lora = LoraSettings(rank=4, alpha=4, target_modules="all-linear", init_from=None)
    model = cost.meta_model(tiny_config(name=str(tmp_path), lora=lora), torch.float32, 30)
    trained, frozen = cost.parameters(model)
    assert cost.activation_bytes(model, 1, 10, 3, 20, 4) > 0
    assert cost.parameters(model) == (trained, frozen)
    assert 0 < trained < frozen


def test_of_a_mixture_of_experts_only_the_chosen_experts_count_as_work(tmp_path):
    tiny_architecture("mixtral", num_experts_per_tok=1).save_pretrained(tmp_path / "one")
    tiny_architecture("mixtral", num_experts_per_tok=4).save_pretrained(tmp_path / "all")
    one, every = (
        cost.products(cost.meta_model(tiny_config(name=str(tmp_path / name)), torch.float32, 30))[0]
        for name in ("one", "all")
    )
    experts = 4 * 4 * 3 * 32 * 48  # layers, experts, matrices of an expert
    assert every - one == experts * 3 // 4


def test_a_card_described_by_the_user_is_planned_with_the_given_values():
    assert plan("hardware.card.memory_gb=0.1").available == 0.1e9
    assert not plan("hardware.card.memory_gb=0.1").fits
    assert plan("hardware.card={tflops: 1.0, bandwidth_gb_s: 10.0}").available > 1e9


def test_the_plan_needs_no_weights(tmp_path):
    for file in MODEL_DIR.iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, tmp_path)
    expected = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(MODEL_DIR).parameters())
    assert plan(f"model.name={tmp_path}").parameters == expected


BIG = ["model=qwen2_5_1_5b_random", "data=arithmetic", "data.max_prompt_length=512"]


@pytest.mark.parametrize(
    ("preset", "gigabytes", "trained"),
    [
        ("a100_80gb", 80, "all"),
        ("h100_80gb", 80, "all"),
        ("a100_40gb", 40, "all"),
        ("rtx_24gb", 24, "all"),
        ("t4_16gb", 16, "adapter"),
        ("mps", 16, "adapter"),
        ("cpu", None, "adapter"),
    ],
)
def test_every_preset_trains_the_default_model_within_the_memory_of_its_card(preset, gigabytes, trained):
    """With a tenth of the memory left, since a card reserves some, and within 50 GB of disk."""
    made = planning.plan(planning.resolved(compose_config([*BIG, f"hardware={preset}"])))
    assert made.parameters == 1_543_714_304
    assert (made.trained == made.parameters) == (trained == "all")
    if gigabytes is not None:
        assert made.available == gigabytes * 1e9
        assert made.peak < 0.9 * made.available
    assert sum(made.disk.values()) < 50e9


def test_memory_and_disk_depend_on_which_weights_are_trained():
    full, narrow, lora = (
        planning.plan(planning.resolved(compose_config([*BIG, "hardware=a100_80gb", f"tuning={tuning}"])))
        for tuning in ("full", "full_bf16", "lora")
    )
    count, adapter = full.parameters, lora.trained
    assert full.memory["weights"] == 4 * count
    assert full.memory["optimizer"] == 8 * count
    assert full.memory["working copy"] == full.memory["reference"] == 2 * count
    assert narrow.memory["weights"] == narrow.memory["gradients"] == narrow.memory["reference"] == 2 * count
    assert (narrow.memory["optimizer"], narrow.memory["working copy"]) == (4 * count, 0)
    assert 1e7 < adapter < 1e8
    assert lora.memory["weights"] == 2 * count + 4 * adapter
    assert lora.memory["optimizer"] == 2 * lora.memory["reference"] == 2 * lora.memory["gradients"] == 8 * adapter
    assert lora.disk["final model"] == 4 * adapter
    assert lora.seconds < full.seconds


@pytest.mark.parametrize(
    ("optimizer", "least", "most"),
    [("adamw_8bit", 2.0, 2.2), pytest.param("muon", 4.0, 5.0, marks=pytest.mark.slow), ("adamw", 8, 8)],
)
def test_the_state_of_every_optimizer_is_counted(optimizer, least, most):
    """Muon keeps one number per weight of the layers' matrices, AdamW two per weight of the embedding (a sixth)."""
    made = planning.plan(planning.resolved(compose_config([*BIG, "hardware=a100_80gb", f"optimizer={optimizer}"])))
    assert least <= made.memory["optimizer"] / made.parameters <= most


def test_the_effect_of_settings_on_memory_and_steps_is_counted():
    base = plan()
    assert plan("grpo.beta=0").memory["reference"] == 0 < base.memory["reference"]
    assert plan("optimizer._target_=torch.optim.SGD", "~optimizer.betas").memory["optimizer"] == 0
    assert plan("checkpoint.overlap=true").memory["checkpoint copy"] == pytest.approx(3 * 4 * base.parameters, rel=0.01)
    assert plan("hardware.activation_checkpointing=true").memory["activations"] < 0.7 * base.memory["activations"]
    assert plan("grpo.num_steps=120").steps == 2 * base.steps


@pytest.mark.parametrize("twice", [False, True])
def test_planned_activations_equal_those_that_a_real_pass_keeps(monkeypatch, twice):
    """Of a real forward pass, the storages of all saved tensors are counted, without the parameters."""
    model, prompts, rows, tokens = load_checked_model(tiny_config(), torch.device("cpu")), 2, 6, 20
    counted = cost.meta_model(tiny_config(), torch.float32, 30)
    if twice:
        planning.checkpoint_layers(model), planning.checkpoint_layers(counted)
    held, weights = {}, {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    ids = torch.randint(5, 200, (prompts, 15))
    completions = plain_completions(torch.randint(5, 200, (rows, tokens)), torch.arange(rows) // 3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        completion_logps(model, Prompts(ids, torch.ones_like(ids)), completions, 0.9)
    real = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    assert cost.activation_bytes(counted, prompts, 15, rows, tokens, 4) == pytest.approx(real, rel=0.05)


def test_planned_disk_space_is_that_of_a_finished_run(finished_run):
    frozen = planning.typed(load_frozen(finished_run / "config.yaml"))
    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(MODEL_DIR).parameters())
    disk = planning.disk_space(frozen, 4 * count, 8 * count, rows=1)
    for parts, folder in ((("checkpoints", "best"), "checkpoints"), (("final model",), "final_model")):
        real = sum(f.stat().st_size for f in (finished_run / folder).rglob("*.safetensors"))
        assert sum(disk[part] for part in parts) == pytest.approx(real, rel=0.05)
