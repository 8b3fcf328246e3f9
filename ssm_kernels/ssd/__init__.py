"""SSD, the recurrence of Mamba-2 (arXiv 2405.21060)."""

from .api import SSDOutput, ssd, ssd_step

__all__ = ["SSDOutput", "ssd", "ssd_step"]
