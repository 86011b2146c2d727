"""From files of conversations to packed batches. Import `loader` by name: it alone needs megatron-core."""

from .cache import TokenCache, build_or_open
from .config import DataConfig

__all__ = ["DataConfig", "TokenCache", "build_or_open"]
