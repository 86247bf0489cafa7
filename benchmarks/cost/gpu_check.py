"""What LNGD does on a GPU: the same weights as on the CPU, half precision, what a step costs, how far a ResNet-18
comes.

    python -m benchmarks.cost.gpu_check --data DIR          # about 14 minutes on one device
    python -m benchmarks.cost.gpu_check --device cpu --tiny # what it does, in seconds

`--data` is the folder of CIFAR-10's parquet files; without it nothing is trained. Results go to
`benchmarks/results/gpu_check.json` after every part, so that a run that is cut off loses one part. Settled steps are
timed between factor steps and whole intervals of 20 steps apart; host synchronisations are those that torch's
`set_sync_debug_mode` reports inside `optimizer.step()`. Nothing of this was run on a GPU so far.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from benchmarks.cost import cases
from benchmarks.cost.cases import Batch, Case
from benchmarks.cost.small_batches import INTERVAL, Calls, lngd
from benchmarks.report.tables import table
from benchmarks.studies.rivals import Settings, Together, adamw, muon
from benchmarks.tasks import cifar10
from hf_lngd import LNGD

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu_check.json"
SIZES = (16, 64, 256)
ALL = 48_000  # images that are trained on: all but those that decide settings elsewhere
# The rates of each in the study of the CIFAR-10 ResNet (benchmarks/results/cifar10-resnet.json).
CONTENDERS: dict[str, tuple[Callable[[nn.Module, Settings], Together], Settings]] = {
    "adamw": (adamw, Settings(3e-3, 3e-3)),
    "muon": (muon, Settings(8e-3, 3e-3)),
    "lngd": (lngd, Settings(3e-3, None)),
}


def tiny() -> nn.Module:
    """A Marian of 16 numbers a token."""
    return cases.marian(16, 32, 2, 1, 50)


def vit() -> nn.Module:
    """ViT-B/16."""
    return ViTForImageClassification(ViTConfig(num_labels=1_000))


def resnet50() -> nn.Module:
    return ResNetForImageClassification(ResNetConfig(num_labels=1_000))


def resnet18() -> nn.Module:
    """The paper's, for images of 32 × 32: the first convolution does not shrink them."""
    shape = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**shape, num_labels=10))
    model.resnet.embedder.pooler = nn.Identity()
    model.resnet.embedder.embedder.convolution = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return model


def timed_cases(small: bool) -> dict[str, Callable[[int], Case]]:
    """Model → its case at a batch size."""
    if small:
        return {"tiny": lambda size: cases.text(tiny, size, 4, 50)}
    return {
        "Transformer-big": lambda size: cases.text(cases.transformer_big, size, 32, 32_000),
        "ViT-B/16": lambda size: cases.images(vit, size, 224),
        "ResNet-50": lambda size: cases.images(resnet50, size, 224),
    }


def on(device: torch.device, batch: Batch) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}


