"""A stderr that nobody reads any more, or for a while: what is said there holds up nobody."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from engines import eventually

from quire.serving import stderr
from quire.serving.stderr import QueuedStream, queue_stderr

LINE = "x" * 99 + "\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Of 4096 bytes."""
    reader, writer = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    yield reader, writer
    for end in (reader, writer):
        try:
            os.close(end)
        except OSError as error:
            assert error.errno == errno.EBADF


def read_until(reader: int, last: str) -> str:
    text = ""
    while last not in text:
        ready, _, _ = select.select([reader], [], [], 20)
        assert ready, f"{last!r} never came, but {text[-200:]!r}"
        text += os.read(reader, 65536).decode()
    return text


def test_lines_arrive_whole_and_in_order(pipe: tuple[int, int]) -> None:
    stream = QueuedStream(pipe[1])
    stream.write("a")
    stream.write("b\nc\nd")
    assert read_until(pipe[0], "c\n") == "ab\nc\n"
    stream.flush()
    assert read_until(pipe[0], "d") == "d"
    print("e", "\udc80", file=stream)
    assert read_until(pipe[0], "\n") == "e \\udc80\n"
    assert stream.drain(20)


def test_what_nobody_reads_is_dropped_and_counted(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stderr, "ROOM", 50 * len(LINE))
    stream = QueuedStream(pipe[1])
    for _ in range(1000):  # would wait for ever, were it not queued
        stream.write(LINE)
    assert not stream.drain(0)
    got = read_until(pipe[0], LINE * 50).count("\n")
    while (readable := select.select([pipe[0]], [], [], 0)[0]) or not stream.drain(0):
        if readable:
            got += os.read(pipe[0], 65536).count(b"\n")

    def said() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.name == stderr.__name__]

    eventually(lambda: bool(said()))
    (record,) = said()
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        f"nobody read this log for a while: {1000 - got} lines were dropped"
    )
    stream.write("again\n")
    assert read_until(pipe[0], "again\n") == "again\n"


def test_a_line_of_any_length_passes(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stderr, "ROOM", 10)
    stream = QueuedStream(pipe[1])
    stream.write("x" * 100_000 + "\n")
    assert len(read_until(pipe[0], "\n")) == 100_001


def test_a_pipe_that_somebody_set_not_to_block_is_waited_for(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    stream = QueuedStream(pipe[1])
    stream.write(LINE * 100)
    assert not stream.drain(0)
    assert read_until(pipe[0], LINE * 100) == LINE * 100


def test_a_reader_that_is_gone_is_no_error(pipe: tuple[int, int]) -> None:
    stream = QueuedStream(pipe[1])
    os.close(pipe[0])
    stream.write("into the void\n")
    assert stream.drain(20)
    stream.write("and on\n")
    assert stream.drain(20)


def test_a_process_ends_though_nobody_reads(pipe: tuple[int, int]) -> None:
    program = (
        "import sys; from quire.serving import stderr; stderr.LAST_WORDS = 0.05\n"
        "stderr.queue_stderr(); print('x' * 9000, file=sys.stderr); sys.exit(7)"
    )
    command = [sys.executable, "-P", "-c", program]
    assert subprocess.run(command, stderr=pipe[1], timeout=60).returncode == 7


def test_what_a_process_says_last_arrives() -> None:
    program = (
        "import sys, atexit; from quire.serving import stderr; stderr.queue_stderr()\n"
        "atexit.register(print, 'at exit', file=sys.stderr)\n"
        "print('x' * 200_000, file=sys.stderr); 1 // 0"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert lines[0] == "x" * 200_000 and "at exit" in lines
    assert "ZeroDivisionError: integer division or modulo by zero" in lines


def test_a_process_without_stderr_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    queue_stderr()
    assert sys.stderr is None


def test_writers_on_many_threads_do_not_mix_lines(pipe: tuple[int, int]) -> None:
    stream = QueuedStream(pipe[1])
    threads = [
        threading.Thread(target=lambda n=n: [stream.write(f"{n}" * 80 + "\n") for _ in range(50)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    text = ""
    while text.count("\n") < 200:
        text += read_until(pipe[0], "\n")
    assert sorted(text.splitlines()) == sorted(f"{n}" * 80 for n in range(4) for _ in range(50))
