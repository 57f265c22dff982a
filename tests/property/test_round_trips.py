"""Does everything that travels or is stored come back as it was?"""

import json
from typing import Any, get_args

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ollm_service.core.capabilities import Capabilities, LiveState
from ollm_service.core.leasing import AttemptReport
from ollm_service.core.options import GenerationConfig, RuntimeConfig
from ollm_service.core.plan import ResolvedModel, RuntimePlan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import Requirements, class_id
from ollm_service.core.wire import LENGTH_BYTES, Message, decode_message, encode_message, from_json, to_json
from tests.property import strategies as some


@given(some.runtime_plans())
def test_a_plan_survives_its_dictionary_and_json(plan: RuntimePlan) -> None:
    """plan → dict → JSON → dict → plan is the identity, for every plan that the invariants allow."""
    stored = json.loads(json.dumps(plan.as_dict()))
    assert RuntimePlan.from_dict(stored, resolved_model=plan.resolved_model) == plan


@given(st.data())
def test_stored_values_survive_json(data: st.DataObject) -> None:
    """What the store keeps as JSON is read back equal."""
    kind, strategy = data.draw(
        st.sampled_from(
            [
                (RuntimePlan, some.runtime_plans()),
                (ResolvedModel, some.resolved_models),
                (ModelProfile, some.profiles),
                (Capabilities, some.capabilities),
                (LiveState, some.live_states),
                (Requirements, some.requirements()),
                (RuntimeConfig, some.runtime_configs()),
                (GenerationConfig, some.generation_configs),
                (AttemptReport, some.reports),
            ]
        )
    )
    value: Any = data.draw(strategy)
    assert from_json(kind, json.loads(json.dumps(to_json(value)))) == value


@given(some.messages)
def test_every_message_survives_the_wire(message: Message) -> None:
    """A frame holds its length and decodes to the message that was sent."""
    frame = encode_message(message)
    body = frame[LENGTH_BYTES:]
    assert int.from_bytes(frame[:LENGTH_BYTES], "big") == len(body)
    assert decode_message(body) == message


def test_every_kind_of_message_is_tried() -> None:
    """The strategy draws from each class of the union, so that none is forgotten."""
    drawn: set[type] = set()

    @given(some.messages)
    @settings(max_examples=1000, derandomize=True, database=None, phases=[Phase.generate])
    def collect(message: Message) -> None:
        drawn.add(type(message))

    collect()
    assert drawn == set(get_args(Message))


@given(st.binary(max_size=200) | some.json_values.map(lambda value: json.dumps(value).encode()))
def test_anything_else_is_refused_in_one_way(body: bytes) -> None:
    """No bytes make the decoder raise anything but ValueError."""
    try:
        decode_message(body)
    except ValueError:
        return


@given(some.messages, st.data())
def test_a_damaged_message_is_read_or_refused_never_half_of_it(message: Message, data: st.DataObject) -> None:
    """With one field replaced by another JSON value, decoding gives a whole message or ValueError."""
    sent = json.loads(encode_message(message)[LENGTH_BYTES:])
    sent[data.draw(st.sampled_from(sorted(sent)))] = data.draw(some.json_values)
    try:
        received = decode_message(json.dumps(sent).encode())
    except ValueError:
        return
    assert decode_message(encode_message(received)[LENGTH_BYTES:]) == received


@given(some.runtime_configs(), some.generation_configs)
def test_options_survive_the_request(runtime: RuntimeConfig, generation: GenerationConfig) -> None:
    """What differs from the defaults is all that has to be sent."""
    assert RuntimeConfig.from_dict(json.loads(json.dumps(runtime.as_dict()))) == runtime
    assert GenerationConfig.from_dict(json.loads(json.dumps(generation.as_dict()))) == generation
    assert GenerationConfig().merged_with(generation.as_dict()) == generation


@given(some.requirements(), some.requirements())
def test_a_class_is_its_requirements(one: Requirements, other: Requirements) -> None:
    """Equal requirements have equal class ids, also after storage; different ones have different ids."""
    assert class_id(from_json(Requirements, to_json(one))) == class_id(one)
    assert (class_id(one) == class_id(other)) is (one == other)
