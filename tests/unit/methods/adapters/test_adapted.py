"""Values with adapters: scaled products, biases, DoRA and replaced rows, for one base or several in a method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergeloom.methods import merge_methods
from mergeloom.methods.formats.adapters import REPLACED_ROWS, Term, adapted, scale_name
from mergeloom.methods.formats.scaled import FP8_BLOCKS
from mergeloom.methods.kernel.access import ALIGNED, Access, BlockRows, GatheredRows
from mergeloom.methods.kernel.fused.compiled import Compiled
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.spec import InputSpec, MethodError
from tests.support.methods import oracle
from tests.support.methods.factors import LAYOUTS, Shape
from tests.support.methods.kernels import run_fused, run_kernel
from tests.support.methods.oracle_accesses import expanded, factor
from tests.support.methods.stored import Maker, Stored, composed, spec_of

SHAPES: tuple[Shape, ...] = ((37, 61), (300, 260), (1, 5000), (401, 1), (9, 9001))
Parts = list[tuple[Access, Tensor]]


def random(shape: Shape, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parts_of(term: Term, shape: Shape, seed: int, rank: int = 5, layout: str = "plain") -> Parts:
    """The parts of a term."""
    if term is Term.BIAS:
        return [(ALIGNED, random(shape, seed))]
    found = [(access, random(part, seed + place)) for place, (access, part) in enumerate(LAYOUTS[layout](shape, rank))]
    rows, columns = shape
    if term is Term.DORA_ROWS:
        found.append((BlockRows(1, columns), abs(random((rows,), seed, torch.float32)) + 0.5))
    if term is Term.DORA_COLUMNS:
        found.append((BlockRows(rows, 1), abs(random((columns,), seed, torch.float32)) + 0.5))
    return found


def value_of(base: np.ndarray, terms: Sequence[Term], scales: Sequence[float], parts: Parts) -> np.ndarray:
    """The value in float64."""
    following = iter(parts)
    value = base
    for term, scale in zip(terms, scales, strict=True):
        access, part = next(following)
        if term is Term.BIAS:
            value = value + scale * part.double().numpy()
            continue
        left = factor(part.double().numpy(), access, base.shape)[0]
        access, part = next(following)
        value = value + scale * left @ factor(part.double().numpy(), access, base.shape)[0].T
        if term is not Term.LORA:
            axis = 1 if term is Term.DORA_ROWS else 0
            magnitudes = np.expand_dims(next(following)[1].double().numpy(), axis)
            value = value * magnitudes / np.linalg.norm(value, axis=axis, keepdims=True)
    return value


def assert_same(kernel: Kernel, parts: Sequence[Tensor], lengths: Sequence[int | None] = (None, 1)) -> np.ndarray:
    """Both backends have the oracle's bytes in chunks of any length; return the values."""
    wanted = oracle.evaluate(kernel, parts)
    for length in lengths:
        assert run_fused(kernel, parts, length, threads=2).output == oracle.stored(wanted, torch.float32)
        run = run_kernel(kernel, parts, length, chunk_elements=2 * length if length else None)
        assert oracle.stored(run.output.numpy(), torch.float32) == oracle.stored(wanted, torch.float32)
        assert run.used <= run.declared
    return wanted


def stored(base: Parts, terms: Sequence[Term], scales: Sequence[float], parts: Parts, decoder: Any = None) -> Stored:
    parameters = {scale_name(number): scale for number, scale in enumerate(scales)}
    return Stored(adapted(decoder, len(base), tuple(terms)), [*base, *parts], parameters)


TERMS: tuple[tuple[Term, ...], ...] = (
    (Term.LORA,),
    (Term.BIAS,),
    (Term.DORA_ROWS,),
    (Term.DORA_COLUMNS,),
    (Term.LORA, Term.LORA),
    (Term.LORA, Term.DORA_ROWS, Term.LORA),
    (Term.DORA_ROWS, Term.DORA_COLUMNS),
)


def name_of(terms: Sequence[Term]) -> str:
    return " ".join(term.name for term in terms)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("terms", TERMS, ids=name_of)
def test_a_value_is_that_of_float64(terms: tuple[Term, ...], shape: Shape) -> None:
    base = random(shape, 1)
    scales = [0.5, -1.25, 2.0][: len(terms)]
    layouts = ("plain", "transposed", "plain")
    parts = [
        part for number, term in enumerate(terms) for part in parts_of(term, shape, 10 * number, 5, layouts[number])
    ]
    model = stored([(ALIGNED, base)], terms, scales, parts)
    kernel = model.decoder.kernel(spec_of(model.parts, shape), model.parameters) if model.decoder else None
    assert kernel is not None
    found = assert_same(kernel, [part for _, part in model.parts])
    wanted = value_of(base.double().numpy(), terms, scales, parts)
    assert np.max(abs(found - wanted)) <= 1e-6 * np.max(abs(wanted))


def test_the_scale_multiplies_the_sum_and_not_a_factor() -> None:
    """W + s * sum, each operation rounded to float32; a negative scale is neither lost nor used twice."""
    shape, scale = (40, 70), -0.3
    base, parts = random(shape, 1), parts_of(Term.LORA, shape, 2)
    model = stored([(ALIGNED, base)], [Term.LORA], [scale], parts)
    kernel, tensors = composed(merge_methods()["passthrough"].kernel(InputSpec(1, None, shape), {}), [model])
    total = np.zeros(shape, np.float32)
    (_, left), (_, right) = parts
    for k in range(left.shape[1]):
        total += left[:, k : k + 1].float().numpy() * right[k : k + 1].float().numpy()
    assert np.array_equal(assert_same(kernel, tensors), base.float().numpy() + np.float32(scale) * total)


