"""Who gets how much credit."""

from dataclasses import dataclass
from typing import Literal

from varl.config.demand import demand
from varl.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOConfig:
    """Group-relative policy optimisation (arXiv 2402.03300), with the names of TRL."""

    num_generations: int = 16
    """G, rollouts per prompt. The group is the baseline, so at least 2."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = "dapo"
    """Over what the token sum is divided: each picture's own tokens (grpo), a constant length (dr_grpo), all active tokens of the step
    (dapo) or of the micro-batch (bnpo). Pictures have equal lengths, so they differ only where tokens are masked."""
    importance_sampling_level: Literal["token", "step", "sequence"] = "token"
    """What the clipped ratio spans: a token, the geometric mean of a step's tokens, or of all (GSPO)."""
    epsilon: float = 0.2
    epsilon_high: float | None = None
    """Upper clip, if it is another one (DAPO's clip-higher)."""
    beta: float = 0.0
    """KL weight to the reference model; 0 needs no reference."""
    kl_estimator: Literal["analytic", "k1", "k2", "k3"] = "analytic"
    """As a loss: analytic and k2 have the gradient of the reverse KL, k3 that of the forward KL, k1 none at all in expectation."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """By which standard deviation advantages are divided."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum", "running_scale"] = "sum_then_normalize"
    """Of several rewards: sum_then_normalize weighs them in their own units; normalize_then_sum first divides each by its own standard
    deviation inside the group (GDPO, arXiv 2601.05242), so that a weight means the same for all; running_scale divides by a running mean of
    those deviations over the steps before, one number for all groups, so that a group with hardly a difference stays one."""
    num_iterations: int = 1
    """Optimizer steps on each batch of rollouts."""
    panw_alpha: float = 0.0
    """PANW exponent, VAR-RL Eq. 9; 0 is plain GRPO."""
    region_credit: bool = False
    """Where the reward is a sum over text regions, give each region's own advantage to its own tokens."""
    mask: Literal["none", "direct", "chained"] = "none"
    """Mask propagation: only tokens under the judged boxes learn from the reward."""
    mask_dilation: int = 1
    """Cells of the finest grid by which boxes are widened, for masks and region credit."""
    rollouts_per_chunk: int = 32
    """Pictures drawn, judged and trained on together; while one chunk is judged the next is drawn."""

    def __post_init__(self) -> None:
        if self.num_generations < 2:
            raise ConfigError(
                f"grpo.num_generations={self.num_generations}: a group of one is its own baseline, every advantage is 0. "
                "Set it to 2 or more."
            )
        if self.importance_sampling_level not in ("token", "step", "sequence"):
            raise ConfigError(f"grpo.importance_sampling_level={self.importance_sampling_level!r}: use token, step or sequence.")
        if self.epsilon <= 0 or (self.epsilon_high is not None and self.epsilon_high <= 0):
            raise ConfigError(f"grpo.epsilon={self.epsilon}, epsilon_high={self.epsilon_high}: the clip range must be above 0.")
        if self.beta < 0:
            raise ConfigError(f"grpo.beta={self.beta}: a negative KL weight pushes away from the reference. Set 0 or more.")
        if self.num_iterations < 1:
            raise ConfigError(f"grpo.num_iterations={self.num_iterations}: must be 1 or more.")
        if self.panw_alpha < 0:
            raise ConfigError(f"grpo.panw_alpha={self.panw_alpha}: must be 0 (plain) or more; 0.6 to 0.8 is the robust range.")

    @property
    def grpo(self) -> "GRPOConfig":
        """Itself: what the config of every algorithm holds."""
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class MiddleStep:
    """Where the prefix ends. Exactly one of the three is set."""

    index: int | None = None
    """The prefix is the first `index` steps."""
    resolution: float | None = None
    """... up to the last grid whose longer side is at most this share of the final grid's (the paper's m_256 of 1024 is 0.25)."""
    token_share: float | None = None
    """... as many steps as hold at most this share of all tokens (the paper's m_256 is 0.089)."""

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.index, self.resolution, self.token_share)) != 1:
            raise ConfigError(f"middle_step={self}: set exactly one of index, resolution and token_share.")


