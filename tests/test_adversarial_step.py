"""Networks of generators and one step of their training."""

from __future__ import annotations

import pytest
import torch

from small_generators import CPU, WIDTHS, few, small
from wellcond.experiments.latents.discriminator import Discriminator
from wellcond.experiments.latents.generator import EigenGenerator, PlainGenerator, resolutions
from wellcond.experiments.latents.training import AdversarialTraining


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("model", ["eigen", "plain"])
def test_networks_have_the_shapes_that_they_say(size, model):
    if model == "eigen":
        generator = EigenGenerator(size, 3, n_basis=3, n_noise=5, **WIDTHS)
        assert generator.n_latents == 3 * len(resolutions(size))
    else:
        generator = PlainGenerator(size, 3, n_latents=7, **WIDTHS)
    z, noise = torch.randn(2, generator.n_latents), torch.randn(2, generator.n_noise)
    images = generator(z, noise)
    assert images.shape == (2, 3, size, size)
    assert images.abs().max() <= 1
    assert Discriminator(size, 3, **WIDTHS)(images).shape == (2,)
    assert list(generator.directions()) == list(generator.direction_layers)


def test_every_latent_variable_and_the_noise_move_the_image():
    generator = EigenGenerator(16, 3, n_basis=2, n_noise=3, **WIDTHS)
    z, noise = torch.randn(1, 4), torch.randn(1, 3)
    first = generator(z, noise)
    for given in (z, noise):
        for i in range(given.shape[1]):
            given[0, i] += 1
            assert not torch.equal(generator(z, noise), first)
            given[0, i] -= 1


def test_activations_keep_their_size_at_the_start():
    generator = PlainGenerator(32, 3, n_latents=200, base_channels=32, max_channels=256)
    features = generator.body(generator.start(torch.randn(64, 200)))
    # 2/(1 + slope²) is for what follows a leaky ReLU; the first layer has none before it.
    assert 0.5 < features.square().mean().item() / (2 / 1.04) < 2


def test_a_step_is_hinge_loss_and_lazy_r1():
    training = AdversarialTraining(small(batch_size=4, r1=2.0, r1_every=3), few(), CPU)
    real = training.real(0)
    fake = training.generator(*training.latents(4, 2, 0))
    scores = [training.discriminator(images) for images in (real, fake)]
    hinge = (1 - scores[0]).clamp_min(0).mean() + (1 + scores[1]).clamp_min(0).mean()
    (gradient,) = torch.autograd.grad(training.discriminator(x := real.clone().requires_grad_()).sum(), x)
    squares = gradient.square().sum((1, 2, 3)).mean()
    before = [p.detach().clone() for p in training.discriminator.parameters()]
    found = training.step()
    assert found.discriminator == pytest.approx(hinge.item(), rel=1e-5)
    assert found.r1 == pytest.approx(squares.item(), rel=1e-4)
    assert any(not torch.equal(p, q) for p, q in zip(before, training.discriminator.parameters(), strict=True))
    assert [training.step().r1 == found.r1 for _ in range(3)] == [True, True, False]


def test_the_penalty_counts_for_the_steps_that_it_stands_for():
    """Its gradient by the scale of the last layer: the score is linear in it, so that the penalty is quadratic."""
    training = AdversarialTraining(small(r1=2.0, r1_every=3), few(), CPU)
    penalty = training._gradient_penalty(training.real(0))
    assert penalty.item() == pytest.approx(2.0 / 2 * 3 * training._r1, rel=1e-6)
    last = training.discriminator.score[-1]
    (gradient,) = torch.autograd.grad(penalty, last.weight)
    assert (gradient * last.weight).sum().item() == pytest.approx(2 * penalty.item(), rel=1e-4)


def test_the_average_is_the_exponential_one_of_the_weights():
    training = AdversarialTraining(small(average=0.75), few(), CPU)
    want = None
    for _ in range(4):
        training.step()
        now = training.generator.start[0].weight.detach().double()
        want = now if want is None else 0.75 * want + 0.25 * now
    assert torch.allclose(training.average.start[0].weight.double(), want, atol=1e-7)


def test_batches_are_all_images_once_in_every_epoch():
    images = few(count=12)
    training = AdversarialTraining(small(batch_size=4), images, CPU)
    wanted = sorted(image.sum().item() for image in images.images.long())
    orders = []
    for epoch in range(2):
        batches = [training.real(3 * epoch + i) for i in range(3)]
        pixels = ((torch.cat(batches) + 1) * 127.5).round().long()
        orders.append([image.sum().item() for image in pixels])
        assert sorted(orders[-1]) == wanted
    assert orders[0] != orders[1]


@pytest.mark.parametrize("model", ["eigengan", "plain"])
@pytest.mark.parametrize("treat", ["nog", "ow", "olr", "nog+olr", "sn"])
def test_treatments_act_on_the_directions_alone(model, treat):
    training = AdversarialTraining(small(model=model, latents=3, treat=treat), few(), CPU)
    assert list(training.treatment.layers) == list(training.generator.direction_layers)
    for _ in range(3):
        training.step()
    if treat == "ow":
        for layer in (*training.generator.directions().values(), *training.average.directions().values()):
            U = layer.weight.detach()
            assert torch.dist(U.T @ U, torch.eye(U.shape[1])) < 1e-5
    if "nog" in treat:
        assert all(found["treated"] == 3 for found in training.treatment.nog.counts().values())


@pytest.mark.parametrize("model", ["eigengan", "plain"])
def test_the_orthogonal_loss_is_the_mean_square_of_the_gap(model):
    training = AdversarialTraining(small(model=model, latents=3, treat="ol", ol_weight=50.0), few(16), CPU)
    gaps = []
    for layer in training.generator.directions().values():
        with torch.no_grad():
            layer.weight.mul_(1.3)
        U = layer.weight.detach().double()
        gaps.append((U.T @ U - torch.eye(U.shape[1])).square().mean().item())
    assert training.treatment.loss().item() == pytest.approx(50 * sum(gaps) / len(gaps), rel=1e-4)
