"""Which of transformers' image classifiers and translation models LNGD trains, and how much of each.

    python -m benchmarks.coverage.check

For a tiny model of each architecture (`benchmarks.coverage.zoo`), in float64 where the model can, without dropout: one
step; gradient accumulation beside the whole batch; saving and resuming; the size of updates; the share of its weights
that LNGD owns. An architecture is covered if the checks hold and LNGD owns four fifths of its weights, or the table
says why not. The results are `benchmarks/results/coverage.json` and `coverage.md`.
"""

from __future__ import annotations

import argparse
import inspect
import io
import json
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.coverage.entry import Entry
from benchmarks.coverage.zoo import ABSENT, ZOO, batch, build, build_full, known
from benchmarks.report.tables import table
from hf_lngd import LNGD, LNGDConfig
from hf_lngd.directions import MOST_GAIN
from hf_lngd.routing import EXACT_EMBEDDING, FROZEN_OWNER, LNGD_OWNER, Route, route

RESULTS = Path(__file__).resolve().parents[1] / "results"
LNGD_FIELDS: dict[str, Any] = {"lr": 1e-3, "factor_interval": 1, "update_interval": 1}  # no layer waits for its turn
CHECKS = ("step", "accumulation", "resume", "size")
ENOUGH = 0.8
IGNORED = -100
# Accumulation in float32, where the default direction's matmuls may be in bfloat16.
SINGLE_FIELDS = {**LNGD_FIELDS, "embedding": "fallback", "direction": "natural"}
# ‖θ − θ'‖ / ‖θ'‖ of accumulation; some models compute in float32 in between (SigLIP 2 resizes its positions in it).
NEAR = 1e-5
# Learning rates that an entry may move by in a step: up to four times the root mean square of a layer's, which may be
# enlarged. Embeddings have three, rows of rare tokens four times those, and an entry of a row up to twice its own.
LARGEST = max(4 * MOST_GAIN, 3 * 4 * 2)
# Arrays that are looked up or added, not multiplied with: tables of positions, tokens, latents.
_TABLES = re.compile(r"position|pos_embed|relative|attention_bias|token|latents|probe", re.IGNORECASE)


class CheckFailed(AssertionError):
    """A promise that a model does not see kept; the message says which."""


# One step of training


def loss_of(model: nn.Module, tensors: dict[str, Tensor], terms: int) -> Tensor:
    """The sum of the cross entropies of labels, over `terms`: parts of a batch add up to its mean."""
    takes_labels = "labels" in inspect.signature(model.forward).parameters
    output = model(**{name: value for name, value in tensors.items() if takes_labels or name != "labels"})
    logits = getattr(output, "logits", None)
    logits = output[0] if logits is None else logits
    labels = tensors["labels"].flatten()
    return F.cross_entropy(logits.flatten(0, -2), labels, ignore_index=IGNORED, reduction="sum") / terms


def train_step(model: nn.Module, optimizer: LNGD, tensors: dict[str, Tensor], parts: int = 1) -> float:
    """A step on a batch, in so many equal micro-batches; the loss."""
    terms = int((tensors["labels"] != IGNORED).sum())
    pieces = zip(*(value.chunk(parts) for value in tensors.values()), strict=True)
    total = 0.0
    for piece in pieces:
        loss = loss_of(model, dict(zip(tensors, piece, strict=True)), terms)
        loss.backward()
        total += float(loss.detach())
    optimizer.step()
    return total


# The checks


def check_step(entry: Entry) -> tuple[Ownership, int]:
    """Everything is finite after a step and every layer of LNGD has moved; what LNGD owns, and all parameters."""
    model = make(entry)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = LNGD(model, **LNGD_FIELDS)
    called: set[str] = set()
    for module_name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=module_name: called.add(name))  # type: ignore[misc]
    loss = train_step(model, optimizer, batch(entry, dtype=dtype_of(entry)))
    after = dict(model.named_parameters())
    require(torch.isfinite(torch.tensor(loss)), f"the loss is {loss}")
    broken = [name for name, p in after.items() if not torch.isfinite(p).all()]
    require(not broken, f"not finite after a step: {', '.join(broken[:3])}")
    rests = re.compile(entry.rests[0]) if entry.rests else None
    layers = {r.parameter: r.layer for r in optimizer.routing() if is_layer(r)}
    unseen = [name for name, layer in layers.items() if after[name].grad is not None and layer not in called]
    require(not unseen, f"trained, but its module is never called: {', '.join(unseen[:3])}")
    still = [n for n in layers if torch.equal(before[n], after[n]) and not (rests and rests.search(n))]
    require(not still, f"not moved by a step: {', '.join(still[:3])}")
    return ownership(optimizer, after), sum(p.numel() for p in after.values())


