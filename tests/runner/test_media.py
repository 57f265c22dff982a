"""Do rows with images and sounds get the tokens that plain transformers gives for the same, and do bad ones fail alone?"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMultimodalLM, WhisperFeatureExtractor

from ollm_service.core.leasing import WorkRow
from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.passes import Applied, NotNeeded
from ollm_service.core.plan import BackendId, PassId
from ollm_service.core.wire import Execute
from tests.runner.commands import answers, chat_row, first_outcomes, results_of, run, work_row
from tests.runner.media_answers import IMAGES, MAKERS, NEW_TOKENS, PICTURES, SOUNDS, contents_of, plain
from tests.runner.media_models import (
    RATE,
    TEKKEN_FIRST_BYTE,
    image_bytes,
    image_part,
    save_tekken_voxtral,
    sound_bytes,
    sound_part,
    text_part,
)
from tests.runner.planned import planned_command
from workers.runner.engine import Engine
from workers.runner.media.sounds import decode_sound

SEEING = RuntimeConfig(multimodal=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models root with all three."""
    root = tmp_path_factory.mktemp("media")
    for name, make in MAKERS.items():
        make(root / name)
    return root


def asked(root: Path, name: str, rows: Sequence[WorkRow], **settings: Any) -> Execute:
    """Execute these rows with a plan that takes images or sounds."""
    return planned_command(root / name, rows, SEEING, **settings)


@pytest.mark.parametrize("name", MAKERS)
def test_tokens_are_those_of_plain_transformers(engine: Engine, root: Path, name: str) -> None:
    """One, two and no images or sounds in one plan: each row's tokens are those that it gets alone from transformers."""
    contents = contents_of(name)
    rows = [chat_row(index, content, max_new_tokens=NEW_TOKENS) for index, content in enumerate(contents)]
    command = asked(root, name, rows)
    is_native = name != "llava"
    assert command.runtime_plan.backend_id == (BackendId.OPTIMIZED_NATIVE if is_native else BackendId.TRANSFORMERS_GENERIC)
    messages = run(engine, command)
    results = results_of(messages)
    assert {row: result.error for row, result in results.items() if result.error} == {}
    texts = {row: result.text for row, result in results.items()}
    assert texts == {index: plain(root, name, content) for index, content in enumerate(contents)}
    assert texts[0] != texts[1], "the answer depends on what was shown"
    if is_native:
        assert set(first_outcomes(messages)) == set(command.runtime_plan.specialization_pass_ids)


def test_the_pass_shows_what_forward_passes_were_fed(engine: Engine, root: Path) -> None:
    """The evidence counts images and chunks of sound and the tokens in whose place they stand."""
    pictures = [chat_row(index, content, max_new_tokens=2) for index, content in enumerate(PICTURES[:2])]
    outcome = first_outcomes(run(engine, asked(root, "gemma3", pictures)))[PassId.MULTIMODAL_SHELL]
    assert outcome == Applied(evidence="2 images in the place of 8 tokens")
    sounds = [chat_row(0, SOUNDS[1], max_new_tokens=2)]
    outcome = first_outcomes(run(engine, asked(root, "voxtral", sounds)))[PassId.MULTIMODAL_SHELL]
    assert outcome == Applied(evidence="1 chunks of sound in the place of 4 tokens")
    without = [chat_row(0, "only text", max_new_tokens=2)]
    outcome = first_outcomes(run(engine, asked(root, "gemma3", without)))[PassId.MULTIMODAL_SHELL]
    assert outcome == NotNeeded(reason="no row of this plan has an image or a sound")


@pytest.mark.parametrize(
    ("name", "how"),
    # A Voxtral is of no generic kind, so that it cannot fall back.
    [
        ("gemma3", "fallback"),
        *((name, how) for name in ("gemma3", "voxtral") for how in ("text-alone", "paged", "streamed", "vocabulary")),
    ],
)
def test_the_same_model_runs_in_other_ways(engine: Engine, root: Path, tmp_path: Path, name: str, how: str) -> None:
    """Without the pass, on the generic backend, with KV files, with layers and vocabulary from disk: the tokens stay the same."""
    contents = list(contents_of(name))[-1:] if how == "text-alone" else list(contents_of(name))
    rows = [chat_row(index, content, max_new_tokens=NEW_TOKENS) for index, content in enumerate(contents)]
    config = SEEING
    if how == "text-alone":
        config = RuntimeConfig()
    elif how == "fallback":
        config = RuntimeConfig(multimodal=True, use_specialization=False)
    command = planned_command(
        root / name,
        rows,
        config,
        kv=KVCacheStrategy.PAGED if how == "paged" else KVCacheStrategy.RESIDENT,
        cache_dir=tmp_path,
        disk_layers=(0, 1, 2) if how in ("streamed", "vocabulary") else (),
    )
    if how == "vocabulary":
        command = replace(command, placement=replace(command.placement, vocabulary_on_disk=True))
    found = results_of(run(engine, command))
    assert {row: result.text for row, result in found.items()} == {
        index: plain(root, name, content) for index, content in enumerate(contents)
    }


