"""An ONNX file that somebody hands in: read, made one file if asked for, held to the policy."""

from pathlib import Path

from pipeline import graph
from pipeline.config import TensorSpec
from pipeline.errors import CheckFailedError
from pipeline.policy import SCRUB, check_policy


def handed_in(path: Path, scrub: bool = False) -> bytes:
    """The bytes of an ONNX file; with `scrub`, of a copy in one file without source paths.

    Raises PipelineError when it cannot be read and CheckFailedError when it breaks the policy.
    """
    if scrub:
        model = graph.inlined(path)
        metadata = {
            key: value
            for key, value in graph.metadata(model).items()
            if not graph.shows_source(f"{key} {value}")
        }
        content = graph.scrub(model, model.ir_version, metadata)
    else:
        content = graph.read(path)
    model = graph.parse(content, str(path))
    check_policy(model, str(path))
    model.DiscardUnknownFields()
    if model.ByteSize() != len(content):  # fields we do not know, or twice: then the last counts
        raise CheckFailedError(f"{path} holds bytes outside of its graph: {SCRUB}")
    return content


def matching_signature(content: bytes, images: TensorSpec, outputs: TensorSpec) -> graph.Signature:
    """The signature of an ONNX file that somebody handed in, if it is that of its module.

    The tensors and the batch axis may have other names. Raises CheckFailedError otherwise.
    """
    model = graph.parse(content, "the file")
    found = graph.signature(model, "the file", batch=None)
    pairs = ((found.images, images, "takes"), (found.outputs, outputs, "answers"))
    wrong = [
        f"it {does} {ours}, the module {does} {theirs}"
        for ours, theirs, does in pairs
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape)
    ]
    if wrong:
        raise CheckFailedError(
            f"the file has another signature than its module: {'; '.join(wrong)}"
        )
    return found
