"""Models on paper, tables and the picture of `benchmarks.cost.check` and `benchmarks.cost.predict`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cost import cases
from benchmarks.cost import model as cost_model
from benchmarks.cost.cluster import Cluster, Device, cluster_step
from benchmarks.report.tables import table
from hf_lngd import LNGDConfig


@dataclass(frozen=True)
class Machines:
    """Clusters of several sizes: `counts` devices, `link` bytes/s of each. By default an accelerator of today in round
    numbers, sustained and not peak: assumptions, not measurements."""

    device: Device = Device(float32=50e12, bfloat16=400e12, bandwidth=3e12)
    link: float = 50e9
    counts: tuple[int, ...] = (8, 64, 512)

    def to_dict(self) -> dict[str, Any]:
        """What a file of results says of them; the numbers of devices stand in its rows."""
        return {"device": asdict(self.device), "link": self.link}


ASSUMED = Machines()
# (name, optimizer, LNGD's fields, whether layers belong to one device each)
CONTENDERS: list[tuple[str, str, dict[str, Any], bool]] = [
    ("AdamW", "adamw", {}, False),
    ("Muon", "muon", {}, False),
    ("LNGD fast, every device all layers", "lngd", {}, False),
    ("LNGD fast, layers owned", "lngd", {}, True),
    ("LNGD natural, T = 100, layers owned", "lngd",
     {"direction": "natural", "factor_interval": 100, "inverse_interval": 100}, True),
]  # fmt: skip
COLOURS = ("#6b7280", "#d97706", "#5eead4", "#0f766e", "#7c3aed")
SHOWN = {"adamw": "AdamW", "muon": "Muon"}
MARKS = {"adamw": "o", "muon": "s", "lngd fast": "D", "lngd natural": "^", "lngd paper": "v"}
SHADES = {"adamw": "#6b7280", "muon": "#d97706", "lngd fast": "#0f766e", "lngd natural": "#7c3aed",
          "lngd paper": "#be123c"}  # fmt: skip


def nllb() -> nn.Module:
    """The architecture of NLLB-200-3.3B."""
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    config = M2M100Config(vocab_size=256_206, d_model=2048, encoder_layers=24, decoder_layers=24, encoder_ffn_dim=8192,
                          decoder_ffn_dim=8192, encoder_attention_heads=16, decoder_attention_heads=16)  # fmt: skip
    return M2M100ForConditionalGeneration._from_config(config, attn_implementation="eager")


def vit_huge() -> nn.Module:
    """ViT-H/14."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120,
                       patch_size=14, image_size=224, num_labels=1000)  # fmt: skip
    return ViTForImageClassification._from_config(config, attn_implementation="eager")


def text_feed(rows: int, tokens: int) -> Callable[[], dict[str, Any]]:
    """A batch of so many pairs of sentences of so many tokens, when it is asked for."""

    def batch() -> dict[str, Any]:
        ids = torch.ones(rows, tokens, dtype=torch.long)
        return {"input_ids": ids, "decoder_input_ids": ids, "labels": ids}

    return batch


def image_feed(rows: int, size: int, channels: int = 3) -> Callable[[], dict[str, Any]]:
    """A batch of so many images, when it is asked for."""

    def batch() -> dict[str, Any]:
        return {"pixel_values": torch.empty(rows, channels, size, size), "labels": torch.ones(rows, dtype=torch.long)}

    return batch


# What a device gets of a batch.
LARGE: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], str]] = {
    "Transformer-big": (cases.transformer_big, text_feed(128, 64), "128 × 64 tokens"),
    "NLLB-3.3B": (nllb, text_feed(32, 128), "32 × 128 tokens"),
    "ViT-H/14": (vit_huge, image_feed(64, 224), "64 images"),
}


