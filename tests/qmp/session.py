"""A session of qemu.qmp, as a program of an operator would have it."""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient


async def refused(qmp, error_class, desc, command, arguments=None):
    try:
        await qmp.execute(command, arguments)
    except ExecuteError as err:
        error = err.received["error"]
        assert error == {"class": error_class, "desc": desc}, (command, error)
        return
    raise AssertionError(f"{command} {arguments} was not refused")


async def events_until_deleted(listener):
    async for event in listener:
        assert event["timestamp"]["seconds"] > 0
        if event["event"] == "BLOCK_EXPORT_DELETED":
            return event["data"]


async def main(path):
    qmp, other = QMPClient("one"), QMPClient("other")
    await qmp.connect(path)
    await other.connect(path)

    # What qmpbackup asks before anything else.
    assert (await qmp.execute("query-status")) == {"running": True, "status": "running"}
    assert (await qmp.execute("query-name")) == {"name": "vm"}
    assert (await qmp.execute("query-tpm")) == []
    version = await qmp.execute("query-version")
    assert version["qemu"]["major"] >= 10 and "vublk" in version["package"]

    # The schema tells of each command that there is, and of the types that it uses.
    schema = {entry["name"]: entry for entry in await qmp.execute("query-qmp-schema")}
    for command in await qmp.execute("query-commands"):
        entry = schema[command["name"]]
        assert entry["meta-type"] == "command"
        assert schema[entry["arg-type"]]["meta-type"] == "object"
        assert entry["ret-type"] in schema

    await refused(qmp, "CommandNotFound", "The command nope has not been found", "nope")
    await refused(qmp, "GenericError", "Job not found", "job-pause", {"id": "zz"})
    await refused(
        qmp, "DeviceNotActive", "Block job 'zz' not found", "block-job-pause", {"device": "zz"}
    )
    await refused(qmp, "GenericError", "Parameter 'id' is missing", "job-cancel")
    await refused(qmp, "GenericError", "Parameter 'x' is unexpected", "query-block", {"x": 1})

    disks = await qmp.execute("query-block")
    assert len(disks) == 1 and disks[0]["inserted"]["image"]["format"] == "raw", disks
    node = disks[0]["inserted"]["node-name"]
    size = disks[0]["inserted"]["image"]["virtual-size"]
    nodes = await qmp.execute("query-named-block-nodes")
    assert node in [found["node-name"] for found in nodes]

    # While one client changes the disk again and again, the other is answered.
    async def grow():
        for step in range(1, 20):
            await qmp.execute("block_resize", {"node-name": node, "size": size + step * 65536})

    async def ask():
        for _ in range(50):
            await other.execute("query-jobs")

    await asyncio.gather(grow(), ask())
    disks = await other.execute("query-block")
    assert disks[0]["inserted"]["image"]["virtual-size"] == size + 19 * 65536

    # A snapshot, and the way back: the other client hears of it.
    async def states(listener, last):
        seen = []
        async for event in listener:
            seen.append(event["data"].get("status", event["event"]))
            if seen[-1] == last:
                return seen

    export = disks[0]["device"]
    base = disks[0]["inserted"]["image"]["filename"]
    for step, job in enumerate(("block-commit", "block-stream")):
        overlay = f"{path}.overlay{step}"
        await qmp.execute(
            "blockdev-snapshot-sync",
            {"device": export, "snapshot-file": overlay, "format": "add-cow"},
        )
        with other.listener() as listener:
            await qmp.execute(job, {"device": export, "job-id": "j"})
            if job == "block-commit":
                seen = await asyncio.wait_for(states(listener, "BLOCK_JOB_READY"), 20)
                assert seen == ["created", "running", "ready", "BLOCK_JOB_READY"], seen
                jobs = await other.execute("query-block-jobs")
                assert jobs[0]["device"] == "j" and jobs[0]["ready"], jobs
                await qmp.execute("block-job-complete", {"device": "j"})
            seen = await asyncio.wait_for(states(listener, "null"), 20)
            assert seen[-4:] == ["pending", "BLOCK_JOB_COMPLETED", "concluded", "null"], seen
        disks = await other.execute("query-block")
        image = disks[0]["inserted"]["image"]
        assert image["format"] == "raw", image
        assert image["filename"] == (base if step == 0 else f"{overlay}.raw"), image

    # Events come to those who did not ask for what happened.
    with other.listener() as listener:
        await qmp.execute("block-export-del", {"id": disks[0]["device"]})
        data = await asyncio.wait_for(events_until_deleted(listener), 20)
        assert data == {"id": disks[0]["device"]}
    assert (await qmp.execute("query-block-exports")) == []

    await qmp.execute("quit")
    for client in (qmp, other):
        try:
            await client.disconnect()
        except EOFError:
            pass


asyncio.run(main(sys.argv[1]))
