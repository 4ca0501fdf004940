"""Keys of newer releases and other tools: refused if they may change the forward, else ignored."""

from importlib.metadata import version

import pytest

from icm_ray.adapters import open_adapter
from icm_ray.adapters.config_keys import NOT_PLAIN
from icm_ray.errors import InputError

IGNORED = {
    "alpha": 8,
    "vllm_lora_scaling_factor": 1.0,
    "lorap_emb_lr": 1e-6,
    "loraplus_lr_ratio": 16.0,
    "qalora_group_size": 16,
    "unsloth_version": "2025.1",
    "quantization_config": {"load_in_4bit": True},
    "use_gradient_checkpointing": True,
    "datasets": ["a"],
}


@pytest.mark.parametrize("key", IGNORED)
def test_a_key_that_changes_nothing_is_no_obstacle(make_folder, key):
    plain = open_adapter(make_folder())
    file = open_adapter(make_folder({key: IGNORED[key]}, folder="b"))
    assert file.fingerprint == plain.fingerprint
    told = [line for line in file.warnings if key in line]
    assert len(told) == (key != "qalora_group_size")


def test_ignored_keys_share_a_line(make_folder):
    notes = open_adapter(make_folder({"alpha": 8, "learning_rate": 1e-4})).notes
    assert [line.partition(".json: ")[2] for line in notes] == [
        "alpha, learning_rate: no key that changes what PEFT computes. It is not used."
    ]


def test_every_refusal_says_what_it_is_and_which_way_is_right(make_folder):
    for key, (meaning, way) in NOT_PLAIN.items():
        with pytest.raises(InputError) as error:
            open_adapter(make_folder({key: [[0, 2], [1, 3]]}))
        assert len(error.value.problems) == 1
        assert meaning in str(error.value)
        assert str(error.value).endswith(way)
        assert "eave it out" not in str(error.value)


def test_a_key_of_a_newer_peft_is_refused(make_folder):
    newer = {"peft_version": "999.0", "router_temperature": 0.5}
    with pytest.raises(InputError, match=r"router_temperature: .* a key of a newer PEFT"):
        open_adapter(make_folder(newer))
    same = {**newer, "peft_version": version("peft")}
    assert "router_temperature" in open_adapter(make_folder(same)).notes[0]


@pytest.mark.parametrize("value", [True, {"a": 1}, [1]])
def test_an_unknown_switch_table_or_list_is_refused(make_folder, value):
    with pytest.raises(InputError, match="its meaning is not known here"):
        open_adapter(make_folder({"router": value}))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"lora_alpha": -4}, "lora_alpha: -4, so the change is subtracted"),
        ({"lora_alpha": 0}, "lora_alpha: 0, so the adapter changes nothing"),
        ({"alpha_pattern": {"q": -1}}, "alpha_pattern: q: -1, so the change is subtracted"),
        ({"alpha_pattern": {"v": 0}}, "alpha_pattern: v: 0, so the adapter changes nothing"),
    ],
)
def test_an_alpha_that_is_not_positive_is_told_once(make_folder, config, text):
    file = open_adapter(make_folder(config))
    assert sum(text in line for line in file.warnings) == len(file.warnings) == 1


def test_keys_without_pefts_prefix_are_one_problem(make_folder):
    from adapter_samples import plain_tensors

    old = plain_tensors()
    bare = {key.removeprefix("base_model.model."): tensor for key, tensor in old.items()}
    with pytest.raises(InputError, match=r"names that begin with base_model\.model\.") as error:
        open_adapter(make_folder(tensors={**dict.fromkeys(old, ...), **bare}))
    assert len(error.value.problems) == 1
    assert "adapter's name" not in str(error.value)
