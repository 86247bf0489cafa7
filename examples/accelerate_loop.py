"""A loop with Accelerate, gradients accumulated over two batches. Make LNGD before `prepare`, of the bare model.

python examples/accelerate_loop.py
accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 2 examples/accelerate_loop.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import get_linear_schedule_with_warmup

from hf_lngd import create_lngd_optimizer


def main(steps: int = 24) -> list[float]:
    """The losses of so many steps, of two batches each."""
    torch.manual_seed(0)
    inputs = torch.randn(2 * steps * 16, 20)
    labels = (inputs[:, 0] > 0) + 2 * (inputs[:, 1] > 0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model: nn.Module = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 4))
    optimizer = create_lngd_optimizer(model, lr=3e-2)
    schedule = get_linear_schedule_with_warmup(optimizer, 4, steps)
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=16)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    losses = []
    for batch, classes in loader:
        with accelerator.accumulate(model):
            loss = cross_entropy(model(batch), classes)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss: first {losses[0]:.3f}, last {losses[-1]:.3f}")
