"""The specification of eventmon.py, in the order of the module: each test's name is a sentence about it."""

import asyncio
import calendar
import codecs
import contextvars
import errno
import fcntl
import gc
import heapq
import inspect
import io
import json
import linecache
import logging
import math
import os
import pathlib
import pickle
import pty
import random
import re
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import tracemalloc
import weakref
from collections import Counter, deque
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest

import eventmon
from eventmon import DEFAULT_URL, Dispatcher, Event, Receiver, State, main

MODULE = pathlib.Path(eventmon.__file__).resolve()
README = MODULE.with_name("README.md").read_text(encoding="utf-8")
SOURCE = ("127.0.0.1", 4711)
STREAM = b"0123456789abcdef"
numbers = count(os.getpid())


@pytest.fixture(autouse=True)
def url(monkeypatch):
    """A group and port of its own for each test, also for the processes it starts."""
    number = next(numbers)
    where = f"udp://239.255.{number // 200 % 200}.{1 + number % 200}:{20000 + number % 20000}?interface=127.0.0.1&ttl=0"
    monkeypatch.setenv("EVENTMON_URL", where)
    monkeypatch.delenv("EVENTMON_KEY", raising=False)
    return where


def wait_until(condition, seconds=20):
    """Return what `condition()` gives as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return value


@contextmanager
def watching(count=math.inf, **options):
    """A Receiver that captures in a thread: yields (receiver, list of events so far)."""
    with Receiver(**options) as receiver:
        receiver.fileno()
        events = []

        def capture():
            events.extend(receiver.itercapture())

        thread = threading.Thread(target=capture)
        thread.start()
        try:
            yield receiver, events
        finally:
            receiver.should_stop = True
            with suppress(OSError), eventmon.udp_socket(receiver._url) as sock:
                sock.sendto(b"wake up", receiver._url[:2])
            thread.join()


def in_threads(work, names):
    """Call work(name) for each name in a thread of its own, and wait for them."""
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def lose(share, *sockets):
    """Lose a share of what the sockets receive, inside the kernel: a classic BPF filter over a random number."""
    import ctypes

    if sys.platform != "linux":
        return  # nothing is lost then, which the tests that call this bear as well
    program = [(0x20, 0, 0, 0xFFFFF000 + 56), (0x35, 0, 1, int(share * 2**32)), (6, 0, 0, 0xFFFFFFFF), (6, 0, 0, 0)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    for sock in sockets:
        sock.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HP", len(program), ctypes.addressof(code)))


class Ear:
    """A plain socket as a Dispatcher's only hearer: the test is the watcher, and answers what it likes."""

    def __init__(self):
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.settimeout(20)
        self.address = self.socket.getsockname()
        self.url = "udp://127.0.0.1:%d" % self.address[1]
        self.sender = self.stream = None
        self.taken = count(1)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.socket.close()

    def hear(self, *kinds, key=b""):
        """Return the next datagram whose frame is of one of these kinds."""
        end = time.monotonic() + 20
        while True:
            assert time.monotonic() < end, f"waited in vain for {kinds}"
            data, self.sender = self.socket.recvfrom(65536)
            frame = eventmon.parse_frame(eventmon.unseal(data, key)[0])
            self.stream = frame.stream
            if frame.kind in kinds:
                return data

    def data(self, number, **options):
        """Return the next datagrams that carry events."""
        return [self.hear(b"data", b"part", **options) for _ in range(number)]

    def answer(self, kind, *numbers, body=b"", key=b""):
        """Send POSITION WATCHER ROOM LOST, and a TAKEN that rises."""
        frame = eventmon.format_frame(kind, self.stream, (*numbers, next(self.taken)), body)
        self.socket.sendto(eventmon.seal(frame, key), self.sender)

    def tell(self, receiver, data):
        """Be a sender: send a datagram to where a receiver listens."""
        self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        self.socket.sendto(data, receiver.channel.getsockname())

    def positions(self):
        """Return the positions in the answers that have arrived."""
        positions = []
        while select.select([self.socket], [], [], 0)[0]:
            positions.append(eventmon.parse_frame(self.socket.recv(65536)).numbers[0])
        return positions


def delivered(receiver, *datagrams):
    """The types of the events that a receiver delivers for these datagrams."""
    return [event.type for data in datagrams for event in receiver.handle_message(data, SOURCE)]


def captured(*types, **options):
    """The datagrams that a Dispatcher sends for events of these types."""
    with Ear() as ear, Dispatcher(ear.url, **options) as dispatcher:
        for type in types:
            dispatcher.send(type)
        return ear.data(len(types), key=str(options.get("key", "")).encode())


@pytest.fixture
def sockets(monkeypatch):
    """The sockets opened from now on; each calls its `before_send(data)`, which a test may set."""
    opened = []

    class Socket(socket.socket):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.before_send = lambda data: None
            opened.append(self)

        def sendto(self, data, target):
            self.before_send(data)
            return super().sendto(data, target)

    monkeypatch.setattr(eventmon.socket, "socket", Socket)
    return opened


class NoThread(threading.Thread):
    """A thread that cannot be started, as at the exit of the interpreter."""

    def start(self):
        raise RuntimeError("can't start new thread")


@pytest.fixture
def virtual(monkeypatch):
    """Virtual time in eventmon: `monotonic`, and `offset` of the clock on the wall; `naps` are those of this thread.

    Sleep takes no time, but calls `during_nap`. A Dispatcher gets no thread, which would live in another time.
    """
    me = threading.current_thread()
    it = SimpleNamespace(monotonic=1000.0, offset=0.0, naps=[], during_nap=lambda: None)

    def sleep(seconds):
        if threading.current_thread() is not me:
            return time.sleep(seconds)
        it.naps.append(seconds)
        it.monotonic += seconds
        it.during_nap()

    fake = {"monotonic": lambda: it.monotonic, "time": lambda: time.time() + it.offset, "sleep": sleep}
    monkeypatch.setattr(eventmon, "time", SimpleNamespace(**{**vars(time), **fake}))
    monkeypatch.setattr(eventmon, "threading", SimpleNamespace(**{**vars(threading), "Thread": NoThread}))
    return it


def python(code, *options):
    """Run a program beside the module, which says nothing on standard error; return its standard output."""
    words = [sys.executable, *options, "-c", code]
    done = subprocess.run(words, cwd=MODULE.parent, timeout=30, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


def run(*words, input=None, timeout=30, **options):
    """Run eventmon.py as a process; return (status, standard output, lines of standard error)."""
    done = subprocess.run(
        [sys.executable, str(MODULE), *words], input=input, capture_output=True, timeout=timeout, check=False, **options
    )
    return done.returncode, done.stdout, done.stderr.decode(errors="backslashreplace").splitlines()


@contextmanager
def running(*words, **options):
    """A process of eventmon.py that is ended afterwards."""
    process = subprocess.Popen([sys.executable, str(MODULE), *words], **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def somebody_watches():
    """Whether a watcher answers the heartbeat of a Dispatcher that sends no event."""
    with Dispatcher() as probe:
        return probe.flush()


# --- Event ---


def test_an_event_is_a_dict_with_a_type_and_a_timestamp():
    before = time.time()
    event = Event("task-started", {"uuid": "1"}, pid=7)
    assert dict(event, timestamp=0) == {"type": "task-started", "timestamp": 0, "uuid": "1", "pid": 7}
    assert before <= event["timestamp"] <= time.time()
    assert Event("x", timestamp=5).timestamp == 5


@pytest.mark.parametrize(
    "type, group, subject",
    [("task-started", "task", "started"), ("hello", "hello", ""), ("deploy-all-done", "deploy", "all-done")],
)
def test_a_type_has_a_group_and_a_subject(type, group, subject):
    event = pickle.loads(pickle.dumps(Event(type)))
    assert (event.type, event.group, event.subject) == (type, group, subject)


@pytest.mark.parametrize("type", ["", None, 5, b"x", ["x"]])
def test_a_type_that_is_not_a_non_empty_str_is_refused(type):
    with pytest.raises(ValueError, match="expected a non-empty str"):
        Event(type)


# --- the wire ---

FRAMES = [
    ((b"data", STREAM, (1,), b'{"type":"hi"}'), b'EM2 data 0123456789abcdef 1\n{"type":"hi"}'),
    ((b"data", STREAM, (10**19 - 1,), b"\n"), b"EM2 data 0123456789abcdef 9999999999999999999\n\n"),
    ((b"part", STREAM, (7, 1, 0, 3), b'{"ty'), b'EM2 part 0123456789abcdef 7 1 0 3\n{"ty'),
    ((b"beat", STREAM, (9, 2), b""), b"EM2 beat 0123456789abcdef 9 2\n"),
    ((b"bye", STREAM, (9, 2), b""), b"EM2 bye 0123456789abcdef 9 2\n"),
    ((b"ack", STREAM, (9, 5, 4096, 0, 3), b""), b"EM2 ack 0123456789abcdef 9 5 4096 0 3\n"),
    ((b"leave", STREAM, (9, 5, 4096, 0, 3), b""), b"EM2 leave 0123456789abcdef 9 5 4096 0 3\n"),
    ((b"nak", STREAM, (9, 5, 4096, 2, 3), b"10 12-14"), b"EM2 nak 0123456789abcdef 9 5 4096 2 3\n10 12-14"),
]


@pytest.mark.parametrize("fields, data", FRAMES)
def test_a_frame_is_formatted_and_parsed_as_documented(fields, data):
    assert eventmon.format_frame(*fields) == data
    assert eventmon.parse_frame(data) == fields
    assert re.search(rf"\n    EM2 {fields[0].decode()} STREAM |also {fields[0].decode()}, (the|its) last", eventmon.__doc__)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"EM2",
        b"EM2 data 0123456789abcdef 1",
        b"EM1 data 0123456789abcdef 1\n",
        b"EM2 data 0123456789abcdef\n",
        b"EM2 data 0123456789abcdef -1\n",
        b"EM2 data 0123456789abcdef 1_0\n",
        b"EM2 data 0123456789abcdef 10000000000000000000\n",
        b"EM2 data 0123456789abcdef \xb2\n",
        b"EM2 data short 1\n",
        b"EM2 data  0123456789abcdef 1\n",
        b"EM2 nope 0123456789abcdef 1\n",
        b"EM2 part 0123456789abcdef 1 2\n",
    ],
)
def test_a_frame_that_is_none_is_a_wire_error(data):
    with pytest.raises(eventmon.WireError):
        eventmon.parse_frame(data)


@pytest.mark.parametrize("ranges, body", [([(1, 1)], b"1"), ([(1, 2), (5, 5), (7, 900)], b"1-2 5 7-900")])
def test_the_ranges_of_a_nak_are_formatted_and_parsed_as_documented(ranges, body):
    assert eventmon.format_ranges(ranges) == body
    assert eventmon.parse_ranges(body) == ranges


@pytest.mark.parametrize("body", [b"", b"-", b"a", b"1,2", b"1-2-3", b"-5", b"1" * 20])
def test_ranges_that_are_none_are_a_wire_error(body):
    with pytest.raises(eventmon.WireError):
        eventmon.parse_ranges(body)


@pytest.mark.parametrize(
    "value, body",
    [
        ({"type": "hi"}, b'{"type":"hi"}'),
        ({"a": [1, 2.5, None, True, "\u65e5\u672c \U0001f600"]}, '{"a":[1,2.5,null,true,"日本 😀"]}'.encode()),
        ({"a": {"b": "\x1b[2J\n"}}, b'{"a":{"b":"\\u001b[2J\\n"}}'),
    ],
)
def test_json_is_compact_utf8_in_both_directions(value, body):
    assert eventmon.format_json(value) == body
    assert eventmon.parse_json(body) == value


@pytest.mark.parametrize(
    "body", [b"", b"{", b"{}{}", b"NaN", b'{"a":Infinity}', b"\xff", b"[" * 100000, b"'a'", b"{} x"]
)
def test_bytes_that_are_no_json_are_a_wire_error(body):
    with pytest.raises(eventmon.WireError):
        eventmon.parse_json(body)


class Rude:
    def __repr__(self):
        raise RuntimeError("no")


class Shy:
    @property
    def __class__(self):
        raise RuntimeError("no")

    def __repr__(self):
        return "<Shy>"


class Fickle(dict):
    def items(self):
        raise RuntimeError("no")

    __iter__ = items


def circular():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "value, sent",
    [
        ({1}, "{1}"),
        (b"x", "b'x'"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        ("a\udc80", "a\\udc80"),
        (1 + 2j, "(1+2j)"),
        ({(1, 2): 3}, {"(1, 2)": 3}),
        (Rude(), "<Rude whose repr raises RuntimeError>"),
        ([Rude()], ["<Rude whose repr raises RuntimeError>"]),
        (circular(), ["[...]"]),
        (Fickle(a=1), "{'a': 1}"),
        ((1, (2,)), [1, [2]]),
        ({"a": {"b": math.nan}}, {"a": {"b": "nan"}}),
        ([math.nan, Shy()], ["nan", "<Shy>"]),
    ],
)
def test_what_json_has_no_form_for_is_sent_as_something_readable(value, sent):
    assert json.loads(eventmon.format_json({"value": value})) == {"value": sent}


def test_values_that_name_each_other_have_an_end():
    crowd = [{} for _ in range(12)]
    for one in crowd:
        one.update((str(n), other) for n, other in enumerate(crowd))
    assert 1000 < len(eventmon.format_json(crowd)) < 20_000_000


def test_numbers_and_nesting_too_big_for_others_are_sent_as_something_readable():
    deep = []
    for _ in range(100000):
        deep = [deep]
    assert "[[" in eventmon.format_json({"deep": deep}).decode()
    assert json.loads(eventmon.format_json({"big": 10**5000}))


def test_one_datagram_carries_an_event_or_an_array_of_them():
    assert [event.type for event in eventmon.parse_events(b' [{"type":"a"},{"type":"b","timestamp":3}] ')] == ["a", "b"]
    assert eventmon.parse_events(b'{"type":"a","timestamp":3}') == [{"type": "a", "timestamp": 3}]


@pytest.mark.parametrize("body", [b"1", b"[1]", b"{}", b'{"type":""}', b'{"type":5}', b'[{"type":"a"},{}]', b'"a"'])
def test_json_that_is_no_event_is_a_wire_error(body):
    with pytest.raises(eventmon.WireError):
        eventmon.parse_events(body)


def test_a_sealed_frame_opens_with_its_key_alone_and_for_half_a_minute(virtual):
    frame = eventmon.format_frame(b"data", STREAM, (1,), b"{}")
    first, data = eventmon.seal(frame, b"key"), eventmon.seal(frame, b"key")
    opened, serial = eventmon.unseal(data, b"key")
    assert opened == frame
    assert serial > eventmon.unseal(first, b"key")[1]  # so that a datagram sent again is known
    for changed in (data.replace(b" 1 ", b" 2 ", 1), data + b" ", data[:-3], frame, b"", b"EM2\n"):
        with pytest.raises(eventmon.Rejected):
            eventmon.unseal(changed, b"key")
    with pytest.raises(eventmon.Rejected, match="not sealed with this key"):
        eventmon.unseal(data, b"kez")
    for offset, way in ((32, "behind"), (-32, "ahead")):
        virtual.offset = offset
        with pytest.raises(eventmon.Skewed, match=f"sealed by a clock 3. s {way} of this one"):
            eventmon.unseal(data, b"key")
    assert eventmon.seal(frame, b"") == frame == eventmon.unseal(frame, b"")[0]


# --- the windows: as pure functions of time, then on a virtual network in virtual time ---


def frames_sent(window, numbers, size=300):
    """Let a TransmitWindow keep datagrams with these numbers."""
    for number in numbers:
        assert window.next == number
        window.add(b"%d " % number + b"x" * size)
    return window


def cost(count, size=300):
    """What so many datagrams take of a watcher's buffer."""
    return count * (eventmon.DATAGRAM_COST + size + 4)


def test_the_history_is_bounded_and_keeps_the_newest():
    window = frames_sent(eventmon.TransmitWindow(limit=100_000), range(1, 2001))
    assert 1500 < window.trail < 1800 and window.next == 2001
    repaired = window.repairs([(1, 3000)], 1 << 20, 0.0)
    assert repaired[0].startswith(b"%d " % window.trail) and len(repaired) == 2001 - window.trail


def test_a_repair_goes_out_once_however_many_ask_and_never_more_than_so_many_a_second():
    window = frames_sent(eventmon.TransmitWindow(), range(1, 201), 40_000)
    assert len(window.repairs([(1, 20)], 10**9, 0.0)) == 20
    assert window.repairs([(1, 20)], 10**9, 0.001) == []
    assert len(window.repairs([(5, 5)], 0, 0.01)) == 1  # one also where there is no room for it
    sent = sum(len(frame) for step in range(200) for frame in window.repairs([(1, 200)], 10**9, 0.02 + step / 100))
    assert sent < 2 * (18 << 20)  # in two seconds, with what may come at once
    assert window.repairs([(900, 10**18)], 10**9, 5.0) == []


def test_a_sender_waits_for_a_watcher_without_room_until_it_advances():
    window = frames_sent(eventmon.TransmitWindow(), range(1, 11))
    assert window.horizon == math.inf  # nobody is known
    assert window.on_ack(7, 5, cost(5), 0, 1, now=1.0)
    assert window.cost <= window.horizon
    frames_sent(window, range(11, 13))
    assert window.cost > window.horizon and window.lacking(1.0) == [(7, 0)]
    assert window.on_ack(7, 12, cost(5), 0, 2, now=1.1)
    assert window.cost <= window.horizon and window.lacking(1.1) == [(0, 0)]


def test_what_was_not_sent_cannot_be_confirmed():
    window = frames_sent(eventmon.TransmitWindow(), range(1, 4))
    assert not window.on_ack(7, 4, 1000, 0, 1, now=0.0)
    assert window.lacking(0.0) == []


def test_a_watcher_that_gave_datagrams_up_lacks_them_though_it_has_the_last():
    window = frames_sent(eventmon.TransmitWindow(), range(1, 11))
    window.on_ack(7, 10, 1000, 4, 1, now=0.0)
    assert window.lacking(0.0) == [(0, 4)]


def waits_until(window, since, step=0.01, most=1000):
    """Let send() wait as long as the window says so; return for how long it did, in all."""
    now = since
    for _ in range(most):
        window.look_ahead(now)
        if window.cost <= window.horizon:
            break
        window.waited(now, now + step)
        now += step
    return now - since


def test_a_watcher_that_stands_still_is_waited_for_a_quarter_of_a_second_until_it_advances():
    window = frames_sent(eventmon.TransmitWindow(), range(1, 11))
    window.on_ack(7, 5, 0, 0, 1, now=0.0)
    assert waits_until(window, 0.0) == pytest.approx(0.25, abs=0.011)
    assert waits_until(window, 1.0) == 0  # it costs this once
    window.on_ack(7, 5, 0, 0, 2, now=1.5)
    assert waits_until(window, 1.5) == pytest.approx(0.25, abs=0.011)


def test_a_watcher_that_advances_now_and_then_is_waited_for_at_most_half_of_the_time():
    window = frames_sent(eventmon.TransmitWindow(), range(1, 2001))
    now = waited = 0.0
    for position in range(400):  # the sender works for 10 ms, then waits as long as it is to
        now += 0.01
        window.on_ack(7, position, 0, 0, position, now)
        spent = waits_until(window, now, most=5)
        now, waited = now + spent, waited + spent
    assert 1.0 < waited <= 1.0 + (now - waited) + 0.05
    patient = frames_sent(eventmon.TransmitWindow(patient=60.0), range(1, 11))
    patient.on_ack(7, 5, 0, 0, 1, now=0.0)
    assert waits_until(patient, 0.0, step=1.0) == 60  # as long as it lives


def test_threads_that_wait_at_the_same_time_wait_once():
    window = frames_sent(eventmon.TransmitWindow(), range(1, 11))
    window.on_ack(7, 5, 0, 0, 1, now=0.0)
    for _ in range(20):
        window.waited(0.0, 0.1)
    assert waits_until(window, 0.1) == pytest.approx(0.15, abs=0.011)


def test_a_new_stream_waits_for_a_first_answer_after_a_hundred_datagrams_and_only_once():
    window = eventmon.TransmitWindow()
    window.open(now=0.0)
    frames_sent(window, range(1, 100))
    assert window.cost <= window.horizon
    frames_sent(window, range(100, 120))
    assert waits_until(window, 0.0) == pytest.approx(0.25, abs=0.011)
    assert waits_until(window, 0.3) == 0
    window.open(now=10.0)
    window.on_ack(7, 119, cost(50), 0, 1, now=10.1)
    assert window.cost <= window.horizon


def test_only_64_watchers_are_waited_for_and_the_dead_make_room():
    window = frames_sent(eventmon.TransmitWindow(), range(1, 11))
    for name in range(100):
        assert window.on_ack(name, 10, 1000, 0, 1, now=0.0)
    assert len(window.live(0.0)) == 64
    assert window.on_ack(200, 10, 1000, 0, 1, now=5.0) and len(window.live(5.0)) == 1
    window.leave(200)
    assert window.live(5.0) == []


def receive_window(start=1, **counts):
    counts = {"lost": 0, "repaired": 0, "duplicates": 0, "held": 0, **counts}
    return eventmon.ReceiveWindow(start, 0.0, lambda: 0.5, counts), counts


def arrive(window, *numbers, now=0.0, size=10):
    return [item for number in numbers for item in window.receive(number, number, size, now)]


def test_datagrams_are_delivered_once_and_in_order():
    window, counts = receive_window()
    assert window.in_order(1) and not window.in_order(1) and not window.in_order(3)
    assert arrive(window, 3, 5, 3, 1, 2) == [2, 3]
    assert arrive(window, 4, 4, 6) == [4, 5, 6]
    assert counts == {"lost": 0, "repaired": 0, "duplicates": 3, "held": 0}


def test_what_is_missing_is_asked_for_after_a_moment_and_again_ever_less_often():
    window, counts = receive_window()
    arrive(window, 1, 4, 5, 8)
    asked = [0.0005 * step for step in range(1, 400) if window.missing(0.0005 * step)]
    assert 0.001 <= asked[0] <= 0.004
    pauses = [later - sooner for sooner, later in zip(asked, asked[1:])]
    assert pauses[0] <= 0.011 and max(pauses[1:8]) <= 0.04  # later without credit, one a beat
    assert window.overdue(0.2) == [] and not window.missing(0.0005 * 400 + 0.0001)
    assert arrive(window, 2, 3, now=0.25) == [2, 3, 4, 5] and counts["repaired"] == 2


def test_no_more_than_the_reach_is_asked_for_at_a_time():
    window, _ = receive_window()
    window.reach = 100
    arrive(window, 1000)
    assert window.missing(0.1) == [(1, 100)]
    arrive(window, *range(1, 101), now=0.11)
    assert window.missing(0.11) == [(101, 200)]  # the last one asked for is there: go on at once


def test_a_gap_is_given_up_a_second_after_it_was_known_and_counted():
    window, counts = receive_window()
    arrive(window, 1, 3, now=1.0)
    arrive(window, 6, now=1.5)
    assert window.overdue(1.85) == [] and window.overdue(1.95) == [3]
    assert window.overdue(2.3) == [] and window.overdue(2.45) == [6]
    assert counts["lost"] == window.lost == 3 and window.give_up_at() == math.inf


def test_all_gaps_that_a_dead_sender_leaves_are_given_up_together():
    window, counts = receive_window()
    arrive(window, *range(2, 2001, 2), now=1.0)
    assert window.overdue(1.95) == [*range(2, 2001, 2)] and counts["lost"] == 1000


def test_a_long_history_is_not_given_up_as_long_as_it_is_being_repaired():
    window, counts = receive_window()
    window.announce(500, 1, now=0.0)
    for number in range(1, 500):  # one each 10 ms
        assert window.overdue(number / 100) == []
        arrive(window, number, now=number / 100)
    assert window.overdue(5.8) == [] and counts["lost"] == 0
    window.overdue(6.0)
    assert counts["lost"] == 1


def test_what_was_gone_before_we_came_is_not_lost_but_what_goes_later_is():
    window, counts = receive_window()
    window.announce(20, 11, now=0.0)
    assert window.next == 11 and counts["lost"] == 0
    window.announce(20, 16, now=0.1)
    window.overdue(0.1)
    assert window.next == 16 and counts["lost"] == 5
    here, counts = receive_window()
    here.announce(0, 1, now=0.0)  # we are here before the first one is sent
    here.announce(20, 16, now=0.1)
    here.overdue(0.1)
    assert counts["lost"] == 15


def test_a_trail_that_passes_what_is_held_back_loses_none_of_it():
    window, counts = receive_window()
    arrive(window, 5, 6, 8)
    assert window.announce(8, 7, now=0.0) == [5, 6]
    assert arrive(window, 7, now=0.1) == [7, 8] and counts["held"] == counts["lost"] == 0


def test_what_is_held_back_is_bounded_and_asked_for_again():
    window, counts = receive_window(held=eventmon.ReceiveWindow.MAX_HELD - 25)
    assert arrive(window, 2, 3, 4, 5) == []
    assert counts["held"] == eventmon.ReceiveWindow.MAX_HELD - 5 and window.missing(0.1) == [(1, 1), (4, 5)]
    assert arrive(window, 1, now=0.1) == [1, 2, 3]


class VirtualSocket:
    """A UDP socket on a virtual network."""

    def __init__(self, network, name, space):
        self.network, self.name, self.space = network, name, space
        self.inbox, self.closed = deque(), False
        network.sockets[name] = self

    def sendto(self, data, to):
        self.network.send(data, self.name, to)

    def recvfrom(self, size):
        if not self.inbox:
            raise BlockingIOError
        data, source = self.inbox.popleft()
        self.space += len(data) + 1024
        return data, source

    def put(self, data, source):
        if self.space > 0 and not self.closed:
            self.space -= len(data) + 1024
            self.inbox.append((data, source))

    def getsockopt(self, *_):
        return self.space

    def setsockopt(self, *_):
        pass

    def fileno(self):
        return 0

    def close(self):
        self.closed = True

    detach = close


class Network:
    """A network that loses, repeats, reorders, delays and cuts off, whose time passes as whoever is there sleeps.

    It drives whole Dispatchers and Receivers, whose sockets, clocks and threads it replaces.
    """

    def __init__(self, seed, monkeypatch, loss=0.0, repeat=0.0, delay=0.001, space=1 << 20, history=8 << 20):
        self.random, self.loss, self.repeat, self.delay, self.space = random.Random(seed), loss, repeat, delay, space
        self.now, self.packets, self.sockets, self.cut_off = 1000.0, [], {}, set()
        self.senders, self.watchers, self.busy = [], [], set()
        self.ports = count(1)
        clock = SimpleNamespace(
            monotonic=lambda: self.now, time=lambda: self.now, sleep=self.run, localtime=time.localtime
        )
        clock.time_ns = lambda: int(self.now * 1e9)
        threads = SimpleNamespace(RLock=threading.RLock, Thread=self.thread)
        for name, stand_in in {
            "time": clock,
            "threading": threads,
            "listen": lambda url: self.socket("group", self.space),
            "udp_socket": lambda url: self.socket("host", 1 << 20),
            "TransmitWindow": type("TransmitWindow", (eventmon.TransmitWindow,), {"limit": property(lambda _: history, lambda *_: None)}),
            "inode": lambda sock: 1,
            "wait_for": lambda *_: None,
        }.items():
            monkeypatch.setattr(eventmon, name, stand_in)

    def thread(self, target, **_):
        return SimpleNamespace(start=lambda: self.senders.append(target.__self__))

    def socket(self, kind, space):
        return VirtualSocket(self, (kind, next(self.ports)), space)

    def send(self, data, source, to):
        for name, sock in list(self.sockets.items()):
            if (name == to or to[0] not in ("host", "group") and name[0] == "group") and not sock.closed:
                lost = self.random.random() < self.loss or {name[1], source[1]} & self.cut_off
                for _ in range(0 if lost else 1 + (self.random.random() < self.repeat)):
                    when = self.now + self.random.random() * self.delay
                    heapq.heappush(self.packets, (when, next(self.ports), sock, data, source))

    def run(self, seconds):
        end = self.now + seconds
        while self.now < end:
            due = self.packets[0][0] if self.packets else math.inf
            rest = min((watcher.receiver.pause(0.02) for watcher in self.watchers), default=0.02)
            self.now = min(end, max(due, self.now + 0.002), self.now + max(0.002, rest))
            while self.packets and self.packets[0][0] <= self.now:
                _, _, sock, data, source = heapq.heappop(self.packets)
                sock.put(data, source)
            for sender in self.senders:
                if sender not in self.busy:
                    self.busy.add(sender)
                    sender._tend()
                    self.busy.discard(sender)
            for watcher in self.watchers:
                watcher.take()

    def watch(self, **options):
        self.watchers.append(Watcher(self, **options))
        return self.watchers[-1]

    def kill(self, sender):
        """The process of a Dispatcher is gone, without a word."""
        self.senders.remove(sender)
        sender._closed = sender._ended = True


class Watcher:
    """A Receiver on a virtual network, and what it has heard from each sender."""

    def __init__(self, network, wakeup=True, batch=None, **options):
        self.network, self.wakeup, self.batch = network, wakeup, batch
        self.receiver = Receiver(**options)
        self.receiver.fileno()
        self.heard = {}
        self.asleep = False

    def take(self):
        if not self.asleep:
            for event in self.receiver.itercapture(self.batch, 0, self.wakeup):
                if event.type == "test-number":
                    self.heard.setdefault(event["sender"], []).append(event["n"])


