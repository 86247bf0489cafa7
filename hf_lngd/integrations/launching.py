"""Ways of running: DDP and FSDP2 are LNGD's; what shards or replicates otherwise is refused before training."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any

import torch
from transformers import TrainingArguments

# What stands between the launcher and the script on the command line: `python -m hf_lngd` puts itself there.
ENTRY: list[str] = []


def refuse_unsupported(args: TrainingArguments | None = None, model: Any = None) -> None:
    """Raise RuntimeError where LNGD would be wrong: replicas of DataParallel, layers split otherwise than by FSDP2.

    Args:
        args: of a Trainer; None: of a loop of one's own, where the environment and the model tell.
        model: the model that will be trained.
    """
    if args is not None and args.n_gpu > 1:
        raise RuntimeError(
            f"LNGD: got {args.n_gpu} GPUs in one process (DataParallel), whose replicas LNGD cannot watch, accepted: "
            f"one process a GPU (DDP). Use: {_launch(args.n_gpu, args.n_gpu)}"
        )
    sharding = _sharding(args, model)
    if sharding:
        processes = max(int(os.environ.get("WORLD_SIZE", 1)) if args is None else args.world_size, 1)
        raise RuntimeError(
            f"LNGD: got {sharding}, accepted: whole parameters in every process (DDP), or FSDP2 on accelerators "
            "(--fsdp; fsdp_version: 2, see examples/accelerate/fsdp2.yaml). Use, without it: "
            f"{_launch(processes, int(os.environ.get('LOCAL_WORLD_SIZE', processes)))}"
        )


def refuse_stock_fsdp(args: TrainingArguments) -> None:
    """Raise RuntimeError for a stock Trainer under FSDP: its checkpoints would lose LNGD's state."""
    if args.fsdp or _asked("ACCELERATE_USE_FSDP"):
        raise RuntimeError(
            "LNGD: got FSDP in a stock Trainer, whose checkpoints hold nothing of LNGD's state then, accepted: "
            "hf_lngd.LNGDTrainer or LNGDSeq2SeqTrainer, or DDP"
        )


def refuse_sharding(args: TrainingArguments, model: Any, name: str) -> None:
    """Raise RuntimeError for an optimizer of this name, which needs whole parameters, where they are split."""
    in_fsdp = args.fsdp or _asked("ACCELERATE_USE_FSDP")
    if sharding := "FSDP (fsdp)" if in_fsdp else _sharding(args, model):
        raise RuntimeError(f"optim: got {name!r} under {sharding}, accepted: one process, or DDP")


def launcher(processes: int, on_each_node: int) -> list[str]:
    """What starts so many processes in all, and of these so many on each node."""
    if processes == 1:
        return ["python"]
    nodes = [] if processes == on_each_node else ["--nnodes", str(processes // on_each_node)]
    return ["torchrun", *nodes, "--nproc_per_node", str(on_each_node)]


def _launch(processes: int, on_each_node: int) -> str:
    """The command of this process, started so."""
    script = sys.argv if sys.argv and sys.argv[0] else ["your_script.py"]
    return shlex.join([*launcher(processes, on_each_node), *ENTRY, *script])


def _sharding(args: Any, model: Any) -> str | None:
    """What splits parameters or layers over processes, by the name under which a user asked for it; else None."""
    own = args is not None and bool(args.fsdp)  # the Trainer's own settings count
    if own or _asked("ACCELERATE_USE_FSDP"):
        given = args.fsdp_config if own and isinstance(args.fsdp_config, dict) else {}
        version = int(given.get("version") or 2) if own else int(os.environ.get("FSDP_VERSION") or 1)
        on_cpu = getattr(args, "use_cpu", False) or not torch.accelerator.is_available()
        if version != 2 or on_cpu:
            return f"FSDP{version}{' on CPU, which accelerate has not got' if on_cpu else ''} (fsdp)"
    if getattr(args, "deepspeed", None) or _asked("ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        return f"DeepSpeed ZeRO{f'-{stage}' if stage else ''} (deepspeed)"
    for name, what in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence")):
        if getattr(getattr(args, "parallelism_config", None), f"{name}_size", 1) > 1:
            return f"{what} parallelism (parallelism_config.{name}_size)"
    split = max(getattr(model, name, None) or 1 for name in ("_tp_size", "tp_size"))
    return "tensor parallelism (tp_plan)" if split > 1 else None


def _asked(variable: str) -> bool:
    """What `accelerate launch` tells the processes that it starts."""
    return os.environ.get(variable, "false").lower() in ("true", "1")
