"""How Gaussian a layer's outputs are: histograms, norms, quantiles, skewness and excess kurtosis.

    python -m benchmarks.theory.plot_gaussianity

LNGD gives each layer the predictive distribution N(φ(s), I) (Liu et al., NeurIPS 2024, which shows such
histograms in its figure 6). Looked at are, on 14 × 14 digits: the middle layer of the MLP of `plot_fisher.py`, a
convolution, and the first feed-forward layer of a small vision transformer's last block; each before and after its
activation, and the norms ‖s‖ and ‖φ(s)‖ of the output vector of one position.

What is tested is the distribution over images and positions, pooled over a layer's units and brought to mean 0 and
variance 1, as in the paper; the mean of |skewness| and |excess kurtosis| over single units stands beside it. Neither is
what N(φ(s), I) says: that is a distribution given an input, which no histogram over inputs can prove.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.report.tables import table
from benchmarks.theory import digits

RESULTS = Path(__file__).resolve().parents[1] / "results"
QUANTILES = 199
BINS, REACH, TOP = 81, 4.0, 1.0  # of the histograms: edges, standard deviations, density
PRE, POST = "#0f766e", "#d97706"


@dataclass(frozen=True)
class Subject:
    """A model and where to look: the layer and the activation after it."""

    title: str
    model: nn.Module
    layer: nn.Module
    activation: nn.Module


def mlp(seed: int) -> Subject:
    """The middle layer of the MLP."""
    model = digits.make_mlp("tanh", seed)
    return Subject("MLP 20 → 20, tanh", model, model[3], model[4])


def convolution(seed: int) -> Subject:
    """The second of three convolutions."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, digits.CLASSES),
    ).double()
    return Subject("convolution 16 → 32, ReLU", model, model[2], model[3])


def transformer(seed: int) -> Subject:
    """fc1 of the last block of a ViT of two."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=digits.SIDE,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=digits.CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = ViTForImageClassification(config).double()
    wide = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == config.intermediate_size]
    activations = [m for m in model.modules() if type(m).__name__ == "GELUActivation"]
    return Subject("ViT fc1 32 → 128, GELU", model, wide[-1], activations[-1])


SUBJECTS: dict[str, Callable[[int], Subject]] = {"mlp": mlp, "convolution": convolution, "transformer": transformer}


def standardized(x: Tensor) -> Tensor:
    """Mean 0, variance 1 (of the numbers given): [n] → [n]. ValueError where they are all alike."""
    deviation = x.std(correction=0)
    if not deviation > 0:
        raise ValueError("outputs: got one value throughout, accepted: a layer that is alive")
    return (x - x.mean()) / deviation


def moments(x: Tensor) -> dict[str, float]:
    """Skewness E z³ and excess kurtosis E z⁴ − 3 of the standardised numbers; both 0 for a Gaussian."""
    z = standardized(x)
    return {"skewness": float(z.pow(3).mean()), "excess_kurtosis": float(z.pow(4).mean() - 3)}


def unit_moments(x: Tensor) -> dict[str, float]:
    """Mean of |skewness| and of |excess kurtosis| over units: [n, units]. Units that never change are left out."""
    each = [moments(column) for column in x.unbind(1) if column.std(correction=0) > 0]
    return {
        "skewness": sum(abs(e["skewness"]) for e in each) / len(each),
        "excess_kurtosis": sum(abs(e["excess_kurtosis"]) for e in each) / len(each),
        "units": len(each),
    }


def normal_quantiles(count: int) -> Tensor:
    """Those of N(0, 1) at (i − ½)/count."""
    p = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.special.ndtri(p)


def quantiles(x: Tensor, count: int) -> Tensor:
    """Those of the standardised numbers at the same places."""
    places = (np.arange(count) + 0.5) / count
    return torch.from_numpy(np.quantile(standardized(x).numpy(), places, method="hazen"))


def describe(seen: digits.Seen) -> dict[str, Any]:
    """Moments of one layer's outputs, pooled, by unit, and of their norms."""
    row: dict[str, Any] = {"positions": len(seen.pre), "units": seen.pre.shape[1]}
    for name, value in (("pre", seen.pre), ("post", seen.post)):
        row[name] = {
            "pooled": moments(value.flatten()),
            "by_unit": unit_moments(value),
            "norm": moments(value.norm(dim=1)),
            "zeros": float((value == 0).double().mean()),
        }
    return row


