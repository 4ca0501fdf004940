"""DINOv2 weights out of an ONNX graph: initialisers become a transformers model folder.

Only tensors and the names of the graph's nodes are read; the graph is never run.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icm_ray.errors import InputError
from icm_ray.files import write_json

if TYPE_CHECKING:
    import numpy as np

Arrays = Mapping[str, "np.ndarray"]

BACKBONE = "backbone."
POSITIONS = "embeddings.position_embeddings"
MASK = "embeddings.mask_token"
RENAMED = {
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
}
"""Names of attention maps before and after transformers 5."""

PREPROCESSING = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,  # bicubic
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""DINOv2 is trained on pixels standardised as ImageNet's."""


def convert_dinov2(source: Path, target: Path) -> None:
    """Write the DINOv2 encoder of the one ONNX file in `source` as a model folder.

    The width, depth and patch size are read off the tensors; DINOv2 has heads of width 64. The
    mask token, which an exported graph lacks and inference never reads, becomes zero.

    Args:
        source: Folder with one `*.onnx` whose initialisers are named `backbone.<name>`.
        target: Folder to fill with `config.json`, `model.safetensors` and
            `preprocessor_config.json`.

    Raises:
        InputError: onnx is not installed, or the graph is not a DINOv2 encoder.
    """
    import torch
    from transformers import Dinov2Config, Dinov2Model

    arrays = _encoder(*_read(source))
    projection = arrays["embeddings.patch_embeddings.projection.weight"]
    width, patch = projection.shape[0], projection.shape[-1]
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=1 + max(int(n.split(".")[2]) for n in arrays if ".layer." in n),
        num_attention_heads=max(1, width // 64),
        mlp_ratio=arrays["encoder.layer.0.mlp.fc1.bias"].shape[0] // width,
        image_size=patch * round((arrays[POSITIONS].shape[1] - 1) ** 0.5),
        patch_size=patch,
    )
    with torch.device("meta"):
        model = Dinov2Model(config)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors[MASK] = torch.zeros(1, width)
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise InputError(f"{source}: not the weights of a DINOv2 encoder ({error}).") from None
    model.save_pretrained(target)
    write_json(target / "preprocessor_config.json", PREPROCESSING)


def _read(source: Path) -> tuple[dict[str, "np.ndarray"], list[Any]]:
    """Return the initialisers by name, and the nodes, of the one ONNX file of a folder."""
    try:
        import onnx
    except ImportError:
        raise InputError(
            "base: its weights come as ONNX and onnx is not installed. Install icm-ray[vision], "
            "or give a local folder as the base."
        ) from None
    files = sorted(source.glob("*.onnx"))
    if len(files) != 1:
        raise InputError(f"{source}: {len(files)} ONNX files but expected one.")
    graph = onnx.load(files[0]).graph
    # A copy each: the arrays are views of the file's bytes, not writable and not always aligned.
    arrays = {t.name: onnx.numpy_helper.to_array(t).copy() for t in graph.initializer}
    return arrays, list(graph.node)


def _encoder(arrays: Arrays, nodes: list[Any]) -> dict[str, "np.ndarray"]:
    """Return the encoder's tensors under the names that transformers gives them."""
    import numpy as np

    named = {n: a for n, a in arrays.items() if n.startswith(BACKBONE)}
    named |= {n: a for n, a in _matrices(arrays, nodes) if n.startswith(BACKBONE)}
    # The exporter folded the interpolation of positions away and left the two parts nameless.
    loose = [a for n, a in arrays.items() if n.startswith("onnx::") and a.ndim == 3]
    places = sorted((a for a in loose if a.shape[0] == 1), key=lambda a: a.shape[1])
    if len(places) != 2 or places[0].shape[1] != 1:
        shapes = [a.shape for a in places]
        raise InputError(
            f"base: nameless tensors of shapes {shapes} in its ONNX file but expected the "
            "positions of the class token and of the patches. It is no DINOv2 encoder."
        )
    named[BACKBONE + POSITIONS] = np.concatenate(places, axis=1)
    return {_renamed(name.removeprefix(BACKBONE)): array for name, array in named.items()}


def _matrices(arrays: Arrays, nodes: list[Any]) -> Iterator[tuple[str, "np.ndarray"]]:
    """Yield each linear map's weight, named after its bias: Add(bias, MatMul(x, weight.T))."""
    import numpy as np

    maker = {output: node for node in nodes for output in node.output}
    for node in (node for node in nodes if node.op_type == "Add"):
        biases = [name for name in node.input if name in arrays and name.endswith(".bias")]
        products = [maker.get(name) for name in node.input if name not in arrays]
        if biases and products and products[0] is not None and products[0].op_type == "MatMul":
            for name in products[0].input:
                if name in arrays:
                    weight = biases[0].removesuffix("bias") + "weight"
                    yield weight, np.ascontiguousarray(arrays[name].T)


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name
