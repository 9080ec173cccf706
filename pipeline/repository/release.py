"""Releases, which are packaged versions with their evidence: loading, checking and selecting."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailedError, CorruptError, PipelineError
from pipeline.core.files import check_digest, check_manifest, read_json, refuse_shared
from pipeline.core.paths import Paths
from pipeline.repository import config_pbtxt
from pipeline.repository.golden import Golden, unpack_golden
from pipeline.repository.reference_profile import REMAKE, ReferenceProfile, read_profile

REPACKAGE = "package it again with 'pipeline package'"


@dataclass(frozen=True)
class Limits:
    """How far served answers may be from the first row of the agreement table (eager float32)."""

    max_abs_diff: float
    differing: int  # images whose class may differ


@dataclass(frozen=True)
class Release:
    """A packaged version with its evidence."""

    folder: Path
    version: int
    sha256: str  # of its model.onnx
    onnx: bytes
    golden: Golden
    manifest: dict[str, Any]
    limits: Limits  # from its validation, against eager float32 on the test split


def load_release(
    paths: Paths, version: int, configs: Iterable[tuple[Path, config_pbtxt.ModelConfig]] = ()
) -> Release:
    """Load a version after a check of its files against its manifest and its digest in `configs`.

    Raises PipelineError if the version does not exist, CorruptError if a file has changed, and
    CheckFailedError if a config states another digest.
    """
    folder = paths.packaged / str(version)
    if not folder.is_dir():
        raise PipelineError(
            f"{folder} does not exist: run 'pipeline package', or see 'pipeline versions'"
        )
    manifest = check_manifest(folder, REPACKAGE)
    digests, golden_path = manifest["files"], folder / paths.golden.name
    sha256 = digests.get(paths.onnx.name)
    onnx = check_digest(folder / paths.onnx.name, sha256, REPACKAGE)
    content = check_digest(golden_path, digests.get(golden_path.name), REPACKAGE)
    for path, config in configs:
        stated = config_pbtxt.digest(config, str(version))
        if stated != sha256:
            raise CheckFailedError(
                f"the config {path} states digest {str(stated)[:12]} for version {version}, but "
                f"model.onnx of that version has digest {sha256[:12]}: {REPACKAGE}"
            )
    validation, precision = folder / paths.validation.name, str(manifest.get("precision"))
    variants = read_json(validation, REPACKAGE).get("variants", ())
    entry = next((entry for entry in variants if entry["precision"] == precision), None)
    if entry is None:
        raise CorruptError(f"{validation} has no entry for the {precision} file: {REPACKAGE}")
    limits = Limits(entry["allowed_error"], entry["allowed_flips"])
    golden = unpack_golden(content, str(golden_path))
    return Release(folder, version, sha256, onnx, golden, manifest, limits)


def check_release(paths: Paths, version: int) -> Release:
    """Load a version after a check of its files, of every config, and of who can change them.

    Raises what `load_release` raises, and CheckFailedError if others can write to the repository.
    """
    refuse_shared(paths.repository, [paths.packaged])
    files = config_pbtxt.config_files(paths.packaged)
    configs = [(path, config_pbtxt.read(path)) for path in files]
    numbers = find_versions(paths.packaged)
    if version not in numbers:
        versions = ", ".join(map(str, numbers)) or "none"
        raise PipelineError(f"{paths.name} has no version {version}; its versions: {versions}")
    return load_release(paths, version, configs)


def load_selected_releases(paths: Paths, profile: str = "") -> dict[str, Release]:
    """Load the selected release of each model in the repository, by the model's name.

    With a profile, reads the profile's config instead of config.pbtxt. Raises PipelineError if
    there is no model or 'pipeline package' did not write it, CorruptError if a file has changed,
    and CheckFailedError if a config states another digest than the version's file has or if others
    can write to the repository.
    """
    folders = sorted(path.parent for path in paths.repository.glob("*/config.pbtxt"))
    if not folders:
        problem = "has no model" if paths.repository.exists() else "does not exist"
        raise PipelineError(f"{paths.repository} {problem}: run 'pipeline package' first")
    refuse_shared(paths.repository, folders)
    releases = {}
    for folder in folders:
        path = config_pbtxt.profile_file(folder, profile)
        config = config_pbtxt.read(path)
        is_stated = any(key.startswith("sha256.") for key in config.parameters)
        if not is_stated and not any(folder.glob("*/manifest.json")):  # not packaged by us
            onnx = next(iter(sorted(folder.glob("*/*.onnx"))), folder / "1" / "model.onnx")
            raise PipelineError(
                f"{folder} has no evidence. Run: pipeline validate --onnx {shlex.quote(str(onnx))} "
                "--module package.module:factory --images FILE.npz; or serve it without evidence: "
                f"tritonserver --model-repository={shlex.quote(str(folder.parent))}"
            )
        version = require_selected(path, config)
        releases[folder.name] = load_release(paths.named(folder.name), version, [(path, config)])
    return releases


def require_selected(path: Path, config: config_pbtxt.ModelConfig) -> int:
    """Return the version that a server serves with this config; raise CheckFailedError if none."""
    version = config_pbtxt.selected_version(config)
    if version is None:
        raise CheckFailedError(f"{path} selects no version: {REPACKAGE}")
    return version


def find_versions(packaged: Path) -> list[int]:
    """Return the numbers of the versions in a model's folder, in ascending order."""
    return sorted(int(f.name) for f in packaged.glob("[1-9]*") if f.name.isdigit())


def find_profile(
    paths: Paths, reference: Path | None, version: int | None
) -> tuple[Path, ReferenceProfile]:
    """Return the path and the content of a reference profile.

    It is `reference` if given, else the profile of `version`, else of the selected version, else of
    the newest. If the model is not packaged, it is that of the export. Raises PipelineError, with
    how to make a profile, if there is none.
    """
    if reference:
        return reference, read_profile(reference)
    config = paths.packaged / config_pbtxt.CONFIG
    if config.exists():
        number = version or config_pbtxt.selected_version(config_pbtxt.read(config))
        number = number or max(find_versions(paths.packaged), default=None)
        if number is None:
            raise PipelineError(f"{paths.packaged} has no version: run 'pipeline package' first")
        folder = paths.packaged / str(number)
        if not folder.is_dir():
            raise PipelineError(f"{folder} does not exist: see 'pipeline versions list'")
    elif version or not paths.manifest.exists():
        raise PipelineError(
            f"{paths.packaged} does not exist: run 'pipeline package', or name a version's "
            "reference profile with --reference FILE"
        )
    else:
        folder = paths.export
    manifest, path = check_manifest(folder, REMAKE), folder / paths.variant_profile("fp32").name
    if path.name not in manifest["files"]:
        raise PipelineError(
            f"{folder} has no reference profile. Run 'pipeline validate', then 'pipeline package', "
            f"or use --reference {paths.variant_profile('fp32')}"
        )
    return path, read_profile(path)
