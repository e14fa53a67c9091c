"""How the machines of a run learn that one of them has failed or gone.

A rank that waits for its GPU in NCCL may not notice that a peer is dead before the time limit of
the whole group. So the processes that supervise the machines' ranks keep in touch: machine 0
listens one port above `MASTER_PORT`, the others connect, and each side says a word every few
seconds. A word is a line: `node N` (who connects), `alive`, `done`, or `failed WHY`.
"""

import asyncio
import logging
import threading
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Mapping
from contextlib import suppress

log = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
LOST_SECONDS = 30.0
"""How long a machine may be silent; with the time to stop, others end well within a minute."""
GOODBYE_SECONDS = 5.0
CONNECT_SECONDS = 0.5


class NodeWatch:
    """A thread that keeps in touch with the other machines; `trouble` says what it heard."""

    def __init__(
        self,
        environ: Mapping[str, str],
        num_nodes: int,
        *,
        beat_seconds: float = BEAT_SECONDS,
        lost_seconds: float = LOST_SECONDS,
    ) -> None:
        self.host = environ["MASTER_ADDR"]
        self.port = int(environ["MASTER_PORT"]) + 1
        self.node = int(environ["GROUP_RANK"])
        self.num_nodes = num_nodes
        self.beat_seconds = beat_seconds
        self.lost_seconds = lost_seconds
        self._trouble: str | None = None
        self._last_word: str | None = None
        self._peers: set[StreamWriter] = set()
        self._num_met = 0
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._work, name="node-watch", daemon=True)
        self._thread.start()

    def trouble(self) -> str | None:
        """What happened to another machine, in words; None while all is well."""
        return self._trouble

    def end(self, failure: str | None = None) -> None:
        """Tell the others that this machine is done or why it has failed; only once."""
        if self._last_word is None:
            self._last_word = f"failed {failure}" if failure else "done"
            self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join(3 * GOODBYE_SECONDS)

    def _work(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._run())

    async def _run(self) -> None:
        contact = asyncio.create_task(self._listen() if self.node == 0 else self._connect())
        while not self._ended.is_set():
            self._say("alive")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), self.beat_seconds)
        if self._last_word != "done":
            await self._wait_for_peers()
        self._say(self._last_word or "done")
        for writer in list(self._peers):
            await _close(writer)
        contact.cancel()
        await asyncio.wait([contact])

    async def _wait_for_peers(self) -> None:
        """A failure right at the start should be heard by those that are about to connect."""
        expected = self.num_nodes - 1 if self.node == 0 else 1
        began = time.monotonic()
        while self._num_met < expected and time.monotonic() - began < GOODBYE_SECONDS:
            await asyncio.sleep(CONNECT_SECONDS / 5)

    def _say(self, word: str) -> None:
        for writer in self._peers:
            writer.write(f"{word}\n".encode())

    async def _listen(self) -> None:
        try:
            server = await asyncio.start_server(self._greet, port=self.port)
        except OSError as error:
            self._warn_that_failures_come_late(f"port {self.port} cannot be opened ({error})")
            return
        async with server:
            await server.serve_forever()

    async def _greet(self, reader: StreamReader, writer: StreamWriter) -> None:
        """A connection to machine 0; whoever is no machine of this run is not listened to."""
        with suppress(OSError, TimeoutError, ValueError):
            async with asyncio.timeout(self.lost_seconds):
                word, _, number = (await reader.readline()).decode(errors="replace").partition(" ")
            if word == "node" and 0 < int(number) < self.num_nodes:
                await self._follow(int(number), reader, writer)
        await _close(writer)

    async def _connect(self) -> None:
        began = time.monotonic()
        warned = False
        while True:  # machine 0 may be started later
            try:
                reader, writer = await asyncio.open_connection(self.host, self.port)
                break
            except OSError as error:
                if not warned and time.monotonic() - began > self.lost_seconds:
                    warned = True
                    self._warn_that_failures_come_late(f"machine 0 is not reached ({error})")
                await asyncio.sleep(CONNECT_SECONDS)
        writer.write(f"node {self.node}\n".encode())
        try:
            await self._follow(0, reader, writer)
        finally:
            await _close(writer)

    async def _follow(self, node: int, reader: StreamReader, writer: StreamWriter) -> None:
        """Listen to one machine until it is done or in trouble."""
        self._peers.add(writer)
        self._num_met += 1
        what = "gone: it closed its connection without a word"
        try:
            async with asyncio.timeout(self.lost_seconds) as limit:
                while line := await reader.readline():
                    word, _, why = line.decode(errors="replace").strip().partition(" ")
                    if word == "done":
                        return
                    if word == "failed":
                        what = f"failed: {why}"
                        break
                    limit.reschedule(self._loop.time() + self.lost_seconds)
        except TimeoutError:
            what = f"silent for {self.lost_seconds:g} seconds: it or the network is down"
        except (OSError, ValueError) as error:
            what = f"gone: {error}"
        finally:
            self._peers.discard(writer)
        self._trouble = (
            self._trouble
            or (
                f"Machine {node} of the run has {what}."
                if what.startswith("failed")
                else f"Machine {node} of the run is {what}."
            )
            + " Its own output says more. With autoresume: true the same command goes on."
        )

    def _warn_that_failures_come_late(self, why: str) -> None:
        log.warning(
            "The machines of this run do not watch one another, for %s: a failure elsewhere is "
            "noticed only after dist_timeout.",
            why,
        )


async def _close(writer: StreamWriter) -> None:
    """Send what is still to be sent, and close."""
    writer.close()
    with suppress(OSError, TimeoutError):
        await asyncio.wait_for(writer.wait_closed(), GOODBYE_SECONDS)
