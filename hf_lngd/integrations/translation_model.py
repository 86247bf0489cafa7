"""The model and the tokenizer of a translation run, and what their languages ask for."""

from __future__ import annotations

import difflib
from typing import Any

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging

from .script_model import LOAD_ERRORS, hub_options, load_config, make_model
from .translation_args import DataArguments, ModelArguments
from .usage import UsageError

logger = logging.get_logger(__name__)


def load_tokenizer(args: ModelArguments) -> Any:
    """The tokenizer.

    Raises:
        UsageError: it cannot be loaded, or has no padding token.
    """
    field = "tokenizer_name" if args.tokenizer_name else "model_name_or_path"
    name = args.tokenizer_name or args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=args.use_fast_tokenizer, **hub_options(args))
    except LOAD_ERRORS as error:
        raise UsageError(field, f"got {name!r}, from which no tokenizer can be loaded: {error}") from error
    if tokenizer.pad_token_id is None:
        raise UsageError(field, f"got {name!r}, accepted: a tokenizer with a padding token")
    return tokenizer


def load_model(args: ModelArguments, tokenizer: Any) -> Any:
    """The model, with `config_overrides`; drawn anew without `model_name_or_path`. Embeddings grow to the tokenizer.

    Raises:
        UsageError: names the argument.
    """
    model = make_model(AutoModelForSeq2SeqLM, args, load_config(args), "translation")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    return model


def set_languages(model: Any, tokenizer: Any, data: DataArguments) -> None:
    """Tell a multilingual tokenizer and the model's generation the languages.

    Raises:
        UsageError: a language or a first token that the tokenizer does not know; no start token for the decoder.
    """
    codes = _codes(tokenizer)
    forced: int | None = None
    if codes:
        for field in ("source_lang", "target_lang"):
            _check_language(field, getattr(data, field), codes)
        tokenizer.src_lang, tokenizer.tgt_lang = data.source_lang, data.target_lang
        target = codes[str(data.target_lang)]
        labels = tokenizer(text_target="a")["input_ids"]
        if labels[0] == target:  # M2M100, mBART-50, NLLB: the decoder's first word is the language
            forced = target
        if model.config.decoder_start_token_id is None:  # mBART starts with the language, the others with </s>
            model.config.decoder_start_token_id = target if forced is None else tokenizer.eos_token_id
    if data.forced_bos_token is not None:
        forced = _token(tokenizer, codes, data.forced_bos_token)
    if forced is not None:
        model.generation_config.forced_bos_token_id = forced
    start = model.config.decoder_start_token_id
    if start is None:
        raise UsageError("config_overrides", "decoder_start_token_id: got none, accepted: the decoder's first token")
    model.generation_config.decoder_start_token_id = start
    if data.source_prefix is None and model.config.model_type in ("t5", "mt5", "umt5"):
        logger.warning("T5 expects a prefix, e.g. --source_prefix 'translate English to German: '")


def _codes(tokenizer: Any) -> dict[str, int]:
    """Language → token number of a multilingual tokenizer; empty for others."""
    if not hasattr(tokenizer, "src_lang"):
        return {}
    known = getattr(tokenizer, "lang_code_to_id", None)
    if known:
        return dict(known)
    special = {str(token): tokenizer.convert_tokens_to_ids(str(token)) for token in tokenizer.all_special_tokens}
    return {token: number for token, number in special.items() if "_" in token and token.isascii()}


def _check_language(field: str, language: str, codes: dict[str, int]) -> None:
    if language not in codes:
        close = difflib.get_close_matches(language, codes, n=3, cutoff=0.3)
        near = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise UsageError(field, f"got {language!r}, the tokenizer knows: {', '.join(sorted(codes))}{near}")


def _token(tokenizer: Any, codes: dict[str, int], token: str) -> int:
    if token in codes:
        return codes[token]
    number = tokenizer.convert_tokens_to_ids(token)
    if number is None or number == tokenizer.unk_token_id:
        raise UsageError("forced_bos_token", f"got {token!r}, accepted: a token of the tokenizer")
    return int(number)


def limit_lengths(model: Any, data: DataArguments) -> None:
    """Cut `max_source_length` and `max_target_length` to the positions that the model has."""
    most = getattr(model.config, "max_position_embeddings", None)
    if model.config.model_type == "m2m_100" or not isinstance(most, int):
        return  # sinusoids that grow, or relative positions
    for name in ("max_source_length", "max_target_length", "val_max_target_length"):
        value = getattr(data, name)
        if value is not None and value > most:
            tell = logger.info if value == type(data).__dataclass_fields__[name].default else logger.warning
            tell(f"{name}: {value} is more than the model's {most} positions; using {most}")
            setattr(data, name, most)
