import pytest
import torch
from torch import nn

from varl.build import build_reward
from varl.config import ReconstructionConfig
from varl.errors import CheckpointError, ConfigError, DataError, RewardError
from varl.rewards.judge import judge_now
from varl.rewards.perceptual import STAGES, VGG16, Heads, feature_distance, lpips, normalise_channels
from varl.rewards.reconstruction import ReconstructionReward, mean_squared_error
from varl.types import Prompt

NOISE = torch.Generator().manual_seed(0)
REAL = {f"{name}.png": torch.rand(3, 8, 8, generator=NOISE) for name in "abc"}
DRAWN = torch.rand(7, 3, 8, 8, generator=NOISE)
PROMPTS = [Prompt(image=f"{name}.png") for name in "aabbbca"]
MSE = ReconstructionConfig(lpips_weight=0.0)


def pictures(prompts):
    return torch.stack([REAL[prompt.image] for prompt in prompts])


def maps(*shapes):
    return [torch.randn(*shape, generator=NOISE) for shape in shapes]


@pytest.fixture(scope="module")
def tiny():
    """VGG16 in miniature, and heads for it, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vgg, heads = VGG16(((4, 4), (6, 6))), Heads((4, 6))
        for weight in heads.parameters():
            nn.init.uniform_(weight)
    return vgg, heads


# ---- distances of feature maps -----------------------------------------------------------------------------------------------------------


def test_unit_vectors_by_hand():
    features = torch.tensor([[3.0, 0.0], [4.0, 0.0]]).reshape(1, 2, 1, 2)  # (3, 4) and (0, 0)
    torch.testing.assert_close(normalise_channels(features).flatten(), torch.tensor([0.6, 0.0, 0.8, 0.0]))


def test_distances_by_hand():
    """One place of each layer: orthogonal vectors, then opposite ones."""
    a = [torch.tensor([5.0, 0.0]).reshape(1, 2, 1, 1), torch.tensor([2.0]).reshape(1, 1, 1, 1)]
    b = [torch.tensor([0.0, 9.0]).reshape(1, 2, 1, 1), torch.tensor([-7.0]).reshape(1, 1, 1, 1)]
    assert feature_distance(a, b).tolist() == [(2 + 4) / 2]
    assert lpips(a, b, [torch.tensor([0.25, 2.0]), torch.tensor([0.5])]).tolist() == [0.25 + 2.0 + 0.5 * 4]


def test_distances_are_means_over_places():
    a = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]).reshape(1, 2, 2, 2)
    b = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]).reshape(1, 2, 2, 2)
    assert feature_distance([a], [b]).tolist() == [2 / 4]
    assert lpips([a], [b], [torch.ones(2)]).tolist() == [2 / 4]


@pytest.mark.parametrize("distance", [feature_distance, lambda a, b: lpips(a, b, [torch.full((c,), 0.3) for c in (5, 7)])])
def test_equal_is_0_and_order_and_brightness_do_not_count(distance):
    a, b = maps((3, 5, 4, 4), (3, 7, 2, 2)), maps((3, 5, 4, 4), (3, 7, 2, 2))
    assert distance(a, a).tolist() == [0, 0, 0]
    assert torch.equal(distance(a, b), distance(b, a))
    torch.testing.assert_close(distance([100 * x for x in a], b), distance(a, b))
    turned = [[x.flip(1) for x in side] for side in (a, b)]
    torch.testing.assert_close(distance(*turned), distance(a, b))
    assert (distance(a, b) > 0.1).all()


def test_network_has_the_names_of_the_released_weights():
    with torch.device("meta"):
        vgg, heads = VGG16(), Heads()
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    assert list(vgg.state_dict()) == [f"features.{place}.{kind}" for place in places for kind in ("weight", "bias")]
    assert sum(weight.numel() for weight in vgg.parameters()) == 14_714_688
    assert vgg.ends == [3, 8, 15, 22, 29]
    shapes = {name: tuple(weight.shape) for name, weight in heads.state_dict().items()}
    assert shapes == {f"lin{k}.model.1.weight": (1, stage[-1], 1, 1) for k, stage in enumerate(STAGES)}


def test_network_shifts_and_scales_as_lpips_does_and_looks_behind_each_stage(tiny):
    vgg, _ = tiny
    convolutions = [layer for layer in vgg.features if isinstance(layer, nn.Conv2d)]
    signed = 2 * DRAWN - 1
    x = (signed - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    first = convolutions[1](convolutions[0](x).relu()).relu()
    second = convolutions[3](convolutions[2](nn.functional.max_pool2d(first, 2)).relu()).relu()
    got = vgg(DRAWN)
    assert len(got) == 2
    for have, want in zip(got, (first, second), strict=True):
        torch.testing.assert_close(have, want)


# ---- the reward --------------------------------------------------------------------------------------------------------------------------


def test_squared_error_is_that_of_pixels_between_minus_1_and_1():
    black, white = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    assert mean_squared_error(black, white).tolist() == [4.0]
    other = torch.rand(1, 3, 2, 2, generator=NOISE)
    torch.testing.assert_close(mean_squared_error(other, white), ((2 * other - 1) - (2 * white - 1)).square().mean()[None])


def test_the_reference_itself_earns_0(tiny):
    reward = ReconstructionReward(ReconstructionConfig(), pictures, *tiny)
    told = judge_now(reward, pictures(PROMPTS), PROMPTS)
    assert told.value.abs().max() < 1e-6
    assert (judge_now(reward, DRAWN, PROMPTS).value < -0.1).all()


def test_value_is_minus_the_weighted_sum_of_the_parts(tiny):
    told = ReconstructionReward(ReconstructionConfig(lpips_weight=0.5), pictures, *tiny)(DRAWN, PROMPTS)
    assert set(told.parts) == {"mse", "perceptual"}
    torch.testing.assert_close(told.value, -(told.parts["mse"] + 0.5 * told.parts["perceptual"]))
    torch.testing.assert_close(told.parts["mse"], mean_squared_error(DRAWN, pictures(PROMPTS)))


def test_without_a_network_it_is_the_squared_error():
    told = ReconstructionReward(MSE, pictures)(DRAWN, PROMPTS)
    assert set(told.parts) == {"mse"}
    torch.testing.assert_close(told.value, -mean_squared_error(DRAWN, pictures(PROMPTS)))


def test_kept_features_are_those_of_the_picture(tiny):
    vgg, heads = tiny
    reward = ReconstructionReward(ReconstructionConfig(), pictures, vgg, heads)
    want = lpips(vgg(DRAWN), vgg(pictures(PROMPTS)), [weight.flatten() for weight in heads.parameters()])
    for _ in range(2):
        torch.testing.assert_close(reward(DRAWN, PROMPTS).parts["perceptual"], want.detach(), rtol=1e-5, atol=1e-7)


def test_each_picture_has_its_own_value_however_many_are_judged(tiny):
    whole = ReconstructionReward(ReconstructionConfig(batch=16), pictures, *tiny)(DRAWN, PROMPTS).value
    for batch in (1, 3):
        part = ReconstructionReward(ReconstructionConfig(batch=batch), pictures, *tiny)(DRAWN, PROMPTS).value
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-6)
    order = [6, 2, 0, 5]
    some = ReconstructionReward(ReconstructionConfig(), pictures, *tiny)(DRAWN[order], [PROMPTS[i] for i in order]).value
    torch.testing.assert_close(some, whole[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("keep", "reads"), [(64, 3), (2, 4), (1, 4)])
def test_a_picture_is_read_once_while_it_is_kept(keep, reads):
    """a a b b b c a: with room for two, a has to be read again."""
    asked = []

    def reader(prompts):
        asked.extend(prompt.image for prompt in prompts)
        return pictures(prompts)

    told = ReconstructionReward(ReconstructionConfig(lpips_weight=0.0, keep=keep), reader)(DRAWN, PROMPTS)
    assert len(asked) == reads
    assert torch.equal(told.value, ReconstructionReward(MSE, pictures)(DRAWN, PROMPTS).value)


def test_a_reference_that_cannot_be_read_is_a_failure_said_once(tiny, caplog):
    def reader(prompts):
        if prompts[0].image == "b.png":
            raise DataError("b.png: is cut short. Copy it again.")
        return pictures(prompts)

    told = ReconstructionReward(ReconstructionConfig(batch=2), reader, *tiny)(DRAWN, PROMPTS)
    assert told.value.isnan().tolist() == [prompt.image == "b.png" for prompt in PROMPTS]
    assert caplog.text.count("b.png: is cut short") == 1


def test_a_broken_drawing_fails_alone(tiny):
    broken = DRAWN.clone()
    broken[1, 0, 0, 0] = torch.nan
    told = ReconstructionReward(ReconstructionConfig(), pictures, *tiny)(broken, PROMPTS)
    assert told.value.isnan().tolist() == [False, True, False, False, False, False, False]


def test_what_cannot_be_compared_is_named():
    with pytest.raises(RewardError, match="prompt 'a cat': has no picture to compare with"):
        ReconstructionReward(MSE, pictures)(DRAWN[:1], [Prompt(text="a cat")])
    with pytest.raises(RewardError, match=r"a.png: is \[8, 8\] pixels, those drawn are \[4, 4\]"):
        ReconstructionReward(MSE, pictures)(DRAWN[:1, :, :4, :4], PROMPTS[:1])


# ---- from settings -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lpips_weight": -1.0}, "lpips_weight=-1.0: must be 0"),
        ({"vgg": "vgg16.pth"}, "Set both vgg and heads"),
        ({"vgg": "v", "heads": "h", "features": "a:b"}, "two perceptual distances"),
        ({"keep": 0}, "keep=0: must be 1"),
    ],
)
def test_settings_that_contradict_are_named(settings, says):
    with pytest.raises(ConfigError, match=says):
        ReconstructionConfig(**settings)


def test_a_network_or_pictures_that_are_missing_are_named():
    with pytest.raises(ConfigError, match=r"lpips_weight=1\.0: there is no network to look with"):
        build_reward(ReconstructionConfig(), pictures)
    with pytest.raises(ConfigError, match="reconstruction compares with real pictures, and this data has none"):
        build_reward(MSE)


def test_lpips_from_files(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vgg, heads = VGG16(), Heads()
    torch.save(vgg.state_dict() | {"classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg16.pth")
    torch.save(heads.state_dict(), tmp_path / "heads.pth")
    config = ReconstructionConfig(vgg=str(tmp_path / "vgg16.pth"), heads=str(tmp_path / "heads.pth"), batch=1)
    real = torch.rand(1, 3, 32, 32, generator=NOISE)
    drawn = torch.rand(1, 3, 32, 32, generator=NOISE)
    told = judge_now(build_reward(config, lambda prompts: real), drawn, [Prompt(image="real")])
    torch.testing.assert_close(told.parts["perceptual"], heads(vgg(drawn), vgg(real)).detach(), rtol=1e-5, atol=1e-7)

    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, tmp_path / "heads.pth")
    with pytest.raises(CheckpointError, match=r"heads.pth: the weights do not fit Heads[\s\S]*lin4.model.1.weight"):
        build_reward(config, lambda prompts: real)


def test_features_by_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def features(images):\n    return [images, images.mean((2, 3), keepdim=True)]\n")
    reward = build_reward(ReconstructionConfig(features=f"{file}:features"), pictures)
    told = judge_now(reward, DRAWN, PROMPTS)
    real = pictures(PROMPTS)
    want = feature_distance([DRAWN, DRAWN.mean((2, 3), keepdim=True)], [real, real.mean((2, 3), keepdim=True)])
    torch.testing.assert_close(told.parts["perceptual"], want)
