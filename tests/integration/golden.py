"""Golden runs: short training runs whose final weights every version of the optimizer has to reproduce.

Each run trains a tiny, seeded model for 40 steps through the public interface alone. A record keeps, for each trained
parameter, its Frobenius norm and its inner product with a seeded random probe, and the last loss. The tolerance of a
record is relative to the norm. Compare, or record anew after a change of behaviour that was made on purpose::

    python -m tests.integration.golden [NAME ...]
    python -m tests.integration.golden --record [NAME ...]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_lngd import LNGD

RECORDS = Path(__file__).with_suffix(".json")
STEPS, WARM_UP = 40, 5
IGNORED = -100
VOCABULARY, CLASSES = 40, 5
Batch = dict[str, Tensor]

# Models. Weights start larger than usual: else attention is all but even, and the gradients of queries and keys are
# differences of near equals, of which little but rounding is left.


def marian() -> nn.Module:
    """An encoder and a decoder layer; the token embeddings and the head are tied."""
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "vocab_size": VOCABULARY, "init_std": 0.25}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    rest = {"dropout": 0.0, "max_position_embeddings": 32, "activation_function": "swish"}
    return MarianMTModel(MarianConfig(**heads, **layers, **tokens, **rest))


def vit() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    image = {"image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": CLASSES, "initializer_range": 0.25}
    return ViTForImageClassification(ViTConfig(**sizes, **image, hidden_dropout_prob=0.0))


def gpt2() -> nn.Module:
    """Its layers are of transformers' `Conv1D`, whose weight is [in, out]."""
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.25}
    return GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, **tokens))


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, CLASSES))

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(inputs)


class ConvNet(nn.Module):
    """Two convolutions and a head, no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(inputs)))).mean((2, 3)))


class ResNet(nn.Module):
    """A stem and one residual block with a strided 1 × 1 shortcut; batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.first, self.first_norm = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.shortcut = nn.Conv2d(6, 8, 1, stride=2, bias=False)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.relu(self.stem_norm(self.stem(inputs)))
        y = self.second_norm(self.second(self.relu(self.first_norm(self.first(x)))))
        return self.head(self.relu(y + self.shortcut(x)).mean((2, 3)))


class Grouped(nn.Module):
    """A grouped and a depthwise convolution, the latter dilated and with a kernel that is not square."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(12, 12, (3, 2), dilation=(2, 1), padding=(2, 0), groups=12, bias=False)
        self.norm, self.head = nn.GroupNorm(2, 12), nn.Linear(12, CLASSES)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.first(inputs))))
        return self.head(F.gelu(self.norm(self.depthwise(x))).mean((2, 3)))


class Twice(nn.Module):
    """A layer that is called twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.head = nn.Linear(12, 10), nn.Linear(10, 10), nn.Linear(10, CLASSES)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        x = torch.tanh(self.first(inputs))
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


class Tied(nn.Module):
    """Two layers with one weight, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(12, 10), nn.Linear(10, 10), nn.Linear(10, 10)
        self.right.weight, self.head = self.left.weight, nn.Linear(10, CLASSES)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.right(F.silu(self.left(torch.tanh(self.first(inputs)))))))


class Branches(nn.Module):
    """Two layers that read one input, one of which has no gradient in some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(10, CLASSES)

    def forward(self, inputs: Tensor, both: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.first(inputs)
        return self.head(torch.tanh(x + self.second(inputs) if both.all() else x))


# Batches: step → a batch in float64.


def sentences(step: int) -> Batch:
    """Sentence pairs, half of the sources padded, a quarter of the labels cut short; lengths change with the step."""
    draw = torch.Generator().manual_seed(step)
    source, target = 6 + step % 3, 5 + step % 2
    ids = torch.randint(2, VOCABULARY, (8, source), generator=draw)
    labels = torch.randint(2, VOCABULARY, (8, target), generator=draw)
    mask = torch.ones_like(ids)
    mask[:4, source - 2 :] = 0
    labels[:2, target - 2 :] = IGNORED
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def shifted_sentences(step: int) -> Batch:
    """The decoder's inputs made of the labels, as where the labels are kept from the model (label smoothing)."""
    batch = sentences(step)
    inputs = batch["labels"].roll(1, 1).masked_fill(batch["labels"].roll(1, 1) == IGNORED, 0)
    inputs[:, 0] = 0
    return batch | {"decoder_input_ids": inputs}


def texts(step: int) -> Batch:
    """Texts for a causal model; labels already stand a token ahead."""
    ids = torch.randint(2, VOCABULARY, (8, 8), generator=torch.Generator().manual_seed(step))
    mask = torch.ones_like(ids[:, 1:])
    mask[:4, 5:] = 0
    return {"input_ids": ids[:, :-1], "attention_mask": mask, "labels": ids[:, 1:].masked_fill(mask == 0, IGNORED)}


def images(step: int) -> Batch:
    draw = torch.Generator().manual_seed(step)
    pixels = torch.randn(16, 3, 8, 8, generator=draw, dtype=torch.float64)
    return {"inputs": pixels, "labels": torch.randint(0, CLASSES, (16,), generator=draw)}


def pictures(step: int) -> Batch:
    """Images under the argument's name in transformers."""
    batch = images(step)
    return {"pixel_values": batch["inputs"], "labels": batch["labels"]}


def vectors(step: int) -> Batch:
    """More samples than columns: else EKFAC's eigenvectors are rounding in the null space of its factors."""
    draw = torch.Generator().manual_seed(step)
    inputs = torch.randn(32, 12, generator=draw, dtype=torch.float64)
    return {"inputs": inputs, "labels": torch.randint(0, CLASSES, (32,), generator=draw)}


def branching(step: int) -> Batch:
    return vectors(step) | {"both": torch.full((32,), step % 4 != 2)}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "marian": (marian, sentences),
    "marian_shifted": (marian, shifted_sentences),
    "vit": (vit, pictures),
    "gpt2": (gpt2, texts),
    "mlp": (MLP, vectors),
    "conv": (ConvNet, images),
    "resnet": (ResNet, images),
    "grouped": (Grouped, images),
    "twice": (Twice, vectors),
    "tied": (Tied, vectors),
    "branches": (Branches, branching),
}

