"""Packaging: a validated export becomes the next version in a Triton model repository.

Also writes a packaged version as a reproducible tar, and gives the order in which to upload it.
"""

import io
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.files import (
    check_digest,
    check_manifest,
    clear_temporary,
    locked,
    new_folder,
    read_json,
    refuse_shared,
    write_bytes,
    write_json,
    write_with,
)
from pipeline.core.paths import MODEL_NAMES, Paths, packaged_name
from pipeline.core.signature import pictures_of
from pipeline.export import graph
from pipeline.export.policy import check_policy
from pipeline.repository import config_pbtxt, profiles
from pipeline.repository.golden import unpack_golden
from pipeline.repository.release import version_numbers
from pipeline.repository.running import serving
from pipeline.repository.settings import PackageConfig

EXPORT = "run 'pipeline export', then 'pipeline validate'"
VALIDATE = "run 'pipeline validate' first"


@dataclass(frozen=True)
class Packaged:
    """A version that was added to a model repository."""

    name: str
    precision: str
    folder: Path  # of the version
    version: int
    sha256: str  # of its model.onnx
    is_selected: bool  # Triton loads it; False while our server serves another version

    def __str__(self) -> str:
        said = "" if self.is_selected else "; the running server goes on with what it serves"
        return f"wrote {self.folder} (version {self.version}, sha256 {self.sha256[:12]}){said}"


def package_model(paths: Paths, config: PackageConfig = PackageConfig()) -> list[Packaged]:
    """Add each file of the export to the repository as the next version of its model.

    The new version is selected unless our server serves the model: then only a promotion changes
    what is served. The fp32 file has the model's name, a variant has its precision appended.
    Raises CheckFailedError if the export was not validated or its signature or classes differ from
    the repository's, and CorruptError if a file has changed since the validation.
    """
    return [_add(paths, load) for load in _loads(paths, config)]


def explain_package(
    paths: Paths, config: PackageConfig, profile: str = "all"
) -> dict[str, list[profiles.Choice]]:
    """Return what `package` would write into each config of the fp32 model, with reasons.

    Writes nothing. Raises what `package` raises, and PipelineError for an unknown profile.
    """
    chosen = [name for name in profiles.PROFILES if profile in (name, "all")]
    if not chosen:
        raise PipelineError(f"no profile {profile!r}: there are {', '.join(profiles.PROFILES)}")
    load = _loads(paths, config)[0]
    version, old = _next(paths.repository / load.name, load.message)
    base = _selecting(load, version, old)
    return {name: profiles.explain(name, base, config) for name in chosen}


def archive(paths: Paths, done: Packaged, target: Path | None = None) -> tuple[Path, str]:
    """Write a packaged version as a tar (exported/NAME-VERSION.tar); return its path and hash."""
    model = replace(paths, name=done.name)
    path = target or model.archive(done.version)
    if target and done.precision != "fp32":  # one tar for each model
        path = target.with_stem(f"{target.stem}-{done.precision}")
    with locked(model.lock):
        if not target:  # in the shared folder, where other commands write as well
            clear_temporary(path.parent, path.name)
        return path, write_tar(model.packaged, done.version, paths.onnx.name, path)


def _loads(paths: Paths, config: PackageConfig) -> list["_Load"]:
    """Read and check each file of the export, with all that goes into its version."""
    manifest = check_manifest(paths.export, EXPORT)
    if not paths.validation.exists():
        failed = (
            f"; its last validation failed, see {paths.failed}" if paths.failed.exists() else ""
        )
        named = "" if paths.name == MODEL_NAMES["mnist"] else f" --name {paths.name}"
        raise CheckFailedError(
            f"{paths.onnx} is not validated{failed}: run 'pipeline validate{named}' first"
        )
    validation = read_json(paths.validation, VALIDATE)
    proven = validation.get("variants", [])
    if validation.get("passed") is not True or not proven:
        raise CheckFailedError(f"{paths.validation} does not say that it passed: {VALIDATE}")
    largest = min(entry.get("largest_batch", 0) for entry in proven)
    if config.max_batch_size > largest:
        raise PipelineError(
            f"--max-batch-size {config.max_batch_size} is above {largest}, the largest batch that "
            "was validated: choose a smaller one, or run 'pipeline validate' again if the export "
            "was validated by an older version"
        )
    return [_load(paths, manifest, entry, config) for entry in proven]


