#!/usr/bin/env python3
"""See what every process is doing: Celery's event monitoring in one file, over UDP multicast, with no broker.

In a terminal:

    python eventmon.py demo                     what it looks like
    python eventmon.py watch                    a live table of tasks, workers and events
    python eventmon.py run -- make test         any command, as a task
    python eventmon.py send deploy-done id:=7   one event from a shell
    python eventmon.py check                    why nothing is to be seen, if so

In a program:

    from eventmon import Dispatcher
    events = Dispatcher()
    events.send("deploy-done", id=7)

How the data flows:

    Dispatcher.send -> JSON -> transmit window -> UDP multicast -> receive window -> Receiver -> State -> capture_events
                                    ^                                    |
                                    +------------ acks, NAKs ------------+

The words, each with one meaning (RFC 3208 and RFC 5740 have the multicast ones, Celery the others):

    event     a dict with a "type" ("task-started": group "task", subject "started") and a "timestamp"
    stream    everything that one Dispatcher sends in one process, in order; its name is 16 random hex digits
    datagram  a stream's datagrams have the sequence numbers (seq) 1, 2, 3, ...
    frame     a datagram of our own: a header line and a body
    window    what one side knows of a stream: the transmit window keeps what was sent, to repair it;
              the receive window restores the order and knows what is missing
    lead      the highest sequence number sent; trail is the lowest that can still be repaired
    beat      a heartbeat every quarter second: lead and trail; bye is the last one
    watcher   a Receiver, as a Dispatcher knows it. Its ack gives a position (everything up to there has arrived
              or is given up), its room (how many bytes more its buffer takes), how many datagrams it lost, and how
              many it has taken, of all streams: it advances as long as that number rises
    NAK       negative acknowledgement: an ack that also asks for what is missing; the sender repairs it, which is
              to send the same datagrams again
    task, worker, state     as in Celery
    view      what the user of the monitor has chosen to see: a page, which is a table of tasks, workers or events, and
              the panels open above it, with everything about one of these
    line      of the screen: a list of spans, (text, style), which take as many cells (columns of the terminal) as it has.
              A row is a line with what it stands for: in a table (identity, record), in a panel (line, link), where a
              link is what another panel would be about

The wire. A datagram is either bare JSON (an object with a "type", or an array of them), or a frame:

    EM2 data STREAM SEQ                              body: an event, or an array of events, as JSON
    EM2 part STREAM SEQ EVENT INDEX COUNT            body: piece INDEX (from 0) of COUNT of an event too big for one
    EM2 beat STREAM LEAD TRAIL                       also bye, the last; no body
    EM2 ack STREAM POSITION WATCHER ROOM LOST TAKEN  from a watcher, by unicast; also leave, its last; no body
    EM2 nak STREAM POSITION WATCHER ROOM LOST TAKEN  body: the sequence numbers missing, as in "7 9-12"

Fields are separated by one space, the header ends with a newline, numbers are decimal and below 10**19. With a
key, three more fields end the header: the time in seconds since the epoch, a serial number that rises with each frame
of a process, and 32 hex digits of the HMAC-SHA-256 of everything else.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import re
import select
import socket
import struct
import sys
import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict, deque, namedtuple
from contextlib import nullcontext, suppress
from contextvars import ContextVar
from functools import lru_cache, partial, wraps
from itertools import accumulate, chain, count, islice, repeat
from math import ceil, copysign, inf, isfinite
from weakref import WeakSet, finalize

TYPE_CHECKING = False  # as in typing, which costs a third of our import time
if TYPE_CHECKING:
    from collections.abc import Container, Generator, Iterable, Iterator, Mapping, Sequence
    from typing import Any, Callable, NoReturn, TypeVar

    Source = tuple[str, int]
    Ranges = list[tuple[int, int]]
    Span = tuple[str, str]
    Line = list[Span]
    Row = tuple[Line, Any]
    Text = Callable[[Mapping[str, Any], float], str]
    Function = TypeVar("Function", bound=Callable[..., Any])

__all__ = ["DEFAULT_URL", "Dispatcher", "Event", "LogHandler", "Receiver", "State", "capture_events", "main"]  # noqa: F822
__version__ = "0.2.0"

DEFAULT_URL = "udp://239.255.69.86:6986?interface=127.0.0.1&ttl=0"

# Limits that several parts share: sizes in bytes, times in seconds.
MAX_EVENT = 16 << 20  # bounds what a receiver puts together
MAX_DATAGRAM = 1400  # below Ethernet's MTU of 1,500, tunnels counted
MAX_LOOPBACK = 61440 if sys.platform == "linux" else 8192  # UDP's own limit is 65,507; macOS refuses above 9,216
MAX_HEADER = 160  # the longest header line, sealed
MAX_REPR = 1024  # characters of a task's arguments, result or exception
MAX_DEPTH = 32  # containers inside containers, and tasks inside tasks, that are looked into
HISTORY = 8 << 20  # what a Dispatcher keeps for repairs and late watchers: 30,000 usual events
BUFFER = 4 << 20  # asked of the kernel for a receiving socket: what comes in while Python does something else
ROOM = 1 << 20  # of a watcher's buffer that all senders together may fill
DATAGRAM_COST = 1024  # what the kernel charges a receive buffer for a datagram beside its bytes
BEAT = 0.25  # between two beats: a late watcher hears of every stream in this time
SILENCE = 3.0  # nobody who is silent for this long is alive
MAX_SLEEP = 0.2  # between two looks at what other threads have set


class WireError(Exception):
    """Bytes from the network that are not what they should be. Never raised to the user: counted, under this name."""

    counted = "malformed"


class Rejected(WireError):
    """A datagram whose sender has not proved that it knows the key, or that is not from where its stream is."""

    counted = "rejected"


class Skewed(Rejected):
    """A datagram sealed with the key, at a time that is not now: a replay, or a clock that is wrong."""


class Replay(WireError):
    """A sealed datagram that has been seen before."""

    counted = "duplicates"


# --- Event ------------------------------------------------------------------------------------------------------


def readable(value: Any) -> str:
    """Return the repr of any value, also of one whose repr fails or is no Unicode."""
    try:
        text = repr(value)
    except Exception as problem:  # noqa: BLE001 - it is the user's, and may be any
        text = f"<{type(value).__name__} whose repr raises {type(problem).__name__}>"
    return text.encode("utf-8", "backslashreplace").decode()


class Event(dict["str", "Any"]):
    """A dict with a "type", a non-empty str, and a "timestamp", seconds since the epoch, filled in if absent.

    `Event("task-started", {"uuid": "42"}, pid=7)`: fields from a mapping, from keywords or from both. ValueError
    for a type that is not a non-empty str.
    """

    __slots__ = ()

    def __init__(self, /, type: str, fields: Mapping[str, Any] | None = None, **more: Any) -> None:
        if not isinstance(type, str) or not type:
            raise ValueError(f"event type is {readable(type)}, expected a non-empty str")
        super().__init__(fields or {}, **more)
        self["type"] = type
        if "timestamp" not in self:
            self["timestamp"] = time.time()

    @property
    def type(self) -> str:
        """The whole type, as in "task-started"."""
        return self["type"]  # type: ignore[no-any-return]

    @property
    def timestamp(self) -> float:
        """When it happened, in seconds since the epoch."""
        return self["timestamp"]  # type: ignore[no-any-return]

    @property
    def group(self) -> str:
        """What stands before the type's first dash, as in "task"."""
        return self.type.partition("-")[0]

    @property
    def subject(self) -> str:
        """What stands after the type's first dash, as in "started"."""
        return self.type.partition("-")[2]


new_event = Event.__new__  # makes an empty one, for what is known to be an event


# --- JSON and the wire: what is parsed and what is formatted, side by side ----------------------------------------


def no_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity, which Python's json reads and JSON does not have."""
    raise ValueError(f"{name} is not JSON")


_scan = json.JSONDecoder(parse_constant=no_constant).scan_once  # type: ignore[attr-defined]
_encode: Callable[[Any, int], Iterable[str]]  # which json makes anew for every value; it keeps nothing between two
try:
    _c: Any = json.encoder
    _encode = _c.c_make_encoder(None, readable, _c.encode_basestring, None, ":", ",", False, False, False)
except (AttributeError, TypeError):  # a Python without it, or with another
    _encode = json.JSONEncoder(  # type: ignore[assignment]
        ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":"), default=readable
    ).iterencode


def parse_json(body: bytes) -> Any:
    """Return the one JSON value in `body`, or raise WireError."""
    try:
        text = body.decode().strip()
        value, end = _scan(text, 0)
    except StopIteration as stop:
        raise WireError(f"not JSON: no value at character {stop.value}") from None
    except (ValueError, RecursionError) as problem:
        raise WireError(f"not JSON: {problem}") from None
    if end != len(text):
        raise WireError(f"not JSON: more than one value, the second at character {end}")
    return value


def format_json(value: Any) -> bytes:
    """Return `value` as JSON in UTF-8; what JSON has no form for is sent as its repr."""
    try:
        return "".join(_encode(value, 0)).encode()
    except Exception:  # noqa: BLE001 - a key, NaN, a lone surrogate, a container inside itself, a class of the user's
        return "".join(_encode(plain(value), 0)).encode()


def plain(value: Any, above: tuple[int, ...] = (), left: Iterator[int] | None = None) -> Any:
    """Return `value` made of what JSON has.

    Containers are at most MAX_DEPTH deep and 100,000 in all, so that those which name each other have an end; `above` names
    those that `value` stands in.
    """
    left = left or iter(range(100_000))
    try:
        if value is None or isinstance(value, bool) or isinstance(value, int) and value.bit_length() < 4096:
            return value
        if isinstance(value, float) and isfinite(value):
            return value
        if isinstance(value, str):
            return value.encode("utf-8", "backslashreplace").decode()
        if isinstance(value, (dict, list, tuple)):
            if id(value) in above or len(above) == MAX_DEPTH or next(left, None) is None:
                return "{...}" if isinstance(value, dict) else "[...]"
            above += (id(value),)
            if isinstance(value, dict):
                keys = [(key, plain(key) if isinstance(key, str) else readable(key)) for key in value]
                return {text: plain(value[key], above, left) for key, text in keys}
            return [plain(item, above, left) for item in value]
    except Exception:  # noqa: BLE001, S110 - of the user's own class, which may still have a repr
        pass
    return readable(value)


def parse_event(value: Any) -> Event:
    """Return a parsed JSON value as an Event, or raise WireError."""
    if not isinstance(value, dict):
        raise WireError(f"a {type(value).__name__}, expected an object")
    kind = value.get("type")
    if not isinstance(kind, str) or not kind:
        raise WireError(f'"type" is {kind!r}, expected a non-empty string')
    event = new_event(Event)
    event.update(value)
    if "timestamp" not in value:
        event["timestamp"] = time.time()
    return event


def parse_events(body: bytes) -> list[Event]:
    """Return the events of the JSON object or array in `body`, or raise WireError."""
    value = parse_json(body)
    return [*map(parse_event, value)] if isinstance(value, list) else [parse_event(value)]


MAGIC = b"EM2"  # the version: EM1 and EM3 cannot be read
LAYOUT = {b"data": 1, b"part": 4, b"beat": 2, b"bye": 2, b"ack": 5, b"nak": 5, b"leave": 5}  # kind -> numbers
NAME = slice(9, 25)  # where the stream's name stands in a data frame

Frame = namedtuple("Frame", ["kind", "stream", "numbers", "body"])  # bytes, bytes, tuple of ints, bytes


def parse_frame(data: bytes) -> Frame:
    """Return the parts of a frame without a seal, or raise WireError."""
    head, newline, body = data.partition(b"\n")
    magic, *fields = head.split(b" ")
    if magic != MAGIC or not newline or len(fields) < 2:
        raise WireError(f"header is {head[:40]!r}, expected EM2 KIND STREAM NUMBER... and a newline")
    kind, stream, *numbers = fields
    expected = LAYOUT.get(kind)
    if expected is None:
        raise WireError(f"kind is {kind[:40]!r}, expected one of {b' '.join(LAYOUT).decode()}")
    if len(numbers) == expected + 3:
        raise Rejected("the stream is sealed with a key, and there is none here")
    if len(numbers) != expected or len(stream) != 16 or not stream.isalnum():
        raise WireError(f"a {kind.decode()} of {len(numbers)} numbers, expected {expected}, and 16 digits of stream")
    for digits in numbers:
        if len(digits) > 19 or not digits.isdigit():
            raise WireError(f"number is {digits[:40]!r}, expected up to 19 decimal digits")
    return Frame(kind, stream, tuple(map(int, numbers)), body)


def head_of(kind: bytes, stream: bytes) -> bytes:
    """Return how the frames of one kind begin in a stream: all that stands before the numbers."""
    return b"%b %b %b " % (MAGIC, kind, stream)


def format_frame(kind: bytes, stream: bytes, numbers: Iterable[int], body: bytes = b"") -> bytes:
    """Return a frame; the mirror of parse_frame."""
    return b"%b%b\n%b" % (head_of(kind, stream), b" ".join([b"%d" % n for n in numbers]), body)


_serials = count(1)


def mac_of(head: bytes, body: bytes, key: bytes) -> bytes:
    """Return 128 bits of HMAC-SHA-256 (RFC 2104) in hex."""
    import hmac

    return hmac.digest(key, b"%b\n%b" % (head, body), "sha256")[:16].hex().encode()


def unseal(data: bytes, key: bytes) -> tuple[bytes, int]:
    """Return a frame without its seal, and its serial number; Rejected if the seal is not good.

    Without a key there is no seal: the frame as it is, and 0.
    """
    if not key:
        return data, 0
    import hmac

    head, _, body = data.partition(b"\n")
    sealed, _, mac = head.rpartition(b" ")
    if not hmac.compare_digest(mac, mac_of(sealed, body, key)):
        raise Rejected("not sealed with this key")
    head, sent, serial = sealed.rsplit(b" ", 2)
    ahead = int(sent) - time.time()
    if abs(ahead) > 30:
        way = "ahead" if ahead > 0 else "behind"
        raise Skewed(f"sealed by a clock {abs(ahead):.0f} s {way} of this one, or sent again")
    return b"%b\n%b" % (head, body), int(serial)


def seal(frame: bytes, key: bytes) -> bytes:
    """Return a frame with the time, a serial number and its HMAC in the header; the mirror of unseal."""
    if not key:
        return frame
    head, _, body = frame.partition(b"\n")
    head = b"%b %d %d" % (head, time.time(), next(_serials))
    return b"%b %b\n%b" % (head, mac_of(head, body, key), body)


MAX_RANGES = 60  # in a NAK, so that it fits MAX_DATAGRAM


def parse_ranges(body: bytes) -> Ranges:
    """Return the (first, last) pairs of a NAK, or raise WireError."""
    ranges = []
    for word in body.split(b" ", MAX_RANGES)[:MAX_RANGES]:
        first, _, last = word.partition(b"-")
        last = last or first
        if not (first.isdigit() and last.isdigit() and len(first) < 20 and len(last) < 20):
            raise WireError(f"range is {word[:40]!r}, expected N or N-N")
        ranges.append((int(first), int(last)))
    return ranges


def format_ranges(ranges: Ranges) -> bytes:
    """Return the body of a NAK; the mirror of parse_ranges."""
    return b" ".join(b"%d" % first if first == last else b"%d-%d" % (first, last) for first, last in ranges)


# --- the windows: pure, no socket, no thread, no clock of their own -----------------------------------------------


class Watcher:
    """A Receiver as a TransmitWindow knows it."""

    __slots__ = ("address", "heard", "limit", "lost", "position", "serial", "taken", "waited")

    def __init__(self) -> None:
        self.position = -1  # everything up to this sequence number has arrived there, or is given up
        self.lost = 0  # datagrams of this stream that it gave up
        self.taken = -1  # datagrams of all streams that it has read
        self.limit = inf  # the cost up to which its buffer has room
        self.heard = -inf
        self.waited = 0.0  # seconds that send() has waited for it since it last advanced
        self.serial = -1  # of its last answer, with a key
        self.address: Source | None = None


class TransmitWindow:
    """What one stream has sent and can repair, and what its watchers have confirmed (RFC 3208, section 2.1).

    Pure: times are seconds of any clock that only goes forward. `limit` bounds what is kept, in bytes. The cost of a
    datagram is what it takes of a watcher's buffer. send() waits while `cost`, that of all datagrams so far, is above
    the `horizon`; `patient` is a sender that has nothing else to do. The half and the quarter of guarantee 4 are here.
    """

    MAX_WATCHERS = 64  # that are waited for
    FIRST_FLIGHT = 100 * (DATAGRAM_COST + 300)  # the cost that is sent before the first answer is waited for
    FIRST_ANSWER = QUARTER = 0.25  # how long it is waited for, and for a watcher that does not advance
    GRACE, LEAST_WAIT = 1.0, 0.01  # of waiting before it is counted against the program's own time; worth to begin

    def __init__(self, limit: int = HISTORY, patient: float = 0.0) -> None:
        self.limit = limit
        self.trail = 1
        self.next = 1
        self.cost = 0
        self.horizon: float = inf
        self.watchers: dict[int, Watcher] = {}
        self.opened_at = inf
        self.advanced_at = -inf  # when a watcher last did
        self._alive = max(SILENCE, patient)  # how long a watcher that is not heard is alive
        self._patient = patient > 0
        self._frames: dict[int, bytes] = {}  # from trail to lead
        self._gone = 0  # the cost of everything before trail
        self._credit = self.GRACE  # how much longer may be waited
        self._waited_until = -inf
        self._repaired: dict[int, float] = {}
        self._allowance: float = 0.0
        self._refilled = -inf

    def add(self, frame: bytes) -> None:
        """Keep the datagram that has the sequence number `next`."""
        seq = self.next
        self._frames[seq] = frame
        self.next = seq + 1  # from here on it counts as sent, whatever a signal handler raises
        self.cost += len(frame) + DATAGRAM_COST
        if not seq % 64:
            self._trim()

    def _trim(self) -> None:
        while self.cost - self._gone - DATAGRAM_COST * len(self._frames) > self.limit and self.trail < self.next - 1:
            self._gone += len(self._frames.pop(self.trail, b"")) + DATAGRAM_COST
            self.trail += 1

    def open(self, now: float) -> None:
        """Begin slowly: from now on the first answer is waited for."""
        self.opened_at = self.advanced_at = now
        self.look_ahead(now)

    def on_ack(self, name: int, position: int, room: int, lost: int, taken: int, now: float) -> bool:
        """Take note of what a watcher has confirmed, unless there are too many of them; False if it cannot be true."""
        if position >= self.next:
            return False
        watcher = self.watchers.get(name)
        if watcher is None:
            if len(self.watchers) >= self.MAX_WATCHERS:
                self.watchers = {name: known for name, known in self.watchers.items() if self._is_live(known, now)}
                if len(self.watchers) >= self.MAX_WATCHERS:
                    return True  # neither waited for nor counted, but helped
            watcher = self.watchers[name] = Watcher()
        if taken > watcher.taken:
            watcher.taken = taken
            watcher.waited = 0.0
            self.advanced_at = max(self.advanced_at, now)
        watcher.position = max(position, watcher.position)
        watcher.lost = max(lost, watcher.lost)
        watcher.limit = self._cost_at(watcher.position) + room
        watcher.heard = now
        self.look_ahead(now)
        return True

    def leave(self, name: int) -> None:
        """Wait no more for a watcher, but remember one that has everything."""
        if name in self.watchers:
            self.watchers[name].heard = -inf

    def live(self, now: float) -> list[Watcher]:
        """Return the watchers heard lately."""
        return [watcher for watcher in list(self.watchers.values()) if self._is_live(watcher, now)]

    def lacking(self, now: float) -> list[tuple[int, int]]:
        """Return for each live watcher how many datagrams it has not confirmed yet, and how many it has given up."""
        return [(self.next - 1 - watcher.position, watcher.lost) for watcher in self.live(now)]

    def complete(self, now: float) -> int:
        """Return how many watchers have everything, those that have left with it counted."""
        known = [watcher for watcher in self.watchers.values() if self._is_live(watcher, now) or watcher.heard == -inf]
        return sum(watcher.position == self.next - 1 and not watcher.lost for watcher in known)

    def waited(self, since: float, now: float) -> None:
        """Take note that send() has waited, in one thread or in several at the same time."""
        own = max(0.0, since - self._waited_until)
        span = now - max(since, self._waited_until)
        self._credit = min(self._credit + own, self.GRACE) - span
        self._waited_until = now
        for watcher in self.live(now):
            if watcher.limit < self.cost:
                watcher.waited += span
        self.look_ahead(now)

    def look_ahead(self, now: float) -> None:
        """Set the horizon: the cost at which a watcher that is waited for has no more room."""
        if not self.live(now) and self.opened_at <= now < self.opened_at + self.FIRST_ANSWER:
            self.horizon = self.FIRST_FLIGHT
        elif self._patient:
            self.horizon = min((watcher.limit for watcher in self.live(now)), default=inf)
        elif self._credit + now - self._waited_until < self.LEAST_WAIT:
            self.horizon = inf
        else:
            limits = (watcher.limit for watcher in self.live(now) if watcher.waited < self.QUARTER)
            self.horizon = min(limits, default=inf)

    def repairs(self, ranges: Ranges, room: int, now: float) -> list[bytes]:
        """Return the datagrams to send again for a NAK from a watcher that has `room`.

        At most 512 are looked at, which bounds the work for a NAK. Each is repaired once in 4 ms, however many watchers
        ask, and in 0.1 ms more for each one that is asked for: before they are all read, other watchers ask for them
        too. All together are at most 16 MiB a second, so that no NAK makes a Dispatcher flood the network.
        """
        burst, rate = 2 << 20, 16 << 20
        self._allowance = min(self._allowance + (now - self._refilled) * rate, burst)
        self._refilled = now
        known = (range(max(first, self.trail), min(last + 1, self.next)) for first, last in ranges)
        asked = list(islice((seq for run in known for seq in run if seq in self._frames), 512))
        hold = 0.004 + len(asked) * 0.0001
        if len(self._repaired) > 8192:
            self._repaired = {seq: then for seq, then in self._repaired.items() if now - then < 0.06}
        frames: list[bytes] = []
        for seq in asked:
            if now - self._repaired.get(seq, -inf) < hold:
                continue
            frame = self._frames[seq]
            if len(frame) > self._allowance or frames and len(frame) > room:  # one goes even where there is little room
                break
            room -= len(frame) + DATAGRAM_COST
            self._allowance -= len(frame)
            self._repaired[seq] = now
            frames.append(frame)
        return frames

    def _is_live(self, watcher: Watcher, now: float) -> bool:
        return now - watcher.heard < self._alive

    def _cost_at(self, position: int) -> float:
        """Return the cost of everything up to `position`; -inf where so much has come since that no room is left."""
        since = range(max(position + 1, self.trail), self.next)
        if len(since) > 4 * ROOM // DATAGRAM_COST:
            return -inf
        return self.cost - sum(len(self._frames.get(seq, b"")) + DATAGRAM_COST for seq in since)


class ReceiveWindow:
    """One stream as it arrives: puts it in order, once each, and knows what is missing (RFC 3208, section 2.1).

    Pure: `now` is seconds of any clock that only goes forward, `jitter` returns a number from 0 to 1, an item may
    be anything. The first one wanted is `start`: 1 for all of the stream that can still be had. At most `reach`
    missing datagrams are asked for at a time. Datagrams lost (given up), repaired and duplicate are added to `counts`,
    and bytes held back to "held", which several windows may share. What the sender could not repair any more when it
    was first heard is not lost.
    """

    MAX_HELD = 16 << 20  # bytes that all windows hold back while something before them is missing
    GIVE_UP = 0.9  # a gap is given up after this long: 1 s, less what it takes to notice
    NAK_DELAY = 0.001, 0.004  # before the first NAK: the datagram may only be out of order, or repaired for another
    NAK_RETRY = 0.005, 0.025  # before the second one, doubling up to the longest
    NAK_CREDIT = 6  # NAKs that each datagram of a stream earns it; without any it gets one a beat: forgers get no flood

    def __init__(self, start: int, now: float, jitter: Callable[[], float], counts: dict[str, int]) -> None:
        self.next = start  # everything before it is delivered, or given up
        self.end = start  # nothing is known to be sent from here on
        self.lost = 0
        self.size = 0  # bytes held back
        self.reach = 16
        self.nak_at = inf  # when to ask for what is missing
        self._held: dict[int, tuple[Any, int]] = {}
        self._known: deque[tuple[float, int]] = deque()  # (time, end): at that time all before end was known to be sent
        self._delivered_at = self._repaired_at = now
        self._asked = start - 1  # everything missing up to here has been asked for
        self._tries = 0
        self._credit = 0
        self._trail = 0  # of the sender: nothing before it can be had; 0 until it is heard
        self._jitter = jitter
        self._counts = counts

    def in_order(self, seq: int) -> bool:
        """Take `seq` if it is the next to be delivered and nothing is missing, as nearly always."""
        if seq == self.next == self.end:
            self.next = self.end = seq + 1
            return True
        return False

    def receive(self, seq: int, item: Any, size: int, now: float) -> list[Any]:
        """Take a datagram of `size` bytes; return the items that may now be delivered, in order."""
        if seq < self.next or seq in self._held:
            self._counts["duplicates"] += 1
            return []
        if seq < self.end:
            self._repaired_at = now
            self._counts["repaired"] += seq <= self._asked
            self._tries = 0
            self.nak_at = now if seq == self._asked else max(self.nak_at, now + self.NAK_RETRY[0])
        self._expect(seq, now)
        if seq == self.next or self._counts["held"] + size <= self.MAX_HELD:
            self._held[seq] = item, size
            self.size += size
            self._counts["held"] += size
        return self._deliver(now)  # what there is no room for will be asked for again

    def announce(self, lead: int, trail: int, now: float) -> list[Any]:
        """Take a beat: there is data up to `lead`, and none can be had from before `trail`."""
        items = []
        if not self._trail and self.next < trail <= lead + 1:  # it was gone before we came
            self.next = min([trail, *self._held])
            self.end = max(self.end, trail)
            items = self._deliver(now)
        self._trail = max(self._trail, trail)
        self._expect(lead, now)
        if self.next < self.end:
            self.nak_at = min(self.nak_at, now + self.NAK_RETRY[0])  # the sender listens; after a goodbye not for long
        return items

    def forget(self, trail: int) -> None:
        """Know that nothing can be had from before `trail`, of a stream whose beats have been heard before."""
        if self._trail:
            self._trail = max(self._trail, trail)

    def gone(self) -> int:
        """Return how many of those not delivered yet can be had no more, unless they have arrived unread."""
        return max(0, self._trail - self.next)

    def missing(self, now: float) -> Ranges:
        """Return what to send a NAK for now."""
        if now < self.nak_at:
            return []
        ranges, reach = [], self.reach
        for first, last in islice(self._gaps(), 256):
            last = min(last, first + reach - 1)
            ranges.append((first, last))
            self._asked = max(self._asked, last)
            reach -= last - first + 1
            if not reach:
                break
        soonest, latest = self.NAK_RETRY if self._credit else (BEAT, BEAT)
        pause = min(soonest * 2**self._tries, latest) * (0.75 + self._jitter() / 2)
        self._credit = max(0, self._credit - 1)
        self._tries = min(self._tries + 1, 10)
        self.nak_at = now + pause if ranges else inf
        return ranges

    def overdue(self, now: float) -> list[Any]:
        """Give up what cannot be had, or is missing for too long; return the items that may now be delivered."""
        items = []
        for first, last in list(self._gaps()) if now >= self.give_up_at() else ():
            while first <= last and now >= self.give_up_at():
                gone = min(last, self._trail - 1) if first < self._trail else last
                self.lost += gone - first + 1
                self._counts["lost"] += gone - first + 1
                first = self.next = gone + 1
                items += self._deliver(self._delivered_at)
            if first <= last:
                break
        return items

    def give_up_at(self) -> float:
        """Return when the first gap is beyond repair, inf if there is none.

        That is a second after it was known, and after it became the first or anything else was repaired.
        """
        if self.next == self.end:
            return inf
        if self.next < self._trail:
            return -inf
        return max(self._known[0][0], min(self._delivered_at, self._repaired_at)) + self.GIVE_UP

    def _gaps(self) -> Iterator[tuple[int, int]]:
        first = self.next
        for seq in sorted(self._held):
            if seq > first:
                yield first, seq - 1
            first = seq + 1
        if first < self.end:
            yield first, self.end - 1

    def _expect(self, lead: int, now: float) -> None:
        """Know that everything up to `lead` has been sent."""
        self._credit = min(self._credit + self.NAK_CREDIT, 16 * self.NAK_CREDIT)
        if lead < self.end:
            return
        self.end = lead + 1
        if self._known and now < self._known[-1][0] + 0.05:  # some 20 times a second will do
            self._known[-1] = self._known[-1][0], self.end
        else:
            self._known.append((now, self.end))
        soonest, latest = self.NAK_DELAY
        self.nak_at = min(self.nak_at, now + soonest + self._jitter() * (latest - soonest))

    def _deliver(self, now: float) -> list[Any]:
        items = []
        while self.next in self._held:
            item, size = self._held.pop(self.next)
            self.size -= size
            self._counts["held"] -= size
            self.next += 1
            items.append(item)
        if items:
            self._delivered_at = now
        while self._known and self._known[0][1] <= self.next:
            self._known.popleft()
        if self.next == self.end:
            self.nak_at = inf
        return items


# --- URL and sockets ----------------------------------------------------------------------------------------------

Url = namedtuple("Url", ["host", "port", "interface", "ttl"])  # str, int, str or "", int


def is_address(host: str) -> bool:
    """Whether `host` is an IPv4 address in its usual form."""
    try:
        return len(socket.inet_pton(socket.AF_INET, host)) == 4
    except (OSError, ValueError):
        return False


def is_group(host: str) -> bool:
    """Whether `host` is the address of a multicast group (RFC 1112: 224.0.0.0 to 239.255.255.255)."""
    return is_address(host) and 224 <= int(host.split(".")[0]) <= 239


def is_host(text: str) -> bool:
    """Whether `text` is an IPv4 address in its usual form, or may be the name of a host or an interface (RFC 1123)."""
    try:
        socket.inet_aton(text)
        return is_address(text)  # else one like 0xEF.1
    except (OSError, ValueError):
        label = r"[A-Za-z0-9_]([A-Za-z0-9_@-]{0,61}[A-Za-z0-9_])?"
        return bool(re.fullmatch(rf"{label}(\.{label})*\.?", text)) and not re.fullmatch(r"[0-9.]*", text)


def parse_url(text: str) -> Url:
    """Return the parts of "udp://HOST:PORT?interface=ADDRESS-OR-NAME&ttl=N", or raise ValueError naming the bad one.

    A group without an interface is on the loopback interface; the ttl is 0 if it is not given.
    """
    from urllib.parse import parse_qsl, urlsplit

    try:
        parts = urlsplit(str(text))
        host, port = parts.hostname or "", parts.port
        options = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as problem:
        raise ValueError(f"url {text!r}: {problem}") from None
    known = dict(options)
    interface, ttl = known.get("interface", "127.0.0.1" if is_group(host) else ""), known.get("ttl", "0")
    for wrong, message in (
        (parts.scheme != "udp", f"scheme is {parts.scheme!r}, expected 'udp'"),
        ("@" in parts.netloc, "a user or password stands in it, expected none"),
        (not is_host(host), f"host is {host!r}, expected an IPv4 address or a name"),
        (not port, f"port is {port}, expected 1 to 65535"),
        (parts.path not in ("", "/") or parts.fragment, f"path is {parts.path!r}, expected none"),
        (len(known) < len(options), "an option stands twice"),
        (known.keys() - {"interface", "ttl"}, f"options are {sorted(known)}, expected interface and ttl"),
        ("interface" in known and not is_host(interface), f"interface is {interface!r}, expected an address or a name"),
        (not re.fullmatch(r"[0-9]{1,3}", ttl) or int(ttl) > 255, f"ttl is {ttl!r}, expected 0 to 255"),
        (not str(text).isprintable(), "a character that cannot be printed stands in it"),
    ):
        if wrong:
            raise ValueError(f"url {text!r}: {message}")
    return Url(host, port, interface, int(ttl))


def url_from(url: str | None) -> str:
    """Return the URL to use: the one given, the environment's, or the default."""
    return url if url is not None else os.environ.get("EVENTMON_URL") or DEFAULT_URL