@pytest.mark.parametrize("name", MAKERS)
def test_rows_keep_their_own_settings(engine: Engine, root: Path, name: str) -> None:
    """Seeds, stop strings and limits hold for rows with images and sounds, in any company."""
    content = contents_of(name)[0]
    whole = answers(engine, asked(root, name, [chat_row(0, content, max_new_tokens=NEW_TOKENS)]))[0].text
    assert whole is not None
    rows = [
        chat_row(0, content, max_new_tokens=3),
        chat_row(1, content, max_new_tokens=NEW_TOKENS, stop=[whole[3:5]]),
        *(chat_row(index, content, max_new_tokens=NEW_TOKENS, temperature=1.5, seed=7) for index in (2, 3)),
        chat_row(4, content, max_new_tokens=NEW_TOKENS, temperature=1.5, seed=8),
    ]
    found = answers(engine, asked(root, name, rows))
    assert (found[0].finish_reason, found[0].completion_tokens) == ("length", 3)
    assert (found[1].finish_reason, found[1].text) == ("stop", whole[: whole.index(whole[3:5])])
    assert found[2].text == found[3].text != found[4].text
    alone = answers(engine, asked(root, name, rows[2:3]))
    assert alone[2].text == found[2].text


def test_text_is_answered_beside_an_image_that_is_too_much(engine: Engine, root: Path) -> None:
    """The row with the image is beyond the context and runs nowhere; the pass had nothing to do, which fails nothing."""
    long = chat_row(0, [image_part(IMAGES[3]), text_part("x" * 2_000)], max_new_tokens=2)
    messages = run(engine, asked(root, "gemma3", [long, chat_row(1, "what?", max_new_tokens=2)]))
    found = results_of(messages)
    assert found[0].error is not None
    assert found[0].error.code == "context_length_exceeded"
    assert found[1].error is None
    assert isinstance(first_outcomes(messages)[PassId.MULTIMODAL_SHELL], NotNeeded)


BOMB = image_bytes(1, "BMP", (8, 8))
# The same file, which claims 30,000 × 30,000 pixels.
BOMB = BOMB[:18] + (30_000).to_bytes(4, "little") * 2 + BOMB[26:]
REMOTE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}


@pytest.mark.parametrize("name", ["gemma3", "llava"])
@pytest.mark.parametrize(
    ("part", "code"),
    [
        (image_part(b"this is no image"), "invalid_content"),
        (image_part(IMAGES[3][:60]), "invalid_content"),
        (image_part(BOMB, "bmp"), "content_too_large"),
        (REMOTE, "unsupported_content"),
        (sound_part(sound_bytes(300)), "unsupported_content"),
        ({"type": "video_url"}, "unsupported_content"),
    ],
)
def test_a_bad_image_fails_its_row_alone(engine: Engine, root: Path, name: str, part: dict[str, Any], code: str) -> None:
    """What is no image, is not whole, is too large or lies elsewhere is an error of that row; the others are answered."""
    rows = [chat_row(0, [part, text_part("what?")]), chat_row(1, PICTURES[0], max_new_tokens=2)]
    found = answers(engine, asked(root, name, rows))
    assert found[0].error is not None
    assert found[0].error.code == code
    assert found[1].error is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"RIFF no sound", "WAV"),
        (sound_bytes(300, rate=44_100), "44,100 samples a second; this model takes 16,000"),
        (sound_bytes(300, 0), "empty"),
        (image_bytes(3), "WAV"),
    ],
)
def test_a_bad_sound_fails_its_row_alone(engine: Engine, root: Path, data: bytes, words: str) -> None:
    """What is no WAV file, has another rate or is empty is an error of that row that says what to do."""
    rows = [chat_row(0, [sound_part(data), text_part("what?")]), chat_row(1, SOUNDS[0], max_new_tokens=2)]
    found = answers(engine, asked(root, "voxtral", rows))
    assert found[0].error is not None
    assert found[0].error.code == "invalid_content"
    assert words in found[0].error.message
    assert found[1].error is None


