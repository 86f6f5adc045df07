"""Generates the recipe of a self-merge by overlapping windows, as used for the BigLlama models.

Windows of equal length and distance are taken from a model's layers and stacked: with window 42 and step 21, 126 layers
give [0, 42], [21, 63], [42, 84], [63, 105] and [84, 126], a total of 210 layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import yaml

from ...errors import UsageError
from ...io.checkpoint.checkpoint import Checkpoint
from ..recipe.node_reader import DTYPES
from ..recipe.types import ModelReference
from .contents.diffusion import layers_of
from .formats.registry import tensors_of
from .layers import LayerMap
from .logical import Tensors

Window = tuple[int, int]
"""The first layer and the one after the last."""

MAX_LAYERS = 100_000
"""The maximum number of layers of a result: repeated stacking grows fast and must not exhaust the memory."""


@dataclass(frozen=True, slots=True)
class Round:
    """One pass of stacking.

    Args:
        before: number of layers before the pass.
        windows: the windows that the pass takes, in order.
    """

    before: int
    windows: tuple[Window, ...]

    @property
    def layers(self) -> int:
        """Number of layers after the pass."""
        return sum(end - first for first, end in self.windows)

    @property
    def unused(self) -> range:
        """The layers after the last window."""
        return range(self.windows[-1][1], self.before)


@dataclass(frozen=True, slots=True)
class StackSummary:
    """The result of stacking.

    Args:
        layers: number of layers of the result.
        parameters: number of parameters of the result.
        rounds: the passes of stacking.
        slices: the slices of the model's own layers that are equivalent to all passes.
        warnings: warnings for the user.
    """

    layers: int
    parameters: int
    rounds: tuple[Round, ...]
    slices: tuple[Window, ...]
    warnings: tuple[str, ...]


def stack_windows(layers: int, window: int, step: int | None = None, *, exact: bool = False) -> tuple[Window, ...]:
    """The windows of one pass: as many as fit, starting at layer 0.

    Args:
        layers: number of layers before the pass.
        window: number of layers in each window.
        step: distance between the starts of two windows; by default half a window.
        exact: whether the last window is extended to the last layer.

    Raises:
        UsageError: for a window that is larger than the model, and for a step that is larger than the window, which
            would omit layers.
    """
    step = max(1, window // 2) if step is None else step
    if not 1 <= window <= layers:
        raise UsageError(f"window {window} is invalid for {layers} layers: use 1 to {layers}")
    if not 1 <= step <= window:
        raise UsageError(
            f"step {step} is invalid for window {window}: use 1 to {window}; a larger step would omit layers"
        )
    windows = [(first, first + window) for first in range(0, layers - window + 1, step)]
    if exact:
        windows[-1] = (windows[-1][0], layers)
    return tuple(windows)


def compose(windows: Sequence[Window], slices: Sequence[Window]) -> tuple[Window, ...]:
    """The slices of the model that are equivalent to `windows` of a stack of `slices`."""
    layers = [layer for first, end in slices for layer in range(first, end)]
    taken = [layer for first, end in windows for layer in layers[first:end]]
    runs = [list(run) for _, run in groupby(enumerate(taken), lambda item: item[1] - item[0])]
    return tuple((run[0][1], run[-1][1] + 1) for run in runs)


def stack_recipe(
    model: ModelReference | str,
    checkpoint: Checkpoint,
    *,
    window: int | Sequence[int],
    step: int | Sequence[int] | None = None,
    repeat: int | None = None,
    dtype: str | None = None,
    exact: bool = False,
) -> tuple[str, StackSummary]:
    """Write the recipe of a self-merge by overlapping windows.

    Repeated stacking needs only one stage, since all passes together are equivalent to slices of the model itself.

    Args:
        model: reference of the model in the recipe; a string is parsed as ``path`` or ``id@revision``.
        checkpoint: the model's checkpoint.
        window: length of the windows in layers, for all passes or for each.
        step: distance between the starts of two windows, for all passes or for each; by default half a window.
        repeat: number of passes; by default the number of windows or steps.
        dtype: dtype of the output, such as ``bfloat16``; by default that of the model.
        exact: whether the last window of a pass is extended to the last layer.

    Returns:
        The recipe's text and a summary of its result.

    Raises:
        UsageError: for numbers that are invalid for the model, and for a model without exactly one stack of layers.
        CheckpointError: if headers and config.json don't show which tensors are layers.
    """
    reference = _reference(model)
    name = _printable(reference.text)
    if dtype is not None and dtype.removeprefix("torch.") not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    tensors = tensors_of(checkpoint)
    layers = layers_of(tensors, checkpoint.config)
    if len(layers.mains) != 1:
        what = f"{len(layers.mains)} stacks of layers" if layers.mains else "no layers"
        raise UsageError(f"{name} has {what} instead of one: write the recipe by hand, with `modules`")
    count = layers.main.count
    rounds = _rounds(count, _passes(window, step, repeat), exact)
    slices: tuple[Window, ...] = ((0, count),)
    for one in rounds:
        slices = compose(one.windows, slices)
    summary = StackSummary(
        layers=rounds[-1].layers,
        parameters=_parameters(tensors, layers, slices),
        rounds=rounds,
        slices=slices,
        warnings=_warnings(name, count, rounds, slices),
    )
    return _text(reference, summary, dtype), summary


def _reference(model: ModelReference | str) -> ModelReference:
    if isinstance(model, ModelReference):
        return model
    try:
        return ModelReference.parse(model)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _passes(
    window: int | Sequence[int], step: int | Sequence[int] | None, repeat: int | None
) -> list[tuple[int, int | None]]:
    """The window and step of each pass."""
    windows = [window] if isinstance(window, int) else list(window)
    steps: list[int | None] = [step] if step is None or isinstance(step, int) else [*step] or [None]
    passes = max(len(windows), len(steps)) if repeat is None else repeat
    if not windows or passes < 1:
        raise UsageError("stacking needs a window and at least one pass")
    for what, count in (("window", len(windows)), ("step", len(steps))):
        if count not in (1, passes):
            raise UsageError(f"got {count} {what}s for {passes} passes: give one for all passes, or one for each")
    return [(windows[number % len(windows)], steps[number % len(steps)]) for number in range(passes)]


def _rounds(layers: int, passes: Sequence[tuple[int, int | None]], exact: bool) -> tuple[Round, ...]:
    rounds: list[Round] = []
    for window, step in passes:
        rounds.append(Round(layers, stack_windows(layers, window, step, exact=exact)))
        layers = rounds[-1].layers
        if layers > MAX_LAYERS:
            raise UsageError(f"pass {len(rounds)} makes {layers:,} layers: the maximum is {MAX_LAYERS:,}")
    return tuple(rounds)


def _parameters(tensors: Tensors, layers: LayerMap, slices: Sequence[Window]) -> int:
    """Elements of all tensors: a layer's count once per use, all others (including extra layers) once."""
    times = [0] * layers.main.count
    for first, end in slices:
        for layer in range(first, end):
            times[layer] += 1
    total = 0
    for name, tensor in tensors.items():
        parsed = layers.split(name)
        total += tensor.elements * (1 if parsed is None or parsed.extra else times[parsed.index])
    return total


