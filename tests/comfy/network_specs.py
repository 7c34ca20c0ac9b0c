"""Tiny networks of the classes that no tiny model file stands for: how built, and how called.

``net`` is the class below comfy.ldm, ``build`` its arguments, ``call`` makes those of forward out
of seeded random numbers; ``idle`` names containers that such a call does not run, and why.
"""

from __future__ import annotations

from typing import Any

import torch

_T = torch.tensor([0.7])
_WAN: dict[str, Any] = {
    **{"dim": 256, "ffn_dim": 256, "num_heads": 2, "num_layers": 4, "text_dim": 64},
    **{"freq_dim": 64, "text_len": 8},
}


def _wan(r: Any, **more: Any) -> dict[str, Any]:
    return {"x": r(1, 16, 2, 8, 8), "timestep": _T * 700, "context": r(1, 8, 64)} | more


SPECS: dict[str, dict[str, Any]] = {
    "CameraWanModel": {
        "net": "wan.model.CameraWanModel",
        "build": {**_WAN, "in_dim_control_adapter": 8},
        "call": lambda r: _wan(r, camera_conditions=r(1, 8, 2, 64, 64)),
    },
    "HumoWanModel": {
        "net": "wan.model.HumoWanModel",
        "build": _WAN,
        "call": lambda r: _wan(r, audio_embed=r(1, 2, 8, 5, 1280)),
    },
    "SCAILWanModel": {
        "net": "wan.model.SCAILWanModel",
        "build": {**_WAN, "in_dim": 20},
        "call": lambda r: {
            **_wan(r),
            **{"x": r(1, 20, 2, 8, 8), "pose_latents": r(1, 20, 2, 8, 8)},
            "reference_latent": r(1, 20, 1, 8, 8),
        },
    },
    "SCAIL2WanModel": {
        "net": "wan.model.SCAIL2WanModel",
        "build": {**_WAN, "in_dim": 20},
        "call": lambda r: {
            **_wan(r),
            **{"x": r(1, 20, 2, 8, 8), "pose_latents": r(1, 20, 2, 8, 8)},
            "reference_latent": r(1, 20, 1, 8, 8),
        },
    },
    "WanModel_S2V": {
        "net": "wan.model.WanModel_S2V",
        "build": {**_WAN, "audio_inject_layers": [0, 2], "audio_dim": 64},
        "call": lambda r: _wan(r, audio_embed=r(1, 25, 64, 8)),
    },
    "WanDancerModel": {
        "net": "wan.model_wandancer.WanDancerModel",
        "build": {**_WAN, "audio_inject_layers": [0, 2]},
        "call": lambda r: _wan(r, audio_embed=r(1, 16, 35)),
    },
    "AnimateWanModel": {
        "net": "wan.model_animate.AnimateWanModel",
        "build": {**_WAN, "num_layers": 10},
        # Once: its encoder of faces takes pictures of 512 x 512 only.
        "call": (
            lambda r: _wan(
                r,
                x=r(1, 16, 1, 8, 8),
                pose_latents=r(1, 16, 1, 8, 8),
                face_pixel_values=r(1, 3, 1, 512, 512),
            ),
        ),
    },
    "CausalWanModel": {
        "net": "wan.ar_model.CausalWanModel",
        "build": _WAN,
        "call": _wan,
    },
    "Chroma": {
        "net": "chroma.model.Chroma",
        "build": {
            **{"in_channels": 64, "out_channels": 64, "patch_size": 2, "context_in_dim": 64},
            **{"hidden_size": 256, "mlp_ratio": 2.0, "num_heads": 2, "depth": 3, "theta": 10000},
            **{"depth_single_blocks": 4, "axes_dim": [16, 56, 56], "qkv_bias": True},
            **{"in_dim": 64, "out_dim": 256, "hidden_dim": 128, "n_layers": 2},
            **{"txt_ids_dims": [], "vec_in_dim": None},
        },
        "call": lambda r: {
            **{"x": r(1, 16, 8, 8), "timestep": _T, "context": r(1, 8, 64), "guidance": _T * 0},
        },
    },
    "Hunyuan3Dv2": {
        "net": "hunyuan3d.model.Hunyuan3Dv2",
        "build": {
            **{"in_channels": 16, "context_in_dim": 64, "hidden_size": 256, "num_heads": 4},
            **{"depth": 3, "depth_single_blocks": 4, "guidance_embed": True},
        },
        "call": lambda r: {
            **{"x": r(1, 16, 32), "timestep": _T, "context": r(2, 8, 64)[:1], "guidance": _T},
        },
    },
    "HunYuanDiTPlain": {
        "net": "hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain",
        "build": {
            **{"in_channels": 16, "hidden_size": 256, "context_dim": 64, "depth": 5},
            **{"num_heads": 4, "num_moe_layers": 2, "num_experts": 4},
            "guidance_cond_proj_dim": 256,
        },
        "call": lambda r: {"x": r(2, 16, 32), "t": _T.repeat(2), "context": r(2, 8, 64)},
    },
    "HunYuanDiT": {
        "net": "hydit.models.HunYuanDiT",
        "build": {
            **{"input_size": 16, "hidden_size": 256, "depth": 6, "num_heads": 4},
            **{"text_states_dim": 64, "text_states_dim_t5": 96, "text_len": 8},
            **{"text_len_t5": 12, "mlp_ratio": 2.0},
        },
        "call": lambda r: {
            **{"x": r(1, 4, 16, 16), "t": _T * 500, "context": r(1, 8, 64)},
            **{"encoder_hidden_states_t5": r(1, 12, 96)},
            **{"text_embedding_mask": torch.ones(1, 8), "image_meta_size": None},
            **{"text_embedding_mask_t5": torch.ones(1, 12)},
        },
    },
    "StageC": {
        "net": "cascade.stage_c.StageC",
        "build": {
            **{"c_r": 16, "c_cond": 64, "c_hidden": [64, 64], "nhead": [2, 2]},
            **{"blocks": [[2, 3], [3, 2]], "block_repeat": [[1, 1], [1, 2]]},
            **{"c_clip_text": 32, "c_clip_text_pooled": 32, "c_clip_img": 32},
        },
        "call": lambda r: {
            **{"x": r(1, 16, 8, 8), "r": _T, "clip_text": r(1, 8, 32)},
            **{"clip_text_pooled": r(1, 1, 32), "clip_img": r(1, 1, 32)},
        },
    },
    "StageB": {
        "net": "cascade.stage_b.StageB",
        "build": {
            **{"c_r": 16, "c_cond": 64, "c_hidden": [32, 64, 64, 64], "nhead": [-1, -1, 2, 2]},
            **{"blocks": [[1, 1, 2, 2], [2, 2, 1, 1]], "block_repeat": [[1] * 4, [2, 1, 2, 1]]},
            "c_clip": 32,
        },
        "call": lambda r: {
            **{"x": r(1, 4, 32, 32), "r": _T, "effnet": r(1, 16, 8, 8), "clip": r(1, 1, 32)},
        },
    },
    "AudioDiffusionTransformer": {
        "net": "audio.dit.AudioDiffusionTransformer",
        "build": {
            **{"io_channels": 16, "embed_dim": 256, "cond_token_dim": 64, "depth": 4},
            **{"global_cond_dim": 64, "num_heads": 4},
        },
        "call": lambda r: {
            **{"x": r(1, 16, 24), "timestep": _T, "context": r(1, 8, 64)},
            "global_embed": r(1, 64),
        },
    },
    "ACEStepTransformer2DModel": {
        "net": "ace.model.ACEStepTransformer2DModel",
        "build": {
            **{"num_layers": 4, "inner_dim": 256, "attention_head_dim": 64},
            **{"num_attention_heads": 4, "speaker_embedding_dim": 32, "text_embedding_dim": 64},
            **{"lyric_hidden_size": 1024, "lyric_encoder_vocab_size": 50, "mlp_ratio": 2.0},
            **{"ssl_encoder_depths": [1], "ssl_names": ["mert"], "ssl_latent_dims": [64]},
        },
        "call": lambda r: {
            **{"x": r(1, 8, 16, 12), "timestep": _T, "context": r(1, 8, 64)},
            **{"lyric_token_idx": torch.arange(6)[None], "speaker_embeds": r(1, 32)},
        },
    },
    "AceStepConditionGenerationModel": {
        "net": "ace.ace_step15.AceStepConditionGenerationModel",
        "build": {
            **{"hidden_size": 128, "text_hidden_dim": 64, "num_dit_layers": 4, "head_dim": 32},
            **{"num_lyric_layers": 2, "num_timbre_layers": 2, "num_heads": 4, "num_kv_heads": 2},
            **{"intermediate_size": 256, "encoder_hidden_size": 128, "encoder_num_heads": 4},
            **{"encoder_intermediate_size": 256, "fsq_dim": 128, "num_tokenizer_layers": 1},
        },
        "call": lambda r: {
            **{"x": r(1, 64, 20), "timestep": _T, "context": r(1, 8, 64)},
            **{"lyric_embed": r(1, 6, 64), "refer_audio": r(1, 64, 20)},
        },
    },
    "CogVideoXTransformer3DModel": {
        "net": "cogvideo.model.CogVideoXTransformer3DModel",
        "build": {
            **{"num_attention_heads": 4, "num_layers": 4, "text_embed_dim": 64},
            **{"time_embed_dim": 64, "use_rotary_positional_embeddings": True},
        },
        "call": lambda r: {
            **{"x": r(1, 16, 2, 8, 8), "timestep": _T * 500, "context": r(1, 8, 64)},
        },
    },
    "ErnieImageModel": {
        "net": "ernie.model.ErnieImageModel",
        "build": {
            **{"hidden_size": 256, "num_attention_heads": 2, "num_layers": 4},
            **{"ffn_hidden_size": 512, "in_channels": 16, "out_channels": 16, "text_in_dim": 64},
        },
        "call": lambda r: {"x": r(1, 16, 8, 8), "timesteps": _T, "context": r(1, 8, 64)},
    },
    "JoyImageTransformer3DModel": {
        "net": "joyimage.model.JoyImageTransformer3DModel",
        "build": {
            **{"hidden_size": 256, "num_attention_heads": 2, "text_dim": 64, "num_layers": 4},
            "mlp_width_ratio": 2.0,
        },
        "call": lambda r: {
            **{"hidden_states": r(1, 16, 1, 8, 8), "timestep": _T, "context": r(1, 8, 64)},
        },
    },
    "SingleStreamDiT": {
        "net": "krea2.model.SingleStreamDiT",
        "build": {
            **{"features": 256, "tdim": 64, "txtdim": 64, "heads": 4, "kvheads": 2, "layers": 4},
            **{"multiplier": 2, "txtlayers": 3, "txtheads": 2, "txtkvheads": 2},
        },
        "call": lambda r: {"x": r(1, 16, 8, 8), "timesteps": _T, "context": r(1, 8, 3 * 64)},
    },
    "OmniGen2Transformer2DModel": {
        "net": "omnigen.omnigen2.OmniGen2Transformer2DModel",
        "build": {
            **{"hidden_size": 192, "num_layers": 4, "num_attention_heads": 2, "num_kv_heads": 1},
            **{"text_feat_dim": 64, "multiple_of": 64},
        },
        "call": lambda r: {
            **{"x": r(1, 16, 16, 16), "timesteps": _T, "context": r(1, 8, 64), "num_tokens": 8},
            "ref_latents": [r(1, 16, 8, 8)],
        },
    },
    "BooguTransformer2DModel": {
        "net": "boogu.model.BooguTransformer2DModel",
        "build": {
            **{"hidden_size": 240, "num_layers": 4, "num_double_stream_layers": 2},
            **{"num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 64},
            "instruction_feat_dim": 64,
        },
        "call": lambda r: {
            **{"x": r(1, 16, 16, 16), "timesteps": _T, "context": r(1, 8, 64), "num_tokens": 8},
            "ref_latents": [r(1, 16, 8, 8)],
        },
    },
    "PixArtMS": {
        "net": "pixart.pixartms.PixArtMS",
        "build": {
            **{"input_size": 16, "hidden_size": 256, "depth": 4, "num_heads": 4},
            **{"caption_channels": 64, "model_max_length": 8, "mlp_ratio": 2.0},
            "micro_condition": False,
        },
        "call": lambda r: {"x": r(1, 4, 48, 48), "timesteps": _T * 500, "context": r(1, 8, 64)},
    },
}
