"""The auto classes and pipelines know GRM, with the package and, through a checkpoint's own code, without."""

import importlib

import pytest
import torch
from clean_process import run_clean
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, pipeline

import grm_hf
from grm_hf import GRMConfig, GRMForRewardModeling, GRMPipeline


TEXTS = ["Name number 3.", "It is clearly 3.", "No idea"]
CODE_FILES = {"configuration_grm.py", "encoding_grm.py", "losses_grm.py", "modeling_grm.py", "pipeline_grm.py"}

SCORE = """
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained({folder!r}, trust_remote_code=True)
batch = tokenizer({texts!r}, return_tensors="pt", padding=True)
result = {{"scores": []}}
for auto_class in (AutoModel, AutoModelForSequenceClassification):
    model = auto_class.from_pretrained({folder!r}, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        result["scores"].append(model(**batch).logits[:, 0].tolist())
pair = {{"prompt": "Name number 3.", "chosen": " It is 3.", "rejected": " No idea"}}
result["inferred"] = pipeline(model={folder!r}, trust_remote_code=True)(pair)
result["named"] = pipeline("reward-modeling", model={folder!r}, trust_remote_code=True)(pair)
result["stock"] = pipeline("text-classification", model={folder!r}, trust_remote_code=True)({texts!r}[0])
"""


@pytest.fixture
def checkpoint(make_grm, tokenizer, tmp_path):
    folder = tmp_path / "checkpoint"
    make_grm().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scores_of(folder, tokenizer):
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        return AutoModel.from_pretrained(folder)(**batch).logits[:, 0].tolist()


def test_auto_classes_load_a_checkpoint_without_remote_code(checkpoint):
    assert type(AutoConfig.from_pretrained(checkpoint)) is GRMConfig
    assert type(AutoModel.from_pretrained(checkpoint)) is GRMForRewardModeling
    assert type(AutoModelForSequenceClassification.from_pretrained(checkpoint)) is GRMForRewardModeling


def test_registering_twice_changes_nothing(checkpoint):
    importlib.reload(grm_hf)
    grm_hf.register()
    assert type(AutoModel.from_pretrained(checkpoint)) is GRMForRewardModeling
    assert type(pipeline("reward-modeling", model=str(checkpoint))) is GRMPipeline


def test_installed_package_infers_the_pipeline_task(checkpoint):
    assert type(pipeline(model=str(checkpoint), trust_remote_code=True)) is GRMPipeline
    assert type(pipeline(model=str(checkpoint))) is GRMPipeline


def test_pipeline_takes_a_model_object(make_grm, tokenizer):
    scorer = pipeline("reward-modeling", model=make_grm(), tokenizer=tokenizer)
    assert set(scorer("Name number 3.")) == {"score"}


def test_checkpoint_holds_its_code(checkpoint):
    assert {path.name for path in checkpoint.glob("*.py")} == CODE_FILES


def test_checkpoint_loads_with_equal_scores_in_a_process_without_grm_hf(checkpoint, tokenizer, tmp_path):
    result = run_clean(SCORE.format(folder=str(checkpoint), texts=TEXTS), tmp_path)
    expected = scores_of(checkpoint, tokenizer)
    assert result["scores"] == [expected, expected]
    here = pipeline("reward-modeling", model=str(checkpoint))(
        {"prompt": "Name number 3.", "chosen": " It is 3.", "rejected": " No idea"}
    )
    assert result["inferred"] == result["named"] == here
    assert result["stock"][0]["score"] == pipeline("text-classification", model=str(checkpoint))(TEXTS[0])[0]["score"]


def test_code_travels_again_from_a_model_fine_tuned_without_grm_hf(checkpoint, tokenizer, tmp_path):
    tuned = tmp_path / "tuned"
    code = f"""
import torch
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained({str(checkpoint)!r}, trust_remote_code=True).train()
ids = torch.randint(4, 300, (2, 2, 9))
mask = torch.ones_like(ids)
model(ids, attention_mask=mask, completion_mask=mask, labels=torch.zeros(2, dtype=torch.long)).loss.backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
model.save_pretrained({str(tuned)!r})
AutoTokenizer.from_pretrained({str(checkpoint)!r}, trust_remote_code=True).save_pretrained({str(tuned)!r})
result = None
"""
    run_clean(code, tmp_path)
    assert {path.name for path in tuned.glob("*.py")} == CODE_FILES
    result = run_clean(SCORE.format(folder=str(tuned), texts=TEXTS), tmp_path)
    assert result["scores"][0] == scores_of(tuned, tokenizer)
    assert result["scores"][0] != scores_of(checkpoint, tokenizer)


def test_saved_config_never_ties_its_code_to_another_repository(make_grm, tmp_path):
    config = GRMConfig(auto_map={"AutoModel": "somebody/else--modeling_grm.GRMForRewardModeling"})
    config.save_pretrained(tmp_path)
    assert "somebody" not in (tmp_path / "config.json").read_text()


def test_saved_pipeline_loads_again(checkpoint, tmp_path):
    pipeline("reward-modeling", model=str(checkpoint)).save_pretrained(tmp_path / "pipeline")
    pipe = pipeline("reward-modeling", model=str(tmp_path / "pipeline"))
    assert pipe("Name.") == pipeline("reward-modeling", model=str(checkpoint))("Name.")


def test_unknown_attribute_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        grm_hf.nonsense  # noqa: B018


def test_every_public_name_is_importable():
    for name in grm_hf.__all__:
        assert getattr(grm_hf, name) is not None
