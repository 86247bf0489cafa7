"""Writes docs/options.md from the options' own metadata.

    python -m tools.options_page

A test asks whether the page is what this makes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hf_lngd.config import OPTIONS, PRESETS
from hf_lngd.integrations.training_args import LNGDArgumentsMixin

PAGE = Path(__file__).resolve().parents[1] / "docs" / "options.md"
HEAD = """\
# Options

Written by `python -m tools.options_page`; `python -m hf_lngd --options` prints the same. All options are fields of
`hf_lngd.LNGDConfig`. They are given as text, `--optim_args "preset=fast,factor_interval=10"`, or by name,
`LNGD(model, lr=1e-3, factor_interval=10)`. A bad value names the field, the value and what is accepted; a wrong name
lists the closest ones.

**Precedence**: `--optim_args`, then `--learning_rate`, `--weight_decay` and `--adam_*`, then the family's defaults,
then the preset; keywords of `LNGD(…)` and `create_lngd_optimizer(…)` come before all of them. Schedules scale all
rates alike.

What changing one option does to the loss: [Results](results.md#one-option-changed-alone). In which order to try:
[Tuning](tuning.md).

## Fields

`preset` (default `fast`) chooses the values of all others: {presets}. `family` (default `lngd`) is the approximation of
the Fisher information, see [Algorithm](algorithm.md#other-families). Defaults are those of `fast`; where `paper` has
another, it stands below.

| field | default | meaning |
| --- | --- | --- |
"""
MIDDLE = """
## Training arguments

What `LNGDTrainingArguments`, `LNGDSeq2SeqTrainingArguments` and `LNGDArgumentsMixin` have of their own, beside
transformers':

| argument | default | meaning |
| --- | --- | --- |
"""


def shown(value: Any) -> str:
    """A value as `--optim_args` takes it."""
    return f"`{':'.join(map(str, value)) if isinstance(value, tuple) else value}`" if value not in ("", None) else ""


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def render() -> str:
    """The page."""
    fields = ""
    for name, option in OPTIONS.items():
        default = shown(option["default"])
        if (paper := PRESETS["paper"].get(name, option["default"])) != option["default"]:
            default += f"; paper: {shown(paper)}"
        fields += row(f"`{name}`", default, option["help"])
    arguments = ""
    for field in dataclasses.fields(LNGDArgumentsMixin):
        arguments += row(f"`--{field.name}`", shown(field.default), field.metadata["help"])
    presets = ", ".join(f"`{name}`" for name in PRESETS)
    return HEAD.format(presets=presets) + fields + MIDDLE + arguments


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
