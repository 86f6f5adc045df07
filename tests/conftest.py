"""What all tests share: one torch thread, no network, models to merge, and the tests that this machine can't run."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported, here and in child processes
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every worker and child process compiles all modules again
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="mergeloom-cache-")  # of this test process and its children

import pytest
from hypothesis import HealthCheck, settings

from tests.examples import draw_few
from tests.support import models
from tests.support.disks import file_system

sys.dont_write_bytecode = False  # nor is each test module compiled by each worker in each run

MakeModel = Callable[..., Path]

LONG = tuple(
    line for line in Path(__file__).with_name("long.txt").read_text().splitlines() if line and not line.startswith("#")
)
"""How the node ids start of the tests that only `make test-all` and CI run."""

# Hypothesis measures seconds, too: how long an example takes, and how long it takes to draw one.
settings.register_profile("no clocks", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clocks")


def pytest_configure(config: pytest.Config) -> None:
    """Let property tests draw fewer examples where the long tests don't run, either."""
    if config.option.markexpr == "not slow":
        draw_few()


def pytest_sessionfinish() -> None:
    """Remove the cache directory of this test process."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the long tests, and skip what needs a CUDA device or root where there is none."""
    no_gpu = _why_no_gpu() if any(item.get_closest_marker("gpu") for item in items) else None
    for item in items:
        if item.nodeid.startswith(LONG):
            item.add_marker(pytest.mark.slow)
        if no_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=no_gpu))
        if os.geteuid() != 0 and item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root, to mount file systems"))


def pytest_collection_finish() -> None:
    """Exempt all modules and items from garbage collection, which otherwise goes through them again and again."""
    gc.collect()
    gc.freeze()


def _why_no_gpu() -> str | None:
    import torch

    if torch.cuda.is_available():
        return None
    return "no CUDA device" if torch.version.cuda else f"torch {torch.__version__} has no CUDA"


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """``make_model(name, tensors, **options)`` writes a checkpoint below `tmp_path`, by `models.write_checkpoint`."""

    def make(name: str = "model", tensors: object = None, **options: object) -> Path:
        chosen = models.tiny_llama() if tensors is None else tensors
        return models.write_checkpoint(tmp_path / name, chosen, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``base`` and fine-tunes ``a``, ``b``, ``c``, not to be changed: tiny tied Llamas, bfloat16, several shards."""
    directory = tmp_path_factory.mktemp("llamas")
    model = models.tiny_llama(tied=True)
    base = models.Random(0)
    fills: dict[str, models.Fill] = {"base": base} | {
        name: models.FineTune(base, seed) for seed, name in enumerate("abc", 1)
    }
    return {
        name: models.write_tokenizer(
            models.write_checkpoint(directory / name, model, shard_bytes=model.parameters, fill=fill)
        )
        for name, fill in fills.items()
    }


@pytest.fixture(scope="session")
def encoder() -> Path:
    """The real sentence encoder's directory, not to be changed."""
    return models.encoder_dir()


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An XFS file system, with stacks' models ``a`` and ``b`` on it, not to be changed."""
    with file_system(tmp_path_factory.mktemp("disk"), "xfs") as found:
        model = models.tiny_llama(layers=8, hidden=256, vocabulary=2048)
        for seed, name in enumerate("ab"):
            models.write_checkpoint(found / name, model, shard_bytes=3_000_000, fill=seed)
        yield found


@pytest.fixture
def out(disk: Path) -> Iterator[Path]:
    """An OUT on the disk; the directory around it is removed after the test."""
    yield disk / "outs" / "out"
    shutil.rmtree(disk / "outs", ignore_errors=True)


@pytest.fixture(autouse=True)
def small_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let budgets be made as in a process of mergeloom's own: the tests' grows with every test before."""
    if request.module.__name__.rpartition(".")[2] in ("test_docs", "test_platform", "test_whatif"):
        from mergeloom.engine.cost import machine

        monkeypatch.setattr(machine, "process_memory", lambda: machine.ProcessMemory(1 << 20, 1 << 20))


@pytest.fixture
def forget_methods() -> Iterator[None]:
    """Forget the merge methods that a test adds; they are registered for the process."""
    from mergeloom.methods import merge_methods, registry
    from mergeloom.methods.kernel.method import unregister

    before, loaded = set(merge_methods()), dict(registry._loaded)
    yield
    for name in set(merge_methods()) - before:
        unregister(name)
    registry._loaded.clear()
    registry._loaded.update(loaded)
