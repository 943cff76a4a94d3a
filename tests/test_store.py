"""Stores: what is read is what was written, whatever the images are called; damage is refused by the file's name."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import spade_fast as sf
from spade_fast.errors import InvalidInputError
from spade_fast.files import read_tensors, tensor_bytes
from spade_fast.imagesets import ListedImage
from spade_fast.store import StoreWriter, file_name, image_bytes, refusal_bytes
from spade_fast.traces import LayerTrace, Trace

pytest.importorskip("pyarrow")

SETTINGS: dict[str, Any] = {"model": "small", "trace": {"seed": 0, "damping": 0.01}}
ENVIRONMENT = {"torch": "2.11", "threads": 1}


def trace(seed: int = 0) -> Trace:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, 5, generator=generator) < 0.5
    weight = torch.randn(3, 5, generator=generator) * mask
    return Trace({"fc": LayerTrace(weight, mask, 0.5, 0.25, 0.01)}, {"stem": "first layer"}, {"seed": seed})


def listed(name: str, **more: Any) -> ListedImage:
    return ListedImage(name, Path("photographs") / name, **more)


def record(image: ListedImage, writer: StoreWriter, **more: Any) -> dict[str, Any]:
    return {**writer.known(image), "image_sha256": "abc", **more}


def map_of(seed: int) -> Tensor:
    return torch.rand(4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def writer(tmp_path: Path) -> StoreWriter:
    (tmp_path / "store").mkdir()
    return StoreWriter(tmp_path / "store", SETTINGS, ENVIRONMENT)


@pytest.fixture
def store(writer: StoreWriter) -> sf.Store:
    """Two images, one of them with maps and figures, and a refused one."""
    for seed, (name, more) in enumerate(
        {
            "b/cat.jpg": {"labels": {"set": "attacked"}},
            "a dog.jpg": {"target": 3},
        }.items()
    ):
        image = listed(name, **more)
        known = record(
            image,
            writer,
            target=3,
            target_name="tabby",
            sparsity=trace(seed).sparsity,
            probability={"dense": 0.5, "spade": 0.25},
            answers={network: [{"index": 3, "name": "tabby", "probability": 0.5}] for network in ("dense", "spade")},
            metrics={"insertion": {"dense": {"saliency": 0.5}, "spade": {"saliency": 0.75}}} if seed == 0 else {},
        )
        maps = {"saliency": map_of(1)}, {"saliency": map_of(2)}
        writer.put(image, image_bytes(known, trace(seed), *(maps if seed == 0 else ({}, {}))))
    bad = listed("c.jpg")
    writer.put(bad, refusal_bytes(writer.known(bad), "it is empty"))
    return writer.write_index()


def test_what_is_read_is_what_was_written(store: sf.Store) -> None:
    assert list(store) == ["a dog.jpg", "b/cat.jpg"]
    assert len(store) == 2
    assert store.settings == SETTINGS
    assert store.manifest["environment"] == ENVIRONMENT
    cat = store["b/cat.jpg"]
    assert torch.equal(cat.trace.layers["fc"].weight, trace(0).layers["fc"].weight)
    assert torch.equal(cat.trace.layers["fc"].mask, trace(0).layers["fc"].mask)
    assert cat.trace.rows() == trace(0).rows()
    assert dict(cat.trace.dense) == {"stem": "first layer"}
    assert dict(cat.trace.settings) == {"seed": 0}
    assert torch.equal(cat.dense["saliency"], map_of(1))
    assert torch.equal(cat.spade["saliency"], map_of(2))
    assert cat.record["labels"] == {"set": "attacked"}
    assert cat.record["asked_target"] is None
    dog = store["a dog.jpg"]
    assert dog.record["asked_target"] == 3
    assert dict(dog.dense) == dict(dog.spade) == {}
    assert store.refused == {"c.jpg": "it is empty"}
    with pytest.raises(InvalidInputError, match=r"^'c\.jpg' has no trace: it is empty$"):
        store["c.jpg"]
    assert "c.jpg" not in store
    assert "nobody.jpg" not in store
    with pytest.raises(KeyError):
        store["nobody.jpg"]


def test_the_index_has_a_row_for_each_image(store: sf.Store) -> None:
    from pyarrow import parquet

    table = parquet.read_table(store.path / "index.parquet")
    assert table.to_pylist() == [
        {**dict.fromkeys(table.column_names), **row} for row in store.rows()
    ]  # the same, with None for what an image has not
    dog, cat, bad = table.to_pylist()
    assert (dog["name"], cat["name"], bad["name"]) == ("a dog.jpg", "b/cat.jpg", "c.jpg")
    assert (cat["insertion_dense_saliency"], cat["insertion_spade_saliency"]) == (0.5, 0.75)
    assert (cat["label_set"], dog["label_set"]) == ("attacked", None)
    assert (cat["target"], cat["target_name"], cat["dense_answer"], cat["spade_probability"]) == (3, "tabby", 3, 0.25)
    assert cat["sparsity"] == trace(0).sparsity
    assert (bad["refused"], bad["target"], bad["image_sha256"]) == ("it is empty", None, None)
    assert (store.path / cat["file"]).is_file()
    kinds = {name: str(table.schema.field(name).type) for name in ("name", "target", "sparsity", "refused")}
    assert kinds == {"name": "string", "target": "int64", "sparsity": "double", "refused": "string"}


def test_files_of_images_are_told_apart_whatever_those_are_called() -> None:
    names = [
        "a.jpg",
        "A.jpg",
        "a/b.jpg",
        "a_b.jpg",
        "../../etc/passwd",
        ".hidden",
        "Katze für alle.jpg",
        "x" * 5000,
        "猫",
        "\ud800",
    ]
    files = [file_name(name) for name in names]
    assert len({file.lower() for file in files}) == len(names)
    for file in files:
        assert file.isascii()
        assert len(file) < 100
        assert Path(file).name == file
        assert not file.startswith(".")


def test_an_image_is_kept_only_if_it_is_whole_and_answers_the_same_question(store: sf.Store, tmp_path: Path) -> None:
    writer = StoreWriter(store.path, SETTINGS, ENVIRONMENT)
    assert writer.has(listed("b/cat.jpg", labels={"set": "attacked"}), "abc")
    assert not writer.has(listed("new.jpg"), "abc")
    assert not writer.has(listed("c.jpg"), "abc")  # which is tried again
    for image, sha256, different in (
        (listed("b/cat.jpg", labels={"set": "attacked"}), "abd", "image_sha256"),
        (listed("b/cat.jpg", labels={"set": "clean"}), "abc", "labels"),
        (listed("a dog.jpg", target=4), "abc", "asked_target"),
    ):
        with pytest.raises(InvalidInputError, match=f"it had another {different} when '.*cat|dog.*' was written"):
            writer.has(image, sha256)
    other = tmp_path / "other"
    other.mkdir()
    elsewhere = StoreWriter(other, {**SETTINGS, "model": "large"}, ENVIRONMENT)
    file = store.file_of("a dog.jpg")
    (other / "images").mkdir()
    (other / "images" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InvalidInputError, match="it had another settings_sha256"):
        elsewhere.has(listed("a dog.jpg", target=3), "abc")


def damages(file: Path) -> dict[str, Callable[[], object]]:
    whole = file.read_bytes()

    def flipped(position: int) -> bytes:
        return whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :]

    def rewritten() -> None:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("spade:")}, file, metadata)

    return {
        "cut": lambda: file.write_bytes(whole[: len(whole) // 2]),
        "a byte short": lambda: file.write_bytes(whole[:-1]),
        "empty": lambda: file.write_bytes(b""),
        "a weight flipped": lambda: file.write_bytes(flipped(len(whole) - 3)),
        "a length flipped": lambda: file.write_bytes(flipped(0)),
        "a map lost": rewritten,
        "a figure changed": lambda: file.write_bytes(whole.replace(b'spade\\": 0.25', b'spade\\": 0.75', 1)),
    }


@pytest.mark.parametrize("kind", ["cut", "a byte short", "empty", "a weight flipped", "a length flipped", "a map lost",
                                  "a figure changed"])  # fmt: skip
def test_damage_is_refused_by_the_files_name(store: sf.Store, kind: str) -> None:
    file = store.file_of("b/cat.jpg")
    before = file.read_bytes()
    damages(file)[kind]()
    assert file.read_bytes() != before
    with (
        warnings.catch_warnings(),
        pytest.raises(InvalidInputError, match=r"b_cat\.jpg-[0-9a-f]{16}\.safetensors"),
    ):
        warnings.simplefilter("ignore")  # that it is left out
        sf.Store(store.path)["b/cat.jpg"]
    with pytest.raises(InvalidInputError, match=r"b_cat\.jpg-[0-9a-f]{16}\.safetensors"):
        StoreWriter(store.path, SETTINGS, ENVIRONMENT).has(listed("b/cat.jpg", labels={"set": "attacked"}), "abc")


def test_a_file_of_another_image_is_not_taken_for_this_one(store: sf.Store) -> None:
    store.file_of("a dog.jpg").rename(store.file_of("b/cat.jpg"))
    found = sf.Store(store.path)
    with pytest.warns(
        UserWarning, match="b_cat.* is another image's file, renamed: left out; run again on its image, or delete it"
    ):
        assert list(found) == []
    with pytest.raises(InvalidInputError, match="is another image's file, renamed"):
        found["b/cat.jpg"]
    with pytest.raises(KeyError):
        found["a dog.jpg"]


def test_one_damaged_file_leaves_the_others_readable(store: sf.Store) -> None:
    damaged = store.file_of("b/cat.jpg")
    damaged.write_bytes(b"damaged")
    damaged.with_name("stray.safetensors").write_bytes(b"")
    found = sf.Store(store.path)
    with pytest.warns(UserWarning, match=r"b_cat.*: left out \(one of 2 such files\); run again") as caught:
        assert list(found) == ["a dog.jpg"]
    assert list(found.damaged) == [damaged.name, "stray.safetensors"]
    assert torch.equal(found["a dog.jpg"].trace.layers["fc"].weight, trace(1).layers["fc"].weight)
    assert "b/cat.jpg" not in found
    assert len(caught) == 1
    with pytest.raises(
        InvalidInputError, match=r"cannot read '.*b_cat\.jpg.*; run again on its image, or delete it$"
    ) as e:
        found.masks("b/cat.jpg")
    assert str(e.value).count("run again") == 1
    with pytest.warns(UserWarning, match="left out"):
        index = StoreWriter(store.path, SETTINGS, ENVIRONMENT).write_index()
    assert [row["name"] for row in index.rows()] == ["a dog.jpg", "c.jpg"]


@pytest.mark.parametrize(
    "change",
    [
        {"name": None},
        {"name": "\ud800"},
        {"labels": []},
        {"labels": {"set": 5}},
        {"target": "281"},
        {"sparsity": None},
        {"answers": {}},
        {"answers": {"dense": [], "spade": []}},
        {"answers": {"dense": [{"index": 1}], "spade": [{"index": 1}]}},
        {"answers": 5},
        {"probability": [0.5, 0.5]},
        {"metrics": {"insertion": 5}},
        {"metrics": {"insertion": {"dense": [5]}}},
        {"trace": None},
        {"settings_sha256": 5},
        {"settings_sha256": "of others"},
        {"refused": 5},
    ],
)
def test_records_that_lack_what_readers_rest_on(store: sf.Store, change: dict[str, Any]) -> None:
    """Whole by their checksums, as somebody else may have written them."""
    file = store.file_of("b/cat.jpg")
    with read_tensors(file, "spade_fast_image", "an image", "run") as (header, tensors):
        pass
    file.write_bytes(tensor_bytes("spade_fast_image", {**header, **change}, tensors))
    found = sf.Store(store.path)
    with pytest.warns(UserWarning, match="left out"):
        assert list(found) == ["a dog.jpg"]
    assert list(found.damaged) == [file.name]


def test_a_file_that_is_none_is_left_out_and_the_next_run_stops_at_it_by_name(store: sf.Store) -> None:
    file = store.file_of("b/cat.jpg")
    file.unlink()
    os.mkfifo(file)  # which would never end
    with pytest.warns(UserWarning, match="it is no regular file"):
        assert list(sf.Store(store.path)) == ["a dog.jpg"]
    file.unlink()
    file.mkdir()
    with pytest.warns(UserWarning, match="it is no regular file"):
        assert list(sf.Store(store.path)) == ["a dog.jpg"]
    writer = StoreWriter(store.path, SETTINGS, ENVIRONMENT)
    with pytest.raises(InvalidInputError, match=r"b_cat\.jpg.*' is no regular file: remove it"):
        writer.put(listed("b/cat.jpg"), b"")


def test_a_refusal_takes_the_place_of_an_answer_to_another_question_only(store: sf.Store) -> None:
    writer = StoreWriter(store.path, SETTINGS, ENVIRONMENT)
    image, before = listed("a dog.jpg", target=4), store.file_of("a dog.jpg").read_bytes()
    for sha256 in (None, "another"):  # the image cannot be read, or is another one
        writer.refuse(image, refusal_bytes(writer.known(image), "no such class"), sha256)
        assert store.file_of("a dog.jpg").read_bytes() == before
    writer.refuse(image, refusal_bytes(writer.known(image), "no such class"), "abc")
    assert sf.Store(store.path).refused["a dog.jpg"] == "no such class"


def test_what_is_no_name(store: sf.Store) -> None:
    assert 5 not in store
    with pytest.raises(KeyError):
        store[5]  # type: ignore[index]
    assert store.get("c.jpg") is store.get("nobody.jpg") is None
    assert store.get("a dog.jpg").record["asked_target"] == 3
    for path in (5, None, b"x"):
        with pytest.raises(InvalidInputError, match="is no store: pass the folder that run wrote"):
            sf.Store(path)  # type: ignore[arg-type]
    for path in ("a" * 300, "a\0b", ""):
        with pytest.raises(InvalidInputError, match="is no store"):
            sf.Store(path)


def test_what_changed_in_a_record_shows_without_a_look_at_the_tensors(store: sf.Store) -> None:
    file = store.file_of("b/cat.jpg")
    damages(file)["a figure changed"]()
    found = sf.Store(store.path)
    with pytest.warns(UserWarning, match="the checksum of its header does not fit it"):
        assert list(found.records) == ["a dog.jpg", "c.jpg"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot read '.*manifest.json'"),
        ("[" * 100_000, "cannot read '.*manifest.json'"),
        ("[]", "cannot read '.*manifest.json' \\(it is no object\\)"),
        ('{"format": 7}', "format 7, this version reads 1"),
        ('{"format": 1, "settings": 3, "environment": {}}', "no object"),
        ("\udcff", "cannot read '.*manifest.json'"),
    ],
)
def test_a_manifest_that_is_none(store: sf.Store, content: str, message: str) -> None:
    (store.path / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InvalidInputError, match=message):
        sf.Store(store.path)


def test_a_folder_that_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"is no store: it has no manifest\.json"):
        sf.Store(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InvalidInputError, match=r"is no store, but holds 'thesis\.tex': choose a new folder"):
        StoreWriter(tmp_path, SETTINGS, ENVIRONMENT)
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_store_goes_on_with_its_own_settings_only(store: sf.Store) -> None:
    with pytest.raises(
        InvalidInputError, match=r"is a store of trace\.damping 0\.01, not 0\.02: choose another folder"
    ):
        StoreWriter(store.path, {**SETTINGS, "trace": {"seed": 0, "damping": 0.02}}, ENVIRONMENT)
    with pytest.raises(InvalidInputError, match="is a store of methods None, not 'new'"):
        StoreWriter(store.path, {**SETTINGS, "methods": "new"}, ENVIRONMENT)
    with pytest.warns(UserWarning, match=r"was begun with torch '2\.11', now '2\.12': new bits may differ"):
        StoreWriter(store.path, SETTINGS, {**ENVIRONMENT, "torch": "2.12"})
    assert json.loads((store.path / "manifest.json").read_text())["environment"] == ENVIRONMENT


def test_what_killed_writers_left_is_cleared_away_and_nothing_else(store: sf.Store) -> None:
    leftover = store.path / "images" / f".{file_name('b/cat.jpg')}.x7d_0abc"
    manifests = store.path / ".manifest.json.abcd_123"
    indices = store.path / ".index.parquet.ab0_3xyz"
    for folder in (leftover, manifests, indices, store.path / ".git", store.path / "images" / ".mine"):
        folder.mkdir()
        (folder / "half").write_bytes(b"half")
    others = [store.path / ".manifest.json.swp", leftover.with_name(f"{leftover.name[:-9]}.Ab12Cd")]
    others[0].touch()
    others[1].mkdir()
    writer = StoreWriter(store.path, SETTINGS, ENVIRONMENT)
    writer.clear()
    assert not any(each.exists() for each in (leftover, manifests, indices))
    assert all(other.exists() for other in others)
    assert (store.path / ".git" / "half").exists()
    assert (store.path / "images" / ".mine" / "half").exists()
    assert list(sf.Store(store.path)) == list(store)
