"""Theorems 1 and 2 of Liu et al. (NeurIPS 2024), checked numerically: where each holds, and counter-examples.

    python -m benchmarks.theory.check_convergence

**Theorem 1.** Along directions D_l of L layers the quadratic model of the loss, with slopes x_l = ⟨D_l, G_l⟩ and
curvature C_kl = D_kᵀ F_kl D_l, is q(α) = −Σ α_l x_l + ½ αᵀ C α. Let C be diagonal (F block-diagonal) with c_l = C_ll
> 0. Rates per layer are best at α_l = x_l/c_l (Eq. 12-13, μ = 0), where q = −½ Σ x_l²/c_l; one rate for all is best
at α = Σx/Σc, where q = −½ (Σ x_l)²/Σ c_l. By Cauchy-Schwarz, (Σ √c_l · x_l/√c_l)² ≤ Σ c_l · Σ x_l²/c_l: the first is
never above the second, and equal only where all x_l/c_l are alike. This proves it, and shows what it needs:

- *μ = 0.* With μ > 0 both rates are too small, by factors c_l/(c_l + μ) and Σc/(Σc + μ). For x = (1, 1), c = (1,
  0.01), μ = 1 the layer-wise rates give −1.36 and the single one −1.50.
- *No curvature between layers.* With x = (1, …, 1) and C = (1 − r) I + r 11ᵀ the layer-wise rates are 1 each and q =
  −L/2 + r L(L − 1)/2, the best single one gives −½ L/(1 + r(L − 1)): better for each r > 0, and for r > 1/(L − 1) the
  layer-wise step goes up. Networks have such curvature: it is measured here on trained ones, exactly.

**Theorem 2.** f(x) = m^(−1/2) Σ_r b_r relu(w_rᵀ x), b_r = ±1 fixed, |x_i| = 1, no two parallel, X [n, d] of rank d,
loss 1/(2n) ‖y − v‖². With g_i = m^(−1/2) b ⊙ 1[W x_i > 0] and G [n, m] their rows, the gradient is (1/n) Σ (v_i −
y_i) g_i x_iᵀ and the factors are Z = Φ = (1/n) Σ ‖g_i‖² x_i x_iᵀ, η = (1/n) Σ ‖g_i‖², Ψ = GᵀG/(nη), dense. One step W
← W − α Ψ⁺ ∇ Φ⁻¹ changes the outputs, up to changes of the activation pattern, by

    v_j ← v_j − (α/n) Σ_i (g_jᵀ Ψ⁺ g_i)(x_jᵀ Z⁻¹ x_i)(v_i − y_i),     g_jᵀ Ψ⁺ g_i = nη δ_ij  (G of full row rank),

so each error shrinks on its own: e_i ← (1 − α t_i) e_i, with t_i = η x_iᵀ Z⁻¹ x_i. Two facts about t:

- t_i ≥ 1, since λ_max(Z) ≤ tr Z = η;
- Σ ‖g_i‖² t_i = nη d, so max t ≥ d (a weighted mean of the t_i is d).

‖e_k‖² ≤ (1 − α)^k ‖e_0‖² for *every* e_0 therefore holds if and only if (1 − α t_i)² ≤ 1 − α for all i, that is

    α ≤ α* = min_i (2 t_i − 1)/t_i²     (sufficient: α ≤ 1/max t; necessary: α ≤ (2d − 1)/d² < 2/d),

and past 2/max t the linearised iteration diverges. A rate near 1, which the text allows, is possible for d = 1 alone.
Width enters only through the changes of the pattern: the narrower, the more of them. Tested: the dense Ψ, and Eq. 5's
diagonal Ψ, whose map (1/n)(X Z⁻¹ Xᵀ) ∘ (G Ψ⁻¹ Gᵀ) is not diagonal and needs the same of its eigenvalues, now called
t. They grow as m, so its rate has to shrink as 1/m: rates are given as multiples of what each Ψ's own t allow.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report.tables import table
from benchmarks.theory import digits
from hf_lngd import LNGD

RESULTS = Path(__file__).resolve().parents[1] / "results"
# Rates of Theorem 2, as multiples of what the derivation allows, and two that the text allows.
RATES = ("0.5/max t", "1/max t", "alpha*", "1.5 alpha*", "2.1/max t", "0.5", "0.9")
# D = Ψ⁻¹GΦ⁻¹ as it is: weights alone, damped relative to each factor, no rate, momentum or decay.
NATURAL: dict[str, Any] = {
    "preset": "paper",
    "fisher": "expected",
    "rate": "none",
    "momentum": 0.0,
    "damping": 1.0,
    "bias": "fallback",
    "max_factor_dim": "auto",
    "weight_decay": 0.0,
}
SLACK = 1e-9  # of comparisons of two numbers that may be equal
COLOURS = ("#99f6e4", "#14b8a6", "#0f766e", "#d97706", "#be123c", "#7c3aed", "#c026d3")
LEAST = -6.5  # of the left axis: what is below is at the edge


def model_values(x: Tensor, c: Tensor, mu: float = 0.0) -> tuple[Tensor, Tensor]:
    """q of the layer-wise rates x_l/(c_l + μ) and of the single rate Σx/(Σc + μ), curvature diagonal.

    Args:
        x, c: slopes and curvatures [..., L].
    """
    return full_values(x, torch.diag_embed(c), mu)


def full_values(x: Tensor, curvature: Tensor, mu: float = 0.0) -> tuple[Tensor, Tensor]:
    """The same where C [..., L, L] is full: rates from its diagonal (what Eq. 13 sees), the one rate from all of it."""
    c = curvature.diagonal(dim1=-2, dim2=-1)
    each = x / (c + mu)
    one = (x.sum(-1) / (curvature.sum((-2, -1)) + mu))[..., None].expand_as(x)

    def value(rate: Tensor) -> Tensor:
        return -(rate * x).sum(-1) + 0.5 * torch.einsum("...k,...kl,...l->...", rate, curvature, rate)

    return value(each), value(one)


def share_holding(each: Tensor, one: Tensor) -> float:
    """How often the layer-wise value is not above the single one, up to rounding."""
    return float((each <= one + SLACK * one.abs()).double().mean())


def random_quadratics(count: int, layers: int, seed: int, correlation: float = 0.0) -> tuple[Tensor, Tensor]:
    """Slopes [count, L] and curvatures [count, L, L], over six decades; `correlation` r: C_kl = r √(c_k c_l)."""
    generator = torch.Generator().manual_seed(seed)
    c = 10 ** (6 * torch.rand(count, layers, generator=generator, dtype=torch.float64) - 3)
    x = torch.randn(count, layers, generator=generator, dtype=torch.float64) * c.sqrt()
    roots = c.sqrt()
    return x, correlation * roots[:, :, None] * roots[:, None, :] + (1 - correlation) * torch.diag_embed(c)


def network_quadratic(activation: str, steps: int, seed: int, batch: int = 256) -> tuple[Tensor, Tensor]:
    """x [L] and C [L, L] of LNGD's directions (natural, relative damping) in the digits' MLP, F the network's, exact.

    C_kl = E_n[u_kᵀ (diag p − p pᵀ) u_l] with u_l the derivative of the logits along D_l.
    """
    data, labels = digits.load()
    model = digits.make_mlp(activation, seed)
    digits.train(model, data, labels, steps, seed)
    data, labels = data[:batch], labels[:batch]
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = {name: value for name, value in parameters.items() if name.endswith("weight")}
    optimizer = LNGD(model, lr=1.0, **NATURAL)
    torch.nn.functional.cross_entropy(model(data), labels).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if name in weights and p.grad is not None}
    optimizer.step()
    optimizer.close()
    directions = {name: weights[name] - p.detach() for name, p in model.named_parameters() if name in weights}

    def logits(changed: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, {**parameters, **changed}, (data,))

    along = [torch.func.jvp(logits, ({n: weights[n]},), ({n: directions[n]},))[1] for n in weights]
    p = logits({}).detach().softmax(-1)
    u = torch.stack(along)
    mean = (u * p).sum(-1)
    curvature = (torch.einsum("kni,ni,lni->kl", u, p, u) - mean @ mean.mT) / batch
    return torch.stack([(directions[n] * gradients[n]).sum() for n in weights]), curvature


def theorem_1(count: int, seed: int, training: tuple[int, ...]) -> dict[str, Any]:
    """Every test of Theorem 1, as rows of JSON."""
    rows, ratios = [], []
    for layers in (2, 8, 32):
        for r, mu in ((0.0, 0.0), (0.0, 1.0), (0.5, 0.0)):
            x, curvature = random_quadratics(count, layers, seed, r)
            each, one = full_values(x, curvature, mu)
            if (r, mu) == (0.0, 0.0):
                ratios += (each / one.abs()).tolist()[:2000]
            rows.append({"what": "random", "layers": layers, "correlation": r, "mu": mu, "count": count,
                         "holds": share_holding(each, one), "goes_up": float((each > 0).double().mean())})  # fmt: skip
    networks = []
    for activation in digits.ACTIVATIONS:
        for steps in training:
            x, curvature = network_quadratic(activation, steps, seed)
            block, one_block = model_values(x, curvature.diagonal())
            full, one_full = full_values(x, curvature)
            networks.append({"activation": activation, "steps": steps, "slopes": x.tolist(),
                             "curvature": curvature.tolist(), "layerwise_block": float(block),
                             "single_block": float(one_block), "layerwise_full": float(full),
                             "single_full": float(one_full)})  # fmt: skip
    cross = {}
    for r in (0.0, 0.2, 0.5, 0.9):
        each, one = full_values(torch.ones(4, dtype=torch.float64), (1 - r) * torch.eye(4, dtype=torch.float64) + r)
        cross[str(r)] = [float(each), float(one)]
    damped = model_values(torch.ones(2, dtype=torch.float64), torch.tensor([1.0, 0.01], dtype=torch.float64), 1.0)
    examples = {"four layers, correlation r": cross, "mu = 1": [float(v) for v in damped]}
    return {"random": rows, "networks": networks, "examples": examples, "gain_ratios": ratios}


@dataclass(frozen=True)
class Problem:
    """Theorem 2's: inputs [n, d] of norm 1, targets [n], initial W [m, d], signs b [m]."""

    x: Tensor
    y: Tensor
    weight: Tensor
    signs: Tensor

    def jacobian(self, weight: Tensor) -> Tensor:
        """G [n, m]: g_i = m^(−1/2) b ⊙ 1[W x_i > 0]."""
        return (self.x @ weight.mT > 0).to(self.x.dtype) * self.signs / len(self.signs) ** 0.5

    def outputs(self, weight: Tensor) -> Tensor:
        """v [n]."""
        return (self.x @ weight.mT).relu() @ self.signs / len(self.signs) ** 0.5


