"""The estimated time of a merge, and what would shorten it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..io.units import data_size, duration
from .sections import Grid, Section

if TYPE_CHECKING:
    from ..engine.cost.estimate import Estimate

REMEDIES = {
    "read": "reading the inputs: a faster disk for them would help most",
    "upload": "copying to the GPU: a faster bus would help most",
    "download": "computing on the GPU or copying back: a faster GPU, or a second one, would help most",
    "copy": "kernel copies: a faster disk, or a file system with reflinks, would help most",
    "write": "writing the output: a faster disk for OUT would help most",
    "cores": "CPU cores, computing and copying: more or faster cores, or a GPU, would help most",
    "bandwidth": "memory bandwidth, shared by all cores: faster memory would help most, more cores would not",
}
"""The advice for each lane that can be the bottleneck, except compute, which depends on the device."""


def time_section(estimate: Estimate) -> Section:
    """Show how long the merge takes, its bottleneck, and where the rates come from."""
    if not estimate.seconds:
        return Section("Time", [("about", "no time: nothing to read or write")])
    remedy = REMEDIES.get(estimate.bottleneck.name, "computing: faster or more GPUs would help most")
    fields = [
        ("about", f"{duration(estimate.seconds)}, between {duration(estimate.low)} and {duration(estimate.high)}"),
        ("bottleneck", remedy),
    ]
    rows = tuple(
        (lane.name, data_size(lane.nbytes), lane.rate.text, lane.rate.origin, duration(lane.seconds))
        for lane in estimate.lanes
    )
    header = ("lane", "bytes", "throughput", "source", "time alone")
    lines = [f"{note[:1].upper()}{note[1:]}." for note in estimate.rates.notes]
    lines += [f"{assumption[:1].upper()}{assumption[1:]}." for assumption in estimate.assumptions]
    if option := estimate.rates.option:
        lines.append(f"To reuse these rates: {option}")
    return Section("Time", fields, Grid(header, rows, frozenset(("bytes", "throughput", "time alone"))), lines)
