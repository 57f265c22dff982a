"""What does a forward pass of rows work with that run side by side, padded to one length? Their cache is in memory."""

from ollm_service.core.layout import Layout
from ollm_service.core.packing import EAGER_MODELS
from ollm_service.core.plan import GenericModelKind
from ollm_service.core.profile import ModelProfile
from ollm_service.core.working_memory import (
    LATENT_MODELS,
    Moment,
    delta_rule_bytes,
    logits_bytes,
    middle_width,
    rotation_width,
    score_bytes,
    widest,
)


def prompt_moment(profile: ModelProfile, layout: Layout, rows: int, prompt: int) -> Moment:
    """The last layer of the prompt's pass."""
    element, positions, hidden = profile.element_bytes, rows * prompt, profile.hidden_size
    is_eager = profile.model_type in EAGER_MODELS
    cells = rows * prompt * prompt
    kept_masks = cells * _mask_count(profile, rows, prompt, is_eager=is_eager) * (element if is_eager else 1)
    running_masks = kept_masks if is_eager or not kept_masks else kept_masks + cells * element
    scores = cells * profile.attention_heads if is_eager else 0
    queries = profile.attention_width or hidden
    attention = positions * (3 * hidden + 4 * queries) * element + scores * score_bytes(profile)
    chunk = positions if layout.mlp_rows is None else min(positions, layout.mlp_rows)
    chunked = 0 if chunk == positions else positions * hidden
    feed_forward = (positions * 4 * hidden + chunked + chunk * middle_width(profile) + scores) * element
    turned = positions * rotation_width(profile) * element
    kv = _prompt_kv(profile, rows, prompt)
    return max(
        Moment(kv=kv, activations=attention + turned, masks=running_masks),
        Moment(kv=kv, activations=feed_forward + turned, masks=kept_masks),
        Moment(kv=kv, activations=delta_rule_bytes(profile, rows, prompt) + turned, masks=kept_masks),
        key=lambda moment: moment.total,
    )


def _mask_count(profile: ModelProfile, rows: int, prompt: int, *, is_eager: bool) -> int:
    """How many masks there are: of full and of sliding attention. SDPA needs none where no row is padded."""
    has_sliding = profile.sliding_kv_bytes_per_token > 0
    fills_window = profile.sliding_window is not None and prompt >= profile.sliding_window
    full = bool(profile.kv_bytes_per_token or not has_sliding) and (is_eager or rows > 1)
    sliding = has_sliding and (is_eager or rows > 1 or fills_window)
    return full + sliding


def _prompt_kv(profile: ModelProfile, rows: int, prompt: int) -> int:
    if profile.kind is GenericModelKind.SEQ2SEQ_LM:
        return rows * profile.kv_bytes(1, prompt)
    return rows * (prompt * (profile.kv_bytes_per_token + profile.sliding_kv_bytes_per_token) + profile.state_bytes_per_row)


def answer_moment(profile: ModelProfile, layout: Layout, rows: int, tokens: int, prompt: int) -> Moment:
    """The last step of the longest row's answer."""
    element, hidden = profile.element_bytes, profile.hidden_size
    source = prompt if profile.kind is GenericModelKind.SEQ2SEQ_LM else 0
    seen = tokens if profile.kv_bytes_per_token or profile.sliding_window is None else min(tokens, profile.sliding_window)
    kv = rows * profile.kv_bytes(tokens, source) + rows * seen * widest(profile) // 2
    activations = rows * (4 * hidden + 3 * profile.intermediate_size) * element
    if profile.model_type in LATENT_MODELS:
        activations += rows * seen * 4 * profile.attention_width * element
    activations += rows * 3 * profile.linear_heads * profile.linear_head_size**2 * 4
    if profile.model_type in EAGER_MODELS:
        activations += rows * seen * (2 * profile.attention_width * element + profile.attention_heads * score_bytes(profile))
    logits = logits_bytes(profile, layout, places=rows, rows=rows, beside=1)  # whether each is a number
    return Moment(kv=kv, activations=activations, logits=logits)
