"""The ComfyUI side: nodes, and a model patcher that leaves the blocks' residency to the engine.

Nothing here is imported by the rest of the package. `extension` is what ComfyUI is given; the
patcher and the nodes need a running ComfyUI, finding blocks and reading casts do not.
"""
