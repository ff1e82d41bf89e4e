"""Composing conf/, the checks on its values, and the messages for bad ones."""

import dataclasses
import re

import pytest
from omegaconf.errors import InterpolationResolutionError

from grpo.algorithm.objective import Numbers
from grpo.config.checks import check_lineage, check_training, typed
from grpo.config.compose import compose_config
from grpo.config.errors import ConfigError
from grpo.config.explain import NAMED_BY_USER, explain
from grpo.config.migrations import load_frozen
from grpo.config.objective_checks import kl_weight, unused_overrides
from grpo.config.other_names import NOT_SUPPORTED, OTHER_NAMES
from grpo.config.overrides import Overrides
from grpo.config.paths import CONF_DIR
from grpo.config.schema import Config
from grpo.config.values import flatten, to_dict
from grpo.launch.decide import check_runnable
from grpo.launch.freeze import freeze
from grpo.launch.process import run_command
from grpo.launch.resume import resumed_config
from grpo.runs.folder import RunFolder
from grpo.training.experiment import build_objective

ROOT = CONF_DIR.parent
CHOICES = [f"{group.name}={file.stem}" for group in sorted(CONF_DIR.iterdir()) for file in sorted(group.glob("*.yaml"))]


def compose_typed(*overrides):
    return typed(compose_config(overrides))


def complaint(*overrides):
    """The error message for these overrides, which must be refused as bad input."""
    errors = []

    def compose():
        try:
            compose_typed(*overrides)
        except Exception as error:
            errors.append(error)
            raise

    assert run_command(compose) == 2
    return explain(errors[0])


@pytest.fixture(scope="module")
def defaults():
    """The config that `python launch.py` composes, with dotted keys."""
    return flatten(to_dict(compose_typed()))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_every_group_composes_and_passes_the_checks(choice):
    assert isinstance(compose_typed(choice), Config)


def test_every_config_group_has_choices():
    groups = {choice.split("=")[0] for choice in CHOICES}
    wanted = {"model", "data", "reward", "grpo", "objective", "optimizer", "hardware", "rollout", "tracking"}
    assert wanted | {"experiment"} <= groups


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.name", "Qwen/Qwen2.5-1.5B-Instruct"),
        ("model.attn_implementation", "sdpa"),
        ("model.dtype", "float32"),
        ("model.device_map", "auto"),
        ("model.trust_remote_code", False),
        ("data.path", "openai/gsm8k"),
        ("data.name", "main"),
        ("grpo.num_iterations", 1),
        ("grpo.num_steps", 500),
        ("grpo.batch_size", None),
        ("grpo.num_generations", None),
        ("grpo.max_completion_length", None),
        ("grpo.beta", 0.04),
        ("grpo.mu", 1),
        ("grpo.epsilon", 0.1),
        ("objective.beta", None),
        ("objective.advantage", "group"),
        ("objective.epsilon_low", None),
        ("objective.epsilon_high", None),
        ("optimizer.lr", 5e-6),
        ("reward.components.correctness.weight", 1.0),
        ("reward.components.format.weight", 1.0),
        ("checkpoint.every", 50),
        ("checkpoint.keep_last", 1),
        ("samples.every", 10),
        ("rollout.temperature", 1.0),
        ("tracking.mode", "auto"),
    ],
)
def test_default_value_of_a_key(defaults, key, value):
    assert defaults[key] == value
    assert type(defaults[key]) is type(value)


@pytest.mark.parametrize(
    ("preset", "batch_size", "num_generations", "max_completion_length"),
    [
        ("a100_80gb", 8, 16, 512),
        ("h100_80gb", 8, 16, 512),
        ("a100_40gb", 4, 8, 400),
        ("rtx_24gb", 2, 4, 256),
        ("auto", None, None, None),
    ],
)
def test_a_hardware_preset_sets_the_three_sizes(preset, batch_size, num_generations, max_completion_length):
    grpo = compose_typed(f"hardware={preset}").grpo
    assert (grpo.batch_size, grpo.num_generations, grpo.max_completion_length) == (
        batch_size,
        num_generations,
        max_completion_length,
    )


def test_a_grpo_value_overrides_that_of_the_preset():
    grpo = compose_typed("hardware=a100_80gb", "grpo.num_generations=6", "grpo.max_completion_length=99").grpo
    assert (grpo.batch_size, grpo.num_generations, grpo.max_completion_length) == (8, 6, 99)


