"""The specification of eventmon.py, in the order of the module: each test's name is a sentence about it.

    python test_eventmon.py [--json] [--scale X]      runs the benchmark instead, without pytest
"""

import argparse
import ast
import asyncio
import atexit
import calendar
import contextvars
import copy
import errno
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
import platform
import py_compile
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
import tempfile
import threading
import time
import tracemalloc
import weakref
import zipapp
from collections import Counter, deque
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from decimal import Decimal
from fractions import Fraction
from functools import cache, partial
from itertools import count
from types import SimpleNamespace

import eventmon
from eventmon import DEFAULT_URL, Dispatcher, Event, Receiver, State, main

try:  # Windows has none of them
    import fcntl
    import pty
    import termios
except ImportError:
    pty = None

MODULE = pathlib.Path(eventmon.__file__).resolve()
numbers = count(random.SystemRandom().randrange(10**6))


def new_url():
    """A group and a port that nobody else uses, on the loopback interface."""
    number = next(numbers)
    group, port = f"239.255.{number // 200 % 200}.{1 + number % 200}", 20000 + number % 20000
    return f"udp://{group}:{port}?interface=127.0.0.1&ttl=0"


# --- the benchmark ---
# A row is a generator: round by round it yields our figure and that of what a user would write by hand.


def seconds_for(work, times=1):
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def echo(port):
    """In a process of its own: count events; answer each ping with the count, and each bare datagram with itself."""
    state, sock = State(), socket.socket(type=socket.SOCK_DGRAM)
    sock.connect(("127.0.0.1", port))
    receiver = Receiver(handlers={"ping": lambda event: sock.send(b"%d" % state.event_count), "*": state.event})
    receiver.fileno()
    threading.Thread(target=receiver.capture, daemon=True).start()
    threading.Thread(target=lambda: [sock.send(sock.recv(999)) for _ in count()], daemon=True).start()
    sock.send(b"ready")
    sys.stdin.read()  # until the benchmark ends


@contextmanager
def partner(**options):
    """Yield a Dispatcher that an echo() hears, and a function that sends it a ping, or a bare datagram, and waits."""
    url = new_url()
    with socket.socket(type=socket.SOCK_DGRAM) as sock, Dispatcher(url, **options) as events:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(20)
        words = [sys.executable, __file__, "--echo", str(sock.getsockname()[1])]
        with subprocess.Popen(words, stdin=subprocess.PIPE, env={**os.environ, "EVENTMON_URL": url}) as process:
            sock.connect(sock.recvfrom(999)[1])
            yield events, lambda data=b"": int(((sock.send(data) if data else events.send("ping")), sock.recv(999))[1])
            process.kill()


def send_ours(events, n):
    for i in range(n):
        events.send("task-progress", uuid="5d0c91aa", progress=i)


@contextmanager
def by_hand():
    """Yield a function that sends `n` such events without eventmon, and the URL to which it sends them."""
    where = eventmon.parse_url(url := new_url())
    who = {"hostname": eventmon.default_hostname(), "pid": os.getpid(), "utcoffset": 0.0, "uuid": "5d0c91aa"}

    def send(n):
        for i in range(n):
            event = {"type": "task-progress", "timestamp": time.time(), **who, "clock": i, "progress": i}
            sock.sendto(json.dumps(event).encode(), where[:2])

    with closing(eventmon.Socket(where)) as sock:
        sock.socket.setblocking(True)
        yield send, url


def send_row(n, heard, **options):
    """Events a second: sent, or `heard`, which is to be in the State of another process."""
    silent = nullcontext((Dispatcher(new_url(), **options), int))
    with partner(**options) if heard else silent as (events, ping), by_hand() as (send, _):
        for rounds in count(1):
            ours = seconds_for(lambda: (send_ours(events, n), events.flush(0), ping()))
            if heard and ping() < n * rounds:
                print(f"{n * rounds - ping():,} events were lost", file=sys.stderr)
            yield n / ours, n / seconds_for(lambda: send(n))


