"""What has been answered so far? Results in the order in which they were committed."""

from sqlalchemy import Connection, select

from ollm_service.core.errors import NotFound
from ollm_service.store.engine import Database
from ollm_service.store.mapping import result_view
from ollm_service.store.tables import job_rows, jobs, results
from ollm_service.store.views import ResultView


class Results:
    """Reading results."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def page(self, job_id: str, tenant_id: str, *, cursor: int = 0, limit: int = 1_000) -> list[ResultView]:
        """The results behind the cursor (0: from the first). Raises NotFound.

        Cursors are numbered under the job's lock, so that they appear in order and without gaps: who has read up to a cursor has
        missed nothing before it.
        """

        def work(connection: Connection) -> list[ResultView]:
            known = select(jobs.c.id).where(jobs.c.id == job_id, jobs.c.tenant_id == tenant_id)
            if connection.execute(known).one_or_none() is None:
                raise NotFound(f"There is no job {job_id}.")
            same = (job_rows.c.job_id == results.c.job_id) & (job_rows.c.row == results.c.row)
            query = select(results, job_rows.c.custom_id).join_from(results, job_rows, same)
            query = query.where(results.c.job_id == job_id, results.c.seq > cursor).order_by(results.c.seq).limit(limit)
            return [result_view(row) for row in connection.execute(query)]

        return self._database.read(work)
