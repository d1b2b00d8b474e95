"""What a process remembers of a registry on a disk of its own, so that a lost registry can be put back.

    MEMORY/state.json     the last state seen: revision, lineage, records
    MEMORY/audit.jsonl    the audit log as far as it was seen, one line a change

Several processes of one host may share the folder: the longest history wins.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from adapters.registry.records import AuditRecord, Revision
from adapters.registry.store import Contents, Write

STATE_FILE = "state.json"
AUDIT_FILE = "audit.jsonl"


class Memory:
    """A folder that survives the process."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def recall(self) -> Contents | None:
        """What was remembered last; None for nothing, or nothing that can be read."""
        with self._locked():
            return self._read(with_log=True)

    def remember(self, contents: Contents) -> None:
        """Keep a state and the part of the log that is not kept yet, unless more of the same history is kept already."""
        with self._locked():
            known = self._read(with_log=False)
            kept: int | None = None
            if known is not None:
                is_same = known.revision.epoch == contents.revision.epoch
                if is_same and known.revision.generation >= contents.revision.generation:
                    return
                if contents.revision.epoch in known.lineage:
                    return  # what is kept was restored from it
                kept = known.revision.generation if is_same else None
            lines = [json.dumps(asdict(record)) for record in contents.log if kept is None or record.generation > kept]
            if kept is None:  # of a history that is new here the log is whole
                self._write(AUDIT_FILE, "".join(f"{line}\n" for line in lines))
            elif lines:
                with (self.folder / AUDIT_FILE).open("a", encoding="utf-8") as file:
                    file.write(
                        "".join(f"\n{line}" for line in lines) + "\n"
                    )  # what a crash cut off spoils no other line
                    file.flush()
                    os.fsync(file.fileno())
            state = {"revision": contents.revision, "lineage": contents.lineage, "records": contents.writes}
            self._write(STATE_FILE, json.dumps(state))

    def _read(self, *, with_log: bool) -> Contents | None:
        try:
            state = json.loads((self.folder / STATE_FILE).read_text(encoding="utf-8"))
            revision = Revision(*state["revision"])
            writes = tuple(Write(*write) for write in state["records"])
            return Contents(revision, tuple(state["lineage"]), writes, self._read_log(revision) if with_log else ())
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _read_log(self, revision: Revision) -> tuple[AuditRecord, ...]:
        """The log up to a revision. A line that was cut off by a crash is left out."""
        try:
            lines = (self.folder / AUDIT_FILE).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return ()
        records: dict[tuple[int, str, str], AuditRecord] = {}
        for line in lines:
            try:
                record = AuditRecord(**json.loads(line))
            except (ValueError, TypeError):
                continue
            if record.generation <= revision.generation:
                records[record.generation, record.action, record.subject] = record
        return tuple(records.values())

    def _write(self, name: str, text: str) -> None:
        beside = self.folder / f".{name}.{secrets.token_hex(4)}"
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.folder / name)
        finally:
            beside.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
