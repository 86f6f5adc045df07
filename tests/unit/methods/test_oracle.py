"""Both backends compute the bytes of the oracle: for every method, in the engine, for random expressions."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.engine.schedule import budget, schedule
from mergeloom.methods import Array, Inputs, exp, log, merge_methods
from mergeloom.methods.kernel.composition import Composition, Part
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.spec import InputSpec
from mergeloom.methods.kernel.torch_backend.hashing import hashes
from mergeloom.methods.kernel.torch_backend.rounding import canonical_nans, round_into
from tests.examples import examples
from tests.support.methods import oracle
from tests.support.methods.cases import CASES, Case, make
from tests.support.methods.expressions import SHAPES, hard_inputs, random_kernel
from tests.support.methods.kernels import kernel_of, run_fused, run_kernel
from tests.support.models import FineTune, Random, write_checkpoint
from tests.support.outputs import read_model

KEY = 0x1234_5678_9ABC_DEF1
KINDS = ("lattice", "float32", "mixed", "float64")
SHAPES_OF_INPUTS: list[tuple[int, ...]] = [(83, 517), (40, 4096), (70_001,), (3, 5, 7), ()]
IDS = [str(case) for case in CASES]


def assert_same(kernel: Kernel, inputs: Sequence[Tensor], *tiles: int | None) -> None:
    """The output has the oracle's bytes for each size of tiles and chunks, within the declared memory."""
    wanted = oracle.evaluate(kernel, inputs, key=KEY)
    described = f"{tuple(inputs[0].shape)} of {', '.join(str(x.dtype) for x in inputs)}"
    for tile in tiles:
        work = torch.float64 if any(x.dtype is torch.float64 for x in inputs) else torch.float32
        fused = run_fused(kernel, inputs, tile, key=KEY)
        assert fused.output == oracle.stored(wanted, work), f"chunks of {tile} elements"
        run = run_kernel(kernel, inputs, tile, key=KEY)
        assert run.passes == fused.passes
        dtype = run.output.dtype
        assert oracle.stored(run.output.numpy(), dtype) == oracle.stored(wanted, dtype), f"{described}, tiles of {tile}"
        assert run.used <= run.declared


# ------------------------------------------------------------------------------------------------ every method


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_method(case: Case) -> None:
    inputs = make("lattice", case.models, (83, 517), case.base)
    assert_same(case.kernel(inputs), inputs, 1)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_kind_of_input(case: Case) -> None:
    for kind, shape in itertools.product(KINDS, SHAPES_OF_INPUTS):
        inputs = make(kind, case.models, shape, case.base)
        assert_same(case.kernel(inputs), inputs, None, 1, 1 << 16)


# ------------------------------------------------------------------------------------------------ in the engine

