"""Send many requests to a served model, and check that its server does not grow.

prove_soak.py RESULT REQUESTS
"""

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.core.machine import machine
from pipeline.repository.running import Server, load_server
from pipeline.serving import process, serve, supervise
from pipeline.serving.settings import ServeConfig
from tools.prove_kill import ask_of, leftovers, project
from tools.provenance import write_figure
from tools.readme import render_pages
from tools.traffic import traffic

MAY_GROW = 5 * 1024 * 1024  # bytes
WARM = 0.1  # fraction of the requests before the first measurement
HANG_SECONDS = 1200.0


@dataclass(frozen=True)
class Size:
    """Resources of all processes of a server together."""

    memory_bytes: int  # resident: the private part, and the shared memory that was touched
    descriptors: int
    shared_memory: int  # regions
    threads: int


def size(server: Server) -> Size:
    """Measure the resources that tritonserver and its stubs hold now."""
    pids = process.find_processes(server.id)
    status = [dict(_fields(pid)) for pid in pids]
    return Size(
        memory_bytes=1024 * sum(int(fields["VmRSS"].split()[0]) for fields in status),
        descriptors=sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids),
        shared_memory=len(list(Path("/dev/shm").glob(f"*{server.id}*"))),
        threads=sum(int(fields["Threads"]) for fields in status),
    )


def _fields(pid: int) -> Iterable[tuple[str, str]]:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        yield name, value.strip()


def main(result: Path, requests: int) -> None:
    """Send this many requests, and write how the server's size changed."""
    with project() as paths:
        server = supervise.detach(paths, serve.with_free_ports(ServeConfig()))
        try:
            sizes = []
            urls = [server.http_url, server.grpc_url] * 2
            with traffic(urls, ask_of(paths)) as running:
                for share in (WARM, *(WARM + (1 - WARM) * part / 10 for part in range(1, 11))):
                    missing = int(requests * share) - running.requests
                    running.await_more(max(1, missing // len(urls)), HANG_SECONDS)
                    sizes.append((running.requests, size(server)))
                    print(*sizes[-1], flush=True)
                tally = running.stop()
            restarts = getattr(load_server(paths), "restarts", None)
        finally:
            supervise.stop(paths)
    first, last = sizes[0][1], sizes[-1][1]
    record = {
        "command": "make prove-soak",
        **machine(),
        "requests": tally.requests,
        "wrong": tally.wrong,
        "failed": tally.failed,
        "restarts": restarts,
        "grown_bytes": last.memory_bytes - first.memory_bytes,
        "sizes": [{"requests": count, **asdict(tally)} for count, tally in sizes],
    }
    print(record)
    assert (tally.wrong, tally.failed, restarts) == (0, 0, 0)
    assert last.memory_bytes - first.memory_bytes <= MAY_GROW
    assert last.descriptors <= first.descriptors
    assert last.shared_memory == first.shared_memory
    assert not leftovers({server.id})
    write_figure("soak", result, record)
    render_pages()
    print(f"wrote {result}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
