"""`--push_to_hub` against a Hub on this machine: what is pushed, what it is good for, what a refusal looks like."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import ResNetConfig

from hf_lngd import LNGDTrainingArguments
from hf_lngd.integrations.hub import check_hub
from hf_lngd.integrations.usage import UsageError
from tests.fake_hub import OTHER_TOKEN, READ_TOKEN, TOKEN, FakeHub
from tests.hf_helpers import hf_pairs, hf_seq2seq_model, hf_tokenizer, hf_write_pairs

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"translation": "scripts/run_translation.py", "images": "scripts/run_image_classification.py"}


@dataclass
class Place:
    """Models, data and a Hub, and what the runs of the fixture `pushed` left."""

    root: Path
    hub: FakeHub
    said: dict[str, str] = field(default_factory=dict)

    def argv(self, kind: str, output: str | Path, *flags: str, **options: Any) -> list[str]:
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

    def call(self, command: list[str], token: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        """A process of its own, whose Hub is the fake one."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        environment |= {**self.hub.environment(self.root / "home", token), **variables}
        command = [sys.executable, *command]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    def runs(self, commands: list[list[str]], token: str | None = None, **variables: str) -> list[tuple[int, str]]:
        """Runs in one process (importing takes longest): exit status and stderr of each."""
        file = self.root / "runs.json"
        file.write_text(json.dumps(commands), encoding="utf-8")
        done = self.call(["-m", "tests.hub_runs", str(file)], token, **variables)
        assert done.returncode == 0, done.stderr
        return [(status, said) for status, said in json.loads(done.stdout.rstrip("\n").split("\n")[-1])]

    def results(self, output: str) -> dict[str, Any]:
        return json.loads((self.root / output / "all_results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Models and data."""
    root = tmp_path_factory.mktemp("hub")
    tokenizer = hf_tokenizer()
    hf_seq2seq_model("marian", tokenizer, dropout=0.1).save_pretrained(root / "marian")
    tokenizer.save_pretrained(root / "marian")
    ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic").save_pretrained(
        root / "resnet"
    )
    for seed, (part, count) in enumerate({"train": 32, "validation": 6, "test": 6}.items()):
        hf_write_pairs(root / f"{part}.jsonl", hf_pairs(count, seed))
        for colour, name in enumerate(("red", "green", "blue")):
            folder = root / "pixels" / part / name
            folder.mkdir(parents=True)
            for shade in range(count // 3):
                pixel = [seed * 9, 20 + 10 * shade, 70]
                Image.new("RGB", (8, 8), tuple(pixel[colour:] + pixel[:colour])).save(folder / f"{shade}.png")
    with FakeHub() as hub:
        yield Place(root, hub)


@pytest.fixture(scope="module")
def pushed(place: Place) -> Place:
    """Four models on the Hub: `tiny-…` of each script, `every` with every save, `going-on` with checkpoints."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    place.hub.refuse("POST .*/someone/every/commit/", 500, times=1)
    # only at the end: in training its log grows while it is uploaded, which LFS, unlike Xet, may refuse
    at_end = {**saving, "hub_strategy": "end", "report_to": "tensorboard"}
    often = {**saving, "save_steps": 1, "max_steps": 4}
    going_on = {**saving, "max_steps": 4, "save_total_limit": 1, "hub_strategy": "checkpoint"}
    commands = [
        place.argv("translation", "tiny-translation", "--push_to_hub", **at_end, hub_token=TOKEN),
        place.argv("images", "tiny-images", "--push_to_hub", f"--hub_token={TOKEN}", **at_end,
                   hub_private_repo="true", hub_model_id="someone/tiny-images"),
        place.argv("images", "every", "--push_to_hub", "--hub_tok", TOKEN, **often),
        place.argv("translation", "going-on", "--push_to_hub", **going_on, hub_token=TOKEN),
    ]  # fmt: skip
    for command, (status, said) in zip(commands, place.runs(commands), strict=True):
        assert status == 0, said
        place.said[Path(command[command.index("--output_dir") + 1]).name] = said
    return place


KINDS = list(SCRIPTS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_pushed(kind: str, pushed: Place) -> None:
    files = pushed.hub.files(f"someone/tiny-{kind}")
    of_kind = {"translation": ("tokenizer.json", "generated_predictions.txt"),
               "images": ("preprocessor_config.json", "predictions.csv", "confusion_matrix.png")}[kind]  # fmt: skip
    assert [name for name in files if "events.out.tfevents" in name]
    wanted = {"model.safetensors", "config.json", "README.md", "all_results.json", "loss_curves.png", "routing.json"}
    assert wanted | set(of_kind) <= set(files)
    assert files["model.safetensors"] == (pushed.root / f"tiny-{kind}" / "model.safetensors").read_bytes()
    assert (pushed.root / f"tiny-{kind}" / "checkpoint-2" / "optimizer.pt").is_file()
    assert not [name for name in files if "checkpoint-" in name or name.endswith(("optimizer.pt", ".pth"))]
    assert pushed.hub.repos[f"someone/tiny-{kind}"].messages == ["initial commit", "End of training"]
    assert pushed.hub.repos[f"someone/tiny-{kind}"].private == (kind == "images")


def test_no_file_tells_the_token(pushed: Place) -> None:
    for name, repo in pushed.hub.repos.items():
        for files in repo.commits.values():
            for path, content in files.items():
                assert TOKEN.encode() not in content, (name, path)
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


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_pushed_gives_the_same_metrics(kind: str, pushed: Place) -> None:
    name = f"someone/tiny-{kind}"
    own = {"config_name": None, "image_size": None} if kind == "images" else {}
    argv = pushed.argv(kind, f"fresh-{kind}", model_name_or_path=name, token=TOKEN, **own)
    done = pushed.call([part for part in argv if part != "--do_train"])
    assert done.returncode == 0, done.stderr
    results = pushed.results(f"fresh-{kind}")
    for result in card_of(pushed, kind).data.eval_results:
        key = {"BLEU": "bleu", "chrF": "chrf", "Accuracy": "accuracy"}[result.metric_name]
        prefix = "eval" if result.dataset_split == "validation" else "predict"
        assert results[f"{prefix}_{key}"] == result.metric_value, (prefix, key)
    for loss in ("eval_loss", "predict_loss"):
        assert results[loss] == pushed.results(f"tiny-{kind}")[loss]
    weights = hashlib.sha256(pushed.hub.files(name)["model.safetensors"]).hexdigest()
    assert ("GET", f"/storage/{weights}", 200) in pushed.hub.requests
    text = (pushed.root / f"fresh-{kind}" / "README.md").read_text(encoding="utf-8")
    assert "evaluated" in text and "## Training" not in text and "optimizer" not in text


def command_in(place: Place, kind: str) -> tuple[list[str], list[str]]:
    """Of a pushed card: the optimizer's options, and the command."""
    blocks = [block.split("```")[0].replace("\\\n", " ") for block in card_of(place, kind).text.split("```bash\n")[1:]]
    optimizer, command = (shlex.split(block) for block in blocks)
    assert command[0] == "python" and not [part for part in command if "hub" in part and part.startswith("--")]
    return optimizer, command[1:]


@pytest.fixture(scope="module")
def again(pushed: Place) -> dict[str, bytes]:
    """Weights of a pasted command, and of a run that goes on from a pushed checkpoint."""
    repo = pushed.hub.repos["someone/going-on"]
    local = pushed.root / "downloaded"
    command = ["-m", "huggingface_hub.cli.hf", "download", "someone/going-on", "--revision", list(repo.commits)[2]]
    done = pushed.call([*command, "--include", "last-checkpoint/*", "--local-dir", str(local)], TOKEN)
    assert done.returncode == 0, done.stderr
    argv = pushed.argv("translation", "gone-on", max_steps=4, resume_from_checkpoint=local / "last-checkpoint")
    with put_away(pushed.root / "tiny-translation"):
        for status, said in pushed.runs([argv, command_in(pushed, "translation")[1]], HF_HUB_OFFLINE="1"):
            assert status == 0, said
        folders = ("gone-on", "tiny-translation")
        return {name: (pushed.root / name / "model.safetensors").read_bytes() for name in folders}


@contextlib.contextmanager
def put_away(folder: Path) -> Iterator[None]:
    """A folder that is elsewhere for a while, and what took its place is removed."""
    kept = shutil.move(folder, folder.with_name(f"kept-{folder.name}"))
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(kept, folder)


def test_the_cards_command_gives_the_same_weights(pushed: Place, again: dict[str, bytes]) -> None:
    assert again["tiny-translation"] == pushed.hub.files("someone/tiny-translation")["model.safetensors"]


def test_the_cards_optimizer_block_gives_the_same_weights(pushed: Place) -> None:
    """In place of the command's own options."""
    optimizer, command = command_in(pushed, "images")
    for option in ("--optim_args", "--learning_rate"):
        del command[command.index(option) : command.index(option) + 2]
    with put_away(pushed.root / "tiny-images"):
        done = pushed.call([*command, *optimizer], HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr
        made = (pushed.root / "tiny-images" / "model.safetensors").read_bytes()
    assert made == pushed.hub.files("someone/tiny-images")["model.safetensors"]


def test_every_save_is_pushed_and_a_failed_push_is_told(pushed: Place) -> None:
    first, *during, last = pushed.hub.repos["someone/every"].messages
    assert (first, last) == ("initial commit", "End of training")
    assert "a push during training failed, training goes on: 500: made up by the test" in pushed.said["every"]
    assert set(during) <= {f"Training in progress, step {step}" for step in (2, 3, 4)}  # step 1 was not taken
    left_out = re.findall(r"(checkpoint-\d) is not pushed: the push before is under way", pushed.said["every"])
    assert len(during) + len(left_out) <= 3
    assert not [path for path in pushed.hub.files("someone/every") if "checkpoint" in path]


def test_training_goes_on_from_a_pushed_checkpoint(pushed: Place, again: dict[str, bytes]) -> None:
    repo = pushed.hub.repos["someone/going-on"]
    messages = [f"Training in progress, step {step}{what}" for step in (2, 4) for what in ("", ", checkpoint")]
    assert repo.messages == ["initial commit", *messages, "End of training"], pushed.said["going-on"]
    at_step_2 = list(repo.commits.values())[2]
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= set(at_step_2)
    card = at_step_2["README.md"].decode()
    assert "model-index" not in card and "## Command" in card
    assert again["gone-on"] == pushed.hub.files("someone/going-on")["model.safetensors"]


# What the Hub refuses: options, status, what the last line says, whether training has been done.
REFUSED: dict[str, tuple[dict[str, Any], int, str, bool]] = {
    "no token": ({}, 2, "hub_token: got none, accepted: a token with write access", False),
    "no name": ({"hub_model_id": "a/b/c", "hub_token": TOKEN}, 2, "hub_model_id: got 'a/b/c', accepted: user/n", False),
    "odd folder": (
        {"output_dir": "a b", "hub_token": TOKEN},
        2,
        "hub_model_id: got none, and the folder's name",
        False,
    ),
    "wrong token": ({"hub_token": "hf_wrong"}, 2, "hub_token: http://127.0.0.1:", False),
    "not mine": ({"hub_model_id": "other/x", "hub_token": TOKEN}, 2, "hub_model_id: got 'other/x', which this", False),
    "read only": (
        {"hub_model_id": "someone/old", "hub_token": READ_TOKEN},
        2,
        "'someone/old', which this token",
        False,
    ),
    "not his": ({"hub_model_id": "someone/old", "hub_token": OTHER_TOKEN}, 2, "'someone/old', which this tok", False),
    "branch": ({"hub_revision": "v9", "hub_token": TOKEN}, 2, "hub_revision: got 'v9', accepted: a branch", False),
    "hung up": ({"hub_model_id": "someone/absent", "hub_token": TOKEN}, 2, "push_to_hub: got true, but http:", False),
    "500": ({"hub_model_id": "someone/broken", "hub_token": TOKEN}, 1, "(500: made up by the test)", True),
    "gone": ({"hub_model_id": "someone/gone", "hub_token": TOKEN}, 1, "push_to_hub: someone/gone was not pushed", True),
}


def refused_folder(case: str) -> str:
    return f"refused-{case.replace(' ', '-')}"


@pytest.fixture(scope="module")
def refused(place: Place) -> dict[str, tuple[int, str]]:
    """Exit status and stderr of each."""
    place.hub.refuse("POST .*/someone/broken/commit/", 500)
    place.hub.refuse("POST .*/someone/gone/commit/", None, times=1)
    place.hub.refuse("GET .*/someone/absent/", None)
    commands = [place.argv("images", "old", "--push_to_hub", max_steps=1, hub_token=TOKEN)]
    for case, (options, *_) in REFUSED.items():
        given = {"max_steps": 1, "save_strategy": "epoch", "hub_strategy": "end", **options}
        commands.append(place.argv("images", refused_folder(case), "--push_to_hub", **given))
    first, *others = place.runs(commands)
    assert first[0] == 0, first[1]
    return dict(zip(REFUSED, others, strict=True))


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_refusal_names_what_to_do(case: str, place: Place, refused: dict[str, tuple[int, str]]) -> None:
    _, status, words, trained = REFUSED[case]
    found, said = refused[case]
    last = said.rstrip("\n").split("\n")[-1]
    assert (found, last.startswith("error: ")) == (status, True) and words in last, last
    assert TOKEN not in said and READ_TOKEN not in said
    folder = place.root / refused_folder(case)
    assert (folder / "train_results.json").exists() == trained
    if trained:
        wanted = ("model.safetensors", "eval_results.json", "predictions.csv", "README.md", "trainer_state.json")
        assert all((folder / name).is_file() for name in wanted)
        assert f"hf upload {REFUSED[case][0]['hub_model_id']} {folder} . --exclude '_*'" in last


def test_the_command_of_a_failed_push_pushes(place: Place, refused: dict[str, tuple[int, str]]) -> None:
    upload = shlex.split(refused["gone"][1].rstrip("\n").split("without training again: ")[1])
    assert upload[0] == "hf"
    done = place.call(["-m", "huggingface_hub.cli.hf", *upload[1:]], TOKEN)
    assert done.returncode == 0, done.stderr
    files = place.hub.files("someone/gone")
    assert files["README.md"] == (place.root / refused_folder("gone") / "README.md").read_bytes()
    assert "model.safetensors" in files and not [path for path in files if "checkpoint" in path]


def test_a_hub_that_is_not_there(place: Place) -> None:
    argv = place.argv("images", "nowhere", "--push_to_hub", hub_token=TOKEN)
    [(status, said)] = place.runs([argv], HF_ENDPOINT="http://127.0.0.1:9")
    last = said.rstrip("\n").split("\n")[-1]
    assert status == 2 and last.startswith("error: push_to_hub: got true, but http://127.0.0.1:9 does not answer"), last
    assert not (place.root / "nowhere" / "train_results.json").exists()


def test_no_push_in_offline_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = LNGDTrainingArguments(str(tmp_path), push_to_hub=True, hub_token="hf_x")
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    with pytest.raises(UsageError, match="^push_to_hub: got true while HF_HUB_OFFLINE is set, accepted: one of"):
        check_hub(args)


def card_of(place: Place, kind: str) -> ModelCard:
    """The card as the Hub's own library reads it."""
    return ModelCard(place.hub.files(f"someone/tiny-{kind}")["README.md"].decode())
