"""Finds quantized tensors: their values have no meaning without other tensors (scales, zero points).

A model says in two ways that it is quantized: config.json names the format, and the tensors have dtypes and names that
unquantized models don't have. Both are used, since each is missing from some models. A list of the names of scales is
never complete, so the dtype of the codes decides: a matrix of 8-bit numbers or packed integers is quantized if its
module has any other tensor next to weight and bias, whatever its name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache

from ...io.checkpoint.checkpoint import Checkpoint
from ...io.tensors.dtypes import DType
from ...io.tensors.dtypes import Kind as ElementKind
from ...io.tensors.refs import TensorRef
from ...io.tensors.table import described
from .checks.formats import declared_format, unknown_description
from .roles import is_buffer

_SCALES = ("_scale_inv", "_scale", "_scales", ".absmax", ".SCB")
"""Suffixes that follow a tensor's name in the name of its scale."""
_PACKED = ("qweight", "weight_packed")
"""Last components of packed weights' names; the module's other tensors belong to them, except the bias."""
_PACKED_ENDINGS = ("_blocks", "_packed")
_PARAMETERS = (".weight", ".bias")
"""Endings of most names, which none of the others match."""
_MARKERS = ("scaled_fp8",)
"""Tensors that say that all 8-bit floating-point numbers of a model have scales."""
_PACKED_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32")
"""Integer dtypes of codes. Those of 64 bits hold indices and shapes."""
_PARAMETER = re.compile(r"(?:\w*proj_)?(?:weight|bias)|(?:weight|bias)_[ih]h_l\d\w*|\w*_bias|bias_[kv]")
"""Last components of the names of parameters; all others next to codes may be their scales."""
_OF_CODES = re.compile(r"scale|absmax|zero|quant|format", re.IGNORECASE)
"""Words in the names of the tensors that belong to codes."""
_SCALE_WORDS = re.compile(
    r"(?:^|[_.])(?:(?:weight|input|output|act|activation|block)_|q|de)?"
    r"(?:scales?|scaling|absmax|zeros?|zero_points?|(?:de)?quant)"
    r"(?:_(?:inv|weight|input|output|act|factor|[0-9]+))?(?=[_.]|$)",
    re.IGNORECASE,
)
"""The part of a scale's name that isn't in the name of its codes: ``q_proj_scale``, ``scales.q_proj``."""
_LONGEST_NAME = 8
_PROJECTIONS = ("_proj", "_weight")


def quantized_tensors(checkpoint: Checkpoint, known: Collection[str] = ()) -> Mapping[str, str]:
    """The quantized tensors of a checkpoint and the tensors that belong to them, each with the reason.

    Args:
        checkpoint: the checkpoint.
        known: names of tensors that are left out: codes whose format is known, and what belongs to them there. Whatever
            else belongs to these codes is found.
    """
    tensors = checkpoint.tensors
    reasons = _by_name(tensors, known)
    declared = declared_format(checkpoint.config, checkpoint.metadata)
    if declared is None:
        declared = next((f"the tensor {name} marks scaled FP8" for name in _MARKERS if name in tensors), None)
    is_unknown = unknown_description(checkpoint.config) is not None
    codes: dict[str, list[str]] = {}
    for name, ref in described(tensors, lambda each: _may_be_codes(each.dtype)):
        if is_buffer(name, ref.shape):
            continue
        if declared is not None and name not in known:
            reason = f"{declared}, and it is {ref.dtype.name}"
            reasons[name] = f"{reason} of shape {list(ref.shape)}" if is_unknown else reasons.get(name, reason)
        if len(ref.shape) >= 2:
            codes.setdefault(name.rpartition(".")[0], []).append(name)
    modules = _modules_of_codes(codes)
    for name, ref in _others(tensors, known) if codes else ():
        owners = [*_owners(name, ref, codes, tensors)]
        if not owners and name not in reasons:  # few tensors of a quantized model are neither codes nor next to them
            owners += _distant_owners(name, ref, modules, tensors)
        for owner in owners:
            reasons.setdefault(name, f"it belongs to {owner}")
            if owner not in known:
                reasons.setdefault(owner, f"it is {tensors[owner].dtype.name}, and {name} belongs to it")
    return reasons


def _others(tensors: Mapping[str, TensorRef], known: Collection[str]) -> Iterable[tuple[str, TensorRef]]:
    """The tensors but for those that are known; references are only made of the others."""
    return ((name, tensors[name]) for name in tensors if name not in known) if known else tensors.items()


