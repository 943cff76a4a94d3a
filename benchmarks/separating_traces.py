"""Do traces alone tell images with a Trojan patch from clean ones?

python benchmarks/separating_traces.py PHOTOGRAPHS [--images N] [--work FOLDER] [--results FOLDER]

Of photographs that implanting has not seen, some get a patch of the network that comes with this package. They, as many
others, and the former without their patch are traced into a store in --work; a run there goes on. Writes
separation.json, separation.md and overlap.png.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scaling import machine
from tqdm.auto import tqdm

import spade_fast as sf
from spade_fast.evaluation import attacked_cases, clean_cases, first_cases, unseen_cases
from spade_fast.files import write_folder
from spade_fast.imagesets import named_files
from spade_fast.implanting import Trojan, load_demo
from spade_fast.models import LoadedModel
from spade_fast.overlap import Masks, Overlaps, Separation, distinctive, overlaps, read_masks, separation
from spade_fast.plans import is_prefix

VIEWS, SEED = 64, 0
#: How many random sets distinctive connections are counted for.
DRAWN = 20

HEADER = """# Do traces alone tell attacked images from clean ones?

Command: `{command}`. {machine}; {threads} thread. EfficientNet-Lite0 with the patches that come with this package,
default sparsity ({sparsity}), {views} views of each image.

{attacked} photographs with one of four patches ({patches}); {clean} others without; and {twins} twins, which are the
former without their patch. None of them was seen when the patches were implanted. Images are compared by which weights
their traces kept, and by nothing else. The score of an image is its mean overlap with the images of the set, minus that
with the rest, itself left out: the labels of all other images are known. The AUC is the share of pairs of an image of
the set and another one in which the former has the higher score. "Random sets": what holds the AUC of 95 % of sets of
as many images drawn at random. "By chance": the share of those that do as well.

| what is compared | set | rest | AUC (95 % interval) | random sets | by chance |
|---|--:|--:|--:|--:|--:|
"""
MEANING = """
- **Other photographs**: as in use, where nobody has the same photograph twice. Attacked images share four answers and
  clean ones hardly any, so that an AUC above one half may come of the answers alone.
- **Same photographs**: only the patch differs. No image is compared with its twin.
- **Other patches only**: an attacked image is compared with clean ones and with those of the other three patches, whose
  answer is another. What is left is what attacked images have in common beside their class. Sets that are drawn at
  random have no patches to leave out, so there is no range of them, and the interval is that of four patches.
- **One patch** against the other three, all images attacked; and against clean photographs.
- **The dense network's answer**, and no trace: whether it is one of the four classes. Where that does as well, traces
  add nothing to it for whoever knows the four classes. Traces need no such list, but the labels of other images.

What this does not show: that images with an unknown patch would be found, or any image without labels of others; that
it is the patch, and not the answer, by which traces of one patch are alike (clean photographs of the four classes would
tell, but there are hardly any among these); and anything about other networks, patches and sparsities.

The heat map ([overlap.png](overlap.png)) is of the first line.
"""
LAYERS = """
## Layer by layer

The mean overlaps and the first AUC are of other photographs. By chance, one layer in twenty lies outside of the range
of random sets. Implanted: the layer was trained when the patches were implanted.

| layer | implanted | kept | set | rest | between | AUC | random sets | same photographs | other patches only |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|
"""
DISTINCTIVE = """
## What a set keeps and the rest lacks

Connections that at least 90 % of the set's traces keep and at most 10 % of the rest's; beside them the same of
{drawn} sets of as many images, drawn at random from both.

