"""Trains, evaluates and runs an image classifier: ResNet, ViT, Swin, ConvNeXt and their kin.

    python scripts/run_image_classification.py --config_name microsoft/resnet-50 --train_dir flowers --image_size 64 \
        --do_train --do_eval --optim lngd --optim_args preset=fast --learning_rate 1e-3 --output_dir out

The arguments are those of transformers' image-classification example (`--help` lists them); a single argument that
ends in .json is a file with them. Data are folders of images, one a class, or files, parquet or JSON lines.

Whatever is wrong with arguments or data ends the script before training, with status 2 and a last line
`error: <field>: …`; a push that the Hub does not take, after training, with status 1.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers import set_seed

from hf_lngd import LNGDTrainer
from hf_lngd.integrations import image_model
from hf_lngd.integrations.hub import push
from hf_lngd.integrations.image_args import DataArguments, ModelArguments, parse
from hf_lngd.integrations.image_batches import ImageSet, Normalise, TellEpoch
from hf_lngd.integrations.image_pixels import decode
from hf_lngd.integrations.image_report import ImageCard, ImageScores, only_logits, write_pictures, write_predictions
from hf_lngd.integrations.image_rows import Rows, class_numbers, load_rows
from hf_lngd.integrations.script_model import load_config
from hf_lngd.integrations.script_run import make_trainer, train
from hf_lngd.integrations.usage import UsageError, exit_on_usage_error

LIMITS = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}


def main() -> None:
    """Everything that can be wrong is found by `prepare`; what follows trains.

    Raises:
        UsageError: names the argument.
        RunError: all is done and saved, but the Hub does not take it.
    """
    model_args, data_args, args = parse(sys.argv[1:])
    trainer, sets, rows, classes, scores = prepare(model_args, data_args, args)
    card = ImageCard(trainer, model_args, data_args, sys.argv)
    trainer.card_writer = card
    if args.do_train:
        train(trainer, args.resume_from_checkpoint)
    if args.do_eval:
        finish(trainer, card, "eval", "validation", trainer.evaluate(metric_key_prefix="eval"))
        if trainer.is_world_process_zero():
            write_pictures(args.output_dir, sets["validation"].pixels, scores.logits, scores.labels, classes)
    if args.do_predict:
        result = trainer.predict(sets["test"], metric_key_prefix="predict")
        finish(trainer, card, "predict", "test", result.metrics)
        if trainer.is_world_process_zero():
            logits = only_logits(result.predictions)
            write_predictions(args.output_dir, rows["test"], logits, result.label_ids, classes)
    if trainer.is_world_process_zero():
        card()
    if args.push_to_hub:
        push(trainer)


def prepare(
    model_args: ModelArguments, data_args: DataArguments, args: Any
) -> tuple[LNGDTrainer, dict[str, ImageSet], dict[str, Rows], list[str], ImageScores]:
    """The trainer, the decoded parts of the data, their rows, the names of the classes, what scores."""
    wanted = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    config = load_config(model_args)
    image_model.set_size(model_args, data_args, config)
    parts = [part for part, needed in wanted.items() if needed]
    share = bool(data_args.source("train") or data_args.dataset_name)
    rows = load_rows(data_args, model_args, parts, share, args.seed)
    classes, origin = choose_classes(rows, config)
    for part in parts:
        rows[part] = rows[part].sample(getattr(data_args, LIMITS[part]), args.seed)
    numbers = {part: class_numbers(rows[part], classes, origin) for part in parts}
    image_model.set_classes(config, classes)
    processor = image_model.load_processor(model_args, data_args, config)
    set_seed(args.seed)
    model = image_model.load_model(model_args, config)
    sets = {}
    for part in parts:
        pixels, kept, folder = decode(rows[part], processor, config.num_channels, data_args.skip_corrupt_images)
        labels = None if rows[part].labels is None else numbers[part][kept]
        rows[part] = rows[part].select(kept)
        augment = data_args.augment if part == "train" else "none"
        sets[part] = ImageSet(pixels, labels, augment, args.seed, keep=folder)
    first = next(iter(sets.values()))
    collator = Normalise(processor, first.pixels.shape[1:])
    image_model.try_model(model, collator(first.__getitems__([0]))["pixel_values"], len(classes))
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # which torch would warn about
    args.remove_unused_columns = False  # batches come whole
    scores = ImageScores()
    trainer = make_trainer(
        LNGDTrainer,
        args,
        model=model,
        train_dataset=sets.get("train"),
        eval_dataset=sets.get("validation"),
        processing_class=processor,
        data_collator=collator,
        compute_metrics=scores,
        callbacks=[TellEpoch(sets["train"])] if args.do_train else None,
    )
    return trainer, sets, rows, classes, scores


def finish(trainer: LNGDTrainer, card: ImageCard, prefix: str, split: str, metrics: dict[str, Any]) -> None:
    """Print and save the metrics of a part of the data, and tell them in the card."""
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)
    card.add(split, metrics, prefix)


def choose_classes(rows: dict[str, Rows], config: Any) -> tuple[list[str], str]:
    """The classes and where they come from: training data, else the model, else what is evaluated.

    Raises:
        UsageError: nothing tells them; the model has another number of them.
    """
    if "train" in rows:
        return rows["train"].classes, "the training data"
    known = image_model.known_classes(config)
    if known:
        return known, "the model"
    for part in rows.values():
        if part.classes:
            if len(part.classes) != config.num_labels:
                found = f"{part.origin} has {len(part.classes)} classes, the model {config.num_labels} without names"
                raise UsageError(part.argument, f"{found}, accepted: data with all of them")
            return part.classes, part.origin
    return [str(number) for number in range(config.num_labels)], "the model"


if __name__ == "__main__":
    exit_on_usage_error(main)
