"""``torch.ops.dgls.*``: an engine without the hooks, for other projects; and the fake kernels.

An engine is a number. Sizes are bytes; blocks are indices; ``order`` lists blocks in order of use
in one pass. Errors are RuntimeErrors that say what was needed and what was found.

Set-up (none of these enqueues anything):

``plan(tensor_bytes, tensor_block, order, budget_bytes, min_stream_bytes=0)``
    Returns ``(resident, facts)``: 1 for each tensor that stays on the device, else 0; and
    resident_bytes, streamed_bytes per pass, ring_bytes, arena_bytes, least_bytes (the smallest
    budget with a plan), passes in one cycle of addresses, and nanoseconds of a pass as predicted
    and as no policy can beat, both -1 before times are known.
``plan.json(inputs) -> str``
    Plans from JSON and returns JSON, with times and a link; docs/plan-format.md has the fields.
``create(arena, weights, file_index, file_offset, file_bytes, files, tensor_block, order,
budget_bytes, ...)``
    Makes an engine. ``arena``: uint8, one dimension, at least arena_bytes, on the device that
    computes. ``weights``: CPU tensors; then come those of ``files``. The engine keeps all alive.
    ``adapt``: time every pass and look for better plans in a thread; ``wants_rebuild`` says when
    one was found. ``manual``: ``resident_blocks`` stay whole, all others are streamed whole.
    ``window``: blocks that are copied ahead at most, or -1. ``verify``: compare what arrives with
    its source. ``names``: one a line for each tensor, for messages. ``encode``: 0 never, 1 where
    copies decide, 2 always; the tensors whose numbers ``encodable`` has, bf16 all of them, and
    ``encodable_fp8``, float8_e4m3fn, in up to ``encoded_bytes`` of host memory;
    ``locked_bytes``: most that is page-locked, those included; ``decode_buffer``: uint8, one
    dimension, on the device of the arena, 11 MiB and more, if that is a GPU.
``plan_for(engine, budget_bytes)``, ``rebuild(engine, arena, budget_bytes)``
    What another budget would give; and a change to it, or to the better plan that was found.
    ``rebuild`` blocks until the device is done with the old arena, and moves what stays to the new
    one on the device.
``vacate(engine, nothing)``
    Gives the arena up where there is no room for two; blocks as long. ``nothing`` is an empty
    tensor on the same device. No block may run before the next ``rebuild``.
``plan_in_force(engine)``
    As ``plan_for``, of the plan in force.
``layout(engine)``
    For each position of the program: block, number of tensors, arena offset of each tensor.
``order(engine)``
    The order the plan was made for.

At each block, on torch's current stream:

``wait(x, engine, block) -> position``
    Makes the stream wait for the block's weights, which then lie as ``layout`` says for that
    position. Blocks the host only on the CPU, and while a staging thread has yet to enqueue the
    copies. ``x``, which is not touched, orders the call for torch.compile, which cannot capture a
    number: a graph ends here.
``release(x, engine, block)``
    The weights of the block that runs may be overwritten once the stream has passed this point.
``prefetch(engine)``
    Starts the first copies before the first ``wait``.
``begin_pass(engine)``, ``end_pass(engine)``, ``wants_rebuild(engine)``
    Bounds of a pass of the whole model, from which the order is learned.
``reload(engine, block)``
    The host weights of a block were changed in place.
``give_back(engine, bytes)``
    The system lacks so many bytes of memory: before the next ``wait`` ends, page-locks and copies
    of files are given back, as many as there are. Returns at once.

Weights by themselves, without an engine and on the CPU (docs/encoded-format.md, Stream):

``encode(weights) -> encoded``
    The lossless encoded form of a contiguous bfloat16 tensor of any shape: uint8, one dimension,
    256 bytes or more. Trained weights take about 11 bits of 16; what would not become smaller is
    kept as it is, so that the most it grows by are 279 bytes and 8 for each 4 MiB. The shape is
    not in it. At its end the result is in memory twice. For autograd it is a constant.
``decode(encoded, elements) -> weights``
    The same bits in a new bfloat16 tensor of one dimension. ``elements``: how many were encoded;
    another number than the stream has is refused, as is all that contradicts itself, before memory
    is taken. There is no checksum: a changed bit of a weight is not seen.
    Tensors of other devices are refused: weights are encoded on the host, and on the device an
    engine decodes them. Both take one core, and others may work beside them.

Afterwards: ``stats(engine)``, ``trace(engine)``, ``host(engine)`` (see `dgls_torch.report`),
``errors(engine)``, the last ones, one a line; ``destroy(engine)``.
Machine: ``driver_version()``, ``measure_copy(device, bytes, repeats, page_locked)`` in bytes per
second, ``measure_page_lock(device, max_bytes)`` in bytes; device -1 is the CPU.
"""

from __future__ import annotations

import torch


@torch.library.register_fake("dgls::wait")
def _wait(x: torch.Tensor, engine: int, block: int) -> int:
    """A position is a plain number that only the engine knows; tracing takes any."""
    return 0


@torch.library.register_fake("dgls::release")
def _release(x: torch.Tensor, engine: int, block: int) -> None:
    """Nothing but order."""


@torch.library.register_fake("dgls::rebuild")
def _rebuild(engine: int, arena: torch.Tensor, budget_bytes: int) -> None:
    """Takes a tensor, makes none."""


@torch.library.register_fake("dgls::create")
def _create(arena: torch.Tensor, weights: list[torch.Tensor], *_: object, **__: object) -> int:
    """An engine is not made while tracing."""
    raise RuntimeError(
        "torch.ops.dgls.create needs tensors with memory, none on meta, and cannot be traced: make "
        "the engine before compiling"
    )


def _check_host(tensor: torch.Tensor, name: str, dtype: torch.dtype) -> None:
    """Refuse while tracing what would be refused afterwards."""
    if tensor.device.type != "cpu":
        raise RuntimeError(
            f"dgls: {name} must be on the CPU, found {tensor.device}: weights are encoded on the "
            "host, and on the device an engine decodes them"
        )
    if tensor.dtype != dtype:
        raise RuntimeError(f"dgls: {name} must be {dtype}, found {tensor.dtype}")


@torch.library.register_fake("dgls::encode")
def _encode(weights: torch.Tensor) -> torch.Tensor:
    """Only the weights say how many bytes they take."""
    _check_host(weights, "weights", torch.bfloat16)
    size = torch.library.get_ctx().new_dynamic_size(min=256)
    return weights.new_empty(size, dtype=torch.uint8)


@torch.library.register_fake("dgls::decode")
def _decode(encoded: torch.Tensor, elements: int) -> torch.Tensor:
    """As many as are asked for, or an error."""
    _check_host(encoded, "encoded", torch.uint8)
    return encoded.new_empty(elements, dtype=torch.bfloat16)
