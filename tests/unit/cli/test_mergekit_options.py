"""mergekit's options on mergeloom's command line."""

from __future__ import annotations

import click
import pytest

from mergeloom.cli.app import cli
from mergeloom.cli.merge import merge
from mergeloom.cli.mergekit import translate

VALUED = {
    name: not option.is_flag for option in merge.params if isinstance(option, click.Option) for name in option.opts
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("r.yml out --cuda", "--device cuda r.yml out"),
        ("r.yml out --multi-gpu --cuda --gpu-rich", "--device cuda r.yml out"),
        ("--no-cuda r.yml out", "--device cpu r.yml out"),
        ("r.yml out --cuda --device cuda:1", "r.yml out --device cuda:1"),
        ("r.yml out --random-seed 3 --num-threads=2", "r.yml out --seed 3 --threads=2"),
        ("r.yml out --report --cuda", "r.yml out --report --cuda"),
        ("r.yml out -- --cuda", "r.yml out -- --cuda"),
        ("r.yml out --strict --seed 1", "r.yml out --strict --seed 1"),
    ],
)
def test_options_with_the_same_meaning(given: str, expected: str) -> None:
    translated = translate(given.split(), VALUED)
    assert translated.arguments == expected.split()
    assert translated.notes == []


@pytest.mark.parametrize(
    "options",
    [
        *("--lazy-unpickle", "--copy-tokenizer", "--low-cpu-memory", "--read-to-gpu", "--async-write", "-v"),
        *("--write-model-card", "--safe-serialization", "--clone-tensors", "--allow-crimes", "--trust-remote-code"),
        *("--no-lazy-unpickle", "--write-threads 3", "--write-threads=3"),
    ],
)
def test_options_that_change_nothing_are_noted(options: str) -> None:
    translated = translate(["r.yml", *options.split(), "out"], VALUED)
    assert translated.arguments == ["r.yml", "out"]
    (note,) = translated.notes
    assert note.startswith(f"{options.split()[0].partition('=')[0]} has no effect: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--out-shard-size 5B", "--out-shard-size: it counts parameters; use --shard-size, in bytes"),
        ("--out-shard-size=5B", "use --shard-size"),
        ("--no-copy-tokenizer", "the tokenizer is always copied"),
        ("--transformers-cache /tmp", "HF_HUB_CACHE"),
        ("--allow-overwrite", "nothing in OUT is overwritten"),
        ("--dtype bfloat16", "--set dtype=bfloat16"),
        ("--cuda --device cpu", "--cuda and --device contradict each other"),
        ("--cuda --no-cuda", "--cuda and --no-cuda contradict each other"),
        ("--device=cpu --gpu-rich", "--gpu-rich and --device contradict each other"),
    ],
)
def test_other_options_name_the_right_one(options: str, message: str) -> None:
    with pytest.raises(click.UsageError, match=message):
        translate(["r.yml", "out", *options.split()], VALUED)


@pytest.mark.parametrize("command", ["merge", "plan"])
def test_no_option_of_mergeloom_is_translated(command: str) -> None:
    """An option of mergeloom's own would shadow the meaning that mergekit gives it."""
    options = [option for option in cli.commands[command].params if isinstance(option, click.Option)]
    arguments = [
        argument for option in options for argument in (option.opts[0], *(["x"] if not option.is_flag else []))
    ]
    valued = {name: not option.is_flag for option in options for name in option.opts}
    assert translate(arguments, valued).arguments == arguments
