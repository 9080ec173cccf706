"""The python-based backend, beside a stand-in for Triton's own Python module."""

import ctypes
import gc
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.repository import ort_values
from tests.conftest import REPOSITORY

CPU: tuple[str, dict[str, str]] = ("CPUExecutionProvider", {})
BACKEND = REPOSITORY / "pipeline" / "serving" / "backend" / "onnxruntime" / "model.py"
PARTS = ("ort_settings", "ort_checks")  # the modules beside it
CAPSULE = ctypes.pythonapi
CAPSULE.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]
CAPSULE.PyCapsule_IsValid.argtypes = [ctypes.py_object, ctypes.c_char_p]
Config = dict[str, Any]
ZEBRA: Config = {"name": "zebra"}
OPTIONAL: Config = {"name": "scale", "data_type": "TYPE_FP32", "dims": [1], "optional": True}


class Tensor:
    """A tensor as Triton's stub has it: DLPack in the style of before version 1."""

    capsules: list[Any]  # those that from_dlpack took

    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self.array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        """Strings as bytes."""
        if self.array.dtype != np.object_:
            return self.array
        texts = [text.encode() for text in self.array.flat]
        return np.array(texts, object).reshape(self.array.shape)

    def __dlpack__(self, stream: object = None) -> Any:
        if self.array.dtype == np.object_:
            raise ValueError("DLPack does not have support for string tensors.")
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[Any, Any]:
        return self.array.__dlpack_device__()

    @classmethod
    def from_dlpack(cls, name: str, capsule: Any) -> "Tensor":
        device = (1, 0)
        taken = SimpleNamespace(__dlpack__=lambda: capsule, __dlpack_device__=lambda: device)
        tensor = cls(name, np.from_dlpack(taken))
        CAPSULE.PyCapsule_SetName(capsule, b"used_dlpack")  # Triton's own word
        cls.capsules.append(capsule)
        return tensor


class Response:
    """An answer: tensors or an error."""

    def __init__(self, output_tensors: list[Tensor] | None = None, error: Any = None) -> None:
        self.output_tensors, self.error = output_tensors or [], error

    def array(self, name: str) -> np.ndarray:
        assert self.error is None, self.error
        return next(tensor.array for tensor in self.output_tensors if tensor.name() == name)


def request(**arrays: np.ndarray) -> Any:
    tensors = [Tensor(name, array) for name, array in arrays.items()]
    return SimpleNamespace(inputs=lambda: tensors)


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The backend's module, whose model folder is version 3 of a model under tmp_path."""
    utilities: Any = ModuleType("triton_python_backend_utils")
    utilities.Tensor, utilities.InferenceResponse, utilities.TritonError = Tensor, Response, str
    utilities.log = []
    utilities.Logger = SimpleNamespace(log_error=utilities.log.append)
    utilities.get_model_dir = lambda: str(tmp_path / "repository" / "net" / "3")
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utilities)
    monkeypatch.setattr(Tensor, "capsules", [], raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path, str(BACKEND.parent)])  # as Triton has it
    monkeypatch.setitem(sys.modules, "ort_values", ort_values)  # of which a server gets a copy
    specification = importlib.util.spec_from_file_location("backend_under_test", BACKEND)
    assert specification
    assert specification.loader
    module: Any = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.ort_settings = sys.modules["ort_settings"]
    yield module
    gc.unfreeze()
    for name in PARTS:
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "repository" / "net" / "3"
    path.mkdir(parents=True)
    return path


Value = tuple[str, int, list[Any]]  # name, type, shape


def save(
    path: Path, nodes: list[Any], inputs: list[Value], outputs: list[Value], **constants: np.ndarray
) -> None:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)


