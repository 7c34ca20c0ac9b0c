"""The node API's latest version: schemas are kept as they were given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class _Field:
    """An input or an output."""

    def __init__(self, id=None, **options: Any):
        self.id, self.options = id, options


def _kind(io_type):
    return SimpleNamespace(io_type=io_type, Input=_Field, Output=_Field)


class Schema:
    """A node's schema."""

    def __init__(self, node_id, **fields: Any):
        self.node_id = node_id
        self.fields = fields


class NodeOutput:
    """A node's result."""

    def __init__(self, *args: Any, ui=None):
        self.args, self.ui = args, ui


class ComfyNode:
    """The base of nodes."""


class ComfyExtension:
    """The base of extensions."""


io = SimpleNamespace(
    **{name: _kind(name) for name in ("Model", "Combo", "Boolean", "Int", "String", "AnyType")},
    Custom=_kind,
    Schema=Schema,
    NodeOutput=NodeOutput,
    ComfyNode=ComfyNode,
    Hidden=SimpleNamespace(unique_id="UNIQUE_ID", extra_pnginfo="EXTRA_PNGINFO"),
)
