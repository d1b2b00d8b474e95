"""Host tier and slots: what stays, what makes room, what a slot holds, and that leases and holds always end at zero."""

import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.config import BASE_ADAPTER
from adapters.errors import AdapterNotFound, Conflict, NonFiniteTensor, RankTooLarge
from adapters.families.base import Site
from adapters.families.uniadapter import UniAdapter
from adapters.package import Package
from service.backbone.base import Backbone
from service.backbone.folder import load_backbone
from service.bank import (
    DEFAULT_BUCKETS,
    AdapterBank,
    BatchLeases,
    HostAdapter,
    batch_leases,
    default_buckets,
    fold_package,
)
from service.errors import NoFreeSlot
from service.metrics import Metrics
from service.runtime import Runtime
from tests.service.worlds import World, adapter_config, make_bank, random_tensors, write_tiny_backbone

RANKS = (2, 4, 4, 4, 8, 8)


@pytest.fixture(scope="module")
def backbone(world: World) -> Backbone:
    return world.backbone


@pytest.fixture(scope="module")
def adapters(backbone: Backbone) -> list[HostAdapter]:
    return [host_adapter(backbone, rank, seed) for seed, rank in enumerate(RANKS)]


def package_of(backbone: Backbone, rank: int, seed: int, *, heads: tuple[str, ...] = (), gain: float = 1.0) -> Package:
    config = adapter_config(backbone, rank=rank, heads=heads)
    tensors = {name: gain * tensor for name, tensor in random_tensors(config, backbone.dims(), seed).items()}
    return Package(None, config, tensors, f"sha256:{seed:064x}", f"sha256:{seed:064x}")


def host_adapter(backbone: Backbone, rank: int, seed: int, *, heads: tuple[str, ...] = ()) -> HostAdapter:
    return fold_package(package_of(backbone, rank, seed, heads=heads), backbone.dims(), torch.float32)


def put_all(bank: AdapterBank, adapters: Sequence[HostAdapter]) -> None:
    for adapter in adapters:
        bank.put(adapter)


def sample(bank: AdapterBank, name: str, **labels: str) -> float:
    return bank._metrics.registry.get_sample_value(name, labels) or 0.0


def slot_leases(bank: AdapterBank) -> int:
    return sum(slot.num_leases for slot in bank._slots())


def holders(bank: AdapterBank) -> int:
    return sum(entry.num_holders for entry in bank._host.values())


def assert_nothing_taken(runtime: Runtime) -> None:
    """No permit, pin or slot, once a batch that lost its last request has ended."""
    assert runtime.admission.num_permits == holders(runtime.bank) == 0
    end = time.monotonic() + 30
    while slot_leases(runtime.bank) and time.monotonic() < end:
        time.sleep(0.001)
    assert slot_leases(runtime.bank) == 0


# --- the host tier -------------------------------------------------------------------------------------------


def test_the_least_recently_used_that_nobody_holds_make_room(backbone: Backbone, adapters: list[HostAdapter]) -> None:
    a, b, c = adapters[1:4]  # of one size
    bank = make_bank(backbone, host_bytes=2 * a.num_bytes)
    put_all(bank, [a, b])
    assert bank.hold(a.digest)
    bank.release(a.digest)  # used after b
    bank.put(c)
    assert set(bank.residency()["host"]) == {a.digest, c.digest}
    assert sample(bank, "bank_adapter_evictions_total", tier="host") == 1


def test_what_is_held_stays_over_any_budget_until_it_is_released(
    backbone: Backbone, adapters: list[HostAdapter]
) -> None:
    a, b, c = adapters[1:4]
    bank = make_bank(backbone, host_bytes=1)  # less than a single adapter
    for adapter in (a, b, c):
        bank.put(adapter, hold=True)
    assert set(bank.residency()["host"]) == {a.digest, b.digest, c.digest}
    for adapter in (a, b, c):
        bank.release(adapter.digest)
    assert bank.residency()["host"] == {}
    assert bank._host_used == 0
    assert sample(bank, "bank_resident_bytes", tier="host") == 0


