"""Runs one sample of generated code; started by `sandbox.run_code` as an interpreter of its own, and needs only Python.

    cell (reads the job) ── fork ──► keeper (first process of its own namespace; judges) ── fork ──► worker (the sample)

The keeper holds what the worker must not have: the expected outputs, the word that proves that the tests ran through,
and the pipe by which the verdict leaves. Whatever outlives a worker is killed, in a process namespace by the kernel.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import ctypes
import decimal
import json
import os
import resource
import secrets
import signal
import sys
import time
import types
from collections.abc import Callable
from typing import Any, NoReturn

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MS_PRIVATE_REC, _MS_NOSUID_NODEV = 0x44000, 6
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 8, 36, 38
_MOUNT_SETATTR = 442  # the same number on every architecture of Linux
_CAP_DAC_READ_SEARCH = 2
_NOBODY = 65534
_FORBIDDEN = 77
"""exit status of a worker that the guard stopped"""

Job = dict[str, Any]
_SAMPLE = "<sample>"


def main() -> None:
    """Reads a job from stdin as JSON, and writes its verdict to stdout as JSON."""
    job: Job = json.load(sys.stdin.buffer)
    _on_linux(_PR_SET_PDEATHSIG, signal.SIGKILL)
    held = _isolate(job) if job["namespaces"] else {}
    keeper = os.fork()
    if keeper:
        os.waitpid(keeper, 0)
        return
    _on_linux(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _on_linux(_PR_SET_DUMPABLE, 0)
    alone = os.getpid() == 1  # the first of a namespace of processes, of which nothing outlives it
    if alone:
        # Where a container forbids this, the host's processes can be seen still, though not be signalled.
        held["processes"] = _mount("proc", "/proc", "proc", 14)
    else:
        _on_linux(_PR_SET_CHILD_SUBREAPER, 1)
    verdict = _judge(job, alone)
    os.write(1, json.dumps({**verdict, "held": [name for name, holds in held.items() if holds]}).encode())
    os._exit(0)


# ---- walls of the kernel ----


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _on_linux(option: int, value: int) -> None:
    if sys.platform == "linux":
        _libc().prctl(option, value, 0, 0, 0)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> bool:
    named = None if kind is None else kind.encode()
    return bool(_libc().mount(source.encode(), target.encode(), named, flags, data.encode()) == 0)


def _isolate(job: Job) -> dict[str, bool]:
    """Leaves the host's processes, network and files behind, as far as the system allows; says what holds."""
    if sys.platform != "linux":
        return {}
    libc, flags = _libc(), _NEWNS | _NEWIPC | _NEWPID | _NEWNET
    uid, gid = os.getuid(), os.getgid()
    if uid != 0 or libc.unshare(flags) != 0:
        if libc.unshare(flags | _NEWUSER) != 0:
            return {}
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        job["own_user_namespace"] = True
    if not _mount("none", "/", None, _MS_PRIVATE_REC):
        raise OSError("mounts cannot be kept from the host")  # whose /proc the next ones would change
    read_only = (ctypes.c_uint64 * 4)(1, 0, 0, 0)  # struct mount_attr: set MOUNT_ATTR_RDONLY
    here = os.getcwd()
    files = libc.syscall(_MOUNT_SETATTR, -100, b"/", 0x8000, ctypes.byref(read_only), 32) == 0 and _mount(
        "tmpfs", here, "tmpfs", _MS_NOSUID_NODEV, f"size={job['limits']['disk']},mode=0777"
    )
    os.chdir(here)
    return {"network": True, "files": files}


