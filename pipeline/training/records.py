"""Records of a run: its curve, its checkpoints, TensorBoard's events."""

# Shape letters: N images, K classes.

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.core.files import clear_temporary, remove, write_bytes, write_json
from pipeline.core.paths import Paths
from pipeline.training.checkpoint import RunState, load_state, save_state
from pipeline.training.loop import TrainingProgress
from pipeline.training.recipes import TrainConfig

CURVE_POINTS = 200  # of the training loss that a run keeps, at most
BOARD_STEPS = 10  # steps between two points in TensorBoard


class Records:
    """Writer of a training run's files, with the state to resume from.

    Raises PipelineError when the state was saved under another `identity`, and CorruptError when
    its bytes changed.
    """

    def __init__(
        self,
        paths: Paths,
        config: TrainConfig,
        identity: dict[str, Any],
        resume: bool,
        on_epoch: Callable[[TrainingProgress], None] = lambda progress: None,
        on_step: Callable[[TrainingProgress], None] = lambda progress: None,
    ) -> None:
        self.paths, self.identity = paths, identity
        self.on_epoch, self.on_step = on_epoch, on_step
        self.state = load_state(paths, identity) if resume else None
        files = [paths.summary, paths.weights, paths.predictions, paths.page, paths.run_config]
        files += [paths.metrics, paths.board]
        if not resume and paths.summary.exists():  # a finished run; its summary is moved first
            remove(paths.previous)
            paths.previous.mkdir()
            for path in filter(Path.exists, files):
                path.rename(paths.previous / path.name)
        for path in () if resume else (*files, paths.checkpoint):
            remove(path)
        for folder in (paths.run_folder, paths.checkpoint):
            clear_temporary(folder)
        write_json(paths.run_config, config.record())
        step = self.state.step if self.state else 0
        self.history: list[dict[str, Any]] = []  # the lines of metrics.jsonl
        if step and paths.metrics.exists():
            lines = map(json.loads, paths.metrics.read_text("utf-8").splitlines())
            self.history = [line for line in lines if line["step"] <= step]
        self.board: Any = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(paths.board, purge_step=step + 1 if step else None)

    def progress(self, progress: TrainingProgress) -> None:
        """Report the progress, and record it if it is a point of the curve."""
        accuracy, step, board = progress.validation_accuracy, progress.step, self.board
        is_scored = accuracy is not None
        # Which losses are kept depends only on the step, so that a resume is exact.
        steps = round(progress.epochs * step / progress.epoch)
        if is_scored or step % math.ceil(steps / CURVE_POINTS) == 0:
            fields = asdict(progress).items()
            self.history.append({name: value for name, value in fields if value is not None})
        if board and (is_scored or step % BOARD_STEPS == 0):
            board.add_scalar("loss", progress.loss, step)
            board.add_scalar("learning rate", progress.lr, step)
            board.add_scalar("images per second", progress.images_per_second, step)
        if board and is_scored:
            board.add_scalar("validation accuracy", accuracy, step)
            board.flush()
        if is_scored:
            self._write_history()
            self.on_epoch(progress)
        else:
            self.on_step(progress)

    def save(self, state: RunState) -> None:
        """Write the curve, then a checkpoint: a resume keeps the curve up to the checkpoint."""
        self._write_history()
        save_state(self.paths, state, self.identity)

    def close(self) -> None:
        """Remove the checkpoints of the finished run, and close TensorBoard's file."""
        remove(self.paths.checkpoint)
        if self.board:
            self.board.close()

    def _write_history(self) -> None:
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        write_bytes(self.paths.metrics, lines.encode())
