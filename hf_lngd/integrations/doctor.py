"""``python -m hf_lngd doctor MODEL``: before any training, what a run says at its start: who owns which parameter, what
weight decay does, factors, bytes of state, and the batch from which on a step costs little beside AdamW's.

    python -m hf_lngd doctor MODEL [--optim_args name=value,...] [--task TASK]

TASK: auto, or translation, image, speech (to text), ctc, audio (classification), masked, text, classification.

MODEL is a folder with a config.json, such a file, a type of model (marian), or a name on the Hub. Only the
configuration is read: weights are neither loaded nor downloaded. On the meta device nothing is computed or stored, so a
model of any size takes seconds; where a forward needs numbers (DeBERTa's, Mamba's) a model of up to 500 million
parameters makes a step on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..config import LNGDConfig
from ..optimizer import LNGD
from .forecast import batches_for, counting, step_to_adamw
from .startup import report
from .training_args import take_lr
from .usage import UsageError, UsageParser, blame, option, read_config, refuse_if

FACTORIES: dict[str, Any] = {
    "translation": transformers.AutoModelForSeq2SeqLM,
    "image": transformers.AutoModelForImageClassification,
    "speech": transformers.AutoModelForSpeechSeq2Seq,
    "ctc": transformers.AutoModelForCTC,
    "audio": transformers.AutoModelForAudioClassification,
    "masked": transformers.AutoModelForMaskedLM,  # before text: BERT's kind can be built for it, and is not made for it
    "text": transformers.AutoModelForCausalLM,
    "classification": transformers.AutoModelForSequenceClassification,
}
# A batch: two images (for batch norm), of configurations that do not tell of such a size; one text, as some models have
# no padding.
_IMAGES, _CHANNELS, _SIZE, _TOKENS = 2, 3, 224, 8
_SAMPLES, _FRAMES = 16_000, 64  # of sound: a second of a wave, and of spectra where the configuration does not tell
_PRICES = (1.5, 1.2, 1.1)  # steps of AdamW's
_MOST_ON_CPU = 500_000_000  # parameters


@dataclass
class DoctorArguments:
    """What `doctor` accepts after the model."""

    optim_args: str | None = option(None, "as the Trainer's: name=value,name=value")
    task: str = option("auto", f"auto, {', '.join(FACTORIES)}")


def doctor(argv: list[str]) -> None:
    """Print the report; raises UsageError, which names the argument."""
    if argv and argv[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return
    given = repr(argv[0]) if argv else "none"
    missing = f"got {given}, accepted: a folder, a config.json, a type of model, a Hub name, before any option"
    refuse_if(not argv or argv[0].startswith("-"), "model", missing)
    (args,) = UsageParser(DoctorArguments, prog="python -m hf_lngd doctor").parse(argv[1:])
    try:
        settings = LNGDConfig.from_optim_args(take_lr(args.optim_args)[1])
    except ValueError as error:
        raise UsageError("optim_args", str(error).removeprefix("optim_args: ")) from error
    config = read_config("model", argv[0], trust_remote_code=False)
    model, optimizer, inputs = step_of(config, task_of(config, args.task), settings)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(route.numel for route in optimizer.routing())
    print(f"{argv[0]}: {type(model).__name__}, {total:,} parameters, {trained:,} trained\n")
    print(report(optimizer))
    print(price_line(model, optimizer, inputs))


def price_line(model: Any, optimizer: LNGD, batch: dict[str, Tensor]) -> str:
    """The batches with which a step takes so many of AdamW's, see `forecast`; "" where there is no forecast."""
    with counting(model, optimizer) as work:
        model(**batch)
    if step_to_adamw(optimizer, work) is None:
        return ""
    inputs = batch[model.main_input_name]
    is_text = inputs.dim() == 2 and not inputs.is_floating_point()
    count, what = (inputs.numel(), "tokens") if is_text else (len(inputs), f"inputs {list(inputs.shape[1:])}")
    needed = {price: count * batches_for(optimizer, work, price) for price in _PRICES}
    said = ", ".join(f"{price} with {math.ceil(x):,}" for price, x in needed.items() if math.isfinite(x))
    return f"a step in AdamW's, by its matmuls, with so many {what} in a batch: {said}"