@pytest.fixture
def net(folder: Path) -> Path:
    """Images (n, 1, 2, 2) of bytes to their (n, 4) halves and the (n, 1) sum of these."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["flat"]),
        helper.make_node("Div", ["flat", "two"], ["halves"]),
        helper.make_node("ReduceSum", ["halves", "axes"], ["total"]),
    ]
    save(
        folder / "model.onnx",
        nodes,
        [("images", TensorProto.UINT8, ["n", 1, 2, 2])],
        [("halves", TensorProto.FLOAT, ["n", 4]), ("total", TensorProto.FLOAT, ["n", 1])],
        two=np.array(2, np.float32),
        axes=np.array([1]),
    )
    return folder / "model.onnx"


def tensor_config(name: str, data_type: str, *dims: int, **more: Any) -> Config:
    return {"name": name, "data_type": data_type, "dims": list(dims), **more}


def config(max_batch_size: int = 64, **more: Any) -> Config:
    return {
        "name": "net",
        "max_batch_size": max_batch_size,
        "input": [tensor_config("images", "TYPE_UINT8", 1, 2, 2)],
        "output": [tensor_config("halves", "TYPE_FP32", 4), tensor_config("total", "TYPE_FP32", 1)],
        **more,
    }


def parameters(**values: str) -> Config:
    return config(parameters={name: {"string_value": value} for name, value in values.items()})


def gpu(block: Config, **values: str) -> Config:
    """A config that asks for an accelerator on a GPU."""
    accelerators = {"execution_accelerators": {"gpu_execution_accelerator": [block]}}
    return (parameters(**values) if values else config()) | {"optimization": accelerators}


def started(backend: Any, settings: Config, kind: str = "CPU") -> Any:
    model = backend.TritonPythonModel()
    model.initialize(
        {
            "model_config": json.dumps(settings),
            "model_instance_kind": kind,
            "model_instance_device_id": "0",
        }
    )
    return model


def refused(backend: Any, settings: Config, kind: str = "CPU") -> str:
    with pytest.raises(backend.LoadError) as caught:
        started(backend, settings, kind)
    return str(caught.value)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 2, 2), dtype=np.uint8)


def halves(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), 4).astype(np.float32) / 2


def counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes that the model's session is run with, as they come."""
    sizes: list[int] = []
    session = model._session

    def run(names: list[str], feeds: dict[str, np.ndarray], options: Any) -> Any:
        sizes.append(len(next(iter(feeds.values()))))
        return session.run(names, feeds, options)

    monkeypatch.setattr(model, "_session", SimpleNamespace(run=run))
    return sizes


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
@pytest.mark.usefixtures("net")
def test_a_request_gets_the_models_answer(backend: Any, batch_size: int) -> None:
    images = pictures(batch_size)
    [answer] = started(backend, config()).execute([request(images=images)])
    np.testing.assert_array_equal(answer.array("halves"), halves(images))
    np.testing.assert_array_equal(answer.array("total"), halves(images).sum(1, keepdims=True))


