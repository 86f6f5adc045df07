"""Values that are computed from stored parts: both backends have the oracle's bytes, for any chunks and threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergeloom.methods import Array, Inputs, where
from mergeloom.methods.kernel.access import ALIGNED, BlockRows, GatheredRows, SameRows, Whole
from mergeloom.methods.kernel.composition import Composition, Part
from mergeloom.methods.kernel.decoder import Decoder, low_rank
from mergeloom.methods.kernel.expression import MethodDefinitionError
from mergeloom.methods.kernel.fused.compiled import Compiled
from mergeloom.methods.kernel.fused.finite import count_nonfinite, finite
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.spec import BLOCK, InputSpec
from tests.examples import examples
from tests.support.methods import oracle
from tests.support.methods.expressions import random_kernel
from tests.support.methods.kernels import NAMES, method_of, run_fused, run_kernel
from tests.support.methods.stored import ADAPTED, KEY, KINDS, SCALED, Maker, Stored, composed, merged, spec_of

SHAPES: tuple[tuple[int, ...], ...] = (
    *((300, 260), (1, 5000), (4001, 1), (3, 70, 130), (5, 9001), (9000, 7), (2, 3, 64, 32), (257,), (1,)),
    *((0, 64), (3, 0), (2, 0, 16)),
)
"""Partial blocks, one row, one column, stacks, rows longer and much shorter than a segment, nothing."""

METHODS: dict[str, tuple[int | None, dict[str, Any]]] = {
    "linear": (None, {"weight": (0.7, 1.0, 0.4)}),
    "ties": (0, {"weight": (0.0, 0.5, 0.3), "density": (1.0, 0.4, 0.7)}),
    "slerp": (0, {"t": 0.3}),
    "della": (0, {"weight": (0.0, 1.0, 0.5), "density": (1.0, 0.4, 0.7), "epsilon": (0.0, 0.1, 0.2)}),
    "model_stock": (0, {"filter_wise": True}),
}


def kernel_for(method: str, models: Sequence[Stored], shape: tuple[int, ...]) -> tuple[Kernel, list[Tensor]]:
    """A method's kernel of three models (two for slerp)."""
    base, parameters = METHODS[method]
    return merged(method, models[:2] if method == "slerp" else models, shape, parameters, base)


def assert_same(kernel: Kernel, parts: Sequence[Tensor], lengths: Sequence[int | None], threads: int = 1) -> None:
    """The output has the oracle's bytes for each length of chunks and tiles, within the declared memory."""
    wanted = oracle.evaluate(kernel, parts, key=KEY)
    work = torch.float64 if any(x.dtype is torch.float64 for x in parts) else torch.float32
    for length in lengths:
        for complete in (False, True) if length else (False,):
            fused = run_fused(kernel, parts, length, key=KEY, threads=threads, complete=complete)
            assert fused.output == oracle.stored(wanted, work), f"chunks of {length} elements"
        run = run_kernel(kernel, parts, length, chunk_elements=2 * length if length else None, key=KEY)
        assert oracle.stored(run.output.numpy(), work) == oracle.stored(wanted, work), f"tiles of {length} elements"
        assert run.passes == fused.passes
        assert run.used <= run.declared


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(1, examples(2) + 1))
def test_a_value_of_each_kind(seed: int, kind: str, shape: tuple[int, ...]) -> None:
    kernel, parts = merged("passthrough", [KINDS[kind](Maker(seed, shape))], shape, {"scale": (0.3,)}, None)
    assert_same(kernel, parts, (None, 1))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not {*kind.split("_")} & {"adapted", "packed", "sliced"}])
def test_a_value_without_dimensions(kind: str) -> None:
    kernel, parts = merged("passthrough", [KINDS[kind](Maker(1, ()))], (), {"scale": (0.3,)}, None)
    assert_same(kernel, parts, (None,))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(examples(6)))
def test_mixed_models(method: str, seed: int) -> None:
    generator = np.random.default_rng([seed, len(method)])
    shape = SHAPES[:9][generator.integers(9)] if seed else (700, 301)  # large enough for a sample of a selection
    kinds = generator.choice(list(KINDS), 3) if seed else ["fp8_blocks", "adapted", "transposed"]
    models = [KINDS[kind](Maker(10 * seed + number, shape)) for number, kind in enumerate(kinds)]
    kernel, parts = kernel_for(method, models, shape)
    lengths = [None, *(int(length) for length in generator.integers(1, 4 * BLOCK, 2))]
    assert_same(kernel, parts, lengths, threads=1 + seed % 3)


