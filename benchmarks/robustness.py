"""Runs of a real network over real photographs that are killed, and that go on for long: what the tests do in small.

    python benchmarks/robustness.py kills PHOTOGRAPHS     # 20 times SIGKILL; the store against an uninterrupted one
    python benchmarks/robustness.py memory PHOTOGRAPHS    # resident memory over 500 images

PHOTOGRAPHS is a folder. Results: benchmarks/results/robustness/.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from spade_fast.imagesets import named_files

RESULTS = Path(__file__).parent / "results" / "robustness"
KILLS, KILLED_IMAGES, IMAGES, SETTLED = 20, 24, 500, 20


def command(images: Path, root: Path, out: Path) -> list[str]:
    options = ["--root", str(root), "--out", str(out), "--num-augmentations", "16", "--methods", "saliency,lrp"]
    return [sys.executable, "-m", "spade_fast", "run", str(images), *options]


def listed(folder: Path, count: int, at: Path) -> Path:
    """A manifest of so many images, of which the same photographs come again under other names."""
    files = list(named_files(folder))
    path = at / f"{count}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "name"])
        writer.writerows((files[i % len(files)], f"{i:04}") for i in range(count))
    return path


def contents(out: Path) -> dict[str, str]:
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def done(out: Path) -> int:
    return len(list((out / "images").glob("[!.]*.safetensors")))


def kills(folder: Path, at: Path) -> dict[str, Any]:
    images, chance = listed(folder, KILLED_IMAGES, at), random.Random(0)
    start = time.perf_counter()
    subprocess.run(command(images, folder, at / "whole"), check=True, capture_output=True)
    duration = time.perf_counter() - start
    killed: list[dict[str, float]] = []
    finished = 0
    while len(killed) < KILLS:
        process = subprocess.Popen(
            command(images, folder, at / "out"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        after = chance.uniform(0, duration)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(after)
        process.kill()
        if process.wait() == -signal.SIGKILL:
            killed.append({"after_s": round(after, 2), "images": done(at / "out")})
            continue
        assert process.returncode == 0
        assert contents(at / "out") == contents(at / "whole")
        shutil.rmtree(at / "out")  # it was done before: from scratch again
        finished += 1
    subprocess.run(command(images, folder, at / "out"), check=True, capture_output=True)
    same = contents(at / "out") == contents(at / "whole")
    assert same
    return {"images": KILLED_IMAGES, "kills": killed, "finished_between": finished, "same_bytes": same}


def memory(folder: Path, at: Path) -> dict[str, Any]:
    images, page = listed(folder, IMAGES, at), os.sysconf("SC_PAGE_SIZE")
    process = subprocess.Popen(
        command(images, folder, at / "out"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    samples: list[tuple[int, float]] = []
    while process.poll() is None:
        try:
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * page
        except (OSError, IndexError):
            break
        samples.append((done(at / "out"), resident / 2**20))
        time.sleep(0.2)
    assert process.wait() == 0
    early = [mib for images_done, mib in samples if SETTLED // 2 <= images_done <= SETTLED]
    late = [mib for images_done, mib in samples if images_done > IMAGES - SETTLED]
    growth = max(late) / max(early) - 1
    assert growth < 0.05, growth
    by_images = {
        str(step): max(mib for count, mib in samples if count <= step) for step in (20, 100, 200, 300, 400, 500)
    }
    return {
        "images": IMAGES,
        "peak_mib_images_10_to_20": max(early),
        "peak_mib_last_20": max(late),
        "growth": growth,
        "peak_mib_up_to": by_images,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "memory"))
    parser.add_argument("photographs", type=Path)
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as at:
        found = {"kills": kills, "memory": memory}[arguments.what](arguments.photographs.resolve(), Path(at))
    result = {
        "command": f"python benchmarks/robustness.py {arguments.what} PHOTOGRAPHS",
        "network": "efficientnet_lite0, 16 views, saliency and LRP, an image in flight for each thread",
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "seconds": round(time.perf_counter() - start),
        **found,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{arguments.what}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
