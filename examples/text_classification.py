"""Text classification with `LNGDTrainer`: a Trainer's script in which two names are others.

python examples/text_classification.py
"""

from __future__ import annotations

import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from hf_lngd import LNGDTrainer, LNGDTrainingArguments

SIZES = {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32}


def make_data(texts: int = 512, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Texts of random tokens; the class says whether the first one is among the first half of the vocabulary."""
    tokens = torch.randint(0, 40, (texts, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": (row[0] < 20).long()} for row in tokens]


def main(folder: str = "runs/text_classification") -> list[float]:
    """The losses that were logged."""
    torch.manual_seed(0)
    model = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=40, num_labels=2, dropout=0.0, **SIZES))
    args = LNGDTrainingArguments(
        output_dir=folder,
        learning_rate=5e-3,
        max_steps=32,
        per_device_train_batch_size=64,
        logging_steps=4,
        save_strategy="no",
        report_to="none",
    )
    trainer = LNGDTrainer(model, args, train_dataset=make_data())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    losses = main()
    print(f"loss: first {losses[0]:.3f}, last {losses[-1]:.3f}")
