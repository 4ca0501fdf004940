"""P1 to P7, P9 and P10 of a Fusion-VAE; P8 and P11 are in test_meta.py."""

import itertools
from dataclasses import replace

import pytest
import torch

import icm_ray
from icm_ray.checkpoint import Checkpoint
from icm_ray.errors import InputError, RecipeError
from icm_ray.fusion.diagnosis import soup, warnings_of
from icm_ray.fusion.latent import latent_plan
from icm_ray.fusion.serial import Checkpoints, join
from icm_ray.fusion.store import load_fusion, save_fusion
from icm_ray.fusion.train import STATE, check_kept, finished, learning_rate, train
from icm_ray.fusion_vae.layout import Sample, cosine, distance, norm
from icm_ray.types import LoRAFactors


def merged(adapters, model, **params):
    return icm_ray.merge(adapters, "icm_fusion", evidence=model, params=params).adapter.modules


def relative(one, two) -> float:
    return distance(one, two) / norm(two)


def test_p1_reconstructions_are_close_in_delta_space(model, adapters) -> None:
    for adapter in adapters:
        alone = merged([adapter], model, residual=False)
        error = model.report["reconstruction_error"][adapter.name]
        assert error < 0.1
        assert relative(alone, adapter.modules) == pytest.approx(error, abs=1e-4)


def test_p2_one_adapter_and_equal_ones_come_back(model, adapters, adapter_around) -> None:
    one = adapters[0]
    assert relative(merged([one], model), one.modules) < 1e-5
    twin = adapter_around("twin", one.modules)
    both = model.joined("twin", twin.modules, model.vectors[one.name], twin.fingerprint)
    together = merged([one, twin], both, residual=False)
    assert relative(together, merged([one], model, residual=False)) < 1e-4


@pytest.mark.parametrize("params", [{}, {"residual": False}, {"rule": "arithmetic"}])
def test_p3_the_order_of_tasks_is_nothing(model, adapters, params) -> None:
    first = merged(adapters, model, **params)
    for order in itertools.permutations(adapters):
        assert relative(merged(list(order), model, **params), first) < 1e-5


def test_p4_the_posterior_says_something(model, build, adapters) -> None:
    assert 0.01 < sum(model.report["kl"]) / len(model.report["kl"]) < 5
    assert len(model.report["kl"]) == model.vae.latent
    assert not model.report["warnings"]
    meta = build(vae={"preset": "paper"}, kl_weight=1.0, vae_steps=40, lr=1e-2)
    collapsed = finished(meta, train(meta), adapters)
    assert collapsed.report["kl_total"] < 1
    assert "posterior collapsed" in collapsed.report["warnings"][0]
    assert warnings_of({"kl_total": 2.0, "reconstruction_error": {"a": 0.5}})[0].startswith("1 rec")


def test_p5_opposite_task_vectors_are_survived(model, adapters) -> None:
    name = adapters[0].name
    against = model.joined(
        "law", adapters[1].modules, -model.vectors[name], adapters[1].fingerprint
    )
    point = against.point(["code", "law"])
    assert not point.v.any()
    assert point.weights == {"code": 0.5, "law": 0.5}
    assert norm(merged(adapters[:2], against)) > 0


def test_p6_every_run_says_where_it_lies_to_the_average(model, untrained) -> None:
    for one in (model, untrained):
        said = one.report["against_soup"]
        assert set(said) == {"decoded", "residual"}
        assert said["residual"]["cosine"] > 0.9
        assert 0.5 < said["residual"]["norm"] < 2
    assert untrained.report["against_soup"]["decoded"]["cosine"] > 0.99


def test_p7_the_decoder_reads_the_task_vector(model) -> None:
    point = model.point(["code", "law", "med"])
    apart = model.decoded(point.z, point.v) - model.decoded(point.z, torch.zeros_like(point.v))
    assert float(apart.norm()) > 1e-3 * float(model.decoded(point.z, point.v).norm())


@pytest.mark.parametrize("preset", ["default", "conv", "paper"])
def test_p9_one_checkpoint_can_be_learned_by_heart(build, preset) -> None:
    # One latent number a module, or the default network starts as the identity.
    changes = {"preset": preset, "latent": 1 if preset == "default" else 16, "hidden": 48}
    meta = build(vae=changes, kl_weight=0.0, mixtures=0.0, vae_steps=300, batch=1, lr=1e-2)
    meta.rows = {"code": [meta.table.final_of("code")]}
    meta.vae.requires_grad_(True)
    x, v = meta.table.x[meta.rows["code"]], meta.table.v[meta.rows["code"]] / meta.v_scale
    optimizer = torch.optim.Adam(meta.vae.parameters(), 3e-3)
    error = torch.nn.functional.mse_loss(meta.vae(x, v), x)
    assert float(error.detach()) > 1e-2
    for _ in range(300):
        optimizer.zero_grad()
        error = torch.nn.functional.mse_loss(meta.vae(x, v), x)
        if float(error.detach()) < 1e-4:
            break
        error.backward()
        optimizer.step()
    assert float(error.detach()) < 1e-4


