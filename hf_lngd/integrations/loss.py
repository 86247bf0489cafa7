"""The loss that is exact however a batch is split over micro-batches and processes.

The Trainer believes that a model whose forward takes ``**kwargs`` divides its loss by `num_items_in_batch`. Marian,
T5, BART, mBART, M2M100, ResNet and more do not: with accumulation their gradients come out too large by the number of
micro-batches. For those the loss is computed here, as summed cross entropy over that number.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

IGNORED_LABEL = -100

_LOSS_CALL = re.compile(r"self\.loss_function\((?P<arguments>[^()]*(?:\([^()]*\)[^()]*)*)\)")


def bare_model(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper, if it has one."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def ignores_num_items(model: nn.Module) -> bool:
    """True for a translation or image-classification model whose loss is a plain mean of cross entropies, read off the
    source of its forward pass. Models with further terms, of other tasks and of your own keep the loss they compute."""
    model = bare_model(model)
    mappings = (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    names = (name for mapping in mappings for name in mapping.values())
    known = {one for name in names for one in ([name] if isinstance(name, str) else name)}
    if not any(cls.__name__ in known for cls in type(model).__mro__):
        return False
    if getattr(getattr(model, "config", None), "problem_type", None) not in (None, "single_label_classification"):
        return False
    try:
        source = inspect.getsource(inspect.unwrap(type(model).forward))
    except (OSError, TypeError):
        return False
    if re.search(r"aux_loss|router|distillation", source):
        return False
    call = _LOSS_CALL.search(source)
    if call is not None:
        return "**" not in call["arguments"] and "num_items_in_batch" not in call["arguments"]
    return "CrossEntropyLoss(" in source


class SummedCrossEntropy:
    """``compute_loss_func`` for models that :func:`ignores_num_items` names; with the Trainer's `label_smoother`."""

    def __init__(self, label_smoother: Any = None) -> None:
        self.label_smoother = label_smoother

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Σ cross entropy / `num_items_in_batch`.

        Args:
            outputs: of the model; logits [..., classes].
            labels: [...], −100: ignored. None: the loss in `outputs` is returned.
            num_items_in_batch: labels of the whole step, all micro-batches and processes; None: of this batch.

        Raises:
            ValueError: labels that are no class numbers.
        """
        if labels is None:
            return outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if labels.is_floating_point() or logits.dim() != labels.dim() + 1:
            raise ValueError(
                f"labels: got {labels.dtype} {list(labels.shape)} for logits {list(logits.shape)}, accepted: class "
                "numbers, one for each row of logits; for another loss set config.problem_type or compute_loss_func"
            )
        if self.label_smoother is not None:
            return self.label_smoother({"logits": logits}, labels, num_items_in_batch=num_items_in_batch)
        flat = logits.reshape(-1, logits.shape[-1])
        if flat.dtype in (torch.float16, torch.bfloat16):
            flat = flat.float()  # a sum over a batch leaves the range of one and the precision of the other
        total = nn.functional.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED_LABEL, reduction="sum")
        count = (labels != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def with_decoder_inputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch with `decoder_input_ids` made of its labels, where an encoder-decoder would make them itself: for when
    labels are taken out of the batch before the model sees it. `DataCollatorForSeq2Seq(model=model)` does the same for
    models that have a method for it."""
    model = bare_model(model)
    labels = inputs.get("labels")
    config: Any = getattr(model, "config", None)
    given = any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    if labels is None or given or labels.dim() != 2 or not getattr(config, "is_encoder_decoder", False):
        return inputs
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if callable(prepare):
        return {**inputs, "decoder_input_ids": prepare(labels=labels)}
    start, pad = config.decoder_start_token_id, config.pad_token_id
    if start is None or pad is None:
        raise ValueError("config: decoder_start_token_id and pad_token_id: got none, accepted: token numbers")
    shifted = torch.cat((torch.full_like(labels[:, :1], start), labels[:, :-1]), 1)
    return {**inputs, "decoder_input_ids": shifted.masked_fill(shifted == IGNORED_LABEL, pad)}
