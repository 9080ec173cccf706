"""Promotions under a running server: what is served changes at once, or not at all."""

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from pipeline.client.client import Client
from pipeline.core.errors import PipelineError, ServerError
from pipeline.data.splits import load_split
from pipeline.repository import versions
from pipeline.repository.release import load_release
from pipeline.repository.running import Server, load_server
from pipeline.serving import serve, swap
from pipeline.serving.admin import Admin
from tests.conftest import Chain, error_line, free_port, link_server_environment
from tests.repository.test_versions import add_another, seal
from tools.prove_swap import IMAGES, TOLERANCE, prove
from tools.traffic import Traffic, expected, judge, traffic

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def live(made: Chain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """A chain with two versions of different networks, on a server."""
    chain = Chain(tmp_path_factory.mktemp("swapped") / "chain")
    shutil.copytree(made.root, chain.root, symlinks=True)
    link_server_environment(chain)
    assert add_another(chain) == 2
    chain.record("serve", "--detach", "--port", "auto")
    yield chain
    assert chain.run("serve", "stop").exit_code == 0


def server_of(chain: Chain) -> Server:
    server = load_server(chain.paths)
    assert server
    return server


def images_of(chain: Chain) -> np.ndarray:
    return load_split("mnist", chain.paths.data("mnist"), "test").images[:IMAGES]


def state(chain: Chain) -> tuple[int | None, int, int]:
    """The version that is served, the one that is selected, and the one that is recorded."""
    served = swap.find_served_version(chain.paths)
    (selected,) = (
        one.version for one in versions.list_versions(chain.paths).versions if one.is_selected
    )
    return served, selected, server_of(chain).models["handwriting"]


def settled(version: int) -> tuple[int, int, int]:
    return (version, version, version)


def has_candidate(chain: Chain) -> bool:
    try:
        with Client(server_of(chain).grpc_url, "handwriting.candidate") as client:
            client.config()
    except PipelineError:
        return False
    return True


def other_version(chain: Chain) -> int:
    """Of the two right versions the one that is not served."""
    return 3 - (swap.find_served_version(chain.paths) or 0)


def add_wrong(chain: Chain) -> int:
    """Package a version whose golden set is another network's, every digest in order."""
    version = int(chain.record("package")["version"])
    golden = chain.paths.packaged / str(version) / "golden.npz"
    arrays = dict(np.load(golden))
    arrays["outputs"] = np.roll(arrays["outputs"], 1, axis=1)
    np.savez(golden, **arrays)
    seal(chain, version)
    return version


@pytest.mark.timeout(600)  # its setup makes the chain where no test did before
def test_a_promotion_and_a_rollback_under_four_clients_and_every_answer_is_right(
    live: Chain,
) -> None:
    outcome = prove(live.paths, server_of(live), images_of(live), 2, 0, pause=0.02)
    assert outcome.problems == ()
    assert outcome.is_perfect, outcome
    assert outcome.promotes == 2
    assert outcome.clients == ("http", "grpc", "http", "grpc")
    assert not has_candidate(live)


def test_a_promoted_version_is_what_status_and_query_tell(live: Chain) -> None:
    version = other_version(live)
    change = live.record("versions", "promote", str(version))
    assert (change["version"], change["is_served"]) == (version, True)
    assert state(live) == settled(version)
    status = live.record("serve", "status")["models"]["handwriting"]
    assert (status["version"], status["sha256"]) == (version, change["sha256"])
    listing = live.run("versions", "list").stdout
    assert "selected, served" in listing


def test_status_follows_the_version_that_answers_whatever_was_written_down(live: Chain) -> None:
    server, (version, *_) = server_of(live), state(live)
    assert version
    # A promotion that was killed between the switch and its note, or is just there.
    serve.write_record(live.paths, replace(server, models={"handwriting": 3 - version}))
    status = live.record("serve", "status")["models"]["handwriting"]
    assert status["version"] == version
    serve.write_record(live.paths, server)


def test_a_restart_that_could_not_start_again_does_not_stop_what_runs(live: Chain) -> None:
    before, pid = state(live), server_of(live).pid
    labels = live.paths.packaged / "labels.txt"
    labels.chmod(0o666)
    result = live.run("serve", "restart")
    labels.chmod(0o644)
    assert result.exit_code == 3
    assert "can be changed by any user" in error_line(result)
    assert (state(live), server_of(live).pid) == (before, pid)


def test_a_wrong_candidate_never_serves_anybody(live: Chain) -> None:
    before = state(live)
    version = add_wrong(live)
    assert state(live) == before  # packaging changes nothing
    images = images_of(live)
    right = {before[0] or 0: expected(live.paths, [before[0] or 0], images)[before[0] or 0]}
    server = server_of(live)
    ask = Traffic("", "handwriting", images, right, TOLERANCE, pause=0.01)
    with traffic([server.http_url, server.grpc_url], ask) as running:
        result = live.run("versions", "promote", str(version))
        running.await_more(5)
        tally = running.stop()
    assert result.exit_code == 3
    assert f"handwriting version {version} gives incorrect answers over http://" in error_line(
        result
    )
    assert (tally.wrong, tally.failed) == (0, 0)
    assert state(live) == before
    assert not has_candidate(live)


def test_a_candidate_that_triton_does_not_load_is_refused_with_3(live: Chain) -> None:
    before = state(live)
    version = int(live.record("package")["version"])
    (live.paths.packaged / str(version) / "model.onnx").write_bytes(b"no network")
    seal(live, version)
    result = live.run("versions", "promote", str(version))
    assert result.exit_code == 3
    assert f"handwriting version {version} is not loaded: " in error_line(result)
    assert "is still served" in error_line(result)
    assert state(live) == before
    assert not has_candidate(live)


@contextlib.contextmanager
def lost_before_the_load(chain: Chain, version: int) -> Iterator[Callable[[str], None]]:
    """What takes a version's file away as soon as its candidate is loaded; it comes back."""
    model = chain.paths.packaged / str(version) / "model.onnx"
    content = model.read_bytes()

    def lose(line: str) -> None:
        if line.startswith("asking"):
            model.unlink()

    yield lose
    model.write_bytes(content)


def test_a_load_that_fails_after_all_leaves_the_old_version_serving(live: Chain) -> None:
    before, version = state(live), other_version(live)
    images, server = images_of(live), server_of(live)
    ask = Traffic("", "handwriting", images, expected(live.paths, [1, 2], images), TOLERANCE)
    with traffic([server.http_url, server.grpc_url], replace(ask, pause=0.01)) as running:
        with (
            lost_before_the_load(live, version) as lose,
            pytest.raises(PipelineError, match=f"is not promoted, version {before[0]} stays"),
        ):
            swap.promote(live.paths, version, lose)
        running.await_more(5)
        tally = running.stop()
    assert (tally.wrong, tally.failed) == (0, 0)
    assert list(tally.by_version) == [before[0]]
    assert state(live) == before
    assert not has_candidate(live)


def test_ctrl_c_leaves_what_was_or_what_was_to_be(
    live: Chain, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    before, version = state(live), other_version(live)
    # A shell starts its background jobs with SIGINT ignored; tests may run in one.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, previous))

    def interrupt(line: str) -> None:
        if line.startswith("asking"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        swap.promote(live.paths, version, interrupt)
    assert state(live) == before
    assert not has_candidate(live)

    load = Admin.load

    def interrupted(admin: Admin, name: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        load(admin, name)

    monkeypatch.setattr(Admin, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swap.promote(live.paths, version)
    assert state(live) == settled(version)


def test_a_promotion_cut_off_before_the_load_is_shown_and_ended_by_another(live: Chain) -> None:
    served, _, recorded = state(live)
    version = other_version(live)
    release = load_release(live.paths, version)
    versions.select_version(live.paths, release)  # as a kill leaves it: selected, and not loaded
    assert state(live) == (served, version, recorded)
    listing = live.run("versions", "list").stdout.splitlines()
    marks = {line.split()[0]: line for line in listing if line.strip()[:1].isdigit()}
    assert marks[str(served)].endswith("previous, served")
    assert marks[str(version)].endswith("selected")
    with (
        lost_before_the_load(live, version) as lose,
        pytest.raises(PipelineError, match=f"version {served} stays"),
    ):
        swap.promote(live.paths, version, lose)
    assert state(live) == settled(served or 0)  # not what the kill left selected
    versions.select_version(live.paths, release)
    assert live.run("versions", "promote", str(version)).exit_code == 0
    assert state(live) == settled(version)


def test_two_promotions_at_once_come_one_after_the_other(live: Chain) -> None:
    version = other_version(live)
    done: list[versions.Promotion] = []
    threads = [
        threading.Thread(target=lambda n=n: done.append(swap.promote(live.paths, n)))
        for n in (version, 3 - version)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 2
    assert state(live) == settled(done[-1].version)


def test_what_was_packaged_while_a_server_ran_is_not_served_by_the_next_one_either(
    live: Chain,
) -> None:
    (served, *_), version = state(live), int(live.record("package")["version"])
    assert live.run("serve", "stop").exit_code == 0
    assert swap.find_served_version(live.paths) is None
    live.record("serve", "--detach", "--port", "auto")
    assert state(live)[0] == served != version


def test_a_server_that_is_starting_is_not_asked(live: Chain) -> None:
    server = server_of(live)
    serve.write_record(live.paths, replace(server, is_ready=False))
    try:
        with pytest.raises(ServerError, match="is starting: try again"):
            swap.promote(live.paths, 1)
    finally:
        serve.write_record(live.paths, server)


def test_a_wrong_key_is_refused_in_a_line(live: Chain) -> None:
    server = server_of(live)
    with Admin(server.grpc_url, "guess", 10.0) as admin, pytest.raises(PipelineError) as caught:
        admin.unload("handwriting")
    assert "restricted" in str(caught.value)
    assert swap.find_served_version(live.paths) == state(live)[0]


def test_traffic_sees_wrong_and_failed_answers(live: Chain) -> None:
    images, server = images_of(live), server_of(live)
    version = swap.find_served_version(live.paths) or 0
    outputs = expected(live.paths, [version], images)
    ask = Traffic("", "handwriting", images, outputs, TOLERANCE)
    rows = slice(0, 1)
    assert judge(ask, rows, outputs[version][rows], str(version)) == ""
    assert "answered" in judge(ask, rows, outputs[version][rows], "99")
    assert "off by" in judge(ask, rows, outputs[version][1:2], str(version))
    assert "off by" in judge(ask, rows, outputs[version][rows] * np.nan, str(version))
    assert "instead of" in judge(ask, rows, outputs[version][:2], str(version))
    mixed = replace(ask, outputs_by_version={version: np.roll(outputs[version], 1, axis=0)})
    nowhere = f"http://127.0.0.1:{free_port()}"
    with traffic([server.grpc_url, nowhere], mixed) as running:
        running.await_more(3)
        tally = running.stop()
    assert tally.wrong >= 3 <= tally.failed
    assert tally.right == 0
    assert len(tally.problems) == tally.requests == tally.wrong + tally.failed
