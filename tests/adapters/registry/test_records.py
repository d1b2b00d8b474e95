import subprocess
import sys

import pytest

from adapters.errors import AdapterNotFound, InvalidReference, NotFound
from adapters.registry import (
    AliasRecord,
    AliasReference,
    BaseReference,
    Canary,
    DigestReference,
    GalleryHead,
    GalleryRecord,
    Revision,
    Snapshot,
    VersionRecord,
    VersionReference,
    parse_reference,
)


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


def version(name: str, number: int, **changes: object) -> VersionRecord:
    fields: dict[str, object] = {
        "package_digest": digest(number),
        "weights_digest": digest(100 + number),
        "family": "uniadapter",
        "task": "vqa",
        "rank": 8,
        "status": "ready",
        "reason": None,
        "created_at": 0.0,
        "updated_at": 0.0,
    }
    return VersionRecord(name, number, **(fields | changes))  # type: ignore[arg-type]


def gallery(name: str, number: int, *, status: str = "ready") -> GalleryRecord:
    return GalleryRecord(name, number, 1, "key", digest(1), None, None, status, None, 0.0, 0.0)  # type: ignore[arg-type]


def snapshot(
    versions: tuple[VersionRecord, ...] = (),
    aliases: tuple[tuple[str, str, int], ...] = (),
    galleries: tuple[GalleryRecord, ...] = (),
    live: tuple[tuple[str, int], ...] = (),
) -> Snapshot:
    revision = Revision("epoch", 3, "tip")
    heads = tuple(GalleryHead(name, number, 0.0) for name, number in live)
    return Snapshot(revision, versions, tuple(AliasRecord(*alias, 0.0) for alias in aliases), galleries, heads)


@pytest.mark.parametrize(
    ("text", "reference", "canonical"),
    [
        ("vqa", AliasReference("vqa", "prod"), "vqa@prod"),
        ("vqa@prod", AliasReference("vqa", "prod"), "vqa@prod"),
        ("vqa@canary-2", AliasReference("vqa", "canary-2"), "vqa@canary-2"),
        ("vqa@7", VersionReference("vqa", 7), "vqa@7"),
        ("7", AliasReference("7", "prod"), "7@prod"),
        ("my.adapter_v-2@10", VersionReference("my.adapter_v-2", 10), "my.adapter_v-2@10"),
        (digest(5), DigestReference(digest(5)), digest(5)),
        ("__base__", BaseReference(), "__base__"),
    ],
)
def test_reference_forms(text: str, reference: object, canonical: str) -> None:
    assert parse_reference(text) == reference
    assert str(reference) == canonical
    assert parse_reference(canonical) == reference


@pytest.mark.parametrize(
    "text",
    [
        "", "@", "@prod", "vqa@", "vqa@0", "vqa@07", "vqa@-1", "vqa@1e3", "vqa@٣", "vqa@7 ", "vqa@7\n", "vqa\n",
        "vqa@Prod", "vqa@_x", "vqa@prod@prod", "VQA", "../vqa", "a..b", "a/b", ".hidden", "-x", "__base__@prod",
        "__other__", "vqa@" + "9" * 10, "v" * 65, "vqa@" + "a" * 33, "sha256:abc", digest(1).upper(), digest(1) + "0",
        digest(1) + "\n", "md5:" + "0" * 32, "v" * 100_000,
    ],
)  # fmt: skip
def test_anything_else_is_no_reference(text: str) -> None:
    with pytest.raises(InvalidReference) as caught:
        parse_reference(text)
    assert len(caught.value.message) < 400


def test_resolve_by_alias_version_and_either_digest() -> None:
    first, second = version("vqa", 1), version("vqa", 2)
    state = snapshot((first, second), (("vqa", "prod", 1), ("vqa", "canary", 2)))
    assert state.resolve(AliasReference("vqa")) is first
    assert state.resolve(AliasReference("vqa", "canary")) is second
    assert state.resolve(VersionReference("vqa", 2)) is second
    assert state.resolve(DigestReference(second.package_digest)) is second
    assert state.resolve(DigestReference(second.weights_digest)) is second


