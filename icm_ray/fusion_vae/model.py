"""A finished Fusion-VAE: fuses any subset of its tasks, takes in new ones, and can be stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from icm_ray.config import VAESpec
from icm_ray.errors import InputError, RecipeError
from icm_ray.fusion_vae.layout import Layout, Modules, Part
from icm_ray.fusion_vae.network import FusionVAE, build_vae
from icm_ray.fusion_vae.orientation import fused_direction, leanings, oriented

KIND = "fusion_model"
Rule = Literal["mean", "arithmetic", "soup"]


@dataclass(frozen=True)
class Point:
    """A place in the latent space from which an adapter is decoded.

    Attributes:
        z: `(latent,)`.
        v: `(d_v,)`, in the network's unit.
        weights: Each task's share by name; they sum to one.
    """

    z: Float[Tensor, " latent"]
    v: Float[Tensor, " d_v"]
    weights: Mapping[str, float]


@dataclass(frozen=True)
class FusionModel:
    """Everything that a fusion needs; the adapters themselves only for the exact residual.

    Attributes:
        layout: What vectors mean.
        vae: The trained network.
        spec: The network's recipe.
        v_scale: What task vectors are divided by before the network sees them.
        latents: `(latent,)` by task: the posterior's mean of its finished adapter.
        vectors: `(d_v,)` task vector by task, as gathered.
        adapters: Fingerprint by task.
        report: Reconstruction errors, KL, bytes, warnings, history.
    """

    layout: Layout
    vae: FusionVAE
    spec: VAESpec
    v_scale: float
    latents: Mapping[str, Tensor]
    vectors: Mapping[str, Tensor]
    adapters: Mapping[str, str]
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks it can fuse, sorted."""
        return tuple(sorted(self.latents))

    def check_adapters(self, fingerprints: Mapping[str, str]) -> None:
        """Raise InputError if a name stands for another adapter than the one the model knows."""
        known = self.adapters
        others = [name for name, own in fingerprints.items() if known.get(name, own) != own]
        if others:
            raise InputError(
                f"fusion: {', '.join(others)}: not the adapters the Fusion-VAE was trained on. "
                "Name those, or train again."
            )

    def unit(self, vector: Tensor) -> Tensor:
        """Return a task vector in the network's unit."""
        return vector.float() / self.v_scale

    @torch.no_grad()
    def encode(
        self, modules: Modules, vector: Tensor, like: Modules | None = None
    ) -> Float[Tensor, " latent"]:
        """Return the posterior's mean of an adapter with its task vector; see `Layout.encode`."""
        x = self.layout.encode(modules, like)
        return self.vae.encode(x[None], self.unit(vector)[None])[0][0]

    @torch.no_grad()
    def decoded(self, z: Tensor, v: Tensor) -> Float[Tensor, " D"]:
        """Return what a latent and a task vector in the network's unit decode to."""
        return self.vae.decode(z[None], v[None])[0]

    def joined(
        self,
        task: str,
        modules: Modules,
        vector: Tensor,
        fingerprint: str,
        checkpoints: Sequence[Modules] = (),
    ) -> "FusionModel":
        """Return a model that knows one more task; nothing is trained.

        What of the adapter lies outside the bases of the tasks it was trained on is lost; the
        report says how much.

        Args:
            task: A new name, or one whose entry is replaced.
            modules: The finished adapter.
            vector: Its task vector.
            fingerprint: The adapter's.
            checkpoints: Late checkpoints, averaged with it in the latent space.

        Raises:
            InputError: the vector has another length than those the model knows.
        """
        known = next(iter(self.vectors.values())).shape
        if vector.shape != known:
            raise InputError(
                f"task vector of {task}: {tuple(vector.shape)} but {tuple(known)} is expected. "
                "Gather it with the base of the other tasks."
            )
        every = [self.encode(one, vector, modules) for one in checkpoints]
        z = torch.stack([self.encode(modules, vector), *every]).mean(0)
        lost = self.layout.error(modules, self.decoded(z, self.unit(vector)))
        errors = {**self.report.get("reconstruction_error", {}), task: lost}
        return replace(
            self,
            latents={**self.latents, task: z},
            vectors={**self.vectors, task: vector.float()},
            adapters={**self.adapters, task: fingerprint},
            report={**self.report, "reconstruction_error": errors},
        )

    def point(
        self,
        tasks: Sequence[str],
        *,
        weights: Mapping[str, float] | None = None,
        rule: Rule = "mean",
        temperature: float | None = 1.0,
        strength: float = 1.0,
    ) -> Point:
        """Return where the fusion of some tasks lies.

        `mean` (F1): the task vectors' conflicts are projected out, their sum is v, and z is the
        mean of the tasks' latents, weighted towards tasks that point where v points. `arithmetic`
        (F2): differences of latents from that of the zero adapter, oriented likewise, are added
        `strength` times their mean. `soup` is where the latents' plain mean lies.

        Args:
            tasks: Any of the model's, in any order.
            weights: Each task's share, zero or more; None: equal ones.
            rule: Which of the three.
            temperature: Of the weights of `mean`; None: as `weights` says.
            strength: Of `arithmetic`; the number of tasks gives the sum.

        Raises:
            InputError: a task is unknown.
            RecipeError: a share is negative, or all are zero.
        """
        given = {name: float((weights or {}).get(name, 1.0)) for name in tasks}
        self._check(given)
        names = sorted(name for name, weight in given.items() if weight)  # others conflict not
        shares = torch.tensor([given[name] for name in names])
        z = torch.stack([self.latents[name] for name in names])
        vectors = torch.stack([self.unit(self.vectors[name]) for name in names])
        v = fused_direction(vectors, shares)
        if rule != "arithmetic":
            shares = leanings(vectors, v, shares, temperature if rule == "mean" else None)
            fused = (shares[:, None] * z).sum(0)
        else:
            shares = shares / shares.sum()
            zero, nothing = torch.zeros(1, self.layout.size), torch.zeros(1, vectors.shape[1])
            with torch.no_grad():
                origin = self.vae.encode(zero, nothing)[0][0]
            fused = origin + strength * (shares[:, None] * oriented(z - origin)).sum(0)
        found = dict(zip(names, shares.tolist(), strict=True))
        return Point(fused, v, {name: found.get(name, 0.0) for name in sorted(given)})

    def fused(self, point: Point, *, residual: bool) -> Float[Tensor, " D"]:
        """Return what a point decodes to; with `residual`, less the tasks' own reconstructions.

        With the residual the weighted adapters themselves are added by whoever holds them: the
        network then only bends their average, and its blur cancels.
        """
        x = self.decoded(point.z, point.v)
        if residual:
            for task, weight in point.weights.items():
                if not weight:
                    continue
                own = self.decoded(self.latents[task], self.unit(self.vectors[task]))
                x = x - weight * own
        return x

    def parts(self, x: Float[Tensor, " D"]) -> dict[str, Part]:
        """Return the change of each module that a vector stands for."""
        return self.layout.parts(x)

    def _check(self, weights: Mapping[str, float]) -> None:
        unknown = [name for name in sorted(weights) if name not in self.latents]
        if unknown or not weights:
            raise InputError(
                f"evidence: a Fusion-VAE of {', '.join(self.tasks)} but {', '.join(unknown)} "
                "is asked for. Let it join with jobs.train_fusion (joins), or train again."
            )
        if min(weights.values()) < 0 or not any(weights.values()):
            raise RecipeError(
                f"params.weights: {dict(weights)} but shares of zero or more are expected, not all "
                "of them zero."
            )

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that is numbers, by name."""
        network = {f"vae/{n}": t.detach().cpu() for n, t in self.vae.state_dict().items()}
        return {
            **network,
            **{f"layout/{name}": tensor for name, tensor in self.layout.tensors().items()},
            **{f"latent/{task}": z.detach().cpu() for task, z in self.latents.items()},
            **{f"vector/{task}": v.detach().cpu() for task, v in self.vectors.items()},
        }

    def described(self) -> dict[str, Any]:
        """Return everything else as plain data."""
        return {
            "layout": self.layout.described(),
            "spec": self.spec.model_dump(),
            "v_scale": self.v_scale,
            "report": dict(self.report),
        }

    @classmethod
    def restored(
        cls,
        described: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        adapters: Mapping[str, str],
    ) -> "FusionModel":
        """Return a model from what `described` and `tensors` gave.

        Raises:
            InputError: tensors are missing or of other shapes.
        """

        def under(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        try:
            layout = Layout.restored(described["layout"], under("layout/"))
            spec = VAESpec.model_validate(described["spec"])
            vectors = under("vector/")
            vae = build_vae(spec, layout.sizes, next(iter(vectors.values())).shape[0])
            vae.load_state_dict(under("vae/"))
        except (KeyError, StopIteration, RuntimeError, ValueError) as error:
            raise InputError(f"evidence: not a whole Fusion-VAE ({error}). Train again.") from None
        return cls(
            layout,
            vae.requires_grad_(False),
            spec,
            float(described["v_scale"]),
            under("latent/"),
            vectors,
            adapters,
            described.get("report", {}),
        )
