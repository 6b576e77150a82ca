#!/usr/bin/env python3
"""Runs a command as root on another Debian kernel: in a virtual machine (QEMU without KVM) with this machine's files.

    run_on_kernel.py 5.10 -- uname -a     its output as it comes, its exit status
    run_on_kernel.py --list               the kernels that Debian's mirror serves, and which are here

KERNEL is a series (5.10, 6.12, 7.x), a series with a flavour (6.12-rt, 6.12-generic; without: cloud) or a full release.
The guest's root is this machine's; what it writes stays in its memory and is lost. /tmp and /run start empty, but a
current directory below /tmp is there. lo is up; tracefs, debugfs, bpffs and cgroup2 are mounted; modules load by
themselves. It needs root and Debian 12 on amd64. Packages come through apt, which checks them, into
~/.cache/otel-tcppktlat/kernels; nothing is installed. Exit status 124: out of time; 125: the tool or the guest failed.
"""

import argparse
import contextlib
import fcntl
import lzma
import os
import pathlib
import re
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NoReturn

CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "otel-tcppktlat/kernels"
APT, TOOLS, KMOD = CACHE / "apt", CACHE / "tools", CACHE / "tools/bin/kmod"
SUITES = {
    "bookworm": "bookworm bookworm-backports trixie trixie-backports sid",
    "bookworm-security": "bullseye-security bookworm-security trixie-security",
}
# of backports: QEMU 7.2 panics 6.12 guests
QEMU = ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"]

