"""Tiny models, tokenizers and data: all made here, nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers import PreTrainedTokenizerFast as Fast

WORDS = tuple("the a dog cat bird house tree book sees has wants knows and not old new red blue big small".split())  # noqa: SIM905
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "learning_rate": 0.01,
    "per_device_train_batch_size": 4,
    "optim": "lngd",
}


def tokenizer() -> Fast:
    """Words of `WORDS`."""
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<pad>", "</s>", "<unk>", "<s>", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator([" ".join(WORDS)], trainers.WordLevelTrainer(special_tokens=special))
    found = Fast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>",
        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", model_max_length=32,
    )  # fmt: skip
    found.chat_template = TEMPLATE
    return found


def sentence(number: int, length: int = 5) -> str:
    """Some words, others for another number."""
    return " ".join(WORDS[(number * 7 + i * (number % 3 + 1)) % len(WORDS)] for i in range(length))


def llama(folder: Path, classes: int | None = None) -> Any:
    """A causal language model, or one that scores sequences, read from a folder: trl loads it there again."""
    torch.manual_seed(0)
    words = tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id}
    config = LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **sizes, **ids)
    config.num_labels = classes or 2
    kind: Any = LlamaForCausalLM if classes is None else LlamaForSequenceClassification
    if not folder.exists():  # processes share it, of which the first one alone may write
        kind(config).save_pretrained(folder)
    return kind.from_pretrained(folder, dtype=torch.float32)


def bert(folder: Path) -> str:
    """The folder of an encoder with its tokenizer."""
    torch.manual_seed(0)
    words = tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if not folder.exists():  # as above
        BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes, **off)).save_pretrained(folder)
        words.save_pretrained(folder)
    torch.manual_seed(0)  # what is drawn next is the same in both cases
    return str(folder)


def table(count: int = 16, **columns: Any) -> Dataset:
    """Columns of `count` rows, each made by a function of the row's number."""
    return Dataset.from_dict({name: [make(i) for i in range(count)] for name, make in columns.items()})


def moved(before: dict[str, torch.Tensor], after: Any) -> set[str]:
    """The parameters that are not as they were."""
    return {name for name, p in after.named_parameters() if not torch.equal(before[name], p)}


def weights(module: Any) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}
