"""A training step of this suite and of TRL's GRPOTrainer on the same work: time, memory, and the counted floor.

python tests/benchmarks/vs_trl.py [--shape 2x4x64] [--third-by N] [--ours-bf16] [OVERRIDE ...]

Both read the same prompts with the same model, sample groups of the same size, are made to end each completion at the
same length (all at the limit, or a third of them spread up to --third-by tokens), use AdamW, the same beta and one
update a batch. Each runs in processes of its own, in turns; the first step of each is left out. A step is all that
passes from the start of one to the start of the next: data, rewards and logging are in it, checkpoints and evaluations
are not. TRL trains in passes of 8 completions, its default, and without gradient checkpointing, which would slow it.

The floor is the time that the matrix products of the work would take at the rate of a large product measured here, and
the reading of the weights, once a decode step, at the rate of reading memory measured here.
"""

import argparse
import contextlib
import itertools
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SEED = 1
WARM_UP = 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="2x4x64", help="prompts x completions of each x tokens of each")
    parser.add_argument("--third-by", type=int, help="a third of the completions end by so many tokens")
    parser.add_argument("--ours-bf16", action="store_true", help="ours computes in bfloat16, TRL in float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="that are measured in each process")
    parser.add_argument("--child", choices=["ours", "trl", "floor"], help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="such as model.name=DIR data.path=DIR; default: the tiny model")
    args = parser.parse_args()
    args.prompts, args.group, args.tokens = map(int, args.shape.split("x"))
    args.rows = args.prompts * args.group
    return args


def forced_lengths(args: argparse.Namespace) -> list[int]:
    """How many tokens each completion of a step has: of every three, the first ends early where that is asked for."""
    early = len(range(0, args.rows, 3))
    return [
        args.third_by * (row // 3 + 1) // early if args.third_by and row % 3 == 0 else args.tokens
        for row in range(args.rows)
    ]


def settings(args: argparse.Namespace) -> list[str]:
    own = [] if args.overrides else ["experiment=quickstart"]
    return [
        *own,
        "hardware=cpu",
        f"seed={SEED}",
        "tracking=disabled",
        f"grpo.batch_size={args.prompts}",
        f"grpo.num_generations={args.group}",
        f"grpo.max_completion_length={args.tokens}",
        f"grpo.num_steps={WARM_UP + args.steps}",
        "grpo.beta=0.04",
        "grpo.mu=1",
        "eval.before=false",
        "eval.after=false",
        "checkpoint.every=0",
        f"hardware.compute_dtype={'bfloat16' if args.ours_bf16 else 'float32'}",
        *args.overrides,
    ]


def run_ours(args: argparse.Namespace) -> list[float]:
    """Seconds of each step of a real launch, whose sampling is made to end completions where it should."""
    import numpy as np
    import torch

    import grpo.engine.rollout as rollout
    from grpo.engine.noise import row_keys
    from grpo.trainer import Trainer

    lengths = forced_lengths(args)
    slots, members = np.divmod(np.arange(args.rows), args.group)
    end_of = {
        tuple(key): length
        for step in range(1, WARM_UP + args.steps + 1)
        for key, length in zip(row_keys(SEED, step, slots, members).tolist(), lengths, strict=True)
    }
    choose, step = rollout._choose, Trainer.step
    started = []

    def forced_choose(logits, keys, t, sampling, stop_ids):  # type: ignore[no-untyped-def]
        tokens, logps = choose(logits.index_fill(1, stop_ids, -torch.inf), keys, t, sampling, stop_ids)
        ends = torch.tensor([end_of[tuple(key)] == t + 1 for key in keys.tolist()])
        return torch.where(ends, stop_ids[0], tokens), logps

    def timed_step(self, number):  # type: ignore[no-untyped-def]
        started.append(time.perf_counter())
        done = step(self, number)
        ours, expected = [row["length"] for row in done.samples], lengths
        assert ours == expected, f"lengths {ours} and not {expected}"
        if number == WARM_UP + args.steps:
            started.append(time.perf_counter())
        return done

    rollout._choose, Trainer.step = forced_choose, timed_step
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["launch.py", *settings(args), f"run_dir={folder}/run"]
        with contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / "launch.py"), run_name="__main__")
        rows = [json.loads(line) for line in (Path(folder) / "run/metrics/metrics.jsonl").read_text().splitlines()]
    print(
        "ours by part:",
        {k: round(v, 2) for k, v in rows[-1].items() if "timing" in k or k == "step_time"},
        file=sys.stderr,
    )
    return [after - before for before, after in itertools.pairwise(started)]


