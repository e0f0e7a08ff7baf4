"""Runs requests in a thread with an event loop of its own, so that the caller stays synchronous."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Requests(Generic[T]):
    """Requests in flight; their outcomes come back through a queue, in the order in which they arrive.

    Args: close: called in the event loop when all has ended (closes connections).
    """

    def __init__(self, close: Callable[[], Awaitable[None]]) -> None:
        self._close = close
        self._queue: queue.SimpleQueue[tuple[T] | BaseException] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="llm-requests", daemon=True)
        self._is_stopped = False

    def __enter__(self) -> Requests[T]:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            self._loop.run_forever()
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                self._loop.run_until_complete(asyncio.wait(self._tasks))
            self._loop.run_until_complete(self._finish())
        finally:
            self._loop.close()

    async def _finish(self) -> None:
        await self._close()
        await self._loop.shutdown_asyncgens()

    def start(self, work: Callable[[], Coroutine[Any, Any, T]]) -> None:
        """Begins a request; its outcome, or what it raises, comes out of `next`."""

        async def run() -> None:
            try:
                self._queue.put((await work(),))
            except asyncio.CancelledError:
                raise
            except BaseException as e:
                self._queue.put(e)  # raised in the caller's thread

        def begin() -> None:
            task = self._loop.create_task(run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._loop.call_soon_threadsafe(begin)

    def next(self) -> T:
        """Waits for the next outcome; raises what the request raised."""
        outcome = self._queue.get()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome[0]

    def arrived(self) -> Iterator[T]:
        """Outcomes that are here already."""
        while not self._queue.empty():
            outcome = self._queue.get()
            if isinstance(outcome, tuple):
                yield outcome[0]

    def stop(self) -> None:
        """Cancels what is in flight, closes the connections and ends the thread."""
        if not self._is_stopped:
            self._is_stopped = True
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
