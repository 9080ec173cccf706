"""Fetch ONNX Runtime's files for browsers from npm, for `pipeline web --static`.

python -m tools.fetch_runtime
"""

import io
import tarfile
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.files import check_digest, write_bytes
from pipeline.core.paths import Paths
from pipeline.data.fetch import npm_pack
from pipeline.web.publish import RUNTIME, RUNTIME_FILES, runtime_folder
from tools.edge import run_tool

LARGEST = 2**26  # bytes of the package


def fetch_runtime(paths: Paths) -> Path:
    """Fetch the files that are not there, check the digests of all, and return their folder."""
    folder = runtime_folder(paths)
    if not all((folder / name).exists() for name in RUNTIME_FILES):
        try:
            package = io.BytesIO(npm_pack(RUNTIME, LARGEST))
            with tarfile.open(fileobj=package, mode="r:gz") as archive:
                for name in RUNTIME_FILES:
                    member = archive.extractfile(f"package/dist/{name}")
                    write_bytes(folder / name, member.read() if member else b"")
        except (OSError, KeyError, tarfile.TarError) as error:
            raise PipelineError(f"cannot get {RUNTIME} from npm: {error}") from error
    for name, digest in RUNTIME_FILES.items():
        check_digest(folder / name, digest, f"remove {folder} and fetch again")
    return folder


def main(arguments: list[str]) -> None:
    """Fetch into the current project."""
    print(f"{RUNTIME} is in {fetch_runtime(Paths())}")


if __name__ == "__main__":
    run_tool(main)
