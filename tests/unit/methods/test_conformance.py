"""Conformance of every method: correct, independent of tiles, within its workspace, defined for edge cases."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mergeloom.methods import Array, Inputs, maximum, merge_methods, sign, where
from mergeloom.methods.kernel.arithmetic import ARITHMETIC
from mergeloom.methods.kernel.expression import reachable
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.spec import BLOCK, InputSpec, MethodError, Unit
from mergeloom.methods.kernel.torch_backend import counting
from tests.support.methods import reference
from tests.support.methods.cases import CASES, Case, make
from tests.support.methods.expected import expected as expected_of
from tests.support.methods.kernels import kernel_of, merge, run_kernel
from tests.support.paths import ROOT

KEY = 0x1234_5678_9ABC_DEF1
SHAPE = (331, 1021)  # more than 2^18 elements, and no power of two anywhere
IDS = [str(case) for case in CASES]
COMPUTED = [case for case in CASES if case.method != "passthrough" or case.parameters]
"""The cases whose kernels do arithmetic instead of copying."""


def expected(case: Case, x: Sequence[Tensor], inputs: Sequence[Tensor]) -> reference.Expected:
    """The outputs of the reference; `x` are the inputs in float64."""

    def masks() -> list[list[Tensor]]:
        kept = [[mask] for mask in drawn(case, inputs)]
        if not case.parameters.get("unbiased"):
            return kept
        density = case.parameters.get("density", (1.0,) * len(x))
        epsilon = case.parameters.get("epsilon", (0.0,) * len(x))
        others = [i for i in range(len(x)) if i != case.base]
        chances = [odds(x[i] - x[case.base or 0], density[i], epsilon[i]) for i in others]
        return [[mask / chance] for (mask,), chance in zip(kept, chances, strict=True)]

    return expected_of(case.method, x, base=case.base, parameters=case.parameters, drawn=masks)


def drawn(case: Case, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Which elements a random method keeps of each model: a merge of that model alone leaves the base there."""
    masks = []
    for i in range(len(inputs)):
        if i == case.base:
            continue
        alone = {k: v for k, v in case.parameters.items() if k in ("density", "epsilon")}
        alone = {k: (0.0, v[i]) for k, v in alone.items()} | {"weight": (0.0, 1.0), "rescale": False}
        method = "della_linear" if case.method.startswith("della") else "dare_linear"
        pair = [torch.zeros_like(inputs[i]), torch.ones_like(inputs[i])]
        if method == "della_linear":
            pair = [inputs[case.base or 0], inputs[i]]
        out = merge(method, pair, alone, base=0, key=KEY, positions=[case.base or 0, i])
        masks.append((out != pair[0]).double())
    return masks


def odds(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """The probability with which an element is kept."""
    columns = delta.shape[-1] if delta.dim() else 1
    if not epsilon or density in (0, 1) or columns == 1:
        return torch.full_like(delta, density or 1.0)
    rank = torch.empty_like(delta)
    order = torch.argsort(delta.abs().float(), dim=-1, stable=True)
    steps = torch.arange(columns, dtype=torch.float64).expand_as(delta)
    rank.scatter_(-1, order, steps.contiguous())
    return density - epsilon + 2 * epsilon * rank / (columns - 1)


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(x.abs().clamp(min=info.tiny)))
    return info.eps * torch.exp2(exponent)


def multiplies_scalars(kernel: Kernel) -> bool:
    """Whether results of Python functions are among the operands of the output's arithmetic: float32, always."""
    return any(
        arg.op in ("host", "item") for node in reachable(kernel.output) if node.op in ARITHMETIC for arg in node.args
    )


def assert_conforms(
    output: Tensor, wanted: reference.Expected, dtype: torch.dtype, models: int, *, scaled: bool = False
) -> None:
    """Within one unit in the last place of the output's dtype, and the rounding of the work dtype and of scalars."""
    found = output.to(dtype).double()
    step = 2.0**-50 if dtype is torch.float64 and not scaled else 2.0**-23
    fits = torch.zeros_like(found, dtype=torch.bool)
    for candidate in wanted.outputs:
        fits |= (found - candidate).abs() <= ulp(candidate, dtype) + models * step * wanted.size
    if not fits.all():
        place = tuple((~fits).nonzero()[0].tolist())
        values = [float(candidate[place]) for candidate in wanted.outputs]
        pytest.fail(f"{int((~fits).sum())} of {fits.numel()} differ; at {place}: {float(found[place])}, not {values}")


