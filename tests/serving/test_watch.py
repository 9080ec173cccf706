import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import CorruptError, PipelineError, ServerError, SlowError
from pipeline.core.paths import Paths
from pipeline.repository import running
from pipeline.repository.release import load_selected_releases
from pipeline.repository.running import Server
from pipeline.serving import state, supervise
from pipeline.serving.serve import bound_log
from pipeline.serving.settings import ServeConfig
from pipeline.serving.state import Load
from pipeline.serving.supervise import Canary, choose_pause
from tests.conftest import Chain

SERVER = Server(**{**dict.fromkeys(Server.__dataclass_fields__, 1), "id": "ours", "pid": 2**22})  # type: ignore[arg-type]
Said = tuple[np.ndarray, str] | PipelineError


def test_the_pause_before_a_start_grows_and_is_bounded() -> None:
    assert [choose_pause(0, early) for early in range(8)] == [0, 0, 1, 2, 3, 4, 4, 4]
    assert [choose_pause(failed, 0) for failed in range(1, 7)] == [1, 2, 4, 8, 8, 8]


class Asked:
    """A client that says what it was told to, one after the other."""

    def __init__(self, said: Sequence[Said]) -> None:
        self.said = list(said)

    def infer(self, images: np.ndarray) -> tuple[np.ndarray, str]:
        answer = self.said.pop(0)
        if isinstance(answer, PipelineError):
            raise answer
        return answer

    def close(self) -> None:
        pass


def canary_of(chain: Chain, *said: Said) -> Canary:
    canary = Canary(chain.paths, SERVER, load_selected_releases(chain.paths))
    canary.clients = {"handwriting": [Asked(said)]}  # type: ignore[list-item]
    return canary


def right(chain: Chain, row: int, version: str = "1") -> tuple[np.ndarray, str]:
    golden = load_selected_releases(chain.paths)["handwriting"].golden
    return golden.outputs[row : row + 1].astype(np.float32), version


def test_a_canary_asks_another_image_each_time_and_tells_a_wrong_answer(made: Chain) -> None:
    canary = canary_of(made, right(made, 1), right(made, 2), right(made, 4))
    assert [canary.ask() for _ in range(3)] == [
        *(None, None),
        "handwriting version 1 gives incorrect answers",
    ]


def test_the_third_question_in_a_row_without_an_answer_is_the_end(
    made: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "read_loads", lambda url, seconds: {})
    dead, late = ServerError("its process died: fix it"), SlowError("no answer in 1 s: is it?")
    canary = canary_of(made, dead, right(made, 2), late, dead, late)
    assert [canary.ask() for _ in range(5)] == [
        *(None, None, None, None),
        "handwriting does not answer (no answer in 1 s)",
    ]


def test_a_miss_after_which_a_dead_process_is_found_is_the_end_at_once(made: Chain) -> None:
    canary = canary_of(made, SlowError("late"))
    canary.server = replace(SERVER, pid=os.getpid())
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        while running.start_time(child.pid):  # until it is a zombie, which nobody has waited for
            os.sched_yield()
        assert canary.ask() == "handwriting's process died"


