"""The cost model against counters of its own: torch's FLOP counter, real optimizers' state, cases done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig

from benchmarks.cost import calibration as cost_calibration
from benchmarks.cost import cases
from benchmarks.cost import check as cost_check
from benchmarks.cost import model as cost_model
from benchmarks.cost import predict as cost_predict
from benchmarks.cost import report as cost_report
from benchmarks.cost.cluster import Cluster, Device, cluster_step, makespan
from benchmarks.cost.model import PRODUCTS, Factor, Inventory, Op
from hf_lngd import LNGD, LNGDConfig

SETTLED = cost_check.SETTLED
# Of the embeddings, which only the Marian has; both rules, whatever the default is.
RULES = {"marian": ("exact", "fallback"), "vit": ("exact",), "resnet": ("exact",), "mlp": ("exact",)}
MODELS = {
    "marian": (lambda: cases.marian(32, 80, 2, 1, 60), lambda: cost_check.text_batch(3, 5, 60)),
    "vit": (lambda: cost_check._vit(32, 1, 8), lambda: cost_check.image_batch(3, 3, 32, 32)),
    "resnet": (lambda: cases.make_resnet(0), lambda: cost_check.image_batch(2, 3, 32, 32)),
    "mlp": (lambda: cost_check.Mlp((12, 70, 130, 10)), lambda: cost_check.image_batch(9, 12)),
}


def config_of(contender: str, embedding: str) -> LNGDConfig:
    return LNGDConfig(**{**cost_check.CONFIGS.get(contender, SETTLED), "embedding": embedding})


def taken(name: str, contender: str, embedding: str = "exact") -> tuple[Inventory, nn.Module, dict[str, torch.Tensor]]:
    build, feed = MODELS[name]
    inventory = cost_model.take_inventory(build(), feed(), config_of(contender, embedding))
    torch.manual_seed(0)
    return inventory, build().train(), feed()


@pytest.mark.parametrize(("name", "embedding"), [(name, rule) for name, rules in RULES.items() for rule in rules])
@pytest.mark.parametrize("contender", ["adamw", "muon", *cost_check.CONFIGS])
def test_bytes_of_state_are_those_of_the_optimizer(name: str, embedding: str, contender: str) -> None:
    inventory, model, batch = taken(name, contender, embedding)
    if contender not in cost_check.CONFIGS:
        optimizer: Any = cost_check.make(contender, model)
        model(**batch).loss.backward()
        optimizer.step()
        predicted = (cost_model.adamw_state if contender == "adamw" else cost_model.muon_state)(inventory)
        assert (
            predicted <= optimizer.state_bytes() <= predicted + 4 * len(inventory.parameters)
        )  # a step count a tensor
        return
    optimizer = LNGD(model, inventory.config)
    model(**batch).loss.backward()
    optimizer.step()
    assert inventory.lngd_state == optimizer.memory_usage()["total"]
    assert 0 < inventory.owned_state <= inventory.lngd_state
    optimizer.close()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("contender", ["muon", "lngd fast", "lngd natural"])
def test_products_are_those_of_the_step(name: str, contender: str) -> None:
    """A step without factor work, counted by torch."""
    inventory, model, batch = taken(name, contender)
    optimizer: Any = cost_check.make("muon", model) if contender == "muon" else LNGD(model, inventory.config)
    ops = [op for op in cost_check.predict(contender, inventory) if op.kind in PRODUCTS and op.times >= 1]
    model(**batch).loss.backward()
    counted = []
    for _ in range(1 if contender == "muon" else 2 * cost_check.INTERVAL):
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        counted.append(counter.get_total_flops())
    optimizer.close()
    assert min(counted) == sum(op.flops for op in ops)  # the others hold an inverse's root, too


def test_products_of_a_factor_step() -> None:
    inventory, model, batch = taken("marian", "lngd fast")
    optimizer = LNGD(model, inventory.config)
    with FlopCounterMode(display=False) as collecting:  # before the first step
        model(**batch)
    optimizer.eval()
    with FlopCounterMode(display=False) as plain:
        model(**batch)
    optimizer.close()
    predicted = sum(
        op.flops for f in inventory.factors for op in cost_model.capture_ops(f, True) if op.kind in PRODUCTS
    )
    extra = collecting.get_total_flops() - plain.get_total_flops()
    # Ψ's numerator, a vector times a matrix, is counted by torch as a product and here as a pass over memory
    vectors = sum(2 * f.units * f.positions * f.links for f in inventory.factors)
    assert extra in (predicted, predicted + vectors)


def test_shared_factors_and_positions() -> None:
    inventory, _, _ = taken("marian", "lngd fast")
    # encoder: qkv, out, fc1, fc2; decoder: qkv, out, q, kv (with none of the encoder's), out, fc1, fc2
    assert len(inventory.factors) == 4 + 7
    assert {f.positions for f in inventory.factors} == {15} and inventory.tables == ((60, 32),)
    assert sum(bank.layers for bank in inventory.banks) == 6 + 10
    assert {f.links for f in inventory.factors} == {0}
    weights = sum(m * d for m, d in inventory.matrices)
    head = 60 * 32  # tied: no matrix of LNGD's, but a product of the model's
    products = 6 * 15 * (weights + head)  # forward, and backward to inputs and weights
    assert products <= inventory.model_flops <= 1.2 * products  # attention, where torch counts it


@pytest.mark.parametrize("kind", ["polar", "natural", "adaptive"])
def test_calls_of_the_dispatcher(kind: str) -> None:
    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.number += 1
            return func(*args, **(kwargs or {}))

    contender = {"polar": "lngd fast", "natural": "lngd natural", "adaptive": "lngd paper"}[kind]
    inventory, model, batch = taken("vit", contender)
    optimizer = cost_check.make(contender, model)
    found = []
    for _ in range(8):
        model.zero_grad()
        model(**batch).loss.backward()
        with Count() as count:
            optimizer.step()
        found.append(count.number)
    optimizer.close()
    a_bank, a_layer = cost_model.CALLS[kind]
    expected = sum(a_bank + a_layer * bank.layers for bank in inventory.banks)
    assert min(found) == pytest.approx(expected, rel=0.35)


def test_operations_by_hand() -> None:
    assert Op("float32", (2, 3, 4, 5), 1.5).flops == 2 * 2 * 3 * 4 * 5 * 1.5
    assert Op("bfloat16", (1, 3, 4, 5)).bytes == 2 * (12 + 20 + 15)
    assert Op("adamw", (10,)).bytes == 280 and Op("call", (1,), 9).flops == Op("call", (1,), 9).bytes == 0
    flops = sum(op.flops for op in cost_model.newton_schulz(2, 7, 3))
    assert flops == 5 * 2 * (2 * 3 * 7 * 3 + 2 * 3 * 3 * 3 + 2 * 3 * 3 * 7)
    assert [op.times for op in cost_model.scaled([Op("cast", (4,), 2)], 0.25)] == [0.5]
    assert Factor(2, 3, 4, 12, 100, 0).triangle == 2 * 3 * 10


def test_devices_by_hand() -> None:
    device = Device(float32=1e12, bfloat16=4e12, bandwidth=1e11, launch=1e-6)
    assert device.seconds(Op("float32", (1, 1000, 1000, 1000), 7)) == pytest.approx(2e9 / 1e12 + 1e-6)
    assert device.seconds(Op("bfloat16", (1, 1, 1000, 1000))) == pytest.approx(2 * (1000 + 1e6 + 1000) / 1e11 + 1e-6)
    assert device.seconds(Op("stream", (1000,))) == pytest.approx(12_000 / 1e11 + 1e-6)
    assert device.seconds(Op("inverse", (2, 1000))) == pytest.approx(2 * 1e9 / 1e11 + 1e-6)
    four = Cluster(device, 4, link=1e10, latency=1e-5)
    assert four.all_reduce(1e9) == pytest.approx(1.5 * 0.1 + 1e-5)
    assert four.all_gather(1e9) == pytest.approx(0.75 * 0.1 + 1e-5)
    assert Cluster(device, 1, 1e10).all_reduce(1e9) == Cluster(device, 1, 1e10).all_gather(1e9) == 0
    assert makespan([5, 4, 3, 3, 3], 2) == 10 and makespan([5, 1], 8) == 5 and makespan([1, 2, 3], 1) == 6
    assert cost_calibration.interpolate([(10, 1.0), (20, 3.0)], 15) == 2
    assert cost_calibration.interpolate([(10, 1.0), (20, 3.0)], 5) == 1
    assert cost_calibration.interpolate([(10, 1.0), (20, 3.0)], 40) == 6


def test_a_cluster_step_by_hand() -> None:
    inventory, _, _ = taken("mlp", "lngd fast")
    device = Device(1e12, 4e12, 1e11)
    gradients = 4 * sum(inventory.parameters)
    triangles = 4 * sum(f.triangle for f in inventory.factors)
    one = cluster_step(inventory, Cluster(device, 1, 1e10), "lngd")
    assert one["gradients"] == one["factors"] == one["gather"] == one["bytes_sent"] == 0
    same = cost_model.total_seconds(cost_model.lngd_ops(inventory, masked=True), device)
    assert one["total"] == pytest.approx(same)
    eight, owned = (cluster_step(inventory, Cluster(device, 8, 1e10), "lngd", o) for o in (False, True))
    updates = 4 * sum(m * d for m, d in inventory.matrices)
    assert eight["bytes_sent"] == pytest.approx(1.75 * (gradients + triangles / cost_check.INTERVAL))
    assert owned["bytes_sent"] == pytest.approx(1.75 * gradients + 0.875 * (triangles / cost_check.INTERVAL + updates))
    assert eight["inverses"] == pytest.approx(one["inverses"]) and eight["update"] == pytest.approx(one["update"])
    assert 0 < owned["inverses"] < eight["inverses"] and 0 < owned["update"] < eight["update"]
    for parts in (eight, owned):
        total = sum(parts[k] for k in ("gradients", "factors", "inverses", "gather", "update"))
        assert parts["total"] == pytest.approx(total)
    adamw = cluster_step(inventory, Cluster(device, 8, 1e10), "adamw")
    assert adamw["bytes_sent"] == pytest.approx(1.75 * gradients) and adamw["factors"] == 0
    with pytest.raises(ValueError, match="optimizer: got 'sgd', accepted: adamw, muon, lngd"):
        cluster_step(inventory, Cluster(device, 8, 1e10), "sgd")


def test_the_check_in_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cost_check, "MODELS", {"tiny": MODELS["mlp"]})
    monkeypatch.setattr(cost_calibration, "SIZES", [2**10, 2**12])
    monkeypatch.setattr(cost_calibration, "COLD", 2**14)
    monkeypatch.setattr(cost_report, "LARGE", {"tiny": (MODELS["marian"][0], cost_report.text_feed(3, 5), "15 tokens")})
    threads = torch.get_num_threads()
    cost_check.main(["--models", "tiny", "--rounds", "1", "--results", str(tmp_path / "c.json")])
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert [row["optimizer"] for row in result["check"]] == ["adamw", "muon", *cost_check.CONFIGS]
    for row in result["check"]:
        assert row["ratio"] == pytest.approx(row["predicted_ms"] / row["measured_ms"], rel=0.02)
        assert row["predicted_ms"] == pytest.approx(sum(row["predicted_ms_by_kind"].values()), abs=0.02)
    whole, owned = (row for row in result["large"]["rows"] if row["optimizer"].startswith("LNGD fast"))
    assert owned["state_bytes"] < whole["state_bytes"] and owned["tflop"] == whole["tflop"]
    assert "predicted / measured" in capsys.readouterr().out and (tmp_path / "c.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--rounds", "0"], "--rounds: got 0"), (["--large", "GPT"], "--large: got 'GPT', accepted: Transformer-big")],
)
def test_bad_arguments_are_named(arguments: list[str], named: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{}", encoding="utf-8")
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match=named):
        cost_check.main(["--large-only", "--results", str(tmp_path / "c.json"), *arguments])
    torch.set_num_threads(threads)


def test_a_config_is_predicted_as_the_model_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = MODELS["marian"][0]()
    model.config.save_pretrained(tmp_path)
    sheet = ["--bfloat16", "100", "--float32", "10", "--bandwidth", "1", "--link", "20", "--devices", "4", "1"]
    common = ["--batch", "3", "--tokens", "5", *sheet, "--json", str(tmp_path / "c.json")]
    for name in (tmp_path, tmp_path / "config.json"):
        cost_predict.main([str(name), *common])
        found = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
        assert found["device"]["float32"] == 10e12 and found["link"] == 20e9
        machines = cost_report.Machines(Device(10e12, 100e12, 1e12), 20e9, (1, 4))
        rows = cost_report.rows_of("", MODELS["marian"][0], cost_report.text_feed(3, 5), "", machines)
        for got, row in zip(found["rows"], rows, strict=True):
            assert {**got, "model": "", "batch": ""} == row
    assert "| config, 3 × 5 tokens | AdamW |" in capsys.readouterr().out
    assert [found["rows"][0]["devices"][count]["gradients"] > 0 for count in ("1", "4")] == [False, True]


def test_a_config_of_images_is_predicted_at_its_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = cost_check._vit(32, 1, 8).config
    config.num_channels = 1
    config.save_pretrained(tmp_path)
    cost_predict.main([str(tmp_path), "--batch", "2", "--devices", "8"])
    assert "2 images of 32 × 32 | LNGD fast, layers owned |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"--batch": "0"}, "--batch: got 0, accepted: above 0"),
        ({"--link": "nan"}, "--link: got nan"),
        ({"--devices": "0"}, "--devices: got 0, accepted: at least 1"),
        ({}, "CONFIG: got model_type 'bert', accepted: one that AutoModelForSeq2SeqLM"),
    ],
)
def test_bad_predictions_are_named(changed: dict[str, str], named: str, tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    items = {"--batch": "2", **changed}
    with pytest.raises(ValueError, match=named):
        cost_predict.main([str(tmp_path), *(part for item in items.items() for part in item)])


def test_a_config_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="CONFIG: got '.*nowhere'"):
        cost_predict.main([str(tmp_path / "nowhere"), "--batch", "2"])
