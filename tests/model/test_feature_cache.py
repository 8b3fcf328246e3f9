"""Features of images that return: found by content, equal to those computed anew, within a bound on memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.makers import BLUE, RED, VISION, language_config, shape_tokenizer, sharpened_vlm
from vlmamba.connectors import ConnectorConfig
from vlmamba.model import Conversation, GenerationConfig, ImageProcessor, TilesConfig, Turn, VLMConfig
from vlmamba.model.feature_cache import FeatureCache
from vlmamba.model.image_tokens import ImagePreprocessor

CONFIG = VLMConfig(language_config("mamba"), (VISION,), ConnectorConfig("vss-l2", d_state=4), "qa")
FEATURES = 16 * 32 * 4
"""Bytes of the features of an image."""


@pytest.fixture
def vlm():
    return sharpened_vlm(CONFIG, shape_tokenizer())


@pytest.fixture
def encoded(vlm):
    """Numbers of views that the encoder was given, call by call."""
    counts = []
    vlm.vision.register_forward_pre_hook(lambda module, args: counts.append(len(args[0][0])))
    return counts


def test_images_of_equal_content_are_encoded_once(vlm, encoded):
    config = GenerationConfig(6)
    images = [RED, BLUE, RED.copy(), [RED, BLUE], None]
    questions = ["what?", "what?", "a", "<image> or <image>?", "b"]
    answers = vlm.generate(questions, images, config)
    assert encoded == [2]
    assert answers == [vlm.generate([q], [i], config)[0] for q, i in zip(questions, images, strict=True)]


def test_an_image_that_returns_to_a_chat_is_not_encoded_again(vlm, encoded):
    conversation, config = Conversation(vlm, RED, GenerationConfig(6)), GenerationConfig(6)
    first = "".join(conversation.ask("what color?"))
    conversation.reset(RED.copy())
    assert "".join(conversation.ask("what color?")) == first
    conversation.add([BLUE, RED])
    shown = conversation.turns + [Turn("user", "<image>\n<image>\nwhich?")]
    again = "".join(conversation.ask("which?"))
    assert encoded == [1, 1]
    assert (conversation.features.hits, conversation.features.misses, len(conversation.features)) == (2, 2, 2)
    assert again == vlm.generate([shown], [[RED, BLUE, RED]], config)[0]


def test_found_features_are_those_computed_anew(vlm, encoded):
    cache, images = FeatureCache(), [vlm.preprocess(i) for i in (RED, BLUE, RED)]
    anew = vlm.encode(images)
    for _ in range(2):
        assert all(map(torch.equal, vlm.encode(images, cache), anew))
    assert encoded == [2, 2] and cache.n_bytes == 2 * FEATURES


def test_other_pixels_processors_and_grids_are_other_keys(vlm):
    larger = replace(VISION, processor=ImageProcessor(32, resize="letterbox"))
    tiles = [TilesConfig(((1, 2),), merge) for merge in ("spatial", "spatial_unpad")]
    configs = [CONFIG, replace(CONFIG, vision=(larger,)), *(replace(CONFIG, tiles=t) for t in tiles)]
    digests = [ImagePreprocessor(c)(i).digest for c in configs for i in (RED, BLUE)]
    # A blue square has no border, so that the letterbox changes nothing about it.
    assert len(set(digests)) == len(digests) - 1
    assert vlm.preprocess(RED).digest == vlm.preprocess(RED.copy()).digest
    half = vlm.preprocess(RED).to(torch.bfloat16)
    assert half.digest == vlm.preprocess(RED).to(torch.bfloat16).digest != vlm.preprocess(RED).digest


def test_the_features_used_longest_ago_are_dropped_first():
    cache, features = FeatureCache(3 * FEATURES), torch.randn(100, 16, 32)
    for i in (0, 1, 2, 0, 3):  # 0 is used again, and 1 is the one that makes room
        if cache.get(bytes([i])) is None:
            cache.put(bytes([i]), features[i])
    assert [i for i in range(4) if cache.get(bytes([i])) is not None] == [0, 2, 3]
    assert cache.n_bytes == 3 * FEATURES and torch.equal(cache.get(b"\3"), features[3])
    cache.put(b"large", features)
    cache.put(b"\3", features[3])
    assert cache.n_bytes == 3 * FEATURES and len(cache) == 3
    with pytest.raises(ValueError, match="max_bytes must not be negative, got -1"):
        FeatureCache(-1)
