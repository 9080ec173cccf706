"""A golden set put to stand-ins for a server that are wrong in one way each."""

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pipeline.client.client import Client
from pipeline.core.errors import ServerError
from pipeline.repository import config_pbtxt
from pipeline.repository.golden import Golden
from pipeline.validation.rounds import Round, ask_golden, plan_requests

COUNT, CLASSES = 20, 5
OUTPUTS = np.log(np.random.default_rng(0).dirichlet(np.ones(CLASSES), COUNT))
# An image shows nothing but its index.
IMAGES = np.arange(COUNT, dtype=np.uint8).reshape(COUNT, 1)
GOLDEN = Golden(IMAGES, OUTPUTS.argmax(axis=1), OUTPUTS, np.full(COUNT, 1e-4))
SCORES = np.random.default_rng(0).integers(-(10**6), 10**6, (COUNT, CLASSES), dtype=np.int32)
EXACT = replace(GOLDEN, scores=SCORES)
Change = Callable[[np.ndarray], np.ndarray]


class Asked(Client):
    """A client whose server takes batches of 8 and answers as it is told to."""

    def __init__(self, change: Change = lambda answer: answer, timeout: float = 60.0) -> None:
        super().__init__("http://127.0.0.1:1", "m", timeout)
        self.change = change
        self.sizes: list[int] = []

    def config(self) -> config_pbtxt.ModelConfig:
        return config_pbtxt.ModelConfig(max_batch_size=8)

    def infer(
        self, images: np.ndarray, timeout: float | None = None, output: str = ""
    ) -> tuple[np.ndarray, str]:
        self.sizes.append(len(images))
        if output == "scores":
            return self.change(SCORES[images[:, 0]]), "1"
        return self.change(OUTPUTS[images[:, 0]].astype(np.float32)), "1"


def asked(change: Change) -> dict[str, Round]:
    return {found.mode: found for found in ask_golden(Asked(change), GOLDEN)}


@pytest.mark.parametrize("largest", [1, 2, 8, 64])
def test_every_way_of_asking_asks_about_every_image_in_batches_that_the_server_takes(
    largest: int,
) -> None:
    requests = plan_requests(COUNT, largest)
    assert list(requests) == ["single", *(["batched"] if largest > 1 else []), "concurrent"]
    for rows in requests.values():
        assert set(np.concatenate(rows)) == set(range(COUNT))
        assert max(map(len, rows)) <= largest
    if largest > 1:  # a full batch, also where there are fewer images
        assert {len(rows) for rows in requests["batched"]} >= set(range(2, largest + 1))
    assert {len(rows) for rows in requests["single"]} == {1}
    again = plan_requests(COUNT, largest)["concurrent"]
    assert all(map(np.array_equal, again, requests["concurrent"]))


def test_a_server_that_takes_thousands_at_once_is_asked_256() -> None:
    assert max(len(rows) for rows in plan_requests(COUNT, 4096)["batched"]) == 256


def test_the_right_answers_pass_in_every_round_and_say_how_near_they_were() -> None:
    client = Asked()
    found = ask_golden(client, GOLDEN)
    assert [(each.mode, each.passed) for each in found] == [
        ("single", True),
        ("batched", True),
        ("concurrent", True),
    ]
    assert sum(each.requests for each in found) == len(client.sizes)
    assert sum(each.images for each in found) == sum(client.sizes)
    for each in found:
        assert each.versions == ("1",)
        assert each.max_ratio is not None
        assert each.max_ratio < 0.01
        assert len({worst.index for worst in each.worst}) == len(each.worst) == 5
        assert each.cells[-1] == "right"


def test_rows_that_are_mixed_up_in_a_batch_show_in_the_rounds_that_have_batches() -> None:
    found = asked(lambda answer: answer[::-1])
    assert found["single"].passed
    for mode in ("batched", "concurrent"):
        assert not found[mode].passed
        assert "have another class" in found[mode].problems[0]
        worst = found[mode].worst[0]
        assert worst.expected == OUTPUTS[worst.index].argmax()
        assert worst.error is not None
        assert worst.error > worst.bound
        assert found[mode].cells[-1] == "WRONG"


def test_a_server_that_is_wrong_at_one_batch_size_is_found_each_time() -> None:
    for _ in range(3):
        found = asked(lambda answer: -answer if len(answer) == 5 else answer)
        assert "have another class" in found["batched"].problems[0]


def test_a_server_that_is_wrong_about_copies_of_one_image_is_found() -> None:
    def change(answer: np.ndarray) -> np.ndarray:
        return -answer if len(answer) > 1 and (answer == answer[0]).all() else answer

    assert "have another class" in asked(change)["batched"].problems[0]


def test_one_wrong_answer_among_hundreds_is_found_with_its_image() -> None:
    def change(answer: np.ndarray) -> np.ndarray:
        return np.where(answer == np.float32(OUTPUTS[7, 0]), answer + np.float32(2e-4), answer)

    for found in asked(change).values():
        assert not found.passed
        assert found.worst[0].index == 7
        assert found.differing == 0
        assert "image 7 differs by 0.0002, its bound is 0.0001" in found.problems[0]


def test_an_answer_that_is_no_number_is_said_to_be_none() -> None:
    found = asked(lambda answer: np.full_like(answer, np.nan))["single"]
    assert not found.passed
    assert (found.max_abs_diff, found.max_ratio, found.differing) == (None, None, COUNT)
    assert (found.worst[0].got, found.worst[0].error) == (None, None)
    assert "differs by inf" in found.problems[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda answer: answer[:, :4], ", 4), not floating ("),
        (lambda answer: answer.astype(np.int64), "answers are int64 ("),
    ],
)
def test_answers_of_another_shape_or_type_are_wrong(change: Change, said: str) -> None:
    for found in asked(change).values():
        assert said in found.problems[0]
        assert not found.passed


def test_scores_that_are_equal_are_said_to_be_so() -> None:
    for found in ask_golden(Asked(), EXACT):
        assert (found.passed, found.cells[-1]) == (True, "equal")
    assert asked(lambda answer: answer)["single"].cells[-1] == "right"


def test_scores_that_are_not_equal_are_found_with_their_image() -> None:
    def change(answer: np.ndarray) -> np.ndarray:
        return answer + (answer == SCORES[7, 2]) if answer.dtype == np.int32 else answer

    for found in ask_golden(Asked(change), EXACT):
        assert found.cells[-1] == "WRONG"
        (problem,) = found.problems
        assert problem.startswith("scores are not equal in ")
        assert problem.endswith("the first is image 7")


def test_a_server_that_stops_answering_ends_the_round() -> None:
    asked_for = threading.Semaphore(50)

    def change(answer: np.ndarray) -> np.ndarray:
        if not asked_for.acquire(blocking=False):
            raise ServerError("it died")
        return answer

    with pytest.raises(ServerError, match="it died"):
        ask_golden(Asked(change), GOLDEN)


def test_a_bug_in_a_thread_is_not_lost() -> None:
    def change(answer: np.ndarray) -> np.ndarray:
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        ask_golden(Asked(change), GOLDEN)


def test_a_round_has_an_end() -> None:
    with pytest.raises(ServerError, match="takes more than 1e-08 s for 20 requests.*--timeout"):
        ask_golden(Asked(timeout=1e-9), GOLDEN)
