"""One recipe, two processes: the same bytes, whatever order their sets are in."""

import subprocess
import sys
from pathlib import Path

import pytest
from ray_samples import environment, hashes

SCRIPT = """
import sys
from pathlib import Path

import torch
from conftest import RANKS, MODULES, spec_of, trajectory

from icm_ray.adapters import fingerprint_of
from icm_ray.fusion.data import FusionTable
from icm_ray.fusion.meta import MetaTraining
from icm_ray.fusion.store import save_fusion
from icm_ray.fusion.train import finished, train
from icm_ray.fusion_vae.layout import Layout
from icm_ray.report.fusion_page import write_fusion_page
from icm_ray.types import Adapter, LoRAFactors

draw = torch.Generator().manual_seed(0)
adapters = []
for name, rank in RANKS.items():
    shapes = {f"{module}.{i}": shape for module, shape in MODULES.items() for i in range(9)}
    modules = {
        module: LoRAFactors(
            torch.randn(rank, d_in, generator=draw), torch.randn(d_out, rank, generator=draw)
        )
        for module, (d_out, d_in) in sorted(shapes.items())
    }
    adapters.append(Adapter(name, "base", modules, {}, fingerprint_of(modules)))
samples = [sample for adapter in adapters for sample in trajectory(adapter)]
vectors = {adapter.name: torch.randn(16, generator=draw) for adapter in adapters}
spec = spec_of(vae_steps=5)
layout = Layout.fit(spec.representation, samples)
meta = MetaTraining.build(spec, layout, FusionTable.of(layout, samples, vectors), None, 0)
model = finished(meta, train(meta), adapters)
save_fusion(model, Path(sys.argv[1]) / "model", {"key": "k"})
write_fusion_page(model.report, Path(sys.argv[1]) / "page")
"""


@pytest.mark.slow
def test_a_fusion_vae_and_its_report_are_the_same_twice(tmp_path):
    here = Path(__file__).resolve().parent
    found = []
    for seed in ("1", "2", "3"):
        root = tmp_path / seed
        root.mkdir()
        env = environment(PYTHONHASHSEED=seed, OMP_NUM_THREADS="1")
        env["PYTHONPATH"] = f"{env['PYTHONPATH']}:{here}:{here.parent}"
        subprocess.run([sys.executable, "-c", SCRIPT, str(root)], env=env, check=True, timeout=300)
        found.append(hashes(root))
    assert {"model/evidence.json", "page/index.html"} <= found[0].keys()
    assert found[0] == found[1] == found[2]
