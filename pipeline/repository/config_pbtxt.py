"""Functions to read, write, query and change config.pbtxt files as protobuf messages."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc.model_config_pb2 import ModelConfig as ModelConfig

from pipeline.core.errors import PipelineError
from pipeline.core.files import write_bytes
from pipeline.core.signature import PICTURES, TensorSpec, pictures_of
from pipeline.images.rule import PictureRule
from pipeline.repository.ort_values import read_integer
from pipeline.repository.settings import PackageConfig

LABELS, WARMUP = "labels.txt", "digit"
CONFIG, PROFILES = "config.pbtxt", "configs"  # a file, and the folder of its alternatives
STUB = "triton_python_backend_stub"  # the program that Triton's python backend starts
PREVIOUS = "previous_version"  # parameter: the version that was selected before
EXACT = "exact_sha256"  # parameter: the digest of an exact model's scores for its test images
MIN_PROBABILITY = "min_probability"  # parameter: a probability, below which an answer is not sure
ENGINES = "trt_engine_cache_path"

Value = str | int | tuple[int, ...]

_TYPES = {
    **{f"uint{bits}": getattr(model_config_pb2, f"TYPE_UINT{bits}") for bits in (8, 16, 32, 64)},
    **{f"int{bits}": getattr(model_config_pb2, f"TYPE_INT{bits}") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": getattr(model_config_pb2, f"TYPE_FP{bits}") for bits in (16, 32, 64)},
}
_DTYPES = {number: name for name, number in _TYPES.items()}


def base_config(
    name: str,
    images: TensorSpec,
    outputs: TensorSpec,
    classes: Sequence[str],
    config: PackageConfig,
    exact_scores: TensorSpec | None = None,
) -> ModelConfig:
    """Return the part that all configs of a packaged model share, without versions.

    profiles.py adds the rest. Raises PipelineError if a tensor's type cannot be packaged (see
    `_TYPES`).
    """
    answers = [spec for spec in (outputs, exact_scores) if spec]
    for spec in (images, *answers):
        if spec.dtype not in _TYPES:
            types = ", ".join(_TYPES)
            raise PipelineError(f"{spec.name} is {spec.dtype}, but only {types} can be packaged")
    message = ModelConfig(name=name, backend="onnxruntime", max_batch_size=config.max_batch_size)
    pixels = message.input.add(name=images.name, data_type=_TYPES[images.dtype], dims=images.shape)
    if len(images.shape) == 3:  # channels first; Triton has no format for other ranks
        pixels.format = model_config_pb2.ModelInput.FORMAT_NCHW
    for spec in answers:
        message.output.add(name=spec.name, data_type=_TYPES[spec.dtype], dims=spec.shape)
    if len(outputs.shape) == 1:  # a label for each value; a string has none
        message.output[0].label_filename = LABELS
    set_parameter(message, "classes", json.dumps(list(classes)))
    return message


def describe(
    name: str,
    manifest: Mapping[str, Any],
    images: TensorSpec,
    outputs: TensorSpec,
    config: PackageConfig,
    exact_scores: TensorSpec | None = None,
) -> ModelConfig:
    """Return `base_config` with what the manifest of an export says of pictures and outputs."""
    message = base_config(name, images, outputs, manifest["classes"], config, exact_scores)
    training = manifest.get("training")
    how = pictures_of(training["dataset"]) if training else manifest.get("pictures", "arrays")
    if how != "digit":
        set_parameter(message, "pictures", how)
    if manifest["kind"] != "log_probabilities":
        set_parameter(message, "outputs", manifest["kind"])
    return message


def set_field(message: ModelConfig, field: str, value: Value) -> None:
    """Set a field by its path in config.pbtxt.

    `cuda.KEY` and `tensorrt.KEY` set a parameter of that GPU accelerator; `model_warmup.batch_size`
    adds one sample for each of its sizes.
    """
    part, _, key = field.partition(".")
    if part == "parameters":
        set_parameter(message, key, str(value))
    elif part in ("cuda", "tensorrt"):
        accelerators = message.optimization.execution_accelerators.gpu_execution_accelerator
        matches = [accelerator for accelerator in accelerators if accelerator.name == part]
        (matches or [accelerators.add(name=part)])[0].parameters[key] = str(value)
    elif part == "instance_group":
        groups = message.instance_group
        kinds = model_config_pb2.ModelInstanceGroup.Kind
        group = groups[0] if groups else groups.add()
        setattr(group, key, kinds.Value(value) if key == "kind" else value)
    elif part == "model_warmup" and isinstance(value, tuple):
        images = message.input[0]
        for size in value:
            # Triton runs `size` requests of one image together and reads each image from the same
            # file, so the file holds one (GenerateWarmupData in core's backend_model_instance.cc).
            sample = message.model_warmup.add(name=f"digit-{size}", batch_size=size)
            digit = sample.inputs[images.name]
            digit.data_type = images.data_type
            digit.dims.extend(images.dims)
            digit.input_data_file = WARMUP
    else:
        parent = getattr(message, part) if key else message
        if isinstance(value, tuple):
            getattr(parent, key).extend(value)
        else:
            setattr(parent, key or part, value)
        if key:
            parent.SetInParent()  # keeps the message when all its fields are zero


def set_parameter(message: ModelConfig, key: str, value: str) -> None:
    """Set a parameter of the config; Triton returns it to every client that reads the config."""
    message.parameters[key].string_value = value


def parameter(message: ModelConfig, key: str) -> str | None:
    """Return the value of a parameter of the config, or None if it is not set."""
    return message.parameters[key].string_value if key in message.parameters else None


def digest(message: ModelConfig, version: str) -> str | None:
    """Return the SHA-256 that the config states for a version's model file, or None."""
    return parameter(message, f"sha256.{version}")


