"""`generated_predictions.txt` has the order of the test file, however training is sampled."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import run_translation

SAMPLE = Path(__file__).resolve().parent.parent / "examples" / "data" / "tatoeba-en-de"


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_predictions_keep_the_order_of_the_file(strategy: str, tmp_path: Path) -> None:
    options = {
        "config_name": SAMPLE / "model",
        "config_overrides": "d_model=16,encoder_layers=1,decoder_layers=1,encoder_ffn_dim=16,decoder_ffn_dim=16",
        "tokenizer_name": SAMPLE / "tokenizer",
        "source_lang": "en",
        "target_lang": "de",
        "test_file": SAMPLE / "test.json.gz",
        "max_predict_samples": 60,
        "per_device_eval_batch_size": 8,
        "train_sampling_strategy": strategy,
        "report_to": "none",
        "output_dir": tmp_path,
    }
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    parsed = run_translation.parse([*arguments, "--do_predict", "--predict_with_generate", "--use_cpu"])
    trainer, parts, _ = run_translation.prepare(*parsed)
    result = run_translation.predict(trainer, parts["test"], {"max_length": 4, "num_beams": 1})
    labels = [[token for token in row.tolist() if token >= 0] for row in result.label_ids]
    pad = trainer.processing_class.pad_token_id
    assert [[t for t in row if t != pad] for row in labels] == [list(row) for row in parts["test"]["labels"]]
    assert trainer.args.train_sampling_strategy == strategy
