"""KFAC, EKFAC, TKFAC and NG+ against dense float64 Fisher blocks, and what their banks share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lngd import LNGD, LNGDConfig, linalg
from hf_lngd.config import FAMILIES as ACCEPTED
from hf_lngd.factors import FactorSpec
from hf_lngd.linalg import block_layout
from hf_lngd.paper import families
from hf_lngd.paper.families import EKFAC, KFAC, TKFAC, FamilyBank, NGPlus, NGPlusStatistics, Sides
from hf_lngd.routing import route
from tests.reference import NaiveFamily, blockwise
from tests.unit.convolutions import convolution

BANKS: dict[str, type[FamilyBank]] = {"kfac": KFAC, "ekfac": EKFAC, "tkfac": TKFAC, "ng+": NGPlus}
FAMILIES = [family for family in ACCEPTED if family != "lngd"]
# D itself is subtracted, with factors and inverses of every step
PLAIN: dict[str, Any] = {
    "rate": "none", "momentum": 0.0, "weight_decay": 0.0, "factor_interval": 1, "inverse_interval": 1,
}  # fmt: skip
WHOLE = 99


class Layer(nn.Module):
    """One linear layer; sees a mask, which the loss has to heed."""

    def __init__(self, d: int, m: int, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(d, m, bias=bias)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.linear(x)


def with_ones(a: Tensor) -> Tensor:
    return torch.cat((a, a.new_ones(*a.shape[:-1], 1)), -1)


def matrix(module: nn.Module, bias: bool, gradient: bool = False) -> Tensor:
    """Weight (or gradient) [groups, m, columns], the bias's column last."""
    parts = [module.weight, *([module.bias] if bias else [])]
    units = getattr(module, "groups", 1)
    picked = [(p.grad if gradient else p).detach() for p in parts]
    return torch.cat([p.reshape(units, p.shape[0] // units, -1) for p in picked], -1)


def approximation(found: dict[str, Tensor]) -> Tensor:
    """F̂ of what `LNGD.factors` returns, index (input, output)."""
    if "moments" in found:
        both = torch.kron(found["basis_a"], found["basis_b"])
        return both @ torch.diag(found["moments"].T.flatten()) @ both.T
    if "delta" in found:
        return found["delta"] * torch.kron(found["p"], found["q"])
    if "phi" in found:
        return torch.kron(found["phi"], torch.diag(found["psi"]))
    return torch.kron(found["a"], found["b"])


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


# Whole factors, masks, groups and dampings are drawn in tests/contract/test_step.py: here are blocks and pieces.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("d", "m", "bias"), [(5, 4, True), (3, 5, False)], ids=["bias in the factor", "wide"])
def test_directions_with_factors_in_blocks_are_the_dense_ones(family: str, d: int, m: int, bias: bool) -> None:
    torch.manual_seed(0)
    model, own = Layer(d, m, bias).double(), {"bias": "factor"} if bias else {}
    config = LNGDConfig(**PLAIN, family=family, max_factor_dim=2, **own)
    optimizer, columns = LNGD(model, config, lr=1e-3), d + bias
    naive = NaiveFamily(family, m, columns, config)
    for _ in range(3):
        x = torch.randn(4, 3, d).double()
        y = model(x)
        y.retain_grad()
        y.exp().sum().div(4).backward()
        a, g = x.flatten(0, 1), y.grad.flatten(0, 1)
        rows = [row for row in range(4) for _ in range(3)]
        naive.observe(with_ones(a) if bias else a, g, rows, 4, block_layout(m, 2), block_layout(columns, 2))
        naive.invert()
        expected = naive.direction(matrix(model.linear, bias, gradient=True)[0])
        before = matrix(model.linear, bias)
        optimizer.step()
        optimizer.zero_grad()
        found = (before - matrix(model.linear, bias))[0] / 1e-3
        assert (found - expected).norm() < 1e-8 * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_in_pieces_give_the_same_step(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even the patches of one image are made at once."""
    found = []
    for most in (10**6, 100):
        monkeypatch.setattr("hf_lngd.layers.MOST_PATCHES", most)
        monkeypatch.setattr("hf_lngd.paper.families.MOST_PATCHES", most)
        conv, x = convolution("grouped", True)
        model = nn.Sequential(conv)
        optimizer = LNGD(model, lr=1e-3, **PLAIN, family=family, max_factor_dim=999, bias="factor")
        for _ in range(2):
            model(x).exp().sum().div(len(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(matrix(conv, True))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("m", "d"), [(3, 5), (5, 3), (5, 6), (6, 5)], ids=str)
@pytest.mark.parametrize("most", [1, 10**6], ids=["one row at once", "all rows"])
def test_ngplus_takes_rows_whole_and_in_pieces(m: int, d: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With four positions a row: from 4 outputs and inputs on through pairs of positions, below through ∇ itself."""
    monkeypatch.setattr("hf_lngd.paper.families.MOST_PATCHES", most)
    torch.manual_seed(0)
    a, g = torch.randn(2, 12, d).double(), torch.randn(2, 12, m).double()
    sides = Sides(m, d, block_layout(m, 4), block_layout(d, 4))
    whole, pieces = NGPlusStatistics(sides, 2), NGPlusStatistics(sides, 2)
    whole.add_gradient(a, g, None, 4)
    for start, stop in ((0, 3), (3, 4), (4, 8), (8, 9), (9, 12)):
        pieces.add_gradient(a[:, start:stop], g[:, start:stop], None, 4)
    side = "right" if d <= m else "left"
    k, b = block_layout(min(m, d), 4)
    for unit in range(2):
        nablas = [g[unit, i : i + 4].T @ a[unit, i : i + 4] for i in (0, 4, 8)]
        gram = sum(n.T @ n if d <= m else n @ n.T for n in nablas)
        for one in (whole, pieces):
            found = torch.block_diag(*one.factors(2.0)[side][unit])[: len(gram), : len(gram)]
            torch.testing.assert_close(found, 2 * blockwise(gram, k, b))


# What a bank does with faults, and with what it has not seen


def bank_of(family: str) -> FamilyBank:
    """A bank of two layers, one of which is grouped: rows 0 and 1 are the groups of ``0``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(8, 6, 1, groups=2, bias=False), nn.Flatten(), nn.Linear(4, 3, bias=False)).double()
    config = LNGDConfig(family=family)
    specs = [FactorSpec(layer, (), 1.0) for layer in route(model, config).layers]
    return BANKS[family](specs, Sides.of(specs[0].layer, WHOLE), config, specs[0].layer.like)


def new_factors(bank: FamilyBank, seed: int) -> dict[str, dict[str, Tensor]]:
    """The factors of a step for each layer of a bank."""
    draw, found = torch.Generator().manual_seed(seed), {}
    for spec in bank.specs:
        basis = bank.basis_of(spec.name) if seed else None  # none before the first inverse
        one = bank.statistics(bank.sides, spec.layer.units, basis)
        a, g = (torch.randn(spec.layer.units, 12, n, generator=draw, dtype=torch.float64) for n in (4, 3))
        one.add_gradient(a, g, None, 1)
        found[spec.name] = one.factors(1.0)
    return found


def inverted(bank: FamilyBank, seed: int) -> None:
    bank.update(new_factors(bank, seed), {})
    bank.invert()


@pytest.mark.parametrize("family", FAMILIES)
def test_before_the_first_factors_a_direction_is_the_gradient(family: str) -> None:
    bank, rows = bank_of(family), torch.arange(3)
    grad = torch.randn(3, 3, 4).double()
    torch.testing.assert_close(bank.precondition(grad, rows), grad)
    found = bank.dense(rows)
    for row in rows:
        own = {name: value[row] for name, value in found.items()}
        whole = own["left"] if family == "ng+" else approximation(own)
        torch.testing.assert_close(whole, torch.eye(len(whole)).double())


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_that_are_not_finite_are_skipped_and_counted(family: str) -> None:
    bank, rows = bank_of(family), torch.arange(3)
    inverted(bank, 0)
    kept, fresh = {name: value.clone() for name, value in bank.dense(rows).items()}, new_factors(bank, 1)
    next(iter(fresh["0"].values()))[1, 0, 0, 0] = torch.nan
    bank.update(fresh, {"0": torch.tensor(True), "2": torch.tensor(True)})
    assert int(bank.skipped) == 1
    for name, value in bank.dense(rows).items():
        assert torch.equal(value[1], kept[name][1])
        if not name.startswith("basis"):
            assert not torch.equal(value[0], kept[name][0]) and not torch.equal(value[2], kept[name][2])
    nothing = {name: {key: value * torch.nan for key, value in own.items()} for name, own in fresh.items()}
    bank.update(nothing, {"0": torch.tensor(True), "2": torch.tensor(False)})  # which nobody saw
    assert int(bank.skipped) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_failed_inverse_keeps_the_one_before(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_of(family)
    inverted(bank, 0)
    names = [name for name in bank.derived if not name.startswith("moments")]
    kept = {name: bank.derived[name].clone() for name in names}
    module, which, ok_at = (families, "eigenbasis", 2) if family == "ekfac" else (linalg, "inverse", 1)
    real = getattr(module, which)

    def fail(matrices: Tensor) -> tuple[Tensor, ...]:
        found = list(real(matrices))
        found[ok_at] = found[ok_at].clone()
        found[ok_at][0] = False
        return tuple(found)

    with monkeypatch.context() as patched:
        patched.setattr(module, which, fail)
        inverted(bank, 1)
    assert int(bank.failures) == 1
    for name in names:
        assert torch.equal(bank.derived[name][0], kept[name][0])
        assert not torch.equal(bank.derived[name][1], kept[name][1])
    inverted(bank, 2)
    assert int(bank.failures) == 1 and not torch.equal(bank.derived[names[0]][0], kept[names[0]][0])


def test_an_eigendecomposition_that_does_not_converge_keeps_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_of("ekfac")
    inverted(bank, 0)
    kept = bank.derived["basis_right"].clone()

    def fail(matrices: Tensor) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    inverted(bank, 1)
    assert torch.equal(bank.derived["basis_right"], kept) and int(bank.failures) == 3
    assert bank.precondition(torch.randn(3, 3, 4).double(), torch.arange(3)).isfinite().all()


def test_an_eigenbasis_that_fails_in_single_precision_is_tried_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    real, half = torch.linalg.eigh, torch.randn(2, 4, 6)

    def fail(matrices: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = real(matrices)
        if matrices.dtype == torch.float32:
            vectors[1] = torch.nan
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    values, vectors, ok = families.eigenbasis(half @ half.mT)
    assert ok.all() and values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, half @ half.mT)


# Through the optimizer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_storage_can_be_sized(family: str) -> None:
    with torch.device("meta"):
        model = Layer(8, 6)
        optimizer = LNGD(model, lr=0.0, family=family, factor_interval=1)
        for _ in range(2):
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
    usage = optimizer.memory_usage()
    assert usage["momentum"] == 4 * 48 and min(usage["factors"], usage["inverses"]) > 0