def wait(device: torch.device) -> None:
    """For the device to be done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def same_as_cpu(device: torch.device) -> dict[str, Any]:
    """25 steps in float64 on the CPU and on the device: the greatest distance of a weight over the distance it has
    travelled."""
    make, feed = cases.text(tiny, 4, 6, 50)
    found: list[list[Tensor]] = []
    for here in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model = make().double().eval().to(here)  # dropout draws other numbers on another device
        before = [p.detach().cpu().clone() for p in model.parameters()]
        optimizer, generator = LNGD(model, lr=1e-3), torch.Generator().manual_seed(0)
        for _ in range(25):
            model(**on(here, feed(generator))).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.close()
        found.append([p.detach().cpu() for p in model.parameters()])
    pairs = zip(*found, before, strict=True)
    distance = max(float((a - b).norm() / (a - start).norm().clamp_min(1e-30)) for a, b, start in pairs)
    return {"distance": distance, "passed": distance < 1e-6}


def in_half_precision(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """40 steps on one batch under autocast, in float16 with a scaler: the loss has to fall to a half, and to be
    finite."""
    torch.manual_seed(0)
    make, feed = cases.text(tiny, 8, 6, 50)
    model, batch = make().to(device).train(), on(device, feed(torch.Generator().manual_seed(0)))
    optimizer = LNGD(model, lr=3e-3)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    losses = []
    for _ in range(40):
        with torch.autocast(device.type, dtype):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    optimizer.close()
    passed = math.isfinite(losses[-1]) and losses[-1] < losses[0] / 2
    return {"first_loss": losses[0], "last_loss": losses[-1], "passed": passed}


def synchronisations(device: torch.device, optimizer: Together) -> int:
    """How often a step waits for the device."""
    if device.type != "cuda":
        optimizer.step()
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(one.message) for one in caught)


def step_row(device: torch.device, case: Case, contender: str) -> dict[str, Any]:
    """Seconds of a whole step and of `optimizer.step()` over whole intervals, memory, calls and synchronisations of
    one settled step, in bfloat16 under autocast."""
    make, feed = case
    torch.manual_seed(0)
    model, generator = make().to(device).train(), torch.Generator().manual_seed(0)
    build, settings = CONTENDERS[contender]
    optimizer, batches = build(model, settings), [on(device, feed(generator)) for _ in range(2)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def backward(i: int) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**batches[i % 2]).loss
        loss.backward()

    whole, own = 0.0, 0.0
    for i in range(2 * INTERVAL):
        wait(device)
        start = time.perf_counter()
        backward(i)
        wait(device)
        middle = time.perf_counter()
        optimizer.step()
        wait(device)
        end = time.perf_counter()
        optimizer.zero_grad()
        if i >= INTERVAL:  # the first interval warms up
            whole, own = whole + end - start, own + end - middle
    for i in range(2):  # past the factor step; neither Φ nor Ψ is due in these two
        backward(i)
        optimizer.step()
        optimizer.zero_grad()
    backward(0)
    waits = synchronisations(device, optimizer)
    optimizer.zero_grad()
    backward(1)
    with Calls() as calls:
        optimizer.step()
    optimizer.close()
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    row = {"step_ms": 1e3 * whole / INTERVAL, "optimizer_ms": 1e3 * own / INTERVAL}
    return {**row, "peak_mib": peak, "calls": calls.count, "synchronisations": waits}


def trained(device: torch.device, data: dict[str, Any], contender: str, seconds: float) -> dict[str, Any]:
    """A ResNet-18 on CIFAR-10 for so many seconds in bfloat16: warm-up in the first 5 % of them, then linear to 0."""
    torch.manual_seed(0)
    model = resnet18().to(device).train()
    build, settings = CONTENDERS[contender]
    optimizer = build(model, settings)
    rates = [(group, group["lr"]) for one in optimizer.optimizers for group in one.param_groups]
    steps, begin = 0, time.perf_counter()
    for batch in cifar10.batches(data["train"], cifar10.BATCH, cifar10.SIDE, seed=0):
        done = (time.perf_counter() - begin) / seconds
        if done >= 1:
            break
        for group, rate in rates:
            group["lr"] = rate * min((done + 1e-3) / 0.05, (1 - done) / 0.95)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**on(device, batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if steps % INTERVAL == 0:
            wait(device)  # else the clock runs ahead of the device
    optimizer.capture(False)
    model.eval()
    images, labels = data["test"]
    with torch.no_grad():
        parts = [model(cifar10.pixels(x.to(device), cifar10.SIDE)).logits for x in images.split(250)]
    accuracy = float((torch.cat(parts).argmax(-1).cpu() == labels).float().mean())
    optimizer.close()
    return {"accuracy": accuracy, "steps": steps, "epochs": steps * cifar10.BATCH / len(data["train"][1])}


def text_of(result: dict[str, Any]) -> str:
    """Tables, Markdown."""
    parts = [f"{result['device']}, torch {result['torch']}\n"]
    parts.append(table(["check", "passed"], [[k, "yes" if v["passed"] else "no"] for k, v in result["checks"].items()]))
    head = ["model", "batch", "optimizer", "step, ms", "step(), ms", "peak, MiB", "calls", "waits"]
    keys = ("step_ms", "optimizer_ms", "peak_mib", "calls", "synchronisations")
    body = [
        [r["model"], str(r["batch"]), r["optimizer"], *("–" if r[key] is None else f"{r[key]:.0f}" for key in keys)]
        for r in result["steps"]
    ]
    parts.append(table(head, body))
    rows = [[k, f"{100 * v['accuracy']:.1f}", f"{v['epochs']:.1f}"] for k, v in result["cifar10"].items()]
    if rows:
        parts.append(table(["ResNet-18 on CIFAR-10", "accuracy, %", "epochs"], rows))
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """Runs all parts, writes the file after each and prints tables. 1 where a check failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's parquet files; none: nothing is trained")
    parser.add_argument("--minutes", type=float, default=2.0, help="of training each optimizer (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in place of the three that are timed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, accepted: cpu, as torch finds no GPU here")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    checks: dict[str, Any] = {}
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "checks": checks, "steps": [], "cifar10": {}}

    def keep(what: Any) -> None:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(what, flush=True)

    half = {"bfloat16": torch.bfloat16, "float16, scaled": torch.float16}
    parts = {"as on the CPU": same_as_cpu}
    parts |= {key: partial(in_half_precision, dtype=dtype) for key, dtype in half.items()}
    for key, check in parts.items():
        checks[key] = check(device)
        keep(f"{key}: {checks[key]}")
    for model, case_of in timed_cases(args.tiny).items():
        for size in SIZES[:1] if args.tiny else SIZES:
            for contender in CONTENDERS:
                try:
                    row = step_row(device, case_of(size), contender)
                except torch.OutOfMemoryError as error:
                    keep(f"{model}, {size}, {contender}: {error}")
                    continue
                result["steps"].append({"model": model, "batch": size, "optimizer": contender, **row})
                keep(f"{model}, {size}, {contender}: {row}")
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    data = cifar10.load(args.data, ALL) if args.data else {}
    for contender in CONTENDERS if data else ():
        result["cifar10"][contender] = trained(device, data, contender, 60 * args.minutes)
        keep(f"{contender}: {result['cifar10'][contender]}")
    keep(text_of(result))
    return 0 if all(check["passed"] for check in checks.values()) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
