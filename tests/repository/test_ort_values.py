"""How the native backend reads values, beside the C library that it reads numbers with."""

import ctypes

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.repository.ort_values import CUDA, PARAMETERS, TENSORRT, find_problem, read_integer

LIBC = ctypes.CDLL(None)
LIBC.strtol.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p), ctypes.c_int]
LIBC.strtol.restype = ctypes.c_long
# Blanks of ASCII and of Unicode, digits of ASCII, of Arabic, wide and superscript.
ALPHABET = " \t\n\v\f\r\u00a0\u2003+-0123456789\u0661\uff11\u00b2xe._,abc"


def read_as_c(text: str) -> tuple[int, str] | type[Exception]:
    """Return what std::stoi makes of a text: it calls strtol, and checks the range."""
    content = text.encode()
    end = ctypes.c_char_p()
    buffer = ctypes.create_string_buffer(content)
    number = LIBC.strtol(buffer, ctypes.byref(end), 10)
    rest = end.value or b""
    if len(rest) == len(content):
        return ValueError
    return (number, rest.decode()) if -(2**31) <= number < 2**31 else OverflowError


@given(st.text(ALPHABET, max_size=14))
@example("2147483647")
@example("2147483648")
@example("-2147483648")
@example("-2147483649 threads")
@example("0" * 5000 + "7")
@example("9" * 5000)
@example("1" + "0" * 40)
@example("- 1")
@example("+-1")
def test_an_integer_is_read_as_the_c_library_reads_it(text: str) -> None:
    expected = read_as_c(text)
    if isinstance(expected, tuple):
        assert read_integer(text) == expected
    else:
        with pytest.raises(expected):
            read_integer(text)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("number", ["0", "-1", " +1", "1x"], ["", "x1", "\u0661", "2147483648"]),
        ("switch", ["true", "ON", "Off", "0"], ["", "yes", " on", "on\n", "01", "\uff4fn"]),
        ("flag", ["1", "0", "true", "False"], ["on", "TRUE", "", "true "]),
        ("integer", ["0", "-1", "2147483647"], ["", "+1", " 1", "1 ", "1x", "2147483648"]),
        ("size", ["0", "18446744073709551615"], ["", "-1", "1G", "1\n", "18446744073709551616"]),
        ("runtime size", ["0", "18446744073709551615"], ["", "-1", "8 GB", "18446744073709551616"]),
        ("runtime flag", ["1", "false"], ["off", "2"]),
        ("precision", ["FP32", "BF16"], ["fp16", "FP8", ""]),
        ("text", ["", "anything\nat all"], []),
    ],
)
def test_a_value_is_refused_that_the_backend_or_onnx_runtime_cannot_read(
    kind: str, good: list[str], bad: list[str]
) -> None:
    assert kind in {*PARAMETERS.values(), *TENSORRT.values(), *CUDA.values()}
    assert [find_problem(kind, text) for text in good] == [""] * len(good)
    assert all(find_problem(kind, text) for text in bad)


def test_a_number_that_ends_the_server_is_told_from_one_that_is_refused() -> None:
    assert "aborts the server" in find_problem("size", "9" * 30)
    assert "aborts the server" in find_problem("integer", "-9999999999")
    assert "aborts" not in find_problem("runtime size", "9" * 30)
