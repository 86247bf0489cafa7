"""One loss and one gradient however the batch of a step is split, for models of every task; or a warning by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_lngd import LNGDTrainer, LNGDTrainerMixin, LNGDTrainingArguments
from tests.hf_helpers import hf_images, hf_vit

LAYOUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 1,
    "disable_tqdm": True,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "learning_rate": 0.1,
    "optim": "sgd",
}
Row = dict[str, Any]
TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LENGTHS = (5, 9, 7, 4, 8, 6, 9, 3)  # of the eight rows


def labels_of(length: int, most: int, draw: torch.Generator, classes: int = 40) -> torch.Tensor:
    labels = torch.full((most,), -100)
    labels[:length] = torch.randint(2, classes, (length,), generator=draw)
    return labels


def rows(make: Callable[[int, torch.Generator], Row]) -> list[Row]:
    draw = torch.Generator().manual_seed(0)
    return [make(length, draw) for length in LENGTHS]


def tokens(length: int, draw: torch.Generator) -> Row:
    mask = (torch.arange(9) < length).long()
    return {"input_ids": torch.randint(2, 40, (9,), generator=draw) * mask, "attention_mask": mask}


def causal(length: int, draw: torch.Generator) -> Row:
    row = tokens(length, draw)
    return {**row, "labels": row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)}


def pixels(draw: torch.Generator, size: int = 32) -> torch.Tensor:
    return torch.randn(3, size, size, generator=draw)


def segmentation(length: int, draw: torch.Generator) -> Row:
    labels = torch.randint(0, 3, (32, 32), generator=draw)
    labels[length:] = 255  # what Segformer leaves out
    return {"pixel_values": pixels(draw), "labels": labels}


def convnext() -> nn.Module:
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "num_channels": 3, "patch_size": 2}
    return ConvNextForImageClassification(ConvNextConfig(**sizes, num_labels=3, drop_path_rate=0.0))


def segformer() -> nn.Module:
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_attention_heads": [1, 2], "decoder_hidden_size": 8}
    blocks = {"num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2]}
    config = SegformerConfig(**sizes, **blocks, mlp_ratios=[2, 2], num_labels=3, drop_path_rate=0.0)
    config.classifier_dropout_prob = 0.0
    model = SegformerForSemanticSegmentation(config)
    for module in model.modules():  # batch norm is each micro-batch's own
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
            module.forward = lambda x: x  # type: ignore[method-assign]
    return model


def whisper() -> nn.Module:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 4, "vocab_size": 40}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    places = {"max_source_positions": 8, "max_target_positions": 16}
    config = WhisperConfig(**heads, **sizes, **ids, **places, begin_suppress_tokens=None, suppress_tokens=None)
    return WhisperForConditionalGeneration(config)


def wav2vec(reduction: str) -> nn.Module:
    sizes = {**TINY, "vocab_size": 12, "conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 4)}
    off = dict.fromkeys(
        ("activation_dropout", "attention_dropout", "hidden_dropout", "feat_proj_dropout", "final_dropout"), 0.0
    )
    more = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "mask_time_prob": 0.0}
    config = Wav2Vec2Config(**sizes, **off, **more, num_feat_extract_layers=2, ctc_loss_reduction=reduction)
    config.feat_extract_norm = "layer"
    return Wav2Vec2ForCTC(config)


def bert(kind: Any, **values: Any) -> nn.Module:
    return kind(BertConfig(**TINY, **values))


CASES: dict[str, tuple[Callable[[], nn.Module], list[Row], str]] = {
    "image classification": (convnext, rows(lambda n, g: {"pixel_values": pixels(g), "labels": n % 3}), "labels"),
    "segmentation": (segformer, rows(segmentation), "labels"),
    "speech, encoder-decoder": (
        whisper,
        rows(lambda n, g: {"input_features": torch.randn(4, 16, generator=g), "labels": labels_of(n, 9, g)}),
        "labels",
    ),
    "speech, CTC, mean": (
        lambda: wav2vec("mean"),
        rows(lambda n, g: {"input_values": torch.randn(400, generator=g), "labels": labels_of(n, 9, g, 12)}),
        "rows",
    ),
    "speech, CTC, sum": (
        lambda: wav2vec("sum"),
        rows(lambda n, g: {"input_values": torch.randn(400, generator=g), "labels": labels_of(n, 9, g, 12)}),
        "sum",
    ),
    "token classification": (
        lambda: bert(BertForTokenClassification, num_labels=3),
        rows(lambda n, g: {**tokens(n, g), "labels": labels_of(n, 9, g, 3)}),
        "labels",
    ),
    "several labels": (
        lambda: bert(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification"),
        rows(lambda n, g: {**tokens(n, g), "labels": torch.rand(3, generator=g)}),
        "rows",
    ),
    "question answering": (
        lambda: bert(BertForQuestionAnswering),
        rows(lambda n, g: {**tokens(n, g), "start_positions": n - 2, "end_positions": n - 1}),
        "rows",
    ),
    "causal language model": (
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        ),
        rows(causal),
        "divided",
    ),
}


def train(folder: Path, model: nn.Module, data: Any, batch: int, accumulated: int, **values: Any) -> LNGDTrainer:
    layout = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    trainer = LNGDTrainer(
        model, LNGDTrainingArguments(str(folder), **{**SETTINGS, **layout, **values}), train_dataset=data
    )
    trainer.train()
    return trainer


def in_double(row: Row) -> Row:
    return {
        key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in row.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_one_step_whatever_the_layout_of_the_batch(name: str, tmp_path: Path) -> None:
    make, data, kind = CASES[name]
    found = []
    for batch, accumulated in LAYOUTS:
        torch.manual_seed(0)
        trainer = train(tmp_path, make().double(), [in_double(row) for row in data], batch, accumulated)
        assert trainer._exact_loss is not None
        # labels and rows are the same where each row has one label
        assert accumulated == 1 or trainer._exact_loss.kind == kind
        loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        found.append((loss, dict(trainer.model.state_dict())))
    for loss, weights in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-4)  # as it is logged
        for key, value in found[0][1].items():
            torch.testing.assert_close(weights[key], value, rtol=1e-6, atol=1e-9, msg=lambda text, key=key: key + text)


class Weighted(nn.Module):
    """Whose mean is one over weights of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        weight = torch.tensor([1.0, 9.0], dtype=x.dtype)
        return {"loss": nn.functional.cross_entropy(self.layer(x), labels, weight=weight)}