| set | rest | connections | random sets: median | largest | layers with most of them |
|---|---|--:|--:|--:|---|
"""


@dataclass(frozen=True)
class Labels:
    """What the manifest says of each image, in the order of the masks."""

    kind: NDArray[np.str_]
    patch: NDArray[np.str_]
    photograph: NDArray[np.str_]
    answer: NDArray[np.int64]


def write_images(
    net: LoadedModel, photographs: Path, trojans: list[Trojan], seen: list[str], count: int, folder: Path
) -> Path:
    """Write what the network sees of each image, and a manifest."""
    files = named_files(photographs)
    left_out = dict.fromkeys(seen, "patches were implanted with it")
    attacked = first_cases(unseen_cases(attacked_cases(net, files, trojans, seed=SEED), left_out), count)
    others = {name: make for name, make in clean_cases(net, files, SEED).items() if name not in attacked}
    clean = first_cases(unseen_cases(others, left_out), count)
    twins = {name: make() for name, make in clean_cases(net, files, SEED).items() if name in attacked}
    patches = {trojan.target: trojan.patch.name for trojan in trojans}
    contents: dict[str, bytes] = {}
    manifest = io.StringIO(newline="")
    rows = csv.writer(manifest, lineterminator="\n")
    rows.writerow(["image", "kind", "patch", "photograph"])
    for kind, cases in {"attacked": attacked, "clean": clean, "twin": twins}.items():
        for name, case in cases.items():
            file = f"{kind}-{Path(name).stem}.png"
            png = io.BytesIO()
            pixels = case.pixels.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(png, format="png")
            contents[file] = png.getvalue()
            rows.writerow([file, kind, patches[case.target] if kind == "attacked" else "none", name])
    contents["manifest.csv"] = manifest.getvalue().encode()
    return write_folder(folder, contents)["manifest.csv"]


def read_labels(store: sf.Store, names: tuple[str, ...]) -> Labels:
    records = [store.records[name] for name in names]
    kind, patch, photograph = (
        np.array([record["labels"][key] for record in records]) for key in ("kind", "patch", "photograph")
    )
    return Labels(kind, patch, photograph, np.array([record["answers"]["dense"][0]["index"] for record in records]))


def told_apart(
    matrix: NDArray[np.float64], inside: NDArray[np.bool_], outside: NDArray[np.bool_], apart: NDArray[np.str_] | None
) -> Separation:
    """The separation of two sets, all other images left out."""
    chosen = np.flatnonzero(inside | outside)
    names = None if apart is None else apart[chosen].tolist()
    return separation(matrix[np.ix_(chosen, chosen)], inside[chosen], apart=names)


def comparisons(labels: Labels) -> dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.str_] | None]]:
    """What is compared: set, rest, and which images are not compared with each other."""
    attacked, clean, twin = (labels.kind == kind for kind in ("attacked", "clean", "twin"))
    own_patch = np.where(attacked, labels.patch, labels.photograph)
    found = {
        "other photographs": (attacked, clean, None),
        "same photographs": (attacked, twin, labels.photograph),
        "other patches only, other photographs": (attacked, clean, own_patch),
    }
    patches = sorted(patch for patch, count in Counter(labels.patch[attacked].tolist()).items() if count > 1)
    of = {patch: labels.patch == patch for patch in patches}
    found |= {f"{patch}, against the other patches": (of[patch], attacked & ~of[patch], None) for patch in patches}
    found |= {f"{patch}, against clean photographs": (of[patch], clean, None) for patch in patches}
    return found


def by_answer(inside: NDArray[np.bool_], outside: NDArray[np.bool_], suspicious: NDArray[np.bool_]) -> float:
    """The AUC of "the answer is one of the classes"."""
    return float((1 + suspicious[inside].mean() - suspicious[outside].mean()) / 2)


def count_distinctive(masks: Masks, inside: NDArray[np.bool_], outside: NDArray[np.bool_]) -> dict[str, Any]:
    names = np.array(masks.images)
    generator = np.random.default_rng(SEED)
    found = distinctive(masks, names[inside], names[outside])
    drawn = []
    for _ in range(DRAWN):
        shuffled = generator.permutation(names[inside | outside])
        drawn.append(distinctive(masks, shuffled[: inside.sum()], shuffled[inside.sum() :]).count)
    by_layer = Counter({layer: len(each.places) for layer, each in found.layers.items() if len(each.places)})
    return {
        "connections": found.count,
        "random_median": float(np.median(drawn)),
        "random_largest": max(drawn),
        "layers": dict(by_layer.most_common()),
        "channels": found.channels(20),
    }


def measure(store: sf.Store, classes: list[int], implanted: list[str]) -> dict[str, Any]:
    masks = read_masks(store, progress=True)
    labels, found = read_labels(store, masks.images), overlaps(masks, progress=True)
    compared = comparisons(labels)
    rows = {}
    for name, (inside, outside, apart) in compared.items():
        rows[name] = plain(told_apart(found.pooled, inside, outside, apart), inside, outside)
    for name in ("other photographs", "same photographs"):
        inside, outside, _ = compared[name]
        rows[name]["auc_by_answer"] = by_answer(inside, outside, np.isin(labels.answer, classes))
    return {
        "answers": {
            kind: int(np.isin(labels.answer, classes)[labels.kind == kind].sum()) for kind in np.unique(labels.kind)
        },
        "images": Counter(labels.kind.tolist()),
        "patches": Counter(labels.patch[labels.kind == "attacked"].tolist()),
        "comparisons": rows,
        "layers": [layer_row(name, found, compared, implanted) for name in found.layers],
        "distinctive": {
            name: count_distinctive(masks, *compared[name][:2])
            for name in tqdm([each for each in compared if "only" not in each], "distinctive")
        },
    }


def layer_row(name: str, found: Overlaps, compared: dict[str, Any], implanted: list[str]) -> dict[str, Any]:
    matrix = found.layers[name]
    attacked, clean, _ = compared["other photographs"]
    once = np.triu(np.ones_like(matrix, dtype=bool), 1)
    pairs = {"set": attacked[:, None] & attacked, "rest": clean[:, None] & clean, "between": attacked[:, None] & clean}
    return {
        "layer": name,
        "implanted": any(is_prefix(each, name) for each in implanted),
        "kept": float(found.kept[name].mean()),
        "dense": len(found.dense[name]),
        "overlap": {
            kind: float(matrix[chosen & (once | (kind == "between"))].mean()) for kind, chosen in pairs.items()
        },
        "separation": {
            each: plain(told_apart(matrix, *compared[each]), *compared[each][:2])
            for each in compared
            if "photographs" in each and "against" not in each
        },
    }


def plain(found: Separation, inside: NDArray[np.bool_], outside: NDArray[np.bool_]) -> dict[str, Any]:
    return {
        "set": int(inside.sum()),
        "rest": int(outside.sum()),
        "auc": found.auc,
        "interval": list(found.interval),
        "random": list(found.random),
        "by_chance": found.by_chance,
    }


def document(results: dict[str, Any]) -> str:
    patches = ", ".join(f"{count} {name}" for name, count in sorted(results["patches"].items()))
    images = results["images"]
    lines = [
        HEADER.format(
            **{key: results[key] for key in ("command", "machine", "threads", "sparsity", "views")},
            **{"attacked": images["attacked"], "clean": images["clean"], "twins": images["twin"], "patches": patches},
        ).rstrip("\n")
    ]
    for name, row in results["comparisons"].items():
        low, high = row["interval"]
        known = "only" not in name
        cells = [name, str(row["set"]), str(row["rest"]), f"**{row['auc']:.3f}** ({low:.3f} to {high:.3f})"]
        cells += [f"{row['random'][0]:.2f} to {row['random'][1]:.2f}", f"{row['by_chance']:.3f}"] if known else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    for name in ("other photographs", "same photographs"):
        row = results["comparisons"][name]
        cells = [
            f"the dense network's answer, {name}",
            str(row["set"]),
            str(row["rest"]),
            f"{row['auc_by_answer']:.3f}",
        ]
        lines.append(f"| {' | '.join([*cells, '', ''])} |")
    told = ", ".join(f"{count} of {images[kind]} {kind}" for kind, count in results["answers"].items())
    lines += ["", f"The dense network answers one of the four classes to {told} images.", MEANING.rstrip("\n"), ""]
    lines.append(LAYERS.strip("\n"))
    for row in results["layers"]:
        of = row["separation"]
        first, second, third = (of[each] for each in of)
        cells = [row["layer"], "yes" if row["implanted"] else "", f"{100 * row['kept']:.0f} %"]
        cells += [f"{row['overlap'][kind]:.3f}" for kind in ("set", "rest", "between")]
        cells += [f"{first['auc']:.3f}", f"{first['random'][0]:.2f} to {first['random'][1]:.2f}"]
        cells += [f"{each['auc']:.3f}" for each in (second, third)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", DISTINCTIVE.format(drawn=DRAWN).strip("\n")]
    for name, row in results["distinctive"].items():
        compared = results["comparisons"][name]
        most = ", ".join(f"{layer} ({count})" for layer, count in list(row["layers"].items())[:3])
        cells = [f"{name} ({compared['set']})", str(compared["rest"]), f"{row['connections']:,}"]
        cells += [f"{row['random_median']:,.0f}", f"{row['random_largest']:,}", most]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="folder of photographs")
    parser.add_argument("--images", type=int, default=40, help="of each kind")
    parser.add_argument("--work", type=Path, default=here.parent / "build" / "separation", help="for images and store")
    parser.add_argument("--results", type=Path, default=here / "results" / "separation")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    net, trojans, report = load_demo()
    implanting = report["settings"]
    images = arguments.work / "images"
    manifest = write_images(net, arguments.photographs, trojans, implanting["photographs"], arguments.images, images)
    # The images are in the size that the network sees: what is traced is what it was fooled by.
    preprocess = replace(net.preprocess, resize_size=net.preprocess.input_size)
    settings = {"num_augmentations": VIEWS, "preprocess": preprocess, "seed": SEED, "in_flight": 1, "threads": 1}
    summary = sf.run(net, manifest, arguments.work / "store", methods=(), progress=True, **settings)
    store = sf.Store(arguments.work / "store")
    results = {
        "command": f"python benchmarks/separating_traces.py PHOTOGRAPHS --images {arguments.images}",
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "sparsity": f"an error budget of {sf.presets.default.error:g}",
        "views": VIEWS,
        "seconds": summary.seconds,
        **measure(store, [trojan.target for trojan in trojans], implanting["layers"]),
    }
    names = [name for name in store if store.records[name]["labels"]["kind"] != "twin"]
    compared = sf.compare(store, by="patch", value=sorted(results["patches"]), names=names)
    png = io.BytesIO()
    compared.figure().savefig(png, format="png", dpi=110)
    contents = {
        "separation.json": (json.dumps(results, indent=1) + "\n").encode(),
        "separation.md": document(results).encode(),
        "overlap.png": png.getvalue(),
    }
    write_folder(arguments.results, contents)


if __name__ == "__main__":
    main()
