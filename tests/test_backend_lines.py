"""Ray's C++ lines stay out of the terminal, and nothing else does."""

import os
import subprocess
import sys

from icm_ray.backend_lines import LEVEL, without_backend_lines

NOISE = b"[2026-11-30 06:32:09,516 E 192 192] core_worker.cc:2465: Actor with class name: 'A'\n"
FATAL = b"[2026-11-30 06:32:09,516 C 192 192] core_worker.cc:1: Check failed\n"


def test_only_such_lines_are_dropped(capfd):
    with without_backend_lines():
        os.write(2, b"before\n" + NOISE[:20])
        os.write(2, NOISE[20:] + FATAL + b"[not such a line\n" + b"no end of line")
    assert capfd.readouterr().err.encode() == (
        b"before\n" + FATAL + b"[not such a line\n" + b"no end of line"
    )
    os.write(2, NOISE)
    assert capfd.readouterr().err.encode() == NOISE


def test_whoever_sets_rays_level_sees_them(capfd, monkeypatch):
    monkeypatch.setenv(LEVEL, "info")
    with without_backend_lines():
        os.write(2, NOISE)
    assert capfd.readouterr().err.encode() == NOISE


def test_pythons_own_words_go_around_the_filter():
    script = (
        "import os, sys; from icm_ray.backend_lines import without_backend_lines\n"
        "with without_backend_lines():\n"
        f"    print('word', file=sys.stderr); os.write(2, {NOISE!r})\n"
        "print('end', file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stderr == b"word\nend\n"
