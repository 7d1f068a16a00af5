"""The statements that the two-stage method rests on, by enumeration. E1 and E2 are `theory.example(2.0)` and `example(1.8)`; E1 sits where
two optima merge, so that only values are compared there."""

import itertools

import pytest
import torch

from varl.algorithms import theory
from varl.algorithms.panw import panw_weights
from varl.algorithms.theory import Tree, example, factorised, objective, picture_logp, project, returns, two_stage, v_dagger, v_star
from varl.algorithms.vmr import middle_return

E1, E2 = example(2.0), example(1.8)


def random_logits(sizes, vocab, seed, spread=1.0):
    noise = torch.Generator().manual_seed(seed)
    before = [vocab ** sum(sizes[:t]) for t in range(len(sizes))]
    return [spread * torch.randn(n, k, vocab, generator=noise, dtype=torch.float64) for n, k in zip(before, sizes, strict=True)]


def random_tree(seed, sizes=(1, 2, 2), vocab=2, eta=0.7):
    noise = torch.Generator().manual_seed(1000 + seed)
    reward = torch.randn(vocab ** sum(sizes), generator=noise, dtype=torch.float64)
    return Tree(sizes=sizes, vocab=vocab, reward=reward, old=factorised(random_logits(sizes, vocab, seed, 0.7)), eta=eta)


TREES = [E1, E2, random_tree(0), random_tree(1, sizes=(2, 1, 1)), random_tree(2, sizes=(1, 2), vocab=3)]
INTERESTING = [E2, *TREES[2:]]


def chance_of_zero(policy):
    """P(first token of step 1 = 0), the branch that looks better than it is."""
    return picture_logp(policy[:2]).exp().reshape(2, 2, 2)[:, 0].sum().item()


@pytest.mark.parametrize(
    ("tree", "start", "best", "star", "dagger", "family", "chance", "paper", "paper_chance"),
    [
        (E1, 1.00000, 1.34168, (1.43378, 1.24023), (1.00000, 1.24023), 1.12731, 0.44023, 1.10387, 0.54824),
        (E2, 0.950000, 1.250078, (1.259830, 1.240229), (0.900000, 1.240229), 1.084515, 0.415754, 1.068399, 0.504900),
    ],
    ids=["E1", "E2"],
)
def test_the_two_worked_examples(tree, start, best, star, dagger, family, chance, paper, paper_chance):
    close = {"abs": 6e-6}
    assert objective(tree, tree.old).item() == pytest.approx(start, **close)
    assert v_star(tree, 0).item() == pytest.approx(best, **close)
    for value, pair in ((v_star(tree, 2), star), (v_dagger(tree, 2), dagger)):
        by_first_token = value.reshape(2, 2, 2)
        torch.testing.assert_close(by_first_token[:, 0], torch.full((2, 2), pair[0]).double(), rtol=0, atol=6e-6)
        torch.testing.assert_close(by_first_token[:, 1], torch.full((2, 2), pair[1]).double(), rtol=0, atol=6e-6)
    ours = two_stage(tree, 2, v_dagger(tree, 2), independent=True)
    theirs = two_stage(tree, 2, v_star(tree, 2), independent=True)
    assert v_dagger(tree, 0).item() == pytest.approx(family, **close)
    assert objective(tree, ours).item() == pytest.approx(family, **close)
    assert chance_of_zero(ours) == pytest.approx(chance, **close)
    assert objective(tree, theirs).item() == pytest.approx(paper, **close)
    assert chance_of_zero(theirs) == pytest.approx(paper_chance, **close)