@dataclass(frozen=True, slots=True, kw_only=True)
class VARRLConfig:
    """VAR RL Done Right (arXiv 2601.02256): two-stage GRPO with a value-as-middle-return prefix reward."""

    grpo: GRPOConfig = GRPOConfig()
    middle_step: MiddleStep = MiddleStep(resolution=0.25)
    num_continuations: int = 1
    """K, completions from each prefix. Measured: at equal scored images K = 1 is never worse."""
    middle_return: Literal["mean", "log_mean_exp", "importance"] = "mean"
    """mean is the unbiased full-horizon prefix gradient; log_mean_exp the paper's Eq. 10; importance corrects it for a fixed old policy."""
    eta: float = 1.0
    """Temperature of the soft value."""
    prefix_updates: int = 3
    suffix_updates: int = 1
    """The cycle: so many prefix updates, then so many suffix updates. 3:1 is the paper's fine, 300:100 its coarse alternation."""
    tree_reuse: bool = False
    """Also train the suffix on the K continuations of a prefix update, each against its siblings (needs K >= 2)."""
    shared_prefix_baseline: bool = True
    """Suffix updates draw all G continuations from one prefix, whose mean is the baseline."""
    adapt_middle_step: bool = False
    """Experiment: choose m so that the share of reward variance settled by step m is nearest 0.25."""

    def __post_init__(self) -> None:
        if self.num_continuations < 1:
            raise ConfigError(f"var_rl.num_continuations={self.num_continuations}: a prefix needs at least 1 continuation to be judged.")
        if self.eta <= 0:
            raise ConfigError(f"var_rl.eta={self.eta}: the soft value's temperature must be above 0.")
        if self.tree_reuse and self.num_continuations < 2:
            raise ConfigError("var_rl.tree_reuse needs siblings as baseline: set num_continuations to 2 or more.")
        if self.prefix_updates < 0 or self.suffix_updates < 0 or self.prefix_updates + self.suffix_updates == 0:
            raise ConfigError(f"var_rl: a cycle of {self.prefix_updates} prefix and {self.suffix_updates} suffix updates trains nothing.")


