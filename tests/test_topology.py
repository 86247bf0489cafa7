"""Who shares a factor, whose activation is whose, which mask applies."""

from __future__ import annotations

import pytest
import torch
from core_helpers import core_backward, core_batch, core_marian, core_step
from hf_helpers import hf_seq2seq_model, hf_tokenizer
from reference import factors
from torch import Tensor, nn
from transformers import FSMTConfig, FSMTForConditionalGeneration

from hf_lngd import LNGD
from hf_lngd.curvature.masks import BatchMasks


def groups(optimizer: LNGD) -> dict[str, tuple[list[str], tuple[str, ...], str | None]]:
    return {g.name: (g.members, g.links, g.stream) for g in optimizer._capture.topology.groups}


@pytest.mark.parametrize("fisher", ["expected", "sampled", "empirical", "true"])
def test_sides_of_equal_length_are_told_apart(fisher: str) -> None:
    model, batch = core_marian(), core_batch(source=7, target=7)
    optimizer = LNGD(model, lr=1e-3, fisher=fisher)
    core_step(model, optimizer, batch)
    streams = {g.name: g.stream for g in optimizer._capture.topology.groups for name in g.members}
    for name, stream in streams.items():
        reads_encoder = ".encoder." in name or name.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
        assert stream == ("inputs" if reads_encoder else "targets"), name


@pytest.mark.parametrize("target", [6, 7], ids=["unlike lengths", "equal lengths"])
def test_marian_shares_what_it_reads_together(target: int) -> None:
    model = core_marian()
    optimizer = LNGD(model, lr=1e-3)
    core_step(model, optimizer, core_batch(source=7, target=target))
    found = groups(optimizer)
    encoder, decoder = "model.encoder.layers.0", "model.decoder.layers.{}"
    qkv = [f"{encoder}.self_attn.{name}_proj" for name in ("q", "k", "v")]
    assert (sorted(found[qkv[0]][0]), found[qkv[0]][1:]) == (sorted(qkv), ((), "inputs"))
    cross = [f"{decoder.format(i)}.encoder_attn.{name}_proj" for i in (0, 1) for name in ("k", "v")]
    assert sorted(found[cross[0]][0]) == sorted(cross) and found[cross[0]][2] == "inputs"
    query = f"{decoder.format(1)}.encoder_attn.q_proj"
    assert found[query] == ([query], (), "targets")
    assert found[f"{encoder}.fc1"][1] == ("ReLU",)
    assert found[f"{encoder}.fc2"][1:] == ((), "inputs")
    assert sum(len(members) for members, _, _ in found.values()) == len(optimizer._capture.layers)


@pytest.mark.parametrize("family", ["t5", "bart", "mbart", "m2m100"])
def test_other_families(family: str) -> None:
    tokenizer = hf_tokenizer()
    model = hf_seq2seq_model(family, tokenizer).double().train()
    optimizer = LNGD(model, lr=1e-3)
    batch = core_batch(source=6, target=6)
    batch = {key: value % 9 if key == "input_ids" else value for key, value in batch.items()}
    batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["labels"] % 9)
    core_step(model, optimizer, batch)
    found = groups(optimizer)
    streams = {name: stream for name, (_, _, stream) in found.items()}
    assert all(stream == "inputs" for name, stream in streams.items() if "encoder." in name.split("decoder")[0])
    assert max(len(members) for members, _, _ in found.values()) == 3
    activated = [name for name, (_, activation, _) in found.items() if activation]
    assert len(activated) == 2 and all(name.endswith(("fc1", "wi")) for name in activated)


def test_padding_is_left_out_of_the_right_mean() -> None:
    model, batch = core_marian(), core_batch()
    optimizer = LNGD(model, lr=0.0)
    seen: dict[str, Tensor] = {}
    names = ["model.decoder.layers.0.encoder_attn.k_proj", "model.decoder.layers.0.encoder_attn.q_proj"]
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: seen.update({name: a[0]}))
    core_backward(model, optimizer, batch)
    optimizer.step()
    masks = [batch["attention_mask"].bool(), batch["labels"] != -100]
    for name, mask in zip(names, masks, strict=True):
        a = seen[name][mask].detach()
        torch.testing.assert_close(optimizer.factors(name)["phi"], factors(a, torch.ones(len(a), 16))[0])


