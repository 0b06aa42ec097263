"""What `install_optimizer_repairs` puts in and takes out. Whether each repair works is tested in tests/distributed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from megatron_fp32.optimizer import native_fp32
from megatron_fp32.optimizer.native_fp32 import install_optimizer_repairs

DISTRIBUTED, FLOAT16 = DistributedOptimizer, Float16OptimizerWithFloat16Params

REPAIRS: dict[str, list[tuple[type, str]]] = {
    "distributed-leaf-shards": [(DISTRIBUTED, "_build_model_and_main_param_groups")],
    "distributed-index-map": [(DISTRIBUTED, "__init__")],
    "float16-id-map": [(FLOAT16, "sharded_state_dict")],
    "torch-adam-no-state": [(DISTRIBUTED, "state_dict")],
    "torch-adam-step-missing": [(DISTRIBUTED, "_set_main_param_and_optimizer_states")],
    "torch-adam-shared-step": [(DISTRIBUTED, "load_state_dict")],
    "distributed-bucket-padding": [(DISTRIBUTED, "sharded_param_state_fully_reshardable")],
    "distributed-empty-part": [(DISTRIBUTED, "sharded_param_state_dp_reshardable")],
    "distributed-gather-after-load": [(DISTRIBUTED, "load_state_dict")],
    "float16-empty-group": [(FLOAT16, "sharded_state_dict"), (FLOAT16, "load_state_dict")],
    "float16-native-masters": [
        (FLOAT16, "sharded_state_dict"),
        (FLOAT16, "load_state_dict"),
        (TorchDistLoadShardedStrategy, "load"),
        (FullyParallelLoadStrategyWrapper, "load"),
    ],
}
PLACES = sorted({place for places in REPAIRS.values() for place in places}, key=str)


def methods() -> dict[tuple[type, str], Any]:
    """The very objects in the classes, not what attribute access makes of them."""
    return {(owner, attribute): vars(owner)[attribute] for owner, attribute in PLACES}


def everything() -> list[dict[str, Any]]:
    return [dict(vars(owner)) for owner in dict.fromkeys(owner for owner, _ in PLACES)]


def assert_same_objects(after: list[dict[Any, Any]], before: list[dict[Any, Any]]) -> None:
    for mine, original in zip(after, before, strict=True):
        assert list(mine) == list(original)
        assert all(mine[name] is original[name] for name in original)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = everything()
    yield
    assert_same_objects(everything(), before)


def test_released_optimizers_need_every_repair() -> None:
    with install_optimizer_repairs() as repairs:
        assert [repair.name for repair in repairs.report] == list(REPAIRS)
        assert all(repair.needed for repair in repairs.report)
        assert repairs.installed == tuple(REPAIRS)


def test_the_report_says_what_goes_wrong_and_who_fixes_it() -> None:
    with install_optimizer_repairs() as repairs:
        for repair in repairs.report:
            assert repair.symptom.startswith(("load", "save", "resume"))
            assert repair.upstream == "none" or repair.upstream.startswith("Megatron-LM#")


def test_each_repair_replaces_its_methods_and_keeps_their_names_and_kinds() -> None:
    for repair, install in native_fp32._repairs():
        before = methods()
        with install():
            changed = [place for place, method in methods().items() if method is not before[place]]
            assert sorted(changed, key=str) == sorted(REPAIRS[repair.name], key=str)
            for place in changed:
                repaired = vars(place[0])[place[1]]
                assert type(repaired) is type(before[place]), repair.name
                plain = getattr(repaired, "__func__", repaired)
                original = getattr(before[place], "__func__", before[place])
                assert plain.__name__ == original.__name__
                assert plain.__wrapped__ is original
        assert_same_objects([methods()], [before])


def test_nothing_else_is_replaced() -> None:
    before = everything()
    with install_optimizer_repairs():
        changed = {
            name
            for mine, original in zip(everything(), before, strict=True)
            for name in original
            if mine[name] is not original[name]
        }
    assert changed == {attribute for _, attribute in PLACES}


def test_undo_puts_the_same_objects_back_and_may_be_called_twice() -> None:
    before = everything()
    repairs = install_optimizer_repairs()
    repairs.undo()
    assert_same_objects(everything(), before)
    repairs.undo()
    assert_same_objects(everything(), before)


def test_a_second_handle_installs_nothing_and_undoes_nothing() -> None:
    outer = install_optimizer_repairs()
    installed = everything()
    inner = install_optimizer_repairs()
    assert inner.installed == ()
    assert [repair.name for repair in inner.report] == list(REPAIRS)
    assert_same_objects(everything(), installed)
    inner.undo()
    assert_same_objects(everything(), installed)
    outer.undo()


def test_after_undo_they_can_be_installed_again() -> None:
    install_optimizer_repairs().undo()
    with install_optimizer_repairs() as again:
        assert again.installed == tuple(REPAIRS)


def test_an_exception_in_the_block_undoes_them_and_goes_on() -> None:
    before = everything()
    with pytest.raises(ZeroDivisionError), install_optimizer_repairs():
        raise ZeroDivisionError
    assert_same_objects(everything(), before)
