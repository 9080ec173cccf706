"""Packaging: a validated export becomes the next version in a Triton model repository.

Also writes a packaged version as a reproducible tar, and gives the order in which to upload it.
"""

import io
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.core import files
from pipeline.core.errors import CheckFailedError, PipelineError, SettingError
from pipeline.core.paths import Paths, packaged_name
from pipeline.export import graph
from pipeline.export.policy import check_policy
from pipeline.repository import config_pbtxt, profiles
from pipeline.repository.config_pbtxt import ModelConfig
from pipeline.repository.golden import unpack_golden
from pipeline.repository.release import find_versions
from pipeline.repository.running import find_server
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
        note = "" if self.is_selected else "; the running server keeps its version"
        return f"wrote {self.folder} (version {self.version}, sha256 {self.sha256[:12]}){note}"


def package_model(paths: Paths, config: PackageConfig = PackageConfig()) -> list[Packaged]:
    """Add each file of the export to the repository as the next version of its model.

    The new version is selected unless our server serves the model: then only a promotion changes
    what is served. The fp32 file has the model's name, a variant has its precision appended.
    Raises CheckFailedError if the export was not validated or its signature or classes differ from
    the repository's, and CorruptError if a file has changed since the validation.
    """
    return [_add_version(paths, variant, config) for variant in _check_export(paths, config)]


def explain_package(
    paths: Paths, config: PackageConfig, profile: str = "all"
) -> dict[str, list[profiles.Choice]]:
    """Return what `package` would write into each config of the fp32 model, with reasons.

    Writes nothing. Raises what `package` raises, and PipelineError for an unknown profile.
    """
    chosen = [name for name in profiles.PROFILES if profile in (name, "all")]
    if not chosen:
        raise SettingError(f"no profile {profile!r} exists: use {', '.join(profiles.PROFILES)}")
    variant = _check_export(paths, config)[0]
    version, old = _next_version(paths.repository / variant.name, variant.base)
    base = _select_in_base(variant, version, old)
    return {name: profiles.explain(name, base, config) for name in chosen}


def archive(paths: Paths, done: Packaged, target: Path | None = None) -> tuple[Path, str]:
    """Write a packaged version as a tar (exported/NAME-VERSION.tar); return its path and hash."""
    model = paths.named(done.name)
    path = target or model.archive(done.version)
    if target and done.precision != "fp32":  # one tar for each model
        path = target.with_stem(f"{target.stem}-{done.precision}")
    with files.locked(model.lock):
        if not target:  # in the shared folder, where other commands write as well
            files.clear_temporary(path.parent, path.name)
        return path, write_tar(model.packaged, done.version, paths.onnx.name, path)


@dataclass(frozen=True)
class _Variant:
    """One checked file of an export, with all that goes into its version."""

    name: str  # of its model
    sha256: str
    contents: dict[str, bytes]  # of the version's folder, without the manifest
    manifest: dict[str, Any]
    base: ModelConfig  # the part that its configs share


def _check_export(paths: Paths, config: PackageConfig) -> list[_Variant]:
    """Read and check each file of the export, with all that goes into its version."""
    manifest = files.check_manifest(paths.export, EXPORT)
    if not paths.validation.exists():
        failed = f" (its last validation failed: {paths.failed})" if paths.failed.exists() else ""
        command = f"pipeline validate{paths.name_option}"
        raise CheckFailedError(f"{paths.onnx} is not validated{failed}: run '{command}' first")
    validation = files.read_json(paths.validation, VALIDATE)
    variants = validation.get("variants", [])
    if validation.get("passed") is not True or not variants:
        raise CheckFailedError(f"{paths.validation} does not record a pass: {VALIDATE}")
    largest = min(entry.get("largest_batch", 0) for entry in variants)
    if config.max_batch_size > largest:
        size = config.max_batch_size
        raise PipelineError(f"--max-batch-size {size} is not validated: use at most {largest}")
    return [_check_variant(paths, manifest, entry, config) for entry in variants]


def _check_variant(
    paths: Paths, manifest: dict[str, Any], entry: dict[str, Any], config: PackageConfig
) -> _Variant:
    precision, digest = str(entry["precision"]), entry["sha256"]
    path, profile = paths.variant(precision), paths.variant_profile(precision)
    content = files.check_digest(path, digest, EXPORT)
    golden = files.check_digest(paths.variant_golden(precision), entry["golden_sha256"], VALIDATE)
    contents = {
        paths.onnx.name: content,
        paths.golden.name: golden,
        paths.validation.name: paths.validation.read_bytes(),
        paths.card.name: paths.card.read_bytes(),
    }
    if stated := manifest["files"].get(profile.name):  # older versions of the pipeline made none
        contents[paths.variant_profile("fp32").name] = files.check_digest(profile, stated, VALIDATE)
    model = graph.parse(content, str(path))
    check_policy(model, str(path))
    tensors = graph.read_signature(model, str(path), batch=None)
    name = packaged_name(paths.name, precision)
    signature = (tensors.images, tensors.outputs, config, tensors.scores)
    base = config_pbtxt.describe(name, manifest, *signature)
    return _Variant(name, digest, contents, {**manifest, "precision": precision}, base)


