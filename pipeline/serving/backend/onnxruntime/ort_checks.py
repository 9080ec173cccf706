"""Checks that a config describes its model, and defaults for what the config leaves open."""

import numpy as np
import onnxruntime
from ort_settings import CPU, Config, LoadError, choose_providers, open_session, require_present

DEFAULT_MAX_BATCH_SIZE = 4  # Triton's default
DATA_TYPES = {  # ONNX Runtime's names to Triton's
    **{f"tensor(int{bits})": f"TYPE_INT{bits}" for bits in (8, 16, 32, 64)},
    **{f"tensor(uint{bits})": f"TYPE_UINT{bits}" for bits in (8, 16, 32, 64)},
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    "tensor(bool)": "TYPE_BOOL",
}
# DLPack has no strings, and Triton's own conversion of strings needs numpy 1.
if np.lib.NumpyVersion(np.__version__) < "2.0.0":
    DATA_TYPES["tensor(string)"] = "TYPE_STRING"


def _data_type(node: onnxruntime.NodeArg) -> str:
    if node.type not in DATA_TYPES:
        raise LoadError(f"unsupported datatype {node.type} of tensor '{node.name}'")
    return DATA_TYPES[node.type]


def _shape_of(node: onnxruntime.NodeArg) -> list[int]:
    return [dim if isinstance(dim, int) else -1 for dim in node.shape]


def check_config(config: Config, session: onnxruntime.InferenceSession) -> None:
    """Raise LoadError unless the config describes the model."""
    for feature in ("sequence_batching", "batch_input", "batch_output"):
        if config.get(feature):
            raise LoadError(f"the python-based backend does not support {feature}")
    required = [spec for spec in config["input"] if not spec.get("optional")]
    expected, count = len(required), len(session.get_inputs())
    if expected != count:
        raise LoadError(f"configuration expects {expected} inputs, model provides {count}")
    inputs = session.get_inputs() + session.get_overridable_initializers()
    is_batched = config["max_batch_size"] > 0
    for role, nodes in (("input", inputs), ("output", session.get_outputs())):
        named = {node.name: node for node in nodes}
        for spec in config[role]:
            name, stated = spec["name"], spec["data_type"]
            if spec.get("optional") and is_batched:
                raise LoadError(
                    f"optional input '{name}' is not supported for models that support batching"
                )
            if spec.get("allow_ragged_batch"):
                raise LoadError("the python-based backend does not support allow_ragged_batch")
            if name not in named:
                allowed = f"allowed {role}s are: {', '.join(sorted(named))}"
                raise LoadError(f"unexpected inference {role} '{name}', {allowed}")
            provided = _data_type(named[name])
            if stated != provided:
                raise LoadError(
                    f"configuration expects datatype {stated} for {role} '{name}', model provides "
                    f"{provided}"
                )
            _check_dims(role, spec, _shape_of(named[name]), is_batched)


def _check_dims(role: str, spec: Config, provided: list[int], is_batched: bool) -> None:
    dims = spec["reshape"]["shape"] if "reshape" in spec else spec["dims"]
    tensor = f"tensor '{spec['name']}'"
    if is_batched and provided[:1] != [-1]:
        raise LoadError(
            f"{tensor}: for the model to support batching the shape should have at least 1 "
            "dimension and the first dimension must be -1; but shape expected by the model is "
            f"{_format(provided)}"
        )
    if not provided:
        if any(dim != 1 for dim in dims):
            raise LoadError(
                f"scalar {tensor}, should only provide 1 in the model configuration when the model "
                f"doesn't support batching. Model configuration provided: {_format(dims)}."
            )
        return
    full = [-1, *dims] if is_batched else [*dims]
    if len(full) != len(provided) or any(
        # An output's dim must equal the model's, -1 included; an input's dim may be more specific.
        ours != theirs and (role == "output" or theirs != -1)
        for ours, theirs in zip(full, provided, strict=True)
    ):
        note = (
            "an initial batch dimension because max_batch_size > 0 followed by the explicit tensor "
            "shape, making complete "
        )
        raise LoadError(
            f"{tensor}: the model expects {len(provided)} dimensions (shape {_format(provided)}) "
            f"but the model configuration specifies {len(full)} dimensions "
            f"({note if is_batched else ''}shape {_format(full)})"
        )


def _format(shape: list[int]) -> str:
    return str(shape).replace(" ", "")


def complete_config(config: Config) -> None:
    """Complete the config; raise LoadError, before any instance starts, if it is wrong."""
    kinds = {group.get("kind") for group in config.get("instance_group", [])}
    require_present(choose_providers(config, "GPU" if "KIND_GPU" in kinds else "CPU", "0"))
    session = open_session(config, [CPU])
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if not (config["input"] and config["output"]):
        if all(_shape_of(node)[:1] == [-1] for node in inputs + outputs):
            config["max_batch_size"] = config["max_batch_size"] or DEFAULT_MAX_BATCH_SIZE
            if config["max_batch_size"] > 1 and "sequence_batching" not in config:
                config.setdefault("dynamic_batching", {})
        elif config["max_batch_size"]:
            raise LoadError(
                f"autofill failed for model '{config['name']}': model does not support batching "
                "while non-zero max_batch_size is specified"
            )
        batch_dims = 1 if config["max_batch_size"] else 0
        config["input"] = config["input"] or [_describe(node, batch_dims) for node in inputs]
        config["output"] = config["output"] or [_describe(node, batch_dims) for node in outputs]
    check_config(config, session)


def _describe(node: onnxruntime.NodeArg, batch_dims: int) -> Config:
    dims = _shape_of(node)[batch_dims:]
    spec = {"name": node.name, "data_type": _data_type(node)}
    if dims:
        return {**spec, "dims": dims}
    # Triton requires at least one dim. In a batch, reshape removes it; otherwise it is a scalar's.
    return {**spec, "dims": [1], **({"reshape": {"shape": []}} if batch_dims else {})}
