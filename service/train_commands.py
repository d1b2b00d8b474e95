"""The commands that make packages here: fine-tuning, and probes for what was made elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def train(
    backbone: Annotated[Path, typer.Option(help="Backbone folder to train for; it is not changed.")],
    task: Annotated[str, typer.Option(help="BLIP: retrieval, or vqa. OPT: vqa, or caption.")],
    data: Annotated[
        Path, typer.Option(help='JSON lines: {"file", "caption"}, or {"file", "question", "answer" or "answers"}.')
    ],
    out: Annotated[Path, typer.Option(help="Package folder to write.")],
    rank: Annotated[int | None, typer.Option(help="BLIP: width of the bottleneck; default 128.")] = None,
    kv_rank: Annotated[int | None, typer.Option(help="BLIP: width of key and value adapters; default none.")] = None,
    frame_aware: Annotated[bool | None, typer.Option(help="Clips: weigh frames by their likeness to the text.")] = None,
    heads: Annotated[bool | None, typer.Option(help="Retrieval: tune own projection and matching heads.")] = None,
    start_layer: Annotated[int | None, typer.Option(help="OPT: first layer entered; default at 19/32 of them.")] = None,
    end_layer: Annotated[int | None, typer.Option(help="OPT: layer behind the last one; default the last.")] = None,
    injected_hidden_states: Annotated[
        int | None, typer.Option(help="OPT: of the encoder's last blocks; default half as many as layers entered.")
    ] = None,
    shared_connector: Annotated[bool | None, typer.Option(help="OPT: one linear map for all of them.")] = None,
    text_step: Annotated[int | None, typer.Option(help="OPT: enter layers whose number it divides; default 1.")] = None,
    prompt_length: Annotated[int | None, typer.Option(help="OPT: tokens of the soft prompt; default 10.")] = None,
    prompt_mlp: Annotated[
        bool | None, typer.Option(help="OPT: put it through the small network (the default).")
    ] = None,
    prompt_learning_rate: Annotated[
        float | None,
        typer.Option(help="OPT: peak of the prompt's; default half of the other, without network 5 times."),
    ] = None,
    answer_token: Annotated[
        str | None, typer.Option(help="OPT: between question and answer; default </a>, '' for the end token.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; default 1000.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Lines of a step; default 16.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Its peak; default 1e-4. OPT: 2e-5, without network 2e-4.")
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option(help="Frames taken of a clip; default 8. OPT: the encoder's own.")
    ] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels a side; default the backbone's own.")] = None,
    queue_size: Annotated[int | None, typer.Option(help="Retrieval: earlier pairs as negatives; default 0.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides the start and the order; default 0.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="The run's state, to go on from; default OUT.ckpt.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; default 100.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or auto (the default).")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 (the default), or bfloat16 for the products.")] = None,
    media_workers: Annotated[int | None, typer.Option(help="Processes that decode media; default 2.")] = None,
    cache_mib: Annotated[
        int | None, typer.Option(help="Memory for media as the adapter sees them; default 2048.")
    ] = None,
) -> None:
    """Fine-tune an adapter and write its package. Started again, it goes on where it was stopped."""
    flags = dict(locals())  # every parameter, by the name of the option that it is
    from service.train import TrainOptions
    from service.train import train as run_training

    options = TrainOptions.load(**flags)
    run_training(options)
    print(f"next: adapter-bank push {out} --name NAME")


@app.command()
def probe(
    package: Annotated[Path, typer.Argument(help="Package folder.")],
    backbone: Annotated[Path, typer.Option(help="Backbone folder it was made for.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write instead; default: in place.")] = None,
) -> None:
    """Give a package made elsewhere its probe, or renew the one it has."""
    from service.backbone.folder import load_backbone
    from service.lifecycle.writing import renew_probe

    written = renew_probe(package, load_backbone(backbone), out)
    print(f"wrote {written.path}: with a probe, {written.weights_digest}")
