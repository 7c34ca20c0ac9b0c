"""A minimal stand-in for ComfyUI: exactly the functions that dgls_torch.comfy uses.

Written from what ComfyUI 0.33 does, not from its text. ``make comfy-check`` compares every
signature here with a real checkout, and runs the same tests against it.
"""
