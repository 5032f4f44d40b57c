"""``jaxserve bench``: throughput, latency and startup of this engine on this machine."""

from jaxserve.commands.bench.commands import latency, startup, throughput

__all__ = ["latency", "startup", "throughput"]
