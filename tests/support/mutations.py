"""Inputs that somebody has tampered with: bytes and JSON changed at random, with what breaks parsers."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.support.paths import ROOT

os.environ["HF_HUB_OFFLINE"] = "1"  # a mutated path may be a name of the Hub

from mergeloom.engine.recipe.load import load_recipe, parse_recipe
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import MergeloomError
from mergeloom.io.checkpoint.checkpoint import open_checkpoint
from mergeloom.io.safetensors.header import data_start, parse_header
from mergeloom.methods import merge_methods
from tests.support.counting import TooMuchWork, count_lines
from tests.support.models import tiny_llama, write_checkpoint, write_tokenizer
from tests.support.waiting import no_hang

LINES = 5_000_000
"""The most lines of Python that may be executed for one input."""
BYTES = 300 << 20
"""No input may take more memory."""

TOKENS = [
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b"\\", b"\\u0000", b"\\ud800", b"{", b"}", b"[", b"]", b":",
    b",", b"null", b"true", b"-1", b"1e999", b"-0", b"NaN", b"Infinity", b"9" * 40, b"18446744073709551616", b"../",
    b"/etc/passwd", b"data_offsets", b"shape", b"dtype", b"F32", b"__metadata__", b"[" * 200, b'{"a":' * 200, b"&a ",
    b"*a ", b"<<: ", b"!!python/object/apply:os.system ", b"!!binary ", b"---\n", b"...\n", b"|\n", b"\t", b"\r\n",
    b"? ", b"- ", b"# ", b"merge_method", b"models", b"slices", b"layer_range", b"parameters",
]  # fmt: skip
_DEEP = "as deep as it gets"
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3.5, 1 << 31, 1 << 63, (1 << 64) - 1, 1 << 64, 10**30, 10**400, 1e308, -1e308,
    1e-320, float("nan"), float("inf"), "", "\0", "..", "../../etc/passwd", "/dev/zero", "a" * 5000, "\ud800", "\u202e",
    "F32", "BF16", "I64", _DEEP, "model.embed_tokens.weight", [], {}, [[]], [None], [0, 0], [0, 1 << 64], [-1, 5],
    [1] * 100, {"": {}},
]  # fmt: skip


def mutate_bytes(chance: random.Random, data: bytes) -> bytes:
    """A few changes of bytes."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        place = chance.randrange(len(found) + 1)
        end = min(len(found), place + chance.choice((1, 1, 2, 8, 64, 1000)))
        change = chance.randrange(7)
        if change == 0 and place < len(found):
            found[place] ^= 1 << chance.randrange(8)
        elif change == 1 and place < len(found):
            found[place] = chance.randrange(256)
        elif change == 2:
            found[place:place] = chance.choice(TOKENS)
        elif change == 3:
            found[place:end] = chance.choice(TOKENS)
        elif change == 4:
            del found[place:end]
        elif change == 5:
            other = chance.randrange(len(found) + 1)
            found[other:other] = found[place:end]
        elif chance.random() < 0.2:
            del found[place:]
    return bytes(found)


def mutate_value(chance: random.Random, value: Any) -> Any:
    """A few changes of what JSON or YAML holds."""
    found = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        found = _mutated(chance, found)
    return found


def _mutated(chance: random.Random, root: Any) -> Any:
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(root)
    if not places or chance.random() < 0.02:
        return copy.deepcopy(chance.choice(VALUES))
    holder, key = chance.choice(places)
    change = chance.randrange(6)
    if change == 0:
        del holder[key]
    elif change == 1 and isinstance(holder, dict):
        holder[str(chance.choice(VALUES))[:50]] = holder.pop(key)
    elif change == 2:
        other, place = chance.choice(places)
        if place in other if isinstance(other, dict) else place < len(other):
            holder[key] = copy.deepcopy(other[place])
    elif change == 3:
        deep: Any = copy.deepcopy(chance.choice(VALUES))
        for _ in range(chance.choice((1, 3, 130))):
            deep = [deep] if chance.random() < 0.5 else {"a": deep}
        holder[key] = deep
    else:
        holder[key] = copy.deepcopy(chance.choice(VALUES))
    return root


