"""Figures of curvature: matrices against sums over samples and classes, moments against scipy-free definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.theory import digits, plot_fisher, plot_gaussianity
from benchmarks.theory.check_convergence import NATURAL
from hf_lngd import LNGD

pytest.importorskip("sklearn.datasets")
torch.set_num_threads(1)
PLACE = plot_fisher.LAYER


@pytest.fixture(scope="module", params=["tanh", "relu"])
def network(request: pytest.FixtureRequest) -> tuple[nn.Sequential, Tensor, Tensor]:
    x, y = digits.load()
    model = digits.make_mlp(request.param, 3)
    digits.train(model, x, y, 40, 3)
    return model, x[:30], y[:30]


def by_hand(model: nn.Sequential, x: Tensor) -> Tensor:
    """Σ_n Σ_c p_c ∇ ∇ᵀ / N with the gradient of each image's log-likelihood of each class, vec by columns."""
    weight = model[PLACE].weight
    total = torch.zeros(400, 400, dtype=torch.float64)
    for row in x:
        log_p = model(row[None]).log_softmax(-1)[0]
        for c in range(10):
            (grad,) = torch.autograd.grad(log_p[c], weight, retain_graph=True)
            vec = grad.T.flatten()
            total += log_p[c].exp().detach() * torch.outer(vec, vec)
    return total / len(x)


def test_the_exact_block_is_the_expectation_over_classes(network: tuple[nn.Sequential, Tensor, Tensor]) -> None:
    model, x, _ = network
    found, _ = plot_fisher.blocks(model, x)
    torch.testing.assert_close(found["exact"], by_hand(model, x), rtol=1e-9, atol=1e-14)


