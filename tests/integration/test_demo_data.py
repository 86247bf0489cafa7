"""The bundled Tatoeba sample: attributed, its parts share no sentence, its tokenizer loses nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, MarianMTModel, PreTrainedTokenizerBase

from benchmarks.tasks.text import read_pairs
from tools import make_demo_data

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "examples" / "data" / "tatoeba-en-de"
PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def parts() -> dict[str, list[tuple[str, str]]]:
    return {part: list(read_pairs(SAMPLE / f"{part}.json.gz")) for part in PARTS}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(SAMPLE / "tokenizer")


def test_attribution() -> None:
    text = (SAMPLE / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for needed in ("tatoeba.org", "manythings.org", "2018", "CC-BY 2.0 FR", "selected", "changed"):
        assert needed in text


def test_counts(parts: dict[str, list[tuple[str, str]]]) -> None:
    assert 20_000 <= len(parts["train"]) <= 30_000
    assert len(parts["validation"]) == 500
    assert 500 <= len(parts["test"]) <= 1_000
    text = (SAMPLE / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert all(f"{len(parts[part]):,} {part}" in text for part in PARTS)


@pytest.mark.parametrize("side", [0, 1], ids=["source", "target"])
def test_no_sentence_stands_twice(parts: dict[str, list[tuple[str, str]]], side: int) -> None:
    seen: dict[str, str] = {}
    for part in PARTS:
        for pair in parts[part]:
            key = make_demo_data.key(pair[side])
            assert key and key not in seen, f"{pair[side]!r} of {part} is in {seen[key]} too"
            seen[key] = part


def test_no_quoted_speech(parts: dict[str, list[tuple[str, str]]]) -> None:
    assert not any('"' in side for pairs in parts.values() for pair in pairs for side in pair)
    speech = [("He said that it was good.", "Er sagte, es sei gut."), ('He said "good".', "Er sagte „gut“.")] * 3
    assert make_demo_data.select(speech, 1, 1, 9) == speech[:1]
    with pytest.raises(ValueError, match="1 pairs qualify"):
        make_demo_data.select(speech, 2, 1, 9)


def test_key_ignores_case_and_punctuation() -> None:
    key = make_demo_data.key
    assert key("Ist das wahr?") == key("ist das WAHR!") == key("  Ist „das“ wahr ...")
    assert key("Straße") == key("STRASSE")
    assert key("Don't go.") == key("don’t go")
    assert key("Ist das wahr?") != key("Ist das war?")


def sentences(parts: dict[str, list[tuple[str, str]]]) -> Iterator[str]:
    for part in PARTS:
        for pair in parts[part]:
            yield from pair


def test_tokenizer_round_trip(parts: dict[str, list[tuple[str, str]]], tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [*list(sentences(parts))[::7], "Größere Übel äßen öfter süße Äpfel über Öl.", "Ärger in Österreich"]
    ids = tokenizer(texts)["input_ids"]
    back = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert back == texts
    assert all(row[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in row[:-1] for row in ids)
    assert not any(tokenizer.unk_token_id in row for row in ids)


def test_tokenizer_and_model_fit(tokenizer: PreTrainedTokenizerBase) -> None:
    config = AutoConfig.from_pretrained(SAMPLE / "model")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert (config.pad_token_id, config.decoder_start_token_id, config.eos_token_id) == (0, 0, 1)
    assert config.vocab_size == len(tokenizer) == config.decoder_vocab_size
    assert tokenizer.model_max_length <= config.max_position_embeddings
    model = MarianMTModel(config)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert sum(p.numel() for p in model.parameters()) < 5_000_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of 60 pairs with doubled sentences, curly quotes and odd white space."""
    nouns = ["Hund", "Ball", "Baum", "Tisch", "Stuhl", "Brief"]
    english = ["dog", "ball", "tree", "table", "chair", "letter"]
    rows = [
        {"en": f"I  see the {english[i]} {j} now.", "de": f"Ich sehe jetzt den ‚{nouns[i]}‘ {j}."}
        for i in range(6)
        for j in range(10)
    ]
    rows += [{"en": row["en"].upper(), "de": row["de"] + "!"} for row in rows]
    path = tmp_path_factory.mktemp("source") / "pairs.json"
    lines = [json.dumps({"translation": row}, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def arguments(source: Path, output: Path, train: int = 40) -> list[str]:
    sizes = ["--train", str(train), "--validation", "10", "--test", "10", "--vocabulary", "120"]
    return ["--source", str(source), "--output", str(output), *sizes]


def test_the_same_source_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_demo_data.main(arguments(source, tmp_path / name))
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert {path.name for path in files} >= {"train.json.gz", "tokenizer.json", "config.json", "ATTRIBUTION.md"}
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path
    pairs = [pair for part in PARTS for pair in read_pairs(tmp_path / "a" / f"{part}.json.gz")]
    assert len(pairs) == 60 and len({make_demo_data.key(de) for _, de in pairs}) == 60
    assert not any("‚" in de or "  " in en for en, de in pairs)
