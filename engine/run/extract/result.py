"""The result of an extraction: the error of each matrix, and what was saved in full, unchanged or left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LOW_ENERGY = 0.25
"""The retained energy below which a warning says so: the factors have less than half of the change's norm."""


@dataclass(frozen=True, slots=True)
class MatrixResult:
    """The factors of one matrix.

    Args:
        name: name of the tensor in the base model.
        shape: shape of the tensor.
        rank: rank of the factors.
        method: ``exact`` or ``randomized``.
        norm: Frobenius norm of the difference.
        retained_energy: share of the difference's sum of squares that the factors keep, from 0 to 1.
        error: ``||D - B A|| / ||D||`` in the Frobenius norm.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    method: str
    norm: float
    retained_energy: float
    error: float


@dataclass(frozen=True, slots=True)
class ExtractedAdapter:
    """An extracted adapter.

    Args:
        out: directory of the adapter.
        matrices: results of the matrices that have changed.
        saved: names of the tensors that are saved in full.
        unchanged: number of tensors that are equal in both models, which the adapter leaves out.
        excluded: number of tensors that the options exclude.
        left_out: names of the tensors that have changed and are not in the adapter, with the reason of each.
        nbytes: size of the adapter's weights in bytes.
        rank: rank that was asked for.
        bytes_read: size of what was read of the tensors, in bytes; 0 if the adapter was complete already.
        max_ram: limit of the process's resident memory in bytes.
        peak_ram: planned peak of the process's resident memory in bytes.
        peak_rss: measured peak of the process's resident memory in bytes (VmHWM).
        warnings: warnings, one sentence for each.
    """

    out: Path
    matrices: tuple[MatrixResult, ...]
    saved: tuple[str, ...]
    unchanged: int
    excluded: int
    left_out: tuple[tuple[str, str], ...]
    nbytes: int
    rank: int
    bytes_read: int = 0
    max_ram: int = 0
    peak_ram: int = 0
    peak_rss: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def retained_energy(self) -> float | None:
        """Share of the sum of squares of all matrices' differences that the factors keep; None without matrices."""
        squares = math.fsum(each.norm**2 for each in self.matrices)
        if not squares:
            return None
        return math.fsum(each.retained_energy * each.norm**2 for each in self.matrices) / squares

    @property
    def energy_warning(self) -> str:
        """The warning that the factors keep little of the change; empty if they keep `LOW_ENERGY` or more."""
        energy = self.retained_energy
        if energy is None or energy >= LOW_ENERGY:
            return ""
        return (
            f"the factors keep only {energy:.2%} of the change from BASE to MODEL (retained energy of all matrices, "
            f"less than {LOW_ENERGY:.0%}): check that MODEL was fine-tuned from BASE, since unrelated models differ in "
            "all directions; if it was, use a higher --rank"
        )

    @property
    def error(self) -> float | None:
        """Relative error of all matrices together, in the Frobenius norm; None without matrices."""
        squares = math.fsum(each.norm**2 for each in self.matrices)
        if not squares:
            return None
        return math.sqrt(math.fsum((each.error * each.norm) ** 2 for each in self.matrices) / squares)

    def described(self) -> dict[str, Any]:
        """The adapter as plain data, without measurements: what OUT keeps about it."""
        return {
            "adapter": {
                "rank": self.rank,
                "bytes": self.nbytes,
                "error": self.error,
                "retained_energy": self.retained_energy,
                "unchanged": self.unchanged,
                "excluded": self.excluded,
            },
            "matrices": [{**asdict(each), "shape": list(each.shape)} for each in self.matrices],
            "saved": list(self.saved),
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out],
        }

    @classmethod
    def from_described(cls, out: Path, found: Mapping[str, Any]) -> ExtractedAdapter:
        """Return the adapter that OUT holds, by what it keeps about it."""
        adapter = found["adapter"]
        return cls(
            out,
            matrices_of([{"matrix": each} for each in found["matrices"]]),
            tuple(found["saved"]),
            adapter["unchanged"],
            adapter["excluded"],
            tuple((each["name"], each["reason"]) for each in found["left_out"]),
            adapter["bytes"],
            adapter["rank"],
        )

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data, as ``extract-lora --report`` writes it. Sizes are in bytes."""
        return {
            **self.described(),
            "warnings": list(self.warnings),
            "measured": {
                "bytes_read": self.bytes_read,
                "max_ram": self.max_ram,
                "peak_ram": self.peak_ram,
                "peak_rss": self.peak_rss,
            },
        }

    def __repr__(self) -> str:
        """One line with the directory, the number of matrices and their error."""
        error = "" if self.error is None else f", error {self.error:.3g}"
        return f"<ExtractedAdapter {str(self.out)!r}: {len(self.matrices):,} matrices of rank {self.rank}{error}>"


def matrices_of(records: Sequence[Mapping[str, Any]]) -> tuple[MatrixResult, ...]:
    """Return the results that records of finished jobs contain."""
    return tuple(
        MatrixResult(**{**record["matrix"], "shape": tuple(record["matrix"]["shape"])})
        for record in records
        if "matrix" in record
    )
