"""The part of grm_hf that travels with every checkpoint: configuration, losses, model, text encoding and pipeline.

These files import the standard library, torch, transformers and one another, never `grm_hf`: saved next to the weights
they must load in a process that has only torch and transformers.
"""

from .configuration_grm import GRMConfig
from .modeling_grm import GRMForRewardModeling, GRMOutput, RewardHead
from .pipeline_grm import GRMPipeline


__all__ = ["GRMConfig", "GRMForRewardModeling", "GRMOutput", "GRMPipeline", "RewardHead"]
