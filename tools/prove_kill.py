"""Kill a served model's stub, server and supervisor, and drain it, while clients send requests.

prove_kill.py RESULT KILLS DRAINS
"""

import http.client
import itertools
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.data.splits import load_split
from pipeline.repository import config_pbtxt
from pipeline.repository.running import Server, is_alive, load_server
from pipeline.serving import process, serve, supervise
from pipeline.serving.settings import ServeConfig
from tools.provenance import write_figure
from tools.readme import render_pages
from tools.traffic import PAUSE_SECONDS, Running, Tally, Traffic, expected, lost, traffic

WITHIN = 10.0  # seconds until correct answers return, and for a drain
HANG_SECONDS = 60.0
KINDS = ("stub", "server", "supervisor")
BETWEEN = 100  # requests of each client between two kills or drains


@dataclass(frozen=True)
class Kill:
    """A kill: its kind and its time."""

    kind: str
    at: float  # monotonic clock, seconds


@contextmanager
def project() -> Iterator[Paths]:
    """Copy the packaged repository of this project, to be served separately."""
    here = Paths()
    with tempfile.TemporaryDirectory(prefix="prove-kill-") as folder:
        paths = Paths(Path(folder))
        shutil.copytree(here.repository, paths.repository)
        paths.triton_environment.symlink_to(here.triton_environment.resolve())
        yield paths


def ask_of(paths: Paths) -> Traffic:
    """Return the clients' requests: test images, one or five at a time."""
    (version,) = config_pbtxt.selected(config_pbtxt.read(paths.packaged / config_pbtxt.CONFIG))
    images = load_split("mnist", Paths().data("mnist"), "test").images[:1000]
    return Traffic("", paths.name, images, expected(paths, [version], images), 1e-3, timeout=5.0)


def leftovers(ids: set[str]) -> list[str]:
    """List the processes and shared memory of these servers."""
    left = [str(path) for server_id in ids for path in Path("/dev/shm").glob(f"*{server_id}*")]
    return left + [
        f"process {pid}" for server_id in ids for pid in process.find_processes(server_id)
    ]


def await_another(paths: Paths, before: Server) -> None:
    """Wait until a server other than `before` is ready."""
    deadline = time.monotonic() + HANG_SECONDS
    while True:
        now = load_server(paths)
        if now and now.id != before.id and now.is_ready:
            return
        assert time.monotonic() < deadline, "the server does not come back"
        time.sleep(process.POLL_SECONDS)


def kill(paths: Paths, config: ServeConfig, kind: str, ids: set[str]) -> Kill:
    """Kill one part of the server, and wait until a complete server runs again."""
    server = load_server(paths)
    assert server
    ids.add(server.id)
    victims = {
        "stub": set(process.find_processes(server.id)) - {server.pid},
        "server": {server.pid},
        "supervisor": {server.supervisor_pid},
    }[kind]
    at = time.monotonic()
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    if kind == "supervisor":
        while is_alive(server.supervisor_pid, server.supervisor_start_time):
            time.sleep(process.POLL_SECONDS)
        supervise.detach(paths, config)  # cleans up the rest
    else:
        await_another(paths, server)
    return Kill(kind, at)


def outage(tally: Tally, begin: float, end: float) -> float:
    """Return seconds from `begin` until all clients had correct answers; 0 without a failure."""
    longest = 0.0
    for client in {event.client for event in tally.events}:
        own = [event for event in tally.events if event.client == client]
        failures = [event.answered for event in own if event.kind != "right"]
        failures = [when for when in failures if begin <= when < end]
        if failures:
            again = [e.answered for e in own if e.kind == "right" and e.answered > failures[-1]]
            longest = max(longest, again[0] - begin if again else float("inf"))
    return longest


def drain(paths: Paths, config: ServeConfig, running: Running, ids: set[str]) -> float:
    """Stop and restart the server under load, with an idle connection; return the stop's time.

    The time is in seconds.
    """
    server = load_server(paths)
    assert server
    ids.add(server.id)
    idle = http.client.HTTPConnection("127.0.0.1", config.http_port)
    idle.request("GET", "/v2")
    idle.getresponse().read()
    began = time.monotonic()
    supervise.stop(paths)
    seconds = time.monotonic() - began
    idle.close()
    supervise.detach(paths, config)
    running.await_more(BETWEEN)
    return seconds


def main(result: Path, kills: int, drains: int) -> None:
    """Kill and drain this often, and write the result."""
    ids: set[str] = set()
    with project() as paths:
        config = serve.with_free_ports(ServeConfig())
        server = supervise.detach(paths, config)
        urls = [server.http_url, server.grpc_url] * 2
        done, drained = [], []
        with traffic(urls, ask_of(paths)) as running:
            for number, kind in zip(range(kills), itertools.cycle(KINDS), strict=False):
                running.await_more(BETWEEN)
                done.append(kill(paths, config, kind, ids))
                running.await_more(BETWEEN)
                print(f"kill {number + 1} of {kills}: {kind}", flush=True)
            drains_from = time.monotonic()
            ids.add(str(getattr(load_server(paths), "id", server.id)))
            for number in range(drains):
                drained.append(drain(paths, config, running, ids))
                print(f"drain {number + 1} of {drains}: {drained[-1]:.1f} s", flush=True)
            supervise.stop(paths)
            tally = running.stop()
    time.sleep(PAUSE_SECONDS)
    ends = [kill.at for kill in done[1:]] + [drains_from]
    outages = {
        kind: [
            outage(tally, kill.at, e)
            for kill, e in zip(done, ends, strict=True)
            if kill.kind == kind
        ]
        for kind in KINDS
    }
    gone = lost(Tally(events=tuple(e for e in tally.events if e.answered >= drains_from)))
    left = leftovers(ids)
    record = {
        "command": "make prove-kill",
        **machine(),
        "kills": {
            kind: {"times": len(all_), "median": statistics.median(all_), "longest": max(all_)}
            for kind, all_ in outages.items()
            if all_
        },
        "drains": {"times": drains, "longest": max(drained, default=0.0), "lost": len(gone)},
        "requests": tally.requests,
        "right": tally.right,
        "wrong": tally.wrong,
        "left_behind": left,
    }
    for event in gone:
        print("lost:", event)
    print(record)
    assert tally.wrong == 0
    assert not left
    assert not gone
    assert max((s for all_ in outages.values() for s in all_), default=0.0) < WITHIN
    assert max(drained, default=0.0) < WITHIN
    write_figure("kill", result, record)
    render_pages()
    print(f"wrote {result}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