def to_json(value: Any) -> bytes:
    """JSON, whatever the value holds."""
    text = json.dumps(value).replace(f'"{_DEEP}"', "[" * 5000 + "]" * 5000)
    return text.encode("utf-8", errors="surrogatepass")


@dataclass
class Outcome:
    """What came of many mutated inputs.

    Args:
        tried: how many there were.
        refused: how many ended with an error of ours.
        lines: the most lines of Python executed for one input.
        grown: bytes by which the process has grown at its largest.
        failures: what went wrong, with the input.
    """

    tried: int = 0
    refused: int = 0
    lines: int = 0
    grown: int = 0
    failures: list[str] = field(default_factory=list)


def fuzz(kind: str, count: int, seed: int, directory: Path) -> Outcome:
    """Try so many mutated inputs of one of the `KINDS`."""
    chance = random.Random(f"{kind} {seed}")
    attempt = KINDS[kind](chance, directory)
    outcome = Outcome()
    for _ in range(3):  # what is imported or compiled only once
        _try(attempt, Outcome())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with _limited_memory():
        for _ in range(count):
            _try(attempt, outcome)
            if len(outcome.failures) >= 10:
                break
    outcome.grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return outcome


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Let allocations fail that are larger than any input may need, before they take the machine down."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _try(attempt: Callable[[], tuple[Any, Callable[[], object]]], outcome: Outcome) -> None:
    given, run = attempt()
    outcome.tried += 1

    def refusing() -> None:
        try:
            run()
        except MergeloomError:
            outcome.refused += 1

    try:
        with no_hang():
            outcome.lines = max(outcome.lines, count_lines(refusing, LINES))
    except BaseException as error:
        outcome.failures.append(f"{type(error).__name__}: {str(error)[:300]}: {str(given)[:3000]}")
        if not isinstance(error, Exception | TooMuchWork):
            raise


def _headers(chance: random.Random, directory: Path) -> Callable[[], tuple[Any, Callable[[], object]]]:
    """Headers of safetensors files, as `read_header` takes them."""
    shapes = {"a": (2, 3), "b.weight": (4,), "scalar": (), "empty": (0, 5), "línea": (1, 1, 2)}
    path = write_checkpoint(directory / "headers", shapes, dtype="F32", metadata={"format": "pt"}) / "model.safetensors"
    whole = path.read_bytes()
    nbytes = 8 + int.from_bytes(whole[:8], "little")
    value = json.loads(whole[8:nbytes])

    def attempt() -> tuple[Any, Callable[[], object]]:
        if chance.random() < 0.5:
            raw = mutate_bytes(chance, whole[:nbytes])
            if chance.random() < 0.8:
                raw = (len(raw) - 8).to_bytes(8, "little", signed=True) + raw[8:] if len(raw) >= 8 else raw
        else:
            text = to_json(mutate_value(chance, value))
            raw = len(text).to_bytes(8, "little") + text
        size = len(raw) + chance.choice((len(whole) - nbytes, 0, 1, 1 << 40))

        def run() -> None:
            start = data_start(raw[:8], size, file=path)
            parse_header(raw[:start].ljust(start, b"\0"), size, file=path)

        return raw, run

    return attempt


def _recipes(chance: random.Random, directory: Path) -> Callable[[], tuple[Any, Callable[[], object]]]:
    """Recipes, up to where models would be opened."""
    texts = [path.read_bytes() for path in sorted((ROOT / "recipes").rglob("*.yml"))]
    values = [list(yaml.safe_load_all(text)) for text in texts]
    methods = merge_methods()

    def attempt() -> tuple[Any, Callable[[], object]]:
        if chance.random() < 0.6:
            text = mutate_bytes(chance, chance.choice(texts)).decode("utf-8", errors="surrogateescape")
            return text, lambda: parse_recipe(text, methods=methods)
        stages = mutate_value(chance, chance.choice(values))
        if chance.random() < 0.5 and isinstance(stages, list) and stages:
            return stages[0], lambda: load_recipe(stages[0], methods=methods)
        text = "---\n".join(json.dumps(stage) for stage in stages) if isinstance(stages, list) else json.dumps(stages)
        return text, lambda: parse_recipe(text, methods=methods)

    return attempt


