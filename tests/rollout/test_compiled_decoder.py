"""`CompiledDecoder` against the plain decoder with transformers' cache, and the C library that it calls."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo import c_library
from grpo.batch import Prompts
from grpo.c_library import SOURCES, CompilerError, load_library
from grpo.config.compose import compose_config
from grpo.config.schema import LoraSettings
from grpo.counter_rng import noise_from, row_keys, token_keys
from grpo.model import hardware
from grpo.model.hardware import resolve_hardware
from grpo.model.implementation import implementation_of
from grpo.model.linear import use_onednn
from grpo.model.loading import copy_in_dtype
from grpo.model.lora import add_adapter
from grpo.model.threads import use_threads
from grpo.rollout import compiled_decoder
from grpo.rollout import native as engine
from grpo.rollout.compiled_decoder import CompiledDecoder
from grpo.rollout.engine import Sampling
from grpo.rollout.load_check import choose_implementation
from grpo.rollout.native import CachedDecoder
from tests.architectures import random_model
from tests.rollout.test_load_check import DOCUMENT
from tests.rollout.test_native import model_of_the_family

pytestmark = pytest.mark.skipif(c_library.compiler_version() == "none", reason="there is no C compiler")

PROMPT_OF_ROW = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
# The rows that are left at each token, at the end a single one.
ROWS = [*([list(range(8))] * 3), [0, 2, 3, 4, 6], [0, 2, 3, 4, 6], [0, 3, 4], [4]]


@torch.no_grad()
def decoded(kind, model, prompts, prompt_of_row=PROMPT_OF_ROW, rows_left=ROWS):
    """The logits at each token, (rows, V) each, while rows are removed."""
    vocabulary = model.config.vocab_size
    shape = len(rows_left), len(prompt_of_row)
    tokens = torch.randint(5, vocabulary, shape, generator=torch.Generator().manual_seed(1))
    decoder = kind(model, prompts, prompt_of_row, len(rows_left))
    found, before = [decoder.logits], list(range(len(prompt_of_row)))
    for of_rows, rows in zip(tokens, rows_left, strict=True):
        if rows != before:
            decoder.keep(torch.tensor([before.index(row) for row in rows]))
        decoder.read(of_rows[rows])
        found.append(decoder.logits)
        before = rows
    return found


def check(model, prompts, prompt_of_row=PROMPT_OF_ROW, rows_left=ROWS, tolerance=1e-4):
    compiled, plain = (
        decoded(kind, model, prompts, prompt_of_row, rows_left) for kind in (CompiledDecoder, CachedDecoder)
    )
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.fixture(params=["llama", "mistral", "qwen2", "qwen3"])
def kind(request):
    """With biases (Qwen2), with norms of heads (Qwen3), and without either (Llama, Mistral)."""
    return request.param


@pytest.mark.parametrize("tied", [True, False])
def test_the_logits_equal_those_of_plain_decoding_for_each_model_of_the_family(kind, tied, prompts):
    check(model_of_the_family(kind, tied), prompts)


@pytest.mark.parametrize("small", [0, 2**62], ids=["blocks", "panels"])
def test_many_rows(small, prompts, monkeypatch):
    """Products of many rows have larger blocks. small: the elements below which a weight is stored in panels."""
    monkeypatch.setattr(compiled_decoder, "SMALL", small)
    rows = [list(range(count)) for count in (39, 38, 21, 20, 19, 7)]
    check(model_of_the_family("qwen2", True), prompts, torch.arange(39) // 13, rows)


@pytest.mark.parametrize("rank", [4, 20])
def test_an_adapter_is_added(kind, rank, prompts):
    model = model_of_the_family(kind, True)
    settings = LoraSettings(rank=rank, alpha=4, target_modules="all-linear", init_from=None)
    add_adapter(model, settings, torch.float32, 1)
    plain = decoded(CompiledDecoder, model, prompts)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    check(model, prompts)
    assert not torch.allclose(plain[-1], decoded(CompiledDecoder, model, prompts)[-1], rtol=0.1)


@pytest.mark.parametrize("adapter", [True, False])
def test_bfloat16_weights_give_the_logits_of_these_weights_in_float32(kind, adapter, prompts):
    """The difference is that of the prompts' keys and values, and of positions, which are rounded to bfloat16."""
    narrow = model_of_the_family(kind, True).to(torch.bfloat16)
    if adapter:
        add_adapter(narrow, LoraSettings(8, 8, ["q_proj", "down_proj"], None), torch.float32, 1)
        for name, parameter in narrow.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    wide = copy_in_dtype(narrow, torch.float32)
    found, expected = decoded(CompiledDecoder, narrow, prompts), decoded(CompiledDecoder, wide, prompts)
    rounded = decoded(CachedDecoder, narrow, prompts)
    errors, errors_of_plain = (
        [float((a - b).norm() / b.norm()) for a, b in zip(logits, expected, strict=True)] for logits in (found, rounded)
    )
    assert max(errors) < 0.05
    assert sum(errors) < sum(errors_of_plain)


