"""Generated code runs apart: whatever it does it is judged by its tests alone, and leaves the host as it was."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from zconvert.evaluation.sandbox import Limits, Outcome, Program, check_sandbox, run_code

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the walls are Linux's")

SMALL = Limits(seconds=1.0, memory_mb=256, processes=8, output_mb=1)
RIGHT = "def f(x):\n    return x + 1\n"
TESTS = "seen = f(1)\nassert seen == 2\nseen = 0"
# What each of the two walls does alone; both together are the default. Limits and the end of all children need neither.
WALLS = {"both": {}, "kernel": {"guard": False}, "guard": {"namespaces": False}}
NEITHER = {"guard": False, "namespaces": False}

HOSTILE = {
    "a fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "an endless loop": "while True: pass",
    "10 GB": "held = bytearray(10 * 1024 ** 3)",
    "10 GB by and by": "held = []\nwhile True: held.append(bytearray(2 ** 20))",
    "writing outside": "open(OUTSIDE, 'w').write('here')",
    "removing what is outside": "import os\nos.remove(KEPT)",
    "looking into the environment": "import os\nassert 'ZCONVERT_SECRET' in os.environ",
    "reading the environments of others": (
        "import os\nfound = False\nfor pid in [p for p in os.listdir('/proc') if p.isdigit()]:\n"
        "    try: found |= b'ZCONVERT_SECRET' in open(f'/proc/{pid}/environ', 'rb').read()\n"
        "    except OSError: pass\nassert found"
    ),
    "killing the parent": "import os\nos.kill(os.getppid(), 9)\nos.kill(PARENT, 9)\nraise SystemExit",
    "killing everybody": "import os\nos.kill(-1, 9)",
    "closing descriptors": "import os\nos.closerange(0, 1000)",
    "writing to every descriptor": (
        "import os\n"
        "for d in range(100):\n"
        '    try: os.write(d, b\'{"passed": true, "reason": "passed", "detail": "", "held": []}\')\n'
        "    except OSError: pass\n"
        "os._exit(0)"
    ),
    "huge output": "while True: print('x' * 100_000)",
    "huge output that is not minded": (
        "import os\nfor _ in range(100):\n    try: os.write(1, b'x' * 100_000)\n    except OSError: pass"
    ),
    "leaving early": "import os\nos._exit(0)",
    "leaving early by an exception": "raise SystemExit(0)",
    "leaving in the test": "def f(x):\n    import os\n    os._exit(0)",
    "built-ins that know no difference": (
        "import builtins\nbuiltins.AssertionError = type('A', (BaseException,), {})\n"
        "builtins.abs = builtins.isinstance = lambda *a: True\ndef f(x): return 7"
    ),
    "built-ins of its own for whoever runs beside it": (
        "import builtins\n__builtins__ = {**vars(builtins), 'abs': lambda x: 0}\ndef f(x): return 7"
    ),
    "a result that equals everything": "class All:\n    def __eq__(self, other): return True\ndef f(x): return All()",
    "a number that equals everything": "f = lambda x: type('I', (int,), {'__eq__': lambda s, o: True})(7)",
    "such a result in a list": "class All:\n    def __eq__(self, other): return True\ndef f(x): return [All()]",
    "a tracer that skips tests": (
        "import sys\ndef trace(frame, event, arg):\n"
        "    if frame.f_code.co_filename == '<tests>' and event == 'line' and frame.f_lineno == 2:\n"
        "        frame.f_lineno = 3\n    return trace\nsys.settrace(trace)\ndef f(x): return 7"
    ),
    "a background child": "import subprocess\nsubprocess.Popen(['/bin/sleep', '600'], start_new_session=True)",
    "a child that forks twice": (
        "import os, time\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(600)\n    os._exit(0)\nos.wait()"
    ),
    "the network": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)",
    "a crash": "import ctypes\nctypes.string_at(0)",
}
HARMLESS_AFTERWARDS = {"closing descriptors", "huge output that is not minded", "a background child"}
HARMLESS_AFTERWARDS |= {
    "looking into the environment",
    "reading the environments of others",
    "a child that forks twice",
    "the network",
    "removing what is outside",
    "writing outside",
}
"""these go on to a right answer: they fail for what they did"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """Names for samples to use, and a look at the host afterwards."""
    monkeypatch.setenv("ZCONVERT_SECRET", "open sesame")
    tmp_path.chmod(0o777)
    kept = tmp_path / "kept"
    kept.write_text("still here")
    kept.chmod(0o666)
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        yield {"OUTSIDE": str(tmp_path / "x"), "KEPT": str(kept), "PARENT": os.getpid(), "PORT": port}
        with pytest.raises(BlockingIOError):
            server.accept()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "still here"
    left = cells()
    for _ in range(100):  # another test's cell may be running: it ends
        left = {pid for pid in left if pid in cells()}
        if not left:
            break
        time.sleep(0.05)
    assert not left


def cells() -> set[int]:
    """Processes that came from a sample's interpreter."""
    found = set()
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and b"sandbox_cell" in Path(f"/proc/{name}/cmdline").read_bytes():
                found.add(int(name))
        except OSError:
            pass
    return found


