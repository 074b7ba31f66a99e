"""Matrix products in which every row of the input has a mask of its own, read from the packed bits.

A compiled loop (numba, of the extra `serve`): each weight is loaded once and, for each row, kept or dropped as its bit
says; no masked copy of the matrix exists. For few rows only: each costs as much as reading the matrix from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch

LANES = 32  # weights at a time: one word of bits
SMALL = 1 << 18  # products of fewer weights are not worth a second thread
WIDTHS = {torch.float32: 4, torch.bfloat16: 2}


def possible(weight: torch.Tensor) -> bool:
    """Whether `row_product` takes this matrix, and numba is here."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in WIDTHS
        and weight.dim() == 2
        and weight.shape[1] % LANES == 0
        and find_spec("numba") is not None
    )


def row_product(
    x: torch.Tensor, weight: torch.Tensor, packed: Sequence[torch.Tensor], dropped: torch.Tensor | None
) -> torch.Tensor:
    """float32 (rows, out): row r is `weight`, masked with packed[r], times x[r].

    x: (rows, in). weight: (out, in), for which `possible` holds. packed: for each row the bits of its mask over the
    weight, element i being bit i % 8 of byte i // 8. dropped: values that dropped weights take, like `weight`; None: 0.
    Sums are of float32, in an order that depends on `in` alone: not on the other rows.
    """
    x = x.float().contiguous()
    rows, (out, columns) = len(x), weight.shape
    result = torch.empty(rows, out)
    where = torch.tensor([p.data_ptr() for p in packed])
    values = None if dropped is None else dropped.data_ptr()
    product = _compiled(WIDTHS[weight.dtype], dropped is not None)

    def part(first: int, last: int) -> None:
        numbers = (weight.data_ptr(), values or 0, columns // LANES, out, rows, first, last)
        product(x.data_ptr(), where.data_ptr(), result.data_ptr(), *numbers)

    threads = torch.get_num_threads() if weight.numel() >= SMALL else 1
    edges = [out * i // threads for i in range(threads + 1)]
    others: list[Future[None]] = [_pool().submit(part, *pair) for pair in pairwise(edges[1:])]
    part(edges[0], edges[1])
    for future in others:
        future.result()
    return result


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), "mftmerge-rows")


@cache
def _compiled(width: int, with_dropped: bool) -> Callable[..., None]:
    """The loop over the outputs [first, last) and all rows, for weights of `width` bytes. Takes addresses."""
    import numba

    dot = _masked_dot(width, with_dropped)

    @numba.njit("void(" + "int64," * 9 + "int64)", nogil=True)
    def product(x, bits, y, weight, dropped, words, out, rows, first, last):  # type: ignore[no-untyped-def]
        stride = words * 32
        for i in range(first, last):
            for r in range(rows):  # the matrix's row i stays in the first cache meanwhile
                dot(
                    weight + i * stride * width,
                    dropped + i * stride * width,
                    x + r * stride * 4,
                    bits + r * 8,
                    i * words * 4,
                    y + (r * out + i) * 4,
                    words,
                )

    return product  # type: ignore[no-any-return]


def _masked_dot(width: int, with_dropped: bool) -> Any:  # a numba intrinsic
    """`*y = sum of (bit ? weight : dropped or 0) * x` over `words` x 32 elements, written as vector instructions.

    In LLVM's language because the loop written in Python is not turned into vectors: there an integer of 32 bits is a
    vector of 32 booleans, which is the whole trick. Any processor that LLVM knows runs it.
    """
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.extending import intrinsic

    f32, i16, i32, i64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
    floats, integers = ir.VectorType(f32, LANES), ir.VectorType(i32, LANES)
    stored = ir.VectorType(i16 if width == 2 else i32, LANES)
    zeros = ir.Constant(floats, [0.0] * LANES)

    def codegen(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        weight, dropped, x, bits, at, y, words = given
        module = builder.module
        fma = cgutils.get_or_insert_function(module, ir.FunctionType(floats, [floats] * 3), f"llvm.fma.v{LANES}f32")
        add = cgutils.get_or_insert_function(
            module, ir.FunctionType(f32, [f32, floats]), f"llvm.vector.reduce.fadd.v{LANES}f32"
        )

        def load(address: Any, kind: Any, index: Any, align: int) -> Any:
            value = builder.load(builder.gep(builder.inttoptr(address, kind.as_pointer()), [index]))
            value.align = align  # tensors need not lie at multiples of a vector's size
            return value

        def floating(address: Any, index: Any) -> Any:
            raw = load(address, stored, index, width)
            if width == 2:  # bfloat16 is the upper half of a float32
                raw = builder.shl(builder.zext(raw, integers), ir.Constant(integers, [16] * LANES))
            return builder.bitcast(raw, floats)

        mask = builder.add(load(bits, i64, ir.Constant(i64, 0), 8), at)
        total = cgutils.alloca_once_value(builder, zeros)
        with cgutils.for_range(builder, words) as loop:
            kept = builder.bitcast(load(mask, i32, loop.index, 1), ir.VectorType(ir.IntType(1), LANES))
            otherwise = floating(dropped, loop.index) if with_dropped else zeros
            chosen = builder.select(kept, floating(weight, loop.index), otherwise)
            row = load(x, floats, loop.index, 4)
            builder.store(builder.call(fma, [chosen, row, builder.load(total)]), total)
        summed = builder.call(add, [ir.Constant(f32, -0.0), builder.load(total)], fastmath=("reassoc",))
        builder.store(summed, builder.inttoptr(y, f32.as_pointer()))
        return context.get_dummy_value()

    @intrinsic
    def dot(typing: Any, weight: Any, dropped: Any, x: Any, bits: Any, at: Any, y: Any, words: Any) -> Any:
        return types.void(weight, dropped, x, bits, at, y, words), codegen

    return dot
