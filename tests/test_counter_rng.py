import math

import numpy as np
import pytest
import torch

from grpo.counter_rng import _gumbel, gumbel_noise, hash64, row_keys


def keys(seed=1, step=1, slots=(0,), completions=(0,)):
    return row_keys(seed, step, np.array(slots), np.array(completions))


def test_the_noise_of_a_completion_does_not_depend_on_other_rows():
    together = gumbel_noise(keys(slots=[0, 0, 1, 1], completions=[0, 1, 0, 1]), token=3, vocab_size=50)
    alone = gumbel_noise(keys(slots=[1], completions=[0]), token=3, vocab_size=50)
    assert torch.equal(together[2:3], alone)


def mix(x, second_key=0):
    x = ((x ^ x >> 16) * 0x7FEB352D + second_key) % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_the_noise_equals_its_definition_in_plain_integers():
    key = int(hash64(1, 7, 2, 3))
    low, high = key % 2**32, key >> 32
    golden = 0x9E3779B9
    token = 5
    first = mix((mix(low ^ token * golden % 2**32) + high) % 2**32)
    second = mix((mix(high ^ token * golden % 2**32) + low) % 2**32)
    expected = []
    for entry in range(20):
        bits = mix(entry * golden % 2**32 ^ first, second) % 2**31
        expected.append(-math.log(-math.log1p(-(bits + 0.5) / 2**31)))
    noise = gumbel_noise(keys(seed=1, step=7, slots=[2], completions=[3]), token, 20)
    torch.testing.assert_close(noise[0], torch.tensor(expected))


def test_the_hash_of_the_counters_does_not_change_between_releases():
    # A change here means that no earlier run can be reproduced.
    assert int(hash64(1, 2, 3, 4)) == 0x336C3255CBCC01FE


def test_every_counter_changes_the_noise():
    base = gumbel_noise(keys(), token=0, vocab_size=1000)
    others = [
        gumbel_noise(keys(seed=2), 0, 1000),
        gumbel_noise(keys(step=2), 0, 1000),
        gumbel_noise(keys(slots=[1]), 0, 1000),
        gumbel_noise(keys(completions=[1]), 0, 1000),
        gumbel_noise(keys(), 1, 1000),
    ]
    for other in others:
        assert (other == base).float().mean() < 0.01
        assert abs(np.corrcoef(other.numpy()[0], base.numpy()[0])[0, 1]) < 0.1


def test_the_noise_has_the_standard_gumbel_distribution():
    rows = keys(slots=range(200), completions=range(200))
    noise = torch.stack([gumbel_noise(rows, token, 1000) for token in range(5)]).flatten().sort().values
    assert torch.isfinite(noise).all()
    cumulative = torch.exp(-torch.exp(-noise.double()))
    distance = (cumulative - torch.linspace(0, 1, len(noise), dtype=torch.float64)).abs().max()
    assert distance < 1.63 / len(noise) ** 0.5  # Kolmogorov-Smirnov at 1 %


def test_every_pattern_of_random_bits_gives_finite_noise_that_grows_as_they_fall():
    """The largest patterns round to 1 in float32; -log(-log(1 - u)) would be -inf there."""
    ends = torch.cat([torch.arange(100), 2**31 - 1000 + torch.arange(1000)]).int()
    noise = _gumbel(ends)
    assert torch.isfinite(noise).all()
    assert (noise.diff() <= 0).all()
    assert noise[-1].item() == pytest.approx(-math.log(24 * math.log(2)), rel=1e-4)  # that of u = 1 - 2**-24


def test_neighbouring_tokens_rows_and_vocabulary_entries_are_uncorrelated():
    rows = keys(slots=range(300), completions=range(300))
    noise = torch.stack([gumbel_noise(rows, token, 300) for token in range(3)]).numpy()
    pairs = {
        "token": (noise[0], noise[1]),
        "row": (noise[0, 1:], noise[0, :-1]),
        "vocabulary": (noise[0, :, 1:], noise[0, :, :-1]),
    }
    for name, (a, b) in pairs.items():
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / a.size**0.5, name


def test_gumbel_max_draws_from_the_softmax():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.0499, 0.0001])
    rows = keys(slots=range(2000), completions=[0] * 2000)
    drawn = torch.cat([(probabilities.log() + gumbel_noise(rows, token, 5)).argmax(dim=1) for token in range(50)])
    counts = drawn.bincount(minlength=5).double()
    expected = probabilities.double() * len(drawn)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # 4 degrees of freedom at 0.1 %
