"""PEFT: LoRA is whitened as linear layers are, frozen bases cost nothing, other adapters are AdamW's by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor, nn

from hf_lngd import LNGD
from tests.helpers import hooks_of, marian_batch, tiny_marian, train_step
from tests.hf_helpers import hf_seq2seq_model, hf_tokenizer, hf_vit, hf_vit_attention

ATTENTION = {
    "marian": ["q_proj", "k_proj", "v_proj"],
    "t5": ["q", "k", "v"],
    "vit": hf_vit_attention(),
}


def lora(model: nn.Module, targets: list[str], **fields: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": targets, **fields})).train()


def base_of(family: str) -> nn.Module:
    return hf_vit() if family == "vit" else hf_seq2seq_model(family, hf_tokenizer())


def routes(optimizer: LNGD) -> dict[str, tuple[str, str]]:
    return {r.parameter: (r.owner, r.reason) for r in optimizer.routing()}


# LoRA


@pytest.mark.parametrize("family", list(ATTENTION))
def test_lora_is_lngds_and_frozen_bases_cost_nothing(family: str) -> None:
    model = lora(base_of(family), ATTENTION[family])
    optimizer = LNGD(model)
    adapters = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    for name, found in routes(optimizer).items():
        assert found == (("lngd", "linear") if name in adapters else ("frozen", "frozen")), name
    watched = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and hooks_of(m)}
    assert watched == {name.removesuffix(".weight") for name in adapters}
    if family == "vit":
        model(pixel_values=torch.randn(4, 3, 8, 8)).logits.square().mean().backward()
    else:
        ids = torch.randint(4, 10, (4, 6))
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    usage, numbers = optimizer.memory_usage(), sum(p.numel() for p in adapters.values())
    assert usage["momentum"] == 4 * numbers and usage["fallback"] == usage["embeddings"] == 0
    assert {r.follows for r in optimizer.routing() if r.owner == "lngd"} == {"identity"}
    groups = [sorted(name.split(".")[-3] for name in g.members) for g in optimizer.core.capture.topology.groups]
    assert sorted(ATTENTION[family]) in groups  # three A's, one Φ


class Net(nn.Module):
    """Two layers with an activation between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.second = nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


@pytest.mark.parametrize("fields", [{}, {"preset": "paper", "fisher": "expected"}], ids=str)
def test_a_zero_b_makes_no_step_of_a(fields: dict[str, Any]) -> None:
    """B begins at zero, so A's first gradient is zero; its polar factor and its rate must not be NaN."""
    model = lora(Net(), ["first", "second"], r=3)
    optimizer = LNGD(model, lr=1e-2, weight_decay=0.0, update_interval=1, **fields)
    a, b = (getattr(model.base_model.model.first, f"lora_{side}")["default"].weight for side in "AB")
    for step in range(3):
        before = a.detach().clone(), b.detach().clone()
        model(torch.randn(20, 9)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.isfinite(a).all() and torch.isfinite(b).all()
        assert torch.equal(a, before[0]) == (step == 0)
        assert not torch.equal(b, before[1])


def test_merging_and_what_is_saved(tmp_path: Path) -> None:
    model = lora(Net(), ["first", "second"])
    optimizer = LNGD(model, lr=0.1)
    x = torch.randn(20, 9)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with torch.no_grad():
        expected = model(x)
        model.merge_adapter()  # as some do to evaluate or generate
        torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(loaded(x), expected)
        optimizer.close()
        torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_modules_to_save_are_trained_whole() -> None:
    model = lora(hf_vit(), ATTENTION["vit"], modules_to_save=["classifier"])
    found = routes(LNGD(model))
    assert found["base_model.model.classifier.original_module.weight"][0] == "frozen"
    assert found["base_model.model.classifier.modules_to_save.default.weight"] == ("lngd", "linear")
    table = lora(tiny_marian(), ["q_proj"], modules_to_save=["shared"])
    assert ("lngd", "embedding, exact") in set(routes(LNGD(table)).values())
    biases = lora(tiny_marian(), ["q_proj"], bias="lora_only")
    assert set(routes(LNGD(biases)).values()) == {("lngd", "linear"), ("fallback", "bias"), ("frozen", "frozen")}


# Other adapters

T = "SEQ_2_SEQ_LM"
OTHERS = {
    "DoRA": LoraConfig(task_type=T, r=4, target_modules=["q_proj"], use_dora=True),
    "LoRA of Embedding": LoraConfig(task_type=T, r=4, target_modules=["embed_tokens"]),
    "ia3": IA3Config(task_type=T, target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
    "loha": LoHaConfig(task_type=T, r=4, target_modules=["q_proj"]),
    "prompt_tuning": PromptTuningConfig(task_type=T, num_virtual_tokens=3, num_layers=1),
    "prefix_tuning": PrefixTuningConfig(task_type=T, num_virtual_tokens=3, num_layers=1),
}


@pytest.mark.parametrize("reason", list(OTHERS))
def test_other_adapters_fall_back_with_a_reason(reason: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_marian(), OTHERS[reason]).double().train()
    optimizer = LNGD(model, weight_decay=0.1)
    trained = {n: found for n, found in routes(optimizer).items() if found[0] != "frozen"}
    assert set(trained.values()) == {("fallback", f"adapter, {reason}")}
    assert not hooks_of(model)  # nothing is watched
    for _ in range(2):
        train_step(model, optimizer, marian_batch())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if reason == "ia3":  # scales around one are no weights to shrink
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


def test_weights_that_are_merged_in_a_forward_are_not_lngds() -> None:
    """peft's MultiheadAttention also makes its frozen weights anew whenever its modules are listed."""
    model = lora(nn.TransformerEncoderLayer(8, 2, 8), ["self_attn"], init_lora_weights=False)
    optimizer = LNGD(model)
    reason = "adapter, LoRA merged by MultiheadAttention"
    assert {found for found in routes(optimizer).values() if found[0] != "frozen"} == {("fallback", reason)}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    model(torch.randn(3, 4, 8)).square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_the_layers_that_make_prompts_are_lngds() -> None:
    config = PromptEncoderConfig(task_type=T, num_virtual_tokens=3, num_layers=1, encoder_hidden_size=8)
    model = get_peft_model(tiny_marian(), config).double().train()
    optimizer = LNGD(model, direction="natural")
    train_step(model, optimizer, marian_batch())
    found = routes(optimizer)
    assert found["prompt_encoder.default.mlp_head.0.weight"] == ("lngd", "linear")
    assert found["prompt_encoder.default.embedding.weight"] == ("fallback", "adapter, p_tuning")
    assert {r.follows for r in optimizer.routing() if r.owner == "lngd"} == {"ReLU", "identity"}
