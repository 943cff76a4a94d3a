"""The trace itself: applying, copying, comparing, saving."""

import copy
import gc
import json
import os
import pickle
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_tracer import SETTINGS, assert_same_bits, assert_unchanged, network, picture, snapshot
from torch import Tensor, nn

import spade_fast as sf
from spade_fast.files import digest, write_tensors
from spade_fast.models import evaluation_mode
from spade_fast.traces import unpacked_mask


@pytest.fixture
def model() -> nn.Sequential:
    return network()


@pytest.fixture
def trace(model) -> sf.Trace:
    return sf.trace(model, picture(), 0.5, **SETTINGS)


def test_applied_swaps_the_sparse_weights_in_and_back(model, trace):
    before = snapshot(model)
    inputs = torch.rand(2, 3, 12, 14)
    model.eval()
    dense = model(inputs)
    with trace.applied(model) as applied:
        assert applied is model
        for name, layer in trace.layers.items():
            assert torch.equal(model.get_submodule(name).weight, layer.weight)
            assert isinstance(model.get_submodule(name).weight, nn.Parameter)
        sparse = model(inputs)
        assert not torch.equal(sparse, dense)
    assert torch.equal(model(inputs), dense)
    model.train()
    assert_unchanged(model, before)
    torch.testing.assert_close(trace.pruned_copy(model).eval()(inputs), sparse)
    assert_unchanged(model, before)


def test_a_second_thread_is_refused_while_a_trace_is_applied(model, trace):
    before = snapshot(model)

    def apply():
        with trace.applied(model):
            pass

    with ThreadPoolExecutor(1) as other:
        with trace.applied(model), trace.applied(model):
            with pytest.raises(sf.InvalidInputError, match="another thread has applied a trace to this model"):
                other.submit(apply).result()
            assert torch.equal(model[4].weight, trace.layers["4"].weight)
        other.submit(apply).result()
    assert_unchanged(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_applied_swaps_back_after_an_exception(model, trace, error):
    before = snapshot(model)
    with pytest.raises(error), trace.applied(model):
        model[4].weight.data.zero_()
        raise error
    assert_unchanged(model, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
def test_applied_swaps_back_whenever_ctrl_c_arrives(model, trace):
    model.train()
    before = [(id(parameter), parameter.clone()) for parameter in model.parameters()]
    generator = torch.Generator().manual_seed(0)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def attempt(delay: float) -> None:
        try:
            signal.setitimer(signal.ITIMER_REAL, delay)
            with trace.applied(model), evaluation_mode(model):
                sum(range(3000))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    previous = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    gc.disable()  # its callbacks, such as hypothesis's, swallow an interrupt that arrives in them
    try:
        for _ in range(400):
            try:
                attempt(1e-6 + 1.5e-3 * torch.rand((), generator=generator).item())
            except KeyboardInterrupt:
                interrupted += 1
            assert [id(parameter) for parameter in model.parameters()] == [address for address, _ in before]
            assert all(module.training for module in model.modules())
    finally:
        gc.enable()
        signal.signal(signal.SIGALRM, previous)
    assert interrupted > 20
    assert all(torch.equal(parameter, value) for parameter, (_, value) in zip(model.parameters(), before, strict=True))


def test_applied_nests(model, trace):
    before = snapshot(model)
    inner = sf.trace(model, picture(1), {"9": 0.7}, **SETTINGS)
    with trace.applied(model):
        outside = snapshot(model)
        with inner.applied(model):
            assert torch.equal(model[9].weight, inner.layers["9"].weight)
            assert torch.equal(model[4].weight, trace.layers["4"].weight)
            with trace.applied(model):
                assert torch.equal(model[9].weight, trace.layers["9"].weight)
        assert_unchanged(model, outside)
        with pytest.raises(KeyboardInterrupt), inner.applied(model):
            raise KeyboardInterrupt
        assert_unchanged(model, outside)
    assert_unchanged(model, before)


def test_what_happens_inside_does_not_reach_the_trace(model, trace):
    kept = {name: layer.weight.clone() for name, layer in trace.layers.items()}
    with trace.applied(model):
        for parameter in model.parameters():
            parameter.data.add_(1)
    assert all(torch.equal(layer.weight, kept[name]) for name, layer in trace.layers.items())


def test_gradients_inside_do_not_reach_the_dense_weights(model, trace):
    with trace.applied(model):
        model(torch.rand(2, 3, 12, 14)).sum().backward()
        assert model[9].weight.grad is not None
    assert model[9].weight.grad is None


def test_requires_grad_precision_and_layout_follow_the_model(model, trace):
    model[4].weight.requires_grad_(False)
    model.to(torch.float64, memory_format=torch.channels_last)
    with trace.applied(model):
        assert not model[4].weight.requires_grad
        assert model[9].weight.requires_grad
        assert model[3].weight.dtype == torch.float64
        assert model[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_applied_to_another_model_is_refused_before_anything_is_swapped(trace):
    other = network()
    other[9] = nn.Linear(16, 5)
    other[4] = nn.ReLU()
    before = snapshot(other)
    with (
        pytest.raises(sf.InvalidInputError, match=r"'4' is missing; '9' has shape \[5, 16\], the trace \[10, 16\]"),
        trace.applied(other),
    ):
        pytest.fail("entered")
    assert_unchanged(other, before)
    with pytest.raises(sf.InvalidInputError, match="does not fit this Linear"):
        trace.pruned_copy(nn.Linear(2, 2))


def test_overlap(trace):
    assert trace.overlap(trace) == {"3": 1.0, "4": 1.0, "9": 1.0}
    masks = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]]).bool()
    zero = torch.zeros(4)
    first, second = (sf.Trace({"a": sf.LayerTrace(zero, mask, 0.5, 0.0, 0.0)}) for mask in masks)
    assert first.overlap(second) == {"a": 1 / 3}
    empty = sf.Trace({"a": sf.LayerTrace(zero, zero.bool(), 1.0, 0.0, 0.0)})
    assert empty.overlap(empty) == {"a": 1.0}
    assert empty.overlap(first) == {"a": 0.0}
    with pytest.raises(sf.InvalidInputError, match="no pruned layer in common"):
        trace.overlap(first)
    with pytest.raises(sf.InvalidInputError, match=r"layer 'a' has shape \[4\] in one trace and \[2\]"):
        first.overlap(sf.Trace({"a": sf.LayerTrace(zero[:2], masks[0, :2], 0.5, 0.0, 0.0)}))


