"""Safetensors files and sources.

Goal: what good files hold is found and read bit for bit; changed files and indexes that contradict
them are errors that name the file. Malformed files have a test file of their own, test_header.py.
Method: files by the safetensors package and by hand, damaged, changed and taken away.
"""

from __future__ import annotations

import json
import os
import tracemalloc
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from dgls_torch import header
from dgls_torch.files import FileTensor, SafetensorsFile, SafetensorsSource

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def tensors_of_all_dtypes(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, dtype in header.DTYPES.items():
        count = 6 * dtype.itemsize
        raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
        if dtype is torch.bool:
            raw &= 1
        tensors[f"{name}.weight"] = raw.view(dtype).reshape(2, 3)
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.empty(0, 7)
    return tensors


def raw_bytes(tensor: torch.Tensor) -> bytes:
    # view() wants a dimension to stretch, and numel() 0 has no bytes to look at.
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def write(path: Path, entries: dict[str, object], data: bytes = b"", pad: int = 0) -> Path:
    """Writes a file by hand."""
    text = json.dumps(entries).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "model.safetensors"


@pytest.fixture(autouse=True)
def _folder(path: Path) -> None:
    path.parent.mkdir()


def test_every_dtype_is_found_and_read_bit_for_bit(path: Path) -> None:
    expected = tensors_of_all_dtypes()
    save_file(expected, path, metadata={"format": "pt", "note": "ü"})
    file = SafetensorsFile(path)
    assert set(file.tensors) == set(expected)
    assert file.metadata == {"format": "pt", "note": "ü"}
    content = path.read_bytes()
    for name, tensor in expected.items():
        found = file.tensors[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tuple(tensor.shape))
        assert found.bytes == tensor.numel() * tensor.itemsize
        assert content[found.offset : found.offset + found.bytes] == raw_bytes(tensor)
        loaded = file.load_tensor(name)
        assert (loaded.dtype, loaded.shape, loaded.device.type) == (
            tensor.dtype,
            tensor.shape,
            "cpu",
        )
        assert raw_bytes(loaded) == raw_bytes(tensor)


def test_the_dtypes_are_those_of_the_format() -> None:
    needed = "F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL F8_E4M3 F8_E5M2 U16 U32 U64 C64"
    assert set(needed.split()) <= set(header.DTYPES)
    assert ("F8_E8M0" in header.DTYPES) == hasattr(torch, "float8_e8m0fnu")
    assert len(set(header.DTYPES.values())) == len(header.DTYPES)


def test_what_is_read_is_the_callers_own(path: Path) -> None:
    save_file({"a": torch.arange(8)}, path)
    file = SafetensorsFile(path)
    first = file.load_tensor("a")
    first.zero_()
    assert torch.equal(file.load_tensor("a"), torch.arange(8))


def test_on_meta_nothing_is_read(path: Path) -> None:
    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}, path)
    file = SafetensorsFile(path)
    path.unlink()
    loaded = file.load_tensor("a", "meta")
    assert (loaded.device.type, loaded.shape, loaded.dtype) == ("meta", (2, 3), torch.bfloat16)


def test_a_read_that_comes_in_pieces_is_put_together(path: Path) -> None:
    class Slow:
        """A file that never gives more than 3 bytes at once."""

        def __init__(self, content: bytes) -> None:
            self.content, self.at = content, 0

        def seek(self, offset: int) -> None:
            self.at = offset

        def readinto(self, target: memoryview) -> int:
            piece = self.content[self.at : self.at + min(3, len(target))]
            target[: len(piece)] = piece
            self.at += len(piece)
            return len(piece)

    file = SafetensorsFile(write(path, {}))
    content = bytes(range(100))
    target = bytearray(50)
    file._read(Slow(content), 20, memoryview(target))
    assert target == content[20:70]
    with pytest.raises(ValueError, match=r"needs 50 bytes at offset 60, found 40 bytes"):
        file._read(Slow(content), 60, memoryview(target))


def test_the_smallest_files(path: Path) -> None:
    assert SafetensorsFile(write(path, {})).tensors == {}
    padded = SafetensorsFile(write(path, {"a": entry([], 0, 1)}, b"\7", pad=13))
    assert padded.tensors["a"] == FileTensor(torch.uint8, (), path.stat().st_size - 1, 1)
    assert padded.load_tensor("a").item() == 7
    # Several empty tensors may share one place.
    entries = {"x": entry([0], 2, 2), "b": entry([2], 0, 2), "y": entry([3, 0], 2, 2)}
    empties = SafetensorsFile(write(path, entries, b"ab"))
    assert empties.load_tensor("y").shape == (3, 0)


