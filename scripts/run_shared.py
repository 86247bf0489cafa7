"""What run_translation.py and run_image_classification.py share: checks of arguments, configurations, training, the
card. Whoever copies one of them copies this file, too."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import EvalResult
from run_hub import HUB_ERRORS, check_hub, check_repository, push, refusal, repository_of
from transformers import CONFIG_MAPPING

from hf_lngd.integrations.card import CardFacts, write_model_card
from hf_lngd.integrations.checkpoints import STATE, last_checkpoint, numbered, problem_of
from hf_lngd.integrations.launching import launcher
from hf_lngd.integrations.trainer import lngd_of
from hf_lngd.integrations.usage import UsageError, blame, read_config, refuse_if

logger = logging.getLogger(__name__)

LOSSES = "loss_curves.png"
# What a run writes besides the model; the first is of the last run, whatever that did.
RESULTS = ["all_results.json", "train_results.json", "eval_results.json", "predict_results.json", "routing.json"]
RESULTS += ["generated_predictions.txt", "predictions.csv", LOSSES, "confusion_matrix.png", "worst_mistakes.png"]
# The parts of the data, and the arguments that limit them.
LIMITS = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}
# Training arguments that transformers checks in the middle of a run only, and their least values.
_LEAST = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
_LEAST |= {"generation_num_beams": 1, "generation_max_length": 1, "learning_rate": 0, "weight_decay": 0}
_LEAST |= {"label_smoothing_factor": 0, "num_train_epochs": 0}
_COMMA = re.compile(r",(?![^\[]*\])")  # between two overrides, not inside a list
# Configurations derive these from their lists (stages from depths).
_DERIVED = ("stage_names", "out_features", "out_indices", "transformers_version", "model_type", "architectures")


def check_data(data: Any, endings: tuple[str, ...], kind: str) -> None:
    """Raise UsageError for a whole number below 1, and for a file of data that is none of that kind."""
    name, config = data.dataset_name, data.dataset_config_name
    refuse_if(config and not name, "dataset_config_name", f"got {config!r} without --dataset_name")
    for field, value in vars(data).items():
        is_count = isinstance(value, int) and not isinstance(value, bool)
        refuse_if(is_count and value < 1, field, f"got {value}, accepted: an integer, at least 1")
        if field.endswith("_file") and value is not None:
            ends = f"got {value!r}, accepted: a file that ends in {', '.join(endings)}"
            refuse_if(not value.endswith(endings), field, ends)
            refuse_if(not Path(value).is_file(), field, f"got {value!r}, which is no file, accepted: a file of {kind}")


def check_training(model: Any, training: Any) -> None:
    """What transformers finds out only in the middle of a run; `resume_from_checkpoint` becomes a folder."""
    given = model.model_name_or_path or model.config_name
    refuse_if(not given, "model_name_or_path", "got none, accepted: a model, or --config_name to begin from nothing")
    parts = "got none of --do_train, --do_eval, --do_predict, accepted: at least one"
    refuse_if(not wanted_parts(training), "do_train", parts)
    for name, least in _LEAST.items():
        value = getattr(training, name, None)
        is_less = value is not None and not value >= least
        refuse_if(is_less, name, f"got {value}, accepted: a number, at least {least}")
    is_one = training.label_smoothing_factor >= 1
    refuse_if(is_one, "label_smoothing_factor", f"got {training.label_smoothing_factor}, accepted: in [0, 1)")
    endless = training.do_train and training.max_steps <= 0 and not training.num_train_epochs
    refuse_if(endless, "num_train_epochs", "got 0, accepted: above 0, or --max_steps")
    check_hub(training)
    training.resume_from_checkpoint = find_checkpoint(training)
    folder, whole = training.output_dir, ("*model*.safetensors", "*model*.bin")
    there = [path.name for path in (*numbered(folder), *(path for name in whole for path in Path(folder).glob(name)))]
    replaces = training.do_train and there and not goes_on(training) and not model.overwrite_output_dir
    what = f"got {folder!r}, which has {', '.join(there[:3])} of another run, accepted: another folder, "
    refuse_if(replaces, "output_dir", what + "--resume_from_checkpoint last, --overwrite_output_dir true")


def goes_on(training: Any) -> bool:
    """Whether the run goes on with one that is in its `output_dir`."""
    checkpoint = training.resume_from_checkpoint
    return bool(checkpoint) and Path(checkpoint).resolve().parent == Path(training.output_dir).resolve()


def clear(training: Any) -> None:
    """Remove what another run has left in `output_dir`: results, which would be taken for this run's, and checkpoints,
    from which it would be resumed."""
    folder = Path(training.output_dir)
    for name in RESULTS if training.do_train else RESULTS[:1]:
        (folder / name).unlink(missing_ok=True)
    for path in numbered(folder) if training.do_train and not goes_on(training) else ():
        shutil.rmtree(path)


def find_checkpoint(training: Any) -> str | None:
    """The folder to resume from; ``true`` and ``last``: the last one in `output_dir`.

    ``last`` is for a command that is run again until it is through: without a checkpoint it starts anew, and warns.
    """
    field, given, folder = "resume_from_checkpoint", training.resume_from_checkpoint, training.output_dir
    if not given or str(given).lower() not in ("true", "last"):
        problem = problem_of(given) if given else None
        refuse_if(problem, field, f"got {given!r}, which {problem}, accepted: a folder checkpoint-N, or last")
        return str(given) if given else None
    last, finished = last_checkpoint(folder), next((p for p in numbered(folder) if (p / STATE).is_file()), None)
    if last is None and finished is not None:  # to start anew would be to lose what it held
        what = f"got {given!r}, but {finished} {problem_of(finished)}, accepted: a whole checkpoint (or none at all)"
        raise UsageError(field, what)
    if last is None:
        refuse_if(str(given).lower() == "true", field, f"got {given!r}, but {folder} has no checkpoint")
        logger.warning("%s has no checkpoint yet: training starts at the beginning (resume_from_checkpoint)", folder)
    return last


def wanted_parts(training: Any) -> list[str]:
    """The parts of the data that are needed."""
    needed = {"train": training.do_train, "validation": training.do_eval, "test": training.do_predict}
    return [part for part in LIMITS if needed[part]]


def hub_options(args: Any) -> dict[str, Any]:
    """Keyword arguments of every ``from_pretrained``."""
    options = {"cache_dir": args.cache_dir, "revision": args.model_revision, "token": args.token}
    return {**options, "trust_remote_code": args.trust_remote_code}


def load_dataset(data: Any, model: Any) -> Any:
    """`dataset_name`, a folder or a name on the Hub, with all its parts."""
    name, config = data.dataset_name, data.dataset_config_name
    with blame("dataset_name", f"got {name!r}"):
        return datasets.load_dataset(name, config, cache_dir=model.cache_dir, token=model.token)


def token_fields(config: Any, tokenizer: Any) -> dict[str, int]:
    """What a tokenizer decides of a configuration: sizes of vocabularies, and all tokens that are padding, end or start
    by default, the decoder's first one among them."""
    kinds = [f"{kind}_token_id" for kind in ("bos", "eos", "pad")]
    own = {getattr(config, kind, None): getattr(tokenizer, kind) for kind in kinds}
    defaults = {name: value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    fields = {name: own[value] for name, value in defaults.items() if value is not None and own.get(value) is not None}
    if not hasattr(config, "decoder_start_token_id"):
        fields["decoder_start_token_id"] = tokenizer.pad_token_id  # T5's, which only its saved configurations name
    return fields | {name: len(tokenizer) for name in ("vocab_size", "decoder_vocab_size") if hasattr(config, name)}


def load_config(args: Any, factory: Any, kind: str, tokenizer: Any = None) -> Any:
    """The configuration with ``config_overrides``: ``name=value,name=value``; ``none`` and ``[1,2]`` are values.

    With a type of model for its name it is that type's default, with `token_fields` of the tokenizer. It has to be one
    that `factory` (an Auto class) makes a `kind` model of.
    """
    field = "config_name" if args.config_name else "model_name_or_path"
    name = getattr(args, field)
    config = read_config(field, name, **hub_options(args))
    is_made = type(config) in factory._model_mapping or factory.__name__ in (getattr(config, "auto_map", None) or {})
    refuse_if(not is_made, field, f"got {name!r} (a {config.model_type}), accepted: a model for {kind}")
    if tokenizer is not None and name in CONFIG_MAPPING and not Path(name).exists():
        config.update(token_fields(config, tokenizer))
    rebuilt: dict[str, Any] = {}
    for item in _COMMA.split(args.config_overrides) if args.config_overrides else []:
        name, equals, value = (part.strip() for part in item.partition("="))
        refuse_if(not equals or "=" in value, "config_overrides", f"got {item!r}, accepted: name=value,name=value")
        close = " or ".join(difflib.get_close_matches(name, config.to_dict(), n=3, cutoff=0.5))
        hint = f"did you mean {close}?" if close else f"accepted: fields of {type(config).__name__}"
        refuse_if(not hasattr(config, name), "config_overrides", f"unknown name {name!r}; {hint}")
        old, new = getattr(config, name), value
        with contextlib.suppress(ValueError):  # a list, a number, true or false, as JSON has them; else a text
            new = json.loads(value)
        is_list = isinstance(old, (list, tuple)) or value.startswith("[")
        with blame("config_overrides", f"{name}: got {value!r}"):
            if value.lower() == "none":
                setattr(config, name, None)
            elif is_list and not isinstance(new, list):
                raise ValueError("accepted: a list, e.g. [1,2]")
            elif is_list or old is None:
                rebuilt[name] = new
            else:
                config.update_from_string(f"{name}={value}")
    if not rebuilt:
        return config
    kept = {name: value for name, value in config.to_diff_dict().items() if name not in _DERIVED}
    with blame("config_overrides", f"got {args.config_overrides!r}"):
        return type(config)(**{**kept, **rebuilt})  # what the class derives from a list follows


def make_model(factory: Any, args: Any, config: Any, kind: str, **options: Any) -> Any:
    """A model of `factory` (an Auto class): loaded, or drawn anew without `model_name_or_path`."""
    fields = ("config_overrides", "model_name_or_path", "config_name")
    field, name = next((field, getattr(args, field)) for field in fields if getattr(args, field))
    with blame(field, f"got {name!r}, which makes no {kind} model"):
        if args.model_name_or_path:
            return factory.from_pretrained(args.model_name_or_path, config=config, **hub_options(args), **options)
        return factory.from_config(config, trust_remote_code=args.trust_remote_code)


def make_trainer(factory: Callable[..., Any], args: Any, **parts: Any) -> Any:
    """A `factory` of `args` and `parts`. UsageError: no folder to write, no repository, no way for LNGD to run."""
    with blame("output_dir", f"got {args.output_dir!r}, accepted: a folder that can be written"):
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output_dir).close()
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # which torch would warn about
    try:
        trainer = factory(args=args, **parts)
    except HUB_ERRORS as error:
        raise refusal(error, args) from error
    except (RuntimeError, ValueError, OSError) as error:
        named = "report_to" if any(name in str(error) for name in args.report_to) else "arguments"
        raise UsageError("optim" if str(error).startswith("LNGD") else named, error) from error
    check_repository(trainer)
    if trainer.is_world_process_zero():
        clear(args)
    return trainer


