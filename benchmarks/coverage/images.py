"""The zoo's image classifiers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSES

from benchmarks.coverage.entry import Entry, Inputs

LABELS = 3


def pixels(size: int, name: str = "pixel_values") -> Inputs:
    """Noise images."""

    def make(rows: int, draw: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.randn(rows, 3, size, size, generator=draw, dtype=torch.float64), "labels": _labels(rows)}

    return make


def colours(rows: int, draw: torch.Generator) -> dict[str, Tensor]:
    """ImageGPT's images: 4 × 4 pixels of a palette."""
    return {"input_ids": torch.randint(0, 16, (rows, 16), generator=draw), "labels": _labels(rows)}


def patches(rows: int, draw: torch.Generator) -> dict[str, Tensor]:
    """SigLIP 2's images: cut up, of several shapes, padded; 4 × 4 patches of 4 × 4 pixels at most."""
    shapes = torch.tensor([[4, 4], [2, 6], [3, 5], [4, 3]]).repeat(-(-rows // 4), 1)[:rows]
    mask = (torch.arange(16) < shapes.prod(1, keepdim=True)).long()
    values = torch.randn(rows, 16, 48, generator=draw, dtype=torch.float64)
    return {
        "pixel_values": values * mask.unsqueeze(-1),
        "pixel_attention_mask": mask,
        "spatial_shapes": shapes,
        "labels": _labels(rows),
    }


def _labels(rows: int) -> Tensor:
    return torch.arange(rows) % LABELS


_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_IMAGE = {"image_size": 8, "patch_size": 4}
_RESIDUAL = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [2, 2]}
_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_CONVNEXT = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 2], "patch_size": 2, "image_size": 16}
_PYRAMID = {
    "num_encoder_blocks": 2,
    "depths": [1, 2],
    "hidden_sizes": [8, 16],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
}
_TOWERS = {
    "vision_config": {**_VIT, **_IMAGE, "projection_dim": 16},
    "text_config": {**_VIT, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "projection_dim": 16},
}
_LEVIT = {
    "image_size": 32,
    "hidden_sizes": [16, 24],
    "num_attention_heads": [2, 3],
    "depths": [2, 2],
    "key_dim": [4, 4],
    "mlp_ratio": [2, 2],
    "attention_ratio": [2, 2],
    "down_ops": [["Subsample", 4, 4, 4, 2, 2]],
}
_PERCEIVER = {
    "num_latents": 6,
    "d_latents": 16,
    "d_model": 16,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 1,
    "qk_channels": 16,
    "v_channels": 16,
    "image_size": 8,
}
_RELATIVE = {"use_relative_position_bias": True, "use_mask_token": False}

