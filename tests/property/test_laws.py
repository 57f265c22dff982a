"""Which laws hold for every plan, fleet, expression and placement?"""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ollm_service.core.capabilities import Capabilities, LiveState
from ollm_service.core.errors import InvalidExpression, InvalidOption, InvalidReference, ModelNotFound, RequestError
from ollm_service.core.estimates import estimate_memory
from ollm_service.core.finalization import CannotFallBack, fall_back, finalize
from ollm_service.core.kv_selector import select_kv_strategy
from ollm_service.core.labels import Combination, Comparison, Expression, Negation, parse_expression, satisfies
from ollm_service.core.laying_out import takes_export
from ollm_service.core.layout import Layout
from ollm_service.core.lifecycle import Event, ExecutionState, IllegalTransition, JobState, job_state, step
from ollm_service.core.matching import Match, NoMatch, match, match_fleet
from ollm_service.core.options import GenerationConfig, KVCacheStrategy, RuntimeConfig
from ollm_service.core.passes import Applied, Failed, PassOutcome
from ollm_service.core.placement import MOST_ROWS, USABLE_FRACTION, Placement, RowBounds, Unplaceable, place
from ollm_service.core.plan import BackendId, PassId, RuntimePlan, SpecializationState
from ollm_service.core.planning import plan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.reference import parse_reference
from ollm_service.core.requirements import Requirements, demanded_passes, requirements_of
from ollm_service.core.resolution import HeldModel
from ollm_service.core.retry import LONGEST_BACKOFF_MS, Failure, GiveUp, Retry, decide
from tests.property import strategies as some

PLANNED = (SpecializationState.PLANNED,)


def refusal_of(call: Callable[[], object], kind: type[RequestError]) -> RequestError | None:
    """The error of this kind that the call raises, or none where it succeeds; any other error fails the test."""
    try:
        call()
    except kind as refusal:
        return refusal
    return None


# ---------------------------------------------------------------------------------------- matching


@given(some.requirements(), some.capabilities, st.data())
def test_a_requirement_added_never_makes_a_refused_worker_eligible(
    base: Requirements, worker: Capabilities, data: st.DataObject
) -> None:
    """Whatever clause is added to whatever requirements, the eligible workers can only become fewer."""
    defaults = Requirements(backend_id=base.backend_id)
    absent = [name for name in some.CLAUSES if getattr(base, name) == getattr(defaults, name)]
    if base.model_digest is not None or base.download is not None:
        absent = [name for name in absent if name not in {"model_digest", "download"}]
    if not absent:
        return
    name = data.draw(st.sampled_from(absent))
    narrowed = replace(base, **{name: data.draw(some.CLAUSES[name])})
    if isinstance(match(base, worker), NoMatch):
        assert isinstance(match(narrowed, worker), NoMatch)


def test_the_law_is_about_every_clause() -> None:
    """Whoever adds a field to the requirements adds it to what the law is tested with."""
    assert {item.name for item in fields(Requirements)} == {"backend_id", *some.CLAUSES}


@given(some.requirements(), some.capabilities, st.sampled_from(PassId), st.sampled_from(some.EXPRESSIONS))
def test_a_demand_that_is_widened_never_makes_a_refused_worker_eligible(
    base: Requirements, worker: Capabilities, pass_id: PassId, where: str
) -> None:
    """One more pass, more memory, more disk or a conjunction narrows."""
    for narrowed in (
        replace(base, passes=tuple(dict.fromkeys((*base.passes, pass_id)))),
        replace(base, memory_bytes=base.memory_bytes + 1),
        replace(base, offloaded_bytes=base.offloaded_bytes + 1),
        replace(base, cache_bytes=base.cache_bytes + 1),
        replace(base, adapter=True),
        replace(base, where=f"({base.where}) and ({where})" if base.where else where),
    ):
        if isinstance(match(base, worker), NoMatch):
            assert isinstance(match(narrowed, worker), NoMatch)


