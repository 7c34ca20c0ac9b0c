"""Loads model files; tests put in what a file loads as."""

from __future__ import annotations

#: Path to a function that makes a patcher.
files: dict = {}


def load_diffusion_model(unet_path, model_options={}, disable_dynamic=False):  # noqa: B006
    if unet_path not in files:
        raise RuntimeError(f"ERROR: Could not detect model type of: {unet_path}")
    return files[unet_path]()


def load_diffusion_model_state_dict(
    sd,
    model_options={},  # noqa: B006
    metadata=None,
    disable_dynamic=False,
):
    return files[sd["path"]]() if sd["path"] in files else None
