"""Where nobody looks at a terminal a stage is one line."""

from icm_ray.distributed import progress
from icm_ray.distributed.progress import Lines


def state(x, closed=False, bar="a"):
    return {"uuid": bar, "desc": "merge", "x": x, "total": 3, "closed": closed}


def test_a_stage_is_one_line_at_its_end(capsys):
    lines = Lines()
    for one in (state(0), state(1), state(1, bar="b"), state(3), state(3, closed=True)):
        lines.process_state_update(one)
    assert capsys.readouterr().err == "merge: 3 of 3, 0 s\n"


def test_a_long_one_is_told_of_now_and_then(capsys, monkeypatch):
    lines, clock = Lines(), iter((0.0, 59.0, 61.0, 62.0, 130.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    for x in (0, 1, 2, 2):
        lines.process_state_update(state(x))
    lines.process_state_update(state(3, closed=True))
    told = ["merge: 2 of 3, 61 s", "merge: 3 of 3, 130 s"]
    assert capsys.readouterr().err.splitlines() == told


def test_of_workers_only_bars_are_shown(monkeypatch):
    from ray._private import ray_logging

    streams, shown = ray_logging.WorkerStandardStreamDispatcher(), []
    monkeypatch.setattr(ray_logging, "global_worker_stdstream_dispatcher", streams)
    streams.add_handler("ray_print_logs", lambda data: shown.extend(data["lines"]))
    progress._leave_words_in_logs()
    bar, noise = f'{progress.RAY_TQDM_MAGIC}{{"x": 1}}', "core_worker.cc:2465: Actor with class"
    streams.emit({"pid": 7, "is_err": True, "lines": [noise, bar]})
    streams.emit({"pid": 7, "is_err": False, "lines": ["step 25/104"]})
    streams.emit({"pid": "autoscaler", "is_err": False, "lines": ["no node fits"]})
    assert shown == [bar, "no node fits"]