def run(code: str, tests: str = TESTS, **walls: bool) -> Outcome:
    return run_code(Program(code, tests=tests, function="f"), SMALL, **walls)


@pytest.mark.parametrize("walls", WALLS)
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_sample_fails_and_the_host_is_unharmed(what: str, walls: str, host: dict[str, object]) -> None:
    names = "".join(f"{name} = {value!r}\n" for name, value in host.items())
    answer = RIGHT if what in HARMLESS_AFTERWARDS else ""
    tests = {"such a result in a list": "assert f(1) == [2]"}.get(what, TESTS)
    tests = "assert abs(f(1) - 2) == 0" if "built-ins" in what else tests
    outcome = run(names + HOSTILE[what] + "\n" + answer, tests, **WALLS[walls])
    assert not outcome.passed
    if walls == "both":
        assert run(RIGHT).passed, "the next sample is affected"


@pytest.mark.parametrize("what", ["an endless loop", "10 GB", "a background child", "a child that forks twice"])
def test_without_walls_there_are_limits_and_no_child_lives_on(what: str, host: dict[str, object]) -> None:
    assert not run(HOSTILE[what] + "\n" + RIGHT, **NEITHER).passed


@pytest.mark.parametrize("walls", [*WALLS, "neither"])
def test_samples_are_judged_by_their_tests(walls: str) -> None:
    options = WALLS.get(walls, NEITHER)
    assert run(RIGHT, **options).passed
    assert run(RIGHT.replace("1", "2"), **options).reason == "wrong"
    assert run("def f(x) return", **options).reason == "error"
    assert run("", **options).detail == "error: NameError: name 'f' is not defined"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (HOSTILE["an endless loop"], "timeout"),
        (HOSTILE["10 GB"], "memory"),
        (HOSTILE["huge output that is not minded"], "output"),
        (HOSTILE["leaving early"], "incomplete"),
        (HOSTILE["a crash"], "killed"),
        ("open('/etc/passwd', 'a')", "forbidden"),
    ],
)
def test_the_reason_of_a_failure_is_told(code: str, reason: str) -> None:
    assert run(code + "\n" + RIGHT).reason == reason


def test_a_sample_has_what_solutions_use() -> None:
    code = """
import collections, dataclasses, heapq, itertools, math, os, random, re, tempfile, threading, typing

@dataclasses.dataclass
class Pair:
    a: int
    b: int

def f(x):
    print("working")
    with tempfile.TemporaryDirectory() as folder, open(os.path.join(folder, "a"), "w+") as file:
        file.write("1")
    seen = []
    thread = threading.Thread(target=seen.append, args=(x,))
    thread.start()
    thread.join()
    return collections.Counter(seen), Pair(1, 2), {1.5, "a"}
"""
    outcome = run(code, "import math\nassert f(1)[0] == {1: 1} and f(1)[1].b == 2 and math.isclose(max(f(2)[0]), 2)")
    assert outcome.passed, outcome


def test_a_name_that_hides_a_built_in_is_the_tests_own_again_but_for_the_function_under_test() -> None:
    hiding = "def sum(x): return 7\ndef f(x): return 0\n"
    assert not run(hiding, "assert f(1) == 2 or sum([1]) == 7").passed
    assert run_code(Program("def sum(x): return 7", tests="assert sum(1) == 7", function="sum"), SMALL).passed


def test_programs_are_judged_by_their_output_case_by_case() -> None:
    doubled = "import sys\nfor line in sys.stdin: print(int(line) * 2)\nsys.exit()"
    assert run_code(Program(doubled, cases=(("2\n3", "4\n6\n"), ("10", "20.0"))), SMALL).passed
    wrong = run_code(Program(doubled, cases=(("2", "4"), ("3", "7"))), SMALL)
    assert (wrong.reason, wrong.detail) == ("wrong", "case 2 of 2: 6\n")
    assert run_code(Program("while True: pass", cases=(("2", "4"),)), SMALL).reason == "timeout"


def test_functions_and_methods_are_judged_by_what_they_return() -> None:
    method = "class Solution:\n    def both(self, a, b):\n        print('!')\n        return a, b"
    assert run_code(Program(method, cases=(('2\n["x"]', '[2, ["x"]]'),), function="both"), SMALL).passed
    plain = "def both(a, b): return b, a"
    assert run_code(Program(plain, cases=(("1\n2", "[1, 2]"),), function="both"), SMALL).reason == "wrong"


def test_a_program_does_not_find_what_is_expected_of_it() -> None:
    spying = "import gc\nprint('found' if any(str(17) * 4 in str(o)[:100_000] for o in gc.get_objects()) else 'no')"
    outcome = run_code(Program(spying, cases=(("", "no"), ("", "17171717"))), SMALL)
    assert outcome.detail == "case 2 of 2: no\n"


def test_what_keeps_samples_apart_is_told() -> None:
    assert set(check_sandbox().walls) <= {"processes", "network", "files"}
