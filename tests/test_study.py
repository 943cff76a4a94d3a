"""Studies: what is asked, what is kept of answers, and what they say."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from studies import small_network, study_in
from subjects import photographs, quarters

import spade_fast as sf
from spade_fast import study
from spade_fast.files import held_file
from spade_fast.study import scoring
from spade_fast.study.building import chosen_squares
from spade_fast.study.bundle import ARMS, OpenBundle, medium_of, open_bundle, picture_file
from spade_fast.study.journal import ANSWERS, Journal, Participant
from spade_fast.study.schedule import questions_of
from spade_fast.study.scoring import ROWS


@pytest.fixture
def small(tmp_path: Path) -> OpenBundle:
    return study_in(tmp_path)


def answer_all(journal: Journal, participant: Participant, choose: Any) -> None:
    for number, question in enumerate(participant.joined.questions):
        assert journal.answer(participant, number, *choose(question))


def side_of(question: Any, which: str) -> str:
    return "left" if question.left == which else "right"


def attentive(verdict: Any, seconds: Any = lambda _: 1) -> Any:
    """Chooses right in checks, and in tasks what the verdict of the question says, in so many seconds."""

    def choose(question: Any) -> tuple[str, int]:
        if question.is_check:
            return side_of(question, question.shown), 30_000
        found = verdict(question)
        return {"agree": side_of(question, "high"), "disagree": side_of(question, "low")}.get(found, found), round(
            1000 * seconds(question)
        )

    return choose


# What is asked


def test_the_high_patch_has_the_largest_mean_and_the_low_one_lies_apart() -> None:
    relevance = torch.zeros(12, 12)
    relevance[2:5, 7:10] = torch.tensor([1.0, 2.0, 1.0])
    relevance[:, :2] = 0.5
    for seed in range(20):
        (top, left), (low_top, low_left) = chosen_squares(relevance, 3, random.Random(seed))
        assert (top, left) == (2, 7)
        assert abs(low_top - top) >= 3 or abs(low_left - left) >= 3
        assert low_left >= 2  # not where half of it is relevant
        assert relevance[low_top : low_top + 3, low_left : low_left + 3].max() == 0
    lows = {chosen_squares(relevance, 3, random.Random(seed))[1] for seed in range(20)}
    assert len(lows) > 1


@pytest.mark.parametrize("place", [(0, 0), (4, 4), (8, 8), (3, 7)])
def test_there_is_room_for_a_low_patch_wherever_the_high_one_is(place: tuple[int, int]) -> None:
    relevance = torch.rand(12, 12, generator=torch.Generator().manual_seed(0))
    relevance[place[0] : place[0] + 4, place[1] : place[1] + 4] += 5
    high, low = chosen_squares(relevance, 4, random.Random(0))
    assert high == place
    assert max(abs(high[0] - low[0]), abs(high[1] - low[1])) >= 4


def test_a_flat_map_leaves_nothing_to_choose() -> None:
    with pytest.raises(sf.InvalidInputError, match="ranks all of it alike"):
        chosen_squares(torch.ones(9, 9), 3, random.Random(0))


def test_of_equal_squares_none_comes_first() -> None:
    relevance = torch.zeros(30, 30)
    relevance[12:18, 12:18] = 1  # a map that is zero nearly everywhere, as behind a ReLU
    lows = [chosen_squares(relevance, 6, random.Random(seed))[1] for seed in range(60)]
    assert min(top for top, _ in lows) < 3
    assert max(top for top, _ in lows) > 20
    assert max(left for _, left in lows) > 20


def tasks_of(bundle: study.Bundle, number: int) -> dict[int, tuple[str, str]]:
    """By task whose visualization a participant is shown, and which patch on the left."""
    return {each.task: (each.shown, each.left) for each in questions_of(bundle, number) if not each.is_check}


@pytest.mark.parametrize("tasks", [1, 4, 7, 10])
def test_two_participants_see_every_task_by_both_networks_and_on_both_sides(tmp_path: Path, tasks: int) -> None:
    bundle = study_in(tmp_path, tasks=tasks, checks=min(3, tasks)).bundle
    for pair in range(5):
        first, second = (tasks_of(bundle, 2 * pair + place) for place in (0, 1))
        assert sorted(first) == sorted(second) == list(range(tasks))
        for task in range(tasks):
            assert {first[task][0], second[task][0]} == {"dense", "spade"}
            assert {first[task][1], second[task][1]} == {"high", "low"}
        for shown in (first, second):
            arms = Counter(arm for arm, _ in shown.values())
            assert abs(arms["dense"] - arms["spade"]) <= tasks % 2
            for arm in ARMS:
                left = Counter(side for found, side in shown.values() if found == arm)
                assert abs(left["high"] - left["low"]) <= arms[arm] % 2
    assert questions_of(bundle, 3) == questions_of(bundle, 3)


def test_chance_differs_between_participants_pairs_and_studies(tmp_path: Path) -> None:
    bundle, other = (study_in(tmp_path / str(seed), tasks=12, checks=0, seed=seed).bundle for seed in (0, 1))
    orders = [[each.task for each in questions_of(bundle, number)] for number in range(6)]
    assert len({tuple(order) for order in orders}) == 6
    assert tasks_of(bundle, 0) != tasks_of(bundle, 2)
    assert questions_of(bundle, 0) != questions_of(other, 0)
    assert tasks_of(bundle, 0) != tasks_of(other, 0)
    # What is left over of odd halves goes either way.
    odd = study_in(tmp_path / "odd", tasks=7, checks=0).bundle
    counts = Counter(sum(arm == "dense" for arm, _ in tasks_of(odd, 2 * pair).values()) for pair in range(30))
    assert set(counts) == {3, 4}


def test_checks_come_after_what_they_are_about_and_tell_who_does_not_look(tmp_path: Path) -> None:
    bundle = study_in(tmp_path, tasks=8, checks=4).bundle
    first_kinds = set()
    for number in range(40):
        asked = questions_of(bundle, number)
        places = [place for place, each in enumerate(asked) if each.is_check]
        assert len(places) == 4
        for part, place in enumerate(places):
            before = [each.task for each in asked[:place] if not each.is_check]
            assert asked[place].task in before
            assert 2 * part < len(before) <= 2 * part + 2
        checks = [asked[place] for place in places]
        assert len({each.task for each in checks}) == 4
        assert {(each.shown, each.shown == each.left) for each in checks} == set(
            itertools.product(("high", "low"), (True, False))
        )
        first_kinds.add((checks[0].shown, checks[0].left))
    assert len(first_kinds) == 4


@pytest.mark.parametrize(("tasks", "checks"), [(1, 1), (2, 2), (5, 3), (3, 0)])
def test_small_studies_begin_with_a_task(tmp_path: Path, tasks: int, checks: int) -> None:
    bundle = study_in(tmp_path, tasks=tasks, checks=checks).bundle
    for number in range(10):
        asked = questions_of(bundle, number)
        assert not asked[0].is_check
        assert sorted(each.task for each in asked if not each.is_check) == list(range(tasks))
        assert sum(each.is_check for each in asked) == checks


# Building


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, study.Bundle]:
    pytest.importorskip("captum")
    pytest.importorskip("lucent")
    folder = tmp_path_factory.mktemp("built")
    (folder / "images").mkdir()
    photographs(folder / "images", 4)
    (folder / "images" / "broken.png").write_bytes(b"no picture")
    bundle = study.build(small_network(), folder / "images", folder / "study", 0.5, steps=2, num_augmentations=4)
    return folder, bundle


def trace_answer(photo: Path) -> int:
    net = small_network()
    image = sf.load_image(photo)
    with sf.trace(net, image, 0.5, num_augmentations=4).applied(net) as sparse, torch.no_grad():
        return int(sparse(net.preprocess(net.preprocess.view(image)[None])).argmax())


def test_a_built_study_is_whole(built: tuple[Path, study.Bundle]) -> None:
    folder, bundle = built
    assert open_bundle(folder / "study").bundle == bundle
    assert sorted(task.name for task in bundle.tasks) == ["00.png", "01.png", "02.png", "03.png"]
    assert list(bundle.refused) == ["broken.png"]
    assert bundle.checks == 4
    assert [task.trace_agrees for task in bundle.tasks] == [
        trace_answer(folder / "images" / task.name) == task.target for task in bundle.tasks
    ]
    assert bundle.settings["weights"] == "random"
    assert bundle.settings["visualization_steps"] == 2
    net = small_network()
    for task in bundle.tasks:
        photo = sf.load_image(folder / "images" / task.name)
        inputs = net.preprocess(net.preprocess.view(photo)[None])
        with torch.no_grad():
            assert task.target == net.module(inputs).argmax().item()
        assert task.target_name == "abcd"[task.target]
        assert task.high.relevance > task.low.relevance
        assert task.dense != task.spade
        with Image.open(picture_file(folder / "study", task.photo)) as shown:
            pixels = np.asarray(shown)
            for patch in (task.high, task.low):
                top, left, side = (round(16 * each) for each in (patch.top, patch.left, patch.width))
                with Image.open(picture_file(folder / "study", patch.medium)) as cut:
                    assert np.array_equal(np.asarray(cut), pixels[top : top + side, left : left + side])
    dense = {task.target: task.dense for task in bundle.tasks}
    assert len(dense) == 4
    assert all(task.dense == dense[task.target] for task in bundle.tasks)


def test_the_visualizations_are_those_of_visualize(built: tuple[Path, study.Bundle]) -> None:
    folder, bundle = built
    net, task = small_network(), bundle.tasks[0]
    trace = sf.trace(net, sf.load_image(folder / "images" / task.name), 0.5, num_augmentations=4)
    found = sf.visualize(net, "6", task.target, trace=trace, thresholds=(2,))
    for medium, image in ((task.dense, found.dense[0]), (task.spade, found.spade[0][0])):
        with Image.open(picture_file(folder / "study", medium)) as saved:
            assert np.array_equal(np.asarray(saved), (255 * image).round().byte().permute(1, 2, 0).numpy())


def test_a_build_that_was_cut_short_goes_on_to_the_same_study(
    built: tuple[Path, study.Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, bundle = built
    settings: dict[str, Any] = {"steps": 2, "num_augmentations": 4}
    calls = []

    def failing(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return sf.visualize(*arguments, **keywords)

    monkeypatch.setattr(study.building, "visualize", failing)
    out = tmp_path / "study"
    with pytest.raises(KeyboardInterrupt):
        study.build(small_network(), folder / "images", out, 0.5, **settings)
    with pytest.raises(sf.InvalidInputError, match="was the building of the study cut short"):
        open_bundle(out)
    assert study.build(small_network(), folder / "images", out, 0.5, **settings) == bundle
    assert len(calls) == 5 + 2 * 2  # two tasks were done; the others' two networks
    file = picture_file(out, bundle.tasks[1].photo)
    file.write_bytes(file.read_bytes()[:-1])
    assert study.build(small_network(), folder / "images", out, 0.5, **settings) == bundle
    assert len(calls) == 9 + 1  # the trace's; the dense network's is there
    with pytest.raises(sf.InvalidInputError, match=r"made with other settings \(sparsity\)"):
        study.build(small_network(), folder / "images", out, 0.6, **settings)
    (out / "tasks.jsonl").write_text("none\n")
    with pytest.raises(sf.InvalidInputError, match="line 1 .* is no task of a study"):
        study.build(small_network(), folder / "images", out, 0.5, **settings)


def test_an_answered_study_is_not_replaced(built: tuple[Path, study.Bundle], tmp_path: Path) -> None:
    folder, _ = built
    settings: dict[str, Any] = {"steps": 1, "num_augmentations": 2}
    study.build(small_network(), folder / "images", tmp_path, 0.5, limit=1, **settings)
    study.build(small_network(), folder / "images", tmp_path, 0.5, limit=3, **settings)  # nobody has answered
    study.simulate(tmp_path)
    study.build(small_network(), folder / "images", tmp_path, 0.5, limit=3, **settings)  # the same
    with pytest.raises(sf.InvalidInputError, match="answered already"):
        study.build(small_network(), folder / "images", tmp_path, 0.5, limit=2, **settings)
    assert len(open_bundle(tmp_path).bundle.tasks) == 3
    with held_file(tmp_path / ANSWERS), pytest.raises(sf.InvalidInputError, match="another run writes"):
        study.build(small_network(), folder / "images", tmp_path, 0.5, limit=2, **settings)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"limit": 0}, "limit must be a whole number of at least 1"),
        ({"checks": -1}, "checks must be"),
        ({"steps": 0}, "steps must be"),
        ({"patch": 0.5}, "patch must be a share above 0 and at most a third, got 0.5"),
        ({"patch": 0}, "patch must be"),
        ({"seed": -1}, "seed must be"),
        ({"num_augmentations": 0}, "num_augmentations"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_first(tmp_path: Path, wrong: Any, message: str) -> None:
    pytest.importorskip("captum")
    photographs(tmp_path, 1)
    with pytest.raises(sf.InvalidInputError, match=message):
        study.build(small_network(), tmp_path, tmp_path / "study", **wrong)
    assert not (tmp_path / "study").exists()


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("captum")
    photographs(tmp_path, 1)
    with pytest.raises(sf.InvalidInputError, match="is no study, but holds '00.png': choose a new folder"):
        study.build(small_network(), tmp_path, tmp_path, steps=1)
    assert [each.name for each in tmp_path.iterdir()] == ["00.png"]


def test_a_network_that_cannot_be_asked_is_refused_at_once(tmp_path: Path) -> None:
    pytest.importorskip("captum")
    for name in photographs(tmp_path, 2):
        assert (tmp_path / name).exists()
    with pytest.raises(sf.InvalidInputError, match="^method 'score_cam' is not valid on this network"):
        study.build(quarters(), tmp_path, tmp_path / "study", steps=1)
    net = small_network()
    net.module.append(torch.nn.Softmax(1))
    with pytest.raises(sf.InvalidInputError, match="^the class scores of Sequential are not the output of a linear"):
        study.build(net, tmp_path, tmp_path / "study", steps=1)


def test_no_study_without_an_image(tmp_path: Path) -> None:
    pytest.importorskip("captum")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(sf.InvalidInputError, match="no image can be used .*broken.png"):
        study.build(small_network(), tmp_path, tmp_path / "study", steps=1)


# The folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.update(format=2), "format: Input should be 1"),
        (lambda found: found["tasks"].clear(), "tasks: .*at least 1"),
        (lambda found: found["tasks"][0].update(photo="../../../etc/passwd"), "tasks.0.photo: String should match"),
        (lambda found: found["tasks"][0].update(photo="a" * 64 + ".png\n"), "tasks.0.photo: String should match"),
        (lambda found: found["tasks"][0]["high"].update(left=1.5), "tasks.0.high.left"),
        (lambda found: found["tasks"][0].update(more=1), "tasks.0.more: Extra inputs"),
        (lambda found: found["tasks"][0].update(target="1"), "tasks.0.target"),
        (lambda found: found.update(checks=5), "it has 5 checks, and 4 tasks to check with"),
        (lambda found: found["tasks"][0].update(name="1.png"), "two tasks are called '1.png'"),
        (lambda found: found.pop("seed"), "seed: Field required"),
    ],
)
def test_a_study_that_contradicts_itself_is_refused(small: OpenBundle, change: Any, message: str) -> None:
    file = small.path / "study.json"
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))
    with pytest.raises(sf.InvalidInputError, match=f"study.json' as a study .*{message}"):
        open_bundle(small.path)


def test_pictures_that_are_missing_changed_or_elsewhere_are_refused(small: OpenBundle, tmp_path: Path) -> None:
    file = picture_file(small.path, small.bundle.tasks[2].photo)
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(sf.InvalidInputError, match=f"{file.name}' of a study .it has been changed"):
        open_bundle(small.path)
    with pytest.raises(sf.InvalidInputError, match="has been changed"):
        small.picture(file.name)
    file.unlink()
    with pytest.raises(sf.InvalidInputError, match="missing"):
        open_bundle(small.path)
    (tmp_path / "secret").write_bytes(b"secret")
    file.symlink_to(tmp_path / "secret")
    with pytest.raises(sf.InvalidInputError, match="has been changed"):
        open_bundle(small.path)
    for name in ("../study.json", medium_of(b"other"), "", "secret"):
        with pytest.raises(sf.InvalidInputError, match="has no picture"):
            small.picture(name)


@pytest.mark.parametrize("path", ["missing", "", 5])
def test_what_is_no_study_is_refused(tmp_path: Path, path: Any) -> None:
    with pytest.raises(sf.InvalidInputError, match="pass the folder that study build wrote"):
        open_bundle(tmp_path / path if isinstance(path, str) else path)


# Answers


def test_answers_are_on_the_disk_and_read_back(small: OpenBundle) -> None:
    journal = Journal(small.path / ANSWERS, small)
    first, second = journal.join(), journal.join()
    assert journal.answer(first, 0, "left", 1200)
    assert journal.answer(second, 0, "undecided", None)
    assert journal.answer(first, 1, "right", 0)
    again = Journal(small.path / ANSWERS, small)
    assert list(again.participants) == [first.joined.participant, second.joined.participant]
    assert again.participants[first.joined.participant].answers == first.answers
    assert again.participants[second.joined.participant].next_question == 1
    assert again.find(first.joined.participant) is again.participants[first.joined.participant]
    spelt = f" {first.joined.participant[:4].lower()}-{first.joined.participant[4:]} "
    assert again.find(spelt) is again.find(first.joined.participant)
    assert again.find("") is None


def test_the_first_answer_to_a_question_stays_and_none_is_skipped(small: OpenBundle) -> None:
    journal = Journal(small.path / ANSWERS, small)
    person = journal.join()
    assert not journal.answer(person, 1, "left", 1)
    assert journal.answer(person, 0, "left", 1)
    assert not journal.answer(person, 0, "right", 1)
    assert person.answers[0].choice == "left"
    assert len((small.path / ANSWERS).read_text().splitlines()) == 2


def test_people_and_programs_are_numbered_apart_and_a_number_that_is_free_is_given_again(
    small: OpenBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(small.path / ANSWERS, small)
    assert [journal.join(simulated="a program").joined.number for _ in range(2)] == [0, 1]
    first, second = journal.join(), journal.join()
    assert [first.joined.number, second.joined.number] == [0, 1]
    journal.answer(second, 0, "left", 1)
    assert journal.join().joined.number == 2  # the first may still begin
    now = study.journal.time.monotonic()
    monkeypatch.setattr(study.journal.time, "monotonic", lambda: now + 601)
    assert journal.join().joined.number == 0
    again = Journal(small.path / ANSWERS, small)  # in a process that does not know when they came
    assert again.join().joined.number == 0
    assert again.people() == 5


def test_no_more_join_than_there_is_room_for(small: OpenBundle) -> None:
    journal = Journal(small.path / ANSWERS, small)
    journal.join(simulated="a program")
    with ThreadPoolExecutor(8) as pool:
        joined = list(pool.map(lambda _: journal.join(most=5), range(20)))
    assert sum(each is not None for each in joined) == 5
    assert sorted(each.joined.number for each in joined if each) == [0, 1, 2, 3, 4]


def test_of_simultaneous_answers_one_is_taken(small: OpenBundle) -> None:
    journal = Journal(small.path / ANSWERS, small)
    person = journal.join()
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: journal.answer(person, 0, "left", 1), range(20)))
    assert taken.count(True) == 1
    assert len((small.path / ANSWERS).read_text().splitlines()) == 2


def test_a_file_that_was_moved_takes_no_answer(small: OpenBundle) -> None:
    file = small.path / ANSWERS
    journal = Journal(file, small)
    person = journal.join()
    file.rename(small.path / "rotated")
    with pytest.raises(sf.InvalidInputError, match="was moved, deleted or replaced"):
        journal.answer(person, 0, "left", 1)
    assert person.next_question == 0
    assert not file.exists()
    (small.path / "rotated").rename(file)
    assert journal.answer(person, 0, "left", 1)


def test_a_participant_is_forgotten(small: OpenBundle) -> None:
    file = small.path / ANSWERS
    journal = Journal(file, small)
    first, second = journal.join(), journal.join()
    for person in (first, second, first):
        journal.answer(person, len(person.answers), "left", 1)
    with held_file(file), pytest.raises(sf.InvalidInputError, match="another run writes"):
        study.forget(small.path, first.joined.participant)
    study.forget(small.path, first.joined.participant.lower())
    assert first.joined.participant not in file.read_text()
    left = Journal(file, small)
    assert list(left.participants) == [second.joined.participant]
    assert left.participants[second.joined.participant].answers == second.answers
    assert left.join().joined.number == 0  # whose questions nobody has answered now
    with pytest.raises(sf.InvalidInputError, match="nobody has the code"):
        study.forget(small.path, first.joined.participant)


def test_what_is_read_and_the_name_of_the_file_outlast_a_loss_of_power(
    small: OpenBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = small.path / ANSWERS
    synced: list[str] = []
    fsync = os.fsync

    def spied(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spied)
    with held_file(file):
        assert str(small.path) in synced
        synced.clear()
        journal = Journal(file, small)
        assert synced == [str(file)]
        person = journal.join()
        journal.answer(person, 0, "left", 1)
        assert synced == [str(file)] * 3


def test_an_answer_that_cannot_be_written_is_none(small: OpenBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(small.path / ANSWERS, small)
    person = journal.join()

    def full(*_: object) -> None:
        raise sf.InvalidInputError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(study.journal, "append_line", full)
        with pytest.raises(sf.InvalidInputError, match="no space"):
            journal.answer(person, 0, "left", 1)
        with pytest.raises(sf.InvalidInputError, match="no space"):
            journal.join()
    assert person.next_question == 0
    assert len(journal.participants) == 1
    assert journal.answer(person, 0, "right", 1)


def test_a_line_cut_short_is_left_out_and_the_last_of_two_counts(small: OpenBundle) -> None:
    file = small.path / ANSWERS
    journal = Journal(file, small)
    person = journal.join()
    journal.answer(person, 0, "left", 1)
    line = file.read_text().splitlines()[-1]
    file.write_text(f"{file.read_text()}{line.replace('left', 'right')}\n{line[:20]}")
    again = Journal(file, small)
    found = again.participants[person.joined.participant]
    assert found.answers[0].choice == "right"
    assert again.answer(found, 1, "left", None)
    assert Journal(file, small).participants[person.joined.participant].next_question == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "line 3 .*kind"),
        ("no json", "line 3 .*JSON"),
        ('{"kind":"answer","participant":"X","question":0,"choice":"left","milliseconds":1}', "X has not joined"),
        ('{"kind":"answer","participant":"CODE","question":99,"choice":"left","milliseconds":1}', "no question 99"),
        (
            '{"kind":"answer","participant":"CODE","question":3,"choice":"left","milliseconds":1}',
            "not to be answered yet",
        ),
        ('{"kind":"answer","participant":"CODE","question":0,"choice":"up","milliseconds":1}', "choice"),
        ('{"kind":"answer","participant":"CODE","question":0,"choice":"left","milliseconds":-1}', "milliseconds"),
        ('{"kind":"joined","participant":"Y","study":"0","number":1,"simulated":null,"questions":[]}', "another study"),
    ],
)
def test_answers_that_do_not_go_with_the_study_are_refused(small: OpenBundle, line: str, message: str) -> None:
    file = small.path / ANSWERS
    journal = Journal(file, small)
    person = journal.join()
    journal.answer(person, 0, "left", 1)
    file.write_text(file.read_text() + line.replace("CODE", person.joined.participant) + "\n")
    with pytest.raises(sf.InvalidInputError, match=f"{message}.*delete that line"):
        Journal(file, small)


# Scores


def test_rows_of_answers_that_are_known(tmp_path: Path) -> None:
    opened = study_in(tmp_path, tasks=8, checks=2)
    journal = Journal(tmp_path / ANSWERS, opened)
    # By the dense network: tasks 0 and 1 undecided, 2 disagree, the rest agree. By the trace: task 0 disagree.
    verdicts = {
        ("dense", 0): "undecided",
        ("dense", 1): "undecided",
        ("dense", 2): "disagree",
        ("spade", 0): "disagree",
    }
    choose = attentive(
        lambda question: verdicts.get((question.shown, question.task), "agree"),
        lambda question: (question.task + 1) * (2 if question.shown == "dense" else 1),
    )
    for _ in range(2):
        answer_all(journal, journal.join(), choose)
    (found,) = study.score(tmp_path).groups
    assert found.group == "people"
    assert (found.participants, found.finished, found.left, dict(found.excluded), found.images) == (2, 2, 0, {}, 8)
    assert found.answers == {"dense": 8, "spade": 8}
    expected = {
        "undecided": (25, 0),
        "disagree": (12.5, 12.5),
        "agree": (62.5, 87.5),
        "disagree_of_decided": (100 / 6, 12.5),
        "agree_of_decided": (500 / 6, 87.5),
    }
    assert set(expected) == set(ROWS)
    for row, (dense, spade) in expected.items():
        assert found.rows[row]["dense"].value == pytest.approx(dense)
        assert found.rows[row]["spade"].value == pytest.approx(spade)
        assert found.rows[row]["difference"].value == pytest.approx(spade - dense)
        for estimate in found.rows[row].values():
            assert estimate.low <= estimate.value <= estimate.high
    assert found.rows["undecided"]["spade"].high == 0
    assert found.rows["agree"]["dense"].high - found.rows["agree"]["dense"].low > 30
    assert all(math.isnan(each["alpha"]) for each in found.agreement.values())  # no two saw the same
    # Medians of 2, 4, ..., 16 and of 1, 2, ..., 8.
    assert (found.seconds["dense"].value, found.seconds["spade"].value) == (9, 4.5)
    assert found.seconds["difference"].value == -4.5
    assert 2 < found.seconds["dense"].low < 9 < found.seconds["dense"].high <= 16


def test_medians_count_answers_as_often_as_they_are_drawn() -> None:
    lines = [
        {"participant": "a", "target": 0, "verdict": "agree", "milliseconds": 1000},
        {"participant": "a", "target": 1, "verdict": "agree", "milliseconds": 9000},
        {"participant": "a", "target": 2, "verdict": "agree", "milliseconds": None},
        {"participant": "a", "target": 3, "verdict": "agree", "milliseconds": 2000},
    ]
    samples = scoring._Samples(lines, 0, of_people=True)
    samples._classes[1:5] = [[1, 1, 1, 0], [1, 2, 0, 0], [3, 1, 0, 0], [0, 0, 1, 0]]
    medians = samples.medians(lines)
    assert medians[0] == 2
    assert list(medians[1:4]) == [5, 9, 1]
    assert math.isnan(medians[4])


def test_intervals_of_one_participant_are_those_of_resampled_images(tmp_path: Path) -> None:
    opened = study_in(tmp_path, tasks=40, checks=0)
    journal = Journal(tmp_path / ANSWERS, opened)
    answer_all(journal, journal.join(), attentive(lambda question: "agree" if question.task % 4 else "disagree"))
    (found,) = study.score(tmp_path).groups
    for arm in ARMS:
        estimate = found.rows["agree"][arm]
        share, count = estimate.value / 100, found.answers[arm]
        # What a binomial share's normal approximation says.
        assert estimate.high - estimate.low == pytest.approx(392 * math.sqrt(share * (1 - share) / count), rel=0.13)


def test_images_of_a_class_are_drawn_together(tmp_path: Path) -> None:
    widths = {}
    for classes in (40, 4):
        folder = tmp_path / str(classes)
        opened = study_in(folder, tasks=40, checks=0, classes=classes)
        journal = Journal(folder / ANSWERS, opened)
        for _ in range(2):  # who both answer by the class
            verdicts = ["agree" if task % classes % 4 else "disagree" for task in range(40)]
            answer_all(journal, journal.join(), attentive(lambda question, told=verdicts: told[question.task]))
        estimate = study.score(folder).groups[0].rows["agree"]["dense"]
        widths[classes] = estimate.high - estimate.low
    assert widths[4] > 2 * widths[40]


def test_people_who_differ_widen_the_intervals(tmp_path: Path) -> None:
    opened = study_in(tmp_path, tasks=20, checks=0)
    alike, apart = Journal(tmp_path / "alike.jsonl", opened), Journal(tmp_path / "apart.jsonl", opened)
    for number in range(10):
        answer_all(alike, alike.join(), attentive(lambda question: "agree" if question.task % 2 else "disagree"))
        by_person = attentive(lambda _, number=number: "agree" if number % 4 < 2 else "disagree")
        answer_all(apart, apart.join(), by_person)
    one, other = (study.score(tmp_path, journal.path).groups[0] for journal in (alike, apart))
    assert one.rows["agree"]["dense"].value == pytest.approx(50, abs=1)
    assert other.rows["agree"]["dense"].value == pytest.approx(60, abs=11)
    for arm in ARMS:
        assert one.agreement[arm] == {"share": 1, "alpha": pytest.approx(1)}
        assert other.agreement[arm]["alpha"] < 0.1
    widths = [each.rows["agree"]["dense"].high - each.rows["agree"]["dense"].low for each in (one, other)]
    assert widths[1] > 1.2 * widths[0]
    assert widths[1] > 40


def test_agreement_is_that_of_the_textbook() -> None:
    # Krippendorff 2011, "Computing Krippendorff's alpha-reliability", part C: four observers, some of whom saw less.
    observers = ("123321412...", "1233224125.3", ".3332342251.", "1233244125" + "1.")
    lines = [
        {"image": str(unit), "verdict": value}
        for observed in observers
        for unit, value in enumerate(observed)
        if value != "."
    ]
    assert scoring._agreement(lines)["alpha"] == pytest.approx(0.743, abs=5e-4)
    # Two that agree about one image, and of ten about another five each: 1 + 10 + 10 of 1 + 45 pairs.
    lines = [{"image": "a", "verdict": "agree"}] * 2
    lines += [{"image": "b", "verdict": verdict} for verdict in ("agree", "disagree") for _ in range(5)]
    assert scoring._agreement(lines)["share"] == pytest.approx(21 / 46)
    assert math.isnan(scoring._agreement(lines[:1])["alpha"])


def test_inattentive_participants_do_not_count(tmp_path: Path) -> None:
    opened = study_in(tmp_path, tasks=4, checks=4)
    journal = Journal(tmp_path / ANSWERS, opened)
    answer_all(journal, journal.join(), attentive(lambda _: "agree"))
    one_sided = journal.join()
    answer_all(journal, one_sided, lambda _: ("left", 10))
    undecided = journal.join()
    answer_all(journal, undecided, lambda _: ("undecided", 10))
    journal.join()  # and leaves at once
    result = study.score(tmp_path)
    (found,) = result.groups
    assert found.excluded == {
        one_sided.joined.participant: "2 of 4 checks right",
        undecided.joined.participant: "0 of 4 checks right",
    }
    assert (found.participants, found.finished, found.left, found.answers) == (1, 1, 1, {"dense": 2, "spade": 2})
    assert found.rows["agree"]["dense"].value == found.rows["agree"]["spade"].value == 100
    assert len(result.lines) == 24
    assert study.score(tmp_path, least_checks=0.5).groups[0].participants == 2
    assert study.score(tmp_path, least_checks=0).groups[0].participants == 3


def test_scores_are_saved_as_table_lines_and_figures(tmp_path: Path) -> None:
    opened = study_in(tmp_path, tasks=4, checks=1)
    journal = Journal(tmp_path / ANSWERS, opened)
    answer_all(journal, journal.join(), attentive(lambda _: "agree"))
    study.simulate(tmp_path, participants=2)
    written = study.score(tmp_path).save(tmp_path / "score")
    lines = list(csv.DictReader(written["answers.csv"].read_text().splitlines()))
    assert len(lines) == 3 * 5
    assert Counter(line["simulated"] for line in lines) == {"": 5, "untrained filters, margin 0.02": 10}
    assert Counter(line["verdict"] for line in lines if not line["simulated"]) == {"agree": 4, "": 1}
    tables = written["tables.md"].read_text()
    assert tables.index("## people") < tables.index("## simulated: untrained filters, margin 0.02")
    assert "| agree | 100.0 (100.0 to 100.0) | 100.0 (100.0 to 100.0) | 0.0 (0.0 to 0.0) | 56.7 | 69.8 |" in tables
    summary = json.loads(written["score.json"].read_text())
    assert [group["group"] for group in summary["groups"]] == ["people", "simulated: untrained filters, margin 0.02"]
    assert summary["groups"][1]["seconds"]["dense"] == {"value": None, "low": None, "high": None}
    assert summary["groups"][1]["agreement"]["dense"] == {"share": None, "alpha": None}


def test_nothing_is_scored_without_answers(small: OpenBundle) -> None:
    with pytest.raises(sf.InvalidInputError, match="has no answers: serve or simulate"):
        study.score(small.path)
    Journal(small.path / ANSWERS, small).join()
    with pytest.raises(sf.InvalidInputError, match="has no answers"):
        study.score(small.path)
    for wrong in (2, -1, True, "half"):
        with pytest.raises(sf.InvalidInputError, match="least_checks must be a share"):
            study.score(small.path, least_checks=wrong)
    for wrong in (-1, "a", 1.5, None):
        with pytest.raises(sf.InvalidInputError, match="seed must be a whole number"):
            study.score(small.path, seed=wrong)
    for function in (study.score, study.simulate, study.serve):
        with pytest.raises(sf.InvalidInputError, match="answers is .*: pass the name of a file"):
            function(small.path, 5)


# Simulated participants


def test_a_simulated_participant_takes_the_patch_that_is_shown(tmp_path: Path) -> None:
    study_in(tmp_path, tasks=6, checks=2)  # whose trace shows the high patch, and the dense network the low one
    state = torch.get_rng_state()
    journal = study.simulate(tmp_path, participants=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert {each.joined.simulated for each in journal.participants.values()} == {"untrained filters, margin 0.02"}
    (found,) = study.score(tmp_path).groups
    assert found.group == "simulated: untrained filters, margin 0.02"
    assert found.rows["agree"]["spade"].value == 100
    assert found.rows["disagree"]["dense"].value == 100
    assert dict(found.excluded) == {}
    with pytest.raises(sf.InvalidInputError, match="has answers of 'untrained filters, margin 0.02' already"):
        study.simulate(tmp_path)
    undecided = study.simulate(tmp_path, participants=1, margin=2)
    assert {answer.choice for each in undecided.participants.values() for answer in each.answers.values()} == {
        "left",
        "right",
        "undecided",
    }
    groups = study.score(tmp_path).groups  # a program that is undecided in checks as well is not inattentive
    assert [group.rows["undecided"]["dense"].value for group in groups] == [0, 100]
    assert [dict(group.excluded) for group in groups] == [{}, {}]


def test_a_task_does_not_pull_its_own_networks_apart() -> None:
    first, second = torch.rand(3, 2, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)
    found = study.simulation._mean_of_others(first, second)
    assert torch.allclose(found[0], (first[1] + second[1] + first[2] + second[2]) / 4)
    assert torch.allclose(found[2], (first[0] + second[0] + first[1] + second[1]) / 4)


def test_a_network_simulates_and_is_not_the_studied_one(built: tuple[Path, study.Bundle], tmp_path: Path) -> None:
    folder, _ = built
    other = small_network()
    with torch.no_grad():
        other.module[6].weight.add_(0.1)
    journal = study.simulate(folder / "study", tmp_path / ANSWERS, model=other)
    assert {each.joined.simulated for each in journal.participants.values()} == {"small (random), margin 0.02"}
    assert all(each.next_question is None for each in journal.participants.values())
    same = sf.LoadedModel("another", small_network().module, small_network().preprocess, None, "elsewhere")
    with pytest.raises(sf.InvalidInputError, match="the study is about another .elsewhere. itself"):
        study.simulate(folder / "study", tmp_path / "no.jsonl", model=same)
    with pytest.raises(sf.InvalidInputError, match="model is a int: pass what"):
        study.simulate(folder / "study", tmp_path / "no.jsonl", model=5)


def test_a_study_of_few_tasks_is_not_simulated(tmp_path: Path) -> None:
    study_in(tmp_path, tasks=2)
    with pytest.raises(sf.InvalidInputError, match="has 2 tasks, .* at least 3"):
        study.simulate(tmp_path)


def test_answers_that_a_server_writes_are_not_simulated(small: OpenBundle) -> None:
    with held_file(small.path / ANSWERS), pytest.raises(sf.InvalidInputError, match="another run writes"):
        study.simulate(small.path)
    for wrong in (-0.1, 3, "much"):
        with pytest.raises(sf.InvalidInputError, match="margin must be"):
            study.simulate(small.path, margin=wrong)
    with pytest.raises(sf.InvalidInputError, match="participants must be"):
        study.simulate(small.path, participants=0)
