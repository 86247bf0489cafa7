"""KFAC, EKFAC, TKFAC and NG+ against dense float64 Fisher blocks, and in all that they share with LNGD."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from core_helpers import core_backward, core_batch, core_distance, core_marian, core_step, core_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import NaiveFamily, block, blockwise
from test_convolutions import convolution, patches_of
from torch import Tensor, nn

from hf_lngd import LNGD, LNGDConfig
from hf_lngd.checks import FAMILIES as ACCEPTED
from hf_lngd.config import FAMILY_DEFAULTS, PRESETS
from hf_lngd.curvature import families
from hf_lngd.curvature.factors import block_layout
from hf_lngd.curvature.family_sums import NGPlusSums
from hf_lngd.curvature.layers import Sides

FAMILIES = ["kfac", "ekfac", "tkfac", "ng+"]
# D itself is subtracted, with factors and inverses of every step
PLAIN: dict[str, Any] = {
    "rate": "none",
    "momentum": 0.0,
    "nesterov": False,
    "weight_decay": 0.0,
    "factor_interval": 1,
    "inverse_interval": 1,
    "stagger": False,
    "fallback_lr": 1e-30,
}
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


def observed(model: Layer, x: Tensor, target: Tensor, **fields: Any) -> LNGD:
    """The optimizer after one step at rate 0 with the loss ½ mean |y − target|², whose g is (y − target)/N."""
    optimizer = LNGD(model, lr=0.0, **{"factor_interval": 1, "max_factor_dim": WHOLE, **fields})
    step(model, optimizer, x, target)
    return optimizer


def step(model: Layer, optimizer: LNGD, x: Tensor, target: Tensor) -> Tensor:
    """One step; the gradients g at the layer's output, [N, m]."""
    optimizer.zero_grad()
    y = model(x)
    loss = (y - target).square().sum() / 2 / len(x)
    y.retain_grad()
    loss.backward()
    assert y.grad is not None
    g = y.grad.flatten(0, -2).clone()
    optimizer.step()
    return g


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


# What they share with LNGD


def test_every_list_of_families_is_whole() -> None:
    assert set(ACCEPTED) == set(FAMILY_DEFAULTS) == {"lngd", *FAMILIES} == {"lngd", *families.FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_given_alone_is_enough(family: str) -> None:
    config = LNGDConfig.from_optim_args(f"family={family}")
    assert (config.family, config.fisher, config.direction, config.rate) == (family, "empirical", "natural", "rms")
    others = {name: value for name, value in PRESETS["fast"].items() if name not in FAMILY_DEFAULTS[family]}
    assert {name: getattr(config, name) for name in others} == others
    paper = LNGDConfig(preset="paper", family=family, fisher="true")
    assert (paper.fisher, paper.rate, paper.damping, paper.bias) == ("true", "adaptive", "paper", "factor")
    assert LNGDConfig(**config.to_dict()) == config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("fisher", "expected", "true, empirical"),
        ("fisher", "sampled", "true, empirical"),
        ("direction", "polar", "natural"),
        ("direction", "gram", "natural"),
        ("rate", "trust", "adaptive, rms, none"),
    ],
)
def test_fields_that_contradict_the_family_are_refused(family: str, field: str, value: str, accepted: str) -> None:
    with pytest.raises(ValueError) as error:
        LNGDConfig(family=family, **{field: value})
    assert str(error.value) == f"{field}: got {value!r}, accepted: {accepted} (family={family})"


def test_errors_offer_what_the_family_accepts() -> None:
    model = Layer(3, 2)
    optimizer = LNGD(model, family="kfac", fisher="true")
    model(torch.ones(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="fisher_backward.*or accepted: empirical$"):
        optimizer.step()

    class Wrapped:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, wrapped: Wrapped) -> Tensor:
            return self.linear(wrapped.x)

    reads = Reads()
    optimizer = LNGD(reads, family="kfac")
    reads(Wrapped(torch.ones(2, 3))).sum().backward()
    with pytest.raises(RuntimeError, match="set_batch.*or accepted: true$"):
        optimizer.step()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 5)], ids=str)
