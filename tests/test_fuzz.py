"""Operators and loaders under random abuse: a right-looking result or an ordinary exception, whatever comes.

An operator gets arguments of random shapes and layouts, sometimes with faults: another dtype, rank, size or device,
values that are not finite, numbers out of any range, no tensor at all. A loader gets a file that it could read, with
bytes flipped, cut out, cut off, repeated or added, and lengths or a header that lie; or one whose checksum is right and
whose contents are not what they say.

Some 2,000 cases, the same ones each time, are tried by default. The environment variable SPADE_FAST_FUZZ_CASES sets how
many, shared out over the targets; `make fuzz` tries 10,000, operators under the address and undefined behaviour
sanitizers.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from subjects import store_of
from torch import Tensor, nn

import spade_fast as sf
from spade_fast import files, ops, store, trace_comparison
from spade_fast.checkpoints import load_checkpoint
from spade_fast.images import load_image
from spade_fast.imagesets import listed_images

CASES = int(os.environ.get("SPADE_FAST_FUZZ_CASES", "2000"))
REFUSALS = (RuntimeError, ValueError, TypeError)  # InvalidInputError is a ValueError


def fuzz(case: Callable[[st.DataObject], None], record: Callable[[str, object], None], weight: int = 1) -> None:
    """Run a case for its share of all, with draws of its own each time."""
    tried = 0

    @settings(
        max_examples=-(-CASES * weight // SHARES),
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        nonlocal tried
        case(data)
        tried += 1

    run()
    record("cases", tried)


# Operators: arguments that fit, what comes of them, and faults.

Draw = Callable[..., Any]
SIZES = st.sampled_from([1, 2, 3, 5, 9, 17, 40, 97, 0])
COUNTS = st.sampled_from([1, 1, 2, 3, 0])
FLOATS = st.sampled_from([torch.float32, torch.float64])
OTHER_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool,
                torch.complex64]  # fmt: skip
WRONG_NUMBERS = [-1, 0, 1, 7, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63), 2**63, 0.5, math.nan, math.inf, -math.inf,
                 1e308, 5e-324, True, None, "one"]  # fmt: skip
WRONG_VALUES = [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e30, 1e-40]


class Call(NamedTuple):
    """An operator, its arguments, and of such the shapes and dtypes of its results."""

    name: str
    arguments: list[Any]
    results: Callable[..., list[tuple[Sequence[int], torch.dtype]]]
    fits: bool = True  # whether the arguments may not be refused


def randn(draw: Draw, *shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def positive(draw: Draw, groups: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Symmetric positive definite matrices."""
    inputs = randn(draw, groups, columns, columns + 3, dtype=torch.float64)
    matrix = (inputs @ inputs.mT / (columns + 3) + 0.1 * torch.eye(columns, dtype=torch.float64)).to(dtype)
    return matrix.tril() + matrix.tril(-1).mT


def geometry(draw: Draw) -> list[Any]:
    pairs = [[draw(st.integers(low, high)) for _ in range(2)] for low, high in ((1, 4), (1, 3), (0, 3), (1, 3))]
    return [*pairs, draw(st.integers(1, 3))]


