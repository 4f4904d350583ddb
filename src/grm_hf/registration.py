"""Makes the auto classes and `pipeline` of transformers know GRM without remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .modeling import GRMConfig, GRMForRewardModeling, GRMPipeline


TASK = "reward-modeling"


def register() -> None:
    """Register with AutoConfig, AutoModel, AutoModelForSequenceClassification and the pipelines; again is harmless."""
    AutoConfig.register(GRMConfig.model_type, GRMConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForSequenceClassification):
        auto_class.register(GRMConfig, GRMForRewardModeling, exist_ok=True)
    # Saving copies a model's code files only for a class that knows its auto class.
    GRMConfig.register_for_auto_class()
    GRMForRewardModeling.register_for_auto_class("AutoModel")
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=GRMPipeline, pt_model=AutoModel, type="text")
