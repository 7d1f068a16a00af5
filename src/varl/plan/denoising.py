"""What a run on a masked model costs: its transformer is asked once for each step, its head for each move of each token."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from varl.algorithms.mar_grpo import require_moves, require_steps
from varl.build import needs_reference, trains_head
from varl.config import GRPOConfig, MARGRPOConfig, PretrainConfig, RunConfig
from varl.plan.cost import (
    FORWARD_AND_BACKWARD,
    Update,
    branches,
    contexts_of,
    further_rows,
    held,
    passes_over,
    pretraining_weights,
    weights_held,
)
from varl.plan.families import MaskedFamily, autoencoder_cost, decoder_cost
from varl.policies.masked import HEAD_COPIES
from varl.policies.sampling import CHUNK_ELEMENTS
from varl.pretrain.masked import TIMES, mask_share

PATHS = "denoising paths of pictures"
"""Name of an update."""
QUANTILES = 64
"""At which the share of masked tokens is taken for a mean."""


def denoising_of(config: RunConfig) -> MARGRPOConfig:
    """The algorithm; GRPO is MAR-GRPO on all steps and moves, without further paths, and of a head that learns too unless adapters do."""
    algorithm = config.algorithm
    if isinstance(algorithm, GRPOConfig):
        return MARGRPOConfig(grpo=algorithm, ar_steps=0, denoise_moves=0, num_trajectories=0, train_head=trains_head(config))
    assert isinstance(algorithm, MARGRPOConfig)  # no other can be built on a masked model
    return algorithm


def check(config: RunConfig, family: MaskedFamily) -> None:
    """ConfigError for more steps or moves to train on than there are."""
    algorithm = denoising_of(config)
    require_steps(algorithm.ar_steps, family.layout.steps)
    require_moves(algorithm.denoise_moves, family.admissible, family.moves)


class Denoising:
    """What one update does. Which steps and which tokens are trained on is left to chance: their numbers here are the expected ones, and
    the consistency filter is taken to keep every token."""

    def __init__(self, config: RunConfig, family: MaskedFamily) -> None:
        self.algorithm, self.family, self.config = denoising_of(config), family, config
        algorithm, grpo, tokens = self.algorithm, config.algorithm.grpo, family.layout.tokens
        self.prompts = config.train.prompts_per_step
        self.pictures = self.prompts * grpo.num_generations
        self.chunks = -(-self.prompts // max(1, grpo.rollouts_per_chunk // grpo.num_generations))
        self.guided, self.scored_guided = branches(config), 1 + config.score_law.guided
        self.reference = int(needs_reference(config.algorithm))
        self.laws = [config.sample_law] if config.sample_law == config.score_law else [config.sample_law, config.score_law]
        self.steps = algorithm.ar_steps or family.layout.steps
        """K."""
        self.moves = algorithm.denoise_moves or family.admissible
        """k."""
        known = family.known
        self.trained = family.counts if algorithm.support == "committed" else [tokens - before for before in known]
        """Tokens of each step that are trained on."""
        uncertain = round(algorithm.uncertain_fraction * tokens) / tokens
        self.further = further_rows(algorithm) * uncertain
        """Further paths for each of them."""
        self.per_prompt = grpo.num_generations * (self.steps if algorithm.support == "unknown" else 1)
        """Rows with a forward pass of their own, of a prompt."""
        self.micro_batches = [rows for chunk in contexts_of(config, algorithm, family.layout.steps) for rows in chunk]
        """How many of them each holds."""

    def over_steps(self, cost: Callable[[int], float]) -> float:
        """Of the K steps of one picture, step i of which costs so much."""
        return self.steps / self.family.layout.steps * sum(cost(i) for i in self.family.steps)

    def seeing(self, step: int) -> float:
        """Operations of the transformer at this step of one picture, without guidance."""
        return self.family.seeing(self.family.known[step]).flops

    def token(self) -> float:
        """Operations to draw a token, and to say its density under each law."""
        a_path = self.family.reading().flops + self.family.moves * self.family.moving().flops
        return sum((1 + law.guided) * a_path for law in self.laws)

    def beginnings(self) -> float:
        """Operations for what a call of the policy makes once for its chunk, in all chunks: conditions, and the chain."""
        nothing = self.chunks * (self.guided - 1)
        return (self.prompts + nothing) * self.family.condition().flops + self.chunks * self.family.making()

    def rollout(self) -> float:
        """Each step a pass of the transformer, and its tokens all moves of the head."""
        transformer = self.guided * sum(self.seeing(i) for i in self.family.steps)
        return self.beginnings() + self.pictures * (transformer + self.family.layout.tokens * self.token())

    def paths(self) -> float:
        """M further ones for every token, by the head alone."""
        drawn = self.algorithm.num_trajectories * self.pictures * self.family.layout.tokens
        return self.chunks * self.family.making() + drawn * self.token() if drawn else 0.0

    def previews(self) -> float:
        """With support=unknown: what a trained step expects of the tokens that it does not settle, with the filter the step before it too;
        and further paths scored as the step would have drawn them."""
        if self.algorithm.support == "committed":
            return 0.0
        family, known = self.family, [*self.family.known[1:], self.family.layout.tokens]

        def preview(step: int) -> float:
            return self.guided * self.seeing(step) + (family.layout.tokens - known[step]) * self.token()

        total = self.beginnings() + self.pictures * self.over_steps(preview)
        if self.algorithm.consistency is not None:
            total += self.beginnings() + self.pictures * self.over_steps(lambda i: preview(max(i - 1, 0)))
        if self.further:
            total += self.beginnings() + self.chunks * self.reference * family.making()
            head = self.further * (family.reading().flops + self.moves * family.moving().flops)
            scored = self.over_steps(lambda i: self.seeing(i) + self.trained[i] * head)
            total += (1 + self.reference) * self.scored_guided * self.pictures * scored
        return total

    def train(self) -> float:
        """K steps of each picture, or of each of its cuts into micro-batches: a pass of the transformer and its backward pass; and of the
        head k moves of their tokens with the gradient to the latents, of the log-density and of the KL, or if it learns to its weights
        too."""
        family, learns = self.family, self.algorithm.train_head
        contexts = sum(self.micro_batches) * self.pictures / (self.prompts * self.per_prompt)
        conditions = sum(-(-rows // self.per_prompt) + self.guided - 1 for rows in self.micro_batches)
        transformer = conditions * family.condition().flops + contexts * self.scored_guided * self.over_steps(self.seeing)
        forward = family.reading().flops + self.moves * family.moving().flops
        both = family.reading(learns=learns).flops + self.moves * family.moving(learns=learns).flops
        gradients = 1 if learns else 1 + self.reference
        tokens = self.trained_tokens() * (1 + self.further)
        head = tokens * self.scored_guided * ((1 + self.reference) * forward + gradients * (both - forward))
        making = family.making(learns=learns) + self.reference * family.making()
        return passes_over(self.config) * transformer + head + len(self.micro_batches) * making

    def trained_tokens(self) -> float:
        return self.pictures * self.over_steps(lambda i: self.trained[i])


def denoising_updates(config: RunConfig, family: MaskedFamily) -> tuple[Update, ...]:
    """How often it is made, and what one costs."""
    does = Denoising(config, family)
    trajectories, iterations = does.algorithm.num_trajectories, config.algorithm.grpo.num_iterations
    judged = does.pictures * (1 + trajectories * (does.algorithm.trajectories == "rewarded"))
    phases = {
        "rollout": does.rollout(),
        "paths": does.paths(),
        "previews": does.previews(),
        "decode": judged * decoder_cost(family).flops,
        "train": iterations * does.train(),
    }
    return (
        Update(
            name=PATHS,
            count=config.train.steps,
            judged=judged,
            drawn=does.pictures * family.layout.tokens * (1 + trajectories),
            trained=iterations * round(does.trained_tokens()),
            flops={name: flops for name, flops in phases.items() if flops},
        ),
    )


def denoising_memory(config: RunConfig, family: MaskedFamily) -> dict[str, int]:
    """Bytes by part, at the moment when most is held. The transformer's activations are of all steps that a micro-batch is trained on; of
    the head, where it is frozen, those of one slice, and a vector for each token and gradient: neither moves nor paths add to them."""
    does, model = Denoising(config, family), family.model
    algorithm, size = does.algorithm, 2 if config.train.dtype == "bfloat16" else 4
    grpo, tokens = algorithm.grpo, family.layout.tokens
    memory = weights_held(config, family)
    chunk = min(max(1, grpo.rollouts_per_chunk // grpo.num_generations), does.prompts) * grpo.num_generations
    previews = 0 if algorithm.support == "committed" else does.steps * (1 if algorithm.consistency is None else 2)
    path = 4 * tokens * ((family.moves + 1) * model.channels + len(does.laws) * family.moves)
    noise = 4 * tokens * (family.moves + 1) * model.channels
    drawing = {
        "latents": chunk * does.guided * tokens * family.width * 4,
        "paths": chunk * (1 + algorithm.num_trajectories + previews) * path,
        "noise": chunk * max(1, algorithm.num_trajectories, does.steps if previews else 0) * noise,
    }
    training = training_memory(does, size)
    if does.chunks > 1:  # the next chunk is drawn while one is trained on
        return held(memory | drawing | training)
    return held(memory | max(drawing, training, key=lambda part: sum(part.values())))


def training_memory(does: Denoising, size: int) -> dict[str, int]:
    """Of one micro-batch."""
    family, algorithm, halves = does.family, does.algorithm, does.scored_guided
    rows = max(does.micro_batches) * does.pictures / (does.prompts * does.per_prompt)
    activations = rows * halves * does.over_steps(lambda i: family.seeing(family.known[i]).saved) * size / 4
    most = CHUNK_ELEMENTS // (HEAD_COPIES * family.width)
    moves = [rows * does.trained[i] * (1 + does.further) * does.moves for i in family.steps]
    move = halves * family.moving(learns=algorithm.train_head).saved
    if algorithm.train_head:  # what does not fit in a slice is scored again in the backward pass
        kept = does.over_steps(lambda i: moves[i] if moves[i] <= most else 0.0)
        return {"activations": round(activations), "head": round((kept + (most if max(moves) > most else 0)) * move)}
    vectors = rows * does.over_steps(lambda i: does.trained[i]) * (1 + does.further) * halves * (1 + does.reference) * family.width * 4
    return {"activations": round(activations), "head": round(min(most, max(moves)) * move), "derivatives": round(vectors)}


# ---- pre-training -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Masks:
    """What a picture of pre-training costs, in the mean over the share of its tokens that is masked."""

    missing: float
    """Tokens."""
    flops: float
    """Of the transformer and the head, with their backward passes."""
    saved: float
    """Bytes."""


def masks(family: MaskedFamily) -> Masks:
    tokens = family.layout.tokens
    counts = [math.ceil(tokens * mask_share((i + 0.5) / QUANTILES)) for i in range(QUANTILES)]
    missing, passes = sum(counts) / QUANTILES, [family.seeing(tokens - count) for count in counts]
    reading, moving = family.reading(learns=True), family.moving(learns=True)
    head = reading.flops + TIMES * (moving.flops + family.making(learns=True) / family.moves)
    return Masks(
        missing=missing,
        flops=FORWARD_AND_BACKWARD * sum(cost.flops for cost in passes) / QUANTILES + missing * head,
        saved=sum(cost.saved for cost in passes) / QUANTILES + missing * (reading.saved + TIMES * moving.saved),
    )


def masked_pretraining_updates(config: PretrainConfig, family: MaskedFamily) -> tuple[Update, ...]:
    """The autoencoder's, if it is trained, and that of transformer and head."""
    mean, autoencoder = masks(family), FORWARD_AND_BACKWARD * config.tokenizer_batch * autoencoder_cost(family).flops
    counts = (config.tokenizer_steps if config.trains_tokenizer else 0, config.steps)
    tokens = (config.tokenizer_batch * family.layout.tokens, round(config.batch * mean.missing))
    kinds = zip(("tokenizer", "transformer"), counts, tokens, (autoencoder, config.batch * mean.flops), strict=True)
    return tuple(
        Update(name=name, count=count, judged=0, drawn=0, trained=trained, flops={"train": flops})
        for name, count, trained, flops in kinds
        if count
    )


def masked_pretraining_memory(config: PretrainConfig, family: MaskedFamily) -> dict[str, int]:
    """Bytes by part, in the phase that holds more."""
    size = 2 if config.dtype == "bfloat16" else 4
    phases = (config.tokenizer_batch * autoencoder_cost(family).saved, config.batch * masks(family).saved)
    return pretraining_weights(config, family) | {"activations": round(max(phases) * size / 4)}
