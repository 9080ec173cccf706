"""Promote and roll back under a running server: nobody gets an answer of an unproven version.

Triton sends requests that name no version to the highest that is ready, and a load is the switch.
So the candidate is first loaded under a name of its own and answers its golden set there. A kill
in between leaves a config that selects one version and a server that answers with another, or a
candidate that nobody asks: `pipeline versions list` shows it, the same promotion again ends it.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace

from pipeline.client.client import Client
from pipeline.core.errors import PipelineError, ServerError
from pipeline.core.files import locked, write_bytes
from pipeline.core.paths import Paths
from pipeline.repository import config_pbtxt
from pipeline.repository.golden import GOLDEN_BATCHES, compare_golden, require
from pipeline.repository.release import REPACKAGE, Release, check_release
from pipeline.repository.running import serving
from pipeline.repository.versions import Promotion, rollback_target, select_version
from pipeline.serving import ready
from pipeline.serving.admin import Admin
from pipeline.serving.process import handle_signals
from pipeline.serving.ready import served_version
from pipeline.serving.serve import Server, recorded, write_record

LOAD_SECONDS = 60.0  # in which Triton has loaded a model
ANSWER_SECONDS = 10.0

Report = Callable[[str], None]


def promote(paths: Paths, version: int, report: Report = lambda line: None) -> Promotion:
    """Select a version; where our server runs, it answers with it from now on.

    Raises PipelineError when there is none, CorruptError when a file changed, CheckFailedError when
    a config states another digest or the candidate is not loaded or answers wrongly, and
    ServerError when the server gives no answer: what was served goes on being served.
    """
    with locked(paths.lock):
        return _promote(paths, version, report)


def rollback(paths: Paths, report: Report = lambda line: None) -> Promotion:
    """Promote the version that was selected before. Twice is there and back again."""
    with locked(paths.lock):
        return _promote(paths, rollback_target(paths), report)


def served(paths: Paths) -> int | None:
    """The version that our server answers with at this moment; None where none answers."""
    server = serving(paths)
    if server is None:
        return None
    try:
        with Client(server.grpc_url, paths.name, ANSWER_SECONDS) as client:
            return served_version(client)
    except ServerError:
        return None


def _promote(paths: Paths, version: int, report: Report) -> Promotion:
    release = check_release(paths, version)
    server = serving(paths)
    if server is None:
        from pipeline.export.runtime import onnx_predictor  # a server's answers need it not

        agreement = compare_golden(release.golden, onnx_predictor(release.onnx), GOLDEN_BATCHES)
        require(agreement, f"version {version} answers wrongly", REPACKAGE)
        return select_version(paths, release)
    if not server.is_ready:
        raise ServerError(f"the server (pid {server.pid}) is starting: try again in a moment")
    with Client(server.grpc_url, paths.name, ANSWER_SECONDS) as client:
        before = served_version(client)
    with Admin(server.grpc_url, server.admin_key, LOAD_SECONDS) as admin:
        mend = f"What was served goes on being served; look at {release.folder}, or package again"
        ready.prove(paths, server, admin, release, mend, report)
        with _unbroken():
            _switch(paths, server, admin, release, before)
    return Promotion(paths.name, version, release.sha256, before, is_served=True)


def _switch(paths: Paths, server: Server, admin: Admin, release: Release, before: int) -> None:
    """Select the version and load it; on any failure, back to what was selected and served."""
    contents = {}
    for path in config_pbtxt.config_files(paths.packaged):
        contents[path], config = path.read_bytes(), config_pbtxt.read(path)
        if config_pbtxt.selected(config) != [before]:  # a kill left it so, and another is served
            config_pbtxt.select(config, before)
            contents[path] = config_pbtxt.to_text(config).encode()
    what = f"{paths.name} version {release.version}"
    mend = f"Version {before} is served again"
    try:
        select_version(paths, release)
        admin.load(paths.name)
        _record(paths, server, release.version)
        wrongly = f"{what} answers wrongly once it serves"
        ready.require_golden(server, paths.name, release, wrongly, mend)
    except PipelineError as error:
        for path, content in contents.items():
            write_bytes(path, content)
        with contextlib.suppress(PipelineError):
            admin.load(paths.name)
        _record(paths, server, before)
        said = str(error).strip().rstrip(";")
        raise type(error)(f"{what} is not promoted, version {before} stays: {said}") from error


def _record(paths: Paths, server: Server, version: int) -> None:
    """Tell `status` and the supervisor, unless the server was started anew meanwhile."""
    now = recorded(paths)
    if now and now.id == server.id:
        write_record(paths, replace(now, models={**now.models, paths.name: version}))


@contextlib.contextmanager
def _unbroken() -> Iterator[None]:
    """Let Ctrl-C wait until the block, which has deadlines, is through."""
    pending: list[int] = []
    with handle_signals({signal.SIGINT: lambda number, frame: pending.append(number)}):
        yield
    if pending:
        raise KeyboardInterrupt
