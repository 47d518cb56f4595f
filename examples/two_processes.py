"""Train in two processes that share the statistics of the norm, each with half of the batch.

`convert_sync` makes the decorrelated batch norm take its covariance over all processes; `treat` is called as in one
process, before or after `DistributedDataParallel`. Run by hand this script starts `torchrun`:

    python examples/two_processes.py
    torchrun --standalone --nproc-per-node 2 examples/two_processes.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch
import torch.distributed as dist
import torch.distributed.nn  # now: if torch.optim imports it later, it keeps the process group for good
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wellcond.nn import DecorrelatedBatchNorm2d, convert_sync
from wellcond.orthogonality import treat


def gap(tensor: torch.Tensor) -> float:
    """The largest difference of a tensor between the processes."""
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, tensor.contiguous())
    return max((copy - copies[0]).abs().max().item() for copy in copies)


def train(steps: int) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float()[:, None] / 8 - 1, torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), DecorrelatedBatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    )
    model = DistributedDataParallel(convert_sync(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    treatment = treat(model, optimizer, "nog+olr")
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,)).chunk(size)[rank]  # of one batch, the same in all processes
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = gap(model.module[0].weight.detach())
    statistics = gap(model.module[1].running_cov)
    if rank == 0:
        print(f"{size} processes, treated {', '.join(treatment.layers)}")
        print(f"largest difference between them: weight {weight:.0e}, running covariance {statistics:.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
        train(options.steps)
        # Ends the threads of the group, as nothing holds it any more; one that is busy while Python ends aborts it.
        dist.destroy_process_group()
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, __file__, "--steps", str(options.steps)], stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="")
    done.check_returncode()


if __name__ == "__main__":
    main()
