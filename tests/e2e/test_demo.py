"""Is the demo's last job what it says: right answers from a model that really is larger than its memory limit?"""

import tempfile
from pathlib import Path

import pytest

from scripts.demo_offload import LAYERS, LIMIT_GB, ROWS, job_beyond_memory, most_memory


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_model_beyond_the_limit_answers_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All answers are right; layers came from disk, round after round, and no process that held the model exceeded the limit."""
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:  # more than a gigabyte, which is not to be kept
        shown = job_beyond_memory(Path(folder))
    assert shown.right >= 0.95 * ROWS
    assert shown.model_bytes > shown.limit_bytes == int(LIMIT_GB * 1024**3)
    placement, measured = shown.attempt.placement, shown.attempt.measured
    assert placement["tier"] == "layers streamed from disk"
    assert placement["layers_on_device"] + placement["layers_on_disk"] == LAYERS
    assert measured["layers_brought"] >= 2 * placement["layers_on_disk"] > 0
    layer_bytes = shown.model_bytes / LAYERS
    assert measured["weight_bytes_read"] == pytest.approx(measured["layers_brought"] * layer_bytes, rel=0.2)
    assert measured["peak_load_bytes"] > 0
    assert measured["peak_host_bytes"] <= most_memory(shown.attempt.measured) < shown.limit_bytes
    said = capsys.readouterr().out
    assert f"{shown.right} of {ROWS} answers are right" in said
    assert "What was quoted" in said
