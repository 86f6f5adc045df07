"""Finds the weights that can be stored as blocks of 8-bit codes: those of linear layers, by names and shapes.

Loaders create quantized modules for linear layers only. Which tensors those are is not in a checkpoint, so the names of
projections decide. A name that is not known stays unquantized, and config.json lists it: loaders read that, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from ...model.inputs import Model
from ...model.logical import shape_of
from ...model.roles import is_embedding, is_head
from ...recipe.entries.block_format import BlockFormat

_LINEAR = re.compile(
    r"\w*_proj|in_proj_qkvz|w[123qkvo]|[wW]qkv|W[io]|fc\d?|fc_(?:in|out)|dense\w*|query|key|value|query_key_value"
)
"""Modules of linear layers, by the last component of their names."""
_OTHER = re.compile(r"(?:weights|eh|dt|patch|pos|embed\w*|position\w*)_proj")
"""Those that are none, or that models don't use as linear layers: DeepSeek's indexer and prediction head, Mamba."""
_ROUTER = re.compile(r"gate|router|shared_expert_gate|wg")
"""Modules that choose experts."""
_FUSED_EXPERTS = re.compile(r"(?:gate_up|gate|up|down)_proj")
_EXPERT = re.compile(r"(.*\.experts)\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|\n|$)")
_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("query", "key", "value"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Projections that vLLM and SGLang load as one: all of them are stored in the same format."""


class LinearWeights:
    """The linear weights of the models that a donor's config.json describes.

    Args:
        donor: the donor.
    """

    def __init__(self, donor: Model) -> None:
        self._donor = donor
        self._shapes: dict[str, set[tuple[int, ...]]] = {}
        self._reasons: dict[tuple[str, tuple[int, ...], BlockFormat], str] = {}

    def refuse(self, name: str, shape: tuple[int, ...], form: BlockFormat) -> str:
        """Return why a tensor of the output can't be stored in a format; an empty text if it can.

        Args:
            name: name of the tensor.
            shape: shape of its value.
            form: the format.
        """
        layer = self._donor.layers.split(name)
        if layer is None:
            kind = "embedding" if is_embedding(name) else "head" if is_head(name) else ""
            return f"it is the {kind}" if kind else "it belongs to no layer of the language model"
        key = (without_numbers(layer.rest), shape, form)
        if key not in self._reasons:
            self._reasons[key] = self._refuse(without_numbers(name), layer.rest, shape, form)
        return self._reasons[key]

    def _refuse(self, kind: str, rest: str, shape: tuple[int, ...], form: BlockFormat) -> str:
        module, _, last = rest.rpartition(".")
        if holds_all_experts(rest, shape):
            return "it holds all experts of a layer, for which loaders have no common names of scales"
        if len(shape) != 2 or last != "weight":
            return f"it is not a matrix of weights (shape {list(shape)})"
        own = module.rpartition(".")[2]
        if _ROUTER.fullmatch(own):
            return "it is a router"
        if _OTHER.fullmatch(own) or not _LINEAR.fullmatch(own):
            return f"mergeloom does not know `{own}` as a linear layer"
        for name, found in (("", shape), *self._others(kind, own)):
            if not form.fits(found):
                where = ", with which loaders fuse it," if name else ""
                what = f"{name}{where} has the shape" if name else "its shape is"
                return f"{what} {list(found)}, which is not a multiple of {form.rows}x{form.columns}"
        return ""

    def _others(self, kind: str, own: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The projections that are loaded together with one, with all shapes that they have in the donor."""
        if not self._shapes:
            for name in self._donor.tensors:
                self._shapes.setdefault(without_numbers(name), set()).add(shape_of(self._donor.tensors, name))
        group = next((each for each in _TOGETHER if own in each), (own,))
        for other in group:
            beginning = kind.removesuffix(f"{own}.weight")
            for shape in sorted(self._shapes.get(f"{beginning}{other}.weight", ())):
                if len(shape) == 2:
                    yield other, shape


def holds_all_experts(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds a projection of all experts of a layer."""
    return len(shape) == 3 and _FUSED_EXPERTS.fullmatch(name.rpartition(".")[2]) is not None


def split_groups(names: set[str], stored: set[str]) -> Iterator[tuple[str, str]]:
    """Yield modules of which one is stored as blocks and another one, which is loaded together with it, is not.

    Args:
        names: all modules of the output.
        stored: those that are stored as blocks.
    """
    for module in stored:
        beginning, dot, own = module.rpartition(".")
        for other in next((each for each in _TOGETHER if own in each), ()):
            if (name := f"{beginning}{dot}{other}") in names and name not in stored:
                yield module, name


def without_numbers(name: str) -> str:
    """Return a name without the numbers of layers and experts."""
    return _NUMBER.sub("*", name)


def experts_of(name: str) -> str | None:
    """Return the name of the list of experts that a tensor or module belongs to, or None."""
    match = _EXPERT.match(name)
    return match[1] if match else None


def kinds_of(names: Iterable[str]) -> set[str]:
    """Return the different names without numbers. All names are searched at once, which is faster than one by one."""
    return set(without_numbers("\n".join(names)).split("\n")) - {""}
