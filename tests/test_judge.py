"""The judge: answers later, adds up, and tells a failure from a bad picture."""

import threading
from concurrent.futures import Future

import pytest
import torch

from varl.errors import ConfigError, RewardError
from varl.rewards.judge import RewardJudge, combine, judge_now
from varl.rewards.toy import brightness, left_brightness, load_callable, redness
from varl.types import Found, Judge, Judgement, Prompt, Region

NAN = float("nan")


def prompt(regions):
    return Prompt(regions=tuple(Region(text=str(r)) for r in range(regions)))


PROMPTS = [prompt(1), prompt(2), prompt(0)]
IMAGES = torch.linspace(0, 1, 3).reshape(3, 1, 1, 1).expand(3, 3, 4, 6)


def same(got, want):
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=1e-6, equal_nan=True)


def constant(*values):
    return lambda images, prompts: torch.tensor(values)


@pytest.fixture
def judge():
    """Builds judges, and closes them."""
    made = []

    def make(**parts):
        made.append(RewardJudge(parts))
        return made[-1]

    yield make
    for one in made:
        one.close()


# ---- toys -------------------------------------------------------------------------------------------------------------------------------


def test_toys_by_hand():
    image = torch.zeros(1, 3, 2, 3)
    image[0, 0, :, 0] = 1.0  # the left third is red
    assert brightness(image, [Prompt()]).tolist() == pytest.approx([1 / 9])
    assert left_brightness(image, [Prompt()]).tolist() == pytest.approx([1 / 3])
    assert redness(image, [Prompt()]).tolist() == pytest.approx([1 / 3])


# ---- one reward -------------------------------------------------------------------------------------------------------------------------


def test_a_plain_tensor_becomes_a_judgement():
    judgement = judge_now(lambda images, prompts: images.double().mean((1, 2, 3)), IMAGES, PROMPTS)
    assert judgement.value.dtype == torch.float32
    same(judgement.value, [0.0, 0.5, 1.0])
    assert judgement.region_value is None
    assert judgement.parts == {}


def test_what_is_not_finite_has_failed_with_its_regions():
    told = Judgement(
        value=torch.tensor([1.0, float("inf"), -float("inf")]),
        parts={"ratio": torch.tensor([2.0, float("inf"), 3.0])},
        region_value=torch.tensor([[1.0, NAN], [0.5, 0.5], [NAN, NAN]]),
    )
    judgement = judge_now(lambda images, prompts: told, IMAGES, PROMPTS)
    same(judgement.value, [1.0, NAN, NAN])
    same(judgement.parts["ratio"], [2.0, NAN, 3.0])
    same(judgement.region_value, [[1.0, NAN], [NAN, NAN], [NAN, NAN]])


def test_no_gradient_comes_out():
    images = IMAGES.clone().requires_grad_()
    assert not judge_now(brightness, images, PROMPTS).value.requires_grad


SHORT_PART = Judgement(value=torch.zeros(3))
SHORT_PART.parts["x"] = torch.zeros(1)
ONE_BOX_EACH = Judgement(value=torch.zeros(3))
object.__setattr__(ONE_BOX_EACH, "region_box", torch.zeros(3, 4))  # which only a test run would refuse by itself


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (torch.zeros(2), r"value is \[2\], must be a tensor of shape \[3\]"),
        (torch.zeros(3, 1), r"value is \[3, 1\]"),
        (0.5, "value is float"),
        (SHORT_PART, r"parts\['x'\] is \[1\]"),
        (ONE_BOX_EACH, r"region_box is \[3, 4\]"),
    ],
)
def test_a_wrong_shape_is_an_error(answer, says, judge):
    def reward(images, prompts):
        return answer

    with pytest.raises(RewardError, match=says):
        judge_now(reward, IMAGES, PROMPTS)
    with pytest.raises(RewardError, match=says):
        judge(r=(1.0, reward)).submit(IMAGES, PROMPTS).result()


# ---- several ----------------------------------------------------------------------------------------------------------------------------