@pytest.mark.usefixtures("net")
def test_requests_of_one_shape_run_as_one_batch_and_get_their_own_rows(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = started(backend, config())
    sizes = counted(model, monkeypatch)
    asked = [pictures(count, seed=count) for count in (1, 3, 2)]
    answers = model.execute([request(images=images) for images in asked])
    assert sizes == [6]
    for images, answer in zip(asked, answers, strict=True):
        np.testing.assert_array_equal(answer.array("halves"), halves(images))


@pytest.mark.usefixtures("net")
def test_a_request_of_another_shape_fails_alone(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = started(backend, config())
    sizes = counted(model, monkeypatch)
    wide = request(images=np.zeros((1, 1, 3, 3), np.uint8))
    first, bad, last = model.execute(
        [request(images=pictures(1)), wide, request(images=pictures(2))]
    )
    assert sizes == [3, 1]
    assert first.array("halves").shape == (1, 4)
    assert last.array("halves").shape == (2, 4)
    assert bad.error.startswith("onnx runtime error 2: Got invalid dimensions for input: images")


def test_a_request_that_the_model_chokes_on_fails_alone(backend: Any, folder: Path) -> None:
    save(
        folder / "model.onnx",
        [helper.make_node("Gather", ["table", "index"], ["value"])],
        [("index", TensorProto.INT64, ["n", 1])],
        [("value", TensorProto.FLOAT, ["n", 1])],
        table=np.arange(5, dtype=np.float32),
    )
    settings = config(
        input=[tensor_config("index", "TYPE_INT64", 1)],
        output=[tensor_config("value", "TYPE_FP32", 1)],
    )
    requests = [request(index=np.array([[index]])) for index in (1, 99, 3)]
    one, bad, three = started(backend, settings).execute(requests)
    assert (one.array("value").item(), three.array("value").item()) == (1.0, 3.0)
    assert "out of data bounds" in bad.error
    assert any("out of data bounds" in line for line in backend.pb_utils.log)


@pytest.mark.usefixtures("net")
def test_a_request_that_cannot_be_read_fails_alone(backend: Any) -> None:
    def unreadable() -> list[Tensor]:
        raise RuntimeError(f"no memory at {BACKEND}, line 1\nor so")

    requests = [SimpleNamespace(inputs=unreadable), request(images=pictures(1))]
    bad, good = started(backend, config()).execute(requests)
    assert bad.error == "no memory at model.py, line 1 or so"
    np.testing.assert_array_equal(good.array("halves"), halves(pictures(1)))


def test_a_model_that_mixes_its_batch_answers_each_request_alone(
    backend: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(
        folder / "model.onnx",
        [helper.make_node("Unique", ["x"], ["y"], axis=0)],
        [("x", TensorProto.FLOAT, ["n", 2])],
        [("y", TensorProto.FLOAT, ["m", 2])],
    )
    settings = config(
        input=[tensor_config("x", "TYPE_FP32", 2)], output=[tensor_config("y", "TYPE_FP32", 2)]
    )
    model = started(backend, settings)
    sizes = counted(model, monkeypatch)
    rows = [np.ones((1, 2), np.float32)] * 2
    answers = model.execute([request(x=row) for row in rows])
    assert sizes == [2, 1, 1]
    for row, answer in zip(rows, answers, strict=True):
        np.testing.assert_array_equal(answer.array("y"), row)


def unary(folder: Path, kind: int, shape: list[Any], operator: str = "Identity") -> None:
    node = helper.make_node(operator, ["x"], ["y"])
    save(folder / "model.onnx", [node], [("x", kind, shape)], [("y", kind, shape)])


def unary_config(data_type: str, *dims: int, max_batch_size: int = 8) -> Config:
    return config(
        max_batch_size,
        input=[tensor_config("x", data_type, *dims)],
        output=[tensor_config("y", data_type, *dims)],
    )


def test_a_model_without_batches_runs_each_request_alone(
    backend: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unary(folder, TensorProto.FLOAT, [2, 3], "Neg")
    model = started(backend, unary_config("TYPE_FP32", 2, 3, max_batch_size=0))
    sizes = counted(model, monkeypatch)
    arrays = [np.full((2, 3), value, np.float32) for value in (1, 2)]
    answers = model.execute([request(x=array) for array in arrays])
    assert sizes == [2, 2]  # the lengths of the first dimension, which is no batch here
    for array, answer in zip(arrays, answers, strict=True):
        np.testing.assert_array_equal(answer.array("y"), -array)


@pytest.mark.parametrize(
    ("dtype", "data_type"),
    [("bool", "BOOL"), ("float16", "FP16"), ("float32", "FP32"), ("float64", "FP64")]
    + [
        (f"{sign}int{bits}", f"{sign}int{bits}".upper())
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    ],
)
def test_arrays_of_every_numeric_type_pass_unchanged(
    backend: Any, folder: Path, dtype: str, data_type: str
) -> None:
    unary(folder, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), ["n", 3])
    array = np.array([[0, 1, 1], [1, 0, 1]], dtype)
    model = started(backend, unary_config(f"TYPE_{data_type}", 3))
    [answer] = model.execute([request(x=array)])
    assert answer.array("y").dtype == array.dtype
    np.testing.assert_array_equal(answer.array("y"), array)


@pytest.mark.usefixtures("net")
def test_output_capsules_are_marked_as_taken_in_the_word_that_numpy_knows(backend: Any) -> None:
    started(backend, config()).execute([request(images=pictures(1))])
    assert len(Tensor.capsules) == 2
    for capsule in Tensor.capsules:
        assert CAPSULE.PyCapsule_IsValid(capsule, b"used_dltensor")


@pytest.mark.usefixtures("net")
def test_only_the_outputs_that_the_config_names_are_computed(backend: Any) -> None:
    settings = config(output=[tensor_config("total", "TYPE_FP32", 1)])
    [answer] = started(backend, settings).execute([request(images=pictures(1))])
    assert [tensor.name() for tensor in answer.output_tensors] == ["total"]


@pytest.mark.usefixtures("net")
def test_finalize_lets_the_session_go(backend: Any) -> None:
    model = started(backend, config())
    model.finalize()
    assert model._session is None


@pytest.mark.usefixtures("net")
def test_a_load_error_is_one_line_with_neither_traceback_nor_folder(
    backend: Any, tmp_path: Path, net: Path
) -> None:
    net.write_bytes(net.read_bytes()[:100])
    with pytest.raises(backend.LoadError) as caught:
        started(backend, config())
    assert str(caught.value).startswith("unable to load model 'net', onnx runtime error 7: ")
    assert str(tmp_path) not in str(caught.value)
    assert "\n" not in str(caught.value)
    # Only frames above initialize: Triton would show a client the file of any below.
    assert all(entry.path != BACKEND for entry in caught.traceback)


@pytest.mark.usefixtures("folder")
def test_a_version_without_its_model_file_is_refused(backend: Any) -> None:
    assert refused(backend, config()) == "unable to load model 'net', unable to find '3/model.onnx'"


def test_the_config_can_name_another_file(backend: Any, net: Path) -> None:
    net.rename(net.with_name("net.onnx"))
    started(backend, config(default_model_filename="net.onnx"))
    assert "'3/other.onnx'" in refused(backend, config(default_model_filename="other.onnx"))


def test_a_folder_model_onnx_holds_the_model(backend: Any, net: Path) -> None:
    content = net.read_bytes()
    net.unlink()
    net.mkdir()
    (net / "model.onnx").write_bytes(content)
    started(backend, config())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"input": [tensor_config("image", "TYPE_UINT8", 1, 2, 2)]},
            "unexpected inference input 'image', allowed inputs are: images",
        ),
        (
            {"output": [tensor_config("half", "TYPE_FP32", 4)]},
            "unexpected inference output 'half', allowed outputs are: halves, total",
        ),
        ({"input": []}, "configuration expects 0 inputs, model provides 1"),
        (
            {"input": [tensor_config("images", "TYPE_FP32", 1, 2, 2)]},
            "configuration expects datatype TYPE_FP32 for input 'images', "
            "model provides TYPE_UINT8",
        ),
        (
            {"input": [tensor_config("images", "TYPE_UINT8", 1, 2, 3)]},
            "the model expects 4 dimensions (shape [-1,1,2,2]) but the model configuration "
            "specifies 4 dimensions (an initial batch dimension because max_batch_size > 0 "
            "followed by the explicit tensor shape, making complete shape [-1,1,2,3])",
        ),
        ({"output": [tensor_config("halves", "TYPE_FP32", -1)]}, "complete shape [-1,-1])"),
        (
            {"max_batch_size": 0},
            "the model expects 4 dimensions (shape [-1,1,2,2]) but the model configuration "
            "specifies 3 dimensions (shape [1,2,2])",
        ),
        (
            {"input": [tensor_config("images", "TYPE_UINT8", 1, 2, 2, allow_ragged_batch=True)]},
            "the python-based backend does not support allow_ragged_batch",
        ),
        (
            {"sequence_batching": {"direct": {}}},
            "the python-based backend does not support sequence_batching",
        ),
        (
            {
                "optimization": {
                    "execution_accelerators": {"cpu_execution_accelerator": [{"name": "openvino"}]}
                }
            },
            "ONNX Runtime has no OpenVINOExecutionProvider here",
        ),
        (
            {"optimization": {"execution_accelerators": {"cpu_execution_accelerator": [ZEBRA]}}},
            "unknown Execution Accelerator 'zebra' is requested",
        ),
        (
            {"input": [tensor_config("images", "TYPE_UINT8", 1, 2, 2), OPTIONAL]},
            "optional input 'scale' is not supported for models that support batching",
        ),
    ],
)
@pytest.mark.usefixtures("net")
def test_a_config_that_is_not_the_models_is_refused_in_the_native_words(
    backend: Any, changed: Config, message: str
) -> None:
    line = refused(backend, config() | changed)
    assert line.startswith("unable to load model 'net', ")
    assert line.endswith(message)
    if "input" not in changed or changed["input"]:  # else it would be filled in
        with pytest.raises(backend.LoadError) as caught:
            completed(backend, config() | changed)
        assert str(caught.value) == line  # before any instance starts


