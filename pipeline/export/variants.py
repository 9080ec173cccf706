"""Variants of an exported file in lower precision: float16, and int8 calibrated on images."""

import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

from pipeline.core.errors import CheckFailedError
from pipeline.export import graph

CALIBRATION_IMAGES = 1024
_BATCH = 64  # images in a calibration step
# Operators between two convolutions as well, so that numbers stay 8 bits wide between them. Not
# batch normalization: one that is not fused into a convolution has few weights and loses most.
_QUANTIZED = ("Conv", "Gemm", "MatMul", "MaxPool", "AveragePool", "Relu", "Concat", "Reshape")


class _Images(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime has no types
    """Calibration images in batches, as ONNX Runtime's calibrator requests them."""

    def __init__(self, name: str, images: np.ndarray) -> None:
        starts = range(0, len(images), _BATCH)
        self._batches = iter([{name: images[start : start + _BATCH]} for start in starts])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def to_fp16(content: bytes, ir_version: int) -> bytes:
    """Convert the weights and arithmetic of an ONNX model to float16; keep its signature.

    Meant for GPUs: a CPU computes in float32 and rounds in between.
    """
    model = graph.parse(content, "the fp32 file")
    metadata = graph.metadata(model)
    half = convert_float_to_float16(model, keep_io_types=True)
    # Each node goes after those that it depends on: the converter appends its casts at the end.
    waiting, ordered = list(half.graph.node), []
    missing = {name for node in waiting for name in node.output}
    while waiting:
        ready = [node for node in waiting if missing.isdisjoint(node.input)]
        if not ready:
            raise CheckFailedError("the fp16 variant has a cycle: leave fp16 out of --precision")
        ordered += ready
        missing -= {name for node in ready for name in node.output}
        waiting = [node for node in waiting if node not in ready]
    del half.graph.node[:]
    half.graph.node.extend(ordered)
    return graph.scrub(half, ir_version, metadata)


def to_int8(content: bytes, ir_version: int, images: np.ndarray) -> bytes:
    """Quantize an ONNX model statically to 8 bits (QDQ); keep its signature.

    The ranges of activations are measured on `images` (N, ...). Weights are quantized per channel
    and to 7 bits (reduce_range): on a CPU without VNNI, 8 bits by 8 bits can overflow. Raises
    CheckFailedError when there are no images.
    """
    if not len(images):
        raise CheckFailedError("int8 needs images for its calibration: there are none")
    model = graph.parse(content, "the fp32 file")
    metadata = {**graph.metadata(model), "calibration_images": str(len(images))}
    name = model.graph.input[0].name
    logger = logging.getLogger()  # the quantizer logs to the root logger
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder:
            fp32, prepared, int8 = (Path(folder) / f"{step}.onnx" for step in ("a", "b", "c"))
            fp32.write_bytes(content)
            quant_pre_process(fp32, prepared, skip_optimization=True, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                int8,
                _Images(name, images),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_QUANTIZED),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            return graph.scrub(onnx.load_model(int8), ir_version, metadata)
    finally:
        logger.setLevel(level)
