"""The public functions for adapters: check and convert the arguments, and call the engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from .arguments import Size, checked_limit, checked_number, checked_path, checked_texts, checked_threads

if TYPE_CHECKING:
    from .engine.execute.measurements import Progress
    from .engine.run.extract.result import ExtractedAdapter


def extract_lora(
    model: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int,
    embed: bool = False,
    low_rank_only: bool = False,
    include: Iterable[str] | str = (),
    exclude: Iterable[str] | str = (),
    seed: int = 0,
    max_ram: Size | None = None,
    threads: int | None = None,
    restart: bool = False,
    notify: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> ExtractedAdapter:
    """Extract a LoRA adapter from a fine-tuned model and its base, or resume an interrupted extraction.

    While it runs, each call of numpy's BLAS uses one thread, in the complete process.

    Args:
        model: fine-tuned model: a directory, a file of weights, an index, or a Hub id, whose files are downloaded.
        base: model that it was fine-tuned from.
        out: directory of the adapter: new, empty, or with an unfinished extraction of the same models and options.
        rank: rank of the factors; less for matrices with a shorter side.
        embed: whether embeddings and the head get factors, too, rather than being saved in full.
        low_rank_only: whether to leave out everything without factors, such as changed norms and biases.
        include: regular expressions; only tensors whose name one of them finds are extracted.
        exclude: regular expressions; tensors whose name one of them finds are left out.
        seed: seed of the randomized SVD of large matrices.
        max_ram: limit of the process's resident memory; by default a share of the machine's RAM.
        threads: maximum number of threads; by default the cores available to the process.
        restart: whether to discard an unfinished extraction in `out`.
        notify: callback for progress, called with the bytes read so far, from any thread.
        say: callback for messages, such as how much is downloaded.

    Raises:
        MergeloomError: the extraction failed; the same call resumes. See `Extraction`.
    """
    from .engine.run.extract.extraction import Extraction
    from .engine.run.extract.options import ExtractOptions
    from .engine.run.merge import fetch

    texts = checked_texts("include", include), checked_texts("exclude", exclude)
    numbers = checked_number("rank", rank), checked_number("seed", seed)
    options = ExtractOptions(numbers[0], embed, low_rank_only, *texts, numbers[1])
    paths = checked_path("model", model), checked_path("base", base), checked_path("out", out)
    limits = checked_limit("max_ram", max_ram), checked_threads(threads)
    extraction = Extraction(*paths, options, max_ram=limits[0], threads=limits[1])
    tell = say or (lambda text: None)
    fetch(() if extraction.complete else extraction.downloads, tell)
    return extraction.run(notify, tell, restart=restart)
