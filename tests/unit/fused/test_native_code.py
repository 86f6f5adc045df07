"""The generated code is vectorized, in the types of its expression, without contracted operations."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from typing import Any

import pytest

from mergeloom.methods import merge_methods
from mergeloom.methods.formats.fp8_encoder import FP8_BLOCKS
from mergeloom.methods.kernel.access import SameRows, Whole
from mergeloom.methods.kernel.decoder import Decoder, low_rank
from mergeloom.methods.kernel.fused import compiler
from mergeloom.methods.kernel.fused.compiled import Compiled
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.spec import InputSpec
from tests.support.methods.cases import CASES, Case, make
from tests.support.methods.kernels import run_fused
from tests.support.methods.stored import KINDS, Maker, merged

INTEL = pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86-64")
PROCESSORS = {"AVX2": ("haswell", ""), "AVX-512": ("skylake-avx512", "-prefer-256-bit")}
LANES = {"AVX2": 8, "AVX-512": 16}


def kernel_of_method(method: str, count: int, base: int | None = None) -> Kernel:
    parameters: dict[str, Any] = {"t": 0.3} if method == "slerp" else {"weight": tuple(0.1 + i for i in range(count))}
    if method in ("ties", "dare_ties"):
        parameters["density"] = (0.5,) * count
    return merge_methods()[method].kernel(InputSpec(count, base, (64, 4096)), parameters)


def optimized(kernel: Kernel, dtypes: Sequence[str], processor: str) -> str:
    """The assembly of a kernel's loops after LLVM's passes."""
    compiled = Compiled(kernel, dtypes, "BF16")
    return str(compiler.optimized(compiled.assembly, compiler.target_machine(*PROCESSORS[processor])))


def vector_operations(text: str, operation: str) -> list[str]:
    """The types of the vectors that an operation is applied to."""
    return re.findall(rf"{operation} (<\d+ x \w+>)", text)


@INTEL
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("count", [2, 8, 16, 32])
def test_the_loop_over_elements_is_vectorized(count: int, processor: str) -> None:
    """One multiplication per input and one addition for each but the first, all of vectors of float32."""
    text = optimized(kernel_of_method("linear", count), ["BF16"] * count, processor)
    body = re.search(r"^vector\.body.*?^\S", text, re.DOTALL | re.MULTILINE)
    assert body is not None
    products, sums = vector_operations(body[0], "fmul"), vector_operations(body[0], "fadd")
    assert len(products) >= count
    assert len(products) - len(sums) == len(products) // count  # unrolled or not
    assert set(products + sums) == {f"<{LANES[processor]} x float>"}
    assert "double" not in body[0]
    assert not re.search(r"\b(fmul|fadd) float", body[0])


@INTEL
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize(("method", "base"), [("task_arithmetic", 0), ("ties", 0), ("dare_ties", 0), ("slerp", 0)])
def test_loops_of_methods_compute_in_float32(method: str, base: int, processor: str) -> None:
    kernel = kernel_of_method(method, 2 if method == "slerp" else 4, base)
    text = optimized(kernel, ["BF16"] * kernel.inputs.count, processor)
    bodies = re.findall(r"define internal[^@]*@(\w+_segment)\(.*?\n}", text, re.DOTALL)
    loops = re.findall(r"^vector\.body.*?^\S", text, re.DOTALL | re.MULTILINE)
    assert len(loops) >= max(1, len(bodies))
    assert any(vector_operations(loop, "fsub|fmul") for loop in loops)


@INTEL
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("case", [case for case in CASES[::3] if case.parameters], ids=str)
def test_no_multiplication_and_addition_are_contracted(case: Case, processor: str) -> None:
    inputs = make("mixed", case.models, (64, 512), case.base)
    compiled = Compiled(case.kernel(inputs), ["F32", "F16", "BF16", "F16"][: case.models], "BF16")
    machine = compiler.target_machine(*PROCESSORS[processor])
    text = machine.emit_assembly(compiler.optimized(compiled.assembly, machine))
    assert "mulps" in text
    assert not re.search(r"\tvf(n?m(add|sub)|madd|msub)\w*\t", text)


@INTEL
@pytest.mark.parametrize("processor", ["AVX2", "AVX-512"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_do_not_depend_on_the_instruction_set(
    case: Case, processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if processor == "AVX-512" and "+avx512bw" not in compiler.target()[1]:
        pytest.skip("this processor has no AVX-512")
    inputs = make("mixed", case.models, (83, 517), case.base)
    kernel = case.kernel(inputs)
    own = run_fused(kernel, inputs, 1, key=5)
    monkeypatch.setattr(compiler, "target", lambda: PROCESSORS[processor])
    assert run_fused(kernel, inputs, 1, key=5) == own


# ------------------------------------------------------------------------------------------------ stored parts


@INTEL
@pytest.mark.parametrize("processor", PROCESSORS)
def test_low_rank_products_are_vectorized_and_not_contracted(processor: str) -> None:
    shape = (64, 4096)
    spec = InputSpec(2, None, shape, (SameRows(), Whole()), ((64, 32), (32, 4096)))
    compiled = Compiled(Decoder("product", low_rank).kernel(spec, {}), ["BF16", "BF16"], "BF16")
    machine = compiler.target_machine(*PROCESSORS[processor])
    module = compiler.optimized(compiled.assembly, machine)
    step = re.search(r"define internal[^@]*@add_ranks\..*?\n}", str(module), re.DOTALL)
    assert step is not None
    products, sums = vector_operations(step[0], "fmul"), vector_operations(step[0], "fadd")
    assert len(products) == len(sums) >= 4
    assert set(products + sums) == {"<16 x float>"}
    packed = re.search(r"define internal[^@]*@pack_lines\..*?\n}", str(module), re.DOTALL)
    assert packed is not None
    assert re.search(r"store <16 x (i32|float)>", packed[0])
    text = machine.emit_assembly(module)
    code = text[text.index("add_ranks.float:") :].split(".Lfunc_end")[0]
    register = {"AVX2": "ymm", "AVX-512": "zmm"}[processor]
    assert len(re.findall(rf"\tvmulps\t.*{register}", code)) == len(re.findall(rf"\tvaddps\t.*{register}", code)) >= 4
    assert "(%rsp)" not in code  # the sums stay in registers
    assert not re.search(r"\tvf(n?m(add|sub)|madd|msub)\w*\t", text)


@INTEL
@pytest.mark.parametrize("processor", ["AVX2", "AVX-512"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_of_parts_do_not_depend_on_the_instruction_set(
    kind: str, processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if processor == "AVX-512" and "+avx512bw" not in compiler.target()[1]:
        pytest.skip("this processor has no AVX-512")
    shape = (83, 517)
    models = [KINDS[kind](Maker(seed, shape)) for seed in (1, 2)]
    kernel, parts = merged("slerp", models, shape, {"t": 0.3}, 0)
    own = run_fused(kernel, parts, 1)
    monkeypatch.setattr(compiler, "target", lambda: PROCESSORS[processor])
    assert run_fused(kernel, parts, 1) == own


# ------------------------------------------------------------------------------------------------ blocks


@INTEL
@pytest.mark.parametrize("processor", PROCESSORS)
def test_loops_over_blocks_are_vectorized(processor: str) -> None:
    """Maxima are those of integers, of which a vector is compared at a time; scales are computed for complete lines."""
    parameters = {"rows": 128, "columns": 128, "scale_dtype": "F8_E8M0"}
    kernel = FP8_BLOCKS.kernel(InputSpec(1, None, (256, 4096)), parameters)
    compiled = Compiled(kernel, ["BF16"], "F8_E4M3", "F8_E8M0")
    text = str(compiler.optimized(compiled.assembly, compiler.target_machine(*PROCESSORS[processor])))
    functions = dict(re.findall(r"define [^@]*@([\w.]+)\((.*?\n})", text, re.DOTALL))
    bodies = {
        name: re.findall(r"^vector\.body.*?^\S", function, re.DOTALL | re.MULTILINE)
        for name, function in functions.items()
    }
    lanes = LANES[processor]
    (found,), (lines,), (codes,) = (bodies[f"output_{name}"] for name in ("0_segment0", "1_lines0", "1_segment0"))
    assert f"llvm.umax.v{lanes}i32" in found
    assert f"llvm.umax.v{lanes}i32" in bodies["block_expand.float"][0]
    assert vector_operations(lines, "fdiv") == [f"<{lanes} x float>"] * lines.count("fdiv")
    assert vector_operations(codes, "fdiv") == [f"<{lanes} x float>"] * codes.count("fdiv")
    assert codes.count("fdiv") == codes.count(f"store <{lanes} x i8>") >= 1  # the scale's division is in the lines
    assert not any("double" in body for found in bodies.values() for body in found)