MODELS = ("a", "b", "c", "base")
PER_MODEL = {"weight": (0.7, 0.0, 0.4, 0.0), "density": (0.3, 0.5, 0.6, 0.0)}  # the base has none
MERGES: dict[str, tuple[str, Sequence[str], Mapping[str, Any], str | None]] = {
    "ties": ("ties", MODELS, PER_MODEL, None),
    "dare_ties": ("dare_ties", MODELS, PER_MODEL, "float16"),
    "della": ("della", MODELS, PER_MODEL | {"epsilon": (0.1, 0.2, 0.05, 0.0)}, None),
    "sce": ("sce", MODELS, {"select_topk": 0.3}, "float32"),
    "arcee_fusion": ("arcee_fusion", ("a", "base"), {}, None),
    "model_stock by row": ("model_stock", MODELS, {"filter_wise": True}, "float32"),
    "nuslerp by row": ("nuslerp", ("a", "b", "base"), {"weight": (0.3, 0.5, 0.0), "nuslerp_flatten": False}, None),
    "nuslerp by column": (
        "nuslerp",
        ("a", "b", "base"),
        {"weight": (0.3, 0.5, 0.0), "nuslerp_flatten": False, "nuslerp_row_wise": True},
        "float32",
    ),
}
TENSORS = {
    "model.embed_tokens.weight": (300, 256),
    **{f"model.layers.{layer}.mlp.up_proj.weight": (256, 512) for layer in range(2)},
    "model.norm.weight": (256,),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with three fine-tunes and their base."""
    directory = tmp_path_factory.mktemp("checkpoints")
    fills = {name: FineTune(Random(0), seed) for seed, name in enumerate("abc", 1)}
    for name in MODELS:
        write_checkpoint(directory / name, TENSORS, fill=fills.get(name, Random(0)))
    return directory


def recipe(directory: Path, name: str) -> dict[str, Any]:
    """The recipe of one of `MERGES`."""
    method, models, parameters, dtype = MERGES[name]
    per_model = {key: value for key, value in parameters.items() if isinstance(value, tuple)}
    return {
        "merge_method": method,
        "base_model": str(directory / "base"),
        "models": [
            {"model": str(directory / model), "parameters": {key: value[at] for key, value in per_model.items()}}
            for at, model in enumerate(models[:-1])
        ],
        "parameters": {key: value for key, value in parameters.items() if key not in per_model},
        **({"out_dtype": dtype} if dtype else {}),
    }


def wanted_bytes(directory: Path, name: str, seed: int) -> dict[str, bytes]:
    """The oracle's bytes of each output tensor. A model of weight 0 counts as an input."""
    method, models, parameters, dtype = MERGES[name]
    inputs = [read_model(directory / model) for model in models]
    wanted = {}
    for tensor, shape in TENSORS.items():
        kernel = merge_methods()[method].kernel(InputSpec(len(models), len(models) - 1, shape), parameters)
        key = int.from_bytes(hashlib.blake2b(f"{seed}\0{tensor}".encode(), digest_size=8).digest(), "little")
        values = oracle.evaluate(kernel, [found[tensor] for found in inputs], key=key)
        wanted[tensor] = oracle.stored(values, getattr(torch, dtype or "bfloat16"))
    return wanted


def assert_merges_like_the_oracle(
    directory: Path, name: str, out: Path, patch: pytest.MonkeyPatch, sizes: Mapping[int, int]
) -> None:
    """Merge for each number of threads with a tile size, in chunks of a few blocks."""
    wanted = wanted_bytes(directory, name, seed=3)
    patch.setattr(schedule, "SLOT_BYTES", 128 << 10)
    for threads, tile in sizes.items():
        patch.setattr(budget, "TILE_ELEMENTS", tile)
        options = Options(max_ram=4 << 30, device="cpu", threads=threads, seed=3, keep_paths=True)
        planned = plan(recipe(directory, name), options)
        graph = planned.built.graph
        assert max(planned.schedule.chunks(graph, node) for node in graph) > 1
        merge(planned, out / str(threads))
        found = {
            key: value.view(torch.uint8).numpy().tobytes() for key, value in read_model(out / str(threads)).items()
        }
        assert found == wanted, f"{threads} threads, tiles of {tile} elements"


@pytest.mark.parametrize("name", ["della", "nuslerp by column"])
def test_a_merge(checkpoints: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_merges_like_the_oracle(checkpoints, name, tmp_path, monkeypatch, {2: 1 << 15})


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_in_any_number_of_threads(
    checkpoints: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_merges_like_the_oracle(checkpoints, name, tmp_path, monkeypatch, {1: 1 << 19, 2: 1 << 15, 5: 1 << 16})


# ------------------------------------------------------------------------------------------------ random expressions


def assert_random_expression(seed: int) -> None:
    """Two of three are of finite inputs; the others of NaNs of several payloads and of infinities as well."""
    shape, count, base = SHAPES[seed % len(SHAPES)], 2 + seed % 3, (None, 0, 1)[seed // 2 % 3]
    inputs = hard_inputs(seed, count, shape, finite=seed % 3 > 0)
    assert_same(random_kernel(seed, count, base, shape), inputs, None, 20_000)


@pytest.mark.parametrize("seed", range(examples(20)))
def test_a_random_expression(seed: int) -> None:
    assert_random_expression(seed)


@pytest.mark.parametrize("first", range(20, 200, 10))
def test_another_random_expression(first: int) -> None:
    for seed in range(first, first + 10):
        assert_random_expression(seed)


# ------------------------------------------------------------------------------------------------ compositions

TWO_STAGES = [
    ("della", "ties"),
    ("ties", "della"),
    ("dare_ties", "breadcrumbs"),
    ("sce", "nuslerp"),
    ("nuslerp", "sce"),
]
STAGE: Mapping[str, Mapping[str, Any]] = {
    "ties": {"weight": (0.0, 1.0, 0.5), "density": (1.0, 0.4, 0.7)},
    "della": {"weight": (0.0, 1.0, 0.5), "density": (1.0, 0.4, 0.7), "epsilon": (0.0, 0.1, 0.2)},
    "dare_ties": {"weight": (0.0, 1.0, 0.5), "density": (1.0, 0.4, 0.7)},
    "breadcrumbs": {"weight": (0.0, 1.0, 0.5), "density": (1.0, 0.4, 0.7), "rescale": True},
    "sce": {"select_topk": 0.3},
    "nuslerp": {"weight": (0.0, 1.0, 0.5), "nuslerp_flatten": False, "nuslerp_row_wise": True},
}


def composition(first: str, second: str, shape: tuple[int, ...], round_to: str | None) -> Composition:
    """The first method of inputs 0, 1 and 2; the second of input 0, the first's result and input 3."""
    methods = merge_methods()
    kernels = [methods[name].kernel(InputSpec(3, 0, shape), STAGE[name]) for name in (first, second)]
    parts = [
        Part(kernels[0], (0, 1, 2), KEY, (0, 1, 2), round_to),
        Part(kernels[1], (0, ~0, 3), KEY + 1, (0, 1, 2)),
    ]
    return Composition(InputSpec(4, None, shape), parts)


@pytest.mark.parametrize(("first", "second"), TWO_STAGES)
def test_a_composition(first: str, second: str) -> None:
    kernel = composition(first, second, (300, 128), "bfloat16")
    assert_same(kernel, make("lattice", 4, (300, 128), 0), 1)


@pytest.mark.parametrize("round_to", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["mixed", "float64"])
@pytest.mark.parametrize(("first", "second"), TWO_STAGES)
def test_a_composition_of_any_inputs(first: str, second: str, kind: str, round_to: str | None) -> None:
    for shape in ((331, 517), (70_001,)):
        assert_same(composition(first, second, shape, round_to), make(kind, 4, shape, 0), None, 1 << 15)


@pytest.mark.parametrize("shape", [(40, 9001), (60, 7168), (331, 1021)], ids=str)
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(lambda t: t.other * t.sum(t.row_rank(t.other) * t.other), id="sum"),
        pytest.param(lambda t: t.other * t.column_sum(t.row_rank(t.other) * t.other), id="sum of columns"),
        pytest.param(lambda t: t.other * t.sum(t.other / t.row_sum(t.other)), id="sum of rows' shares"),
    ],
)
def test_sums_of_what_is_computed_by_row(method: Callable[[Inputs], Array], shape: tuple[int, ...]) -> None:
    """A block of a sum has more rows than are computed between two calls of Python functions."""
    assert_same(kernel_of(method, 1, None, shape), make("float32", 1, shape), None, 1)


# ------------------------------------------------------------------------------------------------ the pieces


def hard_numbers(dtype: torch.dtype) -> Tensor:
    """Numbers of any size, ties between two bfloat16 or float16, and what lies next to them."""
    generator = np.random.default_rng(1)
    bits = generator.integers(0, 1 << 64, 30_000, dtype=np.uint64)
    narrow = bits.astype(np.uint32)
    ties = np.concatenate([narrow & 0xFFFF_0000 | 0x8000, narrow & 0xFFFF_F000]).astype(np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        numbers = torch.from_numpy(np.concatenate([narrow.view(np.float32), ties, ties * np.float32(2.0**-110)]))
    if dtype is torch.float32:
        return numbers
    wide = numbers.double()
    return torch.cat([wide, torch.nextafter(wide, wide * 2), torch.from_numpy(bits.view(np.float64)), wide * 2.0**-30])


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("source", [torch.float32, torch.float64])
def test_results_are_rounded_once(source: torch.dtype, target: torch.dtype) -> None:
    numbers = hard_numbers(source)
    found = torch.empty(numbers.shape, dtype=target)
    round_into(found, numbers)
    canonical_nans(found)
    assert found.view(torch.uint8).numpy().tobytes() == oracle.stored(numbers.numpy(), target)


@pytest.mark.parametrize("element", [0, (1 << 32) - 1000, (1 << 40) + 7])
def test_hashes(element: int) -> None:
    found, scratch = (torch.empty(3000, dtype=torch.int32) for _ in range(2))
    hashes(KEY, 5, element, found, scratch)
    wanted = oracle.hashes(KEY, 5, np.arange(element, element + 3000))
    assert np.array_equal(found.numpy().view(np.uint32), wanted)


def exponents() -> np.ndarray[Any, Any]:
    """Arguments of exp: the complete range, and small ones."""
    generator = np.random.default_rng(2)
    return np.concatenate([generator.uniform(-708, 709, 1500), generator.standard_normal(500) * 0.01, [-708, 0, 709]])


def positives() -> np.ndarray[Any, Any]:
    """Arguments of log: the complete range, and those close to 1 and to the bounds of the polynomial's argument."""
    generator = np.random.default_rng(3)
    near = 1 + generator.choice([-1, 1], 500) * 2.0 ** generator.uniform(-52, -1, 500)
    bounds = np.sqrt(2) * 2.0 ** generator.integers(-3, 3, 100) * (1 + generator.standard_normal(100) * 1e-15)
    return np.concatenate([2.0 ** generator.uniform(-1022, 1023.9, 1500), near, bounds, [2.0**-1022, 1.0, 2.0]])


@pytest.mark.parametrize(
    ("function", "exact", "sample"),
    [pytest.param(exp, mpmath.exp, exponents, id="exp"), pytest.param(log, mpmath.log, positives, id="log")],
)
def test_error_below_two_units_in_the_last_place(
    function: Callable[[Array], Array], exact: Callable[[Any], Any], sample: Callable[[], Any]
) -> None:
    x = sample()
    found = run_kernel(kernel_of(lambda t: function(t.other), 1, None, x.shape), [torch.from_numpy(x)]).output
    with mpmath.workprec(200):
        for argument, result in zip(x.tolist(), found.tolist(), strict=True):
            wanted = exact(mpmath.mpf(argument))
            assert abs(mpmath.mpf(result) - wanted) < 2 * mpmath.mpf(math.ulp(float(wanted))), argument
