"""Trains, evaluates and runs a translation model: Marian, T5, mBART, M2M100, BART and their kin.

    python scripts/run_translation.py --model_name_or_path Helsinki-NLP/opus-mt-en-de --source_lang en \
        --target_lang de --train_file train.json.gz --validation_file validation.json.gz --do_train --do_eval \
        --predict_with_generate --optim lngd --optim_args preset=fast --learning_rate 1e-3 --output_dir out

The arguments are those of transformers' translation example (`--help` lists them); a single argument that ends in
.json is a file with them. Data are JSON lines, `{"translation": {"en": "…", "de": "…"}}`, or tables with the columns
`en` and `de` (.csv, .tsv), gzipped or not; --source_column and --target_column name other columns. A file for
--do_predict needs no translations.

Whatever is wrong with arguments or data ends the script before training, with status 2 and a last line
`error: <field>: …`; a push that the Hub does not take, after training, with status 1.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import run_shared  # the file beside this one
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, set_seed
from transformers.utils import logging

from hf_lngd import LNGDSeq2SeqTrainer, LNGDSeq2SeqTrainingArguments
from hf_lngd.integrations.usage import UsageError, UsageParser, blame, exit_on_usage_error, option, refuse_if
from hf_lngd.metrics import load_metric

logger = logging.get_logger(__name__)

TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
FILE_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", *TABLES)
COLUMN = "translation"

# The code example of the model's card.
USAGE = """
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name}{languages})
model = AutoModelForSeq2SeqLM.from_pretrained({name})
inputs = tokenizer([{prefix}"…"], return_tensors="pt", return_token_type_ids=False)
outputs = model.generate(**inputs, num_beams={beams}, max_length={length})
print(tokenizer.batch_decode(outputs, skip_special_tokens=True))
"""


# ---- Arguments ----
@dataclass
class ModelArguments:
    """Which model, configuration and tokenizer."""

    model_name_or_path: str | None = option(None, "Model to fine-tune: a folder or a name on the Hub.")
    config_name: str | None = option(
        None, "Configuration to train from scratch: a folder, a file, a type of model (marian), or a name on the Hub."
    )
    config_overrides: str | None = option(None, "Changes to the configuration, e.g. 'dropout=0.0,encoder_layers=3'.")
    tokenizer_name: str | None = option(None, "Tokenizer, if another than the model's: a folder or a name.")
    cache_dir: str | None = option(None, "Where downloads are kept.")
    use_fast_tokenizer: bool = option(True, "Use a tokenizer of the tokenizers library where there is one.")
    model_revision: str = option("main", "Branch, tag or commit of the model on the Hub.")
    token: str | None = option(None, "Token for private models; by default the one that `hf auth login` stored.")
    trust_remote_code: bool = option(False, "Run code that comes with a model or data set. Only if you trust it.")
    overwrite_output_dir: bool = option(False, "Replace the model, checkpoints and results that --output_dir has.")


@dataclass
class DataArguments:
    """Which sentences, and what is done with them."""

    source_lang: str | None = option(None, "Language to translate from, as the data and the tokenizer name it.")
    target_lang: str | None = option(None, "Language to translate to.")
    dataset_name: str | None = option(None, "Data set: a folder or a name on the Hub.")
    dataset_config_name: str | None = option(None, "Configuration of the data set, e.g. de-en.")
    train_file: str | None = option(
        None, 'JSON lines, {"translation": {"en": …, "de": …}}, or a table with a header, .csv or .tsv; gzipped or not.'
    )
    validation_file: str | None = option(None, "The same, for --do_eval.")
    test_file: str | None = option(None, "The same, for --do_predict; the translations may be missing.")
    source_column: str | None = option(None, "Column of the sources; none: in tables --source_lang, else translation.")
    target_column: str | None = option(None, "Column of the targets; none: in tables --target_lang, else translation.")
    overwrite_cache: bool = option(False, "Tokenize again, whatever the cache holds.")
    preprocessing_num_workers: int | None = option(None, "Processes that tokenize.")
    max_source_length: int = option(1024, "Most tokens of a source; longer ones are cut. At most what the model takes.")
    max_target_length: int = option(128, "Most tokens of a target; longer ones are cut.")
    val_max_target_length: int | None = option(
        None, "The same for validation and test, and of generated text; none: --max_target_length."
    )
    pad_to_max_length: bool = option(False, "Pad every sentence to the most; otherwise to the longest of its batch.")
    max_train_samples: int | None = option(None, "Use the first so many training pairs.")
    max_eval_samples: int | None = option(None, "Use the first so many validation pairs.")
    max_predict_samples: int | None = option(None, "Use the first so many test pairs.")
    num_beams: int | None = option(
        None, "Beams of every evaluation, also during training, and of prediction; none: --generation_num_beams, or 1."
    )
    ignore_pad_token_for_loss: bool = option(True, "Leave padding out of the loss.")
    source_prefix: str | None = option(None, "Text before each source, e.g. 'translate English to German: ' for T5.")
    forced_bos_token: str | None = option(
        None, "First token of what is generated: a language for mBART-50, M2M100, NLLB; none: --target_lang there."
    )
    data_license: str | None = option(None, "Licence of the model for its card, as the Hub names it, e.g. cc-by-2.0.")
    data_attribution: str | None = option(
        None, "Who the data come from, for the card; none: the file ATTRIBUTION.md beside the training file, if any."
    )

    def __post_init__(self) -> None:
        for name in ("source_lang", "target_lang"):
            refuse_if(not getattr(self, name), name, "got none, accepted: a language, e.g. en")
        same = self.source_lang == self.target_lang
        refuse_if(same, "target_lang", f"got {self.target_lang!r}, which is the source, accepted: another language")
        run_shared.check_data(self, FILE_ENDINGS, "sentence pairs")

    @property
    def keys(self) -> tuple[str, str]:
        """Source and target language as the data name them: `en` for `en_XX`."""
        return str(self.source_lang).split("_")[0], str(self.target_lang).split("_")[0]

    @property
    def columns(self) -> tuple[str, str]:
        """Columns of source and target where each has one."""
        source, target = self.keys
        return self.source_column or source, self.target_column or target

    @property
    def eval_target_length(self) -> int:
        """Most tokens of a target in evaluation and prediction."""
        return self.max_target_length if self.val_max_target_length is None else self.val_max_target_length


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, LNGDSeq2SeqTrainingArguments]:
    """Parse and check all arguments; `resume_from_checkpoint` becomes a folder.

    Raises:
        UsageError: names the argument, the value and what is accepted.
    """
    kinds = [ModelArguments, DataArguments, LNGDSeq2SeqTrainingArguments]
    model, data, args = UsageParser(kinds, prog="run_translation.py").parse(argv)
    run_shared.check_training(model, args)
    named = model.model_name_or_path or model.tokenizer_name
    refuse_if(not named, "tokenizer_name", "got none, accepted: a tokenizer, as there is no --model_name_or_path")
    beams = args.generation_num_beams
    what = f"got {data.num_beams} and --generation_num_beams {beams}, accepted: one of the two"
    refuse_if(None not in (beams, data.num_beams) and beams != data.num_beams, "num_beams", what)
    name, files = data.dataset_name, data.train_file or data.validation_file or data.test_file
    refuse_if(name and files, "dataset_name", f"got {name!r} and files, accepted: one of the two")
    for part in run_shared.wanted_parts(args):
        missing = not name and not getattr(data, f"{part}_file")
        refuse_if(missing, f"{part}_file", "got none, accepted: a file of sentence pairs, or --dataset_name")
    return model, data, args


# ---- Data: pairs are read and checked before anything is trained, then tokenized ----
def load_pairs(data: DataArguments, model: ModelArguments, parts: list[str]) -> dict[str, datasets.Dataset]:
    """The parts that are needed, each a data set with the columns ``source`` and ``target``; the latter may be missing
    of what is predicted.

    Raises:
        UsageError: a file that cannot be read, an empty one, a broken line, a missing column, language or sentence.
    """
    if not data.dataset_name:
        return {part: from_file(f"{part}_file", str(getattr(data, f"{part}_file")), data) for part in parts}
    loaded = run_shared.load_dataset(data, model)
    return {part: from_dataset(loaded, part, data) for part in parts}


def from_file(field: str, path: str, data: DataArguments) -> datasets.Dataset:
    """Every line is checked, whatever part of the file is used."""
    numbers, pairs = [], []
    for number, row in read_rows(field, path):
        numbers.append(number)
        pairs.append(pair_of(row, data, path.endswith(TABLES), field, f"{path}, line {number}"))
    refuse_if(not pairs, field, f"got {path!r}, which is empty, accepted: at least one line")
    wanted = wanted_keys(pairs, data, field == "test_file")
    check_languages(data, wanted, set().union(*pairs), path)
    for number, pair in zip(numbers, pairs, strict=True):
        gap = gap_of(pair, wanted)
        refuse_if(gap, field, f"{path}, line {number}: {gap}")
    names = zip(("source", "target"), wanted, strict=False)
    return datasets.Dataset.from_dict({name: [pair[key] for pair in pairs] for name, key in names})


def read_rows(field: str, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line, row) of a file; blank lines are left out."""
    if not path.endswith(TABLES):
        for number, text in enumerate(read_lines(field, path), start=1):
            if text.strip():
                yield number, parse_line(field, f"{path}, line {number}", text)
        return
    options: dict[str, Any] = (
        {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if ".tsv" in path[-7:] else {"strict": True}
    )
    reader = csv.DictReader(read_lines(field, path), **options)
    try:
        for row in reader:
            if None in row:  # DictReader's key of what is too much
                more = f"{path}, line {reader.line_num}: more values than the header has columns: {row[None]}"
                raise UsageError(field, more)
            yield reader.line_num, row
    except csv.Error as error:
        raise UsageError(field, f"{path}, after line {reader.line_num}: cannot be read as a table ({error})") from error


def read_lines(field: str, path: str) -> Iterator[str]:
    """The lines of a text file, gzipped or not."""
    opener: Any = gzip.open if path.endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(field, f"{path}, line {number}: got {error.reason}, accepted: UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(field, f"{path}, after line {number}: cannot be read ({error})") from error


def parse_line(field: str, where: str, text: str) -> dict[str, Any]:
    """The JSON object in a line."""
    try:
        row = json.loads(text)
    except ValueError as error:
        raise UsageError(field, f"{where}: not JSON ({error})") from error
    is_object = isinstance(row, dict)
    refuse_if(not is_object, field, f"{where}: got a JSON {type(row).__name__}, accepted: an object")
    return row


def pair_of(row: dict[str, Any], data: DataArguments, is_table: bool, field: str, where: str) -> dict[str, Any]:
    """Sentences by language, from the column `COLUMN` or from a column each."""
    found = ", ".join(str(name) for name in row) or "none"
    if is_table or data.source_column or data.target_column:
        for name, column in zip(("source_column", "target_column"), data.columns, strict=True):
            is_needed = name == "source_column" or field != "test_file"
            what = f"got {column!r}, {where} has: {found}"
            refuse_if(is_needed and column not in row, name, what)
        return {key: row[column] for key, column in zip(data.keys, data.columns, strict=True) if column in row}
    what = f"{where}: no column '{COLUMN}', found: {found}; --source_column and --target_column name others"
    refuse_if(COLUMN not in row, field, what)
    what = f"{where}: column '{COLUMN}': accepted: an object with one sentence a language"
    refuse_if(not isinstance(row[COLUMN], dict), field, what)
    return row[COLUMN]


def has_text(pair: dict[str, Any], key: str) -> bool:
    """Whether there is a sentence in this language."""
    return isinstance(pair.get(key), str) and bool(pair[key].strip())


def wanted_keys(pairs: list[dict[str, Any]], data: DataArguments, is_test: bool) -> tuple[str, ...]:
    """The languages in which each pair has to have a sentence: the source alone of test data without translations."""
    alone = is_test and not any(has_text(pair, data.keys[1]) for pair in pairs)
    return data.keys[:1] if alone else data.keys


def gap_of(pair: dict[str, Any], wanted: tuple[str, ...]) -> str | None:
    """What is missing of a pair, in words."""
    missing = [key for key in wanted if not has_text(pair, key)]
    if not missing:
        return None
    if len(missing) == 2:
        return f"neither '{missing[0]}' nor '{missing[1]}'"
    source, *target = wanted
    return f"no source '{source}'" if missing == [source] else f"a source '{source}' without a target '{target[0]}'"


def check_languages(data: DataArguments, wanted: tuple[str, ...], seen: set[str], where: str) -> None:
    """Raise UsageError if a language is none of those that were seen."""
    for field, key in zip(("source_lang", "target_lang"), wanted, strict=False):
        refuse_if(key not in seen, field, f"got {getattr(data, field)!r}, {where} has: {', '.join(sorted(seen))}")


def from_dataset(loaded: Any, part: str, data: DataArguments) -> datasets.Dataset:
    """Pairs without a source or a target (large collections have some) are left out and counted."""
    name, field = data.dataset_name, "dataset_name"
    refuse_if(part not in loaded, field, f"{name} has no part {part}, found: {', '.join(loaded)}")
    rows, where = loaded[part], f"{name}, {part}"
    refuse_if(not len(rows), field, f"{name}: part {part} is empty")

    def pairs_of(batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
        columns = zip(*batch.values(), strict=True)
        return [pair_of(dict(zip(batch, row, strict=True)), data, False, f"{part}_file", where) for row in columns]

    first = pairs_of(rows[:1])
    wanted = wanted_keys(pairs_of(rows[:]) if part == "test" else first, data, part == "test")
    check_languages(data, wanted, set(first[0]), where)

    def split(batch: dict[str, list[Any]]) -> dict[str, list[str]]:
        whole = [pair for pair in pairs_of(batch) if gap_of(pair, wanted) is None]
        return {name: [p[key] for p in whole] for name, key in zip(("source", "target"), wanted, strict=False)}

    pairs = rows.map(split, batched=True, remove_columns=rows.column_names, desc=f"Pairs of {where}")
    if len(pairs) < len(rows):
        logger.warning(f"{where}: {len(rows) - len(pairs)} of {len(rows)} pairs lack a sentence and are left out")
    refuse_if(not len(pairs), field, f"{where}: no whole pair of {' and '.join(wanted)}")
    return pairs


def tokenize(
    pairs: datasets.Dataset, tokenizer: Any, data: DataArguments, max_target_length: int, name: str
) -> datasets.Dataset:
    """`input_ids`, `attention_mask` and, where there are targets, `labels`; padded only with `pad_to_max_length`. Tells
    how many sentences were cut."""
    prefix, padding = data.source_prefix or "", "max_length" if data.pad_to_max_length else False
    most = {"sources": data.max_source_length, "targets": max_target_length}

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        texts = {"sources": ("text", [prefix + text for text in batch["source"]])}
        if "target" in batch:
            texts["targets"] = ("text_target", batch["target"])
        encoded, made = dict[str, Any](), dict[str, Any]()
        for side, (kind, own) in texts.items():
            found = encoded[side] = tokenizer(**{kind: own}, max_length=most[side], padding=padding, truncation=True)
            made[side] = is_cut = [False] * len(own)
            full = [i for i, mask in enumerate(found["attention_mask"]) if sum(mask) == most[side]]
            chosen = [own[i] for i in full]  # is there one more token?
            longer = (
                tokenizer(**{kind: chosen}, max_length=most[side] + 1, truncation=True) if full else {"input_ids": ()}
            )
            for i, tokens in zip(full, longer["input_ids"], strict=True):
                is_cut[i] = len(tokens) > most[side]
        if "targets" in encoded:
            made["labels"] = labels = encoded["targets"]["input_ids"]
            if padding and data.ignore_pad_token_for_loss:
                rows = zip(labels, encoded["targets"]["attention_mask"], strict=True)
                made["labels"] = [[token if seen else -100 for token, seen in zip(*row, strict=True)] for row in rows]
        return {**made, **{key: encoded["sources"][key] for key in ("input_ids", "attention_mask")}}

    tokens = pairs.map(
        encode,
        batched=True,
        num_proc=data.preprocessing_num_workers,
        remove_columns=pairs.column_names,
        load_from_cache_file=not data.overwrite_cache,
        desc=f"Tokenizing {name}",
    )
    for side in sorted(set(most) & set(tokens.column_names)):
        count = sum(tokens[side])
        if count:
            logger.warning(f"{name}: {count} of {len(tokens)} {side} have more than {most[side]} tokens and are cut")
        tokens = tokens.remove_columns(side)
    return tokens


# ---- Model ----
def load_tokenizer(args: ModelArguments) -> Any:
    """The tokenizer. UsageError: it cannot be loaded, or has no padding token."""
    field = "tokenizer_name" if args.tokenizer_name else "model_name_or_path"
    name = args.tokenizer_name or args.model_name_or_path
    with blame(field, f"got {name!r}, from which no tokenizer can be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(
            name, use_fast=args.use_fast_tokenizer, **run_shared.hub_options(args)
        )
    refuse_if(tokenizer.pad_token_id is None, field, f"got {name!r}, accepted: a tokenizer with a padding token")
    return tokenizer


def load_model(args: ModelArguments, tokenizer: Any) -> Any:
    """The model, with `config_overrides`; drawn anew without `model_name_or_path`. Embeddings grow to the tokenizer."""
    config = run_shared.load_config(args, AutoModelForSeq2SeqLM, "translation", tokenizer)
    model = run_shared.make_model(AutoModelForSeq2SeqLM, args, config, "translation")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    return model


def set_languages(model: Any, tokenizer: Any, data: DataArguments) -> None:
    """Tell a multilingual tokenizer and the model's generation the languages.

    Raises:
        UsageError: a language or a first token that the tokenizer does not know; no start token for the decoder.
    """
    codes = language_codes(tokenizer)
    forced: int | None = None
    if codes:
        for field in ("source_lang", "target_lang"):
            language = getattr(data, field)
            close = " or ".join(difflib.get_close_matches(language, codes, n=3, cutoff=0.3))
            known = ", ".join(sorted(codes)) + (f" (did you mean {close}?)" if close else "")
            refuse_if(language not in codes, field, f"got {language!r}, the tokenizer knows: {known}")
        tokenizer.src_lang, tokenizer.tgt_lang = data.source_lang, data.target_lang
        target = codes[str(data.target_lang)]
        if tokenizer(text_target="a")["input_ids"][0] == target:
            forced = target  # M2M100, mBART-50, NLLB: the decoder's first word is the language
        if model.config.decoder_start_token_id is None:  # mBART starts with the language, the others with </s>
            model.config.decoder_start_token_id = target if forced is None else tokenizer.eos_token_id
    if data.forced_bos_token is not None:
        token = data.forced_bos_token
        forced = codes.get(token, tokenizer.convert_tokens_to_ids(token))
        unknown = token not in codes and forced in (None, tokenizer.unk_token_id)
        refuse_if(unknown, "forced_bos_token", f"got {token!r}, accepted: a token of the tokenizer")
    if forced is not None:
        model.generation_config.forced_bos_token_id = forced
    start = getattr(model.config, "decoder_start_token_id", None)
    what = "decoder_start_token_id: got none, accepted: the decoder's first token"
    refuse_if(start is None, "config_overrides", what)
    model.generation_config.decoder_start_token_id = start
    if data.source_prefix is None and model.config.model_type in ("t5", "mt5", "umt5"):
        logger.warning("T5 expects a prefix, e.g. --source_prefix 'translate English to German: '")


def language_codes(tokenizer: Any) -> dict[str, int]:
    """Language → token number of a multilingual tokenizer; empty for others."""
    if not hasattr(tokenizer, "src_lang"):
        return {}
    known = getattr(tokenizer, "lang_code_to_id", None)
    if known:
        return dict(known)
    special = {str(token): tokenizer.convert_tokens_to_ids(str(token)) for token in tokenizer.all_special_tokens}
    return {token: number for token, number in special.items() if "_" in token and token.isascii()}


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


# ---- Scores and card ----
class TranslationScores:
    """``compute_metrics``: BLEU and chrF of generated tokens against labels, by the package's sacrebleu module.

    Attributes:
        signatures: of the last call, by metric: ``bleu``, ``chrf``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.signatures: dict[str, str] = {}
        self._metric = load_metric("sacrebleu")

    def __call__(self, prediction: Any) -> dict[str, float]:
        """`prediction`: token numbers [B, T] of both, padded with −100 or the padding token."""
        tokens, labels = prediction.predictions, prediction.label_ids
        tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        result = self._metric.compute(predictions=self.decode(tokens), references=self.decode(labels))
        self.signatures = {"bleu": result["signature"], "chrf": result["chrf_signature"]}
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}  # start, end, language, padding
        lengths = np.isin(self._unpadded(tokens), list(special), invert=True).sum(-1)
        scores = {"bleu": result["score"], "chrf": result["chrf"], "gen_len": float(np.mean(lengths))}
        return {name: round(value, 4) for name, value in scores.items()}

    def decode(self, tokens: Any) -> list[str]:
        """Texts, one line each, without special tokens."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return [" ".join(text.split()) for text in self.tokenizer.batch_decode(self._unpadded(tokens), **options)]

    def _unpadded(self, tokens: Any) -> Any:
        return np.where(np.asarray(tokens) < 0, self.tokenizer.pad_token_id, tokens)


def make_card(trainer: LNGDSeq2SeqTrainer, model: ModelArguments, data: DataArguments) -> run_shared.CardWriter:
    """What writes the model's card: languages, data set, a code example."""
    file = data.train_file or data.validation_file or data.test_file or ""
    dataset = data.dataset_name or Path(file).resolve().parent.name or Path(file).name
    multilingual = hasattr(trainer.processing_class, "src_lang")
    usage = USAGE.format(
        name=run_shared.model_name(trainer),
        languages=f', src_lang="{data.source_lang}", tgt_lang="{data.target_lang}"' if multilingual else "",
        prefix=f"{json.dumps(data.source_prefix, ensure_ascii=False)} + " if data.source_prefix else "",
        beams=trainer.args.generation_num_beams,
        length=trainer.args.generation_max_length,
    )
    return run_shared.CardWriter(
        trainer,
        model,
        data,
        {"bleu": ("bleu", "BLEU"), "chrf": ("chrf", "chrF")},
        task="translation",
        dataset_name=dataset,
        dataset_type=dataset,
        languages=data.keys,
        attribution=run_shared.read_attribution(data.data_attribution, data.train_file),
        usage=usage,
        libraries=("tokenizers", "sacrebleu"),
    )


# ---- The run ----
def prepare(
    model_args: ModelArguments, data_args: DataArguments, args: Any
) -> tuple[LNGDSeq2SeqTrainer, dict[str, Any], TranslationScores]:
    """The trainer, the tokenized parts of the data, and what scores translations. Finds all that is wrong."""
    pairs = load_pairs(data_args, model_args, run_shared.wanted_parts(args))
    if "test" in pairs and "target" not in pairs["test"].column_names:
        what = "got false for test data without translations, accepted: true"
        refuse_if(not args.predict_with_generate, "predict_with_generate", what)
        logger.warning("the test data have no translations: they are translated, and not scored")
    set_seed(args.seed)
    tokenizer = load_tokenizer(model_args)
    model = load_model(model_args, tokenizer)
    set_languages(model, tokenizer, data_args)
    limit_lengths(model, data_args)
    parts = {}
    for part, rows in pairs.items():
        length = data_args.max_target_length if part == "train" else data_args.eval_target_length
        most = getattr(data_args, run_shared.LIMITS[part])
        with args.main_process_first(desc=f"tokenizing {part}"):
            chosen = rows if most is None else rows.select(range(min(most, len(rows))))
            parts[part] = tokenize(chosen, tokenizer, data_args, length, part)
    # Of every evaluation, so that the scores during training and at its end are the same.
    args.generation_max_length = args.generation_max_length or data_args.eval_target_length
    args.generation_num_beams = args.generation_num_beams or data_args.num_beams or 1
    if not model_args.model_name_or_path:  # a trained model knows how much it may say, a new one is told
        model.generation_config.max_length = args.generation_max_length
    scores = TranslationScores(tokenizer)
    collator = DataCollatorForSeq2Seq(
        tokenizer,
        model=model,
        label_pad_token_id=-100 if data_args.ignore_pad_token_for_loss else tokenizer.pad_token_id,
        pad_to_multiple_of=8 if args.fp16 else None,
    )
    trainer = run_shared.make_trainer(
        LNGDSeq2SeqTrainer,
        args,
        model=model,
        train_dataset=parts.get("train"),
        eval_dataset=parts.get("validation"),
        processing_class=tokenizer,
        data_collator=collator,
        compute_metrics=scores if args.predict_with_generate else None,
    )
    return trainer, parts, scores


def predict(trainer: LNGDSeq2SeqTrainer, dataset: Any) -> Any:
    """Predictions in the order of the file: a Trainer that groups by length shuffles what it predicts, too. Without
    translations there are no scores; the Trainer wants labels all the same."""
    scored, args = "labels" in dataset.column_names, trainer.args
    strategy, args.train_sampling_strategy = args.train_sampling_strategy, "sequential"
    if not scored:
        dataset = dataset.add_column("labels", [[trainer.processing_class.pad_token_id]] * len(dataset))
        trainer.compute_metrics = None
    try:
        result = trainer.predict(dataset, metric_key_prefix="predict")
    finally:
        args.train_sampling_strategy = strategy
    if not scored:
        del result.metrics["predict_loss"]
    return result


def main() -> None:
    """Everything that can be wrong is found by `prepare`; what follows trains.

    Raises:
        UsageError: names the argument.
        RunError: all is done and saved, but the Hub does not take it.
    """
    model_args, data_args, args = parse(sys.argv[1:])
    trainer, parts, scores = prepare(model_args, data_args, args)
    card = make_card(trainer, model_args, data_args)
    if args.do_train:
        run_shared.train(trainer)
    if args.do_eval:
        card.add("eval", "validation", trainer.evaluate(), scores.signatures)
    if args.do_predict:
        result = predict(trainer, parts["test"])
        card.add("predict", "test", result.metrics, scores.signatures)
        if args.predict_with_generate and trainer.is_world_process_zero():
            texts = "".join(f"{text}\n" for text in scores.decode(result.predictions))
            (Path(args.output_dir) / "generated_predictions.txt").write_text(texts, encoding="utf-8")
    card.finish()


if __name__ == "__main__":
    exit_on_usage_error(main)
