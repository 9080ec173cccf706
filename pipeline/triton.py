"""config.pbtxt as protobuf messages: written, read, and asked questions."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc.model_config_pb2 import ModelConfig as ModelConfig

from pipeline.config import PackageConfig, TensorSpec
from pipeline.errors import PipelineError

LABELS, WARMUP = "labels.txt", "digit"
CONFIG, PROFILES = "config.pbtxt", "configs"  # a file, and the folder of its alternatives
STUB = "triton_python_backend_stub"  # the program that the python backend starts
PREVIOUS = "previous_version"  # the parameter that says which version was selected before
MIN_PROBABILITY = "min_probability"  # the parameter: a float, below it an answer is not sure
ENGINES = "trt_engine_cache_path"

Value = str | int | tuple[int, ...]

_TYPES = {
    **{f"uint{bits}": getattr(model_config_pb2, f"TYPE_UINT{bits}") for bits in (8, 16, 32, 64)},
    **{f"int{bits}": getattr(model_config_pb2, f"TYPE_INT{bits}") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": getattr(model_config_pb2, f"TYPE_FP{bits}") for bits in (16, 32, 64)},
}


def model_config(
    name: str,
    images: TensorSpec,
    outputs: TensorSpec,
    classes: Sequence[str],
    config: PackageConfig,
) -> ModelConfig:
    """What every config of a packaged model has, without its versions; profiles.py adds the rest.

    Raises PipelineError for a tensor type that Triton's config has no use for here.
    """
    for spec in (images, outputs):
        if spec.dtype not in _TYPES:
            raise PipelineError(
                f"{spec.name} is {spec.dtype}; only {', '.join(_TYPES)} are packaged"
            )
    message = ModelConfig(name=name, backend="onnxruntime", max_batch_size=config.max_batch_size)
    message.input.add(
        name=images.name,
        data_type=_TYPES[images.dtype],
        format=_format(images),
        dims=images.shape,
    )
    message.output.add(
        name=outputs.name,
        data_type=_TYPES[outputs.dtype],
        dims=outputs.shape,
        label_filename=LABELS,
    )
    set_parameter(message, "classes", json.dumps(list(classes)))
    return message


def put(message: ModelConfig, field: str, value: Value) -> None:
    """Set a field by its path in config.pbtxt; an accelerator for GPUs goes by its name."""
    part, _, key = field.partition(".")
    if part == "parameters":
        set_parameter(message, key, str(value))
    elif part in ("cuda", "tensorrt"):
        _accelerator(message, part).parameters[key] = str(value)
    elif part == "instance_group":
        groups = message.instance_group
        kinds = model_config_pb2.ModelInstanceGroup.Kind
        group = groups[0] if groups else groups.add()
        setattr(group, key, kinds.Value(value) if key == "kind" else value)
    elif field == "model_warmup.batch_size" and isinstance(value, tuple):
        for size in value:
            _warm_up(message, size)
    elif isinstance(value, tuple):
        getattr(getattr(message, part), key).extend(value)
    else:
        parent = getattr(message, part) if key else message
        if key:
            parent.SetInParent()  # so that it is there when all its fields are zero
        setattr(parent, key or part, value)


def _accelerator(message: ModelConfig, name: str) -> Any:
    """The GPU accelerator of that name, added where there is none yet."""
    accelerators = message.optimization.execution_accelerators.gpu_execution_accelerator
    found = [accelerator for accelerator in accelerators if accelerator.name == name]
    return found[0] if found else accelerators.add(name=name)


def _warm_up(message: ModelConfig, size: int) -> None:
    """Add a batch of `size` to the warm-up.

    Triton runs as many requests of one image together, and reads each from the same file, which
    holds a single one (GenerateWarmupData in core's backend_model_instance.cc).
    """
    images = message.input[0]
    digit = message.model_warmup.add(name=f"digit-{size}", batch_size=size).inputs[images.name]
    digit.data_type = images.data_type
    digit.dims.extend(images.dims)
    digit.input_data_file = WARMUP


def _format(images: TensorSpec) -> int:
    """Images of three axes are called channels first; Triton has no word for other ranks."""
    formats = model_config_pb2.ModelInput
    return int(formats.FORMAT_NCHW if len(images.shape) == 3 else formats.FORMAT_NONE)


def set_parameter(message: ModelConfig, key: str, value: str) -> None:
    """Set one of the config's parameters, which Triton hands to whoever asks for the config."""
    message.parameters[key].string_value = value


def parameter(message: ModelConfig, key: str) -> str | None:
    """One of the config's parameters, or None."""
    return message.parameters[key].string_value if key in message.parameters else None


def digest(message: ModelConfig, version: str) -> str | None:
    """The SHA-256 that the config states for a version's model file, or None."""
    return parameter(message, f"sha256.{version}")


def state(
    message: ModelConfig, version: int, sha256: str, min_probability: float | None = None
) -> None:
    """Say what belongs to a version, whichever is selected: its digest, and when it is not sure."""
    set_parameter(message, f"sha256.{version}", sha256)
    if min_probability is not None:
        set_parameter(message, f"{MIN_PROBABILITY}.{version}", str(min_probability))


def statements(message: ModelConfig) -> dict[str, str]:
    """What the config says of each version, by parameter: `sha256.1` and the like."""
    return {
        key: value.string_value
        for key, value in message.parameters.items()
        if key.startswith(("sha256.", f"{MIN_PROBABILITY}."))
    }


def classes(message: ModelConfig) -> tuple[str, ...]:
    """The class names of a served model; a model of others' may state none, then numbers."""
    stated = parameter(message, "classes")
    if stated:
        return tuple(map(str, json.loads(stated)))
    return tuple(map(str, range(message.output[0].dims[-1]))) if message.output else ()


def commands(folder: Path, message: ModelConfig) -> list[str]:
    """Return what in a model's config and folder Triton's python backend would run as a command.

    It gives names to a shell, unquoted, and prefers a stub that lies in the model's folder to its
    own (StubLauncher::Launch in python_backend's stub_launcher.cc).
    """
    names = [message.default_model_filename, *(group.name for group in message.instance_group)]
    odd = [repr(name) for name in names if not re.fullmatch(r"[\w./+~-]*", name, re.ASCII)]
    return odd + ([str(folder / STUB)] if (folder / STUB).exists() else [])


def pictures(message: ModelConfig) -> str:
    """How pictures become this model's images: see config.pictures_of."""
    return parameter(message, "pictures") or "digit"


def type_name(tensor: Any) -> str:
    """The name of a config's input or output type, as numpy has it where it has one."""
    names = {number: name for name, number in _TYPES.items()}
    return names.get(tensor.data_type) or model_config_pb2.DataType.Name(tensor.data_type)


def dtype(tensor: Any) -> str:
    """The name that numpy has for the type of a config's input or output."""
    names = {number: name for name, number in _TYPES.items()}
    if tensor.data_type not in names:
        raise PipelineError(f"{tensor.name} has a type that no image of ours has")
    return names[tensor.data_type]


def kind(message: ModelConfig) -> str:
    """What the model's outputs are: log_probabilities, probabilities or logits."""
    return parameter(message, "outputs") or "log_probabilities"


def min_probability(message: ModelConfig) -> float:
    """The probability below which the model is not sure; 0 where the config states none."""
    try:
        return float(parameter(message, MIN_PROBABILITY) or 0)
    except ValueError:
        return 0.0


def selected(message: ModelConfig) -> list[int]:
    """The versions that the config's policy names; empty when Triton chooses by itself."""
    return list(message.version_policy.specific.versions)


def previous(message: ModelConfig) -> int | None:
    """The version that was selected before, or None."""
    stated = parameter(message, PREVIOUS) or ""
    return int(stated) if stated.isdigit() else None


def select(message: ModelConfig, version: int) -> None:
    """Let the policy name just this version, and remember the one that it named before.

    TensorRT's engines become those of its own weights, and so does the threshold.
    """
    before = max(selected(message), default=version)
    if before != version:
        set_parameter(message, PREVIOUS, str(before))
    message.version_policy.specific.versions[:] = [version]
    if any(key.startswith(MIN_PROBABILITY) for key in statements(message)):
        message.parameters.pop(MIN_PROBABILITY, None)
        if own := parameter(message, f"{MIN_PROBABILITY}.{version}"):
            set_parameter(message, MIN_PROBABILITY, own)
    for accelerator in message.optimization.execution_accelerators.gpu_execution_accelerator:
        if ENGINES in accelerator.parameters:
            accelerator.parameters[ENGINES] = engine_folder(message)


def engine_folder(message: ModelConfig) -> str:
    """Where TensorRT keeps the engines of the selected version's file.

    A folder for each digest: ONNX Runtime names an engine by the graph, not by its weights, and
    takes another version's engine without a word (its issue 6455).
    """
    versions = selected(message)
    stated = digest(message, str(max(versions))) if versions else None
    return f"/tmp/tensorrt-{(stated or 'unknown')[:16]}"


def settings(message: ModelConfig) -> dict[str, Any]:
    """How the model is run, by field and parameter, whichever versions there are."""
    record: dict[str, Any] = json.loads(to_json(message))
    record.pop("version_policy", None)
    for key, value in record.pop("parameters", {}).items():
        if key not in (PREVIOUS, MIN_PROBABILITY, *statements(message)):
            record[key] = value
    return record


def to_json(message: ModelConfig) -> str:
    """The message as Triton's JSON has it."""
    return str(json_format.MessageToJson(message, preserving_proto_field_name=True))


def to_text(message: ModelConfig) -> str:
    """The message as config.pbtxt has it."""
    return str(text_format.MessageToString(message))


def read(path: Path) -> ModelConfig:
    """The message in a config.pbtxt; PipelineError says where it does not parse."""
    try:
        return text_format.Parse(path.read_text(), ModelConfig())
    except OSError as error:
        raise PipelineError(f"no {path}: run 'pipeline package'") from error
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise PipelineError(
            f"{path} does not parse: {error} Mend it there; 'pipeline lint' says what was meant"
        ) from error


def config_files(packaged: Path) -> list[Path]:
    """The model's configs: profiles in order, config.pbtxt last."""
    return [*sorted((packaged / PROFILES).glob("*.pbtxt")), packaged / CONFIG]


def profile_file(packaged: Path, profile: str = "") -> Path:
    """The config that `--model-config-name` chooses, config.pbtxt without a profile.

    Raises PipelineError when the model has no such profile: Triton would take config.pbtxt then,
    and say nothing (GetModelConfigFullPath in core's model_repository_manager.cc).
    """
    if not profile:
        return packaged / CONFIG
    found = [path for path in config_files(packaged)[:-1] if path.stem == profile]
    if not found:
        known = ", ".join(path.stem for path in config_files(packaged)[:-1]) or "none"
        raise PipelineError(
            f"{packaged} has no profile {profile!r}, it has {known}: choose one of them, or "
            "package the model again with 'pipeline package'"
        )
    return found[0]
