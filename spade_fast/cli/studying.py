"""``spade-fast study build | serve | simulate | score | forget``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from spade_fast.cli.shared import (
    Arch,
    AsJson,
    Checkpoint,
    Damping,
    Device,
    Group,
    ModelName,
    NumClasses,
    SolverName,
    SparsityText,
    ViewKind,
    Views,
    open_network,
    print_json,
    read_network,
    read_sparsity,
    read_views,
    say,
    say_each,
    shown,
)
from spade_fast.errors import require
from spade_fast.solver import check_rules

if TYPE_CHECKING:
    from spade_fast.study.journal import Journal
    from spade_fast.study.scoring import GroupScore

study = typer.Typer(
    cls=Group,
    name="study",
    help="Ask people which patch made the network decide, as in Table 3 of the SPADE paper.",
    no_args_is_help=True,
)

_WIDTH = 120  # of tables that go to a file

Folder = Annotated[Path, typer.Argument(help="The study's folder, as build wrote it.", show_default=False)]
Answers = Annotated[Path | None, typer.Option(help="File of the answers.", show_default="answers.jsonl in the folder")]


@study.command()
def build(
    images: Annotated[
        str, typer.Argument(help="Folder of images, or a manifest: .csv or .parquet.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The study: a new folder, or one to go on with.", show_default=False)],
    limit: Annotated[int | None, typer.Option(help="Tasks, of images chosen by chance.", show_default="all")] = None,
    checks: Annotated[int, typer.Option(help="Questions that anybody can answer who looks.")] = 4,
    patch: Annotated[float, typer.Option(help="Side of a patch, as a share of the image's: at most a third.")] = 0.3,
    steps: Annotated[int, typer.Option(help="Of gradient ascent for each visualization.")] = 512,
    model: ModelName = None,
    arch: Arch = None,
    checkpoint: Checkpoint = None,
    num_classes: NumClasses = None,
    sparsity: SparsityText = "default",
    num_augmentations: Views = 64,
    views: ViewKind = "published",
    damping: Damping = 0.01,
    solver: SolverName = "fast",
    root: Annotated[
        Path | None, typer.Option(help="Folder that a manifest's images are in.", show_default="the manifest's")
    ] = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make the tasks of a study; a build that was cut short goes on when it is started again."""
    from spade_fast.imagesets import listed_images

    check_rules(damping=damping, solver=solver, block_layout="taps")
    plan = read_sparsity(sparsity)
    listed_images(images, root=root)
    require("captum.attr", "interpret")
    require("lucent", "visualize")
    from spade_fast import study as studies
    from spade_fast.study.building import check_numbers

    check_numbers(limit=limit, checks=checks, patch=patch, steps=steps, seed=seed)
    network = open_network(read_network(model, arch, checkpoint, num_classes), device)
    settings: dict[str, Any] = {
        "num_augmentations": num_augmentations,
        "augment": read_views(views, network),
        "damping": damping,
        "solver": solver,
    }
    bundle = studies.build(
        network,
        images,
        out,
        plan,
        limit=limit,
        checks=checks,
        patch=patch,
        steps=steps,
        seed=seed,
        root=root,
        progress=sys.stderr.isatty(),
        **settings,
    )
    if as_json:
        print_json({"tasks": len(bundle.tasks), "checks": bundle.checks, "refused": bundle.refused, "study": str(out)})
        return
    say_each("refused", bundle.refused, "study.json")
    told = f"{len(bundle.tasks)} tasks, {bundle.checks} checks, {len(bundle.refused)} images refused"
    _print(f"{told}\nwritten: {shown(str(out))}")


@study.command()
def serve(
    folder: Folder,
    answers: Answers = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets in the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for any that is free.")] = 8765,
    public_name: Annotated[
        str | None, typer.Option(help="Name by which a proxy before it is reached.", show_default=False)
    ] = None,
    most_participants: Annotated[int, typer.Option(help="When so many have come, nobody else is let in.")] = 1000,
) -> None:
    """Put the questions to people, by their browsers, until Ctrl-C; no answer is lost, however the server ends."""
    from spade_fast import study as studies

    if not studies.serving.is_local(host):
        say(f"[yellow]warning:[/] whoever can reach {shown(host)} can take part, and what they send is not encrypted")
    journal = studies.serve(
        folder,
        answers,
        host=host,
        port=port,
        public_name=public_name,
        most_participants=most_participants,
        started=lambda address: _print(f"{address}  (Ctrl-C ends)"),
    )
    _print_answers(journal)


@study.command()
def simulate(
    folder: Folder,
    answers: Answers = None,
    participants: Annotated[int, typer.Option(help="Two see each image by both networks; more tell nothing new.")] = 2,
    margin: Annotated[float, typer.Option(help="Undecided where the two similarities differ by less.")] = 0.02,
    model: Annotated[
        str | None,
        typer.Option(
            help="A network that the study is not about, whose features are compared.", show_default="untrained filters"
        ),
    ] = None,
    arch: Arch = None,
    checkpoint: Checkpoint = None,
    num_classes: NumClasses = None,
    device: Device = None,
) -> None:
    """Have a program answer, by how alike visualization and patches are; its answers are called simulated."""
    from spade_fast import study as studies

    network = None
    if model is not None or arch is not None or checkpoint is not None or num_classes is not None:
        network = open_network(read_network(model, arch, checkpoint, num_classes), device)
    journal = studies.simulate(folder, answers, model=network, participants=participants, margin=margin)
    _print_answers(journal)


@study.command()
def forget(
    folder: Folder,
    code: Annotated[str, typer.Argument(help="Of the participant.", show_default=False)],
    answers: Answers = None,
) -> None:
    """Delete a participant and all of his or her answers, while nobody serves the study."""
    from spade_fast import study as studies

    studies.forget(folder, code, answers)
    _print(f"{shown(code)} is forgotten")


@study.command()
def score(
    folder: Folder,
    answers: Answers = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for answers.csv, tables.md and score.json.", show_default="none")
    ] = None,
    least_checks: Annotated[float, typer.Option(help="Share of the checks that a participant must have right.")] = 0.75,
    seed: Annotated[int, typer.Option(help="Of the bootstrap samples.")] = 0,
    as_json: AsJson = False,
) -> None:
    """How often is the patch that Score-CAM ranks highest taken? The rows of Table 3, by network, with intervals."""
    from spade_fast import study as studies

    found = studies.score(folder, answers, least_checks=least_checks, seed=seed)
    files = {} if out is None else found.save(out)
    if as_json:
        print_json({**found.summary(), "files": {name: str(path) for name, path in files.items()}})
        return
    for group in found.groups:
        _print_group(group)
    for path in files.values():
        _print(f"written: {shown(str(path))}")


def _print_group(group: GroupScore) -> None:
    head, *rows = group.table()
    table = Table(title=shown(group.group), title_justify="left")
    for column in head:
        table.add_column(column, justify="right" if table.columns else "left")
    for cells in rows:
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)
    _print(group.told())
    for code, reason in group.excluded.items():
        say(f"[yellow]excluded:[/] {shown(code)}: {shown(reason)}")


def _print_answers(journal: Journal) -> None:
    answers = sum(len(participant.answers) for participant in journal.participants.values())
    counts = [
        f"{count} {what}{'' if count == 1 else 's'}"
        for count, what in ((len(journal.participants), "participant"), (answers, "answer"))
    ]
    _print(f"{', '.join(counts)} in {shown(str(journal.path))}")


def _print(markup: str) -> None:
    Console().print(markup, soft_wrap=True, highlight=False)
