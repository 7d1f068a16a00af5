"""What a run will cost and what stands in its way, before any weight is loaded: the model is built without memory, on torch's meta device,
and asked what one picture costs."""

from dataclasses import replace

import torch

from varl.algorithms.var_rl import VARRL
from varl.build import build_algorithm, caption_encoder, captions_of, demand_texts, new_policy, trains_head
from varl.config import ClassifierConfig, FolderConfig, MARConfig, PicturesConfig, PretrainConfig, RunConfig, UnmaskingConfig, WordsConfig
from varl.models.classifier import Classifier
from varl.models.lora import adapters, with_adapters
from varl.plan.cost import (
    classifier_memory,
    classifier_updates,
    device_memory,
    device_of,
    held,
    learned,
    matmul_speed,
    pretraining_memory,
    pretraining_updates,
    run_memory,
    run_updates,
    weights_of,
)
from varl.plan.denoising import (
    check,
    denoising_memory,
    denoising_updates,
    masked_pretraining_memory,
    masked_pretraining_updates,
)
from varl.plan.families import AnyFamily, MaskedFamily, family_of, family_of_pair
from varl.plan.missing import (
    attempt,
    check_objects,
    check_prompts,
    check_regions,
    check_size,
    config_of,
    data_of,
    doubts,
    judge_of,
    pair_of,
)
from varl.plan.words import Plan, format_plan, in_bytes
from varl.policies.masked import MaskedPolicy

__all__ = ["Plan", "device_of", "format_plan", "plan"]

PRETRAINING_ADVICE = "lower batch or tokenizer_batch."


def plan(config: RunConfig | PretrainConfig, *, calibrate: bool = True) -> Plan:
    """The plan of a run. `calibrate` measures the speed of a matrix product for 0.2 s, to say how long it takes at least.

        memory = weights 4N + gradients 4T + optimizer (AdamW 8T, Muon 4 per weight of a matrix inside blocks) + tokenizer 4N'
               + reference 4T (none beside adapters) + moving average 4T                             where there are any
               + rollout   key-value cache 2 x depth x width x L x rows x (4, bf16 2), rows doubled by guidance; of VA-pi
                           4 copies of a chunk of logits instead
               + training  what autograd saves in one micro-batch (counted; half in bf16), and 3 copies of a chunk of logits

    N parameters, T of them trained, L tokens of a picture; bytes. Rows that share a forward pass, as VA-pi's do, count once. Of rollout and
    training only the larger where a step is one chunk: else the next chunk is drawn while one is trained on. Operations are counted by
    torch on the meta device, a training pass as 3 forward passes, or beside adapters as 2; where blocks are computed again as one more,
    and what autograd saves is then what lies outside the blocks, their inputs, and a block's share of the rest."""
    if isinstance(config, PretrainConfig):
        return _of_pretraining(config, calibrate)
    return _of_run(config, calibrate)


def _of_run(config: RunConfig, calibrate: bool) -> Plan:
    problems: list[str] = []
    warnings: list[str] = []
    device = attempt(problems, device_of, config.train.device) or torch.device("cpu")
    pair = attempt(problems, pair_of, config.model)
    data = data_of(problems, config.data, "rl")
    check_regions(problems, data.prompts, config.asked)
    for place, reward in config.asked.items():
        attempt(problems, demand_texts, place, reward, data.prompts)
    check_objects(problems, data.prompts, config.asked)
    rewards = [attempt(problems, judge_of, place.removeprefix("rewards."), reward, data.pictures) for place, reward in config.asked.items()]
    if config.eval.every and isinstance(config.data, FolderConfig | PicturesConfig) and not config.data.heldout:
        problems.append(f"eval.every={config.eval.every}, but the data holds no prompts for evaluation. Set data.heldout, or eval.every=0.")
    if config.eval.every and data.heldout is not None and config.eval.samples > data.heldout:
        again = "some come more than once" if isinstance(config.data, WordsConfig) else "there are no more samples"
        warnings.append(f"eval.samples={config.eval.samples}, but there are {data.heldout} held-out prompts or words: {again}.")
    said = tuple(line for line in rewards if line)
    if pair is None:
        return Plan(problems=tuple(problems), warnings=tuple(warnings), rewards=said)
    model_config = pair[0].config
    reads = attempt(problems, captions_of, pair[0]) or (lambda texts: [])  # nothing is read here
    policy = attempt(
        problems,
        new_policy,
        pair,
        sample_law=config.sample_law,
        score_law=config.score_law,
        unmasking=config.unmasking,
        captions=reads,
    )
    if isinstance(policy, MaskedPolicy):
        policy.train_head(trains_head(config))
    if policy is not None and config.train.lora is not None:
        attempt(problems, with_adapters, policy.module, config.train.lora)
    check_prompts(problems, data.prompts, model_config)
    algorithm = None if policy is None else attempt(problems, build_algorithm, config.algorithm, policy, data.pictures)
    m = attempt(problems, algorithm.middle, policy.layout) if policy and isinstance(algorithm, VARRL) else None
    if isinstance(config.data, WordsConfig) and config.data.image_size != model_config.image_size:
        warnings.append(
            f"data.image_size={config.data.image_size}, but the model draws {model_config.image_size}: "
            "boxes are laid out for another shape."
        )
    else:
        check_size(problems, config.data, model_config)
    again = config.train.gradient_checkpointing
    family = attempt(problems, family_of_pair, pair, config.unmasking, head_learns=trains_head(config), again=again)
    if family is None or algorithm is None or (isinstance(algorithm, VARRL) and m is None):
        return Plan(problems=tuple(problems), warnings=tuple(warnings), rewards=said, layout=None if family is None else family.layout)
    if isinstance(family, MaskedFamily):
        known = len(problems)
        attempt(problems, check, config, family)
        if len(problems) > known:
            return Plan(problems=tuple(problems), warnings=tuple(warnings), rewards=said, layout=family.layout)
        updates, memory, width = denoising_updates(config, family), denoising_memory(config, family), family.width
    else:
        updates, memory, width = run_updates(config, family, m), run_memory(config, family, m), family.model.config.width
    plan = Plan(
        problems=tuple(problems),
        warnings=(*warnings, *doubts(config, updates, family.layout.steps)),
        rewards=said,
        layout=family.layout,
        middle_step=m,
        prefix_tokens=0 if m is None or isinstance(family, MaskedFamily) else family.tokens(m),
        parameters=_parameters(family),
        memory=memory,
        available=device_memory(device),
        updates=updates,
    )
    return _finished(plan, device, config.train.dtype, width, calibrate, _smaller(config))