def same_bytes(a: Tensor, b: Tensor) -> bool:
    integers = torch.int64 if a.dtype is torch.float64 else torch.int32
    return torch.equal(a.view(integers), b.view(integers))


def test_every_method_has_a_case() -> None:
    assert {case.method for case in CASES} == set(merge_methods())


@pytest.mark.parametrize("kind", ["lattice", "float32", "mixed", "float64"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_agrees_with_the_reference(case: Case, kind: str) -> None:
    shape = (67, 499)
    inputs = make(kind, case.models, shape, case.base)
    kernel = case.kernel(inputs)
    output = run_kernel(kernel, inputs, key=KEY).output
    dtype = {"lattice": torch.bfloat16, "float64": torch.float64}.get(kind, torch.float32)
    wanted = expected(case, [x.double() for x in inputs], inputs)
    assert_conforms(output, wanted, dtype, case.models, scaled=multiplies_scalars(kernel))
    if kind == "lattice":
        assert_conforms(output, wanted, torch.float32, case.models)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 1), (1, 4), (2, 3, 5), (40_000,), (3, 20_000)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_any_shape(case: Case, shape: tuple[int, ...]) -> None:
    inputs = make("float32", case.models, shape, case.base)
    output = run_kernel(case.kernel(inputs), inputs, key=KEY).output
    wanted = expected(case, [x.double() for x in inputs], inputs)
    assert_conforms(output, wanted, torch.float32, case.models + 1)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_bytes_do_not_depend_on_tiles_or_threads(case: Case) -> None:
    for kind in ("lattice", "float32"):
        inputs = make(kind, case.models, SHAPE, case.base)
        kernel = case.kernel(inputs)
        whole = run_kernel(kernel, inputs, key=KEY)
        lengths = {max(1, tile // kernel.alignment) * kernel.alignment for tile in (1, 1 << 15, 1 << 18)}
        for tile in sorted(lengths):
            run = run_kernel(kernel, inputs, tile, key=KEY)
            assert same_bytes(run.output, whole.output)
            assert run.used <= run.declared
            assert run.passes == whole.passes
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(4)
            assert same_bytes(run_kernel(kernel, inputs, 1 << 18, key=KEY).output, whole.output)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_random_exactly_if_declared(case: Case) -> None:
    inputs = make("lattice", case.models, (64, 512), case.base)
    kernel = case.kernel(inputs)
    outputs = [run_kernel(kernel, inputs, key=key).output for key in (KEY, KEY + 1)]
    assert same_bytes(*outputs) != kernel.random
    if not kernel.random:
        places = [i + 7 for i in range(case.models)]
        assert same_bytes(outputs[0], run_kernel(kernel, inputs, key=KEY, positions=places).output)


def digests(*, device: str = "cpu") -> dict[str, str]:
    """For each case a digest of the output's bytes."""
    found = {}
    for case in CASES:
        inputs = [x.to(device) for x in make("lattice", case.models, (131, 517), case.base)]
        output = run_kernel(case.kernel(inputs), inputs, 1 << 15, key=KEY).output.cpu()
        found[str(case)] = hashlib.sha256(output.numpy().tobytes()).hexdigest()
    return found


@pytest.mark.parametrize("level", ["avx2", "default"])
def test_bytes_do_not_depend_on_the_instruction_set(level: str) -> None:
    environment = os.environ | {
        "ATEN_CPU_CAPABILITY": level,
        "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR",
    }
    suite = "from tests.unit.methods import test_conformance as suite"
    program = f"import json; {suite}; print(json.dumps(suite.digests()))"
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == digests()


class Elsewhere(str):
    """A device that torch takes for the CPU, and mergeloom for another one."""

    type = "elsewhere"


def test_paths_of_other_devices_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = digests()
    counted: list[int] = []
    count = counting.count_on_device
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "device", property(lambda tensor: Elsewhere("cpu")))
        patch.setattr(counting, "count_on_device", lambda *args: counted.append(1) or count(*args))
        elsewhere = digests()
    assert counted
    assert elsewhere == usual


@pytest.mark.gpu
def test_bytes_are_the_same_on_a_gpu() -> None:
    assert digests(device="cuda") == digests()


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_many_models_within_the_workspace(case: Case) -> None:
    method = merge_methods()[case.method]
    models = case.models if method.maximum is not None else case.models + 7
    inputs = make("float64", models, (9, 4099), case.base)
    parameters = {
        k: v + v[-1:] * (models - case.models) if isinstance(v, tuple) else v for k, v in case.parameters.items()
    }
    kernel = Case(case.method, models, case.base, parameters).kernel(inputs)
    for elements in (None, 1 << 15):
        run = run_kernel(kernel, inputs, elements, key=KEY)
        assert run.used <= run.declared
        assert torch.isfinite(run.output).all()


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_empty_tensor(case: Case) -> None:
    for shape in ((0,), (0, 4), (4, 0)):
        inputs = [torch.zeros(shape) for _ in range(case.models)]
        assert run_kernel(case.kernel(inputs), inputs).output.shape == shape


Make = Callable[[int, int | None], list[Tensor]]
DEGENERATE: dict[str, Make] = {
    "zeros": lambda models, base: [torch.zeros(6, 50)] * models,
    "equal models": lambda models, base: make("float32", 1, (6, 50)) * models,
    "only the base is zero": lambda models, base: [torch.full((6, 50), float(i != base)) for i in range(models)],
    "opposite": lambda models, base: [
        x * (0 if i == base else (-1) ** i) for i, x in enumerate(make("float32", 1, (6, 50)) * models)
    ],
    "tiny": lambda models, base: [x * 1e-30 for x in make("float32", models, (6, 50), base)],
    "huge": lambda models, base: [x * 1e15 for x in make("float32", models, (6, 50), base)],
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_degenerate_inputs_give_numbers(case: Case, name: str) -> None:
    inputs = DEGENERATE[name](case.models, case.base)
    output = run_kernel(case.kernel(inputs), inputs, key=KEY).output
    assert torch.isfinite(output).all()
    partial = case.method in ("linear", "passthrough", "multislerp") and case.parameters
    if name in ("zeros", "equal models") and not partial and case.method != "nuslerp":
        torch.testing.assert_close(output, inputs[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("case", COMPUTED, ids=[str(case) for case in COMPUTED])
def test_kernels_propagate_nonfinite_values(case: Case, value: float) -> None:
    """Those of all inputs that the kernel uses; the others, of weight or density 0, change no byte."""
    sound = make("float32", case.models, (9, 1000), case.base)
    kernel = case.kernel(sound)
    assert kernel.propagates_nonfinite
    for place in range(case.models):
        inputs = [x.clone() for x in sound]
        inputs[place][4, 567] = value
        output = run_kernel(kernel, inputs, key=KEY).output
        if place in kernel.used:
            assert not torch.isfinite(output).all()
        else:
            assert same_bytes(output, run_kernel(kernel, sound, key=KEY).output)


@pytest.mark.parametrize(
    ("function", "propagates"),
    [
        (lambda t: t.models[0] * (t.models[1] > 0), False),
        (lambda t: maximum(t.models[0], t.models[1]), False),
        (lambda t: where(t.models[0] > 0, t.models[0], t.models[1]), False),
        (lambda t: sign(t.models[0]) + t.models[1], False),
        (lambda t: t.models[0] / t.models[1], False),
        (lambda t: t.models[0] * t.sum(t.models[1]), False),
        (lambda t: t.models[0] * t.row_sum(t.models[1]), False),
        (lambda t: t.models[0] * (t.models[1] > 0) + t.models[1], True),
        (lambda t: where(t.models[0] > 0, t.models[0] - t.models[1], t.models[0] + t.models[1]), True),
        (lambda t: t.models[0] * t.largest(t.models[0], 50) - abs(t.models[1]), True),
        (lambda t: t.models[0] * t.sum(t.models[0]), True),
    ],
)
def test_whether_nonfinite_values_reach_the_output_is_derived(
    function: Callable[[Inputs], Array], propagates: bool
) -> None:
    """Where not, the engine checks the inputs as well."""
    kernel = kernel_of(function, 2, None, (9, 100))
    assert kernel.propagates_nonfinite == propagates
    for place in kernel.used if propagates else ():
        for value in (float("nan"), float("inf"), float("-inf")):
            inputs = [x.clone() for x in make("float32", 2, (9, 100))]
            inputs[place][4, 56] = value
            assert not bool(torch.isfinite(run_kernel(kernel, inputs).output[4, 56]))


WEIGHTED = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "breadcrumbs_ties")


@pytest.mark.parametrize("method", [*WEIGHTED, "della_linear"])
def test_a_model_of_weight_0_is_not_used_and_changes_no_byte(method: str) -> None:
    """Masks depend on the recipe position, so those of the other models stay as they are."""
    inputs = make("lattice", 4, (67, 499), 0)
    parameters = {"weight": (1.0, 0.7, 0.0, 0.4)}
    if method not in ("linear", "task_arithmetic"):
        parameters["density"] = (1.0, 0.5, 0.5, 0.6)
    complete = Case(method, 4, 0, parameters).kernel(inputs)
    assert complete.used == (0, 1, 3)
    less = {name: tuple(values[i] for i in complete.used) for name, values in parameters.items()}
    read = [inputs[i] for i in complete.used]
    wanted = run_kernel(Case(method, 3, 0, less).kernel(read), read, key=KEY, positions=complete.used)
    kernel = complete.with_used_inputs()
    assert (kernel.kept, kernel.inputs.count) == (complete.used, 3)
    assert kernel.with_used_inputs() is kernel
    assert kernel.resized((5, 7)).inputs == InputSpec(3, kernel.inputs.base, (5, 7))
    for tile in (None, 1 << 15):
        assert same_bytes(run_kernel(kernel, read, tile, key=KEY, positions=complete.used).output, wanted.output)
    assert same_bytes(run_kernel(complete, inputs, key=KEY).output, wanted.output)


def test_alignment_is_a_multiple_of_rows_for_row_kernels() -> None:
    of_rows = set()
    for case in CASES:
        kernel = case.kernel(make("lattice", case.models, (12, 345), case.base))
        if kernel.unit is Unit.ROW:
            assert kernel.alignment % 345 == 0
            of_rows.add(case.method)
    assert of_rows == {"arcee_fusion", "della", "della_linear", "model_stock", "nuslerp"}


@pytest.mark.parametrize(
    ("shape", "alignment"), [((32_001, 4096), 251 * 4096), ((301, 1003), 32 * 1003), ((4096, 5120), 32 * 5120)], ids=str
)
def test_tiles_of_column_sums_are_aligned_to_their_blocks_alone(shape: tuple[int, int], alignment: int) -> None:
    """At most 128 blocks of at least 32 slices, whatever the blocks of other sums."""
    parameters = {"weight": (1.0, 1.0), "nuslerp_flatten": False, "nuslerp_row_wise": True}
    assert merge_methods()["nuslerp"].kernel(InputSpec(2, None, shape), parameters).alignment == alignment
    mixed = kernel_of(lambda t: t.other * t.column_sum(t.other) * t.sum(t.other), 1, None, shape)
    assert mixed.alignment == math.lcm(alignment, BLOCK)


@pytest.mark.parametrize(
    ("method", "models", "base", "parameters", "says"),
    [
        ("linear", 2, None, {"weight": (1.0, -1.0)}, "sum to 0"),
        ("multislerp", 2, None, {"weight": (1.0, -1.0)}, "sum to 0"),
        ("della", 2, 0, {"weight": (0.0, 1.0), "density": (0.0, 0.1)}, "between 0 and 1"),
        ("passthrough", 2, None, {}, "takes 1 model, got 2"),
        ("slerp", 3, 0, {"t": 0.5}, "takes 1 model besides the base"),
        ("slerp", 2, None, {"t": 0.5}, "takes 1 model besides the base, got 2"),
        ("ties", 2, 0, {}, "needs the parameter weight"),
        ("ties", 2, 0, {"weight": (0.0, 1.0), "wieght": 1}, "no parameter wieght"),
        ("ties", 2, 0, {"weight": (0.0, float("nan"))}, "finite"),
        ("model_stock", 2, 0, {}, "takes 2 or more"),
        ("nearswap", 2, 0, {"t": 0.1, "eps": 0.0}, "above 0"),
    ],
)
def test_mistakes_are_named(method: str, models: int, base: int | None, parameters: dict[str, Any], says: str) -> None:
    with pytest.raises(MethodError, match=says):
        merge_methods()[method].kernel(InputSpec(models, base, (3, 4)), parameters)