def test_an_experiment_gives_the_same_learning_problem_on_every_machine():
    on_cpu = compose_typed("experiment=quickstart")
    on_card = compose_typed("experiment=quickstart", "hardware=a100_80gb")
    assert on_cpu.grpo == on_card.grpo
    assert on_card.hardware.device == "cuda"


def test_the_experiment_gsm8k_qwen_equals_the_default_config():
    assert compose_typed("experiment=gsm8k_qwen") == compose_typed()


@pytest.mark.parametrize(
    ("experiment", "model", "rank", "lr"),
    [
        ("gsm8k_qwen_lora", "Qwen/Qwen2.5-1.5B-Instruct", 32, 5e-5),
        ("gsm8k_qwen_0_5b", "Qwen/Qwen2.5-0.5B-Instruct", None, 5e-6),
    ],
)
def test_a_variant_of_the_recipe_differs_only_in_model_and_learning_rate(experiment, model, rank, lr):
    variant, default = compose_typed(f"experiment={experiment}"), compose_typed()
    assert variant.model.name == model
    assert (variant.model.lora.rank if rank else variant.model.lora) == rank
    assert variant.optimizer == default.optimizer | {"lr": lr}
    same = {"name": default.name, "model": default.model, "optimizer": default.optimizer}
    assert dataclasses.replace(variant, **same) == default


@pytest.mark.parametrize("experiment", sorted(file.stem for file in (CONF_DIR / "experiment").glob("*.yaml")))
def test_lora_uses_ten_times_the_learning_rate_in_every_experiment_unless_the_command_line_sets_it(experiment):
    chosen = [f"experiment={experiment}", "hardware=cpu"]
    full = compose_typed(*chosen, "tuning=full").optimizer["lr"]
    assert compose_typed(*chosen, "tuning=lora").optimizer["lr"] == pytest.approx(10 * full)
    assert compose_typed(*chosen, "tuning=lora", "optimizer.lr=1e-4").optimizer["lr"] == 1e-4


def test_the_learning_rates_of_the_experiments_without_lora():
    rates = {name: compose_typed(f"experiment={name}").optimizer["lr"] for name in ("quickstart", "smollm2_gsm8k")}
    assert rates == {"quickstart": 2e-4, "smollm2_gsm8k": 2e-5}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "muon"])
def test_training_that_would_hardly_change_the_weights_is_refused(optimizer):
    config = compose_typed("tuning=full_bf16", f"optimizer={optimizer}")
    with pytest.raises(ConfigError, match="use optimizer=adamw_bf16, which rounds stochastically, or tuning=lora"):
        check_training(config)
    for sound in (["tuning=full_bf16"], [f"optimizer={optimizer}", "hardware=a100_80gb"], ["tuning=lora"]):
        check_training(compose_typed(*sound))


def test_the_objective_uses_beta_and_epsilon_of_grpo_unless_it_sets_its_own():
    config = compose_typed("grpo.beta=0.5", "grpo.epsilon=0.3")
    objective = build_objective(config)
    assert (objective.beta, objective.numbers.epsilon_low, objective.numbers.epsilon_high) == (0.5, 0.3, 0.3)
    own = compose_typed("objective.beta=0", "objective.epsilon_high=3e-4")
    objective = build_objective(own)
    assert (objective.beta, objective.numbers.epsilon_low, objective.numbers.epsilon_high) == (0.0, 0.1, 3e-4)
    assert (kl_weight(config), kl_weight(own)) == (0.5, 0.0)


def test_a_value_of_grpo_is_refused_where_the_objective_sets_its_own():
    both = ["objective.epsilon_low=3e-4", "grpo.epsilon=0.2"]
    said = r"grpo\.epsilon: the objective has its own, objective\.epsilon_low=0\.0003; set"
    with pytest.raises(ConfigError, match=said):
        check_runnable(compose_config(both), Overrides(both))
    for allowed in (both[:1], [*both, "objective.epsilon_low=null"], ["grpo.beta=0"]):
        check_runnable(compose_config(allowed), Overrides(allowed))


def test_a_reward_component_can_be_dropped_and_one_added():
    config = compose_typed("~reward.components.format", "+reward.components.brief={_target_: my.brief, weight: 0.5}")
    assert list(config.reward.components) == ["correctness", "brief"]
    assert config.reward.components["brief"] == {"_target_": "my.brief", "weight": 0.5}


