"""The operator's commands: the same verbs on a home folder and, with --url, on a running service.

Exit status: 0 done, 1 refused or failed, 2 wrong usage, 3 the operation ended badly, 4 it still runs.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel

from adapters.errors import AdapterBankError
from adapters.registry import DEFAULT_ALIAS, UNSET, Expect
from service.config import Settings

if TYPE_CHECKING:
    from service.client import Client
    from service.http.operator_schemas import OperationReply
    from service.operator import LocalOperator

app = typer.Typer()
registry_app = typer.Typer(help="Look after the registry itself.", no_args_is_help=True)
app.add_typer(registry_app, name="registry")

URL_VARIABLE = "ADAPTER_BANK_URL"
OPERATION_FAILED = 3
STILL_RUNNING = 4
CONFIRM_S = 5.0  # servers give a sign of life every 2 seconds; one that takes longer is told of
CONFIRM_POLL_S = 0.2

Home = Annotated[Path | None, typer.Option("--home", help="State folder; default BANK_HOME.")]
Backbone = Annotated[Path | None, typer.Option(help="Backbone folder; default HOME/backbone.")]
Url = Annotated[
    str | None, typer.Option("--url", envvar=URL_VARIABLE, help="A running service, instead of a home folder.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Name = Annotated[str, typer.Argument(help="Name of the adapter.")]
Version = Annotated[int, typer.Argument(help="Number of the version.", min=1)]
Alias = Annotated[str, typer.Option(help="Alias to move.")]
Reason = Annotated[str | None, typer.Option(help="Why; kept in the audit log.")]
Expected = Annotated[
    int | None, typer.Option("--expect", help="The version that must be there now; 0: none. Otherwise nothing is done.")
]
Key = Annotated[str | None, typer.Option("--key", help="Name of this request: given again, nothing is done again.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it ended.")]
TimeoutS = Annotated[float, typer.Option("--timeout", help="Seconds after which it is aborted.", min=1)]


@contextmanager
def operator(url: str | None, home: Path | None, backbone: Path | None = None) -> "Iterator[Client | LocalOperator]":
    """Whoever does the verbs: a running service, or this process on a home folder."""
    if url is not None:
        from httpx import TransportError

        from service.client import Client, ServiceError

        try:
            with Client(url) as client:
                yield client
        except ServiceError as error:
            raise AdapterBankError(f"{error.message} ({error.code})", param=error.param) from error
        except TransportError as error:
            raise AdapterBankError(f"{url} cannot be reached: {error}", param="url") from error
        return
    from service.operator import LocalOperator

    with LocalOperator(Settings.load(home=home, backbone=backbone)) as local:
        yield local


@app.command()
def push(
    package: Annotated[str, typer.Argument(help="Package folder, or a URL such as s3://bucket/folder.")],
    name: Annotated[str, typer.Option(help="Name to register it under.")],
    wait: Wait = True,
    url: Url = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Store a package as the next version of a name and validate it. A name's first good version becomes `prod`."""
    with operator(url, home) as bank:
        follow(bank, bank.push(package, name), wait=wait, as_json=as_json)


