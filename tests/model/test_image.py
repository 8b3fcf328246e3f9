"""Images: resizing as the published models do it, and files that are missing or damaged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vlmamba.model import ImageProcessor, open_image


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


def test_naive_resize_and_normalisation(picture):
    processor = ImageProcessor(32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    want = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    want = (want - np.float32([0.1, 0.2, 0.3])) / np.float32([0.5, 0.6, 0.7])
    torch.testing.assert_close(processor(picture), torch.from_numpy(want).permute(2, 0, 1))


def test_crop_takes_the_middle():
    stripes = Image.new("RGB", (60, 20), "red")
    stripes.paste("blue", (20, 0, 40, 20))
    assert torch.equal(ImageProcessor(20, "crop")(stripes), ImageProcessor(20)(Image.new("RGB", (20, 20), "blue")))


def test_letterbox_pads_with_the_mean_colour(picture):
    pixels = ImageProcessor(60, "letterbox", mean=(0.5, 0.25, 0.75))(picture)
    back = (pixels * 0.5 + torch.tensor([0.5, 0.25, 0.75])[:, None, None]) * 255
    assert torch.equal(back[:, 0, 0].round(), torch.tensor([127.0, 63.0, 191.0]))
    torch.testing.assert_close(back[:, 10:50], torch.from_numpy(np.array(picture)).permute(2, 0, 1).float())


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_kind_of_image_becomes_rgb(picture, mode):
    assert ImageProcessor(16)(picture.convert(mode)).shape == (3, 16, 16)


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"size": 0}, "size"), ({"resize": "squash"}, "resize must be"), ({"std": (0.5, 0.0, 0.5)}, "std")],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageProcessor(**settings)
