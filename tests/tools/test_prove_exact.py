"""The proof of one digest itself: its planted changes, its int64, and what fails it."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from torch import fx

from pipeline.core.errors import CheckFailedError
from pipeline.core.evaluate import hash_scores
from pipeline.validation.exact import eager_scores
from tests.export.test_exact import COLOUR, NETWORKS, exact_of, onnx_of, spec_of, steady
from tools.prove_exact import find_planted, require_one_digest, run_runtime
from tools.whole_numbers import whole_scores


@pytest.fixture(scope="module")
def network() -> fx.GraphModule:
    return exact_of(steady(NETWORKS["padded"]()))


@pytest.fixture(scope="module")
def content(network: fx.GraphModule) -> bytes:
    return onnx_of(network, COLOUR, 5)


def test_planted_changes_are_unequal_or_refused(network: fx.GraphModule, content: bytes) -> None:
    rows = np.concatenate([COLOUR, 255 - COLOUR])
    planted = find_planted(content, network, spec_of(COLOUR), rows)
    kinds = {each["what"].partition(": ")[2] for each in planted}
    assert kinds == {
        *("a weight more by 1", "biases more by 1", "a shift less by 1", "a shift more by 1"),
        *("round instead of floor", "ceil instead of floor", "no floor", "no clip"),
        "an accumulator over its bound",
    }
    missed = [each["what"] for each in planted if each["found"] == "NOT found"]
    assert not missed
    refused = [each for each in planted if each["found"].startswith("refused: ")]
    assert len(refused) == 2
    assert hash_scores(eager_scores(network, COLOUR)) == hash_scores(whole_scores(content, COLOUR))


def test_a_weight_that_is_not_whole_has_no_place_in_int64(content: bytes) -> None:
    model = onnx.load_model_from_string(content)
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
    values = onnx.numpy_helper.to_array(weight) + np.float32(0.5)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    with pytest.raises(ValueError, match="a weight is not a whole number"):
        whole_scores(model.SerializeToString(), COLOUR)


def test_another_onnx_runtime_is_asked_at_every_level(content: bytes) -> None:
    row = run_runtime(Path(sys.executable), content, content, COLOUR[:8])
    assert (row.runs, len(row.digests)) == (24, 1)
    assert row.digests == (hash_scores(whole_scores(content, COLOUR[:8])),)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": [{"runtime": "it", "digests": ["a", "b"]}]}, r"another digest: \['it'\]"),
        ({"rows": [{"runtime": "it", "digests": ["b"]}]}, r"another digest: \['it'\]"),
        ({"planted": [{"what": "a weight", "found": "NOT found"}]}, r"not found: \['a weight'\]"),
    ],
)
def test_one_wrong_row_or_a_missed_change_fails_the_proof(
    changed: dict[str, Any], message: str
) -> None:
    right = {
        "exact_sha256": "a",
        "rows": [{"runtime": "it", "digests": ["a"]}],
        "planted": [{"what": "a weight", "found": "unequal: 1 of 2"}],
    }
    require_one_digest(right)
    with pytest.raises(CheckFailedError, match=message):
        require_one_digest(right | changed)