@pytest.mark.parametrize("tree", TREES)
def test_s1_unconstrained_two_stages_are_one(tree):
    _, star = theory.solve(tree, tree.reward, 0, len(tree.sizes), independent=False)
    for m in range(len(tree.sizes) + 1):
        policy = two_stage(tree, m, v_star(tree, m), independent=False)
        assert objective(tree, policy).item() == pytest.approx(v_star(tree, 0).item(), abs=1e-9)
        for a, b in zip(policy, star, strict=True):
            torch.testing.assert_close(a.exp(), b.exp(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_s2_the_objective_is_a_constant_less_a_kl(seed):
    tree = random_tree(seed)
    best = picture_logp(tree.old) + tree.reward / tree.eta
    logp = picture_logp(factorised(random_logits(tree.sizes, tree.vocab, 50 + seed)))
    kl = (logp.exp() * (logp - best.log_softmax(0))).sum()
    got = objective(tree, factorised(random_logits(tree.sizes, tree.vocab, 50 + seed)))
    assert got.item() == pytest.approx((tree.eta * (best.logsumexp(0) - kl)).item(), abs=1e-10)


@pytest.mark.parametrize("tree", TREES)
def test_s3_two_stages_paid_by_v_dagger_are_optimal_for_independent_tokens(tree):
    best = v_dagger(tree, 0).item()
    for m in range(len(tree.sizes) + 1):
        policy = two_stage(tree, m, v_dagger(tree, m), independent=True)
        assert objective(tree, policy).item() == pytest.approx(best, abs=1e-8)


def test_s3_gradient_ascent_on_the_whole_policy_finds_nothing_better():
    """An optimum found without any recursion: J over all logits at once, from four starts."""
    reached = []
    for seed in range(4):
        logits = [part.requires_grad_() for part in random_logits(E2.sizes, 2, seed)]
        optimizer = torch.optim.LBFGS(logits, max_iter=300, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe")

        def loss(logits=logits, optimizer=optimizer):
            optimizer.zero_grad()
            value = -objective(E2, factorised(logits))
            value.backward()
            return value

        optimizer.step(loss)
        reached.append(objective(E2, factorised(logits)).item())
    assert max(reached) == pytest.approx(v_dagger(E2, 0).item(), abs=1e-8)


@pytest.mark.parametrize(("tree", "loss"), [(E1, 0.02344), (E2, 0.016116)], ids=["E1", "E2"])
def test_s4_the_papers_prefix_reward_costs_independent_tokens(tree, loss):
    """Documented deviation: Theorem 2 does not hold in the family that it is stated for."""
    gap = v_dagger(tree, 0) - objective(tree, two_stage(tree, 2, v_star(tree, 2), independent=True))
    assert gap.item() == pytest.approx(loss, abs=6e-6)


@pytest.mark.parametrize("seed", range(8))
def test_s4_and_never_gains(seed):
    tree = random_tree(seed)
    for m in (1, 2):
        assert objective(tree, two_stage(tree, m, v_star(tree, m), independent=True)) <= v_dagger(tree, 0) + 1e-9


@pytest.mark.parametrize("tree", INTERESTING)
def test_v_dagger_lies_between_the_mean_and_v_star(tree):
    for m in range(len(tree.sizes)):
        mean, dagger, star = returns(tree.old[m:], tree.reward), v_dagger(tree, m), v_star(tree, m)
        assert (mean <= dagger + 1e-9).all()
        assert (dagger <= star + 1e-9).all()
        assert star.sum() > mean.sum() + 1e-3


def test_two_tokens_that_should_differ_have_two_best_laws():
    """R = c where they differ, uniform old: past c / eta = 2 there are two optima, (0.021, 0.979) and its mirror image at c = 4."""
    weight = torch.tensor([[0.0, 4.0, 4.0, 0.0]]).double()
    value, table = project(weight, 2, 2)
    marginal = table.exp().reshape(2, 2).sum(1)
    assert sorted(marginal.tolist()) == pytest.approx([0.021, 0.979], abs=6e-4)
    mirrored = table.reshape(2, 2).T.flatten()
    assert (mirrored.exp() * (weight[0] - mirrored)).sum().item() == pytest.approx(value.item(), abs=1e-12)
    below = project(torch.tensor([[0.0, 1.9, 1.9, 0.0]]).double(), 2, 2)[1]
    torch.testing.assert_close(below.exp(), torch.full((1, 4), 0.25).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("tree", TREES)
def test_s5_at_the_optimal_suffix_every_path_has_the_same_return(tree):
    """R - eta log pi*/old of the suffix is V*_m, without spread: the cheapest exact test of a value."""
    for m in range(len(tree.sizes)):
        value, suffix = theory.solve(tree, tree.reward, m, len(tree.sizes), independent=False)
        ratio = path_logp(suffix) - path_logp(tree.old[m:])
        paths = tree.reward.reshape(len(value), -1) - tree.eta * ratio
        torch.testing.assert_close(paths, value[:, None].expand_as(paths), rtol=0, atol=1e-12)


def path_logp(steps):
    """[N, Z / N]: log-probability of every continuation of each of the N states that the steps start from."""
    logp = torch.zeros(len(steps[0]), 1, dtype=torch.float64)
    for table in steps:
        logp = (logp.flatten()[:, None] + table).reshape(len(logp), -1)
    return logp


# ---- S6: the estimators, in expectation over K draws of the suffix, state by state


def expected_value(tree, suffix, state, copies, mode):
    """Exact, over all draws of `copies` continuations from the policy `suffix`."""
    reward = tree.reward.reshape(len(suffix[0]), -1)[state]
    logp, old = path_logp(suffix)[state], path_logp(tree.old[-len(suffix) :])[state]
    draws = torch.tensor(list(itertools.product(range(len(reward)), repeat=copies)))
    value = middle_return(reward[draws], mode, tree.eta, (logp - old)[draws])
    return (logp[draws].sum(1).exp() * value).sum().item()


@pytest.mark.parametrize("seed", range(3))
def test_s6_importance_climbs_to_the_soft_value_from_below(seed):
    tree = random_tree(seed)
    suffix = factorised(random_logits(tree.sizes, 2, 70 + seed))[2:]
    star = v_star(tree, 2)
    for state in range(8):
        values = [expected_value(tree, suffix, state, copies, "importance") for copies in (1, 2, 3, 4)]
        assert all(a < b + 1e-12 for a, b in itertools.pairwise(values))
        assert values[-1] <= star[state].item() + 1e-12
        kl = (path_logp(suffix)[state].exp() * (path_logp(suffix)[state] - path_logp(tree.old[2:])[state])).sum()
        mean = returns(suffix, tree.reward)[state]
        assert values[0] == pytest.approx((mean - tree.eta * kl).item(), abs=1e-12)


def test_s6_eq_10_overshoots_off_the_reference_and_is_importance_on_it():
    tree = random_tree(0)
    greedy = theory.solve(tree, 3 * tree.reward, 2, 3, independent=False)[1]
    state = int(v_star(tree, 2).argmax())
    assert expected_value(tree, greedy, state, 4, "log_mean_exp") > v_star(tree, 2)[state].item() + 0.01
    for copies in (1, 2, 3):
        on, corrected = (expected_value(tree, tree.old[2:], state, copies, mode) for mode in ("log_mean_exp", "importance"))
        assert on == pytest.approx(corrected, abs=1e-14)


# ---- S7, S8: gradients and fixed points of tabular policies


def autograd(value, logits):
    return torch.autograd.grad(value, logits, retain_graph=True)


@pytest.mark.parametrize("m", [1, 2])
def test_s7_on_policy_stages_are_blocks_of_the_full_gradient(m):
    """At pi = old: the prefix paid by the mean of its continuations, the suffix by R - b(s_m), are the two blocks of grad J. A prefix paid
    by the soft value goes elsewhere."""
    sizes = (1, 2, 2)
    logits = [part.requires_grad_() for part in random_logits(sizes, 2, 9)]
    policy = factorised(logits)
    reward = torch.randn(32, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    tree = Tree(sizes=sizes, vocab=2, reward=reward, old=tuple(table.detach() for table in policy), eta=0.5)
    full = autograd(objective(tree, policy), logits)

    prefix, chance = picture_logp(policy[:m]), picture_logp(policy).detach().exp()
    mean, soft = returns(tree.old[m:], reward), v_star(tree, m)
    for a, b in zip(autograd((prefix.detach().exp() * prefix * mean).sum(), logits[:m]), full[:m], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)
    other = autograd((prefix.detach().exp() * prefix * soft).sum(), logits[:m])
    assert max((a - b).abs().max().item() for a, b in zip(other, full[:m], strict=True)) > 5e-3
    advantage = reward - mean.repeat_interleave(32 // len(mean))
    for a, b in zip(autograd((chance * picture_logp(policy) * advantage).sum(), logits[m:]), full[m:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


def semi_gradient(tree, logits, reward_weight, kl_weight):
    """Gradient of what GRPO with a KL loss ascends in expectation: at each step, weighted, grad log pi R and the KL of the states met."""
    policy = [table.log_softmax(1) for table in logits]
    total = torch.zeros((), dtype=torch.float64)
    for t, table in enumerate(policy):
        met = picture_logp(policy[:t]).detach().exp()
        value = returns([part.detach() for part in policy[t + 1 :]], tree.reward).reshape(table.shape)
        total = total + reward_weight[t] * (met[:, None] * table.exp() * value).sum()
        total = total - kl_weight[t] * tree.eta * (met * (table.exp() * (table - tree.old[t])).sum(1)).sum()
    return torch.autograd.grad(total, logits)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_s8_panw_on_reward_and_kl_moves_no_fixed_point_but_on_the_reward_alone_heats_each_step(alpha):
    tree = random_tree(4)
    weight = panw_weights(torch.tensor([1.0, 2.0, 2.0]).double(), alpha).tolist()
    ones = [1.0] * 3

    def at_rest(temperature, reward_weight, kl_weight):
        logits = [table.clone().requires_grad_() for table in theory.semi_gradient_optimum(tree, temperature)]
        return max(part.abs().max().item() for part in semi_gradient(tree, logits, reward_weight, kl_weight)) < 1e-12

    assert at_rest([tree.eta] * 3, ones, ones)
    assert at_rest([tree.eta] * 3, weight, weight)
    assert at_rest([tree.eta / k for k in weight], weight, ones)
    assert at_rest([tree.eta] * 3, weight, ones) == (alpha == 0)


def test_kl_as_a_loss_term_rests_below_the_optimum():
    for tree in INTERESTING:
        rest = objective(tree, theory.semi_gradient_optimum(tree, [tree.eta] * len(tree.sizes)))
        assert objective(tree, tree.old) < rest < v_star(tree, 0) - 1e-4
