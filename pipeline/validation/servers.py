"""Validation of running servers, local or remote: a golden set is replayed, evidence is written.

A server is compared with the model that is expected: its golden set, and its manifest's facts.
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
from pipeline.core.files import remove, sha256, write_json
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.core.signature import SCORES
from pipeline.core.text import Lines, columns
from pipeline.repository import config_pbtxt
from pipeline.repository.golden import Golden, unpack_golden
from pipeline.repository.release import Release, load_release
from pipeline.serving.ready import ask_version
from pipeline.validation.agreement import Table, measure_agreement, require_agreement
from pipeline.validation.rounds import HEADER, LARGEST, SEED, THREADS, Round, ask_golden

PROTOCOLS = ("http", "grpc")
Clients = Mapping[str, Client]  # by URL


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
        rounds = [{**asdict(each), "passed": each.passed} for each in self.rounds]
        return {**asdict(self), "rounds": rounds}

    def __str__(self) -> str:
        digest = f", sha256 {self.sha256[:12]}" if self.sha256 else ""
        title = (
            f"{self.url}: Triton {self.server['version']} ({self.server['name']}), "
            f"version {self.version}{digest}, backend {self.model['backend'] or 'unknown'}"
        )
        return Lines(title, columns(HEADER, [each.cells for each in self.rounds]))


@dataclass(frozen=True)
class ExpectedModel:
    """The model that servers have to serve: its golden set and its manifest."""

    file: Path
    golden: Golden
    manifest: Mapping[str, Any]  # of the folder of `file`; else only with the digest of `file`
    release: Release | None = None

    @property
    def sha256(self) -> str | None:
        """The digest of the model: of model.int8.onnx for golden.int8.npz; None if unknown."""
        model = self.file.with_suffix(".onnx").name.replace("golden", "model", 1)
        digest: str | None = self.manifest["files"].get(model)
        return digest

    @property
    def version(self) -> int | None:
        """The version that must answer; None if any may."""
        return self.release.version if self.release else None

    def record(self) -> dict[str, Any]:
        """Return the golden set's origin as JSON-ready values."""
        return {
            "file": str(self.file),
            "sha256": self.manifest["files"][self.file.name],
            "images": len(self.golden.images),
            "model_sha256": self.sha256,
            "version": self.version,
        }

    def __str__(self) -> str:
        of_model = f" of the model with sha256 {self.sha256[:12]}" if self.sha256 else ""
        return f"{len(self.golden.images):,} golden images{of_model}"

    def mismatches(self, config: config_pbtxt.ModelConfig) -> list[str]:
        """List the differences between the golden set and a server's config; empty if it fits."""
        if len(config.input) != 1 or not config.output:
            return [f"the model has {len(config.input)} inputs and {len(config.output)} outputs"]
        images, golden, problems = config.input[0], self.golden, []
        pairs = [(images, golden.images), (config.output[0], golden.outputs)]
        if golden.scores is not None:
            scores = [tensor for tensor in config.output if tensor.name == SCORES]
            pairs += [(tensor, golden.scores) for tensor in scores]
            problems += [] if scores else [f"the model has no output {SCORES!r}"]
        for tensor, array in pairs:
            dims = list(tensor.dims)[0 if config.max_batch_size else 1 :]
            sizes = list(array.shape[1:])
            fits = all(dim in (-1, size) for dim, size in zip(dims, sizes, strict=False))
            if len(dims) != len(sizes) or not fits:
                problems.append(f"{tensor.name} has shape {dims}, the golden set has {sizes}")
        dtype, golden_dtype = config_pbtxt.type_name(images), str(golden.images.dtype)
        if dtype != golden_dtype:
            problems.append(f"{images.name} has type {dtype}, the golden set has {golden_dtype}")
        return problems

    def version_problems(self, versions: Sequence[str], digest: str | None) -> list[str]:
        """List the problems with the versions that answered, and with the digest in the config."""
        problems = []
        if len(versions) > 1:
            problems.append(f"several versions answered: {', '.join(versions)}")
        if self.version is not None and str(self.version) not in versions:
            answered = ", ".join(versions)
            problems.append(f"serves version {answered}, the repository selects {self.version}")
        if self.sha256 and digest and digest != self.sha256:
            golden = f"{self.file} is the golden set of {self.sha256[:12]}"
            served = f"version {versions[-1]} with digest {digest[:12]}"
            problems.append(f"serves {served}, but {golden}")
        return problems