def test_values_add_up_with_their_weights(judge):
    told = judge(a=(1.0, constant(1.0, 2.0, 3.0)), b=(-0.5, constant(4.0, 4.0, NAN))).submit(IMAGES, PROMPTS).result()
    same(told.value, [-1.0, 0.0, NAN])
    same(told.parts["a"], [1.0, 2.0, 3.0])
    same(told.parts["b"], [4.0, 4.0, NAN])
    assert told.region_value is None


def test_a_reward_of_weight_zero_is_only_watched(judge):
    same(judge(a=(1.0, constant(1.0, 2.0, 3.0)), b=(0.0, constant(NAN, 1.0, 1.0))).submit(IMAGES, PROMPTS).result().value, [1.0, 2.0, 3.0])


def test_parts_keep_their_names():
    inner = Judgement(value=torch.zeros(3), parts={"ned": torch.ones(3)})
    assert set(combine({"ocr": (2.0, inner)}).parts) == {"ocr", "ocr/ned"}


LOCAL = Judgement(
    value=torch.tensor([1.0, 0.75, NAN]),
    region_value=torch.tensor([[1.0, NAN], [0.5, 0.25], [NAN, NAN]]),
    region_box=torch.full((3, 2, 4), 0.5),
    found=((Found(text="0", confidence=1.0, box=(0.0, 0.0, 1.0, 1.0)),), (), ()),
)


def test_one_local_reward_keeps_its_shares():
    told = combine({"ocr": (2.0, LOCAL)})
    same(told.region_value, [[2.0, NAN], [1.0, 0.5], [NAN, NAN]])
    assert torch.equal(told.region_box, LOCAL.region_box)
    assert told.found == LOCAL.found


def test_a_global_reward_is_spread_evenly_and_regions_still_sum_to_value():
    told = combine({"look": (1.0, Judgement(value=torch.tensor([10.0, 20.0, 30.0]))), "ocr": (2.0, LOCAL)})
    same(told.value, [12.0, 21.5, NAN])
    same(told.region_value, [[12.0, NAN], [11.0, 10.5], [NAN, NAN]])
    assert torch.equal(told.region_value[:2].nansum(1), told.value[:2])


def test_local_rewards_add_up_region_by_region():
    same(combine({"a": (1.0, LOCAL), "b": (3.0, LOCAL)}).region_value, [[4.0, NAN], [2.0, 1.0], [NAN, NAN]])


def test_a_local_reward_of_weight_zero_says_nowhere():
    told = combine({"look": (1.0, Judgement(value=torch.ones(3))), "ocr": (0.0, LOCAL)})
    assert told.region_value is None
    same(told.value, [1.0, 1.0, 1.0])


def test_regions_need_not_be_the_prompts():
    shares = torch.tensor([[0.5, 0.5, NAN], [0.25, 0.25, 0.0], [0.0, NAN, NAN]])
    letters = Judgement(value=torch.tensor([1.0, 0.5, 0.0]), region_value=shares)
    told = combine({"ocr": (1.0, letters), "look": (1.0, Judgement(value=torch.tensor([2.0, 3.0, 4.0])))})
    same(told.region_value, [[1.5, 1.5, NAN], [1.25, 1.25, 1.0], [4.0, NAN, NAN]])


@pytest.mark.parametrize("shares", [torch.zeros(3, 3), torch.zeros(3, 2)], ids=["another number", "another picture has fewer"])
def test_rewards_of_different_regions_do_not_add_up(shares):
    other = Judgement(value=torch.zeros(3), region_value=shares)
    with pytest.raises(RewardError, match="a, b divide pictures into different regions"):
        combine({"a": (1.0, LOCAL), "b": (1.0, other)})


def test_regions_keep_their_own_boxes():
    """A global reward that drew boxes says nothing about where another reward's regions are; alone it says where to mask."""
    letters = Judgement(value=torch.ones(3), region_value=torch.full((3, 5), 0.2))
    boxed = Judgement(value=torch.ones(3), region_box=torch.full((3, 1, 4), 0.25))
    assert combine({"letters": (1.0, letters), "paper": (1.0, boxed)}).region_box is None
    assert torch.equal(combine({"look": (1.0, Judgement(value=torch.ones(3))), "paper": (1.0, boxed)}).region_box, boxed.region_box)


