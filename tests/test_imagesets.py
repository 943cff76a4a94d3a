"""Folders of photographs, and the classes that their names tell."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from spade_fast.errors import InvalidInputError
from spade_fast.imagesets import ListedImage, image_files, listed_images, named_files


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


def test_a_folder_of_images_beside_a_manifest_of_others_is_no_store(tmp_path: Path) -> None:
    made(tmp_path, "a/images/x.png", "b/y.png", "c/images/z.png", "c/images/deep/z.png", "d/manifest.json/w.png")
    for text in ('{"format": "coco", "files": ["x.png"]}', "[1]", "[" * 100_000, "no JSON"):
        (tmp_path / "a" / "manifest.json").write_text(text)
        assert list(named_files(tmp_path / "a")) == ["images/x.png"]
    (tmp_path / "c" / "manifest.json").write_text('{"format": 1, "settings": {}, "environment": {}}')
    assert list(named_files(tmp_path)) == ["a/images/x.png", "b/y.png", "d/manifest.json/w.png"]


def test_files_by_their_paths_in_the_folder(tmp_path: Path) -> None:
    made(tmp_path, "a.png", "cats/a.png")
    assert named_files(tmp_path) == {"a.png": tmp_path / "a.png", "cats/a.png": tmp_path / "cats" / "a.png"}


# Lists


def manifest(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "list.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_folder_lists_its_images_by_their_paths_in_it(tmp_path: Path) -> None:
    made(tmp_path, "b/1.jpg", "a.png", "notes.txt")
    assert listed_images(tmp_path) == [
        ListedImage("a.png", tmp_path / "a.png"),
        ListedImage("b/1.jpg", tmp_path / "b/1.jpg", labels={"folder": "b"}),
    ]


def test_what_lies_in_a_store_is_no_photograph(tmp_path: Path) -> None:
    made(tmp_path, "a.jpg", "store/images/b.png", "store/manifest.json", "store/comparison/overlap.png", "images/c.jpg")
    (tmp_path / "store" / "manifest.json").write_text('{"format": 1, "settings": {}, "environment": {}}')
    assert [each.name for each in listed_images(tmp_path)] == ["a.jpg", "images/c.jpg"]


def test_paths_and_paths_by_name(tmp_path: Path) -> None:
    assert listed_images(["x/1.jpg", Path("2.jpg")]) == [
        ListedImage("x/1.jpg", Path("x/1.jpg")),
        ListedImage("2.jpg", Path("2.jpg")),
    ]
    assert listed_images({"one": "x/1.jpg"}) == [ListedImage("one", Path("x/1.jpg"))]
    assert listed_images([os.fsdecode(b"caf\xe9.jpg")])[0].name == "caf\\xe9.jpg"
    with pytest.raises(InvalidInputError, match=r"image 'a\.jpg' is named twice"):
        listed_images(["a.jpg", "b.jpg", Path("a.jpg")])
    for nothing in ([], {}):
        with pytest.raises(InvalidInputError, match="no image is named"):
            listed_images(nothing)
    with pytest.raises(InvalidInputError, match="images is a int: pass a folder, a manifest, or paths"):
        listed_images(3)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="root is for a manifest"):
        listed_images(["a.jpg"], root=tmp_path)


def test_a_manifest_has_names_targets_and_labels(tmp_path: Path) -> None:
    path = manifest(
        tmp_path,
        "\ufeffimage,target,name,set,note\n"
        'photos/1.jpg,281,cat,attacked,"two, with\na break"\n'
        "2.jpg,,,clean,\n"
        "\n"
        "gone.jpg,7.0,,clean,\n",
    )
    assert listed_images(path) == [
        ListedImage("cat", tmp_path / "photos/1.jpg", 281, {"set": "attacked", "note": "two, with\na break"}),
        ListedImage("2.jpg", tmp_path / "2.jpg", None, {"set": "clean", "note": ""}),
        ListedImage("gone.jpg", tmp_path / "gone.jpg", 7, {"set": "clean", "note": ""}),
    ]
    (tmp_path / "photos").mkdir()
    (found,) = listed_images(manifest(tmp_path, "image\n1.jpg\n"), root=tmp_path / "photos")
    assert found.path == tmp_path / "photos/1.jpg"


def test_a_manifest_of_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"image": ["1.jpg", "2.jpg"], "target": [281, None], "set": ["attacked", None], "rank": [1, 2]}
    path = tmp_path / "list.parquet"
    parquet.write_table(arrow.table(columns), path)
    assert listed_images(path) == [
        ListedImage("1.jpg", tmp_path / "1.jpg", 281, {"set": "attacked", "rank": "1"}),
        ListedImage("2.jpg", tmp_path / "2.jpg", None, {"set": "", "rank": "2"}),
    ]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InvalidInputError, match=r"cannot read manifest '.*list\.parquet' as Parquet"):
        listed_images(path)
    parquet.write_table(arrow.table({"image": [b"1.jpg"]}), path)
    with pytest.raises(InvalidInputError, match=r"column 'image' of .* is of type binary: make it text"):
        listed_images(path)
    parquet.write_table(arrow.table({"image": ["1.jpg"], "name": [1.0]}), path)
    with pytest.raises(InvalidInputError, match=r"column 'name' of .* is of type double: make it text"):
        listed_images(path)
    parquet.write_table(arrow.table({"image": ["1.jpg"], "set": [[1]]}), path)
    with pytest.raises(InvalidInputError, match=r"column 'set' of .* cannot be read as text"):
        listed_images(path)
    parquet.write_table(arrow.table({"image": ["1.jpg"], "Image": ["2.jpg"]}).rename_columns(["image", "image"]), path)
    with pytest.raises(InvalidInputError, match="two columns of .* have one name"):
        listed_images(path)
    far = arrow.array([2**30], type=arrow.int32()).cast(arrow.date32())
    moment = arrow.array([1_700_000_000_123_456_789], type=arrow.timestamp("ns"))
    columns = {"image": arrow.array(["1.jpg"]).dictionary_encode(), "target": [math.nan], "day": far, "at": moment}
    parquet.write_table(arrow.table(columns), path)
    (found,) = listed_images(path)
    assert found.target is None
    assert found.labels["at"] == "2023-11-14 22:13:20.123456789"
    invalid = arrow.Array.from_buffers(
        arrow.string(), 1, [None, *map(arrow.py_buffer, (bytes(4) + b"\1\0\0\0", b"\xff"))]
    )
    parquet.write_table(arrow.table({"image": invalid}), path)
    with pytest.raises(InvalidInputError, match=r"column 'image' .* cannot be read as text \(UnicodeDecodeError"):
        listed_images(path)


def test_spaces_behind_commas_belong_to_nothing(tmp_path: Path) -> None:
    path = manifest(tmp_path, 'image , target, note\n1.jpg, 7, "a, b"\n')
    assert listed_images(path) == [ListedImage("1.jpg", tmp_path / "1.jpg", 7, {"note": "a, b"})]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([5], r"images\[0\] is a int: pass the path of an image file"),
        (["a.jpg", b"b.jpg"], r"images\[1\] is a bytes: pass the path"),
        ({"x": 5}, r"images\['x'\] is a int: pass the path"),
        ({5: "a.jpg"}, "5 is no name of an image: pass text"),
        ({"": "a.jpg"}, "'' is no name of an image"),
        (5, "images is a int: pass a folder, a manifest, or paths"),
        ([], "no image is named"),
        (["a.jpg", "a.jpg"], "'a.jpg' is named twice"),
    ],
)
def test_lists_that_are_none(images: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        listed_images(images)


def test_names_that_are_no_text_are_shown_as_such() -> None:
    names = ["\udcff.jpg", "\ud800.jpg", "ä.jpg"]  # a byte that is no UTF-8, half of a character, and text
    assert [each.name for each in listed_images(names)] == [r"\xff.jpg", r"\ud800.jpg", "ä.jpg"]
    assert [os.fspath(each.path) for each in listed_images(names)] == names


def test_a_file_that_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.jpg\n")
    with pytest.raises(
        InvalidInputError, match=r"list\.txt' is neither a folder of images nor a manifest: pass a \.csv"
    ):
        listed_images(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image\n../secret.jpg\n", r"row 1 of manifest '.*list\.csv': '\.\./secret\.jpg' is outside of"),
        ("image\na.jpg\n/etc/passwd\n", "row 2 of .* '/etc/passwd' is outside of"),
        ("image\nsub/../../secret.jpg\n", "is outside of"),
        ("image\nsub/../a.jpg\n", "is outside of"),  # as written, whatever it comes to
        ("image\nlink/secret.jpg\n", "'link/secret.jpg' is outside of"),
        ("image\n''\n\"\"\n", "row 2 of .*: '' is no path"),
        ("image,target\na.jpg,cat\n", "target 'cat' is no index of a class"),
        ("image,target\na.jpg,-1\n", "target '-1' is no index"),
        ("image,target\na.jpg,1.5\n", "target '1.5' is no index"),
        ("image,target\na.jpg,1e99\n", "target '1e99' is no index"),
        ("image,target\na.jpg,nan\n", "target 'nan' is no index .*: leave it empty where there is none"),
        ("image,target\na.jpg,1_0\n", "target '1_0' is no index"),
        ("image,target\na.jpg,\u0663\n", "target '\u0663' is no index"),
        ("Image,Target\na.jpg,1\n", "no column 'image', but 'Image', 'Target'; write it in small letters"),
        ('image\na.jpg\n"b.jpg\n', "at line [0-9] .*: mend it there"),
        ("image\na.jpg\na.jpg\n", "row 2 of .*: 'a.jpg' is named twice: leave one out, or give each a name"),
        ("image,set\na.jpg\n", "row 1 of .* has not 2 values"),
        ("image,set\na.jpg,1,2\n", "row 1 of .* has not 2 values"),
        ("path\na.jpg\n", "has no column 'image', but 'path'"),
        ("image,set,set\na.jpg,1,2\n", "two columns of .* have one name"),
        ("image,\na.jpg,1\n", "column 2 of .* has no name: give it one"),
        ("image;target\na.jpg;1\n", "no column 'image', but 'image;target'; separate columns by commas"),
        ("image\ttarget\na.jpg\t1\n", "separate columns by commas"),
        ("image,target\na.jpg," + 5000 * "9" + "\n", "target '9{200} ...' is no index of a class"),
        ("image\nLIST/a.jpg\n", "is outside of"),  # its own folder, yet absolute
        ("image\n", "names no image"),
        ("", "has no column 'image', but none at all"),
        ('image\n"a.jpg\n', "cannot read manifest"),
        ("image\na\0.jpg\n", "cannot read manifest|is no path"),
    ],
)
def test_manifests_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "secret.jpg").touch()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(InvalidInputError, match=message):
        listed_images(manifest(folder, text.replace("LIST", str(folder))))


def test_manifests_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "round.jpg").symlink_to(tmp_path / "round.jpg")
    assert [each.name for each in listed_images(manifest(tmp_path, "image\nround.jpg\n"))] == ["round.jpg"]
    for name in ("a" * 300, "a\0b"):
        with pytest.raises(InvalidInputError, match="is no folder"):
            listed_images(name)
    with pytest.raises(InvalidInputError, match="images is empty"):
        listed_images("")
    with pytest.raises(InvalidInputError, match="images is a bytes"):
        listed_images(b"abc")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"cannot read manifest '.*none\.csv' \(No such file"):
        listed_images(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"image\n\xff\xfe\xfa.jpg\n")
    with pytest.raises(InvalidInputError, match=r"cannot read manifest '.*binary\.csv'.*UTF-8"):
        listed_images(tmp_path / "binary.csv")
    with pytest.raises(InvalidInputError, match="'nowhere' is no folder: pass as root"):
        listed_images(manifest(tmp_path, "image\na.jpg\n"), root="nowhere")
