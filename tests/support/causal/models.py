"""Writes tiny models of transformers' causal language model classes, and loads them again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.causal.configs import LAYERS, tiny_config


@dataclass(frozen=True)
class CausalModel:
    """A causal language model class.

    Args:
        model_type: transformers' name of its configuration.
        class_name: name of the class.
    """

    model_type: str
    class_name: str

    @property
    def type(self) -> Any:
        """The class. Importing it takes up to a second."""
        import transformers

        return getattr(transformers, self.class_name)


def causal_models() -> tuple[CausalModel, ...]:
    """The classes of transformers' mapping for causal language models, each once."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    types: dict[str, list[str]] = {}
    for model_type, class_name in NAMES.items():
        types.setdefault(class_name, []).append(model_type)
    # of several configurations of one class, the text model's
    return tuple(
        CausalModel(next((name for name in names if name.endswith("_text")), names[0]), class_name)
        for class_name, names in types.items()
    )


def write_model(kind: CausalModel, directory: Path, seed: int) -> Path:
    """Write a tiny model with random values in every floating-point tensor, in bfloat16."""
    import torch

    torch.manual_seed(seed)
    model = kind.type(tiny_config(kind.type.config_class))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def load_model(kind: CausalModel, directory: Path) -> tuple[Any, dict[str, list[str]]]:
    """Load a model, and what transformers says about it: missing, unexpected and mismatched keys."""
    model, info = kind.type.from_pretrained(directory, output_loading_info=True, dtype="auto")
    return model.eval(), {key: sorted(map(str, value)) for key, value in info.items() if value}


def layer_list(model: Any, count: int = LAYERS) -> str | None:
    """The path of the list of layers in a model: the outermost ModuleList of this length; None if there are several."""
    import torch

    found: list[str] = []
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and not is_inside:
            found.append(name)
    return found[0] if len(found) == 1 else None


def is_tied(model: Any) -> bool:
    """Whether a model's head is its embedding."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(end, "weight", None) for end in ends]
    return weights[0] is not None and weights[0] is weights[1]
