"""The exact Fisher block of a layer, KFAC's, EKFAC's, TKFAC's and LNGD's approximation of it, and what they miss.

    python -m benchmarks.theory.plot_fisher

The layer is the 20 → 20 one in the middle of an MLP 196-20-20-20-10 on 14 × 14 digits, so its block is 400 × 400
(figures 1 and 5 of Liu et al., NeurIPS 2024). Two exact blocks are shown, and they are not the same matrix:

- **The network's Fisher**, F = E_x E_{c ~ softmax} [(a aᵀ) ⊗ (g gᵀ)], g = ∂(−log p_c)/∂s. Nothing is sampled: per image
  the expectation over the classes is B_n = J_nᵀ (diag p − p pᵀ) J_n, J_n = ∂logits/∂s. KFAC, EKFAC and TKFAC
  approximate it.
- **The layer-wise Fisher**, F_l = E_x[(a aᵀ) ⊗ diag(φ'(s)²)]: of the predictive distribution N(φ(s), I) that LNGD gives
  each layer, g = −φ'(s) ⊙ ε, ε integrated out. LNGD approximates this one, and knows nothing of the layers above.

LNGD's matrix is compared with F_l as it is, and with F after it was multiplied by tr F / tr F_l: the two differ in
scale, which a learning rate takes up. `shape error` is the relative error at the multiple that fits best, √(1 − cos²).

Rows and columns are vec(W) by columns: entry (j, i) is the weight from input j to output i, so Φ ⊗ Ψ is `kron(Φ, Ψ)`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report.tables import table
from benchmarks.theory import digits

LAYER = 3  # of digits.make_mlp's modules: 20 → 20
RESULTS = Path(__file__).resolve().parents[1] / "results"
LEVELS = 48  # of the colour scale
NAMES = {"kfac": "KFAC", "ekfac": "EKFAC", "tkfac": "TKFAC", "lngd": "LNGD"}


def kronecker_mean(left: Tensor, right: Tensor) -> Tensor:
    """E_n[L_n ⊗ R_n]: left [N, d, d], right [N, m, m] → [d·m, d·m]."""
    n, d, m = left.shape[0], left.shape[-1], right.shape[-1]
    pairs = left.reshape(n, -1).mT @ right.reshape(n, -1) / n
    return pairs.reshape(d, d, m, m).transpose(1, 2).reshape(d * m, d * m)


def outer(a: Tensor) -> Tensor:
    """a aᵀ of each row: [N, d] → [N, d, d]."""
    return a[:, :, None] * a[:, None, :]


def class_fisher(model: nn.Sequential, s: Tensor) -> Tensor:
    """B_n = J_nᵀ (diag p − p pᵀ) J_n of the modules after LAYER, exact: s [N, m] → [N, m, m]."""
    rest = model[LAYER + 1 :]

    def both(row: Tensor) -> tuple[Tensor, Tensor]:
        logits = rest(row)
        return logits, logits

    jacobian, logits = torch.func.vmap(torch.func.jacrev(both, has_aux=True))(s)
    p = logits.detach().softmax(-1)
    covariance = torch.diag_embed(p) - outer(p)
    return (jacobian.mT @ covariance @ jacobian).detach()


def slopes(model: nn.Sequential, s: Tensor) -> Tensor:
    """φ'(s) of the activation after LAYER: [N, m]."""
    activation = model[LAYER + 1]
    return torch.func.vmap(torch.func.vmap(torch.func.grad(activation)))(s).detach()


def kfac(a: Tensor, b: Tensor) -> Tensor:
    """A ⊗ B, A = E[a aᵀ], B = E[g gᵀ] (Martens and Grosse 2015): a [N, d], b = E_c[g gᵀ] of each sample [N, m, m]."""
    return torch.kron(outer(a).mean(0), b.mean(0))


def ekfac(a: Tensor, b: Tensor) -> Tensor:
    """KFAC's eigenvectors U with eigenvalues E[(U_Bᵀ ∇_n U_A)²] = diag(Uᵀ F U) (George et al. 2018)."""
    basis = torch.kron(torch.linalg.eigh(outer(a).mean(0))[1], torch.linalg.eigh(b.mean(0))[1])
    exact = kronecker_mean(outer(a), b)
    return (basis * ((exact @ basis) * basis).sum(0)) @ basis.mT


def tkfac(a: Tensor, b: Tensor) -> Tensor:
    """δ P ⊗ Q with tr P = tr Q = 1 and δ = tr F: P ∝ E[a aᵀ ‖g‖²], Q ∝ E[‖a‖² g gᵀ] (Gao et al. 2021)."""
    size_a, size_g = a.square().sum(-1), b.diagonal(dim1=-2, dim2=-1).sum(-1)
    delta = (size_a * size_g).mean()
    p = (outer(a) * size_g[:, None, None]).mean(0) / delta
    q = (b * size_a[:, None, None]).mean(0) / delta
    return delta * torch.kron(p, q)