@given(some.requirements(), st.dictionaries(some.names, some.capabilities, max_size=4))
def test_a_fleet_match_names_every_worker_exactly_once(needs: Requirements, fleet: Mapping[str, Capabilities]) -> None:
    """Eligible or refused with reasons, never both, never neither."""
    found = match_fleet(needs, fleet)
    assert sorted([*found.eligible, *found.refused]) == sorted(fleet)
    assert all(refusal.reasons for refusal in found.refused.values())
    assert all(isinstance(match(needs, fleet[worker_id]), Match) for worker_id in found.eligible)


@given(some.requirements(), some.capabilities)
def test_every_reason_names_its_own_shortfall(needs: Requirements, worker: Capabilities) -> None:
    """No reason is said twice."""
    found = match(needs, worker)
    if isinstance(found, NoMatch):
        assert len(set(found.reasons)) == len(found.reasons)


# ---------------------------------------------------------------------------------------- planning


@given(st.text(max_size=30), some.runtime_configs(), st.lists(some.profiles, max_size=3), st.data())
def test_planning_is_total(text: str, config: RuntimeConfig, models: list[ModelProfile], data: st.DataObject) -> None:
    """Any reference, options and fleet give a plan or one of the documented refusals; what is executable can be required."""
    inventory = [HeldModel(profile=model, workers=("w",)) for model in models]
    reference = data.draw(st.sampled_from([text, *(f"path:{model.path}" for model in models), "llama3-1B-chat", "org/name"]))
    try:
        found = plan(reference, inventory, config)
    except (InvalidReference, ModelNotFound):
        return
    assert found.plan.reason
    assert found.profile is None or found.profile.is_usable
    assert found.plan.resolved_model.digest == (found.profile.digest if found.profile else None)
    if not found.plan.is_executable():
        assert found.plan.specialization_state is SpecializationState.NOT_PLANNED
        return
    needs = requirements_of(found.plan, found.profile, config)
    assert set(needs.passes) <= set(found.plan.specialization_pass_ids)
    if config.backend is not None:
        assert found.plan.backend_id == config.backend
    wanted = config.demanded_kv_strategy
    assert wanted in (None, KVCacheStrategy.RESIDENT) or PassId.DISK_CACHE in needs.passes


@given(st.lists(some.profiles, min_size=1, max_size=4), some.runtime_configs(), st.randoms())
def test_planning_does_not_depend_on_the_order_of_the_inventory(
    models: list[ModelProfile], config: RuntimeConfig, random: Any
) -> None:
    """Two coordinators that read the same fleet pin the same digest."""
    inventory = [HeldModel(profile=model, workers=(f"w{number}",)) for number, model in enumerate(models)]
    shuffled = list(inventory)
    random.shuffle(shuffled)
    reference = f"path:{models[0].path}"

    def digest(order: list[HeldModel]) -> str | None:
        try:
            return plan(reference, order, config).plan.resolved_model.digest
        except ModelNotFound:
            return None

    assert digest(inventory) == digest(shuffled)


# ---------------------------------------------------------------------------------------- finalization


@given(some.runtime_plans(PLANNED), some.pass_outcomes, some.details)
def test_every_planned_pass_is_accounted_for_once(
    planned: RuntimePlan, outcomes: Mapping[PassId, PassOutcome], details: Mapping[str, str]
) -> None:
    """A plan is applied only if each planned pass and no other ended, none failed, and then each is in the details once."""
    is_complete = set(outcomes) == set(planned.specialization_pass_ids)
    is_sound = not any(isinstance(outcome, Failed) for outcome in outcomes.values())
    try:
        found = finalize(planned, outcomes, details)
    except ValueError:
        assert not (is_complete and is_sound)
        return
    assert is_complete
    assert is_sound
    assert found.specialization_state is SpecializationState.APPLIED
    applied = {pass_id for pass_id in planned.specialization_pass_ids if isinstance(outcomes[pass_id], Applied)}
    assert set(found.applied_specialization_pass_ids) == applied
    for pass_id in planned.specialization_pass_ids:
        ended_as = found.details[f"pass_{pass_id.value.replace('-', '_')}"]
        assert ended_as.startswith("applied(") is (pass_id in applied)
    assert {item.name for item in fields(found) if getattr(found, item.name) != getattr(planned, item.name)} <= {
        "specialization_applied",
        "specialization_state",
        "applied_specialization_pass_ids",
        "details",
    }