def test_a_late_answer_is_no_miss_while_others_are_answered(
    made: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = iter([10, 20, 30, 40, 40, 40, 40])

    def loads(url: str, seconds: float) -> dict[tuple[str, str], Load]:
        return {("handwriting", "1"): Load(next(answered), 0, None, None, None)}

    monkeypatch.setattr(state, "read_loads", loads)
    canary = canary_of(made, *[SlowError("late")] * 7)
    said = [canary.ask() for _ in range(7)]
    assert said == [None] * 6 + ["handwriting does not answer (late)"]


def test_a_promoted_version_is_asked_its_own_golden_set(chain: Chain) -> None:
    chain.record("package")
    canary = canary_of(chain, right(chain, 1, "2"), right(chain, 2, "2"))
    canary.releases["handwriting"] = replace(canary.releases["handwriting"], version=1)
    assert [canary.ask(), canary.ask()] == [None, None]
    assert canary.releases["handwriting"].version == 2


def test_a_watch_ends_with_a_dead_server_or_when_it_is_asked(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    paths.exported.mkdir()
    paths.server_log.touch()
    supervisor = supervise._Supervisor(paths, ServeConfig(), lambda server: None, print)
    fine: Any = SimpleNamespace(ask=lambda: None, misses=0)
    wrong: Any = SimpleNamespace(ask=lambda: "m gives incorrect answers", misses=0)
    alive: Any = SimpleNamespace(poll=lambda: None)
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(7)"]) as child:
        child.wait()
        assert supervisor.watch(child, fine) == "tritonserver died (exit status 7)"
    assert supervisor.watch(alive, wrong) == "m gives incorrect answers"
    supervisor.to_restart = True
    assert supervisor.watch(alive, fine) == "on request"


def test_a_log_that_is_too_long_begins_anew_and_its_past_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with log.open("ab") as file:
        file.write(b"x" * 100)
        file.flush()
        bound_log(log, limit=100)
        assert log.stat().st_size == 100
        file.write(b"y")
        file.flush()
        bound_log(log, limit=100)
        file.write(b"z")
    assert log.read_bytes() == b"z"
    assert (tmp_path / "server.log.1").read_bytes() == b"x" * 100 + b"y"


class Lives:
    """Servers as a supervisor sees them: each start fails, or lives so many seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *fates: float | PipelineError) -> None:
        self.fates, self.now = list(fates), 0.0
        self.pauses: list[float] = []
        self.said: list[str] = []
        supervisor = supervise._Supervisor(
            Paths(), ServeConfig(), lambda server: None, self.said.append
        )
        self.supervisor = supervisor
        monkeypatch.setattr(supervise, "run_server", self.run_server)
        monkeypatch.setattr(supervisor, "supervise", self.life)
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self.pauses.append)
        monkeypatch.setattr(supervise, "time", clock)

    @contextlib.contextmanager
    def run_server(self, *_: Any) -> Iterator[tuple[Server, None]]:
        self.while_starting()
        if not self.fates:
            raise KeyboardInterrupt
        if isinstance(self.fates[0], PipelineError):
            raise self.fates.pop(0)  # type: ignore[misc]
        yield SERVER, None

    def while_starting(self) -> None:
        """Nothing, usually."""

    def life(self, *_: Any) -> str:
        self.now += self.fates.pop(0)  # type: ignore[operator]
        return "it died"


def test_a_restart_that_is_asked_for_during_a_start_is_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lives, heard = Lives(monkeypatch, 60.0), []

    def life(*_: Any) -> str:
        heard.append(lives.supervisor.to_restart)
        return lives.life()

    monkeypatch.setattr(lives, "while_starting", lambda: lives.supervisor.request_restart(0, None))
    monkeypatch.setattr(lives.supervisor, "supervise", life)
    with pytest.raises(KeyboardInterrupt):
        lives.supervisor.run()
    assert heard == [True]


def test_the_first_start_that_fails_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    lives = Lives(monkeypatch, CorruptError("bytes"))
    with pytest.raises(CorruptError, match="bytes"):
        lives.supervisor.run()
    assert lives.pauses == []


def test_five_failed_starts_in_a_row_are_the_end_and_each_waits_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = CorruptError("bytes")
    lives = Lives(monkeypatch, 60.0, *[broken] * 4, 60.0, *[broken] * 5)
    with pytest.raises(ServerError, match=r"gave up after 5 failed starts in a row: .* \(bytes\)"):
        lives.supervisor.run()
    assert lives.pauses == [0, 1, 2, 4, 8, 0, 1, 2, 4, 8]
    assert "it died: restarting the server" in lives.said
    assert "it did not start (bytes): restarting the server in 4 s" in lives.said


def test_servers_that_die_young_are_started_ever_later(monkeypatch: pytest.MonkeyPatch) -> None:
    lives = Lives(monkeypatch, 60.0, 1.0, 1.0, 1.0, 60.0, 1.0)
    with pytest.raises(KeyboardInterrupt):
        lives.supervisor.run()
    assert lives.pauses == [0, 0, 1, 2, 0, 0]
