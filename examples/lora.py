"""LoRA with peft and `LNGDTrainer`: A and B are linear layers, and LNGD takes them; what is frozen it leaves alone.

pip install peft
python examples/lora.py
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lngd import LNGDTrainer, LNGDTrainingArguments

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_data(texts: int = 256, length: int = 16) -> list[dict[str, torch.Tensor]]:
    """Texts of tokens that count upwards, each from a place of its own."""
    starts = torch.arange(texts)[:, None] * 7
    tokens = (starts + torch.arange(length)) % 32
    return [{"input_ids": row, "labels": row} for row in tokens]


def main(folder: str = "runs/lora") -> list[float]:
    """The losses that were logged."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **SIZES))  # yours: from_pretrained("…")
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    args = LNGDTrainingArguments(
        output_dir=folder,
        learning_rate=1e-2,
        max_steps=32,
        per_device_train_batch_size=32,
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