def test_what_was_just_put_is_not_what_makes_room(backbone: Backbone, adapters: list[HostAdapter]) -> None:
    bank = make_bank(backbone, host_bytes=1)
    bank.put(adapters[1])
    assert bank.hold(adapters[1].digest)


def test_putting_the_same_twice_keeps_the_first_and_counts_it_once(
    backbone: Backbone, adapters: list[HostAdapter]
) -> None:
    bank = make_bank(backbone)
    put_all(bank, [adapters[0], adapters[0]])
    assert bank.residency()["host"] == {adapters[0].digest: adapters[0].num_bytes}
    assert sample(bank, "bank_adapter_loads_total", tier="host") == 1


def test_holding_what_is_not_there_says_so(backbone: Backbone) -> None:
    bank = make_bank(backbone)
    assert not bank.hold("sha256:" + 64 * "0")
    assert bank.hold(BASE_ADAPTER)
    bank.release(BASE_ADAPTER)


def test_releasing_more_often_than_holding_is_a_bug_that_says_so(
    backbone: Backbone, adapters: list[HostAdapter]
) -> None:
    bank = make_bank(backbone)
    bank.put(adapters[0])
    with pytest.raises(AssertionError, match="This is a bug"):
        bank.release(adapters[0].digest)


def test_threads_that_put_hold_and_release_end_at_zero(backbone: Backbone, adapters: list[HostAdapter]) -> None:
    bank = make_bank(backbone, host_bytes=2 * adapters[1].num_bytes)
    problems: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(300):
                adapter = rng.choice(adapters)
                if not bank.hold(adapter.digest):
                    bank.put(adapter, hold=True)
                assert bank.adapter(adapter.digest).digest == adapter.digest
                bank.release(adapter.digest)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert holders(bank) == 0
    assert bank._host_used == sum(bank.residency()["host"].values()) <= 2 * adapters[1].num_bytes


def test_what_nobody_holds_is_unloaded_from_every_tier_and_its_slot_is_the_next_to_be_filled(
    backbone: Backbone, adapters: list[HostAdapter]
) -> None:
    bank = make_bank(backbone, ((4, 2),))
    put_all(bank, adapters[:3])
    for adapter in adapters[:2]:
        bank.lease(adapter.digest).release()
    first = adapters[0]
    device_bytes = bank.residency()["device"][first.digest]
    assert bank.unload(first.digest) == {"device": device_bytes, "host": first.num_bytes}
    assert bank.unload(first.digest) == {"device": 0, "host": 0}
    assert first.digest not in bank.residency()["device"] and first.digest not in bank.residency()["host"]
    bank.lease(adapters[2].digest).release()
    assert set(bank.residency()["device"]) == {adapters[1].digest, adapters[2].digest}
    bank.put(first)
    bank.lease(first.digest).release()
    assert first.digest in bank.residency()["device"]


def test_what_was_unloaded_is_forgotten_when_its_slot_is_filled_anew(
    backbone: Backbone, adapters: list[HostAdapter]
) -> None:
    bank = make_bank(backbone, ((4, 1),))
    for adapter in adapters[1:4] * 5:
        bank.put(adapter)
        bank.lease(adapter.digest).release()
        bank.unload(adapter.digest)
    assert bank._unwanted == {adapters[3].digest}


def test_what_is_held_is_not_unloaded(backbone: Backbone, adapters: list[HostAdapter]) -> None:
    bank = make_bank(backbone)
    bank.put(adapters[0], hold=True)
    with pytest.raises(Conflict, match="in use by 1 requests"):
        bank.unload(adapters[0].digest)
    assert bank.num_holders(adapters[0].digest) == 1
    bank.release(adapters[0].digest)
    assert bank.unload(adapters[0].digest)["host"] == adapters[0].num_bytes


# --- slots ---------------------------------------------------------------------------------------------------