def version_parameters(message: ModelConfig) -> dict[str, str]:
    """Return the parameters that belong to versions, such as `sha256.1` or `min_probability.1`."""
    return {
        key: value.string_value
        for key, value in message.parameters.items()
        if key.startswith(("sha256.", f"{EXACT}.", f"{MIN_PROBABILITY}."))
    }


def classes(message: ModelConfig) -> tuple[str, ...]:
    """Return a model's class names; numbers if the config (of a third-party model) has none."""
    stated = parameter(message, "classes")
    if stated:
        return tuple(map(str, json.loads(stated)))
    return tuple(map(str, range(message.output[0].dims[-1]))) if message.output else ()


def answers_strings(message: ModelConfig) -> bool:
    """Return whether the model answers strings: it has steps, and a blank after its classes."""
    dims = list(message.output[0].dims) if message.output else []
    return len(dims) == 2 and dims[1] == len(classes(message)) + 1


def find_commands(folder: Path, message: ModelConfig) -> list[str]:
    """Return what Triton's python backend would run as a command from this config and folder.

    The backend passes names to a shell without quotes, and prefers a stub in the model's folder to
    its own (StubLauncher::Launch in python_backend's stub_launcher.cc).
    """
    names = [message.default_model_filename, *(group.name for group in message.instance_group)]
    unsafe = [repr(name) for name in names if not re.fullmatch(r"[\w./+~-]*", name, re.ASCII)]
    return unsafe + ([str(folder / STUB)] if (folder / STUB).exists() else [])


def thread_count(message: ModelConfig) -> int:
    """Return the threads of a session as the backend reads them; 0, one for each core, if none."""
    try:
        return max(0, read_integer(parameter(message, "intra_op_thread_count") or "0")[0])
    except (ValueError, OverflowError):
        return 0


def pictures(message: ModelConfig) -> str:
    """Return how pictures become this model's images: see signature.pictures_of, or a rule's text.

    `arrays` stands for a third-party model without a rule.
    """
    return parameter(message, "pictures") or "digit"


def require_pictures(message: ModelConfig) -> str:
    """Return `pictures`; raise PipelineError if the model takes only arrays, or for a bad rule."""
    how = pictures(message)
    if how == "arrays":
        raise PipelineError(
            f"{message.name} takes only arrays: give one of shape {list(message.input[0].dims)}, "
            "or export it with --picture, so that it takes pictures"
        )
    if how not in PICTURES:
        try:
            PictureRule.parse(how)
        except PipelineError as error:
            raise PipelineError(f"the config of {message.name} has a bad rule: {error}") from error
    return how


def type_name(tensor: Any) -> str:
    """Return the numpy name of an input's or output's type, or Triton's name if numpy has none."""
    return _DTYPES.get(tensor.data_type) or model_config_pb2.DataType.Name(tensor.data_type)


def dtype(tensor: Any) -> str:
    """Return the numpy name of an input's or output's type; raise PipelineError if it has none."""
    if tensor.data_type not in _DTYPES:
        raise PipelineError(f"{tensor.name} is {type_name(tensor)}, which is not a numeric type")
    return _DTYPES[tensor.data_type]


def kind(message: ModelConfig) -> str:
    """Return the kind of the model's outputs: log_probabilities, probabilities or logits."""
    return parameter(message, "outputs") or "log_probabilities"


