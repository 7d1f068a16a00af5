"""Detectors and models that answer, against transformers' own reading of their outputs; and the rewards that look for objects."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, BertTokenizer

from tiny_objects import (
    CLASSES,
    WORDS,
    save_blip,
    save_detr,
    save_git,
    save_grounding_dino,
    save_mask2former,
    save_rt_detr,
)
from tiny_vision import save_clip
from varl.build import build_reward
from varl.checkpoints.objects import load_answerer, load_detector, scaling_of
from varl.config import GenEvalConfig, GroundingDINOConfig, PicturesConfig, RunConfig, VQAConfig, WeightedReward
from varl.errors import CheckpointError, ConfigError, RewardError
from varl.models.detection import Detection, Detector, vocabulary
from varl.models.vision import scale
from varl.plan.missing import check_objects, judge_of
from varl.plan.rewards import try_rewards
from varl.rewards.geneval import GenEval, conditions, graded, shares
from varl.rewards.grounding_dino import GroundingDINO, iou, object_shares, placed, thinned
from varl.rewards.judge import judge_now
from varl.rewards.served import prompt_of
from varl.rewards.vqa import VQA, question
from varl.types import Prompt, Wanted

NOISE = torch.Generator().manual_seed(0)
BYTES = (F.interpolate(torch.rand(3, 3, 6, 8, generator=NOISE), (48, 64)) * 255).round().to(torch.uint8)
IMAGES = BYTES / 255
DOG, LIGHT, MOUSE = Wanted(name="dog"), Wanted(name="traffic light"), Wanted(name="computer mouse")
PROMPTS = [
    Prompt(text="a", objects=(DOG, LIGHT)),
    Prompt(text="b", objects=(Wanted(name="traffic light", count=2, colour="red"),), unwanted=(Wanted(name="dog", count=1),)),
    Prompt(text="c", objects=(MOUSE, Wanted(name="dog", position=("left of", 0)), LIGHT)),
]
SAVED = {"mask2former": save_mask2former, "detr": save_detr, "rt_detr": save_rt_detr, "grounding_dino": save_grounding_dino}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("objects")
    saved = {name: save(place / name) for name, save in {**SAVED, "git": save_git, "blip": save_blip}.items()}
    return saved | {"clip": save_clip(place / "clip")}


def seen(detections):
    return [(d.label, pytest.approx(d.score, abs=1e-5), pytest.approx(d.box, abs=1e-5)) for d in detections]


# ---- detectors ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("size", [(48, 64), (70, 40), (30, 100)])
def test_pictures_are_prepared_as_transformers_does(folders, kind, size):
    images = (F.interpolate(torch.rand(2, 3, 5, 5, generator=NOISE), size, mode="bilinear") * 255).round().to(torch.uint8)
    scaling = scaling_of(folders[kind])
    want = AutoImageProcessor.from_pretrained(folders[kind])(list(images.numpy()), return_tensors="pt")["pixel_values"]
    got = scale(images / 255, scaling)
    assert got.shape == want.shape
    assert ((got - want) * torch.tensor(scaling.std).view(3, 1, 1)).abs().max() < 1.5 / 255


@pytest.mark.parametrize("kind", SAVED)
def test_a_picture_is_seen_alike_in_any_company(folders, kind):
    names = [["dog", "traffic light"], ["dog"], ["traffic light", "dog"]]
    together, apart = load_detector(folders[kind], 3), load_detector(folders[kind], 1)
    assert isinstance(together, Detector)
    found = together.detect(IMAGES, names, [0.0, 0.0, 0.1])
    assert sum(map(len, found)) > 1
    for row, detections in enumerate(found):
        own = apart.detect(IMAGES[row : row + 1], names[row : row + 1], [[0.0, 0.0, 0.1][row]])[0]
        assert [(d.label, d.score, d.box) for d in own] == seen(detections)
        assert [d.score for d in detections] == sorted((d.score for d in detections), reverse=True)
        assert {d.label for d in detections} <= set(names[row])


@pytest.mark.parametrize("kind", ["detr", "rt_detr"])
def test_boxes_are_those_that_transformers_reads(folders, kind):
    detector = load_detector(folders[kind], 3)
    with torch.no_grad():
        out = detector.model(pixel_values=scale(IMAGES, detector.scaling))
    theirs = AutoImageProcessor.from_pretrained(folders[kind]).post_process_object_detection(out, threshold=0.05)
    for own, want in zip(detector.detect(IMAGES, [CLASSES] * 3, [0.05] * 3), theirs, strict=True):
        order = want["scores"].argsort(descending=True, stable=True).tolist()
        boxes = want["boxes"].clamp(0, 1)
        labels, scores = want["labels"].tolist(), want["scores"].tolist()
        assert [(d.label, d.score, d.box) for d in own] == [
            (CLASSES[labels[i]], pytest.approx(scores[i], abs=1e-6), pytest.approx(boxes[i].tolist(), abs=1e-6)) for i in order
        ]
        assert own


def test_masks_are_those_that_transformers_reads(tmp_path):
    detector = load_detector(save_mask2former(tmp_path, {"height": 384, "width": 384}), 1)  # the size that it judges masks at
    image = F.interpolate(IMAGES[:1], (384, 384))
    with torch.no_grad():
        out = detector.model(pixel_values=scale(image, detector.scaling))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    theirs = processor.post_process_instance_segmentation(out, threshold=0.02, target_sizes=[(384, 384)], return_binary_maps=True)[0]
    own = detector.detect(image, [CLASSES], [0.02])[0]
    told = sorted(zip(theirs["segments_info"], theirs["segmentation"], strict=True), key=lambda pair: -pair[0]["score"])
    assert len(own) == len(told) > 1
    for detection, (info, mask) in zip(own, told, strict=True):
        assert detection.label == CLASSES[info["label_id"]]
        assert detection.score == pytest.approx(info["score"], abs=2e-6)
        assert detection.mask is not None
        assert torch.equal(detection.mask, mask.bool())
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        want = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert detection.box == pytest.approx([float(edge) / 384 for edge in want])


def test_grounding_dino_reads_classes_apart(folders):
    detector = load_detector(folders["grounding_dino"], 3)
    ids, places = detector.caption(("Traffic Light", "dog"))
    tokenizer = BertTokenizer.from_pretrained(folders["grounding_dino"])
    assert ids == tokenizer("traffic light . dog .")["input_ids"]
    words = {name: [WORDS[i] for i in ids[place]] for name, place in places.items()}
    assert words == {"Traffic Light": ["traffic", "light"], "dog": ["dog"]}
    with torch.no_grad():
        out = detector.model(pixel_values=scale(IMAGES[:1], detector.scaling), input_ids=torch.tensor([ids]))
    probability, boxes = out.logits[0].sigmoid(), out.pred_boxes[0]
    found = detector.detect(IMAGES[:1], [["Traffic Light", "dog"]], [0.0])[0]
    assert len(found) == 16
    for name, own in (("Traffic Light", probability[:, 1:3].mean(1)), ("dog", probability[:, 4])):
        detections = [d for d in found if d.label == name]
        for detection, query in zip(detections, own.argsort(descending=True).tolist(), strict=True):
            x, y, width, height = boxes[query].tolist()
            corners = torch.tensor([x - width / 2, y - height / 2, x + width / 2, y + height / 2]).clamp(0, 1).tolist()
            assert detection.score == pytest.approx(float(own[query]), abs=1e-6)
            assert detection.box == pytest.approx(corners, abs=1e-6)


def test_classes_have_several_names():
    known = vocabulary({0: "person", 4: "mouse", 7: "sofa", 8: "TV"})
    assert known == {"person": 0, "mouse": 4, "computer mouse": 4, "sofa": 7, "couch": 7, "tv": 8, "tvmonitor": 8}


# ---- GenEval -----------------------------------------------------------------------------------------------------------------------------


class Fixed:
    """A detector that saw what it is told, of the classes it is asked for, if it was sure enough."""

    def __init__(self, found):
        self.found, self.least = found, []

    def require(self, names):
        pass

    def detect(self, images, names, least):
        self.least.append(list(least))
        rows = zip(self.found, names, least, strict=True)
        return [tuple(d for d in row if d.label in asked and d.score > limit) for row, asked, limit in rows]


def saw(label, box, score=0.95):
    return Detection(label=label, score=score, box=box)


LEFT, RIGHT = (0.0, 0.4, 0.2, 0.6), (0.7, 0.4, 0.9, 0.6)
TWO = [
    Prompt(objects=(DOG, Wanted(name="cat", position=("left of", 0)))),
    Prompt(objects=(Wanted(name="dog", count=2), Wanted(name="cat")), unwanted=(Wanted(name="dog", count=3), Wanted(name="cup"))),
]
FOUND = [
    (saw("dog", LEFT), saw("cat", RIGHT)),
    (saw("dog", LEFT), saw("dog", RIGHT), saw("dog", (0.4, 0.4, 0.5, 0.5), 0.6), saw("cat", RIGHT), saw("cup", LEFT)),
]


def test_geneval_adds_up_over_objects(folders):
    reward = build_reward(GenEvalConfig(detector=str(folders["rt_detr"]), clip=str(folders["clip"])))
    assert isinstance(reward, GenEval)
    reward.detector = Fixed(FOUND)
    judged = judge_now(reward, IMAGES[:2], TWO)
    assert reward.detector.least == [[0.3, 0.9]]
    torch.testing.assert_close(judged.value, torch.tensor([2 / 3, 3 / 4]))
    assert judged.parts["correct"].tolist() == [0, 0]
    torch.testing.assert_close(judged.parts["position"], torch.tensor([0, torch.nan]), equal_nan=True)
    assert judged.parts["unwanted"][1] == 0.5
    assert judged.region_value is not None
    torch.testing.assert_close(judged.region_value, torch.tensor([[1 / 3, 1 / 3], [1 / 2, 1 / 4]]))
    assert judged.region_box is not None
    torch.testing.assert_close(judged.region_box[1], torch.tensor([[0.0, 0.4, 0.9, 0.6], RIGHT]))
    assert [found.text for found in judged.found[0]] == ["dog", "cat"]
    plain = GenEval(GenEvalConfig(score="correct"), Fixed(FOUND), reward.colours.clip)
    swapped = [dataclasses.replace(TWO[0], objects=(DOG, Wanted(name="cat", position=("right of", 0)))), TWO[1]]
    judged = judge_now(plain, IMAGES[:2], swapped)
    assert judged.value.tolist() == [1, 0]
    assert judged.region_value is None


@pytest.mark.parametrize("kind", SAVED)
def test_geneval_is_its_rule_on_what_the_detector_saw(folders, kind):
    config = GenEvalConfig(detector=str(folders[kind]), clip=str(folders["clip"]), threshold=0.02, counting_threshold=0.02, batch=2)
    prompts, images = PROMPTS, IMAGES
    reward = build_reward(config)
    judged = judge_now(reward, images, prompts)
    for row, (detections, prompt) in enumerate(zip(reward.detect(images, prompts), prompts, strict=True)):
        assert float(judged.value[row]) == pytest.approx(graded(detections, prompt, (48, 64)), abs=1e-6)
        assert sum(shares(conditions(detections, prompt, (48, 64)), prompt)) == pytest.approx(float(judged.value[row]), abs=1e-6)
        alone = judge_now(reward, images[row : row + 1], prompts[row : row + 1])
        assert float(alone.value[0]) == pytest.approx(float(judged.value[row]), abs=1e-5)
    assert judged.value.std() > 0


# ---- T2I-R1's detector reward ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "a", "b", "share"),
    [
        ("left of", LEFT, RIGHT, 1),
        ("right of", LEFT, RIGHT, 0),
        ("right of", RIGHT, LEFT, 1),
        ("above", LEFT, RIGHT, 0),
        ("above", (0.4, 0.0, 0.6, 0.2), (0.4, 0.7, 0.6, 0.9), 1),
        ("below", (0.4, 0.7, 0.6, 0.9), (0.4, 0.0, 0.6, 0.2), 1),
        ("left of", (0.0, 0.0, 0.4, 0.4), (0.2, 0.0, 0.6, 0.4), 0.1 / (1 / 3)),
        ("next to", LEFT, RIGHT, 1),  # one above the other's height counts
        ("next to", (0.0, 0.0, 0.1, 0.1), (0.5, 0.8, 0.6, 0.9), 150 / 512 / 0.8),
    ],
)
def test_places_by_hand(position, a, b, share):
    assert placed(position, a, b, (64, 64)) == pytest.approx(share)


def test_places_are_of_pixels():
    a, b = (0.0, 0.0, 0.1, 0.1), (0.3, 0.4, 0.4, 0.5)
    assert [placed("left of", a, b, size) for size in ((64, 64), (64, 128))] == [0, 1]


def test_what_the_released_code_gets_wrong():
    above = ((0.4, 0.0, 0.6, 0.2), (0.4, 0.7, 0.6, 0.9), (64, 64))
    assert [placed("above", *above, paper=paper) for paper in (False, True)] == [1, 0]
    far = ((0.0, 0.0, 0.1, 0.1), (0.9, 0.9, 1.0, 1.0), (64, 64))
    assert [placed("next to", *far, paper=paper) for paper in (False, True)] == [pytest.approx(150 / 512 / 0.9), 1]
    twins = [saw("dog", (0.1, 0.1, 0.3, 0.3)), saw("dog", (0.12, 0.1, 0.32, 0.3), 0.5)]
    assert [len(thinned(twins, paper=paper)) for paper in (False, True)] == [1, 2]


def test_duplicates_are_thinned_out_surest_first():
    boxes = [(0.0, 0.0, 0.4, 0.4), (0.1, 0.0, 0.5, 0.4), (0.25, 0.0, 0.65, 0.4)]
    assert iou(boxes[0], boxes[1]) == pytest.approx(0.6)
    kept = thinned([saw("dog", box, score) for box, score in zip(boxes, (0.5, 0.9, 0.4), strict=True)])
    assert [d.score for d in kept] == [0.9, 0.4]
    assert iou(boxes[0], (0.5, 0.5, 0.6, 0.6)) == iou((0.1, 0.1, 0.1, 0.1), (0.2, 0.2, 0.2, 0.2)) == 0


@pytest.mark.parametrize(
    ("prompt", "found", "value"),
    [
        (Prompt(objects=(DOG, LIGHT)), [saw("dog", LEFT)], 1 / 2),
        (Prompt(objects=(DOG, LIGHT)), [saw("dog", LEFT), saw("dog", RIGHT), saw("traffic light", LEFT)], 1),
        (Prompt(objects=(Wanted(name="dog", count=2), LIGHT)), [saw("dog", LEFT), saw("dog", RIGHT)], 1 / 2),
        (Prompt(objects=(Wanted(name="dog", count=2),)), [saw("dog", LEFT)], 0.2),
        (Prompt(objects=(DOG,), unwanted=(Wanted(name="dog", count=2),)), [saw("dog", LEFT), saw("dog", RIGHT)], 0.2),
        (TWO[0], [saw("cat", LEFT), saw("dog", RIGHT)], 0.9),
        (TWO[0], [saw("cat", RIGHT), saw("dog", LEFT)], 0.4),
        (TWO[0], [saw("cat", RIGHT), saw("cat", LEFT, 0.99), saw("dog", (0.3, 0.4, 0.5, 0.6))], 0.9),
        (TWO[0], [saw("cat", RIGHT)], 0.2),
        (PROMPTS[2], [saw("traffic light", LEFT)], 1 / 2),
    ],
)
def test_t2i_r1_by_hand(prompt, found, value):
    told = object_shares(found, prompt, (64, 64))
    assert sum(map(sum, told.values())) == pytest.approx(value)
    judged = judge_now(GroundingDINO(GroundingDINOConfig(), Fixed([found])), IMAGES[:1], [prompt])
    assert float(judged.value[0]) == pytest.approx(value)
    assert judged.region_value is not None
    assert float(judged.region_value.nansum()) == pytest.approx(value)
    assert sum(float(part[0]) for part in judged.parts.values()) == pytest.approx(value)


# ---- questions ---------------------------------------------------------------------------------------------------------------------------


def test_what_is_asked():
    assert question(Wanted(name="chair", colour="red", attributes=("wooden",))) == "red wooden chair?"
    assert question(Wanted(name="traffic light", count=2)) == "traffic light?"


@pytest.mark.parametrize("kind", ["git", "blip"])
def test_answers_are_those_of_transformers_one_by_one(folders, kind):
    questions = [["dog?", "red traffic light?"], ["cat?"], ["wooden bench?", "dog?", "blue cat?"]]
    model = load_answerer(folders[kind], 2)
    told = model.yes(IMAGES, questions)
    tokenizer, processor = BertTokenizer.from_pretrained(folders[kind]), AutoImageProcessor.from_pretrained(folders[kind])
    assert torch.cat(told).std() > 0.01
    for row, asked in enumerate(questions):
        pixels = processor(BYTES[row].numpy(), return_tensors="pt")["pixel_values"]
        for place, one in enumerate(asked):
            ids = torch.tensor([tokenizer(one)["input_ids"]])
            with torch.no_grad():
                if kind == "git":
                    logits = model.model(pixel_values=pixels, input_ids=ids[:, :-1]).logits[0, -1]
                else:
                    ids[0, 0] = WORDS.index("[ENC]")
                    image = model.model.vision_model(pixel_values=pixels).last_hidden_state
                    read = model.model.text_encoder(input_ids=ids, encoder_hidden_states=image).last_hidden_state
                    begin = torch.tensor([[WORDS.index("[DEC]")]])
                    logits = model.model.text_decoder(input_ids=begin, encoder_hidden_states=read).logits[0, 0]
            yes, no = logits.softmax(0)[[WORDS.index("yes"), WORDS.index("no")]]
            assert float(told[row][place]) == pytest.approx(float(yes / (yes + no)), abs=1e-2)  # their pixels are bytes
            alone = model.yes(IMAGES[row : row + 1], [[one]])[0]
            assert float(alone[0]) == pytest.approx(float(told[row][place]), abs=1e-5)


def test_a_question_is_tokenised_once(folders, monkeypatch):
    model = load_answerer(folders["git"], 8)
    asked, tokenise = [], model.tokenise
    monkeypatch.setattr(model, "tokenise", lambda text: asked.append(text) or tokenise(text))
    for _ in range(2):
        model.yes(IMAGES, [["dog?", "cat?"]] * 3)
    assert asked == ["dog?", "cat?"]


def test_vqa_is_mean_or_product(folders):
    mean = build_reward(VQAConfig(model=str(folders["git"])))
    assert isinstance(mean, VQA)
    judged = judge_now(mean, IMAGES, PROMPTS)
    yes = mean.model.yes(IMAGES, [[question(wanted) for wanted in prompt.objects] for prompt in PROMPTS])
    torch.testing.assert_close(judged.value, torch.stack([row.mean() for row in yes]))
    assert judged.region_value is not None
    assert judged.region_value.isnan().sum(1).tolist() == [1, 2, 0]
    product = judge_now(VQA(VQAConfig(combine="product"), mean.model), IMAGES, PROMPTS)
    torch.testing.assert_close(product.value, torch.stack([row.prod() for row in yes]))
    torch.testing.assert_close(product.parts["least"], torch.stack([row.min() for row in yes]))
    assert product.region_value is None


# ---- what is missing or wrong ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "command"),
    [
        (GenEvalConfig(), "geneval.detector=.*hf download facebook/mask2former-swin-small-coco-instance "),
        (GroundingDINOConfig(), "grounding_dino.model=.*hf download IDEA-Research/grounding-dino-base "),
        (VQAConfig(), "vqa.model=.*hf download microsoft/git-large-vqav2 "),
        (VQAConfig(model="Salesforce/blip-vqa-base"), "hf download Salesforce/blip-vqa-base "),
    ],
)
def test_weights_that_are_not_there(config, command, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for demanded in (lambda: build_reward(config), lambda: judge_of("mine", config, None)):
        with pytest.raises(ConfigError, match=command):
            demanded()


def test_folders_of_something_else(tmp_path, folders):
    with pytest.raises(ConfigError, match=r"geneval\.detector=.* holds a clip\. Give .* mask2former, detr"):
        judge_of("mine", GenEvalConfig(detector=str(folders["clip"])), None)
    with pytest.raises(ConfigError, match=r"geneval\.clip=.* holds a git\. Give .* clip"):
        judge_of("mine", GenEvalConfig(detector=str(folders["detr"]), clip=str(folders["git"])), None)
    with pytest.raises(ConfigError, match=r"grounding_dino\.model=.* holds a detr"):
        judge_of("mine", GroundingDINOConfig(model=str(folders["detr"])), None)
    with pytest.raises(ConfigError, match=r"vqa\.model=.* holds a clip\. Give .* git, blip"):
        judge_of("mine", VQAConfig(model=str(folders["clip"])), None)
    other = save_detr(tmp_path / "other")
    told = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(told | {"resample": 0}))
    with pytest.raises(CheckpointError, match="does not scale the whole picture"):
        load_detector(other, 1)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"d_model": 32}))
    with pytest.raises(CheckpointError, match="do not fit DetrForObjectDetection"):
        load_detector(other, 1)


def test_prompts_that_cannot_be_judged(folders):
    geneval = GenEvalConfig(detector=str(folders["detr"]), clip=str(folders["clip"]))
    rewards = {"rewards.g": geneval, "rewards.v": VQAConfig()}

    def problems(*prompts):
        found: list[str] = []
        check_objects(found, prompts, rewards)
        return found

    assert problems(*PROMPTS) == []
    mute = problems(Prompt(text="a dog"), PROMPTS[0])
    assert [said.split(":")[0] for said in mute] == ["rewards.g", "rewards.v"]
    assert "1 of 2 prompts (the first: 'a dog') have no objects to look for. Give every prompt `objects`" in mute[0]
    (unknown,) = problems(Prompt(objects=(Wanted(name="dogs"),)))
    assert unknown.startswith("class 'dogs': ")
    assert "Its nearest: dog" in unknown
    (colour,) = problems(Prompt(objects=(Wanted(name="dog", colour="scarlet"),)))
    assert colour.startswith("colour 'scarlet' of 'dog': GenEval knows red, ")
    (beside,) = problems(Prompt(objects=(DOG, Wanted(name="person", position=("next to", 0)))))
    assert beside.startswith("position 'next to' of 'person'")
    reward = build_reward(geneval)
    with pytest.raises(RewardError, match="prompt 'a dog': names no object to look for"):
        reward(IMAGES[:1], [Prompt(text="a dog")])
    with pytest.raises(ConfigError, match="class 'dogs': this detr does not know it"):
        reward(IMAGES[:1], [Prompt(objects=(Wanted(name="dogs"),))])
    with pytest.raises(ConfigError, match="full stops"):
        load_detector(folders["grounding_dino"], 1).detect(IMAGES[:1], [["St. Bernard"]], [0.3])


def test_prompts_cross_to_another_process_whole():
    prompt = Prompt(objects=(DOG, Wanted(name="cat", count=2, colour="red", attributes=("wet",), position=("above", 0))), unwanted=(LIGHT,))
    assert prompt_of(json.loads(json.dumps(dataclasses.asdict(prompt)))) == prompt


def test_settings_that_cannot_be():
    for build in (lambda: GenEvalConfig(threshold=1.0), lambda: GroundingDINOConfig(threshold=-0.1)):
        with pytest.raises(ConfigError, match=r"threshold=.*below 1"):
            build()
    for cls in (GenEvalConfig, GroundingDINOConfig, VQAConfig):
        with pytest.raises(ConfigError, match=r"batch=0: must be 1 or more"):
            cls(batch=0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [*SAVED, "git", "blip"])
def test_on_a_gpu_as_on_the_cpu(folders, kind):
    prompts = [Prompt(objects=(DOG, LIGHT))] * 3
    config = {"git": VQAConfig(model=str(folders["git"])), "blip": VQAConfig(model=str(folders["blip"]))}.get(
        kind, GenEvalConfig(detector=str(folders.get(kind, "")), clip=str(folders["clip"]), threshold=0.05)
    )
    reward = build_reward(config)
    want = reward(IMAGES, prompts).value
    torch.testing.assert_close(reward(IMAGES.cuda(), prompts).value.cpu(), want, rtol=0, atol=1e-3)


def test_they_are_tried_on_pictures_whose_lines_name_objects(folders, tmp_path):
    """`varl reward-check` on a folder with prompts.jsonl, GenEval's lines among them."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    lines = [
        '{"image": "0.png", "prompt": "a dog", "tag": "single_object", "include": [{"class": "dog", "count": 1}]}',
        '{"image": "1.png", "text": "a red traffic light", "objects": [{"name": "traffic light", "colour": "red"}]}',
    ]
    (pictures / "prompts.jsonl").write_text("\n".join(lines))
    for i in range(2):
        Image.fromarray(BYTES[i].permute(1, 2, 0).numpy()).save(pictures / f"{i}.png")
    geneval = GenEvalConfig(detector=str(folders["detr"]), clip=str(folders["clip"]))
    rewards = {name: WeightedReward(reward=one) for name, one in {"g": geneval, "v": VQAConfig(model=str(folders["git"]))}.items()}
    run = RunConfig(model="bundled:glyphs", data=PicturesConfig(path=str(pictures), image_size=(48, 64)), rewards=rewards)
    found, asked = try_rewards(run, pictures, 2)
    for tried in (found, asked):
        assert tried.pictures.shape == tried.noise.shape == (2,)
        assert ((tried.pictures >= 0) & (tried.pictures <= 1)).all()
        assert tried.memory > 0
