"""A validated export becomes the next version in a Triton model repository."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import graph, triton
from pipeline.config import PackageConfig, pictures_of
from pipeline.errors import CheckFailedError
from pipeline.files import (
    check_digest,
    check_manifest,
    locked,
    new_folder,
    read_json,
    write_bytes,
    write_json,
)
from pipeline.paths import Paths
from pipeline.policy import check_policy
from pipeline.validate import unpack_golden

EXPORT = "run 'pipeline export', then 'pipeline validate'"
VALIDATE = "run 'pipeline validate' first"


@dataclass(frozen=True)
class Packaged:
    """A version that was added to a model repository."""

    folder: Path  # of the version
    version: int
    sha256: str  # of its model.onnx


def package(paths: Paths, config: PackageConfig = PackageConfig()) -> Packaged:
    """Add the export to the repository as its next version, and select it.

    Raises CheckFailedError when the export was never validated, CorruptError when a file changed
    since, and CheckFailedError when its signature or classes differ from the repository's.
    """
    manifest = check_manifest(paths.export, EXPORT)
    validation = _require_validation(paths)
    content = check_digest(paths.onnx, validation["model_sha256"], EXPORT)
    golden = check_digest(paths.golden, validation["golden_sha256"], VALIDATE)
    model = graph.parse(content, str(paths.onnx))
    check_policy(model, str(paths.onnx))
    found = graph.signature(model, str(paths.onnx))
    classes = tuple(manifest["classes"])
    message = triton.model_config(paths.name, found.images, found.outputs, classes, config)
    if (pictures := pictures_of(manifest["training"]["dataset"])) != "digit":
        triton.set_parameter(message, "pictures", pictures)
    digit = unpack_golden(golden, str(paths.golden)).images[0].tobytes()
    with locked(paths.exported / f".{paths.name}.lock"):
        version = next_version(paths.packaged)
        _keep_digests(paths.packaged / "config.pbtxt", message, version)
        triton.set_parameter(message, f"sha256.{version}", validation["model_sha256"])
        message.version_policy.specific.versions.append(version)
        folder = paths.packaged / str(version)
        with new_folder(folder) as fresh:
            _fill(fresh, paths, manifest, content, golden)
        write_bytes(paths.packaged / triton.LABELS, ("\n".join(classes) + "\n").encode())
        write_bytes(paths.packaged / "warmup" / triton.WARMUP, digit)
        write_bytes(paths.packaged / "config.pbtxt", triton.to_text(message).encode())
    return Packaged(folder, version, validation["model_sha256"])


def _require_validation(paths: Paths) -> dict[str, Any]:
    if not paths.validation.exists():
        failed = (
            f"; its last validation failed, see {paths.failed}" if paths.failed.exists() else ""
        )
        raise CheckFailedError(f"{paths.onnx} is not validated{failed}: {VALIDATE}")
    validation = read_json(paths.validation, VALIDATE)
    if validation.get("passed") is not True:
        raise CheckFailedError(f"{paths.validation} does not say that it passed: {VALIDATE}")
    return validation


def next_version(folder: Path) -> int:
    """One more than the highest version in a model's folder; the first is 1."""
    versions = [int(entry.name) for entry in folder.glob("[1-9]*") if entry.name.isdigit()]
    return max(versions, default=0) + 1


def _keep_digests(path: Path, message: triton.ModelConfig, version: int) -> None:
    """Carry the digests of earlier versions over, if `message` fits what `path` has promised."""
    if not path.exists():
        return
    old = triton.read(path)
    if triton.classes(old) != triton.classes(message):
        differing = f"classes {triton.classes(old)}, the export has {triton.classes(message)}"
    elif _signature(old) != _signature(message):
        differing = f"{_signature(old)}, the export has {_signature(message)}"
    else:
        for key in old.parameters:
            if key.startswith("sha256."):
                triton.set_parameter(message, key, old.parameters[key].string_value)
        return
    raise CheckFailedError(
        f"version {version} would change what {path.parent} promises its clients: it has "
        f"{differing}. Package it under a name of its own (--name)"
    )


def _signature(message: triton.ModelConfig) -> list[tuple[str, int, tuple[int, ...]]]:
    tensors = [*message.input, *message.output]
    return [(tensor.name, tensor.data_type, tuple(tensor.dims)) for tensor in tensors]


def _fill(
    folder: Path, paths: Paths, manifest: dict[str, Any], content: bytes, golden: bytes
) -> None:
    """The files of a version: the model, its proof, and a manifest of just these."""
    files = {
        paths.onnx.name: write_bytes(folder / paths.onnx.name, content),
        paths.golden.name: write_bytes(folder / paths.golden.name, golden),
        paths.validation.name: write_bytes(
            folder / paths.validation.name, paths.validation.read_bytes()
        ),
    }
    write_json(folder / paths.manifest.name, {**manifest, "files": files})
