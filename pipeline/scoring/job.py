"""Offline classification of millions of images on Ray Data, from a source to Parquet, resumable."""

import os
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError
from pipeline.core.files import locked, remove
from pipeline.core.machine import cores
from pipeline.core.paths import Paths
from pipeline.core.text import Lines
from pipeline.scoring import worker
from pipeline.scoring.cluster import connect
from pipeline.scoring.parquet import Columns, Shard
from pipeline.scoring.settings import ScoreConfig
from pipeline.scoring.source import Cut, cut


@dataclass(frozen=True)
class Scored:
    """Result of a job."""

    output: str
    images: int
    scored: int
    rejected: int  # without a result; _rejected/ has the reasons
    unsure: int  # of those scored
    repeated: int  # ids that more than one scored image has
    resumed: int  # done by an earlier run of the job
    workers: int  # 0: all results existed already
    start_seconds: float  # start of Ray and of the workers' sessions
    seconds: float  # from the start of the first shard to the end of the last one
    images_per_second: float | None
    name: str
    version: str
    digest: str  # SHA-256 of the model's file

    def __str__(self) -> str:
        unsure = f", {self.unsure:,} of them not sure" if self.unsure else ""
        repeated = f", {self.repeated:,} repeated ids" if self.repeated else ""
        resumed = f"; {self.resumed:,} were there already" if self.resumed else ""
        speed = f", {self.images_per_second:,.0f} images/s" if self.images_per_second else ""
        return Lines(
            f"{self.name} version {self.version} (sha256 {self.digest[:12]}) scored "
            f"{self.scored:,} of {self.images:,} images{unsure}{repeated}{resumed}{speed}",
            f"wrote {self.output}",
        )


@dataclass(frozen=True)
class JobProgress:
    """Progress of a job."""

    done: int
    images: int
    per_second: float

    def __str__(self) -> str:
        left = f", {(self.images - self.done) / self.per_second:,.0f} s left"
        return f"{self.done:,} of {self.images:,} images, {self.per_second:,.0f}/s{left}"


Report = Callable[[JobProgress], object]


def score_source(
    paths: Paths,
    source: Path,
    output: Path,
    config: ScoreConfig,
    columns: Columns,
    report: Report = lambda progress: None,
) -> Scored:
    """Classify every image of a source into the folder `output`, or resume an interrupted job.

    Raises PipelineError for an invalid source, for a folder that holds another job, and while
    another process writes into it.
    """
    model = worker.read_selected_model(paths)
    folder = worker.Folder(Path(os.path.abspath(output)))
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise PipelineError(f"{output} lies in {source}: choose an --output outside it")
    is_new = not folder.path.exists()
    with locked(folder.lock, f"another job is writing {output}: wait for it, or choose another"):
        try:
            path, size = Path(os.path.abspath(source)), config.rows
            whole = cut(path, model.shape, model.pictures, size, folder.unpacked, columns)
            worker.begin_job(folder, _describe_job(whole, model, config))
        except PipelineError:
            if is_new:
                remove(folder.path)
            raise
        missing, before = _survey(folder, whole)
        run = _run(whole, missing, model, folder, config, report) if missing else _Run()
        remove(folder.unpacked)
        missing, counts = _survey(folder, whole)
        if missing:
            file = folder.part(missing[0].index)
            raise PipelineError(f"{file} is incomplete: run the same command again")
        parts = [shard.index for shard in whole.shards]
        repeated = worker.count_repeated_ids(folder, parts, counts.scored)
    seconds = run.last - run.first
    rate = round((counts.images - before.images) / seconds, 1) if seconds else None
    return Scored(
        **asdict(counts),
        output=str(output),
        images=counts.images,
        repeated=repeated,
        resumed=before.images,
        workers=run.workers,
        start_seconds=round(run.first - run.begun, 3),
        seconds=round(seconds, 3),
        images_per_second=rate,
        name=model.name,
        version=model.version,
        digest=model.digest,
    )


def _describe_job(whole: Cut, model: worker.ScoringModel, config: ScoreConfig) -> dict[str, Any]:
    """Return the values that must be unchanged when a job is resumed."""
    chosen = whole.columns or Columns()
    return {
        "source": whole.path,
        "source_digest": whole.digest,
        "images": whole.rows,
        "image_column": chosen.image,
        "id_column": chosen.id,
        "model": model.name,
        "version": model.version,
        "digest": model.digest,
        "min_probability": model.min_probability,
        "top": config.top,
        "rows": config.rows,
    }


@dataclass
class _Run:
    """Measurements of a run of the workers; times in seconds since 1970."""

    workers: int = 0
    begun: float = 0.0
    first: float = 0.0  # start of the first shard
    last: float = 0.0  # end of the last one


def _survey(folder: worker.Folder, whole: Cut) -> tuple[list[Shard], worker.Counts]:
    """Return the shards with missing or incomplete files, and the image counts of the others."""
    missing, counts = [], worker.Counts()
    for shard in whole.shards:
        if of_shard := worker.read_counts(folder, shard.index, shard.rows):
            counts += of_shard
        else:
            missing.append(shard)
    return missing, counts


def _run(
    whole: Cut,
    missing: list[Shard],
    model: worker.ScoringModel,
    folder: worker.Folder,
    config: ScoreConfig,
    report: Report,
) -> _Run:
    """Score the missing shards, with one worker for each core or GPU by default.

    On CPUs Ray Data fuses reading and scoring, so a worker reads the images that it scores. For
    GPUs, tasks on the CPUs read, and the images wait in the bounded object store. Raises
    PipelineError when Ray fails.
    """
    begun = time.time()
    with connect(config.address, config.workers or cores()):
        import ray  # only after `connect` has set the variables that it reads
        from ray import data as ray_data
        from ray.exceptions import RayError, UserCodeException

        kind = "CPU" if config.provider == "cpu" else "GPU"
        available = int(ray.cluster_resources().get(kind, 0))  # type: ignore[no-untyped-call]
        if not available:
            fix = "use --provider cpu" if kind == "GPU" else "start a worker node"
            raise PipelineError(f"the Ray cluster has no {kind}: {fix}")
        run = _Run(min(config.workers or available, available, len(missing)), begun)
        ray_data.DataContext.get_current().enable_progress_bars = False
        items = [{"shard": pickle.dumps(shard)} for shard in missing]
        shards = ray_data.from_items(items, override_num_blocks=len(items))
        reader = worker.Reader(replace(whole, shards=()))
        rows = shards.map_batches(reader, batch_size=1, num_cpus=1)
        where: dict[str, Any] = {f"num_{kind.lower()}s": 1}
        written = rows.map_batches(
            worker.Scorer,
            fn_constructor_args=(model, folder, config),
            batch_size=None,  # a shard
            compute=ray_data.ActorPoolStrategy(size=run.workers),
            **where,
        )
        left, done = sum(shard.rows for shard in missing), 0
        try:
            for row in written.iter_rows():
                if row["failed"]:
                    raise pickle.loads(row["failed"])
                run.first = min(run.first or row["begun"], row["begun"])
                run.last = max(run.last, row["ended"])
                done += row["images"]
                rate = done / (run.last - run.first)
                report(JobProgress(whole.rows - left + done, whole.rows, rate))
        except UserCodeException:  # a bug in this code
            raise
        except RayError as error:
            kind, last_line = type(error).__name__, str(error).strip().rpartition("\n")[2]
            message = f"Ray failed ({kind}: {last_line}): run the same command again to continue"
            raise PipelineError(message) from error
    return run
