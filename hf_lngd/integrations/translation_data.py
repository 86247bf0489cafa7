"""Sentence pairs: read and checked before anything is trained, then tokenized."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

import datasets
from transformers.utils import logging

from .translation_args import DataArguments, ModelArguments
from .usage import UsageError

logger = logging.get_logger(__name__)

COLUMN = "translation"
Pair = dict[str, str]


def load_pairs(data: DataArguments, model: ModelArguments, parts: list[str]) -> dict[str, datasets.Dataset]:
    """The parts that are needed, each a data set with the columns ``source`` and ``target``.

    Args:
        data: which files or data set.
        model: its `cache_dir` and `token` are used.
        parts: of ``train``, ``validation``, ``test``.

    Raises:
        UsageError: a file that cannot be read, an empty one, a broken line, a missing column, language or sentence.
    """
    if data.dataset_name:
        return _from_hub(data, model, parts)
    return {part: _from_file(f"{part}_file", str(getattr(data, f"{part}_file")), data) for part in parts}


def _from_file(field: str, path: str, data: DataArguments) -> datasets.Dataset:
    """Every line is checked, whatever part of the file is used."""
    source, target = data.source_key, data.target_key
    sources: list[str] = []
    targets: list[str] = []
    first_gap: UsageError | None = None
    seen: set[str] = set()
    for number, text in _lines(field, path):
        pair = _parse(field, path, number, text)
        seen.update(pair)
        gap = _gap(pair, source, target)
        if gap:
            first_gap = first_gap or UsageError(field, f"{path}, line {number}: {gap}")
            continue
        sources.append(pair[source])
        targets.append(pair[target])
    _check_languages(data, seen, path)
    if first_gap:
        raise first_gap
    if not sources:
        raise UsageError(field, f"got {path!r}, which is empty, accepted: at least one line")
    return datasets.Dataset.from_dict({"source": sources, "target": targets})


def _lines(field: str, path: str) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of a file that are not blank."""
    opener: Any = gzip.open if path.endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise UsageError(field, f"{path}, after line {number}: not UTF-8 ({error.reason})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(field, f"{path}, after line {number}: cannot be read ({error})") from error


def _parse(field: str, path: str, number: int, text: str) -> dict[str, Any]:
    where = f"{path}, line {number}"
    try:
        row = json.loads(text)
    except ValueError as error:
        raise UsageError(field, f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise UsageError(field, f"{where}: got a JSON {type(row).__name__}, accepted: an object")
    if COLUMN not in row:
        columns = ", ".join(row) or "none"
        raise UsageError(field, f"{where}: no column '{COLUMN}', found: {columns}")
    if not isinstance(row[COLUMN], dict):
        raise UsageError(field, f"{where}: column '{COLUMN}': accepted: an object with one sentence a language")
    return row[COLUMN]


def _gap(pair: dict[str, Any], source: str, target: str) -> str | None:
    """What is missing of a pair, in words."""
    has = {key: isinstance(pair.get(key), str) and bool(pair[key].strip()) for key in (source, target)}
    if has[source] and has[target]:
        return None
    if not has[source] and not has[target]:
        return f"neither '{source}' nor '{target}'"
    return f"a source '{source}' without a target '{target}'" if has[source] else f"no source '{source}'"


def _check_languages(data: DataArguments, seen: set[str], where: str) -> None:
    if not seen:
        return
    for name, key in (("source_lang", data.source_key), ("target_lang", data.target_key)):
        if key not in seen:
            raise UsageError(name, f"got {getattr(data, name)!r}, {where} has: {', '.join(sorted(seen))}")


def _from_hub(data: DataArguments, model: ModelArguments, parts: list[str]) -> dict[str, datasets.Dataset]:
    try:
        loaded = datasets.load_dataset(
            data.dataset_name, data.dataset_config_name, cache_dir=model.cache_dir, token=model.token
        )
    except Exception as error:  # whatever the network, the Hub or a builder raises: the name is what the user gave
        raise UsageError("dataset_name", f"got {data.dataset_name!r}: {error}") from error
    pairs = {}
    for part in parts:
        if part not in loaded:
            raise UsageError("dataset_name", f"{data.dataset_name} has no part {part}, found: {', '.join(loaded)}")
        rows = loaded[part]
        if COLUMN not in rows.column_names:
            found = ", ".join(rows.column_names)
            raise UsageError("dataset_name", f"{data.dataset_name}: no column '{COLUMN}', found: {found}")
        if not len(rows):
            raise UsageError("dataset_name", f"{data.dataset_name}: part {part} is empty")
        _check_languages(data, set(rows[0][COLUMN]), f"{data.dataset_name}, {part}")
        pairs[part] = _columns(rows, data, f"{data.dataset_name}, {part}")
    return pairs


def _columns(rows: datasets.Dataset, data: DataArguments, name: str) -> datasets.Dataset:
    """Two columns; pairs without a source or a target (large collections have some) are left out and counted."""
    source, target = data.source_key, data.target_key

    def split(batch: dict[str, list[Any]]) -> dict[str, list[str]]:
        whole = [pair for pair in batch[COLUMN] if _gap(pair, source, target) is None]
        return {"source": [pair[source] for pair in whole], "target": [pair[target] for pair in whole]}

    result = rows.map(split, batched=True, remove_columns=rows.column_names, desc=f"Pairs of {name}")
    if len(result) < len(rows):
        logger.warning(f"{name}: {len(rows) - len(result)} of {len(rows)} pairs lack a sentence and are left out")
    if not len(result):
        raise UsageError("dataset_name", f"{name}: no whole pair of {source} and {target}")
    return result


def first(pairs: datasets.Dataset, count: int | None) -> datasets.Dataset:
    """The first `count` pairs, or all."""
    return pairs if count is None else pairs.select(range(min(count, len(pairs))))


def tokenize(
    pairs: datasets.Dataset, tokenizer: Any, data: DataArguments, max_target_length: int, name: str
) -> datasets.Dataset:
    """`input_ids`, `attention_mask`, `labels`; padded only with `pad_to_max_length`."""
    prefix = data.source_prefix or ""
    padding = "max_length" if data.pad_to_max_length else False

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        sources = [prefix + text for text in batch["source"]]
        encoded = tokenizer(sources, max_length=data.max_source_length, padding=padding, truncation=True)
        target = tokenizer(text_target=batch["target"], max_length=max_target_length, padding=padding, truncation=True)
        labels = target["input_ids"]
        if padding and data.ignore_pad_token_for_loss:
            masks = target["attention_mask"]
            labels = [
                [token if seen else -100 for token, seen in zip(row, mask, strict=True)]
                for row, mask in zip(labels, masks, strict=True)
            ]
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}

    return pairs.map(
        encode,
        batched=True,
        num_proc=data.preprocessing_num_workers,
        remove_columns=pairs.column_names,
        load_from_cache_file=not data.overwrite_cache,
        desc=f"Tokenizing {name}",
    )
