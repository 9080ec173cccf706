import contextlib
import io
import itertools
import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.client.prediction import Prediction
from pipeline.client.query import Count, ask_files
from pipeline.core.errors import ServerError
from pipeline.images.ahead import FILES_AT_ONCE, FIRST_BATCHES, UNDER_WAY, Batches, read_ahead
from pipeline.images.inputs import Source, draw_image, list_sources
from pipeline.images.read import encode_png

DIGIT = np.zeros((1, 28, 28), np.uint8)
DIGIT[0, 8:20, 13:15] = 255


@pytest.fixture(autouse=True)
def one_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.images.ahead.cores", lambda: 1)


class Server:
    """What ask_files needs of a client; it dies after so many batches."""

    name = "fake"

    def __init__(self, batches: int = 1000) -> None:
        self.left = batches

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def pictures(self) -> str:
        return "digit"

    def classify(self, images: list[np.ndarray], top: int) -> list[Prediction]:
        self.left -= 1
        if self.left < 0:
            raise ServerError("it died")
        return [Prediction("1", 0.6, (("1", 0.6),), "1", None) for _ in images]


def connect(batches: int = 1000) -> Any:
    return lambda: Server(batches)


def names(found: Iterator[Source]) -> list[str]:
    return [source.name for source in found]


def test_a_folder_is_all_its_files_by_name_without_hidden_ones(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/2", "a", "c", ".hidden"):
        (tmp_path / name).touch()
    expected = [str(tmp_path / name) for name in ("a", "c", "b/2")]
    assert names(list_sources([str(tmp_path)])) == expected


def test_links_that_lead_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    assert names(list_sources([str(tmp_path)])) == [str(tmp_path / "a"), str(tmp_path / "itself")]


@pytest.mark.parametrize("lines", [b"BM.png\nP5\n\nx\n", b"BM.png\r\nP5\r\nx"])
def test_lines_of_standard_input_are_names(lines: bytes) -> None:
    assert names(list_sources(["-"], io.BytesIO(lines))) == ["BM.png", "P5", "x"]


@pytest.mark.parametrize(
    "content", [encode_png(DIGIT), b"P5\n28 28\n255\n", b"BM\n\0\0\0\0\0\0\0rest"]
)
def test_a_picture_on_standard_input_is_one_source(content: bytes) -> None:
    assert list(list_sources(["-"], io.BytesIO(content))) == [Source("standard input", content)]


def test_a_picture_is_drawn_with_half_blocks_or_plain_characters() -> None:
    image = np.array([[[0, 255, 0], [255, 255, 0]]], np.uint8)
    assert draw_image(image, is_unicode=True) == "▄█"
    assert draw_image(image, is_unicode=False).isascii()


def test_a_million_pictures_are_read_no_further_than_a_few_batches_ahead() -> None:
    taken = itertools.count()
    content = encode_png(DIGIT)
    endless = (Source(str(next(taken)), content) for _ in itertools.count())
    answers = ask_files(connect(), endless)
    found = [next(answers).file for _ in range(5 * FILES_AT_ONCE)]
    answers.close()
    assert found == [str(index) for index in range(5 * FILES_AT_ONCE)]
    assert next(taken) <= (5 + UNDER_WAY + 5) * FILES_AT_ONCE


def test_the_first_answers_do_not_wait_for_others() -> None:
    class Curious(Server):
        def classify(self, images: list[np.ndarray], top: int) -> list[Prediction]:
            sizes.append(len(images))
            return super().classify(images, top)

    sizes: list[int] = []
    connected: Any = Curious
    endless = (Source(str(n), encode_png(DIGIT) if n != 9 else b"") for n in itertools.count())
    answers = ask_files(connected, endless)
    assert [next(answers).file for _ in range(80)] == [str(index) for index in range(80)]
    answers.close()
    assert sizes[:3] == [1, 8, FILES_AT_ONCE - 1]


@pytest.mark.slow
def test_processes_that_read_end_at_once_when_something_goes_wrong() -> None:
    before, threads = set(multiprocessing.active_children()), set(threading.enumerate())
    slow = Source("slow", encode_png(np.zeros((1, 7000, 7000), np.uint8)))
    waiting = iter([[Source("quick", encode_png(DIGIT))], [slow] * 1000, [slow] * 1000])

    class Slow(Batches):
        def take(self, wait: bool) -> list[Source]:
            return next(waiting, [])

    batches = read_ahead(Slow([]), "digit")
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(batches):
        assert next(batches)[0][0].name == "quick"  # now the others are being read
        assert set(multiprocessing.active_children()) > before
        raise KeyboardInterrupt
    # The thread that minds them too: Python's end would meet it while it closes its pipe.
    assert set(threading.enumerate()) <= threads
    assert set(multiprocessing.active_children()) <= before


def test_a_server_that_dies_in_the_middle_is_said_once_after_what_it_answered() -> None:
    found = [Source(str(index), encode_png(DIGIT)) for index in range(5 * FILES_AT_ONCE)]
    answers = ask_files(connect(batches=4), found)
    answered = sum(FIRST_BATCHES) + FILES_AT_ONCE
    assert len(list(itertools.islice(answers, answered))) == answered
    with pytest.raises(ServerError, match="it died"):
        next(answers)


def test_below_the_confidence_that_was_asked_for_the_answer_is_not_sure() -> None:
    (answer,) = ask_files(connect(), [Source("x", encode_png(DIGIT))], min_confidence=0.7)
    assert str(answer) == "x: not sure  (perhaps 1 60.00%)"
    assert answer.record()["sure"] is False
    count = Count()
    count.add(answer)
    assert str(count) == "1 answered (1 of them not sure)"


def test_an_answer_about_one_of_several_digits_says_so_and_where_all_are() -> None:
    sheet = np.zeros((1, 100, 200), np.uint8)
    sheet[0, 20:50, 20:26] = sheet[0, 20:60, 120:130] = 255
    one, several = ask_files(
        connect(), [Source("one", encode_png(DIGIT)), Source("two", encode_png(sheet))]
    )
    assert str(one).splitlines() == ["one: 1  60.00%"]
    assert str(several).splitlines() == [
        "two: 1  60.00%",
        "  2 parts found; the answer is for the one with the most ink, at x 120 to 130, "
        "y 20 to 60 (pixels)",
    ]
    assert several.record()["parts"] == ((120, 20, 130, 60), (20, 20, 26, 50))


def test_an_answer_without_a_threshold_says_nothing_about_sureness() -> None:
    (answer,) = ask_files(connect(), [Source("x", encode_png(DIGIT))])
    assert str(answer) == "x: 1  60.00%"
    assert answer.record()["sure"] is None
    count = Count()
    count.add(answer)
    assert str(count) == "1 answered"
