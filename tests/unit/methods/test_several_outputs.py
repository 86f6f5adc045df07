"""Kernels that compute several tensors at once: each has the oracle's bytes and dtype, and is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mergeloom.methods import sign, where
from mergeloom.methods.kernel.composition import Composition, Part
from mergeloom.methods.kernel.decoder import Encoder
from mergeloom.methods.kernel.expression import MethodDefinitionError
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.spec import BLOCK, InputSpec
from tests.support.methods import oracle
from tests.support.methods.kernels import run_fused, run_kernel
from tests.support.methods.stored import KEY, KINDS, Maker, merged

SHAPE = (300, 260)
HALVES = Encoder("halves", lambda x: (0.5 * x, sign(x), x), 3)
METHODS: dict[str, tuple[int | None, dict[str, Any]]] = {
    "linear": (None, {"weight": (0.7, 0.4)}),
    "slerp": (0, {"t": 0.3}),
    "della": (0, {"weight": (0.0, 1.0), "density": (1.0, 0.4), "epsilon": (0.0, 0.1)}),
}


def encoded(method: str, encoder: Encoder, shape: tuple[int, ...]) -> tuple[Composition, list[Tensor]]:
    """A merge of two models, encoded."""
    models = [KINDS[kind](Maker(1, shape)) for kind in ("fp8_blocks", "adapted")]
    base, parameters = METHODS[method]
    kernel, parts = merged(method, models, shape, parameters, base)
    last = Part(encoder.kernel(InputSpec(1, None, shape), {}), (~(len(kernel.parts) - 1),))
    return Composition(kernel.inputs, [*kernel.parts, last]), parts


def assert_same(kernel: Kernel, parts: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> None:
    """The outputs have the oracle's bytes for each length of chunks and tiles, within the declared memory."""
    wanted = oracle.evaluate_all(kernel, parts, key=KEY)
    assert len(wanted) == len(dtypes)
    stored = [oracle.stored(values, dtype) for values, dtype in zip(wanted, dtypes, strict=True)]
    for length, threads in ((None, 1), (1, 2), (3 * BLOCK, 1)):
        assert run_fused(kernel, parts, length, out=dtypes, key=KEY, threads=threads).outputs == stored
        run = run_kernel(kernel, parts, length, key=KEY)
        assert [values.numpy().tobytes() for values in run.outputs] == [values.tobytes() for values in wanted]
        assert run.used <= run.declared


@pytest.mark.parametrize("method", METHODS)
def test_each_output_has_its_dtype(method: str) -> None:
    kernel, parts = encoded(method, HALVES, SHAPE)
    assert len(kernel.outputs) == 3
    assert kernel.output is kernel.outputs[0]
    assert_same(kernel, parts, (torch.bfloat16, torch.float8_e4m3fn, torch.float32))


def test_many_outputs_and_equal_ones() -> None:
    encoder = Encoder("many", lambda x: (x, *(x * (0.1 * number) for number in range(20)), x), 22)
    kernel, parts = encoded("slerp", encoder, SHAPE)
    assert_same(kernel, parts, [(torch.float32, torch.bfloat16, torch.float16)[number % 3] for number in range(22)])


def test_the_reductions_of_all_outputs_share_their_passes() -> None:
    kernel, _ = encoded("slerp", HALVES, SHAPE)
    single, _ = encoded("slerp", Encoder("one", lambda x: x, 1), SHAPE)
    assert kernel.reductions == single.reductions
    assert len(kernel.reduced) == len(single.reduced)


def test_an_output_that_is_an_input_is_not_a_copy_if_there_are_others() -> None:
    spec = InputSpec(1, None, (6, 8))
    assert Encoder("one", lambda x: x, 1).kernel(spec, {}).copies == 0
    assert HALVES.kernel(spec, {}).copies is None


def test_a_kernel_of_several_outputs_keeps_the_inputs_of_each() -> None:
    encoder = Encoder("positive", lambda x: (where(x > 0, x, 0.0), 2.0 * x), 2)
    kernel, _ = encoded("linear", encoder, SHAPE)
    assert kernel.with_used_inputs() is kernel
    assert kernel.propagates_nonfinite  # the second output has every NaN
    assert kernel.resized((30, 20)).inputs == kernel.inputs.resized((30, 20))
    assert (
        not Encoder("positive", lambda x: (where(x > 0, x, 0.0), sign(x)), 2)
        .kernel(InputSpec(1, None, (6, 8)), {})
        .propagates_nonfinite
    )


@pytest.mark.parametrize("place", [0, 1])
def test_each_output_is_checked(place: int) -> None:
    """A number is only beyond the largest one of the dtype of one output."""
    kernel = Encoder("two", lambda x: (2.0 * x, 3.0 * x), 2).kernel(InputSpec(1, None, (5,)), {})
    values = torch.tensor([1.0, 2.0, 1e5, 4.0, 5.0])
    dtypes = [torch.float32, torch.float32]
    assert not run_fused(kernel, [values], out=dtypes).beyond
    dtypes[place] = torch.float16
    assert run_fused(kernel, [values], out=dtypes).beyond


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x: x, "must return 2 arrays, and returns 1"),
        (lambda x: (x, x, x), "must return 2 arrays, and returns 3"),
        (lambda x: (x, 1.0), "must return an Array"),
    ],
)
def test_an_encoder_returns_as_many_arrays_as_it_says(function: Any, says: str) -> None:
    with pytest.raises(MethodDefinitionError, match=rf"test_several_outputs\.py:\d+: encoder wrong {says}"):
        Encoder("wrong", function, 2).kernel(InputSpec(1, None, (6, 8)), {})