def test_p10_an_untrained_residual_is_the_average(untrained, adapters) -> None:
    average = soup([adapter.modules for adapter in adapters])
    assert relative(merged(adapters, untrained, temperature=None), average) < 1e-5
    decoded = merged(adapters, untrained, temperature=None, residual=False)
    assert relative(decoded, average) < 1e-4, "and the finals' span is exact without it too"


def test_the_average_can_be_chosen_instead(model, adapters) -> None:
    average = soup([adapter.modules for adapter in adapters])
    for residual in (True, False):
        guarded = merged(adapters, model, rule="soup", residual=residual)
        assert relative(guarded, average) < 1e-5
    assert relative(merged(adapters, model), average) > 1e-3
    weights = {"code": 3.0, "law": 1.0, "med": 0.0}
    leaning = soup([adapter.modules for adapter in adapters], [0.75, 0.25, 0.0])
    assert relative(merged(adapters, model, rule="soup", weights=weights), leaning) < 1e-5


def test_weights_and_scale(model, untrained, adapters) -> None:
    weights = {"code": 1.0, "law": 0.0, "med": 0.0}
    alone = merged(adapters, model, weights=weights, temperature=None)
    assert relative(alone, adapters[0].modules) < 1e-4
    with pytest.raises(RecipeError, match="shares of zero or more"):
        merged(adapters, model, weights=dict.fromkeys(weights, 0.0))
    doubled = merged(adapters, untrained, scale=2.0)
    once = merged(adapters, untrained)
    assert relative({m: LoRAFactors(f.a, 2 * f.b) for m, f in once.items()}, doubled) < 1e-6


def test_what_the_task_vector_alone_says_can_be_asked(model, adapters) -> None:
    point = model.point([adapter.name for adapter in adapters])
    alone = model.decoded(torch.zeros_like(point.z), point.v)
    said = merged(adapters, model, residual=False, latent=False)
    for module, part in model.parts(alone).items():
        core = part.core.diag() if part.core.ndim == 1 else part.core
        torch.testing.assert_close(said[module].delta(), part.left @ core @ part.right)
    assert relative(said, merged(adapters, model, residual=False)) > 0.1


def test_arithmetic_adds_up(untrained, adapters) -> None:
    total = merged(adapters, untrained, rule="arithmetic", strength=3.0, residual=False)
    mean = soup([adapter.modules for adapter in adapters])
    assert cosine(total, mean) > 0.9
    assert 2 < norm(total) / norm(mean) < 4


def test_subsets_fuse_and_strangers_are_refused(model, adapters, make_adapter) -> None:
    assert norm(merged(adapters[1:], model)) > 0
    stranger = make_adapter("new", shapes=dict.fromkeys(adapters[0].modules, (16, 16)), seed=9)
    with pytest.raises(InputError, match="but new is asked for"):
        merged([adapters[0], stranger], model)
    known = make_adapter("code", shapes=dict.fromkeys(adapters[0].modules, (16, 16)), seed=9)
    with pytest.raises(InputError, match="of another adapter than 'code'"):
        merged([known, adapters[1]], model)


def test_a_new_task_joins_and_its_loss_is_told(model, make_adapter, adapters) -> None:
    shapes = dict.fromkeys(adapters[0].modules, (16, 16))
    new = make_adapter("new", shapes=shapes, rank=2, seed=9, spread=0.4)
    more = model.joined("new", new.modules, torch.ones(16), new.fingerprint, [new.modules])
    assert more.tasks == ("code", "law", "med", "new")
    assert 0.05 < more.report["reconstruction_error"]["new"] < 1.2
    # The bases do not span it, so with the residual its own delta is added beside them.
    assert relative(merged([new], more), new.modules) < 1e-4


@pytest.mark.parametrize("gauge", ["core", "balanced", "raw"])
def test_a_task_joins_where_its_checkpoints_lie(build, adapters, samples, gauge) -> None:
    meta = build(representation={"gauge": gauge})
    model, table = finished(meta, [], adapters), meta.table
    own = [s.modules for s in samples if s.task == "law" and not s.is_final]
    more = model.joined(
        "late", adapters[1].modules, model.vectors["law"], adapters[1].fingerprint, own
    )
    rows = table.rows_of("law")
    with torch.no_grad():
        every = model.vae.encode(table.x[rows], model.unit(table.v[rows]))[0]
    assert torch.allclose(more.latents["late"], every.mean(0), atol=1e-4)
    with pytest.raises(InputError, match=r"task vector of late: \(3,\) but \(16,\)"):
        model.joined("late", adapters[1].modules, torch.ones(3), "")


