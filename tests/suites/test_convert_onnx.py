"""DINOv2 out of ONNX: every tensor lands where transformers reads it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, Dinov2Config, Dinov2Model

from icm_ray.errors import InputError
from icm_ray.files import read_json
from icm_ray.suites import prepare_base
from icm_ray.suites.convert_onnx import convert_dinov2

onnx = pytest.importorskip("onnx", reason="comes with icm-ray[vision]")

OLD_NAMES = {
    "attention.q_proj.": "attention.attention.query.",
    "attention.k_proj.": "attention.attention.key.",
    "attention.v_proj.": "attention.attention.value.",
    "attention.o_proj.": "attention.output.dense.",
}


def tiny_model() -> Dinov2Model:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=1, image_size=28, patch_size=14
    )
    model = Dinov2Model(config).eval()
    for parameter in model.parameters():  # biases and scales start alike, which hides a swap
        torch.nn.init.normal_(parameter)
    return model


def export(model: Dinov2Model, folder: Path, *, without: str = "-") -> None:
    """Write what a graph exporter leaves of a model: named biases, nameless transposed maps."""
    tensors, nodes = {}, []
    for name, tensor in model.state_dict().items():
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old)
        array = tensor.numpy()
        if name == "embeddings.position_embeddings":
            tensors["onnx::Concat_1"], tensors["onnx::Reshape_2"] = array[:, :1], array[:, 1:]
        elif array.ndim == 2 and name != "embeddings.mask_token":
            hidden, bias = f"onnx::MatMul_{name}", name.replace("weight", "bias")
            tensors[hidden] = array.T
            nodes += [
                onnx.helper.make_node("MatMul", [f"x_{name}", hidden], [f"product_{name}"]),
                onnx.helper.make_node("Add", [f"backbone.{bias}", f"product_{name}"], [name]),
            ]
        elif name != "embeddings.mask_token":
            tensors[f"backbone.{name}"] = array
    tensors = {name: array for name, array in tensors.items() if without not in name}
    stored = [onnx.numpy_helper.from_array(np.array(a), n) for n, a in tensors.items()]
    graph = onnx.helper.make_graph(nodes, "tiny", [], [], stored)
    onnx.save(onnx.helper.make_model(graph), folder / "tiny.onnx")


def test_a_converted_model_computes_the_same(tmp_path: Path) -> None:
    model = tiny_model()
    export(model, tmp_path)
    convert_dinov2(tmp_path, tmp_path / "out")
    loaded = AutoModel.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    assert loaded.config.image_size == 28
    assert loaded.config.num_hidden_layers == 2
    for name, tensor in model.state_dict().items():
        if name != "embeddings.mask_token":
            assert torch.equal(loaded.state_dict()[name], tensor), name
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        wanted = model(pixel_values=pixels).last_hidden_state
        assert torch.equal(loaded(pixel_values=pixels).last_hidden_state, wanted)
    assert read_json(tmp_path / "out" / "preprocessor_config.json")["image_mean"][0] == 0.485


@pytest.mark.parametrize("without", ["onnx::Reshape", "layer.1.norm2.bias"])
def test_a_graph_that_lacks_a_tensor_is_refused(tmp_path: Path, without: str) -> None:
    export(tiny_model(), tmp_path, without=without)
    with pytest.raises(InputError, match="DINOv2 encoder"):
        convert_dinov2(tmp_path, tmp_path / "out")


def test_a_folder_without_a_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 ONNX files but expected one"):
        convert_dinov2(tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_the_real_base_agrees_with_its_graph_run_by_onnxruntime() -> None:
    model = AutoModel.from_pretrained(prepare_base("dinov2-small"), local_files_only=True).eval()
    place = np.arange(224)
    grid = np.sin(place[:, None] / 7) * np.cos(place[None, :] / 11)
    pixels = torch.tensor(np.stack([grid, grid.T, -grid])[None], dtype=torch.float32)
    with torch.no_grad():
        states = model(pixel_values=pixels).last_hidden_state[0]
    # Output of the graph's /backbone/layernorm/Add_1, onnxruntime 1.32 on CPU.
    class_token = [-0.28493, -0.35137, 2.41255, -4.5217, -1.87388, -0.51272]
    patch_100 = [0.57634, 0.74252, 1.08569, -4.32565, -2.48449, -2.18795]
    torch.testing.assert_close(states[0, :6], torch.tensor(class_token), atol=1e-3, rtol=0)
    torch.testing.assert_close(states[100, :6], torch.tensor(patch_100), atol=1e-3, rtol=0)
    assert abs(float(states.norm()) - 827.3655) < 0.01
