"""The first run of a file: what takes too long, too much, or crashes, ends a process of its own."""

import os
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.core.errors import CheckFailedError
from pipeline.export.first_run import require_first_run
from pipeline.export.policy import check_policy
from tests.conftest import CAST, small


def products(size: int, at_batch: int | None = None) -> onnx.ModelProto:
    """A graph that multiplies matrices of `size` squared ten times, or only at one batch size."""
    number = numpy_helper.from_array
    tensors = [
        number(np.array([size, size]), "n"),
        number(np.array([1, 1]), "one"),
        number(np.array(at_batch or 0), "batch_size"),
        number(np.array(0), "first"),
    ]
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["b"]),
        helper.make_node("Equal", ["b", "batch_size"], ["is_it"]),
        helper.make_node("Where", ["is_it", "n", "one"], ["some"]),
        helper.make_node("ConstantOfShape", ["some" if at_batch else "n"], ["a"]),
        *(helper.make_node("MatMul", [f"a{i or ''}"] * 2, [f"a{i + 1}"]) for i in range(10)),
        helper.make_node("ReduceMax", ["a10"], ["most"], keepdims=0),
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["f", "most"], ["y"]),
    ]
    return small(nodes=nodes, tensors=tensors)


def own_children() -> set[str]:
    """The processes of a first run that are still there, and all zombies, by their numbers."""
    numbers = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_bytes().rpartition(b")")[2].split()[:2]
            command = path.with_name("cmdline").read_bytes()
        except OSError:
            continue  # it has ended
        if int(parent) == os.getpid() and (b"first_run" in command or state == b"Z"):
            numbers.add(path.parent.name)
    return numbers


@pytest.mark.parametrize("dtype", ["UINT8", "INT64", "FLOAT16", "FLOAT", "DOUBLE"])
def test_a_sound_file_of_any_type_stands_its_first_run(dtype: str) -> None:
    model = small()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DataType.Value(dtype)
    require_first_run(model.SerializeToString())


@pytest.mark.slow
def test_a_file_that_does_not_come_to_an_end_is_ended() -> None:
    content = products(8000).SerializeToString()
    before = own_children()  # zombies that other tests left
    with pytest.raises(CheckFailedError, match=r"cannot load the file .* within 2 s"):
        require_first_run(content, seconds=2)
    assert own_children() <= before


@pytest.mark.slow
def test_work_at_one_batch_size_only_is_met_on_the_first_run() -> None:
    model = products(8000, at_batch=40)
    check_policy(model, "it")
    before = own_children()
    with pytest.raises(CheckFailedError, match="within 5 s: export a graph that takes less work"):
        require_first_run(model.SerializeToString(), seconds=5)
    assert own_children() <= before


def test_a_file_that_takes_more_memory_than_allowed_is_refused() -> None:
    content = products(8000).SerializeToString()
    with pytest.raises(CheckFailedError, match="bad_alloc|more than 536,870,912 bytes"):
        require_first_run(content, memory=1 << 29)


def test_what_onnx_runtime_refuses_is_said_in_its_words() -> None:
    with pytest.raises(CheckFailedError, match=r"cannot load and run the file: .*protobuf"):
        require_first_run(b"this is no graph")
    gather = helper.make_node("Gather", ["x", "i"], ["g"], axis=1)
    beyond = numpy_helper.from_array(np.array([99]), "i")
    with pytest.raises(CheckFailedError, match=r"run the file: .*out of"):
        require_first_run(small(nodes=[CAST, gather], tensors=[beyond]).SerializeToString())


@pytest.mark.parametrize(
    ("ending", "said"),
    [("kill -SEGV $$", r"crashes on the file \(SIGSEGV\)"), ("echo why >&2; exit 1", "file: why")],
)
def test_a_process_that_ends_otherwise_is_a_failed_check(
    ending: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{ending}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(CheckFailedError, match=said):
        require_first_run(small().SerializeToString())
