"""How far one set of pictures is from another, seen through a network's features: Frechet distance, Inception score, precision and recall,
kernel distance. Each comes with replicates: its value from all pictures, then from all but one group of them, for `gradients.estimate`. The
reference is held fixed; an interval says what other pictures of the same model would have given.

Letters besides the house's: N pictures, R reference pictures, D features, C classes, G groups, M = G + 1 replicates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from varl.errors import DataError
from varl.policies.sampling import in_row_chunks

# ---- replicates -----------------------------------------------------------------------------------------------------------------------


def leave_group_out(statistic: Callable[[Tensor], float], rows: Tensor, group: Int[Tensor, " N"]) -> Float[Tensor, " M"]:
    """The statistic of all rows, then with one group of rows left out; fp64."""
    without = [statistic(rows[group != g]) for g in range(int(group.max()) + 1)]
    return torch.tensor([statistic(rows), *without], dtype=torch.float64)


def jackknife_bias(replicate: Float[Tensor, " M"]) -> float:
    """(G-1) (mean of the replicates with one group left out - value): what is in the value only because pictures are few, up to
    O(1 / N^2)."""
    return float((len(replicate) - 2) * (replicate[1:].mean() - replicate[0]))


# ---- Frechet distance -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """A set of features as Frechet distance sees it; fp64."""

    mean: Float[Tensor, " D"]
    cov: Float[Tensor, "D D"]

    @cached_property
    def root(self) -> Float[Tensor, "D D"]:
        """The symmetric square root of `cov`. Eigenvalues that rounding made negative count as 0."""
        value, vector = torch.linalg.eigh((self.cov + self.cov.T) / 2)
        if value[0] < -1e-6 * value[-1].abs():
            raise DataError(f"covariance of features: has the eigenvalue {value[0]:.3g}, so it is none. Make the statistics again.")
        return (vector * value.clamp(min=0).sqrt()) @ vector.T


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """First and second moments of features, in fp64; those of parts add up to those of the whole (`merge`), whether the parts are batches
    or processes."""

    count: int
    mean: Float[Tensor, " D"]
    scatter: Float[Tensor, "D D"]
    """Sum over pictures of (x - mean)(x - mean)^T."""

    def gaussian(self) -> Gaussian:
        """Mean and covariance, the latter over N - 1 as in the released evaluators."""
        if self.count < 2:
            raise DataError(f"{self.count} pictures: a covariance needs at least 2. Draw more.")
        return Gaussian(mean=self.mean, cov=self.scatter / (self.count - 1))


def moments(features: Float[Tensor, "N D"]) -> Moments:
    """Two passes over one part, so that a large mean costs no digits."""
    x = features.double()
    centred = x - x.mean(0)
    return Moments(count=len(x), mean=x.mean(0), scatter=centred.T @ centred)


def merge(parts: Sequence[Moments]) -> Moments:
    """The moments of the parts' union: n = sum n_i, mean = sum n_i mean_i / n, S = sum S_i + n_i (mean_i - mean)(mean_i - mean)^T."""
    count = sum(part.count for part in parts)
    means = torch.stack([part.mean for part in parts])
    weight = means.new_tensor([part.count for part in parts])
    mean = weight @ means / count
    apart = means - mean
    return Moments(count=count, mean=mean, scatter=sum((p.scatter for p in parts), start=(apart.T * weight) @ apart))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)): squared Wasserstein-2 between the Gaussians, in the features' unit squared.

    The trace of the root of the product is that of the root of S_b^(1/2) S_a S_b^(1/2), which is symmetric: its eigenvalues are real, and
    negative by rounding only, also where pictures are fewer than features. Source: arXiv 1706.08500."""
    if a.mean.shape != b.mean.shape:
        raise DataError(
            f"Frechet distance: {len(a.mean)} features on one side, {len(b.mean)} on the other. Make both with the same extractor."
        )
    overlap = torch.linalg.eigvalsh(b.root @ a.cov @ b.root).clamp(min=0).sqrt().sum()
    return max(float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * overlap), 0.0)


def frechet_replicates(features: Float[Tensor, "N D"], reference: Gaussian, group: Int[Tensor, " N"]) -> Float[Tensor, " M"]:
    """Replicates of the Frechet distance. It comes out too large by C / N: compare only at equal N, or less its `jackknife_bias`."""
    parts = [moments(features[group == g]) for g in range(int(group.max()) + 1)]
    kept = [parts, *(parts[:g] + parts[g + 1 :] for g in range(len(parts)))]
    return torch.tensor([frechet_distance(merge(some).gaussian(), reference) for some in kept], dtype=torch.float64)


# ---- Inception score ------------------------------------------------------------------------------------------------------------------


def entropy(p: Float[Tensor, "*N C"]) -> Float[Tensor, "*N"]:
    """-sum_c p log p, nats; 0 log 0 is 0."""
    return -torch.special.xlogy(p, p).sum(-1)


def inception_score(logp: Float[Tensor, "N C"], splits: int) -> float:
    """Mean over `splits` consecutive parts of exp(H(mean_n p_n) - mean_n H(p_n)): 1 if all pictures look alike or like nothing, C if each
    is surely of one class and the classes are even. It grows with the pictures in a part. Source: arXiv 1606.03498."""
    parts = logp.double().exp().tensor_split(splits)
    return float(torch.stack([(entropy(p.mean(0)) - entropy(p).mean()).exp() for p in parts]).mean())


# ---- precision and recall -------------------------------------------------------------------------------------------------------------


def squared_distances(x: Float[Tensor, "n D"], y: Float[Tensor, "m D"]) -> Float[Tensor, "n m"]:
    """|x|^2 + |y|^2 - 2 <x, y>, around the mean of y, so that a large mean costs no digits."""
    x, y = x - y.mean(0), y - y.mean(0)
    return (x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)


def squared_radii(features: Float[Tensor, "n D"], k: int) -> Float[Tensor, " n"]:
    """Squared distance of each picture to its k-th nearest other one."""
    count = len(features)
    if count <= k:
        raise DataError(f"{count} pictures: the {k} nearest others of each are asked for. Give at least {k + 1}.")
    # the picture itself is the nearest
    return in_row_chunks(
        lambda rows: (squared_distances(features[rows], features).topk(k + 1, largest=False).values[:, -1],), count, count
    )[0]


def covered(points: Float[Tensor, "n D"], centres: Float[Tensor, "m D"], radii: Float[Tensor, " m"]) -> Bool[Tensor, " n"]:
    """Whether a point lies in the ball of any centre; `radii` are squared."""
    return in_row_chunks(lambda rows: ((squared_distances(points[rows], centres) <= radii).any(1),), len(points), len(centres))[0]


def precision_recall(
    features: Float[Tensor, "N D"], reference: Float[Tensor, "R D"], group: Int[Tensor, " N"], k: int = 3
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
    """Replicates of the share of pictures within the reference's k-nearest-neighbour balls, and of the share of reference pictures within
    those of the pictures. Recall falls with fewer pictures. Source: arXiv 1904.06991 with k = 3, as the ADM evaluator."""
    inside = covered(features, reference, squared_radii(reference, k)).double()
    precision = leave_group_out(lambda rows: float(rows.mean()), inside, group)
    recall = leave_group_out(lambda x: float(covered(reference, x, squared_radii(x, k)).double().mean()), features, group)
    return precision, recall


# ---- kernel distance ------------------------------------------------------------------------------------------------------------------


def kernel_sums(x: Float[Tensor, "n D"], y: Float[Tensor, "m D"], member: Float[Tensor, "m g"]) -> Float[Tensor, "n g"]:
    """For each x the sums of (<x, y> / D + 1)^3 over each group of y's; `member` is 1 where a y belongs; fp64."""

    def some(rows: slice) -> tuple[Tensor]:
        return ((x[rows] @ y.T / x.shape[1] + 1).double().pow(3) @ member,)

    return in_row_chunks(some, len(x), len(y))[0]


