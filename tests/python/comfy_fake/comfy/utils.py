"""Reads files."""

from __future__ import annotations


def load_torch_file(ckpt, safe_load=False, device=None, return_metadata=False):
    return ({"path": ckpt}, None) if return_metadata else {"path": ckpt}