def test_a_slot_holds_the_folded_tensors_and_the_backbones_heads(
    backbone: Backbone, adapters: list[HostAdapter]
) -> None:
    bank = make_bank(backbone)
    adapter = adapters[0]  # rank 2 in a slot of rank 4
    bank.put(adapter)
    lease = bank.lease(adapter.digest)
    for name, tensor in adapter.tensors.items():
        torch.testing.assert_close(lease.view.tensors[name], tensor, rtol=0, atol=0)
    for name, tensor in backbone.head_tensors().items():
        torch.testing.assert_close(lease.view.tensors[name], tensor, rtol=0, atol=0)
    lease.release()


def test_heads_of_an_adapter_replace_the_backbones_in_its_slot_alone(backbone: Backbone) -> None:
    own, plain = host_adapter(backbone, 4, 71, heads=("itm_head",)), host_adapter(backbone, 4, 72)
    bank = make_bank(backbone, ((4, 1),))
    put_all(bank, [own, plain])
    x = torch.randn(3, backbone.dims().width)
    for adapter in (own, plain, own):  # one slot after another
        with batch_leases(bank) as leases:
            assert leases.add(adapter.digest)
            adaptation = leases.adaptation([adapter.digest] * 3)
            assert adaptation is not None
            heads = {**backbone.head_tensors(), **adapter.tensors}
            for head in ("itm_head", "vision_proj"):
                expected = torch.nn.functional.linear(x, heads[f"{head}.weight"], heads[f"{head}.bias"])
                torch.testing.assert_close(adaptation.project(head, x), expected)


def test_base_takes_no_slot_and_adapts_nothing(backbone: Backbone) -> None:
    bank = make_bank(backbone)
    with batch_leases(bank) as leases:
        assert leases.add(BASE_ADAPTER)
        assert leases.adaptation([BASE_ADAPTER] * 4) is None
        assert slot_leases(bank) == 0
    assert bank.residency() == {"device": {}, "host": {}}


def test_base_rows_beside_adapted_rows_get_the_backbones_heads_and_no_term(
    backbone: Backbone, adapters: list[HostAdapter]
) -> None:
    bank = make_bank(backbone)
    bank.put(adapters[1])
    x = torch.randn(3, 2, backbone.dims().width)
    with batch_leases(bank) as leases:
        leases.add(adapters[1].digest)
        leases.add(BASE_ADAPTER)
        adaptation = leases.adaptation([BASE_ADAPTER, adapters[1].digest, BASE_ADAPTER])
        assert adaptation is not None
        term = adaptation.add(Site("text", 0, "text"), x, torch.zeros_like(x))
        assert term[0].abs().sum() == term[2].abs().sum() == 0 < term[1].abs().sum()
        head = backbone.model.head("text_proj")
        torch.testing.assert_close(adaptation.project("text_proj", x[:, 0])[[0, 2]], head(x[[0, 2], 0]))


def test_an_empty_slot_of_the_narrowest_bucket_is_filled_first_then_wider_ones(
    backbone: Backbone, adapters: list[HostAdapter]
) -> None:
    bank = make_bank(backbone, ((4, 2), (8, 1)))
    put_all(bank, adapters)
    ranks = []
    leases = [bank.lease(adapter.digest) for adapter in adapters[1:4]]
    for lease in leases:
        assert lease._slot is not None
        ranks.append(lease._slot.rank)
    assert ranks == [4, 4, 8]
    for lease in leases:
        lease.release()


def test_the_least_recently_leased_idle_slot_is_overwritten(backbone: Backbone, adapters: list[HostAdapter]) -> None:
    bank = make_bank(backbone, ((4, 2),))
    put_all(bank, adapters[:4])
    a, b, c = (adapter.digest for adapter in adapters[1:4])
    for digest in (a, b, a, c):
        bank.lease(digest).release()
    assert set(bank.residency()["device"]) == {a, c}
    assert sample(bank, "bank_adapter_evictions_total", tier="device") == 1
    assert sample(bank, "bank_adapter_hits_total", tier="device") == 1
    assert sample(bank, "bank_adapter_hits_total", tier="host") == 3


