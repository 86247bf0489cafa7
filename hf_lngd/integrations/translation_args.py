"""The arguments of `scripts/run_translation.py`: those of transformers' own translation example, and a few more."""

from __future__ import annotations

from dataclasses import dataclass

from .script_args import check_counts, check_file, check_model, check_training, find_checkpoint, option
from .training_args import LNGDSeq2SeqTrainingArguments
from .usage import UsageError, UsageParser

FILE_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


@dataclass
class ModelArguments:
    """Which model, configuration and tokenizer."""

    model_name_or_path: str | None = option(None, "Model to fine-tune: a folder or a name on the Hub.")
    config_name: str | None = option(
        None, "Configuration, a folder, a file or a name on the Hub; without --model_name_or_path: train from scratch."
    )
    config_overrides: str | None = option(None, "Changes to the configuration, e.g. 'dropout=0.0,encoder_layers=3'.")
    tokenizer_name: str | None = option(None, "Tokenizer, if another than the model's: a folder or a name.")
    cache_dir: str | None = option(None, "Where downloads are kept.")
    use_fast_tokenizer: bool = option(True, "Use a tokenizer of the tokenizers library where there is one.")
    model_revision: str = option("main", "Branch, tag or commit of the model on the Hub.")
    token: str | None = option(None, "Token for private models; by default the one that `hf auth login` stored.")
    trust_remote_code: bool = option(False, "Run code that comes with a model or data set. Only if you trust it.")


@dataclass
class DataArguments:
    """Which sentences, and what is done with them."""

    source_lang: str | None = option(None, "Language to translate from, as the data and the tokenizer name it.")
    target_lang: str | None = option(None, "Language to translate to.")
    dataset_name: str | None = option(None, "Data set: a folder or a name on the Hub.")
    dataset_config_name: str | None = option(None, "Configuration of the data set, e.g. de-en.")
    train_file: str | None = option(None, 'JSON lines, gzipped or not: {"translation": {"en": …, "de": …}}.')
    validation_file: str | None = option(None, "The same, for --do_eval.")
    test_file: str | None = option(None, "The same, for --do_predict.")
    overwrite_cache: bool = option(False, "Tokenize again, whatever the cache holds.")
    preprocessing_num_workers: int | None = option(None, "Processes that tokenize.")
    max_source_length: int = option(1024, "Most tokens of a source; longer ones are cut. At most what the model takes.")
    max_target_length: int = option(128, "Most tokens of a target; longer ones are cut.")
    val_max_target_length: int | None = option(
        None, "The same for validation and test, and the length of generated text; none: --max_target_length."
    )
    pad_to_max_length: bool = option(False, "Pad every sentence to the most; otherwise to the longest of its batch.")
    max_train_samples: int | None = option(None, "Use the first so many training pairs.")
    max_eval_samples: int | None = option(None, "Use the first so many validation pairs.")
    max_predict_samples: int | None = option(None, "Use the first so many test pairs.")
    num_beams: int | None = option(1, "Beams in the final evaluation and in prediction.")
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
            if not getattr(self, name):
                raise UsageError(name, "got none, accepted: a language, e.g. en")
        if self.source_lang == self.target_lang:
            raise UsageError(
                "target_lang", f"got {self.target_lang!r}, which is the source, accepted: another language"
            )
        check_counts(self)
        for name in ("train_file", "validation_file", "test_file"):
            check_file(name, getattr(self, name), FILE_ENDINGS, "JSON lines")

    @property
    def source_key(self) -> str:
        """The source language as the data name it: `en` for `en_XX`."""
        return str(self.source_lang).split("_")[0]

    @property
    def target_key(self) -> str:
        """The target language as the data name it."""
        return str(self.target_lang).split("_")[0]

    @property
    def eval_target_length(self) -> int:
        """Most tokens of a target, and of generated text, in evaluation and prediction."""
        return self.max_target_length if self.val_max_target_length is None else self.val_max_target_length


def make_parser() -> UsageParser:
    """The script's parser: model, data, training."""
    return UsageParser([ModelArguments, DataArguments, LNGDSeq2SeqTrainingArguments], prog="run_translation.py")


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, LNGDSeq2SeqTrainingArguments]:
    """Parse and check all arguments; `resume_from_checkpoint` becomes a folder.

    Raises:
        UsageError: names the argument, the value and what is accepted.
    """
    model, data, training = make_parser().parse(argv)
    _check_together(model, data, training)
    training.resume_from_checkpoint = find_checkpoint(training)
    return model, data, training


def _check_together(model: ModelArguments, data: DataArguments, training: LNGDSeq2SeqTrainingArguments) -> None:
    check_model(model)
    if not model.model_name_or_path and not model.tokenizer_name:
        raise UsageError("tokenizer_name", "got none, accepted: a tokenizer, as there is no --model_name_or_path")
    check_training(training)
    if data.dataset_config_name and not data.dataset_name:
        raise UsageError("dataset_config_name", f"got {data.dataset_config_name!r} without --dataset_name")
    if data.dataset_name and (data.train_file or data.validation_file or data.test_file):
        raise UsageError("dataset_name", f"got {data.dataset_name!r} and files, accepted: one of the two")
    for name, needed in (("train", training.do_train), ("validation", training.do_eval), ("test", training.do_predict)):
        if needed and not data.dataset_name and not getattr(data, f"{name}_file"):
            raise UsageError(f"{name}_file", "got none, accepted: a file of JSON lines, or --dataset_name")
