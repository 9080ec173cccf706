"""Packaged versions with the proof that they carry: which is selected, and whether it is intact."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailedError, CorruptError, PipelineError
from pipeline.core.files import check_digest, check_manifest, read_json, refuse_shared
from pipeline.core.paths import Paths
from pipeline.repository import config_pbtxt
from pipeline.repository.golden import Golden, unpack_golden
from pipeline.repository.reference_profile import REMAKE, ReferenceProfile, unpacked

REPACKAGE = "package it again with 'pipeline package'"


@dataclass(frozen=True)
class Limits:
    """How far a served answer may lie from the first row of its table."""

    max_abs_diff: float
    differing: int  # images whose class may differ


@dataclass(frozen=True)
class Release:
    """A packaged version with the proof that it carries."""

    folder: Path
    version: int
    sha256: str  # of its model.onnx
    onnx: bytes
    golden: Golden
    manifest: dict[str, Any]
    limits: Limits  # as proven, against eager float32 on the test split


def load_release(paths: Paths, version: int) -> Release:
    """A version of a packaged model, every file checked against its manifest.

    Raises PipelineError when there is none and CorruptError when a file changed.
    """
    folder = paths.packaged / str(version)
    if not folder.is_dir():
        raise PipelineError(f"no version {version} at {folder}: package it, or give --golden FILE")
    manifest = check_manifest(folder, REPACKAGE)
    digests = manifest["files"]
    onnx = check_digest(folder / paths.onnx.name, digests.get(paths.onnx.name), REPACKAGE)
    golden_path = folder / paths.golden.name
    golden = check_digest(golden_path, digests.get(paths.golden.name), REPACKAGE)
    digest = digests[paths.onnx.name]
    return Release(
        folder,
        version,
        digest,
        onnx,
        unpack_golden(golden, str(golden_path)),
        manifest,
        _limits(folder / paths.validation.name, str(manifest.get("precision"))),
    )


def _limits(path: Path, precision: str) -> Limits:
    """What the validation record grants the file of that precision."""
    record = read_json(path, REPACKAGE)
    for entry in record.get("variants", ()):
        if entry["precision"] == precision:
            return Limits(entry["allowed_error"], entry["allowed_flips"])
    raise CorruptError(f"{path} does not speak of the {precision} file beside it: {REPACKAGE}")


def selected_releases(paths: Paths, profile: str = "") -> dict[str, Release]:
    """The release of each model in the repository that its config selects, all of it intact.

    With a profile, its config in place of config.pbtxt. Raises CheckFailedError when a config
    states another digest than the version's file has, and when anybody may change the repository.
    """
    configs = sorted(paths.repository.glob("*/config.pbtxt"))
    if not configs:
        raise PipelineError(f"no model in {paths.repository}: run 'pipeline package' first")
    refuse_shared(paths.repository, [path.parent for path in configs])
    releases = {}
    for folder in [path.parent for path in configs]:
        path, model = config_pbtxt.profile_file(folder, profile), replace(paths, name=folder.name)
        config = config_pbtxt.read(path)
        _refuse_foreign(folder, config)
        versions = config_pbtxt.selected(config)
        if not versions:
            raise CheckFailedError(f"{path} selects no version: {REPACKAGE}")
        release = load_release(model, max(versions))
        stated = config_pbtxt.digest(config, str(release.version))
        if stated != release.sha256:
            raise CheckFailedError(
                f"{path} states digest {str(stated)[:12]} for version {release.version}, whose "
                f"model.onnx has {release.sha256[:12]}: {REPACKAGE}"
            )
        releases[model.name] = release
    return releases


def _refuse_foreign(folder: Path, config: config_pbtxt.ModelConfig) -> None:
    """Raise PipelineError for a model that nothing says we packaged."""
    is_stated = any(key.startswith("sha256.") for key in config.parameters)
    if not is_stated and not any(folder.glob("*/manifest.json")):
        onnx = next(iter(sorted(folder.glob("*/*.onnx"))), folder / "1" / "model.onnx")
        raise PipelineError(
            f"{folder} carries no proof, since 'pipeline package' did not write it. Prove the file "
            f"and package it: pipeline validate --onnx {shlex.quote(str(onnx))} --module "
            "package.module:factory --images FILE.npz; or serve it unproven: tritonserver "
            f"--model-repository={shlex.quote(str(folder.parent))}"
        )


def checked(paths: Paths, version: int) -> Release:
    """The release of a version, intact, with the digest that every config states."""
    refuse_shared(paths.repository, [paths.packaged])
    configs = {path: config_pbtxt.read(path) for path in config_pbtxt.config_files(paths.packaged)}
    if version not in version_numbers(paths):
        there = ", ".join(map(str, version_numbers(paths))) or "none"
        raise PipelineError(f"{paths.name} has no version {version}; there are: {there}")
    release = load_release(paths, version)
    for path, config in configs.items():
        stated = config_pbtxt.digest(config, str(version))
        if stated != release.sha256:
            raise CheckFailedError(
                f"{path} states digest {str(stated)[:12]} for version {version}, whose model.onnx "
                f"has {release.sha256[:12]}: {REPACKAGE}"
            )
    return release


def version_numbers(paths: Paths) -> list[int]:
    """The numbers of a packaged model's versions, ascending."""
    return sorted(int(f.name) for f in paths.packaged.glob("[1-9]*") if f.name.isdigit())


def find_profile(
    paths: Paths, reference: Path | None, version: int | None
) -> tuple[Path, ReferenceProfile]:
    """The file given, or the profile of the version asked for or selected, and where it lies.

    Where nothing is packaged, that of the export. Raises PipelineError where there is none, and
    says how to make it.
    """
    if reference:
        try:
            return reference, unpacked(reference.read_bytes(), str(reference))
        except OSError as error:
            raise PipelineError(f"no {reference}: {REMAKE}") from error
    config = paths.packaged / config_pbtxt.CONFIG
    if not config.exists():
        folder = paths.export
        if version or not paths.manifest.exists():
            raise PipelineError(
                f"no {paths.packaged} here: package the model, or name the profile that travels "
                "in its version's folder with --reference"
            )
    else:
        number = version or _selected(config_pbtxt.read(config), paths.packaged)
        folder = paths.packaged / str(number)
        if not folder.is_dir():
            raise PipelineError(
                f"no version {number} at {paths.packaged}: see 'pipeline versions list'"
            )
    manifest, path = check_manifest(folder, REMAKE), folder / paths.variant_profile("fp32").name
    if path.name not in manifest["files"]:
        raise PipelineError(
            f"{folder} has no reference profile, it was made before there was one. 'pipeline "
            f"validate' makes one, {paths.variant_profile('fp32')}: give it with --reference, or "
            "run 'pipeline package' for a version that has it"
        )
    return path, unpacked(path.read_bytes(), str(path))


def _selected(config: config_pbtxt.ModelConfig, packaged: Path) -> int:
    """The version that Triton loads."""
    there = [int(entry.name) for entry in packaged.glob("[1-9]*") if entry.name.isdigit()]
    versions = config_pbtxt.selected(config) or there
    if not versions:
        raise PipelineError(f"no version at {packaged}: run 'pipeline package' first")
    return max(versions)
