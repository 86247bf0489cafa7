"""The commands of docs/distributed.md, as printed; faults that end a job and are named."""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.fsdp import StateDictType
from torch.distributed.run import main as torchrun
from transformers import ResNetConfig

from hf_lngd.linalg import fast_bfloat16
from scripts import run_translation
from tests.distributed.trainers import FSDP2, fsdp2_environment
from tests.hf_helpers import hf_pairs, hf_seq2seq_model, hf_tokenizer, hf_write_pairs
from tests.image_helpers import write_folder
from tests.integration.test_command import STOCK_SCRIPT

ROOT = Path(__file__).resolve().parents[2]
DDP = "examples/accelerate/ddp.yaml"
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
Launch = Callable[..., str]


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Launch]:
    """Runs a command of the page in a folder and returns what its processes print; the launcher is in this process."""
    signals = {number: signal.getsignal(number) for number in signal.valid_signals()}

    def start(command: list[str], folder: Path = ROOT, **more: str) -> str:
        monkeypatch.chdir(folder)
        for name, value in (ENVIRONMENT | more).items():
            monkeypatch.setenv(name, value)
        if command[0] == "torchrun":
            torchrun(command[1:])
        else:
            assert command[:2] == ["accelerate", "launch"]
            launch_command(launch_command_parser().parse_args(command[2:]))
        return capfd.readouterr().out

    yield start
    for number, handler in signals.items():
        if signal.getsignal(number) != handler:  # torchrun's
            signal.signal(number, handler)


def commands() -> list[list[str]]:
    """The page's commands for several processes."""
    text = (ROOT / "docs/distributed.md").read_text(encoding="utf-8")
    return [
        shlex.split(line)
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith(("torchrun ", "accelerate "))
    ]


def printed(launcher: str, script: str) -> list[str]:
    """The page's one command with this launcher and script."""
    (found,) = (command for command in commands() if command[0] == launcher and script in command)
    return found


RUN = [
    ("torchrun", "scripts/run_translation.py"),
    ("torchrun", "run_translation.py"),
    ("accelerate", "scripts/run_image_classification.py"),
]


