"""Does a profile agree with the model that transformers makes of the same files: its weights, part by part, and its cache?"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils.quantization_config import Mxfp4Config

from ollm_service.core.model_config import ModelConfig
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.plan import BackendId, GenericModelKind, ModelModality, NativeFamily, PassId, RuntimePlan
from ollm_service.core.planning import plan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import requirements_of
from ollm_service.core.resolution import HeldModel
from ollm_service.core.row_state import row_state
from ollm_service.core.tensors import Tensor
from ollm_service.core.weights import weigh
from ollm_service.inspection import DigestCache, inspect_models
from tests.families import FAMILIES, VOCABULARY, make, save

TOKENS, SOURCE_TOKENS = 6, 9
CAUSAL, IMAGES, SEQ2SEQ = GenericModelKind.CAUSAL_LM, GenericModelKind.IMAGE_TEXT_TO_TEXT, GenericModelKind.SEQ2SEQ_LM
KINDS: Mapping[str, GenericModelKind | None] = {
    **dict.fromkeys(FAMILIES, CAUSAL),
    **dict.fromkeys(("t5", "t5-untied", "bart"), SEQ2SEQ),
    "gemma3": IMAGES,
    "voxtral": None,
}
NATIVE: Mapping[str, NativeFamily] = {
    **dict.fromkeys(("llama", "llama-tied"), NativeFamily.LLAMA),
    **dict.fromkeys(("gemma3", "gemma3-text"), NativeFamily.GEMMA3),
    **dict.fromkeys(("qwen3-next", "qwen3-moe"), NativeFamily.QWEN3_NEXT),
    "gpt-oss": NativeFamily.GPT_OSS,
    "voxtral": NativeFamily.VOXTRAL,
}
# What one layer of experts holds, in numbers: their projections, and the biases of gpt-oss.
EXPERTS: Mapping[str, int] = {
    **dict.fromkeys(("qwen3-next", "qwen3-moe"), 4 * 4 * 3 * 16 * 8),
    **dict.fromkeys(("deepseek-v3", "deepseek-v3.2"), 3 * 4 * 3 * 16 * 8),
    "mixtral": 4 * 4 * 3 * 16 * 24,
    "gpt-oss": 4 * 4 * (3 * 16 * 24 + 2 * 24 + 16),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Every family's model as it was saved, in `root`."""
    root = tmp_path_factory.mktemp("families")
    made = {family: save(family, root / family) for family in FAMILIES}
    return {**made, "root": root}


@pytest.fixture(scope="module")
def profiles(models: Mapping[str, Any]) -> Mapping[str, ModelProfile]:
    """What inspection says of each."""
    return {profile.name: profile for profile in inspect_models(models["root"], DigestCache())}


def loaded_bytes(module: Any) -> int:
    """Parameters and persistent buffers, those that are one counted once."""
    stored = {tensor.data_ptr(): tensor for tensor in module.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in stored.values())


def cached_bytes(cache: Any) -> int:
    """Keys, values and states that a cache of transformers holds."""
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values", "indexer_keys")]
    for layer in cache.layers:
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            held.extend(states.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)