def _smaller(config: RunConfig) -> str:
    """What is left to do about a run that is too large."""
    train = config.train
    ways = [
        "lower train.rollouts_per_backward or train.rollouts_per_draw",
        *([] if train.gradient_checkpointing else ["set train.gradient_checkpointing=true"]),
        *([] if train.lora else ["train adapters (train.lora.r=32)"]),
    ]
    return f"{', or '.join(ways)}."


def _of_pretraining(config: PretrainConfig, calibrate: bool) -> Plan:
    problems: list[str] = []
    device = attempt(problems, device_of, config.device) or torch.device("cpu")
    if config.init is not None:
        found = attempt(problems, config_of, config.init)
        if found not in (None, config.model):
            problems.append(f"init={config.init!r} holds a model of another config than `model`. Copy `model` from its config.yaml.")
    check_prompts(problems, data_of(problems, config.data, "pretrain").prompts, config.model)
    check_size(problems, config.data, config.model)
    if config.captions is not None:
        attempt(problems, caption_encoder, config.captions, device)
    if isinstance(config.model, ClassifierConfig):
        with torch.device("meta"):
            classifier = Classifier(config.model)
        plan = Plan(
            problems=tuple(problems),
            parameters={"classifier": weights_of(classifier)},
            memory=classifier_memory(config, classifier),
            available=device_memory(device),
            updates=classifier_updates(config, classifier),
        )
        return _finished(plan, device, config.dtype, max(config.model.widths), calibrate, PRETRAINING_ADVICE)
    family = family_of(config.model, UnmaskingConfig(steps=1, denoise_steps=1) if isinstance(config.model, MARConfig) else None)
    if isinstance(family, MaskedFamily):
        updates, memory, width = masked_pretraining_updates(config, family), masked_pretraining_memory(config, family), family.width
    else:
        updates, memory, width = pretraining_updates(config, family), pretraining_memory(config, family), family.model.config.width
    plan = Plan(
        problems=tuple(problems),
        layout=family.layout,
        parameters=_parameters(family),
        memory=memory,
        available=device_memory(device),
        updates=updates,
    )
    return _finished(plan, device, config.dtype, width, calibrate, PRETRAINING_ADVICE)


def _parameters(family: AnyFamily) -> dict[str, int]:
    added = learned(family.model) if adapters(family.model) else 0
    transformer = {"transformer": weights_of(family.model) - added, "adapters": added}
    return held(transformer | {"tokenizer": weights_of(family.tokenizer)})


def _finished(plan: Plan, device: torch.device, dtype: str, width: int, calibrate: bool, advice: str) -> Plan:
    """`plan` with its time, and the warning that it does not fit, with what to do about it."""
    seconds, warnings = None, plan.warnings
    if calibrate:
        speed = matmul_speed(device, torch.bfloat16 if dtype == "bfloat16" else torch.float32, width)
        seconds = plan.total(lambda update: sum(update.flops.values())) / speed
    needed = sum(plan.memory.values())
    if needed > plan.available:
        warnings = (
            *warnings,
            f"about {in_bytes(needed)} would be held, and the {device.type} has {in_bytes(plan.available)}: {advice}",
        )
    return replace(plan, seconds=seconds, warnings=warnings)
