"""Names of published vision encoders turned into ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# transformers' names on disk, and in memory where they differ (a leading `vision_model.` is taken off first).
# Each entry: pattern, our name. q, k and v become rows of one matrix.
_TRANSFORMERS = [
    (r"embeddings\.(?:patch_embedding|patch_embeddings\.projection)\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"embeddings\.(?:class_embedding|cls_token)", "cls_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.(?:position_embedding\.weight|position_embeddings)", "pos_embed"),
    (r"pre_layrnorm\.(weight|bias)", r"norm_pre.\1"),
    (r"(?:post_layernorm|layernorm)\.(weight|bias)", r"norm.\1"),
    (r"encoder\.layers?\.(\d+)\.(?:layer_norm|norm)([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    (
        r"encoder\.layers?\.(\d+)\.(?:self_attn\.|attention\.attention\.|attention\.)(q|k|v|query|key|value)(?:_proj)?"
        r"\.(weight|bias)",
        r"blocks.\1.attn.\2.\3",
    ),
    (
        r"encoder\.layers?\.(\d+)\.(?:self_attn\.out_proj|attention\.output\.dense|attention\.o_proj)\.(weight|bias)",
        r"blocks.\1.attn.proj.\2",
    ),
    (r"encoder\.layers?\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layers?\.(\d+)\.mlp\.fc([12])\.(weight|bias)", r"blocks.\1.mlp.fc\2.\3"),
]
_UNUSED = re.compile(r"embeddings\.(mask_token|position_ids)|head\..*")


def vit_weights_from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP, SigLIP and DINOv2-with-registers vision weights in `transformers`' names -> in `ViT`'s.

    Raises:
        ValueError: lists the names that are not known.
    """
    out: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in weights.items():
        # The text half of a CLIP or SigLIP checkpoint, and what joins the halves.
        if name.startswith(("text_model.", "logit_", "visual_projection.", "text_projection.")):
            continue
        name = name.removeprefix("vision_model.")
        if _UNUSED.fullmatch(name):
            continue
        for pattern, ours in _TRANSFORMERS:
            if re.fullmatch(pattern, name):
                out[re.sub(pattern, ours, name)] = tensor
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError("names that no known vision encoder has:\n  " + "\n  ".join(unknown))

    for name in [n for n in out if re.search(r"\.attn\.q(uery)?\.", n)]:
        parts = [name, name.replace(".q.", ".k.").replace(".query.", ".key.")]
        parts.append(name.replace(".q.", ".v.").replace(".query.", ".value."))
        out[re.sub(r"\.q(uery)?\.", ".qkv.", name)] = torch.cat([out.pop(p) for p in parts])
    if out["pos_embed"].dim() == 2:
        out["pos_embed"] = out["pos_embed"].unsqueeze(0)
    if "cls_token" in out:
        out["cls_token"] = out["cls_token"].reshape(1, 1, -1)
    if "reg_token" in out:
        # DINOv2 here has the class token's position in the token itself.
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out
