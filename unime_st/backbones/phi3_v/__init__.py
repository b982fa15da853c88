"""Phi-3.5-Vision, which transformers 5 lacks, on transformers' Phi-3 and CLIP.

Architecture: "Phi-3 Technical Report" (arXiv 2404.14219), section on Phi-3.5-Vision, and the published checkpoint.
"""

from __future__ import annotations

from unime_st.backbones.phi3_v.configuration import UniMEPhi3VConfig
from unime_st.backbones.phi3_v.image_processing import UniMEPhi3VImageProcessor
from unime_st.backbones.phi3_v.modeling import UniMEPhi3VModel
from unime_st.backbones.phi3_v.processor import UniMEPhi3VProcessor

__all__ = ["UniMEPhi3VConfig", "UniMEPhi3VImageProcessor", "UniMEPhi3VModel", "UniMEPhi3VProcessor"]