def decoder_layers(model: Any, count: int) -> Any:
    """The list of the language model's layers."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and "encoder" not in name and "tower" not in name
    ]
    return max(lists, key=lambda found: loaded_bytes(found[1]))[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_architecture_kind_and_family_are_told_apart(profiles: Mapping[str, ModelProfile], family: str) -> None:
    """The architecture is the class that saved it; kind and family follow from it and from the configuration."""
    profile = profiles[family]
    assert profile.unsafe_because is None
    assert profile.architecture == FAMILIES[family]()[0].__name__
    assert (profile.kind, profile.family) == (KINDS[family], NATIVE.get(family))
    assert profile.modalities == {
        "gemma3": (ModelModality.TEXT, ModelModality.IMAGE),
        "voxtral": (ModelModality.TEXT, ModelModality.AUDIO),
    }.get(family, (ModelModality.TEXT,))
    assert profile.requires_processor is (family in ("gemma3", "voxtral"))
    assert profile.vocabulary_size == VOCABULARY
    assert profile.image_tokens == (4 + 8 if family == "gemma3" else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_weigh_what_the_loaded_model_weighs(
    models: Mapping[str, Any], profiles: Mapping[str, ModelProfile], family: str
) -> None:
    """Whole, each decoder layer, embeddings and head agree to the byte; a tied head weighs nothing."""
    model, profile = models[family], profiles[family]
    assert profile.weight_bytes == loaded_bytes(model)
    assert profile.layer_bytes == tuple(loaded_bytes(layer) for layer in decoder_layers(model, profile.layer_count))
    assert profile.parameter_count * 4 == profile.weight_bytes
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head.weight.data_ptr() == embedding.weight.data_ptr()
    assert (profile.head_bytes == 0) is is_tied
    if not is_tied:
        assert profile.head_bytes == loaded_bytes(head)
    positions = {"gpt2": 128 * 16 * 4, "bart": (64 + 2) * 16 * 4}.get(family, 0)
    assert profile.embedding_bytes == loaded_bytes(embedding) + positions
    assert profile.other_bytes >= 0


@pytest.mark.parametrize("family", FAMILIES)
def test_routed_experts_are_told_from_shared_ones(profiles: Mapping[str, ModelProfile], family: str) -> None:
    """Only models with a router have experts; shared ones and the router belong to the layer alone."""
    profile = profiles[family]
    assert profile.expert_bytes == 4 * EXPERTS.get(family, 0)
    assert (profile.expert_count, profile.experts_per_token) == ((4, 2) if family in EXPERTS else (0, 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_row_keeps_is_what_the_cache_holds(
    models: Mapping[str, Any], profiles: Mapping[str, ModelProfile], family: str
) -> None:
    """After a forward pass the cache's tensors have the predicted size, for full, sliding, latent, linear and cross attention."""
    model, profile = models[family], profiles[family]
    tokens = torch.arange(3, 3 + TOKENS).unsqueeze(0)
    with torch.inference_mode():
        if profile.kind is SEQ2SEQ:
            source = torch.arange(3, 3 + SOURCE_TOKENS).unsqueeze(0)
            cache = model(input_ids=source, decoder_input_ids=tokens, use_cache=True).past_key_values
            assert profile.kv_bytes(TOKENS) == cached_bytes(cache.self_attention_cache)
            assert profile.kv_bytes(0, SOURCE_TOKENS) == cached_bytes(cache.cross_attention_cache)
            return
        cache = transformers.DynamicCache(config=model.config)
        model(input_ids=tokens, **{"cache_params" if family == "mamba2" else "past_key_values": cache}, use_cache=True)
    assert profile.kv_bytes(TOKENS) == cached_bytes(cache)


@pytest.mark.parametrize(
    ("family", "sliding", "full"), [("gemma3", 6, 1), ("gemma3-text", 6, 1), ("gpt-oss", 2, 2), ("mistral", 4, 0)]
)
def test_sliding_layers_are_told_from_full_ones(
    models: Mapping[str, Any], profiles: Mapping[str, ModelProfile], family: str, sliding: int, full: int
) -> None:
    """Beyond the window only the layers of full attention grow: one step later the cache holds the window and no more."""
    model, profile = models[family], profiles[family]
    a_layer = 2 * 2 * 8 * 4
    assert (profile.sliding_kv_bytes_per_token, profile.kv_bytes_per_token) == (sliding * a_layer, full * a_layer)
    assert profile.sliding_window == 8
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.arange(3, 23).unsqueeze(0), past_key_values=cache, use_cache=True)
    # transformers keeps one token less than the window between steps, and has the whole window during one
    assert profile.kv_bytes(20) - profile.sliding_kv_bytes_per_token == cached_bytes(cache)


def test_linear_attention_keeps_a_state_and_no_tokens(profiles: Mapping[str, ModelProfile]) -> None:
    """Of four layers of Qwen3-Next one attends in full; the others keep the same for any number of tokens."""
    profile = profiles["qwen3-next"]
    convolution, recurrence = (2 * 2 * 8 + 4 * 4) * 4, 4 * 8 * 4
    assert profile.state_bytes_per_row == 3 * 4 * (convolution + recurrence)
    assert profile.kv_bytes(1000) - profile.kv_bytes(999) == 2 * 2 * 8 * 4
    assert (profile.linear_heads, profile.linear_head_size) == (4, 8)


