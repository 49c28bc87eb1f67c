"""The process in which untrusted code runs, and what that process gives up before the code starts.

`rewards.sandbox` runs this file as a script; nothing else imports it, and it imports nothing that is slow.

    sandbox ── starts ──► this script: new namespaces
                              │ fork
                              ├─► child, process 1 of its namespace: file system, limits, Landlock, seccomp,
                              │       then it becomes the interpreter that runs the code (exec)
                              └── waits for the child, kills it when its CPU time is used up, and reports how it ended

    descriptor 0   what the code reads as standard input        1, 2   what it prints
               3   a pipe on which the code may report          4      the code
    STATUS         JSON lines for the sandbox: the child's process id; the layers in force, or why there are not
                   enough of them; exit code, and whether its CPU time was used up. The code does not inherit it.

    layer        what it takes away                                             needs
    namespaces   other processes, network interfaces, System V memory; and      unprivileged user namespaces
                 it gives a small file system of its own to write to
    landlock     every file but the interpreter's and that file system          Linux 5.13
    seccomp      sockets, new processes, signals to others, ptrace, mount,      x86-64 or ARM64
                 modes and times of files, memory beyond the limit ...

Limits on memory, CPU time, file size, open files and core dumps, and an environment without the host's variables, hold
in every case. If this process or its parent is killed, the kernel kills the child (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import struct
import sys
import time
from typing import Any

NAMESPACES, LANDLOCK, SECCOMP = "namespaces", "landlock", "seccomp"
REPORT, SOURCE = 3, 4  # descriptors of the code
SCRATCH_PLACES = ("/tmp", "/mnt", "/srv")  # the first that does not hold the interpreter is hidden by a file system
MAX_INODES = 1024
LOOK_EVERY_MS = 50  # whether the CPU time is used up

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS = 1, 22, 28, 38
_NEW_NAMESPACES = (
    0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
)  # mnt uts ipc user pid net
_MS_PRIVATE_EVERYWHERE, _MS_NOSUID_NODEV = (1 << 14) | (1 << 18), 2 | 4
_CLONE_THREAD = 0x10000
# uid 0 has no capabilities after exec, and cannot get that changed (see capabilities(7)).
_NO_ROOT = 0b1111
_CPUCLOCK_SCHED = 2  # of clock_gettime(2), with the complement of a process id: the time that it ran, to the nanosecond

libc = ctypes.CDLL(None, use_errno=True)


class Unavailable(Exception):
    """A layer that this machine does not offer."""


def main() -> None:
    settings = json.loads(sys.argv[1])
    settings["status"] = arranged(*settings["descriptors"])
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    missing: dict[str, str] = {}
    try:
        if NAMESPACES in settings["without"]:
            raise Unavailable("switched off")
        enter_namespaces()
    except Unavailable as why:
        missing[NAMESPACES] = str(why)
    child = os.fork()
    if child == 0:
        confine_and_run(settings, missing)
    status = settings["status"]
    os.closerange(0, SOURCE + 1)  # so that their readers see the end when the child ends
    say(status, pid=child)
    at_cpu_limit = waited_for(child, settings["cpu_s"])
    _, code = os.waitpid(child, 0)
    say(status, code=os.waitstatus_to_exitcode(code), at_cpu_limit=at_cpu_limit)


def waited_for(child: int, cpu_s: float) -> bool:
    """Until it has ended. Whether it had used up its CPU time, at which it is killed here: RLIMIT_CPU is compared with
    ticks, which on a busy machine count up to half as much again as was used. A process that the kernel ended for it
    could not be told from one that somebody killed."""
    clock = ~child << 3 | _CPUCLOCK_SCHED
    end = select.poll()
    end.register(os.pidfd_open(child), select.POLLIN)
    while True:
        has_ended = end.poll(LOOK_EVERY_MS)
        used_up = time.clock_gettime(clock) >= cpu_s  # of a process that has ended, too
        if has_ended:
            return used_up
        if used_up:
            os.kill(child, signal.SIGKILL)


def arranged(report: int, source: int, status: int) -> int:
    """The descriptors as the drawing has them, whatever their numbers were; the number of `status`, closed by exec."""
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, SOURCE + 1) for descriptor in (report, source, status)]
    for descriptor in (report, source, status):
        os.close(descriptor)
    for descriptor, place in zip(moved, (REPORT, SOURCE), strict=False):
        os.dup2(descriptor, place)
        os.close(descriptor)
    return moved[2]


def confine_and_run(settings: dict[str, Any], missing: dict[str, str]) -> None:
    """Never returns."""
    status = settings["status"]
    try:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        scratch = None if NAMESPACES in missing else scratch_file_system(settings)
        if scratch is None and os.geteuid() == 0:
            drop_root()
        limit_resources(settings)
        for layer, apply in ((LANDLOCK, lambda: forbid_files(settings, scratch)), (SECCOMP, forbid_calls)):
            try:
                if layer in settings["without"]:
                    raise Unavailable("switched off")
                apply()
            except Unavailable as why:
                missing[layer] = str(why)
        refused = {layer: why for layer, why in missing.items() if layer not in settings["without"]}
        say(status, missing=refused, layers=[name for name in (NAMESPACES, LANDLOCK, SECCOMP) if name not in missing])
        if not refused:
            os.chdir(scratch or "/")
            environment = {"HOME": scratch or "/", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "PATH": ""}
            if scratch:
                environment["TMPDIR"] = scratch
            os.execve(settings["interpreter"], [settings["interpreter"], *settings["arguments"]], environment)
    except BaseException as error:  # whatever it is, the code must not run, and the sandbox must hear of it
        say(status, error=f"{type(error).__name__}: {error}")
    os._exit(1)


def say(descriptor: int, **what: object) -> None:
    os.write(descriptor, json.dumps(what).encode() + b"\n")


# --- namespaces


def enter_namespaces() -> None:
    """The next fork is process 1 of its own namespace. Inside, this user is nobody, with rights over nothing else."""
    if sys.platform != "linux":
        raise Unavailable(f"{sys.platform} has none")
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_NEW_NAMESPACES):
        raise Unavailable(f"unshare: {reason()}")
    for file, text in (("setgroups", "deny"), ("uid_map", f"65534 {uid} 1"), ("gid_map", f"65534 {gid} 1")):
        with open(f"/proc/self/{file}", "w") as mapping:
            mapping.write(text)


def scratch_file_system(settings: dict[str, Any]) -> str:
    """A small file system in memory over a folder of the host, visible to this process alone."""
    used = [os.path.realpath(path) for path in (settings["interpreter"], *settings["readable"])]
    place = next(place for place in SCRATCH_PLACES if not any(path.startswith(f"{place}/") for path in used))
    if libc.mount(None, b"/", None, ctypes.c_ulong(_MS_PRIVATE_EVERYWHERE), None):
        raise OSError(f"mount private: {reason()}")
    options = f"size={settings['disk_bytes']},nr_inodes={MAX_INODES},mode=0700".encode()
    if libc.mount(b"tmpfs", place.encode(), b"tmpfs", ctypes.c_ulong(_MS_NOSUID_NODEV), options):
        raise OSError(f"mount tmpfs: {reason()}")
    return place


def drop_root() -> None:
    """Outside a user namespace, root's capabilities would survive exec."""
    if sys.platform == "linux" and libc.prctl(_PR_SET_SECUREBITS, _NO_ROOT, 0, 0, 0):
        raise OSError(f"root's capabilities cannot be dropped: {reason()}; run as another user")