def simulate(seed, monkeypatch):
    """One life of some senders and watchers; everything that is promised is checked at its end."""
    dice = random.Random(seed)
    hard = dice.random() < 0.5  # whether more is lost than can be repaired
    history = dice.choice((8 << 20, 20_000, 3_000)) if hard else 8 << 20
    network = Network(
        seed,
        monkeypatch,
        loss=dice.choice((0.0, 0.05, 0.3)),
        repeat=dice.choice((0.0, 0.2)),
        delay=dice.choice((0.0005, 0.003, 0.01)),
        space=dice.choice((60_000, 1 << 20)) if hard else 4 << 20,
        history=history,
    )
    key = dice.choice((None, "secret"))
    for _ in range(dice.randint(1, 2)):
        network.watch(key=key, batch=dice.choice((None, None, 3)))
    early = list(network.watchers)
    buffered = dice.random() < 0.3
    options = {"key": key, "buffer_group": ("test",) if buffered else (), "buffer_limit": 5}
    senders = [Dispatcher(hostname=f"s{number}", **options) for number in range(dice.randint(1, 3))]
    sent, killed = Counter(), set()
    network.loss, loss = 0.0, network.loss
    for sender in senders if history < 8 << 20 else ():
        sender.flush()  # whoever is there hears of the stream, and knows from then on what it has missed
    network.loss = loss
    for step in range(dice.randint(5, 40)):
        sender = dice.choice(senders)
        if sender.hostname not in killed:
            for _ in range(dice.choice((1, 1, 1, 5, 30))):
                sent[sender.hostname] += 1
                text = "x" * (100_000 if dice.random() < 0.01 else dice.choice((0, 300)))
                sender.send("test-number", sender=sender.hostname, n=sent[sender.hostname], text=text)
        if dice.random() < 0.5:
            network.run(dice.choice((0.001, 0.02, 0.2)))
        if hard and dice.random() < 0.1:
            victim = dice.choice(early)
            victim.asleep = not victim.asleep
        if hard and dice.random() < 0.05:
            network.cut_off = {dice.randint(1, 9)} if dice.random() < 0.5 else set()
        if hard and step == 30:
            network.kill(sender)
            killed.add(sender.hostname)
        if dice.random() < 0.02:
            network.watch(key=key)
    network.cut_off = set()
    for watcher in network.watchers:
        watcher.asleep = False
    confirmed = {}
    for sender in senders:
        if sender.hostname not in killed:
            confirmed[sender.hostname] = sender.flush(5), sender.stats["watchers"]
    for sender in senders:
        if sender.hostname not in killed:
            sender.close()
    network.run(3.0 if hard else 1.5)
    for watcher in network.watchers:
        stats, whole = watcher.receiver.stats, True
        for name, numbers in watcher.heard.items():
            assert numbers == sorted(set(numbers)), (seed, name, "twice, or out of order")
        if watcher not in early:
            continue
        for name in sent:
            missing = sent[name] - len(watcher.heard.get(name, ()))
            whole = whole and not missing
            # a sender that has ended before it heard of a watcher has not waited for it
            heard_of_all = name in confirmed and confirmed[name][1] >= len(network.watchers)
            assert hard or not missing or not heard_of_all, (seed, name, stats, "lost what could be repaired")
            assert not missing or name in killed or stats["lost"], (seed, name, missing, stats, "lost in silence")
        assert not whole or not stats["lost"], (seed, stats, "counted as lost what has come")
    for name, (number, watchers) in confirmed.items():
        # one that came late has everything if it has what could still be had
        having = sum(
            len(watcher.heard.get(name, ())) == sent[name] or history < 8 << 20 and watcher not in early
            for watcher in network.watchers
        )
        assert number <= having, (seed, name, "confirmed by who has not everything")
        assert hard or number == watchers, (seed, name, number, "not confirmed by who has everything")


BASE = random.SystemRandom().randrange(10**6)


@pytest.mark.parametrize("hundred", range(6))
def test_on_a_bad_network_everything_arrives_once_in_order_or_is_counted(hundred, monkeypatch):
    print("base", BASE)
    for seed in range(BASE + 100 * hundred, BASE + 100 * hundred + 100):
        with monkeypatch.context() as patch:
            simulate(seed, patch)


# --- URL and sockets ---


@pytest.mark.parametrize(
    "text, parts",
    [
        (DEFAULT_URL, ("239.255.69.86", 6986, "127.0.0.1", 0)),
        ("udp://239.1.2.3:7000", ("239.1.2.3", 7000, "127.0.0.1", 0)),
        ("udp://239.1.2.3:7000/?interface=eth0&ttl=255", ("239.1.2.3", 7000, "eth0", 255)),
        ("udp://127.0.0.1:1", ("127.0.0.1", 1, "", 0)),
        ("udp://watcher.example:65535?ttl=3", ("watcher.example", 65535, "", 3)),
    ],
)
def test_a_url_names_host_port_interface_and_ttl(text, parts):
    assert eventmon.parse_url(text) == parts


@pytest.mark.parametrize(
    "text, part",
    [
        ("", "scheme"),
        ("tcp://239.1.2.3:7000", "scheme"),
        ("239.1.2.3:7000", "scheme"),
        ("udp://239.1.2.3", "port"),
        ("udp://239.1.2.3:0", "port"),
        ("udp://239.1.2.3:65536", "[Pp]ort"),
        ("udp://239.1.2.3:x", "[Pp]ort"),
        ("udp://:7000", "host"),
        ("udp://239.1.2:7000", "host"),
        ("udp://239.1.2.300:7000", "host"),
        ("udp://0xEF.0xFF.77.99:7000", "host"),  # a group that leaves the machine, in another form
        ("udp://0xEFFF4D63:7000", "host"),
        ("udp://0357.1.2.3:7000", "host"),
        ("udp://239.1.2.3\0:7000", "host|character"),
        ("udp://[ff02::1]:7000", "host"),
        ("udp://user:secret@239.1.2.3:7000", "user"),
        ("udp://239.1.2.3:7000/path", "path"),
        ("udp://239.1.2.3:7000#x", "path"),
        ("udp://239.1.2.3:7000?ttl=256", "ttl"),
        ("udp://239.1.2.3:7000?ttl=-1", "ttl"),
        ("udp://239.1.2.3:7000?ttl=", "ttl"),
        ("udp://239.1.2.3:7000?interface=", "interface"),
        ("udp://239.1.2.3:7000?interface=999.1.1.1", "interface"),
        ("udp://239.1.2.3:7000?interface=%00", "interface"),
        ("udp://a..b:7000", "host"),
        (f"udp://{'a' * 64}:7000", "host"),
        (None, "url None"),
        ("udp://239.1.2.3:7000?key=secret", "option"),
        ("udp://239.1.2.3:7000?ttl=1&ttl=1", "twice"),
        ("udp://239.1.2.3:7000?ttl", "ttl|query|field"),
    ],
)
def test_a_bad_url_is_a_value_error_that_says_which_part(text, part):
    with pytest.raises(ValueError, match=part):
        eventmon.parse_url(text)
    for user in (Dispatcher, Receiver):
        with pytest.raises(ValueError, match="url 'udp://"):
            user(text if str(text).startswith("udp://") else "udp://")


def test_the_environment_overrides_the_default_url_and_an_argument_overrides_both(monkeypatch):
    monkeypatch.setenv("EVENTMON_URL", "udp://239.1.2.3:7000")
    assert Dispatcher().url == Receiver().url == "udp://239.1.2.3:7000"
    assert Dispatcher("udp://239.1.2.4:7000").url == "udp://239.1.2.4:7000"
    monkeypatch.delenv("EVENTMON_URL")
    assert Dispatcher().url == DEFAULT_URL


def test_nothing_leaves_the_machine_unless_the_url_says_so(url, sockets):
    with Dispatcher() as dispatcher, Receiver() as receiver:
        dispatcher.send("hello")
        receiver.fileno()
        for sock in sockets:
            assert socket.inet_ntoa(sock.getsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, 4)) == "127.0.0.1"
            assert sock.getsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL) == 0
            assert sock.getsockname()[0] in ("127.0.0.1", eventmon.parse_url(url).host)
    assert len(sockets) == 3


def test_a_receiver_hears_its_own_group_alone(url):
    with Receiver() as receiver, Dispatcher(url.replace("239.255", "239.254")) as foreign, Dispatcher() as dispatcher:
        receiver.fileno()
        foreign.send("foreign")
        dispatcher.send("ours")
        assert [event.type for event in receiver.itercapture(limit=1, timeout=20)] == ["ours"]


def test_an_interface_can_be_named(url):
    (name,) = (name for _, name in socket.if_nameindex() if name in ("lo", "lo0"))
    where = url.replace("127.0.0.1", name)
    with Receiver(where) as receiver, Dispatcher(where) as dispatcher:
        receiver.fileno()
        dispatcher.send("hello")
        assert [event.type for event in receiver.itercapture(limit=1, timeout=20)] == ["hello"]


def test_a_host_that_is_no_group_is_reached_by_unicast():
    with Ear() as free:
        where = free.url
    with Dispatcher(where) as dispatcher:
        dispatcher.send("before")
        with watching(url=where) as (_, events):
            dispatcher.send("after")
            wait_until(lambda: len(events) == 2 and dispatcher.flush() == 1)
    assert [event.type for event in events] == ["before", "after"]


# --- Dispatcher ---


def test_an_event_says_who_sent_it_and_when():
    with Receiver() as receiver, Dispatcher(hostname="me") as dispatcher:
        receiver.fileno()
        sent = dispatcher.send("hello", n=1)
        blind = dispatcher.send("hello", blind=True)
        assert isinstance(sent, Event)
        assert {"type": "hello", "hostname": "me", "pid": os.getpid(), "n": 1}.items() <= sent.items()
        assert sent.keys() - {"n"} == {"type", "timestamp", "hostname", "pid", "utcoffset", "clock"}
        assert "clock" not in blind
        first, _second = receiver.itercapture(limit=2, timeout=20)
    assert first.pop("local_received") >= sent["timestamp"]
    assert first == sent


@pytest.mark.parametrize("zone", ["UTC0", "EST5EDT", "IST-1GMT0,M10.5.0,M3.5.0/1"])  # the last is Dublin's
def test_the_utcoffset_is_what_the_clock_on_the_wall_says(zone, monkeypatch):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        with Dispatcher() as dispatcher:
            utcoffset, now = dispatcher.send("hello")["utcoffset"], int(time.time())
        assert utcoffset == (now - calendar.timegm(time.localtime(now))) / 3600
    finally:
        monkeypatch.undo()
        time.tzset()


def test_the_clock_is_shared_by_the_process_and_goes_past_what_is_received():
    with Receiver() as receiver, Dispatcher() as one, Dispatcher() as two:
        receiver.fileno()
        assert one.send("a")["clock"] < two.send("b")["clock"] < one.send("c")["clock"]
        far = one.send("c")["clock"] + 10**6
        receiver.handle_message(b'[{"type":"far","clock":%d},{"type":"near","clock":1}]' % far, SOURCE)
        assert one.send("d")["clock"] > far
        for bad in (b'"x"', b"1e300", b"true", b"null", b"9" * 30):
            receiver.handle_message(b'{"type":"bad","clock":%b}' % bad, SOURCE)
        assert one.send("e")["clock"] < 2 * far


def test_a_field_may_have_any_name():
    with Dispatcher() as dispatcher:
        assert dispatcher.send("hello", self=1, event=2, hostname="other")["hostname"] == "other"


def test_what_send_returns_is_in_the_kernel_even_if_the_process_dies_at_once():
    with Receiver() as receiver:
        receiver.fileno()
        python("import os, eventmon; eventmon.Dispatcher().send('last-words'); os._exit(0)")
        assert [event.type for event in receiver.itercapture(limit=1, timeout=20)] == ["last-words"]


def test_misuse_is_a_value_error():
    dispatcher = Dispatcher()
    for type in ("", None, ["x"]):
        with pytest.raises(ValueError, match="expected a non-empty str"):
            dispatcher.send(type)
        with pytest.raises(ValueError, match="expected a non-empty str"):
            dispatcher.publish({"type": type})
    with pytest.raises(ValueError, match=r"17,825,\d\d\d bytes .* 16,777,216"):
        dispatcher.send("big", x="x" * (17 << 20))
    dispatcher.close()
    with pytest.raises(ValueError, match="closed"):
        dispatcher.send("late")


def test_a_disabled_dispatcher_sends_nothing_and_tells_when_it_changes():
    calls = []
    with Dispatcher(enabled=False) as dispatcher:
        dispatcher.on_enabled.add(lambda: calls.append("on"))
        dispatcher.on_disabled.add(lambda: calls.append("off"))
        assert dispatcher.send("x") is None
        dispatcher.enable()
        dispatcher.enable()
        assert dispatcher.send("x")
        dispatcher.disable()
        assert dispatcher.send("x") is None
        assert calls == ["on", "off"]
        assert dispatcher.stats["events"] == 1


@pytest.mark.parametrize("groups, sent", [({"task"}, ["task-sent"]), ([], ["hello", "worker-x", "task-sent"])])
def test_only_the_groups_asked_for_are_sent_and_all_if_there_are_none(groups, sent):
    with Dispatcher(groups=groups) as dispatcher:
        got = [dispatcher.publish({"type": "hello"}), dispatcher.send("worker-x"), dispatcher.send("task-sent")]
        assert [event["type"] for event in got if event] == sent
        assert dispatcher.stats["events"] == len(sent)


def test_a_ready_event_is_forwarded_as_it_is():
    ready = {"type": "task-sent", "hostname": "far@away", "clock": 5, "timestamp": 1.5, "x": None}
    with Receiver() as receiver, Dispatcher() as dispatcher:
        receiver.fileno()
        assert dispatcher.publish(ready) == ready
        (event,) = receiver.itercapture(limit=1, timeout=20)
    event.pop("local_received")
    assert event == ready


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"text": 'ü "quoted" \n', "deep": {"list": [1, None, True]}, "number": 1.5},
        {"odd": float("nan"), "object": object, "surrogate": "\ud800"},
        {"hostname": "other", "clock": 7},
        {"timestamp": 5},
        {"blind": True},
        {"long": "x" * 200000},
    ],
)
@pytest.mark.parametrize("type", ["task-progress", 'a "type" of ours: ü %s', "x" * 200])
def test_what_send_returns_is_what_arrives(type, fields):
    with Ear() as ear, Dispatcher(ear.url, hostname="100%") as dispatcher, Receiver() as receiver:
        for _ in range(2):  # the second time the type is known
            sent, events = dispatcher.send(type, **fields), []
            while not events:
                events = receiver.handle_message(ear.hear(b"data", b"part"), SOURCE)
            (event,) = events
            assert abs(event.pop("local_received") - time.time()) < 60
            if "odd" not in fields:
                assert event == sent
            assert list(event) == list(sent)
            assert {"type", "timestamp", "hostname", "pid", "utcoffset"} <= event.keys()
            assert ("clock" in event) == ("blind" not in fields)


def test_buffered_groups_are_sent_together_and_in_order_with_the_others():
    with Ear() as ear, Dispatcher(ear.url, buffer_group={"task"}, buffer_limit=3) as dispatcher:
        for n in range(8):
            dispatcher.send("task-progress", n=n)
        dispatcher.send("hello", n=8)
        assert dispatcher.stats["events"] == 9
        got = []
        while len(got) < 9:
            got += [eventmon.parse_events(eventmon.parse_frame(ear.hear(b"data")).body)]
            assert dispatcher.stats["events"] == 9
            if sum(map(len, got)) == 9:
                break
    assert [event["n"] for events in got for event in events] == list(range(9))
    assert 3 <= len(got) < 9


def test_a_buffered_event_does_not_wait_for_another():
    with watching() as (_, events), Dispatcher(buffer_group={"task"}) as dispatcher:
        for n in range(3):
            dispatcher.send("task-progress", n=n)
            wait_until(lambda n=n: len(events) == n + 1)


def test_flush_tells_how_many_watchers_have_everything():
    with Dispatcher(buffer_group={"task"}) as dispatcher:
        assert dispatcher.flush() == 0
        with watching() as (_, one), watching() as (_, two):
            for n in range(100):
                dispatcher.send("task-progress", n=n)
            assert dispatcher.flush(20) == 2
            assert (dispatcher.stats["watchers"], dispatcher.stats["behind"]) == (2, 0)
            assert len(one) == len(two) == 100 or wait_until(lambda: len(one) == len(two) == 100)
        wait_until(lambda: dispatcher.stats["watchers"] == 0)  # they have said goodbye


def test_flush_before_the_first_event_finds_who_watches():
    with watching(), Dispatcher() as dispatcher:
        assert dispatcher.flush() == 1


def test_flush_does_not_count_a_watcher_that_gave_an_event_up():
    with Ear() as ear, Dispatcher(ear.url) as dispatcher:
        dispatcher.send("hello")
        ear.hear(b"data")
        ear.answer(b"ack", 0, 7, 10**6, 0)
        wait_until(lambda: dispatcher.stats["watchers"])
        assert (dispatcher.stats["behind"], dispatcher.flush(0)) == (1, 0)
        ear.answer(b"ack", 1, 7, 10**6, 0)
        assert (dispatcher.flush(20), dispatcher.stats["behind"]) == (1, 0)
        ear.answer(b"ack", 1, 7, 10**6, 1)
        wait_until(lambda: dispatcher.stats["behind"])
        assert dispatcher.flush(0.1) == 0
        ear.answer(b"ack", 2, 8, 10**6, 0)  # what was never sent
        wait_until(lambda: dispatcher.stats["rejected"])
        assert dispatcher.stats["watchers"] == 1


def test_large_and_small_events_arrive_over_sockets_that_lose_a_tenth(sockets):
    sizes = [10, 5 << 20, 10, 9 << 20, 100000, 10]  # two of them together larger than the history
    with watching() as (receiver, events), Dispatcher() as dispatcher:
        dispatcher.send("size", x="")
        lose(0.1, *sockets)
        for size in sizes:
            dispatcher.send("size", x="日"[: size % 10] + "x" * size)
        assert dispatcher.flush(30) == 1
        wait_until(lambda: len(events) == 1 + len(sizes))
        assert receiver.stats["lost"] == 0
    assert [event["x"].count("x") for event in events] == [0, *sizes]


@pytest.mark.parametrize("local, most", [(False, 1400), (True, 61440)])
def test_a_datagram_fits_the_network_that_carries_it(local, most, monkeypatch):
    monkeypatch.setattr(eventmon, "on_loopback", lambda url: local)
    with Ear() as ear, Dispatcher(ear.url, buffer_group={"task"}, key="secret") as dispatcher:
        dispatcher.send("hello", x="x" * 100000)
        for _ in range(24):
            dispatcher.send("task-progress", x="x" * 100)
        dispatcher.send("bye")
        sizes, last = [], b""
        while b'"bye"' not in last:
            last = ear.hear(b"data", b"part", key=b"secret")
            sizes.append(len(last))
    assert 0.9 * most < max(sizes) <= most


def test_while_a_name_is_resolved_events_wait_in_the_history(monkeypatch):
    asked, answer = [], threading.Event()
    look_up = socket.getaddrinfo

    def slow(host, *more):
        asked.append(host)
        assert answer.wait(20)
        return look_up("127.0.0.1", *more)

    monkeypatch.setattr(eventmon.socket, "getaddrinfo", slow)
    with Ear() as ear, Dispatcher(ear.url.replace("127.0.0.1", "slow.example")) as dispatcher:
        dispatcher.send("step", n=0)
        in_threads(lambda n: dispatcher.send("step", n=n), range(1, 5))
        assert (dispatcher.stats["events"], dispatcher.stats["errors"]) == (5, 0)
        assert not answer.is_set()
        answer.set()
        bodies = [eventmon.parse_frame(data).body for data in ear.data(5)]
    assert sorted(json.loads(body)["n"] for body in bodies) == list(range(5))
    assert asked == [b"slow.example"]


def refuse(number):
    def fail(*args):
        raise OSError(number, "refused by the test")

    return fail


@pytest.mark.parametrize("where", ["getaddrinfo", "Link"])
def test_without_a_network_sending_goes_on_and_what_failed_is_repaired(where, monkeypatch, url):
    with watching() as (_, events), Dispatcher(url) as dispatcher:
        with monkeypatch.context() as broken:
            broken.setattr(eventmon.socket if where == "getaddrinfo" else eventmon, where, refuse(errno.ENETUNREACH))
            dispatcher.send("first")
            assert dispatcher.stats["errors"]
            assert dispatcher.problem.errno == errno.ENETUNREACH
            assert dispatcher.flush() == 0
        wait_until(lambda: events)
        dispatcher.send("second")
        wait_until(lambda: len(events) == 2)
    assert [event.type for event in events] == ["first", "second"]


@pytest.mark.parametrize("name", "ENOBUFS EPERM ENETUNREACH EHOSTUNREACH EMSGSIZE ECONNREFUSED ENODEV".split())
def test_what_the_network_refuses_is_counted_and_repaired(name, sockets):
    with watching() as (receiver, events), Dispatcher() as dispatcher:
        dispatcher.send("step", n=0)
        sockets[-1].before_send = refuse(getattr(errno, name))
        for n in range(1, 20):
            dispatcher.send("step", n=n)
        assert dispatcher.stats["errors"] >= 19
        sockets[-1].before_send = lambda data: None
        dispatcher.send("step", n=20)
        wait_until(lambda: len(events) == 21)
        assert receiver.stats["lost"] == 0
    assert [event["n"] for event in events] == list(range(21))


def test_an_exception_in_the_thread_does_not_silence_the_dispatcher(monkeypatch):
    def fail(*args, wait_for=eventmon.wait_for):
        return (refuse(errno.EIO) if threading.current_thread().name == "eventmon" else wait_for)(*args)

    with watching() as (_, events), Dispatcher(freq=0.01) as dispatcher:
        with monkeypatch.context() as broken:
            broken.setattr(eventmon, "wait_for", fail)
            wait_until(lambda: getattr(dispatcher.problem, "errno", 0) == errno.EIO)
        beats = len(events)
        wait_until(lambda: len(events) > beats)
        dispatcher.send("hello")
        assert dispatcher.flush(20) == 1


def test_a_worker_works_where_the_system_has_no_load_average(monkeypatch):
    monkeypatch.setattr(eventmon.os, "getloadavg", refuse(errno.ENOENT), raising=False)
    with watching() as (_, events):
        with Dispatcher(freq=0.01):
            wait_until(lambda: len(events) > 2)
        wait_until(lambda: events[-1].type == "worker-offline")


def test_where_no_thread_can_be_made_events_are_sent_and_confirmed(monkeypatch):
    with watching() as (_, events):
        with monkeypatch.context() as broken:
            broken.setattr(eventmon.threading, "Thread", NoThread)
            with Dispatcher(buffer_group={"task"}) as dispatcher:
                dispatcher.send("task-progress")
                dispatcher.send("hello", x="x" * 10**5)
                assert dispatcher.flush(20) == 1
        wait_until(lambda: len(events) == 2)


def test_only_one_thread_waits_on_the_socket_as_eventlet_demands(monkeypatch):
    waiting, wait_for = set(), eventmon.wait_for
    monkeypatch.setattr(
        eventmon, "wait_for", lambda *args: (waiting.add(threading.current_thread().name), wait_for(*args))
    )
    with Ear() as ear, Dispatcher(ear.url) as dispatcher:
        dispatcher.send("hello")
        ear.hear(b"data")
        ear.answer(b"ack", 0, 7, 0, 0)
        wait_until(lambda: dispatcher.stats["watchers"])
        in_threads(lambda _: (dispatcher.send("hello"), dispatcher.flush(0.05)), range(4))
    assert waiting == {"eventmon"}


def test_threads_share_a_dispatcher():
    with watching() as (receiver, events), Dispatcher() as dispatcher:

        def work(name):
            for n in range(200):
                dispatcher.send("step", name=name, n=n, x=name * 10000 * (n % 50 == 0))

        in_threads(work, "abcdefghijklmnopqrst")
        assert dispatcher.flush(20) == 1
        wait_until(lambda: len(events) == 4000)
        assert receiver.stats["malformed"] == 0
    for name in "abcdefghijklmnopqrst":
        mine = [event for event in events if event["name"] == name]
        assert [event["n"] for event in mine] == list(range(200))
        assert {event["x"] for event in mine} == {"", name * 10000}


def interrupted(work, handler, line):
    """Run work(), and handler() when it comes to this line, counted, of eventmon.py.

    Return whether there is such a line, and the exception that ended work(), or None.
    """
    left = [line]

    def trace(frame, event, arg):
        if frame.f_code.co_filename != eventmon.__file__:
            return None
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event != "line" or text.lstrip().startswith("with "):  # between whose body and end no signal is handled
            return trace
        left[0] -= 1
        if left[0] == 0:
            sys.settrace(None)
            handler()
        return trace

    sys.settrace(trace)
    try:
        work()
    except (TimeoutError, ValueError) as problem:
        return left[0] <= 0, problem
    finally:
        sys.settrace(None)
    return left[0] <= 0, None


WAYS = [({}, {}), ({}, {"x": "x" * 150000}), ({"buffer_group": {"task"}, "buffer_limit": 2}, {})]


@pytest.mark.parametrize("options, fields", WAYS)
def test_a_signal_handler_may_send_at_any_moment(options, fields):
    for line in count(random.randint(1, 8), 8):  # over all runs, every one
        with Ear() as ear, Receiver() as receiver, Dispatcher(ear.url, **options) as dispatcher:
            dispatcher.send("task-first")
            ran, problem = interrupted(
                lambda: dispatcher.send("task-outer", **fields),
                lambda: (dispatcher.send("task-nested", **fields), dispatcher.send("hello-nested")),
                line,
            )
            dispatcher.send("last")
            got = []
            while "last" not in got:
                got += [event.type for event in receiver.handle_message(ear.hear(b"data", b"part"), SOURCE)]
            nested = ["task-nested", "hello-nested"]
            assert [type for type in got if type not in nested] == ["task-first", "task-outer", "last"]
            assert [type for type in got if type in nested] == (nested if ran else [])
            assert (problem, receiver.stats["duplicates"]) == (None, 0)
        if not ran:
            break
    assert line > 15


@pytest.mark.parametrize("options, fields", WAYS)
def test_after_an_exception_of_a_signal_handler_a_dispatcher_goes_on(options, fields):
    def fail():
        raise TimeoutError("of an alarm")

    with watching() as (receiver, events):
        for line in count(random.randint(1, 8), 8):  # over all runs, every one
            with Dispatcher(hostname=str(line), **options) as dispatcher:
                dispatcher.send("task-first")
                ran, problem = interrupted(lambda: dispatcher.send("task-outer", **fields), fail, line)
                dispatcher.send("last")
                assert dispatcher.stats["errors"] == 0
            wait_until(lambda: events and (events[-1].type, events[-1]["hostname"]) == ("last", str(line)))  # noqa: B023
            got = [event.type for event in events if event["hostname"] == str(line)]
            expected = ["task-first", "task-outer", "last"]
            may_miss = ["task-outer", "task-first"][: 1 + bool(options)] if problem else []  # a held one goes with it
            assert [type for type in expected if type in got or type not in may_miss] == got
            if not ran:
                break
        assert receiver.stats["lost"] == 0 or fields  # of an event in parts some may have been sent
    assert line > 15


@pytest.mark.parametrize("options, fields", WAYS)
def test_a_close_in_a_signal_handler_loses_nothing_that_was_sent(options, fields):
    with watching() as (receiver, events):
        for line in count(random.randint(1, 8), 8):  # over all runs, every one
            dispatcher = Dispatcher(hostname=str(line), **options)
            dispatcher.send("task-first")
            sent = []
            ran, _ = interrupted(
                lambda: sent.append(dispatcher.send("task-outer", **fields)),  # noqa: B023
                dispatcher.close,
                line,
            )
            if not ran:
                dispatcher.close()
                break
            expected = ["task-first", *(event.type for event in sent if event)]
            wait_until(lambda: [e.type for e in events if e["hostname"] == str(line)] == expected)  # noqa: B023
            with pytest.raises(ValueError, match="closed"):
                wait_until(lambda: dispatcher.send("late") and False)  # noqa: B023 - the thread is about to close it
        assert receiver.stats["lost"] == 0
    assert line > 15


def napped(work, virtual):
    """Return for how many seconds of virtual time this thread sleeps in work()."""
    before = sum(virtual.naps)
    work()
    return sum(virtual.naps) - before


@contextmanager
def behind(room=0, **options):
    """A Dispatcher, and an Ear that has confirmed its first datagram and has so much room."""
    with Ear() as ear, Dispatcher(ear.url, **options) as dispatcher:
        dispatcher.send("hello")
        ear.hear(b"data")
        ear.answer(b"ack", 1, 7, room, 0)
        dispatcher.flush(0)
        assert dispatcher.stats["watchers"] == 1
        yield dispatcher, ear


def flood(dispatcher, number=1000):
    for n in range(number):
        dispatcher.send("step", n=n)


def test_a_new_stream_waits_for_the_first_answer_once_and_a_quarter_second_at_most(virtual):
    with Ear() as ear, Dispatcher(ear.url) as dispatcher:
        assert napped(lambda: flood(dispatcher, 50), virtual) == 0
        assert 0.2 < napped(lambda: flood(dispatcher), virtual) < 0.26
        assert napped(lambda: flood(dispatcher), virtual) == 0


def test_a_stopped_watcher_costs_a_quarter_second_once_until_it_advances(virtual):
    with behind() as (dispatcher, ear):
        assert 0.2 < napped(lambda: flood(dispatcher), virtual) < 0.27
        assert napped(lambda: flood(dispatcher), virtual) == 0
        ear.answer(b"ack", 2000, 7, 0, 0)
        dispatcher.flush(0)
        assert 0.2 < napped(lambda: flood(dispatcher), virtual) < 0.27


@pytest.mark.parametrize("max_wait, least, most", [(0, 0, 0), (0.05, 0.04, 0.051)])
def test_send_waits_for_one_event_no_longer_than_max_wait_however_large(max_wait, least, most, virtual):
    with behind(max_wait=max_wait) as (dispatcher, _):
        dispatcher.send("step")
        assert least <= napped(lambda: dispatcher.send("big", x="x" * 3000000), virtual) <= most


def test_beside_a_slow_watcher_a_flood_waits_no_longer_than_it_takes_itself(virtual):
    with behind(max_wait=0.02) as (dispatcher, ear):
        sent = count(2)
        virtual.during_nap = lambda: ear.answer(b"ack", next(sent), 7, 0, 0)  # it always advances

        def work():
            for _ in range(2000):
                virtual.monotonic += 0.0002  # of the program's own time
                dispatcher.send("step")

        assert 1.0 < napped(work, virtual) < 1.05 + 0.4


