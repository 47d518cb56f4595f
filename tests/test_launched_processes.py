"""Of a fit in processes that end with it (ddp_spawn, notebooks), module and callbacks come back as trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_task import QUIET, Task, fit, loader
from wellcond.lightning import ConditionMonitorCallback, TreatmentCallback

pytestmark = QUIET


@pytest.mark.parametrize("treatments", ["ow+nog", "sn"])
def test_the_module_the_counters_and_the_records_come_back(treatments: str, tmp_path: Path) -> None:
    there, here = Task(), Task()
    treated, monitor = TreatmentCallback(treatments), ConditionMonitorCallback(every=2)
    trainer = fit(there, treated, monitor, max_epochs=1, strategy="ddp_fork", devices=1, use_distributed_sampler=False)
    reference, watched = TreatmentCallback(treatments), ConditionMonitorCallback(every=2)
    fit(here, reference, watched, max_epochs=1)
    x, _ = next(iter(loader()))
    # One process after the other makes the same sums; the weight in use is handed over, which is exact.
    torch.testing.assert_close(there.eval().net(x), here.eval().net(x))
    assert [record.step for record in monitor.records] == [0, 2, 4]
    assert monitor.records == watched.records
    assert str(treated.state_dict()) == str(reference.state_dict())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    Task.load_from_checkpoint(tmp_path / "after.ckpt", weights_only=True)