def large_rows(names: list[str] | None) -> dict[str, Any]:
    """Predictions for large models on clusters; the assumptions stand beside them.

    Raises:
        ValueError: an unknown name.
    """
    names = list(LARGE) if names is None else names
    for name in names:
        if name not in LARGE:
            raise ValueError(f"--large: got {name!r}, accepted: {', '.join(LARGE)}")
    return {**ASSUMED.to_dict(), "rows": [row for name in names for row in rows_of(name, *LARGE[name], ASSUMED)]}


def rows_of(
    name: str,
    build: Callable[[], nn.Module],
    feed: Callable[[], dict[str, Any]],
    per_device: str,
    machines: Machines,
) -> list[dict[str, Any]]:
    """Of one model, a row for each of the contenders.

    Args:
        build, feed: make it, and what a device gets of a batch; on the meta device, whatever its size.
        per_device: the batch in words.
    """
    inventories: dict[str, cost_model.Inventory] = {}
    rows = []
    for label, optimizer, fields, owned in CONTENDERS:
        key = repr(fields)
        if key not in inventories:
            with torch.device("meta"):
                config = LNGDConfig(**fields)
                inventories[key] = cost_model.take_inventory(build().eval(), feed(), config)
        predicted = predict(inventories[key], optimizer, owned, machines)
        rows.append({"model": name, "batch": per_device, "optimizer": label, **predicted})
    return rows


def predict(inventory: cost_model.Inventory, optimizer: str, owned: bool, machines: Machines) -> dict[str, Any]:
    """State on the fewest devices, arithmetic and memory traffic of a mean step if one device makes all of it, and its
    seconds and bytes sent on each number of devices."""
    if optimizer == "adamw":
        ops, state = cost_model.adamw_ops(inventory.parameters), cost_model.adamw_state(inventory)
    elif optimizer == "muon":
        ops = cost_model.muon_ops(inventory.matrices, inventory.others)
        state = cost_model.muon_state(inventory)
    else:
        ops, state = cost_model.lngd_ops(inventory, masked=True), inventory.lngd_state
        if owned:
            state -= round(inventory.owned_state * (1 - 1 / machines.counts[0]))
    model_seconds = inventory.model_flops / machines.device.bfloat16
    clusters = {}
    for count in machines.counts:
        cluster = Cluster(machines.device, count, machines.link)
        parts = cluster_step(inventory, cluster, optimizer, owned)
        reference = cluster_step(inventory, cluster, "adamw")["total"]
        clusters[str(count)] = {
            **{key: round(value, 6) for key, value in parts.items()},
            "over_adamw": round((model_seconds + parts["total"]) / (model_seconds + reference), 4),
        }
    return {
        "parameters": sum(inventory.parameters),
        "state_bytes": state,
        "tflop": round(sum(op.flops for op in ops) / 1e12, 4),
        "traffic_gb": round(sum(op.bytes for op in ops) / 1e9, 3),
        "forward_backward_seconds": round(model_seconds, 5),
        "devices": clusters,
    }


def tables(result: dict[str, Any]) -> str:
    """Both tables, in Markdown."""
    text = "# What a step costs, predicted\n\n"
    rows = result.get("check", [])
    if rows:
        near = sum(abs(row["ratio"] - 1) <= 0.2 for row in rows)
        text += f"Optimizer's part of a step here, one thread: {near} of {len(rows)} predictions within 20 %.\n\n"
        text += table(
            ["model", "optimizer", "measured, ms", "predicted, ms", "predicted / measured"],
            [
                [row["model"], row["optimizer"], f"{row['measured_ms']:.2f}", f"{row['predicted_ms']:.2f}",
                 f"{row['ratio']:.2f}" + ("" if abs(row["ratio"] - 1) <= 0.2 else " (miss)")]
                for row in rows
            ],
        )  # fmt: skip
    return text + (f"\n{predictions(result['large'])}" if result["large"]["rows"] else "")