@pytest.mark.parametrize(
    ("family", "width"), [("llama", 24), ("mixtral", 2 * 24), ("gpt-oss", 2 * 24), ("qwen3-moe", 24), ("gpt2", 64)]
)
def test_the_middle_is_that_of_all_experts_of_a_token(profiles: Mapping[str, ModelProfile], family: str, width: int) -> None:
    """Two experts of width 24 are 48 wide, two of width 8 no wider than a dense layer of 24; GPT-2 has four times its own."""
    assert profiles[family].intermediate_size == width


@pytest.mark.parametrize("family", ["llama", "gemma3-text", "gpt-oss", "mistral", "qwen3-next", "gpt2"])
def test_the_widest_layer_is_known(models: Mapping[str, Any], profiles: Mapping[str, ModelProfile], family: str) -> None:
    """What the one layer keeps of a token that keeps the most, and how wide its queries are."""
    model, profile = models[family], profiles[family]
    cache: Any = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.arange(3, 9).unsqueeze(0), past_key_values=cache, use_cache=True)
    attending = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None and layer.keys.dim() == 4]
    assert profile.widest_kv_bytes_per_token == max(layer.keys.nbytes + layer.values.nbytes for layer in attending) // 6
    heads = model.config.num_attention_heads
    assert profile.attention_width == heads * attending[0].keys.shape[-1]


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-next", "gpt-oss", "t5", "voxtral"])
def test_half_precision_halves_the_weights(tmp_path: Path, family: str) -> None:
    """A bfloat16 checkpoint weighs what transformers loads of it, but for the sound positions that it keeps in float32."""
    save(family, tmp_path / family, torch.bfloat16)
    (profile,) = inspect_models(tmp_path, DigestCache())
    loaded = FAMILIES[family]()[0].from_pretrained(tmp_path / family, dtype="auto")
    widened = 2 * 16 * 16 if family == "voxtral" else 0
    assert profile.dtype == "bfloat16"
    assert profile.weight_bytes == loaded_bytes(loaded) - widened


def test_t5_in_float16_keeps_its_widest_matrices_in_float32(tmp_path: Path) -> None:
    """transformers widens the output of T5's feed-forward networks, and so does the profile."""
    save("t5", tmp_path / "t5", torch.float16)
    (profile,) = inspect_models(tmp_path, DigestCache())
    loaded = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "t5", dtype="auto")
    assert profile.weight_bytes == loaded_bytes(loaded) > 2 * profile.parameter_count


