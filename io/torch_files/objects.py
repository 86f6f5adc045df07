"""The objects that a pickle of tensors may name, and what mergeloom makes of them: plain descriptions, no code.

The list follows ``torch._utils`` and what ``torch.load(weights_only=True)`` allows; it has only the names that
dense tensors need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ..open_source import quoted
from ..tensors.dtypes import DTYPES, DType, Kind

_MAX_DIMENSION = 1 << 63
_MAX_KEY = 1 << 31
_MAX_DIMENSIONS = 64


class Unsupported(ValueError):
    """A pickle has something that tensors do not need; the text continues the name of the file's pickle."""


def shown(value: object) -> str:
    """Describe a value for an error: texts and numbers quoted, others by what they are."""
    if isinstance(value, Global):
        return value.name
    if isinstance(value, tuple | list) and all(type(each) in (int, str) for each in value[:9]):
        return quoted(value)
    if isinstance(value, str | bytes | int | float | None):
        return quoted(value)
    names = {dict: "a dict", Attributed: "an OrderedDict", list: "a list", tuple: "a tuple", Storage: "a storage"}
    return names.get(type(value), "a tensor")


class Attributed(dict[Any, Any]):
    """A ``collections.OrderedDict``, the only object that may have attributes (such as ``_metadata``)."""


