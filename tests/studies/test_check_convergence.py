"""The theorems' checks against dense computations of their own: Hessians, Kronecker products, grids of rates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.theory import check_convergence as check
from benchmarks.theory import digits
from hf_lngd import LNGD

pytest.importorskip("sklearn.datasets")
torch.set_num_threads(1)


@pytest.mark.parametrize("correlation", [0.0, 0.4])
def test_the_single_rate_is_the_best_of_a_grid(correlation: float) -> None:
    x, curvature = check.random_quadratics(20, 5, 1, correlation)
    each, one = check.full_values(x, curvature)
    for slopes, c, found in zip(x, curvature, one, strict=True):
        best = slopes.sum() / c.sum()
        grid = best * torch.linspace(-1, 3, 4001, dtype=torch.float64)
        values = -grid * slopes.sum() + 0.5 * grid**2 * c.sum()
        assert float(values.min()) == pytest.approx(float(found), rel=1e-9)
    if correlation == 0:
        best = -0.5 * torch.linalg.solve(curvature, x[..., None]).squeeze(-1).mul(x).sum(-1)
        torch.testing.assert_close(each, best)


def test_theorem_1_holds_and_its_counter_examples_do_not() -> None:
    x, curvature = check.random_quadratics(5_000, 6, 0)
    assert check.share_holding(*check.full_values(x, curvature)) == 1.0
    alike = torch.full((3,), 2.0, dtype=torch.float64)
    each, one = check.model_values(alike, alike)
    assert float(each) == pytest.approx(float(one))
    each, one = check.model_values(torch.ones(2), torch.tensor([1.0, 0.01]), mu=1.0)
    by_hand = -(1 / 2 + 1 / 1.01) + 0.5 * (1 / 4 + 0.01 / 1.01**2)
    assert float(each) == pytest.approx(by_hand, rel=1e-5) and float(each) > float(one)
    r, layers = 0.5, 4
    each, one = check.full_values(torch.ones(layers), (1 - r) * torch.eye(layers) + r)
    assert float(each) == pytest.approx(-layers / 2 + r * layers * (layers - 1) / 2)
    assert float(one) == pytest.approx(-0.5 * layers / (1 + r * (layers - 1))) and float(each) > 0 > float(one)


def test_curvature_between_layers_is_the_networks() -> None:
    """Finite differences of the KL divergence from the model's own output: its Hessian is the Fisher."""

    slopes, curvature = check.network_quadratic("tanh", 5, 1, batch=40)
    data, labels = digits.load()
    model = digits.make_mlp("tanh", 1)
    digits.train(model, data, labels, 5, 1)
    data, labels = data[:40], labels[:40]
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = LNGD(model, lr=1.0, **check.NATURAL)
    loss = torch.nn.functional.cross_entropy(model(data), labels)
    loss.backward()
    optimizer.step()
    optimizer.close()
    names = [n for n in start if n.endswith("weight")]
    seen = {n: start[n] - p.detach() for n, p in model.named_parameters() if n in names}

    def moved(rates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        changed = {n: start[n] - rate * seen[n] for n, rate in zip(names, rates, strict=True)}
        log_q = torch.func.functional_call(model, {**start, **changed}, (data,)).log_softmax(-1)
        log_p = torch.func.functional_call(model, start, (data,)).log_softmax(-1).detach()
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean(), torch.nn.functional.nll_loss(log_q, labels)

    zero = torch.zeros(4, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda rates: moved(rates)[0], zero)
    torch.testing.assert_close(curvature, hessian, rtol=1e-7, atol=1e-10)
    gradient = torch.autograd.functional.jacobian(lambda rates: moved(rates)[1], zero)
    torch.testing.assert_close(slopes, -gradient, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("psi", ["dense", "diagonal"])
def test_a_step_is_the_preconditioned_gradient(psi: str) -> None:
    """W − α (Φ ⊗ Ψ)⁺ vec ∇ with autograd's gradient and an explicit Kronecker product."""
    problem = check.make_problem(7, 3, 30, 0)
    weight = problem.weight.clone().requires_grad_()
    outputs = (problem.x @ weight.T).relu() @ problem.signs / 30**0.5
    (gradient,) = torch.autograd.grad((problem.y - outputs).square().sum() / 14, weight)
    g = torch.stack([torch.autograd.grad(out, weight, retain_graph=True)[0] @ x for out, x in zip(
        (problem.x @ weight.T).relu() @ problem.signs / 30**0.5, problem.x, strict=True)])  # fmt: skip
    phi = sum(g[i].square().sum() * torch.outer(problem.x[i], problem.x[i]) for i in range(7)) / 7
    eta = g.square().sum(1).mean()
    dense = g.T @ g / (7 * eta)
    block = torch.kron(phi, dense if psi == "dense" else dense.diagonal().diag())
    move = torch.linalg.pinv(block, hermitian=True, rtol=1e-10) @ gradient.T.flatten()
    expected = problem.weight - 0.1 * move.view(3, 30).T
    torch.testing.assert_close(check.step(problem, problem.weight, 0.1, psi), expected, rtol=1e-6, atol=1e-9)


def test_facts_about_the_multipliers() -> None:
    for d in (1, 3, 8):
        problem = check.make_problem(max(2, 3 * d), d, 200, d)
        g = problem.jacobian(problem.weight)
        t = check.multipliers(problem, problem.weight)
        size = g.square().sum(1)
        assert float(t.min()) >= 1 - 1e-12 and float(t.max()) >= d - 1e-12
        assert float((size * t).sum() / size.sum()) == pytest.approx(d)


def test_the_linearised_errors_and_the_largest_rate() -> None:
    problem = check.make_problem(10, 4, 200_000, 3)
    t = check.multipliers(problem, problem.weight)
    error = problem.outputs(problem.weight) - problem.y
    alpha = check.largest_rate(t)
    after = problem.outputs(check.step(problem, problem.weight, 1e-3, "dense")) - problem.y
    torch.testing.assert_close(after, (1 - 1e-3 * t) * error, rtol=1e-3, atol=1e-4)
    grid = torch.linspace(1e-4, 1, 10_000, dtype=torch.float64)
    allowed = ((1 - grid[:, None] * t) ** 2 <= 1 - grid[:, None]).all(1)
    assert alpha == pytest.approx(float(grid[allowed].max()), abs=1.1e-4)
    assert check.largest_rate(torch.tensor([0.4, 2.0])) < 0
    assert check.bound_holds([1.0, 0.5, 0.25], 0.5, 2) and not check.bound_holds([1.0, 0.5, 0.26], 0.5, 2)
    assert not check.bound_holds([1.0, 0.1], 0.5, 2), "a run that was cut off"


def test_the_whole_check_in_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check.main(["--count", "50", "--samples", "6", "--inputs", "2", "--widths", "2000", "--seeds", "2", "--steps", "15",
                "--training", "3", "--output", str(tmp_path)])  # fmt: skip
    result = json.loads((tmp_path / "convergence.json").read_text(encoding="utf-8"))
    held = {(r["psi"], r["rate"]): r["held"] for r in result["theorem_2"]["rows"]}
    assert held["dense", "0.5/max t"] == 2 and held["dense", "0.9"] == 0
    plain = [r for r in result["theorem_1"]["random"] if (r["correlation"], r["mu"]) == (0, 0)]
    assert all(r["holds"] == 1 for r in plain)
    assert all(r["layerwise_block"] <= r["single_block"] for r in result["theorem_1"]["networks"])
    assert "Theorem 2, n = 6, d = 2" in capsys.readouterr().out
    with Image.open(tmp_path / "convergence.png") as picture:
        assert picture.width > 850


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--count", "0"], "--count: got 0, accepted: at least 1"),
        (["--samples", "3", "--inputs", "4"], "--samples: got 3, accepted: at least --inputs = 4"),
        (["--widths", "8"], "--widths: got 8, accepted: at least --samples"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check.main(arguments)


def test_where_there_is_no_rate_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """α* of 0 or less says that the bound holds at no rate; run as one it would be a step uphill."""
    rates = []

    def run(problem: check.Problem, alpha: float, steps: int, psi: str) -> list[float]:
        rates.append(alpha)
        return [1.0] * (steps + 1)

    monkeypatch.setattr(check, "run", run)
    monkeypatch.setattr(check, "largest_rate", lambda t: -2.0)
    rows = check.theorem_2(6, 2, [8], 2, 3)["rows"]
    none = [row for row in rows if "alpha*" in row["rate"]]
    assert none and all(row["alpha"] < 0 and row["held"] == 0 and row["diverged"] == 0 for row in none)
    assert rates and min(rates) > 0
