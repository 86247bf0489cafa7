"""BLEU and chrF as sacrebleu computes them, with the signatures that make the numbers comparable."""

from typing import Any

import datasets
import evaluate
from sacrebleu.metrics import BLEU, CHRF

_DESCRIPTION = "Corpus BLEU and chrF by sacrebleu, on detokenised text, each with its signature."

_CITATION = """\
@inproceedings{post-2018-call,
    title = "A Call for Clarity in Reporting {BLEU} Scores",
    author = "Post, Matt",
    booktitle = "Proceedings of the Third Conference on Machine Translation",
    year = "2018",
}
"""

_INPUTS = """\
Args:
    predictions: translations, detokenised.
    references: for each translation one reference, or a list of them (as many for each).
    tokenize: sacrebleu's tokeniser for BLEU, "13a" by default.
    lowercase: compare BLEU without case.
Returns:
    score (BLEU), counts, totals, precisions, bp, sys_len, ref_len, signature, chrf, chrf_signature.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Sacrebleu(evaluate.Metric):
    """See the module's text."""

    def _info(self) -> Any:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
            reference_urls=["https://github.com/mjpost/sacrebleu"],
        )

    def _compute(
        self, predictions: list[str], references: Any, tokenize: str = "13a", lowercase: bool = False
    ) -> dict[str, Any]:
        if isinstance(references[0], str):
            references = [[reference] for reference in references]
        count = len(references[0])
        if any(len(several) != count for several in references):
            raise ValueError("references: got unlike numbers of them, accepted: as many for each prediction")
        streams = [[several[i] for several in references] for i in range(count)]
        bleu, chrf = BLEU(tokenize=tokenize, lowercase=lowercase), CHRF()
        result = bleu.corpus_score(predictions, streams)
        return {
            "score": result.score,
            "counts": result.counts,
            "totals": result.totals,
            "precisions": result.precisions,
            "bp": result.bp,
            "sys_len": result.sys_len,
            "ref_len": result.ref_len,
            "signature": str(bleu.get_signature()),
            "chrf": chrf.corpus_score(predictions, streams).score,
            "chrf_signature": str(chrf.get_signature()),
        }