def test_who_has_nothing_else_to_do_waits_for_a_watcher_as_long_as_it_lives(virtual):
    with behind(max_wait=1.0) as (dispatcher, _):
        assert 2.5 < napped(lambda: flood(dispatcher, 10), virtual) < 3.5


@pytest.mark.parametrize("watcher, least, most", [("none", 0, 0.05), ("stopped", 0.15, 0.26), ("advancing", 2.5, 3.1)])
def test_close_waits_for_watchers_that_advance(watcher, least, most, virtual):
    with behind() as (dispatcher, ear):
        dispatcher.send("step")
        if watcher == "none":
            ear.answer(b"leave", 1, 7, 0, 0)
        else:
            flood(dispatcher, 3999 * (watcher == "advancing"))
            sent = count(2)
            virtual.during_nap = lambda: ear.answer(b"ack", next(sent), 7, 0, 0) if watcher == "advancing" else None
        assert least <= napped(dispatcher.close, virtual) <= most


def test_who_has_nothing_left_to_send_waits_no_longer_than_is_said_whatever_max_wait_is(virtual):
    with behind(max_wait=60) as (dispatcher, _):
        dispatcher.send("step")
        assert napped(lambda: dispatcher.flush(0), virtual) == 0
        assert napped(dispatcher.close, virtual) <= 0.26


def test_while_one_thread_waits_for_a_watcher_others_go_on(virtual):
    with behind(max_wait=60) as (dispatcher, ear):
        dispatcher.send("step")

        def others():
            virtual.during_nap = lambda: None
            ear.answer(b"ack", 2, 7, 10**6, 0)
            in_threads(dispatcher.send, ["step"])

        virtual.during_nap = others
        assert napped(lambda: dispatcher.send("step"), virtual) < 1
        assert dispatcher.stats["events"] == 4


def test_who_asks_for_what_is_gone_again_and_again_draws_few_beats():
    with Ear() as ear, Dispatcher(ear.url) as dispatcher:
        dispatcher.send("hello")
        ear.hear(b"data")
        for _ in range(200):
            ear.answer(b"nak", 0, 7, 10**6, 0, body=b"0")
        ear.answer(b"nak", 1, 7, 10**6, 0, body=b"1")
        ear.hear(b"data")  # the repair, by which all have been read
        assert dispatcher.stats["datagrams"] < 50


def test_a_watcher_beyond_those_waited_for_is_helped_as_well():
    with Ear() as ear, Dispatcher(ear.url) as dispatcher:
        dispatcher.send("hello")
        data = ear.hear(b"data")
        for name in range(100):
            ear.answer(b"ack", 1, name, 10**6, 0)
        wait_until(lambda: 50 < dispatcher.stats["watchers"] < 100)
        ear.answer(b"nak", 0, 100, 10**6, 0, body=b"1")
        assert ear.hear(b"data") == data


def test_a_datagram_that_two_watchers_miss_is_repaired_once():
    with Ear() as ear, Dispatcher(ear.url) as dispatcher:
        dispatcher.send("hello")
        ear.hear(b"data")
        for name in range(5):
            ear.answer(b"nak", 0, name, 10**6, 0, body=b"1")
        wait_until(lambda: dispatcher.stats["watchers"] == 5)
        assert dispatcher.stats["repairs"] < 5


def test_sending_imports_nothing_and_needs_no_file():
    """Beside an import a fork would hang, and where all descriptors are in use it would fail."""
    out = python(
        "import eventmon, os, sys\nd, late = eventmon.Dispatcher(key='secret'), eventmon.Dispatcher()\n"
        "before, files = set(sys.modules), []\nd.send('hello', x={1}, y='x' * 100000)\n"
        "try:\n    while True: files.append(open(os.devnull))\nexcept OSError: pass\n"
        "for each in (d, late):\n    try:\n        with each.task('job'): 1/0\n    except ZeroDivisionError: pass\n"
        "d.flush()\nprint(sorted(set(sys.modules) - before))"
    )
    assert out == b"[]\n"


def test_a_thread_that_outlives_the_program_is_not_told_that_a_dispatcher_is_closed():
    python(
        "import eventmon, threading, time\nd = eventmon.Dispatcher()\n"
        "def work():\n    while True: d.send('x'); time.sleep(0.001)\n"
        "threading.Thread(target=work, daemon=True).start()\ntime.sleep(0.01)"
    )


def test_a_child_of_multiprocessing_sends_what_it_has_buffered():
    with watching() as (_, events):
        python(
            "import eventmon, multiprocessing.util\nd = eventmon.Dispatcher(buffer_group={'task'})\n"
            "if __name__ == '__main__':\n"
            "    p = multiprocessing.get_context('fork').Process(target=d.send, args=('task-x',))\n"
            "    p.start()\n    p.join()\n"
        )
        wait_until(lambda: events)


def test_a_closed_dispatcher_is_not_kept():
    import multiprocessing.util  # noqa: F401 - to which a Dispatcher tells that it is to be closed at the exit

    dispatcher = Dispatcher()
    dispatcher.send("x")
    kept = weakref.ref(dispatcher)
    dispatcher.close()
    del dispatcher
    wait_until(lambda: gc.collect() and not kept() or not kept())


def test_children_of_a_fork_go_on_sending():
    with watching() as (receiver, events), Dispatcher() as dispatcher:
        dispatcher.send("step", who="parent", n=0)
        busy = threading.Thread(target=lambda: [dispatcher.send("step", who="thread", n=n) for n in range(2000)])
        busy.start()
        children = []
        for who in range(3):
            child = os.fork()
            if child == 0:
                for n in range(50):
                    dispatcher.send("step", who=who, n=n)
                if os.fork() == 0:
                    dispatcher.send("step", who=f"{who}'s child", n=0)
                    os._exit(0)
                os.wait()
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        busy.join()
        dispatcher.send("step", who="parent", n=1)
        wait_until(lambda: len(events) == 2 + 2000 + 3 * 51)
        assert receiver.stats["lost"] == 0
    for who in {event["who"] for event in events}:
        mine = [event for event in events if event["who"] == who]
        assert [event["n"] for event in mine] == list(range(len(mine)))
        assert len({event["pid"] for event in mine}) == 1
    assert len({event["pid"] for event in events}) == 7


def test_a_fork_that_tells_python_nothing_is_noticed():
    if not hasattr(os, "fork") or sys.platform != "linux":
        pytest.skip("it is noticed by a page that Linux wipes in the child")
    with watching() as (receiver, events):
        python(
            "import ctypes, eventmon, os, time\nd = eventmon.Dispatcher()\nd.send('step', n=-1)\n"
            "time.sleep(0.1)  # a child whose parent's thread waits for the interpreter's lock would hang\n"
            "first = ctypes.PyDLL(None).fork()\nsecond = first and ctypes.PyDLL(None).fork()\n"
            "for n in range(20): d.send('step', n=n)\n"
            "if not second: os._exit(0)\nos.wait(), os.wait()"
        )
        wait_until(lambda: len(events) == 61)
        assert receiver.stats["duplicates"] == receiver.stats["rejected"] == 0
    assert sorted(event["n"] for event in events) == sorted([-1, *[*range(20)] * 3])
    assert len({event["pid"] for event in events}) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="it is noticed by a page that Linux wipes in the child")
def test_a_child_that_only_ends_says_nothing_in_the_name_of_its_parent():
    with watching() as (receiver, events):
        python(
            "import ctypes, eventmon, os, sys, time\nd = eventmon.Dispatcher(freq=9, buffer_group={'step'})\n"
            "d.send('step', n=0)\ntime.sleep(0.1)\nif not ctypes.PyDLL(None).fork(): sys.exit(0)\nos.wait()\n"
            "for n in (1, 2): d.send('step', n=n)"
        )
        wait_until(lambda: events and events[-1].type == "worker-offline")
        assert receiver.stats["duplicates"] == receiver.stats["rejected"] == 0
    assert [event.get("n") for event in events] == [None, 0, 1, 2, None]


def test_a_fork_in_the_middle_of_a_send_leaves_both_processes_a_stream_of_their_own():
    class Forks:
        def __repr__(self):
            children.append(os.fork())
            return "forks"

    children = []
    with watching() as (receiver, events), Dispatcher() as dispatcher:
        dispatcher.send("step", x="parent")
        dispatcher.send("step", x=Forks())
        if children == [0]:
            dispatcher.send("step", x="child")
            os._exit(0)
        os.waitpid(children[0], 0)
        dispatcher.send("step", x="parent")
        wait_until(lambda: len(events) == 5)
        assert receiver.stats["rejected"] == receiver.stats["duplicates"] == 0
    assert sorted(event["x"] for event in events) == ["child", "forks", "forks", "parent", "parent"]


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("whose", ["Receiver", "Dispatcher"])
def test_a_descriptor_that_the_program_has_closed_is_replaced_and_left_to_whoever_has_it(
    whose, reused, sockets, monkeypatch
):
    turns, wait_for = [], eventmon.wait_for
    monkeypatch.setattr(eventmon, "wait_for", lambda *args: (turns.append(args), wait_for(*args)))
    with Ear() as file, watching() as (receiver, events), Dispatcher() as dispatcher:
        dispatcher.send("step", n=0)
        wait_until(lambda: len(events) == 1)
        turns.clear()
        opened = len(sockets)
        number = (receiver.channel if whose == "Receiver" else sockets[-1]).fileno()
        os.dup2(file.socket.fileno(), number) if reused else os.close(number)
        for n in range(1, 10):
            dispatcher.send("step", n=n)
        wait_until(lambda: len(events) == 10 and len(sockets) > opened)
        assert len(turns) < 1000  # it does not turn in a circle
        if reused:
            assert os.path.sameopenfile(number, file.socket.fileno())
            os.close(number)
    assert [event["n"] for event in events] == list(range(10))


def test_a_callback_that_raises_does_not_keep_a_dispatcher_open():
    dispatcher = Dispatcher()
    dispatcher.on_disabled.add(lambda: 1 / 0)
    dispatcher.send("x")
    with pytest.raises(ZeroDivisionError):
        dispatcher.close()
    with pytest.raises(ValueError, match="closed"):
        dispatcher.send("x")


def test_close_sends_what_is_buffered_and_is_done_once():
    before = set(threading.enumerate())
    with watching() as (_, events):
        dispatcher = Dispatcher(buffer_group={"task"})
        dispatcher.send("task-progress")
        dispatcher.close()
        dispatcher.close()
        wait_until(lambda: len(events) == 1)
    wait_until(lambda: not set(threading.enumerate()) - before)


def test_a_program_that_just_ends_has_sent_everything():
    with watching() as (_, events):
        python(
            "import eventmon\nd = eventmon.Dispatcher(buffer_group={'task'}, freq=60)\n"
            "for n in range(30): d.send('task-progress', n=n)"
        )
        wait_until(lambda: len(events) == 32)
    assert [event["n"] for event in events[1:-1]] == list(range(30))
    assert (events[0].type, events[-1].type) == ("worker-online", "worker-offline")


def test_a_worker_has_a_heartbeat():
    with watching() as (_, events):
        with Dispatcher(hostname="w1", freq=0.02):
            wait_until(lambda: [event for event in events if event.type == "worker-heartbeat"])
        wait_until(lambda: events[-1].type == "worker-offline")
    assert events[0].type == "worker-online"
    expected = {"hostname", "freq", "active", "processed", "loadavg", "sw_ident", "sw_ver", "sw_sys"}
    assert expected <= events[1].keys()


def test_a_task_tells_how_it_went():
    with Receiver() as receiver, Dispatcher() as dispatcher:
        receiver.fileno()
        with dispatcher.task("job", uuid="u1", queue="q") as task:
            task.progress(0.5, step="half")
            with dispatcher.task("inner") as inner:
                pass
        events = list(receiver.itercapture(limit=7, timeout=20))
    assert [event.subject for event in events] == [
        "received",
        "started",
        "progress",
        "received",
        "started",
        "succeeded",
        "succeeded",
    ]
    assert {"name": "job", "uuid": "u1", "queue": "q", "retries": 0, "root_id": "u1"}.items() <= events[0].items()
    assert {"progress": 0.5, "step": "half"}.items() <= events[2].items()
    assert (events[3]["parent_id"], events[3]["root_id"], events[3]["uuid"]) == ("u1", "u1", inner.uuid)
    assert events[6]["uuid"] == "u1"
    assert events[6]["runtime"] >= events[5]["runtime"] >= 0


def test_a_task_that_raises_has_failed():
    with Receiver() as receiver, Dispatcher() as dispatcher:
        receiver.fileno()
        with pytest.raises(ZeroDivisionError), dispatcher.task("job"):
            1 / 0  # noqa: B018
        *_, event = receiver.itercapture(limit=3, timeout=20)
    assert event.type == "task-failed"
    assert event["exception"] == "ZeroDivisionError('division by zero')"
    assert "1 / 0" in event["traceback"]


def test_a_task_never_replaces_the_exception_that_ended_it():
    dispatcher = Dispatcher()
    with pytest.raises(RuntimeError, match="mine"), dispatcher.task("job"):
        dispatcher.close()
        raise RuntimeError("mine" * 10**6)
    with pytest.raises(ValueError, match="closed"), dispatcher.task("job"):
        pass
    assert eventmon._current_task.get() is None


def test_a_decorated_function_or_coroutine_function_is_a_task_at_each_call():
    with Receiver() as receiver, Dispatcher() as dispatcher:
        receiver.fileno()

        @dispatcher.task("add")
        def add(a, b=0):
            """Add."""
            return "x" * 5000 if a == "long" else a + b

        @dispatcher.task("wait")
        async def wait(seconds):
            await asyncio.sleep(seconds)
            return "waited"

        assert (add(1, b=2), len(add("long")), asyncio.run(wait(0))) == (3, 5000, "waited")
        assert (add.__name__, add.__doc__) == ("add", "Add.")
        events = list(receiver.itercapture(limit=9, timeout=20))
    assert events[0]["args"] == "(1,)"
    assert events[0]["kwargs"] == "{'b': 2}"
    assert events[2]["result"] == "3"
    assert len(events[5]["result"]) == 1024
    assert events[5]["result"].endswith("…")
    assert events[8]["result"] == "'waited'"
    assert len({event["uuid"] for event in events}) == 3


@contextmanager
def telling():
    """A Dispatcher, and a function that returns its next events."""
    with Receiver() as receiver, Dispatcher() as dispatcher:
        receiver.fileno()
        yield dispatcher, lambda n: list(receiver.itercapture(limit=n, timeout=20))


def subjects(events):
    return [(event.subject, event.get("result")) for event in events]


def test_methods_are_tasks_and_keep_their_names_signatures_and_docstrings():
    with telling() as (dispatcher, next_events):

        class Shop:
            def __repr__(self):
                return "Shop()"

            @dispatcher.task("sell")
            def sell(self, item, *, price: int = 5):
                """Sell it."""
                return price

            @dispatcher.task("open")
            @classmethod
            def open(cls):
                return cls

            @staticmethod
            @dispatcher.task("close")
            def close():
                return "closed"

        assert (Shop().sell("tea", price=7), Shop.open(), Shop().close()) == (7, Shop, "closed")
        assert (Shop.sell.__doc__, str(inspect.signature(Shop.sell))) == ("Sell it.", "(self, item, *, price: int = 5)")
        events = next_events(9)
    assert (events[0]["args"], events[0]["kwargs"]) == ("(Shop(), 'tea')", "{'price': 7}")
    assert subjects(events[2::3]) == [("succeeded", "7"), ("succeeded", repr(Shop)), ("succeeded", "'closed'")]


def test_a_generator_is_a_task_from_its_first_value_to_its_last():
    with telling() as (dispatcher, next_events):

        @dispatcher.task("count")
        def numbers():
            try:
                got = yield 1
            except KeyError:
                got = "key"
            yield got
            return "done"

        assert inspect.isgeneratorfunction(numbers)
        unused = numbers()
        one, two, three = numbers(), numbers(), numbers()
        assert (next(one), one.send("x"), next(one, "end")) == (1, "x", "end")
        assert (next(two), two.throw(KeyError("k"))) == (1, "key")
        two.close()
        with pytest.raises(OSError, match="oops"):
            next(three), three.throw(OSError("oops"))
        unused.close()
        events = next_events(9)
    assert subjects(events[2::3]) == [("succeeded", "'done'"), ("succeeded", None), ("failed", None)]
    assert len({event["uuid"] for event in events}) == 3


def test_an_async_generator_is_a_task_from_its_first_value_to_its_last():
    with telling() as (dispatcher, next_events):

        @dispatcher.task("count")
        async def numbers():
            try:
                await asyncio.sleep(0)
                got = yield 1
                yield got
            except KeyError:
                yield "key"

        async def use():
            one, two = numbers(), numbers()
            got = [await one.__anext__(), await one.asend("x"), [item async for item in one]]
            got += [await two.__anext__(), await two.athrow(KeyError("k"))]
            await two.aclose()
            return got

        assert inspect.isasyncgenfunction(numbers)
        assert asyncio.run(use()) == [1, "x", [], 1, "key"]
        events = next_events(6)
    assert subjects(events[2::3]) == [("succeeded", None)] * 2


def test_a_task_inside_another_has_it_as_parent_and_the_outermost_as_root():
    with telling() as (dispatcher, next_events):
        tasks = {name: dispatcher.task(name, uuid=name) for name in "abcdefg"}

        @dispatcher.task("gen", uuid="gen")
        def generate():
            with tasks["b"]:
                yield
            with tasks["c"]:
                yield

        @dispatcher.task("async", uuid="async")
        async def later():
            with tasks["f"]:
                await asyncio.sleep(0)

        with tasks["a"]:
            for _ in generate():
                with tasks["d"]:
                    pass
        with tasks["e"]:
            asyncio.run(later())
        with tasks["g"]:
            pass
        parents = {}
        for event in next_events(30):
            if event.subject == "received" and event["uuid"] not in parents:
                parents[event["uuid"]] = event["parent_id"], event["root_id"]
    assert parents == {
        "a": (None, "a"),
        "gen": ("a", "a"),
        "b": ("gen", "a"),
        "d": ("a", "a"),
        "c": ("gen", "a"),
        "e": (None, "e"),
        "async": ("e", "e"),
        "f": ("async", "e"),
        "g": (None, "g"),
    }


def test_a_task_that_starts_its_successor_is_not_kept():
    def step(n):
        with Dispatcher(enabled=False).task("tick") as task:
            alive.add(task)
            context = contextvars.copy_context()  # as call_soon() does
        return context

    alive = weakref.WeakSet()
    context = contextvars.copy_context()
    for n in range(100):
        context = context.run(step, n)
    assert len(alive) < 5


def test_a_task_goes_on_being_the_parent_whatever_ends_inside_it():
    with telling() as (dispatcher, next_events):

        def circle():
            with one, one, two, one:  # a task inside itself has no sense, but an end
                pass

        with dispatcher.task("root", uuid="root"):
            one, two = dispatcher.task("one"), dispatcher.task("two")
            one.__enter__(), two.__enter__(), one.__exit__(None, None, None), two.__exit__(None, None, None)
            with dispatcher.task("last"):
                pass
            contextvars.copy_context().run(circle)
        (last,) = (event for event in next_events(24) if event.get("name") == "last")
    assert last["parent_id"] == "root"


def test_tasks_that_end_in_another_order_or_context_leave_no_parent_behind():
    with telling() as (dispatcher, next_events):

        def use(uuid):
            with dispatcher.task("job", uuid=uuid):
                yield

        one, two = use("one"), use("two")
        next(one), next(two), next(one, None), next(two, None)
        three = use("three")
        contextvars.copy_context().run(next, three)
        three.close()  # in a context in which it did not begin
        with dispatcher.task("given", uuid="given", parent_id="elsewhere", root_id="far"), dispatcher.task("last"):
            pass
        events = [event for event in next_events(15) if event.subject == "received"]
    assert [(event["parent_id"], event["root_id"]) for event in events] == [
        (None, "one"),
        ("one", "one"),
        (None, "three"),
        ("elsewhere", "far"),
        ("given", "far"),
    ]


@pytest.mark.parametrize(
    "value, limit, text",
    [
        (("x" * 2000,), 10, "('xxxxxxx…"),
        (b"x" * 2000, 10, "b'xxxxxxx…"),
        ({"a": [(1,), {2}, set()]}, 100, "{'a': [(1,), {2}, set()]}"),
        ({"a": [(1,), {2}, ()]}, 5, "{'a':…"[:4] + "…"),
        ([(1,)] * 1000, 12, "[(1,), (1,)…"),
        ([{1: "x"}] * 1000, 12, "[{1: 'x'}, …"),
        ("x", 0, "…"),
    ],
)
def test_a_repr_is_shortened_visibly(value, limit, text):
    assert eventmon.shortened(value, limit) == text
    assert eventmon.shortened(value, 10**6) == repr(value)


def test_of_large_arguments_no_more_is_spelled_than_is_sent():
    class Costly:
        made = 0

        def __repr__(self):
            Costly.made += 1
            return "costly"

    with telling() as (dispatcher, next_events):
        dispatcher.max_repr = 20

        @dispatcher.task("job")
        def job(values):
            return values

        assert len(job([Costly()] * 10**6)) == 10**6
        received, _, succeeded = next_events(3)
        made = Costly.made
        assert made < 20
        dispatcher.disable()
        assert dispatcher.task("job")(lambda value: 5)(Costly()) == 5
        assert Costly.made == made
    assert received["args"] == "([costly, costly, c…"
    assert succeeded["result"] == "[costly, costly, co…"


class Odd(Exception):
    """An exception that no traceback can be made of."""

    def __getattr__(self, name):
        raise KeyError(name)


def test_a_task_never_replaces_an_exception_that_cannot_be_formatted():
    with telling() as (dispatcher, next_events):
        with pytest.raises(Odd), dispatcher.task("job"):
            raise Odd
        with pytest.raises(SyntaxError), dispatcher.task("job"):
            raise SyntaxError("x", ("f", 1, 2, 3))
        assert ["task-failed", "task-failed"] == [event.type for event in next_events(6)[2::3]]


def test_of_a_deep_traceback_the_innermost_frames_are_sent():
    def deeper(n):
        return deeper(n - 1) if n else 1 / 0

    with telling() as (dispatcher, next_events):
        with pytest.raises(ZeroDivisionError), dispatcher.task("job"):
            deeper(500)
        text = next_events(3)[2]["traceback"]
    assert text.rstrip().endswith("ZeroDivisionError: division by zero")
    assert "1 / 0" in text
    assert len(text.splitlines()) < 4 * eventmon.MAX_FRAMES


def test_an_async_generator_that_is_left_open_ends_with_its_loop_in_silence():
    problems, cleaned = [], []
    with telling() as (dispatcher, next_events):

        @dispatcher.task("count")
        async def numbers():
            try:
                yield 1
            finally:
                cleaned.append(await asyncio.sleep(0))

        async def leave():
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
            leave.numbers = numbers()
            await leave.numbers.__anext__()

        asyncio.run(leave())
        assert (problems, cleaned) == ([], [None])
        assert subjects(next_events(3))[2] == ("succeeded", None)


def test_what_is_called_like_a_coroutine_function_is_one():
    class Job:
        async def __call__(self):
            return await asyncio.sleep(0, "done")

    with telling() as (dispatcher, next_events):
        decorated = dispatcher.task("job")(Job())
        partly = dispatcher.task("job")(partial(asyncio.sleep, 0, "slept"))
        assert (asyncio.run(decorated()), asyncio.run(partly())) == ("done", "slept")
        assert [event["result"] for event in next_events(6)[2::3]] == ["'done'", "'slept'"]


def test_a_task_that_is_none_is_refused():
    with Dispatcher() as dispatcher:
        with pytest.raises(TypeError, match="expected a str"):

            @dispatcher.task
            def job():
                pass

        with pytest.raises(TypeError, match="expected a function"):
            dispatcher.task("job")(42)


@pytest.fixture
def logger():
    """A logger of its own, of which the test runner's handlers get nothing."""
    return logging.Logger("shop")  # noqa: LOG001 - which getLogger() would share


def test_log_records_become_events(logger):
    with telling() as (dispatcher, next_events):
        logger.addHandler(eventmon.LogHandler(dispatcher))
        kept = []
        logger.addFilter(lambda record: kept.append(record) or True)
        with dispatcher.task("job") as task:
            logger.warning("%d left", 3)
        try:
            raise KeyError("gone")
        except KeyError:
            logger.exception("lost it")
        first, second = (event for event in next_events(5) if event.group == "log")
    assert {"type": "log-warning", "logger": "shop", "message": "3 left", "uuid": task.uuid}.items() <= first.items()
    assert first.timestamp == kept[0].created
    assert second.type == "log-error"
    assert "KeyError: 'gone'" in second["exception"]
    assert "uuid" not in second


def test_a_log_handler_never_raises(logger, capsys, monkeypatch):
    class Broken:
        def __str__(self):
            raise RuntimeError("broken")

    with Dispatcher() as dispatcher:
        logger.addHandler(eventmon.LogHandler(dispatcher))
        logger.warning("%y", 1)
        assert "ValueError" in capsys.readouterr().err
        logger.warning("%s", Broken())
        assert "broken" in capsys.readouterr().err
        closed = io.StringIO()
        closed.close()
        monkeypatch.setattr(sys, "stderr", closed)
        logger.warning("%s", Broken())
    logger.warning("nobody hears this")


def test_a_log_handler_never_loops(logger, monkeypatch):
    class Loud:
        def __str__(self):
            logger.warning("%s and %s", self, self)
            return "loud"

    with telling() as (dispatcher, next_events):
        logger.addHandler(eventmon.LogHandler(dispatcher))
        monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=logger.error, flush=lambda: None))
        logger.warning("%d", "x")  # whose report goes to standard error, and so is logged
        logger.warning("%s", Loud())
        threading.Thread(target=logger.warning, args=("last",)).start()
        assert [event["message"] for event in next_events(2)] == ["loud", "last"]


def test_a_log_handler_holds_no_lock_for_which_a_send_could_wait(logger, sockets):
    """A __del__ or a signal handler logs in the middle of a send(), while another thread logs."""
    sending = threading.Event()

    class Handler(eventmon.LogHandler):
        def _fields(self, record):
            sending.set()
            return super()._fields(record)

    with telling() as (dispatcher, next_events):
        logger.addHandler(Handler(dispatcher))
        other = threading.Thread(target=logger.warning, args=("other",))

        def work(data):
            if b"outer" in data and not sending.is_set():
                other.start()
                assert sending.wait(20)
                logger.warning("interrupting")

        dispatcher.send("hello")
        sockets[-1].before_send = work
        sender = threading.Thread(target=dispatcher.send, args=("outer",), daemon=True)
        sender.start()
        sender.join(20)
        assert not sender.is_alive()
        told = [event.get("message", "") for event in next_events(4)]
        assert sorted(told) == ["", "", "interrupting", "other"]
    assert pickle.loads(pickle.dumps(eventmon.LogHandler)) is eventmon.LogHandler


def test_a_log_handler_can_be_named_in_a_configuration():
    code = """
import logging.config
from eventmon import Dispatcher
handler = {"class": "eventmon.LogHandler", "dispatcher": Dispatcher()}
logging.config.dictConfig({"version": 1, "handlers": {"events": handler}, "root": {"handlers": ["events"]}})
logging.error("hello")
"""
    with watching() as (_, events):
        subprocess.run([sys.executable, "-c", code], cwd=MODULE.parent, timeout=30, check=True)
        wait_until(lambda: [event for event in events if event.get("message") == "hello"])


# --- Receiver ---


def test_handlers_get_their_types_and_the_star_gets_the_rest():
    got = []
    handlers = {"a": lambda event: got.append("a"), "*": lambda event: got.append(event.type.upper())}
    with Receiver(handlers=handlers) as receiver, Dispatcher() as dispatcher:
        receiver.fileno()
        for type in "abc":
            dispatcher.send(type)
        receiver.capture(limit=3, timeout=20)
    assert got == ["a", "B", "C"]


def test_an_exception_of_a_handler_goes_up_and_loses_nothing_else():
    def fail(event):
        raise KeyError(event.type)

    with Receiver(handlers={"a": fail}) as receiver:
        receiver.fileno()
        with Dispatcher(buffer_group={"a", "b"}) as dispatcher:
            dispatcher.send("a")
            dispatcher.send("b")
            dispatcher.flush(0)
            with pytest.raises(KeyError):
                receiver.capture(limit=2, timeout=20)
            assert [event.type for event in receiver.itercapture(limit=1, timeout=20)] == ["b"]


def test_a_capture_ends_after_its_limit_or_timeout_or_when_told():
    with Receiver() as receiver, Dispatcher() as dispatcher:
        receiver.fileno()
        for n in range(40):
            dispatcher.send("step", n=n)
        for n in range(0, 30, 2):
            assert [event["n"] for event in receiver.itercapture(limit=2, timeout=20)] == [n, n + 1]
        assert list(receiver.itercapture(limit=0)) == []
        assert [event["n"] for event in receiver.itercapture(timeout=0.1)] == list(range(30, 40))
        assert list(receiver.itercapture(timeout=0)) == []
        threading.Timer(0.05, lambda: setattr(receiver, "should_stop", True)).start()
        receiver.capture()


def test_a_close_from_another_thread_ends_a_capture_which_opens_nothing_again(sockets):
    receiver = Receiver()
    thread = threading.Thread(target=receiver.capture)
    thread.start()
    with Dispatcher() as dispatcher:
        wait_until(lambda: dispatcher.flush(0.1))  # it captures
        receiver.close()
        receiver.close()
        thread.join(20)
        assert not thread.is_alive()
    assert all(sock.fileno() == -1 for sock in sockets)
    with Dispatcher() as dispatcher:
        dispatcher.send("hello")
        assert [event.type for event in receiver.itercapture(limit=1, timeout=20)] == ["hello"]  # a new capture
    receiver.close()


def test_who_does_not_want_to_wait_does_not_read_junk_for_ever(monkeypatch):
    class Endless(socket.socket):
        def recvfrom(self, size):
            return b"junk", SOURCE

    monkeypatch.setattr(eventmon, "listen", lambda url: Endless(socket.AF_INET, socket.SOCK_DGRAM))
    with Receiver() as receiver:
        assert list(receiver.itercapture(timeout=0)) == []


