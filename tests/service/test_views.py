import time
from dataclasses import fields, replace

import pytest

from adapters.config import BASE_ADAPTER
from adapters.errors import AdapterNotFound, NotFound
from adapters.registry import AliasReference, DigestReference, PackageInfo, Registry, Snapshot, open_registry
from service.auth import LOCAL, NOBODY, Principal
from service.views import MAX_VIEWS, Views, visible

A = Principal("a", frozenset({"infer"}), ("a-*",))
SHARED = "sha256:" + "5" * 64


def package(number: int, weights: str = "") -> PackageInfo:
    digest = f"sha256:{number:064x}"
    return PackageInfo(digest, weights or digest, "uniadapter", "retrieval", 4)


@pytest.fixture
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Two teams: `a-x` and `b-y` share weights; each has a gallery, one was team B's first, one is nobody's by name."""
    registry: Registry = open_registry(tmp_path_factory.mktemp("registry") / "registry.sqlite")
    try:
        for number, name in enumerate(("a-x", "b-y"), start=1):
            version = registry.add_version(name, package(number, SHARED)).version
            registry.set_alias(name, "prod", version)
        for gallery, name in (
            ("a-gallery", "a-x"),
            ("b-gallery", "b-y"),
            ("mixed", "b-y"),
            ("mixed", "a-x"),
            ("taken", "a-x"),
            ("taken", "b-y"),
            ("unnamed", None),
            ("plain", BASE_ADAPTER),
        ):
            is_base = name == BASE_ADAPTER
            record = registry.add_gallery_version(
                gallery,
                embedding_key="key",
                adapter=BASE_ADAPTER if is_base else SHARED,
                adapter_name=None if is_base else name,
            )
            registry.set_live_gallery(gallery, record.version)
        return registry.snapshot()
    finally:
        registry.close()


def test_who_may_use_every_adapter_sees_the_snapshot_itself(snapshot: Snapshot) -> None:
    assert visible(snapshot, LOCAL) is snapshot
    assert Views().of(snapshot, LOCAL) is snapshot


def test_a_view_holds_what_may_be_used_and_no_other_name(snapshot: Snapshot) -> None:
    view = visible(snapshot, A)
    assert set(view.adapters) == {"a-x"}
    assert set(view.gallery_versions) == {"a-gallery", "mixed", "taken"}
    assert [record.version for record in view.gallery_versions["mixed"]] == [2]
    assert view.gallery("mixed").version == 2
    with pytest.raises(NotFound, match="no live version; known: 1"):
        view.gallery("taken")
    assert not any(hidden in repr(view) for hidden in ("b-y", "b-gallery", "unnamed", "plain"))
    assert view.revision == snapshot.revision


def test_nobody_sees_nothing(snapshot: Snapshot) -> None:
    view = visible(snapshot, NOBODY)
    records = [getattr(view, field.name) for field in fields(view) if field.name != "revision"]
    assert records == [()] * len(records)


def test_what_is_looked_up_in_a_view_is_found_and_hinted_within_it(snapshot: Snapshot) -> None:
    view = visible(snapshot, A)
    assert view.resolve(DigestReference(SHARED)).name == "a-x"
    assert visible(snapshot, Principal("b", A.scopes, ("b-*",))).resolve(DigestReference(SHARED)).name == "b-y"
    with pytest.raises(AdapterNotFound, match=r"nearest: a-x$"):
        view.resolve(AliasReference("a-y"))
    with pytest.raises(NotFound, match=r"nearest: a-gallery$"):
        view.gallery("b-gallery")


def test_a_gallery_that_follows_a_hidden_alias_is_not_live(snapshot: Snapshot) -> None:
    heads = tuple(replace(head, follows="b-y@prod") for head in snapshot.heads)
    view = visible(replace(snapshot, heads=heads), A)
    assert view.heads == () and "b-y" not in repr(view)


def test_the_name_of_the_backbone_alone_is_a_name_like_others(snapshot: Snapshot) -> None:
    assert set(visible(snapshot, Principal("x", A.scopes, ("__base__",))).gallery_versions) == {"plain"}
    assert "unnamed" not in visible(snapshot, Principal("x", A.scopes, ("?*",))).gallery_versions


def test_a_view_is_made_once_for_equal_patterns_and_anew_for_another_snapshot(snapshot: Snapshot) -> None:
    views = Views()
    first = views.of(snapshot, A)
    assert views.of(snapshot, Principal("other", frozenset({"admin"}), A.adapters)) is first
    other = replace(snapshot, versions=())
    assert views.of(other, A).versions == ()
    assert views.of(snapshot, A) == first


def test_many_patterns_do_not_pile_up(snapshot: Snapshot) -> None:
    views = Views()
    start = time.monotonic()
    for number in range(3 * MAX_VIEWS):
        views.of(snapshot, Principal("x", A.scopes, (f"a-{number}",)))
    assert len(views._views) <= MAX_VIEWS
    assert time.monotonic() - start < 10
