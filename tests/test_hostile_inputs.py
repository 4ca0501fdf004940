"""Strangers' files, class by class: each ends a command with its code and one line a problem.

The expectations are the same for all of them: no crash, no bug of ours, no hang, nothing printed
that could rewrite the screen, and the file at fault is named. Mutations have fixed seeds.
"""

import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from command_samples import PREFIX, recipe_of, save_lora
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from icm_ray.cli import app
from icm_ray.errors import MAX_PROBLEM_LENGTH

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Run = Callable[..., tuple[int, list[str]]]

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs `icm-ray`, holds its answer against the rules, and returns it."""
    from transformers.utils import logging

    # As the command's own environment does before transformers is imported.
    monkeypatch.setattr(logging, "_tqdm_active", False)
    monkeypatch.setattr(logging.get_logger("transformers"), "disabled", True)

    def invoke(*words: object) -> tuple[int, list[str]]:
        done = CliRunner().invoke(app, [str(word) for word in words])
        lines = done.stderr.split("\n")
        assert lines.pop() == ""
        for line in lines:
            assert line.startswith(("error: ", "warning: ")), line
            assert len(line) <= MAX_PROBLEM_LENGTH + len("warning: "), line
            assert line.isprintable(), line
            assert "internal" not in line, line
        errors = [line for line in lines if line.startswith("error: ")]
        assert bool(errors) == (done.exit_code != 0)
        assert done.exit_code in (0, 2, 3)
        return done.exit_code, errors

    return invoke


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_lora(tmp_path / "a")


def mutations(content: bytes, count: int) -> Iterator[bytes]:
    """Yield copies with some bytes changed, with a piece cut out, and with a piece put twice."""
    draw = random.Random(0)
    for number in range(count):
        changed = bytearray(content)
        at = draw.randrange(len(content))
        end = min(at + draw.randint(1, 64), len(content))
        if number % 3 == 0:
            for _ in range(draw.randint(1, 8)):
                changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        elif number % 3 == 1:
            del changed[at:end]
        else:
            changed[at:at] = content[at:end]
        yield bytes(changed)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_mutated_files_of_an_adapter(run: Run, adapter: Path, name: str) -> None:
    content = (adapter / name).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little") if name == WEIGHTS else len(content)
    for changed in mutations(content[:header], 45):
        (adapter / name).write_bytes(changed + content[header:])
        _, errors = run("inspect", adapter)
        assert all(str(adapter / name) in e or str(adapter / WEIGHTS) in e for e in errors)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_cut_files_of_an_adapter(run: Run, adapter: Path, name: str) -> None:
    content = (adapter / name).read_bytes()
    for length in [*range(12), *range(12, len(content), max(len(content) // 20, 1))]:
        (adapter / name).write_bytes(content[:length])
        code, errors = run("inspect", adapter)
        assert code == 3
        assert any(str(adapter / name) in line for line in errors)


WRONG = [
    None,
    True,
    -1,
    0,
    1.5,
    10**400,
    "",
    "x",
    "\x1b[31m\u202e",
    [],
    [None],
    [[1]],
    {},
    {"a": 1},
]
KEYS = [
    *("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "bias"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save", "revision"),
    *("base_model_name_or_path", "task_type", "use_rslora", "init_lora_weights", "auto_mapping"),
    *("fan_in_fan_out", "inference_mode", "lora_dropout", "peft_version", "unheard_of"),
]


@pytest.mark.parametrize("key", KEYS)
def test_values_of_a_wrong_type_in_an_adapters_config(run: Run, adapter: Path, key: str) -> None:
    plain = json.loads((adapter / CONFIG).read_text())
    for value in WRONG:
        (adapter / CONFIG).write_text(json.dumps({**plain, key: value}))
        run("inspect", adapter)


PATTERNS = [
    *(".?" * 40 + "zz", ".{0,9}" * 12, "(a+)+$", "([a-z0-9_.]+)+!", "(a|a)*b", "(.*)*x", ".*" * 30),
    *(r"(\w+)\1", "(?=a)b", "(", "[z-a]", "a{5,2}", "x" * 100_000, "(" * 5000, "\0"),
    *("(?i)q", "(?P<n>a)", "a*+", "\ud800", "((((((((((a?){9}){9}){9}){9}){9}){9}){9}){9}){9}){9}"),
]


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_hostile_patterns_of_ranks(run: Run, adapter: Path, key: str) -> None:
    plain = json.loads((adapter / CONFIG).read_text())
    for pattern in PATTERNS:
        (adapter / CONFIG).write_text(json.dumps({**plain, key: {pattern: 4}}))
        code, errors = run("inspect", adapter)
        assert code == 3, pattern[:50]
        assert key in errors[0]


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "layers_pattern"])
def test_hostile_patterns_of_names_are_never_run(run: Run, adapter: Path, key: str) -> None:
    plain = json.loads((adapter / CONFIG).read_text())
    for pattern in PATTERNS:
        (adapter / CONFIG).write_text(json.dumps({**plain, key: pattern}))
        run("inspect", adapter)
        (adapter / CONFIG).write_text(json.dumps({**plain, key: [pattern, "query", "value"]}))
        run("inspect", adapter)


@pytest.mark.filterwarnings("ignore:.*could match for ever")
def test_verify_never_runs_a_pattern_of_a_folder(run: Run, adapter: Path, tmp_path: Path) -> None:
    """A folder with a manifest that fits, as anybody can write one."""
    from icm_ray.files import MANIFEST, sha256_of_file

    assert run("merge", "-c", recipe_of(tmp_path / "r.yaml", {"a": adapter}))[0] == 0
    merged = tmp_path / "merged"
    config = json.loads((merged / CONFIG).read_text())
    config["target_modules"] = "([a-z0-9_.]+)+!"
    (merged / CONFIG).write_text(json.dumps(config))
    manifest = json.loads((merged / MANIFEST).read_text())
    manifest["files"][CONFIG] = sha256_of_file(merged / CONFIG)
    (merged / MANIFEST).write_text(json.dumps(manifest))
    code, errors = run("verify", merged)
    assert code == 3
    assert "target_modules: a regular expression but a list of names" in errors[0]


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc/x", "a b", "a..b", "", ".", "\x1b[31mq", "\u202eq", "q\n", "x" * 501, "\0"],
)
def test_hostile_names_of_tensors(run: Run, adapter: Path, name: str) -> None:
    content = (adapter / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first = next(key for key in header if key.startswith(PREFIX))
    header[f"{PREFIX}{name}.lora_A.weight"] = header.pop(first)
    told = json.dumps(header).encode()
    (adapter / WEIGHTS).write_bytes(len(told).to_bytes(8, "little") + told + content[8 + length :])
    assert run("inspect", adapter)[0] == 3


OUTPUTS = {
    "x\0y": 2,
    "/": 2,
    "..": 2,
    "n" * 300: 2,
    f"{'n' * 300}/x": 2,
    "e\u0301" * 90: 2,
    "/proc/x": 3,
    "/proc/self/fd/x": 3,
    "/sys/x": 3,
    "/dev/null/x": 3,
    "/dev/null": 3,
    "a/adapter_config.json": 3,
    "a": 3,
}


@pytest.mark.parametrize("place", OUTPUTS, ids=lambda place: ascii(place)[:20])
def test_places_that_take_no_output(
    run: Run, adapter: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in adapter.iterdir()}
    recipe = recipe_of(tmp_path / "r.yaml", {"a": adapter}, output={"path": place})
    code, errors = run("merge", "-c", recipe)
    assert (code, len(errors)) == (OUTPUTS[place], 1)
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("where", ["base", "evidence", "cache", "storage"])
@pytest.mark.parametrize(
    "address", ["https://user:s3cret@host/x", "s3://key:s3/c@ret@bucket/x", "nowhere://s3cret@h"]
)
def test_no_password_of_an_address_is_repeated(
    adapter: Path, tmp_path: Path, where: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = {where: address, "base" if where == "cache" else where: address}
    recipe = recipe_of(tmp_path / "r.yaml", {"a": adapter}, output={"path": "out"}, **keys)
    done = CliRunner().invoke(app, ["merge", "-c", str(recipe), "--debug"])
    assert done.exit_code in (2, 3, 4)
    assert "Traceback" in done.stderr
    assert "s3cret" not in done.stdout + done.stderr
    assert "ret@" not in done.stdout + done.stderr


def test_nul_and_wrong_types_anywhere_in_a_recipe(run: Run, adapter: Path, tmp_path: Path) -> None:
    plain = {"adapters": [{"name": "a", "path": str(adapter)}], "method": "soup"}
    plain |= {"output": {"path": str(tmp_path / "out")}}
    path = tmp_path / "r.yaml"
    for key in ("base", "revision", "adapters", "method", "params", "evidence", "output", "cache"):
        for value in (
            "a\0b",
            ["\0"],
            {"path": "\0"},
            1.5,
            {"a": {"b": ["\0"]}},
            [[]],
            "\ud83d\ude00",
        ):
            path.write_text(yaml.safe_dump({**plain, key: value}))
            code, _ = run("merge", "-c", path)
            assert code == 2 or "u0000" not in json.dumps(value), (key, value)


BASE_DAMAGES = {
    "architectures": ["logging"],
    "num_hidden_layers": 1_000_000,
    "num_attention_heads": 0,
    "hidden_size": "wide",
    "model_type": ["llama"],
    "vocab_size": -1,
    "id2label": 3,
    "rope_parameters": "x",
    "text_config": {"model_type": "none"},
}


@pytest.mark.parametrize("key", BASE_DAMAGES)
def test_damaged_configs_of_a_base(
    run: Run, adapter: Path, tiny_bert: Path, tmp_path: Path, key: str
) -> None:
    base = Path(shutil.copytree(tiny_bert, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, key: BASE_DAMAGES[key]}))
    recipe = recipe_of(tmp_path / "r.yaml", {"a": adapter}, base=str(base))
    code, errors = run("merge", "-c", recipe)
    assert (code, len(errors)) == (3, 1)
    assert str(base) in errors[0]


def spoil(tensors: dict, name: str, value: float | None) -> None:
    if value is None:
        del tensors[name]
    else:
        tensors[name][0, 0] = value


@pytest.mark.parametrize(
    ("name", "value", "code", "text"),
    [
        (
            "pooler.dense.weight",
            None,
            0,
            "lacks 1 weights of BertModel, such as pooler.dense.weight",
        ),
        ("pooler.dense.weight", float("nan"), 3, "pooler.dense.weight: NaN or infinity"),
        ("encoder.layer.0.output.dense.weight", float("inf"), 3, "NaN or infinity"),
    ],
)
def test_odd_weights_of_a_base_are_said(
    adapter: Path,
    tiny_bert: Path,
    tmp_path: Path,
    name: str,
    value: float | None,
    code: int,
    text: str,
) -> None:
    """A merge needs no weight of its base, but the proof on it does."""
    base = Path(shutil.copytree(tiny_bert, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    spoil(tensors, name, value)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    recipe = recipe_of(tmp_path / "r.yaml", {"a": adapter}, base=str(base))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        done = CliRunner().invoke(app, ["merge", "-c", str(recipe)])
    assert done.exit_code == code, done.stderr
    lines = done.stderr.splitlines() + [str(one.message) for one in told]
    assert any(
        line.removeprefix("error: ").startswith(str(base)) and text in line for line in lines
    )


def test_mutated_configs_of_a_base(
    run: Run, adapter: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_bert, tmp_path / "base"))
    recipe = recipe_of(tmp_path / "r.yaml", {"a": adapter}, base=str(base))
    content = (base / "config.json").read_bytes()
    for changed in mutations(content, 15):
        (base / "config.json").write_bytes(changed)
        shutil.rmtree(tmp_path / "merged", ignore_errors=True)
        run("merge", "-c", recipe)
