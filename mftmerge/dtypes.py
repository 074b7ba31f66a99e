"""THE table of tensor types: safetensors code, torch's name, bits an element, kind. Imports numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from mftmerge.errors import BadInput

if TYPE_CHECKING:
    import torch

INTEGERS: dict[int, type[np.unsignedinteger[Any]]] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@dataclass(frozen=True, slots=True)
class Dtype:
    """One type. code: as safetensors files write it. name: torch's, or None where torch has none for whole elements.

    bits: of one element. kind: "float", "int", "bool" or "complex".
    """

    code: str
    name: str | None
    bits: int
    kind: Literal["float", "int", "bool", "complex"] = "float"

    @property
    def floating(self) -> bool:
        """Whether elements are real floating point numbers, so that one may be dropped by making its bits 0."""
        return self.kind == "float"

    @property
    def integer(self) -> type[np.unsignedinteger[Any]] | None:
        """numpy's unsigned integer of the same width, under which weights are moved bit for bit; None below a byte."""
        return INTEGERS.get(self.bits)

    @property
    def nbytes(self) -> int:
        """Bytes an element; types below a byte, which can be copied only whole, raise BadInput."""
        if self.bits % 8:
            raise BadInput(f"elements of dtype {self.code} are not bytes")
        return self.bits // 8

    @property
    def torch(self) -> torch.dtype:
        """torch's type. Raises BadInput where it has none."""
        import torch

        found = getattr(torch, self.name) if self.name else None
        if not isinstance(found, torch.dtype):
            raise BadInput(f"torch {torch.__version__} has no dtype {self.code}")
        return found


BY_CODE: dict[str, Dtype] = {
    d.code: d
    for d in (
        Dtype("F64", "float64", 64),
        Dtype("F32", "float32", 32),
        Dtype("F16", "float16", 16),
        Dtype("BF16", "bfloat16", 16),
        Dtype("F8_E4M3", "float8_e4m3fn", 8),
        Dtype("F8_E5M2", "float8_e5m2", 8),
        Dtype("F8_E8M0", "float8_e8m0fnu", 8),
        Dtype("F8_E4M3FNUZ", "float8_e4m3fnuz", 8),
        Dtype("F8_E5M2FNUZ", "float8_e5m2fnuz", 8),
        Dtype("F6_E2M3", None, 6),
        Dtype("F6_E3M2", None, 6),
        Dtype("F4", None, 4),
        Dtype("F4_E2M1", None, 4),
        Dtype("C64", "complex64", 64, "complex"),
        Dtype("I64", "int64", 64, "int"),
        Dtype("I32", "int32", 32, "int"),
        Dtype("I16", "int16", 16, "int"),
        Dtype("I8", "int8", 8, "int"),
        Dtype("U64", "uint64", 64, "int"),
        Dtype("U32", "uint32", 32, "int"),
        Dtype("U16", "uint16", 16, "int"),
        Dtype("U8", "uint8", 8, "int"),
        Dtype("BOOL", "bool", 8, "bool"),
    )
}
BY_NAME: dict[str, Dtype] = {d.name: d for d in BY_CODE.values() if d.name}
# Types that numpy has, under the same names.
_NUMPY = {n for n, d in BY_NAME.items() if n in np.sctypeDict and d.kind != "complex"}


def named(name: str) -> Dtype:
    """The type that torch, recipes and config.json call `name` ("bfloat16"). Raises BadInput for an unknown one."""
    if name not in BY_NAME:
        raise BadInput(f"unknown dtype {name!r}; there are {', '.join(n for n, d in BY_NAME.items() if d.floating)}")
    return BY_NAME[name]


def of_torch(dtype: torch.dtype) -> Dtype:
    """The table's entry for a torch type. Raises BadInput for one that a checkpoint cannot store."""
    return named(str(dtype).removeprefix("torch."))


def integer_view(tensor: torch.Tensor) -> torch.Tensor:
    """A torch tensor's own memory as integers of its width (torch's integers: signed above a byte), no copy."""
    import torch

    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(width[tensor.element_size()])


def to_float32(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Values of an integer view (any shape) as float32; `dtype` is the safetensors code.

    Exact except for F64 and integers above 2^24. Raises BadInput for complex numbers and types below a byte.
    """
    if dtype == "BF16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype in ("F8_E4M3", "F8_E5M2", "F8_E8M0"):
        table: npt.NDArray[np.float32] = _fp8_table(dtype)[array]
        return table
    if dtype == "BOOL":  # by its bytes: numpy would read any byte but 0 as True, and a damaged mask as a sound one
        return array.astype(np.float32)
    found = BY_CODE.get(dtype)
    if found is not None and found.name in _NUMPY:
        return np.ascontiguousarray(array).view(found.name).astype(np.float32, copy=False)
    raise BadInput(f"values of dtype {dtype} cannot be turned into float32")


@cache
def _fp8_table(dtype: str) -> npt.NDArray[np.float32]:
    """float32 value of each byte, by the OCP 8-bit floating point formats."""
    byte = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":  # the upper half of an IEEE half float
        return (byte << 8).view(np.float16).astype(np.float32)
    if dtype == "F8_E8M0":  # a bare exponent; 255 is NaN
        return np.where(byte == 255, np.nan, np.ldexp(1.0, byte.astype(np.int32) - 127)).astype(np.float32)
    exponent, mantissa = (byte >> 3 & 15).astype(np.int32), (byte & 7).astype(np.float64)
    magnitude = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), np.ldexp(1 + mantissa / 8, exponent - 7))
    magnitude = np.where((byte & 127) == 127, np.nan, magnitude)  # E4M3 has no infinities and one NaN a sign
    return np.where(byte >= 128, -magnitude, magnitude).astype(np.float32)
