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

The words (RFC 3208 and RFC 5740 have the multicast ones, Celery has task, worker and state):

    event     a dict with a "type" ("task-started": group "task", subject "started") and a "timestamp"
    stream    all that one Dispatcher sends in one process, in order: datagrams with the sequence numbers (seq) 1, 2, 3, ...
    frame     a datagram of our own: a header line and a body
    window    what one side knows of a stream: the transmit window keeps what was sent, to repair it; the receive
              window restores the order and knows what is missing
    lead      the highest sequence number sent; trail is the lowest that can still be repaired
    beat      a heartbeat every quarter second; bye is the last one. Without it, a stream silent for 3 s is lost
    watcher   a Receiver, as a Dispatcher knows it. Its ack gives a position (all up to there has arrived or is given
              up), room (bytes that its buffer takes), how many datagrams it lost, and how many it has taken of all
              streams: it advances as long as that number rises
    NAK       negative acknowledgement: an ack that asks for what is missing; to repair is to send that again
    view      what the user of the monitor sees: sheets above each other, the first a page
    sheet     rows to move in: a table, or a panel with everything about one row of it
    line      of the screen: a list of spans, text in a style, that take as many cells (columns of the terminal) as it has

The wire. A datagram is either bare JSON (an object with a "type", or an array of them), or a frame:

    EM2 data STREAM SEQ                              body: an event, or an array of events, as JSON
    EM2 part STREAM SEQ EVENT INDEX COUNT            body: piece INDEX (from 0) of COUNT of an event too big for one
    EM2 beat STREAM LEAD TRAIL                       also bye, the last; body: PID HOSTNAME of the process
    EM2 ack STREAM POSITION WATCHER ROOM LOST TAKEN  from a watcher, by unicast; also leave, its last; no body
    EM2 nak STREAM POSITION WATCHER ROOM LOST TAKEN  body: the sequence numbers missing, as in "7 9-12"

Fields are separated by one space, the header ends with a newline, numbers are decimal and below 10**19. With a
key, three more fields end the header: the time in seconds since the epoch, a serial number that rises with each frame
of a process, and 32 hex digits of the HMAC-SHA-256 of everything else.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 9):  # noqa: UP036 - which says what is wrong
    raise (SystemExit if __name__ == "__main__" else ImportError)("eventmon needs Python 3.9 or newer")
if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]  # this file's folder, in which the user may have a random.py

import atexit
import errno
import json
import os
import re
import select
import socket
import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict, deque, namedtuple
from contextlib import ExitStack, nullcontext, suppress
from contextvars import ContextVar
from functools import lru_cache, partial, wraps
from itertools import accumulate, chain, count, islice, repeat
from math import ceil, inf, isfinite
from weakref import WeakSet

TYPE_CHECKING = False  # as in typing, which costs a third of our import time
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from typing import Any, Callable, NoReturn, TypeVar

    Source = tuple[str, int]
    Ranges = list[tuple[int, int]]
    Facts = Mapping[str, Any]  # what is known of a task, a worker, an event
    Line = list["Span"]
    Rows = list["Row"]
    Feed = Iterator["Event | None"]
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
ROOM = 2 << 20  # of a watcher's buffer that all senders together may fill
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
        is_number = isinstance(value, float) and isfinite(value) or isinstance(value, int) and value.bit_length() < 4096
        if value is None or is_number:
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
HEADER = re.compile(rb"EM2 ([a-z]+) ([0-9a-zA-Z]{16}) ([0-9]{1,19}(?: [0-9]{1,19}){0,6})( [0-9a-f]{32})?\n")
NAME = slice(9, 25)  # where the stream's name stands in a data frame

Frame = namedtuple("Frame", ["kind", "stream", "numbers", "body"])  # bytes, bytes, tuple of ints, bytes


def parse_frame(data: bytes) -> Frame:
    """Return the parts of a frame without a seal, or raise WireError."""
    match = HEADER.match(data)
    if not match:
        raise WireError(f"header is {data[:60]!r}, expected EM2 KIND STREAM NUMBER... and a newline")
    kind, stream, digits, mac = match.groups()
    if mac:
        raise Rejected("the stream is sealed with a key, and there is none here")
    numbers = tuple(map(int, digits.split()))
    if LAYOUT.get(kind) != len(numbers):
        raise WireError(f"a {kind.decode()} of {len(numbers)} numbers, expected one of {LAYOUT}")
    return Frame(kind, stream, numbers, data[match.end() :])


def head_of(kind: bytes, stream: bytes) -> bytes:
    """Return how the frames of one kind begin in a stream: all that stands before the numbers."""
    return b"%b %b %b " % (MAGIC, kind, stream)


def process_name(pid: Any, hostname: Any) -> bytes:
    """Return the body of a beat: PID HOSTNAME."""
    return f"{pid} {hostname}".encode("utf-8", "backslashreplace")[:1000]


def format_frame(kind: bytes, stream: bytes, numbers: Iterable[int], body: bytes = b"") -> bytes:
    """Return a frame; the mirror of parse_frame."""
    return b"%b%b\n%b" % (head_of(kind, stream), b" ".join([b"%d" % n for n in numbers]), body)


SEALED = re.compile(rb"(EM2 .{1,%d}) ([0-9]{1,19}) ([0-9]{1,19}) ([0-9a-f]{32})\n" % MAX_HEADER)
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

    match = SEALED.match(data)
    if not match or not hmac.compare_digest(match[4], mac_of(data[: match.end(3)], data[match.end() :], key)):
        raise Rejected("not sealed with this key")
    ahead = int(match[2]) - time.time()
    if abs(ahead) > 30:
        way = "ahead of" if ahead > 0 else "behind"
        raise Skewed(f"sealed by a clock {abs(ahead):.0f} s {way} this one, or sent again")
    return b"%b\n%b" % (match[1], data[match.end() :]), int(match[3])


def seal(frame: bytes, key: bytes) -> bytes:
    """Return a frame with the time, a serial number and its HMAC in the header; the mirror of unseal."""
    if not key:
        return frame
    head, _, body = frame.partition(b"\n")
    head = b"%b %d %d" % (head, time.time(), next(_serials))
    return b"%b %b\n%b" % (head, mac_of(head, body, key), body)


MAX_RANGES = 60  # in a NAK, so that it fits MAX_DATAGRAM
RANGE = re.compile(rb"([0-9]{1,19})(?:-([0-9]{1,19}))?")


def parse_ranges(body: bytes) -> Ranges:
    """Return the (first, last) pairs of a NAK, or raise WireError."""
    ranges = []
    for word in body.split(b" ", MAX_RANGES)[:MAX_RANGES]:
        match = RANGE.fullmatch(word)
        if not match:
            raise WireError(f"range is {word[:40]!r}, expected N or N-N")
        ranges.append((int(match[1]), int(match[2] or match[1])))
    return ranges


def format_ranges(ranges: Ranges) -> bytes:
    """Return the body of a NAK; the mirror of parse_ranges."""
    return b" ".join(b"%d" % first if first == last else b"%d-%d" % (first, last) for first, last in ranges)


# --- the windows: pure, no socket, no thread, no clock of their own -----------------------------------------------


class Watcher:
    """A Receiver as a TransmitWindow knows it."""

    position = -1  # everything up to this sequence number has arrived there, or is given up
    lost = 0  # datagrams of this stream that it gave up
    taken = -1  # datagrams of all streams that it has read
    send_limit = inf  # what may be sent, in bytes, until its buffer is full
    heard = -inf
    has_left = False
    waited = 0.0  # seconds that send() has waited for it since it last advanced
    serial = -1  # of its last answer, with a key
    address: Source | None = None


class TransmitWindow:
    """What one stream has sent and can repair, and what its watchers have confirmed (RFC 3208, section 2.1).

    Pure: times are seconds of any clock that only goes forward. The last `history` bytes are kept. Flow control: `sent`
    is how many bytes all datagrams so far take of a watcher's buffer; while it is above `send_limit`, send() listens to
    answers and then waits. It waits at most a quarter second for a watcher that does not advance, and at most half of
    the time for all, unless the sender is `patient`: it has nothing else to do.
    """

    MAX_WATCHERS = 64  # that are waited for
    FIRST_FLIGHT = 100 * (DATAGRAM_COST + 300)  # bytes that are sent before the first answer is waited for
    FIRST_ANSWER = QUARTER = 0.25  # how long it is waited for, and for a watcher that does not advance
    UNHEARD = 256 * (DATAGRAM_COST + 300)  # bytes sent between two looks at answers: a busy loop leaves a thread few
    GRACE, LEAST_WAIT = 1.0, 0.01  # of waiting before it is counted against the program's own time; worth to begin

    def __init__(self, history: int = HISTORY, patient: float = 0.0) -> None:
        self.history = history
        self.trail = 1
        self.next = 1
        self.sent = 0
        self.send_limit: float = self.FIRST_FLIGHT
        self.watchers: dict[int, Watcher] = {}
        self.opened_at = -inf  # when the first answer began to be waited for
        self.advanced_at = -inf  # when a watcher last did
        self._alive = max(SILENCE, patient)  # how long a watcher that is not heard is alive
        self._patient = patient > 0
        self._frames: dict[int, bytes] = {}  # from trail to lead
        self._ends: dict[int, int] = {}  # what `sent` was after each of them
        self._gone = 0  # and before the first
        self._may_wait = self.GRACE  # how much longer, at the end of the last wait
        self._waited_until = -inf
        self._repaired: dict[int, float] = {}  # when
        self._allowance: float = 0.0  # bytes that may be repaired, when it was last filled up
        self._refilled = -inf

    def add(self, frame: bytes) -> None:
        """Keep the datagram that has the sequence number `next`."""
        seq = self.next
        self._frames[seq] = frame
        self._ends[seq] = self.sent = self.sent + len(frame) + DATAGRAM_COST
        self.next = seq + 1  # from here on it counts as sent, whatever a signal handler raises
        while not seq % 64 and self.sent - self._gone - DATAGRAM_COST * len(self._frames) > self.history:
            self.trail += 1
            del self._frames[self.trail - 1]
            self._gone = self._ends.pop(self.trail - 1)

    def on_ack(self, name: int, position: int, room: int, lost: int, taken: int, now: float) -> Watcher:
        """Take note of what a watcher has confirmed, and return it; WireError if it cannot be true."""
        if position >= self.next:
            raise WireError(f"confirms {position}, expected at most {self.next - 1}")
        if name not in self.watchers and len(self.watchers) >= self.MAX_WATCHERS:
            live = self.live(now)
            self.watchers = {name: known for name, known in self.watchers.items() if known in live}
        watcher = self.watchers.get(name) or Watcher()
        if len(self.watchers) < self.MAX_WATCHERS:  # else it is neither waited for nor counted, but helped
            self.watchers[name] = watcher
        if taken > watcher.taken:
            watcher.taken = taken
            watcher.waited = 0.0
            if watcher.position < self.next - 1:  # whoever has everything only answers
                self.advanced_at = now
        watcher.position = max(position, watcher.position)
        watcher.lost = max(lost, watcher.lost)
        watcher.heard, watcher.has_left = now, False
        watcher.send_limit = self._ends.get(watcher.position, self._gone) + room
        self.limit_sending(now)
        return watcher

    def live(self, now: float) -> list[Watcher]:
        """Return the watchers heard lately."""
        return [it for it in list(self.watchers.values()) if not it.has_left and now - it.heard < self._alive]

    def complete(self, now: float) -> int:
        """Return how many watchers have everything, those that have left with it counted."""
        known = self.live(now) + [watcher for watcher in list(self.watchers.values()) if watcher.has_left]
        return sum(watcher.position == self.next - 1 and not watcher.lost for watcher in known)

    def waited(self, since: float, now: float) -> None:
        """Take note that send() has waited, in one thread or in several at the same time."""
        worked = max(0.0, since - self._waited_until)
        waited = now - max(since, self._waited_until)
        self._may_wait = min(self._may_wait + worked, self.GRACE) - waited
        self._waited_until = now
        for watcher in self.live(now):
            if watcher.send_limit < self.sent:
                watcher.waited += waited
        self.limit_sending(now)

    def limit_sending(self, now: float) -> None:
        """Set `send_limit`: the least of those of the watchers that are waited for, or what is sent before a look."""
        live = self.live(now)
        may_wait = self._may_wait + now - self._waited_until >= self.LEAST_WAIT
        limits = [it.send_limit for it in live if self._patient or may_wait and it.waited < self.QUARTER]
        if not live and now < self.opened_at + self.FIRST_ANSWER:
            limits = [self.FIRST_FLIGHT]
        self.send_limit = min([self.sent + self.UNHEARD, *limits])

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
        asked = list(islice(chain.from_iterable(known), 512))
        hold = 0.004 + len(asked) * 0.0001
        if len(self._repaired) > 8192:
            self._repaired.clear()
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