@torch.no_grad()
def test_the_bits_depend_neither_on_the_threads_nor_on_the_other_rows(kind, prompts):
    def found(threads, rows_left):
        def with_threads(*arguments):
            decoder = CompiledDecoder(*arguments)
            decoder._model.threads = threads  # of `decode` alone, since torch's products may depend on their number
            return decoder

        with use_threads(3):
            return decoded(with_threads, model, prompts, rows_left=rows_left)

    model = model_of_the_family(kind, True)
    alone = found(1, [[4]] * len(ROWS))
    for threads in (1, 2, 3):
        together = found(threads, [list(range(8))] * len(ROWS))
        fewer = found(threads, ROWS)
        for t in range(1, len(ROWS) + 1):
            assert torch.equal(together[t][4], alone[t][0])
            assert torch.equal(fewer[t], together[t][ROWS[t - 1]])


def test_a_long_prompt_and_a_long_completion(prompts):
    """More tokens than fit into a vector, and not a multiple of it."""
    model = model_of_the_family("qwen2", True)
    ids = torch.randint(5, 600, (2, 133), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :60] = 0
    rows = [[0, 1, 2]] * 75
    group = torch.tensor([0, 1, 1])
    compiled, plain = (
        decoded(each, model, Prompts(ids * mask, mask), group, rows) for each in (CompiledDecoder, CachedDecoder)
    )
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flag", ["-mavx512f", "-mavx2", "-msse4.2"])
def test_each_size_of_vectors_gives_the_same_logits(flag, prompts, monkeypatch, tmp_path):
    if flag.removeprefix("-m").replace(".", "_") not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {flag.removeprefix('-m')}")
    flags = [each for each in c_library.FLAGS if each != "-march=native"]
    flags += ["-march=x86-64", flag, *(["-mfma"] if flag != "-msse4.2" else [])]
    monkeypatch.setattr(c_library, "FLAGS", tuple(flags))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = load_library.__wrapped__()
    monkeypatch.setattr(compiled_decoder, "load_library", lambda: library)
    check(model_of_the_family("qwen3", True), prompts)
    assert len(list((tmp_path / "grpo").iterdir())) == 1


def test_the_decoder_is_chosen_only_if_asked_for_and_for_suitable_models(prompts):
    model = model_of_the_family("llama", True)
    assert implementation_of(model).sampling == "fast"
    for dtype, expected in ((None, "compiled"), (torch.bfloat16, "compiled"), (torch.float16, "fast")):
        choose_implementation(model, None, dtype, compiled_decoding=True)
        assert implementation_of(model).sampling == expected
    settings = {"vocab_size": 600, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    odd = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings, **heads))
    choose_implementation(odd, compiled_decoding=True)
    assert implementation_of(odd).sampling == "fast"


@pytest.mark.parametrize(
    ("file", "right_part", "wrong_part"),
    [
        ("decode.c", "first * cosine[k] - second", "first * cosine[k] + second"),
        ("decode.c", "BLOCK(PANEL_ROWS)", "BLOCK(PANEL_ROWS - 1)"),
        ("sample.c", "0x846CA68Bu", "0x846CA68Du"),
        ("sample.c", "if (found > best)", "if (found < best)"),
    ],
)
def test_a_wrong_library_is_not_used(prompts, monkeypatch, tmp_path, file, right_part, wrong_part):
    """The check of a loaded model compares the compiled decoder with plain passes."""
    sources = tmp_path / "c"
    shutil.copytree(SOURCES, sources)
    right = (sources / file).read_text()
    assert right_part in right
    (sources / file).write_text(right.replace(right_part, wrong_part))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = load_library.__wrapped__(sources)
    monkeypatch.setattr(compiled_decoder, "load_library", lambda: library)
    model = model_of_the_family("llama", True)
    choose_implementation(model, compiled_decoding=True)
    assert implementation_of(model).sampling == "fast"


@pytest.mark.parametrize(
    ("name", "wanted", "warns"),
    [("no-such-compiler", "null", False), ("no-such-compiler", "true", True), ("gcc '", "null", True)],
)
def test_without_a_working_compiler_torch_is_used(monkeypatch, caplog, name, wanted, warns):
    """With a warning, unless there is none and none was asked for."""
    monkeypatch.setenv("CC", name)
    load_library.cache_clear()
    try:
        cfg = compose_config(["hardware=cpu", f"hardware.compiled_decoding={wanted}"])
        resolve_hardware(cfg)
        assert cfg.hardware.compiled_decoding is False
        assert ("sampling uses torch's operations" in caplog.text) == warns
        assert c_library.compiler_version() == "none"
    finally:
        load_library.cache_clear()


