"""Compare a training step of this suite with TRL's GRPOTrainer on the same work: time, memory, and computed floor.

python tests/benchmarks/vs_trl.py [--shape 2x4x64] [--third-by N] [--ours-bf16] [--hardware PRESET] [OVERRIDE ...]

Both use the same model, prompts and group size, are forced to end each completion at the same length (all at the limit,
or a third of them at lengths spread up to --third-by tokens), and use AdamW, the same beta and one update per batch.
They run in turns, each time in a new process; that of TRL imports nothing of this suite. The first step of each process
is not counted. The time of a step is that from its start to the start of the next: it includes data, rewards and
logging, but no checkpoints and no evaluations.

TRL trains without gradient checkpointing, which would slow it down, unless --trl-checkpointing turns on this default of
TRL. Its passes have as many completions as fit into our token budget when padded, but at least 8, which is its default.
It uses torch's default number of threads unless --trl-threads is given.

The floor is the time of the work's matrix products at the measured rate of one large product. While decoding, it is the
time of reading the weights once per decode step at the measured rate of reading memory, if that is longer.
"""

import argparse
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
BETA = 0.04


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="2x4x64", help="prompts x completions of each x tokens of each")
    parser.add_argument("--third-by", type=int, help="tokens by which a third of the completions end")
    parser.add_argument("--ours-bf16", action="store_true", help="ours computes in bfloat16, TRL in float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="that are measured in each process")
    parser.add_argument("--hardware", default="cpu", help="a preset; on a card TRL computes in bfloat16 as well")
    parser.add_argument("--trl-threads", type=int)
    parser.add_argument("--trl-checkpointing", action="store_true")
    parser.add_argument("--json", type=Path, help="a file for the ratios")
    parser.add_argument("--child", choices=["work", "ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="such as model.name=DIR data.path=DIR; default: the tiny model")
    args = parser.parse_args()
    args.prompts, args.group, args.tokens = map(int, args.shape.split("x"))
    args.rows = args.prompts * args.group
    return args


def forced_lengths(args: argparse.Namespace) -> list[int]:
    """The number of tokens of each completion of a step; with --third-by the first of every three ends early."""
    early = len(range(0, args.rows, 3))
    return [
        args.third_by * (row // 3 + 1) // early if args.third_by and row % 3 == 0 else args.tokens
        for row in range(args.rows)
    ]


def computes_in_float32(args: argparse.Namespace) -> bool:
    """Whether this suite computes in float32."""
    return args.hardware == "cpu" and not args.ours_bf16


def settings(args: argparse.Namespace) -> list[str]:
    own = [] if args.overrides else ["experiment=quickstart"]
    return [
        *own,
        f"hardware={args.hardware}",
        f"seed={SEED}",
        "tracking=disabled",
        f"grpo.batch_size={args.prompts}",
        f"grpo.num_generations={args.group}",
        f"grpo.max_completion_length={args.tokens}",
        f"grpo.num_steps={WARM_UP + args.steps}",
        f"grpo.beta={BETA}",
        "grpo.mu=1",
        "eval.before=false",
        "eval.after=false",
        "checkpoint.every=0",
        f"hardware.compute_dtype={'float32' if computes_in_float32(args) else 'bfloat16'}",
        *args.overrides,
    ]


def run_ours(args: argparse.Namespace) -> list[float]:
    """Seconds of each step of a real launch in which every completion is forced to end at its length."""
    import numpy as np
    import torch

    import grpo.rollout.native as rollout
    from grpo.counter_rng import group_keys, token_keys
    from grpo.training.recorder import Recorder
    from grpo.training.trainer import Trainer

    lengths = forced_lengths(args)
    slots = np.arange(args.prompts)
    of_last = []  # the noise keys (rows, 2) of each completion's last token, by step
    for step in range(1, WARM_UP + args.steps + 1):
        of_tokens = token_keys(group_keys(SEED, step, slots, args.group), args.tokens)  # (tokens, rows, 2)
        of_last.append(of_tokens[torch.tensor(lengths) - 1, torch.arange(args.rows)])
    last = torch.cat(of_last)
    choose, run_step, record = rollout.sample_tokens, Trainer.step, Recorder.step
    times = []

    def forced_choose(logits, noise_keys, t, sampling, stop_ids, compiled):  # type: ignore[no-untyped-def]
        tokens, logps = choose(logits.index_fill(1, stop_ids, -torch.inf), noise_keys, t, sampling, stop_ids, compiled)
        ends = (noise_keys[:, None] == last.to(tokens.device)).all(dim=2).any(dim=1)
        return torch.where(ends, stop_ids[0], tokens), logps

    def timed_step(self, number):  # type: ignore[no-untyped-def]
        if number == 1:
            times.append(time.perf_counter())
        done = run_step(self, number)
        found = [row["length"] for row in done.samples]
        assert found == lengths, f"lengths {found} and not {lengths}"
        return done

    def timed_record(self, *arguments):  # type: ignore[no-untyped-def]
        record(self, *arguments)
        times.append(time.perf_counter())

    rollout.sample_tokens, Trainer.step, Recorder.step = forced_choose, timed_step, timed_record
    Recorder.save = lambda *_: None
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["launch.py", *settings(args), f"run_dir={folder}/run"]
        try:
            runpy.run_path(str(ROOT / "launch.py"), run_name="__main__")
        except SystemExit as error:
            if error.code:
                raise
        rows = [json.loads(line) for line in (Path(folder) / "run/metrics/metrics.jsonl").read_text().splitlines()]
    seconds = [after - before for before, after in itertools.pairwise(times)]
    parts = {part: rows[-1][f"timing_s/{part}"] for part in ("rollout", "reference", "update")}
    outside = seconds[-1] - sum(parts.values())
    print(
        f"ours, last step: {', '.join(f'{part} {s:.2f}' for part, s in parts.items())}; outside the model "
        f"{outside:.3f} s = {outside / seconds[-1]:.2%}",
        file=sys.stderr,
    )
    return seconds


def run_trl(args: argparse.Namespace, work: dict) -> list[float]:
    """Seconds of each step of TRL's trainer on the same prompts. `work` is from `describe_work`."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LogitsProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    if args.trl_threads:
        torch.set_num_threads(args.trl_threads)
    tokenizer = AutoTokenizer.from_pretrained(work["tokenizer"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ends, stop, times = torch.tensor(forced_lengths(args)), tokenizer.eos_token_id, []

    class ForceLengths(LogitsProcessor):
        def __init__(self, prompt_length):
            self.prompt_length = prompt_length

        def __call__(self, ids, scores):
            ending = (ends == ids.shape[1] - self.prompt_length + 1).to(scores.device)
            scores[ending] = -torch.inf
            scores[:, stop] = torch.where(ending, 0.0, -torch.inf)
            return scores

    class Times(TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    trainer = GRPOTrainer(
        model=work["model"],
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": work["prompts"]}),
        processing_class=tokenizer,
        callbacks=[Times()],
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            model_init_kwargs={"dtype": "float32"},
            per_device_train_batch_size=work["rows_at_once"],
            gradient_accumulation_steps=args.rows // work["rows_at_once"],
            num_generations=args.group,
            max_completion_length=args.tokens,
            max_steps=WARM_UP + args.steps,
            temperature=work["temperature"],
            top_k=0,
            top_p=1.0,
            beta=BETA,
            learning_rate=work["lr"],
            loss_type="grpo",
            gradient_checkpointing=args.trl_checkpointing,
            bf16=args.hardware != "cpu",
            use_cpu=args.hardware == "cpu",
            shuffle_dataset=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
    )
    generate = trainer.model.generate

    def forced_generate(input_ids, **kwargs):
        start = input_ids.shape[1]
        result = generate(input_ids=input_ids, logits_processor=[ForceLengths(start)], **kwargs)
        found = [(row == stop).nonzero()[0].item() + 1 for row in result[:, start:]]
        assert found == ends.tolist(), f"lengths {found} and not {ends.tolist()}"
        return result

    trainer.model.generate = forced_generate
    times.append(time.perf_counter())
    trainer.train()
    return [after - before for before, after in itertools.pairwise(times)]


def describe_work(args: argparse.Namespace, folder: str) -> dict:
    """The inputs for TRL's trainer, and the floor of a step in seconds at the rates measured here."""
    import torch

    from grpo.config.checks import typed
    from grpo.config.compose import compose_config
    from grpo.data.prompts import messages, render
    from grpo.data.sampler import PromptSampler
    from grpo.model.loading import RANDOM_MODELS, load_model, model_source
    from grpo.planning import estimate as cost
    from grpo.training.experiment import build_experiment

    config = typed(compose_config(settings(args)))
    experiment = build_experiment(config)
    sampler = PromptSampler(experiment.problems.train, SEED)
    steps = range(1, WARM_UP + args.steps + 1)
    problems = [problem for step in steps for problem in sampler.take(step, args.prompts).problems]
    source = model_source(config.model.name)
    if config.model.name in RANDOM_MODELS:
        source = folder
        load_model(config.model, torch.device("cpu")).save_pretrained(folder)
    tokenizer = f"{folder}/tokenizer"
    experiment.tokenizer.save_pretrained(tokenizer)

    prompt_tokens = experiment.prompts(experiment.conversations(problems)).mask.sum(dim=1).tolist()
    least = min(args.rows, 8)
    padded = max(prompt_tokens) + args.tokens
    fitting = [n for n in range(least, args.rows + 1) if args.rows % n == 0]
    rows = max((n for n in fitting if n * padded <= config.hardware.micro_batch_tokens), default=fitting[0])

    dtype = torch.float32 if computes_in_float32(args) else torch.bfloat16
    model = cost.meta_model(config.model, dtype, 0)
    flop_rate, read_rate = cost.machine_rates(dtype, experiment.device)
    step = cost.Work(args.prompts, args.group, round(statistics.mean(prompt_tokens)), forced_lengths(args))
    forward, flops = cost.forward_flops(model, step), cost.step_flops(model, step, reference=True, updates=1)
    read = cost.decode_bytes(model, step, dtype.itemsize)
    return {
        "model": source,
        "tokenizer": tokenizer,
        "prompts": [render(experiment.tokenizer, messages(problem.question, config.data)) for problem in problems],
        "temperature": config.rollout["temperature"],
        "lr": config.optimizer["lr"],
        "rows_at_once": rows,
        "floor": (flops - forward) / flop_rate + max(forward / flop_rate, read / read_rate),
        "counted": f"{flops / 1e12:.3g} TFLOP at {flop_rate / 1e9:.0f} GFLOP/s, decoding at least {read / 1e9:.3g} GB "
        f"at {read_rate / 1e9:.1f} GB/s",
    }


def peak_gb(on_card: bool) -> float:
    """Peak memory in GB, of the tensors on the card or of this process; works on Linux only."""
    if on_card:
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def child(args: argparse.Namespace, folder: str) -> None:
    if args.child == "work":
        Path(folder, "work.json").write_text(json.dumps(describe_work(args, folder)))
        return
    work = json.loads(Path(folder, "work.json").read_text())
    times = run_ours(args) if args.child == "ours" else run_trl(args, work)
    assert len(times) == WARM_UP + args.steps
    result = {"seconds": times[WARM_UP:], "peak_gb": peak_gb(on_card=args.hardware != "cpu")}
    Path(folder, "result.json").write_text(json.dumps(result))


def start_child(name: str, folder: str) -> None:
    command = [sys.executable, __file__, "--child", name, "--folder", folder, *sys.argv[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HYDRA_FULL_ERROR": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    subprocess.run(command, stdout=sys.stderr, env=environment, check=True)


def main() -> None:
    args = arguments()
    if args.child:
        return child(args, args.folder)
    runs: dict[str, list[dict]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        start_child("work", folder)
        work = json.loads(Path(folder, "work.json").read_text())
        print(f"TRL trains in passes of {work['rows_at_once']} completions")
        for _ in range(args.rounds):
            for name, results in runs.items():
                start_child(name, folder)
                results.append(json.loads(Path(folder, "result.json").read_text()))
                seconds = ", ".join(f"{s:.2f}" for s in results[-1]["seconds"])
                print(f"{name:>5}: {seconds} s; {results[-1]['peak_gb']:.2f} GB", flush=True)
    ours, trl = (statistics.median(s for run in results for s in run["seconds"]) for results in runs.values())
    memory = {name: max(run["peak_gb"] for run in results) for name, results in runs.items()}
    print(f"floor: {work['floor']:.2f} s: {work['counted']}")
    print(
        f"step: ours {ours:.2f} s, TRL {trl:.2f} s: {trl / ours:.2f} times faster, {ours / work['floor']:.2f} of the "
        f"floor; peak memory {memory['ours']:.2f} / {memory['trl']:.2f} GB = {memory['ours'] / memory['trl']:.2f}"
    )
    if args.json:
        ratios = {"times_as_fast_as_trl": trl / ours, "times_the_floor": ours / work["floor"]}
        args.json.write_text(json.dumps(ratios | {"memory_of_trl": memory["ours"] / memory["trl"]}))


if __name__ == "__main__":
    main()