@dataclass(frozen=True)
class _Load:
    """One checked file of an export, with all that goes into its version."""

    name: str
    precision: str
    sha256: str
    content: bytes
    golden: bytes
    profile: bytes | None  # None in an export by an older version of the pipeline
    manifest: dict[str, Any]
    message: config_pbtxt.ModelConfig
    config: PackageConfig


def _load(
    paths: Paths, manifest: dict[str, Any], entry: dict[str, Any], config: PackageConfig
) -> _Load:
    precision = str(entry["precision"])
    path, profile_path = paths.variant(precision), paths.variant_profile(precision)
    content = check_digest(path, entry["sha256"], EXPORT)
    golden = check_digest(paths.variant_golden(precision), entry["golden_sha256"], VALIDATE)
    digest = manifest["files"].get(profile_path.name)
    profile = check_digest(profile_path, digest, VALIDATE) if digest else None
    model = graph.parse(content, str(path))
    check_policy(model, str(path))
    tensors = graph.read_signature(model, str(path), batch=None)
    name, classes = packaged_name(paths.name, precision), manifest["classes"]
    message = config_pbtxt.base_config(name, tensors.images, tensors.outputs, classes, config)
    training = manifest.get("training")
    pictures = pictures_of(training["dataset"]) if training else "arrays"
    if pictures != "digit":
        config_pbtxt.set_parameter(message, "pictures", pictures)
    if manifest["kind"] != "log_probabilities":
        config_pbtxt.set_parameter(message, "outputs", manifest["kind"])
    manifest = {**manifest, "precision": precision}
    sha256 = entry["sha256"]
    return _Load(name, precision, sha256, content, golden, profile, manifest, message, config)


def _add(paths: Paths, load: _Load) -> Packaged:
    model = paths.named(load.name)
    with locked(model.lock):
        refuse_shared(model.repository, [model.packaged] if model.packaged.exists() else [])
        for below in ("", config_pbtxt.PROFILES, "warmup"):
            clear_temporary(model.packaged / below)
        version, old = _next(model.packaged, load.message)
        is_selected = old is None or serving(model) is None
        if old and not is_selected:
            _refuse_change(model, old, load)
        parts = {
            paths.onnx.name: load.content,
            paths.golden.name: load.golden,
            paths.validation.name: paths.validation.read_bytes(),
            paths.card.name: paths.card.read_bytes(),
        }
        if load.profile:
            parts[paths.variant_profile("fp32").name] = load.profile
        with new_folder(model.packaged / str(version)) as fresh:
            files = {name: write_bytes(fresh / name, content) for name, content in parts.items()}
            write_json(fresh / paths.manifest.name, {**load.manifest, "files": files})
        if is_selected:  # write what Triton reads outside the version folders, config.pbtxt last
            classes = "\n".join(load.manifest["classes"]) + "\n"
            digit = unpack_golden(load.golden, "the golden set").images[0].tobytes()
            write_bytes(model.packaged / config_pbtxt.LABELS, classes.encode())
            write_bytes(model.packaged / "warmup" / config_pbtxt.WARMUP, digit)
            profiles.write_configs(model.packaged, _selecting(load, version, old), load.config)
        else:  # only record the version, which waits for its promotion
            config_pbtxt.change_configs(
                model.packaged, lambda config: _state(load, version, config)
            )
    folder = model.packaged / str(version)
    return Packaged(load.name, load.precision, folder, version, load.sha256, is_selected)


def _selecting(
    load: _Load, version: int, old: config_pbtxt.ModelConfig | None
) -> config_pbtxt.ModelConfig:
    """Return the part that all configs share: versions' digests, selected and previous version."""
    message = load.message
    if old:
        message.version_policy.CopyFrom(old.version_policy)
        for key, value in config_pbtxt.version_parameters(old).items():
            config_pbtxt.set_parameter(message, key, value)
        if before := config_pbtxt.parameter(old, config_pbtxt.PREVIOUS):
            config_pbtxt.set_parameter(message, config_pbtxt.PREVIOUS, before)
    _state(load, version, message)
    config_pbtxt.select(message, version)
    return message


