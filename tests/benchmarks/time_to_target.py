"""Compare the time to a validation accuracy on the quickstart with TRL's GRPOTrainer, both on two threads.

python tests/benchmarks/time_to_target.py [--target 0.9] [--every 2] [--seeds 1,2,3] [--spin N]

Both have the same model, training problems, prompts, rewards, hyperparameters and optimizer, and are evaluated by
greedy decoding on the same validation problems, graded by the same function. They draw other problems and other noise.
They run in turns, each time in a new process. The time is that of the steps up to the first evaluation that reaches the
target: sampling, rewards and update, without evaluations, checkpoints and start. TRL computes a step in one pass of all
completions, which is fastest here, and without gradient checkpointing.

Waiting threads of both spin equally long before they sleep: as long as OpenMP's default, or --spin N times. With
--spin launch, this suite uses what a launch sets, which is made for shared machines, and TRL the default.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
THREADS = 2


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--every", type=int, default=2, help="steps between evaluations")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--spin", default="300000", help="GOMP_SPINCOUNT of both; launch: as each sets it itself")
    parser.add_argument("--child", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def settings(args: argparse.Namespace) -> list[str]:
    return [
        "experiment=quickstart",
        f"seed={args.seed}",
        f"hardware.threads={THREADS}",
        f"eval.every={args.every}",
        f"target.accuracy={args.target}",
        "eval.before=false",
        "eval.after=false",
        "checkpoint.every=0",
        "tracking=disabled",
    ]


def run_ours(args: argparse.Namespace) -> dict:
    command = [sys.executable, str(ROOT / "launch.py"), *settings(args), f"run_dir={args.folder}/run"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads(Path(args.folder, "run", "summary.json").read_text())["target"]["reached"]


def run_trl(args: argparse.Namespace) -> dict | None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from grpo.config.checks import typed
    from grpo.config.compose import compose_config
    from grpo.data.prompts import messages, render
    from grpo.model.loading import model_source
    from grpo.rewards import math_xml
    from grpo.training.experiment import build_experiment

    torch.set_num_threads(THREADS)
    config = typed(compose_config(settings(args)))
    experiment = build_experiment(config)
    torch.set_num_threads(THREADS)
    grpo = config.grpo
    sizes = experiment.sizes
    optimizer = config.optimizer
    tokenizer = experiment.tokenizer
    model = AutoModelForCausalLM.from_pretrained(model_source(config.model.name), dtype=torch.float32)

    def prompts(problems):
        return [render(tokenizer, messages(problem.question, config.data)) for problem in problems]

    rows = sizes.batch_size * sizes.num_generations
    trained = experiment.problems.train
    validation = experiment.problems.validation
    of_validation = prompts(validation)
    seconds = 0.0
    reached = None

    def accuracy() -> float:
        right = []
        for start in range(0, len(validation), 256):
            inputs = tokenizer(
                of_validation[start : start + 256], return_tensors="pt", padding=True, padding_side="left"
            )
            with torch.no_grad():
                ids = trainer.model.generate(
                    input_ids=inputs.input_ids,
                    attention_mask=inputs.attention_mask,
                    do_sample=False,
                    max_new_tokens=sizes.max_completion_length,
                )
            texts = tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            answers = [problem.answer for problem in validation[start : start + 256]]
            right += math_xml.accuracy([], texts, answers)
        return statistics.mean(right)

    class Target(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, _, state, control, **__):
            nonlocal seconds, reached
            seconds += time.perf_counter() - self.started
            if state.global_step % args.every == 0:
                found = accuracy()
                print(f"TRL step {state.global_step}: {found:.1%} after {seconds:.1f} s", file=sys.stderr, flush=True)
                if found >= args.target:
                    reached = {"step": state.global_step, "seconds": seconds, "accuracy": found}
                    control.should_training_stop = True

    def correctness(completions, answer, **_):
        return math_xml.correctness([], completions, answer)

    def tag_format(completions, **_):
        return math_xml.tag_format([], completions)

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[correctness, tag_format],
        train_dataset=Dataset.from_dict({"prompt": prompts(trained), "answer": [each.answer for each in trained]}),
        processing_class=tokenizer,
        callbacks=[Target()],
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            seed=args.seed,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=1,
            num_generations=sizes.num_generations,
            max_completion_length=sizes.max_completion_length,
            max_steps=grpo.num_iterations * grpo.num_steps,
            temperature=config.rollout["temperature"],
            top_k=0,
            top_p=1.0,
            beta=grpo.beta,
            use_bias_correction_kl=False,
            loss_type="grpo",
            scale_rewards="group",
            learning_rate=optimizer["lr"],
            adam_beta1=optimizer["betas"][0],
            adam_beta2=optimizer["betas"][1],
            weight_decay=optimizer["weight_decay"],
            max_grad_norm=grpo.max_grad_norm,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    return reached


def child(args: argparse.Namespace) -> None:
    reached = run_ours(args) if args.child == "ours" else run_trl(args)
    Path(args.folder, "result.json").write_text(json.dumps(reached))


def measured(name: str, seed: str, spin: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", name, "--seed", seed, "--folder", folder, *sys.argv[1:]]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(THREADS)}
        if spin != "launch":
            environment["GOMP_SPINCOUNT"] = spin
        subprocess.run(command, stdout=sys.stderr, env=environment, check=True)
        reached = json.loads(Path(folder, "result.json").read_text())
    print(f"seed {seed}, {name:>4}: {reached}", flush=True)
    return reached or {"seconds": float("inf")}


def main() -> None:
    args = arguments()
    if args.child:
        return child(args)
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    for seed in args.seeds.split(","):
        for name, found in seconds.items():
            found.append(measured(name, seed, args.spin)["seconds"])
    ours, trl = (statistics.median(found) for found in seconds.values())
    ratios = sorted(a / b for a, b in zip(*seconds.values(), strict=True))
    print(
        f"time to {args.target:.0%}, medians: ours {ours:.1f} s, TRL {trl:.1f} s, a share of {ours / trl:.2f}; by seed "
        f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}"
    )


if __name__ == "__main__":
    main()
