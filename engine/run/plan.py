"""The plan of a merge: the schedule that `merge` executes and `plan` prints, with its inputs and its costs."""

from __future__ import annotations

import os
import platform
import shlex
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...io.hub.repository import HubFile
from ...io.sizes import Limit
from ...io.tensors.refs import TensorRef
from ...io.tensors.table import total_bytes
from ...io.units import data_size, memory_size, plural
from ...methods import merge_methods
from ...version import __version__
from ..cost.machine import Machine
from ..cost.workload import Workload
from ..execute.survival import compared_nodes
from ..files.sources import FileSources, OutputModel
from ..files.write import OutputContent
from ..graph.build import BuiltGraph
from ..graph.encoding.output_sizes import OutputSizes, output_sizes
from ..graph.encoding.output_values import labels
from ..graph.graph import Kind
from ..graph.layout import Layout
from ..model.open import is_remote
from ..model.warnings import ModelWarning
from ..recipe.types import Recipe, Stage
from ..recipe.warnings import RecipeWarning
from ..schedule.budget import DeviceBudget
from ..schedule.schedule import Schedule
from ..schedule.traffic import bytes_of_models, bytes_of_reads, downloaded, peak_of, read_again
from .transfers import Transfer

RecipeLike = Recipe | str | os.PathLike[str] | Mapping[str, object] | Sequence[Mapping[str, object]]
"""A recipe: the path of a YAML file, a dict with the same content, a list of dicts for several stages, or a Recipe."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `plan` and `merge`.

    Args:
        max_ram: limit on the resident memory of the process in bytes or as a share of the machine's memory; a share by
            default.
        max_vram: limit on the memory used on each GPU in bytes or as a share of its memory; a share by default.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, or several separated by commas.
        seed: seed for methods that sample (``dare_*``, ``della*``).
        shard_size: maximum size of an output shard in bytes.
        threads: number of compute threads on the CPU; by default the number of cores that the process may use.
        strict: whether warnings are errors.
        machine: machine to plan for; None for this one.
        methods: paths of Python files with user-defined merge methods.
        keep_paths: whether local paths stay in the model card, in mergekit_config.yml and in the manifest.
        overrides: changes of the recipe, such as ``parameters.weight=0.3`` (see `recipe.overrides`).
        survival: whether the merge also measures what rounding to bfloat16 and float16 keeps of the changes.
    """

    max_ram: Limit | None = None
    max_vram: Limit | None = None
    device: str = "auto"
    seed: int = 0
    shard_size: int = 5 * 10**9
    threads: int | None = None
    strict: bool = False
    machine: Machine | None = None
    methods: tuple[str, ...] = ()
    keep_paths: bool = False
    overrides: tuple[str, ...] = ()
    survival: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a merge: the schedule that `merge` executes, and everything that `plan` prints.

    Args:
        recipe: recipe as the user wrote it.
        stage: stage that makes the output.
        built: merge graph, with the models and their layers.
        files: sources of the files other than the weights.
        layout: position of every output tensor in the shards.
        schedule: steps, with the memory that they hold.
        options: options that the plan was made with.
        findings: warnings about the recipe, the models and the machine.
        transfers: bulk copies, which bypass the lanes (see `placement.with_reflinks`).
        moved: nodes that are made by transfers.
        out: output directory that the transfers were planned for; None if it is not known yet.
        unshared: bytes that are copied although they could be reflinked elsewhere, by reason.
        digests: whether every tensor gets a digest; reflinked tensors are then read to digest them.
        saved: models of other stages that are saved too.
        in_lanes: the plan without transfers; None if this plan has no `out`.
    """

    recipe: Recipe
    stage: Stage
    built: BuiltGraph
    files: FileSources
    layout: Layout
    schedule: Schedule
    options: Options
    findings: tuple[RecipeWarning | ModelWarning, ...] = ()
    transfers: tuple[Transfer, ...] = ()
    moved: frozenset[int] = frozenset()
    out: Path | None = None
    unshared: tuple[tuple[str, int], ...] = ()
    digests: bool = False
    saved: tuple[OutputModel, ...] = ()
    in_lanes: Plan | None = None

    def __repr__(self) -> str:
        """One line with the method, the size of the output and the peak RAM."""
        schedule = self.schedule
        tensors = sum(each.tensors for each in self.built.counts.values())
        size = f"{plural(tensors, 'tensor')} of {data_size(self.layout.nbytes)}"
        ram = f"{memory_size(schedule.peak_ram, up=True)} of {memory_size(schedule.budget.ram)}"
        warnings = f", {plural(len(self.findings), 'warning')}" if self.findings else ""
        return f"<Plan of {self.stage.title}: {size}, peak RAM {ram}{warnings}>"

    @property
    def warnings(self) -> tuple[str, ...]:
        """The text of each finding."""
        return tuple(map(str, self.findings))

    @property
    def made(self) -> tuple[OutputModel, ...]:
        """All models that the merge writes, the output first."""
        return (OutputModel("", self.stage, self.files, self.built.layers), *self.saved)

    @property
    def output_sizes(self) -> OutputSizes | None:
        """The size of the output in other formats; None if neither the output nor its donor is quantized."""
        built = self.built
        return output_sizes(built.graph, built.models, built.models[built.donor])

    def output_formats(self, made: OutputModel | None = None) -> list[str]:
        """Return the formats and dtypes of one of the models that are written, by default the output, for display."""
        return labels(self.built.graph, self.built.models, (made or self.made[0]).folder)

    @property
    def downloads(self) -> tuple[HubFile, ...]:
        """Files of Hub models that the merge reads, with the number of bytes that are still to be fetched."""
        graph = self.built.graph
        if not any(is_remote(model.checkpoint) for model in self.built.models):
            return ()
        from ...io.hub.checkpoint import needed_files

        used: list[list[TensorRef]] = [[] for _ in self.built.models]
        for ref, model in zip(graph.reads, graph.read_models, strict=True):
            used[model].append(ref)
        for buffer in (buffer for check in self.built.buffers for buffer in check.others):
            used[buffer.model].append(buffer.ref)
        return tuple(
            file
            for model, refs in zip(self.built.models, used, strict=True)
            for file in needed_files(model.checkpoint, refs)
        )

    @property
    def bytes_shared(self) -> int:
        """Bytes of the output that share disk blocks with the sources."""
        return sum(transfer.shared for transfer in self.transfers)

    @property
    def bytes_copied(self) -> int:
        """Bytes that the kernel copies from source files to shards."""
        return sum(transfer.nbytes - transfer.shared for transfer in self.transfers)

    @property
    def bytes_computed(self) -> int:
        """Bytes of the output that are computed rather than copied."""
        graph = self.built.graph
        return graph.total(
            lambda node: 0 if graph.operation(node).copies_tensor else graph.nbytes(node), graph.outputs.nodes
        )

    @property
    def bytes_digested(self) -> int:
        """Bytes that are read only to digest them."""
        return sum(map(self.built.graph.nbytes, self.moved)) if self.digests else 0

    @property
    def bytes_read(self) -> int:
        """Tensor bytes that the process or the kernel reads, re-reads included."""
        return self.schedule.bytes_read + self.bytes_copied + self.bytes_digested

    @property
    def bytes_written(self) -> int:
        """Tensor bytes that the process or the kernel writes."""
        return self.schedule.bytes_written + self.bytes_copied

    @property
    def disk(self) -> int:
        """Disk space of the shards in bytes."""
        return self.layout.nbytes - self.bytes_shared

    @property
    def compared(self) -> int:
        """Number of output tensors of which the merge measures what rounding keeps of the change from the base."""
        compared = set(compared_nodes(self.built.graph))
        return sum(node in compared for node in self.built.graph.outputs.nodes) if compared else 0

    @property
    def computes(self) -> bool:
        """Whether anything is computed; otherwise bytes are only copied."""
        return any(operation.kind is Kind.MERGE for operation in self.built.graph.operations)

    @property
    def bypassed(self) -> dict[int, int]:
        """Nodes that bypass the lanes, with their size in bytes: the argument `done` of `make_schedule`."""
        return {node: self.built.graph.nbytes(node) for node in self.moved}

    @property
    def content(self) -> OutputContent:
        """Facts about the weights for the model card and the index."""
        built = self.built
        options = self.options
        methods = merge_methods(options.methods)
        papers = {name: method.paper for name, method in methods.items() if method.paper}
        return OutputContent(
            self.recipe,
            built.graph,
            self.layout,
            built.files,
            built.dtype,
            papers,
            _command(options),
            _versions(self.computes, self.schedule.budget.devices),
            options.keep_paths,
        )

    @property
    def workload(self) -> Workload:
        """The amount of work, for time estimates."""
        machine = self.options.machine
        return Workload(self.built.graph, self.schedule, self.bytes_read, self.bytes_written, machine)

    def bytes_read_by_model(self, read: Sequence[int]) -> list[tuple[int, int]]:
        """Return for each model the bytes of its used tensors, and the bytes read from it, kernel copies included."""
        graph = self.built.graph
        counts = bytes_of_models(graph, read)
        files, _ = graph.reads.places() if self.transfers else ((), ())
        models = graph.read_models if self.transfers else ()
        owners = dict(zip(map(graph.reads.files.__getitem__, files), models, strict=True))
        for transfer in self.transfers:
            used, total = counts[owners[transfer.file]]
            counts[owners[transfer.file]] = used, total + transfer.nbytes - transfer.shared
        return counts

    def output_dict(self, made: OutputModel | None = None) -> dict[str, Any]:
        """Return one of the models that are written, by default the output, as plain data. Sizes are in bytes."""
        graph, made = self.built.graph, made or self.made[0]
        counts = self.built.counts[made.folder]
        nodes = array("I", map(graph.outputs.nodes.__getitem__, graph.outputs_in(made.folder)))
        return {
            "tensors": counts.tensors,
            "parameters": counts.parameters,
            "bytes": graph.total(graph.nbytes, nodes),
            "layers": made.layers,
            "shards": len(self.layout.shards_in(made.folder)),
            "dtypes": sorted({graph.node_dtype[node].name for node in nodes}),
            "stored_tensors": counts.stored,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, as ``plan --json`` prints it. Sizes are in bytes."""
        schedule = self.schedule
        return {
            "output": self.output_dict(),
            "quantized": None if (sizes := self.output_sizes) is None else sizes.to_dict(),
            "saved": [{"folder": made.folder, **self.output_dict(made)} for made in self.saved],
            "inputs": {
                "models": [model.name for model in self.built.named],
                "tensors": sum(len(model.tensors) for model in self.built.files),
                "bytes": sum(total_bytes(model.checkpoint.tensors) for model in self.built.files),
                "layers_identified": not self.built.matched_by_name,
                "renamed": [
                    {"model": model.name, "pairs": [list(pair) for pair in rename.pairs]}
                    for model in self.built.files
                    if (rename := self.recipe.renames.get(model.reference)) is not None
                ],
                "unused": [
                    {"model": unused.model, "reason": unused.reason, "tensors": list(unused.tensors)}
                    for unused in self.built.unused
                ],
            },
            "vocabulary": None if self.built.vocabulary is None else self.built.vocabulary.to_dict(),
            "method": self.stage.merge_method,
            "bytes_read": self.bytes_read,
            "bytes_reread": schedule.bytes_reread,
            "bytes_written": self.bytes_written,
            "download": {
                "files": sum(not file.present for file in self.downloads),
                "bytes": sum(file.to_fetch for file in self.downloads),
            },
            "bytes_shared": self.bytes_shared,
            "bytes_copied": self.bytes_copied,
            "bytes_computed": self.bytes_computed,
            "bytes_digested": self.bytes_digested,
            "not_shared": [{"reason": reason, "bytes": nbytes} for reason, nbytes in self.unshared],
            "bytes_uploaded": schedule.uploaded,
            "buffers_checked": len(self.built.buffers),
            "outputs_compared": self.compared,
            "disk": self.disk,
            "peak_ram": schedule.peak_ram,
            "peak_vram": schedule.peak_vram,
            "baseline_ram": schedule.budget.baseline,
            "minimum_ram": schedule.minimum_ram,
            "minimum_vram": schedule.minimum_vram,
            "max_ram": schedule.budget.ram,
            "max_vram": max((device.vram or 0 for device in schedule.budget.devices), default=0),
            "device": ",".join(device.name for device in schedule.budget.devices),
            "threads": sum(device.threads for device in schedule.budget.devices),
            "steps": len(schedule.steps),
            **self._traffic_dict(),
            "warnings": list(self.warnings),
        }

    def _traffic_dict(self) -> dict[str, Any]:
        """Return the traffic and the memory peaks as plain data, for ``plan --json``. Sizes are in bytes."""
        graph, schedule = self.built.graph, self.schedule
        read = bytes_of_reads(graph, schedule)
        peaks = peak_of(graph, schedule), peak_of(graph, schedule, vram=True)
        node = schedule.minimum_ram_node
        return {
            "bytes_downloaded": downloaded(graph, schedule),
            "peak_ram_at": peaks[0] and asdict(peaks[0]),
            "peak_vram_at": peaks[1] and asdict(peaks[1]),
            "minimum_ram_at": None if node is None else graph.label(node),
            "bytes_by_model": [
                {"model": model.name, "used": used, "read": total}
                for model, (used, total) in zip(self.built.models, self.bytes_read_by_model(read), strict=True)
                if model.has_files
            ],
            "read_again": [asdict(group) for group in read_again(graph, schedule, read)],
        }


def _command(options: Options) -> str:
    """Return the command that repeats a merge, with the options that determine the output's bytes."""
    parts = ["mergeloom merge mergekit_config.yml merged"]
    parts += [f"--seed {options.seed}"] if options.seed else []
    parts += [f"--shard-size {options.shard_size}B"] if options.shard_size != Options().shard_size else []
    parts += [f"--methods {shlex.quote(Path(file).name)}" for file in options.methods]
    return " ".join(parts)


def _versions(computes: bool, devices: Sequence[DeviceBudget]) -> dict[str, str]:
    """Return the versions of mergeloom, Python and the libraries that make the output."""
    names = ["safetensors"]
    if computes:
        names = ["torch", *names] if any(device.separate for device in devices) else ["numpy", "llvmlite", *names]
    return {"mergeloom": __version__, "Python": platform.python_version()} | {name: version(name) for name in names}
