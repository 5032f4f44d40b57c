"""Which family reads which architecture."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxserve.hf_library import transformers_class
from jaxserve.models import gemma, gpt2, gpt_neox, llama, olmo2, opt, phi3, qwen3
from jaxserve.models.config import DecoderConfig

OTHER_SPELLINGS = (
    *("rope_theta", "rope_scaling", "torch_dtype"),
    *("partial_rotary_factor", "original_max_position_embeddings", "is_causal"),
)
"""Entries that configs may have though transformers does not list them with their defaults."""

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
        stored = json.loads(path.read_text())
        raw = stored | (overrides or {})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no JSON object: {error}") from None
    family_of(raw.get("architectures"))
    model_type = raw.pop("model_type", None)
    if model_type is None:
        raise ValueError(f"{path}: no model_type")
    try:
        config = transformers_class("AutoConfig").for_model(model_type, **raw)
    except Exception as error:  # transformers raises classes of its own, of several lines
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a config that transformers accepts: {reason}") from error
    _check_names(overrides or {}, {*stored, *OTHER_SPELLINGS, *config.attribute_map, *type(config)().to_dict()})
    return config


def _check_names(overrides: dict[str, Any], known: set[str]) -> None:
    """ValueError for an entry that is in neither the checkpoint's config nor in others of its kind: a slip of the pen
    would change nothing."""
    for name in overrides:
        if name not in known:
            close = get_close_matches(name, known)
            raise ValueError(
                f"hf_overrides: this model's config has no {name!r}"
                + (f"; did you mean {close[0]!r}?" if close else "")
            )


def decoder_config(hf: Any) -> DecoderConfig:
    """DecoderConfig of a transformers config. Raises ValueError for what is not supported."""
    if not getattr(hf, "is_causal", True):
        raise ValueError(f"is_causal={hf.is_causal} is not supported: this engine decodes causally")
    return family_of(hf.architectures).config(hf)
