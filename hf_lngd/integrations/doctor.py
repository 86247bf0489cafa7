"""``python -m hf_lngd doctor MODEL``: before any training, what a run says at its start: who owns which parameter, what
weight decay does, factors, bytes of state, and the batch from which on a step costs little beside AdamW's.

    python -m hf_lngd doctor MODEL [--optim_args name=value,...] [--task TASK]

TASK: auto, or translation, image, speech (to text), ctc, audio (classification), masked, text, classification.

MODEL is a folder with a config.json, such a file, or a name on the Hub. Only the configuration is read: weights are
neither loaded nor downloaded. On the meta device nothing is computed or stored, so a model of any size takes seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..adamw import AdamW
from ..config import LNGDConfig
from ..layers import factor_blocks
from ..optimizer import LNGD
from .forecast import batches_for, counting, step_to_adamw
from .startup import decay_line
from .training_args import take_lr
from .usage import LOAD_ERRORS, UsageError, UsageParser, blame, option, refuse_if

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
MOST_ON_CPU = 50_000_000  # parameters: a larger model is not built on the CPU
# A batch: two images (for batch norm), of configurations that do not tell of such a size; one text, as some models have
# no padding.
_IMAGES, _CHANNELS, _SIZE, _TOKENS = 2, 3, 224, 8
_SAMPLES, _FRAMES = 16_000, 64  # of sound: a second of a wave, and of spectra where the configuration does not tell
_PRICES = (1.5, 1.2, 1.1)  # steps of AdamW's


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
    missing = f"got {given}, accepted: a folder, a config.json, a Hub name, before any option"
    refuse_if(not argv or argv[0].startswith("-"), "model", missing)
    (args,) = UsageParser(DoctorArguments, prog="python -m hf_lngd doctor").parse(argv[1:])
    try:
        settings = LNGDConfig.from_optim_args(take_lr(args.optim_args)[1])
    except ValueError as error:
        raise UsageError("optim_args", str(error).removeprefix("optim_args: ")) from error
    with blame("model", f"got {given}, which has no configuration that can be read"):
        config = transformers.AutoConfig.from_pretrained(argv[0], trust_remote_code=False)
    task = task_of(config, args.task)
    model, optimizer = step_of(config, task, settings)
    print(f"{argv[0]}: {report(model, optimizer)}")
    print(price_line(model, optimizer, _batch(config, task, model)))


def report(model: nn.Module, optimizer: LNGD) -> str:
    """The routing table, factors and state of an optimizer that has made a step."""
    routes, memory = optimizer.routing(), memory_of(optimizer)
    total = sum(r.numel for r in routes)
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = sum(2 * p.nbytes + 4 for p in trained)  # of torch's AdamW, in the weights' own dtype
    mib, name, numbers = 1 << 20, type(model).__name__, sum(p.numel() for p in trained)
    lines = [f"{name}, {total:,} parameters, {numbers:,} trained", "", optimizer.routing_table()]
    lines += [decay_line(optimizer), ""]
    for (width, blocks), (groups, layers) in factors_of(optimizer).items():
        size = f"{blocks} blocks of {width}" if blocks > 1 else f"width {width}"
        lines.append(f"factors: {groups} for {layers} layers, {size}")
    kinds = ", ".join(f"{kind} {value / mib:.1f}" for kind, value in memory.items() if value and kind != "total")
    ratio = memory["total"] / max(adamw, 1)
    lines.append(f"state: {memory['total'] / mib:.1f} MiB, {ratio:.2f} × AdamW's {adamw / mib:.1f} ({kinds})")
    return "\n".join(lines)


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


def memory_of(optimizer: LNGD) -> dict[str, int]:
    """As `LNGD.memory_usage`, with the state of AdamW's parameters, which `step_of` leaves out."""
    memory, named = optimizer.memory_usage(), optimizer.core.routing.parameters
    rest = [named[r.parameter] for r in optimizer.routing() if r.owner == "fallback"]
    memory["fallback"] = sum(value.nbytes for p in rest for value in AdamW.new_state(p).values())
    memory["rounding"] += sum(p.nbytes for p in rest if p.dtype == torch.bfloat16)
    memory["total"] = sum(size for kind, size in memory.items() if kind != "total")
    return memory


def factors_of(optimizer: LNGD) -> dict[tuple[int, int], tuple[int, int]]:
    """(width, blocks of that width), the widest first → how many such factors, for how many layers."""
    core, sizes = optimizer.core, dict[tuple[int, int], tuple[int, int]]()
    for group in core.built.topology.groups:
        layer = core.capture.layers[group.name]
        k, width = factor_blocks(layer, core.config.max_factor_dim)
        groups, layers = sizes.get((width, layer.units * k), (0, 0))
        sizes[width, layer.units * k] = groups + 1, layers + len(group.members)
    return dict(sorted(sizes.items(), reverse=True))


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


