"""The page of a trained Fusion-VAE: losses, KL of each latent dimension, what each task loses."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icm_ray.files import whole_folder
from icm_ray.report.html import environment, style

LABELS = {
    "loss": "loss",
    "reconstruction": "reconstruction",
    "kl": "KL (nats)",
    "inner": "inner loss before its steps",
    "query": "loss on other inputs",
}


def write_fusion_page(report: Mapping[str, Any], folder: Path) -> None:
    """Write index.html, history.parquet and the pictures to a new folder, all or nothing.

    Args:
        report: Of a FusionModel; see `fusion.diagnosis.diagnosis`.
        folder: The output.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = _pictures(report)
    with whole_folder(folder) as target:
        (target / "index.html").write_text(_page(report, pictures), encoding="utf-8")
        pq.write_table(pa.table(dict(report["history"])), target / "history.parquet")
        for name, (_, _, svg) in pictures.items():
            (target / f"{name}.svg").write_text(svg, encoding="utf-8")


def _page(report: Mapping[str, Any], pictures: Mapping[str, tuple[str, str, str]]) -> str:
    from markupsafe import Markup

    return (
        environment()
        .get_template("fusion.html")
        .render(
            report=report,
            errors=report["reconstruction_error"],
            style=Markup(style()),
            pictures=[(head, text, Markup(svg)) for head, text, svg in pictures.values()],
        )
    )


def _pictures(report: Mapping[str, Any]) -> dict[str, tuple[str, str, str]]:
    """Return heading, caption and SVG by name."""
    return {
        "losses": (
            "Losses",
            "Every step of both stages; the vertical jump, if there is one, is where the meta "
            "stage begins.",
            _losses(report["history"]),
        ),
        "kl": (
            "KL of each latent dimension",
            "Mean over all checkpoints, largest first. Dimensions near zero say nothing of the "
            "adapter.",
            _bars(
                "kl",
                {str(i): value for i, value in enumerate(sorted(report["kl"], reverse=True))},
                "latent dimension, by size",
                "nats",
            ),
        ),
        "reconstruction": (
            "What a task loses",
            "Relative error of each finished adapter's delta after encoding and decoding.",
            _bars("reconstruction", report["reconstruction_error"], "", "relative error"),
        ),
    }


def _losses(history: Mapping[str, list[float]]) -> str:
    from matplotlib.figure import Figure

    from icm_ray.report.pictures import logarithmic, svg

    shown = {name: values for name, values in history.items() if any(values)}

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, (name, values) in zip(panels, shown.items(), strict=True):
            axes.plot(range(1, len(values) + 1), values, color="#2089CC", linewidth=0.9)
            axes.set_title(LABELS.get(name, name), fontsize=9)
            axes.set_xlabel("step")
            if min(values) > 0:
                logarithmic(axes, "y")

    return svg("losses", 2.8, draw)


def _bars(name: str, values: Mapping[str, float], across: str, up: str) -> str:
    from matplotlib.figure import Figure

    from icm_ray.report.pictures import svg
    from icm_ray.report.text import clip

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.bar(range(len(values)), list(values.values()), color="#2089CC", width=0.8)
        if not across:
            axes.set_xticks(range(len(values)), [clip(task) for task in values])
        axes.set_xlabel(across)
        axes.set_ylabel(up)

    return svg(name, 2.8, draw)
