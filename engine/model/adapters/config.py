"""The adapter_config.json of a LoRA adapter: scales and ranks of its modules, and what can't be merged.

Sources: peft 0.21.2, ``tuners/lora/config.py`` (fields), ``tuners/lora/layer.py`` (scaling), ``utils/other.py``
(`get_pattern_key`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ....errors import CheckpointError
from ....io.output.digests import bytes_digest
from ..roles import is_head

CONFIG = "adapter_config.json"

_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that subtract the adapter's first values from the base, so the adapter only fits a changed base."""

_UNSUPPORTED = {
    "alora_invocation_tokens": "is an activated LoRA (aLoRA), which changes the model only after its invocation tokens",
    "use_qalora": "is a QALoRA adapter, whose A belongs to groups of quantized columns",
    "kasa_config": "is a KaSA adapter, whose base is truncated by a singular value decomposition",
    "monteclora_config": "is a MonteCLoRA adapter, whose factors are sampled",
    "arrow_config": "is an Arrow router, which chooses adapters for each token",
    "use_bdlora": "is a BD-LoRA adapter, whose factors are block-diagonal",
    "megatron_config": "is an adapter for Megatron's parallel layers",
    "velora_config": "is a VeLoRA adapter",
    "layer_replication": "was trained on a stack of repeated layers (layer_replication): write that stack as a stage, "
    "and apply an adapter for its layers there",
}
"""Fields that change what an adapter is, each with what it is then."""

_KNOWN_INITIALIZATIONS = ("true", "false", "gaussian", "eva", "orthogonal", "mica", *_CHANGED_BASE)
"""Values of ``init_lora_weights``, in lower case, or their beginnings."""

