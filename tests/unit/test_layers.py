"""Which modules are layers; convolutions as matrices, against explicit patches and the dense reference."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lngd import LNGD
from hf_lngd.layers import Geometry, Layer, Window, add_layer_type, factor_blocks, geometry_of, patch_chunks
from tests.helpers import every_sample
from tests.reference import factors
from tests.unit.convolutions import CASES, convolution, patches_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
ALL = 1 << 40


def rows_of(x: Tensor, window: Window, units: int) -> Tensor:
    """All patches at once: [units, N, d]."""
    ((rows, where),) = patch_chunks(x, window, units, ALL)
    assert where == slice(0, rows.shape[1])
    return rows


# Convolutions


@pytest.mark.parametrize("case", CASES)
def test_rows_are_what_the_convolution_multiplies(case: str) -> None:
    module, x = convolution(case, bias=False)
    rows = rows_of(x, Window.of(module), module.groups)
    torch.testing.assert_close(rows, patches_of(module, x).detach())
    matrices = module.weight.view(module.groups, -1, rows.shape[-1])
    output = (rows @ matrices.mT).transpose(0, 1).reshape(-1, module.out_channels)
    torch.testing.assert_close(output, module(x).movedim(1, -1).reshape(output.shape))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("most", [1, 300])
def test_pieces_make_the_whole(case: str, most: int) -> None:
    module, x = convolution(case)
    window = Window.of(module)
    pieces = list(patch_chunks(x, window, module.groups, most))
    whole = rows_of(x, window, module.groups)
    torch.testing.assert_close(torch.cat([rows for rows, _ in pieces], 1), whole, rtol=0, atol=0)
    assert [i for _, where in pieces for i in range(where.start, where.stop)] == list(range(whole.shape[1]))
    line = x[0, :1].numel() // x.shape[2] * whole.shape[-1] * module.groups  # one line of positions, at the most
    assert all(rows.numel() <= max(most, line) for rows, _ in pieces)


@pytest.mark.parametrize("case", ["3x3", "unlike sides", "grouped", "depthwise, two each", "1d, grouped", "3d"])
@pytest.mark.parametrize("natural", [False, True])
def test_factors_are_those_of_the_patches(case: str, natural: bool) -> None:
    """With φ' and the bias's column where the direction is the paper's; the default takes φ' as 1."""
    conv, x = convolution(case)
    fields = {"direction": "natural", "bias": "factor"} if natural else {}
    model = nn.Sequential(conv, nn.ReLU())
    with every_sample():
        optimizer = LNGD(model, lr=0.0, max_factor_dim=999, **fields)
        model(x).square().mean().backward()
        optimizer.step()
    found, a = optimizer.factors("0"), patches_of(conv, x).detach()
    a = torch.cat((a, torch.ones(*a.shape[:2], 1).double()), 2) if natural else a
    s = conv(x).detach().movedim(1, -1).reshape(a.shape[1], conv.groups, -1).transpose(0, 1)
    g2 = (s > 0).double() if natural else torch.ones_like(s)
    for unit in range(conv.groups):
        phi, psi = factors(a[unit], g2[unit])
        mine = {k: v[unit] if conv.groups > 1 else v for k, v in found.items()}
        torch.testing.assert_close(mine["phi"], phi, rtol=1e-10, atol=1e-12)
        if natural:
            torch.testing.assert_close(mine["psi"], psi, rtol=1e-10, atol=1e-12)


def test_unlike_windows_on_one_tensor_do_not_share_a_factor() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3), nn.Conv2d(3, 4, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).sum() + self.b(x).sum() + self.c(x).sum()

    model = Two()
    optimizer = LNGD(model)
    model(torch.randn(2, 3, 8, 8)).backward()
    optimizer.step()
    assert sorted(sorted(g.members) for g in optimizer.core.capture.topology.groups) == [["a", "b"], ["c"]]
    a, b, c = (geometry_of(module) for module in (model.a, model.b, model.c))
    assert a.reads_like(b) and not a.reads_like(c)


def test_memory_of_patches_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for item in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(item, Tensor) and item.untyped_storage().nbytes() > self.size:
                    self.size = item.untyped_storage().nbytes()
            return result

    x, sizes = torch.randn(16, 16, 32, 32), {}
    for memory in (1, 4, 64):
        monkeypatch.setattr("hf_lngd.layers.MOST_PATCHES", memory << 18)
        model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False))
        with every_sample(), Largest() as watch:
            optimizer = LNGD(model, lr=0.0)
            model(x)
        sizes[memory] = watch.size / 2**20
        optimizer.close()
    whole = 16 * 32 * 32 * 16 * 9 * 4 / 2**20  # 9 MiB
    assert sizes[1] <= 1.3 and sizes[4] <= 4.1 and sizes[64] >= whole  # the padded input is 1.13 MiB itself


# The canonical form


def layer_of(module: nn.Module, bias: bool) -> Layer:
    geometry = geometry_of(module)
    assert geometry is not None
    own = ("bias", module.bias) if bias else (None, None)
    return Layer("layer", geometry, "weight", module.weight, *own, modules=[("layer", module)])


MODULES = {
    "linear": lambda: (nn.Linear(5, 4), torch.randn(2, 3, 5)),
    "transposed": lambda: (Conv1D(4, 5), torch.randn(2, 3, 5)),
    "convolution": lambda: (nn.Conv2d(3, 4, 2), torch.randn(2, 3, 5, 4)),
    "grouped": lambda: (nn.Conv1d(4, 6, 2, groups=2), torch.randn(3, 4, 6)),
    "without a batch": lambda: (nn.Conv1d(4, 6, 2, groups=2), torch.randn(4, 6)),
}


@pytest.mark.parametrize("case", MODULES)
@pytest.mark.parametrize("bias", [False, True])
def test_weights_inputs_and_outputs_of_a_layer_fit_together(case: str, bias: bool) -> None:
    module, x = MODULES[case]()
    layer = layer_of(module, bias)
    matrices = layer.matrices(layer.parameters, torch.float64)
    assert matrices.shape == (layer.units, layer.m, layer.columns) and layer.columns == layer.d + bias
    weight, *found = layer.like_parameters(matrices)
    assert torch.equal(weight, module.weight.double()) and len(found) == bias
    assert not bias or torch.equal(found[0], module.bias.double())
    ((a, where),) = layer.inputs(x)
    if not bias:
        module.bias.data.zero_()
    output = module(x)
    s = layer.outputs(output)
    assert s.shape == (layer.units, where.stop, layer.m) and where.stop == layer.locations(output).numel()
    torch.testing.assert_close(a @ matrices.float().mT, s)
    if layer.geometry.kind != "transposed":
        torch.testing.assert_close(layer.apply(x, matrices.float()), layer.batched(output))


def test_inputs_of_half_precision_come_in_full() -> None:
    layer = layer_of(nn.Linear(5, 4).bfloat16(), False)
    ((a, _),) = layer.inputs(torch.randn(3, 5).bfloat16().requires_grad_())
    assert a.dtype == layer.like.dtype == torch.float32 and not a.requires_grad


def test_what_is_no_layer() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Plain(nn.Linear):
        pass

    weight_norm = nn.utils.parametrizations.weight_norm
    for module in (Own(3, 2), nn.ConvTranspose1d(3, 2, 1), weight_norm(nn.Linear(3, 2)), nn.Bilinear(2, 2, 2)):
        assert geometry_of(module) is None
    assert geometry_of(Plain(3, 2)) == Geometry("linear", 1, 2, 3)


@pytest.mark.parametrize(
    ("d", "m", "bias", "limit", "blocks"),
    [
        (130, 200, False, "auto", (1, 130)),
        (300, 70, False, "auto", (5, 60)),
        (300, 4, False, "auto", (5, 60)),  # never cut below 64
        (300, 100, True, "auto", (3, 101)),
        (300, 4, False, 1 << 20, (1, 300)),
        (7, 4, True, 3, (3, 3)),
    ],
)
def test_how_factors_are_cut(d: int, m: int, bias: bool, limit: Any, blocks: tuple[int, int]) -> None:
    assert factor_blocks(layer_of(nn.Linear(d, m, device="meta"), bias), limit) == blocks


# A type of the user's: docs/extending.md


@pytest.fixture
def page() -> Iterator[dict[str, Any]]:
    """What the page's code defines, its layer type added."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, names)
    yield names
    add_layer_type(names["HeadProjection"], None)


