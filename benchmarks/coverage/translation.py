"""The zoo's translation models: text to text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as CLASSES

from benchmarks.coverage.entry import Entry, Inputs

WORDS = 40


def sentences(source: int = 7, target: int = 6, ids: int = 3) -> Inputs:
    """Random sentences of words above the special ids, half of them padded."""

    def make(rows: int, draw: torch.Generator) -> dict[str, Tensor]:
        words = torch.randint(ids, WORDS, (rows, source), generator=draw)
        labels = torch.randint(ids, WORDS, (rows, target), generator=draw)
        mask = torch.ones_like(words)
        mask[::2, source - 2 :] = 0
        labels[1::2, target - 2 :] = -100
        return {"input_ids": words.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}

    return make


def with_global_attention(rows: int, draw: torch.Generator) -> dict[str, Tensor]:
    """LED's sentences: the first word attends to all, through projections of its own."""
    tensors = sentences(source=8)(rows, draw)
    return {**tensors, "global_attention_mask": (torch.arange(8) == 0).long().repeat(rows, 1)}


def with_decoder_inputs(rows: int, draw: torch.Generator) -> dict[str, Tensor]:
    """FSMT's sentences: it does not make the decoder's input of labels."""
    tensors = sentences()(rows, draw)
    words = tensors["labels"].roll(1, 1).clamp(min=0)
    words[:, 0] = _SPECIAL["eos_token_id"]
    return {**tensors, "decoder_input_ids": words}


_SPECIAL: dict[str, Any] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_BART = {
    **_SPECIAL,
    "vocab_size": WORDS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
}
_FSMT = {name: value for name, value in _BART.items() if name != "vocab_size"}
_T5 = {
    "vocab_size": WORDS,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_GEMMA = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SEAMLESS = {"hidden_size": 16, **{name: value for name, value in _BART.items() if name != "d_model"}}
_BERT = {
    "model_type": "bert",
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
_BERT_DECODER = {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}
_PROPHET = {
    **_SPECIAL,
    "vocab_size": WORDS,
    "hidden_size": 16,
    "encoder_ffn_dim": 24,
    "num_encoder_layers": 2,
    "num_encoder_attention_heads": 2,
    "decoder_ffn_dim": 24,
    "num_decoder_layers": 2,
    "num_decoder_attention_heads": 2,
    "max_position_embeddings": 32,
    "num_buckets": 8,
}
_FSMT_SINGLE = "its causal mask puts float64's smallest number into float32"
_PROPHET_SINGLE = "its softmax is float32, whatever the model is, and its mask overflows there"
_EXPERTS = {"num_experts": 2, "expert_capacity": 64, "router_jitter_noise": 0.0}

# (row, architecture, fields, more of `Entry`)
_ROWS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("bart", "bart", _BART, {}),
    (
        "bigbird_pegasus",
        "bigbird_pegasus",
        {**_BART, "block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 64},
        {"inputs": sentences(source=48)},
    ),
    ("bigbird_pegasus, full attention", "bigbird_pegasus", {**_BART, "attention_type": "original_full"}, {}),
    ("blenderbot", "blenderbot", _BART, {}),
    ("blenderbot-small", "blenderbot-small", _BART, {}),
    (
        "encoder-decoder, BERT to BERT",
        "encoder-decoder",
        {
            "encoder": _BERT,
            "decoder": {**_BERT, **_BERT_DECODER},
            "pad_token_id": 0,
            "decoder_start_token_id": 1,
        },
        {
            "rests": (r"encoder\.pooler", "BERT's pooler, whose output no decoder reads"),
            "full": {"encoder": {"model_type": "bert"}, "decoder": _BERT_DECODER},
        },
    ),
    (
        "fsmt",
        "fsmt",
        {**_FSMT, "src_vocab_size": WORDS, "tgt_vocab_size": WORDS},
        {"single": _FSMT_SINGLE, "inputs": with_decoder_inputs},
    ),
    (
        "led",
        "led",
        {**_BART, "attention_window": 4, "max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32},
        {"inputs": with_global_attention},
    ),
    ("longt5", "longt5", {**_T5, "local_radius": 3}, {}),
    (
        "longt5, transient global",
        "longt5",
        {**_T5, "local_radius": 3, "global_block_size": 4, "encoder_attention_type": "transient-global"},
        {"inputs": sentences(source=8)},
    ),
    ("m2m_100", "m2m_100", _BART, {}),
    ("m2m_100, NLLB", "m2m_100", {**_BART, "scale_embedding": True, "activation_function": "relu"}, {}),
    ("marian", "marian", {**_BART, "decoder_vocab_size": WORDS, "activation_function": "swish"}, {}),
    ("mbart", "mbart", _BART, {}),
    ("mt5", "mt5", {**_T5, **_GATED}, {}),
    ("mvp", "mvp", _BART, {}),
    (
        "nllb-moe",
        "nllb-moe",
        {**_BART, "num_experts": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "moe_token_dropout": 0.0},
        {},
    ),
    ("pegasus", "pegasus", _BART, {}),
    ("pegasus_x", "pegasus_x", {**_BART, "block_size": 4, "num_global_tokens": 2}, {"inputs": sentences(source=8)}),
    ("plbart", "plbart", _BART, {}),
    ("prophetnet", "prophetnet", _PROPHET, {"single": _PROPHET_SINGLE}),
    ("seamless_m4t", "seamless_m4t", _SEAMLESS, {}),
    ("seamless_m4t_v2", "seamless_m4t_v2", _SEAMLESS, {}),
    (
        "switch_transformers",
        "switch_transformers",
        {**_T5, **_EXPERTS, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        {},
    ),
    ("t5", "t5", _T5, {}),
    ("t5, gated (v1.1)", "t5", {**_T5, **_GATED}, {}),
    (
        "t5gemma",
        "t5gemma",
        {"encoder": _GEMMA, "decoder": _GEMMA, "vocab_size": WORDS},
        {},
    ),
    ("umt5", "umt5", {**_T5, **_GATED}, {}),
]

_SPEECH = "speech to text"
ABSENT_TRANSLATION = {
    **dict.fromkeys(
        (
            "audioflamingo3",
            "glmasr",
            "granite_speech",
            "granite_speech_plus",
            "moss_transcribe_diarize",
            "musicflamingo",
            "nemo_speechlm",
            "omniasr",
            "qwen2_audio",
            "qwen3_asr",
            "vibevoice_asr",
            "voxtral",
            "voxtral_realtime",
        ),
        f"no text to text: {_SPEECH}",
    ),
    "t5gemma2": "no text to text alone: images and text to text",
}

TRANSLATION: list[Entry] = [
    Entry(name, architecture, str(CLASSES.get(architecture)), fields, **{"inputs": sentences(), **more})
    for name, architecture, fields, more in _ROWS
]
