"""What would run where, and why not elsewhere? Asks for the plan of a model without running anything.

Start the service first: `ollm-service up --models-dir demo/models`.
"""

from ollm_service import Client, RuntimeConfig

with Client() as client:
    found = client.preview("sum-chat", RuntimeConfig(kv_cache_strategy="paged"), where="gpu_memory_gb >= 16")
    print(found.runtime_plan.backend_id, "because", found.runtime_plan.reason)
    for worker in found.workers:
        print(worker.node, "can run it" if worker.eligible else f"cannot: {'; '.join(worker.reasons)}")