@app.command()
def promote(
    name: Name,
    version: Version,
    alias: Alias = DEFAULT_ALIAS,
    traffic: Annotated[str | None, typer.Option(help="A share for a canary, such as 5%. Default: everything.")] = None,
    expect: Expected = None,
    migrate: Annotated[bool, typer.Option(help="Embed galleries that follow the alias anew, first.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Do not wait for replicas.")] = False,
    timeout_s: TimeoutS = 600.0,
    reason: Reason = None,
    key: Key = None,
    wait: Wait = True,
    url: Url = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Let an alias serve a version, once every living replica is ready for it."""
    share = None if traffic is None else read_share(traffic)
    with operator(url, home) as bank:
        operation = bank.promote(
            name,
            version,
            alias=alias,
            expect=_expected(expect),
            traffic=share,
            migrate=migrate,
            force=force,
            timeout_s=timeout_s,
            reason=reason,
            key=key,
        )
        follow(bank, operation, wait=wait, as_json=as_json)


@app.command()
def rollback(
    name: Name,
    alias: Alias = DEFAULT_ALIAS,
    expect: Expected = None,
    reason: Reason = None,
    key: Key = None,
    url: Url = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Go back to the version an alias named before, at once. Without --expect it leaves the version that is there now."""
    with operator(url, home) as bank:
        leaving = _expected(expect) if expect is not None else bank.adapter(name).aliases.get(alias)
        operation = bank.roll_back(name, alias=alias, expect=leaving, reason=reason, key=key)
        follow(bank, operation, wait=False, as_json=as_json)


@app.command("end-canary")
def end_canary(
    name: Name,
    alias: Alias = DEFAULT_ALIAS,
    expect: Annotated[int | None, typer.Option(help="The canary's version.", min=1)] = None,
    reason: Reason = None,
    url: Url = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Take a canary's share of the traffic back."""
    with operator(url, home) as bank:
        record = bank.end_canary(name, alias=alias, expect=expect, reason=reason)
        show(record, as_json, lambda: f"{record.name}@{record.alias} is version {record.version} alone")


@app.command()
def retire(
    name: Name, version: Version, reason: Reason = None, url: Url = None, home: Home = None, as_json: AsJson = False
) -> None:
    """Take a version out of service."""
    with operator(url, home) as bank:
        record = bank.retire(name, version, reason=reason)
        show(record, as_json, lambda: f"{name}@{version} is {record.status}")


@app.command()
def reinstate(
    name: Name, version: Version, reason: Reason = None, url: Url = None, home: Home = None, as_json: AsJson = False
) -> None:
    """Bring a retired version back."""
    with operator(url, home) as bank:
        record = bank.reinstate(name, version, reason=reason)
        show(record, as_json, lambda: f"{name}@{version} is {record.status}")


@app.command()
def delete(
    name: Name, version: Version, reason: Reason = None, url: Url = None, home: Home = None, as_json: AsJson = False
) -> None:
    """Give a version up for good. Its files go after a day."""
    with operator(url, home) as bank:
        freed = bank.delete(name, version, reason=reason)
        show(freed, as_json, lambda: f"{name}@{version} is deleted; freed {_bytes(freed.freed_bytes)}")


@app.command()
def abort(
    operation: Annotated[str, typer.Argument(help="Id of the operation.")],
    reason: Reason = None,
    url: Url = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """End a rollout before it is committed, or the build of a gallery: nothing that is served has changed."""
    with operator(url, home) as bank:
        aborted = bank.abort(operation, reason=reason)
        show(aborted, as_json, lambda: _line(aborted))


@app.command("adapters")
def list_adapters(
    name: Annotated[str | None, typer.Argument(help="Only this one.")] = None,
    url: Url = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """List adapters, their versions and aliases."""
    with operator(url, home) as bank:
        found = bank.adapters() if name is None else [bank.adapter(name)]
    if as_json:
        _print_json(found)
        return
    for adapter in found:
        for version in adapter.versions:
            aliases = [alias for alias, number in adapter.aliases.items() if number == version.version]
            aliases += [
                f"{alias} for {100 * canary.traffic:g} %"
                for alias, canary in adapter.canaries.items()
                if canary.version == version.version
            ]
            named = f"  {', '.join(aliases)}" if aliases else ""
            why = f"  ({version.reason})" if version.reason else ""
            print(
                f"{adapter.name}@{version.version}  {version.task}  rank {version.rank}  {version.status}{named}  "
                f"{version.weights_digest}{why}"
            )


@app.command("operations")
def list_operations(url: Url = None, home: Home = None, as_json: AsJson = False) -> None:
    """List operations under way and lately ended."""
    with operator(url, home) as bank:
        found = bank.operations()
    if as_json:
        _print_json(found)
        return
    if not found:
        print("no operation is under way or ended within a day")
    for operation in found:
        print(_line(operation))


@app.command()
def audit(
    limit: Annotated[int, typer.Option(help="How many lines.", min=1, max=10_000)] = 50,
    url: Url = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Tell who changed what, when and why; the latest first."""
    with operator(url, home) as bank:
        lines = bank.audit(limit=limit)
    if as_json:
        _print_json(lines)
        return
    for line in lines:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(line.at))
        change = " -> ".join(value for value in (line.before, line.after) if value is not None)
        reason = f"  ({line.reason})" if line.reason else ""
        print(f"{line.generation:6d}  {when}Z  {line.actor}  {line.action}  {line.subject}  {change}{reason}")


@app.command()
def status(url: Url = None, home: Home = None, as_json: AsJson = False) -> None:
    """Tell which servers live, which state each serves, what is resident where, and what is under way."""
    with operator(url, home) as bank:
        replicas = bank.replicas()
        running = [operation for operation in bank.operations() if operation.status == "running"]
    if as_json:
        text = {
            "replicas": replicas.model_dump(mode="json"),
            "operations": [o.model_dump(mode="json") for o in running],
        }
        print(json.dumps(text))
        return
    print(f"registry at generation {replicas.generation}")
    for replica in replicas.replicas:
        state = "serving" if replica.is_serving and replica.is_alive else "not serving" if replica.is_alive else "gone"
        behind = replicas.generation - replica.generation
        lag = f", {behind} generations behind" if behind > 0 else ""
        print(f"{replica.id}  {state}, heard of {replica.age_s:.1f} s ago{lag}  {replica.details.get('url', '')}")
        resident = replica.details.get("resident")
        for tier, held in resident.items() if isinstance(resident, dict) else ():
            if held:
                print(f"    {tier}: {', '.join(map(str, held)) if isinstance(held, list) else held}")
    for operation in running:
        print(_line(operation))


@registry_app.command("restore")
def restore(
    force: Annotated[bool, typer.Option("--force", help="Replace another registry that is there.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Put a lost registry back from what this home remembers of it. Servers do this by themselves where it is in Redis."""
    from service.folders import open_registry

    registry = open_registry(Settings.load(home=home))
    try:
        snapshot = registry.restore(actor="cli", force=force)
    finally:
        registry.close()
    told = {"generation": snapshot.generation, "adapters": len(snapshot.adapters)}
    print(json.dumps(told) if as_json else "restored at generation {generation}: {adapters} adapters".format(**told))


def read_share(text: str) -> float:
    """'5%' or '0.05' -> 0.05. Raises: AdapterBankError."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise AdapterBankError(f"{text!r} is no share of the traffic; say 5% or 0.05", param="traffic")
    return share


def _expected(expect: int | None) -> Expect:
    """What --expect says: nothing, that there is nothing (0), or a version."""
    if expect is None:
        return UNSET
    return expect or None


def follow(
    bank: "Client | LocalOperator",
    operation: "OperationReply",
    *,
    wait: bool,
    as_json: bool,
    timeout_s: float = 3600.0,
    is_quiet: bool = False,
) -> "OperationReply":
    """Show an operation; with `wait` its end. Exits with what became of it, unless that is good.

    `is_quiet`: people are not told of a good end here.
    """
    if wait and operation.status == "running":
        try:
            operation = bank.wait(operation.id, timeout_s=timeout_s, report=None if as_json else _progress())
        except TimeoutError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(STILL_RUNNING) from error
    final = operation if as_json or is_quiet else _confirmed(bank, operation)
    if as_json or not (is_quiet and final.status == "succeeded"):
        show(final, as_json, lambda: _line(final))
    if final.status == "failed":
        raise typer.Exit(OPERATION_FAILED)
    return final


def _confirmed(bank: "Client | LocalOperator", operation: "OperationReply") -> "OperationReply":
    """An operation once every living server said that it serves the outcome, or after a while."""
    end = time.monotonic() + CONFIRM_S
    while operation.laggards and time.monotonic() < end:
        time.sleep(CONFIRM_POLL_S)
        operation = bank.operation(operation.id)
    return operation


def _progress() -> "Callable[[OperationReply], None]":
    """A progress bar for galleries that are embedded; silent where nobody looks on."""
    from tqdm import tqdm

    bar = tqdm(unit="item", disable=None, leave=False)

    def report(operation: "OperationReply") -> None:
        bar.set_description(operation.phase)
        if operation.progress is not None:
            bar.total = operation.progress[1]
            bar.n = operation.progress[0]
        bar.refresh()
        if operation.status != "running":
            bar.close()

    return report


def _line(operation: "OperationReply") -> str:
    """One operation for people."""
    move = f"{operation.from_version or 'none'} -> {operation.to_version or 'none yet'}"
    share = "" if operation.traffic is None else f" for {100 * operation.traffic:g} % of the traffic"
    parts = [f"{operation.kind} {operation.id}: {operation.subject} {operation.phase}, {move}{share}"]
    if operation.progress is not None:
        parts.append("{} of {} items".format(*operation.progress))
    if operation.error:
        parts.append(operation.error)
    if operation.waiting_for:
        parts.append(f"waiting for {', '.join(operation.waiting_for)}")
    if operation.laggards:
        parts.append(f"not yet on {', '.join(operation.laggards)}")
    if operation.pinned_galleries:
        parts.append(f"galleries left behind: {', '.join(operation.pinned_galleries)}")
    return "; ".join(parts)


def show(reply: BaseModel, as_json: bool, text: Callable[[], str]) -> None:
    """Print a reply, for scripts or for people."""
    print(reply.model_dump_json() if as_json else text())


def _print_json(replies: Sequence[BaseModel]) -> None:
    print(json.dumps([reply.model_dump(mode="json") for reply in replies]))


def _bytes(freed: dict[str, int]) -> str:
    return ", ".join(f"{count:,} bytes of {tier}" for tier, count in freed.items())
