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

LONG = (
    "tests/scale/",
    "tests/integration/test_mergekit.py",
    "tests/integration/adapters/test_peft.py",
    "tests/integration/adapters/test_methods.py",
    "tests/integration/adapters/test_resized.py::test_passthrough_writes",
    "tests/integration/adapters/test_resized.py::test_what_peft_saves",
    "tests/integration/formats/test_requested_blocks.py::test_codes_and_scales_equal_those_of_the_reference[llama",
    "tests/integration/formats/test_requested_blocks.py::test_transformers_loads_it[llama",
    "tests/integration/formats/test_requested_blocks.py::test_transformers_loads_it[qwen3_moe-bfloat16",
    "tests/integration/formats/test_requested_blocks.py::test_transformers_loads_it[qwen3_moe-ue8m0",
    "tests/unit/methods/adapters/test_products.py::test_any_factors_in_any_chunks",
    "tests/integration/vocabularies/test_compat.py",
    "tests/integration/vocabularies/test_pairs.py::test_rows_and_files",
    "tests/integration/vocabularies/test_pairs.py::test_a_union_of_real_encoders",
    "tests/integration/vocabularies/test_published.py",
    "tests/integration/graph/test_logical_tensors.py::test_a_merge_of_parts_equals_the_merge_of_their_values[della",
    "tests/integration/graph/test_logical_tensors.py::test_a_merge_of_parts_equals_the_merge_of_their_values[karcher",
    "tests/integration/test_rearranged.py::test_it_runs_as_if_rearranged_by_hand[duplicated",
    "tests/integration/test_weight_zero.py::test_the_masks_of_other_models_do_not_move[della",
    "tests/integration/test_weight_zero.py::test_a_model_of_weight_0_is_not_read_and_changes_no_byte[breadcrumbs_ties",
    "tests/integration/test_weight_zero.py::test_a_model_of_weight_0_is_not_read_and_changes_no_byte[d",
    "tests/faults/test_tampering.py::test_an_input_of_which_used_bytes_have_changed_is_refused[first byte-ties",
    "tests/faults/test_tampering.py::test_an_input_of_which_used_bytes_have_changed_is_refused[last byte-linear",
    "tests/integration/formats/test_survival_of_encoder.py",
    "tests/integration/formats/test_survival.py::test_shares_do_not_depend_on_interruptions[mixed",
    "tests/integration/formats/test_survival.py::test_shares_do_not_depend_on_interruptions[slerp",
    "tests/integration/formats/test_survival.py::test_shares_do_not_depend_on_the_budget[mixed",
    "tests/integration/formats/test_survival.py::test_shares_do_not_depend_on_the_budget[slerp",
    "tests/integration/formats/test_survival.py::test_a_device_with_its_own_memory_has_the_same_sums[mixed",
    "tests/integration/formats/test_survival.py::test_a_device_with_its_own_memory_has_the_same_sums[slerp",
    "tests/integration/formats/test_survival.py::test_shares_are_those_of_float64[float16",
    "tests/unit/methods/test_survival.py::test_both_backends_have_the_sums_of_the_oracle[della",
    "tests/unit/methods/test_survival.py::test_both_backends_have_the_sums_of_the_oracle[slerp",
    "tests/integration/test_diff.py::test_decoding_stays_within_the_smallest_budget",
    "tests/integration/formats/test_every_code.py::test_every_code_has_the_value_of_the_formats_library[FP8 in rows",
    "tests/integration/formats/test_every_method.py::test_a_method",
    "tests/integration/formats/test_giants.py",
    "tests/integration/formats/test_skip_lists.py",
    "tests/integration/test_golden.py::test_a_merge_writes_the_golden_bytes[configuration",
    "tests/integration/test_golden.py::test_a_merge_writes_the_golden_bytes[published",
    "tests/integration/test_golden.py::test_a_merge_writes_the_golden_bytes[encoder",
    "tests/integration/cli/test_commands.py::test_interrupting_a_merge_leaves_nothing[engine.execute.executor.Executor._wait"
    "-stopped before anything was finished; nothing is left behind-SIGTERM",
    "tests/integration/graph/test_prediction_layers.py::test_they",
    "tests/integration/graph/test_prediction_layers.py::test_a_stack",
    "tests/integration/graph/test_many_stages.py::test_the_bytes_are_those_of_23_merges",
    "tests/integration/graph/test_many_stages.py::test_a_merge_goes_on_without_the_intermediates",
    "tests/integration/output/test_save.py::test_killed_and_gone_on_with",
    "tests/integration/output/test_verify.py::test_every_flipped_bit_is_found",
    "tests/integration/graph/test_stages.py::test_slerp_ties_and_linear_fuse",
    "tests/integration/graph/test_block_outputs.py::test_a_resumed_merge_has_the_same_bytes[F8",
    "tests/integration/graph/test_block_outputs.py::test_a_resumed_merge_has_the_same_bytes[BF16",
    "tests/integration/test_user_methods.py::test_the_page_on_methods_keeps_its_word",
    "tests/unit/cost/test_footprint.py::test_a_tile_of_any_method_takes_what_was_planned",
    "tests/unit/cost/test_footprint.py::test_a_tile_of_any_method_and_dtype_takes_what_was_planned",
    "tests/unit/cost/test_machine.py::test_too_little_address_space_is_an_error",
    "tests/unit/fused/test_native_code.py::test_bytes_do_not_depend_on_the_instruction_set",
    "tests/unit/fused/test_native_code.py::test_values_of_parts_do_not_depend_on_the_instruction_set[adapted-",
    "tests/unit/fused/test_native_code.py::test_values_of_parts_do_not_depend_on_the_instruction_set[microscaled",
    "tests/unit/fused/test_native_code.py::test_values_of_parts_do_not_depend_on_the_instruction_set[sliced",
    "tests/unit/methods/test_conformance.py::test_bytes_do_not_depend_on_the_instruction_set",
    "tests/unit/methods/test_stored_parts.py::test_numbers_that_are_not_finite[della",
    "tests/unit/methods/test_stored_parts.py::test_numbers_that_are_not_finite[model_stock",
    "tests/unit/methods/test_conformance.py::test_bytes_do_not_depend_on_tiles_or_threads",
    "tests/unit/methods/test_fp8_encoder.py::test_codes_and_scales_are_those_of_torch[many",
    "tests/unit/methods/test_fp8_encoder.py::test_the_values_are_hard_to_encode",
    "tests/unit/methods/test_oracle.py::test_every_kind_of_input",
    "tests/unit/methods/test_oracle.py::test_a_merge_in_any_number_of_threads",
    "tests/unit/methods/test_oracle.py::test_another_random_expression",
    "tests/unit/methods/test_oracle.py::test_a_composition_of_any_inputs",
    "tests/unit/test_benchmarks.py::test_budgets_of_small_models",
    "tests/unit/test_benchmarks.py::test_rounding_of_a_small_matrix",
    "tests/unit/report/test_page.py::test_many_",
    "tests/unit/report/test_page.py::test_a_browser_shows_it_without_an_error_or_a_request[dark-full",
    "tests/unit/report/test_page.py::test_a_browser_shows_it_without_an_error_or_a_request[light-evil",
    "tests/unit/report/test_page.py::test_a_browser_shows_it_without_an_error_or_a_request[light-stack",
    "tests/unit/report/test_drawings.py::test_the_page_is_readable_at_any_width[700",
    "tests/unit/test_benchmarks.py::test_a_point_of_each_series",
    "tests/unit/test_benchmarks.py::test_merges_for_the_gpu_table",
    "tests/unit/test_growth.py::test_twice_the_size_is_twice_the_work[ties_on_gpu",
    "tests/integration/published/test_recipes.py::test_a_long_recipe",
    "tests/integration/test_causal_models.py::test_merges_load_with_correct_values[gpt-sw3",
    "tests/integration/test_causal_models.py::test_merges_load_with_correct_values[phi3",
    "tests/integration/test_causal_models.py::test_merges_load_with_correct_values[deepseek_v3",
    "tests/integration/test_causal_models.py::test_merges_load_with_correct_values[gemma4_text",
    "tests/integration/test_causal_models.py::test_merges_load_with_correct_values[qwen3_next",
    "tests/integration/test_causal_models.py::test_merges_load_with_correct_values[zamba2",
    "tests/integration/test_without_torch.py::test_the_smallest_budget_is_kept_with_an_empty_and_with_a_filled_cache_of_kernels[slerp",
    "tests/integration/test_without_torch.py::test_the_smallest_budget_is_kept_with_an_empty_and_with_a_filled_cache_of_kernels[karcher",
    "tests/integration/published/test_recipes.py::test_a_recipe_has_the_reference_values_and_the_expected_warnings[019",
    "tests/integration/published/test_recipes.py::test_a_recipe_has_the_reference_values_and_the_expected_warnings[022",
    "tests/integration/published/test_recipes.py::test_a_recipe_has_the_reference_values_and_the_expected_warnings[041",
    "tests/integration/published/test_recipes.py::test_a_recipe_has_the_reference_values_and_the_expected_warnings[043",
    "tests/integration/published/test_recipes.py::test_a_recipe_has_the_reference_values_and_the_expected_warnings[073",
    "tests/integration/published/test_recipes.py::test_a_recipe_has_the_reference_values_and_the_expected_warnings[103",
    "tests/integration/published/test_recipes.py::test_a_recipe_has_the_reference_values_and_the_expected_warnings[115",
    "tests/integration/published/test_recipes.py::test_a_recipe_has_the_reference_values_and_the_expected_warnings[116",
    "tests/unit/cost/test_measure.py::test_every_method_can_be_measured[breadcrumbs_",
    "tests/unit/cost/test_measure.py::test_every_method_can_be_measured[dare_",
    "tests/unit/cost/test_measure.py::test_every_method_can_be_measured[della_",
    "tests/unit/cost/test_measure.py::test_every_method_can_be_measured[multislerp",
    "tests/unit/cost/test_measure.py::test_every_method_can_be_measured[nu",
    "tests/unit/cost/test_measure.py::test_every_method_can_be_measured[ram",
    "tests/unit/cost/test_measure.py::test_every_method_can_be_measured[sce",
    "tests/unit/cost/test_measure.py::test_every_method_can_be_measured[near",
    "tests/integration/published/test_false_alarms.py::test_a_family_is_real_and_its_fine_tunes_merge_without_a_warning[Llama-",
    "tests/integration/published/test_false_alarms.py::test_a_family_is_real_and_its_fine_tunes_merge_without_a_warning[Qwen2",
    "tests/integration/inputs/test_experts.py::test_a_merge_of_two_layouts_equals_that_of_one[llama4",
    "tests/integration/inputs/test_experts.py::test_a_merge_of_two_layouts_equals_that_of_one[mixtral",
    "tests/integration/formats/test_quantized_inputs.py::test_a_merge_equals_that_of_the_values[ties",
    "tests/integration/formats/test_fp8_outputs.py::test_codes_and_scales_equal_those_of_the_reference[linear",
    "tests/unit/torch_files/test_mutations.py::test_twenty_thousand_mutated_files",
    "tests/unit/torch_files/test_files.py::test_a_file_of_more_than_4_gib_has_64_bit_offsets",
    "tests/integration/adapters/test_extract_memory.py::test_the_",
    "tests/integration/adapters/test_extract_memory.py::test_planned_bytes_are_read_and_reserved_memory_is_within_the_plan[True-stored",
    "tests/integration/adapters/test_extract_memory.py::test_planned_bytes_are_read_and_reserved_memory_is_within_the_plan[False-stored",
    "tests/integration/adapters/test_extract_values.py::test_inspect_recognizes_the_adapter",
    "tests/integration/adapters/test_extract_memory.py::test_an_extraction_loads_no_torch",
    "tests/integration/adapters/test_extract_peft.py::test_a_complete_adapter_makes_the_fine_tune[bert",
    "tests/integration/adapters/test_extract_peft.py::test_a_complete_adapter_makes_the_fine_tune[llama tied",
    "tests/integration/adapters/test_extract_peft.py::test_a_complete_adapter_makes_the_fine_tune[qwen2",
    "tests/integration/adapters/test_extract_values.py::test_the_real_encoder",
    "tests/integration/adapters/test_extract_values.py::test_embeddings_of_the_real_encoder",
    "tests/unit/extract/test_decompose.py::test_a_sketch_that_spans_the_range_is_exact",
    "tests/faults/test_extract_resume.py::test_a_killed_process",
    "tests/faults/test_extract_resume.py::test_a_terminated_command",
    "tests/faults/test_extract_resume.py::test_killed",
    "tests/faults/test_extract_resume.py::test_the_power",
    "tests/faults/test_faults.py::test_killed",
    "tests/faults/test_resume.py::test_everything_that_may_change_changes_nothing[dare_ties",
    "tests/faults/test_resume.py::test_everything_that_may_change_changes_nothing[linear",
    "tests/faults/test_resume.py::test_everything_that_may_change_changes_nothing[slerp",
    "tests/faults/test_faults.py::test_power",
    "tests/integration/cli/test_terminal.py::test_a_merge_is_complete_whatever_happens_to_its_messages[2>&-",
    "tests/integration/cli/test_terminal.py::test_a_merge_is_complete_whatever_happens_to_its_messages[>/dev/full 2>&1",
    "tests/faults/test_signals.py::test_a_second_signal_ends_it_at_once_and_so_does_a_disk_that_hangs[15",
    "tests/faults/test_tampering.py::test_killed_at_random_and_tampered_with",
)
"""The tests that only `make test-all` and CI run: long ones at true shapes, and sweeps over many merges."""

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