def load_expected(paths: Paths, clients: Clients, file: Path | None = None) -> ExpectedModel:
    """Load the golden set in `file`, or else that of a packaged version.

    That is the version which the repository's config selects or, if it selects none, the one that
    the first client's server serves. Raises PipelineError when a file cannot be read, and
    CorruptError when it does not match its digest.
    """
    if file is None:
        config = paths.packaged / "config.pbtxt"
        is_packaged = config.is_file()
        version = config_pbtxt.selected_version(config_pbtxt.read(config)) if is_packaged else None
        version = version or ask_version(next(iter(clients.values())))
        if not (paths.packaged / str(version)).is_dir():
            folder = paths.packaged / str(version)
            raise PipelineError(f"{folder} does not exist: name a golden set with --golden FILE")
        release = load_release(paths, version)
        golden = release.folder / paths.golden.name
        return ExpectedModel(golden, release.golden, release.manifest, release)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise PipelineError(f"cannot read the golden set {file}: {error.strerror}") from error
    digest, manifest = sha256(content), None
    with contextlib.suppress(OSError, ValueError):  # the folder may have no manifest of ours
        manifest = json.loads((file.parent / "manifest.json").read_bytes())
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not manifest or not isinstance(files, dict) or file.name not in files:
        manifest = {"files": {file.name: digest}}
    elif files[file.name] != digest:
        raise CorruptError(
            f"{file} does not match its digest in the manifest next to it. Copy the version's "
            "folder again, or the golden set alone"
        )
    return ExpectedModel(file, unpack_golden(content, str(file)), manifest)


def read_classes(config: config_pbtxt.ModelConfig) -> tuple[str, ...]:
    """Return the class names in a config, or () when it has none that can be read."""
    try:
        return tuple(map(str, json.loads(config_pbtxt.parameter(config, "classes") or "[]")))
    except (ValueError, TypeError):
        return ()


def describe_mismatch(names: Sequence[str], wanted: Sequence[str]) -> str:
    """Describe what is wrong with a server's class names; empty if they match or are unknown."""
    if not names or not wanted or list(names) == list(wanted):
        return ""
    if len(names) != len(wanted):
        return f"has {len(names)} classes instead of {len(wanted)}"
    first = next(i for i in range(len(names)) if names[i] != wanted[i])
    return f"calls class {first} {names[first]!r} instead of {wanted[first]!r}"


