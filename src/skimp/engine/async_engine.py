"""The engine for asyncio programs: one thread steps, any number of tasks wait."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from skimp.decoding.params import SamplingParams
from skimp.engine.admission import Prompt
from skimp.engine.engine import Engine
from skimp.engine.request import RequestOutput


class AsyncEngine:
    """Wraps an :class:`Engine`, which from then on belongs to the stepping thread.

    Use ``async for output in engine.generate(...)``; leaving the loop early aborts the request.
    ``close`` ends the thread; requests in flight end with the error it raised, if any.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._calls: queue.Queue[Callable[[], None]] = queue.Queue()
        self._streams: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Any]]] = {}
        self._ids = itertools.count()
        self._closing = False
        self._stopped = False  # under the lock: nothing is queued any more
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="skimp-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Outputs of one request as they grow; raises what ``Engine.add_request`` raises."""
        if self._closing:
            raise RuntimeError("the engine is closed")
        request_id = f"async-{next(self._ids)}"
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        stream = (asyncio.get_running_loop(), outputs)

        def add() -> None:
            self._streams[request_id] = stream
            try:
                self._engine.add_request(
                    prompt, params, request_id=request_id, priority=priority, salt=salt
                )
            except Exception as error:
                self._deliver(request_id, error)

        with self._lock:
            if self._stopped:
                raise RuntimeError("the engine is closed")
            self._calls.put(add)
        try:
            while True:
                item = await outputs.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.finished:
                    return
        finally:
            self._calls.put(lambda: self._forget(request_id))

    async def close(self) -> None:
        """Abort what runs and end the thread."""
        self._closing = True
        self._calls.put(lambda: None)
        await asyncio.to_thread(self._thread.join)

    def _forget(self, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None:
            self._engine.abort(request_id)

    def _deliver(self, request_id: str, item: Any) -> None:
        stream = self._streams.get(request_id)
        if stream is None:
            return
        if isinstance(item, BaseException) or item.finished:
            del self._streams[request_id]
        loop, outputs = stream
        if not loop.is_closed():
            loop.call_soon_threadsafe(outputs.put_nowait, item)

    def _run(self) -> None:
        reason: BaseException = RuntimeError("the engine was closed")
        try:
            while not self._closing:
                idle = not self._engine.has_unfinished()
                while idle or not self._calls.empty():
                    self._calls.get()()
                    idle = False
                for output in self._engine.step():
                    self._deliver(output.request_id, output)
        except Exception as error:
            reason = error
            self._closing = True
        with self._lock:
            self._stopped = True
        while not self._calls.empty():  # requests that came too late learn it below
            self._calls.get()()
        for request_id in list(self._streams):
            self._deliver(request_id, reason)
            self._engine.abort(request_id)
