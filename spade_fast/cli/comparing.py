"""``spade-fast compare``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from spade_fast.cli.shared import AsJson, make_folder, print_json, say, shown
from spade_fast.errors import InvalidInputError, check_whole, require

if TYPE_CHECKING:
    from spade_fast.trace_comparison import TraceComparison

_MOST_LINES, _MOST_NAMED = 10, 4
# Headings of the mean overlaps of pairs.
_KINDS = {"inside": "set", "rest": "rest", "between": "between", "same": "same", "different": "different",
          "all": "overlap"}  # fmt: skip
# Silhouettes below it are of images that are hardly nearer to their own cluster than to the next.
_LEAST_SILHOUETTE = 0.1


def compare(
    store: Annotated[Path, typer.Argument(help="Folder that spade-fast run wrote.", show_default=False)],
    by: Annotated[
        str | None,
        typer.Option(
            help="What tells images apart: a label of the manifest; folder, of subfolders; target or answer.",
            show_default=False,
        ),
    ] = None,
    value: Annotated[
        list[str] | None,
        typer.Option("--set", help="Value of --by whose images make up the set; again for more.", show_default=False),
    ] = None,
    apart: Annotated[
        str | None,
        typer.Option(
            help="Label of the photograph that an image was made from: those of one are not compared.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers or blocks, separated by commas.", show_default="all")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Images, drawn at random.", show_default="all")] = None,
    clusters: Annotated[int | None, typer.Option(help="How many.", show_default="by their silhouettes")] = None,
    least: Annotated[float, typer.Option(help="Share of the set that keeps a distinctive connection, or more.")] = 0.9,
    most: Annotated[float, typer.Option(help="Share of the rest that keeps one, or less.")] = 0.1,
    out: Annotated[Path, typer.Option(help="Folder for figure, matrices and tables.")] = Path("comparison"),
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare the traces of a store: overlaps, clusters, and what those of a set share and the rest lack."""
    from spade_fast.trace_comparison import compare

    require("matplotlib.figure", "interpret")
    if value and by is None:
        raise InvalidInputError(f"--set {value[0]!r} is a value of what? pass --by LABEL as well")
    if clusters is not None:
        check_whole("--clusters", clusters, 1)
    if limit is not None:
        check_whole("--limit", limit, 2)
    if out.resolve().is_relative_to(store.resolve()):
        raise InvalidInputError(f"--out {str(out)!r} is in the store, which holds images only: choose another folder")
    make_folder(out)
    found = compare(
        store,
        by=by,
        value=value or None,
        apart=apart,
        layers=None if layers is None else [name.strip() for name in layers.split(",")],
        limit=limit,
        count=clusters,
        least=least,
        most=most,
        seed=seed,
        progress=sys.stderr.isatty(),
    )
    written = found.save(out)
    if as_json:
        print_json({**found.report(), "files": {name: str(path) for name, path in written.items()}})
        return
    console = Console()
    for table in (_layer_table(found), _cluster_table(found), *_separation_tables(found), *_set_tables(found)):
        console.print(table, soft_wrap=isinstance(table, str), highlight=False)
    if found.clusters.silhouette < _LEAST_SILHOUETTE:
        say("[yellow]hardly any clusters:[/] images are about as near to the next cluster as to their own")
    for path in written.values():
        console.print(f"written: {shown(str(path))}", soft_wrap=True, highlight=False)


def _layer_table(found: TraceComparison) -> Table:
    rows = found.layer_rows()
    left_dense = any(row["dense"] for row in rows)
    columns = ["layer", "weights", "kept", *(["dense"] if left_dense else []), *(_KINDS[kind] for kind in found.pairs)]
    columns += ["AUC", "by size"] if found.inside else []
    lines = []
    for row in rows:
        line = [row["layer"], f"{row['weights']:,}", f"{100 * row['kept']:.1f} %"]
        line += [str(row["dense"] or "")] if left_dense else []
        line += [_number(each) for each in row["overlap"].values()]
        lines.append([*line, _number(row["auc"]), _number(row["auc_by_size"])] if found.inside else line)
    return _table(f"Mean overlap of {len(found.overlaps.images)} traces", columns, lines, left=1)


def _cluster_table(found: TraceComparison) -> Table:
    lines = []
    for row in found.cluster_rows():
        names = [*row["images"][:_MOST_NAMED], *(["..."] if len(row["images"]) > _MOST_NAMED else [])]
        values = [f"{count} {value or '(none)'}" for value, count in row["values"].items()]
        values = [*values[:_MOST_NAMED], *(["..."] if len(values) > _MOST_NAMED else [])]
        cells = [str(row["cluster"]), str(len(row["images"])), _number(row["overlap"])]
        lines.append([*cells, *([", ".join(values)] if found.values else []), ", ".join(names)])
    columns = ["cluster", "images", "overlap", *([str(found.settings["by"])] if found.values else []), "such as"]
    return _table("Clusters", columns, lines, left=0, right=3)


def _separation_tables(found: TraceComparison) -> list[Table]:
    lines = [
        [name or "(none)", f"{each.auc:.3f}", _range(each.interval), _range(each.random), f"{each.by_chance:.3f}"]
        for name, each in found.separations.items()
    ]
    columns = ["set", "AUC", "95 % interval", "of random sets", "by chance"]
    return [_table("Told from all others by overlaps alone", columns, lines, left=1)] if lines else []


def _set_tables(found: TraceComparison) -> list[str | Table]:
    if found.distinctive is None:
        return []
    least, most = (f"{100 * share:g} %" for share in (found.distinctive.least, found.distinctive.most))
    told = f"{found.distinctive.count:,} connections that {least} of the set keep and at most {most} of the rest"
    connections = [
        [*_place(row), f"{100 * row['inside']:.0f} %", f"{100 * row['outside']:.0f} %"]
        for row in found.distinctive.connections(_MOST_LINES)
    ]
    channels = [
        [row["layer"], f"{row['side']} {row['channel']}", str(row["connections"]), str(row["weights"])]
        for row in found.distinctive.channels(_MOST_LINES)
    ]
    if not connections:
        return [told]
    return [
        f"{told}, such as",
        _table(None, ["layer", "output", "input", "tap", "set", "rest"], connections, left=1),
        _table("Channels with most of them", ["layer", "channel", "connections", "weights"], channels, left=1),
    ]


def _place(row: Mapping[str, Any]) -> list[str]:
    return [row["layer"], str(row["output"]), str(row["input"]), ",".join(map(str, row["tap"]))]


def _range(limits: tuple[float, float]) -> str:
    return f"{limits[0]:.3f} to {limits[1]:.3f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(
    title: str | None, columns: Sequence[str], lines: Sequence[Sequence[str]], *, left: int, right: int = 99
) -> Table:
    """A table whose columns from `left` to `right` are of numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for place, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if left <= place < right else "left"
        table.add_column(shown(column), justify=justify, overflow="fold")
    for line in lines:
        table.add_row(*map(shown, line))
    return table
