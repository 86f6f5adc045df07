"""Selects the companion files of a model: the files other than weights that an output copies from it.

Companions are selected by name. Everything else is left out: weights in any format, pickles, optimizer states, READMEs
and hidden files, and also config.json and the model card, which a merge writes itself. Licences and notices are
companions, because the licences of most open models require every copy to include their text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ..errors import CheckpointError
from .os_errors import translating_read_errors
from .small_files import read_json, read_small

LARGEST_COMPANION = 1 << 30
"""The maximum size of a companion in bytes: only weights are larger."""


class FileKind(Enum):
    """The purpose of a companion: a recipe can take the tokenizer from one model and the other files from another."""

    TOKENIZER = "tokenizer"
    GENERATION = "generation"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class CompanionFile:
    """A file to copy to the output.

    Args:
        path: the path relative to the model's directory, with forward slashes.
        kind: the purpose.
        source: the file to copy; links are followed.
        nbytes: the size in bytes.
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
            r"|added_tokens\.json|vocab\.\w+|vocab-\w+\.json|merges\.txt|bpe\.codes|normalizer\.json|[\w.-]+\.tiktoken|tiktoken\.model"
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
    """List the companion files of a model, sorted by path.

    Companions are the tokenizer, generation, processor, sentence-transformers and licence files with known names, and
    the Python files that ``auto_map`` or modules.json name, with their relative imports. Only the model's directory
    itself, its template folders and its sentence-transformers modules are searched. Links to files are followed,
    because the Hub's cache consists of them; links to directories are not.

    Args:
        directory: the model's directory; a file, which stands for a model without companions, has none.
        kinds: the kinds to list.
        largest: the maximum size in bytes; larger files are left out.

    Raises:
        CheckpointError: a companion is not readable, a broken link, a pipe or a device, or not valid JSON.
        EnvironmentFailure: reading failed.
    """
    if directory.is_file():
        return ()
    kind_of = {name: kind for name in _names(directory) if (kind := file_kind(name)) is not None}
    for kind, names in _code_files(directory, kind_of).items():
        kind_of |= dict.fromkeys(names, kind)
    companions = []
    for name, kind in sorted(kind_of.items()):
        source = directory / name
        if kind not in kinds:
            continue
        with translating_read_errors(source):
            nbytes = source.stat().st_size
            is_file, is_directory = source.is_file(), source.is_dir()
        if not is_file and not is_directory:
            raise CheckpointError(f"{source}: is not a regular file, expected a file")
        if is_file and nbytes <= largest:
            companions.append(CompanionFile(name, kind, source, nbytes))
    return tuple(companions)


def _names(directory: Path) -> Iterable[str]:
    """Yield the paths of files in a model's directory and in its subdirectories that can contain companions."""
    subdirectories = [*_TEMPLATES, *_module_directories(directory)]
    for folder in ("", *subdirectories):
        path = directory / folder
        if folder and (path.is_symlink() or not path.is_dir()):
            continue
        with translating_read_errors(path):
            entries = sorted(entry.name for entry in path.iterdir())
        if folder in _TEMPLATES or not folder:
            yield from (f"{folder}/{name}" if folder else name for name in entries)
        else:  # a sentence-transformers module: its config, never its weights
            yield from (f"{folder}/{name}" for name in entries if name == "config.json")


def file_kind(name: str) -> FileKind | None:
    """The kind of a companion by its name; None if the file is not a companion."""
    if _NEVER.search(name) or name.startswith("."):
        return None
    if name.endswith("/config.json"):
        return FileKind.OTHER
    return next((kind for kind, pattern in _KINDS if pattern.fullmatch(name)), None)


def is_loader_file(name: str) -> bool:
    """Whether a loader would pick up a file with this name.

    The loaders are transformers, tokenizers, diffusers, sentence-transformers, PEFT, vLLM and llama.cpp. By name they
    find weights of any format, weight indexes, Python code, chat templates, vocabularies and JSON configuration files.
    They ignore texts, images, licences and hidden files.

    Args:
        name: the path relative to the model's directory.
    """
    base = name.rpartition("/")[2]
    if base.startswith("."):
        return False
    return bool(_NEVER.search(base) or _LOADER_FILE.fullmatch(base) or _is_template(name))


def _is_template(name: str) -> bool:
    folder, _, base = name.rpartition("/")
    return folder.rpartition("/")[2] in _TEMPLATES and base.endswith(".json")


def _module_directories(directory: Path) -> list[str]:
    """The folders of sentence-transformers modules inside the model's directory, such as ``1_Pooling``."""
    modules = read_json(directory / "modules.json")
    paths = [m.get("path") for m in modules if isinstance(m, dict)] if isinstance(modules, list) else []
    return sorted({path for path in paths if isinstance(path, str) and re.fullmatch(r"\w[\w-]*", path)})


def _code_files(directory: Path, names: Collection[str]) -> dict[FileKind, set[str]]:
    """The Python files of a model's custom code by kind; a file that model and tokenizer share is the model's."""
    tokenizer: set[str] = set()
    other: set[str] = set()
    for file in _CODE_NAMED_IN:
        content = read_json(directory / file)
        auto_map = content.get("auto_map") if isinstance(content, dict) else None
        modules_named = tokenizer if file == "tokenizer_config.json" else other
        for value in auto_map.values() if isinstance(auto_map, dict) else ():
            for reference in value if isinstance(value, list) else (value,):
                # "owner/repository--module.Class" refers to another repository and needs no file
                if isinstance(reference, str) and (match := re.fullmatch(r"(\w+)\.\w+", reference)):
                    modules_named.add(f"{match[1]}.py")
    modules = read_json(directory / "modules.json") if "modules.json" in names else None
    for module in modules if isinstance(modules, list) else ():
        kind = module.get("type") if isinstance(module, dict) else None
        if isinstance(kind, str) and (match := re.fullmatch(r"(\w+)\.\w+", kind)):
            other.add(f"{match[1]}.py")
    tokenizer, other = _with_imports(directory, tokenizer), _with_imports(directory, other)
    return {FileKind.TOKENIZER: tokenizer - other, FileKind.OTHER: other}


def _with_imports(directory: Path, names: Iterable[str]) -> set[str]:
    """The existing files among `names` and those that they import relatively, transitively."""
    seen: set[str] = set()
    pending = sorted(names)
    while pending:
        name = pending.pop()
        file = directory / name
        if name in seen or not file.is_file():
            continue
        seen.add(name)
        text = read_small(file).decode("utf-8", errors="replace")
        pending += [f"{first or second}.py" for first, second in _RELATIVE_IMPORT.findall(text)]
    return seen
