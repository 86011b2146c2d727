"""What a backend is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from paralign.models.arch import Arch

if TYPE_CHECKING:
    import torch

    from paralign.models.decoder import Parts


class Backend(Protocol):
    """Gives the parts of a decoder, and what Megatron's configuration says of them. Knows no layout."""

    @property
    def fuses_updates(self) -> bool:
        """Whether the optimizer's update is one operation."""

    def parts(self, arch: Arch, device: torch.device, dtype: torch.dtype) -> Parts:
        """The parts for one model.

        Raises:
            RecipeError: it has none for this device, dtype or model.
        """

    def config(self) -> Mapping[str, Any]:
        """Keys of Megatron's TransformerConfig that these parts need."""

    def facts(self, arch: Arch, device: torch.device, dtype: torch.dtype) -> Mapping[str, str]:
        """What runs, for the start of a run."""