def task_of(config: Any, wanted: str) -> str:
    """The task, or for ``auto`` that of the architecture that the configuration names, else the first that fits; raises
    UsageError where none does."""
    refuse_if(wanted not in ("auto", *FACTORIES), "task", f"got {wanted!r}, accepted: auto, {', '.join(FACTORIES)}")
    fitting: dict[str, set[str]] = {}  # task → classes of such models
    for task, factory in FACTORIES.items():
        found = factory._model_mapping.get(type(config), ())
        if found:
            fitting[task] = {cls.__name__ for cls in (found if isinstance(found, tuple) else (found,))}
    if wanted in fitting:
        return wanted
    others = f"this one can do: {', '.join(fitting) or 'none of them'}"
    field = "task" if fitting else "model"
    refuse_if(wanted != "auto" or not fitting, field, f"got {config.model_type!r} for {wanted}; {others}")
    named = [task for task, names in fitting.items() if names & set(getattr(config, "architectures", None) or ())]
    return (named or list(fitting))[0]


def step_of(config: Any, task: str, settings: LNGDConfig) -> tuple[nn.Module, LNGD, dict[str, Tensor]]:
    """A model, its optimizer after a step, and the batch: on the meta device, or where a forward needs numbers and the
    model is no larger than `_MOST_ON_CPU`, on the CPU. UsageError: there is no such step."""
    model, inputs = build(config, task)
    size = sum(p.numel() for p in model.parameters())
    try:
        return model, _step(model, inputs, settings), inputs
    except Exception as error:
        no_forward = f"got {config.model_type!r}, whose forward does not run on the meta device"
        refuse_if(size > _MOST_ON_CPU, "model", f"{no_forward}, and which is too large for the CPU: {error}")
    model, inputs = build(config, task, "cpu")
    with blame("model", f"{no_forward}, nor on the CPU"):
        return model, _step(model, inputs, settings), inputs


def _step(model: nn.Module, inputs: dict[str, Tensor], settings: LNGDConfig) -> LNGD:
    optimizer = LNGD(model, settings)
    logits = model(**inputs).logits
    if optimizer.needs_fisher_pass:
        optimizer.fisher_backward(logits)
    logits.sum().backward()
    optimizer.step()
    return optimizer


def build(config: Any, task: str, device: str = "meta") -> tuple[nn.Module, dict[str, Tensor]]:
    """The model with random weights, in training mode, and a batch without labels; UsageError: it cannot be."""
    config.architectures = list(getattr(config, "architectures", None) or [])  # the Auto classes need a list
    config.apply_spec_augment = False  # of sound: reads where it masks
    # LNGD takes no weights of float16; others than these two look into masks and at which expert has what, and the meta
    # device has no numbers
    half = getattr(config, "dtype", None) in (torch.float16, "float16")
    implementations = {"attn_implementation": "eager", "experts_implementation": "batched_mm"}
    options = {**implementations, "trust_remote_code": False, **({"dtype": torch.float32} if half else {})}
    with blame("model", f"got {config.model_type!r}, which cannot be built"), torch.device(device):
        model = FACTORIES[task].from_config(config, **options).train()
        is_ids = task not in ("image", "speech", "ctc", "audio")
        shape = _ids(config) if is_ids else _image(config) if task == "image" else _sound(config)
        inputs = {model.main_input_name: torch.ones(shape, dtype=torch.int64 if is_ids else model.dtype)}
        if is_ids and isinstance(getattr(config, "eos_token_id", None), int):
            inputs[model.main_input_name][:, -1] = config.eos_token_id  # where BART's kind classifies a text
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.ones(_ids(config), dtype=torch.int64)
        return model, inputs


def _sound(config: Any) -> tuple[int, ...]:
    """Waves [1, samples], or spectra [1, frames, bins], of Whisper's kind [1, bins, frames]."""
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    bins = next((found for found in (getattr(config, name, None) for name in names) if found), None)
    if bins is None or hasattr(config, "conv_stride"):  # of convolutions over a wave; SpeechT5's speech is spectra
        return 1, _SAMPLES
    if config.model_type == "whisper":  # takes spectra of one length alone
        return 1, bins, 2 * config.max_source_positions
    return 1, getattr(config, "max_length", None) or _FRAMES, bins


def _image(config: Any) -> tuple[int, ...]:
    """[images, channels, height, width]."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or _SIZE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return _IMAGES, getattr(vision, "num_channels", _CHANNELS), height, width


def _ids(config: Any) -> tuple[int, int]:
    """[1, tokens], no more than the model has positions."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    bounds = [getattr(text, name, None) for name in ("max_position_embeddings", "max_target_positions")]
    return 1, min([_TOKENS, *(bound for bound in bounds if isinstance(bound, int) and bound > 0)])
