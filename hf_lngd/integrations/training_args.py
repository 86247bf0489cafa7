"""`LNGDTrainingArguments` and `LNGDSeq2SeqTrainingArguments`: transformers' own, with ``--optim lngd``."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
import sys
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.trainer_utils import check_target_module_exists
from transformers.training_args import OptimizerNames

from ..config import LNGDConfig
from ..groups import KINDS, check_decay, options_of
from ..routing import unwrapped
from ..torch_internals import plain_name
from .baselines import BASELINES, class_and_settings, name_of

LNGD_NAME = "lngd"
# What the parent class is shown in place of "lngd" while it checks itself: an optimizer it makes no demands on.
STAND_IN = OptimizerNames.ADAMW_TORCH.value
_OPTIM_HELP = (
    "The optimizer: lngd (layer-wise natural gradient; AdamW for all other parameters), muon or soap (to compare with; "
    "the same parameters are AdamW's), or any of transformers'."
)
_WEIGHT_DECAY_HELP = (
    "Weight decay of AdamW and of lngd; not on norms and biases. Where it is not given lngd has a rule of its own (see "
    "hf_lngd.LNGDConfig), and other optimizers have none."
)
_OPTIM_ARGS_HELP = (
    "Settings of the optimizer as name=value,name=value. For lngd: lr and the fields of hf_lngd.LNGDConfig, e.g. "
    "'factor_interval=10,preset=fast' (presets: fast, paper, lngd_sample, lngd_lr; families: lngd, kfac, ekfac, tkfac, "
    "ng+). They win over --learning_rate, --weight_decay and --adam_*, and these over the preset."
)
_LOG_HELP = (
    "What of lngd stands in the training log: none; short: how many gradients, factors and inverses were passed over; "
    "full: also means over the layers, the worst condition number and the seconds that factors took."
)
LOGS = ("none", "short", "full")


def is_lngd(args: Any) -> bool:
    """True if these arguments ask for LNGD."""
    return name_of(args.optim) == LNGD_NAME


def lngd_settings(args: Any, model: nn.Module | None = None) -> tuple[LNGDConfig, float]:
    """The config and the learning rate that training arguments ask for; with a `model`, also what its
    `optim_target_modules` leave to AdamW.

    Precedence: `optim_args`, then `learning_rate`, a `weight_decay` that was given and those of `adam_beta1`,
    `adam_beta2`, `adam_epsilon` that differ from transformers' defaults, then the preset. In transformers' own
    arguments, where 0 is the default, 0 counts as given if it stands on the command line.

    Raises:
        ValueError: names the field, the value and what is accepted.
    """
    rate = args.learning_rate
    if not isinstance(rate, (int, float)) or not 0 <= rate < float("inf"):  # YAML reads 1e-3 as text
        raise ValueError(f"learning_rate: got {rate!r}, accepted: a number, at least 0")
    lr, text = take_lr(args.optim_args)
    defaults = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    decay, own = args.weight_decay, isinstance(args, LNGDArgumentsMixin)
    is_given = decay is not None if own else decay != 0 or _on_command_line("weight_decay")
    given: dict[str, Any] = {"weight_decay": decay} if is_given else {}
    if (args.adam_beta1, args.adam_beta2) != (defaults["adam_beta1"], defaults["adam_beta2"]):
        given["betas"] = (args.adam_beta1, args.adam_beta2)
    if args.adam_epsilon != defaults["adam_epsilon"]:
        given["eps"] = args.adam_epsilon
    config, lr = LNGDConfig.from_optim_args(text, **given), args.learning_rate if lr is None else lr
    for kind in KINDS:
        check_decay(options_of(kind, config, lr))
    if model is not None and args.optim_target_modules is not None:
        others = _others(args.optim_target_modules, unwrapped(model))
        config = config.with_fields(exclude=f"(?:{config.exclude})|{others}" if config.exclude else others)
    return config, lr


def _others(targets: str | list[str], model: nn.Module) -> str:
    """A regular expression for the parameters outside the target modules, which are meant as the Trainer means them for
    GaLore: ``all-linear``, a regular expression of a whole name, or a list of parts of names."""
    linear = isinstance(targets, str) and targets.replace("_", "-") == "all-linear"
    chosen = [
        re.escape(plain_name(name))
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
        and (isinstance(module, nn.Linear) if linear else check_target_module_exists(targets, plain_name(name)))
    ]
    if not chosen:
        raise ValueError(
            f"optim_target_modules: got {targets!r}, which is no module of {type(model).__name__} with parameters, "
            "accepted: all-linear, a regular expression of a module's whole name, or a list of parts of names"
        )
    return rf"^(?!(?:{'|'.join(chosen)})\.[^.]+$)"


def rate_is_untouched(args: Any) -> bool:
    """Whether the learning rate is transformers' default, which nobody gave."""
    default = TrainingArguments.__dataclass_fields__["learning_rate"].default
    given = take_lr(args.optim_args)[0] is not None or _on_command_line("learning_rate")
    return args.learning_rate == default and not given


