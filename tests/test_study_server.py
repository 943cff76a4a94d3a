"""The pages of a study: what the server answers, whatever it is sent and whenever it is killed."""

from __future__ import annotations

import http.client
import json
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from studies import Server, answers_of, ask, asked, join, send, served, served_in_a_hurry, study_in

import spade_fast as sf
from spade_fast import study
from spade_fast.files import held_file
from spade_fast.study.journal import ANSWERS, Journal


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that many tests ask."""
    folder = tmp_path_factory.mktemp("study")
    study_in(folder)
    with served(folder) as server:
        yield server


# What is asked and answered


def test_a_session_without_a_browser(tmp_path: Path) -> None:
    opened = study_in(tmp_path, tasks=3, checks=1)
    with served(tmp_path) as server:
        place = join(server.address)
        code = place.removeprefix("/p/")
        assert re.fullmatch("[2-9A-HJ-NP-Z]{8}", code)
        for number in range(4):
            status, headers, text = ask(server.address, "GET", place)
            assert (status, headers["cache-control"]) == (200, "no-store")
            assert f"Question {number + 1} of 4" in text
            media = re.findall(r"/media/([0-9a-f]{64}\.png)", text)
            assert len(media) == 4
            for medium in media:
                status, headers, _ = ask(server.address, "GET", f"/media/{medium}")
                assert (status, headers["content-type"]) == (200, "image/png")
            # The page shows what is asked, in this order: visualization, photograph, left patch, right patch.
            question = Journal(tmp_path / ANSWERS, opened).participants[code].joined.questions[number]
            task = opened.bundle.tasks[question.task]
            left, right = (task.high, task.low) if question.left == "high" else (task.low, task.high)
            shown = {"dense": task.dense, "spade": task.spade, "high": task.high.medium, "low": task.low.medium}
            assert media == [shown[question.shown], task.photo, left.medium, right.medium]
            assert send(server.address, place, number, ("left", "right", "undecided")[number % 3]) == 303
        assert asked(server.address, place) is None
        # By its code, however it is typed.
        status, headers, _ = ask(server.address, "POST", "/resume", f"code={code[:4].lower()}-{code[4:]}")
        assert (status, headers["location"]) == (303, place)
    kept = [json.loads(line) for line in (tmp_path / ANSWERS).read_text().splitlines()]
    assert [line["kind"] for line in kept] == ["joined", *["answer"] * 4]
    assert [line["choice"] for line in kept[1:]] == ["left", "right", "undecided", "left"]
    # Nothing that could tell who it was.
    assert set(kept[0]) == {"kind", "participant", "study", "number", "simulated", "questions"}
    assert set(kept[1]) == {"kind", "participant", "question", "choice", "milliseconds"}


def test_nothing_tells_which_patch_is_which_or_whose_the_visualization_is(site: Server) -> None:
    text = ask(site.address, "GET", join(site.address))[2]
    for word in ("high", "low", "dense", "spade", "trace", "score", "task", "check", "class 0", r"\.png\w"):
        assert re.search(rf"\b{word}\b", text, re.IGNORECASE) is None, word


def test_answers_that_come_twice_late_or_early_change_nothing(site: Server) -> None:
    place = join(site.address)
    assert send(site.address, place, 1, "left") == 303
    assert asked(site.address, place) == 0
    for _ in range(3):
        assert send(site.address, place, 0, "left") == 303
    assert asked(site.address, place) == 1


# What it is not meant to be sent


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/p/AAAAAAAA",
        "/p/",
        "/media/../study.json",
        "/media/%2e%2e/study.json",
        "/media/..%2fstudy.json",
        "/media/" + "0" * 64 + ".png",
        "/media//etc/passwd",
        "/study.json",
        "/answers.jsonl",
        "/../../etc/passwd",
    ],
)
def test_no_other_path_is_served(site: Server, path: str) -> None:
    status, headers, text = ask(site.address, "GET", path)
    assert status == 404
    assert headers["content-type"].startswith("text/html")
    assert "That did not work" in text
    assert "tasks" not in text


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("", "question=0&choice=up", 400),
        ("", "question=-1&choice=left", 400),
        ("", "question=1e3&choice=left", 400),
        ("", "choice=left", 400),
        ("", "question=0", 400),
        ("", b"\xff\xfe=\x00", 400),
        ("", "&".join(f"f{i}=1" for i in range(50)), 400),
        ("", "question=0&choice=left&more=" + "x" * 5000, 413),
        ("X", "question=0&choice=left", 404),
    ],
)
def test_forms_that_are_no_answers_are_refused(site: Server, path: str, body: Any, status: int) -> None:
    place = join(site.address)
    found, _, text = ask(site.address, "POST", place + path, body)
    assert found == status
    assert "That did not work" in text
    assert asked(site.address, place) == 0


@pytest.mark.parametrize("sent", ["-5", "1.5", "x", "9" * 11, "9" * 300])
def test_times_that_cannot_be_are_left_out(tmp_path: Path, sent: str) -> None:
    study_in(tmp_path)
    with served(tmp_path) as server:
        place = join(server.address)
        assert ask(server.address, "POST", place, f"question=0&choice=left&milliseconds={sent}")[0] == 303
    assert answers_of(tmp_path)[-1]["milliseconds"] is None


def test_names_from_elsewhere_are_shown_as_text(site: Server) -> None:
    status, _, text = ask(site.address, "POST", "/resume", "code=%3Cscript%3Ealert(1)%3C/script%3E")
    assert status == 404
    assert "&lt;script&gt;alert(1)" in text
    assert "<script>alert" not in text


def test_other_methods_are_refused(site: Server) -> None:
    for method, path in (("PUT", "/"), ("POST", "/"), ("DELETE", "/join"), ("GET", "/join")):
        assert ask(site.address, method, path)[0] in (404, 405)


def test_pages_of_other_sites_reach_nothing(site: Server) -> None:
    assert ask(site.address, "GET", "/", headers={"host": "evil.example"})[0] == 421
    assert ask(site.address, "GET", "/", headers={"host": "[::1"})[0] == 421
    assert ask(site.address, "POST", "/join", headers={"origin": "https://evil.example"})[0] == 421
    assert ask(site.address, "POST", "/join", headers={"origin": "null"})[0] == 421
    assert ask(site.address, "POST", "/join", headers={"origin": f"http://{site.address}"})[0] == 303
    port = site.address.rpartition(":")[2]
    for name in ("localhost", "LOCALHOST", "[::1]", "127.0.0.2"):
        assert ask(site.address, "GET", "/", headers={"host": f"{name}:{port}"})[0] == 200
    for origin in ("http://[", "http://localhost.evil.example", "nonsense"):
        status, headers, _ = ask(site.address, "POST", "/join", headers={"origin": origin})
        assert status == 421
        assert "content-security-policy" in headers


def test_a_proxy_before_it_is_let_in_by_the_name_that_was_given(tmp_path: Path) -> None:
    study_in(tmp_path)
    with served(tmp_path, public_name="Study.example") as server:
        proxied = {"host": "study.example", "origin": "https://study.example"}
        assert ask(server.address, "POST", "/join", headers=proxied)[0] == 303
        rewritten = {"host": server.address, "origin": "https://study.example"}
        assert ask(server.address, "POST", "/join", headers=rewritten)[0] == 303
        assert ask(server.address, "POST", "/join", headers={**proxied, "origin": "https://evil.example"})[0] == 421
        assert ask(server.address, "GET", "/", headers={"host": "evil.example"})[0] == 421


def test_a_server_for_the_network_is_asked_by_any_name_but_not_by_pages_of_other_sites(tmp_path: Path) -> None:
    study_in(tmp_path)
    with served(tmp_path, host="0.0.0.0") as server:
        port = server.address.rpartition(":")[2]
        assert server.address == f"{socket.gethostname()}:{port}"
        there = f"127.0.0.1:{port}"
        assert ask(there, "GET", "/", headers={"host": "lab-machine"})[0] == 200
        assert ask(there, "POST", "/join", headers={"host": "lab-machine", "origin": "http://lab-machine"})[0] == 303
        assert ask(there, "POST", "/join", headers={"host": "lab-machine", "origin": "http://evil"})[0] == 421


def test_connections_that_say_nothing_are_closed(tmp_path: Path) -> None:
    study_in(tmp_path)
    with served_in_a_hurry(tmp_path) as server:
        host, port = server.address.split(":")
        place = join(server.address)
        openings = (b"", b"GET / HTTP/1.1\r\nhost: loc", f"POST {place} HTTP/1.1\r\nhost: localhost\r\n".encode())
        openings += (openings[2] + b"content-length: 99\r\n\r\nquestion=0",)
        sockets = [socket.create_connection((host, int(port)), timeout=20) for _ in openings]
        for each, opening in zip(sockets, openings, strict=True):
            each.sendall(opening)
        answers = [read_to_the_end(each) for each in sockets]
        assert answers[:3] == [b"", b"", b""]
        assert answers[3] == b"" or answers[3].startswith(b"HTTP/1.1 408 ")
        assert asked(server.address, place) == 0


def read_to_the_end(connection: socket.socket) -> bytes:
    """What comes until the other side closes, which it must do."""
    with connection:
        found = b""
        while part := connection.recv(4096):
            found += part
        return found


def test_every_answer_forbids_what_pages_do_not_need(site: Server) -> None:
    for path in ("/", "/study.css", "/nothing", "/media/x"):
        _, headers, _ = ask(site.address, "GET", path)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "set-cookie" not in headers
        assert "server" not in headers


def test_large_headers_and_endless_bodies_are_cut_off(site: Server) -> None:
    host, port = site.address.split(":")
    for sent in (
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 200_000,
        b"POST /join HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n" + b"1000\r\n" + b"z" * 4096,
        b"no http at all\r\n\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=20) as raw:
            try:
                raw.sendall(sent)
                answer = raw.recv(4096)
            except ConnectionError:  # cut off before all was sent
                continue
            assert re.match(rb"HTTP/1\.1 4\d\d ", answer), answer
    assert ask(site.address, "GET", "/")[0] == 200


def test_a_study_that_is_full_lets_nobody_else_in(tmp_path: Path) -> None:
    study_in(tmp_path)
    with served(tmp_path, most_participants=1) as server:
        place = join(server.address)
        status, _, text = ask(server.address, "POST", "/join")
        assert status == 403
        assert "all the participants it needs" in text
        assert "Begin" not in ask(server.address, "GET", "/")[2]
        assert send(server.address, place, 0, "left") == 303
    assert len(answers_of(tmp_path)) == 1


def test_what_cannot_be_saved_is_said_and_can_be_sent_again(tmp_path: Path) -> None:
    study_in(tmp_path)
    with served(tmp_path) as server:
        place = join(server.address)
        (tmp_path / ANSWERS).rename(tmp_path / "away")
        (tmp_path / ANSWERS).mkdir()
        status, _, text = ask(server.address, "POST", place, "question=0&choice=left")
        assert status == 500
        assert "could not be saved" in text
        assert str(tmp_path) not in text
        (tmp_path / ANSWERS).rmdir()
        (tmp_path / "away").rename(tmp_path / ANSWERS)
        assert asked(server.address, place) == 0
        assert send(server.address, place, 0, "right") == 303
    assert answers_of(tmp_path)[-1]["choice"] == "right"


# Who can listen where


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"port": 70000}, "port must be within 0..65535"),
        ({"port": -1}, "port must be"),
        ({"host": "no.such.host.invalid"}, "cannot listen at 'no.such.host.invalid'"),
        ({"host": "203.0.113.7"}, "cannot listen at '203.0.113.7'"),
        ({"host": 5}, "host must be an address, got 5"),
        ({"host": ""}, "host must be an address, got ''"),
        ({"most_participants": 0}, "most_participants must be"),
        ({"answers": "/proc/nothing/answers.jsonl"}, "cannot write to '/proc/nothing"),
    ],
)
def test_servers_that_cannot_start_say_why(tmp_path: Path, wrong: Any, message: str) -> None:
    study_in(tmp_path)
    with pytest.raises(sf.InvalidInputError, match=message):
        study.serve(tmp_path, **wrong)


def test_a_port_or_answers_that_are_in_use_are_refused(site: Server, tmp_path: Path) -> None:
    study_in(tmp_path)
    with pytest.raises(sf.InvalidInputError, match="cannot listen at '127.0.0.1', port"):
        study.serve(tmp_path, port=int(site.address.rpartition(":")[2]))
    with held_file(tmp_path / ANSWERS), pytest.raises(sf.InvalidInputError, match="another run writes to"):
        study.serve(tmp_path, port=0)


# Kills


def test_no_acknowledged_answer_is_lost_by_kills_at_twenty_random_moments(tmp_path: Path) -> None:
    study_in(tmp_path, tasks=30, checks=3)
    chance = random.Random(0)
    # What each of two people was told was saved: the answers, by the address of the questions.
    acknowledged: list[dict[str, dict[int, str]]] = [{}, {}]

    def take_part(address: str, person: int, seed: int) -> None:
        """Answer until the server is gone, as a new participant or by an old code."""
        own, mine = random.Random(seed), acknowledged[person]
        try:
            while True:
                place = own.choice([*mine, None])
                place = join(address) if place is None else place
                given = mine.setdefault(place, {})
                while (number := asked(address, place)) is not None:
                    assert not given.keys() & set(range(number, 100))
                    choice = own.choice(("left", "right", "undecided"))
                    assert send(address, place, number, choice) == 303
                    given[number] = choice
        except (OSError, http.client.HTTPException):
            return

    for kill in range(20):
        server = Server(tmp_path)
        people = [threading.Thread(target=take_part, args=(server.address, who, 2 * kill + who)) for who in (0, 1)]
        for person in people:
            person.start()
        time.sleep(chance.uniform(0.01, 0.4))
        assert server.process.is_alive()
        server.kill()
        for person in people:
            person.join()
        kept = {(line["participant"], line["question"]): line["choice"] for line in answers_of(tmp_path)}
        for places in acknowledged:
            for place, given in places.items():
                for number, choice in given.items():
                    assert kept[place.removeprefix("/p/"), number] == choice
    assert sum(len(given) for places in acknowledged for given in places.values()) > 40
