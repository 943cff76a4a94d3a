"""``spade-fast study``: what its commands print, write and refuse."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from studies import answers_of, join, send, small_network, study_in
from subjects import photographs
from typer.testing import CliRunner, Result

from spade_fast import cli, models
from spade_fast.study.journal import ANSWERS


def run(*arguments: object) -> Result:
    result = CliRunner(env={"COLUMNS": "250"}).invoke(cli.app, ["study", *map(str, arguments)])
    if result.exit_code == 1:
        raise result.exception or AssertionError(result.output)
    return result


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments that networks are asked for with, in whose place a small one is."""
    calls = []

    def load(name: str, **arguments: Any) -> models.LoadedModel:
        calls.append({"name": name, **arguments})
        return small_network()

    monkeypatch.setattr(models, "load_model", load)
    return calls


def test_the_whole_loop_without_people(tmp_path: Path, loads: list[dict[str, Any]]) -> None:
    pytest.importorskip("captum")
    pytest.importorskip("lucent")
    (tmp_path / "images").mkdir()
    photographs(tmp_path / "images", 4)
    (tmp_path / "images" / "broken.png").write_bytes(b"none")
    out = tmp_path / "study"
    quick = ("--steps", 1, "--num-augmentations", 4, "--sparsity", 0.5, "--views", "partial", "--seed", 3)
    result = run("build", tmp_path / "images", "--out", out, *quick, "--checks", 1)
    assert result.exit_code == 0
    assert "4 tasks, 1 checks, 1 images refused" in result.stdout
    assert f"written: {out}" in result.stdout
    assert "refused: broken.png" in result.stderr
    assert [call["name"] for call in loads] == ["efficientnet_lite0"]
    again = json.loads(run("build", tmp_path / "images", "--out", out, *quick, "--checks", 1, "--json").stdout)
    assert (again["tasks"], again["checks"], list(again["refused"])) == (4, 1, ["broken.png"])

    result = run("simulate", out, "--participants", 2)
    assert f"2 participants, 10 answers in {out / ANSWERS}" in result.stdout
    result = run("score", out, "--out", tmp_path / "score")
    assert "simulated: untrained filters, margin 0.02" in result.stdout
    told = "2 participants (2 finished; not counted: 0 excluded, 0 without an answer), 4 + 4 answers to 4 images"
    assert told in result.stdout
    assert "56.7" not in result.stdout  # the paper's are people's
    assert f"written: {tmp_path / 'score' / 'tables.md'}" in result.stdout
    found = json.loads(run("score", out, "--json").stdout)
    assert found["groups"][0]["answers"] == {"dense": 4, "spade": 4}
    assert found["files"] == {}


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_serve_tells_its_address_and_ends_when_it_is_told(tmp_path: Path, end: signal.Signals) -> None:
    study_in(tmp_path)
    command = [sys.executable, "-m", "spade_fast", "study", "serve", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        first = server.stdout.readline()
        told = re.fullmatch(r"http://(127\.0\.0\.1:\d+)/  \(Ctrl-C ends\)\n", first)
        assert told, first
        place = join(told.group(1))
        assert send(told.group(1), place, 0, "left") == 303
        # A connection that stays open does not keep it.
        connection = http.client.HTTPConnection(told.group(1))
        connection.request("GET", "/")
        connection.getresponse().read()
        server.send_signal(end)
        output, errors = server.communicate(timeout=60)
        connection.close()
    assert server.returncode == 0
    assert output == f"1 participant, 1 answer in {tmp_path / ANSWERS}\n"
    assert errors == ""
    assert [line["choice"] for line in answers_of(tmp_path)] == ["left"]
    code = place.removeprefix("/p/")
    assert f"{code} is forgotten" in run("forget", tmp_path, code).stdout
    assert answers_of(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("score", "nothing"), "cannot read 'nothing/study.json' as a study"),
        (("serve", "nothing"), "cannot read 'nothing/study.json' as a study"),
        (("simulate", "nothing"), "cannot read 'nothing/study.json' as a study"),
        (("build", "nothing", "--out", "out"), "nothing"),
        (("build", ".", "--out", "out", "--damping", "-1"), "damping"),
        (("build", ".", "--out", "out", "--sparsity", "much"), "--sparsity 'much' is neither"),
        (("score", "made"), "has no answers"),
        (("score", "made", "--least-checks", 2), "least_checks must be a share within 0..1, got 2"),
        (("score", "made", "--seed", -1), "seed must be a whole number of at least 0"),
        (("build", ".", "--out", "out", "--limit", 0), "limit must be a whole number of at least 1"),
        (("forget", "made", "ABCD"), "nobody has the code 'ABCD'"),
        (("serve", "made", "--port", 99999), "port must be within 0..65535"),
        (("simulate", "made", "--margin", -1), "margin must be"),
        (("simulate", "made", "--num-classes", 4), "--num-classes needs --arch"),
    ],
)
def test_what_cannot_be_used_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    study_in(tmp_path / "made")
    result = run(*arguments)
    assert result.exit_code == 2
    assert "error: " in result.stderr
    assert message in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_whoever_opens_it_to_the_network_is_told(tmp_path: Path) -> None:
    study_in(tmp_path)
    result = run("serve", tmp_path, "--host", "203.0.113.7")
    assert "warning: whoever can reach 203.0.113.7 can take part" in result.stderr
    assert "cannot listen at '203.0.113.7'" in result.stderr
    assert result.exit_code == 2


def test_nothing_of_a_file_reaches_the_terminal_unseen(tmp_path: Path) -> None:
    study_in(tmp_path, tasks=3, checks=0)
    run("simulate", tmp_path)
    file = tmp_path / ANSWERS
    file.write_text(file.read_text().replace("untrained filters", r"\u001b[31m[red]odd[/]"))
    output = run("score", tmp_path).stdout
    assert "\x1b[31m" not in output
    assert "[red]odd[/]" in output
