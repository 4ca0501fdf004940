"""Pictures of any size, made to fit as the model's own processor does it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from icm_ray.base_model.loading import Base, load_base
from icm_ray.base_model.pictures import PREPROCESSING, Preprocessing
from icm_ray.errors import InputError
from icm_ray.inputs import image_bytes

OWN = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 16, "width": 16},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3],
}
DRAW = np.random.default_rng(0)


def picture(height: int, width: int) -> np.ndarray:
    return DRAW.integers(0, 256, (height, width, 3), dtype=np.uint8)


def apart(*images: np.ndarray) -> np.ndarray:
    together = np.empty(len(images), dtype=object)
    together[:] = images
    return together


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A random ViT that reads 16 x 16 pixels, with a processor of its own."""
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**sizes, intermediate_size=32, image_size=16, patch_size=4)
    ViTModel(config).save_pretrained(folder)
    (folder / PREPROCESSING).write_text(json.dumps(OWN))
    return load_base(folder)


def test_pixels_are_those_of_the_model_s_own_processor(vit) -> None:
    from transformers import AutoImageProcessor

    images = [picture(30, 40), picture(16, 16), picture(9, 70)]
    expected = AutoImageProcessor.from_pretrained(vit.path)(images, return_tensors="pt")
    batch = vit.reader.batch(vit.reader.read(apart(*images), 0), [0, 1, 2])
    torch.testing.assert_close(batch.data, expected["pixel_values"], rtol=1e-5, atol=1e-5)
    assert batch.mask.shape == (3, 1 + 16)
    with torch.no_grad():
        assert vit.model(**batch.inputs).last_hidden_state.shape == (3, 17, 16)


def test_what_fits_stays_as_it_is(vit) -> None:
    images = np.stack([picture(16, 16), picture(16, 16)])
    assert vit.reader.read(images, 0) is images
    others = np.stack([picture(32, 32), picture(32, 32)])  # whole patches, but not this model's
    assert vit.reader.read(others, 0).shape == (2, 16, 16, 3)
    anywhere = Preprocessing(Path("nowhere"), patch=4)
    assert anywhere.sized(others) is others


def test_without_a_processor_sizes_must_fit(tmp_path) -> None:
    plain = Preprocessing(tmp_path, patch=4, side=16)
    with pytest.raises(InputError, match=r"40 x 30 .* 16 each, are expected. Resize them, or put"):
        plain.sized(apart(picture(30, 40), picture(16, 16)))
    # ImageNet's constants, as ever.
    image = np.full((1, 16, 16, 3), 255, dtype=np.uint8)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    found = plain.standardised(image)[0, 0, 0]
    np.testing.assert_allclose(found, (1 - mean) / deviation, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_mean": [0.5, 0.5]}, "image_mean and image_std"),
        ({"image_std": [float("nan")] * 3}, "image_mean and image_std"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"size": {"shortest_edge": 16}}, "one size that is a multiple of 4"),
    ],
)
def test_a_processor_that_does_not_fit_is_said(tmp_path, changes, words) -> None:
    said = {**OWN, **changes}
    if "shortest_edge" in said["size"]:
        said["image_processor_type"] = "BitImageProcessor"
        said["do_center_crop"] = False
    (tmp_path / PREPROCESSING).write_text(json.dumps(said))
    own = Preprocessing(tmp_path, patch=4, side=16)
    with pytest.raises(InputError, match=words):
        own.standardised(own.sized(apart(picture(32, 48), picture(20, 20))))


def test_what_is_done_to_a_picture_is_part_of_what_is_measured(tmp_path) -> None:
    from icm_ray.base_model.pictures import preprocessing_key

    assert preprocessing_key(tmp_path) == ""
    keys = set()
    for number, changes in enumerate(({}, {"size": {"height": 8, "width": 8}})):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / PREPROCESSING).write_text(json.dumps({**OWN, **changes}))
        keys.add(preprocessing_key(folder))
    assert len(keys) == 2
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / PREPROCESSING).write_text(json.dumps({**OWN, "do_normalize": False}))
    found = Preprocessing(tmp_path / "raw", patch=4).standardised(picture(4, 4)[None])
    assert 0 <= found.min() < found.max() <= 1


def test_images_of_different_sizes_are_told_apart() -> None:
    wide, high = picture(2, 4), picture(4, 2)
    high[...] = wide.reshape(4, 2, 3)
    seen = {b"".join(image_bytes(apart(image, picture(1, 1) * 0))) for image in (wide, high)}
    assert len(seen) == 2
    assert list(image_bytes(np.stack([wide]))) == [wide.tobytes()]
