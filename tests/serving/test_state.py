import io
import json
import re
import subprocess
import sys
import urllib.request
from typing import Any

import pytest

from pipeline.core.errors import PipelineError, ServerError
from pipeline.serving import state
from pipeline.serving.admin import Admin
from pipeline.serving.state import Load
from tests.conftest import Chain, error_line, free_port

Served = tuple[Chain, dict[str, Any]]
TEXT = """\
# HELP nv_inference_request_success Number of successful inference requests
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="m",version="1"} 10
# TYPE nv_inference_request_failure counter
nv_inference_request_failure{model="m",reason="BACKEND",version="1"} 2
nv_inference_request_failure{model="m",reason="REJECTED",version="1"} 1
# TYPE nv_inference_count counter
nv_inference_count{model="m",version="1"} 60
# TYPE nv_inference_exec_count counter
nv_inference_exec_count{model="m",version="1"} 8
# TYPE nv_inference_request_summary_us summary
nv_inference_request_summary_us_count{model="m",version="1"} 10
nv_inference_request_summary_us_sum{model="m",version="1"} 5000
nv_inference_request_summary_us{model="m",version="1",quantile="0.5"} 400
nv_inference_request_summary_us{model="m",version="1",quantile="0.99"} Nan
# TYPE nv_cpu_utilization gauge
nv_cpu_utilization 0.5
"""


def test_a_load_is_read_from_what_triton_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = io.BytesIO(TEXT.encode())
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: answer)
    assert state.read_loads("http://x") == {("m", "1"): Load(10, 3, 7.5, 400.0, None)}


def test_no_metrics_are_no_server() -> None:
    with pytest.raises(ServerError, match="gives no metrics"):
        state.read_loads(f"http://127.0.0.1:{free_port()}/metrics")


@pytest.mark.server
def test_status_counts_what_was_asked(served: Served) -> None:
    chain, server = served
    before = chain.record("serve", "status")["models"]["handwriting"]
    url = f"http://127.0.0.1:{server['http_port']}/v2/models/handwriting/infer"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(url, b"{}"))
    refused.value.close()
    after = chain.record("serve", "status")["models"]["handwriting"]
    assert after["requests"] > before["requests"] > 0
    assert after["mean_batch"] >= 1
    assert 0 < after["p50_us"] <= after["p99_us"]
    text = chain.run("serve", "status").stdout
    assert after["sha256"][:12] in text
    assert "answers its golden sets correctly" in text
    assert len(re.findall(r"\d+\.\d\d ms", text)) == 2  # p50 and p99


@pytest.mark.server
def test_a_watched_status_goes_on_until_it_is_interrupted(served: Served) -> None:
    chain, _ = served
    command = [sys.executable, "-m", "pipeline", "--root", str(chain.root), "--json"]
    process = subprocess.Popen(
        [*command, "serve", "status", "--watch"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    first, second = (json.loads(process.stdout.readline()) for _ in range(2))
    process.terminate()
    process.wait(20)
    process.stdout.close()
    assert second["uptime_seconds"] > first["uptime_seconds"]
    assert second["models"]["handwriting"]["requests"] > 0


@pytest.mark.server
def test_logs_show_the_last_lines_and_follow_until_the_end(served: Served) -> None:
    chain, _ = served
    lines = chain.record("serve", "logs", "--lines", "2")["lines"]
    assert len(lines) == 4
    assert lines[1] == "next: pipeline query IMAGE, pipeline web, pipeline serve stop"
    assert chain.record("serve", "logs", "--lines", "0") == {"lines": []}
    followed = state.follow_log(chain.paths)
    with chain.paths.server_log.open("a") as log:
        log.write("before\n")
        log.flush()
    aside = chain.paths.server.rename(chain.paths.server.with_suffix(".aside"))
    assert list(followed) == []  # it looks as if it had ended
    aside.rename(chain.paths.server)


def test_logs_of_no_server_say_so(chain: Chain) -> None:
    result = chain.run("serve", "logs")
    assert result.exit_code == 5
    assert "no log of a server" in error_line(result)


@pytest.mark.server
def test_the_admin_interface_needs_its_key_and_says_what_it_is_refused(served: Served) -> None:
    chain, server = served
    key = json.loads(chain.paths.server.read_text())["admin_key"]
    url = f"grpc://127.0.0.1:{server['grpc_port']}"
    with Admin(url, key, 10) as admin:
        assert admin.states() == {("handwriting", "1"): "READY"}
        with pytest.raises(PipelineError, match="refuses: .*nobody"):
            admin.load("nobody")
    with Admin(url, "guessed", 10) as guessing, pytest.raises(PipelineError, match="restricted"):
        guessing.states()
    with (
        Admin(f"grpc://127.0.0.1:{free_port()}", key, 10) as nobody,
        pytest.raises(ServerError, match="no answer from grpc"),
    ):
        nobody.states()
