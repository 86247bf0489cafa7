"""KFAC, EKFAC, TKFAC and NG+ against dense float64 Fisher blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_helpers import FAMILIES, PLAIN, WHOLE, Layer, approximation, drawn, matrix, observed, step, with_ones
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import NaiveFamily, block, blockwise
from test_convolutions import convolution, patches_of
from torch import nn

from hf_lngd import LNGD, LNGDConfig
from hf_lngd.curvature.factors import block_layout
from hf_lngd.curvature.family_sums import NGPlusSums
from hf_lngd.curvature.layers import Sides

# What each family promises of F


@settings(max_examples=25, deadline=None)
@given(d=st.integers(1, 6), m=st.integers(1, 5), seed=st.integers(0, 999))
def test_kfac_of_one_sample_is_exact(d: int, m: int, seed: int) -> None:
    model, x, target = drawn(1, d, m, seed)
    g = model(x).detach() - target
    found = observed(model, x, target, family="kfac").factors("linear")
    torch.testing.assert_close(approximation(found), block(x, g, 1.0), rtol=1e-9, atol=1e-12)


def test_kfac_of_a_deep_linear_net_is_exact() -> None:
    """With squared error the true Fisher's ε of the output is drawn for itself, so g = Jᵀε knows nothing of a: here
    every ε = ±√m e_i meets every input, which makes E[ε εᵀ] = I exact."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False), nn.Linear(3, 2, bias=False)
    ).double()
    draws = torch.cat((torch.eye(2), -torch.eye(2))).double() * 2**0.5
    x = torch.randn(6, 4).double().repeat_interleave(len(draws), 0)
    epsilon = draws.repeat(6, 1)
    optimizer = LNGD(model, lr=0.0, family="kfac", max_factor_dim=WHOLE)
    (model(x) * epsilon).sum(1).mean().backward()
    optimizer.step()
    h = x
    for name in "012":
        after = torch.eye(2).double()
        for later in range(2, int(name), -1):
            after = after @ model[later].weight.detach()
        exact = block(h, epsilon @ after, 1 / len(x))
        gaussian = torch.kron(h.T @ h / len(h), after.T @ after)  # E over ε by hand
        torch.testing.assert_close(exact, gaussian)
        torch.testing.assert_close(approximation(optimizer.factors(name)), exact, rtol=1e-9, atol=1e-12)
        h = h @ model[int(name)].weight.detach().T


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 9), d=st.integers(1, 5), m=st.integers(1, 5), limit=st.integers(1, 6), seed=st.integers(0, 999))
def test_ekfac_is_never_further_than_kfac(n: int, d: int, m: int, limit: int, seed: int) -> None:
    model, x, target = drawn(n, d, m, seed)
    exact = block(x, model(x).detach() - target, 1 / n)
    distance = {}
    for family in ("kfac", "ekfac"):
        fields = {"early_factors": False, "stagger": False, "inverse_interval": 100, "max_factor_dim": limit}
        optimizer = observed(model, x, target, family=family, **fields)
        step(model, optimizer, x, target)  # under the eigenbasis of the first
        found = approximation(optimizer.factors("linear"))
        distance[family] = float((found - exact).norm())
        optimizer.close()
        if family == "ekfac":
            torch.testing.assert_close(found.trace(), exact.trace())
    assert distance["ekfac"] <= distance["kfac"] * (1 + 1e-9) + 1e-12 * float(exact.norm())


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 9), d=st.integers(1, 5), m=st.integers(1, 5), limit=st.integers(1, 6), seed=st.integers(0, 999))
def test_tkfac_and_lngd_keep_the_trace(n: int, d: int, m: int, limit: int, seed: int) -> None:
    model, x, target = drawn(n, d, m, seed)
    exact = block(x, model(x).detach() - target, 1 / n)
    for family, ones in (("tkfac", ("p", "q")), ("lngd", ("psi",))):
        optimizer = observed(model, x, target, family=family, fisher="empirical", max_factor_dim=limit)
        found = optimizer.factors("linear")
        optimizer.close()
        torch.testing.assert_close(approximation(found).trace(), exact.trace())
        for name in ones:
            trace = found[name].sum() if found[name].dim() == 1 else found[name].trace()
            torch.testing.assert_close(trace, torch.ones(()).double())