def limit_resources(settings: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_CPU: 2 * int(settings["cpu_s"] + 1),  # should `waited_for` be held up; in ticks, see there
        resource.RLIMIT_AS: settings["memory_bytes"],
        resource.RLIMIT_FSIZE: settings["disk_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        _, hard = resource.getrlimit(kind)
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, least))


# --- Landlock: https://docs.kernel.org/userspace-api/landlock.html

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # of every architecture
_READ = 0b1101  # execute, read a file, read a folder
_OF_FILES = 0b111 | 1 << 14 | 1 << 15  # the rights that exist for something that is no folder
_RIGHTS_SINCE = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}


def forbid_files(settings: dict[str, Any], scratch: str | None) -> None:
    """From here on only what is `readable` can be opened; only the scratch file system can be written to."""
    version = libc.syscall(_CREATE_RULESET, None, 0, 1) if sys.platform == "linux" else -1
    if version < 1:
        raise Unavailable(f"no Landlock: {reason()}")
    handled = sum(rights for since, rights in _RIGHTS_SINCE.items() if version >= since)
    network, scoped = (3 if version >= 4 else 0), (3 if version >= 6 else 0)  # TCP; abstract sockets and signals
    attributes = struct.pack("QQQ", handled, network, scoped)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = checked(libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0), "landlock_create_ruleset")
    writable = ["/dev/null", *([scratch] if scratch else [])]
    for paths, rights in ((settings["readable"], _READ), (writable, handled)):
        for path in paths:
            if os.path.exists(path):
                here = os.open(path, os.O_PATH | os.O_CLOEXEC)
                granted = rights if os.path.isdir(path) else rights & _OF_FILES & handled
                rule = struct.pack("=Qi", granted & handled, here)
                checked(libc.syscall(_ADD_RULE, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
                os.close(here)
    checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    checked(libc.syscall(_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


# --- seccomp: https://docs.kernel.org/userspace-api/seccomp_filter.html

# Numbers of system calls on x86-64 and ARM64; "-": that machine has no such call.
_FORBIDDEN = """
socket 41 198, fork 57 -, vfork 58 -, ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271,
tkill 200 130, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240,
pidfd_open 434 434, pidfd_send_signal 424 424, pidfd_getfd 438 438, setsid 112 157, setpgid 109 154,
setpriority 141 140, ioprio_set 251 30, sched_setaffinity 203 122, sched_setscheduler 144 119,
sched_setparam 142 118, sched_setattr 314 274, migrate_pages 256 238, move_pages 279 239,
chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -, lchown 94 -, fchown 93 55, fchownat 260 54,
utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, truncate 76 45, sync 162 81,
setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16,
setxattrat 463 463, removexattrat 466 466, name_to_handle_at 303 264, open_by_handle_at 304 265,
shmget 29 194, msgget 68 186, semget 64 190, mq_open 240 180, memfd_create 319 279, memfd_secret 447 447,
mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, unshare 272 97, setns 308 268, move_mount 429 429,
open_tree 428 428, fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442,
bpf 321 280, perf_event_open 298 241, io_uring_setup 425 425, userfaultfd 323 282, fanotify_init 300 262,
keyctl 250 219, add_key 248 217, request_key 249 218, kexec_load 246 104, kexec_file_load 320 294,
init_module 175 105, finit_module 313 273, delete_module 176 106, reboot 169 142, swapon 167 224, swapoff 168 225,
sethostname 170 161, setdomainname 171 162, acct 163 89, quotactl 179 60, settimeofday 164 170, clock_settime 227 112,
adjtimex 159 171, clock_adjtime 305 266, syslog 103 116, personality 135 92, iopl 172 -, ioperm 173 -
"""
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the table, AUDIT_ARCH_*
_CLONE, _CLONE3, _KILL, _TGKILL, _PRLIMIT = (56, 220), (435, 435), (62, 129), (234, 131), (302, 261)
_FOREIGN_X32 = 0x40000000  # calls of another ABI of x86-64, with the same AUDIT_ARCH
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_SET, _ANSWER = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENT_0, _ARGUMENT_1 = 0, 4, 16, 24  # offsets in `struct seccomp_data`, lower halves
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def forbid_calls() -> None:
    """From here on the calls in the table fail with EPERM. New threads are allowed, new processes are not."""
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in _MACHINES:
        raise Unavailable(f"no table of system calls for {sys.platform} on {machine}")
    column, architecture = _MACHINES[machine]
    rows = [row.split()[1:] for row in _FORBIDDEN.split(",")]
    numbers = [int(row[column]) for row in rows if row[column] != "-"]
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_IF_EQUAL, 1, 0, architecture),
        (_ANSWER, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
        *for_call(None, [(_IF_AT_LEAST, 0, 1, _FOREIGN_X32), refuse(_EPERM)]),
        *for_call(
            _CLONE3[column], [refuse(_ENOSYS)]
        ),  # its flags are out of a filter's sight; glibc falls back to clone
        *for_call(_CLONE[column], [(_LOAD, 0, 0, _ARGUMENT_0), (_IF_SET, 1, 0, _CLONE_THREAD), refuse(_EPERM)]),
        # Signals go to this process only, and not SIGKILL: so a child that was killed, was killed by the host.
        *(part for call in (_KILL, _TGKILL) for part in for_call(call[column], only_to_itself())),
        *for_call(_PRLIMIT[column], [(_LOAD, 0, 0, _ARGUMENT_0), (_IF_EQUAL, 1, 0, 0), refuse(_EPERM)]),
        *(part for number in numbers for part in for_call(number, [refuse(_EPERM)])),
        (_ANSWER, 0, 0, _ALLOW),
    ]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in program))
    pointer = struct.pack("HxxxxxxP", len(program), ctypes.addressof(packed))
    checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if libc.prctl(_PR_SET_SECCOMP, 2, pointer, 0, 0):
        raise Unavailable(f"seccomp: {reason()}")


def for_call(number: int | None, then: list[Instruction]) -> list[Instruction]:
    """`then` for one system call, whose number is loaded before and after; None: `then` for any."""
    if number is None:
        return then
    body = [*then, (_ANSWER, 0, 0, _ALLOW)]
    return [(_IF_EQUAL, 0, len(body), number), *body]


def only_to_itself() -> list[Instruction]:
    return [
        (_LOAD, 0, 0, _ARGUMENT_0),
        (_IF_EQUAL, 1, 0, os.getpid()),
        refuse(_EPERM),
        (_LOAD, 0, 0, _ARGUMENT_1),
        (_IF_EQUAL, 0, 1, signal.SIGKILL),
        refuse(_EPERM),
    ]


def refuse(errno: int) -> Instruction:
    return (_ANSWER, 0, 0, _ERRNO | errno)


def checked(answer: int, what: str) -> int:
    if answer < 0:
        raise OSError(f"{what}: {reason()}")
    return answer


def reason() -> str:
    return os.strerror(ctypes.get_errno())


if __name__ == "__main__":
    main()
