"""Export a model with whitening and a covariance head to ONNX, and run it in ONNX Runtime.

ONNX has no eigendecomposition. In evaluation the decorrelated batch norm is one affine map, and `solver="auto"` of the
head exports as matrix products that agree with PyTorch's root to rounding. The batch size stays open.

    pip install onnx onnxscript onnxruntime
    python examples/onnx_runtime.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import nn

from wellcond.nn import DecorrelatedBatchNorm2d, GlobalCovariancePool2d


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float()[:, None] / 8 - 1, torch.tensor(digits.target)
    pool = GlobalCovariancePool2d(12)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), DecorrelatedBatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), pool, nn.Linear(pool.out_features, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(options.steps):
        chosen = torch.randint(len(images), (64,))
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        batch = torch.export.Dim("batch", min=2)
        with contextlib.redirect_stdout(io.StringIO()):  # the exporter tells what it does
            torch.onnx.export(model, (images[:4],), path, dynamo=True, dynamic_shapes=({0: batch},), input_names=["x"])
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        with torch.no_grad():
            expected = model(images[:100])  # another batch size than that of the export
        (found,) = session.run(None, {"x": images[:100].numpy()})
    gap = ((torch.tensor(found) - expected).norm() / expected.norm()).item()
    print(f"100 images, exported with 4: relative difference of the logits {gap:.0e}")
    print(f"the same classes: {bool((torch.tensor(found).argmax(1) == expected.argmax(1)).all())}")


if __name__ == "__main__":
    main()