def test_shares_that_fall_short_of_the_value_are_filled_up_evenly():
    short = Judgement(value=torch.ones(3), region_value=torch.tensor([[0.0, 0.5], [0.5, 0.5], [0.25, NAN]]))
    same(combine({"a": (2.0, short)}).region_value, [[0.5, 1.5], [1.0, 1.0], [2.0, NAN]])


# ---- in the background ------------------------------------------------------------------------------------------------------------------


def test_it_is_a_judge(judge):
    assert isinstance(judge(a=(1.0, brightness)), Judge)
    with pytest.raises(RewardError, match="no rewards"):
        RewardJudge({})


def test_the_caller_goes_on_while_rewards_are_asked_side_by_side(judge):
    both = threading.Barrier(2, timeout=20)
    go = threading.Event()

    def slow(images, prompts):
        both.wait()  # passes only if the two run at the same time
        go.wait(20)
        return brightness(images, prompts)

    future = judge(a=(1.0, slow), b=(1.0, slow)).submit(IMAGES, PROMPTS)
    assert isinstance(future, Future)
    assert not future.done()
    go.set()
    same(future.result(20).value, [0.0, 1.0, 2.0])


def test_answers_belong_to_their_questions(judge):
    one = judge(a=(1.0, brightness))
    futures = [one.submit(IMAGES * k, PROMPTS) for k in range(20)]
    for k, future in enumerate(futures):
        same(future.result().value, [0.0, 0.5 * k, 1.0 * k])


def test_a_reward_that_raises_fails_its_batch_and_is_logged_once(judge, caplog):
    def moody(images, prompts):
        if images.max() > 1:
            raise ZeroDivisionError("no mood")
        return brightness(images, prompts)

    one = judge(moody=(1.0, moody), other=(1.0, brightness))
    bad, good, worse = (one.submit(IMAGES * k, PROMPTS) for k in (2, 1, 3))
    same(bad.result().value, [NAN] * 3)
    same(bad.result().parts["other"], [0.0, 1.0, 2.0])
    same(good.result().value, [0.0, 1.0, 2.0])
    same(worse.result().value, [NAN] * 3)
    assert caplog.text.count("reward moody failed for 3 pictures: ZeroDivisionError: no mood") == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, RewardError("engine missing"), ConfigError("wrong")], ids=str)
def test_what_must_stop_the_run_comes_through(judge, error):
    def reward(images, prompts):
        raise error

    kind = error if isinstance(error, type) else type(error)
    future = judge(a=(1.0, reward)).submit(IMAGES, PROMPTS)
    with pytest.raises(kind):
        future.result()


def test_closing_closes_the_rewards():
    class Reward:
        closed = False

        def __call__(self, images, prompts):
            return brightness(images, prompts)

        def close(self):
            self.closed = True

    reward = Reward()
    one = RewardJudge({"a": (1.0, reward)})
    future = one.submit(IMAGES, PROMPTS)
    one.close()
    assert reward.closed
    assert future.done()


# ---- callables by name ------------------------------------------------------------------------------------------------------------------


def test_a_callable_by_module_or_by_file(tmp_path):
    assert load_callable("varl.rewards.toy:redness") is redness
    file = tmp_path / "mine.py"
    file.write_text("def darkness(images, prompts):\n    return 1 - images.mean((1, 2, 3))\n")
    same(judge_now(load_callable(f"{file}:darkness"), IMAGES, PROMPTS).value, [1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("redness", "must be module:function"),
        (":redness", "must be module:function"),
        ("no.such.module:f", "module no.such.module cannot be imported"),
        ("varl.rewards.toy:rednes", "has no callable 'rednes'. It has:.*redness"),
        ("nowhere.py:f", "there is no file"),
    ],
)
def test_a_callable_that_is_not_there_is_named(target, says):
    with pytest.raises(ConfigError, match=says):
        load_callable(target)