INITRD_INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
for m in {modules}; do $b insmod /m/$m; done
$b mount -t virtiofs -o ro root /lower && $b mount -t tmpfs -o size=50% upper /rw && $b mkdir /rw/u /rw/w &&
$b mount -t overlay -o lowerdir=/lower,upperdir=/rw/u,workdir=/rw/w root /root && $b mount -t tmpfs run /root/run &&
$b mkdir /root/run/guest && $b mount -t virtiofs share /root/run/guest && $b mount -o move /dev /root/dev &&
$b mount -t proc proc /root/proc && $b cp $b /root/run && exec $b switch_root /root /run/busybox sh /run/guest/init
"""
INIT = """export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm /run/lock; mount -t devpts devpts /dev/pts; mount -t tmpfs shm /dev/shm
mount -t tracefs tracefs /sys/kernel/tracing; mount -t debugfs debugfs /sys/kernel/debug
mount -t bpf bpf /sys/fs/bpf; mount -t cgroup2 cgroup /sys/fs/cgroup
mkdir -p /lib/modules/{release}; mount --bind {folder}/lib/modules/{release} /lib/modules/{release}
[ -d {folder}/usr/src ] && mkdir -p /usr/src && mount --bind {folder}/usr/src /usr/src
[ -x /sbin/modprobe ] || {{
  cp {kmod} /sbin; for n in modprobe lsmod insmod rmmod modinfo; do ln -sf kmod /sbin/$n; done
}}
mkdir /run/cwd; mount --bind {cwd} /run/cwd; mount -t tmpfs -o mode=1777 tmp /tmp
[ -d {cwd} ] || {{ mkdir -p {cwd}; mount --bind /run/cwd {cwd}; }}
umount /run/cwd; rmdir /run/cwd
{extra}
ip link set lo up; /sbin/modprobe -q tun; echo guest >/proc/sys/kernel/hostname
read up _ </proc/uptime; echo "up after $up s" >/dev/console; >/run/guest/up
{last}
"""
LAST = """/usr/bin/setsid -w /bin/sh /run/guest/command </dev/null >>/run/guest/stdout 2>>/run/guest/stderr
echo $? >/run/guest/status.new; sync; mv /run/guest/status.new /run/guest/status
echo o >/proc/sysrq-trigger; sleep 60
"""
# Without what this machine's administrator has systemd do: no mounts, no services.
SYSTEMD = """: >/etc/fstab; echo guest >/etc/hostname; rm -r /etc/systemd/system
mkdir -p /etc/systemd/system /run/systemd/system
printf '[Service]\\nExecStart=/bin/sh /run/guest/last\\n' >/run/systemd/system/guest.service
exec /lib/systemd/systemd --unit=guest.service"""


def tell(message: str) -> None:
    print(f"run-on-kernel: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    tell(message)
    sys.exit(125)


def check(*command: object, **options: Any) -> str:
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, **options
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        fail(f"{command[0]}: " + next((line for line in lines if line.startswith("E:")), lines[-1]))
    return done.stdout


# --- packages ---


def apt(tool: str, *words: str, **options: Any) -> str:
    settings = {
        "Dir::Etc::sourcelist": APT / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Cache": APT,
        "Dir::State::lists": APT / "lists",
        "Dir::Cache::archives": APT / "archives",
        "Dir::Cache::srcpkgcache": "",
        "Dir::Cache::pkgcache": "pkgcache.bin",
        "APT::Sandbox::User": "root",
        "APT::Default-Release": "bookworm",
        "APT::Update::Error-Mode": "any",
        "Acquire::Languages": "none",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
    }
    return check(tool, "-qq", *(f"-o{key}={value}" for key, value in settings.items()), *words, **options)


def update_lists(again: bool) -> None:
    if (APT / "pkgcache.bin").exists() and not again:
        return
    tell("fetching Debian's package lists")
    plan = check("apt-get", "--print-uris", "update")
    own = {suite: uri for uri, suite in re.findall(r"^'(\S+)/dists/(\S+)/InRelease'", plan, re.M)}
    if missing := SUITES.keys() - own:
        fail(f"apt's sources lack {' and '.join(sorted(missing))}: this tool knows Debian 12 only")
    for folder in ("lists/partial", "archives/partial"):
        (APT / folder).mkdir(parents=True, exist_ok=True)
    key = "[arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
    lines = [f"deb {key} {own[name]} {suite} main\n" for name, suites in SUITES.items() for suite in suites.split()]
    (APT / "sources.list").write_text("".join(lines))
    apt("apt-get", "update")
    apt("apt-cache", "gencaches")


def unpack(packages: list[str], folder: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as debs:
        apt("apt-get", "download", *packages, cwd=debs)
        for deb in pathlib.Path(debs).glob("*.deb"):
            check("dpkg", "-x", deb, folder)


def fetch_tools() -> None:
    """QEMU, virtiofsd, busybox and kmod, with the libraries that this machine lacks."""
    if TOOLS.exists():
        return
    tell("fetching QEMU")
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        new, old = pathlib.Path(work, "new"), pathlib.Path(work, "old")
        plan = apt(
            "apt-get",
            "--simulate",
            "--no-install-recommends",
            "install",
            *(f"{p}/bookworm-backports" for p in QEMU),
            "libnuma1",
            "libseccomp2",
            "libcap-ng0",
            "zstd",
            "lz4",
        )
        unpack([f"{name}={version}" for name, version in re.findall(r"^Inst (\S+) \((\S+)", plan, re.M)], new)
        unpack(["busybox-static", "kmod"], new)
        unpack(["qemu-system-common/bookworm"], old)
        (old / "usr/lib/qemu/virtiofsd").rename(new / "virtiofsd")
        new.rename(TOOLS)


# --- kernels ---


def natural(release: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", release)]


def matching(name: str, releases: list[str]) -> list[str]:
    """The releases that `name` means, oldest first."""
    if not (parts := re.fullmatch(r"(\d+)\.(\d+|x)(?:-(cloud|rt|generic))?", name)):
        return [r for r in releases if r == name]
    minor, flavour = parts[2].replace("x", r"\d+"), {None: "-cloud", "generic": ""}.get(parts[3], f"-{parts[3]}")
    pattern = rf"{parts[1]}\.{minor}\.\d[\w.+]*(-\d[\w.]*)?{flavour}-amd64"
    return sorted((r for r in releases if re.fullmatch(pattern, r)), key=natural)


def served() -> list[str]:
    return re.findall(r"^linux-image-(\d+\.\d+\.\d.*-amd64)$", apt("apt-cache", "pkgnames", "linux-image-"), re.M)


def here() -> list[str]:
    return [path.parent.name for path in CACHE.glob("*/initrd")]


def show_list() -> None:
    releases = served()
    for name in sorted({r[: r.index(".", r.index(".") + 1)] for r in releases}, key=natural):
        for newest in matching(name, releases)[-1:]:
            ready = " ".join(r for r in here() if r.startswith(f"{name}."))
            print(f"{name:6} {newest:28} {ready and 'here: ' + ready}".rstrip())


def make_initrd(target: pathlib.Path, modules: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        root = pathlib.Path(work)
        for name in ("bin", "dev", "m", "root", "lower", "rw"):
            (root / name).mkdir()
        os.mknod(root / "dev/console", stat.S_IFCHR | 0o600, os.makedev(5, 1))
        shutil.copy(TOOLS / "bin/busybox", root / "bin")
        for path in map(pathlib.Path, modules):
            data = path.read_bytes()
            (root / "m" / path.name).write_bytes(lzma.decompress(data) if path.suffix == ".xz" else data)
        (root / "init").write_text(INITRD_INIT.format(modules=" ".join(map(os.path.basename, modules))))
        (root / "init").chmod(0o755)
        check("sh", "-c", f"find . | bin/busybox cpio -o -H newc >{shlex.quote(str(target))}.new", cwd=root)
    target.with_suffix(".new").rename(target)


def uncompressed(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage, which the guest would take long to decompress."""
    offset, length = struct.unpack_from("<II", image, 0x248)
    body = image[((image[0x1F1] or 4) + 1) * 512 + offset :][:length]
    if body.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor().decompress(body)
    tool = "zstd" if body.startswith(b"\x28\xb5\x2f\xfd") else "lz4"
    command = [shutil.which(tool) or TOOLS / "usr/bin" / tool, "-dcq"]
    return subprocess.run(command, input=body, capture_output=True).stdout  # it complains about the length that follows


