"""The five Sora models, each written once against a build of the layers."""

from __future__ import annotations

from sora_models.models._base import SoraModel
from sora_models.models._config import Config
from sora_models.models.autoencoder import Autoencoder, AutoencoderConfig, AutoencoderOutput
from sora_models.models.crnn import CRNN, CRNNConfig
from sora_models.models.enhancer import Enhancer, EnhancerConfig, EnhancerOutput
from sora_models.models.pyramid_transformer import PyramidTransformer, PyramidTransformerConfig
from sora_models.models.vaegan import VAEGAN, Detections, VAEGANConfig, VAEGANOutput

__all__ = [
    "CRNN",
    "VAEGAN",
    "Autoencoder",
    "AutoencoderConfig",
    "AutoencoderOutput",
    "CRNNConfig",
    "Config",
    "Detections",
    "Enhancer",
    "EnhancerConfig",
    "EnhancerOutput",
    "PyramidTransformer",
    "PyramidTransformerConfig",
    "SoraModel",
    "VAEGANConfig",
    "VAEGANOutput",
]
