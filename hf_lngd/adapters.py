"""Which parameters of PEFT's adapters are no plain layer, and why: those go to AdamW.

LoRA's A and B are linear layers, called like any other, and need nothing of this. Told by the modules around a
parameter, so peft itself is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

_TUNERS = "peft.tuners."
# Modules around LoRA's A and B that multiply both into the weight, so that their forward is never called.
_MERGING = ("MultiheadAttention", "ParamWrapper")
# Tuners whose linear layers are called; those of others may be read only.
_CALLING = ("prefix_tuning", "p_tuning")


def adapter_reason(name: str, modules: Mapping[str, nn.Module], geometry: object) -> str | None:
    """Why AdamW takes the parameters of an adapter's module; None: it is no adapter's, or a layer like any other.

    Args:
        name: the module's, e.g. ``…q_proj.lora_A.default``.
        modules: all of the model's by name.
        geometry: of the module, None where it is no layer that LNGD can own.
    """
    parts = name.split(".") if name else []
    for end in range(len(parts), -1, -1):  # innermost first
        if parts[end : end + 1] == ["base_layer"]:  # what the adapter stands beside
            return None
        module = modules[".".join(parts[:end])]
        path, kind = type(module).__module__, type(module).__name__
        if not path.startswith(_TUNERS) or any(cls.__name__ == "BaseTuner" for cls in type(module).__mro__):
            continue
        tuner = path.removeprefix(_TUNERS).split(".")[0]
        if tuner != "lora":
            return None if geometry is not None and tuner in _CALLING else f"adapter, {tuner}"
        outer = (type(modules[".".join(parts[:i])]).__name__ for i in range(end, -1, -1))
        merging = next((found for found in outer if found in _MERGING), None)
        return _reason_of_lora(module, kind, parts[-1], geometry, merging)
    return None


def _reason_of_lora(module: nn.Module, kind: str, adapter: str, geometry: object, merging: str | None) -> str | None:
    """`module`, of type `kind`: the layer of peft's that holds A and B of an `adapter`, or what DoRA adds to it;
    `merging`: the type of one around it that merges them."""
    variant = getattr(module, "lora_variant", {}).get(adapter)
    form = kind if variant is None else type(variant).__name__.removesuffix("Variant")
    if form.startswith("Dora"):  # calls A and B on an identity matrix, too, and scales what they give by their norm
        return "adapter, DoRA"
    if variant is not None:
        return f"adapter, LoRA variant {form}"
    if geometry is None:
        return f"adapter, LoRA of {kind}"
    return None if merging is None else f"adapter, LoRA merged by {merging}"