def lngd(a: Tensor, g2: Tensor) -> Tensor:
    """Φ ⊗ diag Ψ (Eq. 4 and 5 of Liu et al.): g2 = φ'(s)² [N, m]. tr Ψ = 1."""
    size_a, size_g = a.square().sum(-1), g2.sum(-1)
    phi = (outer(a) * size_g[:, None, None]).mean(0)
    psi = (size_a[:, None] * g2).mean(0) / (size_a * size_g).mean()
    return torch.kron(phi, psi.diag())


def errors(exact: Tensor, approximation: Tensor) -> dict[str, float]:
    """How far off: relative Frobenius, the same at the best multiple, relative trace error (signed)."""
    norm, own = exact.norm(), approximation.norm()
    cosine = (exact * approximation).sum() / (norm * own)
    return {
        "relative_frobenius": float((approximation - exact).norm() / norm),
        "shape_error": float((1 - cosine.square()).clamp_min(0).sqrt()),
        "trace_error": float(approximation.trace() / exact.trace() - 1),
    }


def blocks(model: nn.Sequential, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the network's Fisher and its approximations, the layer-wise Fisher and its approximations), each with "exact".

    In the first, ``lngd`` is LNGD's matrix times tr F / tr F_l.
    """
    seen = digits.observe(model, model[LAYER], model[LAYER + 1], x)
    a, b = seen.inputs, class_fisher(model, seen.pre)
    g2 = slopes(model, seen.pre).square()
    network = {"exact": kronecker_mean(outer(a), b), "kfac": kfac(a, b), "ekfac": ekfac(a, b), "tkfac": tkfac(a, b)}
    own = torch.diag_embed(g2)
    layerwise = {"exact": kronecker_mean(outer(a), own), "kfac": kfac(a, own), "ekfac": ekfac(a, own)}
    layerwise |= {"tkfac": tkfac(a, own), "lngd": lngd(a, g2)}
    network["lngd"] = layerwise["lngd"] * (network["exact"].trace() / layerwise["exact"].trace())
    return network, layerwise


def measure(activation: str, steps: int, seed: int) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Trains, computes both families of blocks: (a row of results, network's, layer-wise)."""
    x, y = digits.load()
    model = digits.make_mlp(activation, seed)
    accuracy = digits.train(model, x, y, steps, seed)
    network, layerwise = blocks(model, x)
    raw = float(layerwise["exact"].trace() / network["exact"].trace())
    row = {
        "activation": activation,
        "steps": steps,
        "seed": seed,
        "accuracy": round(accuracy, 4),
        "trace_network": float(network["exact"].trace()),
        "trace_layerwise": float(layerwise["exact"].trace()),
        "trace_ratio": raw,
        "exact_against_each_other": errors(network["exact"], layerwise["exact"] / raw),
        "network": {name: errors(network["exact"], value) for name, value in network.items() if name != "exact"},
        "layerwise": {name: errors(layerwise["exact"], value) for name, value in layerwise.items() if name != "exact"},
    }
    return row, network, layerwise


def error_table(rows: list[dict[str, Any]]) -> str:
    """Errors in Markdown, one line an activation, a training length, an exact block and an approximation."""
    head = ["φ", "steps (accuracy)", "exact block", "approximation", "rel. Frobenius", "shape error", "trace error"]
    body = []
    for row in rows:
        for target, text in (("network", "the network's F"), ("layerwise", "layer-wise F_l")):
            for name, value in row[target].items():
                matched = ", trace matched" if (target, name) == ("network", "lngd") else ""
                found = [f"{value[key]:.3f}" for key in ("relative_frobenius", "shape_error")]
                steps = f"{row['steps']} ({row['accuracy']:.1%})"
                which = [row["activation"], steps, text, NAMES[name] + matched]
                body.append([*which, *found, f"{value['trace_error']:+.1%}"])
    return table(head, body)


def draw(network: dict[str, Tensor], layerwise: dict[str, Tensor], row: dict[str, Any], path: Path, zoom: int) -> None:
    """Magnitudes and absolute errors as pictures, all on one colour scale; `zoom`: so many rows and columns, 0 for all.

    The unit is the mean diagonal entry of the exact block of each row of panels, tr/400.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import PowerNorm

    columns = ["exact", *NAMES]
    figure, axes = plt.subplots(4, 5, figsize=(10.6, 9.5), layout="constrained")
    norm = PowerNorm(0.5, vmin=0, vmax=3)
    image = None
    for top, (found, name) in enumerate(((network, "network's F"), (layerwise, "layer-wise $F_l$"))):
        unit = found["exact"].diagonal().mean()
        for column, key in enumerate(columns):
            upper, lower = axes[2 * top, column], axes[2 * top + 1, column]
            end = zoom or len(found[key])
            shown, missed = found[key], found[key] - found["exact"]
            image = _show(upper, _pooled(shown[:end, :end].abs() / unit), norm)
            title = f"exact: {name}" if key == "exact" else NAMES[key]
            if key == "lngd" and top == 0:
                title += " × tr F / tr $F_l$"
            if key == "tkfac" and top == 1:
                title = "TKFAC (= LNGD here)"
            upper.set_title(title, fontsize=10.5, fontweight="bold" if key in ("exact", "lngd") else None)
            if key == "exact":
                lower.axis("off")
                lower.text(0.5, 0.5, "|approximation − exact|\n→", ha="center", va="center", fontsize=10.5)
                continue
            _show(lower, _pooled(missed[:end, :end].abs() / unit), norm)
            error = row["layerwise" if top else "network"][key]["relative_frobenius"]
            lower.set_title(f"error {error:.2f}" + " (whole block)" * bool(zoom), fontsize=9.5)
    assert image is not None
    bar = figure.colorbar(image, ax=axes, shrink=0.55, aspect=38, pad=0.012, extend="max")
    bar.set_label("|entry|, in units of the exact block's mean diagonal", fontsize=9.5)
    bar.set_ticks([0, 0.05, 0.2, 0.5, 1, 2, 3], labels=["0", "0.05", "0.2", "0.5", "1", "2", "3"])
    part = f"the first {zoom} × {zoom} entries" if zoom else "all 400 × 400 entries, the largest of each 2 × 2"
    figure.suptitle(
        f"Fisher block of a 20 → 20 layer: {part}\n"
        f"(MLP 196-20-20-20-10, {row['activation']}, {row['steps']} steps, {row['accuracy']:.0%} of the digits right)",
        fontsize=11.5,
        x=0.01,
        ha="left",
    )
    save(figure, path, 150 if zoom else 110)  # noise does not compress
    plt.close(figure)


def _colours() -> Any:
    """White for nothing, then magma; few levels, since a picture of noise is large."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    magma = colormaps["magma_r"](np.linspace(0, 1, LEVELS))
    white = np.clip(1 - np.arange(LEVELS) / (LEVELS / 4), 0, 1)[:, None]
    return ListedColormap(magma * (1 - white) + white)


def _pooled(values: Tensor) -> Tensor:
    """The largest of each 2 × 2 entries where there are more than a panel has pixels, so that thin lines stay."""
    if len(values) <= 200:
        return values
    return nn.functional.max_pool2d(values[None], 2, ceil_mode=True)[0]


def _show(axis: Any, values: Tensor, norm: Any) -> Any:
    image = axis.imshow(values.numpy(), cmap=_colours(), norm=norm, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_linewidth(0.5)
    return image


def save(figure: Any, path: Path, dpi: int) -> None:
    """A PNG whose palette is the colour scale and greys: a third of the size, to the eye the same."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    buffer.seek(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = [round(255 * float(part)) for colour in _colours().colors for part in colour[:3]]
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours + [grey for grey in range(0, 240, 5) for _ in range(3)])
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The arguments. ValueError names the one that is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--activation", choices=list(digits.ACTIVATIONS), default="tanh", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=300, help="of training before the picture (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--zoom", type=int, default=40, help="side of the second picture (default: %(default)s)")
    parser.add_argument("--only", action="store_true", help="just this network, not the table over several")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of fisher.json, fisher.png, fisher_zoom.png"
    )
    args = parser.parse_args(arguments)
    if args.steps < 0:
        raise ValueError(f"--steps: got {args.steps}, accepted: at least 0")
    if not 1 <= args.zoom <= digits.WIDTH**2:
        raise ValueError(f"--zoom: got {args.zoom}, accepted: 1 to {digits.WIDTH**2}")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Trains, computes, writes the JSON file and both pictures, prints the table."""
    args = parse(arguments)
    row, network, layerwise = measure(args.activation, args.steps, args.seed)
    rows = [row]
    if not args.only:
        for activation in digits.ACTIVATIONS:
            for steps in sorted({0, args.steps, 10 * args.steps}):
                if (activation, steps) != (args.activation, args.steps):
                    rows.append(measure(activation, steps, args.seed)[0])
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "fisher.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    draw(network, layerwise, row, args.output / "fisher.png", 0)
    draw(network, layerwise, row, args.output / "fisher_zoom.png", args.zoom)
    print(error_table(rows))
    print(f"written: fisher.json, fisher.png, fisher_zoom.png in {args.output}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, OSError) as problem:
        sys.exit(f"error: {problem}")