def test_traces_can_be_pickled_and_copied(trace):
    for duplicate in (pickle.loads(pickle.dumps(trace)), copy.deepcopy(trace)):
        assert_same_bits(trace, duplicate)
        assert duplicate.settings == trace.settings
        with pytest.raises(TypeError):
            duplicate.layers["3"] = None
    plan = sf.SparsityPlan.from_mapping({"a": 0.5})
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_tied_weights_of_the_model_must_be_tied_in_the_trace(trace):
    other = network()
    other.register_module("twin", nn.Linear(16, 10))
    other.twin.weight = other[9].weight
    with pytest.raises(sf.InvalidInputError, match="'9' shares its weight with 'twin', but not in the trace"):
        trace.pruned_copy(other)


def test_report(trace):
    rows = trace.rows()
    assert [row["layer"] for row in rows] == ["3", "4", "9"]
    assert rows[2]["shape"] == [10, 16]
    assert rows[2]["sparsity"] == trace.layers["9"].sparsity >= 0.5
    assert rows[2]["loss"] > 0
    assert rows[2]["damping"] == 0.01
    json.dumps(rows)
    assert "dense: first layer" in trace.summary()
    assert 0.49 < trace.sparsity < 0.8
    layer = sf.LayerTrace(torch.zeros(3, 2), torch.tensor([[1, 0], [0, 0], [0, 1]]).bool(), 0.5, 0.0, 0.0)
    assert layer.empty_outputs == 1
    assert layer.sparsity == pytest.approx(2 / 3)


