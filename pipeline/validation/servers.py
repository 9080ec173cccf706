"""Validation of running servers, local or remote: a golden set is replayed, evidence is written.

A server is compared with a yardstick: a golden set, and the known facts about its model.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.client.client import Client
from pipeline.client.query import triton_predictor
from pipeline.core.errors import CheckFailedError, CorruptError, PipelineError
from pipeline.core.evaluate import Predictor
from pipeline.core.files import remove, sha256, write_json
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.core.text import Lines, columns
from pipeline.repository import config_pbtxt
from pipeline.repository.golden import Golden, unpack_golden
from pipeline.repository.release import Release, load_release
from pipeline.serving.ready import ask_version
from pipeline.validation import rounds
from pipeline.validation.agreement import Table, agree, require_agreement
from pipeline.validation.rounds import Round

PROTOCOLS = ("http", "grpc")


@dataclass(frozen=True)
class Served:
    """The server at one URL: its metadata, and the results of its rounds."""

    url: str
    server: dict[str, Any]  # name, version, extensions
    model: dict[str, Any]  # name, platform, backend, versions that are ready
    version: str  # of the model, that answered; several are joined by commas
    sha256: str | None  # of the model's file, as the config states it
    rounds: tuple[Round, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Return the server as JSON-ready values."""
        asked = [{**asdict(found), "passed": found.passed} for found in self.rounds]
        return {**asdict(self), "rounds": asked}

    def __str__(self) -> str:
        digest = f", sha256 {self.sha256[:12]}" if self.sha256 else ""
        title = (
            f"{self.url}: Triton {self.server['version']} ({self.server['name']}), "
            f"version {self.version}{digest}, backend {self.model['backend'] or 'not said'}"
        )
        return Lines(title, columns(rounds.HEADER, [found.cells for found in self.rounds]))


@dataclass(frozen=True)
class Yardstick:
    """A golden set, with its manifest's facts about the model; None where unknown."""

    file: Path
    golden: Golden
    golden_sha256: str
    sha256: str | None  # of the model's file
    version: int | None  # that must answer
    classes: tuple[str, ...]  # empty: unknown
    release: Release | None

    def record(self) -> dict[str, Any]:
        """Return the yardstick as JSON-ready values."""
        return {
            "file": str(self.file),
            "sha256": self.golden_sha256,
            "images": len(self.golden.images),
            "model_sha256": self.sha256,
            "version": self.version,
        }

    def __str__(self) -> str:
        of_model = f" of the model with sha256 {self.sha256[:12]}" if self.sha256 else ""
        return f"{len(self.golden.images):,} golden images{of_model}"

    def misfit(self, config: config_pbtxt.ModelConfig) -> list[str]:
        """List why this golden set does not fit a server with `config`; empty if it fits."""
        if len(config.input) != 1 or not config.output:
            return [f"takes {len(config.input)} tensors and gives {len(config.output)}"]
        golden, taken, given = self.golden, config.input[0], config.output[0]
        problems = []
        pairs = (("takes", taken, golden.images), ("gives", given, golden.outputs))
        for what, tensor, array in pairs:
            dims = list(tensor.dims)[0 if config.max_batch_size else 1 :]
            wanted = list(array.shape[1:])
            fits = all(dim in (-1, size) for dim, size in zip(dims, wanted, strict=False))
            if len(dims) != len(wanted) or not fits:
                problems.append(f"{what} {tensor.name} {dims}, the golden set has {wanted}")
        dtype = config_pbtxt.type_name(taken)
        if dtype != str(golden.images.dtype):
            problems.append(f"takes {dtype}, the golden set has {golden.images.dtype}")
        return problems

    def identity(self, versions: Sequence[str], stated: str | None) -> list[str]:
        """List the problems with the versions that answered, and with the digest in the config."""
        problems = []
        if len(versions) > 1:
            problems.append(f"versions {' and '.join(versions)} answered in turn")
        if self.version is not None and str(self.version) not in versions:
            problems.append(
                f"serves version {', '.join(versions)}, the repository selects {self.version}"
            )
        if self.sha256 and stated and stated != self.sha256:
            problems.append(
                f"serves version {versions[-1]} with digest {stated[:12]}, the golden set at "
                f"{self.file} is of {self.sha256[:12]}"
            )
        return problems


