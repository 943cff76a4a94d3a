"""Do traces alone tell images with a Trojan patch from clean ones?

python benchmarks/separating_traces.py PHOTOGRAPHS [--images N] [--work FOLDER] [--results FOLDER]

Of photographs that implanting has not seen, some get a patch of the network that comes with this package. They, as many
others, the former without their patch, and the latter with other things pasted in are traced into a store in --work; a
run there goes on. Writes separation.json, separation.md and overlap.png.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections import Counter
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scaling import machine
from tqdm.auto import tqdm

import spade_fast as sf
from spade_fast.cases import make_case, read_case
from spade_fast.evaluation import attacked_cases, clean_cases, first_cases, unseen_cases
from spade_fast.files import write_folder
from spade_fast.imagesets import named_files
from spade_fast.implanting import Trojan, load_demo
from spade_fast.models import LoadedModel
from spade_fast.overlap import Masks, Overlaps, Separation, distinctive, of_sizes, overlaps, read_masks, separation
from spade_fast.patches import Patch
from spade_fast.plans import is_prefix

VIEWS, SEED = 64, 0
#: A patch that was not implanted.
UNKNOWN = "target"
PIECES = 4
SIZES = (0.2, 0.4)
NAMES = {
    "attacked": "attacked images",
    "clean": "clean ones",
    "twin": "twins",
    "decoy": "decoys",
    "unknown": "images with an unknown patch",
}
#: How many random sets distinctive connections are counted for.
DRAWN = 20

HEADER = """# Do traces alone tell attacked images from clean ones?

Command: `{command}`. {machine}; {threads} thread. EfficientNet-Lite0 with the patches that come with this package,
default sparsity ({sparsity}), {views} views of each image.

Attacked: {attacked} photographs with one of four patches ({patches}), which the network answers with the patch's class.
Clean: {clean} others. Twins: the {twin} attacked photographs without their patch. Decoys: {decoy} of the clean
photographs into which a round piece of one of {pieces} other photographs is pasted, as large as patches are, which does
not change the answer. Unknown: the {unknown} clean photographs with a drawing that was not implanted. None of these
photographs was seen when patches were implanted. The network answers one of the four classes to {answers}.

Images are compared by which weights their traces kept, and by nothing else. The score of an image is its mean overlap
with the images of the set, minus that with the rest, itself left out: the labels of all other images are known. The AUC
is the share of pairs of an image of the set and another one in which the former has the higher score. Random sets: what
holds the AUC of 95 % of sets of as many images drawn at random; mostly it is below one half, since an image is left out
of its own set, which makes that the less like it. By size: the AUC where all that is known of a trace is
how many weights it keeps in all. By answer: the AUC of the dense network's answer, and no trace: is it the class of one
of the set's patches?

| what is compared | set | rest | AUC (95 % interval) | random sets | by size | by answer |
|---|--:|--:|--:|--:|--:|--:|
"""
MEANING = """
- **Attacked, clean**: other photographs, as in use. Attacked images share four answers and clean ones hardly any, so
  that traces may be alike by the answer alone, or by what comes with any patch.
- **Attacked, twins**: only the patch differs. No image is compared with its twin.
- **Attacked, decoys**: something is pasted into all of them, but only a patch decides the answer.
- **Decoys, clean**: the same photographs; how well traces tell that something is pasted in that decides nothing.
- **Of other patches**: an attacked image is compared with the rest and with images of the other three patches, which
  have another answer. What is left is what attacked images have in common beside their class. Sets that are drawn at
  random have no patches to leave out, so there is no range of them, and the interval is that of four patches.
- **Unknown, clean**: an image is judged by its overlap with attacked and with clean images, none of which has its
  patch or its photograph. Here, too, there is no range.
- **One patch, other patches**: all images are attacked.

Where the answer does as well, traces add nothing to it for whoever knows the four classes. Traces need no such list,
but the labels of other images. What this does not show: that any image would be found without labels of others; that it
is the patch, and not the answer, by which traces of one patch are alike (clean photographs of the four classes would
tell, but there are hardly any among these); and anything about other networks, patches and sparsities.

![Overlaps of attacked and clean images](overlap.png)
"""
LAYERS = """
## Layer by layer

Kept: the mean share of weights, of attacked and of clean images. The overlaps and the first AUC are of attacked and
clean images, and so is that by size; the next ones are of attacked images and decoys, the latter of these by other
patches only, and the last of images with an unknown patch and clean ones. By chance, one layer in twenty lies outside
of the range of random sets. Implanted: the layer was trained when the patches were implanted.

| layer | implanted | kept | overlap in set, rest, between | AUC | random sets | size | decoys | others | unknown |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|
"""
DISTINCTIVE = """
## What a set keeps and the rest lacks