def test_packed_experts_weigh_what_they_unpack_to(tmp_path: Path) -> None:
    """mxfp4 is loaded as bfloat16, four bytes for each packed one, without the scales."""
    folder = tmp_path / "gpt-oss"
    config = FAMILIES["gpt-oss"]()[1]
    config.hidden_size = config.intermediate_size = 32
    packed: Any = transformers.GptOssForCausalLM(config)
    packed.to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj")]:
        experts, inner, outer = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.zeros(experts, outer, inner // 32, 16, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.zeros(experts, outer, inner // 32, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**saved, "quantization_config": {"quant_method": "mxfp4"}}))
    (profile,) = inspect_models(tmp_path, DigestCache())
    unpacked = transformers.GptOssForCausalLM.from_pretrained(
        folder, dtype="auto", quantization_config=Mxfp4Config(dequantize=True)
    )
    assert profile.weight_bytes == loaded_bytes(unpacked)
    assert profile.parameter_count == sum(tensor.numel() for tensor in unpacked.parameters())
    assert profile.expert_bytes == 4 * 4 * (3 * 32 * 32 + 2 * 32 + 32) * 2


def test_weights_of_one_byte_are_loaded_in_the_models_dtype(tmp_path: Path) -> None:
    """A file may hold plain numbers in float8: transformers casts them like any others."""
    model = save("llama", tmp_path / "small")
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    small = {name: tensor.to(torch.float8_e4m3fn) if "proj" in name else tensor for name, tensor in tensors.items()}
    save_file(small, tmp_path / "small" / "model.safetensors", metadata={"format": "pt"})
    (profile,) = inspect_models(tmp_path, DigestCache())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    assert profile.weight_bytes == loaded_bytes(loaded) == loaded_bytes(model)


# ---------------------------------------------------------------------------------------- plans

LLAMAS = "disk-cache,cpu-offload,mlp-chunking"
QWENS = "disk-cache,cpu-offload,gpu-offload,moe-routing"
PASSES: Mapping[str, str] = {
    **dict.fromkeys(("llama", "llama-tied", "gemma3", "gemma3-text", "voxtral"), LLAMAS),
    **dict.fromkeys(("qwen3-next", "qwen3-moe"), QWENS),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_planned_from_its_files(profiles: Mapping[str, ModelProfile], family: str) -> None:
    """Native with its provider's passes, else generic by its kind; gpt-oss has no export here, and is generic for that reason."""
    profile = profiles[family]
    found = plan(f"path:{family}", [HeldModel(profile=profile, workers=("w",))], RuntimeConfig()).plan
    if family in PASSES:
        assert found.specialization_provider_id == f"{profile.family}-native"
        assert ",".join(found.specialization_pass_ids) == PASSES[family]
    else:
        assert found.backend_id == BackendId.TRANSFORMERS_GENERIC
        assert f"loads it as {profile.kind}" in found.reason
    assert ("gds_export" in found.reason) is (family == "gpt-oss")
    assert requirements_of(found, profile, RuntimeConfig()).kind == (profile.kind or "voxtral")


@pytest.mark.parametrize("family", ["gemma3", "voxtral"])
def test_images_and_sounds_need_the_files_of_a_processor(models: Mapping[str, Any], family: str, tmp_path: Path) -> None:
    """Without them `multimodal` is refused with that reason; with them the shell is planned."""
    folder = tmp_path / family
    shutil.copytree(models["root"] / family, folder)
    seeing = RuntimeConfig(multimodal=True)

    def planned() -> RuntimePlan:
        (profile,) = inspect_models(tmp_path, DigestCache())
        return plan(f"path:{family}", [HeldModel(profile=profile, workers=("w",))], seeing).plan

    assert "needs a processor" in planned().reason
    (folder / "preprocessor_config.json").write_text("{}")
    assert planned().specialization_pass_ids[-1] is PassId.MULTIMODAL_SHELL


# ---------------------------------------------------------------------------------------- files of other makers


def tensors_of(model: Any) -> list[Tensor]:
    """A model's tensors as a header would declare them."""
    return [Tensor(name=name, dtype="F32", shape=tuple(tensor.shape)) for name, tensor in model.state_dict().items()]


def test_what_is_not_loaded_is_not_counted() -> None:
    """Layers beyond the configured ones, heads for further tokens, saved masks and rotary frequencies weigh nothing."""
    config = ModelConfig.read(transformers.LlamaConfig(num_hidden_layers=4, vocab_size=64).to_dict())
    plain = tensors_of(make("llama"))
    strays = [
        Tensor(name="model.layers.4.self_attn.k_proj.weight", dtype="F32", shape=(16, 16)),
        Tensor(name="mtp.layers.0.mlp.up_proj.weight", dtype="F32", shape=(16, 16)),
        Tensor(name="model.layers.0.self_attn.rotary_emb.inv_freq", dtype="F32", shape=(4,)),
        Tensor(name="model.layers.0.attn.bias", dtype="F32", shape=(1, 1, 128, 128)),
    ]
    assert weigh([*plain, *strays], config, "float32") == weigh(plain, config, "float32")


def test_copies_of_a_shared_embedding_count_once() -> None:
    """Older T5 files hold the shared matrix once more for the encoder and once for the decoder."""
    config = ModelConfig.read(transformers.T5Config(num_layers=2, num_decoder_layers=4).to_dict())
    copies = [name for name in make("t5").state_dict() if name.endswith("coder.embed_tokens.weight")]
    assert len(copies) == 2
    weights = weigh(tensors_of(make("t5")), config, "float32")
    assert weights.embedding == VOCABULARY * 16 * 4


@pytest.mark.parametrize("is_copy", [True, False])
def test_a_head_saved_beside_a_tied_embedding_counts_where_it_differs(tmp_path: Path, is_copy: bool) -> None:
    """transformers ties what is equal, and keeps both of what is not; the numbers are read once, and never again."""
    model = save("llama-tied", tmp_path / "root" / "tied")
    weights = tmp_path / "root" / "tied" / "model.safetensors"
    tensors = load_file(weights)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head if is_copy else head + 1}, weights, metadata={"format": "pt"})
    digests = DigestCache(tmp_path / "digests.json")
    (profile,) = inspect_models(tmp_path / "root", digests)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "root" / "tied", dtype="auto")
    assert profile.weight_bytes == loaded_bytes(loaded) == loaded_bytes(model) + (0 if is_copy else head.numel() * 4)
    assert (profile.head_bytes == 0) is is_copy
    assert inspect_models(tmp_path / "root", DigestCache(tmp_path / "digests.json")) == (profile,)
    known = [json.loads(key) for key in json.loads((tmp_path / "digests.json").read_text())]
    assert sum(len(key) > 4 for key in known) == 2, "the two matrices, kept beside the files"