def check_accumulation(entry: Entry) -> str:
    """Two micro-batches give one batch's weights; what was done to make them comparable."""
    weights, note = [], "with AdamW's tables and the natural direction" if entry.single else ""
    for parts in (1, 2):
        model = make(entry)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.eval()
        note = "with batch norm's running statistics" if norms else note
        optimizer = LNGD(model, **(SINGLE_FIELDS if entry.single else LNGD_FIELDS))
        for seed in range(2):
            train_step(model, optimizer, batch(entry, seed=seed, dtype=dtype_of(entry)), parts)
            optimizer.zero_grad()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    distance = float((weights[1] - weights[0]).norm() / weights[0].norm())
    require(distance <= NEAR, f"two micro-batches are {distance:.1e} from one batch")
    return note


def check_resume(entry: Entry) -> None:
    """A saved model and optimizer, loaded into fresh ones, go on bit for bit."""
    model = make(entry)
    optimizer = LNGD(model, **LNGD_FIELDS)
    steps = [batch(entry, seed=seed, dtype=dtype_of(entry)) for seed in range(4)]
    for tensors in steps[:2]:
        train_step(model, optimizer, tensors)
        optimizer.zero_grad()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = build(entry, seed=1, dtype=dtype_of(entry))
    fresh_optimizer = LNGD(fresh, **LNGD_FIELDS)
    fresh.load_state_dict(saved["model"])
    fresh_optimizer.load_state_dict(saved["optimizer"])
    for tensors in steps[2:]:
        for one, its in ((model, optimizer), (fresh, fresh_optimizer)):
            train_step(one, its, tensors)
            its.zero_grad()
    theirs = fresh.state_dict()
    unlike = [name for name, value in model.state_dict().items() if not torch.equal(value, theirs[name])]
    require(not unlike, f"unlike after resuming: {', '.join(unlike[:3])}")


def check_size(entry: Entry) -> None:
    """No entry of a parameter moves by many times the learning rate in the first steps."""
    model = make(entry)
    optimizer = LNGD(model, **LNGD_FIELDS)
    largest, where = 0.0, ""
    for seed in range(4):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train_step(model, optimizer, batch(entry, seed=seed, dtype=dtype_of(entry)))
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            move = float((p.detach() - before[name]).abs().max()) / LNGD_FIELDS["lr"]
            largest, where = max((largest, where), (move, name))
    require(largest <= LARGEST, f"{where} moves by {largest:.0f} times the rate")


MORE_CHECKS: dict[str, Callable[[Entry], str | None]] = {
    "accumulation": check_accumulation,
    "resume": check_resume,
    "size": check_size,
}


def require(holds: Any, message: str) -> None:
    """Raise CheckFailed with the message unless it holds."""
    if not holds:
        raise CheckFailed(message)


def make(entry: Entry) -> nn.Module:
    """The zoo's model in the type that it can compute in."""
    return build(entry, dtype=dtype_of(entry))


def dtype_of(entry: Entry) -> torch.dtype:
    """float64 unless the model cannot."""
    return torch.float32 if entry.single else torch.float64


# What LNGD owns


@dataclass(frozen=True)
class Ownership:
    """Who owns a model's weights: its matrices and kernels, without embeddings and other tables.

    Attributes:
        weights: how many numbers they are.
        share: what part of them LNGD owns.
        rest: the others by the reason in the routing: reason → (numbers, an example, whether any has a gradient).
    """

    weights: int
    share: float
    rest: dict[str, tuple[int, str, bool]]


def is_layer(route: Route) -> bool:
    """A part of one of LNGD's layers: tables are not, also where LNGD takes them by token frequency."""
    return route.owner == LNGD_OWNER and route.reason != EXACT_EMBEDDING


def is_weight(route: Route) -> bool:
    """A matrix or a kernel: neither a vector, however many dimensions of size 1 it has, nor a table."""
    if is_layer(route):
        return len(route.shape) > 1
    vector = route.numel == max(route.shape, default=1)
    is_table = route.reason.startswith(("embedding", "position")) or _TABLES.search(route.parameter.rsplit(".", 1)[-1])
    return not (vector or is_table or route.reason == "norm" or route.owner == FROZEN_OWNER)


def ownership(optimizer: LNGD, parameters: dict[str, nn.Parameter]) -> Ownership:
    """Of a model that has made a step, its gradients still there."""
    weights = [r for r in optimizer.routing() if is_weight(r)]
    total = sum(r.numel for r in weights)
    rest: dict[str, tuple[int, str, bool]] = {}
    for r in weights:
        if not is_layer(r):
            numbers, example, used = rest.get(r.reason, (0, r.parameter, False))
            used = used or parameters[r.parameter].grad is not None
            rest[r.reason] = (numbers + r.numel, example, used)
    return Ownership(total, sum(r.numel for r in weights if is_layer(r)) / total, rest)


def full_size(entry: Entry) -> tuple[int, float]:
    """(weights, share) of the architecture's default size, from the routing alone."""
    weights = [r for r in route(build_full(entry), LNGDConfig()).routes if is_weight(r)]
    total = sum(r.numel for r in weights)
    return total, sum(r.numel for r in weights if is_layer(r)) / total


# The table


