"""What the server says of itself at /metrics, as far as a load run needs it."""

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.load.client import Address, ask


@dataclass(frozen=True, slots=True)
class Metrics:
    """Tasks that ended, by outcome, and resident bytes of server and workers."""

    tasks: dict[str, int]
    memory_bytes: float

    def tasks_since(self, before: "Metrics") -> dict[str, int]:
        """Tasks that ended between an earlier look and this one."""
        counts = {name: n - before.tasks.get(name, 0) for name, n in self.tasks.items()}
        return {name: count for name, count in counts.items() if count}


async def read_metrics(address: Address) -> Metrics:
    """Read /metrics."""
    text = (await ask(address, "GET", "/metrics")).body.decode()
    tasks: dict[str, int] = {}
    memory = 0.0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "fastface_tasks_total":
                tasks[sample.labels["outcome"]] = int(sample.value)
            elif sample.name == "fastface_worker_memory_bytes":
                memory = sample.value
    return Metrics(tasks, memory)
