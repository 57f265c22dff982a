"""Does the whole service answer with models of every kind: text from text, images, sounds, an adapter, packed weights?"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.fleet import Fleet, counts, one_real_worker
from tests.runner import media_answers, test_adapters, test_encoder_decoder, test_quantized_weights
from tests.runner.commands import chat_row
from tests.runner.media_models import save_gemma3, save_llava, save_voxtral
from tests.runner.models import plain_greedy, save_model

TOKENS = 8
PROMPTS = ("hello", "a longer prompt than the other")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models root with a model of each kind."""
    root = tmp_path_factory.mktemp("kinds")
    test_encoder_decoder.save(root / "t5", "t5")
    save_model(root / "llama", "llama")
    talk = save_model(root / "talkative", "llama", seed=2)
    (talk / "chat_template.jinja").write_text("be brief! " * 60 + (talk / "chat_template.jinja").read_text())
    test_adapters.save_adapter(root / "lora", root / "llama")
    test_quantized_weights.save_pair(root, "pack-quantized")
    save_model(root / "qwen3-next", "qwen3-next")
    save_gemma3(root / "gemma3")
    save_llava(root / "llava")
    save_voxtral(root / "voxtral")
    return root


@pytest.fixture(scope="module")
def service(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One worker with a real runner."""
    directory = tmp_path_factory.mktemp("service")
    with one_real_worker(directory, models) as fleet:
        yield fleet


def ended(service: Fleet, model: str, rows: list[dict[str, Any]], tokens: int, **fields: Any) -> tuple[Any, Mapping[int, Any]]:
    """The job once it has ended, and its results by row."""
    job = service.calls.submit(model, rows, generation={"max_new_tokens": tokens}, **fields)
    final = service.calls.wait_final(job["id"], timeout=90)
    return final, {result["row"]: result for result in service.calls.results(job["id"])}


def test_a_source_is_read_and_answered(service: Fleet, models: Path) -> None:
    """A T5 through the generic backend gives the tokens of plain transformers."""
    rows = [{"prompt": prompt} for prompt in test_encoder_decoder.PROMPTS]
    job, results = ended(service, "t5", rows, test_encoder_decoder.NEW_TOKENS)
    assert counts(job) == (len(rows), 0, 0), results
    assert job["plans"][0]["runtime_plan"]["generic_model_kind"] == "seq2seq-lm"
    for number, prompt in enumerate(test_encoder_decoder.PROMPTS):
        assert results[number]["text"] == test_encoder_decoder.plain(models / "t5", prompt)


def test_a_template_may_write_much_by_itself(service: Fleet) -> None:
    """Messages of a few words become hundreds of tokens, which nobody could know: the rows are placed once more and answered."""
    messages = [{"role": "user", "content": "hi"}]
    rows: list[dict[str, Any]] = [{"messages": messages}, {"prompt": "short"}, {"messages": messages}]
    job, results = ended(service, "talkative", rows, TOKENS)
    assert counts(job) == (3, 0, 0), results
    assert results[0]["usage"]["prompt_tokens"] > 600
    assert results[0]["text"] == results[2]["text"]
    assert job["plans"][0]["failures"] == 0
    (attempt,) = service.calls.plan(job["plans"][0]["id"])["attempts"]
    assert attempt["measured"]["prompt_tokens"] == sum(result["usage"]["prompt_tokens"] for result in results.values())
    assert attempt["measured"]["load_seconds"] > 0


def test_an_adapter_is_put_on_its_model(service: Fleet, models: Path) -> None:
    """`adapter_dir` names a folder of the worker's models root; the tokens are those of plain peft."""
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    job, results = ended(service, "llama", rows, test_adapters.NEW_TOKENS, runtime={"adapter_dir": "lora"})
    assert counts(job) == (len(rows), 0, 0), results
    for number, prompt in enumerate(PROMPTS):
        assert results[number]["text"] == test_adapters.plain(models, prompt)


def test_packed_weights_are_unpacked(service: Fleet, models: Path) -> None:
    """A checkpoint of compressed-tensors gives the tokens of the plain weights that it stands for."""
    job, results = ended(service, "pack-quantized", [{"prompt": prompt} for prompt in PROMPTS], TOKENS)
    assert counts(job) == (len(PROMPTS), 0, 0), results
    for number, prompt in enumerate(PROMPTS):
        assert results[number]["text"] == plain_greedy(models / "plain-pack-quantized", prompt, TOKENS)


def test_linear_attention_and_experts_are_answered(service: Fleet, models: Path) -> None:
    """A Qwen3-Next on the native backend, its full attention in pages: the tokens of plain transformers."""
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    job, results = ended(service, "qwen3-next", rows, TOKENS, runtime={"kv_cache_strategy": "paged"})
    assert counts(job) == (len(PROMPTS), 0, 0), results
    for number, prompt in enumerate(PROMPTS):
        assert results[number]["text"] == plain_greedy(models / "qwen3-next", prompt, TOKENS)
    plan = job["plans"][0]["runtime_plan"]
    assert (plan["specialization_provider_id"], plan["specialization_state"]) == ("qwen3-next-native", "applied")
    assert " pages)" in plan["details"]["pass_disk_cache"]


@pytest.mark.parametrize("model", ["gemma3", "llava", "voxtral"])
def test_images_and_sounds_are_answered(service: Fleet, models: Path, model: str) -> None:
    """Parts in OpenAI's shapes; the native families show their evidence, and a bad part fails its row alone."""
    contents = media_answers.contents_of(model)
    bad = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    messages = [chat_row(0, content).messages for content in (*contents, bad)]
    job, results = ended(service, model, [{"messages": one} for one in messages], media_answers.NEW_TOKENS)
    assert counts(job) == (len(contents), 1, 0), results
    for number, content in enumerate(contents):
        assert results[number]["text"] == media_answers.plain(models, model, content)
    assert results[len(contents)]["error"]["code"] == ("unsupported_content" if model == "voxtral" else "invalid_content")
    plan = job["plans"][0]["runtime_plan"]
    if model == "llava":
        assert plan["backend_id"] == "transformers-generic"
    else:
        assert plan["specialization_state"] == "applied", plan["fallback_reason"]
        assert "in the place of" in plan["details"]["pass_multimodal_shell"]
