"""Images: preprocessing to the pixel as the published models do it, and files that are missing or damaged."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from vlmamba.model import ImageProcessor
from vlmamba.model import image as images
from vlmamba.model.image import FORMATS, as_rgb, decode_image, is_image, open_image

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(60, 40), (40, 60), (61, 40), (40, 67), (33, 33), (28, 28), (28, 31), (35, 28), (200, 9), (1, 1), (1, 5)]
"""Width and height: landscape, portrait, square, odd differences, smaller than the result, tiny."""


def noise(size: tuple[int, int]) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def picture():
    return noise((60, 40))


def as_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


# The oracles: the image processors of `transformers`, those on Pillow, by the settings of the published files.
def clip_of_transformers(**changes):
    settings = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}} | changes
    return transformers.CLIPImageProcessorPil(**settings), ImageProcessor(28, "crop-floor", CLIP_MEAN, CLIP_STD)


def siglip_of_transformers(**changes):
    return transformers.SiglipImageProcessorPil(size={"height": 28, "width": 28}, **changes), ImageProcessor(28)


def dinov2_of_transformers(**changes):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = transformers.BitImageProcessorPil(
        size={"shortest_edge": 33}, crop_size={"height": 28, "width": 28}, image_mean=mean, image_std=std, **changes
    )
    return theirs, ImageProcessor(28, "crop-floor", mean, std, resize_to=33)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pair", [clip_of_transformers, siglip_of_transformers, dinov2_of_transformers])
def test_pixels_are_those_of_transformers(pair, size):
    theirs, ours = pair(do_rescale=False, do_normalize=False)
    image = noise(size)
    want = theirs(image)["pixel_values"][0]
    assert want.dtype == np.uint8
    np.testing.assert_array_equal(as_array(ours.pixels(image)), want)
    theirs, _ = pair()
    want = torch.from_numpy(np.asarray(theirs(image)["pixel_values"][0]))
    torch.testing.assert_close(ours(image), want.float(), rtol=1e-6, atol=1e-6)


def torchvision_resize_crop(image: Image.Image, size: int) -> Image.Image:
    """`Resize(size)` and `CenterCrop(size)` by their documentation: the longer side is cut down to a whole number, a
    half pixel is rounded to the even one."""
    width, height = image.size
    ratio = Fraction(max(width, height), min(width, height))
    long = int(size * ratio)
    image = image.resize((size, long) if width <= height else (long, size), Image.Resampling.BICUBIC)
    left, top = (round(Fraction(s - size, 2)) for s in image.size)
    return image.crop((left, top, left + size, top + size))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crop_rounds_as_torchvision(size):
    image = noise(size)
    want = torchvision_resize_crop(image, 28)
    np.testing.assert_array_equal(as_array(ImageProcessor(28, "crop").pixels(image)), as_array(want))


def test_the_two_roundings_of_a_crop_differ_by_a_pixel():
    image = noise((31, 28))  # three columns too many
    pixels = np.asarray(image)
    np.testing.assert_array_equal(np.asarray(ImageProcessor(28, "crop").pixels(image)), pixels[:, 2:30])
    np.testing.assert_array_equal(np.asarray(ImageProcessor(28, "crop-floor").pixels(image)), pixels[:, 1:29])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_letterbox_as_cobra(size):
    """Equal borders by whole pixels, then what `crop` does: an odd difference leaves it a pixel short of square."""
    mean = (0.5, 0.25, 0.75)
    image = noise(size)
    padded = ImageOps.expand(
        image, tuple(int((max(size) - s) / 2) for s in size), fill=tuple(int(m * 255) for m in mean)
    )
    want = torchvision_resize_crop(padded, 28)
    np.testing.assert_array_equal(as_array(ImageProcessor(28, "letterbox", mean).pixels(image)), as_array(want))


def test_letterbox_pads_with_the_mean_color(picture):
    pixels = ImageProcessor(60, "letterbox", mean=(0.5, 0.25, 0.75))(picture)
    back = (pixels * 0.5 + torch.tensor([0.5, 0.25, 0.75])[:, None, None]) * 255
    assert torch.equal(back[:, 0, 0].round(), torch.tensor([127.0, 63.0, 191.0]))
    torch.testing.assert_close(back[:, 10:50], torch.from_numpy(np.array(picture)).permute(2, 0, 1).float())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_naive_resize_and_normalization(size):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    image = noise(size)
    want = np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC), dtype=np.float32) / np.float32(255)
    want = (want - np.float32(mean)) / np.float32(std)
    assert torch.equal(ImageProcessor(28, "naive", mean, std)(image), torch.from_numpy(want).permute(2, 0, 1))


def test_crop_takes_the_middle():
    stripes = Image.new("RGB", (60, 20), "red")
    stripes.paste("blue", (20, 0, 40, 20))
    assert torch.equal(ImageProcessor(20, "crop")(stripes), ImageProcessor(20)(Image.new("RGB", (20, 20), "blue")))


def test_a_margin_is_cut_off_after_resizing(picture):
    for resize in ("naive", "crop"):
        larger = ImageProcessor(33, resize).pixels(picture).crop((2, 2, 30, 30))
        assert ImageProcessor(28, resize, resize_to=33).pixels(picture) == larger


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "HSV", "I;16", "I", "F"])
def test_every_kind_of_image_becomes_rgb_as_in_transformers(tmp_path, picture, mode):
    image = picture.convert("L").convert(mode) if mode.startswith(("I", "F")) else picture.convert(mode)
    if mode == "I;16":  # sixteen bits: what is above 255 becomes white
        image = Image.fromarray(np.array(picture)[:, :, 0].astype(np.uint16) * 3)
        image.save(tmp_path / "image.png")
        with Image.open(tmp_path / "image.png") as saved:
            assert saved.mode == "I;16"
        assert open_image(tmp_path / "image.png") == image.convert("RGB")
        assert (np.array(image) > 255).any()
        assert np.array_equal(np.array(open_image(tmp_path / "image.png"))[..., 0], np.array(image).clip(0, 255))
    theirs, ours = siglip_of_transformers(do_rescale=False, do_normalize=False)
    np.testing.assert_array_equal(as_array(ours.pixels(image)), theirs(image)["pixel_values"][0])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_an_alpha_channel_is_dropped(picture, mode):
    """OpenAI's and Cobra's code call `convert("RGB")`; `transformers` 5 blends such an image with white."""
    if mode == "P":
        image = picture.quantize(16)
        image.info["transparency"] = 3
        opaque = picture.quantize(16).convert("RGB")
    else:
        opaque = (picture if mode == "RGBA" else picture.convert("L")).convert("RGB")
        image = opaque.convert(mode)
        image.putalpha(Image.linear_gradient("L").resize(picture.size))
    assert torch.equal(ImageProcessor(28)(image), ImageProcessor(28)(opaque))


def test_an_orientation_tag_is_not_applied(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as saved:
        assert saved.getexif()[0x0112] == 6
    assert torch.equal(ImageProcessor(28)(tmp_path / "turned.png"), ImageProcessor(28)(picture))


def test_files_that_cannot_be_read_are_named(tmp_path, picture):
    with pytest.raises(FileNotFoundError, match="no image at .*nothing.png"):
        open_image(tmp_path / "nothing.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match="text.png is not an image that can be read"):
        open_image(tmp_path / "text.png")
    for name in ("cut.png", "cut.jpg"):
        picture.save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=f"{name} is damaged or cut short"):
            open_image(tmp_path / name)


def test_an_image_of_too_many_pixels_is_named(tmp_path, picture, monkeypatch):
    picture.save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="large.png is too large"):
        open_image(tmp_path / "large.png")


def test_a_content_of_another_format_starts_no_program(tmp_path, monkeypatch):
    """EPS under any name would run Ghostscript."""
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.eps")
    (tmp_path / "picture.png").write_bytes((tmp_path / "picture.eps").read_bytes())
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("a program was started"))
    for name in ("picture.eps", "picture.png"):
        with pytest.raises(ValueError, match=f"{name} is not an image that can be read: its content is none of AVIF"):
            open_image(tmp_path / name)
    assert is_image("a.JPG") and is_image("a.avif") and not is_image("a.eps") and not is_image("a.heic")


def write(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


WRITABLE = [kind for kind in FORMATS if kind not in ("MPO",) and (Image.init() or kind in Image.SAVE)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRITABLE)
def test_each_format_is_read_and_any_damage_to_it_is_a_named_value_error(kind):
    """Flipped bits and cuts: what comes is an image, or one kind of error."""
    whole = write(noise((9, 7)), kind)
    assert decode_image(io.BytesIO(whole), "x").size == (9, 7)
    rng, failed = np.random.default_rng(0), 0
    for _ in range(150):
        data = bytearray(whole[: rng.integers(1, len(whole) + 1)] if rng.random() < 0.3 else whole)
        for place in rng.integers(0, min(len(data), 200), rng.integers(1, 4)):
            data[place] ^= 1 << int(rng.integers(8))
        try:
            assert decode_image(io.BytesIO(bytes(data)), "the name").mode == "RGB"
        except ValueError as e:
            failed += 1
            assert str(e).startswith("the name "), e
    assert failed > 5


class Exploding(io.BytesIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def read(self, *args):
        raise self.error


def test_any_exception_of_a_decoder_is_a_value_error_but_for_those_of_the_system():
    class Unheard(Exception):
        pass

    for error in (Unheard("odd"), RuntimeError("odd"), KeyError("odd"), RecursionError("odd"), OSError("odd")):
        with pytest.raises(ValueError, match="x.png is damaged or cut short: .*odd"):
            decode_image(Exploding(error), "x.png")
    for error in (MemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            decode_image(Exploding(error), "x.png")


def test_a_text_chunk_of_a_png_that_is_too_large_is_named(tmp_path):
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("k", "x" * (2 << 20), zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "z.png", pnginfo=chunk)
    with pytest.raises(ValueError, match=r"z.png is damaged or cut short: Decompressed data too large"):
        open_image(tmp_path / "z.png")


def test_an_image_that_pillow_has_not_yet_read_is_checked_as_a_file_is(tmp_path, picture):
    picture.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(ValueError, match="cut.png is damaged or cut short"):
        ImageProcessor(8)(image)


def test_names_that_no_file_can_have_are_a_value_error(tmp_path):
    for name in ("a" * 5000, "nul\0.png"):
        with pytest.raises((ValueError, FileNotFoundError), match="cannot be opened|no image at"):
            open_image(name)
    with pytest.raises(FileNotFoundError, match="no image at"):
        open_image(tmp_path)  # a folder


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch, picture):
    picture.save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match=r"a.png is too large: [\d,]+ bytes, where 100 are the most"):
        open_image(tmp_path / "a.png")


def thin_png(width: int, height: int) -> bytes:
    """Few bytes for many pixels of one bit."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x01\0\0\0\0"
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_an_image_with_too_long_a_side_is_named():
    with pytest.raises(ValueError, match="x.png is too large: 1 x 131073 pixels, a side beyond 131,072"):
        decode_image(io.BytesIO(thin_png(1, 131_073)), "x.png")
    with pytest.raises(ValueError, match="the image has no pixels: its size is 0 x 5"):
        ImageProcessor(8)(Image.new("RGB", (0, 5)))


