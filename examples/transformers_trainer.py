"""The treatments in the `Trainer` of Hugging Face: two callbacks, for any model that it takes.

The model is a small ResNet of `transformers`, whose first batch norm is made a decorrelated one. Symbolic tracing does
not see through models of this library; with `example_input` they are run once instead.

    pip install "wellcond[huggingface]"
    python examples/transformers_trainer.py
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import (
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from wellcond.nn import replace_batchnorm
from wellcond.transformers import ConditionMonitorCallback, TreatmentCallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    set_seed(0)
    digits = load_digits()
    pixels = (torch.tensor(digits.images).float()[:, None] / 8 - 1).repeat_interleave(4, -1).repeat_interleave(4, -2)
    data = [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, digits.target, strict=True)]
    shape = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    config = ResNetConfig(**shape, num_labels=10, problem_type="single_label_classification")
    model = ResNetForImageClassification(config)
    example = {"pixel_values": pixels[:2]}
    print(f"whitened {replace_batchnorm(model, 'first', example_input=example)[0]}")
    treatment, watch = TreatmentCallback("nog+olr", example_input=example), ConditionMonitorCallback(every=1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=options.steps, per_device_train_batch_size=32, learning_rate=3e-3, use_cpu=True,
            logging_steps=options.steps, save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[treatment, watch])
        trainer.remove_callback(PrinterCallback)  # what is logged is read below
        trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    print(f"treated {', '.join(treatment.layers)}; logged {', '.join(n for n in logged if n.startswith('rate/'))}")
    first, last = watch.records[0], watch.records[-1]
    print(f"κ(P + εI) at step {first.step} and {last.step}: {first.kappa_eps:.1e} and {last.kappa_eps:.1e}")


if __name__ == "__main__":
    main()
