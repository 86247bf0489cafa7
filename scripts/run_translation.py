"""Trains, evaluates and runs a translation model: Marian, T5, mBART, M2M100, BART and their kin.

    python scripts/run_translation.py --model_name_or_path Helsinki-NLP/opus-mt-en-de --source_lang en \
        --target_lang de --train_file train.json.gz --validation_file validation.json.gz --do_train --do_eval \
        --predict_with_generate --optim lngd --optim_args preset=fast --learning_rate 1e-3 --output_dir out

The arguments are those of transformers' translation example (`--help` lists them); a single argument that ends in
.json is a file with them. Data are JSON lines, `{"translation": {"en": "…", "de": "…"}}`, gzipped or not.

Whatever is wrong with arguments or data ends the script before training, with status 2 and a last line
`error: <field>: …`; a push that the Hub does not take, after training, with status 1.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers import DataCollatorForSeq2Seq, set_seed

from hf_lngd import LNGDSeq2SeqTrainer
from hf_lngd.integrations.hub import push
from hf_lngd.integrations.script_run import make_trainer, train
from hf_lngd.integrations.translation_args import DataArguments, ModelArguments, parse
from hf_lngd.integrations.translation_data import first, load_pairs, tokenize
from hf_lngd.integrations.translation_model import limit_lengths, load_model, load_tokenizer, set_languages
from hf_lngd.integrations.translation_report import TranslationCard, TranslationScores, write_predictions
from hf_lngd.integrations.usage import exit_on_usage_error

LIMITS = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}


def main() -> None:
    """Everything that can be wrong is found by `prepare`; what follows trains.

    Raises:
        UsageError: names the argument.
        RunError: all is done and saved, but the Hub does not take it.
    """
    model_args, data_args, args = parse(sys.argv[1:])
    trainer, parts, scores = prepare(model_args, data_args, args)
    card = TranslationCard(trainer, model_args, data_args, sys.argv)
    trainer.card_writer = card
    if args.do_train:
        train(trainer, args.resume_from_checkpoint)
    generation = {"max_length": data_args.eval_target_length, "num_beams": data_args.num_beams}
    if args.do_eval:
        metrics = trainer.evaluate(metric_key_prefix="eval", **generation)
        finish(trainer, scores, card, "eval", "validation", metrics)
    if args.do_predict:
        result = predict(trainer, parts["test"], generation)
        finish(trainer, scores, card, "predict", "test", result.metrics)
        if args.predict_with_generate and trainer.is_world_process_zero():
            write_predictions(args.output_dir, scores.decode(result.predictions))
    if trainer.is_world_process_zero():
        card()
    if args.push_to_hub:
        push(trainer)


def predict(trainer: LNGDSeq2SeqTrainer, dataset: Any, generation: dict[str, Any]) -> Any:
    """Predictions in the order of the file: a Trainer that groups by length shuffles what it predicts, too."""
    strategy = trainer.args.train_sampling_strategy
    trainer.args.train_sampling_strategy = "sequential"
    try:
        return trainer.predict(dataset, metric_key_prefix="predict", **generation)
    finally:
        trainer.args.train_sampling_strategy = strategy


def prepare(
    model_args: ModelArguments, data_args: DataArguments, args: Any
) -> tuple[LNGDSeq2SeqTrainer, dict[str, Any], TranslationScores]:
    """The trainer, the tokenized parts of the data, and what scores translations."""
    wanted = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    pairs = load_pairs(data_args, model_args, [part for part, needed in wanted.items() if needed])
    set_seed(args.seed)
    tokenizer = load_tokenizer(model_args)
    model = load_model(model_args, tokenizer)
    set_languages(model, tokenizer, data_args)
    limit_lengths(model, data_args)
    parts = {}
    for part, rows in pairs.items():
        length = data_args.max_target_length if part == "train" else data_args.eval_target_length
        with args.main_process_first(desc=f"tokenizing {part}"):
            chosen = first(rows, getattr(data_args, LIMITS[part]))
            parts[part] = tokenize(chosen, tokenizer, data_args, length, part)
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # which torch would warn about
    if args.generation_max_length is None:
        args.generation_max_length = data_args.eval_target_length
    if not model_args.model_name_or_path:  # a trained model knows how much it may say, a new one is told
        model.generation_config.max_length = data_args.eval_target_length
    scores = TranslationScores(tokenizer)
    collator = DataCollatorForSeq2Seq(
        tokenizer,
        model=model,
        label_pad_token_id=-100 if data_args.ignore_pad_token_for_loss else tokenizer.pad_token_id,
        pad_to_multiple_of=8 if args.fp16 else None,
    )
    trainer = make_trainer(
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


def finish(
    trainer: LNGDSeq2SeqTrainer, scores: TranslationScores, card: TranslationCard, prefix: str, split: str, metrics: Any
) -> None:
    """Print and save the metrics of a part of the data, with the scores' signatures."""
    signatures = scores.signatures if f"{prefix}_bleu" in metrics else {}
    metrics.update({f"{prefix}_{name}_signature": signature for name, signature in signatures.items()})
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)
    card.add(split, metrics, prefix, signatures)


if __name__ == "__main__":
    exit_on_usage_error(main)
