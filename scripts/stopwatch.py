"""Runs a Trainer script unchanged and writes its losses with the seconds of training at which they were logged.

    python scripts/stopwatch.py curve.json scripts/run_translation.py --model_name_or_path ...

The Trainer's own log history knows steps, not time. The file holds
`{"train": [[step, seconds, loss], ...], "validation": [[step, seconds, loss], ...]}`; evaluation during training is
left out of the seconds.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers import trainer as trainer_module


class Stopwatch(TrainerCallback):
    """Notes (step, seconds, loss) of whatever the Trainer logs while it trains, and writes them at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start: float | None = None
        self.evaluating = 0.0
        self.curves: dict[str, list[tuple[int, float, float]]] = {"train": [], "validation": []}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self.start = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Notes a training or validation loss."""
        if self.start is None or not logs:
            return
        self.evaluating += logs.get("eval_runtime", 0.0)
        seconds = round(time.perf_counter() - self.start - self.evaluating, 3)
        for key, name in (("loss", "train"), ("eval_loss", "validation")):
            if key in logs:
                self.curves[name].append((state.global_step, seconds, float(logs[key])))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops the clock and writes the file (the first process only)."""
        self.start = None
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.curves) + "\n", encoding="utf-8")


def main() -> None:
    """Reads the file to write, the script and its arguments, and runs the script as its own command would."""
    if len(sys.argv) < 3:
        sys.exit("error: stopwatch: needs a file to write and a script: stopwatch.py CURVE.json SCRIPT ...")
    curve, script = Path(sys.argv[1]), sys.argv[2]
    trainer_module.DEFAULT_CALLBACKS.append(Stopwatch(curve))
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
