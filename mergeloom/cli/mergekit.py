"""Accepts mergekit's options where their meaning is clear, and otherwise names the option to use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import click

_NOTES = {
    "--copy-tokenizer": "the tokenizer is always copied",
    "--write-model-card": "the model card is always written",
    "--safe-serialization": "outputs are always safetensors files",
    "--clone-tensors": "a layer that is used twice is always stored twice",
    "--allow-crimes": "models are compared by their tensors and config.json",
    "--trust-remote-code": "a model's code is never run",
    "--lazy-unpickle": "memory is limited by --max-ram",
    "--lazy-loader": "memory is limited by --max-ram",
    "--low-cpu-memory": "memory is limited by --max-ram",
    "--read-to-gpu": "memory is limited by --max-ram and --max-vram",
    "--async-write": "reading, computing and writing always run concurrently",
    "--no-allow-crimes": "models are compared by their tensors and config.json",
    "--no-trust-remote-code": "a model's code is never run",
    "--no-lazy-unpickle": "memory is limited by --max-ram",
    "--no-lazy-loader": "memory is limited by --max-ram",
    "--no-low-cpu-memory": "memory is limited by --max-ram",
    "--no-read-to-gpu": "memory is limited by --max-ram and --max-vram",
    "--no-async-write": "reading, computing and writing always run concurrently",
    "--no-clone-tensors": "a layer that is used twice is always stored twice",
    "--no-multi-gpu": "--device chooses the GPUs",
    "--no-gpu-rich": "--device chooses the GPUs",
    "--verbose": "`mergeloom plan --steps` shows every step",
    **dict.fromkeys(("-v", "-vv", "-vvv"), "`mergeloom plan --steps` shows every step"),
}
"""Options that change nothing, because mergeloom always or never does it."""

_VALUE_NOTES = {
    "--write-threads": "the number of threads that write is chosen automatically",
    "--lora-merge-cache": "adapters are applied while merging, without a merged copy",
    "--lora-merge-dtype": "adapters are applied in float32, without a merged copy",
}
"""Options with a value that change nothing."""

_SAME = {
    "--cuda": ("--device", "cuda"),
    "--multi-gpu": ("--device", "cuda"),
    "--gpu-rich": ("--device", "cuda"),
    "--no-cuda": ("--device", "cpu"),
}
"""Options that are written differently."""

_RENAMED = {"--random-seed": "--seed", "--num-threads": "--threads"}
"""Options with a value that have another name."""

_INSTEAD = {
    "--out-shard-size": "it counts parameters; use --shard-size, in bytes: 5B parameters in bfloat16 are 10GB",
    "--no-copy-tokenizer": "the tokenizer is always copied; delete its files from OUT if they are not wanted",
    "--no-write-model-card": "the model card is always written; delete README.md from OUT if it is not wanted",
    "--no-safe-serialization": "outputs are always safetensors files; remove this option",
    "--transformers-cache": "set the environment variable HF_HUB_CACHE to the directory instead",
    "--allow-overwrite": "nothing in OUT is overwritten; choose a new OUT, or --restart for an unfinished merge",
    "--force": "nothing in OUT is overwritten; choose a new OUT, or --restart for an unfinished merge",
    "--dtype": "set `dtype` in the recipe, or use --set dtype=bfloat16",
    **dict.fromkeys(
        ("--output", "--out", "--out-dir", "--output-dir", "--out-path", "-o"),
        "OUT is an argument: mergeloom merge RECIPE OUT",
    ),
    "--json": "`mergeloom plan --json` prints the plan; --report FILE writes the numbers of a merge as JSON",
    "--config": "RECIPE is an argument: mergeloom merge RECIPE OUT",
}
"""Options that need something else."""


@dataclass(frozen=True, slots=True)
class Translated:
    """Arguments without mergekit's options.

    Args:
        arguments: the arguments in mergeloom's own options.
        notes: messages about options that change nothing.
    """

    arguments: list[str]
    notes: list[str]


def translate(arguments: list[str], valued: Mapping[str, bool]) -> Translated:
    """Replace mergekit's options by mergeloom's.

    Args:
        arguments: the arguments of a command.
        valued: mergeloom's own options of the command: whether the next argument is the option's value.

    Raises:
        click.UsageError: for an option that needs something else.
    """
    rest, notes, devices = list(arguments), [], []
    result: list[str] = []
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            result += [argument, *rest]
            break
        name, equals, value = argument.partition("=")
        if name in valued:
            result.append(argument)
            if valued[name] and not equals and rest:
                result.append(rest.pop(0))
        elif name in _RENAMED:
            result.append(_RENAMED[name] + equals + value)
            if not equals and rest:
                result.append(rest.pop(0))
        elif name in _VALUE_NOTES:
            rest = rest if equals else rest[1:]
            notes.append(f"{name} has no effect: {_VALUE_NOTES[name]}")
        elif equals or not name.startswith("-"):
            result.append(_refuse(name, argument))
        elif name in _SAME:
            devices.append((name, _SAME[name][1]))
        elif name in _NOTES:
            notes.append(f"{name} has no effect: {_NOTES[name]}")
        else:
            result.append(_refuse(name, argument))
    return Translated([*_device(devices, result), *result], notes)


def _refuse(name: str, argument: str) -> str:
    """Return the argument. Raises click.UsageError if it is an option that needs something else."""
    if name in _INSTEAD:
        raise click.UsageError(f"{name}: {_INSTEAD[name]}")
    return argument


def _device(options: list[tuple[str, str]], arguments: list[str]) -> list[str]:
    """Return the --device that mergekit's options mean. Raises click.UsageError if they contradict each other."""
    if not options:
        return []
    given = [value for name, value in pairwise(arguments) if name == "--device"]
    given += [name.partition("=")[2] for name in arguments if name.startswith("--device=")]
    kinds = {value.partition(":")[0] for value in given} | {device for _, device in options}
    if len(kinds) > 1:
        names = list(dict.fromkeys([*(name for name, _ in options), *(["--device"] if given else [])]))
        raise click.UsageError(f"{' and '.join(names)} contradict each other: use --device alone")
    return [] if given else ["--device", options[0][1]]


class MergeCommand(click.Command):
    """A command that also takes mergekit's options; `context.meta[NOTES]` has the messages about them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Translate mergekit's options, and parse the arguments."""
        options = [param for param in self.params if isinstance(param, click.Option)]
        valued = {name: not option.is_flag for option in options for name in option.opts}
        translated = translate(args, valued)
        ctx.meta[NOTES] = translated.notes
        return super().parse_args(ctx, translated.arguments)


NOTES = "mergeloom.notes"


def mergekit_notes() -> list[str]:
    """Return the messages about mergekit's options of the current command."""
    notes: Any = click.get_current_context().meta.get(NOTES, [])
    return list(notes)