def key_from(key: str | bytes | None) -> bytes:
    """Return the key to use, the environment's where none is given, b"" for none."""
    key = os.environ.get("EVENTMON_KEY", "") if key is None else key
    if key:
        import hmac  # noqa: F401 - not in a send(), beside which the program may fork while it is being imported
    return key.encode() if isinstance(key, str) else bytes(key)


def on_loopback(url: Url) -> bool:
    """Whether datagrams to `url` stay on the loopback interface, which carries large ones."""
    where = url.interface if is_group(url.host) else url.host
    return where.startswith("127.") or where in ("localhost", "lo", "lo0")


def membership(url: Url) -> bytes:
    """Return the group and the interface of `url` as the kernel takes them (struct ip_mreq, or ip_mreqn for a name)."""
    if is_address(url.interface):
        return socket.inet_aton(url.host) + socket.inet_aton(url.interface)
    return struct.pack("@4s4si", socket.inet_aton(url.host), bytes(4), socket.if_nametoindex(url.interface))


def udp_socket(url: Url, bind: bool = True) -> socket.socket:
    """Return a new socket that sends on the interface and with the ttl of `url`, and never blocks."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        if is_group(url.host):
            interface = membership(url)
            sock.setsockopt(
                socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface[4:] if len(interface) == 8 else interface
            )
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, url.ttl)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        elif url.ttl:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, url.ttl)
        if bind:
            sock.bind((url.interface if is_address(url.interface) else "", 0))
    except BaseException:
        sock.close()
        raise
    return sock


def listen(url: Url) -> socket.socket:
    """Return a socket that receives what is sent to `url`, beside others on this machine if it is a group."""
    sock = udp_socket(url, bind=False)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        if not is_group(url.host):
            sock.bind((url.host, url.port))
            return sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT") and sys.platform != "linux":  # BSD wants it; Linux would share out
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if sys.platform == "linux":  # IP_MULTICAST_ALL: hear only what this socket has joined
            sock.setsockopt(socket.IPPROTO_IP, 49, 0)
        sock.bind(("" if sys.platform == "win32" else url.host, url.port))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership(url))
    except BaseException:
        sock.close()
        raise
    return sock


def inode(sock: socket.socket) -> int:
    """Return what tells a socket from another file with its descriptor: its inode; -1 if the descriptor is closed."""
    try:
        return os.fstat(sock.fileno()).st_ino if sys.platform != "win32" else 0
    except OSError:
        return -1


def wait_for(seconds: float, *files: Any) -> None:
    """Wait until something has arrived at one of the sockets, or for `seconds`; in any number of threads."""
    seconds = max(0.0, seconds)
    try:
        if not hasattr(select, "poll"):
            select.select(files, [], [], seconds)
            return
        poll = select.poll()  # unlike select() not limited to the first 1,024 files
        for file in files:
            poll.register(file, select.POLLIN)
        found = poll.poll(seconds * 1000)
        if not found or not found[0][1] & select.POLLNVAL:
            return
    except (OSError, ValueError):
        pass
    time.sleep(min(seconds, 0.05))  # somebody has closed it, and whoever waits is to look why


def shut(sockets: dict[socket.socket, int]) -> None:
    """Close sockets (socket -> its inode), but never a file of the program that has got the descriptor of one."""
    while sockets:
        sock, number = sockets.popitem()
        if inode(sock) == number:
            sock.close()
        else:
            sock.detach()


class Link:
    """A Dispatcher's socket: sends to `target`, and receives what watchers answer."""

    def __init__(self, url: Url) -> None:
        host = url.host.encode()  # a str would load a codec, at which a fork in another thread hangs the child
        found = socket.getaddrinfo(host, url.port, socket.AF_INET, socket.SOCK_DGRAM)
        self.target: Source = str(found[0][4][0]), url.port
        self.socket = udp_socket(url)
        self.broken = False  # an error says that another socket may do better
        self._inode = inode(self.socket)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_LOOPBACK * 4)  # macOS: also the largest one

    def is_intact(self) -> bool:
        """Whether the socket is open, no file of the program has its descriptor, and it takes datagrams."""
        return not self.broken and inode(self.socket) == self._inode

    def close(self) -> None:
        """Close the socket."""
        shut({self.socket: self._inode})


# --- Dispatcher ---------------------------------------------------------------------------------------------------

OURS = frozenset(("type", "timestamp", "hostname", "pid", "utcoffset", "clock"))  # fields that a Dispatcher adds
PASSING = frozenset(  # errors that another socket would not mend
    (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.EPERM, errno.EACCES, errno.EMSGSIZE, errno.EINTR)
    + (errno.ECONNREFUSED, errno.ECONNRESET)
)

# Of the events of a type: what we add, their JSON and frame, to be filled in, if they are held, how long the rest may be.
Known = namedtuple("Known", ["ours", "template", "frame", "buffered", "room"])


class Part(bytes):
    """A part of a large event: what stands behind SEQ in its frame."""


_ticks = count(1)  # the Lamport clock of this process (Communications of the ACM 21:7, 1978)


def witness(clock: int) -> None:
    """Set this process's Lamport clock past one that was received."""
    global _ticks
    if next(_ticks) <= clock < 1 << 62:
        _ticks = count(clock + 1)


def default_hostname() -> str:
    """Return "PROGRAM.PID@HOST", which tells the processes of a machine apart."""
    program = os.path.basename(sys.argv[0] if sys.argv and sys.argv[0] not in ("", "-", "-c", "-m") else "python")
    return f"{program.removesuffix('.py')}.{os.getpid()}@{socket.gethostname()}"