def test_a_fixed_batch_is_refused_when_batches_are_asked_for(backend: Any, folder: Path) -> None:
    unary(folder, TensorProto.FLOAT, [2, 3])
    line = refused(backend, unary_config("TYPE_FP32", 3))
    assert line.endswith(
        "tensor 'x': for the model to support batching the shape should have at least 1 dimension "
        "and the first dimension must be -1; but shape expected by the model is [2,3]"
    )


def test_strings_pass_as_text(backend: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules["ort_checks"].DATA_TYPES, "tensor(string)", "TYPE_STRING")
    unary(folder, TensorProto.STRING, ["n", 2])
    model = started(backend, unary_config("TYPE_STRING", 2))
    answers = model.execute([request(x=np.array([["a", "ü"]], object)) for _ in range(2)])
    for answer in answers:
        assert answer.array("y").tolist() == [["a", "ü"]]


def test_strings_are_refused_beside_a_numpy_that_triton_cannot_hand_them_to(
    backend: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules["ort_checks"].DATA_TYPES, "tensor(string)", raising=False)
    unary(folder, TensorProto.STRING, ["n", 3])
    line = refused(backend, unary_config("TYPE_STRING", 3))
    assert line.endswith("unsupported datatype tensor(string) of tensor 'x'")


def test_a_type_that_numpy_lacks_is_refused(backend: Any, folder: Path) -> None:
    unary(folder, TensorProto.BFLOAT16, ["n", 3])
    line = refused(backend, unary_config("TYPE_BF16", 3))
    assert line.endswith("unsupported datatype tensor(bfloat16) of tensor 'x'")


