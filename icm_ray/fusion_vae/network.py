"""The network of the Fusion-VAE: encoder q(z | x, v) and decoder p(x | z, v), in three kinds.

Parameters do not grow with D, the length of x: every number passes a layer that is shared by all
places of the vector, so the cost is linear in D. Places are told apart by fixed waves.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from icm_ray.config import VAESpec
from icm_ray.errors import RecipeError

Posterior = tuple[Float[Tensor, "batch latent"], Float[Tensor, "batch latent"]]
"""Mean and log-variance of q(z | x, v)."""

START_LOGVAR = -4.0
"""Log-variance of an untrained posterior: narrow enough to reconstruct, wide enough to matter."""
CHUNK = 576
"""Numbers of x in one token of the preset `paper`."""
WIDEST = 4096
"""Most numbers of a module that the default network takes as one token."""
PIECES = 64
"""Longest code the convolutions hand to a dense layer."""


class FusionVAE(nn.Module):
    """Encoder and decoder over adapters `x` `(batch, D)` and task vectors `v` `(batch, d_v)`.

    Paper: ICM-Fusion, arXiv 2508.04153, Eq. 2 and 3.

    Attributes:
        latent: Length of z.
    """

    latent: int

    def encode(self, x: Tensor, v: Tensor) -> Posterior:
        """Return the posterior's mean and log-variance."""
        raise NotImplementedError

    def decode(self, z: Tensor, v: Tensor) -> Float[Tensor, "batch D"]:
        """Return the mean of p(x | z, v)."""
        raise NotImplementedError

    def forward(self, x: Tensor, v: Tensor) -> Float[Tensor, "batch D"]:
        """Return the reconstruction by the posterior's mean."""
        return self.decode(self.encode(x, v)[0], v)


def build_vae(spec: VAESpec, sizes: Sequence[int], d_v: int, seed: int = 0) -> FusionVAE:
    """Return an untrained network.

    Args:
        spec: Kind and widths.
        sizes: Numbers of each module in x.
        d_v: Length of task vectors.
        seed: Draws the weights; the global generator is left alone.
    """
    kinds = {"default": SkipVAE, "conv": ConvVAE, "paper": PlainVAE}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kinds[spec.preset](spec, sizes, d_v)


def divergence(mean: Tensor, logvar: Tensor) -> Float[Tensor, " latent"]:
    """Return KL(q || N(0, 1)) of every latent dimension in nats, averaged over the batch."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(0)


def sampled(posterior: Posterior, noise: Tensor) -> Float[Tensor, "batch latent"]:
    """Return `mean + deviation * noise`."""
    mean, logvar = posterior
    return mean + (0.5 * logvar).exp() * noise.to(mean)


def waves(count: int, width: int) -> Float[Tensor, "count width"]:
    """Return fixed features that tell `count` places apart: sines of falling frequency."""
    place = torch.arange(count, dtype=torch.float32)[:, None]
    number = torch.arange(width)
    angles = place * torch.exp(-(number // 2) * (2 * math.log(10_000.0) / max(width, 2)))
    return torch.where(number % 2 == 0, angles.sin(), angles.cos())


class SkipVAE(FusionVAE):
    """A linear skip with the identity at its start, and a residual that also sees v.

    Each module has `spec.latent` latent numbers of its own, at the start its first principal
    coordinates; so the untrained network loses only what the cut loses, and fused latents decode
    to the average of the deltas. The residual, one network for all modules, starts at zero; it
    sees the module, all modules' mean, and v.
    """

    source: Tensor
    target: Tensor
    places: Tensor

    def __init__(self, spec: VAESpec, sizes: Sequence[int], d_v: int) -> None:
        super().__init__()
        width, self.count = max(sizes, default=0), len(sizes)
        if not 0 < width <= WIDEST:
            raise RecipeError(
                f"vae.preset: default but the largest module has {width} numbers, and from 1 to "
                f"{WIDEST} are expected. Set representation.components, or choose preset paper."
            )
        self.own = min(spec.latent, width)
        self.latent = self.count * self.own
        source, target = _gathering(sizes, width)
        self.register_buffer("source", source, persistent=False)
        self.register_buffer("target", target, persistent=False)
        self.register_buffer("places", waves(self.count, spec.hidden), persistent=False)
        self.inward = nn.Parameter(torch.ones(self.own))
        self.outward = nn.Parameter(torch.ones(self.own))
        self.logvar = nn.Parameter(torch.full((self.own,), START_LOGVAR))
        self.reads = self.writes = None
        if spec.residual:
            self.reads = _Residual(width, 2 * self.own, d_v, spec.hidden)
            self.writes = _Residual(self.own, width, d_v, spec.hidden)

    def encode(self, x: Tensor, v: Tensor) -> Posterior:
        """Return the posterior's mean and log-variance."""
        grid = F.pad(x, (0, 1))[:, self.source]  # the last number is the zero of shorter modules
        mean = grid[..., : self.own] * self.inward
        logvar = self.logvar.expand_as(mean)
        if self.reads is not None:
            more, wider = self.reads(grid, v, self.places).chunk(2, -1)
            mean, logvar = mean + more, logvar + wider
        return mean.flatten(1), logvar.flatten(1)

    def decode(self, z: Tensor, v: Tensor) -> Float[Tensor, "batch D"]:
        """Return the mean of p(x | z, v)."""
        x = z.view(-1, self.count, self.own)
        made = F.pad(x * self.outward, (0, self.source.shape[1] - self.own))
        if self.writes is not None:
            made = made + self.writes(x, v, self.places)
        return made.flatten(1)[:, self.target]


