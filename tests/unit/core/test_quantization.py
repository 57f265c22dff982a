"""What follows for a plan from packed weights, and what do they weigh?"""

from typing import Any

import pytest

from ollm_service.core.matching import Match, NoMatch, match
from ollm_service.core.model_config import ModelConfig
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.plan import BackendId
from ollm_service.core.quantization import QUANTIZATION_LIBRARIES, fewest_bits, quantization_of
from ollm_service.core.requirements import requirements_of
from ollm_service.core.tensors import Tensor
from ollm_service.core.weights import weigh
from tests.unit.core.samples import capabilities, planned, profile


@pytest.mark.parametrize("method", QUANTIZATION_LIBRARIES)
def test_packed_weights_run_generically_where_their_library_is(method: str) -> None:
    """No specialization, with the method as its reason; a worker without the library is refused by name."""
    model = profile(quantization=method)
    plan = planned(model=model)
    assert plan.backend_id == BackendId.TRANSFORMERS_GENERIC
    assert f"weights quantized by {method} rule specialization out" in plan.reason
    needs = requirements_of(plan, model, RuntimeConfig())
    lacking = f"{QUANTIZATION_LIBRARIES[method][0]} is not installed on this worker"
    assert match(needs, capabilities(models=(model,), quantizations={method: None})) == Match()
    assert match(needs, capabilities(models=(model,), quantizations={method: lacking})) == NoMatch(
        reasons=(f"weights quantized by {method}: {lacking}",)
    )
    assert match(needs, capabilities(models=(model,))) == NoMatch(
        reasons=(f"weights quantized by {method}: not known to this worker",)
    )


def test_mxfp4_takes_no_library() -> None:
    """Every worker unpacks it, so that the plan may be native and asks for nothing."""
    model = profile(quantization="mxfp4")
    plan = planned(model=model)
    assert plan.backend_id == BackendId.OPTIMIZED_NATIVE
    assert requirements_of(plan, model, RuntimeConfig()).quantization is None


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True, "quant_method": None}, "bitsandbytes"),
        ({"load_in_8bit": "yes"}, None),
        ({}, None),
    ],
)
def test_a_method_is_known_by_its_name(scheme: dict[str, Any], method: str | None) -> None:
    """Older files of bitsandbytes name none, and are known by how they were made."""
    assert quantization_of(scheme) == method


@pytest.mark.parametrize(
    ("groups", "bits"),
    [
        ({"a": {"weights": {"num_bits": 8}}, "b": {"weights": {"num_bits": 4}}}, 4),
        ({"a": {"weights": {"num_bits": 8}}}, 8),
        ({"a": {"weights": None}, "b": None, "c": {"weights": {"num_bits": "8"}}, "d": {"weights": {"num_bits": True}}}, 4),
        (None, 4),
    ],
)
def test_the_fewest_bits_of_all_groups_count(groups: Any, bits: int) -> None:
    """So that memory is never counted too low; hostile schemes count as 4 bits."""
    assert fewest_bits({"config_groups": groups}) == bits


@pytest.mark.parametrize(
    ("scheme", "dtype", "name", "shape", "plain"),
    [
        ({"num_bits": 4}, "I32", "weight_packed", (8, 4), 8 * 32),
        ({"num_bits": 8}, "I32", "weight_packed", (8, 4), 8 * 16),
        ({"num_bits": 4}, "U8", "weight_packed", (8, 16), 8 * 32),
        ({"num_bits": 8}, "I8", "weight", (8, 32), 8 * 32),
        ({"num_bits": 8}, "F8_E4M3", "weight", (8, 32), 8 * 32),
        ({"num_bits": 8}, "BF16", "weight_scale", (8, 1), 0),
        ({"num_bits": 4}, "I64", "weight_shape", (2,), 0),
        ({"num_bits": 8}, "BF16", "input_scale", (1,), 0),
    ],
)
def test_what_is_unpacked_weighs_as_plain_weights(
    scheme: dict[str, Any], dtype: str, name: str, shape: tuple[int, ...], plain: int
) -> None:
    """Each packed number becomes one of the model's dtype; what says how to unpack it is gone then."""
    quantization = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": scheme}}}
    config = ModelConfig.read({"num_hidden_layers": 1, "quantization_config": quantization})
    found = weigh([Tensor(name=f"model.layers.0.mlp.up_proj.{name}", dtype=dtype, shape=shape)], config, "bfloat16")
    assert (found.total, found.parameter_count) == (2 * plain, plain)