class ReceiveWindow:
    """One stream as it arrives: puts it in order, once each, and knows what is missing (RFC 3208, section 2.1).

    Pure: `now` is seconds of any clock that only goes forward, `jitter` returns a number from 0 to 1, an item may
    be anything. The first one wanted is `start`: 1 for all of the stream that can still be had. At most `reach`
    missing datagrams are asked for at a time. Datagrams lost (given up), repaired and duplicate are added to `counts`,
    and bytes held back to "held", which several windows may share. What the sender could not repair any more when it
    was first heard is not lost.
    """

    MAX_HELD = 8 << 20  # bytes that all windows hold back while something before them is missing
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
        if not self._trail and self.next < trail <= lead + 1:  # it was gone before we came
            self.next = min([trail, *self._held])
            self.end = max(self.end, trail)
        self._trail = max(self._trail, trail)
        self._expect(lead, now)
        items = self._deliver(now)
        if self.next < self.end:
            self.nak_at = min(self.nak_at, now + self.NAK_RETRY[0])  # the sender listens; after a goodbye not for long
        return items

    def missing(self, now: float) -> Ranges:
        """Return what to send a NAK for now."""
        if now < self.nak_at:
            return []
        ranges, reach = [], self.reach
        for first, last in islice(self._gaps(), MAX_RANGES):
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
        for seq in [*sorted(self._held), self.end]:
            if seq > first:
                yield first, seq - 1
            first = seq + 1

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
    known, rest = dict(options), parts.path[1:] or parts.fragment
    interface, ttl = known.get("interface", "127.0.0.1" if is_group(host) else ""), known.get("ttl", "0")
    for wrong, message in (
        (parts.scheme != "udp", f"scheme is {parts.scheme!r}, expected 'udp'"),
        ("@" in parts.netloc, "a user or password stands in it, expected none"),
        (not is_host(host), f"host is {host!r}, expected an IPv4 address or a name"),
        (not port, f"port is {port}, expected 1 to 65535"),
        (rest, f"path or fragment is {rest!r}, expected none"),
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
    return socket.inet_aton(url.host) + bytes(4) + socket.if_nametoindex(url.interface).to_bytes(4, sys.byteorder)


class Socket:
    """A UDP `socket` that never blocks: it sends as `url` says or, if it `listens`, receives what is sent there.

    A program may close descriptors that are not its own, and get a file with the number of one: that is left alone.
    """

    def __init__(self, url: Url, listens: bool = False) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)  # of gevent, say, which may come after us
        self._inode = self._look_up_inode()
        self.fileno, self.sendto, self.recvfrom = self.socket.fileno, self.socket.sendto, self.socket.recvfrom
        try:
            self._set_up(self.socket, url, listens)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _set_up(sock: socket.socket, url: Url, listens: bool) -> None:
        level = socket.IPPROTO_IP
        sock.setblocking(False)
        if is_group(url.host):
            group = membership(url)
            sock.setsockopt(level, socket.IP_MULTICAST_IF, group[4:] if len(group) == 8 else group)
            sock.setsockopt(level, socket.IP_MULTICAST_TTL, url.ttl)
        elif url.ttl:
            sock.setsockopt(level, socket.IP_TTL, url.ttl)
        if not listens:
            return sock.bind((url.interface if is_address(url.interface) else "", 0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        if not is_group(url.host):
            return sock.bind((url.host, url.port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # beside others on this machine
        if sys.platform == "linux":
            sock.setsockopt(level, 49, 0)  # IP_MULTICAST_ALL: hear only what this socket has joined
        elif hasattr(socket, "SO_REUSEPORT"):  # BSD wants it; Linux would share out
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("" if sys.platform == "win32" else url.host, url.port))
        sock.setsockopt(level, socket.IP_ADD_MEMBERSHIP, group)

    def _look_up_inode(self) -> int:
        """Return what tells the socket from another file with its descriptor; -1 if the descriptor is closed."""
        try:
            return os.fstat(self.socket.fileno()).st_ino if sys.platform != "win32" else 0
        except OSError:
            return -1

    def is_ours(self) -> bool:
        """Whether the socket is open, and no file of the program has got its descriptor."""
        return self._look_up_inode() == self._inode

    def close(self) -> None:
        """Close the socket, but never a file of the program."""
        self.socket.close() if self.is_ours() else self.socket.detach()

    def __del__(self) -> None:
        if "_inode" in vars(self):  # else it could not be opened
            self.close()


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
        if not any(events & select.POLLNVAL for _, events in poll.poll(seconds * 1000)):
            return
    except (OSError, ValueError):
        pass
    time.sleep(min(seconds, 0.05))  # somebody has closed it, and whoever waits is to look why


def unread_at(url: Url) -> int:
    """Return how many bytes this machine's listeners at the port of `url` have not read; 0 if the system does not tell."""
    try:
        with open("/proc/net/udp", "rb") as table:  # of Linux: proc(5)
            address = int.from_bytes(socket.inet_aton(url.host), sys.byteorder)
            rows = [line.split() for line in table if b" %08X:%04X 00000000:0000" % (address, url.port) in line]
        return sum(int(row[4].split(b":")[1], 16) for row in rows)
    except (OSError, ValueError, IndexError):
        return 0


class Link(Socket):
    """A Dispatcher's socket: sends to `target`, and receives what watchers answer."""

    def __init__(self, url: Url) -> None:
        host = url.host.encode()  # a str would load a codec, at which a fork in another thread hangs the child
        found = socket.getaddrinfo(host, url.port, socket.AF_INET, socket.SOCK_DGRAM)
        super().__init__(url)  # only now: the error that tells of no such name keeps all that is here
        self.target: Source = str(found[0][4][0]), url.port
        self.broken = False  # an error says that another socket may do better
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_LOOPBACK * 4)  # macOS: also the largest one


# --- Dispatcher ---------------------------------------------------------------------------------------------------

OURS = frozenset(("type", "timestamp", "hostname", "pid", "utcoffset", "clock"))  # fields that a Dispatcher adds
# Errors that another socket would not mend.
PASSING = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.EPERM, errno.EACCES, errno.EMSGSIZE, errno.ECONNREFUSED)

# Of the events of a type: what we add, their JSON and frame, to be filled in, if they are held, how long the rest may be.
Form = namedtuple("Form", ["ours", "template", "frame", "buffered", "room"])

_ticks = count(1)  # the Lamport clock of this process (Communications of the ACM 21:7, 1978)


def set_clock_past(clock: int) -> None:
    """Set this process's Lamport clock past one that was received."""
    global _ticks
    if next(_ticks) <= clock < 1 << 62:
        _ticks = count(clock + 1)


CLOSE_TIME = 2.9  # the longest that a close() waits for watchers: its 3 s, less the goodbye
_dispatchers: WeakSet[Any] = WeakSet()
_exit_by = inf  # once the interpreter exits: when all of them are to be closed
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
    global _exit_by
    _exit_by = time.monotonic() + CLOSE_TIME
    for dispatcher in list(_dispatchers):
        try:
            dispatcher.close()
        except Exception:  # noqa: BLE001 - of a callback, which must not keep the others open
            sys.excepthook(*sys.exc_info())


atexit.register(at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=after_fork)


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
        self._groups, self._buffered = frozenset(groups or ()), frozenset(buffer_group)
        again = partial(type(self), url, hostname, enabled=enabled, groups=self._groups, buffer_group=self._buffered)
        self._again = partial(again, buffer_limit=buffer_limit, freq=freq, key=key, max_wait=max_wait, max_repr=max_repr)
        self.url = url_from(url)
        self.enabled = False
        self.on_enabled: set[Callable[[], object]] = set()
        self.on_disabled: set[Callable[[], object]] = set()
        self.max_repr = int(max_repr)
        self._url = parse_url(self.url)
        self._room = (MAX_LOOPBACK if on_loopback(self._url) else MAX_DATAGRAM) - MAX_HEADER
        self._name = hostname
        self._buffer_limit = max(1, buffer_limit)
        self._freq = freq
        self._key = key_from(key)
        self._max_wait = max_wait
        self._closed = False
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
        self._outbox: deque[bytes] = deque()  # events that are to be sent, by whoever has the lock
        self._part: tuple[int, int] | None = None  # the name and next index of a large event, of which some is sent
        self._window = TransmitWindow(patient=self._max_wait if self._max_wait >= 1 else 0.0)
        self._stream = b"" if self._closed else os.urandom(8).hex().encode()  # b"" once it has ended
        self._head = head_of(b"data", self._stream)
        self._outbox_events = self._outbox_datagrams = 0  # that were sent from there; others have a datagram each
        self._refused = 0  # datagrams that the kernel did not take when they were new
        self._counts = {"repairs": 0, "errors": 0, "rejected": 0}
        self._link: Link | None = None
        self._finalizer: Any = None
        self._started = self._resolving = self._close_soon = False
        self._beaten_at = self._reopen_at = self._checked_at = -inf
        self._work_at = inf
        self._active = self._processed = 0
        self._forms: dict[str, Form] = {}  # by type

    @property
    def stats(self) -> dict[str, int]:
        """Counts: events, their datagrams, repairs among these, errors of the network, rejected answers, live watchers.

        `behind` is how many of these lack something: it is not confirmed yet, or they gave it up.
        """
        lacking, lead = self.lacking(time.monotonic()), self._window.next - 1
        events = lead - self._outbox_datagrams + self._outbox_events + len(self._outbox)
        counts = {"events": events, "datagrams": lead - self._refused + self._counts["repairs"], **self._counts}
        return {**counts, "watchers": len(lacking), "behind": sum(map(bool, lacking))}

    def lacking(self, now: float = -inf) -> list[int]:
        """Return for each watcher, unless it has left or is dead by `now`, how many datagrams it has not confirmed or gave up."""
        live, lead = self._window.live(now), self._window.next - 1
        return [lead - watcher.position + watcher.lost for watcher in live]

    def watchers(self) -> list[Source]:
        """Return where each live watcher answers from."""
        return [watcher.address for watcher in self._window.live(time.monotonic()) if watcher.address]

    def send(self, /, type: str, blind: bool = False, **fields: Any) -> Event | None:
        """Send an event and return it, or None if disabled or not of `groups`.

        Adds hostname, pid, utcoffset and, unless `blind`, clock, where `fields` does not have them. ValueError
        for a type that is not a non-empty str, an event over 16 MiB as JSON, and a closed Dispatcher.
        """
        if not _fork_mark[0]:
            after_fork()
        if blind or type.__class__ is not str or type not in self._forms or not OURS.isdisjoint(fields):
            return self._send(type, fields, blind)
        # What _send() does, in two thirds of the time: most of the JSON is known already.
        comma, rest = b"," if fields else b"", format_json(fields)[1:]
        form = self._forms.get(type) or self._look_up(type)  # only now, since somebody's repr() may fork
        if form is None:
            return None
        ours, template, frame, buffered, room = form
        now, clock = time.time_ns() // 1000, next(_ticks)
        event = new_event(Event)
        event.update(ours)
        event["timestamp"] = now / 1e6
        event["clock"] = clock
        event.update(fields)
        window = self._window
        if buffered or self._outbox or len(rest) > room or window.sent > window.send_limit or self._is_inside():
            self._post(template % (now // 1000000, now % 1000000, clock, comma, rest), buffered)
            return event
        with self._lock:
            data = frame % (window.next, now // 1000000, now % 1000000, clock, comma, rest)
            window.add(data)
            if not self._transmit(data):
                self._refused += 1
        if self._outbox:  # of a signal handler meanwhile
            self._send_outbox()
        return event

    def publish(self, event: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Forward a ready event as it is, and return it, or None; errors as in send()."""
        form = self._look_up(event.get("type"))
        if form:
            self._post(format_json(dict(event)), form.buffered)
        return event if form else None

    def flush(self, timeout: float = 1.0) -> int:
        """Send what is buffered and wait until every live watcher has confirmed everything, or `timeout` seconds.

        Returns how many watchers have every event; one that gave an event up does not count. A Dispatcher that is new,
        or knows of no watcher, gives them a fifth of a second to speak up, or 3 s on this machine while they have not read.
        """
        if not _fork_mark[0]:
            after_fork()
        self._send_outbox()
        with self._lock:
            self._start()
        self._settle(timeout, patience=0.2, stall=max(SILENCE, self._max_wait))
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
            self._forms = {}
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
                self._settle(min(CLOSE_TIME, _exit_by - time.monotonic()), patience=0.04, stall=0.2)
                self._end()

    def __enter__(self) -> Dispatcher:  # noqa: PYI034 - typing.Self is younger than Python 3.9
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Dispatcher {self.hostname} to {self.url}>"

    def __reduce__(self) -> Any:
        return self._again, ()  # pickled or copied, it is a new one

    # From here on: an event on its way to the kernel.

    def _send(self, type: str, fields: Mapping[str, Any], blind: bool = False, hold: bool = False) -> Event | None:
        form = self._look_up(type)
        if form is None:
            return None
        ours = {**form.ours, "timestamp": time.time(), "clock": next(_ticks)}
        if blind:
            del ours["clock"]
        event = Event(type, {**ours, **fields})
        self._post(format_json(event), form.buffered or hold)
        return event

    def _look_up(self, type: Any) -> Form | None:
        """Return the form of the events of a type; None if they are not sent."""
        if not _fork_mark[0]:
            after_fork()
        form = self._forms.get(type) if isinstance(type, str) else None  # the thread may empty the table at any time
        if form:
            return form
        group = Event(type).group
        if self._closed:
            self._refuse()
        if not self.enabled or self._groups and group not in self._groups:
            return None
        with self._lock:
            self._start()
        ours = {"type": type, "timestamp": 0.0, "hostname": self.hostname, "pid": self.pid}
        ours.update(utcoffset=-time.localtime().tm_gmtoff / 3600, clock=0)  # hours, west is positive: as Celery has it
        told = format_json({key: ours[key] for key in ("hostname", "pid", "utcoffset")})[1:-1]
        words = [text.replace(b"%", b"%%") for text in (format_json(type), told)]
        template = b'{"type":%b,"timestamp":%%d.%%06d,%b,"clock":%%d%%b%%b' % tuple(words)
        room = self._room - len(template) - MAX_HEADER
        frame, buffered = self._head + b"%d\n" + template, group in self._buffered
        form = Form(ours, template, frame, buffered, room)
        if len(self._forms) < 200 and len(type) <= 100:
            self._forms[type] = form
        return form

    def _refuse(self) -> None:
        if _exit_by == inf:  # else a thread that outlives the program has nobody to tell
            raise ValueError("the dispatcher is closed")

    def _post(self, body: bytes, buffered: bool) -> None:
        """Put an event into the outbox, and send it unless it is to be held."""
        if len(body) > MAX_EVENT:
            raise ValueError(f"event of {len(body):,} bytes as JSON, expected at most {MAX_EVENT:,}")
        self._outbox.append(body)
        if not (buffered and len(self._outbox) < self._buffer_limit and not self._closed):
            self._send_outbox()

    def _send_outbox(self) -> None:
        """Send what is in the outbox, in turn with other threads; first wait while a watcher has no room.

        A signal handler, or a __del__, that has interrupted a send leaves this to the send.
        """
        window, deadline = self._window, time.monotonic() + self._max_wait
        since = inf  # when a wait began
        while not self._is_inside():
            with self._lock:  # whoever has it may have taken our event, which is in the kernel when we get it
                now = time.monotonic()
                if since < now:
                    window.waited(since, now)
                    self._ask_for_acks(now)
                if window.sent > window.send_limit:
                    self._listen(now)
                if self._outbox and not self._stream:
                    return self._refuse()  # and leave there what other threads are to be told of, too
                must_wait = window.sent > window.send_limit and now < deadline
                if self._outbox and not must_wait:
                    self._send_datagram()
            if not self._outbox:  # now also nothing of a signal handler that came while we had the lock
                return
            since = now if must_wait else inf
            if must_wait:
                time.sleep(min(0.002, deadline - now))

    def _send_datagram(self) -> None:
        """Number, keep and send as much of the outbox as a datagram takes."""
        window, size = self._window, 0
        seq = window.next
        bodies: list[bytes] = []
        try:
            while self._outbox and len(bodies) < self._buffer_limit:
                size += len(self._outbox[0]) + 2
                if size > self._room:
                    break
                bodies.append(self._outbox.popleft())
            if bodies:
                body = b"[%b]" % b",".join(bodies) if len(bodies) > 1 else bodies[0]
                frame, events = self._head + b"%d\n%b" % (seq, body), len(bodies)
            else:
                frame, events = self._next_part(seq)
            window.add(frame)
        except BaseException:  # of a signal handler, say
            if window.next == seq:
                self._outbox.extendleft(reversed(bodies))
            raise
        self._outbox_events += events
        self._outbox_datagrams += 1
        self._refused += not self._transmit(frame)

    def _next_part(self, seq: int) -> tuple[bytes, int]:
        """Return a frame with the next part of a large event, and how many events that completes.

        The event is the first in the outbox; its name is the sequence number of its first part.
        """
        body, (event, index) = self._outbox[0], self._part or (seq, 0)
        total, piece = ceil(len(body) / self._room), body[index * self._room : (index + 1) * self._room]
        is_last = index + 1 == total
        self._part = None if is_last else (event, index + 1)
        self._window.history = HISTORY + 2 * len(body)  # so that it can be repaired, and the one before
        if is_last:
            self._outbox.popleft()
        return format_frame(b"part", self._stream, (seq, event, index, total), piece), int(is_last)

    def _transmit(self, frame: bytes, to: Source | None = None) -> bool:
        """Give the kernel a datagram, for all or for one watcher; what it does not take now is repaired later."""
        link = self._link
        if link is None:
            if not self._stream:
                self._refuse()
            self._counts["errors"] += not self._resolving
            return False
        try:
            now = time.monotonic()
            if now > self._checked_at + 0.001:  # to look each time would cost a third of the send
                if not link.is_ours():
                    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
                self._checked_at = now
            link.sendto(seal(frame, self._key) if self._key else frame, to or link.target)
        except OSError as problem:
            if problem.errno is None:  # a TimeoutError, say, of a signal handler
                raise
            link.broken = link.broken or problem.errno not in PASSING
            self._count_error(problem)
            return False
        return True

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
            threading.Thread(target=self._serve, name="eventmon", daemon=True).start()
        except RuntimeError:  # no more threads, as at the exit of the interpreter, or in a subinterpreter
            if self._resolving:
                self._connect()
        util = sys.modules.get("multiprocessing.util")
        if util:  # whose processes end without atexit
            self._finalizer = util.Finalize(None, self.close, exitpriority=0)

    def _connect(self) -> None:
        """Open a link, in the place of one that is broken."""
        stream, self._reopen_at = self._stream, time.monotonic() + 1.0
        try:
            link = Link(self._url)
        except (OSError, UnicodeError) as problem:
            self._resolving = False
            return self._count_error(problem)
        with self._lock:
            if self._stream is not stream:  # forked, or closed, in the meantime
                return link.close()
            old, self._link, self._resolving = self._link, link, False
            now = time.monotonic()
            if old:
                old.close()
            else:
                self._window.opened_at = self._window.advanced_at = now
                for frame in self._window.repairs([(1, self._window.next)], TransmitWindow.FIRST_FLIGHT, now):
                    self._counts["repairs"] += self._transmit(frame)
            self._beat(b"beat", now)

    def _beat(self, kind: bytes, now: float) -> None:
        """Say what has been sent: to all, and to each watcher that is behind, whose buffer for all may be full.

        That goes on for a minute after a watcher was heard: a stopped one that goes on is to know what it has lost.
        """
        self._beaten_at = now
        lead = self._window.next - 1
        frame = format_frame(kind, self._stream, (lead, self._window.trail), process_name(self.pid, self.hostname))
        self._transmit(frame)
        for watcher in list(self._window.watchers.values()):
            if watcher.position < lead and not watcher.has_left and now - watcher.heard < 60:
                self._transmit(frame, watcher.address)

    # Listening to watchers.

    def _listen(self, now: float) -> None:
        """Take the answers that have arrived."""
        for _ in range(16 if self._link and self._link.is_ours() else 0):
            try:
                data, source = self._link.recvfrom(65536)  # type: ignore[union-attr]
            except OSError:  # none; or a watcher is gone (ICMP; 10054 on Windows)
                break
            self._on_answer(data, source, now)
        self._window.limit_sending(now)

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
            known = window.watchers.get(name)
            if serial and known and serial <= known.serial:
                raise Replay("an answer seen before")
            watcher = window.on_ack(name, position, room, lost, taken, now)
        except WireError as problem:
            self._counts["rejected"] += 1
            self.problem = problem
            return
        watcher.address, watcher.serial, watcher.has_left = source, serial, frame.kind == b"leave"
        if any(first < window.trail for first, _ in ranges) and now >= self._beaten_at + 0.05:
            self._beat(b"beat", now)  # tells what cannot be had any more
        for repair in window.repairs(ranges, room, now):
            self._counts["repairs"] += self._transmit(repair)

    def _ask_for_acks(self, now: float, is_behind: bool = True) -> None:
        """Ask watchers where they are: the longer those that are behind do not advance, the less often."""
        advanced_at = self._window.advanced_at if is_behind else now - 0.02
        if now >= max(self._beaten_at, advanced_at) + min(0.08, max(0.01, (now - advanced_at) / 2)):
            self._beat(b"beat", now)

    def _settle(self, timeout: float, patience: float, stall: float) -> None:
        """Wait until every live watcher has confirmed everything, or `timeout` seconds.

        While none is live, watchers have `patience` seconds to speak up, and so have others while the stream is new. Those
        that are behind are waited for until none of them has advanced for `stall` seconds. So is an unknown one on this
        machine that has not read all that has arrived: the stream's first datagrams may be among it.
        """
        start = now = read_at = time.monotonic()
        window, pause, unread = self._window, 0.001, 0
        while not self._is_inside() and (self._link or self._resolving):
            with self._lock:
                self._listen(now)
                live = window.live(now)
                is_behind = any(watcher.position < window.next - 1 for watcher in live)
                before, unread = unread, 0 if window.watchers else unread_at(self._url)
                if unread < before:
                    read_at = now
                if is_behind or unread or not self._link:
                    end = max(read_at, window.advanced_at) + stall
                else:
                    end = max(window.opened_at, -inf if live else read_at) + patience
                end = min(end, start + timeout)
                if now >= end:
                    return
                self._ask_for_acks(now, is_behind)
            time.sleep(min(pause, end - now))  # meanwhile the thread listens
            now, pause = time.monotonic(), min(2 * pause, 0.05)

    def _end(self) -> None:
        """Say that this was all until every live watcher has answered, for 50 ms at most, and end the stream."""
        for attempt in range(25):  # since nobody asks for a bye again
            with self._lock:
                now = time.monotonic()
                if not self._link or attempt > 2 and not self._window.live(now):
                    break
                self._beat(b"bye", now)
                self._listen(now)
            time.sleep(0.002)
        with self._lock:
            if self._link:
                self._link.close()
            elif self._window.next > 1:  # no name was found in time
                self._counts["errors"] += 1
            self._link, self._stream = None, b""
        if self._finalizer:
            self._finalizer.cancel()

    # The thread.

    def _serve(self) -> None:
        """Answer watchers, beat, and send what is due, until the stream ends."""
        stream = self._stream
        while self._stream is stream:
            try:
                self._wait()
                if self._close_soon:
                    return self.close()
                now = time.monotonic()
                with self._lock:
                    self._listen(now)
                    if now >= self._beaten_at + BEAT and self._stream:
                        self._forms = {}  # the clock may have been put forward for the summer
                        self._beat(b"beat", now)
                if self._outbox and self._stream:
                    self._send_outbox()
                if self._freq and now >= self._work_at:
                    self._work_at = now + self._freq
                    if self.enabled:
                        self._send_worker("worker-heartbeat")
            except Exception as problem:  # noqa: BLE001 - whatever it is, the Dispatcher is not to fall silent
                self._count_error(problem)
                time.sleep(BEAT)

    def _wait(self) -> None:
        """Wait until something is to be done, with a link that works, if one can be had."""
        now, link = time.monotonic(), self._link
        if link and link.is_ours() and not link.broken:
            due = min(self._beaten_at + BEAT, self._work_at, now + (0.05 if self._buffered else BEAT))
            wait_for(due - now, link)
        elif now >= self._reopen_at:
            self._connect()
        else:
            time.sleep(0.05)

    # The worker and its tasks.

    def begin_task(self, uuid: str, fields: Mapping[str, Any]) -> None:
        """Send task-received, with `fields`, and task-started, together in a datagram; errors as in send()."""
        self._send("task-received", {"uuid": uuid, **fields}, hold=True)
        self._send("task-started", {"uuid": uuid})
        with self._lock:
            self._active += 1

    def end_task(self, type: str, uuid: str, outcome: Mapping[str, Any]) -> None:
        """Send how a task ended; never raises."""
        with self._lock:
            self._active = max(0, self._active - 1)  # in the child of a fork ends what began in the parent
            self._processed += 1
        self._send_quietly(type, {"uuid": uuid, **outcome})

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


# --- Task, LogHandler ---------------------------------------------------------------------------------------------

MAX_FRAMES = 50  # of a traceback, the innermost: to format all of a deep recursion would take seconds
_current_task: ContextVar[Task | None] = ContextVar("eventmon_task", default=None)  # the last one that began here
_logging: ContextVar[bool] = ContextVar("eventmon_logging", default=False)  # whether a LogHandler is at work


def start_of_value(value: Any, limit: int, left: Iterator[int]) -> Any:
    """Return a copy of a value that takes no more items than are `left`, nor characters of a text than `limit`."""
    kind = type(value)
    if kind in (str, bytes):
        return value[:limit]
    if kind is dict:
        items = zip(value.items(), left)
        return {start_of_value(key, limit, left): start_of_value(item, limit, left) for (key, item), _ in items}
    if kind in (list, tuple, set):
        return kind(start_of_value(item, limit, left) for item, _ in zip(value, left))
    return value


def cut(text: str, limit: int) -> str:
    """Return text that is visibly cut where it has more than `limit` characters."""
    return text if len(text) <= limit else text[: max(0, limit - 1)] + "…"


def shortened(value: Any, limit: int = MAX_REPR) -> str:
    """Return the repr of a value, visibly cut where it has more than `limit` characters; no more of it is made."""
    with suppress(Exception):  # a value inside itself, or one that another thread changes
        value = start_of_value(value, limit, iter(range(limit)))
    return cut(readable(value), limit)


OUR_FUNCTIONS = ("in_task", "in_task_async", "in_task_generator", "in_task_async_generator", "__enter__", "reserve")
OUR_FRAMES = {(cut.__code__.co_filename, name) for name in OUR_FUNCTIONS}


def traceback_of(problem: BaseException, is_nested: bool = False) -> str:
    """Return the end of an exception's traceback, 65,536 characters at most, without our frames.

    One that is cut is the same in the task around a nested one: the exception takes it along.
    """
    import traceback

    try:
        text: str = vars(problem).pop("_eventmon", "")
        if text:
            vars(problem).update({"_eventmon": text} if is_nested else {})
            return text
        report: Any = traceback.TracebackException(type(problem), problem, None, limit=-MAX_FRAMES)
        frames = deque(traceback.walk_tb(problem.__traceback__), MAX_FRAMES)
        report.stack = traceback.StackSummary.extract(iter(frames), lookup_lines=False)  # without columns, which cost most
        reports = [report]
        for each in reports:
            each.stack[:] = (frame for frame in each.stack if (frame.filename, frame.name) not in OUR_FRAMES)
            causes = each.__cause__, each.__context__, *(getattr(each, "exceptions", None) or ())
            reports += filter(None, causes)
        text = "".join(report.format())[-65536:]
        if is_nested and len(frames) == MAX_FRAMES:
            vars(problem)["_eventmon"] = text
        return text
    except Exception:  # noqa: BLE001 - of an exception of the user's, which may be anything
        return readable(problem)


def reserve(calls: int) -> None:
    """Raise RecursionError, without these frames, unless the stack has room for so many calls."""
    try:
        if calls:
            reserve(calls - 1)
    except RecursionError as problem:
        raise problem.with_traceback(None) from None


class Task:
    """One task, or by way of a decorated function one at each call; made by Dispatcher.task().

    As a context manager it sends task-received and task-started, then task-succeeded (runtime, in seconds),
    task-failed (exception, traceback, runtime) or, after retried(), task-retried, and lets the exception pass. A
    decorated function, coroutine function, generator function (also an async one) or method adds args, kwargs and
    result, each cut at the Dispatcher's `max_repr` characters of repr; a generator is a task from its first value to
    its last, or until it is closed. A task that begins while others run in the same context (see contextvars) has the
    innermost as parent_id, and its root_id; but a generator is nobody's parent. `uuid` is its name among all tasks.
    """

    def __init__(self, dispatcher: Any, name: str, uuid: str | None, fields: Mapping[str, Any]) -> None:
        from uuid import uuid4

        self.name = name
        self.uuid = self.root_id = uuid or str(uuid4())
        self._dispatcher, self._given, self._fields = dispatcher, uuid, fields
        self._outer: Task | None = None  # the one in which this one began

    @staticmethod
    def running(task: Task | None) -> Task | None:
        """Return a task or, if it has ended, the innermost one around it that has not."""
        while task and task._ended:
            task = task._outer
        return task

    def progress(self, fraction: Any, **fields: Any) -> None:
        """Send task-progress: `fraction` of the work, any number from 0 to 1, is done."""
        with suppress(Exception):  # what is no number is sent as it is
            fraction = float(fraction)
        self._dispatcher.send("task-progress", uuid=self.uuid, progress=fraction, **fields)

    def retried(self, exception: BaseException | None = None) -> None:
        """Say that this attempt failed and another follows: the task ends with task-retried, however it ends."""
        self._type, self._outcome = "task-retried", self._failure(exception)

    def __enter__(self) -> Task:  # noqa: PYI034 - typing.Self is younger than Python 3.9
        reserve(40)  # calls that the end of a task may need
        outer = self.running(_current_task.get())
        parent_id, root_id = (outer.uuid, outer.root_id) if outer else (None, self.uuid)
        fields: dict[str, Any] = {"name": self.name, "args": "()", "kwargs": "{}", "retries": 0}
        fields.update({"parent_id": parent_id, "root_id": root_id, **self._fields})
        self._dispatcher.begin_task(self.uuid, fields)
        self.root_id, self._outer, self._ended = fields["root_id"], outer, False
        self._start, self._type, self._outcome = time.monotonic(), "", {}
        _current_task.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: object) -> None:
        outer, self._outer, self._ended = self._outer, None, True
        self._outer = self.running(outer)  # so that no chain of ended ones grows
        if _current_task.get() is self:  # else another one has begun since, or this is another context
            _current_task.set(self._outer)
        failure = {} if kind is GeneratorExit else self._failure(problem)  # a generator has been closed
        type = self._type or ("task-failed" if failure else "task-succeeded")
        outcome = {"runtime": time.monotonic() - self._start, **failure, **self._outcome}
        self._dispatcher.end_task(type, self.uuid, outcome)

    def _failure(self, problem: BaseException | None) -> dict[str, str]:
        """Return what is told of an exception, if there is one."""
        if problem is None or not self._dispatcher.enabled:
            return {}
        return {"exception": self._brief(problem), "traceback": traceback_of(problem, self._outer is not None)}

    def _brief(self, value: Any) -> str:
        return shortened(value, self._dispatcher.max_repr) if self._dispatcher.enabled else ""

    def _call(self, args: Any, kwargs: Any) -> Task:
        """Return the task of one call of a decorated function."""
        fields = {"args": self._brief(args), "kwargs": self._brief(kwargs), **self._fields}
        return Task(self._dispatcher, self.name, self._given, fields)

    def _returned(self, result: Any) -> Any:
        self._outcome["result"] = self._brief(result)
        return result

    def __call__(self, function: Function) -> Function:
        """Decorate a function, coroutine function, generator function or method."""
        import inspect

        body: Any = function
        if isinstance(body, (classmethod, staticmethod)):
            return type(body)(self(body.__func__))  # type: ignore[return-value]
        if not callable(body):
            raise TypeError(f"a task is {readable(body)}, expected a function")

        def in_task(*args: Any, **kwargs: Any) -> Any:
            with self._call(args, kwargs) as task:
                return task._returned(body(*args, **kwargs))

        async def in_task_async(*args: Any, **kwargs: Any) -> Any:
            with self._call(args, kwargs) as task:
                return task._returned(await body(*args, **kwargs))

        def in_task_generator(*args: Any, **kwargs: Any) -> Any:
            with self._call(args, kwargs) as task:
                _current_task.set(task._outer)  # whoever takes the values is not inside
                return task._returned((yield from body(*args, **kwargs)))

        async def in_task_async_generator(*args: Any, **kwargs: Any) -> Any:
            with self._call(args, kwargs) as task:
                _current_task.set(task._outer)
                generator, hooks = body(*args, **kwargs), sys.get_asyncgen_hooks()
                sys.set_asyncgen_hooks(None, None)  # at its end the event loop closes this one, and this one the other
                step = generator.__anext__()
                sys.set_asyncgen_hooks(*hooks)
                with suppress(StopAsyncIteration):
                    while True:
                        item = await step
                        try:
                            step = generator.asend((yield item))
                        except BaseException as problem:  # noqa: BLE001 - for the generator to see
                            step = generator.athrow(problem)

        kinds: Any = (
            (inspect.isasyncgenfunction, in_task_async_generator),
            (inspect.isgeneratorfunction, in_task_generator),
            (inspect.iscoroutinefunction, in_task_async),
        )
        forms = body, type(body).__call__  # that of an object may be of any kind
        wrap: Any = next((wrap for is_kind, wrap in kinds if any(map(is_kind, forms))), in_task)
        return wraps(function)(wrap)  # type: ignore[return-value]


def __getattr__(name: str) -> Any:
    """Make the class LogHandler when it is asked for: importing logging costs more than all the rest."""
    if name != "LogHandler":
        raise AttributeError(f"module 'eventmon' has no attribute {name!r}")
    import logging

    class LogHandler(logging.NullHandler):  # which has no lock: a send() could wait for it, and it cannot be pickled
        """Sends log records as events: "log-warning" with logger, message, the running task's uuid, exception, traceback.

        Takes the Dispatcher. Never raises, and never loops: what is logged while it makes an event is not sent.
        """

        __qualname__ = "LogHandler"

        def __init__(self, dispatcher: Dispatcher) -> None:
            super().__init__()
            self.dispatcher = dispatcher

        def handle(self, record: Any) -> Any:
            """Send the record if the filters let it pass."""
            found = self.filter(record)
            if found:
                self.emit(found if isinstance(found, logging.LogRecord) else record)
            return found

        def emit(self, record: logging.LogRecord) -> None:
            """Send the record."""
            if _logging.get():
                return
            _logging.set(True)
            try:
                fields: Any = {"timestamp": record.created, "logger": record.name, "message": record.getMessage()}
                task, problem = Task.running(_current_task.get()), record.exc_info and record.exc_info[1]
                if task:
                    fields["uuid"] = task.uuid
                if problem:
                    fields.update(exception=shortened(problem), traceback=traceback_of(problem, "uuid" in fields))
                with suppress(ValueError):  # closed, or too large
                    self.dispatcher.send(f"log-{record.levelname.lower()}", **fields)
            except Exception:  # noqa: BLE001 - as in logging's own handlers
                with suppress(Exception):  # there may be no standard error to tell of it
                    self.handleError(record)
            finally:
                _logging.set(False)

    return globals().setdefault(name, LogHandler)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # for pydoc


# --- Receiver -----------------------------------------------------------------------------------------------------


class Stream:
    """One stream as a Receiver follows it."""

    __slots__ = ("head", "heard_at", "is_leaving", "is_lost", "is_worker", "process", "serial", "source", "window")

    def __init__(self, name: bytes, source: Source, window: ReceiveWindow, now: float) -> None:
        self.head = head_of(b"data", name)
        self.source = source
        self.window = window
        self.heard_at = now
        self.process = b""  # PID HOSTNAME, as a beat tells; before the first one, as an event does
        self.is_worker = False  # an event of a task or a worker has come from this process, and it is not offline
        self.is_leaving = False  # has said goodbye
        self.is_lost = False
        self.serial = 0  # the highest, with a key


class Receiver:
    """Hears what Dispatchers, and anyone's bare JSON datagrams, send to `url`.

    `handlers` maps event types to callables that take an Event; "*" gets what has no handler of its own. `key` is as
    in Dispatcher. ValueError for a bad url; OSError when the socket cannot be opened, at first use. Set
    `should_stop` to end a capture, from a handler or another thread. One thread at a time may receive. `problem` says
    why something was rejected last; None if nothing was. `closed` counts how often close() was called.
    """

    MAX_STREAMS = 4096
    MAX_JOINED = 24 << 20  # bytes of the pieces of all events that arrive in parts
    MAX_QUEUED = 16 << 20  # bytes read and not delivered yet, from which on no more is read
    MAX_READ = 128  # datagrams that are read at a time
    MAX_AHEAD = 10_000  # that are read before more is delivered, so that senders soon hear of a watcher that is behind
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
        self.closed = 0
        self.problem: WireError | None = None
        self.name = int.from_bytes(os.urandom(7), "big")
        self._url = parse_url(self.url)
        self._key = key_from(key)
        self._random = random.random
        self._channel: Socket | None = None
        self._answers: Socket | None = None  # sends acks and NAKs, hears beats for us alone
        self._space = BUFFER  # what the channel's buffer holds
        self._counts = Counter(events=0, lost=0, repaired=0, duplicates=0, malformed=0, rejected=0, held=0)
        self._streams: OrderedDict[bytes, Stream] = OrderedDict()  # silent longest first
        self._displaced: dict[bytes, int] = {}  # streams not followed any more -> what comes next
        self._crowded_until = -inf  # until then a stream that is not known may be one of which we have forgotten this
        self._history = True
        self._taken = 0  # datagrams
        # The windows' clock stands still while datagrams wait unread, among which what a window misses may be.
        self._clock = 0.0
        self._moved_at = time.monotonic()  # when it was last put forward
        self._read_since = 0  # bytes of the buffer that have been read since then
        self._heard_at = self._look_due = 0.0  # by this clock: the last datagram, and when to see who is silent
        self._gapped: dict[Stream, None] = {}  # streams of which something is missing
        self._unconfirmed: dict[Stream, None] = {}
        self._ack_due = inf  # when they are confirmed
        self._senders = 1  # that send at the same time
        self._pieces: dict[tuple[Stream, int], list[bytes]] = {}  # of events that arrive in parts, the oldest first
        self._joined = 0  # bytes of all pieces
        self._queue: deque[tuple[Any, Any]] = deque()  # (body, stream or None); a str is what we say of the stream
        self._queued = 0  # bytes of them
        self._ready: deque[Event] = deque()

    @property
    def stats(self) -> dict[str, int]:
        """Counts: events; datagrams lost, repaired, duplicates, malformed, rejected; streams followed."""
        counts = {name: self._counts[name] for name in self._counts if name != "held"}
        return {**counts, "streams": len(self._streams)}

    @property
    def channel(self) -> socket.socket:
        """The socket that listens, not blocking; opened, and the group joined, when first asked for."""
        return (self._channel or self._open()).socket

    def _open(self) -> Socket:
        for old in filter(None, (self._channel, self._answers)):
            old.close()
        channel = answers = Socket(self._url, listens=True)
        if is_group(self._url.host) or on_loopback(self._url):  # else a firewall lets answers pass from there alone
            answers = Socket(self._url)
        self._space = channel.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        self._channel, self._answers = channel, answers
        return channel

    def fileno(self) -> int:
        """The channel's file descriptor, for a select() of your own."""
        return self.channel.fileno()

    def close(self) -> None:
        """Confirm what has come and close the channel, which ends a capture; the next one opens it again."""
        self.closed += 1
        channel, self._channel = self._channel, None
        if channel:
            for stream in list(self._streams.values()):
                self._answer(stream, b"leave")
            for sock in filter(None, (channel, self._answers)):
                sock.close()

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
        left = inf if limit is None else limit
        patience = inf if timeout is None else timeout
        read_at = last = time.monotonic()
        found = 0
        self.fileno()
        try:
            while not self.should_stop and left > 0:
                if self._ready:
                    yield self._ready.popleft()
                    left -= 1
                    last = time.monotonic()
                    if last < read_at + self.ACK_DELAY / 2:  # else reading goes first: a sender may wait for it
                        continue
                elif not self._queue:
                    if self._channel is None:
                        return
                    self._wait(min(patience, last + patience - time.monotonic()), is_busy=found > 16)
                found = self._read_all()
                read_at = time.monotonic()
                if not self._ready:
                    self._parse()
                    # whoever does not want to wait reads what is no event for 20 ms at most
                    if not self._ready and read_at >= last + (max(patience, 0.02) if found else patience):
                        return
        finally:
            self._confirm()  # the caller turns to other things

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
        self._move_clock(now, inf)
        self._accept(data, source, now)
        if now >= self._ack_due:
            self._confirm()
        while self._queue:
            self._parse()
        events = list(self._ready)
        self._ready.clear()
        return events

    def pause(self, longest: float) -> float:
        """Return for how many seconds, at most `longest`, nothing is to be delivered, confirmed or asked for."""
        if self._ready or self._queue:
            return 0.0
        return max(0.0, min(longest, self._ack_due - time.monotonic(), 0.002 if self._gapped else longest))

    # From here on: a datagram on its way to an event.

    def _wait(self, patience: float, is_busy: bool) -> None:
        """Wait for a datagram; when busy, let some gather: to be woken for each would cost more than all the rest."""
        if is_busy:
            time.sleep(max(0.0, min(patience, 0.0005)))
        elif patience > 0:
            wait_for(max(0.0005, min(patience, self.pause(MAX_SLEEP))), *filter(None, [self._channel]))

    def _read_all(self) -> int:
        """Take what has arrived; return how many datagrams."""
        taken, end = self._taken, self._taken + self.MAX_AHEAD
        while self._queued <= self.MAX_QUEUED and self._taken < end and not self._read():
            pass
        return self._taken - taken

    def _read(self) -> bool:
        """Take at most MAX_READ datagrams, and do what is due; return whether no more has arrived."""
        channel, now, taken = self._channel, time.monotonic(), self._taken
        is_empty = channel is None or not self._is_intact()
        try:
            for _ in range(0 if is_empty else self.MAX_READ):
                data, source = channel.recvfrom(65536)  # type: ignore[union-attr]
                self._read_since += len(data) + DATAGRAM_COST
                self._accept(data, source, now)
        except OSError:  # nothing more; closed; or, on Windows, an answer of ours found nobody
            is_empty = True
        found = self._taken > taken
        if is_empty or self._read_since > 2 * self._space:  # surely more than it held when the clock last moved
            self._move_clock(time.monotonic(), MAX_SLEEP)
        if found:
            self._heard_at = self._clock
            self._read_aside(now)
        if time.monotonic() >= self._ack_due:
            self._confirm()
        return is_empty

    def _read_aside(self, now: float) -> None:
        """Take beats sent to this watcher alone, whose buffer for what is sent to all may have been full."""
        with suppress(OSError):
            for _ in range(self.MAX_READ if self._answers is not self._channel else 0):
                data, source = self._answers.recvfrom(65536)  # type: ignore[union-attr]
                if data.startswith((b"EM2 beat ", b"EM2 bye ")):
                    self._accept(data, source, now)

    def _move_clock(self, now: float, most: float) -> None:
        """Put the windows' clock forward, by `most` seconds at most: in the rest this process stood still itself."""
        self._clock += min(now - self._moved_at, most)
        self._moved_at = now
        self._read_since = 0
        if self._gapped:
            self._mend()
        if self._clock >= self._look_due:
            self._look_due = self._clock + BEAT
            self._look_around()

    def _look_around(self) -> None:
        """Tell who has fallen silent and who is heard again; open sockets anew where that helps."""
        for stream in self._streams.values():
            is_silent = self._clock > stream.heard_at + SILENCE
            if is_silent != stream.is_lost:
                stream.is_lost = is_silent
                self._enqueue("worker-lost" if is_silent else "worker-online", stream)
        channel = self._channel
        with suppress(OSError):  # no network now; or all is as it should be
            if channel and self._is_intact():
                if not is_group(self._url.host) or self._clock < self._heard_at + 1.0:
                    return
                channel.socket.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership(self._url))  # or it is there
            if self._channel:  # somebody else has closed it, or its interface has gone and come again
                self._open()

    def _is_intact(self) -> bool:
        """Whether the sockets are open, and no file of the program has got the descriptor of one."""
        return all(sock is not None and sock.is_ours() for sock in (self._channel, self._answers))

    def _accept(self, data: bytes, source: Source, now: float) -> None:
        """Queue what a datagram makes deliverable; count it if it is bad."""
        self._taken += 1
        stream = None if self._key else self._streams.get(data[NAME])
        if stream and stream.source == source and data.startswith(stream.head):  # as nearly always
            start = len(stream.head)
            end = data.find(b"\n", start, start + 20)
            digits = data[start:end]
            if end > 0 and digits.isdigit():
                stream.heard_at = self._clock
                return self._on_data(stream, int(digits), data[end + 1 :], len(data), now)
        try:
            self._receive(data, source, now)
        except WireError as problem:
            self._counts[problem.counted] += 1
            if isinstance(problem, Rejected):
                self.problem = problem
            if isinstance(problem, Skewed):
                self._tell_time(data, source)

    def _receive(self, data: bytes, source: Source, now: float) -> None:
        if data[:2] != b"EM":
            if self._key:
                raise Rejected("bare JSON, expected a frame sealed with the key")
            return self._enqueue(data, None)
        data, serial = unseal(data, self._key)
        frame = parse_frame(data)
        if frame.kind in (b"ack", b"nak", b"leave"):
            raise WireError(f"an {frame.kind.decode()}, expected what a sender sends")
        stream = self._streams.get(frame.stream) or self._follow(frame, source, now)
        is_new = not self._key or serial > stream.serial
        if stream.source != source and not self._key and self._clock < stream.heard_at + 2 * BEAT:
            # A name proves nothing without a key. A sender that has moved is believed when its old place is silent.
            raise Rejected(f"stream {frame.stream.decode()} comes from {source}, expected {stream.source}")
        if is_new:
            stream.source, stream.heard_at, stream.serial = source, self._clock, serial
        if frame.kind in (b"data", b"part"):
            item = frame.body if frame.kind == b"data" else frame
            return self._on_data(stream, frame.numbers[0], item, len(data), now)
        if not is_new:
            raise Replay("a beat seen before")
        self._streams.move_to_end(frame.stream)
        self._answer(stream, b"ack")
        if re.match(rb"[0-9]{1,9} ", frame.body) and frame.body != stream.process:
            stream.process, stream.is_worker = frame.body[:1000], False
        stream.is_leaving = frame.kind == b"bye"
        lead, trail = frame.numbers
        self._deliver(stream, stream.window.announce(lead, trail, self._clock))

    def _on_data(self, stream: Stream, seq: int, item: bytes | Frame, size: int, now: float) -> None:
        """Take a datagram of a stream: the body of an event or several, or the frame of a part of one."""
        if stream not in self._unconfirmed:
            self._unconfirmed[stream] = None
            self._ack_due = min(self._ack_due, now + self.ACK_DELAY * (1 + self._senders // 8))
        if type(item) is bytes and stream.window.in_order(seq):
            self._enqueue(item, stream)
        else:
            self._deliver(stream, stream.window.receive(seq, item, size + DATAGRAM_COST, self._clock))

    def _tell_time(self, data: bytes, source: Source) -> None:
        """Answer a beat with our own time, so that its sender learns that the clocks differ."""
        _, kind, name, _ = data.split(b" ", 3)
        if kind == b"beat" and self._answers:
            with suppress(OSError):
                self._answers.sendto(seal(format_frame(b"leave", name, (0, 0, 0, 0, 0)), self._key), source)

    def _follow(self, frame: Frame, source: Source, now: float) -> Stream:
        """Begin to follow a stream: from the start of what can be had, or from now; again, from where it was."""
        if len(self._streams) >= self.MAX_STREAMS:
            name, oldest = self._streams.popitem(last=False)
            self._displaced[name] = oldest.window.end
            if len(self._displaced) > 16 * self.MAX_STREAMS:
                del self._displaced[next(iter(self._displaced))]
                self._crowded_until = now + 60
            self._unconfirmed.pop(oldest, None)
            self._gapped.pop(oldest, None)
            self._counts["held"] -= oldest.window.size
            self._counts["lost"] += oldest.window.end - oldest.window.next
        has_history = self._history and now > self._crowded_until
        start = 1 if has_history else frame.numbers[0] + (frame.kind in (b"beat", b"bye"))
        start = self._displaced.pop(frame.stream, start)
        window = ReceiveWindow(start, self._clock, self._random, self._counts)
        stream = self._streams[frame.stream] = Stream(frame.stream, source, window, self._clock)
        self._ack_due = now
        return stream

    # Answers.

    def _confirm(self) -> None:
        """Tell all that have sent something what has come."""
        self._senders = max(1, self._senders - 1, len(self._unconfirmed))
        for stream in self._unconfirmed:
            self._answer(stream, b"ack")
        self._unconfirmed.clear()
        self._ack_due = inf

    def _mend(self) -> None:
        """Ask for what is missing, and give up what is beyond repair; 64 streams at a time, in turns."""
        reach = max(16, self._space // (4 * DATAGRAM_COST) // len(self._gapped))
        for stream in list(islice(self._gapped, 64)):
            window = stream.window
            window.reach = reach
            del self._gapped[stream]
            self._deliver(stream, window.overdue(self._clock))  # which puts it behind the others
            ranges = window.missing(self._clock)
            if ranges:
                self._answer(stream, b"nak", format_ranges(ranges))

    def _answer(self, stream: Stream, kind: bytes, body: bytes = b"") -> None:
        """Send what has come of a stream, and its share of the room for more, if there is a socket to send it with."""
        window = stream.window
        room = min(self._space // 2, ROOM) // self._senders
        room += min(window.size, HISTORY // 4)  # held back: it has left the buffer, but can be repaired
        numbers = window.next - 1, self.name, room, window.lost, self._taken
        if self._answers:
            answer = seal(format_frame(kind, stream.head[NAME], numbers, body), self._key)
            with suppress(OSError):  # as good as lost on the way: what matters is asked again
                self._answers.sendto(answer, stream.source)

    # Delivery.

    def _deliver(self, stream: Stream, items: list[Any]) -> None:
        """Queue what is in order, and look after the stream if something is missing."""
        for item in items:
            body = item if type(item) is bytes else self._join(stream, item)
            if body:
                self._enqueue(body, stream)
        if stream.window.next < stream.window.end:
            self._gapped[stream] = None
        elif stream.is_leaving:
            self._enqueue("worker-offline", stream)
            self._answer(stream, b"leave")

    def _join(self, stream: Stream, frame: Frame) -> bytes:
        """Add a piece to an event that arrives in parts; return the event with its last one, else nothing."""
        (_, event, index, total), piece = frame.numbers, frame.body
        is_object = index > 0 or piece[:1] == b"{"  # the many events of an array would take too much memory
        if not (is_object and index < total <= MAX_EVENT // 1024 and (len(piece) >= 1024 or index + 1 == total)):
            self._counts["malformed"] += 1
            return b""
        key = stream, event
        pieces = self._pieces.setdefault(key, [])
        if len(pieces) != index:  # something was given up, or we came in the middle
            self._drop_pieces(key)
            return b""
        pieces.append(piece)
        self._joined += len(piece)
        while self._joined + 4096 * len(self._pieces) > self.MAX_JOINED:  # what dead senders began goes first
            self._drop_pieces(next(iter(self._pieces)))
        if index + 1 < total:
            return b""
        body = b"".join(self._pieces.pop(key, ()))
        self._joined -= len(body)
        return body

    def _drop_pieces(self, key: tuple[Stream, int]) -> None:
        """Give up an event of which parts have come."""
        pieces = self._pieces.pop(key)
        key[0].window.lost += len(pieces)
        self._counts["lost"] += len(pieces)
        self._joined -= sum(map(len, pieces))

    def _enqueue(self, body: bytes | str, stream: Stream | None) -> None:
        self._queue.append((body, stream))
        self._queued += len(body) + 64

    def _parse(self) -> None:
        """Make events of what is in the queue; of no more than is soon delivered, since they take more memory."""
        size, now, clock = 0, time.time(), 0
        while self._queue and size < 65536:
            body, stream = self._queue.popleft()
            size += len(body) + 64
            try:
                events = parse_events(body) if type(body) is bytes else self._say_of(stream, body)
            except WireError:
                self._counts["malformed"] += 1
                continue
            for event in events:
                event["local_received"] = now
                if type(tick := event.get("clock")) is int and tick > clock:
                    clock = tick
                if stream and (not stream.is_worker or event["type"] == "worker-offline"):
                    self._look_for_worker(stream, event)
            self._counts["events"] += len(events)
            self._ready += events
        self._queued -= size
        set_clock_past(clock)

    def _look_for_worker(self, stream: Stream, event: Event) -> None:
        """Note whether the stream's own process works on tasks: its sender may forward the events of others."""
        if event["type"].startswith(("task-", "worker-")) and type(event.get("pid")) is int:
            process = process_name(event["pid"], event.get("hostname"))
            stream.process = stream.process or process
            if process == stream.process:
                stream.is_worker = event["type"] != "worker-offline"

    def _say_of(self, stream: Stream, kind: str) -> list[Event]:
        """Return the event by which we tell of a worker's process that it has ended, is lost, or is back."""
        pid, _, hostname = stream.process.decode("utf-8", "replace").partition(" ")
        return [Event(kind, hostname=hostname, pid=int(pid), local=True)] if stream.is_worker else []


# --- State: pure but for the clock, where none is given -----------------------------------------------------------

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
ENDED = FINISHED | {"RETRY"}  # how a delivery ends
WAITING = frozenset(("PENDING", "RECEIVED", "RETRY"))
NOT_RUNNING = FINISHED | WAITING
METHODS = {
    type: type.replace("-", "_")
    for type in (*TASK_STATES, "worker-online", "worker-heartbeat", "worker-offline", "worker-lost")
}

TIMES = frozenset(type[5:] for type in TASK_STATES)  # a task shows the latest transition of that name
OWN = frozenset(("state", "timestamp", "clock", "began", "worker", "pid", "progress", "result", "runtime"))  # of the newest
NOT_FIELDS = TIMES | {  # keys of an event that do not become a task's as they are
    *("type", "timestamp", "hostname", "pid", "utcoffset", "local_received"),
    *("uuid", "state", "worker", "client", "children", "began"),
}
NOT_SENT = NOT_FIELDS | {"progress", "result", "runtime", "exception", "traceback"}  # and no task-sent tells these
NOT_WORKERS = frozenset(("type", "hostname", "heard", "local_received", "status", "clock_offset", "pid"))
TASK_FIELDS = (  # that most tasks have
    ("uuid", "children", "began", "worker", "pid", "timestamp", "state", "clock", "received", "name", "args", "kwargs")
    + ("root_id", "retries", "started", "succeeded", "result", "runtime", "parent_id", "sent", "client", "progress")
    + ("queue", "exchange", "routing_key", "exception", "traceback", "failed", "retried", "expires")
)
USUAL = NOT_FIELDS.union(TASK_FIELDS, ("eta",))
MAX_FIELDS = 60  # of a task or a worker from its events
MAX_NAME = 255  # characters of a uuid, a hostname, or the name of a field
NO_PID = -1


def number(value: Any, default: float) -> float:
    """Return `value` if it is a finite number, or `default`."""
    return value if type(value) in (int, float) and -1e15 < value < 1e15 else default


def id_of(value: Any) -> str:
    """Return a uuid or hostname, "" if it is none."""
    return value if type(value) is str and len(value) <= MAX_NAME else ""


def process_of(event: Mapping[str, Any]) -> tuple[str, float]:
    """Return the (hostname, pid) of an event; "" and NO_PID stand for what it does not say."""
    pid = event.get("pid")
    return id_of(event.get("hostname")), pid if isinstance(pid, (int, float)) else NO_PID


def process_in(told: Mapping[str, Any]) -> tuple[str, float]:
    """Return the (hostname, pid) of a delivery."""
    return told.get("worker", ""), told.get("pid", NO_PID)


def attempt_of(event: Mapping[str, Any]) -> float:
    """Return the `retries` of an event or a delivery, 0 if it does not say."""
    retries = event.get("retries")
    return retries if isinstance(retries, (int, float)) and abs(retries) < 1e15 else 0


# What events of one type, task-..., make of a task: its state, the state's rank, the name of the time that it shows
# ("" if none), and the keys of the events that are not the task's.
Kind = namedtuple("Kind", "state rank time skipped")


@lru_cache(1000)
def kind_of(type: str) -> Kind:
    """Return the kind of events of a type."""
    state = TASK_STATES.get(type) or type[5:].upper()
    skipped = NOT_SENT if type == "task-sent" else NOT_FIELDS
    return Kind(state, RANKS.get(state, CUSTOM_RANK), type[5:] if type in TASK_STATES else "", skipped)


class SharedKeys:
    """Nothing but its vars(), a plain dict: these share one table of keys (PEP 412), so a task takes half as much."""


_shared = SharedKeys()
for _key in TASK_FIELDS:  # all 30 that the table has room for: it would keep those of any event for good
    setattr(_shared, _key, None)


# A delivery is one process getting a task, and a dict of what its events told. What a task-sent tells is such a dict
# too, older than any delivery.


def age_of(told: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what sorts deliveries, the newest last."""
    if "began" not in told:
        return False, attempt_of(told), told["sent"], told.get("client", ""), number(told.get("clock"), -inf)
    return True, attempt_of(told), told["began"], process_in(told)


def advance_of(told: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what sorts what several processes tell of one delivery, the one that got furthest last."""
    state = told["state"]
    return state in ENDED, RANKS.get(state, CUSTOM_RANK), told["timestamp"], process_in(told)


def take_fields(record: dict[str, Any], event: Mapping[str, Any], skipped: Collection[str] = ()) -> None:
    """Put an event's fields into a dict that has room for MAX_FIELDS: null never overwrites."""
    for key, value in event.items():
        if value is None or key in skipped:
            continue
        if key in USUAL or key in record or len(record) < MAX_FIELDS and isinstance(key, str) and len(key) <= MAX_NAME:
            record[key] = value


def take_event(told: dict[str, Any], event: Mapping[str, Any], kind: Kind, timestamp: float) -> None:
    """Let an event change what is told of its delivery: a lower rank does not undo an end."""
    state, rank, time, skipped = kind
    before = told.get("state")
    if before not in FINISHED or rank >= RANKS[before]:
        told["state"] = state
    told["timestamp"] = timestamp
    if time and told.get(time, -inf) < timestamp:
        told[time] = timestamp
    take_fields(told, event, skipped)


def goes_on(told: Mapping[str, Any], event: Mapping[str, Any]) -> bool:
    """Whether an event is of the process and the attempt of a delivery."""
    if event.get("pid") != told.get("pid") or event.get("hostname") != told.get("worker"):
        return False
    retries = event.get("retries")
    return (retries is None or retries == told.get("retries")) and "began" in told


def delivery_for(event: Mapping[str, Any], kind: Kind, deliveries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the one of a task's deliveries, in the order of each process, that an event belongs to; None if it begins one."""
    if kind.time in ("sent", "received"):
        return None
    alone = len(deliveries) == 1 or len(deliveries) == 2 and "began" not in deliveries[0]
    if alone and goes_on(deliveries[-1], event):
        return deliveries[-1]  # as what is below would find, later
    process = process_of(event)
    mine = [told for told in deliveries if "began" in told and process_in(told) == process]
    if isinstance(event.get("retries"), (int, float)):
        unknown = [told for told in mine if "retries" not in told and told["state"] not in ENDED]
        mine = [told for told in mine if attempt_of(told) == attempt_of(event)] or unknown
    waiting = running = None
    for told in mine:
        if told["state"] == "RECEIVED":
            waiting = waiting or told
        elif told["state"] not in ENDED:
            running = told
    return (waiting or running if kind.time == "started" else running or waiting) or (mine[-1] if mine else None)


def grouped(deliveries: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return deliveries oldest first, each with those that joined it, the one that got furthest last.

    A process that never received the task itself joins a delivery of its hostname: the newest that had begun by then.
    """
    ordered = sorted(deliveries, key=age_of)
    if len({told.get("worker") for told in ordered}) == len(ordered):
        return [[told] for told in ordered]
    receivers = {process_in(told) for told in ordered if "received" in told}
    hostnames = {hostname for hostname, _ in receivers if hostname}
    joining = [told for told in ordered if told.get("worker") in hostnames and process_in(told) not in receivers]
    groups = [[told] for told in ordered if not any(told is one for one in joining)]
    for told in joining:
        there = [group for group in groups if group[0].get("worker") == told["worker"] and "received" in group[0]]
        begun = [group for group in there if group[0]["began"] <= told["timestamp"]]
        (begun or there[:1])[-1].append(told)
    return [sorted(group, key=advance_of) for group in groups]


def merged(deliveries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what all deliveries together tell of their task."""
    first, *others = deliveries
    if len(others) == 1 and "began" not in first and "began" in others[0]:  # of Celery's tasks nearly all
        return {key: value for key, value in first.items() if key not in OWN} | others[0]
    groups = grouped(deliveries)
    shown: dict[str, Any] = {}
    for group in groups:
        if group is groups[-1]:
            for key in OWN & shown.keys():
                del shown[key]
        for told in group:
            if "exception" in told or "traceback" in told:  # which belong together
                shown.pop("exception", None)
                shown.pop("traceback", None)
            latest = {key: max(shown[key], told[key]) for key in TIMES & shown.keys() & told.keys()}
            shown.update(told)
            shown.update(latest)
    return shown


def run_time(task: Mapping[str, Any], state: Any, now: float) -> tuple[bool, float]:
    """Return whether a task is lost, and the seconds that it took or has been running by our clock; -1 if none are known."""
    name, until = task["state"], now
    is_lost = name not in FINISHED and state.is_lost(task, now)
    if name in FINISHED:
        runtime, until = number(task.get("runtime"), -1.0), task["timestamp"]
        if runtime >= 0:
            return False, runtime
    elif name in WAITING:
        return is_lost, -1.0
    else:
        worker = state.workers.get(task.get("worker"), {})
        if is_lost:  # it has run until its process, or its worker, was last there
            process, until = state._processes[worker["hostname"]].get(task.get("pid", NO_PID), worker), worker["heard"]
            if process["status"] != "alive" and process.get("local"):  # by our clock
                until = number(process.get("timestamp"), until) - (SILENCE if process["status"] == "lost" else 0.0)
        ahead = worker.get("clock_offset", 0.0)
        until += ahead if abs(ahead) > 15 else 0.0  # below that it may be a late event
    return is_lost, max(0.0, until - task["started"]) if "started" in task else -1.0


def figures(tasks: Sequence[Mapping[str, Any]], state: Any, now: float) -> dict[str, Any]:
    """Return what State.type_stats() tells of the tasks of one name."""
    states = Counter(task["state"] for task in tasks)
    runs = [run_time(task, state, now) for task in tasks]
    running = sum(task["state"] not in NOT_RUNNING and not is_lost for task, (is_lost, _) in zip(tasks, runs))
    times = sorted(seconds for _, seconds in runs if seconds >= 0)
    failures = [(task["timestamp"], task.get("exception")) for task in tasks if task["state"] == "FAILURE"]
    return {
        "running": running,
        "succeeded": states["SUCCESS"],
        "failed": states["FAILURE"],
        "retried": sum("retried" in task for task in tasks),
        "mean": sum(times) / len(times) if times else None,
        "p95": times[ceil(0.95 * len(times)) - 1] if times else None,
        "max": times[-1] if times else None,
        "last": max(task["timestamp"] for task in tasks),
        "error": max(failures, key=lambda failure: failure[0])[1] if failures else None,
    }


def last_word(process: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what sorts the processes of a worker; what the last one says of it, it shows."""
    return process["status"] == "alive", number(process.get("timestamp"), -inf), process.get("pid", NO_PID)


def describe_attempt(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what State.attempts() tells of a delivery."""
    keys = ("worker", "pid", "retries", "state", "received", "started", "exception", "traceback")
    ends = [told.get(type[5:], told["timestamp"]) for type, state in TASK_STATES.items() if state == told["state"] in ENDED]
    return {**{key: told.get(key) for key in keys}, "ended": ends[0] if ends else None}


FLAT = frozenset((str, int, float, bool, type(None)))
SHORT_TEXT = 40  # characters of a text that is not weighed
FURTHER = 4096  # bytes that count for a task's third delivery, a worker's second process, and so on: short texts, too
LONG_NUMBER = 1 << 64
LARGE = 4096  # bytes of an event of which a copy is kept, and of a text that is forgotten when all takes too much
NESTED = 1000  # characters of JSON of a nested value that is kept as such text, which takes less
MAX_STATE = 96 << 20  # bytes of what is weighed; the rest, which is short, takes less than as much again
FORGOTTEN = "(forgotten: State was full)"


def size_of(event: Mapping[str, Any]) -> int:
    """Return how many bytes of an event are worth counting; more than LARGE if a value is nested or a long number."""
    size = 0 if USUAL.issuperset(event) else sum(map(sys.getsizeof, chain(event, event.values())))
    for value in event.values():
        kind = type(value)
        if kind is str:
            if len(value) > SHORT_TEXT:
                size += sys.getsizeof(value)
        elif kind is int:
            if not -LONG_NUMBER < value < LONG_NUMBER:
                return LARGE + 1
        elif kind not in FLAT:
            return LARGE + 1
    return size


def compact(event: Mapping[str, Any]) -> Event:
    """Return what is kept of an event that may be large."""
    copy = new_event(Event)
    for key in (*islice(event, 2 * MAX_FIELDS), *NOT_FIELDS & event.keys()):
        if not isinstance(key, str) or len(key) > MAX_NAME:
            continue
        value = event[key]
        if type(value) not in FLAT:
            text = format_json(value).decode()
            value = text if len(text) > NESTED else json.loads(text)
        copy[key] = value
    return copy


def bytes_of(value: Any) -> int:
    """Return about how many bytes a value takes with all that is in it."""
    size, rest = 0, [value]
    while rest:
        value = rest.pop()
        size += sys.getsizeof(value, LARGE)
        if isinstance(value, (dict, list, tuple)):
            rest += [*value, *value.values()] if isinstance(value, dict) else value
    return size


GRAPH_TICK = 0.25  # the finest column of State.scale_graph
GRAPH_TICKS = 3600  # a quarter of an hour of them
MAX_TYPE = 100  # characters of an event type that tell it from others
MAX_TYPES = 40  # event types counted apart in a tick; the others are counted together
MAX_RECENT = 1000  # events kept in State.recent, and in State.notes
MAX_CHANGED = 1000  # tasks that events have changed until State.tasks is brought up to date
MAX_DELIVERIES = 32  # of a task
MAX_PROCESSES = 32  # of a worker
LISTS = {"SUCCESS": 0, "FAILURE": 1, "REVOKED": 1, "REJECTED": 1, "PENDING": 2}  # tasks to forget first, by state
ACTIVE = 3  # the list of all others
NO_CHILDREN: list[str] = []  # of every task that has none: replaced, never changed
RECORDED_AFTER = 10.0  # an event that was received longer ago is from a recording


def taking(type: str, summary: str) -> Callable[[Any, Mapping[str, Any]], None]:
    """Return a method of State that takes events of this type."""
    kind = kind_of(type)

    def take(self: State, event: Mapping[str, Any]) -> None:
        """Let the event change its task."""
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
    events were seen, `task_count` tasks received, `evicted` tasks and events' large values forgotten for want of room.
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
        self.workers: dict[str, dict[str, Any]] = {}
        self.recent: deque[Mapping[str, Any]] = deque(maxlen=MAX_RECENT)
        self.notes: deque[Mapping[str, Any]] = deque(maxlen=MAX_RECENT)
        self.event_count = self.task_count = self._evicted = 0
        self._tasks: dict[str, dict[str, Any]] = {}  # the latest event's last; a task of one delivery is the dict of that
        self._changed: dict[str, tuple[Any, str]] = {}  # uuid -> state and parent that `tasks` still shows, see _refresh()
        self._lists: tuple[dict[str, None], ...] = ({}, {}, {}, {})  # of uuids, in the order in which they are forgotten
        self._deliveries: dict[str, list[dict[str, Any]]] = {}  # uuid -> all, of tasks that had several
        self._children: dict[str, list[str]] = {}  # uuid of a parent, known or not -> its children, sorted
        self._processes: dict[str, dict[float, dict[str, Any]]] = {}  # hostname -> pid -> status and fields, of workers
        self._gone: set[str] = set()  # hostnames with a process that is not alive
        self._last: dict[str, Mapping[str, Any]] = {}  # hostname -> its last event
        self._weight = 0  # bytes that came since _slim() counted what is kept, and those
        self._graph: dict[int, Counter[str]] = {}  # tick -> type -> events
        self._began = time.time() - time.monotonic()
        self._read_clock({})
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

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """Return uuid -> dict of every task in memory, the one that something new was heard of last is the last.

        After events, read it anew: what was returned before is not brought up to date.
        """
        with self._lock:
            if self._changed:
                self._refresh()
            return self._tasks

    @property
    def evicted(self) -> int:
        """Return how many tasks, and large values of events, were forgotten for want of room."""
        with self._lock:
            self._refresh()
            return self._evicted

    def event(self, event: Mapping[str, Any]) -> None:
        """Take an event: count it, call the callback, then the method for its type. Any fields do no harm."""
        with self._lock:
            size, kept = size_of(event), event
            if size:
                if size > LARGE:
                    kept = compact(event)
                    size = bytes_of(kept)
                self._weight += size
            type_name = kept.get("type")
            type_name = type_name[:MAX_TYPE] if type(type_name) is str else ""
            self.event_count += 1
            self.recent.append(kept)
            received = kept.get("local_received")
            if type(received) is not float or not self._tick <= received < self._tick + GRAPH_TICK:
                self._read_clock(kept)
            self._counts[type_name if type_name in self._counts or len(self._counts) < MAX_TYPES else ""] += 1
            if self.callback:
                self.callback(self, event)
            hostname = id_of(kept.get("hostname"))
            if hostname:
                self._last[hostname] = kept
                worker = self.workers.get(hostname)
                if worker is None or worker["heard"] != self._heard or hostname in self._gone:
                    self._hear(hostname, kept, type_name)
            method = METHODS.get(type_name)
            if method:
                getattr(self, method)(kept)
            elif type_name.startswith("task-"):
                self._task(kept, kind_of(type_name))
            else:
                self.notes.append(kept)
            if self._weight > MAX_STATE:
                self._slim()

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
        self._set_status(event, "alive")

    def worker_heartbeat(self, event: Mapping[str, Any]) -> None:
        """A worker is alive."""
        self._set_status(event, "alive")

    def worker_offline(self, event: Mapping[str, Any]) -> None:
        """A worker has said goodbye: it has ended."""
        self.notes.append(event)
        self._set_status(event, "ended")

    def worker_lost(self, event: Mapping[str, Any]) -> None:
        """A worker has fallen silent without a goodbye: it is lost."""
        self.notes.append(event)
        self._set_status(event, "lost")

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
            self._refresh()
            return [describe_attempt(merged(group)) for group in grouped(self._told(uuid)) if "began" in group[0]]

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

        running (the lost are not), succeeded, failed, retried: how many; mean, p95, max: seconds that they took or have
        been running (the lost until their worker was last heard); last: the latest timestamp; error: the exception of
        the latest failure. None stands for what is not known.
        """
        now = self.now() if now is None else now
        by_name: dict[str, list[dict[str, Any]]] = {}
        with self._lock:
            for task in self.tasks.values():
                name = task.get("name")
                if isinstance(name, str):
                    by_name.setdefault(name, []).append(task)
            return {name: figures(tasks, self, now) for name, tasks in by_name.items()}

    def iteractive(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (uuid, task) of the tasks neither finished nor only sent, oldest start first."""
        with self._lock:
            tasks = self.tasks
            active = [(uuid, tasks[uuid]) for uuid in self._lists[ACTIVE]]
        return iter(sorted(active, key=lambda item: item[1].get("started", item[1]["timestamp"])))

    def last_worker_event(self, hostname: str | None = None) -> Mapping[str, Any] | None:
        """Return the last event from a worker, or from any; None if there was none."""
        with self._lock:
            if hostname is not None:
                return self._last.get(hostname)
            return next((event for event in reversed(self.recent) if process_of(event)[0] in self._last), None)

    def is_alive(self, worker: Mapping[str, Any], now: float | None = None) -> bool:
        """Whether a worker is neither lost nor ended, nor silent for twice the `freq` of its heartbeats."""
        if worker["status"] != "alive":
            return False
        freq = number(worker.get("freq"), 0.0)
        return freq <= 0 or (self.now() if now is None else now) - worker["heard"] <= 2 * freq

    def is_lost(self, task: Mapping[str, Any], now: float | None = None) -> bool:
        """Whether a task has not finished, and its worker, or its process of that, is no longer alive."""
        worker = self.workers.get(task.get("worker", ""))
        if worker is None or task["state"] in FINISHED:
            return False
        process = self._processes.get(worker["hostname"], {}).get(task.get("pid", NO_PID), worker)
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
        columns = [0] * max(0, width)
        if not columns or not 0 < span < inf:
            return columns
        now, wanted = self.now() if now is None else now, None if types is None else frozenset(types)
        last = int(now / GRAPH_TICK)
        first = max(int((now - span) / GRAPH_TICK), last - GRAPH_TICKS)
        with self._lock:
            for tick in range(first, last + 1):
                counts = self._graph.get(tick)
                if counts:
                    column = int((1 - (now - (tick + 0.5) * GRAPH_TICK) / span) * width)
                    events = counts.values() if wanted is None else map(counts.get, wanted, repeat(0))
                    columns[min(max(column, 0), width - 1)] += sum(events)
        return columns

    # Forgetting.

    def clear(self, ready: bool = True) -> None:
        """Forget workers, event_count, task_count, and the tasks; of these, with `ready`, the finished only."""
        with self._lock:
            self.clear_tasks(ready)
            for known in (self.workers, self._processes, self._gone, self._last):
                known.clear()
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

    def _read_clock(self, event: Mapping[str, Any]) -> None:
        """Read the clock, and let events be counted in the tick of that time, until one was received in another."""
        wall = time.time()
        received = number(event.get("local_received"), number(event.get("timestamp"), wall) if self.recorded else wall)
        self._tick = int(received / GRAPH_TICK) * GRAPH_TICK
        self._past = self.recorded or abs(received - wall) > RECORDED_AFTER
        self._heard = received if self._past else self._began + time.monotonic()
        self._counts = self._graph.setdefault(int(self._heard / GRAPH_TICK), Counter())
        if len(self._graph) > GRAPH_TICKS:
            del self._graph[next(iter(self._graph))]

    def _hear(self, hostname: str, event: Mapping[str, Any], type_name: str) -> None:
        """Note when a worker was heard, and how far its clock was ahead. Whoever speaks is alive again."""
        if len(self._last) > 2 * self.max_workers_in_memory:  # many at a time: to find the first takes long
            many = len(self._last) - max(0, self.max_workers_in_memory)
            self._last = dict(islice(self._last.items(), many, None))
        worker = self.workers.get(hostname)
        if worker is None or event.get("local"):
            return
        self._set_clock(worker, event)
        process = self._processes[hostname].get(process_of(event)[1])
        if process and process["status"] != "alive" and type_name != "worker-offline":
            self._set_status(event, "alive")

    def _set_clock(self, worker: dict[str, Any], event: Mapping[str, Any]) -> None:
        worker["heard"] = self._heard
        ahead = number(event.get("timestamp"), inf) - number(event.get("local_received"), inf)
        worker["clock_offset"] = number(ahead, 0.0)

    def _set_status(self, event: Mapping[str, Any], status: str) -> None:
        """Give a process of a worker a status, and the fields of a worker's event.

        A worker shows the status and fields of its processes: of one that is alive, and told something last.
        """
        hostname, pid = process_of(event)
        if not hostname:
            return
        worker = self.workers.pop(hostname, None) or self._new_worker(hostname, event)
        self.workers[hostname] = worker  # now the last to be forgotten
        before, processes = worker["status"], self._processes[hostname]
        if pid not in processes and len(processes) >= MAX_PROCESSES:
            del processes[next(iter(processes))]
        self._weight += FURTHER if processes and pid not in processes else 0
        process = processes.setdefault(pid, {} if pid == NO_PID else {"pid": pid})
        for one in processes.values() if pid == NO_PID and status != "alive" else (process,):
            one["status"] = status
        type_name = str(event.get("type"))
        if type_name.startswith("worker-"):
            take_fields(process, event, NOT_WORKERS)
        gone = any(one["status"] != "alive" for one in processes.values())
        (self._gone.add if gone else self._gone.discard)(hostname)
        speakers = [one for one in processes.values() if one.get("sw_ident", "eventmon") != "eventmon"]
        if speakers:  # a worker of Celery's speaks for the processes of its pool, which never say goodbye
            speakers = [one for one in processes.values() if "sw_ident" in one]
        for one in sorted(speakers or processes.values(), key=last_word):
            take_fields(worker, one)
        if self.on_node_join and worker["status"] == "alive" and (before != "alive" or type_name == "worker-online"):
            self.on_node_join(worker)
        if self.on_node_leave and worker["status"] != "alive" and before in ("alive", ""):
            self.on_node_leave(worker)

    def _new_worker(self, hostname: str, event: Mapping[str, Any]) -> dict[str, Any]:
        while len(self.workers) >= max(1, self.max_workers_in_memory):
            gone = next(iter(self.workers))
            del self.workers[gone], self._processes[gone]
            self._gone.discard(gone)
        worker = {"hostname": hostname, "status": ""}
        self._processes[hostname] = {}
        self._set_clock(worker, event)
        return worker

    def _task(self, event: Mapping[str, Any], kind: Kind) -> None:
        """Let an event change what is told of its task; _refresh() does the rest."""
        uuid = id_of(event.get("uuid"))
        if not uuid:
            return
        timestamp = event.get("timestamp")
        if type(timestamp) is not float or not -1e15 < timestamp < 1e15:
            timestamp = number(timestamp, number(event.get("local_received"), time.time()))
        if len(self._changed) >= MAX_CHANGED:
            self._refresh()
        told = delivery_for(event, kind, self._told(uuid)) or self._begin(uuid, event, kind, timestamp)
        task = self._tasks[uuid]
        uuid = task["uuid"]  # the same str everywhere
        before = self._changed.pop(uuid, None)
        self._changed[uuid] = before or (task.get("state"), id_of(task.get("parent_id")))
        take_event(told, event, kind, timestamp)

    def _told(self, uuid: str) -> list[dict[str, Any]]:
        """Return what was told of a task's deliveries, and by its task-sent; of one not in memory nothing."""
        return self._deliveries.get(uuid) or ([self._tasks[uuid]] if uuid in self._tasks else [])

    def _begin(self, uuid: str, event: Mapping[str, Any], kind: Kind, timestamp: float) -> dict[str, Any]:
        """Return a new delivery, whose process is known as a worker from now on; or what a task-sent tells."""
        hostname, pid = process = process_of(event)
        told = vars(SharedKeys())
        if kind.time == "sent":
            told["sent"] = timestamp
            if hostname:
                told["client"] = hostname
        else:
            if hostname and pid not in self._processes.get(hostname, ()):
                self._set_status(event, "alive")
            mine = [one["began"] for one in self._told(uuid) if "began" in one and process_in(one) == process]
            told["began"] = max([timestamp, *mine])  # in the order of the process, too
            if hostname:
                told["worker"] = self.workers.get(hostname, event)["hostname"]  # a callback may have cleared all
            if pid != NO_PID:
                told["pid"] = pid
        if uuid in self._tasks:
            deliveries = self._deliveries[uuid] = self._told(uuid)
            if len(deliveries) >= MAX_DELIVERIES:
                deliveries.remove(min(deliveries, key=age_of))
            deliveries.append(told)
            self._weight += FURTHER if len(deliveries) > 2 else 0
        else:
            told["uuid"], told["children"] = uuid, self._children.get(uuid, NO_CHILDREN)
            self._tasks[uuid] = told
        return told

    def _refresh(self) -> None:
        """Bring `tasks` up to date with what has been told of deliveries, and forget what is too much."""
        changed, self._changed = self._changed, {}
        for uuid, (before, parent) in changed.items():
            task = self._tasks.pop(uuid)
            if uuid in self._deliveries:
                task = vars(SharedKeys())
                task.update(merged(self._deliveries[uuid]))
                task["uuid"], task["children"] = uuid, self._children.get(uuid, NO_CHILDREN)
            self._tasks[uuid] = task  # now the last
            if task["state"] != before:
                self._lists[LISTS.get(before, ACTIVE)].pop(uuid, None)
                self._lists[LISTS.get(task["state"], ACTIVE)][uuid] = None
            if task["state"] in FINISHED:  # have what is equal in other tasks but once
                if task.get("root_id") == uuid:
                    task["root_id"] = uuid
                for key in ("name", "kwargs"):
                    if type(task.get(key)) is str and len(task[key]) <= MAX_NAME:
                        task[key] = sys.intern(task[key])
            told_parent = id_of(task.get("parent_id"))
            if told_parent != parent:
                self._disown(uuid, parent)
                self._adopt(uuid, told_parent)
        self._evict(len(self._tasks) - max(1, self.max_tasks_in_memory))

    def _adopt(self, uuid: str, parent: str) -> None:
        """Enter a task among the children of its parent, whether that is known yet or not."""
        if parent:
            children = self._children.setdefault(parent, [])
            insort(children, uuid)
            if parent in self._tasks:
                self._tasks[parent]["children"] = children

    def _disown(self, uuid: str, parent: str) -> None:
        """Enter a task no longer among its parent's children."""
        if parent:
            children = self._children[parent]
            del children[bisect_left(children, uuid)]
            if not children:
                del self._children[parent]
                if parent in self._tasks:
                    self._tasks[parent]["children"] = NO_CHILDREN

    def _evict(self, many: int) -> None:
        """Forget the oldest successful tasks, else finished ones, else those only sent, else any."""
        for uuid in list(islice(chain(*self._lists), max(0, many))):  # all at once: to find the first takes long
            self._forget(uuid)
            self._evicted += 1

    def _forget(self, uuid: str) -> None:
        task = self._tasks.pop(uuid)
        del self._lists[LISTS.get(task["state"], ACTIVE)][uuid]
        self._disown(uuid, id_of(task.get("parent_id")))
        self._deliveries.pop(uuid, None)

    def _slim(self) -> None:
        """Count the bytes of all that is kept. If they are too many, forget large texts, else half of the tasks, else all."""
        self._refresh()
        records: list[Any] = [*chain(*self._deliveries.values()), *self._tasks.values(), *self.workers.values()]
        records += chain(*map(dict.values, self._processes.values()), self._last.values(), self.notes, self.recent)
        records = list({id(record): record for record in records}.values())
        values = {id(value): value for record in records for value in record.values()}
        self._weight = sum(map(sys.getsizeof, records)) + sum(map(bytes_of, values.values()))
        if self._weight <= MAX_STATE * 3 // 4:
            return
        places: dict[int, list[tuple[Any, str]]] = {}  # of a large text, in the order in which it came
        for record in records:
            for key, value in record.items():
                if type(value) is str and len(value) > LARGE:
                    places.setdefault(id(value), []).append((record, key))
        for text, found in places.items():
            self._weight -= bytes_of(values[text])
            self._evicted += 1
            for record, key in found:
                record[key] = FORGOTTEN
            if self._weight <= MAX_STATE // 2:
                return
        if self._tasks:
            self._evict(len(self._tasks) // 2 + 1)
        else:
            for kept in (self.workers, self._processes, self._gone, self._last, self.notes, self.recent):
                kept.clear()


# --- the screen: pure, from State and View to lines of styled text ------------------------------------------------

# All that is shown is a sheet: rows to move in, of a table (tasks, names, workers, events) or of a panel about one thing.
# The cursor is where a row leads to; if it leads nowhere, or that row is gone, what is now at its index.
Span = namedtuple("Span", "text style action", defaults=("", ""))  # a style of LOOKS; what a click does, as in KEYS
Row = namedtuple("Row", "record link style", defaults=(None, ""))  # link: kind and subject of what Enter opens, or None
Layer = namedtuple(  # an open sheet with its cursor; `order` is the number of the column it is sorted by, of a panel None
    "Layer", "kind subject order cursor index reverse filter", defaults=(None, 0, False, "")
)
View = namedtuple("View", "layers typing frozen done", defaults=((), False, {}, False))  # frozen: fields of Stage then
Stage = namedtuple("Stage", "state height width now status", defaults=({},))  # status: url, empty, lost, rejected, ...

STYLES = {
    word: style
    for style, words in {
        "red": "LOST FAILURE task-failed worker-lost log-error log-critical",
        "cyan": "STARTED PROGRESS task-started task-progress",
        "yellow": "RETRY task-retried log-warning silent",
        "blue": "RECEIVED task-received",
        "dim": "PENDING task-sent worker-heartbeat worker-offline ended log-debug",
        "green": "SUCCESS task-succeeded worker-online alive",
        "magenta": "REVOKED REJECTED task-revoked task-rejected",
    }.items()
    for word in words.split()
}
MAX_DETAIL = 65536  # characters of any value that is shown whole
BARS = " ▁▂▃▄▅▆▇█"
TOLD_FIRST = ("message", "exception", "result", "args", "kwargs")
SHOWN_APART = NOT_FIELDS - {"pid"} | {  # keys of a task, a worker or an event
    *(*TOLD_FIRST, "name", "parent_id", "root_id", "traceback", "stderr"),
    *("heard", "status", "clock", "clock_offset", "local"),
}
HINTS = {
    "table": "q quit  ? keys  enter details  / filter  s sort  space freeze  c clear finished",
    "panel": "esc back  ? keys  enter go there  / find  e events  t traceback",
    "typing": "esc drop  enter keep  words, or state:failure name: worker: type: uuid:",
}
HELP = """\
1 2 3 4, Tab    tasks, names, workers, events
j k, arrows     move; also PgUp PgDn, g G for the ends, the mouse wheel
Enter, i        everything about it; of a name, its tasks
t r e           traceback or result of the task; its events, or the worker's
/               filter as you type; Enter keeps it, Escape drops it:
                resize alpha finds rows with both words, state:failure,retry
                either in that column; so name: worker: type: uuid:
s S             sort by the next column; the other way round
space           freeze the picture; events go on being counted
c               clear what has finished
? ctrl-L        these keys; paint the screen anew
Escape, q       back; from the top, q quits
A click does what the tab, heading or row under it says.
"""

# Text.

_spell = json.JSONEncoder(ensure_ascii=False, default=readable).iterencode


def text_of(value: Any, limit: int) -> str:
    """Return the start of a value as text: a str as it is, "" for None, else JSON."""
    if value is None or isinstance(value, str):
        return (value or "")[:limit]
    try:
        return "".join(islice(_spell(value), limit))[:limit]  # of a large one no more is made than is shown
    except (TypeError, ValueError, RecursionError):
        return text_of(plain(value), limit)  # it has no JSON form


@lru_cache(4096)
def glyph(char: str) -> tuple[str, int]:
    """Return what is shown for a character, and how many cells it takes (Unicode Standard Annex 11)."""
    import unicodedata

    if char in "\u200c\u200d\ufe0e\ufe0f":  # joiners and variation selectors: terminals differ in what they make wide
        return "", 0
    if not char.isprintable():
        return " " if char.isspace() else "?", 1
    if unicodedata.category(char) in ("Mn", "Me") or "\u1160" <= char <= "\u11ff" or "\ud7b0" <= char <= "\ud7fb":
        return char, 0
    return char, 2 if unicodedata.east_asian_width(char) in "WF" else 1


def printable(value: Any, limit: int = 1000) -> str:
    """Return the start of a value as text that does nothing to a terminal but show."""
    text = text_of(value, limit)
    return text if text.isascii() and text.isprintable() else "".join([glyph(char)[0] for char in text])


@lru_cache(1000)
def cells(text: str) -> int:
    """Return how many columns of a terminal printable text takes."""
    return sum([glyph(char)[1] for char in text])


def chars_in(text: str, width: int) -> int:
    """Return how many characters of printable text fit in `width` columns."""
    return bisect_right(list(accumulate([glyph(char)[1] for char in text[: 2 * width + 1]])), width)


def fit(text: str, width: int, tail: bool = False) -> str:
    """Return printable text filled up to `width` columns, or visibly cut: at its end, or with `tail` at its head."""
    if cells(text) > width:
        if tail:
            return fit(text[::-1], width)[::-1]
        text = text[: chars_in(text, width - 1)] + "…" if width > 0 else ""
    return text + " " * (width - cells(text))


def fit_line(line: Iterable[Span], width: int) -> Line:
    """Return a line filled up, in the style of its end, or cut to `width` columns."""
    fitted = [Span("")]
    for text, *looks in line:
        text = fit(text, min(width, cells(text)))
        fitted.append(Span(text, *looks))
        width -= cells(text)
    return [*fitted[1:], fitted[-1]._replace(text=" " * width)]


def wrap(value: Any, width: int) -> Iterator[str]:
    """Yield a value as printable lines of at most `width` columns, broken at a space where one is near."""
    text = text_of(value, MAX_DETAIL)
    for line in text.expandtabs(4).splitlines() or [""]:
        rest = printable(line, len(line)).rstrip()
        while (size := max(1, chars_in(rest, width))) < len(rest):
            size = rest.rfind(" ", size * 2 // 3, size + 1) + 1 or size
            yield rest[:size].rstrip()
            rest = rest[size:]
        yield rest
    if len(text) == MAX_DETAIL:
        yield "… and more"


def together(*texts: str) -> str:
    """Return the texts that say something, side by side."""
    return "  ".join([text for text in texts if text not in ("", "()", "{}")])


def duration(seconds: float) -> str:
    """Return a length of time in at most 6 characters, if it is below 270 years."""
    if seconds < 99.95:
        return f"{seconds:.1f}s" if seconds >= 0.9995 else f"{max(0, seconds) * 1000:.0f}ms"
    minutes, second = divmod(int(seconds), 60)
    if minutes < 100:
        return f"{minutes}m{second:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes < 6000 else f"{minutes // 1440}d"


def exact(seconds: Any) -> str:
    """Return a time as local day and time, 23 characters; "" for what is none."""
    seconds = round(number(seconds, inf), 3)
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) + f"{seconds % 1:.3f}"[1:]
    except (OverflowError, OSError, ValueError):
        return ""


def clock(seconds: Any, now: float) -> str:
    """Return a time as local time of day in 8 characters, or as the day if it was more than a day ago."""
    return exact(seconds)[5:10] if now - number(seconds, now) > 86400 else exact(seconds)[11:19]


UNITS: dict[str, Callable[[float, float], str]] = {  # field -> its text, a function (value, now)
    **dict.fromkeys(("timestamp", "last"), clock),
    **dict.fromkeys(("runtime", "freq", "mean", "p95", "max"), lambda value, now: duration(value)),
    "peak_memory": lambda value, now: f"{value / 2**20:,.1f} MiB",
    "heard": lambda value, now: duration(now - value),
    "progress": lambda value, now: f"{value:.0%}",
}


def field(record: Facts, key: Any, stage: Stage) -> str:
    """Return a field as people read it, or what a function of a column says."""
    if callable(key):
        return str(key(record, stage))
    value = record.get(key)
    return UNITS[key](number(value, 0), stage.now) if key in UNITS and number(value, inf) < inf else printable(value)


# What is known of a task, a worker or an event: functions (record, stage) -> text.


def known(table: Facts, key: Any) -> Facts:
    """Return what a table of State has under a key that an event gave; an empty dict if nothing."""
    return table.get(key, {}) if isinstance(key, str) else {}


def status_of(worker: Facts, stage: Stage) -> str:
    """Return whether a worker is alive, silent, LOST or ended."""
    status = worker.get("status", "unknown")
    if status != "alive" or stage.state.is_alive(worker, stage.now):
        return "LOST" if status == "lost" else str(status)
    return f"silent {duration(stage.now - worker['heard'])}"


def worker_of(task: Facts, stage: Stage) -> Facts:
    """Return the worker of a task, as State knows it."""
    return known(stage.state.workers, task.get("worker"))


def state_of(task: Facts, stage: Stage) -> str:
    """Return a task's state; LOST if nobody is left to finish it."""
    return "LOST" if stage.state.is_lost(task, stage.now) else printable(task["state"])


def run_of(task: Facts, stage: Stage) -> str:
    """Return how long a task took or has been running, "" if that is not known."""
    _, seconds = run_time(task, stage.state, stage.now)
    return duration(seconds) if seconds >= 0 else ""


def urgency(task: Facts, stage: Stage) -> tuple[int, float]:
    """Return an order: lost tasks, then unfinished ones, the longest running first; then finished ones, the newest first."""
    if task["state"] in State.FINISHED:
        return 2, -task["timestamp"]
    is_lost, seconds = run_time(task, stage.state, stage.now)
    return int(not is_lost), -seconds


def loss_of(task: Facts, stage: Stage) -> str:
    """Return why a task is lost."""
    status = status_of(worker_of(task, stage), stage)
    return "its process is gone" if status == "alive" else f"worker {status}"


def detail_of(task: Facts, stage: Stage) -> str:
    """Return what matters most of a task: why it failed or is lost, its result, how far it is; then its arguments."""
    state, retries, done = state_of(task, stage), int(number(task.get("retries"), 0)), number(task.get("progress"), -1)
    key = {"FAILURE": "exception", "RETRY": "exception", "SUCCESS": "result"}.get(state, "")
    outcome = loss_of(task, stage) if state == "LOST" else printable(task.get(key))
    attempt = f"attempt {retries + 1}" if retries else ""
    bar = f"{done:.0%} {'━' * round(done * 10):·<10}" if 0 <= done <= 1 and state not in State.FINISHED else ""
    given = together(printable(task.get("args")), printable(task.get("kwargs")))
    return together(outcome, attempt, bar, "←" if outcome and given else "", given)


def keys_of(record: Facts) -> list[str]:
    """Return the keys of the fields that are not shown elsewhere."""
    return [key for key in islice(record, 200) if record[key] is not None and printable(key) not in SHOWN_APART]


def reason_of(event: Facts, stage: Stage) -> str:
    """Return what an event tells beside its type, time, task and host: the reason first."""
    rest = [f"{printable(key)}={field(event, key, stage)}" for key in keys_of(event) if key != "pid"]
    text = together(*[printable(event.get(key)) for key in TOLD_FIRST], *rest)
    return re.sub(r"([0-9a-f]{8})(-[0-9a-f]{4}){3}-[0-9a-f]{12}", r"\1", text[:1000])


def task_name(event: Facts, stage: Stage) -> str:
    """Return the name of an event's task, if it has one, and the start of its uuid."""
    name = event.get("name") or known(stage.state.tasks, event.get("uuid")).get("name")
    return f"{printable(name)} {printable(event.get('uuid'), 8)}".strip()


def failed_of(kind: Facts, stage: Stage) -> str:
    """Return how many tasks of a kind have failed, and how many of a hundred that have ended."""
    failed = kind["failed"]
    return f"{failed:,} {failed / (failed + kind['succeeded']):4.0%}" if failed else "0"


# Tables.

# A heading begins with a space if the column stands at the right. Its text is a field, or a function (record, stage) ->
# text; without a style it has that of the row or of its text. `share` is its share of the width that all columns leave,
# of which the last gets the rest; from the width `least` of the terminal on it is shown. It is sorted by `order`, a
# function (record, stage), or else by its text or number. A `tail` is what is left where the text is too long.
Column = namedtuple("Column", "heading width text style share least order tail", defaults=("", 0.0, 0, None, False))
PANEL = (Column("", 11, "label", style="dim"), Column("", 0, "text"))
# `rows` is a function (subject, stage) -> rows of a table, items of a panel; `order` as in Layer, `empty` what to say.
Sheet = namedtuple("Sheet", "rows columns order empty", defaults=(PANEL, None, ""))


def worker_rows(subject: Any, stage: Stage) -> Rows:
    """Return the workers, each with its longest running task and how many of its tasks have failed."""
    running = [task for _, task in stage.state.iteractive()]
    running.sort(key=lambda task: run_time(task, stage.state, stage.now)[1])
    now = {task.get("worker"): f"{printable(task.get('name'))} {run_of(task, stage)}" for task in running}
    failed = Counter([task.get("worker") for task in stage.state.tasks.values() if task["state"] == "FAILURE"])
    workers = stage.state.workers.items()
    return [Row({**worker, "now": now.get(name), "failed": failed[name]}, ("worker", name)) for name, worker in workers]


def event_rows(subject: Any, stage: Stage) -> Rows:
    """Return the events of that task or worker, or all, the newest first; of older ones, those that State notes."""
    events = {id(event): event for event in chain(reversed(stage.state.recent), reversed(stage.state.notes))}
    return [
        Row(event, ("event", event))
        for event in events.values()
        if subject is None or subject in [text_of(event.get(key), 1000) for key in ("uuid", "hostname")]
    ]


# Panels: a value beside its label.


def item(label: str, text: Any, link: Any = None, style: str = "") -> Row:
    """Return a row of a panel."""
    return Row({"label": label, "text": text}, link, style)


def fields(record: Facts, keys: Iterable[str], stage: Stage) -> Iterator[Row]:
    """Yield these fields of a record, if it has them; a task's worker with the way to it."""
    for key in keys:
        if record.get(key) is not None:
            link = (key, record[key]) if key == "worker" and known(stage.state.workers, record[key]) else None
            yield item(key, field(record, key, stage) if key in UNITS else record[key], link)


def trace(record: Facts) -> Iterator[Row]:
    """Yield a traceback, or what a command wrote, its lines kept: the user's own frames and the last line stand out."""
    style, lines = "", text_of(record.get("traceback") or record.get("stderr"), MAX_DETAIL).splitlines()
    for line in lines:
        if line.startswith('  File "'):
            style = "dim" if re.search(r'"<|/lib(64)?/python|-packages/', line) else "bold"
        yield item("", line, style="red" if line is lines[-1] else style)


def task_item(label: str, task: Facts, stage: Stage, text: str, depth: int = 0) -> Row:
    """Return an item about a task, which leads to it."""
    name = fit("  " * depth + printable(task.get("name")), 20, tail=True)
    return item(label, f"{state_of(task, stage):<8} {name} {run_of(task, stage):>6} {text}", ("task", task["uuid"]))


def timeline(task: Facts, stage: Stage) -> Iterator[Row]:
    """Yield the attempts at a task, what became of each, and what other events tell of it: when, after the first."""
    moments = []
    for index, attempt in enumerate(stage.state.attempts(task["uuid"]), 1):
        where = f"{printable(attempt['worker'])}  attempt {index}"
        moments += [(attempt[key], key.upper(), where) for key in ("received", "started")]
        moments.append((attempt["ended"], attempt["state"], together(where, printable(attempt["exception"]))))
    for event, *_ in event_rows(task["uuid"], stage):
        if printable(event.get("type")) not in TASK_STATES.keys() - {"task-sent"}:
            moments.append((event.get("timestamp"), event.get("type"), reason_of(event, stage)))
    moments = sorted([moment for moment in moments if number(moment[0], inf) < inf], key=lambda moment: moment[0])
    for when, what, text in moments:
        yield item(f"+{duration(when - moments[0][0])}", f"{printable(what):<13} {text}")


def family(task: Facts, stage: Stage) -> Iterator[Row]:
    """Yield a task's family from its root on, each with a bar on one axis of time; nothing if it is alone."""
    tasks, members = stage.state.tasks, {}

    def began(uuid: str) -> float:
        return float(tasks[uuid].get("received", tasks[uuid]["timestamp"]))

    def descend(uuid: str, depth: int = 0) -> Iterator[tuple[str, int]]:
        yield uuid, depth
        for child in sorted(filter(tasks.__contains__, tasks[uuid]["children"]), key=began):
            yield from descend(child, depth + 1)

    for root in (task.get("root_id"), task.get("parent_id"), task["uuid"]):
        if isinstance(root, str) and root in tasks and task["uuid"] not in members:  # of a large family, a part
            members = dict(islice(descend(root), 100))
    spans = {uuid: (began(uuid), max(0.0, run_time(tasks[uuid], stage.state, stage.now)[1])) for uuid in members}
    first = min([start for start, _ in spans.values()])
    scale = max(1, stage.width - 55) / max(1e-9, *(start + run - first for start, run in spans.values()))
    for uuid, (start, run) in spans.items() if len(members) > 1 else ():
        label = {task["uuid"]: "this task", task.get("parent_id"): "parent"}.get(uuid, "")
        bar = " " * int((start - first) * scale) + "█" * ceil(run * scale)
        yield task_item(label, tasks[uuid], stage, bar, members[uuid])


def task_panel(uuid: str, stage: Stage) -> Iterator[Row]:
    """Yield everything about a task, if it is in memory."""
    task = stage.state.tasks.get(uuid)
    if task:
        state = state_of(task, stage)
        yield item("state", together(state, run_of(task, stage), loss_of(task, stage) if state == "LOST" else ""))
        yield from fields(task, ("name", "uuid", "worker", "client", *TOLD_FIRST), stage)
        yield item("latest", exact(task["timestamp"]))
        yield from chain(timeline(task, stage), family(task, stage), fields(task, keys_of(task), stage), trace(task))


def worker_panel(name: str, stage: Stage) -> Iterator[Row]:
    """Yield everything about a worker, its running tasks first."""
    worker = known(stage.state.workers, name)
    yield item("status", status_of(worker, stage))
    tasks = [task for _, task in stage.state.tasks_by_worker(name)]
    for task in sorted(tasks, key=lambda task: urgency(task, stage))[:100]:
        yield task_item("task", task, stage, detail_of(task, stage))
    yield from fields(worker, ("hostname", "heard", *keys_of(worker)), stage)


def event_panel(event: Facts, stage: Stage) -> Iterator[Row]:
    """Yield everything about an event, and the way to its task."""
    yield item("time", exact(event.get("timestamp")))
    task = known(stage.state.tasks, event.get("uuid"))
    if task:
        yield task_item("task", task, stage, detail_of(task, stage))
    yield from fields(event, ("type", "hostname", *TOLD_FIRST, *keys_of(event), "uuid", "traceback", "stderr"), stage)


NO_TASKS = "no tasks yet: 4 shows every event"
SHEETS = {
    "tasks": Sheet(lambda name, stage: [
        Row(task, ("task", uuid))
        for uuid, task in stage.state.tasks.items() if name is None or task.get("name") == name
    ], order=5, empty=NO_TASKS, columns=(
        Column("STATE", 8, state_of),
        Column("NAME", 14, "name", share=0.1, tail=True),
        Column("TIME", 8, "timestamp", style="dim", least=88),
        Column("UUID", 36, "uuid", style="dim", least=150),
        Column("WORKER", 12, lambda task, stage: printable(task.get("worker") or task.get("client")), share=0.05, least=50),
        Column("   RUN", 6, run_of, order=urgency),
        Column("DETAIL", 0, detail_of),
    )),
    "names": Sheet(lambda subject, stage: [
        Row({"name": name, **stats}, ("tasks", name)) for name, stats in stage.state.type_stats(stage.now).items()
    ], order=0, empty=NO_TASKS, columns=(
        Column("NAME", 16, "name", style="bold", share=0.2, tail=True),
        Column(" RUNNING", 8, "running"),
        Column("  DONE", 6, "succeeded"),
        Column("   FAILED", 9, failed_of, order=lambda kind, stage: -kind["failed"]),
        Column(" RETRIED", 8, "retried", least=100),
        Column("  MEAN", 6, "mean", least=60),
        Column("   P95", 6, "p95", least=60),
        Column("   MAX", 6, "max", least=70),
        Column("LAST", 8, "last", style="dim", least=110),
        Column("LAST ERROR", 0, "error", style="red"),
    )),
    "workers": Sheet(worker_rows, order=0, empty="no workers yet: a Dispatcher with freq=2 is one", columns=(
        Column("WORKER", 14, "hostname", style="bold", share=0.1),
        Column("STATUS", 12, status_of),
        Column("NOW", 20, "now", share=0.3, least=50),
        Column(" ACTIVE", 7, "active", least=60),
        Column("  DONE", 6, "processed", least=70),
        Column(" FAILED", 7, "failed", least=90),
        Column(" HEARD", 6, "heard"),
        Column("LOAD", 0, lambda worker, stage: printable(worker.get("loadavg")).strip("[]")),
    )),
    "events": Sheet(event_rows, order=0, empty="no events yet", columns=(
        Column("TIME", 8, "timestamp", style="dim", order=lambda event, stage: 0),
        Column("TYPE", 16, "type", share=0.05),
        Column("NAME", 20, task_name, share=0.1),
        Column("WORKER", 12, "hostname", share=0.1, least=90),
        Column("DETAIL", 0, reason_of),
    )),
    "task": Sheet(task_panel, empty="not in memory: cleared, or evicted to make room"),
    "worker": Sheet(worker_panel),
    "event": Sheet(event_panel),
    "traceback": Sheet(lambda uuid, stage: trace(known(stage.state.tasks, uuid)), PANEL[1:], empty="no traceback"),
    "result": Sheet(lambda uuid, stage: fields(known(stage.state.tasks, uuid), ["result"], stage), empty="no result"),
    "keys": Sheet(lambda subject, stage: [item("", HELP)], PANEL[1:]),
}
KINDS = list(SHEETS)  # the first four are pages


def event_line(event: Facts, state: State) -> str:
    """Return an event as a line for people, of at most 200 characters; the state knows the names of tasks."""
    stage = Stage(state, 0, 0, state.now())
    line = together(*[field(event, column.text, stage) for column in SHEETS["events"].columns])
    return line if len(line) <= 200 else line[:199] + "…"


# The lines of the screen.


def opened(view: View, kind: str, subject: Any = None) -> View:
    """Open a layer above the others, unless it is the uppermost."""
    same = view.layers and view.layers[-1][:2] == (kind, subject)
    return view if same else view._replace(layers=(*view.layers, Layer(kind, subject, SHEETS[kind].order)))


def settled(view: View, state: State) -> View:
    """Return the view with a page: until one is chosen, the one that has something."""
    return view if view.layers else opened(view, "tasks" if state.tasks or not state.event_count else "events")


def sizes_of(columns: Iterable[Column], width: int) -> list[tuple[Column, int]]:
    """Return the columns that are shown, each with its width: together, with a space behind each, at least `width`."""
    kept = [column for column in columns if column.least <= width]
    left = width - sum(column.width + 1 for column in kept)
    sizes = [column.width + max(0, int(left * column.share)) for column in kept]
    sizes[-1] = max(1, width - sum(sizes[:-1]) - len(sizes))
    return list(zip(kept, sizes))


def filtered(rows: Rows, layer: Layer, stage: Stage) -> Rows:
    """Return the rows in which each word of the filter is found: anywhere, or in the column that it names."""

    def words_of(record: Facts) -> str:
        return "\n".join([text_of(value, 1000) for value in record.values() if isinstance(value, (str, list, dict))])

    columns = {column.heading.strip().lower(): column for column in SHEETS[layer.kind].columns}
    for word in layer.filter.lower().split():
        name, _, wanted = word.partition(":")
        column = columns.get(name)
        some = [text for text in wanted.split(",") if text] or [""] if column else [word]
        texts = [field(row.record, column.text, stage) if column else words_of(row.record) for row in rows]
        rows = [row for row, text in zip(rows, texts) if any(map(text.lower().__contains__, some))]
    return rows


def wrapped(rows: Iterable[Row], width: int) -> Iterator[Row]:
    """Yield the rows of a panel, of `width` columns: the label only beside the first line of each, of a link no other."""
    for row in rows:
        lines = wrap(row.record["text"], width)
        yield row._replace(record={**row.record, "text": next(lines)})
        for line in () if row.link else lines:
            yield item("", line, style=row.style)


def rows_of(view: View, stage: Stage) -> Rows:
    """Return the rows of the uppermost layer, filtered and sorted."""
    layer, stage = view.layers[-1], stage._replace(**view.frozen)
    rows, columns, *_ = SHEETS[layer.kind]
    rows = rows(layer.subject, stage)
    if layer.order is None:
        width = sizes_of(columns, stage.width)[-1][1]
        return filtered(list(islice(wrapped(rows, width), 2000)), layer, stage)
    column = columns[layer.order]

    def place(row: Row) -> Any:
        if column.order:
            return column.order(row.record, stage)
        value = column.text(row.record, stage) if callable(column.text) else row.record.get(column.text)
        return number(value, -inf) == -inf, -number(value, 0), printable(value).lower()  # the highest number first

    return sorted(filtered(rows, layer, stage), key=place, reverse=layer.reverse)


def locate(view: View, rows: Rows) -> int:
    """Return the index of the row that the cursor is on."""
    layer = view.layers[-1]
    gone = max(0, min(layer.index, len(rows) - 1))
    return next((index for index, row in enumerate(rows) if layer.cursor and row.link == layer.cursor), gone)


def title_line(view: View, stage: Stage) -> Line:
    """Return what went wrong, the pages and how much they have, the rate, and the URL."""
    state, losses = stage.state, {**stage.status, "evicted": stage.state.evicted}
    alive = f"{len(state.alive_workers(stage.now)):,}/{len(state.workers):,}"
    counts = f"{len(state.tasks):,}", f"{len(state.task_types()):,}", alive, f"{state.event_count:,}"
    line = [Span(" FROZEN ", "alarm")] if view.frozen else []
    line += [Span(f" {many:,} {name} ", "alarm") for name, many in losses.items() if isinstance(many, int) and many]
    for page, (kind, many) in enumerate(zip(KINDS, counts), 1):
        style = "reverse" if kind == view.layers[0].kind else ""
        line.append(Span(f" {page} {kind.title()} {many} ", style, f"page {page}"))
    rate, url = sum(state.counts(1, 5.0, stage.now)) / 5, printable(stage.status.get("url")).partition("?")[0]
    left = stage.width - sum([cells(span.text) for span in line])
    return [*line, Span(f"{rate:,.1f}/s  {url}".rjust(left), "dim")]


def graph_lines(stage: Stage) -> list[Line]:
    """Return two lines: the events of each of the last seconds, the latest at the right, and the highest number."""
    width = min(60, stage.width // 8)
    counts = stage.state.counts(width, width, ceil(stage.now))  # whole seconds: no column changes but the last
    most = max([1, *counts])
    bars = ["".join([BARS[max(0, min(8, ceil(16 * count / most) - base))] for count in counts]) for base in (8, 0)]
    drawn = len(bars[1].lstrip())
    labels = (f"max {most:,}/s", f"last {drawn} s") if drawn else ("", "")
    return [[Span(f" {bar}", "cyan"), Span(f" {label:<11}", "dim")] for bar, label in zip(bars, labels)]


def failed_line(stage: Stage) -> Line:
    """Return how many tasks have failed in the last minute, and why the last one has."""
    failures = [task for task in stage.state.tasks.values() if task["state"] == "FAILURE"]
    if not failures:
        return [Span(" no failures", "dim")]
    task = max(failures, key=lambda task: float(task["timestamp"]))
    many = sum(stage.now - task["timestamp"] <= 60 for task in failures)
    when = f" {many:,} failed in the last minute: " if many else " the last failure: "
    return [Span(when, "red"), Span(f"{printable(task.get('name'))} {detail_of(task, stage)}")]


def now_lines(stage: Stage) -> list[Line]:
    """Return what stands below the title of every table: what runs, what has failed, the graph, the tasks by state."""
    graph = graph_lines(stage)
    tasks = [task for _, task in stage.state.iteractive()]
    active = [(*run_time(task, stage.state, stage.now), task) for task in tasks]
    running = [(seconds, task) for is_lost, seconds, task in active if not is_lost and seconds >= 0]
    text = f" {len(running):,} running"
    if running:
        seconds, task = max(running, key=lambda run: run[0])
        text += f", longest {printable(task.get('name'))} {duration(seconds)} on {printable(task.get('worker'))}"
    left = stage.width - sum([cells(span.text) for span in graph[0]])
    now = [fit_line(line, left) + bars for line, bars in zip(([Span(text)], failed_line(stage)), graph)]
    others = [task["state"] for task in stage.state.tasks.values() if task["state"] in {*State.FINISHED, "PENDING"}]
    names = ["LOST" if is_lost else task["state"] for is_lost, _, task in active]
    tally, order = Counter(names + others), list(STYLES)
    states = sorted(tally, key=lambda name: order.index(name) if name in order else 2)
    return [*now, [Span(f" {printable(name)} {tally[name]:,} ", STYLES.get(name, "")) for name in states]]


def heading_line(layer: Layer, columns: Iterable[tuple[Column, int]]) -> Line:
    """Return the headings of a table, with a mark where it is sorted; or what the panel is about."""
    if layer.order is None:
        about = layer.subject if isinstance(layer.subject, str) else ""
        return [Span(f" {layer.kind} {printable(about)}", "heading")]
    line = []
    for column, width in columns:
        text, step = column.heading, SHEETS[layer.kind].columns.index(column) - layer.order
        if not step:
            text = text.replace(" ", "", 1) + "▾▴"[layer.reverse]
        line.append(Span(fit(text, width) + " ", "heading", f"sort {step}"))
    return line


def row_line(row: Row, columns: Iterable[tuple[Column, int]], stage: Stage, step: int) -> Line:
    """Return a row as a line of the screen, so many below the cursor."""
    line = []
    for column, width in columns:
        text = field(row.record, column.text, stage)
        style = column.style or row.style or STYLES.get(text.partition(" ")[0], "")
        text = fit(text.rjust(width) if column.heading[:1] == " " else text, width, column.tail)
        line.append(Span(text + " ", style if step else "selected", f"move {step}" if step else "show"))
    return line


def footer_line(view: View, index: int, many: int) -> Line:
    """Return the filter, which row this is of how many, and keys."""
    layer = view.layers[-1]
    hints = "typing" if view.typing else "table" if len(view.layers) == 1 else "panel"
    about = f" of {layer.subject}" if layer.subject and layer.order is not None else ""
    text = f"/{printable(layer.filter)}{'█' * view.typing} " if view.typing or layer.filter else ""
    return [Span(f"{text} {min(index + 1, many):,} of {many:,}{printable(about)} ", "bold"), Span(f" {HINTS[hints]}", "dim")]


def screen(view: View, stage: Stage, rows: Rows | None = None) -> list[Line]:
    """Return exactly `stage.height` lines of exactly `stage.width` columns that show `stage.state` as the view wants it.

    `rows` is what rows_of() returned a moment ago, if that shall do. Pure: the same arguments give the same lines.
    """
    view = settled(view, stage.state)
    layer, shown = view.layers[-1], stage._replace(**view.frozen)
    columns = sizes_of(SHEETS[layer.kind].columns, stage.width)
    rows = rows_of(view, stage) if rows is None else rows
    chosen = locate(view, rows)
    head = [title_line(view, stage), *(now_lines(stage) if layer.order is not None else [])][: stage.height // 4]
    head += [heading_line(layer, columns)] * (stage.height > 5)
    foot = [footer_line(view, chosen, len(rows))] * (stage.height > 2)
    room = stage.height - len(head) - len(foot)
    top = max(0, min(chosen - room // 2, len(rows) - room))
    body = [row_line(row, columns, shown, index - chosen) for index, row in enumerate(rows[top : top + room], top)]
    if not rows:
        empty = SHEETS[layer.kind].empty if stage.state.event_count else str(stage.status.get("empty", ""))
        empty = f"nothing matches {layer.filter} — Escape drops the filter" if layer.filter else empty
        body = [[Span(text)] for text in wrap(empty, stage.width)]
    return [fit_line(line, stage.width) for line in (*head, *islice(chain(body, repeat([])), room), *foot)]


# What keys and clicks do: functions (view, stage, rows, argument) -> view.


def change(view: View, **changes: Any) -> View:
    """Change the uppermost layer."""
    return view._replace(layers=(*view.layers[:-1], view.layers[-1]._replace(**changes)))


def move(view: View, stage: Stage, rows: Rows, step: Any) -> View:
    """Go so many rows, or if it is a fraction, so much of the screen; inf and -inf are the ends."""
    step = float(step)
    step = step * max(2, stage.height - 6) if abs(step) < 1 else step
    index = int(max(0, min(locate(view, rows) + step, len(rows) - 1)))
    return change(view, cursor=rows[index].link if index else None, index=index)


def show(view: View, stage: Stage, rows: Rows, kind: str = "") -> View:
    """Open what the cursor's row leads to; or a layer of that kind about its task or worker, or the one that is open."""
    link = rows[locate(view, rows)].link if rows else None
    about, subject = link or view.layers[-1][:2]
    if kind and about == "event":
        subject = subject.get("uuid") or subject.get("hostname")
    possible = not kind or about != "tasks" and isinstance(subject, str)
    return opened(change(view, cursor=link), kind or about, subject) if possible else view


def sort(view: View, stage: Stage, rows: Rows, step: str) -> View:
    """Sort the table by the next column; with 0 by the same one, the other way round."""
    layer = view.layers[-1]
    if layer.order is None:
        return view
    order = (layer.order + int(step)) % len(SHEETS[layer.kind].columns)
    return change(view, order=order, reverse=step == "0" and not layer.reverse)


def freeze(view: View, stage: Stage, rows: Rows) -> View:
    """Let the picture stand still, or go on: a copy of the State is shown."""
    from copy import deepcopy

    return view._replace(frozen={} if view.frozen else {"state": deepcopy(stage.state), "now": stage.now})


def back(view: View, stage: Stage, rows: Rows) -> View:
    """Drop the filter, else close the uppermost layer, else let a frozen picture go on."""
    if view.layers[-1].filter:
        return change(view, filter="")
    return view._replace(layers=view.layers[:-1]) if len(view.layers) > 1 else view._replace(frozen={})


def click(view: View, stage: Stage, rows: Rows, line: str, column: str) -> View:
    """Do what is there on the screen, which may have become smaller."""
    spans = screen(view, stage, rows)[min(int(line), stage.height - 1)]
    actions = [span.action for span in spans for _ in range(cells(span.text))]
    return press(view._replace(typing=False), actions[min(int(column), stage.width - 1)], stage, rows)


ACTIONS: dict[str, Callable[..., View]] = {
    **{action.__name__: action for action in (move, show, sort, freeze, back, click)},
    "page": lambda view, stage, rows, number: opened(view._replace(layers=()), KINDS[(int(number) - 1) % 4]),
    "tab": lambda view, stage, rows: press(view, f"page {KINDS.index(view.layers[0].kind) + 2}", stage, rows),
    "leave": lambda view, stage, rows: view._replace(layers=view.layers[:-1] or view.layers, done=len(view.layers) == 1),
    "keys": lambda view, stage, rows: opened(view, "keys"),
    "clear": lambda view, stage, rows: stage.state.clear_tasks() or view,
    "type": lambda view, stage, rows: view._replace(typing=True),
}
KEYS = {
    key: action
    for action, keys in {
        "move 1": "j KEY_DOWN",
        "move -1": "k KEY_UP",
        "move 0.9": "KEY_NPAGE",
        "move -0.9": "KEY_PPAGE",
        "move -inf": "g KEY_HOME",
        "move inf": "G KEY_END",
        **{f"page {number}": number for number in "1234"},
        "tab": "tab ^I",
        "show": "enter i ^J ^M KEY_ENTER",
        "show traceback": "t",
        "show result": "r",
        "show events": "e",
        "keys": "?",
        "type": "/",
        "sort 1": "s",
        "sort 0": "S",
        "freeze": "space",
        "clear": "c",
        "leave": "q",
        "back": "esc ^[",
        "erase": "KEY_BACKSPACE ^? ^H",
    }.items()
    for key in keys.split()
}


def press(view: View, key: str, stage: Stage, rows: Rows | None = None) -> View:
    """Return the view after a key, as curses calls it ("j", "^I", "KEY_UP"), or an action ("move 3", "click LINE COLUMN").

    `rows` is as in screen(). One key changes the State: c clears it.
    """
    view, action = settled(view, stage.state), KEYS.get("space" if key == " " else key, key)
    text, edit = view.layers[-1].filter, "add" if len(key) == 1 else action
    edits = {"add": (text + key)[:100], "erase": text[:-1], "show": text, "back": ""}
    if view.typing and edit in edits:
        return change(view._replace(typing=edit in ("add", "erase")), filter=edits[edit], index=0)
    name, *arguments = action.split() or [""]
    rows = rows_of(view, stage) if rows is None else rows
    return ACTIONS[name](view, stage, rows, *arguments) if name in ACTIONS else view


def in_ascii(text: str) -> str:
    """Return text of the same width for a terminal that knows no other characters."""
    table = dict(zip("▁▂▃▄▅▆▇█━·…▾▴—←", ".:-=+*%#=.~v^-<"))
    return "".join([char if char.isascii() else table.get(char, "?" * glyph(char)[1]) for char in text])


# --- capture_events: curses, one thread ---------------------------------------------------------------------------

FRAME_TIME = 0.05  # between two pictures,
FRAME_SHARE = 5  # and so many times what the last one took, unless a key was pressed
DRAIN = 500  # events taken between two looks at the keyboard
MAX_LINE = 4 * MAX_EVENT  # of a file: an event in ASCII may take three times as much as in UTF-8, and white space
LOOKS = {  # style -> attributes, and one of 256 colours, of at least 3:1 on black, #1e1e1e and white
    "": ("", 0),
    "bold": ("BOLD", 0),
    "dim": ("DIM", 244),
    "heading": ("BOLD UNDERLINE", 0),
    "reverse": ("REVERSE", 0),
    "selected": ("BOLD REVERSE", 0),
    "alarm": ("BOLD REVERSE", 196),
    "red": ("BOLD", 196),
    "green": ("", 28),
    "yellow": ("", 136),
    "blue": ("", 32),
    "magenta": ("", 133),
    "cyan": ("", 30),
}


def complain(message: str, prefix: str = "eventmon: ") -> None:
    """Print a line on standard error, if there is one."""
    with suppress(OSError):  # it is full, or nobody reads it
        if sys.stderr is not None:
            print(prefix + printable(message), file=sys.stderr, flush=True)


# A feed is an iterator of events, and of None whenever there is nothing to take for the moment.


def recorded(path: str, report: Callable[[str], object], take: Callable[[Event], Any] = lambda event: event) -> Iterator[Any]:
    """Yield what take() makes of each event of a file of NDJSON, or of standard input for "-"; report each bad line."""
    with open(path, "rb") if path != "-" else nullcontext() as file:
        stream = file or sys.stdin and sys.stdin.buffer
        where, index, whole = "" if path == "-" else f"{path}: ", 0, True
        for line in iter(partial(stream.readline, MAX_LINE), b"") if stream else ():
            begins, whole = whole, line.endswith(b"\n")
            index += begins
            try:
                if begins and line.strip():  # the rest of a longer line holds nothing
                    yield take(parse_event(parse_json(line.removeprefix(b"\xef\xbb\xbf"))))  # a byte order mark
            except (WireError, ValueError) as problem:  # an event too large to be sent
                report(f"{where}line {index}: {problem}")


def live(receiver: Receiver, longest: float, timeout: float | None = None, wakeup: bool = True) -> Feed:
    """Yield what a receiver hears, None after at most `longest` seconds without; end after `timeout` seconds without."""
    heard, patience, closed = time.monotonic(), inf if timeout is None else timeout, receiver.closed
    while not receiver.should_stop and (left := heard + patience - time.monotonic()) >= 0:
        for event in receiver.itercapture(DRAIN, min(longest, left), wakeup):
            heard = time.monotonic()
            yield event
        if receiver.closed > closed:
            receiver.close()  # who waits for it may have opened it again
            return
        yield None


def json_line(event: Facts) -> str:
    """Return an event as a line of JSON in ASCII, in which nothing can harm a terminal."""
    try:
        return json.dumps(event, allow_nan=False)
    except ValueError:
        return json.dumps(plain(event))


def open_record(path: str) -> Any:
    """Open a file to append events to; behind a line that a crash has cut off begins another one."""
    file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by the caller
    with suppress(OSError), open(path, "rb") as before:  # it is empty, or no file that can be read
        before.seek(-1, os.SEEK_END)
        file.write(b"" if before.read(1) == b"\n" else b"\n")
    return file


def append(record: Any, event: Event) -> None:
    """Append an event to a file, in one piece, since others may append to it too."""
    data = json_line(event).encode() + b"\n"
    try:
        while data:  # where there is little room, only a part is taken
            data = data[record.write(data) :]
    except OSError as problem:
        problem.filename = record.name
        raise


def chosen(feed: Feed, types: Sequence[str] = (), record: Any = None, limit: float | None = None, state: Any = None) -> Feed:
    """Yield the events of some types, at most so many, and append them to a file; let a state take all there are."""
    from fnmatch import fnmatchcase

    left = inf if limit is None else limit
    for event in feed if left > 0 else ():
        if event is not None:
            if state:
                state.event(event)
            if types and not any(fnmatchcase(event.type, glob) for glob in types):
                continue
            if record:
                append(record, event)
            left -= 1
        yield event
        if left <= 0:
            return


class Terminal:
    """What curses does for the monitor: it reads keys, and paints lines."""

    def __init__(self, window: Any) -> None:
        import curses

        self._curses: Any = curses
        self._window = window
        self._ascii = "utf" not in window.encoding.lower()
        self._ahead = ""  # what was read behind an Escape
        self._looks: dict[str, int] = {}  # style -> attributes
        is_coloured = False
        with suppress(curses.error):  # of a terminal that has no colours, or none of its own
            curses.use_default_colors()  # else curses would paint a background
            is_coloured = curses.COLORS >= 256 and not os.environ.get("NO_COLOR")
        for pair, (style, (attributes, colour)) in enumerate(LOOKS.items(), 1):
            self._looks[style] = sum(getattr(curses, f"A_{attribute}") for attribute in attributes.split())
            if colour and is_coloured:
                curses.init_pair(pair, colour, -1)
                self._looks[style] = self._looks[style] & ~curses.A_DIM | curses.color_pair(pair)
        button5 = getattr(curses, "BUTTON5_PRESSED", 1 << 21)  # Python 3.9 has no name for it
        curses.mousemask(curses.BUTTON1_PRESSED | curses.BUTTON4_PRESSED | button5)
        curses.mouseinterval(0)
        window.nodelay(True)
        curses.raw()
        curses.cbreak()  # raw but for signals: ctrl-S does not stop what is painted, and with it the monitor
        curses.noqiflush()  # ctrl-C would drop what select() has seen, and curses wait for it
        with suppress(curses.error):  # of a terminal whose cursor is always there
            curses.curs_set(0)

    def size(self) -> tuple[int, int]:
        """Return rows and columns; curses learns here that they have changed."""
        with suppress(OSError):
            columns, rows = os.get_terminal_size()
            if rows > 0 < columns and self._window.getmaxyx() != (rows, columns):
                self._curses.resizeterm(rows, columns)
                self.forget()
        return self._window.getmaxyx()  # type: ignore[no-any-return]

    def forget(self, used: bool = False) -> None:
        """Let the next picture be painted as a whole: what the terminal shows is not known, or it was used by others."""
        if used:
            self._curses.endwin()  # the next refresh() sets the terminal up again: kill -STOP left it to the shell
        self._window.clearok(True)  # unlike clear(), after which get_wch() would paint at once

    def paint(self, lines: list[Line]) -> None:
        """Show the lines. Each span stands at its own column, however wide the terminal takes those before it to be."""
        self._window.erase()
        self._window.redrawln(0, 4)  # of a bar that goes, the edge of its glyph may be left beside its cell
        for row, line in enumerate(lines):
            column = 0
            for text, style, _ in line:
                with suppress(self._curses.error):  # behind the last cell is no place for the cursor
                    self._window.addstr(row, column, in_ascii(text) if self._ascii else text, self._looks[style])
                column += cells(text)
        self._window.refresh()

    def pressed(self) -> str:
        """Return the next key that was pressed, as press() takes it; "" if there is none."""
        key, self._ahead = self._ahead or self._read(), ""
        if key == "^[":
            self._ahead = self._read()
            if self._ahead in ("[", "O"):  # a sequence that curses does not know: it ends with a letter
                self._window.timeout(50)  # for what comes in pieces
                any("@" <= end <= "~" for end in iter(self._read, ""))
                self._window.nodelay(True)
                key, self._ahead = "unknown", ""
        if key == "KEY_MOUSE":
            with suppress(self._curses.error):
                _, column, line, _, button = self._curses.getmouse()
                clicked, up = button & self._curses.BUTTON1_PRESSED, button & self._curses.BUTTON4_PRESSED
                return f"click {line} {column}" if clicked else "move -3" if up else "move 3"
        return key

    def _read(self) -> str:
        """Return a character, or the name of a key that is none, or "" if none is pressed."""
        key = ""
        with suppress(self._curses.error):
            key = self._window.get_wch()
        if isinstance(key, str) and (key.isprintable() or key >= "\x80"):
            return key
        return str(self._curses.keyname(key if isinstance(key, int) else ord(key)), "ascii", "replace")


class Monitor:
    """The monitor's one thread: events first, then keys, then a picture if there is something new.

    `status` is a function that returns what Stage has under that name; the end of the feed ends the monitor, unless it
    is a file's. `receiver` is what to wait for, None for a file.
    """

    def __init__(self, feed: Feed, state: State, status: Callable[[], Mapping[str, Any]], receiver: Any = None) -> None:
        self._feed = feed
        self._state = state
        self._status = status
        self._receiver = receiver
        self._view = View()
        self._wake, self._waker = socket.socketpair()  # where Python writes the numbers of signals
        self._wake.setblocking(False)
        self._waker.setblocking(False)
        self._answered = self._due = time.monotonic()  # the last picture that answered a key; when one may be next
        self._beats = 0  # heartbeats of workers, of which the picture of the next second tells
        self._ended = False  # the feed
        self._drawn: Any = None  # what the picture is of, None if there is to be another in any case
        self._rows: Rows = []
        self._rows_of: Any = None  # what the rows are of, None if they are to be found anew

    def run(self) -> None:
        """Show the screen until the user quits. A signal to end raises SystemExit once the terminal is as it was."""
        import curses
        import signal

        ending = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

        def end(number: int, frame: object) -> NoReturn:
            for name in ending:
                signal.signal(name, signal.SIG_IGN)  # the next one must not stop what puts the terminal back
            raise SystemExit(128 + number)

        os.environ.setdefault("ESCDELAY", "50")  # milliseconds: nobody notices, and an arrow's sequence may come in pieces
        with self._wake, self._waker, ExitStack() as stack:
            if threading.current_thread() is threading.main_thread():
                wakeup = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
                stack.callback(signal.set_wakeup_fd, wakeup)
                for name in (*ending, signal.SIGCONT, signal.SIGWINCH):
                    if signal.getsignal(name) != signal.SIG_IGN:
                        before = signal.signal(name, end if name in ending else lambda *_: None)
                        stack.callback(signal.signal, name, signal.SIG_DFL if before is None else before)
            try:
                curses.wrapper(self._loop)
            except curses.error:
                if sys.stdin.isatty():
                    raise  # else the terminal has gone

    def _loop(self, window: Any) -> None:
        from signal import SIGCONT

        terminal = Terminal(window)
        while not self._view.done and sys.stdin.isatty() and self._take():
            with suppress(BlockingIOError):  # no signal came
                terminal.forget(SIGCONT in self._wake.recv(4096))
                self._drawn = None
            stage = Stage(self._state, *terminal.size(), self._state.now(), self._status())
            key = terminal.pressed()
            if key:
                self._view = self._state.freeze_while(press, self._view, key, stage, self._find(stage))
                self._drawn = None
            if key == "^L":
                terminal.forget()
            if not self._view.done:  # else what is typed further is for whoever reads next
                patience = self._draw(terminal, stage)
                self._wait(0.0 if key else patience)

    def _take(self) -> bool:
        """Take some events; return whether there is more to see."""
        self._ended = True
        for event in islice(self._feed, DRAIN):
            self._ended = False
            if event is None:
                break
            self._beats += event.get("type") == "worker-heartbeat"
            self._state.event(event)
        return not self._ended or self._receiver is None

    def _find(self, stage: Stage) -> Rows:
        """Return the rows of the uppermost layer: those found last, unless others are wanted."""
        view = settled(self._view, self._state)
        wanted = view.layers[-1]._replace(cursor=None, index=0), view.frozen
        if self._rows_of != wanted:
            self._rows, self._rows_of = self._state.freeze_while(rows_of, view, stage), wanted
        return self._rows

    def _draw(self, terminal: Any, stage: Stage) -> float:
        """Paint a picture if there is something new, and it is time to; return for how long there is nothing to do."""
        state, now = self._state, time.monotonic()
        counts = state.workers or any(state.counts(1, 60.0, stage.now)) or any(True for _ in state.iteractive())
        news = stage._replace(now=int(stage.now) if counts else 0), state.event_count - self._beats, len(state.tasks)
        if self._drawn != (self._view, news):
            is_answer = self._drawn is None
            due = self._answered + FRAME_TIME if is_answer else self._due  # a key is answered at once,
            if now < due:
                return due - now
            if now >= self._due:  # if need be with the rows of the last picture
                self._rows_of = None
            self._drawn = self._view, None if self._rows_of else news
            terminal.paint(state.freeze_while(screen, self._view, stage, self._find(stage)))
            painted = time.monotonic()
            self._answered = painted if is_answer else self._answered
            self._due = painted + max(FRAME_TIME, FRAME_SHARE * (painted - now))
        return min(0.5, max(FRAME_TIME, 1.0 - float(stage.now) % 1))  # other threads may feed the State

    def _wait(self, longest: float) -> None:
        """Wait for keys, signals and events."""
        files = [sys.stdin, self._wake, *filter(None, [self._receiver])]
        longest = self._receiver.pause(longest) if self._receiver else longest * self._ended
        try:
            select.select(files, [], [], longest)  # which takes terminals also where poll() does not
        except (OSError, ValueError):  # one has just been closed; it takes only the first 1,024 files
            wait_for(longest, *files)


def has_terminal() -> bool:
    """Whether the monitor can be shown; says why not if there is a terminal."""
    try:
        if not (sys.stdin.isatty() and sys.stdout.isatty() and os.isatty(0) and os.isatty(1)):  # curses takes 0 and 1
            return False
        import curses

        curses.setupterm()
        if curses.tigetstr("cup"):
            return True
    except (AttributeError, ValueError):
        return False  # a standard stream is not there, or closed
    except Exception:  # noqa: BLE001, S110 - no curses, or an error of it
        pass
    complain(f"curses cannot draw where TERM={os.environ.get('TERM', '')}: printing lines instead of the monitor")
    return False


def take_any_text() -> None:
    """Let standard output, whatever its encoding is, spell out what it has no character for."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def print_lines(feed: Feed, state: State | None = None) -> None:
    """Print each event as a line for people, with what the state knows of its task; without a state, as JSON."""
    take_any_text()
    for event in feed:
        if event is not None:
            print(event_line(event, state) if state else json_line(event), flush=True)


def show_live(receiver: Receiver, state: State, feed: Feed) -> None:
    """Show in the monitor what a receiver hears."""
    url = receiver.url
    empty = f"no events yet on {url} — try: python eventmon.py send hello --url '{url}'"
    names = ("lost", "rejected", "malformed")
    Monitor(feed, state, lambda: {"url": url, "empty": empty, **{name: receiver.stats[name] for name in names}}, receiver).run()


def capture_events(receiver: Receiver | None = None, state: State | None = None) -> None:
    """Show live tasks, workers and events in the terminal until the user quits.

    `receiver` defaults to one on the default URL, `state` to a new one; other threads may feed it, too. Where there is no
    terminal, or none that curses knows, it prints lines. Raises OSError when the socket cannot be opened. In the main
    thread SIGTERM, SIGHUP and SIGQUIT, unless ignored, raise SystemExit once the terminal is as it was.
    """
    state = State() if state is None else state
    with Receiver() if receiver is None else nullcontext(receiver) as heard:
        heard.fileno()  # opened while an error can still be read
        if has_terminal():
            show_live(heard, state, live(heard, 0.0))
        else:
            print_lines(chosen(live(heard, 1.0), state=state), state)


# --- the command line ---------------------------------------------------------------------------------------------


def how_many(number: int, noun: str) -> str:
    """Return "1 event" or "2,000 events"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


MAX_TOLD = 5  # of bad lines, or of names


class BadLines:
    """Called with what is wrong with each line that holds no event: counts them, and tells of the first few."""

    def __init__(self, tell: Callable[[str], object] = complain) -> None:
        self.count = 0
        self._tell = tell

    def __call__(self, problem: object) -> None:
        self.count += 1
        if self.count <= MAX_TOLD:
            self._tell(str(problem))

    def end(self) -> None:
        """Say how many more there are."""
        if self.count > MAX_TOLD:
            complain(f"and {self.count - MAX_TOLD:,} more")


def has_reader() -> bool:
    """Whether somebody reads standard output, as far as the system can tell."""
    with suppress(AttributeError, OSError):  # Windows has no poll(); standard output need not be a file
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # which asks for nothing but the end
        return not poll.poll(0)
    return True


def troubles(end: Any) -> list[str]:
    """Return what a Receiver or a Dispatcher has lost or rejected until now."""
    reasons, stats = {"lost": "", "rejected": f": {end.problem}"}, end.stats
    return [f"{how_many(stats[name], 'datagram')} {name}{reasons[name]}" for name in reasons if stats.get(name)]


def report_losses(receiver: Receiver, feed: Feed) -> Feed:
    """Yield what is heard while it is read; complain of troubles at most once a second, and of all in the end."""
    told, due = "", 0.0
    try:
        for event in feed:
            if event is None and not has_reader():
                return
            yield event
            if time.monotonic() > due:
                before, told, due = told, ", ".join(troubles(receiver)), time.monotonic() + 1.0
                if told != before:
                    complain(told)
    finally:
        if told := ", ".join(troubles(receiver)):
            complain(f"in all {told}")


def watch(options: Any) -> int:
    """Show what is heard, or what FILE holds, until the user or a limit ends it."""
    if options.json and options.plain:
        raise ValueError("--json and --plain exclude each other")
    for name in ("limit", "timeout"):
        value = getattr(options, name)
        if value is not None and not value >= 0:
            raise ValueError(f"--{name} is {value}, expected 0 or more")
    with suppress(OSError, TypeError):  # one is not there, or not given
        if os.path.samefile(options.file, options.record):
            raise ValueError(f"{options.file} cannot be recorded into itself")
    in_lines = options.json or options.plain or options.file and not os.path.isfile(options.file) or not has_terminal()
    state, unsaid = State(), list[str]()
    bad = BadLines(complain if in_lines else unsaid.append)  # not into the picture
    with ExitStack() as stack:
        record = stack.enter_context(open_record(options.record)) if options.record else None
        if options.file:
            state.recorded = True
            feed: Feed = recorded(options.file, bad)
        else:
            receiver = stack.enter_context(Receiver(options.url, key=options.key))
            try:
                receiver.fileno()
            except OSError as problem:
                raise OSError(f"cannot listen on {receiver.url}: {problem}") from None
            feed = live(receiver, 1.0 if in_lines else 0.0, options.timeout, not options.no_history)
            feed = report_losses(receiver, feed) if in_lines else feed
        feed = chosen(feed, options.type, record, options.limit, state if in_lines else None)
        if in_lines:
            print_lines(feed, None if options.json else state)
        elif options.file:
            status = {"url": options.file, "empty": f"no events in {options.file}"}
            Monitor(feed, state, lambda: {**status, "malformed": bad.count}).run()
        else:
            show_live(receiver, state, feed)
    for line in unsaid:
        complain(line)
    bad.end()
    return 1 if bad.count > state.event_count else 0  # hardly anything can be read


def parse_fields(type: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of Dispatcher.send() for an event of a type with fields as "name=text" or "name:=json"."""
    fields: dict[str, Any] = {"type": type, "blind": False}
    for word in words:
        found = re.fullmatch("([^=:][^=]*?)(:?)=(|[^=].*)", word, re.DOTALL)
        if not found or found[1] in fields:
            raise ValueError(f"field is {word!r}, expected name=text or name:=json, each name once, and neither type nor blind")
        name, is_json, text = found.groups()
        try:
            fields[name] = parse_json(text.encode("utf-8", "surrogateescape")) if is_json else text
        except WireError as problem:
            raise ValueError(f"field is {word!r}: {problem}") from None
    if not isinstance(fields.get("timestamp", 0), (int, float)):
        raise ValueError("timestamp is no number, expected seconds as in timestamp:=1.7e9")  # noqa: TRY004
    return fields


def send(options: Any) -> int:
    """Send an event, or those on standard input, and say how many watchers have everything."""
    fields, bad = parse_fields(options.type, options.field), BadLines()
    if options.type == "-" and options.field:
        raise ValueError("send - takes no fields")
    with Dispatcher(options.url, key=options.key, max_wait=10.0) as dispatcher:
        if options.type != "-":
            dispatcher.send(**fields)
        for _ in recorded("-", bad, dispatcher.publish) if options.type == "-" else ():
            pass
        bad.end()
        watchers = dispatcher.flush(60.0)  # seconds for those that are alive but behind
        stats, lacking = dispatcher.stats, [number for number in dispatcher.lacking() if number]
    if stats["events"] and not stats["datagrams"]:
        raise OSError(f"cannot send to {dispatcher.url}: {dispatcher.problem}")
    report = [f"sent {how_many(stats['events'], 'event')}, confirmed by {how_many(watchers, 'watcher')}"]
    report += [f"1 watcher lacks {how_many(number, 'datagram')}" for number in lacking]
    complain("; ".join(report + troubles(dispatcher)), prefix="")
    return 1 if bad.count or lacking else 0


# run. The command is a child in our process group, so that what is typed as a signal reaches it without us.

TYPED = {"SIGINT", "SIGQUIT", "SIGWINCH"}  # what a terminal sends to each process in the foreground
PASSED_ON = TYPED | {"SIGHUP", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGALRM"}
MAX_TAIL = 65536  # bytes of standard error that are kept


def in_foreground() -> bool:
    """Whether what is typed at a terminal as a signal reaches this process, and the command."""
    with suppress(OSError), open("/dev/tty", "rb") as tty:
        return os.tcgetpgrp(tty.fileno()) == os.getpgrp()
    return False


def piped_streams() -> dict[str, Any]:
    """Return which streams of a command come through a pipe, for its last lines: standard error that is no terminal."""
    from subprocess import PIPE, STDOUT

    with suppress(OSError):  # one is closed
        if not os.isatty(2) and sys.platform != "win32":
            is_one = os.path.sameopenfile(1, 2)  # which goes through one pipe, to keep its order
            return {"stdout": PIPE, "stderr": STDOUT} if is_one else {"stderr": PIPE}
    return {}


def copy_errors(command: Any) -> str:
    """Copy the pipe of a command to standard error until the command has ended, and return its last 20 lines."""
    from selectors import EVENT_READ, DefaultSelector
    from subprocess import Popen

    tail, data, has_ended = b"", b"-", False
    pipe = command.stdout or command.stderr
    # at an error whoever reads us has gone, and the command finds a broken pipe, too
    with suppress(OSError), pipe, open(2, "wb", closefd=False) as target, DefaultSelector() as selector:
        selector.register(pipe, EVENT_READ)  # unlike select() not limited to the first 1,024 files
        while data and not has_ended:
            has_ended = command.poll() is not None
            if selector.select(0 if has_ended else MAX_SLEEP):
                data = pipe.read(MAX_TAIL)
                tail = (tail + data)[-MAX_TAIL:]
                target.write(data)
                target.flush()
        if data:  # a child of the command still has the pipe, and may outlive us
            Popen(["cat"], stdin=pipe, stdout=2)
    return "\n".join(tail.decode(errors="backslashreplace").splitlines()[-20:])


def run_command(words: Sequence[str]) -> tuple[int, str]:
    """Run a command; return its exit status, or a signal's negative number, and its last lines of standard error."""
    import signal
    from subprocess import Popen

    command: Any = None
    early: list[int] = []  # signals that came before there was a command, and so have not reached it, even if typed

    def pass_on(number: int, frame: object) -> None:
        if not command:
            early.append(number)
        elif not frame or signal.Signals(number).name not in TYPED or not in_foreground():
            with suppress(OSError, ValueError):  # it runs as another user; Windows, whose console tells the command
                command.send_signal(number)

    with ExitStack() as stack:
        for number in signal.Signals:
            if number.name in PASSED_ON and signal.getsignal(number) != signal.SIG_IGN:  # as the command does, by nohup
                stack.callback(signal.signal, number, signal.signal(number, pass_on))
        streams = piped_streams()
        command = Popen(words, bufsize=0, close_fds=False, **streams)
        for kept in early:
            pass_on(kept, frame=None)
        errors = copy_errors(command) if streams else ""
        return command.wait(), errors


def outcome_of(words: Sequence[str]) -> dict[str, Any]:
    """Run a command; return fields that tell how it has ended, or why it cannot be run."""
    import signal
    from shlex import quote

    try:
        code, errors = run_command(words)
    except OSError as problem:
        if problem.errno == errno.ENOEXEC:  # a script that names no interpreter is for the shell, as it is everywhere
            return outcome_of(["/bin/sh", *words])
        is_absent = isinstance(problem, FileNotFoundError) or not words[0]
        status, reason = (127, "not found") if is_absent else (126, problem.strerror)
        hint = f", did you mean run -- sh -c {quote(words[0])}?" if is_absent and " " in words[0] else ""
        complain(f"{words[0]}: {reason}{hint}")
        return {"exit_status": status, "exception": reason}
    fields: dict[str, Any] = {"exit_status": code if code >= 0 else 128 - code}
    with suppress(Exception):  # Windows has none
        from resource import RUSAGE_CHILDREN, getrusage

        peak = getrusage(RUSAGE_CHILDREN).ru_maxrss  # at least ours, which the child had before it became the command
        fields["peak_memory"] = peak * (1 if sys.platform == "darwin" else 1024)
    if code:
        names = {-number: number.name for number in signal.Signals}
        fields["exception"] = f"exit status {code}" if code > 0 else names.get(code, f"signal {-code}")
        fields.update({"stderr": errors} if errors else {})
    return fields


def run(options: Any) -> int:
    """Run COMMAND as if it were run alone, and send the events of a task for it."""
    from shlex import join

    words = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not words:
        raise ValueError("no command to run, expected run -- COMMAND")
    with Dispatcher(options.url, key=options.key) as dispatcher:
        task, began = dispatcher.task(options.name or os.path.basename(words[0])), time.monotonic()
        dispatcher.begin_task(task.uuid, {"name": task.name, "args": cut(join(words), MAX_REPR)})
        outcome = outcome_of(words)
        type = "task-failed" if outcome["exit_status"] else "task-succeeded"
        dispatcher.end_task(type, task.uuid, {"runtime": time.monotonic() - began, **outcome})
    return int(outcome["exit_status"])


# check

STEPS = ("open", "join", "send", "receive", "sizes", "buffer", "others")
REASONS = {  # the name, text or class of an error -> what it means, and what to do
    "gaierror": "{host} is not found: no such name, or no name server",
    "ENETUNREACH": "no route for {host}: the network is down, or, for a group, the route for 224.0.0.0/4 is missing",
    "EHOSTUNREACH": "no way to {host}: a firewall, a VPN, or the privacy settings of macOS (Local Network) forbid it",
    "ENODEV": "no such interface as {where}, or it is down",
    "no interface with this name": "no such interface as {where}",
    "EADDRNOTAVAIL": "{where} is no address of this machine; if it is 127.0.0.1, lo is down: sudo ip link set lo up",
    "EADDRINUSE": "port {port} is taken: a unicast URL has one watcher, and a group can be shared with eventmon alone",
    "ENETDOWN": "the interface of {where} is down",
    "EPERM": "not permitted: a firewall on this machine drops it",
    "EACCES": "not permitted: a firewall or a sandbox on this machine forbids it, or the port is below 1024",
    "nobody": "nobody confirms it: start python eventmon.py watch --url udp://0.0.0.0:{port} there, with the same key,"
    " and let UDP through its firewall",
    "nothing": "it does not come back: a firewall, a VPN that took the route, Docker's bridge or a cloud without multicast"
    " drops it; try another interface below, or unicast: start python eventmon.py watch --url udp://0.0.0.0:{port} there",
}
HEAR_TIME = 1.0  # the longest that a datagram is waited for


def in_words(problem: BaseException | None, url: Url) -> str:
    """Return what an error means, and what to do."""
    name = errno.errorcode.get(getattr(problem, "errno", None) or 0, str(problem))
    text = REASONS.get(name) or REASONS.get(type(problem).__name__, "{problem}")
    return text.format(problem=problem, where=url.interface or url.host, **url._asdict())


def try_sending(dispatcher: Dispatcher, url: Url, listens: bool) -> Iterator[str]:
    """Yield what comes of it if an event is sent, if a watcher is to confirm it, and if it is large."""
    dispatcher.send("eventmon-check")
    watchers = max(dispatcher.flush(HEAR_TIME / 5) for _ in range(5))  # each time somebody may speak up: we, if we can listen
    if not dispatcher.stats["datagrams"]:
        raise OSError(in_words(dispatcher.problem, url))
    yield "the system took a datagram"
    if not watchers:
        raise OSError(", ".join(troubles(dispatcher)) or ("nothing" if listens else "nobody"))
    yield "it has come back on this machine" if listens else "a watcher has confirmed it"
    size = MAX_LOOPBACK if on_loopback(url) else MAX_DATAGRAM
    dispatcher.send("eventmon-check", fill="x" * (size - 4 * MAX_HEADER))
    dispatcher.flush(SILENCE + BEAT)  # a watcher that has just been killed is waited for until it is taken for dead
    if dispatcher.stats["behind"]:
        raise OSError(f"{size:,} bytes do not arrive everywhere; a tunnel or VPN with a small MTU, perhaps")
    yield f"up to {size:,} bytes in a datagram"


def try_url(url: str, key: bytes) -> Iterator[str]:
    """Yield what each of STEPS finds, up to the first one in which OSError is raised."""
    parts, heard = parse_url(url), set[str]()
    handlers = {"*": lambda event: heard.add(printable(event.get("hostname")))}
    with Dispatcher(url, key=key) as dispatcher, Receiver(url, handlers, key=key) as receiver:
        Link(parts).close()
        yield f"a socket that sends to {parts.host}, ttl={parts.ttl} (0: this machine, 1: this network)"
        taken = None
        try:
            receiver.fileno()
            threading.Thread(target=receiver.capture, kwargs={"wakeup": False}, daemon=True).start()
        except OSError as problem:
            if is_group(parts.host):
                raise
            taken = f"{in_words(problem, parts)}; whoever watches there is to confirm"
        yield taken or f"{parts.host}, port {parts.port}"
        yield from try_sending(dispatcher, parts, taken is None)
        size = 0 if taken else receiver.channel.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        size //= 2 if sys.platform == "linux" else 1
        more = f" of {BUFFER:,}, so bursts are repaired: sudo sysctl -w net.core.rmem_max={BUFFER}"
        yield f"{size:,} bytes{more if size < BUFFER else ''}" if size else "the other watcher's"
        time.sleep(0.6)  # two beats of every sender
        hosts = [host for host, _ in dispatcher.watchers()]
        ours = 0 if taken else 1
        senders, watchers = receiver.stats["streams"] - ours, len(hosts) - ours
        texts = [f"{how_many(senders, 'Dispatcher')} and {how_many(watchers, 'watcher')} beside this one"]
        if watchers:
            texts.append(f"watchers are at {', '.join(sorted(set(hosts))[:MAX_TOLD])}, and prove that events get there")
        if names := heard - {printable(dispatcher.hostname)}:
            texts.append(f"events come from {', '.join(sorted(names)[:MAX_TOLD])}")
        yield "; ".join(texts + troubles(receiver) + troubles(dispatcher))


def check_steps(url: str, key: bytes) -> Iterator[str]:
    """Yield "ok" or "wrong", the name of a step and what came of it, as a line, up to the first one that is wrong."""
    found = try_url(url, key)
    for name in STEPS:
        try:
            yield f"ok    {name:<7} {next(found)}"
        except OSError as problem:
            yield f"wrong {name:<7} {in_words(problem, parse_url(url))}"
            return


def check(options: Any) -> int:
    """Try the URL in force step by step, and say what is wrong and what to do."""
    take_any_text()
    url, key, line = url_from(options.url), key_from(options.key), ""
    parts = parse_url(url)
    print(f"{url}{'  (with a key)' if key else ''}", flush=True)
    for line in check_steps(url, key):
        print(line, flush=True)
    group = parts.host if is_group(parts.host) else parse_url(DEFAULT_URL).host
    names = [name for _, name in socket.if_nameindex()]
    if sys.platform == "win32":  # where only addresses will do
        names = socket.gethostbyname_ex(socket.gethostname())[2]
    print("interfaces, of which --all-interfaces tries each:")
    for name in filter(is_host, names):  # the others have no place in a URL
        other = f"udp://{group}:{parts.port}?interface={name}&ttl={0 if name.startswith('lo') else 1}"
        outcome = [*islice(check_steps(other, key), 4)][-1] if options.all_interfaces else ""
        print(f"  {name:<10} '{other}'  {outcome}".rstrip(), flush=True)
    return 0 if line.startswith("ok") else 1


# demo


def serve(events: Dispatcher, seconds: float) -> NoReturn:
    """Be a shop, with what goes well and wrong in one, and then die."""
    from random import random, randrange

    @events.task("shop.charge")
    def charge(order: int, cents: int) -> dict[str, int]:
        time.sleep(random())
        if random() < 0.2:
            raise ConnectionRefusedError(f"the bank refuses {cents} cents for order {order}: card expired")
        return {"paid": cents}

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        number = randrange(1000, 10000)
        with suppress(ConnectionRefusedError), events.task("shop.order", args=repr((number,))) as order:
            charge(number, cents=number // 2)
            for step in range(1, 10):
                time.sleep(random() / 2)
                order.progress(step / 10)
            for retries in count():
                with events.task("mail.send", f"{order.uuid}-mail", retries=retries) as mail:
                    time.sleep(random())
                    if random() < 0.6:
                        break
                    events.send("log-warning", logger="shop", message="no answer from mail.example.com", uuid=mail.uuid)
                    mail.retried(TimeoutError("mail.example.com"))
    os._exit(1)


def demo(options: Any) -> int:
    """Show a shop at work: three worker processes, on a URL of their own, and the monitor."""
    from subprocess import DEVNULL, PIPE, Popen

    if options.worker:
        with Dispatcher(options.url, f"{options.worker}@demo", freq=1, key=options.key) as events:
            for _ in range(3):
                threading.Thread(target=serve, args=(events, 15 if options.worker == "gamma" else inf), daemon=True).start()
            sys.stdin.read()  # until the monitor ends
        return 0
    options.url = options.url or f"udp://239.255.69.86:{20000 + os.getpid() % 40000}"
    files = (__file__, sys.argv[0])  # the second may be a zip that holds it
    program = next(([file] for file in files if os.path.isfile(file)), ["-m", "eventmon"])
    words = [sys.executable, *program, "demo", *options.words, "--url", options.url, "--worker"]
    with ExitStack() as stack:
        for name in ("alpha", "beta", "gamma"):
            stack.enter_context(Popen([*words, name], stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL))
        return watch(options)


COMMANDS = {
    "watch": (watch, "show what is heard, or what a file holds, until the user or a limit ends it"),
    "send": (send, "send an event, or those on standard input, and say how many watchers have everything"),
    "run": (run, "run a command as if it were run alone, with its exit status, and send the events of a task for it"),
    "check": (check, "try the URL in force step by step, and say what is wrong and what to do"),
    "demo": (demo, "show a shop at work: three worker processes, on a URL of their own, and the monitor"),
}
EVERY = " ".join(COMMANDS)
FLAG = {"action": "store_true"}
ARGUMENTS: Any = (  # commands, name, what it is, what argparse does with it
    (EVERY, "--url", "where events are sent (default: $EVENTMON_URL, or this machine)", {}),
    (EVERY, "--key-file", "a file with the key that authenticates ($EVENTMON_KEY is one)", {}),
    (EVERY, "--version", "print the version", {"action": "version", "version": f"eventmon {__version__}"}),
    ("watch", "file", "recorded NDJSON, - for standard input", {"nargs": "?"}),
    ("watch demo", "--json", "print each event as a line of JSON", FLAG),
    ("watch demo", "--plain", "print each event as a line of text", FLAG),
    ("watch demo", "--record", "append every event to this file as NDJSON", {}),
    ("watch demo", "--type", "only types like this, as in 'task-*'; may be repeated", {"action": "append", "default": []}),
    ("watch demo", "--limit", "stop after so many events", {"type": int}),
    ("watch demo", "--timeout", "stop after so many seconds without an event", {"type": float}),
    ("watch demo", "--no-history", "begin with what is sent from now on", FLAG),
    ("send", "type", "the event's type, or - for NDJSON on standard input", {}),
    ("send", "field", "name=text, or name:=json", {"nargs": "*"}),
    ("run", "--name", "of the task (default: the command's)", {}),
    ("run", "command", "-- and the command with its arguments", {"nargs": "..."}),
    ("check", "--all-interfaces", "try each interface, too", FLAG),
    ("demo", "--worker", "", {}),
)
EXAMPLES = """examples:
  python eventmon.py watch
  python eventmon.py watch --json --type 'task-*' | jq .uuid
  python eventmon.py watch recorded.jsonl
  python eventmon.py send deploy-done version=1.2 seconds:=8.5
  python eventmon.py send - < recorded.jsonl
  python eventmon.py run --name nightly-backup -- ./backup.sh /srv
  python eventmon.py check --url 'udp://239.255.69.86:6986?interface=eth0&ttl=1'
  python eventmon.py demo

exit status: 0, 1 for a failure, 2 for wrong usage"""


def read_key(path: str) -> bytes:
    """Return the key in a file, without the white space around it; of a text with a byte order mark, the text in UTF-8."""
    with open(path, "rb") as file:
        key = file.read()
    with suppress(UnicodeError):  # a key need not be text
        key = key.decode("utf-16" if key[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig").encode()
    if not key.strip():
        raise OSError(f"key file {path} is empty")
    return key.strip()


def parse_words(name: str, words: Sequence[str]) -> Any:
    """Return the options in the words behind the name of a command."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    form, summary = argparse.RawDescriptionHelpFormatter, COMMANDS[name][1]
    parser = Parser(prog=f"eventmon {name}", description=summary, epilog=EXAMPLES, formatter_class=form)
    parser.set_defaults(file=None, key=None, words=words)
    for commands, argument, text, settings in ARGUMENTS:
        if name in commands:
            parser.add_argument(argument, help=text or argparse.SUPPRESS, **settings)
    options = parser.parse_args(words) if name == "run" else parser.parse_intermixed_args(words)
    if options.key_file:
        options.key = read_key(options.key_file)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (sys.argv[1:] if None) and return its exit status: 0, 1 failure, 2 usage.

    A command raises OSError for a failure and ValueError for wrong usage: one line on standard error.
    """
    name, *words = (sys.argv[1:] if argv is None else argv) or [""]
    try:
        if name in ("--version", "-h", "--help"):  # at once: argparse takes long to import
            print(f"eventmon {__version__}")
            if name != "--version":
                print(*(f"  {command:<6} {summary}" for command, (_, summary) in COMMANDS.items()), EXAMPLES, sep="\n")
            return 0
        if name not in COMMANDS:
            raise ValueError(f"command is {name!r}, expected one of {', '.join(COMMANDS)}; see --help")
        return COMMANDS[name][0](parse_words(name, words))
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 0 if name in ("watch", "demo") else 1
    except OSError as problem:
        if isinstance(problem, BrokenPipeError) and not problem.filename:  # whoever read us has gone,
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # which the last flush is not to find
            return 0
        complain(f"{problem.filename}: {problem.strerror}" if problem.filename else str(problem))
        return 1
    except ValueError as problem:
        complain(str(problem))
        return 2


if __name__ == "__main__":
    sys.exit(main())