def weighted() -> list[Row]:
    draw = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(4, generator=draw).double(), "labels": i % 2} for i in range(8)]


def test_a_loss_that_is_no_such_mean_is_named_and_is_the_mean_of_micro_batches(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    trainer = train(tmp_path, Weighted().double(), weighted(), 4, 2)
    assert "Weighted: its loss is no mean over labels or rows" in caplog.text
    assert "the mean of its micro-batches' losses" in caplog.text
    torch.manual_seed(0)
    model, halves = Weighted().double(), (weighted()[:4], weighted()[4:])
    losses = [
        model(torch.stack([row["x"] for row in half]), torch.tensor([row["labels"] for row in half]))["loss"]
        for half in halves
    ]
    (sum(losses) / 2).backward()
    expected = model.layer.weight - 0.1 * model.layer.weight.grad
    torch.testing.assert_close(trainer.model.layer.weight, expected)


def test_a_loss_of_which_a_part_is_divided_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_local_experts": 4, "num_key_value_heads": 2, "output_router_logits": True}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=40, router_aux_loss_coef=0.1, **sizes, **experts))
    train(tmp_path, model, rows(causal), 2, 2)
    assert "MixtralForCausalLM: its loss is no mean" in caplog.text
    assert "in part the sum over micro-batches" in caplog.text


def test_nothing_is_measured_or_said_where_no_step_is_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []
    model = Weighted().double()
    model.register_forward_hook(lambda *_: calls.append(1))
    trainer = train(tmp_path, model, weighted(), 4, 1)
    assert trainer._exact_loss is not None and trainer._exact_loss.kind is None
    assert len(calls) == 1 and "mean" not in caplog.text


def test_measuring_leaves_the_random_numbers_of_training_alone(tmp_path: Path) -> None:
    """Dropout draws as it would without; the mode of the model is training's again."""
    found = []
    for known in (None, "divided"):
        args = LNGDTrainingArguments(str(tmp_path), **{**SETTINGS, "gradient_accumulation_steps": 2, "max_steps": 2})
        trainer = LNGDTrainer(hf_vit(hidden_dropout_prob=0.3), args, train_dataset=hf_images(32))
        trainer._exact_loss.kind = known
        trainer.train()
        assert trainer._exact_loss.kind == "divided"
        found.append(trainer.model.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


class OwnLoss(Trainer):
    """Normalises by itself, as trl's trainers do."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


class OwnLossWithMixin(LNGDTrainerMixin, OwnLoss):
    """The same with the mixin before it."""


def test_a_loss_of_the_users_own_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = LNGDTrainingArguments(str(tmp_path), gradient_accumulation_steps=2, **SETTINGS)
    given = LNGDTrainer(Weighted(), args, train_dataset=weighted(), compute_loss_func=lambda *_, **__: torch.zeros(()))
    own = OwnLossWithMixin(Weighted().double(), args, train_dataset=weighted())
    own.train()
    assert given._exact_loss is None and own._exact_loss is None and not caplog.text
