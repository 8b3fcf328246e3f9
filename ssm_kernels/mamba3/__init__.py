"""The recurrence of Mamba-3 (arXiv 2603.15569), with one input a head (SISO) or several (MIMO)."""

from .api import Mamba3Output, Mamba3States, mamba3, mamba3_step

__all__ = ["Mamba3Output", "Mamba3States", "mamba3", "mamba3_step"]