def packages_of(package: str, pattern: str) -> list[str]:
    """The package, and those it depends on whose names match."""
    return [package, *re.findall(rf"^ *Depends: (linux-{pattern})$", apt("apt-cache", "depends", package), re.M)]


def fetch_kernel(release: str, headers: bool) -> None:
    folder = CACHE / release
    if not (folder / "initrd").exists():
        tell(f"fetching {release}")
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "usr/lib").mkdir(parents=True)
        (folder / "lib").symlink_to("usr/lib")
        unpack(packages_of(f"linux-image-{release}", r"(?:base|binary|modules)-\d.*"), folder)
        check("depmod", "-b", folder, release, executable=KMOD)
        image = next(p for p in [*folder.glob("boot/vmlinuz-*"), *folder.glob("usr/lib/modules/*/vmlinuz")])
        kernel = uncompressed(image.read_bytes())
        if not kernel.startswith(b"\x7fELF"):
            fail(f"cannot decompress {image}")
        (folder / "vmlinux").write_bytes(kernel)
        plan = "".join(
            check("modprobe", "-d", folder, "-S", release, "-D", module, executable=KMOD)
            for module in ("virtio_pci", "virtio_rng", "virtiofs", "overlay")
        )
        make_initrd(folder / "initrd", list(dict.fromkeys(re.findall(r"^insmod (\S+)", plan, re.M))))
    if headers and not (folder / "usr/src").exists():
        unpack(packages_of(f"linux-headers-{release}", "headers-.*-common.*"), folder)


# --- the guest ---


def run(a: argparse.Namespace, folder: pathlib.Path, stack: contextlib.ExitStack) -> int | None:
    """The command's exit status, or None if the guest did not come to it."""
    work = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="run-on-kernel-")))
    share, cwd, log = work / "share.d", shlex.quote(os.getcwd()), stack.enter_context(open(work / "log", "w+"))

    def start(*command: object, **options: Any) -> subprocess.Popen[bytes]:
        child: subprocess.Popen[bytes] = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *(str(word) for word in command)],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            **options,
        )
        stack.callback(child.wait)
        stack.callback(child.kill)
        return child

    def serve(tag: str, source: pathlib.Path, cache: str) -> list[str]:
        """Shares a folder with the guest; returns QEMU's options for it."""
        source.mkdir(parents=True, exist_ok=True)
        daemon = shlex.join(
            [
                f"{TOOLS}/virtiofsd",
                "-f",
                f"--socket-path={work}/{tag}",
                "-o",
                f"source={source},sandbox=chroot,cache={cache},log_level=warn",
            ]
        )
        mount = f"mount --rbind / {source} && mount -o remount,bind,ro {source} &&" if tag == "root" else ""
        child = start("unshare", "-m", "sh", "-c", f"{mount} exec {daemon}")
        while not (work / tag).exists():
            if child.poll() is not None:
                fail(f"virtiofsd: {(work / 'log').read_text().strip()}")
            time.sleep(0.005)
        return [
            "-chardev",
            f"socket,id={tag},path={work}/{tag}",
            "-device",
            f"vhost-user-fs-pci,chardev={tag},tag={tag},queue-size=1024",
        ]

    devices = serve("root", work / "root.d", "always") + serve("share", share, "auto")
    extra = []
    if a.no_btf:
        extra.append("mount -t tmpfs none /sys/kernel/btf")
    if a.out:
        devices += serve("out", a.out.resolve(), "auto")
        extra.append("mkdir -p {0}; mount -t virtiofs out {0}".format(shlex.quote(str(a.out.resolve()))))
    (share / "init").write_text(
        INIT.format(
            release=folder.name,
            folder=shlex.quote(str(folder)),
            cwd=cwd,
            kmod=shlex.quote(str(KMOD)),
            extra="\n".join(extra),
            last=SYSTEMD if a.systemd else "exec /bin/sh /run/guest/last",
        )
    )
    (share / "last").write_text(LAST)
    variables = "".join(
        f"export {k}={shlex.quote(v)}\n" for k, v in os.environ.items() if re.fullmatch(r"[A-Za-z_]\w*", k)
    )
    (share / "command").write_text(f"{variables}cd {cwd} && exec {shlex.join(a.command)}\n")
    pipes = [
        (stack.enter_context(open(share / name, "wb+")), getattr(sys, name).buffer) for name in ("stdout", "stderr")
    ]
    began = time.monotonic()
    qemu = start(
        TOOLS / "usr/bin/qemu-system-x86_64",
        "-L",
        TOOLS / "usr/share/qemu",
        "-L",
        TOOLS / "usr/share/seabios",
        *[
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-machine",
            "q35,memory-backend=mem",
            "-cpu",
            "max,-la57",
        ],
        *["-accel", "tcg,thread=multi,tb-size=1024", "-device", "virtio-rng-pci", "-smp"],
        a.smp,
        "-m",
        f"{a.memory}M",
        "-object",
        f"memory-backend-memfd,id=mem,size={a.memory}M,share=on",
        "-serial",
        f"file:{work}/console",
        *devices,
        "-kernel",
        folder / "vmlinux",
        "-initrd",
        folder / "initrd",
        "-append",
        "console=ttyS0 quiet panic=-1 mitigations=off nokaslr",
        env=os.environ | {"LD_LIBRARY_PATH": f"{TOOLS}/usr/lib/x86_64-linux-gnu:{TOOLS}/lib/x86_64-linux-gnu"},
    )
    over = False
    while not over:
        over = qemu.poll() is not None or (share / "status").exists()
        for source, stream in pipes:
            stream.write(source.read())
            stream.flush()
        if a.timeout and time.monotonic() - began > a.timeout:
            tell(f"out of time after {a.timeout:g} s")
            return 124
        time.sleep(0.02)
    status = int((share / "status").read_text()) if (share / "status").exists() else None
    if a.verbose or status is None:
        print(*(p.read_text(errors="replace") for p in (work / "console", work / "log") if p.exists()), file=sys.stderr)
        tell(f"{folder.name}, {time.monotonic() - began:.1f} s")
    if status is None and (share / "up").exists():
        fail("the guest ended without a result")
    return status