def _warnings(name: str, layers: int, rounds: Sequence[Round], slices: Sequence[Window]) -> tuple[str, ...]:
    """Warn about each pass that leaves layers at the end unused, and about layers of the model in no slice."""
    warnings = []
    for number, one in enumerate(rounds):
        if one.unused:
            stack = name if number == 0 else f"the {one.before} that pass {number} makes"
            warnings.append(
                f"{_layers(one.unused)} of {stack} {'is' if len(one.unused) == 1 else 'are'} unused: the last window "
                f"ends before {'it' if len(one.unused) == 1 else 'them'} (--exact extends it to the last layer)"
            )
    end = max(end for _, end in slices)
    if any(one.unused for one in rounds[1:]) and end < layers:
        warnings.append(f"{_layers(range(end, layers))} of {name} {'is' if end == layers - 1 else 'are'} in no slice")
    return tuple(warnings)


def _layers(numbers: range) -> str:
    return f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {numbers[0]} to {numbers[-1]}"


def _printable(text: str) -> str:
    """`text` with non-printable characters escaped, for use in a comment."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _text(reference: ModelReference, summary: StackSummary, dtype: str | None) -> str:
    head = [
        f"{_printable(reference.text)}, stacked on itself by overlapping windows.",
        f"Makes {summary.layers} layers, {summary.parameters:,} parameters.",
    ]
    for number, one in enumerate(summary.rounds, 1):
        windows = ", ".join(f"[{first}, {end}]" for first, end in one.windows[:8])
        more = f" and {len(one.windows) - 8} more" if len(one.windows) > 8 else ""
        head.append(f"Pass {number}: {one.before} layers -> {one.layers}: {windows}{more}")
    if len(summary.rounds) > 1:
        head.append("The slices below are equivalent to all passes.")
    head += [f"Warning: {warning}" for warning in summary.warnings]
    content = {
        "merge_method": "passthrough",
        "slices": [{"sources": [_source(reference, part)]} for part in summary.slices],
        **({"dtype": dtype} if dtype else {}),
    }
    body = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)
    return "".join(f"# {line}\n" for line in head) + body


def _source(reference: ModelReference, part: Window) -> dict[str, object]:
    """A slice's source; a path that contains a special character of references is written as a mapping."""
    model: object = reference.text
    if "@" in reference.path or "+" in reference.path:
        revision = {} if reference.revision is None else {"revision": reference.revision}
        model = {"path": reference.path, **revision}
    return {"model": model, "layer_range": list(part)}
