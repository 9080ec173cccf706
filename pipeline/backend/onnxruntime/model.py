"""Triton's `onnxruntime` backend in Python, for a server that has no native one.

Triton runs this file in one process per model instance (a "python-based backend"), so an unchanged
`backend: "onnxruntime"` repository loads, and what the native backend refuses is refused in its
words. Arrays cross over as DLPack, both ways: beside numpy 2, Triton 24.10's `as_numpy` and
`Tensor` hand over wrong numbers without an error.
"""

import ctypes
import itertools
import json
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

onnxruntime.disable_telemetry_events()  # nothing of a user's leaves the machine

DEFAULT_MAX_BATCH_SIZE = 4  # what Triton fills in where the config leaves it open
MESSAGE_LENGTH = 500  # characters of an error that a client gets to see
DATA_TYPES = {  # ONNX Runtime's names to Triton's
    **{f"tensor(int{bits})": f"TYPE_INT{bits}" for bits in (8, 16, 32, 64)},
    **{f"tensor(uint{bits})": f"TYPE_UINT{bits}" for bits in (8, 16, 32, 64)},
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    "tensor(bool)": "TYPE_BOOL",  # no strings: DLPack does not know them
}
SWITCHES = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
CUDA_WORDS = {  # parameters that CUDA's provider takes, numbers in its words
    "cudnn_conv_algo_search": {"0": "EXHAUSTIVE", "1": "HEURISTIC", "2": "DEFAULT"},
    "arena_extend_strategy": {"0": "kNextPowerOfTwo", "1": "kSameAsRequested"},
    "gpu_mem_limit": {},
    "do_copy_in_default_stream": {},
}

Config = dict[str, Any]  # config.pbtxt as Triton's JSON
Feeds = dict[str, np.ndarray]  # one request's inputs by name
Provider = tuple[str, dict[str, str]]  # an execution provider's name and options
CPU: Provider = ("CPUExecutionProvider", {})

set_capsule_name = ctypes.pythonapi.PyCapsule_SetName
set_capsule_name.argtypes = [ctypes.py_object, ctypes.c_char_p]


class LoadError(Exception):
    """Why a model cannot be loaded, in one line that a client may see."""


class TritonPythonModel:
    """One instance of one version of a model. Triton prescribes the four public methods."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """The config with what it leaves open filled in, or a refusal as in `initialize`.

        Better here than there: in Triton 24.10 a model that fails as late as in `initialize` can
        hang the server for 20 seconds, or end it.
        """
        try:
            in_one_line(prepare, auto_complete_model_config.as_dict())
        except LoadError as error:
            error.__traceback__ = None  # else Triton appends our file and line to the message
            raise  # bare: any other way out of here begins a new traceback
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model, or refuse it as the native backend does."""
        try:
            in_one_line(self._open, json.loads(args["model_config"]), args)
        except LoadError as error:
            error.__traceback__ = None  # as above
            raise

    def execute(self, requests: list[Any]) -> list[Any]:
        """An answer to each request. Those of one shape run as one batch."""
        answers: list[Any] = [None] * len(requests)
        groups: dict[Any, dict[int, Feeds]] = {}
        for index, request in enumerate(requests):
            try:
                feeds = {tensor.name(): np.from_dlpack(tensor) for tensor in request.inputs()}
            except Exception as error:  # whatever it is, the other requests go on
                answers[index] = refusal(error)
                continue
            shapes = tuple((name, array.shape[1:]) for name, array in feeds.items())
            groups.setdefault(shapes if self._batching else index, {})[index] = feeds
        for group in groups.values():
            for index, answer in zip(group, self._answers([*group.values()]), strict=True):
                answers[index] = answer
        return answers

    def finalize(self) -> None:
        """Release the session: its memory and its threads."""
        self._session = None

    def _open(self, config: Config, args: dict[str, str]) -> None:
        kind, device = args["model_instance_kind"], args["model_instance_device_id"]
        self._session = open_session(config, providers(config, kind, device))
        check(config, self._session)
        self._batching = config["max_batch_size"] > 0
        self._outputs = [output["name"] for output in config["output"]]

    def _answers(self, group: list[Feeds]) -> list[Any]:
        try:
            return self._run(group)
        except Exception as error:  # a client gets one line, and the server goes on
            if len(group) > 1:  # alone, each shows whether it was to blame
                return [self._answers([feeds])[0] for feeds in group]
            return [refusal(error)]

    def _run(self, group: list[Feeds]) -> list[Any]:
        if len(group) == 1:
            return [self._response(self._session.run(self._outputs, group[0]))]
        batch = {name: np.concatenate([feeds[name] for feeds in group]) for name in group[0]}
        arrays = self._session.run(self._outputs, batch)
        sizes = [len(next(iter(feeds.values()))) for feeds in group]
        if any(len(array) != sum(sizes) for array in arrays):
            raise ValueError(f"the model does not answer a batch of {sum(sizes)} with as many rows")
        rows = itertools.pairwise([0, *np.cumsum(sizes).tolist()])
        return [self._response([array[start:end] for array in arrays]) for start, end in rows]

    def _response(self, arrays: list[np.ndarray]) -> Any:
        # Triton drops the outputs that this request did not ask for.
        return pb_utils.InferenceResponse([*map(_to_triton, self._outputs, arrays)])


