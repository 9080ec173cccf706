"""Answers of an ONNX file in the ONNX Runtime of this Python environment: see prove_runtimes.py.

Imports nothing of this project: it runs in environments with only numpy and onnxruntime.
"""

import json
import sys

import numpy as np
import onnxruntime

BATCH = 64


def main(model: str, images_file: str, outputs_file: str) -> None:
    """Write the model's outputs for each image, and print the versions of the imported packages."""
    images = np.load(images_file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    starts = range(0, len(images), BATCH)
    batches = (images[start : start + BATCH] for start in starts)
    np.save(outputs_file, np.concatenate([session.run(None, {name: b})[0] for b in batches]))
    print(json.dumps({"onnxruntime": onnxruntime.__version__, "numpy": np.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
