"""`LNGDTrainer` and `LNGDSeq2SeqTrainer`: transformers' trainers with ``--optim lngd``, exact loss, exact resume."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from ..config import LNGDConfig, other_fishers
from ..optimizer import LNGD
from ..state import parameters_of
from ..torch_internals import plain_name, uncompiled
from . import fsdp, hub
from .checkpoints import STATE, check_checkpoint, check_optimizer, freeze_fixed_positions, last_checkpoint
from .launching import refuse_unsupported
from .loss import IGNORED_LABEL, SummedCrossEntropy, ignores_num_items, with_decoder_inputs
from .training_args import LNGDSeq2SeqTrainingArguments, LNGDTrainingArguments, is_lngd, lngd_settings

logger = logging.getLogger(__name__)


def create_lngd_optimizer(
    model: nn.Module,
    args: TrainingArguments | None = None,
    *,
    config: LNGDConfig | None = None,
    lr: float | None = None,
    **fields: Any,
) -> LNGD:
    """LNGD for a model, before any wrapper, as training arguments ask for it or by name.

    Args:
        args: training arguments whose `optim_args`, `learning_rate`, `weight_decay` and `adam_*` are used.
        config, lr: in place of the settings and the rate of `args`; a rate of 1e-3 if neither is given.
        **fields: fields of `LNGDConfig`, on top of the rest; `param_groups` and `layout` of `LNGD`.

    Raises:
        ValueError: a bad setting; names field, value and what is accepted.
        RuntimeError: a way of running that LNGD does not support; names the command to use.
    """
    refuse_unsupported(args, model)
    if args is not None:
        from_args, from_lr = lngd_settings(args)
        config, lr = config or from_args, from_lr if lr is None else lr
    return LNGD(model, config, lr=1e-3 if lr is None else lr, **fields)


def lngd_of(optimizer: Any) -> LNGD | None:
    """The LNGD inside accelerate's wrapper (or bare), else None."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, LNGD) else None


_ATrainer: Any = object  # one follows among the bases


class LNGDTrainerMixin(_ATrainer):
    """What both trainers add to transformers' own; goes before a trainer class among the bases.

    - `create_optimizer` makes LNGD where the arguments ask for it, and prints once which parameter went where.
    - The loss is normalised exactly under accumulation (see `loss`), whatever the optimizer.
    - Resuming loads every weight (see `checkpoints`).
    - Training logs carry LNGD's diagnostics.
    - A push that failed in the background is told; no checkpoint is removed while it is pushed.
    """

    optimizer: Any
    compute_loss_func: Any
    _default_args: Any = LNGDTrainingArguments

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        # a trainer with a constructor of its own makes arguments of its own class
        stock = super().__init__.__func__ in (Trainer.__init__, Seq2SeqTrainer.__init__)
        given = self._default_args(output_dir="tmp_trainer") if args is None and stock else args
        if given is not None and is_lngd(given):
            refuse_unsupported(given, model)
        if isinstance(model, nn.Module):
            freeze_fixed_positions(model)
        self._routing_is_told = False
        self.card_writer: Callable[[], Any] | None = None
        super().__init__(model, given, *rest, **kwargs)
        if given is None and not is_lngd(self.args):
            made = type(self.args).__name__
            logger.warning("args: got none, so %s made %s, which do not ask for lngd", type(self).__name__, made)
        if self.compute_loss_func is None and ignores_num_items(self.model):
            self.compute_loss_func = SummedCrossEntropy(self.label_smoother)

    def create_optimizer(self, model: Any = None) -> Any:
        """LNGD if the arguments ask for it, else what transformers makes of them."""
        if self.optimizer is None and is_lngd(self.args):
            model = self.model if model is None else model
            self.optimizer = create_lngd_optimizer(model, self.args, layout="auto", **self._decay_groups(model))
        lngd = lngd_of(self.optimizer)
        if lngd is not None and not self._routing_is_told:
            self._routing_is_told = True
            if self.is_world_process_zero():
                print(lngd.routing_table(), flush=True)
        return super().create_optimizer(model)

    def _decay_groups(self, model: Any) -> dict[str, Any]:
        """What a Trainer with a `get_decay_parameter_names` of its own leaves without weight decay."""
        own = type(self).get_decay_parameter_names
        if own in (Trainer.get_decay_parameter_names, Seq2SeqTrainer.get_decay_parameter_names):
            return {}  # LNGD knows more kinds of norms
        decayed = set(self.get_decay_parameter_names(model))
        rest = [name for name, p in model.named_parameters() if p.requires_grad and name not in decayed]
        entry = {"params": [plain_name(name) for name in rest], "weight_decay": 0.0, "name": "no_decay"}
        return {"param_groups": [entry]} if rest else {}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """As the Trainer's, and gives LNGD what it cannot see: the labels, and a second pass where it needs one."""
        labels_leave = self.label_smoother is not None or self.compute_loss_func is not None
        # a copy: the Trainer takes the labels out of what it is given
        batch = dict(with_decoder_inputs(self.model, inputs) if labels_leave else inputs)
        labels: Any = batch.get("labels")
        lngd = lngd_of(self.optimizer) if model.training else None
        if lngd is not None:
            lngd.set_batch(batch)
        loss, outputs = super().compute_loss(model, batch, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if lngd is not None and lngd.needs_fisher_pass:
            logits = outputs.get("logits") if isinstance(outputs, dict) else None
            if logits is None:
                others = other_fishers(lngd.config)
                raise ValueError(f"optim_args: fisher: got 'true' for a model without logits, accepted: {others}")
            fits = isinstance(labels, Tensor) and labels.shape == logits.shape[:-1]
            lngd.fisher_backward(logits, labels.ne(IGNORED_LABEL) if fits else None)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's; training logs carry LNGD's diagnostics, to four digits: they share a line with the loss."""
        if (lngd := lngd_of(self.optimizer)) is not None and self.is_in_train and "loss" in logs:
            logs.update({f"lngd_{name}": float(f"{value:.4g}") for name, value in lngd.diagnostics().items()})
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
        return lngd_settings(self.args)[0] if self.optimizer is None and is_lngd(self.args) else None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint that is written over is none until its last file is there."""
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / STATE).unlink(missing_ok=True)
            fsdp.clear_other_kind(self, folder)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Each rank writes its own; the file that makes a checkpoint one comes after all of them."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._load_weights(self.model if model is None else model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

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
        if self.is_fsdp_enabled and lngd is not None and checkpoint:
            fsdp.load(self, lngd, checkpoint)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)


class LNGDTrainer(LNGDTrainerMixin, Trainer):
    """transformers' `Trainer` with LNGD; all its arguments are the same. `args` are `LNGDTrainingArguments`."""


class LNGDSeq2SeqTrainer(LNGDTrainerMixin, Seq2SeqTrainer):
    """transformers' `Seq2SeqTrainer` with LNGD; all its arguments are the same."""

    _default_args = LNGDSeq2SeqTrainingArguments
