"""Scans over a 2-D grid along several directions: the cross-scan of VMamba (arXiv 2401.10166)."""

from .api import cross_causal_conv1d, cross_merge, cross_scan, cross_selective_scan, cross_ssd
from .directions import BIDIRECTIONAL, CROSS, ScanDirection

__all__ = [
    "BIDIRECTIONAL",
    "CROSS",
    "ScanDirection",
    "cross_causal_conv1d",
    "cross_merge",
    "cross_scan",
    "cross_selective_scan",
    "cross_ssd",
]
