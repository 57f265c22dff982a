"""How does a program submit a job, see its plan, and read the results while they come?

Start the service first: `ollm-service up --models-dir demo/models`.
"""

from ollm_service import Client, GenerationConfig

with Client() as client:
    job = client.submit("sum-chat", ["12+30=", "25+17=", "28+14="], generation=GenerationConfig(max_new_tokens=8))
    print(job.plans[0].reason)  # known before anything runs
    for result in job.results():  # streams as micro-batches end
        print(result.custom_id, result.text)
