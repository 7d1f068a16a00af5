import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import dropout

from tabular import InstantJudge, TabularPolicy, brightness
from varl.algorithms.advantages import group_advantages
from varl.algorithms.grpo import GRPO
from varl.algorithms.var_rl import VARRL
from varl.config import GRPOConfig, MiddleStep, NextScaleConfig, OptimConfig, TokenizerConfig, TrainConfig, VARRLConfig
from varl.distributed.mesh import World
from varl.errors import NumericsError, RewardError
from varl.models.next_scale import NextScale
from varl.policies.next_scale import NextScalePolicy
from varl.rewards.judge import RewardJudge
from varl.rng import Stream
from varl.tokenizers.multiscale_vq import MultiScaleVQ
from varl.train.loop import STOPPED, Tally, Trainer, ahead
from varl.train.record import definition
from varl.types import Prompt, Rollout, Score, TrainBatch

PROMPTS = [Prompt(label=0), Prompt(label=1), Prompt(label=0)]
GROUP = 4
FREE = OptimConfig(lr=1e-2, max_grad_norm=1e9)


def trainer(tmp_path, policy=None, reward=brightness, *, algorithm=None, judge=None, **settings) -> Trainer:
    return Trainer(
        TrainConfig(**({"steps": 3, "optim": FREE, "rollouts_per_backward": 64} | settings)),
        seed=5,
        policy=policy or TabularPolicy(vocab=3),
        algorithm=algorithm or GRPO(GRPOConfig(num_generations=GROUP)),
        judge=judge or InstantJudge(reward),
        prompts=lambda step: (PROMPTS, range(len(PROMPTS))),
        world=World(),
        failures=tmp_path / "failures",
    )


def weights(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.parameters]


def grads(trainer: Trainer) -> list[Tensor]:
    """Of the update that was just made."""
    return [p.grad.clone() for p in trainer.parameters]


