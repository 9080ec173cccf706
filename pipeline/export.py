"""A checkpoint through torch.export to one ONNX file, with a manifest of what it was made of."""

import io
import json
import logging
import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import nn

from pipeline import graph
from pipeline.checkpoint import load_checkpoint
from pipeline.config import IMAGES, ExportConfig, log_probabilities
from pipeline.errors import CheckFailedError
from pipeline.files import remove, sha256, write_bytes, write_json
from pipeline.paths import Paths
from pipeline.policy import check_policy

CONTRACT = "uint8 [batch, 1, 28, 28], 0 is paper and 255 is ink"


@dataclass(frozen=True)
class Exported:
    """An ONNX file that was written, not yet proven."""

    path: Path
    sha256: str
    size: int  # bytes
    opset: int
    ir_version: int


def export_program(model: nn.Module) -> torch.export.ExportedProgram:
    """The graph of `model`, in the mode that it is in, for any number of images.

    Nodes lose the traces that name source files of this machine.
    """
    # Two images, not one: torch.export takes a dimension of size 1 to be fixed.
    example = torch.zeros(2, *IMAGES.shape, dtype=torch.uint8)
    batch = {IMAGES.name: {0: torch.export.Dim(graph.BATCH)}}
    with warnings.catch_warnings():
        # Raised inside torch's own export code; nothing that a user could mend.
        warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated", FutureWarning)
        program = torch.export.export(model, (example,), dynamic_shapes=batch)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def to_onnx(
    program: torch.export.ExportedProgram,
    classes: int,
    config: ExportConfig,
    metadata: dict[str, str],
) -> bytes:
    """`program` as the bytes of one ONNX file that obeys the graph policy and our signature.

    Raises CheckFailedError when the exporter made anything else.
    """
    # The exporter only remarks that torchvision is missing, which we do without.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    outputs = log_probabilities(classes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated", FutureWarning)
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=config.opset,
            input_names=[IMAGES.name],
            output_names=[outputs.name],
            # Said again, or the axis would be called after one of torch's symbols.
            dynamic_shapes={IMAGES.name: {0: torch.export.Dim(graph.BATCH)}},
            verbose=False,
        )
    if converted is None:
        raise CheckFailedError("torch.onnx.export made no program")
    content = graph.scrub(converted.model_proto, config.ir_version, metadata)
    check_onnx(content, classes, config)
    return content


def check_onnx(content: bytes, classes: int, config: ExportConfig) -> None:
    """Raise CheckFailedError unless `content` has our signature, dialect and graph policy."""
    model = graph.parse(content, "the exported graph")
    check_policy(model, "the exported graph")
    found = graph.signature(model, "the exported graph")
    wanted = graph.Signature(IMAGES, log_probabilities(classes), config.opset, config.ir_version)
    if found != wanted:
        raise CheckFailedError(f"the exported graph is {found}, not {wanted}")


def source_commit(root: Path) -> str | None:
    """The commit that the code at `root` is at, or None where there is no git."""
    git = shutil.which("git")
    if not git:
        return None
    command = [git, "-C", str(root), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """The versions of what made an export."""
    return {
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def export(
    paths: Paths,
    config: ExportConfig = ExportConfig(),
    report: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Export the finished run to `exported/<name>/`: model.pt2, model.onnx, manifest.json.

    What an earlier export left there is void and goes first: its proof is about other bytes.
    """
    checkpoint = load_checkpoint(paths)
    classes = checkpoint.classes
    summary = checkpoint.summary
    report("torch.export")
    program = export_program(checkpoint.model)
    metadata = {
        "classes": json.dumps(classes),
        "images": CONTRACT,
        "outputs": "float32 [batch, classes], natural logarithms of probabilities",
        "weights_sha256": summary["weights_sha256"],
        "data_sha256": json.dumps(summary["data_sha256"], sort_keys=True),
        "versions": json.dumps(versions(), sort_keys=True),
    }
    report("torch.onnx.export")
    content = to_onnx(program, len(classes), config, metadata)
    for stale in (paths.manifest, paths.validation, paths.golden, paths.agreement, paths.failed):
        remove(stale)
    files = {
        paths.program.name: write_bytes(paths.program, _program_bytes(program)),
        paths.onnx.name: write_bytes(paths.onnx, content),
    }
    write_json(paths.manifest, _manifest(paths, config, checkpoint.config.record(), summary, files))
    return Exported(paths.onnx, sha256(content), len(content), config.opset, config.ir_version)


def export_config(manifest: dict[str, Any]) -> ExportConfig:
    """The ONNX dialect that a manifest states."""
    return ExportConfig(manifest["opset"], manifest["ir_version"])


def _program_bytes(program: torch.export.ExportedProgram) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _manifest(
    paths: Paths,
    config: ExportConfig,
    training: dict[str, Any],
    summary: dict[str, Any],
    files: dict[str, str],
) -> dict[str, Any]:
    return {
        "name": paths.name,
        "run": paths.run,
        "files": files,
        "classes": summary["classes"],
        "training": training,
        "weights_sha256": summary["weights_sha256"],
        "data_sha256": summary["data_sha256"],
        "metrics": {
            key: summary[key]
            for key in ("test_accuracy", "test_loss", "validation_accuracy", "train_seconds")
        },
        "opset": config.opset,
        "ir_version": config.ir_version,
        "versions": versions(),
        "source_commit": source_commit(Path(__file__).parent),
    }