@given(
    width=st.one_of(st.integers(1, 4), st.integers(1, 400)),
    height=st.one_of(st.integers(1, 4), st.integers(1, 400)),
    mode=st.sampled_from(["crop", "crop-floor", "letterbox"]),
    size=st.sampled_from([(28, None), (14, 33), (64, None)]),
)
def test_a_window_equals_that_of_the_resized_image_to_the_pixel(width, height, mode, size):
    processor = ImageProcessor(size[0], mode, (0.5, 0.25, 0.75), resize_to=size[1])
    image = noise((width, height))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "MAX_RESIZED_PIXELS", 1 << 40)
        want = processor.pixels(image)
        patch.setattr(images, "MAX_RESIZED_PIXELS", 0)
        assert processor.pixels(image) == want


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (2, 5001), (4999, 3), (8, 9000)])
@pytest.mark.parametrize("mode", ["crop", "crop-floor", "letterbox"])
def test_thin_images_have_the_pixels_of_the_resized_image(size, mode, monkeypatch):
    image, calls = noise(size), []
    narrow = images.resize_window
    monkeypatch.setattr(images, "resize_window", lambda *a: calls.append(1) or narrow(*a))
    processor = ImageProcessor(20, mode)
    monkeypatch.setattr(images, "MAX_RESIZED_PIXELS", 1 << 40)
    want = processor.pixels(image)
    monkeypatch.setattr(images, "MAX_RESIZED_PIXELS", 0)
    assert not calls and processor.pixels(image) == want and calls