@pytest.mark.parametrize(
    ("override", "right_key"),
    [
        ("learning_rate=1e-5", "optimizer.lr"),
        ("lr=1e-5", "optimizer.lr"),
        ("grpo.lr=1e-5", "optimizer.lr"),
        ("model_name=Qwen/Qwen2.5-0.5B", "model.name"),
        ("torch_dtype=bfloat16", "model.dtype"),
        ("model.torch_dtype=bfloat16", "model.dtype"),
        ("kl_coef=0.1", "grpo.beta"),
        ("grpo.kl_coef=0.1", "grpo.beta"),
        ("+grpo.kl_coef=0.1", "grpo.beta"),
        ("max_steps=10", "grpo.num_steps"),
        ("temperature=0.7", "rollout.temperature"),
        ("save_steps=10", "checkpoint.every"),
        ("output_dir=x", "run_dir"),
        ("lr_scheduler_type=cosine", "grpo.lr_schedule"),
        ("grpo.loss_type=dapo", "objective, as objective=dapo, or objective.reduction"),
        ("grpo.scale_rewards=false", "objective.advantage"),
        ("algorithm.adv_estimator=grpo", "objective.advantage"),
        ("data.train_batch_size=8", "grpo.batch_size, in prompts"),
        ("actor_rollout_ref.rollout.n=8", "grpo.num_generations"),
        ("actor_rollout_ref.actor.optim.lr=1e-6", "optimizer.lr"),
        ("trainer.save_freq=8", "checkpoint.every"),
        (
            "num_iterations=2",
            "grpo.mu if it is TRL's; grpo.num_iterations counts outer iterations, each with a new reference",
        ),
    ],
)
def test_a_key_name_of_another_trainer_is_answered_with_the_key_of_the_suite(override, right_key):
    bare = override.lstrip("+").split("=")[0]
    assert complaint(override) == f"there is no key '{bare}'; here it is called {right_key}"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("grpo.top_p=0.9", "sampled from what is trained"),
        ("use_vllm=true", "rollout._target_"),
        ("deepspeed=x.json", "a run uses one device"),
        ("push_to_hub=true", "nothing is uploaded"),
    ],
)
def test_a_setting_of_another_trainer_that_does_not_exist_here_is_answered_with_the_reason(override, reason):
    key = override.split("=")[0]
    text = complaint(override)
    assert text.startswith(f"{key} is not supported: ") and reason in text


def test_every_key_of_trl_is_answered_and_every_answer_names_an_existing_key():
    trl = pytest.importorskip("trl")
    known = set(flatten(compose_config(["tuning=lora"]))) | {path.name for path in CONF_DIR.iterdir()}
    last_parts = {key.rsplit(".", 1)[-1] for key in known} | {"components"}
    names = {each.name for each in dataclasses.fields(trl.GRPOConfig)}
    assert sorted(names - OTHER_NAMES.keys() - NOT_SUPPORTED.keys() - last_parts) == []
    for name, answer in OTHER_NAMES.items():
        key = re.match(r"[\w.]+", answer.lstrip("+"))[0].rstrip(".")
        named_by_user = key.startswith(NAMED_BY_USER)
        assert key in known or named_by_user or key == "optimizer.eps", (name, answer)
    assert not OTHER_NAMES.keys() & NOT_SUPPORTED.keys()


@pytest.mark.parametrize(
    ("override", "real_key"),
    [
        ("grpo.num_step=3", "grpo.num_steps"),
        ("grpo.betta=0", "grpo.beta"),
        ("num_steps=3", "grpo.num_steps"),
        ("+num_steps=3", "grpo.num_steps"),
        ("epsilon=0.2", "grpo.epsilon"),
        ("optimizer.weight_deccay=0.1", "optimizer.weight_decay"),
        ("data.paht=here", "data.path"),
        ("grpo.num_step={a: 1}", "grpo.num_steps"),
    ],
)
def test_an_unknown_key_is_answered_with_the_most_similar_key(override, real_key):
    text = complaint(override)
    bare = override.lstrip("+").split("=")[0]
    assert f"there is no key '{bare}'; did you mean" in text
    assert real_key in text.split("did you mean ")[1].rstrip("?").split(" or ")


def test_a_key_without_a_similar_one_is_answered_with_how_to_list_all_keys():
    assert complaint("qqq=1") == f"there is no key 'qqq'; `python {ROOT / 'launch.py'} --cfg job` prints every key"