class _Residual(nn.Module):
    """Tokens to tokens: each sees itself, its place, the tokens' mean and v; zero at the start."""

    def __init__(self, d_in: int, d_out: int, d_v: int, hidden: int) -> None:
        super().__init__()
        self.enter, self.task = nn.Linear(d_in, hidden), nn.Linear(d_v, hidden)
        self.mixed, self.alone = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.before, self.after = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.leave = nn.Linear(hidden, d_out)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, v: Tensor, places: Tensor) -> Tensor:
        """Return `(batch, tokens, d_out)` for tokens `(batch, tokens, d_in)`."""
        h = self.enter(x) + self.task(v)[:, None] + places
        h = F.gelu(self.before(h))
        h = h + self.alone(h) + self.mixed(h.mean(1, keepdim=True))
        return self.leave(F.gelu(self.after(h)))


def _gathering(sizes: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    """Return where each module's numbers are in x, and where each number of x is in the grid."""
    total = sum(sizes)
    source = torch.full((len(sizes), width), total)
    start = 0
    for row, size in enumerate(sizes):
        source[row, :size] = torch.arange(start, start + size)
        start += size
    return source, (source.flatten() < total).nonzero()[:, 0]


class PlainVAE(FusionVAE):
    """The paper's encoder and decoder: no skip, one latent vector, every token by one network.

    Paper: arXiv 2508.04153, Eq. 2 and 3, whose layers are unspecified.
    Differs: a dense layer over D numbers is not possible (25.3 billion weights for D = 1e8), so
    the numbers are read in runs of 576 by one network and averaged.
    """

    places: Tensor

    def __init__(self, spec: VAESpec, sizes: Sequence[int], d_v: int) -> None:
        super().__init__()
        self.size, self.latent = sum(sizes), spec.latent
        self.chunk = min(CHUNK, self.size)
        count = -(-self.size // self.chunk)
        self.register_buffer("places", waves(count, spec.hidden), persistent=False)
        hidden = spec.hidden
        self.enter, self.task = nn.Linear(self.chunk, hidden), nn.Linear(d_v, hidden)
        self.mean_of = nn.Sequential(
            nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 2 * self.latent)
        )
        self.start = nn.Linear(self.latent + d_v, hidden)
        self.make = nn.Sequential(
            nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, self.chunk)
        )

    def encode(self, x: Tensor, v: Tensor) -> Posterior:
        """Return the posterior's mean and log-variance."""
        runs = F.pad(x, (0, len(self.places) * self.chunk - self.size))
        h = self.enter(runs.view(len(x), -1, self.chunk)) + self.task(v)[:, None] + self.places
        mean, logvar = self.mean_of(h).mean(1).chunk(2, -1)
        return mean, logvar

    def decode(self, z: Tensor, v: Tensor) -> Float[Tensor, "batch D"]:
        """Return the mean of p(x | z, v)."""
        h = self.start(torch.cat([z, v], 1))[:, None] + self.places
        return self.make(h).flatten(1)[:, : self.size]


