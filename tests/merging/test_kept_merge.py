"""A merge in this process that is killed: the next run goes on, and ends in the same bytes."""

import pytest
from command_samples import recipe_of, save_lora
from ray_samples import hashes

from icm_ray.merging import kept as keeping
from icm_ray.merging.merge import merge_modules
from icm_ray.merging.passes import measure_modules


class Killed(BaseException):
    pass


@pytest.fixture
def recipe(tmp_path):
    folders = {f"task{seed}": save_lora(tmp_path / f"task{seed}", seed) for seed in range(3)}
    return lambda name, method: recipe_of(
        tmp_path / f"{name}.yaml", folders, method=method, output={"path": str(tmp_path / name)}
    )


@pytest.fixture
def counted(monkeypatch):
    """Keep after every module, and note what is worked on; None counts, a number kills there."""
    done, limit = [], [None]

    def counting(function, module_at):
        def work(*arguments):
            if limit[0] is not None and len(done) == limit[0]:
                raise Killed
            done.extend(arguments[module_at])
            return function(*arguments)

        return work

    monkeypatch.setattr(keeping.Kept, "is_due", lambda kept: kept.folder.mkdir(exist_ok=True) or 1)
    monkeypatch.setattr(keeping, "measure_modules", counting(measure_modules, 2))
    monkeypatch.setattr(keeping, "merge_modules", counting(merge_modules, 1))
    return done, limit


@pytest.mark.parametrize("method", ["ties", "svd", "emr", "fr_merging"])
def test_a_killed_merge_goes_on_to_the_same_bytes(cli, recipe, counted, tmp_path, method):
    done, limit = counted
    assert cli("merge", "-c", recipe("whole", method))[0] == 0
    pieces = len(done)
    done.clear()
    for killed_at in range(0, pieces, 3):
        limit[0] = killed_at
        with pytest.raises(Killed):
            cli("merge", "-c", recipe("killed", method))
    assert list(tmp_path.glob(".killed.merging-*/*"))
    limit[0] = None
    assert cli("merge", "-c", recipe("killed", method))[0] == 0
    assert len(done) == pieces, "nothing that was kept is made again"
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
    assert not list(tmp_path.glob(".killed.*"))


def test_what_was_kept_of_another_merge_is_not_taken(cli, recipe, counted, tmp_path):
    done, limit = counted
    limit[0] = 2
    with pytest.raises(Killed):
        cli("merge", "-c", recipe("killed", "svd"))
    limit[0] = None
    done.clear()
    assert cli("merge", "-c", recipe("killed", "soup"))[0] == 0
    assert len(done) == len(set(done)) == 4
