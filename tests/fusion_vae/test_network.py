"""What the three networks see and make: every number of x, z and v, and every weight."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.nn import functional as F

from icm_ray.config import VAESpec
from icm_ray.fusion_vae.network import CHUNK, START_LOGVAR, build_vae, sampled, waves

PRESETS = ("default", "conv", "paper")
SIZES, D_V = (7, 5, 9), 6


def network(preset: str = "default", sizes=SIZES, *, seed: int = 0, **changes):
    """A network whose weights are all away from their start, where a residual hides in zeros."""
    spec = VAESpec(**{"preset": preset, "latent": 4, "hidden": 16, **changes})
    vae = build_vae(spec, list(sizes), D_V, seed)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return vae


def numbers(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reached(function, *inputs: Tensor) -> list[list[bool]]:
    """Say of every number of each input whether the output depends on it."""
    slopes = jacobian(function, inputs)
    return [slope.flatten(0, -2).any(0).tolist() for slope in slopes]


@pytest.mark.parametrize("preset", PRESETS)
def test_an_encoder_sees_every_number_of_x_and_of_v(preset) -> None:
    vae, x, v = network(preset), numbers(1, 21), numbers(1, D_V)
    for output in (0, 1):
        assert reached(lambda x, v, o=output: vae.encode(x, v)[o][0], x, v) == [
            [True] * 21,
            [True] * D_V,
        ]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_decoder_sees_every_number_of_z_and_of_v(preset) -> None:
    vae = network(preset)
    z, v = numbers(1, vae.latent), numbers(1, D_V)
    assert reached(lambda z, v: vae.decode(z, v)[0], z, v) == [[True] * vae.latent, [True] * D_V]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_row_of_every_weight_takes_part(preset) -> None:
    vae = network(preset)
    outputs = (
        *vae.encode(numbers(3, 21), numbers(3, D_V)),
        vae.decode(numbers(3, vae.latent), numbers(3, D_V)),
    )
    sum((out * numbers(*out.shape, seed=5)).sum() for out in outputs).backward()
    for name, parameter in vae.named_parameters():
        assert bool(parameter.grad.flatten(1 if parameter.ndim > 1 else 0).abs().sum(-1).all()), (
            name
        )


def test_without_a_residual_nothing_but_the_skip_is_left() -> None:
    vae, x, v = network(residual=False), numbers(1, 21), numbers(1, D_V)
    assert [name for name, _ in vae.named_parameters()] == ["inward", "outward", "logvar"]
    mean, logvar = vae.encode(x, v)
    first = torch.stack([part[0, :4] for part in x.split(SIZES, 1)])
    assert torch.equal(mean.view(3, 4), first * vae.inward)
    assert torch.equal(logvar.view(3, 4), vae.logvar.expand(3, 4))
    for made, own in zip(vae.decode(mean, v).split(SIZES, 1), mean.view(3, 4), strict=True):
        assert torch.equal(made[0], F.pad(own * vae.outward, (0, made.shape[1] - 4)))


def test_an_untrained_residual_adds_nothing() -> None:
    spec = VAESpec(latent=4, hidden=16)
    with_one, without = (
        build_vae(spec.model_copy(update={"residual": on}), list(SIZES), D_V)
        for on in (True, False)
    )
    x, v = numbers(2, 21), numbers(2, D_V)
    for one, other in zip(with_one.encode(x, v), without.encode(x, v), strict=True):
        assert torch.equal(one, other)
    z = numbers(2, 12)
    assert torch.equal(with_one.decode(z, v), without.decode(z, v))
    assert bool((with_one.encode(x, v)[1] == START_LOGVAR).all())


@pytest.mark.parametrize(("latent", "own"), [(4, 4), (9, 9), (50, 9)])
def test_a_module_has_no_more_latent_numbers_than_it_has_numbers(latent, own) -> None:
    assert network(latent=latent).latent == 3 * own


def reaches(vae, side: str) -> Tensor:
    """Say of each module's part of a residual (rows) which modules' input it depends on."""
    v = numbers(1, D_V)
    with torch.no_grad():
        vae.inward.zero_()
        vae.outward.zero_()
    own = [vae.own] * len(SIZES)
    if side == "encode":
        slope, rows, columns = (
            jacobian(lambda x: vae.encode(x, v)[0][0], numbers(1, 21)),
            own,
            SIZES,
        )
    else:
        slope, rows, columns = jacobian(lambda z: vae.decode(z, v)[0], numbers(1, 12)), SIZES, own
    return torch.tensor(
        [[bool(part.any()) for part in row.split(columns, 1)] for row in slope[:, 0].split(rows)]
    )


@pytest.mark.parametrize("side", ["encode", "decode"])
def test_a_module_s_residual_sees_the_others_through_their_mean_alone(side) -> None:
    vae = network()
    assert bool(reaches(vae, side).all())
    for residual in (vae.reads, vae.writes):
        torch.nn.init.zeros_(residual.mixed.weight)
        torch.nn.init.zeros_(residual.alone.weight)
    assert torch.equal(reaches(vae, side), torch.eye(3, dtype=torch.bool))


def test_equal_modules_are_told_apart_by_their_places() -> None:
    vae, v = network(sizes=(5, 5)), numbers(1, D_V)
    mean, _ = vae.encode(numbers(1, 5).repeat(1, 2), v)
    assert not torch.allclose(mean[0, :4], mean[0, 4:], atol=1e-3)
    made = vae.decode(numbers(1, 4).repeat(1, 2), v)
    assert not torch.allclose(made[0, :5], made[0, 5:], atol=1e-3)


def test_runs_of_the_paper_s_network_are_told_apart_by_their_places() -> None:
    vae, v = network("paper", (2 * CHUNK,)), numbers(1, D_V)
    runs = numbers(2, CHUNK)
    one, other = (vae.encode(x.reshape(1, -1), v)[0] for x in (runs, runs.flip(0)))
    assert not torch.allclose(one, other, atol=1e-4)
    slope = jacobian(lambda x: vae.encode(x, v)[0].sum(), runs.reshape(1, -1))
    assert bool(slope.view(2, CHUNK).any(1).all()), "all of them count"
    made = vae.decode(numbers(1, vae.latent), v)
    assert not torch.allclose(made[0, :CHUNK], made[0, CHUNK:], atol=1e-3)


def test_places_are_sines_and_cosines_of_falling_frequency() -> None:
    expected = [f(place / 100**i) for place in (3,) for i in (0, 1) for f in (math.sin, math.cos)]
    assert waves(5, 4)[3].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("size", "channels"),
    [
        (21, [1, 8, 8]),
        (100, [1, 8, 16, 16, 8]),
        (4096, [1, 8, 16, 32, 64, 128, 64, 32, 16, 8]),
        (300_000, [1, 8, 16, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8]),
    ],
)
def test_convolutions_halve_as_often_as_there_is_length(size, channels) -> None:
    vae = network("conv", (size,))
    layers = [layer for layer in vae.folds if isinstance(layer, torch.nn.Conv1d)]
    assert [layers[0].in_channels, *(layer.out_channels for layer in layers)] == channels
    back = [layer for layer in vae.unfolds if isinstance(layer, torch.nn.ConvTranspose1d)]
    assert [layer.in_channels for layer in back] == channels[:0:-1]
    assert vae.length == math.ceil(size / 2 ** (len(channels) - 1))


def test_between_pooled_codes_lies_a_straight_line() -> None:
    vae = network("conv", (300_000,))
    assert vae.length > vae.pieces == 64
    vae.unfolds = torch.nn.Identity()
    with torch.no_grad():
        vae.from_latent.weight.zero_()
        vae.from_latent.bias.copy_(torch.arange(64.0).repeat(vae.narrow))
    steps = vae.decode(numbers(1, vae.latent), numbers(1, D_V))[0].diff()[2:-2]
    assert steps.tolist() == pytest.approx([64 / vae.length] * len(steps), rel=1e-3)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_seed_draws_the_weights_and_nothing_else(preset) -> None:
    spec, before = VAESpec(preset=preset, hidden=16), torch.get_rng_state()
    one, again, other = (build_vae(spec, list(SIZES), D_V, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_draw_is_the_mean_and_so_many_deviations() -> None:
    mean, logvar = torch.tensor([[1.0, -1.0]]), torch.tensor([[math.log(4.0), math.log(0.25)]])
    assert sampled((mean, logvar), torch.tensor([[3.0, -2.0]])).tolist() == [[7.0, -2.0]]