@pytest.mark.parametrize("seed", range(examples(30)))
def test_random_expressions(seed: int) -> None:
    """Any operation, by row, by column and by element, with selections and random numbers."""
    generator = np.random.default_rng([7, seed])
    shape = SHAPES[generator.integers(9)]
    models = [KINDS[kind](Maker(seed, shape, bad=seed % 3 == 0)) for kind in generator.choice(list(KINDS), 3)]
    merge = random_kernel(seed, 3, (None, 0)[seed % 2], shape)
    kernel, parts = composed(merge, models)
    assert_same(kernel, parts, [None, int(generator.integers(1, 4 * BLOCK))])


@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_are_not_finite(method: str) -> None:
    shape = (70, 600)
    names = list(KINDS)
    for kinds in (names[:3], names[3:6], names[5:8], names[7:10], names[8:]):
        models = [KINDS[kind](Maker(number, shape, bad=True)) for number, kind in enumerate(kinds)]
        kernel, parts = kernel_for(method, models, shape)
        assert_same(kernel, parts, (None, 1))


def test_the_work_dtype_is_that_of_the_widest_part() -> None:
    shape = (90, 600)
    codes, scales = Maker(1, shape).fp8_blocks().parts
    wide = Stored(SCALED, [codes, (scales[0], scales[1].double() / 3)], {})
    kernel, parts = merged("linear", [wide, Maker(2, shape).adapted()], shape, {"weight": (0.7, 0.1)}, None)
    assert_same(kernel, parts, (None, 1))


def test_a_method_loads_inputs_in_another_order() -> None:
    """A method's own inputs can be transposed slices and rows of a larger table; `uniform` takes them, too."""

    def method(t: Inputs) -> Array:
        return t.uniform(t.models[0]) * t.models[0] + t.models[1] * t.sum(t.models[0])

    shape = (60, 700)
    transposed = Maker(1, shape).transposed().parts[0]
    table = Maker(2, (9, 700)).plain().parts[0][1]
    index = tuple(int(row) for row in np.random.default_rng(3).integers(-1, 9, 60))
    models = [transposed, (GatheredRows.of(index), table)]
    kernel = method_of(method).kernel(spec_of(models, shape), {})
    assert_same(kernel, [part for _, part in models], (None, 1))


