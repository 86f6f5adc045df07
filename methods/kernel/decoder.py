"""Decoders: functions that compute a value from its stored parts, such as the codes and scales of a quantized tensor.

    FP8_BLOCKS = Decoder("fp8 blocks", lambda codes, scales: codes * scales)

A decoder is written in the vocabulary of merge methods. Its parts are arrays of the value's shape, whichever elements
of them an access takes; the factors of a low-rank product are the exception, see `low_rank`. Reductions and random
numbers need the inputs of a method, so a decoder has none, and a composition inlines it into a method's loops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .kernel import Kernel
from .language import Inputs, low_rank
from .method import traced
from .spec import InputSpec

__all__ = ["Decoder", "low_rank"]


@dataclass(frozen=True, slots=True)
class Decoder:
    """A function from parts to a value.

    Args:
        name: name of the format, for error messages.
        function: ``function(*parts, **parameters)`` returns the value as an `Array`.
    """

    name: str
    function: Callable[..., Any]

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
        output = traced(f"decoder {self.name}", self.function, symbolic.inputs, parameters, symbolic.trace)
        return Kernel(inputs, output, (self, dict(parameters)))
