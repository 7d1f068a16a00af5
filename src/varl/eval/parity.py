"""Do our models compute what the authors' code computed? A case is `<case>.safetensors` (weights `sd.*`, inputs `in.*`, recorded random
draws `rng.*`, recorded results `out.*`) with `<case>.json` (sizes, and the tolerance of each result); a JSON file in a folder `keys` lists
the names and shapes of a released file's weights. Models are built from the JSON alone."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from varl.checkpoints import janus, llamagen, mar
from varl.checkpoints.folder import Shapes, read_tensors, require_fit, shapes_of, strict_load
from varl.checkpoints.hugging_face import transformers
from varl.checkpoints.released import count, expect
from varl.checkpoints.var import SCHEDULES, fill_tokenizer, fill_transformer, tokenizer_config, transformer_config
from varl.config import (
    CaptionConfig,
    DiffusionHeadConfig,
    KLConfig,
    LawConfig,
    MARConfig,
    NextScaleConfig,
    RasterConfig,
    TokenizerConfig,
    ViTConfig,
    VQConfig,
    mar_guidance,
    mar_schedule,
    var_guidance,
)
from varl.errors import CheckpointError, ConfigError
from varl.models.diffusion_head import (
    STEPS,
    Process,
    drawn,
    evenly,
    guided,
    log_density,
    noise_loss,
    noised,
    respaced,
    reverse_step,
    sinusoid,
    variance_loss,
)
from varl.models.janus import Janus
from varl.models.mar import MAR, known, masked
from varl.models.next_scale import NextScale
from varl.models.raster import Condition, Raster, attention_mask
from varl.policies.next_scale import NextScalePolicy
from varl.policies.raster import RasterPolicy, pad_left
from varl.policies.sampling import guide, token_law, token_scores
from varl.rng import Stream
from varl.tokenizers.kl import KL
from varl.tokenizers.multiscale_vq import Grid, MultiScaleVQ
from varl.tokenizers.vq import VQ
from varl.types import Prompt

Verdict = Literal["agrees", "FAILS", "not supported yet"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    family: str
    case: str
    verdict: Verdict
    compared: int = 0
    """Tensors whose numbers were compared; of a key list, names."""
    worst: str = ""
    """The tensor that comes nearest to its tolerance, or goes furthest beyond it."""
    ratio: float = 0.0
    """Its largest error, in units of its tolerance: above 1 fails."""
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    root: Path
    file: Path
    """The JSON file."""
    info: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def config(self) -> dict[str, Any]:
        return self.info["config"]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors under `prefix`, without it; floating ones in fp32, as the authors' code ran."""
        found = {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}

    def draws(self, stream: str) -> Iterator[Tensor]:
        """The recorded draws of a stream, in the order in which they were used; dim 0 of each tensor counts equal draws."""
        recorded = self.part(f"rng.{stream}.")
        for name in sorted(recorded):
            yield from recorded[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What it takes to check the cases of one model family."""

    results: Callable[[Case], dict[str, Tensor]]
    """From a case to its results, by the names under `out.`."""
    fit: Callable[[Shapes, str], None]
    """Raises where the weights of a released file, given by name and shape, and where they are from, do not fit our modules."""


def run(folder: Path) -> list[CaseResult]:
    """Every case under `folder`, at any depth, in the order of their paths."""
    root = Path(folder).resolve()
    results = []
    for file in sorted(root.rglob("*.json")):
        try:
            info = _read(file)
        except CheckpointError as error:
            results.append(CaseResult(family=file.parent.name, case=file.stem, verdict="FAILS", problems=(str(error),)))
            continue
        if "model" in info and ("tensors" in info or (file.parent.name == "keys" and "state_dict" in info)):
            results.append(_check(root, file, info))
    return results


def failed(results: Sequence[CaseResult]) -> bool:
    """Whether a case fails, or none was found at all. A family that VARL does not have yet neither passes nor fails."""
    return not results or any(result.verdict == "FAILS" for result in results)


def format_table(results: Sequence[CaseResult]) -> str:
    """One line per case, with the reasons of a failure below it; the error is in units of the tolerance. Then one line for each family that
    VARL does not have."""
    checked = [r for r in results if r.verdict != "not supported yet"]
    lacking = Counter(r.family for r in results if r.verdict == "not supported yet")
    head = ("case", "compared", "worst", "error / tolerance", "verdict")
    rows = [
        (f"{r.family}/{r.case}", str(r.compared or "-"), r.worst or "-", f"{r.ratio:.3f}" if r.worst else "-", r.verdict) for r in checked
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    below = [[f"    {problem}" for problem in r.problems] for r in checked]
    table = [text for line, more in zip(lines[1:], below, strict=True) for text in (line, *more)]
    others = [f"{family}: not supported yet, {count} not checked; VARL has {', '.join(FAMILIES)}." for family, count in lacking.items()]
    none = "No case was found: one is CASE.json beside CASE.safetensors, or a list of a released file's names in a folder `keys`."
    return "\n".join([*([lines[0], *table] if checked else []), *others] or [none])


# ---- one case -------------------------------------------------------------------------------------------------------------------------


def _check(root: Path, file: Path, info: dict[str, Any]) -> CaseResult:
    name, case = str(info["model"]).split("-")[0], str(info.get("case", file.stem))
    if name not in FAMILIES:
        return CaseResult(family=name, case=case, verdict="not supported yet")
    try:
        with torch.no_grad():
            if "tensors" in info:
                return _compare(name, case, _load(root, file, info))
            FAMILIES[name].fit(info["state_dict"], str(file))
            return CaseResult(family=name, case=case, verdict="agrees", compared=len(info["state_dict"]))
    except Exception as error:  # whatever a file from outside may hold, the other cases are still checked
        return CaseResult(family=name, case=case, verdict="FAILS", problems=(f"{type(error).__name__}: {error}",))


def _compare(family: str, name: str, case: Case) -> CaseResult:
    want = {name: tensor for name, tensor in case.tensors.items() if name.startswith("out.")}
    tolerance = {entry["name"]: entry.get("tolerance") for entry in case.info["tensors"]}
    got = {f"out.{name}": tensor for name, tensor in FAMILIES[family].results(case).items()}
    unknown = [name for name in want if name not in got or tolerance.get(name) is None]
    problems = [f"no recipe for {name}" if name not in got else f"{name} has no tolerance" for name in unknown]
    problems += [f"{name} is listed and not stored" for name in tolerance if name.startswith("out.") and name not in want]
    ratios = {name: error_ratio(got[name], want[name], tolerance[name]) for name in want if name not in unknown}
    problems += [f"{name}: {_describe(got[name], want[name], ratio)}" for name, ratio in ratios.items() if not ratio <= 1]
    if not want:
        problems.append("it holds no results to compare with")
    worst = max(ratios, key=lambda name: ratios[name], default="")
    return CaseResult(
        family=family,
        case=name,
        verdict="FAILS" if problems else "agrees",
        compared=len(ratios),
        worst=worst,
        ratio=ratios.get(worst, 0.0),
        problems=tuple(problems),
    )


def error_ratio(got: Tensor, want: Tensor, tolerance: Mapping[str, Any]) -> float:
    """The largest error in units of its tolerance: |got - want| / (atol + rtol |want|), or / max_abs; exact is 0 or infinite. Another
    shape, and a number that is none, are infinitely wrong."""
    if got.shape != want.shape:
        return math.inf
    if tolerance.get("exact"):
        return 0.0 if bool((got == want).all()) else math.inf
    got, want = got.double(), want.double()
    allowed = (
        torch.full_like(want, tolerance["max_abs"]) if "max_abs" in tolerance else tolerance["atol"] + tolerance.get("rtol", 0) * want.abs()
    )
    ratio = torch.where(got == want, 0.0, (got - want).abs() / allowed)
    return float(ratio.nan_to_num(nan=math.inf, posinf=math.inf).max())


def _describe(got: Tensor, want: Tensor, ratio: float) -> str:
    if got.shape != want.shape:
        return f"has shape {list(got.shape)}, recorded is {list(want.shape)}"
    if not got.isfinite().all():
        return f"{int((~got.isfinite()).sum())} of {got.numel()} numbers are not finite"
    differ = int((got != want).sum())
    return f"error {ratio:.3g} x tolerance" if ratio < math.inf else f"{differ} of {got.numel()} numbers differ, and none may"


def _read(file: Path) -> dict[str, Any]:
    try:
        info = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}). Is the folder of cases whole?") from error
    return info if isinstance(info, dict) else {}


def _load(root: Path, file: Path, info: dict[str, Any]) -> Case:
    return Case(root=root, file=file, info=info, tensors=read_tensors(file.with_suffix(".safetensors")))


# ---- VAR ------------------------------------------------------------------------------------------------------------------------------


def _var(case: Case) -> dict[str, Tensor]:
    if "vocab_size" in case.config:
        return _var_tokenizer(case)
    if "vae" in case.config:
        return _var_transformer(case)
    raise ConfigError(f"{case.file}: config has neither vocab_size (a tokenizer) nor vae (a transformer).")


def _var_fit(shapes: Shapes, where: str) -> None:
    state = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        if "pos_1LC" not in shapes:
            fill_tokenizer(MultiScaleVQ(tokenizer_config(shapes, where), SCHEDULES[680]), state, where)
        elif shapes["pos_1LC"][1] not in SCHEDULES:
            raise CheckpointError(f"{where}: {shapes['pos_1LC'][1]} tokens are of no released schedule; those have {[*SCHEDULES]}.")
        else:
            config = transformer_config(shapes, SCHEDULES[shapes["pos_1LC"][1]], TokenizerConfig(), where)
            fill_transformer(NextScale(config), state, where)


def _var_grids(config: dict[str, Any]) -> tuple[Grid, ...]:
    return tuple((side, side) if isinstance(side, int) else (side[0], side[1]) for side in config["patch_nums"])


def _var_vq(case: Case, grids: Sequence[Grid]) -> MultiScaleVQ:
    config = case.config
    vq = MultiScaleVQ(
        TokenizerConfig(
            vocab=config["vocab_size"],
            channels=config["z_channels"],
            width=config["ch"],
            multipliers=tuple(config["ch_mult"]),
            blocks=config["num_res_blocks"],
            shared_phi=config["share_quant_resi"],
            phi_ratio=float(config["quant_resi"]),
        ),
        grids,
    ).eval()
    fill_tokenizer(vq, case.part("sd."), str(case.file))
    return vq


def _var_tokenizer(case: Case) -> dict[str, Tensor]:
    vq, given = _var_vq(case, _var_grids(case.config)), case.part("in.")
    results = {}
    if "image" in given:
        f = vq.features(given["image"])
        ids, sums, _ = vq.residual_codes(f)
        reconstruction, loss, _, _ = vq(given["image"])
        results |= {
            "f": f,
            "idx": ids,
            "fhat_scales": torch.stack(sums, 1),
            "var_input": vq.inputs(ids),
            "embed_to_fhat": vq.f_hat(ids),
            "reconstruction": vq.render(vq.f_hat(ids)).clamp(-1, 1),
            "forward_reconstruction": reconstruction,
            "forward_vq_loss": loss,
        }
    if "random_idx" in given:
        sums = vq.partial_sums([vq.quantize.embedding(part) for part in vq.split(given["random_idx"])])
        image = vq.render(sums[-1])
        results |= {
            "random_fhat": sums[-1],
            "random_image_unclamped": image,
            "random_image": image.clamp(-1, 1),
            "random_image_scales": torch.stack([vq.render(f_hat).clamp(-1, 1) for f_hat in sums], 1),
        }
    return results


def _var_transformer(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.part("in.")
    if config.get("norm_eps", 1e-6) != 1e-6:
        raise ConfigError(f"{case.file}: norm_eps={config['norm_eps']}; every released VAR has 1e-6, and so has ours.")
    owner = _tokenizer_case(case)
    vq = _var_vq(owner, _var_grids(config if "patch_nums" in config else owner.config))
    model = NextScale(
        NextScaleConfig(
            depth=config["depth"],
            width=config["embed_dim"],
            heads=config["num_heads"],
            grids=vq.grids,
            mlp_ratio=float(config.get("mlp_ratio", 4)),
            shared_adaln=config.get("shared_aln", False),
            attn_l2_norm=config.get("attn_l2_norm", True),
            num_classes=config["num_classes"],
            tokenizer=vq.config,
        )
    ).eval()
    fill_transformer(model, case.part("sd."), str(case.file))
    results = {}
    if "idx" in given:
        results |= _var_teacher_forced(model, vq, given["labels"], given["idx"])
    for cfg in config.get("cfgs", ()):
        results |= {f"greedy_cfg{cfg}_{name}": tensor for name, tensor in _var_greedy(model, vq, given["labels"], cfg).items()}
    for number, settings in enumerate(config.get("samples", ())):
        draws = case.draws(f"sample{number}")
        sampled = _var_sampled(model, vq, given["labels"], settings, draws)
        results |= {f"sample{number}_{name}": tensor for name, tensor in sampled.items()}
    if config.get("smooth") is not None:
        smooth = _var_smooth(model, vq, given["labels"], config["smooth"], case.draws("smooth"))
        results |= {f"smooth_{name}": tensor for name, tensor in smooth.items()}
    return results


def _tokenizer_case(case: Case) -> Case:
    """The case that holds the tokenizer's weights."""
    name = case.info["state_dict"].get("also_needs_weights_of") or case.config["vae"]
    places = [case.root / name, case.file.parent / name, case.file.parent / Path(name).name, case.root.parent / name]
    for place in places:
        file = place.with_name(f"{place.name}.json")
        if file.is_file():
            return _load(case.root, file, _read(file))
    raise CheckpointError(f"{case.file}: it needs the weights of {name}, which lie at none of {', '.join(map(str, places))}.")


def _var_teacher_forced(model: NextScale, vq: MultiScaleVQ, labels: Int[Tensor, " B"], ids: Int[Tensor, "B L"]) -> dict[str, Tensor]:
    hidden: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *call: hidden.append(call[-1])) for block in model.blocks]
    inputs, condition = vq.inputs(ids), model.condition(labels)
    logits = model.logits(model(condition, inputs), condition)
    for hook in hooks:
        hook.remove()
    none = model.condition(torch.full_like(labels, model.class_emb.num_embeddings - 1))
    chosen, _ = token_scores(token_law(logits, None, LawConfig(), 1.0), ids)
    return {
        "var_input": inputs,
        **{f"hidden{i}": h for i, h in enumerate(hidden)},
        "logits": logits,
        "logits_uncond": model.logits(model(none, inputs), none),
        "token_logprob": chosen,
        "loss": -chosen.mean(),
    }


