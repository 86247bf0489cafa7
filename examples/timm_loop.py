"""A training loop of one's own, here with a model of timm: LNGD takes the model in place of its parameters.

pip install timm
python examples/timm_loop.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_lngd import LNGD


def make_data(images: int = 256, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Noise [images, 3, 32, 32] with one brighter channel, and which one that is [images]."""
    labels = torch.arange(images) % classes
    noise = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return noise + nn.functional.one_hot(labels, 3)[:, :, None, None], labels


def make_model() -> nn.Module:
    """A small vision transformer with random weights."""
    import timm

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes)


def train(model: nn.Module, steps: int = 24, batch: int = 32) -> list[float]:
    """The losses of so many steps."""
    images, labels = make_data()
    optimizer = LNGD(model, lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    print(optimizer.routing_table())
    losses = []
    for step in range(steps):
        rows = torch.arange(step * batch, (step + 1) * batch) % len(images)
        loss = cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    losses = train(make_model())
    print(f"loss: first {losses[0]:.3f}, last {losses[-1]:.3f}")