def _add_version(paths: Paths, variant: _Variant, config: PackageConfig) -> Packaged:
    model = paths.named(variant.name)
    with files.locked(model.lock):
        files.refuse_shared(model.repository, [model.packaged] if model.packaged.exists() else [])
        for below in ("", config_pbtxt.PROFILES, "warmup"):
            files.clear_temporary(model.packaged / below)
        version, old = _next_version(model.packaged, variant.base)
        is_selected = old is None or find_server(model) is None
        if old and not is_selected:
            new_config = profiles.build_config("config", variant.base, config)
            before, after = map(config_pbtxt.run_settings, (old, new_config))
            keys = sorted({*before, *after})
            if changed := [key for key in keys if before.get(key) != after.get(key)]:
                raise PipelineError(
                    f"the config of {variant.name}, which is being served, would change "
                    f"({', '.join(changed)}). Use the same options as before, or run 'pipeline "
                    "serve stop' first"
                )
        folder = model.packaged / str(version)
        with files.create_folder(folder) as new:
            contents = variant.contents.items()
            digests = {name: files.write_bytes(new / name, content) for name, content in contents}
            files.write_json(new / paths.manifest.name, {**variant.manifest, "files": digests})
        if is_selected:  # write what Triton reads outside the version folders, config.pbtxt last
            classes = "\n".join(variant.manifest["classes"]) + "\n"
            golden = unpack_golden(variant.contents[paths.golden.name], "the golden set")
            files.write_bytes(model.packaged / config_pbtxt.LABELS, classes.encode())
            warmup = model.packaged / "warmup" / config_pbtxt.WARMUP
            files.write_bytes(warmup, golden.images[0].tobytes())
            profiles.write_configs(model.packaged, _select_in_base(variant, version, old), config)
        else:  # only record the version, which waits for its promotion
            config_pbtxt.change_configs(model.packaged, partial(_record_version, variant, version))
    precision = variant.manifest["precision"]
    return Packaged(variant.name, precision, folder, version, variant.sha256, is_selected)


def _select_in_base(variant: _Variant, version: int, old: ModelConfig | None) -> ModelConfig:
    """Return the part that all configs share: versions' digests, selected and previous version."""
    base = variant.base
    if old:
        base.version_policy.CopyFrom(old.version_policy)
        for key, value in config_pbtxt.version_parameters(old).items():
            config_pbtxt.set_parameter(base, key, value)
        if previous := config_pbtxt.parameter(old, config_pbtxt.PREVIOUS):
            config_pbtxt.set_parameter(base, config_pbtxt.PREVIOUS, previous)
    _record_version(variant, version, base)
    config_pbtxt.select(base, version)
    return base


def _record_version(variant: _Variant, version: int, message: ModelConfig) -> None:
    """Record a version's own parameters, selected or not: its digest and its min_probability."""
    config_pbtxt.set_parameter(message, f"sha256.{version}", variant.sha256)
    if variant.manifest["precision"] == "exact":
        key = f"{config_pbtxt.EXACT}.{version}"
        config_pbtxt.set_parameter(message, key, variant.manifest["exact_sha256"])
    threshold = variant.manifest.get("min_probability")  # None if no threshold was fitted
    if threshold is not None:
        key = f"{config_pbtxt.MIN_PROBABILITY}.{version}"
        config_pbtxt.set_parameter(message, key, str(threshold))


def _next_version(packaged: Path, base: ModelConfig) -> tuple[int, ModelConfig | None]:
    """Return the next version's number and the existing config, None if there is none.

    Raises CheckFailedError if `base` differs from that config in classes, signature or rule.
    """
    version, path = max(find_versions(packaged), default=0) + 1, packaged / config_pbtxt.CONFIG
    if not path.exists():
        return version, None
    old = config_pbtxt.read(path)
    tensors = [
        [(tensor.name, tensor.data_type, tuple(tensor.dims)) for tensor in (*m.input, *m.output)]
        for m in (old, base)
    ]
    classes = [config_pbtxt.classes(m) for m in (old, base)]
    pictures = [config_pbtxt.pictures(m) for m in (old, base)]
    changes = (("classes", classes), ("tensors", tensors), ("picture rule", pictures))
    for what, (before, after) in changes:
        if before not in (after, "arrays"):  # a rule may be added, and not changed
            raise CheckFailedError(
                f"version {version} would change the {what} of {packaged} from {before} to "
                f"{after}. Package it with another name (--name)"
            )
    return version, old


def upload_order(packaged: Path, version: int, onnx: str) -> list[Path]:
    """Return the files of a model with one version, each after the files that it refers to.

    This is for a store without atomic rename: the model file is the last of its version, and
    config.pbtxt, which selects the version, is the last of all.
    """
    folder = packaged / str(version)
    evidence = sorted(path for path in folder.iterdir() if path.name != onnx)
    shared = [packaged / config_pbtxt.LABELS, packaged / "warmup" / config_pbtxt.WARMUP]
    return [*evidence, folder / onnx, *shared, *config_pbtxt.config_files(packaged)]


def write_tar(packaged: Path, version: int, onnx: str, archive: Path) -> str:
    """Write a tar of the model's folder with only that version, selected; return its SHA-256.

    The members are in upload order, so that it can be unpacked where a server runs.
    """

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for path in upload_order(packaged, version, onnx):
                member = tarfile.TarInfo(str(Path(packaged.name, path.relative_to(packaged))))
                content = path.read_bytes()
                if path.suffix == ".pbtxt":  # as in a repository with only this version
                    message = config_pbtxt.read(path)
                    for key in (*config_pbtxt.version_parameters(message), config_pbtxt.PREVIOUS):
                        if not key.endswith(f".{version}"):
                            message.parameters.pop(key, None)
                    message.ClearField("version_policy")  # the selected one is not in the tar
                    config_pbtxt.select(message, version)
                    content = config_pbtxt.to_text(message).encode()
                # Owner, group and time stay 0, the mode 0644, so that the tar is reproducible.
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    return files.write_with(archive, write)
