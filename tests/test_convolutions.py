"""Convolutions of every kind: their factors against explicit patches, their steps against the dense reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import NaiveLayer, factors
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lngd import LNGD, LNGDConfig
from hf_lngd.curvature.patches import Window, as_rows, chunks, windows

CASES: dict[str, tuple[type[nn.Module], dict[str, object]]] = {
    "3x3": (nn.Conv2d, {"kernel_size": 3}),
    "stride, padding": (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "unlike sides": (nn.Conv2d, {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
    "dilation": (nn.Conv2d, {"kernel_size": 2, "dilation": 3}),
    "1x1": (nn.Conv2d, {"kernel_size": 1}),
    "1x1, stride": (nn.Conv2d, {"kernel_size": 1, "stride": 2}),
    "patch embedding": (nn.Conv2d, {"kernel_size": 4, "stride": 4}),
    "grouped": (nn.Conv2d, {"kernel_size": 3, "groups": 2, "padding": 1}),
    "depthwise": (nn.Conv2d, {"kernel_size": 3, "groups": 4}),
    "depthwise, two each": (nn.Conv2d, {"kernel_size": 2, "groups": 4, "multiplier": 2}),
    "same": (nn.Conv2d, {"kernel_size": (2, 3), "padding": "same"}),
    "same, even, dilated": (nn.Conv2d, {"kernel_size": 4, "padding": "same", "dilation": 2}),
    "valid": (nn.Conv2d, {"kernel_size": 3, "padding": "valid"}),
    "reflect": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    "replicate": (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate"}),
    "circular": (nn.Conv2d, {"kernel_size": 3, "padding": "same", "padding_mode": "circular"}),
    "1d": (nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 2}),
    "1d, grouped": (nn.Conv1d, {"kernel_size": 3, "groups": 2}),
    "3d": (nn.Conv3d, {"kernel_size": 2, "stride": (1, 2, 1)}),
}


def convolution(case: str, bias: bool = True) -> tuple[nn.Module, Tensor]:
    """The module in float64, and an input."""
    kind, fields = CASES[case]
    fields = dict(fields)
    out = 4 * int(fields.pop("multiplier", 1))
    torch.manual_seed(0)
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    sizes = {1: (9,), 2: (8, 9), 3: (3, 4, 3)}[dims]
    return kind(4, out, bias=bias, **fields).double(), torch.randn(3, 4, *sizes, dtype=torch.float64)


def patches_of(module: nn.Module, x: Tensor) -> Tensor:
    """[groups, N, d], position by position: what the module's output there depends on, by autograd and not by slicing.

    Each column is the output of the same convolution with one weight set to one.
    """
    groups, columns = module.groups, module.weight[0].numel()
    found = []
    for column in range(columns):
        weight = torch.zeros_like(module.weight)
        weight.view(weight.shape[0], -1)[:, column] = 1
        output = module._conv_forward(x, weight, None)
        found.append(output.movedim(1, -1).reshape(-1, groups, output.shape[1] // groups)[..., 0])
    return torch.stack(found, -1).transpose(0, 1)


@pytest.mark.parametrize("case", CASES)
def test_rows_are_what_the_convolution_multiplies(case: str) -> None:
    module, x = convolution(case, bias=False)
    window = Window.of(module)
    rows = as_rows(windows(x, window), module.groups)
    torch.testing.assert_close(rows, patches_of(module, x).detach())
    matrices = module.weight.view(module.groups, -1, rows.shape[-1])
    output = (rows @ matrices.mT).transpose(0, 1).reshape(-1, module.out_channels)
    torch.testing.assert_close(output, module(x).movedim(1, -1).reshape(output.shape))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("most", [1, 40, 300, 10**6])
def test_pieces_make_the_whole(case: str, most: int) -> None:
    module, x = convolution(case)
    window = Window.of(module)
    pieces = list(chunks(x, window, module.groups, most))
    whole = as_rows(windows(x, window), module.groups)
    torch.testing.assert_close(torch.cat([rows for rows, _ in pieces], 1), whole, rtol=0, atol=0)
    assert [i for _, where in pieces for i in range(where.start, where.stop)] == list(range(whole.shape[1]))
    line = x[0, :1].numel() // x.shape[2] * whole.shape[-1] * module.groups  # one line of positions, at the most
    assert all(rows.numel() <= max(most, line) for rows, _ in pieces)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", ["none", "fallback", "factor"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_factors_are_those_of_the_patches(case: str, bias: str, activation: str | None) -> None:
    conv, x = convolution(case, bias != "none")
    model = nn.Sequential(conv, nn.ReLU()) if activation else nn.Sequential(conv)
    fields = {"bias": "factor" if bias == "factor" else "fallback", "conv_rows": 1, "max_factor_dim": 999}
    optimizer = LNGD(model, lr=0.0, **fields)
    model(x).square().mean().backward()
    optimizer.step()
    found = optimizer.factors("0")
    a = patches_of(conv, x).detach()
    a = torch.cat((a, torch.ones(*a.shape[:2], 1).double()), 2) if bias == "factor" else a
    s = conv(x).detach().movedim(1, -1).reshape(a.shape[1], conv.groups, -1).transpose(0, 1)
    g2 = (s > 0).double() if activation else torch.ones_like(s)
    for unit in range(conv.groups):
        phi, psi = factors(a[unit], g2[unit])
        mine = {k: v[unit] if conv.groups > 1 else v for k, v in found.items()}
        torch.testing.assert_close(mine["phi"], phi, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(mine["psi"], psi, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", ["3x3", "grouped", "depthwise", "1d", "patch embedding"])
@pytest.mark.parametrize("direction", ["natural", "polar", "gram"])
def test_steps_are_those_of_the_dense_reference(case: str, direction: str) -> None:
    conv, x = convolution(case, bias=False)
    exact = {"factor_interval": 1, "inverse_interval": 1, "polar_interval": 1, "stagger": False, "conv_rows": 1}
    config = LNGDConfig(**exact, direction=direction, rate="none", max_factor_dim=999)
    model = nn.Sequential(conv)
    optimizer = LNGD(model, config, lr=1e-3)
    groups, columns = conv.groups, conv.weight[0].numel()
    naive = [NaiveLayer(w.clone(), config) for w in conv.weight.detach().view(groups, -1, columns)]
    for step in range(3):
        optimizer.zero_grad()
        (model(x + step) - 1).square().mean().backward()
        a = patches_of(conv, x + step).detach()
        for unit, layer in enumerate(naive):
            layer.observe(a[unit], torch.ones(a.shape[1], conv.out_channels // groups))
            layer.step(
                conv.weight.grad.view(groups, -1, columns)[unit],
                lr=1e-3,
                decay=config.weight_decay * config.weight_decay_scale,
            )
        optimizer.step()
        expected = torch.stack([layer.w for layer in naive])
        torch.testing.assert_close(conv.weight.detach().view(expected.shape), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("rate", ["rms", "trust"])
def test_the_rate_is_the_layers_and_not_its_groups(rate: str) -> None:
    moves = []
    for kind in (rate, "none"):
        conv, x = convolution("grouped", bias=False)
        model, before = nn.Sequential(conv), conv.weight.detach().clone()
        optimizer = LNGD(model, lr=1.0, rate=kind, direction="natural", weight_decay=0.0, momentum=0.0, conv_rows=1)
        (model(x) * torch.linspace(1, 9, 4).view(4, 1, 1)).square().mean().backward()
        optimizer.step()
        moves.append(conv.weight.detach() - before)
    ratio = moves[0] / moves[1]
    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio))
    if rate == "rms":
        torch.testing.assert_close(moves[0].square().mean().sqrt(), torch.tensor(1.0).double())


def test_transformers_conv1d_is_a_linear_layer_turned_round() -> None:
    x, weights = torch.randn(5, 6, dtype=torch.float64), []
    for kind in ("linear", "conv1d"):
        torch.manual_seed(0)
        linear = nn.Linear(6, 4).double()
        layer = linear if kind == "linear" else Conv1D(4, 6).double()
        if kind == "conv1d":
            layer.load_state_dict({"weight": linear.weight.T, "bias": linear.bias})
        model = nn.Sequential(layer)
        optimizer = LNGD(model, lr=0.01, bias="factor")
        for _ in range(2):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
        assert optimizer.routing()[0].reason == "linear"
        weight = layer.weight.detach() if kind == "linear" else layer.weight.detach().T
        weights.append(torch.cat((weight, layer.bias.detach()[:, None]), 1))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-10, atol=1e-12)


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
    assert sorted(sorted(g.members) for g in optimizer._capture.topology.groups) == [["a", "b"], ["c"]]


@pytest.mark.parametrize("fisher", ["expected", "empirical", "true"])
def test_a_subset_of_images_does_not_depend_on_micro_batches(fisher: str) -> None:
    torch.manual_seed(0)
    x, y, found = torch.randn(12, 3, 6, 6, dtype=torch.float64), torch.arange(12) % 3, []
    for sizes in ([12], [6, 6], [5, 1, 6]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()
        optimizer = LNGD(model, lr=0.0, fisher=fisher, conv_rows=4)
        for xs, ys in zip(x.split(sizes), y.split(sizes), strict=True):
            logits = model(xs)
            if fisher == "true":  # without the draw, which depends on the split: the label is certain
                logits = logits * 1e3
            if optimizer.needs_fisher_pass:
                optimizer.fisher_backward(logits)
            (nn.functional.cross_entropy(logits, ys, reduction="sum") / 12).backward()
        optimizer.step()
        found.append(optimizer.factors("0"))
    for other in found[1:]:
        for key in ("phi", "psi"):
            torch.testing.assert_close(other[key], found[0][key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fisher", ["expected", "empirical"])
def test_a_subset_of_images_is_unbiased(fisher: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 5, 5, dtype=torch.float64)
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    found: dict[int, list[Tensor]] = {1: [], 4: []}
    for rows in found:
        for shift in range(4 if rows > 1 else 1):  # each image is in one of the four subsets
            optimizer = LNGD(model, lr=0.0, fisher=fisher, conv_rows=rows)
            model(x.roll(shift, 0)).square().sum(1).mean().backward()
            optimizer.step()
            found[rows].append(optimizer.factors("0")["phi"])
            optimizer.close()
    torch.testing.assert_close(torch.stack(found[4]).mean(0), found[1][0], rtol=1e-9, atol=1e-12)


def test_memory_of_patches_is_bounded() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for item in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(item, Tensor) and item.untyped_storage().nbytes() > self.size:
                    self.size = item.untyped_storage().nbytes()
            return result

    x = torch.randn(16, 16, 32, 32)
    sizes = {}
    for memory in (1, 4, 64):
        model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False))
        optimizer = LNGD(model, lr=0.0, conv_rows=1, conv_memory=memory)
        with Largest() as watch:
            model(x)
        sizes[memory] = watch.size / 2**20
        optimizer.close()
    whole = 16 * 32 * 32 * 16 * 9 * 4 / 2**20  # 9 MiB
    assert sizes[1] <= 1.3 and sizes[4] <= 4.1 and sizes[64] >= whole  # the padded input is 1.13 MiB itself


def test_images_without_a_batch_dimension() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)).double(), torch.randn(3, 6, 6, dtype=torch.float64)
    optimizer = LNGD(model, lr=0.0)
    model(x).sum().backward()
    optimizer.step()
    a = patches_of(model[0], x[None]).detach()[0]
    torch.testing.assert_close(optimizer.factors("0")["phi"], factors(a, torch.ones(16, 4))[0])


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.integers(1, 3), stride=st.integers(1, 3), dilation=st.integers(1, 2), padding=st.integers(0, 2),
    mode=st.sampled_from(["zeros", "circular"]), groups=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_window_gives_the_output(
    kernel: int, stride: int, dilation: int, padding: int, mode: str, groups: int, seed: int
) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups, False, mode).double()
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    rows = as_rows(windows(x, Window.of(conv)), groups)
    output = (rows @ conv.weight.view(groups, -1, rows.shape[-1]).mT).transpose(0, 1).reshape(-1, 8)
    torch.testing.assert_close(output, conv(x).movedim(1, -1).reshape(-1, 8))
