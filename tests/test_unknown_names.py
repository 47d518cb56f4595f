"""A name that is not known is answered in a line, with the nearest right ones, however many there are."""

from __future__ import annotations

import pytest
import torch

from wellcond._shared.names import MOST_SHOWN, require_known
from wellcond.experiments.run.models import build_model
from wellcond.monitor import ConditionMonitor
from wellcond.nn import replace_batchnorm
from wellcond.orthogonality import pre_spectral_layers, treat


@pytest.fixture(scope="module")
def resnet50():
    return build_model("resnet50", num_classes=10, norm="zca", width=8)


def test_of_the_layers_of_a_resnet_50_the_nearest_are_named(resnet50):
    optimizer = torch.optim.SGD(resnet50.parameters(), lr=0.1)
    for use in (
        lambda: treat(resnet50, optimizer, "nog", layers=["stage1.0.cnov3"]),
        lambda: ConditionMonitor(resnet50, layers=["stage1.0.cnov3"]),
    ):
        with pytest.raises(ValueError, match=r"has no layer 'stage1.0.cnov3'; did you mean 'stage1.0.conv3'\?") as told:
            use()
        assert "the nearest of 162 known: stage1.0.conv3, " in str(told.value)
        assert len(str(told.value)) < 240
    for use in (
        lambda: replace_batchnorm(resnet50, lambda *_: False),
        lambda: treat(resnet50, optimizer, "nog", layers=["q" * 20]),  # near to nothing
    ):
        with pytest.raises(ValueError) as told:
            use()
        assert len(str(told.value)) < 500
    assert list(pre_spectral_layers(resnet50)) == ["conv1"]


@pytest.mark.parametrize("count", [MOST_SHOWN, MOST_SHOWN + 1])
def test_few_names_are_all_shown_and_of_many_the_nearest(count):
    known = [f"{chr(97 + i)}{i}" for i in range(count)]
    with pytest.raises(ValueError, match="unknown letter 'c22'; did you mean 'c2'") as told:
        require_known("c22", known, "letter")
    assert ("a0" in str(told.value)) == (count <= MOST_SHOWN)


def test_a_name_that_something_is_also_called_leads_to_the_right_one():
    with pytest.raises(ValueError, match="did you mean 'right'") as told:
        require_known("Usual", ["right", "usually"], "word", also_called={"usual": "right"})
    assert str(told.value).endswith("(known: right, usually)")
