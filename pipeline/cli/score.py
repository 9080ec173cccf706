"""The command that classifies many images offline."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pipeline.cli.command import Command, Settings, pass_paths
from pipeline.cli.options import folder_type, path_type, settings_options
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Paths
from pipeline.scoring.settings import ScoreConfig


def format_reader_command(output: Path) -> str:
    """Return the shell command that shows the first answers."""
    folder = json.dumps(str(output))  # in ", because the shell takes the code in '
    code = f"import pyarrow.parquet as p; print(p.read_table({folder}).slice(0, 9))"
    return f"python -c {shlex.quote(code)}"


@click.command(cls=Command)
@click.argument("source", type=path_type)
@click.option("--output", required=True, type=folder_type, help="Folder for the answers.")
@settings_options(ScoreConfig)
@click.option("--image-column", help="Parquet: column of images.  [default: the only one]")
@click.option("--id-column", help="Parquet: column of ids.  [default: id, or row numbers]")
@pass_paths
def score_command(
    settings: Settings,
    paths: Paths,
    /,
    source: Path,
    output: Path,
    image_column: str | None,
    id_column: str | None,
    **changes: Any,
) -> None:
    """Classify many images offline, with the selected version of the packaged model.

    SOURCE is Parquet (a file or a folder; a column of picture files as bytes, or of lists of
    pixels), IDX (also .gz), .npy of uint8, or a folder of pictures. The answers are Parquet, a row
    for each image: id, label, probability, top, sure, version and digest (SHA-256) of the model. An
    image that cannot be read does not stop the job: _rejected/ has its id and the reason, and the
    exit code is 1.

    After an interruption, repeat the command to continue. --json prints a summary, not the
    answers. On a Ray cluster, every node needs this package, and SOURCE and the output folder
    under the same paths.

    \b
    Example:
      pipeline score images.parquet --output scored
      pipeline score pictures/ --output scored --top 1 --json
    """
    config = ScoreConfig(**changes)
    from pipeline.scoring.cluster import load
    from pipeline.scoring.job import score_source
    from pipeline.scoring.parquet import Columns

    load(config.address)
    columns = Columns(image_column, id_column)
    scored = score_source(paths, source, output, config, columns, settings.update)
    settings.result(asdict(scored), scored, format_reader_command(output))
    if scored.rejected:
        count, reasons = f"{scored.rejected:,} of {scored.images:,}", f"{output}/_rejected"
        raise PipelineError(f"{count} images could not be read; the reasons are in {reasons}")