def min_probability(message: ModelConfig) -> float | None:
    """Return the probability (0 to 1) below which an answer is not sure; None without a valid one.

    A model has none if its data set had too few images to fit it.
    """
    try:
        threshold = float(parameter(message, MIN_PROBABILITY) or "nan")
    except ValueError:
        return None
    return threshold if 0 <= threshold <= 1 else None


def selected(message: ModelConfig) -> list[int]:
    """Return the versions that the config's policy names; empty if Triton chooses the version."""
    return list(message.version_policy.specific.versions)


def selected_version(message: ModelConfig) -> int | None:
    """Return the version that a server serves with this config: the highest selected, or None."""
    return max(selected(message), default=None)


def previous(message: ModelConfig) -> int | None:
    """Return the version that was selected before, or None."""
    stated = parameter(message, PREVIOUS) or ""
    return int(stated) if stated.isdecimal() else None


def select(message: ModelConfig, version: int) -> None:
    """Select only this version in the policy, and record the one that was selected before.

    Also sets the threshold and the folder of TensorRT's engines to those of this version.
    """
    before = selected_version(message)
    if before not in (None, version):
        set_parameter(message, PREVIOUS, str(before))
    message.version_policy.specific.versions[:] = [version]
    if any(key.startswith(MIN_PROBABILITY) for key in version_parameters(message)):
        message.parameters.pop(MIN_PROBABILITY, None)
        if own := parameter(message, f"{MIN_PROBABILITY}.{version}"):
            set_parameter(message, MIN_PROBABILITY, own)
    for accelerator in message.optimization.execution_accelerators.gpu_execution_accelerator:
        if ENGINES in accelerator.parameters:
            accelerator.parameters[ENGINES] = engine_folder(message)


def engine_folder(message: ModelConfig) -> str:
    """Return the folder for the TensorRT engines of the selected version's file.

    There is one folder for each digest, because ONNX Runtime names an engine by the graph, not by
    the weights, and uses another version's engine without a warning (ONNX Runtime issue 6455).
    """
    return f"/tmp/tensorrt-{(digest(message, str(selected_version(message))) or 'unknown')[:16]}"


def run_settings(message: ModelConfig) -> dict[str, Any]:
    """Return the settings that run the model, by field and parameter, without those of versions."""
    record: dict[str, Any] = json.loads(to_json(message))
    record.pop("version_policy", None)
    ignored = (PREVIOUS, MIN_PROBABILITY, *version_parameters(message))
    settings = record.pop("parameters", {}).items()
    return record | {key: value for key, value in settings if key not in ignored}


def to_json(message: ModelConfig) -> str:
    """Return the message as JSON, with the field names that Triton uses."""
    return str(json_format.MessageToJson(message, preserving_proto_field_name=True))


def to_text(message: ModelConfig) -> str:
    """Return the message as the text of a config.pbtxt."""
    return str(text_format.MessageToString(message))


def read(path: Path) -> ModelConfig:
    """Read a config.pbtxt; raise PipelineError if it is missing or does not parse, and where."""
    try:
        return text_format.Parse(path.read_text("utf-8"), ModelConfig())
    except OSError as error:
        raise PipelineError(f"{path} does not exist: run 'pipeline package'") from error
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path} does not parse: {error} See 'pipeline lint'") from error


def config_files(packaged: Path) -> list[Path]:
    """Return the paths of the model's configs: the profiles in order, config.pbtxt last."""
    return [*sorted((packaged / PROFILES).glob("*.pbtxt")), packaged / CONFIG]


def profile_file(packaged: Path, profile: str = "") -> Path:
    """Return the path of the config that `--model-config-name` chooses; "" is config.pbtxt.

    Raises PipelineError when the model has no such profile: Triton would use config.pbtxt without
    a warning (GetModelConfigFullPath in core's model_repository_manager.cc).
    """
    if not profile:
        return packaged / CONFIG
    profiles = {path.stem: path for path in config_files(packaged)[:-1]}
    if profile not in profiles:
        names = ", ".join(profiles) or "none: run 'pipeline package' again"
        raise PipelineError(f"{packaged} has no profile {profile!r}; its profiles: {names}")
    return profiles[profile]


def save(path: Path, message: ModelConfig) -> None:
    """Write a config atomically."""
    write_bytes(path, to_text(message).encode())


def change_configs(packaged: Path, change: Callable[[ModelConfig], object]) -> None:
    """Apply `change` to each of the model's configs and save it, config.pbtxt last."""
    for path in config_files(packaged):
        message = read(path)
        change(message)
        save(path, message)