def test_traces_are_read_only(trace):
    with pytest.raises(TypeError):
        trace.layers["3"] = None


def test_save_and_load(tmp_path, model, trace):
    path = tmp_path / "trace.safetensors"
    trace.save(path)
    loaded = sf.Trace.load(path)
    assert_same_bits(trace, loaded)
    assert loaded.rows() == trace.rows()
    assert loaded.dense == trace.dense
    assert loaded.settings == trace.settings
    assert list(tmp_path.iterdir()) == [path]
    trace.save(path)  # over an existing file
    with sf.Trace.load(path).applied(model):
        assert torch.equal(model[9].weight, trace.layers["9"].weight)


def test_save_follows_links_keeps_permissions_and_refuses_what_is_no_file(tmp_path, trace):
    path, link, pipe = tmp_path / "real", tmp_path / "link", tmp_path / "pipe"
    path.touch(mode=0o600)
    link.symlink_to(path)
    trace.save(link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
    assert_same_bits(sf.Trace.load(path), trace)
    os.mkfifo(pipe)
    for target, message in (
        (pipe, "pipe' is no regular file"),
        (tmp_path, "^'[^']*' is no regular file"),
        ("a\0b", "cannot write"),
    ):
        with pytest.raises(sf.InvalidInputError, match=message):
            trace.save(target)
    assert pipe.is_fifo()


def test_save_tied_and_channels_last_layers(tmp_path):
    weight = torch.randn(4, 2, 3, 3).to(memory_format=torch.channels_last)
    layer = sf.LayerTrace(weight, torch.ones_like(weight, dtype=torch.bool), 0.1, 0.0, 0.01, "float64")
    trace = sf.Trace({"a": layer, "b.c": layer})
    trace.save(tmp_path / "trace.safetensors")
    assert_same_bits(sf.Trace.load(tmp_path / "trace.safetensors"), trace)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_file_holds_kept_weights_and_a_bit_for_each(dtype):
    weight = torch.tensor([[0.0, 1.5, 0, 0, -2, 0], [0, 0, 0, 3, 0, -0.0]], dtype=dtype)
    mask = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 1]], dtype=torch.bool)
    header, tensors = sf.Trace({"fc": sf.LayerTrace(weight, mask, 0.7, 0.0, 0.01)}).to_tensors()
    assert header["layers"]["fc"]["shape"] == [2, 6]
    assert tensors["fc.kept"].tolist() == [1.5, -2, 3, 0]
    assert tensors["fc.kept"].dtype == dtype
    assert tensors["fc.mask"].tolist() == [0b01001000, 0b01010000]
    loaded = sf.Trace.from_tensors(header, tensors).layers["fc"]
    assert torch.equal(loaded.mask, mask)
    assert torch.equal(loaded.weight, weight)
    assert loaded.weight[1, 5].signbit()


def test_a_sparse_trace_of_resnet50_takes_a_tenth_of_its_weights(tmp_path):
    network = pytest.importorskip("torchvision").models.resnet50()
    layers = {}
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and name != "conv1":
            mask = torch.rand_like(module.weight) >= 0.95
            layers[name] = sf.LayerTrace(module.weight.detach() * mask, mask, 0.95, 0.0, 0.01)
    sf.Trace(layers).save(tmp_path / "trace.safetensors")
    weights = sum(layer.weight.nbytes for layer in layers.values())
    assert (tmp_path / "trace.safetensors").stat().st_size < weights / 10


def test_a_failed_save_leaves_nothing_behind(tmp_path, trace, monkeypatch):
    path = tmp_path / "trace.safetensors"
    path.write_bytes(b"what was there before")

    def disk_full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(sf.InvalidInputError, match=r"trace\.safetensors.*No space left"):
        trace.save(path)
    assert path.read_bytes() == b"what was there before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(sf.InvalidInputError, match="cannot write .*nowhere"):
        trace.save(tmp_path / "nowhere" / "trace.safetensors")


