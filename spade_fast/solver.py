"""Pruning layers: damping, factorization, column-wise OBS (fast) or optimal brain compression by rows (exact)."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, get_args, overload

import torch
from torch import Tensor

from spade_fast import ops, reference
from spade_fast.autocast import without_autocast
from spade_fast.elimination import BlockLayout, Blocks, Elimination, check_size, eliminate_layers
from spade_fast.errors import InvalidInputError
from spade_fast.plans import check_sparsity
from spade_fast.refit import refit_kept

Solver = Literal["fast", "exact"]
Fallback = Literal["float64", "damping"]

# Backward error of a Cholesky factor in units of d * eps above which LAPACK's own tests call it broken.
_LAPACK_TEST_RATIO = 30.0
# Where the damping that was asked for does not do even in float64, it is raised from here, tenfold each time.
_SMALLEST_RAISED_DAMPING = 1e-6
_LARGEST_DAMPING = 1.0
# Largest entries of a Hessian between which no sum and no inverse of float64 leaves its range.
_UNIT_RANGE = 1e-300, 1e300
# Multiply-adds that eliminating a layer takes, from which on a CPU is said to take long.
_LONG_ELIMINATION = 3e14
# Side of the tiles in which a CPU compares mirrored entries: they fit its cache.
_TILE = 256
# Share of the largest entry by which mirrored entries may differ: what float32 sums in another order may do.
_LARGEST_ASYMMETRY = 1e-4


@dataclass(frozen=True)
class Solution:
    """A pruned layer.

    Attributes
    ----------
    weight
        Sparse weight, shape and dtype of the one given.
    mask
        bool, same shape: True where a weight was kept. False for all weights of dead inputs.
    loss
        Half the increase of the quadratic layer error, tr((W - Q) H (W - Q)^T) / 2, with the damped H. With
        H = (2 / n) X X^T this is the squared error of the layer's outputs, summed over outputs, mean over samples.
    damping
        What was added to the Hessian's diagonal, as a share of its mean.
    fallback
        None, "float64" (what failed in float32 was redone in float64) or "damping" (raised too, beyond what was asked).
    """

    weight: Tensor
    mask: Tensor
    loss: float
    damping: float
    fallback: Fallback | None = None


@dataclass(frozen=True)
class Factor:
    """A damped Hessian's factor, or for the exact solver its inverse, and how it was found (see :class:`Solution`).

    A backend has its own kind of factor, in the dtype of the weight or float64; an inverse is float64. [G, d, d]
    """

    matrix: Tensor
    damping: float
    fallback: Fallback | None


@overload
def solve(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    *,
    block_size: int = ...,
    damping: float = ...,
    solver: Solver = ...,
    block_layout: BlockLayout = ...,
    mask_rule: ops.MaskRule = ...,
    refit: bool = ...,
    backend: ops.Backend = ...,
) -> Solution: ...
@overload
def solve(
    weight: Tensor,
    hessian: Tensor,
    sparsity: Sequence[float],
    *,
    block_size: int = ...,
    damping: float = ...,
    solver: Solver = ...,
    block_layout: BlockLayout = ...,
    mask_rule: ops.MaskRule = ...,
    refit: bool = ...,
    backend: ops.Backend = ...,
) -> list[Solution]: ...
def solve(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float | Sequence[float],
    *,
    block_size: int = 1,
    damping: float = 0.01,
    solver: Solver = "fast",
    block_layout: BlockLayout = "taps",
    mask_rule: ops.MaskRule = "exact_count",
    refit: bool = False,
    backend: ops.Backend = "auto",
) -> Solution | list[Solution]:
    """Prune one layer to a target sparsity, adjusting the kept weights (SPADE section 3).

    The fast solver (FastSPADE, after SparseGPT) goes through the columns once, the same for all rows. The exact one
    (SPADE, after OBC) goes through each row by itself: it prunes the weight, or block of weights, that costs least when
    all that are left make up for it, then the next one, and of all rows' steps it takes the cheapest. Single weights go
    at lower losses than by the fast one; whole blocks leave less to choose. It takes r * d^3 / 6 multiply-adds
    instead of d^3 / 6 + r * d^2 / 2; several shares cost little more.

    Inputs that are zero in every sample (zero on the Hessian's diagonal) lose all their weights and take no part in the
    damping: beside the count that is asked for; with the exact solver, whose rows need not be alike, as a part of it.
    Sparsity 0 returns the weights bit for bit, without looking at the Hessian.

    Parameters
    ----------
    weight
        [rows, ...], flattened to [rows, d]; its rows are split evenly over the groups. float32 and float64 are
        solved as they are, half precision in float32.
    hessian
        [G, d, d] or, for one group, [d, d]: as from :func:`spade_fast.hessian`. Not changed.
    sparsity
        Share of weights to prune, 0..1, by the fast solver of each block of columns; or several such shares, which have
        one factorization in common, or one elimination.
    block_size
        Fast: columns that share one threshold, over all rows and groups. Exact: columns of which a row's weights are
        kept or pruned as one; the share is one of such blocks. Either way k * k for a convolution, as published.
    damping
        Added to the diagonal, as a share of its mean; at least 0.
    solver
        "fast" or "exact".
    block_layout
        What the exact solver's blocks are made of: "taps", neighbouring columns, so the taps of one channel; or
        "channels", as published, neighbouring channels at one tap. The last block may have fewer.
    mask_rule
        "exact_count" prunes round-half-up(n * sparsity) of a block's n weights, ties to the lowest (row, column);
        "published" prunes all scores up to and including the int(n * sparsity)-th smallest: one more, and all ties. Of
        the exact solver, n being all blocks of all rows: round-half-up, and rounded up.
    refit
        Give the kept weights of each row their least-squares optimum under the mask, which stays as it is, as the exact
        solver always does. Otherwise a weight makes up only for those pruned before it, column by column. Costs n^3 / 6
        multiply-adds in float64 a row, n being the smaller of its counts of kept and pruned weights, or that of kept
        ones where the Hessian is so close to singular that the smaller system is not accurate.
    backend
        "auto" (native, or with a warning the reference), "native" or "reference".

    Returns
    -------
    Solution or list[Solution]
        One for each share, in their order, where several are given.

    Raises
    ------
    InvalidInputError
        For shapes, dtypes and devices that do not fit, values that are not finite, arguments out of range, and a
        Hessian that has no Cholesky factor even at damping 1 (it is not positive semidefinite).
    """
    several = isinstance(sparsity, Sequence) and not isinstance(sparsity, str)
    shares: Any = sparsity if several else [sparsity]
    solutions = solve_layers(
        [Problem(weight, hessian, tuple(Target(share, block_size) for share in shares))],
        damping=damping,
        solver=solver,
        block_layout=block_layout,
        mask_rule=mask_rule,
        refit=refit,
        backend=backend,
    )[0]
    return solutions if several else solutions[0]


class Target(NamedTuple):
    """How far to prune a layer, and how many columns share a threshold or, by the exact solver, go as one."""

    sparsity: float
    block_size: int = 1


@dataclass(frozen=True)
class Problem:
    """One layer to prune to one or more targets: arguments of :func:`solve`, and the layer's name for messages.

    With `symmetric` the Hessian is known to be so to the last bit, as those of the native operators are.
    """

    weight: Tensor
    hessian: Tensor
    targets: tuple[Target, ...]
    name: str | None = None
    symmetric: bool = False


@without_autocast
def solve_layers(
    problems: Sequence[Problem],
    *,
    damping: float = 0.01,
    solver: Solver = "fast",
    block_layout: BlockLayout = "taps",
    mask_rule: ops.MaskRule = "exact_count",
    refit: bool = False,
    backend: ops.Backend = "auto",
) -> list[list[Solution]]:
    """Solve many layers, which natively are factored and pruned side by side: see :func:`solve`.

    All are on one device. Peak memory is some three times that of the Hessians and what the solutions take; with the
    exact solver, whose inverses are float64, seven times that of float32 Hessians.

    Returns
    -------
    list[list[Solution]]
        Of each problem a solution for each of its targets.
    """
    prepared = _prepare_layers(problems, damping, solver, block_layout, mask_rule, refit, backend)
    wanted = [(i, j) for i, problem in enumerate(problems) for j in range(len(problem.targets))]
    solutions = prepared.solve(wanted, refit=refit)
    return [[solutions[i, j] for j in range(len(problem.targets))] for i, problem in enumerate(problems)]


@without_autocast
def solve_within(
    problems: Sequence[Problem],
    allowed: Callable[[int, float], bool],
    *,
    damping: float = 0.01,
    solver: Solver = "fast",
    block_layout: BlockLayout = "taps",
    mask_rule: ops.MaskRule = "exact_count",
    refit: bool = False,
    backend: ops.Backend = "auto",
) -> list[tuple[int, Solution] | None]:
    """Solve many layers each as far as is `allowed`, which is asked of a problem's position and a loss.

    See :func:`solve_layers`. The targets of a problem ascend in sparsity, and so do losses: the last that is allowed is
    found by bisection. Of eleven targets four at most are solved, and one solution of a layer is kept; the exact solver
    knows all losses beforehand. What the fast one asks about is not refitted yet, which would make its loss smaller.

    Returns
    -------
    list[tuple[int, Solution] | None]
        Of each problem which target that is, and the solution; None where not even the first is allowed.
    """
    prepared = _prepare_layers(problems, damping, solver, block_layout, mask_rule, refit, backend)
    best: dict[int, tuple[int, Solution | None]] = {}
    first = [0] * len(problems)  # of the targets that are neither known to be allowed nor known not to be
    end = [len(problem.targets) for problem in problems]
    while places := [(i, (first[i] + end[i]) // 2) for i in range(len(problems)) if first[i] < end[i]]:
        for (i, j), (loss, solution) in prepared.attempt(places).items():
            if allowed(i, loss):
                best[i], first[i] = (j, solution), j + 1
            else:
                end[i] = j
    unfinished = [(i, j) for i, (j, solution) in best.items() if refit or solution is None]
    finished = prepared.solve(unfinished, refit=refit)
    found: list[tuple[int, Solution] | None] = [None] * len(problems)
    for i, (j, solution) in best.items():
        found[i] = (j, finished[i, j] if solution is None or refit else solution)
    return found


def _prepare_layers(
    problems: Sequence[Problem],
    damping: float,
    solver: Solver,
    block_layout: BlockLayout,
    mask_rule: ops.MaskRule,
    refit: bool,
    backend: ops.Backend,
) -> _Prepared:
    check_rules(damping=damping, solver=solver, block_layout=block_layout, mask_rule=mask_rule, refit=refit)
    grouped: dict[int, tuple[Tensor, Tensor]] = {}  # weight and Hessian of what is to be pruned
    for i, problem in enumerate(problems):
        with _naming(problem):
            arguments = _check(problem)
        if not all(_is_dense(target, mask_rule) for target in problem.targets):
            grouped[i] = arguments
    if not grouped:
        return _Factored(problems, {}, {}, mask_rule, native=False)
    # Each step looks at what decides in all layers at once, since on a GPU the host waits whenever it looks.
    prepared = _prepare_all(problems, grouped)
    native = ops.resolve_backend(backend, problems[0].weight.device) == "native"
    if solver == "exact":
        factors, eliminations = _eliminate_all(problems, prepared, damping, block_layout, mask_rule, native)
        return _Eliminated(problems, prepared, factors, mask_rule, native, eliminations)
    return _Factored(problems, prepared, _factor_all(problems, prepared, damping, native), mask_rule, native)


def check_rules(
    *, damping: object, solver: object, block_layout: object, mask_rule: object = "exact_count", refit: object = False
) -> None:
    """Refuse values that no layer could be solved by (see :func:`solve`)."""
    for name, value, known in (
        ("solver", solver, get_args(Solver)),
        ("block_layout", block_layout, get_args(BlockLayout)),
        ("mask_rule", mask_rule, get_args(ops.MaskRule)),
    ):
        if value not in known:
            raise InvalidInputError(f"{name}={value!r} is unknown: choose one of {', '.join(known)}")
    if solver == "fast" and block_layout != "taps":
        raise InvalidInputError(
            f"block_layout={block_layout!r} is for solver='exact': the fast solver has no such blocks"
        )
    if isinstance(damping, bool) or not (isinstance(damping, (int, float)) and 0 <= damping < math.inf):
        raise InvalidInputError(f"damping must be a finite share of the mean diagonal, at least 0, got {damping!r}")
    if not isinstance(refit, bool):
        raise InvalidInputError(f"refit must be True or False, got {refit!r}")


def _is_dense(target: Target, mask_rule: ops.MaskRule) -> bool:
    """Whether it leaves the weights as they are."""
    return target.sparsity == 0 and mask_rule == "exact_count"


# Positions of a problem and of one of its targets.
_Place: TypeAlias = tuple[int, int]


class _Grouped(NamedTuple):
    """A problem in the shapes of the operators."""

    weight: Tensor  # [G, r, d]
    hessian: Tensor  # [G, d, d]
    dead: Tensor | None  # [G, d] bool, inputs that are always zero; None where there are none


#: Sparse weight [G, r, d], mask of that shape and loss: of a place.
_Pruned: TypeAlias = dict[_Place, tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class _Prepared(ABC):
    """Layers whose Hessians are factored: to be solved for any of their targets."""

    problems: Sequence[Problem]
    grouped: Mapping[int, _Grouped]
    factors: Mapping[int, Factor]
    mask_rule: ops.MaskRule
    native: bool
    has_inverses: ClassVar[bool] = False  # for factors; and masks alone, so that weights are always refitted

    def solve(self, places: Sequence[_Place], *, refit: bool) -> dict[_Place, Solution]:
        solutions: dict[_Place, Solution] = {}
        for i, j in places:
            if self._stays_dense((i, j)):
                weight = self.problems[i].weight
                ones = torch.ones_like(weight, dtype=torch.bool)
                solutions[i, j] = Solution(weight.detach().clone(), ones, 0.0, 0.0)
        if wanted := [place for place in places if place not in solutions]:
            refit_layer = self._refit if refit or self.has_inverses else None
            solutions.update(_finish_all(self.problems, self.grouped, self.factors, self._prune(wanted), refit_layer))
        return solutions

    def _stays_dense(self, place: _Place) -> bool:
        return _is_dense(self.problems[place[0]].targets[place[1]], self.mask_rule)

    @abstractmethod
    def attempt(self, places: Sequence[_Place]) -> dict[_Place, tuple[float, Solution | None]]:
        """Losses, and solutions where these are needed to know them, not refitted."""

    @abstractmethod
    def _prune(self, places: Sequence[_Place]) -> _Pruned:
        """What is not to stay dense, before it is refitted."""

    def _refit(self, i: int, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The best weights of a layer under a mask, and their loss."""
        layer, factor = self.grouped[i], self.factors[i]
        damped = _add_damping(layer.hessian.double(), factor.damping)
        inverse = factor.matrix if self.has_inverses else None
        return refit_kept(layer.weight.double(), damped, mask, inverse=inverse, native=self.native)


@dataclass(frozen=True)
class _Factored(_Prepared):
    """For the fast solver."""

    def attempt(self, places: Sequence[_Place]) -> dict[_Place, tuple[float, Solution | None]]:
        return {place: (solution.loss, solution) for place, solution in self.solve(places, refit=False).items()}

    def _prune(self, places: Sequence[_Place]) -> _Pruned:
        return _prune_all(self.problems, places, self.grouped, self.factors, self.mask_rule, self.native)


@dataclass(frozen=True)
class _Eliminated(_Prepared):
    """For the exact solver, which finds masks alone. Factors are inverses."""

    eliminations: Mapping[int, Mapping[int, Elimination]]  # by layer and block size
    has_inverses: ClassVar[bool] = True

    def attempt(self, places: Sequence[_Place]) -> dict[_Place, tuple[float, Solution | None]]:
        found: dict[_Place, tuple[float, Solution | None]] = dict.fromkeys(places, (0.0, None))
        wanted = [place for place in places if not self._stays_dense(place)]
        if wanted:
            losses = torch.stack([elimination.loss(steps) for elimination, steps in map(self._steps, wanted)])
            found.update((place, (loss, None)) for place, loss in zip(wanted, losses.tolist(), strict=True))
        return found

    def _prune(self, places: Sequence[_Place]) -> _Pruned:
        pruned = {}
        for place in places:
            elimination, steps = self._steps(place)
            pruned[place] = (self.grouped[place[0]].weight, elimination.mask(steps), elimination.loss(steps))
        return pruned

    def _steps(self, place: _Place) -> tuple[Elimination, Tensor]:
        """How far the rows of a layer go for a target."""
        target, columns = self.problems[place[0]].targets[place[1]], self.grouped[place[0]].weight.shape[2]
        elimination = self.eliminations[place[0]][min(target.block_size, columns)]
        return elimination, elimination.steps(elimination.count(target.sparsity, self.mask_rule))


@contextmanager
def _naming(problem: Problem) -> Iterator[None]:
    """Put the layer's name before what is wrong with it."""
    try:
        yield
    except InvalidInputError as error:
        if problem.name is None:
            raise
        raise InvalidInputError(f"layer {problem.name!r}: {error}") from error


def _check(problem: Problem) -> tuple[Tensor, Tensor]:
    """The weight [G, r, d] and the Hessian [G, d, d] in the wider of their dtypes, at least float32."""
    weight, hessian = problem.weight, problem.hessian
    for name, tensor in (("weight", weight), ("hessian", hessian)):
        if not isinstance(tensor, Tensor):
            raise InvalidInputError(f"{name} must be a tensor, got {type(tensor).__name__}")
    for sparsity, block_size in problem.targets:
        check_sparsity(sparsity, "sparsity")
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise InvalidInputError(f"block_size must be a positive whole number of columns, got {block_size!r}")
    hessian = hessian[None] if hessian.dim() == 2 else hessian
    _check_shapes(weight, hessian)
    dtype = torch.float64 if torch.float64 in (weight.dtype, hessian.dtype) else torch.float32
    grouped = weight.detach().reshape(hessian.shape[0], -1, hessian.shape[1])
    return grouped.to(dtype), hessian.detach().to(dtype)


def _prepare_all(problems: Sequence[Problem], grouped: Mapping[int, tuple[Tensor, Tensor]]) -> dict[int, _Grouped]:
    weights, hessians = zip(*grouped.values(), strict=True)
    zero = hessians[0].new_zeros(())
    facts = _fetch(
        _largest_entries(weights),
        _largest_entries(hessians),
        [zero if problems[i].symmetric else _largest_asymmetry(hessian) for i, (_, hessian) in grouped.items()],
        [(hessian.diagonal(dim1=1, dim2=2) == 0).any() for hessian in hessians],
    )
    prepared = {}
    for i, of_layer in zip(grouped, facts, strict=True):
        with _naming(problems[i]):
            prepared[i] = _prepare(*grouped[i], *of_layer)
    return prepared


def _prepare(
    weight: Tensor, hessian: Tensor, largest_weight: float, largest: float, asymmetry: float, any_dead: float
) -> _Grouped:
    if not math.isfinite(largest_weight):
        raise InvalidInputError("the weight holds NaN or infinite values: it cannot be pruned")
    if not math.isfinite(largest):
        raise InvalidInputError(
            "the Hessian holds NaN or infinite values: some layer input was not finite, or its square was not"
        )
    if asymmetry > _LARGEST_ASYMMETRY * largest:
        raise InvalidInputError(
            f"the Hessian is not symmetric: mirrored entries differ by up to {asymmetry:.3g}; build it with "
            "spade_fast.hessian, or as X^T X"
        )
    if asymmetry:  # no more than rounding
        hessian = (hessian + hessian.mT) / 2
    if not any_dead:
        return _Grouped(weight, hessian, None)
    dead = hessian.diagonal(dim1=1, dim2=2) == 0
    return _Grouped(weight.masked_fill(dead[:, None], 0), _without_coupling(hessian, dead), dead)


def _fetch(*facts: Sequence[Tensor]) -> list[list[float]]:
    """Of each layer the values of all its facts, scalars on one device, for which the host waits once."""
    of_layers: list[list[float]] = torch.stack([torch.stack(tuple(fact)).double() for fact in facts], dim=1).tolist()
    return of_layers


def _factor_all(
    problems: Sequence[Problem], grouped: Mapping[int, _Grouped], damping: float, native: bool
) -> dict[int, Factor]:
    factor_each = lower_factors if native else _reference_factors
    matrices = factor_each([each.hessian for each in grouped.values()], damping)
    factors = {}
    for (i, each), matrix in zip(grouped.items(), matrices, strict=True):
        with _naming(problems[i]):
            found = None if matrix is None else Factor(matrix, damping, None)
            factors[i] = found or _factor_harder(each.hessian, damping, factor_each)
    return factors


def _eliminate_all(
    problems: Sequence[Problem],
    grouped: Mapping[int, _Grouped],
    damping: float,
    block_layout: BlockLayout,
    mask_rule: ops.MaskRule,
    native: bool,
) -> tuple[dict[int, Factor], dict[int, dict[int, Elimination]]]:
    """Of all layers the inverses of damped Hessians, and the eliminations by block size."""
    invert_each = _native_inverses if native else _reference_inverses
    found = invert_each([each.hessian.double() for each in grouped.values()], damping)
    inverses = {i: inverse for i, inverse in zip(grouped, found, strict=True) if inverse is not None}
    blocks: dict[_Place, Blocks] = {}  # by layer and block size
    for i, each in grouped.items():
        problem, columns = problems[i], each.weight.shape[2]
        sizes = {min(target.block_size, columns) for target in problem.targets if not _is_dense(target, mask_rule)}
        _warn_of_a_long_elimination(problem.name, each.weight)
        with _naming(problem):
            for size in sizes:
                blocks[i, size] = Blocks.of(problem.weight.shape, size, block_layout, problem.weight.device)
                check_size(blocks[i, size], problem.weight.device, native)
    attempted = [key for key in blocks if key[0] in inverses]
    eliminations: dict[int, dict[int, Elimination]] = {i: {} for i in grouped}
    if attempted:
        eliminated = eliminate_layers(
            [grouped[i].weight for i, _ in attempted],
            [inverses[i] for i, _ in attempted],
            [blocks[key] for key in attempted],
            native,
        )
        failures: list[bool] = torch.stack([each.failed for each in eliminated]).tolist()
        for (i, size), elimination, failed in zip(attempted, eliminated, failures, strict=True):
            eliminations[i][size] = elimination
            if failed:
                inverses.pop(i, None)
    in_float64 = {i for i, _ in attempted if i not in inverses and grouped[i].weight.dtype == torch.float32}
    factors = {i: Factor(inverse, damping, None) for i, inverse in inverses.items()}
    for i, each in grouped.items():
        if i not in factors:
            of_layer = {size: of_size for (layer, size), of_size in blocks.items() if layer == i}
            with _naming(problems[i]):
                factors[i], eliminations[i] = _eliminate_harder(
                    each, of_layer, _harder(damping, in_float64=i in in_float64), invert_each, native
                )
    return factors, eliminations


def _warn_of_a_long_elimination(name: str | None, weight: Tensor) -> None:
    cost = weight.numel() * weight.shape[2] ** 2 / 6
    if cost > _LONG_ELIMINATION and weight.device.type == "cpu":
        layer = "the layer" if name is None else f"layer {name!r}"
        warnings.warn(
            f"{layer} of {weight.shape[2]} columns takes the exact solver {cost:.0e} multiply-adds, an hour or more on "
            "a CPU: leave it dense, or use solver='fast'",
            stacklevel=2,
        )


def _prune_all(
    problems: Sequence[Problem],
    wanted: Sequence[_Place],
    grouped: Mapping[int, _Grouped],
    factors: Mapping[int, Factor],
    mask_rule: ops.MaskRule,
    native: bool,
) -> dict[_Place, tuple[Tensor, Tensor, Tensor]]:
    """Sparse weights, masks and losses, by place."""
    published = mask_rule == "published"
    # The targets of a layer share its factor and its weight.
    in_dtype = {i: each.weight.to(factors[i].matrix.dtype) for i, each in grouped.items()}
    weights = [in_dtype[i] for i, _ in wanted]
    matrices = [factors[i].matrix for i, _ in wanted]
    targets = [problems[i].targets[j] for i, j in wanted]
    sparsities, block_sizes = (
        [float(target.sparsity) for target in targets],
        [min(each.block_size, weight.shape[2]) for each, weight in zip(targets, weights, strict=True)],
    )
    found: Iterable[tuple[Tensor, Tensor, Tensor]]
    if native:
        found = zip(*ops.prune_layers(weights, matrices, sparsities, block_sizes, published), strict=True)
    else:
        arguments = zip(weights, matrices, sparsities, block_sizes, strict=True)
        found = (reference.prune_columns(*each, published) for each in arguments)
    return dict(zip(wanted, found, strict=True))


def _finish_all(
    problems: Sequence[Problem],
    grouped: Mapping[int, _Grouped],
    factors: Mapping[int, Factor],
    pruned: _Pruned,
    refit: Callable[[int, Tensor], tuple[Tensor, Tensor]] | None,
) -> dict[_Place, Solution]:
    weights, masks, losses = [], [], []
    for (i, _), (sparse, mask, loss) in pruned.items():
        weight, each = problems[i].weight, grouped[i]
        if each.dead is not None:
            mask &= ~each.dead[:, None]
        if refit is not None and loss.isfinite():
            sparse, loss = refit(i, mask)
        # Keeps the memory format, channels_last among others, and the dtype.
        weights.append(torch.empty_like(weight, requires_grad=False).copy_(sparse.view(weight.shape)))
        masks.append(mask.view(weight.shape))
        losses.append(loss)
    solutions = {}
    facts = _fetch(_largest_entries(weights), losses)
    for place, weight, mask, (largest, final_loss) in zip(pruned, weights, masks, facts, strict=True):
        problem, factor = problems[place[0]], factors[place[0]]
        with _naming(problem):
            if not math.isfinite(largest) or not math.isfinite(final_loss):
                raise InvalidInputError(
                    f"pruning overflows {str(weight.dtype).removeprefix('torch.')}: the weights reach "
                    f"{problem.weight.abs().max().item():.1e}; scale them down or use a wider dtype"
                )
        solutions[place] = Solution(weight, mask, final_loss, factor.damping, factor.fallback)
    return solutions


def _factor_harder(
    hessian: Tensor, damping: float, factor_each: Callable[[list[Tensor], float], list[Tensor | None]]
) -> Factor:
    """Factor H + damping * mean(diag H) * I, which has failed before, in float64.

    Only where that fails too the damping is raised, tenfold each time.

    Raises
    ------
    InvalidInputError
        If no damping up to 1 makes it positive definite.
    """
    for harder, fallback in _harder(damping, in_float64=hessian.dtype == torch.float32):
        (matrix,) = factor_each([hessian.double()], harder)
        if matrix is not None:
            return Factor(matrix, harder, fallback)
    raise _no_factor(hessian)


def _eliminate_harder(
    layer: _Grouped,
    blocks: Mapping[int, Blocks],
    attempts: Iterable[tuple[float, Fallback]],
    invert_each: Callable[[list[Tensor], float], list[Tensor | None]],
    native: bool,
) -> tuple[Factor, dict[int, Elimination]]:
    """As :func:`_factor_harder`, of what has failed before: eliminations by block size, which may fail too."""
    weight = layer.weight.double()
    for harder, fallback in attempts:
        (inverse,) = invert_each([layer.hessian.double()], harder)
        if inverse is None:
            continue
        eliminated = eliminate_layers([weight] * len(blocks), [inverse] * len(blocks), [*blocks.values()], native)
        if not any(each.failed for each in eliminated):
            return Factor(inverse, harder, fallback), dict(zip(blocks, eliminated, strict=True))
    raise _no_factor(layer.hessian)


def _no_factor(hessian: Tensor) -> InvalidInputError:
    """What to tell of a Hessian that has no factor at any damping."""
    largest = largest_entry(hessian).item()
    if not _UNIT_RANGE[0] < largest < _UNIT_RANGE[1]:
        return InvalidInputError(
            f"the Hessian's largest entry is {largest:.1e}, which is too close to the limits of float64 to factor it: "
            "give the inputs of the layer another unit"
        )
    return InvalidInputError(
        f"the Hessian has no Cholesky factor, even in float64 and with damping up to {_LARGEST_DAMPING:g}: it is not "
        "positive semidefinite, so it is no sum of x x^T; build it with spade_fast.hessian"
    )


def _harder(damping: float, in_float64: bool) -> Iterator[tuple[float, Fallback]]:
    """Dampings to try in float64 where something has failed, that which was asked for `in_float64` where it was not."""
    if in_float64:
        yield damping, "float64"
    raised = max(10 * damping, _SMALLEST_RAISED_DAMPING)
    while raised < _LARGEST_DAMPING:
        yield raised, "damping"
        raised *= 10
    if damping < _LARGEST_DAMPING:
        yield _LARGEST_DAMPING, "damping"


def _add_damping(hessian: Tensor, damping: float) -> Tensor:
    mean = hessian.diagonal(dim1=1, dim2=2).mean(dim=1)  # [G]
    damped = hessian.clone()
    damped.diagonal(dim1=1, dim2=2).add_(damping * mean[:, None])
    return damped


def lower_factors(hessians: list[Tensor], damping: float) -> list[Tensor | None]:
    """Lower triangular M [G, d, d] with H + damping * mean(diag H) * I = M^T M, of each.

    Of a layer None where there is none, or where its backward error is beyond what LAPACK's own tests accept.
    """
    factors, errors = ops.factor_hessians(hessians, damping)
    # On a GPU the host waits once.
    of_layers = torch.split(torch.cat(errors).cpu(), [len(error) for error in errors])
    accepted = [all(error <= _LAPACK_TEST_RATIO for error in of_groups.tolist()) for of_groups in of_layers]
    return [factor if good else None for factor, good in zip(factors, accepted, strict=True)]


def _reference_factors(hessians: list[Tensor], damping: float) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for hessian in hessians:
        upper = reference.factor(_add_damping(hessian, damping))
        found.append(None if upper is None or _has_noise_for_pivot(upper, hessian, damping) else upper)
    return found


def _native_inverses(hessians: list[Tensor], damping: float) -> list[Tensor | None]:
    """Of each (H + damping * mean(diag H) * I)^-1, None where :func:`lower_factors` has no factor."""
    factors, inverses = lower_factors(hessians, damping)[::-1], []
    while factors:
        lower = factors.pop()  # no longer kept
        # With both axes reversed, H = M^T M is L L^T.
        inverses.append(None if lower is None else torch.cholesky_inverse(lower.flip(1, 2).mT).flip(1, 2))
    return inverses


def _reference_inverses(hessians: list[Tensor], damping: float) -> list[Tensor | None]:
    return [None if upper is None else upper.mT @ upper for upper in _reference_factors(hessians, damping)]


def _has_noise_for_pivot(upper: Tensor, hessian: Tensor, damping: float) -> bool:
    """Whether a pivot is hardly more than the rounding of the subtractions H_ii - ... that it is the result of.

    A backward stable factor may have such, and OBS divides by them. The native operator looks for them itself.
    """
    diagonal = _add_damping(hessian, damping).diagonal(dim1=1, dim2=2)
    smallest = (upper.diagonal(dim1=1, dim2=2) ** -2 / diagonal).amin().item()
    return not smallest > reference.least_pivot(hessian.shape[1], hessian.dtype)


def largest_entry(values: Tensor) -> Tensor:
    """The largest magnitude, NaN if any entry is: much quicker than ``abs().amax()``, and than ``isfinite().all()``."""
    low, high = values.aminmax()
    return torch.maximum(high, -low)


def _largest_entries(values: Sequence[Tensor]) -> Sequence[Tensor]:
    """:func:`largest_entry` of each: on a GPU of all in a few launches, which cost more than what they do."""
    if values[0].device.type == "cpu":
        return [largest_entry(each) for each in values]
    return torch._foreach_norm(list(values), math.inf)


def _largest_asymmetry(hessian: Tensor) -> Tensor:
    """By how much mirrored entries differ at most."""
    if hessian.device.type == "cpu":
        starts = range(0, hessian.shape[1], _TILE)
        tiles = ((slice(i, i + _TILE), slice(j, j + _TILE)) for i in starts for j in starts if j >= i)
        if all(torch.equal(hessian[:, rows, columns], hessian[:, columns, rows].mT) for rows, columns in tiles):
            return hessian.new_zeros(())
    return (hessian - hessian.mT).abs().amax()


def _without_coupling(hessian: Tensor, dead: Tensor) -> Tensor:
    """The Hessian [G, d, d] with a positive diagonal for the dead inputs [G, d], which touch no other input."""
    # Their products with others are zero too, unless their squares alone underflowed.
    alone = hessian.masked_fill(dead[:, :, None] | dead[:, None, :], 0)
    diagonal = alone.diagonal(dim1=1, dim2=2)
    # Any positive number would do. This one leaves the mean, so the damping, as it is without dead inputs, whatever
    # the unit of the inputs (the published procedure puts 1 there).
    count = (~dead).sum(1, keepdim=True).clamp(min=1)
    mean = (diagonal / count).sum(1, keepdim=True)  # a sum of large entries would overflow
    diagonal.copy_(torch.where(dead, torch.where(mean > 0, mean, 1), diagonal))
    return alone


def _check_shapes(weight: Tensor, hessian: Tensor) -> None:
    for name, tensor in (("weight", weight), ("hessian", hessian)):
        if tensor.layout != torch.strided:
            raise InvalidInputError(f"{name} is {str(tensor.layout).removeprefix('torch.')}: make it dense (to_dense)")
    if not weight.is_floating_point() or not hessian.is_floating_point():
        raise InvalidInputError(f"weight and hessian must be floating point, got {weight.dtype} and {hessian.dtype}")
    if weight.dim() < 2 or weight.numel() == 0:
        raise InvalidInputError(f"weight must be a non-empty [rows, ...] tensor, got shape {list(weight.shape)}")
    columns = weight.shape[1:].numel()
    fits = hessian.dim() == 3 and hessian.shape[1:] == (columns, columns) and hessian.shape[0] > 0
    if not fits or weight.shape[0] % hessian.shape[0]:
        raise InvalidInputError(
            f"a weight of shape {list(weight.shape)} needs a Hessian [groups, {columns}, {columns}] whose groups "
            f"divide its {weight.shape[0]} rows, got {list(hessian.shape)}"
        )
    if weight.device != hessian.device:
        raise InvalidInputError(f"weight is on {weight.device} and hessian on {hessian.device}: move one of them")
    if weight.is_meta:
        raise InvalidInputError("weight and hessian are on meta, where they have no values: load the model first")
