"""Which adapters may be merged with each other, and what is told about them."""

import pytest
import torch
from adapter_samples import PREFIX

from icm_ray.adapters import check_together, name_problems, open_adapter, open_all
from icm_ray.errors import InputError
from icm_ray.types import LoRAFactors


def test_adapters_of_one_base_pass_in_silence(adapter_of, make_folder):
    assert (
        check_together([adapter_of([2, 3], name="a"), adapter_of([1, 4], name="b", seed=1)]) == []
    )
    tensors = {f"{PREFIX}layers.0.q.lora_A.weight": torch.ones(2, 5)}
    files = [open_adapter(make_folder()), open_adapter(make_folder({}, tensors, folder="b"))]
    assert check_together(files) == []


def test_all_problems_are_told_at_once(adapter_of):
    wide = adapter_of({"layers.0.q": 2}, name="b")
    wide = type(wide)("b", "other base", wide.modules, {}, "f", layouts={"layers.0.q": "embedding"})
    with pytest.raises(InputError) as error:
        check_together([adapter_of([2], name="a"), wide, adapter_of([2], name="../A")])
    text = str(error.value)
    assert "'../A': no usable task name" in text
    assert "'base' (a), 'other base' (b) but one base" in text
    assert "b: layers.0.q: 6 x 5 embedding but 6 x 5 as in a is expected" in text
    assert len(error.value.problems) == 3
    with pytest.raises(InputError, match="none but at least one"):
        check_together([])


BAD_NAMES = ["", "/abs", "../../escape", "..", ".", "a/b", "a\\b", "a\0b", "a\nb", "\x1b[31m"]
BAD_NAMES += [
    "-rf",
    "$(reboot)",
    "`x`",
    "a;b",
    "x" * 300,
    " a",
    "a ",
    "a.",
    "~",
    "\u202eb",
    "\ud800",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_no_folder_names(name):
    assert len(name_problems([name])) == 1


def test_names_from_all_over_the_world_are_fine():
    names = [
        "qa",
        "задача 1",
        "质量",
        "हिन्दी",
        "re\u0301sume\u0301",
        "lora (2)",
        "a.b-c_d=1+x@y,[z]",
    ]
    assert name_problems(names) == []


def test_names_that_would_share_a_folder():
    for one, other in (("a", "a"), ("Task", "task"), ("\u00e9", "e\u0301"), ("straße", "STRASSE")):
        assert len(name_problems([one, other])) == 1


def test_what_looks_unintended_is_told(adapter_of):
    def told(*adapters):
        return "\n".join(check_together(adapters))

    a = adapter_of([2, 2], name="a")
    assert "the only adapter" in told(a)
    assert "the same change as a, twice" in told(a, adapter_of([2, 2], name="b"))
    assert "no base model named" in told(a, adapter_of([2], name="b", base_model=None))
    assert "lacks 1 of 2 modules, such as layers.1.q" in told(a, adapter_of([2], name="b", seed=1))
    kinds = [adapter_of([2], name=k, seed=i, config={"task_type": k}) for i, k in enumerate("AB")]
    assert "task_type: A (A), B (B) differ, so the merge has none" in told(*kinds)
    config = {"revision": "v1"}, {"revision": "v2"}
    one, two = (adapter_of([2], name=f"n{i}", seed=i, config=c) for i, c in enumerate(config))
    assert "revision: the base's differ: v1, v2" in told(one, two)
    loud = {m: type(f)(f.a, f.b * 1e6) for m, f in a.modules.items()}
    assert "times that of a" in told(a, type(a)("loud", "base", loud, {}, "f"))


def test_no_value_is_read_of_adapters_of_different_shapes(make_folder, monkeypatch):
    wide = {f"{PREFIX}layers.0.q.lora_A.weight": torch.full((2, 7), float("nan"))}
    refs = [("a", make_folder(folder="a")), ("b", make_folder({}, wide, "b"))]
    files = open_all(refs)
    assert not any({"_look", "_hashed"} & vars(file).keys() for file in files)
    with pytest.raises(InputError, match=r"b: layers\.0\.q: 6 x 7 but 6 x 5 as in a"):
        check_together(files)


def test_open_all_tells_the_problems_of_every_adapter(make_folder, tmp_path):
    good = make_folder()
    bad = make_folder({"use_dora": True}, folder="bad")
    nan = {f"{PREFIX}layers.0.q.lora_A.weight": torch.full((2, 5), float("nan"))}
    refs = [("good", good), ("bad", bad), ("nan", make_folder({}, nan, "nan")), ("no", tmp_path)]
    with pytest.raises(InputError) as error:
        open_all(refs)
    assert len(error.value.problems) == 4
    assert [file.name for file in open_all(refs[:1])] == ["good"]


SPELLINGS = {
    "letter case": ("meta-llama/Llama-3", "Meta-Llama/llama-3"),
    "snapshot": ("org/m", "/cache/hub/models--org--m/snapshots/0123456789abcdef/"),
    "address": ("org/m", "https://huggingface.co/org/m"),
    "its owner's 4-bit copy": ("unsloth/llama-3-8b", "unsloth/llama-3-8b-bnb-4bit"),
    "a path written twice": ("/data//m/../m", "/data/m"),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_spellings_of_one_base_are_taken_for_one(adapter_of, case):
    pair = [
        adapter_of([2], name=n, base_model=b) for n, b in zip("ab", SPELLINGS[case], strict=True)
    ]
    told = check_together(pair, values=False)
    assert len(told) == 1
    assert told[0].endswith("taken for one base.")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("meta-llama/Meta-Llama-3-8B", "unsloth/llama-3-8b-bnb-4bit"),
        ("org/m", "other/m"),
        ("/data/M", "/data/m"),
        ("org/m-1b", "org/m-3b"),
    ],
)
def test_names_that_may_be_two_bases_need_the_users_word(adapter_of, one, other):
    pair = [adapter_of([2], name="a", base_model=one), adapter_of([2], name="b", base_model=other)]
    with pytest.raises(InputError, match=r"base: of the recipe, or set same_base: true"):
        check_together(pair)


