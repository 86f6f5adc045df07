"""The files of a PEFT adapter: names and shapes of its tensors, header of the weights, adapter_config.json."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ....io.tensors.dtypes import DTYPES
from .names import architecture_of, in_loaded_model, is_embedding_module, module_of
from .targets import FullJob, Job, Layer, MatrixJob

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""Prefix of all names in an adapter's file: PEFT's model contains the base model."""
_HEADER_LENGTH = 8
"""Size of the number at the beginning of a safetensors file, in bytes."""


@dataclass(frozen=True, slots=True)
class AdapterTensor:
    """A tensor of the adapter's file.

    Args:
        name: name of the tensor.
        dtype: name of the dtype.
        shape: shape of the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes."""
        return prod(self.shape) * DTYPES[self.dtype].bits // 8

    def to_json(self) -> list[Any]:
        """Return the tensor as the journal stores it."""
        return [self.name, self.dtype, list(self.shape)]

    @classmethod
    def from_json(cls, entry: Sequence[Any]) -> AdapterTensor:
        """Return the tensor that the journal stores."""
        name, dtype, shape = entry
        return cls(name, dtype, tuple(shape))


def tensors_of_job(job: Job, prefix: str) -> tuple[AdapterTensor, ...]:
    """Return the tensors that a job writes if something has changed, in their order in the file.

    Args:
        job: the job.
        prefix: prefix of the modules' names, see `names.module_prefix`.
    """
    if isinstance(job, FullJob):
        return tuple(
            AdapterTensor(PREFIX + in_loaded_model(pair.name, prefix), pair.model.dtype.name, pair.shape)
            for pair in job.pairs
        )
    start = PREFIX + in_loaded_model(job.module, prefix)
    first, *rest = job.pair.shape
    a: tuple[str, tuple[int, ...]]
    b: tuple[str, tuple[int, ...]]
    if job.layer is Layer.EMBEDDING:
        a, b = ("lora_embedding_A", (job.stored_rank, first)), ("lora_embedding_B", (job.columns, job.stored_rank))
    elif job.layer is Layer.TRANSPOSED:
        a, b = ("lora_A.weight", (job.stored_rank, first)), ("lora_B.weight", (job.columns, job.stored_rank))
    else:
        ones = (1,) * (len(rest) - 1)
        a, b = ("lora_A.weight", (job.stored_rank, *rest)), ("lora_B.weight", (first, job.stored_rank, *ones))
    return tuple(AdapterTensor(f"{start}.{name}", "F32", shape) for name, shape in (a, b))


