"""The proof of servers that run anywhere: a golden set replayed, and evidence of what they said."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.client.client import Client
from pipeline.client.query import triton_predictor
from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.evaluate import Predictor
from pipeline.core.files import write_json
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.core.text import Lines
from pipeline.repository import config_pbtxt
from pipeline.repository.release import Release
from pipeline.validation import rounds
from pipeline.validation.agreement import Table, agree, require_agreement
from pipeline.validation.rounds import Round
from pipeline.validation.yardstick import Yardstick, misnamed, stated_classes, yardstick_of

PROTOCOLS = ("http", "grpc")


@dataclass(frozen=True)
class Served:
    """What a URL's server says of itself, and what it answered."""

    url: str
    server: dict[str, Any]  # name, version, extensions
    model: dict[str, Any]  # name, platform, backend, versions that are ready
    version: str  # of the model, that answered; several with commas between
    sha256: str | None  # of its file, as the config states it
    rounds: tuple[Round, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """The server as JSON has it."""
        return {**asdict(self), "rounds": [found.record() for found in self.rounds]}

    def __str__(self) -> str:
        digest = f", sha256 {self.sha256[:12]}" if self.sha256 else ""
        title = (
            f"{self.url}: Triton {self.server['version']} ({self.server['name']}), "
            f"version {self.version}{digest}, backend {self.model['backend'] or 'not said'}"
        )
        return Lines(title, rounds.HEADER, *self.rounds)


@dataclass(frozen=True)
class Evidence:
    """What servers were asked, what they said, and whether that passes."""

    name: str
    timeout: float  # seconds for a call
    measured: dict[str, Any]  # when, and on what
    yardstick: Yardstick | None = None
    servers: tuple[Served, ...] = ()
    table: Table | None = None  # of the test split, where its files and the release are at hand
    problems: tuple[str, ...] = ()  # in words; none means that it passed

    @property
    def passed(self) -> bool:
        return not self.problems

    @property
    def protocols(self) -> tuple[str, ...]:
        """Over which the model was asked."""
        asked = {served.url.partition(":")[0] for served in self.servers}
        return tuple(protocol for protocol in PROTOCOLS if protocol in asked)

    @property
    def notes(self) -> tuple[str, ...]:
        """What does not fail the proof, but limits what it says."""
        said = [note for served in self.servers for note in served.notes]
        if len(self.protocols) == 1:
            (other,) = set(PROTOCOLS) - set(self.protocols)
            said.append(
                f"only {self.protocols[0]} was asked: add {other}://HOST:PORT for the other"
            )
        if len(names := {str(served.server["name"]) for served in self.servers}) > 1:
            said.append(f"these are different servers: {', '.join(sorted(names))}")
        return tuple(dict.fromkeys(said))

    def record(self) -> dict[str, Any]:
        """The evidence as JSON has it."""
        return {
            **self.measured,
            "pipeline": _our_version(),
            "name": self.name,
            "passed": self.passed,
            "problems": self.problems,
            "notes": self.notes,
            "protocols": self.protocols,
            "timeout": self.timeout,
            "seed": rounds.SEED,
            "golden": self.yardstick.record() if self.yardstick else None,
            "servers": [served.record() for served in self.servers],
            "test_split": asdict(self.table) if self.table else None,
        }

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.yardstick}", *self.servers]
        lines += [self.table] if self.table else []
        lines += [f"note: {note}" for note in self.notes]
        return Lines(*lines, "passed" if self.passed else "NOT passed")


