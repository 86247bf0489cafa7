"""KFAC, EKFAC, TKFAC and NG+ against dense float64 Fisher blocks, and what their banks share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_lngd import LNGD, LNGDConfig, linalg
from hf_lngd.config import FAMILIES as ACCEPTED
from hf_lngd.factors import FactorSpec
from hf_lngd.linalg import block_layout
from hf_lngd.paper import families
from hf_lngd.paper.families import EKFAC, KFAC, TKFAC, FamilyBank, NGPlus, NGPlusStatistics, Sides
from hf_lngd.routing import route
from tests.helpers import distance, layers_of, marian_batch, tiny_marian, train_step, weights_of
from tests.reference import NaiveFamily, block, blockwise
from tests.unit.convolutions import convolution, patches_of

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


def observe(model: Layer, optimizer: LNGD, x: Tensor, target: Tensor) -> None:
    """One step with the loss ½ mean |y − target|², whose g is (y − target)/N."""
    optimizer.zero_grad()
    ((model(x) - target).square().sum() / 2 / len(x)).backward()
    optimizer.step()


def observed(model: Layer, x: Tensor, target: Tensor, **fields: Any) -> LNGD:
    """The optimizer after one such step at rate 0."""
    optimizer = LNGD(model, lr=0.0, **{"factor_interval": 1, "max_factor_dim": WHOLE, **fields})
    observe(model, optimizer, x, target)
    return optimizer


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


def drawn(n: int, d: int, m: int, seed: int) -> tuple[Layer, Tensor, Tensor]:
    torch.manual_seed(seed)
    return Layer(d, m).double(), torch.randn(n, d).double(), torch.randn(n, m).double()


# What each family promises of F


@settings(max_examples=10, deadline=None)
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


@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 9), d=st.integers(1, 5), m=st.integers(1, 5), limit=st.integers(1, 6), seed=st.integers(0, 999))
def test_ekfac_is_never_further_than_kfac(n: int, d: int, m: int, limit: int, seed: int) -> None:
    model, x, target = drawn(n, d, m, seed)
    exact = block(x, model(x).detach() - target, 1 / n)
    gap = {}
    for family in ("kfac", "ekfac"):
        optimizer = observed(model, x, target, family=family, inverse_interval=100, max_factor_dim=limit)
        observe(model, optimizer, x, target)  # under the eigenbasis of the first
        found = approximation(optimizer.factors("linear"))
        gap[family] = float((found - exact).norm())
        optimizer.close()
        if family == "ekfac":
            torch.testing.assert_close(found.trace(), exact.trace())
    assert gap["ekfac"] <= gap["kfac"] * (1 + 1e-9) + 1e-12 * float(exact.norm())


@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 9), d=st.integers(1, 5), m=st.integers(1, 5), limit=st.integers(1, 6), seed=st.integers(0, 999))
def test_tkfac_and_lngd_keep_the_trace(n: int, d: int, m: int, limit: int, seed: int) -> None:
    model, x, target = drawn(n, d, m, seed)
    exact = block(x, model(x).detach() - target, 1 / n)
    for family, ones in (("tkfac", ("p", "q")), ("lngd", ("psi",))):
        fields = {"fisher": "empirical", "direction": "natural"}
        optimizer = observed(model, x, target, family=family, max_factor_dim=limit, **fields)
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

LINEAR: dict[str, dict[str, Any]] = {
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
DAMPINGS: list[dict[str, Any]] = [{}, {"damping_rho": 0.1}, {"damping": "paper", "damping_bounds": (1e-4, 1e-1)}]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("case", "damping"),
    [*((case, DAMPINGS[0]) for case in LINEAR), *((c, d) for c in ("plain", "blocks, wide") for d in DAMPINGS[1:])],
    ids=str,
)
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
    left, right = (block_layout(size, fields["max_factor_dim"]) for size in (m, columns))
    for _ in range(3):
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
@pytest.mark.parametrize(("bias", "pieces"), [("none", False), ("factor", True)], ids=["whole", "bias, pieces"])
def test_directions_of_a_convolution_are_those_of_its_patches(
    family: str, case: str, bias: str, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:  # not even the patches of one image at once
        monkeypatch.setattr("hf_lngd.layers.MOST_PATCHES", 100)
        monkeypatch.setattr("hf_lngd.paper.families.MOST_PATCHES", 100)
    conv, x = convolution(case, bias != "none")
    inside = bias == "factor"
    config = LNGDConfig(**PLAIN, family=family, max_factor_dim=999, **({"bias": bias} if inside else {}))
    lr = 1e-3
    model = nn.Sequential(conv)
    optimizer = LNGD(model, config, lr=lr)
    units, m, columns = matrix(conv, inside).shape
    naive = [NaiveFamily(family, m, columns, config) for _ in range(units)]
    for seed in range(2):
        torch.manual_seed(seed)
        # no factor is singular, whose eigenvectors would be anyone's
        x = torch.randn(20 if case == "patch embedding" else 4, *x.shape[1:]).double()
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
        one = bank.statistics(bank.sides, spec.layer.units, bank.basis_of(spec.name))
        a, g = (torch.randn(spec.layer.units, 12, n, generator=draw, dtype=torch.float64) for n in (4, 3))
        one.add_gradient(a, g, None, 1)
        found[spec.name] = one.factors(1.0)
    return found


def inverted(bank: FamilyBank, seed: int) -> None:
    bank.update(new_factors(bank, seed), {})
    bank.invert()
    bank.inverted = True


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


def test_an_eigenbasis_is_that_of_the_matrices_that_have_one() -> None:
    torch.manual_seed(0)
    half = torch.randn(3, 4, 6)
    matrices = half @ half.mT
    matrices[1, 0, 0] = torch.nan
    values, vectors, ok = families.eigenbasis(matrices)
    assert ok.tolist() == [True, False, True]
    for row in (0, 2):
        torch.testing.assert_close(vectors[row] @ values[row].diag() @ vectors[row].T, matrices[row])
        torch.testing.assert_close(vectors[row].T @ vectors[row], torch.eye(4))


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e6])
def test_extreme_gradients_give_finite_steps(family: str, scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    optimizer = LNGD(model, lr=1e-3, family=family, factor_interval=1, inverse_interval=1)
    for factor in (scale, scale, scale, 1.0):
        (model(torch.randn(8, 4)) * factor).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())


# Through the optimizer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 5)], ids=str)
def test_a_batch_that_is_seen_twice_changes_no_factor(family: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Layer(5, 4).double(), torch.randn(*shape).double()
    target = torch.randn(*shape[:-1], 4).double()
    once = observed(model, x, target, family=family)
    once.close()
    twice = observed(model, torch.cat((x, x)), torch.cat((target, target)), family=family)
    for name, value in once.factors("linear").items():
        if not name.startswith("basis"):  # up to signs
            torch.testing.assert_close(twice.factors("linear")[name], value, rtol=1e-9, atol=1e-12)


def test_ekfac_under_one_basis_knows_no_micro_batches() -> None:
    """`tests.contract.test_statistics` has the others. Here the basis is fixed: rounding picks it where a factor is
    singular."""
    fields: dict[str, Any] = {"family": "ekfac", "factor_interval": 1, "inverse_interval": 100}
    model = tiny_marian()
    optimizer = LNGD(model, lr=1e-2, **fields)
    train_step(model, optimizer, marian_batch(0))
    runs = []
    for parts in (1, 4, [1, 5, 2]):
        twin = tiny_marian()
        twin.load_state_dict(model.state_dict())
        own = LNGD(twin, lr=1e-2, **fields)
        own.load_state_dict(optimizer.state_dict())
        for seed in (1, 2):
            train_step(twin, own, marian_batch(seed), parts)
        runs.append((weights_of(twin), own))
    for weights, own in runs[1:]:
        assert distance(weights, runs[0][0]) < 1e-6
        for name in layers_of(own):
            for kind, value in runs[0][1].factors(name).items():
                assert (own.factors(name)[kind] - value).norm() < 1e-6 * value.norm(), (name, kind)


def test_errors_offer_what_the_family_accepts() -> None:
    model = Layer(3, 2)
    optimizer = LNGD(model, family="kfac", fisher="true")
    model(torch.ones(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="fisher_backward.*or accepted: empirical$"):
        optimizer.step()

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, source: Any) -> Tensor:
            return self.linear(source())

    reads = Reads()
    optimizer = LNGD(reads, family="kfac")
    reads(lambda: torch.ones(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="set_batch.*or accepted: true$"):
        optimizer.step()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_is_never_called_has_neutral_factors(family: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False)).double()
    optimizer = LNGD(model, lr=1e-2, family=family)
    model.forward = lambda x: model[0](x)
    model(torch.randn(5, 4).double()).square().mean().backward()
    optimizer.step()
    found = optimizer.factors("1")
    whole = next(iter(found.values())) if family == "ng+" else approximation(found)
    torch.testing.assert_close(whole, torch.eye(len(whole)).double())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_takes_and_what_it_tells(family: str) -> None:
    model = tiny_marian()
    optimizer = LNGD(model, lr=1e-2, family=family)
    for seed in range(2):
        train_step(model, optimizer, marian_batch(seed))
    usage, numbers = optimizer.memory_usage(), optimizer.diagnostics()
    assert usage["total"] == sum(value for key, value in usage.items() if key != "total")
    assert min(usage["momentum"], usage["factors"], usage["inverses"]) > 0
    assert numbers["failed_inverses"] == numbers["skipped_factors"] == 0
    assert numbers["condition_max"] > 1 and numbers["damping_mean"] > 0


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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_another_family_is_refused(family: str) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(6, 4), torch.randn(6, 3)
    theirs, mine = (
        observed(Layer(4, 3), x, target, family=own, direction="natural", fisher="empirical")
        for own in (family, "lngd")
    )
    with pytest.raises(ValueError, match=f"family: checkpoint '{family.replace('+', '[+]')}', here 'lngd'"):
        mine.load_state_dict(theirs.state_dict())