def test_a_batch_that_is_seen_twice_changes_no_factor(family: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Layer(5, 4).double(), torch.randn(*shape).double()
    target = torch.randn(*shape[:-1], 4).double()
    once = observed(model, x, target, family=family)
    once.close()
    twice = observed(
        model, x.repeat(2, *[1] * (len(shape) - 1)), target.repeat(2, *[1] * (len(shape) - 1)), family=family
    )
    for name, value in once.factors("linear").items():
        if name.startswith("basis"):
            continue  # up to signs
        torch.testing.assert_close(twice.factors("linear")[name], value, rtol=1e-9, atol=1e-12)


def test_ekfac_under_one_basis_knows_no_micro_batches() -> None:
    """`test_accumulation` has the others. Here the basis is fixed: rounding picks it where a factor is singular."""
    fields: dict[str, Any] = {"family": "ekfac", "factor_interval": 1, "inverse_interval": 100, "early_factors": False}
    model = core_marian()
    optimizer = LNGD(model, lr=1e-2, **fields)
    core_step(model, optimizer, core_batch(0))
    runs = []
    for parts in (1, 4, [1, 5, 2]):
        twin = core_marian()
        twin.load_state_dict(model.state_dict())
        own = LNGD(twin, **fields)
        own.load_state_dict(optimizer.state_dict())
        for seed in (1, 2, 3):
            core_step(twin, own, core_batch(seed), parts)
        runs.append((core_weights(twin), own))
    for weights, own in runs[1:]:
        assert core_distance(weights, runs[0][0]) < 1e-6
        for name in own._capture.layers:
            for kind, value in runs[0][1].factors(name).items():
                assert (own.factors(name)[kind] - value).norm() < 1e-6 * value.norm(), (name, kind)


def test_one_convolution_row_in_some_is_an_estimate_of_all() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, bias=False).double()
    one = torch.randn(1, 2, 5, 5).double()
    found = {}
    for family in FAMILIES:
        for rows in (1, 4):
            model = nn.Sequential(copy.deepcopy(conv))
            optimizer = LNGD(model, lr=0.0, family=family, conv_rows=rows)
            model(one.repeat(8, 1, 1, 1)).square().sum((1, 2, 3)).mean().backward()  # eight times the same image
            optimizer.step()
            found[family, rows] = optimizer.factors("0")
        for name, value in found[family, 1].items():
            if not name.startswith("basis"):
                torch.testing.assert_close(found[family, 4][name], value)


