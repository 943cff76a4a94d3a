"""Folders of photographs, and the classes that their names tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from spade_fast.errors import InvalidInputError
from spade_fast.imagesets import image_files, named_files


def made(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def names_of(root: Path) -> list[tuple[str, int | None]]:
    return [(path.relative_to(root).as_posix(), label) for path, label in image_files(root)]


def test_names_that_begin_with_the_class(tmp_path: Path) -> None:
    made(tmp_path, "0281_tabby.jpg", "sub/0007_cock.PNG", "notes.txt", ".0001_hidden.jpg")
    assert names_of(tmp_path) == [("0281_tabby.jpg", 281), ("sub/0007_cock.PNG", 7)]


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    made(tmp_path, "cat/b.jpg", "cat/deep/a.jpg", "ant/1.jpeg", "bee/0003_x.webp")
    assert names_of(tmp_path) == [("ant/1.jpeg", 0), ("bee/0003_x.webp", 1), ("cat/b.jpg", 2), ("cat/deep/a.jpg", 2)]


def test_folders_are_classes_if_there_are_as_many(tmp_path: Path) -> None:
    made(tmp_path, "cat/b.jpg", "ant/1.jpeg")
    assert [label for _, label in image_files(tmp_path, classes=2)] == [0, 1]
    assert [label for _, label in image_files(tmp_path, classes=1000)] == [None, None]
    made(tmp_path / "other", "0007_b.jpg", "0001_c.jpg")
    assert [label for _, label in image_files(tmp_path / "other", classes=1000)] == [1, 7]


def test_names_that_tell_nothing(tmp_path: Path) -> None:
    made(tmp_path, "cat/b.jpg", "a.jpg", "0001_c.jpg")
    assert names_of(tmp_path) == [("0001_c.jpg", None), ("a.jpg", None), ("cat/b.jpg", None)]


def test_what_is_no_class_and_no_photograph(tmp_path: Path) -> None:
    made(tmp_path, "20230101_0001.png", "20230101_0002.png", "readme.pdf", "x.h5", ".thumbs/c.jpg")
    assert names_of(tmp_path) == [("20230101_0001.png", None), ("20230101_0002.png", None)]


def test_folders_without_images(tmp_path: Path) -> None:
    made(tmp_path, "notes.txt")
    with pytest.raises(InvalidInputError, match="no file in .* has the extension of an image"):
        image_files(tmp_path)
    with pytest.raises(InvalidInputError, match="absent' is no folder"):
        image_files(tmp_path / "absent")
    with pytest.raises(InvalidInputError, match=r"notes\.txt' is no folder"):
        image_files(tmp_path / "notes.txt")


def test_dead_links_are_among_the_files(tmp_path: Path) -> None:
    """So that what reads them tells of them."""
    made(tmp_path, "a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "folder.png").mkdir()
    assert list(named_files(tmp_path)) == ["a.png", "gone.png"]


def test_files_by_their_paths_in_the_folder(tmp_path: Path) -> None:
    made(tmp_path, "a.png", "cats/a.png")
    assert named_files(tmp_path) == {"a.png": tmp_path / "a.png", "cats/a.png": tmp_path / "cats" / "a.png"}