def test_an_unknown_preset_is_answered_with_the_choices_and_the_most_similar_one():
    text = complaint("hardware=a100")
    for preset in ("a100_40gb", "a100_80gb", "auto", "cpu", "h100_80gb", "mps", "rtx_24gb", "t4_16gb"):
        assert preset in text
    assert text.endswith("Did you mean hardware=a100_80gb?")
    assert "quickstart" in complaint("experiment=nonsense")


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("model=Qwen/Qwen2.5-0.5B-Instruct", "give model.name=Qwen/Qwen2.5-0.5B-Instruct"),
        ("model=./final_model", "give model.name=./final_model"),
        ("data=openai/gsm8k", "give data.path=openai/gsm8k"),
    ],
)
def test_a_hub_name_or_folder_given_to_a_group_is_answered_with_the_right_key(override, fix):
    assert complaint(override).endswith(fix)


def test_several_values_without_m_are_answered_with_both_possible_fixes():
    assert complaint("grpo.beta=0.01,0.04") == (
        "grpo.beta=0.01,0.04 names several values: for one run of each add -m, for a list write key=[a,b]"
    )


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("grpo.num_steps=many", "'many'"),
        ("grpo.num_steps=1.5", "'1.5'"),
        ("seed=x", "'x'"),
        ("eval.before=perhaps", "'perhaps'"),
        ("name=null", "not Optional"),
        ("tracking.tags=a", "list"),
    ],
)
def test_a_value_of_the_wrong_type_is_reported_with_its_key(override, reason):
    text = complaint(override)
    assert text.startswith(f"{override}: ")
    assert reason in text


def test_a_compute_dtype_more_precise_than_the_weights_is_refused():
    said = complaint("model.dtype=bfloat16", "hardware.compute_dtype=float32")
    assert said.startswith("hardware.compute_dtype=float32 is more precise than model.dtype=bfloat16")


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("grpo.num_generations=1", "must be 2 or more; a group of one"),
        ("hardware.num_generations=1", "grpo.num_generations=1: must be 2 or more; a group of one"),
        ("grpo.beta=-0.1", "grpo.beta=-0.1: must be 0 or more"),
        ("grpo.beta=nan", "grpo.beta=nan"),
        ("grpo.num_steps=0", "grpo.num_steps=0: must be 1 or more"),
        ("grpo.mu=0", "grpo.mu=0: must be 1 or more"),
        ("grpo.batch_size=0", "grpo.batch_size=0: must be 1 or more"),
        ("grpo.epsilon=0", "between 0 and 1"),
        ("grpo.epsilon=1.0", "between 0 and 1"),
        ("grpo.max_grad_norm=0", "1e9 never clips"),
        ("tracking.project=a/b", "tracking.project=a/b: W&B takes at most 128 characters, and none of"),
        (f"tracking.project={'a' * 129}", "W&B takes at most 128 characters"),
        ("grpo.lr_schedule=step", "must be one of constant, linear, cosine"),
        ("rollout.temperature=0", "rollout.temperature=0.0: must be above 0"),
        ("optimizer.lr=-1e-5", "optimizer.lr=-1e-05: must be 0 or more"),
        ("optimizer.lr=fast", "optimizer.lr=fast: must be a number"),
        ("optimizer.lr=nan", "optimizer.lr=nan"),
        ("optimizer.lr=null", "optimizer.lr=null: must be a number"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last=0: must be 1 or more"),
        ("checkpoint.every=-1", "checkpoint.every=-1: must be 0 or more"),
        ("eval.max_problems=0", "eval.max_problems=0: must be 1 or more"),
        ("model.dtype=float16", "must be one of float32, bfloat16"),
        ("model.device_map=balanced", "auto, cpu, mps, cuda or cuda:N"),
        ("model.device_map={lm_head: 0}", "must be one device"),
        ("hardware.device=tpu", "must be one of auto, cuda, mps, cpu"),
        ("hardware.compute_dtype=float8", "must be one of null, float32, bfloat16, float16"),
        ("tracking.mode=on", "must be one of auto, online, offline, disabled"),
        ("resume=maybe", "must be one of true, false, auto"),
        ("data.max_prompt_length=long", "data.max_prompt_length=long"),
        ("reward.components.format.weight=much", "reward.components.format.weight=much: must be a number"),
        ("reward.components.format._target_=null", "reward.components.format needs a _target_"),
    ],
)
def test_an_invalid_value_is_refused_with_the_fix(override, fix):
    assert fix in complaint(override)


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("model.lora.rank=0", "model.lora.rank=0: must be 1 or more"),
        ("model.lora.alpha=-1", "model.lora.alpha=-1.0: must be above 0"),
        ("model.lora.target_modules=7", "must be all-linear, or a list"),
        ("model.lora.target_modules=[1]", "must be all-linear, or a list"),
    ],
)
def test_invalid_adapter_settings_are_refused(override, fix):
    assert fix in complaint("tuning=lora", override)


