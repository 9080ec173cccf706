"""Export of a module through torch.export to ONNX files, with a manifest of their origin.

Also reads an ONNX file from another tool: merges its data into one file if asked, and checks it
against the graph policy.
"""

import contextlib
import io
import json
import logging
import subprocess
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from pipeline.core.errors import CheckFailedError, require_choice
from pipeline.core.files import remove, write_bytes, write_json
from pipeline.core.paths import PRECISIONS, Paths, data_name
from pipeline.core.signature import TensorSpec, pictures_of
from pipeline.export import graph
from pipeline.export.exact import scores_of, to_exact
from pipeline.export.policy import SCRUB, check_policy
from pipeline.export.sample import Sample, pack_sample
from pipeline.export.subject import Subject, load_sample, subject_of_run
from pipeline.export.targets import ExportConfig
from pipeline.export.variants import CALIBRATION_IMAGES, to_fp16, to_int8

OUTPUTS = {
    "log_probabilities": "natural logarithms of probabilities",
    "probabilities": "probabilities",
    "logits": "logits: softmax makes probabilities of them",
}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """An ONNX file that was written and is not validated yet."""

    precision: str
    path: Path
    sha256: str
    size: int  # bytes
    opset: int
    ir_version: int


def export_program(model: nn.Module, images: TensorSpec) -> torch.export.ExportedProgram:
    """Trace `model` in its current mode with torch.export, for any number of images.

    Stack traces, which name source files of this machine, are removed from the nodes. Raises
    CheckFailedError when torch.export cannot trace the module, or only for a fixed batch size.
    """
    # Two images, not one: torch.export treats a dimension of size 1 as fixed.
    example = torch.zeros(2, *images.shape, dtype=getattr(torch, images.dtype))
    batch = ({0: torch.export.Dim(graph.BATCH)},)
    try:
        with warnings.catch_warnings():
            # Raised inside torch's own export code; a user cannot fix it.
            warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated", FutureWarning)
            program = torch.export.export(model, (example,), dynamic_shapes=batch)
    except Exception as error:  # the tracer has a dozen types, and passes on the module's own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckFailedError(
            f"torch.export cannot trace {type(model).__name__} for any number of images "
            f"({type(error).__name__}: {' '.join(lines[:3])}); --debug shows the whole message"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def to_onnx(
    program: torch.export.ExportedProgram, signature: graph.Signature, metadata: dict[str, str]
) -> bytes:
    """Convert `program` to the bytes of one ONNX file.

    Raises CheckFailedError unless it obeys the graph policy and has that signature.
    """
    # The exporter only warns that torchvision is missing, which we do not need.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated", FutureWarning)
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=signature.opset,
            input_names=[signature.images.name],
            output_names=[each.name for each in (signature.outputs, signature.scores) if each],
            # Repeated here, or the axis would be named after one of torch's symbols.
            dynamic_shapes=({0: torch.export.Dim(graph.BATCH)},),
            verbose=False,
        )
    assert converted is not None  # only without `dynamo`
    content = graph.scrub(converted.model_proto, signature.ir_version, metadata)
    check_onnx(content, signature)
    return content


def check_onnx(content: bytes, wanted: graph.Signature, name: str = "the exported graph") -> None:
    """Raise CheckFailedError unless `content` obeys the policy and has the wanted signature."""
    model = graph.parse(content, name)
    check_policy(model, name)
    signature = graph.read_signature(model, name)
    if signature != wanted:
        raise CheckFailedError(f"{name} {signature}; it should be one that {wanted}")


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that make an export."""
    return {library.__name__: library.__version__ for library in (torch, onnx, onnxruntime)}


def export_run(
    paths: Paths,
    config: ExportConfig = ExportConfig(),
    precisions: Sequence[str] = ("fp32",),
    report: Say = lambda line: None,
) -> list[Exported]:
    """Export the finished run to `exported/<name>/`: model.pt2, model.onnx, manifest.json.

    Other precisions are made from model.onnx and lie next to it. The files of an earlier export
    are removed first: its validation is about other bytes.
    """
    subject = subject_of_run(paths)
    is_calibrated = not {"int8", "exact"}.isdisjoint(precisions)
    sample = load_sample(paths, subject.origin) if is_calibrated else None
    return export_module(paths, subject, sample, config, precisions, report)


def export_module(
    paths: Paths,
    subject: Subject,
    sample: Sample | None,
    config: ExportConfig = ExportConfig(),
    precisions: Sequence[str] = ("fp32",),
    report: Say = lambda line: None,
) -> list[Exported]:
    """Export any module as `export_run` exports a run.

    `sample` is needed only for int8, exact and a third-party module; for the latter, its images are
    copied into the export, to validate it on.
    """
    for precision in precisions:
        require_choice("precision", precision, PRECISIONS)
    calibration = sample.calibration if sample else np.empty(0)
    program, contents = make_files(subject, config, precisions, calibration, report)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return write_export(paths, subject, sample, config, contents, buffer.getvalue())


def make_files(
    subject: Subject,
    config: ExportConfig,
    precisions: Sequence[str],
    calibration: np.ndarray,
    report: Say = lambda line: None,
) -> tuple[torch.export.ExportedProgram, dict[str, bytes]]:
    """Export a module: return its program, and its ONNX files by precision.

    int8 and exact need calibration images (M, ...).
    """
    report("torch.export")
    program = export_program(subject.model, subject.images)
    report("torch.onnx.export")
    shape, answer = (", ".join(map(str, s.shape)) for s in (subject.images, subject.outputs))
    metadata = {  # describes the file to readers without this package
        "classes": json.dumps(subject.classes),
        "images": f"{subject.images.dtype} [batch, {shape}]",
        "outputs": f"{subject.outputs.dtype} [batch, {answer}], {OUTPUTS[subject.kind]}",
        "weights_sha256": subject.weights_sha256,
        "versions": json.dumps(library_versions(), sort_keys=True),
    }
    if training := subject.origin.get("training"):
        is_whole = pictures_of(training["dataset"]) == "whole"
        metadata["images"] += ", gray levels" if is_whole else ", 0 is paper and 255 is ink"
        # Of a folder of pictures only the name: its path would show this machine.
        recipe = {**training, "dataset": data_name(training["dataset"])}
        metadata["training"] = json.dumps(recipe, sort_keys=True)
        metadata["data_sha256"] = json.dumps(subject.origin["data_sha256"], sort_keys=True)
    signature = signature_of(subject, config)
    fp32 = to_onnx(program, signature, metadata)
    contents = {"fp32": fp32}
    for precision in [p for p in PRECISIONS[1:] if p in precisions]:
        report(precision)
        if precision == "exact":
            exact = to_exact(program, calibration[:CALIBRATION_IMAGES])
            wanted = replace(signature, scores=scores_of(exact, subject.images))
            form = "whole numbers that are equal on every runtime"
            added = {"scores": f"{wanted.scores}: {form}"}
            content = to_onnx(export_program(exact, subject.images), wanted, metadata | added)
        else:
            if precision == "fp16":
                content = to_fp16(fp32, config.ir_version)
            else:
                content = to_int8(fp32, config.ir_version, calibration[:CALIBRATION_IMAGES])
            check_onnx(content, signature, f"the {precision} variant")
        contents[precision] = content
    return program, contents


def signature_of(subject: Subject, config: ExportConfig) -> graph.Signature:
    """Return the signature of the subject's ONNX file in the dialect of `config`."""
    return graph.Signature(subject.images, subject.outputs, config.opset, config.ir_version)


