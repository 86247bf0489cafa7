"""The package's own metric module: sacrebleu's numbers and signatures, through `evaluate`, without a network."""

from __future__ import annotations

import socket

import pytest
from sacrebleu.metrics import BLEU, CHRF

from hf_lngd.metrics import available, load_metric

SAID = ["Der Hund sieht die Katze .", "Das ist ein Haus .", "Ich weiß es nicht ."]
MEANT = ["Der Hund sieht eine Katze .", "Das ist mein Haus .", "Ich weiß es nicht ."]
ALSO = ["Ein Hund sieht die Katze .", "Das hier ist ein Haus .", "Keine Ahnung ."]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_it_gives_sacrebleus_numbers_and_signatures(no_network: None) -> None:
    result = load_metric("sacrebleu").compute(predictions=SAID, references=[[text] for text in MEANT])
    bleu, chrf = BLEU(), CHRF()
    assert result["score"] == bleu.corpus_score(SAID, [MEANT]).score
    assert result["chrf"] == chrf.corpus_score(SAID, [MEANT]).score
    assert result["signature"] == str(bleu.get_signature()) and "tok:13a" in result["signature"]
    assert result["chrf_signature"] == str(chrf.get_signature()) and "nc:6" in result["chrf_signature"]


def test_references_one_or_several() -> None:
    metric = load_metric("sacrebleu")
    one = metric.compute(predictions=SAID, references=MEANT)
    assert one == metric.compute(predictions=SAID, references=[[text] for text in MEANT])
    two = metric.compute(predictions=SAID, references=[list(pair) for pair in zip(MEANT, ALSO, strict=True)])
    assert two["score"] == BLEU().corpus_score(SAID, [MEANT, ALSO]).score > one["score"]
    assert "nrefs:2" in two["signature"]
    with pytest.raises(ValueError, match="references: got unlike numbers"):
        metric.compute(predictions=SAID[:2], references=[["a"], ["b", "c"]])


def test_options_reach_the_signature() -> None:
    metric = load_metric("sacrebleu")
    result = metric.compute(predictions=SAID, references=MEANT, tokenize="char", lowercase=True)
    assert "tok:char" in result["signature"] and "case:lc" in result["signature"]


def test_batches_add_up() -> None:
    metric = load_metric("sacrebleu")
    for said, meant in zip(SAID, MEANT, strict=True):
        metric.add(prediction=said, reference=[meant])
    assert metric.compute() == metric.compute(predictions=SAID, references=[[text] for text in MEANT])


def test_an_unknown_metric_lists_the_known() -> None:
    assert "sacrebleu" in available()
    with pytest.raises(ValueError, match="metric: got 'meteor', accepted: .*sacrebleu"):
        load_metric("meteor")
