"""What the figures of curvature look at: 14 × 14 digits, small networks that learn them, what their layers see.

The digits are scikit-learn's (8 × 8, bundled with it), enlarged bilinearly: nothing is downloaded. Everything is
float64 and seeded, so that a figure can be made again to the last digit on one machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

SIDE, CLASSES, WIDTH = 14, 10, 20
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


@dataclass(frozen=True)
class Seen:
    """What one layer saw and gave at each position: inputs a [N, d], pre-activations s [N, m], outputs φ(s) [N, m]."""

    inputs: Tensor
    pre: Tensor
    post: Tensor


def load() -> tuple[Tensor, Tensor]:
    """All 1,797 images [N, 1, 14, 14] in [0, 1] and their labels [N], in an order drawn once (seed 0).

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as problem:
        raise ImportError("the digits are scikit-learn's: pip install 'hf_lngd[demo]'") from problem
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(digits.images / 16.0)[order].unsqueeze(1)
    return nn.functional.interpolate(images, size=SIDE, mode="bilinear"), torch.from_numpy(digits.target)[order]


def make_mlp(activation: str, seed: int) -> nn.Sequential:
    """196-20-20-20-10 with biases (Xavier, biases zero), float64; modules 1, 3, 5 and 7 are its layers.

    Raises:
        ValueError: an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, accepted: {', '.join(ACTIVATIONS)}")
    sizes = [SIDE * SIDE, WIDTH, WIDTH, WIDTH, CLASSES]
    generator = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = [nn.Flatten()]
    for d, m in zip(sizes, sizes[1:], strict=False):
        layer = nn.Linear(d, m, dtype=torch.float64)
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
        modules += [layer, ACTIVATIONS[activation]()]
    return nn.Sequential(*modules[:-1])


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int, lr: float = 3e-3, batch: int = 64) -> float:
    """Adam on batches drawn with the seed. Returns the share of all images that the model then has right."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        chosen = torch.randint(0, len(x), (batch,), generator=generator)
        loss = nn.functional.cross_entropy(logits_of(model, x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()  # or the last batch's gradients would be added to whoever calls backward next
    with torch.no_grad():
        return float((logits_of(model, x).argmax(-1) == y).double().mean())


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """[N, classes], of a plain module or of a transformers model."""
    output = model(x)
    return output if isinstance(output, Tensor) else output.logits


@torch.no_grad()
def observe(model: nn.Module, layer: nn.Module, activation: nn.Module, x: Tensor) -> Seen:
    """What a layer and the activation after it see of the images x; positions are rows, channels are features."""
    found: dict[str, Tensor] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if module is layer:
            found["inputs"], found["pre"] = args[0], output
        else:
            found["post"] = output

    hooks = [module.register_forward_hook(look) for module in (layer, activation)]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()

    def rows(value: Tensor) -> Tensor:
        value = value.movedim(1, -1) if isinstance(layer, nn.Conv2d) else value
        return value.reshape(-1, value.shape[-1]).double()

    return Seen(rows(found["inputs"]), rows(found["pre"]), rows(found["post"]))
