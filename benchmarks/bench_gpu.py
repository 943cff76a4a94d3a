"""Hessians, solver, views and whole traces on a GPU, against plain PyTorch on the same card: see gpu_check.sh.

    SPADE_FAST_BENCH_DEVICE   default cuda; cpu runs everything on tiny sizes, to try this file out
    SPADE_FAST_BENCH_SECONDS  from then on what is left is skipped
    SPADE_FAST_PROFILE        a file: profile one ResNet-50 trace into it, for chrome://tracing

Agreement is asserted before anything is timed. The clock waits for the device before it is read.
"""

from __future__ import annotations

import copy
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import published
import pytest
import torch
from bench_hessian import CASES as LAYERS
from bench_hessian import LAYERS as LAYERS_OF
from bench_hessian import multiply_adds
from bench_solver import SHAPES, SPARSITY, flops
from bench_trace import PHOTO, PREPROCESS, load
from torch import Tensor, nn
from torch.profiler import profile

import spade_fast as sf
from spade_fast import ops, reference
from spade_fast.solver import Problem, Target, lower_factors, solve_layers

DEVICE = torch.device(os.environ.get("SPADE_FAST_BENCH_DEVICE", "cuda"))
TINY = DEVICE.type == "cpu"
SECONDS = float(os.environ.get("SPADE_FAST_BENCH_SECONDS", "inf"))
START = time.perf_counter()

IMAGES = 2 if TINY else 64  # of a Hessian
VIEWS = 8 if TINY else 1024  # of the augmentation alone
FEW, MANY = (2, 4) if TINY else (64, 1024)  # views of a trace
FLIGHTS = (1, 2) if TINY else (1, 2, 4, 8)
RESNET, LITE0 = ("a tiny network", "a tiny network") if TINY else ("ResNet-50", "EfficientNet-Lite0")
if TINY:
    LAYERS = [layer for layer in LAYERS if layer.channels <= 64][:6]
    SHAPES = dict(list(SHAPES.items())[:3])
#: Bytes of a number, by what products are taken in.
NUMBERS = {"float32": 4, "tf32": 4, "bfloat16": 2, "float64": 8}


def clock() -> float:
    """Seconds, read when the device has done all that was queued."""
    if not TINY:
        torch.cuda.synchronize()
    return time.perf_counter()


pytestmark = [
    pytest.mark.benchmark(timer=clock),
    pytest.mark.skipif(DEVICE.type not in ops.native_devices(), reason=f"the extension is not built for {DEVICE.type}"),
    pytest.mark.skipif(not TINY and not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:Benchmark fixture was not used"),  # by what is skipped, or fails
    pytest.mark.filterwarnings("ignore:layer .* outputs have no weight left"),
]


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Skips what would begin too late. Nothing is rounded to TF32 unless a test says so."""
    if time.perf_counter() - START > SECONDS:
        pytest.skip(f"not begun within {SECONDS:.0f} s")
    with products_in("float32"):
        yield


@contextmanager
def products_in(unit: str) -> Iterator[None]:
    """float32 products of torch's own are rounded to TF32 with "tf32", else not."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = unit == "tf32"
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def seconds_of(function: Callable[[], object]) -> float:
    """The median of ten runs, after two that are not counted."""
    times = []
    for _ in range(12):
        start = clock()
        function()
        times.append(clock() - start)
    return statistics.median(times[2:])


@pytest.fixture(scope="session")
def ceilings() -> dict[str, float]:
    """What the device reaches: FLOP/s of a large matrix product of each kind; bytes/s of a copy, read and written."""
    size, numbers = (256, 1 << 20) if TINY else (8192, 1 << 28)
    found = {}
    source, target = torch.rand(numbers, device=DEVICE), torch.empty(numbers, device=DEVICE)
    found["copy"] = 2 * 4 * numbers / seconds_of(lambda: target.copy_(source))
    for unit in NUMBERS:
        dtype = torch.float32 if unit == "tf32" else getattr(torch, unit)
        matrix = torch.randn(size, size, device=DEVICE, dtype=dtype)
        out = torch.empty_like(matrix)
        with products_in(unit):
            found[unit] = 2 * size**3 / seconds_of(lambda matrix=matrix, out=out: torch.mm(matrix, matrix, out=out))
    return found


@pytest.fixture
def report(benchmark, ceilings):
    """Keeps figures for gpu_report.py: the least operations and bytes of the work, and in what `unit` it multiplies."""

    def keep(kind: str, case: str, variant: str, **figures: object) -> None:
        benchmark.group = f"{kind} {case}"
        benchmark.extra_info.update(kind=kind, case=case, variant=variant, ceilings=ceilings, **figures)

    return keep


@pytest.fixture
def measure(benchmark):
    """Times a function on one set of arguments after the other, and keeps the most memory that it takes.

    Rounds take milliseconds, all together a fifth of a second if that is enough for three; of what takes longer than a
    second there is one. With `once` no run goes before it.
    """

    def run(function: Callable[..., object], *argument_sets: tuple[Any, ...], once: bool = False) -> None:
        turns = itertools.cycle(argument_sets or [()])
        rounds = iterations = 1
        call = lambda: function(*next(turns))  # noqa: E731
        if not once:
            call()
            start = clock()
            call()
            seconds = clock() - start
            iterations = max(1, min(50, round(2e-3 / seconds)))
            rounds = 1 if seconds > 1 else max(3, min(20, round(0.2 / (iterations * seconds))))
        if TINY:
            benchmark.pedantic(call, rounds=rounds, iterations=iterations)
            return
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        benchmark.pedantic(call, rounds=rounds, iterations=iterations)
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated() - before

    return run


# Whole traces


@cache
def net(name: str) -> sf.LoadedModel:
    """A network of random weights on the device: no time depends on them."""
    if TINY:
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.ReLU()]
        module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
        return sf.LoadedModel(name, module, replace(PREPROCESS, input_size=32), categories=None, source="random")
    loaded = load(name)
    return replace(loaded, module=loaded.module.to(DEVICE))