def test_every_printed_command_is_run_here() -> None:
    assert sorted(commands()) == sorted(printed(*which) for which in RUN)


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_printed_torchrun_trains_a_translator_as_one_process_does(
    tmp_path: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = hf_tokenizer()
    hf_seq2seq_model("marian", tokenizer, init_std=0.25).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = hf_write_pairs(tmp_path / "train.json.gz", hf_pairs(40))
    small = ["--model_name_or_path", str(tmp_path / "model"), "--train_file", str(data), "--max_steps", "4"]
    small += ["--optim_args", "factor_interval=2,bias=factor", "--report_to", "none"]
    command = printed(*RUN[0])
    assert option(command, "--nproc_per_node") == "2"
    script = command[command.index("scripts/run_translation.py") :]
    drop = {"--config_name", "--tokenizer_name"}  # a model in their place
    for name in drop:
        for words in (command, script):
            at = words.index(name)
            del words[at : at + 2]
    two = [*command, *small, "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "two")]
    one = [*script, *small, "--per_device_train_batch_size", "8", "--output_dir", str(tmp_path / "one")]
    out = launch(two)
    monkeypatch.setattr(sys, "argv", one)
    run_translation.main()
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    start = load_file(tmp_path / "model" / "model.safetensors")
    trained = [name for name in first if not name.endswith("k_proj.bias")]
    gap = sum(float((second[name] - first[name]).square().sum()) for name in trained)
    way = sum(float((first[name] - start[name]).square().sum()) for name in trained)
    most = 0.1 if fast_bfloat16(torch.device("cpu")) else 1e-3  # matmuls of a step are in bfloat16 where it is fast
    assert way > 0 and (gap / way) ** 0.5 <= most
    results = json.loads((tmp_path / "two" / "all_results.json").read_text(encoding="utf-8"))
    assert results["train_samples"] == 40 and out.count("owner     reason") == 1


def test_the_printed_torchrun_of_a_stock_script(tmp_path: Path, launch: Launch) -> None:
    """In the place of transformers' example a script of its kind."""
    (tmp_path / "run_translation.py").write_text(STOCK_SCRIPT, encoding="utf-8")
    (tmp_path / "neighbour.py").write_text('COLUMN = "translation"\n', encoding="utf-8")
    tokenizer = hf_tokenizer()
    hf_seq2seq_model("marian", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    hf_write_pairs(tmp_path / "train.json", hf_pairs(32))
    command = printed(*RUN[1])
    assert command.pop() == "..."
    command += ["--model_name_or_path", "model", "--train_file", "train.json", "--output_dir", "out", "--use_cpu"]
    command += ["--max_steps", "2", "--save_steps", "2", "--per_device_train_batch_size", "4", "--report_to", "none"]
    with socket.socket() as free:  # without --standalone torchrun takes 29500, which may be taken
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    out = launch(command, tmp_path, PET_MASTER_PORT=port, HF_HOME=str(tmp_path / "hf"))
    assert out.count("ran as __main__ run_translation.py LNGD") == 2
    assert out.count("owner     reason") == 1  # the routing table, once
    state = torch.load(tmp_path / "out" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert state["lngd"]["steps"] == 2


def test_the_printed_accelerate_launch_trains_a_classifier(tmp_path: Path, launch: Launch) -> None:
    """As printed, but on two CPUs: with a folder in the place of the Hub's ResNet, and photos of three classes."""
    for name in ("scripts", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    ResNetConfig().save_pretrained(tmp_path / "microsoft" / "resnet-18")
    write_folder(tmp_path / "photos" / "train", 4)
    write_folder(tmp_path / "photos" / "validation", 1)
    command = printed(*RUN[2])
    assert option(command, "--config_file") == DDP
    command[command.index("--num_processes") + 1] = "2"
    short = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--report_to", "none", "--use_cpu"]
    out = launch([*command, *short], tmp_path)
    results = json.loads((tmp_path / "runs" / "photos" / "all_results.json").read_text(encoding="utf-8"))
    assert results["train_samples"] == 24 and 0 <= results["eval_accuracy"] <= 1
    config = json.loads((tmp_path / "runs" / "photos" / "config.json").read_text(encoding="utf-8"))
    assert config["hidden_sizes"] == [32, 64, 128] and config["layer_type"] == "basic"
    assert out.count("owner     reason") == 1


def test_the_yaml_is_what_accelerate_reads() -> None:
    config = load_config_from_file(str(ROOT / DDP))
    assert config.distributed_type == "MULTI_GPU" and config.num_processes == 4
    args = launch_command_parser().parse_args(["--config_file", str(ROOT / DDP), "--num_processes", "2", "script.py"])
    args, _, _ = _validate_launch_command(args)
    assert args.multi_gpu and not args.use_fsdp and not args.use_deepspeed and args.num_processes == 2


def test_the_yaml_for_fsdp2_is_what_accelerate_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config_from_file(str(ROOT / FSDP2))
    assert config.distributed_type == "FSDP" and config.num_processes == 4
    for name, value in fsdp2_environment().items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT and not plugin.cpu_ram_efficient_loading


FAULTY = """
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from hf_lngd import LNGD

@record
def main():
    dist.init_process_group("gloo")
    model = torch.nn.Linear(4, 3)
    optimizer = LNGD(model, factor_interval=1)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for step in range(5):
        wrapped(torch.ones(2, 4)).sum().backward()
        if step == 2 and dist.get_rank() == 1:
            raise ValueError("rank 1 has had enough")
        optimizer.step()
        optimizer.zero_grad()

main()
"""


def test_a_rank_that_fails_ends_the_job_and_is_named(tmp_path: Path, launch: Launch) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY, encoding="utf-8")
    with pytest.raises(ChildFailedError) as caught:
        launch(["torchrun", "--standalone", "--nproc_per_node", "2", str(script)])
    cause = str(caught.value)
    cause = cause[cause.index("Root Cause") :]
    assert re.search(r"rank +: 1 .*ValueError: rank 1 has had enough", cause, re.DOTALL), cause


def test_a_scripts_exception_reaches_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lngd.integrations.usage import exit_on_usage_error

    def broken() -> None:
        raise KeyError("no such column")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(KeyError):
        exit_on_usage_error(broken)
    assert "no such column" in json.loads((tmp_path / "error.json").read_text(encoding="utf-8"))["message"]["message"]