class ConvVAE(FusionVAE):
    """The predecessor's convolutions: kernels of 7 that halve the length, and back.

    Paper: ICM-LoRA, whose network ICM-Fusion builds on: 12 strided convolutions, channels 8 to 256
    and back to 8, a dense layer to 256 latent numbers, the task vector joined before and after.
    Differs: its loss compared `(batch, D)` with `(batch, 1, D)`, so that every sample was pulled
    to the batch's mean; shapes agree here. Batches are tiny, so normalisation is over a sample's
    channels (GroupNorm), not over the batch. Codes longer than 64 are pooled, so that the dense
    layer does not grow with D; short vectors are halved less often.
    """

    CHANNELS = (8, 16, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8)

    def __init__(self, spec: VAESpec, sizes: Sequence[int], d_v: int) -> None:
        super().__init__()
        self.size, self.latent = sum(sizes), spec.latent
        stages = min(len(self.CHANNELS), max(math.ceil(math.log2(max(self.size, 2))) - 3, 1))
        # The middle is left out where there are fewer stages, so both ends stay narrow.
        up, down = self.CHANNELS[: -(-stages // 2)], self.CHANNELS[12 - stages // 2 :]
        channels = (1, *up, *down)
        self.unit = 2**stages
        self.length = -(-self.size // self.unit)
        self.pieces = min(self.length, PIECES)
        self.folds, self.unfolds = nn.Sequential(), nn.Sequential()
        for c_in, c_out in itertools.pairwise(channels):
            self.folds.append(nn.Conv1d(c_in, c_out, 7, 2, 3))
            self.folds.append(nn.GroupNorm(1, c_out))
            self.folds.append(nn.LeakyReLU())
        for c_in, c_out in zip(channels[:0:-1], (*channels[-2:0:-1], channels[1]), strict=True):
            self.unfolds.append(nn.ConvTranspose1d(c_in, c_out, 7, 2, 3, 1))
            self.unfolds.append(nn.GroupNorm(1, c_out))
            self.unfolds.append(nn.ELU())
        self.unfolds.append(nn.Conv1d(channels[1], 1, 7, 1, 3))
        self.narrow = channels[-1]
        self.to_latent = nn.Linear(self.narrow * self.pieces, spec.hidden)
        self.posterior = nn.Linear(spec.hidden + d_v, 2 * self.latent)
        self.from_latent = nn.Linear(self.latent + d_v, self.narrow * self.pieces)

    def encode(self, x: Tensor, v: Tensor) -> Posterior:
        """Return the posterior's mean and log-variance."""
        folded = self.folds(F.pad(x, (0, self.length * self.unit - self.size))[:, None])
        code = self.to_latent(F.adaptive_avg_pool1d(folded, self.pieces).flatten(1))
        mean, logvar = self.posterior(torch.cat([code, v], 1)).chunk(2, -1)
        return mean, logvar

    def decode(self, z: Tensor, v: Tensor) -> Float[Tensor, "batch D"]:
        """Return the mean of p(x | z, v)."""
        x = self.from_latent(torch.cat([z, v], 1)).view(len(z), self.narrow, self.pieces)
        if self.length > self.pieces:
            x = F.interpolate(x, size=self.length, mode="linear")
        return self.unfolds(x)[:, 0, : self.size]
