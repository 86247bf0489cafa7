"""What KFAC, EKFAC, TKFAC and NG+ share with LNGD: fields, micro-batches, faults, state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from core_helpers import core_backward, core_batch, core_distance, core_marian, core_step, core_weights
from family_helpers import FAMILIES, Layer, approximation, observed
from torch import Tensor, nn

from hf_lngd import LNGD, LNGDConfig
from hf_lngd.checks import FAMILIES as ACCEPTED
from hf_lngd.config import FAMILY_DEFAULTS, PRESETS
from hf_lngd.curvature import families


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
