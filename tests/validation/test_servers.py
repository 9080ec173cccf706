"""The gate for servers that run anywhere: right ones pass, wrong ones are told by how."""

import http.client
import json
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from pipeline.core.errors import CorruptError
from pipeline.core.files import sha256, write_bytes
from pipeline.export.runtime import onnx_predictor
from pipeline.repository import config_pbtxt
from pipeline.repository.golden import Golden, pack_golden
from pipeline.serving.serve import run_server, with_free_ports
from pipeline.serving.settings import ServeConfig
from pipeline.validation import servers
from pipeline.validation.servers import (
    ExpectedModel,
    ServerEvidence,
    describe_mismatch,
    load_expected,
    read_classes,
)
from tests.conftest import Chain, edit_json, error_line, flip_bit, link_server_environment

Served = tuple[Chain, dict[str, Any]]
Arrays = dict[str, np.ndarray]


def url_of(server: dict[str, Any], protocol: str) -> str:
    return f"{protocol}://127.0.0.1:{server[f'{protocol}_port']}"


def evidence_of(chain: Chain) -> dict[str, Any]:
    record = json.loads(chain.paths.replay.read_text())
    assert isinstance(record, dict)
    return record


@pytest.fixture
def elsewhere(tmp_path: Path) -> Chain:
    """An empty folder: another machine."""
    return Chain(tmp_path / "elsewhere")


@pytest.mark.server
def test_a_right_server_passes_and_the_evidence_names_it(served: Served, elsewhere: Chain) -> None:
    chain, server = served
    version = chain.paths.packaged / "1"
    urls = [url_of(server, "http"), url_of(server, "grpc")]
    asked = ["validate", *urls, "--golden", str(version / "golden.npz")]
    printed = elsewhere.record(*asked)
    record = evidence_of(elsewhere)
    assert printed == {key: value for key, value in record.items() if key != "schema"}
    digest = sha256(version / "model.onnx")
    assert (record["passed"], record["problems"], record["notes"]) == (True, [], [])
    assert record["protocols"] == ["http", "grpc"]
    assert record["golden"]["model_sha256"] == digest
    assert record["golden"]["sha256"] == sha256(version / "golden.npz")
    assert record["machine"]["cores"]
    assert [found["url"] for found in record["servers"]] == urls
    for found in record["servers"]:
        assert found["server"]["name"].startswith("handwriting-")
        assert found["server"]["version"] == "2.51.0"
        assert "classification" in found["server"]["extensions"]
        assert found["model"]["backend"] == "onnxruntime"
        assert (found["version"], found["sha256"]) == ("1", digest)
        assert [each["mode"] for each in found["rounds"]] == ["single", "batched", "concurrent"]
        for each in found["rounds"]:
            assert each["passed"]
            assert each["images"] >= 100
            assert each["max_ratio"] <= 1
    lines = elsewhere.run(*asked).stdout.splitlines()
    assert lines[-2:] == ["passed", f"wrote {elsewhere.paths.replay}"]
    assert sum(line.endswith("right") for line in lines) == 6


@pytest.mark.server
def test_the_packaged_release_is_held_on_the_test_split_as_well(served: Served) -> None:
    chain, server = served
    record = chain.record("validate", url_of(server, "grpc"))
    assert record["test_split"]["images"] == 10_000
    names = [row["name"] for row in record["test_split"]["rows"]]
    assert names == ["ONNX Runtime", url_of(server, "grpc")]
    assert record["golden"]["version"] == 1
    assert record["notes"] == ["http was not tested: add http://HOST:PORT"]
    assert not chain.paths.agreement.exists()  # the release's own proof is another record