# A bias of keys changes no attention: its gradient is rounding, which AdamW blows up to steps of full size.
FROZEN = ("k_proj.bias", "key.bias", "c_attn.bias", "embed_positions.weight")


@dataclass(frozen=True)
class Run:
    """One configuration.

    Attributes:
        model: of `MODELS`.
        fields: of `LNGDConfig`.
        lr: highest rate of the schedule.
        parts: micro-batches of a step (of a process).
        ranks, layout: processes, and ``ddp`` or ``fsdp``.
        dtype, autocast: of the weights; whether the forward pass is in bfloat16.
        hides_labels: the labels do not go through the model but through `set_batch`.
        spoil: step → the parameter whose gradient has a NaN in it.
        tolerance: relative to a parameter's norm.
    """

    model: str
    fields: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-2
    parts: int = 1
    ranks: int = 1
    layout: str = "ddp"
    dtype: torch.dtype = torch.float64
    autocast: bool = False
    hides_labels: bool = False
    spoil: dict[int, str] = field(default_factory=dict)
    tolerance: float = 1e-10

    def settings(self) -> dict[str, Any]:
        intervals = {"factor_interval": 5, "inverse_interval": 5, "update_interval": 1}
        return {"embedding": "fallback", **intervals} | self.fields


def _paper(preset: str = "paper", **fields: Any) -> dict[str, Any]:
    return {"preset": preset, **fields}


LOOSE = 1e-3
# In half precision: a number that is rounded to the other side leads elsewhere in 40 steps.
HALF = 0.2
# The gradient of a classifier's matrix lacks a direction, since that of the logits sums to zero. Orthogonalised, what
# bfloat16's rounding leaves in that direction is a step of full size.
WITHOUT_HEAD = {"exclude": r"^4\."}
ENCODER_LAYER = "model.encoder.layers.0"

