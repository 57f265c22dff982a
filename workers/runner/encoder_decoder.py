"""How does a micro-batch become answers where an encoder reads the prompt and a decoder writes? Sources are read once, together.

B rows, S tokens of the longest source, D width of the encoder's states, L new positions of an answer, V vocabulary. The prompt
takes none of the answer's positions: source and answer have the model's whole context each.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from workers.runner.answers import Answer
from workers.runner.interruptions import AttemptEnded
from workers.runner.model import LoadedModel
from workers.runner.padded import PaddedLoop, accept
from workers.runner.prompts import EncodedRow
from workers.runner.sampling import choice_of, choose_tokens


class EncoderDecoderLoop(PaddedLoop):
    """The rows of one attempt, a micro-batch at a time."""

    @torch.inference_mode()
    def generate(self, rows: Sequence[EncodedRow]) -> list[Answer]:
        """Answer the rows, which share one way of choosing tokens. Raises StopRequested between steps."""
        model = self.model
        answers = [Answer(row, model.tokenizer, model.end_tokens) for row in rows]
        choice, running = choice_of(rows[0].generation), answers
        source_BS, mask_BS = right_padded([row.tokens for row in rows], model.pad_token, model.device)
        states_BSD = self._read(source_BS, mask_BS)
        newest, forced = [start_token(model)] * len(rows), _setting(model, "forced_bos_token_id")
        # Not by the configuration, of which transformers counts the encoder's layers: they come as they are used.
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        while True:
            self.pulse()
            began = time.monotonic()
            tokens_BL = torch.tensor(newest, device=model.device).unsqueeze(-1)
            logits_BV = _next_logits(model, tokens_BL, states_BSD, mask_BS, cache)
            chosen = choose_tokens(logits_BV, choice, [answer.generator for answer in running])
            accept(running, logits_BV, chosen if forced is None else [forced] * len(running))
            forced = None
            count = len(running)
            self.measurements.count_pass(rows=count, prompt_tokens=0, new_tokens=count, seconds=time.monotonic() - began)
            self.pulse.tokens += count
            kept = [index for index, answer in enumerate(running) if not answer.is_complete]
            if not kept:
                return answers
            newest = [running[index].last_token for index in kept]
            if len(kept) < count:
                kept_B = torch.tensor(kept, device=model.device)
                cache.batch_select_indices(kept_B)
                states_BSD, mask_BS = states_BSD[kept_B], mask_BS[kept_B]
                running = [running[index] for index in kept]

    def _read(self, source_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """The encoder's states [B, S, D]."""
        self.pulse()
        began = time.monotonic()
        states_BSD: Tensor = self.model.module.get_encoder()(input_ids=source_BS, attention_mask=mask_BS).last_hidden_state
        tokens = int(mask_BS.sum())
        self.measurements.count_pass(rows=len(source_BS), prompt_tokens=tokens, new_tokens=0, seconds=time.monotonic() - began)
        return states_BSD


def right_padded(sources: Sequence[Sequence[int]], pad_token: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both [B, S]: every source begins in the first column."""
    longest = max(len(source) for source in sources)
    tokens_BS = torch.full((len(sources), longest), pad_token, dtype=torch.long)
    mask_BS = torch.zeros((len(sources), longest), dtype=torch.long)
    for index, source in enumerate(sources):
        tokens_BS[index, : len(source)] = torch.tensor(source, dtype=torch.long)
        mask_BS[index, : len(source)] = 1
    return tokens_BS.to(device), mask_BS.to(device)


def start_token(model: LoadedModel) -> int:
    """What the decoder is given first. Raises AttemptEnded where the model does not say."""
    found = _setting(model, "decoder_start_token_id")
    found = _setting(model, "bos_token_id") if found is None else found
    if found is None:
        raise AttemptEnded(
            stage="generating",
            code="load_failed",
            message="The model's configuration names no decoder_start_token_id, so that an answer cannot be begun; add it.",
            error_type="NoStartToken",
            is_permanent=True,
        )
    return found


def _setting(model: LoadedModel, name: str) -> int | None:
    """A token's number from the generation settings, else from the configuration."""
    for source in (model.module.generation_config, model.module.config):
        value: Any = getattr(source, name, None)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            return value
    return None


def _next_logits(
    model: LoadedModel, tokens_BL: Tensor, states_BSD: Tensor, mask_BS: Tensor, cache: EncoderDecoderCache
) -> Tensor:
    """Logits [B, V] of the token that follows the last one of the answer."""
    output = model.module(
        encoder_outputs=BaseModelOutput(last_hidden_state=states_BSD),
        attention_mask=mask_BS,
        decoder_input_ids=tokens_BL,
        past_key_values=cache,
        use_cache=True,
    )
    logits_BV: Tensor = output.logits[:, -1, :]
    return logits_BV