def test_a_file_larger_than_any_memory_is_read_by_its_header(path: Path) -> None:
    size = 2**42
    write(path, {"a": entry([size], 0, size), "b": entry([4], size, size + 4)})
    start = path.stat().st_size
    try:
        os.truncate(path, start + size)
    except OSError:
        pytest.skip("this file system has no sparse file of 4 TiB")
    with open(path, "ab") as file:
        file.write(b"last")
    tracemalloc.start()
    try:
        found = SafetensorsFile(path)
        tail = found.load_tensor("b")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert found.tensors["a"] == FileTensor(torch.uint8, (size,), start, size)
    assert bytes(tail.tolist()) == b"last"


@pytest.mark.parametrize("change", ["longer", "same size", "replaced"])
def test_a_changed_file_is_refused(path: Path, change: str) -> None:
    save_file({"a": torch.arange(4)}, path)
    file = SafetensorsFile(path)
    file.check_unchanged()
    assert file.size == path.stat().st_size
    assert file.mtime_ns == path.stat().st_mtime_ns
    if change == "longer":
        path.write_bytes(path.read_bytes() + b"x")
        os.utime(path, ns=(file.mtime_ns, file.mtime_ns))
    else:
        other = path.with_name("other")
        other.write_bytes(path.read_bytes()[::-1])
        os.utime(other, ns=(file.mtime_ns + 1, file.mtime_ns + 1))
        if change == "replaced":
            other.replace(path)
        else:
            os.utime(path, ns=(file.mtime_ns + 1, file.mtime_ns + 1))
    with pytest.raises(ValueError, match=rf"^model\.safetensors needs to stay {file.size} bytes"):
        file.check_unchanged()
    with pytest.raises(ValueError, match="needs to stay"):
        file.load_tensor("a")


