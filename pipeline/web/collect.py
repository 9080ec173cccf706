"""Corrected pictures, stored as a data set: a folder with a folder of pictures for each class."""

import contextlib
import os
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError
from pipeline.core.files import locked, sha256, write_bytes
from pipeline.web.limits import RefusedError, check_picture

MAX_PICTURES = 10_000
MAX_GIBIBYTES = 1
FULL = f"the folder has {MAX_PICTURES:,} pictures or {MAX_GIBIBYTES} GiB: collect in another one"


def store_picture(folder: Path, label: str, content: bytes) -> dict[str, Any]:
    """Store a picture as `folder/label/SHA256.png` (or jpeg, webp); return what was done.

    A picture that is in another class is moved. Raises RefusedError if the label cannot be the name
    of a folder, and if the folder is full or cannot be written to.
    """
    if Path(label).name != label or label.startswith("."):
        raise RefusedError(400, f"the class {label!r} cannot be the name of a folder")
    target = folder / label / f"{sha256(content)}.{check_picture(content).lower()}"
    try:
        with locked(folder / ".lock"):
            stored = [path for path in folder.glob("*/*") if not path.name.startswith(".")]
            before = next((path for path in stored if path.name == target.name), None)
            size = sum(path.stat().st_size for path in stored) + len(content)
            if not before and (len(stored) >= MAX_PICTURES or size > MAX_GIBIBYTES * 2**30):
                raise RefusedError(507, FULL)
            target.parent.mkdir(exist_ok=True)
            try:
                os.replace(before, target) if before else write_bytes(target, content)
            finally:
                for path in folder.iterdir():  # a class without pictures cannot be imported
                    with contextlib.suppress(OSError):  # it has pictures, or is a file
                        path.rmdir()
    except RefusedError:
        raise
    except (OSError, PipelineError) as error:
        raise RefusedError(
            507, "the picture is not stored: check the folder of --collect"
        ) from error
    moved_from = before.parent.name if before and before != target else None
    return {"label": label, "moved_from": moved_from, "pictures": len(stored) + (not before)}