def test_a_scalar_has_one_dim_of_1_in_the_config(backend: Any, folder: Path) -> None:
    unary(folder, TensorProto.FLOAT, [], "Neg")
    model = started(backend, unary_config("TYPE_FP32", 1, max_batch_size=0))
    [answer] = model.execute([request(x=np.array([2], np.float32))])
    assert answer.array("y").tolist() == [-2]
    empty = {"name": "net", "max_batch_size": 0, "input": [], "output": []}
    assert completed(backend, empty) == unary_config("TYPE_FP32", 1, max_batch_size=0)
    line = refused(backend, unary_config("TYPE_FP32", 2, max_batch_size=0))
    assert line.endswith(
        "scalar tensor 'x', should only provide 1 in the model configuration when the model "
        "doesn't support batching. Model configuration provided: [2]."
    )
    assert "but shape expected by the model is []" in refused(
        backend, unary_config("TYPE_FP32", 1, max_batch_size=8)
    )


def test_an_input_with_a_default_may_be_optional_and_left_out(backend: Any, folder: Path) -> None:
    values: list[Value] = [("x", TensorProto.FLOAT, [2]), ("scale", TensorProto.FLOAT, [1])]
    save(
        folder / "model.onnx",
        [helper.make_node("Mul", ["x", "scale"], ["y"])],
        values,
        [("y", TensorProto.FLOAT, [2])],
        scale=np.array([3], np.float32),
    )
    settings = unary_config("TYPE_FP32", 2, max_batch_size=0)
    settings["input"].append(OPTIONAL)
    model = started(backend, settings)
    x = np.array([1, 2], np.float32)
    usual, other = model.execute([request(x=x), request(x=x, scale=np.array([5], np.float32))])
    assert usual.array("y").tolist() == [3, 6]
    assert other.array("y").tolist() == [5, 10]


def test_inputs_are_told_apart_by_name_whatever_their_order(backend: Any, folder: Path) -> None:
    values: list[Value] = [(name, TensorProto.FLOAT, ["n", 2]) for name in ("a", "b")]
    save(
        folder / "model.onnx",
        [helper.make_node("Sub", ["a", "b"], ["y"])],
        values,
        [("y", TensorProto.FLOAT, ["n", 2])],
    )
    settings = config(
        input=[tensor_config(name, "TYPE_FP32", 2) for name in ("a", "b")],
        output=[tensor_config("y", "TYPE_FP32", 2)],
    )
    ones = np.ones((1, 2), np.float32)
    asked = [request(a=5 * ones, b=ones), request(b=2 * ones, a=ones)]
    one, other = started(backend, settings).execute(asked)
    assert (one.array("y").tolist(), other.array("y").tolist()) == ([[4, 4]], [[-1, -1]])


