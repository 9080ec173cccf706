"""What a served model answers to the whole test split, and the memory that it takes for it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.benchmark.beside import NOOP, Beside, profiled
from pipeline.benchmark.timing import Score
from pipeline.benchmark.workers import EAGER, Runtime, scored, scored_images, worker
from pipeline.client.client import Client
from pipeline.client.query import triton_predictor
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Paths
from pipeline.core.usage import peak_bytes
from pipeline.repository.release import Release
from pipeline.serving.serve import Server, processes_of


@dataclass(frozen=True)
class Scored:
    """Scores by a model's name and the protocol; without the memory that only grows later."""

    scores: dict[tuple[str, str], Score]

    def sized(self, server: Server) -> dict[tuple[str, str], Score]:
        """The scores with the most memory that each model's processes have had."""
        return {
            (name, way): replace(score, peak_bytes=served_bytes(server, name))
            for (name, way), score in self.scores.items()
        }


def score_served(
    paths: Paths,
    server: Server,
    release: Release,
    beside: Beside,
    reference: np.ndarray | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Scored:
    """Put the whole test split to the served model both ways, and under its profile over HTTP.

    Held against what eager PyTorch says, or against `reference` where it has said it already.
    Where the export or its data are not here any more, says so and scores nothing.
    """
    exported = replace(paths, name=str(release.manifest["name"]))
    try:
        images, labels = scored_images(exported, release.manifest)
        if reference is None:
            eager = Runtime(EAGER, "fp32", 1)
            report(f"{eager}: the test split")
            with worker(exported, eager, release.manifest) as ask:
                reference = ask("score")[1]
    except PipelineError as error:
        report(f"accuracy is left out: {error}")
        return Scored({})
    found = {}
    for way, url in (("grpc", server.grpc_url), ("http", server.http_url)):
        for name in beside.configs:
            if name == NOOP or (name, way) == (profiled(paths.name), "grpc"):
                continue  # it has no answers, or no row
            report(f"{name} over {way}: the test split")
            with Client(url, name) as client:
                accuracy, said = scored(triton_predictor(client), images, labels)
            found[name, way] = Score(len(said), accuracy, int((said != reference).sum()))
    return Scored(found)


def served_bytes(server: Server, name: str) -> int:
    """The most memory that tritonserver and a model's stubs have had, what they share in each."""
    return sum(
        peak_bytes(pid)
        for pid in processes_of(server.id)
        if pid == server.pid or f"/{name}/" in _command(pid)
    )


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:  # it ended while we looked
        return ""