def make_problem(n: int, d: int, width: int, seed: int) -> Problem:
    """Inputs uniform on the sphere, targets and weights standard normal."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.randn(n, generator=generator, dtype=torch.float64)
    weight = torch.randn(width, d, generator=generator, dtype=torch.float64)
    signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
    return Problem(x / x.norm(dim=1, keepdim=True), y, weight, signs)


def factors(problem: Problem, g: Tensor) -> tuple[Tensor, Tensor]:
    """Z [d, d] (Eq. 4) and η."""
    size = g.square().sum(1)
    return (problem.x * size[:, None]).mT @ problem.x / len(g), size.mean()


def multipliers(problem: Problem, weight: Tensor) -> Tensor:
    """t_i = η x_iᵀ Z⁻¹ x_i: [n]."""
    z, eta = factors(problem, problem.jacobian(weight))
    return eta * (problem.x @ torch.linalg.inv(z) * problem.x).sum(1)


def largest_rate(t: Tensor) -> float:
    """α* = min (2t − 1)/t²: the largest rate with (1 − αt)² ≤ 1 − α for all; 0 or less: none."""
    return float(((2 * t - 1) / t.square()).min())


def step(problem: Problem, weight: Tensor, alpha: float, psi: str) -> Tensor:
    """One step of LNGD: W − α Ψ⁺ ∇ Φ⁻¹; `psi`: dense (GᵀG/(nη)) or diagonal (Eq. 5)."""
    g, n = problem.jacobian(weight), len(problem.x)
    z, eta = factors(problem, g)
    error = problem.outputs(weight) - problem.y
    if psi == "dense":  # (GᵀG)⁺ Gᵀ = Gᵀ (G Gᵀ)⁺: n × n in place of m × m
        left = n * eta * g.mT @ torch.linalg.pinv(g @ g.mT, hermitian=True)
    else:
        diagonal = g.square().mean(0) / eta
        left = g.mT / torch.where(diagonal > 0, diagonal, torch.inf)[:, None]
    return weight - alpha / n * (left * error) @ problem.x @ torch.linalg.inv(z)


def diagonal_eigenvalues(problem: Problem, weight: Tensor) -> Tensor:
    """Eigenvalues of the linearised map of the errors under Eq. 5's Ψ, (1/n) (X Z⁻¹ Xᵀ) ∘ (G Ψ⁻¹ Gᵀ): [n]."""
    g = problem.jacobian(weight)
    z, eta = factors(problem, g)
    diagonal = g.square().mean(0) / eta
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    return torch.linalg.eigvalsh((problem.x @ torch.linalg.inv(z) @ problem.x.mT) * ((g * inverse) @ g.mT) / len(g))