@contextlib.contextmanager
def cache_locked() -> Iterator[None]:
    """Nobody else fetches anything meanwhile."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prepare(name: str, headers: bool = False, update: bool = False) -> pathlib.Path:
    """Fetches what is missing of a kernel, QEMU and the rest; returns the kernel's folder, named by its release."""
    with cache_locked():
        update_lists(update)
        fetch_tools()
        if not (releases := matching(name, served() + here())):
            fail(f"there is no kernel {name}: see --list")
        fetch_kernel(releases[-1], headers)
        return CACHE / releases[-1]


def main() -> int:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] KERNEL -- COMMAND ARG...\n       %(prog)s --list",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--list", action="store_true", help="show the kernels")
    option("--update", action="store_true", help="fetch Debian's package lists anew: a series may have a newer kernel")
    option("--memory", type=int, default=1024, metavar="MIB", help="of the guest (default 1024)")
    option("--smp", type=int, default=2, metavar="N", help="processors of the guest (default 2)")
    option("--timeout", type=float, metavar="S", help="end the guest after so many seconds (default: never)")
    option("--no-btf", action="store_true", help="hide /sys/kernel/btf")
    option("--headers", action="store_true", help="have the kernel's headers in /lib/modules/RELEASE/build")
    option("--systemd", action="store_true", help="with systemd as init, and the command as its only service")
    option("--out", type=pathlib.Path, metavar="DIR", help="a folder that the guest may write to, at the same path")
    option("--verbose", action="store_true", help="show the guest's console at the end")
    option("kernel", nargs="?", help=argparse.SUPPRESS)
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    a = parser.parse_args(sys.argv[1:cut])
    a.command = sys.argv[cut + 1 :]
    if not a.list and not (a.kernel and a.command):
        parser.error("name a kernel and a command: run_on_kernel.py 5.10 -- uname -a")
    if os.geteuid() or os.uname().machine != "x86_64":
        fail("it needs root, on amd64")
    if a.list:
        CACHE.mkdir(parents=True, exist_ok=True)
        update_lists(a.update)
        show_list()
        return 0
    folder = prepare(a.kernel, a.headers, a.update)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for _ in range(3):  # now and then QEMU stops at an assertion (iotlb_to_section) while the guest starts
        with contextlib.ExitStack() as stack:
            if (status := run(a, folder, stack)) is not None:
                return status
        tell("the guest did not start")
    return 125


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