def train(trainer: Any) -> None:
    """Train; save model, tokenizer or image processor, metrics, and for LNGD ``routing.json``.

    Raises:
        UsageError: an optimizer that cannot be made: its package is missing, its settings do not fit the model.
    """
    try:
        result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except (ImportError, ValueError) as error:
        if trainer.optimizer is not None or isinstance(error, UsageError):
            raise
        field, _, what = str(error).partition(": ")
        raise (UsageError(field, what) if hasattr(trainer.args, field) else UsageError("optim", error)) from error
    trainer.save_model(_internal_call=True)  # else it is pushed now, and a Hub that is down costs the evaluation
    metrics = {**result.metrics, "train_samples": len(trainer.train_dataset)}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    path, lngd = Path(trainer.args.output_dir) / "routing.json", lngd_of(trainer.optimizer)
    if trainer.is_world_process_zero() and lngd is not None:
        routing: dict[str, Any] = {"optimizer": "lngd", "config": lngd.config.to_dict(), "memory": lngd.memory_usage()}
        routing["groups"] = [{"name": group["name"], "tensors": len(group["params"])} for group in lngd.param_groups]
        routing["parameters"] = [dataclasses.asdict(route) for route in lngd.routing()]
        path.write_text(json.dumps(routing, indent=2) + "\n", encoding="utf-8")