@given(some.runtime_plans(), some.runtime_configs(), some.pass_outcomes, some.texts, some.texts)
def test_a_fallback_is_generic_and_keeps_the_record(
    tried: RuntimePlan, config: RuntimeConfig, outcomes: Mapping[PassId, PassOutcome], reason: str, error_type: str
) -> None:
    """Whatever may fall back becomes a plan that runs generically, remembers, and cannot fall back again."""
    demanded = demanded_passes(tried, config)
    found = fall_back(tried, config, outcomes, reason=reason, error_type=error_type, demanded=demanded)
    if isinstance(found, CannotFallBack):
        assert found.reason
        return
    assert tried.specialization_state is SpecializationState.PLANNED
    assert config.backend is None
    assert not demanded
    assert found.backend_id == BackendId.TRANSFORMERS_GENERIC
    assert found.specialization_pass_ids == tried.specialization_pass_ids
    assert found.fallback_reason == reason
    assert found.resolved_model == tried.resolved_model
    again = fall_back(found, config, outcomes, reason=reason, error_type=error_type, demanded=demanded)
    assert isinstance(again, CannotFallBack)


# ---------------------------------------------------------------------------------------- placement


@given(
    some.runtime_plans(PLANNED),
    some.profiles,
    some.runtime_configs(),
    some.capabilities,
    some.live_states,
    st.integers(1, 2**21),
    st.none() | st.integers(1, 100),
)
def test_a_placement_fits_and_everything_refused_did_not(
    native: RuntimePlan,
    model: ModelProfile,
    config: RuntimeConfig,
    worker: Capabilities,
    live: LiveState,
    tokens: int,
    limit: int | None,
) -> None:
    """What is chosen fits into nine tenths of what is free and keeps the limit; each refused tier is short of bytes."""
    needs = requirements_of(native, model, config)
    found = place(native, model, config, needs, worker, live, RowBounds(longest=tokens), micro_batch_limit=limit)
    for tier in found.refused:
        assert tier.needed_bytes > tier.free_bytes or tier.short_of is None
        assert tier.reason
    if isinstance(found, Unplaceable):
        return
    assert found.estimate.device_bytes <= live.device_free_bytes[found.device_id] * USABLE_FRACTION
    assert found.estimate.disk_bytes <= live.cache_free_bytes + live.begun_bytes.get(model.digest, 0)
    leaves = bool(found.host_layers or found.disk_layers)
    assert bool(found.estimate.extents) == (leaves and not takes_export(native) and model.digest not in live.laid_out)
    assert found.estimate.host <= live.host_free_bytes * USABLE_FRACTION
    assert found.estimate.loading <= max(live.host_free_bytes, live.device_free_bytes[found.device_id]) * USABLE_FRACTION
    assert found.layers_on_device + found.layers_in_host + found.layers_on_disk == model.layer_count
    assert 1 <= found.micro_batch <= min(MOST_ROWS, limit or MOST_ROWS)
    assert config.demanded_kv_strategy in (None, found.kv_cache_strategy)
    assert config.device is None or found.device_id.startswith(config.device)


def rank(found: Placement | Unplaceable) -> tuple[int, int]:
    """How good a placement is: fewer tiers refused before it, then more rows at a time; none is worst."""
    return (-len(found.refused), found.micro_batch) if isinstance(found, Placement) else (-100, 0)


@given(
    some.runtime_plans(PLANNED),
    some.profiles,
    some.runtime_configs(),
    some.capabilities,
    some.live_states,
    st.integers(1, 2**17),
    st.integers(0, 2**34),
    st.sampled_from(some.DEVICE_IDS),
)
def test_more_free_memory_never_places_worse(
    native: RuntimePlan,
    model: ModelProfile,
    config: RuntimeConfig,
    worker: Capabilities,
    live: LiveState,
    tokens: int,
    more: int,
    device_id: str,
) -> None:
    """Freeing memory or disk, or laying the weights out, keeps the tier or a better one, and there at least as many rows."""
    needs = requirements_of(native, model, config)

    def placed(state: LiveState) -> Placement | Unplaceable:
        return place(native, model, config, needs, worker, state, RowBounds(longest=tokens))

    free = {**live.device_free_bytes, device_id: live.device_free_bytes.get(device_id, 0) + more}
    freer = replace(live, device_free_bytes=free, cache_free_bytes=live.cache_free_bytes + more)
    freer = replace(freer, host_free_bytes=live.host_free_bytes + more)
    assert rank(placed(freer)) >= rank(placed(live))
    assert rank(placed(replace(live, laid_out=live.laid_out | {model.digest}))) >= rank(placed(live))


