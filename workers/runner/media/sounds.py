"""Are these bytes a sound, and which one? WAV files of whole numbers, read with the standard library.

N samples.
"""

import io
import wave

import numpy
from numpy.typing import NDArray

from workers.runner.prompts import RowRefused


def decode_sound(data: bytes, sampling_rate: int) -> NDArray[numpy.float32]:
    """The samples [N] from -1 to 1, channels averaged. Raises RowRefused for anything but a WAV file of this sampling rate."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError, RuntimeError, ValueError) as error:
        raise RowRefused("invalid_content", "A sound cannot be read; send a WAV file of whole numbers (PCM).") from error
    if rate != sampling_rate:
        raise RowRefused(
            "invalid_content", f"A sound has {rate:,} samples a second; this model takes {sampling_rate:,}: convert it first."
        )
    whole = len(frames) // (width * channels) * width * channels
    if not whole:
        raise RowRefused("invalid_content", "A sound is empty.")
    samples_N = _numbers(frames[:whole], width).reshape(-1, channels).mean(axis=1)
    return numpy.asarray(samples_N, dtype=numpy.float32)


def _numbers(frames: bytes, width: int) -> NDArray[numpy.float64]:
    """The numbers of all channels as fractions of full scale; those of one byte are unsigned, in the format's way."""
    octets = numpy.frombuffer(frames, dtype=numpy.uint8).reshape(-1, width)
    if width == 1:
        return (octets[:, 0].astype(numpy.float64) - 128) / 128
    value = octets[:, -1].astype(numpy.int8).astype(numpy.int64)  # the last byte has the sign
    for place in range(width - 2, -1, -1):
        value = value * 256 + octets[:, place]
    return value.astype(numpy.float64) / float(1 << (8 * width - 1))