def verify(
    paths: Paths,
    urls: Sequence[str],
    golden_file: Path | None = None,
    timeout: float = 60.0,
    file: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Evidence:
    """Put a golden set to running servers in every way, then the test split where it is at hand.

    Needs neither torch nor the training data. Writes the evidence to `file` (default:
    replay.json), also where it did not pass; `require_passed` is the gate. Raises PipelineError
    when a server does not answer: then the evidence says so.
    """
    file = file or paths.replay
    _forget(file)
    found = Evidence(paths.name, timeout, machine())
    try:
        with contextlib.ExitStack() as stack:
            clients = {url: stack.enter_context(Client(url, paths.name, timeout)) for url in urls}
            for grown in _growing(found, paths, clients, golden_file, report):
                found = grown
    except PipelineError as error:
        write_json(file, replace(found, problems=(*found.problems, str(error))).record())
        raise
    write_json(file, found.record())
    return found


def _growing(
    found: Evidence,
    paths: Paths,
    clients: Mapping[str, Client],
    golden_file: Path | None,
    report: Callable[[str], None],
) -> Iterator[Evidence]:
    """The evidence after each thing that was found out."""
    yardstick = yardstick_of(paths, clients, golden_file)
    found = replace(found, yardstick=yardstick)
    yield found
    for url, client in clients.items():
        report(f"asking {url}: one by one, in batches, {rounds.THREADS} at once")
        served = _served(url, client, yardstick)
        problems = (f"{url}: {problem}" for problem in served.problems)
        found = replace(
            found, servers=(*found.servers, served), problems=(*found.problems, *problems)
        )
        yield found
    found = replace(found, problems=(*found.problems, *_apart(found.servers)))
    yield found
    if found.passed and yardstick.release:
        yield _on_test_split(found, paths, yardstick.release, clients)


def require_passed(evidence: Evidence) -> None:
    """Raise CheckFailedError with what is wrong, if anything is."""
    if evidence.problems:
        raise CheckFailedError(
            Lines(
                f"what is served is not the model of this golden set ({evidence.name}):",
                *(f"  {problem}" for problem in evidence.problems[:10]),
                "Serve the release that it belongs to, or give the release's own",
            )
        )


def _forget(file: Path) -> None:
    """Remove the evidence of before: it must not outlive a proof that fails."""
    if file.suffix != ".json" or file.is_dir():
        raise PipelineError(f"evidence is a JSON file, {file} is not called so: name it FILE.json")
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise PipelineError(f"cannot replace {file}: {error.strerror}") from error


def _our_version() -> str:
    try:
        return metadata.version("handwriting-pipeline")
    except metadata.PackageNotFoundError:  # it runs from its sources
        return "unknown"


def _served(url: str, client: Client, yardstick: Yardstick) -> Served:
    """Everything about one server."""
    server, model = client.metadata(), client.metadata(of_model=True)
    config = client.config()
    misfit = yardstick.misfit(config)
    asked = () if misfit else tuple(rounds.ask(client, yardstick.golden))
    ready = [str(version) for version in model.get("versions", ())]
    answered = sorted({version for found in asked for version in found.versions}) or ready
    stated = config_pbtxt.digest(config, answered[-1]) if answered else None
    problems = [*misfit, *yardstick.identity(answered, stated)]
    problems += [f"{found.mode}: {problem}" for found in asked for problem in found.problems]
    if not misfit:
        problems += _names(client, yardstick)
    notes = [] if stated else [f"{url} states no digest: its answers alone speak for it"]
    if config.max_batch_size > rounds.LARGEST:
        notes.append(
            f"{url} takes {config.max_batch_size} images at once: batches of more than "
            f"{rounds.LARGEST} were not tried"
        )
    return Served(
        url=url,
        server={key: server.get(key) for key in ("name", "version", "extensions")},
        model={
            "name": model.get("name"),
            "platform": model.get("platform"),
            "backend": config.backend,
            "versions": ready,
        },
        version=", ".join(answered),
        sha256=stated,
        rounds=asked,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _names(client: Client, yardstick: Yardstick) -> list[str]:
    """What is wrong with the names that the server has for the classes."""
    config = client.config()
    told = {"its config": stated_classes(config)}
    if config.output[0].label_filename:
        told["its label file"] = client.labels(yardstick.golden.images[0])
    wanted = yardstick.classes or told["its config"]
    found = ((where, misnamed(names, wanted)) for where, names in told.items())
    return [f"{where} {problem}" for where, problem in found if problem]


def _apart(servers: Sequence[Served]) -> list[str]:
    """What is wrong between the servers."""
    versions = {served.url: served.version for served in servers}
    if len(set(versions.values())) == 1:
        return []
    listed = ", ".join(f"{url} with {version}" for url, version in versions.items())
    return [f"the servers answer with different versions: {listed}"]


def _on_test_split(
    found: Evidence, paths: Paths, release: Release, clients: Mapping[str, Client]
) -> Evidence:
    """The evidence with a table of the release's test split, if its files lie in the cache."""
    from pipeline.data.splits import scored_split

    training = release.manifest.get("training")
    folder = paths.data(training["dataset"]) if training else None
    if training is None or folder is None or not folder.is_dir():
        return found
    split = scored_split(training, release.manifest["data_sha256"], folder)
    from pipeline.export.runtime import onnx_predictor  # a golden set is replayed without it

    predictors: dict[str, Predictor] = {"ONNX Runtime": onnx_predictor(release.onnx)}
    predictors |= {url: triton_predictor(client) for url, client in clients.items()}
    rows = agree(predictors, split.images, split.labels)
    table = Table(paths.name, release.version, release.sha256, len(split.labels), "test", rows)
    try:
        # The first row is the same file: on other hardware it may round otherwise, but a class
        # that differs is never called passed.
        require_agreement(table, replace(release.limits, differing=0))
    except CheckFailedError as error:
        return replace(found, table=table, problems=(*found.problems, str(error)))
    return replace(found, table=table)
