"""The media a run leaves out: a list beside its checkpoint, believed for as long as the run goes on."""

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from adapters.config import Strict
from service.train.examples import Examples


class Quarantined(Strict):
    """One file, the lines that name it, and what is wrong with it."""

    file: str
    lines: tuple[int, ...]
    reason: str


class Quarantine(Strict):
    """All files left out of a manifest, which is named by its digest."""

    data: str
    files: int
    quarantined: tuple[Quarantined, ...]

    @classmethod
    def of(cls, examples: Examples, broken: Mapping[int, str]) -> "Quarantine":
        """What a check of every file found: reasons by file."""
        entries = tuple(
            Quarantined(file=str(examples.files[file]), lines=examples.lines_of(file), reason=broken[file])
            for file in sorted(broken)
        )
        return cls(data=examples.digest, files=len(examples.files), quarantined=entries)

    @classmethod
    def read(cls, path: Path, examples: Examples) -> "Quarantine | None":
        """The list in a file, or None where there is none of this manifest: checking again only costs time."""
        try:
            written = cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None
        return written if written.data == examples.digest else None

    def write(self, path: Path) -> None:
        """Write the list."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n")

    @property
    def lines(self) -> frozenset[int]:
        """The lines left out."""
        return frozenset(line for entry in self.quarantined for line in entry.lines)