def test_tasks_that_join_are_counted_and_warned_about(model, make_adapter, adapters) -> None:
    shapes = dict.fromkeys(adapters[0].modules, (16, 16))
    new = make_adapter("new", shapes=shapes, rank=2, seed=9, spread=0.4)
    known = Checkpoints([Sample("new", 1, new.modules, is_final=True)], {"new": torch.ones(16)})
    more = join(model, [new], known)
    assert more.tasks == ("code", "law", "med", "new")
    assert more.report["bytes"]["adapters"] > model.report["bytes"]["adapters"]
    assert more.report["bytes"]["model"] > model.report["bytes"]["model"]
    assert "new by" in more.report["warnings"][0]
    assert not model.report["warnings"]
    with pytest.raises(InputError, match="new: known to the Fusion-VAE already"):
        join(more, [new], known)
    deaf = replace(model, report={**model.report, "task_vectors": "none"})
    with pytest.raises(InputError, match="task_vectors none but own is expected"):
        join(deaf, [new], known)


def test_a_model_is_the_same_from_disk(model, adapters, tmp_path) -> None:
    save_fusion(model, tmp_path / "fusion", {"key": "k"})
    again = load_fusion(tmp_path / "fusion")
    assert again.report == model.report
    assert again.adapters == model.adapters
    for evidence in (again, tmp_path / "fusion"):
        one, two = merged(adapters, evidence), merged(adapters, model)
        assert all(torch.equal(one[m].b, two[m].b) for m in two)
    size = (tmp_path / "fusion/evidence.safetensors").stat().st_size
    assert size == pytest.approx(model.report["bytes"]["model"], rel=0.4)


class Renamed(str):
    """A module's name that a set keeps elsewhere, as it does in every other process."""

    def __hash__(self) -> int:
        return ~super().__hash__()


def test_a_cosine_does_not_depend_on_the_order_of_a_set(make_adapter) -> None:
    shapes = {f"layers.{i}.q": (6, 5) for i in range(300)}
    one, two = (make_adapter(n, shapes=shapes).modules for n in "ab")
    other = [{Renamed(m): f for m, f in modules.items()} for modules in (one, two)]
    assert cosine(one, two) == cosine(*other)


class Killed(Exception):
    pass


def test_a_killed_training_continues_to_the_same_weights(build, tmp_path) -> None:
    changes = {"vae_steps": 6, "meta_steps": 3, "save_every": 2}
    whole = build(**changes)
    history = train(whole)

    def kill(step: int, _loss: float) -> None:
        if step == 7:
            raise Killed

    checkpoint = Checkpoint(tmp_path / STATE, "k")
    with pytest.raises(Killed):
        train(build(**changes), checkpoint=checkpoint, progress=kill)
    seen: list[int] = []
    resumed = build(**changes)
    found = train(resumed, checkpoint=checkpoint, progress=lambda step, _l: seen.append(step))
    assert seen == [7, 8, 9]
    assert found == history
    for one, two in zip(whole.vae.parameters(), resumed.vae.parameters(), strict=True):
        assert torch.equal(one, two)
    (tmp_path / STATE).write_bytes(b"cut off")
    train(build(**changes), checkpoint=checkpoint, progress=lambda step, _l: seen.append(step))
    assert seen[3:] == list(range(1, 10))


def test_a_lost_training_stops_where_it_is_lost(build) -> None:
    history = train(build(vae_steps=40, lr=1e30))
    assert 1 < len(history) < 40
    with pytest.raises(RecipeError, match=f"no number at step {len(history)}"):
        check_kept(history)


def test_another_adapter_by_a_known_name_is_refused(model, adapters, adapter_around) -> None:
    other = adapter_around(adapters[0].name, adapters[1].modules)
    with pytest.raises(InputError, match="not the adapters the Fusion-VAE was trained on"):
        latent_plan(model, [other, *adapters[1:]])


def test_rates_rise_and_fall_in_each_stage(build) -> None:
    spec = build(vae_steps=20, meta_steps=10, warm_up=0.2, lr=1.0, meta_lr=0.1).spec
    rates = [learning_rate(spec, step) for step in range(30)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4] == 1.0
    assert rates[19] < 0.02
    assert max(rates[20:]) == pytest.approx(0.1)