@dataclass(frozen=True, slots=True)
class Storage:
    """The bytes that tensors share.

    Args:
        key: name of the storage in the file.
        dtype: dtype of its elements; None for bytes without a dtype.
        elements: number of elements; of bytes, without a dtype.
    """

    key: str
    dtype: DType | None
    elements: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.elements if self.dtype is None else self.dtype.nbytes(self.elements)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor: some elements of a storage.

    Args:
        storage: the storage.
        dtype: the dtype.
        offset: index of the first element in the storage.
        shape: the shape; () for a 0-d tensor.
        strides: for each dimension, the distance of two neighboring elements in the storage.
    """

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Global:
    """An allowed name in a pickle.

    Args:
        name: its full name.
        build: what calling it with arguments gives; None if it is only a name, such as a dtype.
        dtype: the dtype that it names, or that of the elements of the storages of this class.
        storage: whether it is a class of storages.
    """

    name: str
    build: Callable[[tuple[Any, ...]], Any] | None = None
    dtype: DType | None = None
    storage: bool = False


def storage_of(identifier: object) -> Storage:
    """Make a storage from a persistent id: ("storage", class, key, device, elements), in old files with a view.

    Raises:
        Unsupported: it is something else, or a part of another storage.
    """
    parts = identifier if isinstance(identifier, tuple) else ()
    if parts[:1] == ("module",):
        raise Unsupported("holds the source code of a class: save `model.state_dict()` instead of the model")
    if len(parts) == 6 and parts[5] is None:
        parts = parts[:5]
    if len(parts) != 5 or type(parts[0]) is not str or parts[0] != "storage":
        raise Unsupported(f"refers to {shown(identifier)}, which is not a storage")
    _, kind, key, device, elements = parts
    if not isinstance(kind, Global) or not kind.storage or type(key) is not str or type(device) is not str:
        raise Unsupported(f"refers to the storage {shown(identifier)}, which has no class, key or device")
    if device.partition(":")[0] == "meta":
        raise Unsupported(f"has the storage {shown(key)} on the device 'meta', so its values were not saved")
    return Storage(key, kind.dtype, _natural(elements, "elements of a storage"))


# ------------------------------------------------------------------------------------------------ functions


def set_items(target: dict[Any, Any], items: Iterable[tuple[object, object]]) -> None:
    """Add keys and values to a dictionary.

    Raises:
        Unsupported: a key is not a text or a number, or occurs twice.
    """
    for key, value in items:
        if type(key) is int and _MAX_KEY <= abs(key) < _MAX_DIMENSION:
            # numbers hash alike in every process, so a file could choose them to make its dictionary slow
            key = f"{key:,}"
        if type(key) is not str and (type(key) is not int or abs(key) >= _MAX_KEY):
            raise Unsupported(f"has the key {shown(key)}, which is not a text or a number of 64 bits")
        if key in target:
            raise Unsupported(f"has the key {shown(key)} more than once")
        target[key] = value


def _ordered_dict(arguments: tuple[Any, ...]) -> Attributed:
    """``OrderedDict()``, and ``OrderedDict([[key, value], ...])``, as Python 2 pickles it."""
    found = Attributed()
    pairs = arguments[0] if len(arguments) == 1 else arguments
    if not isinstance(pairs, list | tuple) or any(type(pair) is not list or len(pair) != 2 for pair in pairs):
        raise Unsupported("makes a collections.OrderedDict of something that is not a list of pairs")
    set_items(found, pairs)
    return found


def _size(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    if len(arguments) != 1:
        raise Unsupported("makes a torch.Size of more than one tuple")
    return _numbers(arguments[0], "torch.Size")


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    """``_rebuild_tensor(storage, offset, size, stride)``."""
    if len(arguments) != 4:
        raise Unsupported(f"makes a tensor from {len(arguments)} arguments")
    return _stored(arguments, None)


def _tensor_v2(arguments: tuple[Any, ...]) -> StoredTensor:
    """``_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks, metadata=None)``."""
    if len(arguments) not in (6, 7):
        raise Unsupported(f"makes a tensor from {len(arguments)} arguments")
    return _checked(_stored(arguments[:4], None), arguments[4], arguments[5], arguments[6:])


def _tensor_v3(arguments: tuple[Any, ...]) -> StoredTensor:
    """``_rebuild_tensor_v3(storage, offset, size, stride, requires_grad, backward_hooks, dtype, metadata=None)``."""
    if len(arguments) not in (7, 8):
        raise Unsupported(f"makes a tensor from {len(arguments)} arguments")
    named = arguments[6]
    if not isinstance(named, Global) or named.dtype is None or named.storage:
        raise Unsupported(f"makes a tensor with the dtype {shown(named)}")
    return _checked(_stored(arguments[:4], named.dtype), arguments[4], arguments[5], arguments[7:])


def _parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    """``_rebuild_parameter(data, requires_grad, backward_hooks)``."""
    if len(arguments) != 3 or not isinstance(arguments[0], StoredTensor):
        raise Unsupported("makes a parameter of something that is not a tensor")
    return _checked(arguments[0], arguments[1], arguments[2], ())


def _stored(arguments: tuple[Any, ...], dtype: DType | None) -> StoredTensor:
    """Make a tensor of a storage. Raises Unsupported if it is not inside the storage."""
    storage, offset, shape, strides = arguments
    if not isinstance(storage, Storage) or (dtype is None) == (storage.dtype is None):
        raise Unsupported(f"makes a tensor from {shown(storage)}, which is not a storage of this dtype")
    dtype = dtype or storage.dtype
    assert dtype is not None
    shape, strides = _numbers(shape, "a shape"), _numbers(strides, "strides")
    offset = _natural(offset, "an offset")
    if len(shape) != len(strides):
        raise Unsupported(f"makes a tensor with shape {shown(list(shape))} and strides {shown(list(strides))}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    end = offset if prod(shape) == 0 else last + 1
    if end * (dtype.bits // 8) > storage.nbytes:
        raise Unsupported(
            f"makes a tensor with shape {shown(list(shape))}, strides {shown(list(strides))} and offset {offset:,} "
            f"from the {storage.nbytes:,} bytes of storage {shown(storage.key)}, which are too few"
        )
    return StoredTensor(storage, dtype, offset, shape, strides)


def _checked(tensor: StoredTensor, requires_grad: object, hooks: object, metadata: tuple[Any, ...]) -> StoredTensor:
    """Refuse what changes the meaning of a tensor: hooks, and bits such as those of a conjugate."""
    if type(requires_grad) is not bool or not isinstance(hooks, Attributed | None) or hooks:
        raise Unsupported("makes a tensor with backward hooks")
    if requires_grad and tensor.dtype.kind not in (Kind.FLOAT, Kind.COMPLEX):
        raise Unsupported(f"makes a tensor of {tensor.dtype.name} that requires a gradient")
    if metadata and metadata[0] is not None and metadata[0] != {}:
        raise Unsupported("makes a conjugate or negative view: call .resolve_conj().resolve_neg() before saving")
    return tensor


def _numbers(value: object, what: str) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > _MAX_DIMENSIONS:
        raise Unsupported(f"has {shown(value)} for {what}")
    return tuple([_natural(each, what) for each in value])


def _natural(value: object, what: str) -> int:
    if type(value) is not int or not 0 <= value < _MAX_DIMENSION:
        raise Unsupported(f"has {shown(value)} for {what}")
    return value


# ------------------------------------------------------------------------------------------------ names

_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
}


def _allowed() -> Mapping[tuple[str, str], Global]:
    """All names that a pickle may have."""
    found = {
        ("collections", "OrderedDict"): Global("collections.OrderedDict", _ordered_dict),
        ("torch", "Size"): Global("torch.Size", _size),
        ("torch._utils", "_rebuild_tensor"): Global("torch._utils._rebuild_tensor", _tensor),
        ("torch._utils", "_rebuild_tensor_v2"): Global("torch._utils._rebuild_tensor_v2", _tensor_v2),
        ("torch._utils", "_rebuild_tensor_v3"): Global("torch._utils._rebuild_tensor_v3", _tensor_v3),
        ("torch._utils", "_rebuild_parameter"): Global("torch._utils._rebuild_parameter", _parameter),
    }
    for module in ("torch", "torch.storage"):
        found[module, "UntypedStorage"] = Global(f"{module}.UntypedStorage", storage=True)
    for name, dtype in _STORAGES.items():
        found["torch", name] = Global(f"torch.{name}", dtype=DTYPES[dtype], storage=True)
    for each in DTYPES.values():
        if each.torch_name is not None:
            found["torch", each.torch_name] = Global(f"torch.{each.torch_name}", dtype=each)
    return found


GLOBALS: Mapping[tuple[str, str], Global] = _allowed()
"""The names that a pickle may have, by module and name."""