def test_what_is_missing_is_an_os_error(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SafetensorsFile(path)
    save_file({"a": torch.arange(4)}, path)
    file = SafetensorsFile(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        file.check_unchanged()


def test_only_regular_files_are_opened(path: Path) -> None:
    with pytest.raises(ValueError, match="folder needs to be a file, found a folder"):
        SafetensorsFile(path.parent)
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)  # Opening it would wait for ever.
        with pytest.raises(ValueError, match="needs to be a file, found something else"):
            SafetensorsFile(path)


def test_an_unknown_tensor_names_the_nearest(path: Path) -> None:
    save_file({"layers.0.weight": torch.arange(4), "head": torch.ones(1)}, path)
    for load in (SafetensorsFile(path).load_tensor, SafetensorsSource(path).lookup):
        with pytest.raises(ValueError, match=r"^model\.saf.* found 2 others; .* 'layers.0.weight'"):
            load("layers.O.weight")
        with pytest.raises(ValueError, match=r"needs a tensor 'zzz', found 2 others$"):
            load("zzz")


def shards(folder: Path, index: str = "model.safetensors.index.json") -> dict[str, torch.Tensor]:
    """Writes a model in three files and an index."""
    tensors = {f"layers.{n}.weight": torch.full((n + 1, 2), float(n)) for n in range(9)}
    weight_map = {name: f"model-{n % 3}.safetensors" for n, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
    (folder / index).write_text(text)
    return tensors


@pytest.mark.parametrize("open_", [lambda f: f, lambda f: f / "model.safetensors.index.json"])
def test_a_sharded_source(path: Path, open_: Callable[[Path], Path]) -> None:
    expected = shards(path.parent)
    source = SafetensorsSource(str(open_(path.parent)))
    assert [file.path.name for file in source.files] == [f"model-{n}.safetensors" for n in range(3)]
    assert source.names == list(expected)
    assert source.bytes == sum(tensor.nbytes for tensor in expected.values())
    assert "layers.4.weight" in source
    assert "layers.9.weight" not in source
    for n, (name, tensor) in enumerate(expected.items()):
        number, found = source.lookup(name)
        assert number == n % 3
        assert found == source.files[number].tensors[name]
        assert torch.equal(source.load_tensor(name), tensor)
    source.check_unchanged()
    os.utime(path.parent / "model-1.safetensors", ns=(1, 1))
    with pytest.raises(ValueError, match=r"^model-1\.safetensors needs to stay"):
        source.check_unchanged()


@pytest.mark.parametrize("open_", [lambda p: p, lambda p: p.parent])
def test_a_source_of_one_file(path: Path, open_: Callable[[Path], Path]) -> None:
    expected = tensors_of_all_dtypes()
    save_file(expected, path)
    (path.parent / "config.json").write_text("{}")
    source = SafetensorsSource(open_(path))
    assert set(source.names) == set(expected)
    assert source.bytes == sum(tensor.nbytes for tensor in expected.values())
    assert source.lookup("scalar") == (0, source.files[0].tensors["scalar"])
    assert source.load_tensor("scalar").item() == 3.5


def test_a_folder_must_hold_one_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = path.parent
    with pytest.raises(ValueError, match=r"^folder needs exactly one .*, found none$"):
        SafetensorsSource(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=r"^folder needs exactly one"):
        SafetensorsSource(".")
    for name in "ab":
        save_file({"x": torch.ones(1)}, folder / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"found a\.safetensors, b\.safetensors$"):
        SafetensorsSource(folder)
    for n in range(8):
        save_file({"x": torch.ones(1)}, folder / f"c{n}.safetensors")
    with pytest.raises(ValueError, match=r"and 5 more$"):
        SafetensorsSource(folder)


def test_a_file_beside_a_sharded_model_makes_it_unclear(path: Path) -> None:
    shards(path.parent)
    save_file({"x": torch.ones(1)}, path.parent / "variant.safetensors")
    with pytest.raises(ValueError, match=r"found model\.saf.*index\.json, variant\.safetensors$"):
        SafetensorsSource(path.parent)
    (path.parent / "variant.safetensors").unlink()
    shards(path.parent, "model.fp16.safetensors.index.json")
    with pytest.raises(ValueError, match="needs exactly one"):
        SafetensorsSource(path.parent)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"", "needs a JSON object, found 0 B of else"),
        (b"[]", "needs a JSON object, found 2 B of else: list"),
        (b"\xff", "needs a JSON object"),
        (b"{}", "needs an object weight_map .* found None"),
        (b'{"weight_map": {}}', "needs an object weight_map .* found {}"),
        (b'{"weight_map": [1]}', "needs an object weight_map"),
        (b'{"weight_map": {"a": 1}}', "needs names of .safetensors files .* found 1"),
        (b'{"weight_map": {"a": "../a.safetensors"}}', "needs names of .safetensors files"),
        (b'{"weight_map": {"a": "/a.safetensors"}}', "needs names of .safetensors files"),
        (b'{"weight_map": {"a": "x/a.safetensors"}}', "needs names of .safetensors files"),
        (b'{"weight_map": {"a": "x\\\\a.safetensors"}}', "needs names of .safetensors files"),
        (b'{"weight_map": {"a": "C:a.safetensors"}}', "needs names of .safetensors files"),
        (b'{"weight_map": {"a": "a\\u0000.safetensors"}}', "needs names of .safetensors files"),
        (b'{"weight_map": {"a": "a.bin"}}', "needs names of .safetensors files"),
        (b'{"weight_map": {"a": ".."}}', "needs names of .safetensors files"),
        (b'{"weight_map": {"a": ""}}', "needs names of .safetensors files"),
        (b'{"weight_map": {"b": "a.safetensors"}}', "needs 'b' in a.safetensors, found 1 others"),
    ],
)
def test_malformed_indexes_are_refused(path: Path, index: bytes, message: str) -> None:
    save_file({"a": torch.ones(1)}, path.parent / "a.safetensors")
    file = path.parent / "m.safetensors.index.json"
    file.write_bytes(index)
    with pytest.raises(ValueError, match=rf"^m\.safetensors\.index\.json {message}"):
        SafetensorsSource(file)


def test_an_index_without_its_file(path: Path) -> None:
    shards(path.parent)
    (path.parent / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors"):
        SafetensorsSource(path.parent)


def test_a_huge_index_is_not_read(path: Path) -> None:
    file = path.parent / "m.safetensors.index.json"
    file.touch()
    os.truncate(file, 2**35)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="needs at most 100000000 bytes of index"):
            SafetensorsSource(file)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