class Widths(nn.Module):
    """Two heads of unlike width on one tensor, as grouped queries have."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        return self.q(x).sum() + self.k(x).sum()


def test_unlike_widths_share_unless_the_damping_depends_on_them() -> None:
    x = torch.randn(5, 4)
    for damping, count in (("relative", 1), ("paper", 2)):
        model = Widths()
        optimizer = LNGD(model, lr=1e-3, damping=damping, direction="natural")
        model(x).backward()
        optimizer.step()
        assert len(groups(optimizer)) == count
        ratio = optimizer.factors("q")["phi"] / optimizer.factors("k")["phi"]
        torch.testing.assert_close(ratio, torch.full_like(ratio, 2.0))


def test_layers_with_and_without_a_bias_do_not_share_a_factor_that_holds_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64)
    for bias, count in (("fallback", 1), ("factor", 2)):
        model = Widths().double()
        model.k = nn.Linear(4, 4).double()
        optimizer = LNGD(model, lr=1e-3, bias=bias)
        model(x).backward()
        optimizer.step()
        assert len(groups(optimizer)) == count
        a = x if bias == "fallback" else torch.cat((x, torch.ones(5, 1).double()), 1)
        torch.testing.assert_close(optimizer.factors("q")["phi"], factors(x, torch.ones(5, 4))[0])
        torch.testing.assert_close(optimizer.factors("k")["phi"], factors(a, torch.ones(5, 4))[0])


class Odd(nn.Module):
    """A layer that is called twice, one that is called late, one that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.late, self.never = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.use_late = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(torch.tanh(self.twice(x)))
        return self.late(y) if self.use_late else y


def test_calls_twice_late_and_never() -> None:
    torch.manual_seed(0)
    model, x = Odd().double(), torch.randn(5, 3, dtype=torch.float64)
    optimizer = LNGD(model, lr=1e-2, factor_interval=1, ema_decay=0.0, inverse_interval=1)
    with torch.no_grad():
        inner = torch.tanh(model.twice(x))
    model(x).square().mean().backward()
    optimizer.step()
    pooled = torch.cat((x, inner))
    g2 = torch.cat(((1 - inner.square()).square(), torch.ones(5, 3)))  # tanh follows the first call only
    torch.testing.assert_close(optimizer.factors("twice")["phi"], factors(pooled, g2)[0])
    before = model.never.weight.clone()
    model.use_late = True
    model(x).square().mean().backward()
    optimizer.step()
    assert torch.equal(model.never.weight, before)
    assert optimizer.factors("late")["phi"].trace() > 0
    assert torch.equal(optimizer.factors("never")["phi"], 3 * torch.eye(3).double())  # not seen: the identity, times m


def test_the_same_tensor_in_two_forwards_counts_twice() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2, bias=False)), torch.randn(4, 3)
    optimizer = LNGD(model, lr=0.0)
    for _ in range(2):
        model(x).sum().backward()
    assert float(optimizer._capture.finish()["0"].n) == 8
    optimizer.close()


def test_target_mask_without_labels() -> None:
    class Config:
        pad_token_id, eos_token_id, is_encoder_decoder = 0, 1, True

    # labels: 5 6 1 - -, then 5 6 7 8 9 (cut off), then 5 6 7 1 -
    ids = torch.tensor([[0, 5, 6, 1, 0], [0, 5, 6, 7, 8], [0, 5, 6, 7, 1]])
    masks = BatchMasks({"input_ids": ids, "decoder_input_ids": ids}, Config())
    assert masks.by_stream["targets"].tolist() == [[True] * 3 + [False] * 2, [True] * 5, [True] * 4 + [False]]


@pytest.mark.parametrize("target", [8, 6], ids=["as many tokens as sentences", "fewer"])
def test_masks_of_a_model_that_works_time_first(target: int) -> None:
    tokens = {"src_vocab_size": 40, "tgt_vocab_size": 40, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    rest = {"dropout": 0.0, "attention_dropout": 0.0, "decoder_start_token_id": 1}
    torch.manual_seed(0)
    model = FSMTForConditionalGeneration(FSMTConfig(langs=["en", "de"], **tokens, **sizes, **heads, **rest))
    batch = core_batch(rows=8, source=8, target=target)
    optimizer = LNGD(model, lr=0.0)
    model(**batch, decoder_input_ids=batch["labels"].clamp_min(0)).loss.backward()
    counts = {name: int(sums.n) for name, sums in optimizer._capture.finish().items()}
    assert counts["model.encoder.layers.0.fc1"] == int(batch["attention_mask"].sum())
    assert counts["model.decoder.layers.0.fc1"] == int((batch["labels"] != -100).sum())


def test_a_batch_that_is_named_beforehand_counts() -> None:
    model, batch = core_marian(), core_batch()
    optimizer = LNGD(model, lr=0.0)
    labels = batch.pop("labels")
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    optimizer.set_batch({**batch, "labels": labels})
    model(**batch, decoder_input_ids=shifted).logits.sum().backward()
    assert int(optimizer._capture.terms) == int((labels != -100).sum())
    n = optimizer._capture.finish()["model.decoder.layers.0.fc1"].n
    assert int(n) == int((labels != -100).sum())
