"""`LNGDTrainer` and `LNGDSeq2SeqTrainer`: transformers' trainers with ``--optim lngd``, exact loss, exact resume."""

from __future__ import annotations

import copy
import inspect
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from ..config import LNGDConfig, LNGDFields, other_fishers
from ..optimizer import LNGD
from ..state import parameters_of
from ..torch_internals import plain_name, uncompiled
from . import fsdp, hub
from .baselines import is_baseline, make_baseline
from .checkpoints import (
    check_checkpoint,
    check_optimizer,
    check_same_optimizer,
    freeze_unsaved,
    last_checkpoint,
)
from .given_groups import add_outside, split_groups
from .launching import refuse_unsupported
from .loss import IGNORED_LABEL, ExactLoss
from .startup import tell_at_start
from .training_args import STAND_IN, LNGDSeq2SeqTrainingArguments, LNGDTrainingArguments, is_lngd, lngd_settings

logger = logging.getLogger(__name__)
# Of LNGD's diagnostics those that are logged unless asked otherwise: they are 0 as long as all goes well.
SHORT_LOG = ("failed_inverses", "skipped_factors", "skipped_gradients")


def create_lngd_optimizer(
    model: nn.Module,
    args: TrainingArguments | None = None,
    *,
    config: LNGDConfig | None = None,
    lr: float | None = None,
    param_groups: Sequence[dict[str, Any]] = (),
    layout: str = "whole",
    **fields: Unpack[LNGDFields],
) -> LNGD:
    """LNGD for a model, before any wrapper, as training arguments ask for it or by name.

    Args:
        args: training arguments whose `optim_args`, `learning_rate`, `weight_decay`, `adam_*` and
            `optim_target_modules` are used.
        config: in place of the settings of `args`.
        lr: in place of the rate of `args`; 1e-3 if neither is given.
        param_groups: as of `LNGD`.
        layout: as of `LNGD`.
        **fields: fields of `LNGDConfig`, on top of the rest.

    Raises:
        ValueError: a bad setting; names field, value and what is accepted.
        RuntimeError: a way of running that LNGD does not support; names the command to use.
    """
    refuse_unsupported(args, model)
    freeze_unsaved(model)
    if args is not None:
        from_args, from_lr = lngd_settings(args, model)
        config, lr = config or from_args, from_lr if lr is None else lr
    lr = 1e-3 if lr is None else lr
    return LNGD(model, config, lr=lr, param_groups=param_groups, layout=layout, **fields)


def make_optimizer(
    model: nn.Module, args: Any, groups: Sequence[Any] = (), more: Sequence[Any] = (), layout: str = "whole"
) -> Any:
    """LNGD, Muon or SOAP, as training arguments ask for it.

    Args:
        groups: parameter groups that a trainer of another library makes itself, see `given_groups`.
        more: further `param_groups` of LNGD.
        layout: as of `LNGD`.
    """
    if is_baseline(args):
        return make_baseline(model, args, groups)
    entries, outside = split_groups(model, groups)
    optimizer = create_lngd_optimizer(model, args, layout=layout, param_groups=[*entries, *more])
    add_outside(optimizer, outside)
    return optimizer


def lngd_of(optimizer: Any) -> LNGD | None:
    """The LNGD inside accelerate's wrapper (or bare), else None."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, LNGD) else None


class TensorBoard(TensorBoardCallback):
    """transformers' own, with LNGD's numbers in a group beside ``train`` and ``eval``."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """As transformers', but for keys that begin with ``lngd_``."""
        own = {name: value for name, value in logs.items() if name.startswith("lngd_")}
        super().on_log(args, state, control, {k: v for k, v in logs.items() if k not in own}, **kwargs)
        for name, value in own.items() if self.tb_writer is not None else ():
            self.tb_writer.add_scalar(name.replace("_", "/", 1), value, state.global_step)


_ATrainer: Any = object  # one follows among the bases


