"""Whole sessions of a study in Chromium, by keyboard, mouse and touch, on a screen and on a phone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accessibility import serious_findings
from studies import Server, served, study_in

from spade_fast import study
from spade_fast.study.journal import ANSWERS, Journal, Participant


class Visitor:
    """A participant in a browser window of its own, in which nothing may go wrong."""

    def __init__(self, browser: Any, server: Server, **window: Any) -> None:
        self.has_script = window.get("java_script_enabled", True)
        self.context = browser.new_context(base_url=server.url, **window)
        self.page = self.context.new_page()
        self.troubles: list[str] = []
        self.page.on("console", lambda message: self._note(message.text))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("request", lambda request: self._check(request.url, server))

    def _note(self, text: str) -> None:
        if "net::ERR_CONNECTION" not in text:  # to a server that has ended, as it does in every test
            self.troubles.append(text)

    def _check(self, url: str, server: Server) -> None:
        if not url.startswith(server.url):
            self.troubles.append(f"asks for {url}")

    def begin(self) -> None:
        self.page.goto("/")
        self.then(lambda: self.page.get_by_role("button", name="Begin").click())

    def then(self, act: Any) -> None:
        """Do what leads to another page, once the page takes it, and wait until that is there."""
        self.page.locator("body[data-ready]" if self.has_script else "body").wait_for()
        with self.page.expect_navigation():
            act()

    def press(self, key: str) -> None:
        self.then(lambda: self.page.keyboard.press(key))

    def choose(self, name: str) -> None:
        self.then(lambda: self.page.get_by_role("button", name=name).click())

    @property
    def place(self) -> str:
        return str(self.page.locator("label.count").inner_text())

    @property
    def is_finished(self) -> bool:
        return bool(self.page.get_by_role("heading", name="Thank you").is_visible())

    def leave(self) -> None:
        self.context.close()
        assert self.troubles == []


@pytest.fixture
def visit(chromium: Any) -> Iterator[Any]:
    visitors: list[Visitor] = []

    def begun(server: Server, **window: Any) -> Visitor:
        visitors.append(Visitor(chromium, server, **window))
        return visitors[-1]

    yield begun
    for visitor in visitors:
        visitor.leave()


def participants(folder: Path) -> list[Participant]:
    return list(Journal(folder / ANSWERS, study.open_bundle(folder)).participants.values())


def choices(participant: Participant) -> list[str]:
    return [participant.answers[number].choice for number in sorted(participant.answers)]


def test_a_whole_session_by_keyboard_with_a_reload_in_the_middle(tmp_path: Path, visit: Any) -> None:
    study_in(tmp_path, tasks=3, checks=2)
    with served(tmp_path) as server:
        visitor = visit(server)
        visitor.begin()
        assert visitor.page.title() == "Question 1 of 5"
        for number, key in enumerate(("1", "2", "0", "2", "1")):
            assert visitor.place == f"Question {number + 1} of 5"
            assert visitor.page.locator("progress").get_attribute("value") == str(number)
            if number == 2:
                before = visitor.page.locator(".evidence, .patch img").evaluate_all("all => all.map(e => e.outerHTML)")
                visitor.page.reload()
                assert visitor.place == "Question 3 of 5"
                again = visitor.page.locator(".evidence, .patch img").evaluate_all("all => all.map(e => e.outerHTML)")
                assert again == before
            for other in ("x", "ArrowDown", "ArrowLeft", "Control+1", "Alt+2"):  # no choices
                visitor.page.keyboard.press(other)
            visitor.press(key)
        assert visitor.is_finished
        visitor.page.reload()
        assert visitor.is_finished
        (person,) = participants(tmp_path)
        assert person.joined.participant[:4] in visitor.page.locator("main").inner_text()
    assert choices(person) == ["left", "right", "undecided", "right", "left"]
    assert all(300 <= answer.milliseconds < 60_000 for answer in person.answers.values())


def test_time_is_counted_over_reloads_and_not_while_the_page_is_hidden(tmp_path: Path, visit: Any) -> None:
    study_in(tmp_path, tasks=2, checks=0)
    with served(tmp_path) as server:
        visitor = visit(server)
        visitor.page.clock.install()
        visitor.begin()
        visitor.page.clock.fast_forward("10:00")
        visitor.page.reload()
        visitor.page.clock.fast_forward("10:00")
        visitor.press("1")
        hidden = "Object.defineProperty(document, 'visibilityState', {get: () => '%s', configurable: true})"
        for state in ("hidden", "visible"):
            visitor.page.evaluate(hidden % state + "; document.dispatchEvent(new Event('visibilitychange'))")
            visitor.page.clock.fast_forward("10:00" if state == "hidden" else "01:00")
        visitor.press("2")
    minutes = [answer.milliseconds / 60_000 for answer in participants(tmp_path)[0].answers.values()]
    assert minutes == [pytest.approx(20, abs=1), pytest.approx(1, abs=1)]


def test_keys_can_be_turned_off(tmp_path: Path, visit: Any) -> None:
    study_in(tmp_path, tasks=3, checks=0)
    with served(tmp_path) as server:
        visitor = visit(server)
        visitor.begin()
        visitor.press("1")
        visitor.page.get_by_role("button", name="Turn off the keys").click()
        for _ in range(2):  # also on the next page
            visitor.page.locator("body[data-ready]").wait_for()
            visitor.page.keyboard.press("1")
            visitor.page.wait_for_timeout(200)
            if visitor.place == "Question 2 of 3":
                visitor.choose("Patch 2")
        assert visitor.place == "Question 3 of 3"
        visitor.page.get_by_role("button", name="Turn on the keys").click()
        visitor.press("0")
    assert choices(participants(tmp_path)[0]) == ["left", "right", "undecided"]


def test_pictures_are_shown_and_patches_are_where_they_were_cut(tmp_path: Path, visit: Any) -> None:
    opened = study_in(tmp_path, tasks=1, checks=0)
    with served(tmp_path) as server:
        visitor = visit(server)
        visitor.begin()
        sizes = visitor.page.locator("img").evaluate_all("all => all.map(e => e.complete && e.naturalWidth)")
        assert sizes == [24] * 4
        photo = visitor.page.locator(".photo img").bounding_box()
        boxes = [each.bounding_box() for each in visitor.page.locator(".photo rect.over").all()]
        (person,) = participants(tmp_path)
        task = opened.bundle.tasks[0]
        sides = (task.high, task.low) if person.joined.questions[0].left == "high" else (task.low, task.high)
        for box, patch in zip(boxes, sides, strict=True):
            assert box["x"] == pytest.approx(photo["x"] + patch.left * photo["width"], abs=1.5)
            assert box["y"] == pytest.approx(photo["y"] + patch.top * photo["height"], abs=1.5)
            assert box["width"] == pytest.approx(patch.width * photo["width"], abs=2.5)


def test_two_at_once_and_a_server_that_is_killed_and_started_again(tmp_path: Path, visit: Any) -> None:
    study_in(tmp_path, tasks=4, checks=0)
    first = Server(tmp_path)
    one, two = visit(first), visit(first)
    one.begin()
    two.begin()
    one.choose("Patch 1")
    two.choose("Patch 2")
    two.choose("Undecided")
    one.choose("Patch 1")
    for visitor in (one, two):
        visitor.page.wait_for_load_state("networkidle")
    port = int(first.address.rpartition(":")[2])
    first.kill()
    with served(tmp_path, port=port):
        for visitor, choice in ((one, "Patch 2"), (two, "Patch 2")):  # on pages of the server that is gone
            assert visitor.place == "Question 3 of 4"
            visitor.choose(choice)
            assert visitor.place == "Question 4 of 4"
        one.choose("Undecided")
        two.choose("Patch 1")
        assert one.is_finished
        assert two.is_finished
    a, b = participants(tmp_path)
    assert choices(a) == ["left", "left", "right", "undecided"]
    assert choices(b) == ["right", "undecided", "right", "left"]
    shown = [{(each.task, each.shown) for each in person.joined.questions} for person in (a, b)]
    assert not shown[0] & shown[1]


def test_one_goes_on_with_a_code_in_another_browser(tmp_path: Path, visit: Any) -> None:
    study_in(tmp_path)
    with served(tmp_path) as server:
        one = visit(server)
        one.begin()
        one.press("1")
        code = one.page.locator("footer strong").inner_text()
        other = visit(server)
        other.page.goto("/")
        other.page.get_by_label("Your code").fill(code.lower())
        other.choose("Go on")
        assert other.place == "Question 2 of 6"
        other.press("2")
        one.press("0")  # the same question, once more: the answer that it has stays
        assert one.place == "Question 3 of 6"
        (person,) = participants(tmp_path)
        assert choices(person) == ["left", "right"]
        one.page.goto("/")
        one.page.get_by_label("Your code").fill("nobody")
        with one.page.expect_navigation():
            one.page.get_by_role("button", name="Go on").click()
        assert "Nobody has the code “nobody”" in one.page.get_by_role("alert").inner_text()
        assert one.troubles.pop().startswith("Failed to load resource")  # which is what Chromium calls status 404


def test_an_answer_is_sent_once_and_cannot_be_taken_back(tmp_path: Path, visit: Any) -> None:
    study_in(tmp_path)
    with served(tmp_path) as server:
        visitor = visit(server)
        visitor.page.goto("/")
        with visitor.page.expect_navigation():
            visitor.page.get_by_role("button", name="Begin").evaluate("e => { e.click(); e.click(); }")
        assert len(participants(tmp_path)) == 1
        visitor.then(lambda: visitor.page.locator(".patch").first.evaluate("e => { e.click(); e.click(); }"))
        # A second click, and a key that is held, are of the question that is gone.
        visitor.then(lambda: visitor.page.locator(".patch").first.dblclick(delay=40))
        visitor.page.keyboard.press("1")
        visitor.page.wait_for_timeout(500)
        assert visitor.place == "Question 3 of 6"
        visitor.page.keyboard.down("2")
        for _ in range(3):
            visitor.page.wait_for_timeout(400)
            visitor.page.keyboard.down("2")  # as a held key repeats
        visitor.page.keyboard.up("2")
        assert visitor.place == "Question 4 of 6"
        visitor.page.go_back()
        assert visitor.place == "Question 4 of 6"
    assert choices(participants(tmp_path)[0]) == ["left", "left", "right"]


def test_it_works_without_javascript(tmp_path: Path, visit: Any) -> None:
    study_in(tmp_path, tasks=2, checks=0)
    with served(tmp_path) as server:
        visitor = visit(server, java_script_enabled=False)
        visitor.begin()
        visitor.page.get_by_role("button", name="Patch 1").focus()
        visitor.page.keyboard.press("Tab")
        visitor.press("Enter")
        visitor.choose("Undecided")
        assert visitor.is_finished
    (person,) = participants(tmp_path)
    assert choices(person) == ["right", "undecided"]
    assert [answer.milliseconds for answer in person.answers.values()] == [None, None]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1200, 800), (360, 640)])
def test_pages_fit_and_are_accessible(tmp_path: Path, visit: Any, scheme: str, width: int, height: int) -> None:
    study_in(tmp_path, tasks=1, checks=0)
    with served(tmp_path) as server:
        phone = width < 500
        visitor = visit(server, viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=phone)
        page = visitor.page

        def look() -> None:
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert serious_findings(page) == []

        page.goto("/")
        look()
        hit = "tap" if phone else "click"
        visitor.then(getattr(page.get_by_role("button", name="Begin"), hit))
        look()
        # All of the question is seen at once, and can be hit by a finger.
        for button in page.locator("#answer button").all():
            box = button.bounding_box()
            assert box["y"] + box["height"] <= height
            assert min(box["width"], box["height"]) >= 44
        visitor.then(getattr(page.get_by_role("button", name="Patch 1"), hit))
        assert visitor.is_finished
        look()
    assert len(json.loads((tmp_path / ANSWERS).read_text().splitlines()[1])) == 5
