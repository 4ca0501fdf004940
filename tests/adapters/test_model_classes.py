"""Transformers' real classes from training to proof: two towers, two stacks, and experts."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from model_classes import KINDS, Kind, inputs_for, load, output, quiet, save_base, train

import icm_ray
from icm_ray.adapters import (
    AdapterFile,
    check_base,
    open_adapter,
    save_adapter,
    verify_forward,
    verify_with_peft,
)
from icm_ray.base_model import loading as evidence_base
from icm_ray.base_model.placing import Place
from icm_ray.base_model.readers import Batch, TextReader
from icm_ray.base_model.states import hidden_states
from icm_ray.errors import InputError
from icm_ray.evidence.gather import gather
from icm_ray.evidence.grams import gather_grams


@dataclass(frozen=True)
class Trained:
    kind: Kind
    base: Path
    files: list[AdapterFile]

    @property
    def modules(self) -> list[str]:
        return sorted({module for file in self.files for module in file.shapes})


SLOW = ("florence2",)
"""Kinds that take longest to build and to train, and share LLaVA's way through everything."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in KINDS],
)
def trained(request, tmp_path_factory):
    kind, folder = KINDS[request.param], tmp_path_factory.mktemp(request.param)
    base = save_base(kind, folder / "base")
    files = [open_adapter(train(kind, base, n, folder / n), n) for n in kind.targets]
    return Trained(kind, base, files)


@pytest.fixture(scope="module")
def model(trained):
    """The bare base as evidence sees it. These folders have no tokenizer, and need none."""
    weights = evidence_base.load_weights(trained.base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence_base, "load_reader", lambda path: TextReader(None))
        base = evidence_base.build_base(trained.base, weights, Place(device="cpu", dtype="float32"))
    assert base.d_model == 16
    return base.model


def batch_for(kind: Kind, seed: int) -> Batch:
    inputs = inputs_for(kind, seed)
    mask, pixels = inputs["attention_mask"].bool(), inputs.get("pixel_values")
    return Batch(inputs["input_ids"], mask, torch.arange(2), pixels=pixels)


def peft_deltas(trained: Trained, file: AdapterFile) -> dict[str, torch.Tensor]:
    """Return the change of every weight as PEFT computes it."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model = quiet(lambda: PeftModel.from_pretrained(load(trained.kind, trained.base), file.path))
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def by_hand(trained: Trained, shares: list[float]) -> torch.Tensor:
    """Return the outputs of the base with a weighted sum of PEFT's deltas in its weights."""
    model = load(trained.kind, trained.base)
    with torch.no_grad():
        for file, share in zip(trained.files, shares, strict=True):
            for name, delta in peft_deltas(trained, file).items():
                model.get_submodule(name).weight += share * delta
    return output(model, inputs_for(trained.kind, 7))


def by_peft(trained: Trained, folder: Path) -> torch.Tensor:
    from peft import PeftModel

    model = load(trained.kind, trained.base)
    return output(
        quiet(lambda: PeftModel.from_pretrained(model, folder)).eval(), inputs_for(trained.kind, 7)
    )


def written(result: icm_ray.MergeResult, trained: Trained, folder: Path) -> Path:
    """Save a merge and put it to both proofs."""
    save_adapter(result.adapter, folder)
    # LLaVA takes its image features before the last block of the vision tower, so what is adapted
    # there is never trained, and element-wise methods give it rank 0.
    changed = {m for m, factors in result.adapter.modules.items() if factors.rank}
    assert set(result.adapter.modules) == set(trained.modules)
    assert set(open_adapter(folder).shapes) == changed
    assert {m for m in trained.modules if "vision_tower.encoder.layers.1" not in m} <= changed
    assert verify_with_peft(folder, result.adapter)["modules"] == len(changed)
    assert verify_forward(folder, result.adapter, trained.base)["change_from_base"] > 1e-3
    return folder


def test_training_moved_every_adapter_and_they_fit_their_base(trained) -> None:
    check_base(trained.files, trained.base)
    assert all(file.norm > 0.1 for file in trained.files)
    assert len({frozenset(file.shapes) for file in trained.files}) > 1, "targets differ"


@pytest.mark.parametrize(
    ("method", "params", "shares"),
    [
        ("soup", {}, [1 / 3] * 3),
        ("task_arithmetic", {"scale": 0.7}, [0.7] * 3),
    ],
)
def test_a_linear_merge_in_peft_is_the_base_and_the_sum_of_deltas(
    trained, tmp_path, method, params, shares
) -> None:
    result = icm_ray.merge(trained.files, method, params=params)
    found = by_peft(trained, written(result, trained, tmp_path / "merged"))
    expected = by_hand(trained, shares)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
    plain = output(load(trained.kind, trained.base), inputs_for(trained.kind, 7))
    assert (expected - plain).norm() > 1e-2 * plain.norm()


