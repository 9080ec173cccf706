"""What we allow in an ONNX graph: more than a checker asks, since a server will load it."""

from collections.abc import Iterable
from typing import Any

import onnx
from onnx import NodeProto, TensorProto
from onnx.checker import ValidationError
from onnx.shape_inference import InferenceError

from pipeline.errors import CheckFailedError
from pipeline.graph import SOURCE_PATH, is_external, parts, texts
from pipeline.sizes import is_whole, too_large

STANDARD = frozenset({"", "ai.onnx"})
CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
# ONNX Runtime on a CPU skips a Dropout that was left in training mode; other runtimes obey it.
RANDOM = frozenset(
    {"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike"}
    | {"RandomUniform", "RandomUniformLike"}
)
SCRUB = "'--scrub' leaves them out of a copy"


def check_policy(model: onnx.ModelProto, name: str) -> None:
    """Refuse what the checker lets pass and a server should never load.

    One file, the standard domain, no functions, no control flow, nothing random or in training
    mode, nothing larger than its file that is not small, no source paths. Raises
    CheckFailedError with everything that is wrong.
    """
    found = list(parts(model))
    nodes = [part for part in found if isinstance(part, NodeProto)]
    tensors = [part for part in found if isinstance(part, TensorProto)]
    wrong = [*_operators(model, nodes), *_storage(tensors), *too_large(model)]
    wrong += _sources(model, found)
    if wrong:
        raise CheckFailedError(f"{name} breaks the graph policy: {'; '.join(wrong)}")
    try:
        onnx.checker.check_model(model, full_check=True)
    # The last where the checker quotes a name that is no text.
    except (ValidationError, InferenceError, UnicodeDecodeError) as error:
        raise CheckFailedError(f"{name} is no valid ONNX model: {error}") from error


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))


def _operators(model: onnx.ModelProto, nodes: list[NodeProto]) -> list[str]:
    wrong = []
    if domains := {node.domain for node in nodes} - STANDARD:
        wrong.append(f"operators of domain {_names(domains)}")
    if control := {node.op_type for node in nodes} & CONTROL_FLOW:
        wrong.append(f"control flow: {_names(control)}")
    if chance := {node.op_type for node in nodes} & RANDOM:
        wrong.append(f"chance: {_names(chance)}; export the model in evaluation mode")
    if any(_is_training(node) for node in nodes):
        wrong.append("a batch normalization in training mode")
    if model.functions:
        wrong.append(f"local functions: {_names(entry.name for entry in model.functions)}")
    if model.training_info:
        wrong.append("graphs for training")
    return wrong


def _is_training(node: NodeProto) -> bool:
    return any(entry.name == "training_mode" and entry.i for entry in node.attribute)


def _storage(tensors: list[TensorProto]) -> list[str]:
    wrong = []
    if external := [tensor for tensor in tensors if is_external(tensor)]:
        wrong.append(f"external data: {_names(_said_location(tensor) for tensor in external)}")
    if torn := [t.name for t in tensors if not is_external(t) and not is_whole(t)]:
        wrong.append(f"tensors that do not hold what their dims claim: {_names(torn)}")
    return wrong


def _said_location(tensor: TensorProto) -> str:
    locations = [entry.value for entry in tensor.external_data if entry.key == "location"]
    return f"{tensor.name or 'a nameless tensor'} in '{_names(locations)}'"


def _sources(model: onnx.ModelProto, found: list[Any]) -> list[str]:
    """Traces of the exporter. The model's own metadata may stay, unless it shows a source path."""
    wrong = []
    if any(part.metadata_props for part in found if part is not model and _has_metadata(part)):
        wrong.append(f"metadata of the exporter in its graph, source paths among it: {SCRUB}")
    if any("doc_string" in part.DESCRIPTOR.fields_by_name and part.doc_string for part in found):
        wrong.append(f"doc strings, which may hold source paths: {SCRUB}")
    told = {field: getattr(part, field) for part, field in texts(model)}
    told |= {f"metadata '{e.key}'": f"{e.key} {e.value}" for e in model.metadata_props}
    if shown := [key for key, text in told.items() if SOURCE_PATH.search(text)]:
        wrong.append(f"source paths in {_names(shown)}: {SCRUB}")
    return wrong


def _has_metadata(part: Any) -> bool:
    return "metadata_props" in part.DESCRIPTOR.fields_by_name