def yardstick_of(paths: Paths, clients: Mapping[str, Client], file: Path | None) -> Yardstick:
    """Return the golden set in `file`, or else that of a packaged version.

    That is the version which the repository's config selects or, if it selects none, the one that
    the first client's server serves. Raises PipelineError when a file cannot be read, and
    CorruptError when it does not match its digest.
    """
    if file:
        return _of_file(file)
    config = paths.packaged / "config.pbtxt"
    version = config_pbtxt.selected_version(config_pbtxt.read(config)) if config.is_file() else None
    version = version or ask_version(next(iter(clients.values())))
    release = load_release(paths, version)
    return Yardstick(
        file=release.folder / paths.golden.name,
        golden=release.golden,
        golden_sha256=release.manifest["files"][paths.golden.name],
        sha256=release.sha256,
        version=version,
        classes=tuple(release.manifest["classes"]),
        release=release,
    )


def _of_file(file: Path) -> Yardstick:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise PipelineError(f"no golden set at {file}: {error.strerror}") from error
    digest, manifest = sha256(content), {}
    with contextlib.suppress(OSError, ValueError):  # the folder may have no manifest of ours
        manifest = json.loads((file.parent / "manifest.json").read_bytes())
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        manifest = {"files": {}}
    files = manifest["files"]
    if files.get(file.name, digest) != digest:
        raise CorruptError(
            f"{file} does not match its digest in the manifest next to it. Copy the version's "
            "folder again, or the golden set alone"
        )
    is_its_own = file.name in files
    # golden.npz belongs to model.onnx, golden.int8.npz to model.int8.onnx.
    model = file.with_suffix(".onnx").name.replace("golden", "model", 1)
    return Yardstick(
        file=file,
        golden=unpack_golden(content, str(file)),
        golden_sha256=digest,
        sha256=files.get(model) if is_its_own else None,
        version=None,
        classes=tuple(manifest.get("classes", ())) if is_its_own else (),
        release=None,
    )


def stated_classes(config: config_pbtxt.ModelConfig) -> tuple[str, ...]:
    """Return the class names in a config, or () when it has none that can be read."""
    try:
        return tuple(map(str, json.loads(config_pbtxt.parameter(config, "classes") or "[]")))
    except (ValueError, TypeError):
        return ()


def misnamed(names: Sequence[str], wanted: Sequence[str]) -> str:
    """Describe what is wrong with a server's class names; empty if they match or are unknown."""
    if not names or not wanted or list(names) == list(wanted):
        return ""
    if len(names) != len(wanted):
        return f"has {len(names)} classes instead of {len(wanted)}"
    first = next(i for i in range(len(names)) if names[i] != wanted[i])
    return f"calls class {first} {names[first]!r} instead of {wanted[first]!r}"


