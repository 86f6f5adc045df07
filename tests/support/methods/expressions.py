"""Random merge methods over the public vocabulary, and inputs that are hard for them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mergeloom.methods import (
    Array,
    Inputs,
    add,
    clamp,
    exp,
    host,
    log,
    maximum,
    mean,
    minimum,
    sign,
    single,
    sqrt,
    where,
    wide,
)
from mergeloom.methods.kernel.decoder import block_max, next_power_of_two, rounded
from mergeloom.methods.kernel.expression import Extent
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.method import traced
from mergeloom.methods.kernel.spec import InputSpec
from tests.support.methods.kernels import kernel_of, method_of

SHAPES = ((300, 128), (83, 517), (70, 4, 128), (1 << 16,), (40, 4096), (40_001, 1), (6, 7), (1, 1), (5,), ())
"""Most have several blocks; those of powers of two have several tiles for any method."""

CONSTANTS = (0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 0.1, -3.7, 1e-3, 1e30, 1e-50, 7)

FUNCTIONS: Sequence[Callable[..., float]] = (
    lambda *values: sum(values),
    lambda *values: math.sqrt(abs(values[0])),
    lambda *values: values[0] / values[-1] if values[-1] else 1.0,
    lambda *values: math.atan(max(values)),
    lambda *values: math.fsum(math.copysign(1.0, value) for value in values),
)


def random_kernel(seed: int, count: int, base: int | None, shape: tuple[int, ...]) -> Kernel:
    """The kernel of a random method."""
    return kernel_of(lambda t: Expressions(random.Random(seed), t).element(4), count, base, shape)


def random_block_kernel(seed: int, count: int, shape: tuple[int, ...]) -> Kernel:
    """The kernel of a random function of an encoder, with an output per element and two per block."""

    def function(t: Inputs) -> Any:
        draw = random.Random(seed)
        expressions = Expressions(draw, t, ((4, 16), (7, 30), (128, 128)))
        first = expressions.element(3)
        return first * 1.0, expressions.block(2), expressions.block(1)

    spec = InputSpec(count, None, shape)
    inputs = Inputs(spec)
    nodes = traced("random blocks", function, [inputs], {}, inputs.trace, 3)
    return Kernel(spec, nodes, (method_of(function), {}))


def hard_inputs(seed: int, count: int, shape: tuple[int, ...], *, finite: bool) -> list[torch.Tensor]:
    """Inputs with ties, zeros of both signs, subnormal and huge numbers, and if wanted NaNs and infinities."""
    generator = np.random.default_rng(seed)
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    chosen = generator.choice(4 if seed % 4 == 0 else 3, size=count)
    made = []
    for number in chosen:
        values = generator.standard_normal(shape) * 2.0 ** generator.integers(-6, 3)
        if generator.random() < 0.5:
            values = np.round(values * 4) / 4
        scales = generator.choice([1.0, 0.0, -0.0, 2.0**-140, 2.0**100], size=shape, p=[0.9, 0.05, 0.03, 0.01, 0.01])
        tensor = torch.from_numpy(np.array(values * scales)).to(dtypes[number])
        if dtypes[number] is torch.float16:
            tensor = tensor.nan_to_num(nan=0.0, posinf=60_000.0, neginf=-60_000.0)
        if not finite:
            flat = tensor.view(-1)
            for value in (math.inf, -math.inf, math.nan):
                flat[torch.from_numpy(generator.random(flat.numel()) < 2.0 / max(4, flat.numel()))] = value
            _set_payloads(flat)
        made.append(tensor)
    return made


def _set_payloads(flat: torch.Tensor) -> None:
    """Give every second NaN another payload and the other sign."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    places = flat.isnan().nonzero()[::2, 0]
    flat.view(integers)[places] |= 1 - (1 << (8 * flat.element_size() - 1)) + 1


