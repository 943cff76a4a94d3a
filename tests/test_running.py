"""Runs over many images: the same store however they run, are cut short, damaged or short of memory; refusals."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import multiprocessing
import os
import re
import resource
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from subjects import SIDE, photographs, quarters
from torch import Tensor, nn

import spade_fast as sf
from spade_fast import lanes, running, worker
from spade_fast.errors import InvalidInputError
from spade_fast.files import LOCK, held_folder
from spade_fast.imagesets import ListedImage
from spade_fast.interruption import Interrupted, checkpoint, interruptible
from spade_fast.methods import _METHODS, Method, Question
from spade_fast.models import LoadedModel
from spade_fast.randomness import seeded

pytest.importorskip("pyarrow")
pytest.importorskip("captum")
pytestmark = pytest.mark.filterwarnings("ignore:.*have no weight left")

METHODS = ("saliency", "lrp", "gradient_shap")  # one that looks inside, one that draws at random
QUICK: dict[str, Any] = {"num_augmentations": 4}


def run(images: Any, out: Path, **more: Any) -> running.RunSummary:
    return sf.run(more.pop("model", None) or quarters(), images, out, 0.5, **{"methods": METHODS, **QUICK, **more})


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file, by its path."""
    files = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eight photographs and a file that is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    photographs(folder, 8)
    (folder / "broken.png").write_bytes(b"not an image")
    return folder


@pytest.fixture
def method() -> Iterator[Any]:
    """Registers a method of that name for the length of a test."""
    names = []

    def register(name: str, compute: Any) -> None:
        _METHODS[name] = Method(name, compute)  # without the turns that `register_method` makes them take
        names.append(name)

    yield register
    for name in names:
        del _METHODS[name]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def saliency(question: Question) -> Tensor:
    with torch.enable_grad():
        score = question.forward(question.inputs)[0, question.target]
        return torch.autograd.grad(score, question.inputs)[0]


# What is made


