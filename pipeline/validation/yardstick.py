"""What a server is held against: a golden set, and what is known of the model that it is of."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.client.client import Client
from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.files import sha256
from pipeline.core.paths import Paths
from pipeline.repository import config_pbtxt
from pipeline.repository.golden import Golden, unpack_golden
from pipeline.repository.release import Release, load_release
from pipeline.serving.ready import served_version


@dataclass(frozen=True)
class Yardstick:
    """A golden set, and what its manifest says of the model; None is what nothing says."""

    file: Path
    golden: Golden
    golden_sha256: str
    sha256: str | None  # of the model's file
    version: int | None  # that has to answer
    classes: tuple[str, ...]  # empty: nothing says
    release: Release | None

    def record(self) -> dict[str, Any]:
        """The yardstick as JSON has it."""
        return {
            "file": str(self.file),
            "sha256": self.golden_sha256,
            "images": len(self.golden.images),
            "model_sha256": self.sha256,
            "version": self.version,
        }

    def __str__(self) -> str:
        of_model = f" of the model with sha256 {self.sha256[:12]}" if self.sha256 else ""
        return f"{len(self.golden.images):,} golden images{of_model}"

    def misfit(self, config: config_pbtxt.ModelConfig) -> list[str]:
        """Why a server of that config cannot be asked this golden set; nothing if it can."""
        if len(config.input) != 1 or not config.output:
            return [f"takes {len(config.input)} tensors and gives {len(config.output)}"]
        problems = []
        for what, tensor, array in (
            ("takes", config.input[0], self.golden.images),
            ("gives", config.output[0], self.golden.outputs),
        ):
            dims = list(tensor.dims)[0 if config.max_batch_size else 1 :]
            if len(dims) != array.ndim - 1 or any(
                dim not in (-1, size) for dim, size in zip(dims, array.shape[1:], strict=False)
            ):
                wanted = list(array.shape[1:])
                problems.append(f"{what} {tensor.name} {dims}, the golden set has {wanted}")
        if config_pbtxt.type_name(config.input[0]) != str(self.golden.images.dtype):
            problems.append(
                f"takes {config_pbtxt.type_name(config.input[0])}, the golden set has "
                f"{self.golden.images.dtype}"
            )
        return problems

    def identity(self, versions: Sequence[str], stated: str | None) -> list[str]:
        """What is wrong with the versions that answered, and with the digest that is stated."""
        problems = []
        if len(versions) > 1:
            problems.append(f"versions {' and '.join(versions)} answered in turn")
        if self.version is not None and str(self.version) not in versions:
            problems.append(
                f"serves version {', '.join(versions)}, the repository selects {self.version}"
            )
        if self.sha256 and stated and stated != self.sha256:
            problems.append(
                f"serves version {versions[-1]} with digest {stated[:12]}, the golden set at "
                f"{self.file} is of {self.sha256[:12]}"
            )
        return problems


def yardstick_of(paths: Paths, clients: Mapping[str, Client], file: Path | None) -> Yardstick:
    """The golden set in `file`; without one that of the packaged version.

    Of a packaged version: the one that the repository's config selects, and where that selects
    none, the one that the first client's server serves.
    """
    if file:
        return _of_file(file)
    config = paths.packaged / "config.pbtxt"
    selected = config_pbtxt.selected(config_pbtxt.read(config)) if config.is_file() else []
    version = max(selected) if selected else served_version(next(iter(clients.values())))
    release = load_release(paths, version)
    return Yardstick(
        file=release.folder / paths.golden.name,
        golden=release.golden,
        golden_sha256=release.manifest["files"][paths.golden.name],
        sha256=release.sha256,
        version=version,
        classes=tuple(release.manifest["classes"]),
        release=release,
    )


def _of_file(file: Path) -> Yardstick:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise PipelineError(f"no golden set at {file}: {error.strerror}") from error
    digest, manifest = sha256(content), _manifest_beside(file)
    files = manifest.get("files", {})
    if files.get(file.name, digest) != digest:
        raise CorruptError(
            f"{file} does not match its digest in the manifest beside it: copy the version's "
            "folder again, or the golden set alone"
        )
    is_its_own = file.name in files
    # golden.npz is of model.onnx, golden.int8.npz of model.int8.onnx.
    model = file.with_suffix(".onnx").name.replace("golden", "model", 1)
    return Yardstick(
        file=file,
        golden=unpack_golden(content, str(file)),
        golden_sha256=digest,
        sha256=files.get(model) if is_its_own else None,
        version=None,
        classes=tuple(manifest.get("classes", ())) if is_its_own else (),
        release=None,
    )


def _manifest_beside(file: Path) -> dict[str, Any]:
    """The manifest in the golden set's folder; empty where there is none of ours."""
    try:
        manifest = json.loads((file.parent / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return {}
    is_ours = isinstance(manifest, dict) and isinstance(manifest.get("files"), dict)
    return manifest if is_ours else {}


def stated_classes(config: config_pbtxt.ModelConfig) -> tuple[str, ...]:
    """The class names that a config states; none where it states none that can be read."""
    try:
        return tuple(map(str, json.loads(config_pbtxt.parameter(config, "classes") or "[]")))
    except (ValueError, TypeError):
        return ()


def misnamed(names: Sequence[str], wanted: Sequence[str]) -> str:
    """What is wrong with a server's names of the classes; empty if nothing is, or none are told."""
    if not names or not wanted or list(names) == list(wanted):
        return ""
    if len(names) != len(wanted):
        return f"has {len(names)} classes instead of {len(wanted)}"
    first = next(i for i in range(len(names)) if names[i] != wanted[i])
    return f"calls class {first} {names[first]!r} instead of {wanted[first]!r}"