def test_a_shared_digest_means_the_newest_ready_version_of_the_first_name() -> None:
    shared = {"weights_digest": digest(9)}
    a1, a2 = version("a", 1, **shared), version("a", 2, **shared)
    a3, b7 = version("a", 3, status="retired", **shared), version("b", 7, **shared)
    state = snapshot((a1, a2, a3, b7))
    assert state.resolve(DigestReference(digest(9))) is a2
    assert state.with_digest(digest(9)) == (a2, a1, b7)
    assert state.with_digest(digest(8)) == ()


@pytest.mark.parametrize("status", ["staged", "validating", "retired", "failed", "deleted"])
def test_only_ready_versions_resolve(status: str) -> None:
    record = version("vqa", 1, status=status, reason="probe differs")
    state = snapshot((record,))
    with pytest.raises(AdapterNotFound, match=rf"vqa@1 is {status} \(probe differs\)"):
        state.resolve(VersionReference("vqa", 1))
    with pytest.raises(AdapterNotFound):
        state.resolve(DigestReference(record.package_digest))
    assert state.version("vqa", 1) is record


def test_not_found_says_what_there_is_in_a_bounded_message() -> None:
    names = [f"adapter-{index:05}" for index in range(5000)]
    state = snapshot(tuple(version(name, 1) for name in names), (("adapter-00001", "prod", 1),))
    with pytest.raises(AdapterNotFound, match=r"nearest: .*adapter-00001"):
        state.resolve(AliasReference("adaptr-00001"))
    with pytest.raises(AdapterNotFound, match=r"known: adapter-00000, .* and 4995 more") as caught:
        state.resolve(AliasReference("zzz"))
    assert len(caught.value.message) < 200
    assert caught.value.param == "adapter"
    with pytest.raises(AdapterNotFound, match="'adapter-00001' has no alias 'canary'; known: prod"):
        state.resolve(AliasReference("adapter-00001", "canary"))
    with pytest.raises(AdapterNotFound, match="'adapter-00001' has no version 2; known: 1"):
        state.resolve(VersionReference("adapter-00001", 2))
    with pytest.raises(AdapterNotFound, match="no adapter 'x'; there are none"):
        snapshot().resolve(AliasReference("x"))


def test_deleted_versions_are_not_listed() -> None:
    kept, gone = version("a", 1), version("b", 1, status="deleted")
    state = snapshot((kept, gone), galleries=(gallery("clips", 1, status="deleted"),))
    assert dict(state.adapters) == {"a": (kept,)}
    assert dict(state.gallery_versions) == {}


def test_gallery_is_the_live_version_unless_told_otherwise() -> None:
    first, second = gallery("clips", 1), gallery("clips", 2)
    state = snapshot(galleries=(first, second, gallery("new", 1)), live=(("clips", 2),))
    assert state.gallery("clips") is second
    assert state.gallery("clips", 1) is first
    with pytest.raises(NotFound, match="no gallery 'clip'; nearest: clips"):
        state.gallery("clip")
    with pytest.raises(NotFound, match="'new' has no live version; known: 1"):
        state.gallery("new")
    with pytest.raises(NotFound, match="'clips' has no version 3; known: 1, 2"):
        state.gallery("clips", 3)


def test_revision() -> None:
    assert snapshot().revision == Revision("epoch", 3, "tip")


def test_the_registry_does_not_load_torch() -> None:
    code = "import sys, adapters.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_canary_takes_its_share_of_keys_and_another_canary_other_keys() -> None:
    keys = [f"key-{number}" for number in range(2000)]
    alias = AliasRecord("a", "prod", 1, 0.0, (), Canary(2, 0.05))
    first = {key for key in keys if alias.version_for(key) == 2}
    assert 0.03 < len(first) / len(keys) < 0.07
    other = AliasRecord("a", "prod", 1, 0.0, (), Canary(3, 0.05))
    assert {key for key in keys if other.version_for(key) == 3} != first
    wider = AliasRecord("a", "prod", 1, 0.0, (), Canary(2, 0.5))
    assert first < {key for key in keys if wider.version_for(key) == 2}  # who was there stays
    assert alias.version_for(None) == 1
