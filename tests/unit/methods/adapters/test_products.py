"""Low-rank products: both backends have the oracle's bytes for all factors, and the values of float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergeloom.methods import Array, Inputs, where
from mergeloom.methods.kernel.access import ALIGNED, Access
from mergeloom.methods.kernel.decoder import Decoder, low_rank
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.spec import BLOCK, InputSpec
from tests.examples import examples
from tests.support.methods import oracle
from tests.support.methods.expressions import random_kernel
from tests.support.methods.factors import LAYOUTS, Shape
from tests.support.methods.kernels import method_of, run_fused, run_kernel
from tests.support.methods.oracle_accesses import factor
from tests.support.methods.stored import ADAPTED, Stored, composed, spec_of

SHAPES: tuple[Shape, ...] = ((37, 61), (300, 260), (1, 5000), (4001, 1), (3, 70, 130), (5, 9001), (9, 1, 33), (257,))
"""Partial panels and steps, one row, one column, stacks, rows longer and much shorter than a segment."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def factors(
    layout: str, shape: Shape, rank: int, seed: int = 1, dtypes: tuple[torch.dtype, torch.dtype] = DTYPES[:2]
) -> list[tuple[Access, Tensor]]:
    """Random factors: the left one and the right one."""
    random = torch.Generator().manual_seed(seed)
    return [
        (access, torch.randn(part, generator=random).to(dtype))
        for (access, part), dtype in zip(LAYOUTS[layout](shape, rank), dtypes, strict=True)
    ]


def assert_same(kernel: Kernel, parts: list[Tensor], length: int | None, threads: int = 1) -> np.ndarray:
    """Both backends have the oracle's bytes in chunks of a length, within the declared memory; return the values."""
    wanted = oracle.evaluate(kernel, parts)
    work = torch.float64 if any(part.dtype is torch.float64 for part in parts) else torch.float32
    for complete in (False, True) if length else (False,):
        found = run_fused(kernel, parts, length, threads=threads, complete=complete).output
        assert found == oracle.stored(wanted, work)
    run = run_kernel(kernel, parts, length, chunk_elements=2 * length if length else None)
    assert oracle.stored(run.output.numpy(), work) == oracle.stored(wanted, work)
    assert run.used <= run.declared
    return wanted


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_product_is_near_that_of_float64(layout: str, shape: Shape) -> None:
    """Each rank adds two roundings, of the product and of the sum."""
    for rank in (1, 4, 29):
        parts = factors(layout, shape, rank, seed=rank)
        tensors = [part for _, part in parts]
        found = assert_same(Decoder("product", low_rank).kernel(spec_of(parts, shape), {}), tensors, 1)
        left, right = (factor(part.double().numpy(), access, shape) for access, part in parts)
        wanted, bound = (np.matmul(a, b.transpose(0, 2, 1)) for a, b in ((left, right), (abs(left), abs(right))))
        assert np.all(abs(found.reshape(wanted.shape) - wanted) <= (rank + 1) * 2.0**-24 * bound)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_factors_of_any_dtype_and_of_a_large_rank(layout: str, dtype: torch.dtype) -> None:
    shape, rank = (83, 101), 200
    base = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    parts = [(ALIGNED, base), *factors(layout, shape, rank, dtypes=(dtype, torch.bfloat16))]
    tensors = [part for _, part in parts]
    assert_same(ADAPTED.kernel(spec_of(parts, shape), {"scale": 0.5}), tensors, None, threads=2)


def test_the_ranks_are_added_in_order() -> None:
    """In another order, the large numbers would not cancel before the small one is added."""
    left = torch.tensor([[2.0**30, -(2.0**30), 1.0]])
    right = torch.ones(3, 40)
    spec = spec_of([(LAYOUTS["plain"]((1, 40), 3)[side][0], each) for side, each in enumerate((left, right))], (1, 40))
    kernel = Decoder("product", low_rank).kernel(spec, {})
    for order, wanted in (([0, 1, 2], 1.0), ([0, 2, 1], 0.0)):
        assert np.all(assert_same(kernel, [left[:, order].contiguous(), right], None) == wanted)


def test_a_product_of_zeros_is_zero_without_a_sign() -> None:
    shape = (5, 40)
    parts = factors("plain", shape, 2)
    kernel = Decoder("product", low_rank).kernel(spec_of(parts, shape), {})
    found = assert_same(kernel, [-torch.zeros_like(parts[0][1]), torch.ones_like(parts[1][1])], None)
    assert not np.signbit(found).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_of_a_factor_reaches_its_row_and_no_other(bad: float) -> None:
    """The rows of a panel, and the columns of a step, that the value does not have are not checked."""
    shape = (7, 45)
    parts = factors("plain", shape, 5)
    parts[0][1][3, 2] = bad
    found = assert_same(Decoder("product", low_rank).kernel(spec_of(parts, shape), {}), [x for _, x in parts], None)
    assert not np.isfinite(found[3]).any()
    assert np.isfinite(np.delete(found, 3, axis=0)).all()


@settings(max_examples=examples(25), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_factors_in_any_chunks(data: st.DataObject) -> None:
    dimensions = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=3))
    shape = (*dimensions[:-1], dimensions[-1] * data.draw(st.sampled_from([1, 1, 7, 100])))
    models = []
    for seed in range(data.draw(st.integers(1, 2))):
        base = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[seed])
        layout, rank = data.draw(st.sampled_from(list(LAYOUTS))), data.draw(st.integers(1, 40))
        dtypes = data.draw(st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)))
        models.append(Stored(ADAPTED, [(ALIGNED, base), *factors(layout, shape, rank, seed, dtypes)], {"scale": 0.7}))
    merge = random_kernel(data.draw(st.integers(0, 50)), len(models), None, shape)
    kernel, parts = composed(merge, models)
    length = data.draw(st.one_of(st.none(), st.integers(1, 3 * BLOCK)))
    assert_same(kernel, parts, length, threads=data.draw(st.integers(1, 3)))


def test_selected_elements_are_computed_alone() -> None:
    """A sample of a selection needs single elements of a product, and the elements of a tie a part of a row."""

    def method(t: Inputs) -> Array:
        return where(t.largest(t.models[0], 40_000), t.models[0], 0.0)

    shape = (700, 301)
    merge = method_of(method).kernel(InputSpec(1, None, shape), {})
    for layout in ("plain", "transposed"):
        parts = [(ALIGNED, torch.zeros(shape)), *factors(layout, shape, 9)]
        kernel, tensors = composed(merge, [Stored(ADAPTED, parts, {"scale": 1.0})])
        assert np.count_nonzero(assert_same(kernel, tensors, None)) == 40_000