def largest_gap(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- one update


def test_the_gradient_is_the_hand_written_sum_over_tokens_divided_by_their_number(tmp_path):
    t = trainer(tmp_path)
    prompts = [p for p in PROMPTS for _ in range(GROUP)]
    rollout = t.policy.rollout(prompts, Stream(seed=5, path=("rollout", 0), rows=tuple(range(len(PROMPTS) * GROUP))))
    value = brightness(t.policy.decode(rollout), prompts)
    advantage = group_advantages(value.reshape(-1, GROUP)).reshape(-1, 1)
    loss = -(t.policy.score(rollout).logp * advantage).sum() / rollout.actions.numel()
    want = torch.autograd.grad(loss, t.parameters)
    metrics = t.update()
    assert max(float(g.abs().max()) for g in want) > 0.01
    assert largest_gap(want, grads(t)) < 1e-6
    assert metrics["grad_norm"] == pytest.approx(torch.cat([g.flatten() for g in want]).norm().item(), rel=1e-5)
    assert metrics["reward"] == pytest.approx(value.mean().item(), rel=1e-6)
    assert metrics["tokens_trained"] == rollout.actions.numel()
    assert metrics["reward_calls"] == len(prompts)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("chunk", [1, 8, 1000])
@pytest.mark.parametrize("backward", [1, 3])
def test_micro_batch_and_chunk_do_not_change_the_gradient(tmp_path, loss_type, chunk, backward):
    def gradient(**sizes) -> list[Tensor]:
        t = trainer(
            tmp_path,
            algorithm=GRPO(GRPOConfig(num_generations=GROUP, loss_type=loss_type, rollouts_per_chunk=sizes["chunk"], panw_alpha=0.7)),
            rollouts_per_backward=sizes["backward"],
        )
        t.update()
        return grads(t)

    whole = gradient(chunk=64, backward=1000)
    assert max(float(g.abs().max()) for g in whole) > 0.01
    assert largest_gap(whole, gradient(chunk=chunk, backward=backward)) < 1e-6


class Recorded(GRPO):
    """Keeps what every pass over a batch was, and said."""

    def __init__(self, config: GRPOConfig) -> None:
        super().__init__(config)
        self.seen: list[tuple[TrainBatch, dict[str, float]]] = []

    def objective(self, policy, batch):
        objective, metrics = super().objective(policy, batch)
        self.seen.append((batch, metrics))
        return objective, metrics


def test_a_second_iteration_learns_from_the_same_rollouts_and_only_there_the_clip_acts(tmp_path):
    algorithm = Recorded(GRPOConfig(num_generations=GROUP, num_iterations=2, epsilon=1e-6))
    judge = InstantJudge(brightness)
    t = trainer(tmp_path, algorithm=algorithm, judge=judge)
    metrics = t.update()
    (first, on_policy), (second, off_policy) = algorithm.seen
    assert judge.asked == len(PROMPTS) * GROUP == metrics["reward_calls"]
    assert torch.equal(first.rollout.actions, second.rollout.actions)
    assert torch.equal(first.rollout.logp, second.rollout.logp)
    assert on_policy["clip_ratio/region_mean"] == 0
    assert on_policy["sampling/sampling_logp_difference/max"] < 1e-6
    assert off_policy["clip_ratio/region_mean"] > 0.3
    assert off_policy["sampling/sampling_logp_difference/max"] > 1e-3
    assert t.progress.replay_gap_max < 1e-6
    assert t.progress.step == 1
    assert metrics["tokens_trained"] == first.rollout.actions.numel()


def test_moving_average_by_hand(tmp_path):
    t = trainer(tmp_path, ema_decay=0.75)
    mean = weights(t)
    for _ in range(2):
        t.update()
        mean = [0.75 * m + 0.25 * w for m, w in zip(mean, weights(t), strict=True)]
    own = weights(t)
    with t.ema.swapped(t.policy.module):
        torch.testing.assert_close(weights(t), mean, rtol=1e-6, atol=1e-7)
    assert same(weights(t), own)


def test_schedule(tmp_path):
    t = trainer(tmp_path, steps=5, optim=OptimConfig(lr=0.3, warmup_steps=2, schedule="linear"))
    assert [t.update()["lr"] for _ in range(5)] == pytest.approx([0.15, 0.3, 0.3, 0.2, 0.1])


def test_clipping_scales_the_gradient_and_reports_its_norm_before(tmp_path):
    free, clipped = trainer(tmp_path), trainer(tmp_path, optim=OptimConfig(max_grad_norm=0.01))
    assert clipped.update()["grad_norm"] == pytest.approx(free.update()["grad_norm"], rel=1e-6)
    factor = 0.01 / torch.cat([g.flatten() for g in grads(free)]).norm()
    assert factor < 0.5
    torch.testing.assert_close(grads(clipped), [factor * g for g in grads(free)], rtol=1e-3, atol=1e-8)


def test_bfloat16_keeps_weights_and_log_probs_in_fp32(tmp_path):
    torch.manual_seed(0)
    config = NextScaleConfig(
        depth=1,
        width=16,
        heads=2,
        grids=((1, 1), (2, 2)),
        num_classes=2,
        tokenizer=TokenizerConfig(vocab=16, channels=4, width=8, multipliers=(1,), blocks=1, attention=False, patch=2),
    )
    policy = NextScalePolicy(NextScale(config), MultiScaleVQ(config.tokenizer, config.grids), dtype=torch.bfloat16)
    algorithm = Recorded(GRPOConfig(num_generations=GROUP))
    t = trainer(tmp_path, policy, algorithm=algorithm)
    before = weights(t)
    metrics = t.update()
    rollout = algorithm.seen[0][0].rollout
    assert rollout.logp.dtype == policy.score(rollout).logp.dtype == torch.float32
    assert {p.dtype for p in t.parameters} == {g.dtype for g in grads(t)} == {torch.float32}
    assert not same(before, weights(t))
    assert 0 < metrics["entropy"] <= torch.tensor(16.0).log() + 1e-3


def test_every_metric_of_a_step_is_defined_and_steps_have_their_own_entropy(tmp_path):
    t = trainer(tmp_path)
    metrics = t.update()
    for name in metrics:
        if name != "step":
            definition(name)
    assert {f"entropy/step_{s}" for s in range(3)} <= metrics.keys()
    sizes = TabularPolicy.grids
    mean = sum(metrics[f"entropy/step_{s}"] * h * w for s, (h, w) in enumerate(sizes)) / sum(h * w for h, w in sizes)
    assert metrics["entropy"] == pytest.approx(mean, rel=1e-5)
    assert 0.01 < metrics["memory_gb"] < 1000
    parts = sum(metrics[f"seconds/{phase}"] for phase in ("rollout", "decode", "reward_wait", "train", "optimizer"))
    assert 0 < parts <= metrics["seconds/total"] == t.progress.seconds


def test_a_tally_weighs_by_rows_and_keeps_maxima(tmp_path):
    algorithm = GRPO(GRPOConfig(num_generations=GROUP))
    t = trainer(tmp_path)
    rng = Stream(seed=0, rows=(0, 1, 2))
    (batch,) = algorithm.collect(t.policy, PROMPTS, t.judge, rng, 0)
    tally = Tally()
    short, long = batch.rows(range(GROUP)), batch.rows(range(GROUP, 3 * GROUP))
    tally.add_piece(replace(short, metrics={"reward": 1.0, "reward_failed": 0.25}))
    tally.add_piece(replace(long, metrics={"reward": 4.0, "judged": 16.0, "reward_failed": 0.5}))
    tally.add_objective(short, 3.0, {"entropy": 2.0, "sampling/sampling_logp_difference/max": 0.5})
    tally.add_objective(long, -1.0, {"entropy": 0.5, "sampling/sampling_logp_difference/max": 0.2})
    means, totals = tally.means(), tally.over_ranks()
    assert means["reward"] == 3.0
    assert means["entropy"] == 1.0
    assert means["sampling/sampling_logp_difference/max"] == 0.5
    assert "judged" not in means
    assert (totals["judged"], totals["failed"], totals["loss"]) == (GROUP + 16, 1 + 8, -2.0)
    assert totals["size"] == totals["tokens"] == batch.rollout.actions.numel()


# ---- the replay gate


class Dropping(TabularPolicy):
    """Left in training mode, with something there that drops."""

    def step_law(self, module, t, prompts, actions):
        law = super().step_law(module, t, prompts, actions)
        return (law * dropout(torch.ones_like(law), 0.5, module.training)).log_softmax(-1)


class SampleLawRecorded(TabularPolicy):
    """Draws under another law than it scores, and records the log-probs of the wrong one."""

    def rollout(self, prompts, rng):
        honest = super().rollout(prompts, rng)
        return replace(honest, logp=honest.logp - 0.3, sample_logp=honest.logp - 0.3)


class SampleLawScored(TabularPolicy):
    def rollout(self, prompts, rng):
        honest = super().rollout(prompts, rng)
        return replace(honest, logp=honest.logp - 0.3, sample_logp=honest.logp)


class Noisy(TabularPolicy):
    def score(self, rollout: Rollout) -> Score:
        score = super().score(rollout)
        return replace(score, logp=score.logp + 0.1 * torch.rand(score.logp.shape))


class OffByOne(TabularPolicy):
    """The training pass sees every token's predecessors shifted by one."""

    def score(self, rollout: Rollout) -> Score:
        law = self.law(self.module, rollout.prompts, rollout.actions.roll(1, 1))
        score = super().score(rollout)
        return replace(score, logp=law.gather(-1, rollout.actions[:, :, None]).squeeze(-1))


LIES = {
    Dropping: "in training mode.*Call eval",
    SampleLawRecorded: "recorded values are those of the sample law: guidance, temperature or filter",
    SampleLawScored: "recomputed values are those of the sample law: guidance, temperature or filter",
    Noisy: "Scoring the same rollout twice gives two results",
    OffByOne: r"largest difference is at token [1-6] \(step [12]\).*alignment",
}


@pytest.mark.parametrize("kind", LIES, ids=lambda kind: kind.__name__)
def test_the_replay_gate_names_what_differs_and_nothing_is_updated(tmp_path, kind):
    t = trainer(tmp_path, kind(vocab=3))
    before, training = weights(t), [m.training for m in t.policy.module.modules()]
    told = []
    with pytest.raises(NumericsError, match=f"replay gate.*{LIES[kind]}"):
        t.run(told.append)
    assert same(before, weights(t))
    assert t.progress.step == 0
    assert told == []
    assert not (tmp_path / "failures").exists()
    assert [m.training for m in t.policy.module.modules()] == training


@pytest.mark.parametrize(
    "algorithm", [GRPOConfig(num_generations=GROUP), VARRLConfig(middle_step=MiddleStep(index=1))], ids=["grpo", "var_rl"]
)
def test_an_honest_policy_passes_the_gate(tmp_path, algorithm):
    made = VARRL(algorithm) if isinstance(algorithm, VARRLConfig) else GRPO(algorithm)
    t = trainer(tmp_path, algorithm=made, rollouts_per_backward=3)
    t.update()
    assert t.gated
    assert 0 <= t.progress.replay_gap_max < 1e-5


def test_dropout_in_eval_mode_passes(tmp_path):
    policy = Dropping(vocab=3)
    policy.module.eval()
    trainer(tmp_path, policy).update()


def test_a_gap_within_rounding_of_large_log_probs_passes_and_one_beyond_does_not(tmp_path):
    class Far(TabularPolicy):
        """Log-probs near -100, recomputed with a relative error."""

        error = 0.0

        def rollout(self, prompts, rng):
            honest = super().rollout(prompts, rng)
            return replace(honest, logp=(honest.logp - 100) * (1 + self.error))

        def score(self, rollout):
            score = super().score(rollout)
            return replace(score, logp=score.logp - 100)

    for error, passes in ((5e-6, True), (2e-5, False)):
        policy = Far(vocab=3)
        policy.error = error
        t = trainer(tmp_path, policy)
        if passes:
            t.update()
        else:
            with pytest.raises(NumericsError, match="replay gate"):
                t.update()


# ---- stops


def test_all_steps(tmp_path):
    t, told = trainer(tmp_path), []
    assert t.run(told.append) == "all 3 steps done"
    assert [m["step"] for m in told] == [1, 2, 3]
    assert t.run(told.append) == "all 3 steps done"
    assert len(told) == 3


def test_time_is_up_and_counts_over_interruptions(tmp_path):
    t, told = trainer(tmp_path, steps=100, max_seconds=1e-6), []
    assert t.run(told.append) == "train.max_seconds=1e-06 reached after 1 steps"
    assert len(told) == 1
    later = trainer(tmp_path, steps=100, max_seconds=50.0)
    later.progress.seconds = 51.0
    assert later.run(told.append).startswith("train.max_seconds=50")
    assert len(told) == 1


def test_a_constant_reward_stops_the_run_and_says_why(tmp_path):
    t, told = trainer(tmp_path, reward=lambda images, prompts: torch.ones(len(prompts)), steps=100, idle_steps=4), []
    before = weights(t)
    assert "nothing to learn: for 4 steps in a row" in t.run(told.append)
    assert len(told) == 4
    assert same(before, weights(t))


def test_one_step_that_teaches_starts_the_count_of_idle_steps_anew(tmp_path):
    calls = []

    def rarely(images, prompts):
        calls.append(None)
        return brightness(images, prompts) if len(calls) == 3 else torch.zeros(len(prompts))

    t, told = trainer(tmp_path, reward=rarely, steps=100, idle_steps=3), []
    assert "nothing to learn" in t.run(told.append)
    assert len(told) == 6


def failing(share: float):
    def reward(images, prompts):
        value = brightness(images, prompts)
        value[: round(share * len(value))] = torch.nan
        return value

    return reward


def test_some_failed_rewards_are_counted_and_left_out(tmp_path):
    t = trainer(tmp_path, reward=failing(2 / 12))
    metrics = t.update()
    assert metrics["reward_failed"] == pytest.approx(2 / 12)
    assert metrics["reward"] == metrics["reward"]
    assert all(bool(p.isfinite().all()) for p in t.parameters)


def test_too_many_failed_rewards_stop_the_run_before_anything_moves(tmp_path):
    t = trainer(tmp_path, reward=failing(3 / 12))
    before = weights(t)
    with pytest.raises(RewardError, match=r"step 1: 3 of 12 rewards failed \(allowed share: 0.2\)"):
        t.run(lambda metrics: None)
    assert same(before, weights(t))
    assert t.progress.step == 0


def test_a_reward_that_raises_fails_and_is_logged(tmp_path, caplog):
    def broken(images, prompts):
        raise ZeroDivisionError("no ink")

    judge = RewardJudge({"ink": (1.0, broken)})
    t = trainer(tmp_path, judge=judge)
    with pytest.raises(RewardError, match="12 of 12 rewards failed"):
        t.update()
    judge.close()
    assert "ZeroDivisionError: no ink" in caplog.text


class Diverging(GRPO):
    """From the second update on, its objective or only the gradient of it is NaN."""

    what = "loss"
    passes = 0

    def objective(self, policy, batch):
        objective, metrics = super().objective(policy, batch)
        self.passes += 1
        if self.passes > 1:
            zero = 0.0 * next(policy.module.parameters()).sum()
            objective = objective * torch.nan if self.what == "loss" else objective + zero.sqrt()
        return objective, metrics


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_numbers_that_are_none_stop_the_run_with_the_batch_on_disk(tmp_path, what):
    algorithm = Diverging(GRPOConfig(num_generations=GROUP))
    algorithm.what = what
    t, told = trainer(tmp_path, algorithm=algorithm), []
    kept = []
    with pytest.raises(NumericsError, match=f"step 2: the {what} is nan. The batch is saved in .*step-000002-rank-0.safetensors"):
        t.run(lambda metrics: told.append(metrics) or kept.append(weights(t)))
    assert len(told) == 1
    assert same(kept[-1], weights(t))
    saved = load_file(tmp_path / "failures" / "step-000002-rank-0.safetensors")
    assert saved["0/actions"].shape == (12, 7)
    assert saved["0/index"].tolist() == list(range(12))
    assert saved["0/advantage"].abs().max() > 0


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step(tmp_path, number):
    def reward(images, prompts):
        os.kill(os.getpid(), number)
        return brightness(images, prompts)

    handler = signal.getsignal(number)
    t, told = trainer(tmp_path, reward=reward), []
    before = weights(t)
    assert t.run(told.append) == STOPPED
    assert [m["step"] for m in told] == [1]
    assert not same(before, weights(t))
    assert signal.getsignal(number) is handler


def test_a_signal_that_another_thread_gets_is_answered_within_the_step():
    seen: list[int] = []

    def pieces():
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)  # the one that draws
        limit = time.monotonic() + 10
        while not seen and time.monotonic() < limit:
            time.sleep(0.01)
        yield len(seen)

    old = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        assert list(ahead(pieces())) == [1]
    finally:
        signal.signal(signal.SIGUSR1, old)


def insisting(caplog):
    """A reward that asks the run twice to stop."""

    def reward(images, prompts):
        os.kill(os.getpid(), signal.SIGINT)
        while "finishing this step" not in caplog.text:  # two signals before the first is handled are one
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        return brightness(images, prompts)

    return reward


def test_ctrl_c_twice_does_not_wait(tmp_path, caplog):
    handler = signal.getsignal(signal.SIGINT)
    t, told = trainer(tmp_path, reward=insisting(caplog)), []
    before = weights(t)
    with pytest.raises(KeyboardInterrupt):
        t.run(told.append)
    assert told == []
    assert same(before, weights(t))
    assert signal.getsignal(signal.SIGINT) is handler


def test_under_torchrun_which_repeats_every_signal_the_step_is_finished(tmp_path, caplog):
    t, told = trainer(tmp_path, reward=insisting(caplog)), []
    t.world = World(rank=0, size=2)
    assert t.run(told.append) == STOPPED
    assert [m["step"] for m in told] == [1]
