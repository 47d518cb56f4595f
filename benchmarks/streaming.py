"""Does training read images as fast as its workers decode them?

A folder of JPEG photographs (smooth noise, 256×256) is read in two ways, in turns: by as many processes as there are
workers, each of which decodes its share of the files and throws the pixels away; and by the training's own loader, an
epoch in its random order, with the same number of workers. Both print images a second, and the second over the first
should be at least 0.9. On a machine that is busy otherwise that swings; the processor time of the workers and of the
main process, for each image, swings less.

Either way may be a quarter slower for the whole life of a process, for reasons unknown, so every round has new
processes and the median is taken.

    python benchmarks/streaming.py --workers 2
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from wellcond.experiments.data.batches import ImageDataModule
from wellcond.experiments.data.load import load_images

WANTED = 0.9


def write_images(folder: Path, count: int, side: int) -> None:
    """JPEG files of quality 90 in two classes, about as large as those of photographs."""
    draws = np.random.default_rng(0)
    for i in range(count):
        coarse = draws.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        grain = draws.normal(0, 6, (side, side, 3))
        path = folder / "train" / f"class {i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def decode(paths: Sequence[Path]) -> int:
    """Decode the files, and nothing else."""
    for path in paths:
        np.asarray(Image.open(path))
    return len(paths)


def processor_seconds(pids: Iterable[int]) -> float:
    """Of these processes and this one so far; 0 where there is no /proc."""
    total = time.process_time()
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists():
            return 0.0
        user, system = stat.read_text().rsplit(")", 1)[1].split()[11:13]
        total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def one_round(folder: str, batch: int, workers: int) -> list[tuple[float, float]]:
    """Images a second and processor time an image in µs, of decoding alone and of the loader."""
    data = load_images(folder, validation=0.01, memory_budget=0)
    loader = ImageDataModule(data, batch, workers=workers).train_dataloader()
    paths = sorted(Path(folder).rglob("*.jpg"))
    chunks = [paths[i : i + batch] for i in range(0, len(paths), batch)]
    found = []
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        theirs = {process.pid for process in multiprocessing.active_children() if process.pid}
        for epoch in range(2):
            loader.epoch_sampler.set_epoch(epoch)
            sources = {
                "alone": lambda: sum(pool.imap_unordered(decode, chunks)),
                "ours": lambda: sum(len(labels) for _, labels in loader),
            }
            for name, read in sources.items():
                mine = {process.pid for process in multiprocessing.active_children() if process.pid} - theirs
                pids = theirs if name == "alone" else mine
                used, start = processor_seconds(pids), time.perf_counter()
                images = read()
                if epoch:  # before, the workers started and the files came into the page cache
                    seconds, used = time.perf_counter() - start, processor_seconds(pids) - used
                    found.append((images / seconds, 1e6 * used / images))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few and small images")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="each in a process of its own")
    options = parser.parse_args()
    count, side, rounds = (300, 32, 1) if options.quick else (options.images, options.side, options.rounds)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), count, side)
        found = []
        for _ in range(rounds):
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                found.append(process.submit(one_round, folder, options.batch, options.workers).result())
    alone, ours = zip(*found, strict=True)
    ratios = [mine / theirs for (mine, _), (theirs, _) in zip(ours, alone, strict=True)]
    ratio = statistics.median(ratios)
    (speed, used), (our_speed, our_used) = (map(statistics.median, zip(*found, strict=True)) for found in (alone, ours))
    print(f"{count} images of {side}×{side}, {options.workers} workers, batches of {options.batch}, {rounds} rounds")
    print(f"images a second: decoding alone {speed:.0f}, the loader {our_speed:.0f}")
    print(f"processor time an image: decoding alone {used:.0f} µs, the loader {our_used:.0f} µs")
    print(f"ratio {ratio:.2f} (median; {min(ratios):.2f} to {max(ratios):.2f}), wanted {WANTED}: ", end="")
    print("met" if ratio >= WANTED else "missed")


if __name__ == "__main__":
    main()