@given(some.profiles, st.sampled_from(KVCacheStrategy), st.integers(1, 64), st.integers(1, 2**17))
def test_estimates_grow_with_rows_and_tokens(model: ModelProfile, strategy: KVCacheStrategy, rows: int, tokens: int) -> None:
    """More to do never needs less of the device, of host memory or of the disk."""
    layout = Layout(kv=strategy)
    base = estimate_memory(model, layout, rows=rows, tokens=tokens)
    for larger in (
        estimate_memory(model, layout, rows=rows + 1, tokens=tokens),
        estimate_memory(model, layout, rows=rows, tokens=tokens + 1),
    ):
        assert larger.device_bytes >= base.device_bytes
        assert (larger.host, larger.disk) >= (base.host, base.disk)


@given(some.runtime_plans(PLANNED), some.runtime_configs(), some.capabilities)
def test_the_selector_chooses_what_the_worker_has_unless_told(
    native: RuntimePlan, config: RuntimeConfig, worker: Capabilities
) -> None:
    """A demanded strategy is kept; otherwise the choice is resident or offered by the worker."""
    found = select_kv_strategy(native, config, worker, worker.main_device)
    if config.demanded_kv_strategy is not None:
        assert found.strategy is config.demanded_kv_strategy
    elif found.strategy is not KVCacheStrategy.RESIDENT:
        assert worker.kv_strategies.get(found.strategy, "not known") is None


# ---------------------------------------------------------------------------------------- labels


def render(expression: Expression) -> str:
    """The expression as text, with parentheses wherever they could matter."""
    if isinstance(expression, Comparison):
        value = f'"{expression.value}"' if isinstance(expression.value, str) else f"{expression.value:.6f}"
        return f"{expression.name} {expression.sign} {value}"
    if isinstance(expression, Negation):
        return f"not ({render(expression.operand)})"
    word = " and " if expression.is_and else " or "
    return word.join(f"({render(operand)})" for operand in expression.operands)


comparisons: st.SearchStrategy[Expression] = st.builds(
    Comparison,
    name=st.sampled_from(["zone", "rack", "missing"]),
    sign=st.sampled_from(["==", "!=", "<", "<=", ">", ">="]),
    value=st.sampled_from(["a", "b"]) | st.integers(-2, 4).map(float),
)
expressions: st.SearchStrategy[Expression] = st.recursive(
    comparisons,
    lambda inner: (
        st.builds(Negation, operand=inner)
        | st.builds(Combination, is_and=st.booleans(), operands=st.lists(inner, min_size=2, max_size=3).map(tuple))
    ),
    max_leaves=6,
)
attributes = st.dictionaries(st.sampled_from(["zone", "rack"]), st.sampled_from(["a", "b"]) | st.integers(-2, 4).map(float))


@given(expressions, attributes)
def test_an_expression_means_what_its_text_means(expression: Expression, here: dict[str, str | float]) -> None:
    """Written out and parsed, it evaluates the same."""
    assert parse_expression(render(expression)).evaluate(here) is expression.evaluate(here)


@given(expressions, expressions, attributes)
def test_de_morgan_holds_for_three_values(one: Expression, other: Expression, here: dict[str, str | float]) -> None:
    """not (a and b) is (not a) or (not b), unknown included; and a double negation is none."""
    both = Combination(is_and=True, operands=(one, other))
    either = Combination(is_and=False, operands=(Negation(operand=one), Negation(operand=other)))
    assert Negation(operand=both).evaluate(here) is either.evaluate(here)
    assert Negation(operand=Negation(operand=one)).evaluate(here) is one.evaluate(here)