def _drop_privileges(job: Job) -> None:
    """The worker's own: no capabilities, and under root a user that owns nothing and has no other processes."""
    _on_linux(_PR_SET_NO_NEW_PRIVS, 1)
    if os.getuid() == 0 and not job.get("own_user_namespace"):
        _on_linux(_PR_SET_KEEPCAPS, 1)
        for user in (1_900_000_000 + int(job["number"]) % 65536, _NOBODY):  # the first may not be mapped in a container
            with contextlib.suppress(OSError):
                os.setgroups([])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
                break
    if sys.platform != "linux":
        return
    may_read = 1 << _CAP_DAC_READ_SEARCH
    _set_capabilities(0, may_read)
    try:
        with open(ast.__file__, "rb"):
            _set_capabilities(0, 0)
    except OSError:  # Python itself lies where only root can read
        _set_capabilities(may_read, may_read)


def _set_capabilities(effective: int, permitted: int) -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _libc().capset(header, (ctypes.c_uint32 * 6)(effective, permitted, 0, 0, 0, 0))


def _set_limits(job: Job) -> None:
    limits = job["limits"]
    others = 0 if os.getuid() == 0 else _tasks_of_user()
    for kind, limit in (
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NOFILE", limits["files"]),
        ("RLIMIT_FSIZE", limits["output"]),
        ("RLIMIT_CPU", int(limits["seconds"]) + 1),
        ("RLIMIT_NPROC", others + limits["processes"]),
        ("RLIMIT_AS", limits["memory"]),
    ):
        number = getattr(resource, kind, None)
        if number is not None:
            with contextlib.suppress(ValueError, OSError):  # above a hard limit that is there already
                resource.setrlimit(number, (limit, limit))


def _tasks_of_user() -> int:
    """Processes and threads of this user that can be seen; none of the host's in a process namespace."""
    count = 4  # cell, keeper, worker, and one for luck
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                    count += len(os.listdir(f"/proc/{name}/task"))
    return count


# ---- the keeper ----


def _judge(job: Job, alone: bool) -> dict[str, Any]:
    if "cases" not in job:
        word = secrets.token_hex(16)
        return _verdict(job, _run(job, alone, lambda report: _run_tests(job, report, word)), word)
    inputs, expected = ([case[key] for case in job["cases"]] for key in ("input", "output"))
    job["cases"].clear()
    for number, text in enumerate(inputs):
        ended = _run_case(job, text, expected, alone)
        if ended["reason"] is None and ended["status"] == 0:
            same = _same_value if job["function"] else _same_text
            ended["reason"] = "passed" if same(ended["answer"], expected[number]) else "wrong"
        verdict = _verdict(job, ended, None)
        if not verdict["passed"]:
            return {**verdict, "detail": f"case {number + 1} of {len(inputs)}: {verdict['detail']}"}
    return {"passed": True, "reason": "passed", "detail": ""}


def _run_case(job: Job, text: str, expected: list[str], alone: bool) -> dict[str, Any]:
    def body(report: int) -> None:
        expected.clear()  # of the worker's own copy of memory
        if job["function"]:
            _call(job, text, report)
        else:
            _run_program(job)

    ended = _run(job, alone, body, stdin=b"" if job["function"] else text.encode())
    return {**ended, "answer": ended["report" if job["function"] else "output"]}


def _verdict(job: Job, ended: dict[str, Any], word: str | None) -> dict[str, Any]:
    reason, said = ended["reason"], ended["report"].decode(errors="replace")
    if reason is None and word is not None and said == word and ended["status"] == 0:
        reason = "passed"
    elif reason is None:
        reason = said.split(":")[0].removeprefix("!") if said.startswith("!") else "incomplete"
    detail = said.removeprefix("!") if said.startswith("!") else ended["output"][-300:].decode(errors="replace")
    return {"passed": reason == "passed", "reason": reason, "detail": "" if reason == "passed" else detail[:300]}