@dataclass
class ServerEvidence:
    """Evidence of a server validation: questions, answers and problems; grows as servers answer."""

    name: str
    timeout: float  # seconds for a call
    measured: dict[str, Any]  # when, and on what
    yardstick: Yardstick | None = None
    servers: list[Served] = field(default_factory=list)
    table: Table | None = None  # of the test split, if its files and the release are available
    problems: list[str] = field(default_factory=list)  # in words; none means that it passed

    @property
    def passed(self) -> bool:
        return not self.problems

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols over which the model was asked."""
        asked = {served.url.partition(":")[0] for served in self.servers}
        return tuple(protocol for protocol in PROTOCOLS if protocol in asked)

    @property
    def notes(self) -> tuple[str, ...]:
        """Limits of the evidence that are no failures."""
        said = [note for served in self.servers for note in served.notes]
        if len(self.protocols) == 1:
            (other,) = set(PROTOCOLS) - set(self.protocols)
            added = f"add {other}://HOST:PORT for the other"
            said.append(f"only {self.protocols[0]} was asked: {added}")
        if len(names := {str(served.server["name"]) for served in self.servers}) > 1:
            said.append(f"these are different servers: {', '.join(sorted(names))}")
        return tuple(dict.fromkeys(said))

    def record(self) -> dict[str, Any]:
        """Return the evidence as JSON-ready values."""
        version = "unknown"
        with contextlib.suppress(metadata.PackageNotFoundError):  # it runs from its sources
            version = metadata.version("handwriting-pipeline")
        return {
            **self.measured,
            "pipeline": version,
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


def validate_servers(
    paths: Paths,
    urls: Sequence[str],
    golden_file: Path | None = None,
    timeout: float = 60.0,
    file: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> ServerEvidence:
    """Ask running servers a golden set in every mode, then the test split if it is available.

    Needs neither torch nor the training data. Writes the evidence to `file` (default: replay.json),
    even if it did not pass; call `require_passed` to check it. `timeout` is in seconds for a call.
    Raises PipelineError when a server does not answer: then the evidence has the error.
    """
    file = file or paths.replay
    if file.suffix != ".json" or file.is_dir():
        raise PipelineError(f"evidence is a JSON file, {file} is not called so: name it FILE.json")
    remove(file)  # earlier evidence must not outlive a failed validation
    evidence = ServerEvidence(paths.name, timeout, machine())
    try:
        with contextlib.ExitStack() as stack:
            clients = {url: stack.enter_context(Client(url, paths.name, timeout)) for url in urls}
            yardstick = evidence.yardstick = yardstick_of(paths, clients, golden_file)
            for url, client in clients.items():
                report(f"asking {url}: one by one, in batches, {rounds.THREADS} at once")
                served = _served(url, client, yardstick)
                evidence.servers.append(served)
                evidence.problems += [f"{url}: {problem}" for problem in served.problems]
            versions = {served.url: served.version for served in evidence.servers}
            if len(set(versions.values())) > 1:
                listed = ", ".join(f"{url} with {version}" for url, version in versions.items())
                problem = f"the servers answer with different versions: {listed}"
                evidence.problems.append(problem)
            if evidence.passed and yardstick.release:
                _ask_test_split(evidence, paths, yardstick.release, clients)
    except PipelineError as error:
        evidence.problems.append(str(error))
        write_json(file, evidence.record())
        raise
    write_json(file, evidence.record())
    return evidence


def require_passed(evidence: ServerEvidence) -> None:
    """Raise CheckFailedError with the problems unless the evidence passed."""
    if evidence.problems:
        raise CheckFailedError(
            Lines(
                f"what is served is not the model of this golden set ({evidence.name}):",
                *(f"  {problem}" for problem in evidence.problems[:10]),
                "Serve the release that it belongs to, or give the release's own",
            )
        )


def _served(url: str, client: Client, yardstick: Yardstick) -> Served:
    """Ask one server its metadata and the golden set, and collect its problems."""
    server, model = client.metadata(), client.metadata(of_model=True)
    config = client.config()
    misfit = yardstick.misfit(config)
    asked = () if misfit else tuple(rounds.ask_golden(client, yardstick.golden))
    ready = [str(version) for version in model.get("versions", ())]
    answered = sorted({version for found in asked for version in found.versions}) or ready
    stated = config_pbtxt.digest(config, answered[-1]) if answered else None
    problems = [*misfit, *yardstick.identity(answered, stated)]
    problems += [f"{found.mode}: {problem}" for found in asked for problem in found.problems]
    if not misfit:
        told = {"its config": stated_classes(config)}
        if config.output[0].label_filename:
            told["its label file"] = client.labels(yardstick.golden.images[0])
        wanted = yardstick.classes or told["its config"]
        wrong = {where: misnamed(names, wanted) for where, names in told.items()}
        problems += [f"{where} {problem}" for where, problem in wrong.items() if problem]
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


def _ask_test_split(
    evidence: ServerEvidence, paths: Paths, release: Release, clients: Mapping[str, Client]
) -> None:
    """Add a table of the release's test split, if its files are in the data folder."""
    from pipeline.data.splits import scored_split

    training = release.manifest.get("training")
    folder = paths.data(training["dataset"]) if training else None
    if training is None or folder is None or not folder.is_dir():
        return
    split = scored_split(training, release.manifest["data_sha256"], folder)
    from pipeline.export.runtime import onnx_predictor  # not needed to replay a golden set

    predictors: dict[str, Predictor] = {"ONNX Runtime": onnx_predictor(release.onnx)}
    predictors |= {url: triton_predictor(client) for url, client in clients.items()}
    rows = agree(predictors, split.images, split.labels)
    count = len(split.labels)
    evidence.table = Table(paths.name, release.version, release.sha256, count, "test", rows)
    try:
        # The first row runs the same file: other hardware may round differently, but a mismatch
        # of classes never passes.
        require_agreement(evidence.table, replace(release.limits, differing=0))
    except CheckFailedError as error:
        evidence.problems.append(str(error))
