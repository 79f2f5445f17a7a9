"""Where libraries would be killed for want of room, the commands end with what to do instead."""

import os
import resource
from types import SimpleNamespace

from physai_decode.ros import room
import pytest


def test_here_is_room():
    room.check_shared_memory()
    room.check_address_space()


def test_full_shared_memory(monkeypatch):
    monkeypatch.setattr(os, 'statvfs', lambda path: SimpleNamespace(f_bavail=1, f_frsize=4096))
    with pytest.raises(SystemExit, match=r'/dev/shm has 4096 bytes free.*--shm-size'):
        room.check_shared_memory()


def test_no_shared_memory(monkeypatch):
    monkeypatch.setattr(room, 'SHARED_MEMORY', '/no/such/folder')
    room.check_shared_memory()


def test_a_small_address_space(monkeypatch):
    monkeypatch.setattr(resource, 'getrlimit', lambda kind: (10**9, resource.RLIM_INFINITY))
    with pytest.raises(SystemExit, match=r'limited to 1000000000 bytes.*ulimit -v unlimited'):
        room.check_address_space()
