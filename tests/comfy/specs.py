"""Tiny models of many architectures: how each is built, detected, conditioned and sampled.

A spec is data. ``net`` is the class below comfy.ldm and ``build`` its arguments; ``match`` and
``small`` say which dimensions ComfyUI has to be helped to accept (see pack); ``names`` turn
ComfyUI's names of weights into those of released files; ``floor`` is the smallest ``vram`` to try,
as a share of all weights, where the tiny model has much outside of its blocks.
"""

from __future__ import annotations

from typing import Any

_SCALE = [(r"(\.norm\.(?:query|key)_norm)\.weight$", r"\1.scale")]
_HUNYUAN = [
    (r"_attn\.(qkv|proj)\.", r"_attn_\1."),
    (r"_attn\.norm\.query_norm\.weight$", "_attn_q_norm.weight"),
    (r"_attn\.norm\.key_norm\.weight$", "_attn_k_norm.weight"),
    (r"^(single_blocks\.\d+)\.norm\.(q)uery_norm\.weight$", r"\1.\2_norm.weight"),
    (r"^(single_blocks\.\d+)\.norm\.(k)ey_norm\.weight$", r"\1.\2_norm.weight"),
    (r"(_mod|\.modulation)\.lin\.", r"\1.linear."),
    (
        r"^((?:double_blocks|txt_in\.individual_token_refiner\.blocks)\.\d+\.\w*mlp)\.0\.",
        r"\1.fc1.",
    ),
    (
        r"^((?:double_blocks|txt_in\.individual_token_refiner\.blocks)\.\d+\.\w*mlp)\.2\.",
        r"\1.fc2.",
    ),
    (r"^txt_in\.t_embedder\.in_layer\.", "txt_in.t_embedder.mlp.0."),
    (r"^txt_in\.t_embedder\.out_layer\.", "txt_in.t_embedder.mlp.2."),
    (r"^txt_in\.c_embedder\.in_layer\.", "txt_in.c_embedder.linear_1."),
    (r"^txt_in\.c_embedder\.out_layer\.", "txt_in.c_embedder.linear_2."),
    (r"^(time|guidance)_in\.in_layer\.", r"\1_in.mlp.0."),
    (r"^(time|guidance)_in\.out_layer\.", r"\1_in.mlp.2."),
]


def _text(width: int, pooled: int = 0, length: int = 12) -> dict[str, Any]:
    made: dict[str, Any] = {"cross_attn": {"shape": [1, length, width]}}
    if pooled:
        made["pooled_output"] = {"shape": [1, pooled]}
    return made