@dataclass(frozen=True, slots=True, kw_only=True)
class VAPIConfig:
    """VA-pi (arXiv 2512.19680): GRPO on tokens drawn from the context of a real picture, paid by how well they rebuild it. A step learns
    from G + 1 rows for each picture, so `train.rollouts_per_backward` should be a multiple of that: a picture that is cut apart costs one
    forward pass more, and has the same gradient."""

    grpo: GRPOConfig = GRPOConfig(num_generations=8)
    """`beta` above 0 is the prior as KL to the initial model."""
    prefix_noise: float = 0.0
    """The paper's xi: each token of the context is replaced with this probability, by any other with equal odds (Eq. 28). The release draws
    from all K, the true one included: its xi is ours times 1 - 1/K."""
    prior_weight: float = 0.1
    """The paper's beta: weight of the cross-entropy of the picture's own tokens in that context, in nats per token."""
    drop_condition: float = 0.1
    """Share of pictures whose draws see no class or caption, so that the model keeps what guidance needs. Chosen once for a picture, before
    its draws; the release chooses anew for each draw while it learns, and so scores another law than it drew from."""
    shuffle_rewards: bool = False
    """A control: the rewards of a picture's draws are dealt out anew at random. The expected gradient of the reward is then 0."""

    def __post_init__(self) -> None:
        demand("va_pi.prefix_noise", self.prefix_noise, 0 <= self.prefix_noise <= 1, "a share of the context's tokens, 0 to 1")
        demand("va_pi.prior_weight", self.prior_weight, self.prior_weight >= 0, "0 (none) or more")
        demand("va_pi.drop_condition", self.drop_condition, 0 <= self.drop_condition <= 1, "a share of the pictures, 0 to 1")
        if self.grpo.loss_type != "dapo":
            raise ConfigError(
                f"va_pi.grpo.loss_type={self.grpo.loss_type!r}: every draw learns from all of its tokens, so all types are one mean over "
                "tokens, and the prior is weighed against it. Leave it at dapo."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MARGRPOConfig:
    """MAR-GRPO (arXiv 2604.06966): GRPO on the denoising paths of a masked model whose diffusion head is frozen. The release's form is
    trajectories=release, support=unknown, consistency=0, grpo.loss_type=grpo. Modes that train on further paths make num_trajectories + 1
    rows of each that share one forward pass, so `train.rollouts_per_backward` should be a multiple of that."""

    grpo: GRPOConfig = GRPOConfig(num_generations=8)
    """The paper has num_generations=4 and beta=0.01. A token's ratio is that of all its scored moves together: with num_iterations above 1
    a Flow-GRPO range of 1e-4, for the mean over k moves of d numbers, is epsilon = 1e-4 k d here."""
    ar_steps: int = 12
    """K: on how many of a picture's steps to train, evenly spread; 0 is all. 12 of 64 is the paper's."""
    denoise_moves: int = 10
    """k: on how many of a token's admissible moves to train, evenly spread, chosen for each token anew; 0 is all. 10 of 25 is the
    paper's."""
    num_trajectories: int = 4
    """M, further denoising paths of each token from the same latent; 0 is plain GRPO. The release has 3 (NOVA) and 5 (Harmon)."""
    trajectories: Literal["release", "include_primary", "precision_weight", "rewarded"] = "precision_weight"
    """What they do for the uncertain tokens, see `algorithms/mar_grpo.py`: replace the path that made the picture, at its advantage
    (release); join it (include_primary); only say how far to damp it (precision_weight); join it, each with a picture and a reward of its
    own (rewarded)."""
    uncertain_fraction: float = 0.3
    """Share of a picture's tokens, those that differ most between trajectories, that this is done for. 0.3 is the release's."""
    support: Literal["committed", "unknown"] = "committed"
    """Which tokens a step is trained on: those it put into the picture, or, as released, all that were not known before it."""
    train_head: bool = False
    """Train the diffusion head too, as GRPO end to end does; the paper's method is to leave it as it is."""
    consistency: float | None = None
    """Of the unknown tokens, only those learn from the reward whose cosine to the final token the step raised by more than this; 0 is the
    release's, None takes all."""

    def __post_init__(self) -> None:
        for name in ("ar_steps", "denoise_moves"):
            demand(f"mar_grpo.{name}", getattr(self, name), getattr(self, name) >= 0, "0 (all) or more")
        demand("mar_grpo.num_trajectories", self.num_trajectories, self.num_trajectories >= 0, "0 (plain GRPO) or more")
        demand("mar_grpo.uncertain_fraction", self.uncertain_fraction, 0 <= self.uncertain_fraction <= 1, "a share of the tokens, 0 to 1")
        if self.num_trajectories == 1 and (self.trajectories == "precision_weight" or 0 < self.uncertain_fraction < 1):
            raise ConfigError(
                "mar_grpo.num_trajectories=1: one path alone does not spread, so no token is more uncertain than another. Set it to 2 or "
                "more, or uncertain_fraction to 0 or 1 and trajectories to release, include_primary or rewarded."
            )
        if self.consistency is not None and self.support == "committed":
            raise ConfigError(
                f"mar_grpo.consistency={self.consistency}: the filter keeps every token that the step put into the picture, so with "
                "support=committed it does nothing. Leave it out, or set support=unknown."
            )
        if self.support == "unknown" and (self.grpo.loss_type != "grpo" or self.grpo.panw_alpha > 0):
            raise ConfigError(
                f"mar_grpo.support='unknown' gives every step a mean of its own, as released; grpo.loss_type={self.grpo.loss_type!r} and "
                f"panw_alpha={self.grpo.panw_alpha} would weigh steps by their tokens. Set loss_type=grpo and panw_alpha=0."
            )
        if self.support == "unknown" and self.trajectories == "rewarded":
            raise ConfigError(
                "mar_grpo.trajectories='rewarded': a token that is looked at before it is settled has made no picture to be rewarded for. "
                "Set support=committed, or another mode."
            )


AlgorithmConfig = GRPOConfig | VARRLConfig | VAPIConfig | MARGRPOConfig
