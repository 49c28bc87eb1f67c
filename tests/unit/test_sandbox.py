"""What generated code may try, and that it gets nowhere: each attack is real, and shows the error that stopped it.

Each is bounded, or touches only files of the test, or sends signal 0: it does no harm where the sandbox is broken.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from actors.errors import ConfigError
from rewards.sandbox import LAYERS, Ending, Execution, Limits, Sandbox, SandboxFailure
from tests.waiting import ended

FULL = Sandbox(Limits(cpu_s=2, deadline_s=15, memory_mib=256, disk_mib=4, output_kib=16))
WEAKER = Sandbox(FULL.limits, without=["namespaces"])
BOTH = pytest.mark.parametrize("sandbox", [FULL, WEAKER], ids=["full", "no-namespaces"])
SYSCALL = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
ATTEMPT = """
import sys
def attempt(act):
    try:
        print("DONE", act())
    except BaseException as error:
        print(type(error).__name__, getattr(error, "errno", ""), flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def isolation():
    try:
        FULL.check()
    except ConfigError as error:
        pytest.skip(str(error))


def attempts(sandbox: Sandbox, *expressions: str, before: str = "") -> list[str]:
    """By which error each was stopped; `DONE ...` if it was not."""
    lines = [f"attempt(lambda: {expression})" for expression in expressions]
    found = sandbox.run("\n".join([before, ATTEMPT, *lines]))
    assert found.ending is Ending.EXITED and found.exit_code == 0, found
    return found.stdout.splitlines()


def test_code_that_does_nothing_wrong_runs_as_anywhere():
    code = (
        "import json, math, threading, asyncio\n"
        "open('note', 'w').write('kept')\n"
        "thread = threading.Thread(target=print, args=('from a thread',)); thread.start(); thread.join()\n"
        "async def add(): await asyncio.sleep(0); return math.comb(5, 2)\n"
        "print(json.dumps([open('note').read(), asyncio.run(add()), input(), __name__]))\n"
        "import sys; print('aside', file=sys.stderr); exit(3)\n"
    )
    found = FULL.run(code, stdin="given\n")
    assert found.stdout == 'from a thread\n["kept", 10, "given", "__main__"]\n'
    assert (found.stderr, found.exit_code, found.ending, found.layers) == ("aside\n", 3, Ending.EXITED, LAYERS)


def test_an_error_is_shown_with_its_line():
    found = FULL.run("def half(x):\n    return x / 0\nhalf(1)")
    assert found.exit_code == 1 and "return x / 0" in found.stderr and "ZeroDivisionError" in found.stderr


@BOTH
def test_no_process_can_be_started(sandbox: Sandbox):
    bomb = "[os.fork() for _ in range(3)]"
    shell = "__import__('subprocess').run(['/bin/sh', '-c', 'echo'])"
    spawn = "os.posix_spawn('/bin/sh', ['sh'], {})"
    assert attempts(sandbox, bomb, shell, spawn, "os.execv('/bin/sh', ['sh'])", before="import os") == [
        "PermissionError 1",
        "PermissionError 1",
        "PermissionError 1",
        "PermissionError 13",
    ]


def test_threads_without_end_meet_the_memory_limit():
    bomb = (
        "import os, threading, time\n"
        "try:\n"
        "    for _ in range(500): threading.Thread(target=time.sleep, args=(9,)).start()\n"
        "except RuntimeError as error:\n"
        "    os.write(1, str(error).encode()); os._exit(0)\n"
    )
    found = FULL.run(bomb)
    assert (found.stdout, found.exit_code) == ("can't start new thread", 0)


@BOTH
def test_memory_is_limited_however_it_is_asked_for(sandbox: Sandbox):
    found = attempts(
        sandbox,
        "bytearray(2**30)",
        "[bytearray(2**20) for _ in range(600)]",
        "os.memfd_create('more')",
        "(libc.shmget(0, 2**20, 0o1600), ctypes.get_errno())",
        "resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))",
        before=SYSCALL + "import os, resource",
    )
    assert found == ["MemoryError ", "MemoryError ", "PermissionError 1", "DONE (-1, 1)", "ValueError "]


def test_the_disk_cannot_be_filled():
    fill = "[open(str(i), 'wb').write(bytes(2**18)) for i in range(40)]"
    count = "sum(os.stat(f).st_size for f in os.listdir('.'))"
    full, size = attempts(FULL, fill, count, before="import os")
    assert full == "OSError 28" and 2**21 < int(size.split()[1]) <= 2**22
    assert attempts(FULL, "[open(str(i), 'w') for i in range(2000)]")[0] in ("OSError 28", "OSError 24")
    assert attempts(WEAKER, "open('x', 'w')", "open('/tmp/x', 'w')") == ["PermissionError 13"] * 2
    assert not Path("/tmp/0").exists()


@BOTH
def test_files_of_the_host_can_be_neither_read_nor_written_nor_changed(sandbox: Sandbox, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("password")
    mode, changed = secret.stat().st_mode, secret.stat().st_mtime_ns
    path = repr(str(secret))
    forbidden = [
        f"open({path}).read()",
        "open('/etc/passwd').read()",
        f"open({path}, 'w')",
        f"os.unlink({path})",
        f"os.rename({path}, {path} + '2')",
        f"os.link({path}, {path} + '2')",
        f"os.truncate({path}, 0)",
        f"os.chmod({path}, 0o777)",
        f"os.chown({path}, 1, 1)",
        f"os.utime({path}, (0, 0))",
        f"os.setxattr({path}, 'user.x', b'1')",
        f"os.mkdir({path} + '2')",
        "os.listdir('/')",
        "os.listdir('/proc')",
        "open('/dev/kmsg')",
        "os.chmod(sys.executable, os.stat(sys.executable).st_mode)",
    ]
    found = attempts(sandbox, *forbidden, before="import os")
    # Under /tmp, the host's files are not even there.
    assert all(line.split()[0] in ("PermissionError", "FileNotFoundError", "OSError") for line in found), found
    assert secret.read_text() == "password" and list(tmp_path.iterdir()) == [secret]
    assert (secret.stat().st_mode, secret.stat().st_mtime_ns) == (mode, changed)


@BOTH
def test_a_link_to_a_file_of_the_host_does_not_open_it(sandbox: Sandbox):
    follow = attempts(sandbox, "os.symlink('/etc/passwd', 'link')", "open('link').read()", before="import os")
    assert follow[1].split()[0] in ("PermissionError", "FileNotFoundError")
    assert (follow[0] == "DONE None") == (sandbox is FULL)


@BOTH
def test_the_hosts_variables_and_descriptors_are_not_there(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("API_KEY", "sk-secret")
    before = (
        "import os\n"
        "def opened():\n"
        "    found = []\n"
        "    for i in range(1024):\n"
        "        try: os.fstat(i); found.append(i)\n"
        "        except OSError: pass\n"
        "    return found\n"
    )
    lines = attempts(
        sandbox,
        "sorted(set(os.environ) - {'TMPDIR', 'LC_CTYPE'})",
        "open('/proc/self/environ').read()",
        "open(f'/proc/{os.getppid()}/environ').read()",
        "opened()",
        before=before,
    )
    assert lines == [
        "DONE ['HOME', 'LANG', 'OMP_NUM_THREADS', 'PATH']",
        "PermissionError 13",
        "PermissionError 13" if sandbox is WEAKER else "FileNotFoundError 2",
        "DONE [0, 1, 2, 3]",  # standard streams, and the pipe for reports
    ]


@BOTH
def test_there_is_no_network(sandbox: Sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = server.getsockname()
        found = attempts(
            sandbox,
            f"socket.create_connection({address}, 1)",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
            "socket.socket(socket.AF_UNIX)",
            "socket.socket(socket.AF_NETLINK)",
            "libc.syscall(425, 8, 0) and ctypes.get_errno()",  # io_uring_setup
            before=SYSCALL + "import socket",
        )
        assert found == [*["PermissionError 1"] * 4, "DONE 1"]
        with pytest.raises(TimeoutError):
            server.accept()


@BOTH
def test_other_processes_can_be_neither_killed_nor_traced(sandbox: Sandbox):
    own = os.getpid()
    found = attempts(
        sandbox,
        f"os.kill({own}, 0)",
        "os.kill(os.getppid(), 0)",
        "os.kill(-1, 0)",
        "os.kill(0, 0)",
        "os.kill(os.getpid(), 9)",
        "os.setsid()",
        f"os.pidfd_open({own})",
        f"(libc.ptrace(16, {own}, 0, 0), ctypes.get_errno())",
        f"(libc.process_vm_readv({own}, 0, 0, 0, 0, 0), ctypes.get_errno())",
        f"resource.prlimit({own}, resource.RLIMIT_NOFILE)",
        f"os.setpriority(os.PRIO_PROCESS, {own}, 0)",
        before=SYSCALL + "import os, resource",
    )
    assert found == [*["PermissionError 1"] * 7, *["DONE (-1, 1)"] * 2, *["PermissionError 1"] * 2]


@BOTH
def test_nothing_can_be_mounted_and_no_namespace_entered(sandbox: Sandbox):
    found = attempts(
        sandbox,
        "(libc.mount(b'none', b'/mnt', b'tmpfs', 0, None), ctypes.get_errno())",
        "(libc.unshare(0x10000000), ctypes.get_errno())",
        "os.chroot('/usr')",
        before=SYSCALL + "import os",
    )
    assert found == ["DONE (-1, 1)", "DONE (-1, 1)", "PermissionError 1"]


@pytest.mark.parametrize("descriptor", [1, 2, 3])
def test_output_without_end_is_cut(descriptor: int):
    found = FULL.run(f"import os\nwhile True: os.write({descriptor}, b'x' * 4096)")
    assert (found.ending, found.exit_code) == (Ending.OUTPUT_LIMIT, None)
    assert len((found.stdout, found.stderr, found.report.decode())[descriptor - 1]) == 16 * 1024


def test_a_loop_without_end_meets_the_limit_on_cpu_time():
    found = Sandbox(Limits(cpu_s=0.2)).run(
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    )
    assert (found.ending, found.exit_code) == (Ending.CPU_LIMIT, None)


def test_code_that_sleeps_meets_the_deadline_and_leaves_no_process():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    found = Sandbox(Limits(deadline_s=2)).run("print('begun', flush=True)\nimport time\ntime.sleep(1000)")
    assert (found.ending, found.stdout) == (Ending.DEADLINE, "begun\n")
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_a_crash_of_the_interpreter_is_the_codes_own():
    assert FULL.run("import ctypes; ctypes.string_at(0)").exit_code == -11
    assert (FULL.run("import os; os.abort()").exit_code or 0) < 0


def test_code_that_the_host_kills_is_a_failure_of_the_sandbox():
    def kill_it(pids: set[int]) -> None:
        os.kill(max(pids), 9)

    with pytest.raises(SandboxFailure, match="killed from outside"):
        while_it_runs(FULL, kill_it)


def test_if_the_process_that_runs_it_is_killed_the_code_dies_too(tmp_path: Path):
    command = "from rewards.sandbox import *; Sandbox(Limits(deadline_s=60)).run('import time; time.sleep(60)')"
    worker = subprocess.Popen([sys.executable, "-c", command])
    below = waited_for_children(psutil.Process(worker.pid), 2)
    worker.kill()
    worker.wait(timeout=10)
    until(lambda: all(map(ended, below)))


def test_a_machine_that_lacks_a_layer_is_refused_unless_the_recipe_does_without_it():
    """User namespaces are forbidden for real, in a namespace whose limit on them is 0."""
    if not shutil.which("unshare"):
        pytest.skip("no command `unshare`")
    forbid = ["unshare", "--user", "--map-root-user", "sh", "-c"]
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
    ask = "from rewards.sandbox import *\nprint(Sandbox(without={}).run('print(6 * 7)'))"

    def on_such_a_machine(without: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*forbid, script, sys.executable, ask.format(without)], capture_output=True, text=True)

    refused = on_such_a_machine([])
    assert "ConfigError: this machine cannot isolate generated code as asked: it lacks namespaces" in refused.stderr
    assert "without: [namespaces]" in refused.stderr and "42" not in refused.stdout
    allowed = on_such_a_machine(["namespaces"])
    assert "layers=('landlock', 'seccomp')" in allowed.stdout and r"stdout='42\n'" in allowed.stdout


def test_an_unknown_layer_is_an_error_that_names_the_nearest():
    with pytest.raises(ConfigError, match="no layer is called 'namespace'; did you mean namespaces"):
        Sandbox(without=["namespace"])


def while_it_runs(sandbox: Sandbox, act) -> Execution:
    """Run code that waits, and `act` on its processes meanwhile."""
    from threading import Thread

    before = {child.pid for child in psutil.Process().children(recursive=True)}

    def soon() -> None:
        until(lambda: interprets(psutil.Process()))
        act({child.pid for child in psutil.Process().children(recursive=True)} - before)

    thread = Thread(target=soon)
    thread.start()
    try:
        return sandbox.run("import time\ntime.sleep(60)")
    finally:
        thread.join(timeout=70)


def waited_for_children(process: psutil.Process, count: int) -> list[psutil.Process]:
    until(lambda: interprets(process) and len(process.children(recursive=True)) >= count)
    return process.children(recursive=True)


def interprets(process: psutil.Process) -> bool:
    """Whether a process below it has become the interpreter of the code: its last argument is no longer a JSON."""
    commands = [child.cmdline() for child in process.children(recursive=True)]
    return any(command and "_sitebuiltins" in command[-1] and command[-1][0] != "{" for command in commands)


def until(holds, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(psutil.NoSuchProcess):
            if holds():
                return
        assert time.monotonic() < deadline, "it did not come to hold"
        time.sleep(0.02)
