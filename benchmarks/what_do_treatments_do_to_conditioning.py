"""What does every combination of treatments of the paper's Tables 2-4 do to the conditioning of the covariance?

A ResNet-8 whose first norm is decorrelated batch norm, on real images, trained by ``wellcond.experiments`` for a few
epochs from equal seeds. κ(P) is the condition number of that layer's batch covariance without its ε, in float64. Its
median is over the recorded steps of a run and then over seeds, its range over both; the ratio is the median of the
seeds' own ratios to the untreated run. The stem is such that P can have full rank: 24 channels of 3 × 3 × 3 patches
(rank up to 27), or on handwritten digits 16 channels of 5 × 5 patches.

    python benchmarks/what_do_treatments_do_to_conditioning.py
    python benchmarks/what_do_treatments_do_to_conditioning.py --data FOLDER --image-size 16 --limit 10000 --seeds 3
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path

from wellcond.experiments.data.load import load_images
from wellcond.experiments.files import read_csv
from wellcond.experiments.run.config import NO_TREATMENT, RunConfig, grid
from wellcond.experiments.run.result import CONDITION, RunResult
from wellcond.experiments.run.train import run

TABLES_2_TO_4 = (
    *("sn", "ol", "ow", "nog", "olr"),
    *("nog+sn", "nog+ol", "nog+ow", "nog+olr", "ow+olr", "nog+ow+olr"),
)
HEADINGS = f"{'treatment':<12} {'median κ(P)':>12} {'minimum':>9} {'maximum':>9} {'lower by':>9} {'test error':>11}"


def kappas(result: RunResult) -> list[float]:
    """κ(P) of the first spectral layer at every recorded step."""
    layer = result.conditions[0].layer
    return [float(row["kappa"]) for row in read_csv(Path(result.folder) / CONDITION) if row["layer"] == layer]


def line(name: str, results: list[RunResult], untreated: list[RunResult]) -> str:
    """What one treatment did, against the untreated runs of the same seeds."""
    values = [kappas(result) for result in results]
    medians = [statistics.median(one) for one in values]
    ratio = statistics.median(statistics.median(kappas(a)) / b for a, b in zip(untreated, medians, strict=True))
    error = statistics.fmean(result.test_error for result in results)
    return (
        f"{name:<12} {statistics.median(medians):12.2e} {min(map(min, values)):9.1e} {max(map(max, values)):9.1e} "
        f"{ratio:8.2f}× {100 * error:9.1f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="as `wellcond train --data`")
    parser.add_argument("--limit", type=int, help="images of each split")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--treat", default=",".join(TABLES_2_TO_4), help="separated by commas")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--width", type=int)
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction)
    parser.add_argument("--monitor-every", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = vars(parser.parse_args())
    source, limit, size = (options.pop(name) for name in ("data", "limit", "image_size"))
    treats, seeds = options.pop("treat").split(","), range(options.pop("seeds"))
    if options["width"] is None and source != "digits":
        options["width"] = 24
    data = load_images(source, limit=limit, image_size=size)
    configs = grid(
        ["zca"], ["avg"], [NO_TREATMENT, *treats], seeds, data=source, limit=limit, model="resnet8", **options
    )
    first: RunConfig = configs[0]
    print(
        f"{data.name}: {len(data.train)} images of {data.image_size[0]} × {data.image_size[1]}; {first.epochs} epochs, "
        f"batch {first.batch_size}, lr {first.lr:g}, {first.width} channels, {len(seeds)} seeds",
        flush=True,
    )
    print(HEADINGS, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        untreated: list[RunResult] = []
        for treat, same in itertools.groupby(configs, key=lambda config: config.treat):
            results = [run(config, Path(folder) / config.folder_name, data=data) for config in same]
            untreated = untreated or results
            print(line(treat, results, untreated), flush=True)


if __name__ == "__main__":
    main()
