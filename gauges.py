"""What Prometheus can read at any moment: the queue, the nodes and their GPUs, the disk and the database's files.

May import `config`, `metrics`, `nodes`, `queue_manager`, `sqlite_files`, `states`, `storage`.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

import config
import metrics
import sqlite_files
import states
from config import Settings
from nodes import NodeRecord, NodeRegistry
from queue_manager import QueueManager
from storage import Storage

MIB = 1 << 20


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"gpujobs_{name}", text, value=value)


class Gauges:
    """Reads everything anew at each scrape; nothing is counted twice or kept for a node that is gone."""

    def __init__(self, queue: QueueManager, registry: NodeRegistry, storage: Storage, settings: Settings) -> None:
        self._queue = queue
        self._registry = registry
        self._storage = storage
        self._settings = settings

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """(everything there is to scrape, its media type), in the format that the Accept header prefers."""
        everything = CollectorRegistry(auto_describe=False)
        everything.register(metrics.EVENTS)
        everything.register(self)
        encode, media_type = choose_encoder(accept)
        return encode(everything), media_type

    def collect(self) -> Iterator[Metric]:
        """prometheus_client."""
        yield from self._of_the_queue()
        yield from self._of_the_nodes(self._registry.all())
        yield from self._of_the_files()
        build = GaugeMetricFamily("gpujobs_build_info", "The version that runs.", labels=["version"])
        build.add_metric([config.VERSION], 1)
        yield build

    def _of_the_queue(self) -> Iterator[Metric]:
        view = self._queue.view()
        active = GaugeMetricFamily("gpujobs_active_jobs", "Jobs that wait or run.", labels=["state"])
        active.add_metric([states.PENDING], view.pending)
        active.add_metric([states.RUNNING], view.running)
        yield active
        yield _gauge("queue_oldest_seconds", "How long the oldest pending job waits.", self._queue.oldest_wait())
        if view.newcomer_wait is not None:
            yield _gauge("queue_expected_wait_seconds", "Expected wait of a job queued now.", view.newcomer_wait)

    def _of_the_nodes(self, records: list[NodeRecord]) -> Iterator[Metric]:
        by_state = dict.fromkeys(states.NODE_STATES, 0)
        for record in records:
            by_state[record.status] += 1
        counted = GaugeMetricFamily("gpujobs_nodes", "Nodes by state.", labels=["state"])
        for state, count in by_state.items():
            counted.add_metric([state], count)
        node = ["node"]
        connected = GaugeMetricFamily("gpujobs_node_connected", "1 while the node is in reach.", labels=node)
        usable = GaugeMetricFamily("gpujobs_node_usable", "1 while the node takes jobs.", labels=node)
        busy = GaugeMetricFamily("gpujobs_node_busy", "1 while the node runs a job.", labels=node)
        disk = GaugeMetricFamily("gpujobs_node_disk_free_bytes", "Free on the node's disk.", labels=node)
        for record in records:
            connected.add_metric([record.node_id], record.connected)
            usable.add_metric([record.node_id], record.usable)
            busy.add_metric([record.node_id], record.job_id is not None)
            if record.probe is not None:
                disk.add_metric([record.node_id], record.probe.free_bytes)
        yield from (counted, connected, usable, busy, disk)
        yield from self._of_the_gpus(records)

    @staticmethod
    def _of_the_gpus(records: list[NodeRecord]) -> Iterator[Metric]:
        """As of the last look at each node; a node out of reach has none, so that no graph shows what is not known."""
        labels = ["node", "gpu"]
        info = GaugeMetricFamily("gpujobs_gpu_info", "The GPU's model.", labels=[*labels, "model"])
        load = GaugeMetricFamily("gpujobs_gpu_utilization_ratio", "Utilisation, 0 to 1.", labels=labels)
        used = GaugeMetricFamily("gpujobs_gpu_memory_used_bytes", "Memory in use.", labels=labels)
        total = GaugeMetricFamily("gpujobs_gpu_memory_bytes", "Memory there is.", labels=labels)
        heat = GaugeMetricFamily("gpujobs_gpu_temperature_celsius", "Temperature.", labels=labels)
        for record in records:
            for gpu in record.probe.gpus if record.probe is not None and record.connected else ():
                where = [record.node_id, str(gpu.index)]
                info.add_metric([*where, gpu.name or ""], 1)
                for family, value, unit in (
                    (load, gpu.utilization, 0.01),
                    (used, gpu.memory_used_mib, MIB),
                    (total, gpu.memory_total_mib, MIB),
                    (heat, gpu.temperature, 1),
                ):
                    if value is not None:
                        family.add_metric(where, value * unit)
        yield from (info, load, used, total, heat)

    def _of_the_files(self) -> Iterator[Metric]:
        yield _gauge("disk_free_bytes", "Free in JOBS_DIR.", self._storage.free_bytes())
        yield _gauge("disk_min_free_bytes", "MIN_FREE_DISK: below it, no job is taken.", self._settings.min_free_disk)
        path = self._settings.database_path
        for name, text, file in (
            ("database_bytes", "Size of the database file.", path),
            ("database_wal_bytes", "Size of its write-ahead log.", path.with_name(path.name + "-wal")),
        ):
            yield _gauge(name, text, file.stat().st_size if file.exists() else 0)
        made = sqlite_files.last_backup(path)
        yield _gauge("last_backup_timestamp_seconds", "When the last backup was made; 0: never.", made)