@pytest.mark.usefixtures("net")
def test_the_arena_can_be_told_to_shrink_after_each_run(backend: Any) -> None:
    settings = parameters(
        **{
            "memory.enable_memory_arena_shrinkage": "cpu:0",
            "session.use_device_allocator_for_initializers": "1",
        }
    )
    model = started(backend, settings)
    key = "memory.enable_memory_arena_shrinkage"
    assert model._run_options.get_run_config_entry(key) == "cpu:0"
    [answer] = model.execute([request(images=pictures(1))])
    np.testing.assert_array_equal(answer.array("halves"), halves(pictures(1)))
    options = backend.ort_settings.make_session_options(settings)
    key = "session.use_device_allocator_for_initializers"
    assert options.get_session_config_entry(key) == "1"


@pytest.mark.usefixtures("net")
def test_a_library_of_operators_that_is_not_there_is_refused(backend: Any) -> None:
    settings = config(model_operations={"op_library_filename": ["/opt/somewhere/zebra.so"]})
    line = refused(backend, settings)
    assert "zebra.so" in line
    assert "somewhere" not in line


def test_an_input_may_be_narrower_than_the_models_and_an_output_may_not(
    backend: Any, folder: Path
) -> None:
    unary(folder, TensorProto.FLOAT, ["n", "width"])
    settings = unary_config("TYPE_FP32", -1)
    settings["input"][0]["dims"] = [5]
    started(backend, settings)
    settings["output"][0]["dims"] = [5]
    assert "tensor 'y': the model expects 2 dimensions (shape [-1,-1])" in refused(
        backend, settings
    )


def test_dims_are_compared_as_reshaped(backend: Any, folder: Path) -> None:
    unary(folder, TensorProto.FLOAT, ["n"])
    settings = unary_config("TYPE_FP32", 1)
    for tensor in settings["input"] + settings["output"]:
        tensor["reshape"] = {"shape": []}
    started(backend, settings)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("intra_op_thread_count", "many", "failed to convert 'many' to integral number"),
        ("inter_op_thread_count", "", "failed to convert '' to integral number"),
        ("inter_op_thread_count", "\u0663", "failed to convert '\u0663' to integral number"),
        ("execution_mode", "9" * 5000, "is too large: the native backend aborts the server"),
        ("execution_mode", "2", "Expected values for execution_mode are 0 or 1 but got 2 ."),
        ("enable_mem_arena", "maybe", "failed to convert 'maybe' to boolean"),
    ],
)
@pytest.mark.usefixtures("net")
def test_a_parameter_that_is_no_number_or_switch_is_refused(
    backend: Any, name: str, value: str, message: str
) -> None:
    assert refused(backend, parameters(**{name: value})).endswith(message)


def test_parameters_become_session_options_and_unknown_ones_are_ignored(backend: Any) -> None:
    options = backend.ort_settings.make_session_options(
        parameters(
            intra_op_thread_count="3",
            inter_op_thread_count="2",
            execution_mode="1",
            enable_mem_arena="OFF",
            enable_mem_pattern="false",
            zebra="yes",
        )
    )
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 2)
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_PARALLEL
    assert not options.enable_cpu_mem_arena
    assert not options.enable_mem_pattern


@pytest.mark.parametrize(
    ("text", "threads"),
    [("2 threads", 2), ("1.5", 1), ("0x2", 0), (" \t+3", 3), ("2\n", 2), ("-4", 0), ("007", 7)],
)
def test_a_number_is_read_as_far_as_it_goes(backend: Any, text: str, threads: int) -> None:
    options = backend.ort_settings.make_session_options(
        parameters(intra_op_thread_count=text, execution_mode="1x")
    )
    assert options.intra_op_num_threads == threads
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_PARALLEL


def test_an_absolute_file_name_is_one_in_the_version_folder(backend: Any, net: Path) -> None:
    line = refused(backend, config(default_model_filename=str(net)))
    assert line == f"unable to load model 'net', unable to find '3{net}'"
    started(backend, config(default_model_filename="/model.onnx"))


