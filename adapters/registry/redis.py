"""The registry that replicas on several hosts share: Redis 6.2 or later, one hash slot, scripts that run whole or not at all.

    {NAMESPACE}:meta       hash: epoch, generation, tip, lineage
    {NAMESPACE}:tips       hash: generation -> tip, the last few thousand
    {NAMESPACE}:records    hash: "kind key" -> text
    {NAMESPACE}:touched    sorted set: "kind key" by the generation that last wrote or dropped it
    {NAMESPACE}:log        sorted set: audit lines by generation
    {NAMESPACE}:replicas   hash: id -> last sign of life
    {NAMESPACE}:changed    channel: a wake-up for those who wait, never news in itself

Times are the server's. What Redis promises about a commit is what its persistence promises: `appendonly yes` and
`appendfsync always` lose nothing in a crash, `everysec` up to a second; a failover can lose what was not replicated yet.
Such a loss is noticed (the generation went back) and mended from what replicas remember.
"""

import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from urllib.parse import parse_qsl, urlencode

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from adapters.errors import InvalidReference, RegistryUnavailable
from adapters.registry.records import AuditRecord, Replica, Revision
from adapters.registry.store import KEPT_TIPS, Changes, Contents, Write

log = logging.getLogger(__name__)

DEFAULT_NAMESPACE = "adapter-bank"
TIMEOUT_S = 2.0

# KEYS of every script: meta, tips, records, touched, log. Generations are compared as numbers, all else as text.

_COMMON = """
local function write(first, generation)
  local place = first
  local number = tonumber(ARGV[place])
  place = place + 1
  for _ = 1, number do
    local field, has_text, text = ARGV[place], ARGV[place + 1], ARGV[place + 2]
    if has_text == '1' then
      redis.call('HSET', KEYS[3], field, text)
    else
      redis.call('HDEL', KEYS[3], field)
    end
    redis.call('ZADD', KEYS[4], generation, field)
    place = place + 3
  end
  number = tonumber(ARGV[place])
  place = place + 1
  for _ = 1, number do
    local line_generation, line = ARGV[place], ARGV[place + 1]
    redis.call('ZADD', KEYS[5], line_generation, string.format('%012d ', redis.call('ZCARD', KEYS[5])) .. line)
    place = place + 2
  end
end
"""

CREATE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'generation', ARGV[2], 'tip', ARGV[3], 'lineage', '[]')
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
return 1
"""

# ARGV: epoch, generation, tip that the caller knows
READ = """
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'generation', 'tip', 'lineage')
if not meta[1] then return {} end
local continues = 0
if ARGV[1] == meta[1] and tonumber(ARGV[2]) <= tonumber(meta[2]) then
  local tip = redis.call('HGET', KEYS[2], ARGV[2])
  if not tip or tip == ARGV[3] then continues = 1 end