def _run(job: Job, alone: bool, body: Callable[[int], None], stdin: bytes = b"") -> dict[str, Any]:
    """Runs a worker to its end, or to the end of its time, and kills whatever it started."""
    limits = job["limits"]
    files = [_own_file(content) for content in (stdin, b"", b"")]
    worker = os.fork()
    if worker == 0:
        _work(job, files, body)
    deadline, status = time.monotonic() + limits["seconds"], None
    while status is None and time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                status = ended[1] if ended[0] == worker else status
        if status is None:
            time.sleep(0.002)
    others = _kill_all(worker, alone) and status is not None
    _, output, report = (_content(file, limits["output"]) for file in files)
    reason: str | None = None
    if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        reason = "timeout"
    elif os.WIFSIGNALED(status):
        reason = "killed"
    elif os.WEXITSTATUS(status) == _FORBIDDEN:
        reason = "forbidden"
    elif others:
        reason = "left processes behind"
    elif max(len(output), len(report)) >= limits["output"]:
        reason = "output"
    return {"reason": reason, "status": status, "output": output, "report": report}


def _own_file(content: bytes) -> int:
    """A file without a name, which a worker of another user can use through the descriptor."""
    name = f".{secrets.token_hex(8)}"
    descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(name)
    os.write(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _content(descriptor: int, limit: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with os.fdopen(descriptor, "rb") as file:
        return file.read(limit)


def _kill_all(worker: int, alone: bool) -> bool:
    """Kills every process below this one; whether there was any but the worker."""
    found = False
    if alone:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # all of the namespace but its first process, which this is
            found = True
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker, signal.SIGKILL)
        while below := _below(os.getpid()):
            found = found or bool(below - {worker})
            for pid in below:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            _reap()
            time.sleep(0.001)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    return found


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _below(root: int) -> set[int]:
    parents: dict[int, int] = {}
    with contextlib.suppress(OSError):  # no /proc on this system: the process group is all that is known
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                    parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
    below: set[int] = set()
    while new := {pid for pid, parent in parents.items() if parent in below | {root}} - below:
        below |= new
    return below


def _same_text(output: bytes, expected: str) -> bool:
    """Line by line without the space at their ends; words may differ where they are the same number."""
    found = output.decode(errors="replace").strip().split("\n")
    wanted = expected.strip().split("\n")
    return len(found) == len(wanted) and all(map(_same_line, found, wanted))


def _same_line(found: str, wanted: str) -> bool:
    pairs = list(zip(found.split(), wanted.split(), strict=False))
    return len(found.split()) == len(wanted.split()) and all(a == b or _same_number(a, b) for a, b in pairs)


def _same_number(a: str, b: str) -> bool:
    try:
        return decimal.Decimal(a) == decimal.Decimal(b)
    except decimal.InvalidOperation:
        return False


def _same_value(report: bytes, expected: str) -> bool:
    try:
        return bool(json.loads(report) == json.loads(expected))
    except ValueError:
        return False


# ---- the worker ----


def _work(job: Job, files: list[int], body: Callable[[int], None]) -> NoReturn:
    report = 3
    try:
        os.setsid()
        kept = [os.dup2(file, 10 + place) for place, file in enumerate(files)]  # out of each other's way
        for target, file in zip((0, 1, report), kept, strict=True):
            os.dup2(file, target)
        os.dup2(1, 2)
        os.closerange(report + 1, 1024)
        _set_limits(job)
        _drop_privileges(job)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  # stands in for the one that had the job
        sys.setrecursionlimit(10_000)
        if job["guard"]:
            sys.addaudithook(_guard(os.getcwd()))
        body(report)
        sys.stdout.flush()
        os._exit(0)
    except BaseException as error:
        _say(report, error)
    os._exit(1)


def _say(report: int, error: BaseException) -> None:
    with contextlib.suppress(BaseException):
        kind = {"AssertionError": "wrong", "MemoryError": "memory"}.get(type(error).__name__, "error")
        os.lseek(report, 0, os.SEEK_SET)
        os.write(report, f"!{kind}: {type(error).__name__}: {error}"[:300].encode(errors="replace"))


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module


def _run_program(job: Job) -> None:
    with contextlib.suppress(SystemExit):  # a program may end so; its output says whether it was right
        exec(compile(job["code"], _SAMPLE, "exec"), vars(_module("__main__")))


def _call(job: Job, text: str, report: int) -> None:
    arguments = [json.loads(line) for line in text.split("\n") if line.strip()]
    names = vars(_module("sample"))
    exec(compile(job["code"], _SAMPLE, "exec"), names)
    owner = names["Solution"]() if "Solution" in names else types.SimpleNamespace(**names)
    os.write(report, json.dumps(getattr(owner, job["function"])(*arguments)).encode())


def _run_tests(job: Job, report: int, word: str) -> None:
    """Runs the sample, then the tests among its names, with Python's own built-ins whatever the sample did to them."""
    tests = ast.fix_missing_locations(_CheckedCalls().visit(ast.parse(job["tests"])))
    compiled, write, run, known = compile(tests, "<tests>", "exec"), os.write, exec, vars(builtins)
    own = dict(known)
    module = _module("sample")
    run(compile(job["code"], _SAMPLE, "exec"), vars(module))
    sys.settrace(None)
    sys.setprofile(None)
    known.clear()
    known.update(own)
    tested = job["function"]  # where it is not known, a name that hides a built-in may be it
    names = {k: v for k, v in vars(module).items() if k not in own or tested in (None, k)}
    run(compiled, names | {"__builtins__": own, _PLAIN: _plain})
    write(report, word.encode())


_PLAIN = "__plain"
_HARMLESS = {"__init__", "__new__", "__repr__", "__str__", "__hash__", "__iter__", "__next__", "__post_init__"}


class _CheckedCalls(ast.NodeTransformer):
    """Looks at what every call in the tests gives."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        return ast.Call(ast.Name(_PLAIN, ast.Load()), [node], [])


def _plain(value: Any) -> Any:
    """Refuses results that bring their own idea of being equal, true or small.

    Raises:
        TypeError: the sample wrote such a class.
    """
    held = [value]
    for item in held:
        if type(item) in (list, tuple, set, frozenset):
            held += item if len(held) < 10_000 else ()
        elif type(item) is dict:
            held += item.values() if len(held) < 10_000 else ()
        for kind in type(item).__mro__:
            for name, method in vars(kind).items():
                dunder = name.startswith("__") and name.endswith("__") and name not in _HARMLESS
                if dunder and getattr(getattr(method, "__code__", None), "co_filename", None) == _SAMPLE:
                    raise TypeError(f"a result of type {kind.__name__} that defines {name}")
    return value


def _guard(home: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook: it cannot be taken away by Python code, and ends a worker that reaches out of its folder."""
    never = {
        *("os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system", "subprocess.Popen", "pty.spawn"),
        *("os.killpg", "os.chroot", "os.chown", "os.chflags", "socket.connect", "socket.bind", "socket.sendto"),
        *("socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname", "resource.setrlimit", "resource.prlimit"),
    }
    writing = {
        *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink", "os.truncate"),
        *("os.utime", "os.setxattr", "os.removexattr", "shutil.rmtree", "shutil.move"),
    }
    inside, own = os.path.realpath(home), os.getpid()
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def outside(path: Any) -> bool:
        if isinstance(path, int):
            return False
        real = os.path.realpath(os.fsdecode(path))
        return real != inside and not real.startswith(inside + os.sep) and real != os.devnull

    def stop(event: str) -> None:
        with contextlib.suppress(OSError):
            os.lseek(3, 0, os.SEEK_SET)
            os.write(3, f"!forbidden: {event}".encode())
        os._exit(_FORBIDDEN)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            reaches = isinstance(flags, int) and flags & writes and outside(path)
            if reaches or (isinstance(path, str | bytes) and os.fsdecode(path).startswith("/proc/")):
                stop(f"open {path!r}")
            return
        elsewhere = event in writing and any(isinstance(a, str | bytes | os.PathLike) and outside(a) for a in arguments)
        if elsewhere or event in never or (event == "os.kill" and arguments[0] != own):
            stop(event)

    return hook


if __name__ == "__main__":
    main()
