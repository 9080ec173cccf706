"""The command that classifies many images offline."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pipeline.cli.command import Command, Settings, name_option, paths_of, settings_options
from pipeline.core.errors import PipelineError
from pipeline.scoring.settings import ScoreConfig


def reading(output: Path) -> str:
    """Return the shell command that shows the first answers."""
    code = f"import pyarrow.parquet as p; print(p.read_table({str(output)!r}).slice(0, 9))"
    return f"python -c {shlex.quote(code)}"


@click.command(cls=Command)
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder for the answers; one that holds a part of them is completed.",
)
@name_option
@settings_options(ScoreConfig)
@click.option("--image-column", help="Of Parquet.  [default: the one that can hold images]")
@click.option("--id-column", help="Of Parquet.  [default: id, else rows are numbered]")
@click.pass_obj
def score_command(
    settings: Settings,
    /,
    source: Path,
    output: Path,
    name: str | None,
    image_column: str | None,
    id_column: str | None,
    **changes: Any,
) -> None:
    """Classify a million images offline, with the packaged model's selected version.

    SOURCE is Parquet (a file or a folder; a column of the bytes of pictures, or of lists of
    pixels), IDX (also .gz), .npy of uint8, or a folder of pictures. The answers are Parquet, a row
    for each image: id, label, probability, top, sure, version, digest. An image that cannot be
    read does not stop the job: _rejected/ has its id and the reason, and the exit code is 1.

    After a kill the same command goes on where it stopped. --json prints one summary, since the
    answers are in the Parquet. On a cluster, every node must have this package and see SOURCE
    and the output under the same path.

    \b
    Example:
      pipeline score images.parquet --output scored
      pipeline score pictures/ --output scored --top 1 --json
    """
    config = ScoreConfig(**changes)
    try:
        from pipeline.scoring.cluster import load
        from pipeline.scoring.job import score_source
        from pipeline.scoring.parquet import Columns

        load(config.address)
    except ModuleNotFoundError as error:
        raise PipelineError(
            f"scoring needs {error.name}: in the project's folder, pip install '.[batch]'"
        ) from error
    columns = Columns(image_column, id_column)
    done = score_source(paths_of(settings, name), source, output, config, columns, settings.update)
    settings.result(asdict(done), done, reading(output))
    if done.rejected:
        raise PipelineError(
            f"{done.rejected:,} of {done.images:,} images could not be read: "
            f"{output}/_rejected says why"
        )
