"""Did the hooks see what a step needs? If not: what has to be called, or which settings do without."""

from __future__ import annotations

from .checks import GRADIENT_FISHERS
from .config import LNGDConfig
from .curvature.capture import Capture
from .curvature.compiled import stance_in_the_way
from .curvature.layers import Layer


def check_capture(config: LNGDConfig, capture: Capture, layers: list[Layer], started: bool) -> None:
    """Raise RuntimeError for a factor step without a forward pass, or without the gradients that ``fisher`` needs.

    Args:
        layers: LNGD's, with the gradients of this step.
        started: there are factors of earlier steps.
    """
    source = capture.source
    if config.fisher == "true" and source.waiting:
        others = ", ".join(source.others)
        raise RuntimeError(
            "fisher: 'true' needs optimizer.fisher_backward(logits) after each forward of a factor step "
            f"(optimizer.needs_fisher_pass is True in one), or accepted: {others}"
        )
    hidden = source.hidden
    if hidden:
        unseen = [r.name for r in layers if r.name in hidden and r.weight.grad is not None]
        if unseen:
            others = ", ".join(kind for kind in source.others if kind not in GRADIENT_FISHERS)
            raise RuntimeError(
                f"fisher: '{source.kind}' saw no gradients of {', '.join(unseen[:3])} in this step. Checkpoint "
                "with use_reentrant=False, call layers within the model's forward"
                + (f"; or accepted: {others}" if others else "")
            )
    if not capture.topology.groups and not started:
        raise RuntimeError(
            "LNGD.step(): the layers have gradients, but no forward pass of the model was seen. Call the model "
            "that was given to LNGD (a wrapper around it is fine), with gradients enabled, after LNGD was made "
            "and without optimizer.eval()" + _stances()
        )


def _stances() -> str:
    """What else torch.compile needs. A stance that was set around the forward pass alone is not there any more."""
    stance = stance_in_the_way()
    given = "" if stance is None else f", got {stance!r}"
    return f"; if it is compiled, with no torch.compiler.set_stance around the call{given}."


def check_rows(config: LNGDConfig, capture: Capture, layers: list[Layer], many: bool) -> None:
    """Raise RuntimeError where ``rate=adaptive`` saw no rows: Eq. 12-13 without curvature is a rate of about 1/μ.

    Args:
        layers: LNGD's, with the gradients of this step.
        many: there are several processes.
    """
    if config.rate != "adaptive":
        return
    seen = capture.rows
    names = [layer.name for layer in layers if layer.weight.grad is not None]
    if capture.rows_seen and many:  # another rank may have called a layer that this did not
        names = [name for name in names if name in capture.rows_hidden]
    known = capture.rows_seen > 0  # or the batch is empty, and so is what its layers saw
    unseen = [n for n in names if n not in seen or not seen[n].calls or not (known or seen[n].seen == 0)]
    if unseen:
        raise RuntimeError(
            f"rate: 'adaptive' saw no gradients of {', '.join(unseen[:3])} in this step. Call the model that was "
            "given to LNGD itself, on tensors, in each step, without optimizer.eval(); checkpoint activations with "
            "use_reentrant=False; or accepted: rms, trust, none"
        )
