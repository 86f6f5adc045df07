"""What is expected of every published recipe: its models' family, and its warnings or its rejection."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.support.paths import ROOT

RECIPES = ROOT / "tests" / "fixtures" / "published_recipes"


@dataclass(frozen=True)
class Case:
    """A recipe and what is expected.

    Args:
        recipe: the recipe's number.
        family: family of its models; that of some models is in `others`.
        warnings: words of each warning's text.
        rejected: words of the error's text, empty if the recipe merges.
        edits: regular expressions and their replacements in the recipe's text.
        variant: what the edits mean.
        others: other families, by the name of a model.
        same: models in one directory: an alias, and the model that it stands for.
    """

    recipe: str
    family: str = ""
    warnings: tuple[tuple[str, ...], ...] = ()
    rejected: tuple[str, ...] = ()
    edits: tuple[tuple[str, str], ...] = ()
    variant: str = ""
    others: dict[str, str] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.file.stem} {self.variant}".strip()

    @property
    def file(self) -> Path:
        """The published file."""
        (file,) = RECIPES.glob(f"{self.recipe}-*.yml")
        return file

    @property
    def text(self) -> str:
        """The recipe, edited."""
        text = self.file.read_text()
        for pattern, replacement in self.edits:
            text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
            assert count, f"{self.file.name} does not contain {pattern}"
        return text

    @property
    def sets_dtype(self) -> bool:
        """Whether the output's dtype is set; otherwise all models have the same."""
        *_, output = yaml.safe_load_all(self.text)
        return not output.keys().isdisjoint(("dtype", "out_dtype"))

    def models(self) -> list[str]:
        """The models that the recipe names, without adapters, and that no stage makes: the base model first."""
        return list(dict.fromkeys(name.partition("+")[0] for name in self._names()))

    def adapters(self) -> list[str]:
        """The models with an adapter that the recipe names."""
        return [name for name in self._names() if "+" in name]

    def _names(self) -> list[str]:
        documents = list(yaml.safe_load_all(self.text))
        stages = {document.get("name") for document in documents}
        bases = [document["base_model"] for document in documents if "base_model" in document]
        named = dict.fromkeys([*bases, *(name for document in documents for name in _models(document))])
        return [name for name in named if name not in stages]


def _models(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("model"), str):
            yield node["model"]
        for child in node.values():
            yield from _models(child)
    elif isinstance(node, list):
        for child in node:
            yield from _models(child)


NO_WEIGHT = "has no such parameter"
NO_END = ("eos_token_id differs", "tokenizer_source")
"""The base's files lack the end tokens of chats that a fine-tune has."""

