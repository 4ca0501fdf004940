"""How adapters lie to each other, from their files and one module at a time."""

from collections.abc import Sequence

from icm_ray.adapters.peft_format import AdapterFile
from icm_ray.linalg import lowrank


def delta_cosines(files: Sequence[AdapterFile]) -> dict[str, dict[str, float]]:
    """Return the cosine of the angle between each two adapters' whole deltas, by name.

    A module that one of them lacks is a zero there. Cost: reads every file once; holds one module
    of all of them.
    """
    products = {a.name: {b.name: 0.0 for b in files} for a in files}
    for module in sorted({m for f in files for m in f.shapes}):
        held = {f.name: f.factors(module) for f in files if module in f.shapes}
        for a, f in held.items():
            for b, g in held.items():
                products[a][b] += lowrank.inner(f.b, f.a, g.b, g.a)
    return {
        a: {b: products[a][b] / max((products[a][a] * products[b][b]) ** 0.5, 1e-30) for b in row}
        for a, row in products.items()
    }
