"""paged: how does a KV cache live in files instead of memory?

Rules: after a prompt's forward pass all its keys and values are on disk; the tokens generated since are a tail in memory,
written as soon as they fill a page. What is written is released. Attention needs a sequence's whole history in a layer, so it
is read back for the time of that sequence's attention: the memory bound is one sequence's history in one layer. A prompt that a
layer computes in several blocks is in memory until the layer is done with it, and not read back for each.

A window makes a ring of it: pages of which no token is among the newest `window` are given back, and their places written again.

H key heads, L new tokens, T tokens so far, D head width.
"""

from collections import deque

from torch import Tensor

from ollm_service.core.layout import MOST_TAIL_BYTES, PAGE_TOKENS
from ollm_service.core.packing import MOST_TRIED_TOKENS
from workers.runner.kv.layer import Arrival, History, HistoryLayer, Text
from workers.runner.kv.pages import Page, PageFile
from workers.runner.kv.resident import Room
from workers.runner.kv.traffic import Traffic


class _Kept:
    """One sequence: pages on disk, oldest first, of which the first begins at token `first`, and the tail behind them."""

    __slots__ = ("evicted", "first", "pages", "tail")

    def __init__(self, tail: Room) -> None:
        self.pages: deque[Page] = deque()
        self.first = 0
        self.evicted = 0
        self.tail = tail

    @property
    def length(self) -> int:
        """All tokens that there were."""
        return self.tail.first + self.tail.used


