"""How log lines look: as text for people, or as one JSON object a line for machines; each with the request it belongs to.

Whoever logs an event gives its keys with `event`. Nothing here knows which there are; docs/operations.md lists them.
"""

import json
import logging
import re
import sys
import threading
from contextvars import ContextVar
from datetime import UTC, datetime

OURS = ("adapters", "service")
TALKATIVE = ("faiss", "httpx")  # the one tells at length which instructions it found, the other of every request
_KEYS = "event_keys"  # the attribute of a record that has them
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # what could begin a line that nobody logged

# Of the request that is being answered. Tasks and `to_thread` inherit it; other threads are given a copy of the context.
request_id: ContextVar[str] = ContextVar("request_id", default="")

log = logging.getLogger(__name__)


def event(name: str, **keys: object) -> dict[str, object]:
    """The `extra` of a line that tells of an event: JSON lines have these keys, without those that are None.

    log.info("swept %s", digest, extra=event("swept", digest=digest))
    """
    return {_KEYS: {"event": name, **{key: value for key, value in keys.items() if value is not None}}}


class TextFormatter(logging.Formatter):
    """One line a message, whatever is in it, and below it the traceback where there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        line = _UNPRINTABLE.sub(_escaped, super().formatMessage(record))
        request = _request_of(record)
        return f"{line} request={request}" if request else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII: `time` (RFC 3339, UTC), `level`, `logger`, `message`, then what there is of
    `request_id`, the event's keys, and `error`, a whole traceback.
    """

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request = _request_of(record)
        if request:
            line["request_id"] = request
        line |= _keys_of(record)
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(*, as_json: bool = False, level: str = "info") -> None:
    """Send every line of the process to standard error: Python's warnings and, as JSON, errors that nobody caught too.

    `level` is the least that is let through, and "debug" is about our own modules: others might tell what they send.
    """
    least = logging.getLevelNamesMapping()[level.upper()]
    handler = logging.StreamHandler()
    handler.setLevel(least)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(least)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    if as_json:
        sys.excepthook = lambda *error: log.critical("the process ends", exc_info=error)
        threading.excepthook = _log_thread_error
        sys.unraisablehook = _log_unraisable


def are_json() -> bool:
    """Whether the lines of this process are JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def _request_of(record: logging.LogRecord) -> str:
    return str(_keys_of(record).get("request_id", request_id.get()))


def _keys_of(record: logging.LogRecord) -> dict[str, object]:
    keys: dict[str, object] = getattr(record, _KEYS, {})
    return keys


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def _log_thread_error(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is SystemExit:
        return
    name = args.thread.name if args.thread is not None else "unknown"
    log.error("thread %s ended", name, exc_info=(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback))


def _log_unraisable(args: "sys.UnraisableHookArgs") -> None:
    error = args.exc_value or args.exc_type()
    log.error("%s in %r", args.err_msg or "ignored", args.object, exc_info=(args.exc_type, error, args.exc_traceback))
