"""The command line: serve, import, deploy, galleries, keys, the demo. Settings come from BANK_* variables and flags."""

import asyncio
import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from adapters.errors import AdapterBankError
from service import deploy_commands, gallery_commands, logs, train_commands
from service.config import Settings

log = logging.getLogger("service.cli")  # as a program its name is __main__

app = typer.Typer(
    help="Serve many adapters from one frozen vision-language backbone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
import_app = typer.Typer(help="Turn other people's weights into ours.", no_args_is_help=True)
key_app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)
demo_app = typer.Typer(help="Sample and evaluate the drawn demo world.", no_args_is_help=True)
app.add_typer(deploy_commands.app)
app.add_typer(import_app, name="import")
app.add_typer(train_commands.app)
app.add_typer(gallery_commands.app, name="gallery")
app.add_typer(key_app, name="key")
app.add_typer(demo_app, name="demo")

Home = Annotated[Path | None, typer.Option("--home", help="State folder; default BANK_HOME.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def main() -> None:
    """Run a command; a domain error, or one of the system, becomes one line and exit status 1."""
    logs.configure()
    try:
        app()
    except AdapterBankError as error:
        param = f" [{error.param}]" if error.param else ""
        _give_up(f"{error.message}{param}")
    except OSError as error:  # a full disk, a folder that may not be written
        _give_up(str(error))


def _give_up(reason: str) -> NoReturn:
    if logs.are_json():
        log.critical("%s", reason)
    else:
        print(f"error: {reason}", file=sys.stderr)
    sys.exit(1)


# --- serve -------------------------------------------------------------------------------------------------


@app.command()
def serve(
    demo: Annotated[bool, typer.Option("--demo", help="Serve the trained demo from HOME/demo.")] = False,
    home: Home = None,
    backbone: Annotated[Path | None, typer.Option(help="Backbone folder; default HOME/backbone.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to bind; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind; default 8000.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or auto.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    slots: Annotated[str | None, typer.Option(help='Adapter slots by rank, e.g. "64:24,128:6,512:2".')] = None,
    allow_public: Annotated[bool | None, typer.Option(help="Bind to a public address without keys.")] = None,
    api_keys_file: Annotated[Path | None, typer.Option(help="JSON list of API keys; see `adapter-bank key`.")] = None,
    workers: Annotated[int, typer.Option(help="Always 1: see the error for more.")] = 1,
) -> None:
    """Run the HTTP service."""
    from service.http.server import run

    if workers != 1:
        raise AdapterBankError(
            "one process holds one device and one copy of the backbone; run further replicas on other ports or devices "
            "instead of --workers",
            param="workers",
        )
    settings = Settings.load(
        home=home,
        backbone=backbone,
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        slots=slots,
        allow_public=allow_public,
        api_keys_file=api_keys_file,
    )
    logs.configure(as_json=settings.log_format == "json", level=settings.log_level)
    if demo:
        from service.demo.install import demo_settings, install

        settings = demo_settings(settings)
        asyncio.run(install(settings, log.info if logs.are_json() else partial(print, flush=True)))
    if logs.are_json():
        run(settings, announce=_log_url)
    else:
        run(settings, announce=_announce_demo if demo else _announce)


def _log_url(url: str, settings: Settings) -> None:
    keys = logs.event("serving", url=url, home=str(settings.home))
    log.info("adapter-bank on %s, home %s", url, settings.home, extra=keys)


def _announce(url: str, settings: Settings) -> None:
    print(f"adapter-bank on {url}  (console: {url}/ , API: {url}/docs), home {settings.home}", flush=True)


def _announce_demo(url: str, settings: Settings) -> None:
    from service.demo.install import curl_lines

    print(f"\nadapter-bank demo on {url}  (console: {url}/ , API: {url}/docs)\n")
    print("Ask about a picture, search clips with a sentence, and put a sound into words:\n")
    for line in curl_lines(url, settings):
        print(f"  {line}\n")
    sys.stdout.flush()


# --- import ------------------------------------------------------------------------------------------------


@import_app.command("backbone")
def import_backbone(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Hugging Face folder or hub id, or an authors' .pth. Several BLIPs are merged; an OPT goes with its encoders."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    num_heads: Annotated[int | None, typer.Option(help="Attention heads; cannot be read from a .pth.")] = None,
    special_ids: Annotated[
        str | None, typer.Option(help='JSON: {"pad": 0, "cls": 101, "sep": 102, "bos": 30522, "enc": 30523}')
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer folder or hub id.")] = None,
) -> None:
    """Write a backbone folder from published weights: of a BLIP, or of an OPT with a ViT, a TimeSformer and an AST."""
    from pydantic import ValidationError

    from adapters.config import describe
    from adapters.errors import ConversionError
    from service.backbone.base import Model, load_tokenizer
    from service.backbone.config import BlipConfig, SpecialIds
    from service.backbone.convert import assemble, is_blip, merge, read_source
    from service.backbone.convert_opt import assemble_opt, read_part
    from service.backbone.folder import write_backbone

    ids = None
    if special_ids is not None:
        try:
            ids = SpecialIds.model_validate_json(special_ids)
        except ValidationError as error:
            raise ConversionError(describe(error), param="special_ids") from error
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    model: Model
    if all(is_blip(source) for source in sources):
        merged = merge([read_source(source) for source in sources])
        model, used = assemble(merged, num_heads=num_heads, special_ids=ids, tokenizer=loaded)
    else:
        if num_heads is not None or ids is not None:
            raise ConversionError("--num-heads and --special-ids are for BLIPs; an OPT's folder says both")
        model, used = assemble_opt([read_part(source) for source in sources], tokenizer=loaded)
    manifest = write_backbone(out, model, used, {"sources": list(sources)})
    print(f"wrote {out}: {sum(p.numel() for p in model.parameters()):,} parameters")
    for part, digest in manifest.parts.items():
        print(f"  {part:14s} {digest}")
    if used is None:
        print("  no tokenizer: this backbone takes token ids only (give --tokenizer)")
    if isinstance(manifest.config, BlipConfig) and manifest.config.uneven_towers:
        print(f"  serves __base__ only: {manifest.config.uneven_towers}")


@import_app.command("uniadapter")
def import_uniadapter_command(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of the UniAdapter trainers.")],
    backbone: Annotated[Path, typer.Option(help="Backbone folder it was trained on.")],
    out: Annotated[Path, typer.Option(help="Package folder to write.")],
    answers: Annotated[Path | None, typer.Option(help="JSON list of candidate answers (VQA).")] = None,
) -> None:
    """Write an adapter package from a checkpoint of UniAdapter's authors."""
    from adapters.importers.checkpoint import read_checkpoint
    from adapters.importers.uniadapter import import_uniadapter
    from service.backbone.convert import check_same_backbone
    from service.backbone.folder import load_blip
    from service.lifecycle.writing import write_probed_package

    loaded = load_blip(backbone)
    imported = import_uniadapter(
        read_checkpoint(checkpoint),
        dims=loaded.dims(),
        parts=loaded.parts,
        check_backbone=lambda state: check_same_backbone(state, loaded),
        answers=_answers(answers),
        provenance={"checkpoint": checkpoint.name},
    )
    readme = f"# {checkpoint.stem}\n\nImported from a UniAdapter checkpoint for {imported.config.task}.\n"
    package = write_probed_package(out, imported.config, imported.tensors, readme, loaded)
    print(f"wrote {out}: {imported.config.task}, rank {imported.config.rank}, {package.weights_digest}")


@import_app.command("epalm")
def import_epalm_command(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of the eP-ALM trainers.")],
    backbone: Annotated[Path, typer.Option(help="Backbone folder: an OPT with the encoder it was trained with.")],
    out: Annotated[Path, typer.Option(help="Package folder to write.")],
    answers: Annotated[Path | None, typer.Option(help="JSON list of candidate answers (VQA).")] = None,
    encoder: Annotated[str | None, typer.Option(help="vit, timesformer or ast; default: by the modality.")] = None,
    task: Annotated[str | None, typer.Option(help="vqa or caption; default: by the settings.")] = None,
    resolution: Annotated[int, typer.Option(help="Of pictures and clips; the trainers' is always 224.")] = 224,
    answer_token_id: Annotated[
        int | None, typer.Option(help="Id of the settings' special_answer_token; default: by the tokenizer.")
    ] = None,
) -> None:
    """Write an adapter package from a checkpoint of eP-ALM's authors."""
    from typing import cast, get_args

    from adapters.config import Task
    from adapters.errors import ConversionError
    from adapters.families.epalm import EncoderName
    from adapters.importers.checkpoint import read_checkpoint
    from adapters.importers.epalm import import_epalm
    from service.backbone.folder import load_backbone
    from service.backbone.opt_backbone import OptBackbone
    from service.lifecycle.writing import write_probed_package

    for name, value, known in (("encoder", encoder, get_args(EncoderName)), ("task", task, ("vqa", "caption"))):
        if value is not None and value not in known:
            raise ConversionError(f"{value!r} is none of {', '.join(known)}", param=name)
    loaded = load_backbone(backbone)
    if not isinstance(loaded, OptBackbone):
        raise ConversionError(
            f"{backbone} holds a backbone of kind {loaded.architecture}, not an OPT", param="backbone"
        )
    document = read_checkpoint(checkpoint)
    if answer_token_id is None:
        answer_token_id = loaded.answer_token(document["config"].get("special_answer_token"))
    imported = import_epalm(
        document,
        dims=loaded.dims(),
        parts=loaded.parts,
        resolution=resolution,
        encoder=cast(EncoderName | None, encoder),
        task=cast(Task | None, task),
        answer_token_id=answer_token_id,
        answers=_answers(answers),
        provenance={"checkpoint": checkpoint.name},
    )
    readme = f"# {checkpoint.stem}\n\nImported from an eP-ALM checkpoint for {imported.config.task}.\n"
    package = write_probed_package(out, imported.config, imported.tensors, readme, loaded)
    print(f"wrote {out}: {imported.config.task}, {package.weights_digest}")


def _answers(path: Path | None) -> tuple[str, ...]:
    """Candidate answers from a JSON list. Raises: ConversionError."""
    from adapters.errors import ConversionError

    if path is None:
        return ()
    try:
        listed = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConversionError(f"cannot read {path}: {error}", param="answers") from error
    if not isinstance(listed, list) or not all(isinstance(answer, str) for answer in listed):
        raise ConversionError(f"{path} is no JSON list of strings", param="answers")
    return tuple(listed)


# --- keys --------------------------------------------------------------------------------------------------

KeyFile = Annotated[Path, typer.Option("--file", help="The file that BANK_API_KEYS_FILE names.")]


@key_app.command("new")
def key_new(
    key_id: Annotated[str, typer.Option("--id", help="Name of the key, for the log: who or what holds it.")],
    scopes: Annotated[str, typer.Option(help="Of infer, deploy, metrics and admin, separated by commas.")],
    adapters: Annotated[str, typer.Option(help="Patterns of adapter names it may use, separated by commas.")] = "*",
    expires: Annotated[str | None, typer.Option(help="When it stops being valid, e.g. 2030-01-01T00:00:00Z.")] = None,
    file: Annotated[Path | None, typer.Option(help="Add it to this file; without, its entry is printed.")] = None,
) -> None:
    """Make a key. It is printed this once and kept nowhere; what is kept is its hash."""
    from pydantic import ValidationError

    from adapters.config import describe
    from service.auth import InvalidKeys, KeyEntry, add_entry, digest_of, new_key

    key = new_key()
    given = {"id": key_id, "sha256": digest_of(key), "scopes": scopes.split(","), "adapters": adapters.split(",")}
    try:
        entry = KeyEntry.model_validate(given | {"expires": expires})
    except ValidationError as error:
        raise InvalidKeys(describe(error)) from error
    if file is not None:
        add_entry(file, entry)
    print(key)
    if file is None:
        print(json.dumps(entry.document(), indent=2))


@key_app.command("list")
def key_list(file: KeyFile, as_json: AsJson = False) -> None:
    """List the keys of a file: who may do what. The keys themselves are nowhere."""
    from datetime import UTC, datetime

    from service.auth import read_entries

    rows = [entry.document() | {"expired": entry.has_expired(datetime.now(UTC))} for entry in read_entries(file)]
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        until = f"  until {row['expires']}" if "expires" in row else ""
        print(
            f"{row['id']}  {','.join(row['scopes'])}  {','.join(row['adapters'])}{until}{'  expired' * row['expired']}"
        )


@key_app.command("revoke")
def key_revoke(key_id: Annotated[str, typer.Argument(help="Id of the key.")], file: KeyFile) -> None:
    """Take a key out of a file. A running server refuses it within two seconds."""
    from service.auth import remove_entry

    remove_entry(file, key_id)
    print(f"revoked {key_id}")


# --- demo --------------------------------------------------------------------------------------------------


@demo_app.command("sample")
def demo_sample(
    task: Annotated[str, typer.Option(help="A demo task, or `plain`.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    n: Annotated[int, typer.Option("--n", help="How many items.")] = 10,
) -> None:
    """Write media and items.jsonl of scenes nothing was trained on."""
    from service.demo.samples import write_samples

    print(f"wrote {write_samples(task, seed, n, out)}")


@demo_app.command("eval")
def demo_eval(
    seed: Annotated[int, typer.Option(help="Seed of the evaluation sets.")] = 0,
    n: Annotated[int, typer.Option("--n", help="Items of each task.")] = 500,
    task: Annotated[list[str] | None, typer.Option(help="Only these tasks.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the shipped demo: every adapter against the frozen backbone, with controls."""
    from service.demo.evaluate import evaluate, table

    results = evaluate(seed, n, tasks=task)
    print(json.dumps(results) if as_json else table(results))


if __name__ == "__main__":
    main()
