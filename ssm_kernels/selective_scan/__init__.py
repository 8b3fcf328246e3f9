"""Selective scan, the recurrence of Mamba-1 (arXiv 2312.00752)."""

from .api import SelectiveScanOutput, selective_scan, selective_scan_step

__all__ = ["SelectiveScanOutput", "selective_scan", "selective_scan_step"]
