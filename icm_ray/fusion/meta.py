"""One step of a Fusion-VAE's training: the VAE alone, or the meta stage of Algorithm 1.

Every draw is keyed by (seed, step, task): any split of a step's tasks over workers gives the same
losses.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss

from icm_ray.config import FusionSpec
from icm_ray.errors import RecipeError
from icm_ray.fusion.base_side import BaseSide
from icm_ray.fusion.data import FusionTable
from icm_ray.fusion_vae.layout import Layout
from icm_ray.fusion_vae.network import FusionVAE, build_vae, divergence, sampled
from icm_ray.seeding import generator, seed_for

PARTS = ("reconstruction", "kl", "inner", "query")


@dataclass(frozen=True)
class Losses:
    """One task's share of a step, with gradients.

    Attributes:
        reconstruction: Mean square over D.
        kl: Nats over all latent dimensions, both posteriors' in a meta step.
        cost: What the KL adds to the loss: weighted, less what is free.
        inner: Loss of the decoded LoRA before it is adapted; zero in the first stage.
        query: Weighted loss of the re-encoded LoRA on other inputs.
    """

    reconstruction: Tensor
    kl: Tensor
    cost: Tensor
    inner: Tensor
    query: Tensor

    @property
    def total(self) -> Tensor:
        """What is minimised."""
        return self.reconstruction + self.cost + self.query


class MetaTraining(nn.Module):
    """A Fusion-VAE and what it is trained on; its only parameters are the VAE's.

    Paper: ICM-Fusion, arXiv 2508.04153, Algorithm 1. Per task: a checkpoint l is encoded with the
    task vector v, z is drawn and decoded to a LoRA, which makes K gradient steps through the frozen
    base (Eq. 8); the adapted LoRA is encoded again to z', and loss is
    `|l - D(z'; v)|^2 / D + kl_weight KL`.
    Differs: by the letter of line 11 the reconstruction is that of z, not of z': what was adapted
    then does not touch it at all (its gradient through the inner batch is exactly zero), and the KL
    is that of the adapted posterior only. `spec.strict` does that. By default, as the paper's text
    has it, z' is decoded, and both posteriors pay their KL.
    """

    def __init__(
        self,
        vae: FusionVAE,
        spec: FusionSpec,
        layout: Layout,
        table: FusionTable,
        base_side: BaseSide | None,
        seed: int,
    ) -> None:
        """Take what `build` made."""
        super().__init__()
        self.vae, self.spec, self.layout, self.table = vae, spec, layout, table
        self.base_side, self.seed = base_side, seed
        self.v_scale = float(table.v.double().square().mean()) ** 0.5 or 1.0
        self.rows = {task: table.rows_of(task) for task in table.names}

    @classmethod
    def build(
        cls,
        spec: FusionSpec,
        layout: Layout,
        table: FusionTable,
        base_side: BaseSide | None = None,
        seed: int = 0,
    ) -> "MetaTraining":
        """Return the training of a new network.

        Args:
            spec: Everything about it.
            layout: What the table's vectors mean.
            table: Checkpoints of every task.
            base_side: The frozen base and inputs; None where no meta step asks for them.
            seed: Keys the weights and every draw.

        Raises:
            RecipeError: the inner loss needs a base and there is none, or does not fit the tasks.
        """
        if spec.meta_steps and spec.inner.loss != "reconstruction":
            if base_side is None:
                raise RecipeError(
                    f"inner.loss: {spec.inner.loss} needs a base and inputs. Name both, set "
                    "inner.loss to reconstruction, or meta_steps to 0."
                )
            base_side.open(layout, spec.inner, new=spec.query > 0)
        start = seed_for("fusion weights", seed)
        vae = build_vae(spec.vae, layout.sizes, table.v.shape[1], start)
        return cls(vae, spec, layout, table, base_side, seed)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.vae.parameters()).device

    def tasks_of(self, step: int) -> tuple[str, ...]:
        """Return the sorted tasks of a step; draws without replacement if not all of them."""
        names, count = self.table.names, self.spec.tasks_per_step
        if count is None or count >= len(names):
            return names
        order = torch.randperm(len(names), generator=generator("fusion tasks", self.seed, step))
        return tuple(sorted(names[i] for i in order[:count].tolist()))

    def forward(self, step: int, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Return "loss", the mean over `tasks` with a gradient, and detached means of its parts.

        No task at all gives a loss of zero whose gradients are zeros.
        """
        if not tasks:
            nothing = torch.stack([p.sum() for p in self.vae.parameters()]).sum() * 0
            return {"loss": nothing, **{name: nothing.detach() for name in PARTS}}
        every = [self.losses(step, task) for task in tasks]
        parts = {n: torch.stack([getattr(one, n).detach() for one in every]).mean() for n in PARTS}
        return {"loss": torch.stack([one.total for one in every]).mean(), **parts}

    def losses(self, step: int, task: str) -> Losses:
        """Return one task's share of a step."""
        draw = generator("fusion", self.seed, step, task)
        if step < self.spec.vae_steps:
            return self._vae_losses(step, *self._batch(task, draw), draw)
        return self._meta_losses(step, task, draw)

    def kl_cost(self, kl: Tensor, step: int) -> Tensor:
        """Return what divergences by latent dimension add to the loss at a step."""
        rise = self.spec.kl_warm_up * self.spec.vae_steps
        share = min((step + 1) / rise, 1.0) if rise else 1.0
        return share * self.spec.kl_weight * kl.clamp(min=self.spec.free_bits).sum()

    def adapt(self, task: str, step: int, x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return the LoRA after K inner steps, and its loss before them.

        Args:
            task: Whose inputs.
            step: Which of them.
            x: `(D,)`, the decoded LoRA.
            wanted: `(D,)`, the checkpoint, for the inner loss `reconstruction` and for tasks that
                the inner loss says nothing about.
        """
        inner, second = self.spec.inner, self.spec.inner.order == 2
        # Fused attention has no second derivative.
        exact = sdpa_kernel(SDPBackend.MATH) if second else contextlib.nullcontext()
        before = x.new_zeros(())
        with exact:
            for number in range(inner.steps):
                start = x if second and x.requires_grad else x.detach().requires_grad_()
                loss = self.inner_loss(task, step, start, wanted)
                before = loss.detach() if number == 0 else before
                (slope,) = torch.autograd.grad(loss, start, create_graph=second)
                length = inner.lr
                if inner.relative:
                    length *= float(x.detach().norm() / slope.detach().norm().clamp(min=1e-12))
                x = x - length * slope
        return x, before

    def inner_loss(
        self, task: str, step: int, x: Tensor, wanted: Tensor, *, new: bool = False
    ) -> Tensor:
        """Return the inner loss on a step's batch of a task, or on new inputs."""
        side = self.base_side
        if side is None or self.spec.inner.loss == "reconstruction" or not side.covers(task):
            return mse_loss(x, wanted)
        return side.loss(task, step, self.seed, x, new=new)

    def _batch(self, task: str, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return checkpoints of a task and mixtures of checkpoints of all tasks, with their v."""
        size = self.spec.batch
        mixed = round(size * self.spec.mixtures) if len(self.rows) > 1 else 0
        own = _pick(self.rows[task], size - mixed, draw)
        x, v = self.table.x[own], self.table.v[own]
        if mixed:
            shares = -torch.rand(mixed, len(self.rows), generator=draw).clamp(min=1e-12).log()
            shares = shares / shares.sum(1, keepdim=True)  # uniform over the simplex
            shares = shares * (1.5 * torch.rand(mixed, 1, generator=draw))
            picked = torch.tensor([_pick(rows, mixed, draw) for rows in self.rows.values()])
            x = torch.cat([x, torch.einsum("mk,kmd->md", shares, self.table.x[picked])])
            v = torch.cat([v, torch.einsum("mk,kmd->md", shares, self.table.v[picked])])
        return x.to(self.device), (v / self.v_scale).to(self.device)

    def _vae_losses(self, step: int, x: Tensor, v: Tensor, draw: torch.Generator) -> Losses:
        posterior = self.vae.encode(x, v)
        made = self.vae.decode(sampled(posterior, self._noise(len(x), draw)), v)
        kl = divergence(*posterior)
        zero = x.new_zeros(())
        return Losses(mse_loss(made, x), kl.sum(), self.kl_cost(kl, step), zero, zero)

    def _meta_losses(self, step: int, task: str, draw: torch.Generator) -> Losses:
        rows = _pick(self.rows[task], self.spec.meta_batch, draw)
        x = self.table.x[rows].to(self.device)
        v = (self.table.v[rows] / self.v_scale).to(self.device)
        first = self.vae.encode(x, v)
        decoded = self.vae.decode(sampled(first, self._noise(len(x), draw)), v)
        pairs = [self.adapt(task, step, one, own) for one, own in zip(decoded, x, strict=True)]
        second = self.vae.encode(torch.stack([after for after, _ in pairs]), v)
        again = decoded
        if not self.spec.strict:
            again = self.vae.decode(sampled(second, self._noise(len(x), draw)), v)
        paid = [second] if self.spec.strict else [first, second]
        kls = [divergence(*posterior) for posterior in paid]
        return Losses(
            mse_loss(again, x),
            torch.stack([kl.sum() for kl in kls]).sum(),
            torch.stack([self.kl_cost(kl, step) for kl in kls]).sum(),
            torch.stack([before for _, before in pairs]).mean(),
            self._query(task, step, again, x),
        )

    def _query(self, task: str, step: int, again: Tensor, x: Tensor) -> Tensor:
        if not self.spec.query:
            return x.new_zeros(())
        pairs = zip(again, x, strict=True)
        return (
            self.spec.query
            * torch.stack(
                [self.inner_loss(task, step, one, own, new=True) for one, own in pairs]
            ).mean()
        )

    def _noise(self, rows: int, draw: torch.Generator) -> Tensor:
        return torch.randn(rows, self.vae.latent, generator=draw)


def _pick(rows: Sequence[int], count: int, draw: torch.Generator) -> list[int]:
    return [rows[i] for i in torch.randint(len(rows), (count,), generator=draw).tolist()]
