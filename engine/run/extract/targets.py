"""Divides the tensors of a base model into jobs: matrices to decompose, tensors to save in full, and the rest."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Any

from ....io.tensors.dtypes import Kind as DTypeKind
from ....io.tensors.refs import TensorRef
from ...model.roles import is_buffer
from ..diff.computed import ComputedTensor
from ..diff.pairs import Pair
from .names import is_embedding_module, is_head_module, is_router, is_transposed, module_of
from .options import ExtractOptions

_EXPERTS = re.compile(r"(?:^|\.)experts\.")


class Layer(Enum):
    """The kind of module that a matrix belongs to, which determines the names and shapes of its factors in PEFT."""

    LINEAR = "linear"
    TRANSPOSED = "transposed linear"
    CONVOLUTION = "convolution"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor of both models.

    Args:
        name: name of the tensor in the base model.
        base: tensor of the base model.
        model: tensor of the model.
    """

    name: str
    base: TensorRef | ComputedTensor
    model: TensorRef | ComputedTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of both tensors."""
        return self.base.shape

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.base.elements


@dataclass(frozen=True, slots=True)
class MatrixJob:
    """A matrix to decompose.

    Args:
        pair: the tensors.
        module: name of the module in the base model's checkpoint.
        layer: kind of the module.
        rank: rank of the factors.
        stored_rank: rank of the factors in the file. Those of experts are padded with zeros to one rank, since PEFT
            joins them.
    """

    pair: Difference
    module: str
    layer: Layer
    rank: int
    stored_rank: int

    @property
    def experts(self) -> str:
        """The prefix of the experts that the matrix belongs to, such as ``model.layers.0.mlp.experts``; else empty."""
        match = _EXPERTS.search(self.module)
        return self.module[: match.end() - 1] if match else ""

    @property
    def rows(self) -> int:
        """Number of rows of the matrix, the first dimension of the tensor."""
        return self.pair.shape[0]

    @property
    def columns(self) -> int:
        """Number of columns of the matrix: the product of the tensor's other dimensions."""
        return prod(self.pair.shape[1:])

    @property
    def pairs(self) -> tuple[Difference, ...]:
        """The tensors, as in a `FullJob`."""
        return (self.pair,)


@dataclass(frozen=True, slots=True)
class FullJob:
    """Tensors that are saved in full if one of them has changed: those of a module, or a bias.

    PEFT needs all tensors of a module in ``modules_to_save``.

    Args:
        modules: names of the modules for ``modules_to_save``; empty for the bias of a module that has factors.
        pairs: the tensors.
    """

    modules: tuple[str, ...]
    pairs: tuple[Difference, ...]