def test_a_head_beside_a_tied_embedding_counts() -> None:
    """Whether both are one cannot be read from a header: from that alone, memory is over-estimated."""
    config = ModelConfig.read(transformers.LlamaConfig(num_hidden_layers=4, tie_word_embeddings=True).to_dict())
    assert weigh(tensors_of(make("llama")), config, "float32").head == VOCABULARY * 16 * 4


@pytest.mark.parametrize("family", ["gemma3-text", "gpt-oss"])
def test_configurations_older_than_layer_types_alternate_as_transformers_does(models: Mapping[str, Any], family: str) -> None:
    """Without the list of layer types the family's own pattern decides."""
    config = {**models[family].config.to_dict(), "layer_types": None}
    layers = weigh(tensors_of(models[family]), ModelConfig.read(config), "float32").layer_tensors
    listed = row_state(ModelConfig.read(models[family].config.to_dict()), layers, "float32")
    assert row_state(ModelConfig.read(config), layers, "float32") == listed
    assert listed.sliding_per_token > 0


def test_what_a_configuration_leaves_to_defaults_is_read_from_shapes(models: Mapping[str, Any]) -> None:
    """Gemma's own files name neither heads nor their width nor layer types: transformers fills them in, and so do we."""
    whole = models["gemma3-text"].config.to_dict()
    kept = ("architectures", "hidden_size", "intermediate_size", "model_type", "num_hidden_layers", "sliding_window")
    bare = ModelConfig.read({name: whole[name] for name in kept})
    layers = weigh(tensors_of(models["gemma3-text"]), bare, "float32").layer_tensors
    assert row_state(bare, layers, "float32") == row_state(ModelConfig.read(whole), layers, "float32")


def test_a_window_that_is_switched_off_is_none() -> None:
    """qwen2 names a window that it does not use unless told to, and then only from a certain layer on."""
    plain = {**transformers.Qwen2Config(num_hidden_layers=4).to_dict(), "layer_types": None, "sliding_window": 8}
    off = row_state(ModelConfig.read({**plain, "use_sliding_window": False}), (), "float32")
    on = row_state(ModelConfig.read({**plain, "use_sliding_window": True, "max_window_layers": 3}), (), "float32")
    assert (off.sliding_per_token, off.window) == (0, None)
    assert on.full_per_token == 3 * on.sliding_per_token > 0


def test_packed_projections_say_nothing_of_widths() -> None:
    """Where weights are packed, or none are known, the configuration alone tells how wide keys and values are."""
    config = ModelConfig.read(FAMILIES["llama"]()[1].to_dict())
    packed = [
        Tensor(name=f"model.layers.{layer}.self_attn.{part}.weight", dtype="U8", shape=(7, 1))
        for layer in range(4)
        for part in ("k_proj", "v_proj")
    ]
    known = row_state(config, weigh(packed, config, "float32").layer_tensors, "float32")
    assert known == row_state(config, (), "float32")
    assert known.full_per_token == 4 * 2 * 2 * 8 * 4
