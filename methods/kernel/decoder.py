"""Decoders compute a value from its stored parts, such as the codes and scales of a quantized tensor; encoders do the
reverse.

    FP8_BLOCKS = Decoder("fp8 blocks", lambda codes, scales: codes * scales)

A decoder is written in the vocabulary of merge methods. Its parts are arrays of the value's shape, whichever elements
of them an access takes; the factors of a low-rank product are the exception, see `low_rank`. A composition inlines a
decoder into a method's loops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .array import Array
from .expression import Node
from .kernel import Kernel
from .language import Inputs, block_max, low_rank, next_power_of_two, rounded, single
from .method import traced
from .reduction.reductions import StripSum
from .reduction.survival import survival_sums
from .spec import InputSpec

__all__ = ["Decoder", "Encoder", "block_max", "low_rank", "next_power_of_two", "rounded"]


@dataclass(frozen=True, slots=True)
class Decoder:
    """A function from parts to a value.

    Args:
        name: name of the format, for error messages.
        function: ``function(*parts, **parameters)`` returns the value as an `Array`.
        reduces: whether the function takes `Inputs` before the parts, for their reductions.
    """

    name: str
    function: Callable[..., Any]
    reduces: bool = False

    def kernel(self, inputs: InputSpec, parameters: Mapping[str, Any]) -> Kernel:
        """Trace the decoder for the parts of one value.

        Args:
            inputs: parts, with their accesses and shapes; the base is ignored.
            parameters: numbers that the tensor's format or adapter gives, such as a scale; not those of a recipe.

        Raises:
            MethodDefinitionError: the decoder uses an operation that does not exist, or returns no array.
        """
        inputs = replace(inputs, base=None)
        symbolic = Inputs(inputs)
        given = [symbolic, *symbolic.inputs] if self.reduces else symbolic.inputs
        outputs = traced(f"decoder {self.name}", self.function, given, parameters, symbolic.trace)
        return Kernel(inputs, outputs, (self, dict(parameters)))


@dataclass(frozen=True, slots=True)
class Encoder:
    """A function from a value to the numbers of several tensors that are stored in its place.

    Args:
        name: name of the format, for error messages.
        function: ``function(value, **parameters)`` returns an `Array` for each tensor, as a tuple if there are several.
            The first tensor has the value's shape. One that is computed from maxima of blocks alone, see `block_max`,
            has one element for each block.
        count: number of tensors.
        decode: function from the arrays of all tensors to the value that a reader computes from them; None if the
            encoder is never compared with a base.
    """

    name: str
    function: Callable[..., Any]
    count: int
    decode: Callable[..., Array] | None = None

    def kernel(self, inputs: InputSpec, parameters: Mapping[str, Any]) -> Kernel:
        """Trace the encoder; see `Decoder.kernel`.

        Args:
            inputs: the value, and the base's if it is to be compared with what is stored; see `survival`.
            parameters: numbers that the format gives.
        """
        inputs = replace(inputs, base=None)
        symbolic = Inputs(inputs)
        value, *bases = symbolic.inputs
        name, count, trace = f"encoder {self.name}", self.count, symbolic.trace
        outputs = traced(name, self.function, [value], parameters, trace, count)
        sums: tuple[Node, ...] = ()
        if bases and self.decode is not None:
            stored = self.decode(*(Array(node, trace) for node in outputs))
            sums = survival_sums(trace, single(value).node, stored.node, bases[0].node, StripSum)
        return Kernel(inputs, outputs, (self, dict(parameters)), byproducts=sums)
