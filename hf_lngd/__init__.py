"""hf_lngd: Layer-Wise Natural Gradient Descent for Hugging Face Transformers, switched on with one flag.

`LNGD` and `LNGDConfig` need torch only; the names that need transformers are imported when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import LNGDConfig
from .optimizer import LNGD
from .parallel.checkpoint import load_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from .integrations.stock import register, unregister
    from .integrations.trainer import LNGDSeq2SeqTrainer, LNGDTrainer, LNGDTrainerMixin, create_lngd_optimizer
    from .integrations.training_args import LNGDArgumentsMixin, LNGDSeq2SeqTrainingArguments, LNGDTrainingArguments

__version__ = "0.1.0"

_INTEGRATIONS = {
    "trainer": ("LNGDTrainer", "LNGDTrainerMixin", "LNGDSeq2SeqTrainer", "create_lngd_optimizer"),
    "training_args": ("LNGDTrainingArguments", "LNGDArgumentsMixin", "LNGDSeq2SeqTrainingArguments"),
    "stock": ("register", "unregister"),
}
_MODULE_OF = {name: module for module, names in _INTEGRATIONS.items() for name in names}

__all__ = [
    "LNGD", "LNGDArgumentsMixin", "LNGDConfig", "LNGDSeq2SeqTrainer", "LNGDSeq2SeqTrainingArguments", "LNGDTrainer",
    "LNGDTrainerMixin", "LNGDTrainingArguments", "create_lngd_optimizer", "load_checkpoint", "register",
    "save_checkpoint", "unregister",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f".integrations.{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
