"""A manifest of JSON lines -> tokenised examples, every mistake reported with its line."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, Self

from pydantic import ConfigDict, Field, JsonValue, ValidationError, model_validator

from adapters.config import Strict, Task, describe
from adapters.errors import ConversionError
from service.backbone.base import TokenizedText

MAX_ANSWER_TOKENS = 64
MAX_ANSWERS = 20_000  # candidates a package lists; the service takes no more by default
Part = Literal["caption", "question", "answer"]


class Texts(Protocol):
    """How a family of adapters reads the texts of a line."""

    def tokenize(self, part: Part, text: str) -> TokenizedText:
        """The tokens of a part, whatever it starts and ends with included. Raises: MissingPart without a tokenizer."""

    def limit(self, part: Part) -> int:
        """How many of them it may have."""


class _Line(Strict):
    """What every line may say; `id` and `metadata` are a gallery's, and mean nothing here."""

    model_config = ConfigDict(strict=True)

    file: str = Field(min_length=1)
    id: str | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)


class _CaptionLine(_Line):
    caption: str


class _QuestionLine(_Line):
    question: str
    answer: str | None = None
    answers: tuple[str, ...] | None = Field(default=None, min_length=1)
    weights: tuple[float, ...] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _answers_agree(self) -> Self:
        if (self.answer is None) == (self.answers is None):
            raise ValueError("give either 'answer' or 'answers'")
        if self.weights is not None and len(self.weights) != len(self.answers or ()):
            raise ValueError("'weights' must be as many as 'answers'")
        if any(weight <= 0 for weight in self.weights or ()):
            raise ValueError("'weights' must be above 0")
        return self

    def weighted(self) -> dict[str, float]:
        """Weight of each distinct answer; without weights the answers share 1, a repeated one by its count."""
        answers = self.answers if self.answers is not None else (self.answer or "",)
        weights = self.weights or tuple(1.0 / len(answers) for _ in answers)
        total: dict[str, float] = {}
        for answer, weight in zip(answers, weights, strict=True):
            total[answer.strip()] = total.get(answer.strip(), 0.0) + weight
        return total


@dataclass(frozen=True)
class Example:
    """One line: its number, its file (an index), the tokens of its caption or question, its weighted answers' tokens."""

    line: int
    file: int
    ids: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Examples:
    """A manifest, tokenised. `answers` are its distinct ones, most frequent first; `unknown` counts words without a token."""

    examples: tuple[Example, ...]
    files: tuple[Path, ...]
    answers: tuple[str, ...]
    unknown: Mapping[str, int]
    digest: str

    def lines_of(self, file: int) -> tuple[int, ...]:
        """The numbers of the lines that name a file."""
        return tuple(example.line for example in self.examples if example.file == file)


@dataclass
class _Reader:
    """Collects examples, and what is counted over all of them."""

    texts: Texts
    folder: Path
    examples: list[Example] = field(default_factory=list)
    files: dict[Path, int] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)

    def add(self, number: int, line: _CaptionLine | _QuestionLine) -> None:
        """Take in a line. Raises: ConversionError."""
        if "\0" in line.file:
            raise ConversionError("'file' is no path")
        path = Path(os.path.abspath(self.folder / line.file))
        if isinstance(line, _CaptionLine):
            ids, answers, weights = self._tokens("caption", line.caption), [], []
        else:
            weighted = line.weighted()
            ids = self._tokens("question", line.question)
            answers, weights = [self._tokens("answer", answer) for answer in weighted], list(weighted.values())
            self.answers.update(weighted.keys())
        file = self.files.setdefault(path, len(self.files))
        self.examples.append(Example(number, file, ids, tuple(answers), tuple(weights)))

    def _tokens(self, part: Part, text: str) -> tuple[int, ...]:
        if not text.strip():
            raise ConversionError(f"{part!r} is empty")
        tokens, limit = self.texts.tokenize(part, text), self.texts.limit(part)
        if len(tokens.ids) > limit:
            raise ConversionError(f"{part!r} has {len(tokens.ids)} tokens; at most {limit} are allowed")
        self.unknown.update(tokens.unknown)
        return tokens.ids


def read_examples(manifest: Path, task: Task, texts: Texts) -> Examples:
    """Read JSON lines {"file", "caption"} or {"file", "question", "answer" | "answers", "weights"?}.

    Files are relative to the manifest's folder. Raises: ConversionError with the number of the line.
    """
    try:
        data = manifest.read_bytes()
    except OSError as error:
        raise ConversionError(f"cannot read {manifest}: {error.strerror}", param="data") from error
    model: type[_CaptionLine | _QuestionLine] = _QuestionLine if task == "vqa" else _CaptionLine
    reader = _Reader(texts, manifest.absolute().parent)
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            with _line_errors(f"{manifest.name} line {number}"):
                reader.add(number, model.model_validate_json(line))
    if not reader.examples:
        raise ConversionError(f"{manifest.name} holds no examples", param="data")
    ranked = tuple(answer for answer, _ in reader.answers.most_common())
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return Examples(tuple(reader.examples), tuple(reader.files), ranked, reader.unknown, digest)


@contextmanager
def _line_errors(place: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise ConversionError(f"{place}: {describe(error)}", param="data") from error
    except ConversionError as error:
        raise ConversionError(f"{place}: {error.message}", param="data") from error