def _on_command_line(name: str) -> bool:
    """Whether an argument of this name was given to the process."""
    flags = {argument.split("=")[0].replace("-", "_") for argument in sys.argv[1:] if argument.startswith("--")}
    return f"__{name}" in flags


def check_precision(args: Any) -> None:
    """Raise ValueError for fp16 on the CPU: accelerate has none there, and would go on in float32."""
    if args.fp16 and args.device.type == "cpu":
        raise ValueError(
            "fp16: got True on the CPU, where accelerate has no fp16, accepted: bf16 (--bf16 --use_cpu), or a loop of "
            'your own with torch.autocast("cpu", torch.float16) and torch.amp.GradScaler("cpu")'
        )


def take_lr(text: str | None) -> tuple[float | None, str | None]:
    """Split ``lr=…`` off `optim_args`: the rate is no field of the config."""
    if not isinstance(text, str | None):
        raise ValueError(f"optim_args: got {text!r}, accepted: a text, name=value,name=value")
    items = re.split(r"(?<!\\),", text or "")
    rates = [item for item in items if item.partition("=")[0].strip() == "lr"]
    if not rates:
        return None, text
    try:
        lr = float(rates[0].partition("=")[2])
    except ValueError:
        lr = -1.0
    if len(rates) > 1 or not 0 <= lr < float("inf"):
        raise ValueError(f"optim_args: lr: got {', '.join(rates)!r}, accepted: one number, at least 0")
    return lr, ",".join(item for item in items if item not in rates)


_SomeArguments: Any = object  # a class of training arguments follows among the bases


@dataclass
class LNGDArgumentsMixin(_SomeArguments):
    """Adds ``lngd`` to the values of `optim`; goes before a class of training arguments among the bases.

    A pickle of them has no `hub_token`: the Trainer pushes one, ``training_args.bin``, for all to read.

    Raises:
        ValueError: on construction, for an unknown optimizer or settings that it does not accept: names the field,
            the value and what is accepted.
    """

    optim: str = field(default=LNGD_NAME, metadata={"help": _OPTIM_HELP})
    optim_args: str | None = field(default=None, metadata={"help": _OPTIM_ARGS_HELP})
    weight_decay: float | None = field(default=None, metadata={"help": _WEIGHT_DECAY_HELP})
    lngd_log: str = field(default="short", metadata={"help": _LOG_HELP})

    def __post_init__(self) -> None:
        name = name_of(self.optim)
        own = [LNGD_NAME, *BASELINES]
        accepted = [*own, *(member.value for member in OptimizerNames if member.value not in own)]
        if name not in accepted:
            close = difflib.get_close_matches(name, accepted, n=3, cutoff=0.6)
            hint = f" (did you mean {' or '.join(close)}?)" if close else ""
            raise ValueError(f"optim: got {name!r}{hint}, accepted: {', '.join(accepted)}")
        if self.lngd_log not in LOGS:
            raise ValueError(f"lngd_log: got {self.lngd_log!r}, accepted: {', '.join(LOGS)}")
        if name == LNGD_NAME:
            lngd_settings(self)
        elif self.weight_decay is None:
            self.weight_decay = 0.0
        if name in BASELINES:
            class_and_settings(self)
        self.optim = STAND_IN if name in own else self.optim
        super().__post_init__()
        if name in own:
            self.optim = name
            check_precision(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "hub_token": None}

    def __copy__(self) -> Any:
        """With the token: a copy stays in this process."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = memo[id(self)] = copy.copy(self)
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


@dataclass
class LNGDTrainingArguments(LNGDArgumentsMixin, TrainingArguments):
    """transformers' `TrainingArguments` whose `optim` may be, and is by default, ``lngd``."""


@dataclass
class LNGDSeq2SeqTrainingArguments(LNGDArgumentsMixin, Seq2SeqTrainingArguments):
    """transformers' `Seq2SeqTrainingArguments` whose `optim` may be, and is by default, ``lngd``."""