class LNGDTrainerMixin(_ATrainer):
    """What both trainers add to transformers' own; goes before a trainer class among the bases.

    - `create_optimizer` makes LNGD where the arguments ask for it, with the groups that a trainer of another library
      has of its own, and says once which parameter went where and what it costs (see `startup`).
    - The loss of a step is that of its whole batch, however it is split (see `loss`), whatever the optimizer.
    - Resuming loads every weight (see `checkpoints`).
    - Training logs carry LNGD's diagnostics.
    - A push that failed in the background is told; no checkpoint is removed while it is pushed.
    """

    optimizer: Any
    compute_loss_func: Any
    _default_args: Any = LNGDTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        constructor: Any = super().__init__
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, TrainingArguments)), None)
        if given is None and constructor.__func__ in (Trainer.__init__, Seq2SeqTrainer.__init__):
            # a trainer with a constructor of its own makes arguments of its own class
            bound = inspect.signature(constructor).bind(*args, **kwargs)
            given = bound.arguments["args"] = self._default_args(output_dir="tmp_trainer")
            args, kwargs = bound.args, bound.kwargs
        if given is not None and is_lngd(given):
            refuse_unsupported(given, kwargs.get("model", args[0] if args else None))
        self._is_told = False
        self.card_writer: Callable[[], Any] | None = None
        constructor(*args, **kwargs)
        for callback in [one for one in self.callback_handler.callbacks if type(one) is TensorBoardCallback]:
            self.remove_callback(callback)
            self.add_callback(TensorBoard(callback.tb_writer))
        if given is None and not is_lngd(self.args):
            made = type(self.args).__name__
            logger.warning("args: got none, so %s made %s, which do not ask for lngd", type(self).__name__, made)
        # a trainer that computes a loss of its own, or is given one, normalises it in its own way
        own = super().compute_loss.__func__ is not Trainer.compute_loss or self.compute_loss_func is not None
        self._exact_loss = None if own or self.args.n_gpu > 1 else ExactLoss(self, self._loss_of)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """LNGD, Muon or SOAP if the arguments ask for it, else what transformers makes of them. What checkpoints leave
        out is not trained by any."""
        model = kwargs.get("model", args[0] if args else None)
        model = self.model if model is None else model
        freeze_unsaved(model)
        if self.optimizer is None and (is_baseline(self.args) or is_lngd(self.args)):
            groups = self._groups_of_trainer(model)
            self.optimizer = make_optimizer(model, self.args, groups, self._decay_groups(model, groups), "auto")
        lngd = lngd_of(self.optimizer)
        if lngd is not None and not self._is_told:
            self._is_told = True
            tell_at_start(lngd, self.model, self.args, self)
        made = super().create_optimizer(*args, **kwargs)
        if isinstance(made, torch.optim.Optimizer):
            made.register_load_state_dict_pre_hook(check_same_optimizer)
        return made

    def _groups_of_trainer(self, model: Any) -> Any:
        """The groups that a trainer with a `get_optimizer_cls_and_kwargs` of its own makes, shown another optimizer."""
        args = copy.copy(self.args)
        args.optim, args.optim_args = STAND_IN, None
        made = super().get_optimizer_cls_and_kwargs(args, model)[1]
        return made.get("optimizer_dict") or made.get("params") or ()

    def _decay_groups(self, model: Any, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What a Trainer with a `get_decay_parameter_names` of its own leaves without weight decay, but for what is in
        its groups with a rate of their own."""
        own = type(self).get_decay_parameter_names
        if own in (Trainer.get_decay_parameter_names, Seq2SeqTrainer.get_decay_parameter_names):
            return []  # LNGD knows more kinds of norms
        taken = {p for group in groups if "lr" in group for p in group["params"]}
        decayed = set(self.get_decay_parameter_names(model))
        named = model.named_parameters()
        rest = [plain_name(name) for name, p in named if p.requires_grad and name not in decayed and p not in taken]
        return [{"params": rest, "weight_decay": 0.0, "name": "no_decay"}] if rest else []

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with the number of the loss's terms in place of that of labels where it differs."""
        batches, number = super().get_batch_samples(*args, **kwargs)
        return batches, number if self._exact_loss is None else self._exact_loss.number(batches, number)

    def _loss_of(self, model: Any, batch: dict[str, Any], number: Any) -> Tensor:
        """The Trainer's own loss of a batch as the data loader gives it."""
        with self.compute_loss_context_manager():
            return super().compute_loss(model, self._prepare_inputs(batch), num_items_in_batch=number)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """As the Trainer's, and gives LNGD what it cannot see: the labels, and a second pass where it needs one."""
        exact, number = self._exact_loss, num_items_in_batch
        terms = None if exact is None else exact.terms(inputs, number)
        given = {} if terms is not None or number is None else {"num_items_in_batch": number}
        labels: Any = inputs.get("labels") if isinstance(inputs, Mapping) else None
        lngd = lngd_of(self.optimizer) if model.training else None
        if lngd is not None and isinstance(inputs, Mapping):
            lngd.set_batch(inputs)
        second_pass = lngd is not None and lngd.needs_fisher_pass
        result = super().compute_loss(model, inputs, return_outputs or second_pass, **given)
        loss, outputs = result if return_outputs or second_pass else (result, None)
        if lngd is not None and second_pass:
            logits = outputs.get("logits") if isinstance(outputs, dict) else None
            if logits is None:
                others = other_fishers(lngd.config)
                raise ValueError(f"optim_args: fisher: got 'true' for a model without logits, accepted: {others}")
            fits = isinstance(labels, Tensor) and labels.shape == logits.shape[:-1]
            lngd.fisher_backward(logits, labels.ne(IGNORED_LABEL) if fits else None)
        if exact is not None and terms is not None:
            loss = exact.scaled(loss, terms, number)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's; training logs carry what `lngd_log` says of LNGD's diagnostics, to four digits."""
        lngd, asked = lngd_of(self.optimizer), getattr(self.args, "lngd_log", "short")
        if lngd is not None and self.is_in_train and "loss" in logs and asked != "none":
            found = {name: v for name, v in lngd.diagnostics().items() if asked == "full" or name in SHORT_LOG}
            logs.update({f"lngd_{name}": float(f"{value:.4g}") for name, value in found.items()})
        super().log(logs, *args, **kwargs)

    # The Hub

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, unless `card_writer` was set: that writes the card, when the model is pushed too."""
        if self.card_writer is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            self.card_writer()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the Trainer's, with the card as it is by now; nothing fails or is left out unsaid."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.args.save_total_limit is not None and self.args.hub_strategy != HubStrategy.EVERY_SAVE:
            self._finish_current_push()  # else a checkpoint could be removed in the middle of its upload
        if self.push_in_progress is None or self.push_in_progress.is_done():
            hub.tell_failed(self.push_in_progress)  # the Trainer forgets it now
            if self.card_writer is not None:
                self.card_writer()
        elif not self.args.hub_always_push:
            logger.warning("%s is not pushed: the push before is under way (hub_always_push)", checkpoint_folder)
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        """Waits, as the Trainer's, and tells what failed: the Trainer never looks."""
        super()._finish_current_push()
        hub.tell_failed(getattr(self, "push_in_progress", None))

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. True resumes from the last checkpoint that is whole, and warns of those that are not.

        Raises:
            ValueError: a checkpoint that is damaged or none, naming the file; nothing is loaded then.
        """
        freeze_unsaved(self.model)  # before anybody asks what is trained
        folder, made = resume_from_checkpoint or None, lngd_of(self.optimizer)
        if folder is True:
            folder = last_checkpoint(self.args.output_dir)
            if folder is None:
                raise ValueError(f"No valid checkpoint found in output directory ({self.args.output_dir})")
        if folder:
            check_checkpoint(folder)
            trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
            shapes = {plain_name(name): list(p.shape) for name, p in trained}
            check_optimizer(folder, self._lngd_config(), shapes if made is None else parameters_of(made.core))
        result = super().train(folder, *args, **kwargs)
        if (lngd := lngd_of(self.optimizer)) is not None:
            lngd.eval()  # else what was compiled might be kept from it, were the next step a factor step
        return result

    def _lngd_config(self) -> LNGDConfig | None:
        """The settings that training will have; None: of another optimizer."""
        if (made := lngd_of(self.optimizer)) is not None:
            return made.config
        return lngd_settings(self.args, self.model)[0] if self.optimizer is None and is_lngd(self.args) else None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint that is written over is removed first: it is none until its last file is there, and may hold
        weights of another kind (FSDP2's, or whole ones)."""
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            if folder.is_dir():
                shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Each rank writes its own; the file that makes a checkpoint one comes after all of them."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        if not self._load_weights(self.model if model is None else model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_best_model(self) -> None:
        if not self._load_weights(self.model, self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_weights(self, model: Any, folder: str) -> bool:
        """All of a checkpoint's weights; False: that is the Trainer's business."""
        crossing = self._lngd_config() is not None
        ours = not self.is_deepspeed_enabled
        return ours and fsdp.load_weights(uncompiled(model), folder, self.is_fsdp_enabled, crossing)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; under FSDP2 the whole model, too. Checkpoints with sharded state dicts need none."""
        if not self.is_fsdp_enabled or lngd_of(self.optimizer) is None:
            super().save_model(output_dir, _internal_call)
        elif not _internal_call or "FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            fsdp.save_model(self, self.args.output_dir if output_dir is None else output_dir)
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        lngd = lngd_of(self.optimizer)
        if lngd is not None and (self.is_fsdp_enabled or lngd.core.layout.has_owners):
            fsdp.save(self, lngd, output_dir)  # the Trainer asks rank 0 alone for the state
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        lngd = lngd_of(self.optimizer)
        given = [] if lngd is None or not checkpoint else [dict(group) for group in lngd.param_groups]
        if self.is_fsdp_enabled and lngd is not None and checkpoint:
            fsdp.load(self, lngd, checkpoint)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if lngd is not None:
            self._keep_rates(lngd, given)

    def _keep_rates(self, lngd: LNGD, given: list[dict[str, Any]]) -> None:
        """Go on with the rates and decays of the arguments, where the checkpoint's, which are loaded, are others."""
        for number, (group, own) in enumerate(zip(lngd.param_groups, given, strict=False)):
            group.update({key: own[key] for key in ("weight_decay", "decay_floor", "lr_scale")})
            old, new = (g.get("initial_lr", 0.0) for g in (group, own))  # a plateau's schedule has none
            if old != new:
                group.update(initial_lr=new, lr=new * (group["lr"] / old if old else 1.0))
                self.lr_scheduler.base_lrs[number] = new


class LNGDTrainer(LNGDTrainerMixin, Trainer):
    """transformers' `Trainer` with LNGD; all its arguments are the same. `args` are `LNGDTrainingArguments`."""


class LNGDSeq2SeqTrainer(LNGDTrainerMixin, Seq2SeqTrainer):
    """transformers' `Seq2SeqTrainer` with LNGD; all its arguments are the same."""

    _default_args = LNGDSeq2SeqTrainingArguments
