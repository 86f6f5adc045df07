"""Which files beside the weights an output takes over from a model, and copying one so that it is whole or not there.

What is taken is listed by name, and everything else stays behind: weights in any format, pickles, optimizer states,
READMEs and hidden files. config.json and the model card are no companions: a merge writes its own. Licences and notices
are companions, since the licences of most open models ask that their text goes along with every copy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .sizes import format_size

LARGEST_COMPANION = 1 << 30
"""A larger file is not copied: nothing but weights is as large."""

_LARGEST_TEXT = 64 << 20


class FileKind(Enum):
    """What a companion is for: a recipe may take the tokenizer from another model than the rest."""

    TOKENIZER = "tokenizer"
    GENERATION = "generation"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class CompanionFile:
    """A file to take over.

    Args:
        path: where it goes, relative to the model's directory, with forward slashes.
        kind: what it is for.
        source: where it is; links are followed.
        nbytes: its size.
    """

    path: str
    kind: FileKind
    source: Path
    nbytes: int


_KINDS = (
    (
        FileKind.TOKENIZER,
        re.compile(
            r"tokenizer\.json|tokenizer\.model(?:\.v\d+)?|tokenizer_config\.json|special_tokens_map\.json|tekken\.json"
            r"|added_tokens\.json|vocab\.\w+|vocab-\w+\.json|merges\.txt|bpe\.codes|normalizer\.json|[\w.-]+\.tiktoken"
            r"|(?:spiece|sentencepiece(?:\.bpe)?|spm|bpe|source|target|ice_text)\.(?:model|spm)"
            r"|chat_template\.(?:jinja|json)|(?:additional_)?chat_templates/[\w.-]+\.(?:jinja|json)"
        ),
    ),
    (FileKind.GENERATION, re.compile(r"generation_config\.json")),
    (
        FileKind.OTHER,
        re.compile(
            r"(?:\w+_)?(?:pre)?processor_config\.json|feature_extractor_config\.json|modules\.json|router_config\.json"
            r"|sentence_[\w-]+_config\.json|config_sentence_transformers\.json"
            r"|(?:(?:[\w-]+[_-])?(?:licen[cs]e|copying|notice|use_policy))(?:[._-][\w.-]+)?",
            re.IGNORECASE,
        ),
    ),
)
_NEVER = re.compile(
    r"\.(?:safetensors|bin|pt|pth|pkl|pickle|ckpt|h5|msgpack|gguf|ggml|onnx|npy|npz|tflite|joblib|index\.json|py)$",
    re.I,
)
_TEMPLATES = ("chat_templates", "additional_chat_templates")
LOADER_FOLDERS = (*_TEMPLATES, "custom_generate")
"""Folders of a model directory in which transformers looks for files that no other file names."""
_LOADER_FILE = re.compile(
    r".*config.*\.json|.*(?:tokenizer|vocab).*\.json|vocab.*\.(?:txt|bpe)|tokenizer\.model\.v\d+|merges\.txt|dict\.txt"
    r"|(?:special_tokens_map|added_tokens|chat_template|normalizer|tekken|emoji|byte_maps|word_\w+)\.json"
    r"|(?:modules|model_index|params)\.json|.*\.(?:jinja|model|spm|tiktoken|codes|tokenizer)",
    re.IGNORECASE,
)
_CODE_NAMED_IN = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import|^\s*from\s+\.\s+import\s+(\w+)", re.MULTILINE)


def companion_files(
    directory: Path, kinds: Collection[FileKind] = tuple(FileKind), largest: int = LARGEST_COMPANION
) -> tuple[CompanionFile, ...]:
    """The files beside a model's weights that belong to it, by path.

    Those are the tokenizer's, the generation's, processors', sentence-transformers' and licence files that are known by
    name, and the Python files that ``auto_map`` or modules.json name, with those that they import from beside
    themselves. Only the directory itself is looked through, templates and sentence-transformers' modules below it.
    Links to files are followed, as the Hub's cache needs it; links to directories are not.

    Args:
        directory: a model's directory.
        kinds: which kinds to list.
        largest: a larger file is left out; bytes.

    Raises:
        CheckpointError: a companion can't be read, is a link to nothing, or is not the JSON that it should be.
    """
    found = {name: kind for name in _names(directory) if (kind := file_kind(name)) is not None}
    for kind, names in _code(directory, found).items():
        found |= dict.fromkeys(names, kind)
    companions = []
    for name, kind in sorted(found.items()):
        source = directory / name
        if kind not in kinds:
            continue
        try:
            nbytes = source.stat().st_size
            is_file = source.is_file()
        except OSError as error:
            raise CheckpointError(
                f"{source}: can't be read ({error.strerror}); if it is a link into the Hub's cache, download it again"
            ) from error
        if is_file and nbytes <= largest:
            companions.append(CompanionFile(name, kind, source, nbytes))
    return tuple(companions)


def _names(directory: Path) -> Iterable[str]:
    """Names of files in a model's directory, and in the few directories below it that can hold companions."""
    below = [*_TEMPLATES, *_module_directories(directory)]
    for folder in ("", *below):
        path = directory / folder
        if folder and (path.is_symlink() or not path.is_dir()):
            continue
        try:
            entries = sorted(entry.name for entry in path.iterdir())
        except OSError as error:
            raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
        if folder in _TEMPLATES or not folder:
            yield from (f"{folder}/{name}" if folder else name for name in entries)
        else:  # a sentence-transformers module: its settings, never its weights
            yield from (f"{folder}/{name}" for name in entries if name == "config.json")