def predictions(large: dict[str, Any]) -> str:
    """Assumptions and table of models on clusters, in Markdown."""
    rows, device = large["rows"], large["device"]
    counts = list(rows[0]["devices"])
    text = (
        f"On accelerators of {device['bfloat16'] / 1e12:g} TFLOP/s in bfloat16, {device['float32'] / 1e12:g} in "
        f"float32, {device['bandwidth'] / 1e12:g} TB/s, links of {large['link'] / 1e9:g} GB/s (assumed), DDP, "
        "nothing overlapped. Sent: by each device a step. Step: forward, backward and optimizer, beside AdamW's; "
        "forward and backward are torch's count of their products over the bfloat16 rate.\n\n"
    )
    text += table(
        ["model, batch a device", "optimizer", "state, GiB", "TFLOP", "traffic, GB", "sent, GB", "update, ms",
         *(f"step × on {count}" for count in counts)],
        [
            [f"{row['model']}, {row['batch']}", row["optimizer"], f"{row['state_bytes'] / 2**30:.2f}",
             f"{row['tflop']:.2f}", f"{row['traffic_gb']:.1f}",
             f"{row['devices'][counts[-1]]['bytes_sent'] / 1e9:.2f}", f"{update_ms(row):.1f}",
             *(f"{row['devices'][count]['over_adamw']:.3f}" for count in counts)]
            for row in rows
        ],
    )  # fmt: skip
    return text


def update_ms(row: dict[str, Any]) -> float:
    """Of the fewest devices, with the inverses."""
    parts = next(iter(row["devices"].values()))
    return 1e3 * (parts["update"] + parts["inverses"])


def draw(result: dict[str, Any], path: Path) -> None:
    """Predicted against measured seconds, and steps beside AdamW's over the number of devices."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in result["large"]["rows"]))
    panels = 1 + len(models)
    columns = min(2, panels)
    lines = math.ceil(panels / columns)
    figure = plt.figure(figsize=(4.7 * columns, 3.7 * lines), layout="constrained")
    left, *others = (figure.add_subplot(lines, columns, 1 + i) for i in range(panels))
    rows = result.get("check", [])
    for name, mark in MARKS.items():
        found = [row for row in rows if row["optimizer"] == name]
        left.loglog([r["measured_ms"] for r in found], [r["predicted_ms"] for r in found], mark, color=SHADES[name],
                    markersize=5.5, label=SHOWN.get(name, name.replace("lngd", "LNGD")))  # fmt: skip
    if rows:
        values = [row[key] for row in rows for key in ("measured_ms", "predicted_ms")]
        ends = [min(values) / 1.5, max(values) * 1.5]
        left.fill_between(
            ends, [0.8 * e for e in ends], [1.2 * e for e in ends], color="#9ca3af", alpha=0.3, linewidth=0
        )
        left.plot(ends, ends, color="#111827", linewidth=0.8)
    left.set_xlabel("measured here, ms")
    left.set_ylabel("predicted, ms")
    left.set_title("Optimizer's part of a step (band: ± 20 %)", fontsize=10, loc="left")
    left.legend(frameon=False, fontsize=8)
    over = [cluster["over_adamw"] for row in result["large"]["rows"] for cluster in row["devices"].values()]
    highest = 1 + 1.05 * (max(over, default=2.0) - 1)  # of all panels, so that they compare
    for axis, model in zip(others, models, strict=True):
        for (name, *_), colour in zip(CONTENDERS, COLOURS, strict=True):
            (row,) = [r for r in result["large"]["rows"] if (r["model"], r["optimizer"]) == (model, name)]
            counts = list(map(int, row["devices"]))
            ratios = [cluster["over_adamw"] for cluster in row["devices"].values()]
            axis.semilogx(counts, ratios, "o-", color=colour, linewidth=1.8, markersize=4, label=name)
        axis.set_xticks(counts, map(str, counts))
        axis.minorticks_off()
        axis.set_xlabel("devices")
        axis.set_title(f"{model} (assumed), {row['batch']} a device", fontsize=10, loc="left")
        axis.set_ylim(0.98, highest)
        axis.set_ylabel("step / AdamW's step")
    if others:
        others[0].legend(frameon=False, fontsize=8, loc="upper right")
    for axis in (left, *others):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path, dpi=130)
    plt.close(figure)
