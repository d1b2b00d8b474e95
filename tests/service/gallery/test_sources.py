"""What folders and manifests of lines name."""

from pathlib import Path

import pytest

from adapters.errors import ConversionError
from service.gallery import Source, check_item_id, read_sources
from tests.service.gallery.galleries import write_manifest, write_strangely_named


def test_a_folder_gives_its_media_sorted_by_relative_path(tmp_path):
    for name in ("b.MP4", "a/z.webm", "a/é.mkv", ".hidden.mp4", ".git/x.mp4", "note.txt", "still.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [source.id for source in read_sources(tmp_path, "video")] == ["a/z.webm", "a/é.mkv", "b.MP4"]
    assert [source.file for source in read_sources(tmp_path, "image")] == [tmp_path / "still.png"]
    with pytest.raises(ConversionError, match="image and video"):
        read_sources(tmp_path)
    with pytest.raises(ConversionError, match="nothing"):
        read_sources(tmp_path, "text")


@pytest.mark.parametrize(
    "name, listed_as, problem",
    [
        (b"caf\xe9.mp4", r"caf\xe9.mp4", "its name is not UTF-8"),
        ("sub/é".encode() + b"\xff/a.mp4", r"sub/é\xff/a.mp4", "its name is not UTF-8"),
        (b"two\nlines.mp4", r"two\nlines.mp4", "control characters"),
    ],
)
def test_a_file_whose_name_cannot_be_an_id_is_listed_with_its_problem(tmp_path, name, listed_as, problem):
    strange = write_strangely_named(tmp_path, name)
    write_strangely_named(tmp_path, b"a.mp4")
    fine, listed = read_sources(tmp_path)
    assert (fine.id, fine.problem) == ("a.mp4", None)
    assert (listed.id, listed.kind, listed.file) == (listed_as, "video", strange)
    assert problem in listed.problem


def test_names_that_are_too_long_for_an_id_are_cut_and_told_apart(tmp_path):
    names = [b"\xe9" * 60 + bytes([letter]) + b".mp4" for letter in b"ab"] + [b"c" * 240 + b".mp4"]
    for name in names:
        write_strangely_named(tmp_path, name)
    sources = read_sources(tmp_path)
    assert {len(check_item_id(source.id)) for source in sources} == {200}
    assert len({source.id for source in sources}) == 3
    assert sorted({source.problem for source in sources}) == [
        "an item id has 1 to 200 characters, not 244",
        "its name is not UTF-8",
    ]


def test_a_manifest_gives_files_relative_to_its_folder_with_ids_captions_and_metadata(tmp_path):
    path = write_manifest(
        tmp_path,
        {"file": "./sub/a.jpg", "caption": "a red ball"},
        "",
        {"id": "second", "file": "/data/b.png", "metadata": {"tags": ["x", 1]}},
    )
    assert read_sources(path) == [
        Source("sub/a.jpg", "image", tmp_path / "sub/a.jpg", "a red ball"),
        Source("second", "image", Path("/data/b.png"), None, {"tags": ["x", 1]}),
    ]


def test_texts_are_named_by_their_line(tmp_path):
    sources = read_sources(write_manifest(tmp_path, {"text": "a dog"}, {"text": "a cat", "id": "cat"}))
    assert [(source.id, source.kind, source.text) for source in sources] == [
        ("1", "text", "a dog"),
        ("cat", "text", "a cat"),
    ]


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "EOF"),
        ("[]", "object"),
        ({"file": "a.mp4", "txet": 1}, "txet"),
        ({"id": "x"}, "either"),
        ({"file": "a.mp4", "text": "b"}, "either"),
        ({"file": "a.exe"}, "extension"),
        ({"file": "a\0.mp4"}, "extension"),
        ({"file": "a.mp4", "id": "tab\there"}, "control"),
        ({"file": "a.mp4", "id": ""}, "1 to 200"),
        ({"file": "a.mp4", "id": 5}, "id"),
        ({"text": "  "}, "empty"),
        ({"text": "x", "caption": "y"}, "caption"),
        ('{"file": "a.mp4", "metadata": {"x": NaN}}', "JSON"),
        ('{"file": "a.mp4", "metadata": {"x": "\\ud800"}}', "JSON"),
        ('{"file": "a.mp4", "metadata": ' + '{"x":' * 5000 + "1" + "}" * 5001, "recursion"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, reason):
    path = write_manifest(tmp_path, {"file": "fine.mp4"}, line)
    with pytest.raises(ConversionError, match=rf"items\.jsonl line 2: .*{reason}"):
        read_sources(path)


def test_two_sources_with_one_id_are_both_named(tmp_path):
    path = write_manifest(tmp_path, {"file": "a.mp4"}, {"file": "b.mp4"}, {"file": "c.mp4", "id": "a.mp4"})
    with pytest.raises(ConversionError, match=r"line 1 and .*line 3 both have the id 'a.mp4'"):
        read_sources(path)
    with pytest.raises(ConversionError, match="neither"):
        read_sources(tmp_path / "absent")
    with pytest.raises(ConversionError, match="image and video"):
        read_sources(write_manifest(tmp_path, {"file": "a.mp4"}, {"file": "b.png"}))