@pytest.mark.parametrize("name", ["U8", "I8", "F8_E8M0"])
def test_every_code_is_read_exactly(name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view({name: dtype for dtype, name in NAMES.items()}[name])
    kernel = Decoder("identity", lambda x: -1.0 * (-1.0 * x)).kernel(InputSpec(1, None, (256,)), {})
    assert_same(kernel, [codes], (None,))


@pytest.mark.parametrize(("name", "bad"), [("U8", None), ("I8", None), ("F8_E8M0", 255)])
def test_codes_that_are_not_finite_are_found(name: str, bad: int | None) -> None:
    codes = np.arange(256, dtype=np.uint8)
    others = memoryview(codes[codes != bad].copy())
    assert finite(others, name)
    assert count_nonfinite(others, name) == 0
    assert finite(memoryview(codes), name) == (bad is None)
    assert count_nonfinite(memoryview(codes), name) == (bad is not None)


# ------------------------------------------------------------------------------------------------ the kernel


def test_a_value_that_is_not_finite_in_any_part_reaches_the_output() -> None:
    """Then only the output is checked; methods that choose among values can lose one."""
    shape = (64, 96)
    maker = Maker(1, shape, layouts=("plain", "transposed", "experts", "turned experts"))  # every element is used
    models = [KINDS[kind](maker) for kind in ("fp8_blocks", "adapted_codes", "transposed")]
    chosen = Decoder("chosen", lambda codes, scales: where(scales > 0, codes, 0.0))
    assert not chosen.kernel(spec_of(models[0].parts, shape), {}).propagates_nonfinite
    kernel, parts = kernel_for("linear", models, shape)
    assert kernel.propagates_nonfinite
    for number, part in enumerate(parts):
        if part.dtype in (torch.float32, torch.bfloat16):
            bad = [x.clone() for x in parts]
            bad[number].view(-1)[-3:] = math.inf
            assert run_fused(kernel, bad).beyond, f"part {number}"
    assert not run_fused(kernel, parts).beyond


def test_a_kernel_keeps_the_accesses_of_the_inputs_it_uses() -> None:
    shape = (130, 140)
    models = [KINDS[kind](Maker(1, shape)) for kind in ("adapted_codes", "fp8_blocks", "adapted")]
    complete, parts = merged("linear", models, shape, {"weight": (0.0, 0.5, 2.0)}, None)
    kernel = complete.with_used_inputs()
    assert kernel.kept == (4, 5, 6, 7, 8)
    assert kernel.inputs == spec_of([part for model in models[1:] for part in model.parts], shape)
    used = [parts[index] for index in kernel.kept]
    assert_same(kernel, used, (None, 1))
    assert np.array_equal(oracle.evaluate(complete, parts), oracle.evaluate(kernel, used))
    assert kernel.with_used_inputs() is kernel
    other = kernel.resized((50, 70))
    assert other.inputs == kernel.inputs.resized((50, 70))
    small = [torch.ones(other.inputs.part(index)).to(x.dtype) for index, x in enumerate(used)]
    assert_same(other, small, (None,))


def test_a_part_that_is_not_aligned_is_never_the_output() -> None:
    shape = (6, 8)
    for model, copied in ((Maker(1, shape).plain(), 0), (Maker(1, shape).transposed(), None)):
        assert merged("passthrough", [model], shape, {}, None)[0].copies == copied


def test_shapes_and_blocks_do_not_change_the_code() -> None:
    def code(shape: tuple[int, ...], height: int, rank: int) -> str:
        codes = torch.zeros(shape, dtype=torch.float8_e4m3fn)
        access = BlockRows(height, 2 * height)
        scales = torch.zeros(-(-shape[0] // height), -(-shape[1] // (2 * height)))
        factors = [(SameRows(), torch.zeros(shape[0], rank)), (Whole(), torch.zeros(rank, shape[1]))]
        parts = [(ALIGNED, codes), (access, scales), *factors]
        decoder = Decoder("all", lambda codes, scales, left, right: codes * scales + low_rank(left, right))
        kernel = merged("linear", [Stored(decoder, parts, {})], shape, {"weight": (0.5,)}, None)[0]
        return Compiled(kernel, [NAMES[part.dtype] for _, part in parts], "BF16").assembly

    assert code((64, 96), 16, 4) == code((700, 130), 128, 33)


# ------------------------------------------------------------------------------------------------ mistakes


MISTAKES = {
    "the sum of an array and a factor": lambda x, b, a: x + b,
    "the sum of a factor and an array": lambda x, b, a: b + x,
    "a factor times a number": lambda x, b, a: x + 2.0 * a,
    "a factor as a condition": lambda x, b, a: x if b else a,
    "a negative factor": lambda x, b, a: x + low_rank(-b, a),
    "factors in the wrong order": lambda x, b, a: x + low_rank(a, b),
    "an array as a factor": lambda x, b, a: x + low_rank(x, a),
    "a factor alone": lambda x, b, a: b,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_factors_are_only_multiplied_with_each_other(mistake: str) -> None:
    spec = spec_of(Maker(1, (6, 8)).adapted().parts, (6, 8))
    with pytest.raises(MethodDefinitionError, match=r"test_stored_parts\.py:\d+: .*(low_rank|Array)"):
        Decoder("wrong", MISTAKES[mistake]).kernel(spec, {})


def test_ranks_must_be_equal() -> None:
    spec = InputSpec(2, None, (6, 8), (SameRows(), Whole()), ((6, 3), (4, 8)))
    with pytest.raises(MethodDefinitionError, match=r"\(rank, 8\), and not of shapes \[6, 3\] and \[4, 8\]"):
        Decoder("wrong", low_rank).kernel(spec, {})


def test_a_method_does_not_take_factors_as_models() -> None:
    spec = InputSpec(2, None, (6, 8), (ALIGNED, SameRows()), ((6, 8), (6, 3)))
    with pytest.raises(MethodDefinitionError, match=r"use low_rank"):
        method_of(lambda t: t.models[0] + t.models[1]).kernel(spec, {})


def test_the_factors_of_a_composition_are_leaves() -> None:
    spec = spec_of(Maker(1, (6, 8)).adapted().parts, (6, 8))
    kernel = ADAPTED.kernel(spec, {"scale": 1.0})
    identity = Decoder("identity", lambda x: 2.0 * x).kernel(InputSpec(1, None, (6, 8)), {})
    with pytest.raises(ValueError, match="must be leaves"):
        Composition(InputSpec(3, None, (6, 8)), [Part(identity, (1,)), Part(kernel, (0, ~0, 2))])
