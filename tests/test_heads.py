"""The head's own predictive distribution against the exact Fisher of the model's likelihood."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from reference import factors
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from hf_lngd import LNGD


class Classifier(nn.Module):
    """A body and a head, as transformers' models have them."""

    def __init__(self, classes: int = 3, problem: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.config = (
            nn.Linear(4, 5),
            nn.Linear(5, classes),
            SimpleNamespace(problem_type=problem),
        )
        self.as_dict = False

    def forward(self, x: Tensor) -> SimpleNamespace | dict[str, Tensor]:
        logits = self.head(torch.tanh(self.body(x)))
        return {"logits": logits} if self.as_dict else SimpleNamespace(logits=logits)


def exact_head_fisher(logits: Tensor) -> Tensor:
    """[N, m]: the diagonal of E_y[(p − y)(p − y)ᵀ], label by label."""
    p = logits.softmax(-1)
    one_hot = torch.eye(p.shape[-1]).to(p)
    return sum(p[:, y : y + 1] * (p - one_hot[y]).square() for y in range(p.shape[-1]))


@pytest.mark.parametrize("as_dict", [False, True])
def test_categorical_is_the_exact_fisher_of_the_head(as_dict: bool) -> None:
    model, x = Classifier().double(), torch.randn(7, 4, dtype=torch.float64)
    model.as_dict = as_dict
    optimizer = LNGD(model, lr=0.0, head="categorical", factor_interval=1)
    for _ in range(2):
        output = model(x)
        logits = output["logits"] if as_dict else output.logits
        logits.square().sum().backward()
        optimizer.step()
        a = torch.tanh(model.body(x)).detach()
        phi, psi = factors(a, exact_head_fisher(logits.detach()))
        torch.testing.assert_close(optimizer.factors("head")["phi"], phi)
        torch.testing.assert_close(optimizer.factors("head")["psi"], psi)
    follows = {r.layer: r.follows for r in optimizer.routing() if r.owner == "lngd"}
    assert follows == {"body": "tanh", "head": "head: softmax"}


def test_multi_label_heads_are_yes_or_no() -> None:
    model, x = Classifier(problem="multi_label_classification").double(), torch.randn(7, 4, dtype=torch.float64)
    optimizer = LNGD(model, lr=0.0, head="categorical")
    logits = model(x).logits
    logits.sum().backward()
    optimizer.step()
    p = logits.detach().sigmoid()
    phi, psi = factors(torch.tanh(model.body(x)).detach(), p * (1 - p))
    torch.testing.assert_close(optimizer.factors("head")["phi"], phi)
    torch.testing.assert_close(optimizer.factors("head")["psi"], psi)


@pytest.mark.parametrize(
    ("classes", "problem", "head"), [(1, None, "categorical"), (3, "regression", "categorical"), (3, None, "gaussian")]
)
def test_regression_stays_gaussian(classes: int, problem: str | None, head: str) -> None:
    model, x = Classifier(classes, problem).double(), torch.randn(7, 4, dtype=torch.float64)
    optimizer = LNGD(model, lr=0.0, head=head)
    model(x).logits.sum().backward()
    optimizer.step()
    phi, _ = factors(torch.tanh(model.body(x)).detach(), torch.ones(7, classes))
    torch.testing.assert_close(optimizer.factors("head")["phi"], phi)


def test_language_model_heads_leave_ignored_labels_out() -> None:
    class LanguageModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.lm_head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)

        def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.lm_head(self.table(input_ids)))

    model, ids = LanguageModel().double(), torch.randint(7, (4, 6))
    labels = torch.where(torch.rand(4, 6) < 0.3, -100, ids)
    optimizer = LNGD(model, lr=0.0, head="categorical")
    logits = model(input_ids=ids, labels=labels).logits
    logits.sum().backward()
    optimizer.step()
    keep = labels != -100
    phi, psi = factors(model.table(ids)[keep].detach(), exact_head_fisher(logits.detach()[keep]))
    torch.testing.assert_close(optimizer.factors("lm_head")["phi"], phi)
    torch.testing.assert_close(optimizer.factors("lm_head")["psi"], psi)


def test_the_head_of_a_vision_transformer_is_found() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))
    optimizer = LNGD(model, lr=1e-3, head="categorical", chain="full")
    model(torch.randn(2, 3, 8, 8), labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    assert {r.follows for r in optimizer.routing() if r.layer == "classifier" and r.owner == "lngd"} == {
        "head: softmax"
    }
