"""What a process does to itself before it runs code that nobody has read. A program of its own, standard library only.

`python -I jail.py ROLE JOB`: JOB is JSON, see `sandbox._command`. Namespaces of its own for users, mounts, processes,
IPC, network and host name; a root that holds the Python installation, read-only, and a /tmp of limited size and nothing
else; no capability and no way to a new one; limits of the system; a filter on system calls that allows threads and no
new process or program. Then it plays its role: see `playing` and `judging`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import platform
import resource
import signal
import struct
import sys
import types
from typing import Any

NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x08000000 | 0x40000000 | 0x04000000  # user mount pid ipc net uts
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
DETACH = 2  # MNT_DETACH
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
NOBODY = 65534
DEVICES = ("null", "zero", "full", "random", "urandom")

libc = ctypes.CDLL(None, use_errno=True)

# Numbers of system calls: x86-64, and the table that newer architectures share. Refused: new processes and programs
# (threads are made by `clone`, looked at below), other processes' memory, mounts and namespaces, kernel interfaces.
CLONE, CLONE3, CLONE_THREAD = {"x86_64": 56, "aarch64": 220}, 435, 0x00010000
NEWER = (  # numbers that all architectures share
    *(428, 429, 430, 431, 432, 433, 442),  # open_tree, move_mount, fsopen, fsconfig, fsmount, fspick, mount_setattr
    *(425, 426, 427),  # io_uring_setup, _enter, _register: whose work no filter sees
    *(424, 434, 438),  # pidfd_send_signal, pidfd_open, pidfd_getfd
)
REFUSED = {
    "x86_64": (
        *(57, 58, 59, 322, 134),  # fork, vfork, execve, execveat, uselib
        *(101, 310, 311, 312),  # ptrace, process_vm_readv, process_vm_writev, kcmp
        *(165, 166, 155, 161, 272, 308),  # mount, umount2, pivot_root, chroot, unshare, setns
        *(175, 313, 176),  # init_module, finit_module, delete_module
        *(246, 320, 169),  # kexec_load, kexec_file_load, reboot
        *(321, 298, 323),  # bpf, perf_event_open, userfaultfd
        *(248, 249, 250, 103),  # add_key, request_key, keyctl, syslog
        *(167, 168, 163),  # swapon, swapoff, acct
        *(303, 304),  # name_to_handle_at, open_by_handle_at: files by number, past the root
        *NEWER,
    ),
    "aarch64": (  # the same; it has no fork, vfork and uselib
        *(221, 281),
        *(117, 270, 271, 272),
        *(40, 39, 41, 51, 97, 268),
        *(105, 273, 106),
        *(104, 294, 142),
        *(280, 241, 282),
        *(217, 218, 219, 116),
        *(224, 225, 89),
        *(264, 265),
        *NEWER,
    ),
}
SOCKET, FAMILIES = {"x86_64": 41, "aarch64": 198}, (1, 2, 10)  # UNIX, INET, INET6
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


class Refused(Exception):
    """The system does not permit this level of isolation."""


def call(name: str, *arguments: object) -> None:
    """A function of the C library; raises Refused where it fails."""
    if getattr(libc, name)(*arguments) != 0:
        raise Refused(f"{name}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2)."""
    texts = (source.encode(), target.encode(), kind.encode() if kind else None)
    call("mount", *texts, ctypes.c_ulong(flags), options.encode() if options else None)


