"""Header of a GGUF file, walked by its lengths alone. Source: ggml, docs/gguf.md (versions 2 and 3)."""

import mmap
import struct
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

_ALIGNMENT = 32  # of the tensors' data, where the key general.alignment does not set another
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type of a value -> its bytes
_UINT32, _STRING, _ARRAY = 4, 8, 9


def count_tensors(file: Path) -> int:
    """Return the number of tensors in a GGUF file, after a check that the file is as long as its header declares.

    transformers imports its readers itself, and neither its own nor that of the package gguf checks this. Past the end
    of the file they read one empty value after the other: a file of 100 bytes can keep them busy for years.

    Raises:
        ImportError: If the package gguf, which has the sizes of the types of tensors, is not installed.
        OSError, ValueError: If the file cannot be read, or is not such a file.
    """
    gguf: Any = import_module("gguf")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _Cursor(data)
        tensors, keys = header.start()
        alignment = _ALIGNMENT
        for _ in range(keys):
            name, (kind,) = header.text(), header.numbers("I")
            if name == b"general.alignment" and kind == _UINT32:
                alignment = max(1, *header.numbers("I"))
            else:
                header.skip_value(kind)
        ends = [0]  # of the tensors' data, counted from where it begins
        for _ in range(tensors):
            header.text()
            (dimensions,) = header.numbers("I")
            shape = header.numbers(f"{dimensions}Q")
            kind, start = header.numbers("IQ")
            elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]  # of a block
            ends.append(start + prod(shape) * size // elements)
        begin = -(-header.position // alignment) * alignment
        header.check(begin + max(ends) - header.position if tensors else 0)
        return tensors


class _Cursor:
    """Position in the bytes of a GGUF file, which never passes their end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._order = "<"
        self.position = 0

    def start(self) -> tuple[int, int]:
        """Read the first fields and return the numbers of tensors and of keys."""
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.position = 4
        (version,) = self.numbers("I")
        if version & 0xFFFF == 0:  # written with the largest byte first
            self._order, self.position = ">", 4
            (version,) = self.numbers("I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, not 2 or 3")
        tensors, keys = self.numbers("QQ")
        return tensors, keys

    def check(self, size: int) -> None:
        """Raise ValueError if fewer than ``size`` bytes are left."""
        if self.position + size > len(self._data):
            raise ValueError("the file ends before the data that it declares")

    def skip(self, size: int) -> None:
        self.check(size)
        self.position += size

    def numbers(self, kinds: str) -> tuple[int, ...]:
        """Read whole numbers of these kinds, which are letters of the module struct."""
        start = self.position
        self.skip(struct.calcsize(self._order + kinds))
        return struct.unpack_from(self._order + kinds, self._data, start)

    def text(self) -> bytes:
        (length,) = self.numbers("Q")
        self.skip(length)
        return self._data[self.position - length : self.position]

    def skip_value(self, kind: int) -> None:
        """Skip a value of a type."""
        if kind in _WIDTHS:
            self.skip(_WIDTHS[kind])
        elif kind == _STRING:
            self.skip(*self.numbers("Q"))
        elif kind == _ARRAY:
            kind, count = self.numbers("IQ")
            if kind in _WIDTHS:
                self.skip(_WIDTHS[kind] * count)
            else:
                for _ in range(count):  # each takes bytes, so that the end of the file ends this
                    self.skip_value(kind)
        else:
            raise ValueError(f"it holds a value of the unknown type {kind}")
