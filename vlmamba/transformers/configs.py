"""The configs of this library's models as configs of `transformers`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from transformers import PretrainedConfig

from ..model.config import LMConfig, VLMConfig
from ..model.config_io import TRANSFORMERS_KEYS, from_json_dict, to_json_dict
from ..model.transformers_files import auto_map


class _Config(PretrainedConfig):
    """The fields of one of this library's configs as attributes, in plain values as `config.json` has them."""

    config_kind: ClassVar[type]

    def __post_init__(self, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name) for name in self.own_names() if name in kwargs}
        super().__post_init__(**kwargs)
        # Always of this release's classes, whatever file it comes from.
        self.auto_map = auto_map(self.model_type)
        # All fields, and checked: a file may leave some out.
        for name, value in to_json_dict(from_json_dict(self.config_kind, own)).items():
            setattr(self, name, value)

    @classmethod
    def own_names(cls) -> list[str]:
        """Return the names of the fields of this library's config."""
        return [f.name for f in dataclasses.fields(cls.config_kind)]

    @classmethod
    def of(cls, config: Any) -> Any:
        """Convert one of this library's configs."""
        return cls(**to_json_dict(config))

    @property
    def own(self) -> Any:
        """This library's config.

        Raises:
            ValueError: an attribute has a value that it cannot have.
        """
        return from_json_dict(self.config_kind, {name: getattr(self, name) for name in self.own_names()})

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what is saved: without runtime settings, so that this library reads the file too."""
        kept = {*self.own_names(), *TRANSFORMERS_KEYS}
        return {key: value for key, value in super().to_diff_dict().items() if key in kept}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: a saved folder names this package, and has no copy of its code."""


class MambaLMConfig(_Config):
    """Config of a language model: the fields of `vlmamba.model.LMConfig`."""

    model_type = "vlmamba_lm"
    config_kind = LMConfig
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "tie_word_embeddings": "tie_embeddings",
    }


class VLMambaConfig(_Config):
    """Config of a vision-language model: the fields of `vlmamba.model.VLMConfig`."""

    model_type = "vlmamba"
    config_kind = VLMConfig

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.language["vocab_size"]

    @property
    def image_token_id(self) -> int:
        """Value in `input_ids` at the positions of image features: the first that is no token."""
        return self.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the language model."""
        return self.language["d_model"]

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the language model."""
        return self.language["n_layer"]

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the output head is the embedding."""
        return self.language["tie_embeddings"]
