"""The searcher's memory: files that are exactly what was written, and a study that resumes."""

import json
import pickle

import pytest

from icm_ray.config import SearchRow
from icm_ray.errors import InputError, RecipeError
from icm_ray.search.ledger import Ledger
from icm_ray.search.spaces import space_of
from icm_ray.search.study import Study
from icm_ray.swap import sibling

SPACE = space_of(
    SearchRow(
        method="ties",
        search={"params.scale": "loguniform(0.1, 2)", "params.density": "uniform(0.1, 1)"},
    ),
    ("a", "b"),
    1,
)
ONE, TWO = ("validation_mean",), ("validation_mean", "output_rank")


def study_at(folder, objectives=ONE, **changes):
    options = {"sampler": "tpe", "startup": 3, "seed": 1, **changes}
    return Study(Ledger(folder, "key"), SPACE, objectives, **options)


def measure(point):
    distance = (point["params.scale"] - 0.7) ** 2 + (point["params.density"] - 0.4) ** 2
    return {
        "validation_mean": 1 - distance,
        "output_rank": float(round(10 * point["params.density"])),
    }


def advance(study, trials):
    for _ in range(trials):
        trial = study.ask()
        study.tell(trial.number, state="complete", metrics=measure(trial.point))


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_a_study_opened_again_asks_for_the_same_points(tmp_path, sampler):
    whole = study_at(tmp_path / "whole", sampler=sampler)
    advance(whole, 7)
    for _ in range(7):
        advance(study_at(tmp_path / "parts", sampler=sampler), 1)
    parts = study_at(tmp_path / "parts", sampler=sampler)
    assert [t.point for t in parts.finished()] == [t.point for t in whole.finished()]
    other = study_at(tmp_path / "other", sampler=sampler, seed=2)
    advance(other, 2)
    assert [t.point for t in other.finished()] != [t.point for t in whole.finished()][:2]


def test_the_sampler_looks_at_results(tmp_path):
    tpe, chance = (study_at(tmp_path / s, sampler=s) for s in ("gp", "random"))
    for study in (tpe, chance):
        advance(study, 12)
    assert tpe.best().metrics["validation_mean"] > chance.best().metrics["validation_mean"]


def test_an_interrupted_trial_is_asked_for_first(tmp_path):
    study = study_at(tmp_path)
    first, second = study.ask(), study.ask()
    study.tell(second.number, state="complete", metrics=measure(second.point))
    again = study_at(tmp_path)
    assert again.ask().point == first.point
    assert again.ask().number == 2


def test_failed_trials_are_kept_and_never_best(tmp_path):
    study = study_at(tmp_path)
    advance(study, 1)
    for metrics, error in (({"validation_mean": float("nan")}, "no finite number"), ({}, "finite")):
        told = study.tell(study.ask().number, state="complete", metrics=metrics)
        assert told.state == "failed"
        assert error in told.error
    told = study.tell(study.ask().number, state="failed", error="rank: too small")
    assert told.error == "rank: too small"
    again = study_at(tmp_path)
    assert [t.state for t in again.finished()] == ["complete", "failed", "failed", "failed"]
    assert again.best().number == 0
    advance(again, 2)


def test_start_points_come_first(tmp_path):
    starts = [
        ("recipe", {"params.scale": 0.5, "params.density": 0.25}),
        ("part", {"params.scale": 1.0}),
    ]
    study = study_at(tmp_path, starts=starts)
    assert study.ask().point == starts[0][1]
    second = study.ask()
    assert (second.origin, second.point["params.scale"]) == ("part", 1.0)
    assert set(second.point) == set(SPACE.dimensions)


def test_stopped_trials_are_no_candidates_but_are_remembered(tmp_path):
    study = study_at(tmp_path)
    trial = study.ask()
    study.report(trial.number, 32, {"validation_mean": 9.0})
    study.tell(trial.number, state="stopped")
    advance(study, 3)
    again = study_at(tmp_path)
    assert again.best().number > 0
    assert again.ledger.trials[0].rungs == {"32": 9.0}
    assert (
        str(again.study.trials[0].state) == "TrialState.PRUNED" or again.study.trials[0].state == 2
    )


def test_the_front_holds_what_none_beats(tmp_path):
    study = study_at(tmp_path, TWO)
    advance(study, 8)
    front = study.front()
    for one in front:
        for other in study.complete():
            worse = other.metrics["validation_mean"] < one.metrics["validation_mean"]
            larger = other.metrics["output_rank"] > one.metrics["output_rank"]
            same = other.metrics == one.metrics
            assert worse or larger or same
    numbers = {t.number for t in study.study.best_trials}
    assert numbers == {trial.number for trial in front}


def test_importance_is_a_share(tmp_path):
    study = study_at(tmp_path)
    assert study.importance() == {}
    advance(study, 8)
    found = study.importance()
    assert set(found) == set(SPACE.dimensions)
    assert sum(found.values()) == pytest.approx(1)


def test_another_search_s_memory_is_refused(tmp_path):
    advance(study_at(tmp_path), 1)
    with pytest.raises(RecipeError, match="another search"):
        Ledger(tmp_path, "other")


def test_a_folder_of_strangers_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        Ledger(tmp_path, "key")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"number": 0}',
        pickle.dumps(Bomb()),
        "changed",
        "renamed",
    ],
)
def test_a_damaged_or_foreign_trial_is_refused(tmp_path, content):
    advance(study_at(tmp_path), 2)
    path = tmp_path / "trials" / "00000.json"
    if content == "changed":
        plain = json.loads(path.read_text())
        plain["metrics"]["validation_mean"] = 1000.0
        path.write_text(json.dumps(plain))
    elif content == "renamed":
        path.rename(path.with_name("00009.json"))
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"0000\d\.json"):
        study_at(tmp_path)


def test_a_damaged_header_is_refused(tmp_path):
    advance(study_at(tmp_path), 1)
    (tmp_path / "search.json").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match=r"search\.json"):
        Ledger(tmp_path, "key")


def test_half_a_write_is_no_trial(tmp_path):
    advance(study_at(tmp_path), 1)
    half = sibling(tmp_path / "trials" / "00001.json")
    half.write_text("{")
    assert len(study_at(tmp_path).finished()) == 1
    assert not half.exists()


@pytest.mark.parametrize("number", [0, 2])
def test_a_search_of_another_version_is_refused_by_its_number(tmp_path, number):
    advance(study_at(tmp_path), 1)
    header = json.loads((tmp_path / "search.json").read_text())
    (tmp_path / "search.json").write_text(json.dumps({**header, "format": number}))
    with pytest.raises(InputError, match=rf"search of format {number} but 1 is expected"):
        study_at(tmp_path)
    assert list((tmp_path / "trials").iterdir())
