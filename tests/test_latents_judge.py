"""Pictures of generators, and the judge of their latents."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from small_generators import CPU, few, small
from wellcond.experiments.data.sprites import draw_sprites
from wellcond.experiments.latents import judge as judging
from wellcond.experiments.latents import observer as observing
from wellcond.experiments.latents.pictures import grid, traversal
from wellcond.experiments.latents.training import AdversarialTraining


def test_a_grid_has_the_images_in_their_places():
    images = torch.stack([torch.full((3, 4, 4), value) for value in (-1.0, 0.0, 1.0)])
    sheet = grid(images, 2)
    assert sheet.shape == (3, 10, 10)
    assert sheet[:, :4, :4].unique().tolist() == [0]
    assert sheet[:, :4, 6:].unique().tolist() == [128]
    assert sheet[:, 6:, :4].unique().tolist() == [255]


def test_a_traversal_moves_one_variable_in_each_row():
    class Shown(nn.Module):
        n_latents = 3

        def forward(self, z, noise):
            return torch.cat([z, noise], 1)[:, :, None, None]

    z, noise = torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([[9.0]])
    found = traversal(Shown(), z, noise, 5).flatten(1).view(3, 5, 4)
    for i in range(3):
        assert found[i, :, i].tolist() == [-3.0, -1.5, 0.0, 1.5, 3.0]
        others = [j for j in range(4) if j != i]
        assert torch.equal(found[i][:, others], torch.cat([z, noise], 1)[:, others].expand(5, -1))


class Drawer(nn.Module):
    """A perfect generator: it draws the sprites of the factors that its latents say."""

    n_latents, n_noise = 6, 0

    def forward(self, z, noise):
        low, high = torch.tensor(list(observing.RANGES.values()), dtype=torch.float64).T
        uniform = torch.special.ndtr(z.double())
        shape = (uniform[:, :1] * 3).floor()
        factors = torch.cat([shape, low + uniform[:, 1:] * (high - low)], 1)
        return observing.scaled(draw_sprites(factors, 32))


@pytest.mark.slow
def test_the_judge_knows_a_perfect_generator_from_others(monkeypatch):
    monkeypatch.setattr(observing, "EPOCHS", 4)
    monkeypatch.setattr(judging, "path_length", lambda *args: 0.0)  # no gradient through a drawing
    monkeypatch.setattr(judging, "SPLITS", {"test": 600})

    class Deaf(Drawer):
        """Perfect images, of other latents than it is given."""

        def forward(self, z, noise):
            return super().forward(z.roll(1, 0), noise)

    class Blind(Drawer):
        """Images of one grey, of the latents."""

        def forward(self, z, noise):
            return torch.tanh(z.sum(1))[:, None, None, None].expand(-1, 3, 32, 32)

    found = {}
    for generator in (Drawer(), Deaf(), Blind()):
        training = AdversarialTraining(small(image_size=None, n_basis=1), few(32, 2500), CPU)
        training.generator = training.average = generator
        found[type(generator)] = judging.judge(training)
    perfect, deaf, blind = found.values()
    assert perfect.observer == deaf.observer > 0.6  # the mean of an accuracy and five R²
    assert max(perfect.frechet_distance, deaf.frechet_distance) < 0.1 * blind.frechet_distance
    assert perfect.informativeness > 0.5
    assert deaf.informativeness < 0.2  # a third of the shapes by chance
    # Few epochs and few images make the observer and the histograms coarse: 0.19 here.
    assert perfect.mig > 0.12 > 0.06 > max(deaf.mig, blind.mig)
    assert perfect.disentanglement > 0.5 > 0.2 > max(deaf.disentanglement, blind.disentanglement)
