"""What a proof that failed leaves behind: its record, and the worst rows to look at and replay."""

# Shape letters: N rows, M labelled images.

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.core.files import write_bytes, write_json
from pipeline.core.paths import Paths
from pipeline.images.read import pictured, png
from pipeline.validation.compare import Held, Verdict

WORST = 10  # rows that are kept


def write_findings(
    paths: Paths,
    record: Mapping[str, Any],
    rows: np.ndarray,
    held: Held,
    verdict: Verdict,
) -> None:
    """Write the record of a failed proof with its worst rows, as pictures and as arrays.

    In a lower precision the rows that changed class come first: errors alone are no fault there.
    """
    write_json(paths.failed / paths.validation.name, record)
    if not held.errors.any():
        return  # the file never ran
    rank = held.errors / held.allowed
    if verdict.precision != "fp32":
        rank[[flip.row for flip in verdict.flips]] = np.inf
    worst = np.argsort(-rank, kind="stable")[:WORST]
    reference = held.reference
    own = reference.outputs.argmax(axis=1)
    labels = np.concatenate([reference.labels, own[len(reference.labels) :]])
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        images=rows[worst],
        labels=labels[worst],
        rows=worst,
        reference=reference.outputs[worst],
        eager=reference.eager[worst],
        outputs=held.outputs[worst],
        allowed=held.allowed[worst],
    )
    write_bytes(paths.worst, buffer.getvalue())
    for place, row in enumerate(worst, 1):
        if (picture := pictured(rows[row])) is not None:
            write_bytes(paths.failed / f"worst-{place:02d}-row-{row}.png", png(picture))


def replay_command(paths: Paths, options: str) -> str:
    """The command that asks the file about the worst rows again."""
    name = paths.worst.relative_to(paths.root) if paths.root in paths.worst.parents else paths.worst
    return f"pipeline validate {options} --replay {name}".replace("  ", " ")