@pytest.mark.parametrize("word", [{"same_base": True}, {"base": "/models/here"}])
def test_the_users_word_makes_bases_one(make_folder, word):
    names = ("unsloth/m-bnb-4bit", "org/m", "/data/m")
    folders = [
        (f"n{i}", make_folder({"base_model_name_or_path": name}, folder=f"n{i}"))
        for i, name in enumerate(names)
    ]
    files = open_all(folders, **word)
    assert [file.base_model for file in files] == ["org/m"] * 3, "what others can look up"
    assert sum("as the recipe says" in line for file in files for line in file.notes) == 2


def test_other_sizes_of_a_model_are_one_problem(adapter_of):
    small, large = (
        an_adapter_of_size(adapter_of, name, size) for name, size in (("small", 6), ("large", 8))
    )
    with pytest.raises(InputError, match=r"large: m0: 8 x 8 but 6 x 6 as in small.*And 31 more"):
        check_together([small, large])


def an_adapter_of_size(adapter_of, name, size):
    one = adapter_of({f"m{i}": 2 for i in range(32)}, name=name)
    factors = LoRAFactors(torch.ones(2, size), torch.ones(size, 2))
    return type(one)(name, "base", dict.fromkeys(one.modules, factors), {}, name)


def test_nan_in_an_adapter_of_a_relative_path_names_the_file_once(make_folder, monkeypatch):
    nan = {f"{PREFIX}layers.0.q.lora_A.weight": torch.full((2, 5), float("nan"))}
    folder = make_folder(tensors=nan)
    monkeypatch.chdir(folder.parent)
    with pytest.raises(InputError) as error:
        open_all([("a", folder.name)])
    assert error.value.problems[0].startswith(f"{folder}/adapter_model.safetensors: {PREFIX}layers")