def run_trl(args: argparse.Namespace) -> list[float]:
    """Seconds of each step of TRL's trainer on the same prompts."""
    import torch
    from datasets import Dataset
    from transformers import LogitsProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from grpo.compose import compose_config
    from grpo.config import typed
    from grpo.data.prompts import messages, problems_of_step, render
    from grpo.engine.model import model_source
    from grpo.setup import prepare

    config = typed(compose_config(settings(args)))
    setup = prepare(config)
    steps = WARM_UP + args.steps
    problems = [p for s in range(1, steps + 1) for p in problems_of_step(setup.problems.train, SEED, s, args.prompts)]
    prompts = [render(setup.tokenizer, messages(problem.question, config.data)) for problem in problems]
    ends = torch.tensor(forced_lengths(args))
    times = []

    class ForceLengths(LogitsProcessor):
        def __init__(self, prompt_length):
            self.prompt_length = prompt_length

        def __call__(self, ids, scores):
            ending, stop = ends == ids.shape[1] - self.prompt_length + 1, setup.tokenizer.eos_token_id
            scores[ending] = -torch.inf
            scores[:, stop] = torch.where(ending, 0.0, -torch.inf)
            return scores

    class Times(TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    rows_at_once = min(8, args.rows)
    trainer = GRPOTrainer(
        model=model_source(config.model.name),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=setup.tokenizer,
        callbacks=[Times()],
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            model_init_kwargs={"dtype": "float32"},
            per_device_train_batch_size=rows_at_once,
            gradient_accumulation_steps=args.rows // rows_at_once,
            num_generations=args.group,
            max_completion_length=args.tokens,
            max_steps=steps,
            temperature=config.rollout.temperature,
            top_k=0,
            top_p=1.0,
            beta=0.04,
            learning_rate=config.optimizer["lr"],
            loss_type="grpo",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            shuffle_dataset=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
    )
    generate = trainer.model.generate

    def forced_generate(input_ids, **kwargs):
        result = generate(input_ids=input_ids, logits_processor=[ForceLengths(input_ids.shape[1])], **kwargs)
        lengths = (result[:, input_ids.shape[1] :] != setup.tokenizer.pad_token_id).sum(dim=1)
        assert args.third_by or (lengths >= args.tokens - 1).all(), f"lengths {lengths.tolist()}"
        return result

    trainer.model.generate = forced_generate
    times.append(time.perf_counter())
    trainer.train()
    return [after - before for before, after in itertools.pairwise(times)]


def count_floor(args: argparse.Namespace) -> dict[str, float]:
    """Seconds that the step's matrix products and the reading of its weights would take at the rates measured here."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from grpo.compose import compose_config
    from grpo.config import typed
    from grpo.data.prompts import problems_of_step
    from grpo.engine.model import model_source
    from grpo.setup import prepare

    config = typed(compose_config(settings(args)))
    setup = prepare(config)
    prompt_tokens = []
    for step in range(1 + WARM_UP, 1 + WARM_UP + args.steps):
        problems = problems_of_step(setup.problems.train, SEED, step, args.prompts)
        prompt_tokens.append(int(setup.prompt_batch(setup.conversations(problems)).mask.sum()))
    prompt_tokens = statistics.mean(prompt_tokens)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_source(config.model.name)))
    c, lengths = model.config, forced_lengths(args)
    head = model.get_output_embeddings().weight.numel()
    body = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)) - head
    inputs, outputs, steps = prompt_tokens + sum(lengths) - len(lengths), sum(lengths), max(lengths)
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    width *= c.num_attention_heads * c.num_hidden_layers
    mean_prompt = prompt_tokens / args.prompts
    attended = args.prompts * mean_prompt**2 / 2 + sum(n * (mean_prompt + n / 2) for n in lengths)
    forward = 2 * body * inputs + 2 * head * outputs + 4 * width * attended
    flops = forward + forward + 3 * forward  # sampling, reference, update
    dtype = torch.bfloat16 if args.ours_bf16 else torch.float32
    product_rate, read_rate = machine_rates(dtype)
    read = steps * (body + head) * dtype.itemsize
    return {
        "TFLOP": flops / 1e12,
        "GB_read": read / 1e9,
        "GFLOP/s": product_rate / 1e9,
        "GB/s": read_rate / 1e9,
        "seconds": (flops - forward) / product_rate + max(forward / product_rate, read / read_rate),
        "seconds_without_overlap": flops / product_rate + read / read_rate,
    }


def machine_rates(dtype) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """FLOP/s of a large matrix product and bytes/s of reading memory: the best of a few tries."""
    import torch

    a, b, big = torch.randn(1024, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype), torch.zeros(2**27)

    def best(work) -> float:  # type: ignore[no-untyped-def]
        seconds = []
        for _ in range(10):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    return 2 * 1024**3 / best(lambda: a @ b), big.numel() * 4 / best(lambda: big.sum())


def child(args: argparse.Namespace) -> None:
    import torch

    from grpo.engine.hardware import peak_memory_gb

    torch.manual_seed(SEED)
    if args.child == "floor":
        print(json.dumps(count_floor(args)))
        return
    times = (run_ours if args.child == "ours" else run_trl)(args)
    peak = peak_memory_gb(torch.device("cpu"))
    print(json.dumps({"seconds": times[WARM_UP:], "peak_gb": peak}))


def start_child(name: str) -> dict:
    command = [sys.executable, __file__, "--child", name, *sys.argv[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HYDRA_FULL_ERROR": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = arguments()
    if args.child:
        return child(args)
    floor = start_child("floor")
    runs: dict[str, list[dict]] = {"ours": [], "trl": []}
    for _ in range(args.rounds):
        for name, results in runs.items():
            results.append(start_child(name))
            print(
                f"{name:>5}: {[round(s, 2) for s in results[-1]['seconds']]} s, {results[-1]['peak_gb']:.2f} GB",
                flush=True,
            )
    ours, trl = (statistics.median(s for run in results for s in run["seconds"]) for results in runs.values())
    memory = {name: max(run["peak_gb"] for run in results) for name, results in runs.items()}
    print(
        f"floor: {floor['seconds']:.2f} s: {floor['TFLOP']:.2f} TFLOP at {floor['GFLOP/s']:.0f} GFLOP/s, decoding at "
        f"least {floor['GB_read']:.1f} GB at {floor['GB/s']:.1f} GB/s"
    )
    print(
        f"step: ours {ours:.2f} s, TRL {trl:.2f} s: {trl / ours:.2f} times faster, {ours / floor['seconds']:.2f} of "
        f"the floor; peak memory {memory['ours']:.2f} / {memory['trl']:.2f} GB = {memory['ours'] / memory['trl']:.2f}"
    )


if __name__ == "__main__":
    main()
