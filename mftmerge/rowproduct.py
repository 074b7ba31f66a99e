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
    out, columns = weight.shape
    result = torch.empty(len(x), out)
    where = torch.tensor([p.data_ptr() for p in packed])
    pairs = _pairs(where.tolist())
    values = None if dropped is None else dropped.data_ptr()
    product = _compiled(WIDTHS[weight.dtype], dropped is not None)

    def part(first: int, last: int) -> None:
        places = (x.data_ptr(), where.data_ptr(), pairs.data_ptr(), result.data_ptr(), weight.data_ptr(), values or 0)
        product(*places, columns // LANES, out, len(pairs), first, last)

    threads = torch.get_num_threads() if weight.numel() >= SMALL else 1
    edges = [out * i // threads for i in range(threads + 1)]
    others: list[Future[None]] = [_pool().submit(part, *pair) for pair in pairwise(edges[1:])]
    part(edges[0], edges[1])
    for future in others:
        future.result()
    return result


def _pairs(masks: list[int]) -> torch.Tensor:
    """Rows to take together, (n, 2): first row, and 1 if the next one, which has the same mask, goes with it."""
    found, row = [], 0
    while row < len(masks):
        together = row + 1 < len(masks) and masks[row] == masks[row + 1]
        found.append([row, int(together)])
        row += 1 + together
    return torch.tensor(found, dtype=torch.int64).view(-1, 2)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), "mftmerge-rows")


@cache
def _compiled(width: int, with_dropped: bool) -> Callable[..., None]:
    """The loop over the outputs [first, last) and all rows, for weights of `width` bytes. Takes addresses.

    Two rows under one mask go together, which shares the work on the bits.
    """
    import numba

    dot, dots = _masked_dot(width, with_dropped, 1), _masked_dot(width, with_dropped, 2)
    number = _number()

    @numba.njit("void(" + "int64," * 10 + "int64)", nogil=True)
    def product(x, bits, pairs, y, weight, dropped, words, out, count, first, last):  # type: ignore[no-untyped-def]
        stride = words * 32
        for i in range(first, last):
            w, d, at = weight + i * stride * width, dropped + i * stride * width, i * words * 4
            for pair in range(count):  # the matrix's row i stays in the first cache meanwhile
                r, together = number(pairs + pair * 16), number(pairs + pair * 16 + 8)
                mask = number(bits + r * 8) + at
                if together:
                    dots(w, d, x + r * stride * 4, mask, y + (r * out + i) * 4, words, out)
                else:
                    dot(w, d, x + r * stride * 4, mask, y + (r * out + i) * 4, words, out)

    return product


def _number() -> Any:  # a numba intrinsic
    """The 64-bit number at an address."""
    from llvmlite import ir
    from numba.core import types
    from numba.extending import intrinsic

    def codegen(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.load(builder.inttoptr(given[0], ir.IntType(64).as_pointer()))

    @intrinsic
    def number(typing: Any, address: Any) -> Any:
        return types.int64(address), codegen

    return number


def _masked_dot(width: int, with_dropped: bool, rows: int) -> Any:  # a numba intrinsic
    """`*y = sum of (bit ? weight : dropped or 0) * x` over `words` x 32 elements, written as vector instructions.

    rows: of x, one after the other, under the same bits; their results stand `out` elements apart. Each row's sum is
    taken in the same order, whatever their number.
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
        weight, dropped, x, mask, y, words, out = given
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

        totals = [cgutils.alloca_once_value(builder, zeros) for _ in range(rows)]
        with cgutils.for_range(builder, words) as loop:
            kept = builder.bitcast(load(mask, i32, loop.index, 1), ir.VectorType(ir.IntType(1), LANES))
            otherwise = floating(dropped, loop.index) if with_dropped else zeros
            chosen = builder.select(kept, floating(weight, loop.index), otherwise)
            for row, total in enumerate(totals):
                index = builder.add(loop.index, builder.mul(words, ir.Constant(i64, row)))
                product = builder.call(fma, [chosen, load(x, floats, index, 4), builder.load(total)])
                builder.store(product, total)
        for row, total in enumerate(totals):
            summed = builder.call(add, [ir.Constant(f32, -0.0), builder.load(total)], fastmath=("reassoc",))
            place = builder.add(y, builder.mul(out, ir.Constant(i64, 4 * row)))
            builder.store(summed, builder.inttoptr(place, f32.as_pointer()))
        return context.get_dummy_value()

    @intrinsic
    def dot(typing: Any, weight: Any, dropped: Any, x: Any, mask: Any, y: Any, words: Any, out: Any) -> Any:
        return types.void(weight, dropped, x, mask, y, words, out), codegen

    return dot
