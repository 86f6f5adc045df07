"""The rules for prediction layers (MTP), which few tools load and many fine-tunes lack.

They are layers beyond the number that config.json states (``model.layers.61`` of DeepSeek-V3), or modules of their own
(``mtp.0``, ``model.mtp.layers.0``). A merge treats them like other layers if all of its models have them. If some lack
them, they are copied from the base model, or else the first model; without them there, they are left out. A stack keeps
those of its last slice, whose last layer they continue.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ....io.units import listed
from ...model.inputs import BoundSlice, Model
from ...model.layers import Stack
from ...model.roles import is_prediction
from ...model.warnings import ModelWarning, ModelWarningKind
from ..rules import TensorRules
from ..usage import TensorUsage


class PredictionLayers:
    """Chooses where the prediction layers of a stage's output come from.

    Args:
        donor: the model whose config.json describes the output.
        rules: adds single tensors.
        usage: records why tensors are not used.
    """

    def __init__(self, donor: Model, rules: TensorRules, usage: TensorUsage) -> None:
        self._donor = donor
        self._rules = rules
        self._usage = usage
        self._copied: dict[tuple[BoundSlice, int], BoundSlice] = {}
        self._have: dict[int, bool] = {}  # by model, whether it has modules of prediction layers
        self._modules: dict[tuple[str, str], list[str]] = {}  # by model and what happens, names in its modules
        self._warnings: list[ModelWarning] = []

    def extras(self, part: BoundSlice, stack: int, count: int) -> Iterator[tuple[BoundSlice, list[int], int]]:
        """Find what to add of the layers beyond those that config.json counts.

        Args:
            part: the last slice.
            stack: number of the main stack.
            count: number of layers of the output before them.

        Yields:
            The slice to use, the layer of each of its models, and the number of the layer in the output.
        """
        mains = [model.layers.mains[stack : stack + 1] for model in part.models]
        beyond = sorted({extra - main.count for each in mains for main in each for extra in main.extras})
        for ordinal in beyond:
            indices = _indices(mains, ordinal)
            layers = [model.by_layer.get((stack, at), {}) for model, at in zip(part.models, indices, strict=True)]
            source, owner = self._source(part, [list(layer.values()) for layer in layers])
            at, main = indices[owner], mains[owner][0]
            target = count + ordinal
            fate = self._fate(part, list(map(bool, layers)), f"kept as layer {target}")
            self._warnings.append(
                ModelWarning(
                    ModelWarningKind.PREDICTION_LAYERS,
                    f"{part.models[owner].name}: layer {at} is beyond the {main.count} layers that config.json counts "
                    f"(probably a prediction head): it is {fate}",
                    names=(f"{main.prefix}.{at}",),
                )
            )
            if source is part:
                yield part, indices, target
            elif source is not None:
                yield source, [at], target

    def add(self, name: str, part: BoundSlice, names: Sequence[str | None], group: int) -> bool:
        """Add a tensor in a module of prediction layers if some models have no such module.

        Args:
            name: name of the output tensor.
            part: the slice that it comes from.
            names: for each model of the slice, its name for the tensor, or None.
            group: group of the output.

        Returns:
            Whether the tensor is dealt with: it is copied, or left out. Otherwise it is a tensor like others.
        """
        if None not in names or not is_prediction(name):
            return False
        lacking = [model for model, own in zip(part.models, names, strict=True) if own is None]
        if any(map(self._has_module, lacking)):
            return False  # only this tensor is missing
        source, owner = self._source(part, [[] if own is None else [own] for own in names])
        if source is not None:
            self._rules.add(source, name, [names[owner]], 0.0, group, copied=True)
        holder = part.models[owner] if any(names) else self._donor
        fate = self._fate(part, [own is not None for own in names], "kept")
        self._modules.setdefault((holder.name, fate), []).append(name)
        return True

    def warnings(self) -> Iterator[ModelWarning]:
        """The warnings about prediction layers, one for each model and what happens to its layers."""
        yield from self._warnings
        for (model, fate), names in self._modules.items():
            problem = f"{model}: the prediction layers in {_root(names[0])} are {fate}"
            yield ModelWarning(ModelWarningKind.PREDICTION_LAYERS, problem, names=tuple(names))

    def _source(self, part: BoundSlice, names: Sequence[Sequence[str]]) -> tuple[BoundSlice | None, int]:
        """Where prediction layers come from, and what is not used.

        Args:
            part: the slice.
            names: for each model of the slice, its tensors, none if it has no prediction layers.

        Returns:
            The slice itself if all models have them, one that copies them from a model, or None; and the number of the
            model that has them.
        """
        parent = self._parent(part)
        if all(names):
            return part, parent
        reason = f"{part.models[parent].name} has no prediction layers"
        if names[parent]:
            reason = f"prediction layers are copied from {part.models[parent].name}"
        for number, (model, own) in enumerate(zip(part.models, names, strict=True)):
            for name in own if number != parent else ():
                self._usage.mark_unused(model, name, reason)
        if not names[parent]:
            return None, next((number for number, own in enumerate(names) if own), parent)
        key = part, parent
        if key not in self._copied:
            self._copied[key] = part.copied_from(part.models[parent])
        return self._copied[key], parent

    def _parent(self, part: BoundSlice) -> int:
        """The number of the model in a slice that prediction layers come from if not all models have them."""
        if self._donor in part.models:
            return part.models.index(self._donor)
        return part.base_any_method or 0

    def _has_module(self, model: Model) -> bool:
        if model.number not in self._have:
            self._have[model.number] = any(map(is_prediction, model.non_layer))
        return self._have[model.number]

    def _fate(self, part: BoundSlice, have: Sequence[bool], kept: str) -> str:
        """What happens to prediction layers, with the reason."""
        parent = self._parent(part)
        lacking = [model.name for model, has in zip(part.models, have, strict=True) if not has]
        if not lacking:
            return kept
        if not have[parent]:
            return f"not part of the output: {part.models[parent].name} lacks them"
        return f"{kept}, copied without merging: {listed(lacking)} {'lacks' if len(lacking) == 1 else 'lack'} them"


def _indices(mains: Sequence[Sequence[Stack]], ordinal: int) -> list[int]:
    """The number that a layer beyond the count has in each model.

    A model without config.json, or whose config.json counts the layer, has it under the number of the others.

    Args:
        mains: main stack of each model, or none.
        ordinal: the number of the layer, counted from the end of the stack.
    """
    own = [next((each.count + ordinal for each in main if each.count + ordinal in each.extras), None) for main in mains]
    known = next(index for index in own if index is not None)
    return [known if index is None else index for index in own]


def _root(name: str) -> str:
    """The part of a name up to the component that names prediction layers, such as ``model.mtp``."""
    components = name.split(".")
    return next(".".join(components[: i + 1]) for i in range(len(components)) if is_prediction(components[i]))
