"""The paper's Fishers: drawn, true, empirical; what they need of a forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_lngd import LNGD


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def factors_after(model: nn.Module, x: Tensor, **fields: object) -> dict[str, dict[str, Tensor]]:
    optimizer = LNGD(model, lr=0.0, **{"direction": "natural", **fields})
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.close()
    return {name: optimizer.factors(name) for name in ("0", "2")}


def test_mean_of_sampled_is_expected() -> None:
    model, x = model_of(), torch.randn(6, 4, dtype=torch.float64)
    exact = factors_after(model, x)
    draws = [factors_after(model, x, fisher="sampled", seed=seed) for seed in range(100)]
    for name in exact:
        phi = torch.stack([draw[name]["phi"] for draw in draws])
        error = phi.std(0) / len(draws) ** 0.5
        assert ((phi.mean(0) - exact[name]["phi"]).abs() < 5 * error).all()
        # Ψ is a ratio: compare v = Ψ·tr S, whose mean is exact
        v = torch.stack([draw[name]["psi"] * draw[name]["phi"].trace() for draw in draws])
        target = exact[name]["psi"] * exact[name]["phi"].trace()
        assert ((v.mean(0) - target).abs() < 5 * v.std(0) / len(draws) ** 0.5).all()


def test_draws_are_the_optimizers_own() -> None:
    x = torch.randn(6, 4, dtype=torch.float64)
    state = torch.get_rng_state()
    first = factors_after(model_of(), x, fisher="sampled", seed=3)
    torch.set_rng_state(state)
    before = torch.get_rng_state()
    model = model_of()
    torch.set_rng_state(before)
    again = factors_after(model, x, fisher="sampled", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    other = factors_after(model_of(), x, fisher="sampled", seed=4)
    assert torch.equal(first["2"]["phi"], again["2"]["phi"]) and not torch.equal(first["2"]["phi"], other["2"]["phi"])


def test_empirical_is_made_of_the_losss_gradients() -> None:
    model, x = model_of(), torch.randn(6, 4, dtype=torch.float64)
    found = factors_after(model, x, fisher="empirical", bias="fallback")
    h = torch.tanh(model[0](x)).detach()
    s = model[2](h)
    g = torch.autograd.grad(s.square().mean(), s)[0] * 6  # of a position's own loss: the mean is over 6 rows
    phi = sum(torch.outer(a, a) * row.square().sum() for a, row in zip(h, g, strict=True)) / 6
    torch.testing.assert_close(found["2"]["phi"], phi)


class Classifier(nn.Module):
    """Three classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_true_is_the_expectation_over_the_models_labels() -> None:
    x = torch.randn(1, 4, dtype=torch.float64).repeat(4000, 1)
    model = Classifier().double()
    optimizer = LNGD(model, lr=0.0, fisher="true", direction="natural")
    assert optimizer.needs_fisher_pass
    logits = model(x)
    optimizer.fisher_backward(logits)
    assert model.linear.weight.grad is None
    logits.square().mean().backward()
    optimizer.step()
    p = logits[0].softmax(0)
    expected = torch.outer(x[0], x[0]) * (1 - p.square().sum())  # E‖p − y‖²
    torch.testing.assert_close(optimizer.factors("linear")["phi"], expected, rtol=0.05, atol=0)
    g2 = p * (1 - p)
    torch.testing.assert_close(optimizer.factors("linear")["psi"], g2 / g2.sum(), rtol=0.05, atol=0)


def test_true_of_a_deep_layer_is_the_sum_over_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_of(), torch.randn(1, 4, dtype=torch.float64)
    h = torch.tanh(model[0](x))
    p = model[2](h).softmax(-1)[0].detach()
    found = torch.zeros(4, 4).double()
    for label in range(3):
        monkeypatch.setattr(torch, "multinomial", lambda probs, n, generator, c=label: torch.full((len(probs), 1), c))
        optimizer = LNGD(model, lr=0.0, fisher="true", direction="natural")
        logits = model(x)
        optimizer.fisher_backward(logits)
        logits.sum().backward()
        optimizer.step()
        optimizer.close()
        found += p[label] * optimizer.factors("0")["phi"]
    jacobian = (1 - h[0] ** 2).diag() @ model[2].weight.T  # of logits by the first layer's outputs, transposed
    fisher = jacobian @ (p.diag() - torch.outer(p, p)) @ jacobian.T
    torch.testing.assert_close(found, (torch.outer(x[0], x[0]) * fisher.trace()).detach(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("shape", [(9, 4), (3, 3, 4), (3, 1, 3, 4)], ids=str)  # with three a linear output is a view
@pytest.mark.parametrize("fisher", ["true", "empirical", "sampled", "expected"])
def test_activations_in_place_are_differentiated_all_the_same(fisher: str, shape: tuple[int, ...]) -> None:
    x, found = torch.randn(*shape, dtype=torch.float64), []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(inplace=inplace), nn.Linear(4, 3)).double()
        optimizer = LNGD(model, lr=0.0, fisher=fisher, direction="natural", factor_interval=1)
        for _ in range(2):  # the first forward finds the activation, the second knows
            logits = model(x)
            if optimizer.needs_fisher_pass:
                optimizer.fisher_backward(logits)
            logits.square().mean().backward()
            optimizer.step()
            found.append(optimizer.factors("0")["phi"])
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_a_step_without_a_forward_keeps_the_factors() -> None:
    for fisher in ("expected", "sampled", "true", "empirical"):
        model, x = Classifier(), torch.randn(3, 4)
        optimizer = LNGD(model, lr=0.1, fisher=fisher, factor_interval=1)
        logits = model(x)
        optimizer.fisher_backward(logits)
        logits.sum().backward()
        optimizer.step()
        before = optimizer.factors("linear")["phi"]
        optimizer.eval()
        model(x).sum().backward()
        optimizer.step()
        assert torch.equal(optimizer.factors("linear")["phi"], before)


def test_true_leaves_masked_rows_out() -> None:
    x = torch.randn(2000, 4, dtype=torch.float64)
    x[1000:] *= 100
    model = Classifier().double()
    optimizer = LNGD(model, lr=0.0, fisher="true", direction="natural")
    logits = model(x)
    optimizer.fisher_backward(logits, torch.arange(2000) < 1000)
    logits[:1000].square().mean().backward()
    optimizer.step()
    p = logits[:1000].softmax(1)
    trace = (x[:1000].square().sum(1) * (1 - p.square().sum(1))).mean()
    torch.testing.assert_close(optimizer.factors("linear")["phi"].trace(), trace, rtol=0.05, atol=0)


def test_true_needs_its_pass() -> None:
    model = Classifier()
    optimizer = LNGD(model, lr=0.1, fisher="true", factor_interval=2)
    model(torch.randn(3, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="fisher_backward"):
        optimizer.step()
    logits = model(torch.randn(3, 4))
    optimizer.fisher_backward(logits)
    optimizer.step()
    assert not LNGD(model).needs_fisher_pass
