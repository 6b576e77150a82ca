"""What the agent needs of libbpf.so.1: maps in batches, the ring buffer, and a program's own statistics."""

from __future__ import annotations

import ctypes as ct
import errno
import os
from collections.abc import Callable, Iterable, Iterator

_PROG_INFO_BYTES = 224
_RUN_TIME_NS, _RUN_CNT, _RECURSION_MISSES = 192, 200, 208  # offsets in struct bpf_prog_info (include/uapi/linux/bpf.h)

_ENOUGH = -1  # from a callback: the record is done, and it is the last one for now

_SampleCallback = ct.CFUNCTYPE(ct.c_int, ct.c_void_p, ct.c_void_p, ct.c_size_t)


def _open() -> ct.CDLL:
    lib = ct.CDLL("libbpf.so.1", use_errno=True)
    number, buffer = ct.c_int, ct.c_void_p
    for name, arguments in {
        "bpf_map_lookup_elem": (number, buffer, buffer),
        "bpf_map_update_elem": (number, buffer, buffer, ct.c_uint64),
        "bpf_map_delete_elem": (number, buffer),
        "bpf_map_lookup_batch": (number, buffer, buffer, buffer, buffer, buffer, buffer),
        "bpf_map_update_batch": (number, buffer, buffer, buffer, buffer),
        "bpf_map_delete_batch": (number, buffer, buffer, buffer),
        "bpf_obj_get_info_by_fd": (number, buffer, buffer),
        "ring_buffer__consume": (buffer,),
        "ring_buffer__free": (buffer,),
        "ring_buffer__epoll_fd": (buffer,),
    }.items():
        getattr(lib, name).argtypes = arguments
    lib.ring_buffer__new.argtypes = (number, _SampleCallback, buffer, buffer)
    lib.ring_buffer__new.restype = buffer
    return lib


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


class Libbpf:
    """The library, opened once. OSError if it is not installed."""

    def __init__(self) -> None:
        self.lib = _open()

    def possible_cpus(self) -> int:
        """CPUs that the kernel has slots for in per-CPU maps."""
        return int(self.lib.libbpf_num_possible_cpus())

    def program_statistics(self, fd: int) -> tuple[int, int, int]:
        """(ns spent, runs, runs skipped because they would have interrupted themselves) of a program.

        The first two stay 0 unless kernel.bpf_stats_enabled is 1; the last is 0 before Linux 5.12, which skips none.
        """
        info = ct.create_string_buffer(_PROG_INFO_BYTES)
        size = ct.c_uint32(_PROG_INFO_BYTES)
        _check(self.lib.bpf_obj_get_info_by_fd(fd, info, ct.byref(size)), "bpf_prog_info")
        known = [
            int.from_bytes(info.raw[at : at + 8], "little") if at + 8 <= size.value else 0
            for at in (_RUN_TIME_NS, _RUN_CNT, _RECURSION_MISSES)
        ]
        return known[0], known[1], known[2]


