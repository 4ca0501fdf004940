"""The overlap of tasks' inputs against whole Grams, and what is said of it."""

import pytest
import torch

from icm_ray.evidence import overlap as overlap_module
from icm_ray.evidence.gram_files import join_grams
from icm_ray.evidence.overlap import input_overlap, overlap_lines
from icm_ray.evidence.tensors import GRAMS, as_evidence, read_evidence, write_evidence
from icm_ray.linalg.gram import Gram

TASKS = ("law", "code", "chat")


def gram(seed: int, d_in: int = 6) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(40, d_in, generator=draw) * torch.rand(d_in, generator=draw)
    return x.T @ x / 40


def upper(square: torch.Tensor) -> torch.Tensor:
    return torch.cat([row[i:] for i, row in enumerate(square)])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a * b).sum() / a.norm() / b.norm())


def test_it_is_the_mean_cosine_of_whole_grams_in_any_form() -> None:
    whole = {task: gram(i) for i, task in enumerate(TASKS)}
    root, diagonal = torch.randn(2, 6), torch.rand(6)
    low = Gram.of(6, gram_root=root, gram_diagonal=diagonal).square()
    tensors = {f"m.gram.{task}": upper(one) for task, one in whole.items()}
    tensors |= {"n.gram.law": whole["law"], "n.gram.code": upper(whole["chat"])}
    tensors |= {"n.gram_root.chat": root, "n.gram_diagonal.chat": diagonal}
    found = input_overlap(as_evidence(tensors), TASKS)
    second = {"law": whole["law"], "code": whole["chat"], "chat": low}
    for a in TASKS:
        for b in TASKS:
            both = cosine(whole[a], whole[b]), cosine(second[a], second[b])
            assert found[a][b] == pytest.approx(sum(both) / 2, abs=1e-4)
            assert found[a][b] == found[b][a]


def test_modules_that_read_one_tensor_count_each_and_joined_folders_hold_it(tmp_path) -> None:
    grams = {"law": (gram(0), gram(1)), "code": (gram(2), gram(3))}
    for task, (q, out) in grams.items():
        tensors = {f"q.gram.{task}": upper(q), f"out.gram.{task}": upper(out)}
        shared = {task: {"q": "q", "k": "q", "out": "out"}}
        write_evidence(tmp_path / task, GRAMS, tensors, adapters={task: task}, shared=shared)
    join_grams([tmp_path / "law", tmp_path / "code"], tmp_path / "both", ["law", "code"])
    told = read_evidence(tmp_path / "both").described["overlap"]
    q, out = (cosine(grams["law"][i], grams["code"][i]) for i in (0, 1))
    assert told["law"]["code"] == pytest.approx((2 * q + out) / 3, abs=1e-4)
    join_grams([tmp_path / "law"], tmp_path / "alone", ["law"])
    assert read_evidence(tmp_path / "alone").described["overlap"] == {}


def test_a_task_without_a_module_is_left_out_there() -> None:
    tensors = {f"m.gram.{task}": gram(i) for i, task in enumerate(TASKS)}
    tensors |= {"n.gram.law": gram(7), "n.gram.code": gram(8), "o.gram.code": gram(9)}
    tensors["o.gram.law"] = torch.zeros(6, 6)  # inputs that never reach the module
    found = input_overlap(as_evidence(tensors), TASKS)
    both = cosine(gram(0), gram(1)), cosine(gram(7), gram(8))
    assert found["law"]["code"] == pytest.approx(sum(both) / 2, abs=1e-4)
    assert found["law"]["chat"] == pytest.approx(cosine(gram(0), gram(2)), abs=1e-4)


def test_its_cost_is_bounded(monkeypatch) -> None:
    tensors = {f"m{i}.gram.{t}": gram(i + 9 * j) for i in range(5) for j, t in enumerate("ab")}
    evidence = as_evidence(tensors)
    monkeypatch.setattr(overlap_module, "MOST_INPUTS", 2)
    expected = [cosine(tensors[f"m{i}.gram.a"], tensors[f"m{i}.gram.b"]) for i in (0, 2)]
    assert input_overlap(evidence, "ab")["a"]["b"] == pytest.approx(sum(expected) / 2, abs=1e-4)
    monkeypatch.setattr(overlap_module, "MOST_TASKS", 1)
    assert input_overlap(evidence, "ab") == {}


def table(**pairs: float) -> dict[str, dict[str, float]]:
    names = sorted({name for pair in pairs for name in pair.split("_")})
    found = {a: dict.fromkeys(names, 0.4) | {a: 1.0} for a in names}
    for pair, value in pairs.items():
        a, b = pair.split("_")
        found[a][b] = found[b][a] = value
    return found


def test_who_shares_is_said_in_words() -> None:
    told = table(letter_rotation=0.7, rotation_typeface=0.8, digit_surface=0.3)
    rotation, meaning = overlap_lines(told)
    assert rotation == (
        "inputs: rotation shares its own with typeface (0.80) and letter (0.70); any two: 0.40."
    )
    assert "regmean, esm, output.metric: inputs" in meaning


def test_where_all_are_alike_nobody_shares_more() -> None:
    (line,) = overlap_lines(table(a_b=0.9, a_c=0.95, b_c=0.88))
    assert "no two tasks share theirs more" in line
    assert "median 0.90; at most 0.95, a and c" in line
    assert overlap_lines({}) == []


def test_large_grams_are_looked_at_in_fewer_inputs_but_in_one_at_least(monkeypatch) -> None:
    tensors = {
        f"m{n}.gram.{task}": gram(10 * n + i) for n in range(4) for i, task in enumerate(TASKS)
    }
    monkeypatch.setattr(overlap_module, "MOST_BYTES", 0)
    found = input_overlap(as_evidence(tensors), TASKS)["law"]["code"]
    each = [cosine(tensors[f"m{n}.gram.law"], tensors[f"m{n}.gram.code"]) for n in range(4)]
    assert any(found == pytest.approx(one, abs=1e-4) for one in each)


def test_of_two_tasks_only_their_own_cosine_is_said() -> None:
    (line,) = overlap_lines({"law": {"law": 1, "code": 0.98}, "code": {"law": 0.98, "code": 1}})
    assert "law and code share theirs to 0.98" in line
