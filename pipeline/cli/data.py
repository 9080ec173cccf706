"""The commands that fetch and check the images."""

import shlex
from pathlib import Path

import click
from click.core import ParameterSource

from pipeline.cli.command import Group, Settings, paths_of
from pipeline.cli.options import dataset_option, folder_type, path_type
from pipeline.core.paths import FOLDER, MODEL_NAMES, model_name
from pipeline.core.text import Lines
from pipeline.data.catalog import DEFAULT_DATASET

SHOWN = 20  # labels of a sample


@click.group(cls=Group, name="data")
def data_group() -> None:
    """Fetch, check and sample the data sets.

    \b
    Example:
      pipeline data fetch
    """


@data_group.command("fetch")
@dataset_option
@click.option(
    "--from",
    "source",
    envvar="HANDWRITING_DATA_DIR",
    type=path_type,
    help="Folder with the data set's files, compressed or not.",
)
@click.option(
    "--skip-unreadable",
    is_flag=True,
    help="folder:PATH: list pictures that cannot be read or show nothing, and import the others.",
)
@click.pass_obj
def fetch_data_command(
    settings: Settings, dataset: str, source: Path | None, skip_unreadable: bool
) -> None:
    """Fetch a data set into the cache, from the first source that has it.

    \b
    Example:
      pipeline data fetch
      pipeline data fetch --from ~/mnist
      pipeline data fetch --dataset folder:letters
    """
    from pipeline.data.fetch import fetch_data

    cache = paths_of(settings).data(dataset)
    source_of = click.get_current_context().get_parameter_source
    is_folder = dataset.startswith(FOLDER)
    if is_folder and source_of("source") == ParameterSource.COMMANDLINE:
        raise click.UsageError("--from is not for folder:PATH: leave it out")
    if FOLDER not in dataset and source_of("skip_unreadable") == ParameterSource.COMMANDLINE:
        raise click.UsageError("--skip-unreadable is only for folder:PATH: leave it out")
    if is_folder:
        source = None  # the environment's is for other data sets
    folder = fetch_data(dataset, cache, source, settings.say, settings.update, skip_unreadable)
    record = {"dataset": dataset, "folder": str(folder)}
    settings.result(record, f"{dataset} is in {folder}", f"pipeline train{_option(dataset)}")


def _option(dataset: str) -> str:
    return "" if dataset == DEFAULT_DATASET else f" --dataset {shlex.quote(dataset)}"


@data_group.command("verify")
@dataset_option
@click.pass_obj
def verify_command(settings: Settings, dataset: str) -> None:
    """Check every file in the cache against its SHA-256.

    \b
    Example:
      pipeline data verify
    """
    from pipeline.data.splits import verify

    digests = verify(dataset, paths_of(settings).data(dataset))
    text = Lines(*(f"{digest}  {file}" for file, digest in digests.items()))
    record = {"dataset": dataset, "files": digests}
    settings.result(record, text, f"pipeline train{_option(dataset)}")


@data_group.command("path")
@dataset_option
@click.pass_obj
def path_command(settings: Settings, dataset: str) -> None:
    """Print the folder of a data set's cache.

    \b
    Example:
      pipeline data path
    """
    folder = paths_of(settings).data(dataset).resolve()
    settings.result({"dataset": dataset, "folder": str(folder)}, folder)


@data_group.command("sample")
@dataset_option
@click.argument("folder", type=folder_type)
@click.option("--count", default=10, type=click.IntRange(1, 10_000), help="Number of images.")
@click.pass_obj
def sample_command(settings: Settings, dataset: str, folder: Path, count: int) -> None:
    """Write some test images to FOLDER as PNG files, to try queries with.

    \b
    Example:
      pipeline data sample digits
    """
    from pipeline.data.splits import load_split
    from pipeline.images.read import write_png
    from pipeline.repository.running import find_running

    split = load_split(dataset, paths_of(settings).data(dataset), "test")
    files = [folder / f"{index:05d}.png" for index in range(min(count, len(split)))]
    for file, image in zip(files, split.images, strict=False):
        write_png(image, file)
    labels = [split.classes[label] for label in split.labels[: len(files)]]
    listed = ", ".join(labels[:SHOWN]) + (", ..." if len(labels) > SHOWN else "")
    text = f"wrote {len(files)} images to {folder}, which show {listed}"
    record = {"files": [str(file) for file in files], "labels": labels}
    name = "" if dataset in MODEL_NAMES else f" --name {model_name(dataset)}"
    serve = "" if find_running(paths_of(settings)) else "pipeline serve --detach && "
    settings.result(record, text, f"{serve}pipeline query{name} {shlex.quote(str(folder))}")
