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

from .kernel import Kernel
from .language import Inputs, block_max, low_rank, next_power_of_two, rounded
from .method import traced
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
    """

    name: str
    function: Callable[..., Any]
    count: int

    def kernel(self, inputs: InputSpec, parameters: Mapping[str, Any]) -> Kernel:
        """Trace the encoder for one value, which is the only input; see `Decoder.kernel`."""
        inputs = replace(inputs, base=None)
        symbolic = Inputs(inputs)
        name, count = f"encoder {self.name}", self.count
        outputs = traced(name, self.function, symbolic.inputs, parameters, symbolic.trace, count)
        return Kernel(inputs, outputs, (self, dict(parameters)))