RUNS: dict[str, Run] = {
    # the default
    "fast-marian": Run("marian"),
    "fast-marian-intervals": Run("marian", {"factor_interval": 4, "inverse_interval": 8}),
    "fast-marian-exact": Run("marian", {"embedding": "exact"}),
    "fast-marian-bias": Run("marian", {"bias": "factor", "embedding": "exact"}),
    "fast-marian-blocks": Run("marian", {"max_factor_dim": 8, "bias": "factor"}),
    "fast-marian-exclude": Run("marian", {"exclude": r"fc2|encoder.*q_proj", "embedding": "exact"}),
    "fast-marian-parts": Run("marian", {"embedding": "exact"}, parts=4),
    "fast-marian-decay": Run("marian", {"weight_decay": 0.3}),
    "fast-vit-no-decay": Run("vit", {"weight_decay": 0.0, "betas": (0.8, 0.98), "eps": 1e-6}),
    "fast-marian-update": Run("marian", {"momentum_on": "update", "momentum": 0.9}),
    "fast-gpt2-no-momentum": Run("gpt2", {"momentum": 0.0, "ema_decay": 0.5, "damping": 0.1}),
    "fast-vit-damping": Run("vit", {"damping": "paper", "damping_bounds": (1e-3, 3e-2)}),
    "fast-resnet-rates": Run("resnet", {"rate_scale": 0.2, "fallback_lr_scale": 0.5}, lr=5e-2),
    "fast-gpt2-no-rate": Run("gpt2", {"rate": "none"}),
    "fast-marian-labels": Run("marian_shifted", {"embedding": "exact"}, hides_labels=True),
    "fast-marian-nan": Run(
        "marian",
        {"embedding": "exact"},
        spoil={
            7: f"{ENCODER_LAYER}.fc1.weight",
            10: f"{ENCODER_LAYER}.self_attn.q_proj.weight",
            23: f"{ENCODER_LAYER}.final_layer_norm.weight",
        },
    ),
    "fast-vit": Run("vit"),
    "fast-vit-bias": Run("vit", {"bias": "factor"}, parts=2),
    "fast-gpt2": Run("gpt2", {"embedding": "exact"}),
    "fast-gpt2-bias": Run("gpt2", {"bias": "factor", "max_factor_dim": 8}),
    "fast-resnet": Run("resnet"),
    "fast-resnet-parts": Run("resnet", parts=4),
    "fast-grouped": Run("grouped"),
    "fast-grouped-bias": Run("grouped", {"bias": "factor", "max_factor_dim": 8}),
    "fast-twice": Run("twice"),
    "fast-tied": Run("tied"),
    "fast-tied-bias": Run("tied", {"bias": "factor"}),
    "fast-branches": Run("branches", {"bias": "factor"}),
    "fast-mlp": Run("mlp"),
    "turns-marian": Run("marian", {"update_interval": 2, "embedding": "exact", "bias": "factor"}, parts=2),
    "turns-resnet": Run("resnet", {"update_interval": "auto"}),
    # precision
    "float32-marian": Run("marian", dtype=torch.float32, tolerance=LOOSE),
    "bfloat16-mlp": Run("mlp", WITHOUT_HEAD, lr=3e-3, dtype=torch.bfloat16, tolerance=HALF),
    "bfloat16-marian": Run("marian", lr=1e-3, dtype=torch.bfloat16, tolerance=HALF),
    "autocast-mlp": Run("mlp", WITHOUT_HEAD, dtype=torch.float32, autocast=True, tolerance=HALF),
    "autocast-vit": Run("vit", lr=1e-3, dtype=torch.float32, autocast=True, tolerance=HALF),
    "float32-paper": Run("mlp", _paper(), dtype=torch.float32, tolerance=LOOSE),
    # the paper's algorithm, its Fishers and directions
    "paper-marian": Run("marian", _paper()),
    "paper-marian-exact": Run("marian", _paper(embedding="exact", bias="fallback"), parts=2),
    "paper-marian-blocks": Run("marian", _paper(max_factor_dim=8, factor_interval=4, inverse_interval=8)),
    "paper-vit": Run("vit", _paper(), parts=2),
    "paper-gpt2": Run("gpt2", _paper()),
    "paper-resnet": Run("resnet", _paper()),
    "paper-grouped": Run("grouped", _paper()),
    "paper-twice": Run("twice", _paper()),
    "paper-tied": Run("tied", _paper()),
    "lngd_sample-marian": Run("marian", _paper("lngd_sample"), lr=1e-2),
    "lngd_sample-mlp": Run("mlp", _paper("lngd_sample"), lr=1e-3),
    "lngd_lr-marian": Run("marian", _paper("lngd_lr")),
    "lngd_lr-conv": Run("conv", _paper("lngd_lr"), parts=2),
    "paper-expected": Run("gpt2", _paper(fisher="expected", seed=3)),
    "sampled-polar": Run("gpt2", {"fisher": "sampled", "seed": 5}),
    "sampled-natural": Run("conv", {"fisher": "sampled", "direction": "natural"}),
    "true-natural": Run("marian", {"fisher": "true", "direction": "natural"}),
    "empirical-natural": Run("marian", {"fisher": "empirical", "direction": "natural"}, parts=2),
    "empirical-labels": Run(
        "marian_shifted", {"fisher": "empirical", "direction": "natural", "embedding": "exact"}, hides_labels=True
    ),
    "expected-natural": Run("grouped", {"direction": "natural", "bias": "factor"}),
    # families
    "kfac-mlp": Run("mlp", {"family": "kfac"}),
    "kfac-conv": Run("conv", {"family": "kfac", "bias": "factor"}, parts=2),
    "ekfac-mlp": Run("mlp", {"family": "ekfac", "bias": "factor"}),
    "ekfac-conv": Run("conv", {"family": "ekfac"}),
    "tkfac-mlp": Run("mlp", {"family": "tkfac"}),
    "tkfac-conv": Run("conv", {"family": "tkfac", "bias": "factor", "max_factor_dim": 8}),
    "ng+-mlp": Run("mlp", {"family": "ng+", "bias": "factor"}),
    "ng+-conv": Run("conv", {"family": "ng+"}),
    "kfac-true": Run("mlp", {"family": "kfac", "fisher": "true", "rate": "adaptive"}),
    # processes
    "ddp2-fast": Run("marian", {"embedding": "exact"}, ranks=2),
    "ddp2-fast-parts": Run("mlp", {"bias": "factor"}, ranks=2, parts=2),
    "ddp2-paper": Run("marian", _paper(), ranks=2),
    "ddp2-kfac": Run("conv", {"family": "kfac"}, ranks=2),
    "fsdp2-fast": Run("marian", {"embedding": "exact"}, ranks=2, layout="fsdp"),
    "fsdp2-fast-conv": Run("grouped", {"bias": "factor"}, ranks=2, layout="fsdp"),
    "fsdp2-turns": Run("marian", {"update_interval": 3}, ranks=2, layout="fsdp"),
    "fsdp2-paper": Run("marian", _paper(), ranks=2, layout="fsdp"),
    "ddp4-fast": Run("marian", ranks=4),
    "ddp4-paper": Run("marian", _paper(), ranks=4),
}