def run(problem: Problem, alpha: float, steps: int, psi: str) -> list[float]:
    """‖y − v_k‖² for k = 0 … steps; ends early where it exceeds 10⁶ times the first."""
    weight, errors = problem.weight, []
    for _ in range(steps + 1):
        errors.append(float((problem.y - problem.outputs(weight)).square().sum()))
        if not errors[-1] <= 1e6 * errors[0]:
            break
        weight = step(problem, weight, alpha, psi)
    return errors


def bound_holds(errors: list[float], alpha: float, steps: int) -> bool:
    """‖e_k‖² ≤ (1 − α)^k ‖e_0‖² for all k up to `steps`, down to rounding (10⁻²⁴ of the first)."""
    return len(errors) == steps + 1 and all(
        error <= errors[0] * max((1 - alpha) ** k * (1 + SLACK), 1e-24) for k, error in enumerate(errors)
    )


def theorem_2(n: int, d: int, widths: list[int], seeds: int, steps: int) -> dict[str, Any]:
    """For each width, rate and Ψ: in how many problems the bound holds, the error reached, what the theory allows."""
    rows, curves = [], []
    for width in widths:
        problems = [make_problem(n, d, width, seed) for seed in range(seeds)]
        for psi, name in itertools.product(("dense", "diagonal"), RATES):
            held, last, alphas, up = 0, [], [], 0
            for problem in problems:
                spectrum = multipliers if psi == "dense" else diagonal_eigenvalues
                t = spectrum(problem, problem.weight)
                alpha = rate_of(name, t)
                alphas.append(alpha)
                # where α* says that there is no rate, there is nothing to run, and the bound does not hold
                errors = run(problem, alpha, steps, psi) if alpha > 0 else [1.0]
                held += bound_holds(errors, alpha, steps)
                up += errors[-1] > errors[0]
                last.append(errors[-1] / errors[0])
            if width == widths[-1] and psi == "dense":
                curves.append({"rate": name, "alpha": alphas[-1], "errors": [e / errors[0] for e in errors]})
            rows.append({"width": width, "psi": psi, "rate": name, "alpha": sorted(alphas)[seeds // 2], "held": held,
                         "seeds": seeds, "diverged": up, "last": sorted(last)[seeds // 2]})  # fmt: skip
    spectra = []
    for problem in problems:
        t, own = multipliers(problem, problem.weight), diagonal_eigenvalues(problem, problem.weight)
        spectra.append({"t_least": float(t.min()), "t_most": float(t.max()), "alpha_star": largest_rate(t),
                        "diagonal_least": float(own.min()), "diagonal_most": float(own.max()),
                        "diagonal_alpha_star": largest_rate(own)})  # fmt: skip
    return {"n": n, "d": d, "steps": steps, "rows": rows, "curves": curves, "widest": spectra}


def rate_of(name: str, t: Tensor) -> float:
    """α of a name in `RATES`."""
    most = float(t.max())
    named = {"0.5/max t": 0.5 / most, "1/max t": 1 / most, "alpha*": largest_rate(t)}
    named |= {"1.5 alpha*": 1.5 * largest_rate(t), "2.1/max t": 2.1 / most}
    return named[name] if name in named else float(name)


def report(result: dict[str, Any]) -> str:
    """Where each theorem holds, in Markdown."""
    one, two = result["theorem_1"], result["theorem_2"]
    random = table(
        ["layers", "curvature between layers", "μ", "layer-wise ≤ single", "layer-wise step goes up"],
        [
            [
                str(r["layers"]),
                f"{r['correlation']:g}",
                f"{r['mu']:g}",
                f"{r['holds']:.1%} of {r['count']:,}",
                f"{r['goes_up']:.1%}",
            ]
            for r in one["random"]
        ],
    )
    networks = table(
        ["φ", "steps", "blocks alone (the theorem)", "with the curvature between layers"],
        [
            [
                r["activation"],
                str(r["steps"]),
                *(f"{r[f'layerwise_{kind}']:.4g} / {r[f'single_{kind}']:.4g}" for kind in ("block", "full")),
            ]
            for r in one["networks"]
        ],
    )
    widths, body = sorted({r["width"] for r in two["rows"]}), []
    for psi, name in dict.fromkeys((r["psi"], r["rate"]) for r in two["rows"]):
        found = [r for r in two["rows"] if (r["psi"], r["rate"]) == (psi, name)]
        cells = [f"{r['held']}/{r['seeds']}" + (f" ({r['diverged']} diverge)" if r["diverged"] else "") for r in found]
        body.append([psi, name, f"{found[-1]['alpha']:.2g}", *cells])
    size = f"n = {two['n']}, d = {two['d']}, {two['steps']} steps"
    bound = table(["Ψ", "rate", "α", *(f"m = {width}" for width in widths)], body)
    return "\n".join(
        [
            f"Theorem 1, random quadratics\n\n{random}",
            f"Theorem 1, digits' MLP along LNGD's directions: model value q, layer-wise / single\n\n{networks}",
            f"Theorem 2, {size}: problems in which the bound holds\n\n{bound}",
        ]
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Theorem 1's gain, Theorem 2's errors at the largest width, and where the bound holds."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    one, two = result["theorem_1"], result["theorem_2"]
    figure = plt.figure(figsize=(11.6, 5.2), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=[1, 1.1, 1.05])
    left, middle = (figure.add_subplot(grid[:, column]) for column in (0, 1))
    ratios, floor = np.array(one["gain_ratios"][::10]), LEAST + 0.3
    random = np.maximum(ratios, floor)
    across = np.linspace(-0.35, 0.35, len(random))
    left.plot(across, random, ".", color="#0f766e", alpha=0.35, markersize=4, markeredgewidth=0)
    networks = one["networks"]
    places = range(1, len(networks) + 1)
    block = [r["layerwise_block"] / abs(r["single_block"]) for r in networks]
    full = [r["layerwise_full"] / abs(r["single_full"]) for r in networks]
    left.plot(places, block, "o", color="#0f766e", markersize=6, label="blocks alone (the theorem)")
    left.plot(places, full, "D", color="#be123c", markersize=6, label="curvature between layers, too")
    left.annotate(f"{(ratios < floor).mean():.0%} lower", (0.45, floor), fontsize=7.5, color="#0f766e", va="center")
    left.axhline(-1, color="#111827", linewidth=1, linestyle="--")
    left.axhline(0, color="#9ca3af", linewidth=0.8)
    left.set_ylim(LEAST, max(10, 1.4 * max(full)))
    names = [f"{r['activation']}, {r['steps']}" for r in networks]
    left.set_xticks(range(len(networks) + 1), ["random", *names], rotation=60, ha="right", fontsize=8)
    left.set_xlabel("random quadratics; activation and steps of the MLP's training", fontsize=9)
    left.set_ylabel("model's change, one best rate = −1", fontsize=9)
    left.set_title("Theorem 1: rates of each layer", fontsize=10.5, loc="left")
    left.legend(frameon=False, fontsize=8, loc="upper right")
    for curve, colour in zip(two["curves"], COLOURS, strict=True):
        errors = np.clip(curve["errors"], 1e-24, 1e6)
        plain = curve["rate"].replace(".", "").isdigit()
        label = f"α = {curve['rate']}" if plain else f"α = {curve['rate'].replace('alpha', 'α')} = {curve['alpha']:.2f}"
        middle.semilogy(errors, color=colour, linewidth=1.8, label=label)
        steps = np.arange(two["steps"] + 1)
        middle.semilogy(np.maximum((1 - curve["alpha"]) ** steps, 1e-24), color=colour, linewidth=0.8, linestyle=":")
    middle.set_ylim(1e-13, 1e7)
    middle.set_xlabel("step k")
    middle.set_ylabel("‖y − v$_k$‖² / ‖y − v$_0$‖² (drawn to 10⁶)", fontsize=9)
    middle.set_title("Theorem 2: errors and their bounds (dotted)", fontsize=10.5, loc="left")
    figure.legend(*middle.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=7)
    for line, psi in enumerate(("dense", "diagonal")):
        _held(figure.add_subplot(grid[line, 2]), two, psi)
    for axis in (left, middle):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _held(axis: Any, two: dict[str, Any], psi: str) -> None:
    """In what share of the problems Theorem 2's bound holds, by rate and width."""
    import numpy as np

    rows = [r for r in two["rows"] if r["psi"] == psi]
    widths, names = sorted({r["width"] for r in rows}), list(dict.fromkeys(r["rate"] for r in rows))
    share = np.array([[next(r["held"] / r["seeds"] for r in rows if (r["rate"], r["width"]) == (name, width))
                       for width in widths] for name in names])  # fmt: skip
    axis.imshow(share, cmap="BuGn", vmin=0, vmax=1.25, aspect="auto")
    for y, x in np.ndindex(share.shape):
        axis.text(x, y, f"{share[y, x]:.0%}", ha="center", va="center", fontsize=8.5)
    axis.set_xticks(range(len(widths)), [str(w) for w in widths])
    axis.set_yticks(range(len(names)), [n.replace("alpha", "α") for n in names], fontsize=8)
    axis.set_ylabel("rate α", fontsize=9)
    axis.set_xlabel(f"width m (n = {two['n']}, d = {two['d']})", fontsize=9)
    axis.set_title(f"{psi} Ψ: bound holds, of {rows[0]['seeds']} problems", fontsize=10, loc="left")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The arguments. ValueError names the one that is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000, help="of random quadratics (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=24, help="n of Theorem 2 (default: %(default)s)")
    parser.add_argument("--inputs", type=int, default=8, help="d of Theorem 2 (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 1024, 4096, 16384], help="m, rising")
    parser.add_argument("--seeds", type=int, default=5, help="problems a width (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of each run (default: %(default)s)")
    parser.add_argument(
        "--training", type=int, nargs="+", default=[0, 100, 300, 1000], help="steps of Theorem 1's MLPs"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of convergence.json and .png")
    args = parser.parse_args(arguments)
    for name in ("count", "inputs", "seeds", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}: got {getattr(args, name)}, accepted: at least 1")
    if args.samples < args.inputs:
        raise ValueError(f"--samples: got {args.samples}, accepted: at least --inputs = {args.inputs}, X has full rank")
    if min(args.widths) < args.samples:
        raise ValueError(f"--widths: got {min(args.widths)}, accepted: at least --samples = {args.samples}")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Runs both, writes the JSON file and the picture, prints the tables."""
    args = parse(arguments)
    result = {
        "theorem_1": theorem_1(args.count, 0, tuple(args.training)),
        "theorem_2": theorem_2(args.samples, args.inputs, sorted(args.widths), args.seeds, args.steps),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    kept = {**result, "theorem_1": {k: v for k, v in result["theorem_1"].items() if k != "gain_ratios"}}
    (args.output / "convergence.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    draw(result, args.output / "convergence.png")
    print(report(result))
    print(f"written: convergence.json, convergence.png in {args.output}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, OSError) as problem:
        sys.exit(f"error: {problem}")
