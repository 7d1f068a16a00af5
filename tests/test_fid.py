"""Distances between sets of pictures, the features they are measured in, and the files they come from."""

import itertools
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn

from varl.errors import CheckpointError, ConfigError, DataError, NumericsError
from varl.eval.distances import (
    Gaussian,
    covered,
    frechet_distance,
    frechet_replicates,
    inception_score,
    jackknife_bias,
    kernel_distance,
    leave_group_out,
    merge,
    moments,
    precision_recall,
    squared_radii,
)
from varl.eval.features import Classifier, extract, fingerprint, npz_shapes, open_pictures
from varl.eval.fid import compare_sets
from varl.eval.gradients import estimate
from varl.eval.inception import NAMES, Inception, load_inception, resize_tf1
from varl.policies import sampling


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def groups(count: int, of: int = 20) -> Tensor:
    return torch.arange(count) % of


# ---- Frechet distance


def gaussian(mean: list[float], spread: list[float]) -> Gaussian:
    return Gaussian(mean=torch.tensor(mean).double(), cov=torch.tensor(spread).double().square().diag())


def test_frechet_distance_by_hand():
    """Axes apart: squared difference of the means plus squared difference of the spreads."""
    assert frechet_distance(gaussian([0, 0], [1, 2]), gaussian([3, 4], [1, 2])) == pytest.approx(25, rel=1e-12)
    assert frechet_distance(gaussian([0, 0], [1, 2]), gaussian([0, 0], [4, 0])) == pytest.approx(9 + 4, rel=1e-12)


def random_gaussian(size: int, rank: int, seed: int) -> Gaussian:
    return moments(normal(rank + 1, size, seed=seed) * torch.linspace(0.1, 3, size)).gaussian()


@pytest.mark.parametrize("size", [1, 5, 40])
def test_frechet_distance_is_that_of_the_matrix_root(size):
    a, b = random_gaussian(size, 4 * size, 1), random_gaussian(size, 4 * size, 2)
    product = (a.cov @ b.cov).numpy()
    root = sqrtm(product).real.trace() if size > 1 else math.sqrt(product.item())
    want = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(want.item(), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(want.item(), rel=1e-9)


@pytest.mark.parametrize("rank", [60, 10], ids=["full rank", "fewer pictures than features"])
def test_equal_sets_are_at_distance_zero(rank):
    a = random_gaussian(40, rank, 3)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-7 * a.cov.trace().item())


def test_fewer_pictures_than_features_turn_with_the_axes():
    """Distance does not depend on the axes, and features without variance on both sides add nothing."""
    x, y = normal(9, 6, seed=4), normal(7, 6, seed=5) + 1
    turn = torch.linalg.qr(normal(30, 30, seed=6)).Q[:6]
    small, large = (frechet_distance(moments(p).gaussian(), moments(q).gaussian()) for p, q in [(x, y), (x @ turn, y @ turn)])
    assert large == pytest.approx(small, rel=1e-5)


def test_what_is_no_covariance_is_named():
    with pytest.raises(DataError, match=r"eigenvalue -1"):
        frechet_distance(random_gaussian(2, 5, 0), Gaussian(mean=torch.zeros(2).double(), cov=torch.tensor([[0.0, 1], [1, 0]]).double()))


def test_frechet_distance_of_other_features_is_refused():
    with pytest.raises(DataError, match="2 features on one side, 3 on the other"):
        frechet_distance(random_gaussian(2, 5, 0), random_gaussian(3, 5, 0))


# ---- moments


def test_moments_are_mean_and_covariance_far_from_zero():
    x = normal(50, 4).double() + 1e6
    want = np.cov(x.numpy(), rowvar=False)
    np.testing.assert_allclose(moments(x).gaussian().cov, want, rtol=1e-9, atol=1e-9)
    assert torch.equal(moments(x).gaussian().mean, x.mean(0))