def _plans(chance: random.Random, directory: Path) -> Callable[[], tuple[Any, Callable[[], object]]]:
    """Recipes, up to the schedule of models that are there."""
    models = [write_checkpoint(directory / name, tiny_llama(layers=2), fill=seed) for seed, name in enumerate("abc")]
    values: list[Any] = []
    for name, method in sorted(merge_methods().items()):
        sources = [{"model": str(model), "layer_range": [0, 2]} for model in models[: method.maximum or 3]]
        values.append({"merge_method": name, "slices": [{"sources": sources}], "base_model": str(models[0])})
        density = [{"filter": "mlp", "value": [0.1, 1]}, {"value": 0.5}]
        values[-1]["parameters"] = {"weight": 1, "density": density, "t": 0.5}
    values.append([{"name": "inner", **values[0]}, {"merge_method": "passthrough", "models": [{"model": "inner"}]}])

    def attempt() -> tuple[Any, Callable[[], object]]:
        recipe = mutate_value(chance, chance.choice(values))
        return recipe, lambda: plan(recipe, Options(device="cpu", threads=1, max_ram=1 << 40))

    return attempt


def _indices(chance: random.Random, directory: Path) -> Callable[[], tuple[Any, Callable[[], object]]]:
    """A checkpoint's index."""
    model = write_checkpoint(directory / "indices", tiny_llama(layers=1), shard_bytes=20_000)
    file = model / "model.safetensors.index.json"
    whole = file.read_bytes()
    value = json.loads(whole)

    def attempt() -> tuple[Any, Callable[[], object]]:
        data = mutate_bytes(chance, whole) if chance.random() < 0.5 else to_json(mutate_value(chance, value))
        file.write_bytes(data)
        return data, lambda: open_checkpoint(model)

    return attempt


def _configs(chance: random.Random, directory: Path) -> Callable[[], tuple[Any, Callable[[], object]]]:
    """Mutate the files next to the weights (config.json, the tokenizer's files, modules.json), and plan a merge."""
    model = write_tokenizer(write_checkpoint(directory / "configs", tiny_llama(layers=2)))
    other = write_tokenizer(write_checkpoint(directory / "other", tiny_llama(layers=2), fill=1))
    (model / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "1_Pooling", "type": "a.B"}]')
    (model / "generation_config.json").write_text('{"eos_token_id": 2}')
    files = [file for file in sorted(model.iterdir()) if file.suffix == ".json"]
    wholes = {file: file.read_bytes() for file in files}
    slices = [{"sources": [{"model": str(path), "layer_range": [0, 2]} for path in (model, other)]}]
    recipe = {"merge_method": "linear", "slices": slices, "parameters": {"weight": 1}, "tokenizer_source": "base"}
    recipes: list[dict[str, Any]] = [
        {**recipe, "base_model": str(model), "files_from": str(model)},
        {**recipe, "base_model": str(model), "tokenizer_source": "union"},
        {"merge_method": "passthrough", "models": [{"model": str(model)}]},
    ]

    def attempt() -> tuple[Any, Callable[[], object]]:
        file = chance.choices(files, [4 if file.name == "config.json" else 1 for file in files])[0]
        data = (
            mutate_bytes(chance, wholes[file])
            if chance.random() < 0.4
            else to_json(mutate_value(chance, json.loads(wholes[file])))
        )
        for each, whole in wholes.items():
            each.write_bytes(data if each == file else whole)
        chosen = chance.choice(recipes)
        return (file.name, data), lambda: plan(chosen, Options(device="cpu", threads=1, max_ram=1 << 40))

    return attempt


KINDS = {"headers": _headers, "recipes": _recipes, "plans": _plans, "indices": _indices, "configs": _configs}
"""What is mutated."""
