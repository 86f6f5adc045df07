"""Values match float64 references for every dtype, and depend neither on chunks nor on threads."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

import mergeloom
from mergeloom.engine.run.diff import units
from mergeloom.engine.run.diff.compare import Comparison
from mergeloom.engine.run.diff.result import Similarity
from mergeloom.methods.kernel.spec import BLOCK
from tests.support.models import write_checkpoint
from tests.unit.diff.references import compare, is_close, reference

FLOATS = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def one(directory: Path, a: torch.Tensor, b: torch.Tensor) -> Similarity:
    """Compare two models with one tensor each."""
    (found,) = compare(directory, {"w": a}, {"w": b}).tensors
    return found.similarity


def random_pair(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float64 tensors of which about half of the elements are equal."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(shape, dtype=torch.float64, generator=generator)
    noise = torch.randn(shape, dtype=torch.float64, generator=generator) * 0.1
    return a, torch.where(torch.rand(shape, generator=generator) < 0.5, a, a + noise)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(FLOATS, FLOATS)))
def test_floats_match_a_float64_reference(first: str, second: str, tmp_path: Path) -> None:
    a, b = random_pair((41, 1000))  # a complete block, and a part of one
    x, y = a.to(FLOATS[first]), b.to(FLOATS[second])
    expected = reference(x.float() if x.element_size() == 1 else x, y.float() if y.element_size() == 1 else y)
    assert is_close(one(tmp_path, x, y), expected)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_match_a_float64_reference(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    high = 2 if dtype is torch.bool else 100
    a, b = (torch.randint(0, high, (1000, 70), generator=generator).to(dtype) for _ in range(2))
    assert is_close(one(tmp_path, a, b), reference(a, b))
    assert is_close(one(tmp_path / "floats", a, b.float()), reference(a, b))


def test_64_bit_integers_are_compared_exactly(tmp_path: Path) -> None:
    a = torch.tensor([2**60, -(2**62), 7, 2**53 + 1])
    b = torch.tensor([2**60 + 1, -(2**62), 7, 2**53])
    found = one(tmp_path, a, b)
    assert found.equal == 2
    assert found.difference_squares == 2.0
    unsigned = one(tmp_path / "u", torch.tensor([2**63, 2**64 - 1], dtype=torch.uint64), torch.tensor([-(2**63), -1]))
    assert unsigned.equal == 0
    assert unsigned.difference_squares == 2.0 * 2.0**128
    floats = one(tmp_path / "f", a, torch.tensor([2.0**60, -(2.0**62), 7.5, 2.0**53], dtype=torch.float64))
    assert floats.equal == 2
    assert floats.difference_squares == 0.25 + 1.0


@pytest.mark.parametrize("elements", [1, 2, 3, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
def test_any_number_of_elements(elements: int, tmp_path: Path) -> None:
    a, b = (tensor.bfloat16() for tensor in random_pair((elements,)))
    found = compare(tmp_path, {"w": a, "x": torch.ones(1)}, {"w": b, "x": torch.ones(1)})
    similarity = found.tensors[0].similarity if found.tensors[0].name == "w" else found.tensors[1].similarity
    assert similarity.elements == elements
    assert is_close(similarity, reference(a, b))


def test_a_tensor_without_dimensions(tmp_path: Path) -> None:
    found = one(tmp_path, torch.tensor(2.0), torch.tensor(3.0))
    assert (found.relative_distance, found.cosine, found.equal_share) == (0.5, 1.0, 0.0)


def test_chunks_and_threads_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    models = []
    for dtype in (torch.bfloat16, torch.float32):
        shapes = {"w": (7 * BLOCK + 100,), "v": (BLOCK,), "u": (3, 5), "t": (2, BLOCK)}
        models.append({name: torch.randn(s, generator=generator).to(dtype) for name, s in shapes.items()})
    for name, model in zip("ab", models, strict=True):
        write_checkpoint(tmp_path / name, model)
    results = set()
    for buffer, threads in itertools.product((1, 500_000, 700_000, 1 << 24), (1, 3)):
        monkeypatch.setattr(units, "BUFFER_BYTES", buffer)
        results.add(Comparison(tmp_path / "a", tmp_path / "b", threads=threads).run().tensors)
    assert len(results) == 1
    for found in results.pop():
        assert is_close(found.similarity, reference(models[0][found.name], models[1][found.name]))


def test_the_total_is_that_of_all_elements(tmp_path: Path) -> None:
    pairs = {name: random_pair((50, 60), seed) for seed, name in enumerate("wxyz")}
    found = compare(tmp_path, {n: a for n, (a, _) in pairs.items()}, {n: b for n, (_, b) in pairs.items()})
    a, b = (torch.cat([pair[side].flatten() for pair in pairs.values()]) for side in (0, 1))
    assert is_close(found.total, reference(a, b))


# ------------------------------------------------------------------------------------------------ special values


def test_zero_norms(tmp_path: Path) -> None:
    zeros, ones = torch.zeros(5), torch.ones(5)
    both = one(tmp_path / "both", zeros, -zeros)
    assert (both.relative_distance, both.cosine, both.equal_share) == (0.0, None, 1.0)  # regardless of the sign
    a_is_zero = one(tmp_path / "a_is_zero", zeros, ones)
    assert (a_is_zero.relative_distance, a_is_zero.cosine, a_is_zero.equal_share) == (None, None, 0.0)
    b_is_zero = one(tmp_path / "b_is_zero", ones, zeros)
    assert (b_is_zero.relative_distance, b_is_zero.cosine, b_is_zero.equal_share) == (1.0, None, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_nan_and_infinity_are_counted_and_left_out(dtype: torch.dtype, tmp_path: Path) -> None:
    nan, inf = math.nan, math.inf
    a = torch.tensor([nan, nan, 1.0, inf, inf, -inf, 3.0, 4.0], dtype=dtype)
    b = torch.tensor([nan, 1.0, nan, inf, -inf, 5.0, 3.0, 2.0], dtype=dtype)
    found = compare(tmp_path, {"w": a}, {"w": b})
    similarity = found.tensors[0].similarity
    assert similarity.nonfinite == 6
    assert similarity.equal == 3  # NaN and NaN, inf and inf, 3 and 3
    assert similarity.relative_distance == 2 / 5
    assert similarity.cosine == pytest.approx((9 + 8) / (5 * math.sqrt(13)), rel=1e-15)
    (warning,) = found.warnings
    assert warning.startswith("NaN or infinite in A or B")
    assert warning.endswith(": 6 elements of 1 tensor, first in w")


def test_nothing_but_nan(tmp_path: Path) -> None:
    found = one(tmp_path, torch.full((3,), math.nan), torch.full((3,), math.nan))
    assert (found.relative_distance, found.cosine, found.equal_share) == (None, None, 1.0)


def test_sums_that_overflow_are_undefined(tmp_path: Path) -> None:
    large = torch.tensor([1e300, 1.0], dtype=torch.float64)
    found = one(tmp_path, large, -large)
    assert (found.relative_distance, found.cosine, found.equal_share) == (None, None, 0.0)
    assert found.nonfinite == 0


# ------------------------------------------------------------------------------------------------ results


def test_equal_models_are_equal_whatever_their_dtypes(tmp_path: Path) -> None:
    weights = torch.randn(100).bfloat16()
    found = compare(tmp_path, {"w": weights}, {"w": weights.float()})
    assert found.equal
    assert found.tensors[0].dtypes == ("BF16", "F32")
    assert found.total.relative_distance == 0.0
    assert found.total.cosine == 1.0


def test_integers_do_not_count_in_totals(tmp_path: Path) -> None:
    weights, ids = torch.randn(4, 4), torch.arange(512)
    found = compare(tmp_path, {"w": weights, "ids": ids}, {"w": 2 * weights, "ids": ids})
    assert found.total.elements == 16
    assert found.total.relative_distance == 1.0
    assert {group.kind: group.similarity.elements for group in found.by_kind()} == {"w": 16, "ids": 512}
    assert not found.equal


def test_the_public_function(tmp_path: Path) -> None:
    weights = torch.tensor([3.0, 4.0])
    a = write_checkpoint(tmp_path / "a", {"w": weights})
    b = write_checkpoint(tmp_path / "b", {"w": weights + 5})
    calls = []
    found = mergeloom.diff(a, str(b), max_ram="64GiB", threads=2, notify=lambda p: calls.append(p.bytes_read))
    assert isinstance(found, mergeloom.Diff)
    assert isinstance(found.tensors[0], mergeloom.TensorDiff)
    assert found.total.relative_distance == pytest.approx(math.sqrt(50) / 5)
    assert calls[-1] == found.bytes_read == 16
    assert found.max_ram == 64 << 30
    for value in (found, found.tensors[0], found.total):
        assert len(repr(value).splitlines()) == 1
        assert "relative distance 1.41421" in repr(value)
    with pytest.raises(AttributeError):
        found.a = "c"  # type: ignore[misc]
    with pytest.raises(mergeloom.UsageError, match="invalid threads 0"):
        mergeloom.diff(a, b, threads=0)
