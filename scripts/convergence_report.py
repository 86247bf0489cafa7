"""Tables and the picture of `check_convergence.py`, from its results alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.tables import table

COLOURS = ("#99f6e4", "#14b8a6", "#0f766e", "#d97706", "#be123c", "#7c3aed", "#c026d3")
LEAST = -6.5  # of the left axis: what is below is at the edge


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
