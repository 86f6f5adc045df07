"""The values of a model with adapters: for each tensor that an adapter changes, the parts that it is computed from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ....errors import CheckpointError
from ....io.checkpoint.checkpoint import Checkpoint
from ....io.tensors.dtypes import DType
from ....io.tensors.refs import TensorRef
from ....io.units import listed, plural
from ....methods.formats.adapters import REPLACED, REPLACED_ROWS, Term, adapted, scale_name
from ....methods.kernel.access import ALIGNED, BlockRows, ColumnFactor, GatheredRows, RowFactor, SameRows, Shape, Whole
from ..logical import Decode, LogicalTensor, LogicalTensors, Part, Tensors, kind_of, shape_of
from ..roles import is_head, tied_embedding
from .changes import BIAS, EMBEDDING_A, EMBEDDING_B, MAGNITUDE, TOKENS, A, B, Stored
from .complete import check_complete
from .config import CONFIG
from .loaded import Adapter
from .matching import TensorNames
from .orientation import transposed_modules
from .resized import base_shape, check_tables, is_resized
from .stacks import StackMatcher


@dataclass(frozen=True, slots=True)
class _Added:
    """What an adapter adds to a tensor.

    Args:
        adapter: the adapter.
        term: what it is.
        parts: the parts that it is computed from.
        scale: what it is multiplied by.
    """

    adapter: Adapter
    term: Term
    parts: tuple[Part, ...]
    scale: float

    @property
    def scales_lengths(self) -> bool:
        """Whether it sets the lengths of rows or columns."""
        return self.term in (Term.DORA_ROWS, Term.DORA_COLUMNS)


@dataclass(slots=True)
class _Change:
    """All changes of a tensor.

    Args:
        replaced: the adapter that has its own copy of the tensor, with the copy; None if no adapter has one.
        rows: the adapter that replaces rows of the tensor, with their values and numbers; None if no adapter does.
        added: what is added.
    """

    replaced: tuple[Adapter, Stored] | None = None
    rows: tuple[Adapter, Stored, tuple[int, ...]] | None = None
    added: list[_Added] = field(default_factory=list)


def with_adapters(name: str, base: Checkpoint, tensors: Tensors, adapters: Sequence[Adapter]) -> LogicalTensors:
    """Return the tensors of a model with adapters.

    Args:
        name: name of the model with its adapters, for errors.
        base: checkpoint of the model.
        tensors: its tensors.
        adapters: the adapters, whose changes are added up.

    Raises:
        CheckpointError: a module of an adapter matches no tensor or several, has other shapes, or is incomplete.
    """
    builder = _Builder(name, base, tensors)
    for adapter in adapters:
        builder.add(adapter)
    found = builder.values()
    if isinstance(tensors, LogicalTensors):
        return tensors.with_values(found)
    return LogicalTensors(tensors, found)


class _Builder:
    """Collects the changes of tensors."""

    def __init__(self, name: str, base: Checkpoint, tensors: Tensors) -> None:
        self._name = name
        self._base = base
        self._tensors = tensors
        self._names = TensorNames(tensors)
        self._changes: dict[str, _Change] = {}
        self._transposed: frozenset[str] = frozenset()

    def add(self, adapter: Adapter) -> None:
        """Add the changes of an adapter."""
        stacks = StackMatcher(adapter, self._base, self._tensors, self._names)
        modules = adapter.changes.modules
        wrapped = {module: stored for module, stored in modules.items() if stacks.is_stack(module)}
        targets = self._targets(adapter, wrapped)
        check_complete(adapter, self._tensors, self._base.config, wrapped)
        for name, copy in adapter.changes.replaced.items():  # first: factors have the shapes of these
            self._replace(adapter, targets[name], copy)
        self._transposed = transposed_modules(
            adapter,
            self._base.config,
            lambda module: () if module in wrapped else self._shape(adapter, targets[f"{module}.weight"]),
        )
        for module, stored in modules.items():
            if module not in wrapped:
                self._add_module(adapter, module, stored, targets)
        for found in stacks.factors(wrapped):
            self._check_stated_rank(adapter, found.parameter, found.rank, " and ".join(p.name for p in found.parts))
            scale = adapter.config.scale(found.parameter)
            self._change(found.name).added.append(_Added(adapter, Term.LORA, found.parts, scale))

    # --- names -------------------------------------------------------------------------------------------------

    def _targets(self, adapter: Adapter, wrapped: Collection[str]) -> dict[str, str]:
        """The tensor that each name in an adapter stands for, except for modules that are `wrapped` parameters.

        Raises:
            CheckpointError: a name stands for no tensor, or it is unclear for which.
        """
        changes = adapter.changes
        modules = {module: stored for module, stored in changes.modules.items() if module not in wrapped}
        wanted = [f"{module}.weight" for module, stored in modules.items() if set(stored) != {BIAS}]
        wanted += [f"{module}.bias" for module, stored in modules.items() if BIAS in stored]
        wanted += changes.replaced
        found: dict[str, str] = {}
        unknown, unclear = [], []
        for name in wanted:
            candidates = self._names.candidates(name)
            if len(candidates) == 1:
                found[name] = candidates[0]
            elif candidates:
                unclear.append(f"{name} ({listed(candidates)})")
            elif is_head(name) and name in changes.replaced and tied_embedding(name, list(self._tensors)):
                found[name] = name  # a tied head that was trained apart from the embedding
            else:
                unknown.append(name)
        if unknown or unclear:
            raise self._unmatched(adapter, unknown, unclear)
        self._check_distinct(adapter, wanted, found)
        return found

    def _unmatched(self, adapter: Adapter, unknown: Sequence[str], unclear: Sequence[str]) -> CheckpointError:
        problems = []
        if unknown:
            problems.append(f"{plural(len(unknown), 'tensor')} that {self._base.path} lacks: {listed(unknown)}")
        if unclear:
            problems.append(f"{plural(len(unclear), 'tensor')} that could be several ones: {listed(unclear)}")
        advice = "use a base that has them: " if unknown else ""
        return CheckpointError(
            f"{adapter.name} changes {' and '.join(problems)}; {advice}{self._trained_on(adapter)} "
            f"({self._base.path} has tensors such as {next(iter(self._tensors))})"
        )

    def _check_distinct(self, adapter: Adapter, wanted: Iterable[str], found: dict[str, str]) -> None:
        """Check that no two names in an adapter stand for the same tensor."""
        first: dict[str, str] = {}
        for name in dict.fromkeys(wanted):
            other = first.setdefault(found[name], name)
            if other != name:
                raise CheckpointError(
                    f"{adapter.name}: {other} and {name} would both be the tensor {found[name]} of {self._base.path}"
                )

    @staticmethod
    def _trained_on(adapter: Adapter) -> str:
        base = adapter.config.base
        return f"it was trained on {base}" if base else "its config doesn't name the model that it was trained on"

    # --- changes -----------------------------------------------------------------------------------------------

    def _add_module(self, adapter: Adapter, module: str, stored: dict[str, Stored], targets: dict[str, str]) -> None:
        """Add the changes of a module's weight and bias."""
        scale = adapter.config.scale(module) if TOKENS not in stored or len(stored) > 1 else 1.0
        if TOKENS in stored:
            name = targets[f"{module}.weight"]
            self._replace_rows(adapter, module, name, stored[TOKENS])
        if MAGNITUDE in stored and A not in stored and EMBEDDING_A not in stored:
            raise CheckpointError(
                f"{adapter.name}: has {stored[MAGNITUDE].name}, but {module} lacks {A}: the file is incomplete; "
                "download the adapter again"
            )
        for first, second in ((A, B), (EMBEDDING_A, EMBEDDING_B)):
            if first not in stored and second not in stored:
                continue
            if missing := next((role for role in (first, second) if role not in stored), None):
                have = stored[second if missing == first else first]
                raise CheckpointError(
                    f"{adapter.name}: has {have.name}, but {module} lacks {missing}: the file is incomplete; download "
                    "the adapter again"
                )
            name = targets[f"{module}.weight"]
            self._check_rank(adapter, module, stored[first], stored[second])
            embedding = first == EMBEDDING_A
            parts = self._factors(adapter, module, name, stored[first], stored[second], embedding=embedding)
            added = _Added(adapter, Term.LORA, parts, scale)
            self._change(name).added.append(self._with_magnitude(added, module, name, stored))
        if BIAS in stored:
            self._add_bias(adapter, targets[f"{module}.bias"], stored[BIAS], scale)

    def _check_rank(self, adapter: Adapter, module: str, a: Stored, b: Stored) -> None:
        """Check that factors have the same rank, and the one in the config."""
        shapes = f"{a.name} has shape {list(a.ref.shape)} and {b.name} {list(b.ref.shape)}"
        if len(a.ref.shape) != 2 or len(b.ref.shape) != 2:
            raise CheckpointError(f"{adapter.name}: {shapes}, and only factors with two dimensions can be applied")
        if a.ref.shape[0] != b.ref.shape[1]:
            raise CheckpointError(
                f"{adapter.name}: {shapes}: the rank is the first dimension of one and the second of the other, so the "
                "files don't belong together; download the adapter again"
            )
        self._check_stated_rank(adapter, module, a.ref.shape[0], shapes)

    @staticmethod
    def _check_stated_rank(adapter: Adapter, module: str, rank: int, shapes: str) -> None:
        """Check that the config gives a module the rank of its factors."""
        stated = adapter.config.rank(module)
        if stated != rank:
            raise CheckpointError(
                f"{adapter.name}: {CONFIG} gives {module} the rank {stated}, but it is {rank} ({shapes}): config and "
                "weights don't belong together; download the adapter again"
            )

    def _factors(
        self, adapter: Adapter, module: str, name: str, a: Stored, b: Stored, *, embedding: bool
    ) -> tuple[Part, ...]:
        """The factors of what is added to a weight [out, in], or to one that is stored as [in, out]."""
        (rank, into), out, owner = a.ref.shape, b.ref.shape[0], adapter.reference
        transposed = embedding or module in self._transposed
        shape = (into, out) if transposed else (out, into)
        if self._shape(adapter, name) != shape:
            raise self._wrong_shape(adapter, name, f"the product of {b.name} and {a.name}", shape)
        if transposed:
            left, right = RowFactor(rank, 1, into), ColumnFactor(rank, rank, 1)
            return Part(a.name, a.ref, left, owner=owner), Part(b.name, b.ref, right, owner=owner)
        return Part(b.name, b.ref, SameRows(), owner=owner), Part(a.name, a.ref, Whole(), owner=owner)

    def _with_magnitude(self, added: _Added, module: str, name: str, stored: Mapping[str, Stored]) -> _Added:
        """What is added to a weight, with the lengths of its rows or columns if the adapter has trained them (DoRA)."""
        adapter, magnitude = added.adapter, stored.get(MAGNITUDE)
        if magnitude is None:
            if adapter.config.dora:
                raise CheckpointError(
                    f"{adapter.name}: {CONFIG} has use_dora, but {module} has no {MAGNITUDE}: the file is incomplete; "
                    "download the adapter again"
                )
            return added
        rows, columns = self._shape(added.adapter, name)
        # PEFT's outputs: the columns of an embedding, and of a weight that is stored as [in, out]
        by_column = EMBEDDING_A in stored or module in self._transposed
        if magnitude.ref.shape != ((columns if by_column else rows),):
            raise self._wrong_shape(adapter, name, magnitude.name, magnitude.ref.shape)
        access = BlockRows(rows, 1) if by_column else BlockRows(1, columns)
        part = Part(magnitude.name, magnitude.ref, access, owner=adapter.reference)
        return replace(added, term=Term.DORA_COLUMNS if by_column else Term.DORA_ROWS, parts=(*added.parts, part))

    def _add_bias(self, adapter: Adapter, name: str, bias: Stored, scale: float) -> None:
        if self._shape(adapter, name) != bias.ref.shape:
            raise self._wrong_shape(adapter, name, bias.name, bias.ref.shape)
        parts = (Part(bias.name, bias.ref, owner=adapter.reference),)
        self._change(name).added.append(_Added(adapter, Term.BIAS, parts, scale))

    def _replace(self, adapter: Adapter, name: str, copy: Stored) -> None:
        shape = base_shape(self._tensors, name)
        if shape != copy.ref.shape and not is_resized(name, copy.ref.shape, shape):
            like = name if name in self._tensors else tied_embedding(name, list(self._tensors)) or name
            raise self._wrong_shape(adapter, like, copy.name, copy.ref.shape)
        change = self._change(name)
        if change.replaced is not None:
            raise CheckpointError(
                f"{self._name}: {change.replaced[0].name} and {adapter.name} both have a tensor of their own for "
                f"{name}, which can't be added up: apply only one of them"
            )
        change.replaced = adapter, copy

    def _replace_rows(self, adapter: Adapter, module: str, name: str, rows: Stored) -> None:
        indices, shape = adapter.config.token_indices(module), self._shape(adapter, name)
        if rows.ref.shape != (len(indices), *shape[1:]):
            raise self._wrong_shape(adapter, name, rows.name, rows.ref.shape)
        if any(not 0 <= row < shape[0] for row in indices) or len(set(indices)) < len(indices):
            raise CheckpointError(
                f"{adapter.name}: trainable_token_indices are {list(indices)}, but {name} has {shape[0]} rows"
            )
        self._change(name).rows = adapter, rows, indices

    def _change(self, name: str) -> _Change:
        return self._changes.setdefault(name, _Change())

    def _shape(self, adapter: Adapter, name: str) -> Shape:
        """The shape of a tensor that an adapter changes: that of its own copy, if it has one."""
        change = self._changes.get(name)
        if change is not None and change.replaced is not None and change.replaced[0] is adapter:
            return change.replaced[1].ref.shape
        return shape_of(self._tensors, name)

    def _wrong_shape(self, adapter: Adapter, name: str, what: str, shape: Shape) -> CheckpointError:
        own = self._shape(adapter, name)
        message = f"{adapter.name}: {what} has shape {list(shape)}, but {name} of {self._base.path} has {list(own)}"
        if len(shape) == 2 and is_resized(name, shape, own):
            return CheckpointError(
                f"{message}: the vocabulary of the adapter's model was resized, and the adapter lacks the resized "
                "matrix; save it again with all embeddings (save_pretrained with save_embedding_layers=True)"
            )
        return CheckpointError(f"{message}; {self._trained_on(adapter)}: choose that model as base")

    # --- values ------------------------------------------------------------------------------------------------

    def values(self) -> Iterator[LogicalTensor]:
        """Yield the values of all changed tensors. Raises CheckpointError if changes exclude each other."""
        replaced = {
            name: (change.replaced[0].name, change.replaced[1].ref.shape)
            for name, change in self._changes.items()
            if change.replaced is not None
        }
        check_tables(str(self._base.path), self._tensors, replaced)
        for name, change in self._changes.items():
            self._check_compatible(name, change)
            yield self._value(name, change)

    def _check_compatible(self, name: str, change: _Change) -> None:
        """Check that no adapter replaces what another one changes."""
        whole = change.replaced or change.rows
        others = [added.adapter for added in change.added] + ([change.rows[0]] if change.rows else [])
        other = next((each for each in others if whole is not None and each is not whole[0]), None)
        if whole is not None and other is not None:
            raise CheckpointError(
                f"{self._name}: {whole[0].name} has values of its own for {name}, and {other.name} changes it, too: "
                "these can't be added up; apply only one of them"
            )
        scaled = [added.adapter.name for added in change.added if added.scales_lengths]
        if len(scaled) > 1:
            raise CheckpointError(
                f"{self._name}: {' and '.join(scaled)} are DoRA adapters, and both set the lengths of {name}: these "
                "can't be added up; apply only one of them"
            )

    def _value(self, name: str, change: _Change) -> LogicalTensor:
        value = self._origin(name, change)
        if not change.added:
            return value
        # the lengths that DoRA sets are those of the base with this adapter alone
        terms = sorted(change.added, key=lambda added: not added.scales_lengths)
        decode = value.decode
        decoder = adapted(decode.decoder if decode else None, len(value.parts), tuple(added.term for added in terms))
        scales = tuple((scale_name(number), added.scale) for number, added in enumerate(terms))
        parts = value.parts + tuple(part for added in terms for part in added.parts)
        given = decode.parameters if decode else ()
        return _with(value, parts, Decode(decoder, given + scales))

    def _origin(self, name: str, change: _Change) -> LogicalTensor:
        """The value that something is added to: that of the base, or that of an adapter."""
        if change.replaced is not None:
            adapter, copy = change.replaced
            like = name if name in self._tensors else tied_embedding(name, list(self._tensors)) or name
            dtype: DType = kind_of(self._tensors, like).dtype
            decode = None if copy.ref.dtype == dtype else Decode(REPLACED)
            part = Part(copy.name, copy.ref, ALIGNED, owner=adapter.reference)
            tensor: TensorRef | LogicalTensor = LogicalTensor(name, copy.ref.shape, dtype, (part,), decode)
        else:
            tensor = self._tensors[name]
        if isinstance(tensor, TensorRef):
            tensor = LogicalTensor(name, tensor.shape, tensor.dtype, (Part(name, tensor),))
        return tensor if change.rows is None else self._with_rows(tensor, *change.rows)

    def _with_rows(
        self, value: LogicalTensor, adapter: Adapter, rows: Stored, indices: tuple[int, ...]
    ) -> LogicalTensor:
        """The value with other rows. Each part has zeros where the other one has values."""
        part = value.parts[0]
        if (value.decode is not None and value.decode.decoder is not REPLACED) or part.access != ALIGNED:
            raise CheckpointError(
                f"{adapter.name} replaces rows of {value.name}, which is stored as {value.format}: this is not "
                "supported; use the base in bfloat16"
            )
        kept, own = list(range(value.shape[0])), [-1] * value.shape[0]
        for number, row in enumerate(indices):
            kept[row], own[row] = -1, number
        parts = (
            replace(part, access=GatheredRows.of(kept)),
            Part(rows.name, rows.ref, GatheredRows.of(own), owner=adapter.reference),
        )
        return _with(value, parts, Decode(REPLACED_ROWS))


def _with(value: LogicalTensor, parts: tuple[Part, ...], decode: Decode) -> LogicalTensor:
    return LogicalTensor(value.name, value.shape, value.dtype, parts, decode, value.companions, value.encoding)