def test_the_layerwise_block_is_that_of_drawn_outputs() -> None:
    """g = −φ'(s) ⊙ ε by autograd of ½‖φ(s) + ε − φ(s)‖² over many draws: the block's diagonal and one off-diagonal."""
    x, _ = digits.load()
    model = digits.make_mlp("tanh", 0)
    _, found = plot_fisher.blocks(model, x[:4])
    seen = digits.observe(model, model[PLACE], model[PLACE + 1], x[:4])
    s = seen.pre.repeat(20_000, 1).requires_grad_()
    noise = torch.randn(s.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = (s.tanh() + noise).detach()
    (g,) = torch.autograd.grad((0.5 * (target - s.tanh()).square()).sum(), s)
    a = seen.inputs.repeat(20_000, 1)
    vec = (a[:, :, None] * g[:, None, :]).flatten(1)[:, :60]
    sampled = vec.T @ vec / len(vec)
    assert (sampled - found["exact"][:60, :60]).abs().max() < 0.02 * sampled.diagonal().max()


def test_lngd_is_what_the_optimizer_computes(network: tuple[nn.Sequential, Tensor, Tensor]) -> None:
    model, x, y = network
    _, found = plot_fisher.blocks(model, x)
    optimizer = LNGD(model, lr=0.0, **NATURAL)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    own = optimizer.factors(str(PLACE))
    optimizer.close()
    model.zero_grad()
    torch.testing.assert_close(found["lngd"], torch.kron(own["phi"], own["psi"].diag()), rtol=1e-9, atol=1e-14)


def test_approximations_by_their_definitions(network: tuple[nn.Sequential, Tensor, Tensor]) -> None:
    model, x, _ = network
    found, layerwise = plot_fisher.blocks(model, x)
    seen = digits.observe(model, model[PLACE], model[PLACE + 1], x)
    exact, a, n, d = by_hand(model, x), seen.inputs, len(x), 20
    # B and its traces out of single samples' blocks: a_j² B_n sits at (j, j)
    per_sample = [by_hand(model, row[None]) for row in x]
    sizes = a.square().sum(-1)
    b = [
        sum(f[j * d : (j + 1) * d, j * d : (j + 1) * d] for j in range(d)) / sizes[i] for i, f in enumerate(per_sample)
    ]
    mean_a, mean_b = a.T @ a / n, sum(b) / n
    torch.testing.assert_close(found["kfac"], torch.kron(mean_a, mean_b), rtol=1e-8, atol=1e-13)
    p = sum(b[i].trace() * torch.outer(a[i], a[i]) for i in range(n))
    q = sum(sizes[i] * b[i] for i in range(n))
    trace_kept = exact.trace() * torch.kron(p / p.trace(), q / q.trace())
    torch.testing.assert_close(found["tkfac"], trace_kept, rtol=1e-8, atol=1e-13)
    # EKFAC: the same basis as KFAC, and no other eigenvalues are closer
    basis = torch.kron(torch.linalg.eigh(mean_a)[1], torch.linalg.eigh(mean_b)[1])
    inside = basis.T @ found["ekfac"] @ basis
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-10 * inside.abs().max()
    torch.testing.assert_close(inside.diagonal(), (basis.T @ exact @ basis).diagonal(), rtol=1e-7, atol=1e-12)
    assert (found["ekfac"] - exact).norm() <= (found["kfac"] - exact).norm()
    for kind in ("ekfac", "tkfac", "lngd"):
        torch.testing.assert_close(found[kind].trace(), exact.trace())
    torch.testing.assert_close(layerwise["lngd"].trace(), layerwise["exact"].trace())
    torch.testing.assert_close(layerwise["lngd"], layerwise["tkfac"])


def test_errors_by_hand() -> None:
    exact, other = torch.diag(torch.tensor([3.0, 4.0])), torch.diag(torch.tensor([6.0, 8.0]))
    assert plot_fisher.errors(exact, other) == pytest.approx(
        {"relative_frobenius": 1.0, "shape_error": 0.0, "trace_error": 1.0}, abs=1e-3
    )
    across = plot_fisher.errors(exact, torch.diag(torch.tensor([4.0, -3.0])))
    assert across["shape_error"] == pytest.approx(1.0) and across["relative_frobenius"] == pytest.approx(math.sqrt(2))


def test_fisher_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot_fisher.main(["--only", "--steps", "3", "--activation", "relu", "--output", str(tmp_path)])
    (row,) = json.loads((tmp_path / "fisher.json").read_text(encoding="utf-8"))["rows"]
    x, y = digits.load()
    model = digits.make_mlp("relu", 0)
    assert digits.train(model, x, y, 3, 0) == pytest.approx(row["accuracy"], abs=1e-4)
    exact = by_hand(model, x[:200])
    assert row["trace_network"] == pytest.approx(float(exact.trace()), rel=0.1)
    assert row["network"]["lngd"]["trace_error"] == pytest.approx(0, abs=1e-9)
    assert f"{row['layerwise']['kfac']['relative_frobenius']:.3f}" in capsys.readouterr().out
    for name in ("fisher.png", "fisher_zoom.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 850
        assert (tmp_path / name).stat().st_size < 300_000


@pytest.mark.parametrize(
    ("arguments", "named"), [(["--steps", "-1"], "--steps: got -1"), (["--zoom", "0"], "--zoom: got 0, accepted: 1 to")]
)
def test_bad_arguments_are_named(arguments: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plot_fisher.main(arguments)
    if arguments[0] == "--steps":
        with pytest.raises(ValueError, match=named):
            plot_gaussianity.main(arguments)
    with pytest.raises(ValueError, match="activation: got 'sin', accepted: tanh, relu"):
        digits.make_mlp("sin", 0)


def test_moments_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(200_000, generator=generator, dtype=torch.float64) * 3 + 5
    exponential = torch.empty(400_000, dtype=torch.float64).exponential_(generator=generator)
    assert plot_gaussianity.moments(normal) == pytest.approx({"skewness": 0, "excess_kurtosis": 0}, abs=0.04)
    assert plot_gaussianity.moments(exponential) == pytest.approx({"skewness": 2, "excess_kurtosis": 6}, rel=0.05)
    coin = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(8)
    assert plot_gaussianity.moments(coin) == pytest.approx({"skewness": 0, "excess_kurtosis": -2})
    both = plot_gaussianity.unit_moments(torch.stack([coin, coin * 7 + 1, coin * 0], 1))
    assert both == pytest.approx({"skewness": 0, "excess_kurtosis": 2, "units": 2})
    expected = plot_gaussianity.normal_quantiles(99)
    assert (plot_gaussianity.quantiles(normal, 99) - expected).abs().max() < 0.02
    assert expected[49] == pytest.approx(0, abs=1e-9) and expected[-1] == pytest.approx(2.5728, abs=1e-3)


def test_what_a_convolution_sees() -> None:
    x, _ = digits.load()
    subject = plot_gaussianity.convolution(0)
    seen = digits.observe(subject.model, subject.layer, subject.activation, x[:2])
    s = subject.layer(subject.model[1](subject.model[0](x[:2])))
    assert seen.pre.shape == (2 * 7 * 7, 32)
    torch.testing.assert_close(seen.pre[7 + 3], s[0, :, 1, 3])
    torch.testing.assert_close(seen.post, seen.pre.relu())


def test_gaussianity_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot_gaussianity.main(["--steps", "2", "--layers", "mlp", "transformer", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "gaussianity.json").read_text(encoding="utf-8"))
    x, y = digits.load()
    model = digits.make_mlp("tanh", 0)
    digits.train(model, x, y, 2, 0)
    with torch.no_grad():
        s = model[:4](x).flatten()
    z = (s - s.mean()) / (s - s.mean()).square().mean().sqrt()
    assert rows["mlp"]["pre"]["pooled"]["excess_kurtosis"] == pytest.approx(float((z**4).mean()) - 3, rel=1e-6)
    assert (rows["transformer"]["positions"], rows["transformer"]["units"]) == (1797 * 50, 128)
    assert "ViT fc1" in capsys.readouterr().out
    with Image.open(tmp_path / "gaussianity.png") as picture:
        assert picture.width > 850