@pytest.mark.parametrize(
    ("level", "name"), [(-1, "BASIC"), (0, "ALL"), (1, "EXTENDED"), (2, "DISABLE_ALL")]
)
def test_the_graph_level_is_the_native_backends(backend: Any, level: int, name: str) -> None:
    options = backend.ort_settings.make_session_options(
        config(optimization={"graph": {"level": level}})
    )
    assert options.graph_optimization_level.name.endswith(name)


def test_an_instance_on_a_gpu_asks_for_cuda_with_the_configs_settings(backend: Any) -> None:
    settings = parameters(cudnn_conv_algo_search="1", gpu_mem_limit="1000")
    block = {"name": "cuda", "parameters": {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}}
    settings["optimization"] = {"execution_accelerators": {"gpu_execution_accelerator": [block]}}
    options = {
        "use_tf32": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "gpu_mem_limit": "1000",
        # As in the native backend, these are set as soon as there is any parameter.
        "arena_extend_strategy": "kNextPowerOfTwo",
        "do_copy_in_default_stream": "1",
        "device_id": "1",
    }
    assert backend.choose_providers(settings, "GPU", "1") == [
        ("CUDAExecutionProvider", options),
        CPU,
    ]
    assert backend.choose_providers(settings, "CPU", "0") == [CPU]
    del settings["parameters"]
    ((_, of_block), _) = backend.choose_providers(settings, "GPU", "1")
    assert of_block == {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT", "device_id": "1"}


@pytest.mark.parametrize(
    ("block", "values", "message"),
    [
        (ZEBRA, {}, "unknown Execution Accelerator 'zebra' is requested"),
        (
            {"name": "cuda", "parameters": {"do_copy_in_default_stream": "maybe"}},
            {},
            "failed to convert 'maybe' to boolean",
        ),
        (
            {"name": "cuda"},
            {"cudnn_conv_algo_search": "3"},
            "unsupported cudnn_conv_algo_search value '3' is requested",
        ),
        (
            {"name": "tensorrt", "parameters": {"precision_mode": "INT4"}},
            {},
            "unsupported precision mode 'INT4' is requested",
        ),
        (
            {"name": "tensorrt", "parameters": {"trt_zebra": "1"}},
            {},
            "unknown parameter 'trt_zebra' is provided for TensorRT Execution Accelerator",
        ),
        (
            {"name": "tensorrt", "parameters": {"trt_dla_core": "one"}},
            {},
            "failed to convert 'one' to integral number",
        ),
        (
            {"name": "tensorrt", "parameters": {"trt_engine_cache_enable": "on"}},
            {},
            'Failed to parse value: "on"',
        ),
        (
            {"name": "tensorrt", "parameters": {"max_workspace_size_bytes": "1 GB"}},
            {},
            'Failed to parse value: "1 GB"',
        ),
    ],
)
@pytest.mark.usefixtures("net")
def test_an_accelerator_of_a_gpu_is_refused_in_the_native_words_and_ignored_on_a_cpu(
    backend: Any, block: Config, values: dict[str, str], message: str
) -> None:
    settings = gpu(block, **values)
    assert refused(backend, settings, kind="GPU") == f"unable to load model 'net', {message}"
    with pytest.raises(backend.LoadError, match=message.replace("'", ".")):
        completed(backend, settings | {"instance_group": [{"kind": "KIND_GPU"}]})
    started(backend, settings, kind="CPU")


def test_tensorrt_comes_before_cuda_with_its_settings_in_onnx_runtimes_words(backend: Any) -> None:
    asked = {
        "precision_mode": "FP16",
        "max_workspace_size_bytes": "1000",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": "cache",
        "int8_use_native_calibration_table": "false",
        "trt_profile_min_shapes": "images:1x1x28x28",
        "trt_profile_max_shapes": "",
    }
    block = {"name": "tensorrt", "parameters": asked}
    (name, options), cuda, cpu = backend.choose_providers(gpu(block), "GPU", "1")
    assert (name, cuda[0], cpu) == ("TensorrtExecutionProvider", "CUDAExecutionProvider", CPU)
    assert options == {
        "trt_fp16_enable": "True",
        "trt_max_workspace_size": "1000",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": "cache",
        "trt_int8_use_native_calibration_table": "False",
        "trt_profile_min_shapes": "images:1x1x28x28",
        "device_id": "1",
    }


@pytest.mark.usefixtures("net")
def test_a_provider_that_onnx_runtime_was_built_without_is_refused_before_any_instance_starts(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = {"get_available_providers": lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]}
    monkeypatch.setattr(
        backend.ort_settings, "onnxruntime", SimpleNamespace(**vars(onnxruntime) | built)
    )
    settings = gpu({"name": "tensorrt"}) | {"instance_group": [{"kind": "KIND_GPU"}]}
    with pytest.raises(backend.LoadError) as caught:
        completed(backend, settings)
    assert str(caught.value).endswith("ONNX Runtime has no TensorrtExecutionProvider here")
    assert refused(backend, settings, kind="GPU") == str(caught.value)


@pytest.mark.usefixtures("net")
def test_a_session_never_falls_back_to_another_provider_later(backend: Any) -> None:
    assert not started(backend, config())._session._enable_fallback


@pytest.mark.usefixtures("net")
def test_a_provider_that_does_not_start_fails_the_load(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_the_cpu(path: str, options: Any, *_: Any, **__: Any) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])

    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    fallen_back = {"InferenceSession": on_the_cpu, "get_available_providers": lambda: names}
    monkeypatch.setattr(
        backend.ort_settings, "onnxruntime", SimpleNamespace(**vars(onnxruntime) | fallen_back)
    )
    line = refused(backend, config(), kind="GPU")
    assert line == "unable to load model 'net', ONNX Runtime cannot start its CUDAExecutionProvider"


