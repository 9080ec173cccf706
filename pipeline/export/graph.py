"""ONNX graphs as bytes: reading them, their signature, and scrubbing source paths."""

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto, ValueInfoProto
from onnx.checker import ValidationError
from onnx.external_data_helper import load_external_data_for_tensor

from pipeline.core.errors import CheckFailedError, CorruptError, PipelineError
from pipeline.core.signature import SCORES, TensorSpec
from pipeline.export.sizes import BITS, STANDARD, raw_bytes

BATCH = "batch"  # the name of dimension 0, on the input and on the output
MAX_BYTES = 512 * 1024 * 1024
# A node exported by PyTorch has 40, with its attributes, names and metadata.
MAX_PARTS = 1_000_000
# Text that shows which machine a model comes from: a traceback, a user's or system path, a file
# of code or weights. Exporters call nodes `/layer1/layer1.0/conv1/Conv` and parameters
# `model/conv1/weight`, so a slash alone is no sign. No part of the pattern rescans what it has
# read: a name of a megabyte must not take minutes.
SOURCE_PATH = re.compile(
    r"""
    File\ " | (?:site|dist)-packages
    | (?i: [/\\] (?:home\d*|users?) [/\\]+ \w )
    | (?<![A-Za-z0-9.)]) / (?: root | tmp | etc | opt | mnt | media | srv | data\d* | private | work
      | scratch | projects | workspaces? | export | storage | cluster | nfs | gpfs | lustre
      | Volumes | kaggle | dbfs | content/drive | usr/(?: local|lib|share|src|bin )
      | var/(?: tmp|lib|log|folders|run|www|opt|mnt ) ) / [\w.]
    | (?<![A-Za-z0-9]) [A-Za-z]: (?: \\+ | / ) \w
    | (?<![\w\\]) \\\\ [\w.$-]+ \\ \w
    | (?<![\w~]) ~\w* / \w
    | \b (?: file | s3 | gs | hdfs | abfss? | dbfs | smb | nfs | sftp | ssh | scp ):/
    | [/\\] [^\s/\\]* \. (?: py[ciw]? | ipynb )\b
    | [/\\] [^\s/\\]* \. (?: pth? | ckpt | onnx | h5 | hdf5 | pkl | pickle | np[yz] | safetensors
      | tflite | keras | ya?ml | toml | json | cfg | ini | sh | so | dll | csv | txt | log | zip
      | tar | gz ) (?! [\w/\\] | \.\w )
    | \w\. (?: py | ipynb ) :\d
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class Signature:
    """The input and output tensors of a graph (shapes without the batch axis) and its dialect."""

    images: TensorSpec
    outputs: TensorSpec
    opset: int
    ir_version: int
    scores: TensorSpec | None = None  # the second output, of an exact variant only

    def __str__(self) -> str:
        dialect = f"opset {self.opset}, IR {self.ir_version}"
        answers = f"{self.outputs} and {self.scores}" if self.scores else self.outputs
        return f"takes {self.images}, answers {answers}, {dialect}"


def parse(content: bytes, name: str) -> onnx.ModelProto:
    """Parse `content` as an ONNX model; `name` stands for the file in messages.

    Raises CorruptError when it is not a valid ONNX file and CheckFailedError when it is too large.
    """
    if len(content) > MAX_BYTES:
        raise CheckFailedError(f"{name} is larger than {MAX_BYTES} bytes")
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise CorruptError(f"{name} is not a valid ONNX file: export it again") from error
    if sum(1 for _ in islice(chain(message_parts(model), texts(model)), MAX_PARTS + 1)) > MAX_PARTS:
        raise CheckFailedError(f"{name} has more than {MAX_PARTS} parts: export a smaller graph")
    if not all(isinstance(text, str) for _, _, text in texts(model)):
        raise CorruptError(f"{name} has a name that is not valid UTF-8: export it again")
    return model


def message_parts(message: Message) -> Iterator[Any]:
    """Yield a message and all messages in it, including those in attributes and their graphs."""
    yield message
    if isinstance(message, TensorProto):  # ListFields would copy its data
        yield from (*message.external_data, *message.metadata_props)
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from message_parts(part)


def _batch_axis(value: ValueInfoProto, name: str, wanted: str | None, images: str) -> str:
    """Return the name of dimension 0.

    Raises CheckFailedError unless it is `wanted`, or any name where `wanted` is None.
    """
    dims = value.type.tensor_type.shape.dim
    axis = dims[0].dim_param if dims else ""
    if axis and wanted in (None, axis):
        return axis
    actual = (axis or dims[0].dim_value or "unnamed") if dims else "missing"
    raise CheckFailedError(
        f"{name}: dimension 0 of {value.name} is {actual}, not a dynamic axis '{wanted or BATCH}'. "
        f'Export it with dynamic_shapes={{"{images}": {{0: "{wanted or BATCH}"}}}}'
    )


def _spec(value: ValueInfoProto, name: str) -> TensorSpec:
    tensor = value.type.tensor_type
    dims = tensor.shape.dim[1:]
    if not all(dim.HasField("dim_value") for dim in dims):
        raise CheckFailedError(f"{name}: {value.name} has a dynamic dimension other than the batch")
    if tensor.elem_type not in BITS:
        raise CheckFailedError(f"{name}: {value.name} has an unknown type")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorSpec(value.name, dtype, tuple(dim.dim_value for dim in dims))


def read_signature(model: onnx.ModelProto, name: str, batch: str | None = BATCH) -> Signature:
    """Read the signature of an image classifier: one input, one output, a named batch axis.

    A second output may have an exact variant's scores. The axis has the name `batch`, or any name
    if `batch` is None, and the same name on the input and the output. Raises CheckFailedError for
    a graph of any other form.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    outputs = list(model.graph.output)
    scores = outputs.pop() if [output.name for output in outputs[1:]] == [SCORES] else None
    if len(inputs) != 1 or len(outputs) != 1:
        counts = f"{len(inputs)} inputs and {len(outputs)} outputs"
        raise CheckFailedError(f"{name} has {counts} instead of one each")
    axis = _batch_axis(inputs[0], name, batch, inputs[0].name)
    _batch_axis(outputs[0], name, axis, inputs[0].name)
    opset = next((entry.version for entry in model.opset_import if entry.domain in STANDARD), 0)
    tensors = _spec(inputs[0], name), _spec(outputs[0], name)
    return Signature(*tensors, opset, model.ir_version, _spec(scores, name) if scores else None)


def shows_source(text: str) -> bool:
    """Tell whether a text shows a source path, ignoring NUL characters."""
    return bool(SOURCE_PATH.search(text.replace("\0", "")))


def scrub(model: onnx.ModelProto, ir_version: int, metadata: dict[str, str]) -> bytes:
    """Return the bytes of `model` with our metadata, without the exporter's; deterministic.

    Names that show a source path are replaced. Imports of operator domains that no node uses are
    removed (quantization leaves a dozen), and initializers are no longer overridable inputs.
    """
    model.ir_version = ir_version
    model.DiscardUnknownFields()
    parts = list(message_parts(model))
    for part in parts:
        for field in {"metadata_props", "doc_string"}.intersection(part.DESCRIPTOR.fields_by_name):
            part.ClearField(field)
    for value in list_overridable(model):
        model.graph.input.remove(value)
    _rename(model)
    model.graph.name = model.graph.name or "graph"  # the checker requires a name
    used = STANDARD | {part.domain for part in parts if isinstance(part, onnx.NodeProto)}
    for entry in [entry for entry in model.opset_import if entry.domain not in used]:
        model.opset_import.remove(entry)
    for key in sorted(metadata):
        model.metadata_props.add(key=key, value=metadata[key])
    return model.SerializeToString(deterministic=True)


def list_overridable(model: onnx.ModelProto) -> list[ValueInfoProto]:
    """List the inputs that a client may leave out, because an initializer is their default.

    Before IR version 4, initializers are constants, so the list is empty.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    stored |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    return [v for v in model.graph.input if v.name in stored] if model.ir_version >= 4 else []


def texts(message: Message) -> Iterator[tuple[Any, str, str]]:
    """Yield every text in `message` and its parts: the part, the field and the text.

    A text that is not UTF-8 comes as bytes.
    """
    for part in message_parts(message):
        for field in _text_fields(part.DESCRIPTOR):
            value = getattr(part, field)
            several: Iterable[Any] = [value] if isinstance(value, (str, bytes)) else value
            yield from ((part, field, text) for text in several if text)


@cache
def _text_fields(descriptor: Any) -> list[str]:
    return [field.name for field in descriptor.fields if field.type == field.TYPE_STRING]


def public_names(model: onnx.ModelProto) -> set[str]:
    """Return the names that clients use (inputs and outputs), which must not be changed."""
    return {value.name for value in (*model.graph.input, *model.graph.output)}


def _rename(model: onnx.ModelProto) -> None:
    """Replace every name that shows a source path, the same way wherever it occurs."""
    every, public = list(texts(model)), public_names(model)
    names = dict.fromkeys(text for _, _, text in every)
    fresh = (name for number in count() if (name := f"renamed_{number}") not in names)
    names = {n: next(fresh) for n in names if n not in public and shows_source(n)}
    for part, field, text in every:
        if text not in names:
            continue
        if isinstance(part, (onnx.ModelProto, onnx.GraphProto)):  # nothing refers to its text
            part.ClearField(field)
        elif isinstance(getattr(part, field), str):
            setattr(part, field, names[text])
        else:
            getattr(part, field)[:] = [names.get(other, other) for other in getattr(part, field)]


def read_inlined(path: Path) -> onnx.ModelProto:
    """Read the model in the file `path` and include the data of its external files.

    A tensor may name only a regular file in the folder of `path`: the author of the model chose
    the name, and must not make us read anything else. Raises CheckFailedError otherwise.
    """
    content = read_onnx(path)
    model = parse(content, str(path))
    total = len(content)
    tensors = [part for part in message_parts(model) if isinstance(part, TensorProto)]
    for tensor in filter(is_external, tensors):
        size = raw_bytes(tensor)
        total += size or 0
        if total > MAX_BYTES:
            raise CheckFailedError(f"{path} and its data are larger than {MAX_BYTES} bytes")
        location = {entry.key: entry.value for entry in tensor.external_data}.get("location", "")
        where = f"{path}: the data of {tensor.name} in '{location}'"
        if not set(location).isdisjoint("/\\\0"):
            raise CheckFailedError(f"{where} is not in the model's folder")
        try:
            if (path.parent / location).stat().st_size > MAX_BYTES:  # without a length, all is read
                raise CheckFailedError(f"{where} is larger than {MAX_BYTES} bytes")
            # From 1.23 on, onnx refuses links, paths that leave the folder, and all but files.
            load_external_data_for_tensor(tensor, str(path.parent))
        except (ValidationError, ValueError, OSError) as error:
            raise CheckFailedError(f"{where} cannot be read: {error}") from error
        if len(tensor.raw_data) != size:
            raise CheckFailedError(f"{where} has {len(tensor.raw_data)} bytes, not {size}")
    return model


def read_onnx(path: Path) -> bytes:
    """Read the bytes of the ONNX file at `path`; raise PipelineError when that fails."""
    try:
        # Non-blocking, because a pipe would wait; Windows has no pipes among its files.
        more = getattr(os, "O_NONBLOCK", 0)
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | more)) as f:
            if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            return f.read(MAX_BYTES + 1)  # one byte more, so that `parse` refuses it as too large
    except OSError as error:
        raise PipelineError(f"cannot read {path}: {error.strerror}") from error


def is_external(tensor: TensorProto) -> bool:
    """Tell whether `tensor` declares that its data, or a part, is in another file."""
    return tensor.data_location == TensorProto.EXTERNAL or len(tensor.external_data) > 0


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    """Return the metadata of the file, as `scrub` wrote it."""
    return {entry.key: entry.value for entry in model.metadata_props}