def test_a_leased_slot_is_never_overwritten(backbone: Backbone, adapters: list[HostAdapter]) -> None:
    bank = make_bank(backbone, ((4, 1),))
    put_all(bank, adapters[:4])
    first = bank.lease(adapters[1].digest)
    before = {name: tensor.clone() for name, tensor in first.view.tensors.items()}
    assert bank.try_lease(adapters[2].digest) is None
    with pytest.raises(NoFreeSlot, match=adapters[2].digest):
        bank.lease(adapters[2].digest)
    assert all(torch.equal(first.view.tensors[name], tensor) for name, tensor in before.items())
    second = bank.lease(adapters[1].digest)  # the same adapter shares its slot
    first.release()
    assert bank.try_lease(adapters[2].digest) is None
    second.release()
    bank.lease(adapters[2].digest).release()
    assert slot_leases(bank) == 0


def test_a_slot_is_filled_before_it_is_leased_but_taken_from_nobody_who_waits(
    backbone: Backbone, adapters: list[HostAdapter]
) -> None:
    bank = make_bank(backbone, ((4, 2),))
    put_all(bank, adapters[:4])
    a, b, c = (adapter.digest for adapter in adapters[1:4])
    waiting = {a, b, c}
    bank.is_wanted = waiting.__contains__
    assert bank.prefetch(BASE_ADAPTER) and bank.prefetch(a) and bank.prefetch(b)
    assert bank.residency()["device"].keys() == {a, b} and slot_leases(bank) == 0
    assert not bank.prefetch(c), "both slots' adapters are waited for"
    assert not bank.prefetch("sha256:" + 64 * "0")
    waiting.remove(a)
    assert bank.prefetch(c) and bank.residency()["device"].keys() == {b, c}
    leases = [bank.lease(digest) for digest in (b, c)]
    assert sample(bank, "bank_adapter_hits_total", tier="host") == 2, "they were copied in for these"
    bank.lease(b).release()
    assert sample(bank, "bank_adapter_hits_total", tier="device") == 1
    waiting.clear()
    assert not bank.prefetch(a), "a leased slot is never overwritten"
    leases[0].release()
    assert bank.prefetch(a) and bank.residency()["device"].keys() == {a, c}
    assert torch.equal(bank.lease(a).view.tensors["down.weight"], adapters[1].tensors["down.weight"])


def test_a_wide_adapter_never_gets_a_narrow_slot(backbone: Backbone, adapters: list[HostAdapter]) -> None:
    bank = make_bank(backbone, ((4, 3), (8, 1)))
    put_all(bank, adapters)
    wide, other = adapters[4], adapters[5]
    lease = bank.lease(wide.digest)
    assert bank.try_lease(other.digest) is None
    lease.release()


def test_a_rank_above_every_bucket_is_refused(backbone: Backbone, adapters: list[HostAdapter]) -> None:
    bank = make_bank(backbone, ((4, 3),))
    with pytest.raises(RankTooLarge, match=r"rank 8 .* 4"):
        bank.put(adapters[4])
    with pytest.raises(RankTooLarge):
        bank.check_rank(5)
    bank.check_rank(4)
    assert bank.residency()["host"] == {}


def test_leasing_what_is_nowhere_says_so_and_leaves_the_slots_alone(
    backbone: Backbone, adapters: list[HostAdapter]
) -> None:
    bank = make_bank(backbone)
    with pytest.raises(AdapterNotFound, match="not on the host"):
        bank.lease(adapters[0].digest)
    assert slot_leases(bank) == 0
    assert bank.residency()["device"] == {}


def test_an_adapter_in_a_slot_is_served_although_it_left_the_host(
    backbone: Backbone, adapters: list[HostAdapter]
) -> None:
    bank = make_bank(backbone, ((4, 2),), host_bytes=1)
    bank.put(adapters[1], hold=True)
    bank.lease(adapters[1].digest).release()
    bank.release(adapters[1].digest)
    assert bank.residency()["host"] == {}
    bank.lease(adapters[1].digest).release()


