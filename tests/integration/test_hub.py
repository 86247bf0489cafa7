"""`--push_to_hub` against a mocked Hub: what is pushed, what it is good for, what a refusal looks like."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx
from PIL import Image
from run_hub import check_hub, check_repository, push, refusal
from transformers import ResNetConfig

from hf_lngd import LNGDTrainingArguments
from hf_lngd.integrations.usage import RunError, UsageError, exit_on_usage_error
from tests.hf_helpers import hf_pairs, hf_seq2seq_model, hf_tokenizer, hf_write_pairs
from tests.image_helpers import needs_image_processor
from tests.integration.fake_hub import TOKEN, FakeHub, http_error

SCRIPTS = {"translation": "scripts/run_translation.py", "images": "scripts/run_image_classification.py"}
KINDS = list(SCRIPTS)


class Place:
    """Models, data and a Hub."""

    def __init__(self, root: Path) -> None:
        self.root, self.hub = root, FakeHub()
        tokenizer = hf_tokenizer()
        hf_seq2seq_model("marian", tokenizer, dropout=0.1).save_pretrained(root / "marian")
        tokenizer.save_pretrained(root / "marian")
        sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]}
        ResNetConfig(**sizes, layer_type="basic").save_pretrained(root / "resnet")
        for seed, (part, count) in enumerate({"train": 32, "validation": 6, "test": 6}.items()):
            hf_write_pairs(root / f"{part}.jsonl", hf_pairs(count, seed))
            for colour, name in enumerate(("red", "green", "blue")):
                folder = root / "pixels" / part / name
                folder.mkdir(parents=True)
                for shade in range(count // 3):
                    pixel = [seed * 9, 20 + 10 * shade, 70]
                    Image.new("RGB", (8, 8), tuple(pixel[colour:] + pixel[:colour])).save(folder / f"{shade}.png")

    def argv(self, kind: str, output: str, *flags: str, **options: Any) -> list[str]:
        """A command line on tiny data that trains, evaluates and predicts."""
        root = self.root
        given: dict[str, Any] = {"max_steps": 3, "logging_steps": 1, "learning_rate": 0.01, "report_to": "none"}
        given |= {"per_device_train_batch_size": 8, "save_strategy": "no", "output_dir": root / output}
        given |= {"optim_args": "factor_interval=2,betas=0.9:0.99"}
        if kind == "translation":
            given |= {"model_name_or_path": root / "marian", "source_lang": "en", "target_lang": "de"}
            given |= {f"{part}_file": root / f"{part}.jsonl" for part in ("train", "validation", "test")}
            given |= {"max_source_length": 16, "max_target_length": 16}
            flags = (*flags, "--predict_with_generate")
        else:
            given |= {"config_name": root / "resnet", "image_size": 8, "cache_dir": root / "cache"}
            given |= {f"{part}_dir": root / "pixels" / part for part in ("train", "validation", "test")}
        flags = (*flags, "--do_train", "--do_eval", "--do_predict", "--use_cpu")
        parts = (str(p) for k, v in {**given, **options}.items() if v is not None for p in (f"--{k}", v))
        return [SCRIPTS[kind], *flags, *parts]

    def run(self, argv: list[str]) -> None:
        """The script in this process, against the mocked Hub."""
        with pytest.MonkeyPatch.context() as patch:
            self.hub.install(patch)
            patch.setattr(sys, "argv", argv)
            exit_on_usage_error(importlib.import_module(f"scripts.{Path(argv[0]).stem}").main)

    def results(self, output: str) -> dict[str, Any]:
        return json.loads((self.root / output / "all_results.json").read_text(encoding="utf-8"))

    def download(self, files: dict[str, bytes], name: str) -> Path:
        for path, content in files.items():
            (self.root / name / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name / path).write_bytes(content)
        return self.root / name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def pushed(place: Place) -> Place:
    """A translation model with its checkpoints; an image model pushed with every save, the first time in vain."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    checkpoints = {**saving, "save_total_limit": 1, "hub_strategy": "checkpoint", "report_to": "tensorboard"}
    place.run(place.argv("translation", "tiny-translation", "--push_to_hub", **checkpoints, hub_token=TOKEN))
    place.hub.faults["upload_folder"] = [http_error(500, "made up by the test")]
    own = {**saving, "hub_private_repo": "true", "hub_model_id": "someone/tiny-images"}
    place.run(place.argv("images", "tiny-images", "--push_to_hub", "--hub_tok", TOKEN, **own))
    return place


