"""LNGD in a LightningModule: `configure_optimizers` makes it of the module itself.

pip install pytorch-lightning
python examples/lightning_module.py
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from hf_lngd import LNGD


class Classifier(lightning.LightningModule):
    """Two layers over 20 numbers; the class is the sign of the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 4))
        self.losses: list[float] = []

    def training_step(self, batch: Any, number: int) -> Any:
        """The loss of a batch."""
        loss = cross_entropy(self.layers(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        """LNGD, and a schedule that is stepped after each batch."""
        optimizer = LNGD(self, lr=3e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> list[float]:
    """The losses of 24 steps."""
    torch.manual_seed(0)
    inputs = torch.randn(768, 20)
    labels = (inputs[:, 0] > 0) + 2 * (inputs[:, 1] > 0)
    model = Classifier()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_steps=24, accelerator="cpu", devices=1, **quiet)
    trainer.fit(model, DataLoader(TensorDataset(inputs, labels), batch_size=32))
    return model.losses


if __name__ == "__main__":
    losses = main()
    print(f"loss: first {losses[0]:.3f}, last {losses[-1]:.3f}")
