"""Which family reads which architecture."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxserve.hf_library import transformers_class
from jaxserve.models import gemma, gpt2, gpt_neox, llama, olmo2, opt, phi3, qwen3
from jaxserve.models.config import DecoderConfig

FAMILIES: dict[str, ModuleType] = {
    name: family for family in (llama, qwen3, phi3, gemma, gpt2, gpt_neox, opt, olmo2) for name in family.ARCHITECTURES
}


def family_of(architectures: list[str] | None) -> ModuleType:
    """The family of a config's ``architectures``; ValueError lists what is supported."""
    for name in architectures or ():
        if name in FAMILIES:
            return FAMILIES[name]
    raise ValueError(f"architecture {architectures!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")


def load_hf_config(directory: Path, overrides: dict[str, Any] | None = None) -> Any:
    """The checkpoint's config.json as a transformers config: defaults filled in, old spellings made new."""
    path = directory / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory}: no config.json; a model is a local Hugging Face checkpoint directory")
    try:
        raw = json.loads(path.read_text()) | (overrides or {})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no JSON object: {error}") from None
    family_of(raw.get("architectures"))
    model_type = raw.pop("model_type", None)
    if model_type is None:
        raise ValueError(f"{path}: no model_type")
    try:
        return transformers_class("AutoConfig").for_model(model_type, **raw)
    except Exception as error:  # transformers raises classes of its own, of several lines
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a config that transformers accepts: {reason}") from error


def decoder_config(hf: Any) -> DecoderConfig:
    """DecoderConfig of a transformers config. Raises ValueError for what is not supported."""
    if not getattr(hf, "is_causal", True):
        raise ValueError(f"is_causal={hf.is_causal} is not supported: this engine decodes causally")
    return family_of(hf.architectures).config(hf)