def _state(load: _Load, version: int, message: config_pbtxt.ModelConfig) -> None:
    """Record a version's own parameters, selected or not: its digest and its min_probability."""
    config_pbtxt.set_parameter(message, f"sha256.{version}", load.sha256)
    threshold = load.manifest.get("min_probability")  # None if no threshold was fitted
    if threshold is not None:
        key = f"{config_pbtxt.MIN_PROBABILITY}.{version}"
        config_pbtxt.set_parameter(message, key, str(threshold))


def _refuse_change(model: Paths, old: config_pbtxt.ModelConfig, load: _Load) -> None:
    """Raise PipelineError if the settings that run the served model would change."""
    new = profiles.message_of("config", load.message, load.config)
    before, after = config_pbtxt.run_settings(old), config_pbtxt.run_settings(new)
    changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    if changed:
        raise PipelineError(
            f"{model.name} is being served, and its config would change ({', '.join(changed)}): "
            "package with the options that it was packaged with, or run 'pipeline serve stop' "
            "first"
        )


def _next(
    packaged: Path, message: config_pbtxt.ModelConfig
) -> tuple[int, config_pbtxt.ModelConfig | None]:
    """Return the next version's number and the existing config, None if there is none.

    Raises CheckFailedError if `message` differs from that config in classes or signature.
    """
    version, path = max(version_numbers(packaged), default=0) + 1, packaged / config_pbtxt.CONFIG
    if not path.exists():
        return version, None
    old = config_pbtxt.read(path)
    classes = config_pbtxt.classes(old), config_pbtxt.classes(message)
    before, after = (
        [(tensor.name, tensor.data_type, tuple(tensor.dims)) for tensor in (*m.input, *m.output)]
        for m in (old, message)
    )
    if classes[0] == classes[1] and before == after:
        return version, old
    differing = f"{before}, the export has {after}"
    if classes[0] != classes[1]:
        differing = f"classes {classes[0]}, the export has {classes[1]}"
    raise CheckFailedError(
        f"version {version} would change what {packaged} promises its clients: it has "
        f"{differing}. Package it under a name of its own (--name)"
    )


def upload_order(packaged: Path, version: int, onnx: str) -> list[Path]:
    """Return the files of a model with one version, each after the files that it refers to.

    This is for a store without atomic rename: the model file is the last of its version, and
    config.pbtxt, which selects the version, is the last of all.
    """
    folder = packaged / str(version)
    proof = sorted(path for path in folder.iterdir() if path.name != onnx)
    beside = [packaged / config_pbtxt.LABELS, packaged / "warmup" / config_pbtxt.WARMUP]
    return [*proof, folder / onnx, *beside, *config_pbtxt.config_files(packaged)]


def write_tar(packaged: Path, version: int, onnx: str, archive: Path) -> str:
    """Write a tar of the model's folder with only that version, selected; return its SHA-256.

    The members are in upload order, so that it can be unpacked where a server runs.
    """

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for path in upload_order(packaged, version, onnx):
                member = tarfile.TarInfo(str(Path(packaged.name, path.relative_to(packaged))))
                content = path.read_bytes()
                if path.suffix == ".pbtxt":
                    content = _alone(path, version)
                # Owner, group and time stay 0, the mode 0644, so that the tar is reproducible.
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    return write_with(archive, write)


def _alone(path: Path, version: int) -> bytes:
    """Return the config's text as it is in a repository with only this version."""
    message = config_pbtxt.read(path)
    others = {
        key for key in config_pbtxt.version_parameters(message) if not key.endswith(f".{version}")
    }
    for key in others | {config_pbtxt.PREVIOUS}:
        message.parameters.pop(key, None)
    message.ClearField("version_policy")  # the version selected before is not in the tar
    config_pbtxt.select(message, version)
    return config_pbtxt.to_text(message).encode()
