"""Copies of slots add what the slots add, whoever was in their places before."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.families import FAMILIES
from adapters.families.base import SlotView, UniformAdaptation
from adapters.families.copies import Copies, Slots, slots_of
from adapters.families.slots import OneSlot
from adapters.families.uniadapter import UniAdapter
from tests.adapters.test_families import DIMS, NUM_VIEWS, SITES, UNI, config_of, folded, heads, views

HEADS = ("vision_proj", "text_proj")
NUM = 4


def copies_of(role: str, num: int = NUM) -> Copies:
    return Copies(UNI, DIMS, role, 16, num, torch.empty(0), heads=HEADS)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(0, NUM_VIEWS - 1), min_size=1, max_size=NUM), min_size=1, max_size=4),
    rows=st.integers(1, 3),
    tokens=st.sampled_from([1, 4]),
)
def test_copies_add_what_their_slots_add(batches: list[list[int]], rows: int, tokens: int) -> None:
    slots = views()
    of_role = {role: copies_of(role) for role in ("mlp", "text", "cross")}
    for batch in batches:
        own = [slots[slot] for slot in batch]
        x, before, out = torch.randn(3, NUM * rows, tokens, DIMS.width)
        for site in SITES:
            of_role[site.role].load(own)
            earlier = before if site.role == "cross" else None
            got = of_role[site.role].terms.add(site, x, out, earlier)
            for place, view in enumerate(own):
                part = slice(place * rows, (place + 1) * rows)
                alone = UniformAdaptation(view)
                wanted = alone.add(site, x[part], out[part], None if earlier is None else earlier[part])
                torch.testing.assert_close(got[part], wanted, atol=1e-5, rtol=1e-5)


def test_one_copy_serves_any_number_of_rows() -> None:
    view, site = views()[2], SITES[2]
    copies = copies_of(site.role, 1)
    copies.load([view])
    for rows in (1, 5):
        x, before, out = torch.randn(3, rows, 2, DIMS.width)
        wanted = UniformAdaptation(view).add(site, x, out, before)
        torch.testing.assert_close(copies.terms.add(site, x, out, before), wanted)


def test_slots_that_are_there_are_not_copied_again() -> None:
    view, site = views()[0], SITES[2]
    copies, (x, out) = copies_of(site.role, 1), torch.randn(2, 3, 1, DIMS.width)
    copies.load([view])
    first = copies.terms.add(site, x, out)
    for tensor in view.tensors.values():
        tensor.zero_()
    copies.load([view])
    assert torch.equal(copies.terms.add(site, x, out), first)


def test_each_role_copies_what_its_sites_read_and_nothing_else() -> None:
    slot = {**heads(0), **folded(config_of(rank=3, kv_rank=2), 0)}
    for role in {site.role for site in SITES}:
        noting = Noting(slot)
        x, before = torch.randn(2, 2, 1, DIMS.width)
        for site in SITES:
            if site.role == role:
                UNI.delta(site, x, OneSlot(noting), before if role == "cross" else None)
        assert noting.read == set(UNI.site_tensors(role))


class Noting(dict[str, torch.Tensor]):
    """Tensors by name, and which were asked for."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.add(name)
        return super().__getitem__(name)


def test_families_without_sites_have_nothing_to_copy() -> None:
    assert all(FAMILIES["epalm"].site_tensors(role) == () for role in ("mlp", "text", "cross"))


def test_ranks_are_rounded_up_so_that_few_sizes_are_recorded() -> None:
    narrow, wide, base = views()[0], SlotView(UNI, folded(config_of(rank=17), 0)), SlotView(None, heads(0))
    assert slots_of([narrow, base], 4, DIMS, "cross") == (Slots(UNI, 4, 16), [narrow, base])
    assert slots_of([narrow, wide, narrow], 4, DIMS, "cross") == (Slots(UNI, 4, 32), [narrow, wide, narrow])
    assert slots_of([wide, wide], 2, DIMS, "mlp") == (Slots(UNI, 1, 32), [wide])
    assert slots_of([base, base], 2, DIMS, "cross") == (Slots(None, 0, 0), [base])
    assert slots_of([narrow, SlotView(UniAdapter(), {})], 2, DIMS, "cross") is None, "two families"
    assert Slots(None, 0, 0).make(DIMS, "cross", torch.empty(0)) is None


def test_copies_project_with_the_heads_of_their_slots() -> None:
    slots = [view for view in views() if "text_proj.weight" in view.tensors]
    for own in (slots[:1], slots[:NUM]):
        copies = copies_of("text", len(own))
        copies.load(own)
        x = torch.randn(2 * len(own), DIMS.width)
        for head in HEADS:
            wanted = [UniformAdaptation(view).project(head, x[2 * n : 2 * n + 2]) for n, view in enumerate(own)]
            torch.testing.assert_close(copies.project(head, x), torch.cat(wanted))


def test_copies_that_were_broken_off_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = views()[2:4]
    site, copies = SITES[2], copies_of("cross", 1)
    x, before, out = torch.randn(3, 2, 1, DIMS.width)
    copies.load([first])

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(torch, "_foreach_copy_", fail)
        for view in (second, first):
            with pytest.raises(RuntimeError, match="out of memory"):
                copies.load([view])
    for view in (first, second):
        copies.load([view])
        wanted = UniformAdaptation(view).add(site, x, out, before)
        torch.testing.assert_close(copies.terms.add(site, x, out, before), wanted)