# Configuration fields and the images' size, or what makes the images.
_SMALL: dict[str, tuple[dict[str, Any], int | Inputs]] = {
    "beit": ({**_VIT, **_IMAGE, **_RELATIVE}, 8),
    "bit": ({**_RESIDUAL, "num_groups": 4}, 32),
    "clip": (_TOWERS, 8),
    "convnext": ({**_CONVNEXT, "layer_scale_init_value": 1.0}, 16),
    "convnextv2": (_CONVNEXT, 16),
    "cvt": (
        {
            "embed_dim": [8, 16, 24],
            "num_heads": [1, 2, 3],
            "depth": [1, 2, 3],
            "mlp_ratio": [2.0, 2.0, 2.0],
        },
        32,
    ),
    "data2vec-vision": ({**_VIT, **_IMAGE, **_RELATIVE}, 8),
    "dinov2": ({**_VIT, **_IMAGE, "mlp_ratio": 2}, 8),
    "dinov2_with_registers": ({**_VIT, **_IMAGE, "mlp_ratio": 2, "num_register_tokens": 2}, 8),
    "donut-swin": (_SWIN, 16),
    "efficientnet": (
        {
            "image_size": 32,
            "width_coefficient": 0.25,
            "depth_coefficient": 0.5,
            "depth_divisor": 4,
            "kernel_sizes": [3, 5, 3],
            "in_channels": [32, 16, 24],
            "out_channels": [16, 24, 32],
            "depthwise_padding": [],
            "strides": [1, 2, 2],
            "num_block_repeats": [1, 2, 2],
            "expand_ratios": [1, 4, 4],
            "hidden_dim": 320,
        },
        32,
    ),
    "focalnet": (
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "hidden_sizes": [16, 16],
            "depths": [1, 2],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
        16,
    ),  # fmt: skip
    "hgnet_v2": (
        {
            "embedding_size": 8,
            "depths": [1, 1],
            "hidden_sizes": [16, 24],
            "stem_channels": [3, 8, 8],
            "stage_in_channels": [8, 16],
            "stage_mid_channels": [8, 8],
            "stage_out_channels": [16, 24],
            "stage_num_blocks": [1, 2],
            "stage_downsample": [False, True],
            "stage_downsample_strides": [2, 2],
            "stage_light_block": [False, True],
            "stage_kernel_size": [3, 5],
            "stage_numb_of_layers": [2, 2],
        },
        32,
    ),
    "hiera": (
        {
            "embed_dim": 8,
            "image_size": [32, 32],
            "patch_size": [3, 3],
            "patch_stride": [2, 2],
            "patch_padding": [1, 1],
            "mlp_ratio": 2.0,
            "depths": [1, 2],
            "num_heads": [1, 2],
            "num_query_pool": 1,
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, False],
        },
        32,
    ),
    "ijepa": ({**_VIT, **_IMAGE}, 8),
    "imagegpt": ({"vocab_size": 17, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}, colours),
    "metaclip_2": (_TOWERS, 8),
    "mobilenet_v1": ({"image_size": 32, "depth_multiplier": 0.1, "min_depth": 4}, 32),
    "mobilenet_v2": ({"image_size": 32, "depth_multiplier": 0.1, "depth_divisible_by": 4, "min_depth": 4}, 32),
    "mobilevit": (
        {
            "image_size": 32,
            "hidden_sizes": [12, 16, 20],
            "neck_hidden_sizes": [4, 8, 8, 12, 12, 16, 24],
            "num_attention_heads": 2,
        },
        32,
    ),
    "mobilevitv2": (
        {
            "image_size": 64,
            "width_multiplier": 0.05,
            "base_attn_unit_dims": [160, 160, 160],
            "n_attn_blocks": [1, 1, 1],
        },
        64,
    ),
    "poolformer": (
        {
            "num_encoder_blocks": 2,
            "depths": [1, 2],
            "hidden_sizes": [8, 16],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "padding": [1, 1],
            "mlp_ratio": 2.0,
            "layer_scale_init_value": 1.0,
        },
        16,
    ),
    "pp_lcnet": (
        {
            "block_configs": [
                [[3, 16, 16, 1, False]],
                [[3, 16, 16, 2, False]],
                [[3, 16, 24, 2, False]],
                [[3, 24, 24, 1, False]],
                [[5, 24, 32, 1, True]],
            ],
            "stem_channels": 16,
            "class_expand": 32,
            "hidden_dropout_prob": 0.0,
        },
        16,
    ),
    "pvt": (
        {**_PYRAMID, "image_size": 16, "patch_sizes": [4, 2], "strides": [4, 2], "sequence_reduction_ratios": [2, 1]},
        16,
    ),
    "pvt_v2": ({**_PYRAMID, "image_size": [16, 16], "sr_ratios": [2, 1], "out_indices": [1], "out_features": None}, 16),
    "regnet": ({**_RESIDUAL, "groups_width": 8}, 32),
    "resnet": (_RESIDUAL, 32),
    "segformer": ({**_PYRAMID, "sr_ratios": [2, 1], "decoder_hidden_size": 8}, 16),
    "siglip": (_TOWERS, 8),
    "siglip2": (
        {
            "vision_config": {**_VIT, "patch_size": 4, "num_patches": 16},
            "text_config": {**_VIT, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1},
        },
        patches,
    ),
    "swiftformer": (
        {
            "image_size": 32,
            "depths": [1, 1, 1, 2],
            "embed_dims": [4, 8, 12, 16],
            "mlp_ratio": 2,
            "layer_scale_init_value": 1.0,
        },
        32,
    ),
    "swin": (_SWIN, 16),
    "swinv2": (_SWIN, 16),
    "textnet": (
        {
            "image_size": [32, 32],
            "stem_out_channels": 8,
            "hidden_sizes": [8, 8, 16, 16, 24],
            "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3], [1, 3]], [[3, 3], [3, 1]], [[3, 3]]],
            "conv_layer_strides": [[1], [2, 1], [2, 1], [1]],
        },
        32,
    ),
    "vit": ({**_VIT, **_IMAGE}, 8),
    "vit_msn": ({**_VIT, **_IMAGE}, 8),
}

