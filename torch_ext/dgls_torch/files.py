"""Decides which safetensors files a model's weights come from, and reads single tensors of them."""

from __future__ import annotations

import ctypes
import difflib
import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, NoReturn

import torch

from dgls_torch.header import FileTensor, json_object, parse_header, refuse, shown

if TYPE_CHECKING:
    from collections.abc import Collection
    from io import FileIO

__all__ = ["FileTensor", "SafetensorsFile", "SafetensorsSource"]

# The format's own limit on headers; we hold an index to it as well.
_HEADER_MOST = 100_000_000
_LENGTH = 8
_INDEX_SUFFIX = ".safetensors.index.json"


class SafetensorsFile:
    """The checked header of one safetensors file.

    Attributes:
        path: The file.
        size: Its size in bytes when the header was read.
        mtime_ns: Its modification time then, in nanoseconds.
        tensors: Each tensor by name.
        metadata: The free text the file carries.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads and checks the header.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is no safetensors file: the message says what it needs and has instead.
        """
        self.path = Path(path)
        _size_of_regular(self.path)
        with open(self.path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            self.size, self.mtime_ns = status.st_size, status.st_mtime_ns
            text = self._header(file)
        self.tensors, self.metadata = parse_header(text, self.size, self.path.name)

    def check_unchanged(self) -> None:
        """Refuses a file that was written or replaced since its header was read.

        Raises:
            OSError: The file is gone.
            ValueError: Its size or modification time is another one.
        """
        self._check_status(os.stat(self.path))

    def load_tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Reads one tensor into new memory; on ``meta`` nothing is read.

        Raises:
            OSError: The file cannot be read.
            ValueError: It has no such tensor, or it has changed.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            self._refuse(_no_tensor(name, self.tensors))
        if torch.device(device).type == "meta":
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        loaded = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        with open(self.path, "rb", buffering=0) as file:
            self._check_status(os.fstat(file.fileno()))
            if tensor.bytes:
                # torch lends its memory to no reader, and not every dtype exists in numpy.
                memory = (ctypes.c_ubyte * tensor.bytes).from_address(loaded.data_ptr())
                self._read(file, tensor.offset, memoryview(memory))
        return loaded.to(device)

    def _header(self, file: FileIO) -> bytearray:
        if self.size < _LENGTH:
            self._refuse(f"needs the 8 bytes of the header's length, found {self.size} bytes")
        length_bytes = bytearray(_LENGTH)
        self._read(file, 0, memoryview(length_bytes))
        length, left = int.from_bytes(length_bytes, "little"), self.size - _LENGTH
        # Before the allocation: the length is whatever the first 8 bytes of any file say.
        if length > _HEADER_MOST:
            self._refuse(f"needs a header of at most {_HEADER_MOST} bytes, found {length} bytes")
        if length > left:
            self._refuse(f"needs {length} bytes of header, found {left} bytes: it is truncated")
        header = bytearray(length)
        self._read(file, _LENGTH, memoryview(header))
        return header

    def _read(self, file: FileIO, offset: int, target: memoryview) -> None:
        file.seek(offset)
        done = 0
        while done < len(target):  # One call reads at most 2 GiB on Linux.
            count = file.readinto(target[done:])
            if not count:
                need = f"{len(target)} bytes at offset {offset}"
                self._refuse(f"needs {need}, found {done} bytes: it is truncated")
            done += count

    def _check_status(self, status: os.stat_result) -> None:
        if (status.st_size, status.st_mtime_ns) == (self.size, self.mtime_ns):
            return
        now = f"{status.st_size} bytes changed at {status.st_mtime_ns} ns"
        self._refuse(f"needs to stay {self.size} bytes changed at {self.mtime_ns} ns, found {now}")

    def _refuse(self, message: str) -> NoReturn:
        refuse(self.path.name, message)


class SafetensorsSource:
    """All tensors of a model: in one file, or in the files that an index names.

    Attributes:
        path: The file or the index.
        files: The files, in the order of their names.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads the headers.

        Args:
            path: A ``.safetensors`` file, a ``.safetensors.index.json``, or a folder that holds
                one model: one index and its files, or one file.

        Raises:
            OSError: A file cannot be read.
            ValueError: A file is malformed, or the files and the index contradict each other.
        """
        path = Path(path)
        self.path = _only_model(path) if path.is_dir() else path
        if self.path.name.endswith(".json"):
            index = _read_index(self.path)
            names = sorted(set(index.values()))
            self.files = [SafetensorsFile(self.path.parent / name) for name in names]
            self._number = {name: names.index(file) for name, file in index.items()}
            self._check_index()
        else:
            self.files = [SafetensorsFile(self.path)]
            self._number = dict.fromkeys(self.files[0].tensors, 0)

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._number)

    @property
    def bytes(self) -> int:
        """The size of all tensors together."""
        return sum(self.lookup(name)[1].bytes for name in self._number)

    def __contains__(self, name: object) -> bool:
        """Tells whether there is a tensor of that name."""
        return name in self._number

    def lookup(self, name: str) -> tuple[int, FileTensor]:
        """Returns the index of a tensor's file in ``files``, and where in it the tensor lies.

        Raises:
            ValueError: There is no such tensor.
        """
        number = self._number.get(name)
        if number is None:
            refuse(self.path.name, _no_tensor(name, self._number))
        return number, self.files[number].tensors[name]

    def load_tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Reads one tensor; see `SafetensorsFile.load_tensor`."""
        number, _ = self.lookup(name)
        return self.files[number].load_tensor(name, device)

    def check_unchanged(self) -> None:
        """Refuses files that changed; see `SafetensorsFile.check_unchanged`."""
        for file in self.files:
            file.check_unchanged()

    def _check_index(self) -> None:
        for name, number in self._number.items():
            file = self.files[number]
            if name not in file.tensors:
                found = f"{len(file.tensors)} others there"
                refuse(self.path.name, f"needs {name!r} in {file.path.name}, found {found}")


def _only_model(folder: Path) -> Path:
    found = sorted(entry.name for entry in folder.iterdir())
    indexes = [name for name in found if name.endswith(_INDEX_SUFFIX)]
    files = [name for name in found if name.endswith(".safetensors")]
    # With an index its files are part of it; any other one makes it unclear which is meant.
    if len(indexes) == 1:
        files = sorted(set(files) - set(_read_index(folder / indexes[0]).values()))
    models = indexes + files
    if len(models) != 1:
        needed = f"needs exactly one .safetensors file, or one {_INDEX_SUFFIX} and its files"
        listed = ", ".join(models[:5]) + (f" and {len(models) - 5} more" if models[5:] else "")
        refuse(folder.resolve().name, f"{needed}, found {listed or 'none'}")
    return folder / models[0]


def _read_index(path: Path) -> dict[str, str]:
    size = _size_of_regular(path)
    if size > _HEADER_MOST:
        refuse(path.name, f"needs at most {_HEADER_MOST} bytes of index, found {size} bytes")
    with open(path, "rb") as file:
        # No more than was checked, even if the file grows in between.
        index = json_object(file.read(size), path.name)
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        refuse(path.name, f"needs an object weight_map of tensor to file, found {shown(files)}")
    for name in files.values():
        # An index is a download: it may name files beside it and nothing else.
        if not isinstance(name, str) or not _is_beside(name):
            needed = "needs names of .safetensors files in its folder"
            refuse(path.name, f"{needed}, found {shown(name)}")
    return files


def _is_beside(name: str) -> bool:
    names = {PurePosixPath(name).name, PureWindowsPath(name).name}
    return names == {name} and name.endswith(".safetensors") and "\0" not in name


def _size_of_regular(path: Path) -> int:
    """Returns the size of a regular file; opening a pipe would wait for a writer for ever."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "something else"
        refuse(path.name, f"needs to be a file, found {kind}")
    return status.st_size


def _no_tensor(name: str, tensors: Collection[str]) -> str:
    near = difflib.get_close_matches(name, list(tensors), n=1)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    return f"needs a tensor {name!r}, found {len(tensors)} others{hint}"