Pick = Callable[[int, Float[Tensor, "B n V"]], tuple[Int[Tensor, "B n"], Float[Tensor, "B n C"]]]
"""From a scale and its guided logits to ids, and the code vectors to go on with."""


def _var_decode(
    model: NextScale, vq: MultiScaleVQ, labels: Int[Tensor, " B"], cfg: float, pick: Pick
) -> tuple[Int[Tensor, "B L"], Float[Tensor, "B L V"], Float[Tensor, "B C h w"]]:
    """Ids, guided logits and f_hat of a cached decode that draws as `pick` says."""
    batch, guidance = len(labels), var_guidance(cfg, len(vq.grids))
    none = torch.full_like(labels, model.class_emb.num_embeddings - 1)
    condition, cache = model.condition(torch.cat([labels, none])), model.cache(2 * batch)
    f_hat = torch.zeros(batch, vq.config.channels, *vq.grids[-1])
    ids, seen = [], []
    for scale in range(len(vq.grids)):
        inputs = vq.quantize.next_input(f_hat, scale).repeat(2, 1, 1) if scale else None
        both = model.logits(model.step(condition, inputs, scale, cache), condition)
        logits = guide(both[:batch], both[batch:], guidance[scale])
        chosen, codes = pick(scale, logits)
        f_hat = f_hat + vq.quantize.contribution(codes, scale)
        ids.append(chosen)
        seen.append(logits)
    return torch.cat(ids, 1), torch.cat(seen, 1), f_hat


