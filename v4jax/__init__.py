"""DeepSeek-V4 in JAX.

The names below are imported when they are first used, so that `import v4jax` is quick and starts no backend.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from v4jax.cache import init_cache as init_cache
    from v4jax.chat import Completion as Completion
    from v4jax.chat import encode_messages as encode_messages
    from v4jax.chat import parse_completion as parse_completion
    from v4jax.checkpoint.convert import convert as convert
    from v4jax.config import AttentionKind as AttentionKind
    from v4jax.config import ConfigError as ConfigError
    from v4jax.config import LayerSpec as LayerSpec
    from v4jax.config import ModelConfig as ModelConfig
    from v4jax.config import RouterKind as RouterKind
    from v4jax.config import SegmentSpec as SegmentSpec
    from v4jax.config import layer_plan as layer_plan
    from v4jax.config import plan_segments as plan_segments
    from v4jax.dtypes import DTypePolicy as DTypePolicy
    from v4jax.errors import UserError as UserError
    from v4jax.loading import load as load
    from v4jax.model.transformer import Transformer as Transformer
    from v4jax.serve.generate import generate as generate
    from v4jax.tokenizer import Tokenizer as Tokenizer

__version__ = "0.1.0"

_PUBLIC = {
    "AttentionKind": "v4jax.config",
    "Completion": "v4jax.chat",
    "ConfigError": "v4jax.config",
    "DTypePolicy": "v4jax.dtypes",
    "LayerSpec": "v4jax.config",
    "ModelConfig": "v4jax.config",
    "RouterKind": "v4jax.config",
    "SegmentSpec": "v4jax.config",
    "Tokenizer": "v4jax.tokenizer",
    "Transformer": "v4jax.model.transformer",
    "UserError": "v4jax.errors",
    "convert": "v4jax.checkpoint.convert",
    "encode_messages": "v4jax.chat",
    "generate": "v4jax.serve.generate",
    "init_cache": "v4jax.cache",
    "layer_plan": "v4jax.config",
    "load": "v4jax.loading",
    "parse_completion": "v4jax.chat",
    "plan_segments": "v4jax.config",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'v4jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return ["__version__", *_PUBLIC]
