"""Publisher: sends the kernel's output on its iopub socket, from whichever thread has something to send.

ipykernel hands every message to one thread and waits for it; much of a small cell's time goes there. Here the socket
belongs to whoever holds its lock. The thread only does what nobody else would: late flushes, pipes, slow subscribers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import zmq
from ipykernel.iostream import IOPubThread
from ipykernel.thread import CONTROL_THREAD_NAME, SHELL_CHANNEL_THREAD_NAME
from jupyter_client.session import Session

from samovar_kernel.output import BUDGET, PIPE_SIZE, OutputBuffer
from samovar_kernel.system import Alarm

SEND_QUEUE = 24
"""Messages that the socket holds for each subscriber; more wait in the output buffer, whose bytes are bounded."""

STALL_LIMIT = 5.0
"""Seconds after which a subscriber that takes nothing misses a message, so that the others go on (one alone is waited
for)."""

ENDING_STALL_LIMIT = 0.5
"""The same once a cell was interrupted, has failed or asks something: who waits for that must not wait for another."""

_FLUSH_INTERVAL = 0.05  # s between a print and its message, while a cell runs on
_HAND_OVER = 0.001  # s until the thread takes over what user code published; most cells have ended by then
_PIPE_PAUSE = 0.005  # s from a pipe's first byte to reading it: a cell that dies right then leaves it to the supervisor
_RETRY = 0.02
_NEVER_WAIT = frozenset({CONTROL_THREAD_NAME, SHELL_CHANNEL_THREAD_NAME, "IOPub"})

_log = logging.getLogger(__name__)


def open_socket(context: zmq.Context[Any]) -> zmq.Socket[Any]:
    """Return an iopub socket, not yet bound (later it would not take over its limits)."""
    socket = context.socket(zmq.XPUB)
    socket.linger = 1000
    socket.setsockopt(zmq.SNDHWM, SEND_QUEUE)
    socket.setsockopt(zmq.XPUB_NODROP, 1)
    # every subscription and its end, not only the first and the last of a topic
    socket.setsockopt(zmq.XPUB_VERBOSER, 1)
    return socket


class Publisher(IOPubThread):
    """Takes messages out of an OutputBuffer and sends them; an ipykernel `IOPubThread` to everybody else."""

    def __init__(self, socket: Any, session: Session, output: OutputBuffer) -> None:
        self.output = output
        #: false while the kernel starts: nothing that start-up prints is for anybody
        self.ready = False
        #: true while the main thread runs user code: a signal handler may raise anywhere in it, so it must not send.
        #: Whoever sets it to false sees to it first that an interrupt does not raise
        self.user_code = False
        #: true once a cell was interrupted, has failed or asks something: somebody waits for what is queued
        self.ending = False
        self._alarm = Alarm()
        self._due: float | None = None
        # reentrant, as a signal handler that prints may interrupt its own thread here
        self._alarm_lock = threading.RLock()
        self._send_lock = threading.Lock()
        self._unsent: list[Any] | None = None
        self._stalled_since: float | None = None
        self._subscriptions = 0
        #: when the last subscriber left
        self.left_at: float | None = None
        self._welcomes: list[str] = []
        self._interrupted = False
        self._main = threading.main_thread().ident
        super().__init__(socket, pipe=False, session=session)
        output.notify = self._arm
        output.may_wait = self._may_wait

    # IOPubThread's constructor calls these: the loop waits for descriptors of ours instead of ZeroMQ streams

    def _setup_event_pipe(self) -> None:
        self._loop.add_reader(self._alarm.descriptor, self._on_alarm)

    def _setup_xpub_listener(self) -> None:
        self._loop.add_reader(self.socket.getsockopt(zmq.FD), self.pump)
        self._watch_pipes()

    async def _run_event_pipe_gc(self) -> None:
        return

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        loop: asyncio.AbstractEventLoop = self.io_loop.asyncio_loop  # type: ignore[attr-defined]
        return loop

    def schedule(self, f: Callable[[], Any]) -> None:
        """Have `f` called in this thread (at once if it does not run)."""
        if self.thread.is_alive():
            self.io_loop.add_callback(f)
        else:
            f()

    def send_multipart(self, msg: list[Any], *args: Any, **kwargs: Any) -> None:
        """Queue a whole message and send what can be sent."""
        if self.closed:
            return
        self.output.put(msg)
        self.flush()

    def flush(self) -> None:
        """Send all that waits, as far as subscribers take it; never waits for them."""
        output = self.output
        if output.forked or self.closed:
            return
        self._read_some()
        if output.empty and self._unsent is None:
            return
        if self.user_code and threading.get_ident() == self._main and self.thread.is_alive():
            self._arm_within(_HAND_OVER)
        else:
            self.pump()

    def call_at_once(self, publish: Callable[..., Any], *args: Any) -> Any:
        """Call `publish` and return its result; what it publishes is sent at once and waits for no room.

        For what user code's end or question needs: a flood before it must not hold it up.
        """
        if threading.get_ident() != self._main or not self.user_code:
            return publish(*args)
        # an interrupt between two frames would tear the message: it is noted, and raised again when all is sent
        previous = signal.signal(signal.SIGINT, self._note_interrupt)
        self.user_code = False
        self.ending = True
        try:
            return publish(*args)
        finally:
            self.user_code = True
            if previous is not None:
                signal.signal(signal.SIGINT, previous)
            if self._interrupted:
                self._interrupted = False
                os.kill(os.getpid(), signal.SIGINT)

    def pump(self) -> None:
        """Send all that waits. One thread at a time: another one's messages are sent by the one that is inside."""
        while self._send_lock.acquire(blocking=False):
            try:
                self._send_all()
            finally:
                self._send_lock.release()
            # what came in after the last look, from a thread that found the lock taken
            if self.closed or self.output.empty or self._stalled_since is not None or not self.ready:
                return

    def stop(self) -> None:
        """Send what is left and end the thread. Raises TimeoutError if it does not end."""
        self.user_code = False
        self.flush()
        super().stop()

    def close(self) -> None:
        """Close socket and timer."""
        if not self.closed:
            super().close()
            self._alarm.close()

    def _send_all(self) -> None:
        if self.closed or not self.ready:
            return
        while True:
            frames = self._unsent or self.output.take()
            if frames is None:
                # sending may have swallowed the socket's wake-up for a new subscriber
                if self._welcome_subscribers():
                    continue
                break
            self._unsent = frames
            try:
                self.socket.send_multipart(frames, zmq.NOBLOCK)
            except zmq.Again:
                if not self._stalled(frames):
                    return
            self._unsent = None
            self._stalled_since = None

    def _stalled(self, frames: list[Any]) -> bool:
        """Return whether `frames` are dealt with: sent to all but a subscriber that takes nothing for too long."""
        now = time.monotonic()
        if self._stalled_since is None:
            self._stalled_since = now
        self._note_subscriptions()
        limit = ENDING_STALL_LIMIT if self.ending else STALL_LIMIT
        if now - self._stalled_since < limit or self._subscriptions < 2:
            self._arm_within(_RETRY)
            return False
        self.socket.setsockopt(zmq.XPUB_NODROP, 0)
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK)
        finally:
            self.socket.setsockopt(zmq.XPUB_NODROP, 1)
        return True

    def _welcome_subscribers(self) -> bool:
        """Queue a welcome for each new subscription; return whether there was one."""
        self._note_subscriptions()
        welcomes, self._welcomes = self._welcomes, []
        for topic in welcomes:
            message = self.session.msg("iopub_welcome", {"subscription": topic})
            self.output.put(self.session.serialize(message, topic.encode() if topic else None))
        return bool(welcomes)

    def _note_subscriptions(self) -> None:
        while self.socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            event = self.socket.recv(zmq.NOBLOCK)
            if event[:1] == b"\x00":
                self._subscriptions -= 1
                if not self._subscriptions:
                    self.left_at = time.monotonic()
            elif event[:1] == b"\x01":
                self._subscriptions += 1
                try:
                    self._welcomes.append(event[1:].decode())
                except UnicodeDecodeError:
                    continue

    def _note_interrupt(self, *_: Any) -> None:
        self._interrupted = True

    def _may_wait(self) -> bool:
        if not self.thread.is_alive() or threading.current_thread().name in _NEVER_WAIT:
            return False
        return self.user_code or threading.get_ident() != self._main

    def _arm(self, urgent: bool) -> None:
        self._arm_within(0.0 if urgent else _FLUSH_INTERVAL)

    def _arm_within(self, seconds: float) -> None:
        due = time.monotonic() + seconds
        with self._alarm_lock:
            if self._due is None or due < self._due:
                self._alarm.arm(seconds)
                self._due = due

    def _on_alarm(self) -> None:
        with self._alarm_lock:
            self._alarm.clear()
            self._due = None
        self._read_some()
        self.pump()

    def _read_some(self) -> None:
        # above the budget the pipes fill up, and whoever writes into them waits
        if self.output.size <= BUDGET:
            self.output.drain()

    def _watch_pipes(self) -> None:
        for descriptor in self.output.pipes:
            self._loop.add_reader(descriptor, self._on_pipe)

    def _on_pipe(self) -> None:
        for descriptor in self.output.pipes:
            self._loop.remove_reader(descriptor)
        self._loop.call_later(_PIPE_PAUSE, self._read_pipes)

    def _read_pipes(self) -> None:
        loop = self._loop
        if self.output.size > BUDGET:
            self.pump()
            loop.call_later(_PIPE_PAUSE, self._read_pipes)
            return
        watched = self.output.pipes
        if self.output.drain() >= PIPE_SIZE // 2:
            self.pump()
            loop.call_soon(self._read_pipes)
            return
        for descriptor in set(watched) - set(self.output.pipes):
            loop.remove_reader(descriptor)
        self._arm_within(_FLUSH_INTERVAL)
        self._watch_pipes()