@functools.cache
def pyplot() -> Any:
    """matplotlib's pyplot, which draws into files; None, and a warning once, where that extra is not installed."""
    try:
        import matplotlib
    except ImportError:
        logger.warning("no pictures: matplotlib is not installed; pip install 'hf_lngd[plot]'")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def draw_losses(folder: str | Path, history: Sequence[Mapping[str, Any]], title: str) -> bool:
    """Draw :data:`LOSSES`, loss against steps of a Trainer's log, into a model's folder; True if it is there now.
    Without two training losses there is no curve, and an old picture is removed."""
    path = Path(folder) / LOSSES
    plt = pyplot() if sum("loss" in entry for entry in history) > 1 else None
    if plt is None:
        path.unlink(missing_ok=True)
        return False
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for key, name, colour in (("loss", "training", "#0f766e"), ("eval_loss", "validation", "#d97706")):
        points = {entry["step"]: entry[key] for entry in history if key in entry}
        if points:
            marker = "o" if len(points) <= 20 else None
            axis.plot(list(points), list(points.values()), label=name, color=colour, marker=marker)
    axis.set(xlabel="step", ylabel="loss, nats", title=title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


class CardWriter:
    """Takes the metrics of each part of the data, and writes the card; the Trainer calls it before it pushes.

    `metrics`: (the Hub's metric, the name as it is shown) by the key in the Trainer's metrics; `facts`: fields of
    `CardFacts` that the task knows, `task`, `dataset_name`, `dataset_type` at least.
    """

    def __init__(self, trainer: Any, model: Any, data: Any, metrics: dict[str, tuple[str, str]], **facts: Any) -> None:
        self.trainer, self.model, self.data, self.metrics, self.facts = trainer, model, data, metrics, facts
        processes = max(1, trainer.args.world_size)
        self.command = [*launcher(processes, int(os.environ.get("LOCAL_WORLD_SIZE", processes))), *sys.argv]
        self.scores: list[EvalResult] = []
        self.pictures: list[tuple[str, str]] = []  # what it shows, file
        self._written = False
        trainer.card_writer = self

    def add(self, prefix: str, split: str, metrics: dict[str, Any], signatures: dict[str, str] | None = None) -> None:
        """Print and save the metrics of a part of the data, with the signatures of scores; tell them in the card."""
        signatures = {key: text for key, text in (signatures or {}).items() if f"{prefix}_{key}" in metrics}
        metrics.update({f"{prefix}_{key}_signature": text for key, text in signatures.items()})
        self.trainer.log_metrics(prefix, metrics)
        self.trainer.save_metrics(prefix, metrics)
        data = {name: self.facts[name] for name in ("dataset_name", "dataset_type")}
        data |= {"task_type": self.facts["task"], "dataset_config": self.data.dataset_config_name}
        for key, (metric, name) in self.metrics.items():
            if (value := metrics.get(f"{prefix}_{key}")) is not None:
                signed = {"signature": signatures[key]} if key in signatures else None
                own: dict[str, Any] = {"metric_type": metric, "metric_name": name, "metric_value": value}
                self.scores.append(EvalResult(**data, **own, dataset_split=split, metric_args=signed))

    def __call__(self) -> Path:
        """Write README.md into the output folder; an evaluation alone leaves one that is there as it is."""
        args, net, lngd = self.trainer.args, self.trainer.model, lngd_of(self.trainer.optimizer)
        path = Path(args.output_dir) / "README.md"
        if path.is_file() and not args.do_train and not self._written:
            return path
        self._written = True
        name, config = self.data.dataset_name, self.data.dataset_config_name
        title = repository_of(args).split("/")[-1]
        curves = args.do_train and draw_losses(args.output_dir, self.trainer.state.log_history, title)
        examples = len(self.trainer.train_dataset or ())
        file = self.data.train_file or getattr(self.data, "train_dir", None)
        facts = CardFacts(
            name=title,
            dataset_config=config,
            dataset_on_hub=bool(name) and not Path(name).exists(),
            file=Path(file).name if file else None,
            examples=examples,
            seen=round(min(1.0, self.trainer.state.epoch or 0.0) * examples),
            scores=self.scores,
            pictures=self.pictures,
            command=self.command,
            base_model=self.model.model_name_or_path,
            license=self.data.data_license,
            architecture=type(net).__name__,
            parameters=sum(p.numel() for p in net.parameters()),
            routing=None if lngd is None else lngd.routing_table(),
            curves=LOSSES if curves else None,
            trained=args.do_train,
            **self.facts,
        )
        return write_model_card(args.output_dir, facts, args)

    def finish(self) -> None:
        """The last of a run: the card is written, all is pushed."""
        if self.trainer.is_world_process_zero():
            self()
        if self.trainer.args.push_to_hub:
            push(self.trainer)


def model_name(trainer: Any) -> str:
    """What the model is loaded by, in quotes: its repository or its folder."""
    args = trainer.args
    return json.dumps(trainer.hub_model_id or args.hub_model_id or args.output_dir, ensure_ascii=False)


def read_attribution(given: str | None, beside: str | Path | None) -> str | None:
    """The text that was given, or the file ATTRIBUTION.md beside the training data, its headings one level down."""
    path = Path(beside).parent / "ATTRIBUTION.md" if beside else None
    if given or path is None or not path.is_file():
        return given or None
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(f"##{line}" if line.startswith("#") else line for line in lines)