@pytest.mark.server
def test_one_golden_file_in_an_empty_folder_is_enough_and_loads_no_torch(
    served: Served, tmp_path: Path
) -> None:
    chain, server = served
    shutil.copy(chain.paths.packaged / "1" / "golden.npz", tmp_path / "golden.npz")
    code = (
        "import sys; from pipeline.cli.main import main;"
        "main(sys.argv[1:], standalone_mode=False);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'onnxruntime', 'onnx')))"
    )
    asked = ["validate", url_of(server, "grpc"), "--golden", "golden.npz"]
    command = [sys.executable, "-c", code, *asked, "--evidence", "proof.json"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "proof.json").read_text())["passed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["golden.npz", "proof.json"]


def permuted(arrays: Arrays) -> None:
    arrays["outputs"] = np.roll(arrays["outputs"], 1, axis=0)


def another_network(arrays: Arrays) -> None:
    wrong = np.random.default_rng(0).dirichlet(np.ones(10), len(arrays["outputs"]))
    arrays["outputs"] = np.log(wrong)


def one_percent(arrays: Arrays) -> None:
    arrays["outputs"] *= 1.01


@pytest.mark.server
@pytest.mark.parametrize("change", [permuted, another_network, one_percent])
def test_a_server_that_answers_otherwise_fails_with_3_and_the_evidence_says_where(
    served: Served, elsewhere: Chain, tmp_path: Path, change: Callable[[Arrays], None]
) -> None:
    chain, server = served
    arrays = dict(np.load(chain.paths.packaged / "1" / "golden.npz"))
    change(arrays)
    write_bytes(tmp_path / "golden.npz", pack_golden(Golden(**arrays)))
    url = url_of(server, "grpc")
    result = elsewhere.run("validate", url, "--golden", str(tmp_path / "golden.npz"))
    assert result.exit_code == 3
    assert "is not the model of this golden set" in error_line(result)
    assert f"{url}: single: " in error_line(result)
    assert "NOT passed" in result.stdout
    record = evidence_of(elsewhere)
    assert record["passed"] is False
    for found in record["servers"][0]["rounds"]:
        worst = found["worst"][0]
        assert worst["error"] > worst["bound"]


@pytest.mark.server
def test_another_signature_digest_version_or_name_of_a_class_fails_with_3(
    served: Served, chain: Chain, elsewhere: Chain, tmp_path: Path
) -> None:
    _, server = served
    url, version = url_of(server, "http"), chain.paths.packaged / "1"
    golden = ["--golden", str(version / "golden.npz")]

    def fails(where: Chain, *options: str) -> str:
        result = where.run("validate", url, *options)
        assert result.exit_code == 3, result.output
        assert evidence_of(where)["passed"] is False
        return error_line(result)

    arrays = dict(np.load(version / "golden.npz"))
    arrays["images"] = arrays["images"][..., :27].astype(np.float32)
    write_bytes(tmp_path / "narrow.npz", pack_golden(Golden(**arrays)))
    said = fails(elsewhere, "--golden", str(tmp_path / "narrow.npz"))
    assert "images has shape [1, 28, 28], the golden set has [1, 28, 27]" in said
    assert "images has type uint8, the golden set has float32" in said

    shutil.copytree(version, chain.paths.packaged / "2")
    config = config_pbtxt.read(chain.paths.packaged / "config.pbtxt")
    config.version_policy.specific.versions[:] = [2]
    write_bytes(chain.paths.packaged / "config.pbtxt", config_pbtxt.to_text(config).encode())
    assert "serves version 1, the repository selects 2" in fails(chain)

    def edit(record: dict[str, Any]) -> None:
        record["classes"] = ["1", "0", *record["classes"][2:]]
        record["files"]["model.onnx"] = "0" * 64

    edit_json(version / "manifest.json", edit)
    said = fails(elsewhere, *golden)
    assert "serves version 1 with digest" in said
    assert "golden set of 000000000000" in said
    assert "its config calls class 0 '0' instead of '1'" in said
    assert "its label file calls class 0 '0' instead of '1'" in said


def poison(chain: Chain) -> None:
    """Package another network as if it were right: a weight off by 1 %, two labels swapped."""
    version = chain.paths.packaged / "1"
    model = onnx.load(version / "model.onnx")
    first = model.graph.initializer[0]
    weights = onnx.numpy_helper.to_array(first).copy()
    weights.flat[np.abs(weights).argmax()] *= 1.01
    first.CopyFrom(onnx.numpy_helper.from_array(weights, first.name))
    content = model.SerializeToString()
    arrays = dict(np.load(version / "golden.npz"))
    arrays["outputs"] = onnx_predictor(content)(arrays["images"]).astype(np.float64)
    digests = {
        "model.onnx": write_bytes(version / "model.onnx", content),
        "golden.npz": write_bytes(version / "golden.npz", pack_golden(Golden(**arrays))),
    }
    edit_json(version / "manifest.json", lambda record: record["files"].update(digests))
    for config in config_pbtxt.config_files(chain.paths.packaged):
        message = config_pbtxt.read(config)
        config_pbtxt.set_parameter(message, "sha256.1", digests["model.onnx"])
        write_bytes(config, config_pbtxt.to_text(message).encode())
    names = "\n".join(["1", "0", *"23456789"])
    write_bytes(chain.paths.packaged / "labels.txt", names.encode())


@pytest.mark.server
def test_one_weight_off_by_1_percent_and_swapped_labels_show_on_a_real_server(
    chain: Chain, elsewhere: Chain, made: Chain, tmp_path: Path
) -> None:
    link_server_environment(chain)
    poison(chain)
    golden = tmp_path / "golden.npz"
    shutil.copy(made.paths.packaged / "1" / "golden.npz", golden)  # without its manifest
    with run_server(chain.paths, with_free_ports(ServeConfig())) as (server, _):
        result = elsewhere.run("validate", server.http_url, "--golden", str(golden))
        own = chain.run("validate", server.grpc_url)
    assert result.exit_code == 3
    said = error_line(result)
    for mode in ("single", "batched", "concurrent"):
        assert f"{server.http_url}: {mode}: " in said
    assert "answers exceed their bounds: image" in said
    assert "its label file calls class 0 '1' instead of '0'" in said
    assert own.exit_code == 3  # the labels alone
    assert len(evidence_of(chain)["problems"]) == 1


@pytest.mark.server
def test_without_a_golden_file_the_release_has_to_be_here_and_whole(
    served: Served, chain: Chain, elsewhere: Chain
) -> None:
    _, server = served
    url = url_of(server, "grpc")
    without = elsewhere.run("validate", url)
    assert without.exit_code == 1
    assert "--golden FILE" in error_line(without)
    nobody = chain.run("validate", url, "--name", "nobody")
    assert nobody.exit_code == 1
    assert "does not serve a model 'nobody'" in error_line(nobody)
    flip_bit(chain.paths.packaged / "1" / "model.onnx")
    assert chain.run("validate", url).exit_code == 4


@contextmanager
def proxy(port: int, swaps: bool, most: int = 1_000_000) -> Iterator[str]:
    """A proxy of an HTTP server that swaps answers, or dies after `most` inferences."""
    lock, under_way, left = threading.Lock(), [0], [most]
    waiting: list[tuple[list[bytes], threading.Event]] = []

    def swapped(answer: bytes) -> bytes:
        """The answer of another request of that length where one is under way."""
        with lock:
            mine = [answer]
            if waiting and len(waiting[0][0][0]) == len(answer):
                theirs, done = waiting.pop()
                mine[0], theirs[0] = theirs[0], mine[0]
                done.set()
                return mine[0]
            if waiting or under_way[0] < 2:
                return answer
            waiting.append((mine, done := threading.Event()))
        if not done.wait(0.2):
            with lock:
                waiting[:] = [other for other in waiting if other[0] is not mine]
        return mine[0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet: two would wait for each other
        disable_nagle_algorithm = True

        def forward(self) -> None:
            is_inference = self.path.endswith("/infer")
            with lock:
                under_way[0] += is_inference
                left[0] -= is_inference
            if left[0] < 0:
                self.close_connection = True
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            answer = response.read()
            answer = swapped(answer) if swaps and is_inference else answer
            connection.close()
            with lock:
                under_way[0] -= is_inference
            self.send_response(response.status)
            for key in ("Content-Type", "Inference-Header-Content-Length"):
                if value := response.getheader(key):
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = forward

        def log_message(self, *arguments: object) -> None:
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as address:
        yield address


@contextmanager
def serving(server: socketserver.TCPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.server
def test_answers_swapped_between_clients_show_when_many_ask_at_once(
    served: Served, elsewhere: Chain
) -> None:
    chain, server = served
    golden = str(chain.paths.packaged / "1" / "golden.npz")
    with proxy(server["http_port"], swaps=True) as url:
        result = elsewhere.run("validate", url, "--golden", golden)
    assert result.exit_code == 3
    record = evidence_of(elsewhere)
    passed = {found["mode"]: found["passed"] for found in record["servers"][0]["rounds"]}
    assert passed == {"single": True, "batched": True, "concurrent": False}
    assert all(": concurrent: " in problem for problem in record["problems"])


def stale(chain: Chain) -> None:
    """Evidence of before, that says that it passed."""
    write_bytes(chain.paths.replay, b'{"schema": 1, "passed": true}')


@pytest.mark.server
def test_a_server_that_dies_on_the_way_is_5_and_nothing_says_passed(
    served: Served, elsewhere: Chain
) -> None:
    chain, server = served
    golden = str(chain.paths.packaged / "1" / "golden.npz")
    stale(elsewhere)
    asked = ["validate", url_of(server, "grpc"), "--golden", golden, "--timeout", "20"]
    with proxy(server["http_port"], swaps=False, most=150) as url:
        result = elsewhere.run(*asked, url)
    assert result.exit_code == 5, result.output
    record = evidence_of(elsewhere)
    assert record["passed"] is False
    assert "no answer from" in record["problems"][0]
    assert [found["url"] for found in record["servers"]] == [url_of(server, "grpc")]


@pytest.fixture
def golden_file(tmp_path: Path) -> Path:
    """A golden set of no network at all."""
    golden = Golden(np.zeros((2, 4), np.uint8), np.arange(2), -np.eye(2), np.full(2, 1e-4))
    write_bytes(tmp_path / "golden.npz", pack_golden(golden))
    return tmp_path / "golden.npz"


def test_a_server_that_closes_the_connection_is_5_in_a_line_and_nothing_stale_is_left(
    elsewhere: Chain, golden_file: Path
) -> None:
    class Closes(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            pass

    stale(elsewhere)
    with serving(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Closes)) as url:
        result = elsewhere.run("validate", url, "--golden", str(golden_file), "--timeout", "5")
    assert result.exit_code == 5
    assert len(error_line(result).splitlines()) == 1
    assert evidence_of(elsewhere)["passed"] is False


def test_what_cannot_be_asked_at_all_leaves_nothing_that_says_passed(
    elsewhere: Chain, golden_file: Path
) -> None:
    for url, options, code in (
        ("http://127.0.0.1:9", ["--golden", str(golden_file.parent / "none.npz")], 1),
        ("ftp://127.0.0.1:9", ["--golden", str(golden_file)], 1),
        ("http://127.0.0.1:9", ["--golden", str(golden_file)], 5),
        ("grpc://127.0.0.1:9", ["--golden", str(golden_file), "--timeout", "1"], 5),
    ):
        stale(elsewhere)
        assert elsewhere.run("validate", url, *options).exit_code == code
        assert evidence_of(elsewhere)["passed"] is False


def test_evidence_is_written_to_a_json_file_only(elsewhere: Chain, golden_file: Path) -> None:
    url = "http://127.0.0.1:9"
    result = elsewhere.run("validate", url, "--evidence", str(golden_file))
    assert result.exit_code == 1
    assert "name it FILE.json" in error_line(result)
    assert golden_file.exists()
    assert elsewhere.run("validate", "--evidence", "evidence.json").exit_code == 2
    (elsewhere.root / "folder.json").mkdir(parents=True)
    result = elsewhere.run("validate", url, "--evidence", str(elsewhere.root / "folder.json"))
    assert result.exit_code == 2


def manifest_of(golden_file: Path, **changes: Any) -> ExpectedModel:
    digests = {"golden.npz": sha256(golden_file), "model.onnx": "a" * 64}
    manifest = {"classes": ["a", "b"], "files": {**digests, **changes}}
    write_bytes(golden_file.parent / "manifest.json", json.dumps(manifest).encode())
    return load_expected(Chain(golden_file.parent).paths, {}, golden_file)


def test_the_manifest_beside_a_golden_set_says_of_which_model_it_is(golden_file: Path) -> None:
    alone = load_expected(Chain(golden_file.parent).paths, {}, golden_file)
    assert (alone.sha256, alone.version, "classes" in alone.manifest) == (None, None, False)
    with_manifest = manifest_of(golden_file)
    assert (with_manifest.sha256, with_manifest.manifest["classes"]) == ("a" * 64, ["a", "b"])
    with pytest.raises(CorruptError, match="in the manifest next to it"):
        manifest_of(golden_file, **{"golden.npz": "b" * 64})
    for strange in (b"[]", b"{", b'{"files": 1}', b'{"files": {"other": "c"}}'):
        write_bytes(golden_file.parent / "manifest.json", strange)
        assert load_expected(Chain(golden_file.parent).paths, {}, golden_file).sha256 is None


def test_the_golden_set_of_a_variant_is_of_the_variants_file(golden_file: Path) -> None:
    variant = golden_file.rename(golden_file.with_name("golden.int8.npz"))
    digests = {variant.name: sha256(variant), "model.onnx": "a" * 64, "model.int8.onnx": "b" * 64}
    write_bytes(variant.parent / "manifest.json", json.dumps({"files": digests}).encode())
    assert load_expected(Chain(variant.parent).paths, {}, variant).sha256 == "b" * 64


def test_versions_that_answer_in_turn_are_no_release(golden_file: Path) -> None:
    found = manifest_of(golden_file).version_problems(["1", "2"], None)
    assert found == ["several versions answered: 1, 2"]


def test_names_of_classes_are_compared_one_by_one() -> None:
    for names, wanted in ((("a", "b"), ("a", "b")), ((), ("a",)), (("a",), ())):
        assert describe_mismatch(names, wanted) == ""
    assert describe_mismatch(("a", "c"), ("a", "b")) == "calls class 1 'c' instead of 'b'"
    assert describe_mismatch(("a",), ("a", "b")) == "has 1 classes instead of 2"


def test_a_config_of_others_may_state_what_it_likes(golden_file: Path) -> None:
    config = config_pbtxt.ModelConfig()
    assert read_classes(config) == ()
    for text in ("a, b", "3", "null"):
        config_pbtxt.set_parameter(config, "classes", text)
        assert read_classes(config) == ()
    expected = manifest_of(golden_file)
    assert expected.mismatches(config) == ["the model has 0 inputs and 0 outputs"]
    config.input.add(name="x", dims=[-1, 4], data_type=2)
    config.output.add(name="y", dims=[-1, 2], data_type=11)
    assert expected.mismatches(config) == []  # its batch is a dimension like the others
    config.input[0].data_type = 13
    assert expected.mismatches(config) == ["x has type TYPE_STRING, the golden set has uint8"]


def test_protocols_count_with_tls_as_without() -> None:
    evidence = ServerEvidence("handwriting", 1.0)
    for url in ("https://host", "grpcs://host:8001"):
        evidence.servers.append(servers.Served(url, {"name": "a"}, {}, "1", None, (), (), ()))
    assert evidence.protocols == ("http", "grpc")
    assert evidence.notes == ()


def test_a_replay_takes_no_target(empty: Chain, tmp_path: Path) -> None:
    (tmp_path / "rows.npz").touch()
    given = ("--replay", str(tmp_path / "rows.npz"), "http://127.0.0.1:1")
    result = empty.run("validate", *given)
    assert result.exit_code == 2
    assert "give no target with it" in error_line(result)