@given(expressions, attributes, st.sampled_from(["zone", "rack"]), st.sampled_from(["a", 1.0]))
def test_learning_an_attribute_never_turns_certainty_over(
    expression: Expression, here: dict[str, str | float], name: str, value: str | float
) -> None:
    """What held, or failed, without a label holds, or fails, whatever that label turns out to be."""
    if name not in here and (before := expression.evaluate(here)) is not None:
        assert expression.evaluate({**here, name: value}) is before


@given(expressions, attributes)
def test_an_expression_and_its_negation_never_both_match(expression: Expression, here: dict[str, str | float]) -> None:
    """Both may fail to match: where a label is missing, neither is certain."""
    text = render(expression)
    assert not (satisfies(text, here) and satisfies(f"not ({text})", here))


@given(st.text(max_size=60) | st.text('()<>=!"and or not 12.zone', max_size=60))
def test_the_parser_raises_one_error_only(text: str) -> None:
    """Any text is an expression or an InvalidExpression with a printable message."""
    refusal = refusal_of(lambda: parse_expression(text).evaluate({}), InvalidExpression)
    assert refusal is None or refusal.message.isprintable()


# ---------------------------------------------------------------------------------------- references and options


@given(st.text(max_size=60) | st.text("./\\~@:-ahf pt", max_size=30))
def test_no_reference_leaves_the_models_root(text: str) -> None:
    """Whatever is accepted is printable, and neither its path nor its folder climbs or starts elsewhere."""
    if (refusal := refusal_of(lambda: parse_reference(text), InvalidReference)) is not None:
        assert refusal.message.isprintable()
        return
    found = parse_reference(text)
    assert found.raw.isprintable()
    assert "/" not in found.directory_name
    if found.local_path is not None:
        parts = found.local_path.split("/")
        assert not {"", ".", ".."} & set(parts)
        assert parse_reference(f"path:{found.local_path}").local_path == found.local_path
    if found.is_hub_id:
        assert ".." not in found.identifier


@given(some.json_objects | some.json_values)
def test_options_accept_or_refuse_with_one_error(data: Any) -> None:
    """No JSON value makes options raise anything but InvalidOption."""
    for kind in (RuntimeConfig, GenerationConfig):
        for candidate in (data, *({item.name: data} for item in fields(kind))):
            refusal = refusal_of(partial(kind.from_dict, candidate), InvalidOption)
            assert refusal is None or (refusal.param and refusal.message.isprintable())


# ---------------------------------------------------------------------------------------- lifecycle and retry


@given(st.lists(st.sampled_from(Event), max_size=30))
def test_no_history_leaves_a_final_state(events: list[Event]) -> None:
    """Whatever happens, in whatever order, a final plan stays as it is."""
    state = ExecutionState.QUEUED
    for event in events:
        was_final = state.is_final
        try:
            state = step(state, event)
        except IllegalTransition:
            continue
        assert not was_final


@given(st.lists(st.sampled_from(ExecutionState), min_size=1), st.randoms())
def test_a_jobs_state_does_not_depend_on_order_or_number(states: list[ExecutionState], random: Any) -> None:
    """Only which states there are counts; the job is final exactly when all its plans are."""
    shuffled = [*states, *states]
    random.shuffle(shuffled)
    assert job_state(shuffled) is job_state(states)
    assert job_state(states).is_final is all(state.is_final for state in states)
    assert (job_state(states) is JobState.SUCCEEDED) is (set(states) == {ExecutionState.SUCCEEDED})


@given(st.integers(1, 10), st.booleans(), st.floats(0, 1, exclude_max=True))
def test_retries_end_and_wait_within_bounds(failures: int, is_permanent: bool, drawn: float) -> None:
    """At most three tries without progress, each wait within the longest."""
    found = decide(Failure(code="c", message="m", is_permanent=is_permanent), failures, lambda: drawn)
    assert isinstance(found, GiveUp) is (is_permanent or failures >= 3)
    if isinstance(found, Retry):
        assert 0 <= found.after_ms < LONGEST_BACKOFF_MS
