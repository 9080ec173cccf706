"""Triton's `onnxruntime` backend in Python, for a server without the native one.

Triton runs this file in one process per model instance (a "python-based backend"), so a repository
with `backend: "onnxruntime"` loads unchanged, and what the native backend refuses is refused with
the same messages: see ort_settings.py for its settings, ort_checks.py for its checks. Arrays are
passed as DLPack in both directions: with numpy 2, Triton 24.10's `as_numpy` and `Tensor` pass wrong
numbers without an error.
"""

import ctypes
import gc
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import ort_checks
import triton_python_backend_utils as pb_utils
from ort_settings import Config, LoadError, choose_providers, make_run_options, open_session

onnxruntime.disable_telemetry_events()  # no data of a user leaves the machine

MESSAGE_LENGTH = 500  # characters of an error that a client receives, at most

Columns = dict[str, list[np.ndarray]]  # each input's arrays, one for each request

set_capsule_name = ctypes.pythonapi.PyCapsule_SetName
set_capsule_name.argtypes = [ctypes.py_object, ctypes.c_char_p]


class TritonPythonModel:
    """One instance of a model's version. Triton defines the four public methods."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Fill in what the config leaves open; raise LoadError as `initialize` would.

        Checks belong here: in Triton 24.10, a model that fails in `initialize` can hang the server
        for 20 seconds, or crash it.
        """
        try:
            run_step(ort_checks.complete_config, auto_complete_model_config.as_dict())
        except LoadError as error:
            error.__traceback__ = None  # or Triton appends our file and line to the message
            raise  # without an argument: any other form starts a new traceback
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model, or refuse it with LoadError as the native backend does."""
        try:
            run_step(self._open, json.loads(args["model_config"]), args)
        except LoadError as error:
            error.__traceback__ = None  # as above
            raise
        gc.freeze()  # imported modules stay: the collector need not scan them again

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request; requests of the same shape run as one batch."""
        columns = self._collect_columns(requests)
        return self._answer(columns) if columns else self._answer_groups(requests)

    def finalize(self) -> None:
        """Release the session: its memory and its threads."""
        self._session = None

    def _open(self, config: Config, args: dict[str, str]) -> None:
        kind, device = args["model_instance_kind"], args["model_instance_device_id"]
        self._session = open_session(config, choose_providers(config, kind, device))
        self._run_options = make_run_options(config)
        ort_checks.check_config(config, self._session)
        self._batching = config["max_batch_size"] > 0
        self._outputs = [output["name"] for output in config["output"]]
        self._input = config["input"][0]["name"] if len(config["input"]) == 1 else None
        # A scalar has one dim in the config, because Triton requires one, and none in the model.
        tensors = [*self._session.get_inputs(), *self._session.get_outputs()]
        self._scalars = {tensor.name for tensor in tensors if not tensor.shape}
        self._dims = {output["name"]: output["dims"] for output in config["output"]}

    def _collect_columns(self, requests: list[Any]) -> Columns | None:
        """Return the columns in the usual, fast case (one batched input, one shape), else None."""
        if not (self._batching and self._input):
            return None
        try:
            arrays = [np.from_dlpack(request.inputs()[0]) for request in requests]
        except Exception:  # _answer_groups finds which request caused it
            return None
        is_alike = len({array.shape[1:] for array in arrays}) == 1
        return {self._input: arrays} if is_alike else None

    def _answer_groups(self, requests: list[Any]) -> list[Any]:
        """Answer requests of any inputs and shapes; one that fails does not affect the others."""
        answers: list[Any] = [None] * len(requests)
        groups: dict[Any, tuple[list[int], Columns]] = {}
        for index, request in enumerate(requests):
            try:
                feeds = {tensor.name(): _from_triton(tensor) for tensor in request.inputs()}
            except Exception as error:  # of any kind: the other requests continue
                answers[index] = refuse(error)
                continue
            shapes = frozenset((name, array.shape[1:]) for name, array in feeds.items())
            members, columns = groups.setdefault(shapes if self._batching else index, ([], {}))
            members.append(index)
            for name, array in feeds.items():
                columns.setdefault(name, []).append(array)
        for members, columns in groups.values():
            for index, answer in zip(members, self._answer(columns), strict=True):
                answers[index] = answer
        return answers

    def _answer(self, columns: Columns) -> list[Any]:
        count = len(next(iter(columns.values())))
        try:
            return self._run(columns)
        except Exception as error:  # a client gets one line, and the server continues
            if count == 1:
                return [refuse(error)]
        # Run each request alone, to find those that fail.
        every = (
            {name: [arrays[index]] for name, arrays in columns.items()} for index in range(count)
        )
        return [self._answer(alone)[0] for alone in every]

    def _run(self, columns: Columns) -> list[Any]:
        feeds = {
            name: arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
            for name, arrays in columns.items()
        }
        for name in self._scalars & feeds.keys():
            feeds[name] = feeds[name].reshape(())
        arrays = self._session.run(self._outputs, feeds, self._run_options)
        sizes = [len(array) for array in next(iter(columns.values()))]
        if len(sizes) > 1 and any(len(array) != sum(sizes) for array in arrays):
            raise ValueError(f"the model does not answer a batch of {sum(sizes)} with as many rows")
        # A response for each request, from arrays with the rows of all; this code must be fast.
        outputs = []
        for name, array in zip(self._outputs, arrays, strict=True):
            whole = array.reshape(self._dims[name]) if name in self._scalars else array
            to_triton = pb_utils.Tensor if array.dtype.hasobject else _to_triton
            outputs.append((name, whole, to_triton))
        respond = pb_utils.InferenceResponse  # Triton drops outputs that were not requested
        if len(sizes) == 1:
            return [respond([to_triton(name, array) for name, array, to_triton in outputs])]
        answers, end = [], 0
        for size in sizes:
            start, end = end, end + size
            tensors = [to_triton(name, array[start:end]) for name, array, to_triton in outputs]
            answers.append(respond(tensors))
        return answers