# (row, architecture, class, fields, images)
_MORE: list[tuple[str, str, str, dict[str, Any], int | Inputs]] = [
    ("deit", "deit", "DeiTForImageClassification", {**_VIT, **_IMAGE}, 8),
    ("deit, teacher's head", "deit", "DeiTForImageClassificationWithTeacher", {**_VIT, **_IMAGE}, 8),
    ("levit", "levit", "LevitForImageClassification", _LEVIT, 32),
    ("levit, teacher's head", "levit", "LevitForImageClassificationWithTeacher", _LEVIT, 32),
    ("perceiver, learned", "perceiver", "PerceiverForImageClassificationLearned", _PERCEIVER, pixels(8, "inputs")),
    ("perceiver, Fourier", "perceiver", "PerceiverForImageClassificationFourier", _PERCEIVER, pixels(8, "inputs")),
    (
        "perceiver, convolution",
        "perceiver",
        "PerceiverForImageClassificationConvProcessing",
        _PERCEIVER,
        pixels(16, "inputs"),
    ),
    ("resnet, basic blocks", "resnet", CLASSES["resnet"], {**_RESIDUAL, "layer_type": "basic"}, 32),
    ("regnet, x", "regnet", CLASSES["regnet"], {**_RESIDUAL, "groups_width": 8, "layer_type": "x"}, 32),
]

_POOLING_HEAD = (r"vision_model\.head\.", "the pooling head, which the classifier does not use")
_ONE_HEAD = {"num_cross_attention_heads": 1}  # the default's eight do not divide these models' inputs
# What rows have besides: fields of `Entry`.
_NOTES: dict[str, dict[str, Any]] = {
    "bit": {
        "low": "its convolutions standardize their weight in a forward of their own: what multiplies is no parameter"
    },
    "perceiver, Fourier": {"full": _ONE_HEAD},
    "perceiver, convolution": {
        "full": _ONE_HEAD,
        "low": "its one convolution pads in a forward of its own, and is a large part of a tiny model only",
    },
    "siglip": {"rests": _POOLING_HEAD},
    "siglip2": {"rests": _POOLING_HEAD},
}

ABSENT_IMAGES = {
    "dinat": "needs the package natten, whose attention has no other implementation",
    "shieldgemma2": "no classifier of pixels: a language model asked about an image and a written policy",
    "timm_wrapper": "needs the package timm, whose models it wraps",
}


def _entry(name: str, architecture: str, class_name: str, fields: dict[str, Any], images: int | Inputs) -> Entry:
    inputs = pixels(images) if isinstance(images, int) else images
    return Entry(name, architecture, class_name, {**fields, "num_labels": LABELS}, inputs, **_NOTES.get(name, {}))


IMAGES: list[Entry] = sorted(
    [_entry(name, name, str(CLASSES.get(name)), fields, images) for name, (fields, images) in _SMALL.items()]
    + [_entry(*row) for row in _MORE],
    key=lambda entry: entry.name,
)