def test_an_image_is_traced_and_explained_as_by_hand(images: Path, tmp_path: Path) -> None:
    model = quarters()
    summary = run(images, tmp_path / "out", model=model, metrics=("insertion", "deletion"), steps=6, seed=3)
    assert (summary.images, summary.made, summary.kept) == (9, 8, 0)
    assert list(summary.refused) == ["broken.png"]
    store = sf.Store(tmp_path / "out")
    assert list(store) == [f"{i:02}.png" for i in range(8)]
    for name in ("00.png", "05.png"):
        found = store[name]
        photo = sf.load_image(images / name)
        with one_thread():  # as each image of a run has
            by_hand = sf.explain(model, photo, methods=METHODS, sparsity=0.5, seed=3, **QUICK)
        for maps, expected in ((found.dense, by_hand.dense), (found.spade, by_hand.spade)):
            assert list(maps) == sorted(METHODS)
            for each in METHODS:
                assert torch.equal(maps[each], expected[each]), each
        for layer, own in by_hand.trace.layers.items():
            assert torch.equal(found.trace.layers[layer].weight, own.weight)
        assert dict(found.trace.settings) == dict(by_hand.trace.settings)
        record = found.record
        assert record["target"] == by_hand.target
        assert record["probability"] == {"dense": by_hand.dense_probability, "spade": by_hand.spade_probability}
        assert record["answers"]["spade"][0]["index"] == by_hand.spade_predictions[0].index
        assert record["sparsity"] == by_hand.trace.sparsity
        inputs = model.preprocess(model.preprocess.view(photo)[None])
        stack = torch.stack([by_hand.spade[each] for each in METHODS])
        areas = sf.metrics.deletion(model, inputs, stack, by_hand.target, steps=6, seed=3).auc.tolist()
        assert record["metrics"]["deletion"]["spade"] == pytest.approx(dict(zip(METHODS, areas, strict=True)), abs=1e-6)
        assert set(record["metrics"]) == {"insertion", "deletion"}
    environment = store["00.png"].record["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == 1
    assert store.manifest["environment"] == environment


def test_the_network_is_left_as_it_was(images: Path, tmp_path: Path) -> None:
    model = quarters()
    model.module.train()
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    parameters = list(model.module.parameters())
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    for count in (1, 2):
        run(images, tmp_path / f"out{count}", model=model, in_flight=count)
        assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert all(module.training for module in model.module.modules())
    assert all(mine is now for mine, now in zip(parameters, model.module.parameters(), strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.module.state_dict().items())
    assert not any(module._forward_hooks for module in model.module.modules())


def test_the_store_is_the_same_however_many_images_are_in_flight(images: Path, tmp_path: Path) -> None:
    for count in (1, 2, 3):
        run(images, tmp_path / f"out{count}", metrics=("insertion",), steps=4, in_flight=count)
    expected = contents(tmp_path / "out1")
    assert len(expected) == 9 + 3  # manifest, index and lock
    assert contents(tmp_path / "out2") == contents(tmp_path / "out3") == expected


def test_images_are_worked_on_side_by_side(images: Path, tmp_path: Path, method: Any) -> None:
    both = threading.Barrier(2, timeout=60)

    def together(question: Question) -> Tensor:
        both.wait()  # for another image to come as far
        return saliency(question)

    method("together", together)
    summary = run([images / f"{i:02}.png" for i in range(4)], tmp_path / "out", methods=["together"], in_flight=2)
    assert summary.made == 4


def test_traces_alone_and_targets_and_labels_of_a_manifest(images: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_text("image,target,set\n00.png,2,attacked\n01.png,,clean\n")
    run(manifest, tmp_path / "out", methods=(), root=images)
    store = sf.Store(tmp_path / "out")
    assert store["00.png"].record["target"] == 2
    assert store["01.png"].record["target"] == 1
    assert store["00.png"].record["labels"] == {"set": "attacked"}
    assert dict(store["00.png"].dense) == {}
    assert "captum" not in store["00.png"].record["environment"]
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("image,target\n00.png,4\n02.png,\n")
    summary = run(wrong, tmp_path / "out", methods=(), root=images)
    assert summary.made == 1
    assert "target 4 is no class of this model" in summary.refused["00.png"]
    assert dict(summary.remade) == {}
    # What the store had of it answered another question.
    assert sf.Store(tmp_path / "out").refused["00.png"] == summary.refused["00.png"]


def test_the_order_of_names_changes_nothing(images: Path, tmp_path: Path) -> None:
    one = {"methods": ("saliency", "lrp"), "metrics": ("insertion", "deletion")}
    other = {key: names[::-1] for key, names in one.items()}
    for out, more in (("one", one), ("other", other)):
        run(images, tmp_path / out, steps=4, **more)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    assert run(images, tmp_path / "one", steps=4, **other).kept == 8


def test_inside_of_inference_mode(images: Path, tmp_path: Path) -> None:
    model = quarters()
    with torch.inference_mode():
        run([images / "00.png"], tmp_path / "inside", model=model, in_flight=1)
    run([images / "00.png"], tmp_path / "outside", in_flight=1)
    assert contents(tmp_path / "inside") == contents(tmp_path / "outside")


def test_a_network_with_a_state_of_its_own(images: Path, tmp_path: Path) -> None:
    model = quarters()
    model.module.get_extra_state = lambda: {"epoch": 3}  # type: ignore[method-assign]
    assert run(images, tmp_path / "out", model=model, methods=()).made == 8


# Going on


def test_a_second_run_keeps_what_is_whole_and_makes_the_rest_anew(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(images, out)
    expected = contents(out)
    store = sf.Store(out)
    times = {name: store.file_of(name).stat().st_mtime_ns for name in store}
    store.file_of("01.png").unlink()
    whole = store.file_of("02.png").read_bytes()
    store.file_of("02.png").write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    store.file_of("03.png").write_bytes(b"")
    summary = run(images, out)
    assert (summary.made, summary.kept) == (3, 5)
    assert list(summary.remade) == ["02.png", "03.png"]
    assert "its checksum does not fit its contents" in summary.remade["02.png"]
    assert contents(out) == expected
    kept = set(times) - {"01.png", "02.png", "03.png"}
    assert all(store.file_of(name).stat().st_mtime_ns == times[name] for name in kept)


def test_an_image_that_has_changed_is_traced_anew_and_one_that_is_mended_is_tried_again(
    images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(images, out)
    shutil.copy(images / "00.png", images / "04.png")
    shutil.copy(images / "00.png", images / "broken.png")
    summary = run(images, out)
    assert (summary.made, summary.kept, dict(summary.refused)) == (2, 7, {})
    assert list(summary.remade) == ["04.png"]
    assert "it had another image_sha256" in summary.remade["04.png"]
    store = sf.Store(out)
    for layer, own in store["00.png"].trace.layers.items():
        assert torch.equal(store["broken.png"].trace.layers[layer].weight, own.weight)


def test_what_was_made_is_not_lost_where_an_image_can_no_more_be_read(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(images, out, methods=("saliency",))
    before = contents(out)
    images.rename(tmp_path / "elsewhere")
    listed = {f"0{i}.png": images / f"0{i}.png" for i in range(3)}
    summary = run(listed, out, methods=("saliency",))
    assert list(summary.refused) == list(listed)
    assert contents(out) == before
    (images.parent / "elsewhere").rename(images)
    (images / "00.png").write_bytes(b"damaged now")
    assert "00.png" in run(images, out, methods=("saliency",)).refused
    assert contents(out) == before


def test_a_store_grows_with_other_lists(images: Path, tmp_path: Path) -> None:
    run({"one": images / "00.png"}, tmp_path / "out")
    summary = run({"two": images / "01.png", "none": images / "none.png"}, tmp_path / "out")
    assert (summary.images, summary.made, summary.others) == (2, 1, 1)
    assert run({"one": images / "00.png"}, tmp_path / "out").others == 2
    assert list(sf.Store(tmp_path / "out")) == ["one", "two"]


def test_other_settings_or_weights_are_refused(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "out")
    before = contents(tmp_path / "out")
    other, hooked = quarters(), quarters()
    hooked.module.stem.register_forward_hook(lambda _module, _inputs, outputs: 2 * outputs)
    with torch.no_grad():
        other.module.classifier.bias.add_(1)
    for more, what in (
        ({"seed": 1}, "seed 0, not 1"),
        ({"methods": ("saliency",)}, "methods"),
        ({"num_augmentations": 5}, "trace.num_augmentations 4, not 5"),
        ({"damping": 0.1}, "trace.damping 0.01, not 0.1"),
        ({"model": other}, "weights_sha256"),
        ({"model": hooked, "methods": ("saliency",)}, "modules_sha256"),
        ({"model": replace(other, module=nn.Sequential(other.module))}, "weights_sha256|modules_sha256"),
        ({"model": replace(quarters(), name="another")}, "model 'quarters', not 'another'"),
    ):
        with pytest.raises(InvalidInputError, match=f"is a store of {what}.*choose another folder"):
            run(images, tmp_path / "out", **more)
    assert contents(tmp_path / "out") == before
    same = run(images, tmp_path / "out", damping=0.01, refit=False, methods=METHODS[::-1])  # as by default
    assert (same.made, same.kept) == (0, 8)
    assert contents(tmp_path / "out") == before


def test_a_stray_file_in_a_store_stops_no_run(images: Path, tmp_path: Path) -> None:
    run({"one": images / "00.png"}, tmp_path / "out", methods=("saliency",))
    stray = tmp_path / "out" / "images" / "stray.safetensors"
    stray.write_bytes(b"none of ours")
    with pytest.warns(UserWarning, match=r"stray\.safetensors' .*: left out; run again"):
        summary = run({"two": images / "01.png"}, tmp_path / "out", methods=("saliency",))
    assert (summary.made, summary.others) == (1, 1)
    assert stray.read_bytes() == b"none of ours"


def test_one_run_at_a_time(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "out")
    before = contents(tmp_path / "out")
    with (
        held_folder(tmp_path / "out"),
        pytest.raises(InvalidInputError, match="another run writes to '.*out'"),
    ):
        run(images, tmp_path / "out")
    assert contents(tmp_path / "out") == before


# Faults


context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["subjects", "spade_fast.running", "spade_fast.cluster", "captum.attr", "pyarrow.parquet"]
)


def start(target: Any, *arguments: Any) -> Any:
    child = context.Process(target=target, args=arguments)
    child.start()
    return child


def whole_run(images: Path, out: Path, count: int) -> None:
    torch.set_num_threads(1)
    run(images, out, in_flight=count, methods=("saliency",))


def run_that_dies(images: Path, out: Path, step: int) -> None:
    """Dies by SIGKILL right before the given time that something is synced to the disk or renamed."""
    torch.set_num_threads(1)
    left = [step]

    def counted(do: Any) -> Any:
        def wrapper(*arguments: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return do(*arguments)

        return wrapper

    os.fsync = counted(os.fsync)
    Path.replace = counted(Path.replace)  # type: ignore[method-assign]
    run(images, out, in_flight=1, methods=("saliency",))


def test_a_run_that_is_killed_at_any_step_of_its_writing_goes_on_to_the_same_store(
    images: Path, tmp_path: Path
) -> None:
    run(images, tmp_path / "whole", in_flight=1, methods=("saliency",))
    out = tmp_path / "out"
    for step in range(1, 14):  # of folders, manifest, and of three images and more: sync, rename, sync of the folder
        child = start(run_that_dies, images, out, step)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        whole = contents(tmp_path / "whole")
        made = {name: digest for name, digest in contents(out).items() if not name.startswith(("images/.", "."))}
        assert made.items() <= whole.items()
        if step % 2:  # half of the time from scratch
            shutil.rmtree(out)
    run(images, out, in_flight=1, methods=("saliency",))
    assert contents(out) == contents(tmp_path / "whole")


def test_a_run_that_is_killed_at_twenty_random_moments_goes_on_to_the_same_store(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    photographs(folder, 40)
    child = start(whole_run, folder, tmp_path / "whole", 2)
    begun = time.monotonic()
    child.join()
    assert child.exitcode == 0
    duration = time.monotonic() - begun
    random = np.random.default_rng(0)
    kills, out = 0, tmp_path / "out"
    while kills < 20:
        child = start(whole_run, folder, out, 2)
        child.join(random.uniform(0, duration / 2))
        if child.exitcode is None:
            child.kill()
            child.join()
            kills += child.exitcode == -signal.SIGKILL
        else:  # it was done before
            assert child.exitcode == 0
            assert contents(out) == contents(tmp_path / "whole")
            shutil.rmtree(out)
    child = start(whole_run, folder, out, 2)
    child.join()
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("count", [1, 2])
def test_a_full_disk_ends_the_run_and_loses_nothing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    out = tmp_path / "out"
    sync, left = os.fsync, [9]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InvalidInputError, match=r"cannot write '.*\.safetensors' \(No space left on device\)"):
            run(images, out, in_flight=count)
    done = list(sf.Store(out))
    assert 0 < len(done) < 8
    assert [each.name for each in out.rglob(".*")] == [LOCK]
    summary = run(images, out)
    assert summary.kept == len(done)
    run(images, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_to(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInputError, match="cannot write to '.*file/out'.*choose another name"):
        run(images, tmp_path / "file" / "out")
    make = Path.mkdir

    def read_only(self: Path, *arguments: Any, **more: Any) -> None:
        if self.name == "out":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        make(self, *arguments, **more)

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(InvalidInputError, match="Read-only file system"):
        run(images, tmp_path / "out")


@pytest.mark.parametrize("count", [1, 2])
def test_ctrl_c_ends_the_run_at_once_and_the_next_one_goes_on(
    images: Path, tmp_path: Path, method: Any, count: int
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # also where it came ignored
    once = threading.Lock()  # a second Ctrl-C would not wait for the lanes

    def waits(question: Question) -> Tensor:
        if len(list((tmp_path / "out" / "images").glob("[!.]*"))) >= 4 and once.acquire(blocking=False):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(6000):
                time.sleep(0.01)
                checkpoint()
        return saliency(question)

    method("waits", waits)
    begun = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(images, tmp_path / "out", methods=["waits"], in_flight=count)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun < 50
    assert not any(thread.name.startswith("image") for thread in threading.enumerate())
    assert (tmp_path / "out" / "index.parquet").exists()
    summary = run(images, tmp_path / "out", methods=["waits"])
    assert 2 <= summary.kept < 8
    run(images, tmp_path / "whole", methods=["waits"])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_images_that_cannot_be_used_are_recorded_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    good = photographs(folder, 2)
    jpeg = folder / "cut.jpg"
    Image.effect_noise((64, 64), 80).convert("RGB").save(jpeg)
    jpeg.write_bytes(jpeg.read_bytes()[:900])
    flipped = bytearray(good["00.png"].read_bytes())
    flipped[60] ^= 255
    (folder / "flipped.png").write_bytes(flipped)
    (folder / "empty.png").touch()
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    Image.new("L", (20000, 20000)).save(folder / "bomb.png")
    Image.new("RGB", (900, 10)).save(folder / "stripe.png")
    listed = {path.name: path for path in sorted(folder.iterdir())} | {"pipe": tmp_path / "pipe", "folder": folder}
    summary = run(listed, tmp_path / "out")
    reasons = {
        "cut.jpg": "cut.jpg.*truncated",
        "flipped.png": "flipped.png",
        "empty.png": "empty.png' is empty",
        "gone.jpg": "gone.jpg' does not exist",
        "pipe": "no regular file",
        "folder": "is a directory",
        "bomb.png": "bomb.png' is too large to decode safely",
        "stripe.png": "20 times",
    }
    assert list(summary.refused) == sorted(reasons)
    for name, pattern in reasons.items():
        assert re.search(pattern, summary.refused[name]), summary.refused[name]
    store = sf.Store(tmp_path / "out")
    assert dict(store.refused) == dict(summary.refused)
    assert list(store) == list(good)


def test_what_fails_for_no_reason_we_know_is_recorded_unless_all_do(images: Path, tmp_path: Path, method: Any) -> None:
    failing = [True]

    def fails(question: Question) -> Tensor:
        if failing[0]:
            raise KeyError("a fault")
        return saliency(question)

    def makes_nothing(*_: Any, **__: Any) -> bytes:
        raise KeyError("a fault")

    method("fails", fails)
    three = [images / f"{i:02}.png" for i in range(3)]
    summary = run(three, tmp_path / "out", methods=["fails"])
    assert all("method 'fails' fails" in reason for reason in summary.refused.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.Worker, "make", makes_nothing)
        summary = run(three, tmp_path / "out", methods=["fails"])
        assert list(summary.refused.values()) == ["KeyError: 'a fault'"] * 3
        photographs(images, 12)
        with pytest.raises(InvalidInputError, match=r"8 images in a row failed, .*: KeyError: 'a fault'"):
            run(images, tmp_path / "out", methods=["fails"], in_flight=1)
    with pytest.raises(InvalidInputError, match=r"8 images in a row failed, .*: method 'fails' fails"):
        run(images, tmp_path / "out", methods=["fails"], in_flight=1)
    failing[0] = False
    assert run(three, tmp_path / "out", methods=["fails"]).made == 3


def test_images_that_fail_now_and_then_end_no_run(images: Path, tmp_path: Path) -> None:
    photographs(images, 15)
    make = worker.Worker.make

    def fails(self: worker.Worker, listed: ListedImage, *arguments: Any, **named: Any) -> bytes:
        if listed.path.name == "07.png":
            return make(self, listed, *arguments, **named)
        raise KeyError("a fault")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.Worker, "make", fails)
        summary = run([images / f"{i:02}.png" for i in range(15)], tmp_path / "out", methods=(), in_flight=1)
    assert (summary.made, len(summary.refused)) == (1, 14)  # seven before, and seven after


# Memory


@pytest.mark.parametrize("where", ["decoded_image", "read_image_file"])
def test_images_that_memory_does_not_hold(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    plain = getattr(lanes, where)

    def needy(*arguments: Any) -> Any:
        if arguments[-1].name == "03.png":
            raise MemoryError
        return plain(*arguments)

    monkeypatch.setattr(lanes, where, needy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of halvings
        summary = run(images, tmp_path / "out", methods=(), in_flight=2)
    assert summary.made == 7
    assert "there is no memory" in summary.refused["03.png"]


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_where_memory_runs_out_fewer_images_are_in_flight_and_bits_are_the_same(
    images: Path, tmp_path: Path, method: Any, kind: type[Exception]
) -> None:
    inside, most, lock = [0], [4], threading.Lock()

    def needy(question: Question) -> Tensor:
        with lock:
            inside[0] += 1
        try:
            time.sleep(0.05)
            if inside[0] > most[0]:
                raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
            return saliency(question)
        finally:
            with lock:
                inside[0] -= 1

    method("needy", needy)
    run(images, tmp_path / "whole", methods=["needy"], in_flight=4)
    most[0] = 1
    with pytest.warns(UserWarning, match="no memory for . images in flight: going on with .") as caught:
        summary = run(images, tmp_path / "out", methods=["needy"], in_flight=4)
    assert [str(each.message)[-1] for each in caught] == ["2", "1"]
    assert summary.made == 8
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_image_that_does_not_fit_alone_goes_through_in_smaller_batches(
    images: Path, tmp_path: Path, method: Any
) -> None:
    largest = [4]

    def needy(question: Question) -> Tensor:
        if question.batch_size > largest[0]:
            raise torch.OutOfMemoryError("out of memory")
        return saliency(question)

    method("needy", needy)
    more: dict[str, Any] = {"methods": ["needy"], "model": in_double(), "num_augmentations": 20}
    for count in (1, 2):
        with pytest.warns(UserWarning, match=r"no memory for .*00\.png alone: halving its batches"):
            run([images / "00.png"], tmp_path / f"out{count}", in_flight=count, **more)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    largest[0] = 16
    run([images / "00.png"], tmp_path / "whole", **more)
    (found,), (expected,) = sf.Store(tmp_path / "out1").values(), sf.Store(tmp_path / "whole").values()
    assert found.trace.settings["batch_size"] == 4
    assert expected.trace.settings["batch_size"] == 16
    assert (found.record["halvings"], "halvings" in expected.record) == (2, False)
    assert_same_result(found, expected)
    largest[0] = 0
    with pytest.warns(UserWarning, match="halving"):
        summary = run([images / "01.png"], tmp_path / "out1", **more)
    assert "no memory for this image alone, even in batches of 1" in next(iter(summary.refused.values()))


def test_metrics_that_do_not_fit_go_through_in_smaller_batches(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    insertion, sizes = worker._MEASURES["insertion"], []

    def needy(*arguments: Any, batch_size: int, **named: Any) -> Any:
        sizes.append(batch_size)
        if batch_size > 4:
            raise torch.OutOfMemoryError("out of memory")
        return insertion(*arguments, batch_size=batch_size, **named)

    monkeypatch.setitem(worker._MEASURES, "insertion", needy)
    with pytest.warns(UserWarning, match="halving its batches"):
        assert run([images / "00.png"], tmp_path / "out", metrics=("insertion",), in_flight=1).made == 1
    assert sizes == [16, 8, 4]


def test_the_seed_is_that_of_metrics_too(images: Path, tmp_path: Path, method: Any) -> None:
    method("flat", lambda question: torch.ones_like(question.inputs))  # whose pixels come in an order by chance
    run([images / "00.png"], tmp_path / "out", methods=["flat"], metrics=("deletion",), steps=6, seed=3)
    (found,) = sf.Store(tmp_path / "out").values()
    model, photo = quarters(), sf.load_image(images / "00.png")
    inputs = model.preprocess(model.preprocess.view(photo)[None])
    three, none = (
        sf.metrics.deletion(model, inputs, found.dense["flat"][None], found.record["target"], steps=6, seed=seed).auc
        for seed in (3, 0)
    )
    assert found.record["metrics"]["deletion"]["dense"]["flat"] == pytest.approx(three.item(), abs=1e-6)
    assert abs(three - none) > 1e-3


def test_summaries_of_several_ranks_are_one() -> None:
    one = running.RunSummary(3, 1, 1, {"c": "empty"}, {}, 2.0)
    other = running.RunSummary(2, 0, 2, {}, {"d": "damaged"}, 1.0)
    assert list(running._merged([other, replace(one, refused={"b": "", "a": ""})]).refused) == ["a", "b"]
    assert running._merged([one, other]) == running.RunSummary(5, 1, 3, {"c": "empty"}, {"d": "damaged"}, 2.0)


def in_double() -> LoadedModel:
    """In float64, where rounding moves no weight in or out of a mask."""
    model = quarters()
    return replace(model, module=model.module.double())


def assert_same_result(found: Any, expected: Any) -> None:
    for layer, own in expected.trace.layers.items():
        assert torch.equal(found.trace.layers[layer].mask, own.mask)
        torch.testing.assert_close(found.trace.layers[layer].weight, own.weight, rtol=1e-9, atol=1e-12)
    for maps, own_maps in ((found.dense, expected.dense), (found.spade, expected.spade)):
        for name, heat in own_maps.items():
            torch.testing.assert_close(maps[name], heat, rtol=1e-5, atol=1e-7)


class Wide(nn.Module):
    """Maps so large that views in company take much more memory than one by one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 16, 3, padding=1)
        self.classifier = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.wide(torch.relu(self.stem(x)))).mean((2, 3)))


def memory_of(what: str) -> int:
    """Bytes of the process's address space now ("VmSize") or at most so far ("VmPeak")."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"no {what}")


def run_within_a_limit(photo: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    side = 320
    preprocess = sf.Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3, input_size=side, resize_size=side)
    model = LoadedModel("wide", Wide().double().eval(), preprocess, None, "random")
    more: dict[str, Any] = {"methods": ("saliency",), "num_augmentations": 16, "in_flight": 1, "model": model}
    run([photo], folder / "small", **{**more, "batch_size": 2})
    small = memory_of("VmPeak")
    run([photo], folder / "whole", **more)
    large = memory_of("VmPeak")
    assert large - small > 50 * 2**20, (small, large)
    resource.setrlimit(resource.RLIMIT_AS, (small + (large - small) // 4, resource.RLIM_INFINITY))
    with pytest.warns(UserWarning, match=r"no memory for .*wide\.png alone: halving its batches"):
        run([photo], folder / "limited", **more)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="how much memory a process has is read from /proc")
def test_under_a_limit_of_memory_batches_are_halved_and_the_result_is_the_same(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (320, 320, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    child = start(run_within_a_limit, tmp_path / "wide.png", tmp_path)
    child.join()
    assert child.exitcode == 0
    (found,), (expected,) = sf.Store(tmp_path / "limited").values(), sf.Store(tmp_path / "whole").values()
    assert found.trace.settings["batch_size"] < expected.trace.settings["batch_size"] == 16
    assert_same_result(found, expected)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def long_run(images: Path, out: Path, told: Any) -> None:
    torch.set_num_threads(1)
    memory = []

    def noting(question: Question) -> Tensor:
        memory.append(resident())
        return saliency(question)

    _METHODS["noting"] = Method("noting", noting)
    run(images, out, methods=["noting"], in_flight=1)
    told.send(memory)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="how much memory a process has is read from /proc")
def test_memory_does_not_grow_over_five_hundred_images(tmp_path: Path, record_property: Any) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    photographs(folder, 500)
    mine, theirs = context.Pipe()
    child = start(long_run, folder, tmp_path / "out", theirs)
    assert mine.poll(300)
    memory = mine.recv()
    child.join()
    assert len(memory) == 1000  # each image by the network, and by its trace
    growth = max(memory[-40:]) / max(memory[:40]) - 1
    record_property("growth", growth)
    assert growth < 0.05


# Refusals


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"metrics": ("insertion",), "methods": ()}, "metrics are of maps: name methods too"),
        ({"metrics": ("trojan",)}, "metric 'trojan' is unknown: choose from insertion, deletion"),
        ({"metrics": "insertion"}, "metrics must be a sequence of names, got 'insertion': pass a list"),
        ({"methods": ("salience",)}, "no attribution method goes by the name 'salience'; nearest: 'saliency'"),
        ({"threads": 0}, "threads must be a whole number of at least 1, got 0"),
        ({"in_flight": 0}, "in_flight must be a whole number of at least 1, got 0"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"num_augmentations": 0}, "num_augmentations must be a whole number"),
        ({"augment": lambda *_: None}, "augment=.*lambda.* cannot be told from others in a later run"),
        ({"preprocess": nn.Identity()}, "photographs come in all sizes: pass a spade_fast.Preprocess"),
        ({"ray": "auto", "in_flight": 2}, "ray= has processes of its own"),
        ({"ray": "auto", "distributed": True}, "ray= has processes of its own"),
        ({"workers": 2}, "workers= is for ray="),
        ({"device": "cuda:99"}, "cuda"),
        ({"threads": 100_000}, "threads=100000, but there are .* cores: pass at most as many"),
        ({"distributed": True}, "distributed= is for processes that torchrun started"),
        ({"augment": "flip"}, "augment must be an Augmentation or a function, got 'flip'"),
        ({"metrics": 5}, "metrics must be a sequence of names, got 5: pass a list"),
        ({"root": "."}, "root is for a manifest"),
    ],
)
def test_arguments_that_cannot_be_used(images: Path, tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        run(images, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


def test_settings_that_trace_does_not_know(images: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'views' is no setting of spade_fast.trace"):
        run(images, tmp_path / "out", views=3)


def test_a_method_that_is_not_valid_is_refused_before_any_image(images: Path, tmp_path: Path) -> None:
    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.cos(self.stem(x)).mean((2, 3)))

    preprocess = sf.Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3, input_size=SIDE, resize_size=SIDE)
    with pytest.raises(InvalidInputError, match="method 'lrp' is not valid on this network"):
        sf.run(Cosine(), images, tmp_path / "out", {"fc": 0.5}, methods=("lrp",), preprocess=preprocess)
    assert not (tmp_path / "out").exists()  # or other methods would be refused there
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(InvalidInputError, match=r"is no store, but holds 'thesis\.tex'"):
        run(images, tmp_path / "out")
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("out", [5, None, "", "a\0b"])
def test_what_is_no_folder(images: Path, out: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"out is .*: pass the store's folder|cannot write to 'a.*null byte"):
        run(images, out)


def test_hooks_of_a_network_count_and_forbid_copies(images: Path, tmp_path: Path) -> None:
    model = quarters()
    calls = []
    model.module.stem.register_forward_hook(lambda *_: calls.append(1))
    run(images, tmp_path / "out", model=model, methods=("saliency",))
    assert calls
    other = quarters()
    other.module.classifier.register_full_backward_hook(lambda *_: None)
    for hooked, where in ((model, "stem"), (other, "classifier")):
        with pytest.raises(InvalidInputError, match=f"{where} has hooks.*in_flight=1"):
            run(images, tmp_path / "other", model=hooked, methods=("saliency",), in_flight=2)


def test_as_many_images_are_in_flight_as_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    module, cpu = nn.Linear(4096, 10), torch.device("cpu")  # a Hessian of 64 MiB, four of them, and 512 MiB for maps
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for free, threads, expected in (
        (None, 1, 8),
        (2**40, 2, 4),
        (10 * 768 * 2**20 // 4, 1, 2),
        (2 * 768 * 2**20, 1, 1),  # a fifth is left free
        (1, 1, 1),
        (2**40, 9, 1),
    ):
        monkeypatch.setattr(running, "free_memory", lambda free=free: free)
        assert running._images_in_flight(module, cpu, threads) == expected
    monkeypatch.setattr(running, "free_memory", lambda: 10 * 768 * 2**20)  # for eight, had others none of it
    assert [running._images_in_flight(module, cpu, 1, processes) for processes in (1, 2, 9)] == [8, 4, 1]


def test_what_is_done_later_is_not_interrupted() -> None:
    stop = threading.Event()
    with interruptible(stop):
        checkpoint()
        stop.set()
        with pytest.raises(Interrupted):
            checkpoint()
    checkpoint()


def test_where_room_is_closed_nothing_more_begins() -> None:
    room = lanes.Room(2)
    with room.turn():
        room.close()
        with pytest.raises(Interrupted), room.turn():
            pytest.fail("it has no turn")


def test_lanes_come_to_an_end_whenever_they_are_stopped(images: Path) -> None:
    class Busy:
        """A worker that takes turns with others at a lock, as methods that draw at random do."""

        largest_batch = 1

        def make(self, *_: Any, **__: Any) -> bytes:
            for _ in range(30):
                with seeded(0, torch.device("cpu")):
                    checkpoint()
            return b""

    class Writer:
        def known(self, _: ListedImage) -> dict[str, Any]:
            return {}

        def has(self, *_: Any) -> bool:
            return False

        def put(self, *_: Any) -> None:
            pass

    listed = [ListedImage(str(i), images / "00.png") for i in range(400)]
    random = np.random.default_rng(0)
    for _ in range(15):
        outcomes = lanes.Lanes(Writer(), [Busy() for _ in range(4)]).outcomes(listed)  # type: ignore[arg-type]
        for _ in range(int(random.integers(1, 200))):
            assert next(outcomes).made
        outcomes.close()
        assert not any(thread.name.startswith("image") for thread in threading.enumerate())
