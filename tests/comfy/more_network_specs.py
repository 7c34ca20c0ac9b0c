"""Tiny networks as in `network_specs`, of the newer and the odder classes."""

from __future__ import annotations

from typing import Any

import torch

_T = torch.tensor([0.7])
_CHROMA: dict[str, Any] = {
    **{"patch_size": 2, "context_in_dim": 64, "hidden_size": 256, "mlp_ratio": 2.0},
    **{"num_heads": 2, "depth": 3, "theta": 10000, "depth_single_blocks": 4},
    **{"axes_dim": [16, 56, 56], "qkv_bias": True, "in_dim": 64, "out_dim": 256},
    **{"hidden_dim": 128, "n_layers": 2, "txt_ids_dims": [], "vec_in_dim": None},
}
_PREDICT2: dict[str, Any] = {
    **{"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16},
    **{"out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 256},
    **{"concat_padding_mask": True, "pos_emb_cls": "rope3d", "num_blocks": 4, "num_heads": 2},
    **{"use_adaln_lora": True, "adaln_lora_dim": 64, "crossattn_emb_channels": 1024},
    **{"pos_emb_learnable": True, "extra_per_block_abs_pos_emb": False},
}
_PIXEL: dict[str, Any] = {
    **{"num_groups": 4, "hidden_size": 256, "pixel_attn_hidden_size": 128},
    **{"pixel_num_groups": 4, "patch_depth": 3, "pixel_depth": 2, "txt_embed_dim": 64},
    "txt_max_length": 8,
}
_IMAGE, _TMS = 151655, 151673
_IDS = torch.tensor([[1, 2, *[_IMAGE] * 4, 3, _TMS]])


def _sparse(mode: str, **more: Any) -> Any:
    """A call for one of Trellis2's sparse models: 20 voxels of a grid."""
    at = torch.arange(20)
    coords = torch.stack([at * 0, at % 3, at // 3, at % 5], 1).int()
    return lambda r: {
        **{"x": r(1, 32, 20, 1), "timestep": _T, "context": r(1, 8, 64)},
        **{"embeds": r(1, 8, 64), "trellis2_coords": coords},
        **{"trellis2_generation_mode": mode},
        **{name: r(*shape) for name, shape in more.items()},
    }


SPECS: dict[str, dict[str, Any]] = {
    "ChromaRadiance": {
        "net": "chroma_radiance.model.ChromaRadiance",
        "build": {
            **_CHROMA,
            **{"in_channels": 3, "out_channels": 3, "patch_size": 16, "nerf_hidden_size": 64},
            **{"nerf_mlp_ratio": 4, "nerf_depth": 3, "nerf_max_freqs": 8, "nerf_tile_size": 2},
            **{"nerf_final_head_type": "conv", "nerf_embedder_dtype": torch.float32},
            **{"use_x0": False, "use_sequential_txt_ids": False},
        },
        "call": lambda r: {
            **{"x": r(1, 3, 32, 32), "timestep": _T, "context": r(1, 8, 64), "guidance": _T * 0},
        },
    },
    "Anima": {
        "net": "anima.model.Anima",
        "build": _PREDICT2,
        "call": lambda r: {
            **{"x": r(1, 16, 1, 8, 8), "timesteps": _T, "context": r(1, 8, 1024)},
            "t5xxl_ids": torch.arange(6)[None],
        },
    },
    "AsymmDiTJoint": {
        "net": "genmo.joint_model.asymm_models_joint.AsymmDiTJoint",
        "build": {
            **{"in_channels": 12, "hidden_size_x": 1536, "hidden_size_y": 256, "depth": 3},
            **{"num_heads": 12, "mlp_ratio_y": 2.0, "use_t5": True, "t5_feat_dim": 64},
            **{"t5_token_length": 8, "qk_norm": True, "qkv_bias": False, "out_bias": True},
            **{"rope_theta": 10000.0, "learn_sigma": False, "timestep_scale": 1000.0},
            **{"use_extended_posenc": False, "posenc_preserve_area": True},
        },
        "call": lambda r: {
            **{"x": r(1, 12, 2, 8, 8), "timestep": _T, "context": r(1, 8, 64)},
            **{"attention_mask": torch.ones(1, 8), "num_tokens": 8},
        },
    },
    "HiDreamO1Transformer": {
        "net": "hidream_o1.model.HiDreamO1Transformer",
        "build": {
            "text_config_overrides": {
                **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4},
                **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128},
            },
            "vision_config_overrides": {
                **{"hidden_size": 128, "num_heads": 2, "intermediate_size": 256, "depth": 3},
                **{"num_position_embeddings": 64, "deepstack_visual_indexes": ()},
            },
        },
        "call": lambda r: {
            **{"x": r(1, 3, 64, 64), "timesteps": _T * 1000, "input_ids": _IDS, "ar_len": 7},
            **{"position_ids": torch.arange(12).expand(1, 3, 12)},
            **{"ref_pixel_values": r(16, 1536)},
            **{"ref_image_grid_thw": torch.tensor([[1, 4, 4]])},
        },
    },
    "Ideogram4Transformer2DModel": {
        "net": "ideogram4.model.Ideogram4Transformer2DModel",
        "build": {
            **{"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 128},
            **{"intermediate_size": 512, "adaln_dim": 64, "llm_features_dim": 64},
        },
        "call": lambda r: {"x": r(1, 128, 4, 4), "timesteps": _T, "context": r(1, 8, 64)},
    },
    "LensTransformer2DModel": {
        "net": "lens.model.LensTransformer2DModel",
        "build": {
            **{"num_layers": 4, "num_attention_heads": 4, "enc_hidden_dim": 64},
            "selected_layer_index": (0, 1),
        },
        "call": lambda r: {"x": r(1, 128, 4, 4), "timestep": _T, "context": r(1, 8, 128)},
    },
    "MageFlowTransformer2DModel": {
        "net": "mage_flow.model.MageFlowTransformer2DModel",
        "build": {"num_layers": 4, "num_attention_heads": 2, "joint_attention_dim": 64},
        "call": lambda r: {
            **{"x": r(1, 128, 4, 4), "timestep": _T, "context": r(1, 8, 64)},
            "attention_mask": torch.ones(1, 8, dtype=torch.int64),
        },
    },
    "LTXAVModel": {
        "net": "lightricks.av_model.LTXAVModel",
        "build": {
            **{"cross_attention_dim": 256, "audio_cross_attention_dim": 128, "num_layers": 4},
            **{"attention_head_dim": 64, "audio_attention_head_dim": 32, "caption_channels": 64},
            **{"num_attention_heads": 4, "audio_num_attention_heads": 4},
            **{"connector_attention_head_dim": 32, "connector_num_attention_heads": 2},
        },
        "call": lambda r: {
            **{"x": [r(1, 128, 2, 4, 4), r(1, 8, 10, 16)], "timestep": _T},
            **{"context": r(1, 8, 128), "audio_length": 10},
        },
    },
    "NextDiTPixelSpace": {
        "net": "lumina.model.NextDiTPixelSpace",
        "build": {
            **{"patch_size": 4, "in_channels": 3, "dim": 256, "cap_feat_dim": 64, "n_layers": 4},
            **{"qk_norm": True, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48]},
            **{"axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 1.0},
            **{"z_image_modulation": True, "time_scale": 1000.0, "decoder_hidden_size": 128},
        },
        "call": lambda r: {
            **{"x": r(1, 3, 16, 16), "timesteps": _T, "context": r(1, 8, 64), "num_tokens": 8},
        },
        "idle": {"siglip_refiner": "only networks that take pictures as well have it"},
    },
    "MiniMaxH3Model": {
        "net": "minimax.model.MiniMaxH3Model",
        "build": {
            **{"hidden_size": 192, "num_layers": 4, "num_attention_heads": 2},
            **{"attention_head_dim": 96, "ffn_hidden_size": 256, "text_dim": 64},
            **{"time_embed_hidden_size": 64, "time_embed_dim": 64},
        },
        "call": lambda r: {
            **{"x": [r(1, 24, 2, 8, 8), r(1, 32, 2, 10)], "timestep": _T * 1000},
            "context": r(1, 8, 64),
        },
    },
    "PixDiT_T2I": {
        "net": "pixeldit.model.PixDiT_T2I",
        "build": _PIXEL,
        "call": lambda r: {"x": r(1, 3, 32, 32), "timesteps": _T, "context": r(1, 8, 64)},
    },
    "PidNet": {
        "net": "pixeldit.pid.PidNet",
        "build": {**_PIXEL, "lq_hidden_dim": 64, "lq_num_res_blocks": 1},
        "call": lambda r: {
            **{"x": r(1, 3, 32, 32), "timesteps": _T, "context": r(1, 8, 64)},
            **{"lq_latent": r(1, 16, 4, 4), "degrade_sigma": _T},
        },
    },
    "NaDiT": {
        "net": "seedvr.model.NaDiT",
        "build": {
            **{"norm_eps": 1e-5, "num_layers": 4, "mlp_type": "swiglu", "vid_dim": 256},
            **{"heads": 2, "mm_layers": 2, "txt_in_dim": 5120},
        },
        "call": lambda r: {
            **{"x": r(1, 16, 1, 8, 8), "timestep": _T * 1000, "context": r(1, 6, 5120)},
            **{"condition": r(1, 17, 1, 8, 8), "transformer_options": {"cond_or_uncond": [0]}},
        },
    },
    "LatentSeqMMFlowModel": {
        "net": "triposplat.model.LatentSeqMMFlowModel",
        "build": {
            **{"q_token_length": 32, "model_channels": 256, "cond_channels": 64},
            **{"num_blocks": 4, "num_head_channels": 64},
        },
        "call": lambda r: {
            **{"x": [r(1, 32, 16), r(1, 1, 5)], "t": _T, "context": r(1, 8, 64)},
        },
    },
    "Trellis2": {
        "net": "trellis2.model.Trellis2",
        "build": {
            **{"resolution": 16, "model_channels": 192, "cond_channels": 64, "num_blocks": 2},
            **{"num_heads": 2, "mlp_ratio": 2.0, "init_txt_model": True},
        },
        "call": (
            lambda r: {
                **{"x": r(1, 32, 16, 16, 16), "timestep": _T, "context": r(1, 8, 64)},
                "embeds": r(1, 8, 64),
            },
            _sparse("shape_generation_512"),
            _sparse("shape_generation"),
            _sparse("texture_generation", trellis2_shape_slat=(20, 32)),
        ),
    },
}
