"""What a training step of a model costs on a cluster, from the model's config and the devices' data sheet.

    python -m benchmarks.cost.predict Helsinki-NLP/opus-mt-en-de --batch 128 --tokens 64 --devices 8 64
    python -m benchmarks.cost.predict folder/with/config.json --batch 64 --bfloat16 990 --bandwidth 3.3 --link 400

AdamW, Muon and LNGD: state, arithmetic, memory traffic, bytes sent and seconds (see `benchmarks.cost.cluster` for what
is assumed). Nothing is loaded or computed, whatever the model's size: it is built on the meta device. The optimizer's
part was checked on a CPU by `benchmarks.cost.check`; forward and backward, and accelerators, by nothing. Forward and
backward are their products alone: those of small models, where launches take longer, come out too short, and what an
optimizer costs beside them too high.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.cost.cluster import Device
from benchmarks.cost.report import ASSUMED, Machines, image_feed, predictions, rows_of, text_feed

IMAGE_SIZE = 224


def read_model(name: str, rows: int, tokens: int) -> tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], str]:
    """(how to make the model, how to make its batch, the batch in words) of a config.

    Args:
        name: a folder with a config.json, that file, or a model of the Hub.
        rows: sentences, of so many `tokens`, or images, of the size and channels that the config has.

    Raises:
        ValueError: no such config, or of a model that neither translates nor classifies images.
    """
    from transformers import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        AutoConfig,
        AutoModelForImageClassification,
        AutoModelForSeq2SeqLM,
    )

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as problem:
        raise ValueError(f"CONFIG: got {name!r}: {problem}") from problem
    auto: Any
    if type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        auto, feed, words = AutoModelForSeq2SeqLM, text_feed(rows, tokens), f"{rows} × {tokens} tokens"
    elif type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        size = getattr(config, "image_size", None) or IMAGE_SIZE
        side = size if isinstance(size, int) else max(size)
        feed = image_feed(rows, side, getattr(config, "num_channels", 3))
        auto, words = AutoModelForImageClassification, f"{rows} images of {side} × {side}"
    else:
        accepted = "one that AutoModelForSeq2SeqLM or AutoModelForImageClassification takes"
        raise ValueError(f"CONFIG: got model_type {config.model_type!r}, accepted: {accepted}")
    return lambda: auto.from_config(config, attn_implementation="eager"), feed, words


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Rates are sustained ones, and by default those that the tables of the project assume."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, device = parser.add_argument, ASSUMED.device
    add("config", metavar="CONFIG", help="folder with a config.json, that file, or a model of the Hub")
    add("--batch", type=int, required=True, help="pairs of sentences, or images, that a device gets")
    add("--tokens", type=int, default=64, help="of a sentence (default: %(default)s)")
    add("--devices", type=int, nargs="+", default=list(ASSUMED.counts), help="numbers of devices (default: 8 64 512)")
    for name, default, what in (
        ("bfloat16", device.bfloat16 / 1e12, "TFLOP/s"),
        ("float32", device.float32 / 1e12, "TFLOP/s"),
        ("bandwidth", device.bandwidth / 1e12, "TB/s of memory"),
        ("link", ASSUMED.link / 1e9, "GB/s of each device's link"),
    ):
        add(f"--{name}", type=float, default=default, help=f"{what} (default: %(default)g)")
    add("--json", type=Path, help="a file for the numbers, the parts of a step apart")
    args = parser.parse_args(arguments)
    for name in ("batch", "tokens", "bfloat16", "float32", "bandwidth", "link"):
        if not 0 < getattr(args, name) < float("inf"):
            raise ValueError(f"--{name}: got {getattr(args, name)}, accepted: above 0")
    if min(args.devices) < 1:
        raise ValueError(f"--devices: got {min(args.devices)}, accepted: at least 1")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    args = parse(arguments)
    device = Device(args.float32 * 1e12, args.bfloat16 * 1e12, args.bandwidth * 1e12)
    machines = Machines(device, args.link * 1e9, tuple(sorted(set(args.devices))))
    name = Path(args.config).stem if Path(args.config).is_file() else Path(args.config).name
    result = {**machines.to_dict(), "rows": rows_of(name, *read_model(args.config, args.batch, args.tokens), machines)}
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(predictions(result))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
