"""What simulated participants answer to a study: a first number for Table 3, by two networks that know nothing of it.

python benchmarks/simulated_study.py STUDY [--results FOLDER]

STUDY is what `spade-fast study build` wrote. Participants compare the features of untrained filters, and those of a
residual network of CIFAR-10. Writes answers.jsonl, answers.csv, score.json, tables.md and study.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from textwrap import fill

from cifar import PREPROCESS, load_resnet
from scaling import machine

import spade_fast as sf
from spade_fast import study
from spade_fast.files import remove_file, write_folder

HEADER = """# A study that programs answered

Command: `python benchmarks/simulated_study.py STUDY`, of a study of {tasks} photographs that `spade-fast study build
PHOTOGRAPHS --limit {limit} --steps {steps}` made, {refused} refused. {machine}. The network is {model} ({weights}),
sparsity {sparsity}, {views} views.

No person answered. A simulated participant takes the patch whose features are nearer to the visualization's; two of
them see each photograph by both networks. That Score-CAM's patch is taken more often than the other one says that
visualization and patch look alike to another network, not that people are told anything.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "study")
    arguments = parser.parse_args()
    here = machine()  # before anything is written
    bundle = study.open_bundle(arguments.study).bundle
    answers = arguments.results / "answers.jsonl"
    remove_file(answers)
    resnet = sf.LoadedModel("CIFAR-10 ResNet-56", load_resnet(56), PREPROCESS, None, "resnet56.safetensors")
    for model in (None, resnet):
        study.simulate(arguments.study, answers, model=model, participants=2)
    found = study.score(arguments.study, answers)
    found.save(arguments.results)
    settings = bundle.settings
    header = HEADER.format(
        tasks=len(bundle.tasks),
        limit=len(bundle.tasks),
        steps=settings["visualization_steps"],
        refused=len(bundle.refused),
        machine=here,
        model=settings["model"],
        weights=settings["weights"],
        sparsity=settings["sparsity"],
        views=settings["trace"]["num_augmentations"],
    )
    text = "\n\n".join(fill(each, 120) if not each.startswith("#") else each for each in header.strip().split("\n\n"))
    write_folder(arguments.results, {"study.md": f"{text}\n\n{found.tables()}".encode()})


if __name__ == "__main__":
    main()
