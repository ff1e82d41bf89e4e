"""Measure sampling: tokens per second of this suite, of transformers' generate and, if it is installed, of vLLM.

python tests/benchmarks/rollout.py [MODEL] [--shape 2x8x64] [--prompt-tokens 80] [--third] [--dtype float32]

MODEL is a hub name or local folder; default: the embedded one. All read the same prompts of random tokens, sample at
temperature 1 and end each completion at the same length: all at the limit, or with --third a third of them within a
quarter of it (without vLLM then, for which only one length can be set). They run in turns in one process, and the
median times count. Only tokens up to the end of each completion are counted. The time of a decoded token, without that
of the prompts, is compared with the time of reading the weights. With --torch-decoding this suite decodes without C
code. VLLM_CPU_OMP_THREADS_BIND=0-1 lets vLLM use two cores; its default leaves one free.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor

import grpo.rollout.native as engine
from grpo.batch import Prompts
from grpo.config.schema import ModelConfig
from grpo.counter_rng import group_keys, token_keys
from grpo.model.loading import RANDOM_MODELS, load_model, model_source
from grpo.planning import estimate as cost
from grpo.rollout.load_check import choose_implementation

STOP, PAD = 2, 0
START = "start"  # a rollout of one token each, to be subtracted


class ForceLengths(LogitsProcessor):
    """Makes `generate` end each row at its length in `ends`."""

    def __init__(self, ends: torch.Tensor, prompt_tokens: int) -> None:
        self.ends, self.prompt_tokens = ends, prompt_tokens

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ending = self.ends == ids.shape[1] - self.prompt_tokens + 1
        scores[ending] = -torch.inf
        scores[:, STOP] = torch.where(ending, 0.0, -torch.inf)
        return scores


def force_lengths(ends: torch.Tensor, keys: torch.Tensor) -> None:
    """Make `rollout` end the row of each key at its length in `ends`."""
    choose = engine.sample_tokens
    of_tokens = token_keys(keys.to(ends.device), int(ends.max()))  # (tokens, rows, 2)
    last = of_tokens[ends - 1, torch.arange(len(ends), device=ends.device)]  # (rows, 2)

    def forced(logits, noise_keys, t, sampling, stop_ids, compiled):  # type: ignore[no-untyped-def]
        tokens, logps = choose(logits.index_fill(1, stop_ids, -torch.inf), noise_keys, t, sampling, stop_ids, compiled)
        ending = (noise_keys[:, None] == last).all(dim=2).any(dim=1)
        return torch.where(ending, stop_ids[0], tokens), logps

    engine.sample_tokens = forced


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--shape", default="2x8x64", help="prompts x completions of each x tokens")
    parser.add_argument("--prompt-tokens", type=int, default=80)
    parser.add_argument("--third", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--torch-decoding", action="store_true", help="decode without C code")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="a file for the ratios")
    args = parser.parse_args()
    prompts, group, tokens = map(int, args.shape.split("x"))
    rows, device = prompts * group, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(ModelConfig(args.model, "sdpa", args.dtype, "auto", False), device)
    choose_implementation(model, compiled_decoding=not args.torch_decoding)

    source = model_source(args.model)
    if args.model in RANDOM_MODELS:
        source = tempfile.mkdtemp()
        model.save_pretrained(source)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=model.dtype).to(device).eval()
    ids = torch.randint(5, model.config.vocab_size, (prompts, args.prompt_tokens), device=device)
    batch = Prompts(ids, torch.ones_like(ids))
    ends = torch.full((rows,), tokens, device=device)
    if args.third:
        ends[::3] = torch.linspace(tokens / 8, tokens / 4, len(ends[::3]), device=device).long()
    keys = group_keys(1, 1, np.arange(prompts), group)
    force_lengths(ends, keys)
    repeated = ids.repeat_interleave(group, dim=0)

    def ours(most: int = tokens) -> None:
        completions = engine.rollout(
            model,
            batch,
            engine.Sampling(most, 1.0, (STOP,), PAD),
            group_size=group,
            keys=keys,
            token_budget=2**40,
        )
        assert completions.lengths.tolist() == ends.clamp(max=most).tolist()

    def generate() -> None:
        result = plain.generate(
            repeated,
            attention_mask=torch.ones_like(repeated),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=1.0,  # these four equal our sampling and override the model's generation config
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            eos_token_id=STOP,
            pad_token_id=PAD,
            logits_processor=[ForceLengths(ends, args.prompt_tokens)],
        )
        assert result.shape == (rows, args.prompt_tokens + tokens)

    contestants = {"ours": ours, "generate": generate, START: lambda: ours(1)}
    if not args.third and (vllm := vllm_contestant(args, source, ids, group, tokens)):
        contestants["vLLM"] = vllm
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(args.rounds + 1):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    token = (medians["ours"] - medians.pop(START)) / (int(ends.max()) - 1)
    read_rate = cost.machine_rates(model.dtype, device)[1]
    reading = sum(cost.products(model)) * model.dtype.itemsize / read_rate
    rates = {name: int(ends.sum()) / median for name, median in medians.items()}
    print(f"{args.model} {args.dtype} on {device}, {args.shape}{', a third early' if args.third else ''}")
    for name, rate in rates.items():
        print(f"{name:>9} {rate:8.1f} tokens/s; ours is {rates['ours'] / rate:.2f} times as fast")
    print(
        f"a token of all rows takes {token * 1e3:.1f} ms, {token / reading:.2f} times reading the weights at "
        f"{read_rate / 1e9:.1f} GB/s"
    )
    if args.json:
        ratios = {f"times_as_fast_as_{name}": rates["ours"] / rate for name, rate in rates.items() if name != "ours"}
        args.json.write_text(json.dumps(ratios | {"times_reading_the_weights": token / reading}))


def vllm_contestant(args, source, ids, group, tokens):  # type: ignore[no-untyped-def]
    """A function that samples with vLLM from the same prompts, or None if vLLM is not installed."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        return None
    llm = LLM(source, dtype=args.dtype, max_model_len=args.prompt_tokens + tokens + 8)
    params = SamplingParams(n=group, temperature=1.0, max_tokens=tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
    return functools.partial(llm.generate, prompts, params, use_tqdm=False)


if __name__ == "__main__":
    main()