@pytest.mark.parametrize(("able", "expected"), [(True, False), (False, True)])
def test_bfloat16_is_left_to_processors_that_multiply_it_unless_the_c_code_is_asked_for(monkeypatch, able, expected):
    monkeypatch.setattr(hardware, "cpu_supports_bfloat16", lambda: able)
    for wanted, found in (("null", expected), ("true", True), ("false", False)):
        cfg = compose_config(
            ["hardware=cpu", "hardware.compute_dtype=bfloat16", f"hardware.compiled_decoding={wanted}"]
        )
        resolve_hardware(cfg)
        assert cfg.hardware.compiled_decoding is found


LOAD = "import torch; from grpo.c_library import load_library; print(load_library().decode is not None)"


def test_a_damaged_library_is_compiled_again(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True)
        assert done.stdout == "True\n", done.stderr
        (library,) = (tmp_path / "grpo").iterdir()
        assert library.stat().st_size > 0
        library.write_bytes(b"")


def test_a_file_that_cannot_be_compiled_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "wrong.c").write_text("int main( {")
    with pytest.raises(CompilerError, match=r"cannot compile .*sources: .*wrong.c:1:"):
        load_library.__wrapped__(sources)
    assert list((tmp_path / "cache" / "grpo").iterdir()) == []


def test_without_a_writable_home_the_library_is_compiled_for_this_process(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    c_library._folder_of_process.cache_clear()
    assert load_library.__wrapped__().decode
    assert len(list(tmp_path.glob("grpo-*/*.so"))) == 1
    c_library._folder_of_process.cache_clear()


def test_processes_that_compile_at_once_all_get_a_whole_library(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", LOAD], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate()[0] for process in processes] == ["True\n"] * 3
    assert len(list((tmp_path / "grpo").iterdir())) == 1


def sampled(logits, keys, sampling, t=0, compiled=True):
    stop_ids = torch.tensor(sampling.stop_ids)
    return engine.sample_tokens(logits, keys, t, sampling, stop_ids, compiled)


SIZES = [3, 16, 511, 512, 513, 1500, 49_152]


@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("forbidden", [True, False])
def test_the_tokens_and_their_log_probabilities_are_those_of_plain_sampling(vocabulary, temperature, forbidden):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(64, vocabulary, generator=generator)
    logits[:, 1] = 14.0  # a stop token, which is often chosen if it is allowed
    keys = token_keys(row_keys(1, 2, np.arange(64), np.arange(64)), 1)[0]
    settings = Sampling(5, temperature, (1, vocabulary - 1), 0, min_new_tokens=int(forbidden))
    (ours, our_logps), (plain, plain_logps) = (
        sampled(logits, keys, settings, compiled=compiled) for compiled in (True, False)
    )
    assert torch.equal(ours, plain)
    torch.testing.assert_close(our_logps, plain_logps, rtol=1e-5, atol=1e-5)
    assert bool((ours == 1).any()) != forbidden


def test_the_noise_is_that_of_the_counter():
    """With equal logits the token is the one with the largest noise; with one logit raised, until it wins."""
    keys = token_keys(row_keys(1, 2, np.arange(200), np.arange(200)), 1)[0]
    noise = noise_from(keys, 64)
    settings = Sampling(5, 1.0, (0,), 0)
    order = noise.sort(dim=1, descending=True)
    best, second = order.values[:, 0], order.values[:, 1]
    for change, winner in ((-1e-5, 0), (1e-5, 1)):
        logits = torch.zeros(200, 64).scatter(1, order.indices[:, 1:2], (best - second + change)[:, None])
        assert torch.equal(sampled(logits, keys, settings)[0], order.indices[:, winner])


def test_the_first_of_equal_logits_is_chosen_and_nan_does_not_hang():
    settings = Sampling(5, 0.0, (0,), 0)
    keys = torch.zeros(3, 2, dtype=torch.int32)
    logits = torch.zeros(3, 1200)
    logits[0, [7, 600, 1100]] = 5.0
    logits[1, [1199]] = 5.0
    logits[2] = torch.nan
    assert sampled(logits, keys, settings)[0].tolist()[:2] == [7, 1199]
    logits[0, 3] = torch.nan
    assert sampled(logits, keys, Sampling(5, 1.0, (0,), 0))[1].isnan().tolist() == [True, False, True]
    first_lane = torch.tensor([[torch.nan, *[0.0] * 15, 5.0, *[0.0] * 31]])
    assert sampled(first_lane, keys[:1], settings)[0].tolist() == [16]


LLAMA_LIKE = [row.split(" | ")[0].strip("| ") for row in DOCUMENT.read_text().splitlines() if " | fast | " in row]


def test_the_table_of_docs_has_such_architectures():
    assert {"llama", "qwen2", "qwen3"} <= set(LLAMA_LIKE)


@pytest.mark.parametrize("kind", LLAMA_LIKE)
def test_architectures_that_share_the_layers_of_llama_can_be_compiled(kind):
    """With their own configs, which may have the language model's in a part."""
    model = random_model(kind, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    use_onednn(model)
    choose_implementation(model, compiled_decoding=True)
    assert implementation_of(model).sampling == "compiled"
