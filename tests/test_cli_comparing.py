"""``spade-fast compare``: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_trace_comparison import planted_store
from typer.testing import CliRunner, Result

import spade_fast as sf
from spade_fast import cli

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return planted_store(tmp_path).path


def compare(store: Path, *more: object, columns: int = 250) -> Result:
    command = ["compare", store, "--out", store.parent / "out", *more]
    result = CliRunner(env={"COLUMNS": str(columns)}).invoke(cli.app, [str(each) for each in command])
    if result.exit_code == 1:
        raise result.exception or AssertionError(result.output)
    return result


def test_tables_of_a_set(store: Path) -> None:
    result = compare(store, "--by", "kind", "--set", "odd")
    assert result.exit_code == 0
    found = sf.compare(store, by="kind", value="odd")
    words = [line.split() for line in result.stdout.splitlines()]
    for row in found.layer_rows():
        numbers = [f"{each:.3f}" for each in (*row["overlap"].values(), row["auc"], row["auc_by_size"])]
        assert [*row["layer"].split(), str(row["weights"]), f"{100 * row['kept']:.1f}", "%", *numbers] in words
    separation = found.separations["odd"]
    low, high = separation.interval
    assert ["odd", f"{separation.auc:.3f}", f"{low:.3f}", "to", f"{high:.3f}"] in [line[:5] for line in words]
    assert "8 connections that 90 % of the set keep and at most 10 % of the rest, such as" in result.stdout
    assert ["conv", "2", "0", "0,1", "100", "%", "0", "%"] in words
    assert ["head.fc", "output", "3", "5", "16"] in words
    clusters = [line for line in words if line[:1] in ([str(i)] for i in range(found.clusters.count))]
    assert sum(int(line[1]) for line in clusters) == 12
    written = re.findall(r"written: (.*)", result.stdout)
    tables = ["images.csv", "layers.csv", "connections.csv", "channels.csv"]
    assert [Path(path).name for path in written] == ["overlap.png", "overlap.safetensors", *tables, "overlap.json"]
    assert Path(written[0]).read_bytes()[:4] == b"\x89PNG"


def test_json_is_the_only_thing_on_stdout(store: Path) -> None:
    sets = ("--by", "kind", "--set", "odd", "--set", "even", "--apart", "photograph", "--least", 0.8, "--most", 0.3)
    more = ("--limit", 11, "--layers", "conv,head", "--clusters", 3, "--seed", 4)
    result = compare(store, *sets, *more, "--json")
    document = json.loads(result.stdout)
    files = document.pop("files")
    found = sf.compare(store, by="kind", value=["odd", "even"], least=0.8, most=0.3, limit=11, layers=["conv", "head"],
                       count=3, seed=4, apart="photograph")  # fmt: skip
    assert document == json.loads(json.dumps(found.report()))
    assert document["settings"] == {
        "by": "kind", "value": ["odd", "even"], "apart": "photograph", "names": None, "layers": ["conv", "head"],
        "limit": 11, "clusters": 3, "least": 0.8, "most": 0.3, "seed": 4,
    }  # fmt: skip
    assert set(files) == {path.name for path in (store.parent / "out").iterdir()}


def test_without_a_set(store: Path) -> None:
    result = compare(store, "--by", "kind")
    words = [line.split()[:1] for line in result.stdout.splitlines()]
    assert [name for name in ("odd", "even", "plain") if [name] in words] == ["odd", "even", "plain"]
    assert "connections" not in result.stdout
    result = compare(store)
    assert "Told from all others" not in result.stdout
    assert "Mean overlap of 12 traces" in result.stdout
    assert "hardly any clusters" in result.stderr  # of random masks


def test_a_narrow_terminal_cuts_no_figure(store: Path) -> None:
    result = compare(store, "--by", "kind", "--set", "odd", columns=60)
    assert "\N{HORIZONTAL ELLIPSIS}" not in result.stdout
    for row in sf.compare(store, by="kind", value="odd").layer_rows():
        assert f"{row['overlap']['between']:.3f}" in result.stdout


def test_nothing_distinctive(store: Path) -> None:
    result = compare(store, "--by", "kind", "--set", "even", "--least", 1, "--most", 0)
    assert result.exit_code == 0
    assert "0 connections that 100 % of the set keep and at most 0 % of the rest" in result.stdout


def test_refusals(store: Path, tmp_path: Path) -> None:
    for more, message in (
        (("--by", "knid"), "no image has a label 'knid'; nearest: 'kind'"),
        (("--by", "kind", "--set", "od"), "no image has kind 'od'; nearest: 'odd'"),
        (("--set", "odd"), "--set 'odd' is a value of what. pass --by LABEL as well"),
        (("--layers", ""), "no trace has a pruned layer or block ''"),
        (("--limit", 1), "--limit must be a whole number of at least 2, got 1"),
        (("--clusters", 0), "--clusters must be a whole number of at least 1, got 0"),
        (("--layers", "cnov"), "no trace has a pruned layer or block 'cnov'; nearest: 'conv'"),
        (("--out", store / "images"), "is in the store, which holds images only: choose another folder"),
        (("--least", 2), "least must be a share of images within 0..1, got 2.0"),
        (("--least", "nan"), "least must be a share of images within 0..1, got nan"),
        (("--seed", -1), "seed must be a whole number of at least 0, got -1"),
    ):
        result = compare(store, *more)
        assert result.exit_code == 2, more
        assert result.stdout == ""
        assert re.search(message, " ".join(result.stderr.split())), result.stderr
    result = compare(tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "is no store" in result.stderr
