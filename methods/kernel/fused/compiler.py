"""Compiles LLVM assembly to native code, and keeps the code in the user's cache directory.

llvmlite is used directly: it has LLVM's passes and code generator, takes 10 MiB less memory than numba at its start and
compiles a loop in a tenth of the time, because nothing is inferred from Python code.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import threading
from collections.abc import Callable
from typing import Any

from ....version import __version__
from . import code_cache

GENERATOR_VERSION = 1
"""Incremented when the same assembly must be compiled anew, for example after a change of LLVM's options."""

_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)
_lock = threading.Lock()
_loaded: dict[tuple[str, ...], Library] = {}


class Library:
    """The functions of one compiled module; they stay in memory until the process ends.

    Attributes:
        functions: functions by name. Each takes the address of its table, and runs without Python's lock.
    """

    def __init__(self, engine: Any, names: tuple[str, ...]) -> None:
        self._engine = engine
        self.functions: dict[str, Callable[[int], int]] = {
            name: _FUNCTION(engine.get_function_address(name)) for name in names
        }


def library(text: str, names: tuple[str, ...]) -> Library:
    """Compile a module, or load its code from memory or from the cache directory. Thread-safe.

    Args:
        text: LLVM assembly.
        names: functions that will be called.
    """
    key = (*target(), text)
    found = _loaded.get(key)
    if found is None:
        with _lock:  # LLVM compiles one module at a time in any case
            found = _loaded.get(key)
            if found is None:
                found = _loaded[key] = _load(text, names)
    return found


def _load(text: str, names: tuple[str, ...]) -> Library:
    import llvmlite.binding as llvm

    machine = target_machine(*target())
    key = cache_key(text, machine)
    code = code_cache.read(key)
    if code is None:
        code = compiled(text, machine)
        code_cache.write(key, code)
    module = llvm.parse_assembly("")
    module.triple = machine.triple
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return Library(engine, names)


def cache_key(text: str, machine: Any) -> str:
    """The name of a module's code in the cache: a hash of all that the code depends on."""
    import llvmlite

    parts = (GENERATOR_VERSION, __version__, llvmlite.__version__, *target(), machine.triple, text)
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=20).hexdigest()


@functools.cache
def target() -> tuple[str, str]:
    """The processor to compile for and its instruction sets, as LLVM names them: those of this machine."""
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def target_machine(processor: str, features: str) -> Any:
    """A new description of the machine to compile for, see `target`; an engine takes it over and frees it."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=processor, features=features, opt=3, reloc="pic", codemodel="jitdefault"
    )


def optimized(text: str, machine: Any) -> Any:
    """The module after LLVM's passes."""
    import llvmlite.binding as llvm

    module = llvm.parse_assembly(text)
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = True
    options.slp_vectorization = False  # it finds nothing in these loops, and takes a third of the time
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


def compiled(text: str, machine: Any) -> bytes:
    """The object code of a module."""
    return bytes(machine.emit_object(optimized(text, machine)))
