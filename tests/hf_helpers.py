"""Tiny models, tokenizers and data for the tests of the Trainer's integrations and scripts."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

NOUNS = {"dog": "Hund", "cat": "Katze", "bird": "Vogel", "house": "Haus", "tree": "Baum", "book": "Buch"}
VERBS = {"sees": "sieht", "has": "hat", "wants": "will", "knows": "kennt"}
PAD, EOS, UNK, START = "<pad>", "</s>", "<unk>", "<s>"


def hf_pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Sentence pairs of unlike lengths that a small model can learn."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        nouns = [draw.choice(list(NOUNS)) for _ in range(draw.randint(2, 5))]
        verb = draw.choice(list(VERBS))
        pairs.append(
            {
                "en": f"the {nouns[0]} {verb} " + " and ".join(f"the {noun}" for noun in nouns[1:]),
                "de": f"{NOUNS[nouns[0]]} {VERBS[verb]} " + " und ".join(NOUNS[noun] for noun in nouns[1:]),
            }
        )
    return pairs


def hf_write_pairs(path: Path, pairs: list[Any]) -> Path:
    """JSON lines in the schema of the Hub's WMT data; a text is written as it is."""
    lines = [pair if isinstance(pair, str) else json.dumps({"translation": pair}) for pair in pairs]
    text = "".join(f"{line}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def hf_tokenizer(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A word tokenizer that closes sentences with </s>, trained on `hf_pairs`."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=[PAD, EOS, UNK, START, *extra])
    tokenizer.train_from_iterator((text for pair in hf_pairs(200) for text in pair.values()), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK, model_max_length=64
    )


def hf_mbart_tokenizer() -> MBartTokenizer:
    """mBART's own tokenizer class over a tiny vocabulary."""
    words = sorted({word for pair in hf_pairs(200) for text in pair.values() for word in text.split()})
    vocabulary = [(START, 0.0), (PAD, 0.0), (EOS, 0.0), (UNK, 0.0), ("▁", -4.0)]
    vocabulary += [(f"▁{word}", -1.0) for word in words]
    return MBartTokenizer(vocab=vocabulary, src_lang="en_XX", tgt_lang="de_DE")


SIZES = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}


T5_SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
# Configuration, model, the token that a target begins with.
HF_FAMILIES: dict[str, tuple[Any, Any, int | None]] = {
    "marian": (MarianConfig, MarianMTModel, 0),
    "t5": (T5Config, T5ForConditionalGeneration, 0),
    "bart": (BartConfig, BartForConditionalGeneration, 1),
    "mbart": (MBartConfig, MBartForConditionalGeneration, None),
    "m2m100": (M2M100Config, M2M100ForConditionalGeneration, 1),
}


def hf_seq2seq_model(family: str, tokenizer: Any, seed: int = 0, **changes: Any) -> Any:
    """A model of one of `HF_FAMILIES` with some thousand parameters, without dropout."""
    config, model, start = HF_FAMILIES[family]
    fields = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": start}
    fields |= {"eos_token_id": tokenizer.eos_token_id}
    if family == "t5":
        fields |= {**T5_SIZES, "dropout_rate": 0.0}
    else:
        fields |= {**SIZES, "decoder_vocab_size": len(tokenizer), "bos_token_id": None, "forced_eos_token_id": None}
        fields |= {"attention_dropout": 0.0, "activation_dropout": 0.0}
    torch.manual_seed(seed)
    return model(config(**{**fields, **changes}))


def hf_vit(seed: int = 0, **changes: Any) -> ViTForImageClassification:
    """A ViT for 8 × 8 images of 3 classes."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    image = {"image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": 3}
    return ViTForImageClassification(ViTConfig(**{**sizes, **image, "hidden_dropout_prob": 0.0, **changes}))


def hf_vit_attention() -> list[str]:
    """What a ViT's queries, keys and values are called, which are others in transformers of before."""
    names = {name.rpartition(".")[2] for name, _ in hf_vit().named_modules()}
    return [name for name in ("q_proj", "k_proj", "v_proj", "query", "key", "value") if name in names]


def hf_images(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """Noise images 8 × 8 with labels of 3 classes."""
    pixels = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return [{"pixel_values": pixels[i], "labels": i % 3} for i in range(count)]


def hf_encoded(tokenizer: Any, pairs: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Tokenized pairs, unpadded."""
    return [
        {
            "input_ids": tokenizer(pair["en"])["input_ids"],
            "attention_mask": tokenizer(pair["en"])["attention_mask"],
            "labels": tokenizer(text_target=pair["de"])["input_ids"],
        }
        for pair in pairs
    ]