def test_matrices_of_layers_lie_by_inputs_on_the_host_and_in_slots(backbone: Backbone) -> None:
    """So that filling a slot copies memory as it is, and a slot's rows can be gathered."""
    bank = make_bank(backbone, ((4, 1), (8, 1)))
    for rank in (8, 3):
        package = package_of(backbone, rank, rank)
        bank.put(bank.fold(package))
        lease = bank.lease(package.weights_digest)
        place = lease.view.place
        assert place is not None
        for name, tensor in fold_package(package, backbone.dims(), torch.float32).tensors.items():
            held, on_host = lease.view.tensors[name], bank.adapter(package.weights_digest).tensors[name]
            assert torch.equal(held, tensor) and torch.equal(on_host, tensor)
            if name.removesuffix(".weight") in UniAdapter().layer_maps():
                assert on_host.transpose(1, 2).is_contiguous()
                assert place.stack[name].transpose(-1, -2).is_contiguous()
        lease.release()


def test_rows_of_neighbouring_slots_can_be_put_side_by_side(backbone: Backbone, adapters: list[HostAdapter]) -> None:
    bank = make_bank(backbone, ((8, 4),))
    put_all(bank, adapters[:4])
    leases = [bank.lease(adapter.digest) for adapter in reversed(adapters[:4])]
    assert [bank.place(adapter.digest)[2] for adapter in reversed(adapters[:4])] == [0, 1, 2, 3]
    assert bank.place(BASE_ADAPTER) < min(bank.place(adapter.digest) for adapter in adapters[:4])
    for lease in leases:
        lease.release()


def test_slot_tensors_never_move(backbone: Backbone, adapters: list[HostAdapter]) -> None:
    bank = make_bank(backbone, ((4, 2), (8, 1)))
    put_all(bank, adapters)
    addresses = {
        (key, name): tensor.data_ptr() for key, bucket in bank._buckets.items() for name, tensor in bucket.stack.items()
    }
    for _ in range(5):
        for adapter in adapters:
            bank.lease(adapter.digest).release()
    now = {(key, n): t.data_ptr() for key, bucket in bank._buckets.items() for n, t in bucket.stack.items()}
    assert now == addresses


def test_a_head_that_the_backbone_lacks_does_no_harm(tmp_path: Path) -> None:
    """A backbone without projections serves questions; an adapter that brings a head nobody uses must not stop it."""
    write_tiny_backbone(tmp_path / "headless", with_heads=False)
    backbone = load_backbone(tmp_path / "headless")
    adapter = host_adapter(backbone, 4, 5, heads=("itm_head",))
    bank = make_bank(backbone)
    bank.put(adapter)
    lease = bank.lease(adapter.digest)
    assert "itm_head.weight" not in lease.view.tensors
    lease.release()


def test_a_backbone_that_takes_no_adapters_has_a_bank_of_base_alone() -> None:
    bank = AdapterBank(
        None, {}, device=torch.device("cpu"), dtype=torch.float32, buckets=(), host_bytes=1, metrics=Metrics()
    )
    assert bank.lease(BASE_ADAPTER).view.family is None
    assert bank.residency() == {"device": {}, "host": {}}
    with pytest.raises(RankTooLarge):
        bank.check_rank(1)


# --- leases of a batch ---------------------------------------------------------------------------------------


def test_a_batch_leases_each_adapter_once_and_gives_all_back_after_an_error(
    backbone: Backbone, adapters: list[HostAdapter]
) -> None:
    bank = make_bank(backbone, ((4, 2),))
    put_all(bank, adapters[:4])
    a, b, c = (adapter.digest for adapter in adapters[1:4])

    def batch(leases: BatchLeases) -> None:
        assert [leases.add(digest) for digest in (a, a, b, c, BASE_ADAPTER)] == [True, True, True, False, True]
        assert leases.num_adapters == 3
        assert slot_leases(bank) == 2
        raise RuntimeError("the batch fails")

    with pytest.raises(RuntimeError), batch_leases(bank) as leases:
        batch(leases)
    assert slot_leases(bank) == 0


