"""The python-based backend inside a real tritonserver, with models that are not ours."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from onnx import TensorProto, helper
from tritonclient.utils import InferenceServerException

from pipeline.benchmark.remote import RemoteBenchmark, benchmark_remote
from pipeline.benchmark.target import LoadTarget
from pipeline.client.endpoint import endpoint
from pipeline.core.errors import PipelineError
from pipeline.serving.serve import run_server, with_free_ports
from pipeline.serving.settings import ServeConfig
from pipeline.serving.tritonserver import KEY_HEADER
from tests.conftest import Chain, link_server_environment
from tests.serving.test_backend import save

pytestmark = pytest.mark.server
TENSORS = (
    'input { name: "x" data_type: TYPE_%s dims: %s } '
    'output { name: "y" data_type: TYPE_%s dims: %s }'
)
TYPES = {"FP32": TensorProto.FLOAT, "STRING": TensorProto.STRING}


class Models:
    """A running server, and the models that a test puts beside ours."""

    def __init__(self, repository: Path, address: str, key: str) -> None:
        self.repository, self.address = repository, address
        self._key = key

    def add(self, name: str, config: str, *versions: str, **tensor: Any) -> None:
        """Load a model that has an operator of ONNX as each of its versions."""
        kind, shape = TYPES[tensor.get("kind", "FP32")], tensor.get("shape", ["n", 2])
        for version, operator in enumerate(versions, 1):
            folder = self.repository / name / str(version)
            folder.mkdir(parents=True)
            nodes = [helper.make_node(operator, ["x"], ["y"])]
            save(folder / "model.onnx", nodes, [("x", kind, shape)], [("y", kind, shape)])
        text = f'name: "{name}" backend: "onnxruntime" {config}'
        (self.repository / name / "config.pbtxt").write_text(text)
        with tritonclient.grpc.InferenceServerClient(self.address) as client:
            client.load_model(name, headers={f"triton-grpc-protocol-{KEY_HEADER}": self._key})

    def ask(self, name: str, array: np.ndarray, version: str = "") -> np.ndarray:
        kind = "BYTES" if array.dtype == np.object_ else "FP32"
        tensor = tritonclient.grpc.InferInput("x", array.shape, kind)
        tensor.set_data_from_numpy(array)
        with tritonclient.grpc.InferenceServerClient(self.address) as client:
            answer = client.infer(name, [tensor], model_version=version).as_numpy("y")
        assert isinstance(answer, np.ndarray)
        return answer

    def executions(self, name: str) -> dict[str, int]:
        with tritonclient.grpc.InferenceServerClient(self.address) as client:
            stats = client.get_inference_statistics(name).model_stats
        return {of_version.version: of_version.execution_count for of_version in stats}


@pytest.fixture(scope="module")
def models(made: Chain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    chain = Chain(tmp_path_factory.mktemp("foreign") / "chain")
    shutil.copytree(made.root, chain.root, symlinks=True)
    link_server_environment(chain)
    with run_server(chain.paths, with_free_ports(ServeConfig())) as (server, _):
        address = f"127.0.0.1:{server.grpc_port}"
        yield Models(chain.paths.repository, address, server.admin_key)


def test_two_versions_with_two_instances_each_answer_as_themselves(models: Models) -> None:
    config = (
        "max_batch_size: 8 version_policy { specific { versions: [1, 2] } } "
        "instance_group { count: 2 kind: KIND_CPU } " + TENSORS % ("FP32", "2", "FP32", "2")
    )
    models.add("both", config, "Neg", "Abs")

    def ask(number: int) -> bool:
        row = np.array([[-number, number]], np.float32)
        first, second = models.ask("both", row, "1"), models.ask("both", row, "2")
        return bool((first == -row).all() and (second == abs(row)).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(40)))
    np.testing.assert_array_equal(models.ask("both", np.array([[-1, 1]], np.float32)), [[1, 1]])
    assert models.executions("both").keys() == {"1", "2"}


def test_a_config_without_tensors_is_completed(models: Models) -> None:
    models.add("plain", "", "Neg")
    np.testing.assert_array_equal(
        models.ask("plain", np.ones((4, 2), np.float32)), -np.ones((4, 2))
    )


def test_strings_come_through(models: Models) -> None:
    config = "max_batch_size: 8 " + TENSORS % ("STRING", "2", "STRING", "2")
    models.add("texts", config, "Identity", kind="STRING")
    answer = models.ask("texts", np.array([["a", "ü"]], object))
    assert [text.decode() for text in answer.flat] == ["a", "ü"]


def test_a_scalar_comes_through(models: Models) -> None:
    models.add("scalar", TENSORS % ("FP32", "1", "FP32", "1"), "Neg", shape=[])
    assert models.ask("scalar", np.array([2], np.float32)).tolist() == [-2]


def test_a_refused_load_says_why_in_the_native_words_and_names_no_folder(models: Models) -> None:
    with pytest.raises(InferenceServerException) as caught:
        models.add("bad", "max_batch_size: 8 " + TENSORS % ("FP32", "3", "FP32", "2"), "Neg")
    message = str(caught.value)
    assert (
        "tensor 'x': the model expects 2 dimensions (shape [-1,2]) but the model configuration "
        "specifies 2 dimensions (an initial batch dimension because max_batch_size > 0 followed "
        "by the explicit tensor shape, making complete shape [-1,3])" in message
    )
    assert str(models.repository) not in message
    assert "model.py" not in message


def test_a_model_of_texts_and_variable_shapes_is_measured_by_its_url(models: Models) -> None:
    config = "max_batch_size: 8 " + TENSORS % ("STRING", "-1", "STRING", "-1")
    models.add("any-texts", config, "Identity", kind="STRING", shape=["n", "m"])
    target = LoadTarget(endpoint(f"grpc://{models.address}"), "any-texts")
    with pytest.raises(PipelineError, match="give --shape x:N"):
        benchmark_remote(target, RemoteBenchmark(seconds=0.1))
    asked = RemoteBenchmark(concurrencies=(2,), seconds=0.1, shapes={"x": (3,)})
    (row,) = benchmark_remote(target, asked).rows
    assert row.joined.failed == 0
    assert row.split()["network_us"] >= 0  # 0 where the server's own times exceed the client's
