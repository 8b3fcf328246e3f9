"""RMSNorm, gated or fused with the residual add."""

from .api import AddRMSNormOutput, add_rms_norm, rms_norm

__all__ = ["AddRMSNormOutput", "add_rms_norm", "rms_norm"]