def file_kind(name: str) -> FileKind | None:
    """The kind of a file by its name; None where it isn't taken over."""
    if _NEVER.search(name) or name.startswith("."):
        return None
    if name.endswith("/config.json"):
        return FileKind.OTHER
    return next((kind for kind, pattern in _KINDS if pattern.fullmatch(name)), None)


def is_loader_file(name: str) -> bool:
    """Whether a loader would pick up a file with this name, wherever it comes from.

    The loaders are transformers, tokenizers, diffusers, sentence-transformers, PEFT, vLLM and llama.cpp. They find
    weights of any format, their indexes, Python code, chat templates, vocabularies, and JSON files by the names of
    configurations. Texts, images, licences and hidden files are none of these.

    Args:
        name: path relative to the model's directory; only its last component counts.
    """
    base = name.rpartition("/")[2]
    if base.startswith("."):
        return False
    return bool(_NEVER.search(base) or _LOADER_FILE.fullmatch(base) or _is_template(name))


def _is_template(name: str) -> bool:
    folder, _, base = name.rpartition("/")
    return folder.rpartition("/")[2] in _TEMPLATES and base.endswith(".json")


def _module_directories(directory: Path) -> list[str]:
    """The directories of sentence-transformers' modules, such as ``1_Pooling``; none that lies elsewhere."""
    modules = read_json(directory / "modules.json")
    paths = [m.get("path") for m in modules if isinstance(m, dict)] if isinstance(modules, list) else []
    return sorted({path for path in paths if isinstance(path, str) and re.fullmatch(r"\w[\w-]*", path)})


def _code(directory: Path, found: Collection[str]) -> dict[FileKind, set[str]]:
    """The Python files that a model's own code is in; a file of the model's stays with it if the tokenizer needs it."""
    tokenizer: set[str] = set()
    other: set[str] = set()
    for file in _CODE_NAMED_IN:
        content = read_json(directory / file)
        auto_map = content.get("auto_map") if isinstance(content, dict) else None
        named = tokenizer if file == "tokenizer_config.json" else other
        for value in auto_map.values() if isinstance(auto_map, dict) else ():
            for reference in value if isinstance(value, list) else (value,):
                # "owner/repository--module.Class" is in another repository, where it stays
                if isinstance(reference, str) and (match := re.fullmatch(r"(\w+)\.\w+", reference)):
                    named.add(f"{match[1]}.py")
    modules = read_json(directory / "modules.json") if "modules.json" in found else None
    for module in modules if isinstance(modules, list) else ():
        kind = module.get("type") if isinstance(module, dict) else None
        if isinstance(kind, str) and (match := re.fullmatch(r"(\w+)\.\w+", kind)):
            other.add(f"{match[1]}.py")
    tokenizer, other = _with_imports(directory, tokenizer), _with_imports(directory, other)
    return {FileKind.TOKENIZER: tokenizer - other, FileKind.OTHER: other}


def _with_imports(directory: Path, names: Iterable[str]) -> set[str]:
    """Python files and what they import from beside themselves, as far as it is there."""
    seen: set[str] = set()
    waiting = sorted(names)
    while waiting:
        name = waiting.pop()
        file = directory / name
        if name in seen or not file.is_file():
            continue
        seen.add(name)
        text = read_small(file).decode("utf-8", errors="replace")
        waiting += [f"{first or second}.py" for first, second in _RELATIVE_IMPORT.findall(text)]
    return seen


def read_json(file: Path) -> Any:
    """The content of a JSON file; None where it isn't there. Raises CheckpointError where it can't be read."""
    if not file.is_file():
        return None
    try:
        return json.loads(read_small(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not valid JSON ({error}); download it again") from error


def read_small(file: Path) -> bytes:
    """A small file's bytes. Raises CheckpointError where it can't be read, or is too large to be one."""
    try:
        if file.stat().st_size > _LARGEST_TEXT:
            raise CheckpointError(
                f"{file}: is larger than {format_size(_LARGEST_TEXT)}, so it can't be what it is called"
            )
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read: {error.strerror}") from error
