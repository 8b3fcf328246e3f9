"""Images: preprocessing to the pixel as the published models do it, and files that are missing or damaged."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageOps

from vlmamba.model import ImageProcessor, open_image

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


def test_letterbox_pads_with_the_mean_colour(picture):
    pixels = ImageProcessor(60, "letterbox", mean=(0.5, 0.25, 0.75))(picture)
    back = (pixels * 0.5 + torch.tensor([0.5, 0.25, 0.75])[:, None, None]) * 255
    assert torch.equal(back[:, 0, 0].round(), torch.tensor([127.0, 63.0, 191.0]))
    torch.testing.assert_close(back[:, 10:50], torch.from_numpy(np.array(picture)).permute(2, 0, 1).float())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_naive_resize_and_normalisation(size):
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
        assert Image.open(tmp_path / "image.png").mode == "I;16"
        assert open_image(tmp_path / "image.png") == image.convert("RGB")
        assert (np.array(image) > 255).any()
        assert np.array_equal(np.array(open_image(tmp_path / "image.png"))[..., 0], np.array(image).clip(0, 255))
    theirs, ours = siglip_of_transformers(do_rescale=False, do_normalize=False)
    np.testing.assert_array_equal(as_array(ours.pixels(image)), theirs(image)["pixel_values"][0])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_an_alpha_channel_is_dropped(picture, mode):
    """As `convert("RGB")` in OpenAI's and Cobra's code; `transformers` 5 lays such an image on white."""
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
    assert Image.open(tmp_path / "turned.png").getexif()[0x0112] == 6
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size"),
        ({"resize": "squash"}, "resize must be one of 'naive', 'crop', 'crop-floor', 'letterbox'; got 'squash'"),
        ({"std": (0.5, 0.0, 0.5)}, "std"),
        ({"resize_to": 100}, "resize_to must be at least size = 224, got 100"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageProcessor(**settings)