@dataclass
class ServerEvidence:
    """Evidence of a server validation: requests, answers and problems; grows as servers answer."""

    name: str
    timeout: float  # seconds for a call
    expected: ExpectedModel | None = None
    servers: list[Served] = field(default_factory=list)
    table: Table | None = None  # of the test split, if its files and the release are available
    problems: list[str] = field(default_factory=list)  # in words; none means that it passed
    measured: dict[str, Any] = field(default_factory=machine)  # when, and on what

    @property
    def passed(self) -> bool:
        return not self.problems

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols over which the model was tested."""
        tested = {served.url.partition(":")[0].removesuffix("s") for served in self.servers}
        return tuple(protocol for protocol in PROTOCOLS if protocol in tested)

    @property
    def notes(self) -> tuple[str, ...]:
        """Limits of the evidence that are no failures."""
        notes = [note for served in self.servers for note in served.notes]
        for missing in set(PROTOCOLS).difference(self.protocols or PROTOCOLS):
            notes.append(f"{missing} was not tested: add {missing}://HOST:PORT")
        if len(names := {str(served.server["name"]) for served in self.servers}) > 1:
            notes.append(f"the URLs lead to different servers: {', '.join(sorted(names))}")
        return tuple(notes)

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
            "seed": SEED,
            "golden": self.expected.record() if self.expected else None,
            "servers": [served.record() for served in self.servers],
            "test_split": asdict(self.table) if self.table else None,
        }

    def __str__(self) -> str:
        tables = [self.table] if self.table else []
        notes = [f"note: {note}" for note in self.notes]
        verdict = "passed" if self.passed else "NOT passed"
        if self.expected and self.expected.golden.scores is not None:
            verdict += ": the scores are equal" if self.passed else ""
        return Lines(f"{self.name}: {self.expected}", *self.servers, *tables, *notes, verdict)


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
        raise PipelineError(f"{file} is not a name for a JSON file: name it FILE.json")
    remove(file)  # earlier evidence must not outlive a failed validation
    evidence = ServerEvidence(paths.name, timeout)
    try:
        with contextlib.ExitStack() as stack:
            clients = {url: stack.enter_context(Client(url, paths.name, timeout)) for url in urls}
            expected = evidence.expected = load_expected(paths, clients, golden_file)
            for url, client in clients.items():
                report(f"testing {url}: single images, batches, {THREADS} concurrent requests")
                evidence.servers.append(_validate_server(url, client, expected))
                evidence.problems += [f"{url}: {text}" for text in evidence.servers[-1].problems]
            if len({served.version for served in evidence.servers}) > 1:
                versions = ", ".join(f"{each.url} {each.version}" for each in evidence.servers)
                evidence.problems.append(f"the servers serve different versions: {versions}")
            if evidence.passed and expected.release:
                _add_table(evidence, paths, expected.release, clients)
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
                f"the served {evidence.name} is not the model of this golden set:",
                *(f"  {problem}" for problem in evidence.problems[:10]),
                "Serve the release of this golden set, or give the served release's golden set",
            )
        )


def _validate_server(url: str, client: Client, expected: ExpectedModel) -> Served:
    """Ask one server for its metadata and the golden set, and collect its problems."""
    server, model = client.metadata(), client.metadata(of_model=True)
    config = client.config()
    problems = expected.mismatches(config)
    rounds = () if problems else tuple(ask_golden(client, expected.golden))
    ready = [str(version) for version in model.get("versions", ())]
    versions = sorted({version for each in rounds for version in each.versions}) or ready
    digest = config_pbtxt.digest(config, versions[-1]) if versions else None
    problems += expected.version_problems(versions, digest)
    problems += [f"{each.mode}: {problem}" for each in rounds for problem in each.problems]
    if rounds:
        names = {"its config": read_classes(config)}
        if config.output[0].label_filename:
            names["its label file"] = client.labels(expected.golden.images[0])
        wanted = expected.manifest.get("classes") or names["its config"]
        wrong = {where: describe_mismatch(told, wanted) for where, told in names.items()}
        problems += [f"{where} {problem}" for where, problem in wrong.items() if problem]
    notes = [] if digest else [f"{url} states no digest: only its answers were compared"]
    if config.max_batch_size > LARGEST:
        largest = f"{config.max_batch_size} images, but none above {LARGEST} was tested"
        notes.append(f"{url} allows batches of {largest}")
    facts = {key: model.get(key) for key in ("name", "platform")}
    return Served(
        url=url,
        server={key: server.get(key) for key in ("name", "version", "extensions")},
        model={**facts, "backend": config.backend, "versions": ready},
        version=", ".join(versions),
        sha256=digest,
        rounds=rounds,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _add_table(evidence: ServerEvidence, paths: Paths, release: Release, clients: Clients) -> None:
    """Add a table of the release's test split, if its files are in the data folder."""
    training = release.manifest.get("training")
    if not training or not (folder := paths.data(training["dataset"])).is_dir():
        return
    # Not needed to replay a golden set.
    from pipeline.data.splits import load_scored_split
    from pipeline.export.runtime import onnx_predictor

    split = load_scored_split(training, release.manifest["data_sha256"], folder)
    predictors = {"ONNX Runtime": onnx_predictor(release.onnx)}
    predictors |= {url: triton_predictor(client) for url, client in clients.items()}
    scores = {}
    if release.golden.scores is not None:
        scores = {"ONNX Runtime": onnx_predictor(release.onnx, outputs=(1,))}
        scores |= {url: triton_predictor(client, SCORES) for url, client in clients.items()}
    digest = release.manifest.get("exact_sha256")
    rows = measure_agreement(predictors, split.images, split.labels, scores, digest)
    count = len(split.labels)
    evidence.table = Table(paths.name, release.version, release.sha256, count, "test", rows)
    try:
        # The first row runs the same file: other hardware may round differently, but a mismatch
        # of classes never passes.
        require_agreement(evidence.table, replace(release.limits, differing=0))
    except CheckFailedError as error:
        evidence.problems.append(str(error))