def test_an_error_is_cut_to_one_short_line_without_folders(backend: Any) -> None:
    text = (
        "Load model from /a b/net/3/model.onnx failed:\n /src/core/graph.cc:12 bad 1/2 of\t'/x/y z'"
    )
    backend.pb_utils.get_model_dir = lambda: "/a b/net/3"
    assert backend.shorten(ValueError(text)) == (
        "Load model from model.onnx failed: graph.cc:12 bad 1/2 of 'y z'"
    )
    assert len(backend.shorten(ValueError("long " * 1000))) == backend.MESSAGE_LENGTH


def completed(backend: Any, settings: Config) -> Config:
    triton = SimpleNamespace(as_dict=lambda: settings)
    assert backend.TritonPythonModel.auto_complete_config(triton) is triton
    return settings


@pytest.mark.usefixtures("net")
def test_auto_complete_fills_in_tensors_and_batching(backend: Any) -> None:
    settings = completed(backend, {"name": "net", "max_batch_size": 0, "input": [], "output": []})
    assert settings == config(4, dynamic_batching={})


@pytest.mark.usefixtures("net")
def test_auto_complete_keeps_what_the_config_says(backend: Any) -> None:
    inputs = [tensor_config("images", "TYPE_UINT8", 1, 2, 2, format="FORMAT_NCHW")]
    settings = completed(backend, config(1, input=inputs, output=[]))
    assert settings == config(1, input=inputs)


@pytest.mark.usefixtures("net")
def test_auto_complete_leaves_a_complete_config_alone(backend: Any) -> None:
    assert completed(backend, config()) == config()


def test_auto_complete_finds_that_a_model_has_no_batches(backend: Any, folder: Path) -> None:
    unary(folder, TensorProto.FLOAT, [2, "width"])
    empty = {"name": "net", "max_batch_size": 0, "input": [], "output": []}
    assert completed(backend, empty) == unary_config("TYPE_FP32", 2, -1, max_batch_size=0)


def test_auto_complete_reshapes_a_tensor_without_dims(backend: Any, folder: Path) -> None:
    unary(folder, TensorProto.INT64, ["n"])
    settings = completed(backend, {"name": "net", "max_batch_size": 2, "input": [], "output": []})
    assert settings["output"] == [tensor_config("y", "TYPE_INT64", 1, reshape={"shape": []})]
    started(backend, settings)


def test_auto_complete_refuses_batches_of_a_model_that_has_none(backend: Any, folder: Path) -> None:
    unary(folder, TensorProto.FLOAT, [2, 3])
    with pytest.raises(backend.LoadError) as caught:
        completed(backend, {"name": "net", "max_batch_size": 8, "input": [], "output": []})
    assert str(caught.value) == (
        "unable to load model 'net', autofill failed for model 'net': model does not support "
        "batching while non-zero max_batch_size is specified"
    )
    assert all(entry.path != BACKEND for entry in caught.traceback)
