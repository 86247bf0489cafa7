"""`register()`: ``optim="lngd"``, ``"muon"`` and ``"soap"`` in an unmodified Trainer script.

transformers has no public way to add a name to `--optim`: this adds members to its enum of names and wraps the
Trainer's choice of an optimizer, both private, for the versions that it was tested with.
"""

from __future__ import annotations

import enum
import functools
import re
from typing import Any

import transformers
from transformers import Trainer, training_args

from ..config import other_fishers
from .baselines import BASELINES, class_and_settings, is_baseline
from .checkpoints import check_same_optimizer
from .launching import refuse_stock_fsdp
from .startup import tell_at_start
from .trainer import make_optimizer
from .training_args import LNGD_NAME, check_precision, is_lngd, lngd_settings

MEMBERS = {name: name.upper() for name in (LNGD_NAME, *BASELINES)}
TESTED = ((5, 6), (6, 0))  # from, up to (not included)
_CHOICE = "get_optimizer_cls_and_kwargs"  # the Trainer's method: the class of an optimizer and its arguments


class Factory:
    """In the place of an optimizer's class: the Trainer makes one and calls it with the whole model, and with the
    groups of parameters that a trainer of another library has made."""

    def __call__(self, model: Any, args: Any, params: Any = None, optimizer_dict: Any = None) -> Any:
        """The optimizer that the arguments ask for, see `make_optimizer`; LNGD tells what `startup` says."""
        if is_lngd(args):
            refuse_stock_fsdp(args)
        optimizer = make_optimizer(model, args, optimizer_dict or params or ())
        optimizer.register_load_state_dict_pre_hook(check_same_optimizer)
        if is_lngd(args):
            tell_at_start(optimizer, model, args)
        return optimizer


def register() -> None:
    """Make a stock `Trainer` accept ``optim="lngd"`` (and ``"muon"``, ``"soap"``), `optim_args` as ours. To be called
    before arguments are made.

    A second call changes nothing. What a stock Trainer lacks against `LNGDTrainer`: the exact loss under accumulation,
    diagnostics in the log, ``fisher="true"``, FSDP2.

    Raises:
        RuntimeError: a version of transformers that this was not tested with, or one without the private parts that
            this extends; names the version and what is missing.
    """
    _check_version()
    names: Any = training_args.OptimizerNames
    for name, upper in MEMBERS.items():
        if name in names._value2member_map_:
            continue
        member = str.__new__(names, name)
        member._name_, member._value_, member.__objclass__ = upper, name, names
        member._sort_order_ = len(names._member_names_)
        names._member_names_.append(upper)
        names._member_map_[upper] = names._value2member_map_[name] = member
        type.__setattr__(names, upper, member)
    choice = Trainer.__dict__[_CHOICE]
    if not hasattr(choice, "replaced"):
        setattr(Trainer, _CHOICE, _with_lngd(choice))


def unregister() -> None:
    """Undo :func:`register`. A second call changes nothing."""
    _check_version()
    names: Any = training_args.OptimizerNames
    choice = Trainer.__dict__[_CHOICE]
    if hasattr(choice, "replaced"):  # else somebody has wrapped it since: for other optimizers it is as before
        setattr(Trainer, _CHOICE, choice.replaced)
    for name, upper in MEMBERS.items():
        if names._member_map_.pop(upper, None) is not None:
            del names._value2member_map_[name]
            names._member_names_.remove(upper)
            type.__delattr__(names, upper)


def _with_lngd(choice: Any) -> Any:
    """The Trainer's choice of an optimizer, and LNGD, whose `optim_args` the Trainer is kept from splitting."""

    @functools.wraps(choice.__func__)
    def choose(args: Any, *rest: Any, **kwargs: Any) -> Any:
        if is_baseline(args):
            class_and_settings(args)
            return Factory, {"args": args}
        if not is_lngd(args):
            return choice.__func__(args, *rest, **kwargs)
        check_precision(args)
        config, _ = lngd_settings(args)
        if config.fisher == "true":
            raise ValueError(
                "optim_args: fisher: got 'true' in a stock Trainer, which makes no second backward pass, accepted: "
                f"{other_fishers(config)}; or use hf_lngd.LNGDTrainer"
            )
        return Factory, {"args": args}

    made: Any = staticmethod(choose)
    made.replaced = choice
    return made


def _check_version() -> None:
    """Raise RuntimeError for a transformers of another version, or with other private parts, than was tested."""
    found = transformers.__version__
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or not TESTED[0] <= tuple(map(int, numbers.groups())) < TESTED[1]:
        problem = f", accepted: {' up to '.join('.'.join(map(str, bound)) for bound in TESTED)}"
    else:
        names, problem = getattr(training_args, "OptimizerNames", None), ""
        if not (isinstance(names, type) and issubclass(names, str) and issubclass(names, enum.Enum)):
            problem = " without training_args.OptimizerNames, an enum of strings, which this extends"
        if not isinstance(Trainer.__dict__.get(_CHOICE), staticmethod):
            problem = f" without Trainer.{_CHOICE}, a static method, which this extends"
    if problem:
        raise RuntimeError(f"register: got transformers {found}{problem}; hf_lngd.LNGDTrainer needs no registration")