Job = MatrixJob | FullJob


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A tensor that the adapter has no place for.

    Args:
        pair: the tensors, compared to find out whether the adapter lacks a change; None if only one model has it.
        name: name of the tensor.
        reason: reason, as a phrase.
    """

    pair: Difference | None
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Targets:
    """The work of an extraction.

    Args:
        jobs: matrices, modules and biases, in the order of the adapter's tensors.
        left_out: tensors that the adapter has no place for, and that the user did not exclude.
        excluded: number of tensors that the options exclude.
    """

    jobs: tuple[Job, ...]
    left_out: tuple[LeftOut, ...]
    excluded: int


@dataclass(frozen=True, slots=True)
class Tie:
    """The head of a base model that shares the matrix of its embedding.

    Args:
        embedding: name of the embedding.
        head: name of the head; empty if PEFT can't give an adapter to both, as in encoder-decoder models.
        stored: whether one of the models stores the head. If not, the adapter keeps both tied.
    """

    embedding: str
    head: str
    stored: bool

    @property
    def has_factors(self) -> bool:
        """Whether the embedding can have factors that PEFT applies to the head, too, which it does for this name."""
        return not self.stored and module_of(self.embedding)[0].rpartition(".")[2] == "embed_tokens"


def find_targets(
    pairs: Sequence[Pair], options: ExtractOptions, config: Mapping[str, Any] | None, tie: Tie | None
) -> Targets:
    """Divide pairs of tensors into jobs.

    Args:
        pairs: tensors of the base model and of the model, in that order.
        options: options of the extraction.
        config: content of the base model's config.json.
        tie: tied head and embedding of the base model; None if the head has a matrix of its own.
    """
    differences = [Difference(pair.name, pair.a, pair.b) for pair in pairs]
    selected = [each for each in differences if options.selects(each.name)]
    jobs: list[Job] = []
    left_out: list[LeftOut] = []
    full: list[FullJob] = []
    rest: dict[str, list[Difference]] = defaultdict(list)
    tied = {} if tie is None else {each.name: each for each in selected if each.name in (tie.embedding, tie.head)}
    if tie is not None and tied:
        if not tie.head:
            reason = "PEFT can't keep the embeddings of this architecture tied"
            left_out += [LeftOut(each, each.name, reason) for each in tied.values()]
        elif options.embed and tie.embedding in tied and tie.has_factors:
            jobs.append(_matrix_job(tied[tie.embedding], Layer.EMBEDDING, options.rank))
        else:
            full.append(_tied_job(tie, tied))
    for pair in selected:
        if pair.elements == 0 or pair.name in tied:
            continue
        layer = _layer(pair, options, config)
        if layer is None:
            rest[module_of(pair.name)[0]].append(pair)
        else:
            jobs.append(_matrix_job(pair, layer, options.rank))
    matrices = {job.module for job in jobs if isinstance(job, MatrixJob)}
    found, without = _full_jobs(rest, matrices, differences)
    full += found
    left_out += without
    if options.low_rank_only:
        stored = {each.name for each in differences}
        saved = (pair for job in full for pair in job.pairs if pair.name in stored)
        left_out += [LeftOut(pair, pair.name, "--low-rank-only") for pair in saved]
    else:
        jobs += full
    jobs.sort(key=lambda job: (job.pairs[0].base.file, job.pairs[0].base.offset))
    return Targets(tuple(jobs), tuple(left_out), len(differences) - len(selected))


def _matrix_job(pair: Difference, layer: Layer, rank: int) -> MatrixJob:
    module = module_of(pair.name)[0]
    possible = min(rank, pair.shape[0], prod(pair.shape[1:]))
    return MatrixJob(pair, module, layer, possible, rank if _EXPERTS.search(module) else possible)


def _tied_job(tie: Tie, tied: Mapping[str, Difference]) -> FullJob:
    """The job that saves an embedding and the head that is tied to it. PEFT needs both in the file, even if equal."""
    embedding = tied.get(tie.embedding)
    pairs = [tied[name] for name in (tie.embedding, tie.head) if name in tied]
    if embedding is not None and not tie.stored:
        pairs.append(Difference(tie.head, embedding.base, embedding.model))
    return FullJob(tuple(module_of(pair.name)[0] for pair in pairs), tuple(pairs))


def _layer(pair: Difference, options: ExtractOptions, config: Mapping[str, Any] | None) -> Layer | None:
    """The kind of module whose difference gets factors; None for a tensor that does not."""
    module, leaf = module_of(pair.name)
    dimensions = len(pair.shape)
    if leaf != "weight" or not module or dimensions < 2 or is_buffer(pair.name, pair.shape) or not _is_float(pair):
        return None
    if is_head_module(module):
        return Layer.LINEAR if options.embed and dimensions == 2 else None
    if is_embedding_module(module):
        return Layer.EMBEDDING if options.embed and dimensions == 2 else None
    if is_router(module):
        return None
    if dimensions == 2:
        return Layer.TRANSPOSED if is_transposed(module, config) else Layer.LINEAR
    depthwise = pair.shape[1] == 1
    return None if depthwise or _EXPERTS.search(pair.name) else Layer.CONVOLUTION


def _is_float(pair: Difference) -> bool:
    return all(each.dtype.kind is DTypeKind.FLOAT for each in (pair.base, pair.model))


def _full_jobs(
    rest: Mapping[str, list[Difference]], matrices: set[str], differences: Sequence[Difference]
) -> tuple[list[FullJob], list[LeftOut]]:
    """The jobs for tensors without factors, by module, and the tensors that can't be saved.

    Args:
        rest: tensors without factors, by module.
        matrices: modules with factors.
        differences: all tensors, including those that the options exclude.
    """
    modules = _Modules(differences)
    jobs, left_out, done = [], [], set[str]()
    for module, pairs in rest.items():
        if module in matrices:
            for pair in pairs:
                if pair.name == f"{module}.bias":
                    jobs.append(FullJob((), (pair,)))
                else:
                    left_out.append(LeftOut(pair, pair.name, "its module has factors, and PEFT saves only its bias"))
            continue
        reason = modules.obstacle(module, matrices)
        if reason:
            left_out += [LeftOut(pair, pair.name, reason) for pair in pairs]
        elif module not in done:
            group = modules.group(module)
            done |= group
            saved = tuple(pair for each in sorted(group) for pair in modules.tensors[each])
            jobs.append(FullJob(tuple(sorted(group)), saved))
    return jobs, left_out


class _Modules:
    """The modules of a model, as PEFT finds those of ``modules_to_save``: all whose name ends like an entry."""

    def __init__(self, differences: Iterable[Difference]) -> None:
        self.tensors: dict[str, list[Difference]] = defaultdict(list)
        self._parents: set[str] = set()
        for pair in differences:
            module = module_of(pair.name)[0]
            self.tensors[module].append(pair)
            parts = module.split(".")
            self._parents.update(".".join(parts[:count]) for count in range(1, len(parts)))
        self._by_end: dict[str, set[str]] = defaultdict(set)
        for module in self.tensors:
            self._by_end[module.rpartition(".")[2]].add(module)

    def group(self, module: str) -> set[str]:
        """The modules that PEFT saves if one is listed: it, and those with a name that ends with its name."""
        found, new = {module}, [module]
        while new:
            name = new.pop()
            same = self._by_end[name.rpartition(".")[2]] if "." in name else self.tensors
            more = {other for other in same if other.endswith(name)} - found
            found |= more
            new += more
        return found

    def obstacle(self, module: str, matrices: set[str]) -> str:
        """Why a module can't be saved in full; empty if it can."""
        if not module:
            return "it belongs to no module that PEFT can save"
        if module in self._parents:
            return f"PEFT would save all of {module}, which contains other modules"
        if any(len(pair.shape) > 2 and _EXPERTS.search(f"{pair.name}.") for pair in self.tensors[module]):
            return "fused experts: an adapter needs separate ones"
        group = self.group(module)
        if any(pair.elements and not _is_float(pair) for each in group for pair in self.tensors[each]):
            return "its module has integers, such as position ids or a mask"
        if other := next((each for each in sorted(group) if each in matrices or each in self._parents), None):
            return f"PEFT would save {other}, too, whose name ends like that of its module"
        return ""