def card_of(place: Place, kind: str) -> ModelCard:
    """The card as the Hub's own library reads it."""
    return ModelCard(place.hub.files(f"someone/tiny-{kind}")["README.md"].decode())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_pushed(kind: str, pushed: Place) -> None:
    files = pushed.hub.files(f"someone/tiny-{kind}")
    of_kind = {"translation": ("tokenizer.json", "generated_predictions.txt"),
               "images": ("preprocessor_config.json", "predictions.csv", "confusion_matrix.png")}[kind]  # fmt: skip
    wanted = {"model.safetensors", "config.json", "README.md", "all_results.json", "loss_curves.png", "routing.json"}
    assert wanted | set(of_kind) <= set(files)
    assert files["model.safetensors"] == (pushed.root / f"tiny-{kind}" / "model.safetensors").read_bytes()
    assert (pushed.root / f"tiny-{kind}" / "checkpoint-4" / "optimizer.pt").is_file()
    assert any("last-checkpoint" in name for name in files) == (kind == "translation")  # only if it is asked for
    assert not [name for name in files if name.startswith("checkpoint-")]
    assert pushed.hub.private[f"someone/tiny-{kind}"] == (True if kind == "images" else None)


def test_every_save_is_pushed_and_a_failed_push_is_told(pushed: Place, caplog: pytest.LogCaptureFixture) -> None:
    messages = [message for message, _ in pushed.hub.commits["someone/tiny-images"]]
    assert messages == ["initial commit", "Training in progress, step 4", "End of training"]  # step 2 was not taken
    place, options = pushed, {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "hub_token": TOKEN}
    place.hub.faults["upload_folder"] = [http_error(500, "made up by the test")]
    place.run(place.argv("images", "told", "--push_to_hub", **options))
    assert "a push during training failed, training goes on: 500: made up by the test" in caplog.text


