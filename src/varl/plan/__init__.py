"""What a run will cost and what stands in its way, before any weight is loaded: the model is built without memory, on torch's meta device,
and asked what one picture costs."""

from dataclasses import replace

import torch

from varl.algorithms.var_rl import VARRL
from varl.build import build_algorithm
from varl.config import FolderConfig, PretrainConfig, RunConfig, WordsConfig
from varl.plan.cost import (
    device_memory,
    device_of,
    matmul_speed,
    pretraining_memory,
    pretraining_updates,
    run_memory,
    run_updates,
    weights_of,
    without_memory,
)
from varl.plan.missing import attempt, check_prompts, check_regions, config_of, doubts, judge_of, prompts_of
from varl.plan.words import Plan, format_plan, in_bytes
from varl.policies.next_scale import NextScalePolicy

__all__ = ["Plan", "device_of", "format_plan", "plan"]


def plan(config: RunConfig | PretrainConfig, *, calibrate: bool = True) -> Plan:
    """The plan of a run. `calibrate` measures the speed of a matrix product for 0.2 s, to say how long it takes at least.

        memory = weights 4N + gradients 4N + optimizer (AdamW 8N, Muon 4 per weight of a matrix inside blocks) + tokenizer 4N'
               + reference 4N + moving average 4N                                                    where there are any
               + rollout   key-value cache 2 x depth x width x L x rows x (4, bf16 2), rows doubled by guidance
               + training  what autograd saves in one micro-batch (counted; half in bf16), and 3 copies of a chunk of logits

    N parameters, L tokens of a picture; bytes. Of rollout and training only the larger where a step is one chunk: else the next chunk is
    drawn while one is trained on. Operations are counted by torch on the meta device, a training pass as 3 forward passes."""
    if isinstance(config, PretrainConfig):
        return _of_pretraining(config, calibrate)
    return _of_run(config, calibrate)


def _of_run(config: RunConfig, calibrate: bool) -> Plan:
    problems: list[str] = []
    warnings: list[str] = []
    device = attempt(problems, device_of, config.train.device) or torch.device("cpu")
    model_config = attempt(problems, config_of, config.model)
    prompts, heldout = prompts_of(problems, config.data, "rl")
    check_regions(problems, prompts, config.rewards)
    rewards = [attempt(problems, judge_of, name, part.reward) for name, part in config.rewards.items()]
    if config.eval.every and isinstance(config.data, FolderConfig) and not config.data.heldout:
        problems.append(f"eval.every={config.eval.every}, but the data holds no prompts for evaluation. Set data.heldout, or eval.every=0.")
    if config.eval.every and heldout is not None and config.eval.samples > heldout:
        warnings.append(f"eval.samples={config.eval.samples}, but there are {heldout} held-out prompts or words: some come more than once.")
    said = tuple(line for line in rewards if line)
    if model_config is None:
        return Plan(problems=tuple(problems), warnings=tuple(warnings), rewards=said)
    model, tokenizer = without_memory(model_config)
    policy = attempt(problems, NextScalePolicy, model, tokenizer, sample_law=config.sample_law, score_law=config.score_law)
    check_prompts(problems, prompts, model_config)
    algorithm = None if policy is None else attempt(problems, build_algorithm, config.algorithm, policy)
    m = attempt(problems, algorithm.middle, policy.layout) if policy and isinstance(algorithm, VARRL) else None
    if isinstance(config.data, WordsConfig) and config.data.image_size != model_config.image_size:
        warnings.append(
            f"data.image_size={config.data.image_size}, but the model draws {model_config.image_size}: "
            "boxes are laid out for another shape."
        )
    if algorithm is None or (isinstance(algorithm, VARRL) and m is None):
        return Plan(problems=tuple(problems), warnings=tuple(warnings), rewards=said, grids=model_config.grids)
    updates = run_updates(config, model, tokenizer, m)
    plan = Plan(
        problems=tuple(problems),
        warnings=(*warnings, *doubts(config, updates)),
        rewards=said,
        grids=model_config.grids,
        middle_step=m,
        parameters={"transformer": weights_of(model), "tokenizer": weights_of(tokenizer)},
        memory=run_memory(config, model, tokenizer, m),
        available=device_memory(device),
        updates=updates,
    )
    return _finished(plan, device, config.train.dtype, model_config.width, calibrate)


def _of_pretraining(config: PretrainConfig, calibrate: bool) -> Plan:
    problems: list[str] = []
    device = attempt(problems, device_of, config.device) or torch.device("cpu")
    if config.init is not None:
        found = attempt(problems, config_of, config.init)
        if found not in (None, config.model):
            problems.append(f"init={config.init!r} holds a model of another config than `model`. Copy `model` from its config.yaml.")
    check_prompts(problems, prompts_of(problems, config.data, "pretrain")[0], config.model)
    if isinstance(config.data, WordsConfig) and config.data.image_size != config.model.image_size:
        problems.append(
            f"data.image_size={config.data.image_size}, but the model's grids and stride make "
            f"{config.model.image_size} pixels. Make them equal."
        )
    model, tokenizer = without_memory(config.model)
    plan = Plan(
        problems=tuple(problems),
        grids=config.model.grids,
        parameters={"transformer": weights_of(model), "tokenizer": weights_of(tokenizer)},
        memory=pretraining_memory(config, model, tokenizer),
        available=device_memory(device),
        updates=pretraining_updates(config, model, tokenizer),
    )
    return _finished(plan, device, config.dtype, config.model.width, calibrate)


def _finished(plan: Plan, device: torch.device, dtype: str, width: int, calibrate: bool) -> Plan:
    """`plan` with its time, and the warning that it does not fit."""
    seconds, warnings = None, plan.warnings
    if calibrate:
        speed = matmul_speed(device, torch.bfloat16 if dtype == "bfloat16" else torch.float32, width)
        seconds = plan.total(lambda update: sum(update.flops.values())) / speed
    held = sum(plan.memory.values())
    if held > plan.available:
        warnings = (
            *warnings,
            f"about {in_bytes(held)} would be held, and the {device.type} has {in_bytes(plan.available)}: lower rollouts_per_backward and "
            "rollouts_per_chunk.",
        )
    return replace(plan, seconds=seconds, warnings=warnings)
