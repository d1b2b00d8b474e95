"""The gallery commands: the same verbs on a home folder and, with --url, on a running service. Exit status: as `deploy_commands`."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from service.deploy_commands import AsJson, Backbone, Home, Key, Reason, Url, Wait, follow, operator, show

if TYPE_CHECKING:
    from service.client import Client
    from service.http.operator_schemas import OperationReply
    from service.operator import LocalOperator

app = typer.Typer(help="Build, list, embed anew and delete searchable collections.", no_args_is_help=True)

WAIT_S = 7 * 24 * 3600.0

Name = Annotated[str, typer.Argument(help="Gallery name.")]


@app.command()
def build(
    name: Name,
    adapter: Annotated[str, typer.Option(help="Adapter reference that embeds it.")],
    source: Annotated[
        str, typer.Option("--from", help="Folder of media, or a MANIFEST.jsonl; with --url, one of the server's.")
    ],
    pooling: Annotated[str, typer.Option(help="mean, or frame_attention.")] = "mean",
    index: Annotated[str, typer.Option(help="flat, or hnsw.")] = "flat",
    copy_media: Annotated[bool, typer.Option(help="Keep copies of the media in the gallery.")] = False,
    key: Key = None,
    wait: Wait = True,
    url: Url = None,
    home: Home = None,
    backbone: Backbone = None,
    as_json: AsJson = False,
) -> None:
    """Embed a collection and make it live; running servers pick it up. Goes on where an earlier attempt stopped."""
    with operator(url, home, backbone) as bank:
        operation = bank.build_gallery(
            name, source, adapter, pooling=pooling, index=index, copy_media=copy_media, key=key
        )
        _follow(bank, operation, wait=wait, as_json=as_json)


@app.command()
def rebuild(
    name: Name,
    adapter: Annotated[str | None, typer.Option(help="Default: what the alias it follows names now.")] = None,
    key: Key = None,
    wait: Wait = True,
    url: Url = None,
    home: Home = None,
    backbone: Backbone = None,
    as_json: AsJson = False,
) -> None:
    """Embed what a gallery holds anew, and make that live."""
    with operator(url, home, backbone) as bank:
        _follow(bank, bank.rebuild_gallery(name, adapter=adapter, key=key), wait=wait, as_json=as_json)


@app.command("list")
def list_galleries(url: Url = None, home: Home = None, as_json: AsJson = False) -> None:
    """List galleries and their versions."""
    with operator(url, home) as bank:
        rows = [
            {
                "name": gallery.name,
                "version": version.version,
                "live": version.live,
                "adapter": version.adapter,
                "adapter_version": version.adapter_version,
                "follows": gallery.follows if version.live else None,
                "status": version.status,
            }
            for gallery in bank.galleries()
            for version in gallery.history
        ]
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        number = "" if row["adapter_version"] is None else f"@{row['adapter_version']}"
        follows = "" if row["follows"] is None else f", follows {row['follows']}"
        live = f"  live{follows}" if row["live"] else ""
        print("{name} v{version}  {status}  {adapter}".format(**row) + number + live)


@app.command()
def delete(
    name: Name,
    version: Annotated[int | None, typer.Option(help="Only this version, which must not be live.", min=1)] = None,
    expect: Annotated[
        int | None, typer.Option(help="The version that must be live now. Otherwise nothing is done.", min=1)
    ] = None,
    reason: Reason = None,
    url: Url = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Give a gallery up, or one version of it. Searches under way finish; files go after a day."""
    with operator(url, home) as bank:
        if version is None:
            deleted = bank.delete_gallery(name, expect=expect, reason=reason)
        else:
            deleted = bank.delete_gallery_version(name, version, reason=reason)
        numbers = ", ".join(f"v{number}" for number in deleted.versions)
        show(deleted, as_json, lambda: f"deleted {deleted.name} {numbers}")


def _follow(bank: "Client | LocalOperator", operation: "OperationReply", *, wait: bool, as_json: bool) -> None:
    """Show an operation; with `wait` its end, and what is live then."""
    ended = follow(bank, operation, wait=wait, as_json=as_json, timeout_s=WAIT_S, is_quiet=wait)
    if as_json or ended.status != "succeeded":
        return
    gallery = bank.gallery(ended.subject)
    if gallery.version != ended.to_version:
        print(f"{gallery.name} version {ended.to_version} went live, and version {gallery.version} since")
        return
    print(f"{gallery.name} version {gallery.version} is live: {gallery.embedding_key}")
    if gallery.num_quarantined:
        total = gallery.num_items + gallery.num_quarantined
        print(f"left out: {gallery.num_quarantined} of {total}; see quarantine.jsonl in the version's folder")