@cache
def check_trace(name: str, sparsity: Any = 0.9) -> None:
    """Layers of a trace equal the published procedure's in float64, where greedy pruning is not chaotic."""
    network = net(name)
    exact = replace(network, module=copy.deepcopy(network.module).double())
    names = list(targets_of(name, sparsity))
    views = drawn_views(name, 4)

    def same_views(image: Tensor, count: int, generator: torch.Generator) -> Tensor:  # noqa: ARG001
        return views

    settings: dict[str, Any] = {"num_augmentations": 4, "batch_size": 4, "backend": "native", "augment": same_views}
    trace = sf.trace(exact, PHOTO, sparsity, layers=[*names[:12], names[-1]], **settings)
    targets = {layer: found.requested_sparsity for layer, found in trace.layers.items()}
    plain = published.trace(exact.module, targets, lambda drawn: network.preprocess(drawn).double(), lambda: views)
    for layer, (sparse, loss) in plain.items():
        assert trace.layers[layer].loss == pytest.approx(loss, rel=1e-6), layer
        torch.testing.assert_close(trace.layers[layer].weight, sparse, rtol=1e-6, atol=1e-6 * sparse.abs().max().item())


def trace_settings(unit: str, views: int) -> dict[str, Any]:
    return {
        "num_augmentations": views,
        "hessian_dtype": "tf32" if unit == "tf32" else None,
        "backend": "native",
    }


