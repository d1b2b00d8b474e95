"""Items of the demo's world as files: PNG pictures, MP4 clips, WAV and AAC sounds, and items.jsonl."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from service.demo.clips import write_clip, write_picture
from service.demo.sounds import write_sound
from service.demo.world import WORLDS, Item, evaluation_set
from service.errors import BadQuery

ITEMS_FILE = "items.jsonl"


def write_samples(task: str, seed: int, num_items: int, out: Path) -> Path:
    """Write an evaluation set of a world; returns the path of items.jsonl.

    Each line is {"file", "caption"} for what is retrieved or told and {"file", "question", "answer"} for what is asked.
    Raises: BadQuery for a world nobody drew.
    """
    if task not in WORLDS:
        raise BadQuery(f"no demo task {task!r}; there are {', '.join(WORLDS)}", param="task")
    out.mkdir(parents=True, exist_ok=True)
    items = evaluation_set(task, seed, num_items)
    lines = []
    for file, item in zip(write_media(items, out), items, strict=True):
        if WORLDS[task].goal in ("retrieval", "caption"):
            lines.append({"file": file.name, "caption": item.caption})
        else:
            lines.append(
                {"file": file.name, "question": item.questions[0].question, "answer": item.questions[0].answer}
            )
    path = out / ITEMS_FILE
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_media(items: Sequence[Item], out: Path) -> list[Path]:
    """One file per item, in order: 0000.png or 0000.mp4 and so on; every other sound is AAC, the others WAV."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, item in enumerate(items):
        suffix, write = _WRITERS[item.media.ndim][index % 2]
        path = out / f"{index:04d}.{suffix}"
        write(item.media, path)
        paths.append(path)
    return paths


# By the number of axes: a sound's samples, a picture, a clip; what even and what odd items become.
_WRITERS: dict[int, tuple[tuple[str, Callable[..., None]], tuple[str, Callable[..., None]]]] = {
    1: (("wav", write_sound), ("m4a", write_sound)),
    3: (("png", write_picture), ("png", write_picture)),
    4: (("mp4", write_clip), ("mp4", write_clip)),
}