def test_a_quantized_base_is_decoded_first() -> None:
    shape = (130, 140)
    base = Maker(1, shape).fp8_blocks().parts
    parts = parts_of(Term.DORA_ROWS, shape, 2)
    model = stored(list(base), [Term.DORA_ROWS], [0.5], parts, FP8_BLOCKS)
    assert model.decoder is not None
    assert model.decoder.name == "FP8 blocks + DoRA"
    found = assert_same(
        model.decoder.kernel(spec_of(model.parts, shape), model.parameters), [x for _, x in model.parts]
    )
    codes, (access, scales) = base[0][1].float().numpy(), base[1]
    value = codes.astype(np.float64) * expanded(scales.double().numpy(), access, shape)
    wanted = value_of(value, [Term.DORA_ROWS], [0.5], parts)
    assert np.max(abs(found - wanted)) <= 1e-6 * np.max(abs(wanted))


@pytest.mark.parametrize("term", [Term.LORA, Term.DORA_ROWS, Term.DORA_COLUMNS])
@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "model_stock"])
def test_methods_merge_values_with_adapters(method: str, term: Term) -> None:
    """The same bytes as of values that are computed to float32 first; the base's part is loaded for each model."""
    shape = (90, 300)
    base = random(shape, 1)
    models = [stored([(ALIGNED, base)], [term], [0.5], parts_of(term, shape, seed)) for seed in (2, 3)]
    plain = Stored(None, [(ALIGNED, base)], {})
    parameters: dict[str, Any] = {
        "linear": {"weight": (1.0, 0.5, 0.25)},
        "ties": {"weight": (0.0, 0.5, 0.7), "density": (1.0, 0.4, 0.7)},
        "slerp": {"t": 0.3},
        "model_stock": {"filter_wise": True},
    }[method]
    chosen = [plain, *models][: 2 if method == "slerp" else 3]
    merge = merge_methods()[method].kernel(InputSpec(len(chosen), None if method == "linear" else 0, shape), parameters)
    kernel, tensors = composed(merge, chosen)
    found = assert_same(kernel, tensors)
    values = [base.float()]
    for model in chosen[1:]:
        assert model.decoder is not None
        decoding = model.decoder.kernel(spec_of(model.parts, shape), model.parameters)
        values.append(torch.from_numpy(oracle.evaluate(decoding, [part for _, part in model.parts]).copy()))
    assert np.array_equal(found, oracle.evaluate(merge, values))


def test_a_row_of_zeros_has_no_length() -> None:
    """PEFT divides by zero there, too: the result isn't finite, so it is found and reported."""
    shape = (4, 40)
    base = torch.zeros(shape)
    parts = parts_of(Term.DORA_ROWS, shape, 1)
    parts[0][1][2] = 0
    model = stored([(ALIGNED, base)], [Term.DORA_ROWS], [1.0], parts)
    assert model.decoder is not None
    kernel = model.decoder.kernel(spec_of(model.parts, shape), model.parameters)
    found = run_fused(kernel, [part for _, part in model.parts])
    assert found.beyond
    values = np.frombuffer(found.output, np.float32).reshape(shape)
    assert np.isnan(values[2]).all()
    assert np.isfinite(np.delete(values, 2, axis=0)).all()


def test_equal_terms_share_a_kernel() -> None:
    """Tensors with equal shapes and scales have one operation, and neither changes the compiled code."""
    assert adapted(None, 1, (Term.LORA,)) is adapted(None, 1, (Term.LORA,))
    assert adapted(None, 1, (Term.LORA,)) != adapted(FP8_BLOCKS, 2, (Term.LORA,))
    assert adapted(None, 1, (Term.LORA, Term.DORA_ROWS)).name == "LoRA + DoRA"

    def code(shape: Shape, scale: float, rank: int) -> str:
        parts = [(ALIGNED, random(shape, 1)), *parts_of(Term.DORA_ROWS, shape, 1, rank)]
        kernel = adapted(None, 1, (Term.DORA_ROWS,)).kernel(spec_of(parts, shape), {"scale_0": scale})
        return Compiled(kernel, ["BF16", "BF16", "BF16", "F32"], "BF16").assembly

    assert code((64, 96), 0.5, 4) == code((70, 130), 2.5, 33)


def test_columns_of_a_stack_have_no_length() -> None:
    """A sum by column would go over the matrices of the stack, and not over the rows of each."""
    shape = (2, 6, 8)
    factors = [(access, random(part, 1)) for access, part in LAYOUTS["experts"](shape, 3)]
    parts = [(ALIGNED, random(shape, 1)), *factors, (BlockRows(6, 1), random((2, 8), 2))]
    with pytest.raises(MethodError, match=r"takes a matrix, and not a tensor of shape \[2, 6, 8\]"):
        adapted(None, 1, (Term.DORA_COLUMNS,)).kernel(spec_of(parts, shape), {"scale_0": 1.0})


def test_replaced_rows_are_the_parts_bit_for_bit() -> None:
    """Zeros keep their signs, in the base's rows and in those that replace them."""
    base = torch.where(torch.rand((6, 50), generator=torch.Generator().manual_seed(1)) < 0.5, -0.0, random((6, 50), 2))
    rows = torch.where(torch.rand((2, 50), generator=torch.Generator().manual_seed(3)) < 0.5, -0.0, random((2, 50), 4))
    parts = [(GatheredRows.of((0, 1, -1, 3, -1, 5)), base), (GatheredRows.of((-1, -1, 1, -1, 0, -1)), rows)]
    found = assert_same(REPLACED_ROWS.kernel(spec_of(parts, (6, 50)), {}), [base, rows])
    wanted = base.float().clone()
    wanted[2], wanted[4] = rows[1].float(), rows[0].float()
    assert found.tobytes() == wanted.numpy().tobytes()