def test_adapter_keys_without_an_adapter_are_answered_with_tuning_lora(capsys):
    assert run_command(lambda: compose_typed("model.lora.rank=8")) == 2
    assert capsys.readouterr().err.endswith("for model.lora.* add tuning=lora\n")


def test_a_config_error_is_shown_unchanged_even_if_another_error_wraps_it():
    try:
        try:
            raise ConfigError("the cause")
        except ConfigError as cause:
            raise InterpolationResolutionError("raised while resolving interpolation") from cause
    except InterpolationResolutionError as error:
        assert explain(error) == "the cause"


def test_error_messages_fit_in_two_lines():
    bad = ["learning_rate=1", "grpo.num_step=3", "hardware=a100", "grpo.num_steps=many", "resume=maybe", "grpo.beta={"]
    for override in bad:
        assert complaint(override).count("\n") <= 1


def test_a_reward_without_components_is_refused():
    text = complaint("~reward.components.format", "~reward.components.correctness")
    assert "at least one component" in text


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("grpo.beta=0=1", "'='"),
        ("grpo.beta={", "'{'"),
        ("grpo.beta=${nope}", "'nope'"),
        ("hydra.job.env_copy=${nope}", "'nope'"),
    ],
)
def test_an_override_that_cannot_be_parsed_is_bad_input(override, named):
    text = complaint(override)
    assert text.startswith(override.split("=")[0])
    assert named in text


def test_a_group_set_to_null_is_bad_input(capsys):
    assert run_command(lambda: compose_config(["data=null"])) == 2
    assert "a config group cannot be null" in capsys.readouterr().err


def test_a_failure_is_reported_in_one_line_and_exits_with_1(capsys):
    def fail():
        raise RuntimeError("the disk is full")

    assert run_command(fail) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "failed: RuntimeError: the disk is full"
    assert run_command(lambda: None) == 0


# What may change when a run is resumed.

FIRST = ["experiment=quickstart", "grpo.num_steps=7", "grpo.beta=0.01", "optimizer.lr=0.0005"]


