"""One static page of a search: what won, the history, what mattered, the front, every trial."""

from pathlib import Path

from icm_ray.report.html import environment, style
from icm_ray.report.search_data import SearchData, write_trials
from icm_ray.report.text import is_number, markdown, number


def write_search(data: SearchData, folder: Path) -> None:
    """Write index.html, table.md, search.json, trials.parquet and pictures into `folder`."""
    (folder / "index.html").write_text(search_page(data), encoding="utf-8")
    (folder / "table.md").write_text(trials_table(data), encoding="utf-8")
    write_trials(data, folder)
    for name, (_, _, svg) in _pictures(data).items():
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    if len(data.objectives) > 1:
        from icm_ray.report.search_pictures import write_front

        write_front(data, folder / "front.png")


def search_page(data: SearchData) -> str:
    """Return the page as HTML."""
    from markupsafe import Markup

    templates = environment()
    templates.filters.update(short=short)
    pictures = [(head, text, Markup(svg)) for head, text, svg in _pictures(data).values()]
    return templates.get_template("search.html").render(
        data=data,
        style=Markup(style()),
        best=data.trial(data.best),
        names=sorted({name for trial in data.trials for name in trial.point}),
        pictures=pictures,
        failed=[trial for trial in data.trials if trial.state == "failed"],
        nodes=sorted({trial.node for trial in data.trials if trial.node}),
    )


def trials_table(data: SearchData) -> str:
    """Return Markdown: the trials of the front, or the ten best, best first."""
    names = [objective.name for objective in data.objectives]
    done = [trial for trial in data.trials if trial.state == "complete"]
    sign = -1 if data.objectives[0].better == "higher is better" else 1
    ranked = sorted(done, key=lambda trial: sign * trial.metrics[names[0]])
    shown = [t for t in ranked if t.number in data.front] if data.front else ranked[:10]
    lines = [["trial", "method", "values", *names], ["---:", "---", "---", *["---:"] * len(names)]]
    for trial in shown:
        values = ", ".join(f"{n}={short(v)}" for n, v in trial.point.items() if n != "method")
        numbers = [number(trial.metrics[n], 4) for n in names]
        lines.append([str(trial.number), trial.method, markdown(values), *numbers])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def short(value: object) -> str:
    """Return 0.123456 as "0.1235" and anything else as it is."""
    if isinstance(value, float):
        return f"{value:.4g}" if is_number(value) else number(value)
    return str(value)


def _pictures(data: SearchData) -> dict[str, tuple[str, str, str]]:
    """Return heading, caption and SVG by name."""
    from icm_ray.report import search_pictures

    pictures = {
        "history": (
            "History",
            "A dot is one trial. Trials that were stopped early are shown with what was measured "
            "until then, on fewer examples.",
            search_pictures.history_picture(data),
        )
    }
    if data.importance:
        pictures["importance"] = (
            "What mattered",
            "fANOVA over the complete trials: the share of the first objective's variance that "
            "each name explains by itself and with others.",
            search_pictures.importance_picture(data.importance),
        )
    if len(data.objectives) > 1:
        pictures["front"] = (
            "Front",
            "No other trial beats those on the front in every objective. Their recipes are in "
            "front/<trial>.yaml.",
            search_pictures.front_picture(data),
        )
    return pictures
