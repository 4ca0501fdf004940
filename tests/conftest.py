"""What every test shares: checked types, one kernel thread, small things to merge and to run."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from base_samples import save_bert, save_llama, save_llava
from fake_gpu import REAL, STAND_IN  # before any backward pass: torch counts its devices there
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Before anything imports the package. An int is a fine float, as PEP 484 says and beartype alone
# does not.
# Not `distributed` and `workflows`: Ray sends functions of theirs by value, and a checked function
# cannot be pickled.
PACKAGE = Path(__file__).resolve().parents[1] / "icm_ray"
BY_VALUE = ("distributed", "workflows")
install_import_hook(
    [f"icm_ray.{p.stem}" for p in PACKAGE.glob("[a-z]*") if p.stem not in BY_VALUE],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)
# However pytest is started: nothing of the caller's cluster, storage, hub or terminal gets in.
FOREIGN = ("RAY_", "ICM_RAY_", "HF_", "TRANSFORMERS_", "WANDB_", "MLFLOW_", "TOKENIZERS_")
TERMINAL = ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "PYTHONWARNINGS")
KEPT = ("ICM_RAY_CACHE",)  # fetched bases, which are checked by their hashes
for name in list(os.environ):
    if name in TERMINAL or (name.startswith(FOREIGN) and name not in KEPT):
        del os.environ[name]
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import torch  # noqa: E402

from icm_ray.adapters import fingerprint_of  # noqa: E402
from icm_ray.types import Adapter, LoRAFactors  # noqa: E402

torch.set_num_threads(1)

# The same examples everywhere, however slow the machine.
settings.register_profile(
    "icm_ray", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("icm_ray")

WORDS = (
    *("the", "of", "and", "sun", "moon", "river", "stone", "bright"),
    *("dark", "cold", "warm", "old", "new", "small", "large"),
)
SHAPES = {"layer.0.q": (6, 5), "layer.0.v": (3, 5), "layer.1.q": (6, 5)}


def pytest_configure(config: pytest.Config) -> None:
    # Said by beartype of PEP 585 annotations that are right on every Python we support, and by
    # transformers of its own models.
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:beartype")
    config.addinivalue_line("filterwarnings", "ignore:.*is_gradient_checkpointing.*")
    # Said of experts that were trained here, on a base in a temporary folder.
    config.addinivalue_line("filterwarnings", "ignore:.*is a path or address of another machine")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file in one process, and all that share a Ray in one, which is first."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if "/distributed/" in file or "/workflows/" in file else file

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def usual_signals() -> Iterator[None]:
    """A script's background job ignores Ctrl-C, and so would its tests and their children."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler or signal.SIG_DFL)


MakeAdapter = Callable[..., Adapter]


def random_adapter(
    name: str = "a",
    *,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    rank: int | Mapping[str, int] = 2,
    seed: int | None = None,
    scaling: float = 1.0,
    spread: float = 1.0,
    **fields: object,
) -> Adapter:
    """Return a random adapter of modules `{path: (d_out, d_in)}`; the seed is the name's own."""
    draw = torch.Generator().manual_seed(sum(map(ord, name)) if seed is None else seed)
    modules = {}
    for path, (d_out, d_in) in sorted(shapes.items()):
        r = rank if isinstance(rank, int) else rank[path]
        a = torch.randn(r, d_in, generator=draw) * spread
        b = torch.randn(d_out, r, generator=draw) * spread * scaling
        modules[path] = LoRAFactors(a, b, scaling)
    return as_adapter(name, modules, **fields)


def as_adapter(name: str, modules: Mapping[str, LoRAFactors], **fields: object) -> Adapter:
    """Return an adapter around factors, with a true fingerprint."""
    fields = {"base_model": "base", "config": {"target_modules": ["q", "v"]}, **fields}
    return Adapter(name=name, modules=modules, fingerprint=fingerprint_of(modules), **fields)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def make_adapter() -> MakeAdapter:
    return random_adapter


@pytest.fixture(scope="session")
def adapter_around() -> Callable[..., Adapter]:
    return as_adapter


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer BERT of width 16 and a tokenizer of 20 words."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    save_bert(folder, vocab_size=20, max_position_embeddings=32, pad_token_id=0)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama with the tiny BERT's words, which ends its answers."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    from transformers import AutoTokenizer

    save_llama(folder, vocab_size=20)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llava(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random LLaVA: a two-layer DINOv2 and the tiny Llama's words."""
    folder = tmp_path_factory.mktemp("tiny-llava")
    from transformers import AutoTokenizer

    save_llava(folder, AutoTokenizer.from_pretrained(tiny_llama))
    return folder


def save_tokenizer(folder: Path, *, pad: str | None = "[PAD]") -> None:
    """Write a tokenizer that knows WORDS, one id a word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    plain = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    plain.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, **special, **({"pad_token": pad} if pad else {})
    )
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    """Twenty-four short texts of different lengths."""
    return tuple(" ".join(WORDS[(i + j) % len(WORDS)] for j in range(2 + i % 5)) for i in range(24))


@pytest.fixture
def cli() -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs `icm-ray` and returns exit code, stdout and stderr."""
    from typer.testing import CliRunner

    from icm_ray.cli import app

    def invoke(*words: object) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, [str(word) for word in words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.stdout, done.stderr

    return invoke


@pytest.fixture(scope="session", params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def accelerator(request):
    """A GPU: one made of processor memory, and with `-m gpu` a real one."""
    if request.param == "stand-in":
        return STAND_IN
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return REAL