def test_moments_of_parts_add_up_to_those_of_the_whole():
    x = normal(20, 4).double() + 1e6
    whole = moments(x)
    for sizes in ([20], [1, 19], [8, 2, 10], [1] * 20):
        parts = [moments(part) for part in x.split(sizes)]
        one_by_one = parts[0]
        for part in parts[1:]:
            one_by_one = merge([one_by_one, part])
        for merged in (merge(parts), merge(parts[::-1]), one_by_one):
            assert merged.count == 20
            torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-14, atol=0)
            torch.testing.assert_close(merged.scatter, whole.scatter, rtol=0, atol=1e-7)


def test_one_picture_has_no_covariance():
    with pytest.raises(DataError, match="1 pictures: a covariance needs at least 2"):
        moments(normal(1, 3)).gaussian()


# ---- intervals


def test_leaving_groups_out_by_hand():
    rows, group = torch.tensor([1.0, 2, 3, 4, 5, 6]), torch.tensor([0, 1, 2, 0, 1, 2])
    assert leave_group_out(lambda kept: float(kept.sum()), rows, group).tolist() == [21, 16, 14, 12]


def test_frechet_replicates_are_distances_without_the_group():
    x, reference = normal(60, 4), random_gaussian(4, 30, 7)
    want = leave_group_out(lambda kept: frechet_distance(moments(kept).gaussian(), reference), x, groups(60, 6))
    torch.testing.assert_close(frechet_replicates(x, reference, groups(60, 6)), want, rtol=1e-10, atol=1e-10)


def test_bias_is_what_few_pictures_add_and_intervals_are_as_wide_as_it_varies():
    """50 sets of 200 pictures, truly 0.5 from the reference: the distance is too large on average, less its bias it is not; its standard
    error is its standard deviation over the sets."""
    reference = gaussian([0.5] + [0.0] * 5, [1.5] + [1.0] * 5)
    found = [frechet_replicates(normal(200, 6, seed=100 + i), reference, groups(200)) for i in range(50)]
    value = torch.stack([replicate[0] for replicate in found])
    less = value - torch.tensor([jackknife_bias(replicate) for replicate in found])
    error = value.std() / 50**0.5
    assert value.mean() > 0.5 + 5 * error
    assert less.mean().item() == pytest.approx(0.5, abs=2.5 * error.item())
    half = torch.tensor([estimate(replicate).high - estimate(replicate).value for replicate in found])
    assert half.mean().item() / 2.093 == pytest.approx(value.std().item(), rel=0.25)


# ---- Inception score


def test_sure_and_even_classes_score_their_number():
    assert inception_score(torch.eye(7).repeat(3, 1).log(), 1) == pytest.approx(7, rel=1e-12)


def test_pictures_that_look_alike_or_like_nothing_score_one():
    alike, nothing = torch.tensor([[0.7, 0.2, 0.1]]).expand(5, 3), torch.full((5, 3), 1 / 3)
    assert inception_score(alike.log(), 1) == pytest.approx(1, rel=1e-6)
    assert inception_score(nothing.log(), 1) == pytest.approx(1, rel=1e-6)