end
local after = continues == 1 and '(' .. ARGV[2] or '-inf'
local fields = redis.call('ZRANGEBYSCORE', KEYS[4], after, '+inf')
local texts = {}
for i, field in ipairs(fields) do texts[i] = redis.call('HGET', KEYS[3], field) end
local lines = redis.call('ZRANGEBYSCORE', KEYS[5], after, '+inf')
return {meta[1], meta[2], meta[3], meta[4], continues, fields, texts, lines, redis.call('TIME')}
"""

# ARGV: epoch, generation, tip that the change was decided on; new tip; oldest tip kept; channel; writes; lines
COMMIT = (
    _COMMON
    + """
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'generation', 'tip')
if meta[3] == ARGV[4] then return 1 end
if meta[1] ~= ARGV[1] or meta[2] ~= ARGV[2] or meta[3] ~= ARGV[3] then return 0 end
local generation = tonumber(ARGV[2]) + 1
redis.call('HSET', KEYS[1], 'generation', generation, 'tip', ARGV[4])
redis.call('HSET', KEYS[2], generation, ARGV[4])
redis.call('HDEL', KEYS[2], ARGV[5])
write(7, generation)
redis.call('PUBLISH', ARGV[6], generation)
return 1
"""
)

# ARGV: epoch, generation, tip expected ('' for none); epoch, generation, tip, lineage; channel; writes; lines
REPLACE = (
    _COMMON
    + """
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'generation', 'tip')
if (meta[1] or '') ~= ARGV[1] then return 0 end
if meta[1] and (meta[2] ~= ARGV[2] or meta[3] ~= ARGV[3]) then return 0 end
redis.call('DEL', unpack(KEYS))
redis.call('HSET', KEYS[1], 'epoch', ARGV[4], 'generation', ARGV[5], 'tip', ARGV[6], 'lineage', ARGV[7])
redis.call('HSET', KEYS[2], ARGV[5], ARGV[6])
write(9, ARGV[5])
redis.call('PUBLISH', ARGV[8], ARGV[5])
return 1
"""
)

BEAT = """
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], ARGV[1], time[1] .. '.' .. string.format('%06d', time[2]) .. ' ' .. ARGV[2])
return 1
"""


class RedisStore:
    """See Store. `url` is what redis-py takes, with `?namespace=NAME` where several registries share a server."""

    is_shared = True

    def __init__(self, url: str) -> None:
        address, namespace = _split_namespace(url)
        self._url = _without_password(address)
        self._keys = [f"{{{namespace}}}:{name}" for name in ("meta", "tips", "records", "touched", "log")]
        self._replicas_key = f"{{{namespace}}}:replicas"
        self._channel = f"{{{namespace}}}:changed"
        try:
            self._redis: Any = redis.Redis.from_url(
                address,
                decode_responses=True,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                retry=Retry(NoBackoff(), 1),  # every script may run twice
                protocol=2,
            )
        except ValueError as error:
            raise InvalidReference(f"{self._url} is no Redis address: {error}", param="registry_url") from error
        self._create = self._redis.register_script(CREATE)
        self._read = self._redis.register_script(READ)
        self._commit = self._redis.register_script(COMMIT)
        self._replace = self._redis.register_script(REPLACE)
        self._beat = self._redis.register_script(BEAT)
        self._pubsub: Any = None
        self._pubsub_lock = threading.Lock()
        self._is_closed = False
        self._warn_if_forgetful()

    def create(self, revision: Revision) -> None:
        """See Store."""
        with self._translated():
            self._create(keys=self._keys, args=list(revision))

    def revision(self) -> Revision | None:
        """See Store."""
        with self._translated():
            epoch, generation, tip = self._redis.hmget(self._keys[0], ["epoch", "generation", "tip"])
        return None if epoch is None else Revision(epoch, int(generation), tip)

    def changes(self, since: Revision | None) -> Changes | None:
        """See Store."""
        with self._translated():
            reply = self._read(keys=self._keys, args=list(since or Revision("", 0, "")))
        if not reply:
            return None
        epoch, generation, tip, lineage, continues, fields, texts, lines, (seconds, microseconds) = reply
        writes = []
        for field, text in zip(fields, texts, strict=True):
            kind, _, key = field.partition(" ")
            writes.append(Write(kind, key, text))
        return Changes(
            Revision(epoch, int(generation), tip),
            tuple(json.loads(lineage)),
            bool(continues),
            tuple(write for write in writes if continues or write.text is not None),
            tuple(_read_line(line) for line in lines),
            int(seconds) + int(microseconds) / 1e6,
        )

    def commit(self, base: Revision, tip: str, writes: Sequence[Write], log: Sequence[AuditRecord]) -> bool:
        """See Store."""
        oldest = base.generation + 1 - KEPT_TIPS
        arguments = [*base, tip, oldest, self._channel, *_write_arguments(writes, log)]
        with self._translated():
            return bool(self._commit(keys=self._keys, args=arguments))

    def replace(self, expect: Revision | None, contents: Contents) -> bool:
        """See Store."""
        arguments = [
            *(expect or Revision("", 0, "")),
            *contents.revision,
            json.dumps(contents.lineage),
            self._channel,
            *_write_arguments(contents.writes, contents.log),
        ]
        with self._translated():
            return bool(self._replace(keys=self._keys, args=arguments))

    def audit(self, limit: int) -> tuple[AuditRecord, ...]:
        """See Store."""
        if limit == 0:
            return ()
        with self._translated():
            lines = self._redis.zrevrange(self._keys[4], 0, limit - 1)
        return tuple(_read_line(line) for line in lines)

    def beat(self, replica: Replica) -> None:
        """See Store."""
        text = json.dumps([replica.generation, replica.is_serving, dict(replica.details)])
        with self._translated():
            self._beat(keys=[self._replicas_key], args=[replica.id, text])

    def replicas(self) -> tuple[Replica, ...]:
        """See Store."""
        with self._translated(), self._redis.pipeline() as pipeline:
            pipeline.hgetall(self._replicas_key)
            pipeline.time()
            beats, (seconds, microseconds) = pipeline.execute()
        now = seconds + microseconds / 1e6
        found = []
        for name, beat in sorted(beats.items()):
            at, text = beat.split(" ", 1)
            generation, is_serving, details = json.loads(text)
            found.append(Replica(name, generation, is_serving, details, max(0.0, now - float(at))))
        return tuple(found)

    def forget(self, replica_id: str) -> None:
        """See Store."""
        with self._translated():
            self._redis.hdel(self._replicas_key, replica_id)

    def wait(self, timeout_s: float) -> None:
        """See Store. While Redis cannot be reached no announcement comes, and the time passes."""
        end = time.monotonic() + timeout_s
        with self._pubsub_lock:
            try:
                if self._pubsub is None:
                    self._pubsub = self._redis.pubsub()
                    self._pubsub.subscribe(self._channel)
                while (left := end - time.monotonic()) > 0:
                    message = self._pubsub.get_message(timeout=left)
                    if message is not None and message["type"] == "message":
                        return
                return
            except (redis.RedisError, OSError, ValueError):
                self._drop_pubsub()
        time.sleep(max(0.0, end - time.monotonic()))

    def close(self) -> None:
        """See Store."""
        self._is_closed = True
        with self._pubsub_lock:
            self._drop_pubsub()
        self._redis.close()

    def _drop_pubsub(self) -> None:
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            pubsub.close()

    def _warn_if_forgetful(self) -> None:
        """Say so when a restart of the server would lose the registry. A server that keeps its settings secret is believed."""
        try:
            persistence = self._redis.config_get("appendonly")
        except (redis.RedisError, OSError):
            return
        if persistence.get("appendonly") == "no":
            log.warning("%s keeps no append-only file: a restart of it loses the registry", self._url)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        if self._is_closed:
            raise RegistryUnavailable("the registry is closed")
        try:
            yield
        except (redis.RedisError, OSError) as error:
            raise RegistryUnavailable(f"registry {self._url}: {error}") from error


def _split_namespace(url: str) -> tuple[str, str]:
    """(URL without it, namespace)."""
    address, _, query = url.partition("?")
    options = dict(parse_qsl(query))
    namespace = options.pop("namespace", DEFAULT_NAMESPACE)
    if not namespace or set(namespace) & set("{} "):
        raise InvalidReference("a namespace holds no braces and no spaces", param="registry_url")
    return (f"{address}?{urlencode(options)}" if options else address), namespace


def _without_password(url: str) -> str:
    """What may be shown of an address."""
    scheme, _, rest = url.partition("?")[0].partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def _write_arguments(writes: Sequence[Write], log: Sequence[AuditRecord]) -> list[str | int]:
    arguments: list[str | int] = [len(writes)]
    for kind, key, text in writes:
        arguments += [f"{kind} {key}", int(text is not None), text or ""]
    arguments.append(len(log))
    for record in log:
        arguments += [record.generation, json.dumps(asdict(record))]
    return arguments


def _read_line(line: str) -> AuditRecord:
    return AuditRecord(**json.loads(line.split(" ", 1)[1]))