def _by_name(tensors: Mapping[str, TensorRef], known: Collection[str]) -> dict[str, str]:
    """The tensors whose names show that they are quantized, and their scales, but for those that are known."""
    reasons: dict[str, str] = {}
    packed: dict[str, str] = {}
    for name in (name for name in tensors if not name.endswith(_PARAMETERS) and name not in known):
        for ending in _SCALES:
            scaled = name.removesuffix(ending)
            if scaled == name:
                continue
            if ending == ".SCB":
                scaled += ".weight"
            if scaled in tensors:
                reasons[scaled] = f"{name} is its scale"
                reasons[name] = f"it is the scale of {scaled}"
        module, _, last = name.rpartition(".")
        if last in _PACKED:
            packed[module] = name
        if last in _PACKED or name.endswith(_PACKED_ENDINGS):
            reasons[name] = "its name is that of packed values"
    for name in tensors if packed else ():
        module, _, last = name.rpartition(".")
        if module in packed and last != "bias":
            reasons.setdefault(name, f"it belongs to {packed[module]}")
    return reasons


def _may_be_codes(dtype: DType) -> bool:
    if dtype.kind is ElementKind.FLOAT:
        return dtype.bits <= 8 and dtype.name != "F8_E8M0"  # a dtype of scales
    return dtype.name in _PACKED_INTEGERS


@lru_cache(4096)
def _meaning(last: str) -> tuple[bool, bool]:
    """Whether the last component of a name is a parameter's or a buffer's, and whether it says that codes own it."""
    belongs = _OF_CODES.search(last) is not None
    return not belongs and (_PARAMETER.fullmatch(last) is not None or is_buffer(last)), belongs


def _owners(
    name: str, ref: TensorRef, codes: Mapping[str, list[str]], tensors: Mapping[str, TensorRef]
) -> Iterator[str]:
    """The codes that a tensor may belong to: those in its module, and those whose name it extends."""
    module, _, last = name.rpartition(".")
    parent = module
    for _ in range(2):  # weight.quant_map, weight.quant_state.bitsandbytes__nf4: a parameter has no parameters
        above = parent.rpartition(".")[0]
        if parent and parent in codes.get(above, ()):
            yield parent
        parent = above
    siblings = codes.get(module)
    if siblings is None:
        return
    independent, named = _meaning(last)
    for code in siblings if not independent else ():
        owner = tensors[code]
        if code == name:
            continue
        # scales of blocks can be exponents in integers of 8 bits
        small = 4 * ref.elements <= owner.elements
        belongs = ref.dtype.kind is ElementKind.FLOAT or (small and ref.dtype.name in ("U8", "I8"))
        if owner.dtype.kind is ElementKind.FLOAT:
            # a model that was cast to FP8 has other parameters, too, but they are FP8 or not small
            belongs = belongs and small and ref.dtype != owner.dtype
        if belongs or named:
            yield code


def _modules_of_codes(codes: Mapping[str, list[str]]) -> dict[str, str]:
    """The codes by the names that their scales outside their modules may have without the word scale."""
    modules: dict[str, str] = {}
    for module, names in codes.items():
        for name in names:
            short = module if name == f"{module}.weight" else name
            modules.setdefault(name, name)
            modules.setdefault(short, name)
            if short.endswith(_PROJECTIONS):
                modules.setdefault(short.rpartition("_")[0], name)
    return modules


def _distant_owners(
    name: str,
    ref: TensorRef,
    modules: Mapping[str, str],
    tensors: Mapping[str, TensorRef],
) -> Iterator[str]:
    """The codes whose scale a tensor outside their module may be, by its name without the word scale.

    Without a small tensor of another dtype and such a name, they are values: those of a model that was cast to FP8.
    """
    module = name.rpartition(".")[0]
    for key in _names_of_owner(name) if modules else ():
        owner = modules.get(key)
        if owner is None or owner == name or owner.rpartition(".")[0] == module:
            continue
        if ref.dtype != tensors[owner].dtype and 4 * ref.elements <= tensors[owner].elements:
            yield owner
            return


def _names_of_owner(name: str) -> Iterator[str]:
    """The names that the codes or their module may have if this tensor is their scale."""
    module, _, last = name.rpartition(".")
    independent, named = _meaning(last)
    if named or _OF_CODES.search(module):
        yield _SCALE_WORDS.sub("", name).removeprefix(".")
    if independent:
        return
    words = last.split("_")[:_LONGEST_NAME]
    for length in range(len(words) - 1, 0, -1):
        for start in range(len(words) - length + 1):
            inner = "_".join(words[start : start + length])
            yield f"{module}.{inner}" if module else inner
