"""What a language model says next: its readout, likelihoods, and greedy answers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from icm_ray.base_model.loading import Base
from icm_ray.base_model.readers import Answered, Batch, ids_of, join, pad_batch, to_device
from icm_ray.errors import RecipeError

Readout = Callable[[Float[Tensor, "*rows d_model"]], Float[Tensor, "*rows vocabulary"]]
"""Last hidden states to logits over the vocabulary: the language-model head."""

TOKENS_AT_ONCE = 512
"""Tokens whose logits over a vocabulary are held at once."""
SCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings of models whose logits are more than a linear map of the hidden state."""


def readout_of(base: Base) -> Readout:
    """Return a language model's head: its own, or its input embedding where they are one.

    Raises:
        RecipeError: the base has no such head.
    """
    own: Any = base.model.config
    if base.whole is base.model and _reads_whole(own):
        raise RecipeError(
            f"base: {own.model_type} reads a whole text before it says any of it, but a decoder "
            "that says one token after the other is needed. Choose another base, or an objective "
            "or task that reads no tokens."
        )
    config: Any = own.get_text_config()
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in SCALED):
        raise RecipeError(f"base: {config.model_type} bends its logits, which is not supported.")
    outputs: Any = getattr(base.whole, "get_output_embeddings", lambda: None)()
    if outputs is not None:
        return lambda hidden: outputs(hidden).to(hidden.device)  # of a spread base it moves them
    if not getattr(config, "tie_word_embeddings", False):
        raise RecipeError(
            "base: a language model is needed, saved with its head or with one that is its input "
            "embedding. Choose another base, or an objective that reads no tokens."
        )
    weight = base.model.get_input_embeddings().weight  # type: ignore[operator]
    return lambda hidden: nn.functional.linear(hidden, weight)


def _reads_whole(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.is_encoder_decoder or config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def counted(batch: Batch) -> Bool[Tensor, "examples places"]:
    """Return where the next token counts: in the answer, or wherever there is one."""
    return batch.answers[:, :-1] if isinstance(batch, Answered) else batch.mask[:, 1:]


def next_token_nats(
    hidden: Float[Tensor, "examples tokens d_model"], batch: Batch, readout: Readout
) -> Float[Tensor, "examples places"]:
    """Return the negative log-likelihood of each next token in nats, 0 where it does not count.

    Logits are made only where they count, and for a few tokens at a time.
    """
    shown = counted(batch).to(hidden.device)
    wanted = batch.ids[:, 1:].to(hidden.device)[shown]
    states = hidden[:, :-1][shown]  # in one row after the other, which matrix products want
    nats = torch.cat(
        [
            nn.functional.cross_entropy(readout(some).float(), ids, reduction="none")
            for some, ids in zip(
                states.split(TOKENS_AT_ONCE), wanted.split(TOKENS_AT_ONCE), strict=True
            )
        ]
    )
    return nats.new_zeros(shown.shape).masked_scatter(shown, nats)


@torch.no_grad()
def greedy(
    model: nn.Module,
    readout: Readout,
    prompts: Batch,
    max_new_tokens: int,
    end: int | None = None,
) -> list[list[int]]:
    """Return each prompt's greedy continuation, up to and with the token that ends it.

    Prompts are padded on the left, so that all answers grow at the same place.
    """
    asked = ids_of(prompts)
    width = max(map(len, asked))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in asked])
    lengths = torch.tensor([len(prompt) for prompt in asked])
    mask = torch.arange(width)[None] >= width - lengths[:, None]
    answers: list[list[int]] = [[] for _ in asked]
    images = {} if prompts.pixels is None else {"pixel_values": prompts.pixels}
    image = getattr(model.config, "image_token_id", None)
    cache: Any = None
    for _ in range(max_new_tokens):
        places = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": places}
        inputs |= images if cache is None else {}  # they are read with the prompts alone
        seen = model(**to_device(inputs, model), past_key_values=cache, use_cache=True)
        cache = seen.past_key_values
        logits = readout(seen.last_hidden_state[:, -1])
        if image is not None:  # an answer shows none, so nothing may stand for one
            logits[:, image] = -torch.inf
        chosen = logits.argmax(-1).cpu()
        for answer, token in zip(answers, chosen.tolist(), strict=True):
            if end is None or answer[-1:] != [end]:
                answer.append(token)
        if end is not None and all(answer[-1] == end for answer in answers):
            break
        ids, mask = chosen[:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return answers


def answered(
    model: nn.Module,
    readout: Readout,
    batches: Sequence[Batch],
    max_new_tokens: int,
    end: int | None,
) -> list[Answered]:
    """Return batches of prompts with what the model as it stands answers, decoded all at once."""
    prompts = join(batches)
    answers = greedy(model, readout, prompts, max_new_tokens, end)
    pairs = list(zip(ids_of(prompts), answers, strict=True))
    with_answers, start = [], 0
    for batch in batches:
        own = pairs[start : start + len(batch.rows)]
        start += len(own)
        # Nothing follows an answer's last token, so the model need not read it.
        whole = pad_batch([p + a[:-1] for p, a in own], batch.rows.tolist(), 0)
        place = torch.arange(whole.ids.shape[1])[None]
        first = torch.tensor([len(prompt) - 1 for prompt, _ in own])[:, None]
        counts = whole.mask & (place >= first)
        with_answers.append(
            Answered(whole.ids, whole.mask, whole.rows, counts, pixels=batch.pixels)
        )
    return with_answers