class Net(nn.Module):
    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projection, self.act, self.out = projection, nn.Tanh(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.projection(x)))


def trained(model: Net, **fields: Any) -> tuple[LNGD, Tensor, Tensor]:
    optimizer = LNGD(model, lr=0.05, factor_interval=2, **fields)
    for step in range(4):
        x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        (model(x).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    projection: Any = model.projection
    return optimizer, projection.weight.detach(), projection.bias.detach()


@pytest.mark.parametrize("fields", [{}, {"preset": "paper"}], ids=str)
def test_the_page_steps_as_a_linear_layer(page: dict[str, Any], fields: dict[str, Any]) -> None:
    own = Net(page["HeadProjection"](8, 2, 3)).double()
    linear = Net(nn.Linear(8, 6)).double()
    with torch.no_grad():
        linear.projection.weight.copy_(own.projection.weight.flatten(0, 1))
        linear.projection.bias.copy_(own.projection.bias)
    optimizer, weight, bias = trained(own, **fields)
    _, expected, expected_bias = trained(linear, **fields)
    assert ("lngd", "linear") in {(r.owner, r.reason) for r in optimizer.routing() if r.layer == "projection"}
    # the same numbers in another order of summation: einsum's
    torch.testing.assert_close(weight.flatten(0, 1), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bias, expected_bias, rtol=1e-9, atol=1e-12)


def test_a_type_is_meant_itself_may_decline_and_may_be_taken_out(page: dict[str, Any]) -> None:
    class Sub(page["HeadProjection"]):
        pass

    def reason(kind: Any) -> str:
        (found,) = (r.reason for r in LNGD(Net(kind(8, 2, 3))).routing() if r.parameter == "projection.weight")
        return found

    assert reason(Sub) == "unsupported module Sub"
    for look in (lambda module: None, None, None):  # the second time it is taken out already
        add_layer_type(page["HeadProjection"], look)
        assert reason(page["HeadProjection"]) == "unsupported module HeadProjection"


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry("linear", 1, 6, 9),
        Geometry("linear", 1, 3, 16),
        Geometry("linear", 2, 3, 8),
        Geometry("transposed", 1, 6, 8),
        Geometry("convolution", 1, 6, 8),
    ],
    ids=str,
)
def test_a_geometry_that_does_not_fit_is_refused(page: dict[str, Any], geometry: Geometry) -> None:
    add_layer_type(page["HeadProjection"], lambda module: geometry)
    with pytest.raises(ValueError, match=r"add_layer_type: HeadProjection: got .* for a weight \[2, 3, 8\] and a bias"):
        LNGD(Net(page["HeadProjection"](8, 2, 3)))
