"""From image files to what the model takes, on digits that are drawn here."""

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import ExifTags, Image, ImageDraw, ImageFilter

from pipeline.core.errors import PipelineError
from pipeline.images import read
from pipeline.images.read import Box, prepare, prepare_picture, read_gray, read_image, write_png
from pipeline.web.gateway import _read


def seven(width: int = 200, height: int = 300, ink: int = 0, paper: int = 255) -> Image.Image:
    """A 7 with the proportions of the picture, which turned or mirrored is no 7."""
    picture = Image.new("L", (width, height), paper)
    points = [(0.25, 0.2), (0.75, 0.25), (0.45, 0.8)]
    scaled = [(round(x * width), round(y * height)) for x, y in points]
    ImageDraw.Draw(picture).line(scaled, fill=ink, width=max(2, width // 12), joint="curve")
    return picture


def as_file(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def as_mnist(picture: Image.Image) -> np.ndarray:
    return prepare(np.asarray(picture.convert("L")))


@pytest.fixture(scope="module")
def digit() -> np.ndarray:
    """The 7 as the model takes it."""
    return as_mnist(seven())


def assert_alike(one: np.ndarray, other: np.ndarray, mean: float = 6.0) -> None:
    assert one.shape == other.shape == (1, 28, 28)
    assert one.dtype == np.uint8
    difference = np.abs(one.astype(int) - other)
    assert difference.mean() <= mean, f"mean difference {difference.mean():.2f} gray levels"


def extent(digit: np.ndarray) -> tuple[int, int]:
    rows, columns = np.nonzero(digit[0] > 0.2 * 255)
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


# The rules of MNIST


def test_a_digit_is_bright_on_zero_twenty_high_and_centred_by_mass(digit: np.ndarray) -> None:
    assert digit.max() == 255
    assert digit[0, [0, -1]].max() == digit[0, :, [0, -1]].max() == 0
    height, width = extent(digit)
    assert height == 20
    assert width < 20
    for axis in (0, 1):
        mass = digit[0].sum(axis=1 - axis, dtype=float)
        assert 13.4 <= np.average(np.arange(28), weights=mass) < 14.6


def test_a_wide_drawing_is_twenty_wide() -> None:
    height, width = extent(as_mnist(seven(400, 200)))
    assert width == 20
    assert height < 20


def test_what_is_prepared_already_comes_back_the_same(digit: np.ndarray) -> None:
    np.testing.assert_array_equal(prepare(digit[0]), digit)
    np.testing.assert_array_equal(prepare(255 - digit[0]), digit)


def test_neither_enlarging_nor_a_margin_changes_the_digit(digit: np.ndarray) -> None:
    enlarged = np.kron(digit[0], np.ones((10, 10), np.uint8))
    np.testing.assert_array_equal(prepare(np.pad(enlarged, ((90, 10), (0, 200)))), digit)


@pytest.mark.parametrize("size", [(40, 60), (100, 150), (600, 900), (2000, 3000)])
def test_the_size_of_the_picture_does_not_matter(digit: np.ndarray, size: tuple[int, int]) -> None:
    # Its centre may be rounded to the next pixel, which moves the whole digit.
    assert_alike(as_mnist(seven(*size)), digit, mean=14)


@pytest.mark.parametrize(("ink", "paper"), [(255, 0), (0, 200), (90, 255), (200, 40), (215, 255)])
def test_polarity_and_contrast_do_not_matter(digit: np.ndarray, ink: int, paper: int) -> None:
    assert_alike(as_mnist(seven(ink=ink, paper=paper)), digit, mean=0.5)


def test_a_digit_at_the_edge_of_the_picture_is_whole(digit: np.ndarray) -> None:
    cropped = seven().crop((48, 52, 160, 250))
    assert_alike(as_mnist(cropped), digit)


# Photos


@pytest.mark.parametrize("pen", [(30, 40, 110), (150, 30, 30), (70, 70, 70)])
def test_a_photo_with_uneven_light_and_noise_is_the_digit(
    digit: np.ndarray, pen: tuple[int, int, int]
) -> None:
    rng = np.random.default_rng(0)
    ink = np.zeros((1400, 1000, 1), np.float32)  # (H, W, 1), 0 to 1
    ink[800:1100, 150:350, 0] = np.asarray(seven(ink=255, paper=0), np.float32) / 255
    y, x = np.mgrid[0:1400, 0:1000].astype(np.float32)
    paper = (200 + 40 * (x / 1000 - 0.5) - 70 * (y / 1400 - 0.5))[..., np.newaxis]
    photo = paper * (1 - ink) + np.array(pen) * ink + rng.normal(0, 6, (1400, 1000, 3))
    content = as_file(Image.fromarray(np.clip(photo, 0, 255).astype(np.uint8)), "JPEG", quality=85)
    # Its centre may be rounded to the next pixel, which moves the whole digit.
    assert_alike(read_image(content), digit, mean=14)


def test_blank_paper_is_all_zero_even_if_it_is_uneven_and_noisy() -> None:
    rng = np.random.default_rng(0)
    light = np.linspace(150, 230, 400) + rng.normal(0, 4, (300, 400))
    for blank in (np.full((50, 50), 255), np.zeros((50, 50)), np.full((9, 9), 77), light):
        assert not prepare(blank.astype(np.uint8)).any()


def lined(picture: Image.Image, rows: range, columns: range, level: int = 0) -> Image.Image:
    draw = ImageDraw.Draw(picture)
    for row in rows:
        draw.line([(0, row), (picture.width, row + 8)], fill=level, width=2)
    for column in columns:
        draw.line([(column, 0), (column - 8, picture.height)], fill=level, width=2)
    return picture


@pytest.mark.parametrize("level", [0, 90, 170])
@pytest.mark.parametrize("columns", [range(0), range(5, 220, 26)])
def test_the_lines_of_ruled_and_squared_paper_are_no_ink(
    digit: np.ndarray, level: int, columns: range
) -> None:
    picture = lined(seven(), range(4, 290, 26), columns, level)
    assert_alike(as_mnist(picture), digit, mean=14)


@pytest.mark.parametrize("noise", [0, 2])
def test_lined_paper_without_a_digit_is_blank_where_its_lines_run_out_of_the_picture(
    noise: float,
) -> None:
    paper = lined(Image.new("L", (300, 300), 240), range(-4, 290, 26), range(4, 300, 26), 150)
    levels = np.asarray(paper) + np.random.default_rng(0).normal(0, noise, (300, 300))
    assert not prepare(levels.astype(np.uint8)).any()


def test_a_stroke_across_the_whole_picture_is_no_line_of_the_paper() -> None:
    one = Image.new("L", (200, 300), 255)
    ImageDraw.Draw(one).line([(90, 0), (110, 300)], fill=0, width=3)
    assert prepare(np.asarray(one)).any()


def test_specks_and_what_touches_the_border_are_dropped(digit: np.ndarray) -> None:
    picture = seven(400, 300)
    assert_alike(as_mnist(picture), as_mnist(picture.copy()), mean=0)
    spoiled = picture.copy()
    draw = ImageDraw.Draw(spoiled)
    draw.rectangle((0, 250, 20, 300), fill=0)  # a finger
    draw.point([(200, 290), (20, 20), (380, 100)], fill=0)
    np.testing.assert_array_equal(as_mnist(spoiled), as_mnist(picture))


def test_a_hairline_is_made_as_wide_as_a_pen(digit: np.ndarray) -> None:
    picture = Image.new("L", (600, 900), 255)
    ImageDraw.Draw(picture).line([(120, 180), (450, 225), (270, 720)], fill=0, width=2)
    assert (as_mnist(picture) > 127).sum() > 0.6 * (digit > 127).sum()


@pytest.mark.parametrize("ink", [40, 220])
@pytest.mark.parametrize("blur", [0, 3])
@pytest.mark.parametrize("margin", [0, 2, 6])
def test_a_picture_that_is_cut_to_its_digit_is_the_digit(
    digit: np.ndarray, ink: int, blur: int, margin: int
) -> None:
    paper = 260 - ink
    whole = seven(ink=ink, paper=paper).filter(ImageFilter.GaussianBlur(blur))
    levels = np.asarray(whole, float) + np.random.default_rng(0).normal(0, 2, (300, 200))
    levels *= np.linspace(0.9, 1, 200)  # light from one side
    picture = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
    (left, top, right, bottom) = parts(picture)[0]
    cut = picture.crop((left - margin, top - margin, right + margin, bottom + margin))
    # Its centre may be rounded to the next pixel, which moves the whole digit.
    assert_alike(as_mnist(cut), as_mnist(picture), mean=14)


# Parts


def paste(sheet: Image.Image, *places: tuple[int, int], width: int = 60) -> Image.Image:
    """Draw a 7 that is `width` wide at each place."""
    for place in places:
        sheet.paste(seven(width, width * 3 // 2), place)
    return sheet


def parts(picture: Image.Image) -> tuple[Box, ...]:
    return prepare_picture(np.asarray(picture)).parts


def test_each_digit_of_a_picture_is_a_part_and_the_heaviest_is_first() -> None:
    sheet = paste(Image.new("L", (600, 300), 255), (20, 30), (480, 150))
    sheet.paste(seven(120, 180), (250, 60))
    found = parts(sheet)
    assert len(found) == 3
    for box, (left, top, right, bottom) in zip(
        found, [(250, 60, 370, 240), (20, 30, 80, 120), (480, 150, 540, 240)], strict=True
    ):
        assert left < box[0] < box[2] < right
        assert top < box[1] < box[3] < bottom
    alone = prepare(np.asarray(sheet.crop((240, 50, 380, 250))))
    np.testing.assert_array_equal(prepare(np.asarray(sheet)), alone)


def test_digits_that_are_written_next_to_each_other_are_two_parts() -> None:
    close = paste(Image.new("L", (300, 200), 255), (60, 50), (102, 50))
    assert len(parts(close)) == 2


def test_a_digit_of_several_strokes_is_one_part() -> None:
    five, four = Image.new("L", (200, 300), 255), Image.new("L", (200, 300), 255)
    draw = ImageDraw.Draw(five)
    draw.line([(80, 60), (75, 140)], 0, 12)
    draw.arc((50, 130, 140, 230), 200, 160, 0, 12)
    draw.line([(100, 55), (150, 50)], 0, 12)  # the bar, apart
    draw = ImageDraw.Draw(four)
    draw.line([(60, 60), (50, 160), (110, 160)], 0, 12)
    draw.line([(130, 60), (130, 240)], 0, 12)  # the upright stroke, apart
    assert len(parts(five)) == len(parts(four)) == 1


def test_specks_ruled_lines_and_noise_are_no_parts() -> None:
    noisy = np.asarray(lined(seven(), range(4, 290, 26), range(0), 90)).astype(float)
    noisy += np.random.default_rng(0).normal(0, 8, noisy.shape)
    speckled = seven()
    ImageDraw.Draw(speckled).point([(20, 20), (190, 280), (20, 280)], 0)
    for picture in (Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), speckled):
        assert len(parts(picture)) == 1


def test_boxes_are_in_pixels_of_the_picture_that_was_given(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (near,) = parts(seven(600, 900))
    stored = seven(3000, 4500).transpose(Image.Transpose.ROTATE_90)
    (box,) = prepare_picture(as_file(stored, "JPEG", quality=95, exif=exif)).parts
    assert box == pytest.approx([5 * place for place in near], abs=24)  # read at 1/4 and reduced
    assert len(parts(seven(60, 90))) == 1


# Files


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *[("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")],
        *[("TIFF", mode) for mode in ("1", "L", "CMYK", "I;16", "F")],
        *[(kind, "RGB") for kind in ("JPEG", "WEBP", "BMP", "GIF", "PPM")],
    ],
)
def test_any_format_and_mode_is_the_same_digit(digit: np.ndarray, kind: str, mode: str) -> None:
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(seven(), np.uint16) * 257)
    else:
        picture = seven().convert(mode)
    assert_alike(read_image(as_file(picture, kind)), digit, mean=2)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_large_jpeg_is_decoded_small_and_the_same_digit(mode: str) -> None:
    large = seven().resize((3000, 4000)).convert(mode)
    content = as_file(large, "JPEG")
    assert read_gray(content)[0].shape == (1000, 750)
    whole = as_mnist(large)
    assert_alike(read_image(content), whole, mean=2)
    with Image.open(io.BytesIO(content)) as opened:  # the caller's own stays as it is
        assert_alike(read_image(opened), whole, mean=2)
        assert opened.size == large.size


@pytest.mark.parametrize("ink", [0, 255])
def test_what_is_transparent_is_paper(digit: np.ndarray, ink: int) -> None:
    drawn = seven(ink=255, paper=0)
    only_ink = Image.merge("LA", (Image.new("L", drawn.size, ink), drawn))
    assert_alike(read_image(as_file(only_ink)), digit, mean=0.5)
    on_paper = seven(ink=ink, paper=255 - ink).convert("LA")
    on_paper.paste((0, 0), (0, 0, 200, 40))  # a strip is cut away
    assert_alike(read_image(as_file(on_paper)), digit, mean=0.5)


@pytest.mark.parametrize(
    ("orientation", "how_it_is_stored"),
    [
        (1, None),
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),  # to be turned back by 270 degrees against the clock
        (8, Image.Transpose.ROTATE_270),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
    ],
)
def test_a_photo_taken_with_the_phone_turned_is_upright(
    digit: np.ndarray, orientation: int, how_it_is_stored: Image.Transpose | None
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = seven() if how_it_is_stored is None else seven().transpose(how_it_is_stored)
    assert_alike(read_image(as_file(stored, "JPEG", quality=95, exif=exif)), digit, mean=2)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*", b"Exif\0\0garbage!", b"Exif\0\0"])
def test_damaged_exif_spoils_no_picture(digit: np.ndarray, kind: str, exif: bytes) -> None:
    lossless = {"lossless": True} if kind == "WEBP" else {}
    content = as_file(seven().convert("RGB"), kind, exif=exif, **lossless)
    assert_alike(read_image(content), digit, mean=2)
    assert_alike(_read(content, "digit").image, digit, mean=2)  # as the gateway does


def test_a_written_png_is_read_back_the_same(tmp_path: Path, digit: np.ndarray) -> None:
    write_png(digit, tmp_path / "seven.png")
    with Image.open(tmp_path / "seven.png") as picture:
        assert (picture.mode, picture.size) == ("L", (28, 28))
    np.testing.assert_array_equal(read_image(tmp_path / "seven.png"), digit)
    assert [path.name for path in tmp_path.iterdir()] == ["seven.png"]


# What cannot be read


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header))
    return start + b"\0\0\0\x10IDAT" + bytes(20)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "its format is unknown"),
        (b"I am no image.\n", "its format is unknown"),
        (as_file(seven())[:400], "truncated"),
        (as_file(seven(), "JPEG")[:400], "truncated"),
        (b"%PDF-1.7\n", "its format is unknown"),
        (png_header(10_000, 8_000), "10000 x 8000 pixels, 50000000 are allowed"),
        (png_header(12_000, 9_000), "12000 x 9000 pixels"),  # Pillow would warn of it
        (png_header(100_000, 100_000), "decompression bomb"),
        (png_header(0, 5), "cannot be read as an image"),
    ],
)
def test_what_is_no_image_is_one_line_that_names_the_file(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "notes.png"
    path.write_bytes(content)
    with pytest.raises(PipelineError, match=problem) as caught:
        read_image(path)
    assert caught.value.exit_code == 1
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(PipelineError, match=r"^the upload "):
        read_image(content, "the upload")


def test_a_missing_file_a_folder_and_one_without_rights_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, said in ((tmp_path / "missing.png", "is not a file"), (tmp_path, "is a folder")):
        with pytest.raises(PipelineError, match=said):
            read_image(path)
    path = tmp_path / "secret.png"
    path.write_bytes(as_file(seven()))

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # chmod does not stop root
    with pytest.raises(PipelineError, match=r"cannot read .*secret.png \(Permission denied\)"):
        read_image(path)


def test_a_name_that_is_too_long_and_a_folder_without_rights_are_no_image_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    for path in (tmp_path / ("x" * 300), tmp_path / "zero\0"):
        with pytest.raises(PipelineError, match="is not a file"):
            read_image(path)
    monkeypatch.setattr("os.stat", refuse)  # chmod does not stop root
    with pytest.raises(PipelineError, match="is not a file.*permissions"):
        read_image(tmp_path / "secret.png")


@pytest.mark.parametrize("shape", [(), (9,), (0, 7), (7, 0, 3), (5, 9, 9), (9, 9, 1), (2, 9, 9, 3)])
def test_an_array_of_another_shape_is_no_picture(shape: tuple[int, ...]) -> None:
    with pytest.raises(PipelineError, match=r"is not a picture: use gray levels \(H, W\)"):
        read_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_array_with_what_is_no_number_is_no_picture(value: float) -> None:
    levels = np.zeros((50, 50), np.float32)
    levels[20, 20] = value
    with pytest.raises(PipelineError, match="NaN or infinity is not a picture"):
        read_image(levels)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_an_array_of_gray_levels_or_colours_is_a_picture(digit: np.ndarray, mode: str) -> None:
    assert_alike(read_image(np.asarray(seven().convert(mode))), digit, mean=2)


def test_a_file_beyond_the_limit_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "MAX_FILE_BYTES", 1000)
    path = tmp_path / "large.bmp"
    path.write_bytes(as_file(seven(), "BMP"))
    with pytest.raises(PipelineError, match=r"large.bmp is larger than 1000 bytes"):
        read_image(path)


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 2)), np.zeros((1, 2, 2), np.uint8), np.zeros((0, 3), np.uint8)]
)
def test_other_than_gray_levels_are_a_wrong_call(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="gray levels"):
        prepare(wrong)


@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=40)))
@settings(max_examples=200, deadline=None)
def test_any_gray_levels_become_an_image_of_the_model(gray: np.ndarray) -> None:
    image = prepare(gray)
    assert image.shape == (1, 28, 28)
    assert image.dtype == np.uint8
    assert image.max() in (0, 255)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_file_is_an_image_or_a_pipeline_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM"]))
    content = bytearray(as_file(seven(20, 30).convert("RGB"), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PipelineError):
        assert read_image(bytes(content)).shape == (1, 28, 28)
