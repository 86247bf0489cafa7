"""What goes wrong in a step is passed over and counted, and what comes later is right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_lngd import LNGD
from hf_lngd.curvature import factor_bank, layer_bank

DIRECTIONS = ["natural", "polar", "gram"]


class Net(nn.Module):
    """Two layers, and a switch that spoils the inputs of the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.spoil: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.spoil is not None:
            h = h + (torch.full_like(h, self.spoil) - h).detach()
        return self.b(h)


def step(model: Net, optimizer: LNGD, x: Tensor) -> None:
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_is_skipped_and_counted(direction: str, bad: float) -> None:
    model = Net()
    optimizer = LNGD(model, lr=1e-3, direction=direction, factor_interval=1, inverse_interval=1)
    x = torch.randn(8, 4)
    step(model, optimizer, x)
    before = {name: optimizer.factors(name)["phi"].clone() for name in "ab"}
    model.spoil = bad
    model(x)  # the forward of a step that is thrown away: its loss is not finite
    model.spoil = None
    step(model, optimizer, x)
    assert torch.equal(optimizer.factors("b")["phi"], before["b"])
    assert optimizer.diagnostics()["skipped_factors"] == 1
    assert all(p.isfinite().all() for p in model.parameters())
    step(model, optimizer, x)
    assert not torch.equal(optimizer.factors("b")["phi"], before["b"])
    assert optimizer.diagnostics()["skipped_factors"] == 1


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("damping", ["relative", "paper"])
@pytest.mark.parametrize("scale", [0.0, 1e-15, 1e12])
def test_extreme_inputs_give_finite_steps(direction: str, damping: str, scale: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = LNGD(model, lr=1e-3, direction=direction, damping=damping, factor_interval=1)
    for _ in range(3):
        (model(torch.randn(8, 4) * scale) / max(scale, 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.factors("0")["phi"].isfinite().all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_position_makes_a_factor_of_rank_one(direction: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    optimizer = LNGD(model, lr=1e-3, direction=direction)
    model(torch.randn(1, 6)).sum().backward()
    optimizer.step()
    assert torch.linalg.matrix_rank(optimizer.factors("0")["phi"]) == 1
    assert model[0].weight.isfinite().all()


NATURAL = {"direction": "natural", "factor_interval": 1, "inverse_interval": 1, "stagger": False}


def fail_inverse(monkeypatch: pytest.MonkeyPatch, which: tuple[int, ...]) -> None:
    """From now on the inverse of this factor (or of one block of it) is no inverse."""
    real = factor_bank.inverse

    def fail(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result, ok, condition = real(matrix)
        ok = ok.clone()
        ok[which] = False
        result[which] = torch.nan
        return result, ok, condition

    monkeypatch.setattr(factor_bank, "inverse", fail)


def test_a_failed_inverse_keeps_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    optimizer = LNGD(model, lr=1e-3, **NATURAL)
    x = torch.randn(8, 4)
    step(model, optimizer, x)
    bank = optimizer._preconditioner.factor_banks[0]
    kept = bank.derived["inverse"].clone()
    fail_inverse(monkeypatch, (0,))
    step(model, optimizer, x + 1)
    assert torch.equal(bank.derived["inverse"][0], kept[0])
    assert optimizer.diagnostics()["failed_inverses"] == 1
    monkeypatch.undo()
    step(model, optimizer, x + 2)
    assert not torch.equal(bank.derived["inverse"][0], kept[0])
    assert all(p.isfinite().all() for p in model.parameters())


def test_one_failed_block_keeps_all_blocks_of_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = LNGD(model, lr=1e-3, max_factor_dim=2, **NATURAL)
    x = torch.randn(8, 4)
    step(model, optimizer, x)
    bank = optimizer._preconditioner.factor_banks[0]
    kept = bank.derived["inverse"].clone()
    fail_inverse(monkeypatch, (0, 1))  # the second block of the first factor
    step(model, optimizer, x + 1)
    assert torch.equal(bank.derived["inverse"][0], kept[0])
    assert not torch.equal(bank.derived["inverse"][1], kept[1])
    assert optimizer.diagnostics()["failed_inverses"] == 1


def test_a_failed_root_of_a_gram_matrix_keeps_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    optimizer = LNGD(model, lr=1e-3, direction="gram", polar_interval=1)
    x = torch.randn(8, 4)
    step(model, optimizer, x)
    bank = optimizer._preconditioner.layer_banks[0]
    polar, gram = bank.polar.clone(), bank.gram.clone()
    real = layer_bank.inverse_sqrt
    monkeypatch.setattr(
        layer_bank, "inverse_sqrt", lambda *a: (real(*a)[0] * torch.nan, torch.zeros(2, dtype=torch.bool), None)
    )
    step(model, optimizer, x)
    assert torch.equal(bank.polar, polar) and torch.equal(bank.gram, gram)
    assert optimizer.diagnostics()["failed_inverses"] == 2
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_fault_within_the_step_leaves_weights_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    optimizer = LNGD(model, lr=1e-3, factor_interval=1)
    x = torch.randn(8, 4)
    step(model, optimizer, x)
    before = [p.detach().clone() for p in model.parameters()]

    def fault(self: object, rows: Tensor) -> None:
        raise MemoryError("out of memory")

    monkeypatch.setattr(factor_bank.FactorBank, "invert", fault)
    model(x).square().mean().backward()
    with pytest.raises(MemoryError):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    monkeypatch.undo()
    state = optimizer.state_dict()
    optimizer.zero_grad()
    step(model, optimizer, x)
    optimizer.load_state_dict(state)
    step(model, optimizer, x)
    assert all(p.isfinite().all() for p in model.parameters())


def test_all_padding_gives_no_factor() -> None:
    class Masked(Net):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(x)

    model = Masked()
    optimizer = LNGD(model, lr=1e-3, factor_interval=1)
    x = torch.randn(2, 3, 4)
    for mask in (torch.ones(2, 3), torch.zeros(2, 3)):
        model(x, attention_mask=mask).square().mean().backward()
        optimizer.step()
    assert optimizer.diagnostics()["skipped_factors"] == 2
    assert optimizer.factors("b")["phi"].isfinite().all()


def test_a_factor_that_overflows_takes_its_psi_with_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    optimizer = LNGD(model, lr=0.0, factor_interval=1)
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    before = optimizer.factors("0")
    with torch.no_grad():
        model[0].weight.zero_()
    huge = torch.zeros(8, 4)
    huge[0, 0] = 1.5e19  # ‖a‖² is finite, times ‖g‖² it is not
    model(huge).sum().backward()
    optimizer.step()
    assert optimizer.diagnostics()["skipped_factors"] == 1
    for kind, value in optimizer.factors("0").items():
        assert torch.equal(value, before[kind]), kind


@pytest.mark.parametrize("fisher", ["empirical", "true"])
def test_gradients_that_are_not_finite_give_no_factor(fisher: str) -> None:
    model, x = Net(), torch.randn(8, 4)
    optimizer = LNGD(model, lr=1e-3, fisher=fisher, factor_interval=1)

    def both(scale: float) -> None:
        out = model(x)
        optimizer.fisher_backward(out * scale)
        (out * scale).square().mean().backward()
        if scale != 1.0:
            optimizer.zero_grad()  # what a loss scaler does with such a step, short of skipping it
            model.b.weight.grad, model.a.weight.grad = torch.ones(4, 4), torch.ones(4, 4)
        optimizer.step()
        optimizer.zero_grad()

    both(1.0)
    before = {name: optimizer.factors(name) for name in "ab"}
    both(float("nan"))
    for name in "ab":
        assert all(torch.equal(optimizer.factors(name)[kind], value) for kind, value in before[name].items())
    assert optimizer.diagnostics()["skipped_factors"] == 2
    both(1.0)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(optimizer.factors("a")["phi"], before["a"]["phi"])


def test_an_eigenbasis_that_is_not_found_keeps_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Embedding(5, 3))
    optimizer = LNGD(model, lr=1e-2, embedding="rotated", factor_interval=1)
    model(torch.arange(5)).square().sum().backward()
    optimizer.step()
    basis = optimizer._embeddings[0].state()["basis"].clone()

    def fail(matrix: Tensor) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    model(torch.arange(5)).exp().sum().backward()
    optimizer.step()
    assert torch.equal(optimizer._embeddings[0].state()["basis"], basis)
    assert model[0].weight.isfinite().all()
