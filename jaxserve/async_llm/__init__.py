"""The engine behind asyncio: it runs in a thread of its own, its callers are coroutines of any number of event loops.

``AsyncLLM`` is what they call, ``EngineThread`` the loop that alone touches the engine, ``OutputStream`` what lies
between the two for one request: a place for one output, in which newer ones are merged until somebody takes it.
"""

from jaxserve.async_llm.async_llm import AsyncLLM
from jaxserve.async_llm.engine_thread import EngineDeadError, EngineThread
from jaxserve.async_llm.output_stream import OutputStream

__all__ = ["AsyncLLM", "EngineDeadError", "EngineThread", "OutputStream"]
