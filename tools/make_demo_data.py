"""Makes the bundled sample that `make demo` trains on, from a file of Tatoeba sentence pairs.

    python -m tools.make_demo_data --source tatoeba/train.json.gz --output examples/data/tatoeba-en-de

The source holds one `{"translation": {"en": ..., "de": ...}}` a line. What is written: train, validation and test in
the same format (gzipped), a joint BPE tokenizer trained on train alone, the configuration of a small Marian, and
ATTRIBUTION.md. The same source gives the same files, byte for byte.

How sentences are chosen: short ones, one translation for each sentence of either language, and of these the ones whose
rarest word is most frequent, so that a few minutes of training meet each word often enough to learn it.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import io
import json
import math
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from transformers import MarianConfig

from benchmarks.tasks.text import MAX_LENGTH, Pair, clean, read_pairs, train_tokenizer

LANGUAGES = ("en", "de")

ATTRIBUTION = """\
# Tatoeba English-German sample

{train:,} training, {validation:,} validation and {test:,} test sentence pairs from the [Tatoeba](https://tatoeba.org)
project, written and translated by its contributors, by way of the bilingual pairs that manythings.org published in
May 2018 (Tatoeba via manythings.org 2018-05).

**Licence:** [CC-BY 2.0 FR](https://creativecommons.org/licenses/by/2.0/fr/). Whoever passes these sentences on, or a
model that was trained on them, names tatoeba.org.

## What was selected and changed

`tools/make_demo_data.py` made these files. It selected sentences of {shortest} to {longest} words a side, without
quoted speech; one translation a sentence, compared without case and punctuation, so that no two pairs of this sample,
of the same part or of different ones, share their English or their German; and of these the pairs whose rarest word is
most frequent. It changed white space (one blank between words), curly quotation marks and apostrophes to straight
ones, and the Unicode form to NFC. It put the pairs into another order. Nothing else was changed.

`tokenizer/` was trained on `train.json.gz` alone: byte-pair encoding, {vocabulary:,} pieces for both languages.
"""


def key(sentence: str) -> str:
    """What two sentences must not share across the parts: the words, without case and punctuation."""
    return " ".join(words(sentence))


def words(sentence: str) -> list[str]:
    """The words of a sentence, case-folded, punctuation left out."""
    return re.findall(r"\w+(?:'\w+)*", clean(sentence).casefold())


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Writes JSON lines, gzipped without name and time, so that the bytes depend on the pairs alone."""
    rows = ({"translation": dict(zip(LANGUAGES, pair, strict=True))} for pair in pairs)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", compresslevel=9, mtime=0) as file:
        file.write(text.encode("utf-8"))
    path.write_bytes(buffer.getvalue())


def select(pairs: Iterable[Pair], count: int, shortest: int, longest: int) -> list[Pair]:
    """The `count` pairs of common words, no two of which share a sentence; most common first.

    Raises:
        ValueError: fewer pairs than that qualify.
    """
    pool = [
        pair
        for pair in pairs
        if all(
            shortest <= len(words(side)) <= longest and '"' not in side for side in pair
        )  # speech is rare: not learnt
    ]
    frequency = [collections.Counter(word for pair in pool for word in words(pair[side])) for side in (0, 1)]

    def commonness(pair: Pair) -> tuple[float, float, Pair]:
        logs = [[math.log(frequency[side][word]) for word in words(pair[side])] for side in (0, 1)]
        mean = sum(sum(side) / len(side) for side in logs)
        return -min(min(side) for side in logs), -mean, pair

    chosen: list[Pair] = []
    seen: tuple[set[str], set[str]] = (set(), set())
    for pair in sorted(set(pool), key=commonness):
        keys = key(pair[0]), key(pair[1])
        if keys[0] in seen[0] or keys[1] in seen[1]:
            continue
        seen[0].add(keys[0])
        seen[1].add(keys[1])
        chosen.append(pair)
        if len(chosen) == count:
            return chosen
    raise ValueError(f"--source: {len(chosen)} pairs qualify, {count} are wanted")


def model_config(vocabulary: int) -> MarianConfig:
    """A small Marian; `init_std` is d^-0.5, for embeddings that are scaled by d^0.5."""
    width = 128
    return MarianConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        activation_function="relu",
        dropout=0.1,
        attention_dropout=0.0,
        activation_dropout=0.0,
        init_std=round(width**-0.5, 4),
        scale_embedding=True,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=0,
        decoder_start_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        forced_eos_token_id=None,
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="JSON lines of Tatoeba pairs, gzipped or not")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=28_000, help="training pairs (default: %(default)s)")
    parser.add_argument("--validation", type=int, default=500, help="validation pairs (default: %(default)s)")
    parser.add_argument("--test", type=int, default=600, help="test pairs (default: %(default)s)")
    parser.add_argument("--shortest", type=int, default=3, help="words a side, at least (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=9, help="words a side, at most (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=4_000, help="pieces of the tokenizer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the split and the order (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line and writes the sample."""
    args = parse(arguments)
    sizes = {"train": args.train, "validation": args.validation, "test": args.test}
    chosen = select(read_pairs(args.source), sum(sizes.values()), args.shortest, args.longest)
    random.Random(args.seed).shuffle(chosen)

    args.output.mkdir(parents=True, exist_ok=True)
    start = 0
    parts = {}
    for name, size in sizes.items():
        parts[name] = chosen[start : start + size]
        start += size
        write_pairs(args.output / f"{name}.json.gz", parts[name])
    tokenizer = train_tokenizer(parts["train"], args.vocabulary)
    tokenizer.save_pretrained(args.output / "tokenizer")
    model_config(len(tokenizer)).save_pretrained(args.output / "model")
    facts = sizes | {"shortest": args.shortest, "longest": args.longest, "vocabulary": len(tokenizer)}
    (args.output / "ATTRIBUTION.md").write_text(ATTRIBUTION.format(**facts), encoding="utf-8")
    print(f"{args.output}: " + ", ".join(f"{size:,} {name}" for name, size in sizes.items()), file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
