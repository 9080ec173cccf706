"""Digests of a file's answers in the ONNX Runtime of this Python environment: see prove_exact.py.

Imports nothing of this project: it runs in environments with only numpy and onnxruntime.
"""

import hashlib
import json
import sys

import numpy as np
import onnxruntime

LEVELS = ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL")
THREADS = (1, 2)


def main(model: str, images_file: str, output: str, *sizes: str) -> None:
    """Print the versions, and the digest of an output at each level, thread count and batch size.

    A digest is the SHA-256 of the output's values for all images, in order.
    """
    images = np.load(images_file)
    digests = []
    for level in LEVELS:
        for threads in THREADS:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = threads, 3
            levels = onnxruntime.GraphOptimizationLevel
            options.graph_optimization_level = getattr(levels, f"ORT_{level}")
            session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
            name = session.get_inputs()[0].name
            for size in map(int, sizes):
                digest = hashlib.sha256()
                for start in range(0, len(images), size):
                    (values,) = session.run([output], {name: images[start : start + size]})
                    digest.update(np.ascontiguousarray(values).tobytes())
                digests.append(digest.hexdigest())
    print(json.dumps({"onnxruntime": onnxruntime.__version__, "digests": digests}))


if __name__ == "__main__":
    main(*sys.argv[1:])
