"""Tiles: the grids, pixels and orders of features of LLaVA-NeXT's port in `transformers`, and a VLM that has them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from tests.makers import BLUE, RED, VISION, language_config, shape_tokenizer, sharpened_vlm
from vlmamba.connectors import ConnectorConfig
from vlmamba.model import IMAGE_TOKEN, VLM, GenerationConfig, TilesConfig, Turn, VLMConfig, collate
from vlmamba.model.config_io import from_json_dict, to_json_dict
from vlmamba.model.image_tokens import ImagePreprocessor
from vlmamba.model.tiles import choose_grid, merge_views, patch_bounds

TOKENIZER = shape_tokenizer()
CONFIG = VLMConfig(
    language_config("mamba"), (VISION,), ConnectorConfig("vss-l2", d_state=4), "qa", TilesConfig()
)  # fmt: skip
GRIDS = TilesConfig().grids
SIZES = [(32, 32), (64, 32), (30, 90), (90, 31), (33, 47), (200, 60), (5, 5), (1, 300), (97, 101), (640, 480)]
SIDE, PATCHES = 32, 4


def noise(size):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_grids_and_pixels_are_those_of_llava_next(size):
    pinpoints = [[rows * SIDE, columns * SIDE] for rows, columns in GRIDS]
    want = select_best_resolution((size[1], size[0]), pinpoints)
    assert choose_grid(size, GRIDS, SIDE) == (want[0] // SIDE, want[1] // SIDE)
    theirs = LlavaNextImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    image = noise(size)
    found = ImagePreprocessor(CONFIG)(image)
    (want,) = theirs(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found.pixels[0], want.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("merge", ["spatial", "spatial_unpad"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_features_have_the_order_of_llava_next(size, merge):
    rows, columns = choose_grid(size, GRIDS, SIDE)
    n_views, width = 1 + rows * columns, 3
    features = torch.randn(n_views, PATCHES, PATCHES, width)
    processed = ImagePreprocessor(replace(CONFIG, tiles=TilesConfig(merge=merge)))(Image.new("RGB", size))
    newline = torch.randn(width) if merge == "spatial_unpad" else None
    found = merge_views(features, processed.grid, newline)
    assert len(found) == processed.n_tokens and processed.n_views == n_views
    if newline is None:
        tiles = features[1:].unflatten(0, (rows, columns)).permute(0, 2, 1, 3, 4)
        want = torch.cat([features[0].flatten(0, 1), tiles.reshape(-1, width)])
    else:
        config = SimpleNamespace(
            vision_config=SimpleNamespace(image_size=SIDE, patch_size=SIDE // PATCHES),
            image_grid_pinpoints=[[r * SIDE, c * SIDE] for r, c in GRIDS],
        )
        (want,), _ = LlavaNextModel.pack_image_features(
            SimpleNamespace(config=config), [features.flatten(1, 2)], [(size[1], size[0])], "full", newline
        )
    assert torch.equal(found, want)


def test_one_view_ends_with_the_newline_alone():
    features, newline = torch.randn(1, 2, 2, 3), torch.randn(3)
    want, _ = LlavaNextModel.pack_image_features(None, [features.flatten(1, 2)], [(9, 9)], "full", newline)
    assert torch.equal(merge_views(features, None, newline), want[0])


@pytest.fixture(params=["spatial", "spatial_unpad"])
def vlm(request):
    return sharpened_vlm(replace(CONFIG, tiles=TilesConfig(((1, 2), (2, 1)), request.param)), TOKENIZER)


WIDE, TALL = noise((70, 30)), noise((30, 61))


def test_a_model_with_tiles_trains_answers_and_is_saved(vlm, tmp_path):
    """Each answer is the one it would get alone, for images of unequal numbers of tokens."""
    turns = [Turn("user", "<image> a <image>?"), Turn("assistant", "red")]
    samples = [vlm.prepare(turns, [WIDE, TALL]), vlm.prepare([Turn("user", "b"), turns[1]], RED)]
    for sample in samples:
        assert sample.input_ids.count(IMAGE_TOKEN) == sum(i.n_tokens for i in sample.images)
    (_, end), (start, _) = samples[0].image_spans()
    rest = samples[0].after(end)
    assert (rest.images, rest.image_spans()[0][0]) == (samples[0].images[1:], start - end)
    assert max(i.n_tokens for i in samples[0].images) <= vlm.preprocess.most_tokens
    together, alone = vlm(collate(samples)), [vlm(collate([s])) for s in samples]
    mean = sum(a.loss * a.n_targets for a in alone) / together.n_targets
    torch.testing.assert_close(together.loss, mean)
    together.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vlm.connector.parameters())
    assert ("connector.image_newline" in dict(vlm.named_parameters())) == vlm.config.tiles.unpads

    config = GenerationConfig(6)
    questions, images = ["which <image> or <image>?", "a", "b"], [[WIDE, TALL], BLUE, None]
    answers = vlm.generate(questions, images, config)
    assert answers == [vlm.generate([q], [i], config)[0] for q, i in zip(questions, images, strict=True)]
    assert vlm.generate(questions, images, GenerationConfig(6, prefill_chunk=7)) == answers
    vlm.save_pretrained(tmp_path / "model")
    again = VLM.from_pretrained(tmp_path / "model")
    assert again.config == vlm.config and again.generate(questions, images, config) == answers


def test_each_tile_is_scanned_alone(vlm):
    """Features of a view are those of the view in a batch of its own: no scan crosses from tile to tile."""
    pixels = vlm.preprocess(WIDE).pixels[0]
    views = vlm.connector(vlm.vision([pixels]))
    for view, one in zip(views, pixels, strict=True):
        torch.testing.assert_close(vlm.connector(vlm.vision([one[None]]))[0], view)


def test_without_tiles_the_pixels_are_those_of_the_processor():
    processed = ImagePreprocessor(replace(CONFIG, tiles=None))(WIDE)
    assert torch.equal(processed.pixels[0][0], VISION.processor(WIDE))
    assert (processed.n_views, processed.n_tokens, processed.grid) == (1, 16, None)


def test_configs_with_tiles_survive_json_and_are_checked():
    assert from_json_dict(VLMConfig, to_json_dict(CONFIG)) == CONFIG
    with pytest.raises(ValueError, match="grids must have at least one grid"):
        TilesConfig(())
    with pytest.raises(ValueError, match=r"grids.* must be in \[1, 64\], got 0"):
        TilesConfig(((0, 2),))
    with pytest.raises(ValueError, match="merge must be one of 'spatial', 'spatial_unpad'; got 'flat'"):
        TilesConfig(merge="flat")


def test_border_is_left_out_on_one_axis_alone():
    assert patch_bounds((70, 30), (1, 2), 4, unpad=True) == (1, 2, 0, 4, 0, 8)
    assert patch_bounds((80, 20), (1, 2), 4, unpad=True) == (1, 2, 1, 3, 0, 8)
    assert patch_bounds((20, 80), (2, 1), 4, unpad=False) == (2, 1, 0, 8, 0, 4)