def kernel_distance(features: Float[Tensor, "N D"], reference: Float[Tensor, "R D"], group: Int[Tensor, " N"]) -> Float[Tensor, " M"]:
    """Replicates of the squared maximum mean discrepancy with the kernel k = (<x, y> / D + 1)^3, without bias at any N:

        sum_{i != j} k(x_i, x_j) / (N (N-1)) + sum_{i != j} k(y_i, y_j) / (R (R-1)) - 2 sum_ij k(x_i, y_j) / (N R)

    Published (KID, arXiv 1801.01401): the mean over random subsets of 1000, which has the same expectation and, taken over all subsets, the
    same value; the spread of overlapping subsets is no interval. Ours: all pairs, once; groups are left out by their sums."""
    n, m = len(features), len(reference)
    member = torch.nn.functional.one_hot(group).double()
    left = torch.cat([member.new_ones(1, member.shape[1]), 1 - torch.eye(member.shape[1], dtype=torch.float64, device=member.device)])
    count = left @ member.sum(0)
    if m < 2 or count.min() < 2:
        raise DataError(f"kernel distance: {n} and {m} pictures, but pairs with a group left out need 2 of each. Give more.")
    itself = member.T @ (features.square().mean(1) + 1).double().pow(3)
    own = member.T @ kernel_sums(features, features, member) - itself.diag()
    cross = member.T @ kernel_sums(features, reference, member.new_ones(m, 1)).squeeze(1)
    other = kernel_sums(reference, reference, member.new_ones(m, 1)).sum() - (reference.square().mean(1) + 1).double().pow(3).sum()
    within = torch.einsum("mg,gh,mh->m", left, own, left) / (count * (count - 1))
    return (within + other / (m * (m - 1)) - 2 * left @ cross / (count * m)).cpu()
