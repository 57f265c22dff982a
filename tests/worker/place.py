"""Where do the worker's tests run? A folder with a database, models and caches; jobs put in by the store alone."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ollm_service.core.ids import new_id
from ollm_service.core.lifecycle import ExecutionState
from ollm_service.core.options import GenerationConfig, RuntimeConfig
from ollm_service.core.planning import plan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import requirements_of
from ollm_service.core.resolution import HeldModel
from ollm_service.inspection import DigestCache, inspect_models
from ollm_service.settings import Settings
from ollm_service.store.database import Store, open_database, upgrade
from ollm_service.store.submission import NewJob, NewPlan, NewRow
from ollm_service.store.views import PlanDetail
from tests.unit.model_folders import make_model
from tests.waiting import wait_for
from workers.agent import Agent
from workers.app import make_agent
from workers.attempt import Patience

SCRIPTED = (sys.executable, "-m", "tests.doubles.scripted_runner")
TENANT = "default"
SECONDS = 30.0


class Place:
    """A database, a models folder with the model `tiny`, and caches."""

    def __init__(self, directory: Path, database_url: str) -> None:
        self.directory = directory
        self.database_url = database_url
        self.models_dir = directory / "models"
        self.cache_dir = directory / "cache"
        make_model(self.models_dir / "tiny")
        upgrade(database_url)
        self.store: Store = open_database(database_url)
        self.profile: ModelProfile
        self.use_model("tiny")

    def use_model(self, name: str) -> None:
        """Later jobs are for this model of the models folder."""
        found = {profile.name: profile for profile in inspect_models(self.models_dir, DigestCache())}
        self.profile = found[name]

    def close(self) -> None:
        """Let the database go."""
        self.store.close()

    def submit(
        self,
        *batches: Sequence[str],
        config: RuntimeConfig | None = None,
        where: str | None = None,
        priority: int = 0,
        max_new_tokens: int = 8,
    ) -> str:
        """A job with one plan record for each batch of prompts; returns its id."""
        config = config or RuntimeConfig()
        runtime_plan = plan(self.profile.name, [HeldModel(profile=self.profile, workers=("w",))], config).plan
        requirements = requirements_of(runtime_plan, self.profile, config, where=where)
        prompts = [prompt for batch in batches for prompt in batch]
        rows = [
            NewRow(
                row=number,
                custom_id=f"row-{number}",
                request={"prompt": prompt, "generation": {"max_new_tokens": max_new_tokens}},
            )
            for number, prompt in enumerate(prompts)
        ]
        plans, first = [], 0
        for batch in batches:
            numbers = tuple(range(first, first + len(batch)))
            first += len(batch)
            plans.append(
                NewPlan(
                    plan_id=_new_id("plan"),
                    rows=numbers,
                    runtime_plan=runtime_plan,
                    profile=self.profile,
                    config=config,
                    requirements=requirements,
                )
            )
        job = NewJob(
            job_id=_new_id("job"),
            model=self.profile.name,
            rows=rows,
            plans=plans,
            config=config,
            generation=GenerationConfig(),
            body_digest="x",
            inventory_seq=0,
            where=where,
            priority=priority,
        )
        return self.store.jobs.submit(job)[0].job_id

    def details(self, job_id: str) -> list[PlanDetail]:
        """The job's plans with their histories."""
        plans = self.store.jobs.plans(job_id, TENANT, limit=1_000)
        return [self.store.jobs.plan(view.plan_id, TENANT) for view in plans]

    def detail(self, job_id: str) -> PlanDetail:
        """The only plan of a job."""
        (detail,) = self.details(job_id)
        return detail

    def texts(self, job_id: str) -> dict[int, str | None]:
        """The answers by row, or `!code` for an error."""
        page = self.store.results.page(job_id, TENANT, limit=10_000)
        return {result.row: f"!{result.error.code}" if result.error else result.text for result in page}

    def wait_for_end(self, job_id: str, *, timeout: float = SECONDS) -> None:
        """Wait until every plan of the job is final."""
        wait_for(lambda: self.store.jobs.get(job_id, TENANT).state.is_final, timeout=timeout, what=f"the end of {job_id}")

    def wait_for_state(self, job_id: str, state: ExecutionState, *, timeout: float = SECONDS) -> None:
        """Wait until the first plan of the job is in this state."""
        wait_for(lambda: self.details(job_id)[0].plan.state == state, timeout=timeout, what=f"a plan of {job_id} that is {state}")

    def settings(self, **changes: Any) -> Settings:
        """The same for a worker in this process."""
        ours = {
            "database_url": self.database_url,
            "data_dir": self.directory,
            "models_dir": self.models_dir,
            "cache_dir": self.cache_dir,
            "runner_command": " ".join(SCRIPTED),
            "node": "here",
        }
        return Settings.load(**(ours | changes))

    @contextmanager
    def agent(
        self,
        *,
        patience: Patience | None = None,
        rescan_seconds: float = 30.0,
        on_end: Callable[[int], None] | None = None,
        **changes: Any,
    ) -> Iterator[Agent]:
        """A started agent in this process, ended at once at the end."""
        settings = self.settings(**changes)
        store = open_database(self.database_url, lease_ms=int(settings.lease_seconds * 1000))
        agent = make_agent(settings, _new_id("wkr"), store, on_end=on_end, patience=patience, rescan_seconds=rescan_seconds)
        agent.start()
        try:
            yield agent
        finally:
            agent.stop_now()
            assert agent.wait(timeout=SECONDS), "the agent did not end"
            store.close()

    def environment(self, **settings: str) -> Mapping[str, str]:
        """The `OLLM_*` variables of a worker process here."""
        ours = {
            "OLLM_DATABASE_URL": self.database_url,
            "OLLM_DATA_DIR": str(self.directory),
            "OLLM_MODELS_DIR": str(self.models_dir),
            "OLLM_CACHE_DIR": str(self.cache_dir),
            "OLLM_RUNNER_COMMAND": " ".join(SCRIPTED),
            "OLLM_NODE": "here",
        }
        return {**os.environ, **ours, **settings}


def _new_id(prefix: str) -> str:
    return new_id(prefix, now_ms=time.time_ns() // 1_000_000, random_bytes=os.urandom(10))
