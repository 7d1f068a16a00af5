"""The objective of VAR-RL's theorems on problems small enough to enumerate, float64. It says which prefix reward is the right one.

A problem is a tree: step t appends n_t tokens of V values, a state is all tokens so far, the picture is the state after the last step, and
alone has a reward. States of one depth are numbered so that action a leads from state s to state s * V^n_t + a. A policy is one [states,
actions] table of log-probabilities per step.

    J(pi) = E_pi[R - eta log pi/old]                        the objective, in units of the reward
    V*_t(s) = eta log E_old[exp(R / eta) | s]               its value from s on if any policy is allowed
    Vd_t(s) = max over q of E_q[Vd_{t+1}] - eta KL(q | old)     if tokens of a step must be independent; Vd_S = R

Paper (Theorems 1 and 2): the best policy with independent tokens is the projection, state by state, of the best of all policies, so that a
prefix paid by V* and a suffix make it up. That holds without the constraint. With it, states differ in how much of their promise
independent tokens can keep; V* >= Vd ignores it, and may prefer the wrong prefix (`example`). Ours: a prefix paid by Vd is optimal; the
plain mean of the rewards is a lower bound of Vd, V* an upper one, and which is nearer depends on how far the reward hangs on combinations
of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Table = Float[Tensor, "_ _"]
"""One step of a policy: [states, actions], log-probabilities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A problem. `old` is the policy that KL is measured against."""

    sizes: tuple[int, ...]
    """n_t, tokens of each step."""
    vocab: int
    reward: Float[Tensor, " Z"]
    """Of every picture."""
    old: tuple[Table, ...]
    eta: float = 1.0


def example(charm: float) -> Tree:
    """Steps of 1, 2, 2 binary tokens under a uniform policy, eta 1. If the first token of step 1 is 0, the reward is `charm` where the last
    two tokens differ; if it is 1, one point for each of them that is 0. With `charm` 2 or 1.8 the first branch looks better to V* (1.434 or
    1.260 against 1.240) and is worse for independent tokens (1.0 or 0.9): they cannot agree to differ."""
    bits = torch.cartesian_prod(*[torch.arange(2)] * 5)
    differ, zeros = (bits[:, 3] != bits[:, 4]).double(), (bits[:, 3:] == 0).sum(1).double()
    reward = torch.where(bits[:, 1] == 0, charm * differ, zeros)
    return Tree(sizes=(1, 2, 2), vocab=2, reward=reward, old=factorised([torch.zeros(2**n, k, 2) for n, k in ((0, 1), (1, 2), (3, 2))]))


def factorised(logits: Sequence[Float[Tensor, "_ _ _"]]) -> tuple[Table, ...]:
    """The policy whose tokens are independent inside each step, from the [states, n, V] logits of each step."""
    tables = []
    for step in logits:
        joint = torch.zeros(len(step), 1, dtype=torch.float64)
        for token in step.double().log_softmax(-1).unbind(1):
            joint = (joint[:, :, None] + token[:, None, :]).flatten(1)
        tables.append(joint)
    return tuple(tables)


def picture_logp(policy: Sequence[Table]) -> Float[Tensor, " Z"]:
    """Log-probability of everything that these steps can lead to: the sum along its path."""
    logp = torch.zeros(1, dtype=torch.float64)
    for table in policy:
        logp = (logp.repeat_interleave(len(table) // len(logp))[:, None] + table).flatten()
    return logp


def objective(tree: Tree, policy: Sequence[Table]) -> Float[Tensor, ""]:
    """J(pi) = E_pi[R - eta log pi/old]. Differentiable."""
    logp = picture_logp(policy)
    return (logp.exp() * (tree.reward - tree.eta * (logp - picture_logp(tree.old)))).sum()


def returns(policy: Sequence[Table], value: Float[Tensor, " Z"]) -> Float[Tensor, " N"]:
    """E_pi[value | s] of each state that the first of these steps can start from."""
    for table in reversed(policy):
        value = (table.exp() * value.reshape(table.shape)).sum(1)
    return value


def project(weight: Table, tokens: int, vocab: int, starts: int = 8, rounds: int = 200) -> tuple[Float[Tensor, " N"], Table]:
    """(max over q of E_q[w] + H(q), log q), q with independent tokens, in each state: the reverse-KL projection of exp(w), up to its norm.

    Coordinate ascent: log q_i = E_{q_-i}[w | a_i] + const. The problem is not concave and may have several optima (two tokens that should
    differ have two), hence many starts: even odds, exp(w)'s own marginals, the rest at random; the best is kept."""
    states = len(weight)
    grid = weight.reshape(states, *[vocab] * tokens)
    even = torch.zeros(1, states, tokens, vocab, dtype=torch.float64)
    marginal = torch.stack([_keep(grid.flatten(1).softmax(1).reshape(grid.shape), i) for i in range(tokens)], 1).log()[None]
    noise = 3 * torch.randn(starts - 2, states, tokens, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = torch.cat([even, marginal, noise]).softmax(-1)
    for _ in range(rounds):
        last = q.clone()
        for i in range(tokens):
            q[:, :, i] = _expected_but(grid, q, i).softmax(-1)
        if (q - last).abs().max() < 1e-14:
            break
    entropy = -(q * q.clamp(min=1e-300).log()).sum((-1, -2))
    value = (_expected_but(grid, q, 0) * q[:, :, 0]).sum(-1) + entropy
    best, at = value.max(0)
    chosen = q[at, torch.arange(states)].clamp(min=1e-300)
    return best, factorised([chosen.log()])[0]


def solve(
    tree: Tree, value: Float[Tensor, " Z"], first: int, last: int, *, independent: bool
) -> tuple[Float[Tensor, " N"], tuple[Table, ...]]:
    """(value of each state before step `first`, best policy of steps first .. last - 1) where `value` is paid after the last of these, by
    backward recursion, with any policy or with `independent` tokens inside each step."""
    policy: list[Table] = []
    for t in reversed(range(first, last)):
        weight = tree.old[t] + value.reshape(tree.old[t].shape) / tree.eta
        if independent:
            best, table = project(weight, tree.sizes[t], tree.vocab)
        else:
            best, table = weight.logsumexp(1), weight.log_softmax(1)
        value, policy = tree.eta * best, [table, *policy]
    return value, tuple(policy)


def v_star(tree: Tree, m: int) -> Float[Tensor, " N"]:
    """V*_m of every state after m steps, the paper's prefix reward (Definition 1); V*_0 = eta log Z is the largest J of all."""
    return solve(tree, tree.reward, m, len(tree.sizes), independent=False)[0]


def v_dagger(tree: Tree, m: int) -> Float[Tensor, " N"]:
    """Vd_m of every state after m steps, the prefix reward under which two stages are optimal for independent tokens; Vd_0 is their largest
    J."""
    return solve(tree, tree.reward, m, len(tree.sizes), independent=True)[0]


def two_stage(tree: Tree, m: int, value: Float[Tensor, " N"], *, independent: bool) -> tuple[Table, ...]:
    """The paper's construction: the best first m steps where `value` is paid after them, then the best of the rest for the reward."""
    prefix = solve(tree, value, 0, m, independent=independent)[1]
    return prefix + solve(tree, tree.reward, m, len(tree.sizes), independent=independent)[1]


def semi_gradient_optimum(tree: Tree, temperature: Sequence[float]) -> tuple[Table, ...]:
    """Where training comes to rest that has KL as a loss term per state, not in the return: pi_t ~ old exp(E_pi[R | s, a] / temperature_t).
    Not the optimum of J, because no state pays for the KL that is still to come; this is the paper's Eq. 2 against its Eq. 3."""
    value, policy = tree.reward, []
    for t in reversed(range(len(tree.sizes))):
        table = (tree.old[t] + value.reshape(tree.old[t].shape) / temperature[t]).log_softmax(1)
        value, policy = returns([table], value), [table, *policy]
    return tuple(policy)


def _expected_but(grid: Tensor, q: Tensor, kept: int) -> Tensor:
    """E[w | a_kept] over all other tokens: [M, N, V]."""
    tokens = q.shape[2]
    out = grid[None].expand(len(q), *grid.shape)
    for j in range(tokens):
        if j != kept:
            shape = [*q.shape[:2], *(q.shape[3] if i == j else 1 for i in range(tokens))]
            out = (out * q[:, :, j].reshape(shape)).sum(2 + j, keepdim=True)
    return out.flatten(2)


def _keep(joint: Tensor, token: int) -> Tensor:
    """Marginal of one token: [N, V]."""
    others = [i + 1 for i in range(joint.dim() - 1) if i != token]
    return joint.sum(others) if others else joint