def _picture(vq: MultiScaleVQ, f_hat: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
    return vq.render(f_hat).clamp(-1, 1).add(1).div(2)


def _var_greedy(model: NextScale, vq: MultiScaleVQ, labels: Int[Tensor, " B"], cfg: float) -> dict[str, Tensor]:
    """Ids and picture come from the policy itself, the logits and f_hat on the way from a decode of the same tokens."""
    law = LawConfig(cfg_scale=var_guidance(cfg, len(vq.grids)), top_k=1)
    policy = NextScalePolicy(model, vq, sample_law=law, score_law=law)
    rollout = policy.rollout([Prompt(label=label) for label in labels.tolist()], Stream(seed=0, rows=tuple(range(len(labels)))))
    parts = vq.split(rollout.actions)
    _, logits, f_hat = _var_decode(model, vq, labels, cfg, lambda scale, _: (parts[scale], vq.quantize.embedding(parts[scale])))
    return {
        "idx": rollout.actions,
        "logits": logits,
        "fhat": f_hat,
        "image_unclamped": vq.render(f_hat),
        "image": policy.decode(rollout),
    }


def _var_law(settings: Mapping[str, Any]) -> LawConfig:
    """VAR says 0 where top-p keeps all."""
    return LawConfig(top_k=settings["top_k"], top_p=float(settings["top_p"]) or 1.0)


def _exponential_draw(logp: Float[Tensor, "*B V"], exponential: Tensor) -> Int[Tensor, "*B"]:
    """argmax p / q with q ~ Exp(1), which is how torch.multinomial draws."""
    return (logp.exp() / exponential.view_as(logp)).argmax(-1)


def _var_sampled(
    model: NextScale, vq: MultiScaleVQ, labels: Int[Tensor, " B"], settings: Mapping[str, Any], draws: Iterator[Tensor]
) -> dict[str, Tensor]:
    law = _var_law(settings)

    def pick(scale: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids = _exponential_draw(token_law(logits, None, law, 1.0), next(draws))
        return ids, vq.quantize.embedding(ids)

    ids, _, f_hat = _var_decode(model, vq, labels, settings["cfg"], pick)
    return {"idx": ids, "image": _picture(vq, f_hat)}


def _var_smooth(
    model: NextScale, vq: MultiScaleVQ, labels: Int[Tensor, " B"], settings: Mapping[str, Any], draws: Iterator[Tensor]
) -> dict[str, Tensor]:
    """VAR's `more_smooth`: the decode goes on with Gumbel-softmax mixtures of codes, colder from scale to scale, over the filtered logits;
    the ids that it draws too are not used."""
    law, last, mixtures = _var_law(settings), max(len(vq.grids) - 1, 1), []

    def pick(scale: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        logp, ratio = token_law(logits, None, law, 1.0), scale / last
        ids = _exponential_draw(logp, next(draws))
        gumbel = -next(draws).log().view_as(logp)
        tau = max(0.27 * (1 - 0.95 * ratio), 0.005)
        mixtures.append(((logp * (1 + ratio) + gumbel) / tau).softmax(-1) @ vq.quantize.embedding.weight)
        return ids, mixtures[-1]

    ids, _, f_hat = _var_decode(model, vq, labels, settings["cfg"], pick)
    return {"idx": ids, "h": torch.cat(mixtures, 1), "image": _picture(vq, f_hat)}


# ---- LlamaGen -------------------------------------------------------------------------------------------------------------------------


def _llamagen(case: Case) -> dict[str, Tensor]:
    if "codebook_size" in case.config:
        return _llamagen_tokenizer(case)
    if "model_type" in case.config:
        return _llamagen_transformer(case)
    raise ConfigError(f"{case.file}: config has neither codebook_size (a tokenizer) nor model_type (a transformer).")


def _llamagen_fit(shapes: Shapes, where: str) -> None:
    """Names and shapes tell nothing of the pictures' size, so any will do."""
    state = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        if "tok_embeddings.weight" in shapes:
            config = llamagen.transformer_config(shapes, (16, 16), VQConfig(), where)
            llamagen.fill_transformer(Raster(config), state, where)
        else:
            llamagen.fill_tokenizer(VQ(llamagen.tokenizer_config(shapes, where)), state, where)


def _llamagen_tokenizer(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.part("in.")
    vq = VQ(
        VQConfig(
            vocab=config["codebook_size"],
            channels=config["codebook_embed_dim"],
            latent=config["z_channels"],
            width=config["ch"],
            multipliers=tuple(config["ch_mult"]),
            blocks=config["num_res_blocks"],
        )
    ).eval()
    llamagen.fill_tokenizer(vq, case.part("sd."), str(case.file))
    z = vq.features(given["image"])
    ids, grid = vq.encode(given["image"]), (z.shape[2], z.shape[3])
    quant, codes = vq.codes(ids, grid), vq.codes(given["codes"], grid)
    return {
        "encoder": vq.encoder(given["image"]),
        "z": z,
        "indices": ids.flatten(),
        "quant": quant,
        "decode_quant": vq.render(quant),
        "code_entry": codes,
        "decode_code": vq.render(codes),
    }


def _llamagen_transformer(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.part("in.")
    if config.get("norm_eps", 1e-5) != 1e-5 or config.get("rope_base", 10000) != 10000:
        raise ConfigError(f"{case.file}: norm_eps and rope_base are 1e-5 and 10000 in every released LlamaGen, and so in ours.")
    side, text = math.isqrt(config["block_size"]), config["model_type"] == "t2i"
    model = Raster(
        RasterConfig(
            depth=config["n_layer"],
            width=config["dim"],
            heads=config["n_head"],
            grid=(side, side),
            mlp_width=config["ffn_hidden"],
            num_classes=None if text else config["num_classes"],
            captions=CaptionConfig(tokens=config["cls_token_num"], width=config["caption_dim"]) if text else None,
            tokenizer=VQConfig(vocab=config["vocab_size"], channels=1, latent=1, width=1, multipliers=(1,), blocks=0, attention=False),
        )
    ).eval()
    llamagen.fill_transformer(model, case.part("sd."), str(case.file))
    results = {"freqs_cis": model.turns}
    if text:
        raw, lengths = given["caption_raw"], given["caption_mask_right"].sum(1).long().tolist()
        captions = {f"caption {i}": features[:length] for i, (features, length) in enumerate(zip(raw, lengths, strict=True))}
        features, there = pad_left(list(captions.values()))
        there = torch.ones(features.shape[:2], dtype=torch.bool) if there is None else there
        condition, masked = model.condition(features), model.condition(features, there)
        uncond = model.cls_embedding.uncond_embedding.expand(len(raw), -1, -1)  # type: ignore[union-attr]
        none, asked = model.condition(uncond), [Prompt(text=text) for text in captions]
        logits = _llamagen_logits(model, masked, given["idx"])
        results |= {
            "cond": features,
            "emb_masks": there.float(),
            "train_attn_mask": attention_mask(there, model.tokens),
            "logits_masked": logits,
            "loss_valid": -_llamagen_logp(model, logits, given["idx"])[:1].mean(),
        }
        policy = RasterPolicy(model, _no_tokenizer(model), captions=lambda texts: [captions[text] for text in texts])
        pair = (masked, Condition(tokens=none.tokens, there=there))
    else:
        condition = model.condition(given["labels"])
        none = model.condition(torch.full_like(given["labels"], config["num_classes"]))
        asked = [Prompt(label=label) for label in given["labels"].tolist()]
        policy, pair = RasterPolicy(model, _no_tokenizer(model)), (condition, none)
    hidden: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *call: hidden.append(call[-1])) for block in model.layers]
    logits = _llamagen_logits(model, condition, given["idx"])
    for hook in hooks:
        hook.remove()
    logp = _llamagen_logp(model, logits, given["idx"])
    return results | {
        "cond_embedding": condition.tokens,
        **{f"hidden{i}": h for i, h in enumerate(hidden)},
        "logits": logits,
        "token_logprob": logp,
        "loss": -logp.mean(),
        "logits_uncond": _llamagen_logits(model, none, given["idx"]),
        **_llamagen_generated(case, policy, asked, pair),
    }


def _no_tokenizer(model: Raster) -> VQ:
    return VQ(model.config.tokenizer)


def _llamagen_logits(model: Raster, condition: Condition, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B n V"]:
    """Of all positions, the condition's too."""
    last: list[Tensor] = []
    hook = model.layers[-1].register_forward_hook(lambda *call: last.append(call[-1]))
    model(condition, ids)
    hook.remove()
    return model.logits(last[0])


def _llamagen_logp(model: Raster, logits: Float[Tensor, "B n V"], ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    return token_scores(token_law(logits[:, -model.tokens :], None, LawConfig(), 1.0), ids)[0]


def _llamagen_generated(case: Case, policy: RasterPolicy, asked: Sequence[Prompt], pair: tuple[Condition, Condition]) -> dict[str, Tensor]:
    """Greedy ids come from the policy itself, the logits on the way from a decode of the same tokens; sampled ids from a decode that draws
    as recorded."""
    config, model, results = case.config, policy.module, {}

    def greedy(law: LawConfig) -> Int[Tensor, "B L"]:
        greedily = RasterPolicy(model, policy.tokenizer, captions=policy.captions, sample_law=law, score_law=law)
        return greedily.rollout(asked, Stream(seed=0, rows=tuple(range(len(asked))))).actions

    for cfg in config.get("cfgs", ()):
        ids = results[f"greedy_cfg{cfg}"] = greedy(LawConfig(cfg_scale=(cfg,), top_k=1))
        results[f"greedy_cfg{cfg}_logits"] = _llamagen_decode(model, pair, cfg, lambda step, _, ids=ids: ids[:, step])[1]
    if "interval" in config:  # guidance for the first token and the decode steps up to `until`
        cfg, until = config["interval"]
        scales = tuple(cfg if token <= until + 1 else 1.0 for token in range(model.tokens))
        results[f"greedy_cfg{cfg}_interval{until}"] = greedy(LawConfig(cfg_scale=scales, top_k=1))
    for number, settings in enumerate(config.get("samples", ())):
        law = LawConfig(temperature=settings["temperature"], top_k=settings["top_k"], top_p=settings["top_p"])
        draws = case.draws(f"sample{number}")

        def pick(step: int, logits: Tensor, law: LawConfig = law, draws: Iterator[Tensor] = draws) -> Tensor:
            return _exponential_draw(token_law(logits, None, law, 1.0), next(draws))

        results[f"sample{number}"] = _llamagen_decode(model, pair, settings["cfg_scale"], pick)[0]
    return results


def _llamagen_decode(
    model: Raster | Janus, pair: tuple[Condition, Condition], cfg: float, pick: Callable[[int, Float[Tensor, "B V"]], Int[Tensor, " B"]]
) -> tuple[Int[Tensor, "B L"], Float[Tensor, "B L V"]]:
    """Ids and guided logits of a cached decode that draws as `pick` says, from the condition and its "none"."""
    caches, ids, seen = [model.cache(condition, model.tokens) for condition in pair], [], []
    for step in range(model.tokens):
        both = [model.logits(model.step(condition, ids[-1] if ids else None, cache)) for condition, cache in zip(pair, caches, strict=True)]
        seen.append(guide(both[0][:, 0], both[1][:, 0], cfg))
        ids.append(pick(step, seen[-1]))
    return torch.stack(ids, 1), torch.stack(seen, 1)


# ---- Janus-Pro ------------------------------------------------------------------------------------------------------------------------

JANUS_NAMES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "gen_embed.": "model.generation_embeddings.",
    "gen_aligner.layers.0.": "model.generation_aligner.fc1.",
    "gen_aligner.layers.2.": "model.generation_aligner.hidden_layers.0.",
    "gen_head.output_mlp_projector.": "model.generation_head.proj_out.",
    "gen_head.vision_head.": "model.generation_head.vision_head.",
}
"""DeepSeek's beginnings of names, and those of `transformers`, for what draws pictures, and the head that draws words."""
JANUS_TOKENIZER, JANUS_SIGHT = "gen_vision_model.", ("vision_model.", "aligner.")


def _janus(case: Case) -> dict[str, Tensor]:
    if "codebook_size" in case.config:  # the same module as LlamaGen's
        return _llamagen_tokenizer(case)
    if "image_token_size" in case.config:
        return _janus_transformer(case)
    raise ConfigError(f"{case.file}: config has neither codebook_size (a tokenizer) nor image_token_size (a transformer).")


def _janus_fit(shapes: Shapes, where: str) -> None:
    """What understands pictures is left as `transformers` has it, so its names are not compared."""
    state = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items() if not name.startswith(JANUS_SIGHT)}
    tokenizer = {name.removeprefix(JANUS_TOKENIZER): tensor for name, tensor in state.items() if name.startswith(JANUS_TOKENIZER)}
    drawing = {name: tensor for name, tensor in state.items() if not name.startswith(JANUS_TOKENIZER)}
    read, made, hidden = "gen_embed.weight", "gen_head.vision_head.weight", "language_model.model.layers.0.mlp.gate_proj.weight"
    words = "language_model.model.embed_tokens.weight"
    expect(shapes, (read, made, hidden, words), "a Janus-Pro", where)
    with torch.device("meta"):
        config = llamagen.tokenizer_config({name: tuple(tensor.shape) for name, tensor in tokenizer.items()}, where)
        llamagen.fill_tokenizer(VQ(config), tokenizer, where)
        whole = _janus_whole(
            vocab=shapes[words][0],
            hidden=shapes[words][1],
            inter=shapes[hidden][0],
            layers=count(shapes, r"language_model\.model\.layers\.(\d+)\."),
            heads=shapes[words][1] // 128,  # as released; no weight tells
            codes=shapes[made][0],
            code_width=shapes[read][1],
            head=shapes[made][1],
            side=24,
        )
        _janus_fill(whole, drawing, where)


def _janus_whole(
    *, vocab: int, hidden: int, inter: int, layers: int, heads: int, codes: int, code_width: int, head: int, side: int, theta: float = 1e4
) -> Any:
    """A `JanusForConditionalGeneration` that draws pictures of side x side tokens through a head of inner width `head`; its eyes and its
    tokenizer are as small as can be."""
    package = transformers()
    text = package.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    sight = package.JanusVisionConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16 * side, projection_dim=hidden
    )
    tokenizer = package.JanusVQVAEConfig(
        embed_dim=code_width,
        num_embeddings=codes,
        latent_channels=4,
        base_channels=32,
        channel_multiplier=[1],
        num_res_blocks=1,
        projection_dim=hidden,
        image_token_embed_dim=hidden,
    )
    config = package.JanusConfig(text_config=text, vision_config=sight, vq_config=tokenizer, tie_word_embeddings=False)
    whole = package.JanusForConditionalGeneration(config)
    tokenizer.projection_dim = head
    whole.model.generation_head = type(whole.model.generation_head)(tokenizer)
    return whole.eval()


def _janus_fill(whole: Any, state: Mapping[str, Tensor], where: str) -> None:
    """What draws pictures, and the head that draws words, from a state dict under DeepSeek's names."""
    named = {}
    for theirs, tensor in state.items():
        start = next((start for start in JANUS_NAMES if theirs.startswith(start)), "")
        named[JANUS_NAMES.get(start, "") + theirs.removeprefix(start)] = tensor
    own = {name: tensor for name, tensor in whole.state_dict().items() if name.startswith(tuple(JANUS_NAMES.values()))}
    require_fit(shapes_of(named), shapes_of(own), type(whole).__name__, where)
    whole.load_state_dict(named, strict=False)


def _janus_transformer(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.part("in.")
    if config.get("rms_norm_eps", 1e-6) != 1e-6 or config["kv_heads"] != config["heads"]:
        raise ConfigError(f"{case.file}: rms_norm_eps is 1e-6 and kv_heads are heads in every released Janus-Pro.")
    whole = _janus_whole(
        vocab=config["vocab"],
        hidden=config["hidden"],
        inter=config["inter"],
        layers=config["layers"],
        heads=config["heads"],
        codes=config["image_token_size"],
        code_width=config["n_embed"],
        head=config["image_token_embed"],
        side=math.isqrt(config["n_tokens"]),
        theta=config["theta"],
    )
    _janus_fill(whole, case.part("sd."), str(case.file))
    prompt, copies = given["prompt"], config["parallel"]
    no_tokenizer = VQConfig(vocab=config["image_token_size"], channels=1, latent=1, width=1, multipliers=(1,), blocks=0, attention=False)
    marks = {"bos": int(prompt[0]), "boi": int(prompt[-1]), "pad": config["pad_id"]}
    model = Janus(whole, None, janus.config_of(whole.config, no_tokenizer, **marks)).eval()
    both = torch.stack([prompt, model.none(len(prompt))]).repeat(copies, 1)
    condition = model.condition(both)
    pair = condition.rows(slice(0, None, 2)), condition.rows(slice(1, None, 2))
    forced = model(condition, given["forced"].repeat_interleave(2, 0))
    results = {
        "gen_embeds": model.embed(given["image_ids"]),
        "gen_logits": model.logits(given["hidden"]),
        "tokens": both,
        "prefill_hidden": model.language_model(inputs_embeds=condition.tokens, use_cache=False).last_hidden_state,
        "forced_logits": model.logits(forced),
    }
    for cfg in config["greedy"]:
        law = LawConfig(cfg_scale=(cfg,), top_k=1)
        policy = RasterPolicy(model, VQ(no_tokenizer), captions=lambda texts: [prompt for _ in texts], sample_law=law, score_law=law)
        ids = policy.rollout([Prompt(text="prompt")] * copies, Stream(seed=0, rows=tuple(range(copies)))).actions
        results[f"greedy_cfg{cfg}"] = ids
        results[f"greedy_cfg{cfg}_logits"] = _llamagen_decode(model, pair, cfg, lambda step, _, ids=ids: ids[:, step])[1]
    for number, settings in enumerate(config["samples"]):
        law, draws = LawConfig(temperature=settings["temperature"]), case.draws(f"sample{number}")

        def pick(step: int, logits: Tensor, law: LawConfig = law, draws: Iterator[Tensor] = draws) -> Tensor:
            return _exponential_draw(token_law(logits, None, law, 1.0), next(draws))

        results[f"sample{number}"] = _llamagen_decode(model, pair, settings["cfg"], pick)[0]
    return results


# ---- MAR ------------------------------------------------------------------------------------------------------------------------------


def _mar(case: Case) -> dict[str, Tensor]:
    if "embed_dim" in case.config:
        return _mar_tokenizer(case)
    if "enc" in case.config:
        return _mar_transformer(case)
    raise ConfigError(f"{case.file}: config has neither embed_dim (an autoencoder) nor enc (a transformer).")


def _mar_fit(shapes: Shapes, where: str) -> None:
    state = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        if "z_proj.weight" in shapes:
            strict_load(MAR(mar.transformer_config(shapes, KLConfig(), where)), state, where)
        else:
            mar.fill_tokenizer(KL(mar.tokenizer_config(shapes, where)), state, where)


def _mar_tokenizer(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.part("in.")
    sizes = KLConfig(
        channels=config["embed_dim"], width=config["ch"], multipliers=tuple(config["ch_mult"]), blocks=config["num_res_blocks"]
    )
    kl = KL(sizes).eval()
    mar.fill_tokenizer(kl, case.part("sd."), str(case.file))
    posterior = kl.encode(given["image"])
    return {
        "moments": kl.quant_conv(kl.encoder(given["image"])),
        "mean": posterior.mean,
        "logvar": posterior.log_variance,
        "sample": posterior.draw(next(case.draws("sample"))),
        "kl": posterior.kl(),
        "decode": kl.decode(given["z"]),
    }


def _mar_transformer(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.part("in.")
    if config["patch_size"] != 1:
        raise ConfigError(f"{case.file}: patch_size={config['patch_size']}; every released MAR has 1, and so has ours.")
    side = config["img_size"] // config["vae_stride"]
    encoder, decoder = (ViTConfig(width=width, depth=depth, heads=heads) for width, depth, heads in (config["enc"], config["dec"]))
    model = MAR(
        MARConfig(
            encoder=encoder,
            decoder=decoder,
            head=DiffusionHeadConfig(depth=config["diffloss_d"], width=config["diffloss_w"]),
            grid=(side, side),
            num_classes=config["class_num"],
            buffer=config["buffer_size"],
            tokenizer=KLConfig(channels=config["vae_embed_dim"], width=1, multipliers=(1,), blocks=0, attention=False, scale=1.0),
        )
    ).eval()
    strict_load(model, case.part("sd."), str(case.file))
    kl, full = KL(model.config.tokenizer), respaced(range(STEPS))
    tokens, missing = kl.tokens(given["latent"]), masked(given["orders"], config["n_mask"])
    seen, nothing = known(missing), torch.full_like(given["labels"], config["class_num"])
    condition = model.condition(given["labels"])
    z = model(condition, tokens, seen)
    results = {
        "tokens": tokens,
        "unpatchified": kl.maps(tokens, model.config.grid),
        "mask": missing.float(),
        "encoder": model.encode(condition, tokens, seen),
        "decoder": z,
        "decoder_uncond": model(model.condition(nothing), tokens, seen),
        "decoder_allmasked": model(condition, torch.zeros_like(tokens), seen[:, :0]),
        "time_embedding": sinusoid(given["t"]),
        "net": model.head(given["x_t"], given["t"], given["cond"]),
        "net_cfg": _mar_output(model, given["x_t"], given["t"], given["cond"], 2.5),
        **_mar_tables("train_diffusion", full),
        **_mar_tables("gen_diffusion", _mar_process(config["num_sampling_steps"])),
        **_mar_losses(case, model, full, z, tokens, missing),
        **_mar_steps(case, model),
    }
    for number, settings in enumerate(config["runs"]):
        generated = _mar_generated(model, given["labels"], settings, config["num_sampling_steps"], case.draws(f"gen{number}"))
        results |= {f"gen{number}{name}": tensor for name, tensor in generated.items()}
    return results


def _mar_process(steps: str) -> Process:
    """MAR says "ddimN" for N steps at an equal stride from 0."""
    return respaced(range(0, STEPS, STEPS // int(steps[4:])) if steps.startswith("ddim") else evenly(int(steps)))


def _mar_tables(name: str, process: Process) -> dict[str, Tensor]:
    return {
        f"{name}_timestep_map": process.timesteps,
        f"{name}_betas": process.betas,
        f"{name}_alphas_cumprod": process.signal.square(),
        f"{name}_posterior_log_variance_clipped": process.log_variances,
        f"{name}_posterior_mean_coef1": process.mean_of_start,
        f"{name}_posterior_mean_coef2": process.mean_of_x,
        f"{name}_sqrt_recip_alphas_cumprod": process.start_of_x,
        f"{name}_sqrt_recipm1_alphas_cumprod": process.start_of_eps,
    }


def _mar_output(
    model: MAR, x: Float[Tensor, "n C"], timesteps: Int[Tensor, " n"], z: Float[Tensor, "n D"], cfg: float
) -> Float[Tensor, "n out"]:
    """Of the network; guided unless cfg is 1. Then the second half of z stands for no class, the second half of x is not read, and both
    halves have the guided eps."""
    if cfg == 1.0:
        return model.head(x, timesteps, z)
    cond, uncond = model.head(x[: len(x) // 2].repeat(2, 1), timesteps, z).chunk(2)
    both = guided(cond, uncond, cfg)
    return torch.cat([both, torch.cat([both.chunk(2, 1)[0], uncond.chunk(2, 1)[1]], 1)])


def _mar_losses(
    case: Case, model: MAR, full: Process, z: Float[Tensor, "B L D"], tokens: Float[Tensor, "B L C"], missing: Bool[Tensor, "B L"]
) -> dict[str, Tensor]:
    given, repeat, draws = case.part("in."), case.config["batch_mul"], case.draws("forward_loss")

    def losses(x_0: Tensor, t: Tensor, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        x_t = noised(full, x_0, noise, t)
        out = model.head(x_t, t, z)
        return noise_loss(out, noise), variance_loss(full, out, x_0, x_t, t)

    mse, vb = losses(given["x_0"], given["t_loss"], given["cond"], given["noise"])
    t, noise = next(draws), next(draws)
    again, bound = losses(tokens.repeat(repeat, 1, 1).flatten(0, 1), t, z.repeat(repeat, 1, 1).flatten(0, 1), noise)
    weight = missing.repeat(repeat, 1).flatten().float()
    return {
        "q_sample": noised(full, given["x_0"], given["noise"], given["t_loss"]),
        "loss_terms_mse": mse,
        "loss_terms_vb": vb,
        "loss_terms_loss": mse + vb,
        "forward_loss": ((again + bound) * weight).sum() / weight.sum(),
    }


def _mar_steps(case: Case, model: MAR) -> dict[str, Tensor]:
    """Each step by itself, and whole chains."""
    config, given, results = case.config, case.part("in."), {}
    for steps in (config["num_sampling_steps"], *config["other_steps"]):
        process, name = _mar_process(steps), f"steps{steps}"
        every = torch.arange(len(process))[:, None].expand(-1, len(given["x_t"]))
        x, z = (given[part].expand(len(process), -1, -1) for part in ("x_t", "cond"))
        mean, log_variance = reverse_step(process, model.head(x, process.timesteps[every], z), x, every)
        scale = mean.abs().amax((1, 2))
        results |= {**_mar_tables(name, process), f"{name}_mean": mean / scale[:, None, None], f"{name}_mean_scale": scale}
        results |= {f"{name}_logvar": log_variance}
    process, z = _mar_process(config["num_sampling_steps"]), given["cond"]
    plain, _, _ = _mar_chain(model, process, z, case.draws("loop"))
    both, _, _ = _mar_chain(model, process, z, case.draws("loop_cfg"), cfg=3.0, temperature=0.9)
    path, density, std = _mar_chain(model, process, z, case.draws("logp"), temperature=0.8)
    long, _, _ = _mar_chain(model, _mar_process("100"), z, case.draws("loop100"))
    return results | {
        "loop": plain[-1],
        "loop_trajectory": plain,
        "loop_cfg": both[-1],
        "loop_cfg_trajectory": both,
        "logp_prev": path,
        "logp_logprob": density,
        "logp_std": std,
        "loop100": long[-1],
    }


def _mar_chain(
    model: MAR, process: Process, z: Float[Tensor, "n D"], draws: Iterator[Tensor], cfg: float = 1.0, temperature: float = 1.0
) -> tuple[Float[Tensor, "N n C"], Float[Tensor, "N n C"], Float[Tensor, "N n C"]]:
    """x after every step, its log-density and standard deviation, from the last step to the first. Guided, both halves go on from the same
    beginning, each with noise of its own, as the authors' do. At the first step noise is drawn, and not added."""
    x = next(draws)
    x = x if cfg == 1.0 else x.repeat(2, 1)
    path, density, std = [], [], []
    for index in reversed(range(len(process))):
        t = torch.full((len(x),), index)
        mean, log_variance = reverse_step(process, _mar_output(model, x, process.timesteps[t], z, cfg), x, t)
        noise = next(draws)
        x = drawn(mean, log_variance, noise, temperature) if index else mean
        path.append(x)
        density.append(log_density(x, mean, log_variance, temperature))
        std.append(temperature * (0.5 * log_variance).exp())
    return torch.stack(path), torch.stack(density), torch.stack(std)


def _mar_generated(
    model: MAR, labels: Int[Tensor, " B"], settings: Mapping[str, Any], denoising: str, draws: Iterator[Tensor]
) -> dict[str, Tensor]:
    """Token sets along recorded orders; of the two halves of a guided chain, the first is the picture's."""
    count, steps, process = model.tokens, settings["num_iter"], _mar_process(denoising)
    ramp = mar_guidance(settings["cfg"], count, steps)
    scales = ramp if settings["cfg_schedule"] == "linear" else (settings["cfg"],) * steps
    order = torch.stack([next(draws) for _ in labels])
    condition = model.condition(labels)
    nothing = model.condition(torch.full_like(labels, model.config.num_classes))
    tokens = torch.zeros(len(labels), count, model.config.tokenizer.channels)
    missing, masks, latents = masked(order, count), [], []
    for cfg, left in zip(scales, mar_schedule(count, steps), strict=True):
        masks.append(missing.float())
        seen, after = known(missing), masked(order, left)
        latents.append(model(condition, tokens, seen))
        now = missing & ~after
        z = latents[-1][now]
        if settings["cfg"] != 1.0:
            z = torch.cat([z, model(nothing, tokens, seen)[now]])
        path, _, _ = _mar_chain(model, process, z, draws, cfg, settings["temperature"])
        tokens[now] = path[-1][: int(now.sum())]
        missing = after
    kl = KL(model.config.tokenizer)
    return {
        "": kl.maps(tokens, model.config.grid),
        "_masks": torch.stack(masks),
        "_z": torch.stack(latents),
        "_cfg": torch.tensor(scales),
    }


FAMILIES: dict[str, Family] = {
    "var": Family(results=_var, fit=_var_fit),
    "llamagen": Family(results=_llamagen, fit=_llamagen_fit),
    "janus": Family(results=_janus, fit=_janus_fit),
    "mar": Family(results=_mar, fit=_mar_fit),
}
"""The families that can be checked, by the JSON's `model`, of which a key list's begins so."""