def make_model(run: Run) -> nn.Module:
    """The seeded model, in training mode."""
    torch.manual_seed(0)
    model = MODELS[run.model][0]().to(run.dtype).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(FROZEN))
    return model


def share_of(batch: Batch, run: Run, rank: int) -> list[Batch]:
    """A process's micro-batches of a batch: equal shares of its samples, in order."""
    samples = len(batch["labels"])
    size = samples // (run.ranks * run.parts)
    parts = [{name: value[i : i + size] for name, value in batch.items()} for i in range(0, samples, size)]
    return parts[rank * run.parts : (rank + 1) * run.parts]


def backward(model: Any, optimizer: LNGD, part: Batch, terms: Tensor, run: Run) -> Tensor:
    """The micro-batch's share of the mean loss over the whole batch; DDP and FSDP2 divide gradients by the ranks."""
    labels = part["labels"]
    part = {name: value.to(run.dtype) if value.is_floating_point() else value for name, value in part.items()}
    if run.hides_labels:
        optimizer.set_batch(part)
        part = {name: value for name, value in part.items() if name != "labels"}
    elif run.model == "gpt2":  # which would move the labels once more: its loss is not used
        optimizer.set_batch(part)
    with torch.autocast("cpu", torch.bfloat16, enabled=run.autocast):
        output = model(**part)
    logits = output if isinstance(output, Tensor) else output.logits
    if optimizer.needs_fisher_pass:
        optimizer.fisher_backward(logits, labels != IGNORED)
    logits = logits if run.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum") / terms
    (loss * run.ranks).backward()
    return loss.detach()


def schedule(step: int) -> float:
    """Linear warm-up and linear decay."""
    return min((step + 1) / WARM_UP, (STEPS - step) / (STEPS - WARM_UP))


def spread(model: nn.Module, run: Run) -> Any:
    """The model as the processes share it."""
    if run.ranks == 1:
        return model
    if run.layout == "ddp":
        return DistributedDataParallel(model)
    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith("layers"):
            fully_shard(module)
    return fully_shard(model)


def synchronizes(wrapped: Any, run: Run, last: bool) -> Any:
    """Gradients are averaged over processes with the last micro-batch."""
    if run.layout == "fsdp" and run.ranks > 1:
        wrapped.set_requires_gradient_sync(last)
    return wrapped.no_sync() if run.layout == "ddp" and run.ranks > 1 and not last else contextlib.nullcontext()