def _to_triton(name: str, array: np.ndarray) -> Any:
    """The array as Triton's tensor, sharing its memory."""
    capsule = array.__dlpack__()
    tensor = pb_utils.Tensor.from_dlpack(name, capsule)
    # Triton marks the capsule as taken in a word of its own. With any word but DLPack's, numpy
    # complains when the capsule goes, and numpy 1.26 crashes.
    set_capsule_name(capsule, b"used_dltensor")
    return tensor


def refusal(error: Exception) -> Any:
    """The response that tells a client why there is no answer."""
    pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(one_line(error)))


def one_line(error: Exception) -> str:
    """The error in the native backend's form, its files without their folders."""
    text = re.sub(r"\[ONNXRuntimeError\] : (\d+) : \w+ : ", r"onnx runtime error \1: ", str(error))
    text = text.replace(pb_utils.get_model_dir() + "/", "")
    text = re.sub(r"(?<![\w./])/(?:[^\s/'\":]+/)+", "", text)
    return " ".join(text.split())[:MESSAGE_LENGTH]


def in_one_line(step: Callable[..., None], config: Config, *more: Any) -> None:
    """Take a step of loading; whatever goes wrong leaves as a LoadError."""
    try:
        step(config, *more)
    except Exception as error:
        raise LoadError(f"unable to load model '{config['name']}', {one_line(error)}") from error


def _parameter(config: Config, name: str, default: str) -> str:
    return str(config.get("parameters", {}).get(name, {}).get("string_value", default))


def _number(config: Config, name: str) -> int:
    value = _parameter(config, name, "0")
    if not re.fullmatch(r"\s*[+-]?\d+\s*", value):
        raise LoadError(f"failed to convert '{value}' to integral number")
    return int(value)


def _switch(config: Config, name: str) -> bool:
    value = _parameter(config, name, "on")
    if value.lower() not in SWITCHES:
        raise LoadError(f"failed to convert '{value}' to boolean")
    return SWITCHES[value.lower()]


def session_options(config: Config) -> onnxruntime.SessionOptions:
    """The config's parameters and graph level as ONNX Runtime's options."""
    mode = _number(config, "execution_mode")
    if mode not in (0, 1):
        raise LoadError(f"Expected values for execution_mode are 0 or 1 but got {mode} .")
    levels = onnxruntime.GraphOptimizationLevel
    named = {-1: levels.ORT_ENABLE_BASIC, 1: levels.ORT_ENABLE_EXTENDED, 2: levels.ORT_DISABLE_ALL}
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = named.get(level, levels.ORT_ENABLE_ALL)
    options.execution_mode = onnxruntime.ExecutionMode(mode)
    options.intra_op_num_threads = max(_number(config, "intra_op_thread_count"), 0)
    options.inter_op_num_threads = max(_number(config, "inter_op_thread_count"), 0)
    options.enable_cpu_mem_arena = _switch(config, "enable_mem_arena")
    options.enable_mem_pattern = _switch(config, "enable_mem_pattern")
    return options


def providers(config: Config, kind: str, device: str) -> list[Provider]:
    """The execution providers that the config asks for, preferred first."""
    accelerators = config.get("optimization", {}).get("execution_accelerators", {}).values()
    options: dict[str, str] = {}
    for accelerator in itertools.chain(*accelerators):
        if accelerator["name"] != "cuda":
            raise LoadError(f"unknown Execution Accelerator '{accelerator['name']}' is requested")
        options |= accelerator.get("parameters", {})
    if kind != "GPU":
        return [CPU]
    for name, words in CUDA_WORDS.items():
        value = _parameter(config, name, options.get(name, ""))
        options |= {name: words.get(value, value)} if value else {}
    return [("CUDAExecutionProvider", options | {"device_id": device}), CPU]


def open_session(config: Config, chosen: list[Provider]) -> onnxruntime.InferenceSession:
    """The model's session, on the first of the chosen providers."""
    folder = pb_utils.get_model_dir()
    path = os.path.join(folder, config.get("default_model_filename") or "model.onnx")
    if os.path.isdir(path):
        path = os.path.join(path, "model.onnx")
    if not os.path.isfile(path):
        raise LoadError(f"unable to find '{os.path.relpath(path, os.path.dirname(folder))}'")
    session = onnxruntime.InferenceSession(path, session_options(config), chosen)
    if chosen[0][0] not in session.get_providers():  # ONNX Runtime itself only warns
        raise LoadError(f"ONNX Runtime has no {chosen[0][0]} here")
    return session