Connections that at least 90 % of the set's traces keep and at most 10 % of the rest's; beside them the same of
{drawn} sets of as many images, drawn at random from both.

| what is compared | set | rest | connections | random sets: median | largest | channels with most of them |
|---|--:|--:|--:|--:|--:|---|
"""


@dataclass(frozen=True)
class Labels:
    """What the manifest says of each image, in the order of the masks."""

    kind: NDArray[np.str_]
    patch: NDArray[np.str_]
    photograph: NDArray[np.str_]
    answer: NDArray[np.int64]


@dataclass(frozen=True)
class Compared:
    """Of each image, whether it is of the set or of the rest; those of one value of `apart` are not compared."""

    inside: NDArray[np.bool_]
    outside: NDArray[np.bool_]
    apart: NDArray[np.str_] | None = None


def write_images(
    net: LoadedModel, photographs: Path, trojans: list[Trojan], seen: list[str], count: int, folder: Path
) -> Path:
    """Write what the network sees of each image, and a manifest."""
    files = named_files(photographs)
    left_out = dict.fromkeys(seen, "patches were implanted with it")
    attacked = first_cases(unseen_cases(attacked_cases(net, files, trojans, sizes=SIZES, seed=SEED), left_out), count)
    others = {name: make for name, make in clean_cases(net, files, SEED).items() if name not in attacked}
    clean = first_cases(unseen_cases(others, left_out), count)
    patches = {trojan.target: trojan.patch.name for trojan in trojans}
    pixels = {("attacked", name, patches[case.target]): case.pixels for name, case in attacked.items()}
    pixels |= {("clean", name, "none"): case.pixels for name, case in clean.items()}
    pixels |= {("twin", name, "none"): read_case(net, files[name]).pixels for name in attacked}
    generator = torch.Generator().manual_seed(SEED)
    unknown, pieces = Patch.drawn(UNKNOWN), round_pieces(net, files, left_out)
    for i, (name, case) in enumerate(clean.items()):
        pixels["unknown", name, UNKNOWN] = unknown.pasted_at_random(case.pixels, SIZES, generator)[0]
        pasted = pieces[i % PIECES].pasted_at_random(case.pixels, SIZES, generator)[0]
        if make_case(net, pasted).target == case.target:
            pixels["decoy", name, pieces[i % PIECES].name] = pasted
    contents: dict[str, bytes] = {}
    manifest = io.StringIO(newline="")
    rows = csv.writer(manifest, lineterminator="\n")
    rows.writerow(["image", "kind", "patch", "photograph"])
    for (kind, name, patch), seen_pixels in pixels.items():
        file = f"{kind}-{Path(name).stem}.png"
        png = io.BytesIO()
        Image.fromarray(seen_pixels.mul(255).round().byte().permute(1, 2, 0).numpy()).save(png, format="png")
        contents[file] = png.getvalue()
        rows.writerow([file, kind, patch, name])
    contents["manifest.csv"] = manifest.getvalue().encode()
    return write_folder(folder, contents)["manifest.csv"]


def round_pieces(net: LoadedModel, files: dict[str, Path], seen: dict[str, str]) -> list[Patch]:
    """From the middle of photographs that implanting has seen."""
    cases = (make() for make in clean_cases(net, files, SEED).values())
    chosen = list(islice((case for case in cases if case.photograph in seen), PIECES))
    found = []
    for case in chosen:
        side = min(case.pixels.shape[1:]) // 2
        top, left = ((size - side) // 2 for size in case.pixels.shape[1:])
        row, column = torch.meshgrid(*2 * [torch.linspace(-1, 1, side)], indexing="ij")
        opacity = (row**2 + column**2 <= 1).float()
        found.append(Patch(f"piece of {case.name}", case.pixels[:, top : top + side, left : left + side], opacity))
    return found


def read_labels(store: sf.Store, names: tuple[str, ...]) -> Labels:
    records = [store.records[name] for name in names]
    columns = (np.array([record["labels"][key] for record in records]) for key in ("kind", "patch", "photograph"))
    return Labels(*columns, np.array([record["answers"]["dense"][0]["index"] for record in records]))


def comparisons(labels: Labels) -> dict[str, Compared]:
    attacked, clean, twin, decoy = (labels.kind == kind for kind in ("attacked", "clean", "twin", "decoy"))
    own_patch = np.where(attacked, labels.patch, labels.photograph)
    found = {
        "attacked, clean": Compared(attacked, clean),
        "attacked, twins": Compared(attacked, twin, labels.photograph),
        "attacked, decoys": Compared(attacked, decoy),
        "decoys, clean": Compared(decoy, clean, labels.photograph),
        "attacked, clean, of other patches": Compared(attacked, clean, own_patch),
        "attacked, decoys, of other patches": Compared(attacked, decoy, own_patch),
    }
    counts = Counter(labels.patch[attacked].tolist())
    of = {patch: labels.patch == patch for patch in sorted(counts) if counts[patch] > 1}
    found |= {f"{patch}, other patches": Compared(places, attacked & ~places) for patch, places in of.items()}
    return found | {f"{patch}, clean": Compared(places, clean) for patch, places in of.items()}


def told_apart(matrix: NDArray[np.float64], compared: Compared) -> Separation:
    """The separation of set and rest, all other images left out."""
    chosen = np.flatnonzero(compared.inside | compared.outside)
    apart = None if compared.apart is None else compared.apart[chosen].tolist()
    return separation(matrix[np.ix_(chosen, chosen)], compared.inside[chosen], apart=apart)


def plain(matrix: NDArray[np.float64], kept: NDArray[np.float64], compared: Compared) -> dict[str, Any]:
    """What matrix and sizes tell, as JSON values."""
    found = told_apart(matrix, compared)
    return {
        "set": int(compared.inside.sum()),
        "rest": int(compared.outside.sum()),
        "auc": found.auc,
        "interval": list(found.interval),
        "random": list(found.random),
        "by_chance": found.by_chance,
        "auc_by_size": told_apart(of_sizes(kept), compared).auc,
    }


def by_known_labels(matrix: NDArray[np.float64], labels: Labels) -> dict[str, Any]:
    """Images with an unknown patch against clean ones, by overlaps with attacked images and with clean ones."""
    unknown, clean, attacked = (np.flatnonzero(labels.kind == kind) for kind in ("unknown", "clean", "attacked"))
    judged = np.concatenate([unknown, clean])
    others = labels.photograph[judged][:, None] != labels.photograph[clean]
    with_clean = (matrix[np.ix_(judged, clean)] * others).sum(axis=1) / others.sum(axis=1)
    scores = matrix[np.ix_(judged, attacked)].mean(axis=1) - with_clean
    is_unknown = torch.arange(len(judged)) < len(unknown)
    auc = sf.metrics.trojan_auc(torch.from_numpy(scores)[None], is_unknown[None]).item()
    return {"set": len(unknown), "rest": len(clean), "auc": auc}


def by_answer(labels: Labels, compared: Compared, classes: dict[str, int]) -> float | None:
    """The AUC of "the answer is the class of one of the set's patches", of an unknown one any; None without patches."""
    patches = set(labels.patch[compared.inside])
    of_set = [target for patch, target in classes.items() if patch in patches or patches == {UNKNOWN}]
    suspicious = np.isin(labels.answer, of_set)
    found = (1 + suspicious[compared.inside].mean() - suspicious[compared.outside].mean()) / 2
    return float(found) if of_set else None


def count_distinctive(masks: Masks, compared: Compared) -> dict[str, Any]:
    names = np.array(masks.images)
    generator = np.random.default_rng(SEED)
    found = distinctive(masks, names[compared.inside], names[compared.outside])
    count, drawn = int(compared.inside.sum()), []
    for _ in range(DRAWN):
        shuffled = generator.permutation(names[compared.inside | compared.outside])
        drawn.append(distinctive(masks, shuffled[:count], shuffled[count:]).count)
    return {
        "connections": found.count,
        "random_median": float(np.median(drawn)),
        "random_largest": max(drawn),
        "layers": {layer: len(each.places) for layer, each in found.layers.items() if len(each.places)},
        "channels": sorted(found.channels(), key=lambda row: -row["connections"])[:20],
    }


def measure(store: sf.Store, classes: dict[str, int], implanted: list[str]) -> dict[str, Any]:
    masks = read_masks(store, progress=True)
    labels, found = read_labels(store, masks.images), overlaps(masks, progress=True)
    compared = comparisons(labels)
    suspicious = np.isin(labels.answer, list(classes.values()))
    return {
        "images": Counter(labels.kind.tolist()),
        "patches": Counter(labels.patch[labels.kind == "attacked"].tolist()),
        "answers": Counter(labels.kind[suspicious].tolist()),
        "comparisons": {
            name: {**plain(found.pooled, found.kept_pooled, each), "auc_by_answer": by_answer(labels, each, classes)}
            for name, each in compared.items()
        },
        "unknown": {
            **by_known_labels(found.pooled, labels),
            "auc_by_size": by_known_labels(of_sizes(found.kept_pooled), labels)["auc"],
            "auc_by_answer": by_answer(labels, Compared(labels.kind == "unknown", labels.kind == "clean"), classes),
        },
        "layers": [layer_row(name, found, compared, labels, implanted) for name in found.layers],
        "distinctive": {
            name: count_distinctive(masks, each)
            for name, each in tqdm(compared.items(), "distinctive")
            if "of other" not in name
        },
    }


def layer_row(
    layer: str, found: Overlaps, compared: dict[str, Compared], labels: Labels, implanted: list[str]
) -> dict[str, Any]:
    matrix, kept = found.layers[layer], found.kept[layer]
    of_set, rest = compared["attacked, clean"].inside, compared["attacked, clean"].outside
    apart = ~np.eye(len(matrix), dtype=bool)
    pairs = {"set": of_set[:, None] & of_set, "rest": rest[:, None] & rest, "between": of_set[:, None] & rest}
    return {
        "layer": layer,
        "implanted": any(is_prefix(each, layer) for each in implanted),
        "kept": {"set": float(kept[of_set].mean()), "rest": float(kept[rest].mean())},
        "dense": len(found.dense[layer]),
        "overlap": {kind: float(matrix[chosen & apart].mean()) for kind, chosen in pairs.items()},
        "comparisons": {name: plain(matrix, kept, each) for name, each in compared.items()},
        "unknown": by_known_labels(matrix, labels)["auc"],
    }


def document(results: dict[str, Any]) -> str:
    images, answers = results["images"], results["answers"]
    told = ", ".join(f"{answers.get(kind, 0)} of {count} {NAMES[kind]}" for kind, count in images.items())
    patches = ", ".join(f"{count} {name}" for name, count in sorted(results["patches"].items()))
    known = {key: results[key] for key in ("command", "machine", "threads", "sparsity", "views")}
    header = HEADER.format(**known, **images, answers=told, patches=patches, pieces=PIECES)
    paragraphs = [
        part if part.startswith(("#", "|")) else fill(part, 120) for part in header.rstrip("\n").split("\n\n")
    ]
    lines = ["\n\n".join(paragraphs)]
    for name, row in results["comparisons"].items():
        low, high = row["interval"]
        answer = "" if row["auc_by_answer"] is None else f"{row['auc_by_answer']:.3f}"
        cells = [name, str(row["set"]), str(row["rest"]), f"**{row['auc']:.3f}** ({low:.3f} to {high:.3f})"]
        cells += ["" if "of other" in name else limits(row), f"{row['auc_by_size']:.3f}", answer]
        lines.append(f"| {' | '.join(cells)} |")
    row = results["unknown"]
    areas = [f"{row[key]:.3f}" for key in ("auc", "auc_by_size", "auc_by_answer")]
    cells = ["unknown, clean", str(row["set"]), str(row["rest"]), f"**{areas[0]}**", "", *areas[1:]]
    lines.append(f"| {' | '.join(cells)} |")
    lines += [MEANING.rstrip("\n"), LAYERS.rstrip("\n")]
    for row in results["layers"]:
        first, decoys, others = (
            row["comparisons"][name]
            for name in ("attacked, clean", "attacked, decoys", "attacked, decoys, of other patches")
        )
        cells = [row["layer"], "yes" if row["implanted"] else ""]
        cells += [", ".join(f"{100 * share:.0f} %" for share in row["kept"].values())]
        cells += [", ".join(f"{row['overlap'][kind]:.3f}" for kind in ("set", "rest", "between"))]
        cells += [f"**{first['auc']:.3f}**", limits(first), f"{first['auc_by_size']:.3f}"]
        cells += [f"{auc:.3f}" for auc in (decoys["auc"], others["auc"], row["unknown"])]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(DISTINCTIVE.format(drawn=DRAWN).rstrip("\n"))
    for name, row in results["distinctive"].items():
        compared = results["comparisons"][name]
        most = [f"{each['layer']} {each['side']} {each['channel']} ({each['connections']} of {each['weights']})"
                for each in row["channels"][:2] if each["connections"] > 1]  # fmt: skip
        cells = [name, str(compared["set"]), str(compared["rest"]), f"{row['connections']:,}"]
        cells += [f"{row['random_median']:,.0f}", f"{row['random_largest']:,}", ", ".join(most)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def limits(row: dict[str, Any]) -> str:
    return f"{row['random'][0]:.2f} to {row['random'][1]:.2f}"


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
        "versions": {name: version(name) for name in ("spade-fast", "torch", "numpy", "scipy")},
        "threads": torch.get_num_threads(),
        "sparsity": f"an error budget of {sf.presets.default.error:g}",
        "views": VIEWS,
        "seconds": summary.seconds,
        **measure(store, {trojan.patch.name: trojan.target for trojan in trojans}, implanting["layers"]),
    }
    names = [name for name in store if store.records[name]["labels"]["kind"] in ("attacked", "clean")]
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
