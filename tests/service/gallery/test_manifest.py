"""Identity, item ids and the manifest."""

import pytest

from adapters.errors import InvalidReference
from service.gallery import Gallery, check_item_id, embedding_key
from tests.service.gallery.galleries import a_plan, build_all, some_media


@pytest.mark.parametrize("item_id", ["x", "../../etc/passwd", "ひらがな 👩‍👩‍👧", "a" * 200, "%2e?&#"])
def test_item_ids_are_any_text(item_id):
    assert check_item_id(item_id) == item_id


@pytest.mark.parametrize("item_id", ["", "a" * 201, "a\n", "\x7f", "\u2028", "\ud800", "\0"])
def test_item_ids_hold_no_control_characters(item_id):
    with pytest.raises(InvalidReference):
        check_item_id(item_id)


def test_the_embedding_key_changes_with_every_ingredient_and_not_with_order():
    ingredients = {
        "parts": {"vision": "sha256:1", "text": "sha256:2"},
        "weights_digest": "sha256:3",
        "preprocessing": {"resolution": 384},
        "frame_sampling": "uniform",
        "pooling": {"kind": "mean", "tau": 0.1},
        "numerics": "1",
    }
    key = embedding_key(**ingredients)
    assert key.startswith("sha256:") and len(key) == 71
    assert embedding_key(**{**ingredients, "parts": {"text": "sha256:2", "vision": "sha256:1"}}) == key
    changes = [{"x": "y"}, "sha256:4", {"resolution": 480}, "dense", {"kind": "mean", "tau": 0.2}, "2"]
    others = {embedding_key(**{**ingredients, name: value}) for name, value in zip(ingredients, changes, strict=True)}
    assert len(others | {key}) == 7


def test_a_manifest_survives_its_file(tmp_path):
    path = build_all(tmp_path / "g", a_plan(), some_media(tmp_path / "media"))
    manifest = Gallery.open(path).manifest
    assert type(manifest).parse(manifest.model_dump_json().encode()) == manifest
    assert {"vectors.npy", "frames.npy", "items.jsonl"} <= manifest.files.keys()
