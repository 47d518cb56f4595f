"""How far does a step turn the weight before a decorrelated batch norm, and what does that do to the test error?

A ResNet-8 in training, with ``nog`` of either length, and the orthogonal weight by its maps; the rotation is that of
the condition monitor, ‖W_new − W_old‖_F/‖W_old‖_F of the weight in use in one step. Its median is over the records from
step 20 to the first fall of the learning rate, its maximum over all of them; κ is the median of κ(P) over all records.

    python benchmarks/how_far_do_treatments_turn_the_weight.py
    python benchmarks/how_far_do_treatments_turn_the_weight.py --data FOLDER --image-size 16 --limit 10000 --epochs 4
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings

import torch
from torch import nn

from wellcond.experiments.data.batches import ImageDataModule
from wellcond.experiments.data.load import ImageData, load_images
from wellcond.experiments.run.models import build_model
from wellcond.experiments.run.schedule import Schedule
from wellcond.experiments.run.training import evaluate
from wellcond.monitor import ConditionMonitor
from wellcond.orthogonality import treat

FULL, KEPT = {"nog": {"scale": "paper"}}, {"nog": {"scale": "gradient"}}
SOC = {"ow": {"map": "soc"}}
ROWS = {
    "none": ("", {}),
    "nog, full": ("nog", FULL),
    "ow": ("ow", {}),
    "nog+ow, full": ("nog+ow", FULL),
    "nog+ow, kept": ("nog+ow", KEPT),
    "ow(soc)": ("ow", SOC),
    "nog+ow(soc), full": ("nog+ow", FULL | SOC),
    "nog+ow(soc), kept": ("nog+ow", KEPT | SOC),
}
"""Full polar factors, whose singular values are 1, or those of the gradient's length."""
SCHEDULE = Schedule.parse("100,200,300/350")


def trained(row: str, data: ImageData, width: int, epochs: int, lr: float, seed: int, every: int) -> str:
    """A line of the table."""
    treatments, options = ROWS[row]
    torch.manual_seed(seed)
    kernel = 3 if data.in_channels > 1 else 5
    model: nn.Module = build_model(
        "resnet8",
        num_classes=data.num_classes,
        in_channels=data.in_channels,
        width=width,
        norm="zca",
        stem_kernel=kernel,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    if treatments:
        treat(model, optimizer, treatments, options=options)
    images = ImageDataModule(data, 128, augment=False, seed=seed)
    loader = images.train_dataloader()
    total = epochs * len(loader)
    monitor = ConditionMonitor(model, every=every, optimizer=optimizer)
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue]
        model.train()
        for batch in loader:
            for group in optimizer.param_groups:
                group["lr"] = lr * SCHEDULE.factor(monitor.step, total)
            inputs, labels = images.on_after_batch_transfer(batch, 0)
            loss = nn.functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    error = 1 - evaluate(model, images, torch.device("cpu"))[1]
    rotations = [(r.step, r.rotation) for r in monitor.records if not math.isnan(r.rotation)]
    settled = [r for step, r in rotations if step >= 20 and SCHEDULE.factor(step - 1, total) == 1]
    kappa = statistics.median(r.kappa for r in monitor.records)
    largest = max(r for _, r in rotations)
    median = statistics.median(settled) if settled else math.nan
    return f"{row:<18} {seed:4d} {100 * median:8.1f} % {100 * largest:8.1f} % {kappa:9.1e} {100 * error:8.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="as `wellcond train --data`")
    parser.add_argument("--limit", type=int, help="images of each split")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--rows", default=";".join(ROWS), help="separated by semicolons")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--width", type=int)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore", "the weight of layer")  # which is what is looked for
    data = load_images(given.data, limit=given.limit, image_size=given.image_size)
    width = given.width or (24 if data.in_channels > 1 else 16)
    print(f"{data.name}: {len(data.train)} images of {data.image_size}, {given.epochs} epochs, {width} channels")
    print(f"{'treatment':<18} seed   median    largest      κ(P)  test error", flush=True)
    for row in given.rows.split(";"):
        for seed in range(given.seeds):
            print(trained(row, data, width, given.epochs, given.lr, seed, given.every), flush=True)


if __name__ == "__main__":
    main()
