"""Replay of a release's golden set on a running server.

A new version is first loaded under a separate name, so that no client asks it before it has
answered its golden set.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np

from pipeline.client.client import Client
from pipeline.client.query import triton_predictor
from pipeline.core.errors import CheckFailedError, PipelineError, ServerError
from pipeline.core.paths import Paths
from pipeline.core.signature import SCORES
from pipeline.repository import config_pbtxt
from pipeline.repository.golden import GOLDEN_BATCHES, Golden, compare_golden, raise_problems
from pipeline.repository.release import Release
from pipeline.repository.running import Server
from pipeline.serving.admin import Admin


def replay_golden(client: Client, golden: Golden) -> list[str]:
    """Return what is wrong with a server's answers, at each golden batch size that it accepts."""
    largest = max(1, client.config().max_batch_size)
    sizes = tuple(size for size in GOLDEN_BATCHES if size <= largest)
    scores = triton_predictor(client, SCORES)
    return compare_golden(golden, triton_predictor(client), sizes, scores)


def ask_version(client: Client) -> int:
    """Return the version that answers an inference on one blank image; 0 if not a number."""
    images = client.config().input[0]
    if any(dim < 1 for dim in images.dims):
        raise PipelineError(
            f"{client.name} at {client.endpoint} takes images of variable shape "
            f"{list(images.dims)}: serve a model whose dims are all fixed"
        )
    version = client.infer(np.zeros((1, *images.dims), config_pbtxt.dtype(images)))[1]
    return int(version) if version.isdigit() else 0


ANSWER_SECONDS = 60.0


class NotLoadedError(CheckFailedError):
    """Triton does not load the version."""


def check_candidate(
    paths: Paths,
    server: Server,
    admin: Admin,
    release: Release,
    fix: str,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Return once the version, loaded under another name, answers its golden set correctly.

    Raises NotLoadedError if Triton does not load it, CheckFailedError if it gives incorrect
    answers, and ServerError if the server gives no answer.
    """
    name = f"{paths.name}.candidate"
    if (paths.repository / name).exists():
        raise PipelineError(f"{paths.repository / name} must not exist: rename that model")
    what = f"{paths.name} version {release.version}"
    report(f"loading {what} as {name}")
    try:
        config = config_pbtxt.read(config_pbtxt.profile_file(paths.packaged, server.profile))
        config.name = name
        config_pbtxt.select(config, release.version)
        others = [paths.packaged / config_pbtxt.LABELS, *(paths.packaged / "warmup").glob("*")]
        files = {str(path.relative_to(paths.packaged)): path.read_bytes() for path in others}
        files[f"{release.version}/{paths.onnx.name}"] = release.onnx
        with explain_refusal(what, fix):
            admin.load_files(config, files)
        report(f"asking {name} the golden set")
        require_golden(server, name, release, what, fix)
    finally:
        with contextlib.suppress(PipelineError):
            admin.unload(name)


@contextlib.contextmanager
def explain_refusal(what: str, fix: str) -> Iterator[None]:
    """Raise NotLoadedError with Triton's message if it refuses to load `what` in the block."""
    try:
        yield
    except ServerError:
        raise
    except PipelineError as error:
        reason = str(error).strip().rstrip(";")
        raise NotLoadedError(f"{what} is not loaded: {reason}. {fix}") from error


def require_golden(server: Server, name: str, release: Release, what: str, fix: str) -> None:
    """Raise CheckFailedError unless this version answers, correctly and over both protocols."""
    for url in (server.http_url, server.grpc_url):
        with Client(url, name, ANSWER_SECONDS) as client:
            problem = f"{what} gives incorrect answers over {url}"
            raise_problems(replay_golden(client, release.golden), problem, fix)
            version = ask_version(client)
        if version != release.version:
            raise CheckFailedError(f"{url} answers with version {version} instead of {what}. {fix}")