def least_flops(name: str, views: int, all_layers: bool) -> float:
    """Of the forward passes; where all layers are pruned, of their Hessians and solves too."""
    total = 0.0
    for layer, count in LAYERS_OF.get(name, {}).items():
        total += count * 2 * views * layer.outputs * layer.columns * layer.positions
        if all_layers:
            total += count * 2 * views * multiply_adds(layer)
            total += count * layer.groups * flops(layer.outputs // layer.groups, layer.columns)
    return total


def drawn_views(name: str, views: int) -> Tensor:
    return published.draw_views(PHOTO, net(name).preprocess.input_size, views).to(DEVICE)


def published_trace(name: str, targets: dict[str, float], views: int) -> object:
    network = net(name)
    return published.trace(network.module, targets, network.preprocess, lambda: drawn_views(name, views))


def seconds_of_published_hessians(name: str, targets: dict[str, float]) -> float:
    """Of the few views of a trace."""
    start = clock()
    published.hessians(net(name).module, list(targets), net(name).preprocess(drawn_views(name, FEW)))
    return clock() - start


def targets_of(name: str, sparsity: Any) -> dict[str, float]:
    trace = sf.trace(net(name), PHOTO, sparsity, num_augmentations=1)
    return {layer: found.requested_sparsity for layer, found in trace.layers.items()}


@pytest.mark.parametrize("unit", ["float32", "tf32"])
@pytest.mark.parametrize("views", sorted({FEW, 4 * FEW, MANY}))
def test_trace_of_all_layers(report, measure, views, unit):
    check_trace(RESNET)
    report(
        "trace",
        f"{RESNET}, all layers at 0.9, {views} views",
        unit,
        unit=unit,
        flops=least_flops(RESNET, views, all_layers=True),
    )
    with products_in(unit):
        measure(lambda: sf.trace(net(RESNET), PHOTO, 0.9, **trace_settings(unit, views)))


@pytest.mark.parametrize("unit", ["float32", "tf32"])
def test_trace_of_the_last_half(report, measure, unit):
    check_trace(LITE0, sf.presets.last_half)
    report(
        "trace",
        f"{LITE0}, last half at 0.8, {FEW} views",
        unit,
        unit=unit,
        flops=least_flops(LITE0, FEW, all_layers=False),
    )
    with products_in(unit):
        measure(lambda: sf.trace(net(LITE0), PHOTO, **trace_settings(unit, FEW)))


def test_exact_trace(report, measure):
    case = f"{RESNET}, all layers at 0.9, {FEW} views, exact solver"
    eliminations = sum(
        count * layer.outputs * layer.columns**3 / 3 for layer, count in LAYERS_OF.get(RESNET, {}).items()
    )
    report("trace", case, "float32", unit="float32", flops=least_flops(RESNET, FEW, all_layers=True) + eliminations)
    settings = {**trace_settings("float32", FEW), "solver": "exact"}
    measure(lambda: sf.trace(net(RESNET), PHOTO, 0.9, **settings), once=True)


@pytest.mark.parametrize("unit", ["float32", "tf32"])
@pytest.mark.parametrize("in_flight", FLIGHTS)
def test_images_in_flight(report, measure, in_flight, unit):
    check_trace(RESNET)
    images = [PHOTO] * max(FLIGHTS)
    report(
        "flight",
        f"{RESNET}, all layers at 0.9, {FEW} views, {unit}",
        f"{in_flight} in flight",
        unit=unit,
        images=len(images),
        flops=len(images) * least_flops(RESNET, FEW, all_layers=True),
    )
    settings = {**trace_settings(unit, FEW), "images_in_flight": in_flight}
    with products_in(unit):
        measure(lambda: list(sf.trace_many(net(RESNET), images, 0.9, **settings)))


# Views


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_views(report, measure, backend):
    preprocess = net(RESNET).preprocess
    image, augmentation = preprocess.frame(PHOTO).to(DEVICE), sf.Augmentation(size=preprocess.input_size)
    views = augmentation.sample((image.shape[1], image.shape[2]), VIEWS, torch.Generator().manual_seed(0))
    native, plain = (augmentation.render(image, views[:8], backend=which) for which in ("native", "reference"))
    torch.testing.assert_close(native, plain, rtol=0, atol=1e-4)
    report(
        "views",
        f"{VIEWS} views of {preprocess.input_size} x {preprocess.input_size}",
        backend,
        bytes=4 * (image.numel() + VIEWS * 3 * preprocess.input_size**2),
    )
    measure(lambda: augmentation.render(image, views, backend=backend))


# Solver


@cache
def problem_of(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weight [rows, columns] and Hessian [columns, columns]."""
    generator = torch.Generator(DEVICE).manual_seed(columns)
    inputs = torch.randn(columns, 2 * columns, generator=generator, device=DEVICE)
    product = inputs @ inputs.T / columns
    hessian = product.tril() + product.tril(-1).mT  # symmetric to the last bit, as the native operator's are
    return torch.randn(rows, columns, generator=generator, device=DEVICE), hessian


def damped(hessian: Tensor) -> Tensor:
    matrix = hessian.clone()
    matrix.diagonal().add_(0.01 * matrix.diagonal().mean())
    return matrix[None]


def plain_loss(weight: Tensor, hessian: Tensor, block: int) -> float:
    upper = reference.factor(damped(hessian))
    return reference.prune_columns(weight[None], upper, SPARSITY, block, False)[2].item()


@cache
def check_solver() -> None:
    for rows, columns, block in list(SHAPES)[::3]:
        weight, hessian = problem_of(rows, columns)
        native = sf.solve(weight, hessian, SPARSITY, block_size=block, backend="native").loss
        assert native == pytest.approx(plain_loss(weight, hessian, block), rel=0.01)


def network_problems(images: int) -> list[Problem]:
    """All layers of so many traces; each has its own memory."""
    problems = []
    for (rows, columns, block), count in SHAPES.items():
        for _ in range(count * images):
            weight, hessian = problem_of(rows, columns)
            problems.append(Problem(weight, hessian.clone(), (Target(SPARSITY, block),), symmetric=True))
    return problems


@pytest.mark.parametrize("what", ["factor", "columns", "factor and columns"])
@pytest.mark.parametrize("variant", [*(f"{count} in flight" for count in (1, FLIGHTS[-1])), "reference"])
def test_solving_a_network(report, measure, what, variant):
    check_solver()
    plain = variant == "reference"
    images = 1 if plain else int(variant.split()[0])
    problems = network_problems(images)
    shapes = [problem.weight.shape for problem in problems]
    report(
        "network",
        f"{what}, {len(problems) // images} layers of ResNet-50",
        variant,
        unit="float32",
        images=images,
        flops=sum(
            (columns**3 / 3 if "factor" in what else 0) + (rows * columns**2 if "columns" in what else 0)
            for rows, columns in shapes
        ),
    )
    weights, hessians = ([tensor[None] for tensor in each] for each in zip(*map(tensors_of, problems), strict=True))
    blocks = [problem.targets[0].block_size for problem in problems]
    if what == "factor" and plain:
        matrices = [damped(problem.hessian) for problem in problems]
        measure(lambda: [reference.factor(matrix) for matrix in matrices])
    elif what == "factor":
        measure(lambda: ops.factor_hessians(hessians, 0.01))
    elif what == "columns" and plain:
        uppers = [reference.factor(damped(problem.hessian)) for problem in problems]
        arguments = list(zip(weights, uppers, blocks, strict=True))
        measure(lambda: [reference.prune_columns(*wu, SPARSITY, block, False) for *wu, block in arguments], once=True)
    elif what == "columns":
        factors = ops.factor_hessians(hessians, 0.01)[0]
        sparsities = [SPARSITY] * len(problems)
        measure(lambda: ops.prune_layers(weights, factors, sparsities, blocks, False))
    elif plain:
        measure(lambda: [plain_loss(*tensors_of(each), each.targets[0].block_size) for each in problems], once=True)
    else:
        measure(lambda: solve_layers(problems, backend="native"))


def test_eliminating_a_network(report, measure):
    problems = network_problems(1)
    weights, inverses, blocks = [], [], []
    for problem in problems:
        weight, hessian = tensors_of(problem)
        weights.append(weight[None])
        inverses.append(torch.linalg.inv(damped(hessian)))
        blocks.append(problem.targets[0].block_size)
    (losses,) = ops.elimination_orders([weights[0][:, :4]], inverses[:1], blocks[:1])[1]
    _, expected = reference.elimination_order(weights[0][:, :4].double(), inverses[0].double(), blocks[0])
    assert losses.sum().item() == pytest.approx(expected.sum().item(), rel=1e-3)
    report(
        "network",
        f"elimination by rows, {len(problems)} layers of ResNet-50",
        "1 in flight",
        unit="float32",
        images=1,
        flops=sum(weight.shape[1] * weight.shape[2] ** 3 / 3 for weight in weights),
    )
    measure(lambda: ops.elimination_orders(weights, inverses, blocks), once=True)


def tensors_of(problem: Problem) -> tuple[Tensor, Tensor]:
    return problem.weight, problem.hessian


# What plain PyTorch takes for a trace


@pytest.mark.parametrize("name", dict.fromkeys([RESNET, LITE0]))
def test_published_trace(report, measure, name):
    time_published_trace(report, measure, name, "float32")


def time_published_trace(report: Callable[..., None], measure: Callable[..., None], name: str, unit: str) -> None:
    whole = name == RESNET
    case = f"{name}, {'all layers at 0.9' if whole else 'last half at 0.8'}, {FEW} views"
    targets = targets_of(name, 0.9 if whole else sf.presets.last_half)
    variant = "reference" if unit == "float32" else "reference, tf32"
    report("trace", case, variant, flops=least_flops(name, FEW, whole), unit=unit)
    with products_in(unit):
        seconds_of_published_hessians(name, targets)  # warms torch's libraries
        measure(lambda: published_trace(name, targets, FEW), once=whole)


# Hessians


def native_gram(images: Tensor, geometry: ops.Geometry, unit: str) -> Tensor:
    """As in a trace, where inputs come in float32."""
    if unit == "bfloat16":
        images = images.bfloat16()
    size = (images.shape[1], images.shape[2], images.shape[3])
    sums = torch.zeros(ops.conv2d_sums_shape(size, geometry), device=DEVICE)
    ops.add_conv2d_sums_(sums, images, geometry, unit == "tf32")
    return ops.conv2d_gram(sums, size, geometry)


@pytest.mark.parametrize("variant", ["float32", "tf32", "bfloat16", "reference"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_hessian(report, measure, layer, variant):
    sides = [(layer.kernel,) * 2, (layer.stride,) * 2, (layer.padding,) * 2, (1, 1)]
    geometry = ops.Geometry(*sides, layer.groups)
    shape = (IMAGES, layer.channels, layer.size, layer.size)
    bytes_read = 4 * IMAGES * layer.channels * layer.size**2
    # As many inputs as no cache holds, one after the other.
    copies = 1 if TINY else max(1, min(16, (256 << 20) // bytes_read))
    inputs = [torch.randn(shape, device=DEVICE) for _ in range(copies)]
    if variant != "reference":
        expected = reference.conv2d_gram(inputs[0], geometry)
        inputs = [images.contiguous(memory_format=torch.channels_last) for images in inputs]
        tolerance = {"float32": 1e-4, "tf32": 2e-3, "bfloat16": 1e-2}[variant] * expected.abs().max().item()
        torch.testing.assert_close(native_gram(inputs[0], geometry, variant), expected, rtol=0, atol=tolerance)
        del expected
    report(
        "hessian",
        str(layer),
        variant,
        unit="float32" if variant == "reference" else variant,
        networks={name: layers[layer] for name, layers in LAYERS_OF.items() if layer in layers},
        flops=2 * IMAGES * multiply_adds(layer),
        bytes=bytes_read + 4 * layer.groups * layer.columns**2,
    )
    if variant == "reference":
        measure(reference.conv2d_gram, *((images, geometry) for images in inputs))
    else:
        measure(native_gram, *((images, geometry, variant) for images in inputs))


# Single layers alone: a GPU has room for many at once.


@pytest.mark.parametrize("variant", ["native", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_factor(report, measure, shape, variant):
    rows, columns, _ = shape
    _, hessian = problem_of(rows, columns)
    (factor,) = lower_factors([hessian[None]], 0.01)
    assert factor is not None
    matrix = damped(hessian)
    torch.testing.assert_close(factor.mT @ factor, matrix, rtol=0, atol=1e-4 * matrix.abs().max().item())
    report(
        "factor",
        f"{columns} columns, for {rows} rows",
        variant,
        unit="float32",
        networks={"ResNet-50": SHAPES[shape]},
        flops=columns**3 / 3,
        bytes=4 * columns**2,
    )
    if variant == "reference":
        measure(lambda: reference.factor(matrix))
    else:
        measure(lambda: ops.factor_hessian(hessian[None], 0.01))


@pytest.mark.parametrize("variant", ["native", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_columns(report, measure, shape, variant):
    rows, columns, block = shape
    weight, hessian = problem_of(rows, columns)
    run = {"native": ops.prune_columns, "reference": reference.prune_columns}
    factors = {"native": ops.factor_hessian(hessian[None], 0.01)[0], "reference": reference.factor(damped(hessian))}
    arguments = {which: (weight[None], factors[which], SPARSITY, block, False) for which in run}
    if variant == "native":
        losses = [run[which](*arguments[which])[2].item() for which in run]
        assert losses[0] == pytest.approx(losses[1], rel=0.01)
    report(
        "columns",
        f"{rows} x {columns}, {block} a threshold",
        variant,
        unit="float32",
        networks={"ResNet-50": SHAPES[shape]},
        flops=rows * columns**2,
        bytes=4 * (2 * rows * columns + columns**2 / 2),
    )
    measure(run[variant], arguments[variant])


# What takes long and is not needed first


def test_published_trace_rounded_to_tf32(report, measure):
    time_published_trace(report, measure, RESNET, "tf32")


def test_published_trace_of_many_views(report, measure):
    targets = targets_of(RESNET, 0.9)
    seconds_of_published_hessians(RESNET, targets)  # warms torch's libraries
    expected = seconds_of_published_hessians(RESNET, targets) * MANY / FEW
    if expected > 40:
        pytest.skip(f"its Hessians alone would take {expected:.0f} s")
    name = f"{RESNET}, all layers at 0.9, {MANY} views"
    report("trace", name, "reference", flops=least_flops(RESNET, MANY, all_layers=True), unit="float32")
    measure(lambda: published_trace(RESNET, targets, MANY), once=True)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
@pytest.mark.skipif("SPADE_FAST_PROFILE" not in os.environ, reason="SPADE_FAST_PROFILE names no file")
def test_profile():
    network, settings = net(RESNET), trace_settings("float32", FEW)
    sf.trace(network, PHOTO, 0.9, **settings)
    clock()
    with profile() as profiler:  # of the host and, where there is one, the GPU
        sf.trace(network, PHOTO, 0.9, **settings)
        clock()
    profiler.export_chrome_trace(os.environ["SPADE_FAST_PROFILE"])
