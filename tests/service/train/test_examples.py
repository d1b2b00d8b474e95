"""Manifests: what a line may say, and how each mistake is reported."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import ConversionError
from service.backbone.blip_backbone import BlipBackbone
from service.train.examples import read_examples
from service.train.uniadapter import BlipTexts
from tests.service.train.conftest import manifest


def test_captions_become_tokens_and_files_are_counted_once(tmp_path: Path, backbone: BlipBackbone) -> None:
    path = manifest(
        tmp_path,
        {"file": "a.png", "caption": "a red circle"},
        {"file": "sub/b.png", "caption": "a blue square", "id": "b", "metadata": {"k": [1]}},
        {"file": "./a.png", "caption": "a circle"},
    )
    examples = read_examples(path, "retrieval", BlipTexts(backbone))
    assert examples.files == (tmp_path / "a.png", tmp_path / "sub" / "b.png")
    assert [(e.line, e.file) for e in examples.examples] == [(1, 0), (2, 1), (3, 0)]
    assert examples.examples[0].ids == backbone.tokenize("a red circle").ids
    assert examples.lines_of(0) == (1, 3)
    assert examples.answers == () and not examples.unknown


def test_answers_are_weighted_and_listed_by_frequency(tmp_path: Path, backbone: BlipBackbone) -> None:
    question = {"file": "a.png", "question": "what color is it ?"}
    path = manifest(
        tmp_path,
        {**question, "answers": ["red", "blue", "blue ", "blue"]},
        {**question, "answer": "green"},
        {**question, "answers": ["green", "red"], "weights": [1, 0.25]},
        {**question, "answer": "green"},
    )
    examples = read_examples(path, "vqa", BlipTexts(backbone))
    assert examples.answers == ("green", "red", "blue")
    red, blue = backbone.tokenize_answers(["red", "blue"])
    assert examples.examples[0].answers == (red, blue)
    assert examples.examples[0].weights == pytest.approx((0.25, 0.75))
    assert examples.examples[1].weights == (1.0,) and examples.examples[2].weights == (1.0, 0.25)
    assert red[0] == backbone.config.special_ids.bos and red[-1] == backbone.config.special_ids.sep


def test_blank_lines_count_and_unknown_words_are_counted(tmp_path: Path, backbone: BlipBackbone) -> None:
    path = tmp_path / "train.jsonl"
    line = json.dumps({"file": "a.png", "caption": "a zyzzyva circle"})
    path.write_bytes(b"\xef\xbb\xbf\n" + line.encode() + b"\r\n\n" + line.encode())
    examples = read_examples(path, "retrieval", BlipTexts(backbone))
    assert [e.line for e in examples.examples] == [2, 4]
    assert examples.unknown == {"zyzzyva": 2}


LONG = "red " * 20
CAPTION: dict[str, Any] = {"file": "a.png", "caption": "a circle"}
QUESTION: dict[str, Any] = {"file": "a.png", "question": "what ?"}


@pytest.mark.parametrize(
    "task, line, message",
    [
        ("retrieval", {"file": "a.png"}, "caption: Field required"),
        ("retrieval", {"caption": "a circle"}, "file: Field required"),
        ("retrieval", {**CAPTION, "file": ""}, "file: "),
        ("retrieval", {**CAPTION, "file": "a\0b"}, "'file' is no path"),
        ("retrieval", {**CAPTION, "caption": " "}, "'caption' is empty"),
        ("retrieval", {**CAPTION, "caption": LONG}, "'caption' has 22 tokens; at most 12 are allowed"),
        ("retrieval", {**CAPTION, "captoin": "x"}, "captoin: Extra inputs"),
        ("retrieval", {**CAPTION, "caption": 3}, "caption: Input should be a valid string"),
        ("retrieval", QUESTION, "caption: Field required"),
        ("vqa", QUESTION, "give either 'answer' or 'answers'"),
        ("vqa", {**QUESTION, "answer": "red", "answers": ["red"]}, "give either 'answer' or 'answers'"),
        ("vqa", {**QUESTION, "answers": []}, "answers: "),
        ("vqa", {**QUESTION, "answers": ["red", ""]}, "'answer' is empty"),
        ("vqa", {**QUESTION, "answer": LONG}, "'answer' has 22 tokens; at most 16 are allowed"),
        ("vqa", {**QUESTION, "question": LONG, "answer": "red"}, "'question' has 22 tokens; at most 12"),
        ("vqa", {**QUESTION, "answers": ["red"], "weights": [1, 1]}, "'weights' must be as many"),
        ("vqa", {**QUESTION, "answer": "red", "weights": [1]}, "'weights' must be as many"),
        ("vqa", {**QUESTION, "answers": ["red"], "weights": [0]}, "'weights' must be above 0"),
        ("vqa", {**QUESTION, "answers": ["red"], "weights": ["1"]}, "weights"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, backbone: BlipBackbone, task: Any, line: Any, message: str) -> None:
    good = CAPTION if task == "retrieval" else {**QUESTION, "answer": "red"}
    with pytest.raises(ConversionError, match=r"train\.jsonl line 2: ") as caught:
        read_examples(manifest(tmp_path, good, line), task, BlipTexts(backbone))
    assert message in caught.value.message and caught.value.param == "data"


@pytest.mark.parametrize(
    "content, message", [(b'{"file": \n', "line 1: "), (b"\xff\n", "line 1: "), (b"\n", "no examples")]
)
def test_a_manifest_that_is_none_is_refused(
    tmp_path: Path, backbone: BlipBackbone, content: bytes, message: str
) -> None:
    (tmp_path / "m.jsonl").write_bytes(content)
    with pytest.raises(ConversionError, match=message):
        read_examples(tmp_path / "m.jsonl", "retrieval", BlipTexts(backbone))
    with pytest.raises(ConversionError, match="cannot read"):
        read_examples(tmp_path / "absent.jsonl", "retrieval", BlipTexts(backbone))
