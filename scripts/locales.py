"""Writes locales/en/nodeDefs.json from the nodes' own texts: ``python scripts/locales.py``.

The Chinese file beside it is written by hand; a test compares its keys with these.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Reads the schemas without ComfyUI: from the fake that the tests use."""
    sys.path.insert(0, str(ROOT / "tests" / "python" / "comfy_fake"))
    from dgls_torch.comfy.extension import DGLSExtension

    made = {}
    nodes: list[Any] = asyncio.run(DGLSExtension().get_node_list())
    for node in nodes:
        schema = node.define_schema()
        inputs = {
            field.id: {"name": field.id, "tooltip": field.options["tooltip"]}
            for field in schema.fields["inputs"]
        }
        made[schema.node_id] = {
            "display_name": schema.fields["display_name"],
            "description": schema.fields["description"],
            "inputs": inputs,
        }
    target = ROOT / "locales" / "en" / "nodeDefs.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