THIN = """
import resource, sys
from vlmamba.model import ImageProcessor
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for mode in ("naive", "crop", "crop-floor", "letterbox"):
    ImageProcessor(336, mode)(sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize("size", [(1, 65_000), (65_000, 1)])
def test_memory_does_not_grow_with_the_aspect_ratio(tmp_path, size):
    (tmp_path / "thin.png").write_bytes(thin_png(*size))

    def bounded():  # without the bound on memory, nobody's machine is to suffer
        resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))

    run = subprocess.run(
        [sys.executable, "-c", THIN, tmp_path / "thin.png"], capture_output=True, text=True, preexec_fn=bounded
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 300  # MiB


def test_arrays_are_images():
    pixels = np.asarray(noise((9, 7)))
    assert ImageProcessor(8).pixels(pixels) == ImageProcessor(8).pixels(noise((9, 7)))
    assert as_rgb(pixels[::2, ::-1]).size == (9, 4)
    for wrong, error, message in (
        (pixels.astype(np.float32), TypeError, "an image as an array must be uint8, got float32"),
        (pixels[..., 0], ValueError, r"must have shape \(H, W, 3\), got \(7, 9\)"),
        (pixels.transpose(2, 0, 1), ValueError, r"must have shape \(H, W, 3\), got \(3, 7, 9\)"),
        (pixels[:0], ValueError, "must have shape"),
        (torch.zeros(3, 4, 4), TypeError, "must be a Pillow image, .*, a path or bytes, got Tensor"),
        (b"bytes", ValueError, "the image is not an image that can be read"),
        (bytearray(4), TypeError, "got bytearray"),
    ):
        with pytest.raises(error, match=message):
            ImageProcessor(8)(wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, r"size must be in \[1, 4096\], got 0"),
        ({"size": 10**6}, r"size must be in \[1, 4096\], got 1000000"),
        ({"resize_to": 10**6}, r"resize_to must be in \[size = 224, 4096\], got 1000000"),
        ({"resize": "squash"}, "resize must be one of 'naive', 'crop', 'crop-floor', 'letterbox'; got 'squash'"),
        ({"std": (0.5, 0.0, 0.5)}, "std"),
        ({"resize_to": 100}, r"resize_to must be in \[size = 224, 4096\], got 100"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageProcessor(**settings)
