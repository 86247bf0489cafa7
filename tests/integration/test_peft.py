"""PEFT's adapters under the Trainer: saved and resumed, and however a batch is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq

from hf_lngd import LNGD, LNGDSeq2SeqTrainer, LNGDSeq2SeqTrainingArguments, LNGDTrainer, LNGDTrainingArguments
from hf_lngd.integrations.trainer import lngd_of
from tests.hf_helpers import hf_encoded, hf_images, hf_pairs, hf_seq2seq_model, hf_tokenizer, hf_vit, hf_vit_attention

T = "SEQ_2_SEQ_LM"
ADAPTERS = {
    "lora": LoraConfig(task_type=T, target_modules=["q_proj", "v_proj"], r=4),
    "prompt_tuning": PromptTuningConfig(task_type=T, num_virtual_tokens=3, num_layers=1),
    "prefix_tuning": PrefixTuningConfig(task_type=T, num_virtual_tokens=3, num_layers=1),
}
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": 4,
    "logging_steps": 1,
    "learning_rate": 0.01,
    "train_sampling_strategy": "sequential",
}


def image_trainer(folder: Path, **values: Any) -> LNGDTrainer:
    base = hf_vit()
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=hf_vit_attention(), modules_to_save=["classifier"], lora_dropout=0.1)
    model = get_peft_model(base, config)
    args = LNGDTrainingArguments(str(folder), **{**SETTINGS, "save_steps": 2, **values})
    return LNGDTrainer(model, args, train_dataset=hf_images(32))


def test_adapters_are_saved_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    whole = image_trainer(tmp_path, optim_args="factor_interval=3")
    whole.train()
    saved = tmp_path / "checkpoint-2"
    assert (saved / "adapter_model.safetensors").is_file() and not (saved / "model.safetensors").exists()
    rest = image_trainer(tmp_path, optim_args="factor_interval=3")
    rest.train(resume_from_checkpoint=str(saved))
    theirs = rest.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    assert isinstance(lngd_of(rest.optimizer), LNGD)


@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_translation_steps_alike_however_a_batch_is_split(kind: str, tmp_path: Path) -> None:
    found = []
    for batch, accumulated in ((8, 1), (2, 4)):
        tokenizer = hf_tokenizer()
        base = hf_seq2seq_model("marian", tokenizer).double()
        torch.manual_seed(1)
        model = get_peft_model(base, ADAPTERS[kind]).double()
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        values = {**SETTINGS, **sizes, "max_steps": 2, "save_strategy": "no", "max_grad_norm": 0.0}
        args = LNGDSeq2SeqTrainingArguments(str(tmp_path), optim_args="factor_interval=1,embedding=fallback", **values)
        trainer = LNGDSeq2SeqTrainer(
            model,
            args,
            train_dataset=hf_encoded(tokenizer, hf_pairs(16)),
            data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
        )
        trainer.train()
        found.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-8)
