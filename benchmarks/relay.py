"""A TCP relay that hands bytes on after a delay, both ways: a long wire on loopback.

    python3 -m benchmarks.relay PORT SECONDS     prints its own port; ends with SIGTERM

Imports nothing of the project.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    """Each block arrives `delay` seconds after it came; blocks do not wait for one another."""
    loop = asyncio.get_running_loop()
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def deliver() -> None:
        while True:
            due, data = await under_way.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not data:
                break
            writer.write(data)
            await writer.drain()

    delivery = asyncio.create_task(deliver())
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            under_way.put_nowait((loop.time() + delay, data))
    under_way.put_nowait((loop.time() + delay, b""))
    with contextlib.suppress(OSError):
        await delivery
    writer.close()


async def main(port: int, delay: float) -> None:
    """Listen on a free port of loopback for ever."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        for near in (writer, far_writer):
            near.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.gather(carry(reader, far_writer, delay), carry(far_reader, writer, delay))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