def test_no_file_tells_the_token(pushed: Place) -> None:
    for name, commits in pushed.hub.commits.items():
        for _, files in commits:
            assert not [path for path, content in files.items() if TOKEN.encode() in content]
        assert "training_args.bin" in pushed.hub.files(name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_tells_the_results(kind: str, pushed: Place) -> None:
    card, results = card_of(pushed, kind), pushed.results(f"tiny-{kind}")
    keys = {"translation": {"BLEU": "bleu", "chrF": "chrf"}, "images": {"Accuracy": "accuracy"}}[kind]
    prefixes = {"validation": "eval", "test": "predict"}
    told = {(r.dataset_split, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert told == {(s, name): results[f"{p}_{key}"] for s, p in prefixes.items() for name, key in keys.items()}
    task = {"translation": "translation", "images": "image-classification"}[kind]
    dataset = {"translation": pushed.root.name, "images": "pixels"}[kind]
    assert {(r.task_type, r.dataset_name, r.dataset_type) for r in card.data.eval_results} == {(task, dataset, dataset)}
    assert card.data.model_name == f"tiny-{kind}" and f'from_pretrained("someone/tiny-{kind}")' in card.text
    for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", card.text):
        assert pushed.hub.files(f"someone/tiny-{kind}")[picture].startswith(b"\x89PNG")
    assert "(loss_curves.png)" in card.text


@pytest.mark.parametrize("kind", [KINDS[0], pytest.param(KINDS[1], marks=needs_image_processor)])
def test_what_was_pushed_gives_the_same_metrics(kind: str, pushed: Place) -> None:
    model = pushed.download(pushed.hub.files(f"someone/tiny-{kind}"), f"downloaded-{kind}")
    own = {"config_name": None, "image_size": None} if kind == "images" else {}
    argv = pushed.argv(kind, f"fresh-{kind}", model_name_or_path=model, **own)
    pushed.run([part for part in argv if part != "--do_train"])
    first, again = pushed.results(f"tiny-{kind}"), pushed.results(f"fresh-{kind}")
    for name in ("loss", *(("bleu", "chrf") if kind == "translation" else ("accuracy",))):
        for prefix in ("eval", "predict"):
            assert again[f"{prefix}_{name}"] == first[f"{prefix}_{name}"], (prefix, name)
    text = (pushed.root / f"fresh-{kind}" / "README.md").read_text(encoding="utf-8")
    assert "evaluated" in text and "## Training" not in text and "optimizer" not in text


@contextlib.contextmanager
def put_away(folder: Path) -> Iterator[None]:
    """A folder that is elsewhere for a while, and what took its place is removed."""
    kept = shutil.move(folder, folder.with_name(f"kept-{folder.name}"))
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(kept, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cards_command_gives_the_same_weights(kind: str, pushed: Place) -> None:
    """Of the images with the optimizer's block in place of the command's own options."""
    blocks = [block.split("```")[0].replace("\\\n", " ") for block in card_of(pushed, kind).text.split("```bash\n")[1:]]
    optimizer, command = (shlex.split(block) for block in blocks)
    assert command[0] == "python" and not [part for part in command if "hub" in part and part.startswith("--")]
    if kind == "images":
        for option in ("--optim_args", "--learning_rate"):
            del command[command.index(option) : command.index(option) + 2]
        command += optimizer
    with put_away(pushed.root / f"tiny-{kind}"):
        pushed.run(command[1:])
        made = (pushed.root / f"tiny-{kind}" / "model.safetensors").read_bytes()
    assert made == pushed.hub.files(f"someone/tiny-{kind}")["model.safetensors"]


def test_training_goes_on_from_a_pushed_checkpoint(pushed: Place) -> None:
    commits = pushed.hub.commits["someone/tiny-translation"]
    messages = [f"Training in progress, step {step}{what}" for step in (2, 4) for what in ("", ", checkpoint")]
    assert [message for message, _ in commits] == ["initial commit", *messages, "End of training"]
    card = commits[2][1]["README.md"].decode()
    assert "model-index" not in card and "## Command" in card
    checkpoint = pushed.download(commits[2][1], "at-step-2") / "last-checkpoint"
    pushed.run(pushed.argv("translation", "gone-on", max_steps=4, resume_from_checkpoint=checkpoint))
    weights = (pushed.root / "gone-on" / "model.safetensors").read_bytes()
    assert weights == pushed.hub.files("someone/tiny-translation")["model.safetensors"]


def ended(place: Place, output: str, capsys: pytest.CaptureFixture[str], **faults: Any) -> tuple[int, str]:
    """Exit status and last line of a run whose push is refused."""
    place.hub.faults = faults
    options = {"max_steps": 1, "save_strategy": "epoch", "hub_strategy": "end", "hub_token": TOKEN}
    options |= {"overwrite_output_dir": "true"}
    with pytest.raises(SystemExit) as exit_:
        place.run(place.argv("images", output, "--push_to_hub", **options))
    said = capsys.readouterr().err
    assert TOKEN not in said
    return int(str(exit_.value.code)), said.rstrip("\n").split("\n")[-1]


@pytest.mark.parametrize("when", ["create_repo", "auth_check"])
def test_a_refusal_comes_before_training(when: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    status, last = ended(place, when, capsys, **{when: [http_error(403, "no write access")]})
    assert status == 2 and last.startswith("error: hub_model_id: got '") and "this token may not write (403: no" in last
    assert not (place.root / when / "train_results.json").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [(http_error(500, "made up"), "(500: made up)"), (httpx.ReadError("hung up"), "(hung up)")],
    ids=["status", "no answer"],
)
def test_a_push_that_fails_at_the_end_loses_nothing(
    error: Exception, words: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    status, last = ended(place, "lost", capsys, upload_folder=[error])
    folder = place.root / "lost"
    assert status == 1 and last.startswith("error: push_to_hub: someone/lost was not pushed ") and words in last
    command = f"hf upload someone/lost {folder} . --exclude '_*' --exclude 'checkpoint-*'"
    assert last.endswith(f"All is in {folder}; to push it without training again: {command}")
    wanted = ("model.safetensors", "eval_results.json", "predictions.csv", "README.md", "trainer_state.json")
    assert all((folder / name).is_file() for name in wanted)


def arguments(**given: Any) -> Any:
    plain = {"push_to_hub": True, "hub_token": TOKEN, "hub_model_id": "you/x", "hub_revision": None, "output_dir": "x"}
    return SimpleNamespace(**{**plain, **given})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"hub_token": None}, "hub_token: got none, accepted: a token with write access"),
        ({"hub_model_id": "a/b/c"}, "hub_model_id: got 'a/b/c', accepted: user/name"),
        ({"hub_model_id": None, "output_dir": "a b"}, "hub_model_id: got none, and the folder's name 'a b' is no"),
    ],
)
def test_what_can_be_known_without_the_hub(given: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeHub().install(monkeypatch)
    check_hub(arguments())
    check_hub(arguments(**given, **{"push_to_hub": False}))
    with pytest.raises(UsageError, match=f"^{re.escape(words)}"):
        check_hub(arguments(**given))


REFUSED = {
    "wrong token": (http_error(401, "bad credentials"), "hub_token: https://huggingface.co refuses it (401: bad cred"),
    "not there": (http_error(401, "none", RepositoryNotFoundError), "hub_model_id: got 'you/x', which this token may"),
    "no answer": (httpx.ConnectError("down"), "push_to_hub: got true, but https://huggingface.co does not"),
    "broken": (http_error(500, "oh"), "push_to_hub: got true, but https://huggingface.co does not"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_refusal_names_the_argument(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, words = REFUSED[case]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    assert str(refusal(error, arguments())).startswith(words)


def test_a_branch_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    hub.install(monkeypatch)
    trainer = SimpleNamespace(
        args=arguments(hub_revision="v9"), hub_model_id="you/x", is_world_process_zero=lambda: True
    )
    check_repository(trainer)
    hub.faults["repo_info"] = [http_error(404, "no such revision", RevisionNotFoundError)]
    with pytest.raises(UsageError, match="^hub_revision: got 'v9', accepted: a branch that you/x has"):
        check_repository(trainer)
    trainer.push_to_hub = hub.api.upload_folder
    with pytest.raises(RunError, match="--revision v9$"):
        push(trainer)


def test_no_push_in_offline_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = LNGDTrainingArguments(str(tmp_path), push_to_hub=True, hub_token="hf_x")
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    with pytest.raises(UsageError, match="^push_to_hub: got true while HF_HUB_OFFLINE is set, accepted: one of"):
        check_hub(args)