def step_of(config: Any, task: str, settings: LNGDConfig) -> tuple[nn.Module, LNGD]:
    """A model and its optimizer after a step, AdamW's part of it left out: on the meta device, and where its forward
    reads numbers on the CPU, if small. Raises UsageError where neither goes."""
    fields: dict[str, Any] = settings.to_dict()
    if settings.fisher == "true":  # whose second pass is left out
        fields["fisher"] = "sampled" if settings.family == "lngd" else "empirical"
    model, inputs = build(config, task)
    try:
        return model, _stepped(model, inputs, LNGDConfig(**fields))
    except LOAD_ERRORS as error:
        numbers = sum(p.numel() for p in model.parameters())
        what = f"whose forward does not run on the meta device, and {numbers:,} parameters are too many to build"
        refuse_if(numbers > MOST_ON_CPU, "model", f"got {config.model_type!r}, {what} ({error})")
    with blame("model", f"got {config.model_type!r}, whose forward fails"):
        model, inputs = build(config, task, "cpu")
        return model, _stepped(model, inputs, LNGDConfig(**fields))


def _stepped(model: nn.Module, inputs: dict[str, Tensor], settings: LNGDConfig) -> LNGD:
    optimizer = LNGD(model, settings)
    model(**inputs).loss.backward()
    named = optimizer.core.routing.parameters
    for route in optimizer.routing():
        if route.owner == "fallback":  # AdamW's arithmetic is not there on the meta device
            named[route.parameter].grad = None
    optimizer.step()
    return optimizer


def build(config: Any, task: str, device: str = "meta") -> tuple[nn.Module, dict[str, Tensor]]:
    """The model with random weights, in training mode, and a batch with labels; UsageError: it cannot be."""
    config.architectures = list(getattr(config, "architectures", None) or [])  # the Auto classes need a list
    # LNGD takes no weights of float16; sdpa looks into the masks, which the meta device has not got
    half = getattr(config, "dtype", None) in (torch.float16, "float16")
    options = {"attn_implementation": "eager", "trust_remote_code": False, **({"dtype": torch.float32} if half else {})}
    with blame("model", f"got {config.model_type!r}, which cannot be built"), torch.device(device):
        model = FACTORIES[task].from_config(config, **options)
        return model.train(), _batch(config, task, model)


def _batch(config: Any, task: str, model: Any) -> dict[str, Tensor]:
    """A model's inputs with labels, on its device; images and sound are of its dtype, no text is longer than it has
    positions."""
    with model.device:
        return _sound(config, task, model) if task in ("speech", "ctc", "audio") else _plain(config, task, model.dtype)


def _sound(config: Any, task: str, model: Any) -> dict[str, Tensor]:
    """Waves [1, samples], or spectra [1, frames, bins], of Whisper's kind [1, bins, frames]."""
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    bins = next((found for found in (getattr(config, name, None) for name in names) if found), None)
    if bins is None or hasattr(config, "conv_stride"):  # of convolutions over a wave; SpeechT5's speech is spectra
        shape: tuple[int, ...] = (1, _SAMPLES)
    elif config.model_type == "whisper":  # takes spectra of one length alone
        shape = (1, bins, 2 * config.max_source_positions)
    else:
        shape = (1, getattr(config, "max_length", None) or _FRAMES, bins)
    labels = _classes(config, 1) if task == "audio" else torch.ones(1, _TOKENS, dtype=torch.int64)
    return {model.main_input_name: torch.zeros(shape, dtype=model.dtype), "labels": labels}


def _plain(config: Any, task: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Images or texts."""
    if task == "image":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or _SIZE
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        images = torch.zeros(_IMAGES, getattr(vision, "num_channels", _CHANNELS), height, width, dtype=dtype)
        return {"pixel_values": images, "labels": _classes(config, _IMAGES)}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    bounds = [getattr(text, name, None) for name in ("max_position_embeddings", "max_target_positions")]
    length = min((bound for bound in bounds if isinstance(bound, int) and bound > 0), default=_TOKENS)
    ids = torch.ones(1, min(_TOKENS, length), dtype=torch.int64)
    if task == "classification":
        end = getattr(config, "eos_token_id", None)
        if isinstance(end, int) and end >= 0:  # Bart's kind classify by it
            ids[:, -1] = end
        return {"input_ids": ids, "labels": _classes(config, 1)}
    return {"input_ids": ids, "labels": ids} | ({"decoder_input_ids": ids} if task == "translation" else {})


def _classes(config: Any, rows: int) -> Tensor:
    """Labels of a classification in the form of its `problem_type`: a class [rows], or numbers [rows, labels]."""
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification" or (problem == "regression" and config.num_labels > 1):
        return torch.zeros(rows, config.num_labels)
    return torch.zeros(rows, dtype=torch.float32 if problem == "regression" else torch.int64)