def test_true_fisher_is_over_the_models_labels() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(1, 4).double().repeat(6000, 1), Layer(4, 3).double()
    p = model(x)[0].softmax(0).detach()
    expected = torch.kron(torch.outer(x[0], x[0]), p.diag() - torch.outer(p, p))
    for family in ("kfac", "tkfac"):
        optimizer = LNGD(model, lr=0.0, family=family, fisher="true")
        logits = model(x)
        optimizer.fisher_backward(logits)
        logits.square().mean().backward()
        optimizer.step()
        optimizer.close()
        torch.testing.assert_close(approximation(optimizer.factors("linear")), expected, rtol=0.1, atol=0.03)


# D against one dense solve

LINEAR = {
    "plain": {},
    "wide": {"d": 3, "m": 5},
    "bias aside": {"bias": "fallback"},
    "bias in the factor": {"bias": "factor"},
    "positions": {"shape": (4, 3)},
    "positions, wide": {"shape": (4, 3), "d": 3, "m": 5},
    "many positions": {"shape": (3, 9), "bias": "factor"},
    "masked": {"shape": (4, 3), "masked": True},
    "blocks": {"max_factor_dim": 2, "bias": "factor"},
    "blocks, wide": {"max_factor_dim": 2, "d": 3, "m": 5, "shape": (4, 3)},
}
DAMPINGS = [{}, {"damping_rho": 0.1}, {"damping": "paper", "damping_min": 1e-4, "damping_max": 1e-1}]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", LINEAR)
@pytest.mark.parametrize("damping", DAMPINGS, ids=str)
def test_directions_of_a_linear_layer_are_the_dense_ones(family: str, case: str, damping: dict[str, Any]) -> None:
    fields = {"d": 5, "m": 4, "bias": "none", "shape": (11,), "masked": False, "max_factor_dim": WHOLE} | LINEAR[case]
    d, m, bias, shape = fields["d"], fields["m"], fields["bias"], fields["shape"]
    torch.manual_seed(0)
    model, inside = Layer(d, m, bias != "none").double(), bias == "factor"
    own = {"family": family, "max_factor_dim": fields["max_factor_dim"]} | ({} if bias == "none" else {"bias": bias})
    config = LNGDConfig(**PLAIN, **damping, **own)
    lr = 1e-3
    optimizer, columns = LNGD(model, config, lr=lr), d + inside
    naive = NaiveFamily(family, m, columns, config)
    left, right = (block_layout(size, config.max_factor_dim) for size in (m, columns))
    for _ in range(4):
        x = torch.randn(*shape, d).double()
        mask = torch.ones(shape).double()
        if fields["masked"]:
            mask[0, 1:] = mask[2, 2] = 0
        y = model(x, mask) if fields["masked"] else model(x)
        y.retain_grad()
        (y.exp().sum(-1) * mask).sum().div(shape[0]).backward()
        counts = mask.flatten() > 0
        a, g = x.flatten(0, -2)[counts], y.grad.flatten(0, -2)[counts]
        rows = [row for row in range(shape[0]) for _ in range(counts.numel() // shape[0])]
        rows = [row for row, counted in zip(rows, counts, strict=True) if counted]
        naive.observe(with_ones(a) if inside else a, g, rows, shape[0], left, right)
        naive.invert()
        expected = naive.direction(matrix(model.linear, inside, gradient=True)[0])
        before = matrix(model.linear, inside)
        optimizer.step()
        optimizer.zero_grad()
        found = (before - matrix(model.linear, inside))[0] / lr
        assert (found - expected).norm() < 1e-8 * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "case", ["1x1", "patch embedding", "grouped", "depthwise, two each", "1d, grouped", "circular"]
)
@pytest.mark.parametrize("bias", ["none", "factor"])
@pytest.mark.parametrize("memory", [64, 1], ids=["whole", "pieces"])
def test_directions_of_a_convolution_are_those_of_its_patches(
    family: str, case: str, bias: str, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if memory == 1:  # not even the patches of one image at once
        monkeypatch.setattr("hf_lngd.curvature.capture.MIB_OF_FLOATS", 100)
        monkeypatch.setattr("hf_lngd.curvature.families.MIB_OF_FLOATS", 100)
    conv, x = convolution(case, bias != "none")
    inside = bias == "factor"
    own = {"bias": bias} if inside else {}
    config = LNGDConfig(**PLAIN, family=family, conv_rows=1, conv_memory=memory, max_factor_dim=999, **own)
    lr = 1e-3
    model = nn.Sequential(conv)
    optimizer = LNGD(model, config, lr=lr)
    units, m, columns = matrix(conv, inside).shape
    naive = [NaiveFamily(family, m, columns, config) for _ in range(units)]
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(20, *x.shape[1:]).double()  # no factor is singular, whose eigenvectors would be anyone's
        y = model(x)
        y.retain_grad()
        y.exp().sum().div(len(x)).backward()
        a = patches_of(conv, x).detach()
        a = with_ones(a) if inside else a
        g = y.grad.movedim(1, -1).reshape(a.shape[1], units, m).transpose(0, 1)
        rows = [row for row in range(len(x)) for _ in range(a.shape[1] // len(x))]
        before, grad = matrix(conv, inside), matrix(conv, inside, gradient=True)
        expected = []
        for unit, own_naive in enumerate(naive):
            own_naive.observe(a[unit], g[unit], rows, len(x), (1, m), (1, columns))
            own_naive.invert()
            expected.append(own_naive.direction(grad[unit]))
        optimizer.step()
        optimizer.zero_grad()
        found = (before - matrix(conv, inside)) / lr
        assert (found - torch.stack(expected)).norm() < 1e-7 * torch.stack(expected).norm()
        if units > 1 and family == "kfac":
            assert optimizer.factors("0")["a"].shape == (units, columns, columns)


@pytest.mark.parametrize(("m", "d"), [(3, 5), (5, 3), (5, 6), (6, 5)], ids=str)
@pytest.mark.parametrize("most", [1, 10**6], ids=["one row at once", "all rows"])
def test_ngplus_takes_rows_whole_and_in_pieces(m: int, d: int, most: int) -> None:
    """With four positions a row: from 4 outputs and inputs on through pairs of positions, below through ∇ itself."""
    torch.manual_seed(0)
    a, g = torch.randn(2, 12, d).double(), torch.randn(2, 12, m).double()
    sides = Sides(m, d, block_layout(m, 4), block_layout(d, 4))
    whole, pieces = NGPlusSums(sides, 2, most), NGPlusSums(sides, 2, most)
    whole.add_gradient(a, g, None, 4)
    for start, stop in ((0, 3), (3, 4), (4, 8), (8, 9), (9, 12)):
        pieces.add_gradient(a[:, start:stop], g[:, start:stop], None, 4)
    side = "right" if d <= m else "left"
    k, b = block_layout(min(m, d), 4)
    for unit in range(2):
        nablas = [g[unit, i : i + 4].T @ a[unit, i : i + 4] for i in (0, 4, 8)]
        gram = sum(n.T @ n if d <= m else n @ n.T for n in nablas)
        for sums in (whole, pieces):
            found = torch.block_diag(*sums.parts[side][unit])[: len(gram), : len(gram)]
            torch.testing.assert_close(found, blockwise(gram, k, b))