@pytest.fixture
def run_with(tmp_path):
    """The folder of a started run, with its config and its first command line."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write_config(freeze(compose_config(FIRST)))
    folder.record_launch({"overrides": FIRST})
    return folder


def resumed(folder, *overrides):
    return resumed_config(folder, compose_config(overrides), Overrides(overrides))[0]


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("optimizer.lr=0.002", "optimizer.lr: 0.0005 -> 0.002"),
        ("grpo.beta=0.04", "grpo.beta: 0.01 -> 0.04"),
        ("model.name=/other/model", "model.name: tiny -> /other/model"),
        ("seed=2", "seed: 1 -> 2"),
        ("grpo.num_steps=5", "grpo.num_steps: 7 -> 5"),
    ],
)
def test_resume_refuses_a_change_of_the_experiment_and_shows_the_old_and_the_new_value(run_with, override, change):
    with pytest.raises(ConfigError) as refused:
        resumed(run_with, override)
    assert change in str(refused.value)


def test_resume_accepts_changes_of_tracking_checkpoints_samples_and_evaluation(run_with):
    config = resumed(run_with, "tracking=disabled", "checkpoint.every=3", "samples.every=2", "eval.every=5")
    assert (config.tracking.mode, config.checkpoint.every, config.samples.every, config.eval.every) == (
        "disabled",
        3,
        2,
        5,
    )
    assert (config.grpo.num_steps, config.optimizer["lr"], config.model.name) == (7, 0.0005, "tiny")


def test_another_choice_of_tracking_on_resume_keeps_the_group_name_and_tags_of_the_run(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_config(compose_typed(*FIRST, "tracking.group=sweep", "tracking.name=mine", "tracking.tags=[a]"))
    kept = resumed(folder, "tracking=disabled").tracking
    assert (kept.mode, kept.group, kept.name, kept.tags) == ("disabled", "sweep", "mine", ["a"])
    assert resumed(folder, "tracking=disabled", "tracking.name=other").tracking.name == "other"


def test_resume_accepts_another_batch_split_and_warns_that_results_are_not_bit_for_bit_equal(run_with, caplog):
    assert resumed(run_with, "hardware.micro_batch_tokens=2").hardware.micro_batch_tokens == 2
    # The preset of another GPU splits batches differently; the compute dtype changes only if its key is given.
    moved = resumed(run_with, "hardware=a100_80gb", "hardware.device=cpu")
    assert (moved.hardware.micro_batch_tokens, moved.hardware.compute_dtype) == (4096, None)
    assert resumed(run_with, "hardware=auto").hardware.compute_dtype is None
    for spelt in ("hardware.compute_dtype", "++hardware.compute_dtype"):
        assert resumed(run_with, f"{spelt}=bfloat16").hardware.compute_dtype == "bfloat16"
    assert "not bit for bit" in caplog.text


def test_the_card_for_the_plan_can_change_on_resume_without_a_warning(run_with, caplog):
    assert resumed(run_with, "hardware.card.memory_gb=5").hardware.card.memory_gb == 5
    assert caplog.text == ""


def test_resume_uses_nothing_from_conf_that_the_command_line_does_not_name(run_with):
    assert resumed(run_with) == typed(run_with.frozen_config())


def test_the_first_command_line_can_be_given_again(run_with):
    config = resumed(run_with, *FIRST, "checkpoint.every=1")
    assert (config.grpo.num_steps, config.checkpoint.every) == (7, 1)


def test_the_first_command_line_does_not_silently_undo_a_later_change(run_with):
    run_with.record_changes({"checkpoint.every": 3, "grpo.num_steps": 9})
    assert resumed(run_with, "experiment=quickstart").grpo.num_steps == 9
    with pytest.raises(ConfigError, match=r"grpo\.num_steps: 9 -> 7"):
        resumed(run_with, *FIRST)


def test_resume_refuses_another_experiment(run_with):
    with pytest.raises(ConfigError, match=r"experiment=gsm8k_qwen.*name the keys themselves"):
        resumed(run_with, "experiment=gsm8k_qwen")


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "a ${seed} b", "${", "\\${seed}", "C:\\new\\${x}", "$${y}", "\\"])
def test_values_of_a_frozen_config_are_never_interpolated(tmp_path, text):
    config = compose_typed("data=arithmetic")
    config.data["system_prompt"] = text
    config.tracking.tags = [text]
    folder = RunFolder(tmp_path)
    folder.write_config(config)
    assert typed(folder.frozen_config()) == config
    assert resumed(folder, "checkpoint.every=3").data["system_prompt"] == text


def test_an_escaped_value_of_the_command_line_stays_literal():
    assert compose_typed(r"data.system_prompt='\${oc.env:HOME}'").data["system_prompt"] == "${oc.env:HOME}"


def test_a_frozen_config_is_read_without_creating_python_objects(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(Exception, match="could not determine a constructor"):
        load_frozen(file)


@pytest.mark.parametrize("value", ["x", 1.5, -3, True, 10**30])
def test_the_record_of_a_forks_parent_must_hold_counts(value):
    check_lineage({"step": 2, "num_problems": 8})
    check_lineage({"step": 2})  # as earlier versions recorded it
    for name in ("step", "num_problems"):
        with pytest.raises(ConfigError, match=f"parent.{name}={value}: must be a whole number"):
            check_lineage({"step": 2, name: value})


# The choices and numbers of the papers; None: that of grpo.*, which the test sets to 0.5 and 0.15.
PUBLISHED = {
    # advantage, ratio, surrogate, reduction, beta, epsilon_low, epsilon_high
    "grpo": ("group", "token", "clip", "row", None, None, None),
    "bnpo": ("group", "token", "clip", "token", None, None, None),
    "dr_grpo": ("none", "token", "clip", "constant", 0, None, None),
    "dapo": ("group", "token", "clip", "token", 0, 0.2, 0.28),
    "gspo": ("group", "sequence", "clip", "row", 0, 3e-4, 4e-4),
    "luspo": ("group", "sequence", "clip", "length", 0, 3e-4, 4e-4),
    "cispo": ("group", "token", "cispo", "token", 0, None, None),
    "rloo": ("leave_one_out", "token", "clip", "length", None, None, None),
    "sapo": ("group", "token", "sapo", "row", 0, None, None),
    "gdpo": ("normalize_then_sum", "token", "clip", "row", None, None, None),
    "maxrl": ("mean", "token", "clip", "row", None, None, None),
}


def test_every_file_of_an_objective_is_tested():
    assert {file.stem for file in (CONF_DIR / "objective").glob("*.yaml")} == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_named_objective_has_the_published_choices_and_numbers(name):
    config = compose_typed(f"objective={name}", "grpo.beta=0.5", "grpo.epsilon=0.15")
    objective = build_objective(config)
    *choices, beta, low, high = PUBLISHED[name]
    assert [config.objective[key] for key in ("advantage", "ratio", "surrogate", "reduction")] == choices
    assert objective.beta == (0.5 if beta is None else beta)
    assert objective.numbers == Numbers(
        epsilon_low=low or 0.15, epsilon_high=high or 0.15, delta=None, cap=5.0, tau_positive=1.0, tau_negative=1.05
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["grpo.mu=1", "grpo.epsilon=0.2"],
            "grpo.epsilon has no effect: with grpo.mu=1 the ratio is 1 at",
        ),
        (["grpo.mu=2", "objective=cispo", "objective.delta=4"], "objective.delta has no effect: it is a number of"),
        (["grpo.beta=0", "objective.kl=k1"], "objective.kl has no effect: there is no KL penalty, since beta is 0"),
        (["grpo.mu=2", "objective.delta=4"], None),
        (["grpo.mu=2", "objective.surrogate=my.own", "objective.cap=4"], None),
        (["objective._target_=my.own", "grpo.mu=1", "objective.cap=0.5"], None),
        (["objective.surrogate=my.own", "grpo.mu=1", "objective.cap=4"], None),
        (["objective=gspo", "grpo.mu=1"], "objective.ratio=sequence and objective.surrogate=clip have no effect: with"),
        (["objective=gspo", "grpo.mu=2"], None),
        (["objective=gspo", "grpo.mu=1", "objective.sampling_correction=token_mask"], None),
        (["objective.ratio=my.own", "grpo.mu=1", "grpo.epsilon=0.2"], None),
        (["objective.ratio=sequence", "grpo.mu=1"], "objective.ratio has no effect: with grpo.mu=1 the ratio is 1"),
        (["objective.ratio=sequence", "grpo.mu=1", "objective.kl_correction=true"], None),
        (["objective.sampling_cap=2"], "objective.sampling_cap has no effect: objective.sampling_correction is null"),
    ],
)
def test_a_number_on_the_command_line_without_effect_is_said(overrides, said):
    notes = unused_overrides(compose_typed(*overrides), Overrides(overrides))
    assert len(notes) == (said is not None)
    assert all(said in note for note in notes)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.delta=0.5"], "objective.delta=0.5: must be above 1"),
        (["objective=dapo", "objective.delta=1.2"], "objective.delta=1.2: must be above 1.28, the upper clip limit"),
        (["objective.cap=0.5"], "objective.cap=0.5: must be 1 or more"),
        (["objective.sampling_correction=x"], "must be one of null, token_truncate"),
        (["grpo.train_on=5", "grpo.num_generations=4"], "grpo.train_on=5: a group has only grpo.num_generations=4"),
        (["grpo.train_on=0"], "grpo.train_on=0: must be 1 or more"),
        (["sampling.refill=-1"], "sampling.refill=-1: must be 0 or more"),
    ],
)
def test_numbers_of_the_objective_that_make_no_sense_are_refused(overrides, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose_typed(*overrides)


def test_an_advantage_that_divides_by_the_mean_reward_needs_rewards_that_are_not_negative():
    component = "+reward.components.x={{_target_: a.b, {}}}"
    for settings, said in (("weight: 1", "range: its lowest and"), ("range: [-1,1]", "must not be negative")):
        with pytest.raises(ConfigError, match=said):
            compose_typed("objective=maxrl", component.format(settings))
    for settings in ("range: [0,1]", "weight: 0", "range: [-1,0], weight: -1"):
        compose_typed("objective=maxrl", component.format(settings))