def test_a_lease_released_twice_is_a_bug_that_says_so(backbone: Backbone, adapters: list[HostAdapter]) -> None:
    bank = make_bank(backbone)
    bank.put(adapters[0])
    lease = bank.lease(adapters[0].digest)
    lease.release()
    with pytest.raises(AssertionError, match="This is a bug"):
        lease.release()


Steps = list[tuple[str, int]]
ACTIONS = st.sampled_from(["put", "hold", "release", "prefetch", "lease", "end"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(ACTIONS, st.integers(0, len(RANKS) - 1)), max_size=60), st.integers(0, 6))
def test_any_order_of_calls_keeps_the_counts_and_the_contents_right(world: World, steps: Steps, budget: int) -> None:
    adapters = [host_adapter(world.backbone, rank, seed) for seed, rank in enumerate(RANKS)]
    bank = make_bank(world.backbone, ((4, 2), (8, 1)), host_bytes=budget * adapters[1].num_bytes)
    held: list[HostAdapter] = []
    leased = []
    for action, which in steps:
        adapter = adapters[which]
        if action == "put":
            bank.put(adapter)
        elif action == "hold" and bank.hold(adapter.digest):
            held.append(adapter)
        elif action == "release" and held:
            bank.release(held.pop(which % len(held)).digest)
        elif action == "prefetch":
            has_slot = bank.prefetch(adapter.digest)
            assert not has_slot or adapter.digest in bank.residency()["device"]
        elif action == "lease" and adapter in held:  # as the engine does: what it leases is pinned
            lease = bank.try_lease(adapter.digest)
            if lease is not None:
                leased.append((adapter, lease))
        elif action == "end" and leased:
            leased.pop(which % len(leased))[1].release()
        for owner, lease in leased:
            weight = lease.view.tensors["down.weight"]
            assert torch.equal(weight, owner.tensors["down.weight"])
        assert slot_leases(bank) == len(leased)
        assert holders(bank) == len(held)
    for _, lease in leased:
        lease.release()
    for adapter in held:
        bank.release(adapter.digest)
    assert slot_leases(bank) == holders(bank) == 0
    assert bank._host_used == sum(bank.residency()["host"].values())


# --- folding for the bank, and the default buckets -----------------------------------------------------------


def test_numbers_that_the_serving_dtype_cannot_hold_are_refused(backbone: Backbone) -> None:
    package = package_of(backbone, 2, 9, gain=1e4)
    assert fold_package(package, backbone.dims(), torch.bfloat16).tensors["down.weight"].dtype == torch.bfloat16
    with pytest.raises(NonFiniteTensor, match="float16"):
        fold_package(package, backbone.dims(), torch.float16)


def test_the_default_buckets_shrink_together_with_the_memory(backbone: Backbone) -> None:
    dims = backbone.dims()
    assert default_buckets(dims, torch.float32, free_bytes=1 << 50) == DEFAULT_BUCKETS["blip"]
    assert default_buckets(dims, torch.float32, free_bytes=0) == tuple((rank, 1) for rank, _ in DEFAULT_BUCKETS["blip"])
    grown = default_buckets(dims, torch.float32, free_bytes=1 << 30, fraction=0.5)
    assert all(more > 10 * usual for (_, more), (_, usual) in zip(grown, DEFAULT_BUCKETS["blip"], strict=True))
    assert default_buckets(dims, torch.float32, free_bytes=1 << 20, fraction=0.5) < grown
    few = default_buckets(dims, torch.float32, free_bytes=10_000_000)
    half = default_buckets(dims, torch.bfloat16, free_bytes=10_000_000)
    assert all(1 <= a[1] <= b[1] <= c[1] for a, b, c in zip(few, half, DEFAULT_BUCKETS["blip"], strict=True))