def test_a_voxtral_is_spoken_to_as_its_makers_do(engine: Engine, tmp_path: Path) -> None:
    """With published tokens alone: marks around each turn, a placeholder for each feature, and transformers' answer to them."""
    folder = save_tekken_voxtral(tmp_path / "tekken")
    sound = sound_bytes(300)

    def words(text: str) -> list[int]:
        return [TEKKEN_FIRST_BYTE + byte for byte in text.encode()]

    conversation = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [sound_part(sound), text_part("who?")]},
        {"role": "assistant", "content": "A tone."},
        {"role": "user", "content": "why?"},
    )
    row = replace(chat_row(0, "", max_new_tokens=NEW_TOKENS, stop=["\0\0\0\0\0\0\0\0\0"]), messages=conversation)
    result = answers(engine, asked(tmp_path, "tekken", [row]))[0]
    assert result.error is None
    tokens = [1, 17, *words("Be brief."), 18, 3, 25, *[24] * 4, *words("who?"), 4, *words("A tone."), 2, 3, *words("why?"), 4]
    assert result.prompt_tokens == len(tokens)
    features = heard_alone(folder, sound)
    model: Any = AutoModelForMultimodalLM.from_pretrained(folder)
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor([tokens]), input_features=features, max_new_tokens=NEW_TOKENS, do_sample=False
        )
    answer = [token for token in output[0, len(tokens) :].tolist() if token >= TEKKEN_FIRST_BYTE]
    assert (result.text or "") == bytes(token - TEKKEN_FIRST_BYTE for token in answer).decode(errors="replace")


def heard_alone(folder: Path, sound: bytes) -> torch.Tensor:
    """The features of a sound of one chunk."""
    extractor: Any = WhisperFeatureExtractor.from_pretrained(folder)
    samples = torch.nn.functional.pad(torch.tensor(decode_sound(sound, RATE)), (0, 32 * 160))[: 32 * 160]
    features: torch.Tensor = extractor(samples.numpy(), sampling_rate=RATE, padding=False, truncation=False, return_tensors="pt")[
        "input_features"
    ]
    return features


def test_text_cannot_pose_as_a_sound(engine: Engine, root: Path) -> None:
    """A text that has the model's own mark for a sound is an error of that row: features would go astray."""
    row = chat_row(0, [sound_part(sound_bytes(300)), text_part("[AUDIO] what?")])
    found = answers(engine, asked(root, "voxtral", [row]))
    assert found[0].error is not None
    assert found[0].error.code == "invalid_messages"


@pytest.mark.parametrize(("name", "mark"), [("voxtral", "[AUDIO]"), ("gemma3", "<image_soft_token>")])
def test_text_with_a_mark_disturbs_no_other_row(engine: Engine, root: Path, name: str, mark: str) -> None:
    """A row of text that quotes the mark runs beside rows that bring what it stands for; each is answered as alone."""
    contents: list[Any] = [contents_of(name)[0], f"{mark} hello {mark}", contents_of(name)[2]]
    rows = [chat_row(number, content, max_new_tokens=6) for number, content in enumerate(contents)]
    alone = [answers(engine, asked(root, name, [row]))[row.row] for row in rows]
    assert all(result.error is None for result in alone)
    found = answers(engine, asked(root, name, rows))
    assert [found[row.row] for row in rows] == alone


def test_text_cannot_pose_as_an_image(engine: Engine, root: Path) -> None:
    """Beside an image the mark is an error of its row: there would be fewer features than places."""
    rows = [
        chat_row(0, [image_part(IMAGES[3]), text_part("<image_soft_token> what?")]),
        chat_row(1, PICTURES[0], max_new_tokens=2),
    ]
    found = answers(engine, asked(root, "gemma3", rows))
    assert found[0].error is not None
    assert found[0].error.code == "invalid_messages"
    assert found[1].error is None


def test_without_multimodal_an_image_is_a_row_error(engine: Engine, root: Path, llama: Path) -> None:
    """A plan that takes text alone says so, whatever its model could do."""
    rows = [chat_row(0, PICTURES[0]), work_row(1, "hello", max_new_tokens=2)]
    for command in (planned_command(root / "gemma3", rows), planned_command(llama, rows)):
        found = answers(engine, replace(command, rows=tuple(rows)))
        assert found[0].error is not None
        assert found[0].error.code == "unsupported_content"
        assert found[1].error is None


@pytest.mark.parametrize(("width", "tolerance"), [(1, 2e-2), (2, 1e-4), (3, 1e-6), (4, 1e-7)])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_are_read_whatever_their_width(width: int, channels: int, tolerance: float) -> None:
    """One to four bytes a sample, one channel or two of the same: the tone is the one that was written."""
    samples = decode_sound(sound_bytes(440, width=width, channels=channels), RATE)
    times = torch.arange(len(samples), dtype=torch.float64) / RATE
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * times)
    assert len(samples) == int(0.2 * RATE)
    assert (torch.tensor(samples).double() - expected).abs().max() < tolerance
