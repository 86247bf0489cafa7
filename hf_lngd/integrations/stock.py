"""`register()`: ``optim="lngd"`` in an unmodified Trainer script.

transformers has no public way to add a name to `--optim`: this adds a member to its enum of names and a handler to its
table of optimizers, both private, for the versions that it was tested with. Before it looks into the table, a Trainer
would split `optim_args` in a way of its own, which LNGD's are kept from. Call it before arguments are parsed.
"""

from __future__ import annotations

import enum
import functools
import re
from types import SimpleNamespace
from typing import Any

import transformers
from transformers import Trainer, training_args

from ..checks import fishers_beside
from ..optimizer import LNGD
from .launching import refuse_stock_fsdp
from .trainer import create_lngd_optimizer
from .training_args import LNGD_NAME, check_precision, is_lngd, lngd_settings

MEMBER = "LNGD"
TESTED = ((5, 23), (6, 0))  # from, up to (not included)
_CHOICE = "get_optimizer_cls_and_kwargs"  # the Trainer's method that splits `optim_args` and asks the table
_replaced: dict[Any, Any] = {}  # ours → what was there before


class LNGDFactory:
    """What the handler returns: the Trainer makes one and calls it with the whole model."""

    def __call__(self, model: Any, args: Any) -> LNGD:
        """LNGD for the model, as the arguments ask for it; tells which parameter went where."""
        refuse_stock_fsdp(args)
        optimizer = create_lngd_optimizer(model, args)
        if args.process_index == 0:
            print(optimizer.routing_table(), flush=True)
        return optimizer


def register() -> None:
    """Make a stock `Trainer` accept ``optim="lngd"``, with `optim_args` as in `LNGDTrainingArguments`.

    A second call changes nothing. What a stock Trainer lacks against `LNGDTrainer`: the exact loss under accumulation,
    diagnostics in the log, ``fisher="true"``, FSDP2.

    Raises:
        RuntimeError: a version of transformers that this was not tested with, or one without the private parts that
            this extends; names the version and what is missing.
    """
    _check_version()
    names, handlers = training_args.OptimizerNames, _handlers()
    if LNGD_NAME not in names._value2member_map_:
        _add_member(names, MEMBER, LNGD_NAME)
    handlers[names(LNGD_NAME)] = _handler
    if Trainer.__dict__[_CHOICE] not in _replaced:
        setattr(Trainer, _CHOICE, _unsplit(Trainer.__dict__[_CHOICE]))


def unregister() -> None:
    """Undo :func:`register`. A second call changes nothing."""
    _check_version()
    names, handlers = training_args.OptimizerNames, _handlers()
    handlers.pop(LNGD_NAME, None)  # a member of the enum is equal to its name
    choice = Trainer.__dict__[_CHOICE]
    if choice in _replaced:  # else somebody has wrapped it since: for other optimizers it does what was there before
        setattr(Trainer, _CHOICE, _replaced.pop(choice))
    if MEMBER in names._member_map_:
        del names._member_map_[MEMBER]
        del names._value2member_map_[LNGD_NAME]
        names._member_names_.remove(MEMBER)
        if MEMBER in names.__dict__:
            type.__delattr__(names, MEMBER)


def _handler(context: Any) -> tuple[type[LNGDFactory], dict[str, Any]]:
    check_precision(context.args)
    config, _ = lngd_settings(context.args)
    if config.fisher == "true":
        raise ValueError(
            "optim_args: fisher: got 'true' in a stock Trainer, which makes no second backward pass, accepted: "
            f"{', '.join(fishers_beside('true', config.family))}; or use hf_lngd.LNGDTrainer"
        )
    return LNGDFactory, {"args": context.args}


def _unsplit(choice: staticmethod[..., Any]) -> staticmethod[..., Any]:
    """The Trainer's choice of an optimizer, but of LNGD with its `optim_args` as they are."""

    @functools.wraps(choice.__func__)
    def choose(args: Any, *rest: Any, **kwargs: Any) -> Any:
        return _handler(SimpleNamespace(args=args)) if is_lngd(args) else choice.__func__(args, *rest, **kwargs)

    made = staticmethod(choose)
    _replaced[made] = choice
    return made


def _handlers() -> dict[Any, Any]:
    from transformers import trainer_optimizer

    return trainer_optimizer._OPTIMIZER_HANDLERS


def _add_member(names: Any, name: str, value: str) -> None:
    member = str.__new__(names, value)
    member._name_, member._value_, member.__objclass__ = name, value, names
    member._sort_order_ = len(names._member_names_)
    names._member_names_.append(name)
    names._member_map_[name] = member
    names._value2member_map_[value] = member
    type.__setattr__(names, name, member)


def version_problem() -> str | None:
    """Why :func:`register` cannot work with the transformers that is installed; None: it can."""
    version = transformers.__version__
    found = re.match(r"(\d+)\.(\d+)", version)
    numbers = tuple(int(part) for part in found.groups()) if found else (0, 0)
    first, last = (".".join(map(str, bound)) for bound in TESTED)
    if not TESTED[0] <= numbers < TESTED[1]:
        return f"got transformers {version}, accepted: {first} up to {last}"
    missing = _missing()
    return None if missing is None else f"got transformers {version} without {missing}, which this extends"


def _missing() -> str | None:
    """The first of transformers' private parts that is not as it was in the versions tested."""
    names = getattr(training_args, "OptimizerNames", None)
    if not (isinstance(names, type) and issubclass(names, str) and issubclass(names, enum.Enum)):
        return "training_args.OptimizerNames, an enum of strings"
    try:
        handlers = _handlers()
    except (ImportError, AttributeError):
        return "trainer_optimizer._OPTIMIZER_HANDLERS"
    if not isinstance(handlers, dict) or not callable(handlers.get(names("adamw_torch"))):
        return "trainer_optimizer._OPTIMIZER_HANDLERS, a dict of functions by name"
    if not isinstance(Trainer.__dict__.get(_CHOICE), staticmethod):
        return f"Trainer.{_CHOICE}, a static method"
    return None


def _check_version() -> None:
    problem = version_problem()
    if problem is not None:
        raise RuntimeError(f"register: {problem}; hf_lngd.LNGDTrainer needs no registration")
