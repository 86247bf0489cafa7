"""The heads of attention: a projection (q, k, v, also in one; the output's, too) has blocks of rows, one a head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

# What transformers and timm call the width of a head, and the number of heads.
_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim")
_COUNTS = ("num_heads", "num_attention_heads", "n_heads")


def heads_of(name: str, rows: int, modules: Mapping[str, nn.Module]) -> int:
    """How many blocks of rows a linear layer has, 1 for a layer of no attention.

    A layer belongs to an attention if the module around it, or the one around that (``BertAttention``, whose layers
    are in ``self`` and ``output``), is called so and it or one of its children knows the width or the number of heads.
    Of grouped queries and of q, k, v in one matrix only the width counts.

    Args:
        name: of the layer's module. rows: its outputs. modules: all of the model's, by name."""
    for depth in (1, 2):
        around = modules.get(name.rsplit(".", depth)[0] if name.count(".") >= depth else "")
        if around is None or "attention" not in type(around).__name__.lower():
            continue
        for module in (around, *around.children()):
            width = _number(module, _WIDTHS)
            heads = _number(module, _COUNTS)
            if width and rows % width == 0:
                return rows // width
            if not width and heads and rows % heads == 0:
                return heads
    return 1


def _number(module: nn.Module, names: tuple[str, ...]) -> int:
    """The first of these attributes that is a positive integer; else 0."""
    found = (getattr(module, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), 0)