def draw(seen: dict[str, tuple[Subject, digits.Seen]], path: Path) -> None:
    """A row of panels a layer: outputs before and after the activation, norms, quantiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(seen), 4, figsize=(10.6, 2.55 * len(seen)), layout="constrained", squeeze=False)
    normal = normal_quantiles(QUANTILES)
    for row, (subject, found) in zip(axes, seen.values(), strict=True):
        values = (found.pre.flatten(), found.post.flatten(), found.pre.norm(dim=1), found.post.norm(dim=1))
        before, after, norm, post_norm = values
        _histogram(row[0], [(before, PRE, "s")])
        _histogram(row[1], [(after, POST, "φ(s)")])
        _histogram(row[2], [(norm, PRE, "‖s‖"), (post_norm, POST, "‖φ(s)‖")])
        row[3].plot([-3, 3], [-3, 3], color="#111827", linewidth=0.9, linestyle="--")
        for value, colour, label, style in (
            (before, PRE, "s", "-"),
            (after, POST, "φ(s)", "-"),
            (norm, PRE, "‖s‖", ":"),
        ):
            row[3].plot(normal, quantiles(value, QUANTILES), style, color=colour, linewidth=1.7, label=label)
        row[3].legend(frameon=False, fontsize=8, loc="upper left")
        row[3].set_ylim(-4, 4)
        row[0].set_ylabel(f"{subject.title}\ndensity", fontsize=9)
        row[3].set_ylabel("quantile, standard deviations", fontsize=8.5)
        for axis in row:
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
    titles = ("before the activation, s", "after it, φ(s)", "norms over the units", "quantiles against a Gaussian's")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10.5, loc="left")
    for axis in axes[-1, :3]:
        axis.set_xlabel("standard deviations from the mean", fontsize=8.5)
    axes[-1, 3].set_xlabel("Gaussian quantile", fontsize=8.5)
    figure.suptitle(
        "Outputs of trained layers over inputs, standardised, beside N(0, 1) (dashed)", fontsize=11, x=0.01, ha="left"
    )
    figure.savefig(path, dpi=125)
    plt.close(figure)


def _histogram(axis: Any, parts: list[tuple[Tensor, str, str]]) -> None:
    """Densities of standardised values beside N(0, 1)'s, on one scale, above which a spike's height is written."""
    edges = torch.linspace(-REACH, REACH, BINS, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    highest = 0.0
    for place, (value, colour, label) in enumerate(parts):
        z = standardized(value)
        density = torch.histogram(z, edges).hist / (len(z) * (edges[1] - edges[0]))
        highest = max(highest, float(density.max()))
        axis.stairs(density, edges, fill=place == 0, color=colour, alpha=0.55 if place == 0 else 1, label=label)
        shape = moments(value)
        axis.text(
            0.99,
            0.97 - 0.17 * place,
            f"{label}: skewness {shape['skewness']:+.2f}\nexcess kurtosis {shape['excess_kurtosis']:+.2f}",
            transform=axis.transAxes,
            ha="right",
            va="top",
            fontsize=8,
            color=colour,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
        )
    axis.plot(middle, (-(middle**2) / 2).exp() / (2 * torch.pi) ** 0.5, color="#111827", linewidth=1.2, linestyle="--")
    axis.set_ylim(0, TOP)
    axis.set_xlim(-REACH, REACH)
    axis.set_yticks([0, 0.4, 0.8])
    if highest > TOP:
        axis.text(0.02, 0.97, f"↑ to {highest:.1f}", transform=axis.transAxes, fontsize=8, va="top")


def moment_table(rows: dict[str, dict[str, Any]]) -> str:
    """Moments in Markdown."""
    pooled = "skewness, excess kurtosis: pooled"
    head, body = ["layer", "output", pooled, "mean of absolute values over units", "of the norm"], []
    for row in rows.values():
        for name, text in (("pre", "s"), ("post", "φ(s)")):
            cells = [
                f"{row[name][kind]['skewness']:+.2f}, {row[name][kind]['excess_kurtosis']:+.2f}"
                for kind in ("pooled", "by_unit", "norm")
            ]
            body.append([row["title"], text, *cells])
    return table(head, body)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The arguments. ValueError names the one that is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of training before the look (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--layers", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS), help="default: all")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of gaussianity.json and .png")
    args = parser.parse_args(arguments)
    if args.steps < 0:
        raise ValueError(f"--steps: got {args.steps}, accepted: at least 0")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Trains each model, looks, writes the JSON file and the picture, prints the table."""
    args = parse(arguments)
    x, y = digits.load()
    found, rows = {}, {}
    for name in args.layers:
        subject = SUBJECTS[name](args.seed)
        accuracy = digits.train(subject.model, x, y, args.steps, args.seed)
        seen = digits.observe(subject.model, subject.layer, subject.activation, x)
        found[name] = subject, seen
        rows[name] = {"title": subject.title, "steps": args.steps, "accuracy": round(accuracy, 4), **describe(seen)}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "gaussianity.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    draw(found, args.output / "gaussianity.png")
    print(moment_table(rows))
    print(f"written: gaussianity.json, gaussianity.png in {args.output}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, OSError) as problem:
        sys.exit(f"error: {problem}")
