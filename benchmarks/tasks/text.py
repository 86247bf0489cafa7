"""Sentence pairs in files, and a tokenizer that is trained on them."""

from __future__ import annotations

import gzip
import json
import string
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

Pair = tuple[str, str]
PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
MAX_LENGTH = 64
# Known to the tokenizer even if the sample lacks them.
ALPHABET = string.ascii_letters + string.digits + string.punctuation + "ÄÖÜäöüßéèáàêçñ–…€"


def clean(sentence: str) -> str:
    """NFC, straight quotation marks, one blank between words."""
    straight = sentence.translate(str.maketrans("‘’‚‛“”„‟«»", '\'\'\'\'""""""'))
    return " ".join(unicodedata.normalize("NFC", straight).split())


def read_pairs(path: Path) -> Iterator[Pair]:
    """Yields (English, German) of a JSON-lines file, gzipped or not.

    Raises:
        ValueError: names the line that is no translation.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                translation = json.loads(line)["translation"]
                yield clean(translation["en"]), clean(translation["de"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no translation with en and de ({error})") from error


def train_tokenizer(pairs: Iterable[Pair], vocabulary: int) -> PreTrainedTokenizerFast:
    """A joint BPE over both sides as Marian wants it: pad 0 (it also starts the decoder), `</s>` 1, unk 2."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, EOS, UNK],
        initial_alphabet=list(ALPHABET),
        show_progress=False,
    )
    tokenizer.train_from_iterator((side for pair in pairs for side in pair), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK, model_max_length=MAX_LENGTH
    )