def image_size(draw: Draw, of: list[Any]) -> list[int]:
    kernel, _, padding, dilation, groups = of
    least = [max(0, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    channels = groups * draw(st.sampled_from([1, 2, 17, 40, 0]))
    return [channels, *(draw(st.integers(low, low + 6)) for low in least)]


def conv2d_sums_shape(draw: Draw) -> Call:
    numbers = st.sampled_from([0, 1, 2, 5, 64, 2**20, 2**31 - 1, 2**31])
    taps = st.sampled_from([0, 1, 3, 64, 2**31])
    sizes = [draw(numbers) for _ in range(3)]
    of = [[draw(each) for _ in range(2)] for each in (taps, numbers, numbers, numbers)]
    return Call("conv2d_sums_shape", [sizes, *of, draw(st.sampled_from([1, 2, 2**31 - 1]))], lambda *_: [], fits=False)


def add_conv2d_sums_(draw: Draw) -> Call:
    of, dtype = geometry(draw), draw(FLOATS)
    size = image_size(draw, of)
    sums = torch.zeros(torch.ops.spade_fast.conv2d_sums_shape(size, *of), dtype=dtype)
    images = randn(draw, draw(COUNTS), *size, dtype=dtype)
    return Call("add_conv2d_sums_", [sums, images, *of, draw(st.booleans()) and dtype == torch.float32], lambda *_: [])


def conv2d_gram(draw: Draw) -> Call:
    of, dtype = geometry(draw), draw(FLOATS)
    size = image_size(draw, of)
    sums = randn(draw, *torch.ops.spade_fast.conv2d_sums_shape(size, *of), dtype=dtype)

    def results(sums: Tensor, size: list[int], kernel: list[int], *rest: Any) -> Any:
        columns = size[0] // rest[-1] * kernel[0] * kernel[1]
        return [((rest[-1], columns, columns), sums.dtype)]

    return Call("conv2d_gram", [sums, size, *of], results)


def factor_hessian(draw: Draw) -> Call:
    hessian = positive(draw, draw(COUNTS), draw(SIZES.filter(bool)), draw(FLOATS))
    return Call("factor_hessian", [hessian, draw(st.sampled_from([0.0, 0.01, 1.0]))], lambda hessian, _: [
        (hessian.shape, hessian.dtype), (hessian.shape[:1], torch.float64)])  # fmt: skip


def factor_hessians(draw: Draw) -> Call:
    hessians = [positive(draw, draw(COUNTS), draw(SIZES.filter(bool)), draw(FLOATS)) for _ in range(draw(COUNTS) + 1)]
    return Call("factor_hessians", [hessians, 0.01], lambda hessians, _: [
        *((each.shape, each.dtype) for each in hessians),
        *((each.shape[:1], torch.float64) for each in hessians)])  # fmt: skip


def lower(draw: Draw, groups: int, columns: int, dtype: torch.dtype) -> Tensor:
    return (randn(draw, groups, columns, columns, dtype=dtype) / max(1, columns)).tril() + torch.eye(
        columns, dtype=dtype
    )


def weight_and_factor(draw: Draw) -> tuple[Tensor, Tensor]:
    groups, columns, dtype = draw(COUNTS), draw(SIZES), draw(FLOATS)
    rows = draw(st.sampled_from([1, 3, 600, 0]))
    return randn(draw, groups, rows, columns, dtype=dtype), lower(draw, groups, columns, dtype)


def prune_columns(draw: Draw) -> Call:
    settings = [draw(st.floats(0, 1)), draw(st.sampled_from([1, 3, 9, 10**12])), draw(st.booleans())]
    return Call("prune_columns", [*weight_and_factor(draw), *settings], lambda weight, *_: [
        (weight.shape, weight.dtype), (weight.shape, torch.bool), ((), torch.float64)])  # fmt: skip


def prune_layers(draw: Draw) -> Call:
    weights, factors = map(list, zip(*(weight_and_factor(draw) for _ in range(draw(COUNTS) + 1)), strict=True))
    shares = [draw(st.floats(0, 1)) for _ in weights]
    sizes = [draw(st.sampled_from([1, 9, 10**12])) for _ in weights]
    return Call("prune_layers", [weights, factors, shares, sizes, draw(st.booleans())], lambda weights, *_: [
        *((each.shape, each.dtype) for each in weights), *((each.shape, torch.bool) for each in weights),
        ((len(weights),), torch.float64)])  # fmt: skip


def elimination_orders(draw: Draw) -> Call:
    weights, inverses, sizes = [], [], []
    for _ in range(draw(COUNTS) + 1):
        groups, dtype, size = draw(COUNTS), draw(FLOATS), draw(st.sampled_from([1, 1, 3, 9]))
        columns = size * draw(st.sampled_from([1, 2, 7, 0] if size > 1 else [1, 9, 70, 0]))
        weights.append(randn(draw, groups, draw(COUNTS), columns, dtype=dtype))
        inverses.append(positive(draw, groups, columns, dtype))
        sizes.append(size)

    def results(weights: list[Tensor], _: Any, sizes: list[int]) -> Any:
        shapes = [(*weight.shape[:2], weight.shape[2] // size) for weight, size in zip(weights, sizes, strict=True)]
        return [*((shape, torch.int32) for shape in shapes),
                *((shape, weight.dtype) for shape, weight in zip(shapes, weights, strict=True))]  # fmt: skip

    return Call("elimination_orders", [weights, inverses, sizes], results)


def solve_subsets(draw: Draw) -> Call:
    groups, systems, columns, dtype = draw(COUNTS), draw(COUNTS), draw(SIZES), draw(FLOATS)
    right = randn(draw, groups, systems, columns, dtype=dtype)
    subsets = randn(draw, groups, systems, columns, dtype=dtype) > draw(st.sampled_from([-9, 0, 1, 9]))
    return Call("solve_subsets", [positive(draw, groups, columns, dtype), subsets, right],
                lambda *given: [(given[2].shape, given[2].dtype)])  # fmt: skip


def render_views(draw: Draw) -> Call:
    views, dtype, arguments = draw(COUNTS), draw(FLOATS), []
    sides = [draw(st.sampled_from([1, 7, 33, 0])) for _ in range(2)]
    for pixels in sides:
        taps, size = draw(st.integers(0, pixels)), draw(st.sampled_from([1, 5, 18, 0]))
        starts = torch.randint(0, pixels - taps + 1, (views, size), generator=torch.Generator().manual_seed(0))
        arguments += [starts, randn(draw, views, taps, size, dtype=dtype)]
    arguments = [randn(draw, 3, *sides, dtype=dtype), *arguments, randn(draw, views, 3, dtype=dtype)]
    return Call("render_views", arguments, lambda image, _rows, rows, _columns, columns, colours: [
        ((len(colours), 3, rows.shape[2], columns.shape[2]), image.dtype)])  # fmt: skip


OPERATORS = [conv2d_sums_shape, add_conv2d_sums_, conv2d_gram, factor_hessian, factor_hessians, prune_columns,
             prune_layers, elimination_orders, solve_subsets, render_views]  # fmt: skip


# What holds of arguments that are not refused, whatever their values, and of results.


def sums_fit(sums: Tensor, size: Sequence[int], *of: Any) -> bool:
    return list(sums.shape) == torch.ops.spade_fast.conv2d_sums_shape(size, *of)


def matrices_fit(weights: Sequence[Tensor], matrices: Sequence[Tensor]) -> bool:
    shapes = [(each.shape[0], each.shape[2], each.shape[2]) for each in weights]
    return [tuple(each.shape) for each in matrices] == shapes


def pruned_right(given: list[Any], found: list[Tensor]) -> bool:
    (weight, factor, share, size, published), (sparse, mask, _) = given, found
    counted = published or all(
        (~block).sum() == math.floor(block.numel() * share + 0.5)
        for block in mask.split(max(1, min(size, mask.shape[2])), dim=2)
    )
    return matrices_fit([weight], [factor]) and counted and not sparse[~mask].any()


def eliminated_right(given: list[Any], found: list[Tensor]) -> bool:
    weights, inverses, sizes = given
    pairs = zip(found[: len(weights)], found[len(weights) :], strict=True)
    whole = all(weight.shape[2] % size == 0 for weight, size in zip(weights, sizes, strict=True))
    return (
        matrices_fit(weights, inverses) and whole and all(torch.equal(order < 0, loss.isnan()) for order, loss in pairs)
    )


ALWAYS: dict[str, Callable[[list[Any], list[Tensor]], bool]] = {
    "add_conv2d_sums_": lambda given, _: sums_fit(given[0], given[1].shape[1:], *given[2:7]),
    "conv2d_gram": lambda given, _: sums_fit(*given),
    "factor_hessian": lambda given, _: given[0].shape[1] == given[0].shape[2],
    "factor_hessians": lambda given, _: all(each.shape[1] == each.shape[2] for each in given[0]),
    "prune_columns": pruned_right,
    "prune_layers": lambda given, _: matrices_fit(*given[:2]),
    "elimination_orders": eliminated_right,
    "solve_subsets": lambda given, found: matrices_fit(given[2:], given[:1]) and not found[0][~given[1]].any(),
    "render_views": lambda _, found: not ((found[0] < 0) | (found[0] > 1)).any(),
}
# Which an operator wants contiguous; sums are written to.
CONTIGUOUS = {"add_conv2d_sums_": [0], "conv2d_gram": [0], "render_views": [1, 2, 3, 4, 5]}


def laid_out(draw: Draw, tensor: Tensor) -> Tensor:
    """The same values in another layout, or one matrix for all."""
    layout = draw(st.sampled_from(["as it is", "transposed", "sliced", "channels last", "expanded", "inside"]))
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    if layout == "sliced":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if layout == "channels last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "expanded" and len(tensor):
        return tensor[:1].expand_as(tensor)
    if layout == "inside":
        return torch.cat([tensor, tensor])[len(tensor) :]
    return tensor


def wrong_tensor(draw: Draw, tensor: Tensor) -> Any:
    """The tensor with a fault, or what is no tensor."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex():
        return tensor
    fault = draw(
        st.sampled_from(["values", "values", "values", "size", "size", "dtype", "rank", "meta", "sparse", "other"])
    )
    if fault == "dtype":
        return tensor.to(draw(st.sampled_from(OTHER_DTYPES)))
    if fault == "rank":
        return draw(st.sampled_from([tensor[None], tensor.flatten(), tensor.flatten().sum(), tensor[..., None]]))
    if fault == "size":
        axis = draw(st.integers(0, tensor.dim() - 1))
        size = draw(st.sampled_from([0, 1, tensor.shape[axis] + 1, 2 * tensor.shape[axis]]))
        return torch.cat([tensor, tensor, tensor.new_zeros(tensor.shape)], axis).narrow(
            axis, 0, min(size, 2 * tensor.shape[axis])
        )
    if fault == "values":
        share = draw(st.sampled_from([0.1, 1.0]))
        places = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0)) < share
        values = WRONG_VALUES if tensor.is_floating_point() else [-1, 1, 40, 2**62]
        return tensor.masked_fill(places, draw(st.sampled_from(values)))
    if fault == "meta":
        return tensor.to("meta")
    if fault == "sparse":
        return tensor.to_sparse()
    return draw(st.sampled_from([None, "tensor", 3.5, [tensor]]))


def wrong(draw: Draw, argument: Any) -> Any:
    """The argument with a fault somewhere in it."""
    if isinstance(argument, Tensor):
        return wrong_tensor(draw, argument)
    if isinstance(argument, list) and draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from([argument[:-1], argument[:1] + argument, [], None]))
    if isinstance(argument, list) and argument:
        at = draw(st.integers(0, len(argument) - 1))
        return [*argument[:at], wrong(draw, argument[at]), *argument[at + 1 :]]
    return draw(st.sampled_from(WRONG_NUMBERS))


def tensors_in(values: Any) -> Iterator[Tensor]:
    for value in values if isinstance(values, (list, tuple)) else [values]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def on_meta(argument: Any) -> Any:
    if isinstance(argument, list):
        return [*map(on_meta, argument)]
    return argument.to("meta") if isinstance(argument, Tensor) else argument


@pytest.mark.skipif("cpu" not in ops.native_devices(), reason="the extension is not built")
@pytest.mark.parametrize("make", OPERATORS, ids=lambda make: make.__name__)
def test_operators(make, record_property):
    def case(data: st.DataObject) -> None:
        call = make(data.draw)
        strict = CONTIGUOUS.get(call.name, [])
        arguments = [
            [laid_out(data.draw, item) if isinstance(item, Tensor) else item for item in each] if isinstance(each, list)
            else laid_out(data.draw, each) if isinstance(each, Tensor) and i not in strict else each
            for i, each in enumerate(call.arguments)
        ]  # fmt: skip
        is_meta, faults = data.draw(st.integers(0, 5)) == 5, data.draw(st.sampled_from([0, 1, 1, 1, 2]))
        hold_tensors = [i for i, each in enumerate(arguments) if next(tensors_in(each), None) is not None]
        for _ in range(faults):
            at = data.draw(st.sampled_from([*range(len(arguments)), *hold_tensors, *hold_tensors]))
            arguments[at] = wrong(data.draw, arguments[at])
        arguments = on_meta(arguments) if is_meta else arguments
        try:
            found = getattr(torch.ops.spade_fast, call.name)(*arguments)
        except REFUSALS:
            assert faults or not call.fits, "arguments that fit are refused"
            return
        results = list(tensors_in(found))
        if any(each.is_meta for each in tensors_in(arguments)) and faults:
            assert all(each.is_meta for each in results)  # fake kernels tell the shape of what fits
            return
        assert [(tuple(each.shape), each.dtype) for each in results] == [
            (tuple(shape), dtype) for shape, dtype in call.results(*arguments)
        ]
        if not is_meta:
            assert ALWAYS.get(call.name, lambda *_: True)(arguments, results)
        if not faults and not is_meta:
            assert all(each.isfinite().all() for each in [*results, *tensors_in(arguments)])

    fuzz(case, record_property, weight=3)


# Loaders: files that they read, and damage.


def damaged(draw: Draw, content: bytes) -> bytes:
    """The bytes of a file after one or more accidents."""
    for _ in range(draw(st.sampled_from([1, 1, 2, 5]))):
        # Headers are where most can go wrong.
        last = draw(st.sampled_from([16, 100, 400, len(content)]))
        at = draw(st.integers(0, max(0, min(len(content), last) - 1)))
        accident = draw(st.sampled_from(["flip", "set", "set", "number", "cut", "drop", "repeat", "add", "append"]))
        if accident == "flip" and content:
            content = content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
        elif accident == "set" and content:
            content = (
                content[:at]
                + draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"0", b"9", b"-", b'"']))
                + content[at + 1 :]
            )
        elif accident == "number":
            number = draw(st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(content) + 1]))
            packed = struct.pack(draw(st.sampled_from(["<Q", ">Q"])), number)
            width = draw(st.sampled_from([2, 4, 8]))
            packed = packed[:width] if packed[-1] == 0 or draw(st.booleans()) else packed[-width:]
            content = content[:at] + packed + content[at + width :]
        elif accident == "cut":
            content = content[:at]
        elif accident == "drop":
            content = content[:at] + content[at + draw(st.integers(1, 40)) :]
        elif accident == "repeat":
            content = content[: at + draw(st.integers(1, 40))] + content[at:]
        elif accident == "add":
            content = content[:at] + draw(st.binary(max_size=20)) + content[at:]
        elif accident == "append":
            content += draw(st.binary(min_size=1, max_size=20))
    return content


JSON_VALUES = st.sampled_from(
    [-1, -0.5, 0, 1, 2, 10**400, math.nan, math.inf, True, None, "F64", "\ud800", [], [0.5], {}, {"fc": 1}]
)


def paths(value: Any) -> Iterator[list[Any]]:
    """Keys that lead to all parts of a JSON value."""
    yield []
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from ([key, *rest] for rest in paths(part))


def lying(draw: Draw, value: Any) -> Any:
    """A JSON value with another one somewhere in it, or without a part."""
    *path, last = draw(st.sampled_from([each for each in paths(value) if each]))
    value = json.loads(json.dumps(value))
    part = value
    for key in path:
        part = part[key]
    if draw(st.integers(0, 3)) == 0:
        del part[last]
    else:
        part[last] = draw(JSON_VALUES)
    return value


def with_lying_header(draw: Draw, content: bytes) -> bytes:
    """A safetensors file whose header says something else."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(lying(draw, json.loads(content[8 : 8 + size]))).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def read(load: Callable[[Path], Any], path: Path, content: bytes) -> Any:
    """What a loader makes of a file, or None where it refuses it as it should."""
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other libraries remark on damaged files
        try:
            return load(path)
        except sf.InvalidInputError as error:
            message = str(error)
    assert path.name in message
    return None


def some_trace() -> sf.Trace:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    layers = {
        name: sf.LayerTrace(values * (values > 0), values > 0, 0.5, 1.25, 0.01, fallback)
        for name, values, fallback in (("fc", weight, None), ("conv", weight.view(4, 6, 1, 1), "float64"))
    }
    return sf.Trace(layers, {"stem": "first layer"}, {"seed": 0, "solver": "fast"})


def check_trace(trace: sf.Trace) -> None:
    """A trace of which everything can be asked."""
    trace.summary()
    json.dumps(trace.rows())
    assert 0 <= trace.sparsity <= 1
    for layer in trace.layers.values():
        assert layer.weight.shape == layer.mask.shape
        assert not layer.weight[~layer.mask].any()


def test_damaged_traces(tmp_path, record_property):
    some_trace().save(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()

    def case(data: st.DataObject) -> None:
        content = data.draw(st.sampled_from([damaged, with_lying_header]))(data.draw, whole)
        trace = read(sf.Trace.load, tmp_path / "trace.safetensors", content)
        if trace is not None:  # the checksum lets through what was saved, and nothing else
            check_trace(trace)
            assert trace.rows() == some_trace().rows()
            for name, layer in some_trace().layers.items():
                assert torch.equal(trace.layers[name].weight, layer.weight)

    fuzz(case, record_property)


def test_traces_that_contradict_themselves(tmp_path, record_property):
    header, tensors = some_trace().to_tensors()

    def case(data: st.DataObject) -> None:
        draw, changed, whole = data.draw, dict(tensors), dict(header)
        if draw(st.booleans()):
            name = draw(st.sampled_from(list(tensors)))
            tensor = changed.pop(name)
            instead = [None, tensor.flatten(), tensor.to(torch.int8), ~tensor.bool(), tensor + 1.0, torch.zeros(0)]
            if (drawn := draw(st.sampled_from(instead))) is not None:
                changed[name] = drawn
        else:
            whole = lying(draw, whole)
        content = files.tensor_bytes("spade_fast_trace", whole, changed)
        loaded = read(sf.Trace.load, tmp_path / "trace.safetensors", content)
        if loaded is not None:
            check_trace(loaded)

    fuzz(case, record_property)


def test_damaged_images_of_a_store(tmp_path, record_property):
    maps = {"saliency": torch.rand(3, 4, generator=torch.Generator().manual_seed(0))}
    record = {"name": "cat.jpg", "labels": {}, "image_sha256": "abc"}
    whole = store.image_bytes(record, some_trace(), maps, maps)

    def case(data: st.DataObject) -> None:
        content = data.draw(st.sampled_from([damaged, with_lying_header]))(data.draw, whole)
        found = read(store.read_image, tmp_path / "cat.jpg.safetensors", content)
        if found is not None:
            assert {key: found.record[key] for key in record} == record
            assert found.trace.rows() == some_trace().rows()
            assert torch.equal(found.dense["saliency"], maps["saliency"])
            assert torch.equal(found.spade["saliency"], maps["saliency"])

    fuzz(case, record_property)


def test_records_of_a_store_that_contradict_themselves(tmp_path, record_property):
    pytest.importorskip("pyarrow")
    path = store_of(tmp_path / "store", {"cat.jpg": some_trace()}, {"cat.jpg": {"set": "odd"}}).path
    (file,) = (path / "images").iterdir()
    with files.read_tensors(file, "spade_fast_image", "an image", "run") as (header, tensors):
        header["metrics"] = {"insertion": {"dense": {"lrp": 0.5}, "spade": {"lrp": 0.75}}}

    def case(data: st.DataObject) -> None:
        file.write_bytes(files.tensor_bytes("spade_fast_image", lying(data.draw, header), tensors))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is left out
            index = store.StoreWriter(path, {"made": "by hand"}, {}).write_index()
            assert len(index.records) + len(index.damaged) == 1
        for by in ("set", "target", "answer"):
            with contextlib.suppress(sf.InvalidInputError):  # for a label that is gone
                trace_comparison._values(index, list(index), by)

    fuzz(case, record_property)


def test_damaged_lists(tmp_path, record_property):
    text = 'image,name,target,note\nphotos/1.jpg,cat,281,"two, with\na break"\n2.jpg,,7,\xc3\xa4\n'
    whole = text.encode("latin-1")

    def case(data: st.DataObject) -> None:
        found = read(listed_images, tmp_path / "list.csv", damaged(data.draw, whole))
        for each in found or ():
            assert each.name
            assert each.path.is_relative_to(tmp_path)
            assert each.target is None or each.target >= 0

    fuzz(case, record_property)


def test_damaged_tensors(tmp_path, record_property):
    tensors = {"values": torch.arange(12.0).view(3, 4), "mask": torch.ones(5, dtype=torch.bool), "none": torch.zeros(0)}
    files.write_tensors(tmp_path / "whole", "some_key", {"rows": [1, 2], "name": "\u00e4"}, tensors)
    whole = (tmp_path / "whole").read_bytes()

    def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        with files.read_tensors(path, "some_key", "numbers", "write_tensors") as found:
            return found

    def case(data: st.DataObject) -> None:
        content = data.draw(st.sampled_from([damaged, with_lying_header]))(data.draw, whole)
        found = read(load, tmp_path / "some.safetensors", content)
        if found is not None:
            assert found[0] == {"rows": [1, 2], "name": "\u00e4"}
            assert found[1].keys() == tensors.keys()
            assert all(torch.equal(found[1][name], each) for name, each in tensors.items())

    fuzz(case, record_property)


def picture(format: str) -> bytes:
    """A small photograph in that format, with what its header may hold: palettes, transparency, EXIF, frames."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 4)).astype(np.uint8)
    image, file = Image.fromarray(pixels), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    if format == "JPEG":
        image.convert("RGB").save(file, format, exif=exif, quality=80)
    elif format == "PNG":
        image.save(file, format, exif=exif)
    elif format == "PNG with a palette":
        image.convert("P").save(file, "PNG", transparency=3)
    elif format == "PNG of 16 bits":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(file, "PNG")
    elif format == "GIF":
        image.convert("P").save(
            file, format, save_all=True, append_images=[image.convert("P").rotate(90)], transparency=0
        )
    elif format == "TIFF":
        image.save(file, format, compression="tiff_lzw", exif=exif)
    elif format == "WebP":
        image.save(file, format, exif=exif, lossless=True)
    return file.getvalue()


PICTURES = ["JPEG", "PNG", "PNG with a palette", "PNG of 16 bits", "GIF", "TIFF", "WebP"]


@pytest.mark.parametrize("format", PICTURES)
def test_damaged_images(format, tmp_path, record_property):
    whole = picture(format)

    def case(data: st.DataObject) -> None:
        image = read(load_image, tmp_path / "picture", damaged(data.draw, whole))
        if image is not None:
            assert image.mode == "RGB"
            assert image.width * image.height > 0
            image.tobytes()

    fuzz(case, record_property)


CHECKPOINTS: dict[str, Callable[[dict[str, Tensor], Any], None]] = {
    "torch.save": torch.save,
    "torch.save before 1.6": lambda state, file: torch.save(state, file, _use_new_zipfile_serialization=False),
    "safetensors": lambda state, file: file.write(save(state)),
}


@pytest.mark.parametrize("format", CHECKPOINTS)
def test_damaged_checkpoints(format, tmp_path, record_property):
    torch.manual_seed(0)
    saved, module, file = nn.Linear(4, 3), nn.Linear(4, 3), io.BytesIO()
    CHECKPOINTS[format](saved.state_dict(), file)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    path = tmp_path / f"weights.{'safetensors' if format == 'safetensors' else 'pth'}"

    def load(path: Path) -> nn.Module:
        load_checkpoint(path, module)
        return module

    def other(draw: Draw, _: bytes) -> bytes:
        state = dict(saved.state_dict())
        name = draw(st.sampled_from(list(state)))
        tensor = state.pop(name)
        value = draw(st.sampled_from([None, tensor[:1], tensor.int(), tensor.double() * 1e300, tensor * math.nan]))
        if value is not None:
            state[draw(st.sampled_from([name, name, f"module.{name}", "other"]))] = value
        content = io.BytesIO()
        CHECKPOINTS[format](state, content)
        return content.getvalue()

    damages = [damaged, other, *([with_lying_header] if format == "safetensors" else [])]

    def case(data: st.DataObject) -> None:
        damage = data.draw(st.sampled_from(damages))
        module.load_state_dict(before)
        if read(load, path, damage(data.draw, file.getvalue())) is None:
            assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
        else:
            assert all(value.isfinite().all() for value in module.parameters())

    fuzz(case, record_property)


def test_damaged_plans(tmp_path, record_property):
    whole = sf.SparsityPlan({"layer4.1": 0.95, "fc": 0.5}, default=0.25).to_dict()

    def damaged_text(draw: Draw) -> bytes:
        return damaged(draw, json.dumps(whole).encode())

    def lying_text(draw: Draw) -> bytes:
        return json.dumps(lying(draw, whole)).encode()

    def case(data: st.DataObject) -> None:
        content = data.draw(st.sampled_from([damaged_text, lying_text, lying_text]))(data.draw)
        plan = read(sf.SparsityPlan.from_json, tmp_path / "plan.json", content)
        if plan is not None:
            assert all(0 <= share <= 1 for share in plan.shares)
            plan.to_json(tmp_path / "again.json")
            assert sf.SparsityPlan.from_json(tmp_path / "again.json") == plan

    fuzz(case, record_property)


SHARES = 3 * len(OPERATORS) + 7 + len(PICTURES) + len(CHECKPOINTS)