def _from_triton(tensor: Any) -> np.ndarray:
    """Return the tensor as an array that shares its memory, or strings as a copy.

    DLPack, which shares it, has no strings.
    """
    try:
        return np.from_dlpack(tensor)
    except Exception:
        array = tensor.as_numpy()
        if array.dtype != np.object_:
            raise
    return np.array([text.decode() for text in array.flat], object).reshape(array.shape)


def _to_triton(name: str, array: np.ndarray) -> Any:
    """Return the array as Triton's tensor that shares its memory."""
    capsule = array.__dlpack__()
    tensor = pb_utils.Tensor.from_dlpack(name, capsule)
    # Triton marks the capsule as used with its own name. With any name but DLPack's, numpy reports
    # an error when the capsule is deleted, and numpy 1.26 crashes.
    set_capsule_name(capsule, b"used_dltensor")
    return tensor


def refuse(error: Exception) -> Any:
    """Log the error; return the response that tells the client why there is no answer."""
    pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(shorten(error)))


def shorten(error: Exception) -> str:
    """Return the error in the native backend's form, with file names without folders."""
    text = re.sub(r"\[ONNXRuntimeError\] : (\d+) : \w+ : ", r"onnx runtime error \1: ", str(error))
    text = re.sub(rf"(?<![\w/]){re.escape(pb_utils.get_model_dir())}/", "", text)
    text = re.sub(r"(?<![\w./])/(?:[^\s/'\":]+/)+", "", text)
    return " ".join(text.split())[:MESSAGE_LENGTH]


def run_step(step: Callable[..., None], config: Config, *more: Any) -> None:
    """Run a step of loading; raise every error as LoadError."""
    try:
        step(config, *more)
    except Exception as error:
        raise LoadError(f"unable to load model '{config['name']}', {shorten(error)}") from error
