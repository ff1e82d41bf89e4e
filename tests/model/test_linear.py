import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from grpo.model import linear
from grpo.model.hardware import cpu_supports_bfloat16
from grpo.model.linear import OneDnnLinear, onednn_linear, use_onednn
from tests.launches import ROOT

pytestmark = pytest.mark.usefixtures("onednn_for_small_weights")


def test_a_bias_has_a_gradient_even_if_nothing_else_needs_one():
    layer = nn.Linear(6, 4)
    use_onednn(layer)
    layer.weight.requires_grad_(False)
    layer(torch.randn(3, 6)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((4,), 3.0))


@pytest.mark.parametrize("rows", [linear.FEW_ROWS, linear.FEW_ROWS + 1])
@pytest.mark.parametrize("least", [64 * 63, 64 * 63 + 1])
def test_products_of_many_rows_with_a_small_weight_are_computed_by_torch(monkeypatch, least, rows):
    """For a new number of rows, oneDNN takes longer to prepare such a product than torch to compute it."""
    monkeypatch.setattr(linear, "LEAST_ELEMENTS", least)
    layer = nn.Linear(63, 64)
    use_onednn(layer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        layer(torch.randn(rows, 63))
    by_onednn = any("mkldnn" in event.name for event in profile.events())
    assert by_onednn == (least == 64 * 63 or rows == linear.FEW_ROWS)


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_by_onednn_and_its_gradients_equal_those_of_a_linear_layer(bias):
    torch.manual_seed(0)
    plain = nn.Linear(6, 4, bias=bias)
    ours = copy.deepcopy(plain)
    use_onednn(ours)
    assert type(ours) is OneDnnLinear
    assert list(ours.state_dict()) == list(plain.state_dict())
    inputs = torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 3, 6, requires_grad=True)
    inputs[1].data.copy_(inputs[0])
    factors = torch.randn(2, 3, 4)
    outputs = [layer(x) for layer, x in zip((ours, plain), inputs, strict=True)]
    for output in outputs:
        (output * factors).sum().backward()
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs[0]), F.linear(inputs[0], plain.weight, plain.bias))


@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_dtype_that_onednn_does_not_support_here_is_multiplied_by_torch(monkeypatch, dtype, able):
    """oneDNN refuses float64 on every processor, and bfloat16 on older ones."""
    monkeypatch.setattr(linear, "cpu_supports_bfloat16", lambda: able)
    linear._onednn_dtypes.cache_clear()
    layer = nn.Linear(6, 4).to(dtype)
    use_onednn(layer)
    linear_type = OneDnnLinear if dtype == torch.float32 or (dtype == torch.bfloat16 and able) else nn.Linear
    x = torch.randn(3, 6).to(dtype)
    if linear_type is nn.Linear or dtype == torch.float32 or cpu_supports_bfloat16():
        torch.testing.assert_close(onednn_linear(x, layer.weight, layer.bias), F.linear(x, layer.weight, layer.bias))
    linear._onednn_dtypes.cache_clear()
    assert type(layer) is linear_type


EVER_NEW_SHAPES = """
import torch
from grpo.model.hardware import _limit_primitive_caches, peak_memory_gb
from grpo.model.linear import onednn_linear

_limit_primitive_caches()
weight = torch.zeros(512, 256)
for rows in range(5000, 5400):
    onednn_linear(torch.zeros(rows, 256), weight)
    if rows == 5100:
        before = peak_memory_gb(torch.device("cpu"))
print(peak_memory_gb(torch.device("cpu")) - before)
"""


@pytest.mark.slow
def test_products_of_always_new_shapes_do_not_accumulate_memory():
    """Without the limit each shape would keep 5 MB, 1.6 GB in total. The rest is fragmentation of the allocator."""
    done = subprocess.run([sys.executable, "-c", EVER_NEW_SHAPES], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.4