def test_bare_json_is_delivered_as_it_comes_and_no_socket_is_opened(sockets):
    receiver = Receiver()
    assert receiver.handle_message(b'{"type":"hi","timestamp":5}', SOURCE)[0].pop("local_received") <= time.time()
    assert [event.type for event in receiver.handle_message(b'[{"type":"a"},{"type":"b"}]', SOURCE)] == ["a", "b"]
    assert receiver.stats["events"] == 3
    assert sockets == []


def test_datagrams_in_any_order_and_number_are_delivered_once_in_order():
    frames = captured(*[f"step-{n}" for n in range(30)])
    for seed in range(20):
        receiver, chance = Receiver(), random.Random(seed)
        datagrams = frames * 2
        chance.shuffle(datagrams)
        assert delivered(receiver, *datagrams) == [f"step-{n}" for n in range(30)]
        assert receiver.stats["duplicates"] == 30


def test_without_a_channel_a_gap_is_given_up_at_a_call_a_second_later(virtual):
    frames = captured("a", "b", "c", "d")
    receiver = Receiver()
    assert delivered(receiver, frames[0], frames[2]) == ["a"]
    virtual.monotonic += 1
    assert delivered(receiver, frames[3]) == ["c", "d"]
    assert receiver.stats["lost"] == 1


def part(seq, event, index, body, total=3, stream=STREAM):
    body = body if index + 1 == total else body.ljust(1024)
    return eventmon.format_frame(b"part", stream, (seq, event, index, total), body)


def test_parts_of_two_events_are_never_joined(virtual):
    receiver = Receiver()
    frames = [part(1, 1, 0, b'{"type":'), part(2, 1, 1, b'"a","x":"'), part(6, 2, 2, b'b"}'), part(7, 3, 0, b'{"type"')]
    assert delivered(receiver, *frames) == []
    virtual.monotonic += 1
    assert delivered(receiver, part(8, 3, 1, b':"whole"'), part(9, 3, 2, b"}")) == ["whole"]
    assert receiver.stats["lost"] == 3  # what never came
    assert delivered(receiver, part(10, 1, 1, b'"}'), b'EM2 data %b 11\n{"type":"next"}' % STREAM) == ["next"]
    assert receiver.stats["lost"] == 3 + 2  # what came of an event of which the rest did not


def test_events_of_several_threads_in_parts_may_interleave():
    frames = [part(1 + n, n, 0, b'{"type":', 2) for n in range(3)]
    frames += [part(4 + n, n, 1, b'"%d"}' % n, 2) for n in range(3)]
    assert delivered(Receiver(), *frames) == ["0", "1", "2"]


@pytest.mark.parametrize("index, total, size", [(0, 10**9, 2000), (0, 0, 2000), (3, 3, 2000), (0, 3, 10)])
def test_parts_that_cannot_be_of_an_event_are_malformed(index, total, size):
    receiver = Receiver()
    assert delivered(receiver, eventmon.format_frame(b"part", STREAM, (1, 1, index, total), bytes(size))) == []
    assert receiver.stats["malformed"] == 1


def large(body):
    """The datagrams of an event, or of several, in parts."""
    pieces = [body[start : start + 60000] for start in range(0, len(body), 60000)]
    return [part(1 + n, 1, n, piece, len(pieces)) for n, piece in enumerate(pieces)]


def test_what_all_streams_hold_back_together_is_bounded():
    receiver, junk = Receiver(), b"x" * 60000
    tracemalloc.start()
    try:
        for n in range(2000):
            receiver.handle_message(eventmon.format_frame(b"data", b"%016x" % (n % 40), (2 + n // 40,), junk), SOURCE)
            receiver.handle_message(part(1, 1, 0, junk, 300, b"%016x" % (100 + n)), SOURCE)
        assert delivered(receiver, *large(b'{"type":"big","x":"%b"}' % (b"x" * 1_000_000))) == ["big"]
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_the_largest_event_takes_a_bounded_part_of_memory():
    receiver, frames = Receiver(), large(b'{"type":"big","x":"%b"}' % (b"x" * 16_000_000))
    tracemalloc.start()
    try:
        for data in frames:
            receiver.handle_message(data, SOURCE)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_any_bytes_are_counted_and_never_raise():
    receiver, chance = Receiver(), random.Random(1)
    frames = captured("a", "b", "c") + [data for _, data in FRAMES] + [b'{"type":"x","a":[1,2]}']
    for _ in range(20000):
        data = bytearray(chance.choice(frames))
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data)) :][:1] = bytes([chance.randrange(256)])
            where = chance.randrange(len(data))
            data[where : where + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
            data = data or bytearray(b"x")
        receiver.handle_message(bytes(data), ("127.0.0.1", chance.randrange(5)))
    assert receiver.stats["malformed"] > 1000
    assert receiver.stats["streams"] <= Receiver.MAX_STREAMS
    assert delivered(receiver, *captured("still", "here")) == ["still", "here"]


def test_the_number_of_streams_is_bounded():
    receiver = Receiver()
    for n in range(Receiver.MAX_STREAMS + 100):
        receiver.handle_message(b'EM2 data %016x 2\n{"type":"x"}' % n, SOURCE)
    assert receiver.stats["streams"] == Receiver.MAX_STREAMS
    assert receiver.stats["lost"] == 2 * 100  # what was missing, and what was held back behind it


def test_however_many_forged_streams_come_between_nothing_is_delivered_twice(monkeypatch, virtual):
    monkeypatch.setattr(Receiver, "MAX_STREAMS", 50)
    receiver, frames, got = Receiver(), captured(*(f"step-{n}" for n in range(40))), []
    honest = eventmon.parse_frame(frames[0]).stream
    for n, data in enumerate(frames):
        virtual.monotonic += 0.1
        got += delivered(receiver, data, b"EM2 beat %b %d 1\n" % (honest, n + 1))
        names = range(n * 100, n * 100 + 80)
        forged = (b'EM2 data %016x %d\n{"type":"forged"}' % (name, seq) for name in names for seq in (1, 2))
        got += [type for type in delivered(receiver, *forged) if type != "forged"]
        got += delivered(receiver, b"EM2 beat %b %d 1\n" % (honest, n + 1), *frames[max(0, n - 3) : n])
    assert got == [f"step-{n}" for n in range(40)]


def test_a_forger_of_a_name_takes_nothing_from_the_stream_that_has_it():
    receiver, frames = Receiver(), captured(*"abcd")
    got = delivered(receiver, *frames[:3])
    assert receiver.handle_message(frames[3].replace(b'"d"', b'"forged"'), ("127.0.0.1", 666)) == []
    assert got + delivered(receiver, frames[3]) == ["a", "b", "c", "d"]
    assert receiver.stats["rejected"] == 1


def test_a_sealed_datagram_that_is_sent_again_from_elsewhere_draws_no_answer_there():
    key = b"secret"
    sealed = eventmon.seal(eventmon.format_frame(b"data", STREAM, (1,), b'{"type":"a"}'), key)
    with Receiver(key=key) as receiver, Ear() as sender, Ear() as thief:
        receiver.fileno()
        for ear in (sender, thief):
            receiver.handle_message(sealed, ear.address)
        list(receiver.itercapture(timeout=0))
        assert sender.hear(b"ack", key=key)
        thief.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            thief.socket.recvfrom(65536)


def test_a_sender_whose_address_changes_goes_on_and_repeats_nothing(virtual):
    receiver, frames = Receiver(), captured(*"abcd")
    got = delivered(receiver, *frames[:2])
    virtual.monotonic += 2
    got += [event.type for data in frames for event in receiver.handle_message(data, ("127.0.0.2", 815))]
    assert got == ["a", "b", "c", "d"]
    assert receiver.stats["streams"] == 1


def test_who_takes_its_time_for_each_event_goes_on_answering(virtual):
    with Receiver() as receiver, Ear() as ear:
        receiver.fileno()
        for seq in range(1, 401):
            ear.tell(receiver, b"EM2 data %b %d\n" % (STREAM, seq) + b'{"type":"x"}')
        positions, rest = [], receiver.itercapture(timeout=1)
        for _ in range(400):
            next(rest)
            virtual.monotonic += 0.003
            positions += ear.positions()
    assert positions == sorted(positions)
    assert len(set(positions)) > 50
    assert max(after - before for before, after in zip(positions, positions[1:])) <= Receiver.MAX_READ


def test_streams_that_send_at_the_same_time_share_the_room():
    def confirmed(streams, seq):
        for stream in streams:
            ear.tell(receiver, b'EM2 data %016x %d\n{"type":"x"}' % (stream, seq))
        assert len(list(receiver.itercapture(limit=len(streams), timeout=20))) == len(streams)
        frames = [eventmon.parse_frame(ear.hear(b"ack")) for _ in streams]
        return {int(frame.stream, 16): frame.numbers[2] for frame in frames}

    with Receiver() as receiver, Ear() as ear:
        receiver.fileno()
        assert confirmed([0], 1)[0] <= eventmon.ROOM
        confirmed(range(1, 5), 1)  # now they are known to send together
        assert 0 < sum(confirmed(range(1, 5), 2).values()) <= eventmon.ROOM
        assert confirmed([1], 3)[1] <= eventmon.ROOM // 4


def test_a_late_watcher_gets_the_history_in_order_and_then_what_is_new():
    with Dispatcher() as dispatcher:
        for n in range(3000):
            dispatcher.send("step", n=n)
        with watching() as (receiver, events):
            wait_until(lambda: events)
            for n in range(3000, 3100):
                dispatcher.send("step", n=n)
            wait_until(lambda: len(events) >= 3100)
            assert dispatcher.flush(20) == 1
        assert [event["n"] for event in events] == list(range(3100))
        assert receiver.stats["lost"] == 0


def test_a_watcher_that_wants_no_history_starts_at_now():
    with Receiver() as receiver, Dispatcher() as dispatcher:
        for n in range(10):
            dispatcher.send("step", n=n)
        receiver.fileno()
        dispatcher.send("step", n=10)
        assert [event["n"] for event in receiver.itercapture(limit=1, timeout=20, wakeup=False)] == [10]
        assert list(receiver.itercapture(timeout=0.3, wakeup=False)) == []


def test_on_sockets_that_lose_a_third_of_everything_nothing_is_lost_up_to_the_goodbye(sockets):
    with watching() as (one, to_one), watching() as (two, to_two):
        with Dispatcher(hostname="a") as a, Dispatcher(hostname="b") as b:
            for dispatcher in (a, b):
                dispatcher.send("step", n=0)
            lose(0.3, *sockets)
            for n in range(1, 500):
                a.send("step", n=n)
                b.send("step", n=n)
        wait_until(lambda: len(to_one) == len(to_two) == 1000)
    for receiver, events in ((one, to_one), (two, to_two)):
        for name in "ab":
            assert [event["n"] for event in events if event["hostname"] == name] == list(range(500))
        assert receiver.stats["lost"] == 0
        assert receiver.stats["repaired"] > 50 or sys.platform != "linux"


def test_many_senders_that_start_and_end_together_lose_nothing():
    with watching() as (receiver, events):
        children = []
        for who in range(12):
            child = os.fork()
            if child == 0:
                with Dispatcher() as dispatcher:
                    for n in range(1000):
                        dispatcher.send("step", who=who, n=n)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        wait_until(lambda: len(events) == 12000)
        assert receiver.stats["lost"] == 0
    for who in range(12):
        assert [event["n"] for event in events if event["who"] == who] == list(range(1000))


def test_a_watcher_that_reads_late_gets_all_that_waits_in_its_socket():
    with Receiver() as receiver:
        receiver.fileno()
        with Dispatcher(max_wait=0) as dispatcher:
            dispatcher.send("step", n=0)
            assert [event["n"] for event in receiver.itercapture(limit=1, timeout=20)] == [0]
            for n in range(1, 300):
                dispatcher.send("step", n=n)
        assert [event["n"] for event in receiver.itercapture(limit=299, timeout=20)] == list(range(1, 300))
        assert receiver.stats["lost"] == 0


def test_all_that_a_dead_sender_had_announced_is_counted():
    with watching() as (receiver, events), Ear() as sender:
        for data in (b'EM2 data %b 1\n{"type":"a"}', b'EM2 data %b 3\n{"type":"c"}', b"EM2 beat %b 100 1\n"):
            sender.tell(receiver, data % STREAM)
        wait_until(lambda: receiver.stats["lost"] == 98)
    assert [event.type for event in events] == ["a", "c"]


def test_what_a_full_buffer_kept_from_a_watcher_is_counted_when_the_sender_is_gone(monkeypatch):
    monkeypatch.setattr(eventmon, "BUFFER", 4096)
    with Receiver() as receiver:
        receiver.fileno()
        with Dispatcher(max_wait=0) as dispatcher:
            dispatcher.send("step", n=0)
            assert [event["n"] for event in receiver.itercapture(limit=1, timeout=20)] == [0]
            for n in range(1, 500):
                dispatcher.send("step", n=n)
        got = list(receiver.itercapture(timeout=1.5))
        assert 0 < len(got) < 499
        assert len(got) + receiver.stats["lost"] == 499


def test_with_a_key_events_arrive_and_nothing_else_does():
    with watching(key="secret") as (receiver, events), Dispatcher(key=b"secret") as dispatcher:
        with Dispatcher() as open_one, Dispatcher(key="wrong") as wrong:
            open_one.send("open")
            wrong.send("wrong")
            dispatcher.send("right")
            assert dispatcher.flush(20) == 1
            assert (open_one.flush(), wrong.flush()) == (0, 0)
        assert receiver.handle_message(b'{"type":"bare"}', SOURCE) == []
        wait_until(lambda: events)
    assert [event.type for event in events] == ["right"]
    assert receiver.stats["rejected"] >= 3
    assert "secret" not in repr(receiver) + repr(dispatcher) + dispatcher.url


def test_without_a_key_a_sealed_stream_is_counted_as_rejected():
    receiver = Receiver()
    assert delivered(receiver, *captured("a", key="secret")) == []
    assert receiver.stats["rejected"] == 1


def test_a_sealed_datagram_seen_before_is_a_duplicate_and_one_too_old_is_rejected(virtual):
    receiver = Receiver(key="secret")
    data = captured("a", key="secret") * 3
    stream = eventmon.parse_frame(eventmon.unseal(data[0], b"secret")[0]).stream
    data.insert(1, eventmon.seal(eventmon.format_frame(b"beat", stream, (1, 1)), b"secret"))
    assert delivered(receiver, *data, data[1]) == ["a"]
    assert receiver.stats["duplicates"] == 3
    virtual.offset = 32
    assert delivered(Receiver(key="secret"), data[0]) == []


def test_when_the_clocks_are_set_back_or_forward_sealed_events_go_on(virtual):
    with watching(key="secret") as (_, events), Dispatcher(key="secret") as dispatcher:
        for number, virtual.offset in enumerate((0, -300, 300), 1):
            dispatcher.send("step")
            with Dispatcher(key="secret") as fresh:
                fresh.send("step")
            wait_until(lambda: len(events) == 2 * number)  # noqa: B023


def test_two_clocks_that_differ_are_named_as_such_on_both_sides(virtual):
    key = b"secret"
    with Receiver(key=key) as receiver, Ear() as ear:
        receiver.fileno()
        virtual.offset = 60
        ear.tell(receiver, eventmon.seal(eventmon.format_frame(b"beat", STREAM, (1, 1)), key))
        virtual.offset = 0
        wait_until(lambda: [*receiver.itercapture(timeout=0)] or receiver.problem)
        assert re.search("clock (60|59) s ahead", str(receiver.problem))
        assert ear.hear(b"leave", key=key)  # by which the sender learns the time here
    with Ear() as ear, Dispatcher(ear.url, key=key) as dispatcher:
        dispatcher.send("hello")
        ear.hear(b"data", key=key)
        virtual.offset = 60
        ear.answer(b"ack", 0, 7, 0, 0, key=key)
        virtual.offset = 0
        dispatcher.flush(0)
        assert re.search("clock (60|59) s ahead", str(dispatcher.problem))
        assert dispatcher.stats["watchers"] == 0


def test_an_answer_without_the_key_or_seen_before_does_nothing():
    key = b"secret"
    with Ear() as ear, Dispatcher(ear.url, key=key) as dispatcher:
        dispatcher.send("a")
        ear.hear(b"data", key=key)
        nak = eventmon.format_frame(b"nak", ear.stream, (0, 7, 4096, 0, 1), b"1")
        sealed = eventmon.seal(nak, key)
        ear.socket.sendto(sealed, ear.sender)
        ear.hear(b"data", key=key)
        for bad in (nak, sealed, eventmon.seal(nak, b"wrong"), b"x", sealed + b"1"):
            ear.socket.sendto(bad, ear.sender)
        wait_until(lambda: dispatcher.stats["rejected"] == 5)
        assert dispatcher.stats["repairs"] == 1


def test_the_documented_snippets_leave_nothing_open():
    python(
        "from eventmon import Dispatcher, Receiver, State\nstate = State()\nDispatcher().send('deploy-done', id=7)\n"
        "Receiver(handlers={'*': state.event}).capture(timeout=0)\nfor event in Receiver().itercapture(timeout=0): pass\n",
        "-X", "dev", "-W", "error",
    )  # fmt: skip


COMES_BACK = """
import eventmon, subprocess, threading, time
url = "udp://239.255.1.2:7000?interface=INTERFACE&ttl=1"
def ip(*commands):
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)
def up(address):
    ip("link add hub0 type bridge", f"address add {address}/24 dev hub0", "link set hub0 up")
up("10.9.0.1")
events = []
receiver, d = eventmon.Receiver(url), eventmon.Dispatcher(url)
receiver.fileno()
thread = threading.Thread(target=lambda: events.extend(receiver.itercapture()), daemon=True)
thread.start()
def wait_for(n):
    d.send("step", n=n)
    end = time.monotonic() + 15
    while not events or events[-1]["n"] != n:
        assert time.monotonic() < end, (events, d.stats, d.problem, receiver.stats)
        time.sleep(0.01)
wait_for(0)
ip("link delete hub0")
d.send("step", n=1)
time.sleep(0.3)
up("10.9.0.1")
wait_for(2)
CHANGE
print([event["n"] for event in events], receiver.stats["lost"])
"""
CHANGE = 'ip("address add 10.9.7.7/24 dev hub0", "address delete 10.9.0.1/24 dev hub0")\nwait_for(3)'


@pytest.mark.parametrize(
    "interface, change, got",
    [("10.9.0.1", "", [0, 1, 2]), ("hub0", CHANGE, [0, 1, 2, 3])],
    ids=["address", "name"],
)
def test_an_interface_that_goes_and_comes_again_is_used_again(interface, change, got, tmp_path):
    if not shutil.which("ip"):
        pytest.skip("ip is not here")
    (tmp_path / "comes_back.py").write_text(COMES_BACK.replace("INTERFACE", interface).replace("CHANGE", change))
    python_path = f"ip link set lo up; PYTHONPATH={shlex.quote(str(MODULE.parent))} {shlex.quote(sys.executable)}"
    out = namespace(f"{python_path} comes_back.py 2>&1 || true", tmp_path)
    if "Unknown device type" in out or "Operation not" in out:
        pytest.skip("no interface can be made here")
    assert out == f"{got} 0\n"


# --- State ---


def task_event(subject, host="w1", uuid="t", **fields):
    return Event(f"task-{subject}", uuid=uuid, hostname=host, **fields)


def state_of(*events, **options):
    state = State(**options)
    for event in events:
        state.event(event)
    return state


LIVES = [
    ("PENDING", [task_event("sent", "c")]),
    ("RECEIVED", [task_event("sent", "c", clock=9), task_event("received", clock=1)]),
    ("RECEIVED", [task_event("received"), task_event("sent", "c", clock=9)]),
    ("STARTED", [task_event("received"), task_event("started")]),
    ("SUCCESS", [task_event("received"), task_event("started"), task_event("succeeded", result="1")]),
    ("SUCCESS", [task_event("succeeded"), task_event("started")]),
    ("SUCCESS", [task_event("failed"), task_event("succeeded")]),
    ("FAILURE", [task_event("revoked"), task_event("failed"), task_event("rejected")]),
    ("PROGRESS", [task_event("started"), task_event("progress", progress=0.5)]),
    ("STARTED", [task_event("progress"), task_event("started")]),
    ("RECEIVED", [task_event("succeeded"), task_event("received")]),  # again, by the same process
    ("RECEIVED", [task_event("succeeded", timestamp=1.0), task_event("received", "w2", timestamp=2.0)]),
    ("SUCCESS", [task_event("succeeded", timestamp=2.0), task_event("received", "w2", timestamp=1.0)]),
    ("RECEIVED", [task_event("succeeded", retries=0), task_event("received", "w2", retries=1, timestamp=0.0)]),
    ("STARTED", [task_event("started", retries=1), task_event("failed", retries=0)]),
    ("RECEIVED", [task_event("started"), task_event("received", retries=1), task_event("retried")]),
    ("SUCCESS", [task_event("started", pid=2), task_event("succeeded", pid=2), task_event("received", pid=1)]),
    ("RETRY", [task_event("started"), task_event("retried")]),
    ("REJECTED", [task_event("received"), task_event("rejected")]),
]


@pytest.mark.parametrize("state, events", LIVES)
def test_a_task_is_in_the_state_that_its_events_say(state, events):
    assert state_of(*events).tasks["t"]["state"] == state


def stream(host, *events, pid=1):
    """The events of one process: subject -> fields, at the times that `at` or the order give."""
    return [
        task_event(subject, host, pid=pid, clock=n, **{"timestamp": float(n), "local_received": 9.0, **fields})
        for n, (subject, fields) in enumerate(events)
    ]


RETRIED = [  # as of Celery: the next attempt is received before the last one says that it is retried
    ("received", {"retries": 0, "name": "job", "args": "(1,)"}),
    ("started", {}),
    ("received", {"retries": 1, "name": "job"}),
    ("retried", {"exception": "refused (0)", "traceback": "T0"}),
    ("started", {}),
    ("retried", {"exception": "refused (1)", "traceback": "T1"}),
]
LAST = [("received", {"retries": 2, "name": "job"}), ("started", {"timestamp": 0.5}), ("succeeded", {"result": "ok"})]
MERGES = {  # streams of processes, and what their task shows at last, however they are merged
    "retried by one worker, then by another": (
        [stream("w1", *RETRIED), stream("w2", *LAST)],
        {"state": "SUCCESS", "worker": "w2", "exception": "refused (1)", "traceback": "T1", "retries": 2, "args": "(1,)"},
    ),
    "an old attempt goes on": (
        [stream("a", ("received", {"retries": 0}), ("started", {}), ("retried", {}), ("progress", {"progress": 0.5}))]
        + [stream("b", ("received", {"retries": 1, "timestamp": -5.0}))],
        {"state": "RECEIVED", "worker": "b", "retries": 1, "retried": 2.0},
    ),
    "received again after the worker died": (
        [stream("a", ("received", {}), ("started", {})), stream("b", ("received", {"timestamp": 5.0}))],
        {"state": "RECEIVED", "worker": "b", "received": 5.0, "started": 1.0},
    ),
    "received by the parent, run by a child": (
        [stream("h", ("received", {"name": "job"})), stream("h", ("started", {}), ("failed", {"exception": "E"}), pid=2)],
        {"state": "FAILURE", "worker": "h", "name": "job", "exception": "E", "started": 0.0},
    ),
    "sent by two clients": (
        [stream("c", ("sent", {"retries": 0, "queue": "q", "args": "sent"})), stream("d", ("sent", {"retries": 1}))]
        + [stream("w", ("received", {"retries": 0, "args": "(1,)"}), ("started", {}), ("progress", {"progress": 0.1}))],
        {"state": "PROGRESS", "client": "d", "queue": "q", "args": "(1,)", "worker": "w"},
    ),
    "a child and a parent": (
        [stream("w", ("received", {"parent_id": "t"}), ("sent", {"uuid": "p"})), stream("v", ("started", {"uuid": "p"}))],
        {"state": "RECEIVED", "parent_id": "t", "children": ["t"]},
    ),
}


def merges(lengths):
    """Every order in which streams of these lengths may come: lists of numbers of streams."""
    if not any(lengths):
        yield []
    for n, length in enumerate(lengths):
        if length:
            for rest in merges([*lengths[:n], length - 1, *lengths[n + 1 :]]):
                yield [n, *rest]


@pytest.mark.parametrize("streams, shown", MERGES.values(), ids=MERGES)
def test_at_any_moment_a_task_is_what_its_processes_told_in_whatever_order_their_streams_came(streams, shown):
    seen = {}
    for order in merges([len(events) for events in streams]):
        state, at = State(), [0] * len(streams)
        for n in order:
            state.event(streams[n][at[n]])
            at[n] += 1
            attempts = {uuid: state.attempts(uuid) for uuid in state.tasks}
            workers = {name: (worker["status"], worker["pid"]) for name, worker in state.workers.items()}
            picture = (json.loads(json.dumps(state.tasks)), attempts, workers)
            assert seen.setdefault(tuple(at), picture) == picture, order
    assert shown.items() <= state.tasks["t"].items()


def test_each_delivery_of_a_task_is_an_attempt():
    state = state_of(*stream("w1", *RETRIED), *stream("w2", *LAST))
    attempts = state.attempts("t")
    assert [(a["worker"], a["retries"], a["state"]) for a in attempts] == [
        ("w1", 0, "RETRY"), ("w1", 1, "RETRY"), ("w2", 2, "SUCCESS")
    ]  # fmt: skip
    assert [(a["received"], a["started"], a["ended"], a["exception"]) for a in attempts] == [
        (0.0, 1.0, 3.0, "refused (0)"), (2.0, 4.0, 5.0, "refused (1)"), (0.0, 0.5, 2.0, None)
    ]  # fmt: skip
    (only,) = state_of(*stream("w1", *RETRIED[:2])).attempts("t")
    assert (only["state"], only["ended"], only["pid"]) == ("STARTED", None, 1)
    assert state.attempts("unknown") == state_of(task_event("sent")).attempts("t") == []


def test_a_newer_event_overwrites_fields_but_never_with_null_and_a_late_one_fills_in():
    state = state_of(
        task_event("received", name="job", args="(1,)", eta=None),
        task_event("succeeded", result="2", args=None),
        task_event("started", args="late", queue="q"),
    )
    task = state.tasks["t"]
    assert (task["args"], task["result"], task["queue"], task["state"]) == ("(1,)", "2", "q", "SUCCESS")
    assert "eta" not in task


def test_events_are_counted_and_kept_and_notes_apart():
    types = ["task-received", "task-progress", "worker-heartbeat", "hello", "log-info", "worker-online", None]
    state = state_of(*({"type": type, "uuid": "u", "hostname": "h"} for type in types))
    assert (state.event_count, state.task_count, len(state.recent)) == (7, 1, 7)
    assert [event["type"] for event in state.notes] == ["hello", "log-info", "worker-online", None]
    assert repr(state) == "<State: 7 events, 1 tasks, 1 workers, 0 evicted>"


def test_the_callback_comes_first_and_then_the_method_for_the_type_which_may_be_replaced():
    calls = []

    class Mine(State):
        def task_started(self, event):
            calls.append(("method", event["uuid"]))
            super().task_started(event)

    state = Mine(lambda state, event: calls.append(("callback", len(state.tasks))))
    state.event(task_event("started"))
    assert calls == [("callback", 0), ("method", "t")]
    assert state.tasks["t"]["state"] == "STARTED"
    state.task_failed = calls.append
    state.event(task_event("failed"))
    assert (calls[-1].type, state.tasks["t"]["state"]) == ("task-failed", "STARTED")


def many_tasks():
    state = State()
    for n in range(10):
        for subject in ("received", "started", "succeeded")[: 1 + n % 3]:
            state.event(task_event(subject, f"w{n % 2}", str(n), name=f"job{n % 2}", timestamp=float(n)))
    return state


def test_tasks_are_listed_newest_first_or_oldest_by_name_and_by_worker():
    state = many_tasks()
    assert [uuid for uuid, _ in state.tasks_by_time()] == list("9876543210")
    assert [uuid for uuid, _ in state.tasks_by_time(3)] == list("987")
    assert [uuid for uuid, _ in state.tasks_by_time(2, reverse=False)] == list("01")
    assert [uuid for uuid, _ in state.tasks_by_type("job1", 2)] == list("97")
    assert [uuid for uuid, _ in state.tasks_by_worker("w0", 2, reverse=False)] == list("02")
    assert state.task_types() == ["job0", "job1"]
    assert len(list(state.itertasks())) == 10
    state.event(task_event("started", "w0", "0", timestamp=50.0))
    assert next(state.tasks_by_time())[0] == "0"
    state.get_task_info("1")["children"].append("X")
    assert (state.tasks["1"]["children"], state.get_task_info("nope")) == ([], None)


def test_active_tasks_are_listed_oldest_start_first():
    state = many_tasks()
    assert [uuid for uuid, _ in state.iteractive()] == list("0134679")
    state.event(task_event("sent", uuid="only-sent"))
    state.event(task_event("started", uuid="z", timestamp=-5.0))
    assert next(uuid for uuid, _ in state.iteractive()) == "z"


def test_each_kind_of_task_has_figures():
    state = State()
    for n in range(20):
        runtime = {"runtime": n + 1.0} if n else {}  # Celery tells none of a failure
        for subject, fields in (("started", {"name": "job"}), ("succeeded" if n else "failed", {"exception": "E", **runtime})):
            state.event(task_event(subject, uuid=str(n), timestamp=100.0 + (subject != "started"), **fields))
    for event in (task_event("started", uuid="r", name="run", timestamp=50.0), task_event("retried", uuid="x", name="again")):
        state.event(event)
    stats = state.type_stats(now=80.0)
    job = {"running": 0, "succeeded": 19, "failed": 1, "retried": 0, "mean": 10.5, "p95": 19.0, "max": 20.0}
    assert stats["job"] == {**job, "last": 101.0, "error": "E"}
    assert (stats["run"]["running"], stats["run"]["max"], stats["run"]["error"]) == (1, 30.0, None)
    assert (stats["again"]["retried"], stats["again"]["mean"]) == (1, None)


def test_the_successful_go_first_then_the_finished_then_what_was_only_sent_then_the_rest():
    state, gone = State(max_tasks_in_memory=5), []
    tasks = (("run", "started"), ("bad", "failed"), ("sent", "sent"), ("ok1", "succeeded"), ("ok2", "succeeded"))
    for uuid, subject in tasks:
        state.event(task_event(subject, uuid=uuid, parent_id="run"))
    for n in range(7):
        before = set(state.tasks)
        state.event(task_event("started", uuid=f"new{n}"))
        gone += before - set(state.tasks)
    assert gone == ["ok1", "ok2", "bad", "sent", "run", "new0", "new1"]
    assert (state.evicted, state.get_task_info("new6")["children"]) == (7, [])


def test_nothing_from_outside_makes_it_larger_than_it_may_be():
    state = State(max_tasks_in_memory=50, max_workers_in_memory=20)
    for n in range(1000):
        for subject in ("sent", "received", f"custom{n}", "failed", "received", "succeeded"):
            state.event(task_event(subject, f"w{n}", f"u{n}", parent_id=f"p{n}", name=f"name{n}", timestamp=n * 1e3))
        state.event(task_event("received", "w", "u", pid=n))
        state.event(Event("worker-heartbeat", hostname=f"w{n}", **{f"field{n}": n}))
        state.event(Event(f"type{n}" * 1000, hostname=f"h{n}"))
    size = len(pickle.dumps(state))
    for n in range(500):
        state.event(task_event("received", "w", "u", pid=n, **{f"field{n}": n}))
        state.event(Event("worker-lost", hostname="w", pid=n, **{f"field{n}": n}))
        state.event(Event(f"type{n}", hostname=f"h{n}"))
    assert (len(state.tasks), len(state.workers), len(state.recent)) == (50, 20, 1000)
    assert len(pickle.dumps(state)) < size + 1_000_000


@pytest.mark.parametrize("value", ["x" * (8 << 20), [[]] * 100_000], ids=["text", "nested"])
def test_the_oldest_large_values_are_forgotten_before_they_take_too_much_memory(value):
    state = State()
    for n in range(40):
        large = [str(n)] if n % 4 > 1 else f"{value}{n}" if isinstance(value, str) else value
        for type in ("task-received", "worker-online", "note"):
            state.event(Event(type, uuid=f"u{n}", hostname=f"h{n}", pid=1, large=large))
    kept = [task["large"] for task in state.tasks.values() if len(task["large"]) > 100]
    assert len(state.tasks) == len(state.workers) == 40
    if isinstance(value, str):
        assert state.evicted > 0
        assert 0 < sum(map(len, kept)) < eventmon.MAX_STATE
        assert len(state.tasks["u37"]["large"]) > 100 > len(state.tasks["u0"]["large"])
    else:
        assert kept[-1] == json.dumps(value).replace(" ", ""), "nested values are kept as JSON, which takes less"
    assert state.tasks["u38"]["large"] == ["38"]


JUNK = [None, True, -1, 10**30, 1e300, "", "x", "\x1b[2J", [], [1], {}, {"a": 1}, "task-started", "y" * 9999]


def test_any_fields_of_any_type_do_no_harm():
    chance = random.Random(1)
    state = State(max_tasks_in_memory=20, max_workers_in_memory=20)
    types = [*eventmon.METHODS, "task-progress", "task-", "task-pending", "hello", None, 5, ["x"]]
    names = ("uuid", "hostname", "timestamp", "clock", "local_received", "retries", "state", "name", "args", "runtime")
    names += ("parent_id", "children", "started", "freq", "progress", "result", "root_id", "worker", "pid", "active", "sent")
    for _ in range(5000):
        event = {"type": chance.choice(types)}
        for name in chance.sample(names, chance.randrange(len(names))):
            event[name] = chance.choice([*JUNK, "t1", "t2", "t3"])
        state.event(event)
        assert state.attempts("t1") is not None
    assert state.event_count == 5000
    assert state.task_types() is not None
    assert state.type_stats() is not None
    assert all(state.is_lost(task) in (True, False) for _, task in state.iteractive())
    assert state.alive_workers() is not None
    for page in eventmon.PAGES:
        shown(state, eventmon.View(page), 40, 120, time.time())


def test_a_worker_is_alive_until_its_end_or_until_a_heartbeat_is_overdue():
    state = state_of(
        Event("worker-online", hostname="w1", pid=1, freq=2.0, local_received=100.0, timestamp=105.0),
        task_event("received", "w3", pid=3, local_received=100.0, timestamp=100.0),
        task_event("sent", "client", local_received=100.0),
    )

    def alive(now=None):
        return sorted(worker["hostname"] for worker in state.alive_workers(now))

    assert (state.now(), state.workers["w1"]["clock_offset"], state.workers["w3"]["clock_offset"]) == (100.0, 5.0, 0.0)
    assert (alive(103.9), alive(104.1), alive(1e6)) == (["w1", "w3"], ["w3"], ["w3"])
    state.event(Event("any", hostname="w1", pid=1, local_received=110.0))
    assert (alive(), alive(113.9), state.is_lost(state.tasks["t"])) == (["w1", "w3"], ["w1", "w3"], False)
    for type, pid, status, lost in [
        ("worker-lost", 3, "lost", True), ("note", 3, "alive", False), ("worker-online", 4, "alive", False),
        ("worker-lost", 3, "alive", True), ("worker-offline", 4, "ended", True), ("note", 5, "ended", True),
    ]:  # fmt: skip
        state.event(Event(type, hostname="w3", pid=pid, local_received=111.0, timestamp=111.0 + (type == "worker-offline")))
        assert (state.workers["w3"]["status"], state.is_lost(state.tasks["t"])) == (status, lost), (type, pid)
    state.event(task_event("succeeded", "w3", pid=3, local_received=112.0))
    assert not state.is_lost(state.tasks["t"], 1e6)


def test_the_clock_of_a_live_state_is_not_the_one_that_can_be_set(monkeypatch):
    state = state_of(Event("worker-heartbeat", hostname="w", freq=2.0, local_received=time.time()))
    monkeypatch.setattr(eventmon.time, "time", lambda: time.monotonic() - 3600)
    assert abs(state.now() - state.workers["w"]["heard"]) < 2
    state.event(Event("note", hostname="v", local_received=eventmon.time.time()))
    assert sum(state.counts(1, 5.0)) == 2
    assert state.is_alive(state.workers["w"])
    assert not state.is_alive(state.workers["w"], state.now() + 5)


def test_workers_that_join_and_leave_are_told():
    calls = []
    state = State(
        on_node_join=lambda worker: calls.append(("join", worker["hostname"])),
        on_node_leave=lambda worker: calls.append(("leave", worker["hostname"])),
    )
    for type in ("worker-online", "worker-heartbeat", "worker-offline", "worker-offline", "note", "worker-lost"):
        state.event(Event(type, hostname="w"))
    state.event(Event("worker-heartbeat", hostname="v"))
    assert calls == [("join", "w"), ("leave", "w"), ("join", "w"), ("leave", "w"), ("join", "v")]


def test_the_last_event_of_a_worker_is_known_until_it_is_cleared():
    state = State()
    assert state.last_worker_event() is None
    for event in (Event("a", hostname="w1"), Event("b", hostname="w2"), Event("c")):
        state.event(event)
    assert (state.last_worker_event("w1").type, state.last_worker_event().type) == ("a", "b")
    assert state.last_worker_event("w3") is None
    state.clear()
    assert state.last_worker_event("w1") is state.last_worker_event() is None


def test_the_graph_counts_events_by_the_time_they_came():
    state = State()
    assert state.scale_graph(5, 8, 5.0, 100.0) == [0] * 5
    for second, events in ((90.1, 99), (95.1, 1), (97.1, 100), (99.1, 50)):
        for _ in range(events):
            state.event(Event("a", local_received=second))
    state.event(Event("b", local_received=96.1))
    assert state.counts(5, 5.0, 100.0) == [1, 1, 100, 0, 50]
    assert state.scale_graph(5, 8, 5.0, 100.0) == [1, 1, 8, 0, 4]
    assert state.scale_graph(5, 8, 5.0, 100.0, types=["b"]) == [0, 8, 0, 0, 0]
    assert state.scale_graph(0, 8, 5.0, 100.0) == []
    assert state.scale_graph(3, 8, 0.0, 100.0) == [0, 0, 0]
    assert sum(state.scale_graph(60, 8, 60.0, 500.0)) == 0


def test_clearing_forgets_the_finished_or_everything():
    state = many_tasks()
    state.clear_tasks()
    assert sorted(state.tasks) == list("0134679")
    assert (state.event_count, len(state.workers)) == (19, 2)
    state.clear()
    assert sorted(state.tasks) == list("0134679")
    assert (state.event_count, state.task_count, state.workers) == (0, 0, {})
    state.clear(ready=False)
    assert state.tasks == {}
    assert list(state.iteractive()) == []


def test_nothing_changes_while_frozen():
    state = many_tasks()
    other = threading.Thread(target=state.event, args=(Event("late"),))

    def look(factor, plus):
        other.start()
        other.join(0.05)
        return state.event_count * factor + plus

    assert state.freeze_while(look, 2, plus=1) == 39
    other.join()
    assert state.event_count == 20
    with pytest.raises(ZeroDivisionError):
        state.freeze_while(lambda: 1 / 0, clear_after=True)
    assert "2" not in state.tasks


def test_a_state_can_be_pickled_and_used_again():
    state = state_of(task_event("sent", "c", uuid="s"), *stream("w1", *RETRIED), callback=lambda state, event: None)
    again = pickle.loads(pickle.dumps(state))
    assert (again.tasks, again.attempts("t")) == (state.tasks, state.attempts("t"))
    for event in (task_event("received", uuid="s", queue="q"), task_event("succeeded", "w1", pid=1)):
        again.event(event)
    assert (again.tasks["s"]["client"], again.tasks["s"]["state"], again.tasks["t"]["succeeded"] > 5) == ("c", "RECEIVED", True)


# --- the screen ---

NOON = 43200.0  # the tests' screens are in UTC, of a day long ago
TRACEBACK = (
    'Traceback (most recent call last):\n  File "shop.py", line 7, in charge\n    pay(total)\nValueError: refused'
)


@pytest.fixture
def utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def heard(type, host, second, **fields):
    when = NOON + second
    return Event(type, hostname=host, timestamp=when, local_received=when, **fields)


def shop():
    """A State with a bit of everything: ten seconds of a shop's work, until NOON + 10."""
    run, resize, charge, report = "5d0c91aa-11", "81ffd017-22", "aca02be9-33", "0be1c7d2-44"
    software = {"sw_ident": "eventmon", "sw_ver": "0.1.0", "loadavg": [0.5, 0.25, 0.12]}
    return state_of(
        heard("worker-online", "beta@build-7", 0, freq=2, pid=202, active=0, processed=9, **software),
        heard("worker-offline", "beta@build-7", 1, freq=2, pid=202, active=0, processed=9, **software),
        heard("worker-online", "alpha@laptop", 1, freq=20, pid=101, active=1, processed=3, **software),
        heard("task-sent", "web@laptop", 1.5, uuid=run, name="shop.import", args="('2026-11.csv',)", kwargs="{}"),
        heard("task-received", "alpha@laptop", 1.75, uuid=run, name="shop.import", args="('2026-11.csv',)"),
        heard("task-started", "alpha@laptop", 2, uuid=run, pid=101),
        heard("task-received", "alpha@laptop", 3, uuid=resize, name="shop.resize", parent_id=run, root_id=run),
        heard("task-started", "alpha@laptop", 3, uuid=resize),
        heard("task-succeeded", "alpha@laptop", 4, uuid=resize, result="'photo.webp'", runtime=0.0021),
        heard("task-received", "alpha@laptop", 4, uuid=charge, name="shop.charge", args="(7, 'EUR')", parent_id=run),
        heard("task-started", "alpha@laptop", 4, uuid=charge),
        heard(
            *("task-failed", "alpha@laptop", 5),
            uuid=charge,
            exception="ValueError('refused')",
            traceback=TRACEBACK,
            runtime=0.75,
        ),
        heard("task-received", "alpha@laptop", 6, uuid=report, name="报表.生成", args="(1,)"),
        heard("task-retried", "alpha@laptop", 7, uuid=report, exception="Timeout('db')"),
        heard("deploy-done", "web@laptop", 8, version="1.2", ok=True),
        heard("task-progress", "alpha@laptop", 9, uuid=run, progress=0.4),
    )


def shown(state, view=None, rows=24, columns=80, now=NOON + 10, **status):
    """The screen as text, without the blanks at the ends of lines; of several empty lines one is left."""
    empty = "no events yet on udp://239.1.2.3:6986?ttl=0 — try: python eventmon.py send hello"
    status = {"url": "udp://239.1.2.3:6986?ttl=0", "empty": empty, **status}
    lines = eventmon.screen(state, view or eventmon.View(), rows, columns, now, status)
    texts = ["".join(text for text, _ in line) for line in lines]
    assert [eventmon.cells(text) for text in texts] == [columns] * rows
    assert all(text.isprintable() for text in texts)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(text.rstrip() for text in texts))


