import numpy as np
import onnx
from onnx import numpy_helper

from pipeline.core.evaluate import Predictor
from pipeline.validation.explain import compare_graphs, compare_weights, diagnose
from tests.conftest import small

WEIGHT = np.arange(1, 11, dtype=np.float32)


def graph_with(**tensors: np.ndarray) -> onnx.ModelProto:
    return small(tensors=[numpy_helper.from_array(value, name) for name, value in tensors.items()])


def changed(*places: int) -> np.ndarray:
    other = WEIGHT.copy()
    other[list(places)] *= 1.5
    return other


def test_a_value_that_changed_is_told_with_what_it_should_be() -> None:
    said = compare_weights({"w": WEIGHT}, graph_with(w=changed(2)))
    assert said == ["w differs in 1 of 10 values, the first 4.5 instead of 3"]
    assert compare_weights({"w": WEIGHT}, graph_with(w=WEIGHT)) == []


def test_a_tensor_that_is_another_one_altogether_may_have_been_fused() -> None:
    assert compare_weights({"w": WEIGHT}, graph_with(w=WEIGHT * 2)) == []
    sparse = WEIGHT * (WEIGHT > 7)
    assert compare_weights({"w": sparse}, graph_with(w=sparse * 2)) == []


def test_a_mean_or_a_scale_is_told_even_where_all_of_it_changed() -> None:
    mean = np.array([0.1307], np.float32)
    assert compare_weights({"m": mean}, graph_with(m=mean * 2)) == ["m is 0.2614 instead of 0.1307"]
    assert compare_weights({"m": mean}, graph_with(m=mean * 2), few=0) == []


def test_two_graphs_are_compared_name_by_name_and_many_names_are_counted() -> None:
    made = graph_with(a=WEIGHT, b=WEIGHT)
    assert compare_graphs(made, made) == []
    assert compare_graphs(made, graph_with(a=WEIGHT)) == ["b is missing"]
    assert compare_graphs(made, graph_with(a=changed(0), b=WEIGHT[:3])) == [
        "a differs in 1 of 10 values, the first 1.5 instead of 1",
        "b is float32 (3,) instead of float32 (10,)",
    ]
    others = graph_with(**{f"x{index}": WEIGHT for index in range(4)})
    assert compare_graphs(made, others) == ["2 tensors are missing and 4 are new"]


def test_rounding_that_depends_on_the_batch_is_no_cause() -> None:
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(64, 5))
    images = np.arange(64, dtype=np.float32)[:, np.newaxis]

    def answer(off: float) -> Predictor:
        return lambda rows: expected[rows[:, 0].astype(int)] + off * rng.normal(size=(len(rows), 5))

    assert diagnose(answer(1e-7), images, expected, "abcde") == []
    assert "depends on its batch" in diagnose(answer(1e-2), images, expected, "abcde")[0]