CASES = [
    Case(
        "001",
        "Mistral-Nemo",
    ),
    Case("002", "Mistral-Nemo"),
    Case(
        "004",
        "Mistral-Nemo",
        warnings=(("nemo-12b-a", "weight"),),
    ),
    Case("005", "Mistral-Nemo"),
    Case("007", "Mistral-Nemo", warnings=(("normalize", "sce"),)),
    Case("008", "Llama-3.1-70B", warnings=(("select_topk", "parameters"), ("dype", "dtype"))),
    Case(
        "010",
        "Mistral-Nemo",
        warnings=(("model-12b-j", "twice"),),
    ),
    Case("011", "Mistral-Nemo"),
    Case("013", "Llama-3.1-8B", warnings=(NO_END,)),
    Case("014", rejected=("dtype", "bfloat16`", "did you mean `bfloat16`")),
    Case("016", rejected=("not valid YAML", "models:")),
    Case("017", "Llama-3.1-70B"),
    Case("019", "Mistral-7B"),
    Case("020", "Mistral-Nemo", warnings=(("normalize", "normalize_weights"),)),
    Case(
        "022",
        "Llama-3.2-1B",
        warnings=(("models[0]", "weight", NO_WEIGHT), ("models[1]", "weight", NO_WEIGHT), NO_END),
    ),
    Case("023", "Qwen3.5-4B"),
    Case("025", "Llama-3-8B", warnings=(NO_END,)),
    Case("026", "Mistral-7B"),
    Case("028", "Mistral-Nemo", warnings=tuple((f"models[{i}]", "weight", NO_WEIGHT) for i in range(5))),
    Case("029", "Llama-3.1-8B"),
    Case("031", "Llama-3-8B"),
    Case("032", "Mistral-7B", warnings=(("revision", "@"),)),
    Case("034", "Llama-2-13B"),
    Case("035", "Llama-2-7B"),
    Case("037", "Llama-3.1-8B", warnings=(NO_END,)),
    Case("038", rejected=("not valid YAML", "indent")),
    Case("040", "Llama-3.1-70B"),
    Case("041", "Mistral-7B"),
    Case("043", "Phi-3-mini", warnings=(("models[0]", "weight", NO_WEIGHT),)),
    Case("044", rejected=("passthrough takes 1 model, got 2: model-a, model-b",)),
    Case("046", "Mistral-7B", warnings=(("parameters.dtype", "top level"),)),
    Case("047", rejected=("slerp takes 1 model besides the base, got 2: mistral-7b-b, mistral-7b-c",)),
    Case("049", rejected=("slerp needs a `base_model`",)),
    Case("050", rejected=("ties needs a `base_model`",)),
    Case("052", rejected=("slices[1]", "passthrough takes 1 model, got 2: model-a, model-b")),
    Case("053", rejected=("slerp needs the base model, mistral-7b-a, among the slice's sources",)),
    Case("055", "Yi-34B", same={"yi-34b-a": "yi-34b-b"}, rejected=("yi-34b-a and yi-34b-b are the same model",)),
    Case("056", rejected=("not valid YAML", "indent")),
    Case("058", rejected=("slerp needs a `base_model`",)),
    Case("059", rejected=("slerp takes 1 model besides the base, got 3: llama-7b-a, llama-7b-b, model-7b-a",)),
    Case("061", rejected=("ties needs the base model, llama-3.2-3b-a, among the slice's sources",)),
    Case("062", rejected=("unknown merge method 'ota'",)),
    Case("064", rejected=("slerp needs a `base_model`",)),
    Case("065", "Mixtral-8x7B", rejected=("block_sparse_moe", "model-7b-a"), others={"model-7b-a": "Mistral-7B"}),
    Case("071", rejected=("unknown merge method '$METHOD'",)),
    Case(
        "071",
        "Qwen3-30B-A3B",
        edits=((r"\$DENSITY", "0.5"), (r"\$METHOD", "dare_ties"), (r"\$DTYPE", "bfloat16")),
        variant="filled in",
    ),
    Case("073", "Llama-3.1-8B", warnings=(NO_END,)),
    Case(
        "074",
        "Llama-3.1-8B",
        rejected=("different architectures", "qwen-7b-a", "qwen2"),
        others={"qwen-7b-a": "Qwen2.5-7B"},
    ),
    Case("076", rejected=("not valid YAML", "---")),
    Case("077", "Mistral-Nemo", edits=((r"\./model-e", "./model-e-here"),)),
    Case("079", rejected=("a second stage without a `name`",)),
    Case("080", "Qwen2-VL-7B"),
    Case("082", rejected=("unknown merge method 'encoder_decoder_weighted'",)),
    Case("086", rejected=("one of `models`, `slices`, `modules` is required",)),
    Case("088", rejected=("unknown dtype 'q4_k_m'",)),
    Case("089", rejected=("`merge_method` is missing",)),
    Case("091", rejected=("unknown dtype 'bfloat'",)),
    Case("092", "Qwen2.5-14B", warnings=(("qwen-14b-a, the only model", "no effect"),)),
    Case(
        "094",
        "Llama-3.2-3B",
        rejected=("llama-3.2-3b-a", "bitsandbytes"),
        others={"llama-3.2-3b-a": "Llama-3.2-3B-bnb-4bit"},
    ),
    Case("095", "StableLM-3B"),
    Case("097", "Mistral-Nemo"),
    Case("098", rejected=("models[0].model-a", "did you mean `model`?")),
    Case("098", "Mistral-7B", edits=((r"- model-a:", "- model:"),), variant="with its key"),
    Case("100", "BERT-base"),
    Case("101", "BERT-base", rejected=("vocabular", "model-a", "model-b"), others={"model-b": "BERT-base-chinese"}),
    Case("103", "Sheared-Llama-2.7B"),
    Case("104", "Mistral-Nemo"),
    Case("106", "Mistral-7B"),
    Case("107", "Yi-34B", warnings=(("model-34b-a", "weight"), ("<|im_start|>",), ("<|im_end|>", "not an end token"))),
    Case("109", "Llama-2-7B", warnings=(("model-7b-a", "weight"),)),
    Case("110", "Mistral-7B"),
    Case("110", "Mistral-7B", edits=((r"(model-\w)$", r"\1/model.safetensors"),), variant="with files"),
    Case("112", rejected=("[0, -1]",)),
    Case("115", "Llama-3.1-70B"),
    Case("116", "Llama-160M"),
]
"""Every recipe at least once."""

LONG = frozenset(
    (
        *("001", "002", "004", "005", "007", "008", "010", "011", "017", "023", "025", "026", "028"),
        *("031", "035", "040", "046", "071", "077", "092", "095", "097", "100", "104", "106", "107", "110"),
    )
)
"""Recipes that take long to merge or to evaluate, of methods and families that others represent as well, mostly."""
