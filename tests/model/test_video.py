"""Videos: frames sampled from a folder, an animated file or a list, as one image of several views."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.makers import RED, VISION, language_config, shape_tokenizer, sharpened_vlm
from vlmamba.connectors import ConnectorConfig
from vlmamba.model import GenerationConfig, TilesConfig, Turn, Video, VLMConfig, collate
from vlmamba.model.image import as_rgb
from vlmamba.model.video import sample_frames

CONFIG = VLMConfig(language_config("mamba"), (VISION,), ConnectorConfig("mlp"), "qa", max_frames=4)
GRAYS = [Image.new("RGB", (20, 10), (25 * i, 25 * i, 25 * i)) for i in range(10)]
FORMATS = {"GIF": {}, "PNG": {}, "WEBP": {"lossless": True}}


@pytest.fixture(scope="module")
def vlm():
    return sharpened_vlm(CONFIG, shape_tokenizer())


def animation(kind: str) -> bytes:
    file = io.BytesIO()
    GRAYS[0].save(file, kind, save_all=True, append_images=GRAYS[1:], duration=40, **FORMATS[kind])
    return file.getvalue()


@pytest.mark.parametrize(("n", "most"), [(10, 4), (10, 10), (3, 8), (1, 1), (10, 1), (7, 2), (100, 32)])
def test_frames_are_sampled_at_equal_distances(n, most):
    want = np.linspace(0, n - 1, min(n, most), dtype=int).tolist()
    assert sample_frames(n, most) == want


@pytest.mark.parametrize("kind", [*FORMATS, "folder", "list"])
def test_frames_come_from_a_folder_an_animated_file_or_a_list(kind, tmp_path):
    if kind == "folder":
        for i, frame in enumerate(GRAYS):
            frame.save(tmp_path / f"frame{i}.png")  # frame10 would come after frame1 by letters alone
        GRAYS[9].save(tmp_path / "frame10.png")
        (tmp_path / "notes.txt").write_text("no frame")
        grays = [frame.getpixel((0, 0))[0] // 25 for frame in Video(tmp_path).frames(11)]
        assert grays == [*range(10), 9]
        return
    source = GRAYS if kind == "list" else animation(kind)
    for video, most, want in (
        (Video(source), 4, [0, 3, 6, 9]),
        (Video(source, 2), 4, [0, 9]),
        (Video(source), 20, list(range(10))),
    ):
        assert [frame.getpixel((0, 0))[0] // 25 for frame in video.frames(most)] == want
    if kind != "list":
        (tmp_path / "v").write_bytes(source)
        assert len(Video(tmp_path / "v").frames(3)) == 3
        # Without a word about frames, an animated file is the image that it starts with, as before.
        assert as_rgb(source).getpixel((0, 0)) == (0, 0, 0)


def test_a_video_has_the_tokens_of_its_frames_at_one_mark(vlm):
    turns = [Turn("user", "<image> then <image>?"), Turn("assistant", "red")]
    sample = vlm.prepare(turns, [RED, Video(GRAYS)])
    assert [(i.n_views, i.n_tokens) for i in sample.images] == [(1, 16), (4, 64)]
    assert vlm(collate([sample])).loss.isfinite()
    pixels = torch.cat([vlm.preprocess(GRAYS[i]).pixels[0] for i in (0, 3, 6, 9)])
    assert torch.equal(sample.images[1].pixels[0], pixels)
    config = GenerationConfig(6)
    both = vlm.generate([turns[:1], "what?"], [[RED, Video(GRAYS)], Video(GRAYS[:2])], config)
    assert both[0] == vlm.generate([turns[:1]], [[RED, Video(GRAYS)]], config)[0]
    assert both[1] == vlm.generate(["<image><image>what?"], [GRAYS[:2]], config)[0]


def test_a_video_of_a_model_with_tiles_has_none_and_one_newline():
    model = sharpened_vlm(replace(CONFIG, tiles=TilesConfig(merge="spatial_unpad")), shape_tokenizer())
    sample = model.prepare([Turn("user", "a"), Turn("assistant", "b")], Video(GRAYS))
    assert (sample.images[0].grid, sample.images[0].n_tokens) == (None, 4 * 16 + 1)
    assert model(collate([sample])).loss.isfinite()


def test_missing_and_damaged_videos_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image at .*nowhere.gif"):
        Video(tmp_path / "nowhere.gif").frames(4)
    with pytest.raises(ValueError, match="the folder .* has no frames"):
        Video(tmp_path).frames(4)
    with pytest.raises(ValueError, match="at least one frame, got none"):
        Video([]).frames(4)
    with pytest.raises(ValueError, match="max_frames must be at least 1, got 0"):
        Video(GRAYS, 0)
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)) for i in range(4)]
    for kind in FORMATS:
        file = io.BytesIO()
        noise[0].save(file, kind, save_all=True, append_images=noise[1:], **FORMATS[kind])
        (tmp_path / "cut").write_bytes(file.getvalue()[: len(file.getvalue()) * 5 // 8])
        with pytest.raises(ValueError, match="cut.* is (damaged|not an image)"):
            Video(tmp_path / "cut").frames(4)
    (tmp_path / "frames").mkdir()
    GRAYS[0].save(tmp_path / "frames" / "0.png")
    (tmp_path / "frames" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1.png is not an image"):
        Video(tmp_path / "frames").frames(4)