class PagedLayer(HistoryLayer):
    """One layer's cache, for at most `rows` sequences of `tokens` tokens at a time, on which the size of its pages depends.

    The buffer into which a history is read belongs to `shared_room`, which all layers of a cache have together.
    """

    def __init__(
        self, pages: PageFile, traffic: Traffic, shared_room: "SharedRoom", *, rows: int, tokens: int, window: int | None = None
    ) -> None:
        self._file = pages
        self._traffic = traffic
        self._rows, self._tokens = rows, tokens
        self._shared_room = shared_room
        self._window = window
        self._page_tokens = 0
        self._kept: dict[Text, _Kept] = {}
        self._prompts: dict[Text, Room] = {}

    def append(self, arrival: Arrival, keys_HLD: Tensor, values_HLD: Tensor) -> None:
        """Take in new tokens; pages that were full before them are written now, since they may be taken back. Raises OSError."""
        kept = self._kept.get(arrival.sequence)
        if kept is None:
            kept = self._kept[arrival.sequence] = self._new(keys_HLD, values_HLD)
        if not arrival.is_prompt:
            if not kept.tail.capacity:
                kept.tail = self._tail(keys_HLD, values_HLD, kept.length)
            self._spill(kept)
            kept.tail.add(keys_HLD, values_HLD)
            self._evict(kept)
            return
        if arrival.start or arrival.more:
            room = self._prompts.get(arrival.sequence)
            if room is None:
                room = self._prompts[arrival.sequence] = Room(keys_HLD, values_HLD, keys_HLD.shape[-2] + arrival.more)
            room.add(keys_HLD, values_HLD)
        new = keys_HLD.shape[-2]
        done = self._skip(kept, arrival, new)
        while done < new:
            count = min(new - done, self._page_tokens - kept.tail.used)
            kept.tail.add(keys_HLD[:, done : done + count], values_HLD[:, done : done + count])
            done += count
            self._spill(kept)
        if not arrival.more:
            if kept.tail.used:
                self._write(kept, kept.tail.used)
            # A beginning that rows share never goes on; any other has a tail again with its next token.
            kept.tail = Room(keys_HLD, values_HLD, 0, kept.length)
        self._evict(kept)

    def history(self, sequence: Text) -> History:
        """All of a prompt that is being computed; else what is on disk, as far as it is in the window, and the tail."""
        prompt = self._prompts.get(sequence)
        if prompt is not None:
            if prompt.used == prompt.capacity:
                del self._prompts[sequence]
            return prompt.history()
        kept = self._kept[sequence]
        tail_keys, tail_values, first_of_tail = kept.tail.history()
        keys_HTD, values_HTD = self._shared_room.like(tail_keys, tail_values, kept.length - kept.first)
        at = 0
        for page in kept.pages:
            self._file.read(page, keys_HTD[:, at : at + page.tokens], values_HTD[:, at : at + page.tokens])
            at += page.tokens
        assert kept.first + at == first_of_tail
        keys_HTD[:, at:], values_HTD[:, at:] = tail_keys, tail_values
        unseen = 0 if self._window is None else max(0, keys_HTD.shape[1] - self._window)
        return History(keys_HTD[:, unseen:], values_HTD[:, unseen:], kept.first + unseen)

    def truncate(self, sequence: Text, tokens: int) -> None:
        """Forget the newest, which are all in the tail."""
        kept = self._kept[sequence]
        kept.tail.used = tokens - kept.tail.first

    def forget(self, sequence: Text) -> None:
        """Give the sequence's pages back."""
        self._prompts.pop(sequence, None)
        kept = self._kept.pop(sequence, None)
        for page in kept.pages if kept is not None else ():
            self._file.give_back(page)

    def close(self) -> None:
        """Close the files; deleting them is the folder's affair."""
        self._kept.clear()
        self._prompts.clear()
        self._file.close()

    def _new(self, keys_HLD: Tensor, values_HLD: Tensor) -> _Kept:
        if not self._page_tokens:
            a_token = (keys_HLD.nbytes + values_HLD.nbytes) // keys_HLD.shape[-2]
            self._page_tokens = max(1, min(PAGE_TOKENS, self._tokens, MOST_TAIL_BYTES // (a_token * self._rows)))
        return _Kept(self._tail(keys_HLD, values_HLD))

    def _tail(self, keys_HLD: Tensor, values_HLD: Tensor, first: int = 0) -> Room:
        """Room for a page, and for what may come in one pass before it is written."""
        return Room(keys_HLD, values_HLD, self._page_tokens + MOST_TRIED_TOKENS + 1, first)

    def _spill(self, kept: _Kept) -> None:
        """Write the pages that the tail has filled: several where pages are smaller than what is tried at a time."""
        while kept.tail.used >= self._page_tokens:
            self._write(kept, self._page_tokens)

    def _write(self, kept: _Kept, tokens: int) -> None:
        """Write the oldest tokens of the tail as a page."""
        tail = kept.tail
        kept.pages.append(self._file.write(tail.keys[:, :tokens], tail.values[:, :tokens], self._page_tokens))
        rest = tail.used - tokens
        for states in (tail.keys, tail.values) if rest else ():
            states[:, :rest] = states[:, tokens : tail.used].clone()
        tail.first, tail.used = tail.first + tokens, rest

    def _skip(self, kept: _Kept, arrival: Arrival, new: int) -> int:
        """How many of a prompt's new tokens need not be written, since no later token sees them."""
        if self._window is None or kept.pages or kept.tail.used:
            return 0
        skipped = min(new, max(0, arrival.start + new + arrival.more - self._window - kept.length))
        kept.first = kept.tail.first = kept.length + skipped
        return skipped

    def _evict(self, kept: _Kept) -> None:
        """Give back the pages that no later token sees."""
        if self._window is None:
            return
        out = max(0, kept.length - self._window)
        self._traffic.tokens_evicted += out - kept.evicted
        kept.evicted = out
        while kept.pages and kept.first + kept.pages[0].tokens <= out:
            page = kept.pages.popleft()
            kept.first += page.tokens
            self._file.give_back(page)


class SharedRoom:
    """A buffer for one history at a time. As tensors of their own, made and left in every layer of every pass, they would cost
    the pages of memory anew each time.
    """

    def __init__(self) -> None:
        self._room: Room | None = None

    def like(self, keys_HLD: Tensor, values_HLD: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values [H, tokens, D], of no content yet."""
        room = self._room
        if (
            room is None
            or room.capacity < tokens
            or room.keys.shape[::2] != keys_HLD.shape[::2]
            or room.values.shape[::2] != values_HLD.shape[::2]
            or room.keys.dtype != keys_HLD.dtype
        ):
            self._room = None  # before the next is made, so that there is never more than one
            room = self._room = Room(keys_HLD, values_HLD, tokens + PAGE_TOKENS)
        return room.keys[:, :tokens], room.values[:, :tokens]
