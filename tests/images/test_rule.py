"""The rule of a third-party network: what it makes of pictures, and what is no rule."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import PipelineError
from pipeline.images.inputs import Source, draw_image, look
from pipeline.images.read import BlankError, prepare_picture
from pipeline.images.rule import MAX_RATIO, PictureRule

MEAN, STD = (0.49, 0.48, 0.44), (0.25, 0.24, 0.26)
NORMAL = "mean=0.49:0.48:0.44,std=0.25:0.24:0.26"
FLOATS = "shape=3x32x32,dtype=float32"


def photo(width: int = 91, height: int = 60) -> Image.Image:
    """A coloured picture with no two pixels alike to speak of."""
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(levels)


def encoded(image: Image.Image, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", **options)
    return content.getvalue()


def reference(image: Image.Image, size: tuple[int, int], side: int = 32) -> np.ndarray:
    """Resize to (width, height), cut out the middle, scale to 0 to 1, and normalize."""
    resized = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    middle = resized.crop((left, top, left + side, top + side))
    share = np.asarray(middle).astype(np.float32) / np.float32(255)
    normal = (share - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("resize", "size"),
    [("", (48, 32)), ("resize=36,", (54, 36)), ("resize=40x32,", (32, 40))],
    ids=["as large as the input", "shorter side", "stretched"],
)
def test_a_rule_resizes_cuts_scales_and_normalizes_as_its_reference(
    resize: str, size: tuple[int, int]
) -> None:
    made = prepare_picture(encoded(photo()), pictures=f"{resize}{NORMAL},{FLOATS}").image
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made, reference(photo(), size))


def test_a_rule_turns_a_photo_upright_and_lays_it_on_white() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    lying = encoded(photo().transpose(Image.Transpose.ROTATE_90), exif=exif.tobytes())
    upright = prepare_picture(lying, pictures=f"{NORMAL},{FLOATS}").image
    np.testing.assert_array_equal(upright, reference(photo(), (48, 32)))
    clear = photo()
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    on_white = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    laid = prepare_picture(encoded(clear), pictures=f"{NORMAL},{FLOATS}").image
    np.testing.assert_array_equal(laid, reference(on_white, (48, 32)))


def test_a_network_of_bytes_gets_bytes_in_the_order_of_its_colours() -> None:
    rgb, bgr, gray = (
        prepare_picture(photo(), pictures=f"color={color},shape={shape},dtype=uint8").image
        for color, shape in (("rgb", "3x32x32"), ("bgr", "3x32x32"), ("gray", "1x32x32"))
    )
    assert rgb.dtype == np.uint8
    np.testing.assert_array_equal(bgr, rgb[::-1])
    square = photo().convert("L").resize((48, 32), Image.Resampling.BILINEAR).crop((8, 0, 40, 32))
    np.testing.assert_array_equal(gray[0], np.asarray(square))


def test_gray_of_16_bits_is_stretched_in_all_channels() -> None:
    deep = Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64))
    made = prepare_picture(encoded(deep), pictures="shape=3x64x64,dtype=uint8").image
    assert (int(made.min()), int(made.max())) == (0, 255)
    assert (made[0] == made[2]).all()


def test_a_rule_is_read_with_spaces_and_defaults() -> None:
    rule = PictureRule.parse(f"resize=36, {NORMAL}, {FLOATS}")
    assert (rule.resize, rule.color, rule.mean, rule.std) == ((36,), "rgb", MEAN, STD)
    rule = PictureRule.parse("shape=1x32x100,dtype=float32")
    assert (rule.resize, rule.color, rule.mean, rule.std) == ((100,), "gray", (0.0,), (1.0,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"size=32,{FLOATS}", "give resize, color, mean, std as KEY=VALUE"),
        (f"mean=1,mean=2,{FLOATS}", "each only once"),
        (f"resize=small,{FLOATS}", "cannot be read: invalid literal for int"),
        (f"mean=0.5;0.5,{FLOATS}", "cannot be read: could not convert string"),
        ("mean=0.5", "cannot be read: 'shape'"),
        (f"resize=31,{FLOATS}", "resize must be N or HEIGHTxWIDTH, from 32x32 to 4096 pixels"),
        (f"resize=32x31,{FLOATS}", "from 32x32"),
        (f"resize=32x32x3,{FLOATS}", "from 32x32"),
        (f"resize=99999,{FLOATS}", "to 4096"),
        (f"color=gray,{FLOATS}", "color must be rgb or bgr, got 'gray'"),
        (f"mean=0.5:0.5,{FLOATS}", "mean and std must be 1 or 3 numbers"),
        (f"std=0,{FLOATS}", "std above 0"),
        (f"std=nan,{FLOATS}", "mean and std must be"),
        (f"mean=inf,{FLOATS}", "mean and std must be"),
        ("shape=12,dtype=float32", r"but the network takes float32 \[12\]"),
        ("shape=32x32x3,dtype=float32", r"floats \[1 or 3, H, W\], but .* float32 \[32, 32, 3\]"),
        ("shape=3x32x32,dtype=int64", "uint8 or floats .*, but the network takes int64"),
        ("mean=0.5,shape=3x32x32,dtype=uint8", "leave out mean and std"),
    ],
)
def test_what_is_no_rule_is_refused_with_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        PictureRule.parse(text)


def test_a_picture_that_shows_nothing_or_is_a_strip_is_refused() -> None:
    with pytest.raises(BlankError):
        prepare_picture(Image.new("RGB", (50, 50), "teal"), pictures=FLOATS)
    with pytest.raises(PipelineError, match="strip.png has 210 x 10 pixels, which is too long"):
        prepare_picture(encoded(photo(10 * MAX_RATIO + 10, 10)), "strip.png", FLOATS)


def test_an_image_of_floats_is_drawn_in_few_columns(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(encoded(photo()))
    rule = f"{NORMAL},shape=3x160x160,dtype=float32"
    (seen,) = look([Source(str(tmp_path / "photo.png"))], rule)
    assert not isinstance(seen, str)
    lines = draw_image(seen.image, is_unicode=False).splitlines()
    assert max(map(len, lines)) <= 64
    assert len(lines) > 20
