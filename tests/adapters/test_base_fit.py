"""An adapter is held against its base model without loading a weight."""

import json

import pytest
from adapter_samples import CASES, small_model

from icm_ray.adapters import check_base, open_adapter, tied_warnings
from icm_ray.adapters.base_folder import open_base
from icm_ray.errors import InputError


def write_config(model, folder, **changes):
    folder.mkdir()
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("conv")])
def test_adapters_fit_their_base(make_peft, tmp_path, case):
    kind, options = CASES[case]
    file = open_adapter(make_peft(kind, **options)[0])
    base = write_config(small_model(kind), tmp_path / "base")
    check_base([file, file.load()], base)


def test_every_misfit_of_every_adapter_is_named(make_peft, tmp_path):
    file = open_adapter(make_peft("llama", r=2, target_modules=["q_proj"])[0])
    model = small_model("llama")
    short = write_config(model, tmp_path / "short", num_hidden_layers=1)
    with pytest.raises(InputError) as error:
        check_base([file], short)
    assert error.value.problems == (
        "adapter: model.layers.1.self_attn.q_proj: not in the base model but expected. "
        "Check the base.",
    )
    wide = write_config(model, tmp_path / "wide", hidden_size=64, head_dim=8)
    with pytest.raises(InputError) as error:
        check_base([file, file], wide)
    assert len(error.value.problems) == 4
    assert "32 x 32 but the base's 32 x 64 is expected" in error.value.problems[0]


@pytest.mark.timeout(60)
def test_bases_that_cannot_be_used(make_folder, tmp_path):
    file = open_adapter(make_folder())
    own_code = {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}
    for name, config in {"code": own_code, "unknown": {"model_type": "x"}, "none": None}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "evil.py").write_text("raise SystemExit('ran')")
        if config:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=rf"{name}/config\.json: .*Check the (base|folder)"):
            check_base([file], tmp_path / name)


def test_a_change_of_tied_embeddings_is_said_once(make_peft, tmp_path):
    file = open_adapter(make_peft("llama", r=2, target_modules=["embed_tokens", "q_proj"])[0])
    [unknown] = tied_warnings([file, file])
    assert "if the base ties its embeddings" in unknown
    tied = write_config(small_model("llama"), tmp_path / "tied", tie_word_embeddings=True)
    [known] = tied_warnings([file], open_base(tied))
    assert "model.embed_tokens: the base ties its embeddings" in known
    free = write_config(small_model("llama"), tmp_path / "free", tie_word_embeddings=False)
    assert tied_warnings([file], open_base(free)) == []
    plain = open_adapter(make_peft("llama", r=2, target_modules=["q_proj"], folder="plain")[0])
    assert tied_warnings([plain]) == tied_warnings([plain], open_base(tied)) == []