class Net(nn.Module):
    """Two layers of one shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def net_step(model: Net, optimizer: LNGD, x: Tensor, scale: float = 1.0) -> None:
    (model(x) * scale).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_that_are_not_finite_are_skipped_and_counted(family: str) -> None:
    model, x = Net(), torch.randn(8, 4)
    optimizer = LNGD(model, lr=1e-3, family=family, factor_interval=1, inverse_interval=1)
    for _ in range(2):
        net_step(model, optimizer, x)
    before = {name: optimizer.factors(name) for name in "ab"}
    (model(x) * float("nan")).square().mean().backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # as a loss scaler would leave it, short of skipping the step
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.diagnostics()["skipped_factors"] == 2
    for name in "ab":
        for kind, value in before[name].items():
            if not kind.startswith("basis"):
                torch.testing.assert_close(optimizer.factors(name)[kind], value)
    assert all(p.isfinite().all() for p in model.parameters())
    net_step(model, optimizer, x)
    assert optimizer.diagnostics()["skipped_factors"] == 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e6])
def test_extreme_gradients_give_finite_steps(family: str, scale: float) -> None:
    model = Net()
    optimizer = LNGD(model, lr=1e-3, family=family, factor_interval=1, inverse_interval=1)
    for _ in range(3):
        net_step(model, optimizer, torch.randn(8, 4), scale)
    net_step(model, optimizer, torch.randn(8, 4))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_failed_inverse_keeps_the_one_before(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Net(), torch.randn(8, 4)
    optimizer = LNGD(model, lr=1e-3, family=family, factor_interval=1, inverse_interval=1, stagger=False)
    net_step(model, optimizer, x)
    bank = optimizer._preconditioner.factor_banks[0]
    names = [name for name in bank.derived if not name.startswith("moments")]
    kept = {name: bank.derived[name].clone() for name in names}
    which = "eigenbasis" if family == "ekfac" else "inverse"
    real = getattr(families, which)

    def fail(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *rest, last = real(matrix)
        ok = last.clone() if family == "ekfac" else rest[1].clone()
        ok[0] = False
        return (*rest, ok) if family == "ekfac" else (rest[0], ok, last)

    monkeypatch.setattr(families, which, fail)
    net_step(model, optimizer, x + 1)
    assert optimizer.diagnostics()["failed_inverses"] == 1
    for name in names:
        assert torch.equal(bank.derived[name][0], kept[name][0])
        assert not torch.equal(bank.derived[name][1], kept[name][1])
    monkeypatch.undo()
    net_step(model, optimizer, x + 2)
    assert not torch.equal(bank.derived[names[0]][0], kept[names[0]][0])
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_eigendecomposition_that_does_not_converge_keeps_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Net(), torch.randn(8, 4)
    optimizer = LNGD(model, lr=1e-3, family="ekfac", factor_interval=1, inverse_interval=1)
    net_step(model, optimizer, x)
    before = optimizer.factors("a")["basis_a"]

    def fail(matrix: Tensor) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    net_step(model, optimizer, x + 1)
    assert torch.equal(optimizer.factors("a")["basis_a"], before)
    assert optimizer.diagnostics()["failed_inverses"] == 2
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_is_never_called_has_neutral_factors(family: str) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.never = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Late().double()
    optimizer = LNGD(model, lr=1e-2, family=family)
    model(torch.randn(5, 4).double()).square().mean().backward()
    optimizer.step()
    found = optimizer.factors("never")
    whole = found["left"] if family == "ng+" else approximation(found)
    torch.testing.assert_close(whole, torch.eye(len(whole)).double())


@pytest.mark.parametrize("family", FAMILIES)
def test_state_and_what_it_takes(family: str) -> None:
    model = core_marian()
    optimizer = LNGD(model, lr=1e-2, family=family)
    for seed in range(2):
        core_step(model, optimizer, core_batch(seed))
    usage, numbers = optimizer.memory_usage(), optimizer.diagnostics()
    assert usage["total"] == sum(value for key, value in usage.items() if key != "total")
    assert min(usage["momentum"], usage["factors"], usage["inverses"]) > 0
    assert numbers["failed_inverses"] == numbers["skipped_factors"] == 0
    assert numbers["condition_max"] > 1 and numbers["damping_mean"] > 0
    twin, sums = copy.deepcopy(model), len(optimizer._capture.sums)
    twin(**core_batch(7)).loss.backward()  # the copy has the hooks of a factor step, which pass it over
    assert optimizer.config.factor_interval > 1 and len(optimizer._capture.sums) == sums == 0
    optimizer.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="closed"):
        core_backward(model, optimizer, core_batch(1))
        optimizer.step()


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
    states = []
    for own in (family, "lngd"):
        model = core_marian()
        optimizer = LNGD(model, family=own, direction="natural", fisher="empirical")
        core_step(model, optimizer, core_batch())
        states.append((optimizer, optimizer.state_dict()))
    with pytest.raises(ValueError, match=f"family: checkpoint '{family.replace('+', '[+]')}', here 'lngd'"):
        states[1][0].load_state_dict(states[0][1])