_WAN: dict[str, Any] = {
    **{"image_model": "wan2.1", "model_type": "t2v", "dim": 256, "out_dim": 16, "num_heads": 2},
    **{"ffn_dim": 512, "num_layers": 6, "patch_size": (1, 2, 2), "freq_dim": 256},
    **{"window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6},
    "in_dim": 16,
}
_COSMOS: dict[str, Any] = {
    **{"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16},
    **{"out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 256},
    **{"concat_padding_mask": True, "pos_emb_cls": "rope3d", "pos_emb_interpolation": "crop"},
    **{"use_adaln_lora": True, "adaln_lora_dim": 256, "crossattn_emb_channels": 1024},
    **{f"{way}_h_extrapolation_ratio": ratio for way, ratio in (("rope", 4.0), ("extra", 1.0))},
    **{f"{way}_w_extrapolation_ratio": ratio for way, ratio in (("rope", 4.0), ("extra", 1.0))},
    **{f"{way}_t_extrapolation_ratio": 1.0 for way in ("rope", "extra")},
}

SPECS: dict[str, dict[str, Any]] = {
    "flux": {
        "net": "flux.model.Flux",
        "names": _SCALE,
        "build": {
            **{"image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2},
            **{"vec_in_dim": 64, "context_in_dim": 128, "hidden_size": 256, "mlp_ratio": 4.0},
            **{"num_heads": 2, "depth": 4, "depth_single_blocks": 6, "axes_dim": [16, 56, 56]},
            **{"theta": 10000, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": []},
            **{"yak_mlp": False, "txt_norm": False},
        },
        "latent": [1, 16, 16, 16],
        "cond": _text(128, 64),
        "blocks": r"(double|single)_blocks\.",
        "fp8": True,
    },
    "wan21_t2v": {
        "net": "wan.model.WanModel",
        "build": _WAN,
        "latent": [1, 16, 2, 16, 16],
        "cond": _text(4096),
        "blocks": r"blocks\.",
        "fp8": True,
        "floor": 0.45,
    },
    "wan21_vace": {
        "net": "wan.model.VaceWanModel",
        "build": {**_WAN, "model_type": "vace", "vace_layers": 2, "vace_in_dim": 96},
        "latent": [1, 16, 2, 16, 16],
        "cond": _text(4096),
        "blocks": r"(vace_)?blocks\.",
        "floor": 0.45,
    },
    "hunyuan_video": {
        "net": "hunyuan_video.model.HunyuanVideo",
        "names": _HUNYUAN,
        "build": {
            **{"image_model": "hunyuan_video", "in_channels": 16, "patch_size": [1, 2, 2]},
            **{"out_channels": 16, "vec_in_dim": 768, "axes_dim": [16, 56, 56], "meanflow": False},
            **{"context_in_dim": 128, "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2},
            **{"depth": 3, "depth_single_blocks": 5, "theta": 256, "qkv_bias": True},
            **{"byt5": False, "guidance_embed": True, "use_cond_type_embedding": False},
            **{"vision_in_dim": None, "meanflow_sum": False},
        },
        "latent": [1, 16, 2, 16, 16],
        "cond": _text(128, 768),
        "blocks": r"(double_blocks|single_blocks|txt_in\.individual_token_refiner)\.",
    },
    "cosmos_predict2": {
        "net": "cosmos.predict2.MiniTrainDIT",
        "build": {
            **_COSMOS,
            **{"image_model": "cosmos_predict2", "pos_emb_learnable": True, "min_fps": 1},
            **{"max_fps": 30, "num_blocks": 4, "extra_per_block_abs_pos_emb": False},
            "rope_enable_fps_modulation": False,
        },
        "latent": [1, 16, 1, 16, 16],
        "cond": _text(1024),
        "blocks": r"blocks\.",
    },
    "cosmos_v1": {
        "net": "cosmos.model.GeneralDIT",
        "build": {
            **_COSMOS,
            **{"image_model": "cosmos", "pos_emb_learnable": False, "block_config": "FA-CA-MLP"},
            **{"block_x_format": "THWBD", "affline_emb_norm": True, "num_blocks": 3},
            **{"num_heads": 2, "extra_per_block_abs_pos_emb": True},
            "extra_per_block_abs_pos_emb_type": "learnable",
        },
        "match": {"model_channels": 4096},
        "small": ["model_channels", "num_blocks", "num_heads", "crossattn_emb_channels"],
        "latent": [1, 16, 1, 16, 16],
        "cond": _text(1024),
        "blocks": r"blocks\.",
        "floor": 0.5,
    },
    "sd3": {
        "net": "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",
        "build": {
            **{"in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 4},
            **{"input_size": None, "adm_in_channels": 2048, "num_patches": 1024},
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 128, "out_features": 256},
            },
            **{"pos_embed_max_size": 32, "pos_embed_scaling_factor": None},
            "x_block_self_attn_layers": [],
        },
        "latent": [1, 16, 16, 16],
        "cond": _text(128, 2048),
        "blocks": r"joint_blocks\.",
        "floor": 0.4,
    },
    "ltxv": {
        "net": "lightricks.model.LTXVModel",
        "build": {
            **{"image_model": "ltxv", "num_layers": 4, "attention_head_dim": 64},
            **{"cross_attention_dim": 256, "num_attention_heads": 4, "caption_channels": 128},
            **{"in_channels": 128, "use_keyframes_abs_pos_embedding": False},
        },
        "config": {
            "transformer": {
                **{"attention_head_dim": 64, "num_attention_heads": 4},
                **{"caption_channels": 128, "in_channels": 128},
            }
        },
        "latent": [1, 128, 2, 4, 4],
        "cond": _text(128)
        | {"attention_mask": {"shape": [1, 12], "kind": "ones", "dtype": "int64"}},
        "blocks": r"transformer_blocks\.",
    },
    "sd15": {
        "net": "modules.diffusionmodules.openaimodel.UNetModel",
        "prefix": "model.diffusion_model.",
        "build": {
            **{"use_checkpoint": False, "image_size": 32, "use_spatial_transformer": True},
            **{"legacy": False, "in_channels": 4, "out_channels": 4, "adm_in_channels": None},
            **{"use_temporal_resblock": False, "use_temporal_attention": False},
            **{"model_channels": 32, "num_res_blocks": [2, 2, 2, 2]},
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            **{"channel_mult": [1, 2, 4, 4], "transformer_depth_middle": 1, "num_heads": 8},
            **{"use_linear_in_transformer": False, "context_dim": 128, "num_head_channels": -1},
        },
        "match": {"model_channels": 320, "context_dim": 768},
        "small": ["model_channels", "context_dim"],
        "latent": [1, 4, 16, 16],
        "cond": _text(128),
        "sampler": {"scheduler": "normal"},
        "blocks": r"(input_blocks|middle_block|output_blocks)\.",
    },
    "qwen_image": {
        "net": "qwen_image.model.QwenImageTransformer2DModel",
        "build": {
            **{"image_model": "qwen_image", "in_channels": 64, "num_layers": 4},
            **{"num_attention_heads": 2, "joint_attention_dim": 128},
        },
        "small": ["num_attention_heads", "joint_attention_dim"],
        "latent": [1, 16, 1, 16, 16],
        "cond": _text(128),
        "blocks": r"transformer_blocks\.",
    },
    "z_image": {
        "net": "lumina.model.NextDiT",
        "build": {
            **{"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 256},
            **{"cap_feat_dim": 128, "n_layers": 4, "qk_norm": True, "n_heads": 2},
            **{"n_kv_heads": 2, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512]},
            **{"rope_theta": 256.0, "ffn_dim_multiplier": 1.0, "z_image_modulation": True},
            **{"time_scale": 1000.0, "pad_tokens_multiple": 32},
        },
        "match": {"dim": 3840},
        "small": [
            *("dim", "n_heads", "n_kv_heads", "axes_dims", "axes_lens", "rope_theta"),
            *("ffn_dim_multiplier", "z_image_modulation", "time_scale", "pad_tokens_multiple"),
        ],
        "latent": [1, 16, 16, 16],
        "cond": _text(128),
        "blocks": r"(context_refiner|noise_refiner|layers)\.",
    },
    "kandinsky5": {
        "net": "kandinsky5.model.Kandinsky5",
        "build": {
            **{"image_model": "kandinsky5", "model_dim": 256, "ff_dim": 512, "time_dim": 128},
            **{"visual_embed_dim": 132, "num_text_blocks": 2, "num_visual_blocks": 4},
            **{"in_text_dim": 128, "in_text_dim2": 64, "axes_dims": (16, 24, 24)},
        },
        "small": ["model_dim", "time_dim", "in_text_dim", "in_text_dim2", "axes_dims"],
        "latent": [1, 16, 1, 16, 16],
        "cond": _text(128, 64),
        "blocks": r"(text|visual)_transformer_blocks\.",
    },
    "aura_flow": {
        "net": "aura.mmdit.MMDiT",
        "build": {
            **{"dim": 256, "n_layers": 5, "n_double_layers": 2, "n_heads": 2},
            **{"global_conddim": 256, "cond_seq_dim": 128, "max_seq": 1024},
        },
        "match": {"cond_seq_dim": 2048},
        "small": [
            "dim",
            "n_layers",
            "n_double_layers",
            "n_heads",
            "global_conddim",
            "cond_seq_dim",
        ],
        "latent": [1, 4, 16, 16],
        "cond": _text(128),
        "blocks": r"(double|single)_layers\.",
    },
    "hidream": {
        "net": "hidream.model.HiDreamImageTransformer2DModel",
        "build": {
            **{"image_model": "hidream", "attention_head_dim": 128, "num_attention_heads": 2},
            **{"axes_dims_rope": [64, 32, 32], "caption_channels": [128, 128], "in_channels": 16},
            **{"max_resolution": [128, 128], "llama_layers": [0, 1, 2, 3], "num_layers": 2},
            **{"num_routed_experts": 4, "num_activated_experts": 2, "num_single_layers": 2},
            **{"out_channels": 16, "patch_size": 2, "text_emb_dim": 64},
        },
        "small": [
            *("num_attention_heads", "caption_channels", "llama_layers", "num_layers"),
            *("num_single_layers", "text_emb_dim"),
        ],
        "latent": [1, 16, 16, 16],
        "cond": _text(128, 64) | {"conditioning_llama3": {"shape": [1, 4, 12, 128]}},
        "blocks": r"(double|single)_stream_blocks\.",
    },
}

_FLUX = SPECS["flux"]
WIDE: dict[str, dict[str, Any]] = {
    # For a GPU: 1.4 GB whose copies take longer than a step computes.
    "flux_wide": {
        **{key: value for key, value in _FLUX.items() if key != "fp8"},
        "build": {
            **_FLUX["build"],
            **{"hidden_size": 2048, "num_heads": 16, "depth": 2, "depth_single_blocks": 6},
        },
    },
}
