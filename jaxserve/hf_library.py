"""The one place that imports transformers: late, because it takes a second, and without its advice to get PyTorch."""

from __future__ import annotations

import logging
from typing import Any


def transformers_class(name: str) -> Any:
    """A class of transformers: AutoConfig or AutoTokenizer."""

    def is_news(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(is_news)  # only configs and tokenizers are used here: they do not need it
    try:
        import transformers

        return getattr(transformers, name)
    finally:
        logger.removeFilter(is_news)