def test_bad_files_are_refused_by_name(tmp_path, trace):
    path = tmp_path / "trace.safetensors"
    trace.save(path)
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118

    def contradict() -> None:
        save_file(tensors | {"9.mask": ~tensors["9.mask"]}, path, metadata=metadata)

    def another(change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Callable[[], None]:
        """A file that is whole, by its checksum, and contradicts itself."""

        def write() -> None:
            header, altered = trace.to_tensors()
            change(header, altered)
            write_tensors(path, "spade_fast_trace", header, altered)

        return write

    def omit_mask() -> None:
        save_file({key: value for key, value in tensors.items() if key != "9.mask"}, path, metadata=metadata)

    def report(**values: object) -> None:
        header = json.loads(metadata["spade_fast_trace"])
        for key, value in values.items():
            (header["layers"]["9"] if key in header["layers"]["9"] else header)[key] = value
        del header["sha256"]
        header["sha256"] = digest({}, header)
        save_file(tensors, path, metadata={"spade_fast_trace": json.dumps(header)})

    report()
    assert_same_bits(sf.Trace.load(path), trace)
    damage = {
        "a loss that is none": lambda: report(loss=None),
        "a loss that no float holds": lambda: report(loss=10**400),
        "a loss below zero": lambda: report(loss=-1.0),
        "a sparsity that is none": lambda: report(requested_sparsity="half"),
        "a sparsity above one": lambda: report(requested_sparsity=1.5),
        "a damping that is none": lambda: report(damping=True),
        "an unknown fallback": lambda: report(fallback="float16"),
        "reasons that are none": lambda: report(dense={"0": 1}),
        "settings that are none": lambda: report(settings=[1]),
        "too deep": lambda: save_file(tensors, path, metadata={"spade_fast_trace": "[" * 100_000}),
        "truncated": lambda: path.write_bytes(whole[: len(whole) // 2]),
        "cut in the header": lambda: path.write_bytes(whole[:20]),
        "empty": lambda: path.write_bytes(b""),
        "text": lambda: path.write_text("not a trace, but text that goes on for a while"),
        "no metadata": lambda: save_file(tensors, path),
        "other metadata": lambda: save_file(tensors, path, metadata={"spade_fast_trace": "[]"}),
        "later format": lambda: save_file(tensors, path, metadata={"spade_fast_trace": '{"format": 99}'}),
        "mask against weight": contradict,
        "one bit": lambda: path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]),
        "one digit": lambda: path.write_bytes(whole.replace(b'sparsity\\": 0.5', b'sparsity\\": 0.6', 1)),
        "missing mask": omit_mask,
        "a weight too few": another(lambda _, held: held.update({"9.kept": held["9.kept"][1:]})),
        "weights of another kind": another(lambda _, held: held.update({"9.kept": held["9.kept"].long()})),
        "a mask too long": another(lambda _, held: held.update({"9.mask": torch.cat([held["9.mask"]] * 2)})),
        "another shape": another(lambda header, _: header["layers"]["9"].update(shape=[3, 5])),
        "no shape": another(lambda header, _: header["layers"]["9"].update(shape=None)),
        "a side too long": another(lambda header, _: header["layers"]["9"].update(shape=[0, 10**30])),
        "negative shape": another(lambda header, _: header["layers"]["9"].update(shape=[-1, -1])),
        "no target": another(lambda header, _: header["layers"]["9"].pop("requested_sparsity")),
        "missing": path.unlink,
    }
    for kind, do in damage.items():
        do()
        with pytest.raises(sf.InvalidInputError, match=r"trace\.safetensors"):
            sf.Trace.load(path)
            pytest.fail(kind)


def test_masks_have_no_bits_beyond_their_weights():
    packed = torch.tensor([0b10100000], dtype=torch.uint8)
    assert unpacked_mask(packed, [1, 3]).tolist() == [[True, False, True]]
    for bad, shape in ((packed | 1, [1, 3]), (packed.repeat(2), [1, 3]), (packed[None], [1, 3]), (packed, [3])):
        with pytest.raises(ValueError, match=r"of \[1, 3\] weights|\[3\] is no shape"):
            unpacked_mask(bad, shape)