def reserved_header(jobs: Iterable[Job], prefix: str) -> int:
    """Return where the tensors begin in the file, in bytes: the header has space for the tensors of all jobs.

    Which tensors have changed is known at the end, and the format allows spaces after the header's JSON.
    """
    tensors = [tensor for job in jobs for tensor in tensors_of_job(job, prefix)]
    longest = ".base_layer"  # which PEFT inserts into the name of a bias
    offset = sum(tensor.nbytes for tensor in tensors)
    entries = {f"{tensor.name}{longest}": _entry(tensor, offset, offset) for tensor in tensors}
    size = len(json.dumps({**_METADATA, **entries}, separators=(",", ":")).encode())
    return _HEADER_LENGTH + -(-size // 64) * 64


def header_bytes(tensors: Iterable[AdapterTensor], reserved: int) -> bytes:
    """Return the first `reserved` bytes of the file, for tensors that follow one after another."""
    entries, offset = {}, 0
    for tensor in tensors:
        entries[tensor.name] = _entry(tensor, offset, offset + tensor.nbytes)
        offset += tensor.nbytes
    content = json.dumps({**_METADATA, **entries}, separators=(",", ":")).encode()
    return (reserved - _HEADER_LENGTH).to_bytes(_HEADER_LENGTH, "little") + content.ljust(reserved - _HEADER_LENGTH)


_METADATA = {"__metadata__": {"format": "pt"}}


def _entry(tensor: AdapterTensor, start: int, end: int) -> dict[str, Any]:
    return {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What adapter_config.json says about the base model.

    Args:
        name: name as the user gave it.
        revision: revision of a Hub model; None without one.
        config: content of config.json.
        prefix: prefix of the modules' names, see `names.module_prefix`.
        tied: whether the base model ties its head to its embedding, and the model does so, too.
        weights: names of all its modules with a weight of at least two dimensions.
    """

    name: str
    revision: str | None
    config: Mapping[str, Any] | None
    prefix: str
    tied: bool
    weights: frozenset[str]


def final_names(jobs: Sequence[Job], stored: Sequence[Sequence[AdapterTensor]]) -> list[AdapterTensor]:
    """Return the tensors of the file under the names that PEFT loads them by.

    PEFT replaces a module that has factors by one that contains it as ``base_layer``, also in the name of its bias.

    Args:
        jobs: all jobs.
        stored: tensors that each job has written.
    """
    wrapped = {job.module for job, tensors in zip(jobs, stored, strict=True) if isinstance(job, MatrixJob) and tensors}
    found: list[AdapterTensor] = []
    for job, tensors in zip(jobs, stored, strict=True):
        is_bias = isinstance(job, FullJob) and not job.modules
        if tensors and is_bias and module_of(job.pairs[0].name)[0] in wrapped:
            module, leaf = module_of(tensors[0].name)
            tensors = (AdapterTensor(f"{module}.base_layer.{leaf}", tensors[0].dtype, tensors[0].shape),)
        found += tensors
    return found


def missing_experts(jobs: Sequence[Job], changed: Sequence[bool]) -> list[int]:
    """Return the numbers of the jobs of unchanged experts next to changed ones: PEFT needs factors of all or none."""
    groups = {job.experts for job, each in zip(jobs, changed, strict=True) if each and isinstance(job, MatrixJob)} - {
        ""
    }
    pairs = enumerate(zip(jobs, changed, strict=True))
    return [n for n, (job, each) in pairs if not each and isinstance(job, MatrixJob) and job.experts in groups]


def adapter_config(base: BaseModel, rank: int, jobs: Sequence[Job], changed: Sequence[bool]) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Args:
        base: the base model.
        rank: rank of the factors of most matrices.
        jobs: all jobs.
        changed: whether each job has written its tensors.
    """
    done = [job for job, each in zip(jobs, changed, strict=True) if each]
    matrices = [job for job in done if isinstance(job, MatrixJob)]
    modules = sorted(
        {in_loaded_model(name, base.prefix) for job in done if isinstance(job, FullJob) for name in job.modules}
    )
    has_bias = any(isinstance(job, FullJob) and not job.modules for job in done)
    ranks = {
        re.escape(in_loaded_model(job.module, base.prefix)): job.stored_rank
        for job in matrices
        if job.stored_rank != rank
    }
    embeds = any(job.layer is Layer.EMBEDDING for job in matrices) or any(_saves_embedding(job) for job in done)
    return {
        "peft_type": "LORA",
        "task_type": _task_type(base.config),
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": target_modules(base, [job.module for job in matrices]),
        "modules_to_save": modules or None,
        "bias": "all" if has_bias else "none",
        "fan_in_fan_out": any(job.layer is Layer.TRANSPOSED for job in matrices),
        "ensure_weight_tying": base.tied and embeds,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def target_modules(base: BaseModel, modules: Sequence[str]) -> list[str]:
    """Return the entries of ``target_modules``: last components where all modules with them have factors, else names.

    PEFT compares each entry with each module, so short lists matter for models with thousands of experts.
    """
    by_leaf: dict[str, set[str]] = defaultdict(set)
    for module in base.weights:
        by_leaf[module.rpartition(".")[2]].add(module)
    chosen: dict[str, set[str]] = defaultdict(set)
    for module in modules:
        chosen[module.rpartition(".")[2]].add(module)
    found = []
    for leaf, names in chosen.items():
        found += [leaf] if names == by_leaf[leaf] else [in_loaded_model(name, base.prefix) for name in names]
    return sorted(found)


def _saves_embedding(job: Job) -> bool:
    return isinstance(job, FullJob) and any(map(is_embedding_module, job.modules))


def _task_type(config: Mapping[str, Any] | None) -> str | None:
    """``CAUSAL_LM`` for a causal language model. For other tasks, PEFT would expect heads among the saved modules."""
    return "CAUSAL_LM" if architecture_of(config or {}).endswith(("ForCausalLM", "LMHeadModel")) else None