def _data_type(node: onnxruntime.NodeArg) -> str:
    if node.type not in DATA_TYPES:
        raise LoadError(f"unsupported datatype {node.type} of tensor '{node.name}'")
    return DATA_TYPES[node.type]


def _shape_of(node: onnxruntime.NodeArg) -> list[int]:
    return [dim if isinstance(dim, int) else -1 for dim in node.shape]


def check(config: Config, session: onnxruntime.InferenceSession) -> None:
    """Refuse a config that does not describe the model."""
    for feature in ("sequence_batching", "batch_input", "batch_output"):
        if config.get(feature):
            raise LoadError(f"the python-based backend does not support {feature}")
    expected, provided = len(config["input"]), len(session.get_inputs())
    if expected != provided:
        raise LoadError(f"configuration expects {expected} inputs, model provides {provided}")
    for role, nodes in (("input", session.get_inputs()), ("output", session.get_outputs())):
        named = {node.name: node for node in nodes}
        for spec in config[role]:
            name = spec["name"]
            if name not in named:
                allowed = f"allowed {role}s are: {', '.join(sorted(named))}"
                raise LoadError(f"unexpected inference {role} '{name}', {allowed}")
            _check_kind(role, spec, named[name])
            _check_dims(role, spec, _shape_of(named[name]), config["max_batch_size"] > 0)


def _check_kind(role: str, spec: Config, node: onnxruntime.NodeArg) -> None:
    tensor, asked, provided = f"{role} '{node.name}'", spec["data_type"], _data_type(node)
    if asked != provided:
        what = f"configuration expects datatype {asked} for {tensor}"
        raise LoadError(f"{what}, model provides {provided}")
    if spec.get("optional") or spec.get("allow_ragged_batch") or not node.shape:
        raise LoadError(f"{tensor} is optional, ragged or a scalar, which is not supported")


def _check_dims(role: str, spec: Config, provided: list[int], is_batched: bool) -> None:
    tensor = f"tensor '{spec['name']}': "
    if is_batched and provided[0] != -1:
        raise LoadError(
            f"{tensor}for the model to support batching the shape should have at least 1 dimension "
            "and the first dimension must be -1; but shape expected by the model is "
            f"{_spelled(provided)}"
        )
    dims = spec["reshape"]["shape"] if "reshape" in spec else spec["dims"]
    full = [-1, *dims] if is_batched else [*dims]
    if len(full) != len(provided) or any(
        # An output must be the model's own, -1 included; an input may be narrower.
        ours != theirs and (role == "output" or theirs != -1)
        for ours, theirs in zip(full, provided, strict=True)
    ):
        note = (
            "an initial batch dimension because max_batch_size > 0 followed by the explicit tensor "
            "shape, making complete "
        )
        raise LoadError(
            f"{tensor}the model expects {len(provided)} dimensions (shape {_spelled(provided)}) "
            f"but the model configuration specifies {len(full)} dimensions "
            f"({note if is_batched else ''}shape {_spelled(full)})"
        )


def _spelled(shape: list[int]) -> str:
    return str(shape).replace(" ", "")


def prepare(config: Config) -> None:
    """Complete the config, and refuse it before any instance starts."""
    providers(config, "CPU", "0")
    session = open_session(config, [CPU])
    if not (config["input"] and config["output"]):
        _complete(config, session.get_inputs(), session.get_outputs())
    check(config, session)


def _complete(
    config: Config, inputs: list[onnxruntime.NodeArg], outputs: list[onnxruntime.NodeArg]
) -> None:
    if all(_shape_of(node)[:1] == [-1] for node in inputs + outputs):
        config["max_batch_size"] = config["max_batch_size"] or DEFAULT_MAX_BATCH_SIZE
        if config["max_batch_size"] > 1 and "sequence_batching" not in config:
            config.setdefault("dynamic_batching", {})
    elif config["max_batch_size"]:
        raise LoadError(
            "model does not support batching while non-zero max_batch_size is specified"
        )
    batch_dims = 1 if config["max_batch_size"] else 0
    config["input"] = config["input"] or [_described(node, batch_dims) for node in inputs]
    config["output"] = config["output"] or [_described(node, batch_dims) for node in outputs]


def _described(node: onnxruntime.NodeArg, batch_dims: int) -> Config:
    dims = _shape_of(node)[batch_dims:]
    spec = {"name": node.name, "data_type": _data_type(node)}
    # Triton wants at least one dim; the reshape takes it away again.
    return spec | ({"dims": dims} if dims else {"dims": [1], "reshape": {"shape": []}})
