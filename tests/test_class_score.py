import pytest
import torch

from varl.build import build_reward
from varl.config import ClassifierConfig, ClassScoreConfig
from varl.errors import ConfigError, RewardError
from varl.models.classifier import Classifier
from varl.plan.missing import judge_of
from varl.rewards.class_score import ClassScore
from varl.types import Judgement, Prompt


def make(floor: float = -8.0) -> ClassScore:
    torch.manual_seed(0)
    return ClassScore(Classifier(ClassifierConfig(num_classes=3, image_size=(8, 8), widths=(4,))).eval(), floor)


def test_the_log_probability_of_the_prompts_class():
    reward, images = make(), torch.rand(6, 3, 8, 8)
    logp = reward.classifier.classify(reward.classifier(images))
    judgement = reward(images, [Prompt(label=i % 3) for i in range(6)])
    assert isinstance(judgement, Judgement)
    torch.testing.assert_close(judgement.value, logp[range(6), [0, 1, 2, 0, 1, 2]].detach())
    assert torch.equal(judgement.parts["class_accuracy"], (logp.argmax(1) == torch.tensor([0, 1, 2, 0, 1, 2])).float())
    torch.testing.assert_close(sum(reward(images, [Prompt(label=i)] * 6).value.exp() for i in range(3)), torch.ones(6))


def test_hopeless_pictures_count_as_the_floor():
    reward, images = make(), torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        reward.classifier.head.bias.copy_(torch.tensor([0.0, 100.0, 0.0]))
    assert reward(images, [Prompt(label=0), Prompt(label=1)]).value.tolist() == pytest.approx([-8.0, 0.0], abs=1e-6)


def test_what_it_cannot_judge():
    with pytest.raises(RewardError, match="pictures of 4x8 pixels: the classifier was trained on 8x8"):
        make()(torch.rand(1, 3, 4, 8), [Prompt(label=0)])
    for label in (None, 3, -1):
        with pytest.raises(RewardError, match=f"has label {label}: the classifier knows 0 to 2"):
            make()(torch.rand(1, 3, 8, 8), [Prompt(label=label)])
    with pytest.raises(ConfigError, match=r"class_score.floor=0.0: must be below 0"):
        ClassScoreConfig(classifier="bundled:glyphs_reward", floor=0.0)


def test_a_folder_that_is_none_is_named_by_its_setting():
    with pytest.raises(ConfigError, match=r"class_score\.classifier='nowhere': no config\.yaml in nowhere\. Give a classifier's folder"):
        judge_of("mine", ClassScoreConfig(classifier="nowhere"), None)
    with pytest.raises(ConfigError, match=r"bundled/words: kind='next_scale': draws pictures, and names none"):
        judge_of("mine", ClassScoreConfig(classifier="bundled:words"), None)


def test_by_its_folder():
    reward = build_reward(ClassScoreConfig(classifier="bundled:glyphs_reward"))
    assert isinstance(reward, ClassScore)
    assert reward.classifier.config.num_classes == 12