def write_export(
    paths: Paths,
    subject: Subject,
    sample: Sample | None,
    config: ExportConfig,
    contents: dict[str, bytes],
    program: bytes | None = None,
) -> list[Exported]:
    """Replace the export with ONNX files (by precision) and their manifest."""
    variants = [*map(paths.variant, PRECISIONS), *map(paths.variant_agreement, PRECISIONS)]
    # The manifest first.
    for path in (paths.manifest, *validation_files(paths), *variants, paths.program, paths.images):
        remove(path)
    files = {}
    if program:
        files[paths.program.name] = write_bytes(paths.program, program)
    if "module" in subject.origin and sample:
        images = pack_sample(sample, CALIBRATION_IMAGES)
        files[paths.images.name] = write_bytes(paths.images, images)
    exported = []
    for precision, content in contents.items():
        path = paths.variant(precision)
        files[path.name] = digest = write_bytes(path, content)
        exported.append(Exported(precision, path, digest, len(content), *astuple(config)))
    commit = None  # without git or a repository
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    scores = None
    if exact := contents.get("exact"):
        name = str(paths.variant("exact"))
        scores = graph.read_signature(graph.parse(exact, name), name).scores
    manifest = {
        "name": paths.name,
        **subject.origin,
        "files": files,
        "precisions": list(contents),
        "classes": list(subject.classes),
        "images": asdict(subject.images),
        "outputs": asdict(subject.outputs),
        "kind": subject.kind,
        "scores": asdict(scores) if scores else None,
        "images_sha256": files.get(paths.images.name),
        "weights_sha256": subject.weights_sha256,
        **asdict(config),
        "versions": library_versions(),
        "exporter": f"onnxscript {version('onnxscript')}",
        "source_commit": commit,
    }
    write_json(paths.manifest, manifest)
    return exported


def validation_files(paths: Paths) -> list[Path]:
    """Return the files that validation adds to an export, and the folder of a failed one."""
    variants = [*map(paths.variant_golden, PRECISIONS), *map(paths.variant_profile, PRECISIONS)]
    return [paths.validation, paths.evidence, paths.card, *variants, paths.failed]


def read_third_party_onnx(path: Path, scrub: bool = False) -> bytes:
    """Read an ONNX file from another tool; with `scrub`, make it one file without source paths.

    Raises PipelineError when it cannot be read and CheckFailedError when it breaks the policy.
    """
    if scrub:
        model = graph.read_inlined(path)
        metadata = graph.metadata(model).items()
        public = {key: value for key, value in metadata if not graph.shows_source(f"{key} {value}")}
        content = graph.scrub(model, model.ir_version, public)
    else:
        content = graph.read_onnx(path)
    model = graph.parse(content, str(path))
    check_policy(model, str(path))
    model.DiscardUnknownFields()
    if model.ByteSize() != len(content):  # unknown fields, or repeated ones: the last is used
        raise CheckFailedError(f"{path} has bytes that are not part of its graph: {SCRUB}")
    return content


def matching_signature(content: bytes, images: TensorSpec, outputs: TensorSpec) -> graph.Signature:
    """Return the signature of an ONNX file from another tool; it must match its module's.

    The names of the tensors and of the batch axis may differ. Raises CheckFailedError when a type
    or shape differs.
    """
    model = graph.parse(content, "the file")
    signature = graph.read_signature(model, "the file", batch=None)
    for tensor, wanted in ((signature.images, images), (signature.outputs, outputs)):
        if (tensor.dtype, tensor.shape) != (wanted.dtype, wanted.shape):
            raise CheckFailedError(f"the file has {tensor}, but its module has {wanted}")
    return signature