def enter(job: dict[str, Any]) -> None:
    """Move into namespaces of our own with a root of our own; returns in a process inside.

    The process that called stays outside and waits; as the first process inside ends, or is killed with the one
    outside, the kernel ends everything inside, daemons too. Raises Refused where the system does not permit it.
    """
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", NAMESPACES)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)
    new_root(job["root"], job["visible"], job["limits"]["disk_megabytes"])
    fork_and_wait()  # the first process of the new process namespace goes on
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    # Some containers forbid a /proc of one's own; programs rarely need one, and none is safer than another's.
    # Read-only, because the kernel's settings in it belong to user 0, who may be us outside.
    with contextlib.suppress(Refused):
        mount("proc", job["root"] + "/proc", "proc", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(job["root"])
    # Not chroot, which root could leave again: nothing of the old tree may stay reachable by any name.
    # pivot_root(".", "."): the old root ends on top of the new one. The C library has no name for it.
    call("syscall", ctypes.c_long({"x86_64": 155, "aarch64": 41}[platform.machine()]), b".", b".")
    call("umount2", b".", DETACH)  # the old root, which now lies over the new one
    os.chdir("/tmp")
    fork_and_wait()  # signals with their usual action, such as SIGXCPU, do nothing to a namespace's first process


def fork_and_wait() -> None:
    """Returns in a child; this process waits for it and ends with its code, 128 more than a signal's as in a shell."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)


def new_root(root: str, visible: list[str], megabytes: int) -> None:
    """A tree of our own at `root`: `visible` read-only at their own names, some devices, an empty /tmp."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)  # nothing that is mounted here is seen outside
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.makedirs(root + "/tmp")  # first: a Python that lives below /tmp is mounted into it
    mount("tmpfs", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={megabytes}m,nr_inodes=4096,mode=1777")
    for path in visible:
        target = root + path
        if os.path.islink(path):  # /lib -> usr/lib
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if not os.path.lexists(target):
                os.symlink(os.readlink(path), target)
        elif os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
            mount(path, target, None, MS_BIND | MS_REC)
        elif os.path.isfile(path):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            open(target, "w").close()
            mount(path, target, None, MS_BIND)
    for name in ("proc", "dev"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    for name in DEVICES:
        open(f"{root}/dev/{name}", "w").close()
        mount(f"/dev/{name}", f"{root}/dev/{name}", None, MS_BIND)
    for place in mounted_below(root):
        if place == root + "/tmp":
            continue
        # A bind takes no flags when it is made, and may not lose those that it inherited.
        kept = os.statvfs(place).f_flag & (MS_NODEV | MS_NOEXEC | 1024 | 2048)
        kept |= 1 << 21 if os.statvfs(place).f_flag & 4096 else 0  # ST_RELATIME -> MS_RELATIME
        device = MS_NODEV if not place.startswith(root + "/dev/") else 0
        mount("none", place, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | device | kept)


def mounted_below(root: str) -> list[str]:
    """Every mount point at or below `root`, submounts of what was bound included."""
    with open("/proc/self/mountinfo") as f:
        places = [line.split()[4].encode().decode("unicode_escape") for line in f]
    return [place for place in dict.fromkeys(places) if place == root or place.startswith(root + "/")]


def set_limits(limits: dict[str, Any]) -> None:
    """Limits that the system keeps. One that it lacks (address space on macOS) is left out."""
    megabyte = 1 << 20
    wanted = {
        "RLIMIT_CPU": max(1, round(limits["seconds"])),
        "RLIMIT_AS": limits["megabytes"] * megabyte,
        "RLIMIT_FSIZE": limits["file_megabytes"] * megabyte,
        "RLIMIT_NOFILE": limits["files"],
        "RLIMIT_CORE": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_MEMLOCK": 0,
    }
    for name, value in wanted.items():
        number = getattr(resource, name, None)
        if number is not None:
            hard = resource.getrlimit(number)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            try:  # one more second before the kill: SIGXCPU says why the program ended
                resource.setrlimit(number, (value, value + (name == "RLIMIT_CPU" and hard != value)))
            except (ValueError, OSError):
                continue


def give_up_privileges() -> None:
    """No capability now, and none after any system call: not by running a set-uid program either."""
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header, nothing = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    libc.capset(header, nothing)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def filter_calls() -> None:
    """The filter on system calls (seccomp, a program of classic BPF). Raises Refused for an unknown architecture."""
    machine = platform.machine()
    if machine not in REFUSED or sys.maxsize < 1 << 32:
        raise Refused(f"no filter for {machine}")
    # Lines are (operation, lines to skip if true, if false, value). What is looked at: from byte 0 the call's number,
    # from 4 the architecture, from 16 its first argument. The first `back` that is reached decides.
    load, equal, masked, back = 0x20, 0x15, 0x45, 0x06
    allow, kill, refuse, absent = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
    lines = [(load, 0, 0, 4), (equal, 1, 0, AUDIT[machine]), (back, 0, 0, kill), (load, 0, 0, 0)]
    if machine == "x86_64":  # calls of the x32 table have numbers of their own
        lines += [(0x35, 0, 1, 0x40000000), (back, 0, 0, kill)]
    for number in REFUSED[machine]:
        lines += [(equal, 0, 1, number), (back, 0, 0, refuse)]
    lines += [(equal, 0, 1, CLONE3), (back, 0, 0, absent)]  # its flags lie in memory: the library falls back to clone
    # Families that no namespace confines (VSOCK reaches the machine around a virtual one) or that programs do not need.
    families = [(equal, 3 - i, 0, family) for i, family in enumerate(FAMILIES)]
    lines += [(equal, 0, 6, SOCKET[machine]), (load, 0, 0, 16), *families, (back, 0, 0, refuse), (load, 0, 0, 0)]
    lines += [(equal, 0, 3, CLONE[machine]), (load, 0, 0, 16), (masked, 1, 0, CLONE_THREAD), (back, 0, 0, refuse)]
    code = b"".join(struct.pack("=HBBI", *line) for line in [*lines, (back, 0, 0, allow)])
    memory = ctypes.create_string_buffer(code)

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    # `memory` must live until the kernel has copied it.
    program = Program(len(code) // 8, ctypes.addressof(memory))
    call("prctl", PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0)


def main() -> None:
    role, job = sys.argv[1], json.loads(sys.argv[2])
    # Loaded before the root is another one; the package itself is more than a jail needs.
    package = types.ModuleType("mftmerge")
    package.__path__ = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    sys.modules["mftmerge"] = package
    roles = {"program": "playing", "tests": "judging"}
    play = getattr(importlib.import_module(f"mftmerge.evaluate.{roles[role]}"), role) if role in roles else None
    try:
        if job["level"] == "namespaces":
            enter(job)
        if job["level"] != "none":
            os.environ.clear()
            os.environ.update(PATH="/usr/bin:/bin", HOME="/tmp", TMPDIR="/tmp", PYTHONHASHSEED="0", OMP_NUM_THREADS="1")
            os.environ.update(OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
            if not os.access("/tmp", os.W_OK):
                raise Refused("/tmp cannot be written")
            set_limits(job["limits"])
            give_up_privileges()
            filter_calls()
        else:
            set_limits(job["limits"])
    except (Refused, OSError, AttributeError, KeyError) as e:
        print(f"refused: {e}", flush=True)
        os._exit(3)
    if role == "probe":
        print("holds", flush=True)
        os._exit(0)
    assert play is not None
    play(job)
    os._exit(0)


if __name__ == "__main__":
    main()
