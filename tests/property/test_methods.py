"""Laws of the merge methods: end points, identities and symmetries."""

from __future__ import annotations

from math import acos, prod, sin

import numpy
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.methods.kernels import merge


@st.composite
def tensors(
    draw: st.DrawFn,
    models: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    elements: int = 1,
    least_scale: int = -20,
    steps: tuple[float, ...] = (1.0, 0.05, 0.0),
) -> list[Tensor]:
    """Tensors of one shape, by default in bfloat16, whose differences are exact.

    Args:
        draw: draw function of Hypothesis.
        models: number of tensors.
        dtype: dtype of the tensors.
        elements: minimum number of elements.
        least_scale: exponent of the smallest scale, a power of two.
        steps: sizes of the differences between the tensors, as fractions of the scale.
    """
    shapes: list[tuple[int, ...]] = [(), (1,), (17,), (3, 5), (2, 3, 4), (40, 33)]
    shape = draw(st.sampled_from([shape for shape in shapes if prod(shape) >= elements]))
    generator = numpy.random.default_rng(draw(st.integers(0, 1 << 30)))
    scale = 2.0 ** draw(st.integers(least_scale, 10))
    first = generator.standard_normal(shape)
    step = draw(st.sampled_from(steps))
    arrays = [first] + [first + step * generator.standard_normal(shape) for _ in range(models - 1)]
    return [torch.tensor(array * scale).to(dtype) for array in arrays]


weights = st.floats(0.05, 4)
laws = settings(deadline=None, max_examples=60)


@laws
@given(x=tensors(1), w=st.lists(weights, min_size=1, max_size=5))
def test_linear_of_equal_models_is_the_model(x: list[Tensor], w: list[float]) -> None:
    merged = merge("linear", x * len(w), {"weight": tuple(w)})
    assert torch.equal(merged.to(torch.bfloat16), x[0])


@laws
@given(x=tensors(2), swapped=st.booleans())
def test_slerp_reaches_both_ends(x: list[Tensor], swapped: bool) -> None:
    base = int(swapped)
    assert torch.equal(merge("slerp", x, {"t": 0.0}, base=base), x[base].float())
    assert torch.equal(merge("slerp", x, {"t": 1.0}, base=base), x[1 - base].float())


@laws
@given(x=tensors(2, torch.float32), t=st.floats(0, 1))
def test_slerp_is_the_same_from_the_other_end(x: list[Tensor], t: float) -> None:
    forth = merge("slerp", x, {"t": t}, base=0)
    back = merge("slerp", x, {"t": 1 - t}, base=1)
    torch.testing.assert_close(forth, back, rtol=1e-4, atol=1e-6 * float(x[0].abs().max() + x[1].abs().max()))


@laws
@given(x=tensors(2, elements=2, steps=(1.0, 0.2)), t=st.floats(0.01, 0.99))
def test_slerp_of_directions_keeps_their_length(x: list[Tensor], t: float) -> None:
    units = [v.double() / v.double().norm() for v in x]
    cosine = float((units[0] * units[1]).sum())
    assume(abs(cosine) < 0.999)
    angle = acos(cosine)
    factors = (sin((1 - t) * angle) + sin(t * angle)) / sin(angle)  # each is rounded to float32
    assert abs(float(merge("slerp", units, {"t": t}, base=0).norm()) - 1) < 1e-9 + 2.0**-24 * factors


@laws
@given(x=tensors(2), w=weights)
def test_ties_with_one_dense_model_is_the_model(x: list[Tensor], w: float) -> None:
    merged = merge("ties", x, {"weight": (0.0, w), "density": (0.0, 1.0)}, base=0)
    assert torch.equal(merged.to(torch.bfloat16), x[1] + 0.0)


@laws
@given(x=tensors(2))
def test_ties_with_the_same_model_twice_is_the_model(x: list[Tensor]) -> None:
    merged = merge("ties", [x[0], x[1], x[1]], {"weight": (0.0, 1.0, 1.0), "density": (0.0, 1.0, 1.0)}, base=0)
    assert torch.equal(merged.to(torch.bfloat16), x[1] + 0.0)


@laws
@given(x=tensors(3), normalize=st.booleans())
def test_task_arithmetic_without_weight_is_the_base(x: list[Tensor], normalize: bool) -> None:
    merged = merge("task_arithmetic", x, {"weight": (0.0, 0.0, 0.0), "normalize": normalize}, base=0)
    assert torch.equal(merged, x[0].float())


