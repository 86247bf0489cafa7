"""The package's own metrics: sacrebleu's and scikit-learn's numbers, through `evaluate`, without a network."""

from __future__ import annotations

import socket

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from sklearn.metrics import accuracy_score, top_k_accuracy_score

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


def test_an_unknown_metric_lists_the_known() -> None:
    assert "sacrebleu" in available()
    with pytest.raises(ValueError, match="metric: got 'meteor', accepted: .*sacrebleu"):
        load_metric("meteor")


@pytest.mark.parametrize("classes", [6, 20])
def test_accuracy_gives_scikit_learns_numbers(classes: int) -> None:
    draw = np.random.default_rng(classes)
    scores, labels = draw.normal(size=(200, classes)), draw.integers(0, classes, 200)
    ranked = np.argsort(-scores, axis=1)[:, :5]
    result = load_metric("accuracy").compute(predictions=ranked, references=labels)
    assert result["accuracy"] == pytest.approx(accuracy_score(labels, scores.argmax(1)))
    expected = top_k_accuracy_score(labels, scores, k=5, labels=range(classes))
    assert result["top5_accuracy"] == pytest.approx(expected) and expected > result["accuracy"]


def test_accuracy_of_one_class_each_has_no_top_5() -> None:
    metric = load_metric("accuracy")
    assert metric.compute(predictions=[1, 0, 2, 2], references=[1, 0, 2, 1]) == {"accuracy": 0.75}
    ranked = [[1, 0], [0, 1], [2, 0], [2, 1]]
    assert metric.compute(predictions=ranked, references=[1, 0, 2, 1]) == {"accuracy": 0.75}
    result = metric.compute(predictions=ranked, references=[1, 0, 2, 1], top_k=2)
    assert result == {"accuracy": 0.75, "top2_accuracy": 1.0}


def test_what_accuracy_refuses() -> None:
    metric = load_metric("accuracy")
    assert "accuracy" in available()
    with pytest.raises(ValueError, match="top_k: got 0"):
        metric.compute(predictions=[1], references=[1], top_k=0)
