"""A packaged version as a tar, the same bytes whoever packs it; and the order to upload it in."""

import io
import tarfile
from pathlib import Path

from pipeline.core.files import write_with
from pipeline.repository import config_pbtxt


def upload_order(packaged: Path, version: int, onnx: str) -> list[Path]:
    """The files of a model with one version, each behind all that it speaks of.

    For a store that has no atomic rename: the model is the last of its version, config.pbtxt,
    which selects the version, the last of all.
    """
    folder = packaged / str(version)
    proof = sorted(path for path in folder.iterdir() if path.name != onnx)
    beside = [packaged / config_pbtxt.LABELS, packaged / "warmup" / config_pbtxt.WARMUP]
    return [*proof, folder / onnx, *beside, *config_pbtxt.config_files(packaged)]


def write_tar(packaged: Path, version: int, onnx: str, archive: Path) -> str:
    """Write the model's folder with that version alone, and selected; the SHA-256 of the tar.

    Its members are in upload order, so that it can be unpacked where a server runs.
    """

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for path in upload_order(packaged, version, onnx):
                member = tarfile.TarInfo(str(Path(packaged.name, path.relative_to(packaged))))
                is_config = path.suffix == ".pbtxt"
                content = _alone(path, version) if is_config else path.read_bytes()
                member.size = len(content)  # owner, group and time stay 0, the mode 0644
                tar.addfile(member, io.BytesIO(content))

    return write_with(archive, write)


def _alone(path: Path, version: int) -> bytes:
    """The config as it is in a repository that has just this version."""
    message = config_pbtxt.read(path)
    others = {key for key in config_pbtxt.statements(message) if not key.endswith(f".{version}")}
    for key in others | {config_pbtxt.PREVIOUS}:
        message.parameters.pop(key, None)
    message.ClearField("version_policy")  # what it was before is not in the tar
    config_pbtxt.select(message, version)
    return config_pbtxt.to_text(message).encode()
