"""Where the reference profile lies that predictions are held against."""

from pathlib import Path

from pipeline import triton
from pipeline.errors import PipelineError
from pipeline.files import check_manifest
from pipeline.paths import Paths
from pipeline.reference_profile import REMAKE, ReferenceProfile, unpacked


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
    config = paths.packaged / triton.CONFIG
    if not config.exists():
        folder = paths.export
        if version or not paths.manifest.exists():
            raise PipelineError(
                f"no {paths.packaged} here: package the model, or name the profile that travels "
                "in its version's folder with --reference"
            )
    else:
        number = version or _selected(triton.read(config), paths.packaged)
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


def _selected(config: triton.ModelConfig, packaged: Path) -> int:
    """The version that Triton loads."""
    there = [int(entry.name) for entry in packaged.glob("[1-9]*") if entry.name.isdigit()]
    versions = triton.selected(config) or there
    if not versions:
        raise PipelineError(f"no version at {packaged}: run 'pipeline package' first")
    return max(versions)