def row_of(entry: Entry) -> dict[str, Any]:
    """All checks of a model, as they go into the JSON file. What fails is said, not raised."""
    row: dict[str, Any] = {"model": entry.name, "architecture": entry.architecture, "class": entry.class_name}
    try:
        owned, parameters = check_step(entry)
        weights, share = full_size(entry)
    except Exception as problem:
        return {**row, **dict.fromkeys(CHECKS, failure(problem)), "covered": False}
    row |= {"parameters": parameters, "weights": owned.weights, "share": round(owned.share, 4), "step": "yes"}
    for name, check in MORE_CHECKS.items():
        if name in entry.exempt:
            row[name] = f"exempt: {entry.exempt[name]}"
            continue
        try:
            note = check(entry) or ""
            row[name] = f"yes, {note}" if note else "yes"
        except Exception as problem:
            row[name] = failure(problem)
    row["rest"] = [
        {"reason": reason, "share": round(numbers / owned.weights, 4), "example": example, "has_gradient": used}
        for reason, (numbers, example, used) in owned.rest.items()
    ]
    row |= {"full_weights": weights, "full_share": round(share, 4)}
    row["remark"] = remark(entry, owned.share)
    row["covered"] = (owned.share >= ENOUGH or bool(entry.low)) and not any(row[c].startswith("no") for c in CHECKS)
    return row


def failure(problem: Exception) -> str:
    """A cell of the table."""
    text = str(problem).splitlines()[0] if str(problem) else ""
    return f"no: {text}" if isinstance(problem, CheckFailed) else f"no: {type(problem).__name__}: {text}"


def remark(entry: Entry, share: float) -> str:
    """Why a share is small, why float32, and which layers rest."""
    parts = [entry.low] if entry.low and share < ENOUGH else []
    parts += [f"float32: {entry.single}"] if entry.single else []
    parts += [f"at rest: {entry.rests[1]}"] if entry.rests else []
    return "; ".join(parts)


def covered(rows: list[dict[str, Any]]) -> list[str]:
    """Architectures of which every model is covered."""
    return sorted({r["architecture"] for r in rows} - {r["architecture"] for r in rows if not r["covered"]})


def markdown(result: dict[str, Any]) -> str:
    """The tables of `coverage.md`, made of nothing but the JSON file."""
    rows = result["models"]
    low = sorted({r["architecture"] for r in rows if r.get("share", 1) < ENOUGH} & set(covered(rows)))
    text = "# What LNGD covers\n\nWritten by `python -m benchmarks.coverage.check`, which says what it checks.\n\n"
    text += f"**{len(covered(rows))} of {len({r['architecture'] for r in rows})} architectures** of transformers "
    text += f"{result['transformers']} that can be built here are covered, with {len(rows)} models"
    text += f"; a model of {', '.join(low)} by the reason in its remark.\n\n" if low else ".\n\n"
    text += (
        "Share: of the matrices and kernels, without embeddings and tables, that LNGD owns: in the tiny model, and in\n"
    )
    text += "one of the configuration's default size. "
    text += f"Size: no entry moves by more than {LARGEST:.0f} learning rates in a step.\n\n"
    head = ["model", "class", "parameters", "share", "full size", *CHECKS, "left to AdamW", "remark"]
    text += table(head, [_cells(row) for row in rows])
    text += "\n## Not built\n\n"
    return text + table(["architecture", "why"], [[name, why] for name, why in sorted(result["absent"].items())])


def _cells(row: dict[str, Any]) -> list[str]:
    rest = [
        f"{100 * part['share']:.1f} % {part['reason']} ({part['example']}{'' if part['has_gradient'] else ', unused'})"
        for part in row.get("rest", [])
    ]
    return [
        row["model"],
        row["class"],
        f"{row['parameters']:,}" if "parameters" in row else "–",
        f"{100 * row['share']:.1f} %" if "share" in row else "–",
        f"{100 * row['full_share']:.1f} % of {row['full_weights'] / 1e6:.1f} M" if "full_share" in row else "–",
        *(row[check] for check in CHECKS),
        ", ".join(rest) or "–",
        row.get("remark") or "–",
    ]


def run(names: list[str]) -> dict[str, Any]:
    """The checks of these models, with a progress bar."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [row_of(ZOO[name]) for name in tqdm(names, unit="model")]
    here = known()
    absent = {name: why for name, why in ABSENT.items() if name in here}
    return {"torch": torch.__version__, "transformers": transformers.__version__, "models": rows, "absent": absent}


def main(arguments: list[str] | None = None) -> None:
    """Checks the models, writes both files and prints what is not covered."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(ZOO), help="rows to check (default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args(arguments)
    strange = [name for name in args.models if name not in ZOO]
    if strange:
        raise ValueError(f"--models: got '{strange[0]}', accepted: {', '.join(ZOO)}")
    transformers.logging.set_verbosity_error()
    result = run(args.models)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "coverage.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.results / "coverage.md").write_text(markdown(result), encoding="utf-8")
    for row in result["models"]:
        if not row["covered"] or row["share"] < ENOUGH:
            print(f"{row['model']}: {100 * row.get('share', 0):.1f} %, {', '.join(row[c] for c in CHECKS)}")
    print(f"covered: {len(covered(result['models']))} architectures")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
