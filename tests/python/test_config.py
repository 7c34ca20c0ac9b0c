"""StreamConfig.

Goal: every field takes what its documentation says, in one stored form, and refuses the rest.
Method: tables of values and messages, and the documentation itself is checked field by field.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dgls_torch.config
from dgls_torch.config import StreamConfig

FIELDS = [field.name for field in dataclasses.fields(StreamConfig)]


def test_the_defaults_are_documented_ones() -> None:
    config = StreamConfig()
    assert (config.vram, config.vram_bytes) == ("auto", None)
    assert (config.device, config.blocks, config.exclude) == (None, None, ())
    assert (config.source, config.source_path) == ("tensors", None)
    assert (config.pinned, config.pinned_bytes) == ("auto", None)
    assert config.staging == config.staging_bytes == 64 * 2**20
    assert config.compress == "off"
    assert config.min_stream_bytes == 64 * 2**10
    assert config.trace_passes == 8
    assert config.poison is False
    assert config.copy_bytes_per_s is None


def test_each_field_says_unit_range_default_and_why_to_change_it() -> None:
    text = inspect.getdoc(StreamConfig) or ""
    entries = re.split(r"^    (\w+): ", text.partition("Attributes:\n")[2], flags=re.MULTILINE)[1:]
    documented = dict(zip(entries[::2], entries[1::2], strict=True))
    assert list(documented) == FIELDS
    for name, entry in documented.items():
        for part in ("Unit: ", "Range: ", "Default: ", "Change it: "):
            assert entry.count(part) == 1, (name, part)


@pytest.mark.parametrize(
    ("field", "value", "stored"),
    [
        ("vram", "8GiB", 8 * 2**30),
        ("vram", 8e9, 8_000_000_000),
        ("vram", " AUTO", "auto"),
        ("vram", 1, 1),
        ("device", "cpu", "cpu"),
        ("device", "cpu:0", "cpu"),
        ("device", " CUDA ", "cuda"),
        ("device", "cuda:0", "cuda:0"),
        ("device", "cuda:15", "cuda:15"),
        ("device", torch.device("cuda", 3), "cuda:3"),
        ("device", torch.device("cpu"), "cpu"),
        ("blocks", ["layers.0", "layers.1"], ("layers.0", "layers.1")),
        ("blocks", (name for name in ("a", "b")), ("a", "b")),
        ("exclude", ["vae", "head.*"], ("vae", "head.*")),
        ("exclude", (), ()),
        ("source", "model.safetensors", "model.safetensors"),
        ("source", Path("folder") / "model.safetensors", str(Path("folder/model.safetensors"))),
        ("pinned", 0, 0),
        ("pinned", "0 GiB", 0),
        ("pinned", "2 GB", 2_000_000_000),
        ("staging", "4KiB", 4096),
        ("staging", 2**63 - 1, 2**63 - 1),
        ("compress", "off", "off"),
        ("compress", "auto", "auto"),
        ("compress", "on", "on"),
        ("min_stream_bytes", 0, 0),
        ("min_stream_bytes", "1 MiB", 2**20),
        ("trace_passes", 0, 0),
        ("trace_passes", 1024, 1024),
        ("poison", True, True),
        ("copy_bytes_per_s", 5_000_000_000, 5e9),
        ("copy_bytes_per_s", 0.5, 0.5),
    ],
)
def test_values_are_stored_in_one_form(field: str, value: object, stored: object) -> None:
    config = StreamConfig(**{field: value})
    assert getattr(config, field) == stored
    assert type(getattr(config, field)) is type(stored)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vram", 0, "vram needs at least 1 B, found 0"),
        ("vram", "lots", "vram needs a size"),
        ("vram", True, "vram needs a size .* found the bool True"),
        ("vram", math.nan, "vram needs a size"),
        ("vram", 2**63, r"vram needs at most 2\*\*63 - 1 bytes"),
        ("device", "", "device needs None"),
        ("device", "gpu", 'device needs None, "cpu", .* found .gpu.'),
        ("device", "cuda:-1", "device needs"),
        ("device", "cuda:01", "device needs"),
        ("device", "cuda0", "device needs"),
        ("device", "cpu:1", "device needs"),
        ("device", torch.device("meta"), "device needs .* found 'meta'"),
        ("unit", "layers", 'unit needs "block" or "layer", found \'layers\''),
        ("blocks", [], "blocks needs at least one"),
        ("blocks", ["layers.0", "layers.0"], r"blocks\[1\] needs to be named once"),
        ("blocks", ["layers..0"], r"blocks\[0\] needs a dotted name"),
        ("blocks", ["layers.0", ""], r"blocks\[1\] needs a dotted name"),
        ("blocks", [" layers"], r"blocks\[0\] needs a dotted name"),
        ("blocks", ["layers.*"], r"blocks\[0\] needs one dotted name and no pattern"),
        ("exclude", [""], r"exclude\[0\] needs a pattern"),
        ("exclude", ["vae", " x"], r"exclude\[1\] needs a pattern"),
        ("source", "", "source needs"),
        ("source", " ", "source needs"),
        ("source", "a\0b", "source needs"),
        ("pinned", -1, "pinned needs at least 0 B, found -1"),
        ("staging", 4095, r"staging needs at least 4\.00 KiB, found 4095"),
        ("staging", "auto", "staging needs a size"),
        ("compress", "yes", 'compress needs "off", "auto" or "on", found \'yes\''),
        ("compress", "ON", 'compress needs "off", "auto" or "on", found \'ON\''),
        ("compress", "", "compress needs .* found ''"),
        ("min_stream_bytes", -1, "min_stream_bytes needs at least 0 B"),
        ("trace_passes", -1, "trace_passes needs 0 to 1024 passes, found -1"),
        ("trace_passes", 1025, "trace_passes needs 0 to 1024 passes, found 1025"),
        ("copy_bytes_per_s", 0, "copy_bytes_per_s needs a finite rate above 0"),
        ("copy_bytes_per_s", -1.0, "copy_bytes_per_s needs"),
        ("copy_bytes_per_s", math.inf, "copy_bytes_per_s needs"),
        ("copy_bytes_per_s", math.nan, "copy_bytes_per_s needs"),
        ("copy_bytes_per_s", 10**400, "copy_bytes_per_s needs"),
    ],
)
def test_values_out_of_range_are_value_errors(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        StreamConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vram", None),
        ("vram", [8]),
        ("device", 0),
        ("device", True),
        ("unit", None),
        ("unit", 1),
        ("blocks", "layers"),
        ("blocks", 3),
        ("blocks", [3]),
        ("blocks", {"layers.0": 1}),
        ("blocks", torch.nn.Linear(1, 1)),
        ("blocks", torch.nn.ModuleDict({"a": torch.nn.Linear(1, 1)})),
        ("exclude", "vae"),
        ("exclude", None),
        ("exclude", [torch.nn.Linear(1, 1)]),
        ("source", None),
        ("source", b"model.safetensors"),
        ("pinned", None),
        ("staging", None),
        ("compress", None),
        ("compress", True),
        ("compress", 1),
        ("min_stream_bytes", None),
        ("trace_passes", True),
        ("trace_passes", 8.0),
        ("trace_passes", "8"),
        ("poison", 1),
        ("poison", None),
        ("copy_bytes_per_s", "6 GB/s"),
        ("copy_bytes_per_s", True),
    ],
)
def test_wrong_types_are_type_errors_that_name_the_field(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"^{field}(\[0\])? needs .*, found "):
        StreamConfig(**{field: value})


def test_blocks_may_be_modules() -> None:
    layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    assert StreamConfig(blocks=layers).blocks == tuple(layers)
    assert StreamConfig(blocks=[layers[1], "head"]).blocks == (layers[1], "head")
    with pytest.raises(ValueError, match=r"^blocks\[1\] needs to be named once, found Linear"):
        StreamConfig(blocks=[layers[0], layers[0]])


def test_unknown_fields_name_the_nearest_and_all() -> None:
    with pytest.raises(TypeError, match=r"no field 'vrm'; did you mean 'vram'\?") as refused:
        StreamConfig(vrm="8GiB")
    assert all(name in str(refused.value) for name in FIELDS)
    with pytest.raises(TypeError, match="no field 'qqq'; its fields are vram,") as refused:
        StreamConfig().replace(qqq=1)
    assert "did you mean" not in str(refused.value)
    with pytest.raises(TypeError, match="positional"):
        StreamConfig("8GiB")


def test_replace_checks_and_leaves_the_original() -> None:
    first = StreamConfig(vram="8GiB", exclude=("vae",))
    second = first.replace(vram="6GiB", poison=True)
    assert (second.vram_bytes, second.exclude, second.poison) == (6 * 2**30, ("vae",), True)
    assert (first.vram_bytes, first.poison) == (8 * 2**30, False)
    with pytest.raises(ValueError, match="trace_passes"):
        first.replace(trace_passes=-1)
    # What is stored must be valid input again, or no configuration could be changed twice.
    assert second.replace() == second
    assert StreamConfig(**{name: getattr(second, name) for name in FIELDS}) == second


def test_it_is_frozen_hashable_and_can_be_copied() -> None:
    config = StreamConfig(vram="8GiB", blocks=["a", "b"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vram = 1
    # A slotted class has nowhere to put a misspelled attribute; which error says so varies.
    with pytest.raises((AttributeError, TypeError)):
        config.vrm = 1
    assert config == StreamConfig(vram=8 * 2**30, blocks=("a", "b"))
    assert hash(config) == hash(StreamConfig(vram=8 * 2**30, blocks=("a", "b")))
    assert config != StreamConfig(vram="8GB", blocks=["a", "b"])
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config


@pytest.mark.parametrize(
    ("patterns", "name", "excluded"),
    [
        ((), "vae.decoder", False),
        (("vae",), "vae", True),
        (("vae",), "vae.decoder.conv.weight", True),
        (("vae",), "vae2", False),
        (("vae",), "model.vae", False),
        (("*.vae",), "model.vae.decoder", True),
        (("text_*",), "text_encoder.layers.0", True),
        (("layers.[0-3]",), "layers.3.mlp.weight", True),
        (("layers.[0-3]",), "layers.4.mlp.weight", False),
        (("layers.?",), "layers.10", False),
        (("*.bias",), "layers.0.bias", True),
        (("VAE",), "vae", False),
        (("head", "vae"), "vae.x", True),
    ],
)
def test_exclude_matches_a_name_and_what_is_below(
    patterns: tuple[str, ...], name: str, excluded: bool
) -> None:
    assert StreamConfig(exclude=patterns).excludes(name) is excluded


def test_checking_a_config_does_not_import_torch() -> None:
    # A bare package in place of dgls_torch: this is about config.py, not about __init__.py.
    folder = Path(dgls_torch.config.__file__).parent
    program = f"""
import sys, types
package = types.ModuleType("dgls_torch")
package.__path__ = [{str(folder)!r}]
sys.modules["dgls_torch"] = package
from dgls_torch.config import StreamConfig
StreamConfig(vram="8GiB", device="cuda:0", blocks=["a"], source="m.safetensors")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