_KNOWN_KINDS = (
    *("use_rslora", "use_dora", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    "runtime_config",
)
"""Fields named like a kind of adapter that don't change what it is."""

_KNOWN_VERSION = (0, 21)
"""Of this version of PEFT and earlier ones, all kinds of adapters are known: it ignores any other field."""

_SNAPSHOT = re.compile(r"models--(?:[^/]+--)?([^/]+)/snapshots/[^/]+/?$")
"""The directory of a model in the cache of huggingface_hub."""

_NAMES = {"IA3": "(IA)³", "LOHA": "LoHa", "LOKR": "LoKr", "ADALORA": "AdaLoRA", "VERA": "VeRA", "XLORA": "X-LoRA"}


class AdapterConfig:
    """The content of adapter_config.json.

    Args:
        name: name of the adapter, for errors.
        content: the content.

    Attributes:
        base: name of the model that the adapter was trained on; empty if it is unknown.
        fan_in_fan_out: whether weights of adapted modules are stored as [in, out].
        dora: whether the adapter has a magnitude for each row.
        target_parameters: names of adapted parameters, such as those of fused experts.
        modules_to_save: ends of the names of modules that were trained in full.
        trains_tokens: whether rows of embeddings were trained.
        lora_bias: whether the factors have biases.
        bias: which biases of the model were trained: ``none``, ``all`` or ``lora_only``.

    Raises:
        CheckpointError: the adapter is not a LoRA adapter, or of a kind that can't be merged.
    """

    def __init__(self, name: str, content: Mapping[str, Any]) -> None:
        self._name = name
        self._content = content
        self._check_kind()
        self.base = str(content.get("base_model_name_or_path") or "")
        self.fan_in_fan_out = bool(content.get("fan_in_fan_out"))
        self.dora = bool(content.get("use_dora"))
        self.target_parameters = self._names("target_parameters")
        self.modules_to_save = self._names("modules_to_save")
        self.trains_tokens = bool(content.get("trainable_token_indices"))
        self.lora_bias = bool(content.get("lora_bias"))
        self.bias = str(content.get("bias") or "none")
        self._ranks = self._patterns("rank_pattern")
        self._alphas = self._patterns("alpha_pattern")

    @property
    def digest(self) -> str:
        """The digest of the content, in hexadecimal."""
        return bytes_digest(json.dumps(self._content, sort_keys=True).encode())

    @property
    def version(self) -> tuple[int, int] | None:
        """Major and minor version of PEFT that wrote the adapter; None if it is unknown: before 0.18."""
        match = re.match(r"(\d+)\.(\d+)", str(self._content.get("peft_version") or ""))
        return None if match is None else (int(match[1]), int(match[2]))

    def rank(self, module: str) -> int:
        """Return the rank of a module. Raises CheckpointError if the config has none."""
        return int(self._number(self._ranks.value_for(module), "r"))

    def scale(self, module: str) -> float:
        """Return what the product of a module's factors is multiplied by. Raises CheckpointError."""
        rank, alpha = self.rank(module), self._number(self._alphas.value_for(module), "lora_alpha")
        if rank <= 0:
            raise CheckpointError(f"{self._name}: {CONFIG} has the rank {rank} for {module}: it must be positive")
        return alpha / (math.sqrt(rank) if self._content.get("use_rslora") else rank)

    def token_indices(self, module: str) -> tuple[int, ...]:
        """Return the rows of an embedding that the adapter replaces, in the order of their values."""
        found = self._content.get("trainable_token_indices")
        if isinstance(found, dict):
            own = next((rows for key, rows in found.items() if module == key or module.endswith("." + key)), None)
            tied = next(iter(found.values())) if len(found) == 1 and is_head(f"{module}.weight") else None
            found = tied if own is None else own
        if not isinstance(found, list) or not all(type(row) is int for row in found):
            raise CheckpointError(
                f"{self._name}: has rows for tokens of {module}, but trainable_token_indices of {CONFIG} doesn't list "
                "the tokens: download the adapter again"
            )
        return tuple(found)

    def _check_kind(self) -> None:
        kind = self._content.get("peft_type")
        if kind != "LORA":
            shown = _NAMES.get(str(kind), str(kind))
            raise CheckpointError(
                f"{self._name} is an adapter of the kind {shown}, and only LoRA adapters can be applied: merge it into "
                "its base with PEFT (merge_and_unload), if PEFT can do that, and use the result"
            )
        for key, what in _UNSUPPORTED.items():
            if self._content.get(key):
                raise CheckpointError(f"{self._name} {what} ({key} in {CONFIG}); it can't be applied to a base")
        is_newer = (self.version or _KNOWN_VERSION) > _KNOWN_VERSION
        kinds = [key for key in self._content if key.startswith("use_") or key.endswith("_config")]
        init = self._content.get("init_lora_weights")
        found = [key for key in kinds if is_newer and self._content[key] and key not in _KNOWN_KINDS]
        if init is not None and not str(init).lower().startswith(_KNOWN_INITIALIZATIONS):
            found.append("init_lora_weights")
        if found:
            raise CheckpointError(
                f"{self._name} has {found[0]}: {self._content[found[0]]!r} in {CONFIG}, whose meaning is unknown to "
                "this version of mergeloom: merge the adapter into its base with PEFT (merge_and_unload)"
            )
        if isinstance(init, str) and init.lower().startswith(_CHANGED_BASE):
            raise CheckpointError(
                f"{self._name} was initialized with {init} (init_lora_weights in {CONFIG}), which also changes the "
                "base: save it as a plain LoRA adapter with PEFT "
                "(save_pretrained with path_initial_model_for_weight_conversion), and use that"
            )

    def _names(self, key: str) -> tuple[str, ...]:
        found = self._content.get(key) or ()
        if not isinstance(found, (list, tuple)) or not all(isinstance(each, str) for each in found):
            raise CheckpointError(f"{self._name}: {key} in {CONFIG} is {found!r}, not a list: download it again")
        return tuple(found)

    def _patterns(self, key: str) -> _Patterns:
        found = self._content.get(key) or {}
        if not isinstance(found, dict):
            raise CheckpointError(f"{self._name}: {key} in {CONFIG} is {found!r}, not an object: download it again")
        try:
            return _Patterns(found)
        except re.error as error:
            raise CheckpointError(
                f"{self._name}: {error.pattern!r} in {CONFIG} is not a valid pattern of module names ({error}): use "
                f"the {CONFIG} that was saved with it"
            ) from error

    def _number(self, found: Any, key: str) -> float:
        value = self._content.get(key) if found is None else found
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CheckpointError(
                f"{self._name}: {key} in {CONFIG} is {value!r}, not a number: use the {CONFIG} that was saved with it"
            )
        return value

    def other_base(self, base: str, known: Iterable[str]) -> str:
        """Return a remark if the adapter names another base than the one it is applied to; empty otherwise.

        Args:
            base: the base in the recipe.
            known: names that the base has elsewhere, such as in its config.json.
        """
        names = {_last(name) for name in (base, *known) if name}
        if not self.base or _last(self.base) in names:
            return ""
        return f"{self._name} was trained on {self.base} ({CONFIG}), and is applied to {base}"


class _Patterns:
    """Values by patterns of module names. Each name is matched once: some adapters have a pattern for each module.

    Args:
        values: the values by pattern. Raises re.error if one is invalid.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        for pattern in values:
            re.compile(pattern)  # for the positions in an error
        self._values = [(re.compile(rf"(?:.*\.)?(?:{pattern})$"), value) for pattern, value in values.items()]
        self._known: dict[str, Any] = {}

    def value_for(self, module: str) -> Any:
        """Return the value of the first pattern that matches a module; None if none does."""
        if module not in self._known:
            found = (value for pattern, value in self._values if pattern.match(module))
            self._known[module] = next(found, None)
        return self._known[module]


def _last(name: str) -> str:
    """The last component of a path or an id, in lower case and without a revision, also that of a snapshot's id."""
    snapshot = _SNAPSHOT.search(name)
    last = (snapshot[1] if snapshot else name.rstrip("/").rpartition("/")[2]).lower()
    return last.partition("@")[0] or last
