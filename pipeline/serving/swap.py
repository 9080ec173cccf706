"""Promotion and rollback on a running server: no client gets an answer of an unchecked version.

Triton sends requests that name no version to the highest ready version, so loading a version makes
it the served one. The candidate is therefore first loaded under a separate name, where it answers
its golden set. If the process is killed halfway, the config may select one version while the
server answers with another, or a candidate that no client asks may stay loaded: `pipeline versions
list` shows it, and repeating the promotion completes it.
"""

import contextlib
import signal
from collections.abc import Callable
from dataclasses import replace

from pipeline.client.client import Client
from pipeline.core.errors import PipelineError, ServerError
from pipeline.core.files import locked, write_bytes
from pipeline.core.paths import Paths
from pipeline.repository import config_pbtxt
from pipeline.repository.golden import GOLDEN_BATCHES, compare_golden, raise_problems
from pipeline.repository.release import REPACKAGE, Release, check_release
from pipeline.repository.running import Server, find_server, load_server
from pipeline.repository.versions import Promotion, find_rollback_target, select_version
from pipeline.serving import ready
from pipeline.serving.admin import Admin
from pipeline.serving.process import handle_signals
from pipeline.serving.serve import write_record

LOAD_SECONDS = 60.0  # timeout of a load
ANSWER_SECONDS = 10.0

Report = Callable[[str], None]


def promote(paths: Paths, version: int, report: Report = lambda line: None) -> Promotion:
    """Select a version; if our server runs, serve that version from now on.

    Without a server, ONNX Runtime answers the golden set in this process.

    Raises PipelineError if there is no such version, CorruptError if a file changed,
    CheckFailedError if a config states another digest or if the candidate is not loaded or gives
    incorrect answers, and ServerError if the server gives no answer. After an error, the version
    that was served before is still served.
    """
    with locked(paths.lock):
        return _promote(paths, version, report)


def rollback(paths: Paths, report: Report = lambda line: None) -> Promotion:
    """Promote the previously selected version; a second rollback undoes the first."""
    with locked(paths.lock):
        return _promote(paths, find_rollback_target(paths), report)


def find_served_version(paths: Paths) -> int | None:
    """Return the version that our server answers with now; None if no server answers."""
    with contextlib.suppress(ServerError):
        if server := find_server(paths):
            with Client(server.grpc_url, paths.name, ANSWER_SECONDS) as client:
                return ready.ask_version(client)
    return None


def _promote(paths: Paths, version: int, report: Report) -> Promotion:
    release = check_release(paths, version)
    server = find_server(paths)
    if server is None:
        from pipeline.export.runtime import onnx_predictor  # not needed if a server answers

        problems = compare_golden(release.golden, onnx_predictor(release.onnx), GOLDEN_BATCHES)
        raise_problems(problems, f"version {version} gives incorrect answers", REPACKAGE)
        return select_version(paths, release)
    if not server.is_ready:
        raise ServerError(f"the server (pid {server.pid}) is starting: try again in a moment")
    with Client(server.grpc_url, paths.name, ANSWER_SECONDS) as client:
        before = ready.ask_version(client)
    with Admin(server.grpc_url, server.admin_key, LOAD_SECONDS) as admin:
        fix = f"Version {before} is still served. Look at {release.folder}, or package again"
        ready.check_candidate(paths, server, admin, release, fix, report)
        # Delay Ctrl-C until the switch is complete; its steps have deadlines.
        pending: list[int] = []
        with handle_signals({signal.SIGINT: lambda number, frame: pending.append(number)}):
            _switch(paths, server, admin, release, before)
        if pending:
            raise KeyboardInterrupt
    return Promotion(paths.name, version, release.sha256, before, is_served=True)


def _switch(paths: Paths, server: Server, admin: Admin, release: Release, before: int) -> None:
    """Select and load the version; on failure, restore what was selected and served before."""
    contents = {}
    for path in config_pbtxt.config_files(paths.packaged):
        contents[path], config = path.read_bytes(), config_pbtxt.read(path)
        if config_pbtxt.selected(config) != [before]:  # left by a kill; another version is served
            config_pbtxt.select(config, before)
            contents[path] = config_pbtxt.to_text(config).encode()
    what, fix = f"{paths.name} version {release.version}", f"Version {before} is served again"
    try:
        select_version(paths, release)
        admin.load(paths.name)
        _record(paths, server, release.version)
        ready.require_golden(server, paths.name, release, what, fix)
    except PipelineError as error:
        for path, content in contents.items():
            write_bytes(path, content)
        with contextlib.suppress(PipelineError):
            admin.load(paths.name)
        _record(paths, server, before)
        reason = str(error).strip().rstrip(";")
        raise type(error)(f"{what} is not promoted, version {before} stays: {reason}") from error


def _record(paths: Paths, server: Server, version: int) -> None:
    """Record the version for `status` and the supervisor, unless the server was restarted."""
    now = load_server(paths)
    if now and now.id == server.id:
        write_record(paths, replace(now, models={**now.models, paths.name: version}))