@pytest.mark.slow
def test_ties_and_a_cut_pass_both_proofs(trained, tmp_path) -> None:
    ties = icm_ray.merge(trained.files, "ties", params={"density": 0.5}, output_rank=4)
    written(ties, trained, tmp_path / "ties")
    cut = icm_ray.merge(trained.files, "svd", output_rank=2)
    assert cut.adapter.max_rank == 2
    written(cut, trained, tmp_path / "cut")


def test_evidence_reaches_every_module_and_regmean_takes_it(trained, model, tmp_path) -> None:
    grams = {}
    for seed, file in enumerate(trained.files):
        adapter, batch = file.load(), batch_for(trained.kind, seed)
        found = gather(model, adapter, [batch])
        assert set(found.expert_ratios) == set(adapter.modules)
        assert found.task_vector.norm() > 1e-3
        seen = gather_grams(model, adapter, trained.modules, [batch])
        assert set(seen.shared) == set(trained.modules)
        grams |= {f"{m}.gram.{file.name}": seen.grams[own].whole for m, own in seen.shared.items()}
    result = icm_ray.merge(trained.files, "regmean", evidence=grams)
    written(result, trained, tmp_path / "merged")
    soup = icm_ray.merge(trained.files, "soup").adapter
    moved = [
        m for m in trained.modules
        if (soup.modules[m].delta() - result.adapter.modules[m].delta()).norm() > 1e-4
    ]  # fmt: skip
    assert moved, "Grams make a difference"


def test_a_task_vector_is_the_difference_of_peft_states(trained, model) -> None:
    """The reference is the class PEFT trained, run on its own, one example at a time."""
    from peft import PeftModel

    file, inputs = trained.files[0], inputs_for(trained.kind, 3)
    whole = load(trained.kind, trained.base)
    tuned = quiet(lambda: PeftModel.from_pretrained(whole, file.path)).eval()
    states = []
    with torch.no_grad():
        for row, length in ((0, 9), (1, 7)):
            one = {k: v[row : row + 1] for k, v in inputs.items()}
            one |= {k: one[k][:, :length] for k in ("input_ids", "attention_mask")}
            if whole.config.is_encoder_decoder:
                start = whole.config.get_text_config().decoder_start_token_id
                ids = one["input_ids"]
                one["decoder_input_ids"] = torch.cat([torch.tensor([[start]]), ids[:, :-1]], 1)
            pair = []
            for context in (tuned.disable_adapter, torch.no_grad):
                with context():
                    given = tuned(**one, output_hidden_states=True)
                    towers = getattr(given, "text_model_output", given)
                    names = ("decoder_hidden_states", "last_hidden_state", "hidden_states")
                    name = next(n for n in names if getattr(towers, n, None) is not None)
                    state = getattr(towers, name)
                    pair.append((state if name == "last_hidden_state" else state[-1])[0].mean(0))
            states.append(pair[1] - pair[0])
    found = gather(model, file.load(), [batch_for(trained.kind, 3)])
    torch.testing.assert_close(found.task_vector, sum(states) / 2, rtol=1e-3, atol=1e-4)


def test_texts_alone_leave_out_the_modules_of_images(trained, model) -> None:
    adapter, both = trained.files[0].load(), batch_for(trained.kind, 5)
    words = Batch(both.data.clamp(max=29), both.mask, both.rows)
    assert torch.isfinite(hidden_states(model, words)).all()
    reached = set(gather(model, adapter, [words]).expert_ratios)
    images = {m for m in adapter.modules if "vision" in m}
    assert reached == set(adapter.modules) - images
    assert set(gather_grams(model, adapter, trained.modules, [words]).shared) >= reached


def test_clip_reads_images_alone() -> None:
    from model_classes import clip

    model = clip().eval()
    pixels = torch.randn(2, 3, 8, 8)
    batch = Batch(pixels, torch.ones(2, 5, dtype=torch.bool), torch.arange(2))
    torch.testing.assert_close(
        hidden_states(model, batch), model.vision_model(pixels).last_hidden_state
    )


def test_adapters_of_single_experts_need_a_base_that_has_them(tmp_path, make_adapter) -> None:
    base = save_base(KINDS["mixtral"], tmp_path / "base")
    old = "model.layers.1.block_sparse_moe.experts.3.w1"
    new = "model.layers.1.mlp.experts.3.w1"
    for path, said in ((new, "mlp.experts holds all experts in one"), (old, "not in the base")):
        with pytest.raises(InputError) as error:
            check_base([make_adapter("x", shapes={path: (24, 16)})], base)
        assert said in str(error.value)


def test_images_are_no_texts() -> None:
    import numpy as np

    with pytest.raises(InputError, match="images but the base reads texts"):
        TextReader(None).read(np.zeros((1, 4, 4, 3), dtype=np.uint8), 8)
