"""`benchmarks.cost.gpu_check` on the CPU: what it finds and writes, and that its checks can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from benchmarks.cost import gpu_check
from benchmarks.tasks import cifar10
from hf_lngd import LNGD

CPU = torch.device("cpu")


def small_resnet() -> torch.nn.Module:
    shape = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**shape, num_labels=10))


def test_everything_runs_on_a_cpu_and_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = torch.randint(0, 255, (256, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (256,))
    asked: list[Any] = []
    monkeypatch.setattr(cifar10, "load", lambda *given: asked.append(given) or {"train": images, "test": images})
    monkeypatch.setattr(gpu_check, "resnet18", small_resnet)
    file = tmp_path / "gpu.json"
    given = ["--device", "cpu", "--tiny", "--data", str(tmp_path), "--minutes", "0.01", "--results", str(file)]
    assert gpu_check.main(given) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    assert asked == [(tmp_path, 48_000)]
    assert {name: check["passed"] for name, check in result["checks"].items()} == dict.fromkeys(result["checks"], True)
    assert [row["optimizer"] for row in result["steps"]] == list(gpu_check.CONTENDERS)
    assert all(row["step_ms"] > row["optimizer_ms"] > 0 and row["calls"] > 0 for row in result["steps"])
    assert all(0 <= row["accuracy"] <= 1 and row["steps"] > 0 for row in result["cifar10"].values())
    assert "ResNet-18 on CIFAR-10" in capsys.readouterr().out


def test_the_check_against_the_cpu_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter((1e-3, 2e-3))
    monkeypatch.setattr(gpu_check, "LNGD", lambda model, lr: LNGD(model, lr=next(rates)))
    assert not gpu_check.same_as_cpu(CPU)["passed"]


def test_the_check_of_half_precision_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LNGD", lambda model, lr: LNGD(model, lr=1e-9))
    assert not gpu_check.in_half_precision(CPU, torch.bfloat16)["passed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_an_error() -> None:
    with pytest.raises(ValueError, match="--device: got cuda, accepted: cpu, as torch finds no GPU here"):
        gpu_check.main([])