def typed(state, *keys, rows=24, columns=80):
    """The view after some keys, of which a str of several plain characters is so many keys."""
    view = eventmon.View()
    for key in keys:
        for part in [key] if key in eventmon.KEYS or key in eventmon.EDITS or key.startswith("click") else key:
            view = eventmon.press(view, part, state, rows, columns, NOON + 10)
    return view


def uuids(text):
    """The first letters of the uuids in the table."""
    return "".join(re.findall(r"\b([0-9a-f])[0-9a-f]{7} ", text))


def styles(state, view):
    """The style of each text on the screen."""
    lines = eventmon.screen(state, view, 24, 80, NOON + 10)
    return {text.strip(): style for line in lines for text, style in line if text.strip()}


SCREENS = {
    ("1", 24, 80): """\
 1 Tasks 4   2 Workers 1/2   3 Events 16  1.0/s       udp://239.1.2.3:6986?ttl=0
                                                             █  ▄      4/s
                                                            ▄█▄██▄▄▄▄▄ 70 s
 FAILURE 1   RETRY 1   PROGRESS 1   SUCCESS 1
TIME▾    STATE    NAME           UUID     WORKER          RUN RESULT
12:00:09 PROGRESS shop.import    5d0c91aa alpha@laptop   8.0s ━━━─────  40% ('2…
12:00:07 RETRY    报表.生成      0be1c7d2 alpha@laptop        Timeout('db')
12:00:05 FAILURE  shop.charge    aca02be9 alpha@laptop  750ms ValueError('refus…
12:00:04 SUCCESS  shop.resize    81ffd017 alpha@laptop    2ms 'photo.webp'

 q quit   ? keys   enter details   / filter   s sort   space freeze""",
    ("1", 40, 120): """\
 1 Tasks 4   2 Workers 1/2   3 Events 16  1.0/s                                               udp://239.1.2.3:6986?ttl=0
                                                                                                     █         4/s
                                                                                                     █  █
                                                                                                     █ ██
                                                                                                    ██████████ 110 s
 FAILURE 1   RETRY 1   PROGRESS 1   SUCCESS 1
TIME▾    STATE    NAME                       UUID     WORKER                  RUN RESULT
12:00:09 PROGRESS shop.import                5d0c91aa alpha@laptop           8.0s ━━━─────  40% ('2026-11.csv',)
12:00:07 RETRY    报表.生成                  0be1c7d2 alpha@laptop                Timeout('db')
12:00:05 FAILURE  shop.charge                aca02be9 alpha@laptop          750ms ValueError('refused')
12:00:04 SUCCESS  shop.resize                81ffd017 alpha@laptop            2ms 'photo.webp'

 q quit   ? keys   enter details   / filter   s sort   space freeze   c clear finished""",
    ("1", 10, 40): """\
 1 Tasks 4   2 Workers 1/2  1.0/s
                    ▂█▂▄▆▂▂▂▂▂ 4/s
 FAILURE 1   RETRY 1   PROGRESS 1
TIME▾    STATE    NAME               RUN
12:00:09 PROGRESS shop.import       8.0s
12:00:07 RETRY    报表.生成
12:00:05 FAILURE  shop.charge      750ms
12:00:04 SUCCESS  shop.resize        2ms

 q quit   ? keys   enter details""",
    ("1", 5, 20): """\
 1 Tasks 4  1.0/s
PROGRESS shop.import
RETRY    报表.生成
FAILURE  shop.charge
 q quit   ? keys""",
    ("1", 2, 3): """\
sh…
报…""",
    ("1", 1, 1): """\
…""",
    ("2", 24, 80): """\
 1 Tasks 4   2 Workers 1/2   3 Events 16  1.0/s       udp://239.1.2.3:6986?ttl=0
                                                             █  ▄      4/s
                                                            ▄█▄██▄▄▄▄▄ 70 s
 FAILURE 1   RETRY 1   PROGRESS 1   SUCCESS 1
WORKER▾                   STATUS      PID  ACTIVE     DONE  HEARD LOAD
alpha@laptop              alive       101       1        3   1.0s 0.5 0.25 0.12
beta@build-7              gone        202       0        9   9.0s 0.5 0.25 0.12

 q quit   ? keys   enter details   / filter   s sort   space freeze""",
    ("2", 40, 120): """\
 1 Tasks 4   2 Workers 1/2   3 Events 16  1.0/s                                               udp://239.1.2.3:6986?ttl=0
                                                                                                     █         4/s
                                                                                                     █  █
                                                                                                     █ ██
                                                                                                    ██████████ 110 s
 FAILURE 1   RETRY 1   PROGRESS 1   SUCCESS 1
WORKER▾                       STATUS      PID  ACTIVE     DONE  HEARD LOAD           SOFTWARE
alpha@laptop                  alive       101       1        3   1.0s 0.5 0.25 0.12  eventmon 0.1.0
beta@build-7                  gone        202       0        9   9.0s 0.5 0.25 0.12  eventmon 0.1.0

 q quit   ? keys   enter details   / filter   s sort   space freeze   c clear finished""",
    ("2", 10, 40): """\
 1 Tasks 4   2 Workers 1/2  1.0/s
                    ▂█▂▄▆▂▂▂▂▂ 4/s
 FAILURE 1   RETRY 1   PROGRESS 1
WORKER▾                  STATUS   ACTIVE
alpha@laptop             alive         1
beta@build-7             gone          0

 q quit   ? keys   enter details""",
    ("2", 5, 20): """\
 2 Workers 1/2
alpha@laptop
beta@build-7

 q quit   ? keys""",
    ("2", 2, 3): """\
al…
be…""",
    ("2", 1, 1): """\
…""",
    ("3", 24, 80): """\
 1 Tasks 4   2 Workers 1/2   3 Events 16  1.0/s       udp://239.1.2.3:6986?ttl=0
                                                             █  ▄      4/s
                                                            ▄█▄██▄▄▄▄▄ 70 s
 FAILURE 1   RETRY 1   PROGRESS 1   SUCCESS 1
TIME▾        TYPE              HOST            FIELDS
12:00:09.000 task-progress     alpha@laptop    name=shop.import uuid=5d0c91aa-1…
12:00:08.000 deploy-done       web@laptop      version=1.2 ok=true
12:00:07.000 task-retried      alpha@laptop    name=报表.生成 uuid=0be1c7d2-44 …
12:00:06.000 task-received     alpha@laptop    uuid=0be1c7d2-44 name=报表.生成 …
12:00:05.000 task-failed       alpha@laptop    name=shop.charge uuid=aca02be9-3…
12:00:04.000 task-started      alpha@laptop    name=shop.charge uuid=aca02be9-33
12:00:04.000 task-received     alpha@laptop    uuid=aca02be9-33 name=shop.charg…
12:00:04.000 task-succeeded    alpha@laptop    name=shop.resize uuid=81ffd017-2…
12:00:03.000 task-started      alpha@laptop    name=shop.resize uuid=81ffd017-22
12:00:03.000 task-received     alpha@laptop    uuid=81ffd017-22 name=shop.resiz…
12:00:02.000 task-started      alpha@laptop    name=shop.import uuid=5d0c91aa-11
12:00:01.750 task-received     alpha@laptop    uuid=5d0c91aa-11 name=shop.impor…
12:00:01.500 task-sent         web@laptop      uuid=5d0c91aa-11 name=shop.impor…
12:00:01.000 worker-online     alpha@laptop    freq=20 active=1 processed=3 sw_…
12:00:01.000 worker-offline    beta@build-7    freq=2 active=0 processed=9 sw_i…
12:00:00.000 worker-online     beta@build-7    freq=2 active=0 processed=9 sw_i…

 q quit   ? keys   enter details   / filter   s sort   space freeze""",
    ("3", 40, 120): """\
 1 Tasks 4   2 Workers 1/2   3 Events 16  1.0/s                                               udp://239.1.2.3:6986?ttl=0
                                                                                                     █         4/s
                                                                                                     █  █
                                                                                                     █ ██
                                                                                                    ██████████ 110 s
 FAILURE 1   RETRY 1   PROGRESS 1   SUCCESS 1
TIME▾        TYPE                    HOST                  FIELDS
12:00:09.000 task-progress           alpha@laptop          name=shop.import uuid=5d0c91aa-11 progress=0.4
12:00:08.000 deploy-done             web@laptop            version=1.2 ok=true
12:00:07.000 task-retried            alpha@laptop          name=报表.生成 uuid=0be1c7d2-44 exception=Timeout('db')
12:00:06.000 task-received           alpha@laptop          uuid=0be1c7d2-44 name=报表.生成 args=(1,)
12:00:05.000 task-failed             alpha@laptop          name=shop.charge uuid=aca02be9-33 exception=ValueError('refu…
12:00:04.000 task-started            alpha@laptop          name=shop.charge uuid=aca02be9-33
12:00:04.000 task-received           alpha@laptop          uuid=aca02be9-33 name=shop.charge args=(7, 'EUR') parent_id=…
12:00:04.000 task-succeeded          alpha@laptop          name=shop.resize uuid=81ffd017-22 result='photo.webp' runtim…
12:00:03.000 task-started            alpha@laptop          name=shop.resize uuid=81ffd017-22
12:00:03.000 task-received           alpha@laptop          uuid=81ffd017-22 name=shop.resize parent_id=5d0c91aa-11 root…
12:00:02.000 task-started            alpha@laptop          name=shop.import uuid=5d0c91aa-11
12:00:01.750 task-received           alpha@laptop          uuid=5d0c91aa-11 name=shop.import args=('2026-11.csv',)
12:00:01.500 task-sent               web@laptop            uuid=5d0c91aa-11 name=shop.import args=('2026-11.csv',) kwar…
12:00:01.000 worker-online           alpha@laptop          freq=20 active=1 processed=3 sw_ident=eventmon sw_ver=0.1.0 …
12:00:01.000 worker-offline          beta@build-7          freq=2 active=0 processed=9 sw_ident=eventmon sw_ver=0.1.0 l…
12:00:00.000 worker-online           beta@build-7          freq=2 active=0 processed=9 sw_ident=eventmon sw_ver=0.1.0 l…

 q quit   ? keys   enter details   / filter   s sort   space freeze   c clear finished""",
    ("3", 10, 40): """\
 1 Tasks 4   3 Events 16  1.0/s
                    ▂█▂▄▆▂▂▂▂▂ 4/s
 FAILURE 1   RETRY 1   PROGRESS 1
TYPE            FIELDS
task-progress   name=shop.import uuid=5…
deploy-done     version=1.2 ok=true
task-retried    name=报表.生成 uuid=0be…
task-received   uuid=0be1c7d2-44 name=…
task-failed     name=shop.charge uuid=a…
 q quit   ? keys   enter details""",
    ("3", 5, 20): """\
 3 Events 16  1.0/s
task-progress
deploy-done
task-retried
 q quit   ? keys""",
    ("3", 2, 3): """\
ta…
de…""",
    ("3", 1, 1): """\
…""",
}
DETAILS = """\
 1 Tasks 4   2 Workers 1/2   3 Events 16  1.0/s       udp://239.1.2.3:6986?ttl=0
 task aca02be9-33
name        shop.charge
uuid        aca02be9-33
state       FAILURE  750ms
worker      alpha@laptop
args        (7, 'EUR')
exception   ValueError('refused')
received    1970-01-01 12:00:04.000
started     1970-01-01 12:00:04.000  +0ms
failed      1970-01-01 12:00:05.000  +1.0s
parent      5d0c91aa  PROGRESS  shop.import  ━━━─────  40% ('2026-11.csv',)
runtime     0.75

Traceback (most recent call last):
  File "shop.py", line 7, in charge
    pay(total)
ValueError: refused

 1-16 of 16   q back   j/k scroll   tab next link   enter go there"""


SIZES = [(24, 80), (40, 120), (10, 40), (5, 20), (2, 3), (1, 1), (100, 300), (1, 300), (100, 1)]
ODD = (
    None,
    7,
    -1.5,
    math.nan,
    10**30,
    True,
    [1, ["\x1b"]],
    {"a": None, "\x07": {}},
    "",
    "x" * 3000,
    "日本" * 50,
    "e\u0301" * 40,
)


def odd():
    """A State with None, numbers, lists and dicts everywhere that events can bring them to."""
    state = State()
    for index, value in enumerate(ODD):
        fields = (
            "name",
            "args",
            "kwargs",
            "result",
            "exception",
            "traceback",
            "progress",
            "runtime",
            "retries",
            "queue",
        )
        subject = ("received", "started", "progress", "failed", "retried")[index % 5]
        state.event(
            {"type": f"task-{subject}", "uuid": f"{index:08d}", "timestamp": value, **dict.fromkeys(fields, value)}
        )
        state.event(
            {"type": "worker-heartbeat", "hostname": f"w{index}", "freq": value, "active": value, "loadavg": value}
        )
        state.event({"type": value, "timestamp": value, "hostname": value, "local_received": value})
    return state


def crowd():
    """A State with 10,000 tasks, of which the last 1,667 are not finished."""
    state = State()
    for n in range(10_000):
        for subject in ("received", "started", "succeeded" if n < 8333 else "progress"):
            state.event(heard(f"task-{subject}", f"w{n % 7}", n / 1000, uuid=f"{n:08x}-9", name=f"job{n % 3}"))
    return state


@pytest.mark.parametrize("number, rows, columns", SCREENS)
def test_the_screen_shows_each_view_at_any_size(number, rows, columns, utc):
    assert shown(shop(), eventmon.View(number), rows, columns) == SCREENS[number, rows, columns]


@pytest.mark.parametrize("make", [State, shop, odd, crowd])
def test_the_screen_is_exactly_as_large_as_the_terminal_whatever_is_open(make):
    state = make()
    for keys in ("1", "2", "3", "1i", "2i", "3i", "3it", "1t", "1r", "?", "/w1", "1ssi", "1 ", "1G", "1/state:"):
        for rows, columns in SIZES:
            shown(state, typed(state, keys, rows=rows, columns=columns), rows, columns, lost=3)


def test_ten_thousand_tasks_are_a_screen_like_any_other(utc):
    lines = shown(crowd()).splitlines()
    assert lines[0].startswith(" 1 Tasks 10,000   2 Workers 7   3 Events 30,000  3,000/s ")
    assert lines[3] == " PROGRESS 1,667   SUCCESS 8,333"
    assert lines[5] == "12:00:09 PROGRESS job0           0000270f w3              1ms"
    assert len(lines) == 24
    state = crowd()
    assert (
        shown(state, typed(state, "G")).splitlines()[22]
        == "12:00:00 SUCCESS  job0           00000000 w0              0ms"
    )


def test_fields_of_any_kind_are_shown():
    text = shown(odd(), eventmon.View("1"))
    assert '[1, ["\\u001b"]]' in text
    assert "日本日本日本…" in text
    assert len(re.findall(r"\b0000\d{4}\b", text)) == len(ODD)
    assert len(re.findall(r"(?m)^w\d", shown(odd(), eventmon.View("2")))) == len(ODD)
    assert "freq=" in shown(odd(), eventmon.View("3"))


@pytest.mark.parametrize("number", "123")
def test_an_empty_screen_says_what_to_do_next(number):
    hint = "no events yet on udp://239.1.2.3:6986?ttl=0 — try: python eventmon.py send hello"
    assert shown(State(), eventmon.View(number)).splitlines()[5] == hint
    state = state_of(heard("hello", "w1", 0))
    assert shown(state, eventmon.View(number)).splitlines()[5] == {
        "1": "no tasks yet: 3 shows every event",
        "2": "no workers yet: a Dispatcher with freq=2 is one, and so is the host of a task",
    }.get(number, shown(state, eventmon.View("3")).splitlines()[5])
    assert "nothing matches zzz" in shown(state, typed(state, number, "/zzz"))


def test_until_a_view_is_chosen_it_is_the_one_that_has_something():
    state = state_of(heard("hello", "w1", 0))
    assert "TYPE" in shown(state)
    pinned = typed(state, "j")
    state.event(heard("task-sent", "w1", 1, uuid="1"))
    assert "TYPE" not in shown(state)
    assert "TYPE" in shown(state, pinned)


def test_the_header_says_what_was_lost_rejected_or_evicted():
    state = state_of(*(heard("task-sent", "c", 0, uuid=str(n)) for n in range(3)), max_tasks_in_memory=1)
    quiet = shown(state_of(heard("task-sent", "c", 0, uuid="1")), lost=0, rejected=0).splitlines()[0]
    assert not re.search("lost|rejected|evicted", quiet)
    loud = shown(state, lost=1234, rejected=5).splitlines()[0]
    assert "1,234 lost   5 rejected   2 evicted" in loud
    narrow = shown(state, None, 24, 40, lost=1234, rejected=5).splitlines()[0]
    assert "1,234 lost" in narrow


def test_a_running_task_counts_its_time_and_a_finished_one_does_not():
    before, after = (shown(shop(), now=NOON + now).splitlines() for now in (10, 11))
    assert [line.split()[5] for line in (before[5], after[5])] == ["8.0s", "9.0s"]
    assert before[6:8] == after[6:8]