class Dispatcher:
    """Sends events to whoever watches `url`; safe in threads and forks, and never harmed by the network.

    `hostname` names the sender ("PROGRAM.PID@HOST" if None). `groups` are the only ones sent, as in {"task"}, where
    there are any; those in `buffer_group` are held and sent together at `buffer_limit` events, at flush(), or 50 ms
    later. `freq` makes it a worker with a heartbeat every so many seconds. `key` (str or bytes, $EVENTMON_KEY if None)
    authenticates. `max_wait` seconds is the longest that send() waits for a watcher that is behind. `max_repr` is how
    many characters of a task's arguments, result or exception are sent. A bad url raises ValueError; the socket is
    opened by the first event. Close it, or it lives as long as the process. `problem` is the last error of the network
    or of a thread of ours, or why an answer was rejected; None if there was none.
    """

    def __init__(
        self,
        url: str | None = None,
        hostname: str | None = None,
        *,
        enabled: bool = True,
        groups: Iterable[str] | None = None,
        buffer_group: Iterable[str] = (),
        buffer_limit: int = 24,
        freq: float | None = None,
        key: str | bytes | None = None,
        max_wait: float = 0.01,
        max_repr: int = MAX_REPR,
    ) -> None:
        import inspect  # noqa: F401 - these now, not when a task needs them and no file can be opened
        import traceback  # noqa: F401
        import uuid  # noqa: F401

        if freq is not None and not freq >= 0:
            raise ValueError(f"freq is {freq!r}, expected seconds")
        self.url = url_from(url)
        self.enabled = False
        self.on_enabled: set[Callable[[], object]] = set()
        self.on_disabled: set[Callable[[], object]] = set()
        self.max_repr = int(max_repr)
        self._url = parse_url(self.url)
        self._room = (MAX_LOOPBACK if on_loopback(self._url) else MAX_DATAGRAM) - MAX_HEADER
        self._name = hostname
        self._groups = frozenset(groups or ())
        self._buffered = frozenset(buffer_group)
        self._buffer_limit = max(1, buffer_limit)
        self._freq = freq
        self._key = key_from(key)
        self._max_wait = max_wait
        self._closed = self._exits = False
        self._begin()
        _dispatchers.add(self)
        if enabled:
            self.enable()

    def _begin(self) -> None:
        """Start a stream, with nothing sent: at first, and in the child of a fork."""
        self.pid = os.getpid()
        self.problem: BaseException | None = None
        self.hostname = self._name or default_hostname()
        self._lock = threading.RLock()  # whoever has it numbers datagrams and hears watchers
        self._is_inside: Callable[[], bool] = self._lock._is_owned  # type: ignore[attr-defined] # as Condition does
        self._outbox: deque[bytes] = deque()  # what is to be sent, by whoever has the lock
        self._window = TransmitWindow(patient=self._max_wait if self._max_wait >= 1 else 0.0)
        self._stream = os.urandom(8).hex().encode()
        self._data_head, self._part_head = head_of(b"data", self._stream), head_of(b"part", self._stream)
        # events and datagrams beside the one of each that has a sequence number
        self._counts = {"events": 0, "datagrams": 0, "repairs": 0, "errors": 0, "rejected": 0}
        self._large = count(1)  # numbers the events in parts
        self._link: Link | None = None
        self._finalizer: Any = None
        self._thread: threading.Thread | None = None
        self._started = self._resolving = self._close_soon = False
        self._ended = self._closed
        self._beaten_at = self._reopen_at = -inf
        self._work_at = inf
        self._active = self._processed = 0
        self._ours: dict[str, Any] = {}
        self._introduce()

    def _introduce(self) -> None:
        """Note what every event says of its sender."""
        ours = {"type": "", "timestamp": 0.0, "hostname": self.hostname, "pid": self.pid}
        ours.update(utcoffset=-time.localtime().tm_gmtoff / 3600, clock=0)  # hours, west is positive: as Celery has it
        if ours != self._ours:
            self._ours = ours
            self._known: dict[str, Known] = {}  # by type

    @property
    def stats(self) -> dict[str, int]:
        """Counts: events, datagrams and repairs sent, errors of the network, rejected answers, live watchers.

        `behind` is how many of these lack something: it is not confirmed yet, or they gave it up.
        """
        lacking, sent = self.lacking(), self._window.next - 1
        counts = {**self._counts, "watchers": len(lacking), "behind": sum(map(bool, lacking))}
        counts["events"] += sent + len(self._outbox)
        counts["datagrams"] += sent
        return counts

    def lacking(self) -> list[int]:
        """Return for each live watcher how many datagrams it has not confirmed, or has given up."""
        return [sum(numbers) for numbers in self._window.lacking(time.monotonic())]

    def send(self, /, type: str, blind: bool = False, **fields: Any) -> Event | None:
        """Send an event and return it, or None if disabled or not of `groups`.

        Adds hostname, pid, utcoffset and, unless `blind`, clock, where `fields` does not have them. ValueError
        for a type that is not a non-empty str, an event over 16 MiB as JSON, and a closed Dispatcher.
        """
        if not _fork_mark[0]:
            after_fork()
        try:
            usual = type in self._known and not blind and OURS.isdisjoint(fields)
        except TypeError:  # not even hashable
            usual = False
        if not usual:
            return self._send(type, fields, blind)
        # What _send() does, in two thirds of the time: most of the JSON is known already.
        comma, rest = b"," if fields else b"", format_json(fields)[1:]
        known = self._known.get(type) or self._look_up(type)  # only now, since somebody's repr() may fork
        if known is None:
            return None
        ours, template, frame, buffered, room = known
        now, clock = time.time_ns() // 1000, next(_ticks)
        event = new_event(Event)
        event.update(ours)
        event["timestamp"] = now / 1e6
        event["clock"] = clock
        event.update(fields)
        if buffered or self._outbox or len(rest) > room or self._is_inside():
            self._post(template % (now // 1000000, now % 1000000, clock, comma, rest), buffered)
            return event
        window = self._window
        if window.cost > window.horizon:
            self._wait_for_room(time.monotonic() + self._max_wait)
        with self._lock:
            self._send_frame(frame % (window.next, now // 1000000, now % 1000000, clock, comma, rest))
        if self._outbox:  # of a signal handler meanwhile
            self._send_outbox()
        return event

    def publish(self, event: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Forward a ready event as it is, and return it, or None; errors as in send()."""
        if not _fork_mark[0]:
            after_fork()
        known = self._look_up(event.get("type"))
        if known:
            self._post(format_json(dict(event)), known.buffered)
        return event if known else None

    def flush(self, timeout: float = 1.0) -> int:
        """Send what is buffered and wait until every live watcher has confirmed everything, or `timeout` seconds.

        Returns how many watchers have every event; one that gave an event up does not count. A Dispatcher that is new,
        or knows of no watcher, gives them a fifth of a second to speak up.
        """
        if not _fork_mark[0]:
            after_fork()
        self._send_outbox()
        with self._lock:
            self._start()
        self._settle(0.2, inf, timeout, time.monotonic())
        return 0 if self._is_inside() else self._window.complete(time.monotonic())

    def task(self, name: str, uuid: str | None = None, **fields: Any) -> Task:
        """Return a context manager, and decorator, that sends the events of a task: see Task."""
        if not isinstance(name, str):
            raise TypeError(f"task name is {readable(name)}, expected a str, as in task('shop.resize')")
        return Task(self, name, uuid, fields)

    def enable(self) -> None:
        """Start sending; calls each of `on_enabled`, and a worker comes online."""
        if not self.enabled and not self._closed:
            self.enabled = True
            for callback in list(self.on_enabled):
                callback()
            if self._freq:
                self._work_at = time.monotonic() + self._freq
                self._send_worker("worker-online")

    def disable(self) -> None:
        """Stop sending, which then returns None; a worker goes offline; calls each of `on_disabled`."""
        if self.enabled:
            if self._freq:
                self._send_worker("worker-offline")
            self.enabled = False
            self._known = {}
            for callback in list(self.on_disabled):
                callback()

    def on_after_fork(self) -> None:
        """Begin a stream of its own in the child of a fork; called by itself, and again does no harm.

        What was buffered is the parent's to send, and so is a worker's heartbeat.
        """
        if self.pid != os.getpid():
            link, self._freq = self._link, None
            self._begin()
            if link:
                link.close()

    def close(self) -> None:
        """Send what is buffered and a goodbye; return once live watchers have everything.

        Takes at most 50 ms with nobody watching, 250 ms while watchers do not advance, 3 s while they do. Never raises,
        but for what a callback of `on_disabled` does. Also called at the exit of the interpreter.
        """
        self._close(2.9)

    def __enter__(self) -> Dispatcher:  # noqa: PYI034 - typing.Self is younger than Python 3.9
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Dispatcher {self.hostname} to {self.url}{' closed' if self._closed else ''}>"

    # From here on: an event on its way to the kernel.

    def _send(self, type: str, fields: Mapping[str, Any], blind: bool = False) -> Event | None:
        known = self._look_up(type)
        if known is None:
            return None
        ours = {**self._ours, "timestamp": time.time(), "clock": next(_ticks)}
        if blind:
            del ours["clock"]
        event = Event(type, {**ours, **fields})
        self._post(format_json(event), known.buffered)
        return event

    def _look_up(self, type: Any) -> Known | None:
        """Return what is to be known of a type of events; None if they are not sent."""
        table, group = self._known, Event(type).group
        if self._closed:
            self._refuse()
        if not self.enabled or self._groups and group not in self._groups:
            return None
        with self._lock:
            self._start()
        ours = {**self._ours, "type": type}
        told = format_json({key: ours[key] for key in ("hostname", "pid", "utcoffset")})[1:-1]
        words = [text.replace(b"%", b"%%") for text in (format_json(type), told)]
        template = b'{"type":%b,"timestamp":%%d.%%06d,%b,"clock":%%d%%b%%b' % tuple(words)
        room = self._room - len(template) - MAX_HEADER
        known = Known(ours, template, self._data_head + b"%d\n" + template, group in self._buffered, room)
        if len(table) < 200 and len(type) <= 100:
            table[type] = known
        return known

    def _refuse(self) -> None:
        if not self._exits:  # else a thread that outlives the program has nobody to tell
            raise ValueError("the dispatcher is closed")

    def _post(self, body: bytes, buffered: bool) -> None:
        """Put an event into the outbox, and send it unless it is to be held."""
        if len(body) <= self._room:
            self._outbox.append(body)
        elif len(body) <= MAX_EVENT:
            event, starts = next(self._large), range(0, len(body), self._room)
            heads = (b" %d %d %d\n" % (event, index, len(starts)) for index in range(len(starts)))
            parts = [Part(head + body[start : start + self._room]) for head, start in zip(heads, starts)]
            with self._lock:
                self._counts["events"] -= len(parts) - 1
                self._window.limit = HISTORY + 2 * len(body)  # so that it can be repaired, and the one before
            self._outbox.extend(parts)
        else:
            raise ValueError(f"event of {len(body):,} bytes as JSON, expected at most {MAX_EVENT:,}")
        if not (buffered and len(self._outbox) < self._buffer_limit and self._thread and not self._closed):
            self._send_outbox()

    def _send_outbox(self) -> None:
        """Send what is in the outbox, in turn with other threads.

        A signal handler, or a __del__, that has interrupted a send leaves this to the send.
        """
        window, deadline = self._window, 0.0
        while not self._is_inside():
            if self._outbox and window.cost > window.horizon:
                deadline = deadline or time.monotonic() + self._max_wait
                self._wait_for_room(deadline)
            with self._lock:  # whoever has it may have taken our event, which is in the kernel when we get it
                if self._outbox and self._ended:
                    return self._refuse()  # and leave there what other threads are to be told of, too
                if self._outbox:
                    self._send_datagram()
            if not self._outbox:
                return

    def _send_datagram(self) -> None:
        """Number, keep and send as much of the outbox as a datagram takes."""
        seq, taken = self._window.next, [self._outbox.popleft()]
        try:
            if type(taken[0]) is Part:
                frame = self._part_head + b"%d" % seq + taken[0]
            else:
                frame = self._data_head + b"%d\n" % seq + self._gather(taken)
            self._send_frame(frame)
            self._counts["events"] += len(taken) - 1
        except BaseException:  # of a signal handler, say
            if self._window.next == seq:
                self._outbox.extendleft(reversed(taken))
            raise

    def _send_frame(self, frame: bytes) -> None:
        """Keep and send the datagram that has the next sequence number."""
        window, link = self._window, self._link
        window.add(frame)
        try:
            link.socket.sendto(seal(frame, self._key) if self._key else frame, link.target)  # type: ignore[union-attr]
        except (OSError, AttributeError) as problem:
            self._counts["datagrams"] -= 1
            self._on_failure(problem)
        if not window.next % 64:  # the thread gets few chances while a loop sends
            self._listen(time.monotonic())

    def _gather(self, bodies: list[bytes]) -> bytes:
        """Take as many events more out of the outbox as a datagram takes; return them all."""
        size = len(bodies[0])
        while self._outbox and type(self._outbox[0]) is not Part and len(bodies) < self._buffer_limit:
            size += len(self._outbox[0]) + 2
            if size > self._room:
                break
            bodies.append(self._outbox.popleft())
        return b"[%b]" % b",".join(bodies) if len(bodies) > 1 else bodies[0]

    def _transmit(self, frame: bytes, to: Source | None = None) -> bool:
        """Give the kernel a datagram, for all or for one watcher; what it does not take now is repaired later."""
        link = self._link
        try:
            link.socket.sendto(seal(frame, self._key), to or link.target)  # type: ignore[union-attr]
        except (OSError, AttributeError) as problem:
            return self._on_failure(problem)
        self._counts["datagrams"] += 1
        return True

    def _on_failure(self, problem: Any) -> bool:
        """Count what the kernel did not take, and say so if nothing is sent any more."""
        if self._link is None:
            if self._ended:
                self._refuse()
            self._counts["errors"] += not self._resolving
            return False
        if problem.errno is None:  # a TimeoutError, say, of a signal handler
            raise problem
        self._link.broken = self._link.broken or problem.errno not in PASSING
        self._count_error(problem)
        return False

    def _count_error(self, problem: BaseException) -> None:
        self._counts["errors"] += 1
        self.problem = problem

    def _start(self) -> None:
        """Start the thread, and open the link; where a name has to be resolved the thread does this."""
        if self._started or self._closed:
            return
        self._started = True
        self._resolving = not is_address(self._url.host)
        if not self._resolving:
            self._connect()
        try:
            thread = threading.Thread(target=self._serve, name="eventmon", daemon=True)
            thread.start()
            self._thread = thread
        except RuntimeError:  # no more threads, as at the exit of the interpreter, or in a subinterpreter
            if self._resolving:
                self._connect()
        util = sys.modules.get("multiprocessing.util")
        if util:  # whose processes end without atexit
            self._finalizer = util.Finalize(None, self.close, exitpriority=0)

    def _connect(self) -> None:
        """Open a link, in the place of one that is broken."""
        now, stream = time.monotonic(), self._stream
        self._reopen_at = now + 1.0
        try:
            link = Link(self._url)
        except (OSError, UnicodeError) as problem:
            self._resolving = False
            return self._count_error(problem)
        with self._lock:
            if self._stream is not stream or self._ended:  # forked, or closed, in the meantime
                return link.close()
            old, self._link, self._resolving = self._link, link, False
            if old:
                old.close()
            else:
                now = time.monotonic()
                self._window.open(now)
                for frame in self._window.repairs([(1, self._window.next)], TransmitWindow.FIRST_FLIGHT, now):
                    self._transmit(frame)
            self._beat(b"beat", now)

    def _beat(self, kind: bytes, now: float) -> None:
        """Say what has been sent: to all, and to each watcher that is behind, whose buffer for all may be full."""
        self._beaten_at = now
        frame = format_frame(kind, self._stream, (self._window.next - 1, self._window.trail))
        behind = [watcher.address for watcher in self._window.live(now) if watcher.position < self._window.next - 1]
        for address in (None, *behind):
            self._transmit(frame, address)

    # Listening to watchers.

    def _listen(self, now: float) -> None:
        """Take the answers that have arrived."""
        for _ in range(16 if self._link else 0):
            try:
                data, source = self._link.socket.recvfrom(65536)  # type: ignore[union-attr]
            except OSError:  # none; or a watcher is gone (ICMP; 10054 on Windows)
                break
            self._on_answer(data, source, now)
        self._window.look_ahead(now)

    def _on_answer(self, data: bytes, source: Source, now: float) -> None:
        """Take note of a watcher's answer, and repair what it asks for."""
        window = self._window
        try:
            data, serial = unseal(data, self._key)
            frame = parse_frame(data)
            if frame.kind not in (b"ack", b"nak", b"leave") or frame.stream != self._stream:
                raise WireError(f"a {frame.kind.decode()}, expected an answer to this stream")
            ranges = parse_ranges(frame.body) if frame.kind == b"nak" else []
            position, name, room, lost, taken = frame.numbers
            watcher = window.watchers.get(name)
            if serial and watcher and serial <= watcher.serial:
                raise Replay("an answer seen before")
            if not window.on_ack(name, position, room, lost, taken, now):
                raise WireError(f"confirms {position}, expected at most {window.next - 1}")
        except WireError as problem:
            self._counts["rejected"] += 1
            self.problem = problem
            return
        watcher = window.watchers.get(name)
        if watcher:
            watcher.address, watcher.serial = source, serial
        if frame.kind == b"leave":
            window.leave(name)
        if any(first < window.trail for first, _ in ranges) and now >= self._beaten_at + 0.05:
            self._beat(b"beat", now)  # tells what cannot be had any more
        for repair in window.repairs(ranges, room, now):
            self._counts["repairs"] += self._transmit(repair)

    def _wait_for_room(self, deadline: float) -> None:
        """Wait until every watcher that advances has room again, or until the deadline."""
        window = self._window
        now = time.monotonic()
        while window.cost > window.horizon and now < deadline:
            time.sleep(min(self._pause(now), deadline - now))
            since, now = now, time.monotonic()
            with self._lock:
                self._listen(now)
                window.waited(since, now)
                self._ask(now)

    def _pause(self, now: float) -> float:
        """Return for how long to wait for answers: the longer nobody has advanced, the longer."""
        return min(0.01, max(0.001, (now - self._window.advanced_at) / 2))

    def _ask(self, now: float, pause: float = 0.01) -> None:
        """Ask watchers where they are: the longer they do not advance, the less often."""
        advanced_at = self._window.advanced_at
        if now >= max(self._beaten_at, advanced_at) + min(0.08, max(pause, (now - advanced_at) / 2)):
            self._beat(b"beat", now)

    def _settle(self, patience: float, stall: float, timeout: float, asked_at: float) -> None:
        """Wait until every live watcher has confirmed everything, none of them advances in `stall`, or `timeout`.

        Watchers not heard yet get `patience` from the opening of the link, or from `asked_at` where none is known.
        """
        start = now = time.monotonic()
        window = self._window
        while not self._is_inside() and (self._link or self._resolving):
            with self._lock:
                self._listen(now)
                unconfirmed = [number for number, _ in window.lacking(now)]
                if any(unconfirmed) or not self._link:
                    enough = now >= max(start, window.advanced_at) + stall
                else:
                    enough = now >= max(window.opened_at, -inf if unconfirmed else asked_at) + patience
                if enough or now >= start + timeout:
                    return
                self._ask(now, 0.01 if any(unconfirmed) else 0.04)  # those that are behind; or who else is there
            time.sleep(self._pause(now))
            now = time.monotonic()

    def _close(self, timeout: float) -> None:
        if not _fork_mark[0]:
            after_fork()
        if self._is_inside():
            self._close_soon = True  # by the thread, after the send that this interrupts
            return
        try:
            self.disable()
        finally:
            with self._lock:
                first, self._closed = not self._closed, True
            if first:
                self._send_outbox()
                self._settle(0.04, 0.2, timeout, -inf)
                with self._lock:
                    if self._link:
                        for _ in range(5):  # nobody repairs it
                            self._beat(b"bye", time.monotonic())
                        self._link.close()
                    elif self._window.next > 1:  # no name was found in time
                        self._counts["errors"] += 1
                    self._link, self._ended = None, True
                if self._finalizer:
                    self._finalizer.cancel()

    # The thread.

    def _serve(self) -> None:
        """Answer watchers, beat, and send what is due, until the stream ends."""
        stream = self._stream
        while self._stream is stream and not self._ended:
            try:
                self._tend()
            except Exception as problem:  # noqa: BLE001 - whatever it is, the Dispatcher is not to fall silent
                self._count_error(problem)
                time.sleep(BEAT)

    def _tend(self) -> None:
        """Wait until something is to be done, and do it."""
        now, link = time.monotonic(), self._link
        if now >= self._reopen_at and (link is None or not link.is_intact()):
            self._connect()
            link = self._link
        due = min(self._beaten_at + BEAT, self._work_at, now + (0.05 if self._buffered else BEAT))
        if link and link.is_intact():
            wait_for(due - now, link.socket)
        else:
            time.sleep(0.05)
        if self._close_soon:
            return self.close()
        now = time.monotonic()
        with self._lock:
            self._listen(now)
            if now >= self._beaten_at + BEAT and not self._ended:
                self._introduce()  # the clock may have been put forward for the summer
                self._beat(b"beat", now)
        if self._outbox and not self._ended:
            self._send_outbox()
        if self._freq and self.enabled and now >= self._work_at:
            self._work_at = now + self._freq
            self._send_worker("worker-heartbeat")

    # The worker and its tasks.

    def _sends_tasks(self) -> bool:
        """Whether it is worth while to tell more of a task."""
        return self.enabled and (not self._groups or "task" in self._groups)

    def _begin_task(self, uuid: str, fields: Mapping[str, Any]) -> None:
        self._send("task-received", {"uuid": uuid, **fields})
        self._send("task-started", {"uuid": uuid})
        self._count_task(1, 0)

    def _end_task(self, type: str, uuid: str, outcome: Mapping[str, Any]) -> None:
        self._count_task(-1, 1)
        self._send_quietly(type, {"uuid": uuid, **outcome})

    def _count_task(self, active: int, processed: int) -> None:
        with self._lock:
            self._active = max(0, self._active + active)  # in the child of a fork ends what began in the parent
            self._processed += processed

    def _send_worker(self, type: str) -> None:
        fields: dict[str, Any] = {"freq": self._freq, "active": self._active, "processed": self._processed}
        with suppress(OSError, AttributeError):  # where the system has none
            fields["loadavg"] = [round(load, 2) for load in os.getloadavg()]
        system = os.uname().sysname if hasattr(os, "uname") else sys.platform
        self._send_quietly(type, {**fields, "sw_ident": "eventmon", "sw_ver": __version__, "sw_sys": system})

    def _send_quietly(self, type: str, fields: Mapping[str, Any]) -> None:
        """Send an event that the user did not ask for just now, and so is not told of if it cannot be sent."""
        with suppress(ValueError):  # closed meanwhile, or too large
            self._send(type, fields)


_dispatchers: WeakSet[Dispatcher] = WeakSet()
_fork_mark: Any = bytearray(1)  # holds 1, and in the child of a fork 0, also of one by C code that tells Python nothing
with suppress(ImportError, AttributeError, OSError, ValueError):
    import mmap

    _page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _page.madvise(18)  # MADV_WIPEONFORK, of Linux since 4.14
    _fork_mark = _page
_fork_mark[0] = 1


def after_fork() -> None:
    """In the child of a fork: every Dispatcher begins a stream of its own."""
    for dispatcher in list(_dispatchers):
        with suppress(Exception):  # the others are not to pay for it
            dispatcher.on_after_fork()
    _fork_mark[0] = 1


def at_exit() -> None:
    """When the interpreter exits: close what is open, all in the time of one."""
    end = time.monotonic() + 2.9
    for dispatcher in list(_dispatchers):
        dispatcher._exits = True
        try:
            dispatcher._close(max(0.0, end - time.monotonic()))
        except Exception:  # noqa: BLE001 - of a callback, which must not keep the others open
            sys.excepthook(*sys.exc_info())


atexit.register(at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=after_fork)


# --- Task, LogHandler ---------------------------------------------------------------------------------------------

_current_task: ContextVar[Task | None] = ContextVar("eventmon_task", default=None)
MAX_TRACEBACK = 65536  # characters of a failed task's traceback, the last ones
MAX_FRAMES = 50  # of a traceback, the innermost; all of a deep recursion would take seconds


def weight(value: Any, most: int, depth: int = 0) -> int:
    """Return about how long a value is as text; of one that is longer than `most`, something more than that."""
    if isinstance(value, (str, bytes, bytearray)):
        return len(value) + 4
    if not isinstance(value, (dict, list, tuple, set)):
        return 8 + (value.bit_length() // 3 if isinstance(value, int) else 0)  # an int may have thousands of digits
    if depth == MAX_DEPTH:
        return most + 1
    weighed = 2
    for item in value:
        weighed += weight(item, most, depth + 1)
        if isinstance(value, dict):
            weighed += weight(value[item], most, depth + 1)
        if weighed > most:
            break
    return weighed


def spell(value: Any, limit: int, form: Callable[[Any], str], brackets: Any, depth: int = 0) -> Iterator[str]:
    """Yield a value as text, piece by piece: of a large one no more need be made than is shown.

    `form` makes text of what has no items, `brackets` returns what stands around those of what has some, or None.
    """
    if isinstance(value, (str, bytes, bytearray)):
        yield form(value[:limit])
    elif not (around := brackets(value)):
        yield form(value)
    elif depth == MAX_DEPTH:
        yield "…"
    else:
        yield around[0]
        for index, item in enumerate(value):
            yield ", " if index else ""
            yield from spell(item, limit, form, brackets, depth + 1)
            if isinstance(value, dict):
                yield ": "
                yield from spell(value[item], limit, form, brackets, depth + 1)
        yield around[1]


def start_of(pieces: Iterable[str], limit: int) -> str:
    """Return the first `limit` characters of text in pieces, of which no more are made than that takes."""
    taken, size = [], 0
    for piece in pieces:
        taken.append(piece)
        size += len(piece)
        if size > limit:
            break
    return "".join(taken)[:limit]


BRACKETS: dict[type, str] = {list: "[]", tuple: "()", dict: "{}", set: "{}"}


def repr_brackets(value: Any) -> Sequence[str] | None:
    """Return what stands around the items of a value in its repr, None if it has none, or is of a class of the user's."""
    if type(value) is tuple and len(value) == 1:
        return "(", ",)"
    return BRACKETS.get(type(value)) if value or type(value) is not set else None


def cut(text: str, limit: int) -> str:
    """Return text that is visibly cut where it has more than `limit` characters."""
    return text if len(text) <= limit else text[: max(0, limit - 1)] + "…"


def shortened(value: Any, limit: int = MAX_REPR) -> str:
    """Return the repr of `value`, visibly shortened; of a large list, tuple, dict, set or text no more of it is made."""
    try:
        large = weight(value, 4 * limit) > 4 * limit
        text = start_of(spell(value, limit, readable, repr_brackets), limit + 1) if large else readable(value)
    except Exception:  # noqa: BLE001 - of a class of the user's, or another thread changes the value
        text = readable(value)
    return cut(text, limit)


def traceback_of(problem: BaseException) -> str:
    """Return the end of an exception's traceback."""
    import traceback

    try:
        lines = traceback.format_exception(type(problem), problem, problem.__traceback__, limit=-MAX_FRAMES)
    except Exception:  # noqa: BLE001 - of an exception of the user's, which may be anything
        lines = [readable(problem)]
    return "".join(lines)[-MAX_TRACEBACK:]


def running(task: Task | None) -> Task | None:
    """Return a task, or the one around it, that has not ended."""
    for _ in range(MAX_DEPTH):  # who enters a task inside itself makes a circle
        if task is None or not task._ended:
            return task
        task = task._outer
    return None


class Task:
    """One task, or by way of a decorated function one at each call; made by Dispatcher.task().

    As a context manager it sends task-received and task-started, then task-succeeded (runtime, in seconds) or
    task-failed (exception, traceback, runtime), and lets the exception pass. A decorated function, coroutine function,
    generator function (also an async one) or method adds args, kwargs and result, each shortened to the Dispatcher's
    `max_repr` characters of repr; a generator is a task from its first value to its last, or until it is closed.
    A task inside another, in the same context (see contextvars), has it as parent_id, and the outermost as root_id.
    `uuid` is its name among all tasks.
    """

    def __init__(self, dispatcher: Any, name: str, uuid: str | None, fields: Mapping[str, Any]) -> None:
        from uuid import uuid4

        self.name = name
        self.uuid = uuid or str(uuid4())
        self.root_id = self.uuid
        self._dispatcher = dispatcher
        self._given = uuid
        self._fields = fields
        self._outer: Task | None = None  # the one in which this one runs just now
        self._inner: Task | None = None  # the one that is open in it while it is suspended
        self._ended = False
        self._result: dict[str, Any] = {}

    def progress(self, fraction: float, **fields: Any) -> None:
        """Send task-progress: `fraction` of the work, 0 to 1, is done."""
        self._dispatcher.send("task-progress", uuid=self.uuid, progress=fraction, **fields)

    def __enter__(self) -> Task:  # noqa: PYI034 - typing.Self is younger than Python 3.9
        parent = _current_task.get()
        fields: dict[str, Any] = {"name": self.name, "args": "()", "kwargs": "{}", "retries": 0}
        fields.update(root_id=parent.root_id if parent else self.uuid, parent_id=parent.uuid if parent else None)
        fields.update(self._fields)
        self.root_id = fields["root_id"]
        self._ended = False
        self._start = time.monotonic()
        self._dispatcher._begin_task(self.uuid, fields)
        outer = running(parent)
        self._outer = outer if outer is not self else None
        _current_task.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: object) -> None:
        outer = running(self._outer)
        if _current_task.get() is self:  # else another one has begun since, or this is the context of another thread
            _current_task.set(outer)
        self._ended, self._outer = True, outer  # so that no chain of ended ones grows
        outcome = {**self._result, "runtime": time.monotonic() - self._start}
        # Nobody wants more of a generator: that is no failure.
        if problem is None or isinstance(problem, GeneratorExit):
            self._dispatcher._end_task("task-succeeded", self.uuid, outcome)
        else:
            if self._dispatcher._sends_tasks():
                text = shortened(problem, self._dispatcher.max_repr)
                outcome.update(exception=text, traceback=traceback_of(problem))
            self._dispatcher._end_task("task-failed", self.uuid, outcome)

    def _suspend(self) -> None:
        """Let others begin where this task began: who iterates a generator is no part of it."""
        self._inner = _current_task.get()
        _current_task.set(running(self._outer))

    def _resume(self) -> None:
        """Let others begin inside this task again."""
        self._outer = running(_current_task.get())
        _current_task.set(self._inner)

    def _brief(self, value: Any) -> str:
        return shortened(value, self._dispatcher.max_repr) if self._dispatcher._sends_tasks() else ""

    def _call(self, args: Any, kwargs: Any) -> Task:
        """Return the task of one call of a decorated function."""
        fields = {"args": self._brief(args), "kwargs": self._brief(kwargs), **self._fields}
        return Task(self._dispatcher, self.name, self._given, fields)

    def _returned(self, result: Any) -> Any:
        self._result = {"result": self._brief(result)}
        return result

    def __call__(self, function: Function) -> Function:
        """Decorate a function, coroutine function, generator function or method."""
        import inspect

        whole: Any = function
        if isinstance(function, (classmethod, staticmethod)):
            return type(whole)(self(whole.__func__))  # type: ignore[no-any-return]
        if not callable(whole):
            raise TypeError(f"a task is {readable(whole)}, expected a function")
        kinds = (
            (inspect.isasyncgenfunction, self._wrap_async_generator),
            (inspect.isgeneratorfunction, self._wrap_generator),
            (inspect.iscoroutinefunction, self._wrap_coroutine),
        )
        forms = whole, type(whole).__call__  # that of an object may be of any kind
        wrap = next((wrap for is_kind, wrap in kinds if any(map(is_kind, forms))), self._wrap_function)
        return wraps(whole)(wrap(whole))  # type: ignore[return-value]

    def _wrap_function(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._call(args, kwargs) as task:
                return task._returned(function(*args, **kwargs))

        return call

    def _wrap_coroutine(self, function: Any) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            with self._call(args, kwargs) as task:
                return task._returned(await function(*args, **kwargs))

        return call

    def _wrap_generator(self, function: Any) -> Any:
        def generate(*args: Any, **kwargs: Any) -> Any:
            with self._call(args, kwargs) as task:
                generator = function(*args, **kwargs)
                step, value = generator.send, None
                while True:
                    try:
                        item = step(value)
                    except StopIteration as stop:
                        return task._returned(stop.value)
                    task._suspend()
                    try:
                        step, value = generator.send, (yield item)
                    except BaseException as problem:  # noqa: BLE001 - for the generator to see
                        step, value = generator.throw, problem
                    item = None  # which may be large
                    task._resume()

        return generate

    def _wrap_async_generator(self, function: Any) -> Any:
        async def generate(*args: Any, **kwargs: Any) -> Any:
            with self._call(args, kwargs) as task:
                generator = function(*args, **kwargs)
                hooks = sys.get_asyncgen_hooks()
                sys.set_asyncgen_hooks(
                    None, None
                )  # an event loop that ends closes this one alone, which closes the other
                step = generator.asend(None)
                sys.set_asyncgen_hooks(*hooks)
                while True:
                    try:
                        item = await step
                    except StopAsyncIteration:
                        return
                    task._suspend()
                    try:
                        step = generator.asend((yield item))
                    except BaseException as problem:  # noqa: BLE001 - for the generator to see
                        step = generator.athrow(problem)
                    item = None
                    task._resume()

        return generate


@lru_cache(None)
def log_handler() -> type:
    """Make the class LogHandler: not before it is asked for, since importing logging costs more than all the rest."""
    import logging

    class LogHandler(logging.Handler):
        """Sends log records as events: "log-warning" with logger, message, the current task's uuid, and exception.

        Takes the Dispatcher. Never raises, and never loops: what is logged while it makes an event of a record, by the
        record's own arguments or by the report of a failure, is not sent.
        """

        __qualname__ = "LogHandler"

        def __init__(self, dispatcher: Dispatcher) -> None:
            super().__init__()
            self.dispatcher = dispatcher
            self._busy = threading.local()

        def createLock(self) -> None:
            """Do without: a signal handler, or a __del__, that logs in the middle of a send() would wait for it for ever."""
            self.lock = None

        def handle(self, record: Any) -> Any:
            """Send the record if the filters let it pass."""
            found = self.filter(record)
            if found:
                self.emit(found if isinstance(found, logging.LogRecord) else record)
            return found

        def emit(self, record: logging.LogRecord) -> None:
            """Send the record."""
            if getattr(self._busy, "now", False):
                return
            self._busy.now = True
            try:
                self.dispatcher._send_quietly(f"log-{record.levelname.lower()}", self._fields(record))
            except Exception:  # noqa: BLE001 - as in logging's own handlers
                try:
                    self.handleError(record)
                except Exception:  # noqa: BLE001, S110 - there may be no standard error to tell of it
                    pass
            finally:
                self._busy.now = False

        def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
            fields = {"timestamp": record.created, "logger": record.name, "message": record.getMessage()}
            if record.exc_text:
                fields["exception"] = record.exc_text
            elif record.exc_info and self.formatter:
                fields["exception"] = self.formatter.formatException(record.exc_info)
            elif record.exc_info and record.exc_info[1]:
                fields["exception"] = traceback_of(record.exc_info[1])
            task = _current_task.get()
            return {**fields, "uuid": task.uuid} if task else fields

    return LogHandler


def __getattr__(name: str) -> Any:
    if name == "LogHandler":
        return log_handler()
    raise AttributeError(f"module 'eventmon' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # for pydoc



# --- Receiver -----------------------------------------------------------------------------------------------------


class Stream:
    """One stream as a Receiver follows it: its window, and what is not confirmed yet."""

    __slots__ = ("ack_at", "cost", "head", "heard", "name", "serial", "source", "window")

    def __init__(self, name: bytes, source: Source, window: ReceiveWindow, now: float) -> None:
        self.name = name
        self.head = head_of(b"data", name)
        self.source = source
        self.window = window
        self.heard = now
        self.serial = 0  # the highest, with a key
        self.cost = 0  # received since the last ack
        self.ack_at = inf  # when to confirm


class Receiver:
    """Hears what Dispatchers, and anyone's bare JSON datagrams, send to `url`.

    `handlers` maps event types to callables that take an Event; "*" gets what has no handler of its own. `key` is as
    in Dispatcher. ValueError for a bad url; OSError when the socket cannot be opened, at first use. Set
    `should_stop` to end a capture, from a handler or another thread. One thread at a time may receive. `problem` says
    why something was rejected last; None if nothing was.
    """

    MAX_STREAMS = 4096
    MAX_JOINED = 24 << 20  # bytes of the pieces of all events that arrive in parts
    MAX_QUEUED = 8 << 20  # bytes read and not delivered yet, from which on no more is read
    MAX_READ = 32  # datagrams that are read at a time
    ACK_DELAY = 0.004  # the longest that a busy watcher leaves data unconfirmed: less than half of max_wait

    def __init__(
        self,
        url: str | None = None,
        handlers: Mapping[str, Callable[[Event], object]] | None = None,
        *,
        key: str | bytes | None = None,
    ) -> None:
        import random

        self.url = url_from(url)
        self.handlers = dict(handlers or {})
        self.should_stop = False
        self.problem: WireError | None = None
        self._url = parse_url(self.url)
        self._key = key_from(key)
        self._random = random.random
        self.name = int.from_bytes(os.urandom(7), "big")
        self._channel: socket.socket | None = None
        self._answers: socket.socket | None = None  # sends acks and NAKs, hears beats for us alone
        self._sockets: dict[socket.socket, int] = {}  # both, and their inodes
        finalize(self, shut, self._sockets)
        self._space = BUFFER  # what the channel's buffer holds
        self._ack_cost = BUFFER // 16  # of a stream's data that are confirmed at once
        self._counts = Counter(events=0, lost=0, repaired=0, duplicates=0, malformed=0, rejected=0, held=0)
        self._streams: OrderedDict[bytes, Stream] = OrderedDict()  # silent longest first
        self._displaced: dict[bytes, int] = {}  # streams not followed any more -> what comes next
        self._senders: OrderedDict[Stream, float] = OrderedDict()  # of these, who has sent data lately -> when
        self._unconfirmed: dict[Stream, None] = {}
        self._broken: dict[Stream, None] = {}  # streams with gaps
        self._pieces: dict[tuple[Stream, int], list[bytes]] = {}  # of events that arrive in parts, the oldest first
        self._joined = 0  # bytes of all pieces
        self._queue: deque[bytes] = deque()  # bodies to be delivered
        self._queued = 0  # bytes of them
        self._ready: deque[Event] = deque()
        self._history = True
        self._crowded_until = self._checked_at = self._heard_at = self._told_at = self._read_at = -inf
        self._ack_due = inf  # when the first stream is to be confirmed
        self._mend_due = inf  # when the first one is to be mended, by the windows' clock
        self._announced: dict[Stream, tuple[int, ...]] = {}  # in beats for us alone: lead, trail
        self._clock = 0.0  # the windows' clock: see _advance()
        self._complete_at = self._mark = inf  # all that arrived before has been read; since when we count what is read
        self._read_since = 0
        self._taken = self._taken_before = 0  # datagrams read in all, and when we last waited for one
        self._empty = True  # the channel, when we last looked

    @property
    def stats(self) -> dict[str, int]:
        """Counts: events; datagrams lost, repaired, duplicates, malformed, rejected; streams followed.

        Of a stream that is far ahead of us, what can be neither repaired nor in our buffer is lost already.
        """
        counts = {name: self._counts[name] for name in self._counts if name != "held"}
        buffered = 2 * self._space // DATAGRAM_COST
        counts["lost"] += sum(max(0, stream.window.gone() - buffered) for stream in list(self._streams.values()))
        return {**counts, "streams": len(self._streams)}

    @property
    def channel(self) -> socket.socket:
        """The socket that listens, not blocking; opened, and the group joined, when first asked for."""
        return self._channel or self._open()

    def _open(self) -> socket.socket:
        shut(self._sockets)
        channel = answers = listen(self._url)
        self._sockets[channel] = inode(channel)
        if is_group(self._url.host) or on_loopback(self._url):  # else a firewall lets answers pass from there alone
            answers = udp_socket(self._url)
            self._sockets[answers] = inode(answers)
        self._space = channel.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        self._ack_cost = self._space // 16
        self._channel, self._answers = channel, answers
        return channel

    def sources(self) -> list[tuple[str, Source]]:
        """Return the name of each stream, and where it comes from."""
        return [(name.decode(), stream.source) for name, stream in self._streams.items()]

    def fileno(self) -> int:
        """The channel's file descriptor, for a select() of your own."""
        return self.channel.fileno()

    def close(self) -> None:
        """Confirm what has come and close the channel, which ends a capture; the next one opens it again."""
        channel, self._channel = self._channel, None
        if channel:
            for stream in list(self._streams.values()):
                self._send_answer(stream, b"leave", 0)
            shut(self._sockets)

    def __enter__(self) -> Receiver:  # noqa: PYI034 - typing.Self is younger than Python 3.9
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Receiver at {self.url}>"

    def capture(self, limit: int | None = None, timeout: float | None = None, wakeup: bool = True) -> None:
        """Call the handler of every event: see itercapture(). A handler's exception ends it and goes up."""
        for event in self.itercapture(limit, timeout, wakeup):
            self.on_event(event)

    def itercapture(
        self, limit: int | None = None, timeout: float | None = None, wakeup: bool = True
    ) -> Iterator[Event]:
        """Yield events until `limit` of them, `timeout` seconds without one, `should_stop` or close().

        No handler is called. `wakeup` asks senders heard for the first time for their recent history; without it a
        stream begins with what is sent from now on. With a timeout of 0 it yields what has arrived already.
        """
        self._history = wakeup
        self._taken_before = self._taken
        left = inf if limit is None else limit
        patience = inf if timeout is None else timeout
        last = time.monotonic()
        self.fileno()
        try:
            while not self.should_stop and left > 0:
                if self._ready:
                    yield self._ready.popleft()
                    left -= 1
                    last = time.monotonic()
                    if last > self._read_at + self.ACK_DELAY / 2 and self._queued < self.MAX_QUEUED:
                        self._read(0.0, 1)  # whoever takes its time still advances, for all to see
                    continue
                if self._channel is None and not self._queue:
                    return
                found = bool(self._queue)
                if found:
                    self._parse()
                else:
                    found = self._read(min(patience, last + patience - time.monotonic()), self.MAX_READ)
                # whoever does not want to wait reads what is no event for 20 ms at most
                if not self._ready and time.monotonic() >= last + (max(patience, 0.02) if found else patience):
                    return
        finally:
            self._confirm(inf)  # the caller turns to other things

    def on_event(self, event: Event) -> None:
        """Call the handler of the event's type, or that of "*"."""
        handler = self.handlers.get(event.type) or self.handlers.get("*")
        if handler:
            handler(event)

    def handle_message(self, data: bytes, source: Source) -> list[Event]:
        """Take a datagram from `source` (host, port); return the events that may now be delivered, in order.

        Opens no socket, and never raises for what the bytes are. Without a channel nothing missing can be asked
        for: it is given up after a second, at the first call after that.
        """
        now = time.monotonic()
        self._advance(now, inf)
        self._accept(data, source, now)
        self._keep_up(now)
        while self._queue:
            self._parse()
        events = list(self._ready)
        self._ready.clear()
        return events

    def pause(self, longest: float) -> float:
        """Return for how many seconds, at most `longest`, nothing is to be delivered, confirmed or asked for."""
        if self._ready or self._queue:
            return 0.0
        return max(0.0, min(longest, self._ack_due - time.monotonic(), self._mend_due - self._clock))

    # From here on: a datagram on its way to an event.

    def _parse(self) -> None:
        """Make events of what is in the queue; of no more than is soon delivered, since they take more memory."""
        events: list[Event] = []
        size = 0
        while self._queue and size < 65536:
            body = self._queue.popleft()
            size += len(body) + 64
            try:
                events += parse_events(body)
            except WireError as problem:
                self._count(problem)
        self._queued -= size
        now, clock = time.time(), 0
        for event in events:
            event["local_received"] = now
            if type(tick := event.get("clock")) is int and tick > clock:
                clock = tick
        witness(clock)
        self._counts["events"] += len(events)
        self._ready += events

    def _count(self, problem: WireError) -> None:
        self._counts[problem.counted] += 1
        if isinstance(problem, Rejected):
            self.problem = problem

    def _read(self, patience: float, most: int) -> bool:
        """Take at most so many datagrams, waiting at most `patience` seconds for one; False if there was none."""
        if patience > 0 and self._empty:
            self._wait(patience)
        channel, now, taken = self._channel, time.monotonic(), self._taken
        self._empty = False
        try:
            for _ in range(most if channel else 0):
                data, source = channel.recvfrom(65536)  # type: ignore[union-attr]
                self._read_since += len(data) + DATAGRAM_COST
                self._accept(data, source, now)
        except OSError:  # nothing more; closed; or, on Windows, an answer of ours found nobody
            self._empty = True
        found, now = self._taken > taken, time.monotonic()
        if self._empty:
            self._advance(now, MAX_SLEEP)
        elif self._read_since > self._space:  # more than the buffer held at the mark
            self._advance(self._mark, MAX_SLEEP)
            self._mark = now
        if found:
            self._heard_at = now
        if now >= self._checked_at + 1.0:
            self._check(now)
        self._keep_up(now)
        self._read_at = now
        return found

    def _keep_up(self, now: float) -> None:
        """Confirm and mend what is due."""
        if now >= self._ack_due:
            self._read_aside(now)
            self._confirm(now)
        if self._clock >= self._mend_due:
            self._mend()

    def _wait(self, patience: float) -> None:
        """Wait for a datagram; when busy, let some gather: to be woken for each would cost more than all the rest."""
        if self._taken > self._taken_before + 16:
            time.sleep(min(patience, 0.0005))
        else:
            wait_for(max(0.0005, min(patience, self.pause(MAX_SLEEP))), *filter(None, [self._channel]))
        self._taken_before = self._taken

    def _check(self, now: float) -> None:
        """Once a second: open what somebody else has closed, or whose interface has gone and come again."""
        channel, self._checked_at = self._channel, now
        with suppress(OSError):  # no network now; or all is as it should be
            if channel and inode(channel) == self._sockets.get(channel):
                if not is_group(self._url.host) or now < self._heard_at + 1.0:
                    return
                channel.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership(self._url))  # or it is there
            if channel:
                self._open()

    def _advance(self, complete_at: float, most: float) -> None:
        """Note that all that arrived before this time has been read.

        So the windows' clock stands still while datagrams wait unread, among which what a window misses may be. It
        goes at most `most` seconds further: in the rest the receiver stood still itself.
        """
        self._clock += min(max(0.0, complete_at - self._complete_at), most)
        self._complete_at = self._mark = complete_at
        self._read_since = 0
        while self._announced:
            stream, (lead, trail) = self._announced.popitem()
            self._deliver(stream, stream.window.announce(lead, trail, self._clock))

    def _read_aside(self, now: float) -> None:
        """Take beats sent to this watcher alone. They count once all that had arrived before them has been read."""
        for _ in range(0 if self._answers in (None, self._channel) else 16):
            try:
                data, source = self._answers.recvfrom(65536)  # type: ignore[union-attr]
                frame = parse_frame(unseal(data, self._key)[0])
            except OSError:
                break
            except WireError as problem:
                self._count(problem)
                continue
            stream = self._streams.get(frame.stream)
            if stream and stream.source == source and frame.kind in (b"beat", b"bye"):
                lead, trail = self._announced[stream] = frame.numbers
                self._plan_ack(stream, now)
                stream.window.forget(min(trail, lead + 1))
                self._deliver(stream, stream.window.overdue(self._clock))

    def _accept(self, data: bytes, source: Source, now: float) -> None:
        """Queue what a datagram makes deliverable; count it if it is bad."""
        self._taken += 1
        stream = None if self._key else self._streams.get(data[NAME])
        if stream and stream.source == source:
            window, head = stream.window, stream.head + b"%d\n" % stream.window.next
            if data.startswith(head) and window.in_order(window.next):  # as nearly always
                stream.heard = now
                stream.cost += len(data) + DATAGRAM_COST
                if stream.ack_at == inf or stream.cost > self._ack_cost:
                    self._plan_ack(stream, now, self.ACK_DELAY)
                return self._enqueue(data[len(head) :])
        try:
            self._receive(data, source, now)
        except WireError as problem:
            self._count(problem)
            if isinstance(problem, Skewed):
                self._tell_time(data, source, now)

    def _enqueue(self, body: bytes) -> None:
        self._queue.append(body)
        self._queued += len(body) + 64

    def _receive(self, data: bytes, source: Source, now: float) -> None:
        if data[:2] != b"EM":
            if self._key:
                raise Rejected("bare JSON, expected a frame sealed with the key")
            return self._enqueue(data)
        data, serial = unseal(data, self._key)
        frame = parse_frame(data)
        if frame.kind in (b"ack", b"nak", b"leave"):
            raise WireError(f"an {frame.kind.decode()}, expected what a sender sends")
        stream = self._streams.get(frame.stream) or self._follow(frame, source, now)
        fresh = not self._key or serial > stream.serial
        if fresh and stream.source != source and not self._key and now < stream.heard + 2 * BEAT:
            # A name proves nothing without a key. A sender that has moved is believed when its old place is silent.
            raise Rejected(f"stream {frame.stream.decode()} comes from {source}, expected {stream.source}")
        if fresh:
            stream.source, stream.heard, stream.serial = source, now, serial
        if frame.kind in (b"data", b"part"):
            size = len(data) + DATAGRAM_COST
            stream.cost += size
            self._plan_ack(stream, now, self.ACK_DELAY)
            return self._deliver(stream, stream.window.receive(frame.numbers[0], frame, size, self._clock))
        if not fresh:
            raise Replay("a beat seen before")
        self._streams.move_to_end(frame.stream)
        self._plan_ack(stream, now)
        lead, trail = frame.numbers
        self._deliver(stream, stream.window.announce(lead, trail, self._clock))

    def _tell_time(self, data: bytes, source: Source, now: float) -> None:
        """Answer a beat with our own time, so that its sender learns that the clocks differ."""
        fields = data.split(b" ", 3)
        if fields[1] == b"beat" and self._answers and now >= self._told_at + 1.0:
            self._told_at = now
            with suppress(OSError):
                answer = format_frame(b"leave", fields[2], (0, 0, 0, 0, 0))
                self._answers.sendto(seal(answer, self._key), source)

    def _follow(self, frame: Frame, source: Source, now: float) -> Stream:
        """Begin to follow a stream: from the start of what can be had, or from now; again, from where it was.

        From now also while many live streams are displaced: this may be one, of which everything has been delivered.
        """
        while len(self._streams) >= self.MAX_STREAMS:
            self._evict(now)
        first = frame.numbers[0]
        start = first if frame.kind in (b"data", b"part") else first + 1
        if self._history and now > self._crowded_until:
            start = 1
        start = self._displaced.pop(frame.stream, start)
        window = ReceiveWindow(start, self._clock, self._random, self._counts)
        stream = self._streams[frame.stream] = Stream(frame.stream, source, window, now)
        self._senders[stream] = now
        self._plan_ack(stream, now)
        return stream

    def _evict(self, now: float) -> None:
        """Follow the stream no more that is silent longest."""
        name, stream = self._streams.popitem(last=False)
        self._displaced[name] = stream.window.end
        if len(self._displaced) > 16 * self.MAX_STREAMS:
            del self._displaced[next(iter(self._displaced))]
            self._crowded_until = now + 60
        for known in (self._unconfirmed, self._broken, self._senders, self._announced):
            known.pop(stream, None)
        self._counts["held"] -= stream.window.size
        self._counts["lost"] += stream.window.end - stream.window.next

    # Answers.

    def _plan_ack(self, stream: Stream, now: float, delay: float = 0.0) -> None:
        stream.ack_at = min(stream.ack_at, now + delay if stream.cost <= self._ack_cost else now)
        self._unconfirmed[stream] = None
        self._ack_due = min(self._ack_due, stream.ack_at)

    def _confirm(self, now: float) -> None:
        """Send the acks that are due."""
        for stream in [stream for stream in self._unconfirmed if now >= stream.ack_at]:
            self._answer(stream, b"ack")
        self._ack_due = min((stream.ack_at for stream in self._unconfirmed), default=inf)

    def _mend(self) -> None:
        """Ask for what is missing, and give up what is beyond repair; 64 streams at a time, in turns."""
        self._mend_due = inf if len(self._broken) <= 64 else self._clock + 0.002
        reach = max(16, self._space // (4 * DATAGRAM_COST) // max(1, len(self._broken)))
        for stream in list(islice(self._broken, 64)):
            window = stream.window
            window.reach = reach
            del self._broken[stream]
            items = window.overdue(self._clock)
            ranges = window.missing(self._clock)
            for start in range(0, len(ranges), MAX_RANGES):
                self._answer(stream, b"nak", format_ranges(ranges[start : start + MAX_RANGES]))
            self._deliver(stream, items)  # which sees to the rest

    def _answer(self, stream: Stream, kind: bytes, body: bytes = b"") -> None:
        """Confirm what has come of a stream, also as part of a NAK, if there is a socket to send it with."""
        now = time.monotonic()
        if stream.cost:
            self._senders[stream] = now
            self._senders.move_to_end(stream)
        while self._senders and next(iter(self._senders.values())) < now - 0.5:
            self._senders.popitem(last=False)
        window = stream.window
        room = min(self._space // 2, ROOM) // max(1, len(self._senders))  # shared by who sends at the same time
        room += min(window.size, HISTORY // 4)  # held back: it has left the buffer, but can be repaired
        self._unconfirmed.pop(stream, None)
        stream.cost, stream.ack_at = 0, inf
        self._send_answer(stream, kind, room, body)

    def _send_answer(self, stream: Stream, kind: bytes, room: int, body: bytes = b"") -> None:
        numbers = stream.window.next - 1, self.name, room, stream.window.lost, self._taken
        if self._answers:
            with suppress(OSError):  # as good as lost on the way: what matters is asked again
                self._answers.sendto(seal(format_frame(kind, stream.name, numbers, body), self._key), stream.source)

    # Delivery.

    def _deliver(self, stream: Stream, frames: list[Frame]) -> None:
        """Queue the bodies of frames in order, and look after the stream if something is missing."""
        for frame in frames:
            try:
                body = frame.body if frame.kind == b"data" else self._join(stream, frame)
                if body:
                    self._enqueue(body)
            except WireError as problem:
                self._count(problem)
        due = min(stream.window.nak_at, stream.window.give_up_at())
        if due < inf:
            self._broken[stream] = None  # behind the others
            self._mend_due = min(self._mend_due, max(due, self._clock + 0.002))

    def _join(self, stream: Stream, frame: Frame) -> bytes:
        """Add a piece to an event that arrives in parts; return the event with its last one, else nothing."""
        (_, event, index, total), piece = frame.numbers, frame.body
        if not index < total <= MAX_EVENT // 1024 or index + 1 < total and len(piece) < 1024:
            raise WireError(f"part {index} of {total}, {len(piece)} bytes")
        key = stream, event
        pieces = self._pieces.setdefault(key, []) if index == 0 else self._pieces.get(key, [])
        if len(pieces) != index:  # something was given up; or, where there is no piece, we came in the middle
            self._drop_pieces(key)
            return b""
        pieces.append(piece)
        self._joined += len(piece)
        if index + 1 == total:
            body = b"".join(self._pieces.pop(key))
            self._joined -= len(body)
            if body[:1] != b"{":
                raise WireError(f"an event of {len(body):,} bytes that is no object")
            return body
        while self._joined + 4096 * len(self._pieces) > self.MAX_JOINED:  # what dead senders began goes first
            self._drop_pieces(next(iter(self._pieces)))
        return b""

    def _drop_pieces(self, key: tuple[Stream, int]) -> None:
        """Give up an event of which parts have come."""
        pieces = self._pieces.pop(key, [])
        key[0].window.lost += len(pieces)
        self._counts["lost"] += len(pieces)
        self._joined -= sum(map(len, pieces))


# --- State: pure but for the clock, where none is given -----------------------------------------------------------

MAX_LINE = 4 * MAX_EVENT  # of a file: an event in ASCII may take three times as much as in UTF-8, and white space
SETTLE = 0.2  # until every watcher has had time to answer a new Dispatcher, also on a busy machine
FLUSH_ALL = 60.0  # how long the command `send` waits for watchers that are alive but behind
MAX_LINES = 20  # of a failed command's standard error, the last ones
MAX_COPIED = 65536  # bytes of it that are copied at a time, and kept
MAX_PIPE = 1 << 20  # bytes that a pipe may hold
MAX_SHOWN = 1000  # characters of any value in a line on the screen
MAX_DETAIL = 65536  # characters of any value that is shown whole
MAX_ROWS = 2000  # of everything about a task, a worker or an event
MAX_LINKS = 100  # children of a task, or tasks of a worker, that are shown with it
MAX_PANELS = 50  # open above each other: going to and fro between parent and child opens one after the other
MAX_GLYPHS = 4096  # characters of which it is remembered how they are shown, and how wide
MAX_FILTER = 100  # characters
MAX_PROBLEMS = 20  # bad lines of a file that are told of when the monitor ends

TASK_STATES = {
    "task-sent": "PENDING",
    "task-received": "RECEIVED",
    "task-started": "STARTED",
    "task-succeeded": "SUCCESS",
    "task-failed": "FAILURE",
    "task-rejected": "REJECTED",
    "task-revoked": "REVOKED",
    "task-retried": "RETRY",
}
RANKS = {"PENDING": 0, "RETRY": 1, "REJECTED": 2, "RECEIVED": 3, "STARTED": 4, "REVOKED": 6, "FAILURE": 7, "SUCCESS": 8}
CUSTOM_RANK = 5
FINISHED = frozenset(("SUCCESS", "FAILURE", "REVOKED", "REJECTED"))
ENDED = FINISHED | {"RETRY"}  # how a delivery, which is one process getting a task, ends
NOT_RUNNING = ENDED | {"PENDING", "RECEIVED"}
METHODS = {
    type: type.replace("-", "_")
    for type in (*TASK_STATES, "worker-online", "worker-heartbeat", "worker-offline", "worker-lost")
}

# Where the values of a task's keys come from:
TIMES = frozenset(type[5:] for type in TASK_STATES)  # the latest transition of that name
OWN = frozenset(  # the newest delivery alone
    ("state", "timestamp", "clock", "began", "worker", "pid", "progress", "result", "runtime")
)
ERROR = frozenset(("exception", "traceback"))  # the newest delivery that has any
USUAL = frozenset(("type", "timestamp", "hostname", "utcoffset", "clock", "local_received", "uuid", "pid"))
NOT_FIELDS = USUAL | {"state", "worker", "client", "children", "began"} | TIMES  # no event's field of that name
NOT_SENT = NOT_FIELDS | OWN | ERROR  # no task-sent's
NOT_WORKERS = frozenset(("type", "hostname", "heard", "local_received", "status", "clock_offset", "pid"))
TASK_FIELDS = (  # that most tasks have
    ("uuid", "children", "began", "worker", "pid", "timestamp", "state", "clock", "received", "name", "args", "kwargs")
    + ("root_id", "retries", "started", "succeeded", "result", "runtime", "parent_id", "sent", "client", "progress")
    + ("queue", "exchange", "routing_key", "exception", "traceback", "failed", "retried", "expires")
)
MAX_FIELDS = 60  # of a task or a worker from its events
MAX_NAME = 255  # characters of a uuid or hostname
NO_PID = -1
NO_KEYS: frozenset[str] = frozenset()
NO_FIELDS: dict[str, Any] = {}
ALONE = frozenset(("state", "timestamp", "clock"))  # stands for all keys of a task of which only task-sent is known


def number(value: Any, default: float) -> float:
    """Return `value` if it is a finite number, or `default`."""
    return value if type(value) in (int, float) and -1e15 < value < 1e15 else default


def name_of(value: Any) -> str:
    """Return a uuid or hostname, "" if it is none."""
    return value if isinstance(value, str) and len(value) <= MAX_NAME else ""


def attempt_of(event: Mapping[str, Any]) -> float:
    """Return the `retries` of an event or a delivery, 0 if it does not say."""
    retries = event.get("retries")
    return retries if isinstance(retries, (int, float)) and abs(retries) < 1e15 else 0


def process_of(event: Mapping[str, Any]) -> tuple[str, float]:
    """Return the (hostname, pid) of an event; "" and NO_PID stand for what it does not say."""
    hostname, pid = event.get("hostname"), event.get("pid")
    if type(hostname) is not str or len(hostname) > MAX_NAME:
        hostname = ""
    return hostname, pid if isinstance(pid, (int, float)) else NO_PID


def process_in(told: Mapping[str, Any]) -> tuple[str, float]:
    """Return the (hostname, pid) of a delivery."""
    return told.get("worker", ""), told.get("pid", NO_PID)


Kind = namedtuple("Kind", ["state", "rank", "time", "shapes"])  # of events; `time` is the key of their time in a task
Shape = namedtuple("Shape", ["keys", "fields", "usual", "follows"])  # of events of a kind: their keys; those of fields


@lru_cache(1000)
def kind_of(type: str) -> Kind:
    """Return the Kind of events of this type, task-..., with room for the shapes that they have."""
    state = TASK_STATES.get(type) or type[5:].upper()
    return Kind(state, RANKS.get(state, CUSTOM_RANK), type[5:] if type in TASK_STATES else "", {})


def shape_of(event: Mapping[str, Any], kind: Kind) -> Shape:
    """Return the Shape of an event: the known one of that size, or a new one in its place."""
    shape: Shape | None = kind.shapes.get(len(event))
    if shape is None or event.keys() != shape.keys:
        keys = frozenset(event)
        fields = tuple(key for key in event if key not in (NOT_SENT if kind.time == "sent" else NOT_FIELDS))
        usual = keys & NOT_FIELDS == USUAL and len(keys) <= MAX_FIELDS // 2 and len("".join(map(str, keys))) <= MAX_NAME
        follows = usual and kind.time not in ("sent", "received") and keys.isdisjoint(("retries", "parent_id"))
        shape = Shape(keys, fields, usual, follows)
        if usual:
            kind.shapes[len(event)] = shape
    return shape


class Record:
    """Nothing but its vars(), a plain dict: these share one table of keys (PEP 412), so a task takes half as much."""


_record = Record()
for _key in TASK_FIELDS:  # all 30 that the table has room for: it would keep those of any event for good
    setattr(_record, _key, None)


def take_fields(record: dict[str, Any], event: Mapping[str, Any], others: Container[str], over: Container[str]) -> None:
    """Put the fields of an event, but for nulls and `others`, into a dict that has room for MAX_FIELDS.

    They replace what is in `over`, and else only fill in what is missing.
    """
    for key, value in event.items():
        if value is not None and key not in others and (key in over if key in record else len(record) < MAX_FIELDS):
            record[key] = value


# What is told of a delivery is a dict like a task's. So is what a task-sent tells, which is older than any delivery.
# The dict of a task with at most one of each is both, and State._sent has the keys that only its task-sent told.


def age_of(told: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what sorts deliveries, the newest last."""
    if "sent" in told:
        return False, attempt_of(told), told["sent"], told.get("client", ""), str(told.get("clock"))
    return True, attempt_of(told), told["began"], process_in(told)


def progress_of(told: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what sorts what several processes tell of one delivery, the one that got furthest last."""
    state = told["state"]
    return state in ENDED, RANKS.get(state, CUSTOM_RANK), told["timestamp"], process_in(told)


def take_event(
    told: dict[str, Any], event: Mapping[str, Any], kind: Kind, timestamp: float, sent: Container[str] = ()
) -> None:
    """Let an event change what is told of its delivery; it fills in what is in `sent`, too."""
    undone = told.get("state") not in FINISHED or kind.rank >= RANKS[told["state"]]
    if undone:
        told["state"] = kind.state
    told["timestamp"] = timestamp
    if event.get("clock") is not None:
        told["clock"] = event["clock"]
    if kind.time:
        told[kind.time] = max(timestamp, told.get(kind.time, timestamp))
    take_fields(told, event, NOT_FIELDS, event if undone else sent)


def take_sent(told: dict[str, Any], event: Mapping[str, Any], timestamp: float) -> None:
    """Let a task-sent fill in what nothing else has told."""
    new = {"state": "PENDING", "timestamp": timestamp, "began": timestamp, "clock": event.get("clock")}
    stamps = {} if "state" in told else new
    take_fields(told, {**stamps, "sent": timestamp, "client": process_of(event)[0] or None}, NO_KEYS, NO_KEYS)
    take_fields(told, event, NOT_SENT, NO_KEYS)


@lru_cache(1000)
def shared(keys: frozenset[str]) -> frozenset[str]:
    """Return the same object for equal ones."""
    return keys


def untold(sent: Iterable[str], event: Mapping[str, Any]) -> frozenset[str]:
    """Return the keys in `sent` that only task-sent has told, after this event of a delivery."""
    told = {key for key, value in event.items() if value is not None and key not in NOT_FIELDS}
    return shared(frozenset(sent).difference(told, OWN, ("uuid", "children")))


def delivery_for(event: Mapping[str, Any], kind: Kind, mine: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the one of a process's deliveries, oldest first, that an event belongs to; None if it begins one."""
    if isinstance(event.get("retries"), (int, float)):
        unknown = [told for told in mine if "retries" not in told and told["state"] not in ENDED]
        mine = [told for told in mine if attempt_of(told) == attempt_of(event)] or unknown
    still = [told for told in mine if told["state"] not in ENDED]
    waiting = [told for told in still if told["state"] == "RECEIVED"][:1]
    running = [told for told in still if told["state"] != "RECEIVED"][-1:]
    choices = waiting + running if kind.time == "started" else running + waiting
    return None if kind.time == "received" else next(iter(choices or mine[-1:]), None)


def grouped(deliveries: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return deliveries oldest first, each with those that joined it, the one that got furthest last.

    A process that never received the task itself joins a delivery of its hostname: the newest that had begun by then.
    """
    ordered = sorted(deliveries, key=age_of)
    receivers = {process_in(told) for told in ordered if "received" in told}
    hosts = {hostname for hostname, _ in receivers if hostname}
    joining = [told for told in ordered if told.get("worker") in hosts and process_in(told) not in receivers]
    groups = [[told] for told in ordered if not any(told is other for other in joining)]
    for told in joining:
        there = [group for group in groups if "received" in group[0] and group[0].get("worker") == told.get("worker")]
        begun = [group for group in there if group[0]["began"] <= told["timestamp"]]
        (begun[-1] if begun else there[0]).append(told)
    return [sorted(group, key=progress_of) if group[1:] else group for group in groups]


def merged(groups: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return what all deliveries together tell of their task."""
    shown: dict[str, Any] = {}
    for group in groups:
        if group is groups[-1]:
            for key in OWN:
                shown.pop(key, None)
        for told in group:
            if "exception" in told or "traceback" in told:
                shown.pop("exception", None)
                shown.pop("traceback", None)
            shown.update(told)
    for key in TIMES.intersection(shown):
        shown[key] = max(told[key] for group in groups for told in group if key in told)
    return shown if len(shown) <= MAX_FIELDS else {**dict(islice(shown.items(), MAX_FIELDS)), **groups[-1][-1]}


def is_simple(task: Mapping[str, Any], event: Mapping[str, Any], kind: Kind, sent: Container[str]) -> bool:
    """Whether a task with this event still has at most one task-sent and one delivery, of the same attempt."""
    same_attempt = attempt_of(event) == attempt_of(task)
    if kind.time == "sent":
        return "state" not in task or "sent" not in task and same_attempt
    if "state" not in task or "state" in sent:
        return not sent or same_attempt
    same_process = event.get("hostname") == task.get("worker") and event.get("pid") == task.get("pid")
    return same_process and kind.time != "received" and event.get("retries") in (None, task.get("retries"))


def split(task: Mapping[str, Any], sent: Container[str]) -> list[dict[str, Any]]:
    """Return what a task's dict tells of its only task-sent, and of its only delivery."""
    told = {key: value for key, value in task.items() if key not in ("uuid", "children")}
    if "sent" not in told or "state" in sent:
        return [told] if told else []
    by_sent = {key: value for key, value in told.items() if key in sent or key == "retries"}
    by_sent.update(state="PENDING", timestamp=told["sent"], began=told["sent"])
    return [by_sent, {key: value for key, value in told.items() if key not in sent}]


def seconds_taken(task: Mapping[str, Any], now: float) -> float | None:
    """Return how long a task took, or has been running; None if that is not known."""
    state, end = task["state"], now
    if state in FINISHED:
        runtime, end = number(task.get("runtime"), -1.0), task["timestamp"]
        if runtime >= 0:
            return runtime
    known = "started" in task and (state in FINISHED or state not in NOT_RUNNING)
    return max(0.0, end - task["started"]) if known else None


def figures(tasks: Sequence[Mapping[str, Any]], now: float) -> dict[str, Any]:
    """Return what State.type_stats() tells of the tasks of one name."""
    states = Counter(task["state"] for task in tasks)
    times = sorted(taken for taken in (seconds_taken(task, now) for task in tasks) if taken is not None)
    failures = [(task["timestamp"], task.get("exception")) for task in tasks if task["state"] == "FAILURE"]
    return {
        "running": sum(n for state, n in states.items() if state not in NOT_RUNNING),
        "succeeded": states["SUCCESS"],
        "failed": states["FAILURE"],
        "retried": sum("retried" in task for task in tasks),
        "mean": sum(times) / len(times) if times else None,
        "p95": times[ceil(0.95 * len(times)) - 1] if times else None,
        "max": times[-1] if times else None,
        "last": max(task["timestamp"] for task in tasks),
        "error": max(failures, key=lambda failure: failure[0])[1] if failures else None,
    }


def attempt(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what State.attempts() tells of a delivery."""
    keys = ("worker", "pid", "retries", "state", "received", "started", "exception", "traceback")
    time_of_end = {state: type[5:] for type, state in TASK_STATES.items() if state in ENDED}.get(told["state"], "")
    ended = told.get(time_of_end, told["timestamp"]) if told["state"] in ENDED else None
    return {**{key: told.get(key) for key in keys}, "ended": ended}


def last_word(process: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what sorts the processes of a worker; what the last one says of it, it shows."""
    return process["status"] == "alive", number(process.get("timestamp"), -inf), process.get("pid", NO_PID)


def is_heard(worker: Mapping[str, Any], now: float) -> bool:
    """Whether a worker is alive and, if it has heartbeats, something was heard of it since one is overdue."""
    freq = number(worker.get("freq"), 0.0)
    return worker["status"] == "alive" and (freq <= 0 or now - worker["heard"] <= 2 * freq)


MAX_STATE = 128 << 20  # bytes of what is weighed; what is not, since it is small, takes less than the rest of 256 MiB
MAX_SMALL = 150  # characters of the fields of an event that is not weighed
LARGE = 4096  # bytes of a value that is kept as JSON, which takes less, or forgotten where all takes too much
FORGOTTEN = "(forgotten: State was full)"
FLAT = frozenset((int, float, bool, type(None)))


def bytes_of(value: Any) -> int:
    """Return about how many bytes a value takes; of one that takes more than LARGE, something more than that."""
    size, rest = 0, [value]
    while rest and size <= LARGE:
        value = rest.pop()
        size += sys.getsizeof(value, LARGE)
        if size <= LARGE and isinstance(value, (dict, list, tuple)):
            rest += [*value, *value.values()] if isinstance(value, dict) else value
    return size


def weight_of(record: Mapping[str, Any]) -> int:
    """Return about how many bytes a task, a worker or an event takes."""
    return sum(map(bytes_of, record.values())) + sys.getsizeof(record, 0) + 60 * len(record)


class Table(OrderedDict["str", "Any"]):
    """An OrderedDict that compares as the dict that it is for users: whatever the order."""

    __eq__ = dict.__eq__
    __ne__ = dict.__ne__
    __hash__ = None  # type: ignore[assignment]


GRAPH_TICK = 0.25  # the finest column of State.scale_graph
GRAPH_TICKS = 3600  # a quarter of an hour of them
MAX_TYPE = 100  # characters of an event type that is counted apart
MAX_TYPES = 200  # event types counted apart in a tick; the others are counted together
MAX_RECENT = 1000  # events kept in State.recent, and in State.notes
MAX_DELIVERIES = 100  # of a task
MAX_PROCESSES = 100  # of a worker
NO_CHILDREN: list[str] = []  # of every task that has none: replaced, never changed
LIVE = 10.0  # an event that was received longer ago is from a recording


def taking(type: str, summary: str) -> Callable[[Any, Mapping[str, Any]], None]:
    """Return a method of State that takes events of this type."""
    kind = kind_of(type)

    def take(self: State, event: Mapping[str, Any]) -> None:
        self._task(event, kind)

    take.__doc__ = summary
    return take


class State:
    """What events say of tasks and workers: `tasks` (uuid -> dict) and `workers` (hostname -> dict).

    A task has uuid, state, children (uuids, sorted) and whatever its events told: name, args, kwargs, result, retries,
    the latest time of each transition (sent, received, started, succeeded, ...), client of the newest task-sent, and
    timestamp, clock, worker, pid and began of its newest delivery. A delivery is one process getting the task. Each
    process's events count in their order; it does not matter how those of several come in between each other.
    A worker has hostname, status ("alive", "lost" or "ended"), heard (by now(), when any event of it was last heard),
    clock_offset (seconds that its clock is ahead of this machine's, 0.0 if unknown) and the fields of its events.
    These dicts are for looking at: what an event changes, change nothing of; get_task_info() gives a copy.

    `recent` holds the last events, `notes` the last that are neither heartbeats nor of a task's state. `event_count`
    events were seen, `task_count` tasks received, `evicted` tasks and large values forgotten for want of room.
    `callback(state, event)` is called for every event, `on_node_join(worker)` when a worker comes online or is heard of
    first or again, `on_node_leave(worker)` when it ends or is lost. A pickled State has none. Any thread may use it.
    With `recorded` true, time is when the newest event was received, as it also is when that was long ago.
    """

    FINISHED = FINISHED  # the states in which a task ends

    def __init__(
        self,
        callback: Callable[[State, Mapping[str, Any]], object] | None = None,
        *,
        max_workers_in_memory: int = 5000,
        max_tasks_in_memory: int = 10000,
        on_node_join: Callable[[dict[str, Any]], object] | None = None,
        on_node_leave: Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        self.callback = callback
        self.on_node_join = on_node_join
        self.on_node_leave = on_node_leave
        self.max_workers_in_memory = max_workers_in_memory
        self.max_tasks_in_memory = max_tasks_in_memory
        self.recorded = False
        self.tasks: OrderedDict[str, dict[str, Any]] = Table()  # the latest event's last
        self.workers: OrderedDict[str, dict[str, Any]] = Table()
        self.recent: deque[Mapping[str, Any]] = deque(maxlen=MAX_RECENT)
        self.notes: deque[Mapping[str, Any]] = deque(maxlen=MAX_RECENT)
        self.event_count = self.task_count = self.evicted = 0
        self._active: OrderedDict[str, None] = OrderedDict()  # tasks neither finished nor only sent, and so on:
        self._waiting: OrderedDict[str, None] = OrderedDict()  # all in the order in which they became so, for eviction
        self._succeeded: OrderedDict[str, None] = OrderedDict()
        self._failed: OrderedDict[str, None] = OrderedDict()
        self._classes = dict.fromkeys(FINISHED, self._failed)  # state -> where it is listed, if not in _active
        self._classes.update(PENDING=self._waiting, SUCCESS=self._succeeded)
        self._sent: dict[str, frozenset[str]] = {}  # uuid -> the keys of its task that only task-sent told
        self._deliveries: dict[str, list[dict[str, Any]]] = {}  # uuid -> all, of tasks that are not simple
        self._children: dict[str, list[str]] = {}  # uuid of a parent, known or not -> its children, sorted
        self._processes: dict[str, dict[float, dict[str, Any]]] = {}  # hostname -> pid -> status and fields, of workers
        self._weight = 0  # bytes that all of it takes at most, but for what is small
        self._gone: set[str] = set()  # hostnames with a process that is not alive
        self._last: dict[str, Mapping[str, Any]] = {}  # hostname -> its last event
        self._graph: dict[int, dict[str, int]] = {}  # tick -> type -> events
        self._began = time.time() - time.monotonic()
        self._turn({})
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        sizes = f"{self.event_count} events, {len(self.tasks)} tasks, {len(self.workers)} workers"
        return f"<State: {sizes}, {self.evicted} evicted>"

    def __getstate__(self) -> bytes:
        import pickle

        gone = dict.fromkeys(("_lock", "callback", "on_node_join", "on_node_leave"))
        with self._lock:  # while the whole of it is pickled
            return pickle.dumps({**self.__dict__, **gone})

    def __setstate__(self, state: bytes) -> None:
        import pickle

        self.__dict__.update(pickle.loads(state), _lock=threading.RLock(), _began=time.time() - time.monotonic())

    def now(self) -> float:
        """Return the seconds since the epoch by the clock of this State, which nobody sets, or of recorded events."""
        return self._heard if self._past else self._began + time.monotonic()

    def event(self, event: Mapping[str, Any]) -> None:
        """Take an event: count it, call the callback, then the method for its type. Any fields do no harm."""
        with self._lock:
            self.event_count += 1
            self.recent.append(event)
            self._is_small = False  # until _task() has looked
            kind = event.get("type")
            if type(kind) is not str:
                kind = ""
            received = event.get("local_received")
            if not isinstance(received, float) or not self._tick <= received < self._tick + GRAPH_TICK:
                self._turn(event)
            try:
                self._counts[kind] += 1
            except KeyError:
                self._count_first(kind)
            if self.callback:
                self.callback(self, event)
            hostname = event.get("hostname")
            if type(hostname) is str and 0 < len(hostname) <= MAX_NAME:
                self._last[hostname] = event
                if len(self._last) > 2 * self.max_workers_in_memory:
                    self._forget_last()
                worker = self.workers.get(hostname)
                if worker is not None and worker["heard"] != self._heard and not event.get("local"):
                    self._set_clock(worker, event)
                if hostname in self._gone and kind not in ("worker-offline", "worker-lost"):
                    self._revive(event)
            method = METHODS.get(kind)
            if method:
                getattr(self, method)(event)
            elif kind.startswith("task-"):
                self._task(event, kind_of(kind[: 5 + MAX_TYPE]))
            else:
                self.notes.append(event)
            if not self._is_small:
                self._weigh(event)

    task_sent = taking("task-sent", "A client has sent the task: PENDING, if nothing else is known.")
    task_started = taking("task-started", "A worker has started the task: STARTED.")
    task_succeeded = taking("task-succeeded", "The task has returned: SUCCESS.")
    task_failed = taking("task-failed", "The task has raised: FAILURE.")
    task_rejected = taking("task-rejected", "The worker does not want the task: REJECTED.")
    task_revoked = taking("task-revoked", "The task was called off: REVOKED.")
    task_retried = taking("task-retried", "The task has failed and will be tried again: RETRY.")

    def task_received(self, event: Mapping[str, Any]) -> None:
        """A worker has received the task: RECEIVED."""
        self.task_count += 1
        self._task(event, kind_of("task-received"))

    def worker_online(self, event: Mapping[str, Any]) -> None:
        """A worker has come online."""
        self.notes.append(event)
        self._set_status(event, "alive", event)

    def worker_heartbeat(self, event: Mapping[str, Any]) -> None:
        """A worker is alive."""
        self._set_status(event, "alive", event)

    def worker_offline(self, event: Mapping[str, Any]) -> None:
        """A worker has said goodbye: it has ended."""
        self.notes.append(event)
        self._set_status(event, "ended", event)

    def worker_lost(self, event: Mapping[str, Any]) -> None:
        """A worker has fallen silent without a goodbye: it is lost."""
        self.notes.append(event)
        self._set_status(event, "lost", event)

    # Queries.

    def get_task_info(self, uuid: str) -> dict[str, Any] | None:
        """Return a copy of a task's dict, or None."""
        with self._lock:
            task = self.tasks.get(uuid)
            return None if task is None else {**task, "children": list(task["children"])}

    def attempts(self, uuid: str) -> list[dict[str, Any]]:
        """Return the deliveries of a task, oldest first.

        Each is a dict of worker, pid, retries, state, received, started, ended (seconds since the epoch by the sender's
        clock), exception, traceback; None stands for what is not known.
        """
        with self._lock:
            task = self.tasks.get(uuid, {})
            deliveries = self._deliveries.get(uuid) or split(task, self._sent.get(uuid, NO_KEYS))
            return [attempt(merged([group])) for group in grouped(deliveries) if "sent" not in group[0]]

    def itertasks(self, limit: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (uuid, task), at most `limit`, in no order that matters."""
        return self.tasks_by_time(limit, reverse=False)

    def tasks_by_time(self, limit: int | None = None, reverse: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (uuid, task), at most `limit`, the one that something new was heard of last first, or last."""
        with self._lock:
            items = reversed(self.tasks.items()) if reverse else iter(self.tasks.items())
            return iter(list(islice(items, limit)))

    def tasks_by_type(
        self, name: str, limit: int | None = None, reverse: bool = True
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (uuid, task) of the tasks called `name`, ordered as in tasks_by_time()."""
        return islice((item for item in self.tasks_by_time(None, reverse) if item[1].get("name") == name), limit)

    def tasks_by_worker(
        self, hostname: str, limit: int | None = None, reverse: bool = True
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (uuid, task) of the tasks that a worker has, ordered as in tasks_by_time()."""
        return islice((item for item in self.tasks_by_time(None, reverse) if item[1].get("worker") == hostname), limit)

    def task_types(self) -> list[str]:
        """Return the names of the tasks in memory, sorted."""
        with self._lock:
            names = [task.get("name") for task in self.tasks.values()]
        return sorted({name for name in names if isinstance(name, str)})

    def type_stats(self, now: float | None = None) -> dict[str, dict[str, Any]]:
        """Return name -> figures of the tasks in memory.

        running, succeeded, failed, retried: how many; mean, p95, max: seconds that they took or have been running;
        last: the latest timestamp; error: the exception of the latest failure. None stands for what is not known.
        """
        now = self.now() if now is None else now
        by_name: dict[str, list[dict[str, Any]]] = {}
        with self._lock:
            for task in self.tasks.values():
                name = task.get("name")
                if isinstance(name, str):
                    by_name.setdefault(name, []).append(task)
            return {name: figures(tasks, now) for name, tasks in by_name.items()}

    def iteractive(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (uuid, task) of the tasks neither finished nor only sent, oldest start first."""
        with self._lock:
            active = [(uuid, self.tasks[uuid]) for uuid in self._active]
        return iter(sorted(active, key=lambda item: item[1].get("started", item[1]["timestamp"])))

    def last_worker_event(self, hostname: str | None = None) -> Mapping[str, Any] | None:
        """Return the last event from a worker, or from any; None if there was none."""
        with self._lock:
            if hostname is not None:
                return self._last.get(hostname)
            return next((event for event in reversed(self.recent) if process_of(event)[0] in self._last), None)

    def is_alive(self, worker: Mapping[str, Any], now: float | None = None) -> bool:
        """Whether a worker is neither lost nor ended, nor silent for twice the `freq` of its heartbeats."""
        return is_heard(worker, self.now() if now is None else now)

    def is_lost(self, task: Mapping[str, Any], now: float | None = None) -> bool:
        """Whether a task has not finished, and its worker, or its process of that, is no longer alive."""
        worker = self.workers.get(task.get("worker", ""))
        if worker is None or task["state"] in FINISHED:
            return False
        process = self._processes[task["worker"]].get(task.get("pid", NO_PID), worker)
        return process["status"] != "alive" or not self.is_alive(worker, now)

    def alive_workers(self, now: float | None = None) -> list[dict[str, Any]]:
        """Return the workers that are still heard from, see is_alive()."""
        with self._lock:
            return [worker for worker in self.workers.values() if self.is_alive(worker, now)]

    def scale_graph(
        self,
        width: int = 60,
        height: int = 8,
        span: float = 60.0,
        now: float | None = None,
        types: Iterable[str] | None = None,
    ) -> list[int]:
        """Return `width` ints, 0 to `height`: the events of each part of the last `span` seconds, oldest first.

        The tallest is `height`, and any event at all is at least 1. `types` counts only those. It remembers a quarter
        of an hour, by the quarter second.
        """
        columns = self.counts(width, span, now, types)
        top = max(columns, default=0)
        return [-(-count * height // top) if count else 0 for count in columns]

    def counts(self, width: int, span: float, now: float | None = None, types: Any = None) -> list[int]:
        """Return the numbers of events that scale_graph() scales."""
        wanted, zeros = None if types is None else frozenset(types), repeat(0)
        columns = [0] * max(0, width)
        if not columns or not 0 < span < inf:
            return columns
        now = self.now() if now is None else now
        last = int(now / GRAPH_TICK)
        first = max(int((now - span) / GRAPH_TICK), last - GRAPH_TICKS)
        with self._lock:
            counts_of = self._graph.get
            for tick in range(first, last + 1):
                counts = counts_of(tick)
                if counts:
                    column = int((1 - (now - (tick + 0.5) * GRAPH_TICK) / span) * width)
                    column = 0 if column < 0 else column if column < width else -1
                    columns[column] += sum(counts.values() if wanted is None else map(counts.get, wanted, zeros))
        return columns

    # Forgetting.

    def clear(self, ready: bool = True) -> None:
        """Forget workers, event_count, task_count, and the tasks; of these, with `ready`, the finished only."""
        with self._lock:
            self.clear_tasks(ready)
            self.workers.clear()
            self._processes.clear()
            self._gone.clear()
            self._last.clear()
            self.event_count = self.task_count = 0

    def clear_tasks(self, ready: bool = True) -> None:
        """Forget the finished tasks; all with `ready` false."""
        with self._lock:
            for uuid in [uuid for uuid, task in self.tasks.items() if not ready or task["state"] in FINISHED]:
                self._forget(uuid)

    def freeze_while(self, fun: Callable[..., Any], *args: Any, clear_after: bool = False, **kwargs: Any) -> Any:
        """Return fun(*args, **kwargs), during which no event changes anything; then clear() if `clear_after`."""
        with self._lock:
            try:
                return fun(*args, **kwargs)
            finally:
                if clear_after:
                    self.clear()

    # From here on: what an event changes.

    def _turn(self, event: Mapping[str, Any]) -> None:
        """Read the clock, and let events be counted in the tick of that time, until one was received in another."""
        wall = time.time()
        received = number(event.get("local_received"), number(event.get("timestamp"), wall) if self.recorded else wall)
        self._tick = int(received / GRAPH_TICK) * GRAPH_TICK
        self._past = self.recorded or abs(received - wall) > LIVE
        self._heard = received if self._past else self._began + time.monotonic()
        self._counts = self._graph.setdefault(int(self._heard / GRAPH_TICK), {})
        if len(self._graph) > GRAPH_TICKS:
            del self._graph[next(iter(self._graph))]

    def _count_first(self, type: str) -> None:
        """Count what may be the first event of its type in this tick."""
        if type not in self._counts and (len(self._counts) >= MAX_TYPES or len(type) > MAX_TYPE):
            type = ""
        self._counts[type] = self._counts.get(type, 0) + 1

    def _forget_last(self) -> None:
        """Forget the last events of many hostnames at a time: to find the first takes long."""
        many = len(self._last) - max(0, self.max_workers_in_memory)
        self._last = dict(islice(self._last.items(), many, None))

    def _revive(self, event: Mapping[str, Any]) -> None:
        """Let the process that speaks be alive again, if it was not."""
        hostname, pid = process_of(event)
        if self._processes[hostname].get(pid, NO_FIELDS).get("status", "alive") != "alive":
            self._set_status(event, "alive")

    def _set_clock(self, worker: dict[str, Any], event: Mapping[str, Any]) -> None:
        """Note when a worker was heard, and how far its clock was ahead."""
        worker["heard"] = self._heard
        sent, received = number(event.get("timestamp"), inf), number(event.get("local_received"), inf)
        worker["clock_offset"] = sent - received if sent < inf and received < inf else 0.0

    def _set_status(self, event: Mapping[str, Any], status: str, fields: Mapping[str, Any] = NO_FIELDS) -> None:
        """Give a process of a worker a status and fields.

        A worker shows the status and fields of its processes: of one that is alive, and told something last.
        """
        hostname, pid = process_of(event)
        if not hostname:
            return
        before = self.workers[hostname]["status"] if hostname in self.workers else ""
        worker = self.workers.get(hostname) or self._new_worker(hostname, event)
        self.workers.move_to_end(hostname)  # now the last to be forgotten
        processes = self._processes[hostname]
        if pid not in processes and len(processes) >= MAX_PROCESSES:
            del processes[next(iter(processes))]
        process = processes.setdefault(pid, {} if pid == NO_PID else {"pid": pid})
        for one in processes.values() if pid == NO_PID and status != "alive" else (process,):
            one["status"] = status
        take_fields(process, fields, NOT_WORKERS, fields)
        gone = any(one["status"] != "alive" for one in processes.values())
        (self._gone.add if gone else self._gone.discard)(hostname)
        for one in sorted(processes.values(), key=last_word):
            take_fields(worker, one, NO_KEYS, one)
        joins = before != "alive" or event.get("type") == "worker-online"
        if self.on_node_join and worker["status"] == "alive" and joins:
            self.on_node_join(worker)
        if self.on_node_leave and worker["status"] != "alive" and before in ("alive", ""):
            self.on_node_leave(worker)

    def _new_worker(self, hostname: str, event: Mapping[str, Any]) -> dict[str, Any]:
        while len(self.workers) >= max(1, self.max_workers_in_memory):
            gone = self.workers.popitem(last=False)[0]
            del self._processes[gone]
            self._gone.discard(gone)
        worker = self.workers[hostname] = {"hostname": hostname, "status": ""}
        self._processes[hostname] = {}
        self._set_clock(worker, event)
        return worker

    def _task(self, event: Mapping[str, Any], kind: Kind) -> None:
        """Let an event change its task; here it is the usual one of a usual task."""
        uuid = event.get("uuid")
        if type(uuid) is not str or not 0 < len(uuid) <= MAX_NAME:
            return
        timestamp = event.get("timestamp")
        if type(timestamp) is not float or not -1e15 < timestamp < 1e15:  # else number() need not be called
            timestamp = number(timestamp, number(event.get("local_received"), time.time()))
        state, _, key_of_time, shapes = kind
        shape = shapes.get(len(event))
        if shape is None or event.keys() != shape.keys:
            shape = shape_of(event, kind)
        _, fields, usual, follows = shape
        task = self.tasks.get(uuid)
        before: str | None = "STARTED"  # or any other of an active task
        if (  # the next of its only delivery
            follows
            and uuid in self._active
            and uuid not in self._deliveries
            and task is not None
            and event["pid"] == task.get("pid")
            and event["hostname"] == task.get("worker")
            and len(task) < MAX_FIELDS // 2
            and (uuid not in self._sent or self._sent[uuid].isdisjoint(fields))
        ):
            pass
        elif task is None and usual:  # the first
            before, task = None, self._new_task(uuid)
            self._begin(task, event, kind, timestamp)
        elif (  # its only delivery begins, after task-sent
            usual
            and task is not None
            and key_of_time == "received"
            and "state" in self._sent.get(uuid, ())
            and attempt_of(event) == attempt_of(task)
            and event.get("parent_id") in (None, task.get("parent_id"))
        ):
            before = "PENDING"
            self._begin(task, event, kind, timestamp)
            self._sent[uuid] = untold(task, event)
        else:
            self._take_unusual(uuid, event, kind, timestamp)
            return
        task["timestamp"] = timestamp
        task["state"] = state
        clock = event["clock"]
        if clock is not None:
            task["clock"] = clock
        if key_of_time:
            task[key_of_time] = max(timestamp, task[key_of_time]) if key_of_time in task else timestamp
        size = 0
        for key in fields:
            value = event[key]
            if value is not None:
                task[key] = value
                if type(value) is str:
                    size += len(value)
                elif type(value) not in FLAT:
                    size = LARGE
        if size <= MAX_SMALL:
            self._is_small = type(clock) in FLAT and type(event["utcoffset"]) in FLAT and type(event["pid"]) in FLAT
        if before != "STARTED" or state in self._classes:
            self._enter(task["uuid"], task, before)
            if before is None and "parent_id" in task:
                self._adopt(uuid, task["parent_id"])
        else:
            self.tasks.move_to_end(uuid)  # now the newest

    def _take_unusual(self, uuid: str, event: Mapping[str, Any], kind: Kind, timestamp: float) -> None:
        """Let any event change its task."""
        task = self.tasks.get(uuid) or self._new_task(uuid)
        uuid = task["uuid"]  # the same str everywhere
        before, parent = task.get("state"), task.get("parent_id")
        sent = self._sent.get(uuid, NO_KEYS)
        if uuid in self._deliveries or not is_simple(task, event, kind, sent):
            task = self._merge(task, event, kind, timestamp)
        elif kind.time == "sent":
            told = set(task)
            take_sent(task, event, timestamp)
            self._sent[uuid] = ALONE if before is None else shared(frozenset(task.keys() - told))
        else:
            if before is None or "state" in sent:
                self._begin(task, event, kind, timestamp)
            if sent:
                self._sent[uuid] = untold(task if "state" in sent else sent, event)
            take_event(task, event, kind, timestamp, sent)
        self._enter(uuid, task, before)
        if task.get("parent_id") is not parent:
            self._disown(uuid, parent)
            self._adopt(uuid, task.get("parent_id"))

    def _begin(self, told: dict[str, Any], event: Mapping[str, Any], kind: Kind, timestamp: float) -> None:
        """Begin a delivery with an event of it, whose process is known as a worker from now on; or a task-sent."""
        hostname, pid = process_of(event)
        told["began"] = timestamp
        if kind.time == "sent":
            self._sent[told["uuid"]] = ALONE
            if hostname:
                told["client"] = hostname
            return
        if hostname:
            if pid not in self._processes.get(hostname, ()):
                self._set_status(event, "alive")
            told["worker"] = self.workers[hostname]["hostname"]
        if pid != NO_PID:
            told["pid"] = pid
        if "clock" in told and event.get("clock") is None:
            del told["clock"]  # which is that of the task-sent

    def _merge(self, task: dict[str, Any], event: Mapping[str, Any], kind: Kind, timestamp: float) -> dict[str, Any]:
        """Return a new dict for a task that is not simple, after its event."""
        uuid = task["uuid"]
        deliveries = self._deliveries.setdefault(uuid, [])
        if not deliveries:
            deliveries += split(task, self._sent.pop(uuid, NO_KEYS))
        told: dict[str, Any] | None = None
        if kind.time != "sent":
            process = process_of(event)
            mine = [told for told in deliveries if "sent" not in told and process_in(told) == process]
            told = delivery_for(event, kind, mine)
        new: dict[str, Any] = {} if told is None else told
        if kind.time == "sent":
            take_sent(new, event, timestamp)
        else:
            if told is None:  # the times when its deliveries began are in the order of its process, too
                self._begin(new, event, kind, max([timestamp, *(before["began"] for before in mine)]))
            take_event(new, event, kind, timestamp)
        if told is None:
            deliveries.append(new)
        if len(deliveries) > MAX_DELIVERIES:
            deliveries.remove(min(deliveries, key=age_of))
        record = self.tasks[uuid] = vars(Record())
        record["uuid"], record["children"] = uuid, task["children"]
        record.update(merged(grouped(deliveries)))
        return record

    def _new_task(self, uuid: str) -> dict[str, Any]:
        """Make room for a task, and return it; _enter() enters it."""
        while len(self.tasks) >= max(1, self.max_tasks_in_memory):
            self._evict()
        task = vars(Record())
        task["uuid"] = uuid
        task["children"] = self._children.get(uuid, NO_CHILDREN)
        return task

    def _enter(self, uuid: str, task: dict[str, Any], before: str | None) -> None:
        """List a task where those of its state are, and last of all; `before` is None if it is new."""
        state = task["state"]
        there = self._classes.get(state, self._active)
        if before is None:
            self.tasks[uuid] = task
        else:
            self.tasks.move_to_end(uuid)  # now the newest
            here = self._classes.get(before, self._active)
            if here is there:
                return
            del here[uuid]
        there[uuid] = None
        if state in FINISHED:  # have what is equal in other tasks but once
            if task.get("root_id") == uuid:
                task["root_id"] = uuid
            for key in ("name", "kwargs"):
                if type(task.get(key)) is str and len(task[key]) <= MAX_SMALL:
                    task[key] = sys.intern(task[key])

    def _adopt(self, uuid: str, parent: Any) -> None:
        """Enter a task among the children of its parent, whether that is known yet or not."""
        parent = name_of(parent)
        if parent:
            children = self._children.setdefault(parent, [])
            insort(children, uuid)
            if parent in self.tasks:
                self.tasks[parent]["children"] = children

    def _disown(self, uuid: str, parent: Any) -> None:
        """Enter a task no longer among its parent's children."""
        parent = name_of(parent)
        if parent:
            children = self._children[parent]
            del children[bisect_left(children, uuid)]
            if not children:
                del self._children[parent]
                if parent in self.tasks:
                    self.tasks[parent]["children"] = NO_CHILDREN

    def _evict(self) -> None:
        """Forget a task to make room: the oldest successful one, else finished one, else one only sent, else any."""
        self.evicted += 1
        self._forget(next(chain(self._succeeded, self._failed, self._waiting, self._active)))

    def _forget(self, uuid: str) -> None:
        task = self.tasks.pop(uuid)
        del self._classes.get(task["state"], self._active)[uuid]
        self._disown(uuid, task.get("parent_id"))
        self._sent.pop(uuid, None)
        self._deliveries.pop(uuid, None)

    def _weigh(self, event: Mapping[str, Any]) -> None:
        """Count the bytes of the last event; of a large one keep a copy of its own, with what is nested as JSON."""
        values = [value for value in (*event, *event.values()) if type(value) not in FLAT]
        chars = sum(map(len, values)) if all(type(value) is str and value.isascii() for value in values) else LARGE
        if chars <= MAX_NAME + 2 * MAX_SMALL:
            return
        fields = {**dict(islice(event.items(), 2 * MAX_FIELDS)), **{key: event[key] for key in USUAL & event.keys()}}
        size = 4 * chars if chars < LARGE // 4 else weight_of(fields)
        self._weight += size
        if size > LARGE or len(fields) < len(event):
            large = {key: value for key, value in fields.items() if type(value) is not str and bytes_of(value) > LARGE}
            texts = {key: format_json(value).decode() for key, value in large.items()}
            self._weight += sum(map(len, texts.values()))
            copy = new_event(Event)
            copy.update({**fields, **texts})
            for events in (self.recent, self.notes):
                if events and events[-1] is event:
                    events[-1] = copy
            hostname = process_of(event)[0]
            if hostname:
                self._last[hostname] = copy
            for record in self._records(name_of(event.get("uuid")), hostname):
                record.update((key, text) for key, text in texts.items() if record.get(key) is large[key])
        if self._weight > MAX_STATE:
            self._slim()

    def _records(self, uuid: str, hostname: str) -> Iterator[dict[str, Any]]:
        """Yield all that is kept of a task and of a worker."""
        yield from (self.tasks[uuid], *self._deliveries.get(uuid, ())) if uuid in self.tasks else ()
        if hostname in self.workers:
            yield from (self.workers[hostname], *self._processes[hostname].values())

    def _slim(self) -> None:
        """Weigh all that is kept. Until it is little, forget large values, the oldest first, then tasks, then all."""
        records: list[Any] = [record for uuid in self.tasks for record in self._records(uuid, "")]
        records += [record for hostname in self.workers for record in self._records("", hostname)]
        records += {id(event): event for event in (*self._last.values(), *self.notes, *self.recent)}.values()
        self._weight, enough = sum(map(weight_of, records)), MAX_STATE // 2
        places: dict[int, list[tuple[Any, str]]] = {}  # of a large value, which several may have in common
        for record, key, value in ((one, *item) for one in records for item in one.items()):
            if type(value) is str and bytes_of(value) > LARGE:
                if places.setdefault(id(value), []):
                    self._weight -= bytes_of(value)
                places[id(value)].append((record, key))
        for found in places.values():
            if self._weight > enough:
                self._weight -= bytes_of(found[0][0][found[0][1]])
                self.evicted += 1
                for record, key in found:
                    record[key] = FORGOTTEN
        while self._weight > enough and self.tasks:
            victim = next(chain(self._succeeded, self._failed, self._waiting, self._active))
            self._weight -= sum(map(weight_of, self._records(victim, "")))
            self._evict()
        if self._weight > enough:
            for kept in (self.workers, self._processes, self._gone, self._last, self.notes, self.recent):
                kept.clear()


# --- the screen: pure, from State and View to lines of styled text ------------------------------------------------

# A style is a name, to which curses gives a look. All is drawn in Unicode, and put in ASCII where that is to be.

STYLES = {
    "FAILURE": "red",
    "RETRY": "yellow",
    "STARTED": "cyan",
    "RECEIVED": "blue",
    "PENDING": "dim",
    "SUCCESS": "green",
    "REVOKED": "magenta",
    "REJECTED": "magenta",
}
EVENT_STYLES = {
    **{type: STYLES[state] for type, state in TASK_STATES.items()},
    "worker-online": "green",
    "worker-heartbeat": "dim",
    "worker-offline": "magenta",
    "log-critical": "red",
    "log-error": "red",
    "log-warning": "yellow",
    "log-debug": "dim",
}
URGENT = ("FAILURE", "RETRY", "STARTED", "", "RECEIVED", "PENDING", "SUCCESS", "REVOKED", "REJECTED")  # "": the others
BARS = " ▁▂▃▄▅▆▇█"
TRANSITIONS = tuple(type[5:] for type in TASK_STATES)
FIRST_SHOWN = ("worker", "client", "args", "kwargs", "progress", "result", "exception")  # of everything about a task
TRACE = ("traceback", "stderr")  # the latter of a command that was run
SHOWN_APART = frozenset(
    (*FIRST_SHOWN, *TRANSITIONS, "name", "uuid", "state", "timestamp", "began", "children", "parent_id", "root_id", "traceback")
)
HINTS = {  # the most important first
    "table": ("q quit", "? keys", "enter details", "/ filter", "s sort", "space freeze", "c clear finished"),
    "filtered": ("esc drop filter", "q quit", "? keys", "enter details", "s sort", "space freeze"),
    "typing": ("esc drop", "enter keep", "words, or state:failure,retry", "name: worker:"),
    "panel": ("q back", "j/k scroll"),
    "linked": ("q back", "j/k scroll", "tab next link", "enter go there"),
}
DAY_AND_TIME = "%Y-%m-%d %H:%M:%S"
NOTHING: Mapping[str, Any] = {}
INVISIBLE = "\u200c\u200d\ufe0e\ufe0f"  # joiners and variation selectors: few terminals agree on what they make wide
HELP = """
1 2 3, Tab      tasks, workers, events; shift-Tab goes back
j k, arrows     move; also PgUp PgDn, g G for the ends, the mouse wheel
Enter, i        everything about the task, worker or event
t               traceback of the task
r               result of the task
/               filter as you type; Enter keeps the filter, Escape drops it
s               sort by the next column
space           freeze the picture; events go on being counted
c               clear what has finished
?               these keys
ctrl-L          paint the screen anew
q, Escape       back; from the top, quit

In an opened task:
Tab, Enter      choose its parent or a child; go there, and q comes back

A filter is words that must all be found, in any case:
resize alpha          in name, uuid, worker, state, arguments, result
state:failure,retry   in the state, either of them
name:shop worker:beta type:log host:laptop uuid:5d0c
"""


_small = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def json_brackets(value: Any) -> Sequence[str] | None:
    """Return what stands around the items of a value as JSON, None if it has none."""
    return "{}" if isinstance(value, dict) else "[]" if isinstance(value, (list, tuple)) else None


def text_of(value: Any, limit: int) -> str:
    """Return the start of a value as text: a str as it is, "" for None, else JSON."""
    if isinstance(value, str):
        return value[:limit]
    if value is None:
        return ""
    try:
        if weight(value, 4 * limit) <= 4 * limit:  # so far the encoder in C is quicker, though not all is shown
            return _small(value)[:limit]
    except (TypeError, ValueError):
        pass  # something in it that JSON has no form for
    return start_of(spell(value, limit, lambda part: format_json(part).decode(), json_brackets), limit)


@lru_cache(MAX_GLYPHS)
def harmless(char: str) -> str:
    """Return what is shown for a character: white space is a space, what does not print is "?"."""
    if char in INVISIBLE:
        return ""
    return char if char.isprintable() else " " if char.isspace() else "?"


def printable(value: Any, limit: int = MAX_SHOWN) -> str:
    """Return the start of a value as text that does nothing to a terminal but show.

    No control, bidirectional or unassigned character is left, nor what is beyond any terminal's width.
    """
    text = text_of(value, limit)
    if text.isprintable() and (text.isascii() or not any(char in text for char in INVISIBLE)):
        return text
    return "".join(map(harmless, text))


def plural(noun: str, n: int) -> str:
    """Return the noun as it stands behind `n`."""
    return noun if n == 1 else f"{noun}s"


@lru_cache(MAX_GLYPHS)
def cells_of(char: str) -> int:
    """Return 2 for a wide character, 0 for one that joins another, else 1 (Unicode Standard Annex 11)."""
    import unicodedata

    if unicodedata.category(char) in ("Mn", "Me") or "\u1160" <= char <= "\u11ff" or "\ud7b0" <= char <= "\ud7fb":
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def cells(text: str) -> int:
    """Return how many columns of a terminal printable text takes."""
    return len(text) if text.isascii() else sum(map(cells_of, text))


def chars_in(text: str, width: int) -> int:
    """Return how many characters of printable text fit in `width` columns."""
    if text.isascii():
        return min(len(text), width)
    return bisect_right(list(accumulate(map(cells_of, text[: 2 * width + 1]))), width)


def fit(text: str, width: int) -> str:
    """Return printable text filled up, or visibly cut, to `width` columns."""
    room = width - cells(text)
    if room < 0:
        text = text[: chars_in(text, width - 1)] + "…" if width else ""
        room = width - cells(text)
    return text + " " * room


def fit_line(line: Line, width: int) -> Line:
    """Return a line filled up, in the style of its end, or cut to `width` columns."""
    fitted = []
    for text, style in line:
        taken = fit(text, min(width, cells(text)))
        fitted.append((taken, style))
        width -= cells(taken)
    return [*fitted, (" " * width, fitted[-1][1] if fitted else "")] if width else fitted


def wrap(value: Any, width: int) -> Iterator[str]:
    """Yield a value as printable lines of at most `width` columns, broken at a space where one is near."""
    text = text_of(value, MAX_DETAIL)
    for line in text.expandtabs(4).splitlines() or [""]:
        rest = printable(line, len(line)).rstrip()
        indent = rest[: min(len(rest) - len(rest.lstrip()), width // 4)]  # of what is continued, too
        while (size := max(1, chars_in(rest, width))) < len(rest):
            space = rest.rfind(" ", size * 2 // 3, size + 1)
            size = space + 1 if space > 0 else size
            yield rest[:size].rstrip()
            rest = indent + rest[size:]
        yield rest
    if len(text) == MAX_DETAIL:
        yield "… and more"


def local_time(form: str, seconds: Any) -> str:
    """Return a time as local time, "" for what is none; `form` as for time.strftime()."""
    try:
        return time.strftime(form, time.localtime(number(seconds, inf)))
    except (OverflowError, OSError, ValueError):
        return ""


def is_old(seconds: Any, now: float) -> bool:
    """Whether a time of day would not tell of a time that it was on another day."""
    return now - number(seconds, now) > 86400


def clock_time(seconds: Any, now: float) -> str:
    """Return local time of day in at most 8 characters, or the day if it was more than a day ago."""
    return local_time("%m-%d" if is_old(seconds, now) else "%H:%M:%S", seconds)


def fine_time(form: str, seconds: Any) -> str:
    """Return a time as local time to the millisecond, "" for what is none."""
    seconds = round(number(seconds, inf), 3)
    text = local_time(form, seconds)
    return f"{text}.{round(seconds * 1000) % 1000:03d}" if text else ""


def duration(seconds: float) -> str:
    """Return a length of time in at most 6 characters, if it is below 270 years."""
    seconds = max(0.0, seconds)
    if seconds < 99.95:
        return f"{seconds * 1000:.0f}ms" if seconds < 0.9995 else f"{seconds:.1f}s"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if minutes < 100:
        return f"{minutes}m{second:02d}s"
    return f"{hours}h{minute:02d}m" if hours < 100 else f"{hours // 24}d"


def seconds_run(task: Mapping[str, Any], now: float) -> float | None:
    """Return how long a task took, or has taken so far; None if it has not started, or waits for another attempt."""
    state, start = task["state"], task.get("started")
    if state in FINISHED and number(task.get("runtime"), -1.0) >= 0:
        return float(task["runtime"])
    if start is None or state in ("PENDING", "RECEIVED", "RETRY"):
        return None
    return float((task["timestamp"] if state in FINISHED else now) - start)


# Texts: functions (record, now) -> text of a record, a task, worker or event. They make cells, and filters look at them.


def field(key: str) -> Text:
    """Return a text: a field."""
    return lambda record, now: printable(record.get(key))


def time_of(task: Mapping[str, Any], now: float) -> str:
    """Return when something new was heard of a task."""
    return clock_time(task["timestamp"], now)


def uuid_of(task: Mapping[str, Any], now: float) -> str:
    """Return the start of a task's uuid."""
    return printable(task["uuid"], 8)


def host_of(task: Mapping[str, Any], now: float) -> str:
    """Return the worker that has a task, or else the client that sent it."""
    return printable(task["worker"] if "worker" in task else task.get("client"))


def run_of(task: Mapping[str, Any], now: float) -> str:
    """Return how long a task took, or has taken so far."""
    seconds = seconds_run(task, now)
    return "" if seconds is None else duration(seconds)


def outcome_of(task: Mapping[str, Any], now: float) -> str:
    """Return what matters most of a task: its exception, result, progress or arguments."""
    for key in ("exception",) * (task["state"] in ("FAILURE", "RETRY")) + ("result",):
        if task.get(key) is not None:
            return printable(task[key])
    texts = (printable(task.get("args")), printable(task.get("kwargs")))
    given = " ".join(text for text in texts if text not in ("", "{}"))
    done = number(task.get("progress"), -1.0)
    if task["state"] in FINISHED or not 0 <= done <= 1:
        return given
    return f"{'━' * round(done * 8):─<8} {done:4.0%} {given}"


def task_text(task: Mapping[str, Any], now: float) -> str:
    """Return all of a task in which a filter looks for a word."""
    keys = ("name", "uuid", "worker", "client", "state", "args", "kwargs", "result", "exception")
    return "\n".join([printable(task[key]) for key in keys if key in task])


def status_of(worker: Mapping[str, Any], now: float) -> str:
    """Return whether a worker is alive."""
    return "alive" if is_heard(worker, now) else "gone"


def heard_of(worker: Mapping[str, Any], now: float) -> str:
    """Return how long ago something was heard of a worker, or what it said of its end."""
    heard = worker["heard"] if worker["heard"] > -inf else number(worker.get("timestamp"), now)
    return duration(now - heard)


def load_of(worker: Mapping[str, Any], now: float) -> str:
    """Return the load of a worker's machine, over 1, 5 and 15 minutes."""
    load = worker.get("loadavg")
    return " ".join(map(printable, load[:3])) if isinstance(load, (list, tuple)) else printable(load)


def software_of(worker: Mapping[str, Any], now: float) -> str:
    """Return what a worker runs."""
    return " ".join(printable(worker[key]) for key in ("sw_ident", "sw_ver", "sw_sys") if key in worker)


def worker_text(worker: Mapping[str, Any], now: float) -> str:
    """Return all of a worker in which a filter looks for a word."""
    return f"{printable(worker['hostname'])}\n{status_of(worker, now)}\n{software_of(worker, now)}"


def moment_of(event: Mapping[str, Any], now: float) -> str:
    """Return when an event happened; without the seconds if that was more than a day ago."""
    moment = event.get("timestamp")
    return local_time("%m-%d %H:%M", moment) if is_old(moment, now) else fine_time("%H:%M:%S", moment)


def event_state(event: Mapping[str, Any], now: float) -> str:
    """Return the state that an event tells a task to have."""
    kind = printable(event.get("type"))
    return TASK_STATES.get(kind) or (kind[5:].upper() if kind.startswith("task-") else "")


def fields_of(event: Mapping[str, Any], now: float = 0.0) -> str:
    """Return what an event tells beside its type, time and host."""
    shown_apart = ("type", "timestamp", "hostname", "local_received", "utcoffset", "clock", "pid")
    told = (key for key in event if key not in shown_apart and event[key] is not None)
    return " ".join([f"{printable(key)}={printable(event[key])}" for key in islice(told, MAX_FIELDS)])[:MAX_SHOWN]


def short_fields(event: Mapping[str, Any], now: float) -> str:
    """Return the same, with the start of each uuid only."""
    return re.sub(r"([0-9a-f]{8})(-[0-9a-f]{4}){3}-[0-9a-f]{12}", r"\1", fields_of(event))


def event_text(event: Mapping[str, Any], now: float) -> str:
    """Return all of an event in which a filter looks for a word."""
    return f"{printable(event.get('type'))}\n{printable(event.get('hostname'))}\n{fields_of(event)}"


def plain_line(event: Mapping[str, Any]) -> str:
    """Return an event as a line for people."""
    texts = (local_time("%H:%M:%S", event.get("timestamp")), *event_text(event, 0.0).split("\n"))
    return "  ".join(filter(None, texts))


def json_line(event: Mapping[str, Any]) -> str:
    """Return an event as a line of JSON in ASCII, in which nothing can harm a terminal."""
    try:
        return json.dumps(event, allow_nan=False)
    except ValueError:
        return json.dumps(plain(event))


def state_style(task: Mapping[str, Any], now: float) -> str:
    """Return the style of a task's state."""
    return STYLES.get(task["state"], "cyan")


def name_style(task: Mapping[str, Any], now: float) -> str:
    """Return the style of a task's name: bold until it is finished."""
    return "" if task["state"] in FINISHED else "bold"


def outcome_style(task: Mapping[str, Any], now: float) -> str:
    """Return the style of a task's outcome: a failure stands out."""
    return "red" if task["state"] == "FAILURE" else ""


def status_style(worker: Mapping[str, Any], now: float) -> str:
    """Return the style of a worker's status."""
    return "green" if is_heard(worker, now) else "red"


def type_style(event: Mapping[str, Any], now: float) -> str:
    """Return the style of an event's type."""
    return EVENT_STYLES.get(printable(event.get("type")), "bold")


def as_it_comes(record: Mapping[str, Any], now: float) -> int:
    """Return the same for all, so that they stay as they are: an order."""
    return 0


def longest_first(task: Mapping[str, Any], now: float) -> float:
    """Return an order: the task that took, or has taken, longest first."""
    seconds = seconds_run(task, now)
    return inf if seconds is None else -seconds


def by(text: Text) -> Callable[[Mapping[str, Any], float], str]:
    """Return an order by a text, whatever the case."""
    return lambda record, now: text(record, now).lower()


def by_number(key: str) -> Callable[[Mapping[str, Any], float], float]:
    """Return an order by a field, the highest number first."""
    return lambda record, now: -number(record.get(key), -inf)


class Column(
    namedtuple("Column", ["heading", "width", "share", "rank", "text", "style", "order"], defaults=("", None))
):
    """A column of a table: its heading, which starts with a space if it stands at the right; its least width, and its
    share of what is beyond all of these; its rank, the highest being left out first; its text; its style, a name or a
    function (record, now) -> name; what it is sorted by, a function (record, now), or None."""

    __slots__ = ()


TASK_COLUMNS = (
    Column("TIME", 8, 0.0, 4, time_of, "dim", as_it_comes),
    Column("STATE", 8, 0.0, 2, field("state"), state_style, by(field("state"))),
    Column("NAME", 11, 0.3, 1, field("name"), name_style, by(field("name"))),
    Column("UUID", 8, 0.0, 7, uuid_of, "dim"),
    Column("WORKER", 10, 0.2, 6, host_of, "", by(host_of)),
    Column("   RUN", 6, 0.0, 3, run_of, "", longest_first),
    Column("RESULT", 12, 0.5, 5, outcome_of, outcome_style),
)
WORKER_COLUMNS = (
    Column("WORKER", 16, 0.4, 1, field("hostname"), "bold", as_it_comes),
    Column("STATUS", 7, 0.0, 2, status_of, status_style, by(status_of)),
    Column("    PID", 7, 0.0, 6, field("pid")),
    Column(" ACTIVE", 7, 0.0, 3, field("active"), "", by_number("active")),
    Column("    DONE", 8, 0.0, 4, field("processed"), "", by_number("processed")),
    Column(" HEARD", 6, 0.0, 5, heard_of),
    Column("LOAD", 14, 0.0, 7, load_of),
    Column("SOFTWARE", 14, 0.6, 8, software_of, "dim"),
)
EVENT_COLUMNS = (
    Column("TIME", 12, 0.0, 3, moment_of, "dim", as_it_comes),
    Column("TYPE", 14, 0.15, 1, field("type"), type_style, by(field("type"))),
    Column("HOST", 12, 0.15, 4, field("hostname"), "", by(field("hostname"))),
    Column("FIELDS", 16, 0.7, 2, short_fields),
)


class Page(namedtuple("Page", ["title", "kind", "count", "held", "items", "columns", "words", "fields", "empty"])):
    """A table: its title, and the kind of panel that a row opens; count(state, now) for its tab; held(state), of which
    each is a row, and items(state) -> list of (identity, record), in the order of its first column; the text in which a
    filter looks for words, and those in which it does by name; what to say if the table is empty."""

    __slots__ = ()


def events_of(state: State) -> list[tuple[Any, Any]]:
    """Return the recent events, the newest first, those of tasks with the task's name."""
    rows = []
    for event in reversed(state.recent):
        uuid = event.get("uuid")
        task = state.tasks.get(uuid) if isinstance(uuid, str) else None
        record = event
        if task and "name" in task and event.get("name") is None:
            record = {"name": None, **event}  # before the other fields
            record["name"] = task["name"]
        rows.append((event, record))
    return rows


def alive_of(state: State, now: float) -> str:
    """Return how many workers are alive, and if others are known, of how many."""
    alive, known = len(state.alive_workers(now)), len(state.workers)
    return f"{alive:,}" if alive == known else f"{alive:,}/{known:,}"


PAGES = {
    "1": Page(
        *("Tasks", "task", lambda state, now: f"{len(state.tasks):,}", lambda state: state.tasks),
        *(lambda state: list(state.tasks_by_time()), TASK_COLUMNS, task_text),
        {"name": field("name"), "uuid": field("uuid"), "worker": host_of, "host": host_of, "state": field("state")},
        "no tasks yet: 3 shows every event",
    ),
    "2": Page(
        *("Workers", "worker", alive_of, lambda state: state.workers),
        *(lambda state: sorted(state.workers.items()), WORKER_COLUMNS, worker_text),
        dict.fromkeys(("worker", "host"), field("hostname")),
        "no workers yet: a Dispatcher with freq=2 is one, and so is the host of a task",
    ),
    "3": Page(
        *("Events", "event", lambda state, now: f"{state.event_count:,}", lambda state: state.recent),
        *(events_of, EVENT_COLUMNS, event_text),
        {
            **dict.fromkeys(("worker", "host"), field("hostname")),
            "type": field("type"),
            "name": field("name"),
            "uuid": field("uuid"),
            "state": event_state,
        },
        "no events yet",
    ),
}


class Panel(namedtuple("Panel", ["kind", "identity", "top", "link"], defaults=("", 0, None))):
    """What is open above the table: its kind, what it is about, its first row on the screen, the chosen link."""

    __slots__ = ()


class View(
    namedtuple(
        "View",
        ["page", "selected", "index", "anchor", "order", "others", "filter", "typing", "panels", "frozen", "done"],
        defaults=("", None, 0, 0, 0, (), "", False, (), None, False),
    )
):
    """What the user has chosen to see.

    A page, "" for the one that has something; the selected row's identity, None for the first whichever it is, its
    index then, and the line of the table where it stays; the number of the order; these four of the other pages; the
    filter, and whether it is being typed; the open panels, the uppermost last; the State and time that stay on the
    screen, or None; whether to quit.
    """

    __slots__ = ()


class Stage(namedtuple("Stage", ["live", "state", "page", "rows", "columns", "now", "table"])):
    """What a view is of: the State that takes events, the one to show, the Page, how large the terminal is, the time, and
    the rows of the table if they are known."""

    __slots__ = ()


def still(state: State) -> State:
    """Return a copy of a State that shows the same, whatever comes."""
    copy = State()
    copy.tasks.update((uuid, {**task, "children": list(task["children"])}) for uuid, task in state.tasks.items())
    copy.workers.update((hostname, dict(worker)) for hostname, worker in state.workers.items())
    copy.recent.extend(state.recent)
    copy.event_count = state.event_count
    return copy


def page_of(view: View, state: State) -> str:
    """Return the page to show: until one is chosen, the one that has something."""
    return view.page or ("1" if state.tasks or not state.event_count else "3")


def stage_of(state: State, view: View, rows: int, columns: int, now: float, table: Any = None) -> Stage:
    """Return the stage of a view: the state as it is, or as it was when it was frozen."""
    shown, then = view.frozen or (state, now)
    return Stage(state, shown, PAGES[page_of(view, shown)], rows, columns, then, table)


def terms_of(text: str, page: Page) -> Iterator[tuple[Text, list[str]]]:
    """Yield the terms of a filter: a text, and alternatives of which one is to be found there.

    A term that names a field of another page than this is none.
    """
    for word in text.lower().split():
        name, colon, wanted = word.partition(":")
        alternatives = [alternative for alternative in wanted.split(",") if alternative]
        if not colon or not any(name in other.fields for other in PAGES.values()):
            yield page.words, [word]
        elif name in page.fields and alternatives:
            yield page.fields[name], alternatives


def matches(record: Mapping[str, Any], terms: Iterable[tuple[Text, list[str]]], now: float) -> bool:
    """Whether each of the terms is found in a record."""
    for text, alternatives in terms:
        found = text(record, now).lower()
        if not any(alternative in found for alternative in alternatives):
            return False
    return True


def orders_of(page: Page) -> list[Any]:
    """Return the columns that a page can be sorted by."""
    return [column for column in page.columns if column.order]


def table_of(view: View, stage: Stage) -> list[tuple[Any, Any]]:
    """Return (identity, record) of the rows of the table, filtered and sorted."""
    table = stage.page.items(stage.state)
    terms = list(terms_of(view.filter, stage.page))
    if terms:
        table = [row for row in table if matches(row[1], terms, stage.now)]
    if view.order:
        order = orders_of(stage.page)[view.order].order
        table.sort(key=lambda row: order(row[1], stage.now))
    return table  # type: ignore[no-any-return]


# What a panel shows: rows, each a line and the link that it is, (kind, identity) of another panel, or None.


def entry(label: str, value: Any, width: int, style: str = "") -> Iterator[Row]:
    """Yield a labelled value as rows."""
    indent = min(12, width // 4)
    labels = chain((label,), repeat(""))
    for text, name in zip(wrap(value, max(1, width - indent)), labels):
        yield [(fit(name, indent), "dim"), (text, style)], None


def task_link(label: str, uuid: str, stage: Stage) -> Iterator[Row]:
    """Yield a row that leads to a task."""
    task, width = stage.state.tasks.get(uuid), stage.columns
    if task is None:
        yield from entry(label, f"{uuid}  not in memory", width, "dim")
        return
    texts = (
        uuid_of(task, stage.now),
        printable(task["state"]),
        printable(task.get("name")),
        outcome_of(task, stage.now),
    )
    line, _ = next(entry(label, "", width))
    yield [line[0], ("  ".join(texts), state_style(task, stage.now))], ("task", uuid)


def rest_of(record: Mapping[str, Any], shown: Container[str], width: int) -> Iterator[Row]:
    """Yield rows of the fields that are not shown already."""
    for key in record:
        if key not in shown:
            yield from entry(printable(key), record[key], width)


def times_of(task: Mapping[str, Any], width: int) -> Iterator[Row]:
    """Yield rows with the times of a task's transitions, and what went by between them."""
    before = None
    for name in sorted((name for name in TRANSITIONS if name in task), key=task.__getitem__):
        since = "" if before is None else f"  +{duration(task[name] - before)}"
        yield from entry(name, fine_time(DAY_AND_TIME, task[name]) + since, width)
        before = task[name]


def relatives_of(task: Mapping[str, Any], stage: Stage) -> Iterator[Row]:
    """Yield rows that lead to a task's parent, root and children."""
    seen = {task["uuid"]}
    for label in ("parent", "root"):
        relative = task.get(f"{label}_id")
        if isinstance(relative, str) and relative not in seen:
            seen.add(relative)
            yield from task_link(label, relative, stage)
    children = [uuid for uuid in task["children"] if uuid not in seen]
    for label, uuid in zip(chain(("children",), repeat("")), children[:MAX_LINKS]):
        yield from task_link(label, uuid, stage)
    if len(children) > MAX_LINKS:
        yield from entry("", f"and {len(children) - MAX_LINKS:,} more", stage.columns, "dim")


def part_rows(keys: Sequence[str], uuid: str, stage: Stage) -> Iterator[Row]:
    """Yield the whole of the first of these fields that a task has, its lines kept."""
    task = stage.state.tasks.get(uuid, NOTHING)
    value = next((task[key] for key in keys if task.get(key) is not None), f"no {keys[0]}")
    for text in wrap(value, stage.columns):
        yield [(text, "")], None


def task_rows(uuid: str, stage: Stage) -> Iterator[Row]:
    """Yield everything about a task."""
    task, width = stage.state.tasks.get(uuid), stage.columns
    if task is None:
        yield from entry("", f"{uuid} is not in memory: cleared, or evicted to make room", width)
        return
    yield from entry("name", task.get("name"), width, "bold")
    yield from entry("uuid", uuid, width)
    yield from entry("state", f"{task['state']}  {run_of(task, stage.now)}", width, state_style(task, stage.now))
    for key in FIRST_SHOWN:
        if key in task:
            yield from entry(key, task[key], width, "red" if key == "exception" else "")
    yield from times_of(task, width)
    yield from relatives_of(task, stage)
    yield from rest_of(task, SHOWN_APART, width)
    if "traceback" in task:
        yield [("", "")], None
        yield from part_rows(TRACE, uuid, stage)


def worker_rows(hostname: str, stage: Stage) -> Iterator[Row]:
    """Yield everything about a worker, and the way to its latest tasks."""
    worker, width = stage.state.workers.get(hostname), stage.columns
    if worker is None:
        yield from entry("", f"{hostname} is not in memory", width)
        return
    yield from entry("worker", hostname, width, "bold")
    yield from entry("status", status_of(worker, stage.now), width, status_style(worker, stage.now))
    yield from entry("latest", fine_time(DAY_AND_TIME, worker.get("timestamp")), width)
    yield from entry("heard", f"{heard_of(worker, stage.now)} ago", width)
    yield from rest_of(worker, ("hostname", "heard", "timestamp"), width)
    tasks = stage.state.tasks_by_worker(hostname, MAX_LINKS)
    for label, (uuid, _) in zip(chain(("tasks",), repeat("")), tasks):
        yield from task_link(label, uuid, stage)


def event_rows(event: Mapping[str, Any], stage: Stage) -> Iterator[Row]:
    """Yield everything about an event, and the way to its task."""
    yield from entry("type", event.get("type"), stage.columns, type_style(event, stage.now))
    yield from entry("time", fine_time(DAY_AND_TIME, event.get("timestamp")), stage.columns)
    uuid = event.get("uuid")
    if isinstance(uuid, str):
        yield from task_link("task", uuid, stage)
    received = fine_time(DAY_AND_TIME, event.get("local_received"))
    yield from entry("received", received, stage.columns)
    yield from rest_of(event, ("type", "timestamp", "local_received"), stage.columns)


def help_rows(identity: Any, stage: Stage) -> Iterator[Row]:
    """Yield what the keys do."""
    for text in wrap(HELP.strip(), stage.columns):
        yield [(text, "")], None


PANELS: dict[str, Callable[[Any, Stage], Iterator[Row]]] = {
    "task": task_rows,
    "worker": worker_rows,
    "event": event_rows,
    "keys": help_rows,
    "traceback": partial(part_rows, TRACE),
    "result": partial(part_rows, ("result",)),
}


def rows_of(view: View, stage: Stage) -> list[Any]:
    """Return what there is to scroll through: the rows of the uppermost panel, or else of the table."""
    if not view.panels:
        return table_of(view, stage) if stage.table is None else stage.table
    kind, identity, *_ = view.panels[-1]
    rows = list(islice(PANELS[kind](identity, stage), MAX_ROWS + 1))
    return rows if len(rows) <= MAX_ROWS else [*rows[:MAX_ROWS], ([("… and more", "dim")], None)]


def place(view: View, rows: Sequence[tuple[Any, Any]], room: int) -> tuple[int, int]:
    """Return the index of the selected row of a table, or of the chosen link of a panel, -1 without any; and of the row
    at the top of the screen."""
    if view.panels:
        panel = view.panels[-1]
        chosen = next((index for index, (_, link) in enumerate(rows) if link and link == panel.link), -1)
        return chosen, max(0, min(panel.top, len(rows) - room))
    chosen = 0
    if view.selected is not None:  # stays where it was when it is gone
        gone = max(0, min(view.index, len(rows) - 1))
        chosen = next((index for index, row in enumerate(rows) if row[0] is view.selected), gone)
    return chosen, max(0, min(chosen - min(view.anchor, room - 1), len(rows) - room))


# The lines of the screen.


def layout(view: View, rows: int) -> tuple[int, int, int, int, int, int]:
    """Return how many lines go to title, graph, states, headings, footer; and to what is in the middle."""
    title, headings, footer = int(rows > 3), int(rows > 5), int(rows > 2)
    graph, states = (0, 0) if view.panels else (min(4, rows // 10), int(rows > 7))
    return title, graph, states, headings, footer, rows - title - graph - states - headings - footer


def arrange(parts: Iterable[tuple[int, str, str]], width: int) -> Line:
    """Return the parts (rank, text, style) that there is room for, the lowest ranks first, in the order given."""
    parts, left = list(parts), width + 1
    kept: set[int] = set()
    for _, index in sorted((rank, index) for index, (rank, _, _) in enumerate(parts)):
        size = cells(parts[index][1]) + 1
        if size <= left or not kept:
            kept.add(index)
            left -= size
    return [span for index in sorted(kept) for span in (parts[index][1:], (" ", ""))]


def title_line(view: View, stage: Stage, status: Mapping[str, Any]) -> Line:
    """Return the pages and how much they have, the rate, what went wrong, and the URL."""
    live = stage.live
    parts = []
    if view.frozen:
        parts.append((0, f" FROZEN +{live.event_count - stage.state.event_count:,} ", "frozen"))
    for key, page in PAGES.items():
        text = f" {key} {page.title} {page.count(live, stage.now)} "
        parts.append((1, text, "reverse") if page is stage.page else (4, text, ""))
    rate = sum(live.counts(1, 5.0, stage.now)) / 5
    parts.append((3, f"{rate:,.0f}/s " if rate >= 10 or not rate else f"{rate:.1f}/s ", "bold"))
    troubles = {name: status.get(name) for name in ("lost", "rejected", "malformed")}
    parts += [
        (2, f" {many:,} {name} ", "alarm") for name, many in {**troubles, "evicted": live.evicted}.items() if many
    ]
    line = arrange(parts, stage.columns)
    left = stage.columns - sum(cells(text) for text, _ in line)
    url = printable(status.get("url"))
    fitting = next((text for text in (url, url.partition("?")[0]) if cells(text) <= left), "")
    return [*line, (" " * (left - cells(fitting)) + fitting, "dim")]


def graph_lines(stage: Stage, height: int) -> list[Line]:
    """Return so many lines: the events of each of the last seconds, the latest at the right, and the highest rate."""
    label = 10 if stage.columns >= 40 else 0
    width, now = stage.columns - label, ceil(stage.now)  # whole seconds: no column changes any more but the last
    levels = stage.live.scale_graph(width, 8 * height, width, now)
    highest = max(stage.live.counts(width, width, now), default=0)
    labels = [f" {highest:,}/s", *[""] * (height - 2), f" {width} s"]
    bases = range(8 * (height - 1), -1, -8)
    bars = ["".join([BARS[max(0, min(8, level - base))] for level in levels]) for base in bases]
    return [[(bar, "cyan"), (fit(text, label), "dim")] for bar, text in zip(bars, labels)]


def states_line(stage: Stage) -> Line:
    """Return the tasks by state, the urgent ones first."""
    tally = Counter([task["state"] for task in stage.live.tasks.values()]).most_common()
    tally.sort(key=lambda item: URGENT.index(item[0] if item[0] in URGENT else ""))
    parts = [(rank, f" {printable(name)} {n:,} ", STYLES.get(name, "cyan")) for rank, (name, n) in enumerate(tally)]
    return arrange(parts, stage.columns)


def widths_of(columns: Sequence[Any], width: int) -> list[tuple[Any, int]]:
    """Return the columns that there is room for, each with its width; together, a space between, they take `width`."""
    kept = list(columns)
    while len(kept) > 1 and sum(column.width + 1 for column in kept) > width + 1:
        kept.remove(max(kept, key=lambda column: column.rank))
    beyond = width + 1 - sum(column.width + 1 for column in kept)
    sizes = [column.width + max(0, min(2 * column.width, int(beyond * column.share))) for column in kept]
    elastic = max(range(len(kept)), key=lambda index: kept[index].share)
    sizes[elastic] += width + 1 - sum(size + 1 for size in sizes)
    return list(zip(kept, sizes))


def heading_line(view: View, stage: Stage) -> Line:
    """Return the headings of the table, with a mark where it is sorted; or what the panel is about."""
    if view.panels:
        kind, identity, *_ = view.panels[-1]
        return [(f" {kind} {printable(identity) if isinstance(identity, str) else ''}", "heading")]
    order = orders_of(stage.page)[view.order]
    texts = []
    for column, size in widths_of(stage.page.columns, stage.columns):
        text = (column.heading + "▾").replace(" ", "", 1) if column is order else column.heading
        texts.append(fit(text, size))
    return [(" ".join(texts), "heading")]


def empty_lines(view: View, stage: Stage, status: Mapping[str, Any]) -> list[Line]:
    """Return what to do about a table without rows."""
    text = stage.page.empty
    if not stage.state.event_count:
        text = str(status.get("empty", ""))
    elif view.filter:
        text = f"nothing matches {view.filter} — Escape drops the filter"
    return [[(line, "")] for line in wrap(text, stage.columns)]


def table_lines(rows: Iterable[tuple[Any, Any]], stage: Stage) -> list[Line]:
    """Return rows of the table as lines."""
    sizes = widths_of(stage.page.columns, stage.columns)
    lines = []
    for _, record in rows:
        line = []
        for column, size in sizes:
            text = column.text(record, stage.now)
            style = column.style(record, stage.now) if callable(column.style) else column.style
            text = text.rjust(size) if column.heading.startswith(" ") else text
            line += [(fit(text, size), style), (" ", "")]
        lines.append(line[:-1])
    return lines


def footer_line(view: View, stage: Stage, rows: Sequence[Any], chosen: int, top: int, room: int) -> Line:
    """Return the filter with how many match, or which lines these are; and keys."""
    parts, keys = [], "table"
    if view.panels:
        parts = [f" {top + 1}-{min(top + room, len(rows))} of {len(rows):,} "]
        keys = "linked" if any(link for _, link in rows) else "panel"
    elif view.typing or view.filter:
        text, many = printable(view.filter), f" {len(rows):,} of {len(stage.page.held(stage.state)):,} "
        while text and cells(text) + len(many) + 3 > stage.columns:
            text = text[1:]
        parts = [f"/{text}{'█' * view.typing}", many]
        keys = "typing" if view.typing else "filtered"
    elif view.selected is not None and rows:
        parts = [f" {chosen + 1:,} of {len(rows):,} "]
    spans = [(text, "bold") for text in parts] + [(f" {text} ", "dim") for text in HINTS[keys]]
    return arrange([(rank, *span) for rank, span in enumerate(spans)], stage.columns)


def screen(
    state: State,
    view: View,
    rows: int,
    columns: int,
    now: float,
    status: Mapping[str, Any] = NOTHING,
    table: list[tuple[Any, Any]] | None = None,
) -> list[Line]:
    """Return exactly `rows` lines of exactly `columns` columns that show `state` as `view` wants it.

    `status` has the url, what to say while there are no events, and what a Receiver counts. `table` is what table_of()
    returned a moment ago, if that shall do. Pure: the same arguments give the same lines.
    """
    stage = stage_of(state, view, rows, columns, now, table)
    title, graph, states, headings, footer, room = layout(view, rows)
    found = rows_of(view, stage)
    chosen, top = place(view, found, room)
    present = stage._replace(now=now)
    lines = [title_line(view, present, status)] * title + graph_lines(present, graph)
    lines += [states_line(present)] * states + [heading_line(view, stage)] * headings
    shown = found[top : top + room]
    middle = [line for line, _ in shown] if view.panels else table_lines(shown, stage)
    if 0 <= chosen - top < len(middle):
        middle[chosen - top] = [(text, "selected") for text, _ in middle[chosen - top]]
    middle = middle if found else empty_lines(view, stage, status)
    lines += (middle + [[]] * room)[:room] + [footer_line(view, stage, found, chosen, top, room)] * footer
    return [fit_line(line, columns) for line in lines]


# The keys: each makes a view of a view.


def pick(view: View, table: Sequence[tuple[Any, Any]], index: int, line: int) -> View:
    """Select a row, to stay on that line of the table; the first is whichever comes to be the first."""
    return view._replace(selected=table[index][0] if index else None, index=index, anchor=line)


def scroll(view: View, **changes: Any) -> View:
    """Change the uppermost panel."""
    return view._replace(panels=(*view.panels[:-1], view.panels[-1]._replace(**changes)))


def move(step: float, view: View, stage: Stage) -> View:
    """Go so many rows, or if it is a fraction, by so much of the screen; inf and -inf are the ends."""
    rows, room = rows_of(view, stage), max(1, layout(view, stage.rows)[-1])
    chosen, top = place(view, rows, room)
    if isinstance(step, float) and isfinite(step):
        step = int(step * room) or int(copysign(1, step))
    if view.panels:
        return scroll(view, top=int(max(0, min(top + step, len(rows) - room))))
    index = int(max(0, min(chosen + step, len(rows) - 1)))
    return pick(view, rows, index, int(max(0, min(chosen - top + step, room - 1)))) if rows else view


def turn(page: str, view: View, stage: Stage) -> View:
    """Go to a page, as it was left."""
    others = {**dict(view.others), view.page: view[1:5]}
    selected, index, anchor, order = others.pop(page, (None, 0, 0, 0))
    places = {"selected": selected, "index": index, "anchor": anchor, "order": order}
    return view._replace(page=page, others=tuple(others.items()), panels=(), **places)


def tab(step: int, view: View, stage: Stage) -> View:
    """Go to the next page or the one before; in a panel, choose the next link or the one before."""
    if not view.panels:
        return turn(str((int(view.page) + step - 1) % len(PAGES) + 1), view, stage)
    rows, room = rows_of(view, stage), layout(view, stage.rows)[-1]
    links = [index for index, (_, link) in enumerate(rows) if link]
    chosen, top = place(view, rows, room)
    if not links:
        return view
    index = links[(links.index(chosen) + step) % len(links)] if chosen in links else links[min(0, step)]
    view = scroll(view, link=rows[index][1])
    return view if top <= index < top + room else scroll(view, top=max(0, index - room // 2))


def push(view: View, kind: str, identity: Any = "") -> View:
    """Open a panel above what is open, unless that is the same."""
    same = view.panels and view.panels[-1][:2] == (kind, identity)
    return view if same else view._replace(panels=(*view.panels, Panel(kind, identity))[-MAX_PANELS:], typing=False)


def enter(view: View, stage: Stage) -> View:
    """Open a panel about the selected row; in a panel, about its chosen link, or else choose one."""
    rows = rows_of(view, stage)
    chosen, _ = place(view, rows, 1)
    if chosen < 0:
        return tab(1, view, stage)
    return view if not rows else push(view, *(rows[chosen][1] if view.panels else (stage.page.kind, rows[chosen][0])))


def show(key: str, view: View, stage: Stage) -> View:
    """Open a panel with a field of the task that is selected or open."""
    rows = rows_of(view, stage)
    kind, identity = view.panels[-1][:2] if view.panels else ("event", rows[place(view, rows, 1)[0]][1] if rows else {})
    if kind == "event":
        identity = identity.get("uuid")
    return push(view, key, identity) if isinstance(identity, str) and kind not in ("worker", "keys") else view


def sort(view: View, stage: Stage) -> View:
    """Sort the table by the next column."""
    return view if view.panels else view._replace(order=(view.order + 1) % len(orders_of(stage.page)))


def freeze(view: View, stage: Stage) -> View:
    """Let the picture stand still, or go on."""
    return view._replace(frozen=None if view.frozen else (still(stage.live), stage.now))


def clear(view: View, stage: Stage) -> View:
    """Forget the finished tasks."""
    stage.live.clear_tasks()
    return view


def leave(view: View, stage: Stage) -> View:
    """Close the uppermost panel, or quit."""
    return view._replace(panels=view.panels[:-1], done=not view.panels)


def back(view: View, stage: Stage) -> View:
    """Close what is open: the uppermost panel, else the filter, else the frozen picture; or quit."""
    if not view.panels and (view.filter or view.frozen):
        return view._replace(filter="", frozen=view.frozen if view.filter else None)
    return leave(view, stage)


def click(line: int, view: View, stage: Stage) -> View:
    """Select the row on a line of the screen; open what is selected already, or a link."""
    rows, (*above, _, room) = rows_of(view, stage), layout(view, stage.rows)
    chosen, top = place(view, rows, room)
    line -= sum(above)
    index = top + line
    if not 0 <= line < room or index >= len(rows):
        return view
    if view.panels:
        return push(view, *rows[index][1]) if rows[index][1] else view
    if index == chosen and view.selected is not None:
        return enter(view, stage)
    return view._replace(selected=rows[index][0], index=index, anchor=line)  # the first too: it may move


def edit(view: View, **changes: Any) -> View:
    """Change the filter; the first row that matches is selected, unless the selected one does."""
    return view._replace(panels=(), index=0, anchor=0, **changes)


ENTER = ("^J", "^M", "KEY_ENTER")
KEYS: dict[str, Callable[[View, Stage], View]] = {
    **dict.fromkeys(("j", "KEY_DOWN"), partial(move, 1)),
    **dict.fromkeys(("k", "KEY_UP"), partial(move, -1)),
    **dict.fromkeys(("KEY_NPAGE", "^D"), partial(move, 0.9)),
    **dict.fromkeys(("KEY_PPAGE", "^U"), partial(move, -0.9)),
    **dict.fromkeys(("g", "KEY_HOME"), partial(move, -inf)),
    **dict.fromkeys(("G", "KEY_END"), partial(move, inf)),
    "wheel down": partial(move, 3),
    "wheel up": partial(move, -3),
    **{page: partial(turn, page) for page in PAGES},
    **dict.fromkeys((*ENTER, "i"), enter),
    "^I": partial(tab, 1),
    "KEY_BTAB": partial(tab, -1),
    "t": partial(show, "traceback"),
    "r": partial(show, "result"),
    "?": lambda view, stage: push(view, "keys"),
    "s": sort,
    " ": freeze,
    "c": clear,
    "q": leave,
    "^[": back,
    "M-": lambda view, stage: back(view, stage)._replace(done=False),  # Escape with another key at once, or Alt
    "/": lambda view, stage: edit(view, typing=True),
}
EDITS: dict[str, Callable[[View, Stage], View]] = {
    **dict.fromkeys(ENTER, lambda view, stage: edit(view, typing=False)),
    **dict.fromkeys(("KEY_BACKSPACE", "^?", "^H"), lambda view, stage: edit(view, filter=view.filter[:-1])),
    "^U": lambda view, stage: edit(view, filter=""),
    "^W": lambda view, stage: edit(view, filter=re.sub(r"\S*\s*$", "", view.filter)),
    **dict.fromkeys(("^[", "M-"), lambda view, stage: edit(view, filter="", typing=False)),
}


def press(view: View, key: str, state: State, rows: int, columns: int, now: float, table: Any = None) -> View:
    """Return the view after a key, given as curses calls it: "j", "^D", "KEY_UP"; or "wheel up", "wheel down", "click 7"
    (line). The rest is as in screen(). One key changes `state`: c clears it."""
    view = view._replace(page=page_of(view, state))  # which a new event shall not change any more
    stage = stage_of(state, view, rows, columns, now, table)
    if key.startswith("click "):
        return click(int(key[6:]), view, stage)
    if view.typing and key in EDITS:
        return EDITS[key](view, stage)
    if view.typing and len(key) == 1:
        return edit(view, filter=(view.filter + key)[:MAX_FILTER])
    return KEYS[key](view, stage) if key in KEYS else view


class Ascii(dict["int", "Any"]):
    """For str.translate(): ASCII of the same width for whatever is none."""

    def __missing__(self, code: int) -> str:
        return chr(code) if code < 128 else "?" * cells_of(chr(code))


ASCII = Ascii(str.maketrans("▁▂▃▄▅▆▇█━─…▾—", ".:-=+*%#=-~v-"))


# --- capture_events: curses, one thread ---------------------------------------------------------------------------

FRAME_TIME = 0.05  # between two pictures,
FRAME_SHARE = 5  # and so many times what the last one took, unless a key was pressed; likewise between two tables
DRAIN = 500  # events taken between two looks at the keyboard
COUNT_TIME = 60.0  # after the last event, until when the graph may have something to move
LOOKS = {  # style -> attributes; the name of a colour; its like among 256, legible on a light and on a dark background
    "": ("", "", 0),
    "bold": ("BOLD", "", 0),
    "dim": ("DIM", "", 244),
    "heading": ("BOLD UNDERLINE", "", 0),
    "reverse": ("REVERSE", "", 0),
    "selected": ("BOLD REVERSE", "", 0),
    "alarm": ("BOLD REVERSE", "RED", 160),
    "frozen": ("BOLD REVERSE", "BLUE", 32),
    "red": ("BOLD", "RED", 160),
    "green": ("", "GREEN", 28),
    "yellow": ("", "YELLOW", 136),
    "blue": ("", "BLUE", 32),
    "magenta": ("", "MAGENTA", 133),
    "cyan": ("", "CYAN", 30),
}


class Tap:
    """What happens to events on their way to be shown: some are chosen, recorded, and counted up to a limit."""

    def __init__(
        self,
        types: Sequence[str] = (),
        record: Any = None,
        limit: int | None = None,
    ) -> None:
        self.left = inf if limit is None else limit
        self.types = types
        self._record = record

    def kinds(self) -> str:
        """Return which events are chosen, as words."""
        return f" of type {' or '.join(self.types)}" if self.types else ""

    def __call__(self, events: Iterable[Event]) -> Iterator[Event]:
        """Yield the events to show."""
        from fnmatch import fnmatchcase

        for event in events if self.left > 0 else ():
            if self.types and not any(fnmatchcase(event.type, glob) for glob in self.types):
                continue
            if self._record:
                self._write(json_line(event))
            self.left -= 1
            yield event
            if self.left <= 0:
                return

    def _write(self, line: str) -> None:
        """Record a line, in one piece, since others may record into the same file."""
        data = line.encode() + b"\n"
        try:
            while data:  # where there is little room, only a part is taken
                data = data[self._record.write(data) :]
        except OSError as problem:
            problem.filename = self._record.name
            raise


def complain(message: str) -> None:
    """Print a line on standard error, if there is one."""
    try:
        if sys.stderr is not None:
            print(f"eventmon: {printable(message)}", file=sys.stderr, flush=True)
    except OSError:
        pass  # it is full, or nobody reads it


def lines_of(path: str) -> Iterator[bytes]:
    """Yield the lines of a file, or of standard input for "-"; of one that is too long its beginning."""
    with open(path, "rb") if path != "-" else nullcontext() as file:
        stream = file or sys.stdin and sys.stdin.buffer
        whole = True
        for line in iter(partial(stream.readline, MAX_LINE), b"") if stream else ():
            if whole:
                yield line
            whole = line.endswith(b"\n") or len(line) < MAX_LINE


def open_record(path: str) -> Any:
    """Open a file to append events to; behind a line that a crash has cut off begins another one."""
    file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by the caller
    if os.path.isfile(path) and os.path.getsize(path) and os.access(path, os.R_OK):
        with open(path, "rb") as before:
            before.seek(-1, os.SEEK_END)
            file.write(b"" if before.read() == b"\n" else b"\n")
    return file


def recorded(path: str) -> Iterator[tuple[int, Event | WireError]]:
    """Yield (line number, Event), or the error in that line, of a file of NDJSON; empty lines are passed over."""
    for index, line in enumerate(lines_of(path), 1):
        if line.strip() or len(line) >= MAX_LINE:
            try:
                if len(line) >= MAX_LINE:
                    raise WireError(f"a line of {MAX_LINE:,} bytes or more")
                yield index, parse_event(parse_json(line.removeprefix(b"\xef\xbb\xbf")))  # a byte order mark
            except WireError as problem:
                yield index, problem


def replay(path: str) -> Iterator[Event]:
    """Yield the events of a recorded file; complain of lines that are none."""
    for line, event in recorded(path):
        if isinstance(event, WireError):
            complain(f"{path}: line {line}: {event}")
        else:
            yield event


class Glyphs(dict["int", "str"]):
    """For str.translate(): question marks for characters that take more or less room in curses than here."""

    def __missing__(self, code: int) -> str:
        import curses

        char, pad = chr(code), curses.newpad(1, 8)
        try:
            pad.addstr(char)
            same = pad.getyx()[1] == cells_of(char)
        except curses.error:
            same = False
        if len(self) > MAX_GLYPHS:
            self.clear()
        return self.setdefault(code, char if same else "?" * cells_of(char))


class Terminal:
    """What curses does for the monitor: it reads keys, and paints lines, of which only those that have changed."""

    def __init__(self, window: Any) -> None:
        import curses

        self._curses: Any = curses
        self._window = window
        self._glyphs = Glyphs() if "utf" in window.encoding.lower() else ASCII
        self._painted: list[Line] = []
        self._looks = self._prepare_looks()
        self._button5 = getattr(curses, "BUTTON5_PRESSED", 1 << 21)  # Python 3.9 has no name for it
        curses.mousemask(curses.BUTTON1_PRESSED | curses.BUTTON4_PRESSED | self._button5)
        curses.mouseinterval(0)
        window.nodelay(True)
        curses.noqiflush()  # ctrl-C would drop what select() has seen, and curses wait for it
        try:
            curses.curs_set(0)
        except curses.error:
            pass  # a terminal whose cursor is always there

    def _prepare_looks(self) -> dict[str, int]:
        """Return style -> curses attribute."""
        curses, colours = self._curses, 0
        if curses.has_colors():
            try:
                curses.use_default_colors()  # without colours too, or curses would paint a background
                colours = 0 if os.environ.get("NO_COLOR") else curses.COLORS
            except curses.error:
                pass  # a terminal that has no default colours
        looks = {}
        for pair, (style, (attributes, name, like)) in enumerate(LOOKS.items(), 1):
            look = sum(getattr(curses, f"A_{attribute}") for attribute in attributes.split())
            colour = like if colours >= 256 else getattr(curses, f"COLOR_{name}", 0)
            if colours and colour:
                curses.init_pair(pair, colour, -1)
                look = look & ~curses.A_DIM | curses.color_pair(pair)
            looks[style] = look
        return looks

    def size(self) -> tuple[int, int]:
        """Return rows and columns; curses learns here that they have changed."""
        try:
            columns, rows = os.get_terminal_size(sys.stdout.fileno())
        except OSError:
            columns = rows = 0
        if rows > 0 < columns and self._window.getmaxyx() != (rows, columns) and self.is_ready():
            self._curses.resizeterm(rows, columns)
            self._window.clear()
            self._painted = []
        return self._window.getmaxyx()  # type: ignore[no-any-return]

    def renew(self) -> None:
        """Set the terminal up and paint it anew: another program has had it."""
        self._curses.endwin()
        self._window.clear()
        self._painted = []

    def is_ready(self) -> bool:
        """Whether the terminal takes output: it does not after ctrl-S, and who writes then stands still."""
        return bool(select.select([], [sys.stdout], [], 0)[1])

    def release(self) -> None:
        """End a ctrl-S, for which curses would wait when it puts the terminal back."""
        import termios

        try:
            if not self.is_ready():
                termios.tcflow(sys.stdout, termios.TCOOFF)  # Linux starts again only what was stopped like this
                termios.tcflow(sys.stdout, termios.TCOON)
        except (OSError, termios.error):
            pass  # the terminal has gone

    def paint(self, lines: list[Line]) -> None:
        """Show the lines."""
        before = self._painted
        for row, line in enumerate(lines):
            if row >= len(before) or line != before[row]:
                self._window.move(row, 0)
                for text, style in line:
                    try:
                        self._window.addstr(
                            text if text.isascii() else text.translate(self._glyphs), self._looks[style]
                        )
                    except self._curses.error:
                        pass  # behind the last cell the cursor has nowhere to go; or the terminal has just shrunk
        self._painted = lines
        self._window.refresh()

    def pressed(self) -> Iterator[str]:
        """Yield the keys that were pressed, as press() takes them."""
        for key in iter(self._read, None):
            if key == self._curses.KEY_MOUSE:
                yield from self._mouse()
            elif key == "\x1b":
                yield from self._escape()
            elif isinstance(key, str) and key.isprintable():
                yield key
            elif isinstance(key, int) or key < "\x80":
                yield self._curses.keyname(key if isinstance(key, int) else ord(key)).decode("ascii", "replace")

    def _escape(self) -> Iterator[str]:
        """Yield what an Escape means: nothing if it begins a sequence that curses does not know; that is read."""
        key = self._read()
        if key in ("[", "O", "]", "P"):
            end = "\x07\\" if key in ("]", "P") else None  # of a terminal's answer; the others end with a letter
            self._window.timeout(50)  # for what comes in pieces
            any(str(other) in end if end else "@" <= str(other) <= "~" for other in iter(self._read, None))
            self._window.nodelay(True)
            return
        yield "^[" if key is None else "M-"
        if key is not None:
            (self._curses.ungetch if isinstance(key, int) else self._curses.unget_wch)(key)

    def _read(self) -> Any:
        """Return the next character, the number of a key that is none, or None."""
        try:
            return self._window.get_wch()
        except self._curses.error:
            return None

    def _mouse(self) -> Iterator[str]:
        try:
            _, _, line, _, button = self._curses.getmouse()
        except self._curses.error:
            return
        clicked, up = button & self._curses.BUTTON1_PRESSED, button & self._curses.BUTTON4_PRESSED
        yield f"click {line}" if clicked else "wheel up" if up else "wheel down"


class Live:
    """What a receiver hears, for the monitor; `words` are those that `send` needs beside the URL to reach it."""

    problems = ()

    def __init__(
        self, receiver: Receiver, tap: Tap, timeout: float | None = None, wakeup: bool = True, words: str = ""
    ) -> None:
        self.files = [receiver]
        self.now = time.time
        self.pause = receiver.pause
        self._receiver = receiver
        self._tap = tap
        self._timeout = inf if timeout is None else timeout
        self._wakeup = wakeup
        self._heard = 0, time.monotonic()  # how many events, and since when no more
        kind = re.sub(r"[*?[\]]+", "x", tap.types[0]) if tap.types else "hello"
        where = "" if receiver.url == url_from(None) else f" --url '{receiver.url}'"
        trial = f"python eventmon.py send {kind}{where}{words}"
        self._empty = f"no events{tap.kinds()} yet on {receiver.url} — try: {trial}"

    def take(self) -> Iterator[Event]:
        """Yield some of the events that have come."""
        return self._tap(self._receiver.itercapture(DRAIN, 0, self._wakeup))

    def is_over(self) -> bool:
        """Whether the limit or the timeout is reached, or the receiver is told to stop."""
        events, now = self._receiver.stats["events"], time.monotonic()
        if events != self._heard[0]:
            self._heard = events, now
        return self._tap.left <= 0 or now > self._heard[1] + self._timeout or self._receiver.should_stop

    def status(self) -> dict[str, Any]:
        """Return what screen() takes as status."""
        return {"url": self._receiver.url, "empty": self._empty, **self._receiver.stats}


class Recording:
    """What a file holds, for the monitor; the time is that of the last event."""

    files: tuple[()] = ()

    def __init__(self, path: str, tap: Tap) -> None:
        self.problems: deque[str] = deque(maxlen=MAX_PROBLEMS)  # the last ones
        self._path = path
        self._tap = tap
        self._lines = recorded(path)
        self._bad = 0
        self._now = time.time()
        self._ended = False

    def take(self) -> Iterator[Event]:
        """Yield some of the events."""
        lines = list(islice(self._lines, DRAIN))
        self._ended = not lines
        for line, event in lines:
            if isinstance(event, WireError):
                self._bad += 1
                self.problems.append(f"{self._path}: line {line}: {event}")
        for event in self._tap(event for _, event in lines if isinstance(event, Event)):
            self._now = number(event.setdefault("local_received", event["timestamp"]), self._now)
            yield event

    def now(self) -> float:
        """Return the time to show."""
        return self._now

    def pause(self, longest: float) -> float:
        """Return how many seconds, at most `longest`, there is nothing to take."""
        return longest if self._ended else 0.0

    def is_over(self) -> bool:
        """Whether to end: only the user ends it."""
        return False

    def status(self) -> dict[str, Any]:
        """Return what screen() takes as status."""
        return {"url": self._path, "empty": f"no events{self._tap.kinds()} in {self._path}", "malformed": self._bad}


class Monitor:
    """The monitor's one thread: events first, then keys, then a picture if there is something new."""

    def __init__(self, source: Live | Recording, state: State) -> None:
        self._source = source
        self._state = state
        self._view = View()
        self._signals: set[int] = set()  # that have come and are still to be heeded
        self._pid = os.getpid()
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._waker.setblocking(False)
        self._heard = self._painted = self._due = time.monotonic()  # the last event and picture; when one may be next
        self._drawn: Any = None  # what the picture is of, None if there is to be another in any case
        self._table: list[tuple[Any, Any]] = []
        self._table_of: Any = None  # what the table is of
        self._table_due = 0.0  # when it may be made anew though only events have changed it

    def run(self) -> None:
        """Show the screen until the user quits. A signal to end raises SystemExit once the terminal is as it was."""
        import curses
        import signal

        if hasattr(curses, "set_escdelay"):
            curses.set_escdelay(50)  # milliseconds: nobody notices, and an arrow's sequence may come in pieces
        mine = threading.current_thread() is threading.main_thread()
        ending = {signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
        before = {name: signal.getsignal(name) for name in (*ending, signal.SIGCONT, signal.SIGWINCH) if mine}
        try:
            for name, handler in before.items():
                if handler != signal.SIG_IGN:
                    signal.signal(name, self._note)
            curses.wrapper(self._loop)
        except curses.error:
            if sys.stdin.isatty():
                raise  # else the terminal has gone
        finally:
            for name, handler in before.items():
                signal.signal(name, signal.SIG_DFL if handler is None else handler)
            self._wake.close()
            self._waker.close()
        for ended in self._signals & ending:
            raise SystemExit(128 + ended)

    def _note(self, name: int, frame: object) -> None:
        import signal

        if os.getpid() != self._pid:  # the child of a fork
            signal.signal(name, signal.SIG_DFL)
            os.kill(os.getpid(), name)
        self._signals.add(name)
        try:
            self._waker.send(b"\0")  # ends the wait, as a signal alone does not
        except OSError:
            pass  # enough of them lie there already

    def _loop(self, window: Any) -> None:
        from signal import SIGCONT, SIGWINCH

        terminal = Terminal(window)
        try:
            while not self._view.done and self._signals <= {SIGCONT, SIGWINCH} and sys.stdin.isatty():
                for event in self._source.take():
                    self._state.event(event)
                    self._heard = time.monotonic()
                if self._source.is_over():
                    return
                if SIGCONT in self._signals and terminal.is_ready():
                    self._signals.remove(SIGCONT)
                    self._drawn = None
                    terminal.renew()
                self._turn(terminal)
        finally:
            terminal.release()

    def _turn(self, terminal: Terminal) -> None:
        """Heed the keys, draw, and wait."""
        where, more = (*terminal.size(), self._source.now()), False
        for key in terminal.pressed():
            if key == "^L" and terminal.is_ready():
                terminal.renew()
            table = None if self._view.typing else self._find(*where)  # a letter of a filter needs none
            self._view = self._state.freeze_while(press, self._view, key, self._state, *where, table)
            self._drawn, self._due = None, self._painted + FRAME_TIME
            more = time.monotonic() > self._due and key != "M-"  # whose other key must not be dropped
            if more or self._view.done:
                break  # what is typed further must wait for the events, or is for whoever reads next
        if not self._view.done:
            patience = self._draw(terminal, *where)
            self._wait(0.0 if more else patience)

    def _find(self, rows: int, columns: int, wall: float) -> list[tuple[Any, Any]]:
        """Return the rows of the table, made anew if another is wanted, or if it has changed and there is time for it."""
        view, state, now = self._view, self._state, time.monotonic()
        wanted = (page_of(view, state), view.filter, view.order, view.frozen)
        changes = (state.event_count, len(state.tasks), int(wall) if view.order or view.filter else 0)
        if (
            self._table_of is None
            or self._table_of[0] != wanted
            or self._table_of[1] != changes
            and now >= self._table_due
        ):
            self._table = state.freeze_while(table_of, view, stage_of(state, view, rows, columns, wall))
            self._table_of = wanted, changes
            self._table_due = time.monotonic() + FRAME_SHARE * (time.monotonic() - now)
        return self._table

    def _draw(self, terminal: Terminal, rows: int, columns: int, wall: float) -> float:
        """Paint a picture if there is something new, and it is time to; return for how long there is nothing to do."""
        now, state = time.monotonic(), self._state
        counts = any(state.iteractive()) or state.workers or now < self._heard + COUNT_TIME  # seconds, on the screen
        status, table = self._source.status(), self._find(rows, columns, wall)
        picture = (state.event_count, self._table_of, self._view, rows, columns, status, counts and int(wall))
        if picture != self._drawn and now >= self._due and terminal.is_ready():
            terminal.paint(state.freeze_while(screen, state, self._view, rows, columns, wall, status, table))
            self._drawn, self._painted = picture, time.monotonic()
            self._due = self._painted + max(FRAME_TIME, FRAME_SHARE * (self._painted - now))
        if picture != self._drawn:
            return self._due - now if now < self._due else MAX_SLEEP  # the latter while the terminal takes nothing
        return min(MAX_SLEEP, max(FRAME_TIME, 1 - time.time() % 1))  # other threads may feed the State

    def _wait(self, longest: float) -> None:
        """Wait for events, keys and signals."""
        files, patience = (sys.stdin, self._wake, *self._source.files), max(0.0, self._source.pause(longest))
        try:
            select.select(files, [], [], patience)  # which takes terminals also where poll() does not
        except ValueError:  # it takes only the first 1,024 files
            wait_for(patience, *files)
        try:
            self._wake.recv(4096)
        except BlockingIOError:
            pass  # no signal came


def is_terminal(stream: Any, number: int) -> bool:
    """Whether a standard stream is what curses takes for it, and a terminal."""
    try:
        return bool(stream.isatty()) and stream.fileno() == number
    except (AttributeError, OSError, ValueError):
        return False


def has_terminal() -> bool:
    """Whether the monitor can be shown; says why not if there is a terminal."""
    if not (is_terminal(sys.stdin, 0) and is_terminal(sys.stdout, 1)):
        return False
    name = os.environ.get("TERM")
    try:
        import curses

        curses.setupterm()
        if curses.tigetstr("cup"):
            return True
        problem = f"TERM={name} cannot move the cursor"
    except ImportError:
        problem = "this Python has no curses"
    except curses.error:
        problem = f"TERM={name} is not known" if name else "TERM is not set"
    complain(f"{problem}: printing lines instead of the monitor")
    return False


def take_any_text() -> None:
    """Let standard output, whatever its encoding is, spell out what it has no character for."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def print_lines(events: Iterable[Event], form: Callable[[Event], str]) -> None:
    """Print each event as a line."""
    take_any_text()
    for event in events:
        print(form(event), flush=True)


def noted(state: State, events: Iterable[Event]) -> Iterator[Event]:
    """Yield events that the state has taken."""
    for event in events:
        state.event(event)
        yield event


def capture_events(receiver: Receiver | None = None, state: State | None = None) -> None:
    """Show live tasks, workers and events in the terminal until the user quits.

    `receiver` defaults to one on the default URL, `state` to a new one; other threads may feed it, too. Where there is no
    terminal, or none that curses knows, it prints lines. Raises OSError when the socket cannot be opened. In the main
    thread SIGTERM, SIGHUP and SIGQUIT, unless ignored, raise SystemExit once the terminal is as it was.
    """
    heard = Receiver() if receiver is None else receiver
    state = State() if state is None else state
    try:
        heard.fileno()  # opened while an error can still be read
        if has_terminal():
            Monitor(Live(heard, Tap()), state).run()
        else:
            print_lines(noted(state, heard.itercapture()), plain_line)
    finally:
        if receiver is None:
            heard.close()


# --- the command line ---------------------------------------------------------------------------------------------


class Failure(Exception):
    """Ends a command with one line on standard error, the first argument; the second is the exit status."""


def describe(problem: BaseException | None) -> str:
    """Return what an error of the system says, and of which file."""
    if not isinstance(problem, OSError):
        return str(problem)
    reason = problem.strerror or str(problem)
    return f"{problem.filename}: {reason}" if problem.filename else reason


def listening(options: Any) -> Receiver:
    """Return a Receiver whose socket is open."""
    receiver = Receiver(options.url, key=options.key)
    try:
        receiver.fileno()
    except OSError as problem:
        raise Failure(f"cannot listen on {receiver.url}: {describe(problem)}", 1) from None
    return receiver


def end_with_reader(receiver: Receiver) -> None:
    """End the receiver's capture when whoever reads standard output from a pipe has gone, event or no event."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # which waits for nothing but the end
    except (AttributeError, OSError):
        return  # Windows has no poll(); a standard output that is no file has no reader

    def wait() -> None:
        poll.poll()
        receiver.should_stop = True

    threading.Thread(target=wait, daemon=True).start()


def heard(receiver: Receiver, timeout: float | None, wakeup: bool) -> Iterator[Event]:
    """Yield what is heard; complain of what is lost or rejected, at most once a second, and of all in the end."""
    patience = inf if timeout is None else timeout
    told, told_at = {"lost": 0, "rejected": 0}, -inf

    def tell(words: str) -> dict[str, int]:
        counts = {name: receiver.stats[name] for name in told}
        news = [f"{counts[name]:,} {plural('datagram', counts[name])} {name}{words}" for name in told if counts[name]]
        if news and (words or counts != told):
            complain(", ".join(news) + (f": {receiver.problem}" if counts["rejected"] else ""))
        return counts

    last = time.monotonic()
    try:
        while not receiver.should_stop and time.monotonic() < last + patience:
            for event in receiver.itercapture(None, min(1.0, max(0.0, last + patience - time.monotonic())), wakeup):
                yield event
                last = time.monotonic()
                if last > told_at + 1.0:
                    told, told_at = tell(""), last
            told, told_at = tell(""), time.monotonic()
    finally:
        tell(" in all")


def watch(options: Any) -> int:
    """Show what is heard, or what FILE holds, until the user or a limit ends it."""
    from contextlib import ExitStack

    files = [path for path in (options.record, options.file) if path and os.path.isfile(path)]
    if len(files) == 2 and os.path.samefile(*files):
        raise Failure(f"{options.file} cannot be recorded into itself", 2)
    with ExitStack() as stack:
        record = stack.enter_context(open_record(options.record)) if options.record else None
        tap = Tap(options.type or (), record, options.limit)
        receiver = None if options.file else stack.enter_context(listening(options))
        words = f" --key-file '{options.key_file}'" if options.key_file else ""
        in_lines = options.json or options.plain or options.file and not os.path.isfile(options.file)
        if not in_lines and has_terminal():
            source = (
                Live(receiver, tap, options.timeout, not options.no_history, words)
                if receiver
                else Recording(options.file, tap)
            )
            Monitor(source, State()).run()
            for problem in source.problems:
                complain(problem)
            return 0
        if receiver:
            end_with_reader(receiver)
            events = heard(receiver, options.timeout, not options.no_history)
        else:
            events = replay(options.file)
        print_lines(tap(events), json_line if options.json else plain_line)
    return 0


def parse_field(word: str) -> tuple[str, Any]:
    """Return name and value of "name=text" or "name:=json"."""
    name, equals, text = word.partition("=")
    if not equals or not name.rstrip(":"):
        raise Failure(f"field is {word!r}, expected name=text or name:=json", 2)
    if not name.endswith(":"):
        return name, text
    try:
        return name[:-1], parse_json(text.encode("utf-8", "surrogateescape"))
    except WireError as problem:
        raise Failure(f"field is {word!r}: {problem}", 2) from None


def send_lines(dispatcher: Dispatcher) -> int:
    """Send the NDJSON on standard input; return how many lines were bad."""
    failures = 0
    for line, event in recorded("-"):
        try:
            if isinstance(event, WireError):
                raise event
            dispatcher.publish(event)
        except (WireError, ValueError) as problem:
            complain(f"line {line}: {problem}")
            failures += 1
    return failures


def send(options: Any) -> int:
    """Send one event, or those on standard input, and say how many watchers confirmed."""
    fields = dict(map(parse_field, options.field))
    if "type" in fields:
        raise Failure("a field is called type, which is the first argument", 2)
    if options.type == "-" and fields:
        raise Failure("send - takes no fields", 2)
    failures = 0
    with Dispatcher(options.url, key=options.key, max_wait=10.0) as dispatcher:
        if options.type == "-":
            failures = send_lines(dispatcher)
        else:
            dispatcher._send(options.type, fields)
        watchers = dispatcher.flush(FLUSH_ALL)
        stats, lacking = dispatcher.stats, [number for number in dispatcher.lacking() if number]
    if stats["events"] and not stats["datagrams"]:
        raise Failure(f"cannot send to {dispatcher.url}: {describe(dispatcher.problem)}", 1)
    report = f"sent {stats['events']:,} {plural('event', stats['events'])}"
    if watchers or not lacking:
        report += f", confirmed by {watchers} {plural('watcher', watchers)}"
    if lacking:
        verb = "lacks" if len(lacking) == 1 else "lack up to"
        report += f"; {len(lacking)} {plural('watcher', len(lacking))} {verb} {max(lacking):,} datagrams"
    if stats["rejected"]:
        report += f"; {stats['rejected']} {plural('answer', stats['rejected'])} rejected: {dispatcher.problem}"
    if sys.stderr:
        print(printable(report), file=sys.stderr, flush=True)
    return 1 if failures or lacking else 0


# run. The command is a child in our process group: what is typed as a signal reaches it without us, and only what comes
# from elsewhere is passed on.


def signals_to_pass() -> set[int]:
    """Return the signals that are passed on: all but those that cannot be, and those of our own faults."""
    import signal

    faults = ("KILL", "STOP", "SEGV", "BUS", "FPE", "ILL", "ABRT", "TRAP", "SYS", "PIPE")
    return {*map(int, signal.valid_signals())} - {getattr(signal, f"SIG{name}", 0) for name in faults}


def in_foreground(*pids: int) -> bool:
    """Whether what is typed at a terminal as a signal reaches one of these processes; 0 is this one."""
    try:
        with open("/dev/tty", "rb") as tty:
            return os.tcgetpgrp(tty.fileno()) in map(os.getpgid, pids)
    except OSError:
        return False


def next_signal(signals: set[int]) -> tuple[int, bool]:
    """Wait for a blocked signal, for a moment; return it, or 0, and whether it was typed, so that the command has it too."""
    import signal

    typed = (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGWINCH)
    if hasattr(signal, "sigtimedwait"):
        info = signal.sigtimedwait(signals, MAX_SLEEP)
        if info is None:
            return 0, False
        return info.si_signo, info.si_signo in typed and info.si_code in (0x80, 0x10006)  # SI_KERNEL: Linux, FreeBSD
    name = signal.sigwait(signals)  # macOS
    return name, name in typed and in_foreground(0)


def follow(pid: int, signals: set[int]) -> int:
    """Pass signals on to a child, and stop when it stops, until it has ended; return its wait status."""
    import signal

    while True:
        found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if not found:  # SIGCHLD tells, unless another thread has got it
            name, has_it = next_signal(signals)
            if name not in (0, signal.SIGCHLD) and not has_it:
                try:
                    os.kill(pid, name)
                except PermissionError:
                    pass  # it runs as another user
        elif not os.WIFSTOPPED(status):
            return status
        elif os.WSTOPSIG(status) in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU) or in_foreground(0, pid):
            os.kill(os.getpid(), signal.SIGSTOP)  # for the shell to see, which then lets the whole group go on


def copied_streams() -> list[int]:
    """Return which streams of a command are copied to know its last lines: standard error, where it is no terminal.

    And standard output, where it is the same file or pipe, so that the two keep their order.
    """
    from stat import S_ISCHR

    try:
        error = os.fstat(2)
    except OSError:  # closed
        return []
    try:
        same = os.path.samestat(os.fstat(1), error) and not S_ISCHR(error.st_mode)
    except OSError:
        same = False
    return [] if os.isatty(2) else [2, 1] if same else [2]


class Copier:
    """Copies what comes through a pipe, `inlet`, to our standard error, and keeps the end of it."""

    def __init__(self) -> None:
        self._tail = b""
        self._ended = False
        self._source, self.inlet = os.pipe()
        self._stop, self._bell = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        """Copy until the pipe ends, or until what lies in it when finish() is called has been copied."""
        poll, left = select.poll(), inf
        for file in (self._source, self._stop):
            poll.register(file, select.POLLIN)
        while left > 0 and not self._ended:
            ready = [file for file, _ in poll.poll()]
            if self._source in ready:
                self._copy()
            if self._stop in ready:
                left = min(left, MAX_PIPE) - MAX_COPIED if self._source in ready else 0

    def _copy(self) -> None:
        """Copy what is there."""
        data = os.read(self._source, MAX_COPIED)
        if not data:
            self._close()
        self._tail = (self._tail + data)[-MAX_COPIED:]
        while data:
            try:
                data = data[os.write(2, data) :]
            except BlockingIOError:
                select.select([], [2], [])
            except OSError as problem:
                if isinstance(problem, BrokenPipeError):
                    self._close()  # as our reader has gone, so has the command's
                return

    def _close(self) -> None:
        source, self._source, self._ended = self._source, -1, True
        if source >= 0:
            os.close(source)

    def finish(self) -> str:
        """Return the last lines, when the command has ended; what its own children still write, another process copies.

        A signal ends the wait for a standard error that takes nothing.
        """
        import signal

        os.close(self._bell)
        self._thread.join(0.1)
        while self._thread.is_alive() and not signal.sigpending() & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}:
            self._thread.join(0.1)
        if not self._ended:
            try:
                spawn(["cat"], [(self._source, 0), (2, 1)], signals_to_pass())
            except OSError:
                pass  # where there is no cat, they find a broken pipe
            self._close()
        os.close(self._stop)
        return b"\n".join(self._tail.rstrip(b"\n").split(b"\n")[-MAX_LINES:]).decode(errors="backslashreplace")


def spawn(words: list[str], files: Iterable[tuple[int, int]], mask: Iterable[int]) -> int:
    """Start a process with copies of files, (ours, its), and a mask of blocked signals; return its id."""
    import errno
    import signal

    if not words[0]:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    options: Any = {
        "file_actions": [(os.POSIX_SPAWN_DUP2, *pair) for pair in files],
        "setsigmask": mask,
        "setsigdef": (signal.SIGPIPE, signal.SIGXFSZ),  # which Python ignores
    }
    try:
        return os.posix_spawnp(words[0], words, os.environ, **options)
    except OSError as problem:
        if problem.errno != errno.ENOEXEC:
            raise
        from shutil import which

        path = which(words[0]) or words[0]
        with open(path, "rb") as file:
            if b"\0" in file.readline(80):  # no script; shells look at as much
                raise
        return os.posix_spawn("/bin/sh", ["/bin/sh", path, *words[1:]], os.environ, **options)  # as shells do


def peak_memory() -> dict[str, int]:
    """Return the largest resident set of a child that has ended, in bytes, as a field, if the system tells it."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit}


def ending(code: int, tail: str = "") -> dict[str, Any]:
    """Return how a command ended, as fields of its last event; a negative code is a signal's."""
    import signal

    fields: dict[str, Any] = {"exit_status": code if code >= 0 else 128 - code, **peak_memory()}
    if code:
        names = {int(name): name.name for name in signal.Signals}
        fields["exception"] = f"exit status {code}" if code > 0 else names.get(-code, f"signal {-code}")
    return {**fields, "stderr": tail} if code and tail else fields


def start_posix(words: list[str], mask: Iterable[int]) -> Callable[[], dict[str, Any]]:
    """Start a command while signals_to_pass() are blocked; return what waits for it, and returns its ending()."""
    streams, copier = copied_streams(), None
    try:
        copier = Copier() if streams else None
    except RuntimeError:  # no more threads
        streams = []
    try:
        pid = spawn(words, [(copier.inlet, stream) for stream in streams] if copier else (), mask)
    finally:
        if copier:
            os.close(copier.inlet)

    def wait() -> dict[str, Any]:
        code = os.waitstatus_to_exitcode(follow(pid, signals_to_pass()))
        return ending(code, copier.finish() if copier else "")

    return wait


def start_simply(words: list[str]) -> Callable[[], dict[str, Any]]:
    """Do the same where there are no signals to pass on: on Windows, whose console tells the command of ctrl-C."""
    from subprocess import Popen

    process = Popen(words)

    def wait() -> dict[str, Any]:
        while True:
            try:
                return ending(process.wait())
            except KeyboardInterrupt:
                pass

    return wait


def run_task(words: list[str], options: Any, start: Callable[[list[str]], Callable[[], dict[str, Any]]]) -> int:
    """Run a command that is started by start(), send the events of a task for it, and return its exit status."""
    from shlex import join
    from uuid import uuid4

    name = options.name or os.path.basename(words[0])
    fields = {"name": name, "args": cut(join(words), MAX_REPR), "kwargs": "{}", "retries": 0}
    dispatcher, uuid, began = Dispatcher(options.url, key=options.key), str(uuid4()), time.monotonic()
    try:
        wait = start(words)
    except OSError as problem:
        status, reason = (127, "not found") if isinstance(problem, FileNotFoundError) else (126, problem.strerror)
        complain(f"{words[0]}: {reason}")
        wait = partial(dict, exit_status=status, exception=reason)
    # In a thread, since a resolver may take long.
    teller = threading.Thread(target=dispatcher._begin_task, args=(uuid, fields), daemon=True)
    try:
        teller.start()
    except RuntimeError:  # no more threads
        teller.run()
    outcome = wait()
    if teller.ident:
        teller.join(0.2)
    if teller.is_alive():
        _dispatchers.discard(dispatcher)  # whose close() would wait for the resolver
    else:
        kind = "task-failed" if outcome["exit_status"] else "task-succeeded"
        dispatcher._end_task(kind, uuid, {**outcome, "runtime": time.monotonic() - began})
        dispatcher.close()
    return int(outcome["exit_status"])


def run(options: Any) -> int:
    """Run COMMAND as if it were run alone, and send the events of a task for it."""
    import signal

    words = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not words:
        raise Failure("no command to run, expected run -- COMMAND", 2)
    if not hasattr(os, "posix_spawnp"):
        return run_task(words, options, start_simply)
    held = signals_to_pass()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    before = signal.signal(signal.SIGCHLD, lambda *_: None)  # or some systems would drop it, though it is blocked
    try:
        return run_task(words, options, partial(start_posix, mask=mask))
    finally:
        while signal.sigpending() & held:
            signal.sigwait(held)  # too late for the command
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


# check. It sends by hand, so that nothing is repaired and each datagram tells its own story.

REASONS = {  # the name of an error of the system -> what it means, and what to do
    "ENETUNREACH": "no route for {host}: the network is down, or, for a group, the route for 224.0.0.0/4 is missing",
    "EHOSTUNREACH": "no way to {host}: a firewall, a VPN, or the privacy settings of macOS (Local Network) forbid it",
    "ENODEV": "no such interface as {where}, or it is down",
    "EADDRNOTAVAIL": "{where} is no address of this machine",
    "EADDRINUSE": "port {port} is taken: a unicast URL has one watcher, and a group can be shared with eventmon alone",
    "ENETDOWN": "the interface of {where} is down",
    "EPERM": "not permitted: a firewall on this machine drops it",
    "EACCES": "not permitted: a firewall or a sandbox on this machine forbids it, or the port is below 1024",
    "EMSGSIZE": "too large for this system, or for this interface",
    "ENOBUFS": "the system has no buffer for it",
    "EAFNOSUPPORT": "this machine has no IPv4",
}
SIZES = sorted({MAX_DATAGRAM, 8192, MAX_LOOPBACK, 65507})  # bytes; the last one is the most that UDP can
HEAR_TIME = 1.0  # the longest that a datagram is waited for
ANSWERS_TIME = 0.1  # for the answers of others
LISTEN_TIME = 0.6  # two heartbeats of every sender
TRIES = 11  # datagrams of which the median time is told


def in_words(problem: Exception, url: Url) -> str:
    """Return what an error of the system means."""
    import errno

    if isinstance(problem, socket.gaierror):
        return f"{url.host} is not found: no such name, or no name server"
    name = errno.errorcode.get(problem.errno or 0, "") if isinstance(problem, OSError) else ""
    if name == "EADDRNOTAVAIL" and on_loopback(url):
        return "the loopback interface is down, or has no such address: sudo ip link set lo up"
    if not name and is_group(url.host) and not is_address(url.interface):
        name = "ENODEV"  # socket.if_nametoindex() tells no number
    where = url.interface if is_group(url.host) else url.host
    return REASONS.get(name, "{problem}").format(problem=describe(problem), where=where, **url._asdict())


def instead(url: Url) -> str:
    """Return what to use where multicast does not work; nothing for who does without it already."""
    ways = f"watch udp://0.0.0.0:{url.port}, send to udp://ADDRESS-OF-THE-WATCHER:{url.port}"
    return f"; try another interface below, or unicast: {ways}" if is_group(url.host) else ""


def endpoint(source: Source) -> str:
    """Return a source as text."""
    return "{}:{}".format(*source)


class Probe:
    """Sends datagrams to a URL, each a stream of its own, and finds who hears them: we, or others, who confirm."""

    def __init__(self, url: str, key: bytes) -> None:
        self.url = parse_url(url)
        self.watchers: dict[int, Source] = {}  # others who have confirmed
        self.confirmed: dict[int, set[bytes]] = {}  # what each of them has
        self.hosts: set[str] = set()  # that other events name
        self.receiver = Receiver(url, key=key)
        self.listens = False
        self.link: Any = None
        self._key = key
        self._sent: set[bytes] = set()
        self._heard: set[bytes] = set()

    def __enter__(self) -> Probe:  # noqa: PYI034 - typing.Self is younger than Python 3.9
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.receiver.close()
        if self.link:
            self.link.close()

    def send(self, size: int = 0) -> bytes:
        """Send an event in a datagram of `size` bytes, or of as few as will do; return the name of its stream."""
        stream = os.urandom(8).hex().encode()
        self._sent.add(stream)
        event = Event("eventmon-check", hostname=default_hostname(), pid=os.getpid(), stream=stream.decode(), fill="")
        short = len(seal(format_frame(b"data", stream, (1,), format_json(event)), self._key))
        event["fill"] = "x" * (size - short)
        self.link.socket.sendto(seal(format_frame(b"data", stream, (1,), format_json(event)), self._key), self.link.target)
        return stream  # without a heartbeat, which would tell other watchers of what has been lost

    def hear(self, seconds: float, streams: set[bytes] | None = None) -> set[bytes]:
        """Listen so long, or until the streams have arrived; return those that have."""
        now = time.monotonic()
        end = now + seconds
        while now < end and not (streams and streams <= self._heard):
            if self.listens:
                for event in self.receiver.itercapture(1, 0.01, wakeup=False):
                    self._take(event)
            else:
                wait_for(end - now, self.link.socket)
            with suppress(OSError):
                while True:
                    self._heed(*self.link.socket.recvfrom(65536))
            now = time.monotonic()
        return self._heard & (streams or set())

    def _take(self, event: Event) -> None:
        stream = event.get("stream")
        if event.type == "eventmon-check" and isinstance(stream, str) and stream.isascii():
            self._heard.add(stream.encode())
        else:
            self.hosts.add(printable(event.get("hostname")) or "somebody")

    def _heed(self, data: bytes, source: Source) -> None:
        try:
            frame = parse_frame(unseal(data, self._key)[0])
        except WireError:
            return
        if frame.kind == b"ack" and frame.stream in self._sent and frame.numbers[1] != self.receiver.name:
            self.watchers[frame.numbers[1]] = source
            self.confirmed.setdefault(frame.numbers[1], set()).add(frame.stream)
            if not self.listens and frame.numbers[0]:
                self._heard.add(frame.stream)

    def others(self) -> list[str]:
        """Return where other streams come from."""
        return [endpoint(source) for name, source in self.receiver.sources() if name.encode() not in self._sent]

    def far(self) -> list[int]:
        """Return the watchers on other machines."""
        ours = {address for _, address, _, _ in interfaces()}
        return [name for name, (host, _) in self.watchers.items() if host not in ours and not host.startswith("127.")]

    def leaves(self) -> bool:
        """Whether datagrams leave this machine, so that to hear them here proves nothing about there."""
        return self.listens and is_group(self.url.host) and not on_loopback(self.url)


Step = namedtuple("Step", ["verdict", "name", "text"])  # "ok", "note" or "wrong"; what was tried; what came of it


def open_steps(probe: Probe) -> Iterator[Step]:
    """Open what sends and what listens."""
    url, group = probe.url, is_group(probe.url.host)
    try:
        probe.link = Link(url)
    except (OSError, UnicodeError) as problem:
        yield Step("wrong", "open", in_words(problem, url))
        return
    yield Step("ok", "open", f"a socket that sends on interface {url.interface}" if group else "a socket that sends")
    try:
        probe.receiver.fileno()
        probe.listens = True
        yield Step("ok", "join", f"{'group' if group else 'address'} {url.host}, port {url.port}")
    except OSError as problem:
        verdict, more = ("wrong", "") if group else ("ok", "; whoever watches there is to confirm")
        yield Step(verdict, "join", in_words(problem, url) + more)


def send_steps(probe: Probe) -> Iterator[Step]:
    """Send a small datagram and wait for it."""
    url = probe.url
    try:
        stream = probe.send()
    except OSError as problem:
        yield Step("wrong", "send", in_words(problem, url) + instead(url))
        return
    yield Step("ok", "send", "the system took a datagram")
    if probe.hear(HEAR_TIME, {stream}):
        here = "it has come back on this machine" if probe.leaves() else "it has arrived"
        yield Step("ok", "receive", here if probe.listens else "a watcher has confirmed it")
    elif not probe.listens:
        where = f"python eventmon.py watch --url udp://0.0.0.0:{url.port}"
        yield Step(
            "wrong",
            "receive",
            f"nobody confirms it: start {where} there, with the same key if any, and let UDP through its firewall",
        )
    else:
        causes = "a firewall, a VPN that took the route, Docker's bridge or a cloud without multicast drops it"
        yield Step("wrong", "receive", f"it does not come back: {causes}{instead(url)}")


def size_step(probe: Probe) -> Step:
    """Send datagrams of several sizes."""
    sent, problem = {}, ""
    for size in SIZES:
        try:
            sent[probe.send(size)] = size
        except OSError as error:
            problem = in_words(error, probe.url)
            break
    heard, far = probe.hear(HEAR_TIME, {*sent}), probe.far()
    if far:
        probe.hear(ANSWERS_TIME)
        heard = set.intersection(heard, *(probe.confirmed[name] for name in far))
    arrived = {sent[stream] for stream in heard}
    lacking = [size for size in SIZES if size not in arrived]
    where = " to every watcher on another machine" if far else " on this machine" if probe.leaves() else ""
    needed = MAX_LOOPBACK if on_loopback(probe.url) else MAX_DATAGRAM
    if not lacking:
        return Step("ok", "sizes", f"up to {SIZES[-1]:,} bytes{where}, all that UDP can")
    text = f"{lacking[0]:,} bytes do not arrive{where}" + (f": {problem}" if problem else "")
    if lacking[0] > needed:
        return Step("ok", "sizes", f"up to {max(arrived):,} bytes; {text}, and are not needed")
    return Step("wrong", "sizes", f"{text}; a tunnel or VPN with a small MTU, perhaps")


def buffer_step(probe: Probe) -> Step:
    """Compare the receive buffer with what was asked for."""
    got = probe.receiver.channel.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    got //= 2 if sys.platform == "linux" else 1  # which counts twice what it grants
    if got >= BUFFER:
        return Step("ok", "buffer", f"{BUFFER:,} bytes, as asked for")
    limit = {"linux": "net.core.rmem_max", "darwin": "kern.ipc.maxsockbuf"}.get(sys.platform, "the system's limit")
    return Step(
        "note", "buffer", f"{got:,} bytes of {BUFFER:,}, so bursts are repaired: sudo sysctl -w {limit}={BUFFER}"
    )


def ttl_step(probe: Probe) -> Step:
    """Say how far datagrams go."""
    url = probe.url
    if not is_group(url.host):
        return Step("ok", "ttl", str(url.ttl or "the system's own"))
    if on_loopback(url):
        return Step("ok", "ttl", f"{url.ttl}: nothing leaves this machine")
    if not url.ttl:
        return Step("note", "ttl", "0: no other machine hears this; ttl=1 reaches the network segment")
    hops = url.ttl - 1
    routers = f"through {hops} {plural('router', hops)} that forward multicast" if hops else "the network segment"
    return Step("ok", "ttl", f"{url.ttl}: {routers}")


def time_step(probe: Probe) -> Step:
    """Measure how long a datagram takes."""
    times = []
    for _ in range(TRIES):
        start = time.perf_counter()
        try:
            probe.hear(HEAR_TIME, {probe.send()})
        except OSError as problem:
            return Step("note", "time", in_words(problem, probe.url))
        times.append(time.perf_counter() - start)
    way = "from send to receive" if probe.listens else "there and back"
    return Step("ok", "time", f"{sorted(times)[TRIES // 2] * 1000:.3f} ms {way}, the median of {TRIES}")


def some(names: Iterable[str]) -> str:
    """Return the first few names."""
    first, few = sorted(names), 5
    return ", ".join(first[:few]) + (", …" if len(first) > few else "")


def told(noun: str, names: Iterable[str]) -> str:
    """Return how many there are, and which."""
    found = list(names)
    return f"{len(found)} {plural(noun, len(found))}: {some(found)}" if found else "nobody else"


def company_steps(probe: Probe) -> Iterator[Step]:
    """Listen for a moment, and tell who else is there."""
    probe.hear(LISTEN_TIME)
    if probe.listens:
        streams = probe.others()
        yield Step(
            "ok", "sending", told("Dispatcher", streams) + (f"; events from {some(probe.hosts)}" if probe.hosts else "")
        )
    watchers = told("watcher", map(endpoint, probe.watchers.values()))
    if not probe.leaves() or probe.far():
        yield Step("ok", "watching", watchers)
    else:
        more = "nobody on another machine, so it is not proven that anything gets there: watch there, and check again"
        yield Step("note", "watching", f"{watchers}; {more}")
    rejected = probe.receiver.stats["rejected"]
    if rejected:
        yield Step("note", "key", f"{rejected} {plural('datagram', rejected)} rejected: {probe.receiver.problem}")


def check_steps(probe: Probe, whole: bool = True) -> Iterator[Step]:
    """Try a URL step by step, as far as it works; or only whether it does."""
    for steps in (open_steps, send_steps):
        for step in steps(probe):
            yield step
            if step.verdict == "wrong":
                return
    if whole:
        yield size_step(probe)
        if probe.listens:
            yield buffer_step(probe)
        yield ttl_step(probe)
        yield time_step(probe)
        yield from company_steps(probe)


def interfaces() -> Iterator[tuple[str, str, int, str]]:
    """Yield name, address ("" if it has none), ttl to use and what is to be said of each network interface."""
    try:
        from fcntl import ioctl
    except ImportError:  # Windows
        for address in socket.gethostbyname_ex(socket.gethostname())[2]:
            yield address, address, 1, ""
        return
    linux = sys.platform == "linux"
    addresses, flags = (0x8915, 0x8913) if linux else (0xC0206921, 0xC0206911)  # SIOCGIFADDR, SIOCGIFFLAGS

    def ask(what: int, name: str) -> bytes:
        try:
            return bytes(ioctl(sock, what, struct.pack("16s24x" if linux else "16s16x", os.fsencode(name))))
        except OSError:  # it has none, or is gone
            return bytes(40)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            (flag,) = struct.unpack_from("H", ask(flags, name), 16)
            host = socket.inet_ntoa(ask(addresses, name)[20:24])
            loopback, multicast = flag & 8, flag & (0x1000 if linux else 0x8000)
            fault = "down" if not flag & 1 else "" if multicast or loopback else "no multicast"
            yield name, "" if host == "0.0.0.0" else host, 0 if loopback else 1, fault


def interface_lines(url: Url, key: bytes, trying: bool) -> Iterator[str]:
    """Yield a line for each interface that the URL does not use; and, if `trying`, whether it works."""
    group = url.host if is_group(url.host) else parse_url(DEFAULT_URL).host
    for name, address, ttl, fault in interfaces():
        if is_group(url.host) and url.interface in (name, address):
            continue
        other = f"udp://{group}:{url.port}?interface={address or name}&ttl={ttl}"
        line = f"  {printable(name):<12} {address or 'no address':<15}  '{other}'"
        if not is_host(address or name):
            fault = "a name that no URL can hold"
        elif trying and not fault:
            with Probe(other, key) as probe:
                *_, last = check_steps(probe, whole=False)
            fault = "works on this machine" if last.verdict == "ok" else f"{last.name}: {last.text}"
        yield f"{line}  {fault}".rstrip()


def check(options: Any) -> int:
    """Try the URL in force step by step, and say what is wrong and what to do."""
    take_any_text()
    url, key = url_from(options.url), key_from(options.key)
    origin = "--url" if options.url else "$EVENTMON_URL" if os.environ.get("EVENTMON_URL") else "the default"
    with Probe(url, key) as probe:
        print(f"{url}  ({origin}{', with a key' if key else ''})", flush=True)
        works = True
        for verdict, name, text in check_steps(probe):
            print(f"{verdict:<5} {name:<8} {text}", flush=True)
            works = works and verdict != "wrong"
        lines = [*interface_lines(probe.url, key, options.all_interfaces)]
    if lines:
        tried = "" if options.all_interfaces else ", on which nothing was sent (--all-interfaces does)"
        print(f"other interfaces{tried}:", *lines, sep="\n")
    return 0 if works else 1


# Processes of our own, for the demo and the bench.

CHILD = """import sys; sys.path.pop(0)  # deaf to what lies where it is run
from importlib import machinery, util; import json
loader = machinery.SourceFileLoader("eventmon", sys.argv[1])
module = util.module_from_spec(util.spec_from_loader("eventmon", loader))
sys.modules["eventmon"] = module
loader.exec_module(module)
for answer in getattr(module, sys.argv[2])(*json.loads(input())): print(json.dumps(answer), flush=True)
"""
ANSWER_TIME = 20.0  # the longest that one of them may take to answer


def own_url(n: int) -> str:
    """Return a URL, the n-th, where nobody listens; on the loopback interface with ttl 0, since nothing else is said."""
    from random import randrange

    return f"udp://239.255.{randrange(256)}.{n}:{randrange(20000, 60000)}"


def launch(function: Callable[..., Iterable[Any]], *args: Any) -> Any:
    """Start a process that prints as JSON, line by line, what a function of this file yields; its input stays open."""
    from subprocess import PIPE, Popen

    words = [sys.executable, "-c", CHILD, os.path.abspath(__file__), function.__name__]
    process: Any = Popen(words, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, errors="replace")
    try:
        print(json.dumps(args), file=process.stdin, flush=True)  # a key stands on no command line
    except BrokenPipeError:
        pass  # it has failed, which answer() tells
    return process


def answer(process: Any) -> Any:
    """Return the next thing that a process yields, or raise Failure."""
    timer = threading.Timer(ANSWER_TIME, process.kill)
    timer.start()
    try:
        line = process.stdout.readline()
    finally:
        timer.cancel()
    if line:
        return json.loads(line)
    process.kill()
    errors = process.stderr.read().splitlines() or [f"it has ended, or gave no answer in {ANSWER_TIME:.0f} s"]
    raise Failure(f"a process of our own has failed: {errors[-1]}", 1)


def child(function: Callable[..., Iterable[Any]], *args: Any) -> Generator[Any, None, None]:
    """Yield what a function of this file yields in a process that lives until close(); or raise Failure."""
    with launch(function, *args) as process:
        try:
            while True:
                yield answer(process)
        finally:
            process.kill()


# The demo: a shop, with what goes well and wrong in one.

LIFE = 15.0  # seconds, of the worker that dies without a word


class Shop:
    """What the demo's workers do."""

    def __init__(self, events: Dispatcher) -> None:
        import logging
        import random

        self.events = events
        self.random = random.Random()
        self.log = logging.Logger("shop")  # noqa: LOG001 - of our own
        self.log.addHandler(log_handler()(events))
        for name in ("order", "charge", "resize", "report"):
            setattr(self, name, events.task(f"shop.{name}")(getattr(self, name)))

    def chance(self, share: float) -> bool:
        """Whether what happens in so many cases happens in this one."""
        return self.random.random() < share

    def pause(self, longest: float) -> None:
        """Take some time."""
        time.sleep(self.random.uniform(longest / 5, longest))

    def serve(self) -> NoReturn:
        """Work for ever."""
        while True:
            try:
                work = self.random.choice(
                    (self.order, self.order, self.stock, lambda number: list(self.report(number)))
                )
                work(self.random.randrange(1000, 10000))
            except (OSError, ValueError):
                pass  # the events have told of it
            self.pause(1)

    def order(self, number: int) -> str:
        """Have an order paid and sent: a chain of tasks."""
        self.events.send("order-placed", order=number, cents=number // 2)
        self.charge(number, cents=number // 2)
        for width in (200, 800):
            self.resize(f"photo-{number}.jpg", width)
        self.mail(f"customer-{number}@example.com")
        return "sent"

    def charge(self, order: int, cents: int) -> dict[str, int]:
        """Ask the bank for the money."""
        self.pause(0.8)
        if self.chance(0.2):
            raise ConnectionRefusedError(f"the bank refuses {cents} cents for order {order}: card expired")
        return {"paid": cents}

    def resize(self, photo: str, width: int) -> str:
        """Resize a photo."""
        self.pause(0.5)
        if self.chance(0.05):
            raise ValueError(f"{photo} is no JPEG file")
        return f"{photo}@{width}"

    def mail(self, to: str) -> None:
        """Send a mail, at the third attempt at the latest."""
        from uuid import uuid4

        uuid, order = str(uuid4()), _current_task.get()
        above = {"parent_id": order.uuid, "root_id": order.root_id} if order else {}
        for retries in range(3):
            self.events._begin_task(uuid, {"name": "mail.send", "args": repr((to,)), "retries": retries, **above})
            self.pause(0.6)
            if retries == 2 or self.chance(0.7):
                self.events._end_task("task-succeeded", uuid, {"result": "'250 OK'"})
                return
            self.events._end_task("task-retried", uuid, {"exception": "TimeoutError('mail.example.com')"})
            self.pause(1)

    def stock(self, number: int) -> None:
        """Read a long list, and say how far it is."""
        with self.events.task("shop.stock", args=repr((f"stock-{number}.csv",))) as task:
            for row in range(20):
                self.pause(0.4)
                task.progress((row + 1) / 20)
                if self.chance(0.05):
                    self.log.warning("stock-%d.csv: row %d has no price", number, row)

    def report(self, number: int) -> Iterator[str]:
        """Yield the lines of a report, one after the other."""
        for hour in range(8, 20):
            self.pause(0.3)
            yield f"report {number}, {hour}:00"


def demo_worker(url: str, key: str, name: str, life: float) -> Iterator[Any]:
    """Work in three threads until standard input ends, or for `life` seconds."""
    events = Dispatcher(url, f"{name}@demo", freq=1, key=bytes.fromhex(key))
    events.send("deploy-done", version=__version__)
    for _ in range(3):
        threading.Thread(target=Shop(events).serve, daemon=True).start()
    if life:
        timer = threading.Timer(life, os._exit, (1,))
        timer.daemon = True
        timer.start()
    yield "ready"
    sys.stdin.read()
    events.close()


def demo(options: Any) -> int:
    """Show a shop at work: worker processes, on a URL of their own, and what watch makes of them."""
    options.url = options.url or own_url(1)
    parse_url(options.url)
    args = options.url, key_from(options.key).hex()
    workers = [launch(demo_worker, *args, name, LIFE * (name == "gamma")) for name in ("alpha", "beta", "gamma")]
    try:
        for worker in workers:
            answer(worker)
        return watch(options)
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.communicate()


# The bench. What a user would write by hand is measured in the same run, in turns, so that the ratio can be trusted.

QUIET_TIME = 5.0  # without an event, after which its watcher says what it has
UUID = "5d0c91aa"
BURST = 50  # events that are received together: few enough for the smallest usual buffer
PINGS = 50  # in a row: few enough that all find the two processes on the same cores
TASK: dict[str, dict[str, Any]] = {  # the events of a task
    "task-received": {"name": "shop.resize", "args": "('photo.jpg',)", "kwargs": "{'width': 200}", "retries": 0},
    "task-started": {},
    "task-succeeded": {"result": "'photo.webp'", "runtime": 0.25},
}


def measured(what: str, unit: str, ours: Iterable[float], by_hand: Iterable[float] = (), **more: Any) -> dict[str, Any]:
    """Return a row of the bench, of the best figures."""
    best = max if unit == "/s" else min
    figure, naive = best(ours), best(by_hand, default=None)
    return {"what": what, "figure": figure, "naive": naive, "ratio": naive and figure / naive, "unit": unit, **more}


def seconds_for(work: Callable[[], object], times: int = 1) -> float:
    """Return how long some work takes, on average."""
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def core_share(work: Callable[[], object]) -> float:
    """Return how many percent of a core this process takes while it does some work."""
    cpu = time.process_time()
    wall = seconds_for(work)
    return 100 * (time.process_time() - cpu) / wall


def send_by_hand(url: Url, n: int) -> float:
    """Send `n` events with the fields of a Dispatcher's, one to a datagram; return events a second."""
    who = {"hostname": default_hostname(), "pid": os.getpid(), "utcoffset": 0.0}
    group = socket.gethostbyname(url.host), url.port
    with udp_socket(url) as sock:
        sock.setblocking(True)
        start = time.perf_counter()
        for i in range(n):
            event = {"type": "task-progress", "timestamp": time.time(), **who, "clock": i, "uuid": UUID, "progress": i}
            sock.sendto(json.dumps(event).encode(), group)
        return n / (time.perf_counter() - start)


def send_many(url: str, key: str, n: int, together: int, hearer: Iterator[Any] | None = None) -> tuple[float, int]:
    """Send `n` events; return events a second until they are sent, or hear() has them, and how many it lacks."""
    if hearer:
        next(hearer)
    with Dispatcher(url, buffer_group=("task",) if together > 1 else (), buffer_limit=together, key=key) as events:
        start = time.perf_counter()
        for i in range(n):
            events.send("task-progress", uuid=UUID, progress=i)
        events.flush(0)
        count, end = next(hearer) if hearer else (n, time.perf_counter())
    return count / (end - start), n - count


def take(state: State, events: Iterable[Event]) -> None:
    """Give events to a State."""
    for event in events:
        state.event(event)


def take_by_hand(tasks: dict[str, Any], events: Iterable[Event]) -> None:
    """Keep what events say of tasks in a plain dict."""
    for event in events:
        tasks.setdefault(event["uuid"], {}).update(event)


def hear(url: str, key: str, n: int, idle: float = 0.0) -> Iterator[Any]:
    """Yield when it listens, how many of `n` events a State has taken and when, what it takes of a core while idle."""
    state = State()
    with Receiver(url, {"*": state.event}, key=key) as receiver:
        receiver.fileno()
        yield "listening"
        take(state, receiver.itercapture(n, QUIET_TIME))
        yield state.event_count, time.perf_counter() - (QUIET_TIME if state.event_count < n else 0)
        receiver.capture(timeout=SETTLE)
        yield core_share(partial(receiver.capture, timeout=idle))


def send_rows(url: str, other: Url, key: str, n: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Measure sending, to nobody and to the State of another process, beside plain JSON on a socket."""
    from contextlib import closing

    for kind, many, together in (("one event a datagram", n, 1), ("buffered", n * 5 // 2, 24)):
        by_hand, alone, heard = [], [], []
        for _ in range(rounds):
            by_hand.append(send_by_hand(other, n))
            alone.append(send_many(url, key, many, together)[0])
            with closing(child(hear, url, key, many)) as hearer:
                heard.append(send_many(url, key, many, together, hearer))
        rates, lost = zip(*heard)
        yield measured(f"send, {kind}", "/s", alone, by_hand)
        yield measured(f"send to State, {kind}", "/s", rates, by_hand, lost=sum(lost))


def receive_row(url: str, other: Url, key: str, n: int, rounds: int) -> dict[str, Any]:
    """Measure how fast what waits in a socket is received, beside recvfrom() and json.loads()."""
    ours, by_hand = [], []
    with Receiver(url, key=key) as receiver, Dispatcher(url, key=key) as events, listen(other) as sock:
        receiver.fileno()
        for _ in range(rounds):
            spent = bare = 0.0
            for i in range(n):
                for _ in range(BURST):
                    events.send("task-progress", uuid=UUID, progress=i)
                send_by_hand(other, BURST)
                spent += seconds_for(lambda: deque(receiver.itercapture(BURST, QUIET_TIME), maxlen=0))
                bare += seconds_for(lambda: json.loads(sock.recvfrom(65536)[0]), BURST) * BURST
            ours.append(n * BURST / spent)
            by_hand.append(n * BURST / bare)
    return measured("receive, one event a datagram", "/s", ours, by_hand)


def take_rate(taking: Callable[[list[Event]], None], n: int) -> float:
    """Have the events of `n` tasks taken, which share no string, as from the network; return events a second."""
    spent, who = 0.0, {"hostname": "alpha@laptop", "pid": 4711, "utcoffset": 0.0}
    for start in range(0, n, 1000):
        tasks = [(kind, f"task-{i}", TASK[kind]) for i in range(start, min(start + 1000, n)) for kind in TASK]
        bodies = [format_json({"type": kind, "uuid": uuid, "clock": 1, **who, **more}) for kind, uuid, more in tasks]
        spent += seconds_for(partial(taking, [parse_event(parse_json(body)) for body in bodies]))
    return n * len(TASK) / spent


def state_rows(n: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Measure how fast a State takes the events of `n` tasks, and in how much memory, beside a plain dict."""
    import tracemalloc

    ours, by_hand, sizes = [], [], []
    for _ in range(rounds):
        ours.append(take_rate(partial(take, State(max_tasks_in_memory=n)), n))
        by_hand.append(take_rate(partial(take_by_hand, {}), n))
    yield measured("State.event", "/s", ours, by_hand)
    state, n = State(max_tasks_in_memory=n), max(1, n // 4)
    state.recent = deque(maxlen=0)  # which is as large for any number of tasks
    for taking in (partial(take, state), partial(take_by_hand, {})):
        tracemalloc.start()
        take_rate(taking, n)
        sizes.append(tracemalloc.get_traced_memory()[0] / n)
        tracemalloc.stop()
    yield measured("State, memory of a finished task", "bytes", sizes[:1], sizes[1:])


def query_rows(n: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Measure what the monitor asks of a State with `n` tasks, 50 of them running, beside going through them all."""
    from operator import itemgetter

    state, now, tasks = State(max_tasks_in_memory=n), time.time(), []
    for i in range(n):
        kind = "task-succeeded" if i % max(1, n // 50) else "task-started"
        tasks.append(Event(kind, uuid=f"task-{i}", timestamp=now - 60 + 60 * i / n, hostname="alpha@laptop"))
    take(state, tasks)
    when, ages, on = itemgetter("timestamp"), [now - task["timestamp"] for task in tasks], "task-started"

    def query(what: str, asking: Callable[[], object], looking: Callable[[], object]) -> dict[str, Any]:
        pairs = [(seconds_for(asking, 20) * 1e6, seconds_for(looking) * 1e6) for _ in range(rounds)]
        return measured(f"State.{what}", "us", *zip(*pairs))

    yield query("tasks_by_time(limit=50)", lambda: [*state.tasks_by_time(50)], lambda: sorted(tasks, key=when)[:-51:-1])
    yield query("iteractive()", lambda: [*state.iteractive()], lambda: [task for task in tasks if task["type"] == on])
    yield query("scale_graph()", lambda: state.scale_graph(now=now), lambda: Counter(int(a) for a in ages if a < 60))


def peer() -> socket.socket:
    """Return a bare UDP socket with a port of its own."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(ANSWER_TIME)
    sock.bind(("127.0.0.1", 0))
    return sock


def pong(url: str, key: str, n: int, address: Sequence[Any]) -> Iterator[Any]:
    """Yield where it listens, answer what ping() sends, and yield the median seconds that an event took."""
    delays: list[float] = []

    def answer(event: Event) -> None:
        delays.append(time.perf_counter() - event["sent"])
        sock.send(bytes(200))

    with Receiver(url, {"ping": answer}, key=key) as receiver, peer() as sock:
        receiver.fileno()
        sock.connect(tuple(address))
        yield sock.getsockname()
        for _ in range(n):
            receiver.capture(PINGS, QUIET_TIME)
            for _ in range(PINGS):
                sock.send(sock.recv(2048))
        yield sorted(delays)[len(delays) // 2]


def ping(url: str, key: str, n: int) -> tuple[float, float]:
    """Send events, and then datagrams, each after an answer, `n` times; return the median microseconds of one way."""
    from contextlib import closing

    trips = []
    with peer() as sock, closing(child(pong, url, key, n, sock.getsockname())) as answers:
        sock.connect(tuple(next(answers)))
        with Dispatcher(url, key=key) as events:
            for _ in range(n):
                for _ in range(PINGS):
                    events.send("ping", sent=time.perf_counter())
                    sock.recv(2048)
                for _ in range(PINGS):
                    start = time.perf_counter()
                    sock.send(bytes(200))
                    sock.recv(2048)
                    trips.append((time.perf_counter() - start) / 2)
        return next(answers) * 1e6, sorted(trips)[len(trips) // 2] * 1e6


def import_row(rounds: int) -> dict[str, Any]:
    """Measure our import, without site packages, which import much of it, beside that of what a user would import."""
    import py_compile
    from subprocess import PIPE, run
    from tempfile import TemporaryDirectory

    def milliseconds(names: str) -> float:
        code = f"import sys; sys.path[0] = sys.argv[1]; import time; start = time.perf_counter(); import {names}; print(time.perf_counter() - start)"
        return float(run([sys.executable, "-S", "-c", code, folder], stdout=PIPE, check=False).stdout) * 1000

    with TemporaryDirectory() as folder:
        py_compile.compile(__file__, os.path.join(folder, "eventmon.pyc"))  # as after the first import
        pairs = [(milliseconds("eventmon"), milliseconds("socket, json, threading")) for _ in range(rounds)]
    return measured("import eventmon", "ms", *zip(*pairs))


def bench_rows(url: str, other: str, key: str, scale: float) -> Iterator[dict[str, Any]]:
    """Measure everything, by way of `url`, and what is sent by hand by way of the other one."""
    from contextlib import closing

    thousand, rounds, seconds = max(1, int(1000 * scale)), min(5, max(1, int(5 * scale))), 2 * min(1.0, scale)
    yield from send_rows(url, parse_url(other), key, 40 * thousand, rounds)
    yield receive_row(url, parse_url(other), key, thousand // 10, rounds)
    yield from state_rows(40 * thousand, min(3, rounds))
    yield from query_rows(100 * thousand, rounds)
    pings = [ping(url, key, max(1, thousand // 50)) for _ in range(rounds)]
    yield measured("latency, send to handler", "us", *zip(*pings))
    yield import_row(3 * rounds)
    with closing(child(hear, url, key, 1, seconds)) as hearer, Dispatcher(url, key=key) as events:
        next(hearer)
        events.send("hello")
        next(hearer)
        time.sleep(SETTLE)
        yield measured("idle Dispatcher", "%", [core_share(partial(time.sleep, seconds))])
        yield measured("idle watcher", "%", [next(hearer)])


def bench_line(what: str, figure: float, naive: float | None, ratio: float | None, unit: str, lost: int = 0) -> str:
    """Return a row of the bench as a line of its table: of a figure three digits, or all of a large one."""
    unit = unit if unit in ("/s", "%") else f" {unit}"
    parts = (figure, unit), (naive, unit), (ratio, "x")
    cells = ["-" if n is None else f"{n:,.0f}{end}" if n >= 100 else f"{n:.3g}{end}" for n, end in parts]
    return "{:<36}{:>14}{:>14}{:>11}".format(what, *cells) + (f"  {lost:,} lost" if lost else "")


def bench(options: Any) -> int:
    """Measure this machine, on a group of its own, and beside each figure what a user would write by hand."""
    import platform

    url, other = (options.url or own_url(n) for n in (1, 2))
    parse_url(url)
    if not options.json:
        system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
        print(f"eventmon {__version__}, {platform.python_implementation()} {platform.python_version()}, {system}")
        print(f"{'':<36}{'eventmon':>14}{'by hand':>14}{'ratio':>11}", flush=True)
    for result in bench_rows(url, other, key_from(options.key).hex(), options.scale):
        print(json.dumps(result) if options.json else bench_line(**result), flush=True)
    return 0


def amount(word: str) -> float:
    """Return a number from the command line that is not negative."""
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", word):
        return float(word)
    from argparse import ArgumentTypeError

    raise ArgumentTypeError(f"{word!r} is not a number of at least 0")


def whole(word: str) -> int:
    """Return a whole number from the command line that is not negative."""
    if amount(word).is_integer():
        return int(float(word))
    from argparse import ArgumentTypeError

    raise ArgumentTypeError(f"{word!r} is not a whole number")


WATCHING: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--json", {"action": "store_true", "help": "print each event as a line of JSON"}),
    ("--plain", {"action": "store_true", "help": "print each event as a line of text"}),
    ("--record", {"metavar": "FILE", "help": "append every event to FILE as NDJSON"}),
    ("--type", {"action": "append", "metavar": "GLOB", "help": "only these types, as in 'task-*'; may be repeated"}),
    ("--limit", {"type": whole, "metavar": "N", "help": "stop after N events"}),
    ("--timeout", {"type": amount, "metavar": "S", "help": "stop after S seconds without an event"}),
    ("--no-history", {"action": "store_true", "help": "begin with what is sent from now on"}),
)
COMMANDS: dict[str, Any] = {  # name -> what does it, two examples, exit status, arguments
    "watch": (
        watch,
        ("watch", "watch --json --type 'task-*' | jq .uuid"),
        "0, also when ctrl-C or the end of a pipe ends it",
        (("file", {"nargs": "?", "metavar": "FILE", "help": "show recorded NDJSON instead of the network"}), *WATCHING),
    ),
    "send": (
        send,
        ("send deploy-done version=1.2 seconds:=8.5", "send - < recorded.jsonl"),
        "0 when the system has taken every event",
        (
            ("type", {"metavar": "TYPE", "help": "the event's type, or - for NDJSON on standard input"}),
            ("field", {"nargs": "*", "default": [], "metavar": "FIELD", "help": "name=text, or name:=json"}),
        ),
    ),
    "run": (
        run,
        ("run -- make test", "run --name nightly-backup -- ./backup.sh /srv"),
        "the command's; 128 + n after signal n, 127 if it is not found, 126 if it cannot be executed",
        (
            ("--name", {"help": "of the task (default: the command's)"}),
            ("command", {"nargs": "...", "metavar": "-- COMMAND", "help": "the command and its arguments"}),
        ),
    ),
    "check": (
        check,
        ("check", "check --url 'udp://239.255.69.86:6986?interface=eth0&ttl=1'"),
        "0 when the URL works",
        (("--all-interfaces", {"action": "store_true", "help": "send on the other interfaces, too"}),),
    ),
    "demo": (demo, ("demo", "demo --plain --limit 20"), "0", WATCHING),
    "bench": (
        bench,
        ("bench", "bench --json --scale 0.1"),
        "0",
        (
            ("--json", {"action": "store_true", "help": "print each row as a line of JSON"}),
            ("--scale", {"type": amount, "default": 1.0, "metavar": "X", "help": "how much: 1 takes about 25 s"}),
        ),
    ),
}


def parser() -> Any:
    """Return the parser of the command line."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            complain(message)
            raise SystemExit(2)

    top = Parser(prog="eventmon", description="See what every process is doing, over UDP multicast, with no broker.")
    top.add_argument("--version", action="version", version=f"eventmon {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", parser_class=Parser)
    for name, (work, examples, status, arguments) in COMMANDS.items():
        summary = work.__doc__.partition("\n")[0]
        lines = "".join(f"\n  python eventmon.py {example}" for example in examples)
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"examples:{lines}\n\nexit status: {status}; 1 for a failure, 2 for wrong usage",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(file=None, field=[], run=work)
        where = "one of its own" if work in (demo, bench) else f"$EVENTMON_URL or {DEFAULT_URL}"
        sub.add_argument("--version", action="version", version=f"eventmon {__version__}")
        sub.add_argument("--url", help=f"where events are sent (default: {where})")
        sub.add_argument(
            "--key-file", metavar="FILE", help="file with the key that authenticates ($EVENTMON_KEY is one)"
        )
        forms = sub.add_mutually_exclusive_group() if "--plain" in dict(arguments) else sub
        for argument, options in arguments:
            (forms if argument in ("--json", "--plain") else sub).add_argument(argument, **options)
    return top


def read_key_file(path: str) -> bytes:
    """Return the key in a file, without the white space around it; of a text in UTF-8 or UTF-16 with a mark, the text."""
    with open(path, "rb") as file:
        key = file.read().removeprefix(b"\xef\xbb\xbf")
    if key[:2] in (b"\xff\xfe", b"\xfe\xff"):
        with suppress(UnicodeError):
            key = key.decode("utf-16").encode()
    if not key.strip():
        raise Failure(f"key file {path} is empty", 1)
    return key.strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (sys.argv[1:] if None) and return its exit status: 0, 1 failure, 2 usage."""
    options = None
    try:
        options, rest = parser().parse_known_args(argv)
        if not hasattr(options, "run"):
            raise Failure(f"no command, expected one of {', '.join(COMMANDS)}; see --help", 2)
        if rest and (options.run is not send or rest[0].startswith("-")):
            raise Failure(f"unrecognized arguments: {' '.join(rest)}", 2)
        options.field = [*options.field, *rest]  # argparse leaves those behind an option
        options.key = read_key_file(options.key_file) if options.key_file else None
        return int(options.run(options))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except Failure as failure:
        complain(failure.args[0])
        return int(failure.args[1])
    except KeyboardInterrupt:
        return 0 if options and options.run in (watch, demo) else 1
    except BrokenPipeError as problem:  # whoever read us has gone; let the interpreter's last flush find no pipe
        if problem.filename:
            complain(describe(problem))
            return 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ValueError as problem:
        complain(str(problem))
        return 2
    except OSError as problem:
        complain(describe(problem))
        return 1


if __name__ == "__main__":
    sys.exit(main())
