"""Multilingual tokenizers: languages are set, the decoder begins as the model expects, unknown ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import M2M100Tokenizer, MBart50Tokenizer, NllbTokenizer

from hf_lngd.integrations.translation_model import set_languages
from hf_lngd.integrations.usage import UsageError
from tests.hf_helpers import hf_mbart_tokenizer, hf_pairs, hf_seq2seq_model, hf_tokenizer


def m2m100_tokenizer(folder: Path) -> Any:
    """M2M100's own class needs a sentencepiece model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text, prefix = folder / "text.txt", folder / "pieces"
    text.write_text("\n".join(line for pair in hf_pairs(200) for line in pair.values()), encoding="utf-8")
    ids = {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3, "vocab_size": 60, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(prefix), minloglevel=2, **ids)
    pieces = sentencepiece.SentencePieceProcessor(f"{prefix}.model")
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return M2M100Tokenizer(str(folder / "vocab.json"), f"{prefix}.model")


# tokenizer, family, languages, the target language's token, whether the target begins with it
KINDS: dict[str, tuple[Any, str, str, str, str, bool]] = {
    "mbart": (lambda folder: hf_mbart_tokenizer(), "mbart", "en_XX", "de_DE", "de_DE", False),
    "mbart50": (lambda folder: MBart50Tokenizer(), "mbart", "en_XX", "de_DE", "de_DE", True),
    "nllb": (lambda folder: NllbTokenizer(), "m2m100", "eng_Latn", "deu_Latn", "deu_Latn", True),
    "m2m100": (m2m100_tokenizer, "m2m100", "en", "de", "__de__", True),
}


def languages(source: str, target: str, **more: Any) -> Any:
    return SimpleNamespace(**{"source_lang": source, "target_lang": target, "forced_bos_token": None, **more})


@pytest.mark.parametrize("kind", list(KINDS))
def test_both_sides_get_their_language(kind: str, tmp_path: Path) -> None:
    make, family, source, target, token, in_front = KINDS[kind]
    tokenizer = make(tmp_path)
    model = hf_seq2seq_model(family, tokenizer, decoder_start_token_id=None)
    set_languages(model, tokenizer, languages(source, target, source_prefix=""))
    number = tokenizer.convert_tokens_to_ids(token)
    labels = tokenizer(text_target="Hund")["input_ids"]
    assert number != tokenizer.unk_token_id and number in labels
    assert number not in tokenizer("the dog")["input_ids"]
    start = model.config.decoder_start_token_id
    assert model.generation_config.decoder_start_token_id == start
    if in_front:
        assert (start, model.generation_config.forced_bos_token_id) == (tokenizer.eos_token_id, number)
    else:
        assert (start, model.generation_config.forced_bos_token_id) == (number, None)


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_unknown_language_is_refused(kind: str, tmp_path: Path) -> None:
    make, family, source, target, _, _ = KINDS[kind]
    tokenizer = make(tmp_path)
    model = hf_seq2seq_model(family, tokenizer)
    with pytest.raises(UsageError, match="^source_lang: got 'xx', the tokenizer knows: .*"):
        set_languages(model, tokenizer, languages("xx", target))
    with pytest.raises(UsageError, match="^target_lang: got 'xx', the tokenizer knows: .*"):
        set_languages(model, tokenizer, languages(source, "xx"))


def test_a_first_token_of_choice() -> None:
    tokenizer = hf_tokenizer(("__de__",))
    model = hf_seq2seq_model("m2m100", tokenizer)
    set_languages(model, tokenizer, languages("en", "de", forced_bos_token="__de__", source_prefix=None))
    assert model.generation_config.forced_bos_token_id == tokenizer.convert_tokens_to_ids("__de__")


def test_a_decoder_without_a_start_is_refused() -> None:
    tokenizer = hf_tokenizer()
    model = hf_seq2seq_model("mbart", tokenizer)
    with pytest.raises(UsageError, match="decoder_start_token_id: got none"):
        set_languages(model, tokenizer, languages("en", "de", source_prefix=None))