def receive_row(n, burst=50):
    """Events a second that wait in a socket, where so many together find room in the smallest usual buffer."""
    with Receiver(new_url()) as receiver, Dispatcher(receiver.url) as events, by_hand() as (send, other):
        receiver.fileno()
        with closing(eventmon.Socket(eventmon.parse_url(other), listens=True)) as sock:
            while True:
                ours = naive = 0.0
                for _ in range(n // burst):
                    send_ours(events, burst)
                    ours += seconds_for(lambda: deque(receiver.itercapture(burst, 5), maxlen=0))
                    send(burst)
                    naive += seconds_for(lambda: json.loads(sock.recvfrom(65536)[0]), burst) * burst
                yield n / ours, n / naive


def rate(taking, n):
    """Events a second, of `n` tasks, that come from JSON a thousand at a time."""
    who = {"hostname": "alpha@laptop", "pid": 4711, "utcoffset": 0.0, "clock": 1, "timestamp": 1.7e9}
    received = {"name": "shop.resize", "args": "('photo.jpg',)", "kwargs": "{'width': 200}", "retries": 0}
    steps = ("received", received), ("started", {}), ("succeeded", {"result": "'photo.webp'", "runtime": 0.25})
    seconds = 0.0
    for start in range(0, n, 333):
        pairs = [(f"task-{i}", step) for i in range(start, min(n, start + 333)) for step in steps]
        dicts = ({"type": f"task-{subject}", "uuid": uuid, **who, **more} for uuid, (subject, more) in pairs)
        events = [Event(**json.loads(json.dumps(fields))) for fields in dicts]
        seconds += seconds_for(lambda events=events: deque(map(taking, events), maxlen=0))
    return 3 * n / seconds


def memory(taking, n):
    """Bytes for each finished task of `n`."""
    tracemalloc.start()
    try:
        rate(taking, n)
        return tracemalloc.get_traced_memory()[0] / n
    finally:
        tracemalloc.stop()


def state_row(n, figure):
    """A figure of what takes the events of `n` tasks: a State, and a dict of dicts."""
    while True:
        tasks = {}
        ours = figure(State(max_tasks_in_memory=n).event, n)
        yield ours, figure(lambda event, tasks=tasks: tasks.setdefault(event["uuid"], {}).update(event), n)


def query_row(n, ask, look):
    """Microseconds of a question to a State of `n` tasks, 50 of which are running, and to a list of them."""
    state, now = State(max_tasks_in_memory=n), time.time()
    kinds = ["task-succeeded" if i % max(1, n // 50) else "task-started" for i in range(n)]
    tasks = [Event(kind, uuid=str(i), timestamp=now - 60 + 60 * i / n, hostname="a") for i, kind in enumerate(kinds)]
    deque(map(state.event, tasks), maxlen=0)
    while True:
        yield 1e6 * seconds_for(lambda: list(ask(state)), 20), 1e6 * seconds_for(lambda: look(tasks))


def latency_row(n):
    """Microseconds from send to a handler in another process, and of a bare datagram: half of the way and back."""
    with partner() as (_, ping):
        while True:
            pairs = [(seconds_for(ping), seconds_for(lambda: ping(b"1")) / 2) for _ in range(n)]
            ours, naive = (sorted(column)[n // 2] * 1e6 for column in zip(*pairs))
            yield ours - naive, naive  # the answer to an event is a bare datagram


def start_row():
    """Milliseconds of a process, and of one that imports what any such tool needs."""
    runs = [str(MODULE), "--version"], ["-c", "import socket, json, threading, select"]
    while True:
        yield tuple(1e3 * seconds_for(lambda run=run: subprocess.check_output([sys.executable, *run])) for run in runs)


def rows(scale):
    """Yield what each row measures, its unit, and the row."""
    n = max(50, int(10_000 * scale))
    for how, options in (("one event a datagram", {}), ("buffered", {"buffer_group": ["task"]})):
        yield f"send, {how}", "/s", send_row(n, False, **options)
        yield f"send to State, {how}", "/s", send_row(n, True, **options)
    yield "receive, one event a datagram", "/s", receive_row(n)
    yield "State.event", "/s", state_row(n, rate)
    yield "State, memory of a finished task", " bytes", state_row(n, memory)
    for name, ask, look in (
        ("tasks_by_time(50)", lambda state: state.tasks_by_time(50), partial(sorted, key=lambda task: task["timestamp"])),
        ("iteractive()", State.iteractive, lambda tasks: [task for task in tasks if task["type"] == "task-started"]),
        ("scale_graph()", State.scale_graph, lambda tasks: Counter(int(task["timestamp"]) for task in tasks)),
    ):
        yield f"State.{name}", " us", query_row(10 * n, ask, look)
    yield "latency, send to handler", " us", latency_row(max(10, n // 50))
    yield "python eventmon.py --version", " ms", start_row()


def machine():
    cpu = pathlib.Path("/proc/cpuinfo")
    model = re.search("model name\\s*: (.*)", cpu.read_text()) if cpu.exists() else None
    python = f"{platform.python_implementation()} {platform.python_version()} on {platform.system()}"
    cores = f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}"
    return f"eventmon {eventmon.__version__}, {python}, {cores}"


def benchmark():
    """Measure this machine: the best of a few rounds, in turns with what a user would write by hand."""
    parser = argparse.ArgumentParser(description=benchmark.__doc__)
    parser.add_argument("--json", action="store_true", help="print each row as a line of JSON")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="how much work: 1 takes about a minute")
    parser.add_argument("--echo", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.echo:
        return echo(options.echo)
    if not options.json:
        print(f"{machine()}\n\n| | eventmon | by hand | ratio |\n|---|--:|--:|--:|", flush=True)
    for what, unit, row in rows(options.scale):
        end, pairs = time.monotonic() + 3 * options.scale, []
        with closing(row):
            while not pairs or time.monotonic() < end and len(pairs) < 20:
                pairs.append(next(row))
        ours, naive = map(max if unit == "/s" else min, zip(*pairs))
        cells = {"eventmon": ours, "by hand": naive, "ratio": ours / naive}
        if options.json:
            print(json.dumps({"what": what, "unit": unit.strip(), **cells}), flush=True)
        else:
            shown = (f"{n:,.0f}" if n >= 100 else f"{n:.3g}" for n in cells.values())
            print("| {} | {}{unit} | {}{unit} | {} |".format(what, *shown, unit=unit), flush=True)


if __name__ == "__main__":
    sys.exit(benchmark())

import pytest  # noqa: E402 - the benchmark does without it

README = MODULE.with_name("README.md").read_text(encoding="utf-8")
SOURCE = ("127.0.0.1", 4711)
posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell, signals or pseudo-terminals")
STREAM = b"0123456789abcdef"
for number in (getattr(signal, name, signal.SIGTERM) for name in ("SIGHUP", "SIGINT", "SIGQUIT")):
    if signal.getsignal(number) == signal.SIG_IGN:  # as nohup and a shell's & leave it, for our child processes too
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def url(monkeypatch):
    """A group and port of its own for each test, also for the processes it starts."""
    where = new_url()
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
def watching(**options):
    """A Receiver that captures in a thread: yields (receiver, list of the events so far that others have sent)."""
    events = []
    with Receiver(**options) as receiver:
        receiver.fileno()
        others = (event for event in receiver.itercapture() if "local" not in event)
        thread = threading.Thread(target=events.extend, args=(others,))
        thread.start()
        try:
            yield receiver, events
        finally:
            receiver.should_stop = True
            with suppress(OSError), Ear() as ear:
                ear.tell(receiver, b"wake up")
            thread.join()


def in_threads(work, names):
    """Call work(name) for each name in a thread of its own, and wait for them."""
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)


class Ear(socket.socket):
    """A plain socket as a Dispatcher's only hearer: the test is the watcher, and answers what it likes."""

    def __init__(self):
        super().__init__(socket.AF_INET, socket.SOCK_DGRAM)
        self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self.bind(("127.0.0.1", 0))
        self.settimeout(20)
        self.url = "udp://127.0.0.1:%d" % self.getsockname()[1]
        self.taken = count(1)

    def hear(self, *kinds, key=b""):
        """Return the next datagram whose frame is of one of these kinds, or carries events."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            data, self.sender = self.recvfrom(65536)
            frame = eventmon.parse_frame(eventmon.unseal(data, key)[0])
            self.stream = frame.stream
            if frame.kind in (kinds or (b"data", b"part")):
                return data
        raise TimeoutError(f"waited in vain for {kinds}")

    def answer(self, kind, *numbers, body=b"", key=b""):
        """Send POSITION WATCHER ROOM LOST, and a TAKEN that rises."""
        frame = eventmon.format_frame(kind, self.stream, (*numbers, next(self.taken)), body)
        self.sendto(eventmon.seal(frame, key), self.sender)

    def tell(self, receiver, data):
        """Be a sender: send a datagram to where a receiver listens."""
        self.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        self.sendto(data, receiver.channel.getsockname())


def delivered(receiver, *datagrams):
    """The types of the events that a receiver delivers for these datagrams."""
    return [event.type for data in datagrams for event in receiver.handle_message(data, SOURCE)]


def refuse(number):
    def fail(*args):
        raise OSError(number, "refused by the test")

    return fail


@pytest.fixture
def sockets(monkeypatch):
    """The sockets opened from now on."""
    opened, begin = [], eventmon.Socket.__init__

    def begin_and_note(sock, *args, **options):
        begin(sock, *args, **options)
        opened.append(sock.socket)

    monkeypatch.setattr(eventmon.Socket, "__init__", begin_and_note)
    return opened


@pytest.fixture
def virtual(monkeypatch):
    """Virtual time in eventmon: `monotonic`, and `offset` of the clock on the wall; `napped` is how long we slept.

    Sleep takes no time, but calls `during_nap`. A Dispatcher gets no thread, which would live in another time.
    """
    me = threading.current_thread()
    it = SimpleNamespace(monotonic=1000.0, offset=0.0, napped=0.0, during_nap=lambda: None)

    def sleep(seconds):
        if threading.current_thread() is not me:  # one of an earlier test, say
            return time.sleep(seconds)
        it.monotonic += seconds
        it.napped += seconds
        it.during_nap()

    def no_thread(**_):
        raise RuntimeError("can't start new thread")

    fake = {"monotonic": lambda: it.monotonic, "time": lambda: time.time() + it.offset, "sleep": sleep, "virtual": it}
    monkeypatch.setattr(eventmon, "time", SimpleNamespace(**{**vars(time), **fake}))
    monkeypatch.setattr(eventmon, "threading", SimpleNamespace(**{**vars(threading), "Thread": no_thread}))
    return it


FOLDER = tempfile.mkdtemp()
COMPILED = os.path.join(FOLDER, "eventmon.pyc")  # once: each start of the source would do it anew
py_compile.compile(str(MODULE), COMPILED, doraise=True)
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
PROGRAM = shlex.join([sys.executable, COMPILED])


def together(commands, input=b"", **options):
    """Run commands, a str by a shell, at the same time; return of each (status, standard output, lines of standard error)."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    processes = [subprocess.Popen(each, shell=isinstance(each, str), **pipes, **options) for each in commands]
    try:
        pairs = [process.communicate(input, timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    statuses = [process.returncode for process in processes]
    return [(status, out, err.decode(errors="backslashreplace").splitlines()) for status, (out, err) in zip(statuses, pairs)]


def python(code, *options):
    """Run a program beside the module, which says nothing on standard error; return its standard output."""
    ((status, out, errors),) = together([[sys.executable, *options, "-c", code]], cwd=FOLDER)
    assert (status, errors) == (0, [])
    return out


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a command line in this process: return its status, standard output and the lines of standard error."""

    def call(*words, input=b""):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(input)))
        status, (out, err) = main(words), capsys.readouterr()
        return status, out, err.splitlines()

    return call


@contextmanager
def running(*words, **options):
    """A process of eventmon.py that is ended afterwards."""
    process = subprocess.Popen([sys.executable, COMPILED, *words], **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for_watchers(number=1):
    """Wait until so many watchers answer the heartbeat of a Dispatcher that sends no event."""
    with Dispatcher() as probe:
        wait_until(lambda: probe.flush(0.02) == number)


# --- Event ---


def test_an_event_is_a_dict_with_a_type_and_a_timestamp():
    before = time.time()
    event = pickle.loads(pickle.dumps(Event("task-all-done", {"uuid": "1"}, pid=7)))
    assert dict(event, timestamp=0) == {"type": "task-all-done", "timestamp": 0, "uuid": "1", "pid": 7}
    assert (event.type, event.group, event.subject) == ("task-all-done", "task", "all-done")
    assert before <= event.timestamp == event["timestamp"] <= time.time()
    assert (Event("hello").group, Event("hello").subject, Event("x", timestamp=5).timestamp) == ("hello", "", 5)


# --- the wire ---

FRAMES = [
    ((b"data", STREAM, (1,), b'{"type":"hi"}'), b'EM2 data 0123456789abcdef 1\n{"type":"hi"}'),
    ((b"data", STREAM, (10**19 - 1,), b"\n"), b"EM2 data 0123456789abcdef 9999999999999999999\n\n"),
    ((b"part", STREAM, (7, 1, 0, 3), b'{"ty'), b'EM2 part 0123456789abcdef 7 1 0 3\n{"ty'),
    ((b"beat", STREAM, (9, 2), b"7 w1"), b"EM2 beat 0123456789abcdef 9 2\n7 w1"),
    ((b"bye", STREAM, (9, 2), b""), b"EM2 bye 0123456789abcdef 9 2\n"),
    ((b"ack", STREAM, (9, 5, 4096, 0, 3), b""), b"EM2 ack 0123456789abcdef 9 5 4096 0 3\n"),
    ((b"leave", STREAM, (9, 5, 4096, 0, 3), b""), b"EM2 leave 0123456789abcdef 9 5 4096 0 3\n"),
    ((b"nak", STREAM, (9, 5, 4096, 2, 3), b"10 12-14"), b"EM2 nak 0123456789abcdef 9 5 4096 2 3\n10 12-14"),
]
NO_FRAMES = [b"", b"\n", b"EM2", b"EM2 data 0123456789abcdef 1", b"EM1 data 0123456789abcdef 1\n"]
NO_FRAMES += [b"EM2 nope 0123456789abcdef 1\n", b"EM2 data short 1\n", b"EM2 data  0123456789abcdef 1\n"]
NO_FRAMES += [b"EM2 data %b%b\n" % (STREAM, n) for n in (b"", b" 1 2", b" -1", b" 1_0", b" \xb2", b" " + b"1" * 20)]
JSON = {"a": [1, 2.5, None, True, "\u65e5\u672c \U0001f600"], "b": {"c": "\x1b[2J\n"}}
MIRRORED = [  # how it is formatted and parsed, the value, and the bytes
    *((lambda fields: eventmon.format_frame(*fields), eventmon.parse_frame, *frame) for frame in FRAMES),
    (eventmon.format_ranges, eventmon.parse_ranges, [(1, 2), (5, 5), (7, 900)], b"1-2 5 7-900"),
    *[(eventmon.format_json, eventmon.parse_json, JSON, '{"a":[1,2.5,null,true,"日本 😀"],"b":{"c":"\\u001b[2J\\n"}}'.encode())],
]


@pytest.mark.parametrize("form, parse, value, data", MIRRORED)
def test_what_is_sent_is_formatted_and_parsed_as_documented(form, parse, value, data):
    assert (form(value), parse(data)) == (data, value)
    if parse is eventmon.parse_frame:
        assert re.search(rf"\n    EM2 {value[0].decode()} STREAM |also {value[0].decode()}, (the|its) last", eventmon.__doc__)


@pytest.mark.parametrize(
    "parse, bodies",
    [
        (eventmon.parse_frame, NO_FRAMES),
        (eventmon.parse_ranges, [b"", b"-", b"a", b"1,2", b"1-2-3", b"-5", b"1" * 20]),
        (eventmon.parse_json, [b"", b"{", b"{}{}", b"NaN", b'{"a":Infinity}', b"\xff", b"[" * 100000, b"'a'", b"{} x"]),
        (eventmon.parse_events, [b"1", b"[1]", b"{}", b'{"type":""}', b'{"type":5}', b'[{"type":"a"},{}]', b'"a"']),
    ],
)
def test_bytes_that_are_not_what_they_should_be_are_a_wire_error(parse, bodies):
    for body in bodies:
        with pytest.raises(eventmon.WireError):
            parse(body)


def test_what_json_has_no_form_for_or_is_too_big_deep_or_tangled_is_sent_as_something_readable():
    rude, circular, deep = type("Rude", (), {"__repr__": lambda self: 1 / 0})(), [], []
    circular.append(circular)
    for value, sent in [
        *(({1}, "{1}"), (b"x", "b'x'"), ([math.nan, -math.inf], ["nan", "-inf"]), ("a\udc80", "a\\udc80")),
        *(({(1, 2): 3}, {"(1, 2)": 3}), ([rude], ["<Rude whose repr raises ZeroDivisionError>"]), (circular, ["[...]"])),
        ((1, (2, {"a": {"b": math.nan}})), [1, [2, {"a": {"b": "nan"}}]]),
    ]:
        assert json.loads(eventmon.format_json({"value": value})) == {"value": sent}
    tangled = circular
    for _ in range(40):
        tangled = [tangled, tangled]
    for _ in range(100_000):
        deep = [deep]
    assert b"[[" in eventmon.format_json({"deep": deep})
    assert json.loads(eventmon.format_json({"big": 10**5000}))
    assert 1000 < len(eventmon.format_json(tangled)) < 20_000_000


def test_a_sealed_frame_opens_with_its_key_alone_and_for_half_a_minute(virtual):
    frame = eventmon.format_frame(b"data", STREAM, (1,), b"{}")
    first, data = eventmon.seal(frame, b"key"), eventmon.seal(frame, b"key")
    assert eventmon.unseal(data, b"key")[0] == frame == eventmon.seal(frame, b"") == eventmon.unseal(frame, b"")[0]
    assert eventmon.unseal(data, b"key") > eventmon.unseal(first, b"key")  # the serial number rises
    for changed in (data.replace(b" 1 ", b" 2 ", 1), data + b" ", data[:-3], frame, b"", b"EM2\n"):
        with pytest.raises(eventmon.Rejected):
            eventmon.unseal(changed, b"key")
    with pytest.raises(eventmon.Rejected, match="not sealed with this key"):
        eventmon.unseal(data, b"kez")
    for offset, way in ((32, "behind"), (-32, "ahead of")):
        virtual.offset = offset
        with pytest.raises(eventmon.Skewed, match=f"sealed by a clock 3. s {way} this one"):
            eventmon.unseal(data, b"key")


# --- the windows: as pure functions of time, then on a virtual network in virtual time ---


def test_the_history_is_bounded_and_so_are_repairs_however_many_ask():
    window, short = eventmon.TransmitWindow(history=60_000), eventmon.TransmitWindow(history=100_000)
    for _ in range(2000):
        short.add(b"x" * 300)
    for _ in range(200):
        window.add(b"x" * 300)
    assert 1500 < short.trail < 1800 and len(short.repairs([(1, 3000)], 1 << 20, 0.0)) == 2001 - short.trail
    trail = window.trail
    assert len(window.repairs([(1, trail + 19)], 10**9, 0.0)) == 20
    assert window.repairs([(1, trail + 19)], 10**9, 0.001) == []
    assert len(window.repairs([(trail, trail)], 0, 0.01)) == 1  # one also where there is no room for it
    sent = sum(len(frame) for step in range(200) for frame in window.repairs([(1, 200)], 10**9, 0.02 + step / 100))
    assert sent < 2 * (18 << 20)  # in two seconds, with what may come at once
    assert window.repairs([(900, 10**18)], 10**9, 5.0) == []


def test_only_64_watchers_are_waited_for_the_dead_make_room_and_none_confirms_what_was_not_sent():
    window = eventmon.TransmitWindow()
    for _ in range(10):
        window.add(b"x" * 300)
    assert all(window.on_ack(name, 10, 1000, 0, 1, now=0.0) for name in range(100)) and len(window.live(0.0)) == 64
    assert window.on_ack(200, 10, 1000, 0, 1, now=5.0) and len(window.live(5.0)) == 1
    with pytest.raises(eventmon.WireError, match="confirms 11, expected at most 10"):
        window.on_ack(200, 11, 1000, 0, 1, now=5.0)
    window.watchers[200].has_left = True
    assert window.live(5.0) == []


def test_what_is_missing_is_asked_for_after_a_moment_and_again_ever_less_often_until_it_is_given_up():
    counts = {"lost": 0, "repaired": 0, "duplicates": 0, "held": 0}
    window = eventmon.ReceiveWindow(1, 0.0, lambda: 0.5, counts)

    def arrive(*numbers, now):
        return [item for number in numbers for item in window.receive(number, number, 10, now)]

    assert arrive(1, 4, 5, 8, now=0.0) == [1]
    asked = [step / 2000 for step in range(1, 2600) if window.missing(step / 2000)]
    pauses = [later - sooner for sooner, later in zip(asked, asked[1:])]
    assert 0.001 <= asked[0] <= 0.004 and 1.5 * pauses[0] < pauses[2] and max(pauses[:8]) <= 0.04
    assert min(pauses[-2:]) > 0.2  # a forger's stream, in which nothing more comes, gets no flood of questions
    window.reach = 100
    assert arrive(2, 3, 1000, now=1.3) == [2, 3, 4, 5]
    assert window.missing(1.35) == [(6, 7), (9, 106)]  # no more than a buffer takes
    assert (window.overdue(1.35), window.overdue(2.8), counts["lost"]) == ([], [8, 1000], 2 + 991)


class VirtualSocket:
    """A UDP socket on a virtual network. Its name is (number of its host, port); the ttl of a URL is the number."""

    broken = False

    def __init__(self, network, url, space, listens=False):
        self.network, self.space, self.listens = network, space, listens
        self.name, self.target = (url.ttl, next(network.ports)), url[:2]
        self.inbox, self.socket = deque(), self
        network.sockets[self.name] = self

    def sendto(self, data, to):
        self.network.refuse()
        others = [sock for sock in self.network.sockets.values() if sock.listens]
        for sock in others if type(to[0]) is str else filter(None, [self.network.sockets.get(to)]):
            self.network.carry(data, self, sock)

    def recvfrom(self, size):
        if not self.inbox:
            raise BlockingIOError
        data, source = self.inbox.popleft()
        self.space += len(data) + 1024
        return data, source

    def put(self, data, source):
        if self.space > 0:
            self.space -= len(data) + 1024
            self.inbox.append((data, source))

    def close(self):
        self.network.sockets.pop(self.name, None)

    def is_ours(self):
        return True

    def getsockopt(self, *_):
        return self.space

    fileno = getsockopt

    def setsockopt(self, *_):
        if self.listens:
            refuse(errno.EADDRINUSE)()  # it has joined the group already


class Wait(BaseException):
    """Leaves a Dispatcher's thread where it waits."""


class VirtualThread:
    """A Dispatcher's thread; in its turn it runs from one wait to the next."""

    def __init__(self, network, target):
        self.network, self.target, self.owner = network, target, target.__self__
        self.due, self.files = -math.inf, ()

    def start(self):
        self.network.everybody.append(self)

    def turn(self):
        self.due, self.files, self.is_waiting = math.inf, (), True
        with suppress(Wait):
            self.target()

    def wait_for(self, seconds, *files):
        if not self.is_waiting:
            self.due, self.files = self.network.now + seconds, files
            raise Wait
        self.is_waiting = False  # until now


class VirtualWatcher:
    """A Receiver; in its turn it takes what has arrived. Notes what it has heard from each sender, in order."""

    def __init__(self, network, key):
        self.network, self.batch = network, network.dice.choice((None, None, 3))
        self.receiver = Receiver(network.url(), key=key)
        self.due, self.files, self.heard, self.owner = -math.inf, (self.receiver.channel,), {}, self.receiver
        network.everybody.append(self)

    def turn(self):
        for event in self.receiver.itercapture(self.batch, 0):
            self.heard.setdefault(event["hostname"], []).append(event.get("n", event.subject))
        self.due = self.network.now + self.receiver.pause(0.2)

    def told(self, sender):
        """What it has heard of a sender: the numbers of its events, and what its Receiver has said of its life."""
        heard = self.heard.get(sender.url, ())
        return [n for n in heard if type(n) is int], [subject for subject in heard if type(subject) is str]


class Network:
    """A network that loses, repeats, reorders, delays and cuts off, whose time passes as whoever is there sleeps.

    It drives whole Dispatchers and Receivers, whose sockets, clocks and threads it replaces.
    """

    def __init__(self, monkeypatch, dice, repeat=0.0, delay=0.001, space=8 << 20, history=8 << 20):
        self.dice, self.loss, self.repeat, self.delay = dice, 0.0, repeat, delay
        self.now, self.packets, self.sockets = 1000.0, [], {}
        self.ports, self.hosts = count(1), count(1)
        self.cut_off, self.dead = set(), set()  # numbers of hosts
        self.me = threading.current_thread()
        self.problem = 0  # the errno with which the network refuses all datagrams
        self.everybody, self.running, self.asleep = [], [], set()
        clock = {"monotonic": lambda: self.now, "time": lambda: self.now, "time_ns": lambda: int(self.now * 1e9)}
        limited = type("Limited", (eventmon.TransmitWindow,), {"history": property(lambda _: history, lambda *_: None)})
        for name, stand_in in {
            "time": SimpleNamespace(sleep=self.sleep, localtime=time.localtime, **clock),
            "threading": SimpleNamespace(RLock=threading.RLock, Thread=lambda target, **_: VirtualThread(self, target)),
            "wait_for": self.wait_for,
            "Socket": lambda url, listens=False: VirtualSocket(self, url, space if listens else 1 << 20, listens),
            "Link": self.link,
            "TransmitWindow": limited,
        }.items():
            monkeypatch.setattr(eventmon, name, stand_in)

    def url(self):
        """Return the URL of the next host."""
        return f"udp://239.1.1.1:7000?ttl={next(self.hosts)}"

    def link(self, url):
        self.refuse()
        socket.getaddrinfo(url.host.encode(), url.port)  # as it finds out where to send
        return VirtualSocket(self, url, 1 << 20)

    def refuse(self):
        if self.problem:
            refuse(self.problem)()

    def carry(self, data, sender, to):
        """Have a datagram arrive some time from now, once, twice or never."""
        is_lost = {sender.name[0], to.name[0]} & (self.cut_off | self.dead) or self.dice.random() < self.loss
        for _ in range(0 if is_lost else 1 + (self.dice.random() < self.repeat)):
            when = self.now + self.dice.random() * self.delay
            heapq.heappush(self.packets, (when, next(self.ports), to, data, sender.name))

    def wait_for(self, seconds, *files, real=eventmon.wait_for):
        (self.running[-1].wait_for if threading.current_thread() is self.me else real)(seconds, *files)

    def sleep(self, seconds):
        """Let time pass; a thread that sleeps for long is in the middle of nothing, and ends its turn."""
        if threading.current_thread() is not self.me:  # one of an earlier test
            return time.sleep(seconds)
        if self.running and seconds >= 0.05:
            return self.running[-1].wait_for(seconds)
        self.run(seconds)

    def run(self, seconds):
        """Let time pass, in which everybody has a turn who has something to do."""
        end = self.now + seconds
        while self.now < end:
            idle = [each for each in self.everybody if each not in self.running and each not in self.asleep]
            soonest = min([each.due for each in idle] + [packet[0] for packet in self.packets[:1]], default=end)
            self.now = min(end, max(self.now + 0.004, soonest))
            while self.packets and self.packets[0][0] <= self.now:
                _, _, sock, data, source = heapq.heappop(self.packets)
                sock.put(data, source)
            for each in idle:
                if each.due <= self.now or any(sock.inbox for sock in each.files):
                    self.running.append(each)
                    each.turn()
                    self.running.pop()


class VirtualSender:
    """A Dispatcher, what it has sent, and what it knew of its watchers in the end."""

    def __init__(self, network, key):
        self.network, self.dice, self.is_killed, self.url = network, network.dice, False, network.url()
        self.costs = []  # of each event: how many datagrams it takes
        self.watchers, self.known, self.behind, self.confirmed, self.is_over = [], 0, 0, None, False
        self.groups = self.dice.choice((("task", "worker"), ("task", "worker"), ("log", "own")))
        self.is_worker = "task" in self.groups
        self.batch = self.dice.choice((1, 1, 5))  # the most events in a datagram
        group = self.groups[: self.batch > 1]
        self.events = Dispatcher(self.url, hostname=self.url, key=key, buffer_group=group, buffer_limit=self.batch)

    def send(self):
        is_large = self.dice.random() < 0.01
        self.costs.append(2 if is_large else 1)
        text = "x" * (100_000 if is_large else self.dice.choice((0, 300)))
        self.events.send(f"{self.dice.choice(self.groups)}-number", n=len(self.costs), text=text)

    def kill(self):
        """Its process is gone, without a word."""
        self.is_killed = True
        self.network.dead.add(int(self.url.partition("=")[2]))
        self.close()

    def end(self, watchers, timeout):
        self.watchers = watchers
        if self.dice.random() < 0.7:
            self.confirmed = self.events.flush(timeout)
        self.known, self.behind = (self.events.stats[name] for name in ("watchers", "behind"))
        self.close()

    def close(self):
        self.is_over = True
        self.events.close()
        self.network.everybody = [each for each in self.network.everybody if each.owner is not self.events]


def simulate(seed, monkeypatch):
    """One life of some senders and watchers; everything that is promised is checked at its end."""
    dice = random.Random(seed)
    random.seed(seed)
    hard = dice.random() < 0.5  # whether more is lost than can be repaired
    history = dice.choice((8 << 20, 10_000, 3_000)) if hard else 8 << 20
    space = dice.choice((20_000, 1 << 20)) if hard else 8 << 20
    loss, repeat, delay = dice.choice((0.0, 0.05, 0.3)), dice.choice((0.0, 0.2)), dice.choice((0.0005, 0.003, 0.01))
    network = Network(monkeypatch, dice, repeat, delay, space, history)
    key = dice.choice((None, None, None, "secret"))
    watchers = early = [VirtualWatcher(network, key) for _ in range(dice.randint(1, 2))]
    senders = [VirtualSender(network, key) for _ in range(dice.choice((1, 2, 2)))]
    for sender in senders if hard else ():
        sender.events.flush()  # whoever is there hears of the stream, and knows from then on what it has missed
    network.loss = loss
    for step in range(dice.randint(1, 6)):
        sender = dice.choice(senders)
        network.problem = dice.choice((errno.ENOBUFS, errno.EPERM)) if dice.random() < 0.05 else 0
        for _ in range(0 if sender.is_over else dice.choice((1, 3, 70 if history < 8 << 20 else 15))):
            sender.send()
        network.problem = network.problem if hard else 0
        if dice.random() < 0.5:
            network.run(dice.choice((0.001, 0.02, 0.2, 1.0)))
        if dice.random() < 0.2:
            network.asleep ^= {dice.choice(early)}
        if hard and dice.random() < 0.2:
            network.cut_off = {dice.randint(1, 5)} if dice.random() < 0.7 else set()
        if hard and step == 4 and not sender.is_over:
            sender.kill()
        if dice.random() < 0.07 and not sender.is_over:  # a program ends
            network.cut_off, network.asleep, network.problem = set(), network.asleep if hard else set(), 0
            sender.end(watchers, 0.5 if hard else 5.0)
            senders += [] if hard else [VirtualSender(network, key)]
        if dice.random() < 0.02 and not network.problem:
            watchers = [*watchers, VirtualWatcher(network, key)]
    network.cut_off, network.asleep, network.problem = set(), set(), 0
    for sender in senders:
        if not sender.is_over:
            sender.end(watchers, 5.0)
    heard = [watcher.told(sender)[1][-1:] == ["offline"] for watcher in watchers for sender in senders]
    network.run(0.1 if all(heard) else 4.5)  # whoever hears no goodbye takes a sender for lost after three seconds
    for watcher in watchers:
        watcher.receiver.close()
        verify(watcher, senders, watcher in early, hard, seed)
    for sender in senders:
        # one that came late has everything if it has what could still be had
        whole = [watcher for watcher in sender.watchers if len(watcher.told(sender)[0]) == len(sender.costs)]
        having = sum(watcher in whole or hard and watcher not in early for watcher in sender.watchers)
        assert (sender.confirmed or 0) <= having, (seed, "confirmed by who has not everything")
        if sender.confirmed is not None:
            assert sender.confirmed == sender.known - sender.behind, (seed, "flush and stats do not agree")
            assert hard or not sender.behind, (seed, "not confirmed by who has everything")


def verify(watcher, senders, is_early, hard, seed):
    """Verify what a watcher has heard of each sender, what its Receiver has said of their lives, and what it has counted."""
    least, lost, most = 0, watcher.receiver.stats["lost"], 0
    for sender in senders:
        numbers, life = watcher.told(sender)
        assert numbers == sorted(set(numbers)), (seed, numbers, "twice, or out of order")
        missing = [cost for n, cost in enumerate(sender.costs, 1) if n not in numbers]
        most += sum(missing)
        # one that has slept for so long that it was taken for dead, or was not heard of before the end, is not waited for
        is_known = sender.known == len(sender.watchers)
        if is_known and not sender.is_killed:
            least += -(-len(missing) // sender.batch)
        if is_known and not hard and watcher in sender.watchers:
            whole = [*range(1, len(sender.costs) + 1), *["offline"] * (sender.is_worker and sender.costs != [])]
            assert watcher.heard.get(sender.url, []) == whole, (seed, numbers, life, "lost what could be repaired")
        if is_early or not hard:
            ending = "lost" if sender.is_killed else "(lost|(lost )?offline)"
            ending = f"(online )?(lost online )*{ending}" if sender.is_worker and numbers else ""
            assert re.fullmatch(ending, " ".join(life)), (seed, numbers, life, "whether it lives is told wrongly")
    if is_early:
        assert least <= lost <= most, (seed, least, lost, most, "lost in silence, or counted what has come")


BASE = random.SystemRandom().randrange(10**6)


@pytest.mark.parametrize("seed", range(BASE, BASE + 600, 100))
def test_on_a_bad_network_everything_arrives_once_in_order_or_is_counted(seed, monkeypatch):
    for number in range(seed, seed + 100):
        with monkeypatch.context() as patch:
            simulate(number, patch)


@pytest.fixture
def network(monkeypatch):
    """A virtual network that loses nothing."""
    return Network(monkeypatch, random.Random(1))


# --- URL and sockets ---


def test_a_url_names_host_port_interface_and_ttl_and_the_environment_overrides_the_default(monkeypatch):
    for text, parts in [
        (DEFAULT_URL, ("239.255.69.86", 6986, "127.0.0.1", 0)),
        ("udp://239.1.2.3:7000", ("239.1.2.3", 7000, "127.0.0.1", 0)),
        ("udp://239.1.2.3:7000/?interface=eth0&ttl=255", ("239.1.2.3", 7000, "eth0", 255)),
        ("udp://127.0.0.1:1", ("127.0.0.1", 1, "", 0)),
        ("udp://watcher.example:65535?ttl=3", ("watcher.example", 65535, "", 3)),
    ]:
        assert eventmon.parse_url(text) == parts
        monkeypatch.setenv("EVENTMON_URL", text)
        assert Dispatcher().url == Receiver().url == text
        assert Dispatcher("udp://239.1.2.4:7000").url == "udp://239.1.2.4:7000"
    monkeypatch.delenv("EVENTMON_URL")
    assert Dispatcher().url == DEFAULT_URL


@pytest.mark.parametrize(
    "part, bad",
    [
        ("scheme", ["", "tcp://239.1.2.3:7000", "239.1.2.3:7000"]),
        ("[Pp]ort", ["udp://239.1.2.3" + port for port in ("", ":0", ":65536", ":x")]),
        ("host", [f"udp://{host}:7000" for host in ("", "239.1.2", "239.1.2.300", "a..b", "a" * 64, "[ff02::1]")]),
        ("host", [f"udp://{host}:7000" for host in ("0xEF.0xFF.77.99", "0xEFFF4D63", "0357.1.2.3")]),  # groups, really
        ("host|character", ["udp://239.1.2.3\0:7000"]),
        ("user", ["udp://user:secret@239.1.2.3:7000"]),
        ("path", ["udp://239.1.2.3:7000/path", "udp://239.1.2.3:7000#x"]),
        ("ttl", ["udp://239.1.2.3:7000?ttl=" + ttl for ttl in ("256", "-1", "")]),
        ("interface", ["udp://239.1.2.3:7000?interface=" + name for name in ("", "999.1.1.1", "%00")]),
        ("option", ["udp://239.1.2.3:7000?key=secret"]),
        ("twice", ["udp://239.1.2.3:7000?ttl=1&ttl=1"]),
        ("ttl|query|field", ["udp://239.1.2.3:7000?ttl"]),
        ("None", [None]),
    ],
)
def test_a_bad_url_is_a_value_error_that_says_which_part(part, bad):
    for text in bad:
        for use in (eventmon.parse_url, Dispatcher, Receiver)[: 3 if text else 1]:  # None stands for the default there
            with pytest.raises(ValueError, match=f"url .*{part}"):
                use(text)


def test_nothing_leaves_the_machine_unless_the_url_says_so(url, sockets):
    with Dispatcher() as dispatcher, Receiver() as receiver:
        dispatcher.send("hello")
        receiver.fileno()
        for sock in sockets:
            assert socket.inet_ntoa(sock.getsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, 4)) == "127.0.0.1"
            assert sock.getsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL) == 0
            assert sock.getsockname()[0] in ("127.0.0.1", eventmon.parse_url(url).host)
    assert len(sockets) == 3


def test_a_receiver_hears_its_own_group_alone_whose_interface_may_be_named_or_is_reached_by_unicast(url):
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")] or ["127.0.0.1"]
    with Ear() as free:
        unicast = free.url
    for where in (url.replace("127.0.0.1", names[0]), unicast):
        with Dispatcher(where) as dispatcher, Dispatcher(url.replace("239.255", "239.254")) as other:
            dispatcher.send("before")
            with watching(url=where) as (_, events):
                other.send("foreign")
                dispatcher.send("after")
                wait_until(lambda: [event.type for event in events] == ["before", "after"] and dispatcher.flush() == 1)


# --- Dispatcher ---


FIELDS = [{}, {"blind": True}, {"timestamp": 5}, {"hostname": "other", "clock": 7}, {"self": 1, "event": 2}]
FIELDS += [{"text": 'ü "quoted" \n', "deep": {"list": [1, None, True]}, "number": 1.5}, {"long": "x" * 200000}]
FIELDS += [{"odd": math.nan, "object": object, "surrogate": "\ud800"}]


def test_what_is_sent_or_published_is_what_arrives_and_says_who_sent_it_and_when():
    ours, types = {"hostname": "100%", "pid": os.getpid()}, ("task-progress", 'a "type" of ours: ü %s', "x" * 200)
    with watching() as (_, events), Dispatcher(hostname="100%") as dispatcher:
        # the second time the type is known
        sent = [dispatcher.send(type, **fields) for type in types for fields in FIELDS * 2]
        assert isinstance(sent[0], Event) and ours.items() <= sent[0].items()
        assert sent[0].keys() - ours == {"type", "timestamp", "utcoffset", "clock"} == sent[1].keys() - ours | {"clock"}
        sent.append({"type": "task-sent", "hostname": "far@away", "clock": 5, "timestamp": 1.5, "x": None})
        assert dispatcher.publish(sent[-1]) == sent[-1]
        wait_until(lambda: len(events) == len(sent))
    for event, arrived in zip(sent, events):
        assert abs(arrived.pop("local_received") - time.time()) < 60
        assert list(arrived) == list(event)
        assert "odd" in event or arrived == event


@posix
def test_the_utcoffset_is_what_the_clock_on_the_wall_says(monkeypatch):
    monkeypatch.setenv("TZ", "IST-1GMT0,M10.5.0,M3.5.0/1")  # Dublin's, whose summer time is the standard one
    time.tzset()
    now = int(time.time())
    assert Dispatcher().send("hello")["utcoffset"] == (now - calendar.timegm(time.localtime(now))) / 3600


def test_the_clock_is_shared_by_the_process_and_goes_past_what_is_received():
    receiver = Receiver()
    with Dispatcher() as one, Dispatcher() as two:
        assert one.send("a")["clock"] < two.send("b")["clock"] < one.send("c")["clock"]
        far = one.send("c")["clock"] + 10**6
        delivered(receiver, b'[{"type":"far","clock":%d},{"type":"near","clock":1}]' % far)
        assert one.send("d")["clock"] > far
        delivered(receiver, *[b'{"type":"x","clock":%b}' % bad for bad in (b'"x"', b"1e300", b"true", b"9" * 30)])
        assert one.send("e")["clock"] < 2 * far


def test_misuse_is_a_value_error():
    with Dispatcher() as dispatcher:
        for use in (Event, dispatcher.send, lambda type: dispatcher.publish({"type": type})):
            for type in ("", None, 5, b"x", ["x"]):
                with pytest.raises(ValueError, match="expected a non-empty str"):
                    use(type)
        with pytest.raises(ValueError, match=r"17,825,\d\d\d bytes .* 16,777,216"):
            dispatcher.send("big", x="x" * (17 << 20))


def test_a_disabled_dispatcher_sends_nothing_and_an_enabled_one_the_groups_asked_for_or_all():
    calls = []
    for groups, sent in (({"task"}, ["task-sent"]), ([], ["hello", "worker-x", "task-sent"])):
        with Dispatcher(enabled=False, groups=groups) as dispatcher:
            dispatcher.on_enabled.add(lambda: calls.append("on"))
            dispatcher.on_disabled.add(lambda: calls.append("off"))
            assert dispatcher.send("task-sent") is None
            dispatcher.enable()
            dispatcher.enable()
            got = [dispatcher.publish({"type": "hello"}), dispatcher.send("worker-x"), dispatcher.send("task-sent")]
            assert [event["type"] for event in got if event] == sent
            dispatcher.disable()
            assert dispatcher.publish({"type": "task-sent"}) is None
            assert dispatcher.stats["events"] == len(sent)
    assert calls == ["on", "off"] * 2


def test_buffered_groups_are_sent_together_with_the_others_and_soon(network):
    with Dispatcher(network.url(), buffer_group={"task"}, buffer_limit=3) as dispatcher:
        for type in ["task-progress"] * 8 + ["hello", "task-progress"]:
            dispatcher.send(type)
        assert (dispatcher.stats["events"], dispatcher.stats["datagrams"]) == (10, 3)
        for wait, datagrams in ((network.run, 4), (network.run, 5), (dispatcher.flush, 6)):
            wait(0.06)
            assert dispatcher.stats["datagrams"] == datagrams
            dispatcher.send("task-progress")


@pytest.mark.parametrize("local, most", [(False, 1400), (True, 61440 if sys.platform == "linux" else 8192)])
def test_a_datagram_fits_the_network_that_carries_it(local, most, monkeypatch):
    monkeypatch.setattr(eventmon, "on_loopback", lambda url: local)
    with Ear() as ear, Dispatcher(ear.url, buffer_group={"task"}, key="secret") as dispatcher:
        dispatcher.send("hello", x="x" * 100000)
        for _ in range(24):
            dispatcher.send("task-progress", x="x" * 100)
        dispatcher.send("end")
        sizes, last = [], b""
        while b'"end"' not in last:
            last = ear.hear(key=b"secret")
            sizes.append(len(last))
    assert 0.9 * most < max(sizes) <= most


def test_while_a_name_is_resolved_events_wait_in_the_history(network, monkeypatch):
    asked, look_up, watcher = [], socket.getaddrinfo, VirtualWatcher(network, None)

    def slow(host, *more):
        asked.append(host)
        in_threads(lambda n: dispatcher.send("step", n=n), range(1, 5))
        return look_up("127.0.0.1", *more)

    monkeypatch.setattr(eventmon.socket, "getaddrinfo", slow)
    with Dispatcher("udp://slow.example:7000?ttl=9", "we") as dispatcher:
        dispatcher.send("step", n=0)
        assert (dispatcher.stats["events"], dispatcher.stats["errors"], asked) == (1, 0, [])
        network.run(0.1)
    assert (sorted(watcher.heard["we"]), asked) == ([0, 1, 2, 3, 4], [b"slow.example"])


@pytest.mark.parametrize("name", ["ENETUNREACH", "ENODEV", "ENOBUFS", "EPERM", "EMSGSIZE"])
def test_what_the_network_refuses_is_counted_and_repaired(name, network):
    watcher = VirtualWatcher(network, None)
    with Dispatcher(network.url(), "we") as dispatcher:
        for start in (0, 20):  # before it has a socket, and later
            network.problem = getattr(errno, name)
            for n in range(start, start + 20):
                dispatcher.send("step", n=n)
            assert dispatcher.stats["errors"] >= start + 20
            assert (dispatcher.problem.errno, dispatcher.flush(0.05)) == (network.problem, 0)
            network.problem = 0
            network.run(2.0)
        assert dispatcher.flush() == 1
    assert (watcher.heard["we"], watcher.receiver.stats["lost"]) == ([*range(40)], 0)


def test_a_worker_has_a_heartbeat_whatever_fails_in_its_thread_which_sleeps_while_it_is_disabled(network, monkeypatch):
    receiver, turns = Receiver(network.url()), []
    receiver.fileno()
    with Dispatcher(network.url(), freq=1.0) as dispatcher:
        network.run(3.0)
        with monkeypatch.context() as broken:
            broken.setattr(eventmon, "wait_for", refuse(errno.EIO))
            network.run(0.6)
        assert dispatcher.problem.errno == errno.EIO
        network.run(3.0)
        dispatcher.disable()
        (thread,) = network.everybody
        monkeypatch.setattr(thread, "target", lambda target=thread.target: turns.append(network.now) or target())
        network.run(5.0)
    assert 5 < len(turns) < 50
    events = list(receiver.itercapture(timeout=0))
    assert [event.subject for event in events if "local" not in event] == ["online", *["heartbeat"] * 6, "offline"]
    assert {"freq", "active", "processed", "sw_ident", "sw_ver", "sw_sys"} <= events[1].keys()
    assert ("loadavg" in events[1]) == hasattr(os, "getloadavg")


def test_threads_share_a_dispatcher_of_events_of_any_size_and_only_one_waits_on_its_socket(monkeypatch):
    waiting, names, texts = set(), "abcdefghijklmnopqrst", [100_000 * (n % 50 == 0) * "x" for n in range(100)]

    def note(*args, wait_for=eventmon.wait_for):
        waiting.add((threading.current_thread(), args[1:]))
        wait_for(*args)

    def work(name):
        for n, text in enumerate(texts):
            dispatcher.send("step", name=name, n=n, x=text)
        dispatcher.flush(20)

    monkeypatch.setattr(eventmon, "wait_for", note)
    with watching() as (receiver, events), Dispatcher() as dispatcher:
        wait_until(lambda: dispatcher.flush() == 1)  # before the first event
        dispatcher.send("large", name="", x="x" * (15 << 20))
        in_threads(work, names)
        assert (dispatcher.flush(20), dispatcher.stats["watchers"], dispatcher.stats["behind"]) == (1, 1, 0)
        wait_until(lambda: len(events) == 2001)
        assert receiver.stats["malformed"] == receiver.stats["lost"] == 0
    for name in names:
        assert [(event["n"], event["x"]) for event in events if event["name"] == name] == [*enumerate(texts)]
    assert len(events[0]["x"]) == 15 << 20
    assert len(waiting) == len({files for _, files in waiting}) >= 2  # one thread for a socket: eventlet demands it


def interrupted(work, handler, line):
    """Run work(), and handler() when it comes to this line, counted, of eventmon.py; return whether there is one."""
    left = [line]

    def trace(frame, event, arg):
        if frame.f_code.co_filename != eventmon.__file__:
            return None
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not text.lstrip().startswith("with "):  # before whose body no signal is handled
            left[0] -= 1
            if left[0] == 0:
                sys.settrace(None)
                handler()
        return trace

    sys.settrace(trace)
    with suppress(ValueError):  # it is closed
        work()
    sys.settrace(None)
    return left[0] <= 0


WAYS = [({}, {}), ({}, {"x": "x" * 150000}), ({"buffer_group": {"task"}, "buffer_limit": 2}, {})]


@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize("options, fields", WAYS)
def test_a_signal_handler_may_send_or_close_at_any_moment(options, fields, closes):
    """It interrupts a send: in each run at some lines of eventmon.py, over all runs at each."""

    def arrived(line):
        return [event["name"] for event in events if event["hostname"] == str(line)]

    with watching() as (receiver, events):
        for line in count(random.randint(1, 24), 24):
            dispatcher = Dispatcher(hostname=str(line), **options)
            send = partial(dispatcher.send, random.choice(("task-x", "task-y")))  # sometimes known already
            dispatcher.send("task-x", name="first")
            handler = dispatcher.close if closes else partial(send, name="nested", **fields)
            sent = []
            ran = interrupted(lambda: sent.append(send(name="outer", **fields)), handler, line)  # noqa: B023
            if closes and ran:
                expected = ["first", *["outer"] * any(sent)]
                wait_until(lambda: not dispatcher.enabled)  # noqa: B023
            else:
                expected = ["first", "outer", "last"]
                send(name="last")
            dispatcher.close()
            wait_until(lambda: {*expected, *["nested"] * (ran and not closes)} <= {*arrived(line)})  # noqa: B023
            others = [name for name in arrived(line) if name != "nested"]
            assert others in (expected, ["first", "outer"]) and arrived(line).count("nested") == (ran and not closes)
            if not ran:
                break
        assert receiver.stats["duplicates"] == 0 and line > 15


def flood(dispatcher, number=1000):
    for n in range(number):
        dispatcher.send("step", n=n)


def flood_and_work(dispatcher):
    for _ in range(1000):
        eventmon.time.virtual.monotonic += 0.0004
        dispatcher.send("step")


@contextmanager
def behind(**options):
    """A Dispatcher that has sent two datagrams, and an Ear that has confirmed the first one and has no room."""
    with Ear() as ear, Dispatcher(ear.url, **options) as dispatcher:
        dispatcher.send("hello")
        ear.hear()
        ear.answer(b"ack", 1, 7, 0, 0)
        dispatcher.flush(0)
        assert dispatcher.stats["watchers"] == 1
        yield dispatcher, ear


@pytest.mark.parametrize(
    "max_wait, watcher, sent, work, least, most",
    [
        (0.01, "stopped", 0, flood, 0.2, 0.27),
        (0, "stopped", 1, partial(Dispatcher.send, type="large", x="x" * 3_000_000), 0, 0),
        (0.05, "stopped", 1, partial(Dispatcher.send, type="large", x="x" * 3_000_000), 0.04, 0.051),
        (0.02, "advancing", 0, flood_and_work, 0.99, 1.45),  # a second of grace, then half of the time
        (1.0, "stopped", 0, flood, 2.5, 3.5),  # who has nothing else to do waits as long as the watcher lives
        (0.01, "gone", 1, Dispatcher.close, 0, 0.05),
        (0.01, "stopped", 1, Dispatcher.close, 0.15, 0.26),
        (60, "stopped", 1, Dispatcher.close, 0.15, 0.26),
        (0.01, "stopped beside another", 1, Dispatcher.close, 0.15, 0.26),
        (60, "stopped", 1, partial(Dispatcher.flush, timeout=0), 0, 0),
        (0.01, "advancing", 1000, Dispatcher.close, 2.5, 3.1),
    ],
)
def test_a_watcher_that_is_behind_is_waited_for_as_long_as_is_promised(
    max_wait, watcher, sent, work, least, most, virtual
):
    with behind(max_wait=max_wait) as (dispatcher, ear):
        position, naps = count(2), count(1)
        if watcher == "gone":
            ear.answer(b"leave", 1, 7, 0, 0)
            dispatcher.flush(0)
        flood(dispatcher, sent)
        if watcher == "advancing":
            virtual.during_nap = lambda: next(naps) % 4 or ear.answer(b"ack", next(position), 7, 0, 0)
        if watcher == "stopped beside another":
            virtual.during_nap = lambda: ear.answer(b"ack", 2, 8, 0, 0)  # which has everything
        virtual.napped = 0.0
        work(dispatcher)
        assert least <= virtual.napped <= most


def test_a_stopped_watcher_costs_a_quarter_second_once_until_it_advances_and_so_does_a_first_answer(virtual):
    def napped(dispatcher, number=1000):
        before = virtual.napped
        flood(dispatcher, number)
        return virtual.napped - before

    with behind() as (dispatcher, ear):
        assert 0.2 < napped(dispatcher) < 0.27 and napped(dispatcher) == 0
        ear.answer(b"ack", 2000, 7, 0, 0)
        dispatcher.flush(0)
        assert 0.2 < napped(dispatcher) < 0.27
        assert dispatcher.flush(60.0) == 0 and dispatcher.lacking() == [1001], "it fell silent, and said no goodbye"
    with Ear() as nobody, Dispatcher(nobody.url) as dispatcher:
        assert napped(dispatcher, 50) == 0
        assert 0.2 < napped(dispatcher) < 0.26 and napped(dispatcher) == 0
        before = virtual.napped
        assert dispatcher.flush(60.0) == 0 and virtual.napped - before < 4, "it is not alive"


def test_sending_imports_nothing_needs_no_file_and_leaves_nothing_open():
    """Beside an import a fork would hang, and where all descriptors are in use it would fail."""
    out = python(
        "import eventmon, os, sys\ntry: import resource\nexcept ImportError: pass\n"
        "else: resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))\n"
        "d, late = eventmon.Dispatcher(key='secret'), eventmon.Dispatcher()\n"
        "before, files = set(sys.modules), []\nd.send('hello', x={1}, y='x' * 100000)\n"
        "try:\n    while True: files.append(open(os.devnull))\nexcept OSError: pass\n"
        "for each in (d, late):\n    try:\n        with each.task('job'): 1/0\n    except ZeroDivisionError: pass\n"
        "d.flush()\nprint(sorted(set(sys.modules) - before))\nfor file in files: file.close()\n"
        "eventmon.Dispatcher().send('deploy-done', id=7)\neventmon.Receiver().capture(timeout=0)\n"
        "for event in eventmon.Receiver().itercapture(timeout=0): pass\n",
        *("-X", "dev", "-W", "error"),
    )
    assert out == b"[]\n"


PROGRAMS = {  # of each: the numbers that it sends, by how many processes, and its code
    "that dies at once": ([0], 1, "Dispatcher().send('step', n=0)\nos._exit(0)"),
    "that just ends": (
        *([*range(30)], 1),
        "d = Dispatcher(buffer_group={'step'}, freq=60)\nfor n in range(30): d.send('step', n=n)",
    ),
    "that forks a child of multiprocessing, which buffers": (
        *([0], 1),
        "d = Dispatcher(buffer_group={'step'})\nfork = multiprocessing.get_context('fork')\n"
        "p = fork.Process(target=d.send, args=('step',), kwargs={'n': 0})\np.start()\np.join()",
    ),
    "that forks while a thread sends": (
        *([0, *range(100, 1000), *[*range(51)] * 3], 7),
        "d = Dispatcher(freq=60)\nd.send('step', n=0)\n"
        "busy = threading.Thread(target=lambda: [d.send('step', n=n) for n in range(100, 1000)])\nbusy.start()\n"
        "for _ in range(3):\n    if not os.fork():\n        for n in range(50): d.send('step', n=n)\n"
        "        if os.fork(): os.wait()\n        else: d.send('step', n=50)\n        os._exit(0)\n"
        "busy.join()\nfor _ in range(3): os.wait()",
    ),
    "that forks in the middle of a send": (
        *([0, 1, 1, 2, 2], 2),
        "class Forks:\n    def __repr__(self): self.child = os.fork(); return 'forks'\n"
        "d, forks = Dispatcher(), Forks()\nd.send('step', n=0)\nd.send('step', n=1, x=forks)\nd.send('step', n=2)\n"
        "os.wait() if forks.child else os._exit(0)",
    ),
    "that forks by C code": (
        *([-1, *[*range(20)] * 3], 3),
        "d = Dispatcher(freq=9)\nd.send('step', n=-1)\n"
        "time.sleep(0.1)  # else the child may hang at the interpreter's lock\n"
        "fork = ctypes.PyDLL(None).fork\nfirst = fork()\nsecond = first and fork()\n"
        "for n in range(20): d.send('step', n=n)\nos.wait() if second else os._exit(0)\nos.wait()",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_of_a_program_everything_arrives_once_from_the_process_that_sent_it(name):
    if "forks" in name and not hasattr(os, "fork") or "C code" in name and sys.platform != "linux":
        pytest.skip("no process can fork here, or by C code unnoticed by Python")
    expected, processes, code = PROGRAMS[name]
    imports = "import ctypes, multiprocessing.util, os, sys, threading, time\nfrom eventmon import Dispatcher\n"
    with watching() as (receiver, events):
        python(imports + code, "-W", "ignore")  # of a fork beside threads
        wait_until(lambda: sum("n" in event for event in events) >= len(expected))
        types = [event.type for event in events]
        wait_until(lambda: [event.type for event in events].count("worker-offline") == types.count("worker-online"))
        assert receiver.stats["lost"] == receiver.stats["duplicates"] == receiver.stats["rejected"] == 0
    sent = [(event["pid"], event["n"]) for event in events if "n" in event]
    assert sorted(n for _, n in sent) == sorted(expected)
    assert sorted(sent) == sorted(sent, key=lambda pair: pair[0])  # of each process in order
    assert len({pid for pid, _ in sent}) == processes


@pytest.mark.skipif(sys.platform == "win32", reason="a descriptor is no number of a file here")
def test_descriptors_that_the_program_closed_are_replaced_and_left_to_whoever_has_them(sockets, monkeypatch):
    turns, wait_for = [], eventmon.wait_for
    monkeypatch.setattr(eventmon, "wait_for", lambda *args: turns.append(args) or wait_for(*args))
    with Ear() as file, watching() as (receiver, events), Dispatcher() as dispatcher:
        dispatcher.send("step", n=0)
        wait_until(lambda: len(events) == 1)
        turns.clear()
        opened = len(sockets)
        closed, reused = random.sample((receiver.channel.fileno(), sockets[-1].fileno()), 2)
        os.dup2(file.fileno(), reused)
        os.close(closed)
        for n in range(1, 10):
            dispatcher.send("step", n=n)
        wait_until(lambda: len(events) == 10 and len(sockets) >= opened + 2)
        assert len(turns) < 1000  # nobody turns in a circle
        assert os.path.sameopenfile(reused, file.fileno())
        os.close(reused)
    assert [event["n"] for event in events] == list(range(10))


def test_close_sends_what_is_buffered_whatever_a_callback_raises_and_leaves_nothing_behind():
    import multiprocessing.util  # noqa: F401 - to which a Dispatcher tells that it is to be closed at the exit

    before = set(threading.enumerate())
    with watching() as (_, events):
        dispatcher = Dispatcher(buffer_group={"task"})
        dispatcher.on_disabled.add(lambda: 1 / 0)
        dispatcher.send("task-progress")
        with pytest.raises(ZeroDivisionError):
            dispatcher.close()
        dispatcher.close()
        with pytest.raises(ValueError, match="closed"):
            dispatcher.send("x")
        wait_until(lambda: len(events) == 1)
    kept = weakref.ref(dispatcher)
    del dispatcher
    wait_until(lambda: not set(threading.enumerate()) - before and (not kept() or gc.collect() and not kept()))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_a_close_waits_for_a_listener_of_this_machine_that_has_not_read_what_has_come(url, virtual):
    def read():
        if virtual.napped > 0.1:  # with nobody there it takes half of that
            deque(receiver.itercapture(timeout=0))

    with Receiver(url) as receiver:
        receiver.fileno()
        dispatcher = Dispatcher(max_wait=0)
        flood(dispatcher, 200)
        assert eventmon.unread_at(eventmon.parse_url(url)) > 0
        virtual.during_nap = read
        dispatcher.close()
        assert eventmon.unread_at(eventmon.parse_url(url)) == 0


# --- Task, LogHandler ---


def told(work, **options):
    """The events that work(dispatcher) sends, up to one of type "end"."""
    with watching() as (_, events), Dispatcher(**options) as dispatcher:
        work(dispatcher)
        with suppress(ValueError):  # it is closed
            dispatcher.send("end")
        wait_until(lambda: "end" in [event.type for event in events])
        return events[: [event.type for event in events].index("end")]


def results(events):
    """Those of the events that tell how a task goes on or ended."""
    return [event for event in events if event.subject not in ("received", "started")]


def test_a_task_tells_how_it_goes_and_went_and_leaves_exceptions_as_they_are():
    like_numpy = type("Single", (), {"__float__": lambda self: 0.5})()
    fractions = {0: 0, like_numpy: 0.5, Decimal("0.1"): 0.1, Fraction(1, 4): 0.25, 10**400: 10**400, "half": "half"}
    odd = type("Odd", (Exception,), {"__getattribute__": lambda self, name: {}[name]})()  # no traceback can be made of it

    def work(dispatcher):
        with dispatcher.task("job", uuid="u", queue="q", retries=1) as task:
            for fraction in fractions:
                task.progress(fraction, step="half")
        with pytest.raises(KeyError), task:
            task.retried(OSError("busy"))
            raise KeyError("k")
        for problem in (ZeroDivisionError("no"), odd, SyntaxError("x", ("f", 1, 2, 3)), RuntimeError("mine" * 10**6)):
            with pytest.raises(type(problem)), task:
                raise problem
        with pytest.raises(RuntimeError, match="mine"), task:
            dispatcher.send("end")
            dispatcher.close()
            raise RuntimeError("mine")

    events = told(work)
    first = {"name": "job", "queue": "q", "retries": 1, "args": "()", "kwargs": "{}", "root_id": "u", "parent_id": None}
    assert first.items() <= events[0].items() and {event["uuid"] for event in events} == {"u"}
    progress, ends = results(events)[: len(fractions)], results(events)[len(fractions) :]
    assert [(event["progress"], event["step"]) for event in progress] == [(told, "half") for told in fractions.values()]
    assert [end.subject for end in ends] == ["succeeded", "retried", *["failed"] * 4]
    assert [end.get("exception") for end in ends[:3]] == [None, "OSError('busy')", "ZeroDivisionError('no')"]
    assert "raise problem" in ends[2]["traceback"] and min(end["runtime"] for end in ends) >= 0


def test_what_is_decorated_is_a_task_at_each_call_and_behaves_as_it_did():
    class Shop:
        def __repr__(self):
            return "Shop()"

        def sell(self, item, *, price: int = 5):
            """Sell it."""
            return price

        async def __call__(self, result):
            return await asyncio.sleep(0, result)

    def work(dispatcher):
        task = dispatcher.task("job")
        Shop.sell, Shop.first, Shop.second = map(task, (Shop.sell, classmethod(repr), staticmethod(repr)))
        assert (Shop().sell("tea", price=7), Shop.first(), Shop().second(1)) == (7, repr(Shop), "1")
        assert (Shop.sell.__doc__, str(inspect.signature(Shop.sell))) == ("Sell it.", "(self, item, *, price: int = 5)")
        for job in (Shop(), Shop().__call__, partial(asyncio.sleep, 0)):
            assert asyncio.run(task(job)("x")) == "x"
        for wrong in (lambda: dispatcher.task(repr), lambda: task(42)):
            with pytest.raises(TypeError, match="expected a"):
                wrong()

    calls = [{**received, **succeeded} for received, _, succeeded in zip(*[iter(told(work))] * 3)]
    assert [(call["args"], call["kwargs"], call["result"]) for call in calls] == [
        *(("(Shop(), 'tea')", "{'price': 7}", "7"), (f"({Shop!r},)", "{}", repr(repr(Shop)))),
        *(("(1,)", "{}", "'1'"), *[("('x',)", "{}", "'x'")] * 3),
    ]


def test_a_generator_is_a_task_from_its_first_value_to_its_last_and_behaves_as_it_did():
    def numbers():
        with suppress(KeyError):
            yield (yield 1)
        return "done"

    async def later():
        yield (yield 1)

    async def use(make):
        whole, thrown, closed, use.left_open = make(), make(), make(), make()
        assert [await each.__anext__() for each in (whole, thrown, closed, use.left_open)] == [1] * 4
        assert [await whole.asend("x"), [item async for item in whole], await closed.aclose()] == ["x", [], None]
        with pytest.raises(KeyError):
            await thrown.athrow(KeyError("k"))

    def work(dispatcher):
        make, make_later = dispatcher.task("job")(numbers), dispatcher.task("job")(later)
        assert (inspect.isgeneratorfunction(make), inspect.isasyncgenfunction(make_later)) == (True, True)
        whole, thrown, failed, closed, unused = (make() for _ in range(5))
        assert [next(each) for each in (whole, thrown, failed, closed)] == [1] * 4
        assert [whole.send("x"), next(whole, "end"), closed.close(), unused.close()] == ["x", "end", None, None]
        for generator, problem in ((thrown, KeyError("k")), (failed, OSError("oops"))):
            with pytest.raises((StopIteration, OSError)):
                generator.throw(problem)
        asyncio.run(use(make_later))

    assert [(event.subject, event.get("result")) for event in results(told(work))] == [
        *(("succeeded", "'done'"), ("succeeded", None), ("succeeded", "'done'"), ("failed", None)),
        *(("succeeded", None), ("succeeded", None), ("failed", None), ("succeeded", None)),
    ]


FAMILY = """a None a; generator a a; in generator a a; beside generator a a; inner a a; second a a;
given elsewhere far; in given given far; one None one; two one one; last None last"""


def test_a_task_belongs_to_the_one_that_runs_where_it_begins_but_a_generator_is_nobodys_parent(logger):
    def work(dispatcher):
        logger.addHandler(eventmon.LogHandler(dispatcher))
        task = partial(dispatcher.task, "job")

        def leaf(uuid):
            logger.warning(uuid)
            with task(uuid):
                pass

        @task("generator")
        def generate():
            leaf("in generator")
            yield

        with task("a"):
            for _ in generate():
                leaf("beside generator")
            with task("inner"):
                context = contextvars.copy_context()  # as an asyncio task has that is created here
            context.run(leaf, "second")
        with task("given", parent_id="elsewhere", root_id="far"):
            leaf("in given")
        one, two = task("one"), task("two")
        for each in (one, two):
            each.__enter__()
        for each in (one, two):
            each.__exit__(None, None, None)  # not in the order of a stack
        leaf("last")

    events = told(work)
    parents = {event["uuid"]: event["parent_id"] for event in events if "parent_id" in event}
    family = {f"{event['uuid']} {event['parent_id']} {event['root_id']}" for event in events if "root_id" in event}
    assert {*re.split(r";\s", FAMILY)} == family
    assert all(event.get("uuid") == parents[event["message"]] for event in events if event.group == "log")


def test_a_repr_is_shortened_visibly_and_no_more_of_it_is_spelled():
    for value, limit, text in [
        *((("x" * 999,), 10, "('xxxxxxx…"), (b"x" * 999, 10, "b'xxxxxxx…"), ({"x" * 999: 1}, 10, "{'xxxxxxx…")),
        *(({"a": [(1,), {2}, set()]}, 100, "{'a': [(1,), {2}, set()]}"), ([{1: "x"}] * 1000, 12, "[{1: 'x'}, …")),
    ]:
        assert (eventmon.shortened(value, limit), eventmon.shortened(value, 10**6)) == (text, repr(value))
    spelled = count()
    costly = type("Costly", (), {"__repr__": lambda self: f"costly {next(spelled)}"})()
    assert eventmon.shortened([[costly] * 10**6], 20) == "[[costly 0, costly …" and next(spelled) <= 20


def test_a_traceback_has_the_frames_of_the_user_and_none_of_ours():
    def work(dispatcher):
        task = dispatcher.task("job")

        @task
        def divide():
            try:
                return 1 / 0
            except ZeroDivisionError as problem:
                raise KeyError("k") from problem

        @task
        def generate():
            yield divide()

        @task
        async def later():
            return list(generate())

        with suppress(KeyError), dispatcher.task("job"):
            asyncio.run(later())

    texts = [event["traceback"] for event in results(told(work))]
    frames = [re.findall(r"test_eventmon.py\", line \d+, in (\w+)", text) for text in texts]
    outer = ["work", "later", "generate", "divide"]
    assert frames == [["divide", *outer[n:]] for n in (3, 2, 1, 0)]  # the cause, and then the exception
    assert not [text for text in texts if f'"{MODULE}"' in text]
    assert {text.splitlines()[-1] for text in texts} == {"KeyError: 'k'"}


def test_an_exception_that_passes_through_many_tasks_costs_little_and_stays_as_it_was():
    calls = []

    def work(dispatcher):
        @dispatcher.task("deep")
        def deeper(left):
            if not left:
                raise ValueError("x")
            with dispatcher.task("inner"):
                deeper(left - 1)

        with pytest.raises(RecursionError):
            deeper(10**6)
        for depth in (60, 120):
            counter = count()
            sys.setprofile(lambda *_: next(counter))  # noqa: B023
            with pytest.raises(ValueError, match="x") as info:
                deeper(depth)
            sys.setprofile(None)
            calls.append(next(counter))
            assert vars(info.value) == {}

    events = told(work, max_wait=2)
    begun, ended = ([event["uuid"] for event in events if event.subject == end] for end in ("started", "failed"))
    assert sorted(begun) == sorted(ended) and len(begun) > 500
    assert max(len(event.get("traceback", "")) for event in events) < 100_000
    assert calls[1] < 2.5 * calls[0]  # for twice as many: no more for each of them


def test_a_dispatcher_and_what_holds_one_can_be_pickled_and_copied(url):
    with Dispatcher(hostname="one", groups=["task"], enabled=False, max_repr=5) as one:
        handler = pickle.loads(pickle.dumps(eventmon.LogHandler(one)))
        for two in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one), handler.dispatcher):
            assert (two is one, two.hostname, two.url, two.enabled, two.max_repr) == (False, "one", url, False, 5)
            two.enable()
            assert (two.send("hello"), two.send("task-x").type) == (None, "task-x")
            two.close()
        assert copy.deepcopy(one.task("x", "u")).uuid == "u"  # which is in the closure of a decorated function
    assert pickle.loads(pickle.dumps(eventmon.LogHandler)) is eventmon.LogHandler


@pytest.fixture
def logger():
    """A logger of its own, of which the test runner's handlers get nothing."""
    return logging.Logger("shop")  # noqa: LOG001 - which getLogger() would share


def test_a_log_record_becomes_an_event_and_a_handler_never_raises_never_loops_and_holds_no_lock(logger, capsys):
    broken = type("Broken", (), {"__str__": lambda self: 1 / 0})()
    loud = type("Loud", (), {"__str__": lambda self: logger.warning("%s", self) or "loud"})()
    other = threading.Thread(target=logger.warning, args=("other",), daemon=True)
    waiting = type("Waiting", (), {"__str__": lambda self: other.start() or other.join(20) or str(other.is_alive())})()

    def work(dispatcher):
        logger.addHandler(eventmon.LogHandler(dispatcher))
        logger.warning("%d left", 3)
        logger.error("lost it", exc_info=KeyError("gone"))
        logger.warning("%s", broken)
        assert "ZeroDivisionError" in capsys.readouterr().err
        with pytest.MonkeyPatch.context() as patch:  # the report of a problem goes there, and so is logged
            patch.setattr(sys, "stderr", SimpleNamespace(write=logger.error, flush=lambda: None))
            logger.warning("%s", broken)
        logger.warning("%s", loud)
        logger.warning("%s", waiting)

    first, second, *others = told(work)
    assert {"type": "log-warning", "logger": "shop", "message": "3 left"}.items() <= first.items()
    assert abs(first.timestamp - time.time()) < 60
    assert (second.type, second["exception"]) == ("log-error", "KeyError('gone')")
    assert second["traceback"].endswith("KeyError: 'gone'\n")
    assert [event["message"] for event in others] == ["loud", "other", "False"]
    logger.warning("nobody hears this: the dispatcher is closed")
    assert capsys.readouterr().err == ""


# --- Receiver ---


def test_handlers_get_their_types_and_the_star_gets_the_rest_also_after_an_exception():
    got = []
    handlers = {"a": got.append, "b": lambda event: 1 / 0, "*": got.append}
    with Receiver(handlers=handlers) as receiver, Dispatcher(buffer_group=set("abcd")) as dispatcher:
        receiver.fileno()
        for type in "abcd":
            dispatcher.send(type)
        dispatcher.flush(0)
        with pytest.raises(ZeroDivisionError):
            receiver.capture(limit=4, timeout=20)
        handlers.clear()  # it has its own
        receiver.capture(limit=2, timeout=20)
    assert [event.type for event in got] == ["a", "c", "d"]


def test_a_capture_ends_after_its_limit_or_timeout_or_when_told_and_has_no_history_if_so_wanted():
    with Receiver() as receiver, Receiver() as late, Dispatcher() as dispatcher:
        receiver.fileno()
        for n in range(40):
            dispatcher.send("step", n=n)
        for n in range(0, 30, 2):
            assert [event["n"] for event in receiver.itercapture(limit=2, timeout=20)] == [n, n + 1]
        assert list(receiver.itercapture(limit=0)) == []
        assert [event["n"] for event in receiver.itercapture(timeout=0.1)] == list(range(30, 40))
        late.fileno()
        dispatcher.send("step", n=40)
        assert [event["n"] for event in late.itercapture(timeout=0.2, wakeup=False)] == [40]


def test_should_stop_or_a_close_from_another_thread_ends_a_capture_which_opens_nothing_again(sockets):
    for end in (lambda receiver: setattr(receiver, "should_stop", True), Receiver.close):
        with Dispatcher() as dispatcher, Receiver() as receiver:
            thread = threading.Thread(target=receiver.capture)
            thread.start()
            wait_until(lambda: dispatcher.flush(0.02))  # it captures
            end(receiver)
            thread.join(20)
            assert not thread.is_alive()
        assert all(sock.fileno() == -1 for sock in sockets)
    with Dispatcher() as dispatcher, receiver:
        dispatcher.send("hello")
        assert [event.type for event in receiver.itercapture(limit=1, timeout=20)] == ["hello"]  # a new capture


def data_frame(seq, body=b'{"type":"x"}', stream=STREAM):
    return eventmon.format_frame(b"data", stream, (seq,), body)


def part_frame(seq, event, index, body, total=3, stream=STREAM):
    body = body if index + 1 == total else body.ljust(1024)
    return eventmon.format_frame(b"part", stream, (seq, event, index, total), body)


def test_datagrams_in_any_order_are_delivered_once_in_order_and_what_never_comes_is_counted(virtual):
    receiver, frames = Receiver(), [data_frame(n, b'{"type":"step-%d"}' % n) for n in range(1, 31)]
    datagrams = random.sample(frames * 2, 60)
    assert delivered(receiver, *datagrams) == [f"step-{n}" for n in range(1, 31)]
    assert receiver.stats["duplicates"] == 30
    assert delivered(receiver, data_frame(31), data_frame(33)) == ["x"]
    virtual.monotonic += 1  # without a channel a gap is given up at a call a second later
    assert delivered(receiver, data_frame(34), b"EM2 beat %b 100 1\n" % STREAM) == ["x", "x"]
    virtual.monotonic += 1  # the sender is dead
    assert delivered(receiver, b'{"type":"last"}') == ["last"]
    assert receiver.stats["lost"] == 1 + 66


def test_parts_of_two_events_are_never_joined(virtual):
    receiver, first = Receiver(), [part_frame(1, 1, 0, b'{"type":'), part_frame(2, 1, 1, b'"a","x":"')]
    assert delivered(receiver, *first, part_frame(6, 2, 2, b'b"}'), part_frame(7, 3, 0, b'{"type"')) == []
    virtual.monotonic += 1
    assert delivered(receiver, part_frame(8, 3, 1, b':"whole"'), part_frame(9, 3, 2, b"}")) == ["whole"]
    assert receiver.stats["lost"] == 3  # what never came
    assert delivered(receiver, part_frame(10, 1, 1, b'"}'), data_frame(11, b'{"type":"next"}')) == ["next"]
    assert receiver.stats["lost"] == 3 + 2  # what came of an event of which the rest did not


def test_what_a_receiver_keeps_is_bounded(virtual):
    receiver, junk, large = Receiver(), b"{" * 60000, b'{"type":"large","x":"%b"}' % (b"x" * 16_000_000)
    pieces = [large[start : start + 60000] for start in range(0, len(large), 60000)]
    tracemalloc.start()
    try:
        for n in range(500):
            receiver.handle_message(data_frame(2 + n // 40, junk, b"%016x" % (n % 40)), SOURCE)
            receiver.handle_message(part_frame(1, 1, 0, junk, 300, b"%016x" % (100 + n)), SOURCE)
        got = [part_frame(1 + n, 1, n, piece, len(pieces)) for n, piece in enumerate(pieces)]
        del large, pieces
        assert delivered(receiver, *got) == ["large"]
        assert tracemalloc.get_traced_memory()[1] < (64 << 20) + sum(map(len, got))
    finally:
        tracemalloc.stop()


def test_bare_json_is_delivered_as_it_comes_any_other_bytes_are_counted_and_no_socket_is_opened(sockets):
    receiver, chance = Receiver(), random.Random(1)
    assert receiver.handle_message(b' {"type":"hi","timestamp":5} ', SOURCE)[0].pop("local_received") <= time.time()
    assert (delivered(receiver, b'[{"type":"a"},{"type":"b"}]'), receiver.stats["events"]) == (["a", "b"], 3)
    no_parts = ((1, 1, 0, 10**9), b"x" * 2000), ((2, 1, 0, 0), b"x" * 2000), ((3, 1, 3, 3), b"x"), ((4, 1, 0, 3), b"x")
    assert delivered(receiver, *[eventmon.format_frame(b"part", STREAM, *part) for part in no_parts]) == []
    assert receiver.stats["malformed"] == 4
    frames = [*map(data_frame, (1, 2, 3)), *(data for _, data in FRAMES), b'{"type":"x","a":[1,2]}']
    for _ in range(5_000):
        data = bytearray(chance.choice(frames))
        for _ in range(chance.randrange(1, 4)):
            where = chance.randrange(len(data))
            data[where : where + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
            data = data or bytearray(b"x")
        receiver.handle_message(bytes(data), ("127.0.0.1", chance.randrange(5)))
    assert receiver.stats["malformed"] > 500
    assert "still here" in delivered(receiver, data_frame(1, b'{"type":"still here"}', b"fedcba9876543210"))
    assert sockets == []


def test_however_many_forged_streams_come_few_are_followed_and_nothing_is_delivered_twice(monkeypatch, virtual):
    monkeypatch.setattr(Receiver, "MAX_STREAMS", 50)
    receiver, frames, got = Receiver(), [data_frame(n, b'{"type":"step-%d"}' % n) for n in range(1, 41)], []
    for n, data in enumerate(frames):
        virtual.monotonic += 0.1
        beat = b"EM2 beat %b %d 1\n" % (STREAM, n + 1)
        forged = (data_frame(seq, stream=b"%016x" % name) for name in range(n * 100, n * 100 + 80) for seq in (1, 2))
        got += delivered(receiver, data, beat, *forged, beat, *frames[max(0, n - 3) : n])
    assert [type for type in got if type != "x"] == [f"step-{n}" for n in range(1, 41)]
    assert receiver.stats["streams"] == 50


def test_who_takes_its_time_for_each_event_goes_on_answering(virtual):
    with Receiver() as receiver, Ear() as ear:
        receiver.fileno()
        positions, rest = set(), receiver.itercapture(timeout=1)
        for seq in range(1, 451):
            ear.tell(receiver, data_frame(seq))
            if seq > 50:  # so many wait for it all the time
                next(rest)
                virtual.monotonic += 0.003
            while select.select([ear], [], [], 0)[0]:
                positions.add(eventmon.parse_frame(ear.recv(65536)).numbers[0])
    assert len(positions) > 100


def test_however_many_beats_wait_for_a_watcher_alone_what_they_announce_counts(virtual):
    def lost():
        virtual.monotonic += 0.05
        return receiver.stats["lost"]

    with watching() as (receiver, _), Ear() as ear:
        ear.tell(receiver, b"EM2 beat %b 0 1\n" % STREAM)
        ear.hear(b"ack")
        for lead in (*[0] * 40, 6):
            ear.sendto(b"EM2 beat %b %d 1\n" % (STREAM, lead), ear.sender)
        ear.tell(receiver, b"EM2 beat %b 0 1\n" % STREAM)
        assert wait_until(lost) == 6


@posix
def test_many_senders_that_start_and_end_together_lose_nothing():
    code = "import os\nfrom eventmon import Dispatcher\nname = next((n for n in range(7) if not os.fork()), 7)\n"
    code += "with Dispatcher(hostname=str(name)) as d: [d.send('step', n=n) for n in range(300)]"
    with watching() as (receiver, events):
        python(code)
        wait_until(lambda: len(events) == 8 * 300)
        assert receiver.stats["lost"] == 0
    for name in map(str, range(8)):
        assert [event["n"] for event in events if event["hostname"] == name] == list(range(300))


BORN, ENDS, LATER = b"EM2 beat %b 1 1\n4711 w1" % STREAM, b"EM2 bye %b 1 1\n4711 w1" % STREAM, b'{"type":"later"}'
WORKS = data_frame(1, b'{"type":"task-started","pid":4711,"hostname":"w1"}')
FORKED = [frame.replace(b"4711", b"4712").replace(STREAM, STREAM[::-1]) for frame in (BORN, WORKS)]


@pytest.mark.parametrize(
    "steps, told",
    [
        ([BORN, WORKS, ENDS, ENDS], ["offline 4711"]),
        ([BORN, WORKS, ENDS.replace(b" 1 1", b" 2 1"), data_frame(2), ENDS], ["offline 4711"]),  # after its last event
        ([BORN, WORKS, ENDS, 9, LATER, 9, LATER], ["offline 4711"]),
        ([BORN, data_frame(1, b'{"type":"worker-offline","pid":4711,"hostname":"w1"}'), ENDS, 9, LATER], []),
        ([BORN, WORKS, 2.9, LATER], []),
        ([BORN, WORKS, 3.1, LATER, 9, LATER], ["lost 4711"]),
        ([BORN, WORKS, 3.1, LATER, 1, BORN, 1, LATER, 1, ENDS], ["lost 4711", "online 4711", "offline 4711"]),
        ([BORN, data_frame(1), 9, LATER, 1, ENDS], []),  # an event of another kind
        ([BORN, WORKS.replace(b"4711", b"4712"), 9, LATER, 1, ENDS], []),  # it forwards what others have sent
        ([BORN, WORKS, *FORKED, ENDS, 3.1, LATER], ["offline 4711", "lost 4712"]),
        ([WORKS[WORKS.index(b"{") :], 9, LATER], []),  # it has no stream
    ],
)
def test_a_process_that_ends_says_so_once_and_one_that_falls_silent_is_lost(steps, told, virtual):
    receiver, events = Receiver(), []
    for step in steps:
        if type(step) is bytes:
            events += receiver.handle_message(step, SOURCE)
        else:
            virtual.monotonic += step
    local = [event for event in events if "local" in event]
    assert [f"{event.subject} {event['pid']}" for event in local] == told
    assert all((event["local"], event["hostname"], event.group) == (True, "w1", "worker") for event in local)
    assert all({"timestamp", "local_received"} <= event.keys() for event in events)
    assert not told or [event for event in events if event.type != "later"][-1] is local[-1]


def test_with_a_key_events_arrive_and_nothing_else_does_also_when_the_clocks_are_set_back_or_forward(virtual):
    with watching(key="secret") as (receiver, events), Dispatcher(key=b"secret") as dispatcher:
        for number, virtual.offset in enumerate((0, -300, 300), 1):
            others = {"step": Dispatcher(key="secret"), "open": Dispatcher(), "wrong": Dispatcher(key="wrong")}
            for type, other in (("step", dispatcher), *others.items()):
                other.send(type)
            wait_until(lambda: len(events) == 2 * number and receiver.stats["rejected"] >= 2 * number)  # noqa: B023
            assert others["open"].flush(0) == others["wrong"].flush(0) == 0
        assert receiver.handle_message(b'{"type":"bare"}', SOURCE) == []
    assert [event.type for event in events] == ["step"] * 6
    assert "secret" not in repr(receiver) + repr(dispatcher) + dispatcher.url
    receiver = Receiver()
    assert delivered(receiver, eventmon.seal(data_frame(1), b"secret")) == [] and receiver.stats["rejected"] == 1


def test_a_sealed_datagram_seen_before_draws_no_answer_and_one_by_another_clock_is_rejected(virtual):
    key, frame, beat = b"secret", data_frame(1), b"EM2 beat %b 1 1\n" % STREAM
    data, sealed, other = (eventmon.seal(each, key) for each in (frame, beat, frame.replace(STREAM, STREAM[::-1])))
    virtual.offset = 60
    ahead = eventmon.seal(beat, key)
    virtual.offset = 0
    with Receiver(key=key) as receiver, Ear() as sender, Ear() as thief:
        receiver.fileno()
        assert delivered(receiver, data, sealed, data, data, sealed) == ["x"]
        assert receiver.stats["duplicates"] == 3
        for ear in (sender, thief):
            receiver.handle_message(other, ear.getsockname())
        list(receiver.itercapture(timeout=0))
        assert sender.hear(b"ack", key=key)
        assert not select.select([thief], [], [], 0)[0]
        assert receiver.handle_message(ahead, sender.getsockname()) == []
        assert re.search("clock (60|59) s ahead", str(receiver.problem))
        assert sender.hear(b"leave", key=key)  # by which it learns the time here
    virtual.offset = 32
    assert delivered(Receiver(key=key), data) == []


def test_an_answer_without_the_key_seen_before_or_by_another_clock_does_nothing(virtual):
    key = b"secret"
    with Ear() as ear, Dispatcher(ear.url, key=key) as dispatcher:
        dispatcher.send("a")
        ear.hear(key=key)
        nak = eventmon.format_frame(b"nak", ear.stream, (0, 7, 4096, 0, 1), b"1")
        sealed = eventmon.seal(nak, key)
        virtual.offset = 60
        late = eventmon.seal(nak, key)
        virtual.offset = 0
        for answer in (sealed, nak, sealed, eventmon.seal(nak, b"wrong"), b"x", sealed + b"1", late):
            ear.sendto(answer, ear.sender)
        dispatcher.flush(0)
        assert (dispatcher.stats["rejected"], dispatcher.stats["repairs"], dispatcher.stats["watchers"]) == (6, 1, 1)
        assert re.search("clock (60|59) s ahead", str(dispatcher.problem))


COMES_BACK = """
import os, threading, time
from eventmon import Dispatcher, Receiver
def ip(*commands): return sum(os.system("ip " + command) for command in commands)
def up(name, address): return ip(f"link add {name} type bridge", f"address add {address}/24 dev {name}", f"link set {name} up")
def pair(interface, port):
    url, numbers = f"udp://239.255.1.2:{port}?interface={interface}&ttl=1", []
    receiver = Receiver(url, {"step": lambda event: numbers.append(event["n"])})
    receiver.fileno()
    threading.Thread(target=receiver.capture, daemon=True).start()
    return Dispatcher(url), numbers
def send(n):
    end = time.monotonic() + 15
    for dispatcher, _ in pairs: dispatcher.send("step", n=n)
    while n != 1 and any(numbers[-1:] != [n] for _, numbers in pairs) and time.monotonic() < end: time.sleep(0.01)
if up("hub0", "10.9.0.1") or up("hub1", "10.9.1.1"): raise SystemExit("no interface can be made here")
pairs = pair("10.9.0.1", 7000), pair("hub0", 7001), pair("hub1", 7002)
send(0)
ip("link delete hub0", "address add 10.9.7.7/24 dev hub1", "address delete 10.9.1.1/24 dev hub1")
send(1)
up("hub0", "10.9.0.1")
send(2)
print(*[numbers for _, numbers in pairs])
"""
NETWORKS = {  # what a shell script does in a network of its own
    "comes back": f"ip link set lo up; PYTHONPATH={shlex.quote(FOLDER)} {shlex.join([sys.executable, '-c', COMES_BACK])} 2>&1",
    "check": f"""
    {PROGRAM} check; echo $?; {PROGRAM} run -- sh -c 'echo ran; exit 9'; echo $?; echo
    ip link set lo up; ip link add one type veth peer name two; ip addr add 10.77.0.1/24 dev one
    ip link set one up; ip link set two up
    {PROGRAM} check > first & {PROGRAM} check --all-interfaces > second &
    {PROGRAM} check --url 'udp://239.1.2.3:7000?interface=one&ttl=1' > third; wait; cat first; echo; cat second; echo; cat third
    """,
}


@cache
def networks():
    """What NETWORKS print, which run at the same time, each in a namespace whose loopback interface is down at first."""
    able = shutil.which("ip") and shutil.which("unshare") and together([["unshare", "-rn", "true"]])[0][0] == 0
    if not able:
        pytest.skip("no network namespace can be made here")
    results = together([["unshare", "-rn", "sh", "-c", script] for script in NETWORKS.values()], cwd=tempfile.mkdtemp(dir=FOLDER))
    assert "Traceback" not in str(results)
    return {name: out.decode() for name, (_, out, _) in zip(NETWORKS, results)}


def test_an_interface_that_goes_and_comes_again_or_gets_another_address_is_used_again():
    out = networks()["comes back"]
    if "no interface can be made here" in out:
        pytest.skip(out)
    assert out == "[0, 1, 2] [0, 1, 2] [0, 1, 2]\n"


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
    ("RECEIVED", [task_event("received"), task_event("sent", "c", clock=9)]),
    ("SUCCESS", [task_event("succeeded"), task_event("started")]),
    ("SUCCESS", [task_event("failed"), task_event("succeeded")]),
    ("FAILURE", [task_event("revoked"), task_event("failed"), task_event("rejected")]),
    ("PROGRESS", [task_event("started"), task_event("progress", progress=0.5)]),
    ("STARTED", [task_event("progress"), task_event("started")]),
    ("RECEIVED", [task_event("succeeded"), task_event("received")]),  # again, by the same process
    ("SUCCESS", [task_event("succeeded", timestamp=2.0), task_event("received", "w2", timestamp=1.0)]),
    ("RECEIVED", [task_event("succeeded", retries=0), task_event("received", "w2", retries=1, timestamp=0.0)]),
    ("RETRY", [task_event("started"), task_event("retried")]),
    ("REJECTED", [task_event("received"), task_event("rejected")]),
]


def test_a_task_is_in_the_state_that_its_events_say():
    for state, events in LIVES:
        assert state_of(*events).tasks["t"]["state"] == state, events


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
    "a later event overwrites fields, but never with null, nor undoes the end": (
        [stream("w", ("received", {"args": "(1,)"}), ("succeeded", {"result": "2"}), ("started", {"args": "late", "result": None}))],
        {"args": "late", "result": "2", "state": "SUCCESS"},
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


def test_events_are_counted_and_kept_and_notes_apart_after_the_callback_and_before_the_method_for_the_type():
    calls = []

    class Mine(State):
        def task_started(self, event):
            calls.append(("method", event["uuid"], self.event_count))
            super().task_started(event)

    state = Mine(lambda state, event: calls.append(("callback", len(state.tasks))))
    state.event(task_event("started"))
    assert calls == [("callback", 0), ("method", "t", 1)] and state.tasks["t"]["state"] == "STARTED"
    types = ["task-received", "task-progress", "worker-heartbeat", "hello", "log-info", "worker-online", None]
    state = state_of(*({"type": type, "uuid": "u", "hostname": "h"} for type in types))
    assert (state.event_count, state.task_count, len(state.recent)) == (7, 1, 7)
    assert [event["type"] for event in state.notes] == ["hello", "log-info", "worker-online", None]


def many_tasks():
    state = State()
    for n in range(10):
        for subject in ("received", "started", "succeeded")[: 1 + n % 3]:
            state.event(task_event(subject, f"w{n % 2}", str(n), name=f"job{n % 2}", timestamp=float(n)))
    return state


def test_tasks_are_listed_newest_first_or_oldest_by_name_and_by_worker_and_active_ones_oldest_start_first():
    state = many_tasks()

    def uuids(tasks):
        return "".join(uuid for uuid, _ in tasks)

    assert (uuids(state.tasks_by_time()), uuids(state.tasks_by_time(3))) == ("9876543210", "987")
    assert uuids(state.tasks_by_time(2, reverse=False)) == "01"
    assert uuids(state.tasks_by_type("job1", 2)) == "97"
    assert uuids(state.tasks_by_worker("w0", 2, reverse=False)) == "02"
    assert (state.task_types(), len(list(state.itertasks())), len(list(state.itertasks(3)))) == (["job0", "job1"], 10, 3)
    assert uuids(state.iteractive()) == "0134679"
    state.event(task_event("started", "w0", "0", timestamp=50.0))
    assert uuids(state.tasks_by_time(1)) == "0"
    state.event(task_event("sent", uuid="s"))
    state.event(task_event("started", uuid="z", timestamp=-5.0))
    assert uuids(state.iteractive()) == "z1346790"
    state.get_task_info("1")["children"].append("X")
    assert (state.tasks["1"]["children"], state.get_task_info("nope")) == ([], None)


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


def test_a_lost_task_has_run_until_its_own_process_ended_or_fell_silent():
    begun = [task_event("started", uuid=str(pid), pid=pid, name=f"of {pid}", timestamp=100.0) for pid in (1, 2)]
    lost = Event("worker-lost", hostname="w1", pid=1, local=True, timestamp=113.0, local_received=113.0)
    later = task_event("progress", uuid="2", pid=2, timestamp=500.0, local_received=500.0)
    ended = Event("worker-offline", hostname="w1", pid=1, local=True, timestamp=110.0, local_received=110.0)
    for gone in (lost, ended):
        stats = state_of(*begun, gone, later).type_stats(now=500.0)
        assert [(stats[name]["running"], stats[name]["max"]) for name in ("of 1", "of 2")] == [(0, 10.0), (1, 400.0)]


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
    state, sizes = State(max_tasks_in_memory=50, max_workers_in_memory=20), []
    for n in range(900):
        for subject in ("sent", "received", f"custom{n}", "failed", "received", "succeeded"):
            state.event(task_event(subject, f"w{n}", f"u{n}", parent_id=f"p{n}", name=f"name{n}", timestamp=n * 1e3))
        state.event(task_event("received", "w", "u", pid=n, **{f"field{n}": n}))
        state.event(Event("worker-heartbeat", hostname=f"w{n}", **{f"field{n}": n}))
        state.event(Event("worker-lost", hostname="w", pid=n, **{f"field{n}": n}))
        state.event(Event(f"type{n}" * 20, hostname=f"h{n}"))
        sizes += [len(pickle.dumps(state))] if n in (600, 899) else []
    assert (len(state.tasks), len(state.workers), len(state.recent)) == (50, 20, 1000)
    assert sizes[1] < sizes[0] + 500_000
    state.event(Event("task-sent", {f"field{n}": n for n in range(3000)}, uuid="a"))
    assert len(pickle.dumps(state)) < sizes[1] + 20_000


def test_the_oldest_large_values_are_forgotten_before_they_take_too_much_memory():
    state = State()
    for n in range(40):
        large = [str(n)] if n % 4 > 1 else f"{n}" * (4 << 20)
        for type in ("task-received", "worker-online", "note", f"{n}" * 500_000):
            state.event(Event(type, uuid=f"u{n}", hostname=f"h{n}", pid=1, large=large))
    kept = [task["large"] for task in state.tasks.values() if len(task["large"]) > 100]
    assert len(state.tasks) == len(state.workers) == 40 and state.evicted > 0
    assert 0 < sum(map(len, kept)) < len(pickle.dumps(state)) < 256 << 20
    assert len(state.tasks["u37"]["large"]) > 100 > len(state.tasks["u0"]["large"])
    assert state.tasks["u38"]["large"] == ["38"]


def test_long_keys_and_the_short_texts_of_many_deliveries_and_processes_take_no_more_than_they_may(monkeypatch):
    monkeypatch.setattr(eventmon, "MAX_STATE", 1 << 20)
    state = State()
    for n in range(3000):
        texts = {name: f"{n}{name}" + "日" * 20 for name in ("name", "args", "kwargs", "queue", "exchange", "routing_key")}
        state.event(task_event("received", f"w{n % 30}", f"u{n // 30}", retries=n % 30, **texts))
        state.event(Event("worker-heartbeat", hostname=f"h{n // 30}", pid=n % 30, **texts))
    assert len(pickle.dumps(state)) < 3 << 19
    for n in range(30):
        state.event(Event("note", {f"{n}" * 100_000: n}))
    assert len(pickle.dumps(state)) < 3 << 19


def test_what_is_no_longer_kept_pushes_out_no_task(monkeypatch):
    monkeypatch.setattr(eventmon, "MAX_STATE", 3 << 20)
    state = state_of(*(task_event("started", uuid=str(n)) for n in range(200)))
    for n in range(5_000):
        state.event({"type": "order-new", "hostname": "w1", "timestamp": 2.0, "customer": "x", "numbers": [n]})
    assert (len(state.tasks), state.evicted) == (200, 0)


@pytest.mark.parametrize("call", [lambda state: state.tasks, lambda state: state.clear(ready=False)], ids=["read", "clear"])
def test_a_callback_may_read_and_clear_at_any_moment(call):
    state = State(on_node_join=lambda worker: call(state))
    for subject, host in [("sent", "c"), ("received", "a"), ("received", "b"), ("", "b"), ("started", "d")]:
        state.event(task_event(subject, host))
        assert {state.tasks["t"]["state"]} == {state.attempts("t")[-1]["state"]} if subject != "sent" else True
    assert [uuid for uuid, _ in state.iteractive()] == ["t"]
    state.clear(ready=False)
    assert state.tasks == {}


HOSTILE = "\x1b[2J\x07\x9b31m\u202eabc\r\n\t\x00\u2028\ud800\u2066\u200f\U000e0001"
JUNK = [None, True, -1, 7.5, math.nan, 10**30, 1e300, [], [1, ["\x1b"]], {}, {"a": None, "\x07": {}}, "", "x", "task-started"]
JUNK += [HOSTILE, "y" * 3000, "日本" * 50, "e\u0301" * 40, "t1", "t2", "t3"]
TYPES = ["task-sent", "task-received", "task-started", "task-succeeded", "task-failed", "task-retried", "task-progress", "task-"]
TYPES += ["worker-online", "worker-heartbeat", "worker-offline", "worker-lost", "hello", HOSTILE, None, 7.5]
NAMES = "uuid hostname timestamp clock local_received retries state name args kwargs runtime exception traceback pid parent_id"
NAMES += " root_id children started sent freq active loadavg progress result worker"


def junk():
    """A State after events of every type with values of every kind in every field."""
    chance, state = random.Random(1), State(max_tasks_in_memory=20, max_workers_in_memory=20)
    for _ in range(500):
        names = chance.sample([*NAMES.split(), HOSTILE], chance.randrange(20))
        state.event({"type": chance.choice(TYPES), **{name: chance.choice(JUNK) for name in names}})
        assert state.attempts("t1") is not None
    return state


def test_any_fields_of_any_type_do_no_harm():
    state = junk()
    state.event({"type": ["x"], "uuid": ["t"]})
    assert state.event_count == 501
    assert None not in (state.task_types(), state.type_stats(), state.alive_workers())
    assert all(state.is_lost(task) in (True, False) for _, task in state.iteractive())


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
    assert state.is_alive(state.workers["w"])
    assert not state.is_alive(state.workers["w"], state.now() + 5)


def test_workers_that_join_and_leave_are_told_and_the_last_event_of_each_is_known_until_it_is_cleared():
    calls = []
    state = State(
        on_node_join=lambda worker: calls.append(("join", worker["hostname"])),
        on_node_leave=lambda worker: calls.append(("leave", worker["hostname"])),
    )
    assert state.last_worker_event() is None
    for type in ("worker-online", "worker-heartbeat", "worker-offline", "worker-offline", "note", "worker-lost"):
        state.event(Event(type, hostname="w"))
    state.event(Event("worker-heartbeat", hostname="v"))
    assert calls == [("join", "w"), ("leave", "w"), ("join", "w"), ("leave", "w"), ("join", "v")]
    last = state.last_worker_event("w"), state.last_worker_event(), state.last_worker_event("x")
    assert [event and event.type for event in last] == ["worker-lost", "worker-heartbeat", None]
    state.clear()
    assert state.last_worker_event("w") is state.last_worker_event() is None


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
    assert (sorted(state.tasks), state.event_count, len(state.workers)) == (list("0134679"), 19, 2)
    state.clear()
    assert (sorted(state.tasks), state.event_count, state.task_count, state.workers) == (list("0134679"), 0, 0, {})
    state.clear(ready=False)
    assert (state.tasks, list(state.iteractive())) == ({}, [])


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
    again.event(task_event("succeeded", "w1", pid=1))
    assert (again.tasks["s"]["client"], again.tasks["t"]["succeeded"] > 5) == ("c", True)


# --- the screen ---

NOON = 43200.0  # the tests' screens are in UTC, of a day long ago
IMPORT, RESIZE, CHARGE, REPORT = "5d0c91aa-11", "81ffd017-22", "aca02be9-33", "0be1c7d2-44"
TRACEBACK = """\
Traceback (most recent call last):
  File "/usr/lib/python3.11/asyncio/runners.py", line 3, in run
    go()
  File "/home/me/shop.py", line 7, in charge
    pay(total)
ValueError: refused"""


@pytest.fixture(autouse=True)
def utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def heard(type, host, second, **fields):
    when = NOON + second
    return Event(type, hostname=host, timestamp=when, local_received=when, **fields)


def shop_events():
    """A bit of everything: ten seconds of a shop's work, until NOON + 10, beside a worker that has been killed."""
    alpha = partial(heard, host="alpha@laptop")
    software = {"freq": 20, "sw_ident": "eventmon", "loadavg": [0.5, 0.25, 0.12]}
    return [
        heard("worker-online", "beta@build-7", -9, pid=202, active=0, processed=9, **software),
        heard("worker-offline", "beta@build-7", -8, pid=202, active=0, processed=9, **software),
        heard("task-started", "gamma@laptop", -8, uuid="b", name="users", pid=3, args="(7,)"),
        heard("task-progress", "gamma@laptop", -2, uuid="b", progress=0.4, pid=3),
        heard("worker-lost", "gamma@laptop", 1, pid=3, local=True),
        alpha("worker-online", second=1, pid=101, active=1, processed=3, **software),
        heard("task-sent", "web@laptop", 1.5, uuid=IMPORT, name="shop.import", args="('2026-11.csv',)", kwargs="{}"),
        alpha("task-received", second=1.75, uuid=IMPORT, name="shop.import", args="('2026-11.csv',)", pid=101),
        alpha("task-started", second=2, uuid=IMPORT, pid=101),
        alpha("task-received", second=3, uuid=RESIZE, name="shop.resize", parent_id=IMPORT, pid=101),
        alpha("task-started", second=3, uuid=RESIZE, pid=101),
        alpha("task-succeeded", second=4, uuid=RESIZE, result="'photo.webp'", runtime=0.0021, pid=101),
        alpha("task-received", second=4, uuid=CHARGE, name="shop.charge", args="(7,)", parent_id=IMPORT, pid=101),
        alpha("task-started", second=4, uuid=CHARGE, pid=101),
        alpha("log-warning", second=4.5, uuid=CHARGE, logger="shop", message="the bank is slow", pid=101),
        alpha("task-failed", second=5, uuid=CHARGE, exception="ValueError('refused')", traceback=TRACEBACK, pid=101),
        alpha("task-received", second=6, uuid=REPORT, name="报表.生成", args="(1,)", pid=101),
        alpha("task-retried", second=7, uuid=REPORT, exception="Timeout('db')", retries=1, pid=101),
        heard("deploy-done", "web@laptop", 8, version="1.2", ok=True),
        alpha("task-progress", second=9, uuid=IMPORT, progress=0.4, pid=101),
    ]


def shop():
    return state_of(*shop_events())


def stage(state, height=24, width=80, second=10, **status):
    status = {"url": "udp://239.1.2.3:6986?ttl=0", "empty": "no events yet — try: send hello", **status}
    return eventmon.Stage(state, height, width, NOON + second, status)


def shown(state, view=None, *size, **options):
    """The screen as text, without the blanks at the ends of lines; of several empty lines one is left."""
    place = stage(state, *size, **options)
    lines = eventmon.screen(view or eventmon.View(), place)
    texts = ["".join(span.text for span in line) for line in lines]
    assert [eventmon.cells(text) for text in texts] == [place.width] * place.height
    assert all(text.isprintable() for text in texts)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(text.rstrip() for text in texts))


def typed(state, keys, *size, view=None, second=10):
    """The view after some keys; a str is so many keys as it has words, and of a word that is none so many characters."""
    view = view or eventmon.View()
    for word in keys if isinstance(keys, list) else keys.split():
        known = word in eventmon.KEYS or " " in word or re.fullmatch(r"\^.", word)
        for key in [word] if known else word:
            view = eventmon.press(view, {"tab": "^I", "esc": "^[", "enter": "^J"}.get(key, key), stage(state, *size, second=second))
    return view


def table(state, keys, *size, **options):
    """The rows of the table, as words."""
    return [line.split() for line in shown(state, typed(state, keys, *size), *size, **options).splitlines()[5:-1] if line]


SCREENS = {  # keys, width, and the screen, or its end
    ("2", 120): """\
 1 Tasks 5  2 Names 5  3 Workers 1/3  4 Events 20                                            1.0/s  udp://239.1.2.3:6986
 1 running, longest shop.import 8.0s on alpha@laptop                                               █  █      max 4/s
 1 failed in the last minute: shop.charge ValueError('refused')  ←  (7,)                        ▄  █▄██▄▄▄▄▄ last 12 s
 LOST 1  FAILURE 1  PROGRESS 1  RETRY 1  SUCCESS 1
NAME▾                    RUNNING   DONE    FAILED  RETRIED   MEAN    P95    MAX LAST     LAST ERROR
shop.charge                    0      0    1 100%        0   1.0s   1.0s   1.0s 12:00:05 ValueError('refused')
shop.import                    1      0         0        0   8.0s   8.0s   8.0s 12:00:09
shop.resize                    0      1         0        0    2ms    2ms    2ms 12:00:04
users                          0      0         0        0   6.0s   6.0s   6.0s 11:59:58
报表.生成                      0      0         0        1                      12:00:07

 1 of 5  q quit  ? keys  enter details  / filter  s sort  space freeze  c clear finished""",
    ("3", 80): """\
WORKER▾        STATUS       NOW                     ACTIVE   DONE  HEARD LOAD
alpha@laptop   alive        shop.import 8.0s             1      3   1.0s 0.5, …
beta@build-7   ended                                     0      9  18.0s 0.5, …
gamma@laptop   LOST         users 6.0s                             12.0s

 1 of 3  q quit  ? keys  enter details  / filter  s sort  space freeze  c clear…""",
    ("1 j j j i", 80): """\
 task aca02be9-33
state       FAILURE  1.0s
name        shop.charge
uuid        aca02be9-33
worker      alpha@laptop
exception   ValueError('refused')
args        (7,)
latest      1970-01-01 12:00:05.000
+0ms        RECEIVED      alpha@laptop  attempt 1
+0ms        STARTED       alpha@laptop  attempt 1
+500ms      log-warning   the bank is slow  logger=shop
+1.0s       FAILURE       alpha@laptop  attempt 1  ValueError('refused')
parent      PROGRESS shop.import            8.0s █████████████████████████
            SUCCESS    shop.resize           2ms    █
this task   FAILURE    shop.charge          1.0s        ████
pid         101
            Traceback (most recent call last):
              File "/usr/lib/python3.11/asyncio/runners.py", line 3, in run
                go()
              File "/home/me/shop.py", line 7, in charge
                pay(total)
            ValueError: refused
 1 of 21  esc back  ? keys  enter go there  / find  e events  t traceback""",
}


@pytest.mark.parametrize("keys, width", SCREENS)
def test_the_screen_shows_each_page_and_everything_about_a_task(keys, width):  # the first page is in the README
    assert shown(shop(), typed(shop(), keys, 24, width), 24, width).endswith(SCREENS[keys, width])


@pytest.mark.parametrize("make", [State, shop, junk])
def test_the_screen_is_exactly_as_large_as_the_terminal_and_harmless_whatever_is_open(make):
    state = make()
    for keys in ("1", "2", "3", "4", "1 i", "2 i", "3 i", "4 i", "1 i t", "1 t", "1 r", "?", "1 / w1", "1 s s i", "1 space", "1 G i"):
        for size in [(24, 80), (40, 200), (10, 40), (5, 20), (2, 3), (1, 1), (1, 300), (100, 1)]:
            shown(state, typed(state, keys, *size), *size, lost=3, url=HOSTILE, empty=HOSTILE)
    shown(state, typed(state, ["1", "/", *HOSTILE]))
    event = Event(HOSTILE, hostname=HOSTILE, **{HOSTILE: HOSTILE})
    assert eventmon.event_line(event, state).isprintable()
    assert eventmon.json_line(event).isprintable()


def test_lost_tasks_come_first_then_the_longest_running_whose_time_goes_on_then_the_newest_finished():
    state = shop()
    state.event(heard("task-started", "alpha@laptop", 1, uuid="long", name="long", pid=101))
    rows = table(state, "1", second=11)
    assert [row[1] for row in rows] == ["users", "long", "shop.import", "报表.生成", "shop.charge", "shop.resize"]
    assert [row[3] for row in rows if "s" in row[3]] == ["6.0s", "10.0s", "9.0s", "1.0s", "2ms"]


DEEP = []
for _ in range(5000):
    DEEP = [DEEP]
BEATS = [heard("worker-heartbeat", "alpha@laptop", 10 + n / 1000) for n in range(1000)]
NAMED = heard("task-received", "w", 0, uuid="5d0c91aa-05b0-41f9-9527-429e9295c494", name="job")
SHOWN = {  # keys, events, and what is shown then, but for blanks
    "in an empty table what to do next": ("1", [], "no events yet — try: send hello"),
    "that there are no tasks": ("2", [heard("hello", "w", 0)], "no tasks yet"),
    "that there are no workers": ("3", [heard("hello", "w", 0)], "no workers yet"),
    "the tasks of a name": ("2 j i", shop_events(), " 1 of 1 of shop.import "),
    "that a worker is silent": ("3", [heard("worker-heartbeat", "w", -42, freq=2)], "w silent 52.0s"),
    "how long a task runs, whatever the clock of its worker says": (
        "1", [task_event("started", name="job", timestamp=NOON - 3600, local_received=NOON)], "STARTED job 11:00:00 w1 10.0s"
    ),
    "that one process of a worker is gone": (
        "1", [heard("task-started", "w", n, uuid=str(n), pid=n) for n in (1, 2)] + [heard("worker-lost", "w", 6, pid=1, local=True)],
        " LOST 12:00:01 w 2.0s its process is gone STARTED 12:00:02 w 8.0s",
    ),
    "of a lost task the reason": (
        "1 i", shop_events(), "state LOST 6.0s worker LOST name users ",
    ),
    "the way from a task to its worker": ("1 i j j j i", shop_events(), "status LOST task LOST users 6.0s worker LOST 40% "),
    "fields in the units of people": (
        "1 i", [task_event("succeeded", runtime=0.64, peak_memory=34288435, progress=0.48, limit=7)],
        "runtime 640ms peak_memory 32.7 MiB progress 48% limit 7 ",
    ),
    "each delivery of a task as an attempt": (
        "1 i", [*stream("w1", *RETRIED), *stream("w2", *LAST)],
        "+0ms RECEIVED w1 attempt 1 +0ms RECEIVED w2 attempt 3 +500ms STARTED w2 attempt 3 +1.0s STARTED w1 attempt 1 "
        "+2.0s RECEIVED w1 attempt 2 +2.0s SUCCESS w2 attempt 3 +3.0s RETRY w1 attempt 1 refused (0) "
        "+4.0s STARTED w1 attempt 2 +5.0s RETRY w1 attempt 2 refused (1) ",
    ),
    "of an event its task's name, and the reason first": (
        "4", [NAMED, heard("task-failed", "w", 1, uuid=NAMED["uuid"], logger="x", clock=8, exception="E()", other=NAMED["uuid"])],
        "task-failed job 5d0c91aa w E() logger=x other=5d0c91aa ",
    ),
    "an event behind many heartbeats": ("4 G", [*shop_events(), *BEATS], "the bank is slow"),
    "it to a filter, too": ("4 / slow", [*shop_events(), *BEATS], "the bank is slow"),
    "what a command complained of": ("t", [task_event("failed", stderr="make: ***\nError 1")], "make: *** Error 1 "),
    "the tail of a long name": ("1", [task_event("received", name="shop." * 20 + "resize")], "op.shop.resize "),
    "the head of a large event": (
        "4 i", [Event("x", deep=DEEP, text="\n" * 10**6, **{str(n): n for n in range(10_000)})], " of 2,000 "
    ),
}  # fmt: skip


@pytest.mark.parametrize("keys, events, text", SHOWN.values(), ids=SHOWN)
def test_the_screen_shows(keys, events, text):
    state = state_of(*events)
    assert text in " ".join(shown(state, typed(state, keys, 24, 100), 24, 100).split())


def test_of_a_traceback_the_last_line_and_the_users_own_frames_stand_out():
    lines = eventmon.screen(typed(shop(), "1 j j j t"), stage(shop()))
    look = {span.text.strip(): span.style for line in lines for span in line}
    assert (look['File "/home/me/shop.py", line 7, in charge'], look["pay(total)"], look["ValueError: refused"]) == ("bold", "bold", "red")
    assert (look['File "/usr/lib/python3.11/asyncio/runners.py", line 3, in run'], look["go()"]) == ("dim", "dim")


def test_c_clears_what_has_finished_and_a_task_that_is_open_says_so():
    state = shop()
    view = typed(state, "1 j j j i")
    typed(state, "1 c")
    assert sorted(task["state"] for _, task in state.itertasks()) == ["PROGRESS", "PROGRESS", "RETRY"]
    assert "not in memory: cleared, or evicted to make room" in shown(state, view)


FILTERS = [
    *(("1", "", "users import 生成 charge resize"), ("1", "SHOP", "import charge resize"), ("1", "shop refused", "charge")),
    *(("1", "webp", "resize"), ("1", "生成", "生成"), ("1", "zzz", ""), ("1", "state:fail", "charge"), ("1", "a,b", "")),
    *(("1", "state:FAILURE,retry", "生成 charge"), ("1", "state:failure,", "charge"), ("1", "state:lost", "users")),
    *(("1", "name:shop state:success", "resize"), ("1", "worker:alpha", "import 生成 charge resize"), ("1", "uuid:5d", "import")),
    *(("4", "deploy", "deploy-done"), ("4", "type:deploy worker:web", "deploy-done"), ("3", "beta", "beta@build-7")),
    *(("2", "refused", "charge"), ("1 j j j i", "refused", "exception FAILURE ValueError"), ("1", "state:", "users import 生成 charge resize")),
]


@pytest.mark.parametrize("keys, text, matching", FILTERS)
def test_a_filter_is_words_that_must_all_be_found_anywhere_or_in_the_column_that_is_named(keys, text, matching):
    view = typed(shop(), [*keys.split(), "/", *text])
    text = shown(shop(), view, 24, 100)
    many = len(matching.split())
    assert f" of {many} " in text.splitlines()[-1]
    assert all(word in text for word in matching.split())


def test_a_filter_is_typed_edited_kept_and_dropped():
    state = shop()
    for keys, text, typing in [
        *((["/", *"qj 1"], "qj 1", True), (["/", *"日本", "KEY_BACKSPACE"], "日", True)),
        *(("1 / shop enter", "shop", False), ("1 / shop enter / x", "shopx", True)),
        *(("1 / shop esc", "", False), ("1 / shop enter esc", "", False), (["/", *"x" * 1000], "x" * 100, True)),
    ]:
        view = typed(state, keys)
        assert (view.layers[-1].filter, view.typing) == (text, typing)
    assert shown(state, typed(state, "1 / shop enter")).splitlines()[-1].startswith("/shop  1 of 3  ")
    assert "nothing matches zzz" in shown(state, typed(state, "1 / zzz"))


def test_keys_move_the_cursor():
    state = state_of(*(heard("task-received", "w", n, uuid=str(n), name=f"job{n}") for n in range(50)))
    for keys, index in [
        *(("j", 1), ("KEY_DOWN", 1), ("G", 49), ("KEY_END", 49), ("G g", 0), ("j k", 0), ("k", 0), ("G j", 49), ("G i esc", 49)),
        *(("KEY_NPAGE", 16), ("KEY_NPAGE KEY_NPAGE", 32), ("G KEY_PPAGE", 32), ("G ^U", 49), ("G g KEY_HOME", 0)),
        *((["move 3"], 3), (["G", "move -3"], 46), (["click 7 3"], 2), (["click 0 79"], 0), (["click 23 70"], 0)),
    ]:
        view = typed(state, keys if isinstance(keys, list) else f"1 {keys}", view=typed(state, "1"))
        assert view.layers[-1].index == index, keys


def line_of_cursor(state, view):
    lines = eventmon.screen(view, stage(state))
    return next((n, line[1].text.strip()) for n, line in enumerate(lines) if line[0].style == "selected")


def test_the_cursor_stays_on_its_task_and_line_when_rows_move_and_on_its_line_when_the_task_goes():
    state = state_of(*(heard("task-succeeded", "w", n / 10, uuid=f"{n}", name=f"job{n}") for n in range(40)))
    view = typed(state, "1 j j")
    assert line_of_cursor(state, view) == (7, "job37")
    for n in range(50):
        state.event(heard("task-succeeded", "w", 1, uuid=f"new{n}", name=f"new{n}"))
    assert line_of_cursor(state, view) == (7, "job37")
    assert line_of_cursor(state, typed(state, "1"))[0] == 5
    state.clear_tasks()
    state.event(heard("task-started", "w", 1, uuid="x", name="x"))
    assert line_of_cursor(state, view) == (5, "x")


def test_s_sorts_by_the_next_column_and_a_click_does_what_the_tab_heading_or_row_under_it_says():
    state = shop()
    assert typed(state, ["click 0 15"]).layers[-1].kind == "names"
    names = ["shop.charge", "shop.import", "shop.resize", "users", "报表.生成"]
    assert [row[1] for row in table(state, "1 s s s")] == names
    assert [row[1] for row in table(state, "1 s s s S")] == names[::-1]
    assert typed(state, ["1", "click 4 12", "click 4 12"]) == typed(state, "1 s s s S")
    assert line_of_cursor(state, typed(state, ["1", "click 7 3"])) == (7, "报表.生成")
    assert typed(state, ["1", "click 8 3", "click 8 3"]).layers[-1][:2] == ("task", CHARGE)


def test_keys_turn_the_pages_and_open_and_close_layers():
    for keys, kinds in [
        *(("1", "tasks"), ("2", "names"), ("3", "workers"), ("4", "events"), ("1 tab", "names"), ("4 tab", "tasks")),
        *(("1 i", "tasks task"), ("1 t r", "tasks traceback result")),
        *(("1 t t", "tasks traceback"), ("1 j j j i t", "tasks task traceback"), ("1 i e", "tasks task events"), ("1 i i", "tasks task")),
        *(("? ?", "tasks keys"), ("3 i", "workers worker"), ("3 e", "workers events")),
        *(("4 t", "events traceback"), ("4 i", "events event"), ("4 i e", "events event events"), ("2 t", "names")),
        *(("2 i", "names tasks"), ("2 i i", "names tasks task"), ("1 i q q", "tasks"), ("1 i 4", "events"), ("1 i s", "tasks task")),
        *(("1 j j j i t q", "tasks task"), ("1 i esc esc esc", "tasks"), ("x KEY_RESIZE ^@ é", "tasks")),
    ]:
        assert [layer.kind for layer in typed(shop(), keys).layers] == kinds.split(), keys


@pytest.mark.parametrize("keys", ["1", "2", "3", "4", "1 j j i", "1 j j j t", "3 i", "4 i", "1 s"])
def test_space_freezes_the_picture_while_events_are_counted(keys):
    state = shop()
    view = typed(state, f"space {keys}")
    before = shown(state, view).splitlines()
    for uuid in list(state.tasks):
        state.event(heard("task-failed", "alpha@laptop", 20, uuid=uuid, exception="new", traceback="new", retries=9, pid=101))
    state.event(heard("worker-heartbeat", "alpha@laptop", 20, active=99, processed=99, sw_ident="new"))
    after = shown(state, view, second=100).splitlines()
    fixed = 1 if len(view.layers) > 1 else 4
    assert after[fixed:] == before[fixed:]
    assert after[0].startswith(" FROZEN ")
    for key in ("space", "esc esc"):
        assert shown(state, typed(state, key, view=view), second=21).splitlines()[fixed:] != before[fixed:]


def test_escape_goes_back_and_never_quits_and_q_quits_from_the_top():
    assert typed(shop(), "1 / shop enter q").done
    for keys in ("1 i t", "4 i", "1 / shop enter", "space"):
        view = typed(shop(), f"{keys} esc esc esc")
        assert (view.done, view.frozen, len(view.layers), view.layers[0].filter) == (False, {}, 1, "")


def test_the_header_says_what_was_lost_rejected_or_evicted():
    state = state_of(*(heard("task-sent", "c", 0, uuid=str(n)) for n in range(3)), max_tasks_in_memory=1)
    assert not re.search("lost|rejected|evicted", shown(shop(), lost=0, rejected=0).splitlines()[0])
    for width in (120, 60):
        title = eventmon.screen(eventmon.View(), stage(state, 24, width, lost=1234, rejected=5))[0]
        assert [span.text.strip() for span in title if span.style == "alarm"] == ["1,234 lost", "5 rejected", "2 evicted"]


def test_help_tells_of_every_key():
    text = shown(State(), typed(State(), "?"))
    assert eventmon.HELP in text  # no line of it is broken
    for key in [key for key in eventmon.KEYS if not re.match(r"KEY_|\^", key)]:
        name = {"esc": "Escape", "tab": "Tab", "enter": "Enter"}.get(key, key)
        assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text), key


def test_wide_and_combining_characters_take_their_columns():
    assert [eventmon.cells(text) for text in ("日本", "e\u0301x", "👍🏽", "\u1112\u1161\u11ab", "❤")] == [4, 2, 4, 2, 1]


def test_each_colour_is_legible_on_black_on_dark_grey_and_on_white():
    def luminance(*colour):
        parts = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
        return sum(part * weight for part, weight in zip(parts, (0.2126, 0.7152, 0.0722)))

    def of_256(n):
        levels = (0, 95, 135, 175, 215, 255)
        return (8 + 10 * (n - 232),) * 3 if n >= 232 else tuple(levels[(n - 16) // step % 6] for step in (36, 6, 1))

    colours = [luminance(*of_256(colour)) for _, colour in eventmon.LOOKS.values() if colour]
    for ground in (luminance(0, 0, 0), luminance(0x1E, 0x1E, 0x1E), luminance(255, 255, 255)):
        for colour in colours:
            assert (max(ground, colour) + 0.05) / (min(ground, colour) + 0.05) >= 3


# --- capture_events, on a pseudo-terminal ---


class Terminal:
    """A command on a pseudo-terminal that is its controlling terminal: keys are typed, and what it writes is read."""

    def __init__(self, line, rows=24, columns=80, **environment):
        if pty is None:
            pytest.skip("no pseudo-terminal here")
        self.ours, self.theirs = pty.openpty()
        self.raw = b""
        self.resize(rows, columns)
        self.before = termios.tcgetattr(self.theirs)
        self.process = subprocess.Popen(
            shlex.split(line),
            **dict.fromkeys(("stdin", "stdout", "stderr"), self.theirs),
            env={**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "PYTHONPATH": FOLDER, **environment},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - no lock can be held by another thread
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)

    def resize(self, rows, columns):
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys):
        os.write(self.ours, keys.encode())

    def read(self, patience=0.0):
        """Read what is written, the first of it within so many seconds; return whether anything is."""
        found = bool(select.select([self.ours], [], [], patience)[0])
        while select.select([self.ours], [], [], 0)[0]:
            self.raw += os.read(self.ours, 65536)
        return found

    def shows(self, text, since=0):
        """Whether a text has been written since then, whatever blanks and sequences stand between its characters."""
        self.read()
        written = re.sub(r"\x1b(\[[?>]?[\d;]*[@-~]|[()].|[=>78M])", "", self.raw[since:].decode("utf-8", "replace"))
        return "".join(text.split()) in "".join(written.split())

    def press(self, keys, text):
        """Type keys, and wait until a text is written."""
        since = len(self.raw)
        self.type(keys)
        wait_until(lambda: self.shows(text, since))

    def see(self, keys, text):
        """Type keys, and wait until the screen, which is painted anew whenever it stands still, shows a text."""
        since = len(self.raw)
        self.type(keys + "\f")

        def found():
            if not self.read(0.2):
                self.type("\f")
            return self.shows(text, self.raw.rfind(b"\x1b[2J", since))

        wait_until(found)

    def end(self, text=""):
        """Return the exit status once a text is written and the terminal is as it was, with its cursor and no mouse."""
        status = self.process.wait(20)
        wait_until(lambda: self.shows(text) and termios.tcgetattr(self.theirs) == self.before)
        found = re.findall(rb"\x1b\[\?([\d;]+)([hl])", self.raw)
        modes = {mode: end for modes, end in found for mode in modes.split(b";")}
        assert (modes[b"1049"], modes[b"1000"], modes[b"25"]) == (b"l", b"l", b"h")
        return status


@pytest.fixture
def recording(tmp_path):
    """A command line that shows a file."""
    (tmp_path / "shop.jsonl").write_text("".join(json.dumps(event) + "\n" for event in shop_events()), encoding="utf-8")
    return f"{PROGRAM} watch {tmp_path}/shop.jsonl"


def test_the_monitor_shows_and_counts_all_that_is_sent_while_keys_are_pressed():
    with Terminal(f"{PROGRAM} watch") as it:
        it.see("", "no events yet on udp://")
        with Dispatcher(max_wait=1.0) as dispatcher:
            for n in range(2996):
                dispatcher.send("task-received", uuid=str(n), name="job")
                if n % 100 == 0:
                    it.type("jk4j12G"[n // 100 % 7])
                    it.read()
            with dispatcher.task("visible-job"):
                dispatcher.send("log-line", text="\x1b]0;evil\x07")
        it.see("1/visible\r", "SUCCESS visible-job")
        it.see("4/log-line\r", "evil")
        it.see("", "4 Events 3,001")  # and the end of the Dispatcher
        assert b"\x1b]0;evil" not in it.raw


def test_keys_and_the_mouse_are_read_as_they_are_typed_and_ctrl_s_stops_nothing(recording):
    with Terminal(recording) as it:
        for keys, text in [
            *(("/refused", "/refused█ 1 of 1"), ("\r", "/refused 1 of 1"), ("\r", "ValueError: refused"), ("/parent\r\r", f"task {IMPORT}")),
            *(("\x1b", f"task {CHARGE}"), ("q", "/refused 1 of 1"), ("\x1b", "shop.resize"), ("g\x1b[B\x1b[Bt", "no traceback")),
            *(("q?", "what has finished"), ("\x1b3", "beta@build-7"), ("\t", "deploy-done"), ("\t", "shop.charge")),
            *(("/报", "/报█ 1 of 1"), ("\x7f", "1 of 5"), ("\x1b", "q quit"), ("\x1b[<0;5;9M\x1b[<0;5;9m\r", f"task {CHARGE}")),
            *(("q", "shop.resize"), ("g\x1b[<65;5;5M", "4 of 5"), ("\x1b[<64;5;5M", "1 of 5"), ("\x1b[<0;14;1M", "LAST ERROR")),
            *(("1G\x13\x1b[200~\x1b[99;5Z\x1bOz", "5 of 5"), ("\x1bk", "4 of 5"), ("/zz", "nothing matches zz")),
        ]:
            it.see(keys, text)
        it.press("\x1b", "resize")  # no key follows
        it.type("q")
        assert it.end() == 0


def test_the_monitor_follows_the_size_of_the_terminal_however_often_it_changes_and_is_painted_anew(recording):
    rng = random.Random(5)
    with Terminal(recording) as it:
        it.press("", "shop.charge")
        for rows, columns, text in ((40, 120, "clear finished"), (1, 8, "LOST"), (3, 20, "1 of 5"), (24, 80, "freeze")):
            it.resize(rows, columns)
            it.see("", text)
        for number in (signal.SIGWINCH, signal.SIGCONT):  # a terminal is attached again; the monitor goes on
            it.process.send_signal(number)
            it.press("", "gamma@laptop")
        for _ in range(100):
            it.resize(rng.randrange(1, 100), rng.randrange(1, 300))
            it.type(rng.choice(["j", "4", "1", "i", "?q", "/x\x1b", "s", "G"]))
            it.read()
        it.process.send_signal(signal.SIGTERM)
        assert it.end() == 128 + signal.SIGTERM


RAISES = "import eventmon; eventmon.capture_events(state=eventmon.State(lambda state, event: 1 / 0))"
LOOKS_AROUND = """if True:
    import eventmon, os, signal, threading
    def look(): return [signal.getsignal(name) for name in signal.Signals], len(os.listdir("/dev/fd"))
    def end(): receiver.{}
    receiver, ending = eventmon.Receiver(), threading.Thread(target=end)
    receiver.fileno()
    signal.signal(signal.SIGUSR1, lambda *_: ending.start())
    before = look()
    eventmon.capture_events(receiver)
    ending.join(), receiver.fileno()
    print("the same" if before == look() else (before, look()))
"""
CLOSES, STOPS = map(LOOKS_AROUND.format, ("close()", "should_stop = True"))
ENDINGS = [  # words of `watch`, or a program; what is typed, a signal, the exit status, a text at the end
    *(("FILE", "", "INT", 0, ""), ("FILE", "i", "TERM", 143, ""), ("FILE", "/x", "HUP", 129, ""), ("FILE", " \x03", "", 0, "")),
    *(("--timeout 0.5", "", "", 0, ""), ("--limit 2", "", "", 0, ""), (RAISES, "", "", 1, "ZeroDivisionError")),
    *((CLOSES, "", "USR1", 0, "the same"), (STOPS, "", "USR1", 0, "the same")),
]


def test_the_terminal_signals_and_files_are_as_they_were_however_the_monitor_ends(recording):
    with ExitStack() as stack, Dispatcher() as dispatcher:
        terminals = []
        for what, *_ in ENDINGS:
            program = shlex.join([sys.executable, "-c", what]) if "import" in what else f"{PROGRAM} watch {what}"
            terminals.append(stack.enter_context(Terminal(recording if what == "FILE" else program)))
        for it, (what, keys, name, *_) in zip(terminals, ENDINGS):
            it.press("", "shop.charge" if what == "FILE" else "no events yet")
            it.type(keys)
            if name:
                it.process.send_signal(getattr(signal, f"SIG{name}"))
        dispatcher.send("hello")
        dispatcher.send("hello")
        for it, (*_, status, text) in zip(terminals, ENDINGS):
            assert it.end(text) == status


@posix
def test_capture_events_prints_lines_where_there_is_no_terminal():
    command = [sys.executable, "-c", CLOSES]
    with Dispatcher(hostname="w1") as dispatcher, subprocess.Popen(command, cwd=FOLDER, stdout=subprocess.PIPE) as process:
        dispatcher.send("hello", n=1)
        assert process.stdout.readline().split()[1:] == [b"hello", b"w1", b"n=1"]
        process.send_signal(signal.SIGUSR1)
        assert (process.stdout.read(), process.wait(20)) == (b"the same\n", 0)


def test_the_terminal_comes_back_around_ctrl_z_and_fg(recording):
    with Terminal("sh -i", PS1="$ ", ENV="") as it:
        it.type(f"{recording}\n")
        it.see("", "1 of 5")
        wait_until(lambda: it.type("\x1a") or it.read(0.2) and it.shows("topped"))  # in mid-picture curses heeds none
        it.press("stty -a\n", " icanon")
        assert it.raw.rindex(b"\x1b[?1049l") > it.raw.rindex(b"\x1b[?1049h")
        it.press("fg\n", "shop.charge")
        it.see("?", "what has finished")
        it.type("qqexit\n")
        assert it.end() == 0


LINES_INSTEAD = "curses cannot draw where TERM={}: printing lines instead of the monitor"
LOOKS = [  # the environment, whether there are colours, whether there is more than ASCII, and a text
    ({"TERM": "xterm-256color"}, True, True, "1 of 5"),
    ({"TERM": "xterm"}, False, True, "1 of 5"),  # its 8 colours cannot be read on every background
    ({"NO_COLOR": "1"}, False, True, "1 of 5"),
    ({"TERM": "vt100", "LC_ALL": "C"}, False, False, "1 of 5"),
    *(({"TERM": term}, False, True, LINES_INSTEAD.format(term)) for term in ("dumb", "no-such-terminal")),
]


def test_colours_on_the_terminals_own_background_unicode_and_pictures_are_there_where_they_can_be(recording):
    with ExitStack() as stack:
        terminals = [stack.enter_context(Terminal(recording, **environment)) for environment, *_ in LOOKS]
        for it, (_, coloured, unicode, text) in zip(terminals, LOOKS):
            wait_until(lambda: it.shows("deploy" if "TERM" in text else "freeze") and it.shows(text))  # noqa: B023
            assert bool(re.search(rb"\x1b\[(\d+;)*3[0-8][;m]", it.raw)) == coloured
            assert not re.search(rb"\x1b\[(\d+;)*4[0-8][;m]", it.raw)
            assert it.raw.isascii() != unicode


@pytest.mark.parametrize("seconds, least, most", [(0.0, 36, 40), (0.1, 3, 5)])
def test_a_picture_is_painted_20_times_a_second_at_most_and_a_slow_one_leaves_the_time_to_the_events(seconds, least, most, virtual):
    pictures = []

    def paint(lines):
        virtual.monotonic += seconds
        pictures.append(lines)

    state = State()
    monitor = eventmon.Monitor(iter(()), state, dict)
    painter = SimpleNamespace(paint=paint)
    for n in range(200):  # in two seconds
        virtual.monotonic += 0.01
        state.event(heard("task-sent", "w", n / 100, uuid=str(n)))
        assert monitor._draw(painter, stage(state)) > 0
    assert least <= len(pictures) <= most
    virtual.monotonic += 1
    pictures.clear()
    for n in range(200):
        virtual.monotonic += 0.1
        monitor._draw(painter, stage(state, second=100 + n / 10))
    assert len(pictures) == 1  # the seconds stand still
    state.event(heard("task-sent", "w", 3, uuid="new"))
    for _ in range(3):  # keys: the first is answered at once, the others a twentieth of a second later
        monitor._draw(painter, stage(state, second=200))
        monitor._drawn = None
    assert len(pictures) == 3


# --- the command line ---


def test_watch_prints_each_event_as_it_was_sent_and_send_names_the_first_bad_lines(command):
    recording = [task_event("received", uuid=str(n), x=["日本", None, {"a": 1.5}]) for n in range(200)]
    lines = "".join(json.dumps(event) + "\n" for event in recording).encode()
    with running("watch", "--json", "--limit", "200", stdout=subprocess.PIPE) as watch:
        wait_for_watchers()
        large = b'{"type":"x","x":"%s"}' % (b"x" * (16 << 20))
        status, _, errors = command("send", "-", input=b"\xff\n\n[1]\n" + lines + large + b"\n0" * 5)
        got = [json.loads(line) for line in watch.stdout]
        assert watch.wait(20) == 0
    assert [event for event in got if event.pop("local_received")] == recording
    named = [re.sub(":.*", "", error.replace("eventmon: ", "")) for error in errors]
    assert (status, named[:5]) == (1, [f"line {n}" for n in (1, 3, 204, 205, 206)])
    assert named[5:] == ["and 3 more", "sent 200 events, confirmed by 1 watcher"]


def test_watch_chooses_types_and_stops_after_a_limit_or_a_while(command):
    with Dispatcher(hostname="w") as dispatcher:
        for type in ("task-sent", "worker-online", "hello", "task-received"):
            dispatcher.send(type, text="\x1b[2J")
        status, out, errors = command("watch", "--type", "task-*", "--type", "hello", "--limit", "3")
        assert (status, errors, "\x1b" in out) == (0, [], False)
        assert [line.split()[1] for line in out.splitlines()] == ["task-sent", "hello", "task-received"]
        assert command("watch", "--json", "--no-history", "--timeout", "0.1") == (0, "", [])
        with suppress(ValueError), dispatcher.task("shop.charge", uuid="aca02be9-33"):
            raise ValueError("refused")
        status, out, errors = command("watch", "--plain", "--type", "task-failed", "--limit", "1")
    assert (status, errors) == (0, [])
    reason = r"ValueError\('refused'\)  runtime=\S+"  # and the task's name, which another event has told
    assert re.fullmatch(rf"[\d:]{{8}}  task-failed  shop.charge aca02be9  w  {reason}\n", out)


def test_what_watch_records_can_be_watched_and_sent_again_also_after_a_crash(tmp_path, command, monkeypatch):
    file = tmp_path / "recorded.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"type":"whole","timestamp":1e9}\r\n{"type":"cut o')
    assert re.fullmatch(r"[\d:]{8}  whole\n", command("watch", str(file))[1])
    with Dispatcher() as dispatcher:
        dispatcher.send("hello")
        assert command("watch", "--plain", "--limit", "1", "--record", str(file))[0] == 0
        with Terminal(f"{PROGRAM} watch --record {file}") as it:
            it.press("", "hello")
            dispatcher.send("seen")
            it.press("", "seen")
            it.process.kill()  # a crash
    with open(file, "ab") as more:
        more.write(b"x" * 5000 + b'\n{"type":"last"}')
    monkeypatch.setattr(eventmon, "MAX_LINE", 1000)
    status, out, errors = command("watch", str(file), "--json")
    types = [json.loads(line)["type"] for line in out.splitlines()]
    assert (status, types) == (0, ["whole", "hello", "hello", "seen", "last"])
    assert [re.sub(".*jsonl: ", "", error)[:16] for error in errors] == ["line 2: not JSON", "line 6: not JSON"]
    assert command("send", "-", input=file.read_bytes())[2][-1] == "sent 5 events, confirmed by 0 watchers"
    assert command("watch", str(file), "--json", "--record", str(file))[0] == 2  # not into itself
    assert command("watch", str(file), "--json", "--record", "/dev/full")[0] == 1  # which reads as zeros without end
    assert command("watch", str(MODULE.with_name("README.md")))[0] == 1


def test_send_says_how_many_watchers_have_everything(url, command):
    assert command("send", "hello") == (0, "", ["sent 1 event, confirmed by 0 watchers"])
    with watching() as (_, one), watching() as (_, two):
        status, _, errors = command("send", "deploy-done", "version=1.2", "--url", url, "ok:=true")
        assert (status, errors) == (0, ["sent 1 event, confirmed by 2 watchers"])
        wait_until(lambda: len(one) == len(two) == 1)
    assert {"type": "deploy-done", "version": "1.2", "ok": True}.items() <= one[0].items() and one[0]["clock"]
    with Ear() as ear, running("send", "hello", "--url", ear.url, stderr=subprocess.PIPE, text=True) as send:
        ear.hear()
        ear.answer(b"ack", 1, 7, 65536, 3)
        assert send.stderr.read() == "sent 1 event, confirmed by 0 watchers; 1 watcher lacks 3 datagrams\n"
        assert send.wait() == 1
    status, _, (error,) = command("send", "hello", "--url", "udp://no.such.host.invalid:7000")
    assert (status, error[:43]) == (1, "eventmon: cannot send to udp://no.such.host")


def test_watch_tells_of_datagrams_without_the_key_and_in_the_end_of_all_of_them():
    with running("watch", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                 env={**os.environ, "EVENTMON_KEY": "secret"}) as watch:  # fmt: skip
        with Dispatcher() as stranger, Dispatcher(key="secret") as friend:
            wait_until(friend.flush)
            stranger.send("hello")
            friend.send("hello")
            assert re.match(r"eventmon: \d+ datagrams? rejected: ", watch.stderr.readline())
        watch.send_signal(signal.SIGINT)
        assert watch.wait(20) == 0
        assert re.match(r"eventmon: in all \d+ datagrams? rejected: ", watch.stderr.read().splitlines()[-1])


WRONG = {  # words of a command line -> the exit status; each gets one line on standard error
    **dict.fromkeys(["", "nonsense", "watch --nonsense", "watch --limit x", "watch --limit 1.5", "send"], 2),
    **dict.fromkeys(["watch --limit -1", "watch --timeout -1", "watch --timeout nan"], 2),
    **dict.fromkeys(["watch --json --plain", "watch --url http://x", "send ''", "send hello x", "send hello =x"], 2),
    **dict.fromkeys(["send hello x:=oops", "send hello x:=NaN", "send - x=1", "send hello type=x"], 2),
    **dict.fromkeys(["send hello a=1 a=2", "send hello key==x", "send hello timestamp=yesterday"], 2),
    **dict.fromkeys(["send hello blind=1", "send hello --nonsense", "check --url 'udp://239.1.2.3:7000\r\t'"], 2),
    **dict.fromkeys(["run", "run --", "run --nonsense true", "run --url x true"], 2),
    **dict.fromkeys(["watch no/such/file", "watch --url udp://239.1.2.3:7000?interface=nosuchif0"], 1),
    **dict.fromkeys(["watch --key-file no/such", f"send hello --key-file {os.devnull}"], 1),
    **dict.fromkeys(["watch --record no/such/dir/file --timeout 0"], 1),
}


@pytest.mark.parametrize("words, status", WRONG.items())
def test_an_error_is_one_line_and_a_status(words, status, command):
    ended, out, (error,) = command(*shlex.split(words))
    assert (ended, out, error[:10]) == (status, "", "eventmon: ")


def test_help_and_version_go_to_standard_output(command):
    assert command("--version") == (0, f"eventmon {eventmon.__version__}\n", [])
    _, listed, _ = command("--help")
    for name in ("watch", "send", "run", "demo", "check"):
        assert re.search(rf"^ +{name} ", listed, re.MULTILINE)
        status, text, errors = command(name, "--help")
        assert (status, errors, "SUPPRESS" in text) == (0, [], False)
        assert all(part in text for part in ("usage:", "--url", "--key-file", "exit status: ", f"\n  python eventmon.py {name}"))


@posix
def test_ctrl_c_and_a_closed_pipe_end_watch_quietly():
    words, streams = ("watch", "--json"), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with running(*words, **streams) as told, running(*words, **streams) as idle, running(*words, **streams) as busy:
        wait_for_watchers(3)
        told.send_signal(signal.SIGINT)
        idle.stdout.close()  # and no event comes
        assert [(watch.wait(20), watch.stderr.read()) for watch in (told, idle)] == [(0, b"")] * 2
        busy.stdout.close()
        with Dispatcher() as dispatcher:
            wait_until(lambda: (dispatcher.send("x"), busy.poll())[1] is not None)
        assert (busy.returncode, busy.stderr.read()) == (0, b"")


RUNS = [  # words, exit status, standard output, lines of standard error, fields of the events
    ("-- sh -c 'cat; echo out; echo err >&2'", 0, b"in\nout\n", ["err"], {"exit_status": 0}),
    ("sh -c 'head -c 60000000 /dev/zero | tail >/dev/null; exit 3'", 3, b"", [], {"exit_status": 3, "exception": "exit status 3"}),
    ("-- sh -c 'kill -9 $$'", 137, b"", [], {"exit_status": 137, "exception": "SIGKILL"}),
    ("sh -c 'kill -40 $$'", 168, b"", [], {"exit_status": 168, "exception": "signal 40"}),
    ("-- '' -x", 127, b"", ["eventmon: : not found"], {"exception": "not found"}),
    ("-- no-such-command -x", 127, b"", ["eventmon: no-such-command: not found"], {"exception": "not found"}),
    ("'make all'", 127, b"", ["eventmon: make all: not found, did you mean run -- sh -c 'make all'?"], {}),
    ("--name x -- /", 126, b"", ["eventmon: /: Permission denied"], {"exit_status": 126, "name": "x"}),
    ("sh -c 'printf \"a\\\\377\" >&2; exit 1'", 1, b"", ["a\\xff"], {"stderr": "a\\xff"}),
    ("./script arg", 0, b"script arg\n", [], {"name": "script"}),
    ("--name x -- sh -c 'exec 2>&-; exit 4'", 4, b"", [], {"name": "x"}),
    ("sh -c 'yes | head -c 300000 >&2; exit 5'", 5, b"", ["y"] * 150000, {"stderr": "\n".join("y" * 20)}),
]


@posix
def test_run_is_the_command_itself_and_tells_of_it_as_of_a_task(tmp_path):
    (tmp_path / "script").write_text("echo script $1\n")  # which does not say for whom
    (tmp_path / "script").chmod(0o755)
    (tmp_path / "resource.py").write_text("this is not the module resource")
    with watching() as (_, events):
        results = together([f"{PROGRAM} run {words}" for words, *_ in RUNS], b"in\n", cwd=tmp_path)
        wait_until(lambda: len(events) == 3 * len(RUNS))
    for (words, status, out, err, fields), result in zip(RUNS, results):
        assert result == (status, out, err)
        command = shlex.split(words.partition("-- ")[2] or words)
        (uuid,) = (event["uuid"] for event in events if event.get("args") == shlex.join(command))
        received, started, ended = (event for event in events if event["uuid"] == uuid)
        types = ["task-received", "task-started", "task-failed" if status else "task-succeeded"]
        assert [received.type, started.type, ended.type] == types
        assert {"name": os.path.basename(command[0]), **fields}.items() <= {**received, **ended}.items()
        assert 0 < ended["runtime"] < 30
        assert ended.get("peak_memory", 1) > (60_000_000 if "60000000" in words else 0)


LINES = [  # a shell's line, in which RUN is "EVENTMON run --", and EVENTMON "python eventmon.py"; exit status, standard output
    ("TZ=UTC PYTHONIOENCODING=ascii EVENTMON watch x.jsonl --plain", 0, ["00:00:05", "x", r"y=\u65e5\u672c"]),
    *(("EVENTMON watch x.jsonl <&- >&-", 0, []), ("EVENTMON send - <&-", 0, []), ("EVENTMON watch --timeout 0 <&- 2>&-", 0, [])),
    ("RUN sh -c 'for i in $(seq 50); do echo o$i; echo e$i >&2; done' 2>&1", 0, [f"{c}{i}" for i in range(1, 51) for c in "oe"]),
    ("RUN echo hi 2>&-", 0, ["hi"]),
    ("RUN sh -c 'exit 3' <&- >&- 2>&-", 3, []),
    ("RUN sh -c 'sleep 60 >&- & echo $! >pid' 2>errors; kill $(cat pid)", 0, []),  # a child has standard error, too
    ("RUN sh -c '(sleep 0.3; echo late >&2) & echo early >&2' 2>&1 | cat", 0, ["early", "late"]),
    ("(RUN sh -c 'yes >&2; exit 3'; echo $? >&3) 3>&1 2>&1 >&- | head -n 1", 0, ["y"]),
    ("EVENTMON_URL=udp://no.such.host.invalid:7000 RUN sh -c 'echo hi; exit 5'", 5, ["hi"]),
    ("trap '' HUP; RUN sh -c 'kill -HUP $PPID; kill -HUP $$; echo ignored'", 0, ["ignored"]),
    ("echo text >file; RUN sh -c 'cat <&5' 5<file", 0, ["text"]),
    ("ulimit -n 1100 && MANY RUN sh -c 'exit 3'", 3, []),  # more files than select() takes
]


@posix
def test_any_encoding_and_missing_streams_will_do_and_run_leaves_what_is_inherited_as_it_is(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"type":"x","y":"日本","timestamp":5}\n', encoding="utf-8")
    (tmp_path / "many.py").write_text("import os, sys\nfor _ in range(1050): os.dup2(0, os.dup(0))\nos.execvp(sys.argv[1], sys.argv[1:])")
    programs = {"RUN": f"{PROGRAM} run --", "EVENTMON": PROGRAM, "MANY": f"{shlex.quote(sys.executable)} many.py"}
    lines = [re.sub("(RUN|EVENTMON|MANY) ", lambda it: programs[it[1]] + " ", line) for line, _, _ in LINES]
    for (line, status, out), result in zip(LINES, together(lines, cwd=tmp_path)):
        assert (result[0], result[1].decode().split()) == (status, out), line
        assert "Traceback" not in str(result)


COUNTER = shlex.join([sys.executable, "-c", """
import os, signal, sys, time
def count(name, frame):
    os.write(1, b"got %b\\n" % signal.Signals(name).name.encode())  # print() cannot be interrupted by itself
    if name == signal.SIGTERM:
        sys.exit(7)
for name in ("INT", "TERM", "HUP", "QUIT", "USR1", "ALRM", "WINCH"):
    signal.signal(getattr(signal, f"SIG{name}"), count)
print("ready", [os.isatty(n) for n in range(3)], os.getpgid(0) == os.getpgid(os.getppid()), flush=True)
while True:
    time.sleep(0.05)  # in pause() a signal that came just before would wait for the next
"""])  # fmt: skip


@posix
def test_run_passes_signals_on_and_leaves_those_that_are_typed_and_job_control_to_the_terminal(monkeypatch):
    before = {number: signal.getsignal(number) for number in signal.Signals}
    assert main(["run", "true"]) == 0
    assert before == {number: signal.getsignal(number) for number in signal.Signals}
    with running("run", "--", *shlex.split(COUNTER), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("ready")
        for name in ("USR1", "HUP", "INT", "QUIT", "ALRM", "WINCH", "TERM"):
            process.send_signal(getattr(signal, f"SIG{name}"))
            assert process.stdout.readline() == f"got SIG{name}\n"
        assert process.wait(20) == 7

    def start(*args, popen=subprocess.Popen, **options):
        command = popen(*args, **options)
        os.kill(os.getpid(), signal.SIGUSR1)  # before run() has its command
        return command

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", start)
        assert main(["run", "sleep", "60"]) == 128 + signal.SIGUSR1
    with Terminal(f"{PROGRAM} run -- {COUNTER}") as it, Terminal("sh -i", PS1="$ ", ENV="") as shell:
        shell.type(f"{PROGRAM} run -- sh -c 'echo rea\"\"dy; sleep 0.5; read line; echo got $line'\n")
        it.press("", "ready [True, True, True] True")
        it.press("\x03", "got SIGINT")
        it.press("\x1c", "got SIGQUIT")
        it.process.send_signal(signal.SIGTERM)
        it.press("", "got SIGTERM")
        assert (it.process.wait(20), it.raw.count(b"got ")) == (7, 3)
        for keys, text in (("", "ready\n"), ("\x1a", "topped"), ("fg\n", "run -- sh"), ("hello\n", "got hello")):
            shell.press(keys, text)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_key_file_holds_the_same_key_in_any_encoding_of_a_text(encoding, tmp_path, command):
    (tmp_path / "key").write_text("secret\n", encoding=encoding)
    with watching(key="secret") as (_, events):
        command("send", "hello", "--key-file", str(tmp_path / "key"))
        wait_until(lambda: events)


def check(command, *words):
    """Run `check`; return its exit status, {step: (verdict, text)}, and the lines about interfaces."""
    status, out, errors = command("check", *words)
    assert errors == []
    first, _, rest = out.partition("\ninterfaces")
    steps = {line[6:13].strip(): (line[:5].strip(), line[14:]) for line in first.splitlines()[1:]}
    return status, steps, rest.splitlines()[1:]


def test_check_says_step_by_step_that_all_is_well_and_who_is_there(tmp_path, command):
    (tmp_path / "key").write_text("secret\n")
    with watching(key="secret") as (receiver, events), Dispatcher(hostname="alpha@there", key="secret") as old:
        for n in range(1000):
            old.send("old", n=n)
        with Dispatcher(hostname="wrong\x1b@there", key="secret", freq=0.1), Dispatcher(freq=0.1):  # that has no key
            status, steps, others = check(command, "--key-file", str(tmp_path / "key"))
        assert (status, {verdict for verdict, _ in steps.values()}) == (0, {"ok"})
        assert list(steps) == ["open", "join", "send", "receive", "sizes", "buffer", "others"]
        who, where, names, rejected = steps["others"][1].split("; ", 3)
        assert who == "2 Dispatchers and 1 watcher beside this one"
        assert where == "watchers are at 127.0.0.1, and prove that events get there"
        assert re.fullmatch("events come from wrong[^\x1b]*", names)
        assert "rejected: " in rejected
        assert f"{old.stats['repairs']}{receiver.stats['lost']}" == "00"  # it asks for no history
        assert {event.type for event in events if "hostname" in event} >= {"eventmon-check", "old"}
    assert all(re.fullmatch(r"  \S+ +'udp://[0-9.:]+\?interface=\S+&ttl=[01]'", line) for line in others)


WRONGS = [  # URL, datagrams of so many bytes are lost or are an error, the step that is wrong, what check says of it
    ("udp://239.1.2.3:7000?interface=nosuchif0", 9999, "", "open", "no such interface as nosuchif0"),
    ("udp://239.1.2.3:7000?interface=192.0.2.77", 9999, "", "open", "192.0.2.77 is no address of this machine"),
    ("udp://no.such.host.invalid:7000", 9999, "", "open", "no.such.host.invalid is not found"),
    ("udp://127.0.0.1:MUTE", 9999, "", "receive", "nobody confirms it: start python eventmon.py watch --url udp://0.0.0.0:"),
    (None, 0, "", "receive", "it does not come back"),
    (None, 8000, "", "sizes", "61,440 bytes do"),
    (None, 0, "ENETUNREACH", "send", "no route for 239."),
    (None, 0, "EPERM", "send", "not permitted: a firewall"),
    (None, 0, "EIO", "send", "[Errno 5] refused by the test"),
]


@pytest.mark.parametrize("where, lost, error, step, words", WRONGS)
def test_check_says_what_is_wrong_and_what_to_do(where, lost, error, step, words, url, command, monkeypatch):
    def sendto(sock, data, target, real=socket.socket.sendto):
        if len(data) < lost:
            return real(sock, data, target)
        return refuse(getattr(errno, error))() if error else len(data)

    with Ear() as mute:
        monkeypatch.setattr(socket.socket, "sendto", sendto)
        monkeypatch.setattr(eventmon, "HEAR_TIME", 0.1)
        status, steps, _ = check(command, "--url", (where or url).replace("MUTE", str(mute.getsockname()[1])))
    assert (status, list(steps)[-1], steps[step][0]) == (1, step, "wrong")
    assert steps[step][1].startswith(words)


def test_check_finds_the_watcher_of_a_unicast_url_and_says_why_an_answer_is_rejected(command):
    with Ear() as free:
        where = free.url
    with watching(url=where):
        status, steps, _ = check(command, "--url", where)
    assert (status, steps["receive"]) == (0, ("ok", "a watcher has confirmed it"))
    assert "port" in steps["join"][1]
    with Ear() as other:
        threading.Thread(target=lambda: other.hear() and other.answer(b"ack", 0, 7, 0, 0, key=b"x")).start()
        status, steps, _ = check(command, "--url", other.url)
    assert (status, steps["receive"][0], steps["receive"][1][:21]) == (1, "wrong", "1 datagram rejected: ")


def test_check_tries_other_interfaces_only_when_told_and_vouches_for_no_network_that_nobody_confirms():
    down, first, second, third = networks()["check"].split("\n\n")
    assert re.search("^wrong open +127.0.0.1 is no address .* lo is down: sudo ip link set lo up$", down, re.MULTILINE)
    assert down.splitlines()[-3:] == ["1", "ran", "9"]
    (line,) = (line for line in first.splitlines() if line.startswith("  one "))
    assert re.fullmatch(r"  one +'udp://[0-9.:]+\?interface=one&ttl=1'", line)
    assert f"{line}  ok    receive it has come back on this machine" in second.splitlines()
    assert "ok    receive it has come back on this machine" in third
    assert "0 Dispatchers and 0 watchers beside this one\n" in third  # and no word of where watchers are


@posix
def test_the_demo_shows_life_ends_with_its_monitor_also_from_a_zip_and_leaves_no_process_behind(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import time\nsleep = time.sleep\ntime.sleep = lambda s: sleep(s / 10)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # where a second is short
    (tmp_path / "app").mkdir()
    shutil.copy(COMPILED, tmp_path / "app")
    zipapp.create_archive(tmp_path / "app", tmp_path / "app.pyz", main="eventmon:main")
    words = [sys.executable, "-m", "eventmon", "demo", "--json", "--url", new_url()]
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": f"{tmp_path}:{tmp_path / 'app.pyz'}"}}
    pids, kinds, tasks = {}, set(), {}
    monitor = shlex.join([sys.executable, str(tmp_path / "app.pyz"), "demo"])
    with Terminal(monitor, 40, 120) as it, subprocess.Popen(words, stdout=subprocess.PIPE, **options) as demo:
        for event in map(json.loads, demo.stdout):
            pids[event["hostname"]] = event["pid"]
            kinds.add(event["type"])
            tasks.setdefault(event.get("uuid"), {}).update(event)
            if len(pids) == 3 and kinds >= {"task-failed", "task-retried", "task-progress", "log-warning"}:
                break
        demo.kill()
        it.see("", "STARTED")
        it.type("q")
        assert it.end() == 0
    assert any(task.get("parent_id") in tasks for task in tasks.values())
    (failed,) = {task["traceback"].splitlines()[-2].strip() for task in tasks.values() if task["type"] == "task-failed"}
    assert failed.startswith("raise ConnectionRefusedError(")
    workers = f"ps -o stat= -p {','.join(map(str, pids.values()))}"
    wait_until(lambda: not together([workers])[0][1].replace(b"Z", b"").strip())  # zombies may be left to the system


OWN = ("random", "signal", "uuid", "queue", "logging", "socket", "json", "select", "argparse", "subprocess", "resource")
STARTS = ("-OO eventmon.py send --help", "-I eventmon.py send hello", "-SO eventmon.py watch --timeout 0", "-OO -m eventmon run true")


@posix
def test_the_program_starts_without_docstrings_in_a_read_only_folder_and_beside_modules_of_any_name(tmp_path):
    shutil.copy(MODULE, tmp_path)
    for name in OWN:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    tmp_path.chmod(0o555)
    results = together([f"{shlex.quote(sys.executable)} {words}" for words in STARTS], cwd=tmp_path)
    tmp_path.chmod(0o755)
    for words, (status, out, errors) in zip(STARTS, results):
        assert (status, re.findall("Traceback|wrong module", str((out, errors)))) == (0, []), words


def test_an_older_python_gets_one_line():
    source = MODULE.read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 8))
    old = SimpleNamespace(**{**vars(sys), "version_info": (3, 8, 20), "path": ["x"]})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="^eventmon needs Python 3.9 or newer$"):
        patch.setitem(sys.modules, "sys", old)
        exec(compile(source, "eventmon.py", "exec", dont_inherit=True), {"__name__": "__main__"})


def test_the_benchmark_runs_without_pytest_and_measures_what_the_readme_tells(tmp_path):
    program = py_compile.compile(__file__, os.path.join(FOLDER, "test_eventmon.pyc"), doraise=True)
    words = [sys.executable, "-S", program, "--json", "--scale", "0.001"]  # -S: no site-packages, and so no pytest
    ((status, out, errors),) = together([words], cwd=tmp_path)
    assert (status, errors) == (0, [])
    measured = [json.loads(line) for line in out.splitlines()]
    assert all(row["eventmon"] > 0 for row in measured)
    told = re.findall(r"^\| ([^|]+) \| [0-9,.]+(/s| [a-z%]+) \| .* \| .* \|$", README, re.MULTILINE)
    assert [(row["what"], row["unit"]) for row in measured] == [(what, unit.strip()) for what, unit in told]


def test_every_public_name_is_there_and_documented():
    assert all(name == "DEFAULT_URL" or getattr(eventmon, name).__doc__ for name in eventmon.__all__)
    words = [sys.executable, "-m", "pydoc", str(MODULE)]
    shown = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout
    assert all(f"class {name}(" in shown for name in ("Dispatcher", "Event", "LogHandler", "Receiver", "State"))


# --- the README ---


def test_the_readme_shows_what_the_monitor_shows(utc):
    events = (
        {**event, "name": "shop.report"} if event.get("name") == "报表.生成" else event for event in shop().recent
    )
    assert f"```text\n{shown(state_of(*events), None, 16, url=DEFAULT_URL)}\n```" in README


def readme_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


SNIPPETS = [  # the last event's type, some of its fields, what is printed
    ("deploy-done", {"version": "1.2"}, b""),
    ("task-retried", {"exception": "TimeoutError('mail.example.com')"}, b""),
    ("log-warning", {"message": "disk almost full"}, b"WARNING:root:disk almost full"),
    (None, {}, rb"\d+ tasks, \d+ workers alive"),
]


def test_every_python_snippet_in_the_readme_runs_beside_the_single_file():
    snippets = [re.sub(r"(sleep\(|timeout=)[^)]*", r"\g<1>0.01", code) for code in readme_blocks("python")]
    with watching() as (_, events):
        results = together([[sys.executable, "-c", code] for code in snippets], cwd=FOLDER)
        assert len(results) == len(SNIPPETS)
        for (type, fields, printed), (status, out, errors) in zip(SNIPPETS, results):
            assert status == 0 and re.fullmatch(printed, b"".join([out.strip(), *map(str.encode, errors)]))
            wait_until(lambda: not type or [e for e in events if e.type == type and fields.items() <= e.items()])  # noqa: B023


@posix
def test_every_command_in_the_readme_runs(tmp_path, url):
    """Run the lines of the README's shell blocks as they stand, but on this test's group; who watches is ended."""
    assert "/bin/pytest" in (MODULE.parent / ".ci" / "run").read_text()  # which runs the line that has it
    parts, netcat = eventmon.parse_url(url), shutil.which("nc")
    blocks = "".join(readme_blocks("sh")).replace("239.255.69.86 6986", f"{parts.host} {parts.port}")
    lines = re.findall("^(?!.*pytest).+" if netcat else "^(?!.*(?:pytest|nc -u)).+", blocks, re.MULTILINE)
    (tmp_path / "python").symlink_to(sys.executable)
    environment, processes = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, []
    types = {"hello", "old", "task-succeeded", *["backup-done"] * bool(netcat)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with watching() as (_, events), Dispatcher() as dispatcher:
        for line in lines:
            folder = tmp_path / str(len(processes))
            (folder / "docs").mkdir(parents=True)
            (folder / "recorded.jsonl").write_text('{"type":"old"}\n')
            shutil.copy(COMPILED, folder / "eventmon.py")  # Python knows what is compiled under any name
            options = {"cwd": folder, "env": environment, "start_new_session": True}
            processes.append(subprocess.Popen(line, shell=True, **options, **pipes))
        for line, process in zip(lines, processes):
            if is_endless := re.search("demo|watch --", line):
                wait_until(lambda: dispatcher.send("task-progress") and select.select([process.stdout], [], [], 0.1)[0])  # noqa: B023
                os.killpg(process.pid, signal.SIGTERM)
            out, err = process.communicate(timeout=30)
            assert (is_endless or process.returncode == 0) and b"Traceback" not in err, (line, out, err)
        bare = [line for line in lines if "nc -u" in line]  # may be lost: then somebody sends it again
        wait_until(lambda: types <= {event.type for event in events} or [subprocess.call(line, shell=True) for line in bare] == 0)