class Map:
    """One map by its descriptor. Keys and values are bytes of the map's sizes; OSError is what the kernel says."""

    def __init__(self, libbpf: Libbpf, fd: int, key_bytes: int, value_bytes: int) -> None:
        self.fd, self.key_bytes, self.value_bytes = fd, key_bytes, value_bytes
        self._lib = libbpf.lib
        self._value = ct.create_string_buffer(value_bytes)

    def lookup(self, key: bytes) -> bytes | None:
        """The value, or None if there is none."""
        result = self._lib.bpf_map_lookup_elem(self.fd, key, self._value)
        if result == -errno.ENOENT:
            return None
        _check(result, "map look-up")
        return self._value.raw

    def update(self, key: bytes, value: bytes) -> None:
        """Sets a value."""
        _check(self._lib.bpf_map_update_elem(self.fd, key, value, 0), "map update")

    def push(self, value: bytes) -> None:
        """Adds to a queue; one that is full stays as it is."""
        result = self._lib.bpf_map_update_elem(self.fd, None, value, 0)
        if result != -errno.E2BIG:
            _check(result, "map update")

    def delete(self, key: bytes) -> None:
        """Deletes a key; one that is not there is as good."""
        result = self._lib.bpf_map_delete_elem(self.fd, key)
        if result != -errno.ENOENT:
            _check(result, "map deletion")

    def items(self, chunk: int = 1024) -> Iterator[tuple[bytes, bytes]]:
        """Every (key, value), in batches of `chunk`; keys that change meanwhile may be missed or come twice."""
        keys = ct.create_string_buffer(self.key_bytes * chunk)
        values = ct.create_string_buffer(self.value_bytes * chunk)
        position, start = ct.create_string_buffer(max(self.key_bytes, 8)), None
        while True:
            count = ct.c_uint32(chunk)
            result = self._lib.bpf_map_lookup_batch(self.fd, start, position, keys, values, ct.byref(count), None)
            if result == -errno.ENOSPC:  # a bucket of the hash holds more than a batch
                yield from self.items(chunk * 2)
                return
            if result not in (0, -errno.ENOENT):
                _check(result, "map batch")
            raw_keys, raw_values = keys.raw, values.raw
            for i in range(count.value):
                yield (
                    raw_keys[i * self.key_bytes : (i + 1) * self.key_bytes],
                    raw_values[i * self.value_bytes : (i + 1) * self.value_bytes],
                )
            if result:
                return
            start = position

    def values(self, start: int, length: int) -> bytes:
        """`length` values of an array, one after the other, from index `start` on."""
        keys, values = (ct.create_string_buffer(size * length) for size in (4, self.value_bytes))
        count, position = ct.c_uint32(length), ct.create_string_buffer(8)
        before = (start - 1).to_bytes(4, "little") if start else None  # the kernel goes on behind this index
        result = self._lib.bpf_map_lookup_batch(self.fd, before, position, keys, values, ct.byref(count), None)
        if result not in (0, -errno.ENOENT):
            _check(result, "map batch")
        return values.raw[: count.value * self.value_bytes]

    def zero(self, indexes: Iterable[int]) -> None:
        """Zeroes these elements of an array."""
        wanted = list(indexes)
        if not wanted:
            return
        keys = b"".join(index.to_bytes(4, "little") for index in wanted)
        count = ct.c_uint32(len(wanted))
        values = bytes(self.value_bytes * len(wanted))
        _check(self._lib.bpf_map_update_batch(self.fd, keys, values, ct.byref(count), None), "map batch")


class RingBuffer:
    """The consumer of a BPF ring buffer; not for two threads at once."""

    def __init__(self, libbpf: Libbpf, fd: int, on_record: Callable[[bytes], None]) -> None:
        self._lib = libbpf.lib

        def receive(_context: int, data: int, size: int) -> int:
            on_record(ct.string_at(data, size))
            self._left -= 1
            return _ENOUGH if self._left <= 0 else 0

        self._left = 0
        self._callback = _SampleCallback(receive)  # kept: the library has only its address
        self._ring = self._lib.ring_buffer__new(fd, self._callback, None, None)
        if not self._ring:
            raise OSError(ct.get_errno(), "cannot map the ring buffer")

    def consume(self, most: int) -> int:
        """Hands over the records that are there, or so many: more may come as fast; returns how many."""
        self._left = most
        result = self._lib.ring_buffer__consume(self._ring)
        return most if result == _ENOUGH else _check(result, "ring buffer")

    def epoll_fd(self) -> int:
        """A descriptor that becomes readable when the kernel asks for attention (the buffer is half full)."""
        return _check(self._lib.ring_buffer__epoll_fd(self._ring), "ring buffer")

    def close(self) -> None:
        """Unmaps the buffer."""
        if self._ring:
            self._lib.ring_buffer__free(self._ring)
            self._ring = None