def test_inception_score_by_hand():
    """Two pictures, (3/4, 1/4) and (1/4, 3/4): log 2 less the entropy of (3/4, 1/4)."""
    want = math.exp(math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert inception_score(torch.tensor([[0.75, 0.25], [0.25, 0.75]]).log(), 1) == pytest.approx(want, rel=1e-6)


def test_splits_are_scored_apart():
    """Each half shows one class only; together they show two."""
    logp = torch.eye(2).repeat_interleave(4, 0).log()
    assert inception_score(logp, 2) == pytest.approx(1)
    assert inception_score(logp, 1) == pytest.approx(2)


# ---- precision and recall


def line(*at: float) -> Tensor:
    """Points on a line that lies anywhere in the plane."""
    return torch.tensor(at)[:, None] * torch.tensor([[3.0, 4.0]]) + 8


REFERENCE, PICTURES = line(0, 1, 2, 3, 9), line(3.5, 4, 5, 30, 32.5)
"""Their means, also with one left out, are exact in fp32, and so is what lies on an edge."""


def test_radii_by_hand():
    assert squared_radii(REFERENCE, 1).sqrt().tolist() == [5, 5, 5, 5, 30]
    assert squared_radii(REFERENCE, 3).sqrt().tolist() == [15, 10, 10, 15, 40]


def test_precision_and_recall_by_hand():
    """k = 1. Balls of the reference: 1 around 0, 1, 2, 3, and 6 around 9 reach 3.5, 4, 5; not 30, 32.5. Balls of the pictures: 0.5 around
    3.5 and 4, 1 around 5, 2.5 around 30 and 32.5 reach 3 alone, on an edge."""
    precision, recall = precision_recall(PICTURES, REFERENCE, torch.arange(5), 1)
    assert precision[0] == 3 / 5
    assert recall[0] == 1 / 5
    assert precision[1:].tolist() == [0.5, 0.5, 0.5, 0.75, 0.75]
    # without 3.5 the ball around 4 grows to 1 and holds 3 still; without 4 that around 3.5 grows to 1.5 and holds 2 too, on its edge
    # without 30 that around 32.5 grows to 27.5 and holds 9 too, without 32.5 that around 30 to 25
    assert recall[1:].tolist() == [0.2, 0.4, 0.2, 0.4, 0.4]


def test_equal_sets_have_full_precision_and_recall_and_far_ones_none():
    x, group = normal(40, 5), groups(40)
    precision, recall = precision_recall(x, x, group)
    assert precision.tolist() == [1] * 21
    assert recall[0] == 1
    assert all(not share.any() for share in precision_recall(x + 100, x, group))


def test_a_large_mean_costs_no_digits():
    x, y = normal(30, 5, seed=1), normal(30, 5, seed=2)
    near, far = precision_recall(x, y, groups(30, 5)), precision_recall(x + 4096, y + 4096, groups(30, 5))
    assert 0 < near[0][0] < 1
    torch.testing.assert_close(near, far, rtol=0, atol=0)


def test_k_neighbours_need_more_than_k_pictures():
    assert squared_radii(normal(4, 2), 3).shape == (4,)
    with pytest.raises(DataError, match=r"3 pictures: the 3 nearest others .* at least 4"):
        squared_radii(normal(3, 2), 3)


# ---- kernel distance


def kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd2_by_hand(x: Tensor, y: Tensor) -> float:
    pairs = [(kernel(z, z).sum() - kernel(z, z).trace()) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return float(pairs[0] + pairs[1] - 2 * kernel(x, y).mean())


def test_kernel_distance_is_its_definition_and_so_are_its_replicates():
    x, y = normal(12, 3, seed=1).double(), normal(9, 3, seed=2).double() + 0.5
    want = leave_group_out(lambda kept: mmd2_by_hand(kept, y), x, groups(12, 4))
    torch.testing.assert_close(kernel_distance(x, y, groups(12, 4)), want, rtol=1e-11, atol=1e-12)


def test_kernel_distance_is_unbiased():
    """Over all samples of 3 and 2 from two laws on a few points its mean is the laws' own distance. The law's distance from itself is 0,
    and some samples must come out below."""
    p, q = normal(2, 2, seed=3).double(), normal(3, 2, seed=4).double()
    want = float(kernel(p, p).mean() + kernel(q, q).mean() - 2 * kernel(p, q).mean())
    for x, y, law in ((p, q, want), (p, p, 0.0)):
        samples = itertools.product(itertools.product(range(len(x)), repeat=3), itertools.product(range(len(y)), repeat=2))
        values = [float(kernel_distance(x[list(i)], y[list(j)], groups(3))[0]) for i, j in samples]
        assert np.mean(values) == pytest.approx(law, abs=1e-12)
    assert min(values) < 0


def test_subsets_add_nothing():
    """The mean over all subsets, of which the published estimate takes some, is our value."""
    x, y = normal(6, 2, seed=5).double(), normal(5, 2, seed=6).double()
    subsets = itertools.product(itertools.combinations(range(6), 3), itertools.combinations(range(5), 3))
    values = [mmd2_by_hand(x[list(i)], y[list(j)]) for i, j in subsets]
    assert kernel_distance(x, y, groups(6, 2))[0] == pytest.approx(np.mean(values), rel=1e-12)


def test_kernel_distance_needs_pairs():
    with pytest.raises(DataError, match="2 and 5 pictures"):
        kernel_distance(normal(2, 3), normal(5, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize("elements", [16, 250])
def test_chunks_change_nothing(elements, monkeypatch):
    x, y, group = normal(20, 5, seed=1), normal(15, 5, seed=2), groups(20, 4)
    whole = *precision_recall(x, y, group), kernel_distance(x, y, group), covered(x, y, squared_radii(y, 3))
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", elements)
    parts = *precision_recall(x, y, group), kernel_distance(x, y, group), covered(x, y, squared_radii(y, 3))
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)


# ---- pictures


class Pool(nn.Module):
    """Means of the four quarters of a picture, of each colour."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.calls = 0
        self.eval()

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 12"]:
        self.calls += 1
        return self.scale * nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


class Judge(Pool):
    def classify(self, features: Float[Tensor, "B 12"]) -> Float[Tensor, "B C"]:
        return features[:, :3].log_softmax(-1)


def pictures(count: int = 48, seed: int = 0, size: tuple[int, int] = (6, 8), low: int = 0) -> Tensor:
    return torch.randint(low, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def write_pngs(folder: Path, images: Tensor) -> Path:
    for i, image in enumerate(images):
        file = folder / f"{i % 3}" / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file)
    return folder


def write_npz(file: Path, **arrays: Tensor) -> Path:
    np.savez(file, **{name: array.numpy() for name, array in arrays.items()})  # pyright: ignore[reportArgumentType]
    return file


def in_order_of_paths(images: Tensor) -> Tensor:
    return torch.cat([images[i::3] for i in range(3)])


def test_a_tensor_a_folder_and_a_file_hold_the_same_pictures(tmp_path):
    images = pictures(10)
    write_pngs(tmp_path / "folder", images)
    write_npz(tmp_path / "file.npz", arr_0=images.permute(0, 2, 3, 1), arr_1=torch.arange(10))
    np.savez_compressed(tmp_path / "small.npz", arr_0=images.permute(0, 2, 3, 1).contiguous().numpy())
    for source, want in [
        (images, images),
        (images.float() / 255, images),
        (tmp_path / "folder", in_order_of_paths(images)),
        (str(tmp_path / "file.npz"), images),
        (tmp_path / "small.npz", images),
    ]:
        opened = open_pictures(source)
        assert (opened.count, opened.size) == (10, (6, 8))
        for batch in (3, 10, 64):
            assert torch.equal(torch.cat(list(opened.batches(batch))), want)
        assert opened.digest() == open_pictures(source).digest()


def test_floats_are_rounded_as_a_file_would_have_them():
    images = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert next(open_pictures(images).batches(1))[0, 0].flatten().tolist() == [0, 0, 1, 255]


def test_digest_is_of_the_content(tmp_path):
    images = pictures(4)
    other = images.clone()
    other[3, 2, 5, 7] += 1
    digests = [open_pictures(source).digest() for source in (images, other, images[:3], images.reshape(4, 3, 8, 6), images[[1, 0, 2, 3]])]
    digests += [open_pictures(write_pngs(tmp_path / name, some)).digest() for name, some in (("a", images), ("b", other))]
    assert len(set(digests)) == 7


def test_grey_and_transparent_pictures_are_read_as_rgb(tmp_path):
    Image.new("L", (4, 2), 51).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 2), (9, 9, 9, 0)).save(tmp_path / "b.png")
    (tmp_path / "._b.png").write_bytes(b"what other systems leave beside a file")
    assert next(open_pictures(tmp_path).batches(2))[:, :, 0, 0].tolist() == [[51] * 3, [255] * 3]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 4, 4), r"shape \[2, 4, 4\], must be \[N, 3, H, W\]"),
        (torch.zeros(0, 3, 4, 4), r"shape \[0, 3, 4, 4\]"),
        (torch.full((1, 3, 2, 2), 1.5), r"not all in \[0, 1\]"),
        (torch.full((1, 3, 2, 2), math.nan), r"not all in \[0, 1\]"),
        (torch.zeros(1, 3, 2, 2).long(), r"int64 values"),
    ],
    ids=["axes", "none", "range", "NaN", "whole numbers"],
)
def test_tensors_that_are_no_pictures(images, message):
    with pytest.raises(DataError, match=message):
        open_pictures(images)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        open_pictures(tmp_path / "gone")
    with pytest.raises(DataError, match=r"holds no file that ends in \.png"):
        open_pictures(tmp_path)
    write_pngs(tmp_path, pictures(3))
    (tmp_path / "1" / "x.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"x\.png: cannot be read"):
        list(open_pictures(tmp_path).batches(64))
    Image.new("RGB", (5, 6)).save(tmp_path / "1" / "x.png")
    with pytest.raises(DataError, match=r"x\.png: is 6x5 \(height x width\), 000\.png is 6x8"):
        list(open_pictures(tmp_path).batches(2))


def test_files_that_cannot_be_used(tmp_path):
    file = tmp_path / "a.npz"
    with pytest.raises(DataError, match="there is no such file"):
        open_pictures(file)
    file.write_bytes(b"no archive")
    with pytest.raises(DataError, match="is no npz file"):
        open_pictures(file)
    for arrays, message in [
        ({"mu": torch.zeros(2)}, "`arr_0` is missing"),
        ({"arr_0": torch.zeros(4, 3, 6, 8)}, r"`arr_0` has shape \[4, 3, 6, 8\]"),
        ({"arr_0": torch.zeros(4, 6, 8, 3)}, r"`arr_0` holds float32, must hold bytes"),
        ({"arr_0": pictures(4).permute(1, 3, 2, 0).contiguous().permute(3, 2, 1, 0)}, "is not a plain array, row after row"),
    ]:
        write_npz(file, **arrays)
        with pytest.raises(DataError, match=message):
            list(open_pictures(file).batches(2))
    np.savez_compressed(file, arr_0=np.zeros((4, 6, 8, 3), np.uint8), arr_1=np.array(["a label"], object), arr_2=np.array(3))
    assert npz_shapes(file) == {"arr_0": (4, 6, 8, 3), "arr_1": (1,), "arr_2": ()}
    for save in (np.savez, np.savez_compressed):
        save(file, arr_0=pictures(4).permute(0, 2, 3, 1).contiguous().numpy())
        whole = bytearray(file.read_bytes())
        whole[400] ^= 0xFF
        file.write_bytes(whole)
        with pytest.raises(DataError, match=r"`arr_0` cannot be read .* damaged"):
            list(open_pictures(file).batches(2))


# ---- features


def test_features_are_the_same_in_batches_of_any_size(tmp_path):
    images, ticks = pictures(10), []
    want = nn.functional.adaptive_avg_pool2d(images / 255, 2).flatten(1)
    for batch in (1, 3, 64):
        torch.testing.assert_close(extract(open_pictures(images), Pool(), batch=batch), want, rtol=0, atol=1e-6)
    extract(open_pictures(images), lambda x: x.mean((2, 3)), batch=4, tick=ticks.append)
    assert ticks == [4, 4, 2]


def test_the_cache_is_read_only_for_the_same_pictures_and_weights(tmp_path):
    images, first = pictures(10), Pool()
    run = partial(extract, batch=4, cache=tmp_path / "cache")
    features = run(open_pictures(images), first)
    assert first.calls == 3
    again, ticks = Pool(), []
    assert torch.equal(run(open_pictures(images), again, tick=ticks.append), features)
    assert (again.calls, ticks) == (0, [10])
    other = images.clone()
    other[0, 0, 0, 0] ^= 255
    assert not torch.equal(run(open_pictures(other), again), features)
    assert again.calls == 3
    heavier = Pool(2.0)
    torch.testing.assert_close(run(open_pictures(images), heavier), 2 * features)
    assert heavier.calls == 3
    assert sorted(file.suffix for file in (tmp_path / "cache").iterdir()) == [".safetensors"] * 3


def test_a_fingerprint_tells_modules_apart():
    nets = [Pool(), Pool(2.0), Judge(), Pool().double(), nn.Sequential(nn.Flatten()), nn.Sequential(nn.Flatten(), nn.ReLU())]
    assert len({fingerprint(net) for net in nets}) == len(nets)
    assert fingerprint(Pool()) == fingerprint(Pool())


def test_extractors_that_cannot_be_used(tmp_path):
    images = open_pictures(pictures(5))
    with pytest.raises(ConfigError, match=r"is no nn\.Module"):
        extract(images, lambda x: x.flatten(1), cache=tmp_path)
    with pytest.raises(ConfigError, match=r"Pool: is in training mode.* eval\(\)"):
        extract(images, Pool().train())
    with pytest.raises(ConfigError, match=r"gave \[5, 3, 6, 8\] for 5 pictures, must give \[5, D\]"):
        extract(images, nn.Identity().eval())
    with pytest.raises(NumericsError, match=r"features of 5 of 5 pictures are not finite"):
        extract(images, Pool(math.nan), cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/cache': cannot be written"):
        extract(open_pictures(pictures(5)), Pool(), cache=tmp_path / "file" / "cache")


def test_a_damaged_cache_is_named(tmp_path):
    extract(open_pictures(pictures(5)), Pool(), cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=file.name):
        extract(open_pictures(pictures(5)), Pool(), cache=tmp_path)


# ---- the whole comparison


def test_equal_sets():
    found = compare_sets(pictures(), pictures(), Pool(), 0)
    assert found["fd"] == pytest.approx(0, abs=1e-9)
    assert (found["precision"], found["recall"]) == (1, 1)
    assert found["kid"] < 0, "without bias, so that a set meets itself below 0"
    assert (found["pictures"], found["reference_pictures"]) == (48, 48)
    assert "is" not in found
    assert "fd_bias" in found


def test_too_few_pictures_per_feature_have_no_bias():
    assert "fd_bias" not in compare_sets(pictures(47), pictures(), Pool(), 0)


def test_sets_of_one_law_and_of_another():
    same, other = (compare_sets(pictures(200, 1, low=low), pictures(200, 2), Judge(), 0) for low in (0, 60))
    assert same["fd"] - same["fd_bias"] < other["fd"] / 10
    assert other["fd"] - other["fd_ci95"] > same["fd"] + same["fd_ci95"]
    assert abs(same["kid"]) <= same["kid_ci95"] * 1.5
    assert other["kid"] - other["kid_ci95"] > same["kid"]
    assert other["precision"] < same["precision"]
    assert 1 <= same["is"] <= 3
    assert set(other) == {*(f"{n}{s}" for n in ("fd", "is", "precision", "recall", "kid") for s in ("", "_ci95")), "fd_bias"} | {
        "pictures",
        "reference_pictures",
    }


def test_the_seed_only_makes_groups(tmp_path):
    run = partial(compare_sets, pictures(60, 1), pictures(48, 2), Judge())
    assert run(0) == run(0, batch=7, cache=tmp_path) == run(0, cache=tmp_path)
    first, second = run(0), run(1)
    for name in ("fd", "is", "precision", "recall", "kid"):
        assert second[name] == pytest.approx(first[name], rel=1e-9)
    assert second["fd_ci95"] != first["fd_ci95"]


def test_folders_and_tensors_compare_alike(tmp_path):
    images, real = pictures(48, 1), pictures(48, 2)
    folder = compare_sets(write_pngs(tmp_path / "a", images), write_pngs(tmp_path / "b", real), Pool(), 0)
    assert folder == compare_sets(in_order_of_paths(images), in_order_of_paths(real), Pool(), 0)


def test_reference_files(tmp_path):
    """Statistics of many pictures, fewer pictures, or both, as the ADM evaluator's files have it; or features."""
    images, few, many = pictures(48, 1), pictures(40, 2), pictures(300, 3)
    every = moments(extract(open_pictures(many), Pool())).gaussian()
    statistics, shown = {"mu": every.mean, "sigma": every.cov}, {"arr_0": few.permute(0, 2, 3, 1)}
    run = partial(compare_sets, images, extractor=Pool(), seed=0)
    from_few, from_many = run(few), run(many)
    assert run(write_npz(tmp_path / "few.npz", **shown)) == from_few
    only = run(write_npz(tmp_path / "statistics.npz", **statistics))
    assert only.keys() == {"fd", "fd_ci95", "fd_bias", "pictures"}
    assert only["fd"] == pytest.approx(from_many["fd"], rel=1e-9)
    both = run(write_npz(tmp_path / "both.npz", **statistics, **shown, mu_s=torch.zeros(2), sigma_s=torch.zeros(2, 2)))
    assert both == from_few | only
    features = run(write_npz(tmp_path / "features.npz", arr_0=extract(open_pictures(few), Pool())))
    assert features == from_few


def test_inception_scores_are_called_fid():
    class Tiny(Inception):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.fc = nn.Linear(12, 3)

        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

        def classify(self, features: Tensor) -> Tensor:
            return nn.functional.linear(features, self.fc.weight).log_softmax(-1)

    found = compare_sets(pictures(), pictures(seed=1), Tiny().eval(), 0)
    assert {"fid", "fid_ci95", "fid_bias", "is"} <= found.keys()
    assert "fd" not in found


def test_sets_that_cannot_be_compared(tmp_path):
    run = partial(compare_sets, extractor=Pool(), seed=0)
    with pytest.raises(DataError, match="39 pictures, but 20 groups for intervals need at least 40"):
        run(pictures(39), pictures())
    with pytest.raises(DataError, match="3 pictures: the 3 nearest others"):
        run(pictures(), pictures(3))
    with pytest.raises(DataError, match=r"is 6x8 \(height x width\), the reference 8x8"):
        run(pictures(), pictures(size=(8, 8)))
    for arrays, message in [
        ({"mu": torch.zeros(3), "sigma": torch.eye(3)}, "holds 3 features, the extractor gives 12"),
        ({"mu": torch.zeros(3), "sigma": torch.eye(2)}, r"`mu` is \[3\] and `sigma` \[2, 2\]"),
        ({"mu": torch.zeros(3), "other": torch.eye(2)}, "holds mu, other, where `mu` and `sigma`, or `arr_0`, are due"),
        ({"mu": torch.full((12,), math.nan), "sigma": torch.eye(12)}, "`mu` holds numbers that are not finite"),
    ]:
        with pytest.raises(DataError, match=message):
            run(pictures(), write_npz(tmp_path / "reference.npz", **arrays))


# ---- Inception


def scrambled(shape: tuple[int, ...], salt: int) -> Tensor:
    """Numbers in [-0.5, 0.5) that any machine makes alike."""
    i = torch.arange(math.prod(shape)) + 1
    return ((((i * i + salt) * 2654435761 >> 8) & 0xFFFF).double() / 65536 - 0.5).float().view(shape)


def inception_weights(model: Inception) -> dict[str, Tensor]:
    """Convolutions that keep the size of what they pass on, and norms that do a little of everything."""
    state = {}
    for salt, (name, tensor) in enumerate(model.state_dict().items()):
        numbers = scrambled(tuple(tensor.shape), salt)
        if name.endswith((".conv.weight", "fc.weight")):
            state[name] = numbers * (24 / tensor[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "bn.running_var")):
            state[name] = 1 + numbers
        elif not name.endswith("num_batches_tracked"):
            state[name] = numbers / 5
    return state


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return inception_weights(Inception())


def test_inception_computes_what_torch_fidelity_computes(weights, tmp_path):
    """Its features and unbiased log-probabilities, recorded from torch-fidelity 0.4.0 with these weights and this picture."""
    torch.save(weights, tmp_path / "weights.pth")
    model = load_inception(tmp_path / "weights.pth")
    image = ((scrambled((1, 3, 40, 32), 7) + 0.5) * 255).round() / 255
    features = model(image)
    want = torch.tensor([0.025622, 1.657313, 23.611481, 28.88525, 0.0, 0.0, 61.986259])
    torch.testing.assert_close(features[0, ::300], want, rtol=1e-4, atol=1e-4)
    want = torch.tensor([-107.27282, -124.16951, -90.20149, -74.89854, -90.18063, -62.59521])
    torch.testing.assert_close(model.classify(features)[0, ::200], want, rtol=1e-4, atol=0)
    assert isinstance(model, Classifier)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_inception_has_the_parameters_of_the_released_one(weights):
    model = Inception()
    assert sum(p.numel() for p in model.parameters()) == 23_834_568 + 8 * 2049, "torchvision's without its auxiliary head, 8 classes more"
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch_pool.bn.running_mean": (32,),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7c.branch3x3dbl_3b.bn.bias": (384,),
        "fc.bias": (1008,),
    }.items():
        assert tuple(weights[name].shape) == shape


def test_resize_as_tensorflow_1_by_hand():
    """Twice as large: every pixel, means between, the last one repeated. Half as large: every second pixel, unsmoothed. Of its own size:
    as it is."""
    row = torch.tensor([0.0, 4, 8, 2]).expand(1, 3, 4, 4)
    assert resize_tf1(row, 8)[0, 0, 0].tolist() == [0, 2, 4, 6, 8, 5, 2, 2]
    assert resize_tf1(row.mT, 8)[0, 0, :, 5].tolist() == [0, 2, 4, 6, 8, 5, 2, 2]
    assert resize_tf1(row, 2)[0, 0, 0].tolist() == [0, 8]
    assert torch.equal(resize_tf1(row, 4), row)


def test_missing_weights_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"not in .*checkpoints under pt_inception.*Download https://.* another extractor"):
        load_inception()
    with pytest.raises(CheckpointError, match=r"there is no file .*gone\.pth\. Download"):
        load_inception(tmp_path / "gone.pth")
    file = tmp_path / "hub" / "checkpoints" / NAMES[1]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half a download")
    with pytest.raises(CheckpointError, match=r"its sha256 begins with [0-9a-f]{8}, must begin with 6726825d"):
        load_inception()


def test_other_weights_are_refused(tmp_path, weights):
    torch.save(dict(itertools.islice(weights.items(), 40)), tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"do not fit Inception.\n  missing"):
        load_inception(tmp_path / "part.pth")


@pytest.mark.gpu
def test_the_same_numbers_on_a_gpu():
    here = compare_sets(pictures(60, 1), pictures(48, 2), Judge(), 0)
    there = compare_sets(pictures(60, 1), pictures(48, 2), Judge().cuda(), 0)
    assert there == pytest.approx(here, rel=1e-4, abs=1e-6)
