"""The arguments of `scripts/run_translation.py`: those of transformers' own translation example, and a few more."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from .training_args import LNGDSeq2SeqTrainingArguments
from .usage import UsageError, UsageParser

FILE_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """Which model, configuration and tokenizer."""

    model_name_or_path: str | None = _option(None, "Model to fine-tune: a folder or a name on the Hub.")
    config_name: str | None = _option(
        None, "Configuration, a folder, a file or a name on the Hub; without --model_name_or_path: train from scratch."
    )
    config_overrides: str | None = _option(None, "Changes to the configuration, e.g. 'dropout=0.0,encoder_layers=3'.")
    tokenizer_name: str | None = _option(None, "Tokenizer, if another than the model's: a folder or a name.")
    cache_dir: str | None = _option(None, "Where downloads are kept.")
    use_fast_tokenizer: bool = _option(True, "Use a tokenizer of the tokenizers library where there is one.")
    model_revision: str = _option("main", "Branch, tag or commit of the model on the Hub.")
    token: str | None = _option(None, "Token for private models; by default the one that `hf auth login` stored.")
    trust_remote_code: bool = _option(False, "Run code that comes with a model or data set. Only if you trust it.")


@dataclass
class DataArguments:
    """Which sentences, and what is done with them."""

    source_lang: str | None = _option(None, "Language to translate from, as the data and the tokenizer name it.")
    target_lang: str | None = _option(None, "Language to translate to.")
    dataset_name: str | None = _option(None, "Data set: a folder or a name on the Hub.")
    dataset_config_name: str | None = _option(None, "Configuration of the data set, e.g. de-en.")
    train_file: str | None = _option(None, 'JSON lines, gzipped or not: {"translation": {"en": …, "de": …}}.')
    validation_file: str | None = _option(None, "The same, for --do_eval.")
    test_file: str | None = _option(None, "The same, for --do_predict.")
    overwrite_cache: bool = _option(False, "Tokenize again, whatever the cache holds.")
    preprocessing_num_workers: int | None = _option(None, "Processes that tokenize.")
    max_source_length: int = _option(
        1024, "Most tokens of a source; longer ones are cut. At most what the model takes."
    )
    max_target_length: int = _option(128, "Most tokens of a target; longer ones are cut.")
    val_max_target_length: int | None = _option(
        None, "The same for validation and test, and the length of generated text; none: --max_target_length."
    )
    pad_to_max_length: bool = _option(False, "Pad every sentence to the most; otherwise to the longest of its batch.")
    max_train_samples: int | None = _option(None, "Use the first so many training pairs.")
    max_eval_samples: int | None = _option(None, "Use the first so many validation pairs.")
    max_predict_samples: int | None = _option(None, "Use the first so many test pairs.")
    num_beams: int | None = _option(1, "Beams in the final evaluation and in prediction.")
    ignore_pad_token_for_loss: bool = _option(True, "Leave padding out of the loss.")
    source_prefix: str | None = _option(None, "Text before each source, e.g. 'translate English to German: ' for T5.")
    forced_bos_token: str | None = _option(
        None, "First token of what is generated: a language for mBART-50, M2M100, NLLB; none: --target_lang there."
    )
    data_license: str | None = _option(None, "Licence of the model for its card, as the Hub names it, e.g. cc-by-2.0.")
    data_attribution: str | None = _option(
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
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise UsageError(name, f"got {value}, accepted: an integer, at least 1")
        for name in ("train_file", "validation_file", "test_file"):
            _check_file(name, getattr(self, name))

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


def _check_file(name: str, path: str | None) -> None:
    if path is None:
        return
    if not path.endswith(FILE_ENDINGS):
        raise UsageError(name, f"got {path!r}, accepted: a file that ends in {', '.join(FILE_ENDINGS)}")
    if not Path(path).is_file():
        raise UsageError(name, f"got {path!r}, which is no file, accepted: a file of JSON lines")


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
    if training.resume_from_checkpoint:
        training.resume_from_checkpoint = _checkpoint(training)
    return model, data, training


def _check_together(model: ModelArguments, data: DataArguments, training: LNGDSeq2SeqTrainingArguments) -> None:
    if not (training.do_train or training.do_eval or training.do_predict):
        raise UsageError("do_train", "got none of --do_train, --do_eval, --do_predict, accepted: at least one")
    if not model.model_name_or_path:
        if not model.config_name:
            raise UsageError(
                "model_name_or_path", "got none, accepted: a model, or --config_name to begin from nothing"
            )
        if not model.tokenizer_name:
            raise UsageError("tokenizer_name", "got none, accepted: a tokenizer, as there is no --model_name_or_path")
    _check_numbers(training)
    if data.dataset_config_name and not data.dataset_name:
        raise UsageError("dataset_config_name", f"got {data.dataset_config_name!r} without --dataset_name")
    if data.dataset_name and (data.train_file or data.validation_file or data.test_file):
        raise UsageError("dataset_name", f"got {data.dataset_name!r} and files, accepted: one of the two")
    for name, needed in (("train", training.do_train), ("validation", training.do_eval), ("test", training.do_predict)):
        if needed and not data.dataset_name and not getattr(data, f"{name}_file"):
            raise UsageError(f"{name}_file", "got none, accepted: a file of JSON lines, or --dataset_name")


def _check_numbers(training: LNGDSeq2SeqTrainingArguments) -> None:
    """What transformers finds out only in the middle of a run."""
    least = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
    least |= {"generation_num_beams": 1, "generation_max_length": 1, "learning_rate": 0, "weight_decay": 0}
    least |= {"label_smoothing_factor": 0, "num_train_epochs": 0}
    for name, bound in least.items():
        value = getattr(training, name)
        if value is not None and not value >= bound:
            raise UsageError(name, f"got {value}, accepted: a number, at least {bound}")
    if training.label_smoothing_factor >= 1:
        raise UsageError("label_smoothing_factor", f"got {training.label_smoothing_factor}, accepted: in [0, 1)")
    if training.do_train and training.max_steps <= 0 and not training.num_train_epochs:
        raise UsageError("num_train_epochs", "got 0, accepted: above 0, or --max_steps")


def _checkpoint(training: LNGDSeq2SeqTrainingArguments) -> str:
    """The folder to resume from; ``true`` and ``last``: the last one in `output_dir`."""
    given = str(training.resume_from_checkpoint)
    if given.lower() in ("true", "last"):
        last = get_last_checkpoint(training.output_dir) if Path(training.output_dir).is_dir() else None
        if last is None:
            raise UsageError("resume_from_checkpoint", f"got {given!r}, but {training.output_dir} has no checkpoint")
        return str(last)
    if not (Path(given) / "trainer_state.json").is_file():
        raise UsageError("resume_from_checkpoint", f"got {given!r}, accepted: a folder checkpoint-N, or last")
    return given