def train(run: Run, change: Callable[[nn.Module], None] | None = None) -> dict[str, Any]:
    """The record of a run, in this process, which is one of `run.ranks`.

    Args:
        change: of the model, before it is trained.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rank = dist.get_rank() if run.ranks > 1 else 0
        model = make_model(run)
        if change is not None:
            change(model)
        wrapped = spread(model, run)
        optimizer = LNGD(model, lr=run.lr, **run.settings())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        loss = torch.zeros(())
        for step in range(STEPS):
            batch = MODELS[run.model][1](step)
            terms, parts = (batch["labels"] != IGNORED).sum(), share_of(batch, run, rank)
            loss = torch.zeros((), dtype=torch.float64)
            for i, part in enumerate(parts):
                with synchronizes(wrapped, run, i == len(parts) - 1):
                    loss += backward(wrapped, optimizer, part, terms, run)
            if step in run.spoil:
                gradient = model.get_parameter(run.spoil[step]).grad
                assert gradient is not None
                gradient.view(-1)[-1] = torch.nan
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        optimizer.close()
        return record(model, loss, run)
    finally:
        torch.set_num_threads(threads)


def record(model: nn.Module, loss: Tensor, run: Run) -> dict[str, Any]:
    """What is kept of a run: parameter → [norm, inner product with a probe]; a collective of its processes."""
    parameters, digest = {}, hashlib.sha256()
    for name, parameter in model.named_parameters():
        value: Any = parameter.detach()
        weight = value.full_tensor() if hasattr(value, "full_tensor") else value
        digest.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
        if parameter.requires_grad:
            draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            probe = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
            parameters[name] = [float(weight.double().norm()), float((weight.double() * probe).sum())]
    if run.ranks > 1:
        dist.all_reduce(loss)
        digests: list[Any] = [None] * run.ranks
        dist.all_gather_object(digests, digest.hexdigest())
        assert len(set(digests)) == 1, "processes ended with unlike weights"
    return {"tolerance": run.tolerance, "loss": float(loss), "parameters": parameters, "sha256": digest.hexdigest()}


def _work(rank: int, ranks: int, names: list[str], folder: str) -> None:
    store, limit = f"file://{folder}/store", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=limit)
    for name in names:
        try:
            found: Any = train(RUNS[name])
        except Exception:
            found = traceback.format_exc()
        if rank == 0 or isinstance(found, str):
            Path(folder, f"{names.index(name)}.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


def train_all(names: list[str], ranks: int) -> dict[str, Any]:
    """The records of runs of `ranks` processes; where one failed, the traceback of a process."""
    if ranks == 1:
        return {name: train(RUNS[name]) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        # a server that has imported torch and transformers once forks the processes
        multiprocessing.get_context("forkserver").set_forkserver_preload([_work.__module__])
        torch.multiprocessing.start_processes(_work, (ranks, names, folder), ranks, start_method="forkserver")
        found = {}
        for i, name in enumerate(names):
            kept = [json.loads(path.read_text()) for path in sorted(Path(folder).glob(f"{i}.*"))]
            found[name] = next((value for value in kept if isinstance(value, str)), kept[0])
        return found


def deviation(found: dict[str, Any], expected: dict[str, Any]) -> tuple[float, str]:
    """The largest difference of two records, relative to a parameter's norm, and where it is."""
    if list(found["parameters"]) != list(expected["parameters"]):
        return float("inf"), "names of parameters"
    gaps = [(abs(found["loss"] - expected["loss"]) / abs(expected["loss"]), "loss")]
    for name, (norm, probe) in expected["parameters"].items():
        new_norm, new_probe = found["parameters"][name]
        gap = max(abs(new_norm - norm), abs(new_probe - probe))
        gaps.append((gap / norm if gap else 0.0, name))
    worst = max(gaps)
    return (float("inf"), "a number is NaN") if any(gap != gap for gap, _ in gaps) else worst


def load_records() -> dict[str, Any]:
    return json.loads(RECORDS.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare golden runs with their records, or record them anew.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of runs; none: all")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    names = options.names or list(RUNS)
    records = load_records() if RECORDS.exists() else {}
    bad = 0
    for ranks in sorted({RUNS[name].ranks for name in names}):
        mine = [name for name in names if RUNS[name].ranks == ranks]
        for group in [[name] for name in mine] if ranks == 1 else [mine]:
            start = time.perf_counter()
            for name, found in train_all(group, ranks).items():
                if isinstance(found, str):
                    print(f"{name}: failed\n{found}")
                    bad += 1
                    continue
                expected = records.get(name, {"tolerance": 0.0, "parameters": {}, "sha256": ""})
                gap, where = deviation(found, expected)
                note = "same bits" if found["sha256"] == expected["sha256"] else f"{gap:.1e} ({where})"
                print(f"{name}: {note}, {(time.perf_counter() - start) / len(group):.1f} s", flush=True)
                bad += not options.record and not gap <= expected["tolerance"]
                if options.record:
                    records[name] = found
    if options.record:
        kept = {name: records[name] for name in RUNS if name in records}
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in kept.items()]
        RECORDS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
