"""First run of an ONNX file from another tool, in a separate process with limits.

The graph policy computes sizes and work from the graph. Some faults it cannot see: an operator
that is slow on some numbers, extra work at one batch size, a crash of ONNX Runtime. Here they end
only this process. Run as `python -m pipeline.export.first_run BYTES SECONDS`, where BYTES limits
the memory and SECONDS the CPU time, with the file on standard input.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import onnxruntime

from pipeline.core.errors import CheckFailedError, PipelineError

# A core that does 5 G multiply-adds a second takes 40 s for two images of the most work allowed.
SECONDS = 60.0
# Bytes of address space: a valid file of 470 MB takes 1.6 GiB, all values of two images at most 4.
MEMORY = 8 * 1024**3
# Two images, as in the policy, then the batch sizes that a server may form, until QUICK seconds
# have passed: a file may do more work at one of these sizes.
BATCHES = (2, *range(1, 257))
QUICK = 3.0  # seconds, loading included
REFUSED = 3  # the exit status when ONNX Runtime refuses the file; its message is on standard output


def require_first_run(content: bytes, seconds: float = SECONDS, memory: int = MEMORY) -> None:
    """Load an ONNX file and run it in a process limited to `seconds` and `memory` bytes.

    Raises CheckFailedError when it needs more, when ONNX Runtime refuses the file, and when it
    crashes; PipelineError on Windows, which cannot limit a process.
    """
    if sys.platform == "win32":
        raise PipelineError("checking an ONNX file of another tool needs Linux or macOS")
    command = [sys.executable, "-m", "pipeline.export.first_run", str(memory), str(seconds)]
    # numpy's threads take address space, more of it on more cores.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as file:  # a pipe would be written 512 bytes at a time
        file.write(content)
        file.seek(0)
        try:
            run = subprocess.run(command, stdin=file, capture_output=True, timeout=seconds, env=env)
        except subprocess.TimeoutExpired as error:
            raise CheckFailedError(
                f"ONNX Runtime cannot load the file and answer 2 images within {seconds:g} s: "
                "export a graph that takes less work"
            ) from error
    if run.returncode < 0:
        name = signal.Signals(-run.returncode).name
        raise CheckFailedError(f"ONNX Runtime crashes on the file ({name}): export it again")
    if run.returncode:
        output = run.stdout if run.returncode == REFUSED else run.stderr
        reason = output.decode(errors="replace").strip().splitlines() or ["unknown reason"]
        raise CheckFailedError(f"ONNX Runtime cannot load and run the file: {reason[-1][:500]}")


def _main(memory: int, seconds: float) -> int:
    """Run the file on standard input; return the exit status of the process.

    Every second image of a batch is blank.
    """
    import resource  # not on Windows

    limits = {resource.RLIMIT_AS: memory, resource.RLIMIT_CORE: 0}
    limits[resource.RLIMIT_CPU] = int(seconds) + 1  # in case the parent process was killed
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit on address space
            resource.setrlimit(kind, (most, most))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    content, started = sys.stdin.buffer.read(), time.monotonic()
    try:
        session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
        (images,) = session.get_inputs()
        dtype = images.type.removeprefix("tensor(").removesuffix(")")
        for size in BATCHES:
            rows = np.resize(np.arange(128), (size, *images.shape[1:]))
            # ONNX Runtime's names of these types are not numpy's.
            rows = rows.astype({"float": "float32", "double": "float64"}.get(dtype, dtype))
            rows[::2] = 0
            session.run(None, {images.name: rows})
            if time.monotonic() - started > QUICK:
                break
    except Exception as error:  # a malicious file may make it raise anything
        is_too_large = isinstance(error, MemoryError)
        text = f"it takes more than {memory:,} bytes of memory" if is_too_large else str(error)
        print(" ".join(text.split()) or type(error).__name__)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), float(sys.argv[2])))