class Expressions:
    """Draws expressions. The depth bounds the number of operations between an input and the result.

    Args:
        draw: source of random choices.
        t: inputs.
        blocks: rows and columns of the blocks that there are maxima of; none if empty.
    """

    def __init__(self, draw: random.Random, t: Inputs, blocks: Sequence[tuple[int, int]] = ()) -> None:
        self.draw = draw
        self.t = t
        self.blocks = blocks

    def choose(self, *options: Callable[[], Any]) -> Any:
        """The result of one of the functions."""
        return self.draw.choice(options)()

    # --- one value per element ---------------------------------------------------------------------------------------

    def element(self, depth: int) -> Array:
        """An array with one number per element."""
        t, d = self.t, depth - 1
        if depth <= 0:
            return self.leaf()
        return self.choose(  # type: ignore[no-any-return]
            lambda: self.arithmetic(self.element(d), self.any(d)),
            lambda: self.arithmetic(self.element(d), self.any(d)),
            lambda: self.arithmetic(self.any(d), self.element(d)),
            lambda: self.extreme(self.element(d), self.any(d)),
            lambda: self.extreme(self.any(d), self.element(d)),
            lambda: self.unary(self.element(d)),
            lambda: self.unary(self.element(d)),
            lambda: where(self.flag(d), self.any(d), self.element(d)),
            lambda: where(self.flag(d), self.element(d), self.any(d)),
            lambda: self.arithmetic(self.element(d), self.flag(d)),
            lambda: self.arithmetic(self.row(d), self.column(d)) + self.leaf(),
            lambda: add([self.element(d), self.any(d), self.leaf()]),
            lambda: mean([self.element(d), self.leaf(), self.leaf()]),
            lambda: t.row_rank(self.whole(d)),
            lambda: clamp(self.element(d), self.draw.choice(CONSTANTS), self.scalar(d)),
        )

    def whole(self, depth: int) -> Array:
        """As `element`, also where a factor of 0 leaves an expression with one value per row or column."""
        x = self.element(depth)
        return x + self.leaf() if x.node.extent in (Extent.ROW, Extent.COLUMN) else x

    def leaf(self) -> Array:
        """An input, random numbers or the index."""
        t, model = self.t, self.draw.choice(self.t.models)
        return self.draw.choice([model, model, model, t.origin + model, t.uniform(model), t.index * 0.25 + model])

    def any(self, depth: int) -> Any:
        """A number, or one number per tensor, row, column or element."""
        return self.choose(
            lambda: self.draw.choice(CONSTANTS),
            lambda: self.scalar(depth),
            lambda: self.row(depth),
            lambda: self.column(depth),
            lambda: self.element(depth),
            lambda: self.block(depth) if self.blocks else self.element(depth),
        )

    def flag(self, depth: int) -> Array:
        """A comparison with any extent."""
        d = depth - 1
        if depth <= 0:
            return self.compare(self.leaf(), self.draw.choice(CONSTANTS))
        return self.choose(  # type: ignore[no-any-return]
            lambda: self.compare(self.element(d), self.any(d)),
            lambda: self.compare(self.row(d), self.any(d)),
            lambda: self.compare(self.column(d), self.any(d)),
            lambda: self.compare(self.scalar(d), self.any(d)),
            lambda: self.flag(d) & self.flag(d),
            lambda: self.flag(d) | self.flag(d),
            lambda: ~self.flag(d),
            lambda: self.largest(self.whole(d)),
            lambda: self.largest(self.leaf()) & ~self.largest(self.leaf()),
        )

    def largest(self, x: Array) -> Array:
        """A selection."""
        if self.draw.random() < 0.5:
            return self.t.largest(x, share=self.draw.choice([0.0, 0.1, 0.37, 0.9, 1.0]))
        return self.t.largest(x, int(self.draw.choice([0.0, 0.01, 0.5, 0.8, 0.97, 1.0]) * self.t.size))

    # --- operations on any extent ------------------------------------------------------------------------------------

    def arithmetic(self, a: Any, b: Any) -> Array:
        """A binary operation on numbers."""
        return self.choose(lambda: a + b, lambda: a - b, lambda: a * b, lambda: a / b)  # type: ignore[no-any-return]

    def extreme(self, a: Any, b: Any) -> Array:
        """The minimum or the maximum."""
        return self.draw.choice([minimum, maximum])(a, b)

    def unary(self, x: Array) -> Array:
        """A function of one operand."""
        return self.draw.choice([abs, lambda y: -y, sqrt, lambda y: sqrt(abs(y)), sign, exp, log, wide, single])(x)

    def compare(self, a: Array, b: Any) -> Array:
        """A comparison."""
        return self.choose(  # type: ignore[no-any-return]
            lambda: a > b, lambda: a >= b, lambda: a < b, lambda: a <= b, lambda: a == b, lambda: a != b
        )

    def called(self, arguments: Sequence[Array]) -> Array:
        """The result, or one of two results, of a Python function."""
        function = self.draw.choice(FUNCTIONS)
        if self.draw.random() < 0.5:
            return host(function, *arguments)  # type: ignore[no-any-return]
        results = host(lambda values: [function(*values), values[0]], list(arguments), outputs=2)
        return self.draw.choice(results)  # type: ignore[no-any-return]

    # --- one value per tensor, row or column -------------------------------------------------------------------------

    def scalar(self, depth: int) -> Array:
        """A number that is known after a pass."""
        t, d = self.t, depth - 1
        if depth <= 0:
            return t.sum(self.leaf())
        return self.choose(  # type: ignore[no-any-return]
            lambda: t.sum(self.whole(d)),
            lambda: t.sum(self.whole(d) * self.leaf()),
            lambda: t.count(self.compare(self.whole(d), self.element(d))),
            lambda: t.count(self.largest(self.whole(d))),
            lambda: t.kth_largest(self.whole(d), self.draw.randint(1, t.size)),
            lambda: self.called([self.scalar(d), t.sum(self.leaf())]),
            lambda: self.arithmetic(self.scalar(d), self.draw.choice(CONSTANTS)),
            lambda: self.unary(self.scalar(d)),
            lambda: where(self.compare(self.scalar(d), 0.5), self.scalar(0), self.draw.choice(CONSTANTS)),
        )

    def row(self, depth: int) -> Array:
        """One number per row."""
        t, d = self.t, depth - 1
        if depth <= 0:
            return t.row_sum(self.leaf())
        return self.choose(  # type: ignore[no-any-return]
            lambda: t.row_sum(self.whole(d)),
            lambda: t.row_max(self.whole(d)),
            lambda: self.arithmetic(self.row(d), self.draw.choice([self.draw.choice(CONSTANTS), self.row(0)])),
            lambda: self.arithmetic(self.scalar(d), self.row(d)),
            lambda: self.extreme(self.row(d), self.row(0)),
            lambda: self.unary(self.row(d)),
            lambda: self.called([self.row(d), t.row_max(self.leaf())]),
            lambda: self.called([self.row(d), self.scalar(d)]),
            lambda: where(self.compare(self.row(d), 0.5), self.row(0), self.scalar(d)),
        )

    def block(self, depth: int) -> Array:
        """One number per block."""
        d, (rows, columns) = depth - 1, self.draw.choice(self.blocks)
        if depth <= 0:
            return block_max(self.leaf(), rows, columns)
        largest = block_max(self.whole(d), rows, columns)
        other = block_max(self.leaf(), rows, columns)
        return self.choose(  # type: ignore[no-any-return]
            lambda: largest,
            lambda: self.arithmetic(largest, self.draw.choice([self.draw.choice(CONSTANTS), other])),
            lambda: self.arithmetic(self.scalar(d), largest),
            lambda: self.extreme(largest, other),
            lambda: next_power_of_two(self.unary(largest)),
            lambda: rounded(self.unary(largest), "bfloat16"),
            lambda: where(self.compare(largest, 0.5), other, self.scalar(d)),
            lambda: largest * self.compare(largest, other) + other,
        )

    def column(self, depth: int) -> Array:
        """One number per index of the dimensions after the first."""
        t, d = self.t, depth - 1
        if depth <= 0:
            return t.column_sum(self.leaf())
        return self.choose(  # type: ignore[no-any-return]
            lambda: t.column_sum(self.whole(d)),
            lambda: t.column_sum(wide(self.leaf())) - t.column_sum(wide(self.leaf()) * self.leaf()),
            lambda: self.arithmetic(self.column(d), self.draw.choice([self.draw.choice(CONSTANTS), self.column(0)])),
            lambda: self.arithmetic(self.scalar(d), self.column(d)),
            lambda: self.extreme(self.column(d), self.column(0)),
            lambda: self.unary(self.column(d)),
            lambda: self.called([self.column(d), t.column_sum(self.leaf())]),
            lambda: self.called([self.column(d), self.scalar(d)]),
            lambda: where(self.compare(self.column(d), 0.5), self.column(0), self.scalar(d)),
        )