@laws
@given(
    x=tensors(3),
    method=st.sampled_from(["ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "breadcrumbs_ties"]),
)
def test_nothing_kept_is_the_base(x: list[Tensor], method: str) -> None:
    merged = merge(method, x, {"weight": (0.0, 1.0, 0.5), "density": (0.0, 0.0, 0.0)}, base=0)
    assert torch.equal(merged, x[0].float())


@laws
@given(x=tensors(3), method=st.sampled_from(["dare_linear", "della_linear", "breadcrumbs"]))
def test_all_kept_is_task_arithmetic(x: list[Tensor], method: str) -> None:
    parameters = {"weight": (0.0, 0.6, 0.5)}
    merged = merge(method, x, parameters | {"density": (1.0, 1.0, 1.0)}, base=0)
    assert torch.equal(merged, merge("task_arithmetic", x, parameters, base=0))


@laws
@given(x=tensors(1), factors=st.lists(st.floats(0.25, 4), min_size=2, max_size=4))
def test_karcher_of_one_direction_is_that_direction(x: list[Tensor], factors: list[float]) -> None:
    models = [x[0].double() * factor for factor in factors]
    assume(float(x[0].double().norm()) * min(factors) > 1e-5)
    wanted = x[0].double() * (sum(factors) / len(factors))
    torch.testing.assert_close(merge("karcher", models), wanted, rtol=2.0**-24 + 1e-12, atol=0)  # float32 factors


@laws
@given(x=tensors(3, torch.float32))
@example(x=[torch.tensor(6.6663e-06), torch.tensor(-0.0006), torch.tensor(0.0006)])
def test_karcher_does_not_depend_on_the_order(x: list[Tensor]) -> None:
    one, other = merge("karcher", x), merge("karcher", [x[2], x[0], x[1]])
    atol = 1e-5 * float(sum(v.abs().max() for v in x))
    directions = [v.double() / v.double().norm() for v in x if float(v.double().norm()) > 1e-5]  # others have none
    assume(directions and float(sum(directions, torch.zeros(())).norm()) > 1e-3)  # those that cancel give the first
    torch.testing.assert_close(one, other, rtol=1e-4, atol=atol)


@laws
@given(x=tensors(2, least_scale=-6, steps=(1.0, 0.05)))
def test_model_stock_of_equal_models_is_the_model(x: list[Tensor]) -> None:
    assume(float((x[1].double() - x[0].double()).norm()) > 1e-3)
    merged = merge("model_stock", [x[0], x[1], x[1]], base=0)
    assert torch.equal(merged.to(torch.bfloat16), x[1] + 0.0)


@laws
@given(x=tensors(3))
def test_a_sum_of_zero_elects_plus(x: list[Tensor]) -> None:
    zero = torch.zeros_like(x[0])
    delta = x[1].abs()
    merged = merge("ties", [zero, -delta, delta], {"weight": (0.0, 1.0, 1.0), "density": (0.0, 1.0, 1.0)}, base=0)
    assert torch.equal(merged, delta.float())


@laws
@given(x=tensors(4, least_scale=-2), share=st.floats(0, 1))
def test_the_order_of_models_does_not_matter_to_exact_sums(x: list[Tensor], share: float) -> None:
    small = [torch.round(v.float() * 8) for v in x]
    assume(all(v.any() for v in small))
    parameters = {"weight": (0.0, 1.0, 1.0, 1.0), "density": (0.0, share, share, share), "normalize": False}
    forth = merge("ties", small, parameters, base=0)
    assert torch.equal(forth, merge("ties", [small[0], small[3], small[1], small[2]], parameters, base=0))


@laws
@given(x=tensors(2, steps=(1.0, 0.05)), share=st.floats(0, 1))
def test_nearswap_stays_between_the_two(x: list[Tensor], share: float) -> None:
    t = share * float((x[0].float() - x[1].float()).abs().max())  # below the largest distance: not all are swapped
    merged = merge("nearswap", x, {"t": t}, base=0)
    low, high = torch.minimum(x[0], x[1]).float(), torch.maximum(x[0], x[1]).float()
    slack = 2.0**-22 * (x[0].abs() + x[1].abs()).float()
    assert bool(((merged >= low - slack) & (merged <= high + slack)).all())


@laws
@given(x=tensors(3))
def test_ram_adds_lone_changes_and_averages_shared_ones(x: list[Tensor]) -> None:
    zero = torch.zeros_like(x[0])
    delta = x[1].float().sign()
    assert torch.equal(merge("ram", [zero, delta, zero], base=0), delta)
    assert torch.equal(merge("ram", [zero, delta, delta * 3], base=0), delta * 2)