def test_failures_stand_out():
    look = styles(state_of(*shop().recent, task_event("started")), eventmon.View("1"))
    assert (look["FAILURE"], look["FAILURE 1"], look["ValueError('refus…"]) == ("red",) * 3
    assert (look["SUCCESS"], look["RETRY"], look["STARTED 1"]) == ("green", "yellow", "cyan")
    state = state_of(heard("task-sent", "c", 0, uuid="1"))
    title = eventmon.screen(state, eventmon.View(), 24, 80, NOON, {"lost": 3})[0]
    assert ("3 lost", "alarm") in [(text.strip(), style) for text, style in title]


def test_a_task_of_another_day_shows_the_day(utc):
    state = state_of(heard("task-sent", "c", -2 * 86400, uuid="1"), heard("task-sent", "c", 0, uuid="2"))
    assert [line.split()[0] for line in shown(state).splitlines()[5:7]] == ["12:00:00", "12-30"]


def test_details_show_everything_and_lead_to_parent_and_children(utc):
    state = shop()
    charge = typed(state, "1jj", "^J")
    assert shown(state, charge) == DETAILS
    assert (
        shown(state, typed(state, "1jj", "^J", "^J")).splitlines()[1] == " task aca02be9-33"
    )  # it only chooses a link
    parent = typed(state, "1jj", "^J", "^I", "^J")
    assert "task 5d0c91aa-11" in shown(state, parent)
    child = typed(state, "1jj", "^J", "^I", "^J", "^I", "^I", "^J")
    assert "task aca02be9-33" in shown(state, child)
    assert shown(state, typed(state, "1jj", "^J", "^I", "^J", "KEY_BTAB", "^J", "q", "^[", "q")) == shown(
        state, typed(state, "1jj")
    )


def test_a_task_that_is_forgotten_while_it_is_open_says_so():
    state = shop()
    view = typed(state, "1jji")
    assert "traceback" not in shown(state, typed(state, "c"))
    assert "aca02be9-33 is not in memory: cleared, or evicted to make room" in shown(state, view)


def test_details_scroll_and_keep_the_lines_of_a_traceback():
    lines = [f"line {n}" for n in range(100)]
    state = state_of(task_event("failed", exception="E()", traceback="\n".join(lines)))
    assert "line 0" in shown(state, typed(state, "1t"))
    assert shown(state, typed(state, "1tG")).splitlines()[-2] == "line 99"
    assert shown(state, typed(state, "1tGk")).splitlines()[-2] == "line 98"
    assert shown(state, typed(state, "1tGjjk")).splitlines()[-2] == "line 98"
    assert " 79-99 of 100 " in shown(state, typed(state, "1tGk"))
    assert shown(state, typed(state, "1tGg")) == shown(state, typed(state, "1t"))
    assert shown(state, typed(state, "1t", "wheel down", "wheel up")) == shown(state, typed(state, "1t"))


def test_long_values_are_wrapped_in_the_details():
    state = state_of(task_event("succeeded", result="x" * 200 + " the end"))
    text = shown(state, typed(state, "1i"))
    assert text.count("x") - text.count("next") == 200
    assert re.search(r"result +x+\n +x+", text)
    assert "xxx the end" in shown(state, typed(state, "1r"))


def test_a_worker_and_an_event_have_details_too(utc):
    state = shop()
    worker = shown(state, typed(state, "2i"))
    assert "status      alive" in worker
    assert "tasks       5d0c91aa  PROGRESS  shop.import" in worker
    event = shown(state, typed(state, "3j", "KEY_ENTER"))
    assert "type        deploy-done" in event
    assert "version     1.2" in event
    assert "task 5d0c91aa-11" in shown(state, typed(state, "3i", "^I", "^J"))


@pytest.mark.parametrize(
    "text, matching",
    [
        *(
            ("", "50a8"),
            ("SHOP", "5a8"),
            ("shop refused", "a"),
            ("eur", "a"),
            ("webp", "8"),
            ("生成", "0"),
            ("zzz", ""),
        ),
        *(("state:fail", "a"), ("state:FAILURE,retry", "0a"), ("state:failure,", "a"), ("state:", "50a8")),
        *(("name:shop state:success", "8"), ("worker:alpha", "50a8"), ("worker:web", ""), ("uuid:5d", "5")),
        *(("type:whatever", "50a8"), ("12:30", ""), ("a,b", "")),
    ],
)
def test_a_filter_is_words_that_must_all_be_found(text, matching):
    state = shop()
    screen = shown(state, typed(state, "1/", *text))
    assert uuids(screen) == matching
    assert screen.splitlines()[-1].startswith(f"/{text}█  {len(matching)} of 4 ")


def test_filters_know_the_fields_of_workers_and_events():
    state = shop()
    assert " 1 of 16 " in shown(state, typed(state, "3/deploy"))
    assert " 0 of 16 " in shown(state, typed(state, "3/clock"))
    assert " 1 of 16 " in shown(state, typed(state, "3/state:failure"))
    assert " 1 of 16 " in shown(state, typed(state, "3/state:progress"))
    assert " 1 of 16 " in shown(state, typed(state, "3/type:deploy host:web"))
    assert " 4 of 16 " in shown(state, typed(state, "3/uuid:5d0c"))
    assert " 1 of 2 " in shown(state, typed(state, "2/beta"))
    assert " 2 of 2 " in shown(state, typed(state, "2/0.1.0 state:failure"))


def test_a_filter_is_typed_edited_kept_and_dropped():
    state = shop()
    assert typed(state, "/qj 1").filter == "qj 1"
    assert typed(state, "/日本", "KEY_BACKSPACE").filter == "日"
    assert typed(state, "/one two", "^W").filter == "one "
    assert typed(state, "/one two", "^U").filter == ""
    kept = typed(state, "1/shop", "^J")
    assert (kept.filter, kept.typing) == ("shop", False)
    assert shown(state, kept).splitlines()[-1].startswith("/shop  3 of 4   esc drop filter   q quit")
    assert typed(state, "1/shop", "^J", "/x").filter == "shopx"
    assert typed(state, "1/shop", "^[")[6:8] == typed(state, "1/shop", "^J", "^[")[6:8] == ("", False)
    assert typed(state, "1/shop", "KEY_DOWN").selected == "aca02be9-33"
    assert len(typed(state, "/", *"x" * 1000).filter) == 100


def test_keys_move_the_selection():
    state = many_tasks()
    for keys, selected in [
        *((["j"], "8"), (["KEY_DOWN"], "8"), (["G"], "0"), (["KEY_END"], "0"), (["G", "g"], None), (["jk"], None)),
        *((["KEY_NPAGE"], "0"), (["G", "KEY_PPAGE"], None), (["wheel down"], "6"), (["G", "wheel up"], "3")),
        *((["k"], None), (["G", "j"], "0"), (["click 7"], "7"), (["click 0"], None), (["click 22"], None)),
    ]:
        assert typed(state, "1", *keys).selected == selected, keys


def test_the_selection_stays_on_its_task_and_line_when_rows_move():
    state = many_tasks()
    view = typed(state, "1jj")

    def line_of(style):
        lines = eventmon.screen(state, view, 12, 80, NOON)
        return next((n, line[6][0].strip()) for n, line in enumerate(lines) if line[0][1] == style)

    assert line_of("selected") == (6, "7")
    for n in range(50):
        state.event(task_event("received", uuid=f"new{n}", timestamp=100.0 + n))
    assert line_of("selected") == (6, "7")
    view = view._replace(filter="job1")
    assert line_of("selected") == (5, "7")
    view = eventmon.View("1")
    assert line_of("selected") == (4, "new49")


def test_uuids_are_short_in_the_table_and_whole_in_the_details():
    uuid = "5d0c91aa-05b0-41f9-9527-429e9295c494"
    state = state_of(task_event("sent", uuid=uuid, root_id=uuid))
    assert "uuid=5d0c91aa root_id=5d0c91aa\n" in shown(state, eventmon.View("3"))
    assert uuid in shown(state, typed(state, "3i"))
    assert uuid not in shown(state, eventmon.View("1"))


def test_a_click_selects_a_row_and_opens_what_is_selected():
    state = shop()
    assert typed(state, "1", "click 7").selected == "aca02be9-33"
    assert "task aca02be9-33" in shown(state, typed(state, "1", "click 7", "click 7"))
    assert "task 5d0c91aa-11" in shown(state, typed(state, "1", "click 7", "click 7", "click 11"))
    opened = typed(state, "1", "click 7", "click 7")
    assert typed(state, "1", "click 7", "click 7", "click 3", "click 23", "click 0") == opened


def test_tab_and_numbers_turn_the_pages():
    state = shop()
    assert [typed(state, *keys).page for keys in (["^I"], ["^I", "^I"], ["^I", "^I", "^I"], "2", "3", "1")] == list(
        "231231"
    )
    assert typed(state, "1jji3").panels == ()


def test_each_page_is_found_again_as_it_was_left():
    state = shop()
    view = typed(state, "1ssjj", "2sj", "3")
    assert typed(state, "1ssjj", "2sj", "3", "1")[1:5] == typed(state, "1ssjj")[1:5]
    assert (eventmon.press(view, "2", state, 24, 80, NOON).selected, view.order) == ("beta@build-7", 0)
    assert view.filter == typed(state, "1/x", "^J", "2").filter.replace("x", "")


def test_s_sorts_by_one_column_after_the_other():
    state = shop()
    orders = {"": "50a8", "s": "a508", "ss": "a580", "sss": "50a8", "ssss": "5a80", "sssss": "50a8"}
    for keys, order in orders.items():
        assert uuids(shown(state, typed(state, "1" + keys))) == order, keys
    assert "NAME▾" in shown(state, typed(state, "1ss"))
    assert "  RUN▾ RESULT" in shown(state, typed(state, "1ssss"))


def test_space_freezes_the_picture_while_events_are_counted(utc):
    state = shop()
    view = typed(state, "1 ")
    before = shown(state, view).splitlines()
    state.event(heard("task-succeeded", "alpha@laptop", 11, uuid="5d0c91aa-11"))
    after = shown(state, view, now=NOON + 15).splitlines()
    assert after[5:] == before[5:]
    assert " FROZEN +1   1 Tasks 4   2 Workers 1/2   3 Events 17 " in after[0]
    assert after[3].startswith(" FAILURE 1   RETRY 1   SUCCESS 2")
    view = eventmon.press(view, "j", state, 24, 80, NOON + 15)
    assert view.selected == "0be1c7d2-44"
    for key in (" ", "^["):
        thawed = eventmon.press(view, key, state, 24, 80, NOON + 15)
        assert "SUCCESS  shop.import" in shown(state, thawed)


def everything_changes(state):
    """Events that change every task and worker, and add one of each."""
    for uuid in list(state.tasks):
        state.event(heard("task-failed", "alpha@laptop", 20, uuid=uuid, exception="new", traceback="new", retries=9))
    state.event(heard("task-sent", "new@laptop", 20, uuid="new", name="new", parent_id="5d0c91aa-11"))
    state.event(heard("worker-heartbeat", "alpha@laptop", 20, active=99, processed=99, sw_ident="new"))
    state.event(heard("worker-online", "new@laptop", 20))


@pytest.mark.parametrize("keys", ["1", "2", "3", "1i", "1ji", "1t", "2i", "3i", "1s"])
def test_a_frozen_picture_stands_still_whatever_comes(keys):
    state = shop()
    view = typed(state, " ", keys)
    before = shown(state, view).splitlines()
    everything_changes(state)
    after = shown(state, view, now=NOON + 100).splitlines()
    fixed = 1 if "i" in keys or "t" in keys else 4
    assert after[fixed:] == before[fixed:]
    assert after[0] != before[0]
    assert shown(state, view._replace(frozen=None)).splitlines()[fixed:] != before[fixed:]


def test_what_is_not_frozen_shows_the_present():
    state = shop()
    view = typed(state, " 1")
    everything_changes(state)
    lines = shown(state, view, now=NOON + 21).splitlines()
    assert " FROZEN +7 " in lines[0]
    assert "2 Workers 2/3" in lines[0]
    assert lines[3] == " FAILURE 4   PENDING 1"
    assert "█" in lines[2][68:70]


@pytest.mark.parametrize(
    "keys, kinds",
    [
        *(
            (["1i"], ["task"]),
            (["1ii"], ["task"]),
            (["1iii"], ["task", "task"]),
            (["1jji", "^I", "^J"], ["task", "task"]),
            (["1jjit"], ["task", "traceback"]),
        ),
        *((["1tt"], ["traceback"]), (["1tr"], ["traceback", "result"]), (["??"], ["keys"]), (["?r"], ["keys"])),
        *((["2i", "r"], ["worker"]), (["2t"], []), (["3t"], ["traceback"]), (["3it"], ["event", "traceback"])),
        *(
            (["3jt"], []),
            (["1i", "^I"], ["task"]),
            (["1i3"], []),
            (["1i/"], []),
            (["1is"], ["task"]),
            (["2i", "^I", "^J"], ["worker", "task"]),
        ),
        *((["1iqq"], []), (["1i?", "^["], ["task"]), (["1jjitq"], ["task"])),
    ],
)
def test_keys_open_panels_above_each_other(keys, kinds):
    assert [panel.kind for panel in typed(shop(), *keys).panels] == kinds


def test_going_to_and_fro_between_tasks_opens_no_more_than_some_panels():
    state = shop()
    view = typed(state, "1jji", *["^I", "^J"] * 100)
    assert len(view.panels) == eventmon.MAX_PANELS


def test_the_chosen_link_stays_chosen_when_others_come():
    state = shop()
    view = typed(state, "2i", "^I", "^I", "^I")
    chosen = [text for text, style in styles(state, view).items() if style == "selected"]
    assert chosen[-1].startswith("aca02be9")
    state.event(heard("task-received", "alpha@laptop", 11, uuid="new"))
    assert [text for text, style in styles(state, view).items() if style == "selected"] == chosen
    assert "task aca02be9" in shown(state, eventmon.press(view, "^J", state, 24, 80, NOON))
    assert typed(state, "2i", *["^I"] * 5).panels == typed(state, "2i", *["^I"] * 10).panels


def test_a_link_out_of_sight_is_scrolled_to():
    state = state_of(heard("task-received", "w", 0, uuid="mother"))
    for n in range(300):
        state.event(heard("task-received", "w", 1, uuid=f"child{n:03}", parent_id="mother"))
    assert "and 200 more" in shown(state, typed(state, "1Gi", "G"))
    view = typed(state, "1Gi", *["^I"] * 50)
    assert "child050 " in shown(state, view)
    assert "child050 " not in shown(state, typed(state, "1Gi"))
    assert "child000 " in shown(state, typed(state, "1Gi", *["^I"] * 101))
    assert "child099 " in shown(state, typed(state, "1Gi", "KEY_BTAB"))


def test_the_selection_keeps_its_line_when_its_task_goes():
    state = many_tasks()
    view = typed(state, "1jjjj")
    assert view.selected == "5"
    state.clear_tasks()
    row = next(line for line in eventmon.screen(state, view, 24, 80, NOON) if line[0][1] == "selected")
    assert row[6][0].strip() == "3"
    assert view._replace(filter="").selected == "5"


def test_equal_events_are_events_apart():
    events = [{"type": "tick", "timestamp": 1.0} for _ in range(5)]
    state = state_of(*events)
    assert [typed(state, "3" + "j" * n).selected is events[4 - n] for n in (1, 2, 3, 4, 5)] == [True] * 4 + [False]


def test_a_click_while_a_filter_is_typed_leaves_the_filter_as_it_is():
    state = shop()
    view = typed(state, "1/a", "click 5", "click 5", "q")
    assert (view.filter, view.typing, view.panels, view.done) == ("a", False, (), False)


def test_of_a_command_that_has_failed_t_shows_the_last_lines():
    state = state_of(task_event("failed", name="make", stderr="make: ***\nError 1"))
    assert "\nmake: ***\nError 1\n" in shown(state, typed(state, "t"))


def test_an_empty_result_is_an_empty_panel():
    state = state_of(heard("task-succeeded", "w", 0, uuid="1", result=""))
    assert shown(state, typed(state, "1r")).splitlines()[1:] == [
        " result 1",
        "",
        " 1-1 of 1   q back   j/k scroll",
    ]


def test_values_of_any_class_are_shown():
    class Odd:
        def __eq__(self, other):
            raise TypeError("not to be compared")

        __hash__ = None

        def __repr__(self):
            return "odd one"

    odd = Odd()
    state = state_of({"type": "task-received", "uuid": "1", "args": odd, "kwargs": odd, "hostname": odd, "x": [odd]})
    state.event({"type": odd, "hostname": odd, "timestamp": odd})
    for keys in ("1", "2", "3", "1i", "3i", "3ji", "1/odd", "3/odd", "1ss"):
        shown(state, typed(state, keys))
    assert "odd one" in shown(state, typed(state, "1"))


def test_what_a_row_shows_of_a_task():
    for events, cells in [
        ([heard("task-sent", "web", 0, uuid="1", name="n")], "PENDING n 1 web"),
        (
            [heard("task-started", "w", 9, uuid="1"), heard("task-retried", "w", 9, uuid="1", exception="E()")],
            "RETRY 1 w E()",
        ),
        ([heard("task-started", "w", 9, uuid="1", args="(1,)", kwargs="{}", exception="old")], "STARTED 1 w 1.0s (1,)"),
        ([heard("task-started", "w", 9, uuid="1", kwargs="{'a': 1}", progress=2)], "STARTED 1 w 1.0s {'a': 1}"),
        ([heard("task-started", "w", 7, uuid="1"), heard("task-succeeded", "w", 9, uuid="1")], "SUCCESS 1 w 2.0s"),
        ([heard("task-progress", "w", 7, uuid="1", progress=1)], "PROGRESS 1 w ━━━━━━━━ 100%"),
    ]:
        assert shown(state_of(*events)).splitlines()[5].split()[1:] == cells.split()


def test_times_are_exact_to_the_millisecond(utc):
    assert eventmon.fine_time("%H:%M:%S", 1700000000.123) == "22:13:20.123"
    assert eventmon.fine_time("%H:%M:%S", 0.9999) == "00:00:01.000"
    assert eventmon.fine_time("%H:%M:%S", -1e-20) == "00:00:00.000"
    assert eventmon.fine_time("%H:%M:%S", 1e30) == eventmon.fine_time("%H:%M:%S", "x") == ""


def test_c_clears_what_has_finished():
    state = shop()
    assert typed(state, "1c").page == "1"
    assert [task["state"] for _, task in state.itertasks()] == ["RETRY", "PROGRESS"]


def test_escape_and_q_back_out_of_what_is_open_and_quit_from_the_top():
    state = shop()
    for key in ("q", "^["):
        assert typed(state, key).done
        assert typed(state, "1", key).done
        for opened in ("?", "1i", "1t", "2i", "3i"):
            assert not typed(state, opened, key).done
            assert typed(state, opened, key).panels == ()
            assert typed(state, opened, key, key).done
        assert len(typed(state, "1it", key).panels) == 1
    assert not typed(state, "/shop", "^J", "^[").done
    assert not typed(state, "1", "M-").done
    assert typed(state, "1i", "M-").panels == ()
    assert not typed(state, " ", "^[").done
    assert typed(state, "/shop", "^J", "^[", "^[").done
    assert typed(state, "/shop", "^J", "q").done


def test_unknown_keys_do_nothing():
    state = shop()
    for key in ("x", "KEY_RESIZE", "KEY_F(1)", "^@", "UNKNOWN KEY", "é"):
        assert eventmon.press(eventmon.View("1"), key, state, 24, 80, NOON) == eventmon.View("1")


def test_help_tells_of_every_key():
    state = State()
    text = shown(state, typed(state, "?"), rows=40)
    names = {
        "KEY_DOWN": "arrows",
        "KEY_UP": "arrows",
        "KEY_NPAGE": "PgDn",
        "KEY_PPAGE": "PgUp",
        "^I": "Tab",
        "^[": "Escape",
    }
    names |= {"KEY_BTAB": "shift-Tab", " ": "space", "wheel up": "wheel", "wheel down": "wheel", "^J": "Enter"}
    aliases = {"M-", "^D", "^U", "^M", "KEY_ENTER", "KEY_HOME", "KEY_END"}
    for key in eventmon.KEYS.keys() - aliases:
        assert re.search(rf"(?<!\w){re.escape(names.get(key, key))}(?!\w)", text), key


def test_hostile_text_becomes_harmless():
    evil = "\x1b[2J\x07\x9b31m\u202eabc\r\n\t\x00\u2028\ud800\u2066\u200f\U000e0001"
    state = state_of(
        task_event("received", evil, evil, name=evil, args=[evil], parent_id=evil),
        task_event("failed", evil, evil, exception=evil, traceback=evil, **{evil: {evil: evil}}),
        task_event(evil, evil, "2", root_id=evil),
        Event("worker-online", hostname=evil, sw_ident=evil, loadavg=[evil], **{evil: evil}),
        Event(evil, hostname=evil, **{evil: evil}),
    )
    for keys in ("1", "2", "3", "1i", "1ji", "1jji", "2i", "3i", "3ji", "1t", "1r", "1jt", "1s", "1ss", "1 "):
        shown(state, typed(state, keys), 40, 200, url=evil, empty=evil)
    shown(state, eventmon.View("1", filter=evil, typing=True), url=evil)
    shown(state, eventmon.View("1", filter=evil))
    shown(State(), url=evil, empty=evil)
    assert eventmon.plain_line(Event(evil, x=evil)).isprintable()
    assert eventmon.json_line(Event("x", x=evil)).isprintable()


@pytest.mark.parametrize(
    "text, result",
    [
        *(
            ("abc", "abc"),
            (None, ""),
            (7, "7"),
            ([1, None, "\x1b"], '[1, null, "\\u001b"]'),
            ({"a": True}, '{"a": true}'),
        ),
        *(("a\tb\nc\u00a0d\u3000e", "a b c d e"), ("\x1b\x9b\u202e\ud800\ue000", "?????")),
        *(("👩\u200d💻 ❤\ufe0f", "👩💻 ❤"), ("x" * 5000, "x" * 1000), (object, repr(object))),
    ],
)
def test_any_value_becomes_text_that_only_shows(text, result):
    assert eventmon.printable(text) in (result, json.dumps(result))


def test_of_a_large_value_no_more_is_spelled_than_is_shown():
    class Long(list):
        def __iter__(self):
            return iter(range(2000))  # of a million: who asks for more gets an IndexError

    assert eventmon.printable(Long([0] * 10**6)).startswith("[0, 1, 2")
    deep = []
    for _ in range(5000):
        deep = [deep]
    assert "…" in eventmon.printable(deep)
    number = 10**4000
    assert len(eventmon.printable([number] * 10**5)) == eventmon.MAX_SHOWN
    assert eventmon.weight([number] * 10**5, 4000) < 20_000
    assert list(eventmon.wrap("x" * 10**6, 80))[-1] == "… and more"
    state = state_of(Event("x", text="\n" * 10**6, **{str(n): n for n in range(10_000)}))
    assert " of 2,001 " in shown(state, typed(state, "3i"))
    assert shown(state, typed(state, "3iG")).splitlines()[-2] == "… and more"
    assert len(eventmon.fields_of(state.recent[0])) <= eventmon.MAX_SHOWN


@pytest.mark.parametrize(
    "text, width, result",
    [
        ("abc", 2, "a…"),
        ("a", 3, "a  "),
        ("日本", 3, "日…"),
        ("日本", 2, "… "),
        ("e\u0301x", 2, "e\u0301x"),
        ("abc", 0, ""),
    ]
    + [("\u1112\u1161\u11ab", 3, "\u1112\u1161\u11ab "), ("👍🏽", 5, "👍🏽 ")],
)
def test_text_is_fitted_by_the_columns_that_it_takes(text, width, result):
    assert eventmon.fit(text, width) == result


@pytest.mark.parametrize(
    "text, width, lines",
    [
        *(
            ("", 5, [""]),
            ("abc", 5, ["abc"]),
            ("abc ", 3, ["abc"]),
            ("a\n\n b", 5, ["a", "", " b"]),
            ("abcdefg", 3, ["abc", "def", "g"]),
        ),
        *(
            ("one two three", 8, ["one two", "three"]),
            ("日本語", 5, ["日本", "語"]),
            ("日", 1, ["日"]),
            ("a\tb", 9, ["a   b"]),
            ("  abc def ghi", 8, ["  abc", "  def", "  ghi"]),
        ),
    ],
)
def test_text_is_wrapped_at_spaces_where_they_are_near(text, width, lines):
    assert list(eventmon.wrap(text, width)) == lines


