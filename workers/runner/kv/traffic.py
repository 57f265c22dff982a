"""What did a KV cache in files do?"""

from dataclasses import dataclass


@dataclass(slots=True)
class Traffic:
    """What went to the disk and came back, in bytes, all layers together.

    `pages_written` are those of paged files. `bytes_before_encoding`: what the bytes written were in memory. `tokens_evicted` are
    those of rows that left the window of a layer.
    """

    bytes_written: int = 0
    bytes_read: int = 0
    pages_written: int = 0
    bytes_before_encoding: int = 0
    tokens_evicted: int = 0
