"""Which loop answers a micro-batch? That depends on how the model takes its prompt."""

from collections.abc import Sequence

from workers.runner import decoding, encoder_decoder, own_generate
from workers.runner.answers import Answer
from workers.runner.measurements import Measurements
from workers.runner.model import LoadedModel
from workers.runner.progress import Pulse
from workers.runner.prompts import EncodedRow


def generate(model: LoadedModel, rows: Sequence[EncodedRow], pulse: Pulse, measurements: Measurements) -> list[Answer]:
    """Answer the rows, which share one way of choosing tokens. Raises StopRequested between steps."""
    if model.has_encoder:
        return encoder_decoder.generate(model, rows, pulse, measurements)
    if model.feeds_itself:
        return own_generate.generate(model, rows, pulse, measurements)
    return decoding.generate(model, rows, pulse, measurements)