def test_without_unicode_the_same_is_drawn_in_ascii():
    state = shop()
    for view in (typed(state, "1"), typed(state, "1jji"), typed(state, "/生")):
        text = shown(state, view)
        ascii = text.translate(eventmon.ASCII)
        assert ascii.isascii()
        assert [len(line) for line in ascii.splitlines()] == [eventmon.cells(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0ms"), (0.25, "250ms"), (1.25, "1.2s"), (99, "99.0s"), (99.97, "1m39s"), (600, "10m00s"), (5999, "99m59s")]
    + [(6000, "1h40m"), (359999, "99h59m"), (1e6, "11d"), (8e9, "92592d"), (-1, "0ms")],
)
def test_a_duration_is_short(seconds, text):
    assert eventmon.duration(seconds) == text


# --- capture_events, on a pseudo-terminal ---


class Emulator:
    """What an xterm shows of the bytes that it gets: cells, and what it makes of the modes that a monitor sets."""

    def __init__(self, rows, columns):
        self.rows, self.columns = rows, columns
        self.row = self.column = self.top = 0
        self.bottom = rows - 1
        self.modes = set()
        self.last = " "
        self.cells = [[" "] * columns for _ in range(rows)]

    def text(self):
        return "\n".join("".join(row).rstrip() for row in self.cells)

    def feed(self, text):
        """Take text, return what is left: the start of a sequence."""
        pattern = re.compile(
            r"\x1b\[([?>]?)([\d;]*)([@-~])|\x1b\[[?>\d;]*$|\x1b[()]?$|\x1b[()].|\x1b(.)|(.)", re.DOTALL
        )
        for match in pattern.finditer(text):
            private, numbers, final, escaped, char = match.groups()
            if final:
                self.control(private, [int(number or 0) for number in numbers.split(";")], final)
            elif escaped == "M":
                self.up()
            elif char:
                self.put(char)
            elif match.end() == len(text) and match[0] in ("\x1b", "\x1b(", "\x1b)") or match[0].startswith("\x1b["):
                return match[0]
        return ""

    def put(self, char):
        width = eventmon.cells_of(char)
        if char in "\r\n\b\t":
            self.column = {"\r": 0, "\b": self.column - 1, "\t": self.column // 8 * 8 + 8, "\n": self.column}[char]
            if char == "\n":
                self.down()
        elif char >= " " and width == 0:
            self.cells[self.row][max(0, self.column - 1)] += char
        elif char >= " ":
            if self.column + width > self.columns:
                self.column = 0
                self.down()
            self.cells[self.row][self.column : self.column + width] = [char, *[""] * (width - 1)]
            self.column += width
            self.last = char

    def down(self):
        if self.row == self.bottom:
            self.scroll(1)
        else:
            self.row += 1

    def up(self):
        if self.row == self.top:
            self.scroll(-1)
        else:
            self.row -= 1

    def scroll(self, by):
        for _ in range(abs(by)):
            gone, new = (self.top, self.bottom) if by > 0 else (self.bottom, self.top)
            del self.cells[gone]
            self.cells.insert(new, [" "] * self.columns)

    def control(self, private, numbers, final):
        n, line = max(1, numbers[0]), self.cells[self.row]
        self.column = min(self.column, self.columns - 1)
        if private and final in "hl":
            (self.modes.update if final == "h" else self.modes.difference_update)(numbers)
        elif final == "H":
            self.row, self.column = n - 1, max(1, (numbers + [1])[1]) - 1
        elif final in "AB":
            self.row += n if final == "B" else -n
        elif final in "CD":
            self.column += n if final == "C" else -n
        elif final == "d":
            self.row = n - 1
        elif final == "G":
            self.column = n - 1
        elif final == "J":
            self.control("", [min(2, numbers[0])], "K")
            above = range(self.row) if numbers[0] else ()
            for row in (*above, *(range(self.row + 1, self.rows) if numbers[0] != 1 else ())):
                self.cells[row] = [" "] * self.columns
        elif final == "K":
            start, end = {0: (self.column, self.columns), 1: (0, self.column + 1), 2: (0, self.columns)}[numbers[0]]
            line[start:end] = [" "] * (end - start)
        elif final == "X":
            line[self.column : self.column + n] = [" "] * n
        elif final == "P":
            line[self.column :] = (line[self.column + n :] + [" "] * n)[: self.columns - self.column]
        elif final == "@":
            line[self.column :] = ([" "] * n + line[self.column :])[: self.columns - self.column]
        elif final == "b":
            for _ in range(n):
                self.put(self.last)
        elif final == "r":
            self.top, self.bottom = n - 1, (numbers + [0])[1] - 1 if len(numbers) > 1 else self.rows - 1
            self.row = self.column = 0
        elif final in "ST":
            self.scroll(n if final == "S" else -n)
        elif final in "LM":
            top, self.top = self.top, self.row
            self.scroll(-n if final == "L" else n)
            self.top = top
        else:
            assert final in "mlht", f"a sequence unknown to the emulator: {private}{numbers}{final}"


class Terminal:
    """A command on a pseudo-terminal that is its controlling terminal: keys are typed, the screen is read back."""

    def __init__(self, command, rows, columns, environment):
        self.ours, self.theirs = pty.openpty()
        self.raw, self.rest = b"", ""
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.emulator = Emulator(rows, columns)
        self.set_size(rows, columns)
        self.before = termios.tcgetattr(self.theirs)
        self.process = subprocess.Popen(
            command,
            **dict.fromkeys(("stdin", "stdout", "stderr"), self.theirs),
            env={**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **environment},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - no lock can be held by another thread
        )

    def set_size(self, rows, columns):
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def resize(self, rows, columns):
        self.screen()
        self.emulator = Emulator(rows, columns)
        self.set_size(rows, columns)

    def type(self, keys):
        os.write(self.ours, keys.encode())

    def screen(self):
        while select.select([self.ours], [], [], 0)[0]:
            data = os.read(self.ours, 65536)
            self.raw += data
            self.rest = self.emulator.feed(self.rest + self.decode(data))
        return self.emulator.text()

    def wait_for(self, text):
        """Wait until the screen shows a text."""
        return wait_until(lambda: text in self.screen() and self.screen())

    def press(self, keys, text):
        self.type(keys)
        return self.wait_for(text)

    def is_restored(self):
        """Whether the terminal is as it was: the alternate screen and the mouse off, the cursor on, the line editing."""
        self.screen()
        return termios.tcgetattr(self.theirs) == self.before and self.emulator.modes & {1049, 1000, 25} == {25}


@contextmanager
def terminal(*words, command=(), rows=24, columns=80, **environment):
    """eventmon.py, or another command, on a pseudo-terminal."""
    it = Terminal([*command] or [sys.executable, str(MODULE), *words], rows, columns, environment)
    try:
        yield it
    finally:
        it.process.kill()
        it.process.wait()
        it.screen()
        os.close(it.ours)
        os.close(it.theirs)


@pytest.fixture
def recording(tmp_path):
    file = tmp_path / "shop.jsonl"
    file.write_text("".join(json.dumps(event) + "\n" for event in shop().recent), encoding="utf-8")
    return str(file)


def test_the_monitor_shows_what_is_sent_and_quits():
    with terminal("watch") as it:
        it.wait_for("no events yet on udp://")
        with Dispatcher() as dispatcher, dispatcher.task("visible-job"):
            dispatcher.send("log-line", text="\x1b]0;evil\x07")
        it.wait_for("SUCCESS  visible-job")
        it.press("3", "log-line")
        it.type("q")
        assert it.process.wait(20) == 0
        assert b"\x1b]0;evil" not in it.raw
        assert it.is_restored()


def test_on_the_terminal_stands_what_the_screen_is(recording):
    with ExitStack() as stack:
        shows = []
        for number, rows, columns in SCREENS:
            it = stack.enter_context(terminal("watch", recording, rows=rows, columns=columns, TZ="UTC"))
            it.type(number)
            shows.append((it, shown(shop(), eventmon.View(number), rows, columns, now=NOON + 9, url=recording)))
        for it, expected in shows:
            wait_until(lambda: re.sub(r"\n{3,}", "\n\n", it.screen()) == expected)  # noqa: B023


def test_keys_are_typed_and_the_screen_is_read_back(recording):
    with terminal("watch", recording, TZ="UTC") as it:
        it.wait_for("shop.charge")
        it.press("/refused", "/refused█  1 of 4")
        assert "shop.resize" not in it.screen()
        it.press("\r", "q quit   ? keys")
        it.press("\r", "ValueError: refused")
        it.press("\t\r", "task 5d0c91aa-11")
        it.press("\x1b", "task aca02be9-33")
        it.press("q", "/refused  1 of 4")
        it.press("\x1b", "shop.resize")
        it.press("\x1b[B\x1b[B\x1b[Bt", "no traceback")
        it.press("q?", "what has finished")
        it.press("\x1b2", "beta@build-7")
        it.press("\t", "deploy-done")
        it.press("\t", "shop.charge")
        it.press("/报", "1 of 4")
        it.press("\x7f", "4 of 4")
        it.press("\x1b", "q quit")
        it.type("\x1b")
        assert it.process.wait(20) == 0


def test_the_mouse_selects_opens_and_scrolls(recording):
    def click(line):
        return f"\x1b[<0;5;{line + 1}M\x1b[<0;5;{line + 1}m"

    with terminal("watch", recording) as it:
        it.wait_for("shop.charge")
        it.press(f"{click(7)}\r", "task aca02be9-33")
        it.press("q", "shop.resize")
        it.press(click(7), "task aca02be9-33")
        it.press("q", "shop.resize")
        it.type("\x1b[<64;5;5M")
        it.press("\r", "task 5d0c91aa-11")
        it.press("q\x1b[<65;5;5M\r", "task 81ffd017-22")


def test_a_sequence_that_curses_does_not_know_is_no_escape(recording):
    with terminal("watch", recording) as it:
        it.wait_for("shop.charge")
        it.type("\x1b[200~\x1b[99;5Z\x1bOz" + "\x1b[<66;5;5M" * 300)
        it.press("?", "what has finished")
        it.press("\x1b\x1bOB\r", "task 0be1c7d2-44")
        it.type("\x1bx\x1bx\x1b]11;rgb:ffff/qqqq/ffff\x1b\\")
        it.wait_for("shop.resize")
        it.press("?", "what has finished")


def test_the_monitor_follows_the_size_of_the_terminal(recording):
    with terminal("watch", recording, TZ="UTC") as it:
        it.wait_for("shop.charge")
        for rows, columns in ((40, 120), (1, 1), (5, 20), (100, 300), (2, 3), (10, 40), (24, 80)):
            it.resize(rows, columns)
            expected = shown(shop(), eventmon.View("1"), rows, columns, now=NOON + 9, url=recording)
            wait_until(lambda: re.sub(r"\n{3,}", "\n\n", it.screen()) == expected)  # noqa: B023


def test_a_terminal_that_keeps_changing_its_size_does_no_harm(recording):
    rng = random.Random(5)
    with terminal("watch", recording) as it:
        it.wait_for("shop.charge")
        it.emulator = Emulator(100, 300)
        for _ in range(200):
            it.set_size(rng.randrange(1, 100), rng.randrange(1, 300))
            it.type(rng.choice(["j", "3", "1", "i", "?q", "/x\x1b", "s", "G"]))
            os.read(it.ours, 1 << 20)
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(20) == 128 + signal.SIGTERM


@pytest.mark.parametrize("ending", ["\x03", signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("keys", ["", "i", "/x", " "])
def test_the_terminal_comes_back_when_the_monitor_is_ended(ending, keys, recording):
    with terminal("watch", recording) as it:
        it.wait_for("shop.charge")
        it.type(keys)
        if isinstance(ending, str):
            it.type(ending)
        else:
            it.process.send_signal(ending)
        assert it.process.wait(20) == (128 + ending if ending == signal.SIGTERM else 0)
        assert it.is_restored()


def test_the_terminal_comes_back_after_an_exception(tmp_path):
    program = "import eventmon; eventmon.capture_events(state=eventmon.State(lambda state, event: 1 / 0))"
    with terminal(command=[sys.executable, "-c", program], PYTHONPATH=str(MODULE.parent)) as it:
        it.wait_for("no events yet")
        with Dispatcher() as dispatcher:
            dispatcher.send("hello")
        assert it.process.wait(20) == 1
        assert it.is_restored()
        assert "ZeroDivisionError" in it.screen()


def test_the_terminal_comes_back_around_ctrl_z_and_fg(recording):
    with terminal(command=["sh", "-i"], PS1="$ ", ENV="") as it:
        it.press(f"{sys.executable} {MODULE} watch {recording}\n", "shop.charge")
        assert 1049 in it.emulator.modes
        it.press("\x1a", "topped")
        it.press("stty -a\n", " icanon")
        assert it.emulator.modes & {1049, 1000, 25} == {25}
        it.type("clear; fg\n")
        it.wait_for("shop.charge")
        assert {1049, 1000} <= it.emulator.modes
        it.press("?", "what has finished")
        it.type("qqexit\n")
        it.process.wait(20)
        assert it.is_restored()


def test_the_monitor_is_painted_anew_after_it_was_stopped_from_outside():
    with terminal("watch") as it:
        it.wait_for("no events yet")
        it.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, it.process.pid, os.WSTOPPED | os.WNOWAIT)
        it.screen()
        it.emulator.cells = [["#"] * 80 for _ in range(24)]
        it.process.send_signal(signal.SIGCONT)
        wait_until(lambda: "no events yet" in it.screen() and "#" not in it.screen())
        assert it.raw.count(b"\x1b[?1049h") == 2  # whoever had the terminal meanwhile may have left that screen


def test_colours_are_the_terminals_own_and_can_be_switched_off(recording):
    coloured, background = rb"\x1b\[(\d+;)*3[0-8][;m]", rb"\x1b\[(\d+;)*4[0-8][;m]"
    for environment, expected in (
        ({}, True),
        ({"TERM": "xterm"}, True),
        ({"NO_COLOR": "1"}, False),
        ({"TERM": "vt100"}, False),
    ):
        with terminal("watch", recording, **environment) as it:
            it.wait_for("shop.charge")
            assert bool(re.search(coloured, it.raw)) == expected
            assert not re.search(background, it.raw)


def test_without_utf_8_the_monitor_draws_in_ascii(recording):
    with terminal("watch", recording, LC_ALL="C", TZ="UTC") as it:
        it.wait_for("12:00:07 RETRY    ????.????      0be1c7d2")
        assert it.raw.isascii()


@pytest.mark.parametrize("term", ["dumb", "unknown", "no-such-terminal", None])
def test_where_no_picture_can_be_drawn_lines_are_printed(term, recording):
    command = [sys.executable, str(MODULE), "watch", recording]
    with terminal(command=command if term else ["env", "-u", "TERM", *command], TERM=str(term), columns=300) as it:
        screen = it.wait_for("deploy-done")
        assert [line for line in screen.splitlines() if "eventmon:" in line] == [
            f"eventmon: {f'TERM={term} ' if term else 'TERM is not set'}"
            + {"dumb": "cannot move the cursor", None: ""}.get(term, "is not known")
            + ": printing lines instead of the monitor"
        ]
        assert it.process.wait(20) == 0


def test_capture_events_prints_lines_where_there_is_no_terminal():
    program = "import eventmon; s = eventmon.State(lambda s, e: s.event_count == 3 and exit(7)); eventmon.capture_events(state=s)"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=MODULE.parent, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        wait_until(somebody_watches)
        with Dispatcher(hostname="w1") as dispatcher:
            for n in range(3):
                dispatcher.send("hello", n=n)
        assert [line.split()[1:] for line in process.stdout] == [[b"hello", b"w1", b"n=%d" % n] for n in range(2)]
        assert process.wait(20) == 7


def test_capture_events_leaves_signals_and_files_as_they_were():
    program = """if True:
        import eventmon, os, signal, threading
        names = [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCONT, signal.SIGWINCH]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        before = [signal.getsignal(name) for name in names], len(os.listdir("/dev/fd"))
        eventmon.capture_events()
        thread = threading.Thread(target=eventmon.capture_events)
        thread.start()
        thread.join()
        after = [signal.getsignal(name) for name in names], len(os.listdir("/dev/fd"))
        print("the same" if before == after else (before, after))
    """
    with terminal(command=[sys.executable, "-c", program], PYTHONPATH=str(MODULE.parent)) as it:
        it.wait_for("no events yet")
        it.process.send_signal(signal.SIGHUP)
        it.press("?", "what has finished")
        it.resize(30, 90)
        it.type("qq")
        it.emulator = Emulator(30, 90)
        it.wait_for("no events yet")
        it.resize(24, 80)
        it.press("?", "what has finished")
        it.type("qq")
        it.wait_for("the same")


def test_the_monitor_ends_with_its_receiver_its_limit_and_its_timeout(recording):
    program = "import eventmon, threading; r = eventmon.Receiver(); t = threading.Timer(0.3, setattr, (r, 'should_stop', True))"
    with terminal(
        command=[sys.executable, "-c", f"{program}; t.start(); eventmon.capture_events(r)"],
        PYTHONPATH=str(MODULE.parent),
    ) as it:
        assert it.process.wait(20) == 0
        assert it.is_restored()
    for words in (["--timeout", "0.2"], ["--limit", "2"]):
        with terminal("watch", *words) as it, Dispatcher() as dispatcher:
            it.wait_for("no events yet")
            dispatcher.send("hello")
            dispatcher.send("hello")
            assert it.process.wait(20) == 0


def test_the_monitor_says_how_to_send_to_another_url(url):
    other = url.replace("ttl=0", "ttl=0&x=1").partition("?")[0] + "?ttl=0&interface=127.0.0.1"
    with terminal("watch", "--url", other, columns=200) as it:
        it.wait_for(f"no events yet on {other} — try: python eventmon.py send hello --url '{other}'")


def test_ctrl_s_stops_the_picture_and_not_the_monitor():
    with terminal("watch") as it:
        it.wait_for("no events yet")
        it.type("\x13")
        with Dispatcher() as dispatcher:
            dispatcher.send("unseen-event")
            assert dispatcher.flush(20) == 1
            it.set_size(20, 60)
            dispatcher.send("unseen-event")
            assert dispatcher.flush(20) == 1
        assert "unseen" not in it.screen()
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(20) == 128 + signal.SIGTERM
        assert it.is_restored()


def test_escape_with_another_key_at_once_is_both(recording):
    with terminal("watch", recording) as it:
        it.wait_for("shop.charge")
        it.press("j", " 2 of 4 ")
        it.press("\x1bj", " 3 of 4 ")
        it.press("i", "task aca02be9-33")
        it.press("\x1b2", "beta@build-7")
        it.press("/beta", "1 of 2")
        it.press("\x1bj", " 2 of 2 ")


def test_a_filter_of_workers_follows_the_time(clock):
    state = state_of(heard("worker-online", "w", 0, freq=2))
    monitor = eventmon.Monitor(SimpleNamespace(status=dict), state)
    monitor._view = eventmon.View("2", filter="gone")
    assert monitor._find(24, 80, NOON) == []
    clock.now += 60
    assert len(monitor._find(24, 80, NOON + 60)) == 1


@pytest.fixture
def clock(monkeypatch):
    """A time.monotonic() that stands still but for clock.now."""
    it = SimpleNamespace(now=100.0)
    stopped = {name: getattr(time, name) for name in ("time", "strftime", "localtime")}
    monkeypatch.setattr(eventmon, "time", SimpleNamespace(monotonic=lambda: it.now, **stopped))
    return it


def test_a_picture_is_painted_20_times_a_second_at_most_and_only_of_something_new(clock):
    pictures = []
    monitor = eventmon.Monitor(SimpleNamespace(status=dict), State())
    terminal = SimpleNamespace(paint=pictures.append, is_ready=lambda: True)
    for n in range(1000):  # in ten seconds
        clock.now += 0.01
        monitor._state.event(heard("task-sent", "w", n / 100, uuid=str(n)))
        monitor._heard = clock.now
        wait = monitor._draw(terminal, 24, 80, NOON + n / 100)
        assert 0 < wait <= eventmon.MAX_SLEEP
    assert 180 <= len(pictures) <= 200
    assert pictures[-1] != pictures[-2]
    pictures.clear()
    for n in range(1000):
        clock.now += 0.1
        wait = monitor._draw(terminal, 24, 80, NOON + 10 + n / 10)
        assert eventmon.FRAME_TIME <= wait <= eventmon.MAX_SLEEP
    assert 60 <= len(pictures) <= 65  # once a second as long as the graph moves


def test_a_slow_picture_leaves_the_time_to_the_events(clock):
    pictures = []

    def paint(lines):
        clock.now += 0.1
        pictures.append(lines)

    monitor = eventmon.Monitor(SimpleNamespace(status=dict), State())
    for n in range(1000):
        clock.now += 0.01
        monitor._state.event(heard("task-sent", "w", 0, uuid=str(n)))
        monitor._draw(SimpleNamespace(paint=paint, is_ready=lambda: True), 24, 80, NOON)
    assert len(pictures) < 25


@pytest.mark.parametrize("keys, heeded", [("jjj", 1), (["M-", "j", "j"], 2)])
def test_once_a_picture_is_due_keys_wait_for_the_events_but_not_behind_an_escape(clock, keys, heeded):
    waits = []
    monitor = eventmon.Monitor(SimpleNamespace(status=dict, now=lambda: NOON), shop())
    monitor._wait = waits.append
    pressed = iter(keys)
    terminal = SimpleNamespace(
        size=lambda: (24, 80), pressed=lambda: pressed, is_ready=lambda: True, paint=lambda lines: None
    )
    clock.now += 1
    monitor._turn(terminal)
    assert (len(keys) - len(list(pressed)), waits) == (heeded, [0.0])
    assert monitor._view.index == 1


def test_the_monitor_does_not_spin_where_the_time_stands_still(clock):
    monitor = eventmon.Monitor(SimpleNamespace(status=dict), shop())
    terminal = SimpleNamespace(paint=lambda lines: None, is_ready=lambda: True)
    waits = []
    for _ in range(5):
        clock.now += 0.1
        waits.append(monitor._draw(terminal, 24, 80, NOON + 0.999999))
    assert min(waits) >= eventmon.FRAME_TIME


def test_what_comes_while_a_key_is_pressed_again_and_again_is_all_counted():
    with terminal("watch") as it:
        it.wait_for("no events yet")
        with Dispatcher(max_wait=1.0) as dispatcher:
            for n in range(3000):
                dispatcher.send("task-received", uuid=str(n), name="job")
                if n % 100 == 0:
                    it.type("jk3j12G"[n // 100 % 7])
                    it.screen()
            dispatcher.flush(20)
        it.wait_for("3 Events 3,000")
        assert "lost" not in it.screen()


def test_a_file_is_shown_with_its_own_times_and_its_bad_lines_are_told_of(recording):
    with open(recording, "a") as file:
        file.write('nonsense\n{"type":"cut o')
    with terminal("watch", recording, TZ="UTC", columns=120) as it:
        it.wait_for("2 malformed")
        assert "12:00:09 PROGRESS shop.import" in it.wait_for("7.0s")
        it.press("/x", "of 4")
        it.type("\x1bq")
        assert it.process.wait(20) == 0
        assert len(re.findall("line 1[78]: ", it.screen())) == 2


# --- the command line ---


def test_watch_prints_each_event_as_it_was_sent():
    recording = [task_event("received", uuid=str(n), x=["日本", None, {"a": 1.5}]) for n in range(200)]
    lines = "".join(json.dumps(event) + "\n" for event in recording)
    with running("watch", "--json", "--limit", "200", stdout=subprocess.PIPE) as watch:
        wait_until(somebody_watches)
        status, _, errors = run("send", "-", input=lines.encode())
        assert (status, errors) == (0, ["sent 200 events, confirmed by 1 watcher"])
        got = [json.loads(line) for line in watch.stdout]
        assert watch.wait(20) == 0
    assert [event for event in got if event.pop("local_received")] == recording


def test_watch_chooses_types_and_stops_after_a_limit_or_a_while():
    with Dispatcher() as dispatcher:
        for type in ("task-sent", "worker-online", "hello", "task-received"):
            dispatcher.send(type, text="\x1b[2J")
        status, out, errors = run("watch", "--type", "task-*", "--type", "hello", "--timeout", "0.7")
        assert (status, errors) == (0, [])
        assert [line.split()[1] for line in out.decode().splitlines()] == ["task-sent", "hello", "task-received"]
        assert b"\x1b" not in out
        status, out, _ = run("watch", "--plain", "--limit", "1")
        assert (status, len(out.splitlines())) == (0, 1)
        assert run("watch", "--json", "--no-history", "--timeout", "0.3") == (0, b"", [])


def test_what_watch_records_can_be_watched_and_sent_again(tmp_path):
    file = tmp_path / "recorded.jsonl"
    with Dispatcher() as dispatcher:
        dispatcher.send("hello", n=1)
        assert run("watch", "--json", "--limit", "1", "--record", str(file))[0] == 0
    with open(file, "a") as more:
        more.write('{"type":"cut o')
    status, out, errors = run("watch", str(file), "--json")
    assert status == 0
    assert [json.loads(line)["n"] for line in out.splitlines()] == [1]
    assert len(errors) == 1
    assert "line 2" in errors[0]
    assert run("send", "-", input=file.read_bytes())[0] == 1


def test_send_says_how_many_watchers_confirmed():
    assert run("send", "hello") == (0, b"", ["sent 1 event, confirmed by 0 watchers"])
    with watching() as (_, one), watching() as (_, two):
        status, _, errors = run("send", "deploy-done", "version=1.2", "--key-file", "/dev/null", "ok:=true")
        assert (status, errors) == (1, ["eventmon: key file /dev/null is empty"])
        status, _, errors = run("send", "deploy-done", "version=1.2", "--url", os.environ["EVENTMON_URL"], "ok:=true")
        assert (status, errors) == (0, ["sent 1 event, confirmed by 2 watchers"])
        wait_until(lambda: len(one) == len(two) == 1)
    assert {"type": "deploy-done", "version": "1.2", "ok": True}.items() <= one[0].items()


def test_a_bad_line_of_send_is_named_and_the_rest_is_sent():
    with watching() as (_, events):
        status, _, errors = run("send", "-", input=b'{"type":"a"}\n\xff\n\n[1]\n{"type":"b"}')
        wait_until(lambda: len(events) == 2)
    assert status == 1
    assert [re.sub(":.*", "", line.replace("eventmon: ", "")) for line in errors] == [
        "line 2",
        "line 4",
        "sent 2 events, confirmed by 1 watcher",
    ]


@pytest.mark.parametrize(
    "words, status",
    [
        ([], 2),
        (["nonsense"], 2),
        (["watch", "--nonsense"], 2),
        (["watch", "--limit", "x"], 2),
        (["watch", "--limit", "-1"], 2),
        (["watch", "--json", "--plain"], 2),
        (["watch", "no/such/file"], 1),
        (["watch", "--url", "http://x"], 2),
        (["watch", "--url", "udp://239.1.2.3:7000?interface=nosuchif0"], 1),
        (["watch", "--key-file", "no/such/file"], 1),
        (["watch", "--record", "no/such/dir/file", "--timeout", "0"], 1),
        (["send"], 2),
        (["send", ""], 2),
        (["send", "hello", "x"], 2),
        (["send", "hello", "=x"], 2),
        (["send", "hello", "x:=oops"], 2),
        (["send", "hello", "x:=NaN"], 2),
        (["send", "-", "x=1"], 2),
        (["send", "hello", "type=x"], 2),
        (["watch", "--limit", "1.5"], 2),
        (["send", "hello", "--nonsense"], 2),
        (["run"], 2),
        (["run", "--"], 2),
        (["run", "--nonsense", "true"], 2),
        (["run", "--url", "x", "true"], 2),
        (["bench", "--scale", "x"], 2),
        (["bench", "--scale", "0", "--url", "http://x"], 2),
    ],
)
def test_an_error_is_one_line_and_a_status(words, status, capsys):
    assert main(words) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"eventmon: [^\n]+\n", err)


def test_the_command_line_can_be_called_from_python(capsys):
    with Dispatcher() as dispatcher:
        dispatcher.send("hello", n=1)
        assert main(["watch", "--json", "--limit", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 1


def test_send_says_when_nothing_could_be_sent():
    status, _, errors = run("send", "hello", "--url", "udp://no.such.host.invalid:7000")
    assert status == 1
    assert "cannot send" in errors[0]


def test_a_file_is_not_recorded_into_itself(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"type":"x"}\n')
    assert run("watch", str(file), "--json", "--record", str(file))[0] == 2
    assert file.read_text() == '{"type":"x"}\n'


def test_any_encoding_and_missing_streams_will_do(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"type":"x","y":"日本"}\n', encoding="utf-8")
    status, out, errors = run("watch", str(file), "--plain", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (status, errors) == (0, [])
    assert b"y=\\u65e5\\u672c" in out
    code = f"{shlex.quote(sys.executable)} {shlex.quote(str(MODULE))}"
    for line in (f"{code} watch {file} <&- >&-", f"{code} send - <&-", f"{code} watch --timeout 0 <&- 2>&-"):
        done = subprocess.run(line, shell=True, capture_output=True, timeout=30, check=False)
        assert b"Traceback" not in done.stdout + done.stderr
        assert done.returncode == 0


def test_help_and_version_go_to_standard_output(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"eventmon {eventmon.__version__}\n"
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name in ("watch", "send", "run", "demo", "check", "bench"):
        assert re.search(rf"^ +{name} ", listed, re.MULTILINE)
        assert main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert text.count(f"\n  python eventmon.py {name}") == 2
        assert {"usage:", "--url", "--key-file", "exit status: "} <= set(
            re.findall(r"usage:|--[a-z-]+|exit status: ", text)
        )


def test_ctrl_c_and_a_closed_pipe_end_watch_quietly():
    with running("watch", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watch:
        wait_until(somebody_watches)
        watch.send_signal(signal.SIGINT)
        assert watch.wait(20) == 0
        assert watch.stderr.read() == b""
    for sends in (True, False):
        with running("watch", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watch:
            wait_until(somebody_watches)
            watch.stdout.close()
            with Dispatcher(enabled=sends) as dispatcher:
                wait_until(
                    lambda dispatcher=dispatcher, watch=watch: (dispatcher.send("x"), watch.poll())[1] is not None
                )
            assert watch.stderr.read() == b""
            assert watch.returncode == 0


RUNS = [
    (["sh", "-c", "cat; echo out; echo err >&2"], 0, b"in\nout\n", ["err"], {"exit_status": 0}),
    (["sh", "-c", "exit 3"], 3, b"", [], {"exit_status": 3, "exception": "exit status 3"}),
    (["--", "sh", "-c", "kill -9 $$"], 137, b"", [], {"exit_status": 137, "exception": "SIGKILL"}),
    (["sh", "-c", "kill -40 $$"], 168, b"", [], {"exit_status": 168, "exception": "signal 40"}),
    ([""], 127, b"", ["eventmon: : not found"], {"exit_status": 127}),
    (["--", "no-such-command", "-x"], 127, b"", ["eventmon: no-such-command: not found"], {"exit_status": 127}),
    (["--name", "x", "--", "/"], 126, b"", ["eventmon: /: Permission denied"], {"exit_status": 126, "name": "x"}),
    (["sh", "-c", "seq 30 >&2; exit 1"], 1, b"", [str(n) for n in range(1, 31)], {"exit_status": 1}),
    (["sh", "-c", "printf 'a\\377' >&2; exit 1"], 1, b"", ["a\\xff"], {"exit_status": 1}),
]


@pytest.mark.parametrize("words, status, out, err, fields", RUNS)
def test_run_is_the_command_itself_and_tells_of_it_as_a_task(words, status, out, err, fields, capfdbinary):
    with watching() as (_, events):
        if status:
            done = main(["run", *words]), *capfdbinary.readouterr()
            done = *done[:2], done[2].decode(errors="backslashreplace").splitlines()
        else:
            done = run("run", *words, input=b"in\n")
        wait_until(lambda: len(events) == 3)
    assert done == (status, out, err)
    assert [event.type for event in events] == [
        "task-received",
        "task-started",
        "task-failed" if status else "task-succeeded",
    ]
    task = state_of(*events).tasks[events[0]["uuid"]]
    command = words[words.index("--") + 1 :] if "--" in words else words
    assert {"name": command[0], "args": shlex.join(command), **fields}.items() <= task.items()
    assert 0 < task["runtime"] < 30
    assert status in (126, 127) or task["peak_memory"] > 10**5
    assert task.get("stderr") == ("\n".join(err[-20:]) if err and status not in (0, 126, 127) else None)


def test_run_keeps_the_order_of_output_and_errors_that_go_to_one_file(tmp_path):
    command = f"{sys.executable} {MODULE} run -- sh -c 'for i in $(seq 50); do echo o$i; echo e$i >&2; done'"
    done = subprocess.run(f"{command} 2>&1", shell=True, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.split() == [f"{name}{n}" for n in range(1, 51) for name in "oe"]


def test_run_works_where_there_is_no_network_and_no_standard_stream(tmp_path):
    environment = {**os.environ, "EVENTMON_URL": "udp://no.such.host.invalid:7000"}
    assert run("run", "--", "sh", "-c", "echo hi; exit 5", env=environment) == (5, b"hi\n", [])
    code = f"{shlex.quote(sys.executable)} {shlex.quote(str(MODULE))} run --"
    for line, out in ((f"{code} echo hi 2>&-", b"hi\n"), (f"{code} sh -c 'exit 0' <&- >&- 2>&-", b"")):
        done = subprocess.run(line, shell=True, capture_output=True, timeout=30, check=True)
        assert (done.stdout, done.stderr) == (out, b"")


def test_run_leaves_no_other_descriptor_signal_mask_or_handler_to_the_command():
    code = "import os, signal; print(signal.pthread_sigmask(0, []), sorted(os.listdir('/dev/fd')))"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=True).stdout
    assert run("run", "--", sys.executable, "-c", code) == (0, alone, [])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getsignal(signal.SIGCHLD)
    assert main(["run", "true"]) == 0
    assert (signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getsignal(signal.SIGCHLD)) == before


def test_run_passes_on_what_the_system_sends_to_it_alone():
    words = [sys.executable, str(MODULE), "run", "--", "sleep", "60"]
    code = f"import os, signal, sys; signal.setitimer(signal.ITIMER_REAL, 0.4); os.execv(sys.executable, {words})"
    done = subprocess.run([sys.executable, "-c", code], timeout=30, check=False)
    assert done.returncode == 128 + signal.SIGALRM
    with terminal("run", "--", "sleep", "60") as it:
        wait_until(lambda: somebody_runs("sleep", it.process))
        os.close(it.ours)  # the terminal hangs up
        it.ours, _ = os.pipe()  # from which nothing comes
        assert it.process.wait(20) == 128 + signal.SIGHUP


def test_run_does_not_wait_for_a_resolver(monkeypatch):
    found = threading.Event()

    def look_up(*args):
        found.wait(60)
        raise socket.gaierror(-2, "no such name")

    monkeypatch.setattr(eventmon.socket, "getaddrinfo", look_up)
    monkeypatch.setenv("EVENTMON_URL", "udp://slow.example:7000")
    assert main(["run", "sh", "-c", "exit 6"]) == 6
    assert not found.is_set()
    found.set()


def test_run_works_where_no_thread_can_be_started(monkeypatch, capfdbinary):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert main(["run", "sh", "-c", "echo err >&2; exit 6"]) == 6
    assert capfdbinary.readouterr() == (b"", b"err\n")


def test_run_gives_no_binary_to_the_shell(tmp_path, capsys):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\x7fELF\0\0")
    binary.chmod(0o755)
    assert main(["run", str(binary)]) == 126
    assert "Exec format error" in capsys.readouterr().err


def test_a_signal_that_comes_when_the_command_of_run_has_ended_is_dropped(monkeypatch):
    def work(*args):
        os.kill(os.getpid(), signal.SIGUSR2)
        return 3

    monkeypatch.setattr(eventmon, "run_task", work)
    came = []
    before = signal.signal(signal.SIGUSR2, lambda name, frame: came.append(name))
    try:
        assert (main(["run", "true"]), came) == (3, [])
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_run_runs_a_script_that_does_not_say_for_whom(tmp_path):
    script = tmp_path / "script"
    script.write_text("echo script $1\n")
    script.chmod(0o755)
    assert run("run", str(script), "arg") == (0, b"script arg\n", [])


def test_what_outlives_the_command_of_run_still_reaches_standard_error(tmp_path):
    line = f"while [ ! -e {tmp_path}/go ]; do sleep 0.01; done; echo late >&2"
    words = [sys.executable, str(MODULE), "run", "--", "sh", "-c", f"({line}) & echo early >&2"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    assert process.wait(20) == 0
    (tmp_path / "go").touch()
    with process.stderr as errors:
        assert errors.read() == b"early\nlate\n"


def test_whoever_writes_to_a_standard_error_that_nobody_reads_gets_a_broken_pipe_under_run():
    with running("run", "--", "sh", "-c", "yes >&2; exit 3", stderr=subprocess.PIPE) as process:
        process.stderr.read(10)
        process.stderr.close()
        assert process.wait(20) in (3, 128 + signal.SIGPIPE)


COUNTER = """
import os, signal, sys
def count(name, frame):
    print("got", signal.Signals(name).name, flush=True)
    if name == signal.SIGTERM:
        sys.exit(7)
for name in ("INT", "TERM", "HUP", "QUIT", "USR1", "ALRM", "WINCH"):
    signal.signal(getattr(signal, f"SIG{name}"), count)
print("ready", [os.isatty(n) for n in range(3)], os.getpgid(0) == os.getpgid(os.getppid()), flush=True)
while True:
    signal.pause()
"""


def test_run_passes_signals_on():
    with running("run", "--", sys.executable, "-c", COUNTER, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("ready")
        for name in ("USR1", "HUP", "INT", "QUIT", "ALRM", "WINCH", "TERM"):
            process.send_signal(getattr(signal, f"SIG{name}"))
            assert process.stdout.readline() == f"got SIG{name}\n"
        assert process.wait(20) == 7
    with running("run", "sleep", "60") as process:
        wait_until(lambda: somebody_runs("sleep", process))
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM


def somebody_runs(command, parent):
    """Whether a process has a child that runs a command."""
    found = subprocess.run(["ps", "-A", "-o", "ppid=,comm="], capture_output=True, text=True, timeout=30, check=True)
    return [str(parent.pid), command] in [line.split() for line in found.stdout.splitlines()]


def test_on_a_terminal_run_leaves_everything_to_the_command():
    with terminal("run", "--", sys.executable, "-c", COUNTER) as it:
        it.wait_for("ready [True, True, True] True")
        it.press("\x03", "got SIGINT")
        it.press("\x1c", "got SIGQUIT")
        it.resize(30, 90)
        it.wait_for("got SIGWINCH")
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(20) == 7
        it.screen()
        assert [line.split()[-1] for line in it.raw.decode().splitlines()[1:]] == [
            "SIGINT",
            "SIGQUIT",
            "SIGWINCH",
            "SIGTERM",
        ]


def test_ctrl_z_stops_run_and_fg_lets_it_go_on():
    with terminal(command=["sh", "-i"], PS1="$ ", ENV="") as it:
        it.press(f"{sys.executable} {MODULE} run -- sh -c 'echo rea\"\"dy; read line; echo got $line'\n", "ready\n")
        it.press("\x1a", "topped")
        it.press("clear; fg\n", "run -- sh")
        it.press("hello\n", "got hello")
        it.type("exit\n")
        assert it.process.wait(20) == 0


def test_a_record_that_a_crash_has_cut_off_loses_nothing_that_comes_after_it(tmp_path):
    file = tmp_path / "recorded.jsonl"
    file.write_text('{"type":"whole"}\n{"type":"cut o')
    with Dispatcher() as dispatcher:
        dispatcher.send("hello")
        assert run("watch", "--plain", "--limit", "1", "--record", str(file))[0] == 0
        with terminal("watch", "--record", str(file)) as it:
            it.wait_for("hello")
            dispatcher.send("seen")
            it.wait_for("seen")
            it.process.kill()  # a crash
    status, out, errors = run("watch", str(file), "--json")
    types = [json.loads(line)["type"] for line in out.splitlines()]
    assert (status, types) == (0, ["whole", "hello", "hello", "seen"])
    assert len(errors) == 1
    assert "recorded.jsonl: line 2: not JSON" in errors[0]
    with watching() as (_, events):
        assert run("send", "-", input=file.read_bytes())[0] == 1
        wait_until(lambda: [event.type for event in events] == types)


def test_several_may_record_into_one_file_and_a_record_that_cannot_be_written_is_named(tmp_path):
    file, fifo = tmp_path / "recorded.jsonl", tmp_path / "fifo"
    os.mkfifo(fifo)
    with Dispatcher() as dispatcher:
        for n in range(50):
            dispatcher.send("large", n=n, text="x" * 20_000)
        words = ["watch", "--json", "--limit", "50", "--record", str(file)]
        with running(*words, stdout=subprocess.DEVNULL) as one, running(*words, stdout=subprocess.DEVNULL) as two:
            assert (one.wait(20), two.wait(20)) == (0, 0)
        assert sorted(json.loads(line)["n"] for line in file.read_text().splitlines()) == sorted([*range(50)] * 2)
        with running(
            "watch", "--plain", "--record", str(fifo), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as watch:
            os.close(os.open(fifo, os.O_RDONLY))
            assert watch.wait(20) == 1
            assert watch.stderr.read() == f"eventmon: {fifo}: Broken pipe\n".encode()


def test_a_file_may_begin_with_a_byte_order_mark_and_have_lines_of_any_length(tmp_path, monkeypatch, capsys):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"type":"a"}\r\n' + b"x" * 5000 + b'\n{"type":"b"}\r\n')
    monkeypatch.setattr(eventmon, "MAX_LINE", 1000)
    assert main(["watch", str(file), "--json"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["type"] for line in out.splitlines()] == ["a", "b"]
    assert "line 2: a line of 1,000 bytes or more" in err


@pytest.fixture
def checked(capsys, monkeypatch):
    """A function that runs `check`: it returns its status, {step: (verdict, text)}, and the lines about interfaces."""
    monkeypatch.setattr(eventmon, "LISTEN_TIME", 0.3)
    return partial(check, capsys)


def check(capsys, *words):
    status = main(["check", *words])
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    steps = {
        line.split()[1]: (line.split()[0], line[15:]) for line in lines[1:] if line[0] not in " o" or line[:2] == "ok"
    }
    return status, steps, [line for line in lines if line.startswith("  ")]


def test_check_says_step_by_step_that_all_is_well_and_who_is_there(url, checked):
    with watching() as (_, events), Dispatcher(hostname="alpha@there") as dispatcher:
        dispatcher.send("hello")
        other = threading.Thread(target=lambda: wait_until(lambda: dispatcher.send("hello") and len(events) > 100))
        other.start()
        status, steps, others = checked()
        other.join()
        assert status == 0
        wait_until(lambda: len(events) > 10)
    names = ["open", "join", "send", "receive", "sizes", "buffer", "ttl", "time", "sending", "watching"]
    assert list(steps) == names
    assert {verdict for verdict, _ in steps.values()} <= {"ok", "note"}
    assert steps["ttl"] == ("ok", "0: nothing leaves this machine")
    assert re.fullmatch(r"[0-9.]+ ms from send to receive, the median of 11", steps["time"][1])
    assert re.fullmatch(r"1 Dispatcher: 127\.0\.0\.1:[0-9]+; events from alpha@there", steps["sending"][1])
    assert re.fullmatch(r"1 watcher: 127\.0\.0\.1:[0-9]+", steps["watching"][1])
    assert {event.type for event in events} == {"hello", "eventmon-check"}
    parts = eventmon.parse_url(url)
    assert all(f"udp://{parts.host}:{parts.port}?interface=" in line for line in others)
    assert not any("interface=127.0.0.1&" in line for line in others)


def test_check_finds_a_watcher_at_a_unicast_url_or_says_that_there_is_none(checked, monkeypatch):
    where = f"udp://127.0.0.1:{20000 + next(numbers) % 20000}"
    status, steps, others = checked("--url", where)
    assert (status, steps["join"][0], steps["watching"][1]) == (0, "ok", "nobody else")
    assert any("interface=127.0.0.1&ttl=0" in line for line in others)
    with watching(url=where):
        status, steps, _ = checked("--url", where)
        assert (status, steps["receive"][1], steps["watching"][1][:9]) == (0, "a watcher has confirmed it", "1 watcher")
        assert "port" in steps["join"][1]
        assert "there and back" in steps["time"][1]
        assert "up to" in steps["sizes"][1]
    monkeypatch.setattr(eventmon, "HEAR_TIME", 0.1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mute:
        mute.bind(("127.0.0.1", 0))
        status, steps, _ = checked("--url", f"udp://127.0.0.1:{mute.getsockname()[1]}")
    assert (status, list(steps), steps["receive"][0]) == (1, ["open", "join", "send", "receive"], "wrong")
    assert "nobody confirms it: start python eventmon.py watch --url udp://0.0.0.0:" in steps["receive"][1]


def test_check_prints_any_name_in_any_encoding():
    with Dispatcher(hostname="Müller@h", freq=0.05):
        status, out, errors = run("check", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (status, errors) == (0, [])
    assert b"events from M\\xfcller@h" in out


def test_check_asks_for_no_history_and_survives_what_others_send(checked, url):
    with (
        watching() as (receiver, events),
        Dispatcher() as dispatcher,
        eventmon.udp_socket(eventmon.parse_url(url)) as sock,
    ):
        for n in range(1000):
            dispatcher.send("old", n=n)
        wait_until(lambda: len(events) == 1000)
        done = threading.Event()

        def disturb():
            while not done.wait(0.01):
                sock.sendto(b'{"type":"eventmon-check","stream":"\\ud800"}', eventmon.parse_url(url)[:2])

        thread = threading.Thread(target=disturb)
        thread.start()
        assert checked()[0] == 0
        done.set()
        thread.join()
        assert (dispatcher.stats["repairs"], receiver.stats["duplicates"], receiver.stats["lost"]) == (0, 0, 0)


def test_check_with_a_key_counts_what_others_send_without_it(tmp_path, url, checked):
    (tmp_path / "key").write_text("secret")
    with watching(key="secret"), Dispatcher(hostname="alpha", freq=0.1), Dispatcher(key="secret") as sealed:
        sealed.send("hello")
        status, steps, _ = checked("--key-file", str(tmp_path / "key"))
    assert (status, steps["sizes"][0], steps["sending"][1][:12], steps["key"][0]) == (0, "ok", "1 Dispatcher", "note")
    assert steps["watching"][1].startswith("1 watcher")
    with watching() as (_, events):
        assert (checked("--key-file", str(tmp_path / "key"))[0], events) == (0, [])


@pytest.mark.parametrize(
    "where, step, text",
    [
        ("udp://239.1.2.3:7000?interface=nosuchif0", "open", "no such interface as nosuchif0"),
        ("udp://239.1.2.3:7000?interface=192.0.2.77", "open", "192.0.2.77 is no address of this machine"),
        ("udp://no.such.host.invalid:7000", "open", "no.such.host.invalid is not found"),
    ],
)
def test_check_says_what_is_wrong_with_a_url(where, step, text, checked):
    status, steps, _ = checked("--url", where)
    assert (status, list(steps), steps[step][0]) == (1, [step], "wrong")
    assert text in steps[step][1]


@pytest.mark.parametrize(
    "problem, words",
    [
        (OSError(errno.ENETUNREACH, "x"), "no route for 239.1.2.3"),
        (OSError(errno.ENODEV, "x"), "no such interface as eth7"),
        (OSError(errno.EPERM, "x"), "not permitted: a firewall"),
        (OSError(errno.EHOSTUNREACH, "x"), "a VPN"),
        (OSError(errno.EIO, "input/output error"), "input/output error"),
        (OSError("no number"), "no such interface as eth7"),
        (socket.gaierror(-2, "x"), "239.1.2.3 is not found"),
    ],
)
def test_errors_of_the_system_are_told_in_plain_words(problem, words):
    assert words in eventmon.in_words(problem, eventmon.parse_url("udp://239.1.2.3:7000?interface=eth7"))


def test_check_tells_what_the_network_keeps_back(monkeypatch, url):
    with eventmon.Probe(url, b"") as probe:
        lost = 65507
        steps = list(eventmon.open_steps(probe))
        assert [step.verdict for step in steps] == ["ok", "ok"]
        whole = probe.link.socket

        def lose_large(data, to):
            return len(data) if len(data) >= lost else whole.sendto(data, to)

        methods = {"recvfrom": whole.recvfrom, "fileno": whole.fileno, "close": whole.close}
        probe.link.socket = type("Socket", (), methods)()
        probe.link.socket.sendto = lose_large
        monkeypatch.setattr(eventmon, "HEAR_TIME", 0.1)
        step = eventmon.size_step(probe)
        assert (step.verdict, step.text) == ("ok", "up to 61,440 bytes; 65,507 bytes do not arrive, and are not needed")
        lost = 8000
        assert eventmon.size_step(probe).verdict == "wrong"
        lost = 0
        (sent, received) = eventmon.send_steps(probe)
        assert (sent.verdict, received.verdict) == ("ok", "wrong")
        assert "unicast: watch udp://0.0.0.0:" in received.text

        def refuse(data, to):
            raise OSError(errno.ENETUNREACH, "Network is unreachable")

        probe.link.socket.sendto = refuse
        (sent,) = eventmon.send_steps(probe)
        assert (sent.verdict, sent.name) == ("wrong", "send")
        assert "the route for 224.0.0.0/4 is missing" in sent.text
        probe.receiver.close()
        monkeypatch.setattr(eventmon, "BUFFER", 1 << 40)
        monkeypatch.setattr(
            eventmon, "listen", lambda url, listen=eventmon.listen: socket.socket(type=socket.SOCK_DGRAM)
        )
        step = eventmon.buffer_step(probe)
        assert step.verdict == "note"
        assert "sysctl" in step.text


def namespace(script, folder=None):
    """Run a shell script in a network namespace of its own, whose loopback interface is down, where that is possible."""
    trial = (
        subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False)
        if shutil.which("unshare")
        else None
    )
    if trial is None or trial.returncode:
        pytest.skip("no network namespace can be made here")
    code = script.replace("EVENTMON", f"{shlex.quote(sys.executable)} {shlex.quote(str(MODULE))}")
    done = subprocess.run(
        ["unshare", "-rn", "sh", "-c", code], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in done.stderr
    return done.stdout


def test_check_finds_that_the_loopback_interface_is_down_and_run_does_not_care():
    out = namespace("EVENTMON check; echo $?; EVENTMON run -- sh -c 'echo ran; exit 9'; echo $?")
    assert re.search("^wrong open     the loopback interface is down.*: sudo ip link set lo up$", out, re.MULTILINE)
    assert out.splitlines()[-3:] == ["1", "ran", "9"]


def test_check_tries_other_interfaces_only_when_told_and_vouches_for_no_network_that_nobody_confirms(tmp_path):
    script = """
    ip link set lo up; ip link add one type veth peer name two; ip addr add 10.77.0.1/24 dev one
    ip link set one up; ip link set two up
    EVENTMON check > first & EVENTMON check --all-interfaces > second &
    EVENTMON check --url 'udp://239.1.2.3:7000?interface=one&ttl=1' > third; wait; cat first; echo; cat second; echo; cat third
    """
    first, second, third = namespace(script, tmp_path).split("\n\n")
    assert "on which nothing was sent" in first
    (line,) = (line for line in first.splitlines() if "10.77.0.1" in line)
    assert re.fullmatch(r"  one +10\.77\.0\.1 +'udp://[0-9.:]+\?interface=10\.77\.0\.1&ttl=1'", line)
    assert line + "  works on this machine" in second.splitlines()
    assert "ok    receive  it has come back on this machine" in third
    assert "note  watching nobody else; nobody on another machine" in third


def test_the_demo_shows_all_that_can_happen_and_leaves_no_process_behind(monkeypatch):
    monkeypatch.setenv("EVENTMON_URL", "udp://no.such.host.invalid:7000")  # it has a URL of its own
    with terminal("demo", rows=40, columns=120) as it:
        it.wait_for("SUCCESS")
        it.press("2", "beta@demo")
        workers = set(
            re.findall(r"alive +([0-9]+)", wait_until(lambda: it.screen().count("alive") == 3 and it.screen()))
        )
        assert len(workers) == 3
        os.kill(int(min(workers)), signal.SIGSTOP)
        it.type("q")
        assert it.process.wait(20) == 0
        assert it.is_restored()
        with pytest.raises(ProcessLookupError):
            [os.kill(int(pid), 0) for pid in workers]


def test_the_demo_runs_whatever_its_file_is_called_and_fails_if_its_workers_do(tmp_path, monkeypatch, capsys):
    shutil.copy(MODULE, tmp_path / "evm")
    command = [sys.executable, str(tmp_path / "evm"), "demo", "--json", "--limit", "5"]
    done = subprocess.run(command, cwd=tmp_path, timeout=30, capture_output=True, check=True)
    assert len(done.stdout.splitlines()) == 5
    monkeypatch.setattr(eventmon, "__file__", str(tmp_path / "gone.py"))
    assert main(["demo", "--plain"]) == 1
    assert "a process of our own has failed" in capsys.readouterr().err


def is_alive(pid):
    """Whether a process is there, and more than a zombie."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, timeout=30, check=False)
    return found.stdout.strip() not in (b"", b"Z")


def test_the_workers_of_the_demo_end_with_it_even_if_it_is_killed():
    with running("demo", "--json", stdout=subprocess.PIPE, text=True) as process:
        pids = set()
        while len(pids) < 3:
            pids.add(json.loads(process.stdout.readline())["pid"])
        process.kill()
        process.wait()
        wait_until(lambda: not any(map(is_alive, pids)), seconds=eventmon.LIFE - 5)


def test_the_shop_of_the_demo_has_chains_retries_failures_progress_and_a_worker_that_dies(monkeypatch, url):
    monkeypatch.setattr(eventmon.Shop, "pause", lambda self, longest: None)
    with telling() as (dispatcher, next_events):
        shop = eventmon.Shop(dispatcher)
        lots = iter([True] * 1 + [False] * 999)
        monkeypatch.setattr(shop, "chance", lambda share: next(lots))
        with pytest.raises(ConnectionRefusedError):
            shop.order(1000)
        shop.order(2000)
        shop.stock(3000)
        assert len(list(shop.report(4000))) == 12
        dispatcher.flush()
        state = state_of(*next_events(7 + 22 + 23 + 3))
    tasks = {(task["name"], task["state"]): task for task in state.tasks.values()}
    assert "expired" in tasks["shop.charge", "FAILURE"]["traceback"]
    order, mail = tasks["shop.order", "SUCCESS"], tasks["mail.send", "SUCCESS"]
    assert (mail["parent_id"], mail["retries"], len(order["children"])) == (order["uuid"], 2, 4)
    assert {("shop.stock", "SUCCESS"), ("shop.report", "SUCCESS")} <= tasks.keys()
    worker = eventmon.child(eventmon.demo_worker, url, "", "gamma", 0.1)
    assert next(worker) == "ready"
    with pytest.raises(eventmon.Failure):  # for it says no word more
        next(worker)


BENCH = [
    "send, one event a datagram",
    "send to State, one event a datagram",
    "send, buffered",
    "send to State, buffered",
    "receive, one event a datagram",
    "State.event",
    "State, memory of a finished task",
    "State.tasks_by_time(limit=50)",
    "State.iteractive()",
    "State.scale_graph()",
    "latency, send to handler",
    "import eventmon",
    "idle Dispatcher",
    "idle watcher",
]


def test_bench_measures_everything_beside_what_a_user_would_write_by_hand(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "json.py").write_text("this is not the module json")
    module = shutil.copy(MODULE, tmp_path / "folder" / "renamed.py")
    command = [sys.executable, module, "bench", "--json", "--scale", "0.02"]
    done = subprocess.run(command, cwd=tmp_path, timeout=30, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["what"] for row in rows] == BENCH
    for row in rows:
        assert row["figure"] > 0, row
        assert row["unit"] in ("/s", "bytes", "us", "ms", "%"), row
        assert row.get("lost", 0) == 0, row
        if row["what"].startswith("idle"):
            assert row["naive"] is row["ratio"] is None
        else:
            assert row["ratio"] == pytest.approx(row["figure"] / row["naive"])


def test_bench_prints_a_table_with_a_key_as_well(tmp_path):
    (tmp_path / "key").write_bytes(b"\xff secret")
    status, out, errors = run("bench", "--scale", "0.02", "--key-file", str(tmp_path / "key"))
    assert (status, errors) == (0, [])
    system, head, *lines = out.decode().splitlines()
    assert eventmon.__version__ in system
    assert head.split("  ")[-1].strip() == "ratio"
    assert [line[:36].strip() for line in lines] == BENCH
    assert {len(line) for line in (head, *lines)} == {len(head)}  # and nothing is said to be lost


def test_a_process_of_the_bench_that_fails_or_hangs_is_one_line(monkeypatch, url):
    with pytest.raises(eventmon.Failure, match="scheme"):
        next(eventmon.child(eventmon.hear, "http://x", "", 1))
    hearer = eventmon.child(eventmon.hear, url, "", 1)
    assert next(hearer) == "listening"
    monkeypatch.setattr(eventmon, "ANSWER_TIME", 0.1)
    with pytest.raises(eventmon.Failure, match="no answer"):
        next(hearer)


def test_a_process_of_the_bench_ends_with_its_generator(monkeypatch, url):
    processes = []
    monkeypatch.setattr(
        subprocess.Popen, "kill", lambda self, kill=subprocess.Popen.kill: (processes.append(self), kill(self))
    )
    hearer = eventmon.child(eventmon.hear, url, "", 1)
    assert next(hearer) == "listening"
    hearer.close()
    assert [process.returncode is not None for process in processes] == [True]


def test_every_public_name_is_there_and_documented():
    for name in eventmon.__all__:
        assert name == "DEFAULT_URL" or getattr(eventmon, name).__doc__, name
    shown = subprocess.run(
        [sys.executable, "-m", "pydoc", str(MODULE)], capture_output=True, text=True, timeout=30, check=True
    ).stdout
    for name in ("Dispatcher", "Event", "LogHandler", "Receiver", "State"):
        assert f"class {name}(" in shown


# --- the README ---


def test_the_readme_shows_what_the_monitor_shows(utc):
    events = (
        {**event, "name": "shop.report"} if event.get("name") == "报表.生成" else event for event in shop().recent
    )
    assert f"```text\n{shown(state_of(*events), rows=11, url=DEFAULT_URL)}\n```" in README


def readme_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


CELERY = """
class Celery:
    def __init__(self, broker):
        self.events = self

    def connection(self):
        import contextlib
        return contextlib.nullcontext(self)

    def Receiver(self, connection, handlers):
        self.handlers = handlers
        return self

    def capture(self):
        self.handlers["*"]({"type": "task-sent", "uuid": "1", "hostname": "celery@far", "timestamp": 5.0})
"""


@pytest.mark.parametrize(
    "number, type, fields",
    [
        (0, "deploy-done", {"version": "1.2"}),
        (1, "task-succeeded", {"result": "'photo-9.jpg@200'"}),
        (2, "log-warning", {"message": "disk almost full"}),
        (3, None, {}),
        (4, "task-sent", {"hostname": "celery@far", "timestamp": 5.0}),
    ],
)
def test_every_python_snippet_in_the_readme_runs_beside_the_single_file(number, type, fields, tmp_path):
    shutil.copy(MODULE, tmp_path)
    (tmp_path / "celery.py").write_text(CELERY)
    code = readme_blocks("python")[number].replace("timeout=1", "timeout=0.2")
    with watching() as (_, events):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=30, capture_output=True, check=True)
        wait_until(lambda: type is None or [e for e in events if e.type == type and fields.items() <= e.items()])
    assert done.stdout == (b"" if type else b"0 tasks, 0 workers alive\n")
    assert len(readme_blocks("python")) == 5


def readme_commands():
    return [line for block in readme_blocks("sh") for line in block.splitlines() if line]


CLIENTS = ("redis-cli", "mosquitto_pub", "mosquitto_sub", "kcat")


def set_up(folder, line, url):
    """Prepare a folder in which a line of the README can be run; return the environment to run it in.

    Clients of servers are stand-ins: who comes last in a pipe writes what it gets to the file `got`, who comes first
    writes what is recorded.
    """
    shutil.copy(MODULE, folder)
    (folder / "bin").mkdir()
    (folder / "docs").mkdir()
    for name in ("python", "python3"):
        (folder / "bin" / name).symlink_to(sys.executable)
    for name in CLIENTS:
        (folder / "bin" / name).write_text(
            f"#!/bin/sh\nexec cat {'recorded.jsonl' if line.startswith(name) else '> got'}\n"
        )
        (folder / "bin" / name).chmod(0o755)
    (folder / "bin" / "ssh").write_text(f"#!/bin/sh\nshift\nEVENTMON_URL='{url}' exec \"$@\"\n")
    (folder / "bin" / "ssh").chmod(0o755)
    (folder / "recorded.jsonl").write_text('{"type":"old"}\n')
    (folder / "key").write_text("secret")
    return {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", "COLUMNS": "80"}


def missing(line):
    """Return the programs in a line of the README that are not here."""
    words = {re.split(r"\s", part.strip())[0] for part in re.split(r"[|;]", line)}
    return sorted(word for word in words & {"nc", "jq", "tar", "node", "grep"} if not shutil.which(word))


@pytest.mark.parametrize("line", readme_commands())
def test_every_command_in_the_readme_runs(line, tmp_path, url):
    """Run a line of the README's shell blocks as it stands, but on this test's group and with a bound."""
    if "pytest" in line:
        assert "grep" in (MODULE.parent / ".ci" / "run").read_text()  # which runs this line
        return
    line = line.partition("  #")[0]
    if missing(line):
        pytest.skip(f"{missing(line)} not here")
    parts = eventmon.parse_url(url)
    line = line.replace("239.255.69.86:6986", f"{parts.host}:{parts.port}")
    options = {"key": "secret"} if "--key-file" in line else {}
    there = url.replace(f":{parts.port}?", f":{parts.port - 1}?") if line.startswith("ssh") else url
    run_it = {"shell": True, "cwd": tmp_path, "env": set_up(tmp_path, line, there)}
    if line.startswith(("python eventmon.py watch", "python eventmon.py demo", "ssh")) and "watch recorded" not in line:
        with Dispatcher(there, **options) as dispatcher, watching(url=url) as (_, events):
            process = subprocess.Popen(line, stdout=subprocess.PIPE, start_new_session=True, **run_it)
            got = tmp_path / "got"
            wait_until(
                lambda: (
                    dispatcher.send("task-progress", uuid="1")
                    and (
                        select.select([process.stdout], [], [], 0.01)[0]
                        or got.exists()
                        and got.stat().st_size
                        or there != url
                        and events
                    )
                )
            )
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            process.stdout.close()
            return
    with watching(url=url, **options) as (_, events):
        done = subprocess.run(line, timeout=30, capture_output=True, check=False, **run_it)
        assert done.returncode == 0, done.stderr
        if " send" in line or "nc " in line or " run " in line:
            wait_until(lambda: events)


@pytest.mark.parametrize("language, program", [("js", ["node", "-"]), ("bash", ["sh"])])
def test_senders_in_other_languages_are_short_and_understood(language, program, url):
    (code,) = readme_blocks(language)
    assert len(code.splitlines()) <= 10
    if shutil.which(program[0]) is None or "nc " in code and missing("nc"):
        pytest.skip(f"{program[0]} or netcat is not here")
    parts = eventmon.parse_url(url)
    code = code.replace('6986, "239.255.69.86"', f'{parts.port}, "{parts.host}"')
    code = code.replace("239.255.69.86 6986", f"{parts.host} {parts.port}")
    more = 'for (let i = 0; i < 50; i++) send("more", {i});' if language == "js" else 'emit "more" 1'
    with watching() as (receiver, events):
        subprocess.run(program, input=f"{code}\n{more}\n".encode(), timeout=30, check=True)
        n = 51 if language == "js" else 2
        wait_until(lambda: len(events) == n)
        assert [event.get("i") for event in events[1:]] == ([*range(50)] if language == "js" else [None])
        assert {event["hostname"] for event in events} == {socket.gethostname()}
        assert receiver.stats["lost"] == receiver.stats["malformed"] == 0
        late = Receiver()
        assert not list(late.itercapture(timeout=0))


def test_events_go_through_a_real_redis_and_back(tmp_path, url):
    if not all(map(shutil.which, ("redis-server", "redis-cli", "jq"))):
        pytest.skip("no redis-server, or no jq")
    there, back = (line for line in readme_commands() if "redis-cli" in line)
    environment, sock = set_up(tmp_path, there, url), tmp_path / "sock"
    (tmp_path / "bin" / "redis-cli").write_text(f'#!/bin/sh\nexec {shutil.which("redis-cli")} -s {sock} "$@"\n')
    hostile = ["日本 \u2028 \x00\x1b\n\"'\\ $(ls) `ls` %s -n", "x" * 100_000, '"\\' * 10_000]
    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", str(sock), "--dir", str(tmp_path)], stdout=subprocess.DEVNULL
    )
    try:
        wait_until(sock.exists)
        pipe = subprocess.Popen(there, shell=True, cwd=tmp_path, env=environment, start_new_session=True)
        wait_until(somebody_watches)
        with Dispatcher() as dispatcher:
            for text in hostile:
                dispatcher.send("hello", text=text)
        count = ["redis-cli", "-s", str(sock), "XLEN", "events"]
        wait_until(lambda: subprocess.run(count, capture_output=True, check=True).stdout.strip() == b"3")
        os.killpg(pipe.pid, signal.SIGTERM)
        pipe.wait()
        with watching() as (_, events):
            subprocess.run(back, shell=True, cwd=tmp_path, env=environment, timeout=30, check=True)
            wait_until(lambda: [event["text"] for event in events] == hostile)
    finally:
        server.kill()
        server.wait()
